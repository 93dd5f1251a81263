"""What all methods share that compare embeddings: who embeds what, and by whose statistics.

A method's file says how it learns from embedded support examples (`fit`) and how it judges embedded
queries (`judge`); this file makes a `Learner` of the two.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmeta import losses
from jaxmeta.checks import ArgumentError, check_word
from jaxmeta.core import (
    Augment,
    Batch,
    Key,
    Learner,
    Metrics,
    Norm,
    Params,
    PyTree,
    Task,
    augmented,
    blank_padding,
    ways_of,
)
from jaxmeta.nn.adapters import Network, as_model, forward
from jaxmeta.nn.norm import population_of, to_moments

NORMS = get_args(Norm)
# The rows of a report, and their statistics.
ROWS = {"transductive": "batch", "inductive": "population"}
# Queries of each class in training where its tasks have more ways than those of the test.
_MANY_WAYS = {"omniglot": 5, "glyphs": 5, "mini_imagenet": 15, "cifar_fs": 15}


def metric_learner(
    model: Network,
    *,
    fit: Callable[..., PyTree],
    judge: Callable[[Params, PyTree, Array], Array],
    init: Callable[[Key, int, int], Params] | None = None,
    objective: Callable[..., tuple[Array, Array]] | None = None,
    norm: Norm = "batch",
    augment: Augment | None = None,
) -> Learner:
    """A learner of embeddings.

    In training support and queries are embedded as one batch, save under norm="support".

    Args:
      model: the embedding, `(n, *shape) -> (n, dim)`.
      fit: `(own, z, labels, key) -> fitted` of embedded support examples and their one-hot labels, whose
        rows are zero for padding; `own` are the method's own parameters, and `key` is None outside
        training.
      judge: `(own, fitted, z) -> outputs (m, ways)` of embedded queries.
      init: `(key, dim, ways) -> own`; None where the method has no parameters.
      objective: `(own, z_support, labels, z_query, query, key) -> (loss, outputs)` in place of the
        cross-entropy of what `fit` and `judge` make of the queries.
      norm: "batch", the statistics of support and queries together (transductive); "support", those of the
        support set (inductive); "population", those filled by `jm.calibrate` (inductive; trains like
        "batch").
      augment: `(key, x) -> x`, of all images in training.

    Raises:
      ValueError: an unknown `norm`.
    """
    check_norm(norm)
    model = as_model(model, "model")
    if model.apply_norm is None:
        norm = "support"  # nothing to normalise, and nothing of the support set to keep

    def embed(
        params: Params, x: Array, mask: Array | None = None, stats: PyTree = None, key: Key | None = None
    ) -> tuple[Array, PyTree]:
        z, stats = forward(model, params["model"], x, mask=mask, stats=stats, key=key)
        return checked_embedding(z, x), stats

    def own_of(params: Params) -> Params:
        return params.get("head", {})

    def initial(key: Key, task: Task) -> Params:
        check_labels(task.support)
        params: Params = {"model": model.init(key, task.support.x)}
        z, _ = jax.eval_shape(embed, params, task.support.x)
        if init is not None:
            params["head"] = init(jax.random.fold_in(key, 1), z.shape[1], ways_of(task.support))
        return params

    def embed_task(params: Params, task: Task, key: Key) -> tuple[Array, Array]:
        first, second = jax.random.split(key) if model.stochastic else (None, None)
        support, query = task
        if norm == "support":
            z, stats = embed(params, support.x, support.mask, key=first)
            return z, embed(params, query.x, query.mask, stats, second)[0]
        z, _ = embed(params, *joined(support.x, support.mask, query.x, query.mask), key=first)
        return z[: support.x.shape[0]], z[support.x.shape[0] :]

    def task_loss(params: Params, task: Task, key: Key, step: Array | None = None) -> tuple[Array, Metrics]:
        del step
        support, query = map(blank_padding, task)
        draw, dropout, shuffle = jax.random.split(key, 3)
        support, query = map(partial(augmented, augment), jax.random.split(draw), (support, query))
        own, labels = own_of(params), one_hot(support)
        z, z_query = embed_task(params, Task(support, query), dropout)
        if objective is None:
            outputs = judge(own, fit(own, z, labels, shuffle), z_query)
            value = losses.cross_entropy(outputs, query.y, query.mask)
        else:
            value, outputs = objective(own, z, labels, z_query, query, shuffle)
        return value, {"loss": (value, jnp.ones_like(value)), **losses.score(outputs, query)}

    def adapt(params: Params, support: Batch, key: Key) -> PyTree:
        del key
        support = blank_padding(support)
        labels = one_hot(support)
        if norm == "batch":
            # Its statistics will be those of the queries too, which are yet to come.
            return {"x": support.x, "labels": labels, "mask": support.mask}
        fixed = population_of(params) if norm == "population" else None
        z, stats = embed(params, support.x, support.mask, fixed)
        return {"fitted": fit(own_of(params), z, labels, None), "stats": stats}

    def predict(params: Params, adapted: PyTree, x: Array, mask: Array | None = None) -> Array:
        own = own_of(params)
        if norm != "batch":
            return judge(own, adapted["fitted"], embed(params, x, mask, adapted["stats"])[0])
        z, _ = embed(params, *joined(adapted["x"], adapted["mask"], x, mask))
        count = adapted["x"].shape[0]
        return judge(own, fit(own, z[:count], adapted["labels"], None), z[count:])

    def statistics(params: Params, task: Task, key: Key) -> tuple[PyTree, Array]:
        del key
        support, query = map(blank_padding, task)
        _, stats = embed(params, *joined(support.x, support.mask, query.x, query.mask))
        return to_moments(stats), jnp.asarray(1.0)

    filled = None if model.apply_norm is None else statistics
    return Learner(initial, adapt, predict, task_loss, filled, model.divisible)


def episodic_defaults(
    train_ways: int | None = None,
    fewer: int = 1,
    *,
    own: Mapping[str, Any] | None = None,
    distorts: bool = False,
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Defaults of training (`training` of `jaxmeta.declare.Facts`) of a method that compares embeddings.

    Args:
      train_ways: of its training tasks in place of those of a protocol whose tasks are made for methods that
        adapt; None for the protocol's.
      fewer: by what the number of meta-steps is divided then.
      own: defaults that no protocol changes.
      distorts: whether images of strokes are distorted in training.
    """

    def of(base: Mapping[str, Any]) -> dict[str, Any]:
        # Of strokes alone is what comes in from outside the image known.
        strokes = distorts and base["tasks"] in ("omniglot", "glyphs")
        found = {"norm": "batch", "distort": strokes or bool(base.get("distort")), **(own or {})}
        if base["network"].startswith("strided-conv4"):
            found.setdefault("network", "conv4")
        many = _MANY_WAYS.get(base["tasks"])
        if train_ways is not None and many is not None and not base["made_for_embeddings"]:
            found |= {
                "train_ways": max(train_ways, base.get("ways") or 0),
                "train_queries": many,
                "meta_batch": 2,
                "steps": max(base["steps"] // fewer, 1),
            }
        return found

    return of


def checked_embedding(z: Any, x: Array) -> Array:
    """`z` if it is an embedding of `x`, or a ValueError."""
    if not isinstance(z, jax.Array) or z.ndim != 2 or z.shape[0] != x.shape[0]:
        raise ValueError(
            f"the model returns {getattr(z, 'shape', type(z).__name__)} for {x.shape[0]} examples; an "
            "embedding must be (examples, dim)"
        )
    return z


def check_norm(norm: str, norms: tuple[str, ...] = NORMS) -> None:
    """A ValueError if `norm` is none of `norms`."""
    check_word("norm", norm, norms)


def check_labels(batch: Batch) -> None:
    """A ValueError if the targets are no class slots, or not as many as there are examples."""
    if batch.x.shape[0] != batch.y.shape[0]:
        raise ArgumentError(
            "tasks", f"got {batch.x.shape[0]} examples or metadata vectors for {batch.y.shape[0]} class slots"
        )
    if not jnp.issubdtype(batch.y.dtype, jnp.integer):
        raise ArgumentError(
            "tasks",
            f"got targets of type {batch.y.dtype}; methods that compare with examples of classes need "
            "integer class slots",
        )


def one_hot(batch: Batch) -> Float[Array, "n ways"]:
    """Labels as rows, in float32 at least, since they are counted; padding has rows of zeros.

    Raises:
      ValueError: as `check_labels`.
    """
    check_labels(batch)
    labels = jax.nn.one_hot(batch.y, ways_of(batch), dtype=jnp.promote_types(batch.x.dtype, jnp.float32))
    return labels if batch.mask is None else jnp.where(batch.mask[:, None], labels, 0)


def joined(x: Array, mask: Array | None, more: Array, more_mask: Array | None) -> tuple[Array, Array | None]:
    """Two sets of examples as one, and its mask."""
    if mask is None and more_mask is None:
        return jnp.concatenate([x, more]), None
    masks = [
        jnp.ones(each.shape[0], bool) if given is None else given
        for each, given in ((x, mask), (more, more_mask))
    ]
    return jnp.concatenate([x, more]), jnp.concatenate(masks)


def unit(z: Float[Array, "*n dim"]) -> Float[Array, "*n dim"]:
    """Vectors of length one, in float32 at least; the zero vector stays, with a finite gradient."""
    z = losses.full_precision(z)
    return z * jax.lax.rsqrt(jnp.maximum(jnp.square(z).sum(-1, keepdims=True), 1e-12))


def product(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """The matrix product in full precision, of which accelerators take less by default."""
    return jnp.matmul(losses.full_precision(a), losses.full_precision(b), precision=jax.lax.Precision.HIGHEST)


def with_centre(
    points: Float[Array, "n dim"], present: Bool[Array, " n"] | None = None
) -> tuple[Float[Array, "n dim"], Float[Array, " dim"]]:
    """Points in float32 at least, and their centre, a constant: an origin that distances do not depend on.

    Points that are not present, those of padding or of a class without examples, are put at the centre.
    """
    points = losses.full_precision(points)
    fixed = jax.lax.stop_gradient(points)
    if present is None:
        # Of no points the centre is anywhere.
        return points, fixed.sum(0) / max(points.shape[0], 1)
    count = jnp.maximum(present.sum(), 1).astype(points.dtype)
    centre = jnp.where(present[:, None], fixed, 0).sum(0) / count
    return jnp.where(present[:, None], points, centre[None]), centre


def squared_distances(
    a: Float[Array, "m dim"], b: Float[Array, "n dim"], present: Bool[Array, " n"] | None = None
) -> Float[Array, "m n"]:
    """‖a_i − b_j‖², by one matrix product, in float32 at least.

    From the centre of `b`: the squares of numbers with a common offset have no room for their differences.

    Args:
      a, b: points.
      present: which of `b` count; None for all. The distances from others are those from the centre.
    """
    b, centre = with_centre(b, present)
    a, b = losses.full_precision(a) - centre[None], b - centre[None]
    squares = jnp.square(a).sum(-1)[:, None] + jnp.square(b).sum(-1)[None, :]
    return jnp.maximum(squares - 2 * product(a, b.T), 0)


def class_means(
    z: Float[Array, "n dim"], labels: Float[Array, "n ways"]
) -> tuple[Float[Array, "ways dim"], Bool[Array, " ways"]]:
    """The mean embedding of each class, divided by its own number of examples, and whether it has any.

    The paper's pseudo-code divides by the number of classes, which is a slip.
    """
    counts = labels.sum(0)
    return product(labels.T, z) / jnp.maximum(counts, 1)[:, None], counts > 0


def only_present(outputs: Float[Array, "m ways"], present: Bool[Array, " ways"]) -> Float[Array, "m ways"]:
    """−∞, probability zero, for class slots without a support example; of padding alone all are alike."""
    # With −∞ for all of them, losses and gradients would be NaN.
    absent = jnp.where(present.any(), -jnp.inf, 0)
    return jnp.where(present[None, :], outputs, absent)
