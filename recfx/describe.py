"""What `repr` prints of a batch, a table, a training state and a step: a few lines, read from the device.

By names alone, since the classes are defined above. Nothing here raises: what a function of `tree_map` has put in the
place of tensors is printed as tuples are, and a number that cannot be read now (of a fake tensor) as '?'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["batch_text", "or_plain", "state_text", "step_text", "table_text"]

MOST_LINES = 12
SHORT = {"bfloat": "bf", "float": "f", "uint": "u", "int": "i"}


def or_plain(describe: Callable[[Any], str]) -> Callable[[Any], str]:
    """`describe` as a `__repr__`; where it fails, the fields by name."""

    def text(value: Any) -> str:
        try:
            return describe(value)
        except Exception:
            fields = ", ".join(f"{name}={getattr(value, name, None)!r}" for name in _fields_of(value))
            return f"{type(value).__name__}({fields})"

    return text


def _fields_of(value: Any) -> Iterable[str]:
    return [*getattr(value, "_fields", ()), *getattr(value, "__dataclass_fields__", ())]


def batch_text(batch: Any) -> str:
    """Of a `recfx.types.Batch`: samples, bytes and device, then its columns, at most a dozen."""
    columns = {name: parts for name, parts in batch.layout.columns.items() if name != "num_samples"}
    first = next(iter(columns.values()))
    outermost = next((first[part] for part in ("outer0", "offsets") if part in first), None)
    size = first["dense"].shape[0] if outermost is None else outermost.shape[0] - 1
    real = _read(batch["num_samples"]) if "num_samples" in batch.layout.columns else "?"
    what = f"{real} of {size} samples, {_bytes(batch.layout.num_bytes)} on {batch.buffer.device}"
    return _lines(f"Batch({what})", [f"{name}: {_column(parts)}" for name, parts in columns.items()])


def _column(parts: dict[str, Any]) -> str:
    if "dense" in parts:
        return f"{_dtype(parts['dense'].dtype)} {list(parts['dense'].shape)}"
    values, depth = parts["values"], 1 + sum(part.startswith("outer") for part in parts)
    nested = f", {depth} deep" if depth > 1 else ""
    weighted = ", weighted" if "weights" in parts else ""
    return f"lists of {_dtype(values.dtype)}, room for {values.shape[0]:,}{nested}{weighted}"


def table_text(table: Any) -> str:
    """Of a `recfx.table.TableState`: rows in use, and what is reserved."""
    live = _read(table.num_rows, table.num_free)
    num, width = table.rows.shape[1:]
    where = f"each {_dtype(table.rows.dtype)} [{num}, {width}], on {table.rows.device}"
    return f"TableState({live} of {table.rows.shape[0]:,} rows, {where}, index of {_read(table.num_slots)} slots)"


def state_text(state: Any) -> str:
    """Of a `recfx.step.TrainState`: step and parameters, then its tables, the open window and the metrics."""
    params = state.params.values()
    count = _number(sum(p.numel() for p in params), "parameter", "parameters")
    what = f"{count} in {_number(len(params), 'tensor', 'tensors')}"
    size = _bytes(sum(p.numel() * p.element_size() for p in params))
    window = _read(state.window.num_batches)
    lines = [f"table {i}: {table_text(t).removeprefix('TableState(')[:-1]}" for i, t in enumerate(state.tables)]
    lines += [f"window: open, batches in it: {window}"] if window != "0" else []
    bad = _read(state.nonfinite.num_batches)
    lines += [f"not finite: {bad} micro-batches"] if bad != "0" else []
    title = f"TrainState(step {_read(state.step)}, {what}, {size} on {state.step.device})"
    return _lines(title, lines)


def step_text(step: Any) -> str:
    """Of a `recfx.step.Step`: how it trains, then its tables and groups of embeddings."""
    how = f"accumulation {step.accumulation}, seed {step.seed}, {step.precision}, {step.on_nonfinite} on NaN"
    title = f"Step({how}, rows keep {' and '.join(step.slots) or 'nothing'})"
    lines = []
    for i, table in enumerate(step.plan.tables):
        vocabularies = _number(len(table.vocabularies), "vocabulary", "vocabularies")
        width = " + ".join(map(str, table.dims))
        features = _names(dict.fromkeys(lookup.feature for lookup in table.lookups))
        lines.append(f"table {i}: {vocabularies} of width {width} on {table.device}, read by {features}")
    for group, cells in step.plan.groups.items():
        lines.append(f"group '{group}': {_number(len(cells), 'embedding', 'embeddings')}")
    return _lines(title, lines)


def _lines(title: str, lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES + 1 else []
    return "\n    ".join([title, *(lines[:MOST_LINES] if more else lines), *more])


def _names(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown) if len(shown) <= 4 else f"{', '.join(shown[:3])} and {len(shown) - 3} more"


def _number(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _read(value: Tensor, without: Tensor | None = None) -> str:
    """A counter, less another one, or '?' where the host cannot read it now."""
    try:
        if value.is_cuda and torch.cuda.is_current_stream_capturing():
            return "?"
        return f"{int(value) - (0 if without is None else int(without)):,}"
    except Exception:
        return "?"


def _bytes(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 10_000 or unit == "GB":
            break
        count = round(count / 1000)
    return f"{count:,} {unit}"


def _dtype(dtype: torch.dtype) -> str:
    return re.sub(r"^[a-z]+", lambda m: SHORT.get(m[0], m[0]), str(dtype).removeprefix("torch."))
