"""MAML++: MAML with per-step losses, step sizes and normalisation layers."""

from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from jaxmeta import declare, losses
from jaxmeta.checks import ArgumentError, check_count, check_number, check_word
from jaxmeta.core import (
    Key,
    Learner,
    Loss,
    Memory,
    Metric,
    Metrics,
    Norm,
    Order,
    Params,
    PyTree,
    Task,
    blank_padding,
)
from jaxmeta.nn.adapters import Network
from jaxmeta.optimization_based.adaptation import adaptation
from jaxmeta.optimization_based.settings import Adapts

# Minimum weight of a step's loss, as a multiple of 1/T.
LEAST_WEIGHT = 0.03


def _training(base: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        "inner_steps": 5,
        "eval_steps": 5,
        "report_steps": (),
        # A tenth of training, like the paper's 10 of 100 epochs on Omniglot.
        "anneal_steps": round(0.1 * base["steps"]),
        "first_order_steps": 0,
    }
    return defaults if base.get("inner_lr") is None else {**defaults, "inner_lr": base["inner_lr"]}


@declare.learner(training=_training)
def maml_plus_plus(
    model: Network,
    *,
    inner_lr: float = 0.1,
    inner_steps: int = 5,
    eval_steps: int | None = None,
    anneal_steps: int = 5000,
    first_order_steps: int = 0,
    per_step_norm: bool = True,
    memory: Memory = "auto",
    norm: Norm = "batch",
    adapts: Adapts | None = None,
    loss: Loss = losses.cross_entropy,
    metric: Metric | None = None,
) -> Learner:
    r"""Build MAML++, MAML with a multi-step loss and per-step settings (Antoniou et al. 2019).

    MAML++ changes MAML by

    - a multi-step loss, Σ_j v_j L^Q(θ_j), whose weights are annealed from 1/T each to the last step alone
      (MSL);
    - a learned step size for each parameter array and each inner step (LSLR);
    - a first-order meta-gradient in the first meta-steps (DA, derivative-order annealing);
    - separate normalisation layers for each inner step: scale, bias and population statistics (BNWB, BNRS),
      which are meta-learned and not adapted;
    - a cosine schedule of the outer step size (CA), which belongs to the outer optimizer:
      `optax.adam(optax.cosine_decay_schedule(1e-3, meta_steps))`.

    MSL and DA are scheduled by the meta-step that `jm.train` passes to `loss`. With `step=None` both are at
    their end: the loss of the last step, second order.

    Params: as in `jm.maml`, except that normalisation layers are under "per_step" in place of "model", with a
    leading axis of steps; "hyper" holds the step sizes, of shape (inner_steps,) for each adapted array.

    Args:
      model: network to meta-learn; see `jm.maml`.
      inner_lr: initial step size of every parameter array and inner step. The official code uses 0.1 for all
        data sets, whatever its configuration files set.
      inner_steps: number T of inner steps in training, at least 1.
      eval_steps: inner steps at validation and test, in `adapt`, at most `inner_steps`; as in training if
        None.
      anneal_steps: meta-steps until only the last inner step's loss counts; 0 for no annealing. The paper
        takes 10 of 100 epochs, of 500 meta-steps each, on Omniglot, and 15 on mini-ImageNet.
      first_order_steps: meta-steps of first order at the beginning. 50 epochs in the paper; 0 in the released
        configurations.
      per_step_norm: if True, each inner step has separate normalisation layers; if False, they are shared and
        adapted, as in MAML.
      memory: how the second-order backward pass obtains the values of each inner step; see `jm.maml`.
      norm: source of the batch statistics that normalise the queries; see `jm.maml`. The published numbers
        are for "batch": the official code keeps running statistics for each step, but normalises by the
        statistics of the batch.
      adapts: parameters that the inner loop changes, except per-step layers; all of these if None; see
        `jm.maml`.
      loss: loss function `(outputs, y, mask) -> scalar` of both loops.
      metric: metric reported in addition to the loss; see `jm.maml`.

    Returns:
      A `Learner`.

    Raises:
      ValueError: `inner_steps` below 1; `eval_steps` below 1 or above `inner_steps`; negative `anneal_steps`
        or `first_order_steps`; errors of `jm.maml` for these arguments.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.sinusoid(shots=10, queries=10).sample(jax.random.key(0))
      >>> learner = jm.maml_plus_plus(jm.nn.MLP(out=1), loss=jm.losses.mse)
      >>> params = learner.init(jax.random.key(1), task)
      >>> params["hyper"]["head"]["bias"]
      Array([0.1, 0.1, 0.1, 0.1, 0.1], dtype=float32)

    References:
      Antoniou, Edwards & Storkey, How to train your MAML, 2019.
    """
    check_number("inner_lr", inner_lr, 0)
    check_count("inner_steps", inner_steps)
    if eval_steps is not None:
        check_count("eval_steps", eval_steps)
    if eval_steps is not None and eval_steps > inner_steps:
        raise ArgumentError(
            "eval_steps",
            f"got {eval_steps}; there are learned step sizes for 1 to {inner_steps} steps (inner_steps); it "
            f"must be at most {inner_steps}",
        )
    for name, count in (("anneal_steps", anneal_steps), ("first_order_steps", first_order_steps)):
        check_count(name, count, 0)
    check_word("norm", norm, get_args(Norm))

    def initial_rates(key: Key, fast: PyTree) -> PyTree:
        del key
        return jax.tree.map(lambda leaf: jnp.full((inner_steps,), inner_lr, leaf.dtype), fast)

    network = adaptation(
        model,
        inner_optimizer=descend_by_step,
        hyper=initial_rates,
        inner_steps=inner_steps,
        eval_steps=eval_steps,
        norm=norm,
        adapts=adapts,
        per_step=per_step_norm,
        loss=loss,
        metric=metric,
        memory=memory,
    )

    def path_of(params: Params, support, key: Key, step: jax.Array | None) -> PyTree:
        """Return the adapted leaves after each inner step."""

        def fit(order: Order) -> PyTree:
            return network.fit(params, support, key, order=order, keep_path=True)[1].path

        if step is None or not first_order_steps:
            return fit("second")
        return lax.cond(step < first_order_steps, lambda: fit("first"), lambda: fit("second"))

    def task_loss(
        params: Params, task: Task, key: Key, step: jax.Array | None = None
    ) -> tuple[jax.Array, Metrics]:
        support, query = map(blank_padding, task)
        path = path_of(params, support, key, step)

        def step_loss(fast: PyTree, j: jax.Array | int) -> tuple[jax.Array, Metrics]:
            weights = network.weights_at(params, fast, j)
            stats = network.query_statistics(params, weights, support, None)
            return network.query_loss(weights, query, key, stats)

        def last() -> tuple[jax.Array, Metrics]:
            return step_loss(jax.tree.map(lambda leaf: leaf[-1], path), inner_steps - 1)

        if step is None or not anneal_steps:
            return last()

        def weighted() -> tuple[jax.Array, Metrics]:
            values, metrics = jax.vmap(step_loss)(path, jnp.arange(inner_steps))
            weights = multi_step_weights(inner_steps, step / anneal_steps).astype(values.dtype)
            return jnp.dot(weights, values), jax.tree.map(lambda leaf: leaf[-1], metrics)

        return lax.cond(step < anneal_steps, weighted, last)

    return network.learner(task_loss)


