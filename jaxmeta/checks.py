"""Argument validation, before anything is traced.

Traced values are let pass, since they have no value yet.
"""

import json
import math
import operator
import types
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

# The largest int32: what steps, shapes and the places of an array on a device are counted in.
LARGEST = 2**31 - 1
# The largest that JAX and NumPy both take for a seed.
LARGEST_SEED = 2**63 - 1


class ArgumentError(ValueError):
    """Raise for an argument that cannot be used.

    The message is `name: problem`. What speaks to a user in other words, such as the command line of its
    flags, reads the two parts.

    Args:
      name: of the argument; of several, with commas between them.
      problem: what was given, what is allowed, what to do.

    Examples:
      >>> raise ArgumentError("shots", "got 0; it must be at least 1")
      Traceback (most recent call last):
      jaxmeta.checks.ArgumentError: shots: got 0; it must be at least 1
    """

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name}: {problem}")
        self.name: str = name
        self.problem: str = problem

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.problem)


class MissingFileError(ArgumentError, FileNotFoundError):
    """Raise for an argument that names a file or folder that is not there."""


class MissingPackageError(ImportError):
    """Raise where an optional package is not installed; the message has the command that installs it."""


class NotAFolderError(ArgumentError, NotADirectoryError):
    """Raise for an argument that names a file where it must name a folder."""


def check_count(name: str, value: Any, least: int = 1, most: int = LARGEST) -> None:
    """Check that `value` is a whole number from `least` to `most`.

    Raises:
      ValueError: that calls `value` by `name`.

    Examples:
      >>> check_count("shots", 0)
      Traceback (most recent call last):
      jaxmeta.checks.ArgumentError: shots: got 0; it must be at least 1
    """
    try:
        whole = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None:
        raise ArgumentError(name, f"got {shown(value)}; it must be a whole number of at least {least}")
    _check_range(name, value, whole, least, most)


