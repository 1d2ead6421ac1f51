import pytest
import torch
from torch import nn

from recfx.embeddings import (
    Cell,
    Embedding,
    Lookup,
    column_key,
    constant,
    kaiming_normal,
    kaiming_uniform,
    normal,
    plan_tables,
    truncated_normal,
    uniform,
    xavier_normal,
    xavier_uniform,
)


def test_embedding_and_bias_share_rows_and_all_features_one_table():
    plan = plan_tables(
        {
            "emb": [Embedding(f, dim=8) for f in ("a", "b", "c")],
            "bias": [Embedding(f, dim=1) for f in ("a", "b", "c")],
        }
    )
    (t,) = plan.tables
    assert (t.dims, t.firsts, t.width) == ((8, 1), (0, 8), 9)
    assert t.lookups == (Lookup("a", 0), Lookup("b", 1), Lookup("c", 2))
    assert [[c.name for c in columns] for columns in t.vocabularies] == [[f"emb/{f}", f"bias/{f}"] for f in "abc"]
    assert plan.groups["bias"] == tuple(Cell(0, 1, l, "sum") for l in range(3))
    assert hash(t) == hash(
        plan_tables({"emb": [Embedding(f, dim=8) for f in "abc"], "bias": [Embedding(f, dim=1) for f in "abc"]}).tables[
            0
        ]
    )


def test_unequal_row_shapes_make_several_tables():
    plan = plan_tables(
        {
            "wide": [Embedding("a", dim=16), Embedding("b", dim=16)],
            "narrow": [Embedding("b", dim=4), Embedding("c", dim=4)],
        }
    )
    assert [t.dims for t in plan.tables] == [(16,), (16, 4), (4,)]
    assert [[lookup.feature for lookup in t.lookups] for t in plan.tables] == [["a"], ["b"], ["c"]]
    assert plan.groups["wide"] == (Cell(0, 0, 0, "sum"), Cell(1, 0, 0, "sum"))
    assert plan.groups["narrow"] == (Cell(1, 1, 0, "sum"), Cell(2, 0, 0, "sum"))


def test_a_shared_name_is_one_vocabulary_read_by_several_lookups():
    plan = plan_tables(
        {
            "emb": [
                Embedding("a", dim=8, shared_name="x"),
                Embedding("b", dim=8, shared_name="x", combiner="mean"),
                Embedding("c", dim=8),
            ]
        }
    )
    (t,) = plan.tables
    assert t.lookups == (Lookup("a", 0), Lookup("b", 0), Lookup("c", 1))
    assert [columns[0].name for columns in t.vocabularies] == ["x", "emb/c"]
    assert [c.combiner for c in plan.groups["emb"]] == ["sum", "mean", "sum"]


def test_logical_tables_share_keys_only_when_read_by_the_same_features():
    """Were `own` to live in the rows of x, ids seen by b alone would train a's own weight."""
    plan = plan_tables(
        {
            "emb": [Embedding("a", dim=8, shared_name="x"), Embedding("b", dim=8, shared_name="x")],
            "own": [Embedding("a", dim=8)],
        }
    )
    (t,) = plan.tables
    assert [[c.name for c in columns] for columns in t.vocabularies] == [["x"], ["own/a"]]
    assert t.lookups == (Lookup("a", 0), Lookup("a", 1), Lookup("b", 0))
    both = plan_tables(
        {
            "emb": [Embedding("a", dim=8, shared_name="x"), Embedding("b", dim=8, shared_name="x")],
            "bias": [Embedding("b", dim=1, shared_name="y"), Embedding("a", dim=1, shared_name="y")],
        }
    )
    assert [t.dims for t in both.tables] == [(8, 1)]
    assert both.groups["bias"] == (Cell(0, 1, 1, "sum"), Cell(0, 1, 0, "sum"))


def test_one_name_in_two_groups_is_one_table():
    plan = plan_tables({"p": [Embedding("a", dim=8, shared_name="x")], "q": [Embedding("a", dim=8, shared_name="x")]})
    assert plan.groups["p"] == plan.groups["q"]
    assert len(plan.tables[0].vocabularies) == 1


def test_devices_are_kept_apart():
    plan = plan_tables({"emb": [Embedding("a", dim=8), Embedding("b", dim=8, device="meta")]})
    assert [t.device for t in plan.tables] == ["cpu", "meta"]


@pytest.mark.parametrize(
    "change",
    [{"dim": 4}, {"init": normal(1.0)}, {"device": "meta"}, {"lr_scale": 2.0}, {"weight_decay": 0.1}, {"frozen": True}],
    ids=str,
)
def test_one_name_with_two_meanings(change):
    arguments = {"dim": 8, "shared_name": "x"}
    with pytest.raises(ValueError, match=r"table 'x': got .*, expected one dim, init, device, .* per name"):
        plan_tables({"p": [Embedding("a", **arguments)], "q": [Embedding("b", **arguments | change)]})


