"""What can be known of the Triton kernels without running them: what they compile to and take as arguments."""

import contextlib
import importlib
import inspect
import json
import os
import subprocess
import sys

import pytest
import torch

from recfx.kernels import op
from recfx.kernels.counters import new_counters
from recfx.kernels.dense import add_predictions, all_finite
from recfx.kernels.index import (
    count_candidates,
    deal_ids,
    find,
    find_or_insert,
    keep_trained,
    owner,
    rehash,
    untouch_rows,
)
from recfx.kernels.lists import cross_lists, join, order_ids, order_lists, select_lists, string_hash, take_lists
from recfx.kernels.op import gpu_function
from recfx.kernels.rows import (
    adamw_rows,
    add_row_grads,
    clip_row_grads,
    count_rows,
    optimizer_rows,
    pool,
    sum_adamw_rows,
    take_rows,
)

DEFINITIONS = {
    ("add_predictions", "add_predictions_"): add_predictions.definition,
    ("all_finite", "finite_parts"): all_finite.finite_parts_definition,
    ("optimizer_rows", "adamw_rows_"): adamw_rows.definition,
    ("add_row_grads", "add_row_grads_"): add_row_grads.definition,
    ("add_row_grads", "add_row_grads_atomic_"): add_row_grads.definition,
    ("clip_row_grads", "clip_row_grads_"): clip_row_grads.definition,
    ("clip_row_grads", "squared_norm"): clip_row_grads.squared_norm_definition,
    ("count_candidates", "count_candidates_"): count_candidates.definition,
    ("count_rows", "count_rows_"): count_rows.definition,
    ("cross_lists", "cross_lists"): cross_lists.definition,
    ("find", "find"): find.definition,
    ("find_or_insert", "find_or_insert_"): find_or_insert.definition,
    ("keep_trained", "keep_trained_"): keep_trained.definition,
    ("keep_trained", "untouch_rows_"): untouch_rows.definition,
    ("order_lists", "order_ids"): order_ids.definition,
    ("order_lists", "order_ids_ends"): order_ids.ends_definition,
    ("order_lists", "order_lists"): order_lists.definition,
    ("order_lists", "list_sums"): order_lists.list_sums_definition,
    ("pool", "pool"): pool.definition,
    ("pool", "pool_lists"): pool.lists_definition,
    ("rehash", "rehash_"): rehash.definition,
    ("select_lists", "select_lists"): select_lists.definition,
    ("string_hash", "farm_hashes"): string_hash.farm_definition,
    ("string_hash", "murmur_hashes"): string_hash.murmur_definition,
    ("sum_adamw_rows", "sum_adamw_rows_"): sum_adamw_rows.definition,
    ("take_lists", "take_lists"): take_lists.definition,
    **{
        ("optimizer_rows", f"{name}_"): getattr(optimizer_rows, name).definition
        for name in ("sgd_rows", "adagrad_rows", "rowwise_adagrad_rows", "adamw_rows_by_column", "ftrl_rows")
    },
}


