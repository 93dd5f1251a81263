"""Networks of the few-shot literature: Conv4, MAML's strided network, and multilayer perceptrons."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen
from jaxtyping import Array, Bool, Float, Shaped

from jaxmeta.checks import ArgumentError, check_count, check_word
from jaxmeta.nn.defaults import narrow_normal, relu
from jaxmeta.nn.layers import Conv
from jaxmeta.nn.norm import BatchNorm

Padding = Literal["SAME", "VALID"]


def max_pool_2x2(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """Pool by 2×2 maxima with stride 2; an odd last row or column is dropped.

    Where values of a window are equal, the first maximum takes the gradient.

    Examples:
      >>> max_pool_2x2(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
      [[5.0, 7.0], [13.0, 15.0]]
    """
    return _window_max(_windows(x))


@jax.custom_jvp
def _window_max(windows):
    # Elementwise maxima fuse with the operations before them; XLA's CPU backend does not fuse a reduction
    # with its operand, which would then be written to memory.
    (a, b), (c, d) = _corners(windows)
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


@_window_max.defjvp
def _window_max_jvp(primals, tangents):
    # Selecting by the winner's index makes the gradient a masked broadcast. The gradient of strided slices
    # is an interior padding and that of a window reduction a scatter, both many times slower on CPUs.
    # The winner is found by comparing the four values with each other, never with the maximum: the
    # compiler may compute a value twice with different rounding, and then none would equal the maximum.
    (windows,), (tangent,) = primals, tangents
    (a, b), (c, d) = _corners(windows)
    winner = jnp.where(
        jnp.maximum(a, b) >= jnp.maximum(c, d), jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3)
    )
    place = jnp.arange(4).reshape(1, 1, 2, 1, 2, 1)
    chosen = jnp.where(winner[:, :, None, :, None] == place, tangent, 0)
    return _window_max(windows), chosen.sum((2, 4))


def _corners(windows):
    return ((windows[:, :, i, :, 0], windows[:, :, i, :, 1]) for i in (0, 1))


def _windows(x):
    """Split images (n, h, w, c) into 2×2 windows (n, h/2, 2, w/2, 2, c)."""
    n, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)


def flattened(x: Shaped[Array, " n *shape"]) -> Shaped[Array, "n d"]:
    """Return each example as a vector."""
    # A size of −1 could not be inferred for a batch without examples.
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def require_images(x: Any) -> None:
    """Raise an error unless `x` is a batch of images with channels."""
    if x.ndim != 4:
        hint = " (grey images need an axis of channels: x[..., None])" if x.ndim == 3 else ""
        raise ArgumentError(
            "x", f"got an array of shape {x.shape}; images are (examples, height, width, channels){hint}"
        )


def require_size(x: Float[Array, "n h w c"], least: int) -> None:
    """Raise an error unless `x` is a batch of images of at least `least`×`least` pixels.

    Pooling would shrink smaller ones to empty maps, whose features are constant.
    """
    require_images(x)
    if min(x.shape[1:3]) < least:
        raise ArgumentError(
            "x", f"got images of {x.shape[1]}×{x.shape[2]}; they must be at least {least}×{least}"
        )


def linear_head(x: Float[Array, "n d"], ways: int | None) -> Float[Array, "n out"]:
    """Apply a linear layer "head" of the calling module; return `x` unchanged where `ways` is None."""
    return x if ways is None else linen.Dense(ways, name="head")(x)


class ConvNorm(linen.Module):
    """A 3×3 convolution with bias, batch normalisation, and optional 2×2 max-pooling.

    Attributes:
      filters: output channels.
      strides: step of the convolution's window.
      pool: True for max-pooling after the normalisation.
      use_scale: True for a learned scale in the normalisation.
      epsilon: constant added to the variance in the batch normalisation.
      padding: padding of the convolution, "SAME" or "VALID".
    """

    filters: int
    strides: int = 1
    pool: bool = False
    use_scale: bool = True
    epsilon: float = 1e-3
    padding: Padding = "SAME"

    @linen.compact
    def __call__(
        self, x: Float[Array, "n h w c"], mask: Bool[Array, " n"] | None = None
    ) -> Float[Array, "n h2 w2 filters"]:
        conv = Conv(
            self.filters, (3, 3), strides=self.strides, padding=self.padding, use_bias=False, name="conv"
        )
        x = conv(x)
        bias = self.param("bias", linen.initializers.zeros, (self.filters,))
        norm = BatchNorm(self.epsilon, use_scale=self.use_scale, name="norm")
        if not self.pool:
            return norm(x, mask, bias)
        if x.shape[1] % 2 or x.shape[2] % 2:
            return norm(x, mask, bias, max_pool_2x2)
        # Split into windows before normalising: a reshape inside the fused gradient would cost an integer
        # division for the index of every element.
        return norm(_windows(x), mask, bias, _window_max)


class Conv4(linen.Module):
    """Four blocks of 3×3 convolution, batch normalisation, ReLU and 2×2 max-pooling.

    28×28×1 images give 64 features with 64 filters (111,936 parameters without a head); 84×84×3
    images give 800 with 32 filters (32,901 with a 5-way head).

    Attributes:
      ways: width of the linear head; None for an embedding without one.
      filters: channels of every block.
      epsilon: constant added to the variance in the batch normalisation.
      blocks: number of blocks; TorchBench's MAML has 3, with the padding "VALID".
      padding: padding of the convolutions, "SAME" or "VALID".

    Raises:
      ValueError: images too small for the blocks, with the defaults smaller than 16×16; `blocks` below 1; an
        unknown `padding`.

    Examples:
      >>> network, x = Conv4(ways=5, filters=8), jnp.zeros((2, 28, 28, 1))
      >>> params = jax.jit(network.init)(jax.random.key(0), x)
      >>> jax.jit(network.apply)(params, x).shape
      (2, 5)

    References:
      Vinyals et al., Matching Networks, 2016; Snell et al., Prototypical Networks, 2017 (64
      filters); Ravi & Larochelle, 2017; Finn et al., MAML, 2017 (32 filters on mini-ImageNet).
    """

    divisible = True

    ways: int | None = None
    filters: int = 64
    epsilon: float = 1e-3
    blocks: int = 4
    padding: Padding = "SAME"

    def __post_init__(self) -> None:
        check_count("blocks", self.blocks)
        check_word("padding", self.padding, get_args(Padding))
        super().__post_init__()

    @linen.compact
    def __call__(
        self, x: Float[Array, "n h w c"], mask: Bool[Array, " n"] | None = None
    ) -> Float[Array, "n d"]:
        # The smallest size whose last map has one pixel: a block halves a size; without padding its
        # convolution first takes 2 from it.
        require_size(x, 2**self.blocks if self.padding == "SAME" else 3 * 2**self.blocks - 2)
        for _ in range(self.blocks):
            block = ConvNorm(self.filters, pool=True, epsilon=self.epsilon, padding=self.padding)
            # ReLU and max-pooling commute, and after pooling ReLU has a quarter of the pixels to process.
            x = jax.nn.relu(block(x, mask))
        return linear_head(flattened(x), self.ways)


class StridedConv4(linen.Module):
    """Four blocks of 3×3 stride-2 convolution, batch normalisation and ReLU: MAML's Omniglot network.

    28×28 images shrink to 14, 7, 4 and 2; the 2×2 map is averaged (the paper's "last hidden layer
    is 64-dimensional") or flattened (Reptile, iMAML). For 5 ways it has 112,261 parameters, or
    112,005 with `use_scale=False`, as in the official code.

    Attributes:
      ways: width of the linear head; None for an embedding without one.
      filters: channels of every block.
      flatten: True to concatenate the pixels of the last map instead of averaging them.
      use_scale: True for a learned scale in the batch normalisation.
      epsilon: constant added to the variance in the batch normalisation.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> network, x = StridedConv4(ways=5), jnp.zeros((2, 28, 28, 1))
      >>> jax.eval_shape(lambda x: network.init_with_output(jax.random.key(0), x)[0], x).shape
      (2, 5)

    References:
      Finn et al., Model-Agnostic Meta-Learning, 2017, section 5.2.
    """

    divisible = True

    ways: int | None = None
    filters: int = 64
    flatten: bool = False
    use_scale: bool = True
    epsilon: float = 1e-3

    @linen.compact
    def __call__(
        self, x: Float[Array, "n h w c"], mask: Bool[Array, " n"] | None = None
    ) -> Float[Array, "n d"]:
        require_images(x)
        for _ in range(4):
            x = ConvNorm(self.filters, strides=2, use_scale=self.use_scale, epsilon=self.epsilon)(x, mask)
            x = jax.nn.relu(x)
        x = flattened(x) if self.flatten else x.mean((1, 2))
        return linear_head(x, self.ways)


class MLP(linen.Module):
    """A fully connected network.

    Attributes:
      out: width of the output layer "head"; None for an embedding without one.
      hidden: widths of the hidden layers. (40, 40) is MAML's sinusoid network with 1,761 parameters;
        (256, 128, 64, 64) with `norm` is its Omniglot network without convolutions.
      norm: True for batch normalisation before every activation.
      activation: activation after every hidden layer.
      use_bias: True for layers with biases.
      kernel_init: initialiser of the kernel of every layer. The default is that of MAML's official
        code, a truncated normal distribution of standard deviation 0.01, from which the first
        thousand meta-steps on sinusoids show little progress.

    Examples:
      >>> network, x = MLP(out=5, hidden=(16,)), jnp.zeros((2, 8))
      >>> network.apply(network.init(jax.random.key(0), x), x).shape
      (2, 5)
    """

    divisible = True

    out: int | None
    hidden: tuple[int, ...] = (40, 40)
    norm: bool = False
    activation: Callable[..., Any] = relu
    use_bias: bool = True
    kernel_init: Callable[..., Any] = narrow_normal

    @linen.compact
    def __call__(
        self, x: Float[Array, " n *shape"], mask: Bool[Array, " n"] | None = None
    ) -> Float[Array, "n out"]:
        x = flattened(x)
        for width in self.hidden:
            x = linen.Dense(width, self.use_bias, kernel_init=self.kernel_init)(x)
            x = self.activation(BatchNorm()(x, mask) if self.norm else x)
        if self.out is None:
            return x
        return linen.Dense(self.out, self.use_bias, kernel_init=self.kernel_init, name="head")(x)


class Identity(linen.Module):
    """An embedding without parameters: each example as a vector, for features that are already computed.

    Examples:
      >>> network, x = Identity(), jnp.ones((2, 8))
      >>> network.apply({}, x).shape
      (2, 8)
    """

    divisible = True

    @linen.compact
    def __call__(self, x: Float[Array, " n *shape"]) -> Float[Array, "n d"]:
        return flattened(x)
