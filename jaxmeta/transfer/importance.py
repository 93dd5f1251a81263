"""Importance weights for covariate shift, where P(X) changes and P(Y|X) stays the same.

If P(X) changes and P(Y|X) does not, then for any loss ℓ

    E_t[ℓ] = E_s[w ℓ]  with  w(x) = p_t(x) / p_s(x),

so that a model of the target can be trained on labelled source examples with losses weighted by w, such as
`(weights * losses).mean()`. The weights are estimated from unlabelled examples of both domains, by a
classifier that discriminates between them (`density_ratio`) or by matching their means in a kernel's feature
space (`kernel_mean_matching`).

Weights cannot make up for regions without source examples, where w is infinite, nor correct a change of
P(Y|X), which unlabelled target examples do not show. They trade bias for variance: `effective_sample_size`
gives the number of equally weighted examples with the same variance.

Estimates are computed in float64 on the host (see `jaxmeta.transfer.host`) and returned as JAX arrays.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from jaxmeta.checks import ArgumentError, check_count, check_finite, check_number, check_real
from jaxmeta.transfer import host


class DensityRatio(NamedTuple):
    r"""The density ratio w(x) = p_t(x)/p_s(x) of a logistic discriminator, as a function of features.

    With P(t|x) = 1 / (1 + exp(−kernel·x − bias)),
    w(x) = (n_s/n_t) P(t|x) / P(s|x) = (n_s/n_t) exp(kernel·x + bias).

    Attributes:
      kernel: weights of the features, of shape `(d,)`.
      bias: intercept of the discriminator.
      log_prior_ratio: ln(n_s/n_t); it makes w independent of the numbers of examples that the discriminator
        was fitted to.
    """

    kernel: Float[Array, " d"]
    bias: Float[Array, ""]
    log_prior_ratio: Float[Array, ""]

    def __call__(
        self, x: Float[Array | np.ndarray, "n d"], *, exponent: float = 1.0, self_normalised: bool = False
    ) -> Float[Array, " n"]:
        """Return the weights of examples.

        Args:
          x: features of shape `(n, d)`, with the columns of the fitted ones.
          exponent: τ in [0, 1] of w^τ: 1 has no bias where the ratio is exact, 0 gives equal weights, and
            values between have less variance.
          self_normalised: whether to divide by the mean, so that the weights of `x` have mean 1; pass all
            source examples at once.

        Returns:
          Weights of shape `(n,)`.

        Raises:
          ValueError: if `exponent` is outside [0, 1].
        """
        check_number("exponent", exponent, 0, 1)
        logs = exponent * (jnp.asarray(x) @ self.kernel + self.bias + self.log_prior_ratio)
        if self_normalised:
            # The softmax does not overflow.
            return logs.shape[0] * jax.nn.softmax(logs)
        return jnp.exp(logs)


def density_ratio(
    source: Real[Array | np.ndarray, "n_s d"],
    target: Real[Array | np.ndarray, "n_t d"],
    *,
    regularisation: float = 1e-3,
    tolerance: float = 1e-14,
    steps: int = 100,
) -> DensityRatio:
    r"""Fit p_t(x)/p_s(x) by logistic regression of the domain on the features.

    SciPy's trust-region Newton method minimises the mean logistic loss over all n_s + n_t examples +
    (λ/2) ‖kernel‖². The ratio is exact where ln(p_t/p_s) is linear in the features, as for two Gaussians with
    equal covariances; add squares of the features for others. Where the features separate the domains, the
    ratio does not exist: λ alone then keeps the weights finite, with a mean over the source far below 1.

    Args:
      source: features of unlabelled source examples, of shape `(n_s, d)`. The penalty treats all features
        alike, so standardise them.
      target: features of unlabelled target examples, of shape `(n_t, d)`.
      regularisation: λ > 0; scikit-learn's C is 1 / (λ (n_s + n_t)).
      tolerance: largest distance of the loss from its minimum, measured by the Newton decrement.
      steps: largest number of steps.

    Returns:
      A `DensityRatio`, a function of features.

    Raises:
      ValueError: if features are not finite or differ in dimension, `regularisation` is not positive, or
        `steps` do not suffice.

    Examples:
      >>> import jax
      >>> source = jax.random.normal(jax.random.key(0), (2000, 1))
      >>> target = jax.random.normal(jax.random.key(1), (1000, 1)) + 1
      >>> weights = density_ratio(source, target)(source, self_normalised=True)  # near e^(x − 1/2)
      >>> print(f"{weights.mean():.3f}, of {effective_sample_size(weights):.0f} examples")
      1.000, of 760 examples

    References:
      Sugiyama, Suzuki & Kanamori, Density Ratio Estimation in Machine Learning, 2012, chapter 4.
      Shimodaira, Improving predictive inference under covariate shift, 2000 (the exponent).
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    check_number("regularisation", regularisation, above=0)
    check_number("tolerance", tolerance, 0)
    check_count("steps", steps)
    s, t = _pair(source, target)
    # Centring the features (the bias is the last column) improves the conditioning of the same problem.
    centre = np.concatenate([s, t]).mean(0)
    x = np.concatenate([s, t]) - centre
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    is_target = np.arange(len(x)) >= len(s)
    penalty = np.append(np.full(s.shape[1], regularisation), 0.0)

    def objective(weights: np.ndarray) -> float:
        logits = x @ weights
        return float((np.logaddexp(0, logits) - is_target * logits).mean() + (penalty * weights**2).sum() / 2)

    def gradient(weights: np.ndarray) -> np.ndarray:
        return x.T @ (expit(x @ weights) - is_target) / len(x) + penalty * weights

    def hessian(weights: np.ndarray) -> np.ndarray:
        probs = expit(x @ weights)
        return (x * (probs * (1 - probs))[:, None]).T @ x / len(x) + np.diag(penalty)

    def decrement(weights: np.ndarray) -> float:
        slope = gradient(weights)
        return float(slope @ np.linalg.solve(hessian(weights), slope))

    def stop(weights: np.ndarray) -> None:
        if decrement(weights) <= tolerance:
            raise StopIteration

    weights = np.zeros(x.shape[1])
    # At the minimum the gradient is 0 and gives the trust-region method no direction.
    if decrement(weights) > tolerance:
        options = {"maxiter": steps, "gtol": 0.0, "initial_trust_radius": 10.0, "max_trust_radius": 1e9}
        weights = minimize(
            objective,
            weights,
            method="trust-exact",
            jac=gradient,
            hess=hessian,
            callback=stop,
            options=options,
        ).x
        if decrement(weights) > tolerance:
            raise ArgumentError("steps", f"got {steps}, too few for tolerance {tolerance}; increase either")
    kernel = weights[:-1]
    return DensityRatio(
        jnp.asarray(kernel), jnp.asarray(weights[-1] - kernel @ centre), jnp.asarray(np.log(len(s) / len(t)))
    )


