"""ResNet-12, the deep network of the few-shot literature."""

import jax
import jax.numpy as jnp
from flax import linen
from jaxtyping import Array, Bool, Float

from jaxmeta.core import Key
from jaxmeta.nn.embedding import linear_head, max_pool_2x2, require_size
from jaxmeta.nn.layers import Conv
from jaxmeta.nn.norm import BatchNorm


def drop_block(
    x: Float[Array, "n h w c"], key: Key, drop_rate: float, block_size: int
) -> Float[Array, "n h w c"]:
    r"""Drop square blocks of each channel's map, and scale the rest up to keep the mean.

    Each position at which a block fits inside the map starts one with probability

    γ = (drop_rate / block_size²) · h·w / ((h − block_size + 1)(w − block_size + 1)),

    so that about a share `drop_rate` of the map is dropped. A block that is larger than the map is cut to it.

    Args:
      x: maps of shape (n, h, w, c).
      key: random key.
      drop_rate: expected share of each map that is dropped.
      block_size: side of the blocks.

    References:
      Ghiasi, Lin & Le, DropBlock, 2018, algorithm 1.
    """
    n, h, w, c = x.shape
    block = min(block_size, h, w)
    starts = (h - block + 1, w - block + 1)
    gamma = drop_rate / block**2 * h * w / (starts[0] * starts[1])
    start = jax.random.bernoulli(key, gamma, (n, *starts, c)).astype(x.dtype)
    edge = (block - 1, block - 1)
    kept = 1 - linen.max_pool(start, (block, block), padding=(edge, edge))
    return x * kept * (kept.size / jnp.maximum(kept.sum(), 1))


class ResidualBlock(linen.Module):
    """Three 3×3 convolutions with a 1×1 shortcut, then 2×2 max-pooling, then dropout or DropBlock.

    Attributes:
      filters: output channels.
      drop_rate: share of the pooled map that is dropped in training.
      block_size: side of the blocks of DropBlock; None for dropout of single values.
    """

    filters: int
    drop_rate: float
    block_size: int | None

    @linen.compact
    def __call__(
        self, x: Float[Array, "n h w c"], mask: Bool[Array, " n"] | None = None, deterministic: bool = True
    ) -> Float[Array, "n h2 w2 filters"]:
        def conv_norm(x, size, name):
            # He initialisation as published: by fan-out, from a normal distribution that is not truncated.
            init = linen.initializers.variance_scaling(2.0, "fan_out", "normal")
            x = Conv(self.filters, (size, size), use_bias=False, kernel_init=init, name=f"{name}_conv")(x)
            return BatchNorm(epsilon=1e-5, name=f"{name}_norm")(x, mask)

        shortcut = conv_norm(x, 1, "shortcut")
        for i in range(3):
            x = conv_norm(x, 3, f"layer{i}")
            x = jax.nn.leaky_relu(x if i < 2 else x + shortcut, 0.1)
        x = max_pool_2x2(x)
        if self.block_size is None:
            return linen.Dropout(self.drop_rate)(x, deterministic)
        if deterministic or self.drop_rate == 0:
            return x
        return drop_block(x, self.make_rng("dropout"), self.drop_rate, self.block_size)


class ResNet12(linen.Module):
    """ResNet-12 as in MetaOptNet: four residual blocks, averaged over space.

    It gives 640 features and has 12,424,320 parameters without a head. In training, single values
    are dropped after the first two blocks and squares of 5×5 after the last two; MetaOptNet raises
    the rate of the latter from 0 in the course of training, which is not done here. Images of 84×84
    shrink to 42, 21, 10 and 5. TADAM's channels are (64, 128, 256, 512).

    Attributes:
      ways: width of the linear head; None for an embedding without one.
      channels: output channels of each block.
      drop_rate: share of each block's output that is dropped in training; 0.1 in MetaOptNet.

    Raises:
      ValueError: images smaller than 16×16.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> network, x = ResNet12(), jnp.zeros((2, 84, 84, 3))
      >>> jax.eval_shape(lambda x: network.init_with_output(jax.random.key(0), x)[0], x).shape
      (2, 640)

    References:
      Lee et al., Meta-Learning with Differentiable Convex Optimization (MetaOptNet), 2019; Oreshkin
      et al., TADAM, 2018.
    """

    divisible = True

    ways: int | None = None
    channels: tuple[int, ...] = (64, 160, 320, 640)
    drop_rate: float = 0.0

    @linen.compact
    def __call__(
        self, x: Float[Array, "n h w c"], mask: Bool[Array, " n"] | None = None, deterministic: bool = True
    ) -> Float[Array, "n d"]:
        require_size(x, 2 ** len(self.channels))
        for i, filters in enumerate(self.channels):
            block = ResidualBlock(filters, self.drop_rate, None if i < 2 else 5, name=f"block{i}")
            x = block(x, mask, deterministic)
        return linear_head(x.mean((1, 2)), self.ways)
