"""The parts of bench/gpu.sh without a GPU: they say so and end, and small sizes of them run on a CPU."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.autograd import DeviceType

from bench import (
    baselines_torch,
    gpu_deepfm,
    gpu_draws,
    gpu_dynamicemb,
    gpu_files,
    gpu_profile,
    gpu_sizes,
    gpu_table,
    gpu_tests,
    gpu_timing,
)
from bench.gpu_timing import Results
from bench.workload import draw_batches, init_weights, make_batches, recfx_batch
from recfx.examples.criteo_synthetic import generate

PARTS = [gpu_deepfm, gpu_dynamicemb, gpu_files, gpu_profile, gpu_sizes, gpu_table, gpu_tests]


@pytest.fixture
def to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    """Where results go; calls are made and not timed."""

    def times_ms(function, inputs, *, repeats=3, warm_up=3, before=lambda x: None):
        for x in inputs:
            before(x)
            function(x)
        return [1.0, 2.0, 4.0]

    for part in (gpu_table, gpu_deepfm, gpu_sizes, gpu_dynamicemb, gpu_profile):
        monkeypatch.setattr(part, "times_ms", times_ms)
    monkeypatch.setattr(gpu_timing, "copy_bytes_per_s", lambda num_bytes: 1e12)
    monkeypatch.setattr(gpu_timing, "device_name", lambda: "NVIDIA H000 80GB")
    return Results("theme", tmp_path)


def written(to: Results, suffix: str, theme: str = "theme") -> str:
    (path,) = to.folder.glob(f"{theme}_*{suffix}")
    assert re.fullmatch(rf"{theme}_h00080gb_\d{{6}}{suffix}", path.name)
    return path.read_text()


@pytest.mark.parametrize("part", PARTS)
def test_a_part_without_a_device_says_so(part, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=rf"^{part.__name__}: needs a CUDA device, .* Nothing was measured\.$"):
        part.main()


def test_how_parts_ended_becomes_a_page(to, tmp_path):
    (tmp_path / "outcomes").write_text("kernels\t160\t99\t0\t12 passed\nraces\t101\t40\t124\ta | b\n")
    gpu_timing.write_outcomes(tmp_path / "outcomes", tmp_path)
    assert "| races | 101 | 40 | 124 | a / b |" in written(to, ".md", "parts")
    first, _ = json.loads(written(to, ".json", "parts"))
    assert first == {"part": "kernels", "limit_s": "160", "seconds": "99", "exit_code": "0", "last_line": "12 passed"}


def test_the_page_has_a_row_for_each_record_as_soon_as_it_is_there(to):
    to.add("one", [1.0])
    assert "| one | 1.0000 | 0.0000 |  |  |  |  |  |" in written(to, ".md")
    to.add("two", [1.0, 2.0, 3.0], num_bytes=2_000_000, items=10, unit="keys/s", target="5")
    assert "| one | 1.0000 | 0.0000 |  |  |  |  |  |" in written(to, ".md")
    assert "| two | 2.0000 | 2.0000 | 2,000,000 | 1 | 0 % | 5e+03 keys/s | 5 |" in written(to, ".md")
    assert [r["name"] for r in json.loads(written(to, ".json"))["records"]] == ["one", "two"]


def test_what_fails_is_noted_and_the_rest_measured(to):
    with to.attempt("the first"):
        raise RuntimeError("out of memory\nand more")
    to.add("second", [1.0])
    assert "- the first: failed: RuntimeError: out of memory\n" in written(to, ".md")
    assert "| second |" in written(to, ".md")
    with pytest.raises(SystemExit, match="theme: failed: the first"):
        to.end()


def test_dynamicemb_s_case(to):
    gpu_dynamicemb.dynamicemb(to, rows=200, lookups=50, pool=20, device="cpu", graph=False)
    to.end()
    of_uniform, of_power_law = to.records[:4], to.records[4:]
    assert len(of_power_law) == 4
    for training, in_two, in_any_order, evaluation in (of_uniform, of_power_law):
        assert "10 tables, 500 lookups, " in training["name"]
        assert training["median_ms"] == 2.0
        assert evaluation["bytes"] < training["bytes"] < in_two["bytes"]
        assert in_any_order["bytes"] < in_two["bytes"]
        assert training["percent_of_copy"] == pytest.approx(100 * training["bytes"] / 2e-3 / 1e12)
    for notes in (to.notes[:5], to.notes[5:]):
        assert notes[0] == "evaluation: checked before timing, pooled rows are the table's."
        assert [note.partition(":")[0] for note in notes[1:4]] == [
            "training in one kernel", "training in two", "training in any order",
        ]  # fmt: skip
        assert all("rows 0.0e+00 of their step apart" in note for note in notes[1:4])
        assert re.search(r"unique, D = 128: the hottest row is looked up [\d,]+ times in a step\.$", notes[4])


def test_draws_by_a_power_law():
    """The frequencies of the first eight rows of a random order equal the integrals of the density."""
    torch.manual_seed(0)
    rows, num = 1000, 200_000
    counts = gpu_draws.power_law(rows, device="cpu")(num).bincount(minlength=rows).sort(descending=True).values
    most = (rows + 1) ** -0.05 - 1
    expected = [num * ((k + 1) ** -0.05 - k**-0.05) / most for k in range(1, 9)]
    assert counts[:8].tolist() == pytest.approx(expected, rel=0.05)
    assert len(gpu_draws.uniform(rows, 20, device="cpu")(1000).unique()) == 20


def test_dynamicemb_s_unique_ids():
    """The published case: 24 M rows, exponent 1.05. Ten tables' 1,048,570 draws hit about 363,000 rows."""
    torch.manual_seed(0)
    sizes = gpu_dynamicemb.SIZES
    drawn = gpu_draws.power_law(sizes["rows"], device="cpu")(sizes["lookups"])
    assert len(drawn.unique()) == pytest.approx(36_300, rel=0.02)
    drawn = gpu_draws.uniform(sizes["rows"], sizes["pool"], device="cpu")(sizes["lookups"])
    assert len(drawn.unique()) == pytest.approx(34_700, rel=0.02)


