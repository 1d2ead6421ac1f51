"""The Triton kernels over dense tensors, against the oracles of the CPU's; run as `cases.py` says."""

import math

import pytest
import torch

from recfx.kernels.dense import all_finite
from tests.kernels.gpu.cases import amid, on_device

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("place")

from recfx.kernels.dense.gpu import all_finite as gpu  # noqa: E402

PARTS = 5
MANY = 3 * gpu.BLOCK * PARTS // 2 + 5  # a program walks on


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    for module in (all_finite, gpu):
        monkeypatch.setattr(module, "PARTS", PARTS)


def tensors(many: int = 2 * gpu.BLOCK + 3) -> list[torch.Tensor]:
    """Of one number, of no round number, empty, transposed, one number for all, between others."""
    expanded = torch.ones(5, 1, 1).expand(5, 7, 2)
    return [torch.ones(1), torch.ones(many), torch.ones(0, 3), torch.ones(4, 9).t(), expanded,
            amid(torch.ones(130)), torch.tensor(2.0), torch.full((2,), torch.finfo(torch.float32).max)]  # fmt: skip


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_anywhere_is_found(bad):
    finite_parts = on_device(gpu.finite_parts)
    assert finite_parts(tensors()).all()
    for i, t in enumerate(tensors()):
        for place in {(0,) * t.dim(), tuple(size - 1 for size in t.shape)} if t.numel() else ():
            changed = tensors()
            changed[i][place] = bad
            assert not finite_parts(changed).all(), (i, place)


def test_programs_walk_on():
    for place in (0, MANY // 2, MANY - 1):
        many = torch.ones(MANY)
        many[place] = math.nan
        is_finite = on_device(gpu.finite_parts)([torch.ones(3), many])
        assert is_finite.shape == (PARTS,)
        assert int((~is_finite).sum()) == 1


def test_nothing_is_finite_and_other_types_are_read():
    assert on_device(gpu.finite_parts)([torch.ones(0)]).all()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert on_device(gpu.finite_parts)([torch.ones(3), torch.ones(3, dtype=dtype)]).all()
        largest = torch.finfo(dtype).max
        assert on_device(gpu.finite_parts)([torch.tensor([-largest, largest], dtype=dtype)]).all()
        for bad in (math.inf, -math.inf, math.nan):
            assert not on_device(gpu.finite_parts)([torch.ones(3), torch.tensor([1, bad], dtype=dtype)]).all()
