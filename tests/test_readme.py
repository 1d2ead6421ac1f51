"""What README.md and docs/ tell a reader to run, runs; so does every script of examples/.

Blocks of Python are run, each as a script of its own. What a page says about its blocks stands in comments of Markdown:

    <!-- one script -->   the first line of a page: its blocks are one script, in their order
    <!-- not run -->      before a block: it needs what a test does not have, such as a file of another system
    <!-- output -->       before a block of text: it is exactly what the block of Python before it prints
    <!-- file: x.py -->   before a block: it is not run; the scripts of the page find it in their folder under this name

Of the lines of bash, the targets of make, the modules, scripts and subcommands that they name must exist.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from recfx import cli
from tests.forks import Forks

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, *DOCS]
NOT_RUN, OUTPUT, ONE_SCRIPT = "<!-- not run -->", "<!-- output -->", "<!-- one script -->"
FILE = re.compile(r"<!-- file: ([\w.-]+) -->")
SHELL = ("bash", "sh", "shell", "console")
END_OF_BLOCK = "\x1e"
TIMEOUT_S = 110


class Block(NamedTuple):
    language: str
    line: int  # of its first line of code, from 1
    code: str
    note: str  # the comment before it, if that is NOT_RUN, OUTPUT or FILE


class Script(NamedTuple):
    """Blocks of Python that are run in one process, and what each has to print; None: anything."""

    page: Path
    blocks: list[Block]
    outputs: list[str | None]


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text."""
    blocks, lines, before, start = [], text.splitlines(), "", None
    fence = language = ""
    for i, line in enumerate(lines):
        opened = re.match(r"\s*(`{3,}|~{3,})\s*([\w+-]*)", line)
        if start is None and opened:
            fence, language, start = opened[1], opened[2], i + 1
        elif start is not None and line.strip() == fence:
            note = before if before in (NOT_RUN, OUTPUT) or FILE.fullmatch(before) else ""
            blocks.append(Block(language, start + 1, textwrap.dedent("\n".join(lines[start:i])), note))
            start, before = None, ""
        elif start is None and line.strip():
            before = line.strip()
    assert start is None, f"line {start}: the block is not closed"
    return blocks


def scripts_of(page: Path) -> list[Script]:
    """The blocks of Python of a page that are run, each alone or all of them as one script."""
    text, scripts = page.read_text(), []
    for block in blocks_of(text):
        if block.language == "python" and not block.note:
            scripts.append(Script(page, [block], [None]))
        elif block.note == OUTPUT:
            scripts[-1].outputs[-1] = block.code
    if text.startswith(ONE_SCRIPT):
        scripts = [Script(page, [b for s in scripts for b in s.blocks], [o for s in scripts for o in s.outputs])]
    return scripts


def source_of(script: Script) -> str:
    """Every line where it is on the page, so that an error names the page's line; a mark is printed after a block."""
    lines: list[str] = []
    for block in script.blocks:
        lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines() + [f"print({END_OF_BLOCK!r})"]
    return "\n".join(lines) + "\n"


def shell_blocks(page: Path) -> list[Block]:
    return [b for b in blocks_of(page.read_text()) if b.language in SHELL and not b.note]


def name_of(value: Script | Path) -> str:
    return f"{value.page.stem}-{value.blocks[0].line}" if isinstance(value, Script) else value.stem


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


def links_of(page: Path) -> list[tuple[str, str]]:
    """(path, anchor) of the links of a page to other files or to itself."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return [tuple(link.partition("#")[::2]) for link in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)", text)]


def anchors_of(page: Path) -> set[str]:
    """Of its headings, as GitHub and mkdocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = [re.sub(r"[^\w\s-]", "", h).strip().lower() for h in re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)]
    return {re.sub(r"[\s-]+", "-", heading) for heading in headings}


