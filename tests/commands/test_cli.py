"""The command line as a user types it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pyarrow as pa
import pytest
import torch

import recfx
from recfx import checkpoint, rows
from recfx.cli import main
from recfx.data import reader, varlen
from tests.conftest import DIM, FEATURES, deepfm_batches, deepfm_params, deepfm_step
from tests.data.rows import all_rows, write


@pytest.fixture
def folder(tmp_path):
    for name, first in (("a", 0), ("b", 5)):
        ids = [None if i == 7 else i % 4 for i in range(first, first + 5)]
        write(tmp_path / f"{name}.csv", pa.table({"id": ids, "x": [i + 0.5 for i in range(5)]}))
    return tmp_path


def test_convert_then_inspect(folder, capsys):
    main(["convert", str(folder), str(folder / "out"), "--to=orc", "--types=id=int,x=float", "--as_lists"])
    assert capsys.readouterr().out.split() == [str(folder / "out" / f"{name}.orc") for name in "ab"]
    rows = all_rows(reader(folder / "out", [varlen("id", torch.int64)], 10))
    assert [row["id"] for row in rows] == [[0], [1], [2], [3], [0], [1], [2], [], [0], [1]]
    main(["inspect", str(folder / "out")])
    head, names, first, *_ = capsys.readouterr().out.splitlines()
    assert head.startswith("2 files, ")
    assert head.endswith("2 units, 10 rows")
    assert names.split() == ["column", "type", "missing", "length", "longest", "distinct", "once", "top", "from", "to"]
    assert first.split() == ["id", "list<item:", "int64>", "10.0%", "0.90", "1", "4", "25.0%", "33.3%", "0", "3"]


def test_inspect_says_when_it_saw_a_part(folder, capsys):
    main(["inspect", str(folder), "--rows=3", "--delimiter=,"])
    assert "10 rows; columns by the first 3" in capsys.readouterr().out


def test_inspect_a_checkpoint(tmp_path, capsys):
    """Of two saves, the second of what changed, with a row deleted between them."""
    step = deepfm_step()
    state = step.init(deepfm_params())
    with checkpoint.Saver(tmp_path / "ckpt", step, full_every=2) as saver:
        for number, batch in enumerate(deepfm_batches(2), start=1):
            state, _ = step.update_(state, batch)
            some = next(rows.batches(step, state, "emb/a"))["id"][:number]
            state = rows.delete_(step, state, "emb/a", torch.tensor(some.to_pylist()))
            path = saver.save(state, number=number, loop={"epoch": 0})
    main(["inspect", str(tmp_path / "ckpt")])
    said = capsys.readouterr().out
    main(["inspect", str(path)])
    assert capsys.readouterr().out == said
    lines = said.splitlines()
    total = sum(f.stat().st_size for f in path.iterdir()) - (path / "manifest.json").stat().st_size
    assert lines[0] == f"{path}: step 2, seed 3, 3 files, {total:,} bytes"
    assert lines[1] == "optimisers keep m, v of rows, m, step, v of parameters"
    assert lines[2].startswith("table-0: 2 files of 2 saves, ")
    for group, dim in (("emb", DIM), ("bias", 1)):
        for name in FEATURES:
            num = sum(len(batch["id"]) for batch in rows.batches(step, state, f"{group}/{name}"))
            assert any(line.split() == [f"{group}/{name}", str(dim), str(num), "table-0"] for line in lines)
    for name, p in deepfm_params().items():
        assert f"{name} {list(p.shape)}" in [" ".join(line.split(maxsplit=1)) for line in lines]


def test_inspect_checkpoints_and_files_apart(folder, capsys):
    step = deepfm_step()
    path = checkpoint.save(folder / "ckpt", step, step.init(deepfm_params()), number=0, loop={})
    assert main(["inspect", str(path), str(folder)]) == 2
    assert "expected checkpoints alone, or files alone" in capsys.readouterr().err
    (path / "state.safetensors").write_bytes(b"")
    assert main(["inspect", str(path)]) == 2
    assert "state.safetensors: checksum differs" in capsys.readouterr().err


def test_checksums_are_for_the_reader(folder, capsys):
    main(["inspect", str(folder), "--checksums"])
    manifest = folder / "_checksums.json"
    assert capsys.readouterr().out.strip() == f"2 checksums in {manifest}"
    assert set(json.loads(manifest.read_text())["files"]) == {"a.csv", "b.csv"}
    columns = [varlen("id", torch.int64)]
    assert len(all_rows(reader(folder, columns, 5, checksums=manifest))) == 10
    (folder / "b.csv").write_bytes((folder / "b.csv").read_bytes().replace(b"1", b"2", 1))
    it = iter(reader(folder, columns, 5, checksums=manifest))
    next(it)
    with pytest.raises(ValueError, match=r"file '.*b.csv': got checksum .*, expected .*\. The file is damaged"):
        next(it)
    write(folder / "c.csv", pa.table({"id": [1]}))
    with pytest.raises(ValueError, match=r"file '.*c.csv': got no checksum in the manifest"):
        list(reader(folder / "c.csv", columns, 1, checksums=manifest))


@pytest.mark.parametrize("content", ["", "{}", '{"algorithm": "crc", "files": {}}', '{"algorithm": "xxh3_128"}', "[]"])
def test_a_manifest_that_is_none(folder, content):
    (folder / "m.json").write_text(content)
    with pytest.raises(ValueError, match=r"checksums: got '.*m.json'"):
        reader(folder, [varlen("id", torch.int64)], checksums=folder / "m.json")
    with pytest.raises(ValueError, match=r"checksums: got '.*none.json'"):
        reader(folder, [varlen("id", torch.int64)], checksums=folder / "none.json")


def test_errors_are_one_line(folder):
    assert main(["inspect", str(folder / "nothing")]) == 2
    command = [sys.executable, "-m", "recfx", "convert", "x", "y"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: paths: got 'x', which matches no file, expected a file, a folder of files or a glob."
    ]


@pytest.mark.parametrize("arguments", [["convert", "x", "y", "--types=a=date"], ["train"], []])
def test_arguments_that_are_none(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "usage: recfx" in capsys.readouterr().err


def test_version_names_what_a_report_of_a_bug_needs():
    """Without importing torch, which takes seconds."""
    code = "import sys; from recfx.cli import main; sys.modules['torch'] = None; main(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    first, system = done.stdout.splitlines()
    names = {word.rsplit(" ", 1)[0]: word.rsplit(" ", 1)[1] for word in first.split(", ")}
    assert names["recfx"] == recfx.__version__
    assert names["torch"] == torch.__version__
    assert names["pyarrow"] == pa.__version__
    assert names["Python"] == platform.python_version()
    assert system == platform.platform()


def test_version_by_the_module():
    done = subprocess.run([sys.executable, "-m", "recfx", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"recfx {recfx.__version__}, Python {platform.python_version()}, torch ")
