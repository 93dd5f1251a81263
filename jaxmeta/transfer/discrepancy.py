"""How far the features of two domains are apart, differentiably: CORAL and maximum mean discrepancy."""

from collections.abc import Sequence
from typing import Literal, TypedDict, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

from jaxmeta.checks import ArgumentError, check_finite, check_number, check_real, check_word, shown
from jaxmeta.transfer import host

Features = Float[Array | np.ndarray, "_ _"]
Bandwidth = float | int | Sequence[float | int] | Array | np.ndarray | Literal["mean", "median"]
KernelWeights = Sequence[float] | Float[Array | np.ndarray, " kernels"]
Variant = Literal["paper", "mean+cov"]
Estimator = Literal["biased", "unbiased", "linear"]
MULTIPLES = (0.125, 0.25, 0.5, 1.0, 2.0)


def covariance(x: Float[Array | np.ndarray, "n d"]) -> Float[Array, "d d"]:
    """Unbiased covariance C = Σ_i (x_i − μ)(x_i − μ)ᵀ / (n − 1) of the rows of `x`.

    Raises:
      ValueError: fewer than two rows.
    """
    _check_features("x", x, 2)
    x = jnp.asarray(x)
    centred = x - x.mean(0, keepdims=True)
    return _product(centred.T, centred) / (x.shape[0] - 1)


def coral_loss(source: Features, target: Features, *, variant: Variant = "paper") -> Float[Array, ""]:
    """Deep CORAL: the distance of the two domains' covariances.

    ℓ = ‖C_s − C_t‖_F² / (4d²), to be added to the source's classification loss with a weight for which
    both are of similar size at the end of training. It needs no equal numbers of examples, and is
    defined, though the covariances have not full rank, for fewer examples than features.

    Args:
      source: features `(n_s, d)` of at least two examples.
      target: `(n_t, d)`.
      variant: "paper"; or "mean+cov", the mean over entries of (C_s − C_t)² plus that of (μ_s − μ_t)²,
        which a widely used library computes under the same name: four times the paper's loss, and a term
        of the means, which the paper leaves free.

    Raises:
      ValueError: features of two widths; fewer than two examples; an unknown `variant`.

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
    spread = jnp.square(covariance(source) - covariance(target)).mean()
    if variant == "paper":
        return spread / 4
    return spread + jnp.square(jnp.asarray(source).mean(0) - jnp.asarray(target).mean(0)).mean()


def coral_transform(
    source: Features, target: Features, *, regularisation: float = 1.0
) -> Float[Array, "d d"]:
    """CORAL in closed form: the matrix A for which the rows of `source @ A` have the target's covariance.

    A = (C_s + λI)^(−1/2) (C_t + λI)^(1/2): the source is whitened, then coloured as the target. A
    classifier is fitted on `source @ A` with the source's labels, and used on the target as it is. The
    means are not matched; the paper has both domains' features normalised to mean 0 (and variance 1) first.

    Args:
      source: features `(n_s, d)` of at least two examples.
      target: `(n_t, d)`.
      regularisation: λ ≥ 0. With 0 covariances agree exactly if C_s has full rank; otherwise directions in
        which the source does not vary are mapped to 0 (by the pseudo-inverse).

    Raises:
      ValueError: features of two widths; fewer than two examples; a negative `regularisation`.

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
    """Squared maximum mean discrepancy MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y) of two samples.

    k = Σ_u β_u k_u with Gaussian kernels k_u(x, y) = exp(−‖x − y‖² / (2σ_u²)).

    Args:
      source: x, `(n_s, d)`.
      target: y, `(n_t, d)`.
      bandwidth: σ, in units of the features: a number, or a sequence with one for each kernel. Or
        measured on both samples together, without a gradient (through it the loss could shrink by
        moving all points apart): "mean", σ_u² = multiples_u times the mean squared distance of all pairs,
        those of a point and itself included, as in the library the multiples are from; "median",
        multiples_u times the squared median distance of distinct points, which with `multiples=(1.0,)` is
        the median heuristic.
      multiples: of a measured bandwidth: 2⁻³ to 2¹, a kernel each. The paper has 2⁻⁸ to 2⁸ around the
        median.
      weights: β, one for each kernel; uniform with sum 1 if None, so that one kernel is a case of
        several. The paper learns β by a quadratic program, with the same sum; libraries often take the
        plain sum of kernels, `weights=(1.0,) * 5`.
      estimator: "biased", means over all pairs, never negative; "unbiased", without the pairs of an
        example and itself, negative at times; "linear", unbiased at O(n) cost and with more variance, the
        mean over i of k(x_2i−1, x_2i) + k(y_2i−1, y_2i) − k(x_2i−1, y_2i) − k(x_2i, y_2i−1), for which
        both samples must be in random order.

    Raises:
      ValueError: features of two widths; too few examples for the estimator, or, for "linear",
        samples of two sizes or an odd one; a bandwidth or multiple that is not positive; weights of another
        number; an unknown `estimator` or `bandwidth`.

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
    beta = jnp.asarray(uniform if weights is None else _kernels("weights", weights), variances.dtype)
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
    """The penalty of deep adaptation networks: the sum over layers of `mmd2`.

    Args:
      source: of each layer the features of the source, `(n_s, d_layer)`; DAN takes the last, fully
        connected ones.
      target: those of the target, `(n_t, d_layer)`.
      bandwidth, multiples, weights, estimator: of `mmd2`. A measured bandwidth is each layer's own. The
        paper trains with "linear".

    Raises:
      ValueError: no layer, or another number of them in the target; and what `mmd2` refuses.

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
            f"got features of {len(source)} and {len(target)} layers; they must be as many, and at least one",
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
            "source, target", f"got {source.shape[1]} and {target.shape[1]} features; they must be as many"
        )


