"""Prototypical networks: classes as means of embedded examples, or as embedded metadata."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import lecun_normal
from jaxtyping import Array, Bool, Float

from jaxmeta import declare, losses
from jaxmeta.checks import ArgumentError, check_number, check_word
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
)
from jaxmeta.metric_based.metric_learner import (
    ROWS,
    check_norm,
    class_means,
    episodic_defaults,
    metric_learner,
    one_hot,
    only_present,
    product,
    squared_distances,
    unit,
    with_centre,
)
from jaxmeta.nn.adapters import Network, as_model, forward
from jaxmeta.nn.embedding import MLP
from jaxmeta.nn.norm import population_of, to_moments

Generator = Callable[[Array], Array]
Divergence: TypeAlias = Literal["euclidean", "kl", "cosine"] | Generator
# Width of both embeddings of zero-shot learning.
_ZERO_SHOT_DIM = 128


def _networks(
    build: Callable[[int | None], Network], tasks: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Build the embedding and, for zero-shot tasks, the embedding of class metadata."""
    if tasks["shots"]:
        return (build(None),), {}
    metadata = MLP(out=_ZERO_SHOT_DIM, hidden=(256, 256), kernel_init=lecun_normal())
    return (build(_ZERO_SHOT_DIM),), {"metadata": metadata}


@declare.learner(
    kinds=("classification",),
    head=False,
    rows=ROWS,
    zero_shot=True,
    distances=True,
    network=_networks,
    # A 60-way task has as many images as twelve 5-way tasks, so a third of the meta-steps suffices.
    training=episodic_defaults(60, 3, fixed={"divergence": "euclidean"}),
)
def prototypical(
    model: Network,
    *,
    divergence: Divergence = "euclidean",
    scale: float = 1.0,
    metadata: Network | None = None,
    norm: Norm = "batch",
    augment: Augment | None = None,
) -> Learner:
    r"""Build prototypical networks, which classify by distances to class means (Snell et al. 2017).

    P(y = c | x) = softmax_c(−s · d(f(x), v_c)), v_c the mean of f over class c

    s is `scale`, 1 in the paper, and d is the squared Euclidean distance, or any Bregman divergence: for a
    strictly convex φ,

    d_φ(z, v) = φ(z) − φ(v) − (z − v)·∇φ(v),

    for which the mean minimises the total divergence from a set of points. With the squared Euclidean
    distance, the classifier is linear in f(x), with weights 2 v_c and biases −‖v_c‖².

    In zero-shot learning (`metadata`), v_c = g(m_c) / ‖g(m_c)‖ is embedded from one vector m_c for each
    class, and f(x) is not normalised.

    Train with more ways than at test, and with as many shots (Snell et al.: 60 ways on Omniglot).

    Params: `{"model": …}`, with "metadata" in zero-shot learning and "population" after `jm.calibrate`.
    Adapted: `{"fitted": {"prototypes": (ways, dim), "present": (ways,)}, "stats"}`; under norm="batch" the
    support set itself.

    Args:
      model: embedding f, `(n, *shape) -> (n, dim)`.
      divergence: divergence d of embeddings from prototypes: "euclidean" (squared); "kl", of softmax(f(x)),
        with φ = Σ z ln z; "cosine", 1 − cos, which is not a Bregman divergence and did worse in the paper. In
        Python also a convex function φ of one vector.
      scale: factor s of the divergences, above 0. Embeddings that start from pretrained features need one
        that fits their length; with "cosine" and 10, training is that of Meta-Baseline (Chen et al. 2021).
      metadata: embedding g of class metadata, `(ways, d) -> (ways, dim)`; None for few-shot learning.
      norm: source of the batch statistics that normalise embeddings. "batch": support set and queries
        together (transductive). "support": the support set (inductive). "population": statistics filled by
        `jm.calibrate` (inductive; the published numbers; trains like "batch"). It changes no parameter, so
        that learners with any of these can use the same trained `params`.
      augment: augmentation `(key, x) -> x` of all images in training.

    Returns:
      A `Learner`.

    Raises:
      ValueError: an unknown name; `scale` not positive; norm="support" in zero-shot learning, whose support
        set has no images; float targets; embeddings of two different widths; norm="population" with params
        that were not calibrated.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> tasks = jm.tasks.glyphs(ways=5, shots=1, queries=3)
      >>> learner = jm.prototypical(jm.nn.Conv4(filters=8))
      >>> task = tasks.sample(jax.random.key(0))
      >>> params = jm.calibrate(learner, learner.init(jax.random.key(1), task), tasks, jax.random.key(2))
      >>> learner = jm.prototypical(jm.nn.Conv4(filters=8), norm="population")
      >>> adapted = learner.adapt(params, task.support, jax.random.key(3))
      >>> learner.predict(params, adapted, task.query.x).shape
      (15, 5)

    References:
      Snell, Swersky & Zemel, Prototypical Networks for Few-shot Learning, 2017.
    """
    check_number("scale", scale, above=0)
    embedded, distances = _divergence(divergence)

    def classify(head_params: Params, fitted: Params, z: Array) -> Array:
        del head_params
        values = distances(embedded(z), fitted["prototypes"], fitted["present"])
        return only_present(-scale * values, fitted["present"])

    if metadata is not None:
        return _zero_shot(model, metadata, classify, norm, augment)

    def fit(head_params: Params, z: Array, labels: Array, key: Key | None) -> Params:
        del head_params, key
        means, present = class_means(embedded(z), labels)
        return {"prototypes": means, "present": present}

    return metric_learner(model, fit=fit, classify=classify, norm=norm, augment=augment)


