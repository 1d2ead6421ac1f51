"""The captured graphs: those in graphs/, free of host reads and of shapes that depend on data, and true to the step."""

from __future__ import annotations

import difflib
import functools
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.utils._pytree import tree_leaves

from graphs.dataflow import flow_of, handed_on, is_op, stages_of, tensors
from graphs.many_features import NUM_FEATURES, dicts_of_columns, op_counts
from graphs.model_ops import MODEL_OPS, MODELS, model_ops_text
from graphs.model_ops import op_counts as model_op_counts
from graphs.rank import EXCHANGES, FILE, captured, ops_text
from graphs.render import (
    FOLDER,
    PROGRAMS,
    Golden,
    capture,
    largest_temporary,
    mutated,
    render,
    render_features,
    torch_version,
)
from recfx.capture import trace
from recfx.embeddings import Embedding
from tests.conftest import DIM, deepfm_batches, deepfm_groups, deepfm_params, deepfm_step

ACCEPT = "python -m pytest tests/capture/test_graphs.py tests/capture/test_cuda_code.py --accept-graphs"
MAX_DIFF_LINES = 60  # per file
READ_BY_THE_HOST = ("_local_scalar_dense", "item", "is_nonzero", "equal")
SHAPED_BY_DATA = ("nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount")
TRAINING = ("order_ids", "find_or_insert_", "pool", "add_row_grads_", "adamw_rows_checked_")  # of each table
METRICS = ("add_predictions_",)
DEEPCTR_FEATURES = (*["join"] * 3, *["take_lists"] * 2, "farm_hashes", "cross_lists")
golden = functools.cache(capture)


def custom_ops(graph: torch.fx.Graph) -> Counter[str]:
    return Counter(n.target._opname for n in graph.nodes if is_op(n) and n.target.namespace == "recfx")


def inputs(g: Golden) -> list[str]:
    return [n.name for n in g.flow.nodes if n.op == "placeholder"]


