"""Generated data of the examples: files that are written once, with what is known of them in info.json."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["auc", "sigmoid", "written_once"]


def written_once(
    folder: str | os.PathLike[str], parameters: Mapping[str, Any], write: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """What info.json of a folder holds; first writes the folder, if it does not exist or is empty.

    Args:     parameters: what the data follow from, kept in info.json.
              write: (a folder that is not there yet) -> what is known of the data. The folder is renamed into place at
              the end, so one that is there is complete.
    Raises:   ValueError when the folder holds something else. It is never overwritten.
    """
    folder, parameters = Path(folder), dict(parameters)
    if folder.exists() and any(folder.iterdir()):
        path = folder / "info.json"
        info = json.loads(path.read_text()) if path.exists() else {}
        if info.get("parameters") != parameters:
            raise ValueError(
                f"folder: got '{folder}', which holds {info.get('parameters', 'other files')}, expected {parameters} "
                "or nothing. Delete it or choose another folder."
            )
        return info
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        built = Path(scratch) / "built"
        info = {"parameters": parameters, **write(built)}
        (built / "info.json").write_text(json.dumps(info, indent=2) + "\n")
        os.replace(built, folder)
    return info


def auc(score: np.ndarray, label: np.ndarray) -> float:
    """The exact rank statistic, ties count half. 0.5 when there is one class only."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    middle_ranks = np.cumsum(counts) - (counts - 1) / 2
    positives = label.sum()
    negatives = len(label) - positives
    if positives == 0 or negatives == 0:
        return 0.5
    return float((middle_ranks[inverse][label == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logit))."""
    return 1 / (1 + np.exp(-logit))