def _check_features(name: str, features: Features, at_least: int) -> None:
    check_real(name, features)
    if features.ndim != 2 or features.shape[0] < at_least or not features.shape[1]:
        raise ArgumentError(
            name,
            f"got shape {features.shape}; it must be (examples, features), with at least {at_least} examples",
        )


def _product(a: Array, b: Array) -> Array:
    # In full precision also where the default is lower (TPUs, TF32): what follows are differences.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _power(matrix: Float[Array, "d d"], exponent: float) -> Float[Array, "d d"]:
    """Power of a symmetric positive semi-definite matrix, of its pseudo-inverse if negative."""
    values, vectors = jnp.linalg.eigh(matrix)
    # The tolerance of the rank in NumPy's and SciPy's `matrix_rank` and `pinvh`.
    positive = values > values[-1] * values.size * jnp.finfo(values.dtype).eps
    powers = jnp.where(positive, jnp.where(positive, values, 1) ** exponent, 0)
    return _product(vectors * powers[None], vectors.T)


def _variances(
    source: Features, target: Features, bandwidth: Bandwidth, multiples: Sequence[float]
) -> Float[Array, " kernels"]:
    """σ² of each kernel."""
    if not isinstance(bandwidth, str):
        return jnp.square(_positive("bandwidth", bandwidth))
    check_word("bandwidth", bandwidth, ("mean", "median"))
    both = lax.stop_gradient(jnp.concatenate([jnp.asarray(source), jnp.asarray(target)]))
    if bandwidth == "mean":
        # Over all pairs, E‖z − z'‖² = 2 E‖z − E z‖².
        scale = 2 * jnp.square(both - both.mean(0, keepdims=True)).sum(1).mean()
    else:
        pairs = jnp.triu_indices(both.shape[0], 1)
        scale = jnp.square(jnp.median(jnp.sqrt(_squared_distances(both)[pairs])))
    # Where no two points differ, any bandwidth says so.
    return jnp.where(scale > 0, scale, 1) * _positive("multiples", multiples)


def _positive(name: str, values: Bandwidth) -> Float[Array, " kernels"]:
    array = _kernels(name, values)
    positive = isinstance(array, jax.core.Tracer) or (array > 0).all()
    if not positive or array.ndim > 1 or not array.size:
        raise ArgumentError(
            name, f"got {shown(values)}; it must be positive, a number or one for each kernel"
        )
    return jnp.atleast_1d(jnp.asarray(array, float))


def _kernels(name: str, values: Bandwidth) -> Shaped[Array | np.ndarray, "..."]:
    """`values` as an array, of finite numbers; what is traced has no value yet."""
    if any(isinstance(value, jax.core.Tracer) for value in jax.tree.leaves(values)):
        return jnp.asarray(values, float)
    array = host.numbers(values, name)
    check_finite(name, array)
    return array


def _squared_distances(z: Float[Array, "n d"]) -> Float[Array, "n n"]:
    # Distances are those of the centred points, which are small: less is lost in the difference.
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
            "needs as many of both, and an even number",
        )

    def similarity(a: Array, b: Array) -> Array:
        return kernel(jnp.square(a - b).sum(1))

    x, x_next, y, y_next = source[::2], source[1::2], target[::2], target[1::2]
    return (
        similarity(x, x_next) + similarity(y, y_next) - similarity(x, y_next) - similarity(x_next, y)
    ).mean()