class Event(NamedTuple):
    name: str
    us: float
    device_type: DeviceType = DeviceType.CUDA
    is_user_annotation: bool = False

    @property
    def time_range(self):
        return SimpleNamespace(elapsed_us=lambda: self.us)


def profiled(monkeypatch, events):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    profile = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: nullcontext(profile))
    return gpu_profile.kernels_of(lambda x: None, range(2))


def test_kernels_of_a_step_are_summed_by_name_and_sorted(to, monkeypatch):
    on_host, annotation = Event("a|b", 100.0, DeviceType.CPU), Event("step", 50.0, is_user_annotation=True)
    kernels = profiled(
        monkeypatch, [Event("small", 1.0), *[Event("a|b", us) for us in (2, 4, 2, 4)], on_host, annotation]
    )
    assert kernels == [("a|b", 2, 3.0), ("small", 0.5, 1.0)]
    gpu_profile.add_kernels(to, "DeepFM: ", kernels, 0.0165)
    text = written(to, ".md")
    assert "## DeepFM: kernels of a step\n\n| kernel | calls a step |" in text
    assert "| a/b | 2 | 3.00 | 6.00 | 92.3% |\n| small | 0.5 | 1.00 | 0.50 | 7.7% |" in text
    assert "2.5 nodes a step, their sum 6.5 us, the step 16.5 us without the profiler: 10.0 us between them" in text
    assert text.endswith("them, 4.00 us a node.\n")
    assert json.loads(written(to, ".json"))["tables"][0]["rows"][1]["kernel"] == "small"


def test_a_profile_of_nothing_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="profiler: got no kernel, expected those of the calls"):
        profiled(monkeypatch, [Event("on the host", 1.0, DeviceType.CPU)])


