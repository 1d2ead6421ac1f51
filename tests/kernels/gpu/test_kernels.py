"""The Triton kernels against the oracles of the CPU's, on CPU tensors under Triton's interpreter or on a GPU.

The interpreter is chosen when triton is imported, so `test_without_gpu.py` runs this file in a process of its own.
"""

import os
import random

import pytest
import torch
from torch.utils._pytree import tree_map_only

from recfx.kernels import add_row_grads as cpu_add
from recfx.kernels import find as cpu_find
from recfx.kernels import hashing, order_lists, pool, rehash
from recfx.kernels.order_ids import order_ids
from tests.kernels import (
    test_adamw_rows,
    test_add_row_grads,
    test_clip_row_grads,
    test_find_or_insert,
    test_initial,
    test_optimizer_rows,
    test_pool,
)
from tests.reference import (
    EXTREMES,
    MAX_INT64,
    MIN_INT64,
    Stream,
    id_of_hash,
    ragged,
    random_lists,
    reading_of,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton")
pytestmark = [] if INTERPRETED else pytest.mark.gpu

from recfx.kernels.gpu import (  # noqa: E402  behind importorskip
    add_row_grads,
    clip_row_grads,
    find,
    find_or_insert,
    optimizer_rows,
)
from recfx.kernels.gpu import order_lists as gpu_order  # noqa: E402
from recfx.kernels.gpu import pool as gpu_pool  # noqa: E402
from recfx.kernels.gpu import rehash as gpu_rehash  # noqa: E402


def on_device(op):
    """`op` on copies of its tensors on the GPU, results and writes brought back; as it is under the interpreter."""
    if INTERPRETED:
        return op

    def call(*args):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        copies = tree_map_only(torch.Tensor, lambda t: t.cuda(), args)
        out = op(*copies)
        for before, after in zip(args, copies, strict=True):
            if isinstance(before, torch.Tensor):
                before.copy_(after)
        return tree_map_only(torch.Tensor, lambda t: t.cpu(), out)

    return call


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


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has its own order")
def test_no_number_depends_on_the_order_of_programs(monkeypatch):
    """The last program first: later occurrences claim places before the earlier ones do."""
    from triton.runtime.interpreter import interpreter_builder as builder

    in_order = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: in_order(builder.grid_dim[0] - 1 - x, y, z))
    for seed in (0, 1):
        test_table_is_the_dict(seed)
    test_gradients_of_a_frequent_row_are_summed_in_chunks(65)


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
    state = test_initial.table(plan, optimizer_slots=2, seed=7, max_rows=16).init()
    state.rows.fill_(9.0)
    reading = reading_of([[[i] for i in EXTREMES]], [0])
    test_find_or_insert.insert(test_find_or_insert.OPS["kernel"], state, reading, (keys, params))
    num = len(EXTREMES)
    torch.testing.assert_close(state.rows[:num, 0], expected, rtol=2e-6, atol=1e-7)
    assert not state.rows[:num, 1:].any()
    assert (state.rows[num:] == 9.0).all()


@pytest.mark.parametrize("samples", [0, 1, 70])
def test_order_is_the_cpu_s(samples):
    rng = random.Random(samples)
    lists = [[[rng.getrandbits(64) - 2**63 for _ in range(rng.randint(0, 4))] for _ in range(samples)] for _ in "abc"]
    features = [ragged(items, spare=spare) for items, spare in zip(lists, (0, 3, 200), strict=True)]
    values, offsets = [f.values for f in features], [f.offsets for f in features]
    for a, b in zip(on_device(gpu_order.order_ids)(values, offsets), order_ids(values, offsets), strict=True):
        assert torch.equal(a, b)
    weights = [None, torch.randn(values[1].numel()), torch.randn(values[2].numel())]
    arguments = values, offsets, weights, [0, 2, 0]
    for a, b in zip(on_device(gpu_order.order_lists)(*arguments), order_lists.order_lists(*arguments), strict=True):
        assert torch.equal(a, b)
    sums = on_device(gpu_order.list_sums)(weights[1], offsets[1])
    torch.testing.assert_close(sums, order_lists.list_sums(weights[1], offsets[1]))


