"""What each column of some files is for a model, from its type: a number, an id, a list of ids, a label, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa

from recfx.checks import check_type
from recfx.data.describe import ColumnFacts, facts_of
from recfx.data.schema import is_list, is_text, item_type

__all__ = ["Kind", "Role", "Roles", "roles_of"]

Kind = Literal["label", "weight", "dense", "sparse", "text", "bool", "left out"]


@dataclass(frozen=True, kw_only=True)
class Role:
    """What a column is for a model.

    kind:    "dense" is a number; "sparse" an id, "text" an id that is a string, "bool" one that is true or false.
    is_list: whether a row has several.  why: of what is left out, and of what a user has named.
    """

    facts: ColumnFacts
    kind: Kind
    is_list: bool
    why: str = ""

    @property
    def name(self) -> str:
        return self.facts.name


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The columns of some files, in their order."""

    columns: tuple[Role, ...]

    def named(self, *kinds: Kind, lists: bool | None = None) -> list[str]:
        """Names of the columns of these kinds; lists None: whether lists or not."""
        return [c.name for c in self.columns if c.kind in kinds and lists in (None, c.is_list)]

    @property
    def ids(self) -> list[str]:
        """Names of the columns that have embeddings."""
        return self.named("sparse", "text", "bool")


def roles_of(
    sample: pa.Table,
    *,
    labels: Sequence[str],
    dense: Sequence[str] = (),
    sparse: Sequence[str] = (),
    drop: Sequence[str] = (),
    weight: str | None = None,
    flags_are_text: bool = False,
) -> Roles:
    """The roles of the columns of a sample of rows.

    Floats and decimals are dense; integers, strings, dictionaries and booleans sparse; lists of these are lists of ids.
    Left out are dates and times, lists of numbers, nested columns and columns without any value.

    Args:     labels: names of labels, 0 or 1.  weight: name of the column of sample weights.
              flags_are_text: whether "true" and "false" are read as strings, as from CSV.
              dense, sparse, drop: names of columns that are numbers, ids, or left out whatever their type.
    Raises:   ValueError naming the column: of a name that the files do not have or that is given twice, of a label that
              is missing throughout or constant, is a list or has other values than 0 and 1, of a column that cannot be
              what it is to be; without a column of ids; of one called numeric besides dense ones.
    """
    given = {
        "label": list(labels),
        "weight": [weight] if weight else [],
        "dense": dense,
        "sparse": sparse,
        "drop": drop,
    }
    wanted: dict[str, str] = {}
    for argument, names in given.items():
        for name in names:
            check_type(argument, name, str)
            if name not in sample.column_names:
                raise ValueError(f"{argument}: got '{name}', expected a column of the files: {sample.column_names}.")
            if name in wanted:
                raise ValueError(f"column '{name}': got it as {wanted[name]} and {argument}, expected one of them.")
            wanted[name] = argument
    if not labels:
        raise ValueError("label: got none, expected the name of a column at least. A model is trained for it.")
    facts = {f.name: f for f in facts_of(sample)}
    columns = []
    for name, column in zip(sample.column_names, sample.columns, strict=True):
        role = _role(facts[name], column.type, wanted.get(name))
        columns.append(replace(role, kind="text") if flags_are_text and role.kind == "bool" else role)
        if wanted.get(name) == "label":
            _check_label(facts[name], column)
    roles = Roles(columns=tuple(columns))
    if not roles.ids:
        raise ValueError(
            f"columns: got {sample.column_names}, of which none is an id, expected one at least. Models have "
            "embeddings of ids. Name a column of whole numbers or strings with sparse."
        )
    if "numeric" in roles.named("label", "weight", "sparse", "text", "bool") and roles.named("dense"):
        raise ValueError(
            "column 'numeric': got it next to dense columns, expected another name. Models have their numbers in a "
            "feature of that name. Rename the column, or leave it out with drop."
        )
    return roles


def _role(facts: ColumnFacts, kind: pa.DataType, wanted: str | None) -> Role:
    of_list = is_list(kind)
    item = item_type(kind) if of_list else kind
    item = item.value_type if pa.types.is_dictionary(item) else item

    def role(kind: Kind, why: str = "", *, of_list: bool = of_list) -> Role:
        return Role(facts=facts, kind=kind, is_list=of_list, why=why)

    if wanted == "drop":
        return role("left out", "as asked")
    if wanted in ("label", "weight"):
        if of_list or not _is_number(item):
            raise ValueError(f"column '{facts.name}': got {facts.type}, expected numbers. It is the {wanted}.")
        return role("label" if wanted == "label" else "weight", "as asked")
    if facts.num_distinct == 0 and wanted is None:
        return role("left out", "no value")
    if wanted == "dense":
        if of_list or not _is_number(item):
            raise ValueError(f"column '{facts.name}': got {facts.type}, expected numbers. It is to be dense.")
        return role("dense", "as asked")
    asked = "" if wanted is None else "as asked"
    if is_text(item):
        return role("text", asked)
    if pa.types.is_boolean(item):
        return role("bool", asked)
    if pa.types.is_integer(item):
        return role("sparse", asked)
    if wanted == "sparse":
        if (pa.types.is_floating(item) or pa.types.is_decimal(item)) and not _is_whole(facts):
            raise ValueError(
                f"column '{facts.name}': got {facts.type} with fractions, expected whole numbers. It is to be sparse."
            )
        if pa.types.is_floating(item) or pa.types.is_decimal(item):
            return role("sparse", "as asked")
        raise ValueError(
            f"column '{facts.name}': got {facts.type}, expected integers, strings or booleans. It is to be sparse."
        )
    if pa.types.is_floating(item) or pa.types.is_decimal(item):
        return role("left out", "a list of numbers") if of_list else role("dense")
    if pa.types.is_temporal(item):
        return role("left out", "a date or time")
    return role("left out", f"cannot be read as a number or an id: {facts.type}")


def _is_whole(facts: ColumnFacts) -> bool:
    return all(value is None or float(value) == int(float(value)) for value in (facts.low, facts.high))


def _is_number(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    return any(is_kind(kind) for is_kind in kinds)


def _check_label(facts: ColumnFacts, column: pa.ChunkedArray) -> None:
    if facts.num_distinct == 0:
        raise ValueError(f"label '{facts.name}': got no value in any row, expected 0 and 1. Nothing can be learnt.")
    values = {float(value) for value in column.unique().to_pylist()[:1000] if value is not None}
    if not values <= {0.0, 1.0}:
        raise ValueError(
            f"label '{facts.name}': got {sorted(values - {0.0, 1.0})[0]:g} among its values, expected 0 and 1. Write a "
            "program for other labels, see recfx.losses."
        )
    if len(values) < 2:
        raise ValueError(
            f"label '{facts.name}': got {values.pop():g} in every one of {len(column)} rows, expected 0 and 1. Nothing "
            "can be learnt from a constant."
        )
