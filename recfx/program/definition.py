"""What a program is: the result of `build(args)`, and how it is built from a module and arguments."""

from __future__ import annotations

import dataclasses
import json
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

from recfx.checks import check_function, check_type, names, said
from recfx.data import Column, FixedLen, VarLen
from recfx.program.modules import Found, find, imported
from recfx.step import Step, TrainState

__all__ = ["Program", "Use", "build", "build_found"]

Use = Literal["train", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A step, its first state and its reader: all that training, evaluating and scoring start from.

    Args:     step: what `train_step` returned.
              init: () -> a new state, the same bytes whenever it is called: random parameters come from a generator
              with a fixed seed.
              columns: of the reader, in its order. A request to a served model has them too, without the label.
              reader: (paths, use) -> `recfx.data.Reader`. `paths` is what the caller of `train` or `evaluate` gave:
              files, folders, globs or URIs, one or a list. `use` is "train" or "evaluate". Readers for "train" may
              shuffle rows and leave out the last incomplete batch; readers for "evaluate" give every row once, in the
              order of the files.
    Raises:   TypeError when a field is of another kind.
    """

    step: Step
    init: Callable[[], TrainState]
    columns: Sequence[Column]
    reader: Callable[[Any, Use], Any]

    def __post_init__(self) -> None:
        check_type("step", self.step, Step, "Build one: recfx.step.train_step(...).")
        check_function("init", self.init, "", "a new state", "Use lambda: step.init(params).")
        check_type("columns", self.columns, Sequence, "Give those of the reader: [fixedlen(...), varlen(...)].")
        for column in self.columns:
            check_type("columns", column, FixedLen | VarLen, "Give those of the reader: [fixedlen(...), varlen(...)].")
        check_function("reader", self.reader, "paths, use", "Reader", "Return recfx.data.reader(paths, ...).")


def build(program: str | os.PathLike[str], arguments: Mapping[str, Any] | Namespace | Any = None) -> Program:
    """Imports a program and calls its `build` with its arguments.

    `build` gets an object with an attribute for each name in the module's `ARGUMENTS`: the value given, or the default.
    Values have passed through JSON, so tuples are lists: a run that is loaded again gets the same.

    Args:     program: an import path, such as "recfx.examples.deepfm", or the path of a .py file. Modules next to the
              file can be imported while it is imported and built, as in `python program.py`.
              arguments: values by name: a mapping, an argparse Namespace or a dataclass. None: the defaults.
    Raises:   ValueError when the module cannot be imported, or an argument is unknown, of another type than its
              default, or not JSON-able; TypeError when `build` is not a function of one argument or returns something
              else than a Program; what `build` raises.
    """
    return build_found(find(program), arguments)[0]


def build_found(found: Found, arguments: Any) -> tuple[Program, dict[str, Any]]:
    """`build` of a module that was found; with all of its arguments, as `run.json` records them."""
    with imported(found) as module:
        check_function("build", getattr(module, "build", None), "args", "Program", f"{found.file} is a program.")
        chosen = _arguments_of(module, arguments)
        built = module.build(SimpleNamespace(**chosen))
    check_type("build", built, Program, f"Return recfx.program.Program(...) from build, in {found.file}.")
    return built, chosen


def _arguments_of(module: ModuleType, given: Any) -> dict[str, Any]:
    """All arguments of a program: what was given over its defaults, as JSON reads them back."""
    defaults = getattr(module, "ARGUMENTS", {})
    check_type("ARGUMENTS", defaults, Mapping, f"Its default by the name of each argument, in {module.__file__}.")
    chosen = _mapping_of(given)
    for name in defaults:
        check_type("ARGUMENTS", name, str, f"The name of each argument, in {module.__file__}.")
    if unknown := [name for name in chosen if name not in defaults]:
        raise ValueError(
            f"arguments: got {unknown[0]!r}, expected some of {names(defaults)}. The program does not use others. "
            f"Correct the name, or add it to ARGUMENTS in {module.__file__}."
        )
    defaults = {name: _through_json(name, value) for name, value in defaults.items()}
    return {name: _like(default, name, chosen.get(name, default)) for name, default in defaults.items()}


def _mapping_of(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        return dataclasses.asdict(given)
    if isinstance(given, Namespace):
        return vars(given)
    check_type("arguments", given, Mapping, "Give values by name.")
    return dict(given)


def _like(default: Any, name: str, value: Any) -> Any:
    """A value, of the type of its default; a default of None takes any."""
    value = _through_json(name, value)
    if type(default) is float and type(value) is int:
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(
                f"arguments: got {name}={said(value)}, expected a float. It is too large for one."
            ) from error
    if default is not None and type(value) is not type(default):
        raise ValueError(
            f"arguments: got {name}={said(value)}, expected one of type {type(default).__name__}. Its default is "
            f"{said(default)}. Give another value."
        )
    return value


def _through_json(name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"arguments: got {name}={said(value)}, expected a value that JSON can hold ({error}). run.json records it. "
            "Give numbers, strings, flags, None, or lists and dicts of these."
        ) from error
