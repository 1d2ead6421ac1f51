import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx import features as ops
from recfx.types import Ragged
from tests.reference import ragged
from tests.reference_features import (
    IDS,
    STRINGS,
    cross_pair,
    distinct,
    fingerprint64,
    lists_of,
    murmur64a,
    nested,
    signed,
    strings,
)

HASHES = {"farm": (ops.farm_hash, fingerprint64), "murmur": (ops.murmur_hash, murmur64a)}
PRIMES = [28979, 46997, 66977, 82997]


@pytest.mark.parametrize("name", HASHES)
@given(items=STRINGS, spare=st.integers(0, 3), data=st.data())
@settings(max_examples=50, deadline=None)
def test_hash_of_one_and_of_several_strings_a_sample(name, items, spare, data):
    op, oracle = HASHES[name]
    expected = [oracle(item) for item in items]
    assert op(strings(items, spare=spare)).tolist() == [[id] for id in expected]
    ends = sorted(data.draw(st.lists(st.integers(0, len(items)), max_size=3)))
    column = strings(items, spare=spare, outer=[0, *ends, len(items)])
    before = column.values.clone()
    ids = op(column)
    assert lists_of(ids) == [expected[a:b] for a, b in zip([0, *ends], [*ends, len(items)], strict=True)]
    assert ids.values.dtype == torch.int64
    assert torch.equal(column.values, before)


@pytest.mark.parametrize("name", HASHES)
def test_hash_many_is_hash_each(name):
    op, _ = HASHES[name]
    columns = {"a": strings([b"x", b"yy"]), "b": strings([b"z", b"", b"abc"], outer=[0, 1, 3])}
    together = op(columns)
    assert torch.equal(together["a"], op(columns["a"]))
    assert lists_of(together["b"]) == lists_of(op(columns["b"]))
    assert op({}) == {}


def test_hash_keeps_deeper_levels():
    column = strings([b"a", b"b", b"c"], outer=[0, 2, 3])
    column = column._replace(outer=(torch.tensor([0, 1, 2], dtype=torch.int32), *column.outer))
    assert lists_of(ops.murmur_hash(column)) == [[[murmur64a(b"a"), murmur64a(b"b")]], [[murmur64a(b"c")]]]


def test_hash_rejects_what_is_not_a_string():
    with pytest.raises(TypeError, match=r"city: got torch\.int64 values, expected torch\.uint8, the bytes of strings"):
        ops.farm_hash({"city": ragged([[1]])})


@pytest.mark.parametrize(("id", "n", "expected"), [(-1, 10, 5), (-5, 1000, 611), (1001, 1000, 1)])
def test_mod_golden_values(id, n, expected):
    assert ops.mod(torch.tensor([[id]]), n).tolist() == [[expected]]


@given(
    ids=st.lists(IDS, max_size=8),
    n=st.sampled_from([1, 2, 3, 10, 2**31, 2**62 + 1, 2**63 - 1, 2**63]) | st.integers(1, 2**63),
)
@settings(max_examples=150, deadline=None)
def test_mod_is_unsigned(ids, n):
    expected = [id % 2**64 % n for id in ids]
    assert ops.mod(torch.tensor(ids, dtype=torch.int64), n).tolist() == expected
    column = ragged([ids], spare=1)
    assert lists_of(ops.mod(column, n)) == [expected]
    assert lists_of(column) == [ids]


def test_mod_rejects_zero_and_too_large():
    for n in (0, -1, 2**63 + 1):
        with pytest.raises(ValueError, match=r"n: got .*, expected 1 to 2\*\*63"):
            ops.mod(torch.zeros(1, 1, dtype=torch.int64), n)


def test_multi_hash_golden_values():
    hashed = ops.multi_hash(ragged([[1001], [1002, 1003]]), [1000] * 4)
    assert [h.values.tolist() for h in hashed] == [[1, 2, 3], [3, 6, 9], [5, 10, 15], [7, 14, 21]]
    assert all(h.offsets.tolist() == [0, 1, 3] for h in hashed)


