"""The machine itself: it tells the faults that are there, and none that are not."""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402  behind importorskip

from tests.machine.library import MODES  # noqa: E402
from tests.machine.machine import MachineError, running  # noqa: E402

ORDERS = [(mode, seed) for mode in MODES for seed in range(3)]


def raced(kernel, grid, *args, **options):
    """The conflicts that any of the orders shows, by the memory they are in."""
    found = set()
    for mode, seed in ORDERS:
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        with running(seed=seed, mode=mode) as report:
            kernel[grid](*copies, **options)
        found |= {(r.conflict, r.space) for r in report.races}
    return found


@triton.jit
def add_without_atomics(x, N: tl.constexpr):
    tl.store(x, tl.load(x) + 1)


@triton.jit
def add_with_atomics(x, N: tl.constexpr):
    tl.atomic_add(x, 1, sem="relaxed")


def test_programs_that_share_a_number_race_and_atomics_do_not():
    x = torch.zeros(1, dtype=torch.int32)
    assert ("two plain writes", "global") in raced(add_without_atomics, (4,), x, N=1)
    assert not raced(add_with_atomics, (4,), x, N=1)
    with running(seed=1) as report:
        add_with_atomics[(50,)](x, N=1)
    assert x.item() == 50
    assert (report.kernels["add_with_atomics"].atomics, report.kernels["add_with_atomics"].hottest) == (50, 50)


@triton.jit
def compare_and_swap(x, won, N: tl.constexpr):
    k = tl.program_id(0) * N + tl.arange(0, N)
    before = tl.atomic_cas(x + k * 0, tl.full((N,), -1, tl.int32), k, sem="relaxed")
    tl.store(won + k, (before == -1).to(tl.int32))


@triton.jit
def read_and_store(x, won, N: tl.constexpr):
    k = tl.program_id(0) * N + tl.arange(0, N)
    before = tl.load(x + k * 0)
    tl.store(x + k * 0, k, mask=before == -1)
    tl.store(won + k, (before == -1).to(tl.int32))


