"""Networks that look at a gradient one coordinate at a time: the learned optimizers' insides.

All coordinates share the weights and each has a state of its own, so that parameters of any shape and
number are one batch. Coordinates are the LAST axis: thousands of them fill a CPU's vector registers and a
product's columns, which the twenty features of a state do not.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxmeta.core import PyTree
from jaxmeta.nn.defaults import lecun_normal

Feedback = Literal["gate", "pre_gate"]
FEEDBACKS = get_args(Feedback)


def log_and_sign(x: Float[Array, " *shape"], p: float = 10.0) -> Float[Array, "2 *shape"]:  # noqa: F821
    """Gradients of all magnitudes as two numbers that a network can tell apart.

    φ_p(x) = (ln|x|/p, sign x) if |x| ≥ e^{−p}, else (−1, e^p x); the first is continuous there, of −1.

    Examples:
      >>> print(log_and_sign(jnp.array([1.0, -0.01, 0.0])))
      [[ 0.         -0.46051702 -1.        ]
       [ 1.         -1.          0.        ]]

    References:
      Andrychowicz et al., Learning to learn by gradient descent by gradient descent, 2016, appendix A.
    """
    large = jnp.abs(x) >= jnp.exp(-p)
    # Guarded on both branches: the logarithm's derivative at zero would be NaN in the other one.
    magnitude = jnp.where(large, jnp.log(jnp.where(large, jnp.abs(x), 1.0)) / p, -1.0)
    return jnp.stack([magnitude, jnp.where(large, jnp.sign(x), jnp.exp(p) * x)])


def _uniform(low: float, high: float) -> Callable[..., Any]:
    def init(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, low, high)

    return init


class CoordinatewiseLSTM(linen.Module):
    """An LSTM layer over `n` coordinates: two arrays, "kernel" and "bias".

    Attributes:
      features: of the state.
      forget_bias: added to the forget gate before its sigmoid.
      kernel_init: of the kernel.
      bias_init: of the bias.

    References:
      Hochreiter & Schmidhuber, 1997; with the forget gate of Gers et al., 2000.
    """

    features: int
    forget_bias: float = 1.0
    kernel_init: Callable[..., Any] = lecun_normal
    bias_init: Callable[..., Any] = linen.initializers.zeros

    @linen.compact
    def __call__(
        self, state: tuple[Float[Array, "features n"], Float[Array, "features n"]], x: Float[Array, "d n"]
    ) -> tuple[tuple[Float[Array, "features n"], Float[Array, "features n"]], Float[Array, "features n"]]:
        """`(state, inputs) -> (state, outputs)`; the state is (h, c)."""
        h, c = state
        inputs = jnp.concatenate([x, h])
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[0], 4 * self.features))
        bias = self.param("bias", self.bias_init, (4 * self.features,))
        gates = jnp.tensordot(kernel, inputs, (0, 0)) + bias[:, None]
        enter, candidate, forget, leave = jnp.split(gates, 4)
        c = jax.nn.sigmoid(forget + self.forget_bias) * c + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
        h = jax.nn.sigmoid(leave) * jnp.tanh(c)
        return (h, c), h


def _before_first(features: int, n: int, dtype: DTypeLike) -> tuple[Float[Array, "f n"], Float[Array, "f n"]]:
    """The state (h, c) of an LSTM that has seen nothing."""
    return jnp.zeros((features, n), dtype), jnp.zeros((features, n), dtype)


class ProposedUpdate(linen.Module):
    """Andrychowicz's optimizer: LSTM layers on a coordinate's gradient, then a linear layer to its update.

    Attributes:
      layers: features of each LSTM layer; without any, the update is linear in the preprocessed gradient.
      preprocess: p of `log_and_sign`, or None to take gradients as they are.
      scale: of the update. 0.01 in the official code, 0.1 in the paper.
      zero_output: whether the linear layer starts at zero, and so with no update at all.

    References:
      Andrychowicz et al., 2016, section 2.1.
    """

    layers: tuple[int, ...] = (20, 20)
    preprocess: float | None = 10.0
    scale: float = 0.01
    zero_output: bool = False

    @linen.compact
    def __call__(self, state: PyTree, gradient: Float[Array, " n"]) -> tuple[PyTree, Float[Array, " n"]]:
        """`(state, gradient) -> (state, update)`."""
        x = gradient[None] if self.preprocess is None else log_and_sign(gradient, self.preprocess)
        after = []
        for features, before in zip(self.layers, state, strict=True):
            own, x = CoordinatewiseLSTM(features)(before, x)
            after.append(own)
        init = linen.initializers.zeros if self.zero_output else linen.initializers.lecun_normal()
        kernel = self.param("kernel", init, (x.shape[0], 1))
        bias = self.param("bias", linen.initializers.zeros, (1,))
        return tuple(after), self.scale * (jnp.tensordot(kernel[:, 0], x, 1) + bias)

    def initial(self, n: int, dtype: DTypeLike) -> PyTree:
        """The state before the first step."""
        return tuple(_before_first(features, n, dtype) for features in self.layers)


class GatedUpdate(linen.Module):
    r"""Ravi and Larochelle's optimizer: the parameters are an LSTM's cell state.

    θ_t = f_t ⊙ θ_{t−1} − i_t ⊙ ∇_t,  i_t = σ(W_I [x_t, θ_{t−1}, i_{t−1}] + b_I),  f_t likewise,

    where x_t is φ(L_t) and φ(∇_t), with φ of `log_and_sign`, or (with `hidden`, as in the official code)
    the output of an ordinary LSTM on them. The raw ∇_t is what i_t multiplies. i_0 = f_0 = 0.

    Attributes:
      hidden: features of that LSTM; None for the one-layer form.
      feedback: what of i_{t−1} and f_{t−1} the gates see: "gate", the gates themselves, as in the paper's
        formula; "pre_gate", their values before σ, as in the official code.
      preprocess: p of `log_and_sign`.

    References:
      Ravi & Larochelle, Optimization as a Model for Few-Shot Learning, 2017, equations 2 to 5.
    """

    hidden: int | None = 20
    feedback: Feedback = "gate"
    preprocess: float = 10.0

    @linen.compact
    def __call__(
        self,
        state: dict[str, PyTree],
        gradient: Float[Array, " n"],
        loss: Float[Array, ""],
        params: Float[Array, " n"],
    ) -> tuple[dict[str, PyTree], Float[Array, " n"]]:
        """`(state, gradient, loss, params) -> (state, update)`, the latter to be added to params."""
        small = _uniform(-0.01, 0.01)
        losses = jnp.broadcast_to(log_and_sign(loss, self.preprocess)[:, None], (2, gradient.shape[0]))
        x = jnp.concatenate([losses, log_and_sign(gradient, self.preprocess)])
        after: dict[str, PyTree] = {}
        if self.hidden is not None:
            lstm = CoordinatewiseLSTM(
                self.hidden, forget_bias=0.0, kernel_init=small, bias_init=small, name="lstm"
            )
            after["lstm"], x = lstm(state["lstm"], x)
        gates = {}
        # Forgets a hundredth and steps by a hundredth at first.
        for name, bias_range in (("forget", (4.0, 5.0)), ("input", (-5.0, -4.0))):
            kernel = self.param(f"{name}_kernel", small, (x.shape[0] + 2,))
            bias = self.param(f"{name}_bias", _uniform(*bias_range), ())
            pre_gate = (
                jnp.tensordot(kernel[:-2], x, 1) + kernel[-2] * params + kernel[-1] * state[name] + bias
            )
            gates[name] = jax.nn.sigmoid(pre_gate)
            after[name] = gates[name] if self.feedback == "gate" else pre_gate
        # The change and not the new value, which adding it to θ would round once more.
        return after, (gates["forget"] - 1) * params - gates["input"] * gradient

    def initial(self, n: int, dtype: DTypeLike) -> dict[str, PyTree]:
        """The state before the first step."""
        state: dict[str, PyTree] = {"forget": jnp.zeros(n, dtype), "input": jnp.zeros(n, dtype)}
        if self.hidden is not None:
            state["lstm"] = _before_first(self.hidden, n, dtype)
        return state
