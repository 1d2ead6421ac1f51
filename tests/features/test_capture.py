"""The ops inside a capture: one graph, static shapes, no host read, the same values, inputs left alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

from graphs.dataflow import is_op, is_view
from recfx import features as ops
from recfx.capture import capture
from recfx.capture.passes import StepPasses, UnfuseBias, share_common
from recfx.kernels.lists.order_ids import order_ids
from recfx.types import COUNTS, Ragged, pack, unpack
from tests.capture.test_graphs import READ_BY_THE_HOST, SHAPED_BY_DATA
from tests.conftest import deepfm_batches, linear_params, linear_step
from tests.reference import ragged
from tests.reference_features import nested, strings

BATCH = {
    "x": torch.tensor([[-1.0, 0.5], [float("nan"), 70.0], [18.0, float("inf")]]),
    "n": ragged([[0.25, 3.0], [], [9.0]], spare=2, dtype=torch.float32),
    "ids": ragged([[-1, 5, -1], [2**63 - 1], []], spare=1)._replace(weights=torch.arange(5.0)),
    "other": ragged([[7], [1, 2, 1], [3]]),
    "nested": nested([[[1], [2, 3]], [], [[4, 5, 6]]], spare=1, weighted=True),
    "words": strings([b"a", b"", b"a long word of more than sixty-four bytes, so that every branch is run once"]),
    "tags": strings([b"red", b"green", b"x" * 20, b"y" * 40], spare=5, outer=[0, 1, 1, 4]),
}
OPS = {
    "bucketize": lambda b: (ops.bucketize(b["x"], [18, 25, 65]), ops.bucketize(b["n"], [0.5])),
    "check_length": lambda b: ops.check_length(b["ids"], 3),
    "clip": lambda b: ops.clip(b["x"], -1, 1),
    "cross": lambda b: ops.cross(b["ids"], b["other"], capacity=6),
    "farm_hash": lambda b: ops.farm_hash({name: b[name] for name in ("words", "tags")}),
    "fill_missing": lambda b: (ops.fill_missing(b["x"], 0.5, 2), ops.fill_missing(b["n"], -1.0)),
    "flatten": lambda b: ops.flatten(b["nested"]),
    "from_dense": lambda b: ops.from_dense(b["x"]),
    "log1p": lambda b: ops.log1p(b["n"]),
    "min_max": lambda b: ops.min_max(b["x"], 0.0, 70.0),
    "mod": lambda b: (ops.mod(b["ids"], 1000), ops.mod({name: b[name] for name in ("ids", "other", "nested")}, 1000)),
    "multi_hash": lambda b: ops.multi_hash(b["ids"], [1000, 10]),
    "murmur_hash": lambda b: ops.murmur_hash(b["tags"]),
    "select_dense": lambda b: (ops.select_dense(b["x"]), ops.select_dense(b["n"], 2), ops.select_dense([b["n"]] * 2)),
    "select_ragged": lambda b: ops.select_ragged(b["ids"]),
    "signed_log1p": lambda b: ops.signed_log1p(b["n"]),
    "split_dense": lambda b: ops.split_dense(b["x"], ["a", "b"]),
    "standardize": lambda b: ops.standardize(b["x"], torch.ones(2), torch.zeros(2)),
    "to_dense": lambda b: ops.to_dense(b["ids"], 2, fill=-1),
    "truncate": lambda b: ops.truncate({name: b[name] for name in ("ids", "nested")}, 1, side="left"),
    "truncate_lists": lambda b: ops.truncate_lists(b["nested"], 2, side="right", pad="left"),
}
ON_THE_HOST = {"quantile_boundaries"}


def all_ops(batch: dict) -> dict:
    return {name: op(batch) for name, op in OPS.items()}


def tensors(tree: object) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def same(a: object, b: object) -> None:
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0, equal_nan=True)


def test_every_op_is_here():
    assert {*OPS} | ON_THE_HOST == {*ops.__all__}


def test_compiled_as_one_graph_it_is_the_same():
    torch._dynamo.reset()
    compiled = torch.compile(all_ops, fullgraph=True, dynamic=False)
    same(compiled(BATCH), all_ops(BATCH))


@pytest.mark.parametrize("name", OPS)
def test_nothing_is_written_to_the_input(name):
    before = tree_map_only(torch.Tensor, torch.clone, BATCH)
    OPS[name](BATCH)
    same(BATCH, before)


@pytest.mark.parametrize("name", OPS)
def test_no_host_read_and_no_shape_that_depends_on_data(name):
    graph = make_fx(OPS[name], tracing_mode="fake", _allow_non_fake_inputs=True)(BATCH).graph
    called = {n.target._opname for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert not called & {*READ_BY_THE_HOST, *SHAPED_BY_DATA}
    assert all(type(size) is int for n in graph.nodes for t in tensors(n.meta.get("val")) for size in t.shape)


def test_a_length_that_is_too_long_is_counted_in_a_capture():
    def count(column: Ragged) -> torch.Tensor:
        return ops.check_length(column, 2)

    column = ragged([[1, 2, 3], [4], [5, 6, 7]])
    with pytest.raises(ValueError, match="column: got a list of 3 values, expected at most 2"):
        count(column)
    assert int(torch.compile(count, fullgraph=True, dynamic=False)(column)) == 2
    assert int(make_fx(count, tracing_mode="fake", _allow_non_fake_inputs=True)(column)(column)) == 2


PRODUCTS = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.add.Tensor)


def calls_in(function, batch) -> Counter[str]:
    """How often each op of recfx runs in the graph that Inductor gets after its own passes."""
    seen: Counter[str] = Counter()

    def count(graph: torch.fx.Graph) -> None:
        seen.update(n.target._opname for n in graph.nodes if "recfx" in str(n.target))

    torch._dynamo.reset()
    options = {"post_grad_custom_pre_pass": StepPasses(), "post_grad_custom_post_pass": count}
    torch.compile(function, fullgraph=True, dynamic=False, options=options)(batch)
    return seen


def test_a_common_sub_expression_is_computed_once():
    def features(batch: dict) -> dict:
        return {
            "small": ops.mod(ops.farm_hash(batch["tags"]), 100),
            "large": ops.mod(ops.farm_hash(batch["tags"]), 1000),
            "murmur": ops.murmur_hash(batch["tags"]),
        }

    assert calls_in(features, BATCH) == {"farm_hashes": 1, "murmur_hashes": 1}


def test_a_small_cat_is_written_by_one_loop():
    """What is large, of many parts, or no number stays: parts of zero width, mixed dtypes and NaN among them."""
    aten, left = torch.ops.aten, []

    def count(graph: torch.fx.Graph) -> None:
        StepPasses()(graph)
        left.extend(tuple(n.meta["val"].shape) for n in graph.find_nodes(op="call_function", target=aten.cat.default))

    def join(x: torch.Tensor, n: torch.Tensor) -> list[torch.Tensor]:
        scalars = torch.stack([x.sum(), x[0, 0] / 0, x[1, 1].double() / 3, (x[0] * 0 / 0).sum()])
        flat = [torch.cat([x, n, x[:, :0], 2 * x], dim=dim) for dim in (1, -1)]
        return [
            scalars, *flat, torch.cat([x, x[:1]]), torch.cat([x[None], x[None] + 1], dim=0),
            torch.cat([n, n + 1]), torch.cat([x.repeat(300, 1), x]), torch.cat([x + i for i in range(17)]),
        ]  # fmt: skip

    x, n = torch.tensor([[1.0, -2.0], [3.0, 4.5]]), torch.tensor([[7, 8], [9, 10]])
    torch._dynamo.reset()
    options = {"post_grad_custom_pre_pass": count}
    compiled = torch.compile(join, fullgraph=True, dynamic=False, options=options)
    for got, expected in zip(compiled(x, n), join(x, n), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert sorted(left) == [(4, 2), (34, 2), (602, 2)]


def test_what_writes_or_draws_is_computed_as_often_as_it_stands_there():
    aten, graph = torch.ops.aten, torch.fx.Graph()
    x = graph.placeholder("x")
    shared, writing, drawing = aten.add.Tensor, aten.add_.Tensor, aten.rand_like.default
    calls = [graph.call_function(op, args) for op, args in ((shared, (x, x)), (writing, (x, x)), (drawing, (x,))) * 2]
    graph.output(calls)
    share_common(graph)
    assert Counter(node.target for node in graph.nodes if is_op(node)) == {shared: 1, writing: 2, drawing: 2}


def test_ids_are_read_where_they_lie():
    """Columns of the packed batch by their places, without a view of each; what a feature op made as it is."""

    packed = pack({"a": ragged([[5], [6, 7]], spare=2), "b": ragged([[], [8]]), "c": ragged([[9], [1]], spare=1)})

    def in_order(sections: list) -> tuple:
        batch = unpack(sections, packed.layout)
        columns = [batch["a"], ops.mod(batch["b"], 7), batch["c"]]
        return order_ids([c.values for c in columns], [c.offsets for c in columns])

    expected = in_order(packed.sections)
    assert calls_in(in_order, packed.sections) == {"order_ids_at": 1}
    options = {"post_grad_custom_pre_pass": StepPasses()}
    compiled = torch.compile(in_order, fullgraph=True, dynamic=False, options=options)
    assert all(map(torch.equal, compiled(packed.sections), expected))


@pytest.mark.parametrize(
    ("dtype", "calls"), [(torch.float32, {"mm": 2, "add": 2}), (torch.bfloat16, {"addmm": 2})], ids=["f32", "bf16"]
)
def test_a_bias_is_added_by_the_loop_that_reads_the_product(dtype, calls):
    seen: Counter[str] = Counter()

    def unfuse(graph: torch.fx.Graph) -> None:
        UnfuseBias()(graph)
        seen.update(n.target._opname for n in graph.nodes if n.target in PRODUCTS)

    def layers(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ w + b) @ w + x

    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((5, 8), (8, 8), (8,)))
    torch._dynamo.reset()
    compiled = torch.compile(layers, fullgraph=True, dynamic=False, options={"post_grad_custom_post_pass": unfuse})
    torch.testing.assert_close(compiled(x, w, b), layers(x, w, b), rtol=1e-5, atol=10 * torch.finfo(dtype).eps)
    assert seen == calls


def test_counts_reach_aux_captured_or_not():
    def features(batch: dict) -> dict:
        crossed, overflow = ops.cross(batch["a"], batch["b"], capacity=2)
        counts = {"cross": overflow, "long": ops.check_length(batch["c"], 2)}
        return {**batch, "a": crossed, COUNTS: counts}

    step, batch = linear_step(features=features), deepfm_batches(1)[0]
    expected = int(features(batch)[COUNTS]["cross"])
    assert expected > 0
    runs = (step.update, step.update_, capture(step, step.init(linear_params()), batch), step.evaluate_)
    for run in runs:
        counts = run(step.init(linear_params()), batch)[1].counts
        assert {name: int(count) for name, count in counts.items()} == {"cross": expected, "long": 0}


def test_a_dict_of_columns_is_computed_by_as_many_loops_as_one_column():
    """Horizontal fusion: what is not a view stays the same, from 2 columns to 40."""

    def features(batch: dict) -> dict:
        words, ids = ({name: c for name, c in batch.items() if name[0] == kind} for kind in "wi")
        numbers = [c for name, c in batch.items() if name[0] == "n"]
        buckets = ops.bucketize(ops.log1p(ops.select_dense(numbers)), [0.5, 1.0])
        return {
            **ops.mod(ops.farm_hash(words), 100),
            **ops.truncate(ops.mod(ids, 1000), 2, side="left"),
            **ops.split_dense(buckets, [f"b{i}" for i in range(len(numbers))]),
        }

    def num_ops(num_columns: int) -> Counter[str]:
        batch = {f"{kind}{i}": BATCH[name] for i in range(num_columns) for kind, name in zip("win", KINDS, strict=True)}
        graph = make_fx(features, tracing_mode="fake", _allow_non_fake_inputs=True)(batch).graph
        graph.eliminate_dead_code()
        return Counter(str(n.target) for n in graph.nodes if is_op(n) and not is_view(n))

    KINDS = ("tags", "ids", "n")
    few, many = num_ops(2), num_ops(40)
    assert few == many
    assert few["recfx.farm_hashes.default"] == 1
