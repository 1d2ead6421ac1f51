"""A batch cannot crash a process: `pack` is the gate, and feature ops look at columns that did not pass it."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from recfx import features as ops
from recfx import types
from recfx.embeddings import Embedding, plan_tables, tile
from recfx.embeddings.plan import MAX_VOCABULARIES
from recfx.kernels.lists import check_columns, order_lists, select_lists, take_lists
from recfx.kernels.lists.cross_lists import cross_lists
from recfx.kernels.lists.string_hash import farm_hashes, murmur_hashes
from recfx.kernels.rows import pool
from recfx.optim import sgd, sparse_sgd
from recfx.step import train_step
from recfx.types import Batch, Layout, Ragged, pack
from tests.faults.malformed import FAULTS, check

NUM_CHILDREN, PER_CHILD = 10, 200


def i32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_malformed_batches_are_errors_that_name_the_column():
    said = [check(seed) for seed in range(150)]
    assert {s.split(":")[0] for s in said} == {fault.__name__ for fault in FAULTS}


def test_without_a_compiler_the_same_are_errors(monkeypatch):
    monkeypatch.setattr(check_columns, "library", lambda: None)
    for seed in range(30):
        check(seed)


@pytest.mark.slow
def test_two_thousand_malformed_batches_in_ten_processes(capsys):
    def child(first: int) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "tests.faults.malformed", str(first), str(first + PER_CHILD)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        return done.returncode, done.stdout, done.stderr

    with ThreadPoolExecutor(2) as pool_of_children:
        ends = list(pool_of_children.map(child, range(0, NUM_CHILDREN * PER_CHILD, PER_CHILD)))
    for status, seeds, errors in ends:
        last = seeds.split()[-1] if seeds else "none"
        assert status == 0, f"seed {last}: exit status {status}\n{errors[-2000:]}"
    with capsys.disabled():
        num = sum(len(seeds.split()) for _, seeds, _ in ends)
        print(f"\n{num} malformed batches, {NUM_CHILDREN} processes, none died")


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ((0, 1, 900_000), "column 'item': got offsets 900000 at place 2, expected at most 8, the number of values"),
        ((0, 1, -5), "column 'item': got offsets falling from 1 to -5 at place 2, expected rising"),
        ((0, 6, 2), "column 'item': got offsets falling from 6 to 2 at place 2"),
        ((3, 4, 5), "column 'item': got offsets 3 at place 0, expected 0"),
    ],
)
def test_offsets_outside_the_values_stop_at_pack(offsets, words):
    with pytest.raises(ValueError, match=words):
        pack({"label": torch.zeros(2, 1), "item": Ragged(torch.arange(8), i32(*offsets))})


def test_the_values_of_a_request_count_not_those_of_the_layout():
    layout = pack({"item": Ragged(torch.arange(8), i32(0, 1, 8))}).layout
    with pytest.raises(ValueError, match="column 'item': got offsets 3 at place 1, expected at most 2"):
        pack({"item": Ragged(torch.arange(2), i32(0, 3))}, layout=layout)


def test_num_samples_is_at_most_b():
    columns = {"label": torch.zeros(2, 1), "u": Ragged(torch.tensor([5, 6]), i32(0, 1, 2))}
    for n in (100, 3, -1):
        with pytest.raises(ValueError, match=f"column 'num_samples': got {n}, expected 0 to 2"):
            pack({**columns, "num_samples": torch.tensor(n, dtype=torch.int32)})
    for n in (0, 2):
        assert int(pack({**columns, "num_samples": torch.tensor(n, dtype=torch.int32)})["num_samples"]) == n


def test_columns_without_a_sample_column_are_an_error():
    for columns in ({}, {"num_samples": torch.tensor(0, dtype=torch.int32)}):
        with pytest.raises(ValueError, match="expected at least one besides 'num_samples'"):
            pack(columns)


def test_a_batch_of_no_samples_is_a_batch():
    batch = pack({"label": torch.zeros(0, 1), "u": Ragged(torch.zeros(0, dtype=torch.int64), i32(0))})
    step = train_step(
        features=dict, embeddings={"e": [Embedding("u", dim=2)]},
        forward=lambda p, e, f: e["e"].sum((1, 2))[:, None] + p["b"],
        sparse_optimizer=sparse_sgd(0.1), dense_optimizer=sgd(0.1), max_rows=64,
    )  # fmt: skip
    _, aux = step.update_(step.init({"b": torch.zeros(1)}), batch)
    assert (float(aux.loss), int(aux.num_samples), aux.logit.shape) == (0, 0, (0, 1))


def test_strided_columns_and_offsets_are_packed():
    wide = torch.arange(12).view(6, 2)
    offsets = torch.stack([i32(0, 2, 6), i32(9, 9, 9)], 1)[:, 0]
    assert not offsets.is_contiguous()
    batch = pack({"u": Ragged(wide[:, 0], offsets), "x": torch.rand(3, 2).T})
    assert batch["u"].values.tolist() == [0, 2, 4, 6, 8, 10]


def test_a_buffer_made_by_hand_is_bytes_end_to_end():
    batch = pack({"x": torch.ones(2, 1)})
    for wrong in (batch.buffer.char(), batch.buffer[None], batch.buffer.repeat_interleave(2)[::2]):
        with pytest.raises(ValueError, match=r"buffer: got torch\..*, expected torch.uint8, one dimension, contiguous"):
            Batch(wrong, batch.layout)


def test_a_layout_made_by_hand_is_looked_at():
    forms = {("u", "values"): (torch.int64, (4,)), ("u", "offsets"): (torch.int64, (3,))}
    layout = Layout.of({**forms, ("num_samples", "dense"): (torch.int32, ())})
    with pytest.raises(TypeError, match=r"column 'u': got offsets torch.int64, expected torch.int32"):
        pack({"u": Ragged(torch.arange(4), torch.tensor([0, 1, 4]))}, layout=layout)


BAD = [i32(0, 1, 900_000), i32(0, 6, 2), i32(0, -5, 2), i32(-1, 1, 2)]


@pytest.mark.parametrize("offsets", BAD)
def test_kernels_reached_without_pack_read_nothing_outside(offsets):
    """The operators themselves, as a captured step calls them."""
    ids, numbers, text = torch.arange(8), torch.rand(8), torch.zeros(8, dtype=torch.uint8)
    right_ = i32(0, 1, 2)
    for op in (farm_hashes, murmur_hashes):
        with pytest.raises(RuntimeError, match="column 1 of 2: got offsets"):
            op([text, text], [right_, offsets])
    with pytest.raises(RuntimeError, match="column 1 of 2: got offsets"):
        cross_lists(ids, right_, None, ids, offsets, None, 9)
    for call in (
        lambda: select_lists.select_lists([numbers, numbers], [right_, offsets], 1, 0.0),
        lambda: order_lists.list_sums(numbers, offsets),
    ):
        with pytest.raises(RuntimeError, match="got offsets that do not begin with 0, fall, leave their 8 values"):
            call()


def test_take_lists_takes_from_within():
    for first, length in (((0, 7), (1, 2)), ((0, -1), (1, 1)), ((0, 1), (1, -1)), ((2**31 - 1, 0), (1, 1))):
        with pytest.raises(RuntimeError, match="column 0 of 1: got lists from"):
            take_lists.take_lists([torch.arange(8)], [i32(*first)], [i32(*length)], [4])


def test_a_gradient_of_an_operator_without_one_is_an_error():
    rows = torch.ones(8, 1, 4)
    ids = (i32(0, 1, 1), torch.tensor([5, 6, 6]), i32(0, 0, 1), i32(0), 2)
    init = (torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 3, 4), [0], [4], None)

    def total(rows: torch.Tensor) -> torch.Tensor:
        return pool.pool(rows, *ids, *init)[0].sum()

    with pytest.raises(NotImplementedError, match=r"pool: got rows of which a gradient is required, .* Detach it"):
        total(rows.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match="pool: got rows of which a gradient is required"):
        torch.func.grad(total)(rows)
    with pytest.raises(NotImplementedError, match="pool: got rows of which a gradient is required"):
        torch.func.jvp(total, (rows,), (rows,))
    with torch.no_grad():
        assert float(total(rows.clone().requires_grad_())) == 12
    assert float(total(rows)) == 12
    scale = torch.func.grad(lambda w: (order_lists.list_sums(torch.ones(3), i32(0, 1, 3)) * w).sum())(torch.ones(2))
    assert scale.tolist() == [1, 2]


def test_dense_columns_of_2_31_numbers_are_no_lists():
    with pytest.raises(ValueError, match=r"x: got .*, expected fewer than 2.*31 numbers"):
        ops.from_dense(torch.zeros(1, 1).expand(2**16, 2**15))


def test_cells_past_2_31_and_too_many_vocabularies_are_errors():
    with pytest.raises(ValueError, match=r"features 'u' to 'v': got 2147483648 cells of 1 samples"):
        plan_tables({"e": [Embedding("u", dim=1, combiner=tile(2**31 - 1)), Embedding("v", dim=1)]})
    step = train_step(
        features=dict, embeddings={"e": [Embedding("u", dim=1, combiner=tile(2**20))]}, forward=lambda p, e, f: p["b"],
        sparse_optimizer=sparse_sgd(0.1), dense_optimizer=sgd(0.1), max_rows=64,
    )  # fmt: skip
    offsets = torch.zeros(2**11 + 1, dtype=torch.int32)
    batch = pack({"label": torch.zeros(2**11, 1), "u": Ragged(torch.tensor([5]), offsets)})
    with pytest.raises(ValueError, match=r"features 'u' to 'u': got 2147483648 cells of 2048 samples"):
        step.update_(step.init({"b": torch.zeros(1)}), batch)
    with pytest.raises(ValueError, match=r"table 'e/f0' and those of its row shape \(1,\): got 65536 vocabularies"):
        plan_tables({"e": [Embedding(f"f{i}", dim=1) for i in range(MAX_VOCABULARIES + 1)]})


def test_the_plan_of_4000_features_is_linear():
    def seconds(num: int) -> float:
        embeddings = {g: [Embedding(f"f{i}", dim=d) for i in range(num)] for g, d in (("emb", 8), ("bias", 1))}
        begin = time.perf_counter()
        plan = plan_tables(embeddings)
        took = time.perf_counter() - begin
        assert [len(t.lookups) for t in plan.tables] == [num]
        assert [c.lookup for c in plan.groups["bias"]] == list(range(num))
        return took

    few, many = (min(seconds(num) for _ in range(3)) for num in (500, 4000))
    assert many < 24 * few  # eight times the features; the square would be 64


def test_pack_checks_for_less_than_two_percent_of_its_time(capsys):
    """40 ragged columns of 1000 samples, of a layout met before. Printed; the assertion allows for a busy machine."""
    g = torch.Generator().manual_seed(0)
    columns = {}
    for i in range(40):
        offsets = torch.cat([torch.zeros(1), torch.randint(0, 5, (1000,), generator=g).cumsum(0)]).int()
        columns[f"c{i}"] = Ragged(torch.arange(int(offsets[-1])), offsets)
    batch = pack(columns)
    table = batch.layout.table

    def best(call, times: int) -> float:
        took = []
        for _ in range(times):
            begin = time.perf_counter()
            call()
            took.append(time.perf_counter() - begin)
        return min(took)

    tensors = [t for c in columns.values() for t in c.parts.values()]

    def check_all() -> bool:  # as pack does
        return all(map(types._is_plain, tensors)) and check_columns.offsets_fit(batch.buffer.data_ptr(), table)

    assert check_all()
    checks = best(check_all, 200)
    whole = best(lambda: pack(columns), 50)
    with capsys.disabled():
        print(f"\npack, 40 x 1000: {whole * 1e3:.3f} ms, checks {checks * 1e6:.1f} us, {checks / whole:.2%}")
    assert checks < 0.04 * whole
