"""Random orders of examples some of which are padding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxmeta.core import Key


def random_order(key: Key, mask: Bool[Array, " n"]) -> Int[Array, " n"]:
    """Indices of the examples in random order, padding last.

    What is drawn depends on the examples that there are, not on how much padding is among them.
    """
    ranks = jnp.maximum(jnp.cumsum(mask) - 1, 0)
    draws = jax.vmap(lambda rank: jax.random.uniform(jax.random.fold_in(key, rank)))(ranks)
    return jnp.argsort(jnp.where(mask, draws, 2.0))
