"""Errors for the arguments of a step, its state and its batch, and for what a user's functions return.

All of it is about types, names and shapes: traced with a step, it leaves nothing in the graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from recfx.checks import check_function, check_type, names, said
from recfx.embeddings import Plan
from recfx.optim import DenseOptimizer, SparseOptimizer
from recfx.step.state import TrainState
from recfx.table.policies import Life
from recfx.types import COUNTS, NUM_SAMPLES, Params, Ragged

__all__ = [
    "check_batch",
    "check_bound",
    "check_features",
    "check_functions",
    "check_kinds",
    "check_state",
    "params_of",
    "stats_of",
    "with_names",
]


# By argument: what a function takes, and what it returns.
SIGNATURES = {
    "features": ("batch", "dict of tensors by name"),
    "forward": ("params, embeddings, features[, context]", "logit f32 [B, 1]"),
    "clip": ("grads, tables, scale", "scale f32 []"),
}
# By argument: what it is, and how to come by one.
KINDS: dict[str, tuple[Any, str]] = {
    "sparse_optimizer": (SparseOptimizer, "Build one: recfx.optim.sparse_adamw(1e-3)."),
    "dense_optimizer": (DenseOptimizer, "Build one: recfx.optim.adamw(1e-3)."),
    "life": (Life | None, "Build one: recfx.table.policies.Life(...)."),
}


def check_functions(**functions: object) -> None:
    """Raises TypeError when an argument of `train_step` is not a function of that signature; None passes."""
    for argument, function in functions.items():
        if function is not None:
            check_function(argument, function, *SIGNATURES[argument])


def check_kinds(**parts: object) -> None:
    """Raises TypeError when an argument of `train_step` is another kind of thing."""
    is_swapped = isinstance(parts["sparse_optimizer"], DenseOptimizer) or isinstance(
        parts["dense_optimizer"], SparseOptimizer
    )
    for argument, value in parts.items():
        kind, advice = KINDS[argument]
        swapped = " Is the sparse one given as the dense one?" if is_swapped and "optimizer" in argument else ""
        check_type(argument, value, kind, advice + swapped)


def check_bound(optimizer: SparseOptimizer, accumulation: int, max_unique: int | None) -> None:
    """Raises ValueError when the optimiser needs to know the most rows of a step, and nothing gives that number."""
    if optimizer.needs_bound and accumulation > 1 and max_unique is None:
        raise ValueError(
            f"max_unique: got None, expected a number with accumulation {accumulation} and an optimiser from "
            "recfx.optim.sparse_optimizer. It computes on a block of rows whose size is fixed when the step is traced. "
            "Give the most distinct ids of an optimiser step, such as train_step(max_unique=100_000)."
        )


def params_of(params: Any, devices: Iterable[torch.device | str]) -> Params:
    """The parameters as a step trains them: a `nn.Parameter` as the tensor it holds, sharing its memory.

    Args:     devices: of the embedding tables.
    Raises:   TypeError when they are not tensors of floats by name; ValueError when they are not all on one of the
              devices, or when two items are one place in memory.
    """
    advice = ""
    if isinstance(params, torch.nn.Module):
        advice = "Give dict(module.named_parameters()); call the module by torch.func.functional_call in `forward`."
    check_type("params", params, Mapping, advice or "They are tensors by name.")
    for name, p in params.items():
        check_type("params", name, str, "They are tensors by name.")
        nested = isinstance(p, Mapping)
        check_type(f"params '{name}'", p, Tensor, f"Flatten it: '{name}.weight' is a name." if nested else "")
        if not p.is_floating_point():
            raise TypeError(
                f"params '{name}': got {p.dtype}, expected floats. It has no gradient. Cast it, or use it in `forward` "
                "without being a parameter."
            )
    _check_devices(params, devices)
    _check_memory(params)
    return {name: p.detach() if p.requires_grad else p for name, p in params.items()}


def stats_of(stats: Any, device: torch.device) -> dict[str, Tensor]:
    """A copy of the statistics that `forward` keeps: a step writes into it.

    Args:     device: of the parameters.
    Raises:   TypeError when they are not tensors by name, ValueError when one is on another device.
    """
    check_type("stats", stats, Mapping, "They are tensors by name.")
    for name, t in stats.items():
        check_type("stats", name, str, "They are tensors by name.")
        advice = f"Flatten it: '{name}.mean' is a name." if isinstance(t, Mapping) else "Use torch.tensor(...)."
        check_type(f"stats '{name}'", t, Tensor, advice)
        if t.device.type != device.type or device.index not in (None, t.device.index):
            raise ValueError(
                f"stats '{name}': got a tensor on {t.device}, expected {device}, as the parameters or, without any, "
                "the embeddings. Move it."
            )
    return {name: t.detach().clone() for name, t in stats.items()}


def _check_devices(params: Params, devices: Iterable[torch.device | str]) -> None:
    if not params:
        return
    kinds = {torch.device(device).type for device in devices}
    first, one = next(iter(params.items()))
    for name, p in params.items():
        if p.device != one.device:
            raise ValueError(
                f"params '{name}': got a tensor on {p.device}, expected {one.device}, as '{first}'. Move it."
            )
    if kinds and one.device.type not in kinds:
        where = " or ".join(sorted(kinds))
        raise ValueError(
            f"params: got tensors on {one.device}, expected {where}, as the embeddings. Move them, or build each "
            f"Embedding with device='{one.device}'."
        )


def _check_memory(params: Params) -> None:
    """In-place updates need memory that belongs to one item of one parameter."""
    known: dict[int, list[tuple[int, int, str]]] = {}
    for name, p in params.items():
        if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
            raise ValueError(
                f"params '{name}': got an expanded tensor {list(p.shape)}, expected memory for each item. It is "
                "updated in place. Give its .clone()."
            )
        if not p.is_contiguous() or p.numel() == 0:  # columns of one matrix are interleaved
            continue
        first = int(p.storage_offset()) * p.element_size()
        place = first, first + p.numel() * p.element_size(), name
        known.setdefault(p.untyped_storage()._cdata, []).append(place)
    for places in known.values():
        for (_, end, one), (begin, _, other) in itertools.pairwise(sorted(places)):
            if begin < end:
                raise ValueError(
                    f"params: got '{one}' and '{other}' in the same memory, expected each its own. Each would be "
                    "updated by a part of the gradient. Give one of them, and use it twice in `forward`."
                )


def check_state(state: Any, *, plan: Plan, optimizer: SparseOptimizer, accumulation: int) -> None:
    """Raises TypeError when it is not a training state, ValueError when it is another step's."""
    pair = isinstance(state, tuple) and not isinstance(state, TrainState) and len(state) == 2
    advice = "Unpack what a step returns: state, aux = ..." if pair else "The order is (state, batch)."
    check_type("state", state, TrainState, f"Make one by step.init(params). {advice}")
    slots, row_slots = 1 + len(optimizer.slots), len(optimizer.row_slots)
    expected = [(slots, t.width + row_slots * len(t.dims)) for t in plan.tables]
    got = [tuple(t.rows.shape[1:]) for t in state.tables]
    if got != expected:
        raise ValueError(
            f"state: got tables of rows {got}, expected {expected}. It was made by a step of other embeddings or "
            "another sparse optimiser. Use the state of this step's init."
        )
    if len(state.window.grads) != (len(state.params) if accumulation > 1 else 0):
        given = "with" if state.window.grads else "without"
        raise ValueError(
            f"state: got one {given} sums of gradients, expected it for accumulation {accumulation}. It was made by a "
            "step of another accumulation. Use the state of this step's init."
        )


