"""External memories of a recurrent controller, and the network of the two.

A memory is a module with two methods: `initial()`, its state before an episode, and a call
`(state, h) -> (state, reads)` that writes and reads by what the controller's output `h` asks for. Its
states are dicts of arrays of one sequence: sequences are batched by `vmap`, and time is the caller's scan.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen
from jax import lax
from jaxtyping import Array, Float

from jaxmeta.checks import ArgumentError

State = dict[str, Any]


def content_weights(
    memory: Float[Array, "rows width"],
    keys: Float[Array, "heads width"],
    strengths: Float[Array, " heads"] | None = None,
) -> Float[Array, "heads rows"]:
    """Softmax over rows of β cos(key, row); β is 1 where `strengths` are None.

    Without strengths weights are nearly flat: of 128 rows none can weigh more than 0.055.

    References:
      Graves et al., Neural Turing Machines, 2014, equations 5 and 6; Santoro et al., 2016, equations 2 and 3.
    """
    # Lengths divide the products, few numbers, and not the memory, many. Written so that a gradient keeps the
    # memory itself: a transpose, or the derivative of a square, would be arrays of its size, too.
    products = jnp.einsum("hw,rw->hr", keys, memory)
    similarity = products * _per_length(keys)[:, None] * _per_length(memory)[None, :]
    return jax.nn.softmax(similarity if strengths is None else strengths[:, None] * similarity)


def _per_length(rows):
    # Within the root: the derivative of a norm at a row of zeros, as every memory has, would be infinite.
    return lax.rsqrt((rows * rows).sum(-1) + 1e-12)


def least_used(usage: Float[Array, " rows"], count: int) -> Float[Array, "count rows"]:
    """The `count` rows of smallest usage as one-hot vectors, the least used first; of equal ones the first.

    They are constants to every gradient.
    """
    left, found = lax.stop_gradient(usage), []
    for _ in range(count):
        row = jax.nn.one_hot(left.argmin(), usage.shape[0], dtype=usage.dtype)
        left = jnp.where(row > 0, jnp.inf, left)
        found.append(row)
    return jnp.stack(found)


class LRUA(linen.Module):
    """Least recently used access: an episode's new facts overwrite what is not needed, or what was just read.

    With keys k_j, gates g_j = σ(α_j) and additions a_j of head j, all linear in the controller's output:

        w^w_j = g_j w^r_j + (1 − g_j) w^lu        where the last step read, or the least used rows
        M     = M without its least used row + Σ_j w^w_j a_jᵀ
        w^r_j = softmax cos(k_j, M),   r_j = w^r_j M
        w^u   = γ w^u + Σ_j w^r_j + Σ_j w^w_j

    Published descriptions leave questions open; defaults are the paper's text.

    Attributes:
      rows: number of rows of the memory.
      width: number of values of a row of the memory.
      heads: number of reads of each step, and of writes.
      decay: γ, what is left of the usage after a step; 0.95 in every public implementation.
      write: what is added to the memory, a_j: the "key", or something "separate".
      least: which least used rows w^lu marks: "shared", as many as there are heads, for all of them; or
        "per_head", for head j the j-th least used.
      score: which memory keys are compared with: that "after" the write, or "before" it. Read is always what
        is there after it.
      key_strength: whether heads sharpen their reads by β = 1 + softplus, as the Neural Turing Machine does.
      first_read: where an episode begins to read: at the "first_row", or in all, "uniform".

    Raises:
      ValueError: an unknown choice; fewer rows than heads, whose least used rows are asked for.

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
            if getattr(self, name) not in known:
                raise ArgumentError(name, f"got {getattr(self, name)!r}; it must be one of {known}")
        if self.rows < self.heads:
            raise ArgumentError(
                "rows", f"got {self.rows}; {self.heads} heads ask for as many least used rows, at least that"
            )
        super().__post_init__()

    def initial(self) -> State:
        """An empty memory, of which the first row was used and read last."""
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
        def linear(name, each):
            return linen.Dense(self.heads * each, name=name)(h).reshape(self.heads, each)

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
        """The state after one step, `gates` being those after the sigmoid."""
        memory, usage = state["memory"], state["usage"]
        rows = least_used(usage, self.heads)
        marked = rows if self.least == "per_head" else rows.sum(0, keepdims=True)
        gate = gates[:, None]
        written = gate * state["read_weights"] + (1 - gate) * marked
        after = memory * (1 - rows[0])[:, None] + jnp.einsum("hr,hw->rw", written, additions)
        read = content_weights(after if self.score == "after" else memory, keys, strengths)
        return {
            "memory": after,
            "usage": self.decay * usage + read.sum(0) + written.sum(0),
            "read_weights": read,
            "reads": (read @ after).reshape(-1),
        }


