"""libsvm text, `label qid:7 index:value index:value # comment`, in blocks of whole lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recfx.data.columns import Column
from recfx.data.exact_numbers import EXACT_DOUBLE, INT64_END, UINT64_END, uncastable
from recfx.data.files import File
from recfx.data.open_file import OpenFile
from recfx.data.schema import is_text
from recfx.data.text.json_types import item_of
from recfx.data.text.lines import InBlocks, Lines, is_utf8
from recfx.data.unit_rows import MOST_SHOWN, BadRow, UnitRows

__all__ = ["Libsvm", "OpenLibsvm"]

INTEGER = r"^-?[0-9]{1,100}$"
LEADING_ZERO = r"^-?0[0-9]"
MAX_DIGITS = 400  # of whole numbers that a double can be
BLANKS = np.zeros(256, dtype=bool)
BLANKS[list(b" \t\r\n\x0b\x0c")] = True


@dataclass(frozen=True, kw_only=True)
class Libsvm(InBlocks):
    """The format of libsvm text: `label [qid:Q] index:value index:value ... [# comment]` in each line.

    Its columns are "label" (double), "qid" (int64, null where absent) and "features", lists of struct{k, v}: read them
    by `varlen("features", torch.int64, weighted=True)`, or by `hashed` where the indices are names. "indices" and
    "values" are the two halves of "features" as columns. A row of libffm (`field:index:value`) is bad.

    Args:     block_bytes: see `InBlocks`.
    """


class OpenLibsvm(OpenFile):
    """An open file of libsvm text.

    Args:     types: "features": the type of the indices.
              columns: that are read; None: all. Then the type of the indices is guessed from all rows.
    """

    unit_name = "block"

    def __init__(
        self, file: File, options: Libsvm, types: Mapping[str, pa.DataType], columns: Sequence[Column] | None
    ) -> None:
        self._lines = Lines(file, options.block_bytes)
        self.num_units = self._lines.num_blocks
        self._rounded = {c.name for c in columns or () if c.rounding == "allow"}
        if columns is None:
            key = types["features"] if "features" in types else self._guess()
        else:
            types_of_keys = [item_of(column) for column in columns if column.name in ("features", "indices")]
            key = pa.binary() if pa.binary() in types_of_keys else pa.int64()
        halves = {"indices": pa.list_(key), "values": pa.list_(pa.float64())}
        kinds = {
            "label": pa.float64(),
            "qid": pa.int64(),
            "features": pa.list_(pa.struct([("k", key), ("v", pa.float64())])),
            **(halves if columns is not None else {}),
        }
        self._key, self.schema = key, pa.schema(list(kinds.items()))

    def read(self, unit: int, names: Sequence[str]) -> UnitRows:
        tokens = _tokens(self._lines.block(unit))
        bad = dict(tokens.bad)  # the first one of each row
        arrays = {name: array for name, array in self._arrays(tokens, set(names), bad).items() if name in names}
        keep = np.ones(tokens.num_rows, dtype=bool)
        keep[list(bad)] = False
        batch = pa.RecordBatch.from_pydict({name: arrays[name] for name in names})
        return UnitRows(batch.filter(pa.array(keep)), np.flatnonzero(keep), [bad[row] for row in sorted(bad)])

    def num_rows(self, unit: int) -> int:
        return _tokens(self._lines.block(unit)).num_rows

    def _guess(self) -> pa.DataType:
        """The type of the indices in all rows: integers; or text when one is not an integer or has a leading zero, or
        when some are negative and others above 2**63 - 1."""
        kind, is_negative = pa.int64(), False
        for unit in range(self.num_units):
            indices = _tokens(self._lines.block(unit)).indices.strings
            integers, others = _integers(indices, pa.int64())
            if others or pc.any(pc.match_substring_regex(indices, LEADING_ZERO)).as_py():
                return pa.string()
            kind = pa.uint64() if pa.types.is_uint64(integers.type) else kind
            is_negative = is_negative or (pc.min(integers).as_py() or 0) < 0
            if is_negative and kind == pa.uint64():
                return pa.string()
        return kind

    def _arrays(self, tokens: _Tokens, names: set[str], bad: dict[int, BadRow]) -> dict[str, pa.Array]:
        arrays: dict[str, pa.Array] = {}
        offsets = pa.array(np.searchsorted(tokens.indices.rows, np.arange(tokens.num_rows + 1)).astype(np.int32))
        if "label" in names:
            arrays["label"] = _read(tokens.labels, "label", pa.float64(), bad, may_round="label" in self._rounded)
        if "qid" in names:
            found = _read(tokens.queries, "qid", pa.int64(), bad)
            places = np.searchsorted(tokens.queries.rows, np.arange(tokens.num_rows))
            has_one = np.isin(np.arange(tokens.num_rows), tokens.queries.rows)
            arrays["qid"] = found.take(pa.array(places, mask=~has_one))
        if names & {"indices", "features"}:
            keys = _read(tokens.indices, "features", self._key, bad)
            arrays["indices"] = pa.ListArray.from_arrays(offsets, keys)
        if names & {"values", "features"}:
            may_round = bool(self._rounded & {"values", "features"})
            values = _read(tokens.values, "features", pa.float64(), bad, may_round=may_round)
            arrays["values"] = pa.ListArray.from_arrays(offsets, values)
        if "features" in names:
            arrays["features"] = pa.ListArray.from_arrays(
                offsets, pa.StructArray.from_arrays([keys, values], ["k", "v"])
            )
        return arrays


class _Pieces(NamedTuple):
    """Parts of tokens."""

    strings: pa.StringArray  # not necessarily UTF-8
    rows: np.ndarray  # i64: the row of each string, rising


class _Tokens(NamedTuple):
    """A block split into tokens."""

    num_rows: int
    labels: _Pieces
    queries: _Pieces
    indices: _Pieces
    values: _Pieces
    bad: dict[int, BadRow]  # by row: rows of another form


def _tokens(text: bytes) -> _Tokens:
    """Splits a block into rows, which are lines that are not blank without comments, and tokens between blanks.

    Cost:     about ten passes over the bytes in numpy.
    """
    codes = _without_comments(np.frombuffer(text, np.uint8))
    blank = np.concatenate([[True], BLANKS[codes], [True]])
    edges = np.flatnonzero(blank[1:] != blank[:-1])
    begins, ends = edges[0::2], edges[1::2]
    lines = np.searchsorted(np.flatnonzero(codes == ord("\n")), begins)
    is_label = np.diff(lines, prepend=-1) != 0
    rows = np.cumsum(is_label) - 1
    colons = np.flatnonzero(codes == ord(":"))
    owners = np.searchsorted(begins, colons, side="right") - 1
    num_colons = np.bincount(owners, minlength=len(begins))
    is_query = _queries(codes, begins, ends, is_label)
    is_item = ~is_label & ~is_query
    right = is_item & (num_colons == 1)
    middles = colons[right[owners]]
    bad: dict[int, BadRow] = {}
    for token in np.flatnonzero((is_item & ~right) | (is_label & (num_colons > 0)))[::-1].tolist():
        got = text_of(codes[begins[token] : ends[token]].tobytes())
        column, expected = ("label", "double") if is_label[token] else ("features", "index:value")
        bad[int(rows[token])] = BadRow(int(rows[token]), column, got, expected)
    return _Tokens(
        int(is_label.sum()),
        _pieces(codes, begins[is_label], ends[is_label], rows[is_label]),
        _pieces(codes, begins[is_query] + len("qid:"), ends[is_query], rows[is_query]),
        _pieces(codes, begins[right], middles, rows[right]),
        _pieces(codes, middles + 1, ends[right], rows[right]),
        bad,
    )


def _without_comments(codes: np.ndarray) -> np.ndarray:
    marks = np.flatnonzero(codes == ord("#"))
    if not len(marks):
        return codes
    line_ends = np.append(np.flatnonzero(codes == ord("\n")), len(codes))
    ends = line_ends[np.searchsorted(line_ends, marks)]
    ends, firsts = np.unique(ends, return_index=True)
    return np.where(_between(len(codes), marks[firsts], ends), np.uint8(ord(" ")), codes)


def _between(length: int, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which of `length` bytes are in one of the rising spans: bool [length]."""
    edges = np.empty(2 * len(begins) + 2, dtype=np.int64)
    edges[0], edges[-1], edges[1:-1:2], edges[2:-1:2] = 0, length, begins, ends
    return np.repeat(np.arange(len(edges) - 1) % 2 == 1, np.diff(edges))