def check_batch(batch: Any) -> None:
    """Raises TypeError when it is not a dict of columns, ValueError when it does not say its number of samples."""
    advice = "Use recfx.types.pack."
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch: got {said(batch)}, expected recfx.types.Batch. {advice} The order is (state, batch).")
    if NUM_SAMPLES not in batch:
        raise ValueError(
            f"batch: got {said(batch)} without '{NUM_SAMPLES}', expected recfx.types.Batch. The rest of a batch may "
            f"be padding. {advice}"
        )


def check_features(feats: Any, columns: Iterable[tuple[str, str]]) -> None:
    """Raises TypeError when a feature function returns no dict or a label of another kind, ValueError without one.

    Args:     columns: argument and name of the features [B, 1] that tasks read.
    """
    check_type("features", feats, Mapping, "Return a dict of tensors by name, such as {**batch}.")
    for argument, name in columns:
        if name not in feats:
            raise ValueError(
                f"feature '{name}': missing, got {names(feats)}, expected it among them, [B, 1]. It is the {argument}. "
                f"Return it in `features`, or give its name as train_step({argument}=...)."
            )
        column = feats[name]
        if not isinstance(column, Tensor) or column.dim() == 0:
            advice = f" Read it by fixedlen('{name}', [0.0])." if isinstance(column, Ragged) else ""
            raise TypeError(
                f"feature '{name}': got {said(column)}, expected a tensor [B, 1]. It is the {argument}.{advice}"
            )
    if not isinstance(feats.get(COUNTS, {}), Mapping):
        raise TypeError(
            f"feature '{COUNTS}': got {said(feats[COUNTS])}, expected a dict of tensors by name. That is what "
            "`aux.counts` shows. Give a column of that name another one in `features`."
        )


def with_names(name: str, function: Callable[..., Any], *kinds: str) -> Callable[..., Any]:
    """`function`, whose KeyErrors become ValueErrors that say which names its arguments have. As it is in a graph.

    Args:     kinds: what the names of the first arguments are called.
    """

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args)
        try:
            return function(*args)
        except KeyError as error:
            there = ", ".join(f"{kind} {names(arg)}" for kind, arg in zip(kinds, args, strict=False))
            raise ValueError(f"{name}: got no {error.args[0]!r}, expected one of {there}.") from error

    return call
