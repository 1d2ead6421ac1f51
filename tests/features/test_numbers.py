import bisect
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx import features as ops
from tests.reference import ragged

NUMBERS = st.floats(width=32, allow_nan=True, allow_infinity=True)
FINITE = st.floats(-1e6, 1e6, width=32)
MATRICES = st.integers(0, 3).flatmap(lambda d: st.lists(st.lists(NUMBERS, min_size=d, max_size=d), max_size=4))
INF, NAN = math.inf, math.nan


def same(got, expected):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32), rtol=2e-6, atol=1e-37, equal_nan=True)


def f32(x):
    return float(np.float32(x))


def log1p(x):
    return math.log1p(max(x, 0)) if x == x else x


def clip(x, low=-1.5, high=2.0):
    return min(max(x, low), high) if x == x else x


def standardize(x):
    return f32(f32(x) - f32(0.5)) / f32(0.25)


def min_max(x):
    return f32(f32(x) - f32(-2.0)) / f32(5.0)


OPS = {
    "log1p": (ops.log1p, log1p),
    "signed_log1p": (ops.signed_log1p, lambda x: math.copysign(math.log1p(abs(x)), x) if x == x else x),
    "clip": (lambda x: ops.clip(x, -1.5, 2.0), clip),
    "standardize": (lambda x: ops.standardize(x, 0.5, 0.25), standardize),
    "min_max": (lambda x: ops.min_max(x, -2.0, 3.0), min_max),
}


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("name", OPS)
@given(values=st.lists(NUMBERS, max_size=6))
@settings(max_examples=60, deadline=None)
def test_is_the_formula_on_dense_and_ragged(name, values):
    op, formula = OPS[name]
    x = torch.tensor(values, dtype=torch.float32)[:, None]
    before = x.clone()
    same(op(x)[:, 0], [f32(formula(v)) for v in values])
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))
    column = ragged([values], spare=2, dtype=torch.float32)._replace(weights=torch.ones(len(values) + 2))
    out = op(column)
    same(out.values[: len(values)], [f32(formula(v)) for v in values])
    assert out.offsets is column.offsets
    assert out.weights is column.weights


def test_log1p_clamps():
    torch.testing.assert_close(ops.log1p(torch.tensor([-3.0, 0, 1, 2e6])), torch.tensor([0.0, 0, 0.6931472, 14.508658]))


def test_statistics_per_column_and_degenerate_ones():
    x = torch.tensor([[1.0, 7.0], [3.0, 7.0]])
    assert ops.standardize(x, x.mean(0), x.std(0, correction=0)).tolist() == [[-1, 0], [1, 0]]
    assert ops.min_max(x, x.amin(0), x.amax(0)).tolist() == [[0, 0], [1, 0]]
    assert ops.standardize(x, 1.0, 0.0).tolist() == [[0, 6], [2, 6]]
    assert ops.min_max(x, 7.0, 7.0).tolist() == [[-6, 0], [-4, 0]]


@given(
    lists=st.lists(st.lists(st.just(NAN) | FINITE, max_size=4), max_size=4), dim=st.integers(1, 3), dense=st.booleans()
)
@settings(max_examples=80, deadline=None)
def test_fill_missing(lists, dim, dense):
    rows = [(items + [NAN] * dim)[:dim] for items in lists]
    column = torch.tensor(rows).view(len(rows), dim) if dense else ragged(lists, spare=1, dtype=torch.float32)
    x, missing = ops.fill_missing(column, -2.5, dim)
    assert x.tolist() == [[-2.5 if v != v else v for v in row] for row in rows]
    assert missing.tolist() == [[float(v != v) for v in row] for row in rows]
    assert x.dtype == missing.dtype == torch.float32


@pytest.mark.parametrize(
    ("boundaries", "values", "ids"),
    [
        ([18, 25, 35, 45, 55, 65], [18, 65, 17.999, NAN], [1, 6, 0, 6]),
        ([0, 0.5, 1], [0, 0.25, 0.5, 0.75, 1], [1, 1, 2, 2, 3]),
        ([], [0, NAN, -INF], [0, 0, 0]),
        ([0], [-INF, INF, -0.0, 1e-45], [0, 1, 1, 1]),
    ],
)
def test_bucketize_golden_values(boundaries, values, ids):
    assert ops.bucketize(torch.tensor(values)[:, None], boundaries)[:, 0].tolist() == ids
    column = ops.bucketize(ragged([values], spare=1, dtype=torch.float32), boundaries)
    assert column.values[:-1].tolist() == ids
    assert column.values.dtype == torch.int64


