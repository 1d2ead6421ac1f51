"""The curves of a run as TensorBoard shows them, next to metrics.jsonl. Needs the package tensorboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recfx.train import Event, Progress

__all__ = ["TensorBoard"]

FOLDER = "tensorboard"


class TensorBoard:
    """A listener of `recfx.train.train` that writes events to <output_dir>/tensorboard; on rank 0.

    Tags are "train/loss", "train/auc", "train/click/auc", "eval/log_loss" and so on; "rows/<table>", "samples_per_s".

    Raises:   ModuleNotFoundError that names what to install, where it is not.
    """

    def __init__(self, output_dir: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModuleNotFoundError(
                "tensorboard: got no package of that name, expected it. It writes the files that TensorBoard reads. "
                "Install it (pip install tensorboard), or leave --tensorboard out: metrics.jsonl has the same numbers."
            ) from error
        self._writer: Any = SummaryWriter(str(Path(output_dir, FOLDER)))

    def on_event(self, event: Event, progress: Progress, state: Any) -> None:
        """Writes the numbers of a log line or an evaluation."""
        if event == "log":
            values = {f"train/{name}": value for name, value in progress.metrics.items() if not _is_count(name)}
            values |= {"train/loss": progress.loss, "samples_per_s": progress.samples_per_s}
            values |= {f"rows/{i}": float(int(t.num_rows) - int(t.num_free)) for i, t in enumerate(state.tables)}
            values |= {"rate_factor": progress.rate_factor} if progress.rate_factor != 1 else {}
            self._add(values, progress.step)
        elif event == "after_evaluation":
            values = {f"eval/{name}": value for name, value in progress.evaluation.items() if not _is_count(name)}
            self._add(values, progress.step)

    def _add(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def _is_count(name: str) -> bool:
    return name.split("/")[-1].startswith("num_")
