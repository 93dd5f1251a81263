"""Measurement and replacement of the batch statistics of a network.

Both work for layers with running averages (`flax.linen.BatchNorm`) and with explicit statistics
(`jaxmeta.nn.BatchNorm`): the network is called in inference mode, and the statistics of each such layer are
overwritten before or after the layer is called.
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
from jaxmeta.nn.norm import STATISTICS, BatchNorm, input_statistics, is_layer_statistics

Variables = Mapping[str, Any]


def measure(
    network: Network,
    variables: Variables,
    x: Array | np.ndarray,
    *,
    use_measured: bool = True,
    **arguments: Any,
) -> tuple[Any, PyTree]:
    """Return outputs in inference mode, and the mean and variance of the inputs of each batch normalisation.

    Mean and variance are per channel, over examples and spatial positions; the variance is biased.

    Args:
      network: module of `flax.linen`, or network of any kind that `jm.nn.as_model` takes.
      variables: `{"params": …}`, with statistics under "batch_stats" if the network has them already.
      x: examples.
      use_measured: True to normalise the inputs of each layer by the statistics measured on them; False to
        normalise by the statistics in `variables`, which needs a module of `flax.linen`.
      arguments: further arguments of the network's call, which need a module of `flax.linen`.
        `deterministic`, `train` and `use_running_average` are set for inference where the call takes them.

    Returns:
      The outputs, and a nested dict with `{"mean", "var"}` of each layer, as in "batch_stats".

    Raises:
      ValueError: the network has no batch normalisation; a batch normalisation normalises by its batch when
        the network is called with `arguments`, is masked, or is called twice; or the network is not a module
        of `flax.linen` and needs to be one.
    """
    if isinstance(network, linen.Module):
        outputs, stats = _of_module(network, variables, x, use_measured, arguments)
    elif arguments:
        raise ArgumentError(
            "network",
            f"got {type(network).__name__} and the arguments {sorted(arguments)}, which only a module of "
            "flax.linen takes; leave them out",
        )
    elif not use_measured:
        raise ArgumentError(
            "network",
            f"got {type(network).__name__}; exact statistics of several batches need a module of flax.linen; "
            "pass all examples in one batch, or exact=False",
        )
    else:
        model = as_model(network)
        outputs, stats = forward(model, variables["params"], x)
    if not stats:
        raise ArgumentError("network", f"{type(network).__name__} has no batch normalisation")
    return outputs, stats


def with_statistics(variables: Variables, stats: PyTree) -> dict[str, Any]:
    """Return `variables` with the statistics in `stats`; layers not in `stats` keep theirs."""
    kept = traverse_util.flatten_dict(variables.get(STATISTICS, {}))
    return {
        **variables,
        STATISTICS: traverse_util.unflatten_dict({**kept, **traverse_util.flatten_dict(stats)}),
    }


def pooled(stats: Sequence[PyTree], sizes: Sequence[int]) -> PyTree:
    """Combine the statistics of batches of the given sizes into the statistics of all examples.

    mean = Σ_b p_b mean_b and var = Σ_b p_b (var_b + (mean_b − mean)²), where p_b is the share of batch b.
    """
    parts = np.asarray(sizes) / np.sum(sizes)

    def of_layer(*batches: Mapping[str, Array]) -> dict[str, Array]:
        pairs = list(zip(parts, batches, strict=True))
        mean = sum(part * batch["mean"] for part, batch in pairs)
        var = sum(part * (batch["var"] + jnp.square(batch["mean"] - mean)) for part, batch in pairs)
        return {"mean": mean, "var": var}

    return jax.tree.map(of_layer, *stats, is_leaf=is_layer_statistics)


def num_layers(stats: PyTree) -> int:
    """Return the number of layers in `stats`; layers of `flax.linen.scan` are stacked on a leading axis."""
    return sum(
        math.prod(layer["mean"].shape[:-1]) for layer in jax.tree.leaves(stats, is_leaf=is_layer_statistics)
    )


def _of_module(network, variables, x, use_measured, arguments):
    arguments = switches(network, False) | arguments
    called: list[Any] = []

    def intercept(call, args, kwargs, context):
        layer = context.module
        if context.method_name != "__call__" or not isinstance(layer, linen.BatchNorm | BatchNorm):
            return call(*args, **kwargs)
        # A transformation (scan, remat) may trace a layer several times, each time under a new root scope.
        origin: Any = layer.scope
        if any(origin.root is root and layer.path == path for root, path in called):
            raise ArgumentError(
                "network",
                f"its layer {_named(layer)} is called twice; statistics can be measured for one call only",
            )
        called.append((origin.root, layer.path))
        stats = _input_statistics(layer, *args, **kwargs)
        outputs = None if use_measured else call(*args, **kwargs)
        for name, value in stats.items():
            layer.put_variable(STATISTICS, name, value)
        return call(*args, **kwargs) if use_measured else outputs

    with linen.intercept_methods(intercept):
        outputs, state = network.apply(variables, x, mutable=[STATISTICS], **arguments)
    measured = traverse_util.flatten_dict(state.get(STATISTICS, {}))
    paths = {path for _, path in called}
    return outputs, traverse_util.unflatten_dict({p: leaf for p, leaf in measured.items() if p[:-1] in paths})


def _input_statistics(layer, *args, **kwargs):
    bound = inspect.signature(layer.__call__).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    if arguments.get("mask") is not None:
        raise ArgumentError("network", f"its layer {_named(layer)} is given a mask; pass real examples only")
    if isinstance(layer, linen.BatchNorm):
        running = arguments["use_running_average"]
        if not (layer.use_running_average if running is None else running):
            raise ArgumentError(
                "network",
                f"its layer {_named(layer)} normalises by its batch; pass the argument with which the "
                "network runs in inference mode (such as training=False)",
            )
    stats = input_statistics(arguments["x"], getattr(layer, "axis", -1))
    return stats | {"mean": stats["mean"] + arguments.get("offset", 0.0)}


def _named(layer):
    return "/".join(layer.path) or type(layer).__name__
