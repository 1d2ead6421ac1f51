import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.features import log1p, select_dense, select_ragged
from recfx.types import Ragged
from tests.reference import ragged

NUMBERS = st.lists(st.lists(st.integers(-9, 9), max_size=4), min_size=1, max_size=5)


@given(lists=NUMBERS, dim=st.integers(1, 3), spare=st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_select_dense_is_the_first_numbers_and_zeros(lists, dim, spare):
    column = ragged(lists, spare=spare, dtype=torch.float32)
    before = column.values.clone()
    assert select_dense(column, dim).tolist() == [(items + [0] * dim)[:dim] for items in lists]
    assert select_dense(column, dim).dtype == torch.float32
    assert torch.equal(column.values, before)


def test_select_dense_of_a_dense_column():
    x = torch.arange(6.0).view(2, 3)
    assert select_dense(x).tolist() == [[0], [3]]
    assert select_dense(x, 2).tolist() == [[0, 1], [3, 4]]


def test_padding_samples_read_nothing():
    column = Ragged(torch.tensor([5.0, 77.0, 77.0]), torch.tensor([0, 1, 1, 1], dtype=torch.int32))
    assert select_dense(column).tolist() == [[5], [0], [0]]


def test_select_ragged():
    column = ragged([[1], []])
    assert select_ragged(column) is column
    with pytest.raises(TypeError, match="column: got Tensor, expected Ragged"):
        select_ragged(torch.ones(2, 1))


def test_log1p_clamps():
    x = torch.tensor([-3.0, 0.0, 1.0, 2.0e6])
    before = x.clone()
    torch.testing.assert_close(log1p(x), torch.tensor([0.0, 0.0, 0.6931472, 14.508658]))
    assert torch.equal(x, before)
