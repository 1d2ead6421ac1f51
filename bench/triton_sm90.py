"""Every Triton kernel compiled for Hopper without a GPU: registers, spills and vector accesses of each.

`python -m bench.triton_sm90` writes bench/results/triton_sm90.json and .md. The operators are called as a step calls
them, on small CPU tensors, with launches replaced by compilation: what is compiled is what a GPU would be given.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import recfx.features
import recfx.optim
import recfx.step  # noqa: F401 - the operators of all three are registered
from recfx.kernels.counters import new_counters
from recfx.kernels.op import gpu_function

RESULTS = Path(__file__).parent / "results"
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
READS_THE_HOST = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
SIZES = 4096, 64, 16, 1024, 2048  # positions, samples, lookups, rows, slots
TABLES = {"deepfm": (8, 1), "d128": (128,)}  # widths of the logical tables side by side


class Hopper:
    """The part of a driver that compilation requires."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class NoHostReads(TorchDispatchMode):
    """An operator that is captured in a CUDA graph must not look at a number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS_THE_HOST:
            raise AssertionError(f"{func} reads the host")
        return func(*args, **(kwargs or {}))


@contextmanager
def replaced_launches(launch: Callable[..., None]) -> Iterator[None]:
    """Launches compile for Hopper, as far as PTX, and then call `launch(kernel, compiled, args, grid, kwargs)`."""
    run, active = JITFunction.run, driver._active
    assemble, hashed = CUDABackend.make_cubin, CUDABackend.hash

    def compile_first(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            launch(self, compiled, args, grid, kwargs)
        return compiled

    driver.set_active(Hopper())
    JITFunction.run = compile_first
    CUDABackend.make_cubin = lambda *_: b""
    CUDABackend.hash = lambda self: f"without assembler, {self.target.arch}"  # a GPU finds none of these in the cache
    try:
        yield
    finally:
        JITFunction.run, driver._active = run, active
        CUDABackend.make_cubin, CUDABackend.hash = assemble, hashed


@contextmanager
def compiling() -> Iterator[dict[str, Any]]:
    """Launches compile and do nothing else; yields the compiled kernels by name."""
    found: dict[str, Any] = {}

    def note(kernel: JITFunction, compiled: Any, args: Any, grid: Any, kwargs: dict[str, Any]) -> None:
        formula = kwargs.get("FORMULA") or kwargs.get("HASH")
        name = kernel.fn.__name__ if formula is None else f"{kernel.fn.__name__}/{formula.fn.__name__}"
        found[name] = compiled

    with replaced_launches(note):
        yield found


def calls(dims: tuple[int, ...], sizes: tuple[int, ...] = SIZES) -> dict[tuple[str, str], tuple]:
    """Arguments of every operator by module and name: the shapes, strides and types of a table with logical tables of
    widths `dims`."""
    (P, B, L, R, S), W = sizes, sum(dims)
    i64, i32 = functools.partial(torch.zeros, dtype=torch.int64), functools.partial(torch.zeros, dtype=torch.int32)
    stride = -(-3 * W // 16) * 16
    rows = torch.zeros(R, stride)[:, : 3 * W].unflatten(1, (3, W))
    grads = torch.zeros(R, -(-W // 16) * 16)[:, :W]
    num, counters, due, firsts = i64(()), new_counters(), torch.tensor(True), [sum(dims[:t]) for t in range(len(dims))]
    init = i64(L, W), torch.zeros(L, 3, W)
    ids = i64(P), i32(P), i32(L)
    index = i64(S), i64(R), counters
    values, offsets = [i64(P // L) for _ in range(L)], [i32(B + 1) for _ in range(L)]
    numbers, strings = [v.float() for v in values], [v.byte() for v in values]
    blocks, weight = [torch.zeros(B, L, dim) for dim in dims], torch.zeros(P)
    table = i64(S), i64(R), i32(R), i64(R), i32(R), rows, i32(R), i32(R), counters
    hyper = torch.zeros(8, dtype=torch.float64)
    gradients = grads, ids[1], ids[1], firsts, dims, blocks, weight
    candidates = i64(S), i64(R), i32(R), i32(R)
    taken = [values[0], numbers[0], strings[0]], [i32(B)] * 3, [i32(B)] * 3, [P] * 3
    side = values[0], offsets[0], numbers[0]
    predictions = *[torch.zeros(B, 1)] * 3, torch.ones(B, 1, dtype=torch.bool), 20.0
    every = {
        ("add_predictions", "add_predictions_"): (i64(2, 2**16), torch.zeros(6, dtype=torch.float64), *predictions),
        ("keep_trained", "keep_trained_"): (i64(R), i32(R), counters, i32(()), *ids[1:2] * 2, torch.ones(L).bool()),
        ("keep_trained", "untouch_rows_"): (i64(R), counters, ids[1], ids[1], num, due),
        ("all_finite", "finite_parts"): ([weight, grads[:1], *blocks],),
        ("order_lists", "order_ids"): (values, offsets),
        ("order_lists", "order_ids_ends"): (values, offsets),
        ("order_lists", "order_lists"): (values, offsets, [None, *numbers[1:]], [0, 2] * (L // 2)),
        ("order_lists", "list_sums"): (weight, offsets[0]),
        ("find", "find"): (*index, *ids),
        ("find_or_insert", "find_or_insert_"): (*table, *ids, *init, torch.zeros(P, dtype=torch.bool)),
        ("pool", "pool"): (rows, ids[1], *ids, B, *init, firsts, dims, weight),
        ("pool", "pool_lists"): (rows, ids[1], *ids[:2], i32(B * L), ids[2], B, *init, firsts, dims),
        ("add_row_grads", "add_row_grads_"): gradients,
        ("add_row_grads", "add_row_grads_atomic_"): gradients,
        ("clip_row_grads", "clip_row_grads_"): (grads, counters, torch.ones(()), due, dims, 1.0, 1.0),
        ("clip_row_grads", "squared_norm"): (grads, counters),
        ("optimizer_rows", "adamw_rows_"): (rows, grads, counters, i32(R), hyper, due),
        ("sum_adamw_rows", "sum_adamw_rows_"): (rows, counters, i32(R), hyper, *gradients[1:]),
        ("rehash", "rehash_"): (i64(S), num, i64(R), i32(R), R, S, 0),
        ("count_rows", "count_rows_"): (i32(R), counters, i32(R), due),
        ("count_candidates", "count_candidates_"): (*candidates, *index, *ids),
        ("string_hash", "farm_hashes"): (strings, offsets),
        ("string_hash", "murmur_hashes"): (strings, offsets),
        ("take_lists", "take_lists"): taken,
        ("select_lists", "select_lists"): (numbers, offsets, 2, 0.5),
        ("cross_lists", "cross_lists"): (*side, *side, P),
    }
    by_column = rows, grads, counters, i32(R), i32(R), hyper, due, dims, torch.zeros(L, 2, W)
    for name in ("sgd", "adagrad", "rowwise_adagrad", "adamw", "ftrl"):
        every["optimizer_rows", f"{name}_rows_{'by_column_' if name == 'adamw' else ''}"] = by_column
    return every


def call_all(dims: tuple[int, ...], sizes: tuple[int, ...] = SIZES) -> None:
    """Calls every operator once, and what a large batch has in place of a small one's kernels."""
    occurrences = importlib.import_module("recfx.kernels.gpu.occurrences")
    many = torch.zeros(occurrences.MERGED + 1, dtype=torch.int32)
    with NoHostReads():
        occurrences.in_order(many, many, many.float(), 1)
        for (_module, name), arguments in calls(dims, sizes).items():
            gpu_function(name)(*arguments)


