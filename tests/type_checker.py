"""Run-time type checker of the tests, which leaves the values of `Literal` to the library's own checks."""

import functools
import operator
import types
import typing

from beartype import beartype


def without_literals(hint):
    """Return a type with each `Literal` replaced by the types of its values."""
    if typing.get_origin(hint) is typing.Literal:
        return functools.reduce(operator.or_, {type(value) for value in typing.get_args(hint)})
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, map(without_literals, typing.get_args(hint)))
    return hint


def typecheck(function):
    """Check a function's arguments by its annotations, except for the values of `Literal`."""
    hints = getattr(function, "__annotations__", None)
    if not hints:
        return beartype(function)
    function.__annotations__ = {name: without_literals(hint) for name, hint in hints.items()}
    checked = beartype(function)
    # Restore the annotations, from which the command line reads its choices.
    function.__annotations__ = checked.__annotations__ = hints
    return checked
