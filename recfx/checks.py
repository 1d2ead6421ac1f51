"""What several modules ask of their arguments."""

from __future__ import annotations

__all__ = ["check_int"]


def check_int(name: str, value: object, least: int) -> None:
    """Raises TypeError when it is no int (a flag is none, nor one of numpy's), ValueError when it is below the least.

    Example:  >>> check_int("every", 0, 1)
              Traceback (most recent call last):
              ValueError: every: got 0, expected at least 1.
    """
    if type(value) is not int:
        raise TypeError(f"{name}: got {value!r}, expected an int.")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}.")
