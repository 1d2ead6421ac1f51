"""dynamicemb's published case on a GPU: the table's operators as one CUDA graph, ids uniform and by a power law.

`python -m bench.gpu_dynamicemb [--small]`; small: sizes for a first look, printed and not saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu_draws import ALPHA, Draw, power_law, uniform
from bench.gpu_profile import add_kernels, kernels_of
from bench.gpu_table import fill, ids_of, lists_of_one, make
from bench.gpu_timing import DEVICE, Results, graph_of, results, times_ms
from recfx.kernels.rows.adamw_rows import adamw_rows_
from recfx.kernels.rows.add_row_grads import add_row_grads_, add_row_grads_atomic_
from recfx.kernels.rows.sum_adamw_rows import sum_adamw_rows_
from recfx.optim import sparse_adam
from recfx.table import Found, Table, TableState
from recfx.types import Ragged

NUM_TABLES, DIM, NUM_BATCHES = 10, 128, 8
LR, B1, B2, EPS = 1e-3, 0.9, 0.999, 1e-8
SIZES = {"rows": 2_400_000, "lookups": 104_857, "pool": 36_900}
SMALL = {"rows": 2**14, "lookups": 2**10, "pool": 369}
Train = Callable[[list[Tensor]], Any]


class Case(NamedTuple):
    """The tables that are trained. Offsets, gradients and the optimiser's scalars are made once, outside the graph."""

    table: Table
    state: TableState
    offsets: Tensor  # i32 [lookups + 1], of lists of one id
    grads: list[Tensor]  # f32 [lookups, NUM_TABLES, DIM]
    hyper: Tensor  # f64 [8], as `adamw_rows_` takes them, of the step after `first`
    due: Tensor  # bool []
    first: Tensor  # i64 []: the number of steps that filled the tables

    def features(self, ids: list[Tensor]) -> dict[str, Ragged]:
        return {f"t{i}": Ragged(x, self.offsets) for i, x in enumerate(ids)}

    def forward(self, ids: list[Tensor]) -> Found:
        found = self.table.insert_(self.state, self.table.read(self.features(ids)))
        self.table.pool(self.state, found)
        return found

    def fused(self, ids: list[Tensor]) -> None:
        s = self.state
        (of_batch,) = self.table.occurrences(self.forward(ids), self.grads)
        sum_adamw_rows_(s.rows, s.counters, s.unique_rows, self.hyper, *of_batch)

    def in_two(self, sum_row_grads: Callable[..., None]) -> Train:
        def train(ids: list[Tensor]) -> None:
            s = self.state
            sum_row_grads(s.grads, *self.table.occurrences(self.forward(ids), self.grads)[0])
            adamw_rows_(s.rows, s.grads, s.counters, s.unique_rows, self.hyper, self.due)
            s.step.add_(1)

        return train

    def by_optimizer(self, ids: list[Tensor]) -> None:
        """The step of `sparse_adam` with its scalars: the reference for the other ways."""
        fused_ = sparse_adam(LR, b1=B1, b2=B2, eps=EPS).fused_for(self.table.columns)
        assert fused_ is not None
        (occurrences,), one = self.table.occurrences(self.forward(ids), self.grads), torch.ones_like(self.hyper[0])
        fused_(self.state, occurrences, one, self.due)

    def evaluate(self, ids: list[Tensor]) -> list[Tensor]:
        return self.table.pool(self.state, self.table.find(self.state, self.table.read(self.features(ids))))


def hyper_at(step: int) -> list[float]:
    """decay, b1, 1 - b1, b2, 1 - b2, alpha, eps, scale: Adam's scalars of its step number `step`."""
    root = (1 - B2**step) ** 0.5
    return [1.0, B1, 1 - B1, B2, 1 - B2, LR * root / (1 - B1**step), EPS * root, 1.0]


def make_case(*, rows: int, lookups: int, device: str) -> Case:
    """NUM_TABLES tables of `rows` rows, with all ids known."""
    t, state = make(NUM_TABLES, DIM, NUM_TABLES * rows, slots=2, device=device)
    fill(t, state, NUM_TABLES, 0, rows)
    grads = [torch.randn(lookups, NUM_TABLES, DIM, device=device)]
    hyper = torch.tensor(hyper_at(int(state.step) + 1), dtype=torch.float64, device=device)
    offsets = lists_of_one(torch.zeros(lookups, dtype=torch.int64, device=device)).offsets
    return Case(t, state, offsets, grads, hyper, torch.tensor(True, device=device), state.step.clone())


