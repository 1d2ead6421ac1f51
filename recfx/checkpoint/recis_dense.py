"""The dense part of a RecIS checkpoint: parameters by name, and AdamW's moments of them by number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from recfx.checkpoint.matching import check_names
from recfx.step import TrainState
from recfx.types import Params

__all__ = ["dense_pairs"]

MODEL, EXTRA = "model.pt", "extra.pt"
ADVICE = "To begin with fresh moments, take the dense part in a call before: tables=(), moments=False."


def dense_pairs(
    folder: Path, state: TrainState, dense: Callable[[Params], Params], *, moments: bool
) -> list[tuple[Tensor, Tensor]]:
    """Tensors of the state, and what they are to become. Raises: as `load_recis`."""
    there = {name: value for name, value in _load(folder / MODEL).items() if isinstance(value, Tensor)}
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
    saved = [e for e in _load(path).values() if isinstance(e, dict) and {"state", "param_groups"} <= e.keys()]
    if len(saved) != 1:
        raise ValueError(f"{path}: got {len(saved)} states of dense optimisers, expected one. {ADVICE}")
    numbers = [list(group["params"]) for group in saved[0]["param_groups"]]
    if numbers != [list(range(len(params)))]:
        raise ValueError(f"{path}: got {numbers}, expected one group of the {len(params)} tensors of {MODEL}. {ADVICE}")
    m, v, steps = {}, {}, set()
    for number, (name, param) in enumerate(params.items()):
        zeros = torch.zeros_like(param)  # of one that never had a gradient
        kept = saved[0]["state"].get(number, {"exp_avg": zeros, "exp_avg_sq": zeros})
        shapes = [list(kept[slot].shape) if slot in kept else None for slot in ("exp_avg", "exp_avg_sq")]
        if shapes != [list(param.shape)] * 2:
            raise ValueError(
                f"{path}: parameter {number}: got moments of shapes {shapes}, expected {list(param.shape)}, that of "
                f"'{name}'. {ADVICE}"
            )
        m[name], v[name] = kept["exp_avg"], kept["exp_avg_sq"]
        steps |= {int(kept["step"])} if "step" in kept else set()
    if len(steps) > 1:
        raise ValueError(f"{path}: got steps {sorted(steps)}, expected one number for all. {ADVICE}")
    return m, v, max(steps, default=0)


def _load(path: Path) -> dict:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"got {type(content).__name__}")
    except Exception as error:  # of many types: not there, no zip, no pickle, classes that are not allowed
        raise ValueError(f"{path}: {error!r}, expected a dict that torch.load reads with weights_only=True.") from error
    return content
