"""Procedurally drawn characters: few-shot classification without data files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from jaxmeta.checks import ArgumentError, check_count, check_size, format_value
from jaxmeta.core import Batch, Key, ProtocolCard, SplitName, Task, TaskDistribution
from jaxmeta.tasks.splits import ClassSplit, check_part
from jaxmeta.tasks.strokes import HAND, class_strokes, draw_example, hands_of, metadata_of
from jaxmeta.tasks.subset import ordered_subset

# Class ids of each part of the split, disjoint, so that test characters are new.
CLASSES = {"train": range(0, 4096), "validation": range(4096, 5120), "test": range(5120, 6144)}


def glyphs(
    split: SplitName = "train", *, ways: int = 5, shots: int = 1, queries: int = 1, size: int = 28
) -> TaskDistribution:
    """Return classification tasks of procedurally drawn characters.

    A class is an integer that seeds two or three smooth strokes; an example is these strokes with a
    drawer's wobble, rotation, slant, proportions, position, size and pen, drawn on the device inside the
    compiled step. `ways` classes are drawn without replacement and in random order, so that a label slot
    is independent of the class; the examples of a class are independent drawings.

    With `shots=0` the tasks are zero-shot: the support set is one `glyph_metadata` vector per class and
    `support.y = arange(ways)`.

    Args:
      split: "train" (4,096 classes), "validation" or "test" (1,024 classes each); the parts are disjoint.
      ways: classes per task.
      shots: images per class to learn from, or 0 for one metadata vector per class.
      queries: images per class to evaluate on.
      size: height and width of the images, in pixels.

    Returns:
      Tasks with images `(ways * n, size, size, 1)`, float32 in [0, 1] with ink 1, ordered by slot.

    Raises:
      ValueError: an unknown split; fewer than one way or query, or fewer than zero shots; more ways than
        classes in the split; or a size below 8 pixels, too small to render strokes.

    Examples:
      >>> import jax
      >>> task = glyphs("test", ways=5, shots=1, queries=3).sample(jax.random.key(0))
      >>> task.support.x.shape, task.query.y.tolist()
      ((5, 28, 28, 1), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4])

    References:
      Lake et al., Human-level concept learning through probabilistic program induction, 2015, for
      characters as programs of strokes. The characters and their distribution are specific to jaxmeta.
    """
    check_part(split)
    check_count("ways", ways, 1)
    check_count("shots", shots, 0)
    check_count("queries", queries, 1)
    check_count("size", size, 8)
    classes = CLASSES[split]
    if ways > len(classes):
        raise ArgumentError(
            "ways", f"got {ways}; it must be at most {len(classes)}, the classes of split {split!r}"
        )
    check_size("ways, shots, queries, size", (ways, shots + queries, max(size * size, HAND)), "a task")
    card = ProtocolCard(
        "glyphs",
        split,
        "classification",
        ways,
        shots,
        queries,
        classes=len(classes),
        split_hash=_split().hash,
        protocol=f"procedural characters, {size} x {size} pixels",
    )
    shape = GlyphShape(ways, shots, queries, size)
    data = jnp.int32(classes.start), jnp.int32(len(classes))
    return TaskDistribution(jax.tree_util.Partial(draw_glyphs, shape, *data), card, getattr(_split(), split))


def glyph_metadata(class_id: Int[Array | np.ndarray, "*batch"] | int) -> Float[Array, "*batch metadata"]:
    """Return the metadata of classes: their strokes, as vectors of about unit scale.

    Args:
      class_id: class id, or an array of ids.

    Returns:
      Control points of the strokes before a drawer's variation, with absent strokes 0, and ±1 for whether
      the last stroke is present; float32, `(25,)` for one class.

    Raises:
      ValueError: a class id outside 0 … 6,143. Traced ids are not checked.

    Examples:
      >>> glyph_metadata(7).shape
      (25,)
    """
    if not isinstance(class_id, jax.core.Tracer):
        ids, end = np.asarray(class_id), max(classes.stop for classes in CLASSES.values())
        if not np.issubdtype(ids.dtype, np.integer) or ((ids < 0) | (ids >= end)).any():
            raise ArgumentError(
                "class_id", f"got {format_value(class_id)}; it must be integers from 0 to {end - 1}"
            )
    class_ids = jnp.asarray(class_id, jnp.int32)
    return _metadata(class_ids.reshape(-1)).reshape(*class_ids.shape, -1)


@jax.jit
def _metadata(class_ids: Int[Array, " n"]) -> Float[Array, "n metadata"]:
    return jax.vmap(lambda class_id: metadata_of(*class_strokes(class_id)))(class_ids)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class GlyphShape:
    """The static part of a task of characters."""

    ways: int
    shots: int
    queries: int
    size: int


def draw_classes(shape: GlyphShape, count: Int[Array, ""], key: Key) -> Int[Array, " ways"]:
    """Return the classes of the task of a key, by slot, out of `count` classes."""
    return _drawn_bits(shape, count, key)[0]


def draw_glyphs(shape: GlyphShape, first: Int[Array, ""], count: Int[Array, ""], key: Key) -> Task:
    """Draw one task from the `count` classes that start at `first`."""
    ways, per_class = shape.ways, shape.shots + shape.queries
    drawn, bits = _drawn_bits(shape, count, key)
    hands = hands_of(bits).reshape(ways, per_class, HAND)
    points, present = jax.vmap(class_strokes)(first + drawn)

    def of_class(hands, points, present):
        return jax.vmap(lambda hand: draw_example(hand, points, present, shape.size))(hands)

    images = jax.vmap(of_class)(hands, points, present)
    slots = jnp.arange(ways, dtype=jnp.int32)

    def batch(images: Float[Array, "ways n size size 1"]) -> Batch:
        x = images.reshape(-1, *images.shape[2:])
        return Batch(x, jnp.repeat(slots, images.shape[1]), ways=ways)

    support = batch(images[:, : shape.shots])
    if not shape.shots:
        support = Batch(jax.vmap(metadata_of)(points, present), slots, ways=ways)
    return Task(support, batch(images[:, shape.shots :]))


def _drawn_bits(
    shape: GlyphShape, count: Int[Array, ""], key: Key
) -> tuple[Int[Array, " ways"], UInt32[Array, " bits"]]:
    """Return the classes of a task, and the random bits of the drawers of its examples."""
    ways, per_class = shape.ways, shape.shots + shape.queries
    # One call of the random generator: each costs compile time.
    bits = jax.random.bits(key, (ways + ways * per_class * HAND,), jnp.uint32)
    return ordered_subset(bits[:ways], count), bits[ways:]


@functools.cache
def _split() -> ClassSplit:
    return ClassSplit(**{part: tuple(f"glyph{i}" for i in classes) for part, classes in CLASSES.items()})
