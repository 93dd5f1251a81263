"""Sequences of examples whose labels are shown one step later."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxmeta.checks import ArgumentError, check_count, check_size, format_value
from jaxmeta.core import Batch, Key, Task, TaskDistribution, blank_padding, card_of, check_tasks


def sequences(
    tasks: TaskDistribution,
    *,
    length: int | None = None,
    ways: int | None = None,
    even: bool = False,
    strings: tuple[int, int] | None = None,
) -> TaskDistribution:
    """Return few-shot tasks whose support set is a sequence, for learners that read examples in order.

    Step t of the support set has a random class, and the next example of this class. A sequence learner
    receives example t with the label of step t − 1 and predicts the label of step t (Santoro et al. 2016).
    Queries are those of `tasks`.

    Args:
      tasks: few-shot classification tasks with fixed ways N and shots K. A class that occurs more than K
        times repeats its examples.
      length: number of steps of a sequence, T; None: N · K.
      ways: number of classes in use, at most N; None: all. Shapes do not change: the last T/N steps per
        unused class and the queries of unused classes are masked. For a curriculum, see `with_ways`.
      even: whether every class occurs T/N times; otherwise classes are drawn independently.
      strings: `(letters, characters)` of random strings used as labels, (5, 5) in the paper; None: class
        slots. A string with digits d_i has the label Σ_i d_i · letters^i, and ways = letters^characters.

    Returns:
      TaskDistribution whose support set has `(T, *shape)` examples.

    Raises:
      ValueError: regression or ragged tasks; a length that is not a multiple of the number of classes; fewer
        strings than classes; or `ways` out of range.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> tasks = sequences(jm.tasks.glyphs("train", ways=5, shots=10, queries=1), length=50)
      >>> support, query = tasks.sample(jax.random.key(0))
      >>> support.x.shape, support.y.shape, query.y.shape
      ((50, 28, 28, 1), (50,), (5,))
    """
    check_tasks(tasks)
    if not isinstance(tasks, TaskDistribution):
        raise ArgumentError("tasks", f"got {type(tasks).__name__}; it must be a jm.TaskDistribution")
    if tasks.card is None:
        raise ArgumentError("tasks", "got tasks without a card; its ways and shots are needed")
    card = tasks.card
    num_classes, shots = card.ways, card.shots
    if not isinstance(num_classes, int) or not isinstance(shots, int) or shots < 1:
        raise ArgumentError(
            "tasks",
            f"got ways={num_classes}, shots={shots}; it must be classification tasks with fixed ways and at "
            "least one shot",
        )
    length = num_classes * shots if length is None else length
    check_count("length", length)
    # All pairs of steps are compared to number the occurrences of each class.
    check_size("length", (length, length), "pairs of steps")
    check_strings(strings)
    if length < num_classes:
        raise ArgumentError(
            "length", f"got {length} steps for {num_classes} classes; it must be at least one step per class"
        )
    if length % num_classes:
        raise ArgumentError("length", f"got {length}; it must be a multiple of the {num_classes} classes")
    if strings is not None and strings[0] ** strings[1] < num_classes:
        raise ArgumentError(
            "strings",
            f"got {strings[1]} characters of {strings[0]} letters, which is {strings[0] ** strings[1]} "
            f"strings for {num_classes} classes; use more letters or characters",
        )
    labels = "" if strings is None else f", labels of {strings[1]} characters of {strings[0]} letters"
    sentence = f"sequences of {length} examples, labels one step late{labels}"
    card = dataclasses.replace(card, protocol=", ".join(filter(None, (card.protocol, sentence))))
    draw = DrawSequence(length, even, strings)
    result = TaskDistribution(jax.tree_util.Partial(draw, tasks.sample, None), card, tasks.classes)
    return result if ways is None else with_ways(result, ways)


def check_strings(strings: tuple[int, int] | None) -> None:
    """Check that `strings` is None or a pair (letters, characters).

    Raises:
      ValueError: it is not, or it gives too many strings for int32 labels.
    """
    if strings is None:
        return
    if not isinstance(strings, tuple | list) or len(strings) != 2:
        raise ArgumentError(
            "strings", f"got {format_value(strings)}; it must be (letters, characters) or None"
        )
    letters, characters = strings
    check_count("strings", letters, 2)
    check_count("strings", characters, 1, 31)
    check_size("strings", (letters,) * characters, "labels")


def with_ways(tasks: TaskDistribution, ways: int) -> TaskDistribution:
    """Return tasks of `sequences` with another number of classes in use.

    The number is an array, so that a compiled function serves all numbers: useful for a curriculum.

    Args:
      tasks: tasks from `sequences`.
      ways: number of classes in use.

    Raises:
      ValueError: `tasks` are not from `sequences`, or have fewer classes.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> tasks = sequences(jm.tasks.glyphs("train", ways=5, shots=2, queries=1))
      >>> jax.eval_shape(with_ways(tasks, 3).sample, jax.random.key(0)).support.mask.shape
      (10,)
    """
    sample = getattr(tasks, "sample", None)
    if not isinstance(sample, jax.tree_util.Partial) or not isinstance(sample.func, DrawSequence):
        raise ArgumentError(
            "tasks", f"got {type(tasks).__name__} of another source; it must be from jm.tasks.sequences"
        )
    check_count("ways", ways)
    most = card_of(tasks).ways
    if ways > most:  # type: ignore[operator]
        raise ArgumentError("ways", f"got {ways}; it must be at most the {most} classes of the tasks")
    return tasks._replace(
        sample=jax.tree_util.Partial(sample.func, sample.args[0], jnp.asarray(ways, jnp.int32))
    )


@dataclasses.dataclass(frozen=True)
class DrawSequence:
    """Draw a task, and make its support set a sequence."""

    length: int
    even: bool
    strings: tuple[int, int] | None

    @staticmethod
    def episode_key(key: Key) -> Key:
        """Return the key that the task is drawn by."""
        return jax.random.split(key, 3)[0]

    def __call__(self, sample, ways: Int[Array, ""] | None, key: Key) -> Task:
        _, order, names = jax.random.split(key, 3)
        support, query = sample(self.episode_key(key))
        num_classes = support.ways
        shots, per_class = support.y.shape[0] // num_classes, self.length // num_classes
        steps = jnp.arange(self.length)
        real = None if ways is None else steps < ways * per_class
        if self.even:
            # Masked steps sort to the end.
            keys = jax.random.uniform(order, (self.length,))
            classes = jnp.argsort(keys if real is None else jnp.where(real, keys, 2.0)) // per_class
        else:
            bits = jax.random.bits(order, (self.length,), jnp.uint32)
            classes = (bits % jnp.asarray(num_classes if ways is None else ways, jnp.uint32)).astype(
                jnp.int32
            )
        # Number of earlier steps of the same class.
        times = jnp.tril(classes[:, None] == classes[None, :], -1).sum(1)
        x = support.x[classes * shots + times % shots]
        label = jnp.arange(num_classes, dtype=jnp.int32)
        slots = num_classes
        if self.strings is not None:
            letters, characters = self.strings
            slots = letters**characters
            # Without replacement: classes have different strings.
            label = jax.random.choice(names, slots, (num_classes,), replace=False).astype(jnp.int32)
        query_mask = query.mask if ways is None else query.y < ways
        return Task(
            blank_padding(Batch(x, label[classes], mask=real, ways=slots)),
            blank_padding(Batch(query.x, label[query.y], mask=query_mask, ways=slots)),
        )
