"""Model-agnostic meta-learning: an initialisation from which a few gradient steps suffice."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxmeta import losses
from jaxmeta.core import Learner, Task, blank_padding
from jaxmeta.nn.adapters import Network, as_model, forward
from jaxmeta.nn.norm import from_moments, to_moments
from jaxmeta.optimization_based.inner_loop import inner_loop

NORMS = ("batch", "support", "population")


def maml(
    model: Network,
    *,
    inner_optimizer: optax.GradientTransformation = optax.sgd(0.4),  # noqa: B008 - immutable
    steps: int = 1,
    eval_steps: int | None = None,
    order: str = "second",
    memory: str = "auto",
    norm: str = "batch",
    adapts: Callable[[str], bool] | None = None,
    loss: Callable[..., jax.Array] = losses.cross_entropy,
) -> Learner:
    r"""MAML: meta-learns the initialisation θ of gradient descent.

    θ_0 = θ,  θ_j = θ_{j−1} − α ∇L^S(θ_{j−1}),  j = 1 … n;  meta-loss L^Q(θ_n), whose gradient is

    g_MAML = (I − αH_0)(I − αH_1) … (I − αH_{n−1}) ∇L^Q(θ_n),  H_j = ∇²L^S(θ_j)

    (the factor of the first step stands leftmost). `order="first"` drops every H_j. MAML is not a
    second-order optimizer: only the meta-gradient contains second derivatives.

    Params: `{"model": the network's parameters}`, and "population" once `jm.calibrate` filled it.
    Adapted: `{"model": fast weights, "stats": what normalises the queries}`, the latter None where
    it is their own statistics.

    A stochastic network (dropout) draws anew in each inner step, of training and of `adapt`, and
    in the query loss; `predict` and batch statistics are deterministic.

    Args:
      model: a network of any kind that `jm.nn.as_model` takes; its output width is the number of
        ways.
      inner_optimizer: of the inner loop. Where the paper's code sums its loss over N·K support
        examples after dividing by K, its step size is N times ours: α = 0.4 there is 2.0 with our
        mean at 5 ways.
      steps: n in training.
      eval_steps: n in `adapt`; the same as `steps` if None.
      order: "second" or "first" (see `jm.inner_loop`).
      memory: of the second-order backward pass (see `jm.inner_loop`).
      norm: which statistics normalise the queries, where the network has any. "batch": their own
        (transductive; the published numbers). "support": the support set's at the adapted
        weights (inductive). "population": those filled by `jm.calibrate` at the meta-parameters,
        in the inner loop too (inductive; trains like "batch"). It changes no parameter, so that
        one trained `params` serves a learner of each.
      adapts: which leaves the inner loop changes, as a predicate on their path ("Conv_0/kernel");
        all if None. The others are shared by all tasks and still receive the meta-gradient.
      loss: `(outputs, y, mask) -> scalar`, of both loops.

    Returns:
      A `Learner`.

    Raises:
      ValueError: an unknown `norm`, `order` or `memory`; negative steps; `adapts` picks no leaf; the
        outputs are not `(n, ways)`; "population" asked of params that were not calibrated.

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
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    model = as_model(model)
    eval_steps = steps if eval_steps is None else eval_steps

    def outputs_of(params, batch, stats=None, key=None):
        outputs, _ = forward(model, params, batch.x, mask=batch.mask, stats=stats, key=key)
        _check_outputs(outputs, batch)
        return outputs

    def statistics_of(params, batch):
        return forward(model, params, batch.x, mask=batch.mask)[1]

    def key_at(key, step):
        return jax.random.fold_in(key, step) if model.stochastic else None

    def support_loss(fast, batch, *, frozen, stats):
        support, key = batch
        outputs = outputs_of(_merge(fast, frozen), support, stats, key)
        return loss(outputs, support.y, support.mask)

    loops = {
        n: inner_loop(
            support_loss,
            inner_optimizer,
            n,
            order=order,
            memory=memory,
            batch_at=lambda batch, step: (batch[0], key_at(batch[1], step)),
        )
        for n in (steps, eval_steps)
    }

    def population(params):
        if "population" not in params:
            raise ValueError(
                'norm="population" needs filled statistics: call jm.calibrate on these params first'
            )
        return from_moments(params["population"])

    def adapt_with(loop, params, support, key, fixed_stats):
        fast, frozen = _partition(params["model"], adapts)
        fast, _ = loop(fast, (support, key), frozen=frozen, stats=fixed_stats)
        return _merge(fast, frozen)

    def init(key, task):
        params = model.init(key, task.support.x)
        _partition(params, adapts)
        jax.eval_shape(outputs_of, params, task.support)
        return {"model": params}

    def adapt(params, support, key):
        support = blank_padding(support)
        fixed = population(params) if norm == "population" else None
        fast = adapt_with(loops[eval_steps], params, support, key, fixed)
        return {"model": fast, "stats": statistics_of(fast, support) if norm == "support" else fixed}

    def predict(params, adapted, x, mask=None):
        del params
        return forward(model, adapted["model"], x, mask=mask, stats=adapted["stats"])[0]

    def task_loss(params, task, key, step=None):
        del step
        task = Task(*map(blank_padding, task))
        fast = adapt_with(loops[steps], params, task.support, key, None)
        stats = statistics_of(fast, task.support) if norm == "support" else None
        outputs = outputs_of(fast, task.query, stats, key_at(key, steps))
        value = loss(outputs, task.query.y, task.query.mask)
        return value, {"loss": (value, jnp.ones_like(value)), **losses.score(outputs, task.query)}

    def statistics(params, task, key):
        del key
        stats = [to_moments(statistics_of(params["model"], part)) for part in task]
        return jax.tree.map(lambda *s: sum(s), *stats), jnp.asarray(2.0)

    return Learner(init, adapt, predict, task_loss, statistics if model.apply_norm is not None else None)