@given(ids=st.lists(IDS, max_size=8), count=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_multi_hash_is_its_formula(ids, count):
    hashed = ops.multi_hash(torch.tensor(ids, dtype=torch.int64)[:, None], [1000] * count)
    for out, m, p in zip(hashed, (1, 3, 5, 7)[:count], PRIMES, strict=False):
        assert out[:, 0].tolist() == [signed(id * m % 2**64) % p % 1000 for id in ids]
    assert len(hashed) == count


def test_multi_hash_uses_the_largest_primes():
    """A bucket count of 1 leaves the prime nothing to show; with c b + 1 buckets the remainder is the id itself."""
    for buckets in (1, 2, 3, 10, 97, 12_345):
        below = [29 * buckets, 47 * buckets, 67 * buckets, 83 * buckets]
        primes = [next(n for n in range(c, 1, -1) if all(n % k for k in range(2, n) if k * k <= n)) for c in below]
        ids = torch.arange(-300, 300)[:, None]
        for out, m, p in zip(ops.multi_hash(ids, [buckets] * 4), (1, 3, 5, 7), primes, strict=True):
            assert out[:, 0].tolist() == [id * m % p % buckets for id in range(-300, 300)]


@pytest.mark.parametrize("num_buckets", [[], [1] * 5, [0], [2**32]])
def test_multi_hash_rejects(num_buckets):
    with pytest.raises(ValueError, match=r"num_buckets: got .* expected one to four numbers"):
        ops.multi_hash(torch.zeros(1, 1, dtype=torch.int64), num_buckets)


@given(
    pairs=st.lists(st.tuples(st.lists(IDS, max_size=4), st.lists(IDS, max_size=4)), max_size=4),
    capacity=st.integers(0, 40),
    is_weighted=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_cross_is_a_product_of_distinct_ids(pairs, capacity, is_weighted):
    x, y = (ragged(side, spare=1) for side in ([a for a, _ in pairs], [b for _, b in pairs]))
    if is_weighted:
        x = x._replace(weights=torch.arange(x.values.numel()) + 0.5)
    expected, weights = [], []
    for a, b, w in zip(lists_of(x), lists_of(y), lists_of(x, x.weights if is_weighted else None), strict=True):
        firsts = distinct(a, w)
        expected.append([cross_pair(i, j) for i in firsts for j in distinct(b, b)])
        weights.append([firsts[i] for i in firsts for _ in distinct(b, b)])
    crossed, overflow = ops.cross(x, y, capacity=capacity)
    flat = [v for items in expected for v in items]
    assert int(overflow) == max(len(flat) - capacity, 0)
    assert [v for items in lists_of(crossed) for v in items] == flat[:capacity]
    if int(overflow) == 0:
        assert lists_of(crossed) == expected
        assert (crossed.weights is not None) == is_weighted
        if is_weighted:
            assert lists_of(crossed, crossed.weights) == weights
    assert crossed.values.numel() == capacity


def test_cross_of_a_cross_and_of_a_dense_column():
    """A feature may consume another's output."""
    x, y = ragged([[1, 1], [2]]), ops.from_dense(torch.tensor([[2], [1]]))
    once, _ = ops.cross(x, y, capacity=4)
    assert lists_of(once) == [[2346165840139155392], [-1274954391096260390]]
    twice, _ = ops.cross(once, y, capacity=2)
    assert lists_of(twice) == [[cross_pair(2346165840139155392, 2)], [cross_pair(-1274954391096260390, 1)]]


def test_cross_rejects():
    x = ragged([[1]])
    with pytest.raises(TypeError, match=r"y: got torch\.float32 values, expected torch\.int64 ids"):
        ops.cross(x, ragged([[1]], dtype=torch.float32), capacity=1)
    with pytest.raises(ValueError, match="y: got 2 samples, expected 1, as x has"):
        ops.cross(x, ragged([[1], []]), capacity=1)
    with pytest.raises(ValueError, match="x: got lists nested 2 levels, expected 1"):
        ops.cross(nested([[[1]]]), x, capacity=1)
    with pytest.raises(TypeError, match="x: got Tensor, expected Ragged"):
        ops.cross(torch.ones(1, 1), x, capacity=1)


def test_weights_follow_ids_through_mod():
    column = Ragged(torch.tensor([12, -1]), torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0.5, 2.0]))
    assert ops.mod(column, 10).weights is column.weights


def test_a_dict_of_columns_is_each_column():
    columns = {"a": ragged([[-1], [5, 2**63 - 1]], spare=1), "b": nested([[[1001]], []]), "c": torch.tensor([[-5]])}
    for name, column in columns.items():
        for together, alone in (
            (ops.mod(columns, 1000)[name], ops.mod(column, 1000)),
            (ops.multi_hash(columns, [10])[0][name], ops.multi_hash(column, [10])[0]),
        ):
            assert type(together) is type(alone)
            values = [c.values if isinstance(c, Ragged) else c for c in (together, alone)]
            assert torch.equal(*values)
