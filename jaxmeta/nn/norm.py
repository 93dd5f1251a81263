"""Batch normalisation with its statistics as values, not as hidden state.

The choice of the statistics changes published accuracies by percentage points. Therefore the learner makes
it explicitly (`norm="batch" | "support" | "population"`): the module normalises by given statistics,
otherwise by those of its batch, which it returns.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    """Return the mean and (biased) variance of each channel over space and the examples in `mask`.

    They are computed over the examples of all devices that share a batch, in float32 or, for float64 inputs,
    in float64.
    """
    axes = tuple(range(x.ndim - 1))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    examples = jnp.asarray(x.shape[0], x.dtype)
    if mask is not None:
        x = jnp.where(mask.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0)
        examples = mask.sum().astype(x.dtype)
    # E[x²] − E[x]² reads x once; centring first would read it twice and write it once.
    sums = x.sum(axes), jnp.square(x).sum(axes), examples
    total, total_of_squares, examples = sums if shared.num_shards() == 1 else shared.total(sums)
    count = jnp.maximum(examples, 1) * math.prod(x.shape[1:-1])
    mean = total / count
    return mean, jnp.maximum(total_of_squares / count - jnp.square(mean), 0)


def input_statistics(
    x: Array | np.ndarray, axis: int | Sequence[int] = -1, mask: Array | np.ndarray | None = None
) -> dict[str, Array]:
    """Return the mean and (biased) variance of each channel of a Flax layer's inputs, as in "batch_stats".

    Args:
      x: inputs of the layer.
      axis: axis, or axes, of the channels.
      mask: mask of the examples, or of any shape that broadcasts to that of `x`; False marks padding.
    """
    x = jnp.asarray(x)
    channels = {int(channel) % x.ndim for channel in np.atleast_1d(axis)}
    axes = tuple(dim for dim in range(x.ndim) if dim not in channels)
    if mask is not None and mask.ndim == 1:
        mask = mask.reshape(-1, *(1,) * (x.ndim - 1))
    values = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return {"mean": values.mean(axes, where=mask), "var": values.var(axes, where=mask)}


def to_moments(stats: PyTree) -> PyTree:
    """Return statistics as first and second moments, which, unlike variances, average over batches."""
    return jax.tree.map(
        lambda s: {"mean": s["mean"], "mean_of_squares": s["var"] + jnp.square(s["mean"])},
        stats,
        is_leaf=is_layer_statistics,
    )


def from_moments(moments: PyTree) -> PyTree:
    """Return statistics from first and second moments, the inverse of `to_moments`."""
    return jax.tree.map(
        # Rounding may make the variance of a constant channel negative.
        lambda m: {
            "mean": m["mean"],
            "var": jnp.maximum(m["mean_of_squares"] - jnp.square(m["mean"]), 0),
        },
        moments,
        is_leaf=is_layer_statistics,
    )


def population_of(params: Params) -> PyTree:
    """Return the population statistics that `jm.calibrate` added to a learner's `params`.

    Raises:
      ValueError: `params` have no population statistics.
    """
    if "population" not in params:
        raise ValueError(
            'norm="population" needs population statistics: call jm.calibrate on these params first'
        )
    return from_moments(params["population"])


def is_layer_statistics(node: Any) -> bool:
    """Return whether a node of a tree holds the statistics of one layer."""
    return isinstance(node, Mapping) and "mean" in node and not isinstance(node["mean"], Mapping)


class BatchNorm(linen.Module):
    """Batch normalisation with explicit statistics and without running averages.

    y = scale · (x − mean) / sqrt(var + epsilon) + bias for each channel, with mean and var from the
    collection `batch_stats` if it is given, otherwise of `x` over examples and space. The latter are written
    to that collection where it is mutable. Population statistics are computed once, after training, by
    `jm.calibrate`.

    Attributes:
      epsilon: constant added to the variance; 1e-3 in MAML's official code, 1e-5 by default in PyTorch.
      use_scale: True for a learned scale (MAML's official code has none).
      use_bias: True for a learned bias.

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
        """Return `x + offset`, normalised and then pooled.

        Args:
          x: examples.
          mask: mask whose False marks padding.
          offset: offset of each channel. It is added to the mean, which costs no pass over `x`.
          pool: maximum over spatial positions, such as max-pooling. Normalisation keeps or reverses the order
            of a channel's values, so that the maximum is taken first and only its result is normalised.
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
            # A negative gain makes the smallest value of a channel the largest.
            sign = jnp.where(gain < 0, -1, 1).astype(x.dtype)
            x, gain = pool(x * sign.reshape((1,) * (x.ndim - 1) + (-1,))), gain * sign
        per_channel = (1,) * (x.ndim - 1) + (-1,)
        # Computed in the statistics' float32: in bfloat16 the small difference x − mean would be lost.
        return (x * gain.reshape(per_channel) + shift.reshape(per_channel)).astype(x.dtype)
