"""What a sample of rows shows before training: columns that give the label away, files that are in both sets."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recfx.data.files import File
from recfx.tabular.columns import Roles

__all__ = ["LEAK_AUC", "auc_alone", "check_disjoint", "leaks_in"]

LEAK_AUC = 0.98


def check_disjoint(train: Sequence[File], held_out: Sequence[File]) -> None:
    """Raises ValueError naming a file that is in both: its rows would be evaluated after they were trained."""
    known = {_place(file) for file in train}
    both = [file.path for file in held_out if _place(file) in known]
    if both:
        more = f" and {len(both) - 1} more" if len(both) > 1 else ""
        raise ValueError(
            f"eval: got '{both[0]}'{more}, which is in the training files too, expected other files. Metrics of "
            "rows that were trained do not hold for new ones."
        )


def leaks_in(sample: pa.Table, roles: Roles) -> list[tuple[str, str, float]]:
    """(column, label, AUC) for each column that alone orders the rows almost as the label does.

    A number orders by its value; an id by the mean label of its rows in one half of the sample, judged on the other.
    """
    found = []
    for label in roles.named("label"):
        y = _numbers(sample[label])
        for column in roles.columns:
            if column.kind in ("dense", "sparse", "text", "bool") and not column.is_list:
                auc = auc_alone(sample[column.name], y, is_number=column.kind == "dense")
                if auc > LEAK_AUC:
                    found.append((column.name, label, auc))
    return found


def auc_alone(column: pa.ChunkedArray, label: np.ndarray, *, is_number: bool) -> float:
    """The AUC of one column, of its better direction. 0.5 where there are too few rows to tell."""
    known = ~np.isnan(label)
    if is_number:
        score = np.nan_to_num(_numbers(column), nan=0.0)
        found = _auc(score[known], label[known])
        return max(found, 1 - found)
    codes = pc.dictionary_encode(column.combine_chunks().cast(column.type)).indices if not _is_coded(column) else None
    codes = column.combine_chunks().indices if codes is None else codes
    id = pc.fill_null(codes, -1).to_numpy(zero_copy_only=False).astype(np.int64) + 1
    first = np.arange(len(label)) % 2 == 0
    clicks = np.bincount(id[first & known], weights=label[first & known], minlength=id.max(initial=0) + 1)
    counts = np.bincount(id[first & known], minlength=id.max(initial=0) + 1)
    prior = label[first & known].mean() if (first & known).any() else 0.5
    score = (clicks + prior) / (counts + 1)
    judged = ~first & known
    return _auc(score[id[judged]], label[judged])


def _is_coded(column: pa.ChunkedArray) -> bool:
    return pa.types.is_dictionary(column.type)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    return column.cast(pa.float64()).to_numpy()


def _auc(score: np.ndarray, label: np.ndarray) -> float:
    positives = float(label.sum())
    negatives = len(label) - positives
    if positives < 1 or negatives < 1:
        return 0.5
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2
    return float((middle[inverse][label > 0.5].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _place(file: File) -> tuple[str, str]:
    return file.filesystem.type_name, os.path.realpath(file.path) if file.is_local else file.path
