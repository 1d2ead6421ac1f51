"""Hand-made lists whose offsets lie outside their values are an error of the step, not the end of the process."""

import pytest
import torch

from recfx import optim
from recfx.embeddings import Embedding, tile
from recfx.step import train_step
from recfx.types import NUM_SAMPLES, Ragged

OFFSETS = [0, 1, 900_000_000], [0, 1, -5], [0, 6, 2], [0, 4, 99], [-3, 1, 2]


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("combiner", ["sum", tile(2)], ids=str)
def test_training_evaluation_and_prediction_refuse_offsets_outside_the_values(offsets, combiner):
    step = train_step(
        features=dict,
        embeddings={"emb": [Embedding("item", dim=2, combiner=combiner)]},
        forward=lambda params, emb, feats: emb["emb"].sum((1, 2))[:, None] + params["b"],
        sparse_optimizer=optim.sparse_sgd(0.1),
        dense_optimizer=optim.sgd(0.1),
        max_rows=64,
    )
    state = step.init({"b": torch.zeros(1)})
    batch = {  # not from `pack`, which has its own check
        "label": torch.tensor([[1.0], [0.0]]),
        "item": Ragged(torch.arange(1, 9), torch.tensor(offsets, dtype=torch.int32)),
        NUM_SAMPLES: torch.tensor(2, dtype=torch.int32),
    }
    for call in (step.update, step.update_, step.evaluate_, step.predict):
        with pytest.raises(
            RuntimeError, match=r"offsets of lookup 0: got .* offsets never fall and end within the values"
        ):
            call(state, batch)
    assert not int(state.tables[0].num_rows)
