"""Which files the paths mean: each once, whatever leads to it."""

import os
import time

import pytest
import torch
from pyarrow import fs

from recfx.data import reader, varlen
from recfx.data.files import match_files
from tests.data.rows import all_rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two files in folders, and the folder is the current one."""
    for path, x in (("days/1/a.csv", 1), ("days/2/b.csv", 2)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(f"x\n{x}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*paths, **kwargs) -> list[str]:
    return [file.path for file in match_files(list(paths), **kwargs)]


BOTH = ["days/1/a.csv", "days/2/b.csv"]


def test_links_in_a_circle(folder):
    os.symlink("..", "days/1/up")
    os.symlink("../2", "days/1/other")
    os.symlink("../1", "days/2/other")
    os.symlink(".", "days/2/itself")
    begin = time.perf_counter()
    assert names("days/**/*.csv") == names("days/**/**/*.csv") == BOTH
    assert names(f"{folder}/**/*.csv") == [f"{folder}/{path}" for path in BOTH]
    assert names("**/*.csv") == [f"./{path}" for path in BOTH]
    assert time.perf_counter() - begin < 2
    rows = all_rows(reader("days/**/*.csv", [varlen("x", torch.int64)], 1))
    assert rows == [{"x": [1]}, {"x": [2]}]


def test_circles_below_a_root(folder):
    os.symlink("..", "days/1/up")
    os.symlink("..", "days/1/above")
    tree = fs.SubTreeFileSystem(str(folder / "days"), fs.LocalFileSystem())
    assert names("**/*.csv", filesystem=tree) == ["./1/a.csv", "./2/b.csv"]
    os.symlink("a.csv", "days/1/link.csv")
    assert names("1/*.csv", filesystem=tree) == ["1/a.csv"]


def test_a_circle_of_many_folders_ends(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}").mkdir()
        for j in range(30):
            os.symlink(f"../{j}", tmp_path / f"{i}" / f"to{j}")
    (tmp_path / "7" / "z.csv").write_text("x\n1\n")
    begin = time.perf_counter()
    assert names(f"{tmp_path}/**/*.csv") == [f"{tmp_path}/7/z.csv"]
    assert time.perf_counter() - begin < 5


def test_a_link_and_its_file(folder):
    os.symlink("a.csv", "days/1/0-latest.csv")
    assert names("days/1/*.csv") == names("days/1") == names("days/1/0-latest.csv", "days/1/a.csv") == BOTH[:1]
    assert names("days/1/0-latest.csv") == ["days/1/0-latest.csv"]  # the name it was given


def test_a_folder_and_its_link(folder):
    os.symlink("2", "days/0")
    assert names("days/*/*.csv") == names("days/*") == names("days/0", "days/2", "days/1") == BOTH
    assert names("days/**/*.csv") == BOTH
    assert names("days/0") == names("days/0/*.csv") == ["days/0/b.csv"]
    assert names("days/**/0/*.csv") == ["days/0/b.csv"]  # the folder was passed by its other name


def test_what_is_reached_through_links_alone(folder):
    (folder / "far").mkdir()
    (folder / "far" / "c.csv").write_text("x\n3\n")
    os.symlink("../far", "days/far")
    os.symlink("../../far", "days/1/far")
    assert names("days/**/*.csv") == [*BOTH, "days/far/c.csv"]


def test_other_spellings_of_a_path(folder):
    assert names("days/1/a.csv", f"{folder}/days/1/a.csv", "days/2/../1/a.csv", "./days/1") == [
        f"{folder}/days/1/a.csv"
    ]
    assert names(f"file://{folder}/days/1/a.csv", "days/2", f"{folder}/days/1") == [f"{folder}/days/1/a.csv", BOTH[1]]


def test_hard_links_are_one_file_and_copies_are_two(folder):
    os.link("days/1/a.csv", "days/2/c.csv")
    (folder / "days/2/d.csv").write_text((folder / "days/1/a.csv").read_text())
    assert names("days/*/*.csv") == [*BOTH, "days/2/d.csv"]


def test_a_link_to_nothing_is_not_a_file(folder):
    os.symlink("gone.csv", "days/1/b.csv")
    assert names("days/1/*.csv") == BOTH[:1]
    with pytest.raises(ValueError, match=r"paths: got 'days/1/b.csv', which matches no file"):
        match_files("days/1/b.csv")


def test_other_file_systems_are_as_they_say(folder):
    memory = fs._MockFileSystem()
    memory.create_dir("day")
    for name in ("a", "b"):
        with memory.open_output_stream(f"day/{name}.csv") as stream:
            stream.write(b"x\n1\n")
    assert names("day/*.csv", "day", "day/**/*.csv", filesystem=memory) == ["day/a.csv", "day/b.csv"]
