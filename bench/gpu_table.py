"""The table's operators on a GPU: dynamicemb's published case, and find and find_or_insert over 128 M slots.

`python -m bench.gpu_table [--small]`; small: sizes for a first look, printed and not kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu_timing import Results, results, times_ms
from recfx.embeddings import Embedding, plan_tables
from recfx.kernels import find
from recfx.kernels.add_row_grads import add_row_grads_, add_row_grads_atomic_
from recfx.kernels.op import UNKNOWN
from recfx.optim import sparse_adam
from recfx.table import Found, Table, TableState, grow_, table
from recfx.types import Ragged

CHUNK = 2**20
NUM_TABLES, DIM = 10, 128
LOADS = (0.5, 0.75, 0.87)  # a table takes no more rows than 7/8 of its slots


def make(num_tables: int, dim: int, max_rows: int, *, slots: int, device: str) -> tuple[Table, TableState]:
    (plan,) = plan_tables({"emb": [Embedding(f"t{i}", dim=dim, device=device) for i in range(num_tables)]}).tables
    max_unique = min(max_rows, NUM_TABLES * CHUNK)
    t = table(plan, optimizer_slots=slots, seed=1, max_rows=max_rows, max_unique=max_unique)
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
        t.insert_(state, {f"t{i}": lists_of_one(ids_of(numbers)) for i in range(num_tables)})
        end_step(state)


def end_step(state: TableState) -> None:
    state.num_unique.zero_()
    state.step.add_(1)


def replaying(function: Callable[[list[Tensor]], None], ids: list[Tensor]) -> Callable[[list[Tensor]], None]:
    """`function` as one CUDA graph; a call copies ids in and replays."""
    static = [t.clone() for t in ids]
    function(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(static)

    def run(new: list[Tensor]) -> None:
        for target, source in zip(static, new, strict=True):
            target.copy_(source)
        graph.replay()

    return run


def dynamicemb(to: Results, *, rows: int, lookups: int, pool: int, device: str, graph: bool = True) -> None:
    """10 tables, 1,048,570 lookups, about 350 k unique, D = 128 fp32, Adam, unpooled, all ids present.

    Training three times: as a step runs it, gradients summed and rows updated by one kernel; by two; and by two with
    sums in any order. Before timing, their rows after one step are held against each other, and pooled rows against
    the table's.
    """
    t, state = make(NUM_TABLES, DIM, NUM_TABLES * rows, slots=2, device=device)
    fill(t, state, NUM_TABLES, 0, rows)
    optimizer, due = sparse_adam(1e-3), torch.tensor(True, device=device)
    scale = torch.ones((), device=device)
    grads = [torch.randn(lookups, NUM_TABLES, DIM, device=device)]
    fused_ = optimizer.fused_for(t.columns)
    assert fused_ is not None

    def features(ids: list[Tensor]) -> dict[str, Ragged]:
        return {f"t{i}": lists_of_one(x) for i, x in enumerate(ids)}

    def forward(ids: list[Tensor]) -> Found:
        _, found = t.insert_(state, features(ids))
        t.pool(state, found)
        return found

    def fused(ids: list[Tensor]) -> None:
        fused_(state, t.occurrences(forward(ids), grads), scale, due)

    def in_two(sum_row_grads: Callable[..., None]) -> Callable[[list[Tensor]], None]:
        def train(ids: list[Tensor]) -> None:
            sum_row_grads(state.grads, *t.occurrences(forward(ids), grads))
            optimizer.apply_(state, scale, due, t.columns)

        return train

    def evaluate(ids: list[Tensor]) -> None:
        t.pool(state, t.find(state, features(ids)))

    def draw() -> list[Tensor]:
        some = torch.randperm(rows, device=device)[:pool]
        return [some[torch.randint(0, pool, (lookups,), device=device)] for _ in range(NUM_TABLES)]

    numbers = [draw() for _ in range(8)]
    batches = [[ids_of(number) for number in drawn] for drawn in numbers]
    unique = sum(len(x.unique()) for x in batches[0])
    num, row = NUM_TABLES * lookups, 4 * DIM
    forwards = num * (32 + 124) + num * 2 * row
    updates = num * row + unique * 6 * row
    row_of = torch.stack(numbers[0], dim=1) * NUM_TABLES + torch.arange(NUM_TABLES, device=device)
    (pooled,) = t.pool(state, t.find(state, features(batches[0])))
    if not torch.equal(pooled, state.rows[row_of, 0]):
        raise ValueError("evaluation: got other rows than the table's.")
    to.note("evaluation: checked before timing, pooled rows are the table's.")
    touched = row_of.unique()
    before, seen, number, after = state.rows[touched].clone(), state.seen[touched], state.step.clone(), {}
    ways = {"in one kernel": fused, "in two": in_two(add_row_grads_), "in any order": in_two(add_row_grads_atomic_)}
    for way, train in ways.items():
        state.rows[touched], state.seen[touched] = before, seen  # the same step again
        state.step.copy_(number)
        train(batches[0])
        after[way] = state.rows[touched].clone()
        to.same_rows(f"training {way}", after[way], after["in one kernel"], before)
    del before, after
    wrap = replaying if graph else lambda function, _: function
    name = f"{NUM_TABLES} tables, {num:,} lookups, {unique:,} unique, D = {DIM}"
    for how, train, moved in zip(
        ("forward, backward, Adam", "the same, sums written and read", "the same, sums in any order"),
        ways.values(),
        (num * 96 + updates, num * 96 + updates + unique * 4 * row, updates + unique * 4 * row),
        strict=True,
    ):
        target = "H200: 0.95 ms" if train is fused else ""
        to.add(f"{name}: {how}", times_ms(wrap(train, batches[0]), batches), num_bytes=forwards + moved,
            target=target)  # fmt: skip
    ms = times_ms(wrap(evaluate, batches[0]), batches)
    to.add(f"{name}: evaluation", ms, num_bytes=num * (32 + 80 + 2 * row), target="H200: 0.35 ms")


def look_ups(to: Results, *, num_slots: int, keys: int, device: str) -> None:
    """find and find_or_insert of ids that are there, and of new ones."""
    t, state = make(1, 1, num_slots // 8 * 7, slots=0, device=device)
    assert int(state.num_slots) == num_slots
    cell = torch.arange(keys, dtype=torch.int32, device=device)
    vocabulary = torch.zeros(1, dtype=torch.int32, device=device)
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
            t.insert_(state, {"t0": lists_of_one(ids)})
            end_step(state)

        say = f"load {load}, {num_slots:,} slots, {keys:,} keys: "
        if not (torch.equal(look(present[0]).long(), rows[0]) and bool((look(new[0]) == UNKNOWN).all())):
            raise ValueError(f"{say}got other rows than ids were given, or rows of ids that have none.")
        to.note(f"{say}checked before timing, every id is found in its row and no new one is.")
        to.add(say + "find", times_ms(look, present), items=keys, unit="keys/s", target="H200: 6 G/s")
        ms = times_ms(insert, present)
        to.add(say + "insert, all present", ms, items=keys, unit="keys/s", target="H200: 3 G/s")
        ms = times_ms(insert, new, repeats=1, warm_up=0)
        to.add(say + "insert, all new", ms, items=keys, unit="keys/s", target="H200: 3 G/s")
        assert int(state.num_rows) == filled
        assert int(state.num_refused) == 0


def main() -> None:
    to, small = results("table")
    sizes = (
        {"rows": 2**14, "lookups": 2**10, "pool": 369}
        if small
        else {"rows": 400_000, "lookups": 104_857, "pool": 36_900}
    )
    with to.attempt("10 tables"):
        dynamicemb(to, **sizes, device="cuda")
    torch.cuda.empty_cache()
    with to.attempt("look-ups"):
        look_ups(to, num_slots=2**20 if small else 2**27, keys=2**14 if small else 2**20, device="cuda")
    to.end()


if __name__ == "__main__":
    main()
