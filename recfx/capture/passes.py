"""What capture changes in a step's graph, as passes of Inductor."""

from __future__ import annotations

import functools
import operator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._ops import OpOverload
from torch.fx import Graph, Node

from recfx import kernels
from recfx.kernels.dense.all_finite import all_finite, finite_parts
from recfx.kernels.lists.order_ids import order_ids, order_ids_at

__all__ = ["StepPasses", "UnfuseBias", "check_early", "join_small", "name_places", "share_common"]

aten = torch.ops.aten
KERNELS = Path(kernels.__path__[0])

SMALL, FEW = 512, 16  # numbers of a `cat`, and its parts, that are written by one loop


class _Pass(CustomGraphPass):
    """Torch's caches of compiled graphs know it by the hash of this file and of all sources of the operators.

    The caches are read before the operators' fakes run, so a graph must not be found again after one has changed.
    """

    def uuid(self) -> bytes:
        sources = (path for path in KERNELS.rglob("*") if path.suffix in (".py", ".cpp", ".h"))
        return get_hash_for_files((__file__, *map(str, sorted(sources))))


class StepPasses(_Pass):
    """All passes, over Inductor's graph as it is lowered: functional, so equal calls give equal results."""

    def __call__(self, graph: Graph) -> None:
        share_common(graph)
        name_places(graph)
        join_small(graph)
        check_early(graph)


class UnfuseBias(_Pass):
    """After Inductor's own passes: x @ w + b as a product and a sum, which joins the loop that reads it.

    Inductor makes one call of the two. On a CPU that copies b into every row of the result before the product.
    """

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            bias, x, weight = node.args
            value = _tensor(node)
            if node.kwargs or value.device.type != "cpu" or value.dtype != torch.float32:  # bf16 would round twice
                continue
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (x, weight))
                product.meta["val"] = torch.empty_like(value)
                total = graph.call_function(aten.add.Tensor, (product, bias))
            total.meta.update(node.meta)
            node.replace_all_uses_with(total)
            graph.erase_node(node)


def share_common(graph: Graph) -> None:
    """Computes each common sub-expression once: two features may hash one column.

    Inductor itself shares within a fused loop only, and never an operator of its user.
    """
    known: dict[tuple, Node] = {}
    for node in list(graph.nodes):
        if _is_pure(node):
            key = (node.target, repr((node.args, node.kwargs)))  # a node's repr is its name
            first = known.setdefault(key, node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _is_pure(node: Node) -> bool:
    if isinstance(node.target, OpOverload):
        is_random = torch.Tag.nondeterministic_seeded in node.target.tags
        return bool(node.all_input_nodes) and not node.target._schema.is_mutable and not is_random
    return node.target is operator.getitem


def name_places(graph: Graph) -> None:
    """On a CPU, reads ids where they are in the packed batch, without a view of each column's values and offsets."""
    for node in graph.find_nodes(op="call_function", target=order_ids):
        columns: list[tuple[Node, Node]] = list(zip(*node.args, strict=True))  # type: ignore[arg-type]
        if _tensor(columns[0][0]).device.type != "cpu":
            continue
        values, offsets, places = dict[Node, int](), dict[Node, int](), list[int]()
        for value, offset in columns:
            (whole, first), (whole_offsets, first_offset) = _part_of(value), _part_of(offset)
            places += values.setdefault(whole, len(values)), first, _tensor(value).numel()
            places += offsets.setdefault(whole_offsets, len(offsets)), first_offset
        num_samples = _tensor(columns[0][1]).numel() - 1
        with graph.inserting_before(node):
            named = graph.call_function(order_ids_at, ([*values], [*offsets], places, num_samples))
        named.meta.update({k: v for k, v in node.meta.items() if k != "eager_input_vals"})  # those of other arguments
        node.replace_all_uses_with(named)
        graph.erase_node(node)


def join_small(graph: Graph) -> None:
    """On a CPU, writes a small `cat` of few parts by one loop, as a sum of the parts padded by zeros: Inductor makes a
    loop and a view of each part."""
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        parts: Any = node.args[0]
        value, dim = _tensor(node), int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        if value.device.type != "cpu" or not value.is_floating_point() or value.numel() > SMALL or len(parts) > FEW:
            continue
        if any(_tensor(part).dim() != value.dim() for part in parts):  # an empty one, which cat overlooks
            continue
        sizes = [_tensor(part).shape[dim] for part in parts]
        others = [0, 0] * (value.dim() - 1 - dim % value.dim())
        terms: list[Node] = []
        with graph.inserting_before(node):
            for i, part in enumerate(parts):
                pads = [*others, sum(sizes[:i]), sum(sizes[i + 1 :])]
                terms.append(_call(graph, aten.constant_pad_nd.default, part, pads, 0.0))
            total = functools.reduce(lambda a, b: _call(graph, aten.add.Tensor, a, b), terms)
        node.replace_all_uses_with(total)
        graph.erase_node(node)


def check_early(graph: Graph) -> None:
    """Checks gradients for NaN directly after they are computed.

    Inductor moves a node to its first user. For these it comes after the optimiser, which then would work on a copy of
    all row gradients that the table has reserved.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    last_placeholder = graph.find_nodes(op="placeholder")[-1]
    for target in (all_finite, finite_parts):
        for node in graph.find_nodes(op="call_function", target=target):
            max([last_placeholder, *node.all_input_nodes], key=order.__getitem__).append(node)


def _call(graph: Graph, op: OpOverload, *args: Any) -> Node:
    node = graph.call_function(op, args)
    node.meta["val"] = op(*(_tensor(arg) if isinstance(arg, Node) else arg for arg in args))
    return node


def _part_of(node: Node) -> tuple[Node, int]:
    """The tensor of which `node` is a slice, and its first item there; itself where it is none."""
    if node.target is aten.slice.Tensor and len(node.args) == 4:
        whole: Any = node.args[0]
        if _tensor(whole).dim() == 1 and _tensor(whole).is_contiguous():
            return whole, int(node.args[2])  # type: ignore[arg-type]
    return node, 0


def _tensor(node: Node) -> Tensor:
    """Its shape, dtype and device."""
    return node.meta["val"]
