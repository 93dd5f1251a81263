"""Linear heads on frozen features: in closed form, by gradients, and from the head of other classes."""

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
# Not " n", so that a wrong number of labels gets the error of `host.labels`.
Labels = Int[Array, " _"] | Int[np.ndarray, " _"]
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
    r"""Fit a linear head in closed form: ridge regression onto one-hot labels, with an unpenalised intercept.

    W = (Z̃ᵀZ̃ + λ s I)⁻¹ Z̃ᵀ Ỹ, b = ȳ − z̄ W, where Z̃ and Ỹ are centred, and s is the mean of the squared
    singular values of Z̃, so that λ has no unit. The outputs estimate class probabilities; they are not
    logits, so use their argmax and not their softmax.

    Args:
      features: Z, of shape `(n, d)`.
      labels: classes in [0, classes), of shape `(n,)`.
      classes: number C of classes; some may have no examples.
      penalty: λ > 0, or several values, of which the one with the smallest leave-one-out error is used. That
        error is exact at no extra cost: e_i / (1 − h_ii), where h is the leverage.

    Returns:
      `{"kernel": (d, C), "bias": (C,)}`, the head of a `jm.transfer.classifier`.

    Raises:
      ValueError: if labels and features differ in number, labels are outside [0, classes) or all of one
        class, or a penalty is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[0.0, 1], [0.1, 1], [1, 0], [1, 0.1]])
      >>> head = ridge_head(z, jnp.array([0, 0, 1, 1]), 2, penalty=0.01)
      >>> (z @ head["kernel"] + head["bias"][None]).argmax(1).tolist()
      [0, 0, 1, 1]
    """
    z, y = _checked(features, labels, classes)
    values = (
        list(penalty) if isinstance(penalty, Sequence) and not isinstance(penalty, str | bytes) else [penalty]
    )
    if not values:
        raise ArgumentError("penalty", "got none; pass one value, or several to choose from")
    for value in values:
        check_number("penalty", value, above=0)
    penalties = jnp.asarray(values, z.dtype)
    targets = jax.nn.one_hot(y, classes, dtype=z.dtype)
    return _ridge(z, targets, penalties)