def child(*command: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_compile_for_hopper_as_recorded_without_spills_and_no_operator_reads_the_host():
    """The committed page is of these kernels: `python -m bench.triton_sm90` writes it anew."""
    triton = pytest.importorskip("triton")
    bench = importlib.import_module("bench.triton_sm90")
    records = bench.measure()
    assert all(r["spilled_bytes"] == 0 for r in records)
    moving = {"pool_cells", "add_rows", "update_rows/adamw", "sum_adamw"}  # rows of 128 floats move in 16-byte pieces
    for r in records:
        if r["table"] == "d128" and r["kernel"] in moving:
            assert r["accesses_16_bytes"] >= 2, r
    recorded = json.loads((bench.RESULTS / "triton_sm90.json").read_text())
    assert {(r["kernel"], r["table"]) for r in records} == {(r["kernel"], r["table"]) for r in recorded}
    if f"triton {triton.__version__}," in (bench.RESULTS / "triton_sm90.md").read_text():
        assert records == recorded


@pytest.mark.slow
def test_kernels_compile_for_one_of_everything():
    """Triton makes a constant of an argument that is 1."""
    pytest.importorskip("triton")
    bench = importlib.import_module("bench.triton_sm90")
    for dims in ((1,), (1, 1)):
        with bench.compiling() as compiled:
            bench.call_all(dims, sizes=(1, 1, 1, 1, 8))
        assert len(compiled) > 20


@pytest.mark.parametrize("name", ["sgd_rows_", "adagrad_rows_", "rowwise_adagrad_rows_", "ftrl_rows_"])
@pytest.mark.parametrize(("row_stride", "grad_stride"), [(32, 9), (32, 16)])
def test_gradients_are_cleared_behind_a_barrier(name, row_stride, grad_stride):
    """Which threads read a gradient follows from the widest access of the kernel, which clear it from the store."""
    pytest.importorskip("triton")
    bench = importlib.import_module("bench.triton_sm90")
    kernels = importlib.import_module("recfx.kernels.rows.gpu.optimizer_rows")
    rows, grads = torch.zeros(64, row_stride)[:, :27].unflatten(1, (3, 9)), torch.zeros(64, grad_stride)[:, :9]
    num, unique_rows, hyper = torch.tensor(0), torch.zeros(64, dtype=torch.int32), torch.zeros(8, dtype=torch.float64)
    with bench.compiling() as compiled:
        getattr(kernels, name)(rows, grads, num, unique_rows, unique_rows, hyper, torch.tensor(True), (9,))
    (kernel,) = (k for n, k in compiled.items() if n.startswith("update_rows/"))
    code = kernel.asm["ttgir"]
    read, cleared = code.index("tt.load %of_unique"), code.index("tt.store %of_unique")
    assert "barrier" in code[read:cleared]


def test_cuda_launches_are_on_the_device_of_the_tensors_which_are_contiguous(monkeypatch):
    """As the dispatcher would call it, on CPU tensors; two devices are for `tests/gpu`."""
    pytest.importorskip("triton")
    registered, current = {}, []

    class Library:
        define = impl = staticmethod(lambda *_, **__: None)

    Library.impl = staticmethod(lambda name, function, key: registered.__setitem__(key, function))
    monkeypatch.setattr(op, "_LIBRARY", Library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: current.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(op, "gpu_function", lambda name: lambda *args: (name, len(args)))
    monkeypatch.setattr(torch.library, "register_fake", lambda *_: None)
    op.define_op(
        "find",
        definition=find.definition,
        fake=find.definition,
        cuda="index.gpu.find",
    )
    tensors = [torch.zeros(2, dtype=torch.int64)] * 6
    assert registered["CUDA"](*tensors) == ("find", 6)
    assert current == [torch.device("cpu")]
    with pytest.raises(AssertionError, match=r"find: got strides \(2,\) of \[2\], expected contiguous"):
        registered["CUDA"](*tensors[:5], torch.zeros(4)[::2])


def test_no_operator_reads_the_host_on_cuda():
    """Every operator that is registered: by its Triton kernel's launcher, or by its definition where it has none.

    The launchers run where kernels compile, in the test above.
    """
    pytest.importorskip("triton")
    bench = importlib.import_module("bench.triton_sm90")
    names = {name.removeprefix("recfx::") for name in torch._C._dispatch_get_all_op_names() if "recfx::" in name}
    with_kernel = {n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"recfx::{n}", "CUDA")}
    assert with_kernel == {name for _, name in bench.calls((8, 1))} == {name for _, name in DEFINITIONS}
    # Of `recfx.capture.passes`, and of a step whose numbers are on a CPU.
    on_cpu_alone = {"order_ids_at", "all_finite", "adamw_rows_checked_"}
    # A copy, of no step, and the two of a step of several ranks.
    assert names - with_kernel - on_cpu_alone == {"join", "owner", "deal_ids_", "take_rows_"}
    column, ids, cells = torch.randn(5, 1), torch.arange(5), torch.tensor([0, 1, -1, 2, -1]).int()
    of_cells, trains, message = torch.tensor([0, 3]).int(), torch.tensor([True, False]), torch.zeros(3, 6).long()
    with bench.NoHostReads():
        join.definition([column, column])
        owner.definition(ids, torch.zeros(5).int(), 3)
        for distinct in (True, False):
            deal_ids.definition(message, 0, ids, cells, of_cells, trains, 4, distinct)
        deal_ids.definition(message, 0, ids, cells, of_cells, None, 4, True)
        take_rows.definition(torch.zeros(1, 10), 0, torch.randn(4, 3, 2), cells[:3], 2)
    with pytest.raises(AssertionError, match="reads the host"), bench.NoHostReads():
        count_rows.definition(
            torch.zeros(4).int(), new_counters(num_unique=1), torch.zeros(4).int(), torch.tensor(True)
        )


@pytest.mark.parametrize(("module", "name"), DEFINITIONS, ids=str)
def test_operator_has_its_kernel_on_cuda_with_the_arguments_of_the_definition(module, name):
    pytest.importorskip("triton")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"recfx::{name}", "CUDA")
    kernel = gpu_function(name)
    mine, defined = inspect.signature(kernel).parameters.values(), inspect.signature(DEFINITIONS[module, name])
    assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in defined.parameters.values()]


def test_recfx_runs_without_triton_and_says_so_on_a_gpu_alone():
    code = """
import importlib.util, sys, warnings
sys.modules["triton"] = None
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else real(name, *a)
import recfx.step, recfx.optim
from recfx.kernels.index import find
from recfx.kernels.counters import new_counters
from recfx.kernels.op import gpu_function
assert not any(name.startswith("recfx.kernels.") and ".gpu" in name for name in sys.modules)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert gpu_function("find") is None
assert "no triton found" in str(said[0].message)
"""
    child("-c", code)
