"""Checks of arguments that several modules share, and the words for values in errors."""

from __future__ import annotations

import functools
import inspect
import numbers
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["check_choice", "check_function", "check_int", "check_number", "check_type", "names", "said", "signature_of"]

MOST_NAMES = 12  # in one error


def said(value: Any) -> str:
    """A value in a few words, for the `got` of an error, without items and addresses.

    Example:  >>> said(len), said({"a": 1}), said([0.5, "x"]), said(1e3)
              ('the function len', "a dict of ['a']", 'a list of float, str', '1000.0')
    """
    if isinstance(value, type):
        return f"the class {_name(value)}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} {value.dtype} {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{'a dict' if type(value) is dict else _name(type(value))} of {names(value)}"
    if type(value) in (list, tuple):
        kinds = dict.fromkeys(_name(type(item)) for item in value)
        return f"{'a list' if type(value) is list else 'a tuple'} of {', '.join(kinds) or 'nothing'}"
    if isinstance(value, functools.partial):  # the functions of a step
        return said(value.func)
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    if value is None or isinstance(value, str | int | float):
        try:
            text = repr(value)
        except ValueError:  # Python prints no longer ones
            return f"an int of {value.bit_length()} bits"  # type: ignore[union-attr]
        return text if len(text) <= 80 else f"{text[:77]}..."
    return _name(type(value))


def names(of: Mapping[Any, Any]) -> str:
    """The keys as a list, cut after a dozen."""
    keys = list(of)
    more = f" and {len(keys) - MOST_NAMES} more" if len(keys) > MOST_NAMES else ""
    return f"{keys[:MOST_NAMES]}{more}"


def check_choice(name: str, value: object, choices: Sequence[object], *, others: str = "") -> None:
    """Raises ValueError when the value is not one of the choices.

    Args:     others: further accepted values for the error, such as " or Csv(...)".
    Example:  >>> check_choice("side", "top", ("left", "right"))
              Traceback (most recent call last):
              ValueError: side: got 'top', expected one of ('left', 'right').
    """
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {choices}{others}.")


def check_int(name: str, value: object, least: int) -> None:
    """Raises TypeError when it is not an int (neither a bool nor a numpy integer), ValueError when it is below `least`.

    Example:  >>> check_int("every", 0, 1)
              Traceback (most recent call last):
              ValueError: every: got 0, expected at least 1.
    """
    if type(value) is not int:
        raise TypeError(f"{name}: got {value!r}, expected an int.")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}.")


def check_number(name: str, value: object) -> None:
    """Raises TypeError when it is not a real number of Python or numpy (a bool is not one).

    Example:  >>> check_number("eps", "1e-8")
              Traceback (most recent call last):
              TypeError: eps: got '1e-8', expected a number.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: got {said(value)}, expected a number.")


def check_type(name: str, value: object, kind: type | types.UnionType, advice: str = "") -> None:
    """Raises TypeError, with the advice (whole sentences), when the value is not of that type.

    Example:  >>> check_type("run", None, dict, "Give a dict.")
              Traceback (most recent call last):
              TypeError: run: got None, expected dict. Give a dict.
    """
    if not isinstance(value, kind):
        kinds = kind.__args__ if isinstance(kind, types.UnionType) else (kind,)
        expected = " or ".join("None" if k is types.NoneType else _name(k) for k in kinds)
        raise TypeError(f"{name}: got {said(value)}, expected {expected}. {advice}".rstrip())


def check_function(name: str, value: Any, takes: str, gives: str, advice: str = "") -> None:
    """Raises TypeError when it is not a function, or cannot be called with as many arguments as `takes` names.

    Args:     takes: such as "a, b" or, where it may take one more, "a, b[, c]".
    Example:  >>> check_function("loss", "bce", "logit, label", "f32 [B, 1]")
              Traceback (most recent call last):
              TypeError: loss: got 'bce', expected a function (logit, label) -> f32 [B, 1].
    """
    expected = f"expected a function ({takes}) -> {gives}. {advice}".rstrip()
    if not callable(value):
        raise TypeError(f"{name}: got {said(value)}, {expected}")
    signature = signature_of(value)
    if signature is None:
        return
    if not any(_binds(signature, arguments) for arguments in {takes.partition("[")[0], takes}):
        raise TypeError(f"{name}: got {said(value)} that takes {signature}, {expected}")


def signature_of(function: Any) -> inspect.Signature | None:
    """The signature of a function or Module; None when it is unknown, as for some functions written in C."""
    try:  # Module.__call__ accepts anything
        return inspect.signature(getattr(function, "forward", function))
    except (TypeError, ValueError):
        return None


def _binds(signature: inspect.Signature, arguments: str) -> bool:
    try:
        signature.bind(*filter(None, arguments.split(",")))  # "" names no argument
    except TypeError:
        return False
    return True


def _name(kind: type) -> str:
    """The name of a class, with its module unless it is builtin. A class of recfx has the name that programs import."""
    if kind is Mapping:
        return "a dict"
    if kind.__module__ == "builtins":
        return kind.__qualname__
    package = kind.__module__.rpartition(".")[0]
    is_exported = package.startswith("recfx") and getattr(sys.modules[package], kind.__qualname__, None) is kind
    return f"{package if is_exported else kind.__module__}.{kind.__qualname__}"
