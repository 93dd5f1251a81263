"""Evolution strategies: gradient estimates from loss values alone.

They serve inner loops that have no derivative (an accuracy, a search, a call out of JAX), that are too long
to differentiate in memory, or whose derivative is too rough to follow. Both estimators evaluate the loss at
perturbed parameters in pairs of opposite signs, and are unbiased for the gradient of the smoothed loss
E L(θ + ε), ε ~ N(0, σ² I).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmeta.checks import ArgumentError, check_count, check_function, check_number
from jaxmeta.core import Key, Params, PyTree
from jaxmeta.optimization_based.trees import inexact, merge, partition, paths


class EvolutionState(NamedTuple):
    """State that one step of persistent evolution strategies passes to the next.

    Attributes:
      carry: state of the unroll, with a leading axis of particles: first all of positive sign, then all of
        negative sign.
      total: ξ, the sum of the perturbations of each pair so far, of positive sign, with a leading axis of
        pairs; None for leaves that are not perturbed.
    """

    carry: PyTree
    total: PyTree


class PersistentEvolution(NamedTuple):
    """Persistent evolution strategies as two pure functions, built by `jm.persistent_evolution`.

    Attributes:
      init: `(params, carry) -> state` at the start of an unroll, where all particles share `carry`.
      step: `(params, state, *args, key) -> (value, grads, state)` for the next part of the unroll. `value`
        is the mean loss of the particles; `grads` have the dtypes of `params`.
    """

    init: Callable[[Params, PyTree], EvolutionState]
    step: Callable[..., tuple[Array, Params, EvolutionState]]


def evolution_gradient(
    loss: Callable[..., Any], *, sigma: float, pairs: int, has_aux: bool = False
) -> Callable[..., tuple[Any, Params]]:
    r"""Build a gradient estimator by evolution strategies, in place of `jax.value_and_grad`.

    ĝ = 1/(2σ²P) Σ_p (L(θ + ε_p) − L(θ − ε_p)) ε_p,  ε_p ~ N(0, σ² I),  p = 1 … P

    The estimate has mean ∇E L(θ + ε), which equals ∇L(θ) for a quadratic L and differs from it by O(σ²)
    otherwise. Its variance grows with the number of parameters and falls with P.

    All evaluations run at once by `jax.vmap` on the same arguments, so they share any randomness that `loss`
    draws from a key in them. This estimator is not an `order` of `jm.inner_loop`: an order differentiates the
    adapted parameters, whereas this estimate covers the whole meta-loss and differentiates nothing.

    Args:
      loss: `loss(params, *args, **settings) -> scalar`, or `(scalar, aux)`. It need not have a derivative;
        the scalar may be an integer.
      sigma: standard deviation σ of the perturbations.
      pairs: number P of pairs; `loss` is evaluated 2P + 1 times.
      has_aux: True where `loss` returns `(scalar, aux)`.

    Returns:
      `(params, *args, key, **settings) -> (value, grads)`, or `((value, aux), grads)` under `has_aux`. The
      perturbations are drawn from `key`; `value` and `aux` are evaluated at `params` itself. Each gradient
      has the dtype of its leaf. Perturbations and sums have float32 at least, so a leaf of lower precision
      is rounded inside the loss. Integer leaves are not perturbed and have gradient zero.

    Raises:
      ValueError: `sigma` not positive; `pairs` below 1. By the estimator: complex parameters, no
        floating-point parameters, or a loss that is not a scalar.

    Examples:
      A step on θ², whose derivative at 3 is 6:

      >>> import jax, jax.numpy as jnp, optax, jaxmeta as jm
      >>> gradient = jm.evolution_gradient(lambda theta: theta**2, sigma=0.1, pairs=1000)
      >>> value, grads = gradient(jnp.asarray(3.0), key=jax.random.key(0))
      >>> float(value), bool(abs(grads - 6) < 1)
      (9.0, True)

      A meta-step on the loss of a learner:

      >>> learner = jm.maml(jm.nn.MLP(out=1), inner_lr=0.01, loss=jm.losses.mse)
      >>> task = jm.tasks.sinusoid(shots=10, queries=10).sample(jax.random.key(0))
      >>> params, optimizer = learner.init(jax.random.key(1), task), optax.adam(1e-3)
      >>> gradient = jm.evolution_gradient(learner.loss, sigma=0.1, pairs=8, has_aux=True)
      >>> (value, metrics), grads = gradient(params, task, jax.random.key(2), key=jax.random.key(3))
      >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Salimans et al., Evolution Strategies as a Scalable Alternative to Reinforcement Learning, 2017; for
      inner loops, Metz et al., Understanding and correcting pathologies in the training of learned
      optimizers, 2019.
    """
    _check(loss, "loss", sigma, pairs)

    def value_and_grads(params: Params, *args: Any, key: Key, **settings: Any) -> tuple[Any, Params]:
        floats, rest = _split(params)
        noise = _perturbations(key, floats, sigma, pairs)
        # The unperturbed parameters are the first particle, so that one program evaluates all.
        perturbations = jax.tree.map(lambda e: jnp.concatenate([jnp.zeros_like(e[:1]), e, -e]), noise)

        def evaluate(perturbation: PyTree) -> tuple[Array, PyTree]:
            result = loss(_perturbed(floats, perturbation, rest), *args, **settings)
            value, aux = result if has_aux else (result, None)
            return _scalar("loss", value), aux

        values, aux = jax.vmap(evaluate)(perturbations)
        grads = _estimate(params, noise, values[1:], sigma)
        if not has_aux:
            return values[0], grads
        return (values[0], jax.tree.map(lambda leaf: leaf[0], aux)), grads

    return value_and_grads


def persistent_evolution(
    unroll: Callable[..., tuple[Any, PyTree]], *, sigma: float, pairs: int
) -> PersistentEvolution:
    r"""Build persistent evolution strategies, for long unrolls that are processed in parts.

    ĝ_t = 1/(2σ²P) Σ_p (L_t(s_p⁺, θ + ε_p,t) − L_t(s_p⁻, θ − ε_p,t)) ξ_p,t,  ξ_p,t = Σ_{τ≤t} ε_p,τ

    Truncated backpropagation takes an outer step after each part of an unroll and ignores how the parameters
    shaped the state in earlier parts. Here each particle carries its own state, s_p⁺ or s_p⁻, and the sum of
    the perturbations that led to it, so that the sum of ĝ_t over an unroll is unbiased for the gradient of
    the smoothed loss of the whole unroll, with separate ε in each part. For an unroll of one part the
    estimator equals `jm.evolution_gradient`.

    Restart with `init` at the end of an unroll: inside `jax.jit`, by `jax.lax.cond` or `jax.numpy.where`.

    Args:
      unroll: `unroll(params, carry, *args) -> (loss, carry)`: the next part of the unroll and the scalar loss
        of that part. It need not have a derivative.
      sigma: standard deviation σ of the perturbations.
      pairs: number P of pairs; each step runs `unroll` 2P times, by `jax.vmap`, on the same `args`.

    Returns:
      A `PersistentEvolution`. Dtypes are handled as in `jm.evolution_gradient`.

    Raises:
      ValueError: `sigma` not positive; `pairs` below 1. By its functions: complex parameters, no
        floating-point parameters, a loss that is not a scalar, or a state for different parameters or pairs.

    Examples:
      Gradient descent on ½x² with a learned step size: an unroll of four updates, with a loss after each:

      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> def unroll(rate, x):
      ...     x = x - rate * x
      ...     return 0.5 * x**2, x
      >>> pes = jm.persistent_evolution(unroll, sigma=0.1, pairs=1000)
      >>> rate = jnp.asarray(0.1)
      >>> def step(state, key):
      ...     value, grads, state = pes.step(rate, state, key=key)
      ...     return state, grads
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> _, grads = jax.lax.scan(step, pes.init(rate, jnp.asarray(1.0)), keys)
      >>> exact = jax.grad(lambda rate: sum(0.5 * (1 - rate) ** (2 * t) for t in (1, 2, 3, 4)))(rate)
      >>> bool(abs(grads.sum() / exact - 1) < 0.1)
      True

      For a learned optimizer, with `unroll = jm.learned_optimizer_unroll(…)` and an initial carry of None:
      `jm.persistent_evolution(lambda params, carry, task, key: unroll(params, task, carry, key), …)`.

    References:
      Vicol, Metz & Sohl-Dickstein, Unbiased Gradient Estimation in Unrolled Computation Graphs with
      Persistent Evolution Strategies, 2021, algorithm 2.
    """
    _check(unroll, "unroll", sigma, pairs)

    def init(params: Params, carry: PyTree) -> EvolutionState:
        floats, _ = _split(params)
        return EvolutionState(
            jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (2 * pairs, *jnp.shape(leaf))), carry),
            jax.tree.map(lambda leaf: jnp.zeros((pairs, *leaf.shape), _working_dtype(leaf.dtype)), floats),
        )

    def step(
        params: Params, state: EvolutionState, *args: Any, key: Key
    ) -> tuple[Array, Params, EvolutionState]:
        floats, rest = _split(params)
        expected = [(pairs, *leaf.shape) for leaf in jax.tree.leaves(floats)]
        shapes = [total.shape for total in jax.tree.leaves(state.total)]
        if shapes != expected:
            raise ArgumentError(
                "state",
                f"got perturbations of shapes {shapes}; {pairs} pairs of these parameters have shapes "
                f"{expected}; build the state by `init` with the same parameters and pairs",
            )
        noise = _perturbations(key, floats, sigma, pairs)
        perturbations = jax.tree.map(lambda e: jnp.concatenate([e, -e]), noise)

        def evaluate(perturbation: PyTree, carry: PyTree) -> tuple[Array, PyTree]:
            value, carry = unroll(_perturbed(floats, perturbation, rest), carry, *args)
            return _scalar("unroll", value), carry

        values, carry = jax.vmap(evaluate)(perturbations, state.carry)
        total = jax.tree.map(jnp.add, state.total, noise)
        grads = _estimate(params, total, values, sigma)
        mean = values.astype(_working_dtype(values.dtype)).mean()
        return mean, grads, EvolutionState(carry, total)

    return PersistentEvolution(init, step)


def _check(function: Any, argument: str, sigma: Any, pairs: Any) -> None:
    check_function(argument, function)
    check_number("sigma", sigma, above=0)
    check_count("pairs", pairs)


def _working_dtype(dtype: Any) -> Any:
    """Return the dtype in which perturbations are drawn and losses are subtracted and averaged."""
    return jnp.promote_types(dtype, jnp.float32)


def _split(params: Params) -> tuple[PyTree, PyTree]:
    """Split the parameters into floating-point leaves, which are perturbed, and the others."""
    floats, rest = partition(params, inexact(params))
    floats = jax.tree.map(jnp.asarray, floats)
    named = dict(zip(paths(floats), jax.tree.leaves(floats), strict=True))
    complex_paths = [path for path, leaf in named.items() if jnp.iscomplexobj(leaf)]
    if complex_paths:
        raise ArgumentError(
            "params", f"got complex numbers in {complex_paths}; split them into real and imaginary parts"
        )
    if not named:
        raise ArgumentError("params", "got no floating-point leaf; at least one is needed to perturb")
    return floats, rest


def _perturbations(key: Key, floats: PyTree, sigma: float, pairs: int) -> PyTree:
    """Draw ε for each pair, with a separate key for each leaf."""
    leaves, structure = jax.tree.flatten(floats)
    return jax.tree.unflatten(
        structure,
        [
            sigma * jax.random.normal(leaf_key, (pairs, *leaf.shape), _working_dtype(leaf.dtype))
            for leaf_key, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
        ],
    )


def _perturbed(floats: PyTree, perturbation: PyTree, rest: PyTree) -> Params:
    return merge(jax.tree.map(lambda p, e: (p + e).astype(p.dtype), floats, perturbation), rest)


def _scalar(argument: str, value: Any) -> Array:
    value = jnp.asarray(value)
    if value.shape or jnp.iscomplexobj(value):
        raise ArgumentError(
            argument,
            f"got a loss of shape {value.shape} and dtype {value.dtype}; it must be a real scalar",
        )
    return value


def _estimate(params: Params, weights: PyTree, values: Array, sigma: float) -> Params:
    """Average (L⁺ − L⁻)/(2σ²) times the weights of each pair; zero for leaves without weights."""
    values = values.astype(_working_dtype(values.dtype))
    positive, negative = jnp.split(values, 2)
    factors = (positive - negative) / (2 * sigma**2 * positive.size)

    def of_leaf(leaf: Any, weight: Array | None) -> Array:
        if weight is None:
            return jnp.zeros_like(leaf)
        return jnp.tensordot(factors, weight, 1).astype(jnp.result_type(leaf))

    return jax.tree.map(of_leaf, params, weights)
