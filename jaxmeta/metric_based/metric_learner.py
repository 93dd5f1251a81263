"""Learners that compare embeddings: embedding of support set and queries, and their batch statistics.

Each method's file defines how it learns from embedded support examples (`fit`) and how it classifies embedded
queries (`classify`); `metric_learner` builds a `Learner` from the two.
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
# Rows of a report, each with the `norm` of the learner that it evaluates.
ROWS = {"transductive": "batch", "inductive": "population"}
# Queries of each class in training tasks that have more ways than test tasks.
_MANY_WAYS = {"omniglot": 5, "glyphs": 5, "mini_imagenet": 15, "cifar_fs": 15}


def metric_learner(
    model: Network,
    *,
    fit: Callable[..., PyTree],
    classify: Callable[..., Array],
    init: Callable[[Key, int, int], Params] | None = None,
    objective: Callable[..., tuple[Array, Array]] | None = None,
    transductive: bool = False,
    norm: Norm = "batch",
    augment: Augment | None = None,
) -> Learner:
    """Build a learner that compares embeddings.

    In training, support set and queries are embedded as one batch, except under norm="support".

    Args:
      model: embedding, `(n, *shape) -> (n, dim)`.
      fit: `(head_params, z, labels, key) -> fitted`, from embedded support examples and their one-hot labels,
        whose rows are zero for padding. `head_params` are the parameters of the method besides the
        embedding's; `key` is None outside training.
      classify: `(head_params, fitted, z) -> outputs (m, ways)`, from embedded queries.
      init: `(key, dim, ways) -> head_params`; None for a method without such parameters.
      objective: `(head_params, z_support, labels, z_query, query, key) -> (loss, outputs)`, the training
        loss; None for the cross-entropy of the outputs of `fit` and `classify`.
      transductive: True if outputs for a query depend on the other queries under every `norm`. `classify`
        then takes a fourth argument, the queries' mask `(m,)`, which is False for padding.
      norm: source of the batch statistics: "batch", support set and queries together (transductive);
        "support", the support set (inductive); "population", statistics filled by `jm.calibrate` (inductive;
        trains like "batch").
      augment: augmentation `(key, x) -> x` of all images in training.

    Raises:
      ValueError: an unknown `norm`.
    """
    check_norm(norm)
    model = as_model(model, "model")
    if model.apply_norm is None:
        norm = "support"  # without normalisation, the adapted state need not keep the support images

    def embed(
        params: Params, x: Array, mask: Array | None = None, stats: PyTree = None, key: Key | None = None
    ) -> tuple[Array, PyTree]:
        z, stats = forward(model, params["model"], x, mask=mask, stats=stats, key=key)
        return checked_embedding(z, x), stats

    def head_params_of(params: Params) -> Params:
        return params.get("head", {})

    def outputs_of(head_params: Params, fitted: PyTree, z: Array, mask: Array | None) -> Array:
        if not transductive:
            return classify(head_params, fitted, z)
        mask = jnp.ones(z.shape[0], bool) if mask is None else mask
        # The embedding of padding may be NaN, which a weight of zero would not remove.
        return classify(head_params, fitted, jnp.where(mask[:, None], z, 0), mask)

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
        z, _ = embed(params, *concatenated(support.x, support.mask, query.x, query.mask), key=first)
        return z[: support.x.shape[0]], z[support.x.shape[0] :]

    def task_loss(params: Params, task: Task, key: Key, step: Array | None = None) -> tuple[Array, Metrics]:
        del step
        support, query = map(blank_padding, task)
        draw, dropout, shuffle = jax.random.split(key, 3)
        support, query = map(partial(augmented, augment), jax.random.split(draw), (support, query))
        head_params, labels = head_params_of(params), one_hot(support)
        z, z_query = embed_task(params, Task(support, query), dropout)
        if objective is None:
            outputs = outputs_of(head_params, fit(head_params, z, labels, shuffle), z_query, query.mask)
            value = losses.cross_entropy(outputs, query.y, query.mask)
        else:
            value, outputs = objective(head_params, z, labels, z_query, query, shuffle)
        return value, {"loss": (value, jnp.ones_like(value)), **losses.score(outputs, query)}

    def adapt(params: Params, support: Batch, key: Key) -> PyTree:
        del key
        support = blank_padding(support)
        labels = one_hot(support)
        if norm == "batch":
            # Batch statistics include the queries, which only `predict` receives: keep the support set.
            return {"x": support.x, "labels": labels, "mask": support.mask}
        fixed = population_of(params) if norm == "population" else None
        z, stats = embed(params, support.x, support.mask, fixed)
        return {"fitted": fit(head_params_of(params), z, labels, None), "stats": stats}

    def predict(params: Params, adapted: PyTree, x: Array, mask: Array | None = None) -> Array:
        head_params = head_params_of(params)
        if norm != "batch":
            z, _ = embed(params, x, mask, adapted["stats"])
            return outputs_of(head_params, adapted["fitted"], z, mask)
        z, _ = embed(params, *concatenated(adapted["x"], adapted["mask"], x, mask))
        count = adapted["x"].shape[0]
        fitted = fit(head_params, z[:count], adapted["labels"], None)
        return outputs_of(head_params, fitted, z[count:], mask)

    def statistics(params: Params, task: Task, key: Key) -> tuple[PyTree, Array]:
        del key
        support, query = map(blank_padding, task)
        _, stats = embed(params, *concatenated(support.x, support.mask, query.x, query.mask))
        return to_moments(stats), jnp.asarray(1.0)

    statistics_or_none = None if model.apply_norm is None else statistics
    return Learner(initial, adapt, predict, task_loss, statistics_or_none, model.divisible)


def episodic_defaults(
    train_ways: int | None = None,
    steps_divisor: int = 1,
    *,
    fixed: Mapping[str, Any] | None = None,
    distorts: bool = False,
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return training defaults of a method that compares embeddings, for `training` of `Facts`.

    Args:
      train_ways: ways of training tasks, where the protocol is designed for methods that adapt; None for the
        protocol's.
      steps_divisor: divisor of the number of meta-steps where `train_ways` is used.
      fixed: defaults that do not depend on the protocol.
      distorts: if True, images of strokes are distorted in training.
    """

    def defaults_of(base: Mapping[str, Any]) -> dict[str, Any]:
        # Distortion needs a known background outside the image, which only images of strokes have.
        strokes = distorts and base["tasks"] in ("omniglot", "glyphs")
        defaults = {"norm": "batch", "distort": strokes or bool(base.get("distort")), **(fixed or {})}
        if base["network"].startswith("strided-conv4"):
            defaults.setdefault("network", "conv4")
        many = _MANY_WAYS.get(base["tasks"])
        if train_ways is not None and many is not None and not base["made_for_embeddings"]:
            defaults |= {
                "train_ways": max(train_ways, base.get("ways") or 0),
                "train_queries": many,
                "meta_batch": 2,
                "steps": max(base["steps"] // steps_divisor, 1),
            }
        return defaults

    return defaults_of


def checked_embedding(z: Any, x: Array) -> Array:
    """Return `z`, after checking that it is an embedding of `x`."""
    if not isinstance(z, jax.Array) or z.ndim != 2 or z.shape[0] != x.shape[0]:
        raise ValueError(
            f"the model returns {getattr(z, 'shape', type(z).__name__)} for {x.shape[0]} examples; an "
            "embedding must be (examples, dim)"
        )
    return z


def check_norm(norm: str, norms: tuple[str, ...] = NORMS) -> None:
    """Check that `norm` is one of `norms`."""
    check_word("norm", norm, norms)


def check_labels(batch: Batch) -> None:
    """Check that the targets are class slots, one for each example."""
    if batch.x.shape[0] != batch.y.shape[0]:
        raise ArgumentError(
            "tasks",
            f"got {batch.x.shape[0]} examples or metadata vectors and {batch.y.shape[0]} class slots; the "
            "numbers must be equal",
        )
    if not jnp.issubdtype(batch.y.dtype, jnp.integer):
        raise ArgumentError(
            "tasks",
            f"got targets of type {batch.y.dtype}; methods that compare embeddings need integer class slots",
        )


def one_hot(batch: Batch) -> Float[Array, "n ways"]:
    """Return one-hot labels, with rows of zeros for padding.

    They have float32 at least, because they are summed to counts.

    Raises:
      ValueError: errors of `check_labels`.
    """
    check_labels(batch)
    labels = jax.nn.one_hot(batch.y, ways_of(batch), dtype=jnp.promote_types(batch.x.dtype, jnp.float32))
    return labels if batch.mask is None else jnp.where(batch.mask[:, None], labels, 0)


def concatenated(
    x: Array, mask: Array | None, more: Array, more_mask: Array | None
) -> tuple[Array, Array | None]:
    """Concatenate two sets of examples, and their masks."""
    if mask is None and more_mask is None:
        return jnp.concatenate([x, more]), None
    masks = [
        jnp.ones(examples.shape[0], bool) if part is None else part
        for examples, part in ((x, mask), (more, more_mask))
    ]
    return jnp.concatenate([x, more]), jnp.concatenate(masks)


def unit(z: Float[Array, "*n dim"]) -> Float[Array, "*n dim"]:
    """Normalise vectors to length 1, in float32 at least; zero vectors stay zero, with a finite gradient."""
    z = losses.full_precision(z)
    return z * jax.lax.rsqrt(jnp.maximum(jnp.square(z).sum(-1, keepdims=True), 1e-12))


def product(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """Return the matrix product in full precision, since accelerators use less by default."""
    return jnp.matmul(losses.full_precision(a), losses.full_precision(b), precision=jax.lax.Precision.HIGHEST)


def solve_positive(matrix: Float[Array, "n n"], values: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """Solve a system with a symmetric positive definite matrix, by elimination without pivots.

    It calls no LAPACK. In JAX 0.10 a batched call of LAPACK on a CPU waits for threads of the pool that it
    occupies itself, so that the calls of two devices may wait forever; large batches, such as those with a
    matrix for each class, do so regularly.
    """
    size = matrix.shape[0]

    def eliminated(_: Callable[[Array], Array], values: Array) -> Array:
        fixed = jax.lax.stop_gradient(matrix)
        table = jnp.concatenate([fixed, values.astype(fixed.dtype)], axis=1)

        def step(index: Array, table: Array) -> Array:
            row = jax.lax.dynamic_index_in_dim(table, index, keepdims=False)
            column = jax.lax.dynamic_index_in_dim(table, index, 1, keepdims=False)
            row = row / jax.lax.dynamic_index_in_dim(row, index, keepdims=False)
            reduced = table - column[:, None] * row[None]
            return jnp.where((jnp.arange(size) == index)[:, None], row[None], reduced)

        return jax.lax.fori_loop(0, size, step, table)[:, size:]

    dtype = jnp.promote_types(matrix.dtype, values.dtype)
    matrix = matrix.astype(dtype)
    return jax.lax.custom_linear_solve(
        lambda solution: product(matrix, solution), values.astype(dtype), eliminated, symmetric=True
    )


def with_centre(
    points: Float[Array, "n dim"], present: Bool[Array, " n"] | None = None
) -> tuple[Float[Array, "n dim"], Float[Array, " dim"]]:
    """Return points in float32 at least, and their centre, without a gradient.

    Distances do not depend on the origin, so callers may subtract the centre. Points that are not present
    (padding, or a class without examples) are moved to the centre.
    """
    points = losses.full_precision(points)
    fixed = jax.lax.stop_gradient(points)
    if present is None:
        # max(…, 1): for no points, any finite centre will do.
        return points, fixed.sum(0) / max(points.shape[0], 1)
    count = jnp.maximum(present.sum(), 1).astype(points.dtype)
    centre = jnp.where(present[:, None], fixed, 0).sum(0) / count
    return jnp.where(present[:, None], points, centre[None]), centre


def squared_distances(
    a: Float[Array, "m dim"], b: Float[Array, "n dim"], present: Bool[Array, " n"] | None = None
) -> Float[Array, "m n"]:
    """Return ‖a_i − b_j‖² by one matrix product, in float32 at least.

    The centre of `b` is subtracted first, because a common offset would cancel with a loss of precision.

    Args:
      a: points, of shape (m, dim).
      b: points, of shape (n, dim).
      present: mask of the points of `b`; None for all. Distances to the others are distances to the centre.
    """
    b, centre = with_centre(b, present)
    a, b = losses.full_precision(a) - centre[None], b - centre[None]
    squares = jnp.square(a).sum(-1)[:, None] + jnp.square(b).sum(-1)[None, :]
    return jnp.maximum(squares - 2 * product(a, b.T), 0)


def class_means(
    z: Float[Array, "n dim"], labels: Float[Array, "n ways"]
) -> tuple[Float[Array, "ways dim"], Bool[Array, " ways"]]:
    """Return the mean embedding of each class, and whether the class has examples.

    Each sum is divided by the number of examples of its class; the paper's pseudo-code divides by the number
    of classes, which is an error.
    """
    counts = labels.sum(0)
    return product(labels.T, z) / jnp.maximum(counts, 1)[:, None], counts > 0


def only_present(outputs: Float[Array, "m ways"], present: Bool[Array, " ways"]) -> Float[Array, "m ways"]:
    """Set the outputs of class slots without a support example to −∞, probability zero."""
    # Where all classes are absent (a task of padding), −∞ would make losses and gradients NaN.
    absent = jnp.where(present.any(), -jnp.inf, 0)
    return jnp.where(present[None, :], outputs, absent)
