"""Writes graphs/: the captured example steps as text, as counts and as a drawing. `python -m graphs.render`

The graphs are those of `python -m recfx.examples.deepfm` and `.deepctr`, for a batch of 4, and, as counts only, that
of a feature function for 200 features. `tests/test_graphs.py` compares them with the files; `make graphs` accepts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from graphs.dataflow import STAGES, Flow, flow_of, handed_on, is_op, is_view, short, stages_of, tensors
from graphs.drawing import draw
from graphs.many_features import NUM_FEATURES, ops_text
from recfx.capture import trace
from recfx.examples import deepctr, deepfm
from recfx.types import Batch, Ragged, pack

__all__ = [
    "FOLDER", "PROGRAMS", "Golden", "Program", "capture", "largest_temporary", "mutated", "render", "render_features",
    "torch_version",
]  # fmt: skip

FOLDER = Path(__file__).parent
BATCH_SIZE = 4


class Program(NamedTuple):
    """A captured step of an example program."""

    example: str  # of EXAMPLES
    title: str
    function: str  # of recfx.step.Step
    accumulation: int


class Golden(NamedTuple):
    """A graph, and the facts about it."""

    name: str
    program: Program
    graph_module: torch.fx.GraphModule
    flow: Flow
    stages: dict[Node, str]


PROGRAMS = {
    "deepfm": Program("deepfm", "one training step", "in_graph_", 1),
    "deepfm_accumulate": Program("deepfm", "one micro-batch of an accumulation window", "in_graph_", 4),
    "deepfm_eval": Program("deepfm", "one evaluation step", "evaluate_", 1),
    "deepctr": Program("deepctr", "one training step", "in_graph_", 1),
}


def capture(name: str) -> Golden:
    """The graph of PROGRAMS[name], its nodes named `<stage>_<op>_<number>` so that a change stays local in a diff."""
    program = PROGRAMS[name]
    example = EXAMPLES[program.example]
    args = example.module.parse([f"--gradient_accumulation_steps={program.accumulation}"])
    step, state = example.module.build_step(args)
    graph_module = trace(getattr(step, program.function), state, example.batch())
    flow = flow_of(graph_module.graph)
    stages = stages_of(flow)
    _rename(flow, stages)
    graph_module.recompile()
    return Golden(name, program, graph_module, flow, stages)


def render(golden: Golden) -> dict[str, str]:
    """The files of a graph by name."""
    return {
        f"{golden.name}.ops.txt": _ops_text(golden),
        f"{golden.name}.fx.txt": _fx_text(golden),
        f"{golden.name}.svg": _drawing(golden),
    }


def render_features() -> dict[str, str]:
    """The file that shows many features as few ops."""
    return {f"features{NUM_FEATURES}.ops.txt": ops_text()}


def mutated(golden: Golden) -> list[str]:
    """Names of the inputs that the graph writes to, in their order."""
    written = {storage for storages in golden.flow.writes.values() for storage in storages}
    return [node.name for node in golden.flow.nodes if node.op == "placeholder" and node in written]


def largest_temporary(golden: Golden) -> torch.Tensor:
    """The largest tensor that an op makes: a fake one, with a shape and dtype only."""
    made = [t for n in golden.flow.nodes if is_op(n) and golden.flow.storage[n] is n for t in tensors(n)]
    return max(made, key=_num_bytes)


def torch_version() -> str:
    """Without the build: 2.13.0 and not 2.13.0+cpu."""
    return torch.__version__.split("+")[0]


def _ragged(per_sample: int, dtype: torch.dtype) -> Ragged:
    offsets = torch.arange(BATCH_SIZE + 1, dtype=torch.int32) * per_sample
    return Ragged(torch.zeros(BATCH_SIZE * per_sample, dtype=dtype), offsets)


def _deepfm_batch() -> Batch:
    columns: dict[str, Any] = {"label": torch.zeros(BATCH_SIZE, 1)}
    columns |= {name: _ragged(1, torch.float32) for name in deepfm.NUMERIC}
    columns |= {name: _ragged(1, torch.int64) for name in deepfm.CATEGORICAL}
    return pack(columns)


def _deepctr_batch() -> Batch:
    strings = torch.arange(BATCH_SIZE * 8 + 1, dtype=torch.int32) * 2
    columns: dict[str, Any] = {"label": torch.zeros(BATCH_SIZE, 1)}
    columns |= {name: torch.zeros(BATCH_SIZE, 8) for name in ("dense1", "dense2")}
    columns |= {name: _ragged(1, torch.int64) for name in ("item", "category", "city")}
    columns["clicks"] = _ragged(16, torch.int64)
    columns["words"] = Ragged(torch.zeros(BATCH_SIZE * 16, dtype=torch.uint8), strings, None, (strings[:5] * 4,))
    return pack(columns)


class Example(NamedTuple):
    """An example program, and a small batch for it."""

    module: Any
    title: str
    batch: Callable[[], Batch]
    columns: str


EXAMPLES = {
    "deepfm": Example(
        deepfm,
        "DeepFM",
        _deepfm_batch,
        f"{len(deepfm.NUMERIC)} numeric and {len(deepfm.CATEGORICAL)} categorical columns",
    ),
    "deepctr": Example(
        deepctr,
        "DeepCTR",
        _deepctr_batch,
        "2 dense columns of 8, 3 of single ids, a list of ids and a list of strings",
    ),
}


def _rename(flow: Flow, stages: dict[Node, str]) -> None:
    numbers: Counter[str] = Counter()
    constants: dict[Any, str] = {}
    for node in flow.nodes:
        if node.op == "get_attr":
            base = constants.setdefault(node.target, f"constant_{len(constants)}")
        elif node in stages and node.op == "call_function":
            op = node.target._opname if is_op(node) else node.target.__name__
            base = f"{stages[node]}_{op}"
        else:
            continue
        node.name = f"{base}_{numbers[base]}" if numbers[base] else base
        numbers[base] += 1


def _example(golden: Golden) -> Example:
    return EXAMPLES[golden.program.example]


def _config(golden: Golden) -> list[str]:
    room = " with room for one value per sample" if golden.program.example == "deepfm" else ""
    return [
        f"{_example(golden).title}, {golden.program.title}: the ATen graph of Step.{golden.program.function}"
        " (recfx.capture.trace).",
        f"config: python -m recfx.examples.{golden.program.example} --batch_size={BATCH_SIZE}"
        f" --gradient_accumulation_steps={golden.program.accumulation}",
        f"batch:  {BATCH_SIZE} samples, {_example(golden).columns}" + room,
    ]


def _fx_text(golden: Golden) -> str:
    lines = [f"# {line}" for line in (f"torch:  {torch_version()}", *_config(golden))] + [""]
    for node in golden.flow.nodes:
        made = " ".join(map(short, tensors(node)))
        if node.op == "placeholder":
            lines.append(f"input {node.name}: {made}")
        elif node.op == "get_attr":
            lines.append(f"{node.name}: {short(getattr(golden.graph_module, str(node.target)))} = constant")
        elif node.op == "output":
            lines.append(f"return {_text(node.args[0])}")
        else:
            arguments = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
            op = node.target if is_op(node) else node.target.__name__
            written = [s.name for s in golden.flow.writes[node] if s.op == "placeholder"]
            effect = f"  # writes {', '.join(written)}" if written else ""
            lines.append(f"{node.name}: {made or '()'} = {op}({', '.join(arguments)}){effect}")
    return "\n".join(lines) + "\n"


def _text(argument: Any) -> str:
    if isinstance(argument, list | tuple):
        return f"[{', '.join(map(_text, argument))}]"
    return str(argument)


def _ops_text(golden: Golden) -> str:
    ops = [n for n in golden.flow.nodes if is_op(n)]
    inputs = {n.name: n for n in golden.flow.nodes if n.op == "placeholder"}
    temporary = largest_temporary(golden)
    lines = [f"# {line}" for line in _config(golden)]
    lines += ["", f"{'stage':<12}{'ops':>5}{'views':>7}"]
    for stage in STAGES:
        own = [n for n in ops if golden.stages[n] == stage]
        if own:
            num_views = sum(map(is_view, own))
            lines.append(f"{stage:<12}{len(own) - num_views:>5}{num_views:>7}")
    counts = Counter(str(n.target) for n in ops)
    lines += ["", "custom ops"] + [f"{counts[op]:>6}  {op}" for op in sorted(counts) if op.startswith("recfx.")]
    lines += ["", "ops"] + [f"{counts[op]:>6}  {op}" for op in sorted(counts) if not op.startswith("recfx.")]
    lines += ["", "mutated inputs"] + [f"        {name}: {short(tensors(inputs[name])[0])}" for name in mutated(golden)]
    lines += ["", "largest temporary", f"        {short(temporary)}, {_num_bytes(temporary)} bytes"]
    return "\n".join(lines) + "\n"


def _drawing(golden: Golden) -> str:
    ops = [n for n in golden.flow.nodes if is_op(n)]
    num_views = sum(map(is_view, ops))
    temporary = largest_temporary(golden)
    inputs = [t for n in golden.flow.nodes if n.op == "placeholder" for t in tensors(n)]
    facts = [
        f"{BATCH_SIZE} samples of {_example(golden).columns}",
        f"one graph: {len(ops) - num_views} ops and {num_views} views",
        f"largest temporary {short(temporary)}, beside table rows {short(max(inputs, key=_num_bytes))}",
        "a dot: tensors that the stage on its left hands to the one below",
    ]
    handed = handed_on(golden.flow, golden.stages)
    return draw(f"{_example(golden).title}: {golden.program.title}", facts, golden.flow, golden.stages, handed)


def _num_bytes(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()


def main() -> None:
    for files in (*(render(capture(name)) for name in PROGRAMS), render_features()):
        for file, text in files.items():
            (FOLDER / file).write_text(text)


if __name__ == "__main__":
    main()
