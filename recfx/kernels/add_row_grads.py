"""add_row_grads_: the gradient of each unique row, summed over its occurrences."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from recfx.kernels.op import address, addresses, c_function, define_op, int64s, lookup_positions

__all__ = ["add_row_grads_"]


def definition(
    grads: Tensor,
    inverse_P: Tensor,
    offsets: Tensor,
    starts: Sequence[int],
    vocabularies: Tensor,
    firsts: Sequence[int],
    dims: Sequence[int],
    blocks: Sequence[Tensor],
) -> None:
    """grads[inverse[p], firsts[s]:][:dims[s]] += blocks[s][sample(p), lookup(p)], positions in order.

    Shapes:   grads f32 [U, W], inverse_P i32 [P] (negative: no gradient), blocks[s] f32 [B, L, dims[s]];
              reading list as in `find`.
    """
    position, sample, lookup = lookup_positions(offsets, starts)
    unique = inverse_P[position].long()
    kept = unique >= 0
    for first, dim, block in zip(firsts, dims, blocks, strict=True):
        grads[:, first : first + dim].index_add_(0, unique[kept], block[sample[kept], lookup[kept]])


_add_row_grads = c_function("add_row_grads", "pi" + "ppp" + "pii" + "ippp")


def _cpu(grads, inverse_P, offsets, starts, vocabularies, firsts, dims, blocks):  # type: ignore[no-untyped-def]
    blocks = [block.contiguous() for block in blocks]
    _add_row_grads(
        address(grads),
        grads.shape[1],
        address(inverse_P),
        address(offsets),
        int64s(starts),
        address(vocabularies),
        len(starts),
        offsets.shape[1] - 1,
        len(dims),
        int64s(firsts),
        int64s(dims),
        addresses(blocks),
    )


add_row_grads_ = define_op(
    "add_row_grads_(Tensor(a!) grads, Tensor inverse_P, Tensor offsets, int[] starts, Tensor vocabularies,"
    " int[] firsts, int[] dims, Tensor[] blocks) -> ()",
    definition=definition,
    cpu=_cpu,
    fake=lambda *_: None,
)