def reference() -> object:
    """The module that writes the API reference."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "hooks" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def run_script(forks: Forks, path: Path, cwd: Path) -> str:
    """As a program, warnings as errors where they come from recfx or the script itself."""
    done = forks.run(path, cwd=cwd, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


# The helpers above.


def test_blocks_of_a_text():
    text = f"a\n```python\nx = 1\n\ny = 2\n```\nb\n{NOT_RUN}\n\n```bash\nmake\n```\n```\nplain\n```\n"
    text += "    ```python\n    z\n    ```"
    assert blocks_of(text) == [
        Block("python", 3, "x = 1\n\ny = 2", ""),
        Block("bash", 11, "make", NOT_RUN),
        Block("", 14, "plain", ""),
        Block("python", 17, "z", ""),
    ]
    with pytest.raises(AssertionError, match="line 1: the block is not closed"):
        blocks_of("```python\nx = 1")


def test_scripts_of_a_page(tmp_path, forks):
    page, blocks = tmp_path / "page.md", f"```python\nx = 1\n```\n{OUTPUT}\n```text\n```\n```python\nprint(x)\n```\n"
    page.write_text(blocks)
    assert [(s.blocks[0].line, s.outputs) for s in scripts_of(page)] == [(2, [""]), (8, [None])]
    page.write_text(f"{ONE_SCRIPT}\n{blocks}{OUTPUT}\n```text\n1\n```\n")
    (script,) = scripts_of(page)
    assert source_of(script).splitlines()[2] == "x = 1"
    check_script(forks, script, tmp_path)
    with pytest.raises(AssertionError):
        check_script(forks, script._replace(outputs=["", "2"]), tmp_path)


def test_targets_of_a_command():
    assert make_targets("$ make demo PYTHON=python3.12 -j2  # make tea") == ["demo"]
    assert make_targets("cd x && make test; CC=g++ make bench | tee log") == ["test", "bench"]
    assert make_targets("make") == [""]
    assert make_targets("remake it  # or make demo") == []
    assert {"demo", "test", "bench", "clean"} <= makefile_targets()
    assert not {".PHONY", "VENV", "PYTHON"} & (makefile_targets() - {".PHONY"})


# README.md and docs/.


def check_script(forks: Forks, script: Script, tmp_path: Path) -> None:
    """Runs it and compares what it prints with the page."""
    for block in blocks_of(script.page.read_text()):
        if named := FILE.fullmatch(block.note):
            (tmp_path / named[1]).write_text(block.code + "\n")
    path = tmp_path / "block.py"
    path.write_text(source_of(script))
    printed = run_script(forks, path, tmp_path).split(f"{END_OF_BLOCK}\n")
    for block, expected, got in zip(script.blocks, script.outputs, printed, strict=False):
        if expected is not None:
            assert got.rstrip().splitlines() == expected.splitlines(), f"{script.page.name}, line {block.line}"


def test_readme_says_how_to_begin():
    """The two commands, and something to run."""
    commands = [line for block in shell_blocks(README) for line in block.code.splitlines()]
    assert {"demo", "test"} <= {target for command in commands for target in make_targets(command)}
    assert scripts_of(README)


def test_the_first_loop_is_about_20_lines():
    """And the second block, from a CSV to scores, about 25; the README about 180."""
    loop, scores, *_ = scripts_of(README)
    assert sum(bool(line.strip()) for line in loop.blocks[0].code.splitlines()) <= 22
    assert sum(bool(line.strip()) for line in scores.blocks[0].code.splitlines()) <= 28
    assert len(README.read_text().splitlines()) <= 190


RUN = [page for page in PAGES if page.name != "tutorial.zh.md"]  # its code is that of tutorial.md, by test_tutorial.py


@pytest.mark.parametrize("script", [script for page in RUN for script in scripts_of(page)], ids=name_of)
def test_python_blocks(script, tmp_path, forks):
    check_script(forks, script, tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if shell_blocks(page)], ids=name_of)
def test_commands_exist(page, capsys):
    """Targets of make, modules, scripts, and subcommands of recfx with their options."""
    for command in (line for block in shell_blocks(page) for line in block.code.splitlines()):
        for target in make_targets(command):
            assert target == "" or target in makefile_targets(), command
        for module in re.findall(r"python\S* -m (recfx[\w.]*)", command):
            assert any((ROOT / f"{module.replace('.', '/')}{end}").exists() for end in (".py", "/__main__.py")), command
        for script in re.findall(r"(?<![\w/.-])((?:examples|bench|tests)/[\w/.-]+\.(?:py|sh))", command):
            assert (ROOT / script).exists(), command
        for subcommand in re.findall(r"(?:^|[;&|$] *|python\S* -m )recfx (\w+)", command):
            with pytest.raises(SystemExit) as ended:
                cli.main([subcommand, "--help"])
            assert ended.value.code == 0, command
            known = capsys.readouterr().out
            options = re.findall(r"(?<!\S)--\w+", re.sub(r"(^|\s)#.*", "", command))
            assert not [option for option in options if not re.search(rf"{option}\b", known)], command


def test_every_block_is_of_a_kind_that_is_tested():
    blocks = [(page, block) for page in PAGES for block in blocks_of(page.read_text())]
    assert not [(page.name, b.line) for page, b in blocks if b.language not in ("python", "text", *SHELL)]


def test_what_make_installs_is_pinned_and_torch_comes_first():
    makefile = (ROOT / "Makefile").read_text()
    assert "TORCH := torch==2.13.0\n" in makefile
    installed = re.findall(r"^\t\$\(PIP\) (.*)", makefile, flags=re.MULTILINE)
    files = [name for line in installed for name in re.findall(r"-r (\S+)", line)]
    assert installed[0] == "$(TORCH)"
    assert files == ["requirements.txt", "requirements-bench.txt", "requirements-docs.txt"]
    others = ["--no-deps --no-build-isolation --editable .", "--no-deps --upgrade --target $(@D) triton==3.6.0"]
    assert [line for line in installed[1:] if "-r" not in line] == others
    lines = [line for name in files for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert len(set(lines)) == len({line.split("==")[0].lower() for line in lines})  # they go into one .venv
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line) or line.startswith("torch==")]
    assert "setuptools" in {line.split("==")[0] for line in lines}  # of the build that is not isolated


def test_scripts_that_make_runs_exist():
    scripts = re.findall(r"(?:bench|tests)/[\w/]+\.py", (ROOT / "Makefile").read_text())
    assert scripts
    assert not [script for script in scripts if not (ROOT / script).exists()]


def test_ci_runs_the_readmes_test_command_on_the_sample():
    script = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert script.splitlines()[-1] == "make test"
    assert re.search(r"export RECFX_CRITEO_SAMPLE=", script)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_linked_exists(page):
    for path, anchor in links_of(page):
        target = (page.parent / path) if path else page
        if (ROOT / "docs" / "api").resolve() == target.parent.resolve():
            assert target.stem in {"index", *reference().PAGES}
            continue
        assert target.exists(), path
        assert not anchor or anchor in anchors_of(target), f"{path}#{anchor}"


def test_every_page_is_in_the_map_and_in_the_navigation():
    pages = {str(page.relative_to(ROOT / "docs")) for page in DOCS}
    in_readme = {path.removeprefix("docs/") for path, _ in links_of(README) if path.startswith("docs/")}
    navigation = re.findall(
        r"^ *- (?:[^#\n]*: )?([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE
    )
    assert pages == in_readme
    assert set(navigation) == {"index.md"} | pages | {f"api/{name}.md" for name in ("index", *reference().PAGES)}
    assert len(navigation) == len(set(navigation))


def test_the_reference_has_every_public_name():
    made = reference()
    listed = {module for _, modules in made.PAGES.values() for module in modules}
    for page, (_, modules) in made.PAGES.items():
        text = made.page_of(page)
        for module in filter(made.source_of, modules):
            names = importlib.import_module(f"recfx.{module}").__all__
            assert names
            assert not [name for name in names if f"\n### {name}\n" not in text], module
    inner = {
        "checks",
        "cli",
        "commands",
        "describe",
        "environment",
        "examples",
        "finite",
        "generators",
        "kernels",
    }  # not for programs
    inner |= {"run_checks", "step_checks"}
    folders = {p.stem for p in (ROOT / "recfx").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert {name for name in folders if not name.startswith("__")} - inner <= {m.split(".")[0] for m in listed}


def test_the_first_page_of_the_site_is_the_readme():
    first = reference().home()
    assert "](reading.md)" in first
    assert "](../graphs/deepfm.svg)" in first
    assert "docs/" not in re.sub(r"`[^`]*`", "", first)


def test_a_docstring_as_markdown():
    doc = "Sums a < b.\n\n    y = x + 1\n\nMore.\nArgs:     x: f32.\n          y: i64.\nExample:  >>> f(1)\n          2"
    assert reference().rendered(doc).split("\n\n") == [
        "Sums a \\< b.", "```text\n    y = x + 1\n```", "More.",
        "```text\nArgs:     x: f32.\n          y: i64.\nExample:  >>> f(1)\n          2\n```",
    ]  # fmt: skip


def test_every_result_is_listed():
    results = ROOT / "bench" / "results"
    listed = (results / "README.md").read_text()
    assert not [path.name for path in results.iterdir() if path.name != "README.md" and path.stem not in listed]


def test_every_module_has_its_line_among_the_files():
    """Of the package's own folder; what lies deeper belongs to its folder's line."""
    tour = (ROOT / "docs" / "tour.md").read_text()
    names = {p.name for p in (ROOT / "recfx").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert not {name for name in names if not name.startswith("__") and name not in tour}


# The examples.


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_example(script, tmp_path, forks):
    """From another folder than its own; under 100 lines; without private names."""
    for package in re.findall(r"^pip install (\w+)", script.read_text(), flags=re.MULTILINE):
        pytest.importorskip(package, reason="an optional package")
    assert run_script(forks, script, tmp_path)
    assert list(tmp_path.iterdir()) == []
    code = script.read_text()
    assert len(code.splitlines()) < 100
    assert not re.search(r"^\s*(from recfx\S* import|import recfx).*\b_\w", code, flags=re.MULTILINE)
    assert not re.search(r"\b(step|state|ops|deepfm|capture)\._(?!replace)\w", code)


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells in their order, as a kernel runs them."""
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell.get("outputs", []) == [] for cell in notebook["cells"])
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    for cell in code:
        exec(compile(cell, "notebook.ipynb", "exec"), names)
    assert names["values"]["auc"] > 0.9