def test_predicted_nodes_are_those_of_the_list(tmp_path):
    assert gpu_profile.predicted_nodes(tmp_path / "none") == []
    (tmp_path / "list").write_text("# nodes of its graph\n\n    8  pool\n   3  in all: 5 us\n\n    1  pool: cells\n")
    assert gpu_profile.predicted_nodes(tmp_path / "list") == ["8  pool", "3  in all: 5 us"]


def test_peers_with_sparse_adam_move_rows_as_far_as_adamw_does():
    """At their first step, which is compared before they are timed, with the small gradients of a large batch."""
    work, weights = make_batches(1, 1000, table_rows=2000), init_weights(2000)
    row = gpu_deepfm.read_rows(work, "cpu")
    rows = []
    for peer in (baselines_torch.eager_dense, gpu_deepfm.eager_sparse, gpu_deepfm.eager_unique):
        step, held = peer(weights)
        step(work.dense[0])
        rows.append(held()["embedding"][row])
    way = (rows[0] - weights["embedding"][row]).abs().mean()
    assert all((other - rows[0]).abs().mean() < 1e-3 * way for other in rows[1:])


def test_look_ups_at_each_load(to):
    gpu_table.look_ups(to, num_slots=2**14, keys=2**8, device="cpu")
    assert len(to.notes) == 3
    assert all("checked before timing" in note for note in to.notes)
    assert [r["rate"] for r in to.records] == [2**8 / 2e-3] * 9
    assert all(
        f"load {load}" in r["name"] for load, r in zip([0.5] * 3 + [0.75] * 3 + [0.87] * 3, to.records, strict=True)
    )


def test_a_comparison_of_unlike_sides_fails_before_it_is_timed(to, monkeypatch):
    """Training without one table's gradients, and a look-up that is one row off."""
    add = gpu_dynamicemb.add_row_grads_

    def add_less(grads, inverse, cell, firsts, dims, blocks, weight=None):
        less = [torch.cat([block[:, :-1], 0 * block[:, -1:]], dim=1) for block in blocks]
        add(grads, inverse, cell, firsts, dims, less, weight)

    monkeypatch.setattr(gpu_dynamicemb, "add_row_grads_", add_less)
    gpu_dynamicemb.dynamicemb(to, rows=200, lookups=50, pool=20, device="cpu", graph=False)
    assert re.search(r"training in two: got rows 0\.\d+ of their step apart, expected 0\.01 at most", to.notes[-1])
    assert len(to.failures) == 2
    find = gpu_table.find.find
    monkeypatch.setattr(gpu_table.find, "find", lambda *args: find(*args) + 1)
    with pytest.raises(ValueError, match=r"load 0\.5, .*got other rows than ids were given"):
        gpu_table.look_ups(to, num_slots=2**14, keys=2**8, device="cpu")
    assert not to.records


@pytest.mark.parametrize(
    ("theirs", "apart"), [([0.7, 0.69], 0.0), ([0.7, 0.69005], 7e-5), ([0.7, 0.6902], None), ([0.7, math.nan], None)]
)
def test_losses_are_compared(theirs, apart):
    if apart is None:
        with pytest.raises(ValueError, match=r"peer: got losses \[0\.7, .*\], expected recfx's \[0\.7, 0\.69\] within"):
            gpu_deepfm.check_losses("peer", [0.7, 0.69], theirs)
    else:
        assert gpu_deepfm.check_losses("peer", [0.7, 0.69], theirs) == pytest.approx(apart, abs=1e-5)


