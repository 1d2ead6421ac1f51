"""What an operator launches: in a CUDA graph each launch is a node, and at a small batch nodes are the time."""

import importlib
from unittest import mock

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

bench = importlib.import_module("bench.triton_sm90")

ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
SMALL, LARGE = (26_000, 1000, 26, 9000, 16_384), (78_000, 3000, 26, 80_000, 131_072)
IN_ORDER = {SMALL: ["sort_block", "merge_blocks"], LARGE: ["aten.sort", "take_sorted"]}


def launches_of(module, name, sizes):
    """The kernels and torch's operators of one call, in order, without those that only allocate or make a view."""
    launched = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view and func.overloadpacket.__name__ not in ALLOCATES:
                launched.append(str(func.overloadpacket))
            return func(*args, **(kwargs or {}))

    arguments = bench.calls((8, 1), sizes)[module, name]
    operator = getattr(importlib.import_module(f"recfx.kernels.gpu.{module}"), name)
    launch = mock.patch.object(JITFunction, "run", lambda kernel, *_, **__: launched.append(kernel.fn.__name__))
    with launch, Operators():
        operator(*arguments)
    return launched


@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
def test_sums_of_gradients_take_four_launches(sizes):
    """Torch's sort is 13 nodes in a graph: a batch of a thousand samples does without."""
    for module, name, last in (
        ("sum_adamw_rows", "sum_adamw_rows_", "sum_adamw"),
        ("add_row_grads", "add_row_grads_", "add_rows"),
    ):
        assert launches_of(module, name, sizes) == [*IN_ORDER[sizes], "sum_chunks", last]
    assert launches_of("add_row_grads", "add_row_grads_atomic_", sizes) == ["add_atomically"]


def test_row_optimizers_take_one_launch_and_norms_two():
    names = [key for key in bench.calls((8, 1)) if key[0] == "optimizer_rows"]
    assert len(names) == 6
    for module, name in names:
        assert launches_of(module, name, SMALL) == ["update_rows"]
    assert launches_of("clip_row_grads", "clip_row_grads_", SMALL) == ["clip_rows"]
    assert launches_of("clip_row_grads", "squared_norm", SMALL) == ["sum_squares", "aten.sum"]
