"""Losses and metrics of a batch. Every reduction is a mean over the unmasked examples.

A published inner learning rate is valid only together with its reduction. Several official implementations
sum where this library averages; the presets hold the learning rates that make both equal.

Sums, counts and means are computed in float32 or higher, whatever the type of the outputs: bfloat16 cannot
count beyond 256, and float16 overflows above 65,504.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxmeta.checks import ArgumentError, check_labels, check_slots, format_value
from jaxmeta.core import Batch, Metric, Metrics
from jaxmeta.learner_form import counted

__all__ = ["cross_entropy", "full_precision", "masked_mean", "masked_sum", "mse", "score", "scores"]


def full_precision(values: ArrayLike) -> Array:
    """Return `values` in float32, or in their own type if it is wider."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def masked_mean(values: Float[Array, " n"], mask: Bool[Array, " n"] | None = None) -> Float[Array, ""]:
    """Return the mean of `values` where `mask` is True (everywhere if None); 0 for an empty mask.

    Examples:
      >>> float(masked_mean(jnp.array([1.0, 3.0, 5.0]), jnp.array([True, True, False])))
      2.0
    """
    total, count = masked_sum(values, mask)
    return total / jnp.maximum(count, 1)


def masked_sum(
    values: Float[Array, " n"], mask: Bool[Array, " n"] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the sum of `values` where `mask` is True (everywhere if None), and their number.

    This pair is the form of a metric. Both are float32 or wider.

    Raises:
      ValueError: `mask` is not bool or not of the shape of `values`.

    Examples:
      >>> tuple(map(float, masked_sum(jnp.array([1.0, 3.0, 5.0]), jnp.array([True, True, False]))))
      (4.0, 2.0)
    """
    if mask is not None and (mask.shape != values.shape or mask.dtype != jnp.bool):
        raise ArgumentError("mask", f"got {format_value(mask)}; it must be bool, of shape {values.shape}")
    values = full_precision(values)
    if mask is None:
        return values.sum(), jnp.asarray(values.size, values.dtype)
    # `where` and not a product: padding may hold NaN, and 0 * NaN is NaN.
    return jnp.where(mask, values, 0).sum(), mask.sum().astype(values.dtype)


def cross_entropy(
    logits: Float[Array, "n ways"], labels: Int[Array, " n"], mask: Bool[Array, " n"] | None = None
) -> Float[Array, ""]:
    """Return the mean softmax cross-entropy, in nats.

    Args:
      logits: floats of shape `(n, ways)`.
      labels: integer class slots of shape `(n,)`, in 0 … ways − 1.
      mask: bools of shape `(n,)`; examples with False are left out. All examples if None.

    Raises:
      ValueError: another shape or type, or a label outside 0 … ways − 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(f"{cross_entropy(jnp.zeros((3, 5)), jnp.array([0, 1, 2])):.4f}")  # ln 5
      1.6094
    """
    if logits.ndim != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ArgumentError("logits", f"got {format_value(logits)}; it must be floats, of shape (n, ways)")
    check_labels("labels", labels, logits.shape[0], logits.shape[1], mask)
    values = optax.softmax_cross_entropy_with_integer_labels(full_precision(logits), labels)
    return masked_mean(values, mask)


def mse(
    outputs: Float[Array, "n d"], targets: Float[Array, "n d"], mask: Bool[Array, " n"] | None = None
) -> Float[Array, ""]:
    """Return the mean squared error over examples and output dimensions.

    Args:
      outputs: floats of shape `(n, d)`.
      targets: floats of the same shape.
      mask: bools of shape `(n,)`; examples with False are left out. All examples if None.

    Raises:
      ValueError: outputs and targets differ in shape, and would broadcast to a wrong mean.

    Examples:
      >>> float(mse(jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [4.0]])))
      2.0
    """
    if outputs.shape != targets.shape:
        raise ArgumentError(
            "outputs, targets", f"got shapes {outputs.shape} and {targets.shape}; they must be the same"
        )
    # Convert first: squares of float16 values above 255 overflow.
    errors = jnp.square(full_precision(outputs) - full_precision(targets))
    return masked_mean(errors.mean(-1), mask)


def score(outputs: Array, batch: Batch) -> Metrics:
    """Return the default metric of predictions: "accuracy" of integer labels, "mse" of float targets.

    Args:
      outputs: logits of shape `(n, ways)`, or predictions of the targets' shape.
      batch: the examples with their labels or targets, and a mask.

    Returns:
      A dictionary with one metric, as `(sum, count)`.

    Raises:
      ValueError: another shape of `outputs`, or a label without a logit.

    Examples:
      >>> batch = Batch(x=jnp.zeros((2, 1)), y=jnp.array([0, 1]), ways=2)
      >>> total, count = score(jnp.array([[2.0, 1.0], [3.0, 0.0]]), batch)["accuracy"]
      >>> float(total), float(count)
      (1.0, 2.0)
    """
    if jnp.issubdtype(batch.y.dtype, jnp.integer):
        if outputs.ndim != 2 or outputs.shape[0] != batch.y.shape[0]:
            raise ValueError(
                f"got outputs of shape {outputs.shape} for {batch.y.shape[0]} labels; "
                "they must be (examples, ways)"
            )
        check_slots("batch", batch.y, outputs.shape[1], batch.mask)
        # The argmax of a row with NaN is the NaN's position, which would count as right for that class.
        right = (outputs.argmax(-1) == batch.y) & ~jnp.isnan(outputs).any(-1)
        return {"accuracy": masked_sum(right.astype(jnp.float32), batch.mask)}
    if outputs.shape != batch.y.shape:
        raise ValueError(
            f"got outputs of shape {outputs.shape} for targets of shape {batch.y.shape}, which have no mean "
            "squared error; metric= takes a function (outputs, y, mask) -> scalar or (sum, count)"
        )
    errors = jnp.square(full_precision(outputs) - full_precision(batch.y))
    # reshape(n, -1) is ambiguous for n = 0.
    rows = errors.reshape(errors.shape[0], math.prod(errors.shape[1:]))
    return {"mse": masked_sum(rows.mean(-1), batch.mask)}


@dataclasses.dataclass(frozen=True)
class ScoreOrLoss:
    """The default metric of a learner with a custom loss: `score` if the shapes fit it, otherwise that loss.

    Outputs whose shape differs from the targets', such as means with variances, have no mean squared error.

    Attributes:
      loss: `(outputs, y, mask) -> scalar`.
    """

    loss: Metric

    def __call__(self, outputs: Array, y: Array, mask: Array | None = None) -> Array | tuple[Array, Array]:
        """Return the score as `(sum, count)`, or the loss."""
        ((_, value),) = scores(outputs, Batch(x=y, y=y, mask=mask), self).items()
        return value


def scores(outputs: Array, batch: Batch, metric: Metric | None = None) -> Metrics:
    """Return `metric` of predictions under its name, or `score` if it is None.

    A metric that returns a single number has count 1, or count 0 where all examples are masked.

    Args:
      outputs: predictions of a learner.
      batch: the examples with their labels or targets, and a mask.
      metric: `(outputs, y, mask) -> scalar or (sum, count)`; `score` if None.

    Returns:
      A dictionary with one metric, as `(sum, count)`.

    Raises:
      ValueError: as `score`; or the metric returned neither a number nor `(sum, count)`.

    Examples:
      >>> def distance(outputs, y, mask):
      ...     return masked_sum(jnp.abs(outputs - y)[:, 0], mask)
      >>> batch = Batch(x=jnp.zeros((2, 1)), y=jnp.array([[1.0], [4.0]]))
      >>> {name: tuple(map(float, pair)) for name, pair in scores(batch.x, batch, distance).items()}
      {'distance': (5.0, 2.0)}
    """
    if metric is None:
        return score(outputs, batch)
    if isinstance(metric, ScoreOrLoss):
        if _fits(outputs, batch):
            return score(outputs, batch)
        name, metric = "loss", metric.loss
    else:
        name = metric_label(metric)
    value: Any = metric(outputs, batch.y, batch.mask)
    total, count = map(full_precision, counted(name, value))
    if batch.mask is not None and not isinstance(value, tuple | list):
        has_examples = batch.mask.any()
        total, count = jnp.where(has_examples, total, 0), has_examples.astype(count.dtype)
    return {name: (total, count)}


def metric_label(metric: Metric) -> str:
    """Return the name under which `metric` is reported: its `__name__`, or "metric".

    Examples:
      >>> metric_label(mse), metric_label(lambda outputs, y, mask: 0.0)
      ('mse', 'metric')
    """
    name = getattr(metric, "__name__", "metric")
    # "loss" is the key of the training loss in logs and reports.
    return "metric" if name in ("<lambda>", "loss") else name


def _fits(outputs: Array, batch: Batch) -> bool:
    """Return whether `score` accepts outputs of this shape."""
    if jnp.issubdtype(batch.y.dtype, jnp.integer):
        return outputs.ndim == 2 and outputs.shape[0] == batch.y.shape[0]
    return outputs.shape == batch.y.shape
