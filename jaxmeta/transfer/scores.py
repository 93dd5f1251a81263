"""Transferability scores: estimates, without training, of how well a source model transfers to a target task.

For all four, higher is better. NCE and LEEP use only the classes that a source model assigns to the target
examples; H-score and LogME use its features. The scores rank source models for one target set; their values
are not comparable across target sets.

All are computed in float64 on the host; see `jaxmeta.transfer.host`. Classes without examples are ignored, so
that labels need not be consecutive.
"""

from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from jaxmeta.checks import ArgumentError, check_number, check_word
from jaxmeta.transfer import host

Shrinkage: TypeAlias = float | Literal["ledoit-wolf"] | None
# Search grid of ln(α/β): its step, and its margin beyond the eigenvalues, where the evidence is constant.
_STEP, _MARGIN = 0.5, 28.0
# A residual below float32's precision is rounding error and carries no information about the noise.
_PRECISION = float(np.finfo(np.float32).eps)


def nce(source_labels: Int[Array | np.ndarray, " n"], labels: Int[Array | np.ndarray, " n"]) -> float:
    r"""Return the negative conditional entropy (NCE) of target labels given source classes, in nats.

    NCE = −H(Y|Z) = Σ_{z,y} P̂(y,z) ln P̂(y|z)

    lies in [−H(Y), 0]: 0 if z determines y, −H(Y) if they are independent.

    Args:
      source_labels: z, the source class that the source model assigns to each target example, such as
        `source_probs.argmax(-1)`.
      labels: y, the target class of each example.

    Raises:
      ValueError: if labels are floats, negative or of one class only, or the lengths differ.

    Examples:
      >>> import numpy as np
      >>> print(f"{nce(np.array([0, 0, 1, 0]), np.array([0, 0, 1, 1])):.6f}")
      -0.477386

    References:
      Tran, Nguyen & Hassner, Transferability and Hardness of Supervised Classification Tasks, 2019.
    """
    z = host.numbers(source_labels, "source_labels")
    z = host.labels(z, "source_labels", rows=z.size)
    joint = _one_hot(z).T @ _one_hot(_classes(labels, rows=len(z))) / len(z)
    given_z = joint / joint.sum(1, keepdims=True)
    return float((joint * np.log(np.where(joint > 0, given_z, 1))).sum())


def leep(source_probs: Float[Array | np.ndarray, "n source"], labels: Int[Array | np.ndarray, " n"]) -> float:
    r"""Return the log expected empirical prediction (LEEP), in nats.

    P̂(y,z) = (1/n) Σ_{i: y_i=y} Θ_{iz},  P̂(y|z) = P̂(y,z) / P̂(z),
    LEEP = (1/n) Σ_i ln Σ_z P̂(y_i|z) Θ_{iz} ≤ 0,

    the mean log-likelihood of a classifier that draws a source class z from the source model, then y from
    P̂(y|z). It equals NCE if Θ is one-hot, and −H(Y) if Θ is the same for all examples.

    Args:
      source_probs: Θ, the source model's probabilities of the source classes for each target example.
      labels: y, the target class of each example.

    Raises:
      ValueError: if a row is not a distribution, labels are floats, negative or of one class only, or the
        lengths differ.

    Examples:
      >>> import numpy as np
      >>> source_probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8]])
      >>> print(f"{leep(source_probs, np.array([0, 0, 1, 1])):.6f}")
      -0.383981

    References:
      Nguyen et al., LEEP: A New Measure to Evaluate Transferability of Learned Representations, 2020.
    """
    probs = host.probabilities(source_probs, "source_probs")
    one_hot = _one_hot(_classes(labels, rows=len(probs)))
    joint = one_hot.T @ probs
    # A source class of probability 0 in all examples does not contribute to the sum.
    given_z = joint / np.where(joint.any(0), joint.sum(0), 1)
    return float(np.log((one_hot @ given_z * probs).sum(1)).mean())


