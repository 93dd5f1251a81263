"""Drawing without replacement, inside compiled code."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32


def ordered_subset(bits: UInt32[Array, " m"], bound: Int[Array, ""]) -> Int[Array, " m"]:
    """m distinct integers of [0, bound) in uniformly random order, without touching all of them.

    The first m steps of the Fisher–Yates shuffle (step i swaps places i and j_i, j_i uniform in
    [i, bound)), with the array of `bound` places never written down: what step i takes from place
    j_i is found by following the earlier swaps backwards. O(m²) and independent of `bound`, which
    may be traced, where a permutation would cost O(bound log bound). Reducing 32 bits modulo the
    bound favours no value by more than a factor 1 + bound/2³².

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> bits = jax.random.bits(jax.random.key(0), (4,), jnp.uint32)
      >>> sorted(ordered_subset(bits, jnp.int32(4)).tolist())
      [0, 1, 2, 3]
    """
    step = jnp.arange(bits.shape[0], dtype=jnp.int32)
    swapped = step + (bits % (bound - step).astype(jnp.uint32)).astype(jnp.int32)

    def before(back: Int[Array, ""], place: Int[Array, " m"]) -> Int[Array, " m"]:
        earlier = bits.shape[0] - 2 - back
        return jnp.where((step > earlier) & (place == swapped[earlier]), earlier, place)

    # A loop and not an unrolled chain: XLA would fuse the chain into the gather that uses the result and
    # compute it anew for every pixel.
    return jax.lax.fori_loop(0, bits.shape[0] - 1, before, swapped)