def _queries(codes: np.ndarray, begins: np.ndarray, ends: np.ndarray, is_label: np.ndarray) -> np.ndarray:
    """Which tokens are the second of their row and begin with qid:"""
    is_query = np.append(False, is_label[:-1])[: len(begins)] & ~is_label & (ends - begins >= len("qid:"))
    for i, code in enumerate(b"qid:"):
        is_query[is_query] = codes[begins[is_query] + i] == code
    return is_query


def _pieces(codes: np.ndarray, begins: np.ndarray, ends: np.ndarray, rows: np.ndarray) -> _Pieces:
    offsets = np.append(0, np.cumsum(ends - begins)).astype(np.int32)
    content = codes[_between(len(codes), begins, ends)]
    strings = pa.StringArray.from_buffers(len(begins), pa.py_buffer(offsets), pa.py_buffer(content))
    return _Pieces(strings, rows)


def _read(
    pieces: _Pieces, column: str, kind: pa.DataType, bad: dict[int, BadRow], *, may_round: bool = False
) -> pa.Array:
    """The pieces in this type. Rows with pieces of another type are added to `bad`."""
    if is_text(kind):
        array, wrong = _texts(pieces.strings, kind)
    elif pa.types.is_integer(kind):
        array, wrong = _integers(pieces.strings, kind)
    else:
        array, wrong = _reals(pieces.strings, may_round)
    for i in wrong:
        row = int(pieces.rows[i])
        if row not in bad:
            bad[row] = BadRow(row, column, text_of(_bytes_at(pieces.strings, i)), str(kind))
    return array


