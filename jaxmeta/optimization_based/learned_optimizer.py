"""Learning to learn by gradient descent by gradient descent: an optimizer that is a small LSTM."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from jaxmeta import losses
from jaxmeta.checks import ArgumentError, check_count, check_function, check_number, check_widths, check_word
from jaxmeta.core import Batch, Key, Learner, Metrics, Params, PyTree, Task, blank_padding
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


class LearnedOptimizer(Learner):
    """A `Learner` that is an optimizer, too.

    Attributes:
      unroll: `(params, task, carry, key) -> (loss, carry)`: the next `truncation` updates of a run and
        their loss, Σ f(θ_t) over the `truncation + 1` points from the one carried over to the last;
        a `carry` of None begins the run, whose start and mini-batches are drawn from `key`. No gradient
        flows from one unroll into the one before.
      as_optax: `(params) -> optax.GradientTransformation`, for any model and training loop.
    """

    unroll: Callable[..., tuple[Float[Array, ""], Carry]]
    as_optax: Callable[[Params], optax.GradientTransformation]


def learned_optimizer(
    model: Network,
    *,
    steps: int = 100,
    eval_steps: int | None = None,
    truncation: int = 20,
    batch_size: int | None = None,
    layers: Sequence[int] = (20, 20),
    preprocess: float | None = 10.0,
    scale: float = 0.01,
    zero_output: bool = False,
    order: str = "first",
    memory: str = "auto",
    norm: str = "batch",
    loss: Callable[..., jax.Array] = losses.cross_entropy,
) -> LearnedOptimizer:
    r"""Learning to learn by gradient descent by gradient descent.

    θ_{t+1} = θ_t + δ_t,  (δ_t, h_{t+1}) = m(∇f(θ_t), h_t; Θ),  meta-loss Σ_t f(θ_t)

    m is an LSTM on each coordinate by itself (`jm.nn.ProposedUpdate`). A task is one optimization run: f is
    the loss of `model` on the support set, θ_0 a new initialisation of it. `loss` runs all `steps` in
    unrolls of `truncation`, between which no gradient flows; it is the sum over unrolls, in each over
    `truncation + 1` points, the first of which is the last one's end. The published training takes an
    outer step after each unroll: that is `unroll`, which carries the run's state. Scores are of the
    query set, at the end of the run.

    Params: `{"optimizer": Θ}`, whose size does not depend on `model`. Adapted: as of `jm.maml`.

    Args:
      model: the optimizee, of any kind that `jm.nn.as_model` takes.
      steps: updates of a run in training, a multiple of `truncation`.
      eval_steps: updates in `adapt`; the same as `steps` if None.
      truncation: updates of an unroll.
      batch_size: support examples of each step's f, taken in turns from a random order; all if None.
      layers: features of m's LSTM layers; () for an update that is linear in the gradient.
      preprocess: p of `jm.nn.log_and_sign`; None to hand m the raw gradients.
      scale: of m's output.
      zero_output: whether m's linear layer starts at zero, and so with no update at all.
      order: "first", in which ∇f(θ_t) is a constant, as published; "second" differentiates it.
      memory: of the backward pass (see `jm.inner_loop`).
      norm: which statistics normalise the queries: "batch" or "support" (see `jm.maml`).
      loss: f, `(outputs, y, mask) -> scalar`.

    Returns:
      A `LearnedOptimizer`: a `Learner` with `unroll` and `as_optax`.

    Raises:
      ValueError: `truncation` below 1, or one that does not divide `steps`; `order` "implicit"; norm
        "population" (there is no network to fill statistics of); by `as_optax`, integer parameters; and
        what `jm.inner_loop` raises.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, jaxmeta as jm
      >>> learner = jm.learned_optimizer(jm.nn.MLP(out=1), steps=20, loss=jm.losses.mse)
      >>> task = jm.tasks.sinusoid(shots=10, queries=10).sample(jax.random.key(0))
      >>> params = learner.init(jax.random.key(1), task)
      >>> value, carry = learner.unroll(params, task, None, jax.random.key(2))
      >>> int(carry.step)
      20
      >>> optimizer = learner.as_optax(params)
      >>> weights = {"w": jnp.ones((3, 2))}
      >>> updates, state = optimizer.update(weights, optimizer.init(weights), weights)
      >>> optax.apply_updates(weights, updates)["w"].shape
      (3, 2)

    References:
      Andrychowicz et al., Learning to learn by gradient descent by gradient descent, 2016; defaults of
      the official code, but for its p of 5.
    """
    check_count("truncation", truncation)
    check_count("steps", steps)
    if steps % truncation:
        raise ArgumentError("steps", f"got {steps}; it must be a multiple of truncation = {truncation}")
    if eval_steps is not None:
        check_count("eval_steps", eval_steps)
    # No "implicit": there is no minimum to reach.
    check_word("order", order, ("second", "first"))
    check_word("norm", norm, ("batch", "support"))
    check_function("loss", loss)
    check_number("scale", scale)
    if preprocess is not None:
        check_number("preprocess", preprocess, above=0)
    check_widths("layers", layers)
    model = as_model(model, "model")
    proposal = ProposedUpdate(tuple(layers), preprocess, scale, zero_output)

    def transformation(weights: PyTree) -> optax.GradientTransformation:
        dtype = jnp.result_type(*jax.tree.leaves(weights))

        def init(params: PyTree) -> PyTree:
            integers = [
                path
                for path, has in zip(paths(params), jax.tree.leaves(inexact(params)), strict=True)
                if not has
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

    network = adaptation(
        model,
        inner_optimizer=transformation,
        # Only there to say that there are some: they come with each call.
        hyper=lambda key, fast: None,
        steps=truncation,
        eval_steps=steps if eval_steps is None else eval_steps,
        batch_size=batch_size,
        norm=norm,
        loss=loss,
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
            if batch_size is None
            else minibatch(shuffled(support, key), step + truncation, batch_size)
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

        carry, values = lax.scan(more, carry, None, length=steps // truncation - 1)
        support, query = map(blank_padding, task)
        stats = network.query_statistics({"model": carry.weights}, carry.weights, support, None)
        _, metrics = network.judge(carry.weights, query, key, stats, carry.step)
        total = value + values.sum()
        return total, {**metrics, "run": (total, jnp.ones_like(total))}

    def adapt(params: Params, support: Batch, key: Key) -> PyTree:
        weights = begin(blank_padding(support), key)
        return network.adapt({"model": weights, "hyper": params["optimizer"]}, support, key)

    def as_optax(params: Params) -> optax.GradientTransformation:
        return transformation(params["optimizer"])

    learner = LearnedOptimizer(init, adapt, network.predict, run_loss)
    learner.unroll, learner.as_optax = unroll, as_optax
    return learner