@given(boundaries=st.lists(FINITE, max_size=6, unique=True).map(sorted), values=st.lists(NUMBERS, max_size=6))
@settings(max_examples=80, deadline=None)
def test_bucketize_is_bisect(boundaries, values):
    expected = [len(boundaries) if v != v else bisect.bisect_right(boundaries, v) for v in values]
    assert ops.bucketize(torch.tensor(values, dtype=torch.float32)[:, None], boundaries)[:, 0].tolist() == expected


@given(values=MATRICES)
@settings(max_examples=40, deadline=None)
def test_bucketize_with_a_row_of_boundaries_per_column(values):
    dim = len(values[0]) if values else 1
    rows = [[-1.0 + k, 0.0 + k, INF] for k in range(dim)]
    x = torch.tensor(values, dtype=torch.float32).view(len(values), dim)
    expected = [[3 if v != v else bisect.bisect_right(rows[k], v) for k, v in enumerate(row)] for row in values]
    assert ops.bucketize(x, torch.tensor(rows).view(dim, 3)).tolist() == expected


def test_bucketize_rejects_boundaries_that_do_not_rise():
    for boundaries in ([1, 0], [1, 1], [0, NAN]):
        with pytest.raises(ValueError, match=r"boundaries: got .* expected rising numbers"):
            ops.bucketize(torch.ones(1, 1), boundaries)


@given(
    values=st.lists(st.integers(-50, 50), min_size=2, max_size=40),
    num_nan=st.integers(0, 3),
    num_buckets=st.sampled_from([1, 2, 4, 8]),
)
@settings(max_examples=80, deadline=None)
def test_quantile_boundaries_are_the_distinct_quantiles(values, num_nan, num_buckets):
    expected = statistics.quantiles(values, n=num_buckets, method="inclusive")
    assert ops.quantile_boundaries(torch.tensor([*values, *[NAN] * num_nan]), num_buckets) == sorted({*expected})


def test_quantile_boundaries_of_many_distinct_values():
    x = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0)).exp()
    counts = torch.bincount(ops.bucketize(x, ops.quantile_boundaries(x, 16))[:, 0])
    assert len(counts) == 16
    assert counts.min() > 6200
    assert counts.max() < 6300
    assert ops.quantile_boundaries(torch.zeros(50), 10) == [0]
    with pytest.raises(ValueError, match="num_buckets: got 0, expected at least 1"):
        ops.quantile_boundaries(x, 0)
    with pytest.raises(ValueError, match="values: got only NaN"):
        ops.quantile_boundaries([NAN], 2)


def test_statistics_per_column_need_a_dense_column():
    for op in (ops.standardize, ops.min_max):
        with pytest.raises(TypeError, match=r"x: got Ragged, expected Tensor \[B, d\] for statistics per column"):
            op(ragged([[1.0]], dtype=torch.float32), torch.zeros(1), torch.ones(1))


def test_fill_missing_of_a_list_of_columns_with_a_value_for_each():
    columns = [ragged([[1.0], []], dtype=torch.float32), ragged([[NAN], [2.0]], dtype=torch.float32)]
    x, missing = ops.fill_missing(columns, torch.tensor([7.0, 8.0]))
    assert x.tolist() == [[1, 8], [7, 2]]
    assert missing.tolist() == [[0, 1], [1, 0]]


def test_a_dict_of_columns_is_each_column():
    columns = {"a": torch.tensor([[1.0, -2.0]]), "b": ragged([[3.0], []], dtype=torch.float32)}
    for op in (ops.log1p, lambda c: ops.clip(c, 0, 2), lambda c: ops.min_max(c, 0, 2), lambda c: ops.bucketize(c, [2])):
        together = op(columns)
        assert torch.equal(together["a"], op(columns["a"]))
        assert torch.equal(together["b"].values, op(columns["b"]).values)
        assert together["b"].offsets is columns["b"].offsets
    with pytest.raises(TypeError, match=r"columns: got .*, expected one dtype in a dict"):
        ops.log1p({"a": torch.ones(1, 1), "b": torch.ones(1, 1).long()})