def kernel_mean_matching(
    source: Real[Array | np.ndarray, "n_s d"],
    target: Real[Array | np.ndarray, "n_t d"],
    *,
    bandwidth: float | None = None,
    bound: float = 1000.0,
    slack: float | None = None,
    tolerance: float = 1e-3,
    steps: int = 20_000,
) -> Float[Array, " n_s"]:
    r"""Return the weights of the source examples that bring their kernel mean closest to the target's.

    min_w ‖(1/n_s) Σ_i w_i φ(x_i) − (1/n_t) Σ_j φ(x'_j)‖²  with  0 ≤ w_i ≤ B  and  |mean(w) − 1| ≤ ε,

    where φ(x)·φ(x') = exp(−‖x − x'‖² / (2σ²)): the squared MMD between the weighted source and the target.
    It is minimised by accelerated projected gradients with restarts from w = 1, until the Frank-Wolfe gap
    max_v ∇ᵀ(w − v), over all allowed v, guarantees that the value is within `tolerance` of the minimum.

    The exact minimum fits the sampling error of the two means, of order 1/n_s + 1/n_t, with a small number of
    large weights: a tolerance far below that, like a narrow kernel, makes the weights worse. A small B keeps
    them even. Memory grows as (n_s + n_t)².

    Args:
      source: features of unlabelled source examples, of shape `(n_s, d)`.
      target: features of unlabelled target examples, of shape `(n_t, d)`.
      bandwidth: σ; None for the median distance between the examples of both domains.
      bound: B ≥ 1, the largest weight of an example.
      slack: ε ≥ 0; None for the paper's 1 − 1/√n_s.
      tolerance: largest distance of the squared MMD from its minimum.
      steps: largest number of steps.

    Returns:
      Weights of shape `(n_s,)`.

    Raises:
      ValueError: if features are not finite or differ in dimension, a setting is out of range, or `steps` do
        not suffice.

    Examples:
      >>> import numpy as np
      >>> source, target = np.array([[0.0], [1.0], [2.0]]), np.array([[1.0], [2.0]])
      >>> print(kernel_mean_matching(source, target, bandwidth=0.3, slack=0.0).round(2))
      [0.  1.5 1.5]

    References:
      Huang et al., Correcting Sample Selection Bias by Unlabeled Data, 2006.
    """
    s, t = _pair(source, target)
    n = len(s)
    slack = 1 - n**-0.5 if slack is None else slack
    check_number("bound", bound, 1)
    check_number("slack", slack, 0)
    check_number("tolerance", tolerance, 0)
    check_count("steps", steps)
    from_source = _squared_distances(s, np.concatenate([s, t]))
    if bandwidth is None:
        squared = np.concatenate([from_source, _squared_distances(t, np.concatenate([s, t]))])
        bandwidth = float(np.sqrt(np.median(squared[np.triu_indices(len(squared), 1)])))
        if not bandwidth:
            raise ArgumentError(
                "bandwidth",
                "got None for the median distance between examples, which is 0, because more than half of "
                "the distances are 0; it must be positive: pass a number",
            )
    check_number("bandwidth", bandwidth, above=0)
    kernel = np.exp(-from_source / (2 * bandwidth**2))
    gram, to_target = kernel[:, :n] / n**2, kernel[:, n:].mean(1) / n
    lowest, highest = n * max(1 - slack, 0), n * min(1 + slack, bound)

    def slope(w: np.ndarray) -> np.ndarray:
        return 2 * (gram @ w - to_target)

    def project(v: np.ndarray) -> np.ndarray:
        """Return the closest allowed weights: `v` minus a constant, clipped."""
        total = np.clip(np.clip(v, 0, bound).sum(), lowest, highest)
        low, high = v.min() - bound, v.max()
        for _ in range(64):
            middle = (low + high) / 2
            above = np.clip(v - middle, 0, bound).sum() > total
            low, high = (middle, high) if above else (low, middle)
        return np.clip(v - middle, 0, bound)

    def gap(w: np.ndarray) -> float:
        """Return an upper bound of the distance of the value from the minimum."""
        gradient = slope(w)
        total = np.clip(bound * (gradient < 0).sum(), lowest, highest)
        corner = np.empty(n)
        corner[np.argsort(gradient)] = np.clip(total - bound * np.arange(n), 0, bound)
        return float(gradient @ (w - corner))

    rate = 1 / (2 * gram.sum(1).max())  # the largest row sum is at least the largest eigenvalue
    w = ahead = project(np.ones(n))
    momentum = 1.0
    for step in range(steps):
        if step % 10 == 0 and gap(w) <= tolerance:
            break
        new = project(ahead - rate * slope(ahead))
        if (ahead - new) @ (new - w) > 0:
            momentum = 1.0
        next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / next_momentum * (new - w)
        w, momentum = new, next_momentum
    else:
        raise ArgumentError("steps", f"got {steps}, too few for tolerance {tolerance}; increase either")
    return jnp.asarray(w)