def h_score(
    features: Real[Array | np.ndarray, "n d"],
    labels: Int[Array | np.ndarray, " n"],
    *,
    shrinkage: Shrinkage = None,
) -> float:
    r"""Return the H-score, the between-class part of the whitened features' variance.

    H = tr(cov(F)⁺ cov(E[F|Y])), or with shrinkage λ  (1−λ) tr(((1−λ) S + λ tr(S)/d I)⁻¹ cov(E[F|Y])),

    where row i of E[F|Y] is the mean feature of class y_i and S = cov(F). It is at most min(d, classes − 1),
    invariant under invertible affine maps of the features, and equal to the rank of cov(F) if features do not
    vary within classes.

    For n ≤ d + 1, features in general position separate all classes, and H is classes − 1 for every source:
    use shrinkage then.

    Both covariances have the same normalisation, which cancels; the released regularised version divides one
    by n and the other by n − 1, and is larger by n/(n − 1).

    Args:
      features: F, the features of the source model's body for each target example.
      labels: y, the target class of each example.
      shrinkage: λ in [0, 1), "ledoit-wolf" for the estimate by Ledoit and Wolf, or None for no shrinkage.

    Raises:
      ValueError: if features are not finite, labels are floats, negative or of one class only, the lengths
        differ, or `shrinkage` has another value.

    Examples:
      >>> import numpy as np
      >>> features = np.array([[0.0], [2.0], [4.0], [6.0]])
      >>> print(f"{h_score(features, np.array([0, 0, 1, 1])):.3f}")
      0.800

    References:
      Bao et al., An Information-Theoretic Approach to Transferability in Task Transfer Learning, 2019.
      Ibrahim et al., Newer is not always better: Rethinking transferability metrics, 2021 (shrinkage).
      Ledoit & Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004.
    """
    if isinstance(shrinkage, str):
        check_word("shrinkage", shrinkage, ("ledoit-wolf",))
    elif shrinkage is not None:
        check_number("shrinkage", shrinkage, 0)
        if shrinkage >= 1:
            raise ArgumentError("shrinkage", f"got {shrinkage}; it must be at least 0 and below 1")
    f = host.matrix(features, "features")
    n, d = f.shape
    one_hot = _one_hot(_classes(labels, rows=n))
    centred = f - f.mean(0)
    u, s = _decomposed(centred, _noise(features))
    # Work in the basis of the singular vectors, in which cov(F) is diagonal.
    between = (np.square(one_hot.T @ u) / one_hot.sum(0)[:, None]).sum(0)
    variances, mean_variance = np.square(s) / n, np.square(s).sum() / n / d
    if shrinkage is None:
        lam = 0.0
    elif isinstance(shrinkage, str):
        lam = _ledoit_wolf(centred, variances, mean_variance)
    else:
        lam = float(shrinkage)
    return float((between * (1 - lam) * variances / ((1 - lam) * variances + lam * mean_variance)).sum())


def log_me(
    features: Real[Array | np.ndarray, "n d"],
    labels: Int[Array | np.ndarray, " n"]
    | Float[Array | np.ndarray, " n"]
    | Float[Array | np.ndarray, "n k"],
) -> float:
    r"""Return the log maximum evidence (LogME) of a Bayesian linear model of the labels, in nats per example.

    For each class c with target vector y ∈ {0,1}ⁿ, y = F w + ε, w ~ N(0, α⁻¹ I_d), ε ~ N(0, β⁻¹ I_n): the
    evidence ln p(y|F) is maximised over α and β, divided by n, and averaged over the classes. See
    `maximal_evidence`, which is also exact for d > n: there, the published fast version keeps (d/2) ln α next
    to a log-determinant of only n terms, with an error of ((d − n)/2) ln α.

    As in the paper, the model has no intercept and one noise level for all examples; add a constant feature
    for an intercept.

    Args:
      features: F, the features of the source model's body for each target example.
      labels: y, the target class of each example; or float regression targets, for which the score depends on
        their unit.

    Raises:
      ValueError: if features are not finite, labels are negative or of one class only, the lengths differ, or
        a regression target is 0 for all examples.

    Examples:
      >>> import numpy as np
      >>> print(f"{log_me(np.array([[1.0], [2.0], [3.0]]), np.array([1.0, 2.0, 2.5])):.6f}")
      -0.784652

    References:
      You et al., LogME: Practical Assessment of Pre-trained Models for Transfer Learning, 2021.
    """
    targets = host.numbers(labels, "labels")
    if jnp.issubdtype(targets.dtype, jnp.integer):
        targets = _one_hot(_classes(targets, rows=len(host.matrix(features, "features"))))
    elif targets.ndim == 1:
        targets = targets[:, None]
    return float(maximal_evidence(features, targets).log_evidence.mean() / len(features))


class Evidence(NamedTuple):
    """The maximal evidence of Bayesian linear models, one for each target.

    Attributes:
      log_evidence: ln p(y|F) at its maximum, in nats.
      alpha: precision of the weights at the maximum; unbounded if the features are uninformative.
      beta: precision of the noise at the maximum.
    """

    log_evidence: Float[np.ndarray, " k"]
    alpha: Float[np.ndarray, " k"]
    beta: Float[np.ndarray, " k"]


