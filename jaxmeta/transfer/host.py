"""Arguments of the estimators that run once, on the host: checked, and as NumPy arrays of float64.

A transferability score or a set of importance weights is computed once, from arrays that are already
there, and decides what is trained afterwards: exact linear algebra is worth more than a compiled one, and
NumPy has float64 whatever JAX is set to.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxmeta.checks import ArgumentError

Values = Array | np.ndarray

# Rows of a bfloat16 softmax are off by as much; logits, counts and percentages are off by far more.
_SUM_TOLERANCE = 1e-2


def numbers(values: Any, name: str) -> Shaped[np.ndarray, "..."]:
    """`values` as an array of real numbers."""
    try:
        found = np.asarray(values)
    except ValueError as error:  # a list of lists that are not of one length
        raise ArgumentError(name, f"got what is no array ({error})") from error
    if not (jnp.issubdtype(found.dtype, jnp.floating) or jnp.issubdtype(found.dtype, jnp.integer)):
        raise ArgumentError(name, f"got {found.dtype}; it must be real numbers")
    return found


def matrix(values: Values, name: str) -> Float[np.ndarray, "n d"]:
    """`values` as one row an example."""
    found = numbers(values, name).astype(np.float64)
    if found.ndim != 2 or not found.size:
        raise ArgumentError(name, f"got shape {found.shape}; it must be (examples, dimensions), both above 0")
    if not np.isfinite(found).all():
        raise ArgumentError(name, "got NaN or infinity; every number must be finite")
    return found


def probabilities(values: Values, name: str) -> Float[np.ndarray, "n classes"]:
    """`values` as one distribution a row, which sums to 1 exactly where its dtype made it nearly so."""
    found = matrix(values, name)
    sums = found.sum(1, keepdims=True)
    if found.min() < 0 or np.abs(sums - 1).max() > _SUM_TOLERANCE:
        raise ArgumentError(
            name,
            f"got rows that sum to {sums.min():.4g} to {sums.max():.4g} with a smallest entry of "
            f"{found.min():.4g}; every row must be a distribution, as of softmax",
        )
    return found / sums


def distribution(values: Values, name: str, classes: int) -> Float[np.ndarray, " classes"]:
    """`values` as one distribution over `classes`."""
    found = numbers(values, name)
    if found.shape != (classes,):
        raise ArgumentError(
            name, f"got shape {found.shape}; it must be ({classes},), one probability a class"
        )
    return probabilities(found[None], name)[0]


def labels(values: Values, name: str, *, rows: int, classes: int | None = None) -> Int[np.ndarray, " n"]:
    """`values` as one class an example."""
    found = numbers(values, name)
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise ArgumentError(name, f"got {found.dtype}; classes must be integers")
    if not found.size:
        raise ArgumentError(name, "got no example")
    if found.shape != (rows,):
        raise ArgumentError(name, f"got shape {found.shape}; it must be ({rows},), one class an example")
    if found.min() < 0 or (classes is not None and found.max() >= classes):
        allowed = "not be negative" if classes is None else f"be 0 to {classes - 1}"
        raise ArgumentError(name, f"got classes {found.min()} to {found.max()}; they must {allowed}")
    return found.astype(np.int64)
