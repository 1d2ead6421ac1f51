"""The Triton kernels that order, pool and make lists, against the oracles of the CPU's; run as `cases.py` says."""

import contextlib
import random

import pytest
import torch

from recfx.kernels import order_lists, pool
from recfx.kernels.order_ids import order_ids
from tests.kernels import test_cross_lists, test_pool, test_select_lists, test_string_hash, test_take_lists
from tests.kernels.gpu.cases import LISTS, amid, machine_alone, on_device
from tests.reference import EXTREMES, ragged, random_lists
from tests.reference_features import cross_pair, strings

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("place")

from recfx.kernels.gpu import cross_lists, select_lists, string_hash, take_lists  # noqa: E402  behind importorskip
from recfx.kernels.gpu import order_lists as gpu_order  # noqa: E402
from recfx.kernels.gpu import pool as gpu_pool  # noqa: E402
from tests.machine.machine import MachineError  # noqa: E402

BAD = [[0, 3, 9 * 10**8], [0, 1, -5], [-9, 2, 4], [0, 6, 2], [2**31 - 1, -(2**31), 7], [5, 6, 8]]  # offsets of 8 values


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


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_nothing_is_read_outside_the_values_whatever_the_offsets_say(bad):
    """The machine says so of any other read."""
    values, offsets = (
        [torch.arange(1, 9), torch.arange(11, 19)],
        [torch.tensor(bad).int(), torch.tensor([0, 2, 4]).int()],
    )
    weights = [None, torch.arange(11.0, 19.0)]
    lists = on_device(gpu_order.order_lists)
    results = (
        on_device(gpu_order.order_ids)(values, offsets), lists(values, offsets, weights, [0, 0]),
        lists(values, offsets, weights, [2, 1]), lists(values, offsets, weights[::-1], [1, 0]),
    )  # fmt: skip
    for (id, cell, *_), num_cells in zip(results, (2, 2, 3, 2), strict=True):
        real = cell >= 0
        assert (cell < 2 * num_cells).all()
        assert ((id > 0) == real).all()
        assert set(id[real].tolist()) <= {*range(1, 9), *range(11, 19)}


