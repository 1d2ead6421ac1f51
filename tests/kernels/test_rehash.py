import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels import find, hashing, rehash
from tests.reference import EXTREMES, MAX_INT64, MIN_INT64, on_threads, reading_of

OPS = {"definition": rehash.definition, "kernel": rehash.rehash_}
KEYS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(EXTREMES) | st.integers(MIN_INT64, MAX_INT64)),
    unique=True,
    max_size=28,
)


def check_index(slots, num_slots, keys, salt):
    ids = torch.tensor([i for _, i in keys] or [0])
    for row, (v, i) in enumerate(keys):
        reading = reading_of([[[i]]], [v])
        for op in (find.definition, find.find):
            assert op(slots, ids, torch.tensor(num_slots), torch.tensor(salt), *reading).tolist() == [row]
    assert int((slots[:num_slots] != hashing.EMPTY).sum()) == len(keys)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@given(keys=KEYS, salt=st.sampled_from([0, 1, -1, MIN_INT64]), num_slots=st.sampled_from([32, 64]))
@settings(max_examples=40, deadline=None)
def test_every_row_is_found_and_nothing_else_is_written(op, keys, salt, num_slots):
    slots = torch.full((80,), 7)  # whatever the old index held
    ids = torch.tensor([i for _, i in keys] + [5])
    vocabularies = torch.tensor([v for v, _ in keys] + [0], dtype=torch.int32)
    op(slots, torch.tensor(5), ids, vocabularies, len(keys), num_slots, salt)
    check_index(slots, num_slots, keys, salt)
    assert (slots[num_slots:] == 7).all()


def test_colliding_keys_keep_their_rows():
    """Keys that all hash to the last slot wrap around to the first ones."""
    ids = torch.arange(100_000)
    hash = hashing.hash_id(ids, torch.zeros(100_000), torch.tensor(0))
    same = ids[(hash & 15) == 15][:12]
    for op in OPS.values():
        slots = torch.empty(16, dtype=torch.int64)
        op(slots, torch.tensor(0), same, torch.zeros(12, dtype=torch.int32), 12, 16, 0)
        check_index(slots, 16, [(0, int(i)) for i in same], 0)


def test_one_and_two_threads_write_the_same_bytes():
    ids = torch.randint(MIN_INT64, MAX_INT64, (5000,), generator=torch.Generator().manual_seed(0))
    written = []
    for threads in (1, 2):
        slots = torch.zeros(8192, dtype=torch.int64)
        rest = torch.tensor(0), ids, torch.zeros(5000, dtype=torch.int32), 5000, 8192, 3
        on_threads(threads, rehash.rehash_, slots, *rest)
        written.append(slots)
    assert torch.equal(*written)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    ids, vocabularies = torch.arange(4), torch.zeros(4, dtype=torch.int32)
    torch.library.opcheck(
        rehash.rehash_, (torch.zeros(16, dtype=torch.int64), torch.tensor(0), ids, vocabularies, 4, 16, 0)
    )
