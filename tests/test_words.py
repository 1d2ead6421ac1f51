"""House style that a program can check: the length of functions, and words that read twice."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 60  # of a function, its docstring not counted
REASON = re.compile(r"#\s*long:\s*\w+")
CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]*`", re.MULTILINE | re.DOTALL)  # of a page

WORDS = {  # what does not occur in docstrings, comments, errors and pages, and what to write instead
    r"\banew\b": "again, or a verb with re-: rebuild, renumber",
    r"\ban? \w+ less\b": "one ... fewer",
    r"(?<!\bthere )\bis no (?!longer\b|more\b)": "is not a ..., does not have a ...",
    r"(?<!\bthere )\bare none\b|\bhas none of\b": "are not ..., does not contain any",
    r"\b(is|are) (?-i:refused)\b|(?<!['\"])\brefuses?\b(?!['\"])": "is rejected with an error, rejects",
    r"\bof (its|their|your|his|our) own\b|\bof (his|yours|theirs)\b": "separate, private, a user's",
    r"\bbeside\b": "next to, with, in addition to",
    r"(?<!\bleft )\bbehind\b": "after",
    r"\b(stands?|lies?) (in|there|between|beside|behind)\b": "is in, is stored in, is between",
    r"\bgoes by\b": "uses",
    r"\b(is|are|was) (told|asked)\b": "is notified, receives, is called",
    r"\b(says|asks)\b": "specifies, contains, prints; reads, requires",
    r"\b(thereof|midst|whereof)\b": "of it, in the middle",
}

# Folders that have not been reworded yet.
LONG_YET: tuple[str, ...] = ()
WORDS_YET: tuple[str, ...] = ()

MODULES = sorted((ROOT / "recfx").rglob("*.py"))
SOURCES = [*MODULES, *sorted(path for end in ("cpp", "h") for path in (ROOT / "recfx").rglob(f"*.{end}"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def long_functions(source: str) -> Iterator[tuple[int, str, int]]:
    """Line, name and length of the functions above MOST_LINES without a comment `# long: <reason>`."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        length = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            docstring = node.body[0]
            assert docstring.end_lineno is not None
            length -= docstring.end_lineno - docstring.lineno + 1
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        around = lines[first - 2 : node.body[0].lineno - 1] if first > 1 else lines[: node.body[0].lineno - 1]
        if length > MOST_LINES and not any(REASON.search(line) for line in around):
            yield node.lineno, node.name, length


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of the comments and strings of a source file, or text of a page without its code."""
    source = path.read_text()
    if path.suffix == ".py":
        kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type in kinds:
                yield token.start[0], token.string
    elif path.suffix == ".md":
        yield 1, CODE.sub(lambda code: re.sub(r"[^\n]+", "x", code[0]), source)
    else:
        for number, line in enumerate(source.splitlines(), 1):
            if "//" in line:
                yield number, line.partition("//")[2]


def found_in(first_line: int, text: str) -> Iterator[str]:
    stripped = "\n".join(line.strip() for line in text.split("\n"))  # words of one phrase may be in two lines
    for pattern, instead in WORDS.items():
        for match in re.finditer(pattern.replace(" ", r"\s"), stripped, re.IGNORECASE):
            line = first_line + stripped[: match.start()].count("\n")
            yield f"{line}: got '{match[0]}', expected {instead}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_are_short_or_give_a_reason(path):
    if name_of(path).startswith(LONG_YET):
        return
    found = [f"{line}: {name} has {length} lines" for line, name, length in long_functions(path.read_text())]
    assert not found, f"{name_of(path)}: {found}, expected at most {MOST_LINES}, or a comment `# long: <reason>` above."


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=name_of)
def test_words_are_plain(path):
    if name_of(path).startswith(WORDS_YET):
        return
    found = [one for line, text in texts(path) for one in found_in(line, text)]
    assert not found, f"{name_of(path)}: " + "; ".join(found)


def test_a_long_function_is_found():
    body = "\n".join(["    x = 1"] * MOST_LINES)
    assert [name for _, name, _ in long_functions(f"def f():\n{body}\n")] == ["f"]
    assert not list(long_functions(f"# long: it is one table\ndef f():\n{body}\n"))
    assert not list(long_functions('def f():\n    """One.\n\n    Two."""\n    x = 1\n'))


def test_words_are_found_with_their_line():
    found = ["8: got 'anew', expected again, or a verb with re-: rebuild, renumber"]
    assert list(found_in(7, "Built once.\n    Built anew.")) == found
    assert len(list(found_in(1, "It is\n    no pair."))) == 1
    assert not list(
        found_in(1, "There is no row. There\n    are none. It is no longer used. Refused ids are left behind.")
    )
