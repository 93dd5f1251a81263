"""Argument validation, before anything is traced.

Traced arrays pass the checks of values, which they do not have yet.
"""

import json
import math
import operator
import types
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

# The largest int32, the type of step numbers, sizes and array indices on a device.
LARGEST = 2**31 - 1
# The largest seed that both JAX and NumPy accept.
LARGEST_SEED = 2**63 - 1


class ArgumentError(ValueError):
    """The error for an argument that is not allowed, with the message `name: problem`.

    Both parts are attributes, so that the command line can name the flag instead of the argument.

    Args:
      name: name of the argument, or names separated by commas.
      problem: given value, allowed values, and what to do.

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
    """The error for an argument that names a missing file or folder."""


class MissingPackageError(ImportError):
    """The error for a missing optional package; the message has the command that installs it."""


class NotAFolderError(ArgumentError, NotADirectoryError):
    """The error for an argument that names a file where it must name a folder."""


def check_count(name: str, value: Any, least: int = 1, most: int = LARGEST) -> None:
    """Check that `value` is a whole number from `least` to `most`.

    Raises:
      ArgumentError: `value` is something else; the error names the argument `name`.

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
        raise ArgumentError(name, f"got {format_value(value)}; it must be a whole number of at least {least}")
    _check_range(name, value, whole, least, most)


def check_number(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, above: float | None = None
) -> None:
    """Check that `value` is a finite number from `least` to `most`, and above `above`.

    Raises:
      ArgumentError: `value` is something else; the error names the argument `name`.

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
        raise ArgumentError(name, f"got {format_value(value)}; it must be a finite number")
    if above is not None and not number > above:
        wanted = "positive" if above == 0 else f"above {above}"
        raise ArgumentError(name, f"got {format_value(value)}; it must be {wanted}")
    _check_range(name, value, number, least, most)


def check_word(name: str, value: Any, known: Iterable[Any]) -> None:
    """Check that `value` is one of `known`.

    Raises:
      ArgumentError: `value` is something else; the error names the argument `name`.

    Examples:
      >>> check_word("order", "third", ("second", "first"))
      Traceback (most recent call last):
      jaxmeta.checks.ArgumentError: order: got 'third'; it must be one of 'second', 'first'
    """
    known = tuple(known)
    # Types are compared, too, because True == 1.
    if not any(type(value) is type(word) and value == word for word in known):
        raise ArgumentError(
            name, f"got {format_value(value)}; it must be one of {', '.join(map(repr, known))}"
        )


def check_function(name: str, value: Any, wanted: str = "a function") -> None:
    """Check that `value` can be called.

    Raises:
      ArgumentError: `value` is something else; the error names the argument `name`.
    """
    if not callable(value):
        raise ArgumentError(name, f"got {described(value)}; it must be {wanted}")


def check_kind(name: str, value: Any, kind: type | types.UnionType, wanted: str) -> None:
    """Check that `value` is of type `kind`, which the message describes as `wanted`.

    Raises:
      ArgumentError: `value` is something else; the error names the argument `name`.
    """
    if not isinstance(value, kind):
        raise ArgumentError(name, f"got {described(value)}; it must be {wanted}{call_of(value)}")


def is_optimizer(value: Any) -> bool:
    """Return whether `value` has the functions `init` and `update` of an optax transformation.

    Examples:
      >>> import optax
      >>> is_optimizer(optax.sgd(0.1)), is_optimizer(optax.sgd)
      (True, False)
    """
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def check_optimizer(name: str, value: Any) -> None:
    """Check that `value` is an optax transformation, or has its functions `init` and `update`.

    Raises:
      ArgumentError: `value` is something else; the error names the argument `name`.

    Examples:
      >>> check_optimizer("optimizer", 1e-3)
      Traceback (most recent call last):
      jaxmeta.checks.ArgumentError: optimizer: got 0.001 (float); it must be an optax transformation, such \