def assembled(ptx: str) -> dict[str, int]:
    """The assembler's report on a kernel, and its memory accesses, with those of 16 bytes counted separately."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(PTXAS), "-v", "--gpu-name", "sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    accesses = re.findall(r"(?:ld|st)\.global\S*", ptx)
    return {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", said))),
        "spilled_bytes": sum(map(int, spilled)),
        "accesses": len(accesses),
        "accesses_16_bytes": sum(".v4.b32" in a or ".v2.b64" in a for a in accesses),
        "atomics": len(re.findall(r"atom\.global|red\.global", ptx)),
    }


def measure() -> list[dict[str, Any]]:
    """One record per kernel and table."""
    records = []
    for table, dims in TABLES.items():
        with compiling() as compiled:
            call_all(dims)
        for name, kernel in sorted(compiled.items()):
            shared = {"shared_bytes": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
            records.append({"kernel": name, "table": table, **assembled(kernel.asm["ptx"]), **shared})
    return records


def markdown(records: list[dict[str, Any]]) -> str:
    """The records as a page."""
    text = (
        f"triton {triton.__version__}, written by `python -m bench.triton_sm90` on a machine without a GPU. "
        "`deepfm` is a row of widths 8 + 1 with AdamW's slots, `d128` one of width 128. No time here was measured: "
        "a register count is a fact, how fast a kernel runs is not known yet."
    )
    return page("# The Triton kernels on sm_90: compiled, not run", text, records)


def page(title: str, text: str, records: Sequence[dict[str, Any]]) -> str:
    """A title, a paragraph and the records as a table."""
    heads = "| " + " | ".join(name.replace("_", " ") for name in records[0]) + " |"
    rows = ("| " + " | ".join(map(str, r.values())) + " |" for r in records)
    return "\n".join([title, "", text, "", heads, "|" + "---|" * len(records[0]), *rows]) + "\n"


def write(name: str, records: Sequence[dict[str, Any]], text: str) -> None:
    """bench/results/<name>.json and .md."""
    (RESULTS / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text)


def main() -> None:
    records = measure()
    write("triton_sm90", records, markdown(records))


if __name__ == "__main__":
    main()
