"""The launches of a captured DeepFM step on CUDA, as text. Run by `graphs.fake_cuda`: tensors on CUDA are fake.

A CUDA graph replays one node per launch. This module counts the kernels that Inductor writes, the products that it
calls, and the launches of each recfx operator: the launcher is called with fake tensors, its Triton launches and torch
calls are recorded, and nothing runs.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.runtime.jit import JITFunction

from graphs.fake_cuda import Written, compiling
from recfx.capture import sections_function
from recfx.examples import deepfm as program
from recfx.kernels.op import gpu_function
from recfx.types import Batch, Ragged, pack

__all__ = ["NODES", "Launch", "launches", "text"]

BATCH_SIZE, MAX_ROWS = 1000, 100_000
NODE_US = 1.7  # from one small kernel of a graph to the next, predicted
LOOPS = [
    "_to_copy", "abs", "add", "add_", "all", "amax", "any", "arange", "bitwise_and", "bitwise_not", "bitwise_or", "cat",
    "clamp", "clamp_", "clamp_min", "clone", "constant_pad_nd", "copy_", "div", "eq", "fill_", "full", "ge", "gt",
    "index", "index_select", "isfinite", "isinf", "le", "logical_and", "logical_not", "logical_or", "lt", "masked_fill",
    "mul", "ne", "new_full", "new_zeros", "ones", "rsub", "scalar_tensor", "sigmoid", "stack", "sub", "sum", "to",
    "where", "zero_", "zeros", "zeros_like",
]  # fmt: skip
# Graph nodes per call of torch on CUDA, by operator name, for batches of this size.
NODES: dict[str, Callable[..., int]] = {
    **dict.fromkeys(LOOPS, lambda *_, **__: 1),
    **dict.fromkeys(("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"), lambda *_, **__: 0),
    "cumsum": lambda *_, **__: 2,  # a scan's state is cleared first
    # A radix sort: two nodes a byte of a key, and five that fill positions, count digits and sum them up.
    "sort": lambda x, *_, **__: 5 + 2 * x.element_size(),
    "index_put_": lambda *_, **__: 20,  # sorts indices to add: 64-bit keys, of which a few bits are sorted
}


class Launch(NamedTuple):
    """The launches of one call in the step."""

    nodes: int
    what: str


class _Counted(TorchDispatchMode):
    """Records the names of launches in order, with their nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, schema = func.overloadpacket.__name__, func._schema
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        is_view |= func.namespace == "prim"  # a query, such as the device
        if name not in NODES and not is_view:
            raise NotImplementedError(
                f"{func}: got an unknown number of nodes, expected one in graphs.cuda_code.NODES."
            )
        if nodes := 0 if is_view else NODES[name](*args, **(kwargs or {})):
            self.nodes.append(Launch(nodes, f"torch.{name.strip('_')}"))
        return func(*args, **(kwargs or {}))


@contextmanager
def _counting(mode: Any) -> Iterator[list[Launch]]:
    counted = _Counted()

    def launched(kernel: JITFunction, *_: Any, **__: Any) -> None:
        counted.nodes.append(Launch(1, kernel.fn.__name__))

    with mode, counted, mock.patch.object(JITFunction, "run", launched):
        yield counted.nodes


def operator_launches(node: Node) -> list[Launch]:
    """The launches of one call of an operator of recfx, whose arguments are fake tensors."""
    name: str = node.target._opname  # type: ignore[union-attr]
    args, kwargs = tree_map_only(Node, lambda n: n.meta["val"], (node.args, node.kwargs))
    mode = next(n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)).meta["val"].fake_mode
    with _counting(mode) as nodes:
        on_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(f"recfx::{name}", "CUDA")
        function = gpu_function(name) if on_cuda else None
        if function is None:
            key = torch._C.DispatchKey.CompositeExplicitAutograd
            function = node.target.redispatch  # type: ignore[union-attr]
            args = (torch._C.DispatchKeySet(key), *args)
        function(*args, **kwargs)
    return nodes


def deepfm_batch(batch_size: int) -> Batch:
    """An empty batch with the layout of the example's reader: one value per sample and column."""
    offsets = torch.zeros(batch_size + 1, dtype=torch.int32)
    columns: dict[str, Any] = {"label": torch.zeros(batch_size, 1)}
    for names, dtype in ((program.NUMERIC, torch.float32), (program.CATEGORICAL, torch.int64)):
        columns |= {name: Ragged(torch.zeros(batch_size, dtype=dtype), offsets) for name in names}
    return pack(columns)


