"""Growth and its price: ids chosen to collide, the statistics of an index, the memory of a table in its own process."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from recfx.kernels.index import hashing
from recfx.table import Limits, copy_of, delete_, num_live, policies, stats, table
from recfx.table import functions as table_module
from recfx.table.policies import Life
from tests.reference import (
    MAX_INT64,
    MIN_INT64,
    DictTable,
    features_of,
    id_of_hash,
    mix,
    ragged,
    reading_of,
    streams,
    table_plan,
)

BATCH, LOW = 4096, 2**64 - 1


def same_place(n):
    return id_of_hash(n << 32 | 9, 0)


def same_place_other_tag(n):
    return id_of_hash(mix(n) >> 32 << 32 | 9, 0)


def finish_step(state):
    state.num_unique.zero_()
    state.step.add_(1)


def probes_of(state, row):
    """Slots looked at to find a row, one after the other as the layout is defined."""
    slots, mask, golden = state.slots.tolist(), int(state.num_slots) - 1, 0x9E3779B97F4A7C15
    id, vocabulary, salt = int(state.ids[row]), int(state.vocabularies[row]), int(state.salt) & LOW
    start, looked_at = mix(((id + (vocabulary + 1) * golden) & LOW) ^ salt), 0
    while True:
        for k in range(64):
            slot, looked_at = slots[(start + k) & mask], looked_at + 1
            assert slot != -1
            if slot & 0xFFFFFFFF == row:
                return looked_at
        start = mix((start + golden) & LOW)


@given(stream=streams(3))
@settings(max_examples=25, deadline=None)
def test_probe_lengths_are_those_of_a_walk(stream):
    t = table(table_plan(stream.vocabularies), optimizer_slots=1, seed=1, limits=Limits(max_rows=200))
    state = t.init()
    for lists in stream.batches:
        t.insert_(state, t.read(features_of(lists, spare=stream.spare)))
        finish_step(state)
    if num_live(state) > 2:
        delete_(state, torch.tensor([1]))
    n = int(state.num_rows)
    expected = [probes_of(state, row) for row in range(n) if state.vocabularies[row] >= 0]
    got = stats(state)
    assert got.max_probe == max(expected, default=0)
    if expected:
        assert got.mean_probe == pytest.approx(sum(expected) / len(expected))
    assert (got.size, got.load) == (len(expected), len(expected) / int(state.num_slots))


@pytest.mark.parametrize("make", [same_place, same_place_other_tag])
def test_probe_lengths_past_the_first_run_are_those_of_a_walk(make):
    t = table(table_plan([0]), optimizer_slots=1, seed=1, limits=Limits(max_rows=448))
    state = t.init()
    t.insert_(state, t.read(features_of([[[make(n) for n in range(200)]]])))
    expected = [probes_of(state, row) for row in range(200)]
    got = stats(state)
    assert got.max_probe == max(expected) > hashing.RUN
    assert got.mean_probe == pytest.approx(sum(expected) / 200)


@pytest.mark.parametrize("make", [same_place, same_place_other_tag])
def test_ids_that_all_hash_to_one_place_get_the_dicts_rows_under_another_salt(make, monkeypatch):
    monkeypatch.setattr(table_module, "FIRST_SLOTS", 512)
    t, oracle, rng = (
        table(table_plan([0]), optimizer_slots=1, seed=1, limits=Limits(max_rows=4096)),
        DictTable(4096),
        random.Random(0),
    )
    state, salts = t.init(), []
    for number in range(12):
        lists = [[[make(n) for n in range(250 * number, 250 * number + 250)] + [rng.randint(0, 99)]]]
        t.grow_(state, 251)
        found = t.insert_(state, t.read(features_of(lists)))
        assert (found.row.tolist(), found.inverse.tolist()) == oracle.insert(reading_of(lists, [0]))
        oracle.next_step()
        finish_step(state)
        salts.append(int(state.salt))
        assert t.find(state, t.read(features_of(lists))).row.tolist() == found.row.tolist()
    assert salts[0] == 0
    assert len(set(salts[1:])) == 1, "one salt is enough: it is not made anew at every step"
    assert stats(state).mean_probe < 8
    assert stats(state).load == num_live(state) / int(state.num_slots) > 0.5


def test_candidates_are_counted_on_under_another_salt(monkeypatch):
    """Ids that collide get rows at once and bring the salt; the others wait for their third occurrence."""
    monkeypatch.setattr(table_module, "FIRST_SLOTS", 512)
    life = Life(admit=lambda count, id, vocabulary, step: (count >= 3) | (id < 0) | (id > 49), candidates=2000)
    t = table(table_plan([0]), optimizer_slots=1, seed=1, limits=Limits(max_rows=4096), life=life)
    state, salts, admitted = t.init(), [], []
    for number in range(4):
        chosen = [same_place(n) for n in range(250 * number, 250 * number + 250)]
        t.grow_(state, 300)
        found = t.insert_(state, t.read(features_of([[[*chosen, *range(50)]]])))
        finish_step(state)
        salts.append(int(state.salt))
        admitted.append((found.row[250:] >= 0).tolist())
    assert salts[0] == 0 != salts[1]
    assert admitted == [[False] * 50, [False] * 50, [True] * 50, [True] * 50]


def fastest_s(work, prepare, repeats=7):
    seconds = []
    for _ in range(repeats):
        argument = prepare()
        begun = time.perf_counter()
        work(argument)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


@pytest.mark.parametrize("make", [same_place, same_place_other_tag])
@pytest.mark.parametrize("life", [None, Life(admit=policies.at_least(9), candidates=2**16)])
def test_no_step_takes_ten_times_as_long_when_ids_collide(make, life):
    """The worst step is the one before the salt changes; even there an id costs the others one run. Candidates, whose
    index no salt saves, cost no more."""
    torch.set_num_threads(1)
    rng = random.Random(0)
    usual_ids = [rng.randint(MIN_INT64, MAX_INT64) for _ in range(4 * BATCH)]
    chosen_ids = [make(n) for n in range(4 * BATCH)]
    t = table(table_plan([0]), optimizer_slots=2, seed=1, limits=Limits(max_rows=2**16), life=life)

    def steps(ids):
        state, took = t.init(), []
        for begin in range(0, len(ids), BATCH):
            features = {"f0": ragged([[i] for i in ids[begin : begin + BATCH]])}
            t.grow_(state, BATCH)
            took.append(fastest_s(lambda s, f=features: t.insert_(s, t.read(f)), lambda: copy_of(state)))
            t.insert_(state, t.read(features))
            finish_step(state)
            assert stats(state).max_probe <= 3 * hashing.RUN
        return took, int(state.salt)

    (usual, salt), (chosen, other_salt) = steps(usual_ids), steps(chosen_ids)
    print(
        f"ms a step: {1e3 * min(usual):.2f} to {1e3 * max(usual):.2f}, where ids collide up to {1e3 * max(chosen):.2f}"
    )
    assert (salt, other_salt != 0) == (0, life is None)
    assert max(chosen) < 10 * min(usual)


# Two processes that share nothing with this one, so that their peak is theirs. Printed: bytes.
GROWS = """
import json, resource, sys
import torch
from recfx.table import Limits, grow_, num_rows_bytes, table
from tests.reference import table_plan
from recfx.types import Ragged

