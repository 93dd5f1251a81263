"""Random orders of padded examples."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxmeta.core import Key


def random_order(key: Key, mask: Bool[Array, " n"]) -> Int[Array, " n"]:
    """Return the indices of the examples in random order, padding last.

    The order of the unmasked examples does not depend on the amount of padding.
    """
    ranks = jnp.maximum(jnp.cumsum(mask) - 1, 0)
    draws = jax.vmap(lambda rank: jax.random.uniform(jax.random.fold_in(key, rank)))(ranks)
    return jnp.argsort(jnp.where(mask, draws, 2.0))
