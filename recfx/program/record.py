"""`run.json`: what a run leaves about its program, so that it can be built again."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

import recfx
from recfx.checks import said
from recfx.dist import Group, current
from recfx.program.modules import Found, find, sources

__all__ = [
    "FILE",
    "check_sources",
    "differences",
    "located",
    "place_of",
    "ranks_of",
    "read_run",
    "record_of",
    "write_text",
]

FILE, FORMAT = "run.json", 1
KEYS = {
    "arguments": dict, "device": str, "instruction_set": str, "paths": dict, "program": dict, "sources": dict,
    "threads": int, "versions": dict,
}  # fmt: skip
PROGRAMS = ([("import", str)], [("file", str)])


def record_of(
    found: Found, folder: str | os.PathLike[str], *, arguments: Mapping[str, Any], paths: Mapping[str, Any], device: str
) -> dict[str, Any]:
    """What `run.json` holds of a run that starts now: the same values in every run of the same program.

    format: 1.  program: {"import": its import path} or {"file": its path, relative to the folder of `run.json`}.
    arguments: all of them, by name.  paths: what was given to its reader, by use: relative ones as they were given,
    null for what is not a path.
    sources: sha256 of its files, see `recfx.program.modules.sources`.  versions: of Python, recfx and packages.
    threads: of torch's operators.  instruction_set: of the processor, as torch's kernels use it.  device: of the state.

    Args:     folder: where `run.json` will be.
    """
    where = {"import": found.name} if found.name else {"file": _relative(found.file, Path(folder).resolve())}
    return {
        "format": FORMAT,
        "program": where,
        "arguments": dict(arguments),
        "paths": {use: _plain(given) for use, given in paths.items()},
        "sources": sources(found),
        **_surroundings(),
        "device": device,
    }


def ranks_of(group: Group) -> dict[str, Any]:
    """What `run.json` holds of the ranks, under "ranks": how many, streams, deterministic. Nothing of one alone."""
    names = ("world_size", "streams", "deterministic")
    is_alone = group.world_size == 1 and group.streams == 1 and not group.deterministic
    return {} if is_alone else {"ranks": {name: getattr(group, name) for name in names}}


def read_run(run: str | os.PathLike[str]) -> dict[str, Any]:
    """What `run.json` holds, see `record_of`.

    Args:     run: the output folder of a run, or its `run.json`.
    Raises:   ValueError naming the file when it is missing, damaged, or of a newer recfx.
    """
    path = place_of(run)
    try:
        record = json.loads(path.read_bytes())
        version = record["format"]
        if type(version) is not int or version < 1:
            raise TypeError(f"format {version!r}")
    except FileNotFoundError as error:
        raise ValueError(
            f"run: got '{os.fspath(run)}', which contains no {FILE}, expected the output folder of a run. "
            "recfx.program.train writes one, and so does `recfx train`."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: got {said(str(error))}, expected the record of a run. The file is damaged."
        ) from error
    if version > FORMAT:
        raise ValueError(f"{path}: got format {version}, expected {FORMAT} or less. Update recfx.")
    wrong = [name for name, kind in KEYS.items() if type(record.get(name)) is not kind]
    where = record.get("program")
    if not wrong and not (
        list(where) in (["import"], ["file"]) and all(type(value) is str for value in where.values())
    ):
        wrong = ["program"]
    if wrong:
        raise ValueError(
            f"{path}: got {said(record.get(wrong[0]))} as {wrong[0]!r}, expected what recfx writes there. The file is "
            "damaged."
        )
    return record


def differences(run: str | os.PathLike[str]) -> list[str]:
    """What of this process differs from the one that ran it: versions, threads, instruction set. A line each.

    Where there is no difference, training again on the same device gives the same bytes. With other threads or
    another instruction set, sums are taken in another order: values agree to about 1e-5, relative.
    """
    record, now = read_run(run), _surroundings()
    pairs = [(name, now["versions"].get(name), record["versions"].get(name)) for name in sorted(now["versions"])]
    pairs += [(name.replace("_", " "), now[name], record[name]) for name in ("threads", "instruction_set")]
    pairs += _pairs_of_ranks(record.get("ranks", {}))
    return [f"{name}: got {mine}, expected {theirs} as in the run" for name, mine, theirs in pairs if mine != theirs]


def _pairs_of_ranks(ranks: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What of the ranks decides on bytes. In a deterministic run their number does not; their streams do."""
    alone = {"world_size": 1, "streams": 1, "deterministic": False}
    then, group = {**alone, **ranks}, current()
    now = {**alone, **({} if group is None else {name: getattr(group, name) for name in alone})}
    now["world_size"] = int(os.environ.get("WORLD_SIZE", "1"))
    if group is None:  # not joined yet
        now |= {name: then[name] for name in ("streams", "deterministic")}
    decide = ("streams", "deterministic") if then["deterministic"] and now["deterministic"] else tuple(alone)
    return [(name.replace("_", " "), now[name], then[name]) for name in decide]


def located(record: Mapping[str, Any], path: Path) -> Found:
    """The program of a record.

    Args:     path: of its `run.json`.
    Raises:   ValueError naming the record, where there is none.
    """
    where = record["program"]
    try:
        return find(
            where["import"] if "import" in where else Path(os.path.normpath(path.parent.resolve() / where["file"]))
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error} Give its new place: load(run, program=...).") from error


def check_sources(record: Mapping[str, Any], path: Path, found: Found) -> None:
    """Raises ValueError naming the files of a program that differ from those in the record."""
    then, now = record["sources"], sources(found)
    if not found.name and len(then) and "file" in record["program"]:  # a program's file may have another name now
        now = {_own(record) if name == found.file.name else name: digest for name, digest in now.items()}
    kinds = {name: "changed" if name in now else "missing" for name in then if now.get(name) != then[name]}
    kinds |= dict.fromkeys((name for name in now if name not in then), "new")
    if kinds:
        listed = ", ".join(f"'{found.base / name}' ({kind})" for name, kind in sorted(kinds.items()))
        raise ValueError(
            f"{path}: got a program with {listed}, expected the files that were trained. Another program computes "
            "other values from the same checkpoint. Restore them, or accept the change with allow_changes=True "
            "(--allow_changes)."
        )


def place_of(run: str | os.PathLike[str]) -> Path:
    """The path of a run's `run.json`."""
    if not isinstance(run, str | os.PathLike) or not isinstance(os.fspath(run), str):
        raise TypeError(f"run: got {said(run)}, expected the output folder of a run, a path.")
    if "\0" in os.fspath(run):
        raise ValueError(f"run: got {said(run)}, expected the output folder of a run, a path.")
    path = Path(run)
    return path if path.name == FILE and not path.is_dir() else path / FILE


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all.

    Raises:   OSError when the disk is full or not writable.
    """
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def _surroundings() -> dict[str, Any]:
    versions = {"numpy": np.__version__, "pyarrow": pa.__version__, "torch": str(torch.__version__)}
    return {
        "versions": {"python": platform.python_version(), "recfx": recfx.__version__, **versions},
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
    }


def _own(record: Mapping[str, Any]) -> str:
    return record["program"]["file"].rpartition("/")[2]


def _relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file, folder)).as_posix()


def _plain(given: Any) -> Any:
    """Paths as JSON: text, or a list of text; None for what is not a path."""
    if isinstance(given, list | tuple):
        return [_plain(item) for item in given]
    text = os.fspath(given) if isinstance(given, os.PathLike) else given
    return text if isinstance(text, str) else None
