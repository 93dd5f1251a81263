"""Frozen parameters, learning rates by layer and by step, and the L2-SP penalty."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxmeta.checks import ArgumentError, check_count, check_number, check_optimizer, join_names
from jaxmeta.core import Optimizer, Params, PyTree
from jaxmeta.paths import Patterns, leaves_by_path, mask, matching

# Relative rounding error that is allowed in a number of steps computed from a fraction.
_ROUNDING = 1e-12


def frozen_mask(params: Params, train: Patterns) -> PyTree:
    """Return a tree of bools, True for every leaf that `train` does not match.

    Args:
      params: parameters, a pytree of any structure.
      train: patterns of the parameters to train; see `jm.transfer.matching`.

    Raises:
      ValueError: if a pattern matches nothing.

    Examples:
      >>> frozen_mask({"body": {"w": 0.0}, "head": {"w": 0.0}}, "head")
      {'body': {'w': True}, 'head': {'w': False}}
    """
    return jax.tree.map(lambda trained: not trained, mask(params, train, argument="train"))


def freeze(optimizer: Optimizer, params: Params, train: Patterns) -> optax.GradientTransformation:
    """Return a transformation that applies `optimizer` to the leaves that `train` matches only.

    Frozen leaves have no optimizer state and no decay, and their updates are zero: `optax.partition` with
    `optax.set_to_zero`. Stopping their gradients would not suffice, since weight decay moves a parameter
    without a gradient. `jm.transfer.fine_tune` also keeps the statistics of frozen layers.

    Args:
      optimizer: any optax transformation.
      params: parameters with the structure to be optimised.
      train: patterns of the parameters to train; see `jm.transfer.matching`.

    Raises:
      ValueError: if a pattern matches nothing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {"body": jnp.ones(3), "head": jnp.ones(3)}
      >>> optimizer = freeze(optax.adamw(0.1, weight_decay=0.5), params, "head")
      >>> updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
      >>> updates["body"]
      Array([0., 0., 0.], dtype=float32)
    """
    check_optimizer("optimizer", optimizer)
    return only_unfrozen(optimizer, frozen_mask(params, train))


def only_unfrozen(
    optimizer: Optimizer, frozen: PyTree | Callable[[Params], PyTree]
) -> optax.GradientTransformation:
    """Return a transformation that applies `optimizer` where `frozen` is False.

    Frozen leaves have zero updates and no optimizer state.

    Args:
      optimizer: any optax transformation.
      frozen: tree of bools, or a function from the parameters to it.
    """
    return optax.partition({False: optimizer, True: optax.set_to_zero()}, frozen)


def apply_unfrozen(params: Params, updates: PyTree, frozen: PyTree) -> Params:
    """Add updates as `optax.apply_updates`, but keep frozen leaves: −0 + 0 is +0, whose bits differ."""
    return jax.tree.map(
        lambda leaf, update, is_frozen: leaf if is_frozen else (leaf + update).astype(leaf.dtype),
        params,
        updates,
        frozen,
    )


def layer_labels(params: Params, groups: Sequence[Patterns]) -> PyTree:
    """Return, for each leaf, the number of the group that matches it.

    Args:
      params: parameters, a pytree of any structure.
      groups: patterns of each group, from the lowest layers to the top.

    Raises:
      ValueError: if a leaf is in no group or in several, or a pattern matches nothing.
    """
    groups_of: dict[str, list[int]] = {path: [] for path in leaves_by_path(params)}
    for number, group in enumerate(groups):
        for path in matching(params, group, argument=f"groups[{number}]"):
            groups_of[path].append(number)
    wrong = [f"{path} is in {numbers or 'none'}" for path, numbers in groups_of.items() if len(numbers) != 1]
    if wrong:
        raise ArgumentError(
            "groups",
            f"every leaf must be in exactly one group; {join_names(wrong)}",
        )
    return jax.tree.unflatten(jax.tree.structure(params), [numbers[0] for numbers in groups_of.values()])


def discriminative(
    optimizer: Optimizer,
    params: Params,
    groups: Sequence[Patterns],
    *,
    decay: float = 2.6,
) -> optax.GradientTransformation:
    r"""Return an optimizer with discriminative learning rates, smaller in lower, more general layers.

    η_{ℓ−1} = η_ℓ / decay, where η of the top group is the optimizer's own rate.

    Args:
      optimizer: optax transformation whose updates are proportional to its rate, such as SGD, Adam and AdamW.
      params: parameters with the structure to be optimised.
      groups: patterns of each group, from the lowest layers to the top; every leaf is in exactly one.
      decay: ratio of the rates of neighbouring groups, at least 1; 2.6 in the paper.

    Raises:
      ValueError: if a leaf is in no group or in several, a pattern matches nothing, or `decay` is below 1.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {"body": jnp.ones(()), "head": jnp.ones(())}
      >>> optimizer = discriminative(optax.sgd(1.0), params, ["body", "head"], decay=2.0)
      >>> updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
      >>> float(updates["body"]), float(updates["head"])
      (-0.5, -1.0)

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
    r"""Return the slanted triangular schedule: a short linear increase, then a long linear decrease.

    η_t = peak · (1 + p (ratio − 1)) / ratio with cut = ⌊T · cut_fraction⌋ and p = t / cut for t < cut, else
    p = 1 − (t − cut) / (cut · (1 / cut_fraction − 1)).

    Args:
      steps: T, the number of steps.
      peak: largest rate, reached at step `cut`.
      cut_fraction: fraction of the steps in which the rate increases, in (0, 1).
      ratio: ratio of the largest rate to the smallest, at least 1.

    Returns:
      An optax schedule `step -> rate`.

    Raises:
      ValueError: if no step would increase the rate, `cut_fraction` is outside (0, 1), or `ratio` is below 1.

    Examples:
      >>> rate = slanted_triangular(1000)
      >>> [round(float(rate(step)), 8) for step in (0, 100, 550)]
      [0.0003125, 0.01, 0.00515625]

    References:
      Howard & Ruder, Universal Language Model Fine-tuning for Text Classification, 2018, equation 3.
    """
    check_count("steps", steps)
    check_number("peak", peak)
    check_number("cut_fraction", cut_fraction, above=0)
    if cut_fraction >= 1:
        raise ArgumentError("cut_fraction", f"got {cut_fraction}; it must be in (0, 1)")
    check_number("ratio", ratio, 1)
    # The product with a fraction such as 1/49 may be below a whole number by a rounding error.
    cut = math.floor(steps * cut_fraction * (1 + _ROUNDING))
    if cut < 1:
        raise ArgumentError(
            "steps",
            f"got {steps}, of which the fraction {cut_fraction} is less than one step; it must be at least "
            f"{math.ceil((1 - _ROUNDING) / cut_fraction)}",
        )

    def rate(step: Array | int) -> Array:
        falling = 1 - (step - cut) / (cut * (1 / cut_fraction - 1))
        fraction = jnp.where(jnp.asarray(step) < cut, jnp.asarray(step) / cut, falling)
        return peak * (1 + jnp.maximum(fraction, 0) * (ratio - 1)) / ratio

    return rate


