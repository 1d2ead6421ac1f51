"""How CSV files are written, for the commands that read them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recfx.data.csv import Csv

__all__ = ["add_csv_options", "format_of"]


def add_csv_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options; `format_of` reads them."""
    group = parser.add_argument_group("CSV", "any of them says that the files are CSV, whatever their names")
    group.add_argument("--delimiter", metavar="C", help="between cells; default: a comma, or a tab in *.tsv")
    group.add_argument("--column_names", metavar="A,B", help="default: they stand in the first line")
    group.add_argument("--list_separator", metavar="C", help="between the items of a list in a cell")


def format_of(args: argparse.Namespace) -> Csv | None:
    """The format that the options name; None when there are none."""
    from recfx.data.csv import Csv

    if args.delimiter is None and args.column_names is None and args.list_separator is None:
        return None
    names = None if args.column_names is None else tuple(args.column_names.split(","))
    return Csv(delimiter=args.delimiter or ",", column_names=names, list_separator=args.list_separator)
