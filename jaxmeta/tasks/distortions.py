"""Random affine distortions of images, on the device."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmeta.checks import ArgumentError, check_number
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
) -> Float[Array, "n h w c"]:
    """Every image turned, sheared, scaled and shifted at random, each for itself; 0 comes in from outside.

    The defaults are Koch's: each of the seven components (an angle; shears, scales and shifts along both
    axes) is uniform in its range with probability ½, and otherwise does nothing. Bilinear, in one pass.

    Args:
      key: of the draws.
      x: images, ink on 0.
      rotation: largest angle, in degrees.
      shear: largest shear.
      scale: largest relative change of size.
      shift: largest shift, as a share of the side; 2 of 105 pixels.
      probability: of each component.

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
    # A size of zero has no inverse.
    check_number("scale", scale, 0, 0.99)
    check_number("probability", probability, 0, 1)
    n, height, width, _ = x.shape
    most = jnp.array([jnp.deg2rad(rotation), shear, shear, scale, scale, shift * height, shift * width])
    draws, drawn = jax.random.uniform(key, (2, n, 7))
    parts = jnp.where(drawn < probability, (2 * draws - 1) * most[None], 0.0)
    angle, shear_x, shear_y, scale_y, scale_x, shift_y, shift_x = parts.T
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)
    one = jnp.ones_like(angle)
    sheared = jnp.stack([jnp.stack([one, shear_y], -1), jnp.stack([shear_x, one], -1)], -2)
    # By the inverse of the sizes: an image is sampled where each of its pixels comes from.
    sizes = 1 / (1 + jnp.stack([scale_y, scale_x], -1))
    matrix = (turn @ sheared) * sizes[:, None, :]
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1).reshape(-1, 2)
    from_shift = jnp.stack([shift_y, shift_x], -1)
    places = jnp.einsum("nij,pj->npi", matrix, grid - centre[None]) + (centre[None] - from_shift)[:, None]
    return _bilinear(x, places).reshape(x.shape)


def _bilinear(x: Float[Array, "n h w c"], places: Float[Array, "n p 2"]) -> Float[Array, "n p c"]:
    n, height, width, channels = x.shape
    # A border of zeros, so that every place has four neighbours.
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(n, -1, channels)
    last = jnp.array([height, width], places.dtype)[None, None]
    places = jnp.clip(places + 1, 0, last + 1)
    low = jnp.minimum(jnp.floor(places), last)
    part = places - low
    row, column = low[..., 0].astype(jnp.int32), low[..., 1].astype(jnp.int32)
    total = jnp.zeros((n, places.shape[1], channels), x.dtype)
    for down in (0, 1):
        for right in (0, 1):
            index = (row + down) * (width + 2) + column + right
            weight = jnp.abs(1 - down - part[..., 0]) * jnp.abs(1 - right - part[..., 1])
            found = jnp.take_along_axis(padded, index[..., None], axis=1)
            total = total + weight[..., None].astype(x.dtype) * found
    return total
