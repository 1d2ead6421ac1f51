import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels.counters import NUM_UNIQUE, new_counters
from recfx.kernels.index.keep_trained import NO_NUMBER
from recfx.kernels.index.untouch_rows import definition, untouch_rows_

OPS = {"definition": definition, "kernel": untouch_rows_}
STEP = 6  # taken; the step in progress is the next


@st.composite
def cases(draw):
    """Rows of a window: touched by an earlier batch, newly, or only read; positions of the skipped batch."""
    num_before = draw(st.integers(0, 3))
    kinds = draw(st.lists(st.sampled_from(["old", "earlier", "new", "read"]), min_size=1, max_size=8))
    seen, inverse, earlier, new = [], [], 0, num_before
    for kind in kinds:
        if kind == "earlier" and earlier < num_before:
            inverse.append(earlier)
            seen.append((STEP + 1) << 32 | earlier)
            earlier += 1
        elif kind == "new":
            inverse.append(new)
            seen.append((STEP + 1) << 32 | new)
            new += 1
        elif kind == "read":
            inverse.append(-1)
            seen.append((STEP + 1) << 32 | NO_NUMBER)
        else:
            inverse.append(-1)
            seen.append(3 << 32 | 5)
    positions = draw(st.lists(st.integers(-2, len(kinds) - 1), max_size=20))
    return num_before, seen, inverse, positions


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@given(case=cases(), counts=st.booleans())
@settings(max_examples=60, deadline=None)
def test_only_what_the_batch_touched_newly_is_taken_back(op, case, counts):
    num_before, before, inverse, positions = case
    seen = torch.tensor(before)
    row_P = torch.tensor(positions, dtype=torch.int32)
    inverse_P = torch.tensor([inverse[p] if p >= 0 else -1 for p in positions], dtype=torch.int32)
    counters = new_counters(step=STEP, num_unique=num_before + 3)
    op(seen, counters, row_P, inverse_P, torch.tensor(num_before), torch.tensor(counts))
    assert int(counters[NUM_UNIQUE]) == num_before + (3 if counts else 0)
    for row, (was, number) in enumerate(zip(before, inverse, strict=True)):
        newly = number >= num_before or was == (STEP + 1) << 32 | NO_NUMBER
        taken_back = not counts and row in positions and newly
        assert int(seen[row]) == (STEP << 32 if taken_back else was)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    ids = torch.tensor([1, 0, -1], dtype=torch.int32), torch.tensor([1, 0, -1], dtype=torch.int32)
    of_table = torch.zeros(4, dtype=torch.int64), new_counters(step=STEP, num_unique=2)
    torch.library.opcheck(untouch_rows_, (*of_table, *ids, torch.tensor(1), torch.tensor(False)))
