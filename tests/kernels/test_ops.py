"""The operators as a whole: schemas, definitions and C++ kernels agree, and C++ alone can use them."""

import ctypes
import importlib
import pkgutil
import random
import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_map_only

from recfx import kernels
from recfx.kernels import build, op
from recfx.kernels.counters import new_counters
from recfx.kernels.op import SCHEMAS, has_cpu_kernel
from recfx.table import Limits, table
from recfx.table.policies import Life, at_least
from tests.kernels import test_counting
from tests.kernels.index import test_find_or_insert
from tests.kernels.rows import test_adamw_rows, test_add_row_grads, test_optimizer_rows, test_sum_adamw_rows
from tests.reference import ragged, random_lists, reading_of, table_plan
from tests.reference_features import strings

ON_GPU_ALONE = {"add_row_grads_atomic_", "finite_parts", "order_ids_ends", "pool_lists"}
HYPER = test_adamw_rows.HYPER


def defined() -> set[str]:
    for module in pkgutil.walk_packages(kernels.__path__, "recfx.kernels."):
        if ".gpu" not in module.name:
            importlib.import_module(module.name)
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("recfx::") for name in names if name.startswith("recfx::")}


def test_schemas_definitions_and_kernels_agree():
    assert defined() == set(SCHEMAS)
    for name, schema in SCHEMAS.items():
        assert getattr(torch.ops.recfx, name).default._schema == torch._C.parse_schema(f"recfx::{schema}")
    assert build.library() is not None
    assert {name for name in SCHEMAS if not has_cpu_kernel(name)} == ON_GPU_ALONE


def test_types_of_c_functions_are_those_of_the_sources():
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    assert op._types_of("recfx_watch") == [pointer, number, pointer]
    assert op._types_of("offsets_fit") == [pointer, pointer, number, pointer]


def calls() -> dict[str, tuple]:
    """Arguments of every operator that has a kernel for CPU tensors."""
    rng = random.Random(0)
    lists = random_lists(rng, lookups=2, samples=9, longest=3, ids=range(30))
    state, init = test_find_or_insert.empty_table([0, 1])
    reading = reading_of(lists, [0, 1], spare=1)
    counting = Life(admit=at_least(2), candidates=20)
    candidates = table(table_plan([0, 1]), optimizer_slots=2, seed=1, limits=Limits(max_rows=64), life=counting).init()
    columns = [ragged(column) for column in lists]
    values, offsets = [c.values for c in columns], [c.offsets for c in columns]
    weights = [torch.rand(len(v)) for v in values]
    texts = strings([rng.randbytes(n) for n in (0, 3, 8, 20, 70, 200)])
    row_P, inverse_P = torch.tensor([1, 0, 2, -1], dtype=torch.int32), torch.tensor([1, 0, 2, -1], dtype=torch.int32)
    cell_P, trains = torch.tensor([0, 1, 2, -1], dtype=torch.int32), torch.tensor([True, False])
    seen, unique_rows = torch.tensor([5 << 32, 5 << 32 | 1, 5 << 32 | 2, 0]), torch.tensor([0, 1, 2, 0]).int()
    counters, due = new_counters(step=4, num_unique=3), torch.tensor(True)
    rows, grads, three, in_order = test_adamw_rows.case(9, 3)
    _, inverse, of_grads, *slices = test_add_row_grads.case(lists, [0, 1], (8, 1), 0)
    side = values[0], offsets[0], weights[0]
    ints = [torch.tensor([0, 2]).int()], [torch.tensor([2, 1]).int()]
    places = [0, 0, len(values[0]), 0, 0, 1, 0, len(values[1]), 1, 0]
    predictions = *[torch.rand(6, 1)] * 3, torch.ones(6, 1, dtype=torch.bool), 20.0
    pooled = state.rows, row_P, torch.arange(4), cell_P, torch.tensor([0, 1]).int(), 2, init[0], None, [0], [2]
    return {
        "add_predictions_": (torch.zeros(2, 64, dtype=torch.int64), torch.zeros(6, dtype=torch.float64), *predictions),
        "adamw_rows_": (rows, grads, three, in_order, HYPER, due),
        "adamw_rows_checked_": (rows, grads, three, in_order, HYPER, due, [torch.ones(3)]),
        "add_row_grads_": (grads, inverse, of_grads.cell, *slices),
        "all_finite": ([torch.ones(3)], [grads], [three]),
        "clip_row_grads_": (grads, three, torch.tensor(0.5), due, [8, 1], 0.5, 1.0),
        "count_candidates_": test_counting.arguments(candidates, reading),
        "count_rows_": (torch.zeros(9, dtype=torch.int32), three, unique_rows, due),
        "cross_lists": (*side, *side, 90),
        "deal_ids_": (torch.zeros(2, 60, dtype=torch.int64), 3, *reading, trains, 16, True),
        "farm_hashes": ([texts.values], [texts.offsets]),
        "find": (state.slots, state.ids, state.counters, *reading),
        "find_or_insert_": test_find_or_insert.arguments(state, reading, init),
        "join": (weights,),
        "keep_trained_": (seen, unique_rows, counters, torch.tensor(0).int(), inverse_P, cell_P, trains),
        "list_sums": (weights[0], offsets[0]),
        "murmur_hashes": ([texts.values], [texts.offsets]),
        "order_ids": (values, offsets),
        "order_ids_at": (values, offsets, places, 9),
        "order_lists": (values, offsets, [None, weights[1]], [0, 2]),
        "owner": (torch.arange(9), torch.zeros(9, dtype=torch.int32), 3),
        "pool": pooled,
        "rehash_": (torch.zeros(16, dtype=torch.int64), torch.tensor(0), torch.arange(4), unique_rows, 4, 16, 5),
        "select_lists": (weights, offsets, 2, 0.5),
        "squared_norm": (grads, three),
        "sum_adamw_rows_": test_sum_adamw_rows.case(lists, (8, 1)),
        "take_rows_": (torch.zeros(2, 20), 1, state.rows, row_P, 2),
        "take_lists": ([torch.arange(4)], *ints, [5]),
        "untouch_rows_": (seen, counters, row_P, inverse_P, torch.tensor(1), torch.tensor(False)),
        **{f"{name}_": tuple(test_optimizer_rows.case(name, (8, 1), 5)) for name in test_optimizer_rows.KERNELS},
    }


