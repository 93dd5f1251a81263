"""Names of the classes of few-shot tasks, by episode and slot."""

from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Shaped

from jaxmeta.checks import ArgumentError, check_key
from jaxmeta.core import Key, TaskDistribution, TaskStream, card_of, check_tasks
from jaxmeta.tasks.embedded import draw_and_embed, draw_features, draw_many
from jaxmeta.tasks.episodes import draw_episode, names_of_slots
from jaxmeta.tasks.glyphs import draw_classes, draw_glyphs
from jaxmeta.tasks.sequences import DrawSequence


def classes_of(tasks: TaskDistribution, key: Key) -> tuple[str, ...]:
    """Return the class names of one episode, in the order of its slots.

    Args:
      tasks: tasks from `glyphs`, `from_arrays` or a source built on it (`omniglot`, `mnist`, `from_folder`,
        …).
      key: key passed to `tasks.sample`; for episode i of `jm.evaluate(key=key)` it is
        `jax.random.split(jax.random.fold_in(key, i))[0]`. `jm.run_episodes` gives the names of all episodes.

    Returns:
      A name per slot. With rotations="classes" the names of rotated classes have " turned by 90°" (180°,
      270°) appended; padding has an empty name.

    Raises:
      ValueError: tasks of another source.

    Examples:
      >>> import jax, numpy as np
      >>> from jaxmeta.tasks import from_arrays
      >>> x = np.array([[1.0], [3.0], [7.0]], np.float32).repeat(2, 0)
      >>> tasks = from_arrays(x, np.array(["one", "three", "seven"]).repeat(2), ways=2, shots=1)
      >>> key = jax.random.key(0)
      >>> classes_of(tasks, key), tasks.sample(key).support.x[:, 0].tolist()
      (('one', 'seven'), [1.0, 7.0])
    """
    check_tasks(tasks)
    check_key("key", key)
    names = None if isinstance(tasks, TaskStream) else slot_names(tasks, key[None])
    if names is None:
        raise unnamed_error(tasks)
    return tuple(map(str, names[0]))


def unnamed_error(tasks: TaskDistribution | TaskStream) -> ArgumentError:
    """Return the error for tasks whose classes have no names."""
    return ArgumentError(
        "tasks",
        f"got tasks of {card_of(tasks).tasks!r}, whose classes have no names; it must be few-shot tasks "
        "from glyphs, from_arrays or a source of images (omniglot, from_folder, stream, …)",
    )


def have_names(tasks: TaskDistribution | TaskStream) -> bool:
    """Return whether the classes of tasks have names."""
    if isinstance(tasks, TaskStream):
        return tasks.names is not None
    return slot_names(tasks, jax.random.key(0)[None]) is not None


def slot_names(tasks: TaskDistribution, keys: Array) -> Shaped[np.ndarray, "n ways"] | None:
    """Return the class names of episodes by their keys; None where classes have no names.

    Args:
      tasks: tasks with class names, see `classes_of`, or sequences of them with slots as labels.
      keys: `(n,)` key of each episode.
    """
    sample, classes = tasks.sample, tasks.classes
    if not isinstance(sample, jax.tree_util.Partial) or not classes:
        return None
    if isinstance(sample.func, DrawSequence):
        # String labels are not slots.
        if sample.func.strings is not None:
            return None
        inner = TaskDistribution(sample.args[0], tasks.card, classes)
        return slot_names(inner, jax.vmap(sample.func.episode_key)(keys))
    if sample.func is draw_and_embed:
        return slot_names(TaskDistribution(sample.args[0], tasks.card, classes), keys)
    if sample.func in (draw_episode, draw_features):
        shape, data = sample.args
        return names_of_slots(shape, classes, jax.device_get(draw_many(shape, data, keys)))
    if sample.func is draw_glyphs:
        shape, _, count = sample.args
        return np.array(classes)[np.asarray(jax.vmap(partial(draw_classes, shape, count))(keys))]
    return None
