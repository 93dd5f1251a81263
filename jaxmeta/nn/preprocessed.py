"""Networks behind a fixed conversion of their inputs, such as resizing or a scale of pixels."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmeta.checks import ArgumentError, check_kind
from jaxmeta.core import Key, Model, Params
from jaxmeta.nn.adapters import Network, as_model


def preprocessed(network: Network, adapter: Model) -> Model:
    """Return `network` behind an adapter of its inputs that has no parameters.

    The parameters are those of `network`, so that pretrained ones fit, and so do the patterns of
    `jm.transfer.freeze`.

    Args:
      network: network of any kind that `jm.nn.as_model` takes.
      adapter: model without parameters and statistics, such as `jm.transfer.input_adapter`.

    Raises:
      ValueError: `jm.nn.as_model` refuses the network; `adapter` is not a `jm.Model`; or, at `init`, the
        adapter has parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> adapter = jm.transfer.input_adapter(channels=3, size=32, mean=0.5, std=0.5)
      >>> model = jm.nn.preprocessed(jm.nn.Conv4(filters=8), adapter)
      >>> params = model.init(jax.random.key(0), jnp.zeros((2, 28, 28, 1)))
      >>> model.apply(params, jnp.zeros((2, 28, 28, 1))).shape
      (2, 32)
    """
    model = as_model(network)
    check_kind("adapter", adapter, Model, "a jm.Model")

    def init(key: Key, x: Any) -> Params:
        if jax.tree.leaves(jax.eval_shape(adapter.init, key, x)):
            raise ArgumentError(
                "adapter", "it has parameters; put it in front of the network with jm.transfer.classifier"
            )
        # The shape is enough, because an initialisation does not depend on the values of its example.
        converted = jax.eval_shape(lambda x: adapter.apply({}, x), x)
        return model.init(key, jnp.zeros(converted.shape, converted.dtype))

    def apply(params: Params, x: Any, **settings: Any) -> Any:
        return model.apply(params, adapter.apply({}, x), **settings)

    def apply_norm(params: Params, x: Any, **settings: Any) -> tuple[Any, Any]:
        assert model.apply_norm is not None
        return model.apply_norm(params, adapter.apply({}, x), **settings)

    return model._replace(init=init, apply=apply, apply_norm=None if model.apply_norm is None else apply_norm)
