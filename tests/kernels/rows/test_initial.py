import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recfx.embeddings import constant, normal, truncated_normal, uniform
from recfx.kernels.index import hashing
from recfx.kernels.rows.initial import initial_values
from recfx.table import Limits, initializer_tensors, table
from tests import reference
from tests.reference import EXTREMES, MAX_INT64, MIN_INT64, features_of, table_plan

INITS = [
    constant(0.25),
    uniform(-0.3, 0.1),
    normal(0.02, mean=1.0),
    truncated_normal(0.001),
    truncated_normal(1, 0, 0.5),
]


def one_column_plan(init, dim=8):
    plan = table_plan([0], (dim,))
    return type(plan)(
        device="cpu", dims=(dim,), lookups=plan.lookups, vocabularies=((plan.vocabularies[0][0]._replace(init=init),),)
    )


def inserted(plan, ids, seed=7):
    """Initial rows of `ids` through the kernel, f32 [ids, W]."""
    t = table(plan, optimizer_slots=0, seed=seed, limits=Limits(max_rows=max(len(ids), 8)))
    state = t.init()
    found = t.insert_(state, t.read(features_of([[[i] for i in ids]])))
    return state.rows[found.row.long(), 0]


@pytest.mark.parametrize("init", INITS, ids=str)
@given(
    ids=st.lists(st.sampled_from(EXTREMES) | st.integers(MIN_INT64, MAX_INT64), min_size=1, max_size=20, unique=True)
)
@settings(max_examples=25, deadline=None)
def test_kernel_is_definition_is_python(init, ids):
    plan = one_column_plan(init, dim=3)
    keys, params = initializer_tensors(plan, 7)
    id = torch.tensor(ids)
    defined = initial_values(id, keys.expand(len(ids), -1), params.expand(len(ids), -1, -1))
    python = torch.tensor(
        [[reference.initial_value(7, "v0.0", i, c, init) for c in range(3)] for i in ids], dtype=torch.float64
    )
    tolerance = {"rtol": 1e-6, "atol": 2e-7 * abs(init.scale) + 1e-7 * abs(init.loc)}
    torch.testing.assert_close(defined.double(), python, **tolerance)
    torch.testing.assert_close(inserted(plan, ids), defined, rtol=2e-6, atol=tolerance["atol"])


def test_value_is_a_function_of_seed_name_id_and_column_alone():
    plan, ids = table_plan([0, 1]), list(EXTREMES)
    shuffled = random.Random(0).sample(ids, len(ids))
    a = inserted(one_column_plan(truncated_normal(1.0)), ids)
    b = inserted(one_column_plan(truncated_normal(1.0)), shuffled)
    assert torch.equal(b, a[[ids.index(i) for i in shuffled]])
    assert not torch.equal(a, inserted(one_column_plan(truncated_normal(1.0)), ids, seed=8))
    assert len(a.unique()) == a.numel()
    keys, _ = initializer_tensors(plan, 7)
    assert len(keys.unique()) == keys.numel()


@pytest.mark.parametrize("bound", [0.5, 2.0, 3.0])
def test_truncated_normal_keeps_its_bound_and_moments(bound):
    values = inserted(one_column_plan(truncated_normal(0.01, 0.0, bound)), list(range(40_000))).double()
    assert values.abs().max() <= 0.01 * bound * (1 + 1e-6)
    assert values.abs().max() > 0.01 * bound * 0.99
    z = torch.distributions.Normal(0.0, 1.0)
    density = z.log_prob(torch.tensor(bound)).exp()
    std = (1 - 2 * bound * density / reference.quantile_bound(bound)).sqrt() * 0.01
    assert abs(values.mean()) < 5 * std / values.numel() ** 0.5
    assert abs(values.std() / std - 1) < 0.01


def test_normal_uniform_and_constant_moments():
    ids = list(range(40_000))
    a = inserted(one_column_plan(normal(0.02, mean=1.0)), ids).double()
    assert abs(a.mean() - 1) < 2e-4
    assert abs(a.std() / 0.02 - 1) < 0.01
    assert 4 < (a.max() - 1) / 0.02 < 6
    b = inserted(one_column_plan(uniform(-0.3, 0.1)), ids).double()
    assert b.min() >= -0.3
    assert b.max() <= 0.1
    assert abs(b.mean() + 0.1) < 2e-3
    assert abs(b.std() - 0.4 / 12**0.5) < 2e-3
    assert torch.equal(inserted(one_column_plan(constant(0.25)), ids).unique(), torch.tensor([0.25]))


def test_columns_and_neighbouring_ids_are_uncorrelated():
    values = inserted(one_column_plan(normal(1.0)), list(range(40_000))).double()
    assert (torch.corrcoef(values.T) - torch.eye(8)).abs().max() < 0.03
    assert abs((values[1:] * values[:-1]).mean()) < 0.01


def test_columns_side_by_side_do_not_change_a_logical_table():
    """A bias beside an embedding leaves the embedding's values as they are alone."""
    alone, beside = inserted(table_plan([0], (3,)), list(EXTREMES)), inserted(table_plan([0], (3, 1)), list(EXTREMES))
    assert torch.equal(alone, beside[:, :3])


MIX_GOLDEN = [4717996019076358352, 4939931809569846361, 8233824478078409175, -5272987786713987703]
HASH_GOLDEN = [3112442694914653562, 5191138483712749152, 7124022114820479739, 8125650200480267904]
INITIAL_GOLDEN = [9.658601e-4, -3.674109e-4, -2.577087e-4, 9.282304e-4, -1.633324e-4, -2.063447e-4]


def test_hash_is_frozen():
    x = torch.tensor([1, -1, MIN_INT64, MAX_INT64])
    signed = [(y := reference.mix(i % 2**64)) - 2**64 * (y >= 2**63) for i in x.tolist()]
    assert hashing.mix(x).tolist() == signed
    assert signed == MIX_GOLDEN
    salt, vocabulary = torch.tensor(5), torch.tensor([0, 1, 2, 3])
    assert hashing.hash_id(x, vocabulary, salt).tolist() == HASH_GOLDEN


def test_initial_values_are_frozen():
    values = inserted(one_column_plan(truncated_normal(0.001), dim=2), [0, -1, MAX_INT64], seed=42).double()
    assert values.flatten().tolist() == pytest.approx(INITIAL_GOLDEN, rel=1e-5)


def test_mix_is_a_bijection_on_samples():
    x = torch.randint(MIN_INT64, MAX_INT64, (100_000,), generator=torch.Generator().manual_seed(0)).unique()
    assert len(hashing.mix(x).unique()) == len(x)
