"""What the tests of the Triton kernels share. They run on CPU tensors under Triton's interpreter, or on a GPU.

The interpreter is chosen when triton is imported, so `test_without_gpu.py` runs them in processes of their own.
"""

import os
import random

import pytest
import torch
from torch.utils._pytree import tree_map_only

from tests.reference import random_lists

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MARKS = [] if INTERPRETED else [pytest.mark.gpu]

LISTS = {
    "no samples": [[], [], []],
    "no ids": [[[], []], [[], []], [[], []]],
    "one id": [[[5]], [[]], [[]]],
    "many": random_lists(random.Random(0), lookups=3, samples=60, longest=4, ids=range(9)),
}


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


def programs_backwards(monkeypatch):
    """The interpreter runs the last program of a grid first."""
    from triton.runtime.interpreter import interpreter_builder as builder

    in_order = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: in_order(builder.grid_dim[0] - 1 - x, y, z))
