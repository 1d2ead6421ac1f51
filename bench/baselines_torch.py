"""DeepFM in plain torch, in five ways, which recfx is measured against. They use no recfx kernel.

Each builder takes the first weights (workload.init_weights) and returns a Baseline whose `step(batch)` trains on one
DenseBatch and returns the loss. AdamW: lr 1e-3, weight decay 0.01, torch's formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import inductor_prims

from bench.harness import NUM_THREADS
from bench.workload import DIM, NUM_COLUMNS, NUM_NUMERICS, DenseBatch, init_weights, make_batches

LR, WEIGHT_DECAY, B1, B2, EPS = 1e-3, 0.01, 0.9, 0.999, 1e-8
TABLES = ("embedding", "bias")


class Baseline(NamedTuple):
    step: Callable[[DenseBatch], Tensor]
    weights: Callable[[], dict[str, Tensor]]  # the current weights, by the names of init_weights


class DeepFM(nn.Module):
    """The formula as published: the oracle of the other baselines, and the model of the eager ones."""

    def __init__(self, weights: dict[str, Tensor], *, sparse: bool = False) -> None:
        super().__init__()
        padding = len(weights["embedding"]) - 1
        self.tables = nn.ModuleDict(
            {
                name: nn.Embedding.from_pretrained(
                    weights[name].clone(), freeze=False, padding_idx=padding, sparse=sparse
                )
                for name in TABLES
            }
        )
        self.dense = nn.ParameterDict({n: nn.Parameter(w.clone()) for n, w in weights.items() if n not in TABLES})

    def forward(self, index_BF: Tensor, num_BN: Tensor) -> Tensor:
        return textbook_logit(self.dense, self.tables["embedding"](index_BF), self.tables["bias"](index_BF), num_BN)

    def weights(self) -> dict[str, Tensor]:
        named = {name: table.weight for name, table in self.tables.items()} | dict(self.dense.items())
        return {name: w.detach() for name, w in named.items()}


class UniqueDeepFM(DeepFM):
    """The same, but each distinct row is looked up once, so gradients have no duplicate rows."""

    def forward(self, index_BF: Tensor, num_BN: Tensor) -> Tensor:
        index_U, of_BF = torch.unique(index_BF, return_inverse=True)
        emb, bias = (self.tables[name](index_U)[of_BF] for name in TABLES)
        return textbook_logit(self.dense, emb, bias, num_BN)


def textbook_logit(p: Mapping[str, Tensor], emb_BFD: Tensor, bias_BF1: Tensor, num_BN: Tensor) -> Tensor:
    """The seed's formula, line by line."""
    batch_size = len(num_BN)
    emb = torch.cat([p["numeric_embedding"].expand(batch_size, -1, -1), emb_BFD], 1)
    bias = torch.cat([p["numeric_bias"].expand(batch_size, -1, -1), bias_BF1], 1)
    scale = torch.cat([num_BN, num_BN.new_ones(batch_size, NUM_COLUMNS)], 1)[:, :, None]
    first = (scale * bias).sum(1)
    second = 0.5 * ((scale * emb).sum(1).square() - (scale * emb).square().sum(1)).sum(1, keepdim=True)
    hidden = F.relu(F.linear(emb.flatten(1), p["w1"], p["b1"]))
    hidden = F.relu(F.linear(hidden, p["w2"], p["b2"]))
    return first + second + F.linear(hidden, p["w3"], p["b3"])


def eager(model: DeepFM, *optimizers: torch.optim.Optimizer) -> Baseline:
    def step(batch: DenseBatch) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(model(batch.row.t(), batch.num), batch.label)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    return Baseline(step, model.weights)


def eager_dense(weights: dict[str, Tensor]) -> Baseline:
    """Dense gradients, fused AdamW over everything: what most people write. Untouched rows decay and move on."""
    model = DeepFM(weights)
    return eager(model, torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True))


def eager_sparse(weights: dict[str, Tensor]) -> Baseline:
    """Sparse gradients and SparseAdam (without weight decay) for the tables, fused AdamW for the rest."""
    return eager_with_sparse_adam(DeepFM(weights, sparse=True))


def eager_unique(weights: dict[str, Tensor]) -> Baseline:
    """`eager_sparse` after torch.unique over the batch's ids."""
    return eager_with_sparse_adam(UniqueDeepFM(weights, sparse=True))


