"""The kernel view of learning from few examples: a query's label is a weighted mean of the support's."""

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
    """How alike two embeddings are.

    Attributes:
      apply: `(params, a (m, dim), b (n, dim)) -> (m, n)`.
      init: `(key, dim) -> params` of what is learned of it; None where nothing is.
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
    training=episodic_defaults(20, own={"similarity": "euclidean", "reduce": "sum", "scale": 1.0}),
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
    r"""Build a kernel classifier: a label is the weighted mean of the support's labels (Nadaraya 1964).

    It is Nadaraya and Watson's estimate of the label, P(y|x, S) = Σ_i k(x, x_i) y_i with k ≥ 0 and Σ_i k = 1.

    k(x, x_i) = κ_i / Σ_j κ_j  with  κ_i = exp(scale · s(f(x), f(x_i)))  or, normalised by "sum",
    κ_i = max(s, 0). Outputs are log P. The other methods that compare embeddings are instances:

    | method | similarity s | reduce |
    | --- | --- | --- |
    | `jm.matching` | cosine | sum |
    | `jm.prototypical` | euclidean | prototype; from one example per class also sum |
    | `jm.siamese` | −Σ_j α_j \|a_j − b_j\| | nearest |
    | one nearest neighbour | any | nearest |
    | the classes' shares of the support set | constant | sum |

    "prototype" is of the form above from one example per class only: the mean of embeddings is not the mean
    of kernels. A class slot without a support example has probability 0, log P = −∞; the zero vector has
    cosine 0 with all others.

    Params: the embedding's under "model", and under "head" what is learned of similarity and scale.
    Adapted: the embedded support set and its one-hot labels.

    Args:
      model: the embedding f.
      similarity: how alike two embeddings are: "cosine", "dot", "euclidean" (−‖a − b‖²) or "learned" (−‖A(a −
        b)‖², A from the identity). Or a function `(a (m, dim), b (n, dim)) -> (m, n)`, or a `Similarity`,
        which may have parameters.
      normalise: how similarities become weights that sum to 1: by a "softmax", or by their "sum" where they
        are positive.
      reduce: what a class has of its examples: the "sum" of κ_i; their "mean", so that the number of
        examples counts for nothing; the "nearest" one's; or κ of the "prototype", the mean embedding.
      scale: factor of the similarity under the softmax. Cosines are at most 1 apart from 0, so that with
        scale 1, five ways and one shot no query can have more than probability 0.6488.
      learn_scale: whether the scale is learned, from `scale` on.
      norm: whose statistics normalise embeddings, where the network has any; see `jm.prototypical`.
      augment: `(key, x) -> x`, of all images in training.

    Raises:
      ValueError: an unknown name; a `scale` that is not positive; float targets.

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
    similarity = similarity_of(similarity)
    for name, value, known in (
        ("normalise", normalise, NORMALISATIONS),
        ("reduce", reduce, REDUCTIONS),
    ):
        check_word(name, value, known)
    check_number("scale", scale, above=0)

    def init(key: Key, dim: int, ways: int) -> Params:
        del ways
        own: Params = {}
        if similarity.init is not None:
            own["similarity"] = similarity.init(key, dim)
        if learn_scale:
            own["scale"] = jnp.asarray(float(scale))
        return own

    def log_kernel(own: Params, a: Array, b: Array) -> Array:
        found = similarity.apply(own.get("similarity"), a, b)
        if normalise == "sum":
            return jnp.log(jnp.maximum(found, jnp.finfo(found.dtype).tiny))
        return own.get("scale", scale) * found

    def fit(own: Params, z: Array, labels: Array, key: Key | None) -> Params:
        del own, key
        return {"z": z, "labels": labels}

    def judge(own: Params, fitted: Params, z: Array) -> Array:
        labels = fitted["labels"]
        if reduce == "prototype":
            means, present = class_means(fitted["z"], labels)
            means, _ = with_centre(means, present)
            return jax.nn.log_softmax(only_present(log_kernel(own, z, means), present))
        support, _ = with_centre(fitted["z"], (labels > 0).any(1))
        return log_probabilities(log_kernel(own, z, support), labels, reduce)

    learned = similarity.init is not None or learn_scale
    return metric_learner(
        model, fit=fit, judge=judge, init=init if learned else None, norm=norm, augment=augment
    )


def similarity_of(given: str | Similarity | Callable[[Array, Array], Array]) -> Similarity:
    """The `Similarity` that an argument stands for, or a ValueError."""
    if isinstance(given, Similarity):
        return given
    if not callable(given):
        check_word("similarity", given, SIMILARITIES)
        return SIMILARITIES[given]
    return Similarity(lambda _, a, b: given(a, b))


def log_probabilities(
    log_kernel: Float[Array, "m n"], labels: Float[Array, "n ways"], reduce: Reduction = "sum"
) -> Float[Array, "m ways"]:
    """log P(y|x, S) from log κ of each query and support example.

    Args:
      log_kernel: log κ, up to a constant per query.
      labels: one-hot; rows of zeros are padding.
      reduce: "sum", "mean" or "nearest".
    """
    member, present = labels > 0, (labels > 0).any(0)
    # A class without examples gets all of them here, and probability zero below: a sum over nothing has
    # no finite gradient.
    inside = jnp.where((member | ~present[None])[None], log_kernel[:, :, None], -jnp.inf)
    if reduce == "nearest":
        mass = inside.max(1)
    else:
        mass = jax.nn.logsumexp(inside, axis=1)
        if reduce == "mean":
            mass = mass - jnp.log(jnp.maximum(labels.sum(0), 1))[None]
    return jax.nn.log_softmax(only_present(mass, present))
