"""The package as a user meets it: names, imports, examples in docstrings."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import recfx

ROOT = Path(recfx.__file__).parent
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "recfx."))
HAS_TRITON = importlib.util.find_spec("triton") is not None
CODE = [name for name in MODULES if not name.endswith(".__main__") and (HAS_TRITON or ".gpu." not in name)]

# Imports run one way, up this list; modules of one line may import each other.
LAYERS = (
    ("environment",),  # imported before torch
    ("types", "checks", "describe", "kernels"),  # the gate of a batch is a kernel, and the packing kernels make batches
    ("context", "generators"),
    ("features", "layers", "losses", "metrics", "ragged", "data"),
    ("embeddings", "table", "optim"),
    ("models",),
    ("step", "run_checks", "dist"),
    ("capture", "checkpoint", "rows"),
    ("recis", "train"),
    ("program",),
    ("tabular", "report"),
    ("examples", "commands"),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SEES_ONLY = {
    "environment": set(),
    "types": {"describe", "kernels"},
    "data": {"types", "checks", "kernels"},
    "checkpoint": {"types", "checks", "kernels", "generators", "embeddings", "table", "step", "run_checks", "dist"},
    "models": {"types", "features", "layers", "losses", "ragged", "context"},
    "capture": {"types", "checks", "generators", "kernels", "dist", "step", "run_checks"},
}


def part(module: str) -> str:
    return module.split(".")[1]


def imports(module: str) -> set[str]:
    """Modules of recfx that `module` imports, at any place in its source."""
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.startswith("recfx.")}


@pytest.mark.parametrize("module", CODE)
def test_imports_run_one_way(module):
    mine = part(module)
    for other in sorted({part(name) for name in imports(module)} - {mine}):
        assert RANK[other] <= RANK[mine], f"{module} imports recfx.{other}, which is above it"
        allowed = SEES_ONLY.get(mine)
        assert allowed is None or other in allowed, f"{module} imports recfx.{other}, expected one of {sorted(allowed)}"


def test_every_module_has_a_place():
    assert {part(name) for name in MODULES} <= set(RANK)


@pytest.mark.parametrize("module", CODE)
def test_all_is_sorted_and_importable(module):
    loaded = importlib.import_module(module)
    tree = ast.parse(Path(loaded.__file__).read_text())
    if not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body):
        return
    names = loaded.__all__
    assert names == sorted(names)
    assert len(names) == len(set(names))
    for name in names:
        getattr(loaded, name)


@pytest.mark.parametrize("module", CODE)
def test_public_names_and_modules_are_documented(module):
    loaded = importlib.import_module(module)
    assert loaded.__doc__ or Path(loaded.__file__).read_text() == ""
    for name in getattr(loaded, "__all__", []):
        value = getattr(loaded, name)
        if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == module:
            assert value.__doc__, f"{module}.{name}"


class ExampleParser(doctest.DocTestParser):
    """Finds examples that follow the word: `Example:  >>> f(x)`. Plain doctest silently skips them."""

    def parse(self, string: str, name: str = "<string>") -> list:
        return super().parse(re.sub(r"Example:(?= *>>>)", " " * len("Example:"), string), name)


@pytest.mark.parametrize("module", CODE)
def test_docstring_examples(module):
    loaded, said = importlib.import_module(module), []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(parser=ExampleParser()).find(loaded, module):
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)
    examples = [line for line in Path(loaded.__file__).read_text().splitlines() if "Example:" in line]
    assert runner.tries >= sum("+SKIP" not in line for line in examples)


def python(code: str) -> tuple[str, float]:
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, time.perf_counter() - begin


def test_import_recfx_is_silent_and_light():
    output, seconds = python("import recfx, sys; assert 'torch' not in sys.modules")
    assert output == ""
    assert seconds < 2


def test_nothing_happens_on_import():
    """No output, no compiler, no thread count, seed or default changed."""
    code = f"""
import subprocess, torch
def forbidden(*args, **kwargs): raise AssertionError("a process was started on import")
before = torch.get_num_threads(), torch.initial_seed(), torch.get_default_dtype(), torch.is_grad_enabled()
subprocess.run = forbidden
import importlib
for name in {CODE!r}:
    importlib.import_module(name)
assert before == (torch.get_num_threads(), torch.initial_seed(), torch.get_default_dtype(), torch.is_grad_enabled())
"""
    assert python(code)[0] == ""
