"""Draws a captured graph as SVG: its stages along a diagonal, and above it the tensors between them."""

from __future__ import annotations

import textwrap
from collections import Counter
from xml.sax.saxutils import escape

from torch.fx import Node

from graphs.dataflow import STAGES, Flow, Handed, is_op, is_view

__all__ = ["draw"]

MARGIN, STEP_X, STEP_Y = 28, 116, 88
BOX_WIDTH, BOX_HEIGHT = 196, 62
LINE_HEIGHT, CODE_WIDTH = 14, 26  # inside a box: pixels, characters
MAX_LINES = 3
COLORS = {
    "batch": "#64748b",
    "features": "#0d9488",
    "lookup": "#2563eb",
    "forward": "#4f46e5",
    "backward": "#9333ea",
    "window": "#a16207",
    "sparse": "#ea580c",
    "dense": "#dc2626",
    "metrics": "#16a34a",
    "finite": "#be185d",
    "aux": "#64748b",
}
STYLE = """
text { font-family: ui-sans-serif, system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #0f172a }
.title { font-size: 21px; font-weight: 650 }
.fact, .note { fill: #475569 }
.fact { font-size: 13.5px }
.stage { font-size: 15px; font-weight: 650 }
.note { font-size: 11.5px }
.code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 11px }
.state { font-style: italic }
"""


def draw(
    title: str, facts: list[str], flow: Flow, stages: dict[Node, str], handed: dict[tuple[str, str], Handed]
) -> str:
    """The drawing. The same graph gives the same bytes.

    Args:     facts: lines under the title.
    """
    present = [s for s in STAGES if any(s in key for key in handed)]
    place = {s: (MARGIN + i * STEP_X, MARGIN + i * STEP_Y) for i, s in enumerate(present)}
    width = place[present[-1]][0] + BOX_WIDTH + MARGIN
    height = place[present[-1]][1] + BOX_HEIGHT + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" rx="12" fill="#ffffff"/>',
    ]
    for stage in present:
        parts += _drop(stage, place, [a for a, b in handed if b == stage])
    for stage in present:
        parts += _line(stage, place, [b for a, b in handed if a == stage])
    for (source, target), what in handed.items():
        parts += _dot(source, target, what, place)
    for stage in present:
        parts += _box(stage, place[stage], flow, stages)
    parts += _caption(title, facts, height)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _drop(stage: str, place: dict[str, tuple[int, int]], sources: list[str]) -> list[str]:
    """The vertical line into a box, from the highest stage that feeds it."""
    if not sources:
        return []
    x, y = place[stage][0] + BOX_WIDTH // 2, place[stage][1]
    top = min(place[s][1] for s in sources) + BOX_HEIGHT // 2
    color = COLORS[stage]
    return [
        f'<path d="M{x} {top}V{y - 6}" stroke="{color}" stroke-width="1.6" stroke-opacity=".55" fill="none"/>',
        f'<path d="M{x - 4.5} {y - 8}L{x} {y - 1}L{x + 4.5} {y - 8}Z" fill="{color}"/>',
    ]


def _line(stage: str, place: dict[str, tuple[int, int]], targets: list[str]) -> list[str]:
    """The horizontal line out of a box, to the furthest stage that it feeds."""
    if not targets:
        return []
    x, y = place[stage][0] + BOX_WIDTH, place[stage][1] + BOX_HEIGHT // 2
    end = max(place[t][0] for t in targets) + BOX_WIDTH // 2
    return [f'<path d="M{x} {y}H{end}" stroke="{COLORS[stage]}" stroke-width="1.6" stroke-opacity=".55" fill="none"/>']


def _dot(source: str, target: str, what: Handed, place: dict[str, tuple[int, int]]) -> list[str]:
    """A dot where the line of one box joins that of another, and the tensors handed on there."""
    x, y = place[target][0] + BOX_WIDTH // 2, place[source][1] + BOX_HEIGHT // 2
    shapes = [f"{n} × {shape}" if n > 1 else shape for shape, n in what.tensors.items()]
    if len(shapes) > MAX_LINES:
        num_rest = sum(list(what.tensors.values())[MAX_LINES - 1 :])
        shapes = [*shapes[: MAX_LINES - 1], f"and {num_rest} more"]
    lines = [("code", shape) for shape in shapes] + [("code state", f"{part} in place") for part in what.in_place]
    return [f'<circle cx="{x}" cy="{y}" r="4" fill="{COLORS[source]}"/>'] + [
        f'<text class="{kind}" x="{x + 7}" y="{y + 15 + 13 * i}">{escape(line)}</text>'
        for i, (kind, line) in enumerate(lines)
    ]


def _box(stage: str, corner: tuple[int, int], flow: Flow, stages: dict[Node, str]) -> list[str]:
    """A stage with its number of ops (views are free), its custom or most frequent ops, and its part of the state."""
    x, y = corner
    own = [n for n in flow.nodes if stages.get(n) == stage]
    ops = [n for n in own if is_op(n) and not is_view(n)]
    custom = dict.fromkeys(n.target._opname for n in ops if n.target.namespace == "recfx")
    frequent = [f"{n} {op}" for op, n in Counter(n.target._opname for n in ops).most_common(2)]
    plain = {"batch": "one packed buffer", "features": "reads the batch alone", "aux": "loss, logit, num_samples"}
    code = textwrap.wrap(" ".join(custom) or ", ".join(frequent), CODE_WIDTH)
    lines = [("code", line) for line in code] + [("note", plain.get(stage) or _state_note(own, flow))]
    count = f"{len(ops)} ops" if ops else ""
    color, height = COLORS[stage], BOX_HEIGHT + LINE_HEIGHT * max(0, len(lines) - 2)
    frame = f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{height}" rx="8"'
    return [
        f'{frame} fill="#ffffff"/>',
        f'{frame} fill="{color}" fill-opacity=".09" stroke="{color}" stroke-width="1.4"/>',
        f'<text class="stage" x="{x + 11}" y="{y + 21}" style="fill:{color}">{stage}</text>',
        f'<text class="note" x="{x + BOX_WIDTH - 11}" y="{y + 21}" text-anchor="end">{count}</text>',
    ] + [
        f'<text class="{kind}" x="{x + 11}" y="{y + 38 + LINE_HEIGHT * i}">{escape(line)}</text>'
        for i, (kind, line) in enumerate(lines)
    ]


def _state_note(own: list[Node], flow: Flow) -> str:
    """Which parts of the state a stage reads and writes."""
    state = {n: n.name.split("_")[0] for n in flow.nodes if n.op == "placeholder" and not n.name.startswith("sections")}
    writes = dict.fromkeys(state[s] for n in own for s in flow.writes[n] if s in state)
    reads = dict.fromkeys(state[s] for n in own for i in n.all_input_nodes if (s := flow.storage[i]) in state)
    read_only = [part for part in reads if part not in writes]
    notes = [f"reads {', '.join(read_only)}"] * bool(read_only) + [f"updates {', '.join(writes)}"] * bool(writes)
    return "; ".join(notes)


def _caption(title: str, facts: list[str], height: int) -> list[str]:
    top = height - MARGIN - 19 * len(facts) - 4
    lines = [f'<text class="title" x="{MARGIN}" y="{top}">{escape(title)}</text>']
    for i, fact in enumerate(facts):
        lines.append(f'<text class="fact" x="{MARGIN}" y="{top + 24 + 19 * i}">{escape(fact)}</text>')
    return lines
