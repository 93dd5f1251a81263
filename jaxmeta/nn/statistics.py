"""What enters the batch normalisations of a network, measured and replaced from outside.

For networks that keep running averages (`flax.linen.BatchNorm`) and for those that are handed their
statistics (`jaxmeta.nn.BatchNorm`) alike: the network is called as for inference, and before or after
each of these layers its statistics are overwritten.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, traverse_util
from jaxtyping import Array

from jaxmeta.checks import ArgumentError
from jaxmeta.core import PyTree
from jaxmeta.nn.adapters import Network, as_model, forward, switches
from jaxmeta.nn.norm import STATISTICS, BatchNorm, entering

Variables = Mapping[str, Any]


def measure(
    network: Network, variables: Variables, x: Array | np.ndarray, *, own: bool = True, **arguments: Any
) -> tuple[Any, PyTree]:
    """Outputs in inference, and the mean and variance of what enters each batch normalisation.

    Of each channel, over examples and space; the variance is the biased one.

    Args:
      network: a module of `flax.linen`, or what `jm.nn.as_model` takes.
      variables: `{"params": …}`, and the statistics under "batch_stats" if it has them already.
      x: examples.
      own: whether each layer normalises by the very statistics measured on it; otherwise by those in
        `variables`, which needs a module of `flax.linen`.
      arguments: of the network's call. `deterministic`, `train` and `use_running_average` are set as
        for inference where it takes them.

    Returns:
      The outputs, and a nested dict with `{"mean", "var"}` of each layer, as under "batch_stats".

    Raises:
      ValueError: the network has no batch normalisation; or one that normalises by its batch when the
        network is called with `arguments`, is masked, or is called twice.
    """
    if isinstance(network, linen.Module):
        outputs, stats = _of_module(network, variables, x, own, arguments)
    elif not own or arguments:
        raise ArgumentError(
            "network",
            f"got {type(network).__name__}; without a module of flax.linen its layers can only "
            f"normalise by their own statistics (own=True, got {own}), and its call takes no other "
            f"arguments, got {sorted(arguments)}",
        )
    else:
        model = as_model(network)
        outputs, stats = forward(model, variables["params"], x)
    if not stats:
        raise ArgumentError("network", f"{type(network).__name__} has no batch normalisation")
    return outputs, stats


def with_statistics(variables: Variables, stats: PyTree) -> dict[str, Any]:
    """`variables` with these layers' statistics replaced and all else as it was."""
    kept = traverse_util.flatten_dict(variables.get(STATISTICS, {}))
    return {
        **variables,
        STATISTICS: traverse_util.unflatten_dict({**kept, **traverse_util.flatten_dict(stats)}),
    }


def pooled(stats: Sequence[PyTree], sizes: Sequence[int]) -> PyTree:
    """Statistics of all examples from those of batches of these sizes: var = within + between.

    mean = Σ_b p_b mean_b and var = Σ_b p_b (var_b + (mean_b − mean)²), with p_b a batch's part of all.
    """
    parts = np.asarray(sizes) / np.sum(sizes)

    def of_layer(*batches: Mapping[str, Array]) -> dict[str, Array]:
        pairs = list(zip(parts, batches, strict=True))
        mean = sum(part * batch["mean"] for part, batch in pairs)
        var = sum(part * (batch["var"] + jnp.square(batch["mean"] - mean)) for part, batch in pairs)
        return {"mean": mean, "var": var}

    return jax.tree.map(of_layer, *stats, is_leaf=_is_layer)


def layers(stats: PyTree) -> int:
    """How many layers these statistics are of; those of `flax.linen.scan` lie on a leading axis."""
    return sum(math.prod(layer["mean"].shape[:-1]) for layer in jax.tree.leaves(stats, is_leaf=_is_layer))


def _is_layer(node: Any) -> bool:
    return isinstance(node, Mapping) and "mean" in node and not isinstance(node["mean"], Mapping)


def _of_module(network, variables, x, own, arguments):
    arguments = switches(network, False) | arguments
    called: list[Any] = []

    def intercept(call, args, kwargs, context):
        layer = context.module
        if context.method_name != "__call__" or not isinstance(layer, linen.BatchNorm | BatchNorm):
            return call(*args, **kwargs)
        # A transformation (scan, remat) may trace a layer more than once, each time from a root of its own.
        origin: Any = layer.scope
        if any(origin.root is root and layer.path == path for root, path in called):
            raise ArgumentError(
                "network", f"its layer {_named(layer)} is called twice; statistics are those of one call"
            )
        called.append((origin.root, layer.path))
        stats = _entering(layer, *args, **kwargs)
        outputs = None if own else call(*args, **kwargs)
        for name, value in stats.items():
            layer.put_variable(STATISTICS, name, value)
        return call(*args, **kwargs) if own else outputs

    with linen.intercept_methods(intercept):
        outputs, state = network.apply(variables, x, mutable=[STATISTICS], **arguments)
    measured = traverse_util.flatten_dict(state.get(STATISTICS, {}))
    paths = {path for _, path in called}
    return outputs, traverse_util.unflatten_dict({p: leaf for p, leaf in measured.items() if p[:-1] in paths})


def _entering(layer, *args, **kwargs):
    bound = inspect.signature(layer.__call__).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given.get("mask") is not None:
        raise ArgumentError(
            "network", f"its layer {_named(layer)} is given a mask; hand over real examples only"
        )
    if isinstance(layer, linen.BatchNorm):
        running = given["use_running_average"]
        if not (layer.use_running_average if running is None else running):
            raise ArgumentError(
                "network",
                f"its layer {_named(layer)} normalises by its batch; hand over the argument with "
                "which the network does inference (training=False, say)",
            )
    stats = entering(given["x"], getattr(layer, "axis", -1))
    return stats | {"mean": stats["mean"] + given.get("offset", 0.0)}


def _named(layer):
    return "/".join(layer.path) or type(layer).__name__
