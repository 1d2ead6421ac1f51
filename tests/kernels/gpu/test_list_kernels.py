"""The Triton kernels that order, pool and make lists, against the oracles of the CPU's; run as `cases.py` says."""

import contextlib
import random
from unittest import mock

import pytest
import torch

from recfx.kernels.counters import NUM_UNIQUE, new_counters
from recfx.kernels.dense import add_predictions
from recfx.kernels.index import keep_trained, untouch_rows
from recfx.kernels.lists import order_lists
from recfx.kernels.lists.order_ids import ends_definition, order_ids
from recfx.kernels.rows import pool
from tests.kernels.dense import test_add_predictions
from tests.kernels.gpu.cases import LISTS, amid, machine_alone, on_device
from tests.kernels.lists import test_cross_lists, test_select_lists, test_string_hash, test_take_lists
from tests.kernels.rows import test_pool
from tests.reference import EXTREMES, ragged, random_lists
from tests.reference_features import cross_pair, strings

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("place")

from recfx.kernels.dense.gpu import add_predictions as gpu_predictions  # noqa: E402
from recfx.kernels.index.gpu import keep_trained as gpu_trained  # noqa: E402
from recfx.kernels.lists.gpu import cross_lists, select_lists, string_hash, take_lists  # noqa: E402
from recfx.kernels.lists.gpu import order_lists as gpu_order  # noqa: E402
from recfx.kernels.rows.gpu import pool as gpu_pool  # noqa: E402
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


