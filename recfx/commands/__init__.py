"""The commands of `recfx`, a module each."""
