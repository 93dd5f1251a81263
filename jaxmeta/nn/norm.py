"""Batch normalisation with its statistics as values, not as hidden state.

Which statistics normalise a batch is a choice that changes published numbers by points, so it is
made outside the network, by the learner (`norm="batch" | "support" | "population"`): the module
uses the statistics it is handed, and otherwise those of the very batch it is given, which it
reports.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxmeta.core import Params, PyTree
from jaxmeta.nn import shared

STATISTICS = "batch_stats"


def moments(
    x: Float[Array, "n *spatial c"], mask: Bool[Array, " n"] | None = None
) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Mean and (biased) variance of each channel over examples where `mask` holds and over space.

    Over those of all devices, where several share a batch; in float32 at least, whatever `x` is in.
    """
    axes = tuple(range(x.ndim - 1))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    examples = jnp.asarray(x.shape[0], x.dtype)
    if mask is not None:
        x = jnp.where(mask.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0)
        examples = mask.sum().astype(x.dtype)
    # E[x²] − E[x]² reads x once, where centring first would read it twice and write it once.
    sums = x.sum(axes), jnp.square(x).sum(axes), examples
    of_x, of_squares, examples = sums if shared.num_shards() == 1 else shared.total(sums)
    count = jnp.maximum(examples, 1) * math.prod(x.shape[1:-1])
    mean = of_x / count
    return mean, jnp.maximum(of_squares / count - jnp.square(mean), 0)


def entering(
    x: Array | np.ndarray, axis: int | Sequence[int] = -1, mask: Array | np.ndarray | None = None
) -> dict[str, Array]:
    """Return the mean and (biased) variance of each channel, as under "batch_stats", of a layer of Flax.

    Args:
      x: what enters the layer.
      axis: of the channels; several where the layer has several.
      mask: of examples, or of any shape that broadcasts to that of `x`; False is left out.
    """
    x = jnp.asarray(x)
    channels = {each % x.ndim for each in ((axis,) if isinstance(axis, int) else axis)}
    axes = tuple(each for each in range(x.ndim) if each not in channels)
    if mask is not None and mask.ndim == 1:
        mask = mask.reshape(-1, *(1,) * (x.ndim - 1))
    values = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return {"mean": values.mean(axes, where=mask), "var": values.var(axes, where=mask)}


def to_moments(stats: PyTree) -> PyTree:
    """Statistics as first and second moments, which, unlike variances, may be averaged over batches."""
    return jax.tree.map(
        lambda s: {"mean": s["mean"], "mean_of_squares": s["var"] + jnp.square(s["mean"])},
        stats,
        is_leaf=_is_statistics,
    )


def from_moments(moments: PyTree) -> PyTree:
    """Inverse of `to_moments`."""
    return jax.tree.map(
        # Not below zero, where the rounding of a constant channel may take it.
        lambda m: {
            "mean": m["mean"],
            "var": jnp.maximum(m["mean_of_squares"] - jnp.square(m["mean"]), 0),
        },
        moments,
        is_leaf=_is_statistics,
    )


def population_of(params: Params) -> PyTree:
    """The statistics that `jm.calibrate` filled in a learner's `params`.

    Raises:
      ValueError: it was not called.
    """
    if "population" not in params:
        raise ValueError('norm="population" needs filled statistics: call jm.calibrate on these params first')
    return from_moments(params["population"])


def _is_statistics(node):
    return isinstance(node, Mapping) and "mean" in node and not isinstance(node["mean"], Mapping)


class BatchNorm(linen.Module):
    """Normalises each channel to zero mean and unit variance, then scales and shifts it.

    y = scale · (x − mean) / sqrt(var + epsilon) + bias, with mean and var from the collection
    `batch_stats` where the caller hands one in, otherwise of `x` over examples and space; the
    latter are written to that collection where it is mutable. There is no running average:
    population statistics are filled once, after training, by `jm.calibrate`.

    Attributes:
      epsilon: added to the variance. 1e-3 is MAML's official code, 1e-5 torch's default.
      use_scale: whether γ is learned (MAML's official code has none).
      use_bias: whether β is learned.

    References:
      Ioffe & Szegedy, Batch Normalization, 2015.
    """

    epsilon: float = 1e-3
    use_scale: bool = True
    use_bias: bool = True

    @linen.compact
    def __call__(
        self,
        x: Float[Array, "n *spatial c"],
        mask: Bool[Array, " n"] | None = None,
        offset: Float[Array, " c"] | float = 0.0,
        pool: Callable[[Array], Array] | None = None,
    ) -> Float[Array, "n *pooled c"]:
        """Normalises `x + offset`, then pools.

        Args:
          x: examples.
          mask: which of them are none of the padding.
          offset: of each channel. It moves the mean alone, so it costs no pass over `x`.
          pool: a maximum over places, such as max-pooling. Normalising keeps the order of numbers, or
            reverses it, so that the maximum is taken first and only its result is normalised.
        """
        channels = x.shape[-1]
        if self.has_variable(STATISTICS, "mean"):
            mean: jax.Array = self.get_variable(STATISTICS, "mean")
            var: jax.Array = self.get_variable(STATISTICS, "var")
        else:
            mean, var = moments(x, mask)
            mean = mean + offset
            if self.is_mutable_collection(STATISTICS) and not self.is_initializing():
                self.put_variable(STATISTICS, "mean", mean)
                self.put_variable(STATISTICS, "var", var)
        gain = lax.rsqrt(var + self.epsilon)
        if self.use_scale:
            gain = gain * self.param("scale", linen.initializers.ones, (channels,))
        shift = (offset - mean) * gain
        if self.use_bias:
            shift = shift + self.param("bias", linen.initializers.zeros, (channels,))
        if pool is not None:
            # Of a channel with a negative gain the smallest number becomes the largest.
            sign = jnp.where(gain < 0, -1, 1).astype(x.dtype)
            x, gain = pool(x * sign.reshape((1,) * (x.ndim - 1) + (-1,))), gain * sign
        per_channel = (1,) * (x.ndim - 1) + (-1,)
        # Statistics have float32 where `x` may have less, in which the difference would be lost.
        return (x * gain.reshape(per_channel) + shift.reshape(per_channel)).astype(x.dtype)
