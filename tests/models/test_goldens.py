"""Each model as numbers: a change shows in goldens.txt, and a reviewer accepts it. Its ops: graphs/models.ops.txt."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from tests.models import test_models as ctr
from tests.models import test_task_models as others

FILE = Path(__file__).with_name("goldens.txt")
HEAD = (
    "# Models of recfx.models at the sizes of the tests: parameters; outputs of three samples. Accept a change:\n"
    "# python -m pytest tests/models/test_goldens.py -n 0 --accept-graphs\n"
)


def described(name: str) -> str:
    if name in ctr.MODELS:
        params, emb, feats = ctr.case(name, ctr.N)
        output = ctr.MODELS[name][0].forward(params, emb, feats)
    else:
        params, emb, feats = others.case(name)
        output, _ = others.forward_of(name)(params, others.as_ragged(emb), feats)
    outputs = output if isinstance(output, dict) else {"logit": output}
    lines = [f"{name}: {sum(p.numel() for p in params.values())} parameters"]
    lines += [f"    {key} {' '.join(f'{x:.5f}' for x in t[:3, 0].tolist())}" for key, t in outputs.items()]
    return "\n".join(lines) + "\n"


def goldens() -> dict[str, str]:
    """The text of each model in the file."""
    parts = FILE.read_text().removeprefix(HEAD).split("\n\n") if FILE.exists() else []
    return {part.strip().split(":")[0]: part.strip() + "\n" for part in parts}


@pytest.mark.parametrize("name", [*ctr.MODELS, *others.MODELS])
def test_a_model_is_the_reviewed_one(name, request):
    now, kept = described(name), goldens()
    if request.config.getoption("--accept-graphs"):
        kept[name] = now
        ordered = [kept[key] for key in (*ctr.MODELS, *others.MODELS) if key in kept]
        FILE.write_text(HEAD + "\n" + "\n".join(ordered))
    diff = difflib.unified_diff(kept.get(name, "").splitlines(), now.splitlines(), FILE.name, "now", lineterm="")
    assert kept.get(name) == now, "\n".join([*diff, HEAD])


def test_every_model_has_a_golden():
    assert list(goldens()) == [*ctr.MODELS, *others.MODELS]
