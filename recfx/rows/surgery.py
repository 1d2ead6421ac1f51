"""Reading, writing and deleting rows by id."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recfx.kernels.counters import NUM_CROWDED, NUM_FREE, NUM_ROWS
from recfx.kernels.index.find_or_insert import find_or_insert_
from recfx.kernels.op import UNKNOWN
from recfx.rows.views import Rows, TableView, check_device, owned, reading_of, rows_of, taken, view_of
from recfx.step import Step, TrainState
from recfx.table import delete_ as delete_rows_
from recfx.table import grow_, initializer_tensors, num_live

__all__ = ["check_ids", "check_values", "delete_", "put_", "read", "write_"]


def read(step: Step, state: TrainState, table: str, ids: Tensor) -> Rows:
    """The rows of `ids` i64 [N], in their order. Creates no rows. Of several ranks, those that this one owns.

    Raises:   ValueError on an unknown table or ids on another device, TypeError on ids that are not i64 [N].
    Example:  >>> from recfx import optim
              >>> from recfx.embeddings import Embedding
              >>> from recfx.step import train_step
              >>> step = train_step(features=dict, embeddings={"emb": [Embedding("item", dim=2)]},
              ...                   forward=lambda params, emb, feats: emb["emb"].sum((1, 2))[:, None],
              ...                   sparse_optimizer=optim.sparse_sgd(0.1), dense_optimizer=optim.sgd(0.1))
              >>> state = step.init({"w": torch.zeros(1)})
              >>> state = write_(step, state, "emb/item", torch.tensor([7]), torch.tensor([[0.5, 2.0]]))
              >>> read(step, state, "emb/item", torch.tensor([7, 8])).weight.tolist()
              [[0.5, 2.0], [0.0, 0.0]]
    """
    view = view_of(step, state, table)
    return taken(view, rows_of(view, ids), ids)


def write_(
    step: Step, state: TrainState, table: str, ids: Tensor, weight: Tensor, slots: Mapping[str, Tensor] | None = None
) -> TrainState:
    """Inserts rows, or overwrites those that exist: pre-trained vectors.

    Optimiser slots restart at zero, except those given in `slots`. The other tables over these ids keep their weights;
    in a new row they have their initial ones. No admission policy applies, and a row's age and count do not change.
    Of several ranks, each writes the ids that it owns: give all of them the same.

    Args:     ids: i64 [N], distinct.  weight: f32 [N, D].  slots: as in `Rows`, some of them.
    Raises:   ValueError inside a step, on an unknown table, another device than the table's, ids that repeat, a wrong
              shape, a number that is not finite, or too little room for the new ids; TypeError on wrong dtypes. Nothing
              is then written.
    """
    view = view_of(step, state, table)
    if slots is not None and (not isinstance(slots, Mapping) or "weight" in slots):
        got = list(slots) if isinstance(slots, Mapping) else type(slots).__name__
        raise ValueError(f"slots: got {got}, expected tensors by some of the names {list(view.tensors)[1:]}.")
    values = {"weight": weight, **(slots or {})}
    check_ids(view, state, table, ids)
    check_values(view, ids, values)
    if view.world_size > 1:
        mine = owned(view, ids)
        ids, values = ids[mine], {name: value[mine] for name, value in values.items()}
    put_(view, step.seed, ids, values)
    return state


def put_(view: TableView, seed: int, ids: Tensor, values: Mapping[str, Tensor]) -> None:
    """Writes the rows of distinct ids that this rank owns. The table must have room."""
    t, known = view.table, rows_of(view, ids) != UNKNOWN
    grow_(t, int((~known).sum()))
    row = _insert_(view, seed, ids)
    t.born[row[~known]] = t.step.int()
    t.seen[row] = t.step << 32
    for name, tensor in view.tensors.items():
        tensor[row] = values[name].detach() if name in values else torch.zeros_like(tensor[row])


def delete_(step: Step, state: TrainState, table: str, ids: Tensor) -> TrainState:
    """Deletes the rows of `ids`, for all tables that share them; ids without a row are ignored, on ranks those that
    another one owns too.

    Raises:   ValueError inside a step or on an unknown table, TypeError on ids that are not i64 [N].
    """
    view = view_of(step, state, table)
    _check_between_steps(view, state)
    row = rows_of(view, ids)
    delete_rows_(view.table, row[row != UNKNOWN])
    return state


def _insert_(view: TableView, seed: int, ids: Tensor) -> Tensor:
    """The row of each id; new rows have their initial values. The table must have room."""
    t, num_slots = view.table, view.table.rows.shape[2] - view.plan.width
    init = (nn.functional.pad(x, (0, num_slots)) for x in initializer_tensors(view.plan, seed))
    before, reading = t.counters.clone(), reading_of(view, ids)
    row, _ = find_or_insert_(
        t.slots, t.ids, t.vocabularies, t.seen, t.born, t.rows, t.free_rows, t.unique_rows, t.counters, reading.id,
        reading.cell, reading.vocabularies, *init, None,
    )  # fmt: skip
    for of_rows in (NUM_ROWS, NUM_FREE, NUM_CROWDED):
        before[of_rows] = t.counters[of_rows]
    t.counters.copy_(before)  # the other counters, and the step's unique rows, belong to training
    return row.long()


def _check_between_steps(view: TableView, state: TrainState) -> None:
    if int(view.table.num_unique) or int(state.window.num_batches):
        raise ValueError("state: got a step in progress, expected none. Write rows between optimiser steps.")


def check_ids(view: TableView, state: TrainState, table: str, ids: Tensor) -> None:
    """Raises the errors of `write_` about ids."""
    _check_between_steps(view, state)
    absent = rows_of(view, ids) == UNKNOWN
    num_repeated = ids.numel() - ids.unique().numel()
    if num_repeated:
        raise ValueError(f"ids: got {num_repeated} more than once, expected each once.")
    num_new, room = int((absent & owned(view, ids)).sum()), view.table.ids.numel() - num_live(view.table)
    if num_new > room:
        raise ValueError(f"table '{table}': got {num_new} new ids, expected at most {room}. Raise max_rows.")


def check_values(view: TableView, ids: Tensor, values: Mapping[str, Tensor]) -> None:
    """Raises the errors of `write_` about weights and slots."""
    for name, value in values.items():
        if name not in view.tensors:
            raise ValueError(f"slots: got '{name}', expected some of {list(view.tensors)[1:]}.")
        shape = [ids.numel(), view.tensors[name].shape[1]]
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: got {got}, expected torch.float32 {shape}.")
        if list(value.shape) != shape:
            raise ValueError(f"{name}: got {list(value.shape)}, expected {shape}.")
        check_device(name, view, value)
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name}: got values that are not finite, expected numbers. Training would spread them.")