def effective_sample_size(weights: Float[Array | np.ndarray, " n"]) -> Float[Array, ""]:
    r"""Return the effective sample size ESS = (Σ w)² / Σ w².

    It is the number of equally weighted examples with the same variance: n for equal weights, 1 where one
    example has all the weight, and 0 where all weights are 0.

    Args:
      weights: weights of the examples, of shape `(n,)`, at least 0.

    Returns:
      A scalar in [0, n].

    Raises:
      ValueError: if `weights` is empty, not a vector, negative or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(effective_sample_size(jnp.array([1.0, 1.0, 2.0])))
      2.6666667
    """
    check_real("weights", weights)
    weights = jnp.asarray(weights)
    if weights.ndim != 1 or not weights.size:
        raise ArgumentError("weights", f"got shape {weights.shape}; it must be (n,), one for each example")
    check_finite("weights", weights)
    if not isinstance(weights, jax.core.Tracer) and np.min(weights) < 0:
        raise ArgumentError("weights", f"got a smallest weight of {np.min(weights)}; they must be at least 0")
    # Weights of at most 1 keep the squares from overflowing.
    weights = weights / jnp.where(weights.max() > 0, weights.max(), 1)
    squares = jnp.square(weights).sum()
    return jnp.square(weights.sum()) / jnp.where(squares > 0, squares, 1)


def _pair(
    source: host.Values, target: host.Values
) -> tuple[Float[np.ndarray, "s d"], Float[np.ndarray, "t d"]]:
    s, t = host.matrix(source, "source"), host.matrix(target, "target")
    if s.shape[1] != t.shape[1]:
        raise ArgumentError(
            "target", f"got {t.shape[1]} features; source has {s.shape[1]}, and the numbers must be equal"
        )
    return s, t


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None]
    return np.maximum(norms - 2 * a @ b.T, 0)
