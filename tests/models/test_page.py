"""The table of docs/models.md: every model, with as many parameters as it has."""

import importlib
import inspect
import pkgutil
import re
from dataclasses import fields
from pathlib import Path

import torch

from recfx import models

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
SIZES = {"num_sparse": 26, "num_numeric": 13, "num_query": 26, "num_item": 4, "tasks": ("click", "buy")}


def num_parameters(name):
    module = importlib.import_module(f"recfx.models.{name}")
    (config,) = (getattr(module, key) for key in module.__all__ if key.endswith("Config"))
    made = module.init(config(**{f.name: SIZES[f.name] for f in fields(config) if f.name in SIZES}), torch.Generator())
    params = made[0] if isinstance(made, tuple) else made
    return sum(p.numel() for p in params.values())


def test_the_table_has_every_model_and_its_parameters():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|[^|]+\|$", PAGE.read_text(), flags=re.MULTILINE)
    assert {name: int(num) for name, num in rows} == {name: num_parameters(name) for name, _ in rows}
    modules = [info.name for info in pkgutil.iter_modules(models.__path__)]
    has_forward = [n for n in modules if hasattr(importlib.import_module(f"recfx.models.{n}"), "forward")]
    assert sorted(name for name, _ in rows) == sorted(has_forward)


def test_the_package_names_every_model():
    doc = inspect.getdoc(models)
    assert all(f"`{name}`" in doc for name, _ in re.findall(r"^\| `(\w+)` (\|)", PAGE.read_text(), flags=re.MULTILINE))