def multi_step_weights(steps: int, progress: Float[Array, ""] | float) -> Float[Array, " steps"]:
    """Return the weights v_j of the multi-step loss, which sum to 1.

    v_j = max((1 − p)/T, 0.03/T) for j < T, and v_T = min((1 + p(T − 1))/T, 1 − 0.03(T − 1)/T)

    Args:
      steps: number T of inner steps.
      progress: completed fraction p of the annealing, in [0, 1].

    Returns:
      The weights, of shape (steps,).

    Examples:
      >>> print([f"{float(v):.4f}" for v in multi_step_weights(5, 1 / 3)])
      ['0.1333', '0.1333', '0.1333', '0.1333', '0.4667']
    """
    early = jnp.maximum(1 - progress, LEAST_WEIGHT) / steps
    final = jnp.minimum(1 + progress * (steps - 1), steps - LEAST_WEIGHT * (steps - 1)) / steps
    return jnp.where(jnp.arange(steps) < steps - 1, early, final)


def descend_by_step(rates: PyTree) -> optax.GradientTransformation:
    """Build SGD with a step size for each array and step; `rates` has leaves of shape (steps,)."""

    def update(grads: PyTree, step: jax.Array, params: PyTree = None) -> tuple[PyTree, jax.Array]:
        del params
        return jax.tree.map(lambda rate, g: -rate[step] * g, rates, grads), step + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
