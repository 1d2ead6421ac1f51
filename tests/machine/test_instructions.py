"""What the machine computes: instructions against Python, and what threads compute together against torch."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402  behind importorskip

from tests.machine import machine  # noqa: E402
from tests.machine.machine import MachineError, running  # noqa: E402
from tests.machine.program import Program  # noqa: E402
from tests.machine.ptx import UnknownInstructionError, parse  # noqa: E402


@triton.jit
def last_odd(a, b):
    return tl.where(b & 1 == 1, b, a)


@triton.jit
def collective(x, y, N: tl.constexpr):
    k = tl.arange(0, N)
    v = tl.load(x + k)
    tl.store(y + k, tl.sort(v))
    tl.store(y + N + k, tl.cumsum(v, 0))
    tl.store(y + 2 * N + k, tl.associative_scan(v, 0, last_odd))
    tl.store(y + 3 * N + k, k * 0 + tl.max(v, 0))
    tl.store(y + 4 * N + k, k * 0 + tl.argmin(v, 0))
    tl.store(y + 5 * N + k, tl.sum(v, 0).to(v.dtype) + k * 0)
    tl.store(y + 6 * N + k, tl.histogram(v.to(tl.int32) & (N - 1), N))
    square = tl.reshape(v, (N // 16, 16))
    tl.store(y + 7 * N + tl.reshape(k, (16, N // 16)), tl.trans(square))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16], ids=str)
@pytest.mark.parametrize(("num", "warps"), [(32, 1), (256, 4), pytest.param(1024, 4, marks=pytest.mark.slow)])
def test_what_threads_compute_together(dtype, num, warps):
    x = torch.randint(-9, 999, (num,), generator=torch.Generator().manual_seed(num)).to(dtype)
    y = torch.zeros(8 * num, dtype=dtype)
    with running(seed=num) as report:
        collective[(1,)](x, y, N=num, num_warps=warps)
    scan = list(itertools.accumulate(x.tolist(), lambda a, b: b if b % 2 else a))
    expected = [
        x.sort().values, x.cumsum(0), torch.tensor(scan), x.max().expand(num), x.argmin().expand(num),
        x.sum().expand(num), torch.bincount(x.long() & (num - 1), minlength=num), x.view(num // 16, 16).T.reshape(-1),
    ]  # fmt: skip
    for got, right in zip(y.view(8, num), expected, strict=True):
        assert torch.equal(got, right.to(dtype))
    assert not report.races


@triton.jit
def floats(x, y, z, N: tl.constexpr):
    k = tl.arange(0, N)
    v = tl.load(x + k)
    tl.store(y + k, tl.sigmoid(v))
    tl.store(y + N + k, tl.exp(v))
    tl.store(y + 2 * N + k, tl.log(tl.abs(v)))
    tl.store(y + 3 * N + k, tl.div_rn(v, 3.0))
    tl.store(y + 4 * N + k, tl.sqrt_rn(tl.abs(v)))
    tl.store(y + 5 * N + k, tl.fma(v, v, v))
    tl.store(y + 6 * N + k, tl.floor(v) + tl.minimum(v, 1.0) - tl.maximum(v, -1.0))
    w = v.to(tl.float64)
    tl.store(z + k, w * w / 3 + tl.sqrt(tl.abs(w)))
    tl.store(z + N + k, tl.exp(w))
    tl.store(z + 2 * N + k, (v * 1e6).to(tl.int32).to(tl.float64) + (v * 1e12).to(tl.int64).to(tl.float64))


def test_floats_are_numpy_s():
    x = torch.cat([torch.randn(120, generator=torch.Generator().manual_seed(0)) * 4, torch.tensor([0.5, -7.0] * 4)])
    y, z = torch.zeros(7, 128), torch.zeros(3, 128, dtype=torch.float64)
    with running():
        floats[(1,)](x, y, z, N=128)
    w = x.double()
    million, billions = (x * 1e6).trunc().double(), (x * 1e12).trunc().double()
    of_floats = [
        x.sigmoid(), x.exp(), x.abs().log(), x / 3, x.abs().sqrt(), torch.addcmul(x, x, x),
        x.floor() + x.clamp(max=1) - x.clamp(min=-1),
    ]  # fmt: skip
    torch.testing.assert_close(y, torch.stack(of_floats), rtol=2e-6, atol=1e-6)
    assert torch.equal(y[3:5], torch.stack(of_floats[3:5]))
    torch.testing.assert_close(z, torch.stack([w * w / 3 + w.abs().sqrt(), w.exp(), million + billions]))


HEAD = """.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0)
.reqntid 32
{
"""


def execute(code: str) -> int:
    """What one warp stores as u64 at %x."""
    ptx = f"{HEAD}ld.param.b64 %x, [k_param_0];\n{code}ret;\n}}\n"
    compiled = SimpleNamespace(asm={"ptx": ptx}, metadata=SimpleNamespace(name="k", num_warps=1, shared=0))
    order = {"mode": 0, "stale": 0, "resident": 1, "seed": 0, "limit": 10**4}
    memory = torch.zeros(1, dtype=torch.int64)
    spans = machine.memory_of([memory])
    machine.execute(machine.Report(), compiled, "", [("*i64", memory)], (1, 1, 1), spans, order)
    return int(memory) % 2**64


def evaluated(name: str, kinds: list[str], result: str, numbers: list[int]) -> int:
    """One instruction on constants."""
    words = "".join(f"mov.b{k[1:]} %a{n}, {v};\n" for n, (k, v) in enumerate(zip(kinds, numbers, strict=True)))
    operands = ", ".join(f"%a{n}" for n in range(len(kinds)))
    if result == "pred":
        return execute(f"{words}{name} %p, {operands};\nselp.b64 %r, 1, 0, %p;\nst.global.b64 [%x + 0], {{ %r }};\n")
    return execute(f"{words}{name} %r, {operands};\nst.global.b{result[1:]} [%x + 0], {{ %r }};\n")


def signed(value: int, bits: int) -> int:
    return (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


BINARY = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b, "min": min, "max": max,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "div": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "rem": lambda a, b: abs(a) % abs(b) * (1 if a >= 0 else -1),
}  # fmt: skip
COMPARE = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("type_", ["u16", "u32", "u64", "s16", "s32", "s64"])
def test_integer_instructions_are_python_s(type_):
    rng, bits = random.Random(type_), int(type_[1:])
    read = (lambda v: signed(v, bits)) if type_[0] == "s" else (lambda v: v)
    edges = [0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1]
    pairs = [*itertools.product(edges, edges), *((rng.getrandbits(bits), rng.getrandbits(bits)) for _ in range(3))]
    for a, b in rng.sample(pairs, 9):
        x, y = read(a), read(b)
        for name, function in BINARY.items():
            if name in ("div", "rem") and y == 0:
                continue
            spelled = f"{name}.{'b' + type_[1:] if name in ('and', 'or', 'xor') else type_}"
            assert evaluated(spelled, [type_] * 2, type_, [a, b]) == function(x, y) % 2**bits, (spelled, a, b)
        for name, function in COMPARE.items():
            assert evaluated(f"setp.{name}.{type_}", [type_] * 2, "pred", [a, b]) == function(x, y), (name, a, b)
        by = b % (bits + 9)
        assert evaluated(f"shr.{type_}", [type_, "u32"], type_, [a, by]) == (x >> by) % 2**bits
        assert evaluated(f"shl.b{bits}", [type_, "u32"], type_, [a, by]) == (x << by) % 2**bits
        if bits > 16:
            assert evaluated(f"mul.hi.{type_}", [type_] * 2, type_, [a, b]) == (x * y >> bits) % 2**bits
        if bits == 32:
            wide = f"{type_[0]}64"
            assert evaluated(f"mul.wide.{type_}", [type_] * 2, wide, [a, b]) == x * y % 2**64
            assert evaluated(f"mad.wide.{type_}", [type_] * 2 + [wide], wide, [a, b, 77]) == (x * y + 77) % 2**64
            assert evaluated(f"cvt.{wide}.{type_}", [type_], wide, [a]) == x % 2**64
            begin, length = a % 40, b % 40
            cut = (x >> begin) % 2**length if length < 32 else x >> begin
            if type_ == "u32":
                assert evaluated("bfe.u32", ["u32"] * 3, "u32", [a, begin, length]) == cut % 2**32


@pytest.mark.parametrize(
    ("name", "numbers", "result"),
    [
        ("prmt.b32", [0x33221100, 0x77665544, 0x7531], 0x77553311),
        ("prmt.b32", [0x33221180, 0x77665544, 0x8888], 0xFFFFFFFF),
        ("shf.l.wrap.b32", [0x80000001, 0x00000002, 4], 0x28),
        ("shf.r.wrap.b32", [0x80000001, 0x00000002, 4], 0x28000000),
        ("popc.b32", [0xF0F0], 8),
        ("clz.b32", [0x0000FFFF], 16),
        ("brev.b32", [0x1], 0x80000000),
        ("bfi.b32", [0xAB, 0xFFFFFFFF, 8, 8], 0xFFFFABFF),
        ("bfe.s32", [0x00000F00, 8, 4], 0xFFFFFFFF),
        ("not.b32", [0xFF], 0xFFFFFF00),
        ("neg.s32", [5], 0xFFFFFFFB),
        ("abs.s32", [0xFFFFFFFB], 5),
        ("add.f32", [0x3F800000, 0x40000000], 0x40400000),
        ("fma.rn.f32", [0x3F800000, 0x40000000, 0x3F800000], 0x40400000),
        ("max.f32", [0x7FC00000, 0x40000000], 0x40000000),
        ("cvt.rzi.s32.f32", [0xC0200000], 0xFFFFFFFE),
        ("cvt.rni.s32.f32", [0x40200000], 2),
        ("cvt.rzi.s32.f32", [0x7F800000], 0x7FFFFFFF),
        ("cvt.rzi.s32.f32", [0x7FC00000], 0),
        ("cvt.rn.f32.s32", [0xFFFFFFFE], 0xC0000000),
    ],
)
def test_other_instructions_have_the_results_of_the_manual(name, numbers, result):
    assert evaluated(name, ["u32"] * len(numbers), "u32", numbers) == result


def test_an_instruction_that_the_machine_lacks_is_named():
    with pytest.raises(UnknownInstructionError, match=r"k: got `wgmma\.fence\.sync\.aligned %r`, expected an instr"):
        Program(parse(f"{HEAD}wgmma.fence.sync.aligned %r;\nret;\n}}\n"))
    with pytest.raises(UnknownInstructionError, match=r"got `mul\.f16 %a, %b, %c`"):
        Program(parse(f"{HEAD}mul.f16 %a, %b, %c;\nret;\n}}\n"))


def test_threads_that_wait_at_different_places_are_a_deadlock():
    """Half of a warp waits for all threads, the other half for the warp."""
    code = """mov.u32 %t, %tid.x;
setp.lt.u32 %p, %t, 16;
@%p bra $A;
.loc 1 7 0
bar.sync 0;
ret;
$A:
.loc 1 9 0
bar.warp.sync -1;
ret;
"""
    with pytest.raises(
        MachineError, match="There wait 16 threads of program 0 at line 7; 16 threads of program 0 at line 9"
    ):
        execute(code)
