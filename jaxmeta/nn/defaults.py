"""Default activations and initialisers of networks, as named functions.

Help texts and generated reference pages print defaults by name. JAX's own have none: `jax.nn.relu` prints as
an object at an address, and an initialiser as a local function of its factory.
"""

from typing import Any

import jax
from flax import linen
from jaxtyping import Array, PRNGKeyArray

_LECUN_NORMAL = linen.initializers.lecun_normal()
_TRUNCATED_NORMAL = linen.initializers.truncated_normal(0.01)


def relu(x: Array) -> Array:
    """Return max(x, 0)."""
    return jax.nn.relu(x)


def lecun_normal(key: PRNGKeyArray, shape: tuple[int, ...], *dtype: Any) -> Array:
    """Draw from a truncated normal distribution of variance 1/n for n inputs."""
    return _LECUN_NORMAL(key, shape, *dtype)


def narrow_normal(key: PRNGKeyArray, shape: tuple[int, ...], *dtype: Any) -> Array:
    """Draw from a truncated normal distribution of standard deviation 0.01, as MAML's official code does."""
    return _TRUNCATED_NORMAL(key, shape, *dtype)
