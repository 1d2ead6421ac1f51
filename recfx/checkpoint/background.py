"""Runs work in a forked child. The child keeps the memory of this moment while the parent continues to write."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import warnings
from collections.abc import Callable

__all__ = ["Job"]

IGNORED = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Job:
    """Runs `work` in a forked child.

    A fork copies page tables, not memory; a page is copied when the parent first writes to it while the child lives.
    The child has only this one thread, so it must not use torch, which needs its OpenMP threads. It ignores ctrl-C,
    SIGTERM and SIGHUP, which a terminal or a supervisor also sends to it.

    Raises:   OSError when the system has no memory for a child.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self._pipe, theirs = os.pipe()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            with warnings.catch_warnings():  # Python 3.12 warns of a fork in a process with threads
                warnings.simplefilter("ignore", DeprecationWarning)
                self._pid = os.fork()
            if self._pid == 0:
                _run(work, theirs)
        except OSError as error:
            os.close(self._pipe)
            raise OSError(error.errno, f"background save: no child process: {error.strerror}.") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(theirs)

    @property
    def done(self) -> bool:
        """Whether `finish` would return at once."""
        return not self._pid or os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> None:
        """Ends the child at once. `finish` then raises."""
        if not self.done:
            os.kill(self._pid, signal.SIGKILL)

    def finish(self) -> None:
        """Waits for the child; raises the OSError that ended it, or RuntimeError when it was killed. Once only."""
        if not self._pid:
            return
        with open(self._pipe, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        if said:
            raise pickle.loads(said)
        if status:
            raise RuntimeError(f"background save: ended by signal {os.WTERMSIG(status)}. The checkpoint is not there.")


def _run(work: Callable[[], object], pipe: int) -> None:
    """All that the child runs. It does not clean up objects of the parent."""
    status = 1
    try:
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        gc.disable()
        work()
        status = 0
    except OSError as error:
        os.write(pipe, pickle.dumps(error))
    except BaseException as error:
        os.write(pipe, pickle.dumps(RuntimeError(f"background save: {error!r}.")))
    finally:
        os._exit(status)
