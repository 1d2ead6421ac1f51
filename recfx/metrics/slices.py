"""Binary metrics of each value of a feature, such as the hour or the place on the page, and of all samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recfx.checks import check_int
from recfx.losses import item_ids
from recfx.metrics.binary import Metric, binary_metrics, binary_values
from recfx.metrics.counts import LOGIT_RANGE, BinaryCounts, auc, calibration, log_loss

__all__ = ["SlicedCounts", "sliced_metrics", "total_of", "values_of"]

MOST = 64


class SlicedCounts(NamedTuple):
    """What a phase has predicted so far: of all samples, then of S slices, the last of them for all other values."""

    histogram: Tensor  # i64 [2, bins], see `BinaryCounts`
    sums: Tensor  # f64 [6]
    slice_histogram: Tensor  # i64 [S, 2, slice_bins]
    slice_sums: Tensor  # f64 [S, 5]: samples, clicks, loss, predicted clicks, samples that are not finite


def sliced_metrics(*, by: str, values: Iterable[int], num_bins: int = 2**16, slice_bins: int = 2**12) -> Metric:
    """The counts of `binary_metrics`, and counts of the samples of each value of a feature.

    Values: those of `binary_values`; for each slice with samples auc, log_loss, calibration and num_samples, named
    "auc@hour=3", and "auc@hour=other" for what is not in `values`.

    Args:     by: name of a feature i64 [B, 1], or Ragged with one id each (an empty list is 0).
              values: of it, at most 64, each once.
              num_bins: of all samples.  slice_bins: of each slice: 64 slices of 2**12 bins are 4 MiB, and a bin is 0.01
              of the logit wide.
    Raises:   ValueError when there are more values, none, or one twice.
    Example:  >>> sliced_metrics(by="hour", values=range(24)).by
              'hour'
    """
    known = list(values)
    for value in known:
        check_int("values", value, -(2**63))
    if not 0 < len(known) <= MOST or len(set(known)) < len(known):
        raise ValueError(
            f"values: got {len(known)} of feature '{by}', {len(set(known))} of them different, expected 1 to {MOST}, "
            "each once. Each has a separate histogram. Group the values in the feature function."
        )
    check_int("slice_bins", slice_bins, 1)
    whole, num_slices = binary_metrics(num_bins), len(known) + 1

    def init(device: torch.device | str = "cpu") -> SlicedCounts:
        histogram, sums = whole.init(device)
        return SlicedCounts(
            histogram,
            sums,
            torch.zeros(num_slices, 2, slice_bins, dtype=torch.int64, device=device),
            torch.zeros(num_slices, 5, dtype=torch.float64, device=device),
        )

    def update_(
        counts: SlicedCounts, logit: Tensor, label: Tensor, loss: Tensor, valid: Tensor, value: Tensor
    ) -> SlicedCounts:
        whole.update_(total_of(counts), logit, label, loss, valid)
        slice_B = torch.full_like(value, len(known))
        for i, one in enumerate(known):
            slice_B = torch.where(value == one, i, slice_B)
        _add_slices_(counts, slice_B.flatten(), logit.float(), label.float(), loss.float(), valid)
        return counts

    def read(counts: SlicedCounts) -> dict[str, float]:
        counts = SlicedCounts(*(t.cpu() for t in counts))
        found = binary_values(total_of(counts))
        for i, one in enumerate([*known, "other"]):
            of_slice = BinaryCounts(counts.slice_histogram[i], counts.slice_sums[i])
            if num := float(of_slice.sums[0]):
                own = {"auc": auc(of_slice), "log_loss": log_loss(of_slice), "calibration": calibration(of_slice)}
                found |= {f"{name}@{by}={one}": number for name, number in {**own, "num_samples": num}.items()}
        return found

    return Metric(init, update_, read, by)


def total_of(counts: SlicedCounts) -> BinaryCounts:
    """Those of all samples."""
    return BinaryCounts(counts.histogram, counts.sums)


def values_of(feats: Mapping[str, Any], by: str) -> Tensor:
    """The value of each sample, i64 [B], for a metric of slices.

    Raises:   ValueError when there is no such feature; TypeError when it is of floats.
    """
    if by not in feats:
        raise ValueError(f"feature '{by}': missing, expected the slice of each sample. Return it in `features`.")
    value = item_ids(feats, by)
    if value.is_floating_point():
        raise TypeError(f"feature '{by}': got {value.dtype}, expected integers. Slices are values that are equal.")
    return value


def _add_slices_(
    counts: SlicedCounts, slice_B: Tensor, logit: Tensor, label: Tensor, loss: Tensor, valid: Tensor
) -> None:
    """As `add_predictions_` of each slice. Sums are a matrix product: the same in any run on one device.

    Shapes:   slice_B i64 [B], the others [B, 1].
    """
    num_slices, _, num_bins = counts.slice_histogram.shape
    is_good = valid & logit.isfinite() & loss.isfinite()
    unit = (torch.where(is_good, logit, 0.0) + LOGIT_RANGE) / (2 * LOGIT_RANGE)
    bin_B = (unit * num_bins).clamp(0, num_bins - 1).long().flatten()
    place = (slice_B * 2 + (label > 0.5).long().flatten()) * num_bins + bin_B
    counts.slice_histogram.view(-1).scatter_add_(0, place, is_good.long().flatten())
    parts = [torch.where(is_good, part, 0.0) for part in (label, loss, logit.sigmoid())]
    columns = torch.cat([valid.float(), *parts, (valid & ~is_good).float()], dim=1).double()
    is_slice = slice_B == torch.arange(num_slices, device=slice_B.device)[:, None]
    counts.slice_sums.add_(is_slice.double() @ columns)
