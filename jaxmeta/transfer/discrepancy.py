"""Differentiable distances between the features of two domains: CORAL and maximum mean discrepancy."""

from collections.abc import Sequence
from typing import Literal, TypedDict, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

from jaxmeta.checks import ArgumentError, check_finite, check_number, check_real, check_word, format_value
from jaxmeta.transfer import host

Features = Float[Array | np.ndarray, "_ _"]
Bandwidth = float | int | Sequence[float | int] | Array | np.ndarray | Literal["mean", "median"]
KernelWeights = Sequence[float] | Float[Array | np.ndarray, " kernels"]
Variant = Literal["paper", "mean+cov"]
Estimator = Literal["biased", "unbiased", "linear"]
MULTIPLES = (0.125, 0.25, 0.5, 1.0, 2.0)


def covariance(x: Float[Array | np.ndarray, "n d"]) -> Float[Array, "d d"]:
    """Return the unbiased covariance C = Σ_i (x_i − μ)(x_i − μ)ᵀ / (n − 1) of the rows of `x`.

    Args:
      x: features of shape `(n, d)` of at least two examples.

    Returns:
      The covariance matrix of shape `(d, d)`.

    Raises:
      ValueError: if `x` has fewer than two rows.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(covariance(jnp.array([[0.0, 0.0], [2.0, 0.0]])))
      [[2. 0.]
       [0. 0.]]
    """
    _check_features("x", x, 2)
    x = jnp.asarray(x)
    centred = x - x.mean(0, keepdims=True)
    return _product(centred.T, centred) / (x.shape[0] - 1)


def coral_loss(source: Features, target: Features, *, variant: Variant = "paper") -> Float[Array, ""]:
    """Return the Deep CORAL loss, a squared distance of the covariances of two domains.

    ℓ = ‖C_s − C_t‖_F² / (4d²). It is added to the source's classification loss with a weight that makes both
    terms of similar size at the end of training. The domains may differ in their numbers of examples, and may
    have fewer examples than features.

    Args:
      source: features of the source, of shape `(n_s, d)`, at least two examples.
      target: features of the target, of shape `(n_t, d)`, at least two examples.
      variant: "paper" for the formula above; "mean+cov" for the mean over entries of (C_s − C_t)² plus the
        mean of (μ_s − μ_t)², which a widely used library computes under the same name: four times the
        paper's loss, plus a term for the means, which the paper leaves free.

    Returns:
      A scalar.

    Raises:
      ValueError: if the domains have different numbers of features or fewer than two examples, or `variant`
        is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> source, target = jnp.array([[0.0, 0.0], [2.0, 0.0]]), jnp.array([[0.0, 0.0], [0.0, 2.0]])
      >>> print(coral_loss(source, target), coral_loss(source, target, variant="mean+cov"))
      0.5 3.0

    References:
      Sun & Saenko, Deep CORAL: Correlation Alignment for Deep Domain Adaptation, 2016.
    """
    _check(source, target, at_least=2)
    check_word("variant", variant, get_args(Variant))
    difference = jnp.square(covariance(source) - covariance(target)).mean()
    if variant == "paper":
        return difference / 4
    return difference + jnp.square(jnp.asarray(source).mean(0) - jnp.asarray(target).mean(0)).mean()


def coral_transform(
    source: Features, target: Features, *, regularisation: float = 1.0
) -> Float[Array, "d d"]:
    """Return the CORAL matrix A, for which the rows of `source @ A` have the target's covariance.

    A = (C_s + λI)^(−1/2) (C_t + λI)^(1/2) whitens the source, then colours it as the target. Fit a classifier
    on `source @ A` with the source's labels, and apply it to the unchanged target. The means are not matched;
    the paper first normalises the features of both domains to mean 0 (and variance 1).

    Args:
      source: features of the source, of shape `(n_s, d)`, at least two examples.
      target: features of the target, of shape `(n_t, d)`, at least two examples.
      regularisation: λ ≥ 0. With 0 the covariances agree exactly if C_s has full rank; otherwise directions
        in which the source does not vary are mapped to 0 (pseudo-inverse).

    Returns:
      The matrix of shape `(d, d)`.

    Raises:
      ValueError: if the domains have different numbers of features or fewer than two examples, or
        `regularisation` is negative.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> source, target = jax.random.normal(jax.random.key(0), (2, 50, 3)) * jnp.array([[[1.0]], [[4.0]]])
      >>> aligned = source @ coral_transform(source, target, regularisation=0.0)
      >>> bool(jnp.allclose(covariance(aligned), covariance(target), rtol=1e-3, atol=1e-3))
      True

    References:
      Sun, Feng & Saenko, Return of Frustratingly Easy Domain Adaptation, 2016, algorithm 1.
    """
    _check(source, target, at_least=2)
    check_number("regularisation", regularisation, 0)
    ridge = regularisation * jnp.eye(source.shape[1])
    whitening = _power(covariance(source) + ridge, -0.5)
    return _product(whitening, _power(covariance(target) + ridge, 0.5))


