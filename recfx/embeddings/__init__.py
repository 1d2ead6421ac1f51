"""Embeddings as a user declares them, how new rows are initialised, and the plan of physical tables."""

from recfx.embeddings.declaration import Combiner, Embedding, Tile, combine, tile
from recfx.embeddings.initializers import (
    Initializer,
    column_key,
    constant,
    kaiming_normal,
    kaiming_uniform,
    normal,
    truncated_normal,
    uniform,
    xavier_normal,
    xavier_uniform,
)
from recfx.embeddings.plan import Cell, LogicalTable, Lookup, Plan, TablePlan, plan_tables

__all__ = [
    "Cell",
    "Combiner",
    "Embedding",
    "Initializer",
    "LogicalTable",
    "Lookup",
    "Plan",
    "TablePlan",
    "Tile",
    "column_key",
    "combine",
    "constant",
    "kaiming_normal",
    "kaiming_uniform",
    "normal",
    "plan_tables",
    "tile",
    "truncated_normal",
    "uniform",
    "xavier_normal",
    "xavier_uniform",
]
