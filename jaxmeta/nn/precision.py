"""Mixed precision: networks that compute in fewer bits than their parameters have."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmeta.checks import ArgumentError
from jaxmeta.core import Model, PyTree
from jaxmeta.nn.adapters import Network, as_model


def in_precision(network: Network, dtype: DTypeLike = jnp.bfloat16) -> Model:
    """Return `network` as a `Model` that computes in `dtype` and has float32 parameters and outputs.

    Parameters and examples are cast to `dtype` where they are used, and outputs are cast to float32, so that
    inner and outer gradients, optimizer state, losses and batch statistics are float32. `jm.nn.BatchNorm`
    computes means and variances, and normalises, in float32.

    Args:
      network: network of any kind that `jm.nn.as_model` takes.
      dtype: floating-point type of the computation.

    Raises:
      ValueError: `dtype` is not a floating-point type, or `jm.nn.as_model` refuses the network.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> model = jm.nn.in_precision(jm.nn.MLP(out=1))
      >>> params = model.init(jax.random.key(0), jnp.zeros((10, 1)))
      >>> {leaf.dtype.name for leaf in jax.tree.leaves((params, model.apply(params, jnp.zeros((10, 1)))))}
      {'float32'}

    References:
      Micikevicius et al., Mixed Precision Training, 2018, section 3.1.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ArgumentError("dtype", f"got {jnp.dtype(dtype).name}; it must be a floating-point type")
    model = as_model(network)

    def apply(params: PyTree, x: Any, **settings: Any) -> PyTree:
        return _as(model.apply(_as(params, dtype), _as(x, dtype), **settings), jnp.float32)

    def apply_norm(params: PyTree, x: Any, **settings: Any) -> tuple[PyTree, PyTree]:
        assert model.apply_norm is not None
        outputs, stats = model.apply_norm(_as(params, dtype), _as(x, dtype), **settings)
        return _as((outputs, stats), jnp.float32)

    return model._replace(apply=apply, apply_norm=None if model.apply_norm is None else apply_norm)


def _as(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Cast the floating-point arrays of `tree` to `dtype`."""

    def cast(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)
