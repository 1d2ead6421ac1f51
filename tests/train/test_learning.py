"""The whole program on real click logs, against a plain nn.Module that shares nothing with it but the start.

The shards' folder is named by RECFX_CRITEO_SAMPLE; without it these tests are skipped.
"""

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recfx.capture import capture
from recfx.examples import deepfm as program
from recfx.kernels.rows.initial import initial_values
from recfx.optim import SparseOptimizer, sparse_adamw
from recfx.step import Step, TrainState
from recfx.table import initializer_tensors
from recfx.types import Batch
from tests.reference import DeepFM

SAMPLE = os.environ.get("RECFX_CRITEO_SAMPLE")
pytestmark = pytest.mark.skipif(not SAMPLE, reason="RECFX_CRITEO_SAMPLE names no folder")
LR, WEIGHT_DECAY = 1e-3, 0.01


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    args = arguments()
    return list(program.read(args, args.data_paths, drop_remainder=True))


def arguments():
    return program.parse(["--data_paths", str(SAMPLE), "--gradient_accumulation_steps", "1"])


class Oracle:
    """Ids remapped beforehand to rows of one table [rows, 9]; autograd, torch.optim.AdamW's formula on touched rows."""

    def __init__(self, step: Step, params: dict[str, Tensor], batches: list[Batch]) -> None:
        self.model = DeepFM(params).double()
        self.dense = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        columns = [np.concatenate([valid_ids(b, name) for b in batches]) for name in program.CATEGORICAL]
        self.known = [np.unique(c) for c in columns]
        self.first = np.concatenate([[0], np.cumsum([len(k) for k in self.known])])
        keys, init = initializer_tensors(step.plan.tables[0], 42)
        start = [
            initial_values(torch.from_numpy(k), keys[v].expand(len(k), -1), init[v].expand(len(k), -1, -1))
            for v, k in enumerate(self.known)
        ]
        self.rows = nn.Parameter(torch.cat([*start, torch.zeros(1, 9)]).double())  # the last row is for missing ids
        self.m, self.v = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.steps = 0

    def index(self, vocabulary: Tensor, id: Tensor) -> Tensor:
        out = np.empty(len(id), dtype=np.int64)
        for v, known in enumerate(self.known):
            mine = vocabulary.numpy() == v
            out[mine] = self.first[v] + np.searchsorted(known, id.numpy()[mine])
        return torch.from_numpy(out)

    def train(self, batch: Batch) -> float:
        label, numeric = batch["label"].double(), torch.zeros(len(batch["label"]), 13, dtype=torch.float64)
        index = torch.full((len(label), 26), len(self.rows) - 1)
        for j, name in enumerate(program.NUMERIC):
            present = batch[name].offsets.diff() > 0
            numeric[present, j] = torch.log1p(valid(batch, name).clamp(min=0)).double()
        for j, name in enumerate(program.CATEGORICAL):
            present = batch[name].offsets.diff() > 0
            ids = torch.from_numpy(valid_ids(batch, name))
            index[present, j] = self.index(torch.full_like(ids, j), ids)
        looked_up = self.rows[index]
        loss = nn.functional.binary_cross_entropy_with_logits(
            self.model(looked_up[:, :, :8], looked_up[:, :, 8:], numeric), label
        )
        self.dense.zero_grad()
        self.rows.grad = None
        loss.backward()
        self.dense.step()
        self.update_rows(index.unique()[:-1] if (index == len(self.rows) - 1).any() else index.unique())
        return float(loss.detach())

    @torch.no_grad()
    def update_rows(self, row: Tensor) -> None:
        self.steps += 1
        g = self.rows.grad[row]
        self.m[row] = 0.9 * self.m[row] + 0.1 * g
        self.v[row] = 0.999 * self.v[row] + 0.001 * g**2
        m, v = self.m[row] / (1 - 0.9**self.steps), self.v[row] / (1 - 0.999**self.steps)
        self.rows[row] = self.rows[row] * (1 - LR * WEIGHT_DECAY) - LR * m / (v.sqrt() + 1e-8)


def valid(batch: Batch, name: str) -> Tensor:
    return batch[name].values[: int(batch[name].offsets[-1])]


def valid_ids(batch: Batch, name: str) -> np.ndarray:
    return valid(batch, name).numpy()


def differences(batches: list[Batch], optimizer: SparseOptimizer, run_of: Callable) -> tuple[float, float]:
    """Largest relative difference of a batch's loss, and of a touched row, over one epoch."""
    step, state = program.build_step(arguments(), sparse_optimizer=optimizer)
    oracle = Oracle(step, state.params, batches)
    run = run_of(step, state, batches[0])
    worst_loss = 0.0
    for batch in batches:
        state, aux = run(state, batch)
        expected = oracle.train(batch)
        worst_loss = max(worst_loss, abs(float(aux.loss) - expected) / expected)
    table = state.tables[0]
    num_rows = int(table.num_rows)
    expected_rows = oracle.rows.detach()[oracle.index(table.vocabularies[:num_rows], table.ids[:num_rows])]
    worst_row = (table.rows[:num_rows, 0] - expected_rows).abs().max()
    return worst_loss, float(worst_row)


def captured(step: Step, state: TrainState, batch: Batch) -> Callable:
    return capture(step, state, batch)


def eager(step: Step, state: TrainState, batch: Batch) -> Callable:
    return step.update_


def skipping_one_row_in_ten(optimizer: SparseOptimizer) -> SparseOptimizer:
    def apply_(state, scale, due, columns, most_rows):
        skipped = state.unique_rows[: int(state.num_unique)].long()
        skipped = skipped[skipped % 10 == 0]
        kept = state.rows[skipped]
        state = optimizer.apply_(state, scale, due, columns, most_rows)
        state.rows[skipped] = kept
        return state

    return optimizer._replace(apply_=apply_)


LOSS_TOLERANCE, ROW_TOLERANCE = 5e-6, 1e-5  # relative; absolute, a hundredth of one step of the learning rate


def test_captured_training_is_the_oracle_s(batches):
    worst_loss, worst_row = differences(batches, sparse_adamw(LR, weight_decay=WEIGHT_DECAY), captured)
    assert worst_loss < LOSS_TOLERANCE
    assert worst_row < ROW_TOLERANCE


@pytest.mark.parametrize(
    "broken",
    [sparse_adamw(LR, weight_decay=0.0), skipping_one_row_in_ten(sparse_adamw(LR, weight_decay=WEIGHT_DECAY))],
    ids=["no sparse decay", "one row update in ten left out"],
)
def test_a_broken_optimiser_would_be_seen(batches, broken):
    worst_loss, worst_row = differences(batches, broken, eager)
    assert worst_loss > LOSS_TOLERANCE
    assert worst_row > ROW_TOLERANCE