@pytest.mark.parametrize("dims", [(8, 1), (16, 4, 2), (5,)], ids=str)
@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize(("weighted", "unknown"), [(False, True), (True, True), (True, False)])
def test_pool_is_the_cpu_s(lists, dims, weighted, unknown):
    case = test_pool.case(lists, [0, 1, 0], dims, 3, unknown=unknown)
    rows, row_P, reading, batch_size, init, firsts, dims = case
    weight_P = torch.randn(reading.id.numel()) if weighted else None
    arguments = rows, row_P, *reading, batch_size, *init, list(firsts), list(dims), weight_P
    for a, b in zip(on_device(gpu_pool.pool)(*arguments), pool.pool(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dims", [(8, 1), (70,)], ids=str)
def test_pool_of_few_unknown_ids_among_many(dims):
    """A program looks at 1024 of 1200 cells; a long list and empty ones between."""
    rng = random.Random(0)
    lists = random_lists(rng, lookups=3, samples=400, longest=1, ids=range(9))
    lists[1][370] = [rng.randint(0, 9) for _ in range(100)]
    lists[2][300:350] = [[] for _ in range(50)]
    rows, row_P, reading, batch_size, init, firsts, dims = test_pool.case(lists, [0, 1, 0], dims, 3)
    few = torch.arange(len(row_P)) % 151 == 150
    row_P = torch.where(few, test_pool.REFUSED, row_P.clamp(min=0)).int()
    arguments = rows, row_P, *reading, batch_size, *init, list(firsts), list(dims)
    for a, b in zip(on_device(gpu_pool.pool)(*arguments), pool.pool(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", test_string_hash.HASHES)
def test_strings_hash_to_the_golden_values_and_the_oracle_s(name):
    """Of every length, at every place in a word, between any bytes, in several columns at once."""
    op = on_device(getattr(string_hash, f"{name}_hashes"))
    golden, oracle = test_string_hash.GOLDEN[name], test_string_hash.HASHES[name][0]
    assert test_string_hash.hashed(op, golden) == list(golden.values())
    items = [*test_string_hash.EVERY_LENGTH, *(bytes([255] * n) for n in range(70))]
    columns = [strings(items, spare=5), strings([]), strings([b"", b"abc"]), strings([b"\xff" * n for n in range(9)])]
    values, offsets = [c.values for c in columns], [c.offsets for c in columns]
    values[0], offsets[0] = values[0][1:], (offsets[0] - 1).clamp(min=0)  # a tensor that begins at an odd address
    items[1] = b""
    expected = [items, [], [b"", b"abc"], [b"\xff" * n for n in range(9)]]
    assert [t.tolist() for t in op(values, offsets)] == [[oracle(s) for s in column] for column in expected]
    assert [t.numel() for t in op(values[1:2], offsets[1:2])] == [0]


@pytest.mark.parametrize("seed", range(4))
def test_taken_lists_are_the_loop_s(seed):
    """Lists that overlap, none, and more than there is room for; columns of three types in one call."""
    rng, cases = random.Random(seed), []
    for num_lists, num_values, capacity in ((0, 5, 4), (1, 0, 0), (300, 200, 900), (300, 200, 100), (7, 9, 300)):
        first = [rng.randint(0, num_values) for _ in range(num_lists)]
        length = [rng.randint(0, min(9, num_values - f)) for f in first]
        cases.append((list(range(100, 100 + num_values)), first, length, capacity))
    rng.shuffle(cases)
    dtypes = [rng.choice(test_take_lists.DTYPES[:2]) for _ in cases]
    out = test_take_lists.call(on_device(take_lists.take_lists), cases, dtypes)
    for case, dtype, values, offsets in zip(cases, dtypes, out[::2], out[1::2], strict=True):
        assert (values.tolist(), offsets.tolist()) == test_take_lists.loop(*case)
        assert (values.dtype, offsets.dtype) == (dtype, torch.int32)


@pytest.mark.parametrize("samples", [0, 1, 200])
@pytest.mark.parametrize(("dim", "fill"), [(1, 0.0), (3, float("nan")), (2, float("-inf"))])
def test_selected_numbers_are_the_definition_s(samples, dim, fill):
    rng = random.Random(samples)
    lists = [[[rng.random() for _ in range(rng.randint(0, 4))] for _ in range(samples)] for _ in range(5)]
    a, b = (
        test_select_lists.call(op, lists, dim, fill, spare=2)
        for op in (on_device(select_lists.select_lists), test_select_lists.OPS["definition"])
    )
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("weighted", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("samples", "longest", "ids"),
    [(0, 1, [1]), (1, 1, [7]), (60, 4, EXTREMES), (3, 150, range(9)), (5, 40, range(-9, 10**6)), (9, 0, [1])],
)
def test_crossed_lists_are_the_double_loop_s(samples, longest, ids, weighted):
    """No, short, long and empty lists, of few ids and of many; with room for all pairs, for some and for none."""
    op, rng = on_device(cross_lists.cross_lists), random.Random(longest)
    x, y = (random_lists(rng, lookups=1, samples=samples, longest=longest, ids=ids)[0] for _ in range(2))
    weights = [test_cross_lists.weights_of(side, w) for side, w in zip((x, y), weighted, strict=True)]
    total = sum(len({*a}) * len({*b}) for a, b in zip(x, y, strict=True))
    for capacity in {total + 5, total, total // 2, 0}:
        got = test_cross_lists.call(op, x, y, capacity, weighted=weighted, spare=3)
        assert tuple(t.tolist() for t in got) == test_cross_lists.loop(x, weights[0], y, weights[1], capacity)


def test_crossed_ids_have_the_golden_values():
    op = on_device(cross_lists.cross_lists)
    for (x, y), value in test_cross_lists.GOLDEN.items():
        assert test_cross_lists.call(op, [[x]], [[y]], 1)[0].tolist() == [value]


def clamped(values, offsets):
    """The lists that are left inside the values."""
    begins, ends = ([min(max(o, 0), len(values)) for o in part] for part in (offsets[:-1], offsets[1:]))
    return [values[begin : max(end, begin)] for begin, end in zip(begins, ends, strict=True)]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_lists_that_leave_the_values_end_with_them(bad):
    """The machine sees every address; the values stand amid others."""
    numbers, text = amid(torch.arange(11.0, 19.0)), bytes(range(65, 73))
    offsets, good = amid(torch.tensor(bad).int()), torch.tensor([0, 2, 8]).int()
    left, whole = clamped(numbers.tolist(), bad), clamped(numbers.tolist(), good.tolist())
    assert on_device(gpu_order.list_sums)(numbers, offsets).tolist() == [sum(items) for items in left]

    selected = on_device(select_lists.select_lists)([numbers, numbers], [offsets, good], 3, -1.0)
    rows = [[(items + [-1.0] * 3)[:3] for items in pair] for pair in zip(left, whole, strict=True)]
    assert selected.tolist() == [a + b for a, b in rows]

    for name, (oracle, *_) in test_string_hash.HASHES.items():
        hashes = on_device(getattr(string_hash, f"{name}_hashes"))
        got = hashes([amid(torch.tensor([*text]).byte())] * 2, [offsets, good])
        assert [t.tolist() for t in got] == [[oracle(s) for s in clamped(text, o)] for o in (bad, good.tolist())]


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("capacity", [0, 5, 20])
def test_taken_items_outside_the_values_are_0(bad, capacity):
    """Where lists begin and how long they are is wrong; the column next to them is as it was."""
    items, first, length = list(range(11, 19)), bad[:-1], bad[1:]
    expected, ends = [], [0]
    for begin, n in zip(first, length, strict=True):
        expected += [items[p] if 0 <= p < 8 else 0 for p in range(begin, begin + min(max(n, 0), capacity))]
        ends.append(min(ends[-1] + max(n, 0), capacity))
    values, first, length = amid(torch.tensor(items)), amid(torch.tensor(first).int()), amid(torch.tensor(length).int())
    twos = torch.tensor([2, 2]).int()
    out = on_device(take_lists.take_lists)([values] * 2, [first, twos], [length, twos], [capacity, 4])
    assert [t.tolist() for t in out] == [(expected + [0] * capacity)[:capacity], ends, [13, 14, 13, 14], [0, 2, 4]]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_crossed_lists_that_leave_the_ids_give_pairs_of_ids(bad):
    wrong, good = amid(torch.tensor(bad).int()), torch.tensor([0, 2, 8]).int()
    ids, weights = amid(torch.arange(1, 9) % 6), amid(torch.arange(1.0, 9.0))
    pairs = {cross_pair(i, j) for i in range(6) for j in range(6)}
    for offsets in ((wrong, good), (good, wrong)):
        values, products, ends, overflow = on_device(cross_lists.cross_lists)(
            ids, offsets[0], weights, ids, offsets[1], weights, 20
        )
        num = int(ends[-1])
        assert (ends.diff() >= 0).all()
        assert (int(ends[0]), num <= 20, overflow >= 0) == (0, True, True)
        assert set(values[:num].tolist()) <= pairs
        assert ((products[:num] >= 1) & (products[:num] <= 64)).all()
        assert not values[num:].any()
        assert not products[num:].any()


@pytest.mark.parametrize("name", test_string_hash.HASHES)
def test_no_string_is_read_in_front_of_its_tensor(name):
    """Lengths that are hashed in different ways begin tensors at different places in a word; a long string follows."""
    op, oracle = on_device(getattr(string_hash, f"{name}_hashes")), test_string_hash.HASHES[name][0]
    lengths, shifts = (1, 9, 17, 18, 23, 31, 50), (3, 0, 0, 3, 5, 0, 7)
    items = [[test_string_hash.EVERY_LENGTH[n] for n in (n, 70, 0)] for n in lengths]
    columns = [strings(column) for column in items]
    values = [amid(torch.cat([c.values[:1].repeat(k), c.values]))[k:] for c, k in zip(columns, shifts, strict=True)]
    got = op(values, [c.offsets for c in columns])
    assert [t.tolist() for t in got] == [[oracle(s) for s in column] for column in items]


@machine_alone
@pytest.mark.parametrize(("num_lists", "num_values", "inside"), [(2, 8, True), (2, 9, False), (3, 8, False)], ids=str)
def test_an_address_outside_the_tensors_is_seen(num_lists, num_values, inside):
    """Of a kernel that is told of more values, or of more sums to write, than there are."""
    sums, values = amid(torch.zeros(2)), amid(torch.arange(8.0))
    offsets = amid(torch.tensor([0, 2, 9, 9]).int())
    with (
        contextlib.nullcontext() if inside else pytest.raises(MachineError, match=r"4 bytes at .* outside every tensor")
    ):
        gpu_order.sum_lists[(1,)](sums, values, offsets, num_lists, num_values, BLOCK=128, num_warps=1)