def add_class(
    model: Network,
    params: Params,
    adapted: PyTree,
    x: Array,
    *,
    divergence: Divergence = "euclidean",
) -> PyTree:
    """Add a class to an adapted state of `prototypical`, without the original support set.

    The new class gets the next slot. The prototypes of the other classes do not change.

    Args:
      model: embedding of the learner.
      params: parameters of the learner.
      adapted: adapted state of a learner with norm "support" or "population".
      x: examples of the new class, of shape (k, *shape); the statistics in `adapted` normalise them.
      divergence: divergence of the learner.

    Returns:
      The adapted state with one more prototype.

    Raises:
      ValueError: `adapted` has no prototypes, or has no statistics although the model normalises; `x` has no
        examples.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> model = jm.nn.Conv4(filters=8)
      >>> learner = jm.prototypical(model, norm="support")
      >>> task = jm.tasks.glyphs(ways=5, shots=2, queries=3).sample(jax.random.key(0))
      >>> params = learner.init(jax.random.key(1), task)
      >>> adapted = learner.adapt(params, task.support, jax.random.key(2))
      >>> adapted = jm.add_class(model, params, adapted, task.query.x[:3])
      >>> learner.predict(params, adapted, task.query.x).shape
      (15, 6)
    """
    if "fitted" not in adapted or "prototypes" not in adapted["fitted"]:
        raise ArgumentError(
            "adapted",
            "got a state without prototypes; it must come from jm.prototypical with norm "
            '"population" or "support"',
        )
    if x.shape[0] < 1:
        raise ArgumentError("x", f"got shape {x.shape}; it must hold at least one example of the new class")
    embedded, _ = _divergence(divergence)
    z, stats = forward(as_model(model, "model"), params["model"], x, stats=adapted["stats"])
    if adapted["stats"] is None and jax.tree.leaves(stats):
        raise ArgumentError(
            "adapted",
            "got a state without batch statistics, but the model uses them; it must come from "
            'jm.prototypical with norm="population"',
        )
    fitted = adapted["fitted"]
    return {
        **adapted,
        "fitted": {
            "prototypes": jnp.concatenate([fitted["prototypes"], embedded(z).mean(0, keepdims=True)]),
            "present": jnp.concatenate([fitted["present"], jnp.ones(1, bool)]),
        },
    }


def bregman(
    generator: Generator,
    z: Float[Array, "m dim"],
    v: Float[Array, "n dim"],
    present: Bool[Array, " n"] | None = None,
) -> Float[Array, "m n"]:
    """Return d_φ(z_i, v_j) = φ(z_i) − φ(v_j) − (z_i − v_j)·∇φ(v_j), in float32 at least.

    φ is replaced by φ_c(u) = d_φ(u, c), which has the same divergence for any c; c is the centre of v. A
    common offset of the points would otherwise make φ and the products large, and cancel with a loss of
    precision.

    Args:
      generator: strictly convex function φ of one vector.
      z: points, of shape (m, dim).
      v: points, of shape (n, dim).
      present: mask of the points of `v`; None for all. Divergences from the others are from the centre.

    Examples:
      >>> import jax.numpy as jnp
      >>> z, v = jnp.array([[0.5, 0.0]]), jnp.array([[0.0, 0.0], [2.0, 0.0]])
      >>> bregman(lambda u: (u**2).sum(), z, v).tolist()
      [[0.25, 2.25]]
    """
    z, (v, centre) = losses.full_precision(z), with_centre(v, present)
    from_centre = jax.vmap(lambda u: _from_centre(generator, centre, u))
    slopes = jax.vmap(jax.grad(generator))(v) - jax.grad(generator)(centre)[None]
    z_values, v_values = from_centre(z), from_centre(v)
    z, v = z - centre[None], v - centre[None]
    at_v = v_values - (v * slopes).sum(-1)
    return z_values[:, None] - at_v[None, :] - product(z, slopes.T)


