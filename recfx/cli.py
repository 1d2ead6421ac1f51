"""The `recfx` command. A subcommand is a function of the parsed arguments; its module is imported when it is called."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import recfx
from recfx.commands import convert, inspect, report, tabular, train

__all__ = ["main", "version"]


class Version(argparse.Action):
    """Prints `version()` as it is: argparse's own action joins its lines, and needs them before it is used."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version())
        parser.exit()


def diff(args: argparse.Namespace) -> int:
    """what differs between two checkpoints; exit status 1 if anything does"""
    from recfx.checkpoint import merging

    lines = merging.diff(args.a, args.b)
    print("\n".join(lines) or "the same")
    return int(bool(lines))


def compact(args: argparse.Namespace) -> int:
    """make checkpoints that were laid over others full ones, in their place"""
    from recfx.checkpoint import merging

    for path in args.checkpoints:
        print(merging.compact(path))
    return 0


def version() -> str:
    """What a report of a bug needs to name: recfx, Python, torch, pyarrow and the platform. Imports none of them."""
    parts = [f"recfx {recfx.__version__}", f"Python {platform.python_version()}"]
    for package in ("torch", "pyarrow"):
        try:
            parts.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            parts.append(f"{package} not installed")
    return f"{', '.join(parts)}\n{platform.platform()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status; an error of the user is one line on stderr, status 2."""
    parser = argparse.ArgumentParser(prog="recfx")
    parser.add_argument("--version", action=Version, help="show the versions of recfx, Python, torch and pyarrow")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: object, *arguments: tuple[str, dict]) -> None:
        name, what = command.__name__, command.__doc__  # type: ignore[attr-defined]
        subparser = commands.add_parser(name, help=what, description=what)
        for argument, options in arguments:
            subparser.add_argument(argument, **options)
        subparser.set_defaults(command=command)

    folder = "folder of a checkpoint, step-..."
    add(diff, ("a", {"help": folder}), ("b", {"help": folder}))
    add(compact, ("checkpoints", {"help": folder, "nargs": "+"}))
    convert.add_to(commands)
    inspect.add_to(commands)
    train.add_to(commands)
    train.add_evaluate_to(commands)
    tabular.add_score_to(commands)
    report.add_to(commands)
    args = parser.parse_args(argv)
    try:
        return int(args.command(args))
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        return _ended(2, f"error: {error}")
    except RuntimeError as error:
        from recfx.dist import RankError

        if not isinstance(error, RankError):
            raise
        return _ended(1, f"error: {error}")
    except KeyboardInterrupt as stop:
        return _ended(130, str(stop) or "interrupted")


def _ended(status: int, line: str) -> int:
    """Writes the line on standard error. One of several ranks ends here."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from recfx.program.ranks import end_at_once, rank_prefix

        end_at_once(status, f"{rank_prefix()}{line}")
    print(line, file=sys.stderr)
    return status