@pytest.mark.parametrize(
    ("lookups", "samples", "longest"), [(1, 600, 3), (26, 19, 1), (3, 200, 4), (130, 2, 2), (2, 5, 900)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_order_of_whole_lists_is_the_cpu_s(lookups, samples, longest, weighted):
    """One sample a program and many, lists longer than it takes at once, lookups that begin amid their values."""
    rng = random.Random(lookups)
    lists = random_lists(rng, lookups=lookups, samples=samples, longest=longest, ids=EXTREMES)
    features = [ragged(items, spare=rng.choice([0, 1, 300])) for items in lists]
    unused = [rng.randint(0, 2) for _ in features]
    values = [torch.cat([torch.full((n,), -7), f.values]) for n, f in zip(unused, features, strict=True)]
    offsets = [f.offsets + n for n, f in zip(unused, features, strict=True)]
    if weighted:
        weights = [None if l % 3 == 1 else torch.randn(v.numel()) for l, v in enumerate(values)]
        arguments = values, offsets, weights, [0] * lookups
        got, expected = on_device(gpu_order.order_lists)(*arguments), order_lists.order_lists(*arguments)
    else:
        got, expected = on_device(gpu_order.order_ids_ends)(values, offsets), ends_definition(values, offsets)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_order_of_many_lists_is_the_cpu_s():
    """A program takes more lists of many than of few."""
    with mock.patch.object(gpu_order, "MANY", 0):
        test_order_of_whole_lists_is_the_cpu_s(26, 90, 2, False)
        test_order_of_whole_lists_is_the_cpu_s(3, 400, 4, True)


@pytest.mark.parametrize("lookups", [1, 4, 40])
def test_order_of_cut_lists_is_the_cpu_s(lookups):
    rng = random.Random(lookups)
    lists = random_lists(rng, lookups=lookups, samples=30, longest=4, ids=EXTREMES)
    features = [ragged(items, spare=rng.choice([0, 1, 30])) for items in lists]
    weights = [rng.choice([None, torch.randn(f.values.numel())]) for f in features]
    arguments = [f.values for f in features], [f.offsets for f in features], weights
    for lengths in ([1 + l % 3 for l in range(lookups)], [(l + 2) % 4 for l in range(lookups)]):
        got, expected = (op(*arguments, lengths) for op in (on_device(gpu_order.order_lists), order_lists.order_lists))
        assert all(map(torch.equal, got, expected))


def test_no_offset_makes_a_position_that_is_not_written():
    """Offsets at random, over many programs: of each position, the id is one of the values or 0, the cell one or -1."""
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        values = [torch.arange(1, 60), torch.arange(60, 80), torch.arange(80, 90)]
        edges = [torch.randint(-9, v.numel() + 9, (151,), generator=g).int() for v in values]
        sort = torch.rand(3, generator=g) < 0.7
        offsets = [e.sort()[0] if s else e for e, s in zip(edges, sort, strict=True)]
        id, cell, ends = on_device(gpu_order.order_ids_ends)(values, offsets)
        assert ((id >= 0) & (id < 90)).all()
        assert ((cell >= -1) & (cell < 450)).all()
        rows, row_P = torch.randn(5, 1, 4, generator=g), torch.randint(-1, 5, id.shape, generator=g).int()
        init = torch.zeros(3, 4, dtype=torch.int64), None
        arguments = rows, row_P, id, cell, ends, torch.zeros(3).int(), 150, *init, [0], [4]
        assert on_device(gpu_pool.pool_lists)(*arguments)[0].isfinite().all()


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


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("dims", [(8, 1), (16, 4, 2), (70,)], ids=str)
@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
def test_pool_of_lists_with_their_ends_is_the_cpu_s(lists, dims, unknown, padded):
    rows, row_P, reading, batch_size, init, firsts, dims = test_pool.case(lists, [0, 1, 0], dims, 3, unknown=unknown)
    features = [ragged(items) for items in lists]
    ends = ends_definition([f.values for f in features], [f.offsets for f in features])[2]
    id_P, cell_P, vocabularies = reading
    if padded:  # an id that counts as padding
        cell_P = torch.where(id_P % 3 == 0, -1, cell_P)
        row_P = torch.where(cell_P < 0, -1, row_P)
    rest = vocabularies, batch_size, *init, list(firsts), list(dims)
    expected = pool.pool(rows, row_P, id_P, cell_P, *rest)
    for op in (on_device(gpu_pool.pool_lists), pool.pool_lists):
        for a, b in zip(op(rows, row_P, id_P, cell_P, ends, *rest), expected, strict=True):
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


def hash_at_both_ends(name, lengths):
    """Each length begins a tensor and ends it, next to a long string, which makes all lanes of a program compute what
    long ones need. The tensors are all that their memory holds."""
    op, oracle = on_device(getattr(string_hash, f"{name}_hashes")), test_string_hash.HASHES[name][0]
    every = test_string_hash.EVERY_LENGTH
    for n in lengths:
        columns = [[every[n], every[65], every[n]], [every[n]]]
        tensors = [strings(column) for column in columns]
        got = op([t.values for t in tensors], [t.offsets for t in tensors])
        assert [t.tolist() for t in got] == [[oracle(s) for s in column] for column in columns]


@pytest.mark.parametrize("name", test_string_hash.HASHES)
def test_strings_are_read_inside_their_tensors(name):
    hash_at_both_ends(name, [*range(34), 40, *range(47, 51), *range(62, 67), 96, 129])


@pytest.mark.slow
@pytest.mark.parametrize("name", test_string_hash.HASHES)
def test_strings_of_every_length_are_read_inside_their_tensors(name):
    hash_at_both_ends(name, range(131))


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


def predictions(batch_size, *, one_logit=False):
    """Every kind of label, logit and loss, each with each other in turn."""
    rng, inf, nan = random.Random(batch_size), float("inf"), float("nan")
    logits = [inf, -inf, nan, 20.0, -20.0, 25.0, 0.0, -0.0, 1e-30]
    labels = [0.0, 1.0, 0.25, 0.75, -0.0, -1e-7, 1.0001, 2.0, -1.0, nan, inf, -inf, 0.5]
    logit = [
        0.7 if one_logit else rng.choice([*logits, *(rng.gauss(0, 3) for _ in "abcdef")]) for _ in range(batch_size)
    ]
    label = [rng.choice([0.0, 1.0] if one_logit else labels) for _ in range(batch_size)]
    loss = [rng.choice([nan, inf, -inf, *[rng.random()] * 9]) for _ in range(batch_size)]
    valid = [rng.random() < 0.9 for _ in range(batch_size)]
    return *(torch.tensor(t).view(-1, 1).float() for t in (logit, label, loss)), torch.tensor(valid).view(-1, 1).bool()


def finite_sums(arguments):
    """The same without what makes every sum NaN."""
    logit, label, loss, valid = arguments
    return logit.nan_to_num(0.0, 30.0, -30.0), label.nan_to_num(0.5, 2.0, -2.0), loss.nan_to_num(1.0, 2.0, 3.0), valid


@pytest.mark.parametrize("num_sums", [5, 6])
@pytest.mark.parametrize("num_bins", [1, 7, 2**16])
@pytest.mark.parametrize("batch_size", [0, 1, 999, gpu_predictions.SAMPLES, gpu_predictions.SAMPLES + 1, 5000])
def test_predictions_are_counted_as_by_the_definition(batch_size, num_bins, num_sums):
    op, whole = on_device(gpu_predictions.add_predictions_), predictions(batch_size)
    for arguments in (whole, finite_sums(whole)):
        got = test_add_predictions.call(op, num_bins, *arguments, num_sums)
        expected = test_add_predictions.call(add_predictions.definition, num_bins, *arguments, num_sums)
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=1e-7, atol=1e-7, equal_nan=True)
        again = test_add_predictions.call(op, num_bins, *arguments, num_sums)
        assert all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(got, again, strict=True))


