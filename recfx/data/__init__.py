"""Files, arrays and rows in, packed batches out."""

from recfx.data.arrays import from_arrays
from recfx.data.batch_iterator import BatchIterator
from recfx.data.columns import Between, Column, FixedLen, OneOf, VarLen, finite, fixedlen, hashed, varlen
from recfx.data.python_rows import pack_rows
from recfx.data.reading import Reader, reader
from recfx.data.split import Split
from recfx.data.text.csv import Csv
from recfx.data.text.json_lines import JsonLines
from recfx.data.text.libsvm import Libsvm

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
