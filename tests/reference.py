"""Oracles: slow, obvious, sharing no code with recfx where a number is at stake."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from recfx.embeddings import Embedding, Initializer, LogicalTable, Lookup, TablePlan, truncated_normal
from recfx.table import TableState
from recfx.types import NUM_SAMPLES, Batch, Ragged, pack

MIN_INT64, MAX_INT64 = -(2**63), 2**63 - 1
EXTREMES = (MIN_INT64, MIN_INT64 + 1, -1, 0, 1, 2**31, 2**52 + 1, 2**53 + 1, MAX_INT64 - 1, MAX_INT64)
UNKNOWN, REFUSED = -1, -2
Lists = list[list[list[int]]]  # [lookup or feature][sample] -> ids


# Hash and initial values, in Python integers.


def mix(x: int) -> int:
    multiplier, low = 0xD6E8FEB86659FD93, 2**64 - 1
    x = (x ^ x >> 32) * multiplier & low
    x = (x ^ x >> 32) * multiplier & low
    return x ^ x >> 32


def id_of_hash(hash: int, vocabulary: int) -> int:
    """The id that `hash_id` with salt 0 maps to `hash`: for ids that collide as an adversary would choose them."""
    inverse, low = pow(0xD6E8FEB86659FD93, -1, 2**64), 2**64 - 1
    x = hash ^ hash >> 32
    x = x * inverse & low
    x = (x ^ x >> 32) * inverse & low
    x = (x ^ x >> 32) - (vocabulary + 1) * 0x9E3779B97F4A7C15 & low
    return x - 2**64 * (x >= 2**63)


def initial_value(seed: int, name: str, id: int, column: int, init: Initializer) -> float:
    digest = hashlib.blake2b(f"{seed}/{name}/{column}".encode(), digest_size=8).digest()
    bits = mix((id * 0x9E3779B97F4A7C15 % 2**64) ^ int.from_bytes(digest, "little")) >> 41
    x = (2 * bits + 1 - 2**23) / 2**23
    quantile = NormalDist().inv_cdf((1 + init.cover * x) / 2) if init.cover else x
    return init.loc + init.scale * quantile


# The table.


class Reading(NamedTuple):
    """What the kernels read: the ids of several lookups in the table's order, and padding."""

    id: Tensor
    cell: Tensor
    vocabularies: Tensor


class DictTable:
    """`row = d.setdefault((vocabulary, id), lowest row not in use)`, and numbers of the distinct rows of a step."""

    def __init__(self, max_rows: int = 2**31, max_unique: int = 2**31) -> None:
        self.max_rows, self.max_unique = max_rows, max_unique
        self.rows: dict[tuple[int, int], int] = {}
        self.unique: dict[int, int] = {}
        self.freed: set[int] = set()
        self.num_looked_up = self.num_created = self.num_evicted = self.num_refused = self.num_unadmitted = 0
        self.num_hits = 0

    def insert(self, reading: Reading, admit: Sequence[bool] | None = None) -> tuple[list[int], list[int]]:
        row_P, inverse_P = ([UNKNOWN] * reading.id.numel() for _ in range(2))
        for _, l, p in positions(reading):
            self.num_looked_up += 1
            key = (int(reading.vocabularies[l]), int(reading.id[p]))
            is_known = key in self.rows
            if key not in self.rows and admit is not None and not admit[p]:
                row_P[p] = REFUSED
                self.num_unadmitted += 1
                continue
            if key not in self.rows and len(self.rows) >= self.max_rows:
                row_P[p] = REFUSED
                self.num_refused += 1
                continue
            if key not in self.rows:
                self.rows[key] = min(self.freed, default=len(self.rows))
                self.freed.discard(self.rows[key])
                self.num_created += 1
            row = row_P[p] = self.rows[key]
            if row not in self.unique and len(self.unique) >= self.max_unique:
                self.num_refused += 1
                continue
            inverse_P[p] = self.unique.setdefault(row, len(self.unique))
            self.num_hits += is_known
        return row_P, inverse_P

    def find(self, reading: Reading) -> list[int]:
        row_P = [UNKNOWN] * reading.id.numel()
        for _, l, p in positions(reading):
            row_P[p] = self.rows.get((int(reading.vocabularies[l]), int(reading.id[p])), UNKNOWN)
        return row_P

    def evict(self, keys: Iterable[tuple[int, int]]) -> None:
        for key in list(keys):
            self.freed.add(self.rows.pop(key))
            self.num_evicted += 1

    def keys(self) -> list[tuple[int, int] | None]:
        """By row number, None where a row is freed."""
        by_row = {row: key for key, row in self.rows.items()}
        return [by_row.get(row) for row in range(len(self.rows) + len(self.freed))]

    def tally(self) -> list[int]:
        return [self.num_looked_up, self.num_created, self.num_evicted, self.num_unadmitted]

    def next_step(self) -> None:
        self.unique.clear()


