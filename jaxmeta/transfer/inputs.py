"""Adapters that convert the target's images to the inputs that a pretrained body expects."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmeta import nn
from jaxmeta.checks import ArgumentError, check_count, check_finite, check_word, format_value
from jaxmeta.core import Key, Model, Params
from jaxmeta.transfer import host

# Methods of `jax.image.resize`.
Method = Literal["nearest", "linear", "cubic", "lanczos3", "lanczos5"]
# Weights of red, green and blue by ITU-R 601, as in `jm.tasks.from_folder`.
LUMA = (0.299, 0.587, 0.114)


class ImageInput(NamedTuple):
    """The images that a pretrained network was trained on, as `load_pretrained` returns it.

    Attributes:
      size: side in pixels, or height and width; None for any.
      mean: mean in (x − mean) / std of pixels in [0, 1], for each channel or for all.
      std: standard deviation in (x − mean) / std.
      method: interpolation by which they were resized, a method of `jax.image.resize`.

    Examples:
      >>> import jax.numpy as jnp
      >>> trained = ImageInput(32, (0.5,), (0.5,), "cubic")
      >>> x = trained.adapter(channels=3).apply({}, jnp.ones((2, 28, 28, 1)))
      >>> x.shape, bool(abs(x - 1).max() < 1e-5)
      ((2, 32, 32, 3), True)
    """

    size: int | tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    method: Method = "linear"

    def adapter(self, *, channels: int | None = None, invert: bool = False) -> Model:
        """Return the `input_adapter` that converts images in [0, 1]; see there for the arguments."""
        return input_adapter(
            channels=channels,
            size=self.size,
            invert=invert,
            mean=self.mean,
            std=self.std,
            method=self.method,
        )

    def __str__(self) -> str:
        resized = "" if self.method == "linear" else f", resized by {self.method} interpolation"
        if (self.mean, self.std) == ((0.0,), (1.0,)):
            return f"in [0, 1]{resized}"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"(x − mean) / std, mean {mean}, std {std}{resized}"


def input_adapter(
    *,
    channels: int | None = None,
    size: int | tuple[int, int] | None = None,
    invert: bool = False,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    method: Method = "linear",
) -> Model:
    """Build an adapter without parameters for the size, channels, polarity and scale of images.

    The steps are applied in this order: resizing, channels (one channel is repeated three times, three become
    their luma), inversion, scale. Use it as the `adapter` of a `jm.transfer.classifier`, in front of a body
    that may stay frozen.

    Args:
      channels: number of output channels, 1 or 3; None keeps the input's.
      size: height and width in pixels, or one number for both; None keeps the input's. Smaller sizes are
        filtered against aliasing.
      invert: whether to return 1 − x, such as for dark strokes on a light background and a body trained on
        light strokes on a dark one.
      mean: mean in (x − mean) / std, for each channel or for all, in the units of x; it should be that of
        the body's training, such as mean=(0.485, 0.456, 0.406) for most bodies of torchvision.
      std: standard deviation in (x − mean) / std, such as std=(0.229, 0.224, 0.225) for most bodies of
        torchvision.
      method: method of `jax.image.resize`: "nearest", "linear", "cubic", "lanczos3" or "lanczos5".

    Returns:
      A `Model` without parameters.

    Raises:
      ValueError: if `channels` is not 1 or 3, `size` is below 1, or `std` is not positive; when called, if
        the number of the images' channels is neither 1 nor 3, or differs from that of `mean` and `std`.

    Examples:
      >>> import jax.numpy as jnp
      >>> adapter = input_adapter(channels=3, size=32)
      >>> adapter.apply({}, jnp.zeros((2, 28, 28, 1))).shape
      (2, 32, 32, 3)
    """
    check_word("channels", channels, (1, 3, None))
    sides = size if size is None or isinstance(size, tuple | list) else (size, size)
    if sides is not None:
        if len(sides) != 2:
            raise ArgumentError(
                "size", f"got {format_value(size)}; it must be one number, or height and width"
            )
        for side in sides:
            check_count("size", side)
        sides = int(sides[0]), int(sides[1])
    check_word("method", method, get_args(Method))
    centre, spread = (
        jnp.atleast_1d(jnp.asarray(host.numbers(values, name), float))
        for name, values in (("mean", mean), ("std", std))
    )
    for name, values in (("mean", centre), ("std", spread)):
        check_finite(name, values)
        if values.ndim > 1:
            raise ArgumentError(
                name, f"got shape {values.shape}; it must be a number, or one for each channel"
            )
    if not (spread > 0).all():
        raise ArgumentError("std", f"got {std}; it must be positive")

    def apply(params: Params, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        del params
        if x.ndim != 4:
            raise ArgumentError("x", f"got shape {x.shape}; images must be (n, height, width, channels)")
        if sides is not None and x.shape[1:3] != sides:
            x = jax.image.resize(x, (x.shape[0], *sides, x.shape[3]), method)
        if channels is not None and x.shape[3] != channels:
            if x.shape[3] not in (1, 3):
                raise ArgumentError("x", f"got {x.shape[3]} channels; they must be 1 or 3")
            if channels == 3:
                x = jnp.repeat(x, 3, axis=3)
            else:
                x = (x * jnp.asarray(LUMA, x.dtype)[None, None, None]).sum(3, keepdims=True)
        for name, values in (("mean", centre), ("std", spread)):
            if values.size not in (1, x.shape[3]):
                raise ArgumentError(
                    name,
                    f"got {values.size} values for images of shape {x.shape[1:]}; give one for all channels "
                    "or one per channel",
                )
        x = 1 - x if invert else x
        return (x - centre.astype(x.dtype)[None, None, None]) / spread.astype(x.dtype)[None, None, None]

    return Model(lambda key, x: {}, apply)


def learned_stem(channels: int, *, kernel: int = 1) -> Model:
    """Build a trainable adapter: a convolution to the number of channels that the body expects.

    Each output channel is initialised to the mean of the input channels, so that a body trained on images
    receives an image before the first step.

    Args:
      channels: number of channels of the body's input.
      kernel: side of the filters in pixels, odd.

    Returns:
      A `Model` with the parameters "kernel" and "bias".

    Raises:
      ValueError: if `channels` is below 1 or `kernel` is even.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> stem = learned_stem(3)
      >>> params = stem.init(jax.random.key(0), jnp.ones((1, 8, 8, 5)))
      >>> print(stem.apply(params, jnp.ones((1, 8, 8, 5)))[0, 0, 0])
      [1. 1. 1.]
    """
    check_count("channels", channels)
    check_count("kernel", kernel)
    if kernel % 2 == 0:
        raise ArgumentError("kernel", f"got {kernel}; it must be odd")

    def init(key: Key, x: Any) -> Params:
        del key
        weights = (
            jnp.zeros((kernel, kernel, x.shape[3], channels)).at[kernel // 2, kernel // 2].set(1 / x.shape[3])
        )
        return {"kernel": weights, "bias": jnp.zeros(channels)}

    def apply(params: Params, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c2"]:
        return nn.conv(x, params["kernel"]) + params["bias"][None, None, None]

    return Model(init, apply)