def test_one_thread_wins_a_swap_and_several_a_test_that_stores():
    wins = {compare_and_swap: 0, read_and_store: 0}
    for (mode, seed), kernel in itertools.product(ORDERS, wins):
        x, won = torch.tensor([-1], dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
        with running(seed=seed, mode=mode) as report:
            kernel[(4,)](x, won, N=32, num_warps=1)
        wins[kernel] += int(won.sum())
        assert bool(report.races) == (kernel is read_and_store)
    assert wins[compare_and_swap] == len(ORDERS)
    assert wins[read_and_store] > 2 * len(ORDERS)


@triton.jit
def turn_around(x, y, N: tl.constexpr, HAS_BARRIER: tl.constexpr):
    k = tl.arange(0, N)
    tl.store(x + k, k)
    if HAS_BARRIER:
        tl.debug_barrier()
    tl.store(y + k, tl.load(x + (N - 1 - k)))


def test_a_missing_barrier_is_told():
    x, y = (torch.zeros(256, dtype=torch.int32) for _ in range(2))
    assert not raced(turn_around, (1,), x, y, N=256, HAS_BARRIER=True)
    found = raced(turn_around, (1,), x, y, N=256, HAS_BARRIER=False)
    assert {("a plain write, then a plain read", "global"), ("a plain read, then a plain write", "global")} <= found
    with running(seed=2) as report:
        turn_around[(1,)](x, y, N=256, HAS_BARRIER=True)
    assert y.tolist() == list(range(255, -1, -1))
    assert not report.races


@triton.jit
def copies_of_one_item(x, N: tl.constexpr, SHARED: tl.constexpr):
    k = tl.arange(0, N)
    value = tl.load(x + k) + 1
    if SHARED:
        value += tl.sum(value, axis=0)
    tl.store(x + k, value)


def test_a_load_that_only_stores_of_another_thread_use_is_not_an_access():
    """Of a tile of two items every thread loads one, two store; a sum makes all that they load matter."""
    x = torch.zeros(2)
    assert not raced(copies_of_one_item, (1,), x, N=2, SHARED=False)
    assert raced(copies_of_one_item, (1,), x, N=2, SHARED=True)


@triton.jit
def copy(x, y, first, num, N: tl.constexpr):
    k = first + tl.arange(0, N)
    tl.store(y + k, tl.load(x + k, mask=k < num), mask=k < num)


@pytest.mark.parametrize(("first", "num", "fault"), [(0, 100, ""), (0, 101, "outside"), (-3, 100, "outside")])
def test_accesses_outside_the_tensors_are_told(first, num, fault):
    memory = torch.arange(300.0)
    x, y = memory[100:200], torch.zeros(100)
    with running():
        if fault:
            with pytest.raises(MachineError, match=rf"copy, line \d+: . x 4 bytes at 0x\w+ {fault} every tensor"):
                copy[(1,)](x, y, first, num, N=128)
        else:
            copy[(1,)](x, y, first, num, N=128)
            assert torch.equal(x, y)


def test_misaligned_vectors_are_told():
    """Whoever tells the compiler that an address is a multiple of 4 items must see to it."""
    x = torch.zeros(256)
    with running():
        shifted[(1,)](x, torch.tensor(8), N=128, num_warps=1)
        with pytest.raises(MachineError, match=r"shifted, line \d+: . x 4 bytes at 0x\w+ are misaligned"):
            shifted[(1,)](x, torch.tensor(9), N=128, num_warps=1)


@triton.jit
def shifted(x, first, N: tl.constexpr):
    k = tl.arange(0, N)
    tl.store(x + tl.multiple_of(tl.load(first), 4) + k, tl.load(x + k))


@triton.jit
def wait_for_a_flag(x, flag, N: tl.constexpr):
    if tl.program_id(0) == 0:
        while tl.atomic_add(flag, 0, sem="acquire") == 0:
            pass


def test_a_loop_that_waits_for_nobody_ends():
    x, flag = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    with (
        running(limit=10**5),
        pytest.raises(MachineError, match=r"wait_for_a_flag, line .*: more than 100000 instructions"),
    ):
        wait_for_a_flag[(2,)](x, flag, N=1)


@triton.jit
def chained_sums(x, sums, states, N: tl.constexpr, SEM: tl.constexpr):
    """Each program adds its numbers to what the one before it has published."""
    program = tl.program_id(0)
    total = tl.sum(tl.load(x + program * N + tl.arange(0, N)), axis=0)
    if program > 0:
        while tl.atomic_add(states + program - 1, 0, sem="acquire") == 0:
            pass
        total += tl.load(sums + program - 1)
    tl.store(sums + program, total)
    tl.debug_barrier()
    tl.atomic_xchg(states + program, 1, sem=SEM)


@pytest.mark.parametrize(("mode", "seed"), ORDERS)
def test_programs_that_wait_for_each_other_get_there(mode, seed):
    x = torch.randint(0, 99, (20 * 64,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    sums, states = (torch.zeros(20, dtype=torch.int32) for _ in range(2))
    with running(seed=seed, mode=mode) as report:
        chained_sums[(20,)](x, sums, states, N=64, SEM="release")
    assert torch.equal(sums, x.view(20, 64).sum(1).cumsum(0).int())
    assert not report.races


def test_a_flag_that_does_not_release_publishes_nothing():
    x, sums, states = torch.ones(4 * 64, dtype=torch.int32), *(torch.zeros(4, dtype=torch.int32) for _ in range(2))
    found = raced(chained_sums, (4,), x, sums, states, N=64, SEM="relaxed")
    assert ("a plain write, then a plain read", "global") in found


@triton.jit
def watch(x, seen, ROUNDS: tl.constexpr):
    if tl.program_id(0) == 0:
        for n in range(ROUNDS):
            tl.store(x, n + 1)
    else:
        for n in range(ROUNDS):
            tl.store(seen + n, tl.load(x))


def test_plain_loads_may_be_stale_and_never_go_back():
    stale = 0
    for seed in range(10):
        x, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(40, dtype=torch.int32)
        with running(seed=seed, resident=2) as report:
            watch[(2,)](x, seen, ROUNDS=40, num_warps=1)
        assert seen.tolist() == sorted(seen.tolist())
        stale += report.kernels["watch"].stale_loads
    assert stale


def test_orders_follow_from_the_seed():
    def order(seed):
        x, won = torch.tensor([-1], dtype=torch.int32), torch.zeros(1024, dtype=torch.int32)
        with running(seed=seed):
            compare_and_swap[(32,)](x, won, N=32, num_warps=1)
        return int(won.argmax())

    assert [order(s) for s in range(8)] == [order(s) for s in range(8)]
    assert len({order(s) for s in range(8)}) > 1