def check_number(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, above: float | None = None
) -> None:
    """Check that `value` is a finite number from `least` to `most`, and above `above`.

    Raises:
      ValueError: that calls `value` by `name`.

    Examples:
      >>> check_number("damping", float("nan"), 0)
      Traceback (most recent call last):
      jaxmeta.checks.ArgumentError: damping: got nan; it must be a finite number
    """
    if isinstance(value, jax.core.Tracer) and not value.ndim:
        return
    try:
        number = math.nan if isinstance(value, str | bytes) or np.ndim(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ArgumentError(name, f"got {shown(value)}; it must be a finite number")
    if above is not None and not number > above:
        wanted = "positive" if above == 0 else f"above {above}"
        raise ArgumentError(name, f"got {shown(value)}; it must be {wanted}")
    _check_range(name, value, number, least, most)


def check_word(name: str, value: Any, known: Iterable[Any]) -> None:
    """Check that `value` is one of `known`.

    Raises:
      ValueError: that calls `value` by `name`.

    Examples:
      >>> check_word("order", "third", ("second", "first"))
      Traceback (most recent call last):
      jaxmeta.checks.ArgumentError: order: got 'third'; it must be one of 'second', 'first'
    """
    known = tuple(known)
    if not any(type(value) is type(one) and value == one for one in known):
        raise ArgumentError(name, f"got {shown(value)}; it must be one of {', '.join(map(repr, known))}")


def check_function(name: str, value: Any, wanted: str = "a function") -> None:
    """Check that `value` can be called.

    Raises:
      ValueError: that calls `value` by `name`.
    """
    if not callable(value):
        raise ArgumentError(name, f"got {described(value)}; it must be {wanted}")


def check_kind(name: str, value: Any, kind: type | types.UnionType, wanted: str) -> None:
    """Check that `value` is of type `kind`, which a user knows as `wanted`.

    Raises:
      ValueError: that calls `value` by `name`.
    """
    if not isinstance(value, kind):
        raise ArgumentError(name, f"got {described(value)}; it must be {wanted}{call_of(value)}")


def check_optimizer(name: str, value: Any) -> None:
    """Check that `value` is an optax transformation, or has its functions `init` and `update`.

    Raises:
      ValueError: that calls `value` by `name`.

    Examples:
      >>> check_optimizer("optimizer", 1e-3)
      Traceback (most recent call last):
      jaxmeta.checks.ArgumentError: optimizer: got 0.001 (float); it must be an optax transformation, such \
as optax.adam(1e-3)
    """
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        wanted = "an optax transformation, such as optax.adam(1e-3)"
        raise ArgumentError(name, f"got {described(value)}; it must be {wanted}{call_of(value)}")


def check_key(name: str, key: Any) -> None:
    """Check that `key` is a single key of `jax.random`, typed or raw.

    Raises:
      ValueError: that calls `key` by `name`.

    Examples:
      >>> check_key("key", 7)
      Traceback (most recent call last):
      jaxmeta.checks.ArgumentError: key: got 7 (int); it must be a single key of JAX, such as \
jax.random.key(7)
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and shape is not None:
        typed = jax.numpy.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
        if typed or (dtype == np.uint32 and len(shape) == 1):
            return
    seed = key if type(key) is int and key >= 0 else 0
    raise ArgumentError(
        name, f"got {described(key)}; it must be a single key of JAX, such as jax.random.key({seed})"
    )


def check_widths(name: str, value: Any) -> None:
    """Check that `value` is a tuple or list of widths, one for each layer.

    Raises:
      ValueError: that calls `value` by `name`.
    """
    if not isinstance(value, tuple | list):
        raise ArgumentError(name, f"got {shown(value)}; it must be a tuple, with the width of each layer")
    for width in value:
        check_count(name, width)


def check_size(names: str, sizes: Iterable[int], what: str) -> None:
    """Check that an array of these sizes has no more values than its places can be counted in.

    Args:
      names: of the arguments that `sizes` come from.
      sizes: whose product it has.
      what: it is.

    Raises:
      ValueError: that calls them by `names`.

    Examples:
      >>> check_size("x", (2**40,), "x")
      Traceback (most recent call last):
      jaxmeta.checks.ArgumentError: x: got x of 1099511627776 values; at most 2147483647 fit in an array
    """
    sizes = tuple(map(int, sizes))
    if math.prod(sizes) > LARGEST:
        said = " x ".join(map(str, sizes))
        raise ArgumentError(names, f"got {what} of {said} values; at most {LARGEST} fit in an array")


def check_real(name: str, values: Any, *, whole: bool = False) -> None:
    """Check that `values` is an array of real numbers, or of `whole` ones; of a traced one the type counts.

    Raises:
      ValueError: that calls `values` by `name`.
    """
    number = jax.numpy.integer if whole else jax.numpy.number
    dtype = getattr(values, "dtype", None)
    if dtype is None or not jax.numpy.issubdtype(dtype, number) or dtype.kind == "c":
        wanted = "integers" if whole else "real numbers"
        raise ArgumentError(name, f"got {shown(values)}; it must be an array of {wanted}")


def check_labels(
    name: str, labels: Any, n: int | None = None, classes: int | None = None, mask: Any = None
) -> None:
    """Check that `labels` has an integer class in [0, `classes`) for each of `n` examples.

    Args:
      name: of the argument.
      labels: one for each example.
      n: number of examples; None for any.
      classes: their number; None for any labels.
      mask: False marks padding, whose labels may be anything.

    Raises:
      ValueError: that calls `labels` by `name`.
    """
    check_real(name, labels, whole=True)
    if labels.ndim != 1 or (n is not None and labels.shape != (n,)):
        wanted = "(n,)" if n is None else f"({n},)"
        raise ArgumentError(name, f"got shape {labels.shape}; it must be {wanted}, one class an example")
    if classes is not None:
        check_slots(name, labels, classes, mask)


def check_slots(name: str, labels: Any, classes: int | None, mask: Any = None) -> None:
    """Check that class labels of any shape are in [0, `classes`), where their values are known.

    Labels that are traced, of no whole numbers, or on devices of another process are let pass.

    Args:
      name: of the argument.
      labels: class labels.
      classes: their number. Where it is None, no class may be below 0, and some example must be of class 0:
        labels that are counted from 1 would seem to have one class more.
      mask: False marks padding, whose labels may be anything.

    Raises:
      ValueError: that calls `labels` by `name`.

    Examples:
      >>> check_slots("support", np.array([1, 2, 3]), 3)
      Traceback (most recent call last):
      jaxmeta.checks.ArgumentError: support: got classes from 1 to 3; they must be from 0 to 2
    """
    for each in (labels, mask):
        if isinstance(each, jax.core.Tracer) or not getattr(each, "is_fully_addressable", True):
            return
    if not jax.numpy.issubdtype(getattr(labels, "dtype", object), np.integer):
        return
    # By NumPy: inside of a compiled function what JAX computes is traced, be it of constants.
    found = np.asarray(labels)
    if mask is not None and np.shape(mask) == found.shape:
        found = found[np.asarray(mask)]
    if not found.size:
        return
    low, high = int(found.min()), int(found.max())
    if low < 0 or (classes is not None and high >= classes):
        wanted = "at least 0" if classes is None else f"from 0 to {classes - 1}"
        raise ArgumentError(name, f"got classes from {low} to {high}; they must be {wanted}")
    if classes is None and low > 0:
        raise ArgumentError(
            name,
            f"got classes from {low} to {high}; they are counted from 0, to {high - low} here. Where there "
            f"is no example of class 0, say how many there are: Batch(…, ways={high + 1})",
        )


def check_finite(name: str, values: Any) -> None:
    """Check that floating-point arrays have no NaN or infinity in them.

    Raises:
      ValueError: that calls `values` by `name`.
    """
    if isinstance(values, jax.core.Tracer) or not jax.numpy.issubdtype(values.dtype, np.inexact):
        return
    wrong = values.size - int(np.isfinite(values).sum())
    if wrong:
        raise ArgumentError(
            name, f"got NaN or infinity in {wrong} of {values.size} places; all must be finite"
        )


def parsed_json(text: str) -> Any:
    """What a file of JSON holds, which others may have written.

    Raises:
      ValueError: it is none, or nested so deeply that it is made to do harm.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def shown(value: Any) -> str:
    """`value` in an error's message, of one line however large it is."""
    if isinstance(value, jax.Array | np.ndarray) and value.ndim:
        return f"an array of shape {value.shape} and type {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def described(value: Any) -> str:
    """`value` in an error's message where one of another kind is due: with its type, or as what it is.

    Examples:
      >>> described(0.5), described(max), described(dict), described(json), described([0] * 99)
      ('0.5 (float)', 'the function max', 'the class dict', 'the module json', 'list(…)')
    """
    if isinstance(value, types.ModuleType):
        return f"the module {value.__name__}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if _is_function(value):
        return f"the function {value.__name__}"
    if value is None or isinstance(value, jax.Array | np.ndarray):
        return shown(value)
    name = type(value).__name__
    if isinstance(value, bool | int | float | complex | str | bytes):
        return f"{shown(value)} ({name})"
    if type(value) in (tuple, list, dict, set) and len(repr(value)) <= 40:
        return shown(value)
    # What a container of arrays or functions holds would fill the message.
    return f"{name}(…)"


def _is_function(value: Any) -> bool:
    return isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType)


def call_of(value: Any) -> str:
    """What to do with a class or function that was given in the place of what it makes."""
    made = isinstance(value, type) or _is_function(value)
    return f"; call {value.__name__}(…) to make one" if made else ""


def some(names: Iterable[str], most: int = 5, separator: str = ", ") -> str:
    """The first `most` of `names` for an error's message, with an ellipsis in place of any others.

    Examples:
      >>> some(["a", "b", "c"]), some(["a", "b", "c"], 2)
      ('a, b, c', 'a, b, …')
    """
    names = [*names]
    return separator.join([*names[:most], *(["…"] if len(names) > most else [])])


def _check_range(name: str, value: Any, number: float, least: float, most: float) -> None:
    if number < least:
        raise ArgumentError(name, f"got {shown(value)}; it must be at least {least}")
    if number > most:
        raise ArgumentError(name, f"got {shown(value)}; it must be at most {most}")
