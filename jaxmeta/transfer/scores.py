"""Transferability scores: which source model will do best on a target task, told without training.

Of all four, higher is better. NCE and LEEP see only the classes that a source model assigns to the target
examples; H-score and LogME see its features. They rank source models for one target set; what they are in
themselves, and across target sets, says little.

All are computed in float64 on the host; see `jaxmeta.transfer.host`. Classes that do not occur count for
nothing, so that labels need not be consecutive.
"""

from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from jaxmeta.checks import ArgumentError, check_number, check_word
from jaxmeta.transfer import host

Shrinkage: TypeAlias = float | Literal["ledoit-wolf"] | None
# Of ln(α/β): step of the search and how far beyond the eigenvalues it looks, where evidence is level.
_STEP, _MARGIN = 0.5, 28.0
# A residual below float32's precision says nothing about the noise.
_PRECISION = float(np.finfo(np.float32).eps)


def nce(source_labels: Int[Array | np.ndarray, " n"], labels: Int[Array | np.ndarray, " n"]) -> float:
    r"""Negative conditional entropy of the target labels given the source model's, in nats.

    NCE = −H(Y|Z) = Σ_{z,y} P̂(y,z) ln P̂(y|z)

    lies in [−H(Y), 0]: 0 where z determines y, −H(Y) where it says nothing.

    Args:
      source_labels: z, the class of the source task that the source model gives each target example,
        `source_probs.argmax(-1)`.
      labels: y, the target class of each.

    Raises:
      ValueError: float labels, negative ones, lengths that differ, a single target class.

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
    r"""Log expected empirical prediction, in nats.

    P̂(y,z) = (1/n) Σ_{i: y_i=y} Θ_{iz},  P̂(y|z) = P̂(y,z) / P̂(z),  LEEP = (1/n) Σ_i ln Σ_z P̂(y_i|z) Θ_{iz} ≤ 0:

    the mean log-likelihood of a classifier that draws a source class z from the source model, then y from
    P̂(y|z). NCE where Θ is one-hot; −H(Y) where Θ is the same for all examples.

    Args:
      source_probs: Θ, the source model's probabilities of its own classes for each target example.
      labels: y, the target class of each.

    Raises:
      ValueError: rows that are no distributions, float labels, negative ones, lengths that differ, a single
        target class.

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
    # A source class that no example is given has no weight in the sum either.
    given_z = joint / np.where(joint.any(0), joint.sum(0), 1)
    return float(np.log((one_hot @ given_z * probs).sum(1)).mean())


def h_score(
    features: Real[Array | np.ndarray, "n d"],
    labels: Int[Array | np.ndarray, " n"],
    *,
    shrinkage: Shrinkage = None,
) -> float:
    r"""How much of the features' variance, whitened, lies between the classes.

    H = tr(cov(F)⁺ cov(E[F|Y])), or with shrinkage λ  (1−λ) tr(((1−λ) S + λ tr(S)/d I)⁻¹ cov(E[F|Y])),

    where row i of E[F|Y] is the mean feature of class y_i and S = cov(F). It is at most min(d, classes − 1),
    does not change under invertible affine maps of the features, and equals the rank of cov(F) where the
    features of a class are all the same.

    With n ≤ d + 1 any features in general position separate any classes, and H is classes − 1 whatever the
    source: shrink then.

    Args:
      features: F, of the source model's body for each target example.
      labels: y, the target class of each.
      shrinkage: λ in [0, 1), "ledoit-wolf" for Ledoit and Wolf's estimate, or None for none.

    Both covariances have the same normalisation, which then drops out; the released regularised version
    divides one by n and the other by n − 1, and is larger by n/(n − 1).

    Raises:
      ValueError: features that are not finite, float labels, negative ones, lengths that differ, a single
        class; a `shrinkage` that is none of the above.

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
    # In the basis of the singular vectors, where cov(F) is diagonal.
    between = (np.square(one_hot.T @ u) / one_hot.sum(0)[:, None]).sum(0)
    variances, mean_variance = np.square(s) / n, np.square(s).sum() / n / d
    if shrinkage is None:
        kept = 0.0
    elif isinstance(shrinkage, str):
        kept = _ledoit_wolf(centred, variances, mean_variance)
    else:
        kept = float(shrinkage)
    return float((between * (1 - kept) * variances / ((1 - kept) * variances + kept * mean_variance)).sum())


def log_me(
    features: Real[Array | np.ndarray, "n d"],
    labels: Int[Array | np.ndarray, " n"]
    | Float[Array | np.ndarray, " n"]
    | Float[Array | np.ndarray, "n k"],
) -> float:
    r"""Log maximum evidence of a Bayesian linear model of the labels on the features, a nat an example.

    For each class c with target vector y ∈ {0,1}ⁿ, y = F w + ε, w ~ N(0, α⁻¹ I_d), ε ~ N(0, β⁻¹ I_n): the
    evidence ln p(y|F) is maximised over α and β, divided by n, and averaged over the classes. See
    `maximal_evidence`, which is exact where d > n too: the published fast version keeps (d/2) ln α next to a
    log-determinant of only n terms there, and is off by ((d − n)/2) ln α.

    The model has no intercept and one noise level for all examples, as in the paper: add a constant feature
    for the first.

    Args:
      features: F, of the source model's body for each target example.
      labels: y, the target class of each; or float regression targets, of which the evidence, and so the
        score, depends on the unit.

    Raises:
      ValueError: features that are not finite, negative labels, lengths that differ, a single class, a
        regression target that is 0 for all examples.

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
    """Of Bayesian linear models, one a target.

    Attributes:
      log_evidence: ln p(y|F) at its maximum, in nats.
      alpha: precision of the weights there: without bound where the features say nothing.
      beta: precision of the noise there.
    """

    log_evidence: Float[np.ndarray, " k"]
    alpha: Float[np.ndarray, " k"]
    beta: Float[np.ndarray, " k"]