def l2_sp(
    start: Params,
    *,
    shared: Patterns = "**",
    alpha: float = 0.1,
    beta: float = 0.01,
    fisher: PyTree | None = None,
) -> jax.tree_util.Partial:
    r"""Return the L2-SP penalty, which pulls parameters towards their starting point instead of zero.

    Ω(w) = α/2 ‖w_S − w⁰_S‖² + β/2 ‖w_S̄‖², where S are the parameters shared with the source and S̄ the new
    ones. With `fisher`, the first term is α/2 Σ_j F_jj (w_j − w⁰_j)². It replaces weight decay.

    Args:
      start: w⁰, the parameters at the start of training.
      shared: patterns of S.
      alpha: α, the weight of the distance from the start.
      beta: β, the weight of the new parameters' norm.
      fisher: diagonal of the Fisher information, a tree like `start`, read on S only; None for ones.

    Returns:
      A function `params -> Ω`, for the `penalty` of `jm.transfer.fine_tune`.

    Raises:
      ValueError: if `shared` matches nothing, a weight is negative, or `fisher` has other leaves or shapes.

    Examples:
      >>> import jax.numpy as jnp
      >>> penalty = l2_sp({"body": jnp.ones(2), "head": jnp.zeros(2)}, shared="body", alpha=1.0, beta=0.5)
      >>> float(penalty({"body": jnp.zeros(2), "head": jnp.ones(2)}))
      1.5

    References:
      Li, Grandvalet & Davoine, Explicit Inductive Bias for Transfer Learning with Convolutional Networks,
      2018, equations 2 and 3.
    """
    check_number("alpha", alpha, 0)
    check_number("beta", beta, 0)
    in_shared = mask(start, shared, argument="shared")
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
    # A Partial's arguments are traced as data; in a closure they would become constants of the compiled step.
    return jax.tree_util.Partial(
        _l2_sp,
        start,
        jax.tree.map(lambda is_in, weight: alpha * weight if is_in else beta, in_shared, fisher),
        jax.tree.map(float, in_shared),
    )


def _l2_sp(start: Params, weights: PyTree, in_shared: PyTree, params: Params) -> Array:
    terms = jax.tree.map(
        lambda w, w0, weight, shared: 0.5 * (weight * jnp.square(w - shared * w0)).sum(),
        params,
        start,
        weights,
        in_shared,
    )
    return sum(jax.tree.leaves(terms), jnp.zeros(()))