class MMDSettings(TypedDict, total=False):
    """Settings of `jm.transfer.mmd2`."""

    bandwidth: Bandwidth
    multiples: Sequence[float]
    weights: KernelWeights | None
    estimator: Estimator


def mmd2(
    source: Features,
    target: Features,
    *,
    bandwidth: Bandwidth = "mean",
    multiples: Sequence[float] = MULTIPLES,
    weights: KernelWeights | None = None,
    estimator: Estimator = "biased",
) -> Float[Array, ""]:
    """Return the squared maximum mean discrepancy of two samples.

    MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y), where k = Σ_u β_u k_u with the Gaussian kernels
    k_u(x, y) = exp(−‖x − y‖² / (2σ_u²)).

    Args:
      source: sample x, of shape `(n_s, d)`.
      target: sample y, of shape `(n_t, d)`.
      bandwidth: σ in units of the features: a number, or one number for each kernel. Or the name of an
        estimate from both samples together, which has no gradient (with one, the loss could decrease by
        moving all points apart). "mean": σ_u² is multiples_u times the mean squared distance over all pairs,
        including each point with itself, as in the library that the multiples come from. "median": σ_u² is
        multiples_u times the squared median distance of distinct points; `multiples=(1.0,)` makes it the
        median heuristic.
      multiples: factors of an estimated bandwidth, one for each kernel; 2⁻³ to 2¹ by default. The paper uses
        2⁻⁸ to 2⁸ around the median.
      weights: β, one for each kernel; None for equal weights with sum 1. The paper learns β by a quadratic
        program with the same sum; libraries often use the plain sum of kernels, `weights=(1.0,) * 5`.
      estimator: "biased" averages over all pairs and is never negative. "unbiased" leaves out the pairs of an
        example with itself and can be negative. "linear" is unbiased with O(n) cost and a larger variance:
        the mean over i of k(x_2i−1, x_2i) + k(y_2i−1, y_2i) − k(x_2i−1, y_2i) − k(x_2i, y_2i−1); it requires
        samples in random order.

    Returns:
      A scalar.

    Raises:
      ValueError: if the samples have different numbers of features or too few examples for the estimator,
        the sizes differ or are odd for "linear", a bandwidth or multiple is not positive, the number of
        weights differs from the number of kernels, or `estimator` or `bandwidth` is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(f"{mmd2(jnp.array([[0.0]]), jnp.array([[1.0]]), bandwidth=1.0):.7f}")  # 2 − 2 exp(−1/2)
      0.7869387

    References:
      Gretton et al., A Kernel Two-Sample Test, 2012; Long et al., Learning Transferable Features with Deep
      Adaptation Networks, 2015.
    """
    check_word("estimator", estimator, get_args(Estimator))
    _check(source, target, at_least=1 if estimator == "biased" else 2)
    variances = _variances(source, target, bandwidth, multiples)
    uniform = np.full(variances.size, 1 / variances.size)
    beta = jnp.asarray(uniform if weights is None else _as_array("weights", weights), variances.dtype)
    if beta.shape != variances.shape:
        raise ArgumentError(
            "weights", f"got shape {beta.shape} for {variances.size} kernels; give one for each"
        )

    def kernel(squared: Array) -> Array:
        expand = (slice(None),) + (None,) * squared.ndim
        return (beta[expand] * jnp.exp(-squared[None] / (2 * variances[expand]))).sum(0)

    if estimator == "linear":
        return _linear(kernel, jnp.asarray(source), jnp.asarray(target))
    n = source.shape[0]
    squared = _squared_distances(jnp.concatenate([jnp.asarray(source), jnp.asarray(target)]))
    similarities = kernel(squared)
    mean = _mean_of_others if estimator == "unbiased" else jnp.mean
    return mean(similarities[:n, :n]) + mean(similarities[n:, n:]) - 2 * similarities[:n, n:].mean()


def dan_loss(
    source: Sequence[Features],
    target: Sequence[Features],
    *,
    bandwidth: Bandwidth = "mean",
    multiples: Sequence[float] = MULTIPLES,
    weights: KernelWeights | None = None,
    estimator: Estimator = "biased",
) -> Float[Array, ""]:
    """Return the penalty of deep adaptation networks (DAN), the sum of `mmd2` over layers.

    Args:
      source: features of the source by layer, each of shape `(n_s, d_layer)`; DAN uses the last, fully
        connected layers.
      target: features of the target by layer, each of shape `(n_t, d_layer)`.
      bandwidth: bandwidth of each layer's kernels; see `mmd2`. Estimates are made for each layer separately.
      multiples: factors of an estimated bandwidth; see `mmd2`.
      weights: weights of the kernels; see `mmd2`.
      estimator: estimator of each layer's `mmd2`; the paper trains with "linear".

    Returns:
      A scalar.

    Raises:
      ValueError: if there are no layers, or different numbers of layers in source and target; and as in
        `mmd2`.

    Examples:
      >>> import jax.numpy as jnp
      >>> layers = [jnp.zeros((4, 8)), jnp.ones((4, 5))]
      >>> print(dan_loss(layers, [layers[0], layers[1] + 1.0], bandwidth=1000.0) < 1e-5)
      True

    References:
      Long et al., Learning Transferable Features with Deep Adaptation Networks, 2015.
    """
    if len(source) != len(target) or not source:
        raise ArgumentError(
            "source, target",
            f"got features of {len(source)} and {len(target)} layers; the numbers must be equal and above 0",
        )
    losses = [
        mmd2(s, t, bandwidth=bandwidth, multiples=multiples, weights=weights, estimator=estimator)
        for s, t in zip(source, target, strict=True)
    ]
    return jnp.stack(losses).sum()


