import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import orc

from recfx.examples import criteo_synthetic as synthetic
from recfx.examples.criteo_synthetic import CATEGORICAL, MISSING, NUMERIC, QUANTILES, generate
from recfx.examples.generated import auc

SMALL = {"rows_per_file": 300, "train_files": 2, "eval_files": 1, "seed": 7}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "criteo"
    return folder, generate(folder, rows_per_file=40_000, train_files=1, eval_files=1, seed=42)


@pytest.fixture(scope="module")
def table(data):
    return orc.read_table(data[0] / "train" / "part-00000.orc").combine_chunks()


def present(table, name) -> np.ndarray:
    return np.diff(table[name].chunk(0).offsets.to_numpy()) == 1


def values(table, name) -> np.ndarray:
    return table[name].chunk(0).flatten().to_numpy()


def digests(folder) -> list[str]:
    return [hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()]


def test_schema(table):
    assert table.schema.names == sorted([*NUMERIC, *CATEGORICAL, "label"])
    for field in table.schema:
        assert field.type.value_type == (pa.int64() if field.name.startswith("c") else pa.float64())


def test_columns_of_a_group_are_missing_together(table):
    grouped = {name for names, _ in MISSING for name in names}
    for names, share in MISSING:
        first = present(table, names[0])
        assert (~first).mean() == pytest.approx(share, abs=0.01)
        assert all((present(table, name) == first).all() for name in names)
    assert all(present(table, name).all() for name in {*NUMERIC, *CATEGORICAL, "label"} - grouped)
    assert sum(len(values(table, name)) for name in CATEGORICAL) / len(table) == pytest.approx(24.07, abs=0.1)


# distinct ids, share of them seen once, share of the most frequent one: figures of 40 000 rows of the real log
@pytest.mark.parametrize(
    ("name", "num_ids", "once", "top"),
    [
        ("c1", 13_631, 0.839, 0.1975),
        ("c4", 1_800, 0.573, 0.2924),
        ("c6", 3, 0.0, 0.8677),
        ("c9", 22, 0.045, 0.4957),
        ("c12", 9_247, 0.570, 0.2024),
        ("c16", 46, 0.087, 0.6299),
        ("c20", 14_592, 0.852, 0.1975),
        ("c24", 4_803, 0.305, 0.0151),
    ],
)
def test_cardinality_and_skew(table, name, num_ids, once, top):
    ids = values(table, name)
    assert ids.min() >= 0
    assert ids.max() < 1 << 40
    _, counts = np.unique(ids, return_counts=True)
    assert len(counts) == pytest.approx(num_ids, rel=0.1, abs=2)
    assert (counts == 1).mean() == pytest.approx(once, abs=0.1)
    assert counts.max() / len(ids) == pytest.approx(top, abs=0.01)


# mean and deviation of log1p of the real log's values
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [("i1", 2.245, 1.200), ("i2", 5.197, 1.580), ("i4", 3.568, 1.695), ("i9", 1.828, 1.230), ("i12", 7.564, 2.784)],
)
def test_numbers(table, name, mean, std):
    numbers = values(table, name)
    assert (numbers == np.rint(numbers)).all()
    assert QUANTILES[name][0] <= numbers.min()
    assert numbers.max() <= QUANTILES[name][-1]
    assert np.log1p(numbers).mean() == pytest.approx(mean, abs=0.15)
    assert np.log1p(numbers).std() == pytest.approx(std, abs=0.15)


def test_the_range_of_i8(table):
    assert values(table, "i8").min() == -1
    assert values(table, "i8").max() <= 9153


def test_info(data, table):
    folder, info = data
    assert json.loads((folder / "info.json").read_text()) == info
    assert (info["train_rows"], info["eval_rows"]) == (40_000, 40_000)
    assert info["click_rate"] == pytest.approx(0.032, abs=0.006)
    assert values(table, "label").mean() == pytest.approx(0.032, abs=0.006)
    assert info["numeric_lr_auc"] > 0.55
    assert 0.72 < info["best_auc"] < 0.85
    assert info["best_auc"] > info["numeric_lr_auc"] + 0.1


def logits(a: str, b: str) -> np.ndarray:
    """Of four rows that differ in two columns alone: f(a0, b0), f(a1, b0), f(a0, b1), f(a1, b1)."""
    ranks = {name: np.zeros(4, dtype=np.int64) for name in CATEGORICAL}
    numbers = {name: np.full(4, QUANTILES[name][6], dtype=np.float64) for name in NUMERIC}
    for name, is_other in ((a, [0, 1, 0, 1]), (b, [0, 0, 1, 1])):
        if name in ranks:
            ranks[name] += np.array(is_other)
        else:
            numbers[name] = np.where(is_other, QUANTILES[name][10], numbers[name])
    return synthetic._logit(synthetic._plant(42), synthetic._Rows(ranks, numbers))


def test_the_planted_model_has_effects_of_first_order_and_of_pairs():
    """Of ids and of numbers; two columns that are no pair add up."""
    for a, b in (*synthetic.ID_PAIRS, *synthetic.ID_NUMBER_PAIRS):
        f = logits(a, b)
        assert abs(f[3] - f[1] - f[2] + f[0]) > 1e-4, (a, b)
    for a, b in (("c1", "c2"), ("c1", "i1"), ("i1", "i3")):
        f = logits(a, b)
        assert min(abs(f[1] - f[0]), abs(f[2] - f[0])) > 1e-4, (a, b)
        assert f[3] - f[1] - f[2] + f[0] == pytest.approx(0, abs=1e-9), (a, b)


def test_equal_seeds_give_equal_bytes(tmp_path):
    for name, seed in [("a", 7), ("b", 7), ("c", 8)]:
        generate(tmp_path / name, **{**SMALL, "seed": seed})
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert len(a) == 4
    assert a == b
    assert not set(a) & set(c)


def test_more_files_leave_the_first_ones_as_they_are(tmp_path):
    generate(tmp_path / "a", **SMALL)
    generate(tmp_path / "b", **{**SMALL, "train_files": 3})
    assert digests(tmp_path / "a" / "train") == digests(tmp_path / "b" / "train")[:2]


def test_finished_data_is_reused_and_nothing_else_is_overwritten(tmp_path):
    folder = tmp_path / "data"
    info = generate(folder, **SMALL)
    times = [f.stat().st_mtime_ns for f in sorted(folder.rglob("*"))]
    assert generate(folder, **SMALL) == info
    assert [f.stat().st_mtime_ns for f in sorted(folder.rglob("*"))] == times
    assert [f.name for f in tmp_path.iterdir()] == ["data"]
    with pytest.raises(ValueError, match=r"folder: got .* expected .*'seed': 8"):
        generate(folder, **{**SMALL, "seed": 8})
    (folder / "info.json").unlink()
    with pytest.raises(ValueError, match=r"folder: got .* other files"):
        generate(folder, **SMALL)


def test_an_error_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(orc, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        generate(tmp_path / "data", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_counts_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="eval_files: got 0, expected at least 1"):
        generate(tmp_path / "data", **{**SMALL, "eval_files": 0})


def test_auc_counts_ties_half():
    rng = np.random.default_rng(0)
    score, label = rng.integers(0, 5, 200).astype(float), rng.integers(0, 2, 200).astype(float)
    pairs = [(a > b) + (a == b) / 2 for a in score[label == 1] for b in score[label == 0]]
    assert auc(score, label) == pytest.approx(np.mean(pairs))
