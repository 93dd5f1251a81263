"""The one training loop of transfer learning: mini-batches, an objective, an optax optimizer."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxmeta.checks import check_count
from jaxmeta.core import Key, Optimizer, Params, PyTree
from jaxmeta.transfer.freezing import apply_unfrozen, only_unfrozen

_REPORTS = 20
# Steps fold their number into the key: these are beyond every step.
_ORDER = 0xFFFFFFFF


class Batches(NamedTuple):
    """Examples to draw mini-batches from.

    Attributes:
      arrays: by name, with a common first axis.
      size: examples of a mini-batch.
    """

    arrays: Mapping[str, Any]
    size: int


def descend(
    objective: Callable[..., tuple[Array, PyTree]],
    params: Params,
    state: PyTree,
    optimizer: Optimizer,
    *,
    frozen: PyTree,
    data: Mapping[str, Batches],
    steps: int,
    key: Key,
    extra: PyTree = None,
    report: Callable[[int, float], None] | None = None,
    every: int | None = None,
    look: Callable[[int, Params, PyTree], None] | None = None,
) -> tuple[Params, PyTree, Float[Array, " steps"]]:
    """Steps of `optimizer` on `objective`, as one compiled loop.

    Args:
      objective: `(params, state, batches, extra, progress, key) -> (value, state)`, with one dict of arrays a
        name of `data`, and progress in [0, 1). One and the same function for repeated trainings.
      params: what is trained, save where `frozen`.
      state: what the network keeps besides.
      optimizer: of what is not frozen.
      frozen: bools like `params`.
      data: by name. Each goes through its examples in a new random order each epoch; what is left over of an
        epoch waits for another.
      steps: at least 1.
      key: of the order, and of what the objective draws.
      extra: arrays handed to the objective.
      report: called with step and loss, and `look` with step, params and state, after `every` steps each.
      every: None for about twenty times.

    Raises:
      ValueError: `steps`, `every` or a batch size below 1.
      FloatingPointError: the loss is no longer finite.
    """
    check_count("steps", steps)
    if every is not None:
        check_count("every", every)
    for batches in data.values():
        check_count("batch_size", batches.size)
    leaves, structure = jax.tree.flatten(frozen)
    sizes = tuple((name, batches.size) for name, batches in sorted(data.items()))
    arrays = {name: jax.tree.map(jnp.asarray, dict(batches.arrays)) for name, batches in data.items()}
    static = (objective, optimizer, tuple(leaves), structure, sizes)
    opt_state = only_unfrozen(optimizer, frozen).init(params)
    carry = (params, state, opt_state, jnp.zeros(steps))
    every = max(1, -(-steps // _REPORTS)) if every is None else every
    done = 0
    while done < steps:
        until = min(done + every, steps) if report or look else steps
        carry = _advance(*static, carry, arrays, extra, key, done, until)
        done = until
        last = float(carry[3][done - 1])
        if not np.isfinite(last):
            raise FloatingPointError(_not_finite(np.asarray(carry[3][:done])))
        if report:
            report(done, last)
        if look:
            look(done, carry[0], carry[1])
    return carry[0], carry[1], carry[3]


def _not_finite(losses: np.ndarray) -> str:
    """Say of losses, the last of which is not finite, where that began and what may help."""
    first = int(np.argmin(np.isfinite(losses)))
    said = f"the loss is {losses[first]} in step {first + 1}"
    if first:
        return f"{said}; try a smaller step size"
    # Nothing had been trained.
    return (
        f"{said}, which no step size can change: look at the inputs, the targets and the parameters to begin "
        "with; JAX_DEBUG_NANS=1 with JAX_DISABLE_JIT=1 (jax_debug_nans) names the operation that gives a NaN"
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _advance(objective, optimizer, leaves, structure, sizes, carry, arrays, extra, key, start, stop):
    frozen = jax.tree.unflatten(structure, leaves)
    transformation = only_unfrozen(optimizer, frozen)

    keys = {name: jax.random.fold_in(key, np.uint32(_ORDER - place)) for place, (name, _) in enumerate(sizes)}
    examples = {name: jax.tree.leaves(arrays[name])[0].shape[0] for name, _ in sizes}
    size_of = {name: min(size, examples[name]) for name, size in sizes}
    in_epoch = {name: examples[name] // size_of[name] for name, _ in sizes}

    def order(name, index):
        return jax.random.permutation(jax.random.fold_in(keys[name], index // in_epoch[name]), examples[name])

    def step(index, carry):
        (params, state, opt_state, losses), orders = carry
        own = jax.random.fold_in(key, index)
        # Sorting is slow where examples are many: once an epoch, not once a step.
        orders = {
            name: lax.cond(index % in_epoch[name] == 0, partial(order, name, index), lambda old=old: old)
            for name, old in orders.items()
        }
        batches = {
            name: _rows(arrays[name], orders[name], (index % in_epoch[name]) * size_of[name], size_of[name])
            for name in orders
        }
        progress = index / losses.shape[0]

        def value_of(params):
            return objective(params, state, batches, extra or {}, progress, own)

        (value, new_state), grads = jax.value_and_grad(value_of, has_aux=True)(params)
        updates, opt_state = transformation.update(grads, opt_state, params)
        params = apply_unfrozen(params, updates, frozen)
        losses = losses.at[index].set(value.astype(losses.dtype))
        return (params, {**state, **new_state}, opt_state, losses), orders

    return lax.fori_loop(start, stop, step, (carry, {name: order(name, start) for name in keys}))[0]


def _rows(arrays, order, first, size):
    rows = lax.dynamic_slice_in_dim(order, first, size)
    return jax.tree.map(lambda leaf: leaf[rows], arrays)
