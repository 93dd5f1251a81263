"""External memories, and networks of a controller with an external memory.

A memory is a module with a method `initial()`, which returns its state before an episode, and a call
`(state, h) -> (state, reads)`, which writes and reads at addresses computed from the controller's output `h`.
States are dicts of arrays for one sequence: the caller batches sequences by `vmap` and scans over time, by
`jaxmeta.nn.recurrence.scan_steps`. Layers of a step should be the `Dense` of that module, whose gradients are
computed for all steps at once.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen
from jax import lax
from jaxtyping import Array, Float

from jaxmeta.checks import ArgumentError, check_word
from jaxmeta.nn.recurrence import Dense, keep

State = dict[str, Any]


def content_weights(
    memory: Float[Array, "rows width"],
    keys: Float[Array, "heads width"],
    strengths: Float[Array, " heads"] | None = None,
) -> Float[Array, "heads rows"]:
    """Return the softmax over rows of β cos(key, row).

    With β = 1 the weights are nearly uniform: with 128 rows, none exceeds e² / (e² + 127) = 0.055.

    Args:
      memory: memory of shape (rows, width).
      keys: one key for each head.
      strengths: β of each head; None for 1.

    References:
      Graves et al., Neural Turing Machines, 2014, equations 5 and 6; Santoro et al., 2016, equations 2 and 3.
    """
    # The norms divide the products, which are few numbers, instead of the rows of the memory. The formula is
    # written so that the backward pass keeps the memory itself and no other array of its size, such as a
    # transpose or the derivative of a square.
    products = jnp.einsum("hw,rw->hr", keys, memory)
    similarity = products * _inverse_norms(keys)[:, None] * _inverse_norms(memory)[None, :]
    return jax.nn.softmax(similarity if strengths is None else strengths[:, None] * similarity)


def _inverse_norms(rows):
    # The constant is inside the root: the derivative of a norm at a row of zeros, with which every memory
    # starts, would be infinite.
    return lax.rsqrt((rows * rows).sum(-1) + 1e-12)


def least_used(usage: Float[Array, " rows"], count: int) -> Float[Array, "count rows"]:
    """Return the `count` rows of smallest usage as one-hot vectors, the least used first.

    Of rows with equal usage the first comes first. Gradients do not flow through the choice.
    """
    _, indices = lax.top_k(-lax.stop_gradient(usage), count)
    return jax.nn.one_hot(keep(indices), usage.shape[0], dtype=usage.dtype)


class LRUA(linen.Module):
    """Least recently used access: a memory that overwrites the rows least used, or those just read.

    Head j has a key k_j, a gate g_j = σ(α_j) and an addition a_j, computed from the controller's output by
    linear layers (with tanh after those of k_j and a_j):

        w^w_j = g_j w^r_j + (1 − g_j) w^lu        (w^r_j of the previous step; w^lu marks the least used rows)
        M     = M with its least used row set to zero + Σ_j w^w_j a_jᵀ
        w^r_j = softmax cos(k_j, M),   r_j = w^r_j M
        w^u   = γ w^u + Σ_j w^r_j + Σ_j w^w_j

    Where published descriptions differ, an attribute chooses; the defaults follow the paper's text.

    Attributes:
      rows: number of rows of the memory.
      width: number of values of a row of the memory.
      heads: number of reads, and of writes, in each step.
      decay: factor γ of the usage in each step; 0.95 in every public implementation.
      write: additions a_j to the memory: "key" for the key k_j, "separate" for an output of their own.
      least: least used rows that w^lu marks: "shared" for the `heads` least used rows in every head,
        "per_head" for the j-th least used row in head j.
      score: memory with which keys are compared: the one "after" the write, or "before" it. Reads are always
        from the memory after the write.
      key_strength: True to sharpen reads by a strength β = 1 + softplus of each head, as the Neural Turing
        Machine does.
      first_read: read weights before the first step: "first_row", or "uniform" over all rows.

    Raises:
      ValueError: an unknown choice, or fewer rows than heads.

    References:
      Santoro et al., Meta-Learning with Memory-Augmented Neural Networks, 2016, section 3.2.
    """

    rows: int = 128
    width: int = 40
    heads: int = 4
    decay: float = 0.99
    write: Literal["key", "separate"] = "key"
    least: Literal["shared", "per_head"] = "shared"
    score: Literal["after", "before"] = "after"
    key_strength: bool = False
    first_read: Literal["first_row", "uniform"] = "first_row"

    def __post_init__(self) -> None:
        for name, known in (
            ("write", ("key", "separate")),
            ("least", ("shared", "per_head")),
            ("score", ("after", "before")),
            ("first_read", ("first_row", "uniform")),
        ):
            check_word(name, getattr(self, name), known)
        if self.rows < self.heads:
            raise ArgumentError(
                "rows", f"got {self.rows}; it must be at least the number of heads, {self.heads}"
            )
        super().__post_init__()

    def initial(self) -> State:
        """Return the state of an empty memory whose first row was the last one used."""
        first = jax.nn.one_hot(0, self.rows)
        read = first if self.first_read == "first_row" else jnp.full(self.rows, 1 / self.rows)
        return {
            "memory": jnp.zeros((self.rows, self.width)),
            "usage": first,
            "read_weights": jnp.broadcast_to(read, (self.heads, self.rows)),
            "reads": jnp.zeros(self.heads * self.width),
        }

    @linen.compact
    def __call__(self, state: Mapping[str, Any], h: Float[Array, " hidden"]) -> tuple[State, Array]:
        def linear(name, size):
            return Dense(self.heads * size, name=name)(h).reshape(self.heads, size)

        keys = jnp.tanh(linear("keys", self.width))
        gates = jax.nn.sigmoid(linear("gates", 1))[:, 0]
        additions = keys if self.write == "key" else jnp.tanh(linear("additions", self.width))
        strengths = 1 + jax.nn.softplus(linear("strengths", 1))[:, 0] if self.key_strength else None
        state = self.access(state, keys, gates, additions, strengths)
        return state, state["reads"]

    def access(
        self,
        state: Mapping[str, Any],
        keys: Float[Array, "heads width"],
        gates: Float[Array, " heads"],
        additions: Float[Array, "heads width"],
        strengths: Float[Array, " heads"] | None = None,
    ) -> State:
        """Return the state after one step.

        Args:
          state: state before the step.
          keys: k_j of each head.
          gates: g_j of each head, in [0, 1].
          additions: a_j of each head.
          strengths: β of each head; None for 1.
        """
        memory, usage = state["memory"], state["usage"]
        rows = least_used(usage, self.heads)
        marked = rows if self.least == "per_head" else rows.sum(0, keepdims=True)
        gate = gates[:, None]
        written = gate * state["read_weights"] + (1 - gate) * marked
        new_memory = keep(memory * (1 - rows[0])[:, None] + jnp.einsum("hr,hw->rw", written, additions))
        read = content_weights(new_memory if self.score == "after" else memory, keys, strengths)
        return {
            "memory": new_memory,
            "usage": self.decay * usage + read.sum(0) + written.sum(0),
            "read_weights": read,
            "reads": (read @ new_memory).reshape(-1),
        }


class NTM(linen.Module):
    """The memory of the Neural Turing Machine, addressed by content and by location.

    Each head interpolates its content weights with its weights of the previous step, shifts them and
    sharpens them. In each step all heads write, then all read; writes erase before they add.

    Attributes:
      rows: number of rows of the memory.
      width: number of values of a row of the memory.
      heads: number of read heads, and of write heads.
      shift: largest shift of a head in one step, in rows.

    References:
      Graves, Wayne & Danihelka, Neural Turing Machines, 2014, sections 3.1 to 3.3.
    """

    rows: int = 128
    width: int = 40
    heads: int = 4
    shift: int = 1

    def initial(self) -> State:
        """Return the state of a nearly empty memory with all heads at its first row."""
        first = jnp.broadcast_to(jax.nn.one_hot(0, self.rows), (self.heads, self.rows))
        return {
            "memory": jnp.full((self.rows, self.width), 1e-6),
            "read_weights": first,
            "write_weights": first,
            "reads": jnp.zeros(self.heads * self.width),
        }

    @linen.compact
    def __call__(self, state: Mapping[str, Any], h: Float[Array, " hidden"]) -> tuple[State, Array]:
        def linear(name, size):
            return Dense(self.heads * size, name=name)(h).reshape(self.heads, size)

        def addressed(kind, memory, previous):
            return address(
                memory,
                previous,
                keys=jnp.tanh(linear(f"{kind}_keys", self.width)),
                strengths=jax.nn.softplus(linear(f"{kind}_strengths", 1))[:, 0],
                gates=jax.nn.sigmoid(linear(f"{kind}_gates", 1))[:, 0],
                shifts=jax.nn.softmax(linear(f"{kind}_shifts", 2 * self.shift + 1)),
                sharpening=1 + jax.nn.softplus(linear(f"{kind}_sharpening", 1))[:, 0],
            )

        memory = state["memory"]
        written = addressed("write", memory, state["write_weights"])
        erased = jax.nn.sigmoid(linear("erasures", self.width))
        memory = erase_and_add(memory, written, erased, jnp.tanh(linear("additions", self.width)))
        read = addressed("read", memory, state["read_weights"])
        reads = (read @ memory).reshape(-1)
        return {"memory": memory, "read_weights": read, "write_weights": written, "reads": reads}, reads


def address(
    memory: Float[Array, "rows width"],
    previous: Float[Array, "heads rows"],
    *,
    keys: Float[Array, "heads width"],
    strengths: Float[Array, " heads"],
    gates: Float[Array, " heads"],
    shifts: Float[Array, "heads offsets"],
    sharpening: Float[Array, " heads"],
) -> Float[Array, "heads rows"]:
    """Return the weights of the Neural Turing Machine's heads.

    Content weights (equations 5 and 6) are interpolated (7), shifted (8) and sharpened (9).

    Args:
      memory: memory of shape (rows, width).
      previous: weights of the previous step.
      keys: key of each head.
      strengths: key strength β of each head.
      gates: weight of the content weights, in [0, 1]; `previous` has the rest.
      shifts: distribution over shifts −s … s of each head.
      sharpening: exponent of each head, at least 1.
    """
    gate = gates[:, None]
    weights = gate * content_weights(memory, keys, strengths) + (1 - gate) * previous
    reach = shifts.shape[1] // 2
    shifted = sum(
        shifts[:, i, None] * jnp.roll(weights, offset, axis=1)
        for i, offset in enumerate(range(-reach, reach + 1))
    )
    # A power as exp(γ log w) is differentiable in γ; the constant keeps the gradient at w = 0 finite.
    powers = jnp.exp(sharpening[:, None] * jnp.log(shifted + 1e-12))
    return powers / powers.sum(-1, keepdims=True)


def erase_and_add(
    memory: Float[Array, "rows width"],
    weights: Float[Array, "heads rows"],
    erasures: Float[Array, "heads width"],
    additions: Float[Array, "heads width"],
) -> Float[Array, "rows width"]:
    """Return M Π_j (1 − w_j e_jᵀ) + Σ_j w_j a_jᵀ: all heads erase before any adds (section 3.2)."""
    kept = (1 - weights[:, :, None] * erasures[:, None, :]).prod(0)
    return memory * kept + weights.T @ additions


class MemoryNetwork(linen.Module):
    """A controller with an external memory or, for comparison, without one.

    It has three methods, so that a loop over time contains only what depends on the previous step: `project`
    maps the inputs of all steps at once, `step` advances controller and memory by one step, and `outputs`
    maps the features of all steps at once.

    Attributes:
      out: width of the output layer.
      memory: external memory, an `LRUA` or an `NTM`; None for a controller alone.
      hidden: width of the controller's state.
      controller: kind of controller, "lstm" or "feed_forward".

    Raises:
      ValueError: an unknown controller.

    References:
      Santoro et al., 2016, section 3.1 and appendix.
    """

    out: int
    memory: linen.Module | None = LRUA()
    hidden: int = 200
    controller: Literal["lstm", "feed_forward"] = "lstm"

    def __post_init__(self) -> None:
        check_word("controller", self.controller, ("lstm", "feed_forward"))
        super().__post_init__()

    def setup(self) -> None:
        gates = 4 if self.controller == "lstm" else 1
        self.inputs: linen.Dense = linen.Dense(gates * self.hidden)
        # One product for the controller's previous output and its previous reads.
        self.recurrent: Dense = Dense(gates * self.hidden, use_bias=False)
        self.head: linen.Dense = linen.Dense(self.out)

    def initial(self) -> State:
        """Return the state before an episode."""
        state: State = {}
        if self.controller == "lstm":
            state |= {"c": jnp.zeros(self.hidden), "h": jnp.zeros(self.hidden)}
        if self.memory is not None:
            state["memory"] = self.memory.initial()
        return state

    def project(self, x: Float[Array, "*steps d"]) -> Float[Array, "*steps gates"]:
        """Return the contribution of the inputs to the controller's gates, for each step."""
        return self.inputs(x)

    def step(self, state: Mapping[str, Any], projected: Float[Array, " gates"]) -> tuple[State, Array]:
        """Return the state after a step, and its features for `outputs`."""
        new_state: State = {}
        previous = [state["h"]] if self.controller == "lstm" else []
        if self.memory is not None:
            previous.append(state["memory"]["reads"])
        if previous:
            projected = projected + self.recurrent(jnp.concatenate(previous))
        if self.controller == "lstm":
            i, f, g, o = jnp.split(projected, 4)
            # The 1 opens the forget gate at first, so that the state is kept.
            c = jax.nn.sigmoid(f + 1) * state["c"] + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            new_state |= {"c": c, "h": h}
        else:
            h = jnp.tanh(projected)
        if self.memory is None:
            return new_state, h
        new_state["memory"], reads = self.memory(state["memory"], h)
        return new_state, jnp.concatenate([h, reads])

    def outputs(self, features: Float[Array, "*steps features"]) -> Float[Array, "*steps out"]:
        """Return the outputs for features of `step`."""
        return self.head(features)

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, " out"]:
        """Return the outputs of the first step of an episode."""
        return self.outputs(self.step(self.initial(), self.project(x))[1])
