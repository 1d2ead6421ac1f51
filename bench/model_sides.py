"""DCN-v2, FinalNet and DIN: the captured step of `recfx.models`, and torch.compile of plain modules of the same models.

Both train on the same batches from the same weights, AdamW on all dense parameters and on the rows that a batch
touches. recfx gets 64-bit ids, the opponent their rows of one stacked table (missing or padding: a last row of zeros),
and its whole step is one compiled graph, with the ids in column order (see `baselines_torch.functional_compiled`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.baselines_torch import LR, WEIGHT_DECAY, adamw, unique, update_dense_
from bench.harness import NUM_THREADS
from bench.recfx_side import insert_universe
from bench.workload import CATEGORICAL, DIM, NUM_COLUMNS, NUM_NUMERICS, make_batches, raw_ids
from recfx.capture import capture
from recfx.embeddings import Embedding
from recfx.models import dcnv2, din, finalnet
from recfx.optim import adamw as dense_adamw
from recfx.optim import sparse_adamw
from recfx.step import Step, TrainState, train_step
from recfx.types import Batch, Ragged, pack

TABLE_ROWS, NUM_BATCHES = 200_000, 16
ITEMS = "c20"  # the largest column: items and histories are ids of it
LONGEST, MEAN = 50, 15  # items of a history: lengths are geometric, cut at LONGEST
SIZES = {"num_sparse": NUM_COLUMNS, "num_numeric": NUM_NUMERICS, "dim": DIM}
CONFIGS: dict[str, Any] = {
    "dcnv2": (dcnv2, dcnv2.DCNv2Config(**SIZES, num_cross=3, hidden=(64, 16))),
    "dcnv2_rank8": (dcnv2, dcnv2.DCNv2Config(**SIZES, num_cross=2, rank=8, experts=2, hidden=(64, 16))),
    "finalnet": (finalnet, finalnet.FinalNetConfig(**SIZES, blocks=((64, 16), (64, 16)))),
    "din": (din, din.DINConfig(**SIZES, attention=16, hidden=(64, 16))),
}
CONFIGS["din_full"] = CONFIGS["din"]  # each history has LONGEST items
DENSE_PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "mkl::_mkl_linear",
    "mkldnn::_linear_pointwise",
)


class PlainBatch(NamedTuple):
    """What the opponent gets."""

    row: Tensor  # i64 [26 B], or with a history [26 B + B + LONGEST B]: columns, items, places of histories
    num: Tensor  # f32 [B, 13]
    length: Tensor  # i64 [B]
    label: Tensor  # f32 [B, 1]


class Work(NamedTuple):
    batches: list[Batch]
    plain: list[PlainBatch]
    universe: dict[str, Tensor]
    max_distinct: int


def work_of(name: str, batch_size: int) -> Work:
    """NUM_BATCHES batches; the items of DIN are ids of the largest column, drawn as that column's are."""
    drawn, rng = make_batches(NUM_BATCHES, batch_size, table_rows=TABLE_ROWS), np.random.default_rng(0)
    items = torch.cat([dense.row[CATEGORICAL.index(ITEMS)] for dense in drawn.dense])
    items = items[items < TABLE_ROWS].numpy()
    batches, plain = [], []
    for packed, dense in zip(drawn.batches, drawn.dense, strict=True):
        columns = {"label": dense.label, "numeric": dense.num, **{c: packed[c] for c in CATEGORICAL}}
        rows, length = [dense.row.flatten()], torch.zeros(batch_size, dtype=torch.int64)
        if name.startswith("din"):
            lengths = np.minimum(rng.geometric(1 / (MEAN + 1), batch_size) - 1, LONGEST)
            length = torch.from_numpy(np.full(batch_size, LONGEST) if name == "din_full" else lengths)
            there = torch.arange(LONGEST) < length[:, None]
            item = torch.from_numpy(rng.choice(items, batch_size))
            places = torch.full((batch_size, LONGEST), TABLE_ROWS)
            places[there] = torch.from_numpy(rng.choice(items, int(length.sum())))
            values = torch.zeros(batch_size * (LONGEST if name == "din_full" else 2 * MEAN), dtype=torch.int64)
            values[: int(length.sum())] = raw_ids(places[there])
            offsets = torch.cat([torch.zeros(1), length.cumsum(0)]).int()
            columns |= {"item": raw_ids(item[:, None]), "history": Ragged(values, offsets)}
            rows += [item, places.t().flatten()]
        batches.append(pack(columns))
        plain.append(PlainBatch(torch.cat(rows), dense.num, length, dense.label))
    return Work(batches, plain, drawn.universe, max(len(p.row.unique()) for p in plain) + 1)


def first_params(name: str) -> dict[str, Tensor]:
    module, config = CONFIGS[name]
    return module.init(config, torch.Generator().manual_seed(0))


