"""Differentiable inner loop: gradient descent on one task, with its meta-gradient.

The problem (a loss, an optimizer, a number of steps) is separate from its differentiation (`order`, `memory`,
`truncation`). All memory modes compute the same gradient; orders and truncations change it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float

from jaxmeta.checks import (
    ArgumentError,
    check_count,
    check_number,
    check_optimizer,
    check_word,
    described,
    is_optimizer,
)
from jaxmeta.core import Memory, Order
from jaxmeta.optimization_based.settings import InnerOptimizer
from jaxmeta.optimization_based.trees import inexact, merge, partition
from jaxmeta.optimization_based.unroll import Step, unroll, value_and_gradient

PyTree = Any
ORDERS = get_args(Order)
MEMORY_MODES = get_args(Memory)

# memory="auto" stores the intermediate values of all steps of one task up to these numbers of bytes. On a
# CPU, larger values leave the caches, and recomputing them is faster than reading them back. On an
# accelerator the limit keeps dozens of tasks of one meta-step in memory at once.
CPU_STORE_LIMIT = 1 << 23
ACCELERATOR_STORE_LIMIT = 1 << 28


class Trace(NamedTuple):
    """Record of an inner loop.

    Attributes:
      loss: inner loss before each update, of shape (steps,), without the proximal term. Under "first" its
        derivative flows only through the parameters at each step; under "implicit" it is constant.
      path: parameters after each update, with a leading axis of steps; None unless `keep_path` is set.
      state: optimizer state after the last update.
    """

    loss: Float[Array, " steps"]
    path: PyTree
    state: PyTree


class _LoopInputs(NamedTuple):
    """Inputs shared by all steps."""

    batch: PyTree
    extra: dict[str, PyTree]
    hyper: PyTree
    start: PyTree


def inner_loop(
    loss: Callable[..., Float[Array, ""]],
    optimizer: InnerOptimizer,
    steps: int,
    *,
    order: Order = "second",
    memory: Memory = "auto",
    truncation: int | None = None,
    batch_at: Callable[[Any, Array], Any] | None = None,
    proximal: float | None = None,
    cg_steps: int = 5,
    damping: float = 0.0,
    keep_path: bool = False,
) -> Callable[..., tuple[PyTree, Trace]]:
    r"""Build `adapt`, which takes `steps` optimizer steps on one task's loss and is differentiable.

    θ_0 = params,  θ_j = θ_{j−1} + u(∇_θ [L(θ_{j−1}) + (λ/2)‖θ_{j−1} − θ_0‖²]),  j = 1 … steps

    All differentiable values are arguments of `adapt` rather than closed over, so that learning rates,
    regularizers and a body shared with the head receive exact gradients.

    Args:
      loss: `loss(params, batch, **extra) -> scalar`.
      optimizer: an optax transformation, or a function `hyper -> transformation` to learn `hyper` (a learning
        rate, say). Optax transformations with extra arguments also receive the loss as `value`.
      steps: number of updates, at least 0.
      order: order of the meta-gradient. "second" differentiates through the inner gradients; "first" treats
        them as constants, which drops every second derivative. "implicit" takes the adapted parameters for
        the minimum φ of L(φ) + (λ/2)‖φ − θ‖² and differentiates its stationarity condition:
        ∂φ/∂θ = (I + H/λ)⁻¹ with H = ∇²L(φ), independent of the path. It needs `proximal`, is exact only
        where the loop converges, and takes no `hyper`, which would get no gradient.
      memory: how the backward pass obtains each step's intermediate values, under "second" and "first".
        "store" keeps all of them: memory grows with steps times activations. "recompute" keeps the parameters
        and the optimizer state of each step and recomputes the step's gradient. "forward_over_reverse" keeps
        the same, and replaces the backward pass through the gradient by the forward-mode derivative of the
        gradient (the Hessian is symmetric); it needs a `loss` that supports forward mode (no `jax.custom_vjp`
        without a JVP rule). Both define custom reverse-mode rules, so only "store" supports forward-mode
        differentiation of `adapt`. "auto" is "store" for a single step and for up to 8 MB of intermediate
        values on CPUs, 256 MB on accelerators; else "recompute". `benchmarks/memory.py` measures all modes.
      truncation: number K of steps between cuts of the meta-gradient, counted from the last step. No gradient
        flows from one segment of K steps into the previous one, through parameters or the optimizer state,
        except that the start of each segment depends on `params` as in first order. The meta-gradient in
        `params` is thus of second order through the last K steps and of first order through the others. None
        for no cuts.
      batch_at: `(batch, step) -> batch`, which selects each step's mini-batch; None for the full batch. Under
        "implicit", L is the loss on the batch selected for step `steps`, which should be the full batch.
      proximal: weight λ of the proximal term; None for no such term.
      cg_steps: maximum number of conjugate gradient steps for (I + H/λ)⁻¹ ∇L^Q, under "implicit". On a
        quadratic, as many steps as parameters give the exact solution.
      damping: number added to the identity in I + H/λ, for Hessians that are not positive definite, under
        "implicit".
      keep_path: if True, the trace holds the parameters after each update.

    Returns:
      `adapt(params, batch, *, hyper=None, state=None, **extra) -> (adapted, trace)`. The optimizer starts
      from `state` (such as an earlier `trace.state`), or from its initial state where that is None.

    Raises:
      ValueError: an unknown `order` or `memory`; `steps` below 0, or below 1 under "implicit"; `truncation`
        or `cg_steps` below 1; negative `proximal` or `damping`; "implicit" without a positive `proximal`, or
        with `truncation`, `keep_path` or an optimizer that is a function of `hyper`; an optimizer whose
        update is not differentiable in reverse mode, or under "second" has no finite derivative at a zero
        gradient, such as `optax.adam` without `eps_root`.
        By `adapt`: `hyper` missing for an optimizer that is a function of it, or given for one that is not.

    Examples:
      One step of size 0.1 on ½·2·(θ − 1)² from 0; the meta-gradient of ½(θ' − 3)² is (1 − 0.1·2)·(θ' − 3):

      >>> import jax, optax, jaxmeta as jm
      >>> adapt = jm.inner_loop(lambda theta, s: (theta - s) ** 2, optax.sgd(0.1), steps=1)
      >>> meta_loss = lambda theta: 0.5 * (adapt(theta, 1.0)[0] - 3.0) ** 2
      >>> print(f"{jax.grad(meta_loss)(0.0):.2f}")
      -2.24

      A schedule of optax, here with the step sizes 0.1 and 0.05, for which the meta-gradient is
      (1 − 0.1·2)(1 − 0.05·2)·(θ'' − 3):

      >>> falling = optax.sgd(optax.linear_schedule(0.1, 0.05, transition_steps=1))
      >>> adapt = jm.inner_loop(lambda theta, s: (theta - s) ** 2, falling, steps=2)
      >>> print(f"{jax.grad(lambda theta: 0.5 * (adapt(theta, 1.0)[0] - 3.0) ** 2)(0.0):.4f}")
      -1.9584

      Gradients accumulated over two mini-batches of one example, which equals one step of their mean:

      >>> optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
      >>> loss = lambda theta, s: (theta - s) ** 2
      >>> adapt = jm.inner_loop(loss, optimizer, steps=2, batch_at=lambda batch, step: batch[step])
      >>> print(f"{adapt(0.0, jax.numpy.array([1.0, 3.0]))[0]:.2f}")
      0.40

      A learned step size, whose meta-gradient is −∇L^S·∇L^Q:

      >>> adapt = jm.inner_loop(lambda theta, s: (theta - s) ** 2, optax.sgd, steps=1)
      >>> meta_loss = lambda rate: 0.5 * (adapt(0.0, 1.0, hyper=rate)[0] - 3.0) ** 2
      >>> print(f"{jax.grad(meta_loss)(0.1):.2f}")
      -5.60

    References:
      Finn et al., Model-Agnostic Meta-Learning, 2017, equation 1; Rajeswaran et al., Meta-Learning with
      Implicit Gradients, 2019, equation 6 and algorithm 2; mixed-mode differentiation for the memory:
      Kemaev et al., Scalable Meta-Learning via Mixed-Mode Differentiation, 2025; truncation: Shaban et
      al., Truncated Back-propagation for Bilevel Optimization, 2019.
    """
    if not callable(optimizer):
        check_optimizer("optimizer", optimizer)
    _check(order, memory, steps, truncation, proximal, cg_steps, damping, keep_path)
    fixed = is_optimizer(optimizer)
    if order == "implicit" and not fixed:
        raise ArgumentError(
            "optimizer",
            f'got {described(optimizer)}; order="implicit" needs an optax transformation, because a function '
            "of hyperparameters would give them no gradient: the minimum does not depend on the path to it",
        )
    if order == "second" and fixed:
        require_finite_derivative(optimizer)

    def transformation(hyper: PyTree) -> optax.GradientTransformationExtraArgs:
        built = optimizer if fixed else optimizer(hyper)  # type: ignore[operator]
        return optax.with_extra_args_support(built)

    def check_hyper(hyper: PyTree) -> None:
        if fixed and hyper is not None:
            unrolled = "" if order != "implicit" else ', and order="second" or "first"'
            raise ArgumentError(
                "hyper",
                "got hyperparameters, but the optimizer is a fixed transformation; build inner_loop with a "
                f"function of hyperparameters, such as optax.sgd{unrolled}",
            )
        if not fixed and hyper is None:
            raise ArgumentError(
                "hyper", "got None, but the optimizer is a function of hyperparameters; pass their values"
            )
        if not fixed and order == "second":
            leaves, structure = jax.tree.flatten(hyper)
            require_finite_derivative(
                optimizer, structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
            )

    def step_of(mode: str) -> Step:
        gradient = value_and_gradient(loss, order, mode)

        def measure(carry: PyTree, index: Array, inputs: _LoopInputs) -> PyTree:
            theta, _ = carry
            examples = inputs.batch if batch_at is None else batch_at(inputs.batch, index)
            value, grads = gradient(theta, (examples, inputs.extra))
            return value, grads

        def update(
            carry: PyTree, measured: PyTree, index: Array, inputs: _LoopInputs
        ) -> tuple[PyTree, PyTree]:
            (theta, state), (value, grads) = carry, measured
            if proximal is not None:
                grads = jax.tree.map(lambda g, t, s: g + proximal * (t - s), grads, theta, inputs.start)
            updates, state = transformation(inputs.hyper).update(grads, state, theta, value=value)
            if order == "first":
                # The gradient is already known: attaching it to the constant loss saves a second backward
                # pass through the network.
                value = value + _zero_with_gradient(measured[1], theta)
            theta = optax.apply_updates(theta, updates)
            return (theta, state), (value, theta if keep_path else None)

        return Step(measure, update, constant=order != "second")

    def cut(step: Step, every: int) -> Step:
        """Return `step` with its carry cut off from earlier steps at the start of each segment."""

        def release(carry: PyTree, index: Array, inputs: _LoopInputs) -> PyTree:
            theta, state = carry
            constant = lax.stop_gradient
            moved = jax.tree.map(lambda t, s: constant(t) + (s - constant(s)), theta, inputs.start)
            begins = (index > 0) & ((steps - index) % every == 0)
            released = moved, constant(state)
            return jax.tree.map(lambda new, old: jnp.where(begins, new, old), released, carry)

        return Step(
            lambda carry, index, inputs: step.measure(release(carry, index, inputs), index, inputs),
            lambda carry, measured, index, inputs: step.update(
                release(carry, index, inputs), measured, index, inputs
            ),
            step.constant,
        )

    def adapt(params, batch, *, hyper=None, state=None, **extra):
        check_hyper(hyper)
        params, batch, hyper, extra = jax.tree.map(_as_strong_type, (params, batch, hyper, extra))
        state = transformation(hyper).init(params) if state is None else state
        inputs = _LoopInputs(batch, extra, hyper, params)
        carry = params, jax.tree.map(_as_strong_type, state)
        if order == "implicit":
            return implicit(inputs, carry[1])
        _require_differentiable(transformation(hyper), carry)
        mode = memory if memory != "auto" else _choose_memory(step_of("store"), carry, inputs, steps)
        step = step_of(mode)
        if truncation is None or truncation >= steps:
            parts = [(0, steps)]
        else:
            # The last segment is a separate loop: where only it is differentiated, the backward pass ends
            # at its start.
            step, parts = cut(step, truncation), [(0, steps - truncation), (steps - truncation, truncation)]
        outputs = []
        for first, count in parts:
            carry, part = unroll(step, carry, inputs, first, count, replays=mode != "store")
            outputs.append(part)
        losses, path = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)
        return carry[0], Trace(losses, path, carry[1])

    def implicit(inputs: _LoopInputs, state: PyTree) -> tuple[PyTree, Trace]:
        def optimality(phi: PyTree, inputs: _LoopInputs) -> PyTree:
            """Return ∇[L/λ + ½‖φ − θ‖²], zero at the minimum and with derivative I + H/λ in φ."""
            batch = inputs.batch if batch_at is None else batch_at(inputs.batch, jnp.asarray(steps))
            grads = jax.grad(loss)(phi, batch, **inputs.extra)
            return jax.tree.map(lambda g, p, t: g / proximal + (p - t), grads, phi, inputs.start)

        @jax.custom_vjp
        def solve(inputs: _LoopInputs, state: PyTree) -> tuple[PyTree, Trace]:
            (phi, state), (losses, _) = unroll(
                step_of("store"), (inputs.start, state), inputs, 0, steps, replays=False
            )
            return phi, Trace(losses, None, state)

        def forward(inputs: _LoopInputs, state: PyTree) -> tuple[PyTree, PyTree]:
            phi, trace = solve(inputs, state)
            return (phi, trace), (phi, inputs)

        def backward(residuals: PyTree, cotangents: PyTree) -> tuple[PyTree, None]:
            phi, inputs = residuals
            floats, others = partition(inputs, inexact(inputs))
            _, operator = jax.linearize(lambda phi: optimality(phi, inputs), phi)

            def damped(v: PyTree) -> PyTree:
                return jax.tree.map(lambda a, b: a + damping * b, operator(v), v)

            tolerance = max(np.finfo(leaf.dtype).eps for leaf in jax.tree.leaves(phi))
            solved, _ = cg(damped, cotangents[0], tol=tolerance, maxiter=cg_steps)
            _, pullback = jax.vjp(lambda floats: optimality(phi, merge(floats, others)), floats)
            return *pullback(jax.tree.map(jnp.negative, solved)), None

        solve.defvjp(forward, backward)
        return solve(inputs, state)

    return adapt


def _check(order, memory, steps, truncation, proximal, cg_steps, damping, keep_path):
    check_word("order", order, ORDERS)
    check_word("memory", memory, MEMORY_MODES)
    check_count("steps", steps, 1 if order == "implicit" else 0)
    if truncation is not None:
        check_count("truncation", truncation)
    if proximal is not None:
        check_number("proximal", proximal, 0)
    check_count("cg_steps", cg_steps)
    check_number("damping", damping, 0)
    if order != "implicit":
        return
    if not proximal:
        raise ArgumentError(
            "proximal",
            f'got {proximal}; order="implicit" needs a positive weight of the proximal term, because '
            "otherwise the minimum does not depend on the initial parameters",
        )
    if truncation is not None or keep_path:
        name = "truncation" if truncation is not None else "keep_path"
        raise ArgumentError(
            name, 'got a value under order="implicit", which does not differentiate steps; leave it out'
        )


def _zero_with_gradient(gradient, theta):
    """Return 0 with derivative `gradient` in theta."""
    products = jax.tree.map(lambda g, t: jnp.vdot(g, t - lax.stop_gradient(t)), gradient, theta)
    return sum(jax.tree.leaves(products))


def _as_strong_type(leaf):
    """Return the leaf as a strongly typed array, because a step would change the type of a weak one."""
    if isinstance(leaf, jax.Array) and not getattr(leaf, "weak_type", False):
        return leaf
    return jnp.asarray(leaf, dtype=jnp.result_type(leaf))


def _choose_memory(step: Step, carry: PyTree, inputs: PyTree, steps: int) -> str:
    if steps <= 1:
        return "store"
    limit = CPU_STORE_LIMIT if jax.default_backend() == "cpu" else ACCELERATOR_STORE_LIMIT
    return "store" if steps * step.residual_bytes(carry, inputs) <= limit else "recompute"


def _require_differentiable(optimizer, carry):
    """Refuse an optimizer whose update has no reverse-mode derivative."""
    params, state = carry
    floats, others = partition((params, state), inexact((params, state)))

    def derivative(grads, floats):
        def update(grads, floats):
            params, state = merge(floats, others)
            out = optimizer.update(grads, state, params, value=jnp.zeros(()))
            return partition(out, inexact(out))[0]

        out, pullback = jax.vjp(update, grads, floats)
        return pullback(out)

    try:
        jax.eval_shape(derivative, params, floats)
    except Exception as error:
        raise ArgumentError(
            "optimizer",
            f"its update cannot be differentiated in reverse mode: {str(error).splitlines()[0]}; "
            'use another optimizer, or order="implicit", which does not differentiate it',
        ) from error


def require_finite_derivative(optimizer: Any, *hyper: Any) -> None:
    """Refuse an optimizer whose update has no finite derivative where one coordinate's gradient is zero.

    Inactive ReLUs and padding often make gradients exactly zero. The check is skipped for an optimizer that
    rejects a tree of one vector, or whose settings are traced.

    Args:
      optimizer: a transformation, or a function of hyperparameters.
      *hyper: tree structure and `((shape, dtype), …)` of the hyperparameters, for such a function.

    Raises:
      ValueError: the derivative is NaN or infinite.
    """
    try:
        finite = _has_finite_derivative(optimizer, *hyper)
    except Exception:
        return
    if not finite:
        raise ArgumentError(
            "optimizer",
            "the derivative of its update is not finite where a gradient is zero, so the meta-gradient would "
            "not be finite either; optimizers with a square root, such as optax.adam, need eps_root=1e-8",
        )


@functools.lru_cache(maxsize=128)
def _has_finite_derivative(optimizer: Any, structure: Any = None, leaves: tuple[Any, ...] = ()) -> bool:
    with jax.ensure_compile_time_eval():
        if not is_optimizer(optimizer):
            optimizer = optimizer(
                jax.tree.unflatten(structure, [jnp.full(shape, 0.1, dtype) for shape, dtype in leaves])
            )
        optimizer = optax.with_extra_args_support(optimizer)
        params, grads = {"w": jnp.zeros(2)}, {"w": jnp.array([0.0, 1.0])}
        state = optimizer.init(params)

        def update(grads):
            out = optimizer.update(grads, state, params, value=jnp.zeros(()))
            return partition(out, inexact(out))[0]

        out, pullback = jax.vjp(update, grads)
        (derivative,) = pullback(jax.tree.map(jnp.ones_like, out))
        return bool(jnp.isfinite(derivative["w"]).all())
