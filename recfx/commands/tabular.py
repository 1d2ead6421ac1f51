"""`recfx train --label` on a user's own files, and `recfx score`."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recfx.commands.csv_options import add_csv_options
from recfx.commands.format_option import add_format_option, format_of
from recfx.commands.text import aligned

if TYPE_CHECKING:
    from recfx.tabular import Roles

__all__ = ["add_model_options", "add_score_to", "written_program"]

HEADER = ("column", "type", "role", "missing", "distinct", "from", "to", "")
WAIT_S = 120.0


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declares what a program is made from, where no `--program` is given."""
    group = parser.add_argument_group("a model on the columns of the files, in place of --program")
    add = group.add_argument
    add("--label", action="append", default=[], metavar="COLUMN", help="what to predict, 0 or 1; may be repeated")
    add("--model", default="dcnv2", metavar="NAME", help="one of recfx.tabular.MODELS, such as lr, deepfm, dcnv2, "
        "finalnet; for several labels shared_bottom, mmoe, ple")  # fmt: skip
    for name, what in (
        ("dense", "columns to read as numbers"),
        ("sparse", "columns to read as ids"),
        ("drop", "columns to leave out"),
    ):
        add(f"--{name}", nargs="+", action="extend", default=[], metavar="COLUMN", help=what)
    add("--weight", metavar="COLUMN", help="weights of the samples")
    add("--negative_rate", type=float, default=1.0, help="share of the negatives that the training files kept; "
        "evaluation and scores are corrected for it")  # fmt: skip
    add("--plan", action="store_true", help="print the columns and the program, and train nothing")
    add("--sample_rows", type=int, default=100_000, help="first rows that columns are judged by")
    add_format_option(parser)
    add_csv_options(parser)


def add_score_to(commands: argparse._SubParsersAction) -> None:
    """Declares `recfx score`."""
    parser = commands.add_parser(
        "score",
        help="score the rows of files by a run",
        description="Writes a Parquet file with one row for each row of the files, in their order: file, row, the "
        "score of each task, and a reason where a row has none.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("run", help="output folder of the run")
    add("paths", nargs="+", help="files, folders, globs or URIs to score")
    add("-o", "--out", required=True, metavar="FILE.parquet", help="where the scores go")
    add("--checkpoint", help="folder of the checkpoint, step-...; None: the newest one of the run")
    add("--program", metavar="FILE.py|MODULE", help="where the program is now; None: the path in run.json")
    add("--allow_changes", action="store_true", help="go on where the program's source has changed since")
    add("--batch_size", type=int, default=1024, help="rows that are scored together")
    add("--backend", choices=["inductor", "eager"], default="inductor", help="of the captured step")
    add_format_option(parser)
    add_csv_options(parser)
    parser.set_defaults(command=_score)


def written_program(args: argparse.Namespace) -> str | None:
    """Shows the columns, and writes the program to <output_dir>/program.py; its path. None with --plan.

    Raises:   ValueError for columns, labels or files that do not fit, or where program.py holds another program.
    """
    from recfx.data.describe import first_rows
    from recfx.data.files import match_files
    from recfx.data.formats import open_file
    from recfx.program.ranks import is_first_process
    from recfx.tabular import program_text, roles_of
    from recfx.tabular.sampling import check_disjoint, leaks_in

    if not args.label:
        raise ValueError(
            "program: got neither --program nor --label, expected one. Give the program, or the column to predict."
        )
    if not 0 < args.negative_rate <= 1:
        raise ValueError(f"negative_rate: got {args.negative_rate}, expected 0 < negative_rate <= 1, a share.")
    format = format_of(args)
    files = match_files(args.paths)
    if args.eval_paths:
        check_disjoint(files, match_files(args.eval_paths))
    sample = first_rows(files, args.sample_rows, format=format)
    names = {name: getattr(args, name) for name in ("dense", "sparse", "drop", "weight")}
    is_csv = open_file(files[0], {}, format).cells_are_bytes
    roles = roles_of(sample, labels=args.label, flags_are_text=is_csv, **names)
    how = {"model": args.model, "negative_rate": args.negative_rate, "format": None if format is None else repr(format)}
    text = program_text(roles, **how, rate_factor=args.reduce_after is not None)
    if is_first_process():
        print(_table(roles, len(sample)))
        for column, label, auc in leaks_in(sample, roles):
            print(
                f"warning: column '{column}' alone gives AUC {auc:.3f} for '{label}'. It may hold what is known only "
                f"afterwards: leave it out with --drop {column}."
            )
    if args.plan:
        print(f"\n{text}", end="")
        return None
    return str(_written(Path(args.output_dir, "program.py"), text, resumes=args.resume, overwrites=args.overwrite))


def _written(path: Path, text: str, *, resumes: bool, overwrites: bool) -> Path:
    from recfx.program.ranks import is_first_process
    from recfx.program.record import write_text

    there = path.read_text(encoding="utf-8") if path.exists() else None
    if there is not None and there != text and not overwrites:
        if resumes:
            return path
        raise ValueError(
            f"'{path}': got another program there, expected none or the same. You may have edited it: train it with "
            f"--program {path}. Otherwise give another --output_dir, or replace it with --overwrite."
        )
    if is_first_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        if there != text:
            write_text(path, text)
        return path
    end = time.monotonic() + WAIT_S  # the other processes of a host or network disk see it soon
    while not (path.exists() and path.read_text(encoding="utf-8") == text):
        if time.monotonic() > end:
            raise ValueError(f"'{path}': got no such program from the first process within {WAIT_S:.0f} s.")
        time.sleep(0.05)
    return path


def _table(roles: Roles, num_rows: int) -> str:
    head = f"{len(roles.columns)} columns, by the first {num_rows:,} rows"
    rows = []
    for c in roles.columns:
        f = c.facts
        kind = f"{c.kind}, list" if c.is_list and c.kind in ("sparse", "text", "bool") else c.kind
        shown = f"{f.missing:.1%}", f"{f.num_distinct:,}", _short(f.low), _short(f.high)
        rows.append((f.name, f.type, kind, *shown, c.why))
    return f"{head}\n{aligned([HEADER, *rows], num_left=3)}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)[:20]


def _score(args: argparse.Namespace) -> int:
    from recfx import program as programs
    from recfx.environment import use_threads
    from recfx.tabular import score

    use_threads(None)
    built, state = programs.restore(
        args.run, checkpoint=args.checkpoint, program=args.program, allow_changes=args.allow_changes
    )
    how = {"batch_size": args.batch_size, "format": format_of(args), "backend": args.backend}
    num, num_bad = score(built, state, args.paths, os.fspath(args.out), **how)
    without = f", {num_bad:,} of them without a score, see their reason" if num_bad else ""
    print(f"{num:,} rows in {args.out}{without}")
    return 0
