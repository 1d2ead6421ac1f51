"""The programs of sequences and of several tasks, on small generated files; the planted rules of these."""

import json

import numpy as np
import pytest
from pyarrow import parquet as pq

from recfx import program as programs
from recfx.examples import behaviour_data, din, multitask, seq2seq
from recfx.examples.behaviour_data import clicks_and_purchases, clicks_with_history, item_sequences


def table_of(folder, part="train"):
    return pq.read_table(folder / part)


def test_clicks_follow_the_classes_of_the_history(tmp_path):
    info = clicks_with_history(tmp_path / "d", rows=8000, seed=1, files=2)
    table = table_of(tmp_path / "d")
    assert 0.75 < info["best_auc"] < 0.9
    lengths = np.array([len(items) for items in table["history"].to_pylist()])
    assert lengths.min() >= 1
    assert lengths.max() <= behaviour_data.LONGEST
    assert 20 < lengths.mean() < 40
    kind = table["item"].to_numpy() % behaviour_data.NUM_CLASSES
    in_history = np.array([np.mean(np.array(items) % behaviour_data.NUM_CLASSES == k)
                           for items, k in zip(table["history"].to_pylist(), kind, strict=True)])  # fmt: skip
    label = table["label"].to_numpy()
    assert label[in_history > 0.1].mean() > label[in_history < 0.05].mean() + 0.3


def test_items_follow_the_one_before_the_last(tmp_path):
    info = item_sequences(tmp_path / "s", rows=4000, seed=1, files=1)
    items = np.array(table_of(tmp_path / "s")["items"].to_pylist())
    follower = np.random.default_rng(1).permutation(behaviour_data.NUM_NEXT)
    assert abs((items[:, 2:] == follower[items[:, :-2]]).mean() - 0.7) < 0.01
    assert abs(info["best_hit_rate"] - 0.7) < 0.03


def test_what_is_bought_was_clicked(tmp_path):
    info = clicks_and_purchases(tmp_path / "m", rows=20_000, seed=1, files=2)
    table = table_of(tmp_path / "m")
    click, buy = table["click"].to_numpy(), table["buy"].to_numpy()
    assert (buy <= click).all()
    assert 0.01 < buy.mean() < click.mean() < 0.4
    assert 0.7 < info["best_click_auc"] < info["best_buy_auc"] < 0.95
    assert clicks_and_purchases(tmp_path / "m", rows=20_000, seed=1, files=2) == info


def trained(module, tmp_path, *more):
    out = [f"--generated_dir={tmp_path}/data", f"--output_dir={tmp_path}/out", "--backend=eager", "--log_steps=1000"]
    module.main([*out, *more])
    return json.loads((tmp_path / "out" / "summary.json").read_text())


def test_seq2seq_finds_the_rule(tmp_path):
    summary = trained(seq2seq, tmp_path, "--generated_rows=6000", "--train_epoch=3", "--dense_lr=1e-2")
    assert summary["hit_rate"] > 0.8 * summary["best_hit_rate"] > 0.5
    assert summary["hit_rate_1"] > 0.5


def test_din_learns_interests(tmp_path):
    args = ["--generated_rows=40000", "--train_epoch=2", "--batch_size=128", "--sparse_lr=2e-2"]
    summary = trained(din, tmp_path, *args)
    assert 0.55 < summary["auc"] <= summary["best_auc"] + 0.02


@pytest.mark.parametrize("model", ["esmm", "mmoe", "ple"])
def test_multitask_evaluates_both(tmp_path, model):
    summary = trained(multitask, tmp_path, "--generated_rows=30000", "--train_epoch=2", f"--model={model}")
    assert 0.55 < summary["click/auc"] < summary["best_click_auc"] + 0.03
    assert 0.6 < summary["buy/auc"] < summary["best_buy_auc"] + 0.03
    _, state = programs.restore(tmp_path / "out")
    assert set(state.metrics) == {"click", "buy"}
