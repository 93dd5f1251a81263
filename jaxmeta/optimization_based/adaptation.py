"""Adaptation of a network by gradient steps on a support set, shared by all optimization-based methods.

Each method's file builds its `Learner` from these functions: MAML uses them unchanged, the others replace
one or two.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxmeta import losses
from jaxmeta.checks import (
    ArgumentError,
    check_count,
    check_function,
    check_number,
    check_optimizer,
    check_slots,
    check_word,
    described,
    is_optimizer,
)
from jaxmeta.core import (
    Batch,
    InnerLoopNorm,
    Key,
    Learner,
    Loss,
    Metric,
    Metrics,
    Order,
    Params,
    PyTree,
    Task,
    blank_padding,
)
from jaxmeta.nn.adapters import Network, as_model, forward
from jaxmeta.nn.norm import population_of, to_moments
from jaxmeta.optimization_based.inner_loop import ORDERS, Trace, inner_loop, require_finite_derivative
from jaxmeta.optimization_based.settings import Adapts, Hyper, InnerOptimizer
from jaxmeta.optimization_based.trees import mask_by_path, merge, partition, paths
from jaxmeta.paths import matching, predicate

NORMS = get_args(InnerLoopNorm)
# Weight of the newest statistics in the running average of norm="episode" (Ravi & Larochelle's 1-shot code).
EPISODE_MOMENTUM = 0.9
# Inner steps fold their index into the key; no step has this index.
_SHUFFLE = np.uint32(0xFFFFFFFF)


class Adaptation(NamedTuple):
    """Pure functions of a network that adapts to support sets.

    Attributes:
      init: `(key, task) -> params`, with the network's initialisation under "model", and the other
        meta-learned parameters under "hyper" and "per_step".
      fit: `(params, support, key, *, steps, order, keep_path, stats, state, begin) -> (weights, trace)`: the
        inner loop. Keyword arguments default to their values in training; `stats` normalise the support set;
        `state` is the optimizer state to continue from, after `begin` steps.
      query_loss: `(weights, batch, key, stats=None, step=inner_steps) -> (loss, metrics)` of adapted weights
        on a batch, after `step` inner steps.
      query_statistics: `(params, weights, support, trace) -> stats` that normalise the queries in training;
        `trace` is read only under norm="episode".
      weights_at: `(params, fast, step) -> weights`: weights of the whole network, from the adapted leaves
        `fast` and the per-step parameters of step `step`.
      adapt, predict, statistics, metric: functions of the `Learner`.
    """

    init: Callable[[Key, Task], Params]
    fit: Callable[..., tuple[Params, Trace]]
    query_loss: Callable[..., tuple[jax.Array, Metrics]]
    query_statistics: Callable[..., PyTree]
    weights_at: Callable[[Params, PyTree, Any], Params]
    adapt: Callable[[Params, Batch, Key], PyTree]
    predict: Callable[..., jax.Array]
    statistics: Callable[[Params, Task, Key], PyTree] | None
    metric: Metric | None

    def learner(self, loss: Callable[..., tuple[jax.Array, Metrics]]) -> Learner:
        """Return the learner that trains by `loss`."""
        return Learner(self.init, self.adapt, self.predict, loss, self.statistics, metric=self.metric)


def adaptation(
    model: Network,
    *,
    inner_optimizer: InnerOptimizer,
    hyper: Hyper = None,
    inner_steps: int = 1,
    eval_steps: int | None = None,
    inner_batch: int | None = None,
    norm: InnerLoopNorm = "batch",
    adapts: Adapts | None = None,
    per_step: bool = False,
    loss: Loss = losses.cross_entropy,
    metric: Metric | None = None,
    order: Order = "second",
    **engine: Any,
) -> Adaptation:
    """Build the functions of a network that adapts, from the settings of `jm.maml` and `jm.inner_loop`.

    Args:
      per_step: whether each inner step has separate normalisation layers: scale, bias and population
        statistics. They are not adapted. Queries are normalised by the layers of the last step.
    """
    check_word("norm", norm, NORMS)
    check_count("inner_steps", inner_steps)
    if eval_steps is not None:
        check_count("eval_steps", eval_steps, 0)
    if inner_batch is not None:
        check_count("inner_batch", inner_batch)
    check_word("order", order, ORDERS)
    check_function("loss", loss)
    if metric is not None:
        check_function("metric", metric, "a function (outputs, y, mask) -> scalar or (sum, count)")
    elif loss not in (losses.cross_entropy, losses.mse):
        metric = losses.ScoreOrLoss(loss)
    _check_hyper(inner_optimizer, hyper, order)
    if order == "implicit":
        _check_implicit(eval_steps, inner_batch, norm)
    patterns = None if callable(adapts) else adapts
    is_adapted: Callable[[str], bool] | None = None
    if adapts is not None:
        is_adapted = adapts if callable(adapts) else predicate(adapts, "adapts")
    model = as_model(model, "model")
    eval_steps = inner_steps if eval_steps is None else eval_steps
    if norm == "episode" and eval_steps < 1:
        raise ArgumentError(
            "norm", 'got "episode", an average over inner steps, with eval_steps=0; it needs at least 1 step'
        )

    def outputs_of(weights: Params, batch: Batch, stats: PyTree = None, key: Key | None = None) -> jax.Array:
        outputs, _ = forward(model, weights, batch.x, mask=batch.mask, stats=stats, key=key)
        _check_outputs(outputs, batch)
        return outputs

    def statistics_of(weights: Params, batch: Batch) -> PyTree:
        return forward(model, weights, batch.x, mask=batch.mask)[1]

    def key_at(key: Key, step: Any) -> Key | None:
        return jax.random.fold_in(key, step) if model.stochastic else None

    def at_step(tree: PyTree, step: Any) -> PyTree:
        """Select the entry of one step in per-step parameters or statistics."""
        return jax.tree.map(lambda leaf: leaf[step], tree) if per_step else tree

    def batch_at(batch: tuple[Any, ...], step: Any) -> tuple[Any, ...]:
        support, key, begin = batch
        step = begin + step
        return minibatch(support, step, inner_batch), key_at(key, step), step

    def support_loss(
        fast: PyTree, batch: tuple[Any, ...], *, frozen: PyTree, stepwise: PyTree, stats: PyTree
    ) -> jax.Array:
        support, key, step = batch
        weights = merge(fast, frozen, at_step(stepwise, step))
        outputs = outputs_of(weights, support, at_step(stats, step), key)
        return loss(outputs, support.y, support.mask)

    @functools.cache
    def loop(steps: int, order: Order, keep_path: bool) -> Callable[..., Any]:
        return inner_loop(
            support_loss,
            inner_optimizer,
            steps,
            order=order,
            batch_at=batch_at,
            keep_path=keep_path,
            **engine,
        )

    # The loops are built here so that invalid settings raise errors before training; `fit` takes them from
    # the cache.
    for n in (inner_steps, eval_steps):
        loop(n, order, norm == "episode")

    def parts_of(params: Params) -> tuple[PyTree, PyTree, PyTree]:
        """Split the parameters into adapted leaves, frozen leaves and per-step leaves."""
        slow = params["model"]
        stepwise = params.get("per_step", jax.tree.map(lambda _: None, slow))
        if is_adapted is None:
            return slow, jax.tree.map(lambda _: None, slow), stepwise
        return *partition(slow, mask_by_path(slow, is_adapted)), stepwise

    def weights_at(params: Params, fast: PyTree, step: Any) -> Params:
        _, frozen, stepwise = parts_of(params)
        return merge(fast, frozen, at_step(stepwise, step))

    def last_index(steps: int) -> int:
        return max(steps - 1, 0)

    def fit(
        params: Params,
        support: Batch,
        key: Key,
        *,
        steps: int = inner_steps,
        order: Order = order,
        keep_path: bool = norm == "episode",
        stats: PyTree = None,
        state: PyTree = None,
        begin: Any = 0,
    ) -> tuple[Params, Trace]:
        fast, frozen, stepwise = parts_of(params)
        if inner_batch is not None:
            support = shuffled(support, key)
        fast, trace = loop(steps, order, keep_path)(
            fast,
            (support, key, begin),
            hyper=params.get("hyper"),
            state=state,
            frozen=frozen,
            stepwise=stepwise,
            stats=stats,
        )
        return weights_at(params, fast, last_index(steps)), trace

    def query_loss(
        weights: Params, batch: Batch, key: Key, stats: PyTree = None, step: Any = inner_steps
    ) -> tuple[jax.Array, Metrics]:
        outputs = outputs_of(weights, batch, stats, key_at(key, step))
        value = loss(outputs, batch.y, batch.mask)
        return value, {"loss": (value, jnp.ones_like(value)), **losses.scores(outputs, batch, metric)}

    def query_statistics(params: Params, weights: Params, support: Batch, trace: Trace | None) -> PyTree:
        if norm == "support":
            return statistics_of(weights, support)
        if norm != "episode":
            return None
        assert trace is not None
        return running_average(params, support, trace)

    def before_each_step(params: Params, trace: Trace) -> PyTree:
        """Return the adapted leaves at the start of each inner step."""
        start = parts_of(params)[0]
        return jax.tree.map(lambda s, path: jnp.concatenate([s[None], path[:-1]]), start, trace.path)

    def running_average(params: Params, support: Batch, trace: Trace) -> PyTree:
        """Average the statistics of the inner steps, starting from zero mean and unit variance."""
        count = trace.loss.shape[0]

        def step_statistics(fast_and_step: tuple[PyTree, jax.Array]) -> PyTree:
            fast, step = fast_and_step
            return statistics_of(weights_at(params, fast, step), support)

        stats = lax.map(step_statistics, (before_each_step(params, trace), jnp.arange(count)))
        decay = 1 - EPISODE_MOMENTUM
        weights = EPISODE_MOMENTUM * decay ** jnp.arange(count - 1, -1, -1.0)
        # After `count` steps the initial values, mean 0 and variance 1, keep the weight decay**count.
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                jnp.tensordot(weights.astype(leaf.dtype), leaf, 1)
                + decay**count * (jax.tree_util.keystr(path[-1:], simple=True) == "var")
            ),
            stats,
        )

    def init(key: Key, task: Task) -> Params:
        _check_loss(loss, task.support)
        slow = model.init(key, task.support.x)
        jax.eval_shape(outputs_of, slow, task.support)
        params: Params = {"model": slow}
        if per_step:
            layers = mask_by_path(slow, _in_layers_of(jax.eval_shape(statistics_of, slow, task.support)))
            stepwise, params["model"] = partition(slow, layers)
            params["per_step"] = jax.tree.map(lambda leaf: jnp.stack([leaf] * inner_steps), stepwise)
        fast, _, _ = parts_of(params)
        if patterns is not None:
            matching(params["model"], patterns, "adapts")
        if not jax.tree.leaves(fast):
            leaves = paths(params["model"])
            raise ArgumentError(
                "adapts", f"got a selection that matches no leaf; it must match at least one of {leaves}"
            )
        if hyper is not None:
            params["hyper"] = (
                hyper(jax.random.fold_in(key, 1), fast)
                if callable(hyper)
                else jax.tree.map(jnp.asarray, hyper)
            )
        return params

    def adapt(params: Params, support: Batch, key: Key) -> PyTree:
        if support.ways is None:
            outputs = jax.eval_shape(outputs_of, params["model"], support)
            check_slots("support", support.y, outputs.shape[1], support.mask)
        support = blank_padding(support)
        fixed = population_of(params) if norm == "population" else None
        weights, trace = fit(params, support, key, steps=eval_steps, stats=fixed)
        if norm == "population":
            return {"model": weights, "stats": at_step(fixed, last_index(eval_steps))}
        return {"model": weights, "stats": query_statistics(params, weights, support, trace)}

    def predict(params: Params, adapted: PyTree, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        del params
        return forward(model, adapted["model"], x, mask=mask, stats=adapted["stats"])[0]

    def statistics(params: Params, task: Task, key: Key) -> tuple[PyTree, jax.Array]:
        task = Task(*map(blank_padding, task))
        if not per_step:
            moments = [to_moments(statistics_of(params["model"], part)) for part in task]
        else:
            # Step j normalises the support set before its update, and the queries after it.
            _, trace = fit(params, task.support, key, keep_path=True)
            before = before_each_step(params, trace)
            moments = [
                lax.map(
                    lambda state: to_moments(statistics_of(weights_at(params, *state), part)),  # noqa: B023
                    (states, jnp.arange(inner_steps)),
                )
                for states, part in ((before, task.support), (trace.path, task.query))
            ]
        return jax.tree.map(lambda *s: sum(s), *moments), jnp.asarray(2.0)

    return Adaptation(
        init,
        fit,
        query_loss,
        query_statistics,
        weights_at,
        adapt,
        predict,
        statistics if model.apply_norm is not None else None,
        metric,
    )


def choose_optimizer(
    inner_lr: float,
    inner_optimizer: InnerOptimizer | None,
) -> InnerOptimizer:
    """Return `inner_optimizer`, or gradient descent of step size `inner_lr` where it is None."""
    check_number("inner_lr", inner_lr, 0)
    return optax.sgd(inner_lr) if inner_optimizer is None else inner_optimizer


def shuffled(batch: Batch, key: Key) -> Batch:
    """Return `batch` in random order, padding last; the order does not depend on the amount of padding."""
    key, count = jax.random.fold_in(key, _SHUFFLE), batch.y.shape[0]
    draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(jnp.arange(count))
    order = jnp.argsort(draws if batch.mask is None else jnp.where(batch.mask, draws, 2.0))
    return jax.tree.map(lambda leaf: leaf[order], batch)


def minibatch(batch: Batch, step: Any, size: int | None) -> Batch:
    """Return the mini-batch of step `step`: the next `size` examples, cyclically.

    Args:
      batch: examples, with padding last.
      step: index of the inner step, from 0.
      size: examples in a mini-batch; None, or a size of at least the batch's, for all.
    """
    if size is None or size >= batch.y.shape[0]:
        return batch
    offsets = jnp.arange(size)
    if batch.mask is None:
        return jax.tree.map(lambda leaf: leaf[(step * size + offsets) % leaf.shape[0]], batch)
    count = jnp.maximum(batch.mask.sum(), 1)
    part = jax.tree.map(lambda leaf: leaf[(step * size + offsets) % count], batch)
    return dataclasses.replace(part, mask=part.mask & (offsets < count))


def _in_layers_of(stats: PyTree) -> Callable[[str], bool]:
    """Return a predicate on paths: whether a parameter belongs to a layer with statistics."""
    layers = {path.rpartition("/")[0] for path in paths(stats)}
    return lambda path: path.rpartition("/")[0] in layers


def _check_hyper(inner_optimizer: Any, hyper: PyTree, order: str) -> None:
    fixed = is_optimizer(inner_optimizer)
    if fixed and hyper is not None:
        raise ArgumentError(
            "hyper",
            "got hyperparameters to learn, but inner_optimizer is a fixed transformation; pass "
            "inner_optimizer as a function of them, such as optax.sgd",
        )
    if not fixed and not callable(inner_optimizer):
        check_optimizer("inner_optimizer", inner_optimizer)
    if not fixed and hyper is None:
        raise ArgumentError(
            "inner_optimizer",
            f"got {described(inner_optimizer)}; it must be an optax transformation, or a function of "
            "hyperparameters together with their initial values, such as hyper=0.4",
        )
    if hyper is None:
        return
    if order == "implicit":
        raise ArgumentError(
            "order",
            'got "implicit", under which learned hyperparameters (hyper) receive no gradient, because the '
            'minimum does not depend on the path to it; use "second" or "first"',
        )
    if order == "second" and not callable(hyper):
        require_finite_derivative(inner_optimizer(jax.tree.map(jnp.asarray, hyper)))


def _check_implicit(eval_steps: int | None, inner_batch: int | None, norm: str) -> None:
    if eval_steps is not None and eval_steps < 1:
        raise ArgumentError("eval_steps", f'got {eval_steps}; it must be at least 1 under order="implicit"')
    if inner_batch is not None:
        raise ArgumentError(
            "inner_batch",
            f'got {inner_batch}; order="implicit" differentiates the minimum of the loss on all support '
            "examples; leave it out",
        )
    if norm == "episode":
        raise ArgumentError(
            "norm",
            'got "episode", an average over inner steps, which order="implicit" does not keep; use '
            '"batch", "support" or "population"',
        )


def _check_loss(loss: Callable[..., Any], batch: Batch) -> None:
    """Refuse cross_entropy on float targets and mse on class slots."""
    regression = jnp.issubdtype(batch.y.dtype, jnp.floating)
    if regression and loss is losses.cross_entropy:
        raise ArgumentError(
            "loss",
            f"got cross_entropy, which needs class slots, for {batch.y.dtype} targets of shape "
            f"{batch.y.shape}; for regression pass loss=jm.losses.mse",
        )
    if not regression and loss is losses.mse:
        raise ArgumentError(
            "loss",
            "got mse, which needs float targets, for tasks with class slots; pass "
            "loss=jm.losses.cross_entropy",
        )


def _check_outputs(outputs: Any, batch: Batch) -> None:
    examples, ways = batch.y.shape[0], batch.ways
    if not isinstance(outputs, jax.Array):
        raise ValueError(f"the model returns {type(outputs).__name__}; it must return one array of outputs")
    if outputs.ndim != 2 or outputs.shape[0] != examples:
        expected = f"({examples}, {'outputs' if ways is None else ways})"
        raise ValueError(
            f"the model returns shape {outputs.shape} for {examples} examples; it must be {expected}"
        )
    if ways is not None and outputs.shape[1] != ways:
        raise ValueError(
            f"the model has {outputs.shape[1]} outputs and the tasks have {ways} ways; "
            f"build it with an output width of {ways}"
        )