def deepfm_code(batch_size: int = BATCH_SIZE) -> Written:
    """The code that Inductor writes for the step of `bench/gpu_deepfm.py`."""
    arguments = ["--gradient_accumulation_steps", "1", "--numeric", "raw", "--device", "cuda"]
    args, batch = program.parse([*arguments, "--max_rows", str(MAX_ROWS)]), deepfm_batch(batch_size)
    sections = batch.sections
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        step, state = program.build_step(args)
        on_cuda = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in sections]
        return compiling(sections_function(step.in_graph_, batch.layout), state, on_cuda)


def _kernel(code: str, name: str, arguments: str, names: dict[str, str]) -> str:
    """A kernel of Inductor: how many loops it joins and which parts of the state it writes; its name is not shown,
    since it ends in a number that any change of the step changes."""
    source = code[code.index(f"async_compile.triton('{name}'") :].split("async_compile.triton(", 2)[1]
    kind = "loop" if name.startswith("triton_poi") else "reduction"
    joined = re.search(r"'num_kernels': (\d+)", source)
    mutated = ast.literal_eval(re.search(r"'mutated_arg_names': (\[.*?\])", source)[1])  # type: ignore[index]
    parameters = [p.split(":")[0].strip() for p in re.search(rf"def {name}\((.*?)\):", source)[1].split(",")]  # type: ignore[index]
    given = dict(zip(parameters, arguments.split(", "), strict=False))
    said = f"{kind}, {joined[1]} in one" if joined else kind
    written = sorted({names[given[p]].removeprefix("L['state'].") for p in mutated if given.get(p) in names})
    trained = [name for path in written for name in re.findall(r"^params\['(.*)'\]$", path)]
    others = [path for path in written if not re.search(r"\['.*'\]$", path)]
    said = f"{said}; trains {', '.join(trained)}" if trained else said
    return f"{said}; writes {', '.join(others)}" if others else said


def launches(written: Written) -> list[Launch]:
    """The launches in the order of their replay."""
    code, calls = written.code[written.code.index("def call(") :], list[Launch]()
    operators = [n for n in written.graph.nodes if getattr(n.target, "namespace", "") == "recfx"]
    in_order = {target: iter([n for n in operators if n.target is target]) for target in {n.target for n in operators}}
    shapes = dict(re.findall(r"(buf\d+) = (?:empty_strided_cuda\(|reinterpret_tensor\(\w+, )\((.*?),? ?\)", code))
    shapes |= {new: shapes.get(old, "?") for new, old in re.findall(r"(buf\d+) = (buf\d+); del", code)}
    for line in map(str.strip, code.splitlines()):
        if found := re.match(r"(triton_\w+)\.run\((.*), stream=", line):
            calls.append(Launch(1, f"inductor: {_kernel(written.code, found[1], found[2], written.names)}"))
        elif found := re.match(r"extern_kernels\.(\w+)\(.*out=(?:reinterpret_tensor\()?(\w+)", line):
            calls.append(Launch(1, f"product: {found[1]} to [{shapes.get(found[2], '?')}]"))
        elif found := re.match(r"(?:buf\d+ = )?torch\.ops\.recfx\.(\w+)\.default\(", line):
            own = operator_launches(next(in_order[getattr(torch.ops.recfx, found[1]).default]))
            calls.append(Launch(sum(l.nodes for l in own), f"{found[1]}: {_said(own)}"))
        elif found := re.match(r"(?:buf\d+ = )?torch\.ops\.(\w+)\.(\w+)\.", line):
            raise NotImplementedError(f"{line}: got a call that is not counted, expected none.")
    return calls


def _said(own: list[Launch]) -> str:
    nodes = Counter[str]()
    for launch in own:
        nodes[launch.what] += launch.nodes
    return ", ".join(name if num == 1 else f"{name} {num}" for name, num in nodes.items())


def text() -> str:
    """The text of graphs/deepfm.cuda.txt."""
    calls = launches(deepfm_code())
    total = sum(call.nodes for call in calls)
    kinds = Counter[str]()
    for call in calls:
        kinds["inductor" if call.what.startswith("inductor") else call.what.split(":")[0]] += call.nodes
    version = torch.__version__.split("+")[0]
    lines = [
        f"# torch:  {version}",
        f"# DeepFM, one training step of {BATCH_SIZE} samples on CUDA: nodes of its graph, counted without a device.",
        "# config: python -m recfx.examples.deepfm --gradient_accumulation_steps=1 --numeric=raw --device=cuda",
        "",
        *(f"{nodes:>5}  {what}" for what, nodes in sorted(kinds.items())),
        f"{total:>5}  in all: {total * NODE_US:.0f} us at {NODE_US} us a node, predicted",
        "",
        *(f"{call.nodes:>5}  {call.what}" for call in calls),
    ]
    return "\n".join(lines) + "\n"