def _check(source: Features, target: Features, *, at_least: int) -> None:
    for name, features in (("source", source), ("target", target)):
        _check_features(name, features, at_least)
    if source.shape[1] != target.shape[1]:
        raise ArgumentError(
            "source, target",
            f"got {source.shape[1]} and {target.shape[1]} features; the numbers must be equal",
        )


def _check_features(name: str, features: Features, at_least: int) -> None:
    check_real(name, features)
    if features.ndim != 2 or features.shape[0] < at_least or not features.shape[1]:
        raise ArgumentError(
            name,
            f"got shape {features.shape}; it must be (examples, features), with at least {at_least} examples",
        )


def _product(a: Array, b: Array) -> Array:
    # Full precision even where the default is lower (TPUs, TF32): differences of the results follow.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _power(matrix: Float[Array, "d d"], exponent: float) -> Float[Array, "d d"]:
    """Return a power of a positive semi-definite matrix, or of its pseudo-inverse for a negative exponent."""
    values, vectors = jnp.linalg.eigh(matrix)
    # The tolerance of the rank in NumPy's and SciPy's `matrix_rank` and `pinvh`.
    positive = values > values[-1] * values.size * jnp.finfo(values.dtype).eps
    powers = jnp.where(positive, jnp.where(positive, values, 1) ** exponent, 0)
    return _product(vectors * powers[None], vectors.T)


def _variances(
    source: Features, target: Features, bandwidth: Bandwidth, multiples: Sequence[float]
) -> Float[Array, " kernels"]:
    """Return σ² of each kernel."""
    if not isinstance(bandwidth, str):
        return jnp.square(_positive("bandwidth", bandwidth))
    check_word("bandwidth", bandwidth, ("mean", "median"))
    pooled = lax.stop_gradient(jnp.concatenate([jnp.asarray(source), jnp.asarray(target)]))
    if bandwidth == "mean":
        # Over all pairs, E‖z − z'‖² = 2 E‖z − E z‖².
        scale = 2 * jnp.square(pooled - pooled.mean(0, keepdims=True)).sum(1).mean()
    else:
        pairs = jnp.triu_indices(pooled.shape[0], 1)
        scale = jnp.square(jnp.median(jnp.sqrt(_squared_distances(pooled)[pairs])))
    # If all points are equal, every bandwidth gives 0; 1 avoids a division by zero.
    return jnp.where(scale > 0, scale, 1) * _positive("multiples", multiples)


def _positive(name: str, values: Bandwidth) -> Float[Array, " kernels"]:
    array = _as_array(name, values)
    positive = isinstance(array, jax.core.Tracer) or (array > 0).all()
    if not positive or array.ndim > 1 or not array.size:
        raise ArgumentError(
            name, f"got {format_value(values)}; it must be a positive number, or one for each kernel"
        )
    return jnp.atleast_1d(jnp.asarray(array, float))


def _as_array(name: str, values: Bandwidth) -> Shaped[Array | np.ndarray, "..."]:
    """Return `values` as an array of finite numbers; traced values pass, since they have no value yet."""
    if any(isinstance(value, jax.core.Tracer) for value in jax.tree.leaves(values)):
        return jnp.asarray(values, float)
    array = host.numbers(values, name)
    check_finite(name, array)
    return array


def _squared_distances(z: Float[Array, "n d"]) -> Float[Array, "n n"]:
    # Centring keeps the norms small, so that their difference loses fewer digits.
    z = z - lax.stop_gradient(z.mean(0, keepdims=True))
    norms = jnp.square(z).sum(1)
    return jnp.maximum(norms[:, None] + norms[None] - 2 * _product(z, z.T), 0)


def _mean_of_others(similarities: Float[Array, "n n"]) -> Float[Array, ""]:
    n = similarities.shape[0]
    return jnp.where(jnp.eye(n, dtype=bool), 0, similarities).sum() / (n * (n - 1))


def _linear(kernel, source: Float[Array, "n d"], target: Float[Array, "m d"]) -> Float[Array, ""]:
    if source.shape[0] != target.shape[0] or source.shape[0] % 2:
        raise ArgumentError(
            "source, target",
            f"got {source.shape[0]} and {target.shape[0]} examples; the linear estimator "
            "needs equal and even numbers",
        )

    def similarity(a: Array, b: Array) -> Array:
        return kernel(jnp.square(a - b).sum(1))

    x, x_next, y, y_next = source[::2], source[1::2], target[::2], target[1::2]
    return (
        similarity(x, x_next) + similarity(y, y_next) - similarity(x, y_next) - similarity(x_next, y)
    ).mean()
