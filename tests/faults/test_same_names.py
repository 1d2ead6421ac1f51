"""What a reader of files is known by: the next day's files of the same names and sizes are other data."""

import json
import pickle
import shutil

import pyarrow as pa
import pytest
import torch
from pyarrow import csv, feather, parquet

from recfx import checkpoint
from recfx.checkpoint.folders import digest_of
from recfx.data import fixedlen, reader, varlen
from recfx.data.files import File
from recfx.embeddings import Embedding
from recfx.optim import adamw, sparse_adamw
from recfx.step import train_step
from recfx.train import TrainConfig, train
from tests.loop import Log, interrupt

COLUMNS = [fixedlen("label", [0.0]), varlen("item", torch.int64)]
WRITERS = {
    "arrow": lambda table, path: feather.write_feather(table, path, compression="uncompressed"),
    "parquet": lambda table, path: parquet.write_table(
        table, path, compression="none", use_dictionary=False, write_statistics=False
    ),
    "csv": csv.write_csv,
}


def part(folder, kind="arrow", *, num_rows=40, changed=range(0)):
    """A file of one name and size, whatever its rows hold."""
    folder.mkdir()
    items = [1000 * (1 + (i in changed)) + i % 1000 for i in range(num_rows)]
    table = pa.table({"item": items, "label": [float(i % 2) for i in range(num_rows)]})
    WRITERS[kind](table, str(folder / f"part-0.{kind}"))
    return folder


def train_files(folder, data, *, listener=lambda *_: None, price=lambda x: x, **options):
    step = train_step(
        features=lambda batch: {**batch, "item": batch["item"], "price": price(batch["item"].values.double().mean())},
        embeddings={"emb": [Embedding("item", dim=4)]},
        forward=lambda params, emb, feats: emb["emb"].sum((1, 2))[:, None] + params["bias"] * feats["price"].float(),
        sparse_optimizer=sparse_adamw(lr=1e-2),
        dense_optimizer=adamw(lr=1e-2),
    )
    state, config = step.init({"bias": torch.zeros(1)}), TrainConfig(output_dir=str(folder), log_steps=1)
    batches = reader(str(data), COLUMNS, 10, **options)
    return train(step, step.update_, state, batches, config, resume=True, on_event=listener)[1]


def test_the_next_day_in_files_of_the_same_names_and_sizes(tmp_path):
    """Neither skipped, nor entered in the middle."""
    monday, tuesday = part(tmp_path / "mon"), part(tmp_path / "tue", changed=range(40))
    assert train_files(tmp_path / "ckpt", monday).step == 4
    assert train_files(tmp_path / "ckpt", tuesday, listener=Log(("after_step", 6), interrupt)).step == 6
    message = r"reader: got one of '.*mon/part-0.arrow', expected one of '.*tue/part-0.arrow': .*step-000000006"
    with pytest.raises(ValueError, match=message):
        train_files(tmp_path / "ckpt", monday)
    with pytest.raises(ValueError, match=r"one of '.*tue/part-0.arrow', .* '.*tue/part-0.arrow' as it was: .*step-000"):
        train_files(tmp_path / "ckpt", tuesday, shuffle_rows=7)
    assert train_files(tmp_path / "ckpt", tuesday).step == 8


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("arrow", range(40_000)), ("parquet", range(40_000)), ("csv", range(1)), ("csv", range(15_000, 16_500)),
        ("csv", range(39_999, 40_000)),
    ],
)  # fmt: skip
def test_contents_tell_files_of_one_size_apart(tmp_path, kind, changed):
    """At the beginning, the middle or the end; and they are the same files after they are moved."""
    whole = part(tmp_path / "a", kind, num_rows=40_000)
    other = part(tmp_path / "b", kind, num_rows=40_000, changed=changed)
    shutil.copytree(whole, tmp_path / "moved")
    of_whole, of_other, of_moved = (reader(str(p), COLUMNS, 10) for p in (whole, other, tmp_path / "moved"))
    assert of_whole.files[0].size == of_other.files[0].size > 100_000
    assert of_whole.identity == of_moved.identity != of_other.identity
    assert pickle.loads(pickle.dumps(of_whole)).identity == of_whole.identity
    with pytest.raises(ValueError, match="position: got one of"):
        of_other.start_at(of_whole.epoch(0).position)


def test_files_are_sampled_once_and_only_by_the_worker_that_reads_them(tmp_path, monkeypatch):
    for name in "abc":
        part(tmp_path / name)
    read, sampled = File._read_sample, []
    monkeypatch.setattr(File, "_read_sample", lambda file: sampled.append(file.path) or read(file))
    batches = reader(str(tmp_path / "*"), COLUMNS, 10, rank=0, world_size=2)
    assert not sampled
    it = batches.epoch(0)
    assert {it.position["of"] for _ in it} == {batches.identity}
    assert sorted(path[-14:] for path in sampled) == ["a/part-0.arrow", "c/part-0.arrow"]
    assert batches.plan.share(0, 2).fingerprint != batches.identity
    assert len(sampled) == 2
    (tmp_path / "a" / "part-0.arrow").unlink()
    assert it.position["of"] == batches.identity
    gone = reader([str(tmp_path / "b"), str(tmp_path / "c")], COLUMNS, 10)
    (tmp_path / "b" / "part-0.arrow").unlink()
    with pytest.raises(ValueError, match=r"file '.*b/part-0.arrow': got .*, expected a readable file"):
        gone.identity  # noqa: B018


def test_positions_of_names_and_sizes_alone_are_still_read(tmp_path):
    """As checkpoints held them before contents counted."""
    batches = reader(str(part(tmp_path / "a")), COLUMNS, 10)
    it = batches.epoch(0)
    next(it)
    old = it.position | {"of": batches.plan.fingerprint_of_sizes}
    assert old != it.position
    rest = batches.start_at(old)
    assert rest.position == it.position
    assert len(list(rest)) == 3
    folder = tmp_path / "ckpt"
    train_files(folder, tmp_path / "a", listener=Log(("after_step", 2), interrupt))
    manifest = checkpoint.latest(folder) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["loop"]["position"]["of"] = batches.plan.fingerprint_of_sizes
    for name in ("reader", "data", "began", "ended"):
        del content["loop"][name]
    del content["manifest_xxh3_128"]
    manifest.write_text(json.dumps(content | {"manifest_xxh3_128": digest_of(content)}))
    assert train_files(folder, tmp_path / "a").step == 4


@pytest.mark.parametrize(
    ("options", "place"), [({}, ""), ({"shuffle_rows": 50}, "the shuffled window that begins in ")]
)
def test_nan_is_said_to_be_in_a_file(tmp_path, options, place):
    data = part(tmp_path / "a")
    seen = []

    def price(x):
        seen.append(x)
        return x * float("nan") if len(seen) == 4 else x

    message = rf"step 4: .*of epoch 1 \(30 rows after the start of {place}unit 0 of '.*a/part-0.arrow'\)"
    with pytest.raises(FloatingPointError, match=message):
        train_files(tmp_path / "ckpt", data, price=price, **options)