def eager_with_sparse_adam(model: DeepFM) -> Baseline:
    """SparseAdam adds eps to a root of v without bias correction: this eps equals AdamW's at step 1.

    With AdamW's eps, rows of a batch of 1000 move 4 % less, and a check of rows fails.
    """
    return eager(
        model,
        torch.optim.SparseAdam(model.tables.parameters(), lr=LR, eps=EPS * (1 - B2) ** 0.5),
        torch.optim.AdamW(model.dense.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True),
    )


class State(NamedTuple):
    dense: dict[str, Tensor]
    m: dict[str, Tensor]
    v: dict[str, Tensor]
    rows: Tensor  # f32 [C + 1, 27]: embedding and bias, their m, their v
    last_seen: Tensor  # i32 [C + 1], scratch: a position of the row's id in the current batch
    t: Tensor  # f32 []


WIDTH = DIM + 1


def functional_textbook(weights: dict[str, Tensor], *, max_distinct: int) -> Baseline:
    """One compiled graph per step, AdamW on touched rows only, the formula as published.

    Args:     max_distinct: static bound on distinct rows per batch, the padding row included.
    """
    return functional(textbook_step, weights, max_distinct)


def functional_compiled(weights: dict[str, Tensor], *, max_distinct: int) -> Baseline:
    """One compiled graph per step, AdamW on touched rows only: the strongest plain-torch form we know.

    What makes it fast, each found by measuring: ids in column order (threads share no row); de-duplication by
    scattering positions, no sort; one 27-wide gather and one scatter per distinct row; activations dimension-major, so
    that sums over fields are products or vectorised; gradients summed one dimension at a time; and buffers
    materialised where Inductor would fuse a transposition into a row loop and lose its vectors.

    Args:     max_distinct: static bound on distinct rows per batch, the padding row included.
    Cost:     27 (gather, scatter) 4-byte items per distinct row; no work is proportional to the table.
    """
    return functional(functional_step, weights, max_distinct)


def functional(step: Callable, weights: dict[str, Tensor], max_distinct: int) -> Baseline:
    dense = {n: w.clone() for n, w in weights.items() if n not in TABLES}
    m, v = ({n: torch.zeros_like(w) for n, w in dense.items()} for _ in range(2))
    rows = torch.zeros(len(weights["bias"]), 3 * WIDTH)
    rows[:, :DIM], rows[:, DIM : DIM + 1] = weights["embedding"], weights["bias"]
    state = State(dense, m, v, rows, torch.zeros(len(rows), dtype=torch.int32), torch.zeros(()))
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    return Baseline(
        lambda batch: compiled(state, batch, max_distinct),
        lambda: state.dense | {"embedding": state.rows[:, :DIM], "bias": state.rows[:, DIM:WIDTH]},
    )


def textbook_step(state: State, batch: DenseBatch, capacity: int) -> Tensor:
    dense, m, v, rows, last_seen, t = state
    t.add_(1)
    slot, index_U = unique(last_seen, batch.row.t().reshape(-1), capacity)
    slot_BF, rows_U = slot.view(len(batch.num), NUM_COLUMNS), rows[index_U]

    def loss_of(p: dict[str, Tensor], w_U: Tensor) -> Tensor:
        emb, bias = w_U[slot_BF].split([DIM, 1], 2)
        return F.binary_cross_entropy_with_logits(textbook_logit(p, emb, bias, batch.num), batch.label)

    (g_dense, g_U), loss = torch.func.grad_and_value(loss_of, argnums=(0, 1))(dense, rows_U[:, :WIDTH])
    g_U = g_U * (index_U < len(rows) - 1)[:, None]  # no gradient for the padding row
    w_U, m_U, v_U = rows_U.split(WIDTH, 1)
    rows.index_put_((index_U,), torch.cat(adamw(w_U, g_U, m_U, v_U, t), 1))
    update_dense_(dense, m, v, g_dense, t)
    return loss


def functional_step(state: State, batch: DenseBatch, capacity: int) -> Tensor:
    dense, m, v, rows, last_seen, t = state
    t.add_(1)
    batch_size = len(batch.num)
    slot, index_U = unique(last_seen, batch.row.reshape(-1), capacity)
    rows_U = materialised(rows[index_U])
    emb = materialised(materialised(rows_U[:, :DIM][slot]).t().contiguous()).view(DIM * NUM_COLUMNS, batch_size)
    bias_FB = materialised(rows_U[:, DIM][slot]).view(NUM_COLUMNS, batch_size)
    (g_dense, g_emb, g_bias), loss = torch.func.grad_and_value(functional_loss, argnums=(0, 1, 2))(
        dense, emb, bias_FB, batch.num, batch.label
    )

    g = materialised(torch.cat([g_emb.reshape(DIM, -1), g_bias.reshape(1, -1)]))
    g_U = torch.zeros(WIDTH, capacity).scatter_add(1, slot.expand(WIDTH, -1), g)
    g_U = materialised((g_U * (index_U < len(rows) - 1)).t().contiguous())  # no gradient for the padding row
    new_U = materialised(
        torch.cat(adamw(*rows_U[:, :WIDTH].split(WIDTH, 1), g_U, *rows_U[:, WIDTH:].split(WIDTH, 1), t), 1)
    )
    rows.index_put_((index_U,), new_U)
    update_dense_(dense, m, v, g_dense, t)
    return loss


