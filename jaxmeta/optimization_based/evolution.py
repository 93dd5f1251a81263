"""Evolution strategies: gradients of losses that cannot, or should not, be differentiated.

An inner loop may have no derivative (an accuracy, a search, a call out of JAX), too long a chain of them to
keep, or so rough a one that it misleads. Both estimators here evaluate the loss at perturbed parameters, in
pairs of opposite signs, and are unbiased for the gradient of the smoothed loss E L(θ + ε), ε ~ N(0, σ² I).
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
    """What one step of persistent evolution strategies hands to the next.

    Attributes:
      carry: of the unroll, with a leading axis of particles: `pairs` of positive sign, then their opposites.
      total: ξ, the sum of each pair's perturbations so far, of positive sign, with a leading axis of pairs;
        None for leaves that are not perturbed.
    """

    carry: PyTree
    total: PyTree


class PersistentEvolution(NamedTuple):
    """Persistent evolution strategies as two pure functions; `jm.persistent_evolution` makes them.

    Attributes:
      init: `(params, carry) -> state` at the start of an unroll, where every particle has this `carry`.
      step: `(params, state, *args, key) -> (value, grads, state)`: the next part of the unroll. `value` is
        the mean loss of the particles, and `grads` are of the types of `params`.
    """

    init: Callable[[Params, PyTree], EvolutionState]
    step: Callable[..., tuple[Array, Params, EvolutionState]]


def evolution_gradient(
    loss: Callable[..., Any], *, sigma: float, pairs: int, has_aux: bool = False
) -> Callable[..., tuple[Any, Params]]:
    r"""Build an estimator by evolution strategies that takes the place of `jax.value_and_grad`.

    ĝ = 1/(2σ²P) Σ_p (L(θ + ε_p) − L(θ − ε_p)) ε_p,  ε_p ~ N(0, σ² I),  p = 1 … P

    Its mean is the gradient of E L(θ + ε), which for a quadratic L is that of L itself, and otherwise differs
    from it in the order of σ². Its variance grows with the number of parameters, and falls with P.

    All evaluations run at once, by `jax.vmap`, on the same arguments: what `loss` draws from a key of its own
    is common to them. It is no `order` of `jm.inner_loop`, since these say how the adapted parameters
    are differentiated, and this estimate is of the whole meta-loss and differentiates nothing.

    Args:
      loss: `loss(params, *args, **settings) -> scalar`, or `(scalar, aux)`. It need not have a derivative;
        the scalar may be an integer.
      sigma: standard deviation σ of the perturbations.
      pairs: number P of pairs; `loss` is evaluated 2P + 1 times.
      has_aux: whether `loss` returns a pair.

    Returns:
      `(params, *args, key, **settings) -> (value, grads)`, under `has_aux` `((value, aux), grads)`; `key` is
      of the perturbations. `value` and `aux` are of `params` itself. Gradients have the types of their
      leaves. Perturbations and sums have float32 at least, so that the rounding of a leaf of fewer bits is a
      part of the loss. Integer leaves are not perturbed and have a gradient of zero.

    Raises:
      ValueError: `sigma` that is not positive; `pairs` below 1; and by the estimator, complex parameters, no
        floating-point ones, or a loss that is no scalar.

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
        noise = _draws(key, floats, sigma, pairs)
        # One program for all, and the first particle is the parameters themselves.
        every = jax.tree.map(lambda e: jnp.concatenate([jnp.zeros_like(e[:1]), e, -e]), noise)

        def evaluate(perturbation: PyTree) -> tuple[Array, PyTree]:
            found = loss(_moved(floats, perturbation, rest), *args, **settings)
            value, aux = found if has_aux else (found, None)
            return _scalar("loss", value), aux

        values, aux = jax.vmap(evaluate)(every)
        grads = _estimate(params, noise, values[1:], sigma)
        if not has_aux:
            return values[0], grads
        return (values[0], jax.tree.map(lambda leaf: leaf[0], aux)), grads

    return value_and_grads


