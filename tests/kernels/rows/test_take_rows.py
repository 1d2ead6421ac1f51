"""take_rows_ against indexing, in C++ and in its definition."""

import pytest
import torch

from recfx.kernels.definitions import definitions
from recfx.kernels.rows import take_rows
from recfx.kernels.rows.take_rows import take_rows_
from recfx.table.memory import reserve_rows
from tests.reference import on_threads


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize(("width", "of_row"), [(1, 1), (9, 9), (33, 33), (8, 17)])
def test_takes_weights_and_says_what_is_missing(ranks, width, of_row, threads):
    rows = reserve_rows((50, 3, of_row), torch.device("cpu"), most_padding=1.0)
    rows.copy_(torch.randn(50, 3, of_row))
    row = torch.randint(-2, 50, (ranks * 40,), dtype=torch.int32)
    expected = torch.full((ranks, 40 * (width + 1) + 4), 7.0)
    for rank in range(ranks):
        for k in range(40):
            number = int(row[rank * 40 + k])
            values = rows[number, 0, :width].tolist() if number >= 0 else [0.0] * width
            expected[rank, 3 + k * width :][:width] = torch.tensor(values)
            expected[rank, 3 + 40 * width + k] = min(number, 0)
    got, by_definition = torch.full_like(expected, 7.0), torch.full_like(expected, 7.0)
    on_threads(threads, take_rows_, got, 3, rows, row, width)
    with definitions():
        take_rows_(by_definition, 3, rows, row, width)
    assert torch.equal(got, expected)
    assert torch.equal(by_definition, expected)


def test_nothing_asked_for_is_nothing():
    message = torch.full((2, 4), 7.0)
    take_rows_(message, 4, torch.randn(5, 1, 4), torch.zeros(0, dtype=torch.int32), 4)
    assert (message == 7).all()


def test_opcheck():
    row = torch.tensor([1, -1, 4, -2], dtype=torch.int32)
    torch.library.opcheck(take_rows_, (torch.zeros(2, 12), 1, torch.randn(5, 2, 4), row, 4))


def test_the_definition_compiles_whole():
    rows, row = torch.randn(5, 2, 4), torch.tensor([1, -1, 4, -2], dtype=torch.int32)
    got, expected = torch.zeros(2, 12), torch.zeros(2, 12)
    take_rows_(expected, 1, rows, row, 4)
    torch.compile(take_rows.definition, fullgraph=True, backend="aot_eager")(got, 1, rows, row, 4)
    assert torch.equal(got, expected)


BAD = {
    "no ranks": ({"message": torch.zeros(0, 40)}, "message: got 0 ranks, expected at least 1"),
    "f64 message": ({"message": torch.zeros(2, 40).double()}, "got other tensors than an f32 message"),
    "f64 rows": ({"rows": torch.zeros(5, 1, 4).double()}, "got other tensors than an f32 message"),
    "rows of numbers apart": ({"rows": torch.zeros(5, 4, 4).mT}, "got other tensors than an f32 message"),
    "i64 rows": ({"row_M": torch.zeros(6, dtype=torch.int64)}, "got other tensors than an f32 message"),
    "wide": ({"width": 5}, "width: got 5, expected 1 to 4"),
    "no width": ({"width": 0}, "width: got 0, expected 1 to 4"),
    "negative width": ({"width": -3}, "width: got -3, expected 1 to 4"),
    "uneven": ({"row_M": torch.zeros(5, dtype=torch.int32)}, "row_M: got 5 rows of 4 weights"),
}


@pytest.mark.parametrize(("changed", "error"), BAD.values(), ids=BAD)
def test_bad_arguments(changed, error):
    row_M = torch.zeros(6, dtype=torch.int32)
    good = {"message": torch.zeros(2, 40), "first": 0, "rows": torch.zeros(5, 1, 4), "row_M": row_M, "width": 4}
    take_rows_(*good.values())
    with pytest.raises(RuntimeError, match=error):
        take_rows_(*(good | changed).values())


def test_a_message_without_room():
    with pytest.raises(RuntimeError, match="row_M: got 6 rows of 4 weights"):
        take_rows_(torch.zeros(2, 10), 0, torch.zeros(5, 1, 4), torch.zeros(6, dtype=torch.int32), 4)
