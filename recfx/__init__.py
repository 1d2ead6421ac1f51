"""recfx: click-through-rate training as pure functions over an explicit hash-table state."""

__version__ = "0.1.0"
