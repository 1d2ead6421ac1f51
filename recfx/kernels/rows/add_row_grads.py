"""add_row_grads_: the gradient of each unique row, summed over its occurrences."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from recfx.kernels.op import define_op

__all__ = ["add_row_grads_", "add_row_grads_atomic_"]


def definition(
    grads: Tensor,
    inverse_P: Tensor,
    cell_P: Tensor,
    firsts: Sequence[int],
    dims: Sequence[int],
    blocks: Sequence[Tensor],
    weight_P: Tensor | None = None,
) -> None:
    """grads[inverse[k], firsts[s]:][:dims[s]] += weight[k] blocks[s][sample(k), lookup(k)], ids in order.

    Sums are f32: of a row with 2**24 occurrences or more in a step, small terms may be lost.

    Shapes:   grads f32 [U, W], inverse_P i32 [P] (negative: no gradient), cell_P i32 [P] as in `find`,
              blocks[s] f32 [B, L, dims[s]], weight_P f32 [P], without it 1.
    """
    kept = (cell_P >= 0) & (inverse_P >= 0)
    unique, cell = inverse_P[kept].long(), cell_P[kept].long()
    for first, dim, block in zip(firsts, dims, blocks, strict=True):
        of_id = block.flatten(0, 1)[cell]
        of_id = of_id if weight_P is None else of_id * weight_P[kept][:, None]
        grads[:, first : first + dim].index_add_(0, unique, of_id)


add_row_grads_ = define_op(
    "add_row_grads_",
    definition=definition,
    cuda="rows.gpu.add_row_grads",
    fake=lambda *_: None,
)

# The same with sums in whatever order a GPU's adders come: a little faster, and not the same bytes from run to run.
add_row_grads_atomic_ = define_op(
    "add_row_grads_atomic_",
    definition=definition,
    on_cpu=False,
    cuda="rows.gpu.add_row_grads",
    fake=lambda *_: None,
)
