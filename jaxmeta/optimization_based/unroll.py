"""Loops of optimizer steps that are differentiable, and what their backward pass keeps.

All memory modes compute the same derivatives. "store" leaves the loop to `jax.lax.scan`, which keeps
every intermediate value of every step; the others keep the carry of each step, and run the step again.
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
    """`(theta, rest) -> (value, gradient in theta)`, to be differentiated as `order` and `memory` say.

    `rest` is `(batch, extra)`, with which `loss(theta, batch, **extra)` is called.
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
    """One step of a loop: `carry, seen = move(carry, measure(carry, index, given), index, given)`.

    Attributes:
      measure: the expensive part.
      move: the rest.
      constant: whether what is measured has no derivative.
    """

    measure: Callable[[PyTree, jax.Array, PyTree], PyTree]
    move: Callable[[PyTree, PyTree, jax.Array, PyTree], tuple[PyTree, PyTree]]
    constant: bool

    def __call__(self, carry: PyTree, index: jax.Array, given: PyTree) -> tuple[PyTree, PyTree]:
        return self.move(carry, self.measure(carry, index, given), index, given)

    def residual_bytes(self, carry: PyTree, given: PyTree) -> int:
        """What one step leaves for its backward pass, in bytes."""
        floats, others = partition((carry, given), inexact((carry, given)))

        def residuals(floats: PyTree) -> PyTree:
            def run(floats: PyTree) -> PyTree:
                carry, given = merge(floats, others)
                out = self(carry, jnp.zeros((), jnp.int32), given)
                return partition(out, inexact(out))[0]

            return jax.vjp(run, floats)[1]

        return sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(residuals, floats))
        )


def unroll(
    step: Step, carry: PyTree, given: PyTree, first: int, count: int, *, replays: bool
) -> tuple[PyTree, PyTree]:
    """The steps `first … first + count − 1` of a loop.

    Args:
      step: of the loop.
      carry: what steps hand on.
      given: what all steps see; it receives derivatives, too.
      first: index of the first step.
      count: number of steps.
      replays: whether the backward pass keeps the carry of each step, and what it measured where that is
        constant, and runs the step again for the rest.

    Returns:
      The last carry, and what the steps have seen, stacked.
    """
    if replays and count > 1:
        return _replay(step, carry, given, first, count)
    if count == 1:
        # A scan of one iteration would hide its body from the compiler's fusion with the rest.
        carry, seen = step(carry, jnp.asarray(first), given)
        return carry, jax.tree.map(lambda leaf: leaf[None], seen)
    return lax.scan(lambda carry, index: step(carry, index, given), carry, first + jnp.arange(count))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which leaves are differentiated; it rides along with arrays without being one."""

    leaves: tuple[bool, ...]


def _replay(step, carry, given, first, count):
    """`unroll` with a reverse-mode rule of its own.

    `jax.checkpoint` in a scan would keep as little. But the backward loop then slices each step's
    carry out of the stack where it is used, and XLA's CPU backend fuses that slice into whatever uses
    it: a pass over a layer's activations that reads its biases so was measured to take eleven times as
    long. Here each iteration fetches the slice for the next one, which makes it an array of its own.
    """
    indices = first + jnp.arange(count)

    @jax.custom_vjp
    def run(carry, given):
        return lax.scan(lambda carry, index: step(carry, index, given), carry, indices)

    def forward(carry, given):
        carry = jax.tree.map(lambda leaf: leaf.value, carry)
        wanted = _Wanted(tuple(leaf.perturbed for leaf in jax.tree.leaves(given)))
        given = jax.tree.map(lambda leaf: leaf.value, given)

        def keep(carry, index):
            measured = step.measure(carry, index, given)
            new, seen = step.move(carry, measured, index, given)
            return new, (seen, (carry, measured if step.constant else None))

        end, (seen, kept) = lax.scan(keep, carry, indices)
        return (end, seen), (kept, given, wanted)

    def backward(residuals, cotangents):
        kept, given, wanted = residuals
        wanted = jax.tree.unflatten(jax.tree.structure(given), wanted.leaves)
        wanted, rest = partition(given, jax.tree.map(lambda *both: all(both), wanted, inexact(given)))
        end_bar, seen_bar = jax.tree.map(_instantiated, cotangents)

        def at(place):
            return jax.tree.map(
                lambda stack: lax.dynamic_index_in_dim(stack, place, 0, keepdims=False), (kept, seen_bar)
            )

        def body(i, state):
            carry_bar, given_bar, ((carry, measured), here_bar) = state
            place = count - 1 - i
            floats, others = partition(carry, inexact(carry))

            def differentiable(floats, wanted):
                carry, given = merge(floats, others), merge(wanted, rest)
                index = first + place
                known = measured if step.constant else step.measure(carry, index, given)
                out = step.move(carry, known, index, given)
                return partition(out, inexact(out))[0]

            _, pullback = jax.vjp(differentiable, floats, wanted)
            carry_bar, more = pullback((carry_bar, here_bar))
            return carry_bar, jax.tree.map(jnp.add, given_bar, more), at(jnp.maximum(place - 1, 0))

        start = end_bar, jax.tree.map(jnp.zeros_like, wanted), at(count - 1)
        return lax.fori_loop(0, count, body, start)[:2]

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(carry, given)


def _instantiated(cotangent):
    """A cotangent as an array; None for that of an integer."""
    if cotangent.dtype == jax.dtypes.float0:
        return None
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def _forward_over_reverse(loss):
    """`value_and_grad` in theta whose VJP is the JVP of the gradient.

    For cotangents (v̄, ḡ) of (L, ∇_θ L) the pullback to any argument a is
    v̄ ∇_a L + ∇_a ⟨∇_θ L, ḡ⟩, and the second term is d/dε ∇_a L(θ + ε ḡ, …): one forward-mode
    derivative of the gradient in all arguments at once.
    """

    def run(theta, rest):
        floats, others = partition(rest, inexact(rest))

        def full_loss(theta, floats, others):
            batch, extra = merge(floats, others)
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
