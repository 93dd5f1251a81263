"""Sampling without replacement inside compiled code."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32


def ordered_subset(bits: UInt32[Array, " m"], bound: Int[Array, ""]) -> Int[Array, " m"]:
    """Return m distinct integers of [0, bound) in uniformly random order.

    These are the first m steps of the Fisher–Yates shuffle (step i swaps positions i and j_i, j_i uniform in
    [i, bound)) without building the array of `bound` integers: the value at position j_i is computed by
    following the earlier swaps backwards. The cost is O(m²), independent of `bound`, which may be traced; a
    permutation would cost O(bound log bound). Reducing 32 bits modulo the bound favours no value by more
    than a factor 1 + bound/2³².

    Args:
      bits: one random number per integer.
      bound: exclusive upper bound, at least m.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> bits = jax.random.bits(jax.random.key(0), (4,), jnp.uint32)
      >>> sorted(ordered_subset(bits, jnp.int32(4)).tolist())
      [0, 1, 2, 3]
    """
    step = jnp.arange(bits.shape[0], dtype=jnp.int32)
    swapped = step + (bits % (bound - step).astype(jnp.uint32)).astype(jnp.int32)

    def before(back: Int[Array, ""], position: Int[Array, " m"]) -> Int[Array, " m"]:
        earlier = bits.shape[0] - 2 - back
        return jnp.where((step > earlier) & (position == swapped[earlier]), earlier, position)

    # A loop instead of an unrolled chain, which XLA would fuse into the gather that uses the result and
    # recompute for every pixel.
    return jax.lax.fori_loop(0, bits.shape[0] - 1, before, swapped)
