"""The operators of each model's `forward`: `models.ops.txt`, which a test compares."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from graphs.dataflow import is_op, is_view
from recfx.capture import trace
from recfx.models import (
    autoint,
    dcnv2,
    deepfm,
    din,
    dlrm,
    esmm,
    finalmlp,
    finalnet,
    fm,
    fwfm,
    lr,
    masknet,
    mmoe,
    ple,
    sasrec,
    shared_bottom,
    two_tower,
    wide_deep,
)
from recfx.types import Ragged, pack

__all__ = ["MODELS", "MODEL_OPS", "model_ops_text", "op_counts"]

MODEL_OPS = "models.ops.txt"
B, F, N, D, PLACES = 4, 3, 2, 4, 12
SIZES: dict[str, int] = {"num_sparse": F, "num_numeric": N, "dim": D}

MODELS: dict[str, tuple[Any, Any]] = {
    "lr": (lr, lr.LRConfig(num_numeric=N)),
    "fm": (fm, fm.FMConfig(num_numeric=N, dim=D)),
    "fwfm": (fwfm, fwfm.FwFMConfig(**SIZES)),
    "wide_deep": (wide_deep, wide_deep.WideDeepConfig(**SIZES)),
    "deepfm": (deepfm, deepfm.DeepFMConfig(**SIZES)),
    "dcnv2": (dcnv2, dcnv2.DCNv2Config(**SIZES)),
    "dcnv2_mix": (dcnv2, dcnv2.DCNv2Config(**SIZES, rank=2)),
    "dlrm": (dlrm, dlrm.DLRMConfig(**SIZES)),
    "autoint": (autoint, autoint.AutoIntConfig(**SIZES)),
    "masknet": (masknet, masknet.MaskNetConfig(**SIZES)),
    "finalmlp": (finalmlp, finalmlp.FinalMLPConfig(**SIZES)),
    "finalnet": (finalnet, finalnet.FinalNetConfig(**SIZES)),
    "shared_bottom": (shared_bottom, shared_bottom.SharedBottomConfig(**SIZES)),
    "mmoe": (mmoe, mmoe.MMoEConfig(**SIZES)),
    "ple": (ple, ple.PLEConfig(**SIZES)),
    "esmm": (esmm, esmm.ESMMConfig(**SIZES)),
    "din": (din, din.DINConfig(**SIZES)),
    "sasrec": (sasrec, sasrec.SASRecConfig(dim=D, length=3)),
    "two_tower": (two_tower, two_tower.TwoTowerConfig(num_query=F, num_item=1, num_numeric=N, dim=D)),
}


def op_counts(name: str) -> Counter[str]:
    """The number of each op in the ATen graph of a model's `forward`, with all views under one name."""
    module, config = MODELS[name]
    params = module.init(config, torch.Generator().manual_seed(0))

    def update_(params: dict, batch: Any) -> tuple[dict, Any]:
        emb = {group: batch[group] for group in ("emb", "bias", "target", "query", "item")}
        emb["history"] = Ragged(batch["rows"].view(PLACES, D), batch["history"].offsets)
        return params, module.forward(params, emb, {"numeric": batch["numeric"]})

    nodes = filter(is_op, trace(update_, params, _inputs()).graph.nodes)
    return Counter("views" if is_view(n) else str(n.target) for n in nodes)


def model_ops_text() -> str:
    """The counts of every model."""
    lines = [
        f"# The ATen graph of each model's forward alone (graphs/model_ops.py): batch of {B}, {F} sparse features",
        f"# of width {D}, {N} numeric ones, a history of {PLACES} places.",
    ]
    for name in MODELS:
        counts = op_counts(name)
        lines += ["", f"{name}: {counts.total() - counts['views']} ops, {counts['views']} views"]
        lines += [f"{count:>8}  {op}" for op, count in sorted(counts.items()) if op != "views"]
    return "\n".join(lines) + "\n"


def _inputs() -> Any:
    g = torch.Generator().manual_seed(0)
    groups = {"emb": (F, D), "bias": (F, 1), "target": (1, D), "query": (F, D), "item": (1, D)}
    ids = Ragged(torch.arange(PLACES), torch.tensor([0, 3, 3, 8, 10], dtype=torch.int32))
    rows = torch.randn(B, PLACES // B * D, generator=g)  # a batch is cut by sample
    floats = {group: torch.randn(B, *shape, generator=g) for group, shape in groups.items()}
    return pack({**floats, "numeric": torch.randn(B, N, generator=g), "rows": rows, "history": ids})
