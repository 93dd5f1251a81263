"""Estimation and correction of label shift, where P(Y) changes and P(X|Y) stays the same.

If P(Y) changes and P(X|Y) does not, then P_t(y|x) ∝ w_y P_s(y|x) with w_y = P_t(y) / P_s(y), and w can be
estimated from unlabelled target examples: by BBSE or RLLS from the predictions of any fixed classifier, or
by EM from calibrated probabilities. Then either correct the predictions with `adjust`, or train again with
source losses weighted by `weights[y]`.

More is not possible without target labels. Another change of P(Y|X), where the same x has another class,
leaves no trace in unlabelled target examples, and where P(X|Y) changes too, these estimates are wrong without
a warning: label some target examples and fine-tune.

Estimates are computed in float64 on the host (see `jaxmeta.transfer.host`) and returned as JAX arrays;
`adjust` is a JAX function that can be compiled.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from jaxmeta.checks import ArgumentError, check_count, check_number, check_real
from jaxmeta.transfer import host


def joint_confusion(
    predictions: Int[Array | np.ndarray, " n"] | Float[Array | np.ndarray, "n classes"],
    labels: Int[Array | np.ndarray, " n"],
    classes: int,
) -> Float[Array, "classes classes"]:
    r"""Return the joint distribution Ĉ[i, j] = P̂_s(ŷ = i, y = j) of predictions and labels.

    Args:
      predictions: predictions ŷ for labelled source examples that the classifier was not trained on: classes
        of shape `(n,)`, or, for the soft variant, probabilities of shape `(n, classes)`, which are averaged
        in place of indicators.
      labels: classes y of the same examples, of shape `(n,)`.
      classes: number of classes.

    Returns:
      The joint distribution (not the conditional one) of shape `(classes, classes)`.

    Raises:
      ValueError: if a class is out of range, a row is not a distribution, or the lengths differ.

    Examples:
      >>> import numpy as np
      >>> print(joint_confusion(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]), 2))
      [[0.5  0.  ]
       [0.25 0.25]]
    """
    check_count("classes", classes)
    predicted = _as_distributions(predictions, "predictions", classes)
    one_hot = np.eye(classes)[host.labels(labels, "labels", rows=len(predicted), classes=classes)]
    return jnp.asarray(predicted.T @ one_hot / len(predicted))


def bbse(
    joint_confusion: Float[Array | np.ndarray, "classes classes"],
    target_predictions: Real[Array | np.ndarray, " m"] | Float[Array | np.ndarray, "m classes"],
    *,
    clip: bool = True,
    rescale: bool = False,
    max_condition: float = 1e4,
) -> Float[Array, " classes"]:
    r"""Estimate class weights by black box shift estimation, w = Ĉ⁻¹ μ̂ with μ̂_i = P̂_t(ŷ = i).

    The classifier need be neither accurate nor calibrated; Ĉ must be invertible. Σ_j w_j P_s(y=j) = 1 before
    clipping.

    Args:
      joint_confusion: Ĉ of held-out source examples, from `joint_confusion`.
      target_predictions: predictions of the same classifier for the target, hard or soft as in Ĉ: integers
        `(m,)` are the classes of m examples, floats `(m, classes)` their probabilities, and floats
        `(classes,)` with sum 1 are μ̂ itself.
      clip: whether to set negative weights, which are sampling error, to 0.
      rescale: whether to divide by Σ_j w_j P_s(y=j), which clipping raises above 1.
      max_condition: largest allowed condition number of P̂_s(ŷ|y), the factor by which sampling errors can
        grow.

    Returns:
      Weights of shape `(classes,)`.

    Raises:
      ValueError: if the confusion matrix does not hold joint frequencies, is nearly singular, or has a class
        without source examples; if the target predictions have none of these three forms.

    Examples:
      >>> import numpy as np
      >>> confusion = np.array([[0.45, 0.1], [0.05, 0.4]])
      >>> print(bbse(confusion, np.array([0.34, 0.66])))
      [0.4 1.6]

    References:
      Lipton, Wang & Smola, Detecting and Correcting for Label Shift with Black Box Predictors, 2018.
    """
    check_number("max_condition", max_condition, 1)
    confusion, source_prior, mu = _checked(joint_confusion, target_predictions)
    # The condition number of the conditional distribution does not grow with rare classes alone.
    conditional = confusion / source_prior
    condition = np.linalg.cond(conditional)
    if not condition <= max_condition:
        raise ArgumentError(
            "joint_confusion",
            f"the condition number of P(ŷ|y) is {condition:.3g}, above {max_condition:.3g}: "
            "the classifier cannot tell some classes apart, so that its predictions do not determine their "
            "frequencies; use rlls, or merge those classes",
        )
    return _clip_and_rescale(np.linalg.solve(conditional, mu) / source_prior, source_prior, clip, rescale)


def rlls(
    joint_confusion: Float[Array | np.ndarray, "classes classes"],
    target_predictions: Real[Array | np.ndarray, " m"] | Float[Array | np.ndarray, "m classes"],
    *,
    penalty: float,
    shrink: float = 1.0,
    clip: bool = True,
    rescale: bool = False,
) -> Float[Array, " classes"]:
    r"""Estimate class weights by regularised learning under label shift, shrunk towards 1 (no shift).

    w = 1 + λ θ,  θ = argmin ‖Ĉ θ − (μ̂ − Ĉ 1)‖₂ + Δ ‖θ‖₂,

    which exists and is stable for a singular Ĉ too. Neither norm is squared. A minimiser with a residual
    r ≠ 0 and θ ≠ 0 is a ridge solution, (ĈᵀĈ + ρ I) θ = Ĉᵀ b with ρ = Δ ‖r‖ / ‖θ‖, where ρ is found by
    bisection; ρ → 0 is BBSE and ρ → ∞ is θ = 0, and each of the two can be the exact solution.

    Args:
      joint_confusion: Ĉ of held-out source examples, from `joint_confusion`.
      target_predictions: predictions of the same classifier for the target; see `bbse`.
      penalty: Δ > 0, of the size of the sampling error of Ĉ. The released code uses 0.03 (2 L / (3 n) +
        √(2 L / n)) with L = ln(40 classes) for n held-out source examples.
      shrink: λ in [0, 1]; below 1 for small numbers of target examples.
      clip: whether to set negative weights to 0. The released code instead constrains θ ≥ −1.
      rescale: whether to divide by Σ_j w_j P_s(y=j).

    Returns:
      Weights of shape `(classes,)`.

    Raises:
      ValueError: as in `bbse`, except that Ĉ may be singular; if `penalty` is not positive or `shrink` is
        outside [0, 1].

    Examples:
      >>> import numpy as np
      >>> confusion = np.array([[0.45, 0.1], [0.05, 0.4]])
      >>> for penalty in 0.1, 0.35, 0.4:
      ...     weights = rlls(confusion, np.array([0.34, 0.66]), penalty=penalty)
      ...     print(" ".join(f"{w:.3f}" for w in weights))
      0.400 1.600
      0.739 1.232
      1.000 1.000

    References:
      Azizzadenesheli et al., Regularized Learning for Domain Adaptation under Label Shifts, 2019.
    """
    check_number("penalty", penalty, above=0)
    check_number("shrink", shrink, 0, 1)
    confusion, source_prior, mu = _checked(joint_confusion, target_predictions)
    u, s, vt = np.linalg.svd(confusion)
    along = u.T @ (mu - confusion.sum(1))

    def excess(rho: float) -> float:
        # (ρ² ‖θ‖² − Δ² ‖r‖²) / ρ², which changes its sign once.
        return float((np.square(along / (np.square(s) + rho)) * (np.square(s) - penalty**2)).sum())

    low, high = np.log(1e-40), np.log(1e40)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(np.exp(middle)) > 0 else (middle, high)
    theta = vt.T @ (s * along / (np.square(s) + np.exp(middle)))
    return _clip_and_rescale(1 + shrink * theta, source_prior, clip, rescale)


class Prior(NamedTuple):
    """Class proportions estimated by EM.

    Attributes:
      target_prior: P_t(y), of shape `(classes,)`.
      steps: number of steps taken; the allowed number if it did not converge.
    """

    target_prior: Float[Array, " classes"]
    steps: int


def em_prior(
    probs: Float[Array | np.ndarray, "m classes"],
    source_prior: Float[Array | np.ndarray, " classes"],
    *,
    tolerance: float = 1e-8,
    steps: int = 10_000,
) -> Prior:
    r"""Estimate the target's class proportions by maximum likelihood with EM.

    Starting from π = P_s(y), it iterates  q_i(y) ∝ π(y) / P_s(y) · P_s(y|x_i),  π ← mean_i q_i.

    Each step increases (1/m) Σ_i ln Σ_y π(y) / P_s(y) · P_s(y|x_i), a concave function of π. The class
    weights are `target_prior / source_prior`. EM is more accurate than BBSE if P_s(y|x) is calibrated, and
    biased otherwise: calibrate first, with `temperature`.

    Args:
      probs: P_s(y|x_i), the source model's calibrated probabilities for unlabelled target examples, of shape
        `(m, classes)`.
      source_prior: P_s(y), the class proportions of the training data, of shape `(classes,)`.
      tolerance: largest change of a proportion in the last step.
      steps: largest number of steps.

    Returns:
      A `Prior`: the target's class proportions and the number of steps taken.

    Raises:
      ValueError: if a row is not a distribution, a class has a source prior of 0, `steps` is below 1, or
        `tolerance` is negative.

    Examples:
      >>> import numpy as np
      >>> probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.2, 0.8]])
      >>> target_prior, steps = em_prior(probs, np.array([0.5, 0.5]))
      >>> print(target_prior.round(4))
      [0.9687 0.0313]

    References:
      Saerens, Latinne & Decaestecker, Adjusting the Outputs of a Classifier to New a Priori Probabilities,
      2002.
      Alexandari, Kundaje & Shrikumar, Maximum Likelihood with Bias-Corrected Calibration is Hard-To-Beat at
      Label Shift Adaptation, 2020.
    """
    check_count("steps", steps)
    check_number("tolerance", tolerance, 0)
    posterior = host.probabilities(probs, "probs")
    start = host.distribution(source_prior, "source_prior", posterior.shape[1])
    if not start.all():
        raise ArgumentError("source_prior", f"got 0 for class {start.argmin()}; it must be above 0")
    likelihood = posterior / start
    prior = start
    count, change = 0, np.inf
    while count < steps and change > tolerance:
        joint = prior * likelihood
        previous, prior = prior, (joint / joint.sum(1, keepdims=True)).mean(0)
        count, change = count + 1, np.abs(prior - previous).max()
    return Prior(jnp.asarray(prior), count)


def adjust(
    probs: Float[Array | np.ndarray, "*n classes"], weights: Float[Array | np.ndarray, " classes"]
) -> Float[Array, "*n classes"]:
    r"""Correct probabilities for label shift: P_t(y|x) = w_y P_s(y|x) / Σ_y' w_y' P_s(y'|x).

    A row in which every class of positive probability has weight 0 is returned unchanged, which is the limit
    of equally small weights.

    Args:
      probs: P_s(y|x), of shape `(…, classes)`.
      weights: w ≥ 0, of shape `(classes,)`.

    Returns:
      P_t(y|x), of the shape of `probs`.

    Raises:
      ValueError: if there is not one weight for each class.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(adjust(jnp.array([[0.8, 0.2]]), jnp.array([0.4, 1.6])))
      [[0.5 0.5]]
    """
    check_real("probs", probs)
    check_real("weights", weights)
    probs, weights = jnp.asarray(probs), jnp.asarray(weights)
    if not probs.ndim or weights.shape != probs.shape[-1:]:
        raise ArgumentError(
            "weights", f"got shape {weights.shape} for probs of shape {probs.shape}; pass one for each class"
        )
    weighted = probs * weights.astype(probs.dtype).reshape((1,) * (probs.ndim - 1) + (-1,))
    total = weighted.sum(-1, keepdims=True)
    return jnp.where(total > 0, weighted / jnp.where(total > 0, total, 1), probs)


def temperature(
    logits: Float[Array | np.ndarray, "n classes"], labels: Int[Array | np.ndarray, " n"]
) -> float:
    r"""Return the temperature T at which softmax(logits / T) has the largest likelihood on held-out examples.

    The likelihood is concave in 1/T; its slope is bisected for T from 0.01 to 100. One of these bounds is
    returned if the likelihood has no maximum between them: 0.01 where every example is classified correctly.

    Args:
      logits: logits of source examples that the model was not trained on, of shape `(n, classes)`.
      labels: classes of the examples, of shape `(n,)`.

    Raises:
      ValueError: if the logits are not finite, a class is out of range, or the lengths differ.

    Examples:
      >>> import numpy as np
      >>> logits = np.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
      >>> print(f"{temperature(logits, np.array([0, 0, 0, 1])):.4f}")  # 4 / ln 3
      3.6410

    References:
      Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    z = host.matrix(logits, "logits")
    y = host.labels(labels, "labels", rows=len(z), classes=z.shape[1])
    z = z - z.max(1, keepdims=True)
    of_labels = z[np.arange(len(z)), y].mean()
    low, high = np.log(0.01), np.log(100.0)
    for _ in range(60):
        middle = (low + high) / 2
        probs = np.exp(z / np.exp(middle))
        expected = ((probs * z).sum(1) / probs.sum(1)).mean()
        low, high = (low, middle) if expected <= of_labels else (middle, high)
    return float(np.exp(middle))


def _as_distributions(predictions: host.Values, name: str, classes: int) -> Float[np.ndarray, "n classes"]:
    """Return hard or soft predictions as one distribution for each example."""
    array = host.numbers(predictions, name)
    if array.ndim != 2:
        return np.eye(classes)[host.labels(array, name, rows=array.size, classes=classes)]
    if array.shape[1] != classes:
        raise ArgumentError(name, f"got {array.shape[1]} columns; pass one for each of the {classes} classes")
    return host.probabilities(array, name)


def _checked(
    joint_confusion: host.Values, target_predictions: host.Values
) -> tuple[Float[np.ndarray, "c c"], Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """Return Ĉ, P_s(y) and μ̂."""
    confusion = host.matrix(joint_confusion, "joint_confusion")
    classes = len(confusion)
    if confusion.shape != (classes, classes):
        raise ArgumentError("joint_confusion", f"got shape {confusion.shape}; it must be (classes, classes)")
    confusion = host.probabilities(confusion.reshape(1, -1), "joint_confusion").reshape(classes, classes)
    source_prior = confusion.sum(0)
    if not source_prior.all():
        raise ArgumentError(
            "joint_confusion",
            f"class {source_prior.argmin()} has no labelled source examples, so that its frequency in the "
            "target cannot be estimated; leave it out, or add examples",
        )
    predictions = host.numbers(target_predictions, "target_predictions")
    if predictions.ndim == 1 and not jnp.issubdtype(predictions.dtype, jnp.integer):
        return confusion, source_prior, host.distribution(predictions, "target_predictions", classes)
    return confusion, source_prior, _as_distributions(predictions, "target_predictions", classes).mean(0)


def _clip_and_rescale(weights: np.ndarray, source_prior: np.ndarray, clip: bool, rescale: bool) -> Array:
    if clip:
        weights = np.maximum(weights, 0)
    if rescale:
        weights = weights / (weights @ source_prior)
    return jnp.asarray(weights)
