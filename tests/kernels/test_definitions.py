"""`with definitions():` every operator runs its definition, by itself, in a step, and inside torch.func.grad."""

import pytest
import torch

from recfx.kernels import op
from recfx.kernels.definitions import definitions
from recfx.kernels.lists.order_lists import list_sums
from tests.by_definition import by_definition
from tests.conftest import deepfm_batches, deepfm_groups, deepfm_params, deepfm_step

VALUES, ENDS = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 3], dtype=torch.int32)
OF_A_STEP = ["order_ids", "find_or_insert_", "pool", "add_row_grads_", "adamw_rows_checked_", "add_predictions_"]


@pytest.fixture
def called(monkeypatch):
    """Names of the operators whose definition was called, in order."""
    names = []
    for name, definition in op.DEFINITIONS.items():

        def counted(*args, name=name, definition=definition, **kwargs):
            names.append(name.removeprefix("recfx::"))
            return definition(*args, **kwargs)

        monkeypatch.setitem(op.DEFINITIONS, name, counted)
    return names


def test_every_operator_has_one():
    of_schema = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("recfx::")}
    assert of_schema
    assert of_schema <= op.DEFINITIONS.keys()


def test_only_inside_the_context(called):
    assert list_sums(VALUES, ENDS).tolist() == [3, 4]
    assert called == []
    with definitions():
        assert list_sums(VALUES, ENDS).tolist() == [3, 4]
    assert called == ["list_sums"]
    list_sums(VALUES, ENDS)
    assert called == ["list_sums"]


def test_inside_a_gradient(called):
    with definitions():
        slope = torch.func.grad(lambda w: (list_sums(VALUES, ENDS) * w).sum())(torch.ones(2))
    assert slope.tolist() == [3, 4]
    assert called == ["list_sums"]


def test_the_pure_step_runs_the_operators_of_the_other_by_definition(called):
    step, batch = deepfm_step(embeddings=deepfm_groups()), deepfm_batches(1)[0]
    state = step.init(deepfm_params())
    step.update_(state, batch)
    assert called == []
    step.update(state, batch)
    assert [name for name in called if name != "all_finite"] == OF_A_STEP


def test_a_copy_is_written_to():
    state = {"x": torch.zeros(2)}
    copy, returned = by_definition(lambda s: s["x"].add_(1), state)
    assert copy["x"].tolist() == returned.tolist() == [1, 1]
    assert state["x"].tolist() == [0, 0]
