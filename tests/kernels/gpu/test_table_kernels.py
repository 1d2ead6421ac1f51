"""The Triton kernels that find, insert and update rows, against the oracles of the CPU's; run as `cases.py` says."""

import random
from unittest import mock

import pytest
import torch

from recfx.kernels.counters import new_counters
from recfx.kernels.index import count_candidates as cpu_candidates
from recfx.kernels.index import find as cpu_find
from recfx.kernels.index import hashing, rehash
from recfx.kernels.rows import add_row_grads as cpu_add
from recfx.kernels.rows import count_rows as cpu_count
from tests.kernels import test_counting, test_padding
from tests.kernels.gpu.cases import LISTS, on_device, once
from tests.kernels.index import test_find_or_insert
from tests.kernels.rows import (
    test_adamw_rows,
    test_add_row_grads,
    test_clip_row_grads,
    test_initial,
    test_optimizer_rows,
    test_sum_adamw_rows,
)
from tests.reference import (
    EXTREMES,
    MAX_INT64,
    MIN_INT64,
    Stream,
    id_of_hash,
    random_lists,
    reading_of,
    table_plan,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("place")

from recfx.kernels.gpu import launch, occurrences  # noqa: E402
from recfx.kernels.index.gpu import count_candidates, find, find_or_insert  # noqa: E402
from recfx.kernels.index.gpu import rehash as gpu_rehash  # noqa: E402
from recfx.kernels.rows.gpu import add_row_grads, clip_row_grads, count_rows, optimizer_rows, sum_adamw_rows  # noqa: E402
from recfx.kernels.rows.gpu import pool as gpu_pool  # noqa: E402


@pytest.fixture(autouse=True)
def _gpu_kernels(monkeypatch):
    """The table's tests run their kernel "kernel": here it is the GPU's."""
    monkeypatch.setitem(test_find_or_insert.OPS, "kernel", on_device(find_or_insert.find_or_insert_))
    monkeypatch.setitem(test_find_or_insert.FINDS, "kernel", on_device(find.find))


IDS = [*EXTREMES, *range(60)]


@pytest.mark.parametrize("seed", range(6))
def test_table_is_the_dict(seed):
    """Batches of several blocks, full of duplicates; steps over several batches; a table or a step that gets full;
    every second time with freed rows and ids that are not admitted."""
    rng = random.Random(seed)
    batches = [random_lists(rng, lookups=3, samples=samples, longest=3, ids=IDS) for samples in (60, 0, 1, 45)]
    stream = Stream([0, 1, 0], batches, seed * 40)
    ends = [rng.random() < 0.5 for _ in batches]
    max_rows, max_unique = [(300, None), (20, 10), (300, 25)][seed % 3]
    test_find_or_insert.check(stream, ends, max_rows, max_unique, rng if seed % 2 else None)


def test_keys_of_one_home_slot_are_told_apart_and_none_is_lost():
    test_find_or_insert.test_ids_of_one_tag_and_one_home_slot_are_told_apart()


def test_full_index_refuses_and_leaves_no_trace():
    test_find_or_insert.test_index_refuses_rows_beyond_seven_eighths()
    test_find_or_insert.test_refused_ids_leave_no_trace_and_are_taken_after_growth()


@pytest.mark.parametrize("init", test_initial.INITS, ids=str)
def test_new_rows_start_as_on_a_cpu_whatever_the_memory_held(init):
    plan = test_initial.one_column_plan(init)
    expected = test_initial.inserted(plan, list(EXTREMES))
    keys, params = test_initial.initializer_tensors(plan, 7)
    state = test_initial.table(plan, optimizer_slots=2, seed=7, limits=test_initial.Limits(max_rows=16)).init()
    state.rows.fill_(9.0)
    reading = reading_of([[[i] for i in EXTREMES]], [0])
    test_find_or_insert.insert(test_find_or_insert.OPS["kernel"], state, reading, (keys, params))
    num = len(EXTREMES)
    torch.testing.assert_close(state.rows[:num, 0], expected, rtol=2e-6, atol=1e-7)
    assert not state.rows[:num, 1:].any()
    assert (state.rows[num:] == 9.0).all()


@pytest.mark.parametrize("same_home", [False, True])
def test_rehash_places_every_row_but_the_freed(same_home):
    ids = torch.tensor([id_of_hash(k << 32 | 9, 0) if same_home else k - 150 for k in range(300)])
    if not same_home:
        ids[:2] = torch.tensor([MIN_INT64, MAX_INT64])
    vocabularies = torch.where(torch.arange(300) % 3 == 0, -1, 0).int()
    live = torch.nonzero(vocabularies == 0)[:, 0]
    slots, crowded = torch.full((600,), 7), torch.tensor(-5)
    salt = 0 if same_home else -3
    on_device(gpu_rehash.rehash_)(slots, crowded, ids, vocabularies, 300, 512, salt)
    assert (slots[512:] == 7).all()
    assert torch.equal((slots[:512][slots[:512] != hashing.EMPTY] & 0xFFFFFFFF).sort().values, live)
    found = cpu_find.find(slots, ids, new_counters(num_slots=512, salt=salt), *reading_of([[ids.tolist()]], [0]))
    assert torch.equal(found[live], live.int())
    assert int(crowded) == len(live) - hashing.RUN if same_home else int(crowded) <= 3


def test_rehash_of_no_rows_empties():
    slots, crowded = torch.full((16,), 7), torch.tensor(3)
    on_device(gpu_rehash.rehash_)(slots, crowded, torch.zeros(4, dtype=torch.int64), torch.zeros(4).int(), 0, 8, 0)
    assert slots.tolist() == [-1] * 8 + [7] * 8
    assert int(crowded) == 0
    assert rehash.rehash_ is not gpu_rehash.rehash_


def ordered_by_torch(by_torch):
    """Occurrences are sorted by torch, as those of a large batch are, or merged, as those of a small one."""
    return mock.patch.object(occurrences, "MERGED", 0 if by_torch else occurrences.MERGED)


NUMBERS = {
    "none": [],
    "padding": [-1] * 40,
    "one": [3],
    "one row": [0] * 1100,
    "a full block": [k % 50 for k in range(occurrences.POSITIONS)],
    "full blocks": [(7 * k) % 13 for k in range(2 * occurrences.POSITIONS)],
    "gaps": [1029, -1, 3, 900, 3, -1],
    "a gap between blocks": [1029] * 1050 + [2, 2],
    "many": random.Random(0).choices(range(-1, 700), k=1300),
}


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
def test_occurrences_are_in_the_order_of_a_stable_sort(merged, numbers):
    """With the places of each number, of which some do not occur."""
    number_P, weight_P = torch.tensor(numbers, dtype=torch.int32), torch.randn(len(numbers))
    cell_P = torch.where(number_P < 0, -1, torch.arange(len(numbers), dtype=torch.int32))
    with ordered_by_torch(not merged):
        number_N, cell_N, weight_N, begins, last = on_device(occurrences.in_order)(number_P, cell_P, weight_P, 1030)
    order = torch.sort(number_P, stable=True).indices[(number_P < 0).sum() :]
    assert int(last) == max(numbers, default=-1)
    counts = torch.bincount(number_P[order], minlength=int(last) + 1)
    begin = int(begins[0])
    end = begin + len(order)
    assert torch.equal(begins[1 : int(last) + 2], begin + counts.cumsum(0))
    assert torch.equal(number_N[begin:end], number_P[order])
    assert torch.equal(cell_N[begin:end], cell_P[order])
    assert torch.equal(weight_N[begin:end], weight_P[order])
    assert (number_N[:begin] < 0).all()


@pytest.mark.parametrize("op", ["add_row_grads_", "add_row_grads_atomic_"])
@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_rows_are_the_cpu_s(op, lists, weighted):
    grads, inverse_P, reading, firsts, dims, blocks = test_add_row_grads.case(lists, [0, 1, 0], (8, 1), 3)
    weight_P = torch.randn(inverse_P.numel()) if weighted else None
    a, b = grads.clone(), grads.clone()
    rest = inverse_P, reading.cell, list(firsts), list(dims), blocks, weight_P
    on_device(getattr(add_row_grads, op))(a, *rest)
    cpu_add.add_row_grads_(b, *rest)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num", [1, 31, 32, 33, 64, 65, 200])
def test_gradients_of_a_frequent_row_are_summed_in_chunks(num):
    """Beside a row with few occurrences, which is summed in order to the last bit, and after gradients of before."""
    inverse_P = torch.tensor([1, 0, -1] * 5 + [2] * num + [0, 1], dtype=torch.int32)
    cell_P = torch.arange(len(inverse_P), dtype=torch.int32)
    block = torch.randn(len(inverse_P), 1, 3, generator=torch.Generator().manual_seed(num))
    a, b, c = (torch.ones(4, 3) for _ in range(3))
    for grads, op in ((a, on_device(add_row_grads.add_row_grads_)), (b, cpu_add.add_row_grads_)):
        op(grads, inverse_P, cell_P, [0], [3], [block])
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]])
    assert num > add_row_grads.CHUNK or torch.equal(a, b)
    # The sum is the row's own affair: its bytes do not depend on where its occurrences stand among others.
    alone = inverse_P == 2
    on_device(add_row_grads.add_row_grads_)(c, inverse_P[alone], cell_P[alone], [0], [3], [block])
    assert torch.equal(a[2], c[2])