def first_rows() -> Tensor:
    """f32 [TABLE_ROWS + 1, DIM], the last one zero."""
    rows = 0.01 * torch.randn(TABLE_ROWS + 1, DIM, generator=torch.Generator().manual_seed(1))
    rows[-1] = 0
    return rows


# --- recfx -----------------------------------------------------------------------------------------------------------


class Ours(NamedTuple):
    step: Callable[[Batch], Tensor]  # the loss of one step
    state: TrainState


def ours(name: str, work: Work, *, backend: Any = "inductor") -> Ours:
    step = step_of(name)
    state = step.init(first_params(name))
    insert_universe(step, state, work.universe)
    state.tables[0].rows[:TABLE_ROWS, 0, :DIM] = first_rows()[:-1]
    run = capture(step, state, work.batches[0], backend=backend)
    return Ours(lambda batch: run(state, batch)[1].loss, state)


def step_of(name: str) -> Step:
    def on(feature: str, **how: Any) -> Embedding:
        is_item = feature in (ITEMS, "item", "history")
        return Embedding(feature, dim=DIM, shared_name="items" if is_item else None, **how)

    groups = {"emb": [on(c) for c in CATEGORICAL]}
    if name.startswith("din"):
        groups |= {"target": [on("item")], "history": [on("history", combiner=None)]}
    return train_step(
        features=dict,
        embeddings=groups,
        forward=CONFIGS[name][0].forward,
        sparse_optimizer=sparse_adamw(LR, weight_decay=WEIGHT_DECAY),
        dense_optimizer=dense_adamw(LR, weight_decay=WEIGHT_DECAY),
        max_rows=2**20,
    )


# --- the opponent ----------------------------------------------------------------------------------------------------


def linears(*sizes: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(n, m) for n, m in itertools.pairwise(sizes))


