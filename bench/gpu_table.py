"""The table's look-ups on a GPU: find and find_or_insert over 128 M slots.

`python -m bench.gpu_table [--small]`; small: sizes for a first look, printed and not kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu_timing import DEVICE, Results, results, times_ms
from recfx.embeddings import Embedding, plan_tables
from recfx.kernels.index import find
from recfx.kernels.op import UNKNOWN
from recfx.table import Limits, Table, TableState, grow_, table
from recfx.types import Ragged

CHUNK = 2**20
LOADS = (0.5, 0.75, 0.87)  # a table takes no more rows than 7/8 of its slots


def make(num_tables: int, dim: int, max_rows: int, *, slots: int, device: str) -> tuple[Table, TableState]:
    (plan,) = plan_tables({"emb": [Embedding(f"t{i}", dim=dim, device=device) for i in range(num_tables)]}).tables
    max_unique = min(max_rows, num_tables * CHUNK)
    t = table(plan, optimizer_slots=slots, seed=1, limits=Limits(max_rows=max_rows, max_unique=max_unique))
    state = t.init()
    return t, grow_(state, max_rows)


def ids_of(number: Tensor) -> Tensor:
    """Distinct ids, scattered as hashes are."""
    return number * -7046029254386353131


def lists_of_one(ids: Tensor) -> Ragged:
    return Ragged(ids, torch.arange(len(ids) + 1, dtype=torch.int32, device=ids.device))


def fill(t: Table, state: TableState, num_tables: int, begin: int, end: int) -> None:
    """Numbers begin to end of every table, a chunk a step."""
    for first in range(begin, end, CHUNK):
        numbers = torch.arange(first, min(first + CHUNK, end), device=state.ids.device)
        t.insert_(state, t.read({f"t{i}": lists_of_one(ids_of(numbers)) for i in range(num_tables)}))
        end_step(state)


def end_step(state: TableState) -> None:
    state.num_unique.zero_()
    state.step.add_(1)


def look_ups(to: Results, *, num_slots: int, keys: int, device: str) -> None:
    """find and find_or_insert of ids that are there, and of new ones."""
    t, state = make(1, 1, num_slots // 8 * 7, slots=0, device=device)
    assert int(state.num_slots) == num_slots
    cell = torch.arange(keys, dtype=torch.int32, device=device)
    vocabulary = torch.zeros(1, dtype=torch.int32, device=device)
    offsets = lists_of_one(cell.long()).offsets
    filled = 0
    for load in LOADS:
        num = int(load * num_slots) - 4 * keys
        fill(t, state, 1, filled, num)
        rows = [torch.randint(0, num, (keys,), device=device) for _ in range(16)]
        present = [ids_of(row) for row in rows]
        new = [ids_of(torch.arange(num + n * keys, num + (n + 1) * keys, device=device)) for n in range(4)]
        filled = num + 4 * keys

        def look(ids: Tensor) -> Tensor:
            return find.find(state.slots, state.ids, state.num_slots, state.salt, ids, cell, vocabulary)

        def insert(ids: Tensor) -> None:
            t.insert_(state, t.read({"t0": Ragged(ids, offsets)}))

        def end_the_last(_: Tensor) -> None:
            end_step(state)

        say = f"load {load}, {num_slots:,} slots, {keys:,} keys: "
        if not (torch.equal(look(present[0]).long(), rows[0]) and bool((look(new[0]) == UNKNOWN).all())):
            raise ValueError(f"{say}got other rows than ids were given, or rows of ids that have none.")
        to.note(f"{say}checked before timing, every id is found in its row and no new one is.")
        to.add(say + "find", times_ms(look, present), items=keys, unit="keys/s", target="H200: 6 G/s")
        ms = times_ms(insert, present, before=end_the_last)
        to.add(say + "insert, all present", ms, items=keys, unit="keys/s", target="H200: 3 G/s")
        ms = times_ms(insert, new, repeats=1, warm_up=0, before=end_the_last)
        to.add(say + "insert, all new", ms, items=keys, unit="keys/s", target="H200: 3 G/s")
        end_step(state)
        assert int(state.num_rows) == filled
        assert int(state.num_refused) == 0


def main() -> None:
    to, small = results("table")
    with to.attempt("look-ups"):
        look_ups(to, num_slots=2**20 if small else 2**27, keys=2**14 if small else 2**20, device=DEVICE)
    to.end()


if __name__ == "__main__":
    main()
