"""The commands of `recfx`, one module each."""
