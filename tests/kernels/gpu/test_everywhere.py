"""The long runs on the machine: the device's Triton, every width, a step's tests on kernels, and planted faults.

Each is a process of its own. `make slow` unpacks Triton 3.6.0, which CUDA builds of torch 2.11 bring along.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[3]
TRITON_36 = Path(os.environ.get("RECFX_TRITON_36", REPO / ".venv" / "triton-3.6"))
TRITONS = {"installed": None, "3.6.0": TRITON_36}
KERNEL_TESTS = [f"tests/kernels/gpu/test_{name}_kernels.py" for name in ("dense", "list", "table")]
OF_TABLES = [
    "step", "step_embeddings", "table", "table_life", "policies", "clipping", "combiners", "optim",
    "padding_id", "fused", "trainable", "life_in_training", "metrics",
]  # fmt: skip
PYTEST = ("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider")


def child(*command: str, triton: str = "installed", repo: Path = REPO, **env: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, from the folder `repo`, with a version of Triton first on its path."""
    folder = TRITONS[triton]
    if folder is not None and not (folder / "triton").is_dir():
        pytest.skip(f"needs Triton {triton} in {folder}: make slow, or RECFX_TRITON_36=its folder")
    path = os.pathsep.join(map(str, [folder, repo] if folder else [repo]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=3000, check=False, env=env, cwd=repo
    )


def assert_passed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def test_every_order_as_triton_3_6_compiles():
    assert_passed(child("-c", "import triton; assert triton.__version__ == '3.6.0'", triton="3.6.0"))
    done = child(*PYTEST, "-m", "not gpu", *KERNEL_TESTS, triton="3.6.0")
    assert_passed(done)
    assert " passed" in done.stdout


@pytest.mark.parametrize("triton", TRITONS)
@pytest.mark.parametrize("first", range(1, 257, 32))
def test_kernels_of_rows_compile_for_every_width(triton, first, tmp_path):
    module = "tests.kernels.gpu.compile_widths"
    done = child("-m", module, str(first), str(first + 32), triton=triton, TRITON_CACHE_DIR=str(tmp_path))
    assert_passed(done)
    assert int(done.stdout.split()[-2]) > 10


@pytest.mark.parametrize("order", ["threads-0", "bursts-1", "warps-2", "programs-3"])
def test_step_and_table_pass_their_tests_with_the_gpu_s_kernels(order):
    tests = [f"tests/test_{name}.py" for name in OF_TABLES]
    done = child(*PYTEST, "-p", "tests.machine.plugin", "-m", "not slow and not gpu", *tests, RECFX_ORDER=order)
    assert_passed(done)
    assert int(re.search(r"(\d+) launches of", done.stdout)[1]) > 10**4
    for kernel in (
        "order_cells",
        "store_new",
        "pool_cells",
        "merge_blocks",
        "sum_adamw",
        "add_samples",
        "mark_trained",
    ):
        assert f"{kernel} " in done.stdout


def test_counts_of_a_step_are_as_recorded():
    """`python -m tests.machine.counts` writes the page again."""
    from bench.triton_sm90 import RESULTS
    from tests.machine import counts

    found, recorded = counts.records(), json.loads((RESULTS / "machine_counts.json").read_text())
    assert {r["kernel"] for r in found} == {r["kernel"] for r in recorded}
    if f"triton {counts.triton.__version__}," in (RESULTS / "machine_counts.md").read_text():
        assert found == recorded


# File, what is written there once, what is put there, tests that are to fail, what they then say.
INSERTING = "table_is_the_dict or one_home_slot or refuses"
PLANTS = {
    "update_rows clears gradients that are still to be read": (
        "optimizer_rows.py",
        "        tl.debug_barrier()  # the threads that read a gradient need not be those that clear it\n", "",
        "row_optimizers", "update_rows: a plain (read|write), then",
    ),
    "claim loses a minimum": (
        "find_or_insert.py", "        lower_to(first_H, at, k, same & (k < holder))\n", "", INSERTING, "AssertionError",
    ),
    "claim takes a place by a store": (
        "find_or_insert.py",
        "            holder = tl.where(empty, swap_where(empty, first_H, num_places, at, EMPTY, k), holder)",
        """            before = tl.load(first_H + at, mask=empty, other=0)
            tl.store(first_H + at, k, mask=empty & (before == EMPTY))
            holder = tl.where(empty, before, holder)""",
        INSERTING, "AssertionError|claim: two plain writes",
    ),
    "place takes a slot by a store": (
        "hashing.py",
        "        left = left & (swap_where(left, slots, mask.to(tl.int64) + 1, at, EMPTY, slot) != EMPTY)",
        """        before = tl.load(slots + at, mask=left, other=0)
        tl.store(slots + at, slot, mask=left & (before == EMPTY))
        left = left & (before != EMPTY)""",
        f"{INSERTING} or rehash", "AssertionError|(store_new|place_rows): two plain writes",
    ),
    "a total is handed in and not released": (
        "scan.py",
        """    tl.atomic_xchg(sums + program, total, sem="relaxed")
    if tl.atomic_add(counters + part, 1, sem="acq_rel") == size - 2:""",
        """    tl.store(sums + program, total)
    if tl.atomic_add(counters + part, 1, sem="relaxed") == size - 2:""",
        INSERTING, "look_up: a plain write and an atomic",
    ),
    "totals are added up before the last one is there": (
        "scan.py", "== size - 2:", "== size - 3:", INSERTING, "AssertionError|MachineError",
    ),
    "a program reads what its other threads have not written": (
        "order_lists.py", "    tl.debug_barrier()  # what this program wrote is read by other threads of it\n", "",
        "order", "order_cells: a plain (read|write), then|AssertionError",
    ),
    "refused ids are counted without an atomic": (
        "find_or_insert.py", 'tl.atomic_add(num_refused, refused, mask=refused > 0, sem="relaxed")',
        "tl.store(num_refused, tl.load(num_refused) + refused, mask=refused > 0)",
        f"{INSERTING} or padding", "number: (two plain writes|a plain (read|write), then)",
    ),
    "gradients are added without an atomic": (
        "add_row_grads.py", 'tl.atomic_add(at, value, mask=(unique >= 0)[:, None] & (column < DIM), sem="relaxed")',
        "tl.store(at, tl.load(at, mask=(unique >= 0)[:, None] & (column < DIM)) + value, "
        "mask=(unique >= 0)[:, None] & (column < DIM))",
        "gradients_of_rows", "add_atomically: (two plain writes|a plain (read|write), then)",
    ),
    "the step is ended by the last program but one": (
        "optimizer_rows.py", "== tl.num_programs(0) - 1:", "== tl.num_programs(0) - 2:",
        "ends_the_step or adamw", "AssertionError",
    ),
    "programs that end the step are counted without an atomic": (
        "optimizer_rows.py", "    before = tl.atomic_add(counters + NUM_UNIQUE, 1 << 32)\n",
        """    before = tl.load(counters + NUM_UNIQUE)
    tl.store(counters + NUM_UNIQUE, before + (1 << 32))
""",
        "ends_the_step", "AssertionError|update_rows: (two plain writes|a plain (read|write))",
    ),
    "parts are added up before the last one is there": (
        "scan.py", "== num_parts - 2:", "== num_parts - 3:", INSERTING, "AssertionError|MachineError",
    ),
    "unknown ids are pooled while copies read what they are added to": (
        "pool.py",
        "    tl.debug_barrier()  # of a narrow tile several threads have a copy, and one of them writes\n", "",
        "pool", "a plain (read|write), then|AssertionError",
    ),
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_found(plant, tmp_path):
    """By the kernels' own tests, in a copy of the repository, in one of the orders."""
    file, text, instead, words, says = PLANTS[plant]
    for name in ("recfx", "tests", "bench"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    path = tmp_path / "recfx" / "kernels" / "gpu" / file
    source = path.read_text()
    assert source.count(text) == 1, f"{file}: got {source.count(text)} times {text!r}, expected once. Adjust PLANTS."
    path.write_text(source.replace(text, instead))
    done = child(*PYTEST, "-x", "-m", "not gpu", "-k", words, *KERNEL_TESTS, repo=tmp_path)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(says, done.stdout), done.stdout[-5000:]
    assert "CompilationError" not in done.stdout
    assert "UnknownInstructionError" not in done.stdout
