"""Differentiable loops of optimizer steps, with a choice of residuals for the backward pass.

All memory modes compute the same derivatives. "store" leaves the loop to `jax.lax.scan`, which keeps
every intermediate value of every step; the others keep the carry of each step and run the step again.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmeta.optimization_based.trees import inexact, merge, partition

PyTree = Any


def value_and_gradient(loss: Callable[..., Any], order: str, memory: str) -> Callable[..., Any]:
    """Return `(theta, (batch, extra)) -> (value, gradient in theta)` of `loss(theta, batch, **extra)`.

    The result is differentiated according to `order` and `memory`.
    """

    def run(theta: PyTree, rest: PyTree) -> PyTree:
        batch, extra = rest
        return jax.value_and_grad(loss)(theta, batch, **extra)

    if order != "second":
        # The gradient is the constant here, not θ: the step θ_{j−1} → θ_j keeps its identity part.
        return lambda theta, rest: lax.stop_gradient(run(theta, rest))
    return _forward_over_reverse(loss) if memory == "forward_over_reverse" else run


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a loop: `carry, outputs = update(carry, measure(carry, index, inputs), index, inputs)`.

    Attributes:
      measure: the expensive part: the loss and its gradient.
      update: the optimizer's update.
      constant: True where the result of `measure` has no derivative.
    """

    measure: Callable[[PyTree, jax.Array, PyTree], PyTree]
    update: Callable[[PyTree, PyTree, jax.Array, PyTree], tuple[PyTree, PyTree]]
    constant: bool

    def __call__(self, carry: PyTree, index: jax.Array, inputs: PyTree) -> tuple[PyTree, PyTree]:
        return self.update(carry, self.measure(carry, index, inputs), index, inputs)

    def residual_bytes(self, carry: PyTree, inputs: PyTree) -> int:
        """Return the size of one step's residuals for its backward pass, in bytes."""
        floats, others = partition((carry, inputs), inexact((carry, inputs)))

        def residuals(floats: PyTree) -> PyTree:
            def run(floats: PyTree) -> PyTree:
                carry, inputs = merge(floats, others)
                out = self(carry, jnp.zeros((), jnp.int32), inputs)
                return partition(out, inexact(out))[0]

            return jax.vjp(run, floats)[1]

        return sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(residuals, floats))
        )


def unroll(
    step: Step, carry: PyTree, inputs: PyTree, first: int, count: int, *, replays: bool
) -> tuple[PyTree, PyTree]:
    """Run the steps `first … first + count − 1` of a loop.

    Args:
      step: step of the loop.
      carry: state passed from one step to the next.
      inputs: arguments shared by all steps, differentiable.
      first: index of the first step.
      count: number of steps.
      replays: if True, the backward pass keeps only the carry of each step, and its measured values where
        they are constant, and runs the step again for the rest.

    Returns:
      The last carry, and the stacked outputs of the steps.
    """
    if replays and count > 1:
        return _replay(step, carry, inputs, first, count)
    if count == 1:
        # A scan of one iteration would keep the compiler from fusing its body with the surrounding code.
        carry, outputs = step(carry, jnp.asarray(first), inputs)
        return carry, jax.tree.map(lambda leaf: leaf[None], outputs)
    return lax.scan(lambda carry, index: step(carry, index, inputs), carry, first + jnp.arange(count))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Differentiated:
    """Mask of the differentiated leaves, static so that it can be part of the residuals."""

    leaves: tuple[bool, ...]


def _replay(step, carry, inputs, first, count):
    """Run a loop by `unroll` with a custom reverse-mode rule.

    `jax.checkpoint` in a scan would keep as little, but its backward loop slices each step's carry out of
    the stack where it is used, and XLA's CPU backend fuses that slice into its users: a pass over a layer's
    activations that read its biases this way took eleven times as long. Here each iteration fetches the
    slice for the next one, so that the slice becomes a separate array.
    """
    indices = first + jnp.arange(count)

    @jax.custom_vjp
    def run(carry, inputs):
        return lax.scan(lambda carry, index: step(carry, index, inputs), carry, indices)

    def forward(carry, inputs):
        carry = jax.tree.map(lambda leaf: leaf.value, carry)
        differentiated = _Differentiated(tuple(leaf.perturbed for leaf in jax.tree.leaves(inputs)))
        inputs = jax.tree.map(lambda leaf: leaf.value, inputs)

        def keep(carry, index):
            measured = step.measure(carry, index, inputs)
            new, outputs = step.update(carry, measured, index, inputs)
            return new, (outputs, (carry, measured if step.constant else None))

        end, (outputs, kept) = lax.scan(keep, carry, indices)
        return (end, outputs), (kept, inputs, differentiated)

    def backward(residuals, cotangents):
        kept, inputs, differentiated = residuals
        mask = jax.tree.unflatten(jax.tree.structure(inputs), differentiated.leaves)
        mask = jax.tree.map(lambda *both: all(both), mask, inexact(inputs))
        differentiated, rest = partition(inputs, mask)
        end_bar, outputs_bar = jax.tree.map(_materialize, cotangents)

        def at(position):
            return jax.tree.map(
                lambda stack: lax.dynamic_index_in_dim(stack, position, 0, keepdims=False),
                (kept, outputs_bar),
            )

        def body(i, state):
            carry_bar, inputs_bar, ((carry, measured), output_bar) = state
            position = count - 1 - i
            floats, others = partition(carry, inexact(carry))

            def differentiable(floats, differentiated):
                carry, inputs = merge(floats, others), merge(differentiated, rest)
                index = first + position
                known = measured if step.constant else step.measure(carry, index, inputs)
                out = step.update(carry, known, index, inputs)
                return partition(out, inexact(out))[0]

            _, pullback = jax.vjp(differentiable, floats, differentiated)
            carry_bar, more = pullback((carry_bar, output_bar))
            return carry_bar, jax.tree.map(jnp.add, inputs_bar, more), at(jnp.maximum(position - 1, 0))

        start = end_bar, jax.tree.map(jnp.zeros_like, differentiated), at(count - 1)
        return lax.fori_loop(0, count, body, start)[:2]

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(carry, inputs)


def _materialize(cotangent):
    """Return a cotangent as an array, or None for the cotangent of an integer."""
    if cotangent.dtype == jax.dtypes.float0:
        return None
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def _forward_over_reverse(loss):
    """Return `value_and_grad` in theta with the JVP of the gradient as its VJP.

    For cotangents (v̄, ḡ) of (L, ∇_θ L) the pullback to any argument a is
    v̄ ∇_a L + ∇_a ⟨∇_θ L, ḡ⟩, and the second term is d/dε ∇_a L(θ + ε ḡ, …): one forward-mode
    derivative of the gradient in all arguments at once.
    """

    def run(theta, rest):
        floats, others = partition(rest, inexact(rest))

        def full_loss(theta, floats, others):
            batch, extra = merge(floats, others)
            return loss(theta, batch, **extra)

        # Integer leaves are an explicit argument, because a closure over traced values would leak them out
        # of the custom rule.
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
