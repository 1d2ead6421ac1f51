"""What mkdocs does besides rendering the pages: the API reference from docstrings, and links out of docs/.

The reference is read from the source with `ast`: nothing is imported, so that a site can be built where torch is not
installed, and defaults are printed as they are written.
"""

from __future__ import annotations

import ast
import functools
import posixpath
import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
WIDTH = 100  # characters of a signature in one line
SECTION = re.compile(r"[A-Z][a-z]+:(?: {2,}|$)")  # of a docstring: "Args:     lr: step size"
LINK = re.compile(r"\]\((\.\./[^)#\s]+)")  # to a file of the repository outside docs/

# The pages of the reference, in reading order: title, and the modules whose public names they list.
MODELS = [
    f"models.{path.stem}" for path in sorted((ROOT / "recfx" / "models").glob("[!_]*.py")) if path.stem != "inputs"
]

PAGES = {
    "types": ("Batches", ["types"]),
    "data": ("Reading", ["data"]),
    "features": ("Feature ops", ["features"]),
    "embeddings": ("Embeddings", ["embeddings"]),
    "optim": ("Optimisers", ["optim", "optim.schedules"]),
    "models": ("Layers, losses, models", ["layers", "losses", "ragged", *MODELS]),
    "step": ("The step", ["step", "context"]),
    "capture": ("Capture", ["capture"]),
    "train": ("Training and programs", ["train", "program", "tabular", "report"]),
    "dist": ("Many workers", ["dist", "dist.streams"]),
    "metrics": ("Metrics", ["metrics"]),
    "table": ("Tables", ["table", "table.policies"]),
    "rows": ("Rows by id", ["rows"]),
    "checkpoint": ("Checkpoints", ["checkpoint"]),
    "recis": ("RecIS", ["recis"]),
}


class Name(NamedTuple):
    """A public name of a module, as its source defines it."""

    name: str
    signature: str  # "" for a value
    doc: str  # "" for a value without one
    members: list[Name]  # public methods of a class


def source_of(module: str) -> Path | None:
    """The file of a module of recfx; None where there is none."""
    path = ROOT / "recfx" / module.replace(".", "/")
    found = [p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()]
    return found[0] if found else None


def names_of(module: str) -> tuple[str, list[Name]]:
    """A module's docstring, and the names in its `__all__`, wherever in recfx they are defined."""
    tree, _ = _parsed(module)
    names = sorted(_public(module))
    return ast.get_docstring(tree) or "", [_described(name, *_definition(module, name)) for name in names]


def _public(module: str) -> list[str]:
    """The names in a module's `__all__`, with those that `__all__ += part.__all__` adds of the modules below it."""
    tree, _ = _parsed(module)
    names = list[str]()
    for node in tree.body:
        if _targets(node) == ["__all__"]:
            names += ast.literal_eval(node.value)  # type: ignore[attr-defined]
        elif isinstance(node, ast.AugAssign) and ast.unparse(node.target) == "__all__":
            names += _public(f"{module}.{ast.unparse(node.value).removesuffix('.__all__')}")
    return names


@functools.cache
def _parsed(module: str) -> tuple[ast.Module, list[str]]:
    """The syntax tree and the lines of a module's source."""
    source = source_of(module)
    assert source is not None, module
    text = source.read_text()
    return ast.parse(text), text.splitlines()


def _definition(module: str, name: str) -> tuple[ast.stmt, list[str]]:
    """Where a name is defined, in the module or in another one of recfx that it imports the name from."""
    tree, lines = _parsed(module)
    for node in tree.body:
        if (isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name) or name in _targets(node):
            return node, lines
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("recfx."):
            for alias in node.names:
                source = str(node.module).removeprefix("recfx.")
                if (alias.asname or alias.name) == name or (alias.name == "*" and name in _public(source)):
                    return _definition(source, name if alias.name == "*" else alias.name)
    raise ValueError(f"{module}: got {name} in __all__, expected a name that is defined or imported there.")


def _targets(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [t.id for t in targets if isinstance(t, ast.Name)]


def _described(name: str, node: ast.stmt, lines: list[str]) -> Name:
    if isinstance(node, ast.FunctionDef):
        return Name(name, _signature(node), ast.get_docstring(node) or "", [])
    if isinstance(node, ast.ClassDef):
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and ast.get_docstring(n)]
        members = [Name(n.name, _signature(n), ast.get_docstring(n) or "", []) for n in methods]
        return Name(name, _class(node, lines), ast.get_docstring(node) or "", members)
    return Name(name, ast.unparse(node), "", [])


