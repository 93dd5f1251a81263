"""Heads on features that stay as they are: in closed form, by gradients, and from another label set."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxmeta.checks import ArgumentError, check_count, check_finite, check_number
from jaxmeta.core import Key, Params
from jaxmeta.transfer import host

Features = Float[Array, "n d"] | Float[np.ndarray, "n d"]
Labels = Int[Array, " _"] | Int[np.ndarray, " _"]  # as many as rows of features, which is checked
ExampleWeights = Float[Array, " n"] | Float[np.ndarray, " n"]
PENALTIES = tuple(float(penalty) for penalty in np.logspace(-4, 4, 17))


class RidgeSettings(TypedDict, total=False):
    """Settings of `jm.transfer.ridge_head`."""

    penalty: float | Sequence[float]


class LogisticSettings(TypedDict, total=False):
    """Settings of `jm.transfer.logistic_head`."""

    penalty: float
    weights: ExampleWeights | None
    steps: int
    tolerance: float


def ridge_head(
    features: Features,
    labels: Labels,
    classes: int,
    *,
    penalty: float | Sequence[float] = PENALTIES,
) -> Params:
    r"""A linear head in closed form: ridge regression onto one-hot labels, the intercept free.

    W = (Z̃ᵀZ̃ + λ s I)⁻¹ Z̃ᵀ Ỹ, b = ȳ − z̄ W, with Z̃ and Ỹ less their means, and s the mean of the squared
    singular values of Z̃, so that λ has no unit. Its outputs are estimates of class probabilities and no
    logits: their order is the answer.

    Args:
      features: Z.
      labels: in [0, classes).
      classes: C, of which some may have no example.
      penalty: λ > 0; of several the one with the least leave-one-out error, which is exact and costs nothing:
        e_i / (1 − h_ii), h the leverage.

    Returns:
      `{"kernel": (d, C), "bias": (C,)}`, the head of a `jm.transfer.classifier`.

    Raises:
      ValueError: labels and features of different number, labels outside [0, classes), one class only; a
        penalty that is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[0.0, 1], [0.1, 1], [1, 0], [1, 0.1]])
      >>> head = ridge_head(z, jnp.array([0, 0, 1, 1]), 2, penalty=0.01)
      >>> (z @ head["kernel"] + head["bias"][None]).argmax(1).tolist()
      [0, 0, 1, 1]
    """
    z, y = _checked(features, labels, classes)
    given = list(penalty) if isinstance(penalty, Sequence) and not isinstance(penalty, str) else [penalty]
    if not given:
        raise ArgumentError("penalty", "got none; give one, or several to choose from")
    for one in given:
        check_number("penalty", one, above=0)
    penalties = jnp.asarray(given, z.dtype)
    targets = jax.nn.one_hot(y, classes, dtype=z.dtype)
    return _ridge(z, targets, penalties)


@jax.jit
def _ridge(z: Array, targets: Array, penalties: Array) -> Params:
    mean, target_mean = z.mean(0), targets.mean(0)
    left, singular, right = jnp.linalg.svd(z - mean[None], full_matrices=False)
    squares = jnp.square(singular)
    unit = squares.mean()
    aligned = left.T @ (targets - target_mean[None])

    def shrunk(penalty: Array) -> Array:
        return squares / (squares + penalty * unit)

    def left_out_error(penalty: Array) -> Array:
        shrink = shrunk(penalty)
        residual = targets - target_mean[None] - left @ (shrink[:, None] * aligned)
        # The free intercept is one more direction of the fit, with leverage 1/n.
        leverage = (jnp.square(left) * shrink[None]).sum(1) + 1 / z.shape[0]
        return jnp.square(residual / jnp.maximum(1 - leverage, 1e-6)[:, None]).mean()

    best = penalties[jnp.argmin(jax.lax.map(left_out_error, penalties))]
    weights = singular / jnp.maximum(squares + best * unit, jnp.finfo(z.dtype).tiny)
    kernel = right.T @ (weights[:, None] * aligned)
    return {"kernel": kernel, "bias": target_mean - mean @ kernel}


def logistic_head(
    features: Features,
    labels: Labels,
    classes: int,
    *,
    penalty: float = 1e-3,
    weights: ExampleWeights | None = None,
    steps: int = 1000,
    tolerance: float = 1e-5,
) -> Params:
    r"""A linear head by gradients: multinomial logistic regression, its one minimum found by L-BFGS.

    min_W,b  (1/n) Σ_i w_i CE(z_i W + b, y_i) + penalty/2 ‖W‖²

    Args:
      features, labels, classes: as of `ridge_head`.
      penalty: at least 0; without one, separable features have no minimum.
      weights: w, of the examples: of importance, or of label shift; ones if None.
      steps: the most L-BFGS steps.
      tolerance: of the gradient's norm, at which it ends.

    Returns:
      `{"kernel": (d, C), "bias": (C,)}`, the head of a `jm.transfer.classifier`.

    Raises:
      ValueError: as `ridge_head`; a negative penalty; weights of another number than the examples.
    """
    z, y = _checked(features, labels, classes)
    check_number("penalty", penalty, 0)
    check_count("steps", steps)
    check_number("tolerance", tolerance, 0)
    w = jnp.ones(z.shape[0], z.dtype) if weights is None else jnp.asarray(weights, z.dtype)
    if w.shape != y.shape:
        raise ArgumentError("weights", f"got shape {w.shape} for {y.shape[0]} examples")
    check_finite("weights", w)
    if not isinstance(w, jax.core.Tracer):
        lowest, highest = float(np.min(w)), float(np.max(w))
        if lowest < 0 or not highest:
            raise ArgumentError(
                "weights", f"got {lowest} to {highest}; they must be at least 0, and not all 0"
            )
    # L-BFGS wants directions of one curvature, which of a feature's weight is at most its variance + penalty;
    # the minimum is where it was.
    mean = z.mean(0)
    curvature = z.var(0) + penalty
    scale = jnp.sqrt(jnp.where(curvature > 0, curvature, 1))
    start = {"kernel": jnp.zeros((z.shape[1], classes), z.dtype), "bias": jnp.zeros(classes, z.dtype)}
    scaled = (z - mean[None]) / scale[None]
    found = _logistic(start, scaled, y, w, penalty / jnp.square(scale), steps, tolerance)
    kernel = found["kernel"] / scale[:, None]
    return {"kernel": kernel, "bias": found["bias"] - mean @ kernel}


@jax.jit
def _logistic(
    start: Params,
    z: Array,
    y: Array,
    weights: Array,
    penalties: Array,
    steps: int | Array,
    tolerance: float | Array,
) -> Params:
    def objective(head: Params) -> Array:
        logits = z @ head["kernel"] + head["bias"][None]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return (weights * each).mean() + (penalties[:, None] * jnp.square(head["kernel"])).sum() / 2

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        head, state, count, _ = carry
        value, grad = value_and_grad(head, state=state)
        updates, state = optimizer.update(grad, state, head, value=value, grad=grad, value_fn=objective)
        return optax.apply_updates(head, updates), state, count + 1, optax.tree.norm(grad)

    def going(carry: tuple[Any, ...]) -> Array:
        _, _, count, norm = carry
        return (count < steps) & (norm > tolerance)

    return jax.lax.while_loop(going, step, (start, optimizer.init(start), 0, jnp.asarray(jnp.inf, z.dtype)))[
        0
    ]


def mapped_head(head: Params, mapping: Mapping[int, int | Sequence[int]], classes: int, key: Key) -> Params:
    """A head for other labels that begins with what an old one knows of related ones.

    A target class gets the mean of the weights of the source classes that it is mapped to; one without any
    begins anew.

    Args:
      head: the source's, `{"kernel": (d, C_s), "bias": (C_s,)}`.
      mapping: target class -> source class, or several.
      classes: C_t.
      key: of what is new.

    Raises:
      ValueError: a class, of target or source, that there is not.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> old = {"kernel": jnp.eye(3), "bias": jnp.arange(3.0)}
      >>> new = mapped_head(old, {0: 2, 1: (0, 1)}, 2, jax.random.key(0))
      >>> new["bias"].tolist()
      [2.0, 0.5]
    """
    check_count("classes", classes)
    dim, sources = head["kernel"].shape
    kernel = jax.nn.initializers.lecun_normal()(key, (dim, classes), head["kernel"].dtype)
    bias = jnp.zeros(classes, head["bias"].dtype)
    for target, given in mapping.items():
        known = [given] if isinstance(given, int | np.integer) else list(given)
        if not 0 <= target < classes:
            raise ArgumentError("mapping", f"got the target class {target}; there are {classes}, from 0")
        if not known or not all(0 <= source < sources for source in known):
            raise ArgumentError(
                "mapping",
                f"got the source classes {known} for target class {target}; there are {sources}, from 0",
            )
        rows = jnp.asarray(known)
        kernel = kernel.at[:, target].set(head["kernel"][:, rows].mean(1))
        bias = bias.at[target].set(head["bias"][rows].mean())
    return {"kernel": kernel, "bias": bias}


def _checked(features: Features, labels: Labels, classes: int) -> tuple[Array, Array]:
    check_count("classes", classes, 2)
    rows = len(host.matrix(features, "features"))
    z, y = jnp.asarray(features), host.labels(labels, "labels", rows=rows)
    found = np.unique(y)
    if found.size < 2:
        raise ArgumentError("labels", f"got {found.size} class; a head needs examples of at least 2")
    if found[0] < 0 or found[-1] >= classes:
        raise ArgumentError(
            "labels",
            f"got classes from {found[0]} to {found[-1]}; with classes={classes} they must be from 0 "
            f"to {classes - 1}",
        )
    return z, jnp.asarray(y, jnp.int32)
