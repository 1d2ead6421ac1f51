"""The options of CSV files, for the commands that read them."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recfx.data.text.csv import Csv

__all__ = ["add_csv_options", "format_of"]

OPTIONS = ("delimiter", "column_names", "quote", "list_separator", "weight_separator", "nulls", "skip_lines")
BY_COLUMN = re.compile(r"([^=,]+)=(.+?)(?:,(?=[^=,]+=.)|$)", re.DOTALL)


def add_csv_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options; `format_of` reads them."""
    group = parser.add_argument_group("CSV", "each of them implies that the files are CSV, whatever their names")
    add = group.add_argument
    add("--delimiter", type=_text, metavar="C", help="between cells, '\\t' for a tab; default: a comma, a tab in *.tsv")
    add("--column_names", type=_words, metavar="A,B", help="default: they are in the first line")
    add("--quote", metavar="C", help='around cells that hold delimiters, or none; default: "')
    add("--list_separator", type=_separator, metavar="C", help="between the items of a list, in each text column, or "
        "by column: tags=|,names=;")  # fmt: skip
    add("--weight_separator", type=_separator, metavar="C", help="between an item of a list and its weight, as above")
    add("--nulls", type=_words, metavar="A,B", help="spellings of a missing value, in addition to the empty cell")
    add("--skip_lines", type=int, metavar="N", help="lines before the column names, or before the first row")


def format_of(args: argparse.Namespace) -> Csv | None:
    """The format that the options specify; None without options.

    Raises:   ValueError when the files have two delimiters and the options name none.
    """
    from recfx.data.text.csv import Csv

    given: dict[str, Any] = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if not given:
        return None
    if given.get("quote") == "none":
        given["quote"] = None
    return Csv(**{"delimiter": _delimiter(args.paths), **given} if "delimiter" not in given else given)


def _delimiter(paths: list[str]) -> str:
    from recfx.data.files import match_files

    are_tabs = {"tsv" in file.name.lower().split(".")[-2:] for file in match_files(paths)}
    if len(are_tabs) > 1:
        raise ValueError(f"delimiter: got none for {paths}, expected one. Some files are *.tsv, others are not.")
    return "\t" if are_tabs == {True} else ","


def _text(word: str) -> str:
    """The word, with a backslash and a t from the shell replaced by a tab."""
    return word.replace("\\t", "\t")


def _words(word: str) -> tuple[str, ...]:
    return tuple(word.split(","))


def _separator(word: str) -> str | dict[str, str]:
    found = list(BY_COLUMN.finditer(word))
    is_by_column = "".join(match[0] for match in found) == word and found
    return {match[1]: _text(match[2]) for match in found} if is_by_column else _text(word)