def _signature(node: ast.FunctionDef) -> str:
    """`def f(a, *, b=1) -> int`, with a line for each parameter where one line would be too long."""
    decorators = [f"@{ast.unparse(d)}\n" for d in node.decorator_list if ast.unparse(d) in ("property", "staticmethod")]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    short = f"{node.name}({ast.unparse(node.args)}){returns}"
    if len(short) <= WIDTH:
        return "".join(decorators) + short
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + list(a.defaults)
    lines = [_parameter(*pair) for pair in zip(positional, defaults, strict=True)]
    lines += [f"*{a.vararg.arg}"] if a.vararg else ["*"] if a.kwonlyargs else []
    lines += [_parameter(*pair) for pair in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return "".join(decorators) + node.name + "(\n" + "".join(f"    {line},\n" for line in lines) + f"){returns}"


def _parameter(arg: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(arg.annotation)}" if arg.annotation else ""
    return f"{arg.arg}{annotation}" + ("" if default is None else f" = {ast.unparse(default)}")


def _class(node: ast.ClassDef, lines: list[str]) -> str:
    """The bases of a class and its fields, with the comments that give their shapes."""
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    head = f"class {node.name}" + (f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else "")
    return "\n".join([head, *(line for f in fields for line in lines[f.lineno - 1 : f.end_lineno])])


def rendered(doc: str) -> str:
    """A docstring as Markdown: prose as prose; sections, equations and examples as blocks, as columns matter there."""
    parts: list[tuple[bool, str]] = []  # whether it is a block, and its text
    for paragraph in doc.split("\n\n"):
        lines = paragraph.splitlines()
        cut = next((i for i, line in enumerate(lines) if SECTION.match(line)), len(lines))
        if any(line.startswith(" ") for line in lines[:cut]):
            cut = 0
        for is_block, some in ((False, lines[:cut]), (True, lines[cut:])):
            if some and is_block and parts and parts[-1][0]:
                parts[-1] = (True, "\n".join([parts[-1][1], "", *some]))
            elif some:
                parts.append((is_block, "\n".join(some)))
    return "\n\n".join(f"```text\n{text}\n```" if is_block else _prose(text) for is_block, text in parts)


def _prose(text: str) -> str:
    return re.sub(r"(?<!`)([<*])(?!`)", r"\\\1", text)


def page_of(page: str) -> str:
    """The Markdown of one page of the reference."""
    title, modules = PAGES[page]
    text = [f"# {title}"]
    for module in filter(source_of, modules):
        doc, names = names_of(module)
        text += [f"## recfx.{module}" if len(modules) > 1 else "", f"`from recfx.{module} import ...`", rendered(doc)]
        for name in names:
            text += [f"### {name.name}", f"```python\n{name.signature}\n```", rendered(name.doc)]
            for member in name.members:
                text += [f"#### {name.name}.{member.name}", f"```python\n{member.signature}\n```", rendered(member.doc)]
    return "\n\n".join(part for part in text if part) + "\n"


def overview() -> str:
    """The first page of the reference: its pages, and the first line of each module."""
    lines = ["# API reference", "", "Made from the docstrings. Axis letters: `recfx.types`.", ""]
    for page, (title, modules) in PAGES.items():
        known = [m for m in modules if source_of(m)]
        what = " ".join((names_of(m)[0].split("\n\n")[0]).replace("\n", " ") for m in known)
        lines.append(f"- [{title}]({page}.md): {', '.join(f'`recfx.{m}`' for m in known)}. {_prose(what)}")
    return "\n".join(lines) + "\n"


# What mkdocs calls.


def home() -> str:
    """README.md as the first page: its links to docs/ are links to pages, the others lead out of docs/."""
    text = re.sub(r"\]\((?!https?://|#|mailto:)", "](../", (ROOT / "README.md").read_text())
    return text.replace("](../docs/", "](")


def on_files(files: Any, config: Any) -> Any:
    """Adds the first page, the reference, and below repository/ the files of the repository that pages link to."""
    from mkdocs.structure.files import File, InclusionLevel

    pages = {"index.md": home(), "api/index.md": overview()} | {f"api/{page}.md": page_of(page) for page in PAGES}
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    for page in list(files.documentation_pages()):
        for link in LINK.findall(page.content_string):
            uri = _in_site(page.src_uri, link)
            source = ROOT / uri.removeprefix("repository/")
            if source.is_file() and files.get_file_from_path(uri) is None:
                here = InclusionLevel.NOT_IN_NAV
                files.append(File.generated(config, uri, abs_src_path=str(source), inclusion=here))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links from docs/ to other files of the repository go to their copies in the site."""
    here = posixpath.dirname(page.file.src_uri)

    def in_site(match: re.Match) -> str:
        return f"]({posixpath.relpath(_in_site(page.file.src_uri, match[1]), here)}"

    return LINK.sub(in_site, markdown)


def _in_site(page: str, link: str) -> str:
    """Where the file that a page links to is in the site: ../graphs/deepfm.svg is repository/graphs/deepfm.svg."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return "index.md" if path == "README.md" else f"repository/{path}"