def fomaml(model: Network, **settings) -> Learner:
    """First-order MAML: `maml(model, order="first", **settings)`.

    g_FOMAML = ∇L^Q(θ_n): the inner gradients are constants, so no second derivative is computed.

    References:
      Finn, Abbeel & Levine, 2017, section 5.2.
    """
    return maml(model, order="first", **settings)


def _partition(params, adapts):
    """`params` as two trees of its own structure, each with None where the other has a leaf."""
    picks = jax.tree_util.tree_map_with_path(
        lambda path, _: (
            adapts is None or bool(adapts(jax.tree_util.keystr(path, simple=True, separator="/")))
        ),
        params,
    )
    if not any(jax.tree.leaves(picks)):
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        raise ValueError(f"adapts picks no leaf to adapt; the leaves are {paths}")
    fast = jax.tree.map(lambda leaf, pick: leaf if pick else None, params, picks)
    frozen = jax.tree.map(lambda leaf, pick: None if pick else leaf, params, picks)
    return fast, frozen


def _merge(fast, frozen):
    return jax.tree.map(lambda a, b: b if a is None else a, fast, frozen, is_leaf=lambda leaf: leaf is None)


def _check_outputs(outputs, batch):
    examples, ways = batch.y.shape[0], batch.ways
    if not isinstance(outputs, jax.Array):
        raise ValueError(f"the model returns {type(outputs).__name__}; it must return one array of outputs")
    if outputs.ndim != 2 or outputs.shape[0] != examples:
        right = f"({examples}, {'outputs' if ways is None else ways})"
        raise ValueError(
            f"the model returns shape {outputs.shape} for {examples} examples; it must be {right}"
        )
    if ways is not None and outputs.shape[1] != ways:
        raise ValueError(
            f"the model has {outputs.shape[1]} outputs and the tasks have {ways} ways; "
            f"build it with an output width of {ways}"
        )