@jax.jit
def _ridge(z: Array, targets: Array, penalties: Array) -> Params:
    mean, target_mean = z.mean(0), targets.mean(0)
    left, singular, right = jnp.linalg.svd(z - mean[None], full_matrices=False)
    squares = jnp.square(singular)
    unit = squares.mean()
    aligned = left.T @ (targets - target_mean[None])

    def shrinkage(penalty: Array) -> Array:
        return squares / (squares + penalty * unit)

    def left_out_error(penalty: Array) -> Array:
        shrink = shrinkage(penalty)
        residual = targets - target_mean[None] - left @ (shrink[:, None] * aligned)
        # The unpenalised intercept is one more direction of the fit, with leverage 1/n.
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
    r"""Fit a linear head by gradients: multinomial logistic regression, minimised by L-BFGS.

    min_W,b  (1/n) Σ_i w_i CE(z_i W + b, y_i) + penalty/2 ‖W‖²

    Args:
      features: features z of shape `(n, d)`.
      labels: classes in [0, classes), of shape `(n,)`.
      classes: number C of classes; some may have no examples.
      penalty: weight of the penalty, at least 0; with 0, the loss of separable features has no minimum.
      weights: weights w of the examples, such as importance or label-shift weights; None for ones.
      steps: largest number of L-BFGS steps.
      tolerance: norm of the gradient at which the iteration stops.

    Returns:
      `{"kernel": (d, C), "bias": (C,)}`, the head of a `jm.transfer.classifier`.

    Raises:
      ValueError: as in `ridge_head`; if `penalty` or a weight is negative, or the number of weights differs
        from the number of examples.
    """
    z, y = _checked(features, labels, classes)
    check_number("penalty", penalty, 0)
    check_count("steps", steps)
    check_number("tolerance", tolerance, 0)
    w = jnp.ones(z.shape[0], z.dtype) if weights is None else jnp.asarray(weights, z.dtype)
    if w.shape != y.shape:
        raise ArgumentError("weights", f"got shape {w.shape} for {y.shape[0]} examples; pass one for each")
    check_finite("weights", w)
    if not isinstance(w, jax.core.Tracer):
        lowest, highest = float(np.min(w)), float(np.max(w))
        if lowest < 0 or not highest:
            raise ArgumentError(
                "weights", f"got values from {lowest} to {highest}; they must be at least 0, and not all 0"
            )
    # L-BFGS converges fastest where all directions have one curvature. That of a feature's weight is at most
    # the feature's variance + penalty; scaling by its root does not move the minimum.
    mean = z.mean(0)
    curvature = z.var(0) + penalty
    scale = jnp.sqrt(jnp.where(curvature > 0, curvature, 1))
    start = {"kernel": jnp.zeros((z.shape[1], classes), z.dtype), "bias": jnp.zeros(classes, z.dtype)}
    scaled = (z - mean[None]) / scale[None]
    solution = _logistic(start, scaled, y, w, penalty / jnp.square(scale), steps, tolerance)
    kernel = solution["kernel"] / scale[:, None]
    return {"kernel": kernel, "bias": solution["bias"] - mean @ kernel}


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
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return (weights * losses).mean() + (penalties[:, None] * jnp.square(head["kernel"])).sum() / 2

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        head, state, count, _ = carry
        value, grad = value_and_grad(head, state=state)
        updates, state = optimizer.update(grad, state, head, value=value, grad=grad, value_fn=objective)
        return optax.apply_updates(head, updates), state, count + 1, optax.tree.norm(grad)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        _, _, count, norm = carry
        return (count < steps) & (norm > tolerance)

    carry = (start, optimizer.init(start), 0, jnp.asarray(jnp.inf, z.dtype))
    return jax.lax.while_loop(unfinished, step, carry)[0]


def mapped_head(head: Params, mapping: Mapping[int, int | Sequence[int]], classes: int, key: Key) -> Params:
    """Return a head for new classes, initialised from the weights of related old classes.

    A target class gets the mean weights of the source classes that it is mapped to; a class without a mapping
    is initialised randomly.

    Args:
      head: head of the source, `{"kernel": (d, C_s), "bias": (C_s,)}`.
      mapping: for a target class, the related source class or classes.
      classes: number C_t of target classes.
      key: key of the random initialisation.

    Returns:
      `{"kernel": (d, C_t), "bias": (C_t,)}`, the head of a `jm.transfer.classifier`.

    Raises:
      ValueError: if a target class is outside [0, C_t), or its source classes are empty or outside [0, C_s).

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
    for target, entry in mapping.items():
        related = [entry] if isinstance(entry, int | np.integer) else list(entry)
        if not 0 <= target < classes:
            raise ArgumentError(
                "mapping", f"got the target class {target}; there are {classes}, numbered from 0"
            )
        if not related or not all(0 <= source < sources for source in related):
            raise ArgumentError(
                "mapping",
                f"got the source classes {related} for target class {target}; there are {sources}, "
                "numbered from 0",
            )
        rows = jnp.asarray(related)
        kernel = kernel.at[:, target].set(head["kernel"][:, rows].mean(1))
        bias = bias.at[target].set(head["bias"][rows].mean())
    return {"kernel": kernel, "bias": bias}


def _checked(features: Features, labels: Labels, classes: int) -> tuple[Array, Array]:
    check_count("classes", classes, 2)
    rows = len(host.matrix(features, "features"))
    y = host.labels(labels, "labels", rows=rows, classes=classes)
    if (y == y[0]).all():
        raise ArgumentError("labels", "got 1 class; a head needs examples of at least 2")
    return jnp.asarray(features), jnp.asarray(y, jnp.int32)