class NTM(linen.Module):
    """Addressing of the Neural Turing Machine, by content and by place, with one write beside every read.

    Each head interpolates the weights of its content with those of its last step, shifts them and
    sharpens them; write heads erase before they add.

    Attributes:
      rows: number of rows of the memory.
      width: number of values of a row of the memory.
      heads: number of read heads, and of write heads.
      shift: the farthest that a head shifts in one step.

    References:
      Graves, Wayne & Danihelka, Neural Turing Machines, 2014, sections 3.1 to 3.3.
    """

    rows: int = 128
    width: int = 40
    heads: int = 4
    shift: int = 1

    def initial(self) -> State:
        """A nearly empty memory, with all heads at its first row."""
        first = jnp.broadcast_to(jax.nn.one_hot(0, self.rows), (self.heads, self.rows))
        return {
            "memory": jnp.full((self.rows, self.width), 1e-6),
            "read_weights": first,
            "write_weights": first,
            "reads": jnp.zeros(self.heads * self.width),
        }

    @linen.compact
    def __call__(self, state: Mapping[str, Any], h: Float[Array, " hidden"]) -> tuple[State, Array]:
        def linear(name, each):
            return linen.Dense(self.heads * each, name=name)(h).reshape(self.heads, each)

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
    """Weights by content (equations 5 and 6), interpolated (7), shifted (8) and sharpened (9).

    Args:
      memory: what the keys are compared with.
      previous: weights of the last step.
      keys, strengths: of the content.
      gates: how much of the content and not of `previous`, in [0, 1].
      shifts: distribution over shifts −s … s.
      sharpening: power, at least 1.
    """
    gate = gates[:, None]
    weights = gate * content_weights(memory, keys, strengths) + (1 - gate) * previous
    reach = shifts.shape[1] // 2
    shifted = sum(
        shifts[:, i, None] * jnp.roll(weights, offset, axis=1)
        for i, offset in enumerate(range(-reach, reach + 1))
    )
    # Powers through logarithms, whose gradient at 0 must be finite.
    powers = jnp.exp(sharpening[:, None] * jnp.log(shifted + 1e-12))
    return powers / powers.sum(-1, keepdims=True)


def erase_and_add(
    memory: Float[Array, "rows width"],
    weights: Float[Array, "heads rows"],
    erasures: Float[Array, "heads width"],
    additions: Float[Array, "heads width"],
) -> Float[Array, "rows width"]:
    """M Π_j (1 − w_j e_jᵀ) + Σ_j w_j a_jᵀ: all heads erase before any adds (section 3.2)."""
    kept = (1 - weights[:, :, None] * erasures[:, None, :]).prod(0)
    return memory * kept + weights.T @ additions


class MemoryNetwork(linen.Module):
    """A controller with an external memory, or without one, for comparison.

    Three methods: `project` what comes in from outside, of all steps at once; `step` by step through
    memory and controller; `outputs` from the features of all steps at once. Only what depends on the
    step before is in the loop.

    Attributes:
      out: width of the output layer.
      memory: external memory: `LRUA`, `NTM`, or None.
      hidden: width of the controller's state.
      controller: kind of controller: "lstm" or "feed_forward".

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
        if self.controller not in ("lstm", "feed_forward"):
            raise ArgumentError("controller", f'got {self.controller!r}; it must be "lstm" or "feed_forward"')
        super().__post_init__()

    def setup(self) -> None:
        gates = 4 if self.controller == "lstm" else 1
        self.inputs: linen.Dense = linen.Dense(gates * self.hidden)
        # Of the controller's last output and of what it read, in one product.
        self.recurrent: linen.Dense = linen.Dense(gates * self.hidden, use_bias=False)
        self.head: linen.Dense = linen.Dense(self.out)

    def initial(self) -> State:
        """State before an episode."""
        state: State = {}
        if self.controller == "lstm":
            state |= {"c": jnp.zeros(self.hidden), "h": jnp.zeros(self.hidden)}
        if self.memory is not None:
            state["memory"] = self.memory.initial()
        return state

    def project(self, x: Float[Array, "*steps d"]) -> Float[Array, "*steps gates"]:
        """What the controller has of its inputs, for each step."""
        return self.inputs(x)

    def step(self, state: Mapping[str, Any], projected: Float[Array, " gates"]) -> tuple[State, Array]:
        """The state after a step, and the features `outputs` needs of it."""
        after: State = {}
        before = [state["h"]] if self.controller == "lstm" else []
        if self.memory is not None:
            before.append(state["memory"]["reads"])
        if before:
            projected = projected + self.recurrent(jnp.concatenate(before))
        if self.controller == "lstm":
            i, f, g, o = jnp.split(projected, 4)
            # A forget gate that begins open.
            c = jax.nn.sigmoid(f + 1) * state["c"] + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            after |= {"c": c, "h": h}
        else:
            h = jnp.tanh(projected)
        if self.memory is None:
            return after, h
        after["memory"], reads = self.memory(state["memory"], h)
        return after, jnp.concatenate([h, reads])

    def outputs(self, features: Float[Array, "*steps features"]) -> Float[Array, "*steps out"]:
        """Outputs from the features of `step`."""
        return self.head(features)

    def __call__(self, x: Float[Array, " d"]) -> Float[Array, " out"]:
        """Outputs of a first step."""
        return self.outputs(self.step(self.initial(), self.project(x))[1])
