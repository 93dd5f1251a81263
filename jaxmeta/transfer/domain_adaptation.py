"""Adapting to a domain without labels: gradient reversal (DANN) and batch statistics (AdaBN)."""

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
from jaxmeta.nn.stateful import StatefulModel, as_stateful, joined, of_part
from jaxmeta.transfer.classifier import as_images, in_batches


def gradient_reversal(
    x: PyTree[Float[Array | np.ndarray, "..."]], strength: ArrayLike
) -> PyTree[Float[Array, "..."]]:
    """The identity, whose derivative is −strength times the identity's.

    Placed between the features and the domain head, it makes one descent of the domain loss train
    the head, with weight 1, to tell the domains apart, and the features, with weight `strength`, so that
    it cannot. In reverse mode and, unlike implementations as a backward rule, in forward mode too.

    Args:
      x: features, or a pytree of them; they come out bit for bit.
      strength: λ ≥ 0, a scalar, which may be traced. The gradient with respect to it is 0.

    Raises:
      ValueError: a leaf of `x` that is not of floats; a `strength` that is no scalar.

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
            raise ValueError(f"x{jax.tree_util.keystr(path)}: got {leaf.dtype}; it must be floats")
        return _reversed(leaf, jnp.asarray(strength, leaf.dtype))

    return jax.tree_util.tree_map_with_path(reverse, x)


# A rule for tangents is linear in them, and JAX transposes it: one rule for both modes.
@jax.custom_jvp
def _reversed(x: Array, strength: Array) -> Array:
    del strength
    return x


@_reversed.defjvp
def _reversed_tangent(primals, tangents):
    (x, strength), (tangent, _) = primals, tangents
    return _reversed(x, strength), -strength * tangent


def dann_strength(progress: ArrayLike, *, gamma: float = 10.0) -> Float[Array, "..."]:
    """DANN's strength of the gradient reversal, λ_p = 2 / (1 + exp(−γp)) − 1, from 0 to almost 1.

    Args:
      progress: p in [0, 1], the part done of the whole training, also where it was interrupted.
      gamma: γ.

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
    """DANN's learning rate μ_p = μ_0 / (1 + a·p)^b, of SGD with momentum 0.9.

    Args:
      progress: p in [0, 1], the part done of the whole training.
      initial: μ_0.
      a, b: how far, and how fast, it falls.

    Examples:
      >>> print(f"{dann_rate(0.5):.8f}")
      0.00260847

    References:
      Ganin et al., Domain-Adversarial Training of Neural Networks, 2016, section 5.2.2.
    """
    return initial / (1 + a * jnp.asarray(progress, float)) ** b


def dann_schedule(steps: int, *, initial: float = 0.01, a: float = 10.0, b: float = 0.75) -> optax.Schedule:
    """`dann_rate` as a schedule of optax: `step -> rate`, with p = step / steps, and p = 1 from then on.

    Raises:
      ValueError: `steps` below 1.

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
    """Binary cross-entropy, in nats, of a domain head: source 0, target 1.

    ½ mean_i ln(1 + exp(s_i)) + ½ mean_j ln(1 + exp(−t_j)): the mean over each domain, then over the two,
    so that the larger batch has no more say. ln 2 where the domains cannot be told apart.

    Args:
      source: logits of the source's examples, `(n_s,)` or `(n_s, 1)`, as of
        `jm.nn.MLP(out=1, hidden=(100,))` on features that went through `gradient_reversal`.
      target: those of the target's.

    Raises:
      ValueError: not one logit for each example, or no example.

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
    """How often a domain head is right, the mean of both domains' accuracies: ½ by chance.

    Args:
      source: logits of the source's examples, `(n_s,)` or `(n_s, 1)`; above 0 means target.
      target: those of the target's.

    Raises:
      ValueError: not one logit for each example, or no example.

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
    """AdaBN: a trained network with the batch statistics of another domain, and all else as it was.

    Of every batch normalisation mean and (biased) variance are replaced by those of what enters it on
    `x`, while all layers before it normalise by theirs on `x` already. No label is needed, and no
    weight, scale or shift changes.

    Args:
      network: a `jm.transfer.classifier`; a module of `flax.linen` with `jaxmeta.nn.BatchNorm` or
        `flax.linen.BatchNorm`; or what `jm.nn.as_model` takes, such as a network of NNX.
      variables: `{"params": …}`, and "batch_stats" and other collections where it has them.
      x: unlabelled examples of the target domain, `(n, *shape)`; bytes are taken as numbers in [0, 1].
      batch: how many are in memory at once; all if None, where one pass is exact.
      exact: with `batch`, go through `x` once for each batch normalisation, so that the result is that
        of all at once (up to rounding). Otherwise go once: each batch is normalised by its own statistics,
        and their first two moments are averaged, which is exact for the first layer alone.
      arguments: of the network's call, for inference. `deterministic`, `train` and `use_running_average`
        are set where it takes them.

    Returns:
      `variables` with other "batch_stats". Use them by `network.apply(variables, x)`, or by
      `jm.nn.as_model(network).apply_norm(variables["params"], x, stats=variables["batch_stats"])`.

    Raises:
      ValueError: no example, or a `batch` below 1; a network without batch normalisation, or with one
        that normalises by its batch in inference, is masked, or is called twice; `exact` in several
        batches of a network that is no module of `flax.linen`.

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
    return _adapted(model, variables, x, batch or x.shape[0], exact, settings)


def _adapted(model, variables, x, batch, exact, arguments):
    if model.parts:
        return _parts_adapted(model.parts, variables, x, batch, exact, arguments)
    parts = [x[start : start + batch] for start in range(0, x.shape[0], batch)]
    own = len(parts) == 1 or not exact

    def once(variables):
        stats = [_measured(model.network, own, arguments, variables, part) for part in parts]
        return statistics.pooled(stats, [part.shape[0] for part in parts])

    stats = once(variables)
    # Each time, one more layer stands behind none but final ones.
    for _ in range(0 if own else statistics.layers(stats) - 1):
        stats = once(statistics.with_statistics(variables, stats))
    return statistics.with_statistics(variables, stats)


# Of a StatefulModel the same function each time, so that a training that looks on often compiles once.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _measured(network, own, arguments, variables, x):
    return statistics.measure(network(), variables, as_images(x), own=own, **dict(arguments))[1]


def _parts_adapted(parts, variables, x, batch, exact, arguments):
    """Part after part, each on what those before it make of `x` with their new statistics."""
    if not variables.get(STATISTICS):
        raise ArgumentError("network", "has no batch normalisation")
    found = {}
    for name, part in parts:
        found[name] = of_part(variables, name)
        if STATISTICS in found[name]:
            found[name] = _adapted(part, found[name], x, batch, exact, arguments)
        x = in_batches(part.apply, found[name], x, batch)
    return joined(found)


def _logits(*domains):
    for name, logits in zip(("source", "target"), domains, strict=True):
        check_real(name, logits)
        if not logits.size or logits.shape not in ((logits.size,), (logits.size, 1)):
            raise ArgumentError(name, f"got logits of shape {logits.shape}; they must be (n,) or (n, 1)")
    return [jnp.asarray(logits).reshape(-1) for logits in domains]
