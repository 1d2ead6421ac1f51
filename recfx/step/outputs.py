"""Errors for what `forward` and a loss return. Traced with a step, they leave nothing in the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from recfx.checks import check_type, names, said

__all__ = ["check_logit", "check_loss", "check_outputs", "check_tensors"]


def check_outputs(result: Any, tasks: Mapping[str, Any]) -> None:
    """Raises TypeError when `forward` does not return a dict for several tasks, ValueError on its names."""
    expected = ", ".join(f"'{name}'" for name in tasks)
    advice = f"It has the outputs by task: {expected}."
    if not isinstance(result, Mapping):
        raise TypeError(f"forward: got {said(result)} returned, expected a dict. {advice}")
    missing = [name for name in tasks if name not in result]
    unknown = [name for name in result if name not in tasks]
    if missing:
        raise ValueError(f"forward: got no output '{missing[0]}' but {names(result)}, expected one. {advice}")
    if unknown:
        raise ValueError(f"forward: got an output '{unknown[0]}', expected none of that name. {advice}")


def check_logit(
    logit: Any, task: str, feats: Mapping[str, Any], columns: Sequence[str], num_samples: int | None = None
) -> None:
    """Other shapes would be broadcast against each other: a loss that is wrong by a factor of B, and no error.

    Args:     task: its name, "" for one alone.
              columns: names of the features that are as large: the label, and the weight of a sample.
              num_samples: B; None: that of the first of the columns.
    Raises:   TypeError when `forward` returns no tensor of floats, ValueError on a shape.
    """
    of_task = f" for task '{task}'" if task else ""
    if not isinstance(logit, Tensor) or not logit.is_floating_point():
        raise TypeError(f"forward: got {said(logit)} returned{of_task}, expected the logit, f32 [B, 1].")
    shapes = {"logit": logit.shape} | {name: feats[name].shape for name in columns}
    num_samples = feats[columns[0]].shape[0] if num_samples is None else num_samples
    if set(shapes.values()) != {(num_samples, 1)}:
        flat = [name for name, shape in shapes.items() if len(shape) == 1]
        advice = f" Add the last axis: {flat[0]}.unsqueeze(1)." if flat else ""
        raise ValueError(
            f"forward: got { ({n: list(s) for n, s in shapes.items()}) }{of_task}, expected [B, 1] for each. Other "
            f"shapes would be broadcast against each other.{advice}"
        )


def check_tensors(output: Any, task: str, num_samples: int) -> None:
    """Raises TypeError when the output of a batch loss is not a dict of floats, ValueError on a shape."""
    of_task = f" for task '{task}'" if task else ""
    if not isinstance(output, Mapping) or not output:
        raise TypeError(
            f"forward: got {said(output)} returned{of_task}, expected a dict of tensors [B, ...], such as "
            "{'query': ..., 'item': ...}. Its loss is one of the whole batch."
        )
    for name, t in output.items():
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise TypeError(f"forward: got {said(t)} as '{name}'{of_task}, expected a tensor of floats [B, ...].")
        if t.dim() == 0 or t.shape[0] != num_samples:
            raise ValueError(
                f"forward: got {list(t.shape)} as '{name}'{of_task}, expected [{num_samples}, ...], a row for each "
                "sample."
            )


def check_loss(loss: Any, logit: Tensor, argument: str = "loss") -> None:
    """Raises TypeError when a loss returns no tensor, ValueError when it is not one loss a sample.

    Args:     logit: of that shape.  argument: name of the loss.
    """
    check_type(argument, loss, Tensor, "Return a loss per sample, [B, 1].")
    if loss.shape != logit.shape:
        raise ValueError(
            f"{argument}: got {list(loss.shape)}, expected {list(logit.shape)}, one per sample. A mean would count "
            "padding. Use reduction='none'."
        )
