"""Baselines: the features of an ordinary classifier with a nearest-centroid or fine-tuned head.

Both are trained on all training classes at once (`jm.tasks.supervised`), not on episodes.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxmeta import declare
from jaxmeta.checks import check_count, check_kind, check_number, check_word
from jaxmeta.core import Augment, Batch, Key, Learner, Model, Norm, Params, PyTree
from jaxmeta.metric_based.metric_learner import (
    ROWS,
    checked_embedding,
    class_means,
    episodic_defaults,
    metric_learner,
    one_hot,
    only_present,
    squared_distances,
    unit,
)
from jaxmeta.nn.adapters import Network, as_model, forward
from jaxmeta.nn.norm import moments
from jaxmeta.optimization_based.inner_loop import inner_loop

Transform = Literal["un", "l2n", "cl2n"]
Head = Literal["linear", "cosine"]


@declare.learner(
    kinds=("classification",),
    head=False,
    rows=ROWS,
    supervised=True,
    distances=True,
    training=episodic_defaults(fixed={"meta_batch": 2}),
)
def simple_shot(
    model: Network,
    *,
    transform: Transform = "cl2n",
    norm: Norm = "batch",
    augment: Augment | None = None,
) -> Learner:
    """Build SimpleShot, which classifies by the nearest centroid of features (Wang et al. 2019).

    Outputs are −‖t(f(x)) − v_c‖², v_c the mean of t(f) over class c. The loss is the cross-entropy of a
    linear layer on f over all classes of the training tasks: train on `jm.tasks.supervised(tasks)`.

    Params: parameters of the features under "model", of the classifier under "head". Adapted: the centroids.

    Args:
      model: feature extractor f.
      transform: transformation t of features: "un", none; "l2n", normalisation to length 1; "cl2n", the same
        after subtraction of the mean feature, taken over the same examples as the batch statistics.
      norm: source of the batch statistics that normalise features; see `jm.prototypical`. The paper uses
        "population".
      augment: augmentation `(key, x) -> x` of all images in training.

    Returns:
      A `Learner`.

    Raises:
      ValueError: an unknown name; float targets.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.glyphs(ways=5, shots=1, queries=3).sample(jax.random.key(0))
      >>> learner = jm.simple_shot(jm.nn.Conv4(filters=8), norm="support")
      >>> params = learner.init(jax.random.key(1), task)
      >>> adapted = learner.adapt(params, task.support, jax.random.key(2))
      >>> adapted["fitted"]["centroids"].shape
      (5, 8)

    References:
      Wang et al., SimpleShot: Revisiting Nearest-Neighbor Classification for Few-Shot Learning, 2019.
    """
    check_word("transform", transform, get_args(Transform))

    def transform_features(z: Array) -> Array:
        return z if transform == "un" else unit(z)

    def fit(head_params: Params, z: Array, labels: Array, key: Key | None) -> Params:
        del head_params, key
        means, present = class_means(transform_features(z), labels)
        return {"centroids": means, "present": present}

    def classify(head_params: Params, fitted: Params, z: Array) -> Array:
        del head_params
        distances = squared_distances(transform_features(z), fitted["centroids"], fitted["present"])
        return only_present(-distances, fitted["present"])

    def learner(model: Network) -> Learner:
        return metric_learner(
            model,
            fit=fit,
            classify=classify,
            init=_initial_head("linear"),
            objective=_classification("linear", 1.0),
            norm=norm,
            augment=augment,
        )

    plain = learner(model)
    if transform != "cl2n":
        return plain
    # The loss, in which several devices may share the examples of a task, does not depend on the centre.
    return learner(_centred(as_model(model, "model")))._replace(loss=plain.loss, divisible=plain.divisible)


@declare.learner(
    kinds=("classification",),
    head=False,
    rows=ROWS,
    supervised=True,
    training=episodic_defaults(
        fixed={"head": "linear", "scale": 2.0, "eval_steps": 100, "inner_lr": 0.01, "meta_batch": 2}
    ),
)
def fine_tuned_head(
    model: Network,
    *,
    head: Head = "linear",
    scale: float = 2.0,
    inner_lr: float = 0.01,
    inner_optimizer: optax.GradientTransformation | None = None,
    eval_steps: int = 100,
    norm: Norm = "batch",
    augment: Augment | None = None,
) -> Learner:
    r"""Build Baseline or Baseline++, which train a new head on fixed features (Chen et al. 2019).

    The features come from a classifier of all training classes, with a head of the same kind: train on
    `jm.tasks.supervised(tasks)`. The new head is "linear", W f(x) + b from zeros, or "cosine",
    scale · g_c · cos(f(x), w_c) with w_c from the class mean and g_c from 1.

    The released code starts from random weights and passes over the support set 100 times in mini-batches of
    4; here each step uses the whole support set. As in the released code, SGD has step size 0.01, weight
    decay 0.001 and momentum 0.9 with dampening 0.9, which leaves the length of steps unchanged.

    Params: parameters of the features under "model", of the classifier under "head". Adapted: the new head.

    Args:
      model: feature extractor f.
      head: kind of head, "linear" (Baseline) or "cosine" (Baseline++).
      scale: factor of the cosines; the released code has 10 for more than 200 classes.
      inner_lr: step size of the head's gradient descent on the mean loss of the support set.
      inner_optimizer: optimizer of the head in place of `inner_lr`: any optax transformation; None for the
        released code's SGD.
      eval_steps: gradient steps of the head, at least 1.
      norm: source of the batch statistics that normalise features; see `jm.prototypical`. The published
        numbers are for "population".
      augment: augmentation `(key, x) -> x` of all images in training.

    Returns:
      A `Learner`.

    Raises:
      ValueError: an unknown name; negative `inner_lr`; `eval_steps` below 1; float targets.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.glyphs(ways=5, shots=1, queries=3).sample(jax.random.key(0))
      >>> learner = jm.fine_tuned_head(jm.nn.Conv4(filters=8), eval_steps=5, norm="support")
      >>> params = learner.init(jax.random.key(1), task)
      >>> adapted = learner.adapt(params, task.support, jax.random.key(2))
      >>> adapted["fitted"]["head"]["kernel"].shape
      (8, 5)

    References:
      Chen et al., A Closer Look at Few-shot Classification, 2019, section 3.2.
    """
    check_word("head", head, get_args(Head))
    check_count("eval_steps", eval_steps)
    check_number("scale", scale, above=0)
    check_number("inner_lr", inner_lr, 0)
    if inner_optimizer is not None:
        check_kind("inner_optimizer", inner_optimizer, optax.GradientTransformation, "an optax optimizer")
    optimizer = _released_sgd(inner_lr) if inner_optimizer is None else inner_optimizer

    def head_loss(weights: Params, batch: tuple[Any, ...]) -> Array:
        z, labels = batch
        # Classes without support examples get probability zero; padding has rows of zeros in `labels`.
        return _cross_entropy(only_present(_outputs(head, scale, weights, z), (labels > 0).any(0)), labels)

    descent = inner_loop(head_loss, optimizer, eval_steps, order="first")

    def fit(head_params: Params, z: Array, labels: Array, key: Key | None) -> Params:
        del head_params, key
        means, present = class_means(z, labels)
        if head == "linear":
            start = {"kernel": jnp.zeros_like(means.T), "bias": jnp.zeros_like(means[:, 0])}
        else:
            start = {"kernel": unit(means).T, "norm": jnp.ones_like(means[:, 0])}
        weights, _ = descent(start, (z, labels))
        return {"head": weights, "present": present}

    def classify(head_params: Params, fitted: Params, z: Array) -> Array:
        del head_params
        return only_present(_outputs(head, scale, fitted["head"], z), fitted["present"])

    return metric_learner(
        model,
        fit=fit,
        classify=classify,
        init=_initial_head(head),
        objective=_classification(head, scale),
        norm=norm,
        augment=augment,
    )


def _released_sgd(rate: float) -> optax.GradientTransformation:
    """Build SGD with weight decay 0.001 and momentum 0.9 with dampening 0.9."""
    return optax.chain(optax.add_decayed_weights(1e-3), _dampened(0.9), optax.sgd(rate))


def _dampened(decay):
    """Build momentum with dampening 1 − decay that starts from the first gradient, as in torch."""

    def init(params):
        return {"mean": jax.tree.map(jnp.zeros_like, params), "first": jnp.asarray(True)}

    def update(updates, state, params=None):
        del params
        mean = jax.tree.map(
            lambda g, m: jnp.where(state["first"], g, decay * m + (1 - decay) * g), updates, state["mean"]
        )
        return mean, {"mean": mean, "first": jnp.asarray(False)}

    return optax.GradientTransformation(init, update)


def _initial_head(head: str) -> Callable[[Key, int, int], Params]:
    def init(key: Key, dim: int, ways: int) -> Params:
        params = {"kernel": jax.random.normal(key, (dim, ways)) / jnp.sqrt(dim)}
        if head == "linear":
            return {**params, "bias": jnp.zeros(ways)}
        return {**params, "norm": jnp.ones(ways)}

    return init


def _outputs(head: str, scale: float, weights: Params, z: Array) -> Array:
    if head == "linear":
        return z @ weights["kernel"] + weights["bias"][None]
    return scale * weights["norm"][None] * (unit(z) @ unit(weights["kernel"].T).T)


def _classification(head: str, scale: float) -> Callable[..., tuple[Array, Array]]:
    """Build the cross-entropy over all classes, of the examples of support set and queries alike."""

    def objective(
        head_params: Params, z: Array, labels: Array, z_query: Array, query: Batch, key: Key
    ) -> tuple[Array, Array]:
        del key
        outputs = _outputs(head, scale, head_params, jnp.concatenate([z, z_query]))
        value = _cross_entropy(outputs, jnp.concatenate([labels, one_hot(query)]))
        return value, outputs[z.shape[0] :]

    return objective


def _cross_entropy(outputs: Array, labels: Array) -> Array:
    """Return the mean cross-entropy over examples, except padding, whose labels are rows of zeros."""
    log_likelihoods = jnp.where(labels > 0, jax.nn.log_softmax(outputs), 0)
    return -log_likelihoods.sum() / jnp.maximum((labels > 0).sum(), 1)


def _centred(model: Model) -> Model:
    """Return `model` with the mean of its outputs subtracted, as one more batch statistic."""

    def apply_norm(
        params: Params,
        x: Array,
        *,
        stats: PyTree = None,
        mask: Array | None = None,
        key: Key | None = None,
    ) -> tuple[Array, PyTree]:
        model_stats = None if stats is None else stats["model"]
        z, model_stats = forward(model, params, x, mask=mask, stats=model_stats, key=key)
        checked_embedding(z, x)
        if stats is None:
            mean, var = moments(z, mask)
            stats = {
                "model": {} if model_stats is None else model_stats,
                "features": {"mean": mean, "var": var},
            }
        return z - stats["features"]["mean"][None], stats

    def apply(params: Params, x: Array, *, key: Key | None = None) -> Array:
        return apply_norm(params, x, key=key)[0]

    if model.stochastic:
        return Model(model.init, apply, apply_norm, stochastic=True)
    return Model(
        model.init,
        lambda params, x: apply(params, x),
        lambda params, x, *, stats=None, mask=None: apply_norm(params, x, stats=stats, mask=mask),
    )
