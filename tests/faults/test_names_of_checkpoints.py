"""Only the names that save gives are the newest checkpoint, are resumed from and are deleted; any can be loaded."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest
import torch

from recfx.checkpoint import Saver, compact, latest, load, save
from recfx.checkpoint.folders import LOCK, MANIFEST, FolderLock, finished
from recfx.commands.checkpoints import checkpoint_at
from recfx.embeddings import Embedding
from recfx.optim import sgd, sparse_sgd
from recfx.step import Step, train_step

OTHERS = [
    "step-best", "step-000000100.bak", "step-100", "step-0000000100", "step-00000010a", "step-00000010٣",
    "Step-000000100", "step-000000100 ", "step-0000_0100", "step--00000100",
]  # fmt: skip


@pytest.fixture(scope="module")
def step() -> Step:
    return train_step(
        features=dict,
        embeddings={"e": [Embedding("u", dim=2)]},
        forward=lambda params, emb, features: emb["e"].sum((1, 2))[:, None] + params["b"],
        sparse_optimizer=sparse_sgd(0.1),
        dense_optimizer=sgd(0.1),
    )


def fresh(step: Step):
    return step.init({"b": torch.zeros(1)})


def write(folder: Path, step: Step, *numbers: int, **kwargs) -> Path:
    for number in numbers:
        path = save(folder, step, fresh(step), number=number, loop={}, **kwargs)
    return path


def test_copies_kept_by_hand_are_neither_the_newest_nor_deleted(step, tmp_path):
    first = write(tmp_path, step, 100, 200)
    copies = [shutil.copytree(first, tmp_path / name) for name in OTHERS]
    newest = write(tmp_path, step, 300, 400, 500, max_to_keep=2)
    assert finished(tmp_path) == [tmp_path / "step-000000400", newest]
    assert latest(tmp_path) == checkpoint_at(str(tmp_path)) == newest
    for copy in copies:
        assert load(copy, step, fresh(step))[1]["step"] == 200
        assert checkpoint_at(str(copy)) == copy
    shutil.rmtree(newest), shutil.rmtree(tmp_path / "step-000000400")
    assert latest(tmp_path) is None


def test_a_file_or_a_folder_without_a_manifest_of_such_a_name_does_not_count(step, tmp_path):
    path = write(tmp_path, step, 100)
    (tmp_path / "step-000000200").write_text("")
    (tmp_path / "step-000000300" / MANIFEST).mkdir(parents=True)
    assert finished(tmp_path) == [path]


def test_links_are_read_from_and_never_deleted_or_written_through(step, tmp_path):
    elsewhere = write(tmp_path / "elsewhere", step, 100)
    before = {path.name: path.stat().st_ino for path in elsewhere.iterdir()}
    folder = tmp_path / "run"
    folder.mkdir()
    links = [folder / name for name in ("step-000000100", "step-000000150")]
    for link in links:
        link.symlink_to(elsewhere)
    assert latest(folder) == links[1]
    compact(links[1])  # the checkpoint that the link leads to
    before = {path.name: path.stat().st_ino for path in elsewhere.iterdir()}
    newest = write(folder, step, 200, 300, max_to_keep=1)
    assert finished(folder) == [*links, newest]
    assert write(folder, step, 100) == links[0]  # replaces the link
    assert not links[0].is_symlink()
    links[1].unlink()
    links[1].symlink_to(tmp_path / "nowhere")
    assert write(folder, step, 150) == links[1]
    assert not links[1].is_symlink()
    assert {path.name: path.stat().st_ino for path in elsewhere.iterdir()} == before


# The lock of a folder.


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_told(step, tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    num_open = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(
        OSError, match=rf"{tmp_path}: got no lock \({os.strerror(number)}\), expected .* with flock"
    ) as e:
        Saver(tmp_path, step)
    assert e.value.errno == number
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "theirs").write_text("their words")
    (tmp_path / LOCK).symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match=rf"{tmp_path}/{LOCK}: .*, expected a file to write to\. .* Delete it if"):
        FolderLock(tmp_path)
    assert (tmp_path / "theirs").read_text() == "their words"


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(IsADirectoryError, match=rf"{tmp_path}/{LOCK}: Is a directory, expected a file to write to"):
        FolderLock(tmp_path)
