"""Row surgery: the rows of one logical table by id, between steps.

A table is named as the model names it: '<group>/<feature>', or its shared name. Tables over the same ids (embedding and
bias of one feature) share their rows: a row that is created or deleted in one is created or deleted in all. Written
rows count as touched by the last step, so a partial checkpoint contains them.

Where ranks share the tables (`step.group`), each function is for the rows that its rank owns: it writes and deletes
those of the ids that this rank owns, and reads, exports and summarises this rank's rows. So a program that gives every
rank the same ids does to all ranks together what it does to one process. Nothing is exchanged: what is wrong with the
ids or values is an error on every rank, too little room only where it is missing.
"""

from recfx.rows.arrow import batches, export_parquet, import_parquet_
from recfx.rows.statistics import Statistics, Summary, statistics
from recfx.rows.surgery import delete_, read, write_
from recfx.rows.views import Rows

__all__ = [
    "Rows",
    "Statistics",
    "Summary",
    "batches",
    "delete_",
    "export_parquet",
    "import_parquet_",
    "read",
    "statistics",
    "write_",
]
