"""The two languages of the tutorial are one program."""

from __future__ import annotations

import ast
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def blocks(name: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / name).read_text(), flags=re.MULTILINE | re.DOTALL)


def without_docstrings(code: str) -> str:
    """What Python makes of it: comments and docstrings of functions may be in any language."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def test_both_languages_have_the_same_code_and_outputs():
    english, chinese = blocks("tutorial.md"), blocks("tutorial.zh.md")
    assert len(english) == len(chinese) > 10
    for (language, code), (other_language, other) in zip(english, chinese, strict=True):
        assert language == other_language
        if language == "python":
            assert without_docstrings(code) == without_docstrings(other)
        else:
            assert code == other


def test_both_languages_have_the_same_sections_and_links():
    english, chinese = ((DOCS / name).read_text() for name in ("tutorial.md", "tutorial.zh.md"))
    for pattern in (r"^(#+ \d*)", r"^(<!-- .* -->)$", r"\]\(([\w-]+\.md)\)"):
        found = [re.findall(pattern, text, flags=re.MULTILINE) for text in (english, chinese)]
        found = [[link for link in one if not link.startswith("tutorial")] for one in found]
        assert found[0] == found[1] != []
