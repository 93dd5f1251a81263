"""Kernel classifiers: a query's label as a kernel-weighted mean of the support labels."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmeta import declare
from jaxmeta.checks import check_number, check_word
from jaxmeta.core import Augment, Key, Learner, Norm, Params
from jaxmeta.metric_based.metric_learner import (
    ROWS,
    class_means,
    episodic_defaults,
    metric_learner,
    only_present,
    product,
    squared_distances,
    unit,
    with_centre,
)
from jaxmeta.nn.adapters import Network

Reduction = Literal["sum", "mean", "nearest", "prototype"]
Normalisation = Literal["softmax", "sum"]
REDUCTIONS, NORMALISATIONS = get_args(Reduction), get_args(Normalisation)


class Similarity(NamedTuple):
    """A similarity of embeddings, which may have parameters.

    Attributes:
      apply: `(params, a (m, dim), b (n, dim)) -> (m, n)`, the similarities.
      init: `(key, dim) -> params`, the initial parameters; None for no parameters.

    Examples:
      >>> import jax.numpy as jnp, jaxmeta as jm
      >>> scaled_dot = jm.Similarity(lambda scale, a, b: scale * a @ b.T, lambda key, dim: jnp.asarray(1.0))
      >>> scaled_dot.apply(2.0, jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]])).tolist()
      [[10.0]]
    """

    apply: Callable[[Params, Array, Array], Array]
    init: Callable[[Key, int], Params] | None = None


def _mahalanobis(matrix: Params, a: Array, b: Array) -> Array:
    b, centre = with_centre(b)
    return -squared_distances(product(a - centre[None], matrix), product(b - centre[None], matrix))


SIMILARITIES = {
    "cosine": Similarity(lambda _, a, b: product(unit(a), unit(b).T)),
    "dot": Similarity(lambda _, a, b: product(a, b.T)),
    "euclidean": Similarity(lambda _, a, b: -squared_distances(a, b)),
    "learned": Similarity(_mahalanobis, lambda key, dim: jnp.eye(dim)),
}


@declare.learner(
    kinds=("classification",),
    head=False,
    rows=ROWS,
    training=episodic_defaults(20, fixed={"similarity": "euclidean", "reduce": "sum", "scale": 1.0}),
)
def kernel_classifier(
    model: Network,
    *,
    similarity: Literal["cosine", "dot", "euclidean", "learned"]
    | Similarity
    | Callable[[Array, Array], Array] = "cosine",
    normalise: Normalisation = "softmax",
    reduce: Reduction = "sum",
    scale: float = 1.0,
    learn_scale: bool = False,
    norm: Norm = "batch",
    augment: Augment | None = None,
) -> Learner:
    r"""Build a kernel classifier, which averages the support labels by a kernel (Nadaraya 1964).

    The label is the Nadaraya–Watson estimate P(y|x, S) = Σ_i k(x, x_i) y_i with k ≥ 0 and Σ_i k(x, x_i) = 1:

    k(x, x_i) = κ_i / Σ_j κ_j  with  κ_i = exp(scale · s(f(x), f(x_i)))  or, normalised by "sum",
    κ_i = max(s, 0). Outputs are log P. Other methods that compare embeddings are special cases:

    | method | similarity s | reduce |
    | --- | --- | --- |
    | `jm.matching` | cosine | sum |
    | `jm.prototypical` | euclidean | prototype; with one example per class also sum |
    | `jm.siamese` | −Σ_j α_j \|a_j − b_j\| | nearest |
    | one nearest neighbour | any | nearest |
    | class frequencies of the support set | constant | sum |

    "prototype" has the form above only with one example per class, since the kernel of a mean embedding is
    not the mean of kernels. A class slot without a support example has probability 0 (log P = −∞). The zero
    vector has cosine 0 with all vectors.

    Params: parameters of the embedding under "model", and learned parameters of similarity and scale under
    "head". Adapted: the embedded support set and its one-hot labels.

    Args:
      model: embedding f.
      similarity: similarity of two embeddings: "cosine", "dot", "euclidean" (−‖a − b‖²) or "learned"
        (−‖A(a − b)‖², with A initialised to the identity). In Python also a function
        `(a (m, dim), b (n, dim)) -> (m, n)`, or a `Similarity`, which may have parameters.
      normalise: normalisation of similarities to weights that sum to 1: by "softmax", or by the "sum" of the
        positive ones.
      reduce: reduction over the examples of a class: "sum" of κ_i; "mean", which does not depend on the
        number of examples; "nearest", the largest κ_i; or "prototype", κ of the mean embedding.
      scale: factor of the similarity under the softmax. With cosines and scale 1, the probability of a class
        is at most 0.6488 at five ways and one shot.
      learn_scale: if True, the scale is learned, starting from `scale`.
      norm: source of the batch statistics that normalise embeddings; see `jm.prototypical`.
      augment: augmentation `(key, x) -> x` of all images in training.

    Returns:
      A `Learner`.

    Raises:
      ValueError: an unknown name; `scale` not positive; float targets.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> tasks = jm.tasks.glyphs(ways=5, shots=2, queries=3)
      >>> learner = jm.kernel_classifier(jm.nn.Conv4(filters=8), similarity="euclidean", norm="support")
      >>> task = tasks.sample(jax.random.key(0))
      >>> params = learner.init(jax.random.key(1), task)
      >>> adapted = learner.adapt(params, task.support, jax.random.key(2))
      >>> learner.predict(params, adapted, task.query.x).shape
      (15, 5)
    """
    similarity = _as_similarity(similarity)
    for name, value, known in (
        ("normalise", normalise, NORMALISATIONS),
        ("reduce", reduce, REDUCTIONS),
    ):
        check_word(name, value, known)
    check_number("scale", scale, above=0)

    def init(key: Key, dim: int, ways: int) -> Params:
        del ways
        params: Params = {}
        if similarity.init is not None:
            params["similarity"] = similarity.init(key, dim)
        if learn_scale:
            params["scale"] = jnp.asarray(float(scale))
        return params

    def log_kernel(head_params: Params, a: Array, b: Array) -> Array:
        values = similarity.apply(head_params.get("similarity"), a, b)
        if normalise == "sum":
            return jnp.log(jnp.maximum(values, jnp.finfo(values.dtype).tiny))
        return head_params.get("scale", scale) * values

    def fit(head_params: Params, z: Array, labels: Array, key: Key | None) -> Params:
        del head_params, key
        return {"z": z, "labels": labels}

    def classify(head_params: Params, fitted: Params, z: Array) -> Array:
        labels = fitted["labels"]
        if reduce == "prototype":
            means, present = class_means(fitted["z"], labels)
            means, _ = with_centre(means, present)
            return jax.nn.log_softmax(only_present(log_kernel(head_params, z, means), present))
        support, _ = with_centre(fitted["z"], (labels > 0).any(1))
        return log_probabilities(log_kernel(head_params, z, support), labels, reduce)

    has_params = similarity.init is not None or learn_scale
    return metric_learner(
        model, fit=fit, classify=classify, init=init if has_params else None, norm=norm, augment=augment
    )


def _as_similarity(similarity: str | Similarity | Callable[[Array, Array], Array]) -> Similarity:
    """Convert a name or a function to a `Similarity`."""
    if isinstance(similarity, Similarity):
        return similarity
    if not callable(similarity):
        check_word("similarity", similarity, SIMILARITIES)
        return SIMILARITIES[similarity]
    return Similarity(lambda _, a, b: similarity(a, b))


def log_probabilities(
    log_kernel: Float[Array, "m n"], labels: Float[Array, "n ways"], reduce: Reduction = "sum"
) -> Float[Array, "m ways"]:
    """Return log P(y|x, S) from log κ of each query and support example.

    Args:
      log_kernel: log κ, up to a constant per query.
      labels: one-hot labels; rows of zeros are padding.
      reduce: reduction over the examples of a class: "sum", "mean" or "nearest".
    """
    member, present = labels > 0, (labels > 0).any(0)
    # A class without examples gets all examples here, and probability zero below: logsumexp over an empty
    # set has no finite gradient.
    inside = jnp.where((member | ~present[None])[None], log_kernel[:, :, None], -jnp.inf)
    if reduce == "nearest":
        mass = inside.max(1)
    else:
        mass = jax.nn.logsumexp(inside, axis=1)
        if reduce == "mean":
            mass = mass - jnp.log(jnp.maximum(labels.sum(0), 1))[None]
    return jax.nn.log_softmax(only_present(mass, present))
