"""Nested Python lists as flat arrays: the values end to end, and the offsets of each level."""

from __future__ import annotations

import ctypes
import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from recfx.checks import check_int, said

__all__ = ["Flat", "flatten", "numpy_of", "padded", "values_of", "weights_of"]

MOST = 2**31 - 1  # what an int32 offset counts
EXACT = 2**24  # whole numbers up to here are float32 numbers
TAKES: dict[torch.dtype, tuple[tuple[type, ...], str]] = {
    torch.int64: ((int,), "an integer"),
    torch.float32: ((int, float), "a number"),
    torch.uint8: ((str,), "a string or bytes"),
}
HINTS: dict[type | None, str] = {
    float: "Ids are exact, and floats merge large ones. Make integers of them, or give dtype=torch.float32.",
    str: "Strings become ids by a hash: recfx.kernels.lists.string_hash, or `hashed` columns of recfx.data.",
    int: "Numbers are dtype=torch.int64 or torch.float32.",
    None: "Leave it out, or put a value there.",
}
FLAG = "Make 0 or 1 of it."


class Flat(NamedTuple):
    """Lists taken apart."""

    items: Any  # what the innermost lists hold: a list, or one array
    offsets: list[np.ndarray]  # i32 [lists + 1] of each level, outermost first
    name: str = "lists"

    def place(self, item: int) -> str:
        """Where an item is, as it is written in Python: "lists[3][0]"."""
        indices = []
        for offsets in reversed(self.offsets):
            above = int(np.searchsorted(offsets, item, side="right")) - 1
            indices.append(item - int(offsets[above]))
            item = above
        return self.name + "".join(f"[{i}]" for i in [item, *reversed(indices)])


def flatten(lists: Any, name: str = "lists") -> Flat:
    """Takes lists apart down to what is not one: list, tuple, numpy array or tensor. None is an empty list.

    Raises:   TypeError when `lists` is not one, ValueError when a list is next to something else.
    """
    if not _is_list(lists):
        raise TypeError(f"{name}: got {said(lists)}, expected a list for each sample.")
    flat = Flat(list(_plain(lists)), [], name)
    while True:
        array = _joined(flat)
        if array is not None:
            return array
        inner = [item is None or _is_list(item) for item in flat.items]
        if flat.offsets and not any(i for i, item in zip(inner, flat.items, strict=True) if item is not None):
            return flat
        if not all(inner):
            raise _uneven(flat, inner)
        flat = _one_deeper(flat, [() if item is None else _plain(item) for item in flat.items])


def _joined(flat: Flat) -> Flat | None:
    """The level below where it is arrays of numbers alone, which are put end to end."""
    if not flat.items or not all(_is_array(item) for item in flat.items):
        return None
    arrays = [_plain(item) for item in flat.items]
    if any(a.ndim != 1 or a.dtype.kind not in "iuf" for a in arrays) or len({a.dtype for a in arrays}) > 1:
        return None
    return Flat(np.concatenate(arrays), [*flat.offsets, _offsets_of(arrays)], flat.name)


def _one_deeper(flat: Flat, lists: list[Any]) -> Flat:
    return Flat(list(itertools.chain.from_iterable(lists)), [*flat.offsets, _offsets_of(lists)], flat.name)


def _offsets_of(lists: Sequence[Any]) -> np.ndarray:
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    if offsets[-1] > MOST:
        raise ValueError(f"lists: got {offsets[-1]} items, expected at most {MOST}. Offsets are int32. Cut them up.")
    return offsets.astype(np.int32)


def _is_array(item: Any) -> bool:
    return isinstance(item, np.ndarray | torch.Tensor)


def _is_list(item: Any) -> bool:
    return isinstance(item, list | tuple) or (_is_array(item) and item.ndim > 0)


def _plain(lists: Any) -> Any:
    """A list, a tuple or a numpy array."""
    return numpy_of(lists) if isinstance(lists, torch.Tensor) else lists


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """The same numbers: of bfloat16, which numpy does not have, as float32. No copy of another type on a CPU."""
    exact = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
    return exact.cpu().numpy()


def _uneven(flat: Flat, inner: Sequence[bool]) -> ValueError:
    """Of an item that is not a list where others are, or where a list must be."""
    i = inner.index(False)
    expected = f"a list, as at {flat.place(inner.index(True))}" if True in inner else "a list for each sample"
    return ValueError(f"{flat.place(i)}: got {_said(flat.items[i])}, expected {expected}. Lists are of one depth.")


def _said(item: Any) -> str:
    is_number = hasattr(item, "item") and not getattr(item, "shape", ())
    return said(item.item() if is_number else item)


def values_of(flat: Flat, dtype: torch.dtype | None) -> tuple[np.ndarray, list[np.ndarray]]:
    """The items in one dtype, and the offsets: those of strings among them.

    Args:     dtype: see `Ragged.from_lists`.
    Raises:   ValueError naming the first item that the dtype cannot hold.
    """
    if isinstance(flat.items, np.ndarray):
        kinds: list[type | None] = [float if flat.items.dtype.kind == "f" else int]
    else:
        kinds = [_kind(item) for item in flat.items]
    if dtype is None:
        if not kinds:
            raise ValueError("lists: got no item, expected one at least, or a dtype. Give dtype=torch.int64 for ids.")
        dtype = torch.uint8 if kinds[0] is str else torch.float32 if float in kinds else torch.int64
    if dtype not in TAKES:
        raise ValueError(f"dtype: got {dtype!r}, expected torch.int64, torch.float32 or torch.uint8.")
    wanted, expected = TAKES[dtype]
    if len(flat.items) and not set(kinds) <= set(wanted):
        i = next(i for i, kind in enumerate(kinds) if kind not in wanted)
        hint = FLAG if isinstance(flat.items[i], bool | np.bool_) else HINTS[kinds[i]]
        raise ValueError(f"{flat.place(i)}: got {_said(flat.items[i])}, expected {expected}. {hint}")
    if dtype == torch.uint8:
        strings = _strings(flat)
        return np.frombuffer(b"".join(strings), np.uint8).copy(), [*flat.offsets, _offsets_of(strings)]
    return (_ids if dtype == torch.int64 else _floats)(flat), flat.offsets


