"""The option for the format of files, for the commands that read them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recfx.commands.csv_options import format_of as csv_of

if TYPE_CHECKING:
    from recfx.data.formats import Format

__all__ = ["add_format_option", "format_of"]

NAMES = ("orc", "parquet", "arrow", "csv", "jsonl", "libsvm")


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option; `format_of` reads it, and the options of CSV."""
    parser.add_argument("--format", choices=NAMES, help="of the files; default: by their names")


def format_of(args: argparse.Namespace) -> Format | None:
    """The format that the options specify; None: each file's own.

    Raises:   ValueError for options of CSV with another format.
    """
    csv = csv_of(args)
    if csv is not None and args.format not in (None, "csv"):
        raise ValueError(f"--format: got {args.format!r}, expected 'csv'. Other options are for CSV.")
    return args.format if csv is None else csv