def test_batches_are_the_same_without_the_table_s_ids():
    work = make_batches(2, 16, table_rows=1000, seed=3)
    drawn = [recfx_batch(d, 1000) for d in draw_batches(2, 16, table_rows=1000, seed=3)]
    assert all(torch.equal(a.buffer, b.buffer) for a, b in zip(drawn, work.batches, strict=True))
    known = torch.cat(list(work.universe.values()))
    assert len(known.unique()) == 1000
    for batch, dense in zip(work.batches, work.dense, strict=True):
        for name, row in zip(gpu_deepfm.CATEGORICAL, dense.row, strict=True):
            ids = known[row[row < 1000]]
            assert torch.equal(batch[name].values[: len(ids)], ids)


def test_deepfm_s_batches_and_rows_do_not_fit_the_l2_cache():
    l2_bytes = 50 * 2**20
    (batch,) = make_batches(1, 1000, table_rows=1000).batches
    assert all(batch.buffer.numel() * size // 1000 * count > l2_bytes for size, count in gpu_deepfm.NUM_BATCHES.items())
    assert l2_bytes < gpu_deepfm.TABLE_ROWS * 128


@pytest.mark.parametrize("name", list(gpu_sizes.OPTIMIZERS))
def test_a_filled_table_has_a_row_for_every_id_of_its_batches(name):
    optimizer = gpu_sizes.OPTIMIZERS[name]
    step, state = gpu_sizes.build(1000, optimizer, batch_size=8, device="cpu")
    gpu_deepfm.fill(step, state, 1000, optimizer)
    for batch in draw_batches(2, 8, table_rows=1000):
        state, aux = step.update_(state, recfx_batch(batch, 1000))
        assert torch.isfinite(aux.loss)
    assert int(state.tables[0].num_rows) == 1000


def test_memory_is_predicted_before_it_is_taken():
    per_row = {
        name: (gpu_sizes.predicted_bytes(500_000_000, optimizer, batch_size=65_536) - 2**31 - 2**33) / 500_000_000
        for name, optimizer in gpu_sizes.OPTIMIZERS.items()
    }
    assert per_row == pytest.approx({"AdamW": 128 + 32, "row-wise Adagrad": 44 + 32}, rel=0.01)


@pytest.mark.parametrize(
    ("free_bytes", "chosen", "measured"),
    [(2**40, "AdamW", 3), (10**10, "row-wise Adagrad", 2), (10**6, "row-wise Adagrad", 0)],
)
def test_sizes_that_do_not_fit_are_skipped_and_said(to, monkeypatch, free_bytes, chosen, measured):
    monkeypatch.setattr(gpu_sizes, "step_ms", lambda rows, *_, **__: [rows / 1e7])
    rows = [10_000_000, 20_000_000, 200_000_000]
    gpu_sizes.sizes(to, rows, batch_size=1000, device="cpu", free_bytes=free_bytes)
    assert [r["median_ms"] for r in to.records] == [1.0, 2.0, 20.0][:measured]
    assert all(chosen in r["name"] for r in to.records)
    assert sum("skipped, predicted " in note for note in to.notes) == 3 - measured
    assert to.notes[0].endswith(f"{free_bytes:,} free. All sizes with {chosen}.")
    if measured:
        ratio = "20.00" if measured == 3 else "2.00"
        assert f"rows take {ratio}x the time of 10,000,000; target 1.5: MISSED." in to.notes[-1]


def test_jax_is_skipped_with_a_reason_where_it_has_no_gpu(to, monkeypatch):
    monkeypatch.setattr(gpu_deepfm, "jax_cannot", lambda backend: f"jax finds no {backend} and computes on cpu")
    gpu_deepfm.compare_with_jax(to, {1000: 16}, {}, table_rows=20_000)
    assert to.notes == ["JAX: skipped, jax finds no gpu and computes on cpu."]
    assert not to.records
    monkeypatch.undo()
    monkeypatch.setattr(gpu_deepfm.importlib.util, "find_spec", lambda name: None)
    assert gpu_deepfm.jax_cannot("gpu") == "jax is not installed"


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ((1e6, 8e6, 0.95e6), "the reader limits"),
        ((8e6, 1e6, 0.9e6), "the step limits"),
        ((8e6, 1e6, 0.5e6), "neither alone limits: they share the host, the step is the slower"),
        ((1e6, 1.1e6, 0.6e6), "neither alone limits: they share the host, the reader is the slower"),
    ],
)
def test_the_limiting_part_is_named(rates, said):
    assert gpu_files.limit(*rates) == said


