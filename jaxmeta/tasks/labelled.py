"""All examples of few-shot tasks as one labelled set: what transfer learning trains on and is judged on."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from jaxmeta.checks import ArgumentError, check_count, check_key, check_labels, some
from jaxmeta.core import Key, TaskDistribution, TaskStream, card_of, check_tasks
from jaxmeta.tasks.episodes import EpisodeData, EpisodeShape, draw_episode, turned_floats
from jaxmeta.tasks.glyphs import GlyphShape, draw_glyphs
from jaxmeta.tasks.strokes import HAND, class_strokes, draw_example, hands_of


class LabelledImages(NamedTuple):
    """Examples and their classes.

    Attributes:
      x: `(n, *shape)` as tasks show them; of uint8 images float32 in [0, 1].
      y: `(n,)` labels 0..C−1, ascending; every class has examples.
    """

    x: Float[Array, "n ..."]
    y: Int32[Array, " n"]


def labelled(
    tasks: TaskDistribution | TaskStream, *, per_class: int | None = None, key: Key | None = None
) -> LabelledImages:
    """All examples of all classes that few-shot `tasks` are drawn from, each once, with its class.

    Labels are those of `supervised`: 0..C−1 in the order of the class names (group after group, where there
    are groups). With rotations="classes" each turn of a class is one of the C, C/4 apart, as it is to the
    tasks: of n stored examples there are 4n. The arrays are float32 and whole, four times as large as uint8
    images are stored.

    Args:
      tasks: of `from_arrays`, of what builds on it (`omniglot`, `mnist`, `from_folder`, …), or of `glyphs`.
        Their ways, shots and queries play no part.
      per_class: for `glyphs`, whose examples have no end: how many to draw of each class.
      key: for `glyphs`, of these drawings; those of a class depend on `key` and the class alone.

    Raises:
      ValueError: tasks of another source, whose classes or examples are not at hand; rotations="random", with
        which an example has no turn of its own; `per_class` and `key` missing for `glyphs`, or given for
        others.

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
    if not isinstance(sample, jax.tree_util.Partial) or sample.func not in (draw_episode, draw_glyphs):
        kind = "a stream" if isinstance(tasks, TaskStream) else f"{card.kind} tasks"
        raise ArgumentError(
            "tasks",
            f"got {kind} of {card.tasks!r}, whose classes and examples are not at hand; it must "
            "be few-shot tasks of from_arrays, of a source that holds its examples in memory (omniglot, "
            "mnist, from_folder, from_tfds, from_prepared, …) or of glyphs",
        )
    if sample.func is draw_glyphs:
        if per_class is None or key is None:
            raise ArgumentError(
                "per_class, key", f"glyphs are drawn, which takes both; got {per_class}, {key}"
            )
        check_count("per_class", per_class, 1)
        check_key("key", key)
        return _of_glyphs(*sample.args, per_class=int(per_class), key=key)
    if per_class is not None or key is not None:
        raise ArgumentError("per_class, key", f"are for glyphs; of {card.tasks!r} all examples are taken")
    return _of_arrays(*sample.args)


def split_per_class(
    y: Int[Array | np.ndarray, " n"], shots: int, key: Key
) -> tuple[Int[np.ndarray, " chosen"], Int[np.ndarray, " rest"]]:
    """Rows of `shots` random examples of each class, to learn from, and the rows of all others.

    Args:
      y: labels, any integers; the classes are those that occur.
      shots: K, examples of each class.
      key: of the draw.

    Returns:
      `(C · K,)` rows class after class in ascending order of the labels, those of a class in the order they
      were drawn in; and the other rows, ascending.

    Raises:
      ValueError: no labels, fewer than one shot, or a class with fewer than K + 1 examples, of which none
        would be left.

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
        raise ArgumentError("y", "got no example")
    classes, place, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    small = [f"{label} ({size})" for label, size in zip(classes, sizes, strict=True) if size <= shots]
    if small:
        raise ArgumentError(
            "shots",
            f"got {shots}, which takes classes of at least {shots + 1} examples, one of them to be "
            f"judged on; too few in {len(small)} of {len(classes)} (label and size): {some(small)}",
        )
    order = np.asarray(jax.random.permutation(key, len(labels)))
    order = order[np.argsort(place[order], kind="stable")]
    starts = np.cumsum(sizes) - sizes
    chosen = order[np.add.outer(starts, np.arange(shots)).reshape(-1)]
    return chosen, np.setdiff1d(np.arange(len(labels)), chosen)


# Compiled, so that integers, quotients and turns are not all held at once.
_floats = jax.jit(turned_floats)


def _of_arrays(shape: EpisodeShape, data: EpisodeData) -> LabelledImages:
    if shape.rotations == "random":
        raise ArgumentError(
            "tasks",
            'got rotations="random", with which every task turns an example otherwise; it must be '
            '"none", or "classes" for the turns to be classes of their own',
        )
    y = jnp.repeat(jnp.arange(data.sizes.shape[0], dtype=jnp.int32), data.sizes)
    turns = range(4 if shape.rotations == "classes" else 1)
    x = [_floats(shape, data.x[None], jnp.full(1, turn, jnp.int32))[0] for turn in turns]
    return LabelledImages(
        jnp.concatenate(x).reshape(-1, *shape.example),
        jnp.concatenate([y + turn * data.sizes.shape[0] for turn in turns]),
    )


def _of_glyphs(
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