def test_predictions_of_one_logit_are_counted():
    arguments = predictions(700, one_logit=True)
    histogram, _ = test_add_predictions.call(on_device(gpu_predictions.add_predictions_), 2**16, *arguments)
    expected, _ = test_add_predictions.call(add_predictions.definition, 2**16, *arguments)
    assert torch.equal(histogram, expected)
    assert (histogram > 0).sum() == 2


def touched(seed, *, positions, num_before, num_new):
    """A table of which a batch touched some rows: seen, unique_rows, and for each position its row, number and cell."""
    g = torch.Generator().manual_seed(seed)
    num = num_before + num_new
    unique_rows, seen = torch.randperm(2 * num + 5, generator=g).int(), torch.full((2 * num + 5,), 3 << 32)
    seen[unique_rows[:num].long()] = (7 << 32) | torch.arange(num)
    inverse = torch.randint(-1, max(num, 1), (positions,), generator=g).int()
    inverse[:num_new] = torch.arange(num_before, num) if num_new else inverse[:0]
    inverse = inverse[torch.randperm(positions, generator=g)]
    row = torch.where(inverse >= 0, unique_rows[inverse.long()], -1)
    cell = torch.where((inverse >= 0) | (torch.rand(positions, generator=g) < 0.5), torch.arange(positions).int(), -1)
    return seen, unique_rows, new_counters(num_unique=num, step=6), row, inverse, cell


@pytest.mark.parametrize(
    ("positions", "num_before", "num_new"), [(0, 2, 0), (1, 0, 1), (5, 3, 0), (400, 0, 37), (700, 200, 300)]
)
def test_rows_that_nothing_trains_leave_the_step_as_by_the_definition(positions, num_before, num_new):
    ops = on_device(gpu_trained.keep_trained_), keep_trained.definition
    for trains in ([True, False, False], [False] * 3, [True]):
        results = []
        for op in ops:
            seen, unique_rows, counters, _, inverse, cell = touched(
                1, positions=positions, num_before=num_before, num_new=num_new
            )
            before = torch.tensor(num_before).int()
            out = op(seen, unique_rows, counters, before, inverse, cell, torch.tensor(trains))
            results.append((out, seen, unique_rows[: int(counters[NUM_UNIQUE])], counters))
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize(("positions", "num_before", "num_new"), [(0, 2, 0), (1, 0, 1), (700, 200, 100)])
def test_a_batch_that_does_not_count_is_taken_back_as_by_the_definition(positions, num_before, num_new, counts):
    results = []
    for op in (on_device(gpu_trained.untouch_rows_), untouch_rows.definition):
        batch = touched(2, positions=positions, num_before=num_before, num_new=num_new)
        seen, unique_rows, counters, row, inverse, _ = batch
        read = unique_rows[num_before : num_before + num_new : 3].long()  # rows that nothing trains
        seen[read] = (7 << 32) | keep_trained.NO_NUMBER
        inverse = torch.where(torch.isin(row, read), -1, inverse)
        op(seen, counters, row, inverse, torch.tensor(num_before), torch.tensor(counts))
        results.append((seen, counters))
    assert all(map(torch.equal, *results))
    assert bool((results[0][0] == 6 << 32).any()) == (not counts and num_new > 0)
