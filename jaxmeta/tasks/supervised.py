"""Ordinary classification over all classes of few-shot tasks, for pretraining."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmeta.checks import ArgumentError, check_count
from jaxmeta.core import Batch, Key, Task, TaskDistribution, TaskStream, card_of, check_tasks
from jaxmeta.tasks.episodes import EpisodeData, EpisodeShape, draw_episode, turned_floats
from jaxmeta.tasks.glyphs import GlyphShape, draw_glyphs
from jaxmeta.tasks.strokes import HAND, class_strokes, draw_example, hands_of


def supervised(tasks: TaskDistribution | TaskStream, batch: int = 64) -> TaskDistribution:
    """Return ordinary classification over all classes of few-shot `tasks`, as a task distribution.

    Every sample is a mini-batch: for each example, a class is drawn uniformly at random, then an example of
    this class, independently of the others. The first half is the support set, the second half the queries.
    Labels are the same in every sample: 0..C−1 in the order of the class names, sorted by group first where
    there are groups. With rotations="classes" each rotation of a class is one of the C classes, with labels
    C/4 apart; with "random" every example is rotated at random.

    Args:
      tasks: tasks from `from_arrays`, a source built on it (`omniglot`, `from_folder`, `from_tfds`, `cub`,
        …), or `glyphs`. Their ways, shots and queries are not used.
      batch: number of examples per mini-batch, B; even.

    Returns:
      Tasks with the card of `tasks`, except that `ways` = C, shots and queries are 1, since classes have no
      fixed number of examples in a mini-batch, and the protocol gives the size of the mini-batch.

    Raises:
      ValueError: tasks from a source that does not store classes and examples; an odd or too small `batch`.

    Examples:
      >>> import jax, numpy as np
      >>> from jaxmeta.tasks import from_arrays
      >>> x = np.arange(60, dtype=np.float32).reshape(30, 2)   # 10 classes, 3 examples each
      >>> base = supervised(from_arrays(x, np.repeat(np.arange(10), 3), ways=5, shots=1), batch=8)
      >>> support, query = base.sample(jax.random.key(0))
      >>> support.x.shape, query.y.shape, query.ways, base.card.protocol
      ((4, 2), (4,), 10, 'all 10 classes at once, mini-batches of 8')

    References:
      Chen, Liu, Kira, Wang, Huang, A Closer Look at Few-shot Classification, 2019, arXiv 1904.04232.
    """
    check_count("batch", batch, 2)
    if batch % 2:
        raise ArgumentError("batch", f"got {batch}; it must be even")
    check_tasks(tasks)
    sample, card = getattr(tasks, "sample", None), card_of(tasks)
    classes = card.classes
    draw = None
    if isinstance(sample, jax.tree_util.Partial):
        draw = next((batch_draw for task_draw, batch_draw in _DRAWS if task_draw is sample.func), None)
    if sample is None or draw is None or classes is None:
        kind = "a stream" if isinstance(tasks, TaskStream) else f"{card.kind} tasks"
        raise ArgumentError(
            "tasks",
            f"got {kind} of {card.tasks!r}, whose classes and examples are not in memory; it must "
            "be tasks from from_arrays, from a source that holds its examples in memory (omniglot, "
            "from_folder, from_tfds, from_prepared, …) or from glyphs",
        )
    sentence = f"all {classes:,} classes at once, mini-batches of {batch}"
    card = dataclasses.replace(
        card,
        ways=classes,
        shots=1,
        queries=1,
        # The protocol of the episodes still describes the classes.
        protocol=f"{sentence}, of: {card.protocol}" if card.protocol else sentence,
    )
    return TaskDistribution(jax.tree_util.Partial(draw, _MiniBatch(classes, int(batch)), *sample.args), card)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _MiniBatch:
    """The static part of a mini-batch: its numbers of classes and examples."""

    classes: int
    size: int

    def halves(self, x: Float[Array, "n ..."], y: Int[Array, " n"]) -> Task:
        """Build a task with the first half of the examples as support set and the second half as queries."""
        half = self.size // 2
        return Task(
            *(Batch(x[part], y[part], ways=self.classes) for part in (slice(half), slice(half, None)))
        )


def _draw_array_batch(batch: _MiniBatch, shape: EpisodeShape, data: EpisodeData, key: Key) -> Task:
    """Draw a mini-batch from examples on the device."""
    label_bits, example_bits, turn_bits = jax.random.bits(key, (3, batch.size), jnp.uint32)
    labels = (label_bits % batch.classes).astype(jnp.int32)
    stored = data.sizes.shape[0]
    classes = labels % stored
    turns = (turn_bits >> 30).astype(jnp.int32) if shape.rotations == "random" else labels // stored
    within = (example_bits % data.sizes[classes].astype(jnp.uint32)).astype(jnp.int32)
    x = turned_floats(shape, data.x[data.offsets[classes] + within][:, None], turns)
    return batch.halves(x.reshape(batch.size, *shape.example), labels)


def _draw_glyph_batch(
    batch: _MiniBatch, shape: GlyphShape, first: Int[Array, ""], count: Int[Array, ""], key: Key
) -> Task:
    """Draw a mini-batch of characters."""
    bits = jax.random.bits(key, (batch.size, 1 + HAND), jnp.uint32)
    labels = (bits[:, 0] % count.astype(jnp.uint32)).astype(jnp.int32)

    def drawn(hand: Float[Array, " hand"], class_id: Int[Array, ""]) -> Float[Array, "size size 1"]:
        return draw_example(hand, *class_strokes(class_id), shape.size)

    return batch.halves(jax.vmap(drawn)(hands_of(bits[:, 1:]), first + labels), labels)


# Functions that draw episodes, each with the function that draws mini-batches from the same data.
_DRAWS: tuple[tuple[Callable[..., Task], Callable[..., Task]], ...] = (
    (draw_episode, _draw_array_batch),
    (draw_glyphs, _draw_glyph_batch),
)
