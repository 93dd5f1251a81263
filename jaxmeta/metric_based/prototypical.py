"""Prototypical networks: a class is the mean of its embedded examples, or an embedded vector of metadata."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import lecun_normal
from jaxtyping import Array, Bool, Float

from jaxmeta import declare, losses
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
    """The embedding, and where there are no examples of a class that of its metadata."""
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
    # Ways are dear: a task of 60 has as many images as twelve of five.
    training=episodic_defaults(60, 3, own={"divergence": "euclidean"}),
)
def prototypical(
    model: Network,
    *,
    divergence: Divergence = "euclidean",
    metadata: Network | None = None,
    norm: Norm = "batch",
    augment: Augment | None = None,
) -> Learner:
    r"""Build prototypical networks, where a class is the mean of its embedded examples (Snell et al. 2017).

    P(y = c | x) = softmax_c(−d(f(x), v_c)), v_c the mean of f over class c

    d is the squared Euclidean distance, or any Bregman divergence: for a strictly convex φ,

    d_φ(z, v) = φ(z) − φ(v) − (z − v)·∇φ(v),

    of which in every case the mean is the point nearest to a set of points. With the squared Euclidean
    distance this is a linear classifier of f(x), with weights 2 v_c and biases −‖v_c‖².

    Zero-shot, with `metadata`: v_c = g(m_c) / ‖g(m_c)‖ is embedded from one vector for each class, and f(x)
    is not normalised.

    Train with more ways than you test with, and with as many shots (Snell et al.: 60 ways on Omniglot).

    Params: `{"model": …}`, with "metadata" in zero-shot learning and "population" once `jm.calibrate`
    filled it. Adapted: `{"fitted": {"prototypes": (ways, dim), "present": (ways,)}, "stats"}`; under
    norm="batch" the support set itself.

    Args:
      model: the embedding f, `(n, *shape) -> (n, dim)`.
      divergence: of embeddings from prototypes, d: "euclidean" (squared); "kl", of softmax(f(x)), φ = Σ z ln
        z; "cosine", 1 − cos, which is no Bregman divergence and which the paper found worse; or a convex
        function φ of one vector.
      metadata: the embedding g of class metadata, `(ways, d) -> (ways, dim)`; None for few-shot learning.
      norm: whose statistics normalise embeddings, where the network has any. "batch": those of support and
        queries together (transductive). "support": those of the support set (inductive). "population": those
        filled by `jm.calibrate` (inductive; the published numbers; trains like "batch"). It changes no
        parameter, so that one trained `params` serves a learner of each.
      augment: `(key, x) -> x`, of all images in training.

    Raises:
      ValueError: an unknown name; norm="support" in zero-shot learning, whose support set has no images;
        float targets; embeddings of two widths; "population" asked of params that were not calibrated.

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
    embedded, distances = _divergence(divergence)

    def judge(own: Params, fitted: Params, z: Array) -> Array:
        del own
        found = distances(embedded(z), fitted["prototypes"], fitted["present"])
        return only_present(-found, fitted["present"])

    if metadata is not None:
        return _zero_shot(model, metadata, judge, norm, augment)

    def fit(own: Params, z: Array, labels: Array, key: Key | None) -> Params:
        del own, key
        means, present = class_means(embedded(z), labels)
        return {"prototypes": means, "present": present}

    return metric_learner(model, fit=fit, judge=judge, norm=norm, augment=augment)


