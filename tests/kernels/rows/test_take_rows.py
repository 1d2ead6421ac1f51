"""take_rows_ against indexing, in C++ and in its definition."""

import pytest
import torch

from recfx.kernels.definitions import definitions
from recfx.kernels.rows.take_rows import take_rows_
from recfx.table.memory import reserve_rows


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("width", [1, 9, 33])
def test_takes_weights_and_says_what_is_missing(ranks, width):
    rows = reserve_rows((50, 3, width), torch.device("cpu"), most_padding=1.0)
    rows.copy_(torch.randn(50, 3, width))
    row = torch.randint(-2, 50, (ranks * 40,), dtype=torch.int32)
    expected = torch.full((ranks, 40 * (width + 1) + 4), 7.0)
    for rank in range(ranks):
        for k in range(40):
            number = int(row[rank * 40 + k])
            values = rows[number, 0].tolist() if number >= 0 else [0.0] * width
            expected[rank, 3 + k * width :][:width] = torch.tensor(values)
            expected[rank, 3 + 40 * width + k] = min(number, 0)
    got, by_definition = torch.full_like(expected, 7.0), torch.full_like(expected, 7.0)
    take_rows_(got, 3, rows, row, width)
    with definitions():
        take_rows_(by_definition, 3, rows, row, width)
    assert torch.equal(got, expected)
    assert torch.equal(by_definition, expected)


def test_a_message_without_room():
    with pytest.raises(RuntimeError, match="row_M: got 6 rows of 4 weights"):
        take_rows_(torch.zeros(2, 10), 0, torch.zeros(5, 1, 4), torch.zeros(6, dtype=torch.int32), 4)
