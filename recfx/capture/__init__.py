"""A step captured as one compiled graph, and on a GPU as one CUDA graph.

    captured.py    `capture` and its variants: a step -> a callable of the same signature
    compiled.py    a function -> torch.compile -> a direct call of the graph
    passes.py      the passes over the FX graph
    recorded.py    the graph of a step on a GPU -> one CUDA graph
    rehearsal.py   which mistake of the user an error of torch.compile hides

No other package of recfx knows of FX, torch.compile, CUDA graphs and the allocator. What it does besides calling
torch.compile, and what that gains on two cores of a CPU (DESIGN.md, "Measured, kept"):

    no Dynamo guards                          compiled.py   2.66 -> 2.48 ms at batch 1000
    no Dynamo from the second call on         compiled.py   1.16, 1.05, 1.03 times as fast at 50, 1000, 4096
    no size checks in the graph               compiled.py   0.02 ms
    kernels compiled while Dynamo traces      compiled.py   first step of a machine 1.2 to 1.3 times as fast
    freed memory kept (mallopt)               captured.py   forward and backward at 4096: 5.6 -> 3.7 ms
    columns read in the packed batch          passes.py     0.50 -> 0.45 ms at 50 (`name_places`)
    a small `cat` as one loop                 passes.py     1.07 at 50, 1.01 at 1000 (`join_small`)
    a bias added by the loop that reads it    passes.py     1 to 2 % at all sizes (`UnfuseBias`)
    common operators computed once            passes.py     one hash for two features (`share_common`)
    gradients checked before they change      passes.py     no copy of all reserved row gradients (`check_early`)
    the whole step as one CUDA graph          recorded.py   43 launches as one; unmeasured
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
