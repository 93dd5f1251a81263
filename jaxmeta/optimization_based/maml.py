"""Model-agnostic meta-learning: an initialisation from which a few gradient steps suffice."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmeta import losses
from jaxmeta.core import Learner, Params, PyTree, Task, blank_padding
from jaxmeta.nn.adapters import Network, as_model
from jaxmeta.nn.norm import from_moments, to_moments
from jaxmeta.optimization_based.inner_loop import inner_loop

NORMS = ("batch", "support", "population")


class Adapted(NamedTuple):
    """Fast weights of one task, and the statistics that normalise its queries (None: their own)."""

    model: Params
    stats: PyTree | None


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

    Args:
      model: a `Model` or Flax Linen module; its output width is the number of ways.
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
        output width is not `ways`; "population" asked of params that were not calibrated.

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

    def forward(params, x, mask, stats=None):
        if model.apply_norm is None:
            return model.apply(params, x), None
        return model.apply_norm(params, x, stats=stats, mask=mask)

    def support_loss(fast, batch, *, frozen, stats):
        outputs, _ = forward(_merge(fast, frozen), batch.x, batch.mask, stats)
        _check_width(outputs, batch)
        return loss(outputs, batch.y, batch.mask)

    def statistics_of(params, batch):
        return forward(params, batch.x, batch.mask)[1]

    loops = {
        n: inner_loop(support_loss, inner_optimizer, n, order=order, memory=memory)
        for n in (steps, eval_steps)
    }

    def population(params):
        if "population" not in params:
            raise ValueError(
                'norm="population" needs filled statistics: call jm.calibrate on these params first'
            )
        return from_moments(params["population"])

    def adapt_with(loop, params, support, fixed_stats):
        fast, frozen = _partition(params["model"], adapts)
        fast, _ = loop(fast, support, frozen=frozen, stats=fixed_stats)
        return _merge(fast, frozen)

    def init(key, task):
        params = model.init(key, task.support.x)
        _partition(params, adapts)
        jax.eval_shape(lambda p, s: _check_width(forward(p, s.x, s.mask)[0], s), params, task.support)
        return {"model": params}

    def adapt(params, support, key):
        del key
        support = blank_padding(support)
        fixed = population(params) if norm == "population" else None
        fast = adapt_with(loops[eval_steps], params, support, fixed)
        return Adapted(fast, statistics_of(fast, support) if norm == "support" else fixed)

    def predict(params, adapted, x, mask=None):
        del params
        return forward(adapted.model, x, mask, adapted.stats)[0]

    def task_loss(params, task, key, step=None):
        del key, step
        task = Task(*map(blank_padding, task))
        fast = adapt_with(loops[steps], params, task.support, None)
        stats = statistics_of(fast, task.support) if norm == "support" else None
        outputs, _ = forward(fast, task.query.x, task.query.mask, stats)
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


def _check_width(outputs, batch):
    if batch.ways is not None and outputs.shape[-1] != batch.ways:
        raise ValueError(
            f"the model has {outputs.shape[-1]} outputs and the tasks have {batch.ways} ways; "
            f"build it with an output width of {batch.ways}"
        )
