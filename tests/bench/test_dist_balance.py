"""The simulation of owners: what it counts, on keys that are known."""

import numpy as np
import pytest

from bench.dist_balance import balance, bytes_of_id, distinct, keys_of, rows_of_owners, zipf_keys


def keys(ids):
    return np.stack([np.zeros(len(ids), np.int64), np.array(ids)], 1)


def test_equal_batches_are_one_set_of_rows():
    ids = list(range(4000)) * 3
    found = balance([keys(ids), keys(ids)])
    assert (found["ranks"], found["ids of a rank"], found["distinct"], found["messages"]) == (2, 12000, 4000, 3)
    assert 1 <= found["rows of an owner"] == found["asked of an owner"] < 1.1
    assert found["least MB, 9"] == round(4000 * (12 + 40 + 36) / 1e6, 2)
    assert found["MB sent, 9"] >= found["least MB, 9"]
    assert found["capacity"] % 64 == 0
    assert found["hottest id, times"] == 6


def test_one_id_has_one_owner():
    found = balance([keys([7] * 100)] * 4)
    assert found["asked of an owner"] == found["rows of an owner"] == 4
    assert found["distinct"] == 1
    assert found["hottest id, times"] == 400


def test_a_key_is_an_id_of_its_vocabulary():
    both = np.array([[1, 5], [0, 5], [1, 5], [0, -2], [1, 5]])
    once, counts = distinct(both)
    assert once.tolist() == [[0, -2], [0, 5], [1, 5]]
    assert counts.tolist() == [1, 1, 3]


def test_bytes_of_an_id_by_width():
    assert [bytes_of_id(width) for width in (9, 17, 65)] == [88, 152, 536]


def test_zipf_shares_follow_the_power_law():
    (batch,) = zipf_keys(1.0, 1, 20_000, ids=100)
    once, counts = distinct(batch)
    shares = 1 / np.arange(1, 101)
    of_id = np.bincount(once[:, 1], counts, minlength=100) / counts.sum()
    np.testing.assert_allclose(of_id, shares / shares.sum(), atol=0.002)
    assert zipf_keys(1.0, 2, 10)[0].shape == (260, 2)


def test_an_epoch_of_files_is_read_once(tmp_path):
    from recfx.examples.criteo_synthetic import generate

    generate(tmp_path / "log", rows_per_file=300, train_files=1, eval_files=1, seed=1)
    files = str(tmp_path / "log" / "train")
    once, again = keys_of(files, None, 100), keys_of(files, 4, 100)
    assert len(once) == 3
    assert (again[3] == once[0]).all()
    assert rows_of_owners(np.concatenate(once), 2) == pytest.approx(1, abs=0.1)
