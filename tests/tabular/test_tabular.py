"""`recfx train --label` on folders of CSV, Parquet and ORC; the program that it writes; scores; importance; errors."""

import datetime
import hashlib
import json
import math
import shutil
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import csv, orc
from pyarrow import parquet as pq

from recfx import cli
from recfx import program as programs
from recfx.tabular import MODELS, program_text, roles_of

WRITE = {"parquet": pq.write_table, "orc": orc.write_table, "csv": csv.write_csv}
ROWS = 1500


def table_of(kind, seed, rows=ROWS):
    """Clicks follow the user and the city; buys are clicks; `leak` is the click and a little noise."""
    rng = np.random.default_rng(seed)
    user, city = rng.integers(0, 60, rows), np.array(["Rome", "Oslo", "Bern"])[rng.integers(0, 3, rows)]
    click = (rng.random(rows) < 1 / (1 + np.exp(2 - 3.0 * (user % 3 == 0) - (city == "Oslo")))).astype(np.int64)
    columns = {
        "click": click,
        "buy": click * (rng.random(rows) < 0.4),
        "user": user,
        "city": pa.array(city, mask=rng.random(rows) < 0.1),
        "price": pa.array(np.round(rng.lognormal(1, 1, rows), 2), mask=rng.random(rows) < 0.2),
        "flag": pa.array(rng.random(rows) < 0.5),
        "when": [datetime.date(2026, 11, 1)] * rows,
        "same": np.ones(rows, dtype=np.int64),
        "leak": click * 2.0 + rng.random(rows) * 0.1,
        "nothing": pa.nulls(rows, pa.string()),
        "w": 0.5 + rng.random(rows),
    }
    if kind != "csv":
        columns["tags"] = [rng.integers(0, 9, n).tolist() for n in rng.integers(0, 4, rows)]
    return pa.table(columns)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    for kind, write in WRITE.items():
        for part, seed in (("train", 1), ("eval", 2)):
            (folder / kind / part).mkdir(parents=True)
            write(table_of(kind, seed), str(folder / kind / part / f"a.{kind}"))
    return folder


def recfx(*args):
    assert cli.main([*map(str, args)]) == 0


def train(data, out, *more, kind="parquet"):
    recfx(
        "train", data / kind / "train", "--eval", data / kind / "eval", "--output_dir", out, "--backend", "eager", *more
    )


