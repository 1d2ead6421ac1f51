"""`recfx report`: one HTML page about a run."""

from __future__ import annotations

import argparse

__all__ = ["add_to"]


def add_to(commands: argparse._SubParsersAction) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "report",
        help="write one HTML page about a run",
        description="Writes report.html to the run's folder: learning curves, speed, growth of the tables, norms of "
        "their rows. Needs the package matplotlib.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("run", help="output folder of the run")
    add("--files", nargs="+", help="held-out files for a chart of calibration by bins; None: no such chart")
    add("--eval_steps", type=int, help="batches of them; None: all")
    parser.set_defaults(command=_report)


def _report(args: argparse.Namespace) -> int:
    from recfx.report import write_report

    print(write_report(args.run, files=args.files, eval_steps=args.eval_steps))
    return 0
