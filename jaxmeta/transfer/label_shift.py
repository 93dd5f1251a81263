"""Label shift: the classes come in other proportions than where the model was trained.

If P(Y) changes and P(X|Y) does not, then P_t(y|x) ∝ w_y P_s(y|x) with w_y = P_t(y) / P_s(y), and w can be
estimated from unlabelled target examples: by BBSE or RLLS from the predictions of any fixed classifier, or by
EM from calibrated probabilities. Either correct the predictions with `adjust`, or train again with source
losses weighted by `weights[y]`.

That is all that can be had without target labels. Any other change of P(Y|X), where the same x now means
another class, leaves no trace in target examples alone, and where P(X|Y) changes too these estimates are
wrong and do not say so: label some target examples and fine-tune.

Estimates are computed in float64 on the host (see `jaxmeta.transfer.host`) and returned as JAX arrays;
`adjust` is a JAX function that may be compiled.
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
    r"""Ĉ[i, j] = P̂_s(ŷ = i, y = j): the joint, not the conditional, of predictions and labels.

    Args:
      predictions: ŷ of held-out labelled source examples, which the classifier was not trained on: classes,
        or, for the soft variant, probabilities, whose rows are averaged in the place of indicators.
      labels: y of the same examples.
      classes: how many there are.

    Raises:
      ValueError: classes out of range, rows that are no distributions, lengths that differ.

    Examples:
      >>> import numpy as np
      >>> print(joint_confusion(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]), 2))
      [[0.5  0.  ]
       [0.25 0.25]]
    """
    check_count("classes", classes)
    given = _each(predictions, "predictions", classes)
    one_hot = np.eye(classes)[host.labels(labels, "labels", rows=len(given), classes=classes)]
    return jnp.asarray(given.T @ one_hot / len(given))


def bbse(
    joint_confusion: Float[Array | np.ndarray, "classes classes"],
    target_predictions: Real[Array | np.ndarray, " m"] | Float[Array | np.ndarray, "m classes"],
    *,
    clip: bool = True,
    rescale: bool = False,
    max_condition: float = 1e4,
) -> Float[Array, " classes"]:
    r"""Black box shift estimation: class weights w = Ĉ⁻¹ μ̂ with μ̂_i = P̂_t(ŷ = i).

    The classifier need be neither good nor calibrated; its predictions must only depend on the class, by Ĉ
    being invertible. Σ_j w_j P_s(y=j) = 1 before clipping.

    Args:
      joint_confusion: Ĉ of held-out source examples, from `joint_confusion`.
      target_predictions: of the same classifier, hard or soft as Ĉ is: integers `(m,)` are the classes of m
        target examples, floats `(m, classes)` their probabilities, and floats `(classes,)`, which sum to 1,
        μ̂ itself.
      clip: negative weights, which are sampling error, become 0.
      rescale: divide by Σ_j w_j P_s(y=j), which clipping takes above 1.
      max_condition: the largest condition number of P̂_s(ŷ|y), by which sampling errors may be blown up.

    Raises:
      ValueError: a confusion matrix that is not joint frequencies, is nearly singular, or has a class without
        source examples; target predictions of none of the three forms.

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
    # Of the conditional, so that rare classes alone do not count as confusion.
    conditional = confusion / source_prior
    condition = np.linalg.cond(conditional)
    if not condition <= max_condition:
        raise ArgumentError(
            "joint_confusion",
            f"the condition number of P(ŷ|y) is {condition:.3g}, above {max_condition:.3g}: "
            "the classifier confuses some classes altogether, so that their shares cannot be told from its "
            "predictions; use rlls, or merge those classes",
        )
    return _finished(np.linalg.solve(conditional, mu) / source_prior, source_prior, clip, rescale)


