"""Which format files are of, for the commands that read them, whatever their names say."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recfx.commands.csv_options import format_of as csv_of

if TYPE_CHECKING:
    from recfx.data.formats import Format

__all__ = ["add_format_option", "format_of"]

NAMES = ("orc", "parquet", "arrow", "csv", "jsonl", "libsvm")


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """Declares the option; `format_of` reads it, and those of CSV."""
    parser.add_argument("--format", choices=NAMES, help="of the files; default: what their names say")


def format_of(args: argparse.Namespace) -> Format | None:
    """The format that the options name; None when they leave it to the files.

    Raises:   ValueError when there are options of CSV for another format.
    """
    csv = csv_of(args)
    if csv is not None and args.format not in (None, "csv"):
        raise ValueError(f"--format: got {args.format!r}, expected 'csv'. Other options say how CSV is written.")
    return args.format if csv is None else csv
