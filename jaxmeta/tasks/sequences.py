"""Sequences of examples whose labels come one step late."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxmeta.checks import ArgumentError, check_count, check_size, shown
from jaxmeta.core import Batch, Key, Task, TaskDistribution, blank_padding, card_of, check_tasks


def sequences(
    tasks: TaskDistribution,
    *,
    length: int | None = None,
    ways: int | None = None,
    even: bool = False,
    strings: tuple[int, int] | None = None,
) -> TaskDistribution:
    """Few-shot tasks whose support set is a sequence, for learners that see one example after another.

    The support set is ordered: example t is of a class drawn at random, and its j-th example if the class
    has come j times. A learner of sequences is shown it with the label of step t − 1, and asked for that of
    step t (Santoro et al. 2016). Queries are as in `tasks`, of classes that the sequence may have.

    Args:
      tasks: few-shot classification with K shots, of one number of ways and shots. A class that comes more
        often than K times shows its examples again.
      length: number of steps of a sequence, T; None for ways · K.
      ways: number of classes in use, of those of `tasks`; None for all. Shapes stay: the last steps, T/N for
        each class that is missing, and queries of other classes are masked. For a curriculum, see
        `with_ways`.
      even: whether every class comes equally often, and not by chance.
      strings: `(letters, characters)` of labels that are random strings, (5, 5) in the paper; None for class
        slots. A label is the number Σ_i d_i · letters^i of its digits, and ways = letters^characters.

    Returns:
      TaskDistribution whose support has `(T, *shape)` examples.

    Raises:
      ValueError: regression or ragged tasks; a sequence shorter than its classes, or that does not divide
        among them; too few strings for the classes, or `ways` out of range.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> tasks = sequences(jm.tasks.glyphs("train", ways=5, shots=10, queries=1), length=50)
      >>> support, query = tasks.sample(jax.random.key(0))
      >>> support.x.shape, support.y.shape, query.y.shape
      ((50, 28, 28, 1), (50,), (5,))
    """
    check_tasks(tasks)
    if not isinstance(tasks, TaskDistribution):
        raise ArgumentError(
            "tasks", f"got {type(tasks).__name__}; sequences are made of a jm.TaskDistribution"
        )
    if tasks.card is None:
        raise ArgumentError("tasks", "got tasks without a card, whose ways and shots sequences are made of")
    card = tasks.card
    most, shots = card.ways, card.shots
    if not isinstance(most, int) or not isinstance(shots, int) or shots < 1:
        raise ArgumentError(
            "tasks",
            f"got ways={most}, shots={shots}; sequences are made of classification tasks with one "
            "number of each, and examples to show",
        )
    length = most * shots if length is None else length
    check_count("length", length)
    # Of each pair of steps it is asked whether they are of one class.
    check_size("length", (length, length), "pairs of steps")
    check_strings(strings)
    if length < most:
        raise ArgumentError("length", f"got {length} steps for {most} classes; each class needs at least one")
    if length % most:
        raise ArgumentError("length", f"got {length} steps, which must divide among {most} classes")
    if strings is not None and strings[0] ** strings[1] < most:
        raise ArgumentError(
            "strings",
            f"got {strings[1]} characters of {strings[0]} letters, {strings[0] ** strings[1]} "
            f"strings for {most} classes; more letters or characters",
        )
    labels = "" if strings is None else f", labels of {strings[1]} characters of {strings[0]} letters"
    said = f"sequences of {length} examples, labels one step late{labels}"
    card = dataclasses.replace(card, protocol=", ".join(filter(None, (card.protocol, said))))
    draw = DrawSequence(length, even, strings)
    found = TaskDistribution(jax.tree_util.Partial(draw, tasks.sample, None), card, tasks.classes)
    return found if ways is None else with_ways(found, ways)


def check_strings(strings: tuple[int, int] | None) -> None:
    """Refuses what is neither None nor a number of letters and a number of characters.

    Raises:
      ValueError: so it is, or there are too many strings to be numbered.
    """
    if strings is None:
        return
    if not isinstance(strings, tuple | list) or len(strings) != 2:
        raise ArgumentError("strings", f"got {shown(strings)}; it must be (letters, characters), or None")
    letters, characters = strings
    check_count("strings", letters, 2)
    check_count("strings", characters, 1, 31)
    check_size("strings", (letters,) * characters, "labels")


def with_ways(tasks: TaskDistribution, ways: int) -> TaskDistribution:
    """`tasks`, of `sequences`, with other `ways` in use; what is compiled once then serves for any number.

    Raises:
      ValueError: they are not of `sequences`, or have not as many classes.
    """
    sample = getattr(tasks, "sample", None)
    if not isinstance(sample, jax.tree_util.Partial) or not isinstance(sample.func, DrawSequence):
        raise ArgumentError("tasks", "must be of jm.tasks.sequences")
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
        most = support.ways
        shots, each = support.y.shape[0] // most, self.length // most
        steps = jnp.arange(self.length)
        real = None if ways is None else steps < ways * each
        if self.even:
            # What is not in use goes to the end.
            keys = jax.random.uniform(order, (self.length,))
            classes = jnp.argsort(keys if real is None else jnp.where(real, keys, 2.0)) // each
        else:
            bits = jax.random.bits(order, (self.length,), jnp.uint32)
            classes = (bits % jnp.asarray(most if ways is None else ways, jnp.uint32)).astype(jnp.int32)
        times = jnp.tril(classes[:, None] == classes[None, :], -1).sum(1)
        x = support.x[classes * shots + times % shots]
        label = jnp.arange(most, dtype=jnp.int32)
        slots = most
        if self.strings is not None:
            letters, characters = self.strings
            slots = letters**characters
            # Different strings for different classes.
            label = jax.random.choice(names, slots, (most,), replace=False).astype(jnp.int32)
        asked = query.mask if ways is None else query.y < ways
        return Task(
            blank_padding(Batch(x, label[classes], mask=real, ways=slots)),
            blank_padding(Batch(query.x, label[query.y], mask=asked, ways=slots)),
        )
