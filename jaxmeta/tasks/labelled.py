"""All examples of few-shot tasks as one labelled data set, for transfer learning."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from jaxmeta.checks import ArgumentError, check_count, check_key, check_labels, format_value, join_names
from jaxmeta.core import Key, TaskDistribution, TaskStream, card_of, check_tasks
from jaxmeta.tasks.embedded import draw_features
from jaxmeta.tasks.episodes import EpisodeData, EpisodeShape, draw_episode, turned_floats
from jaxmeta.tasks.glyphs import GlyphShape, draw_glyphs
from jaxmeta.tasks.strokes import HAND, class_strokes, draw_example, hands_of


class LabelledImages(NamedTuple):
    """Examples and their classes.

    Attributes:
      x: `(n, *shape)` examples, as in the tasks; uint8 images are float32 in [0, 1].
      y: `(n,)` labels 0..C−1 in ascending order; every class has examples.
    """

    x: Float[Array, "n ..."]
    y: Int32[Array, " n"]


def labelled(
    tasks: TaskDistribution | TaskStream, *, per_class: int | None = None, key: Key | None = None
) -> LabelledImages:
    """Return every example of all classes of few-shot `tasks` once, with its label.

    Labels are the same as in `supervised`: 0..C−1 in the order of the class names, sorted by group first
    where there are groups. With rotations="classes" each rotation of a class is one of the C classes, with
    labels C/4 apart, so that n stored examples give 4n. The arrays are float32, four times the size of
    stored uint8 images.

    Args:
      tasks: tasks from `from_arrays`, a source built on it (`omniglot`, `mnist`, `from_folder`, …),
        `embedded` tasks of these, or `glyphs`. Their ways, shots and queries are not used.
      per_class: for `glyphs` only: number of drawings of each class.
      key: for `glyphs` only: random key; the drawings of a class depend only on `key` and the class.

    Raises:
      ValueError: tasks from a source that does not store classes and examples; rotations="random", where an
        example has no fixed rotation; or `per_class` and `key` missing for `glyphs`, or given for other
        sources.

    Examples:
      >>> import numpy as np
      >>> from jaxmeta.tasks import from_arrays
      >>> few = from_arrays(np.eye(4, dtype=np.float32), ["b", "a", "b", "a"], ways=2, shots=1)
      >>> x, y = labelled(few)
      >>> x.argmax(1).tolist(), y.tolist()
      ([1, 3, 0, 2], [0, 0, 1, 1])
    """
    check_tasks(tasks)
    sample, card = getattr(tasks, "sample", None), card_of(tasks)
    if not isinstance(sample, jax.tree_util.Partial) or sample.func not in _LISTABLE:
        kind = "a stream" if isinstance(tasks, TaskStream) else f"{card.kind} tasks"
        raise ArgumentError(
            "tasks",
            f"got {kind} of {card.tasks!r}, whose classes and examples are not in memory; it must "
            "be few-shot tasks from from_arrays, from a source that holds its examples in memory (omniglot, "
            "mnist, from_folder, from_tfds, from_prepared, …) or from glyphs",
        )
    if sample.func is draw_glyphs:
        if per_class is None or key is None:
            raise ArgumentError(
                "per_class, key",
                f"got {format_value(per_class)}, {format_value(key)}; drawing glyphs needs both",
            )
        check_count("per_class", per_class, 1)
        check_key("key", key)
        return _label_glyphs(*sample.args, per_class=int(per_class), key=key)
    if per_class is not None or key is not None:
        raise ArgumentError("per_class, key", f"only apply to glyphs, not to {card.tasks!r}; omit them")
    shape, data = sample.args
    return _label_arrays(shape, data, sample.func is draw_features)


def split_per_class(
    y: Int[Array | np.ndarray, " n"], shots: int, key: Key
) -> tuple[Int[np.ndarray, " chosen"], Int[np.ndarray, " rest"]]:
    """Return the rows of `shots` random examples per class, and the rows of all other examples.

    Args:
      y: `(n,)` integer labels; the classes are the labels that occur.
      shots: number of examples per class, K.
      key: random key.

    Returns:
      `(C · K,)` rows sorted by label, in random order within a class; and the other rows in ascending order.

    Raises:
      ValueError: no labels, fewer than one shot, or a class with fewer than K + 1 examples, which would leave
        none for the second set.

    Examples:
      >>> import jax, numpy as np
      >>> chosen, rest = split_per_class(np.array([1, 0, 1, 0, 1]), 1, jax.random.key(0))
      >>> len(chosen), len(rest), sorted([*chosen.tolist(), *rest.tolist()])
      (2, 3, [0, 1, 2, 3, 4])
    """
    check_count("shots", shots)
    check_key("key", key)
    labels = np.asarray(y)
    check_labels("y", labels)
    if not labels.size:
        raise ArgumentError("y", "got no examples; there must be at least one")
    classes, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    small = [f"{label} ({size})" for label, size in zip(classes, sizes, strict=True) if size <= shots]
    if small:
        raise ArgumentError(
            "shots",
            f"got {shots}, which needs at least {shots + 1} examples per class, so that one is left to "
            f"evaluate on; {len(small)} of {len(classes)} classes have fewer (label and size): "
            f"{join_names(small)}",
        )
    order = np.asarray(jax.random.permutation(key, len(labels)))
    order = order[np.argsort(index[order], kind="stable")]
    starts = np.cumsum(sizes) - sizes
    chosen = order[np.add.outer(starts, np.arange(shots)).reshape(-1)]
    return chosen, np.setdiff1d(np.arange(len(labels)), chosen)


# Samplers whose examples can be listed.
_LISTABLE = draw_episode, draw_features, draw_glyphs
# Compiled, so that the uint8 array, the floats and their rotation are not all in memory at once.
_floats = jax.jit(turned_floats)


def _label_arrays(shape: EpisodeShape, data: EpisodeData, embedded: bool) -> LabelledImages:
    if shape.rotations == "random":
        raise ArgumentError(
            "tasks",
            'got rotations="random", where an example has no fixed rotation; it must be "none", or "classes" '
            "to count rotations as additional classes",
        )
    y = jnp.repeat(jnp.arange(data.sizes.shape[0], dtype=jnp.int32), data.sizes)
    turns = range(4 if shape.rotations == "classes" else 1)
    if embedded:
        # The features of the rotations of one image are in adjacent rows.
        x = [data.x[turn :: len(turns)] for turn in turns]
    else:
        x = [_floats(shape, data.x[None], jnp.full(1, turn, jnp.int32))[0] for turn in turns]
    return LabelledImages(
        jnp.concatenate(x).reshape(-1, *(data.x.shape[1:] if embedded else shape.example)),
        jnp.concatenate([y + turn * data.sizes.shape[0] for turn in turns]),
    )


def _label_glyphs(
    shape: GlyphShape, first: Int[Array, ""], count: Int[Array, ""], *, per_class: int, key: Key
) -> LabelledImages:
    labels = jnp.arange(int(count), dtype=jnp.int32)
    x = _drawings(shape.size, per_class, first + labels, key)
    return LabelledImages(x.reshape(-1, *x.shape[2:]), jnp.repeat(labels, per_class))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _drawings(
    size: int, per_class: int, class_ids: Int[Array, " classes"], key: Key
) -> Float[Array, "classes per_class size size 1"]:
    def of_class(class_id: Int[Array, ""]) -> Float[Array, "per_class size size 1"]:
        hands = hands_of(jax.random.bits(jax.random.fold_in(key, class_id), (per_class, HAND), jnp.uint32))
        strokes = class_strokes(class_id)
        return jax.vmap(lambda hand: draw_example(hand, *strokes, size))(hands)

    return jax.lax.map(of_class, class_ids)
