"""`recfx inspect`: describes files or a checkpoint, and writes a manifest of checksums."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from recfx.commands.csv_options import add_csv_options
from recfx.commands.format_option import add_format_option, format_of
from recfx.commands.text import aligned

if TYPE_CHECKING:
    from recfx.data.describe import ColumnFacts, Facts

__all__ = ["add_to"]

HEADER = ("column", "type", "missing", "length", "longest", "distinct", "once", "top", "from", "to")
MANIFEST = "_checksums.json"  # a folder does not match files with this first character
CHECKSUMS = f"write checksums for the reader to FILE, by default {MANIFEST} next to the files, and print nothing else"


def add_to(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "inspect",
        help="print schema, row counts, missing rates, list lengths, cardinalities and skew",
        description="missing: share of rows without a value; length, longest: items of a row; once: share of the "
        "distinct values that are seen once; top: share of the most frequent value. Of a checkpoint: its tables with "
        "their rows, parameters, and optimiser state.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="+", help="files, folders, globs or URIs; checkpoints, or folders of them for the newest")
    add("--rows", type=int, default=1_000_000, help="rows that columns are described by; all are counted")
    add("--checksums", metavar="FILE", nargs="?", const="", help=CHECKSUMS)
    add_format_option(parser)
    add_csv_options(parser)
    parser.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> int:
    from recfx.commands.checkpoints import checkpoint_at, describe_checkpoint
    from recfx.data.checksums import write_manifest
    from recfx.data.describe import describe
    from recfx.data.files import match_files

    checkpoints = [checkpoint_at(path) for path in args.paths]
    if any(checkpoints):
        if not all(checkpoints) or args.checksums is not None:
            raise ValueError(
                f"paths: got {args.paths}, expected checkpoints alone, or files alone. Checksums are for files."
            )
        print("\n\n".join(describe_checkpoint(path) for path in checkpoints if path))
        return 0
    files = match_files(args.paths)
    if args.checksums is not None:
        manifest = args.checksums or os.path.join(os.path.dirname(files[0].path), MANIFEST)
        write_manifest(manifest, files)
        print(f"{len(files)} checksums in {manifest}")
    else:
        print(_text(describe(files, max_rows=args.rows, format=format_of(args))))
    return 0


def _text(facts: Facts) -> str:
    head = f"{facts.num_files} files, {facts.num_bytes:,} bytes, {facts.num_units} units, {facts.num_rows:,} rows"
    if facts.num_described < facts.num_rows:
        head += f"; columns by the first {facts.num_described:,}"
    return f"{head}\n{aligned([HEADER, *map(_cells, facts.columns)], num_left=2)}"


def _cells(c: ColumnFacts) -> tuple[str, ...]:
    shares = (f"{c.once:.1%}", f"{c.top:.1%}")
    lengths = (f"{c.missing:.1%}", f"{c.mean_length:.2f}", f"{c.max_length}")
    return (c.name, c.type, *lengths, f"{c.num_distinct:,}", *shares, _short(c.low), _short(c.high))


def _short(value: float | str | None) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)[:20]