def num_bytes(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()


def review(request: pytest.FixtureRequest, files: dict[str, str]) -> None:
    """Fails with the differences from graphs/, or writes the files there where that is asked for."""
    if request.config.getoption("--accept-graphs"):
        for file, text in files.items():
            (FOLDER / file).write_text(text)
    diff: list[str] = []
    for file, text in files.items():
        before, after = (FOLDER / file).read_text().splitlines(), text.splitlines()
        diff += list(difflib.unified_diff(before, after, f"graphs/{file}", "now", lineterm="", n=1))[:MAX_DIFF_LINES]
    assert not diff, "\n".join([*diff, f"The graph changed. Accept it with: {ACCEPT}"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_graphs_are_the_reviewed_ones(name, request):
    """Counts on every version of torch; names and order, and with them the drawing, on the one the files are from."""
    version = (FOLDER / f"{name}.fx.txt").read_text().splitlines()[0].removeprefix("# torch:").strip()
    is_the_one = version == torch_version() or request.config.getoption("--accept-graphs")
    files = render(golden(name))
    review(request, {file: text for file, text in files.items() if is_the_one or file.endswith(".ops.txt")})


def test_many_features_are_the_reviewed_few_ops(request):
    review(request, render_features())


def test_every_model_is_the_reviewed_ops(request):
    review(request, {MODEL_OPS: model_ops_text()})
    every = {path.stem for path in (FOLDER.parent / "recfx" / "models").glob("[!_]*.py")} - {"inputs"}
    assert every <= {*MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_reads_nothing_on_the_host_and_has_no_shape_that_depends_on_data(name):
    ops = {op.split(".")[1] for op in model_op_counts(name) if op != "views"}
    assert ops
    assert not ops & {*READ_BY_THE_HOST, *SHAPED_BY_DATA}


def test_a_rank_s_exchanges_are_the_reviewed_ones(request):
    review(request, {FILE: ops_text()})
    ops = [n.target._opname for n in captured().graph.nodes if is_op(n)]
    assert Counter(op for op in ops if op in EXCHANGES) == {"all_to_all_single": 3, "all_reduce": 1}
    assert not {*ops} & {*READ_BY_THE_HOST, *SHAPED_BY_DATA}


def test_200_features_are_few_ops():
    """Joining columns is all that 4 features, one column of a kind, do not need."""
    few, many = (op_counts(dicts_of_columns, num) for num in (4, NUM_FEATURES))
    joins = many - few
    assert {*joins} <= {"views", "recfx.join.default", "aten.clone.default"}
    assert joins.total() - joins["views"] <= 3
    assert not few - many


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_host_read_and_no_shape_that_depends_on_data(name):
    ops = [n for n in golden(name).flow.nodes if is_op(n)]
    assert ops
    assert not {n.target._opname for n in ops} & {*READ_BY_THE_HOST, *SHAPED_BY_DATA}
    values = [v for n in golden(name).flow.nodes for v in tree_leaves(n.meta.get("val"))]
    assert not [v for v in values if isinstance(v, torch.SymInt | torch.SymFloat | torch.SymBool)]
    assert all(type(size) is int for n in ops for t in tensors(n) for size in t.shape)


@pytest.mark.parametrize("name", PROGRAMS)
def test_mutated_inputs_are_exactly_the_states(name):
    state = [i for i in inputs(golden(name)) if not i.startswith("sections_")]
    if name == "deepfm_eval":
        expected = [i for i in state if i.startswith("metrics_")]
    else:
        between_steps = ("free_rows", "counts")
        expected = [i for i in state if re.sub(r"^tables_\d+_", "", i) not in between_steps and "_candidates_" not in i]
    assert mutated(golden(name)) == expected


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_call_of_each_primitive(name):
    primitives = ("order_ids", "find", "pool") if name == "deepfm_eval" else TRAINING
    if name == "deepfm_accumulate":  # the gradients of each micro-batch are looked at
        primitives = (*TRAINING[:-1], "adamw_rows_", "all_finite")
    if name == "deepctr":  # weights and tiled lists are ordered by an op of their own
        primitives = (*DEEPCTR_FEATURES, *("order_lists" if op == "order_ids" else op for op in primitives))
    assert custom_ops(golden(name).graph_module.graph) == Counter((*primitives, *METRICS))


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_temporary_as_large_as_a_table(name):
    tables = [n for n in golden(name).flow.nodes if n.op == "placeholder" and n.name.startswith("tables_")]
    smallest = min(num_bytes(t) for n in tables for t in tensors(n) if t.numel() > 2**10)  # the others are counters
    assert num_bytes(largest_temporary(golden(name))) < smallest / 100


def test_one_call_of_each_primitive_per_physical_table():
    bias = [Embedding(f, dim=1) for f in ("a", "b")]  # "c" is left with rows of another shape
    groups = {"emb": deepfm_groups()["emb"], "bias": bias}
    step, batch = deepfm_step(embeddings=groups), deepfm_batches(1)[0]
    assert [t.dims for t in step.plan.tables] == [(DIM, 1), (DIM,)]
    graph = trace(step.in_graph_, step.init(deepfm_params()), batch).graph
    assert custom_ops(graph) == Counter((*TRAINING * 2, *METRICS))
    flow = flow_of(graph)
    assert {b for _, b in handed_on(flow, stages_of(flow))} >= {"lookup", "sparse", "dense", "metrics", "aux"}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_traced_graph_is_the_step(accumulation):
    """Run as it is, it leaves the bytes that `update_` leaves."""
    step, batches = deepfm_step(accumulation=accumulation), deepfm_batches(4, short_last=True)
    one, other = step.init(deepfm_params()), step.init(deepfm_params())
    graph_module = trace(step.in_graph_, one, batches[0])
    for batch in batches:
        aux = graph_module(one, batch.sections)
        other, expected = step.update_(other, batch)
        assert torch.equal(aux.loss, expected.loss)
    assert int(one.tables[0].num_rows) > 0
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True))


def test_tracing_leaves_the_state_alone():
    step, batch = deepfm_step(), deepfm_batches(1)[0]
    state, same = step.init(deepfm_params()), step.init(deepfm_params())
    trace(step.in_graph_, state, batch)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(state), tree_leaves(same), strict=True))


def test_another_process_traces_the_same_graph():
    program = "import sys; from graphs.render import capture, render; sys.stdout.write(repr(render(capture('deepfm'))))"
    other = subprocess.run(
        [sys.executable, "-c", program],
        cwd=FOLDER.parent,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert other.returncode == 0, other.stderr
    assert other.stdout == repr(render(golden("deepfm")))
