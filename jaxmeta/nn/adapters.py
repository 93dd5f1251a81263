"""From a framework's network to a `Model` of pure functions."""

import inspect

from flax import linen

from jaxmeta.core import Model
from jaxmeta.nn.norm import STATISTICS

Network = Model | linen.Module


def as_model(network: Network) -> Model:
    """`network` as a `Model`; a `Model` passes through unchanged.

    A Linen module takes `(x)` or `(x, mask)`. Its parameters are the plain nested dict of the
    collection "params"; batch statistics come from `jm.nn.BatchNorm` and are values, never
    state.

    Raises:
      ValueError: `network` is neither; or, at `init`, the module keeps mutable state of its own
        (such as `flax.linen.BatchNorm`'s running averages, which mean nothing across tasks).

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> model = jm.nn.as_model(jm.nn.MLP(out=1))
      >>> params = model.init(jax.random.key(0), jnp.zeros((10, 1)))
      >>> model.apply(params, jnp.zeros((10, 1))).shape
      (10, 1)
    """
    if isinstance(network, Model):
        return network
    if not isinstance(network, linen.Module):
        raise ValueError(
            f"network must be a jaxmeta Model or a flax.linen.Module, got {type(network).__name__}"
        )
    takes_mask = "mask" in inspect.signature(type(network).__call__).parameters

    def inputs(x, mask):
        return (x, mask) if takes_mask else (x,)

    def init(key, x):
        variables = network.init(key, *inputs(x, None))
        state = sorted(set(variables) - {"params"})
        if state:
            raise ValueError(
                f"{type(network).__name__} keeps mutable state in {state}; use jaxmeta.nn.BatchNorm for "
                "batch normalisation, whose statistics are values, and no other state"
            )
        return variables["params"]

    def apply(params, x):
        return network.apply({"params": params}, *inputs(x, None))

    def apply_norm(params, x, *, stats=None, mask=None):
        if stats is not None:
            return network.apply({"params": params, STATISTICS: stats}, *inputs(x, mask)), stats
        outputs, state = network.apply({"params": params}, *inputs(x, mask), mutable=[STATISTICS])
        stats = state.get(STATISTICS, {})
        if stats and mask is not None and not takes_mask:
            raise ValueError(
                f"{type(network).__name__} normalises by batch statistics, and this batch is padded: its "
                "__call__ must take `mask` and hand it to jaxmeta.nn.BatchNorm"
            )
        return outputs, stats

    return Model(init, apply, apply_norm)
