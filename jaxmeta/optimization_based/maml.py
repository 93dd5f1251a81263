"""Model-agnostic meta-learning: an initialisation from which a few gradient steps suffice."""

from typing import Unpack

import jax

from jaxmeta import declare, losses
from jaxmeta.core import (
    InnerLoopNorm,
    Key,
    Learner,
    Loss,
    Memory,
    Metric,
    Metrics,
    Order,
    Params,
    Task,
    blank_padding,
)
from jaxmeta.nn.adapters import Network
from jaxmeta.optimization_based.adaptation import adaptation, choose_optimizer
from jaxmeta.optimization_based.settings import Adapts, FomamlSettings, Hyper, InnerOptimizer


@declare.learner()
def maml(
    model: Network,
    *,
    inner_lr: float = 0.4,
    inner_optimizer: InnerOptimizer | None = None,
    hyper: Hyper = None,
    inner_steps: int = 1,
    eval_steps: int | None = None,
    inner_batch: int | None = None,
    order: Order = "second",
    memory: Memory = "auto",
    truncation: int | None = None,
    proximal: float | None = None,
    cg_steps: int = 5,
    damping: float = 0.0,
    norm: InnerLoopNorm = "batch",
    adapts: Adapts | None = None,
    loss: Loss = losses.cross_entropy,
    metric: Metric | None = None,
) -> Learner:
    r"""Build MAML, which meta-learns the initialisation of gradient descent (Finn et al. 2017).

    θ_0 = θ,  θ_j = θ_{j−1} − α ∇L^S(θ_{j−1}),  j = 1 … n;  meta-loss L^Q(θ_n), whose gradient is

    g_MAML = (I − αH_0)(I − αH_1) … (I − αH_{n−1}) ∇L^Q(θ_n),  H_j = ∇²L^S(θ_j)

    (with the factor of the first step leftmost). `order="first"` drops every H_j. MAML is not a
    second-order optimizer: only the meta-gradient contains second derivatives.

    Params: `{"model": the network's parameters}`, with "hyper" where `hyper` is given, and "population"
    after `jm.calibrate`. Adapted: `{"model": fast weights, "stats": statistics that normalise the queries}`,
    where "stats" is None if each batch of queries is normalised by its own statistics.

    A stochastic network (dropout) uses a new key in each inner step, in training and in `adapt`, and in the
    query loss; `predict` and batch statistics are deterministic.

    Args:
      model: network, of any kind that `jm.nn.as_model` accepts; its output width is the number of ways.
      inner_lr: step size α of the inner loop's gradient descent on the mean loss of the support set. The
        paper's code divides its loss by K and sums it over N·K support examples, so its step size is 1/N of
        this one: α = 0.4 there is 2.0 here at 5 ways.
      inner_optimizer: optimizer of the inner loop in place of `inner_lr`: any optax transformation, or a
        function `hyper -> transformation` of meta-learned hyperparameters; None for plain gradient
        descent. Schedules count inner steps; to accumulate gradients over mini-batches (`inner_batch`), wrap
        the optimizer in `optax.MultiSteps`. See `jm.inner_loop`.
      hyper: initial values of the inner optimizer's meta-learned hyperparameters, any tree, or a function
        `(key, adapted leaves) -> tree`; None for no hyperparameters. For a learned step size, use
        `inner_optimizer=optax.sgd, hyper=0.4`.
      inner_steps: number n of inner steps in training, at least 1.
      eval_steps: inner steps at validation and test, in `adapt`, at least 0; as in training if None.
      inner_batch: support examples in each inner step, taken cyclically from a random order; all if None.
      order: order of the meta-gradient: "second" differentiates through the inner gradients, "first" treats
        them as constants, "implicit" differentiates the condition for a minimum; see `jm.inner_loop`.
      memory: how the backward pass obtains the values of each inner step, under order "second" and "first":
        it keeps them ("store"), recomputes them ("recompute", and by forward mode "forward_over_reverse"), or
        chooses by their size ("auto"); see `jm.inner_loop`.
      truncation: inner steps between cuts of the meta-gradient, counted from the last; no cuts if None. See
        `jm.inner_loop`.
      proximal: weight λ of the term (λ/2)‖φ − θ‖² in the inner loss; no such term if None. Order "implicit"
        needs it.
      cg_steps: maximum number of conjugate gradient steps, under order "implicit".
      damping: number added to the identity in I + H/λ, under order "implicit".
      norm: source of the batch statistics that normalise the queries. "batch": the queries themselves
        (transductive; the published numbers). "support": the support set at the adapted weights (inductive).
        "episode": the running average over the inner steps, with weight 0.9 for the newest, on the support
        set (inductive). "population": statistics filled by `jm.calibrate` at the meta-parameters, also in the
        inner loop (inductive; trains like "batch"). It changes no parameter, so that learners with any of
        these can use the same trained `params`.
      adapts: parameters that the inner loop changes, as patterns of their paths, such as head or
        **/ConvNorm_3; all if None. In Python also a predicate on a path ("Conv_0/kernel"). The others are
        shared by all tasks and still receive the meta-gradient. See `jm.transfer.matching`.
      loss: loss function `(outputs, y, mask) -> scalar` of both loops.
      metric: metric `(outputs, y, mask) -> scalar or (sum, count)`, reported under the function's name in
        addition to the loss, and measured by `jm.evaluate`. None for the accuracy of classes, or the mean
        squared error of outputs that have the targets' shape, or otherwise the loss alone.

    Returns:
      A `Learner`.

    Raises:
      ValueError: an unknown `norm`; a negative `inner_lr`; `inner_steps` below 1 or `eval_steps` below 0;
        `hyper` without an `inner_optimizer` that is a function of it, or the reverse; `hyper` under
        "implicit"; `adapts` matches no leaf; outputs not of shape (n, ways); norm="population" with params
        that were not calibrated; errors of `jm.inner_loop`.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> tasks = jm.tasks.sinusoid(shots=10, queries=10)
      >>> learner = jm.maml(jm.nn.MLP(out=1), inner_lr=0.01, loss=jm.losses.mse)
      >>> task = tasks.sample(jax.random.key(0))
      >>> params = learner.init(jax.random.key(1), task)
      >>> adapted = learner.adapt(params, task.support, jax.random.key(2))
      >>> learner.predict(params, adapted, task.query.x).shape
      (10, 1)

    References:
      Finn, Abbeel & Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks,
      2017, algorithms 1 and 2.
    """
    network = adaptation(
        model,
        inner_optimizer=choose_optimizer(inner_lr, inner_optimizer),
        hyper=hyper,
        inner_steps=inner_steps,
        eval_steps=eval_steps,
        inner_batch=inner_batch,
        norm=norm,
        adapts=adapts,
        loss=loss,
        metric=metric,
        order=order,
        memory=memory,
        truncation=truncation,
        proximal=proximal,
        cg_steps=cg_steps,
        damping=damping,
    )

    def task_loss(
        params: Params, task: Task, key: Key, step: jax.Array | None = None
    ) -> tuple[jax.Array, Metrics]:
        del step
        support, query = map(blank_padding, task)
        weights, trace = network.fit(params, support, key)
        stats = network.query_statistics(params, weights, support, trace)
        return network.query_loss(weights, query, key, stats)

    return network.learner(task_loss)


@declare.learner()
@declare.forwards(maml)
def fomaml(model: Network, **settings: Unpack[FomamlSettings]) -> Learner:
    """Build FOMAML, MAML without second derivatives (Finn et al. 2017).

    This is `jm.maml(model, order="first")`. g_FOMAML = ∇L^Q(θ_n): the inner gradients are constants, so no
    second derivative is computed.

    Args:
      model: network to meta-learn; see `jm.maml`.
      **settings: settings of `jm.maml`.

    Returns:
      A `Learner`.

    Raises:
      ValueError: errors of `jm.maml`.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> learner = jm.fomaml(jm.nn.MLP(out=1), inner_lr=0.01, loss=jm.losses.mse)
      >>> task = jm.tasks.sinusoid(shots=10, queries=10).sample(jax.random.key(0))
      >>> params = learner.init(jax.random.key(1), task)
      >>> value, metrics = learner.loss(params, task, jax.random.key(2))
      >>> sorted(metrics)
      ['loss', 'mse']

    References:
      Finn, Abbeel & Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017,
      section 5.2.
    """
    return maml(model, order="first", **settings)