def positions(reading: Reading) -> Iterator[tuple[int, int, int]]:
    """(sample, lookup, position) of every id that is not padding, in the table's order."""
    for p, cell in enumerate(reading.cell.tolist()):
        if cell >= 0:
            yield *divmod(cell, len(reading.vocabularies)), p


# Batches.


def ragged(lists: Sequence[Sequence], *, spare: int = 0, dtype: torch.dtype = torch.int64) -> Ragged:
    """`spare` places of padding, filled with a value that would be noticed."""
    values = [v for items in lists for v in items] + [77] * spare
    ends = [0]
    for items in lists:
        ends.append(ends[-1] + len(items))
    return Ragged(torch.tensor(values, dtype=dtype), torch.tensor(ends, dtype=torch.int32))


def reading_of(lists: Lists, vocabularies: Sequence[int], *, spare: int = 0) -> Reading:
    id, cell = [], []
    for b in range(len(lists[0])):
        for l, lookup in enumerate(lists):
            id += lookup[b]
            cell += [b * len(lists) + l] * len(lookup[b])
    id += [0] * spare * len(lists)
    cell += [-1] * spare * len(lists)
    ints = [torch.tensor(cell, dtype=torch.int32), torch.tensor(list(vocabularies), dtype=torch.int32)]
    return Reading(torch.tensor(id, dtype=torch.int64), *ints)


def scattered(rng: random.Random, reading: Reading) -> tuple[Reading, Tensor]:
    """The reading with padding put in anywhere, ids there that would be noticed; and where its own positions are."""
    id, cell, at = [], [], []
    for i, c in zip(reading.id.tolist(), reading.cell.tolist(), strict=True):
        num = rng.choice((0, 0, 0, 1, 2, 90))
        id += [rng.choice((7, *reading.id.tolist()))] * num
        cell += [-1] * num
        at.append(len(id))
        id.append(i)
        cell.append(c)
    ints = torch.tensor(cell, dtype=torch.int32), reading.vocabularies
    return Reading(torch.tensor(id, dtype=torch.int64), *ints), torch.tensor(at, dtype=torch.int64)


def random_lists(rng: random.Random, *, lookups: int, samples: int, longest: int, ids: Sequence[int]) -> Lists:
    return [[rng.choices(ids, k=rng.randint(0, longest)) for _ in range(samples)] for _ in range(lookups)]


class Stream(NamedTuple):
    """Batches for one table of several vocabularies."""

    vocabularies: list[int]  # of each lookup
    batches: list[Lists]
    spare: int

    def readings(self) -> list[Reading]:
        return [reading_of(lists, self.vocabularies, spare=self.spare) for lists in self.batches]


