"""`recfx convert`: rewrites files for fast reading."""

from __future__ import annotations

import argparse

from recfx.commands.csv_options import add_csv_options
from recfx.commands.format_option import add_format_option, format_of

__all__ = ["add_to"]

KINDS = ("float", "double", "int", "uint64", "string", "binary")


def add_to(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "convert",
        help="rewrite CSV, JSON lines, libsvm, Parquet, ORC or Arrow files for training",
        description="Writes one file for each input: float32, int64 and strings, units of one size, page checksums.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="+", help="files, folders, globs or URIs")
    add("folder", help="where the files are written")
    add("--to", choices=["parquet", "orc"], default="parquet", help="format written")
    add("--columns", type=_names, metavar="A,B", help="columns kept; default: all")
    add("--types", type=_types, default={}, metavar="A=int,B=float", help=f"of columns: {', '.join(KINDS)}")
    add("--rounding", choices=["error", "allow"], default="error", help="of whole numbers that float does not hold")
    add("--as_lists", action="store_true", help="plain values become lists of length 1 or 0")
    add("--rows_per_unit", type=int, default=100_000, help="rows in a row group or stripe")
    add("--compression", default="uncompressed", help="uncompressed, snappy, zstd, ...")
    add_format_option(parser)
    add_csv_options(parser)
    parser.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> int:
    from recfx.data.convert import TYPES, convert

    written = convert(
        args.paths,
        args.folder,
        to=args.to,
        columns=args.columns,
        types={name: TYPES[kind] for name, kind in args.types.items()},
        rounding=args.rounding,
        as_lists=args.as_lists,
        rows_per_unit=args.rows_per_unit,
        compression=args.compression,
        format=format_of(args),
    )
    for path in written:
        print(path)
    return 0


def _names(word: str) -> list[str]:
    return word.split(",")


def _types(word: str) -> dict[str, str]:
    pairs = [item.partition("=") for item in word.split(",")]
    if any(kind not in KINDS for _, _, kind in pairs):
        raise argparse.ArgumentTypeError(f"got '{word}', expected NAME=TYPE with types of {', '.join(KINDS)}")
    return {name: kind for name, _, kind in pairs}
