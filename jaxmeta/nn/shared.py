"""One batch of examples on several devices, each of which computes the network's outputs for its share.

Where this happens is decided by the meta-step, which runs its body on a mesh with the axis `EXAMPLES`.
Outside of it, or with one device a task, all of this does nothing.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Shaped

from jaxmeta.core import PyTree

EXAMPLES = "examples"


def num_shards() -> int:
    """How many devices share the examples of a task."""
    try:
        return lax.axis_size(EXAMPLES)
    except NameError:
        return 1


def own_share(
    x: Shaped[Array, " n *shape"], mask: Bool[Array, " n"] | None
) -> tuple[Shaped[Array, " m *shape"], Bool[Array, " m"] | None]:
    """The running device's examples, as many as every other's, and which of them are no padding."""
    devices, n = num_shards(), x.shape[0]
    own = -(-n // devices)
    missing = own * devices - n
    if missing:
        mask = jnp.ones(n, bool) if mask is None else mask
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        mask = jnp.pad(mask, (0, missing))
    start = lax.axis_index(EXAMPLES) * own
    x = lax.dynamic_slice_in_dim(x, start, own)
    return x, None if mask is None else lax.dynamic_slice_in_dim(mask, start, own)


def joined_shares(x: Shaped[Array, " m *shape"], n: int) -> Shaped[Array, " n *shape"]:
    """The devices' shares as one batch of `n` examples, the padding of `own_share` dropped."""
    return lax.all_gather(x, EXAMPLES, tiled=True)[:n]


def total(tree: PyTree, axes: str | tuple[str, ...] = EXAMPLES) -> PyTree:
    """Sum of `tree` over the devices of mesh `axes`.

    By one collective for all leaves. On CPUs each one blocks a thread of a pool as large as the
    machine has cores: two at a time, met in a different order by two devices, wait forever.
    """
    flat, restore = ravel_pytree(tree)
    return restore(jax.lax.psum(flat, axes))
