"""Relation networks: a learned similarity of queries and classes."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmeta import declare, losses
from jaxmeta.checks import ArgumentError
from jaxmeta.core import Augment, Batch, Key, Learner, Metrics, Params, PyTree, Task, augmented, blank_padding
from jaxmeta.metric_based.metric_learner import (
    ROWS,
    check_norm,
    concatenated,
    episodic_defaults,
    one_hot,
    only_present,
)
from jaxmeta.nn.adapters import Network, as_model, forward
from jaxmeta.nn.norm import population_of, to_moments
from jaxmeta.nn.relation import RelationModule


@declare.learner(
    kinds=("classification",),
    head=False,
    rows=ROWS,
    networks=("relation",),
    training=episodic_defaults(fixed={"network": "relation", "train_queries": 10, "meta_batch": 2}),
)
def relation(
    model: Network,
    comparison: Network | None = None,
    *,
    norm: Literal["batch", "population"] = "batch",
    augment: Augment | None = None,
) -> Learner:
    r"""Build a relation network, which learns the similarity of queries and classes (Sung et al. 2018).

    r(x, c) = σ(g([Σ_{x_i ∈ c} f(x_i), f(x)])) is the score of class c for x.

    f gives feature maps, which are concatenated along channels. The loss is the mean squared error between
    the scores and 1 for the true class, 0 for the others. Outputs are the scores before σ:
    `jax.nn.sigmoid(outputs)` lies in (0, 1), and its rows need not sum to 1.

    A class is the sum of its examples' feature maps, as in the paper and its code; other implementations take
    the mean, which is equal at 1 shot.

    Params: `{"model", "relation"}`, with "population" after `jm.calibrate`. Adapted: the class maps and the
    statistics; under norm="batch" the support set.

    Args:
      model: embedding f, `(n, *shape) -> (n, h, w, c)`; `jm.nn.RelationEmbedding` is the published one.
      comparison: relation module g, `(pairs, h, w, 2c) -> (pairs, 1)`; `jm.nn.RelationModule()` if None.
      norm: source of the batch statistics. "batch": support set and queries together in f, all pairs in g
        (transductive; the published numbers). "population": statistics filled by `jm.calibrate` (inductive;
        trains like "batch").
      augment: augmentation `(key, x) -> x` of all images in training.

    Returns:
      A `Learner`.

    Raises:
      ValueError: another `norm` ("support" has no pairs for the statistics of g); networks whose outputs have
        other shapes; float targets.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.glyphs(ways=5, shots=1, queries=3).sample(jax.random.key(0))
      >>> learner = jm.relation(jm.nn.RelationEmbedding(filters=8), jm.nn.RelationModule(filters=8))
      >>> params = learner.init(jax.random.key(1), task)
      >>> adapted = learner.adapt(params, task.support, jax.random.key(2))
      >>> learner.predict(params, adapted, task.query.x).shape
      (15, 5)

    References:
      Sung et al., Learning to Compare: Relation Network for Few-Shot Learning, 2018.
    """
    check_norm(norm, ("batch", "population"))
    model = as_model(model, "model")
    comparison = as_model(RelationModule() if comparison is None else comparison, "comparison")

    def embed(
        params: Params, x: Array, mask: Array | None = None, stats: PyTree = None, key: Key | None = None
    ) -> tuple[Array, PyTree]:
        z, stats = forward(
            model, params["model"], x, mask=mask, stats=stats, key=key if model.stochastic else None
        )
        if not isinstance(z, jax.Array) or z.ndim != 4:
            raise ValueError(
                f"the model returns {getattr(z, 'shape', type(z).__name__)} for {x.shape[0]} examples; a "
                "relation network compares feature maps, (examples, height, width, channels)"
            )
        return z, stats

    def class_maps(z: Array, labels: Array) -> Params:
        return {"maps": jnp.einsum("n...,nc->c...", z, labels), "present": (labels > 0).any(0)}

    def compare(
        params: Params,
        fitted: Params,
        z: Array,
        mask: Array | None,
        stats: PyTree = None,
        key: Key | None = None,
    ) -> tuple[Array, PyTree]:
        maps, present = fitted["maps"], fitted["present"]
        shape = z.shape[0], *maps.shape
        pair = jnp.concatenate(
            [jnp.broadcast_to(maps[None], shape), jnp.broadcast_to(z[:, None], shape)], axis=-1
        )
        real = jnp.broadcast_to(present[None], shape[:2])
        if mask is not None:
            real = real & mask[:, None]
        scores, stats = forward(
            comparison,
            params["relation"],
            pair.reshape(-1, *pair.shape[2:]),
            mask=real.reshape(-1),
            stats=stats,
            key=key if comparison.stochastic else None,
        )
        pairs = shape[0] * shape[1]
        if scores.shape != (pairs, 1):
            raise ArgumentError(
                "comparison", f"gives shape {scores.shape} for {pairs} pairs; it must be (pairs, 1)"
            )
        return only_present(scores.reshape(shape[:2]), present), stats

    def transductive_outputs(
        params: Params,
        support: tuple[Any, ...],
        query: tuple[Any, ...],
        labels: Array,
        key: Key | None = None,
    ) -> tuple[Array, PyTree]:
        """Return the outputs, normalised by the statistics of support set and queries, and the statistics."""
        first, second = (None, None) if key is None else jax.random.split(key)
        z, embedding_stats = embed(params, *concatenated(*support, *query), key=first)
        count = support[0].shape[0]
        outputs, pair_stats = compare(params, class_maps(z[:count], labels), z[count:], query[1], key=second)
        return outputs, {"model": embedding_stats, "relation": pair_stats}

    def init(key: Key, task: Task) -> Params:
        params = {"model": model.init(key, task.support.x)}
        z, _ = jax.eval_shape(embed, params, task.support.x)
        pair = jnp.zeros((2, *z.shape[1:-1], 2 * z.shape[-1]), z.dtype)
        params["relation"] = comparison.init(jax.random.fold_in(key, 1), pair)
        return params

    def task_loss(params: Params, task: Task, key: Key, step: Array | None = None) -> tuple[Array, Metrics]:
        del step
        support, query = map(blank_padding, task)
        draw, dropout = jax.random.split(key)
        support, query = map(partial(augmented, augment), jax.random.split(draw), (support, query))
        labels = one_hot(support)
        outputs, _ = transductive_outputs(
            params, (support.x, support.mask), (query.x, query.mask), labels, dropout
        )
        present = (labels > 0).any(0)
        errors = jnp.square(jax.nn.sigmoid(outputs) - one_hot(query))
        value = losses.masked_mean(
            jnp.where(present[None], errors, 0).sum(1) / jnp.maximum(present.sum(), 1), query.mask
        )
        return value, {"loss": (value, jnp.ones_like(value)), **losses.score(outputs, query)}

    def adapt(params: Params, support: Batch, key: Key) -> PyTree:
        del key
        support = blank_padding(support)
        labels = one_hot(support)
        if norm == "batch":
            return {"x": support.x, "labels": labels, "mask": support.mask}
        stats = population_of(params)
        z, _ = embed(params, support.x, support.mask, stats["model"])
        return {"fitted": class_maps(z, labels), "stats": stats}

    def predict(params: Params, adapted: PyTree, x: Array, mask: Array | None = None) -> Array:
        if norm == "batch":
            return transductive_outputs(
                params, (adapted["x"], adapted["mask"]), (x, mask), adapted["labels"]
            )[0]
        stats = adapted["stats"]
        z, _ = embed(params, x, mask, stats["model"])
        return compare(params, adapted["fitted"], z, mask, stats["relation"])[0]

    def statistics(params: Params, task: Task, key: Key) -> tuple[PyTree, Array]:
        del key
        support, query = map(blank_padding, task)
        _, stats = transductive_outputs(
            params, (support.x, support.mask), (query.x, query.mask), one_hot(support)
        )
        return to_moments(stats), jnp.asarray(1.0)

    return Learner(init, adapt, predict, task_loss, statistics, model.divisible)
