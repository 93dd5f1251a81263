"""The training loop of transfer learning: mini-batches, an objective and an optax optimizer."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxmeta.checks import check_count, check_key, check_optimizer
from jaxmeta.core import Key, Optimizer, Params, PyTree
from jaxmeta.transfer.freezing import apply_unfrozen, only_unfrozen

_REPORTS = 20
# Steps fold their number into the key; the keys of epoch orders use numbers that no step reaches.
_ORDER = 0xFFFFFFFF


class Batches(NamedTuple):
    """Examples from which mini-batches are drawn.

    Attributes:
      arrays: arrays by name, with a common first axis.
      size: number of examples in a mini-batch.
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
    callback: Callable[[int, Params, PyTree], None] | None = None,
) -> tuple[Params, PyTree, Float[Array, " steps"]]:
    """Minimise `objective` by steps of `optimizer`, in one compiled loop.

    Args:
      objective: function `(params, state, batches, extra, progress, key) -> (value, state)`, where batches
        has a dict of arrays for each name of `data`, and progress is in [0, 1). Pass the same function object
        in repeated trainings to reuse the compiled loop.
      params: parameters, trained except where `frozen`.
      state: other collections of the network, such as batch statistics.
      optimizer: optax transformation of the parameters that are not frozen.
      frozen: tree of bools with the structure of `params`.
      data: examples by name. Each epoch has a new random order; an incomplete last batch is left out.
      steps: number of steps, at least 1.
      key: key of the orders and of the objective's random numbers.
      extra: arrays passed on to the objective.
      report: function of step and loss, called after every `every` steps.
      every: steps between two calls; None for about 20 calls.
      callback: function of step, params and state, called after every `every` steps.

    Returns:
      The trained params, the state, and the loss of each step.

    Raises:
      ValueError: if `steps`, `every` or a batch size is below 1.
      FloatingPointError: if the loss becomes NaN or infinite.
    """
    check_count("steps", steps)
    check_optimizer("optimizer", optimizer)
    check_key("key", key)
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
        until = min(done + every, steps) if report or callback else steps
        carry = _advance(*static, carry, arrays, extra, key, done, until)
        done = until
        last = float(carry[3][done - 1])
        if not np.isfinite(last):
            raise FloatingPointError(_not_finite(np.asarray(carry[3][:done])))
        if report:
            report(done, last)
        if callback:
            callback(done, carry[0], carry[1])
    return carry[0], carry[1], carry[3]


def _not_finite(losses: np.ndarray) -> str:
    """Return the error message for losses that end in NaN or infinity: where it began and what may help."""
    first = int(np.argmin(np.isfinite(losses)))
    message = f"the loss is {losses[first]} in step {first + 1}"
    if first:
        return f"{message}; try a smaller step size"
    # Nothing was trained before the first step, so the step size is not the cause.
    return (
        f"{message}, which no step size can change: check the inputs, targets and initial parameters; "
        "JAX_DEBUG_NANS=1 with JAX_DISABLE_JIT=1 (jax_debug_nans) names the operation that produces the NaN"
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _advance(objective, optimizer, leaves, structure, sizes, carry, arrays, extra, key, start, stop):
    frozen = jax.tree.unflatten(structure, leaves)
    transformation = only_unfrozen(optimizer, frozen)

    keys = {name: jax.random.fold_in(key, np.uint32(_ORDER - place)) for place, (name, _) in enumerate(sizes)}
    examples = {name: jax.tree.leaves(arrays[name])[0].shape[0] for name, _ in sizes}
    batch_size = {name: min(size, examples[name]) for name, size in sizes}
    per_epoch = {name: examples[name] // batch_size[name] for name, _ in sizes}

    def order(name, index):
        return jax.random.permutation(
            jax.random.fold_in(keys[name], index // per_epoch[name]), examples[name]
        )

    def step(index, carry):
        (params, state, opt_state, losses), orders = carry
        step_key = jax.random.fold_in(key, index)
        # A permutation is a sort, slow for many examples: compute it once per epoch.
        orders = {
            name: lax.cond(index % per_epoch[name] == 0, partial(order, name, index), lambda old=old: old)
            for name, old in orders.items()
        }
        batches = {
            name: _rows(
                arrays[name], orders[name], (index % per_epoch[name]) * batch_size[name], batch_size[name]
            )
            for name in orders
        }
        progress = index / losses.shape[0]

        def value_of(params):
            return objective(params, state, batches, extra or {}, progress, step_key)

        (value, new_state), grads = jax.value_and_grad(value_of, has_aux=True)(params)
        updates, opt_state = transformation.update(grads, opt_state, params)
        params = apply_unfrozen(params, updates, frozen)
        losses = losses.at[index].set(value.astype(losses.dtype))
        return (params, {**state, **new_state}, opt_state, losses), orders

    return lax.fori_loop(start, stop, step, (carry, {name: order(name, start) for name in keys}))[0]


def _rows(arrays, order, first, size):
    rows = lax.dynamic_slice_in_dim(order, first, size)
    return jax.tree.map(lambda leaf: leaf[rows], arrays)
