"""Batch normalisation of Equinox with its statistics as values; only `from_equinox` imports this file."""

from collections.abc import Hashable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxmeta.core import PyTree

Path = tuple[str, ...]


class BatchNorm(eqx.nn.StatefulLayer):
    """A replacement for `equinox.nn.BatchNorm` that normalises by given statistics or by those of the batch.

    The state receives the statistics of the batch and no running averages, which would mix several batches.

    Attributes:
      weight, bias: parameters of the replaced layer, under the same names.
      index: index of mean and variance in the state.
      given_stats: given mean and variance; None for those of the batch.
      mask: mask `(n,)` of the whole batch, False for padding; None before `filled`.
      path: path of the layer in the network.
      size: number of channels.
      axis_name, eps: settings of the replaced layer.
    """

    weight: Array | None
    bias: Array | None
    index: eqx.nn.StateIndex[Any]
    given_stats: tuple[Array, Array] | None
    mask: Array | None
    path: Path = eqx.field(static=True)
    size: int = eqx.field(static=True)
    axis_name: Hashable = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __call__(
        self,
        x: Array,
        state: eqx.nn.State,
        *,
        key: Array | None = None,
        inference: bool | None = None,
    ) -> tuple[Array, eqx.nn.State]:
        """Normalise one example `(channels, *space)` of a batch under `jax.vmap`."""
        del key, inference
        if self.given_stats is None:
            mean, var = self._of_batch(x)
            dtype = state.get(self.index)[0].dtype
            state = state.set(self.index, (mean.astype(dtype), var.astype(dtype)))
        else:
            mean, var = self.given_stats

        def per_channel(values: Array) -> Array:
            return values.reshape(-1, *(1,) * (x.ndim - 1))

        gain = lax.rsqrt(var + self.eps)
        if self.weight is not None:
            gain = gain * self.weight
        outputs = (x - per_channel(mean)) * per_channel(gain)
        if self.bias is not None:
            outputs = outputs + per_channel(self.bias)
        return outputs.astype(x.dtype), state

    def _of_batch(self, x: Array) -> tuple[Array, Array]:
        """Return mean and (biased) variance of each channel over the real examples and over space."""
        space = tuple(range(1, x.ndim))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        assert self.mask is not None
        real = self.mask[lax.axis_index(self.axis_name)]
        count = jnp.maximum(lax.psum(real.astype(x.dtype), self.axis_name), 1)
        x = jnp.where(real, x, 0)
        mean = lax.psum(x.mean(space), self.axis_name) / count
        deviations = jnp.where(real, x - mean.reshape(-1, *(1,) * len(space)), 0)
        return mean, lax.psum(jnp.square(deviations).mean(space), self.axis_name) / count


def with_explicit_statistics(module: eqx.Module) -> tuple[Any, dict[Path, BatchNorm]]:
    """Return a module with each `equinox.nn.BatchNorm` replaced, and the new layers by their paths.

    Raises:
      ValueError: another layer keeps state, or layers are stacked, as by `equinox.filter_vmap`.
    """
    norms: dict[Path, BatchNorm] = {}
    others: list[str] = []

    def replaced(keys: tuple[Any, ...], node: Any) -> Any:
        path = tuple(jax.tree_util.keystr((entry,), simple=True) for entry in keys)
        if isinstance(node, eqx.nn.StateIndex):
            others.append("/".join(path))
        if not isinstance(node, eqx.nn.BatchNorm):
            return node
        if node.weight is not None and node.weight.shape != (node.input_size,):
            raise ValueError(
                f"{'/'.join(path)} is a stack of equinox.nn.BatchNorm, with weights of shape "
                f"{node.weight.shape}; keep its layers in a list or tuple, and call them one by one"
            )
        norms[path] = BatchNorm(
            node.weight, node.bias, _index(path), None, None, path, node.input_size, _axis(node), node.eps
        )
        return norms[path]

    def is_leaf(node: Any) -> bool:
        return isinstance(node, eqx.nn.BatchNorm | eqx.nn.StateIndex)

    module = jax.tree_util.tree_map_with_path(replaced, module, is_leaf=is_leaf)
    if others:
        raise ValueError(
            f"{type(module).__name__} keeps mutable state: {', '.join(others)}; the only state that a "
            "network may have is the statistics of equinox.nn.BatchNorm"
        )
    return module, norms


def filled(module: Any, stats: Mapping[Path, Array], mask: Array) -> Any:
    """Return a module whose layers have the given statistics and the mask of the batch."""

    def fill(node: Any) -> Any:
        if not isinstance(node, BatchNorm):
            return node
        paths = [(*node.path, statistic) for statistic in ("mean", "var")]
        given_stats = tuple(stats[path] for path in paths) if all(path in stats for path in paths) else None
        return eqx.tree_at(
            lambda layer: (layer.given_stats, layer.mask),
            node,
            (given_stats, mask),
            is_leaf=lambda leaf: leaf is None,
        )

    return jax.tree.map(fill, module, is_leaf=lambda node: isinstance(node, BatchNorm))


def new_state(norms: Mapping[Path, BatchNorm], dtype: Any) -> eqx.nn.State:
    """Return a state for the statistics of all layers."""
    return eqx.nn.State(
        [
            _index(path, (jnp.zeros(layer.size, dtype), jnp.ones(layer.size, dtype)))
            for path, layer in norms.items()
        ]
    )


def statistics(module: Any, state: eqx.nn.State) -> dict[Path, Array]:
    """Return the statistics by which each layer of a `filled` module was normalised."""
    result: dict[Path, Array] = {}
    layers = jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, BatchNorm))
    for layer in layers:
        if isinstance(layer, BatchNorm):
            used: PyTree = state.get(layer.index) if layer.given_stats is None else layer.given_stats
            result |= {(*layer.path, name): value for name, value in zip(("mean", "var"), used, strict=True)}
    return result


def _index(path: Path, init: Any = None) -> eqx.nn.StateIndex[Any]:
    """Return the index in a state of the layer at `path`, the same in all copies of the network."""
    index = eqx.nn.StateIndex(init)
    # As `equinox.nn.make_with_state` does.
    object.__setattr__(index, "marker", "/".join(path))
    return index


def _axis(layer: eqx.nn.BatchNorm) -> Hashable:
    name = layer.axis_name
    return tuple(name) if isinstance(name, list | tuple) else name