def update_dense_(
    dense: dict[str, Tensor], m: dict[str, Tensor], v: dict[str, Tensor], grads: dict[str, Tensor], t: Tensor
) -> None:
    for name in dense:
        new = adamw(dense[name], grads[name], m[name], v[name], t)
        for old, value in zip((dense[name], m[name], v[name]), new, strict=True):
            old.copy_(value)


def unique(last_seen: Tensor, index: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The number of each index among the distinct ones, and the distinct indices, padded with the padding row."""
    position = torch.arange(len(index), dtype=last_seen.dtype)
    last_seen.index_put_((index,), position)
    winner = last_seen[index]
    slot = materialised(((winner == position).cumsum(0) - 1)[winner])
    padded = torch.full((capacity,), len(last_seen) - 1).index_put((slot,), index)
    return slot, padded


def functional_loss(p: dict[str, Tensor], emb: Tensor, bias_FB: Tensor, num_BN: Tensor, label_B1: Tensor) -> Tensor:
    """The formula with sums over fields as one product, dimension-major: emb is [8 * 26, B], dimension outside."""
    num_const = NUM_NUMERICS * DIM  # the numeric embeddings enter the MLP unscaled: constant over the batch
    w1_num, w1_emb = p["w1"][:, :num_const], p["w1"][:, num_const:]
    hidden_width = len(w1_emb)
    w1_emb = w1_emb.reshape(hidden_width, NUM_COLUMNS, DIM).transpose(1, 2).reshape(hidden_width, -1)
    sum_fields = torch.eye(DIM).repeat_interleave(NUM_COLUMNS, 1)
    product = torch.cat([w1_emb, sum_fields]) @ emb
    total = product[hidden_width:] + p["numeric_embedding"].t() @ num_BN.t()
    hidden = F.relu(product[:hidden_width] + (p["b1"] + w1_num @ p["numeric_embedding"].reshape(-1))[:, None])
    hidden = F.relu(p["w2"] @ hidden + p["b2"][:, None])
    num_squares = num_BN.square() @ p["numeric_embedding"].square().sum(1, keepdim=True)
    second = 0.5 * (total.square().sum(0) - emb.square().sum(0) - num_squares[:, 0])
    first = bias_FB.sum(0) + (num_BN @ p["numeric_bias"])[:, 0]
    logit = first + second + (p["w3"] @ hidden)[0] + p["b3"]
    return F.binary_cross_entropy_with_logits(logit, label_B1[:, 0])


def adamw(w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m = B1 * m + (1 - B1) * g
    v = B2 * v + (1 - B2) * g * g
    w = w * (1 - LR * WEIGHT_DECAY) - LR / (1 - B1**t) * m / ((v / (1 - B2**t)).sqrt() + EPS)
    return w, m, v


def materialised(x: Tensor) -> Tensor:
    """Makes Inductor write `x` to memory instead of fusing it into its readers."""
    return inductor_prims.force_stride_order(x, x.stride())


# --- in a child process: see harness.Child ---------------------------------------------------------------------------


def child_loop(
    variant: str, num_batches: int, batch_size: int, table_rows: int, seed: int
) -> tuple[Callable[[int], Tensor], Callable[[Tensor], None]]:
    """(run k-th step, wait for its result) of a variant: `eager_dense`, `eager_sparse`, `functional_...`."""
    torch.set_num_threads(NUM_THREADS)
    work = make_batches(num_batches, batch_size, table_rows=table_rows, seed=seed)
    weights = init_weights(table_rows, seed=seed)
    build = {
        "eager_dense": eager_dense,
        "eager_sparse": eager_sparse,
        "eager_unique": eager_unique,
        "functional_compiled": partial(functional_compiled, max_distinct=max(work.num_distinct) + 1),
        "functional_textbook": partial(functional_textbook, max_distinct=max(work.num_distinct) + 1),
    }
    step = build[variant](weights).step
    return (lambda k: step(work.dense[k % num_batches])), lambda _: None
