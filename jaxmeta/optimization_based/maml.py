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
from jaxmeta.optimization_based.adaptation import adaptation, descent
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

    (the factor of the first step stands leftmost). `order="first"` drops every H_j. MAML is not a
    second-order optimizer: only the meta-gradient contains second derivatives.

    Params: `{"model": the network's parameters}`, with "hyper" where `hyper` is given, and "population"
    once `jm.calibrate` filled it. Adapted: `{"model": fast weights, "stats": what normalises the
    queries}`, the latter None where it is their own statistics.

    A stochastic network (dropout) draws anew in each inner step, of training and of `adapt`, and
    in the query loss; `predict` and batch statistics are deterministic.

    Args:
      model: a network of any kind that `jm.nn.as_model` takes; its output width is the number of
        ways.
      inner_lr: step size α of the inner loop's gradient descent, for the mean loss of the support set. Where
        the paper's code sums its loss over N·K support examples after dividing by K, its step size is N
        times ours: α = 0.4 there is 2.0 with our mean at 5 ways.
      inner_optimizer: optimizer of the inner loop, which takes the place of `inner_lr`: any optax
        transformation, or a function `hyper -> transformation` of what is meta-learned besides; None for
        plain gradient descent. Schedules count inner steps; gradients of mini-batches (`inner_batch`) are
        accumulated by `optax.MultiSteps(…).gradient_transformation()`. See `jm.inner_loop`.
      hyper: initial values of the inner optimizer's meta-learned hyperparameters, any tree, or a function
        `(key, adapted leaves) -> tree`; None where there are none. For a learned step size,
        `inner_optimizer=optax.sgd, hyper=0.4`.
      inner_steps: inner steps in training, n, at least 1.
      eval_steps: inner steps at validation and test, in `adapt`, at least 0; as in training if None.
      inner_batch: support examples in each inner step, in turns from a random order; all if None.
      order: derivatives in the meta-gradient: through the inner gradients too ("second"), without these
        ("first"), or of the condition for a minimum ("implicit"); see `jm.inner_loop`.
      memory: how the backward pass gets at the values of each inner step, under order "second" and "first":
        it keeps them ("store"), computes them again ("recompute", and by forward mode
        "forward_over_reverse"), or chooses by their size ("auto"); see `jm.inner_loop`.
      truncation: inner steps between cuts of the meta-gradient, counted from the last; no cuts if None. See
        `jm.inner_loop`.
      proximal: weight λ of (λ/2)‖φ − θ‖² in the inner loss; without that term if None. Order "implicit"
        needs it.
      cg_steps: most steps of conjugate gradients, under order "implicit".
      damping: what is added to the identity in I + H/λ, under order "implicit".
      norm: whose statistics normalise the queries, where the network has any. "batch": their own
        (transductive; the published numbers). "support": the support set's at the adapted
        weights (inductive). "episode": the running average, of weight 0.9 for the newest, of the
        support set's in each inner step (inductive). "population": those filled by `jm.calibrate` at the
        meta-parameters, in the inner loop too (inductive; trains like "batch"). It changes no parameter,
        so that one trained `params` serves a learner of each.
      adapts: parameters that the inner loop changes, as patterns of their paths, such as head or
        **/ConvNorm_3; all if None. In Python also a predicate on a path ("Conv_0/kernel"). The others are
        shared by all tasks and still receive the meta-gradient. See `jm.transfer.matching`.
      loss: `(outputs, y, mask) -> scalar`, of both loops.
      metric: `(outputs, y, mask) -> scalar or (sum, count)`, which is reported beside the loss under the
        function's name, and which `jm.evaluate` measures. None for the accuracy of classes and the mean
        squared error of outputs that have the targets' shape, and for the loss alone where they have not.

    Returns:
      A `Learner`.

    Raises:
      ValueError: an unknown `norm`; a negative `inner_lr`; `inner_steps` below 1 or `eval_steps` below 0;
        `hyper` without a function that takes it, or the other way round, or under "implicit"; `adapts` picks
        no leaf; the outputs are not `(n, ways)`; "population" asked of params that were not calibrated; and
        what `jm.inner_loop` raises.

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
        inner_optimizer=descent(inner_lr, inner_optimizer),
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
        return network.judge(weights, query, key, network.query_statistics(params, weights, support, trace))

    return network.learner(task_loss)


@declare.learner()
@declare.forwards(maml)
def fomaml(model: Network, **settings: Unpack[FomamlSettings]) -> Learner:
    """Build FOMAML, MAML without second derivatives (Finn et al. 2017).

    It is `jm.maml(model, order="first")`. g_FOMAML = ∇L^Q(θ_n): the inner gradients are constants, so no
    second derivative is computed.

    Args:
      model: as of `jm.maml`.
      **settings: as of `jm.maml`.

    Raises:
      ValueError: what `jm.maml` raises.

    References:
      Finn, Abbeel & Levine, 2017, section 5.2.
    """
    return maml(model, order="first", **settings)
