"""The commands of docs/one-command.md run, and print what it shows; numbers that depend on the processor aside."""

import re
import shlex
import subprocess
import sys

from recfx import cli
from tests.test_readme import ROOT, blocks_of


def normal(text):
    """Lines without their spaces and the digits of their decimals."""
    return {re.sub(r"[-+]?\d+\.\d+", "#", re.sub(r"\s+", " ", line.strip())) for line in text.splitlines()}


def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of((ROOT / "docs" / "one-command.md").read_text())
    subprocess.run([sys.executable, "-c", blocks[0].code], check=True)
    num_shown = 0
    for block in blocks[1:]:
        if block.language == "bash":
            (line,) = block.code.splitlines()
            program, *words = shlex.split(line)
            assert program == "recfx"
            assert cli.main([*words, "--backend", "eager"]) == 0, capsys.readouterr().err
            printed = capsys.readouterr().out
        else:
            assert normal(block.code) <= normal(printed)
            num_shown += 1
    assert num_shown == 3
    first, second = ((tmp_path / run / "program.py") for run in ("run1", "run2"))
    assert first.exists()
    assert not second.exists()
