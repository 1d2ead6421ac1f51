"""The size of a batch's gradients by parameter and by feature, for people: nothing is trained."""

from __future__ import annotations

import torch

from recfx.dist.group import exchanging
from recfx.step.finite import clean_padding
from recfx.step.forward import context_of, look_up, num_ids, read, real_samples
from recfx.step.parts import StepParts
from recfx.step.state import Batch, TrainState
from recfx.step.update import gradients, is_void_

__all__ = ["gradient_norms"]


def gradient_norms(parts: StepParts, state: TrainState, batch: Batch) -> dict[str, float]:
    """See `recfx.step.Step`."""
    parts.check(state)
    with torch.no_grad(), parts.draws.watched(state.step.device), exchanging():
        while True:
            found = _norms(parts, state, batch)
            if not is_void_(parts, state):
                return found


def _norms(parts: StepParts, state: TrainState, batch: Batch) -> dict[str, float]:
    feats = read(parts, batch)
    num_ids(parts, feats)  # sets the capacities between ranks
    valid = real_samples(parts, feats)
    feats = clean_padding(feats, valid)
    rows, found, requests = look_up(parts, state, feats, inserts=False)
    context = context_of(parts, state, valid, training=True, requests=requests)
    (grads, row_grads), _ = gradients(parts, state.params, rows, found, feats, context)
    num_samples = valid.sum().clamp(min=1)
    squares = {f"parameter '{name}'": g.float().square().sum() for name, g in grads.items()}
    for plan, of_table in zip(parts.plan.tables, row_grads, strict=True):
        num, num_kept = len(plan.dims), 0
        for i, lookup in enumerate(plan.lookups):
            if lookup.is_kept:
                num_kept += 1
                own = [g.flatten() for g in of_table[num_kept * num : (num_kept + 1) * num]]
            else:
                own = [g[:, plan.cells_of(i)].flatten() for g in of_table[:num]]
            name = f"feature '{lookup.feature}'"
            squares[name] = squares.get(name, 0.0) + torch.stack([g.float().square().sum() for g in own]).sum()
    return {name: float(square.sqrt() / num_samples) for name, square in squares.items()}