def _from_centre(generator: Generator, centre: Float[Array, " dim"], u: Float[Array, " dim"]):
    """Return φ(u) − φ(c) − (u − c)·∇φ(c), accurate also where the terms are large.

    The difference of the terms is used unless the equal integral ∫₀¹ (u − c)·(∇φ(c + t (u − c)) − ∇φ(c)) dt
    is more accurate: where Gauss rules of 4 and 3 nodes differ by less than the rounding of the terms.
    """
    direction, slope = u - centre, jax.grad(generator)(centre)

    def integral(nodes: int) -> Array:
        positions, weights = np.polynomial.legendre.leggauss(nodes)
        terms = [
            weight / 2 * (direction * (jax.grad(generator)(centre + (t + 1) / 2 * direction) - slope)).sum()
            for t, weight in zip(positions.tolist(), weights.tolist(), strict=True)
        ]
        return sum(terms[1:], terms[0])

    values = generator(u), generator(centre), (direction * slope).sum()
    fine, coarse = integral(4), integral(3)
    rounding = jnp.finfo(u.dtype).eps * sum(jnp.abs(value) for value in values)
    use_integral = jax.lax.stop_gradient(jnp.abs(fine - coarse) <= rounding)
    return jnp.where(use_integral, fine, values[0] - values[1] - values[2])


def _negative_entropy(z: Array) -> Array:
    return (z * jnp.log(jnp.maximum(z, jnp.finfo(z.dtype).tiny))).sum()


def _relative_entropy(z, v, present=None):
    """Return KL(z‖v), without the second derivatives of `bregman`, which overflow near 0."""
    del present
    z, v = losses.full_precision(z), losses.full_precision(v)
    tiny = jnp.finfo(z.dtype).tiny
    return jax.vmap(_negative_entropy)(z)[:, None] - product(z, jnp.log(jnp.maximum(v, tiny)).T)


def _divergence(divergence: Divergence) -> tuple[Callable[[Array], Array], Callable[..., Array]]:
    """Return the transformation of embeddings, and `(z, prototypes, present) -> distances`."""
    known: dict[str, tuple[Any, ...]] = {
        "euclidean": (lambda z: z, squared_distances),
        "kl": (jax.nn.softmax, _relative_entropy),
        "cosine": (lambda z: z, lambda z, v, present: 1 - product(unit(z), unit(v).T)),
    }
    if not callable(divergence):
        check_word("divergence", divergence, known)
        return known[divergence]
    return lambda z: z, lambda z, v, present: bregman(divergence, z, v, present)


def _zero_shot(
    model: Network,
    metadata: Network,
    classify: Callable[[Params, PyTree, Array], Array],
    norm: str,
    augment: Augment | None,
) -> Learner:
    check_norm(norm, ("batch", "population"))
    model, metadata = as_model(model, "model"), as_model(metadata, "metadata")

    def prototypes(params: Params, support: Batch) -> Params:
        means, present = class_means(
            forward(metadata, params["metadata"], support.x, mask=support.mask)[0], one_hot(support)
        )
        return {"prototypes": unit(means), "present": present}

    def init(key: Key, task: Task) -> Params:
        params = {
            "model": model.init(key, task.query.x),
            "metadata": metadata.init(jax.random.fold_in(key, 1), task.support.x),
        }
        widths = [
            jax.eval_shape(lambda p, x, m=part: forward(m, p, x)[0], params[name], x).shape[1:]
            for part, name, x in ((model, "model", task.query.x), (metadata, "metadata", task.support.x))
        ]
        if widths[0] != widths[1]:
            raise ArgumentError(
                "metadata",
                f"gives embeddings of shape {widths[1]}, and model of {widths[0]}; the shapes must be equal",
            )
        return params

    def task_loss(params: Params, task: Task, key: Key, step: Array | None = None) -> tuple[Array, Metrics]:
        del step
        support, query = map(blank_padding, task)
        draw, dropout = jax.random.split(key)
        query = augmented(augment, draw, query)
        z, _ = forward(
            model, params["model"], query.x, mask=query.mask, key=dropout if model.stochastic else None
        )
        outputs = classify({}, prototypes(params, support), z)
        value = losses.cross_entropy(outputs, query.y, query.mask)
        return value, {"loss": (value, jnp.ones_like(value)), **losses.score(outputs, query)}

    def adapt(params: Params, support: Batch, key: Key) -> PyTree:
        del key
        fixed = population_of(params) if norm == "population" and model.apply_norm is not None else None
        return {"fitted": prototypes(params, blank_padding(support)), "stats": fixed}

    def predict(params: Params, adapted: PyTree, x: Array, mask: Array | None = None) -> Array:
        z, _ = forward(model, params["model"], x, mask=mask, stats=adapted["stats"])
        return classify({}, adapted["fitted"], z)

    def statistics(params: Params, task: Task, key: Key) -> tuple[PyTree, Array]:
        del key
        query = blank_padding(task.query)
        return to_moments(forward(model, params["model"], query.x, mask=query.mask)[1]), jnp.asarray(1.0)

    statistics_or_none = None if model.apply_norm is None else statistics
    return Learner(init, adapt, predict, task_loss, statistics_or_none, model.divisible)
