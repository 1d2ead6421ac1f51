"""The text of a compiled kernel as statements: labels, operations, operands and where in the source they come from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Kernel", "Statement", "UnknownInstructionError", "parse"]

SIZES = {"pred": 1} | {f"{letter}{bits}": bits // 8 for letter in "bsuf" for bits in (8, 16, 32, 64)}
TOKEN = re.compile(
    r"""\s*(?:(?P<loc>\.loc\s[^\n]*)|(?P<label>[\w$.%]+):(?!:)|(?P<open>\{)|(?P<close>\})
        |(?P<statement>[^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)""",
    re.VERBOSE,
)


class UnknownInstructionError(NotImplementedError):
    """An instruction that the machine does not have."""


@dataclass
class Statement:
    """`@guard name operands` at a place of the source; a label has an empty name and itself as its operand."""

    name: str
    operands: list[str]
    guard: str = ""
    place: tuple[int, int] = (0, 0)  # number of the file, line


@dataclass
class Kernel:
    name: str
    params: list[tuple[str, str]]  # type, name
    files: dict[int, str]
    statements: list[Statement] = field(default_factory=list)


def parse(ptx: str) -> Kernel:
    """The one kernel of a module."""
    files = {int(number): path for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.MULTILINE)}
    ptx = re.sub(r"//[^\n]*", "", ptx)
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", ptx, re.DOTALL)
    assert head, ptx
    params = re.findall(r"\.param\s+\.(\w+)[^,]*?([\w$]+_param_\d+)", head[2])
    return Kernel(head[1], params, files, list(without_tables(statements(ptx[head.end() :]))))


def without_tables(of: Iterator[Statement]) -> Iterator[Statement]:
    """A jump by a table, which stands before it, as one comparison and one jump for each of its labels."""
    tables: dict[str, list[str]] = {}
    label = ""
    for s in of:
        if s.name == ".branchtargets":
            tables[label] = s.operands
        elif s.name.startswith("brx"):
            chosen, table = s.operands
            for n, target in enumerate(tables[table]):
                holds = f"%{table}.{n}"
                yield Statement("setp.eq.u32", [holds, chosen, str(n)], place=s.place)
                yield Statement("bra", [target], holds, s.place)
        else:
            yield s
        label = s.operands[0] if not s.name else ""


def statements(body: str) -> Iterator[Statement]:
    """Those up to the brace that closes the body. A register of an inner scope gets the scope's number in its name."""
    place, at, scopes, num_scopes = (0, 0), 0, [dict[str, str]()], 0
    while True:
        token = TOKEN.match(body, at)
        assert token, f"got {body[at : at + 80]!r}, expected a statement"
        at, text = token.end(), token[token.lastgroup or 0]
        match token.lastgroup:
            case "loc":
                _, number, line, *_ = text.split()
                place = int(number), int(line)
            case "label":
                yield Statement("", [text], place=place)
            case "open":
                num_scopes += 1
                scopes.append({})
            case "close":
                scopes.pop()
                if not scopes:
                    return
            case _ if text.startswith(".reg") and len(scopes) > 1:
                names = re.split(r"[,\s]+", text.split(None, 2)[2])
                scopes[-1] |= {name: f"{name}@{num_scopes}" for name in names}
            case _ if text.startswith((".reg", ".pragma", ".shared")):
                pass
            case _:
                yield statement(text, {k: v for scope in scopes for k, v in scope.items()}, place)


def statement(text: str, renamed: dict[str, str], place: tuple[int, int]) -> Statement:
    guard = ""
    if text.startswith("@"):
        guard, text = text.split(None, 1)
    name, rest = [*text.split(None, 1), ""][:2]
    if renamed:
        rest, guard = (re.sub(r"[\w$%]+", lambda word: renamed.get(word[0], word[0]), t) for t in (rest, guard))
    operands = [o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
    return Statement(name, operands, guard.removeprefix("@"), place)
