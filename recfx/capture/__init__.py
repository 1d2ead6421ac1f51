"""A step captured as one compiled graph, and on a GPU as one CUDA graph.

    captured.py    `capture` and its variants: a step -> a callable of the same signature
    compiled.py    a function -> torch.compile -> a direct call of the graph
    passes.py      the passes over the FX graph
    recorded.py    the graph of a step on a GPU -> one CUDA graph
    rehearsal.py   which mistake of the user an error of torch.compile hides

No other package of recfx knows of FX, torch.compile, CUDA graphs and the allocator.
"""

from recfx.capture.captured import (
    Captured,
    capture,
    capture_evaluation,
    capture_prediction,
    capture_steps,
    sections_function,
    trace,
)

__all__ = [
    "Captured",
    "capture",
    "capture_evaluation",
    "capture_prediction",
    "capture_steps",
    "sections_function",
    "trace",
]
