"""The launches of the captured DeepFM step on CUDA, counted without a device: those of graphs/deepfm.cuda.txt."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

import pytest
import torch

from graphs.render import FOLDER, torch_version
from recfx.capture.compiled import options_for
from tests.capture.test_graphs import review

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has real hooks of CUDA")

FILE = "deepfm.cuda.txt"
MOST_NODES = 46  # 42 today; at 1.7 us each, 78 us of the 125 that 8 M samples/s leave a step of 1000 samples
MOST_DENSE = 36  # of these those of Inductor, of products and of the look at gradients


@functools.cache
def text() -> str:
    """graphs/deepfm.cuda.txt, from a process whose torch takes itself for one with a GPU.

    Inductor's warning that tf32 is off is an error there: a program whose warnings are errors compiles in fp32, too.
    """
    command = [sys.executable, "-m", "graphs.fake_cuda"]
    env = {**os.environ, "PYTHONWARNINGS": "error:TensorFloat32"}
    child = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=200, env=env)
    assert child.returncode == 0, child.stderr
    return child.stdout


def groups(of: str) -> dict[str, int]:
    """Nodes by group, from the first paragraph behind the header."""
    return {what: int(nodes) for nodes, what in re.findall(r"^ *(\d+)  (.*)$", of.split("\n\n")[1], re.MULTILINE)}


def test_launches_are_the_reviewed_ones(request):
    """On the version of torch that the file is from: another one fuses other kernels."""
    version = (FOLDER / FILE).read_text().splitlines()[0].removeprefix("# torch:").strip()
    if version == torch_version() or request.config.getoption("--accept-graphs"):
        review(request, {FILE: text()})


def test_a_step_is_few_launches():
    """What grew since the file was written is named first."""
    before, now = groups((FOLDER / FILE).read_text()), groups(text())
    grown = {what: f"{before.get(what, 0)} -> {nodes}" for what, nodes in now.items() if nodes > before.get(what, 0)}
    total = next(nodes for what, nodes in now.items() if what.startswith("in all"))
    assert sum(now[what] for what in ("inductor", "product", "finite_parts")) <= MOST_DENSE, grown
    assert total <= MOST_NODES, grown


def test_every_launch_of_the_total_is_listed():
    lines = re.findall(r"^ *(\d+)  ", text().split("\n\n")[2], re.MULTILINE)
    total = next(nodes for what, nodes in groups(text()).items() if what.startswith("in all"))
    assert sum(map(int, lines)) == total
    assert len(lines) > 30


def test_kernels_are_joined_on_cuda_alone():
    on_cpu, on_cuda = options_for("cpu"), options_for("cuda")
    added = on_cuda.keys() - on_cpu.keys()
    assert {"combo_kernels", "max_pointwise_cat_inputs", "shape_padding"} <= added
    assert not {*on_cpu} & {"combo_kernels", "max_pointwise_cat_inputs", "shape_padding"}
    with torch._inductor.config.patch({name: on_cuda[name] for name in added}):  # this version of torch knows them
        assert torch._inductor.config.combo_kernels