def maximal_evidence(
    features: Real[Array | np.ndarray, "n d"], targets: Float[Array | np.ndarray, "n k"]
) -> Evidence:
    r"""The largest evidence of y = F w + ε over the precisions α of w and β of ε, for each column y.

    𝓛 = (d/2) ln α + (n/2) ln β − ½ ln|A| − (β/2) ‖y − F m‖² − (α/2) mᵀm − (n/2) ln 2π,
    A = α I + β FᵀF,  m = β A⁻¹ Fᵀ y,

    which is ln N(y; 0, β⁻¹ I + α⁻¹ F Fᵀ). With t = α/β, the best β for a given t is n/Q(t), where
    Q(t) = ‖y − F m‖² + t mᵀm; what is left is a function of t alone. Its maximum is found on a grid of ln t
    and then by bisection of its slope, to the last digits. The paper iterates α ← γ/(mᵀm),
    β ← (n − γ)/‖y − F m‖² instead, whose fixed points are the stationary points of 𝓛 and so include this one.

    Two ends are limits: α and t grow without bound where the features say nothing, and t falls to 0 where
    they explain every number, with as many independent features as examples; 𝓛 is level there, and α/β is
    e^28 ≈ 10¹² beyond the eigenvalues of FᵀF. Where fewer features than examples leave no residual, 𝓛 has no
    maximum (β → ∞): the residual is then counted as float32's precision, 1.2e-7 of ‖y‖, and the score is
    large and finite.

    Args:
      features: F.
      targets: y, one a column.

    Raises:
      ValueError: numbers that are not finite, lengths that differ, a target that is 0 for all examples.

    References:
      MacKay, Bayesian Interpolation, 1992.
      You et al., LogME: Practical Assessment of Pre-trained Models for Transfer Learning, 2021.
    """
    f, y = host.matrix(features, "features"), host.matrix(targets, "targets")
    if len(f) != len(y):
        raise ArgumentError("targets", f"got {len(y)} rows for {len(f)} of features; they must agree")
    if not y.any(0).all():
        raise ArgumentError("targets", "got a column of zeros, of which every model is certain; leave it out")
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
        raise ArgumentError(
            "labels", f"all {rows} are of class {y[0]}; a score compares at least two classes"
        )
    return y


def _one_hot(labels: np.ndarray) -> np.ndarray:
    present, of = np.unique(labels, return_inverse=True)
    return np.eye(len(present))[of]


def _decomposed(f: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors and singular values of `f`, of those above `noise`."""
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    return u[:, s > noise], s[s > noise]


def _noise(features: host.Values) -> float:
    """What rounding makes of a singular value of zero.

    Rounding errors of the features' dtype are a random matrix of norm eps (√n + √d) a unit of size; four
    times that leaves room for those of the network's own sums. The decomposition adds its own.
    """
    f = np.asarray(features)
    eps = float(jnp.finfo(f.dtype if jnp.issubdtype(f.dtype, jnp.floating) else jnp.float64).eps)
    spread = 4 * eps * (f.shape[0] ** -0.5 + f.shape[1] ** -0.5) + 8 * np.finfo(np.float64).eps
    return float(spread * np.linalg.norm(f.astype(np.float64)))


def _ledoit_wolf(centred: np.ndarray, variances: np.ndarray, mean_variance: float) -> float:
    """Ledoit and Wolf's λ, the best in expected squared error; `variances` are the eigenvalues of S."""
    n, d = centred.shape
    total = np.square(variances).sum()
    distance = total / d - mean_variance**2
    if distance <= 0:
        return 0.0
    error = (np.square(np.square(centred).sum(1)).sum() / n - total) / n / d
    return float(min(error / distance, 1))
