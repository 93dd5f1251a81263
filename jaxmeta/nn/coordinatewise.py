"""Coordinatewise networks of the learned optimizers.

All coordinates of a gradient share the weights, and each has its own state, so that parameters of any shape
and number are one batch. Coordinates are the LAST axis: thousands of them fill a CPU's vector registers and
the columns of a matrix product, which the twenty features of a state do not.
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
    """Return two features of moderate size for gradients of any magnitude.

    φ_p(x) = (ln|x|/p, sign x) if |x| ≥ e^{−p}, else (−1, e^p x). Both are continuous.

    Args:
      x: gradients.
      p: threshold in natural logarithms.

    Returns:
      The two features, on a new first axis.

    Examples:
      >>> print(log_and_sign(jnp.array([1.0, -0.01, 0.0])))
      [[ 0.         -0.46051702 -1.        ]
       [ 1.         -1.          0.        ]]

    References:
      Andrychowicz et al., Learning to learn by gradient descent by gradient descent, 2016, appendix A.
    """
    large = jnp.abs(x) >= jnp.exp(-p)
    # The argument is replaced as well as the result: `where` multiplies the derivative of the other branch by
    # zero, and the derivative of the logarithm at x = 0 is infinite.
    magnitude = jnp.where(large, jnp.log(jnp.where(large, jnp.abs(x), 1.0)) / p, -1.0)
    return jnp.stack([magnitude, jnp.where(large, jnp.sign(x), jnp.exp(p) * x)])


def _uniform(low: float, high: float) -> Callable[..., Any]:
    def init(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, low, high)

    return init


class CoordinatewiseLSTM(linen.Module):
    """An LSTM layer over `n` coordinates, with parameters "kernel" and "bias".

    Attributes:
      features: width of the state.
      forget_bias: constant added to the forget gate before its sigmoid.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias.

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
        """Return `(state, outputs)` after one step; the state is (h, c)."""
        h, c = state
        inputs = jnp.concatenate([x, h])
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[0], 4 * self.features))
        bias = self.param("bias", self.bias_init, (4 * self.features,))
        gates = jnp.tensordot(kernel, inputs, (0, 0)) + bias[:, None]
        input_gate, candidate, forget_gate, output_gate = jnp.split(gates, 4)
        kept = jax.nn.sigmoid(forget_gate + self.forget_bias) * c
        c = kept + jax.nn.sigmoid(input_gate) * jnp.tanh(candidate)
        h = jax.nn.sigmoid(output_gate) * jnp.tanh(c)
        return (h, c), h


def _initial_state(
    features: int, n: int, dtype: DTypeLike
) -> tuple[Float[Array, "f n"], Float[Array, "f n"]]:
    """Return the initial state (h, c) of an LSTM, which is zero."""
    return jnp.zeros((features, n), dtype), jnp.zeros((features, n), dtype)


class ProposedUpdate(linen.Module):
    """The optimizer network of Andrychowicz et al.: LSTM layers on a gradient, then a linear layer.

    Attributes:
      layers: width of each LSTM layer; () for an update that is linear in the preprocessed gradient.
      preprocess: the constant p of `log_and_sign`; None for gradients as they are.
      scale: factor of the update; 0.01 in the official code, 0.1 in the paper.
      zero_output: True for a linear layer that is zero at first, so that the first updates are zero.

    References:
      Andrychowicz et al., 2016, section 2.1.
    """

    layers: tuple[int, ...] = (20, 20)
    preprocess: float | None = 10.0
    scale: float = 0.01
    zero_output: bool = False

    @linen.compact
    def __call__(self, state: PyTree, gradient: Float[Array, " n"]) -> tuple[PyTree, Float[Array, " n"]]:
        """Return `(state, update)` for one gradient."""
        x = gradient[None] if self.preprocess is None else log_and_sign(gradient, self.preprocess)
        new_state = []
        for features, layer_state in zip(self.layers, state, strict=True):
            layer_state, x = CoordinatewiseLSTM(features)(layer_state, x)
            new_state.append(layer_state)
        init = linen.initializers.zeros if self.zero_output else linen.initializers.lecun_normal()
        kernel = self.param("kernel", init, (x.shape[0], 1))
        bias = self.param("bias", linen.initializers.zeros, (1,))
        return tuple(new_state), self.scale * (jnp.tensordot(kernel[:, 0], x, 1) + bias)

    def initial(self, n: int, dtype: DTypeLike) -> PyTree:
        """Return the state before the first step for `n` coordinates."""
        return tuple(_initial_state(features, n, dtype) for features in self.layers)


class GatedUpdate(linen.Module):
    r"""The optimizer network of Ravi & Larochelle: the parameters are an LSTM's cell state.

    θ_t = f_t ⊙ θ_{t−1} − i_t ⊙ ∇_t,
    i_t = σ(W_I [x_t, θ_{t−1}, i_{t−1}] + b_I),
    f_t = σ(W_F [x_t, θ_{t−1}, f_{t−1}] + b_F),

    with i_0 = f_0 = 0. The features x_t are φ(L_t) and φ(∇_t), where φ is `log_and_sign`, or, with `hidden`
    (as in the official code), the output of an ordinary LSTM on them. i_t multiplies the raw gradient ∇_t.

    Attributes:
      hidden: width of that LSTM; None for the one-layer form.
      feedback: previous values that the gates receive: "gate" for i_{t−1} and f_{t−1}, as in the paper's
        formula; "pre_gate" for their values before σ, as in the official code.
      preprocess: the constant p of `log_and_sign`.

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
        """Return `(state, update)` for one gradient and loss; the update is to be added to `params`."""
        small = _uniform(-0.01, 0.01)
        losses = jnp.broadcast_to(log_and_sign(loss, self.preprocess)[:, None], (2, gradient.shape[0]))
        x = jnp.concatenate([losses, log_and_sign(gradient, self.preprocess)])
        new_state: dict[str, PyTree] = {}
        if self.hidden is not None:
            lstm = CoordinatewiseLSTM(
                self.hidden, forget_bias=0.0, kernel_init=small, bias_init=small, name="lstm"
            )
            new_state["lstm"], x = lstm(state["lstm"], x)
        gates = {}
        # At first 1 − f and i are about σ(−4.5) = 0.01: gradient descent of step size 0.01 with slight decay.
        for name, bias_range in (("forget", (4.0, 5.0)), ("input", (-5.0, -4.0))):
            kernel = self.param(f"{name}_kernel", small, (x.shape[0] + 2,))
            bias = self.param(f"{name}_bias", _uniform(*bias_range), ())
            pre_gate = (
                jnp.tensordot(kernel[:-2], x, 1) + kernel[-2] * params + kernel[-1] * state[name] + bias
            )
            gates[name] = jax.nn.sigmoid(pre_gate)
            new_state[name] = gates[name] if self.feedback == "gate" else pre_gate
        # Computing f θ − i ∇ first and subtracting θ from it would round the update once more.
        return new_state, (gates["forget"] - 1) * params - gates["input"] * gradient

    def initial(self, n: int, dtype: DTypeLike) -> dict[str, PyTree]:
        """Return the state before the first step for `n` coordinates."""
        state: dict[str, PyTree] = {"forget": jnp.zeros(n, dtype), "input": jnp.zeros(n, dtype)}
        if self.hidden is not None:
            state["lstm"] = _initial_state(self.hidden, n, dtype)
        return state
