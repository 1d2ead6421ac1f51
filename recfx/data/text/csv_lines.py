"""Prepares lines of CSV for pyarrow: a delimiter of one character, and a whole row in each line."""

from __future__ import annotations

import csv
import re

import numpy as np
import pyarrow as pa

from recfx.data.unit_rows import BadRow

__all__ = ["by_byte", "by_character", "cells_of", "with_short_delimiter", "without_unclosed"]

# Characters that can replace a longer delimiter, rare ones first.
FREE = bytes([*range(0x1F, 0x0D, -1), *range(1, 9), 0x0B, 0x0C, 0x7F, *range(0x21, 0x7F)])


def with_short_delimiter(text: bytes, delimiter: str, quote: str | None) -> tuple[bytes, bytes]:
    """The text with a delimiter of one ASCII character, and this delimiter. A character that does not occur in the text
    replaces a longer delimiter. It does so in quoted cells too; the caller restores the longer one there.

    Raises:   ValueError when every such character occurs in the text.
    """
    long = delimiter.encode()
    if len(long) == 1 and long != b"\0":
        return text, long
    for code in FREE:
        free = bytes([code])
        if free not in text and free != (quote or "").encode():
            return text.replace(long, free), free
    raise ValueError(
        f"every ASCII character in one block: the delimiter {delimiter!r} needs one that does not occur. Make "
        "block_bytes smaller"
    )


def by_character(text: bytes) -> bytes:
    """Any bytes as UTF-8, with one character for each byte."""
    return text.decode("latin-1").encode()


def by_byte(cells: pa.Array) -> pa.Array:
    """The cells of a text of `by_character`, converted back to bytes."""
    _, offsets, data = cells.buffers()
    if data is None:
        return cells
    ends = np.frombuffer(offsets, np.int32)[cells.offset : cells.offset + len(cells) + 1]
    letters = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]
    num_before = np.append(np.int32(0), np.cumsum(letters & 0xC0 != 0x80, dtype=np.int32))  # characters, not bytes
    values = letters.tobytes().decode().encode("latin-1")
    parts = [pa.py_buffer(num_before[ends - ends[0]]), pa.py_buffer(values)]
    return pa.Array.from_buffers(
        pa.binary(), len(cells), [cells.is_valid().buffers()[1] if cells.null_count else None, *parts]
    )


def cells_of(line: bytes, delimiter: str, quote: str | None) -> list[str]:
    """The cells of a header.

    Raises:   ValueError when it is not UTF-8.
    """
    text, short = with_short_delimiter(line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n"), delimiter, quote)
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"a header that is not UTF-8, {line[:50]!r}: give the names with column_names= and skip the header with "
            "skip_lines=1"
        ) from error
    how: dict = {"quoting": csv.QUOTE_NONE} if quote is None else {"quotechar": quote}
    cells = next(csv.reader([decoded], delimiter=short.decode(), **how), [])
    return [cell.replace(short.decode(), delimiter) for cell in cells]


def without_unclosed(text: bytes, short: bytes, delimiter: str, quote: str | None) -> tuple[bytes, list[BadRow]]:
    """The text without the lines that do not close a quote, and these lines as bad rows.

    A row is one line: a quoted cell may not continue in the next line.

    Args:     short: the delimiter in the text, of one character; `delimiter` is that of the file, for errors.
    """
    if quote is None or quote.encode() not in text:
        return text, []
    codes = np.frombuffer(b"\n" + text + b"\n", np.uint8)
    ends = np.flatnonzero(codes[1:] == ord("\n"))
    begins = np.append(0, ends[:-1] + 1)
    pattern = _closed(short, quote.encode())
    to_look_at = _to_look_at(codes, ends, short, ord(quote))
    lines = [i for i in to_look_at if pattern.fullmatch(text, begins[i], ends[i]) is None]
    if not lines:
        return text, []
    numbers = np.cumsum(ends - begins > (codes[ends] == ord("\r"))) - 1  # pyarrow skips empty lines
    keep, bad = np.ones(len(text), dtype=bool), []
    for i in lines:
        keep[begins[i] : ends[i] + 1] = False
        cells = text[begins[i] : ends[i]].replace(short, delimiter.encode()).decode(errors="replace")
        bad.append(
            BadRow(int(numbers[i]), None, f"a quote that is not closed, {cells[:50]!r}", "a whole row in a line")
        )
    return codes[1:-1][keep].tobytes(), bad


def _to_look_at(codes: np.ndarray, ends: np.ndarray, delimiter: bytes, quote: int) -> np.ndarray:
    """The lines with a quote that is neither at the edge of a cell nor next to a quote, or with an odd number of
    quotes. They are few; all other lines close their quotes."""
    quotes = np.flatnonzero(codes == quote)
    firsts = np.searchsorted(quotes, ends + 1)  # after each line
    counts = np.diff(firsts, prepend=0)
    opens = (np.arange(len(quotes)) - np.repeat(firsts - counts, counts)) % 2 == 0
    is_edge = np.zeros(256, dtype=bool)
    is_edge[[*delimiter, ord("\n"), ord("\r"), quote]] = True
    strange = quotes[~is_edge[codes[np.where(opens, quotes - 1, quotes + 1)]]]
    return np.union1d(np.searchsorted(ends, strange - 1), np.flatnonzero(counts % 2))


def _closed(delimiter: bytes, quote: bytes) -> re.Pattern[bytes]:
    """A regex for a line that closes its quotes, as pyarrow reads it: in an unquoted cell a quote is text."""
    q, d = re.escape(quote), re.escape(delimiter)
    cell = b"(?>%b[^%b]*+(?:%b%b[^%b]*+)*+%b[^%b]*+|[^%b%b][^%b]*+|)" % (q, q, q, q, q, q, d, q, d, d)
    return re.compile(b"%b(?:%b%b)*+" % (cell, d, cell))