HOT = {
    "one row holds all": [0] * 300,
    "whole chunks and one more or fewer": [n for n, size in enumerate((31, 32, 33, 64, 65, 1)) for _ in range(size)],
    "rows of none between": [3] * 40 + [9] * 70 + [60] * 2,
    "some of everything": random.Random(1).choices([0, 0, 0, *range(60), -1], k=400),
}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("numbers", HOT.values(), ids=HOT)
def test_sums_of_hot_rows_have_the_same_bytes_however_occurrences_are_ordered(weighted, numbers):
    """And are the definition's; of an occurrence with a unique number and no cell there is no gradient."""
    inverse_P, cell_P = torch.tensor(numbers, dtype=torch.int32), torch.randperm(len(numbers), dtype=torch.int32)
    inverse_P = inverse_P[cell_P.long()]  # chunks begin anywhere
    if weighted:
        cell_P[::7] = -1
    weight_P = torch.randn(len(numbers)) if weighted else None
    of_ids = cell_P, [0, 3], [3, 1], [torch.randn(len(numbers), 1, dim) for dim in (3, 1)], weight_P
    rows, _, counters, unique_rows = test_adamw_rows.case(4, max(numbers) + 1, num_rows=70)
    # Torch sorts by number alone: what has no cell has no number here, for rows to begin at the same places.
    numbers_P, sums, updated = torch.where(cell_P < 0, -1, inverse_P), [], []
    for by_torch in (False, True):
        sums.append(torch.zeros(80, 4)), updated.append(rows.clone())
        of_rows = counters.clone(), unique_rows, test_adamw_rows.HYPER
        with ordered_by_torch(by_torch):
            on_device(add_row_grads.add_row_grads_)(sums[-1], inverse_P, *of_ids)
            on_device(sum_adamw_rows.sum_adamw_rows_)(updated[-1], *of_rows, numbers_P, *of_ids)
        assert torch.equal(of_rows[0], new_counters(step=1))
    expected = torch.zeros(80, 4)
    cpu_add.definition(expected, inverse_P, *of_ids)
    for sum_of_rows in sums:
        torch.testing.assert_close(sum_of_rows, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(*updated)
    assert weighted or torch.equal(*sums)
    after, *_ = test_adamw_rows.call(test_adamw_rows.OPS["definition"], rows, expected, counters, unique_rows)
    torch.testing.assert_close(updated[0], after, rtol=1e-4, atol=1e-4)


def laid_out(layout, samples, lookups, dim):
    if layout == "expanded over lookups":
        return torch.randn(samples, 1, dim).expand(-1, lookups, -1)
    if layout == "expanded over samples":
        return torch.randn(1, lookups, dim).expand(samples, -1, -1)
    if layout == "a slice":
        return torch.randn(samples, lookups, dim + 4)[:, :, 4:]
    if layout == "lookups first":
        return torch.randn(lookups, samples, dim).transpose(0, 1)
    return torch.randn(dim, samples, lookups).permute(1, 2, 0)


LAYOUTS = "expanded over lookups", "expanded over samples", "a slice", "lookups first", "floats last"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [(8, 1), (5,), (1, 16)], ids=str)
def test_gradients_are_read_where_they_are(layout, dims):
    """As from contiguous blocks, which are next to others that are not. A chunk's tree of sums follows the compiler's
    layout, so only rows of few occurrences have the same bytes."""
    samples, lookups = 9, 13
    cell_P = torch.randperm(samples * lookups, dtype=torch.int32)
    inverse_P = torch.tensor(random.Random(0).choices([-1, 0, 0, 0, 1, 1, 2, 7], k=len(cell_P)), dtype=torch.int32)
    blocks = [laid_out(layout, samples, lookups, dims[0]), *(torch.randn(samples, lookups, dim) for dim in dims[1:])]
    of_ids = cell_P, [0, dims[0]][: len(dims)], list(dims)
    rows, _, counters, unique_rows = test_adamw_rows.case(sum(dims), 8)
    results = []
    for read in (blocks, [block.contiguous() for block in blocks]):
        exact, atomic, updated = torch.zeros(8, sum(dims)), torch.zeros(8, sum(dims)), rows.clone()
        on_device(add_row_grads.add_row_grads_)(exact, inverse_P, *of_ids, read)
        on_device(add_row_grads.add_row_grads_atomic_)(atomic, inverse_P, *of_ids, read)
        of_rows = counters.clone(), unique_rows, test_adamw_rows.HYPER
        on_device(sum_adamw_rows.sum_adamw_rows_)(updated, *of_rows, inverse_P, *of_ids, read)
        results.append((exact, updated))
        torch.testing.assert_close(atomic, exact, rtol=1e-4, atol=1e-4)
    few = torch.bincount(inverse_P[inverse_P >= 0].long(), minlength=8) <= add_row_grads.CHUNK
    assert 2 <= few.sum() < 8
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0][0][few], results[1][0][few])
    assert torch.equal(results[0][1][unique_rows[:8][few].long()], results[1][1][unique_rows[:8][few].long()])
    expected = torch.zeros(8, sum(dims))
    cpu_add.definition(expected, inverse_P, *of_ids, blocks)
    torch.testing.assert_close(results[0][0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_unique", [0, 1, 40])
@pytest.mark.parametrize("due", [True, False])
def test_adamw_is_the_cpu_s(num_unique, due):
    arguments = test_adamw_rows.case(9, num_unique)
    kernels = on_device(optimizer_rows.adamw_rows_), test_adamw_rows.OPS["kernel"]
    a, b = (test_adamw_rows.call(op, *arguments, due=due) for op in kernels)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("due", [True, False])
def test_the_last_of_many_programs_ends_the_step(due):
    """Whichever it is: each of them reads how many rows there are."""
    arguments = test_adamw_rows.case(300, 40, num_rows=60)  # two rows a program
    kernels = on_device(optimizer_rows.adamw_rows_), test_adamw_rows.OPS["definition"]
    a, b = (test_adamw_rows.call(op, *arguments, due=due) for op in kernels)
    assert torch.equal(a[2], new_counters(step=1) if due else new_counters(num_unique=40))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dims", [(8, 1), (5,)], ids=str)
@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_sum_and_adamw_in_one_are_the_cpu_s(dims, lists, weighted):
    arguments = test_sum_adamw_rows.case(lists, dims, weighted=weighted)
    kernels = on_device(sum_adamw_rows.sum_adamw_rows_), test_sum_adamw_rows.OPS["kernel"]
    (a, counters), (b, _) = (test_sum_adamw_rows.call(op, *arguments) for op in kernels)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(counters, new_counters(step=1))


@pytest.mark.parametrize("num", [1, 32, 33, 65, 200])
def test_sum_and_adamw_in_one_have_the_bytes_of_the_two(num):
    """Rows of few and of many occurrences, and one of none."""
    inverse_P = torch.tensor([1, 0, -1] * 5 + [2] * num + [0, 1], dtype=torch.int32)
    cell_P = torch.arange(len(inverse_P), dtype=torch.int32)
    block = torch.randn(len(inverse_P), 1, 3, generator=torch.Generator().manual_seed(num))
    rows, grads, counters, unique_rows = test_adamw_rows.case(3, 4)
    of_ids, fused, hyper = (inverse_P, cell_P, [0], [3], [block]), rows.clone(), test_adamw_rows.HYPER
    on_device(sum_adamw_rows.sum_adamw_rows_)(fused, counters.clone(), unique_rows, hyper, *of_ids)
    on_device(add_row_grads.add_row_grads_)(grads.zero_(), *of_ids)
    on_device(optimizer_rows.adamw_rows_)(rows, grads, counters, unique_rows, hyper, torch.tensor(True))
    assert torch.equal(fused, rows)


@once
def test_rows_behind_two_to_the_31_floats():
    """Offsets in a table of 2**26 rows do not fit 32 bits: rows are created there, pooled, and updated both ways."""
    last = 2**26 + 90
    state = test_initial.table(
        table_plan([0], (8, 1)), optimizer_slots=2, seed=1, limits=test_initial.Limits(max_rows=last)
    ).init()
    assert state.rows.stride(0) * last > 2**31
    state.num_rows.fill_(last), state.num_free.fill_(last - 9)
    state.free_rows[last - 11 : last - 9] = torch.tensor([last - 2, last - 3])
    reading, keys = reading_of([[[5], [7], [5]]], [0]), test_initial.initializer_tensors(table_plan([0], (8, 1)), 1)
    found = test_find_or_insert.insert(find_or_insert.find_or_insert_, state, reading, keys)
    assert found == ([last - 3, last - 2, last - 3], [0, 1, 0])
    row_P, inverse_P = (torch.tensor(numbers, dtype=torch.int32) for numbers in found)
    before = state.rows[last - 3 :].clone()
    assert before[:2, 0].any(dim=1).all()
    pooled = gpu_pool.pool(state.rows, row_P, *reading, 3, *keys, [0, 8], [8, 1])
    assert torch.equal(torch.cat(pooled, dim=2)[:, 0], before[[0, 1, 0], 0])
    blocks, hyper, due = [torch.ones(3, 1, 8), torch.ones(3, 1, 1)], test_adamw_rows.HYPER, torch.tensor(True)
    of_ids = inverse_P, reading.cell, [0, 8], [8, 1], blocks
    sum_adamw_rows.sum_adamw_rows_(state.rows, state.counters, state.unique_rows, hyper, *of_ids)
    optimizer_rows.adamw_rows_(state.rows, torch.ones(2, 9), new_counters(num_unique=2), state.unique_rows, hyper, due)
    assert (state.rows[last - 3 : last - 1] != before[:2]).all()
    assert torch.equal(state.rows[last - 1], before[2])


@pytest.mark.parametrize("name", test_optimizer_rows.KERNELS)
@pytest.mark.parametrize("by_column", [False, True])
def test_row_optimizers_are_their_definitions(name, by_column):
    a = test_optimizer_rows.case(name, (3, 4, 2), 9, by_column=by_column)
    b = [t.clone() if isinstance(t, torch.Tensor) else t for t in a]
    on_device(getattr(optimizer_rows, f"{name}_"))(*a)
    getattr(test_optimizer_rows.optimizer_rows, name).definition(*b)
    for x, y in zip(a[:3], b[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", test_optimizer_rows.KERNELS)
@pytest.mark.parametrize("grad_stride", [9, 16])
def test_row_optimizers_of_rows_that_lie_apart(place, name, grad_stride):
    """Which threads read a gradient and which clear it follows from the strides."""
    a = test_optimizer_rows.case(name, (8, 1), 40, num_rows=60, by_column=False)
    b = [t.clone() if isinstance(t, torch.Tensor) else t for t in a]
    getattr(test_optimizer_rows.optimizer_rows, name).definition(*b)
    rows, grads = (spread(t, stride, place)[0] for t, stride in zip(a[:2], (32, grad_stride), strict=True))
    rest = [t.to(place) if isinstance(t, torch.Tensor) else t for t in a[2:]]
    getattr(optimizer_rows, f"{name}_")(rows, grads, *rest)
    for x, y in zip((rows, grads, rest[0]), b[:3], strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("limit", "max_norm"), [(0.1, 1.0), (float("inf"), 0.1)])
def test_clipping_is_the_definition(limit, max_norm):
    grads = test_clip_row_grads.grads_of(9)
    kernels = on_device(clip_row_grads.clip_row_grads_), test_clip_row_grads.OPS["definition"]
    a, b = (test_clip_row_grads.clip(op, grads, 7, limit=limit, max_norm=max_norm) for op in kernels)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    norm = on_device(clip_row_grads.squared_norm)(grads, new_counters(num_unique=7))
    torch.testing.assert_close(norm, grads[:7].double().square().sum())


def spread(t, stride, device):
    """`t` as rows that lie `stride` floats apart, NaN between and behind them: (view, its memory)."""
    memory = torch.full((len(t) + 1, stride), float("nan"), device=device)
    view = memory[: len(t), : t[0].numel()].unflatten(1, t.shape[1:])
    return view.copy_(t), memory


@pytest.mark.parametrize("num_unique", [0, 7, 40])
@pytest.mark.parametrize(("row_stride", "grad_stride"), [(27, 9), (28, 9), (27, 12), (28, 12), (32, 16), (64, 10)])
def test_only_what_is_the_row_s_own_is_touched_whatever_lies_between_rows(place, num_unique, row_stride, grad_stride):
    """Widths that are no multiple of 4 are read up to the next one where that is theirs; never written but to 0."""
    rows, grads, counters, unique_rows = test_adamw_rows.case(9, num_unique)
    expected = test_adamw_rows.call(test_adamw_rows.OPS["definition"], rows, grads, counters, unique_rows)
    clipped, scale, due = grads.clone(), torch.tensor(0.5), torch.tensor(True)
    test_clip_row_grads.OPS["definition"](clipped, counters, scale, due, [8, 1], 0.3, 0.4)
    (a, a_memory), (b, b_memory) = spread(rows, row_stride, place), spread(grads, grad_stride, place)
    c, c_memory = spread(grads, grad_stride, place)
    counters, unique_rows, scale, due = (t.to(a.device) for t in (counters, unique_rows, scale, due))
    norm = clip_row_grads.squared_norm(c, counters)
    torch.testing.assert_close(norm.cpu(), grads[:num_unique].double().square().sum())
    clip_row_grads.clip_row_grads_(c, counters, scale, due, [8, 1], 0.3, 0.4)
    torch.testing.assert_close(c.cpu(), clipped, rtol=1e-5, atol=1e-7)
    optimizer_rows.adamw_rows_(a, b, counters, unique_rows, test_adamw_rows.HYPER.to(a.device), due)
    torch.testing.assert_close(a.cpu(), expected[0], rtol=1e-6, atol=1e-7)
    assert torch.equal(b.cpu(), expected[1])
    for memory, width, covered in ((a_memory, 27, 0), (b_memory, 9, num_unique), (c_memory, 9, 0)):
        between = memory.cpu()[:-1, width:]
        assert between[covered:].isnan().all()
        assert (between[:covered, :3].isnan() | (between[:covered, :3] == 0)).all()
        assert between[:covered, 3:].isnan().all()
        assert memory[-1].isnan().all()


def test_cover_is_the_next_multiple_of_4_where_every_row_owns_it():
    assert [launch.cover_of(9, *strides) for strides in ((12,), (16, 32), (12, 9), (9,), (11,), (8,), (10,))] == [
        12, 12, 9, 9, 9, 9, 9,
    ]  # fmt: skip
    assert [launch.cover_of(width, 16) for width in (1, 4, 13, 16)] == [4, 4, 16, 16]


@pytest.mark.parametrize("num", [0, 1, 300])
@pytest.mark.parametrize("due", [True, False])
def test_steps_of_touched_rows_are_counted(num, due):
    counts, unique_rows = torch.arange(400, dtype=torch.int32), torch.randperm(400).int()
    expected = counts.clone()
    arguments = new_counters(num_unique=num), unique_rows, torch.tensor(due)
    on_device(count_rows.count_rows_)(counts, *arguments)
    cpu_count.definition(expected, *arguments)
    assert torch.equal(counts, expected)


@pytest.mark.parametrize(
    ("max_candidates", "known", "sizes"), [(1, 0, (60, 9)), (5, 1, (9, 60)), (1000, 2, (9, 1, 60, 0, 50))]
)
def test_candidates_are_counted_as_on_a_cpu(max_candidates, known, sizes):
    """Over batches of several blocks; ids of the `known` first ones have rows; a store that gets full."""
    check_candidates(max_candidates, known, sizes, [0, 1, 0], IDS)


def test_padding_between_ids_changes_nothing():
    modules = find, find_or_insert, count_candidates, gpu_pool, add_row_grads, sum_adamw_rows
    kernels = {name: on_device(getattr(m, name)) for name, m in zip(test_padding.KERNELS, modules, strict=True)}
    test_padding.check(kernels, 1, samples=20, max_rows=12)


def test_candidates_of_one_home_slot_are_told_apart():
    check_candidates(1000, 0, (30, 9), [0, 0, 0], [id_of_hash(k << 32 | 9, 0) for k in range(70)])


def check_candidates(max_candidates, known, sizes, vocabularies, ids):
    rng = random.Random(known)
    batches = [random_lists(rng, lookups=3, samples=n, longest=3, ids=ids) for n in sizes]
    stream = Stream(vocabularies, batches, 100)
    readings, plan = list(stream.readings()), test_counting.table_plan(stream.vocabularies)
    life = test_counting.Life(admit=test_counting.at_least(2), candidates=max_candidates)
    limits = test_counting.Limits(max_rows=256)
    t = test_counting.table(plan, optimizer_slots=2, seed=1, limits=limits, life=None)
    empty, state = test_counting.table(plan, optimizer_slots=2, seed=1, limits=limits, life=life).init(), t.init()
    for lists in batches[:known]:
        t.insert_(state, t.read(test_counting.features_of(lists)))
    of_gpu, of_cpu = (test_counting.with_candidates_of(state, empty) for _ in range(2))
    for reading in readings:
        got = on_device(count_candidates.count_candidates_)(*test_counting.arguments(of_gpu, reading))
        assert torch.equal(got, cpu_candidates.definition(*test_counting.arguments(of_cpu, reading)))
    num = int(of_cpu.num_candidates)
    assert torch.equal(of_gpu.counters, of_cpu.counters)
    for name in ("ids", "vocabularies", "counts"):
        a, b = (getattr(s.candidates, name) for s in (of_gpu, of_cpu))
        assert torch.equal(a[:num], b[:num])
    used = of_gpu.candidates.slots[: int(of_gpu.num_candidate_slots)]
    assert sorted((used[used != hashing.EMPTY] & 0xFFFFFFFF).tolist()) == list(range(num))
