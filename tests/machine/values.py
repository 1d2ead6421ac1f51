"""Which loaded values can matter: those that reach more than stores which their thread does not make.

Where a tile has fewer items than a program has threads, several threads hold a copy of an item; each loads it and one
stores the result. What the others load reaches stores alone whose predicate is false for them, so no other thread's
write can change what they do: such a load is not one of two accesses of a race.
"""

from __future__ import annotations

import functools
import operator
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence

from tests.machine.library import Instruction

__all__ = ["hoistable", "uses_of_loads"]

ARITHMETIC, SPECIAL, PARAMETER, LOAD, STORE, ATOMIC, BRANCH = range(7)
EXIT = 14
Sinks = dict[int, set[int] | None]  # predicates of the stores that a register reaches; None: it reaches something else


def registers(of: Sequence[int]) -> list[int]:
    return [r for r in of if r >= 0]


def definitions(code: Sequence[Instruction]) -> dict[int, list[int]]:
    found = defaultdict(list)
    for n, i in enumerate(code):
        for r in registers(i.to):
            found[r].append(n)
    return found


def hoistable(code: Sequence[Instruction], constants: set[int]) -> dict[int, list[int]]:
    """Registers that are the same throughout a thread, and the instructions that make them of its number, in order."""
    known: dict[int, list[int]] = {r: [] for r in constants}
    defined = definitions(code)
    for n, i in enumerate(code):  # a definition comes before its uses, in the text as well
        to = registers(i.to)
        if i.kind <= PARAMETER and i.guard == 0 and to and all(len(defined[r]) == 1 for r in to):
            needs = registers(i.from_)
            if all(r in known for r in needs):
                making = sorted({n, *(m for r in needs for m in known[r])})
                known |= dict.fromkeys(to, making)
    return known


def sinks(code: Sequence[Instruction]) -> Sinks:
    """Of each register, whatever the order of instructions: more than is true, never less.

    A register that is computed in several places may hold a value of an earlier round of a loop: it counts as anything.
    """
    reached: Sinks = defaultdict(set)
    flows = defaultdict(set)  # from a register to those that it comes from
    for i in code:
        from_, held = registers(i.from_), []
        if i.kind == ARITHMETIC:
            for t in registers(i.to):
                flows[t].update(from_)
        elif i.kind == STORE and i.guard:
            held = from_[:1]
            for r in from_[1:]:
                reached[r] = None if (so_far := reached[r]) is None else so_far | {i.guard}
        else:
            held = from_
        for r in [*held, *predicate(i.guard)]:
            reached[r] = None
    for r, where in definitions(code).items():
        if len(where) > 1 and not any(code[n].kind == LOAD for n in where):
            reached[r] = None
    waiting = list(reached)
    while waiting:
        t = waiting.pop()
        for r in flows[t]:
            mine, theirs = reached[r], reached[t]
            after = None if mine is None or theirs is None else mine | theirs
            if after != mine:
                reached[r] = after
                waiting.append(r)
    return reached


def predicate(guard: int) -> list[int]:
    return [abs(guard) - 1] if guard else []


class Order:
    """Which instructions are always done before which."""

    def __init__(self, code: Sequence[Instruction], starts: set[int]) -> None:
        begins = sorted(starts)
        self.block_of = [bisect_right(begins, n) - 1 for n in range(len(code))]
        before: dict[int, set[int]] = defaultdict(set)
        for block, begin in enumerate(begins):
            end = begins[block + 1] if block + 1 < len(begins) else len(code)
            last = code[end - 1] if end > begin else None
            if last is not None and last.kind == BRANCH:
                before[self.block_of[last.immediate]].add(block)
            if last is None or last.guard or last.kind not in (BRANCH, EXIT):
                before[block + 1].add(block)
        # Of each block, a bit for those that every way to it passes.
        self.passed = [1, *[-1] * len(begins)]
        changed = True
        while changed:
            changed = False
            for block in range(1, len(begins)):
                ways = [self.passed[b] for b in before[block]]
                now = functools.reduce(operator.and_, ways, -1) | 1 << block
                changed |= now != self.passed[block]
                self.passed[block] = now

    def always_before(self, d: int, n: int) -> bool:
        a, b = self.block_of[d], self.block_of[n]
        return d < n if a == b else bool(self.passed[b] >> a & 1)


def uses_of_loads(
    code: Sequence[Instruction], starts: set[int], early: dict[int, list[int]]
) -> tuple[list[int], list[int]]:
    """Sets `used_if` of loads whose value matters under predicates that are known when they load.

    Returns the lists of predicates, each ended by 0, and the instructions to be done before a thread begins.
    """
    reached, defined, order = sinks(code), definitions(code), Order(code, starts)
    uses: list[int] = []
    hoisted: set[int] = set()
    for n, i in enumerate(code):
        if i.kind != LOAD:
            continue
        for k, r in enumerate(i.to[: i.count]):
            guards = reached[r] if r >= 0 else set()
            if guards is None or len(defined[r]) > 2:
                continue
            of_guards = [p for guard in guards for p in predicate(guard)]
            late = [p for p in of_guards if p not in early]
            if all(len(defined[p]) == 1 and order.always_before(defined[p][0], n) for p in late):
                hoisted.update(m for p in of_guards for m in early.get(p, ()))
                i.used_if[k] = len(uses)
                uses += [*guards, 0]
    return uses, sorted(hoisted)
