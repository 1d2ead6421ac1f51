"""The embedding hash table as an explicit state: an index from ids to rows, and the rows.

The specification is a Python dict: `row = d.setdefault((vocabulary, id), len(d))`, ids taken in the order (sample,
lookup, place in the list). New ids take freed rows first, the lowest number before the others.
"""

from recfx.table.columns import RowLayout, initializer_tensors
from recfx.table.functions import Table, table
from recfx.table.index import grow_, rebuild_, restore_
from recfx.table.limits import Limits
from recfx.table.memory import reserve
from recfx.table.pooling import Occurrences, groups_of
from recfx.table.reading import Found, Reading, check_num_samples, ids_of
from recfx.table.state import (
    CANDIDATE_FIELDS,
    COUNTERS,
    ROW_FIELDS,
    TableCandidates,
    TableState,
    copy_of,
    is_full,
    num_live,
    num_rows_bytes,
)
from recfx.table.sweep import TableStats, columns_of, delete_, is_sweep_due, stats, sweep_

__all__ = [
    "CANDIDATE_FIELDS",
    "COUNTERS",
    "ROW_FIELDS",
    "Found",
    "Limits",
    "Occurrences",
    "Reading",
    "RowLayout",
    "Table",
    "TableCandidates",
    "TableState",
    "TableStats",
    "check_num_samples",
    "columns_of",
    "copy_of",
    "delete_",
    "groups_of",
    "grow_",
    "ids_of",
    "initializer_tensors",
    "is_full",
    "is_sweep_due",
    "num_live",
    "num_rows_bytes",
    "rebuild_",
    "reserve",
    "restore_",
    "stats",
    "sweep_",
    "table",
]
