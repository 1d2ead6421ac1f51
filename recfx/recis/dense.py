"""The dense part of a RecIS checkpoint: parameters by name, their AdamW moments, and the steps of step filters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from recfx.checkpoint.matching import check_names
from recfx.step import TrainState
from recfx.types import Params

__all__ = ["FilterSteps", "dense_pairs"]

MODEL, EXTRA = "model.pt", "extra.pt"
OPTIMIZERS = ("dense_optimizer", "recis.dense.optim.")  # keys of the dense optimiser: before 1.1, and in 1.1 and 1.2
FILTER_STEP = "@filter_global_step"  # after a table's name, since 1.2.18
HASHED_FILTER_STEP = (
    "_hashtable._filter_hook_impl._global_step"  # before 1.2.18: after a module's name, with a hash in it
)
ADVICE = "To start with moments of 0, load the dense part in an earlier call: tables=(), moments=False."


class FilterSteps:
    """The saved steps of step filters, by table. Raises: ValueError when the file is missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / MODEL
        self._steps = {name: value for name, value in _load(self._path).items() if _is_filter_step(name)}

    def of(self, table: str) -> int:
        """The step of a table. Raises: ValueError when there is none, or when several could be this table's."""
        hashed = [name for name in self._steps if name.endswith(HASHED_FILTER_STEP)]
        names = [table + FILTER_STEP] if table + FILTER_STEP in self._steps else hashed
        found = {name: self._step(name) for name in names}
        if len(set(found.values())) != 1:
            raise ValueError(
                f"{self._path}: table '{table}': got steps {found} of step filters, expected '{table}{FILTER_STEP}' or "
                "one number for all. The age of the table's rows is counted from it. Use another checkpoint."
            )
        return next(iter(found.values()))

    def _step(self, name: str) -> int:
        value = self._steps[name]
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_floating_point() or int(value) < 0:
            raise ValueError(f"{self._path}: tensor '{name}': got {value}, expected a number of steps.")
        return int(value)


def _is_filter_step(name: object) -> bool:
    return isinstance(name, str) and name.endswith((FILTER_STEP, HASHED_FILTER_STEP))


def dense_pairs(
    folder: Path, state: TrainState, dense: Callable[[Params], Params], *, moments: bool
) -> list[tuple[Tensor, Tensor]]:
    """Tensors of the state, and their new values. Raises: as `load_recis`."""
    saved = _load(folder / MODEL).items()
    there = {name: value for name, value in saved if isinstance(value, Tensor) and not _is_filter_step(name)}
    pairs = _renamed(folder / MODEL, dense, there, state.params)
    if not moments:
        return pairs
    if getattr(state.dense, "_fields", ()) != ("m", "v", "step"):
        raise ValueError(
            f"{folder / EXTRA}: got AdamW's moments for {type(state.dense).__name__}, expected an optimiser that keeps "
            f"them. {ADVICE}"
        )
    m, v, num_steps = _moments(folder / EXTRA, there)
    pairs += _renamed(folder / EXTRA, dense, m, state.dense.m) + _renamed(folder / EXTRA, dense, v, state.dense.v)
    return [*pairs, (state.dense.step, torch.tensor(num_steps))]


def _renamed(path: Path, dense: Callable[[Params], Params], there: Params, here: Params) -> list[tuple[Tensor, Tensor]]:
    try:
        found = dense(there)
    except KeyError as error:
        raise ValueError(f"{path}: no tensor {error}, only {list(there)}. Change `dense`.") from error
    check_names("dense", found, here)
    for name, value in found.items():
        shapes = list(value.shape), list(here[name].shape)
        if shapes[0] != shapes[1]:
            raise ValueError(f"{path}: parameter '{name}': got {shapes[0]}, expected {shapes[1]}. Change `dense`.")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{path}: parameter '{name}': got values that are not finite, expected numbers.")
    return [(here[name], value) for name, value in found.items()]


def _moments(path: Path, params: Params) -> tuple[Params, Params, int]:
    """First and second moments by the names of `params`, and the steps taken."""
    saved = _optimizer(path)
    key_of = _keys(path, saved["param_groups"], list(params))
    m, v, steps = {}, {}, set()
    for name, param in params.items():
        zeros = torch.zeros_like(param)  # of a parameter that never had a gradient
        key = key_of.get(name)
        kept = saved["state"].get(key, {"exp_avg": zeros, "exp_avg_sq": zeros})
        shapes = [list(kept[slot].shape) if slot in kept else None for slot in ("exp_avg", "exp_avg_sq")]
        if shapes != [list(param.shape)] * 2:
            raise ValueError(
                f"{path}: parameter {key}: got moments of shapes {shapes}, expected {list(param.shape)}, that of "
                f"'{name}'. {ADVICE}"
            )
        m[name], v[name] = kept["exp_avg"], kept["exp_avg_sq"]
        steps |= {int(kept["step"])} if "step" in kept else set()
    if len(steps) > 1:
        raise ValueError(f"{path}: got steps {sorted(steps)}, expected one number for all. {ADVICE}")
    return m, v, max(steps, default=0)


def _optimizer(path: Path) -> dict:
    """The state_dict of the dense optimiser: by its name, or the only one in the file."""
    content = _load(path)
    named = [content[key] for key in OPTIMIZERS if key in content][:1]
    saved = [e for e in named or content.values() if isinstance(e, dict) and {"state", "param_groups"} <= e.keys()]
    if len(saved) != 1:
        raise ValueError(f"{path}: got {len(saved)} states of dense optimisers, expected one. {ADVICE}")
    return saved[0]


def _keys(path: Path, groups: list[dict], names: list[str]) -> dict[str, str | int]:
    """The key of each parameter in the optimiser's state: its name, or its number when no names were saved."""
    keys = [key for group in groups for key in group["params"]]
    if all("param_names" in group for group in groups):
        known = [name for group in groups for name in group["param_names"]]
    elif keys and all(isinstance(key, str) for key in keys):
        known = keys
    elif [list(group["params"]) for group in groups] == [list(range(len(names)))]:
        known = names
    else:
        numbers = [list(group["params"]) for group in groups]
        raise ValueError(f"{path}: got {numbers}, expected one group of the {len(names)} tensors of {MODEL}. {ADVICE}")
    if len(known) != len(keys) or len(set(known)) != len(known) or not set(known) <= set(names):
        strange = sorted(set(known) - set(names))
        raise ValueError(
            f"{path}: got names {known} of {len(keys)} parameters, expected each once, of tensors of {MODEL}: "
            f"{strange} are not there. {ADVICE}"
        )
    return dict(zip(known, keys, strict=True))


def _load(path: Path) -> dict:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"got {type(content).__name__}")
    except Exception as error:  # of many types: missing, not a zip or pickle, classes that are not allowed
        raise ValueError(f"{path}: {error!r}, expected a dict that torch.load reads with weights_only=True.") from error
    return content
