"""Learned optimizer: an LSTM trained by gradient descent to propose parameter updates."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from jaxmeta import declare, losses
from jaxmeta.checks import ArgumentError, check_count, check_function, check_number, check_widths, check_word
from jaxmeta.core import (
    Batch,
    Key,
    Learner,
    Loss,
    Memory,
    Metric,
    Metrics,
    Params,
    PyTree,
    Task,
    UnrolledOrder,
    blank_padding,
)
from jaxmeta.nn.adapters import Network, as_model
from jaxmeta.nn.coordinatewise import ProposedUpdate
from jaxmeta.optimization_based.adaptation import adaptation, minibatch, shuffled
from jaxmeta.optimization_based.trees import inexact, paths

# Inner steps fold their index into the key; no step has this index.
_START = np.uint32(0xFFFFFFFE)


class Carry(NamedTuple):
    """State that one unroll passes to the next.

    Attributes:
      weights: weights of the optimizee.
      state: state of the learned optimizer.
      step: number of updates so far.
    """

    weights: Params
    state: PyTree
    step: Int[Array, ""]


# Not "population": the parameters hold no network whose statistics `jm.calibrate` could fill.
_Norm = Literal["batch", "support"]
Unroll: TypeAlias = Callable[[Params, Task, Carry | None, Key], tuple[Float[Array, ""], Carry]]


@declare.learner(
    training={
        "inner_steps": 100,
        "eval_steps": 100,
        "report_steps": (),
        "truncation": 20,
        "order": "first",
        # The paper's value; the official code has a tenth of it.
        "scale": 0.1,
    }
)
def learned_optimizer(
    model: Network,
    *,
    inner_steps: int = 100,
    eval_steps: int | None = None,
    truncation: int = 20,
    inner_batch: int | None = None,
    layers: tuple[int, ...] = (20, 20),
    preprocess: float | None = 10.0,
    scale: float = 0.01,
    zero_output: bool = False,
    order: UnrolledOrder = "first",
    memory: Memory = "auto",
    norm: _Norm = "batch",
    loss: Loss = losses.cross_entropy,
    metric: Metric | None = None,
) -> Learner:
    r"""Build a learned optimizer that trains a network from scratch (Andrychowicz et al. 2016).

    θ_{t+1} = θ_t + δ_t,  (δ_t, h_{t+1}) = m(∇f(θ_t), h_t; Θ),  meta-loss Σ_t f(θ_t)

    m is an LSTM applied to each coordinate separately (`jm.nn.ProposedUpdate`). A task is one optimization
    run: f is the loss of `model` on the support set, and θ_0 a random initialisation. `loss` runs all
    `inner_steps` in unrolls of `truncation` steps, between which no gradient flows. It is the sum of f over
    all unrolls, each with `truncation + 1` points including the last point of the previous unroll. The
    published training takes an outer step after each unroll: see `jm.learned_optimizer_unroll`, which carries
    the state of the run. Scores are measured on the query set at the end of the run. For the optimizer alone,
    see `jm.learned_optimizer_as_optax`.

    Params: `{"optimizer": Θ}`, whose size does not depend on `model`. Adapted: as in `jm.maml`.

    Args:
      model: optimizee, a network of any kind that `jm.nn.as_model` accepts.
      inner_steps: updates of a run in training, a multiple of `truncation`.
      eval_steps: updates at validation and test, in `adapt`; as in training if None.
      truncation: updates of an unroll; no gradient flows from one unroll into another.
      inner_batch: support examples in each update, taken cyclically from a random order; all if None.
      layers: features of each LSTM layer of the optimizer m; () for an update that is linear in the gradient.
      preprocess: constant p of `jm.nn.log_and_sign`, which preprocesses gradients; None for raw gradients.
      scale: factor of the update that m proposes.
      zero_output: if True, m's linear layer starts at zero, so that the first updates are zero.
      order: order of the meta-gradient: ∇f(θ_t) is a constant ("first", as published) or differentiated
        ("second").
      memory: how the backward pass obtains the values of each update; see `jm.maml`.
      norm: source of the batch statistics that normalise the queries; see `jm.maml`.
      loss: loss function f, `(outputs, y, mask) -> scalar`.
      metric: metric reported in addition to the loss; see `jm.maml`.

    Returns:
      A `Learner`.

    Raises:
      ValueError: `truncation` below 1, or one that does not divide `inner_steps`; `order` "implicit"; norm
        "population" (the parameters hold no network whose statistics could be filled); errors of
        `jm.inner_loop`.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> learner = jm.learned_optimizer(jm.nn.MLP(out=1), inner_steps=20, loss=jm.losses.mse)
      >>> task = jm.tasks.sinusoid(shots=10, queries=10).sample(jax.random.key(0))
      >>> params = learner.init(jax.random.key(1), task)
      >>> value, metrics = learner.loss(params, task, jax.random.key(2))
      >>> sorted(metrics)
      ['loss', 'mse', 'run']

    References:
      Andrychowicz et al., Learning to learn by gradient descent by gradient descent, 2016. Defaults are those
      of the official code, except for its p of 5.
    """
    return _parts(
        model,
        inner_steps=inner_steps,
        eval_steps=eval_steps,
        truncation=truncation,
        inner_batch=inner_batch,
        layers=layers,
        preprocess=preprocess,
        scale=scale,
        zero_output=zero_output,
        order=order,
        memory=memory,
        norm=norm,
        loss=loss,
        metric=metric,
    )[0]


class LearnedOptimizerSettings(TypedDict, total=False):
    """All settings of `jm.learned_optimizer`."""

    inner_steps: int
    eval_steps: int | None
    truncation: int
    inner_batch: int | None
    layers: tuple[int, ...]
    preprocess: float | None
    scale: float
    zero_output: bool
    order: UnrolledOrder
    memory: Memory
    norm: _Norm
    loss: Loss
    metric: Metric | None


@declare.forwards(learned_optimizer)
def learned_optimizer_unroll(model: Network, **settings: Unpack[LearnedOptimizerSettings]) -> Unroll:
    """Build the unroll of a learned optimizer, for training with an outer step after each unroll.

    Args:
      model: optimizee; see `jm.learned_optimizer`.
      **settings: settings of `jm.learned_optimizer`, equal to those of the learner.

    Returns:
      `(params, task, carry, key) -> (loss, carry)`: the next `truncation` updates of a run and their loss,
      Σ f(θ_t) over the `truncation + 1` points from the carried one to the last. A `carry` of None starts a
      run, whose initialisation and mini-batches are drawn from `key`. No gradient flows from one unroll into
      the previous one.

    Raises:
      ValueError: errors of `jm.learned_optimizer`.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> network, settings = jm.nn.MLP(out=1), {"inner_steps": 20, "loss": jm.losses.mse}
      >>> task = jm.tasks.sinusoid(shots=10, queries=10).sample(jax.random.key(0))
      >>> params = jm.learned_optimizer(network, **settings).init(jax.random.key(1), task)
      >>> unroll = jm.learned_optimizer_unroll(network, **settings)
      >>> value, carry = unroll(params, task, None, jax.random.key(2))
      >>> int(carry.step)
      20
    """
    bound = inspect.signature(learned_optimizer).bind(model, **settings)
    bound.apply_defaults()
    return _parts(*bound.args, **bound.kwargs)[1]


def learned_optimizer_as_optax(
    params: Params,
    *,
    layers: tuple[int, ...] = (20, 20),
    preprocess: float | None = 10.0,
    scale: float = 0.01,
    zero_output: bool = False,
) -> optax.GradientTransformation:
    """Return a learned optimizer as an optax transformation, for any model and training loop.

    Args:
      params: parameters of a learner of `jm.learned_optimizer`.
      layers: features of each LSTM layer; this and the other settings must equal those of the learner.
      preprocess: constant p of the preprocessing; see `jm.learned_optimizer`.
      scale: factor of the proposed update; see `jm.learned_optimizer`.
      zero_output: see `jm.learned_optimizer`; it only affects initialisation.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      ValueError: errors of `jm.learned_optimizer` for these arguments. The transformation's `init` raises
        it for integer parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, jaxmeta as jm
      >>> learner = jm.learned_optimizer(jm.nn.MLP(out=1), loss=jm.losses.mse)
      >>> task = jm.tasks.sinusoid(shots=10, queries=10).sample(jax.random.key(0))
      >>> optimizer = jm.learned_optimizer_as_optax(learner.init(jax.random.key(1), task))
      >>> weights = {"w": jnp.ones((3, 2))}
      >>> updates, state = optimizer.update(weights, optimizer.init(weights), weights)
      >>> optax.apply_updates(weights, updates)["w"].shape
      (3, 2)
    """
    return _descent(_proposal(layers, preprocess, scale, zero_output), params["optimizer"])


def _proposal(
    layers: tuple[int, ...], preprocess: float | None, scale: float, zero_output: bool
) -> ProposedUpdate:
    check_number("scale", scale)
    if preprocess is not None:
        check_number("preprocess", preprocess, above=0)
    check_widths("layers", layers)
    return ProposedUpdate(tuple(layers), preprocess, scale, zero_output)


def _descent(proposal: ProposedUpdate, weights: PyTree) -> optax.GradientTransformation:
    """Return `proposal` with these weights as an optax transformation."""
    dtype = jnp.result_type(*jax.tree.leaves(weights))

    def init(params: PyTree) -> PyTree:
        integers = [
            path
            for path, is_float in zip(paths(params), jax.tree.leaves(inexact(params)), strict=True)
            if not is_float
        ]
        if integers:
            raise ArgumentError(
                "params",
                f"got integers in {integers}, which have no gradient; pass floating-point parameters only, "
                "or exclude the integers with optax.masked",
            )
        return proposal.initial(ravel_pytree(params)[0].size, dtype)

    def update(grads: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        del params
        flat, restore = ravel_pytree(grads)
        change: Any
        state, change = proposal.apply({"params": weights}, state, flat.astype(dtype))
        return restore(change.astype(flat.dtype)), state

    return optax.GradientTransformation(init, update)


def _parts(
    model: Network,
    *,
    inner_steps: int,
    eval_steps: int | None,
    truncation: int,
    inner_batch: int | None,
    layers: tuple[int, ...],
    preprocess: float | None,
    scale: float,
    zero_output: bool,
    order: UnrolledOrder,
    memory: Memory,
    norm: _Norm,
    loss: Callable[..., jax.Array],
    metric: Metric | None,
) -> tuple[Learner, Unroll]:
    """Build the learner, and the unroll of which its loss consists."""
    check_count("truncation", truncation)
    check_count("inner_steps", inner_steps)
    if inner_steps % truncation:
        raise ArgumentError(
            "inner_steps", f"got {inner_steps}; it must be a multiple of truncation = {truncation}"
        )
    if eval_steps is not None:
        check_count("eval_steps", eval_steps)
    # "implicit" is excluded because a learned optimizer need not reach a minimum.
    check_word("order", order, get_args(UnrolledOrder))
    check_word("norm", norm, get_args(_Norm))
    check_function("loss", loss)
    model = as_model(model, "model")
    proposal = _proposal(layers, preprocess, scale, zero_output)
    transformation = functools.partial(_descent, proposal)

    network = adaptation(
        model,
        inner_optimizer=transformation,
        # Declares that hyperparameters exist; their values are passed with each call.
        hyper=lambda key, fast: None,
        inner_steps=truncation,
        eval_steps=inner_steps if eval_steps is None else eval_steps,
        inner_batch=inner_batch,
        norm=norm,
        loss=loss,
        metric=metric,
        order=order,
        memory=memory,
    )

    def init(key: Key, task: Task) -> Params:
        jax.eval_shape(network.init, key, task)
        flat = jnp.zeros(1, jax.tree.leaves(jax.eval_shape(model.init, key, task.support.x))[0].dtype)
        return {"optimizer": proposal.init(key, proposal.initial(1, flat.dtype), flat)["params"]}

    def begin(support: Batch, key: Key) -> Params:
        return lax.stop_gradient(model.init(jax.random.fold_in(key, _START), support.x))

    def unroll(params: Params, task: Task, carry: Carry | None, key: Key) -> tuple[Float[Array, ""], Carry]:
        support = blank_padding(task.support)
        if carry is None:
            weights = begin(support, key)
            state = transformation(params["optimizer"]).init(weights)
            carry = Carry(weights, state, jnp.zeros((), jnp.int32))
        weights, state, step = lax.stop_gradient(carry)
        fitted, trace = network.fit(
            {"model": weights, "hyper": params["optimizer"]}, support, key, state=state, begin=step
        )
        last = (
            support
            if inner_batch is None
            else minibatch(shuffled(support, key), step + truncation, inner_batch)
        )
        end, _ = network.query_loss(fitted, last, key, step=step + truncation)
        return trace.loss.sum() + end, Carry(fitted, trace.state, step + truncation)

    def run_loss(
        params: Params, task: Task, key: Key, step: jax.Array | None = None
    ) -> tuple[jax.Array, Metrics]:
        del step
        value, carry = unroll(params, task, None, key)

        def next_unroll(carry: Carry, _: None) -> tuple[Carry, jax.Array]:
            value, carry = unroll(params, task, carry, key)
            return carry, value

        carry, values = lax.scan(next_unroll, carry, None, length=inner_steps // truncation - 1)
        support, query = map(blank_padding, task)
        stats = network.query_statistics({"model": carry.weights}, carry.weights, support, None)
        _, metrics = network.query_loss(carry.weights, query, key, stats, carry.step)
        total = value + values.sum()
        return total, {**metrics, "run": (total, jnp.ones_like(total))}

    def adapt(params: Params, support: Batch, key: Key) -> PyTree:
        weights = begin(blank_padding(support), key)
        return network.adapt({"model": weights, "hyper": params["optimizer"]}, support, key)

    return Learner(init, adapt, network.predict, run_loss, metric=network.metric), unroll
