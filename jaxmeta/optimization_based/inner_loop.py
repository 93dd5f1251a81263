"""Gradient descent on one task, as a function that is itself differentiable: the meta-gradient's engine.

What is differentiated (a loss, an optimizer, a number of steps) is apart from how (`order`, `memory`,
`truncation`): memory modes compute the same gradient, orders and truncations other ones.
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

from jaxmeta.checks import ArgumentError, check_count, check_number, check_optimizer, check_word
from jaxmeta.core import Memory, Order
from jaxmeta.optimization_based.settings import InnerOptimizer
from jaxmeta.optimization_based.trees import inexact, merge, partition
from jaxmeta.optimization_based.unroll import Step, unroll, value_and_gradient

PyTree = Any
ORDERS = get_args(Order)
MEMORY_MODES = get_args(Memory)

# Beyond these bytes of intermediate values, for all steps of one task, "auto" no longer stores them. On a
# CPU they would be written to memory and read back, which takes longer than to compute them again. An
# accelerator has them in reach as long as they fit, and a meta-step holds dozens of tasks at once.
CPU_STORES = 1 << 23
ACCELERATOR_STORES = 1 << 28


class Trace(NamedTuple):
    """What the inner loop saw on its way.

    Attributes:
      loss: `(steps,)` the inner loss before each update (the proximal term not included). Under "first" it
        moves with the parameters on the way, and with no other argument; under "implicit" it is constant.
      path: the parameters after each update, with a leading axis of steps; None unless asked for.
      state: the optimizer's state after the last update.
    """

    loss: Float[Array, " steps"]
    path: PyTree
    state: PyTree


class _Given(NamedTuple):
    """What every step sees."""

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
    r"""Builds `adapt`: `steps` optimizer steps on one task's loss, differentiable in its arguments.

    θ_0 = params,  θ_j = θ_{j−1} + u(∇_θ [L(θ_{j−1}) + (λ/2)‖θ_{j−1} − θ_0‖²]),  j = 1 … steps

    Everything differentiable comes in as an argument of `adapt` and nothing is closed over, so
    learning rates, regularizers and a body shared with the head all receive exact gradients.

    Args:
      loss: `loss(params, batch, **extra) -> scalar`.
      optimizer: an optax transformation, or a function `hyper -> transformation` where `hyper`
        (a learning rate, say) is to be learned. It is handed the loss as `value`, too, if it is
        one of optax's transformations with extra arguments.
      steps: number of updates, at least 0.
      order: "second" differentiates through the inner gradients; "first" treats them as constants,
        which drops every second derivative. "implicit" takes the adapted parameters for the minimum
        φ of L(φ) + (λ/2)‖φ − θ‖² and differentiates the condition that its gradient is zero:
        ∂φ/∂θ = (I + H/λ)⁻¹ with H = ∇²L(φ), whatever way led there. It needs `proximal`, gives exact
        gradients only where the loop converges, and none to `hyper`.
      memory: how the backward pass gets at each step's intermediate values, under "second" and "first".
        "store" keeps them all: memory grows with steps times activations.
        "recompute" keeps the parameters and the optimizer's state of each step and runs the step's
        gradient again. "forward_over_reverse" keeps the same, and replaces the backward pass through
        the gradient by the forward-mode derivative of the gradient (the Hessian is symmetric); it
        needs a `loss` that supports forward mode (no `jax.custom_vjp` without a JVP rule). Both have
        reverse-mode rules of their own: only "store" can itself be differentiated in forward mode.
        "auto" is "store" where what it keeps is small: for a single step, and up to 8 MB on CPUs,
        256 MB on accelerators; else "recompute". `benchmarks/memory.py` measures all modes.
      truncation: K, the number of steps between cuts, counted from the last step: no gradient flows from
        one segment of K steps into the one before, through parameters or the optimizer's state, except
        that the start of each segment still moves with `params` as in first order. So the
        meta-gradient in `params` is that of second order through the last K steps, of first order
        through the others. None cuts nothing.
      batch_at: `(batch, step) -> batch` picks each step's mini-batch; None is the full batch. "implicit"
        takes L to be the loss of what it picks for step `steps`, which should be the full batch.
      proximal: λ above; None leaves the term out.
      cg_steps: of "implicit": most steps of conjugate gradients, which solve for
        (I + H/λ)⁻¹ ∇L^Q. As many as there are parameters are exact on a quadratic.
      damping: of "implicit": added to the identity in I + H/λ, for Hessians that are not positive.
      keep_path: whether the trace holds the parameters after each update.

    Returns:
      `adapt(params, batch, *, hyper=None, state=None, **extra) -> (adapted, trace)`. With `state`, the
      optimizer goes on from there (a `trace.state`) in place of its initial state.

    Raises:
      ValueError: an unknown `order` or `memory`; `steps` below 0, or below 1 where "implicit";
        `truncation` or `cg_steps` below 1; negative `damping`; "implicit" without a positive `proximal`, or
        with `truncation` or `keep_path`; an optimizer that cannot be differentiated: its update has no
        reverse-mode derivative, or one that is not finite where a gradient is zero, such as that of
        `optax.adam` without `eps_root` ("second" only). And by `adapt`: no `hyper` for an optimizer that is
        a function of it, `hyper` for one that is none, or where "implicit".

    Examples:
      One step on ½·2·(θ − 1)², of step size 0.1, from 0; the meta-gradient of ½(θ' − 3)² is
      (1 − 0.1·2)·(θ' − 3):

      >>> import jax, optax, jaxmeta as jm
      >>> adapt = jm.inner_loop(lambda theta, s: (theta - s) ** 2, optax.sgd(0.1), steps=1)
      >>> meta_loss = lambda theta: 0.5 * (adapt(theta, 1.0)[0] - 3.0) ** 2
      >>> print(f"{jax.grad(meta_loss)(0.0):.2f}")
      -2.24

      Any schedule of optax is one of the inner loop, here of the step sizes 0.1 and 0.05; the meta-gradient
      is (1 − 0.1·2)(1 − 0.05·2)·(θ'' − 3):

      >>> falling = optax.sgd(optax.linear_schedule(0.1, 0.05, transition_steps=1))
      >>> adapt = jm.inner_loop(lambda theta, s: (theta - s) ** 2, falling, steps=2)
      >>> print(f"{jax.grad(lambda theta: 0.5 * (adapt(theta, 1.0)[0] - 3.0) ** 2)(0.0):.4f}")
      -1.9584

      Gradients accumulated over two mini-batches of one example, which are one step of their mean:

      >>> optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2).gradient_transformation()
      >>> loss = lambda theta, s: (theta - s) ** 2
      >>> adapt = jm.inner_loop(loss, optimizer, steps=2, batch_at=lambda batch, step: batch[step])
      >>> print(f"{adapt(0.0, jax.numpy.array([1.0, 3.0]))[0]:.2f}")
      0.40

      A learned step size, with the gradient −∇L^S·∇L^Q:

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
    if order == "second" and isinstance(optimizer, optax.GradientTransformation):
        require_finite_derivative(optimizer)

    def transformation(hyper: PyTree) -> optax.GradientTransformationExtraArgs:
        fixed = isinstance(optimizer, optax.GradientTransformation)
        built = optimizer if fixed else optimizer(hyper)  # type: ignore[operator]
        return optax.with_extra_args_support(built)

    def check_hyper(hyper: PyTree) -> None:
        fixed = isinstance(optimizer, optax.GradientTransformation)
        if fixed and hyper is not None:
            raise ArgumentError(
                "hyper", "got hyperparameters, but the optimizer is a transformation and takes none"
            )
        if not fixed and hyper is None:
            raise ArgumentError("hyper", "got None, but the optimizer is a function of hyperparameters")
        if not fixed and order == "second":
            leaves, structure = jax.tree.flatten(hyper)
            require_finite_derivative(
                optimizer, structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
            )

    def step_of(mode: str) -> Step:
        gradient = value_and_gradient(loss, order, mode)

        def measure(carry: PyTree, index: Array, given: _Given) -> PyTree:
            theta, _ = carry
            examples = given.batch if batch_at is None else batch_at(given.batch, index)
            value, grads = gradient(theta, (examples, given.extra))
            return value, grads

        def move(carry: PyTree, measured: PyTree, index: Array, given: _Given) -> tuple[PyTree, PyTree]:
            (theta, state), (value, grads) = carry, measured
            if proximal is not None:
                grads = jax.tree.map(lambda g, t, s: g + proximal * (t - s), grads, theta, given.start)
            updates, state = transformation(given.hyper).update(grads, state, theta, value=value)
            if order == "first":
                # The derivative of the loss is at hand: no second pass through the network.
                value = value + _zero_with_gradient(measured[1], theta)
            theta = optax.apply_updates(theta, updates)
            return (theta, state), (value, theta if keep_path else None)

        return Step(measure, move, constant=order != "second")

    def cut(step: Step, every: int) -> Step:
        """`step`, which begins a segment by letting go of where its carry came from."""

        def release(carry: PyTree, index: Array, given: _Given) -> PyTree:
            theta, state = carry
            constant = lax.stop_gradient
            moved = jax.tree.map(lambda t, s: constant(t) + (s - constant(s)), theta, given.start)
            begins = (index > 0) & ((steps - index) % every == 0)
            released = moved, constant(state)
            return jax.tree.map(lambda new, old: jnp.where(begins, new, old), released, carry)

        return Step(
            lambda carry, index, given: step.measure(release(carry, index, given), index, given),
            lambda carry, measured, index, given: step.move(
                release(carry, index, given), measured, index, given
            ),
            step.constant,
        )

    def adapt(params, batch, *, hyper=None, state=None, **extra):
        if order == "implicit" and hyper is not None:
            raise ArgumentError(
                "hyper",
                'got hyperparameters under order="implicit", which gives them no gradient: where the '
                "minimum lies does not depend on the way there; build the optimizer with fixed ones",
            )
        check_hyper(hyper)
        params, batch, hyper, extra = jax.tree.map(_strongly_typed, (params, batch, hyper, extra))
        state = transformation(hyper).init(params) if state is None else state
        given = _Given(batch, extra, hyper, params)
        carry = params, jax.tree.map(_strongly_typed, state)
        if order == "implicit":
            return implicit(given, carry[1])
        _require_differentiable(transformation(hyper), carry)
        mode = memory if memory != "auto" else _chosen_memory(step_of("store"), carry, given, steps)
        step = step_of(mode)
        if truncation is None or truncation >= steps:
            parts = [(0, steps)]
        else:
            # Apart from the last segment, so that where nothing else is differentiated the backward
            # pass ends with it.
            step, parts = cut(step, truncation), [(0, steps - truncation), (steps - truncation, truncation)]
        seen = []
        for first, count in parts:
            carry, part = unroll(step, carry, given, first, count, replays=mode != "store")
            seen.append(part)
        losses, path = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *seen)
        return carry[0], Trace(losses, path, carry[1])

    def implicit(given: _Given, state: PyTree) -> tuple[PyTree, Trace]:
        def optimality(phi: PyTree, given: _Given) -> PyTree:
            """∇[L/λ + ½‖φ − θ‖²], which is zero at the minimum; its derivative in φ is I + H/λ."""
            batch = given.batch if batch_at is None else batch_at(given.batch, jnp.asarray(steps))
            grads = jax.grad(loss)(phi, batch, **given.extra)
            return jax.tree.map(lambda g, p, t: g / proximal + (p - t), grads, phi, given.start)

        @jax.custom_vjp
        def solve(given: _Given, state: PyTree) -> tuple[PyTree, Trace]:
            (phi, state), (losses, _) = unroll(
                step_of("store"), (given.start, state), given, 0, steps, replays=False
            )
            return phi, Trace(losses, None, state)

        def forward(given: _Given, state: PyTree) -> tuple[PyTree, PyTree]:
            phi, trace = solve(given, state)
            return (phi, trace), (phi, given)

        def backward(residuals: PyTree, cotangents: PyTree) -> tuple[PyTree, None]:
            phi, given = residuals
            floats, others = partition(given, inexact(given))
            _, operator = jax.linearize(lambda phi: optimality(phi, given), phi)

            def damped(v: PyTree) -> PyTree:
                return jax.tree.map(lambda a, b: a + damping * b, operator(v), v)

            tolerance = max(np.finfo(leaf.dtype).eps for leaf in jax.tree.leaves(phi))
            solved, _ = cg(damped, cotangents[0], tol=tolerance, maxiter=cg_steps)
            _, pullback = jax.vjp(lambda floats: optimality(phi, merge(floats, others)), floats)
            return *pullback(jax.tree.map(jnp.negative, solved)), None

        solve.defvjp(forward, backward)
        return solve(given, state)

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
            f'got {proximal}; order="implicit" needs a positive weight of the proximal term, '
            "without which the minimum does not depend on where the loop starts",
        )
    if truncation is not None or keep_path:
        name = "truncation" if truncation is not None else "keep_path"
        raise ArgumentError(name, 'order="implicit" differentiates no step; leave it out')