def digest(run):
    """Of all tensors of the newest checkpoint."""
    _, state = programs.restore(run)
    found = hashlib.sha256()
    tensors = {**state.params, **{f"rows{i}": t.rows[: int(t.num_rows)] for i, t in enumerate(state.tables)}}
    for name, t in sorted(tensors.items()):
        found.update(name.encode() + t.contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("kind", WRITE)
def test_a_folder_trains_and_its_program_gives_the_same_bytes(data, tmp_path, capsys, kind):
    train(data, tmp_path / "one", "--label", "click", "--drop", "leak", "buy", "w", "--train_epoch", 40, kind=kind)
    shown = capsys.readouterr().out
    for text in ("a date or time", "no value", "as asked", "text", "bool", "dense"):
        assert text in shown
    assert "warning" not in shown
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert summary["auc"] > 0.65
    shutil.copy(tmp_path / "one" / "program.py", tmp_path / "mine.py")
    recfx("train", data / kind / "train", "--eval", data / kind / "eval", "--program", tmp_path / "mine.py",
          "--output_dir", tmp_path / "two", "--backend", "eager", "--train_epoch", 40)  # fmt: skip
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains(data, tmp_path, model):
    labels = ["--label", "click", *(["--label", "buy"] if MODELS[model].several else ["--drop", "buy"])]
    train(data, tmp_path / "run", *labels, "--drop", "leak", "--weight", "w", "--model", model, "--train_steps", 1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 1
    text = (tmp_path / "run" / "program.py").read_text()
    assert max(map(len, text.splitlines())) <= 120
    assert len(text.splitlines()) < 75


def test_a_column_that_gives_the_label_away_is_named(data, tmp_path, capsys):
    train(data, tmp_path / "run", "--label", "click", "--plan")
    shown = capsys.readouterr().out
    assert "warning: column 'leak' alone gives AUC 1.000 for 'click'" in shown
    assert shown.count("warning") == 1
    assert "def build(args):" in shown
    assert not (tmp_path / "run").exists()


def test_scores_are_in_the_order_of_the_rows_and_bad_rows_have_a_reason(data, tmp_path, capsys):
    train(data, tmp_path / "run", "--label", "click", "--label", "buy", "--drop", "leak", "--model", "mmoe")
    rows = table_of("parquet", 3, 700).drop_columns(["click", "buy"])
    odd = rows.set_column(
        rows.column_names.index("tags"), "tags", pa.array([[1, None] if i == 5 else [i] for i in range(700)])
    )
    pq.write_table(odd, tmp_path / "new.parquet", row_group_size=300)
    recfx("score", tmp_path / "run", tmp_path / "new.parquet", "-o", tmp_path / "scores.parquet", "--backend", "eager",
          "--batch_size", 128)  # fmt: skip
    assert "700 rows in" in capsys.readouterr().out
    scores = pq.read_table(tmp_path / "scores.parquet")
    assert scores.column_names == ["file", "row", "click", "buy", "reason"]
    assert scores["row"].to_pylist() == list(range(700))
    assert [i for i, s in enumerate(scores["click"].to_pylist()) if s is None] == [5]
    assert scores["reason"][5].as_py().startswith("column 'tags': got ")
    program, state = programs.restore(tmp_path / "run")
    one = next(iter(program.reader(str(_with_labels(odd.slice(600, 100), tmp_path)), "evaluate")))
    expected = torch.sigmoid(program.step.predict(state, one)["buy"])[:100, 0]
    np.testing.assert_allclose(scores["buy"].to_numpy()[600:], expected.numpy(), rtol=1e-5)
    assert not list(tmp_path.glob(".unfinished*"))


def _with_labels(table, folder):
    zeros = pa.array(np.zeros(len(table), dtype=np.int64))
    pq.write_table(table.append_column("click", zeros).append_column("buy", zeros), folder / "labelled.parquet")
    return folder / "labelled.parquet"


def test_negative_rate_moves_the_logit_outside_training(data, tmp_path):
    for name, rate in (("all", 1.0), ("some", 0.25)):
        more = () if rate == 1 else ("--negative_rate", rate)
        train(data, tmp_path / name, "--label", "click", "--drop", "leak", "buy", "--model", "deepfm", *more)
    logits = []
    for name in ("all", "some"):
        program, state = programs.restore(tmp_path / name)
        batch = next(iter(program.reader(str(data / "parquet" / "eval"), "evaluate")))
        logits.append(program.step.predict(state, batch))
    torch.testing.assert_close(logits[1], logits[0] + math.log(0.25))


def test_importance_finds_what_the_clicks_follow(data, tmp_path, capsys):
    train(data, tmp_path / "run", "--label", "click", "--drop", "leak", "buy", "--train_epoch", 60)
    capsys.readouterr()
    recfx("evaluate", tmp_path / "run", data / "parquet" / "eval", "--importance", "--backend", "eager")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["column", "auc", "log_loss"]
    assert lines[1].startswith("(as it is)")
    assert lines[2].startswith("user")
    assert float(lines[2].split()[1]) < -0.1
    assert {line.split()[0] for line in lines[2:]} == {"user", "city", "price", "flag", "same", "tags", "w"}
    recfx("evaluate", tmp_path / "run", data / "parquet" / "eval", "--importance", "--backend", "eager")
    assert capsys.readouterr().out.splitlines() == lines


ERRORS = {
    "no such column": (["--label", "click", "--drop", "clck"], "drop: got 'clck', expected a column of the files"),
    "no such label": (["--label", "clicks"], "label: got 'clicks', expected a column of the files"),
    "twice": (["--label", "click", "--dense", "click"], "column 'click': got it as label and dense"),
    "constant": (["--label", "same"], "label 'same': got 1 in every one of 1500 rows"),
    "missing": (["--label", "nothing"], "column 'nothing': got string, expected numbers. It is the label"),
    "other values": (["--label", "user"], "label 'user': got 2 among its values, expected 0 and 1"),
    "text": (["--label", "city"], "column 'city': got string, expected numbers. It is the label"),
    "a date": (["--label", "click", "--sparse", "when"], "column 'when': got date32.*expected integers"),
    "fractions": (["--label", "click", "--sparse", "price"], "column 'price': got double with fractions"),
    "a list": (["--label", "click", "--dense", "tags"], "column 'tags': got list.*It is to be dense"),
    "model": (["--label", "click", "--model", "gpt"], "model: got 'gpt'"),
    "one label": (["--label", "click", "--model", "mmoe"], "model: got 'mmoe' for one label"),
    "labels": (
        ["--label", "click", "--label", "buy"],
        "model: got 'dcnv2' for 2 labels, expected one of 'shared_bottom'",
    ),
    "neither": ([], "program: got neither --program nor --label"),
    "both": (["--label", "click", "--program", "recfx.examples.deepfm"], r"label: got \['click'\] with --program"),
    "rate": (["--label", "click", "--negative_rate", "2"], "negative_rate: got 2.0, expected 0 < negative_rate <= 1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_thing(data, tmp_path, capsys, name):
    args, error = ERRORS[name]
    out = ["--output_dir", str(tmp_path / "run"), "--backend", "eager"]
    assert cli.main(["train", str(data / "parquet" / "train"), *out, *args]) == 2
    found = capsys.readouterr().err
    assert pytest.importorskip("re").search(error, found), found
    assert not (tmp_path / "run").exists()


def test_a_file_in_both_is_an_error(data, tmp_path, capsys):
    train_files = str(data / "parquet" / "train")
    args = ["--label", "click", "--eval", train_files, "--output_dir", str(tmp_path / "run")]
    assert cli.main(["train", train_files, *args]) == 2
    assert "a.parquet', which is in the training files too" in capsys.readouterr().err


def test_an_edited_program_is_not_overwritten(data, tmp_path, capsys):
    args = ("--label", "click", "--drop", "leak", "--train_steps", 1)
    train(data, tmp_path / "run", *args)
    path = tmp_path / "run" / "program.py"
    path.write_text(path.read_text() + "\n# mine\n")
    out = ["--output_dir", str(tmp_path / "run"), "--backend", "eager", *map(str, args)]
    assert cli.main(["train", str(data / "parquet" / "train"), *out]) == 2
    assert "got another program there, expected none or the same" in capsys.readouterr().err
    assert path.read_text().endswith("# mine\n")
    train(data, tmp_path / "run", *args, "--overwrite")
    assert not path.read_text().endswith("# mine\n")


def test_a_label_without_a_value_is_named():
    table = pa.table({"click": pa.nulls(3, pa.int64()), "user": [1, 2, 3]})
    with pytest.raises(ValueError, match="label 'click': got no value in any row"):
        roles_of(table, labels=["click"])
    with pytest.raises(ValueError, match="column 'numeric': got it next to dense columns, expected another name"):
        roles_of(pa.table({"click": [0, 1], "numeric": [1, 2], "price": [0.5, 1.0]}), labels=["click"])
    assert roles_of(pa.table({"click": [0, 1], "numeric": [1, 2]}), labels=["click"]).ids == ["numeric"]
    with pytest.raises(ValueError, match="of which none is an id"):
        roles_of(pa.table({"click": [0, 1], "price": [0.5, 1.0]}), labels=["click"])


def test_long_lists_of_columns_are_wrapped():
    names = [f"a_column_with_a_long_name_{i}" for i in range(30)]
    table = pa.table({"click": [0, 1], **{name: [1, 2] for name in names}})
    text = program_text(roles_of(table, labels=["click"]), model="lr")
    assert max(map(len, text.splitlines())) <= 120
    assert all(f'"{name}"' in text for name in names)
    compile(text, "program.py", "exec")


@pytest.fixture(autouse=True)
def _forget_programs():
    """Programs of the tests have one name."""
    yield
    for name in [
        name
        for name, module in sys.modules.items()
        if str(getattr(module, "__file__", "")).endswith(("program.py", "mine.py"))
    ]:
        del sys.modules[name]


def test_rates_are_reduced_and_the_best_is_kept(data, tmp_path):
    out = tmp_path / "run"
    args = ("--label", "click", "--drop", "leak", "--train_epoch", 6, "--watch", "auc", "--reduce_after", 1)
    train(data, out, *args, "--set", "batch_size=500", "--eval_every", 2)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "start"
    assert sum(line["event"] == "evaluation" for line in lines) >= 6
    assert (out / "best.json").exists()
    assert "rate_factor=True" in (out / "program.py").read_text()
