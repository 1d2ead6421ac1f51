"""How often the table's kernels go to memory, and from how many programs: what costs time, counted without a GPU."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from recfx.kernels import op
from recfx.kernels.index import count_candidates as cpu_candidates
from recfx.kernels.index import rehash
from recfx.kernels.op import gpu_function
from recfx.table import Limits, initializer_tensors, table
from recfx.table.policies import Life, at_least
from tests.kernels.index.test_find_or_insert import arguments
from tests.reference import Reading, table_plan

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402  behind importorskip
from triton.runtime.jit import JITFunction  # noqa: E402

from recfx.kernels.gpu import launch  # noqa: E402
from recfx.kernels.gpu.scan import add_up, num_counters, sum_before, sum_of_all, sums_of  # noqa: E402
from recfx.kernels.index.gpu import count_candidates, find, find_or_insert  # noqa: E402
from tests.machine.machine import running  # noqa: E402

bench = importlib.import_module("bench.triton_sm90")
KERNELS = Path(op.__file__).parent
SLOTS, NEW = 2**14, 512


def random_ids(num, seed):
    return torch.randint(-(2**63), 2**63 - 1, (num,), generator=torch.Generator().manual_seed(seed))


def reading(ids):
    return Reading(ids, torch.arange(len(ids), dtype=torch.int32), torch.zeros(1, dtype=torch.int32))


def inserted(ids, *, old=0, resident=12):
    """The report of inserting ids[old:] into a table of ids[:old], and the table."""
    state = table(table_plan([0]), optimizer_slots=0, seed=1, limits=Limits(max_rows=SLOTS, max_unique=SLOTS)).init()
    state.ids[:old], state.vocabularies[:old] = ids[:old], 0
    state.num_rows.fill_(old), state.num_slots.fill_(SLOTS)
    rehash.rehash_(state.slots, state.num_crowded, state.ids, state.vocabularies, old, SLOTS, int(state.salt))
    init = initializer_tensors(table_plan([0]), 1)
    with running(seed=1, mode="warps", resident=resident) as report:
        find_or_insert.find_or_insert_(*arguments(state, reading(ids[old:]), init))
    assert int(state.num_rows) == len(torch.unique(ids))
    return report.kernels


@pytest.mark.parametrize(("load", "most"), [(0.5, 4), (0.75, 6), (0.84, 10)])
def test_new_keys_swap_where_they_have_found_a_place(load, most):
    """It was 15, 55 and 146 swaps a new key: every lane swapped its way through, as long as one had not arrived."""
    old = int(SLOTS * load)
    kernels = inserted(random_ids(old + NEW, 0), old=old)
    assert NEW <= kernels["store_new"].atomics < most * NEW


@pytest.mark.parametrize(("load", "most"), [(0.5, 400), (0.75, 650), (0.875, 1500)])
def test_a_warp_that_probes_has_few_instructions_and_room(load, most):
    """It was 727, 1712 and 4378 instructions a key: a warp of 128 keys waited for the longest way among them, and the
    slots of a group were in four threads. 32 programs are as many as a multiprocessor holds of any."""
    ids, salt = random_ids(int(SLOTS * load), 0), torch.tensor(5)
    num = torch.tensor(SLOTS)
    slots, vocabularies = torch.full((SLOTS,), -1), torch.zeros(len(ids), dtype=torch.int32)
    rehash.rehash_(slots, torch.tensor(0), ids, vocabularies, len(ids), SLOTS, int(salt))
    asked = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))[:2048]
    cell = torch.arange(len(asked), dtype=torch.int32)
    with running(seed=1, mode="warps", resident=12) as report:
        row = find.find(slots, ids, num, salt, ids[asked], cell, vocabularies[:1])
    assert torch.equal(row.long(), asked)
    counts = report.kernels["find_rows"]
    assert counts.executed < most * len(asked)
    assert counts.accesses == counts.global_accesses
    with bench.compiling() as compiled:
        for (module, op), arguments in bench.calls((8, 1)).items():
            if module in ("find", "rehash", "find_or_insert", "count_candidates"):
                gpu_function(op)(*arguments)
    for name in ("find_rows", "look_up", "leave_out", "find_candidates", "store_counts", "place_rows"):
        registers = bench.assembled(compiled[name].asm["ptx"])["registers"]
        assert launch.held_at_once(registers, compiled[name].metadata.num_warps) == launch.MOST_AT_ONCE, name


def test_lanes_without_work_do_not_queue_at_a_frequent_id():
    """It was two atomics on one address for each of its occurrences, those of idle lanes among them."""
    num = 4096
    hot = torch.rand(num, generator=torch.Generator().manual_seed(0)) < 0.3
    kernels = inserted(torch.where(hot, 7, random_ids(num, 1) % 800))
    assert kernels["claim"].hottest < int(hot.sum()) / 2


def test_lanes_without_a_new_candidate_do_not_queue():
    """It was nearly one atomic on one address for each id that was no new candidate."""
    life = Life(admit=at_least(2), candidates=2048)
    states = [
        table(table_plan([0]), optimizer_slots=0, seed=1, limits=Limits(max_rows=64), life=life).init()
        for _ in range(2)
    ]
    ids = torch.cat([random_ids(400, 2), torch.arange(50).repeat(20)])[torch.randperm(1400)]
    index = states[0].slots, states[0].ids, states[0].num_slots, states[0].salt
    with running(seed=1, mode="warps", resident=12) as report:
        count_P = count_candidates.count_candidates_(*states[0].candidates, *index, *reading(ids))
    assert torch.equal(count_P, cpu_candidates.definition(*states[1].candidates, *index, *reading(ids)))
    assert report.kernels["store_counts"].hottest < 50


def test_one_function_swaps_for_all_kernels():
    """`swap_where` says where lanes without work go."""
    sources = {p.name: p.read_text() for p in KERNELS.rglob("gpu/*.py")}
    assert {name: len(re.findall(r"tl\.atomic_cas\(", s)) for name, s in sources.items() if "tl.atomic_cas(" in s} == {
        "hashing.py": 1
    }


@triton.jit
def add_up_all(sums, counters, items, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    add_up(sums, counters, tl.sum(tl.load(items + k), axis=0))


@triton.jit
def read_back(before, all, sums, num_programs, BLOCK: tl.constexpr):
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = sum_before(sums, num_programs, p, p < num_programs)
    tl.store(before + p, value, mask=p < num_programs)
    if tl.program_id(0) == 0:
        tl.store(all, sum_of_all(sums, num_programs))


@pytest.mark.parametrize("mode", ["threads", "programs"])
@pytest.mark.parametrize("num_programs", [1, 2, 127, 128, 129, 300, 128 * 128 + 1])
def test_sums_of_programs_are_exact_whoever_is_last(num_programs, mode):
    items = torch.randint(-(2**40), 2**40, (num_programs, 32), generator=torch.Generator().manual_seed(0))
    sums, counters = sums_of(items, num_programs).fill_(77), torch.full((num_counters(num_programs),), -1).int()
    before, everything = torch.empty(num_programs, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    with running(seed=num_programs, mode=mode, resident=12) as report:
        add_up_all[(num_programs,)](sums, counters, items, BLOCK=32, num_warps=1)
        read_back[(triton.cdiv(num_programs, 128),)](before, everything, sums, num_programs, BLOCK=128, num_warps=1)
    expected = items.sum(1).cumsum(0)
    assert torch.equal(before, expected - items.sum(1))
    assert int(everything) == int(expected[-1])
    assert not report.races


def test_programs_that_walk_are_as_many_as_there_is_work():
    assert launch.programs(0, 8) == (1,)
    assert launch.programs(17, 8) == (3,)
    assert launch.programs(10**9, 8, 7) == (7 * launch.MULTIPROCESSORS,)


WALK = {
    "find_or_insert", "count_rows", "sum_adamw_rows", "add_row_grads", "clip_row_grads", "optimizer_rows",
}  # fmt: skip
FORMULAS = "sgd", "adagrad", "rowwise_adagrad", "adamw", "adamw_by_column", "ftrl"
WALKING = {"store_new", "count_touched", "sum_chunks", "add_rows", "sum_adamw", "clip_rows", "sum_squares"} | {
    f"update_rows/{name}" for name in FORMULAS
}
WIDTHS = [(8, 1), (16,)]
OTHER_WIDTHS = [(1,), (4,), (5,), (8,), (64,), (100,), (128,), (255,), (256,), (300,), (512,), (1024,), (16, 16, 1)]


def walking_launches(dims, monkeypatch):
    """Compiled kernels and programs of the launches that walk, over more rows than are held at once."""
    rows = 2**20 if sum(dims) < 64 else 2**17
    grids, positions = {}, 2**17
    with bench.compiling() as compiled, monkeypatch.context() as patched:
        compile_only = JITFunction.run

        def noted(self, *args, grid, **kwargs):
            grids[compile_only(self, *args, grid=grid, **kwargs)] = grid[0]

        patched.setattr(JITFunction, "run", noted)
        for (module, op), arguments in bench.calls(dims, (positions, 64, 16, rows, 2**15)).items():
            if module in WALK:
                gpu_function(op)(*arguments)
    return {name: (kernel, grids[kernel]) for name, kernel in compiled.items() if name in WALKING}


@pytest.mark.parametrize("dims", [*WIDTHS, *(pytest.param(d, marks=pytest.mark.slow) for d in OTHER_WIDTHS)])
def test_no_more_programs_walk_than_fit_on_the_device(dims, monkeypatch):
    """2048 where 924 fit took three turns for 2.2 turns of work: so it was of AdamW at widths 4 to 12, and 100."""
    launches = walking_launches(dims, monkeypatch)
    assert launches.keys() == WALKING
    for name, (kernel, grid) in launches.items():
        registers = bench.assembled(kernel.asm["ptx"])["registers"]
        held = launch.held_at_once(registers, kernel.metadata.num_warps)
        assert grid <= held * launch.MULTIPROCESSORS, (name, registers, grid)


def test_walking_kernels_are_those_that_say_so():
    """A kernel that walks on by the number of programs is in WALKING."""
    sources = [p.read_text() for p in KERNELS.rglob("gpu/*.py")]
    kernels = {name for s in sources for name, body in re.findall(r"\ndef (\w+)\((.*?)(?=\n\n\n|\Z)", s, re.DOTALL)
               if re.search(r"range\(.*num_programs", body)}  # fmt: skip
    # The first two are of store_new; a program of order_cells writes what comes after all lists.
    assert kernels == {"insert", "initialise", "order_cells"} | {n.split("/")[0] for n in WALKING - {"store_new"}}
