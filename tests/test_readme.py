"""What README.md and docs/ tell a reader to run, runs; so does every script of examples/."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
NOT_RUN = "<!-- not run -->"
TIMEOUT_S = 110


class Block(NamedTuple):
    language: str
    line: int  # of its first line of code, from 1
    code: str
    skipped: bool  # the last line before it that is not blank is NOT_RUN


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text."""
    blocks, lines, before, start = [], text.splitlines(), "", None
    fence = language = ""
    for i, line in enumerate(lines):
        opened = re.match(r"\s*(`{3,}|~{3,})\s*([\w+-]*)", line)
        if start is None and opened:
            fence, language, start = opened[1], opened[2], i + 1
        elif start is not None and line.strip() == fence:
            blocks.append(Block(language, start + 1, textwrap.dedent("\n".join(lines[start:i])), before == NOT_RUN))
            start, before = None, ""
        elif start is None and line.strip():
            before = line.strip()
    assert start is None, f"line {start}: the block is not closed"
    return blocks


def readme(language: str) -> list[Block]:
    if not README.exists():
        return []
    return [b for b in blocks_of(README.read_text()) if b.language in language.split() and not b.skipped]


def docs() -> list[tuple[Path, Block]]:
    """The blocks of Python on the pages of docs/."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    return [
        (page, b) for page in pages for b in blocks_of(page.read_text()) if b.language == "python" and not b.skipped
    ]


def name_of(block: Block) -> str:
    return f"line-{block.line}"


def make_targets(command: str) -> list[str]:
    """The targets that a command line hands to make; [""] for its default one. Comments and variables left out."""
    targets = []
    for part in re.split(r"&&|\|\||[;|]", re.sub(r"(^|\s)#.*", "", command)):
        words = part.removeprefix("$ ").split()
        words = words[next((i for i, w in enumerate(words) if not re.match(r"\w+=", w)), 0) :]
        if words[:1] == ["make"]:
            targets += [w for w in words[1:] if not w.startswith("-") and "=" not in w] or [""]
    return targets


def makefile_targets() -> set[str]:
    return {
        target
        for line in (ROOT / "Makefile").read_text().splitlines()
        for target in (re.match(r"([\w ./$()-]+):(?!=)", line) or ["", ""])[1].split()
    }


def run_script(path: Path, cwd: Path) -> str:
    """In another process, warnings as errors where they come from recfx or the script itself."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error:::recfx", "-W", "error:::__main__", str(path)]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


# The helpers above.


def test_blocks_of_a_text():
    text = f"a\n```python\nx = 1\n\ny = 2\n```\nb\n{NOT_RUN}\n\n```bash\nmake\n```\n```\nplain\n```\n"
    text += "    ```python\n    z\n    ```"
    assert blocks_of(text) == [
        Block("python", 3, "x = 1\n\ny = 2", False),
        Block("bash", 11, "make", True),
        Block("", 14, "plain", False),
        Block("python", 17, "z", False),
    ]
    with pytest.raises(AssertionError, match="line 1: the block is not closed"):
        blocks_of("```python\nx = 1")


def test_targets_of_a_command():
    assert make_targets("$ make demo PYTHON=python3.12 -j2  # make tea") == ["demo"]
    assert make_targets("cd x && make test; CC=g++ make bench | tee log") == ["test", "bench"]
    assert make_targets("make") == [""]
    assert make_targets("remake it  # or make demo") == []
    assert {"demo", "test", "bench", "clean"} <= makefile_targets()
    assert not {".PHONY", "VENV", "PYTHON"} & (makefile_targets() - {".PHONY"})


# The README.


@pytest.mark.skipif(not README.exists(), reason="no README.md")
def test_readme_says_how_to_begin():
    """The two commands, and something to run."""
    commands = [line for block in readme("bash sh shell console") for line in block.code.splitlines()]
    assert {"demo", "test"} <= {target for command in commands for target in make_targets(command)}
    assert readme("python")


def test_the_first_loop_is_about_20_lines():
    assert sum(bool(line.strip()) for line in readme("python")[0].code.splitlines()) <= 22


@pytest.mark.parametrize("block", readme("python"), ids=name_of)
def test_python_block(block, tmp_path):
    script = tmp_path / "block.py"
    script.write_text("\n" * (block.line - 1) + block.code + "\n")  # so that an error names the README's line
    run_script(script, tmp_path)


@pytest.mark.parametrize(
    ("page", "block"), docs(), ids=lambda value: value.stem if isinstance(value, Path) else name_of(value)
)
def test_python_block_of_a_page(page, block, tmp_path):
    test_python_block(block, tmp_path)


@pytest.mark.parametrize("block", readme("bash sh shell console"), ids=name_of)
def test_commands_exist(block):
    """Targets of make, modules and scripts that a command names."""
    for command in block.code.splitlines():
        for target in make_targets(command):
            assert target == "" or target in makefile_targets(), command
        for module in re.findall(r"python\S* -m (recfx[\w.]*)", command):
            assert any((ROOT / f"{module.replace('.', '/')}{end}").exists() for end in (".py", "/__main__.py")), command
        for script in re.findall(r"(?<![\w/.-])((?:examples|bench|tests)/[\w/.-]+\.(?:py|sh))", command):
            assert (ROOT / script).exists(), command


def test_what_make_installs_is_pinned_and_torch_comes_first():
    makefile = (ROOT / "Makefile").read_text()
    assert "TORCH := torch==2.13.0\n" in makefile
    installed = re.findall(r"^\t\$\(PIP\) (.*)", makefile, flags=re.MULTILINE)
    files = [name for line in installed for name in re.findall(r"-r (\S+)", line)]
    assert installed[0] == "$(TORCH)"
    assert files == ["requirements.txt", "requirements-bench.txt"]
    others = ["--no-deps --no-build-isolation --editable .", "--no-deps --upgrade --target $(@D) triton==3.6.0"]
    assert [line for line in installed[1:] if "-r" not in line] == others
    lines = [line for name in files for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line) or line.startswith("torch==")]
    assert "setuptools" in {line.split("==")[0] for line in lines}  # of the build that is not isolated


def test_ci_runs_the_readmes_test_command_on_the_sample():
    script = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert script.splitlines()[-1] == "make test"
    assert re.search(r"export RECFX_CRITEO_SAMPLE=", script)


@pytest.mark.skipif(not README.exists(), reason="no README.md")
def test_files_that_are_linked_exist():
    for page in (README, *(ROOT / "docs").rglob("*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text)
        assert not [link for link in links if not (page.parent / link).exists()]


def test_every_result_is_listed():
    results = ROOT / "bench" / "results"
    listed = (results / "README.md").read_text()
    assert not [path.name for path in results.iterdir() if path.name != "README.md" and path.stem not in listed]


def test_every_module_has_its_line_among_the_files():
    """Of the package's own folder; what lies deeper belongs to its folder's line."""
    table = README.read_text().split("## The files, in reading order")[1].split("## ")[0]
    names = {p.name for p in (ROOT / "recfx").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert not {name for name in names if not name.startswith("__") and name not in table}


# The examples.


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_example(script, tmp_path):
    """From another folder than its own; under 100 lines; without private names."""
    assert run_script(script, tmp_path)
    assert list(tmp_path.iterdir()) == []
    code = script.read_text()
    assert len(code.splitlines()) < 100
    assert not re.search(r"^\s*(from recfx\S* import|import recfx).*\b_\w", code, flags=re.MULTILINE)
    assert not re.search(r"\b(step|state|ops|deepfm|capture)\._(?!replace)\w", code)
