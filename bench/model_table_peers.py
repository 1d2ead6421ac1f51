"""The models of other libraries, trained on the batches of model_table.py. They need to know every id beforehand.

An id is its place in the sorted ids of its column in the training files; 1 is a missing one, 0 any other. Their Adam
moves every row in every step, that of recfx those that occur in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recfx.examples.deepfm import CATEGORICAL, NUMERIC, log1p_features
from recfx.types import NUM_SAMPLES, Batch

__all__ = ["PEERS", "Data", "Made", "remapped", "train_peer"]

DIM, HIDDEN, SMALLEST = 8, (64, 16), 1e-12
Data = list[tuple[Tensor, Tensor, Tensor]]  # of each batch: ids i64 [B, 26], numeric values and labels f32 [B, 13], [B]
Made = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]  # a model; ids and values -> probabilities [B]


def remapped(trained: list[Batch], tested: list[Batch]) -> tuple[list[int], Data, Data]:
    """The number of ids of each column, and both lists of batches."""
    known = []
    for name in CATEGORICAL:
        known.append(np.unique(np.concatenate([b[name].values[: int(b[name].offsets[-1])].numpy() for b in trained])))
    return [len(ids) + 2 for ids in known], _of_batches(trained, known), _of_batches(tested, known)


def _of_batches(batches: list[Batch], known: list[np.ndarray]) -> Data:
    found = []
    for batch in batches:
        num = int(batch[NUM_SAMPLES])
        columns = np.ones((num, len(known)), np.int64)
        for column, name, ids in zip(columns.T, CATEGORICAL, known, strict=True):
            offsets = batch[name].offsets[: num + 1].numpy()
            has = np.diff(offsets) > 0
            values = batch[name].values.numpy()[offsets[:-1][has]]
            place = np.searchsorted(ids, values).clip(max=len(ids) - 1)
            column[has] = np.where(ids[place] == values, place + 2, 0)
        feats = log1p_features(batch)
        found.append((torch.from_numpy(columns), feats["numeric"][:num], feats["label"][:num, 0]))
    return found


def train_peer(
    make: Callable[[list[int], int], Made], seed: int, sizes: list[int], trained: Data, tested: Data, epochs: int,
    rate: float,
) -> Iterator[tuple[np.ndarray, float, float]]:  # fmt: skip
    """After each epoch: logits of the tested samples, seconds of training so far, and seconds of a processor."""
    torch.manual_seed(seed)
    model, probability = make(sizes, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    seconds = cpu = 0.0
    for _ in range(epochs):
        model.train()
        begun, busy = time.perf_counter(), time.process_time()
        for ids, numeric, labels in trained:
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy(probability(ids, numeric), labels).backward()
            optimizer.step()
        seconds, cpu = seconds + time.perf_counter() - begun, cpu + time.process_time() - busy
        model.eval()
        with torch.no_grad():
            found = torch.cat([probability(ids, numeric) for ids, numeric, _ in tested]).double()
        yield torch.logit(found, SMALLEST).numpy(), seconds, cpu


def _deepctr(name: str, **options: Any) -> Callable[[list[int], int], Made]:
    def make(sizes: list[int], seed: int) -> Made:
        from deepctr_torch import inputs, models

        columns = [inputs.SparseFeat(c, n, embedding_dim=DIM) for c, n in zip(CATEGORICAL, sizes, strict=True)]
        columns += [inputs.DenseFeat(c, 1) for c in NUMERIC]
        model = getattr(models, name)(columns, columns, seed=seed, **options)
        return model, lambda ids, numeric: model(torch.cat([ids.float(), numeric], 1))[:, 0]

    return make


def _rechub(name: str, arguments: Callable[[list, list], dict[str, Any]]) -> Callable[[list[int], int], Made]:
    def make(sizes: list[int], seed: int) -> Made:
        from torch_rechub.basic import features
        from torch_rechub.models import ranking

        sparse = [features.SparseFeature(c, n, embed_dim=DIM) for c, n in zip(CATEGORICAL, sizes, strict=True)]
        dense = [features.DenseFeature(c) for c in NUMERIC]
        model = getattr(ranking, name)(**arguments(sparse, dense))

        def probability(ids: Tensor, numeric: Tensor) -> Tensor:
            columns = dict(zip(CATEGORICAL, ids.T, strict=True)) | dict(zip(NUMERIC, numeric.T, strict=True))
            return model(columns)

        return model, probability

    return make


MLP = {"dims": list(HIDDEN), "dropout": 0.0}
PEERS: dict[str, dict[str, Callable[[list[int], int], Made]]] = {
    "deepctr_torch": {
        "lr": _deepctr("WDL", dnn_hidden_units=()),
        "fm": _deepctr("DeepFM", dnn_hidden_units=()),
        "wide_deep": _deepctr("WDL", dnn_hidden_units=HIDDEN),
        "deepfm": _deepctr("DeepFM", dnn_hidden_units=HIDDEN),
        "dcnv2": _deepctr("DCN", cross_num=3, cross_parameterization="matrix", dnn_hidden_units=HIDDEN),
        "autoint": _deepctr("AutoInt", att_layer_num=2, att_head_num=2, dnn_hidden_units=()),
    },
    "torch_rechub": {
        "wide_deep": _rechub("WideDeep", lambda s, d: {"wide_features": d, "deep_features": s + d, "mlp_params": MLP}),
        "deepfm": _rechub("DeepFM", lambda s, d: {"fm_features": s, "deep_features": s + d, "mlp_params": MLP}),
        "dcnv2": _rechub(
            "DCNv2",
            lambda s, d: {"features": s + d, "n_cross_layers": 3, "use_low_rank_mixture": False, "mlp_params": MLP},
        ),
        "autoint": _rechub("AutoInt", lambda s, d: {"sparse_features": s, "dense_features": d, "num_layers": 2}),
    },
}
