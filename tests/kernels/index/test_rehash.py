import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels.counters import new_counters
from recfx.kernels.index import find, hashing, rehash
from tests.reference import EXTREMES, MAX_INT64, MIN_INT64, id_of_hash, on_threads, reading_of

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
            assert op(slots, ids, new_counters(num_slots=num_slots, salt=salt), *reading).tolist() == [row]
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
    """Several blocks, the last of them short; the index as full as one gets, so that runs cross the ends of parts."""
    num_rows, num_slots = 7 * 2**18, 2**21
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(MIN_INT64, MAX_INT64, (num_rows,), generator=g)
    vocabularies = torch.randint(-1, 3, (num_rows,), generator=g, dtype=torch.int32)  # every fourth is freed
    written = []
    for threads in (1, 2, 3):
        slots, crowded = torch.zeros(num_slots, dtype=torch.int64), torch.tensor(0)
        on_threads(threads, rehash.rehash_, slots, crowded, ids, vocabularies, num_rows, num_slots, 3)
        written.append((slots, crowded))
    for other in written[1:]:
        assert torch.equal(written[0][0], other[0])
        assert torch.equal(written[0][1], other[1])
    used = written[0][0][written[0][0] != hashing.EMPTY]
    live = torch.nonzero(vocabularies >= 0)[:, 0]
    assert torch.equal((used & 0xFFFFFFFF).sort().values, live)
    cell = torch.arange(len(live), dtype=torch.int32)
    for v in range(3):
        mine = live[vocabularies[live] == v]
        arguments = ids, new_counters(num_slots=num_slots, salt=3), ids[mine], cell[: len(mine)]
        assert torch.equal(find.find(written[0][0], *arguments, torch.tensor([v], dtype=torch.int32)), mine.int())


@given(freed=st.lists(st.booleans(), min_size=300, max_size=300), same_home=st.booleans())
@settings(max_examples=20, deadline=None)
def test_kernel_and_definition_leave_out_freed_rows_and_count_the_crowded(freed, same_home):
    ids = torch.tensor([id_of_hash(k << 32 | 9, 0) if same_home else k for k in range(300)])
    vocabularies = torch.where(torch.tensor(freed), -1, 0).int()
    live = torch.nonzero(vocabularies == 0)[:, 0]
    for op in OPS.values():
        slots, crowded = torch.full((512,), 7), torch.tensor(-5)
        op(slots, crowded, ids, vocabularies, 300, 512, 0)
        assert torch.equal((slots[slots != hashing.EMPTY] & 0xFFFFFFFF).sort().values, live)
        assert int(crowded) == max(len(live) - hashing.RUN, 0) if same_home else int(crowded) <= 3
        found = find.find(slots, ids, new_counters(num_slots=512), *reading_of([[ids.tolist()]], [0]))
        assert torch.equal(found[live], live.int())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck():
    ids, vocabularies = torch.arange(4), torch.zeros(4, dtype=torch.int32)
    torch.library.opcheck(
        rehash.rehash_, (torch.zeros(16, dtype=torch.int64), torch.tensor(0), ids, vocabularies, 4, 16, 0)
    )
