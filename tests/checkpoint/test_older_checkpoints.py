"""A checkpoint written before the step's number was part of the state, as it was written then."""

from pathlib import Path

import pytest
import torch

from recfx import checkpoint
from tests.conftest import deepfm_batches, deepfm_step
from tests.loop import MemoryReader, fresh, go

OLDER = Path(__file__).parent / "checkpoint_of_0_1" / "step-000000003"


def test_it_loads_and_training_goes_on():
    """Three batches of the small DeepFM step."""
    step = deepfm_step()
    loaded, loop = checkpoint.load(OLDER, step, fresh(step))
    assert loop == {"epoch": 0, "position": {"batch": 3}, "step": 3}
    assert int(loaded.step) == 3
    batches, expected = deepfm_batches(3), fresh(step)
    for batch in batches:
        expected, _ = step.update_(expected, batch)
    for again in (False, True):
        for batch in batches if again else []:
            (loaded, _), (expected, _) = step.update_(loaded, batch), step.update_(expected, batch)
        (a,), (b,), num = loaded.tables, expected.tables, int(expected.tables[0].num_rows)
        assert torch.equal(a.ids[:num], b.ids[:num])
        torch.testing.assert_close(a.rows[:num], b.rows[:num], rtol=1e-5, atol=1e-6)  # written on another processor
        torch.testing.assert_close(loaded.params, expected.params, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loaded.dense, expected.dense, rtol=1e-5, atol=1e-6)


def test_a_run_resumes_from_it(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / OLDER.name).symlink_to(OLDER, target_is_directory=True)
    state, progress = go(tmp_path / "run", MemoryReader(deepfm_batches(5)), resume=True)
    assert (progress.step, int(state.step), int(state.dense.step)) == (5, 5, 5)


def test_what_it_lacks_is_named():
    step = deepfm_step()
    state = step.init({name: p.clone() for name, p in fresh(step).params.items()}, stats={"mean": torch.zeros(())})
    with pytest.raises(ValueError, match=r"no tensor 'stats.mean' of shape \[\]"):
        checkpoint.load(OLDER, step, state)
