"""Losses of one batch. Every reduction is a mean over the unmasked examples.

The reduction is part of the method: a published inner learning rate means something only
together with it. Several official codes sum where we average; the presets store the learning
rate that makes our mean equal to their sum.

Sums, counts and means are of float32 at least, whatever outputs are in: bfloat16 counts to 256, and float16
has nothing above 65,504.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxmeta.checks import ArgumentError, check_labels, check_slots, shown
from jaxmeta.core import Batch, Metric, Metrics
from jaxmeta.learner_form import counted


def full_precision(values: ArrayLike) -> Array:
    """`values` in float32 at least: what is added up, or compared by small differences."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def masked_mean(values: Float[Array, " n"], mask: Bool[Array, " n"] | None = None) -> Float[Array, ""]:
    """Mean of `values` where `mask` is True (everywhere if None); 0 where nothing is."""
    total, count = masked_sum(values, mask)
    return total / jnp.maximum(count, 1)


def masked_sum(
    values: Float[Array, " n"], mask: Bool[Array, " n"] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of `values` where `mask` is True, and how many there are: the form of a metric.

    Both are of float32 at least.
    """
    if mask is not None and (mask.shape != values.shape or mask.dtype != jnp.bool):
        raise ArgumentError("mask", f"got {shown(mask)}; it must be bool, of shape {values.shape}")
    values = full_precision(values)
    if mask is None:
        return values.sum(), jnp.asarray(values.size, values.dtype)
    # `where` and not a product: padding may hold NaN, and 0 * NaN is NaN.
    return jnp.where(mask, values, 0).sum(), mask.sum().astype(values.dtype)


def cross_entropy(
    logits: Float[Array, "n ways"], labels: Int[Array, " n"], mask: Bool[Array, " n"] | None = None
) -> Float[Array, ""]:
    """Mean softmax cross-entropy, in nats, of integer class slots.

    Raises:
      ValueError: not one row of logits and one class slot for each example, or a slot without a logit.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(f"{cross_entropy(jnp.zeros((3, 5)), jnp.array([0, 1, 2])):.4f}")  # ln 5
      1.6094
    """
    if logits.ndim != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ArgumentError("logits", f"got {shown(logits)}; it must be floats, of shape (n, ways)")
    check_labels("labels", labels, logits.shape[0], logits.shape[1], mask)
    each = optax.softmax_cross_entropy_with_integer_labels(full_precision(logits), labels)
    return masked_mean(each, mask)


def mse(
    outputs: Float[Array, "n d"], targets: Float[Array, "n d"], mask: Bool[Array, " n"] | None = None
) -> Float[Array, ""]:
    """Mean squared error over examples and output dimensions.

    Raises:
      ValueError: outputs and targets differ in shape (they would broadcast to a wrong mean).
    """
    if outputs.shape != targets.shape:
        raise ArgumentError(
            "outputs, targets", f"got shapes {outputs.shape} and {targets.shape}; they must be the same"
        )
    # In few bits the squares would overflow first.
    errors = jnp.square(full_precision(outputs) - full_precision(targets))
    return masked_mean(errors.mean(-1), mask)


def score(outputs: Array, batch: Batch) -> Metrics:
    """What is reported of predictions: "accuracy" of integer labels, "mse" of float targets.

    Raises:
      ValueError: `outputs` has not the shape of predictions for `batch`, or a label that is none of theirs.
    """
    if jnp.issubdtype(batch.y.dtype, jnp.integer):
        if outputs.ndim != 2 or outputs.shape[0] != batch.y.shape[0]:
            raise ValueError(
                f"got outputs of shape {outputs.shape} for {batch.y.shape[0]} labels; "
                "they must be (examples, ways)"
            )
        check_slots("batch", batch.y, outputs.shape[1], batch.mask)
        # The argmax of a row with NaN is the NaN's place: a diverged learner is wrong, not lucky.
        right = (outputs.argmax(-1) == batch.y) & ~jnp.isnan(outputs).any(-1)
        return {"accuracy": masked_sum(right.astype(jnp.float32), batch.mask)}
    if outputs.shape != batch.y.shape:
        raise ValueError(
            f"got outputs of shape {outputs.shape} for targets of shape {batch.y.shape}, which have no mean "
            "squared error; metric= takes a function (outputs, y, mask) -> scalar or (sum, count)"
        )
    errors = jnp.square(full_precision(outputs) - full_precision(batch.y))
    # Not by −1, which is no size where there are no examples.
    rows = errors.reshape(errors.shape[0], math.prod(errors.shape[1:]))
    return {"mse": masked_sum(rows.mean(-1), batch.mask)}


@dataclasses.dataclass(frozen=True)
class ScoreOrLoss:
    """The metric of a learner with a loss of its own: `score` where it fits, and else that loss.

    Outputs that are not of the targets' shape, such as means and variances, have no mean squared error.

    Attributes:
      loss: `(outputs, y, mask) -> scalar`.
    """

    loss: Metric

    def __call__(self, outputs: Array, y: Array, mask: Array | None = None) -> Array | tuple[Array, Array]:
        """Return the score as `(sum, count)`, or the loss."""
        ((_, found),) = scores(outputs, Batch(x=y, y=y, mask=mask), self).items()
        return found


def scores(outputs: Array, batch: Batch, metric: Metric | None = None) -> Metrics:
    """What is reported of predictions: `metric` under its name, or `score` if it is None.

    A metric that is a single number counts once where the batch has an example, and not at all otherwise.

    Raises:
      ValueError: as `score`; or the metric is neither a number nor `(sum, count)`.

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
        some = batch.mask.any()
        total, count = jnp.where(some, total, 0), some.astype(count.dtype)
    return {name: (total, count)}


def metric_label(metric: Metric) -> str:
    """Return the name under which `metric` is reported: its own where it has one.

    Examples:
      >>> metric_label(mse), metric_label(lambda outputs, y, mask: 0.0)
      ('mse', 'metric')
    """
    name = getattr(metric, "__name__", "metric")
    # A metric never stands in the place of the loss.
    return "metric" if name in ("<lambda>", "loss") else name


def _fits(outputs: Array, batch: Batch) -> bool:
    """Return whether `score` takes outputs of this shape."""
    if jnp.issubdtype(batch.y.dtype, jnp.integer):
        return outputs.ndim == 2 and outputs.shape[0] == batch.y.shape[0]
    return outputs.shape == batch.y.shape
