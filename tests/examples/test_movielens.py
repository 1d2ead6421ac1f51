"""The example of MovieLens, over ratings in its form."""

import importlib.util
import inspect
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "movielens.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("movielens", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_lines(function) -> int:
    lines = [line.strip() for line in inspect.getsource(function).splitlines()]
    return sum(bool(line) and not line.startswith(('"""', "#")) for line in lines)


def test_the_model_and_its_loop_are_20_lines(example):
    assert code_lines(example.fit) <= 20


def test_a_file_and_its_arrays_train_alike(example, tmp_path):
    path = tmp_path / "u.data"
    example.write_ratings(path)
    assert path.read_text().splitlines()[0].count("\t") == 3
    from_file, from_memory = example.from_file(path), example.from_memory(path)
    assert 0.8 < from_file < 0.99
    assert from_memory == pytest.approx(from_file, abs=0.03)  # the same split, in another order