def _zero_with_gradient(gradient, theta):
    """0, whose derivative in theta is `gradient`."""
    products = jax.tree.map(lambda g, t: jnp.vdot(g, t - lax.stop_gradient(t)), gradient, theta)
    return sum(jax.tree.leaves(products))


def _strongly_typed(leaf):
    """As an array whose type a step does not change, as it would a Python scalar's."""
    if isinstance(leaf, jax.Array) and not getattr(leaf, "weak_type", False):
        return leaf
    return jnp.asarray(leaf, dtype=jnp.result_type(leaf))


def _chosen_memory(step: Step, carry: PyTree, given: PyTree, steps: int) -> str:
    if steps <= 1:
        return "store"
    stores = CPU_STORES if jax.default_backend() == "cpu" else ACCELERATOR_STORES
    return "store" if steps * step.residual_bytes(carry, given) <= stores else "recompute"


def _require_differentiable(optimizer, carry):
    """Refuses an optimizer whose update has no reverse-mode derivative."""
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
            'take another, or order="implicit", which does not differentiate it',
        ) from error


def require_finite_derivative(optimizer: Any, *hyper: Any) -> None:
    """Refuses an optimizer whose update has no finite derivative where one coordinate's gradient is zero.

    Gradients that are exactly zero are nothing rare: those of a ReLU that is off, or of padding. An
    optimizer that takes no tree of one vector, or has traced settings, is let pass.

    Args:
      optimizer: a transformation, or a function of hyperparameters.
      hyper: of such a function, structure and `((shape, dtype), …)` of what it takes.

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
            "the derivative of its update is not finite where a gradient is zero, and neither "
            "would be the meta-gradient; the square root of optax.adam and its like needs eps_root=1e-8, say",
        )


@functools.lru_cache(maxsize=128)
def _has_finite_derivative(optimizer: Any, structure: Any = None, leaves: tuple[Any, ...] = ()) -> bool:
    with jax.ensure_compile_time_eval():
        if not isinstance(optimizer, optax.GradientTransformation):
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
        (found,) = pullback(jax.tree.map(jnp.ones_like, out))
        return bool(jnp.isfinite(found["w"]).all())
