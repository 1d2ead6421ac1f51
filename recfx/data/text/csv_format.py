"""The options of CSV files, and the names of their columns."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

from recfx.checks import check_int, check_type
from recfx.data.files import File
from recfx.data.text.csv_lines import cells_of
from recfx.data.text.lines import first_lines

__all__ = ["Csv", "check_named_columns", "header_of", "pairs_of"]

FIRST = ("delimiter", "column_names", "list_separator", "block_bytes")  # options of the first version
Separator = str | Mapping[str, str] | tuple[tuple[str, str], ...] | None


@dataclass(frozen=True, kw_only=True, repr=False)
class Csv:
    """The format of a CSV file. An empty cell is a missing value. Every row is one line.

    Args:     delimiter: between cells: one character or several, such as "::".
              column_names: None: they are in the first line.
              quote: a character around cells that contain delimiters; None: cells are not quoted.
              list_separator: characters between the items of a list in one cell; None: every cell is one value. A
                  string splits every text column, and every column of a type that the caller gives; a dict splits the
                  columns that it names. It may be the delimiter when cells are quoted.
              weight_separator: between an item of a list and its weight: "id:0.5" is read by `varlen(weighted=True)`
                  and `hashed(weighted=True)`. The last separator of an item counts; an item without one has weight 1.
                  A string or a dict, as above; in `convert` a string applies to columns where every item has a weight.
              nulls: more spellings of a missing value, such as ("\\N", "NULL"), in every column and for the items of
                  lists. A quoted cell is not missing.
              skip_lines: lines before the names, or before the first row.
              block_bytes: bytes that are decoded together. A compressed file (.gz, .zst, ...) is one block.
    Raises:   TypeError or ValueError on other values.
    """

    delimiter: str = ","
    column_names: tuple[str, ...] | None = None
    quote: str | None = '"'
    list_separator: Separator = None
    weight_separator: Separator = None
    nulls: tuple[str, ...] = ()
    skip_lines: int = 0
    block_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        check_int("block_bytes", self.block_bytes, 1)
        check_int("skip_lines", self.skip_lines, 0)
        check_type("quote", self.quote, str | None)
        check_type("delimiter", self.delimiter, str)
        if self.quote is not None and (len(self.quote) != 1 or not "\0" < self.quote < "\x80" or self.quote in "\r\n"):
            raise ValueError(f"quote: got {self.quote!r}, expected one ASCII character, or None.")
        if not self.delimiter or any(c in self.delimiter for c in f"\r\n{self.quote or ''}"):
            raise ValueError(f"delimiter: got {self.delimiter!r}, expected characters without quotes and line ends.")
        for name in ("column_names", "nulls"):
            object.__setattr__(self, name, _words(name, getattr(self, name)))
        for name in ("list_separator", "weight_separator"):
            object.__setattr__(self, name, self._separator(name, getattr(self, name)))
        for column in (None, *self.named_columns):
            separator, weights = (
                self.separator_of(column, "list_separator"),
                self.separator_of(column, "weight_separator"),
            )
            if separator is not None and separator == weights:
                raise ValueError(f"weight_separator: got {weights!r}, expected another than the list_separator.")

    def __repr__(self) -> str:
        """Positions of readers contain a hash of this text, so later options are shown only when they are set."""
        shown = [f for f in fields(self) if f.name in FIRST or getattr(self, f.name) != f.default]
        shown.sort(key=lambda f: f.name not in FIRST)
        return f"Csv({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def named_columns(self) -> dict[str, str]:
        """Columns that a dict of separators names, and the argument that names them."""
        arguments = ("weight_separator", "list_separator")
        return {column: name for name in arguments for column, _ in pairs_of(getattr(self, name))}

    def separator_of(self, column: str | None, argument: str) -> str | None:
        """The separator of a column. Column None: of columns that no dict names."""
        separator = getattr(self, argument)
        return dict(separator).get(column) if isinstance(separator, tuple) else separator

    def _separator(self, argument: str, value: Separator) -> Separator:
        """A dict as sorted pairs, which can be hashed and are equal for equal dicts."""
        if value is None or isinstance(value, str):
            values = [] if value is None else [value]
        else:
            check_type(argument, value, Mapping | tuple, "Give a string, or a dict of strings by column.")
            value = tuple(sorted(value.items() if isinstance(value, Mapping) else value))
            values = [separator for _, separator in value]
        for separator in values:
            check_type(argument, separator, str)
            if separator == "" or (separator == self.delimiter and self.quote is None):
                raise ValueError(
                    f"{argument}: got {separator!r}, expected characters; the delimiter only when cells are quoted."
                )
        return value


def check_named_columns(files: Sequence[File], format: object) -> None:
    """Raises ValueError when CSV options name a column that none of the files has. Opens files until all are found."""
    missing = dict(format.named_columns) if isinstance(format, Csv) else {}
    names: list[str] = []
    for file in files if missing else ():
        assert isinstance(format, Csv)
        try:
            head = first_lines(file, format.skip_lines + 1)
            names, _ = header_of(partial(_line_of, head), format)
        except Exception:  # the error is raised when the file is read
            return
        missing = {column: argument for column, argument in missing.items() if column not in names}
        if not missing:
            return
    for column, argument in missing.items():
        others = f" or the {len(files) - 1} other files" if len(files) > 1 else ""
        raise ValueError(
            f"{argument}: got column '{column}', which is not in '{files[-1].path}'{others}, expected some of {names}."
        )


def header_of(line_at: Callable[[int], bytes], options: Csv) -> tuple[list[str], int]:
    """The names of the columns, and the byte where the first row begins."""
    start = 0
    for _ in range(options.skip_lines):
        start += len(line_at(start))
    line = line_at(start)
    if options.column_names is None:
        return cells_of(line, options.delimiter, options.quote), start + len(line)
    return list(options.column_names), start + len(codecs.BOM_UTF8) * line.startswith(codecs.BOM_UTF8)


def _line_of(text: bytes, place: int) -> bytes:
    return text[place : text.find(b"\n", place) + 1 or len(text)]


def _words(argument: str, value: Sequence[str] | None) -> tuple[str, ...] | None:
    """A tuple of strings."""
    if value is None and argument == "column_names":
        return None
    if not isinstance(value, tuple | list) or not all(isinstance(word, str) for word in value):
        raise TypeError(f"{argument}: got {value!r}, expected a tuple of strings.")
    return tuple(value)


def pairs_of(separator: Separator) -> tuple[tuple[str, str], ...]:
    """The pairs of a dict, none for a string."""
    return separator if isinstance(separator, tuple) else ()