def broken_peer(weights):
    """Learns nothing."""
    model = gpu_deepfm.DeepFM(weights)

    def step(batch):
        with torch.no_grad():
            return torch.nn.functional.binary_cross_entropy_with_logits(model(batch.row.t(), batch.num), batch.label)

    return gpu_deepfm.Baseline(step, model.weights)


@pytest.mark.slow
def test_deepfm_beside_its_peers(to, monkeypatch):
    """Each is checked, and one that computes something else is not timed."""
    monkeypatch.setattr(gpu_deepfm, "PEERS", {**gpu_deepfm.PEERS, "broken": broken_peer})
    losses = gpu_deepfm.compare(to, 32, num_batches=4, table_rows=20_000, device="cpu", steps_per_replay=(2, 4))
    assert len(losses) == 2
    assert [r["rate"] for r in to.records] == [32 / 2e-3] * 2 + [64 / 2e-3, 128 / 2e-3] + [32 / 2e-3] * 3
    checked = [note for note in to.notes if "checked before timing" in note]
    assert len(checked) == 2 * 3
    assert to.failures == ["DeepFM, batch 32: broken"]
    assert "broken: failed: ValueError: " in to.notes[-1]


@pytest.mark.slow
def test_deepfm_s_step_is_checked_before_it_is_profiled(to, monkeypatch):
    monkeypatch.setattr(gpu_profile, "kernels_of", lambda run, inputs: [gpu_profile.Kernel("all of it", 1, 1500.0)])
    gpu_profile.profile_step(to, make_batches(2, 32, table_rows=20_000), "cpu")
    assert to.records[0]["rate"] == 32 / 2e-3
    assert to.notes[0].startswith("DeepFM, batch 32: captured step: checked before timing, losses ")
    assert "1 nodes a step, their sum 1500.0 us, the step 2000.0 us" in to.notes[1]


@pytest.mark.slow
def test_deepfm_compared_with_jax(to):
    sizes, table_rows = {32: 2}, 20_000
    losses = {32: gpu_deepfm.compare(to, 32, num_batches=2, table_rows=table_rows, device="cpu")}
    to.records.clear()
    gpu_deepfm.compare_with_jax(to, sizes, losses, table_rows=table_rows, backend="cpu")
    if gpu_deepfm.jax_cannot("cpu"):
        assert to.notes[-1].startswith("JAX: skipped, ")
        return
    assert "JAX jit, dense tables" in to.records[0]["name"]
    assert to.records[0]["rate"] > 0
    assert "losses checked before timing" in to.notes[-1]
    to.end()
    gpu_deepfm.compare_with_jax(to, sizes, {32: [0.5, 0.5]}, table_rows=table_rows, backend="cpu")
    assert "failed: RuntimeError: bench.gpu_deepfm:jax_loop: ValueError: JAX: got losses" in to.notes[-1]


@pytest.mark.slow
def test_deepfm_over_table_sizes(to):
    gpu_sizes.sizes(to, [10_000, 20_000], batch_size=32, device="cpu", free_bytes=2**40)
    assert [r["median_ms"] for r in to.records] == [2.0, 2.0]
    assert to.notes[-1].endswith("target 1.5: met.")
    to.end()


@pytest.mark.slow
def test_from_files(to, tmp_path):
    generate(tmp_path / "data", rows_per_file=500, train_files=2, eval_files=1, seed=0)
    gpu_files.from_files(to, tmp_path / "data" / "train", 100, threads=1, max_rows=2**17, device="cpu")
    assert len(to.records) == 3
    assert all(r["rate"] > 0 for r in to.records)
    assert "samples/s: " in to.notes[-1]
