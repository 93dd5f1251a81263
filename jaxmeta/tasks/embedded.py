"""Few-shot tasks of features in place of images."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmeta.checks import ArgumentError, check_count, check_function
from jaxmeta.core import Batch, Key, Model, Task, TaskDistribution, TaskStream, card_of, check_tasks
from jaxmeta.tasks.episodes import (
    Drawn,
    EpisodeData,
    EpisodeShape,
    draw_episode,
    draw_from,
    make_task,
    with_metadata,
)
from jaxmeta.tasks.feature_cache import BATCH, Embedder, features_description
from jaxmeta.tasks.sequences import DrawSequence

# Images in one call of an embedder.
_BLOCK = 4096


def embedded(
    tasks: TaskDistribution | TaskStream,
    embed: Model | Callable[[Array], Array],
    *,
    name: str = "a fixed network",
    batch: int = BATCH,
    report: Callable[[int, int], None] | None = None,
) -> TaskDistribution | TaskStream:
    """Return the same tasks with the features of each image in its place.

    An episode has the same classes, examples and slots as the one of `tasks` with the same key, and `x` has
    shape (n, dim). Learners on such tasks take the features as their input: `jm.ridge(jm.nn.MLP(out=64))`, or
    a model without parameters for a head on the features themselves.

    Images that are stored (`from_arrays` and the sources built on it) are embedded here, once each; with
    rotations also each of their quarter turns. The images of a stream are embedded as they are read, so that
    never more than one batch of them is in memory, and features are kept. Other tasks, such as `glyphs`,
    draw new images for each episode and embed them inside the sampler. The support set of zero-shot tasks,
    metadata of the classes, stays as it is.

    Args:
      tasks: few-shot classification tasks.
      embed: a `jm.features`, or any `jm.Model` without batch statistics, with the parameters of its `init`;
        or a function from images `(n, *shape)` to features `(n, dim)`, such as
        `jax.tree_util.Partial(model.apply, params)`. Features of `jm.features` are kept in the cache folder.
      name: description of the network, for the protocol card.
      batch: largest number of images in one call of `embed`.
      report: function `(done, total)` that is called after each computed batch.

    Returns:
      Tasks of the same kind, with the class names and the card of `tasks`.

    Raises:
      ArgumentError: regression tasks or sequences; a model with batch statistics; features that are not
        finite vectors.

    Examples:
      >>> import jax, numpy as np
      >>> import jaxmeta as jm
      >>> x, y = np.arange(1.0, 7.0).reshape(3, 2).repeat(2, 0), np.repeat(["ant", "bee", "cow"], 2)
      >>> tasks = jm.tasks.from_arrays(x, y, ways=2, shots=1)
      >>> features = jm.tasks.embedded(tasks, lambda x: x.sum(1, keepdims=True), name="a sum")
      >>> key = jax.random.key(0)
      >>> tasks.sample(key).support.x.tolist(), features.sample(key).support.x.tolist()
      ([[1.0, 2.0], [3.0, 4.0]], [[3.0], [7.0]])
      >>> jm.tasks.classes_of(features, key), features.card.protocol
      (('ant', 'bee'), 'features of a sum')
    """
    check_tasks(tasks)
    check_count("batch", batch)
    if report is not None:
        check_function("report", report, "a function (done, total)")
    function = as_embedding(tasks, embed)
    embedder = Embedder(function, description=features_description(function), batch=batch, report=report)
    return embed_tasks(tasks, function, embedder, name)


def as_embedding(tasks: TaskDistribution | TaskStream, embed: Any) -> Any:
    """Return `embed` as a `jax.tree_util.Partial` of images, after checking it on the shapes of `tasks`.

    Raises:
      ArgumentError: see `embedded`.
    """
    x = _example(tasks)
    if isinstance(embed, Model):
        if embed.apply_norm is not None:
            raise ArgumentError(
                "embed",
                "got a model with batch statistics, by which features would depend on the other images; give "
                "a function with fixed ones: lambda x: model.apply_norm(params, x, stats=stats)[0]",
            )
        embed = jax.tree_util.Partial(embed.apply, embed.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype)))
    check_function("embed", embed, "a jm.Model such as jm.features(…), or a function of images")
    if not isinstance(embed, jax.tree_util.Partial):
        embed = jax.tree_util.Partial(embed)
    z = jax.eval_shape(embed, x)
    shape = getattr(z, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 1 or not jnp.issubdtype(z.dtype, jnp.floating):
        got = type(z).__name__ if shape is None else f"{z.dtype} of shape {shape}"
        raise ArgumentError(
            "embed", f"returns {got} for one example of shape {x.shape[1:]}; it must be floats (1, dim)"
        )
    return embed


def _example(tasks: TaskDistribution | TaskStream) -> jax.ShapeDtypeStruct:
    """Return shape and type of one query.

    Raises:
      ArgumentError: the tasks are not few-shot classification tasks.
    """
    source = card_of(tasks).tasks
    if isinstance(tasks, TaskStream):
        query = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tasks.at(0).query)
    else:
        if isinstance(tasks.sample, jax.tree_util.Partial) and isinstance(tasks.sample.func, DrawSequence):
            raise ArgumentError("tasks", "got sequences; embed the tasks first: sequences(embedded(…), …)")
        query = jax.eval_shape(tasks.sample, jax.random.key(0)).query
    if not jnp.issubdtype(query.y.dtype, jnp.integer):
        raise ArgumentError("tasks", f"got regression tasks of {source!r}; they must be classification tasks")
    return jax.ShapeDtypeStruct((1, *query.x.shape[1:]), query.x.dtype)


def embed_tasks(
    tasks: TaskDistribution | TaskStream,
    function: Any,
    embedder: Embedder,
    name: str,
    keys: Array | None = None,
) -> TaskDistribution | TaskStream:
    """Return tasks of features; see `embedded`.

    Args:
      tasks: tasks, which `as_embedding` has checked.
      function: embedding of images as a pytree.
      embedder: function that embeds images of the host by `function`.
      name: description of the network, for the card.
      keys: keys of the only episodes that will be drawn; stored images that these do not have are not
        embedded, and their features are zero. None for all images.
    """
    card = tasks.card
    if card is not None:
        sentence = ", ".join(filter(None, (card.protocol, f"features of {name}")))
        card = dataclasses.replace(card, protocol=sentence)
    if isinstance(tasks, TaskStream):
        return _embed_stream(tasks, embedder)._replace(card=card)
    sample: Any = tasks.sample
    if is_stored(tasks):
        shape, data = sample.args
        sample = jax.tree_util.Partial(draw_features, shape, _embed_data(shape, data, embedder, keys))
    else:
        inner = sample if isinstance(sample, jax.tree_util.Partial) else jax.tree_util.Partial(sample)
        sample = jax.tree_util.Partial(draw_and_embed, inner, function)
    return TaskDistribution(sample, card, tasks.classes)


def is_stored(tasks: TaskDistribution | TaskStream) -> bool:
    """Return whether the images of tasks are stored, as those of `from_arrays` are."""
    sample = getattr(tasks, "sample", None)
    return isinstance(sample, jax.tree_util.Partial) and sample.func is draw_episode


def draw_features(shape: EpisodeShape, data: EpisodeData, key: Key) -> Task:
    """Draw one episode of features.

    Args:
      shape: static part of the episodes of images.
      data: examples, whose `x` has the features of each image; with rotations those of its four quarter turns
        in turn.
      key: key of the episode.
    """
    drawn = draw_from(shape, data, key)
    rows = drawn.rows * _turns(shape) + (drawn.turns[:, None] if _turns(shape) > 1 else 0)
    plain = dataclasses.replace(shape, rotations="none", example=data.x.shape[1:])
    shots = shape.shots[1]
    task = make_task(plain, drawn, data.x[rows[:, :shots]], data.x[rows[:, shots:]])
    return with_metadata(task, data, drawn)


def draw_and_embed(sample: Callable[[Key], Task], embed: Callable[[Array], Array], key: Key) -> Task:
    """Draw one episode of images, and return it with their features."""
    return _embed_task(sample(key), lambda part: _features(part, embed(part.x)))


def _embed_task(task: Task, embed: Callable[[Batch], Batch]) -> Task:
    """Return a task, or a batch of tasks, with the features of its images."""
    # The metadata of zero-shot tasks has a shape different from that of images.
    has_images = task.support.x.shape[task.support.y.ndim :] == task.query.x.shape[task.query.y.ndim :]
    return Task(embed(task.support) if has_images else task.support, embed(task.query))


def _features(batch: Batch, z: Array) -> Batch:
    """Return `batch` with features in place of its examples, zero for padding."""
    if batch.mask is not None:
        z = jnp.where(batch.mask[..., None], z, 0)
    return dataclasses.replace(batch, x=z)


def _turns(shape: EpisodeShape) -> int:
    return 1 if shape.rotations == "none" else 4


def _embed_data(
    shape: EpisodeShape, data: EpisodeData, embedder: Embedder, keys: Array | None
) -> EpisodeData:
    """Return the data with the features of images, in the order of `draw_features`."""
    turns, stored = _turns(shape), np.asarray(data.x)
    if keys is None:
        wanted = np.ones((len(stored), turns), bool)
    else:
        wanted = np.zeros((len(stored), turns), bool)
        drawn = jax.device_get(draw_many(shape, data, keys))
        wanted[drawn.rows, (drawn.turns if turns > 1 else np.zeros_like(drawn.turns))[..., None]] = True
    embedder.expected = embedder.seen + int(wanted.sum())
    z: np.ndarray | None = None
    for turn in range(turns):
        rows = np.flatnonzero(wanted[:, turn])
        # In blocks, so that no second copy of all images is in memory.
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            images = stored[block].reshape(-1, *shape.example)
            part = embedder(np.rot90(images, turn, (1, 2)) if turn else images)
            if z is None:
                z = np.zeros((len(stored), turns, part.shape[1]), np.float32)
            z[block, turn] = part
    embedder.save()
    assert z is not None
    return data._replace(x=jnp.asarray(z.reshape(-1, z.shape[2])))


@partial(jax.jit, static_argnums=0)
def draw_many(shape: EpisodeShape, data: EpisodeData, keys: Array) -> Drawn:
    """Draw the random choices of one episode for each key."""
    return jax.vmap(lambda key: draw_from(shape, data, key))(keys)


def _embed_stream(tasks: TaskStream, embedder: Embedder) -> TaskStream:
    def of_task(task: Task) -> Task:
        return _embed_task(task, lambda part: embed_batches(part, embedder))

    def at(step: int) -> Task:
        task = of_task(tasks.at(step))
        embedder.save()
        return task

    def batches(start: int) -> Iterator[Task]:
        assert tasks.batches is not None
        read = tasks.batches(start)
        try:
            yield from map(of_task, read)
        finally:
            if hasattr(read, "close"):
                read.close()
            embedder.save()

    return tasks._replace(at=at, batches=None if tasks.batches is None else batches)


def embed_batches(batch: Batch, embedder: Embedder) -> Batch:
    """Return batches of several tasks, with a leading axis of tasks, with features in place of images."""
    x = np.asarray(batch.x)
    z = embedder(x.reshape(-1, *x.shape[2:]))
    return _features(batch, jnp.asarray(z.reshape(*x.shape[:2], -1)))