as optax.adam(1e-3)
    """
    if not is_optimizer(value):
        wanted = "an optax transformation, such as optax.adam(1e-3)"
        raise ArgumentError(name, f"got {described(value)}; it must be {wanted}{call_of(value)}")


def check_key(name: str, key: Any) -> None:
    """Check that `key` is a single key of `jax.random`, typed or raw.

    Raises:
      ArgumentError: `key` is something else; the error names the argument `name`.

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
      ArgumentError: `value` is something else; the error names the argument `name`.
    """
    if not isinstance(value, tuple | list):
        raise ArgumentError(
            name, f"got {format_value(value)}; it must be a tuple with the width of each layer"
        )
    for width in value:
        check_count(name, width)


def check_size(names: str, sizes: Iterable[int], what: str) -> None:
    """Check that an array with these sizes has at most as many values as an int32 can index.

    Args:
      names: names of the arguments that determine `sizes`.
      sizes: factors of the number of values.
      what: name of the array in the message.

    Raises:
      ArgumentError: there are more values; the error names the arguments `names`.

    Examples:
      >>> check_size("x", (2**40,), "x")
      Traceback (most recent call last):
      jaxmeta.checks.ArgumentError: x: got x of 1099511627776 values; at most 2147483647 fit in an array
    """
    sizes = tuple(map(int, sizes))
    if math.prod(sizes) > LARGEST:
        product = " x ".join(map(str, sizes))
        raise ArgumentError(names, f"got {what} of {product} values; at most {LARGEST} fit in an array")


def check_real(name: str, values: Any, *, whole: bool = False) -> None:
    """Check that `values` is an array of real numbers, or, if `whole`, of integers.

    Raises:
      ArgumentError: `values` is something else; the error names the argument `name`.
    """
    number = jax.numpy.integer if whole else jax.numpy.number
    dtype = getattr(values, "dtype", None)
    if dtype is None or not jax.numpy.issubdtype(dtype, number) or dtype.kind == "c":
        wanted = "integers" if whole else "real numbers"
        raise ArgumentError(name, f"got {format_value(values)}; it must be an array of {wanted}")


def check_labels(
    name: str, labels: Any, n: int | None = None, classes: int | None = None, mask: Any = None
) -> None:
    """Check that `labels` has an integer class in [0, `classes`) for each of `n` examples.

    Args:
      name: name of the argument.
      labels: labels, one for each example.
      n: number of examples; None for any.
      classes: number of classes; None for any labels.
      mask: mask whose False marks padding, which may have any label.

    Raises:
      ArgumentError: `labels` is something else; the error names the argument `name`.
    """
    check_real(name, labels, whole=True)
    if labels.ndim != 1 or (n is not None and labels.shape != (n,)):
        wanted = "(n,)" if n is None else f"({n},)"
        raise ArgumentError(name, f"got shape {labels.shape}; it must be {wanted}, one class per example")
    if classes is not None:
        check_slots(name, labels, classes, mask)


def check_slots(name: str, labels: Any, classes: int | None, mask: Any = None) -> None:
    """Check that class labels of any shape are in [0, `classes`), where their values are known.

    Labels that are traced, are not integers, or are on devices of other processes pass.

    Args:
      name: name of the argument.
      labels: class labels.
      classes: number of classes. With None, no class may be below 0, and class 0 must have an example,
        because labels counted from 1 would seem to have one class more.
      mask: mask whose False marks padding, which may have any label.

    Raises:
      ArgumentError: `labels` is something else; the error names the argument `name`.

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
    # In NumPy, because inside a compiled function JAX traces even operations on constants.
    known = np.asarray(labels)
    if mask is not None and np.shape(mask) == known.shape:
        known = known[np.asarray(mask)]
    if not known.size:
        return
    low, high = int(known.min()), int(known.max())
    if low < 0 or (classes is not None and high >= classes):
        wanted = "at least 0" if classes is None else f"from 0 to {classes - 1}"
        raise ArgumentError(name, f"got classes from {low} to {high}; they must be {wanted}")
    if classes is None and low > 0:
        raise ArgumentError(
            name,
            f"got classes from {low} to {high}; they must be counted from 0, to {high - low} here. If class "
            f"0 has no example, pass the number of classes: Batch(…, ways={high + 1})",
        )


def check_finite(name: str, values: Any) -> None:
    """Check that a floating-point array contains neither NaN nor infinity.

    Raises:
      ArgumentError: `values` is something else; the error names the argument `name`.
    """
    if isinstance(values, jax.core.Tracer) or not jax.numpy.issubdtype(values.dtype, np.inexact):
        return
    count = values.size - int(np.isfinite(values).sum())
    if count:
        raise ArgumentError(
            name, f"got NaN or infinity in {count} of {values.size} values; all must be finite"
        )


def parsed_json(text: str) -> Any:
    """Parse JSON from an untrusted file.

    Raises:
      ValueError: `text` is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def format_value(value: Any) -> str:
    """Return `value` as at most 80 characters of one line, for an error message."""
    if isinstance(value, jax.Array | np.ndarray) and value.ndim:
        return f"an array of shape {value.shape} and type {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def described(value: Any) -> str:
    """Return `value` with its type, for an error message about a value of a wrong type.

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
        return format_value(value)
    name = type(value).__name__
    if isinstance(value, bool | int | float | complex | str | bytes):
        return f"{format_value(value)} ({name})"
    if type(value) in (tuple, list, dict, set) and len(repr(value)) <= 40:
        return format_value(value)
    # The contents of a container of arrays or functions would fill the message.
    return f"{name}(…)"


def _is_function(value: Any) -> bool:
    return isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType)


def call_of(value: Any) -> str:
    """Return a hint, to be appended to an error, to call a class or function that was given; else ""."""
    is_callable = isinstance(value, type) or _is_function(value)
    return f"; call {value.__name__}(…) to make one" if is_callable else ""


def join_names(names: Iterable[str], most: int = 5, separator: str = ", ") -> str:
    """Join the first `most` of `names` for an error message, with an ellipsis in place of the others.

    Examples:
      >>> join_names(["a", "b", "c"]), join_names(["a", "b", "c"], 2)
      ('a, b, c', 'a, b, …')
    """
    names = [*names]
    return separator.join([*names[:most], *(["…"] if len(names) > most else [])])


def _check_range(name: str, value: Any, number: float, least: float, most: float) -> None:
    if number < least:
        raise ArgumentError(name, f"got {format_value(value)}; it must be at least {least}")
    if number > most:
        raise ArgumentError(name, f"got {format_value(value)}; it must be at most {most}")