num_rows, batch = 3 * 2**20, 2**16  # 2**22 slots at load 0.75
t = table(table_plan([0], dims=(7, 1)), optimizer_slots=2, seed=1, limits=Limits(max_rows=2**24, max_unique=batch))
offsets = torch.tensor([0, batch], dtype=torch.int32)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def peak():
    with open("/proc/self/status") as file:  # ru_maxrss begins with the most its parent ever held
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

def insert(state, first):
    t.grow_(state, batch)
    t.insert_(state, t.read({"f0": Ragged(torch.arange(first, first + batch) * 0x9E3779B97F4A7C15, offsets)}))
    state.num_unique.zero_()
    state.step.add_(1)

insert(t.init(), 0)
state = t.init()
before = resident()
for first in range(0, num_rows, batch):
    insert(state, first)
full, peak_full = resident() - before, peak() - before
load = num_rows / int(state.num_slots)
grow_(state, 1)
print(json.dumps(dict(
    num_rows=num_rows, load=load, rows=num_rows * state.rows.stride(0) * 4, full=full, peak_full=peak_full,
    doubled=resident() - before, peak_doubled=peak() - before, new_slots=int(state.num_slots) * 4,
)))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_growth_copies_no_row_and_a_row_costs_little_beside_itself():
    done = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True, check=True)
    got = json.loads(done.stdout)
    rows, n, slack = got["rows"], got["num_rows"], 24 * 2**20  # a huge page for each tensor, the allocator's own
    beside = {name: (got[name] - rows) / n for name in ("full", "peak_full", "doubled", "peak_doubled")}
    print(f"bytes a row beside its {rows // n}: { ({name: round(value, 1) for name, value in beside.items()}) }")
    assert got["load"] == 0.75
    assert beside["full"] <= 48
    assert beside["peak_full"] * n <= 48 * n + slack
    assert beside["peak_doubled"] * n <= (35 + 11) * n + slack, "the index doubles; nothing else is there twice"
    assert got["doubled"] - got["full"] <= got["new_slots"] + slack
    assert rows > 3 * slack, "a copy of the rows could not hide"
