"""What a person sees while a program runs: what it does now, for how long, and where training stands.

On a terminal it is one line that is drawn again, every second while the program compiles, evaluates or saves. In a
file, and on a terminal that cannot go back to the start of a line, it is a line for each log event and for each phase,
written at once.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from recfx.train import Event, Progress

__all__ = ["Bar"]

WIDTH, HEIGHT = 79, 24  # of a terminal of unknown size
TICK_S = 1.0
STARTS: dict[str, str] = {"before_epoch": "reading", "before_evaluation": "evaluating", "before_save": "saving"}
ENDS = ("after_evaluation", "after_save")


class Bar:
    """The line of one run. Use it as a context; give `on_event` to `recfx.train.train`.

    On a terminal a thread draws the seconds of a phase. It ends with the phase.

    Args:     saves_in_background: training goes on while it saves.
              file: where to; None: standard error.
    """

    def __init__(self, *, saves_in_background: bool = False, file: TextIO | None = None) -> None:
        self._file = sys.stderr if file is None else file
        self._saves_in_background = saves_in_background
        self._line = _line_on(self._file)
        self._phase, self._began, self._status, self._trains = "", 0.0, "", False
        self._save_began = 0.0  # in the background
        self._ticker: tuple[threading.Thread, threading.Event] | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, KeyboardInterrupt) and self._phase and not error.args:
            lost = "What was trained since the last checkpoint is lost" if self._trains else "Nothing was trained"
            error.args = (f"interrupted while {self._phase}, after {self._seconds()}. {lost}.",)
        self._end(" stopped after" if error else "")
        if self._line is not None:
            self._line.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows that the program does so now, such as "compiling", and for how long."""
        self._start(name)
        yield
        self._end()

    def watch(self, run: object) -> None:
        """Shows it when a captured step compiles again, for a batch with longer lists."""
        if hasattr(run, "while_compiling"):
            run.while_compiling(lambda: self.phase("compiling"))

    def write(self, line: str) -> None:
        """A line on standard output that stays."""
        if self._line is None:
            print(line, flush=True)
        else:
            self._line.write(line)
            sys.stdout.flush()

    def on_event(self, event: Event, progress: Progress, state: object = None) -> None:
        """Shows an event of `train`."""
        self._trains = True
        if event in STARTS and not (event == "before_save" and self._saves_in_background):
            self._start(STARTS[event])
        elif event == "before_save":
            self._save_began = time.perf_counter()
        elif event == "after_save" and self._saves_in_background:
            seconds, self._save_began = time.perf_counter() - self._save_began, 0.0
            if self._line is None:
                print(f"saved in the background: {seconds:.1f} s", file=self._file, flush=True)
            self._draw()
        elif event in ENDS or (event == "before_step" and self._phase):  # the first batch of an epoch is read
            self._end()
        if event == "after_evaluation":
            self.write(_held_out(progress))
        elif event == "log":
            self._log(progress)

    def _log(self, progress: Progress) -> None:
        rate = progress.samples_per_s
        parts = [
            f"{progress.epoch_text}, step {progress.step:,}: loss {progress.loss:.4f}",
            f"AUC {progress.auc:.4f}",
            *([f"{rate:,.0f} samples/s"] if rate == rate else []),
            f"{progress.num_samples:,} samples",
            *([f"{_duration(progress.eta_s)} left"] if progress.eta_s == progress.eta_s else []),
            *([f"{progress.num_nonfinite:,} batches with NaN or infinity"] if progress.num_nonfinite else []),
        ]
        self._status = ", ".join(parts)
        if self._line is None:
            print(self._status, file=self._file, flush=True)
        self._draw()

    def _start(self, name: str) -> None:
        self._end()
        self._phase, self._began = name, time.perf_counter()
        if self._line is None:
            print(f"{name} ...", end="", file=self._file, flush=True)
            return
        self._draw()
        stop = threading.Event()
        thread = threading.Thread(target=self._tick, args=(stop,), name="recfx bar", daemon=True)
        self._ticker = thread, stop
        thread.start()

    def _end(self, how: str = "") -> None:
        if self._ticker is not None:
            thread, stop = self._ticker
            self._ticker = None
            stop.set()
            thread.join()
        if self._phase and self._line is None:
            print(f"{how} {self._seconds()}", file=self._file, flush=True)
        self._phase = ""
        self._draw()

    def _tick(self, stop: threading.Event) -> None:
        while not stop.wait(TICK_S):
            self._draw()

    def _seconds(self) -> str:
        return f"{time.perf_counter() - self._began:.1f} s"

    def _draw(self) -> None:
        if self._line is None:
            return
        parts = [f"{self._phase} {self._seconds()}"] if self._phase else []
        if self._save_began:
            parts.append(f"saving in the background {time.perf_counter() - self._save_began:.0f} s")
        self._line.set_description_str(" | ".join([*parts, *([self._status] if self._status else [])]))


class _Line(tqdm):
    """A line of text, drawn only on request."""

    monitor_interval = 0  # no thread that would draw it


def _line_on(file: TextIO) -> _Line | None:
    """None where a line cannot be drawn again."""
    if not file.isatty() or os.environ.get("TERM") == "dumb":
        return None
    try:
        width = os.get_terminal_size(file.fileno()).columns
    except OSError:  # a notebook's
        width = 0
    # tqdm draws nothing on a terminal of 0 columns and lines.
    size: dict[str, Any] = {"dynamic_ncols": True} if width else {"ncols": WIDTH, "nrows": HEIGHT}
    return _Line(bar_format="{desc}", file=file, leave=True, mininterval=0, **size)


def _duration(seconds: float) -> str:
    """ "42 s", "3:05 min", "2:03:04 h"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours}:{m:02}:{s:02} h"
    return f"{m}:{s:02} min" if m else f"{s} s"


def _held_out(progress: Progress) -> str:
    names = {"auc": "AUC", "log_loss": "log loss", "calibration": "calibration"}
    of_files = ("pr_auc", "normalised_entropy", "ece")  # in metrics.jsonl, not on the line
    shown = {
        k: v
        for k, v in progress.evaluation.items()
        if "@" not in k and not (own := k.split("/")[-1]).startswith("num_") and own not in of_files
    }
    values = ", ".join(f"{names.get(k, k)} {v:.4f}" for k, v in shown.items())
    bad = int(progress.evaluation.get("num_nonfinite", 0))
    more = f", {bad:,} samples with NaN or infinity" if bad else ""
    return f"{progress.epoch_text}, step {progress.step:,}, held out: {values}{more}"
