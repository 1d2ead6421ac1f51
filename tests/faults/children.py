"""What a test cannot do to its own process: become another user, be ended by a signal, have a full disk."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folder_for_all() -> Iterator[Path]:
    """A new folder that every user can enter, unlike one in a private TMPDIR."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def in_child(work: Callable[[], object]) -> None:
    """Runs it in a forked child and fails when that raises, or a signal ends it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status), f"ended by signal {os.WTERMSIG(status)}"
    assert status == 0
