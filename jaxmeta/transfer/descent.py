"""The one training loop of transfer learning: mini-batches, an objective, an optax optimizer."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float

from jaxmeta.core import Key, Params, PyTree
from jaxmeta.transfer.freezing import FROZEN, TRAINED, apply_unfrozen

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
    optimizer: optax.GradientTransformation,
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
    if steps < 1:
        raise ValueError(f"steps: got {steps}; it must be at least 1")
    if every is not None and every < 1:
        raise ValueError(f"every: got {every}; it must be at least 1")
    for name, batches in data.items():
        if batches.size < 1:
            raise ValueError(f"batch_size: got {batches.size}, of {name}; it must be at least 1")
    labels = jax.tree.map(lambda still: FROZEN if still else TRAINED, frozen)
    leaves, structure = jax.tree.flatten(labels)
    sizes = tuple((name, batches.size) for name, batches in sorted(data.items()))
    arrays = {name: jax.tree.map(jnp.asarray, dict(batches.arrays)) for name, batches in data.items()}
    static = (objective, optimizer, tuple(leaves), structure, sizes)
    opt_state = _partitioned(optimizer, tuple(leaves), structure).init(params)
    carry = (params, state, opt_state, jnp.zeros(steps))
    every = max(1, -(-steps // _REPORTS)) if every is None else every
    done = 0
    while done < steps:
        until = min(done + every, steps) if report or look else steps
        carry = _advance(*static, carry, arrays, extra, key, done, until)
        done = until
        last = float(carry[3][done - 1])
        if not np.isfinite(last):
            raise FloatingPointError(f"the loss is {last} after {done} steps; try a smaller step size")
        if report:
            report(done, last)
        if look:
            look(done, carry[0], carry[1])
    return carry[0], carry[1], carry[3]


def _partitioned(optimizer, labels, structure):
    tree = jax.tree.unflatten(structure, labels)
    return optax.partition({TRAINED: optimizer, FROZEN: optax.set_to_zero()}, tree)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _advance(objective, optimizer, labels, structure, sizes, carry, arrays, extra, key, start, stop):
    frozen = jax.tree.unflatten(structure, [label == FROZEN for label in labels])
    transformation = _partitioned(optimizer, labels, structure)

    def step(index, carry):
        params, state, opt_state, losses = carry
        own = jax.random.fold_in(key, index)
        batches = {
            name: _minibatch(arrays[name], size, index, jax.random.fold_in(key, np.uint32(_ORDER - place)))
            for place, (name, size) in enumerate(sizes)
        }
        progress = index / losses.shape[0]

        def value_of(params):
            return objective(params, state, batches, extra or {}, progress, own)

        (value, new_state), grads = jax.value_and_grad(value_of, has_aux=True)(params)
        updates, opt_state = transformation.update(grads, opt_state, params)
        params = apply_unfrozen(params, updates, frozen)
        return params, {**state, **new_state}, opt_state, losses.at[index].set(value.astype(losses.dtype))

    return lax.fori_loop(start, stop, step, carry)


def _minibatch(arrays, size, step, key):
    """The `step`-th mini-batch of a random order that is new in each epoch."""
    n = jax.tree.leaves(arrays)[0].shape[0]
    size = min(size, n)
    a_turn = n // size
    order = jax.random.permutation(jax.random.fold_in(key, step // a_turn), n)
    rows = lax.dynamic_slice_in_dim(order, (step % a_turn) * size, size)
    return jax.tree.map(lambda leaf: leaf[rows], arrays)