@st.composite
def streams(draw: st.DrawFn, max_batches: int = 4) -> Stream:
    """Few distinct ids, so that duplicates abound; empty lists and batches, several ids a list, shared vocabularies."""
    vocabularies = draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    id = st.sampled_from(EXTREMES) | st.integers(-5, 5) | st.integers(MIN_INT64, MAX_INT64)
    samples = draw(st.integers(0, 4))
    lists = st.lists(st.lists(id, max_size=3), min_size=samples, max_size=samples)
    batch = st.lists(lists, min_size=len(vocabularies), max_size=len(vocabularies))
    return Stream(vocabularies, draw(st.lists(batch, min_size=1, max_size=max_batches)), draw(st.integers(0, 2)))


def table_plan(
    vocabularies: Sequence[int], dims: Sequence[int] = (3, 1), *, unknown: Literal["zeros", "initial"] = "zeros"
) -> TablePlan:
    """A physical table with one lookup per entry; vocabulary v holds logical tables 'v<v>.<k>' of width dims[k]."""
    columns = [
        tuple(
            LogicalTable(
                f"v{v}.{k}", sum(dims[:k]), dim, truncated_normal(0.5, mean=0.1 * v, bound=2.0), unknown=unknown
            )
            for k, dim in enumerate(dims)
        )
        for v in range(max(vocabularies) + 1)
    ]
    lookups = tuple(Lookup(f"f{l}", v) for l, v in enumerate(vocabularies))
    return TablePlan(device="cpu", dims=tuple(dims), vocabularies=tuple(columns), lookups=lookups)


def features_of(lists: Lists, *, spare: int = 0) -> dict[str, Ragged]:
    """The features that `table_plan`'s lookups read."""
    return {f"f{l}": ragged(lookup, spare=spare) for l, lookup in enumerate(lists)}


def assert_same_table(a: TableState, b: TableState, *, exact_rows: bool = True) -> None:
    """Equal in all that an id can see; slots, which depend on the order of insertion, are compared as a set of rows."""
    num_rows, num_unique = int(a.num_rows), int(a.num_unique)
    for name in ("num_rows", "num_free", "num_refused", "step", "num_unique", "salt"):
        assert int(getattr(a, name)) == int(getattr(b, name)), name
    assert a.tally.tolist() == b.tally.tolist()
    assert torch.equal(a.free_rows[: int(a.num_free)], b.free_rows[: int(a.num_free)])
    for name in ("ids", "vocabularies", "seen", "born", "counts"):
        assert torch.equal(getattr(a, name)[:num_rows], getattr(b, name)[:num_rows]), name
    assert torch.equal(a.unique_rows[:num_unique], b.unique_rows[:num_unique])
    tolerance = {} if exact_rows else {"rtol": 1e-5, "atol": 1e-6}
    for x, y in ((a.rows[:num_rows], b.rows[:num_rows]), (a.grads[:num_unique], b.grads[:num_unique])):
        assert torch.equal(x, y) if exact_rows else torch.allclose(x, y, **tolerance)
    for s in (a, b):
        used = s.slots[: int(s.num_slots)]
        live = torch.nonzero(s.vocabularies[:num_rows] >= 0)[:, 0]
        assert sorted((used[used != -1] & 0xFFFFFFFF).tolist()) == live.tolist()


# The model.


def fm(weight: Tensor, emb: Tensor) -> Tensor:
    """Second-order term by the definition: sum over pairs of fields of w_f w_g <E_f, E_g>."""
    num_samples, num_fields = emb.shape[:2]
    out = []
    for b in range(num_samples):
        pairs = [
            weight[b, f] * weight[b, g] * (emb[b, f] * emb[b, g]).sum()
            for f in range(num_fields)
            for g in range(f + 1, num_fields)
        ]
        out.append(sum(pairs, torch.zeros((), dtype=emb.dtype)))
    return torch.stack(out)[:, None]