def _strings(flat: Flat) -> list[bytes]:
    strings = []
    try:
        for item in flat.items:
            strings.append(item.encode() if isinstance(item, str) else bytes(item))
    except UnicodeEncodeError:  # half of a surrogate pair
        i = len(strings)
        raise ValueError(f"{flat.place(i)}: got {said(flat.items[i])}, expected text of whole characters.") from None
    return strings


def _kind(item: Any) -> type | None:
    """int, float or str (bytes too); None of anything else, a flag and null among it."""
    if type(item) in (int, float, str):
        return type(item)
    if isinstance(item, bool | np.bool_):
        return None
    if isinstance(item, bytes | str | np.bytes_):
        return str
    if _is_array(item) and item.ndim == 0:
        item = item.item()
    kinds = ((int, numbers.Integral | np.integer), (float, numbers.Real | np.floating))
    return next((kind for kind, classes in kinds if isinstance(item, classes) and not isinstance(item, bool)), None)


def _ids(flat: Flat) -> np.ndarray:
    """int64, or the 64 bits of uint64."""
    if isinstance(flat.items, np.ndarray):
        same_bits = flat.items.dtype == np.uint64
        return flat.items.astype(np.uint64).view(np.int64) if same_bits else flat.items.astype(np.int64)
    ids = [item if type(item) is int else int(item) for item in flat.items]
    try:
        return np.array(ids, dtype=np.int64)
    except OverflowError:
        pass
    for i, number in enumerate(ids):
        if not -(2**63) <= number < 2**64:
            raise ValueError(f"{flat.place(i)}: got {number}, expected 64 bits, from -2**63 to 2**64 - 1.")
    if min(ids) < 0:
        low, high = (f"{x} at {flat.place(ids.index(x))}" for x in (min(ids), max(ids)))
        raise ValueError(f"lists: got {low} and {high}, expected int64 or uint64. Some of both have the same 64 bits.")
    return np.array(ids, dtype=np.uint64).view(np.int64)


def _floats(flat: Flat) -> np.ndarray:
    """float32 of numbers; a whole one that it would round is an error."""
    if isinstance(flat.items, np.ndarray):
        given: Any = flat.items
        large: Any = np.flatnonzero(np.abs(given.astype(np.float64)) > EXACT)
    else:
        given = [item if type(item) in (int, float) else _number(item) for item in flat.items]
        large = [i for i, x in enumerate(given) if abs(x) > EXACT]
    for i in large:
        number = given[i].item() if isinstance(given, np.ndarray) else given[i]
        is_whole = type(number) is int or (math.isfinite(number) and number == int(number))
        if is_whole and _float32(number) != number:
            raise ValueError(
                f"{flat.place(int(i))}: got {number}, expected a number that float32 holds: it is whole and would be "
                "rounded. Ids are dtype=torch.int64."
            )
    return np.array(given, dtype=np.float64).astype(np.float32)


def _number(item: Any) -> int | float:
    return item.item() if hasattr(item, "item") else float(item)


def _float32(number: float) -> float:
    """Rounded to float32."""
    try:
        return float(ctypes.c_float(number).value)
    except OverflowError:
        return math.inf


def weights_of(weights: Any, flat: Flat) -> np.ndarray:
    """f32, a weight for each item of `flat`.

    Raises:   ValueError when their lists are not as long as those of the values.
    """
    own = flatten(weights, "weights")
    if len(own.offsets) != len(flat.offsets):
        raise ValueError(
            f"weights: got lists {len(own.offsets)} deep, expected {len(flat.offsets)}, as the values are."
        )
    for level, (got, expected) in enumerate(zip(own.offsets, flat.offsets, strict=True)):
        if not np.array_equal(got, expected):
            upper = Flat((), flat.offsets[:level], "weights")
            at = next(i for i in range(1, len(expected)) if i >= len(got) or got[i] != expected[i]) - 1
            length = int(got[at + 1] - got[at]) if at + 1 < len(got) else 0
            raise ValueError(
                f"weights: got {length} in {upper.place(at)}, expected "
                f"{expected[at + 1] - expected[at]}, one for each value."
            )
    return values_of(own, torch.float32)[0]


def padded(values: np.ndarray, capacity: int | None) -> torch.Tensor:
    """The values, then zeros up to the capacity."""
    if capacity is not None:
        check_int("capacity", capacity, 0)
    if capacity is not None and len(values) > capacity:
        raise ValueError(f"capacity: got {capacity}, expected at least {len(values)}, the number of values.")
    tensor = torch.zeros(len(values) if capacity is None else capacity, dtype=torch.from_numpy(values[:0]).dtype)
    tensor[: len(values)] = torch.from_numpy(values)
    return tensor