LISTS = {
    "no samples": [[], [], []],
    "no ids": [[[], []], [[], []], [[], []]],
    "one id": [[[5]], [[]], [[]]],
    "many": random_lists(random.Random(0), lookups=3, samples=60, longest=4, ids=range(9)),
}


@pytest.mark.parametrize("dims", [(8, 1), (16, 4, 2), (5,)], ids=str)
@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_pool_is_the_cpu_s(lists, dims, weighted):
    rows, row_P, reading, batch_size, init, firsts, dims = test_pool.case(lists, [0, 1, 0], dims, 3)
    weight_P = torch.randn(reading.id.numel()) if weighted else None
    arguments = rows, row_P, *reading, batch_size, *init, list(firsts), list(dims), weight_P
    for a, b in zip(on_device(gpu_pool.pool)(*arguments), pool.pool(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("num_unique", [0, 1, 40])
@pytest.mark.parametrize("due", [True, False])
def test_adamw_is_the_cpu_s(num_unique, due):
    arguments = test_adamw_rows.case(9, num_unique)
    kernels = on_device(optimizer_rows.adamw_rows_), test_adamw_rows.OPS["kernel"]
    a, b = (test_adamw_rows.call(op, *arguments, due=due) for op in kernels)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("name", test_optimizer_rows.KERNELS)
@pytest.mark.parametrize("by_column", [False, True])
def test_row_optimizers_are_their_definitions(name, by_column):
    a = test_optimizer_rows.case(name, (3, 4, 2), 9, by_column=by_column)
    b = [t.clone() if isinstance(t, torch.Tensor) else t for t in a]
    on_device(getattr(optimizer_rows, f"{name}_"))(*a)
    getattr(test_optimizer_rows.optimizer_rows, name).definition(*b)
    for x, y in zip(a[:3], b[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("limit", "max_norm"), [(0.1, 1.0), (float("inf"), 0.1)])
def test_clipping_is_the_definition(limit, max_norm):
    grads = test_clip_row_grads.grads_of(9)
    kernels = on_device(clip_row_grads.clip_row_grads_), test_clip_row_grads.OPS["definition"]
    a, b = (test_clip_row_grads.clip(op, grads, 7, limit=limit, max_norm=max_norm) for op in kernels)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    norm = on_device(clip_row_grads.squared_norm)(grads, torch.tensor(7))
    torch.testing.assert_close(norm, grads[:7].double().square().sum())


@pytest.mark.parametrize("same_home", [False, True])
def test_rehash_places_every_row_but_the_freed(same_home):
    ids = torch.tensor([id_of_hash(k << 32 | 9, 0) if same_home else k - 150 for k in range(300)])
    if not same_home:
        ids[:2] = torch.tensor([MIN_INT64, MAX_INT64])
    vocabularies = torch.where(torch.arange(300) % 3 == 0, -1, 0).int()
    live = torch.nonzero(vocabularies == 0)[:, 0]
    slots, crowded = torch.full((600,), 7), torch.tensor(-5)
    on_device(gpu_rehash.rehash_)(slots, crowded, ids, vocabularies, 300, 512, -3 if not same_home else 0)
    salt = torch.tensor(-3 if not same_home else 0)
    assert (slots[512:] == 7).all()
    assert torch.equal((slots[:512][slots[:512] != hashing.EMPTY] & 0xFFFFFFFF).sort().values, live)
    found = cpu_find.find(slots, ids, torch.tensor(512), salt, *reading_of([[ids.tolist()]], [0]))
    assert torch.equal(found[live], live.int())
    assert int(crowded) == len(live) - hashing.RUN if same_home else int(crowded) <= 3


def test_rehash_of_no_rows_empties():
    slots, crowded = torch.full((16,), 7), torch.tensor(3)
    on_device(gpu_rehash.rehash_)(slots, crowded, torch.zeros(4, dtype=torch.int64), torch.zeros(4).int(), 0, 8, 0)
    assert slots.tolist() == [-1] * 8 + [7] * 8
    assert int(crowded) == 0
    assert rehash.rehash_ is not gpu_rehash.rehash_