class DeepFM(nn.Module):
    """The seed's formula as it stands; category embeddings and biases come from outside."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.numeric_emb = nn.Parameter(params["numeric_emb"].clone())
        self.numeric_bias = nn.Parameter(params["numeric_bias"].clone())
        self.layers = nn.ModuleList()
        for i in range(sum(name.startswith("dnn.") for name in params) // 2):
            weight = params[f"dnn.{i}.weight"]
            layer = nn.Linear(*weight.shape)
            layer.weight = nn.Parameter(weight.T.clone())
            layer.bias = nn.Parameter(params[f"dnn.{i}.bias"].clone())
            self.layers.append(layer)

    def forward(self, emb_BFD: Tensor, bias_BF1: Tensor, numeric_BN: Tensor) -> Tensor:
        num_samples, num_sparse, _ = emb_BFD.shape
        emb = torch.cat([self.numeric_emb.expand(num_samples, -1, -1), emb_BFD], dim=1)
        bias = torch.cat([self.numeric_bias.expand(num_samples, -1, -1), bias_BF1], dim=1)
        weight = torch.cat([numeric_BN, numeric_BN.new_ones(num_samples, num_sparse)], dim=1)[:, :, None]
        first = (weight * bias).sum(dim=1)
        second = 0.5 * (((weight * emb).sum(1) ** 2) - (weight**2 * emb**2).sum(1)).sum(1, keepdim=True)
        x = emb.flatten(1)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return first + second + self.layers[-1](x)

    def params(self) -> dict[str, Tensor]:
        """Under recfx's names."""
        named = {"numeric_emb": self.numeric_emb, "numeric_bias": self.numeric_bias}
        for i, layer in enumerate(self.layers):
            named |= {f"dnn.{i}.weight": layer.weight.T, f"dnn.{i}.bias": layer.bias}
        return named

    def grads(self) -> dict[str, Tensor]:
        named = {"numeric_emb": self.numeric_emb.grad, "numeric_bias": self.numeric_bias.grad}
        for i, layer in enumerate(self.layers):
            named |= {f"dnn.{i}.weight": layer.weight.grad.T, f"dnn.{i}.bias": layer.bias.grad}
        return named


# The step.


class Sample(NamedTuple):
    label: float
    numeric: list[float]  # one per numeric feature, already as the model wants it
    ids: dict[str, list[int]]  # by feature


def random_samples(
    rng: random.Random, num: int, *, features: Sequence[str], num_numeric: int, ids: Sequence[int], longest: int = 2
) -> list[Sample]:
    return [
        Sample(
            float(rng.random() < 0.4),
            [rng.gauss(0, 1) for _ in range(num_numeric)],
            {name: rng.choices(ids, k=rng.randint(0, longest)) for name in features},
        )
        for _ in range(num)
    ]


def pack_samples(samples: Sequence[Sample], batch_size: int, *, capacity: int) -> Batch:
    """A batch of `batch_size`, padded with empty samples: "label", "numeric" and a Ragged per sparse feature."""
    num_padding = batch_size - len(samples)
    num_numeric = len(samples[0].numeric)
    columns: dict[str, Tensor | Ragged] = {
        "label": torch.tensor([[s.label] for s in samples] + [[9.0]] * num_padding),
        "numeric": torch.tensor([s.numeric for s in samples] + [[99.0] * num_numeric] * num_padding),
        NUM_SAMPLES: torch.tensor(len(samples), dtype=torch.int32),
    }
    for name in samples[0].ids:
        lists = [s.ids[name] for s in samples] + [[]] * num_padding
        columns[name] = ragged(lists, spare=capacity - sum(map(len, lists)))
    return pack(columns)


