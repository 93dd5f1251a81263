"""Validated arguments, as NumPy arrays of float64, of estimators that run once on the host.

A transferability score or a set of importance weights is computed once, from arrays in memory, and decides
what is trained afterwards: precision matters more than speed, and NumPy has float64 whatever JAX's precision
is set to.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxmeta.checks import ArgumentError

Values = Array | np.ndarray

# Rows of a bfloat16 softmax deviate from a sum of 1 by as much; logits, counts and percentages by far more.
_SUM_TOLERANCE = 1e-2


def numbers(values: Any, name: str) -> Shaped[np.ndarray, "..."]:
    """Return `values` as an array of real numbers."""
    try:
        array = np.asarray(values)
    except ValueError as error:  # nested lists of different lengths
        raise ArgumentError(name, f"cannot be converted to an array: {error}") from error
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise ArgumentError(name, f"got {array.dtype}; it must be real numbers")
    return array


def matrix(values: Values, name: str) -> Float[np.ndarray, "n d"]:
    """Return `values` as a float64 matrix with a row for each example."""
    array = numbers(values, name).astype(np.float64)
    if array.ndim != 2 or not array.size:
        raise ArgumentError(name, f"got shape {array.shape}; it must be (examples, dimensions), both above 0")
    if not np.isfinite(array).all():
        raise ArgumentError(name, "got NaN or infinity; every number must be finite")
    return array


def probabilities(values: Values, name: str) -> Float[np.ndarray, "n classes"]:
    """Return `values` as a float64 matrix whose rows are distributions, normalised to sums of exactly 1."""
    array = matrix(values, name)
    sums = array.sum(1, keepdims=True)
    if array.min() < 0 or np.abs(sums - 1).max() > _SUM_TOLERANCE:
        raise ArgumentError(
            name,
            f"got rows that sum to {sums.min():.4g} to {sums.max():.4g} with a smallest entry of "
            f"{array.min():.4g}; every row must be a distribution, such as a softmax",
        )
    return array / sums


def distribution(values: Values, name: str, classes: int) -> Float[np.ndarray, " classes"]:
    """Return `values` as one distribution over `classes`."""
    array = numbers(values, name)
    if array.shape != (classes,):
        raise ArgumentError(
            name, f"got shape {array.shape}; it must be ({classes},), one probability for each class"
        )
    return probabilities(array[None], name)[0]


def labels(values: Values, name: str, *, rows: int, classes: int | None = None) -> Int[np.ndarray, " n"]:
    """Return `values` as integer classes, one for each of `rows` examples."""
    array = numbers(values, name)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ArgumentError(name, f"got {array.dtype}; classes must be integers")
    if not array.size:
        raise ArgumentError(name, "got no examples; there must be at least one")
    if array.shape != (rows,):
        raise ArgumentError(
            name, f"got shape {array.shape}; it must be ({rows},), one class for each example"
        )
    if array.min() < 0 or (classes is not None and array.max() >= classes):
        allowed = "at least 0" if classes is None else f"from 0 to {classes - 1}"
        raise ArgumentError(name, f"got classes from {array.min()} to {array.max()}; they must be {allowed}")
    return array.astype(np.int64)
