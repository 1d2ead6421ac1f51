"""Every row optimiser against its formula written out for one weight, in Python floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.kernels.counters import new_counters
from recfx.kernels.rows import adamw_rows, optimizer_rows
from tests.reference import on_threads

FACTORS = [0.02, 0.05, 0.25]  # decay, rate, scale
KERNELS = {  # slots, row slots, hyper
    "sgd_rows": (0, 0, FACTORS),
    "adagrad_rows": (1, 0, [*FACTORS, 0.1, 1e-4]),
    "rowwise_adagrad_rows": (0, 1, [*FACTORS, 0.1, 1e-4]),
    "adamw_rows_by_column": (2, 0, [*FACTORS, 0.9, 0.1, 0.999, 0.001, 1e-4]),
    "ftrl_rows": (2, 0, [*FACTORS, 1.0, 0.02]),
}
DIMS = [(1,), (8, 1), (3, 4, 2), (16,), (5, 19)]


def expected_row(name, row, g, decay, rate, own, dims):
    """The new row [1 + slots][width] of one old one, all Python floats."""
    w, *slots = row
    width = sum(dims)
    if name == "rowwise_adagrad_rows":
        initial, eps = own
        w, sums, first = w[:width], w[width:], 0
        for k, dim in enumerate(dims):
            span = range(first, first + dim)
            full = {c: g[c] + decay[c] * w[c] for c in span}
            sums[k] += sum(x * x for x in full.values()) / dim
            for c in span:
                w[c] -= rate[c] * full[c] / (math.sqrt(initial + sums[k]) + eps)
            first += dim
        return [w + sums]
    new = [list(part) for part in row]
    for c in range(width):
        if name == "sgd_rows":
            new[0][c] = decay[c] * w[c] - rate[c] * g[c]
        elif name == "adagrad_rows":
            initial, eps = own
            full = g[c] + decay[c] * w[c]
            new[1][c] = slots[0][c] + full * full
            new[0][c] = w[c] - rate[c] * full / (math.sqrt(initial + new[1][c]) + eps)
        elif name == "adamw_rows_by_column":
            b1, c1, b2, c2, eps = own
            new[1][c] = m = b1 * slots[0][c] + c1 * g[c]
            new[2][c] = v = b2 * slots[1][c] + c2 * g[c] ** 2
            new[0][c] = decay[c] * w[c] - rate[c] * m / (math.sqrt(v) + eps)
        else:
            beta, l1 = own
            z, n = slots[0][c], slots[1][c]
            before = 0.0 if z == n == 0 else beta + math.sqrt(n)
            new[2][c] = n + g[c] ** 2
            now = beta + math.sqrt(new[2][c])
            new[1][c] = z = z + rate[c] * g[c] - (now - before) * w[c]
            if rate[c] > 0 and now > 0:
                shrunk = max(abs(z) - rate[c] * l1, 0.0)
                new[0][c] = -math.copysign(shrunk, z) / (now + rate[c] * decay[c])
    return new


def case(name, dims, num_unique, *, seed=0, num_rows=12, by_column=False):
    """rows, grads, counters, unique_rows, row_vocabularies, hyper, due, dims, rates."""
    slots, row_slots, hyper = KERNELS[name]
    g, width = torch.Generator().manual_seed(seed), sum(dims)
    rows = torch.randn(num_rows, 1 + slots, width + row_slots * len(dims), generator=g)
    rows[:, 1:].abs_()
    rows[: num_rows // 2, 1:] = 0  # as new rows are
    rows[:, :, width:].abs_()
    grads = torch.randn(num_rows, width, generator=g)
    grads[:, 0] = 0
    rates = torch.rand(3, 2, width, generator=g) * 0.1 if by_column else None
    if by_column:
        rates[1, 1] = 0  # a vocabulary that does not move
    return [
        rows,
        grads,
        new_counters(num_unique=num_unique),
        torch.randperm(num_rows, generator=g).int(),
        torch.randint(0, 3, (num_rows,), generator=g).int(),
        torch.tensor(hyper, dtype=torch.float64),
        torch.tensor(True),
        dims,
        rates,
    ]


def run(op, arguments):
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    op(*copies)
    return copies


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("name", KERNELS)
@given(dims=st.sampled_from(DIMS), num_unique=st.integers(0, 12), seed=st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_op_and_definition_are_the_formula_on_the_unique_rows_alone(name, by_column, dims, num_unique, seed):
    arguments = case(name, dims, num_unique, seed=seed, by_column=by_column)
    rows, grads, _, unique_rows, vocabularies, hyper, _, _, rates = arguments
    expected, (decay, rate, scale, *own) = rows.double(), hyper.tolist()
    for u, row in enumerate(unique_rows[:num_unique].tolist()):
        factors = [[decay] * sum(dims), [rate] * sum(dims)] if rates is None else rates[vocabularies[row]].tolist()
        g = [x * scale for x in grads[u].tolist()]
        expected[row] = torch.tensor(expected_row(name, rows[row].double().tolist(), g, *factors, own, dims))
    kernel = getattr(optimizer_rows, name)
    for new in (run(kernel.op_, arguments), run(kernel.definition, arguments)):
        torch.testing.assert_close(new[0].double(), expected, rtol=2e-5, atol=2e-6)
        untouched = unique_rows[num_unique:].long()
        assert torch.equal(new[0][untouched], rows[untouched])
        assert not new[1][:num_unique].any()
        assert torch.equal(new[1][num_unique:], grads[num_unique:])
        assert torch.equal(new[2], new_counters(step=1))


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_moves_unless_due(name):
    arguments = case(name, (8, 1), 7)
    arguments[6] = torch.tensor(False)
    kernel = getattr(optimizer_rows, name)
    for op in (kernel.op_, kernel.definition):
        for a, b in zip(run(op, arguments)[:3], arguments, strict=False):
            assert torch.equal(a, b)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_one_and_two_threads_give_the_same_bytes(name, by_column):
    arguments = case(name, (8, 1), 3000, num_rows=4000, by_column=by_column)
    one, two = (on_threads(n, run, getattr(optimizer_rows, name).op_, arguments) for n in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_rate_zero_and_no_decay_keep_every_weight(name):
    """A frozen table: to the bit, under every optimiser."""
    arguments = case(name, (8, 1), 12, by_column=True)
    arguments[8][:, 0] = 1.0 if name in ("sgd_rows", "adamw_rows_by_column") else 0.0
    arguments[8][:, 1] = 0.0
    rows = run(getattr(optimizer_rows, name).op_, arguments)[0]
    assert torch.equal(rows[:, 0, :9], arguments[0][:, 0, :9])


def test_adamw_by_column_is_adamw_where_columns_are_alike():
    arguments = case("adamw_rows_by_column", (8, 1), 12)
    rows, grads, counters, unique_rows, _, hyper, due, *_ = arguments
    decay, rate, scale, *betas, eps = hyper.unbind()
    plain = [rows.clone(), grads.clone(), counters.clone(), unique_rows]
    adamw_rows.adamw_rows_(*plain, torch.stack([decay, *betas, rate, eps, scale]), due)
    torch.testing.assert_close(run(optimizer_rows.adamw_rows_by_column.op_, arguments)[0], plain[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck(name, by_column):
    torch.library.opcheck(getattr(optimizer_rows, name).op_, tuple(case(name, (8, 1), 5, by_column=by_column)))
