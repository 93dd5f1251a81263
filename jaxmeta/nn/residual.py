"""ResNet-18, -34 and -50, compatible with the weights of torchvision and Hugging Face's transformers."""

import jax
import jax.numpy as jnp
from flax import linen
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxmeta.checks import ArgumentError
from jaxmeta.nn.embedding import linear_head, require_images
from jaxmeta.nn.layers import Conv
from jaxmeta.nn.norm import BatchNorm


def max_pool_3x3(x: Float[Array, "n h w c"], *, ceil_mode: bool = False) -> Float[Array, "n h2 w2 c"]:
    """Apply 3×3 max-pooling with stride 2, as in PyTorch.

    Args:
      x: maps of shape (n, h, w, c).
      ceil_mode: False for a padding of 1; True for no padding, but a last window that may reach over the
        edge.
    """
    # Maxima of slices, over rows and then over columns: the gradient of `linen.max_pool` is a scatter, which
    # takes four times as long on CPUs.
    return _max_of_three(_max_of_three(x, 1, ceil_mode), 2, ceil_mode)


def _max_of_three(x, axis, ceil_mode):
    size = x.shape[axis]
    out = size // 2 if ceil_mode else (size - 1) // 2 + 1
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (0, 2 * out + 1 - size, 0) if ceil_mode else (1, 1, 0)
    x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), padding)
    before, at, after = (lax.slice_in_dim(x, i, i + 2 * out - 1, 2, axis) for i in range(3))
    return jnp.maximum(jnp.maximum(before, at), after)


class Block(linen.Module):
    """A residual block: two 3×3 convolutions, or a bottleneck of 1×1, 3×3 and 1×1 ones, and a shortcut.

    The first two convolutions of a bottleneck have a quarter of the channels. The shortcut is the identity
    where input and output have the same shape, otherwise a 1×1 convolution. The stride is in the first 3×3
    convolution.

    Attributes:
      channels: output channels.
      stride: 1, or 2 to halve the resolution.
      bottleneck: True for the bottleneck.
    """

    channels: int
    stride: int = 1
    bottleneck: bool = False

    @linen.compact
    def __call__(
        self, x: Float[Array, "n h w c"], mask: Bool[Array, " n"] | None = None
    ) -> Float[Array, "n h2 w2 channels"]:
        def conv_norm(x, filters, size, stride, name):
            # PyTorch's padding, on both sides; "SAME" with stride 2 would pad the far side only.
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
    # He initialisation as in torchvision: with fan-out, from a normal distribution without truncation.
    init = linen.initializers.variance_scaling(2.0, "fan_out", "normal")
    conv = Conv(filters, (size, size), stride, padding, use_bias=False, kernel_init=init, name=f"{name}_conv")
    return BatchNorm(epsilon=1e-5, name=f"{name}_norm")(conv(x), mask, pool=pool)


class ResNet(linen.Module):
    """A residual network for images of about 224×224.

    A 7×7 convolution and a 3×3 max-pooling, both of stride 2, are followed by stages of blocks and by global
    average pooling. Each stage but the first halves the resolution. The stride of a bottleneck is in its 3×3
    convolution ("v1.5", as in torchvision), not in its first 1×1 convolution as in the paper.

    `network.apply({"params": …}, x)` normalises with the statistics of the batch, and
    `network.apply({"params": …, "batch_stats": …}, x)` with the given statistics, such as pretrained ones
    (see `jm.transfer.load_pretrained`).

    Attributes:
      ways: width of the linear layer "head"; None for an embedding without one.
      depths: number of blocks of each stage.
      channels: output channels of each stage.
      bottleneck: True for blocks of three convolutions instead of two.
      stem: channels of the first convolution.

    Raises:
      ValueError: `channels` and `depths` differ in length.

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
                "channels",
                f"got {self.channels}; it must have one entry for each stage of depths, {self.depths}",
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
