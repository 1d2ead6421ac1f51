"""What `make demo` installs, as editors and type checkers see it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import torch
from recfx import optim
from recfx.capture import capture, capture_prediction
from recfx.data import fixedlen, reader
from recfx.embeddings import Embedding
from recfx.step import train_step
from recfx.types import Params
from torch import Tensor

def forward(params: Params, emb: dict[str, Tensor], feats: dict[str, Tensor]) -> Tensor:
    return emb["emb"].sum((1, 2))[:, None] + params["bias"]

step = train_step(
    features=dict,
    embeddings={"emb": [Embedding("item", dim=2)]},
    forward=forward,
    sparse_optimizer=optim.sparse_adamw(1e-3),
    dense_optimizer=optim.adamw(1e-3),
)
state = step.init({"bias": torch.zeros(1)})
for batch in reader("*.orc", [fixedlen("label", [0.0])]):
    state, aux = step.update_(state, batch)
    reveal_type(state)
    reveal_type(aux)
    reveal_type(batch)
    state, aux = capture(step, state, batch)(state, batch)
    reveal_type(aux)
    reveal_type(capture_prediction(step, state, batch)(state, batch))
"""


def mypy(folder: Path, *arguments: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(folder / "cache"), *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment | variables, capture_output=True, text=True, timeout=300, check=False
    )
    return done.stdout + done.stderr


def test_the_marker_of_a_typed_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["recfx"]
    assert (ROOT / "recfx" / "py.typed").exists()


def test_an_editable_install_is_seen_from_any_folder(tmp_path):
    """By a type checker, which runs no import hook: it must be a path in a .pth file."""
    project, user, environment = tmp_path / "project", tmp_path / "user", tmp_path / "environment"
    user.mkdir()
    project.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (project / name).write_bytes((ROOT / name).read_bytes())
    (project / "recfx").symlink_to(ROOT / "recfx")
    build = "from setuptools import build_meta; print(build_meta.build_editable('.'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=project, capture_output=True, text=True, timeout=60, check=True
    )
    venv.create(environment, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    with zipfile.ZipFile(project / done.stdout.split()[-1]) as wheel:
        wheel.extractall(packages)
    assert [path.read_text().strip() for path in packages.glob("*.pth")] == [str(project)]
    (user / "program.py").write_text("from recfx.checks import said\nreveal_type(said)\n")
    text = mypy(user, f"--python-executable={environment / 'bin' / 'python'}", "program.py")
    assert 'Revealed type is "def (value: Any) -> str"' in text


@pytest.mark.slow
def test_a_users_program_is_typed(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    text = mypy(tmp_path, "--strict", "--follow-imports=silent", "program.py", MYPYPATH=str(ROOT))
    state, aux, batch, captured_aux, logit = (line for line in text.splitlines() if "Revealed type" in line)
    assert "fallback=recfx.step.TrainState" in state
    assert "fallback=recfx.step.Aux" in aux
    assert "recfx.types.Batch" in batch
    assert "fallback=recfx.step.Aux" in captured_aux
    assert "Tensor" in logit
    assert "error" not in text
