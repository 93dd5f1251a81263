"""Type checks at run time that leave words to the library's own checks."""

import functools
import operator
import types
import typing

from beartype import beartype


def plain(hint):
    """Return a type with the types of its words in the place of `Literal`."""
    if typing.get_origin(hint) is typing.Literal:
        return functools.reduce(operator.or_, {type(word) for word in typing.get_args(hint)})
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, map(plain, typing.get_args(hint)))
    return hint


def checked(function):
    """Check a function's arguments by its annotations, whose words the function refuses itself."""
    hints = getattr(function, "__annotations__", None)
    if not hints:
        return beartype(function)
    function.__annotations__ = {name: plain(hint) for name, hint in hints.items()}
    found = beartype(function)
    # The command line reads choices from annotations.
    function.__annotations__ = found.__annotations__ = hints
    return found