def check(to: Results, case: Case, ways: dict[str, Train], numbers: list[Tensor]) -> None:
    """Checks that one step in each way moves the same rows alike, and that pooled rows are the table's."""
    state, ids = case.state, [ids_of(number) for number in numbers]
    row_of = torch.stack(numbers, dim=1) * NUM_TABLES + torch.arange(NUM_TABLES, device=numbers[0].device)
    (pooled,) = case.evaluate(ids)
    if not torch.equal(pooled, state.rows[row_of, 0]):
        raise ValueError("evaluation: got other rows than the table's.")
    to.note("evaluation: checked before timing, pooled rows are the table's.")
    touched = row_of.unique()
    before, number, expected = state.rows[touched].clone(), state.step.clone(), None
    for way, train in {"by the optimiser": case.by_optimizer, **ways}.items():
        state.rows[touched], state.seen[touched] = before, -1  # the same step again
        state.step.copy_(case.first)
        train(ids)
        after = state.rows[touched].clone()
        if expected is not None:
            to.same_rows(f"training {way}", after, expected, before)
        expected = after if expected is None else expected
    state.rows[touched], state.seen[touched] = before, -1
    state.step.copy_(number)  # no step is repeated


def moved_bytes(num: int, unique: int) -> dict[str, int]:
    """Bytes that each way, and evaluation, move, by count."""
    row = 4 * DIM
    forward = num * (32 + 124) + num * 2 * row
    updates = num * row + unique * 6 * row
    return {
        "in one kernel": forward + num * 96 + updates,
        "in two": forward + num * 96 + updates + unique * 4 * row,
        "in any order": forward + updates + unique * 4 * row,
        "evaluation": num * (32 + 80 + 2 * row),
    }


def run_of(function: Train, ids: list[Tensor], *, graph: bool) -> tuple[Train, Train]:
    """(timed call, call before it): a replay of `function` as one CUDA graph, and the copies of its ids."""
    if not graph:
        return function, lambda new: None
    static = [t.clone() for t in ids]
    recorded = graph_of(lambda: function(static))

    def bring(new: list[Tensor]) -> None:
        for target, source in zip(static, new, strict=True):
            target.copy_(source)

    return lambda new: recorded.replay(), bring


def measure(to: Results, case: Case, how: str, draw: Draw, *, lookups: int, graph: bool) -> None:
    """Training three times: gradients summed and rows updated by one kernel; by two; and by two, sums in any order."""
    numbers = [[draw(lookups) for _ in range(NUM_TABLES)] for _ in range(NUM_BATCHES)]
    trains = case.fused, case.in_two(add_row_grads_), case.in_two(add_row_grads_atomic_)
    ways = dict(zip(("in one kernel", "in two", "in any order"), trains, strict=True))
    check(to, case, ways, numbers[0])
    counts = [x.unique(return_counts=True)[1] for x in numbers[0]]
    unique, hottest, num = sum(map(len, counts)), max(int(c.max()) for c in counts), NUM_TABLES * lookups
    say = f"{how}: {NUM_TABLES} tables, {num:,} lookups, {unique:,} unique, D = {DIM}: "
    to.note(f"{say}the hottest row is looked up {hottest:,} times in a step.")
    batches, moved = [[ids_of(number) for number in drawn] for drawn in numbers], moved_bytes(num, unique)
    for way, function in {**ways, "evaluation": case.evaluate}.items():
        run, bring = run_of(function, batches[0], graph=graph)
        ms = times_ms(run, batches, before=bring)
        target = {"in one kernel": "H200: 0.95 ms", "evaluation": "H200: 0.35 ms"}.get(way, "")
        name = way if way == "evaluation" else f"forward, backward, Adam {way}"
        median = to.add(say + name, ms, num_bytes=moved[way], target=target)
        if way == "in one kernel" and graph:
            add_kernels(to, f"{how}, {way}: ", kernels_of(run, batches), median)


def dynamicemb(to: Results, *, rows: int, lookups: int, pool: int, device: str, graph: bool = True) -> None:
    """Unpooled look-ups of NUM_TABLES tables, fp32, all ids known; `pool`: different rows among uniform draws."""
    case = make_case(rows=rows, lookups=lookups, device=device)
    draws = {
        f"uniform of {pool:,} rows a table": uniform(rows, pool, device=device),
        f"power law {ALPHA} over {rows:,} rows a table": power_law(rows, device=device),
    }
    for how, draw in draws.items():
        with to.attempt(how):
            measure(to, case, how, draw, lookups=lookups, graph=graph)


def main() -> None:
    to, small = results("dynamicemb")
    with to.attempt("tables"):
        dynamicemb(to, **(SMALL if small else SIZES), device=DEVICE)
    to.end()


if __name__ == "__main__":
    main()