def _texts(strings: pa.StringArray, kind: pa.DataType) -> tuple[pa.Array, list[int]]:
    if pa.types.is_binary(kind):
        return strings.view(pa.binary()), []
    try:
        strings.validate(full=True)
    except pa.ArrowInvalid:
        wrong = [i for i in range(len(strings)) if not is_utf8(_bytes_at(strings, i))]
        return _without(strings, wrong), wrong
    return strings, []


def _integers(strings: pa.StringArray, kind: pa.DataType) -> tuple[pa.Array, list[int]]:
    """As int64, or uint64 where some are larger. Larger ones are wrong when others are negative. So is hexadecimal."""
    for kept in () if b"x" in _data(strings).lower() else (kind, pa.uint64()):
        try:
            return strings.cast(kept), []
        except pa.ArrowInvalid:
            continue
    is_integer = pc.match_substring_regex(strings, INTEGER).to_numpy(zero_copy_only=False)
    values = [int(_bytes_at(strings, i)) if is_integer[i] else UINT64_END for i in range(len(strings))]
    end = INT64_END if min(values) < 0 else UINT64_END
    wrong = [i for i, value in enumerate(values) if not -INT64_END <= value < end]
    for i in wrong:
        values[i] = 0
    return pa.array(values, pa.uint64() if max(values) >= INT64_END else pa.int64()), wrong


def _reals(strings: pa.StringArray, may_round: bool) -> tuple[pa.Array, list[int]]:
    """As doubles. A number out of range, and a whole number that a double would round, is wrong."""
    kind = pa.float64()
    strings = pc.replace_substring_regex(strings, r"^\+([0-9.iInN])", r"\1") if b"+" in _data(strings) else strings
    wrong: list[int] = []
    try:
        array = strings.cast(kind)
    except pa.ArrowInvalid:
        wrong = uncastable(strings, kind).tolist()
        array = _without(strings, wrong).cast(kind)
    large = np.flatnonzero(np.abs(array.to_numpy(zero_copy_only=False)) >= EXACT_DOUBLE)
    wrong += [i for i in large.tolist() if not _keeps(_bytes_at(strings, i), array[i].as_py(), may_round)]
    return array, wrong


def _keeps(text: bytes, value: float, may_round: bool) -> bool:
    """Whether a double has the value of the text: finite, and exact when the text is a whole number."""
    if text.lstrip(b"-").isdigit() and not may_round:
        return abs(value) < float("inf") and len(text) < MAX_DIGITS and int(value) == int(text)
    return abs(value) < float("inf") or text.lstrip(b"-").lower().startswith(b"inf")


def _without(strings: pa.StringArray, wrong: Sequence[int]) -> pa.StringArray:
    mask = np.zeros(len(strings), dtype=bool)
    mask[list(wrong)] = True
    return pc.if_else(pa.array(mask), pa.scalar("0"), strings)


def _data(strings: pa.StringArray) -> bytes:
    content = strings.buffers()[2]
    return content.to_pybytes() if content is not None else b""


def _bytes_at(strings: pa.StringArray, place: int) -> bytes:
    return strings[place].as_buffer().to_pybytes()


def text_of(text: bytes) -> str:
    """A token for an error."""
    return repr(text[:MOST_SHOWN].decode(errors="replace"))
