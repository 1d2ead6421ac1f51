import pytest

from recfx.embeddings import (
    Cell,
    Embedding,
    Lookup,
    column_key,
    constant,
    normal,
    plan_tables,
    truncated_normal,
    uniform,
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


@pytest.mark.parametrize("change", [{"dim": 4}, {"init": normal(1.0)}, {"device": "meta"}], ids=str)
def test_one_name_with_two_meanings(change):
    arguments = {"dim": 8, "shared_name": "x"}
    with pytest.raises(ValueError, match=r"table 'x': got .*, expected one dim, init and device per name"):
        plan_tables({"p": [Embedding("a", **arguments)], "q": [Embedding("b", **arguments | change)]})


def test_errors():
    with pytest.raises(ValueError, match=r"group 'g': got dims \[8, 4\], expected one. Split the group."):
        plan_tables({"g": [Embedding("a", dim=8), Embedding("b", dim=4)]})
    with pytest.raises(ValueError, match=r"group 'g': got dims \[\], expected one"):
        plan_tables({"g": []})
    with pytest.raises(ValueError, match="feature 'a': got dim 0, expected at least 1"):
        Embedding("a", dim=0)
    with pytest.raises(ValueError, match="feature 'a': got combiner 'max', expected 'sum' or 'mean'"):
        Embedding("a", dim=1, combiner="max")
    with pytest.raises(ValueError, match="bound: got 0, expected > 0"):
        truncated_normal(1.0, bound=0)


def test_default_names_do_not_collide():
    """Feature 'a_b' in group 'c' and feature 'a' in group 'b_c' are two tables."""
    plan = plan_tables({"c": [Embedding("a_b", dim=8)], "b_c": [Embedding("a", dim=8)]})
    assert sum(len(t.vocabularies) for t in plan.tables) == 2


def test_initializers():
    assert constant(2.0) == (2.0, 0.0, 0.0)
    assert uniform(-1.0, 3.0) == (1.0, 2.0, 0.0)
    assert normal(0.5, mean=1.0) == (1.0, 0.5, 1.0)
    assert truncated_normal(0.5) == (0.0, 0.5, pytest.approx(0.9544997))


def test_column_keys_are_frozen():
    """A resumed run must draw the same rows as the run it resumes."""
    assert column_key(42, "emb/c1", 0) == COLUMN_KEY
    assert len({column_key(s, n, c) for s in (1, 2) for n in ("a", "b") for c in (0, 1)}) == 8


COLUMN_KEY = 8033175146046592388
