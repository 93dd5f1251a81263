"""Gradient descent on one task, as a function that is itself differentiable.

What is differentiated (a loss, an optimizer, a number of steps) is apart from how (`order`,
`memory`): the three memory modes compute the same gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

PyTree = Any

ORDERS = ("second", "first")
MEMORY_MODES = ("auto", "store", "recompute", "forward_over_reverse")
# The longest unroll among the published training protocols of MAML.
AUTO_STORES_STEPS = 5


class Trace(NamedTuple):
    """What the inner loop saw on its way.

    Attributes:
      loss: `(steps,)` the inner loss before each update (the proximal term not included).
    """

    loss: Float[Array, " steps"]


def inner_loop(
    loss: Callable[..., Float[Array, ""]],
    optimizer: optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation],
    steps: int,
    *,
    order: str = "second",
    memory: str = "auto",
    batch_at: Callable[[Any, Array], Any] | None = None,
    proximal: float | None = None,
) -> Callable[..., tuple[PyTree, Trace]]:
    r"""Builds `adapt`: `steps` optimizer steps on one task's loss, differentiable in its arguments.

    θ_0 = params,  θ_j = θ_{j−1} + u(∇_θ [L(θ_{j−1}) + (λ/2)‖θ_{j−1} − θ_0‖²]),  j = 1 … steps

    Everything differentiable comes in as an argument of `adapt` and nothing is closed over, so
    learning rates, regularizers and a body shared with the head all receive exact gradients.

    Args:
      loss: `loss(params, batch, **extra) -> scalar`.
      optimizer: an optax transformation, or a function `hyper -> transformation` where `hyper`
        (a learning rate, say) is to be learned.
      steps: number of updates, at least 0.
      order: "second" differentiates through the inner gradients; "first" treats them as
        constants, which drops every second derivative.
      memory: how the second-order backward pass gets at each step's gradient.
        "store" keeps all intermediate values: memory grows with steps times activations.
        "recompute" keeps the parameters of each step and runs the step's gradient again.
        "forward_over_reverse" keeps the same, and replaces the backward pass through the
        gradient by the forward-mode derivative of the gradient (the Hessian is symmetric); it
        needs a `loss` that supports forward mode (no `jax.custom_vjp` without a JVP rule).
        "auto" is "store" for up to 5 steps, where it is the fastest, and
        "forward_over_reverse" for more, whose values may not fit.
      batch_at: `(batch, step) -> batch` picks each step's mini-batch; None is the full batch.
      proximal: λ above; None leaves the term out.

    Returns:
      `adapt(params, batch, *, hyper=None, **extra) -> (adapted, trace)`.

    Raises:
      ValueError: an unknown `order` or `memory`, or `steps` below 0.

    Examples:
      One step on ½·2·(θ − 1)², of step size 0.1, from 0; the meta-gradient of ½(θ' − 3)² is
      (1 − 0.1·2)·(θ' − 3):

      >>> import jax, optax, jaxmeta as jm
      >>> adapt = jm.inner_loop(lambda theta, s: (theta - s) ** 2, optax.sgd(0.1), steps=1)
      >>> meta_loss = lambda theta: 0.5 * (adapt(theta, 1.0)[0] - 3.0) ** 2
      >>> print(f"{jax.grad(meta_loss)(0.0):.2f}")
      -2.24

    References:
      Finn et al., Model-Agnostic Meta-Learning, 2017, equation 1; mixed-mode differentiation
      for the memory: Kemaev et al., Scalable Meta-Learning via Mixed-Mode Differentiation, 2025.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory must be one of {MEMORY_MODES}, got {memory!r}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if memory == "auto":
        memory = "store" if steps <= AUTO_STORES_STEPS else "forward_over_reverse"

    value_and_grad = _value_and_grad(loss, order, memory)

    def adapt(params, batch, *, hyper=None, **extra):
        transformation = (
            optimizer if isinstance(optimizer, optax.GradientTransformation) else optimizer(hyper)
        )

        def step(carry, index):
            theta, opt_state = carry
            examples = batch if batch_at is None else batch_at(batch, index)
            value, grads = value_and_grad(theta, (examples, extra))
            if proximal is not None:
                grads = jax.tree.map(lambda g, t, start: g + proximal * (t - start), grads, theta, params)
            updates, opt_state = transformation.update(grads, opt_state, theta)
            return (optax.apply_updates(theta, updates), opt_state), value

        carry = params, transformation.init(params)
        if steps == 1:
            # A scan of one iteration would hide its body from the compiler's fusion with the rest.
            (adapted, _), value = step(carry, jnp.zeros((), jnp.int32))
            return adapted, Trace(value[None])
        (adapted, _), values = lax.scan(step, carry, jnp.arange(steps))
        return adapted, Trace(values)

    return adapt


def _value_and_grad(loss, order, memory):
    """`(theta, rest) -> (value, gradient in theta)`, to be differentiated as `order` and `memory` say."""

    def run(theta, rest):
        batch, extra = rest
        return jax.value_and_grad(loss)(theta, batch, **extra)

    if order == "first":
        # The gradient is the constant here, not θ: the step θ_{j−1} → θ_j keeps its identity part.
        return lambda theta, rest: lax.stop_gradient(run(theta, rest))
    if memory == "store":
        return run
    if memory == "recompute":
        return jax.checkpoint(run)
    return _forward_over_reverse(loss)


def _forward_over_reverse(loss):
    """`value_and_grad` in theta whose VJP is the JVP of the gradient.

    For cotangents (v̄, ḡ) of (L, ∇_θ L) the pullback to any argument a is
    v̄ ∇_a L + ∇_a ⟨∇_θ L, ḡ⟩, and the second term is d/dε ∇_a L(θ + ε ḡ, …): one forward-mode
    derivative of the gradient in all arguments at once.
    """

    def split(tree):
        leaves = jax.tree.leaves(tree)
        structure = jax.tree.structure(tree)
        is_float = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]
        floats = [leaf for leaf, keep in zip(leaves, is_float, strict=True) if keep]
        others = [leaf for leaf, keep in zip(leaves, is_float, strict=True) if not keep]

        def join(floats, others):
            floats, others = iter(floats), iter(others)
            return jax.tree.unflatten(structure, [next(floats if keep else others) for keep in is_float])

        return floats, others, join

    def run(theta, rest):
        floats, others, join = split(rest)

        def full_loss(theta, floats, others):
            batch, extra = join(floats, others)
            return loss(theta, batch, **extra)

        # Integer leaves ride along as an explicit argument: a closure over traced values would
        # leak them out of the custom rule.
        @jax.custom_vjp
        def value_and_grad(theta, floats, others):
            return jax.value_and_grad(full_loss)(theta, floats, others)

        def forward(theta, floats, others):
            return value_and_grad(theta, floats, others), (theta, floats, others)

        def backward(residuals, cotangents):
            theta, floats, others = residuals
            value_bar, grad_bar = cotangents

            def gradient(theta):
                return jax.grad(full_loss, (0, 1))(theta, floats, others)

            first, second = jax.jvp(gradient, (theta,), (grad_bar,))
            theta_bar, floats_bar = jax.tree.map(lambda g, h: value_bar * g + h, first, second)
            return theta_bar, floats_bar, None

        value_and_grad.defvjp(forward, backward)
        return value_and_grad(theta, floats, others)

    return run
