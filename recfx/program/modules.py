"""Where a program's module is, how it is imported, and which source files belong to it."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from recfx.checks import said

__all__ = ["Found", "find", "imported", "sources"]

INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Found:
    """A program's module, before it is imported.

    Args:     name: its import path; "" for a program given as a file.
              file: its source, absolute.
              base: the folder from which the names of its imports are looked up.
    """

    name: str
    file: Path
    base: Path

    @property
    def module_name(self) -> str:
        """Of a file: a private name, the same for the same path."""
        return self.name or f"recfx_program_{hashlib.sha256(str(self.file).encode()).hexdigest()[:16]}"


def find(program: str | os.PathLike[str]) -> Found:
    """Finds a program by its import path, "package.module", or by the path of its .py file.

    Raises:   ValueError when there is none.
    """
    if not isinstance(program, str | os.PathLike) or not isinstance(os.fspath(program), str):
        raise TypeError(f"program: got {said(program)}, expected an import path or the path of a .py file, a str.")
    text = os.fspath(program)
    if text.endswith(".py") or not isinstance(program, str):
        file = Path(text).absolute()
        if not _is_file(file):
            raise ValueError(f"program: got {text!r}, expected the path of a .py file. There is no such file.")
        file = file.resolve()
        return Found("", file, file.parent)
    parts = text.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ValueError(
            f"program: got {text!r}, expected an import path such as 'package.module', or the path of a .py file."
        )
    try:
        spec = importlib.util.find_spec(text)
    except (Exception, SystemExit) as error:  # a package around it is imported
        raise ValueError(
            f"program: got {text!r}, whose package cannot be imported ({_line(error)}), expected a module."
        ) from error
    origin = spec.origin if spec is not None else None
    if origin is None or not origin.endswith(".py"):
        raise ValueError(
            f"program: got {text!r}, expected a module with Python source that can be imported. Install its package, "
            "add its folder to PYTHONPATH, or give the path of the .py file."
        )
    file = Path(origin).absolute()
    return Found(text, file, file.parents[len(parts) - (file.name != "__init__.py")])


def _is_file(path: Path) -> bool:
    try:
        return "\0" not in str(path) and path.is_file()
    except OSError:  # too long, or in a folder that may not be read
        return False


@contextmanager
def imported(found: Found) -> Iterator[ModuleType]:
    """The module. Within the context, modules next to a program's file can be imported, as in `python program.py`.

    A file is executed each time. Other modules, and a program given by its import path, are imported as Python does,
    once in a process: restart it after an edit.

    Raises:   ValueError when it cannot be imported, or when another module of the name of one next to it was imported
              before.
    """
    name = found.module_name
    if found.name:
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise _not_imported(found, error) from error
        yield module
        return
    _check_names(found)
    loader = _Uncached(name, str(found.file))
    spec = importlib.util.spec_from_file_location(name, found.file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(found.base))
    try:
        try:
            loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise _not_imported(found, error) from error
        yield module
    finally:
        with suppress(ValueError):  # the program has removed it
            sys.path.remove(str(found.base))


class _Uncached(SourceFileLoader):
    """Compiles the source. Python's cache of bytecode misses an edit within a second that keeps the size."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def sources(found: Found) -> dict[str, str]:
    """The sha256 of each source file of a program, by its path relative to `found.base`, sorted.

    The files are the program's own, and those that it reaches by import statements: of a module in a package, the
    modules of that package; of a single file, the modules in its folder. Other packages, modules imported by
    `importlib`, and data files are not covered; recfx itself is covered by its version.
    """
    files = [found.file, *(file for _, file in _all_imported(found))]
    by_name = {file.relative_to(found.base).as_posix(): file for file in files}
    return {name: hashlib.sha256(by_name[name].read_bytes()).hexdigest() for name in sorted(by_name)}


def _all_imported(found: Found) -> list[tuple[str, Path]]:
    """The modules that `sources` covers besides the program's own: names and files."""
    modules, todo = [(found.name, found.file)], [(found.name, found.file)]
    while todo:
        new = [module for module in _imported_files(found, *todo.pop()) if module[1] not in dict(modules).values()]
        modules += dict.fromkeys(new)
        todo += new
    return modules[1:]


def _imported_files(found: Found, name: str, file: Path) -> Iterator[tuple[str, Path]]:
    """The modules, of those that `sources` covers, that one of them imports: names and files."""
    top = found.name.partition(".")[0]
    in_package = "." in found.name or found.file.name == "__init__.py"
    if top == "recfx" or (not in_package and found.base.name in INSTALLED):
        return
    for other in sorted(_import_names(name, file)):
        first = other.partition(".")[0]
        path = found.base.joinpath(*other.split("."))
        if first != "recfx" and (first == top or not in_package):
            for candidate in (path / "__init__.py", path.with_name(f"{path.name}.py")):
                if candidate.is_file():
                    yield other, candidate
                    break


def _import_names(name: str, file: Path) -> set[str]:
    """Dotted names in the import statements of a file, with those of the packages around them."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):  # the import raises it
        return set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            around = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*around, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}".strip(".") for alias in node.names} | ({origin} - {""})
    parts = [name.split(".") for name in found]
    return {".".join(words[:end]) for words in parts for end in range(1, len(words) + 1)}


def _check_names(found: Found) -> None:
    """Raises ValueError when a module next to a program's file would not be the one that its imports get."""
    for name, file in _all_imported(found):
        known = getattr(sys.modules.get(name), "__file__", str(file) if name not in sys.modules else None)
        if known is None or Path(known).resolve() != file.resolve():
            raise ValueError(
                f"module {name!r} of '{found.file}': got {known or 'a built-in module'}, expected '{file}'. A module "
                "of that name is imported already. Rename the file, or load the program in another process."
            )


def _not_imported(found: Found, error: BaseException) -> ValueError:
    return ValueError(
        f"program: got '{found.name or found.file}', which cannot be imported ({_line(error)}), expected a module with "
        "a function build(args)."
    )


def _line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
