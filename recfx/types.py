"""Batches, ragged columns and their layout: the types that all other modules use.

Axis letters, used as name suffixes in functions with several axes:

    B batch   F sparse fields   N numeric fields   D width   U unique ids   C capacity   H hidden
    L cells of a sample in one table   P positions (ids of one batch, padding included)   V vocabularies
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recfx.describe import batch_text, or_plain
from recfx.kernels.lists import flatten_lists
from recfx.kernels.lists.check_columns import Links, check_columns, check_num_samples, links_of, offsets_fit, table_of

__all__ = ["Batch", "Field", "Layout", "Params", "Ragged", "pack"]

Params = dict[str, Tensor]

NUM_SAMPLES = "num_samples"  # batch key: i32 [], how many of the B samples are real
COUNTS = "counts"  # feature key: a dict of tensors for `aux.counts`, such as the overflow of a capacity

ALIGN_BYTES = 64
STRIDED = torch.strided
OUTER = "outer"  # plus a level: part of a nested column


class Ragged(NamedTuple):
    """A list of values per sample, end to end: list l holds values[offsets[l]:offsets[l + 1]].

    Nested lists have one more tensor of offsets per level: with outer = (o,), sample b holds the lists o[b] to
    o[b + 1]. A string is a list of bytes, so a list of strings per sample is such a nested list of u8.

    Every tensor has a static capacity; values after the last offset are padding that no op reads. In nested lists
    `offsets` repeats its last value after the last list: padding consists of empty lists.

    Example:  >>> Ragged(torch.tensor([7, 8, 9, 0]), torch.tensor([0, 2, 3], dtype=torch.int32)).num_samples
              2
    """

    values: Tensor  # [capacity], i64 ids, f32 numbers or u8 bytes
    offsets: Tensor  # i32 [lists + 1], of the innermost lists: rising, offsets[0] = 0
    weights: Tensor | None = None  # f32 [capacity], a weight per value
    outer: tuple[Tensor, ...] = ()  # i32 [lists of that level + 1], outermost first; empty when each list is one sample

    @staticmethod
    def from_lists(
        lists: Any, dtype: torch.dtype | None = None, *, weights: Any = None, capacity: int | None = None
    ) -> Ragged:
        """A Ragged of nested Python lists, one for each sample. None is an empty list, but not a valid item.

        Args:     lists: lists, tuples, numpy arrays or tensors, all nested to the same depth. The items are integers,
                      numbers, or strings (or bytes). Strings become their bytes with offsets of the strings, as in
                      `varlen(torch.uint8)`.
                  dtype: torch.int64, torch.float32 or torch.uint8; None: int64 for integers only, float32 for numbers
                      with floats among them, uint8 for strings. Integers from 2**63 on keep their 64 bits.
                  weights: numbers, nested as `lists` is.
                  capacity: the size of `values`, with zeros at the end; None: the number of items.
        Shapes:   values i64, f32 or u8 [capacity]; offsets i32 [lists + 1]; weights f32 [capacity]; outer i32.
        Cost:     a Python loop over the items, except for numpy arrays.
        Raises:   TypeError when `lists` is not a list. ValueError naming the place, as "lists[3][0]", where lists
                  have different depths, an item is not of the dtype (a float, a bool or null as an id), or is a
                  whole number that float32 would round; when there are not as many weights, or the capacity is too
                  small.
        Example:  >>> ids = Ragged.from_lists([[7, 8], None, [9]])
                  >>> ids.values.tolist(), ids.offsets.tolist()
                  ([7, 8, 9], [0, 2, 2, 3])
        """
        flat = flatten_lists.flatten(lists)
        values, offsets = flatten_lists.values_of(flat, dtype)
        if weights is not None and values.dtype == "uint8":
            raise ValueError("weights: got some for strings, expected none. A weight belongs to an id or a number.")
        weighted = None if weights is None else flatten_lists.weights_of(weights, flat)
        *outer, inner = map(torch.from_numpy, offsets)
        parts = [None if part is None else flatten_lists.padded(part, capacity) for part in (values, weighted)]
        assert parts[0] is not None
        return Ragged(parts[0], inner, parts[1], tuple(outer))

    @property
    def num_samples(self) -> int:
        return (*self.outer, self.offsets)[0].shape[0] - 1

    @property
    def parts(self) -> dict[str, Tensor]:
        """Its tensors by their names in a packed batch."""
        outer = {f"{OUTER}{level}": offsets for level, offsets in enumerate(self.outer)}
        weights = {} if self.weights is None else {"weights": self.weights}
        return {"values": self.values, "offsets": self.offsets, **weights, **outer}

    @staticmethod
    def of_parts(parts: Mapping[str, Tensor]) -> Ragged:
        """The inverse of `parts`."""
        depth = sum(name.startswith(OUTER) for name in parts)
        outer = tuple(parts[f"{OUTER}{level}"] for level in range(depth))
        return Ragged(parts["values"], parts["offsets"], parts.get("weights"), outer)


@dataclass(frozen=True, kw_only=True)
class Field:
    """The place of one tensor in a packed batch: `numel` items of `dtype` from item `start` of that dtype's section."""

    name: str
    part: str  # "dense", or a name of `Ragged.parts`
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The static shape of a packed batch. Equal layouts run through the same captured graph."""

    fields: tuple[Field, ...]
    sections: tuple[tuple[torch.dtype, int, int], ...]  # dtype, first byte, number of items
    num_bytes: int

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.fields, self.num_bytes))

    def __hash__(self) -> int:  # cached: a layout is looked up at every step
        return self._hash

    def __reduce__(self) -> tuple:  # without the cached hash: strings hash differently in every process
        return _layout, (self.fields, self.sections, self.num_bytes)

    @functools.cached_property
    def columns(self) -> dict[str, dict[str, Field]]:
        """Fields by column name and part."""
        columns: dict[str, dict[str, Field]] = {}
        for f in self.fields:
            columns.setdefault(f.name, {})[f.part] = f
        return columns

    @functools.cached_property
    def forms(self) -> dict[tuple[str, str], tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape by column name and part."""
        return {(f.name, f.part): (f.dtype, f.shape) for f in self.fields}

    @functools.cached_property
    def links(self) -> Links:
        """How its sizes depend on each other. TypeError or ValueError when it is not the layout of a batch."""
        begins = {dtype: first for dtype, first, _ in self.sections}
        columns = [f for f in self.fields if f.name != NUM_SAMPLES]
        first_bytes = {(f.name, f.part): begins[f.dtype] + f.start * f.dtype.itemsize for f in columns}
        return links_of({(f.name, f.part): (f.dtype, f.shape) for f in columns}, first_bytes)

    @functools.cached_property
    def table(self) -> Any:
        """The table that `offsets_fit` reads, for columns that fill this layout."""
        return table_of(self.links, self.forms)

    @functools.cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the sections."""
        return tuple(dtype for dtype, _, _ in self.sections)

    @staticmethod
    def of(tensors: Mapping[tuple[str, str], tuple[torch.dtype, tuple[int, ...]]]) -> Layout:
        """Lays out {(name, part): (dtype, shape)} in declaration order, one 64-byte aligned section per dtype."""
        fields, sections, first_byte = [], [], 0
        for dtype in sorted({dtype for dtype, _ in tensors.values()}, key=lambda d: (-d.itemsize, str(d))):
            start = 0
            for (name, part), (field_dtype, shape) in tensors.items():
                if field_dtype == dtype:
                    fields.append(Field(name=name, part=part, dtype=dtype, shape=shape, start=start))
                    items_per_line = ALIGN_BYTES // dtype.itemsize
                    start += -(-torch.Size(shape).numel() // items_per_line) * items_per_line
            sections.append((dtype, first_byte, start))
            first_byte += start * dtype.itemsize
        return _layout(tuple(fields), tuple(sections), first_byte)


@functools.lru_cache(maxsize=256)
def _layout(fields: tuple[Field, ...], sections: tuple[tuple[torch.dtype, int, int], ...], num_bytes: int) -> Layout:
    """Equal layouts are one object: comparing two takes longer than the rest of a look-up."""
    return Layout(fields=fields, sections=sections, num_bytes=num_bytes)


class Batch(Mapping[str, Any]):
    """A read-only dict of tensors (`Tensor` or `Ragged` by column name), all of them views of one buffer.

    One buffer makes a batch cheap: one copy to the device, and a few inputs for a captured step instead of two per
    column. Views are created on access.

    Shapes:   buffer u8 [layout.num_bytes], from `pack` or a reader, or a copy of one: its values and offsets are not
              checked, and a step relies on them.
    Raises:   ValueError when the buffer is not u8, flat and contiguous, or its size is not the layout's.
    Example:  >>> b = pack({"x": torch.ones(2, 1), "c": Ragged(torch.tensor([5, 6]), torch.tensor([0, 1, 2]).int())})
              >>> b["c"].values.tolist(), len(b.sections)
              ([5, 6], 3)
    """

    def __init__(self, buffer: Tensor, layout: Layout) -> None:
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
            raise ValueError(
                f"buffer: got {buffer.dtype} {list(buffer.shape)} of strides {buffer.stride()}, expected torch.uint8, "
                "one dimension, contiguous. Columns are views of its bytes."
            )
        if buffer.numel() != layout.num_bytes:
            raise ValueError(f"buffer: got {buffer.numel()} bytes, expected {layout.num_bytes}, the layout's.")
        self.buffer = buffer
        self.layout = layout

    @property
    def sections(self) -> list[Tensor]:
        """One flat tensor per dtype, in the layout's order: the inputs of a captured step."""
        return [self.buffer[first : first + n * dtype.itemsize].view(dtype) for dtype, first, n in self.layout.sections]

    def __getitem__(self, name: str) -> Any:
        return _column(self.layout.columns[name], dict(zip(self.layout.dtypes, self.sections, strict=True)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.columns)

    def __len__(self) -> int:
        return len(self.layout.columns)

    def __repr__(self) -> str:
        return or_plain(batch_text)(self)


def unpack(sections: list[Tensor], layout: Layout) -> dict[str, Tensor | Ragged]:
    """Views of the sections by column name. They are slices, so they are free inside a captured graph."""
    by_dtype = dict(zip(layout.dtypes, sections, strict=True))
    return {name: _column(parts, by_dtype) for name, parts in layout.columns.items()}


def _column(parts: Mapping[str, Field], sections: Mapping[torch.dtype, Tensor]) -> Tensor | Ragged:
    views = {
        part: sections[f.dtype][f.start : f.start + torch.Size(f.shape).numel()].view(f.shape)
        for part, f in parts.items()
    }
    return views["dense"] if "dense" in views else Ragged.of_parts(views)


def pack(columns: Mapping[str, Tensor | Ragged], *, layout: Layout | None = None, pin_memory: bool = False) -> Batch:
    """Copies a dict of tensors into one buffer. NUM_SAMPLES is added when absent: every sample is real.

    Everything that kernels rely on is checked here, once, and not at every step.

    Args:     columns: `Tensor` [B, d] or `Ragged` by name; all with the same B, which may be 0, and on one device.
              layout: of another batch with these columns. The new batch is padded to it, with zeros and empty lists, so
              that requests of any size run through one captured graph. None: the size of the columns.
              pin_memory: as in torch.empty: a copy to a GPU then needs no second copy on the host.
    Cost:     the checks take one pass over all offsets in C++ on a CPU, under 2 % of the copy; a host read on a GPU.
    Raises:   TypeError for a column that is not a Tensor or Ragged, or has a dtype that a batch cannot hold. ValueError
              when two columns disagree on B or the device, do not fit into the layout, or have another shape; when
              offsets do not begin with 0, decrease, or end after their items; when there are not as many weights as
              values; when NUM_SAMPLES is not from 0 to B. Both name the column and, where possible, the place.
    Example:  >>> large = pack({"item": Ragged(torch.zeros(8).long(), torch.zeros(5).int())})  # 4 samples, 8 items
              >>> request = {"item": Ragged(torch.tensor([5, 6]), torch.tensor([0, 2]).int())}
              >>> batch = pack(request, layout=large.layout)
              >>> batch["item"].offsets.tolist(), int(batch["num_samples"])
              ([0, 2, 2, 2, 2], 1)
    """
    names = [name for name in columns if name != NUM_SAMPLES]
    if not names:
        raise ValueError(f"columns: got {list(columns)}, expected at least one besides '{NUM_SAMPLES}'.")
    for name, column in columns.items():
        if not isinstance(column, (Tensor, Ragged)):  # a tuple: a union would be built at each call
            raise TypeError(f"column '{name}': got {type(column).__name__}, expected Tensor or Ragged.")
    try:
        batch, is_right = _packed(columns, names[0], layout, pin_memory)
    except Exception:
        if layout is not None and not isinstance(layout, Layout):
            got = type(layout).__name__
            raise TypeError(f"layout: got {got}, expected Layout. Use `batch.layout`.") from None
        _check(columns, names)  # a better error, which names the column
        raise
    if not is_right:
        _check(columns, names)
    elif NUM_SAMPLES in columns:
        check_num_samples(NUM_SAMPLES, columns[NUM_SAMPLES], _num_samples(columns[names[0]]))
    return batch


def _packed(columns: Mapping[str, Any], first: str, layout: Layout | None, pin_memory: bool) -> tuple[Batch, bool]:
    """The batch, and whether its offsets are known to be valid."""
    tensors = _parts_of(columns)
    if NUM_SAMPLES not in columns:
        tensors[NUM_SAMPLES, "dense"] = torch.tensor(_num_samples(columns[first]), dtype=torch.int32)
    forms = {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    if layout is None:
        layout = Layout.of(forms)
        table = layout.table
    else:
        _check_fits(forms, layout)
        table = table_of(layout.links, forms)
    device = tensors[next(key for key in forms if key[0] == first)].device
    zeros = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device, pin_memory=pin_memory)
    batch = Batch(zeros, layout)
    views = _parts_of(unpack(batch.sections, layout))
    for (name, part), t in tensors.items():
        target = views[name, part]
        target[: len(t)].copy_(t) if t.dim() else target.copy_(t)
        if part == "offsets" or part.startswith(OUTER):
            target[len(t) :] = t[-1]
    return batch, all(map(_is_plain, tensors.values())) and offsets_fit(zeros.data_ptr(), table)


def _is_plain(t: Tensor) -> bool:
    """Whether it is a plain dense tensor on the host, without gradient."""
    return t.is_cpu and t.layout is STRIDED and not t.requires_grad


def _check(columns: Mapping[str, Any], names: list[str]) -> None:
    """Checks columns one by one. `names`: all but NUM_SAMPLES."""
    for name in names:
        if isinstance(columns[name], Ragged) and not isinstance(columns[name].outer, (tuple, list)):
            got = type(columns[name].outer).__name__
            raise TypeError(f"column '{name}': got outer {got}, expected a tuple of tensors.")
    check_columns(_parts_of({name: columns[name] for name in names}))
    if NUM_SAMPLES in columns:
        check_num_samples(NUM_SAMPLES, columns[NUM_SAMPLES], _num_samples(columns[names[0]]))


def _num_samples(column: Tensor | Ragged) -> int:
    return column.num_samples if isinstance(column, Ragged) else column.shape[0]


def _parts_of(columns: Mapping[str, Tensor | Ragged]) -> dict[tuple[str, str], Tensor]:
    """Tensors by column name and part."""
    parts = {name: c.parts if isinstance(c, Ragged) else {"dense": c} for name, c in columns.items()}
    return {(name, part): t for name, of_column in parts.items() for part, t in of_column.items()}


def _check_fits(forms: Mapping[tuple[str, str], tuple[torch.dtype, tuple[int, ...]]], layout: Layout) -> None:
    if forms.keys() != layout.forms.keys():
        got, expected = ([" ".join(key) for key in sorted(keys)] for keys in (forms, layout.forms))
        raise ValueError(f"columns: got {got}, expected {expected}, as in the layout.")
    for key, (dtype, shape) in forms.items():
        held, most = layout.forms[key]
        if dtype != held or shape[1:] != most[1:] or shape[:1] > most[:1]:
            raise ValueError(
                f"column '{key[0]}': got {key[1]} {dtype} {list(shape)}, expected {held} of at most {list(most)}, as "
                "in the layout. Split the batch, or use the layout of a larger one."
            )
