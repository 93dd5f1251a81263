"""Learning to learn by gradient descent by gradient descent: an optimizer that is a small LSTM."""

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

# Inner steps fold their number into the key: this is beyond every step.
_START = np.uint32(0xFFFFFFFE)


class Carry(NamedTuple):
    """What one unroll hands to the next.

    Attributes:
      weights: of the network that is optimized.
      state: of the learned optimizer.
      step: number of updates so far.
    """

    weights: Params
    state: PyTree
    step: Int[Array, ""]


# There is no network to fill population statistics of.
_Norm = Literal["batch", "support"]
Unroll: TypeAlias = Callable[[Params, Task, Carry | None, Key], tuple[Float[Array, ""], Carry]]


@declare.learner(
    training={
        "inner_steps": 100,
        "eval_steps": 100,
        "report_steps": (),
        "truncation": 20,
        "order": "first",
        # As in the paper; the official code has a tenth of it.
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
    r"""Build an optimizer learned by gradient descent, to train from scratch (Andrychowicz et al. 2016).

    θ_{t+1} = θ_t + δ_t,  (δ_t, h_{t+1}) = m(∇f(θ_t), h_t; Θ),  meta-loss Σ_t f(θ_t)

    m is an LSTM on each coordinate by itself (`jm.nn.ProposedUpdate`). A task is one optimization run: f is
    the loss of `model` on the support set, θ_0 a new initialisation of it. `loss` runs all `inner_steps` in
    unrolls of `truncation`, between which no gradient flows; it is the sum over unrolls, in each over
    `truncation + 1` points, the first of which is the last one's end. The published training takes an
    outer step after each unroll: see `jm.learned_optimizer_unroll`, which carries the run's state. Scores
    are of the query set, at the end of the run. `jm.learned_optimizer_as_optax` is the optimizer itself.

    Params: `{"optimizer": Θ}`, whose size does not depend on `model`. Adapted: as of `jm.maml`.

    Args:
      model: the optimizee, of any kind that `jm.nn.as_model` takes.
      inner_steps: updates of a run in training, a multiple of `truncation`.
      eval_steps: updates at validation and test, in `adapt`; as in training if None.
      truncation: updates of an unroll, between two of which no gradient flows.
      inner_batch: support examples of each update, in turns from a random order; all if None.
      layers: features of each LSTM layer of the optimizer m; () for an update that is linear in the gradient.
      preprocess: p of `jm.nn.log_and_sign`, which gradients pass first; None to hand m the raw gradients.
      scale: factor of the update that m proposes.
      zero_output: whether m's linear layer starts at zero, and so with no update at all.
      order: whether ∇f(θ_t) is a constant in the meta-gradient ("first", as published) or differentiated
        ("second").
      memory: how the backward pass gets at the values of each update; see `jm.maml`.
      norm: whose statistics normalise the queries, where the network has any; see `jm.maml`.
      loss: f, `(outputs, y, mask) -> scalar`.
      metric: what is reported beside the loss, as of `jm.maml`.

    Raises:
      ValueError: `truncation` below 1, or one that does not divide `inner_steps`; `order` "implicit"; norm
        "population" (there is no network to fill statistics of); and what `jm.inner_loop` raises.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> learner = jm.learned_optimizer(jm.nn.MLP(out=1), inner_steps=20, loss=jm.losses.mse)
      >>> task = jm.tasks.sinusoid(shots=10, queries=10).sample(jax.random.key(0))
      >>> params = learner.init(jax.random.key(1), task)
      >>> value, metrics = learner.loss(params, task, jax.random.key(2))
      >>> sorted(metrics)
      ['loss', 'mse', 'run']

    References:
      Andrychowicz et al., Learning to learn by gradient descent by gradient descent, 2016; defaults of
      the official code, but for its p of 5.
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
    """Build the unroll of a learned optimizer, for training that takes an outer step after each one.

    Args:
      model: as of `jm.learned_optimizer`.
      **settings: as of `jm.learned_optimizer`, to the learner of which the unroll belongs.

    Returns:
      `(params, task, carry, key) -> (loss, carry)`: the next `truncation` updates of a run and their loss,
      Σ f(θ_t) over the `truncation + 1` points from the one carried over to the last. A `carry` of None
      begins the run, whose start and mini-batches are drawn from `key`. No gradient flows from one unroll
      into the one before.

    Raises:
      ValueError: what `jm.learned_optimizer` raises.

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
    given = inspect.signature(learned_optimizer).bind(model, **settings)
    given.apply_defaults()
    return _parts(*given.args, **given.kwargs)[1]


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
      params: of the learner of `jm.learned_optimizer`.
      layers: as it was trained with, like the rest.
      preprocess: as of `jm.learned_optimizer`.
      scale: as of `jm.learned_optimizer`.
      zero_output: as of `jm.learned_optimizer`.

    Raises:
      ValueError: what `jm.learned_optimizer` raises of the same arguments; and by the transformation,
        integer parameters.

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
    """`proposal` of these weights as an optimizer."""
    dtype = jnp.result_type(*jax.tree.leaves(weights))

    def init(params: PyTree) -> PyTree:
        integers = [
            path for path, has in zip(paths(params), jax.tree.leaves(inexact(params)), strict=True) if not has
        ]
        if integers:
            raise ArgumentError(
                "params",
                f"got integers in {integers}, which have no gradient; a learned optimizer takes "
                "floating-point parameters (see optax.masked)",
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
    """The learner, and the unroll that its loss is made of."""
    check_count("truncation", truncation)
    check_count("inner_steps", inner_steps)
    if inner_steps % truncation:
        raise ArgumentError(
            "inner_steps", f"got {inner_steps}; it must be a multiple of truncation = {truncation}"
        )
    if eval_steps is not None:
        check_count("eval_steps", eval_steps)
    # No "implicit": there is no minimum to reach.
    check_word("order", order, get_args(UnrolledOrder))
    check_word("norm", norm, get_args(_Norm))
    check_function("loss", loss)
    model = as_model(model, "model")
    proposal = _proposal(layers, preprocess, scale, zero_output)
    transformation = functools.partial(_descent, proposal)

    network = adaptation(
        model,
        inner_optimizer=transformation,
        # Only there to say that there are some: they come with each call.
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
        end, _ = network.judge(fitted, last, key, step=step + truncation)
        return trace.loss.sum() + end, Carry(fitted, trace.state, step + truncation)

    def run_loss(
        params: Params, task: Task, key: Key, step: jax.Array | None = None
    ) -> tuple[jax.Array, Metrics]:
        del step
        value, carry = unroll(params, task, None, key)

        def more(carry: Carry, _: None) -> tuple[Carry, jax.Array]:
            value, carry = unroll(params, task, carry, key)
            return carry, value

        carry, values = lax.scan(more, carry, None, length=inner_steps // truncation - 1)
        support, query = map(blank_padding, task)
        stats = network.query_statistics({"model": carry.weights}, carry.weights, support, None)
        _, metrics = network.judge(carry.weights, query, key, stats, carry.step)
        total = value + values.sum()
        return total, {**metrics, "run": (total, jnp.ones_like(total))}

    def adapt(params: Params, support: Batch, key: Key) -> PyTree:
        weights = begin(blank_padding(support), key)
        return network.adapt({"model": weights, "hyper": params["optimizer"]}, support, key)

    return Learner(init, adapt, network.predict, run_loss, metric=network.metric), unroll