def maximal_evidence(
    features: Real[Array | np.ndarray, "n d"], targets: Float[Array | np.ndarray, "n k"]
) -> Evidence:
    r"""Return the evidence of y = F w + ε, maximised over the precisions α of w and β of ε.

    𝓛 = (d/2) ln α + (n/2) ln β − ½ ln|A| − (β/2) ‖y − F m‖² − (α/2) mᵀm − (n/2) ln 2π,
    A = α I + β FᵀF,  m = β A⁻¹ Fᵀ y,

    which is ln N(y; 0, β⁻¹ I + α⁻¹ F Fᵀ). With t = α/β, the best β for a given t is n/Q(t), where
    Q(t) = ‖y − F m‖² + t mᵀm, which leaves a function of t alone. Its maximum is found on a grid of ln t,
    then by bisection of its slope to full precision. The paper instead iterates α ← γ/(mᵀm),
    β ← (n − γ)/‖y − F m‖², whose fixed points are the stationary points of 𝓛 and so include this one.

    Two cases are limits: α and t grow without bound if the features are uninformative, and t falls to 0 if
    they fit all targets with as many independent features as examples; 𝓛 is constant there, and the search
    stops e^28 ≈ 10¹² beyond the eigenvalues of FᵀF. If fewer features than examples leave no residual, 𝓛 has
    no maximum (β → ∞): the residual is then set to float32's precision, 1.2e-7 of ‖y‖, and the score is large
    and finite.

    Args:
      features: F, of shape `(n, d)`.
      targets: y, one target in each column, of shape `(n, k)`.

    Raises:
      ValueError: if numbers are not finite, the lengths differ, or a target is 0 for all examples.

    References:
      MacKay, Bayesian Interpolation, 1992.
      You et al., LogME: Practical Assessment of Pre-trained Models for Transfer Learning, 2021.
    """
    f, y = host.matrix(features, "features"), host.matrix(targets, "targets")
    if len(f) != len(y):
        raise ArgumentError(
            "targets", f"got {len(y)} rows; features have {len(f)}, and the numbers must be equal"
        )
    if not y.any(0).all():
        raise ArgumentError("targets", "got a column of zeros, which every model fits exactly; leave it out")
    n = len(y)
    u, s = _decomposed(f, _noise(features))
    eigenvalues, projections = np.square(s), u.T @ y
    along = np.square(projections).T
    if len(s) < n:
        floor = np.square(_PRECISION) * np.square(y).sum(0)
        across = np.maximum(np.square(y - u @ projections).sum(0), floor)
    else:
        across = np.zeros(y.shape[1])

    def evidence(log_determinant: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (log_determinant - n * (np.log(2 * np.pi * q / n) + 1)) / 2

    ends = np.log([eigenvalues.min(initial=1.0), eigenvalues.max(initial=1.0)])
    grid = np.arange(ends[0] - _MARGIN, ends[1] + _MARGIN, _STEP)
    t = np.exp(grid)[:, None]
    remaining = t / (t + eigenvalues)
    values = evidence(np.log(remaining).sum(1), along @ remaining.T + across[:, None])
    best = values.argmax(1)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]
    for _ in range(60):
        middle = (low + high) / 2
        t = np.exp(middle)[:, None]
        remaining, taken = t / (t + eigenvalues), eigenvalues / (t + eigenvalues)
        q = (along * remaining).sum(1) + across
        # d𝓛/d ln t = (γ − n t mᵀm / Q) / 2, with γ the effective number of parameters.
        rising = taken.sum(1) * q > n * (along * remaining * taken).sum(1)
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
    beta = n / q
    return Evidence(evidence(np.log(remaining).sum(1), q), beta * t[:, 0], beta)


def _classes(labels: host.Values, *, rows: int) -> np.ndarray:
    y = host.labels(labels, "labels", rows=rows)
    if (y == y[0]).all():
        raise ArgumentError("labels", f"all {rows} are of class {y[0]}; there must be at least two classes")
    return y


def _one_hot(labels: np.ndarray) -> np.ndarray:
    present, indices = np.unique(labels, return_inverse=True)
    return np.eye(len(present))[indices]


def _decomposed(f: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the left singular vectors and singular values of `f` above `noise`."""
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    return u[:, s > noise], s[s > noise]


def _noise(features: host.Values) -> float:
    """Return an upper bound of the rounding error in a singular value of zero.

    Rounding errors of the features' dtype are a random matrix of norm eps (√n + √d) for entries of unit size;
    a factor of four allows for those of the network's own sums. The decomposition adds its own.
    """
    f = np.asarray(features)
    eps = float(jnp.finfo(f.dtype if jnp.issubdtype(f.dtype, jnp.floating) else jnp.float64).eps)
    spread = 4 * eps * (f.shape[0] ** -0.5 + f.shape[1] ** -0.5) + 8 * np.finfo(np.float64).eps
    return float(spread * np.linalg.norm(f.astype(np.float64)))


def _ledoit_wolf(centred: np.ndarray, variances: np.ndarray, mean_variance: float) -> float:
    """Return Ledoit and Wolf's λ of least expected squared error; `variances` are the eigenvalues of S."""
    n, d = centred.shape
    total = np.square(variances).sum()
    distance = total / d - mean_variance**2
    if distance <= 0:
        return 0.0
    error = (np.square(np.square(centred).sum(1)).sum() / n - total) / n / d
    return float(min(error / distance, 1))