ALONE = """
import ctypes, sys, torch
from torch.utils._pytree import tree_leaves, tree_map_only
torch.ops.load_library(sys.argv[1])
if sys.argv[2] != "standalone":
    ctypes.CDLL(sys.argv[1]).recfx_define_operators()
for name, (arguments, expected) in torch.load(sys.argv[3]).items():
    result = getattr(torch.ops.recfx, name)(*arguments), list(arguments)
    for a, b in zip(tree_leaves(result), tree_leaves(expected), strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")
assert "recfx" not in sys.modules
print("ran")
"""


def run_alone(library, kind, folder):
    defined()
    cases = {}
    for name, arguments in calls().items():
        arguments = tree_map_only(torch.Tensor, torch.clone, arguments)
        copies = tree_map_only(torch.Tensor, torch.clone, arguments)
        overload = getattr(torch.ops.recfx, name).default
        result = op.DEFINITIONS[overload.name()](*copies)
        names = [argument.name for argument in overload._schema.arguments]
        # Where a key is in an index is not specified, so that is not compared.
        written = [None if n.endswith("slots") else t for n, t in zip(names, copies, strict=False)]
        cases[name] = arguments, (result, written)
    assert set(cases) == set(SCHEMAS) - ON_GPU_ALONE
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, "-c", ALONE, str(library), kind, str(folder / "cases.pt")]
    done = subprocess.run(command, cwd=folder, env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert done.stdout == "ran\n", done.stderr


def test_operators_run_in_a_process_without_recfx(tmp_path):
    """The library that Python builds, whose operators are defined by one call: as the definitions."""
    build.library()
    run_alone(build._built(1), "called", tmp_path)


@pytest.mark.slow  # compiles all kernels
def test_a_standalone_library_defines_its_operators_when_it_is_loaded(tmp_path):
    build.build_standalone(tmp_path / "recfx.so")
    run_alone(tmp_path / "recfx.so", "standalone", tmp_path)


NOWHERE = """
import torch
from recfx.kernels import op
op.SCHEMAS["nowhere"] = "nowhere(Tensor x) -> Tensor"
nowhere = op.define_op("nowhere", definition=torch.clone, fake=torch.empty_like)
try:
    nowhere(torch.ones(2))
except NotImplementedError as error:
    print(error)
here = op.SCHEMAS["here"] = "here(Tensor x) -> Tensor"
print(op.define_op("here", definition=torch.clone, fake=torch.empty_like, on_cpu=False)(torch.ones(1)).tolist())
"""


def test_an_operator_without_a_kernel_says_so():
    """It called itself for ever."""
    done = subprocess.run([sys.executable, "-c", NOWHERE], capture_output=True, text=True, check=False)
    error, result = done.stdout.splitlines()
    assert error.startswith("nowhere: got CPU tensors, expected a kernel for them in the library. No ops.cpp registers")
    assert result == "[1.0]"
