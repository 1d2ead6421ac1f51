"""Which lists `check_length` looks at: a sample's by default, as RecIS's truncation does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from recfx import features as ops
from recfx.types import Ragged
from tests.reference import ragged
from tests.reference_features import nested

NESTED = st.lists(st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=4), max_size=4)
FOUR_AND_TWO = [[[0], [1], [2], [3]], [[4], [5]]]  # samples of 4 and 2 lists, each of one id


def counted(column: Ragged, longest: int, **kwargs) -> int:
    """Where nothing can raise."""

    def count(column: Ragged) -> torch.Tensor:
        return ops.check_length(column, longest, **kwargs)

    return int(make_fx(count, tracing_mode="fake", _allow_non_fake_inputs=True)(column)(column))


@given(samples=NESTED, spare=st.integers(0, 2), longest=st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_each_level_is_counted(samples, spare, longest):
    column = nested(samples, spare=spare)
    of_samples = sum(len(lists) > longest for lists in samples)
    innermost = sum(len(items) > longest for lists in samples for items in lists)
    assert counted(column, longest) == counted(column, longest, level=0) == of_samples
    assert counted(column, longest, level=-2) == of_samples
    assert counted(column, longest, level=1) == counted(column, longest, level=-1) == innermost


def test_lists_of_a_sample_raise():
    column = nested(FOUR_AND_TWO)
    assert int(ops.check_length(column, 4)) == 0
    message = r"^clicks: got a list of 4 lists, expected at most 3\. Truncate it, .* the first is sample 0\.$"
    with pytest.raises(ValueError, match=message):
        ops.check_length(column, 3, "clicks")
    assert counted(column, 3) == 1


def test_innermost_lists_on_request():
    column = nested([[[1], [2, 3]], [], [[4, 5, 6]]])
    assert int(ops.check_length(column, 3, level=-1)) == 0
    with pytest.raises(ValueError, match=r"got a list of 2 values, expected at most 1\. .* the first is list 1\.$"):
        ops.check_length(column, 1, level=-1)
    assert int(ops.check_length(column, 2)) == 0
    assert counted(column, 1, level=-1) == 2


def test_flat_lists_have_one_level():
    column = ragged([[1], [2, 3, 4], []])
    for level in (0, -1):
        with pytest.raises(
            ValueError, match=r"got a list of 3 values, expected at most 2\. .* the first is sample 1\."
        ):
            ops.check_length(column, 2, level=level)
    for level in (1, -2):
        with pytest.raises(
            ValueError, match=rf"level: got {level}, expected -1 to 0\. Lists of 'c' are nested 1 level\."
        ):
            ops.check_length(column, 2, "c", level=level)


def test_three_levels():
    o = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 3], [0, 2, 2, 6], [0, 1, 1, 1, 1, 4, 5])]
    column = Ragged(torch.arange(5), o[2], None, (o[0], o[1]))  # the longest: 2 lists of lists, 4 lists, 3 values
    for level, longest in ((0, 2), (1, 4), (2, 3)):
        assert int(ops.check_length(column, longest, level=level)) == 0
        with pytest.raises(ValueError, match=f"got a list of {longest} "):
            ops.check_length(column, longest - 1, level=level)
    with pytest.raises(ValueError, match="level: got 3, expected -3 to 2"):
        ops.check_length(column, 1, level=3)


def test_misuse():
    with pytest.raises(ValueError, match="longest: got -1, expected at least 0"):
        ops.check_length(ragged([[1]]), -1)
    with pytest.raises(TypeError, match="c: got Tensor, expected Ragged"):
        ops.check_length(torch.ones(1, 1), 1, "c")
