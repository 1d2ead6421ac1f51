"""Statements of PTX as the machine's instructions: registers numbered, constants in registers, labels resolved.

A predicate that guards is its register + 1, or the negative of that where it is to be false.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

from tests.machine.library import Instruction, function_numbers
from tests.machine.ptx import SIZES, Kernel, Statement, UnknownInstructionError
from tests.machine.values import hoistable, uses_of_loads

__all__ = ["Kind", "Program"]

Kind = IntEnum(
    "Kind",
    "ARITHMETIC SPECIAL PARAMETER LOAD STORE ATOMIC BRANCH BARRIER SHUFFLE VOTE REDUCE LOAD_MATRIX STORE_MATRIX "
    "WARP_BARRIER EXIT",
    start=0,
)
GLOBAL, SHARED = 0, 1
STRONG, ACQUIRE, RELEASE = 1, 2, 4
ORDERS = {"relaxed": STRONG, "volatile": STRONG, "acquire": STRONG | ACQUIRE, "release": STRONG | RELEASE,
          "acq_rel": STRONG | ACQUIRE | RELEASE}  # fmt: skip
COMBINES = {name: n for n, name in enumerate(["add", "min", "max", "and", "or", "xor", "exch", "cas"])}
ADD_FLOAT = 8
EXCHANGES, QUESTIONS = (
    {name: n for n, name in enumerate(names.split())} for names in ("bfly idx up down", "ballot any all")
)
JOINS = {"and": 1, "or": 2, "xor": 3}
SPECIALS = [*(f"%{name}.{axis}" for name in ("tid", "ctaid", "nctaid") for axis in "xyz"), "%laneid", "%ntid.x",
            "%ntid.y", "%ntid.z", "%warpid"]  # fmt: skip
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
# What does not change a result, or by less than the machine is to show: it rounds where the device may approximate.
IGNORED = {"rn", "ftz", "approx", "full", "sync", "aligned", "uni", "to"}
MODIFIERS = {"sys", "gpu", "cta", "nc", "weak", "v2", "v4", "L1::evict_last", "L1::evict_first", "L1::no_allocate"}


class Program:
    """A kernel for the machine.

    `registers`: what a thread's hold when it begins. `parameters`: type, first byte and name of each. `units`: bytes of
    the smallest item that is accessed in global and in shared memory.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.registers: list[int] = []
        self.numbers: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        self.places: list[tuple[int, int]] = []
        self.labels: dict[str, int] = {}
        self.units = [4, 4]
        self.parameters: list[tuple[str, int]] = []
        self.parameter_bytes = 0
        self.offsets: dict[str, int] = {}
        for type_, name in kernel.params:
            size = SIZES[type_]
            begin = -(-self.parameter_bytes // size) * size
            self.parameters.append((type_, begin))
            self.offsets[name], self.parameter_bytes = begin, begin + size
        jumps = [jump for s in kernel.statements if (jump := self.add(s))]
        self.add(Statement("ret", []))
        for instruction, label in jumps:
            instruction.immediate = self.labels[label]
        jumping = [n for n, i in enumerate(self.instructions) if i.kind in (Kind.BRANCH, Kind.EXIT)]
        starts = {0, *self.labels.values(), *(n + 1 for n in jumping)} - {len(self.instructions)}
        constants = {n for name, n in self.numbers.items() if name.startswith("#")}
        early = hoistable(self.instructions, constants)
        self.uses, hoisted = uses_of_loads(self.instructions, starts, early)
        self.code = (Instruction * len(self.instructions))(*self.instructions)
        self.constants = (ctypes.c_uint64 * len(self.registers))(*self.registers)
        self.uses_array = (ctypes.c_int32 * (len(self.uses) + 1))(*self.uses)
        self.hoisted = (ctypes.c_int32 * (len(hoisted) + 1))(*hoisted)
        self.num_hoisted = len(hoisted)

    def source(self, number: int, of_kernel: str) -> str:
        """Where instruction `number` comes from, and what is written there; `of_kernel` is the kernel's file.

        The compiler's cache may give a kernel that was compiled in another folder.
        """
        file, line = self.places[number]
        path = self.kernel.files.get(file, "")
        own = Path(of_kernel).with_name(Path(path).name)
        return source_line(own if own.is_file() else Path(path), line)

    def add(self, s: Statement) -> tuple[Instruction, str] | None:
        """Appends a statement's instruction; that and a label where it is a jump."""
        if not s.name:
            self.labels[s.operands[0]] = len(self.instructions)
            return None
        parts = s.name.split(".")
        special = getattr(self, f"add_{parts[0]}", None)
        try:
            i = special(parts, s.operands) if special else self.arithmetic(parts, s.operands)
        except (KeyError, ValueError, StopIteration, IndexError) as why:
            text = f"{s.name} {', '.join(s.operands)}"
            raise UnknownInstructionError(
                f"{self.kernel.name}: got `{text}`, expected an instruction that the machine has"
            ) from why
        i.guard, i.line = self.predicate(s.guard), s.place[1]
        self.instructions.append(i)
        self.places.append(s.place)
        return (i, s.operands[0]) if i.kind == Kind.BRANCH else None

    def make(self, kind: Kind, to: Sequence[int] = (), from_: Sequence[int] = (), **fields: int) -> Instruction:
        i = Instruction(kind=kind, **{"count": 1, **fields})
        i.to[:] = [*to, *[-1] * (4 - len(to))]
        i.from_[:] = [*from_, *[-1] * (6 - len(from_))]
        i.used_if[:] = [-1] * 4
        return i

    def predicate(self, word: str) -> int:
        if not word:
            return 0
        number = self.register(word.removeprefix("!")) + 1
        return -number if word.startswith("!") else number

    def register(self, name: str, value: int = 0) -> int:
        if name not in self.numbers:
            self.numbers[name] = len(self.registers)
            self.registers.append(value & (2**64 - 1))
        return self.numbers[name]

    def operand(self, word: str) -> int:
        """Register of a name, or one that holds the constant."""
        if word == "_":
            return -1
        if word.startswith(("%", "tmp")) or "@" in word:
            if word.startswith("%SP") or word in SPECIALS:
                raise KeyError(word)
            return self.register(word)
        if word in self.offsets:
            value = self.offsets[word]
        elif word == "global_smem":
            value = 0
        elif word in ("true", "false"):
            value = int(word == "true")
        elif word[:2] in ("0f", "0d", "0F", "0D"):
            value = int(word[2:], 16)
        else:
            value = int(word.rstrip("U"), 0)
        return self.register(f"#{value}", value)

    def several(self, word: str) -> list[int]:
        return [self.operand(w.strip()) for w in word.strip("{}").split(",")]

    def address(self, word: str) -> tuple[int, int]:
        """Register of the base, and what is added to it."""
        base, sign, offset = re.fullmatch(r"\[\s*([\w%$@]+)\s*(?:([+-])\s*(-?\w+)\s*)?\]", word).groups()  # type: ignore[union-attr]
        return self.operand(base), int(offset or "0", 0) * (-1 if sign == "-" else 1)

    def arithmetic(self, parts: list[str], operands: list[str]) -> Instruction:
        words = [w for w in parts if w not in IGNORED]
        if words[0] == "setp":
            return self.comparison(words, operands)
        words = [f"u{w[1:]}" if re.fullmatch(r"b\d+", w) else w for w in words]
        if words[0] == "selp" or (words[0] == "mov" and words[-1] != "pred"):
            words[-1] = f"u{words[-1][1:]}"
        if words[-1] == "pred" and words[0] != "not":
            words[-1] = "u8"
        if words[0] == "mul" and words[-1][0] == "f":
            words = [words[0], words[-1]]
        to, *from_ = operands
        if words[0] == "lop3":
            *from_, table = from_
            function = function_numbers()[".".join(words)]
            return self.make(
                Kind.ARITHMETIC, [self.operand(to)], self.all(from_), function=function, immediate=int(table, 0)
            )
        return self.make(
            Kind.ARITHMETIC, [self.operand(to)], self.all(from_), function=function_numbers()[".".join(words)]
        )

    def all(self, words: Sequence[str]) -> list[int]:
        return [self.operand(w) for w in words]

    def comparison(self, words: list[str], operands: list[str]) -> Instruction:
        _, how, *joins, type_ = words
        name = f"setp.{UNSIGNED.get(how, how)}.{type_.replace('b', 'u')}"
        to, *from_ = operands
        flag = JOINS[joins[0]] if joins else 0
        return self.make(
            Kind.ARITHMETIC, self.all(to.split("|")), self.all(from_), function=function_numbers()[name], flag=flag
        )

    def add_mov(self, parts: list[str], operands: list[str]) -> Instruction:
        to, from_ = operands
        if from_ in SPECIALS:
            return self.make(Kind.SPECIAL, [self.operand(to)], function=SPECIALS.index(from_))
        for word, name in ((to, "unpack"), (from_, "pack")):
            if word.startswith("{"):
                count = len(word.split(","))
                fields = {"count": count, "size": SIZES[parts[-1]] // count, "function": function_numbers()[name]}
                return self.make(Kind.ARITHMETIC, self.several(to), self.several(from_), **fields)
        return self.arithmetic(parts, operands)

    def access(self, parts: list[str]) -> dict[str, int]:
        """What the modifiers of an access say of its items."""
        spaces = [p for p in parts if p.split("::")[0] in ("global", "shared", "param", "local", "const")]
        space = {"global": GLOBAL, "shared": SHARED}[spaces[0].split("::")[0] if spaces else "global"]
        type_, order = parts[-1], next((ORDERS[p] for p in parts if p in ORDERS), 0)
        known = {*ORDERS, *COMBINES, *MODIFIERS, *spaces, "noftz"}
        if any(p not in known for p in parts[1:-1]):
            raise KeyError(parts)
        count = 4 if "v4" in parts else 2 if "v2" in parts else 1
        self.units[space] = min(self.units[space], SIZES[type_])
        return {"space": space, "order": order, "size": SIZES[type_], "count": count, "is_signed": type_[0] == "s"}

    def add_ld(self, parts: list[str], operands: list[str]) -> Instruction:
        to, (base, offset) = self.several(operands[0]), self.address(operands[1])
        if "param" in parts:
            count = 4 if "v4" in parts else 2 if "v2" in parts else 1
            fields = {"size": SIZES[parts[-1]], "is_signed": parts[-1][0] == "s", "count": count}
            return self.make(Kind.PARAMETER, to, [base], immediate=offset, **fields)
        return self.make(Kind.LOAD, to, [base], immediate=offset, **self.access(parts))

    def add_st(self, parts: list[str], operands: list[str]) -> Instruction:
        base, offset = self.address(operands[0])
        return self.make(Kind.STORE, [], [base, *self.several(operands[1])], immediate=offset, **self.access(parts))

    def add_atom(self, parts: list[str], operands: list[str]) -> Instruction:
        to, where, *given = operands
        base, offset = self.address(where)
        function = next(COMBINES[p] for p in parts if p in COMBINES)
        if parts[-1][0] == "f":
            function = {COMBINES["add"]: ADD_FLOAT}[function]
        values = [n for word in given for n in self.several(word)]
        fields = self.access(parts) | {"function": function, "immediate": offset}
        fields["order"] |= STRONG
        return self.make(Kind.ATOMIC, self.several(to) if to else [], [base, *values], **fields)

    def add_red(self, parts: list[str], operands: list[str]) -> Instruction:
        return self.add_atom(parts, ["", *operands])

    def add_bra(self, parts: list[str], operands: list[str]) -> Instruction:
        return self.make(Kind.BRANCH)

    def add_bar(self, parts: list[str], operands: list[str]) -> Instruction:
        if "warp" in parts:
            return self.make(Kind.WARP_BARRIER)
        if operands != ["0"]:
            raise ValueError("a barrier of some of the threads")
        return self.make(Kind.BARRIER)

    add_barrier = add_bar

    def add_ret(self, parts: list[str], operands: list[str]) -> Instruction:
        return self.make(Kind.EXIT)

    add_exit = add_ret

    def add_shfl(self, parts: list[str], operands: list[str]) -> Instruction:
        to, *from_ = operands
        function = next(EXCHANGES[p] for p in parts if p in EXCHANGES)
        return self.make(Kind.SHUFFLE, self.all(to.split("|")), self.all(from_), function=function)

    def add_vote(self, parts: list[str], operands: list[str]) -> Instruction:
        to, asked, mask = operands
        function, flag = next(QUESTIONS[p] for p in parts if p in QUESTIONS), int(asked.startswith("!"))
        return self.make(
            Kind.VOTE, [self.operand(to)], self.all([asked.removeprefix("!"), mask]), function=function, flag=flag
        )

    def add_redux(self, parts: list[str], operands: list[str]) -> Instruction:
        to, *from_ = operands
        function = next(COMBINES[p] for p in parts if p in COMBINES)
        return self.make(
            Kind.REDUCE, [self.operand(to)], self.all(from_), function=function, size=4, is_signed=parts[-1] == "s32"
        )

    def matrices(self, kind: Kind, parts: list[str], where: str, held: str) -> Instruction:
        if "m8n8" not in parts or parts[-1] != "b16":
            raise KeyError(parts)
        base, offset = self.address(where)
        items = self.several(held)
        self.units[SHARED] = min(self.units[SHARED], 4)
        fields = {"space": SHARED, "count": len(items), "flag": int("trans" in parts), "immediate": offset}
        to, from_ = (items, []) if kind == Kind.LOAD_MATRIX else ([], items)
        return self.make(kind, to, [base, *from_], **fields)

    def add_ldmatrix(self, parts: list[str], operands: list[str]) -> Instruction:
        return self.matrices(Kind.LOAD_MATRIX, parts, operands[1], operands[0])

    def add_stmatrix(self, parts: list[str], operands: list[str]) -> Instruction:
        return self.matrices(Kind.STORE_MATRIX, parts, operands[0], operands[1])


def source_line(path: Path, line: int) -> str:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return f"{path.name}:{line} `{lines[line - 1].strip() if 0 < line <= len(lines) else ''}`"