def persistent_evolution(
    unroll: Callable[..., tuple[Any, PyTree]], *, sigma: float, pairs: int
) -> PersistentEvolution:
    r"""Build persistent evolution strategies, for long unrolls that are taken part by part.

    ĝ_t = 1/(2σ²P) Σ_p (L_t(s_p⁺, θ + ε_p,t) − L_t(s_p⁻, θ − ε_p,t)) ξ_p,t,  ξ_p,t = Σ_{τ≤t} ε_p,τ

    An outer step after each part of an unroll, from where the last one ended, as truncated backpropagation
    has it, misses what the parameters did to the state in earlier parts. Here each particle carries a state
    of its own, s_p⁺ or s_p⁻, and the sum of the perturbations that made it, so that the sum of ĝ_t
    over an unroll is unbiased for the gradient of its whole smoothed loss, each part with its own ε. With a
    single part it is `jm.evolution_gradient`.

    At the end of an unroll, begin anew with `init`: inside `jax.jit`, by `jax.lax.cond` or `jax.numpy.where`.

    Args:
      unroll: `unroll(params, carry, *args) -> (loss, carry)`: the next part, and the scalar loss of it alone.
        It need not have a derivative.
      sigma: standard deviation σ of the perturbations.
      pairs: number P of pairs; each step runs `unroll` 2P times, by `jax.vmap`, on the same `args`.

    Returns:
      A `PersistentEvolution`. Types are treated as by `jm.evolution_gradient`.

    Raises:
      ValueError: `sigma` that is not positive; `pairs` below 1; and by its functions, complex parameters, no
        floating-point ones, a loss that is no scalar, or a state of another number of pairs.

    Examples:
      Descent on ½x² at a learned rate, four updates of an unroll, the loss after each one:

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

      A learned optimizer, with `unroll = jm.learned_optimizer_unroll(…)`, begins from a carry of None:
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
            jax.tree.map(lambda leaf: jnp.zeros((pairs, *leaf.shape), _accurate(leaf.dtype)), floats),
        )

    def step(
        params: Params, state: EvolutionState, *args: Any, key: Key
    ) -> tuple[Array, Params, EvolutionState]:
        floats, rest = _split(params)
        wanted = [(pairs, *leaf.shape) for leaf in jax.tree.leaves(floats)]
        found = [total.shape for total in jax.tree.leaves(state.total)]
        if found != wanted:
            raise ArgumentError(
                "state",
                f"got perturbations of shapes {found}, and {pairs} pairs of these parameters have {wanted}; "
                "begin with `init` of the same parameters and pairs",
            )
        noise = _draws(key, floats, sigma, pairs)
        every = jax.tree.map(lambda e: jnp.concatenate([e, -e]), noise)

        def evaluate(perturbation: PyTree, carry: PyTree) -> tuple[Array, PyTree]:
            value, carry = unroll(_moved(floats, perturbation, rest), carry, *args)
            return _scalar("unroll", value), carry

        values, carry = jax.vmap(evaluate)(every, state.carry)
        total = jax.tree.map(jnp.add, state.total, noise)
        grads = _estimate(params, total, values, sigma)
        mean = values.astype(_accurate(values.dtype)).mean()
        return mean, grads, EvolutionState(carry, total)

    return PersistentEvolution(init, step)


def _check(function: Any, argument: str, sigma: Any, pairs: Any) -> None:
    check_function(argument, function)
    check_number("sigma", sigma, above=0)
    check_count("pairs", pairs)


def _accurate(dtype: Any) -> Any:
    """The type in which perturbations are drawn, and losses subtracted and averaged."""
    return jnp.promote_types(dtype, jnp.float32)


def _split(params: Params) -> tuple[PyTree, PyTree]:
    """The floating-point leaves, which are perturbed, and the others; each has None for the other's."""
    floats, rest = partition(params, inexact(params))
    floats = jax.tree.map(jnp.asarray, floats)
    named = dict(zip(paths(floats), jax.tree.leaves(floats), strict=True))
    complex_ones = [path for path, leaf in named.items() if jnp.iscomplexobj(leaf)]
    if complex_ones:
        raise ArgumentError(
            "params", f"got complex numbers in {complex_ones}; split them into real and imaginary parts"
        )
    if not named:
        raise ArgumentError("params", "got no floating-point leaf; there must be one to perturb")
    return floats, rest


def _draws(key: Key, floats: PyTree, sigma: float, pairs: int) -> PyTree:
    """ε of each pair, for each leaf from a key of its own."""
    leaves, structure = jax.tree.flatten(floats)
    return jax.tree.unflatten(
        structure,
        [
            sigma * jax.random.normal(each, (pairs, *leaf.shape), _accurate(leaf.dtype))
            for each, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
        ],
    )


def _moved(floats: PyTree, perturbation: PyTree, rest: PyTree) -> Params:
    return merge(jax.tree.map(lambda p, e: (p + e).astype(p.dtype), floats, perturbation), rest)


def _scalar(argument: str, value: Any) -> Array:
    value = jnp.asarray(value)
    if value.shape or jnp.iscomplexobj(value):
        raise ArgumentError(
            argument,
            f"it returns a loss of shape {value.shape} and type {value.dtype}; it must be a real scalar",
        )
    return value


def _estimate(params: Params, weights: PyTree, values: Array, sigma: float) -> Params:
    """The mean of (L⁺ − L⁻) times the weights of each pair over 2σ²; zero for leaves that have none."""
    values = values.astype(_accurate(values.dtype))
    positive, negative = jnp.split(values, 2)
    factors = (positive - negative) / (2 * sigma**2 * positive.size)

    def of_leaf(leaf: Any, weight: Array | None) -> Array:
        if weight is None:
            return jnp.zeros_like(leaf)
        return jnp.tensordot(factors, weight, 1).astype(jnp.result_type(leaf))

    return jax.tree.map(of_leaf, params, weights)
