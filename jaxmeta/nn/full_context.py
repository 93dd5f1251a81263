"""Full context embeddings: LSTMs through which embeddings see the whole support set."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen
from jaxtyping import Array, Bool, Float

from jaxmeta.core import Key, Params


class SupportContext(linen.Module):
    """g(x_i, S) = h→_i + h←_i + g'(x_i), of a bidirectional LSTM over the support set.

    References:
      Vinyals et al., Matching Networks, 2016, appendix A.2.
    """

    @linen.compact
    def __call__(self, z: Float[Array, "n dim"], mask: Bool[Array, " n"]) -> Float[Array, "n dim"]:
        def step(cell, carry, example):
            z, real = example
            new, h = cell(carry, z)
            # Padding leaves no trace.
            return jax.tree.map(lambda a, b: jnp.where(real, a, b), new, carry), h

        total = z
        for name, reverse in (("forward", False), ("backward", True)):
            cell = linen.OptimizedLSTMCell(z.shape[1], name=name)
            zeros = (jnp.zeros_like(z[0]), jnp.zeros_like(z[0]))
            scan = linen.scan(
                step, variable_broadcast="params", split_rngs={"params": False}, reverse=reverse
            )
            total = total + scan(cell, zeros, (z, mask))[1]
        return total


class QueryContext(linen.Module):
    """f(x, S): an LSTM that attends to the support set for `steps` steps.

    Attributes:
      steps: K, at least 1.

    References:
      Vinyals et al., Matching Networks, 2016, appendix A.1.
    """

    steps: int

    @linen.compact
    def __call__(
        self, z: Float[Array, "m dim"], support: Float[Array, "n dim"], mask: Bool[Array, " n"]
    ) -> Float[Array, "m dim"]:
        cell = linen.OptimizedLSTMCell(z.shape[1], name="attention")
        c, h = jnp.zeros_like(z), z
        for _ in range(self.steps):
            # Of padding alone there is nothing to attend to, and a softmax of −∞ would be NaN.
            seen = mask | ~mask.any()
            attention = jax.nn.softmax(jnp.where(seen[None, :], h @ support.T, -jnp.inf))
            attention = jnp.where(mask[None, :], attention, 0)
            (c, new), _ = cell((c, h), jnp.concatenate([z, attention @ support], axis=1))
            h = new + z
        return h


class FullContext(NamedTuple):
    """Both as pure functions of one tree of parameters.

    Attributes:
      init: `(key) -> params`.
      support: `(params, z (n, dim), mask (n,)) -> (n, dim)`.
      query: `(params, z (m, dim), support (n, dim), mask (n,)) -> (m, dim)`.
    """

    init: Callable[[Key], Params]
    support: Callable[[Params, Array, Array], Array]
    query: Callable[[Params, Array, Array, Array], Array]


def full_context(dim: int, steps: int) -> FullContext:
    """Full context embeddings of width `dim`, with `steps` attention steps."""
    over_support, of_query = SupportContext(), QueryContext(steps)

    def init(key: Key) -> Params:
        z, mask = jnp.zeros((1, dim)), jnp.ones(1, bool)
        keys = jax.random.split(key)
        return {
            "support": over_support.init(keys[0], z, mask)["params"],
            "query": of_query.init(keys[1], z, z, mask)["params"],
        }

    def support(params: Params, z: Array, mask: Array) -> Array:
        return jnp.asarray(over_support.apply({"params": params["support"]}, z, mask))

    def query(params: Params, z: Array, examples: Array, mask: Array) -> Array:
        return jnp.asarray(of_query.apply({"params": params["query"]}, z, examples, mask))

    return FullContext(init, support, query)
