"""The simulation of owners: what it counts, on keys that are known."""

import numpy as np

from bench.dist_balance import balance


def keys(ids):
    return np.stack([np.zeros(len(ids), np.int64), np.array(ids)], 1)


def test_equal_batches_are_one_set_of_rows():
    ids = list(range(4000)) * 3
    found = balance([keys(ids), keys(ids)], 9)
    assert (found["ranks"], found["ids of a rank"], found["distinct"], found["messages"]) == (2, 12000, 4000, 3)
    assert 1 <= found["rows of an owner"] == found["asked of an owner"] < 1.1
    assert found["least MB"] == round(4000 * (12 + 40 + 36) / 1e6, 2)
    assert found["MB sent"] >= found["least MB"]
    assert found["capacity"] % 64 == 0


def test_one_id_has_one_owner():
    found = balance([keys([7] * 100)] * 4, 9)
    assert found["asked of an owner"] == found["rows of an owner"] == 4
    assert found["distinct"] == 1
