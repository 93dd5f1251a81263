"""Pen strokes of procedurally drawn characters, and their rendering.

A class of characters is an integer that seeds two or three smooth strokes. An example of the class
is these strokes with the random variation of one drawer. Everything is a pure function of integers and
random bits, so that characters need no memory and are drawn on the device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

_STROKES = 3  # maximum per character; the last one is present in 60 % of the classes
_SAMPLES = 11  # vertices of the polyline that approximates a stroke
_DOTS = 48  # points along all strokes together: about one pixel apart at 28 x 28
HAND = _STROKES * 4 * 2 + 7  # random numbers per drawing

# The generator is fixed, so that classes do not depend on `jax_default_prng_impl`.
_ALPHABET = functools.partial(jax.random.key, 20_180_801, impl="threefry2x32")

# The variation between drawers, chosen so that nearest neighbours on pixels have about the same 5-way
# 1-shot accuracy as on Omniglot (41.7 %), while characters remain recognisable.
_WOBBLE = 0.05  # standard deviation of a control point; the character has height or width 1
_ANGLE = 0.20  # standard deviation of the rotation, radians
_SLANT = 0.20  # standard deviation of the shear
_STRETCH = 0.12  # standard deviation of log(width / height)
_EXTENT = (0.56, 0.86)  # size of the character, as a fraction of the image
_SHIFT = 0.12  # largest shift in each direction, as a fraction of the image
_PEN = (0.95, 1.45)  # half the line width, in pixels of a 28 x 28 image


def class_strokes(
    class_id: Int[Array, ""] | int,
) -> tuple[Float[Array, "strokes 4 2"], Bool[Array, " strokes"]]:
    """Return the strokes of a class: control points of cubic Bézier curves, and a mask of present strokes.

    A stroke leads from a point to a distant node of a jittered 3 x 3 grid, straight, as an arc or as
    an S. The second and third often start on the previous stroke, as in letters.

    Args:
      class_id: class id.

    Returns:
      Control points `(x, y)`, `y` downwards, centred, scaled so that the larger side of the character is 1;
      and the mask of the strokes that are drawn.
    """
    # One call of the random generator: each costs compile time.
    numbers = jax.random.uniform(jax.random.fold_in(_ALPHABET(), class_id), (_STROKES, 19), jnp.float32)
    ticks = jnp.arange(3, dtype=jnp.float32) / 2
    nodes = jnp.stack(jnp.meshgrid(ticks, ticks), -1).reshape(9, 2)

    strokes: list[Array] = []
    for i in range(_STROKES):
        start, jitter, scores = numbers[i, :2], numbers[i, 2:4], numbers[i, 4:13]
        attach, where, kind, bend, side, count = numbers[i, 13:]
        if strokes:
            before = _along(strokes[-1])[:: (_SAMPLES - 1) // 2]  # both ends and the middle
            start = jnp.where(attach < 0.7, before[(3 * where).astype(jnp.int32)], start)
        # A nearer node would give a dot rather than a stroke.
        far = jnp.linalg.norm(nodes - start[None], axis=-1) > 0.45
        goal = nodes[jnp.argmax(jnp.where(far, scores, -1.0))] + 0.24 * (jitter - 0.5)
        bend = jnp.where(kind < 0.35, 0.0, jnp.where(side < 0.5, -1.0, 1.0) * (0.35 + bend / 2))
        bends = jnp.stack([bend, jnp.where(kind < 0.8, bend, -bend)])
        chord = goal - start
        normal = jnp.stack([-chord[1], chord[0]])
        thirds = jnp.array([[1.0], [2.0]], jnp.float32) / 3
        inner = start[None] + thirds * chord[None] + bends[:, None] * normal[None]
        strokes.append(jnp.concatenate([start[None], inner, goal[None]]))

    points = jnp.stack(strokes)
    present = jnp.arange(_STROKES) < jnp.where(count < 0.6, _STROKES, _STROKES - 1)
    low, high = _bounds(jax.vmap(_along)(points), present)
    return (points - ((low + high) / 2)[None, None]) / jnp.max(high - low), present


def metadata_of(
    points: Float[Array, "strokes 4 2"], present: Bool[Array, " strokes"]
) -> Float[Array, " metadata"]:
    """Return the strokes as one vector of mean about 0 and standard deviation about 1, absent strokes 0."""
    placed = jnp.where(present[:, None, None], points, 0.0) / 0.35
    return jnp.concatenate([placed.reshape(-1), jnp.where(present[-1:], 1.0, -1.0)])


def hands_of(bits: UInt32[Array, "*batch hand"]) -> Float[Array, "*batch hand"]:
    """Convert random bits to the drawer of `draw_example`: `HAND` numbers uniform in (−1, 1)."""
    # Midpoints of 2²³ cells: exact in float32, and never ±1, where the inverse error function is infinite.
    return ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1


def draw_example(
    hand: Float[Array, " hand"],
    points: Float[Array, "strokes 4 2"],
    present: Bool[Array, " strokes"],
    size: int,
) -> Float[Array, "size size 1"]:
    """Draw a character with ink 1 on 0, at least one pixel away from the border.

    Args:
      hand: drawer from `hands_of`: wobble, rotation, slant, proportions, position, size and pen.
      points, present: character from `class_strokes`.
      size: height and width of the image, in pixels.

    Returns:
      Image whose pixels are, to first order, the fraction covered by the line.
    """
    extent, pen, *shift = hand[:4]
    turn, slant, stretch, *_ = wobble = np.sqrt(2).astype(np.float32) * jax.lax.erf_inv(hand[4:])
    points = points + _WOBBLE * wobble[3:].reshape(points.shape)
    cos, sin = jnp.cos(_ANGLE * turn), jnp.sin(_ANGLE * turn)
    wide = jnp.exp(_STRETCH / 2 * stretch)
    x, y = points[..., 0] * wide, points[..., 1] / wide
    x = x + _SLANT * slant * y
    points = jnp.stack([cos * x - sin * y, sin * x + cos * y], -1)

    pen = _between(_PEN, pen) / 28
    curve = jax.vmap(_along)(points)
    low, high = _bounds(curve, present)
    # The line stays a pixel away from the border for any drawer, so that nothing is cut off.
    room = 1 - 2 * (pen + 1 / size)
    scale = jnp.minimum(_between(_EXTENT, extent), room) / jnp.max(high - low)
    slack = (room - scale * (high - low)) / 2
    offset = 0.5 + jnp.stack(shift) * jnp.minimum(slack, _SHIFT)
    curve = (curve - ((low + high) / 2)[None, None]) * scale + offset[None, None]
    dots = _dots(curve, present)

    centres = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size
    across, down = (jnp.square(centres[None] - dots[:, axis, None]) for axis in (0, 1))
    # The minimum runs over the leading axis: XLA fuses it with the sum and vectorises over pixels.
    distance = jnp.sqrt(jnp.min(down[:, :, None] + across[:, None, :], axis=0))
    return jnp.clip(0.5 + size * (pen - distance), 0.0, 1.0)[:, :, None]


def _between(bounds: tuple[float, float], position: Float[Array, ""]) -> Float[Array, ""]:
    """Interpolate linearly from the lower bound at −1 to the upper bound at 1."""
    return (bounds[0] + bounds[1]) / 2 + (bounds[1] - bounds[0]) / 2 * position


def _along(points: Float[Array, "4 2"]) -> Float[Array, "samples 2"]:
    """Return points along a cubic Bézier curve."""
    t = np.linspace(0, 1, _SAMPLES)
    weights = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3]).astype(np.float32)
    # Not a matrix product, which some accelerators compute in low precision by default.
    return sum(weights[i][:, None] * points[i][None] for i in range(4))


def _dots(
    curve: Float[Array, "strokes samples 2"], present: Bool[Array, " strokes"]
) -> Float[Array, "dots 2"]:
    """Return evenly spaced points along the present strokes, so that thin lines have no gaps."""
    start, step = curve[:, :-1], curve[:, 1:] - curve[:, :-1]
    length = jnp.where(present[:, None], jnp.linalg.norm(step, axis=-1), 0.0).reshape(-1)
    end = jnp.cumsum(length)
    target = end[-1] * ((np.arange(_DOTS, dtype=np.float32) + 0.5) / _DOTS)
    side = (end[None] <= target[:, None]).sum(-1)
    along = (target - (end - length)[side]) / length[side]
    return start.reshape(-1, 2)[side] + along[:, None] * step.reshape(-1, 2)[side]


def _bounds(
    curve: Float[Array, "strokes samples 2"], present: Bool[Array, " strokes"]
) -> tuple[Float[Array, "2"], Float[Array, "2"]]:
    """Return the smallest and largest coordinates of the present strokes."""
    mask = present[:, None, None]
    return jnp.where(mask, curve, jnp.inf).min((0, 1)), jnp.where(mask, curve, -jnp.inf).max((0, 1))
