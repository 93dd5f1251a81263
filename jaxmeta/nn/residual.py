"""ResNet-18, -34 and -50 as in torchvision and Hugging Face's transformers, whose weights fit them."""

import jax
import jax.numpy as jnp
from flax import linen
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxmeta.checks import ArgumentError
from jaxmeta.nn.embedding import linear_head, require_images
from jaxmeta.nn.layers import Conv
from jaxmeta.nn.norm import BatchNorm


def max_pool_3x3(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """3×3 maximum with stride 2, one place of padding around the map.

    Over columns of the maximum over rows, each of slices: the gradient of `linen.max_pool`, a scatter, takes
    four times as long on CPUs.
    """
    return _max_of_three(_max_of_three(x, 1), 2)


def _max_of_three(x, axis):
    out = (x.shape[axis] - 1) // 2 + 1
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (1, 1, 0)
    x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), padding)
    before, at, after = (lax.slice_in_dim(x, i, i + 2 * out - 1, 2, axis) for i in range(3))
    return jnp.maximum(jnp.maximum(before, at), after)


class Block(linen.Module):
    """Two 3×3 convolutions, or a 3×3 one between two 1×1 of a quarter of the channels, beside a shortcut.

    The shortcut is the identity where nothing changes shape, otherwise a 1×1 convolution. The stride is in
    the first 3×3 convolution.

    Attributes:
      channels: of the output.
      stride: 1, or 2 to halve the map.
      bottleneck: whether to have three convolutions.
    """

    channels: int
    stride: int = 1
    bottleneck: bool = False

    @linen.compact
    def __call__(
        self, x: Float[Array, "n h w c"], mask: Bool[Array, " n"] | None = None
    ) -> Float[Array, "n h2 w2 channels"]:
        def conv_norm(x, filters, size, stride, name):
            # As in torch, and unlike "SAME", which at stride 2 pads the far side only.
            padding = ((size // 2, size // 2),) * 2
            return _conv_norm(x, mask, filters, size, stride, padding, name)

        if self.bottleneck:
            inner = self.channels // 4
            layers = [(inner, 1, 1), (inner, 3, self.stride), (self.channels, 1, 1)]
        else:
            layers = [(self.channels, 3, self.stride), (self.channels, 3, 1)]
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.channels:
            shortcut = conv_norm(x, self.channels, 1, self.stride, "shortcut")
        for i, (filters, size, stride) in enumerate(layers):
            x = conv_norm(x, filters, size, stride, f"layer{i}")
            x = jax.nn.relu(x if i < len(layers) - 1 else x + shortcut)
        return x


def _conv_norm(x, mask, filters, size, stride, padding, name, pool=None):
    # He's initialisation, as torchvision has it: by fan-out, and not truncated.
    init = linen.initializers.variance_scaling(2.0, "fan_out", "normal")
    conv = Conv(filters, (size, size), stride, padding, use_bias=False, kernel_init=init, name=f"{name}_conv")
    return BatchNorm(epsilon=1e-5, name=f"{name}_norm")(conv(x), mask, pool=pool)


class ResNet(linen.Module):
    """A residual network for images of about 224×224, averaged over space.

    A 7×7 convolution of stride 2 and 3×3 max-pooling of stride 2, then stages of blocks, of which each but
    the first halves the map. The bottleneck's stride is in its 3×3 convolution ("v1.5", as in torchvision),
    and not in its first 1×1 one (the paper).

    Without given statistics it normalises by those of the batch. Pretrained ones are given as values:
    `network.apply({"params": ..., "batch_stats": ...}, x)`; see `jm.transfer.load_pretrained`.

    Attributes:
      ways: width of the linear layer "head"; None for an embedding without one.
      depths: number of blocks of each stage.
      channels: output channels of each stage.
      bottleneck: whether blocks have three convolutions instead of two.
      stem: channels of the first convolution.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> network = jm.nn.ResNet(ways=5, depths=(1, 1), channels=(4, 8), stem=4)
      >>> variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
      >>> jax.jit(network.apply)(variables, jnp.zeros((2, 32, 32, 3))).shape
      (2, 5)

    References:
      He et al., Deep Residual Learning for Image Recognition, 2015.
    """

    divisible = True

    ways: int | None = None
    depths: tuple[int, ...] = (2, 2, 2, 2)
    channels: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = False
    stem: int = 64

    @linen.compact
    def __call__(
        self, x: Float[Array, "n h w c"], mask: Bool[Array, " n"] | None = None
    ) -> Float[Array, "n d"]:
        if len(self.channels) != len(self.depths):
            raise ArgumentError(
                "channels", f"got {self.channels}; one for each stage of depths, {self.depths}"
            )
        require_images(x)
        x = _conv_norm(x, mask, self.stem, 7, 2, ((3, 3), (3, 3)), "stem", max_pool_3x3)
        x = jax.nn.relu(x)
        for i, (depth, channels) in enumerate(zip(self.depths, self.channels, strict=True)):
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                x = Block(channels, stride, self.bottleneck, name=f"stage{i}_block{j}")(x, mask)
        return linear_head(x.mean((1, 2)), self.ways)


class ResNet18(ResNet):
    """ResNet-18: 512 features, 11,176,512 parameters without a head; see `ResNet`."""


class ResNet34(ResNet):
    """ResNet-34: 512 features, 21,284,672 parameters without a head; see `ResNet`."""

    depths: tuple[int, ...] = (3, 4, 6, 3)


class ResNet50(ResNet):
    """ResNet-50: 2048 features, 23,508,032 parameters without a head; see `ResNet`."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    bottleneck: bool = True
