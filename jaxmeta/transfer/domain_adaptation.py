"""Domain adaptation without target labels: gradient reversal (DANN) and batch statistics (AdaBN)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from jaxmeta.checks import ArgumentError, check_count, check_number, check_real
from jaxmeta.nn import statistics
from jaxmeta.nn.adapters import Network
from jaxmeta.nn.norm import STATISTICS
from jaxmeta.nn.stateful import StatefulModel, as_stateful, join_parts, part_variables
from jaxmeta.transfer.classifier import as_images, in_batches


def gradient_reversal(
    x: PyTree[Float[Array | np.ndarray, "..."]], strength: ArrayLike
) -> PyTree[Float[Array, "..."]]:
    """Return `x` unchanged, with a derivative of −strength times the identity.

    Between the features and a domain head, it makes gradient descent on the domain loss train the head to
    tell the domains apart, and the features, with weight `strength`, to prevent that. It works in reverse
    mode and, unlike implementations by a backward rule, in forward mode too.

    Args:
      x: features, or a pytree of them; the values are passed on bit for bit.
      strength: λ ≥ 0, a scalar that may be traced. Its own gradient is 0.

    Raises:
      ValueError: if a leaf of `x` is not of a floating-point type, or `strength` is not a scalar.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> print(jax.grad(lambda x: 3.0 * gradient_reversal(x, 0.5))(2.0))
      -1.5

    References:
      Ganin et al., Domain-Adversarial Training of Neural Networks, 2016, equation 18.
    """
    check_number("strength", strength)

    def reverse(path, leaf):
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            where = f" at {jax.tree_util.keystr(path)}" if path else ""
            raise ArgumentError("x", f"got {leaf.dtype}{where}; it must be of a floating-point type")
        return _reversed(leaf, jnp.asarray(strength, leaf.dtype))

    return jax.tree_util.tree_map_with_path(reverse, x)


# A rule for tangents is linear in them, so JAX can transpose it: one rule serves both modes.
@jax.custom_jvp
def _reversed(x: Array, strength: Array) -> Array:
    del strength
    return x


@_reversed.defjvp
def _reversed_tangent(primals, tangents):
    (x, strength), (tangent, _) = primals, tangents
    return _reversed(x, strength), -strength * tangent


def dann_strength(progress: ArrayLike, *, gamma: float = 10.0) -> Float[Array, "..."]:
    """Return DANN's strength of the gradient reversal, λ_p = 2 / (1 + exp(−γp)) − 1, from 0 to almost 1.

    Args:
      progress: p in [0, 1], the completed fraction of the whole training, including earlier parts of a
        resumed one.
      gamma: γ, the steepness.

    Raises:
      ValueError: if `gamma` is not a finite number.

    Examples:
      >>> print(f"{dann_strength(0.1):.6f}")
      0.462117

    References:
      Ganin et al., Domain-Adversarial Training of Neural Networks, 2016, section 5.2.2.
    """
    check_number("gamma", gamma)
    return jnp.tanh(gamma * jnp.asarray(progress, float) / 2)


def dann_rate(
    progress: ArrayLike, *, initial: float = 0.01, a: float = 10.0, b: float = 0.75
) -> Float[Array, "..."]:
    """Return DANN's learning rate μ_p = μ_0 / (1 + a·p)^b, meant for SGD with momentum 0.9.

    Args:
      progress: p in [0, 1], the completed fraction of the whole training.
      initial: μ_0, the rate at the start.
      a: a, the scale of the decay.
      b: b, the exponent of the decay.

    Examples:
      >>> print(f"{dann_rate(0.5):.8f}")
      0.00260847

    References:
      Ganin et al., Domain-Adversarial Training of Neural Networks, 2016, section 5.2.2.
    """
    return initial / (1 + a * jnp.asarray(progress, float)) ** b


def dann_schedule(steps: int, *, initial: float = 0.01, a: float = 10.0, b: float = 0.75) -> optax.Schedule:
    """Return `dann_rate` as an optax schedule with p = step / steps, and p = 1 from then on.

    Args:
      steps: number of training steps, at least 1.
      initial: μ_0, the rate at the start.
      a: a, the scale of the decay.
      b: b, the exponent of the decay.

    Returns:
      A function `step -> rate`.

    Raises:
      ValueError: if `steps` is below 1, or `initial`, `a` or `b` is not a finite number.

    Examples:
      >>> import optax
      >>> optimizer = optax.sgd(dann_schedule(1000), momentum=0.9)
    """
    check_count("steps", steps)
    for name, value in (("initial", initial), ("a", a), ("b", b)):
        check_number(name, value)
    return lambda step: dann_rate(jnp.minimum(step / steps, 1), initial=initial, a=a, b=b)


def domain_loss(
    source: Float[Array | np.ndarray, " n ..."], target: Float[Array | np.ndarray, " m ..."]
) -> Float[Array, ""]:
    """Return the binary cross-entropy of a domain head, source 0 against target 1, in nats.

    ½ mean_i ln(1 + exp(s_i)) + ½ mean_j ln(1 + exp(−t_j)): the mean over the two domains' means, so that a
    larger batch has no larger weight. It is ln 2 if the head cannot tell the domains apart.

    Args:
      source: logits of the source's examples, of shape `(n_s,)` or `(n_s, 1)`, such as the outputs of
        `jm.nn.MLP(out=1, hidden=(100,))` on features that passed through `gradient_reversal`.
      target: logits of the target's examples, of shape `(n_t,)` or `(n_t, 1)`.

    Returns:
      A scalar.

    Raises:
      ValueError: if a domain has no examples, or not one logit for each.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(f"{domain_loss(jnp.zeros(3), jnp.zeros((2, 1))):.4f}")  # ln 2
      0.6931

    References:
      Ganin et al., Domain-Adversarial Training of Neural Networks, 2016.
    """
    s, t = _logits(source, target)
    return (jax.nn.softplus(s).mean() + jax.nn.softplus(-t).mean()) / 2


def domain_accuracy(
    source: Float[Array | np.ndarray, " n ..."], target: Float[Array | np.ndarray, " m ..."]
) -> Float[Array, ""]:
    """Return the accuracy of a domain head, averaged over the two domains; chance level is ½.

    Args:
      source: logits of the source's examples, of shape `(n_s,)` or `(n_s, 1)`; a logit above 0 predicts the
        target.
      target: logits of the target's examples, of shape `(n_t,)` or `(n_t, 1)`.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: if a domain has no examples, or not one logit for each.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(domain_accuracy(jnp.array([-1.0, 2.0]), jnp.array([3.0])))
      0.75
    """
    s, t = _logits(source, target)
    return ((s <= 0).mean() + (t > 0).mean()) / 2


def adabn(
    network: Network | StatefulModel,
    variables: Mapping[str, Any],
    x: Array | np.ndarray,
    *,
    batch: int | None = None,
    exact: bool = True,
    **arguments: Any,
) -> dict[str, Any]:
    """Return the variables of a trained network with the batch statistics of another domain (AdaBN).

    The mean and (biased) variance of each batch normalisation are replaced by those of its inputs on `x`,
    computed with the new statistics in all earlier layers. It uses no labels and changes no parameter.

    Args:
      network: a `jm.transfer.classifier`; a `flax.linen` module with `jaxmeta.nn.BatchNorm` or
        `flax.linen.BatchNorm`; or another network that `jm.nn.as_model` accepts, such as one of NNX.
      variables: `{"params": …}`, and "batch_stats" and other collections if the network has them.
      x: unlabelled examples of the target domain, of shape `(n, *shape)`; bytes become numbers in [0, 1].
      batch: number of examples in memory at once; None for all, where one pass is exact.
      exact: with `batch`, whether to pass over `x` once for each batch normalisation, so that the result is
        the one of all examples at once (up to rounding). False passes once: each batch is normalised by its
        own statistics and their first two moments are averaged, which is exact for the first layer alone.
      **arguments: keyword arguments of the network's call in inference. `deterministic`, `train` and
        `use_running_average` are set where the network has them.

    Returns:
      `variables` with new "batch_stats". Apply them by `network.apply(variables, x)`, or by
      `jm.nn.as_model(network).apply_norm(variables["params"], x, stats=variables["batch_stats"])`.

    Raises:
      ValueError: if `x` has no examples or `batch` is below 1; if the network has no batch normalisation, or
        one that uses its batch's statistics in inference, has a mask or is called twice; if the
        network is not a `flax.linen` module and `arguments` are given or `exact` needs several batches.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> network = jm.nn.MLP(out=3, hidden=(8, 8), norm=True)
      >>> x = jax.random.normal(jax.random.key(0), (50, 4))
      >>> adapted = adabn(network, network.init(jax.random.key(1), x), 2.0 * x + 1.0, batch=20)
      >>> jax.tree.map(lambda leaf: leaf.shape, adapted["batch_stats"])
      {'BatchNorm_0': {'mean': (8,), 'var': (8,)}, 'BatchNorm_1': {'mean': (8,), 'var': (8,)}}

    References:
      Li et al., Revisiting Batch Normalization for Practical Domain Adaptation, 2016.
    """
    if x.shape[0] < 1:
        raise ArgumentError("x", f"got shape {x.shape}; it must have at least one example")
    if batch is not None:
        check_count("batch", batch)
    model, settings = as_stateful(network), tuple(sorted(arguments.items()))
    return _adapt(model, variables, x, batch or x.shape[0], exact, settings)


def _adapt(model, variables, x, batch, exact, arguments):
    """Return the variables with the statistics of `x`; see `adabn`."""
    if model.parts:
        return _adapt_parts(model.parts, variables, x, batch, exact, arguments)
    parts = [x[start : start + batch] for start in range(0, x.shape[0], batch)]
    single_pass = len(parts) == 1 or not exact

    def measure_pass(variables):
        stats = [_measured(model.network, single_pass, arguments, variables, part) for part in parts]
        return statistics.pooled(stats, [part.shape[0] for part in parts])

    stats = measure_pass(variables)
    # Each pass makes the statistics of one more layer final: those of the layers before it already are.
    for _ in range(0 if single_pass else statistics.num_layers(stats) - 1):
        stats = measure_pass(statistics.with_statistics(variables, stats))
    return statistics.with_statistics(variables, stats)


# A StatefulModel's `network` is the same function in every call, so that repeated calls compile once.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _measured(network, use_measured, arguments, variables, x):
    _, stats = statistics.measure(
        network(), variables, as_images(x), use_measured=use_measured, **dict(arguments)
    )
    return stats


def _adapt_parts(parts, variables, x, batch, exact, arguments):
    """Adapt part after part, each on the outputs of the earlier parts with their new statistics."""
    if not variables.get(STATISTICS):
        raise ArgumentError("network", "has no batch normalisation")
    adapted = {}
    for name, part in parts:
        adapted[name] = part_variables(variables, name)
        if STATISTICS in adapted[name]:
            adapted[name] = _adapt(part, adapted[name], x, batch, exact, arguments)
        x = in_batches(part.apply, adapted[name], x, batch)
    return join_parts(adapted)


def _logits(*domains):
    for name, logits in zip(("source", "target"), domains, strict=True):
        check_real(name, logits)
        if not logits.size or logits.shape not in ((logits.size,), (logits.size, 1)):
            raise ArgumentError(name, f"got logits of shape {logits.shape}; they must be (n,) or (n, 1)")
    return [jnp.asarray(logits).reshape(-1) for logits in domains]