class NaiveTrainer:
    """DeepFM training in float64 with a leaf tensor per logical row, torch autograd, and AdamW in plain loops.

    Args:  groups: "emb" and "bias"; an embedding of a sample's list is the sum or mean of its rows.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        groups: Mapping[str, Sequence[Embedding]],
        *,
        seed: int,
        lr: float,
        weight_decay: float = 0.01,
    ) -> None:
        self.model = DeepFM(params).double()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=weight_decay)
        self.groups, self.seed, self.lr, self.weight_decay = groups, seed, lr, weight_decay
        self.weights: dict[tuple[str, int], Tensor] = {}
        self.moments: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.step = 0

    def row(self, name: str, id: int, e: Embedding) -> Tensor:
        if (name, id) not in self.weights:
            values = [initial_value(self.seed, name, id, column, e.init) for column in range(e.dim)]
            self.weights[name, id] = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        return self.weights[name, id]

    def pooled(self, group: str, samples: Sequence[Sample], touched: set) -> Tensor:
        out = []
        for s in samples:
            cells = []
            for e in self.groups[group]:
                name = e.shared_name or f"{group}/{e.feature}"
                ids = s.ids[e.feature]
                total = torch.zeros(e.dim, dtype=torch.float64)
                for id in ids:
                    total = total + self.row(name, id, e)
                    touched.add((name, id))
                cells.append(total / len(ids) if ids and e.combiner == "mean" else total)
            out.append(torch.stack(cells))
        return torch.stack(out)

    def loss_of(self, samples: Sequence[Sample], touched: set) -> tuple[Tensor, Tensor]:
        emb, bias = (self.pooled(group, samples, touched) for group in ("emb", "bias"))
        logit = self.model(emb, bias, torch.tensor([s.numeric for s in samples], dtype=torch.float64))
        label = torch.tensor([[s.label] for s in samples], dtype=torch.float64)
        return nn.functional.binary_cross_entropy(torch.sigmoid(logit), label), logit

    def train(self, samples: Sequence[Sample]) -> float:
        """One optimiser step on the mean loss of `samples`."""
        touched: set = set()
        loss, _ = self.loss_of(samples, touched)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        for key in touched:
            self.adamw(key)
        return float(loss.detach())

    def dense_moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """First and second moments of the dense parameters, under recfx's names and shapes."""
        state = {id(p): (s["exp_avg"], s["exp_avg_sq"]) for p, s in self.optimizer.state.items()}
        out = {name: state[id(getattr(self.model, name))] for name in ("numeric_emb", "numeric_bias")}
        for i, layer in enumerate(self.model.layers):
            m, v = state[id(layer.weight)]
            out |= {f"dnn.{i}.weight": (m.T, v.T), f"dnn.{i}.bias": state[id(layer.bias)]}
        return out

    def adamw(self, key: tuple[str, int], b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> None:
        w = self.weights[key]
        m, v = self.moments.get(key, (torch.zeros_like(w), torch.zeros_like(w)))
        m = b1 * m + (1 - b1) * w.grad
        v = b2 * v + (1 - b2) * w.grad**2
        m_hat, v_hat = m / (1 - b1**self.step), v / (1 - b2**self.step)
        new = w * (1 - self.lr * self.weight_decay) - self.lr * m_hat / (v_hat.sqrt() + eps)
        self.moments[key] = (m.detach(), v.detach())
        self.weights[key] = new.detach().requires_grad_()


# Metrics.


def exact_auc(score: Tensor, label: Tensor) -> float:
    """The rank statistic, ties as half."""
    order = torch.argsort(score)
    rank = torch.empty(len(score), dtype=torch.float64)
    rank[order] = torch.arange(1, len(score) + 1, dtype=torch.float64)
    _, group, size = torch.unique(score, return_inverse=True, return_counts=True)
    mean_rank = torch.zeros(len(size), dtype=torch.float64).index_add(0, group, rank) / size
    clicks = label > 0.5
    num_clicks, num_other = int(clicks.sum()), int((~clicks).sum())
    return float((mean_rank[group][clicks].sum() - num_clicks * (num_clicks + 1) / 2) / (num_clicks * num_other))


# Shared small helpers.


def on_threads(num: int, function: Callable, *args: object) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        return function(*args)
    finally:
        torch.set_num_threads(before)


def is_close(a: Tensor, b: Tensor, *, rtol: float = 1e-5, atol: float = 1e-7) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol)


def quantile_bound(bound: float) -> float:
    return math.erf(bound / math.sqrt(2))
