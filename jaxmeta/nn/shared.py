"""Collectives for a batch of examples that several devices share.

Each device computes the network's outputs for its shard of the examples. The meta-step decides whether
examples are sharded: it then runs its body on a mesh with the axis `EXAMPLES`. Outside of such a mesh the
number of shards is 1.
"""

import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Shaped

from jaxmeta.core import PyTree

EXAMPLES = "examples"


def num_shards() -> int:
    """Return the number of devices that share the examples of a task."""
    try:
        return lax.axis_size(EXAMPLES)
    except NameError:
        return 1


def shard(
    x: Shaped[Array, " n *shape"], mask: Bool[Array, " n"] | None
) -> tuple[Shaped[Array, " m *shape"], Bool[Array, " m"] | None]:
    """Return the examples of the running device and their mask, padded to shards of equal size."""
    devices, n = num_shards(), x.shape[0]
    size = -(-n // devices)
    padding = size * devices - n
    if padding:
        mask = jnp.ones(n, bool) if mask is None else mask
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        mask = jnp.pad(mask, (0, padding))
    start = lax.axis_index(EXAMPLES) * size
    x = lax.dynamic_slice_in_dim(x, start, size)
    return x, None if mask is None else lax.dynamic_slice_in_dim(mask, start, size)


def gather_shards(x: Shaped[Array, " m *shape"], n: int) -> Shaped[Array, " n *shape"]:
    """Return the shards of all devices as one batch of `n` examples, without the padding of `shard`."""
    return lax.all_gather(x, EXAMPLES, tiled=True)[:n]


def total(tree: PyTree, axes: str | tuple[str, ...] = EXAMPLES) -> PyTree:
    """Sum `tree` over the devices along the mesh axes `axes`."""
    # One collective for all leaves. On CPUs a collective blocks one thread of a pool that has as many threads
    # as the machine has cores, so that two collectives that two devices enter in different orders deadlock.
    flat, restore = ravel_pytree(tree)
    return restore(lax.psum(flat, axes))
