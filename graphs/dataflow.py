"""The dataflow of a captured graph: its stages, and the tensors between them. It reads FX nodes and changes none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.graph import dtype_abbrs
from torch.utils._pytree import tree_leaves

__all__ = ["STAGES", "Flow", "Handed", "flow_of", "handed_on", "is_op", "is_view", "short", "stages_of", "tensors"]

STAGES = ("batch", "features", "lookup", "forward", "backward", "window", "sparse", "dense", "metrics", "finite", "aux")
LOOKUPS = ("recfx.order_ids", "recfx.find", "recfx.find_or_insert_", "recfx.pool")
# The stage that a write to this part of the state completes.
COMPLETES = {
    "params": "dense", "dense": "dense", "tables": "sparse", "metrics": "metrics", "stats": "metrics",
    "window": "window", "step": "window", "nonfinite": "finite",
}  # fmt: skip


class Flow(NamedTuple):
    """A graph in its order of execution, with writes as edges."""

    nodes: list[Node]
    storage: dict[Node, Node]  # the input or op that owns the memory of a node's result
    writes: dict[Node, list[Node]]  # the storages an op writes to
    writer: dict[tuple[Node, Node], Node]  # (op, input of it) -> the op that last wrote to that input's storage

    def producers(self, node: Node) -> set[Node]:
        before = (self.writer.get((node, i)) for i in node.all_input_nodes)
        return {*node.all_input_nodes, *(w for w in before if w is not None)}


def flow_of(graph: Graph) -> Flow:
    flow, last = Flow(list(graph.nodes), {}, {}, {}), {}
    for node in flow.nodes:
        flow.storage[node] = flow.storage[node.all_input_nodes[0]] if _aliases_its_input(node) else node
        flow.writes[node] = [flow.storage[n] for n in _written(node)]
        for i in node.all_input_nodes:
            if (writer := last.get(flow.storage[i])) is not None:
                flow.writer[node, i] = writer
        last.update(dict.fromkeys(flow.writes[node], node))
    return flow


def stages_of(flow: Flow) -> dict[Node, str]:
    """The stage of every op and batch input, from dataflow only.

    features    ops that depend on the batch only, for lookup or loss
    lookup      the lookup ops, and other ops that they need
    forward     other ops that the loss needs
    backward    ops from there to a gradient, before any optimiser state is read
    window      ops that accumulate gradients, or are shared by the optimisers
    sparse, dense, metrics     ops that end in a write to that part of the state
    finite      ops that check whether losses, logits and gradients are finite
    """
    ends, sources, reads = _ends(flow), _sources(flow), _reads(flow)
    stages: dict[Node, str] = {}
    for node in flow.nodes:
        before = {stages.get(p) for p in flow.producers(node)}
        if node.op == "placeholder" and _part(node) == "sections":
            stages[node] = "batch"
        elif node.op != "call_function":
            continue
        elif _name(node) == "getitem":
            stages[node] = stages.get(node.args[0], "")
        elif _name(node) in LOOKUPS:
            stages[node] = "lookup"
        elif not sources[node]:
            continue
        elif ends[node] & {"lookup", "aux"}:
            own = "lookup" if "lookup" in ends[node] else "forward"
            stages[node] = "features" if sources[node] == {"sections"} else own
        elif (
            before & {"lookup", "forward", "backward"}
            and reads[node] != {"tables"}  # such as a counter that the lookup has written to as well
            and not sources[node] & {"window", "dense"}
            and (
                ends[node] & {"sparse", "dense", "window"} and not any(_part(s) in COMPLETES for s in flow.writes[node])
            )
        ):
            stages[node] = "backward"
        elif sources[node] & {"window", "dense", "tables", "metrics"} or ends[node] == {"metrics"}:
            own = {COMPLETES[p] for s in flow.writes[node] if (p := _part(s)) in COMPLETES} or ends[node]
            stages[node] = next(iter(own)) if len(own) == 1 else "window"
    # The rest, constants and views of inputs, belongs to the stage that uses it first.
    for node in reversed(flow.nodes):
        if node.op == "call_function" and not stages.get(node):
            stages[node] = min((stages[u] for u in node.users if stages.get(u)), key=STAGES.index)
    return stages


class Handed(NamedTuple):
    """The tensors that one stage passes to another."""

    tensors: Counter[str]  # how many of each dtype and shape, larger ones first
    in_place: list[str]  # parts of the state that the first stage writes and the second reads


def handed_on(flow: Flow, stages: dict[Node, str]) -> dict[tuple[str, str], Handed]:
    """The tensors by (from, to). Raises AssertionError when a stage feeds an earlier one."""
    seen: dict[tuple[str, str], dict[Node, str | None]] = {}
    for node in flow.nodes:
        to = "aux" if node.op == "output" else stages.get(node)
        for i in node.all_input_nodes if to else ():
            writer = flow.writer.get((node, i))
            through = writer is not None and flow.storage[i].op == "placeholder"
            source = stages.get(writer if through else i)
            if source and source != to:
                assert STAGES.index(source) < STAGES.index(to), f"{i} of {source} is used by {node} of {to}"
                seen.setdefault((source, to), {})[i] = _part(flow.storage[i]) if through else None
    handed = {}
    for key in sorted(seen, key=lambda key: tuple(map(STAGES.index, key))):
        plain = [t for node, part in seen[key].items() if part is None for t in tensors(node)]
        plain.sort(key=lambda t: -t.numel() * t.element_size())
        handed[key] = Handed(Counter(map(short, plain)), sorted({p for p in seen[key].values() if p}))
    return handed


def tensors(node: Node) -> list[Tensor]:
    """The fake tensors that a node yields."""
    return [t for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]


def short(t: Tensor) -> str:
    return f"{dtype_abbrs[t.dtype]}{list(t.shape)}"


def is_op(node: Node) -> bool:
    return isinstance(node.target, OpOverload)


def is_view(node: Node) -> bool:
    """Whether it is a view of a tensor: no work, no memory."""
    return is_op(node) and _aliases_its_input(node) and not node.target._schema.is_mutable


def _aliases_its_input(node: Node) -> bool:
    if _name(node) == "getitem":
        return True
    return is_op(node) and any(r.alias_info is not None for r in node.target._schema.returns)


def _written(node: Node) -> Iterator[Node]:
    arguments = node.target._schema.arguments if is_op(node) else []
    for argument, value in zip(arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from (v for v in tree_leaves(value) if isinstance(v, Node))


def _ends(flow: Flow) -> dict[Node, set[str]]:
    """The stages that use a node's result, directly or not."""
    ends: dict[Node, set[str]] = {node: set() for node in flow.nodes}
    for node in reversed(flow.nodes):
        completes = {COMPLETES[p] for s in flow.writes[node] if (p := _part(s)) in COMPLETES}
        if node.op == "output":
            completes = {"aux"}
        elif _name(node) in LOOKUPS:
            completes = {"lookup"}
        ends[node] |= completes
        for producer in flow.producers(node):
            ends[producer] |= completes or ends[node]
    return ends


def _sources(flow: Flow) -> dict[Node, set[str]]:
    """The parts of state and batch that a node's result depends on."""
    sources: dict[Node, set[str]] = {}
    for node in flow.nodes:
        own = {_part(node)} if node.op == "placeholder" else set()
        sources[node] = own.union(*(sources[p] for p in flow.producers(node)))
    return sources


def _reads(flow: Flow) -> dict[Node, set[str]]:
    """The parts of state and batch that a node's arguments come from, whatever has written to them before."""
    reads: dict[Node, set[str]] = {}
    for node in flow.nodes:
        own = {_part(node)} if node.op == "placeholder" else set()
        reads[node] = own.union(*(reads[i] for i in node.all_input_nodes))
    return reads


def _part(node: Node) -> str:
    return node.name.split("_")[0] if node.op == "placeholder" else ""


def _name(node: Node) -> str:
    """`recfx.pool`, `aten.mul`, `getitem`."""
    if is_op(node):
        return str(node.target.overloadpacket)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
