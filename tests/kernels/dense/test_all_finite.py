import math

import pytest
import torch

from recfx.kernels.counters import NUM_UNIQUE, new_counters
from recfx.kernels.dense.all_finite import PARTS, all_finite, are_finite, definition, finite_parts
from recfx.table.memory import reserve_rows
from tests.reference import on_threads

OPS = {
    "definition": definition,
    "kernel": all_finite,
    "parts": lambda tensors, grads, counters: finite_parts(
        [*tensors, *(g[: c[NUM_UNIQUE]] for g, c in zip(grads, counters, strict=True))]
    ).all(),
}
NONE = [], []


def tensors():
    """Contiguous, transposed, with gaps between rows, of one number for all, scalar, empty."""
    wide = torch.full((5, 7), math.nan)
    wide[:, :3] = 1
    return [torch.ones(300, 64), torch.ones(4, 9).t(), wide[:, :3], torch.ones(1).expand(5, 3), torch.tensor(2.0),
            torch.ones(0, 3), torch.ones(2, 3, 4).transpose(0, 2)]  # fmt: skip


def rows(num=1000, width=9):
    grads = reserve_rows((num, width), torch.device("cpu"), most_padding=1.0)
    return grads.fill_(0.5)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_anywhere_is_found(op, bad):
    assert op(tensors(), *NONE)
    for i, t in enumerate(tensors()):
        for place in {(0,) * t.dim(), tuple(size - 1 for size in t.shape)} if t.numel() else ():
            changed = tensors()
            changed[i][place] = bad
            assert not op(changed, *NONE), (i, place)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("width", [1, 9, 16, 17])
def test_of_gradients_the_rows_in_use_count(op, width):
    for num in (0, 1, 16, 17, 999, 1000):
        grads = rows(width=width)
        grads[num:] = math.nan
        assert op([], [grads], [new_counters(num_unique=num)])
        for row in {0, num // 2, num - 1} if num else ():
            grads = rows(width=width)
            grads[row, -1] = math.inf
            for threads in (1, 2, 3):
                assert not on_threads(
                    threads, op, [torch.ones(3)], [rows(), grads], [new_counters(), new_counters(num_unique=num)]
                )


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_what_lies_between_rows_does_not_count(op):
    grads = torch.full((40, 16), math.nan)[:, :9].fill_(1)
    assert op([], [grads], [new_counters(num_unique=40)])


def test_the_largest_numbers_are_finite_and_other_types_are_refused():
    largest = torch.finfo(torch.float32).max
    for op in OPS.values():
        assert op([torch.tensor([largest, -largest, 1e-45])], *NONE)
    with pytest.raises(RuntimeError, match="got a tensor that is not f32"):
        all_finite([torch.ones(3, dtype=torch.float64)], *NONE)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert are_finite([torch.ones(3, dtype=dtype)])
        assert not are_finite([torch.ones(3), torch.tensor([1, math.nan], dtype=dtype)])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    torch.library.opcheck(all_finite, ([torch.ones(3)], [rows(20)], [new_counters(num_unique=7)]))
    torch.library.opcheck(finite_parts, ([torch.ones(3), torch.ones(2, 1).expand(2, 3)],))


def test_parts_are_as_many_as_a_launch_has_programs():
    assert finite_parts([torch.ones(3)]).shape == (PARTS,)
