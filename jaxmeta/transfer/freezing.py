"""What is trained, what stays, and how fast: by optax's own partitions."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxmeta.checks import ArgumentError, check_count, check_number, some
from jaxmeta.core import Optimizer, Params, PyTree
from jaxmeta.paths import Patterns, leaves_by_path, mask, matching


def frozen_mask(params: Params, train: Patterns) -> PyTree:
    """True for every leaf that `train` does not match.

    Args:
      params: of any structure.
      train: patterns of what is trained; see `jm.transfer.matching`.

    Raises:
      ValueError: a pattern matches nothing.

    Examples:
      >>> frozen_mask({"body": {"w": 0.0}, "head": {"w": 0.0}}, "head")
      {'body': {'w': True}, 'head': {'w': False}}
    """
    return jax.tree.map(lambda trained: not trained, mask(params, train, argument="train"))


def freeze(optimizer: Optimizer, params: Params, train: Patterns) -> optax.GradientTransformation:
    """`optimizer` for what `train` matches, and nothing at all for the rest.

    The rest has no optimizer state, is not decayed, and its updates are zero: `optax.partition` with
    `optax.set_to_zero`. A gradient stopped on its way would not do, for weight decay moves a parameter
    without one. `jm.transfer.fine_tune` also leaves the statistics of frozen layers as they are.

    Args:
      optimizer: any.
      params: for their structure.
      train: patterns of what is trained.

    Raises:
      ValueError: a pattern matches nothing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {"body": jnp.ones(3), "head": jnp.ones(3)}
      >>> optimizer = freeze(optax.adamw(0.1, weight_decay=0.5), params, "head")
      >>> updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
      >>> updates["body"]
      Array([0., 0., 0.], dtype=float32)
    """
    return only_unfrozen(optimizer, frozen_mask(params, train))


def only_unfrozen(optimizer: Optimizer, frozen: PyTree) -> optax.GradientTransformation:
    """`optimizer` where `frozen` is False; zero, without a state, where it is True."""
    return optax.partition({False: optimizer, True: optax.set_to_zero()}, frozen)


def apply_unfrozen(params: Params, updates: PyTree, frozen: PyTree) -> Params:
    """`optax.apply_updates` that hands frozen leaves through: even −0 + 0 would be another bit pattern."""
    return jax.tree.map(
        lambda leaf, update, still: leaf if still else (leaf + update).astype(leaf.dtype),
        params,
        updates,
        frozen,
    )


def layer_labels(params: Params, groups: Sequence[Patterns]) -> PyTree:
    """For each leaf the number of the group that matches it.

    Args:
      params: of any structure.
      groups: patterns, from the lowest layers to the top.

    Raises:
      ValueError: a leaf in two groups or in none, or a pattern that matches nothing.
    """
    found: dict[str, list[int]] = {path: [] for path in leaves_by_path(params)}
    for number, group in enumerate(groups):
        for path in matching(params, group, argument=f"groups[{number}]"):
            found[path].append(number)
    wrong = [f"{path} is in {numbers or 'none'}" for path, numbers in found.items() if len(numbers) != 1]
    if wrong:
        raise ArgumentError(
            "groups",
            f"every leaf must be in one group; {some(wrong)}",
        )
    return jax.tree.unflatten(jax.tree.structure(params), [numbers[0] for numbers in found.values()])


def discriminative(
    optimizer: Optimizer,
    params: Params,
    groups: Sequence[Patterns],
    *,
    decay: float = 2.6,
) -> optax.GradientTransformation:
    r"""Discriminative learning rates: lower layers, which hold what is general, move less.

    η_{ℓ−1} = η_ℓ / decay, with η of the top group the optimizer's own rate.

    Args:
      optimizer: whose updates are in proportion to its rate, as those of SGD, Adam and AdamW.
      params: for their structure.
      groups: patterns, from the lowest layers to the top; every leaf is in one.
      decay: 2.6 in the paper; at least 1.

    Raises:
      ValueError: as `layer_labels`; `decay` below 1.

    References:
      Howard & Ruder, Universal Language Model Fine-tuning for Text Classification, 2018, section 3.2.
    """
    check_number("decay", decay, 1)
    top = len(groups) - 1
    scales: Mapping[int, optax.GradientTransformation] = {
        number: optax.scale(decay ** (number - top)) for number in range(len(groups))
    }
    return optax.chain(optimizer, optax.partition(scales, layer_labels(params, groups)))


def slanted_triangular(
    steps: int, peak: float = 0.01, *, cut_fraction: float = 0.1, ratio: float = 32.0
) -> optax.Schedule:
    r"""Slanted triangular learning rates: a short climb, a long way down.

    With cut = ⌊T · cut_fraction⌋, and p = t / cut while t < cut, then
    1 − (t − cut) / (cut · (1 / cut_fraction − 1)):  η_t = peak · (1 + p (ratio − 1)) / ratio.

    Args:
      steps: T.
      peak: the largest rate, reached at step `cut`.
      cut_fraction: part of the steps in which the rate grows, in (0, 1).
      ratio: of the largest rate to the smallest.

    Returns:
      `step -> rate`, for optax.

    Raises:
      ValueError: no step in which to grow; a fraction outside (0, 1); a ratio below 1.

    Examples:
      >>> rate = slanted_triangular(1000)
      >>> [round(float(rate(step)), 8) for step in (0, 100, 550)]
      [0.0003125, 0.01, 0.00515625]

    References:
      Howard & Ruder, 2018, equation 3.
    """
    check_count("steps", steps)
    check_number("peak", peak)
    check_number("cut_fraction", cut_fraction, above=0)
    if cut_fraction >= 1:
        raise ArgumentError("cut_fraction", f"got {cut_fraction}; it must be in (0, 1)")
    check_number("ratio", ratio, 1)
    cut = int(steps * cut_fraction)
    if cut < 1:
        raise ArgumentError(
            "steps",
            f"got {steps}, of which a part {cut_fraction} is less than one step; it must be at least "
            f"{math.ceil(1 / cut_fraction)}",
        )

    def rate(step: Array | int) -> Array:
        falling = 1 - (step - cut) / (cut * (1 / cut_fraction - 1))
        part = jnp.where(jnp.asarray(step) < cut, jnp.asarray(step) / cut, falling)
        return peak * (1 + jnp.maximum(part, 0) * (ratio - 1)) / ratio

    return rate


def l2_sp(
    start: Params,
    *,
    shared: Patterns = "**",
    alpha: float = 0.1,
    beta: float = 0.01,
    fisher: PyTree | None = None,
) -> jax.tree_util.Partial:
    r"""L2-SP: a penalty that pulls towards the starting point, where weight decay pulls towards zero.

    Ω(w) = α/2 ‖w_S − w⁰_S‖² + β/2 ‖w_S̄‖²,  S: what the source has, S̄: what is new. With `fisher`
    α/2 Σ_j F_jj (w_j − w⁰_j)². It takes the place of weight decay.

    Args:
      start: w⁰, the parameters that training starts from.
      shared: patterns of S.
      alpha, beta: the weights.
      fisher: a tree like `start`, the diagonal of the Fisher information; read on S only.

    Returns:
      `params -> Ω`, the `penalty` of `jm.transfer.fine_tune`.

    Raises:
      ValueError: `shared` matches nothing; a negative weight; `fisher` of other leaves or shapes.

    References:
      Li, Grandvalet & Davoine, Explicit Inductive Bias for Transfer Learning with Convolutional Networks,
      2018, equations 2 and 3.
    """
    check_number("alpha", alpha, 0)
    check_number("beta", beta, 0)
    old = mask(start, shared, argument="shared")
    if fisher is None:
        fisher = jax.tree.map(lambda _: 1.0, start)
    else:
        weights, leaves = leaves_by_path(fisher), leaves_by_path(start)
        if list(weights) != list(leaves):
            raise ArgumentError(
                "fisher", f"got the leaves {list(weights)}; they must be those of `start`, {list(leaves)}"
            )
        for path in matching(start, shared):
            if jnp.shape(weights[path]) != jnp.shape(leaves[path]):
                raise ArgumentError(
                    "fisher",
                    f"got shape {jnp.shape(weights[path])} for {path}; it must be that of `start`, "
                    f"{jnp.shape(leaves[path])}",
                )
        fisher = jax.tree.unflatten(jax.tree.structure(start), weights.values())
    # Arguments of a Partial travel as data: closed over, they would be constants of the compiled step.
    return jax.tree_util.Partial(
        _l2_sp,
        start,
        jax.tree.map(lambda is_old, weight: alpha * weight if is_old else beta, old, fisher),
        jax.tree.map(float, old),
    )


def _l2_sp(start: Params, weights: PyTree, old: PyTree, params: Params) -> Array:
    terms = jax.tree.map(
        lambda w, w0, weight, kept: 0.5 * (weight * jnp.square(w - kept * w0)).sum(),
        params,
        start,
        weights,
        old,
    )
    return sum(jax.tree.leaves(terms), jnp.zeros(()))
