"""The gate of a batch: what passes is read by every kernel without a look at its bounds."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recfx.kernels.build import has_compiler, library
from recfx.kernels.op import address, c_function, int64s

__all__ = [
    "Links", "check_columns", "check_forms", "check_num_samples", "links_of", "offsets_fit", "table_of",
]  # fmt: skip

Key = tuple[str, str]  # column, and its part: "dense", or "values", "offsets", "weights", "outer0" and so on
Form = tuple[torch.dtype, tuple[int, ...]]

DTYPES = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.uint16, torch.uint32, torch.uint64,
}  # fmt: skip


class Links(NamedTuple):
    """How the sizes of the parts of columns hang together: all that follows from names, dtypes and dimensions."""

    offsets: list[tuple[Key, int, Key, int]]  # part, its first byte, the part that it counts, what that is longer by
    samples: list[tuple[Key, int]]  # of each column the part that is B long, and what it is longer by
    weights: list[tuple[Key, Key]]  # and the values


_offsets_fit = c_function("offsets_fit")


def links_of(forms: Mapping[Key, Form], first_bytes: Mapping[Key, int]) -> Links:
    """Raises as `check_forms` where a dtype or a number of dimensions is not that of a batch."""
    offsets, samples, weights = [], [], []
    for key, (dtype, shape) in forms.items():
        name, part = key
        if part == "dense":
            samples.append((key, 0))
        elif part == "weights":
            weights.append((key, (name, "values")))
        elif part != "values":
            inner = (name, "values") if part == "offsets" else (name, f"outer{int(part[5:]) + 1}")
            inner = inner if inner in forms else (name, "offsets")
            offsets.append((key, first_bytes[key], inner, int(inner[1] != "values")))
            if part == "outer0" or (part == "offsets" and (name, "outer0") not in forms):
                samples.append((key, 1))
        if not _is_form(part, dtype, shape):
            check_forms(forms)
    return Links(offsets, samples, weights)


def _is_form(part: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    if part == "dense":
        return dtype in DTYPES and len(shape) > 0
    if part == "values":
        return dtype in DTYPES and len(shape) == 1
    return dtype == (torch.float32 if part == "weights" else torch.int32) and len(shape) == 1


def table_of(links: Links, forms: Mapping[Key, Form]) -> ctypes.Array | None:
    """What `offsets_fit` reads of columns of these sizes; None where they do not belong to one batch."""
    if len({forms[key][1][0] - more for key, more in links.samples}) > 1:
        return None
    if any(forms[key][1] != forms[values][1] for key, values in links.weights):
        return None
    sizes = ((first, forms[key][1][0] - 1, forms[items][1][0] - more) for key, first, items, more in links.offsets)
    return int64s([n for level in sizes for n in level])


def offsets_fit(base: int, table: ctypes.Array | None) -> bool:
    """Whether all offsets begin with 0, never fall, and end within what they count. False as well without a
    compiler: `check_columns` then looks again, and names what is wrong.

    Args:     base, table: an address, and for each tensor of offsets its first byte from there, its lists, and the
              items that they count.
    """
    fit = ctypes.c_int64(0)
    if table is not None and has_compiler() and library():
        _offsets_fit(base, table, len(table) // 3, ctypes.addressof(fit))
    return bool(fit.value)


def check_columns(tensors: Mapping[Key, Any]) -> None:
    """Raises where a kernel that relies on these columns would read outside them, or something else than they hold.

    Cost:     on a GPU one host read.
    Raises:   TypeError for what is not a plain tensor of a dtype that batches hold; ValueError for shapes, devices and
              offsets. Both name the column and, in a tensor, the place.
    """
    for (name, part), t in tensors.items():
        _check_plain(name, part, t)
    forms = {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    check_forms(forms)
    (first, _), device = next((key, t.device) for key, t in tensors.items())
    for (name, part), t in tensors.items():
        if t.device != device:
            raise ValueError(
                f"column '{name}': got {part} on {t.device}, expected {device}, as of column '{first}'. A batch is "
                "one buffer. Move it there first."
            )
    flat = {key: t.contiguous() for key, t in tensors.items() if key[1] not in ("dense", "values", "weights")}
    if flat:
        _check_offsets(flat, forms, device.type == "cpu")


def check_num_samples(name: str, num: Any, batch_size: int) -> None:
    """Raises TypeError when the number of real samples is not an i32 [], ValueError when it is not within the batch."""
    if not isinstance(num, Tensor) or num.dtype != torch.int32 or num.dim() or num.is_meta:
        got = f"{num.dtype} {list(num.shape)}" if isinstance(num, Tensor) else type(num).__name__
        raise TypeError(f"column '{name}': got {got}, expected torch.int32 [], how many samples are not padding.")
    if not 0 <= int(num) <= batch_size:
        raise ValueError(
            f"column '{name}': got {int(num)}, expected 0 to {batch_size}, the samples of the other columns. The loss "
            "is divided by it."
        )


def check_forms(forms: Mapping[Key, Form]) -> None:
    """Raises where dtypes or shapes are not those of columns of one batch. Nothing is read: it may run while traced."""
    num_samples: dict[str, int] = {}
    for (name, part), (dtype, shape) in forms.items():
        is_level = part not in ("dense", "values", "weights")
        expected = torch.int32 if is_level else torch.float32 if part == "weights" else None
        if dtype != (expected or dtype) or dtype not in DTYPES:
            raise TypeError(
                f"column '{name}': got {part} {dtype}, expected {expected or 'whole numbers, floats or bool'}. "
                "Kernels read the bits as such."
            )
        if len(shape) < 1 if part == "dense" else len(shape) != 1:
            axes = "[B, d]" if part == "dense" else "one dimension"
            raise ValueError(f"column '{name}': got {part} {list(shape)}, expected {axes}.")
        if is_level and shape[0] == 0:
            raise ValueError(f"column '{name}': got no {part}, expected one more than there are lists, the first 0.")
        if part == "weights" and shape != (values := forms[name, "values"][1]):
            raise ValueError(f"column '{name}': got {shape[0]} weights, expected {values[0]}, one per value.")
        if part in ("dense", "offsets", "outer0"):  # of several levels the outermost, which comes last
            num_samples[name] = shape[0] - is_level
    if len(set(num_samples.values())) > 1:
        raise ValueError(f"columns: got {num_samples} samples, expected one number. A batch is cut by sample.")


def _check_plain(name: str, part: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"column '{name}': got {part} of type {type(t).__name__}, expected Tensor.")
    if t.layout != torch.strided or t.is_quantized or t.is_meta:
        kind = "quantised" if t.is_quantized else "without data" if t.is_meta else str(t.layout)
        raise TypeError(f"column '{name}': got {part} {kind}, expected a plain dense tensor.")
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"column '{name}': got {part} of which a gradient is required, expected data. None comes back through a "
            "batch. Detach it."
        )


def _check_offsets(flat: Mapping[Key, Tensor], forms: Mapping[Key, Form], on_cpu: bool) -> None:
    links = links_of(forms, {key: address(t) for key, t in flat.items()} if on_cpu else dict.fromkeys(flat, 0))
    if on_cpu and offsets_fit(0, table_of(links, forms)):
        return
    most = {key: forms[items][1][0] - more for key, _, items, more in links.offsets}
    bad = torch.stack([(o[0] != 0) | (o.diff() < 0).any() | (o[-1] > most[key]) for key, o in flat.items()])
    for i in bad.nonzero().flatten().tolist():
        (name, part), offsets = list(flat.items())[i]
        items = "values" if part == "offsets" else "lists of the next level"
        raise ValueError(f"column '{name}': got {part} {_fault(offsets.tolist(), most[name, part], items)}.")


def _fault(offsets: list[int], num_items: int, items: str) -> str:
    if not offsets:
        return "without a number, expected one more than there are lists"
    if offsets[0] != 0:
        return f"{offsets[0]} at place 0, expected 0. List l goes from offsets[l] to offsets[l + 1]"
    for place, (a, b) in enumerate(itertools.pairwise(offsets), start=1):
        if b < a:
            return f"falling from {a} to {b} at place {place}, expected rising ones. They are the ends of lists"
        if b > num_items:
            return f"{b} at place {place}, expected at most {num_items}, the number of {items}"
    raise AssertionError(offsets)
