"""Files, arrays and rows in, packed batches out."""

from recfx.data.arrays import from_arrays
from recfx.data.batches import BatchIterator, Reader, reader
from recfx.data.columns import Between, Column, FixedLen, OneOf, VarLen, finite, fixedlen, hashed, varlen
from recfx.data.csv import Csv
from recfx.data.json_lines import JsonLines
from recfx.data.libsvm import Libsvm
from recfx.data.requests import pack_rows
from recfx.data.split import Split

__all__ = [
    "BatchIterator",
    "Between",
    "Column",
    "Csv",
    "FixedLen",
    "JsonLines",
    "Libsvm",
    "OneOf",
    "Reader",
    "Split",
    "VarLen",
    "finite",
    "fixedlen",
    "from_arrays",
    "hashed",
    "pack_rows",
    "reader",
    "varlen",
]