def add_class(
    model: Network,
    params: Params,
    adapted: PyTree,
    x: Array,
    *,
    divergence: Divergence = "euclidean",
) -> PyTree:
    """An adapted state of `prototypical` that knows one class more, without the old support set.

    The new class gets the next slot. What is known of the others does not change.

    Args:
      model, params, divergence: of the learner.
      adapted: by a learner of norm "support" or "population".
      x: examples of the new class, `(k, *shape)`; they are normalised by the statistics in `adapted`.

    Raises:
      ValueError: `adapted` has no prototypes, or no statistics of a model that normalises; or `x` has no
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
            'got a state without prototypes; take one by jm.prototypical(…, norm="population") or "support"',
        )
    if x.shape[0] < 1:
        raise ArgumentError("x", f"got shape {x.shape}; it must hold at least one example of the new class")
    embedded, _ = _divergence(divergence)
    z, stats = forward(as_model(model, "model"), params["model"], x, stats=adapted["stats"])
    if adapted["stats"] is None and jax.tree.leaves(stats):
        raise ArgumentError(
            "adapted",
            "got a state without batch statistics, of a model that has some: its learner normalises "
            'each batch by itself; take one by jm.prototypical(…, norm="population")',
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
    """d_φ(z_i, v_j) = φ(z_i) − φ(v_j) − (z_i − v_j)·∇φ(v_j), in float32 at least.

    It is that of φ_c(u) = d_φ(u, c) for any c, and c is the centre of v: where points have a common offset, φ
    and the products are large, and have no room for the differences.

    Args:
      generator: φ.
      z, v: points.
      present: which of `v` count; None for all. The divergences from others are those from the centre.

    Examples:
      >>> import jax.numpy as jnp
      >>> z, v = jnp.array([[0.5, 0.0]]), jnp.array([[0.0, 0.0], [2.0, 0.0]])
      >>> bregman(lambda u: (u**2).sum(), z, v).tolist()
      [[0.25, 2.25]]
    """
    z, (v, centre) = losses.full_precision(z), with_centre(v, present)
    own = jax.vmap(lambda u: _from_centre(generator, centre, u))
    slopes = jax.vmap(jax.grad(generator))(v) - jax.grad(generator)(centre)[None]
    z_own, v_own = own(z), own(v)
    z, v = z - centre[None], v - centre[None]
    at_v = v_own - (v * slopes).sum(-1)
    return z_own[:, None] - at_v[None, :] - product(z, slopes.T)


def _from_centre(generator: Generator, centre: Float[Array, " dim"], u: Float[Array, " dim"]):
    """φ(u) − φ(c) − (u − c)·∇φ(c), also where φ is so large that its values have no room for it.

    Of these it is the difference; or the integral ∫₀¹ (u − c)·(∇φ(c + t (u − c)) − ∇φ(c)) dt by Gauss's rule,
    where that is known better: where two rules differ by less than the values' last bits.
    """
    way, slope = u - centre, jax.grad(generator)(centre)

    def integral(nodes: int) -> Array:
        places, weights = np.polynomial.legendre.leggauss(nodes)
        on_the_way = [
            weight / 2 * (way * (jax.grad(generator)(centre + (place + 1) / 2 * way) - slope)).sum()
            for place, weight in zip(places.tolist(), weights.tolist(), strict=True)
        ]
        return sum(on_the_way[1:], on_the_way[0])

    values = generator(u), generator(centre), (way * slope).sum()
    fine, coarse = integral(4), integral(3)
    last_bits = jnp.finfo(u.dtype).eps * sum(jnp.abs(value) for value in values)
    known_better = jax.lax.stop_gradient(jnp.abs(fine - coarse) <= last_bits)
    return jnp.where(known_better, fine, values[0] - values[1] - values[2])


def _negative_entropy(z: Array) -> Array:
    return (z * jnp.log(jnp.maximum(z, jnp.finfo(z.dtype).tiny))).sum()


def _relative_entropy(z, v, present=None):
    """KL of distributions: without the second derivatives of `bregman`, which overflow near 0."""
    del present
    z, v = losses.full_precision(z), losses.full_precision(v)
    tiny = jnp.finfo(z.dtype).tiny
    return jax.vmap(_negative_entropy)(z)[:, None] - product(z, jnp.log(jnp.maximum(v, tiny)).T)


def _divergence(given: Divergence) -> tuple[Callable[[Array], Array], Callable[..., Array]]:
    """What is done to an embedding first, and the distances of points to prototypes that are present."""
    known: dict[str, tuple[Any, ...]] = {
        "euclidean": (lambda z: z, squared_distances),
        "kl": (jax.nn.softmax, _relative_entropy),
        "cosine": (lambda z: z, lambda z, v, present: 1 - product(unit(z), unit(v).T)),
    }
    if not callable(given):
        check_word("divergence", given, known)
        return known[given]
    return lambda z: z, lambda z, v, present: bregman(given, z, v, present)


def _zero_shot(
    model: Network,
    metadata: Network,
    judge: Callable[[Params, PyTree, Array], Array],
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
                f"gives embeddings of shape {widths[1]}, and model of {widths[0]}; both must agree",
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
        outputs = judge({}, prototypes(params, support), z)
        value = losses.cross_entropy(outputs, query.y, query.mask)
        return value, {"loss": (value, jnp.ones_like(value)), **losses.score(outputs, query)}

    def adapt(params: Params, support: Batch, key: Key) -> PyTree:
        del key
        fixed = population_of(params) if norm == "population" and model.apply_norm is not None else None
        return {"fitted": prototypes(params, blank_padding(support)), "stats": fixed}

    def predict(params: Params, adapted: PyTree, x: Array, mask: Array | None = None) -> Array:
        z, _ = forward(model, params["model"], x, mask=mask, stats=adapted["stats"])
        return judge({}, adapted["fitted"], z)

    def statistics(params: Params, task: Task, key: Key) -> tuple[PyTree, Array]:
        del key
        query = blank_padding(task.query)
        return to_moments(forward(model, params["model"], query.x, mask=query.mask)[1]), jnp.asarray(1.0)

    filled = None if model.apply_norm is None else statistics
    return Learner(init, adapt, predict, task_loss, filled, model.divisible)
