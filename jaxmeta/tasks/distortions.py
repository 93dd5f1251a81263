"""Random affine distortions of images."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmeta.checks import ArgumentError, check_number, check_word
from jaxmeta.core import Key


def distort(
    key: Key,
    x: Float[Array, "n h w c"],
    *,
    rotation: float = 10.0,
    shear: float = 0.3,
    scale: float = 0.2,
    shift: float = 2 / 105,
    probability: float = 0.5,
    fill: float | Literal["edge"] = 0.0,
) -> Float[Array, "n h w c"]:
    """Rotate, shear, scale and shift each image at random and independently.

    Each of the seven components (an angle; shears, scales and shifts along both axes) is applied with
    probability `probability`, uniform in its range. The defaults are those of Koch et al. Images are sampled
    bilinearly, in one pass on the device.

    Args:
      key: random key.
      x: images.
      rotation: largest angle, in degrees.
      shear: largest shear.
      scale: largest relative change of size.
      shift: largest shift, as a fraction of the side; by default 2 of 105 pixels.
      probability: probability of each component.
      fill: value outside of the images, 0 for strokes on a background of 0; "edge" repeats the pixels of the
        edge, for photographs and for images on any background.

    Returns:
      Distorted images, of the shape of `x`.

    Raises:
      ValueError: `x` does not have four axes, or a range or the probability is out of bounds.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> distort(jax.random.key(0), jnp.ones((3, 28, 28, 1))).shape
      (3, 28, 28, 1)

    References:
      Koch, Zemel & Salakhutdinov, 2015, section 3.3.
    """
    if np.ndim(x) != 4:
        raise ArgumentError("x", f"got shape {np.shape(x)}; it must be (n, height, width, channels)")
    for name, value in (("rotation", rotation), ("shear", shear), ("shift", shift)):
        check_number(name, value, 0)
    # A scale factor of zero has no inverse.
    check_number("scale", scale, 0, 0.99)
    check_number("probability", probability, 0, 1)
    if isinstance(fill, str):
        check_word("fill", fill, ("edge",))
    else:
        check_number("fill", fill)
    n, height, width, _ = x.shape
    limits = jnp.array([jnp.deg2rad(rotation), shear, shear, scale, scale, shift * height, shift * width])
    values, chances = jax.random.uniform(key, (2, n, 7))
    components = jnp.where(chances < probability, (2 * values - 1) * limits[None], 0.0)
    angle, shear_x, shear_y, scale_y, scale_x, shift_y, shift_x = components.T
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rotation_matrix = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)
    one = jnp.ones_like(angle)
    shear_matrix = jnp.stack([jnp.stack([one, shear_y], -1), jnp.stack([shear_x, one], -1)], -2)
    # The matrix maps each output pixel to the position it is sampled from, hence the inverse scale.
    sizes = 1 / (1 + jnp.stack([scale_y, scale_x], -1))
    matrix = (rotation_matrix @ shear_matrix) * sizes[:, None, :]
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1).reshape(-1, 2)
    from_shift = jnp.stack([shift_y, shift_x], -1)
    positions = jnp.einsum("nij,pj->npi", matrix, grid - centre[None]) + (centre[None] - from_shift)[:, None]
    # A border of one pixel gives every position four neighbours.
    widths = ((0, 0), (1, 1), (1, 1), (0, 0))
    padded = jnp.pad(x, widths, "edge") if fill == "edge" else jnp.pad(x, widths, constant_values=fill)
    return _bilinear(padded, positions + 1).reshape(x.shape)


def _bilinear(padded: Float[Array, "n h w c"], positions: Float[Array, "n p 2"]) -> Float[Array, "n p c"]:
    """Sample images bilinearly at `positions` (row, column); outside of an image they are its border."""
    n, height, width, channels = padded.shape
    height, width = height - 2, width - 2
    padded = padded.reshape(n, -1, channels)
    last = jnp.array([height, width], positions.dtype)[None, None]
    positions = jnp.clip(positions, 0, last + 1)
    low = jnp.minimum(jnp.floor(positions), last)
    fraction = positions - low
    row, column = low[..., 0].astype(jnp.int32), low[..., 1].astype(jnp.int32)
    total = jnp.zeros((n, positions.shape[1], channels), padded.dtype)
    for down in (0, 1):
        for right in (0, 1):
            index = (row + down) * (width + 2) + column + right
            weight = jnp.abs(1 - down - fraction[..., 0]) * jnp.abs(1 - right - fraction[..., 1])
            neighbour = jnp.take_along_axis(padded, index[..., None], axis=1)
            total = total + weight[..., None].astype(padded.dtype) * neighbour
    return total
