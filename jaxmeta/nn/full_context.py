"""Full context embeddings: LSTMs that make each embedding depend on the whole support set."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen
from jaxtyping import Array, Bool, Float

from jaxmeta.core import Key, Params


class SupportContext(linen.Module):
    """A bidirectional LSTM over the support set: g(x_i, S) = h→_i + h←_i + g'(x_i).

    References:
      Vinyals et al., Matching Networks, 2016, appendix A.2.
    """

    @linen.compact
    def __call__(self, z: Float[Array, "n dim"], mask: Bool[Array, " n"]) -> Float[Array, "n dim"]:
        def step(cell, carry, example):
            z, real = example
            new, h = cell(carry, z)
            # Padding does not change the state.
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
    """An LSTM that embeds a query, f(x, S), by attending to the support set for `steps` steps.

    Attributes:
      steps: number of attention steps K, at least 1.

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
            # Where all examples are padding, the softmax is taken over all of them, since one over −∞ alone
            # is NaN; its weights are set to zero after it.
            attended = mask | ~mask.any()
            attention = jax.nn.softmax(jnp.where(attended[None, :], h @ support.T, -jnp.inf))
            attention = jnp.where(mask[None, :], attention, 0)
            (c, new), _ = cell((c, h), jnp.concatenate([z, attention @ support], axis=1))
            h = new + z
        return h


class FullContext(NamedTuple):
    """The embeddings of support set and queries as pure functions of one tree of parameters.

    Attributes:
      init: `(key) -> params`.
      support: `(params, z (n, dim), mask (n,)) -> (n, dim)`.
      query: `(params, z (m, dim), support (n, dim), mask (n,)) -> (m, dim)`.
    """

    init: Callable[[Key], Params]
    support: Callable[[Params, Array, Array], Array]
    query: Callable[[Params, Array, Array, Array], Array]


def full_context(dim: int, steps: int) -> FullContext:
    """Build full context embeddings of width `dim`, with `steps` attention steps."""
    support_context, query_context = SupportContext(), QueryContext(steps)

    def init(key: Key) -> Params:
        z, mask = jnp.zeros((1, dim)), jnp.ones(1, bool)
        keys = jax.random.split(key)
        return {
            "support": support_context.init(keys[0], z, mask)["params"],
            "query": query_context.init(keys[1], z, z, mask)["params"],
        }

    def support(params: Params, z: Array, mask: Array) -> Array:
        return jnp.asarray(support_context.apply({"params": params["support"]}, z, mask))

    def query(params: Params, z: Array, examples: Array, mask: Array) -> Array:
        return jnp.asarray(query_context.apply({"params": params["query"]}, z, examples, mask))

    return FullContext(init, support, query)
