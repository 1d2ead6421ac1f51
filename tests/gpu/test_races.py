"""Races between programs, on a device: `tests/machine` shows them on a CPU in orders that it draws."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from recfx.kernels.index import count_candidates
from recfx.kernels.lists import cross_lists, order_ids, string_hash
from recfx.kernels.rows import add_row_grads, optimizer_rows, sum_adamw_rows
from recfx.table import Limits, Table, TableState, grow_, rebuild_, table
from recfx.table.policies import Life, at_least
from recfx.types import Ragged
from tests.kernels.rows import test_adamw_rows, test_optimizer_rows
from tests.reference import EXTREMES, assert_same_table, id_of_hash, ragged, table_plan
from tests.reference_features import strings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SAMPLES = 20_000
ONE_SLOT = [id_of_hash(k << 32 | 9, 0) for k in range(200)]  # all begin to probe at one slot


def tables(max_rows: int) -> tuple[Table, Table]:
    plans = [dataclasses.replace(table_plan([0, 1, 0]), device=device) for device in ("cpu", "cuda")]
    one, other = (
        table(plan, optimizer_slots=2, seed=1, limits=Limits(max_rows=max_rows, max_unique=max_rows)) for plan in plans
    )
    return one, other


def draw(rng: random.Random, ids: list[int]) -> dict[str, Ragged]:
    """One id per sample and lookup: 60 000 positions over 469 programs."""
    offsets = torch.arange(SAMPLES + 1, dtype=torch.int32)
    return {f"f{l}": Ragged(torch.tensor(rng.choices(ids, k=SAMPLES)), offsets) for l in range(3)}


def on(device: str, tree: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t.to(device), tree)


def end_step(*states: TableState) -> None:
    for state in states:
        state.num_unique.zero_()
        state.step.add_(1)


def check(rng: random.Random, batches: list[list[int]], max_rows: int) -> TableState:
    """The same batches through the CPU's kernel and the GPU's: rows, unique numbers, keys and counters are equal."""
    cpu, gpu = tables(max_rows)
    a, b = cpu.init(), gpu.init()
    for ids in batches:
        features = draw(rng, ids)
        grow_(a, 3 * SAMPLES), grow_(b, 3 * SAMPLES)
        expected = cpu.insert_(a, cpu.read(features))
        got = gpu.insert_(b, gpu.read(on("cuda", features)))
        for name in ("id", "cell", "row", "inverse"):
            assert torch.equal(getattr(expected, name), getattr(got, name).cpu()), name
        assert_same_table(a, on("cpu", b), exact_rows=False)
        assert torch.equal(cpu.find(a, cpu.read(features)).row, gpu.find(b, gpu.read(on("cuda", features))).row.cpu())
        end_step(a, b)
    rebuild_(b)
    assert torch.equal(cpu.find(a, cpu.read(features)).row, gpu.find(b, gpu.read(on("cuda", features))).row.cpu())
    return b


@pytest.mark.parametrize("seed", range(20))
def test_many_ids_at_once(seed):
    rng = random.Random(seed)
    pool = [*EXTREMES, *(rng.getrandbits(64) - 2**63 for _ in range(30_000))]
    check(rng, [pool[:10], pool[:3000], pool], 2**17)


@pytest.mark.parametrize("seed", range(20))
def test_every_id_wants_one_slot(seed):
    rng = random.Random(seed)
    check(rng, [ONE_SLOT[:2], ONE_SLOT, rng.sample(ONE_SLOT, 100)], 4096)


@pytest.mark.parametrize("seed", range(20))
def test_a_table_with_room_for_few_of_them(seed):
    rng = random.Random(seed)
    state = check(rng, [list(range(700)), list(range(500, 5000)), list(range(5000))], 1000)
    assert int(state.num_rows) == 1000
    assert int(state.num_refused) > 0


@pytest.mark.parametrize("ids", [1, 40, 30_000])
def test_sums_of_gradients_have_the_same_bytes_every_time(ids):
    generator = torch.Generator().manual_seed(ids)
    inverse = torch.randint(0, ids, (60_000,), generator=generator, dtype=torch.int32)
    cell = torch.arange(60_000, dtype=torch.int32)
    blocks = [torch.randn(60_000, 1, dim, generator=generator) for dim in (8, 1)]
    expected = torch.zeros(ids, 9)
    add_row_grads.add_row_grads_(expected, inverse, cell, [0, 8], [8, 1], blocks)
    device, sums = on("cuda", [inverse, cell, blocks]), []
    for _ in range(20):
        grads = torch.zeros(ids, 9, device="cuda")
        add_row_grads.add_row_grads_(grads, *device[:2], [0, 8], [8, 1], device[2])
        sums.append(grads.cpu())
    assert all(torch.equal(sums[0], other) for other in sums[1:])
    torch.testing.assert_close(sums[0], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dims", [(8, 1), (128, 4, 1)], ids=str)
def test_sums_and_adamw_in_one_have_the_same_bytes_every_time(dims):
    """Slices of few columns beside a wide one have fewer items than a program has threads."""
    generator = torch.Generator().manual_seed(0)
    inverse = torch.randint(0, 400, (60_000,), generator=generator, dtype=torch.int32) ** 2 // 400
    inverse = torch.unique(inverse, return_inverse=True)[1].int()
    num_unique = int(inverse.max()) + 1
    rows, _, num, unique_rows = test_adamw_rows.case(sum(dims), num_unique, num_rows=500)
    blocks = [torch.randn(60_000, 1, dim, generator=generator) for dim in dims]
    firsts = [sum(dims[:t]) for t in range(len(dims))]
    cell = torch.arange(60_000, dtype=torch.int32)
    of_ids = num, unique_rows, test_adamw_rows.HYPER, inverse, cell, firsts, list(dims), blocks
    results = []
    for device in ("cpu", *["cuda"] * 20):
        mine = rows.to(device, copy=True)
        sum_adamw_rows.sum_adamw_rows_(mine, *on(device, tree_map_only(torch.Tensor, torch.clone, of_ids)))
        results.append(mine.cpu())
    assert all(torch.equal(results[1], other) for other in results[2:])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def spread(t: torch.Tensor, stride: int) -> torch.Tensor:
    """`t` on the device, its rows `stride` floats apart."""
    memory = torch.zeros(len(t), stride, device="cuda")
    return memory[:, : t[0].numel()].unflatten(1, t.shape[1:]).copy_(t)


@pytest.mark.parametrize("name", test_optimizer_rows.KERNELS)
@pytest.mark.parametrize(("row_stride", "grad_stride"), [(32, 9), (32, 16), (27, 9)])
def test_gradients_are_all_read_before_they_are_cleared(name, row_stride, grad_stride):
    """Where rows and gradients are aligned differently, other threads clear a gradient than read it."""
    arguments = test_optimizer_rows.case(name, (8, 1), 20_000, num_rows=30_000)
    kernel = getattr(optimizer_rows, name)
    rows, grads, *_ = test_optimizer_rows.run(kernel.definition, arguments)
    for _ in range(20):
        mine = [spread(arguments[0], row_stride), spread(arguments[1], grad_stride)]
        kernel.op_(*mine, *on("cuda", tree_map_only(torch.Tensor, torch.clone, arguments[2:])))
        torch.testing.assert_close(mine[0].cpu(), rows, rtol=1e-4, atol=1e-5)
        assert torch.equal(mine[1].cpu(), grads)


@pytest.mark.parametrize("seed", range(5))
def test_many_crosses_candidates_and_strings_are_the_cpu_s(seed):
    rng = random.Random(seed)
    pool = [*EXTREMES, *(rng.getrandbits(64) - 2**63 for _ in range(10 ** rng.randint(0, 4)))]
    lists = [[rng.choices(pool, k=rng.randint(0, 6)) for _ in range(SAMPLES)] for _ in range(2)]
    lists[0][7] = rng.choices(pool, k=5000)
    x, y = map(ragged, lists)
    crossed = x.values, x.offsets, None, y.values, y.offsets, None, 400_000
    words = strings([rng.randbytes(rng.choice((0, 3, 8, 20, 70, 200))) for _ in range(SAMPLES)])
    of_column = [words.values], [words.offsets]
    calls = [(cross_lists.cross_lists, crossed), (string_hash.farm_hashes, of_column)]
    for op, arguments in [*calls, (string_hash.murmur_hashes, of_column)]:
        for a, b in zip(op(*arguments), op(*on("cuda", arguments)), strict=True):
            assert torch.equal(a, b.cpu())

    life = Life(admit=at_least(2), candidates=2000)
    state = table(table_plan([0, 1]), optimizer_slots=2, seed=1, limits=Limits(max_rows=64), life=life).init()
    empty = state.slots, state.ids, state.num_slots, state.salt
    vocabularies = torch.tensor([0, 1], dtype=torch.int32)
    stores = [on(device, tree_map_only(torch.Tensor, torch.clone, state.candidates)) for device in ("cpu", "cuda")]
    for sides in ((x, y), (y, x)):
        reading = *order_ids.order_ids([s.values for s in sides], [s.offsets for s in sides]), vocabularies
        a = count_candidates.count_candidates_(*stores[0], *empty, *reading)
        b = count_candidates.count_candidates_(*stores[1], *on("cuda", (*empty, *reading)))
        assert torch.equal(a, b.cpu())
    for name in ("ids", "vocabularies", "counts", "num"):
        assert torch.equal(getattr(stores[0], name), getattr(stores[1], name).cpu())


def test_a_table_on_a_stream_of_its_own():
    main, other = torch.cuda.current_stream(), torch.cuda.Stream()
    other.wait_stream(main)
    with torch.cuda.stream(other):
        check(random.Random(0), [list(range(3000))] * 3, 4096)
    main.wait_stream(other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_table_on_a_device_that_is_not_the_current_one():
    plan = dataclasses.replace(table_plan([0]), device="cuda:1")
    t = table(plan, optimizer_slots=2, seed=1, limits=Limits(max_rows=100))
    features = {"f0": on("cuda:1", ragged([[5, 6], [5]]))}
    state = t.init()
    found = t.insert_(state, t.read(features))
    assert torch.cuda.current_device() == 0
    assert found.row.tolist() == [0, 1, 0]
    assert t.find(state, t.read(features)).row.tolist() == [0, 1, 0]
