"""The Mahalanobis distance with regularised class covariances (Simple CNAPS)."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmeta import declare
from jaxmeta.checks import check_number, check_word
from jaxmeta.core import Augment, Key, Learner, Norm, Params
from jaxmeta.losses import full_precision
from jaxmeta.metric_based.metric_learner import (
    ROWS,
    class_means,
    episodic_defaults,
    metric_learner,
    only_present,
    product,
    solve_positive,
    squared_distances,
    unit,
)
from jaxmeta.nn.adapters import Network

Transform = Literal["un", "l2n"]
_EXACT = jax.lax.Precision.HIGHEST


@declare.learner(kinds=("classification",), head=False, rows=ROWS, training=episodic_defaults(20))
def mahalanobis(
    model: Network,
    *,
    regularisation: float = 1.0,
    transform: Transform = "un",
    norm: Norm = "batch",
    augment: Augment | None = None,
) -> Learner:
    r"""Build a classifier by Mahalanobis distances, the metric of Simple CNAPS (Bateni et al. 2020).

    Each class c has the mean μ_c of its n_c embedded support examples and a covariance that is shrunk towards
    the one of all support examples of the task:

    Q_c = λ_c S_c + (1 − λ_c) S + β I,  λ_c = n_c / (n_c + 1),
    outputs = −½ (f(x) − μ_c)ᵀ Q_c⁻¹ (f(x) − μ_c),

    with S_c the covariance of class c around μ_c and S that of all support examples around their mean, both
    with the denominator of the number of examples minus 1. S_c is zero for a single example. As in the paper,
    the log-determinant of Q_c, which a Gaussian density would have, is left out.

    Where the support set has fewer examples n than the embedding has dimensions, each Q_c⁻¹ is applied by the
    Woodbury identity with an n × n matrix. The paper's adaptation of the network is not part of this method.

    Params: parameters of the embedding under "model". Adapted: means, and a matrix for each class.

    Args:
      model: embedding f.
      regularisation: weight β of the identity in Q_c, above 0. It is a variance, and has the scale of squared
        embeddings.
      transform: transformation of embeddings: "un", none; "l2n", normalisation to length 1, which gives β a
        scale that does not depend on the network. The variances are then below 1.
      norm: source of the batch statistics that normalise embeddings; see `jm.prototypical`.
      augment: augmentation `(key, x) -> x` of all images in training.

    Returns:
      A `Learner`.

    Raises:
      ValueError: `regularisation` not positive; an unknown name; float targets.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.glyphs(ways=5, shots=2, queries=3).sample(jax.random.key(0))
      >>> learner = jm.mahalanobis(jm.nn.Conv4(filters=8), norm="support")
      >>> params = learner.init(jax.random.key(1), task)
      >>> adapted = learner.adapt(params, task.support, jax.random.key(2))
      >>> learner.predict(params, adapted, task.query.x).shape
      (15, 5)

    References:
      Bateni et al., Improved Few-Shot Visual Classification, 2020, section 4.
    """
    check_number("regularisation", regularisation, above=0)
    check_word("transform", transform, get_args(Transform))

    def transform_embeddings(z: Array) -> Array:
        return full_precision(z) if transform == "un" else unit(z)

    def fit(head_params: Params, z: Array, labels: Array, key: Key | None) -> Params:
        del head_params, key
        real = (labels > 0).any(1, keepdims=True)
        z = jnp.where(real, transform_embeddings(z), 0)
        centre = z.sum(0) / jnp.maximum(real.sum(), 1)
        x = jnp.where(real, z - centre[None], 0)
        means, present = class_means(x, labels)
        fitted = {"centre": centre, "means": means, "present": present}
        if x.shape[0] < x.shape[1]:
            members, eigenvalues = labels.T, _root_eigenvalues(labels)
            gram = product(x, x.T)
            # Each class has its own matrix M^½ G M^½ + β I, whose eigenvalues are at least β.
            half = jax.vmap(_root_times, (0, 0, None))(eigenvalues, members, gram)
            inner = jax.vmap(_root_times)(eigenvalues, members, half.mT)
            matrices = _regularised(inner, regularisation)
            return {**fitted, "matrices": matrices, "support": x, "labels": labels}
        own, common = _variance_weights(labels)
        residuals = x[None] - means[:, None]
        within = jnp.einsum("cn,cni,cnj->cij", labels.T, residuals, residuals, precision=_EXACT)
        covariance = own[:, None, None] * within + common[:, None, None] * product(x.T, x)[None]
        return {**fitted, "matrices": _regularised(covariance, regularisation)}

    def classify(head_params: Params, fitted: Params, z: Array) -> Array:
        del head_params
        x, means = transform_embeddings(z) - fitted["centre"][None], fitted["means"]
        if "support" not in fitted:
            differences = x[None] - means[:, None]
            squared = _quadratic_forms(fitted["matrices"], differences.mT)
            return only_present(-squared / 2, fitted["present"])
        support, labels = fitted["support"], fitted["labels"]
        similarities = product(support, x.T)[None] - product(means, support.T)[:, :, None]
        rooted = jax.vmap(_root_times)(_root_eigenvalues(labels), labels.T, similarities)
        explained = _quadratic_forms(fitted["matrices"], rooted)
        squared = (squared_distances(x, means, fitted["present"]) - explained) / regularisation
        return only_present(-squared / 2, fitted["present"])

    return metric_learner(model, fit=fit, classify=classify, norm=norm, augment=augment)


def _variance_weights(labels: Float[Array, "n ways"]) -> tuple[Float[Array, " ways"], Float[Array, " ways"]]:
    """Return the factors of the sums of squares within each class, and of all examples, in Q_c."""
    counts = labels.sum(0)
    shrinkage = counts / (counts + 1)
    return shrinkage / jnp.maximum(counts - 1, 1), (1 - shrinkage) / jnp.maximum(counts.sum() - 1, 1)


def _root_eigenvalues(labels: Float[Array, "n ways"]) -> Float[Array, "ways 2"]:
    """Return the two eigenvalues of M^½ of each class, on the centred vectors of the class and on all others.

    Q_c = Xᵀ M X + β I with X the centred support set and M = own · C + common · I, where C projects to the
    centred vectors of the class, so that M^½ is also a combination of C and I.
    """
    own, common = _variance_weights(labels)
    return jnp.sqrt(jnp.stack([own + common, common], 1))


def _root_times(
    eigenvalues: Float[Array, " 2"], members: Float[Array, " n"], values: Float[Array, "n k"]
) -> Float[Array, "n k"]:
    """Return M^½ times `values` for one class."""
    mean = jnp.einsum("n,nk->k", members, values, precision=_EXACT) / jnp.maximum(members.sum(), 1)
    within, others = eigenvalues[0], eigenvalues[1]
    return others * values + (within - others) * members[:, None] * (values - mean[None])


def _regularised(matrices: Float[Array, "ways n n"], regularisation: float) -> Float[Array, "ways n n"]:
    """Return matrices plus the regularisation on the diagonal."""
    identity = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
    return matrices + regularisation * identity[None]


def _quadratic_forms(
    matrices: Float[Array, "ways n n"], vectors: Float[Array, "ways n m"]
) -> Float[Array, "m ways"]:
    """Return vᵀ A⁻¹ v for the matrix A of each class and each of its vectors v."""
    return (vectors * jax.vmap(solve_positive)(matrices, vectors)).sum(1).T
