"""place_rows_: rows to their places in a table."""

from __future__ import annotations

import torch
from torch import Tensor

from recfx.kernels.op import address, c_function, define_op

__all__ = ["place_rows_"]


def definition(target: Tensor, source: Tensor, at: Tensor) -> None:
    """target[at[k]] = source[k] where at[k] >= 0; the other rows are left out.

    Shapes:   target [C, ...], its rows without gaps inside but perhaps between them; source [n, ...] contiguous, of the
              same dtype; at i32 [n], distinct where not negative.
    """
    kept = torch.nonzero(at >= 0)[:, 0]
    target[at[kept].long()] = source[kept]


_place_rows = c_function("place_rows", "piipip")


def _cpu(target: Tensor, source: Tensor, at: Tensor) -> None:
    assert (target.dtype, target.shape[1:]) == (source.dtype, source.shape[1:])
    assert target[:1].is_contiguous()
    assert at.dtype == torch.int32
    row_bytes = source[:1].numel() * source.element_size()
    stride = target.stride(0) * target.element_size()
    _place_rows(target.data_ptr(), stride, row_bytes, address(source), len(source), address(at))


place_rows_ = define_op(
    "place_rows_(Tensor(a!) target, Tensor source, Tensor at) -> ()",
    definition=definition,
    cpu=_cpu,
    fake=lambda *_: None,
)
