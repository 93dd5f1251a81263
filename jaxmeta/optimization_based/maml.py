"""Model-agnostic meta-learning: an initialisation from which a few gradient steps suffice."""

from collections.abc import Callable

import jax
import optax

from jaxmeta import losses
from jaxmeta.core import Key, Learner, Metrics, Params, PyTree, Task, blank_padding
from jaxmeta.nn.adapters import Network
from jaxmeta.optimization_based.adaptation import adaptation


def maml(
    model: Network,
    *,
    inner_optimizer: optax.GradientTransformation
    | Callable[[PyTree], optax.GradientTransformation] = optax.sgd(0.4),  # noqa: B008 - immutable
    hyper: PyTree | Callable[[Key, PyTree], PyTree] = None,
    steps: int = 1,
    eval_steps: int | None = None,
    batch_size: int | None = None,
    order: str = "second",
    memory: str = "auto",
    truncation: int | None = None,
    proximal: float | None = None,
    cg_steps: int = 5,
    damping: float = 0.0,
    norm: str = "batch",
    adapts: Callable[[str], bool] | None = None,
    loss: Callable[..., jax.Array] = losses.cross_entropy,
) -> Learner:
    r"""MAML: meta-learns the initialisation θ of gradient descent.

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
      inner_optimizer: of the inner loop: any optax transformation, or a function `hyper ->
        transformation` of what is meta-learned besides. Where the paper's code sums its loss over N·K
        support examples after dividing by K, its step size is N times ours: α = 0.4 there is 2.0 with our
        mean at 5 ways.
      hyper: initial values of the inner optimizer's meta-learned hyperparameters, any tree, or a function
        `(key, adapted leaves) -> tree`; None where there are none. For a learned step size,
        `inner_optimizer=optax.sgd, hyper=0.4`.
      steps: n in training, at least 1.
      eval_steps: n in `adapt`, at least 0; the same as `steps` if None.
      batch_size: support examples in each inner step, taken in turns from a random order; all if None.
      order: "second", "first" or "implicit" (see `jm.inner_loop`).
      memory, truncation, proximal, cg_steps, damping: of the inner loop and its derivative (see
        `jm.inner_loop`).
      norm: which statistics normalise the queries, where the network has any. "batch": their own
        (transductive; the published numbers). "support": the support set's at the adapted
        weights (inductive). "episode": the running average, of weight 0.9 for the newest, of the
        support set's in each inner step (inductive). "population": those filled by `jm.calibrate` at the
        meta-parameters, in the inner loop too (inductive; trains like "batch"). It changes no parameter,
        so that one trained `params` serves a learner of each.
      adapts: which leaves the inner loop changes, as a predicate on their path ("Conv_0/kernel");
        all if None. The others are shared by all tasks and still receive the meta-gradient.
      loss: `(outputs, y, mask) -> scalar`, of both loops.

    Returns:
      A `Learner`.

    Raises:
      ValueError: an unknown `norm`; `steps` below 1 or `eval_steps` below 0; `hyper` without a function that
        takes it, or the other way round, or under "implicit"; `adapts` picks no leaf; the outputs are not
        `(n, ways)`; "population" asked of params that were not calibrated; and what `jm.inner_loop` raises.

    Examples:
      >>> import jax, optax, jaxmeta as jm
      >>> tasks = jm.tasks.sinusoid(shots=10, queries=10)
      >>> learner = jm.maml(jm.nn.MLP(out=1), inner_optimizer=optax.sgd(0.01), loss=jm.losses.mse)
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
        inner_optimizer=inner_optimizer,
        hyper=hyper,
        steps=steps,
        eval_steps=eval_steps,
        batch_size=batch_size,
        norm=norm,
        adapts=adapts,
        loss=loss,
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

    return Learner(network.init, network.adapt, network.predict, task_loss, network.statistics)


def fomaml(model: Network, **settings) -> Learner:
    """First-order MAML: `maml(model, order="first", **settings)`.

    g_FOMAML = ∇L^Q(θ_n): the inner gradients are constants, so no second derivative is computed.

    References:
      Finn, Abbeel & Levine, 2017, section 5.2.
    """
    return maml(model, order="first", **settings)
