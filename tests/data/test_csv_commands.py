"""The options of CSV on a command line."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import parquet as pq

from recfx.commands.csv_options import add_csv_options, format_of
from recfx.data import Csv


def format_from(*words: str, paths: tuple[str, ...] = ()) -> Csv | None:
    parser = argparse.ArgumentParser()
    add_csv_options(parser)
    return format_of(argparse.Namespace(paths=list(paths), **vars(parser.parse_args(words))))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--delimiter=::"], Csv(delimiter="::")),
        (["--delimiter", r"\t"], Csv(delimiter="\t")),
        (["--delimiter=|", "--quote=none"], Csv(delimiter="|", quote=None)),
        (["--delimiter=|", "--quote='"], Csv(delimiter="|", quote="'")),
        (["--delimiter=|", "--list_separator=,"], Csv(delimiter="|", list_separator=",")),
        (["--delimiter=|", "--list_separator=="], Csv(delimiter="|", list_separator="=")),
        (["--delimiter=|", "--list_separator=tags=,"], Csv(delimiter="|", list_separator={"tags": ","})),
        (["--delimiter=,", "--list_separator=a=|,b=,,c=; "], Csv(list_separator={"a": "|", "b": ",", "c": "; "})),
        (["--delimiter=,", "--weight_separator=:"], Csv(weight_separator=":")),
        (["--delimiter=,", "--weight_separator=a=:,b=="], Csv(weight_separator={"a": ":", "b": "="})),
        (["--delimiter=,", r"--nulls=\N,NULL"], Csv(nulls=("\\N", "NULL"))),
        (["--delimiter=,", "--column_names=a,b", "--skip_lines=2"], Csv(column_names=("a", "b"), skip_lines=2)),
        ([], None),
    ],
)
def test_what_the_options_say(words, expected):
    assert format_from(*words) == expected


def test_the_delimiter_that_goes_with_the_names_of_the_files(tmp_path):
    for name in ("a.csv", "b.tsv", "c.tsv.gz"):
        (tmp_path / name).write_text("x\n")
    paths = [str(tmp_path / name) for name in ("a.csv", "b.tsv", "c.tsv.gz")]
    assert format_from("--list_separator=|", paths=(paths[0],)) == Csv(list_separator="|")
    assert format_from("--list_separator=|", paths=(paths[1], paths[2])) == Csv(delimiter="\t", list_separator="|")
    with pytest.raises(ValueError, match=r"delimiter: got none for .*, expected one. Some files are \*.tsv"):
        format_from("--list_separator=|", paths=(str(tmp_path),))


def test_convert_as_a_command(tmp_path):
    (tmp_path / "x.tsv").write_text('label\ttags\tlikes\n0\ta|"b\t1:0.5;2\n\\N\tc\t\n')
    options = ["--list_separator=tags=|,likes=;", "--weight_separator=likes=:", "--quote=none", r"--nulls=\N"]
    command = [sys.executable, "-m", "recfx", "convert", str(tmp_path / "x.tsv"), str(tmp_path / "out"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert pq.read_table(Path(done.stdout.strip())).to_pylist() == [
        {"label": 0, "tags": ["a", '"b'], "likes": [{"k": 1, "v": 0.5}, {"k": 2, "v": 1.0}]},
        {"label": None, "tags": ["c"], "likes": []},
    ]
