"""Files in, packed batches out."""

from recfx.data.columns import Column, FixedLen, VarLen, fixedlen, varlen
from recfx.data.reader import BatchIterator, Reader, orc_reader

__all__ = ["BatchIterator", "Column", "FixedLen", "Reader", "VarLen", "fixedlen", "orc_reader", "varlen"]
