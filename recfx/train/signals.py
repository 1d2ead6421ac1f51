"""Ctrl-C, SIGTERM and SIGHUP during training: collected, so that a step is never cut in half."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["interrupts"]

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collects ctrl-C, SIGTERM and SIGHUP instead of raising, so that a step is never cut in half.

    A second one of the same kind raises: supervisors send SIGTERM and SIGHUP together. A signal that the process was
    started to ignore, as `nohup` does with SIGHUP, stays ignored, and one that is handled outside Python is left alone:
    its handler could not be put back.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: Any) -> None:
        if number in received:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        received.append(number)

    handlers = {number: signal.getsignal(number) for number in STOPPING}
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, receive)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