def through(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers[:-1]:
        x = F.relu(layer(x))
    return layers[-1](x)


class DCNv2(nn.Module):
    def __init__(self, config: dcnv2.DCNv2Config) -> None:
        super().__init__()
        n = config.num_sparse * config.dim + config.num_numeric
        self.cross = nn.ModuleList(
            nn.Linear(n, n) if config.rank is None else LowRank(n, config.rank, config.experts)
            for _ in range(config.num_cross)
        )
        self.dnn = linears(n, *config.hidden)
        self.out = nn.Linear(n + config.hidden[-1], 1)

    def forward(self, emb: Tensor, batch: PlainBatch) -> Tensor:
        x = x0 = torch.cat([emb.flatten(1), batch.num], dim=1)
        for layer in self.cross:
            x = x0 * layer(x) + x
        return self.out(torch.cat([x, F.relu(through(self.dnn, x0))], dim=1))


class LowRank(nn.Module):
    """A loop over experts, as the paper's authors and the libraries that followed write it."""

    def __init__(self, size: int, rank: int, experts: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(experts, size, rank))
        self.inner = nn.Parameter(torch.empty(experts, rank, rank))
        self.up = nn.Parameter(torch.empty(experts, rank, size))
        self.gate = nn.Parameter(torch.empty(size, experts))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        gate = F.softmax(x @ self.gate, dim=1)
        outs = [
            torch.tanh(torch.tanh(x @ down) @ inner) @ up
            for down, inner, up in zip(self.down, self.inner, self.up, strict=True)
        ]
        return (torch.stack(outs, dim=1) * gate[:, :, None]).sum(1) + self.bias


class FinalNet(nn.Module):
    def __init__(self, config: finalnet.FinalNetConfig) -> None:
        super().__init__()
        n = config.num_sparse * config.dim + config.num_numeric
        self.block, self.norm, self.gate, self.out = (nn.ModuleList() for _ in range(4))
        self.context = nn.ParameterList()
        for sizes in config.blocks:
            self.block.append(nn.ModuleList(nn.Linear(a, 2 * b) for a, b in zip((n, *sizes), sizes, strict=False)))
            self.norm.append(nn.ModuleList(nn.LayerNorm(b) for b in sizes))
            self.gate.append(linears(config.context, config.gate, n))
            self.context.append(torch.zeros(1, config.context))
            self.out.append(nn.Linear(sizes[-1], 1))

    def forward(self, emb: Tensor, batch: PlainBatch) -> Tensor:
        x0 = torch.cat([emb.flatten(1), batch.num], dim=1)
        logits = []
        for layers, norms, gate, context, out in zip(
            self.block, self.norm, self.gate, self.context, self.out, strict=True
        ):
            x = x0 * 2 * torch.sigmoid(through(gate, context))
            for layer, norm in zip(layers, norms, strict=True):
                scale, h = layer(x).chunk(2, dim=1)
                x = F.relu(norm(h + scale * h))
            logits.append(out(x))
        return torch.stack(logits).mean(0)


class DIN(nn.Module):
    """Histories as [B, LONGEST, D] and a mask."""

    def __init__(self, config: din.DINConfig) -> None:
        super().__init__()
        self.attention = linears(4 * config.dim, config.attention, 1)
        self.slope = nn.Parameter(torch.empty(config.attention))
        self.dnn = linears((config.num_sparse + 2) * config.dim + config.num_numeric, *config.hidden, 1)

    def forward(self, emb: Tensor, batch: PlainBatch) -> Tensor:
        others, target, history = emb.split([NUM_COLUMNS, 1, LONGEST], dim=1)
        targets = target.expand_as(history)
        hidden = self.attention[0](torch.cat([history, targets, history - targets, history * targets], dim=2))
        weights = self.attention[1](torch.where(hidden > 0, hidden, self.slope * hidden))
        there = torch.arange(LONGEST) < batch.length[:, None]
        user = (torch.where(there[:, :, None], weights, 0.0) * history).sum(1)
        return through(self.dnn, torch.cat([target[:, 0], user, others.flatten(1), batch.num], dim=1))


MODULES = {"dcnv2": DCNv2, "dcnv2_rank8": DCNv2, "finalnet": FinalNet, "din": DIN, "din_full": DIN}


def named_as_modules(name: str, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of `recfx.models` under the names of the module; nn.Linear has its weight transposed."""
    renamed = {}
    for key, p in params.items():
        new = key
        if key.startswith("block.") and ".layer_norm." in key:
            new = key.replace("block.", "norm.").replace(".layer_norm.scale", ".weight")
            new = new.replace(".layer_norm.shift", ".bias")
        elif key.endswith(".context"):
            new = f"context.{key.split('.')[1]}"
        elif key == "attention.0.slope":
            new = "slope"
        renamed[new] = p.t().contiguous() if key.endswith(".weight") and p.dim() == 2 else p.clone()
    return renamed


class State(NamedTuple):
    dense: dict[str, Tensor]
    m: dict[str, Tensor]
    v: dict[str, Tensor]
    rows: Tensor  # f32 [C + 1, 3 DIM]: row, m, v
    last_seen: Tensor  # i32 [C + 1], scratch of `unique`
    t: Tensor  # f32 []


def theirs(name: str, max_distinct: int, *, compiled: bool = True) -> Callable[[PlainBatch], Tensor]:
    """The loss of one step; the graph is that of the module's `forward`, the loss, gradients and updates."""
    module = MODULES[name](CONFIGS[name][1])
    module.load_state_dict(named_as_modules(name, first_params(name)))
    dense = {key: p.detach().clone() for key, p in module.named_parameters()}
    m, v = ({key: torch.zeros_like(p) for key, p in dense.items()} for _ in range(2))
    rows = torch.cat([first_rows(), torch.zeros(TABLE_ROWS + 1, 2 * DIM)], dim=1)
    state = State(dense, m, v, rows, torch.zeros(len(rows), dtype=torch.int32), torch.zeros(()))

    def step(state: State, batch: PlainBatch) -> Tensor:
        state.t.add_(1)
        slot, index_U = unique(state.last_seen, batch.row, max_distinct)
        w_U, m_U, v_U = state.rows[index_U].split(DIM, 1)

        def loss_of(dense: dict[str, Tensor], w_U: Tensor) -> Tensor:
            emb = w_U[slot.view(-1, len(batch.label)).t()]
            logit = torch.func.functional_call(module, dense, (emb, batch))
            return F.binary_cross_entropy_with_logits(logit, batch.label)

        (g_dense, g_U), loss = torch.func.grad_and_value(loss_of, argnums=(0, 1))(state.dense, w_U)
        g_U = g_U * (index_U < TABLE_ROWS)[:, None]  # no gradient for the padding row
        state.rows.index_put_((index_U,), torch.cat(adamw(w_U, g_U, m_U, v_U, state.t), 1))
        update_dense_(state.dense, state.m, state.v, g_dense, state.t)
        return loss

    run = torch.compile(step, fullgraph=True, dynamic=False) if compiled else step
    return lambda batch: run(state, batch)


# --- in a child process: see harness.Child ---------------------------------------------------------------------------


def child_loop(name: str, batch_size: int) -> tuple[Callable[[int], Tensor], Callable[[Tensor], None]]:
    torch.set_num_threads(NUM_THREADS)
    work = work_of(name, batch_size)
    step = theirs(name, work.max_distinct)
    return (lambda k: step(work.plain[k % NUM_BATCHES])), lambda _: None


def share_of_theirs(name: str, batch_size: int) -> float:
    torch.set_num_threads(NUM_THREADS)
    work = work_of(name, batch_size)
    return share_of_products(theirs(name, work.max_distinct), work.plain)


def share_of_products(step: Callable[[Any], Tensor], batches: list[Any]) -> float:
    """Of the time of a pass over the batches, that in dense matrix products."""
    for batch in batches[:3]:
        step(batch)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for batch in batches:
            step(batch)
    times = {event.key: event.self_cpu_time_total for event in record.key_averages()}
    return sum(time for key, time in times.items() if key in DENSE_PRODUCTS) / sum(times.values())
