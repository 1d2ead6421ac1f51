"""Batches with one thing wrong, by seed: each must be an error that names the column and, in a tensor, the place.

python -m tests.faults.malformed 0 200     seeds from 0 up to 200; the last line printed is the seed at work
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recfx import features as ops
from recfx.types import NUM_SAMPLES, Ragged, pack

Columns = dict[str, Any]
Wrong = tuple[str, int | None]  # column, and the place in its offsets

FAR = (1, 2, 1000, 900_000, 2**31 - 1)
DENSE, RAGGED, NESTED = "price", "item", "title"


def right(rng: random.Random) -> Columns:
    """A batch of 2 to 5 samples: numbers, weighted ids, strings in lists."""
    num = rng.randint(2, 5)

    def offsets(num_lists: int) -> Tensor:
        return torch.tensor([0] + [rng.randint(0, 3) for _ in range(num_lists)]).cumsum(0).int()

    ids, outer = offsets(num), offsets(num)
    inner = offsets(int(outer[-1]))
    num_ids, num_bytes = int(ids[-1]) + rng.randint(0, 2), int(inner[-1]) + rng.randint(0, 2)
    return {
        DENSE: torch.rand(num, 3),
        RAGGED: Ragged(torch.arange(num_ids), ids, torch.rand(num_ids)),
        NESTED: Ragged(torch.ones(num_bytes, dtype=torch.uint8), inner, None, (outer,)),
    }


def with_(columns: Columns, name: str, **parts: Any) -> str:
    columns[name] = columns[name]._replace(**parts)
    return name


def some_offsets(columns: Columns, rng: random.Random) -> tuple[str, Tensor, int, Callable[[Tensor], None]]:
    """Of a column a level of offsets, what it counts at most, and how to put others there."""
    name, part = rng.choice([(RAGGED, "offsets"), (NESTED, "offsets"), (NESTED, "outer")])
    column = columns[name]
    if part == "outer":
        put: Callable[[Tensor], Any] = lambda o: with_(columns, name, outer=(o,))  # noqa: E731
        return name, column.outer[0].clone(), column.offsets.numel() - 1, put
    return name, column.offsets.clone(), column.values.numel(), lambda o: with_(columns, name, offsets=o)  # type: ignore[return-value]


def beyond(columns: Columns, rng: random.Random) -> Wrong:
    name, offsets, most, put = some_offsets(columns, rng)
    place = rng.randint(min(1, len(offsets) - 1), len(offsets) - 1)
    offsets[place:] = min(most + rng.choice(FAR), 2**31 - 1)
    put(offsets)
    return name, place


def falling(columns: Columns, rng: random.Random) -> Wrong:
    name, offsets, _, put = some_offsets(columns, rng)
    if len(offsets) < 2:
        return beyond(columns, rng)
    place = rng.randint(1, len(offsets) - 1)
    offsets[place] = offsets[place - 1] - rng.choice((1, 2, 900_000))
    put(offsets)
    return name, place


def not_from_zero(columns: Columns, rng: random.Random) -> Wrong:
    name, offsets, _, put = some_offsets(columns, rng)
    offsets[0] = rng.choice((1, -1, 5, -(2**31), 2**31 - 1))
    put(offsets)
    return name, 0


def form_of_offsets(columns: Columns, rng: random.Random) -> Wrong:
    name, offsets, _, put = some_offsets(columns, rng)
    put(rng.choice([offsets.long(), offsets.float(), offsets[None], offsets[:0], offsets[0], offsets.short()]))
    return name, None


def weights(columns: Columns, rng: random.Random) -> Wrong:
    w = columns[RAGGED].weights
    wrong = [w[:-1] if len(w) else torch.rand(1), torch.rand(len(w) + 1), w.double(), w.long(), w[None], torch.rand(())]
    return with_(columns, RAGGED, weights=rng.choice(wrong)), None


def values(columns: Columns, rng: random.Random) -> Wrong:
    v = columns[RAGGED].values
    return with_(columns, RAGGED, values=rng.choice([v[None], v[:, None], v.to(torch.complex64), v.sum()])), None


def not_a_tensor(columns: Columns, rng: random.Random) -> Wrong:
    name = rng.choice((RAGGED, NESTED))
    parts = columns[name].parts
    wrong: Any = rng.choice(([1, 2], parts["values"].numpy(), None, "ids", 3))
    part = rng.choice(("values", "offsets", "outer"))
    if rng.random() < 0.3:
        columns[name] = wrong
        return name, None
    return with_(columns, name, **{part: (wrong,) if part == "outer" and rng.random() < 0.5 else wrong}), None


def number_of_samples(columns: Columns, rng: random.Random) -> Wrong:
    num = len(columns[DENSE])
    n: Any = rng.choice((num + 1, 100, -1, -(2**31), 2**31 - 1))
    columns[NUM_SAMPLES] = torch.tensor(n, dtype=torch.int32)
    return NUM_SAMPLES, None


def form_of_number(columns: Columns, rng: random.Random) -> Wrong:
    one = torch.tensor(1)
    wrong = [one, one.float(), one.int()[None], 1, None, Ragged(one[None], torch.tensor([0, 1]).int()), torch.empty(0)]
    columns[NUM_SAMPLES] = rng.choice(wrong)
    return NUM_SAMPLES, None


def kind_of_dense(columns: Columns, rng: random.Random) -> Wrong:
    x = columns[DENSE]
    wrong: list[Any] = [x.sum(), x.to_sparse(), x.to("meta"), x.cfloat(), x.tolist(), x.numpy(), x.requires_grad_()]
    columns[DENSE] = rng.choice(wrong)
    return DENSE, None


def one_sample_more(columns: Columns, rng: random.Random) -> Wrong:
    name = rng.choice((DENSE, RAGGED, NESTED))
    c = columns[name]
    if name == DENSE:
        columns[name] = rng.choice([c[:-1], torch.cat([c, c]), c[:0]])
    elif name == RAGGED:
        more = torch.cat([c.offsets, c.offsets[-1:]])
        with_(columns, name, offsets=rng.choice([c.offsets[:-1], c.offsets[:1], more]))
    else:
        with_(columns, name, outer=(c.outer[0][:-1],))
    return name, None


def on_another_device(columns: Columns, rng: random.Random) -> Wrong:
    name, offsets, _, put = some_offsets(columns, rng)
    put(offsets.to("meta"))
    return name, None


FAULTS = (
    beyond, beyond, falling, falling, not_from_zero, form_of_offsets, weights, values, not_a_tensor, number_of_samples,
    form_of_number, kind_of_dense, one_sample_more, on_another_device,
)  # fmt: skip


def feature_ops(name: str, column: Ragged) -> list[Callable[[], Any]]:
    """Feature ops that read a column like this one."""
    calls: list[Callable[[], Any]] = [
        lambda: ops.truncate(column, 1, side="left"),
        lambda: ops.to_dense(column, 2),
        lambda: ops.check_length(column, 100),
    ]
    if name == RAGGED:
        calls += [lambda: ops.cross(column, column, capacity=9), lambda: ops.select_ragged(column)]
    else:
        calls += [lambda: ops.farm_hash(column), lambda: ops.murmur_hash({"s": column}), lambda: ops.flatten(column)]
        calls += [lambda: ops.truncate_lists(column, 2, side="right")]
    return calls


def expect_error(call: Callable[[], Any], *words: str) -> str:
    """The words of the error."""
    with pytest.raises((ValueError, TypeError)) as raised:
        call()
    said = str(raised.value)
    assert all(word in said for word in words), f"{said}: expected it to say {words}"
    return said


def check(seed: int) -> str:
    """Builds the batch of a seed, right and then wrong; returns the error."""
    rng = random.Random(seed)
    columns = right(rng)
    layout = pack(columns).layout if rng.random() < 0.3 else None  # the right one passes
    fault = rng.choice(FAULTS)
    name, place = fault(columns, rng)
    words = [f"'{name}'"] + ([] if place is None else [f"place {place},"])
    said = expect_error(lambda: pack(columns, layout=layout), *words)
    if place is not None:
        expect_error(rng.choice(feature_ops(name, columns[name])), f"place {place},")
    return f"{fault.__name__}: {said}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        print(seed, flush=True)
        check(seed)
