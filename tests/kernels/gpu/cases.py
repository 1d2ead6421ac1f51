"""What the tests of the Triton kernels share. They run on CPU tensors under Triton's interpreter, or on a GPU.

The interpreter is chosen when triton is imported, so `test_without_gpu.py` runs them in processes of their own.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

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


def amid(t: torch.Tensor) -> torch.Tensor:
    """The same numbers in the middle of a larger memory: what lies next to them can be read, but is not theirs."""
    return t.new_full((t.numel() + 128,), 77)[64 : 64 + t.numel()].copy_(t)


def memory_of(arguments) -> np.ndarray:
    """First address and end of what a launch may touch, u64 [n, 2], rising and apart.

    A contiguous tensor is its items, another one its storage. Bytes are read in aligned words of eight, as memory is
    given out in larger pieces than those: such a word is a tensor's if one byte of it is.
    """
    spans = []
    for t in tree_leaves(arguments):
        if isinstance(t, torch.Tensor) and t.numel():
            begin, size = t.data_ptr(), t.numel() * t.element_size()
            if not t.is_contiguous():
                begin, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
            word = 8 if t.dtype == torch.uint8 else 1
            spans.append([begin // word * word, -(-(begin + size) // word) * word])
    joined: list[list[int]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    return np.array(joined, np.uint64).reshape(-1, 2)


@contextmanager
def addresses_inside() -> Iterator[None]:
    """Under the interpreter an access outside the tensors of its launch raises InterpreterError. A GPU checks less."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    builder, launches, spans = interpreter.interpreter_builder, interpreter.GridExecutor, np.zeros((0, 2), np.uint64)
    on_host = launches._init_args_hst

    def launched(self, *args):
        nonlocal spans
        arguments = on_host(self, *args)
        spans = memory_of(arguments)
        return arguments

    def checked(access, place, mask_place):
        def call(*args):
            pointers, mask = args[place], mask_place is None or args[mask_place].data
            at = pointers.data[np.broadcast_to(mask, pointers.data.shape)].astype(np.uint64)
            size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
            span = np.searchsorted(spans[:, 0], at, side="right").astype(np.int64) - 1
            inside = (span >= 0) & (at + np.uint64(size) <= spans[span, 1] if len(spans) else False)
            assert inside.all(), f"{size} bytes outside every tensor of the launch"
            return access(*args)

        return call

    accesses = {  # where the pointers are among the arguments, and the mask
        "create_masked_load": (0, 1), "create_masked_store": (0, 2), "create_atomic_rmw": (1, 3),
        "create_atomic_cas": (0, None),
    }  # fmt: skip
    patches = {name: checked(getattr(builder, name), *places) for name, places in accesses.items()}
    with mock.patch.multiple(builder, **patches), mock.patch.object(launches, "_init_args_hst", launched):
        yield