def test_errors():
    with pytest.raises(ValueError, match=r"group 'g': got no embeddings, expected at least one"):
        plan_tables({"g": []})
    with pytest.raises(ValueError, match="feature 'a': got dim 0, expected at least 1"):
        Embedding("a", dim=0)
    with pytest.raises(ValueError, match="feature 'a': got combiner 'max', expected 'sum', 'mean', 'sqrtn', None or"):
        Embedding("a", dim=1, combiner="max")
    with pytest.raises(ValueError, match="bound: got 0, expected > 0"):
        truncated_normal(1.0, bound=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_scale": -1.0}, r"feature 'a': got lr_scale -1.0, expected 0 <= lr_scale < inf"),
        ({"weight_decay": float("nan")}, r"feature 'a': got weight_decay nan, expected 0 <= weight_decay"),
    ],
)
def test_rates_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Embedding("a", dim=2, **arguments)


def test_initialisers_out_of_range():
    for init in (normal, truncated_normal):
        with pytest.raises(ValueError, match=r"std: got -1, expected >= 0"):
            init(-1)
    with pytest.raises(ValueError, match=r"high: got 0, expected at least low, which is 1"):
        uniform(1, 0)


def test_default_names_do_not_collide():
    """Feature 'a_b' in group 'c' and feature 'a' in group 'b_c' are two tables."""
    plan = plan_tables({"c": [Embedding("a_b", dim=8)], "b_c": [Embedding("a", dim=8)]})
    assert sum(len(t.vocabularies) for t in plan.tables) == 2


def test_initializers():
    assert constant(2.0) == (2.0, 0.0, 0.0)
    assert uniform(-1.0, 3.0) == (1.0, 2.0, 0.0)
    assert normal(0.5, mean=1.0) == (1.0, 0.5, 1.0)
    assert truncated_normal(0.5) == (0.0, 0.5, pytest.approx(0.9544997))


@pytest.mark.parametrize("dim", [1, 8, 33])
@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_fans_are_torch_s_of_one_row(dim, gain):
    """Bounds and deviations as torch.nn.init draws a tensor [1, dim], over many draws."""
    g, draws = torch.Generator().manual_seed(0), 20_000 // dim
    torch_init = {
        xavier_uniform(gain): lambda t: nn.init.xavier_uniform_(t, gain, generator=g),
        xavier_normal(gain): lambda t: nn.init.xavier_normal_(t, gain, generator=g),
    }
    if gain == 1.0:  # torch's kaiming has its gain built in: sqrt(2)
        torch_init |= {
            kaiming_uniform(): lambda t: nn.init.kaiming_uniform_(t, generator=g),
            kaiming_normal(): lambda t: nn.init.kaiming_normal_(t, generator=g),
        }
    for init, fill_ in torch_init.items():
        loc, scale, cover = Embedding("a", dim=dim, init=init).initializer
        values = torch.cat([fill_(torch.empty(1, dim)) for _ in range(draws)]).double()
        assert loc == 0
        if cover == 0:
            assert float(values.abs().max()) == pytest.approx(scale, rel=1e-2)
        else:
            assert cover == 1
            assert float(values.std()) == pytest.approx(scale, rel=4e-2)


def test_initialisers_of_equal_meaning_share_a_name():
    groups = [Embedding(f, dim=8, shared_name="x", init=xavier_uniform()) for f in "ab"]
    assert len(plan_tables({"g": groups}).tables[0].vocabularies) == 1
    with pytest.raises(ValueError, match=r"table 'x': got .*, expected one dim, init"):
        plan_tables({"g": [groups[0], Embedding("b", dim=8, shared_name="x", init=xavier_uniform(2.0))]})


def test_read_only_lookups_come_last_and_share_no_keys_with_others():
    plan = plan_tables(
        {
            "emb": [
                Embedding("a", dim=8, shared_name="x", read_only=True),
                Embedding("b", dim=8, shared_name="x"),
                Embedding("c", dim=8, read_only=True),
            ],
            "own": [Embedding("c", dim=8)],
        }
    )
    (t,) = plan.tables
    assert t.lookups == (Lookup("b", 0), Lookup("c", 2), Lookup("a", 0, True), Lookup("c", 1, True))
    assert plan.groups["emb"] == (Cell(0, 0, 2, "sum"), Cell(0, 0, 0, "sum"), Cell(0, 0, 3, "sum"))
    assert [plan.learns(c) for c in (*plan.groups["emb"], *plan.groups["own"])] == [False, True, False, True]


def test_rates_of_a_table():
    plan = plan_tables(
        {
            "emb": [Embedding("a", dim=2, lr_scale=0.5), Embedding("b", dim=2, weight_decay=0.3)],
            "bias": [Embedding("a", dim=1, frozen=True), Embedding("b", dim=1)],
        }
    )
    (t,) = plan.tables
    assert [[(c.lr_scale, c.weight_decay) for c in columns] for columns in t.vocabularies] == [
        [(0.5, None), (0.0, 0.0)],
        [(1.0, 0.3), (1.0, None)],
    ]


def test_column_keys_are_frozen():
    """A resumed run must draw the same rows as the run it resumes."""
    assert column_key(42, "emb/c1", 0) == COLUMN_KEY
    assert len({column_key(s, n, c) for s in (1, 2) for n in ("a", "b") for c in (0, 1)}) == 8


COLUMN_KEY = 8033175146046592388