def rlls(
    joint_confusion: Float[Array | np.ndarray, "classes classes"],
    target_predictions: Real[Array | np.ndarray, " m"] | Float[Array | np.ndarray, "m classes"],
    *,
    penalty: float,
    shrink: float = 1.0,
    clip: bool = True,
    rescale: bool = False,
) -> Float[Array, " classes"]:
    r"""Regularised learning under label shift: class weights drawn towards 1, where there is no shift.

    w = 1 + λ θ,  θ = argmin ‖Ĉ θ − (μ̂ − Ĉ 1)‖₂ + Δ ‖θ‖₂,

    which exists and is stable for a singular Ĉ too. Neither norm is squared. A minimiser with a residual
    r and θ ≠ 0 is a ridge solution, (ĈᵀĈ + ρ I) θ = Ĉᵀ b with ρ = Δ ‖r‖ / ‖θ‖, and ρ is found by bisection;
    ρ → 0 is BBSE, and ρ → ∞ is θ = 0, both of which can be the exact answer.

    Args:
      joint_confusion, target_predictions: as for `bbse`.
      penalty: Δ > 0, of the size of the sampling error of Ĉ: the released code takes 0.03 (2 L / (3 n) +
        √(2 L / n)) with L = ln(40 classes) for n held-out source examples. 0 would be `bbse`.
      shrink: λ in [0, 1], less than 1 where the target examples are few.
      clip, rescale: as for `bbse`. The released code instead constrains θ ≥ −1 in the minimisation.

    Raises:
      ValueError: as for `bbse`, save that a singular Ĉ is welcome; a `penalty` that is not positive, a
        `shrink` outside [0, 1].

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
        # ρ² ‖θ‖² − Δ² ‖r‖² over ρ², which changes sign once.
        return float((np.square(along / (np.square(s) + rho)) * (np.square(s) - penalty**2)).sum())

    low, high = np.log(1e-40), np.log(1e40)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(np.exp(middle)) > 0 else (middle, high)
    theta = vt.T @ (s * along / (np.square(s) + np.exp(middle)))
    return _finished(1 + shrink * theta, source_prior, clip, rescale)


class Prior(NamedTuple):
    """Class proportions found by EM.

    Attributes:
      target_prior: P_t(y).
      steps: taken; as many as were allowed where it had not converged.
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
    r"""The target's class proportions of largest likelihood, by EM.

    From π = P_s(y):  q_i(y) ∝ π(y) / P_s(y) · P_s(y|x_i),  π ← mean_i q_i,

    each step of which raises (1/m) Σ_i ln Σ_y π(y) / P_s(y) · P_s(y|x_i), a concave function of π. The class
    weights are `target_prior / source_prior`. More exact than BBSE where P_s(y|x) is calibrated, and biased
    where it is not: calibrate first, with `temperature`.

    Args:
      probs: P_s(y|x_i), the source model's calibrated probabilities for unlabelled target examples.
      source_prior: P_s(y), the class proportions it was trained on.
      tolerance: it ends where no proportion moves by more in one step.
      steps: and at the latest after as many.

    Raises:
      ValueError: rows that are no distributions, a class with a source prior of 0, `steps` below 1, a
        negative `tolerance`.

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
    given = host.probabilities(probs, "probs")
    start = host.distribution(source_prior, "source_prior", given.shape[1])
    if not start.all():
        raise ArgumentError("source_prior", f"got 0 for class {start.argmin()}; every class must be above 0")
    likelihood = given / start
    prior = start
    taken, moved = 0, np.inf
    while taken < steps and moved > tolerance:
        joint = prior * likelihood
        before, prior = prior, (joint / joint.sum(1, keepdims=True)).mean(0)
        taken, moved = taken + 1, np.abs(prior - before).max()
    return Prior(jnp.asarray(prior), taken)


def adjust(
    probs: Float[Array | np.ndarray, "*n classes"], weights: Float[Array | np.ndarray, " classes"]
) -> Float[Array, "*n classes"]:
    r"""P_t(y|x) = w_y P_s(y|x) / Σ_y' w_y' P_s(y'|x).

    Where all classes of a row that are possible have weight 0, the row stays as it is, which is the limit of
    equally small weights.

    Args:
      probs: P_s(y|x).
      weights: w, not negative.

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
            "weights", f"got shape {weights.shape} for probs of shape {probs.shape}; it must be one a class"
        )
    weighted = probs * weights.astype(probs.dtype).reshape((1,) * (probs.ndim - 1) + (-1,))
    total = weighted.sum(-1, keepdims=True)
    return jnp.where(total > 0, weighted / jnp.where(total > 0, total, 1), probs)


def temperature(
    logits: Float[Array | np.ndarray, "n classes"], labels: Int[Array | np.ndarray, " n"]
) -> float:
    r"""The T for which softmax(logits / T) has the largest likelihood on held-out source examples.

    The likelihood is concave in 1/T, of which the slope is bisected, for T from 0.01 to 100: an end is what
    comes out where none is best, as where every example is classified rightly (the smaller, the better).

    Args:
      logits: of examples that the model was not trained on.
      labels: their classes.

    Raises:
      ValueError: logits that are not finite, classes out of range, lengths that differ.

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


def _each(predictions: host.Values, name: str, classes: int) -> Float[np.ndarray, "n classes"]:
    """One distribution an example, be the predictions hard or soft."""
    found = host.numbers(predictions, name)
    if found.ndim != 2:
        return np.eye(classes)[host.labels(found, name, rows=found.size, classes=classes)]
    if found.shape[1] != classes:
        raise ArgumentError(
            name, f"got {found.shape[1]} columns; there must be one for each of {classes} classes"
        )
    return host.probabilities(found, name)


def _checked(
    joint_confusion: host.Values, target_predictions: host.Values
) -> tuple[Float[np.ndarray, "c c"], Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """Ĉ, P_s(y) and μ̂."""
    confusion = host.matrix(joint_confusion, "joint_confusion")
    classes = len(confusion)
    if confusion.shape != (classes, classes):
        raise ArgumentError("joint_confusion", f"got shape {confusion.shape}; it must be (classes, classes)")
    confusion = host.probabilities(confusion.reshape(1, -1), "joint_confusion").reshape(classes, classes)
    source_prior = confusion.sum(0)
    if not source_prior.all():
        raise ArgumentError(
            "joint_confusion",
            f"class {source_prior.argmin()} has no labelled source examples; "
            "its share of the target cannot be estimated",
        )
    found = host.numbers(target_predictions, "target_predictions")
    if found.ndim == 1 and not jnp.issubdtype(found.dtype, jnp.integer):
        return confusion, source_prior, host.distribution(found, "target_predictions", classes)
    return confusion, source_prior, _each(found, "target_predictions", classes).mean(0)


def _finished(weights: np.ndarray, source_prior: np.ndarray, clip: bool, rescale: bool) -> Array:
    if clip:
        weights = np.maximum(weights, 0)
    if rescale:
        weights = weights / (weights @ source_prior)
    return jnp.asarray(weights)
