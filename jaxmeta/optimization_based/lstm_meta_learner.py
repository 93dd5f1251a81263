"""The LSTM meta-learner: an optimizer that is itself learned, and the start that suits it."""

from collections.abc import Mapping
from typing import Any, Unpack, get_args

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxmeta import declare
from jaxmeta.checks import check_count, check_number, check_word
from jaxmeta.core import Key, Learner, PyTree, UnrolledOrder
from jaxmeta.nn.adapters import Network
from jaxmeta.nn.coordinatewise import FEEDBACKS, Feedback, GatedUpdate
from jaxmeta.optimization_based.maml import maml
from jaxmeta.optimization_based.settings import LSTMSettings


def _training(base: Mapping[str, Any]) -> dict[str, Any]:
    found = {"inner_steps": 12, "eval_steps": 12, "report_steps": (), "order": "first"}
    if base["kind"] != "regression":
        # Its meta-gradient costs far more than MAML's: two LSTMs at every parameter, twelve times.
        found |= {
            "network": "conv4-32",
            "meta_batch": min(base["meta_batch"], 4),
            "steps": max(base["steps"] // 2, 1),
        }
    return found


@declare.learner(rows={"transductive": "batch", "inductive": "episode"}, training=_training)
@declare.forwards(maml)
def lstm_meta_learner(
    model: Network,
    *,
    inner_steps: int = 12,
    hidden: int | None = 20,
    feedback: Feedback = "gate",
    gradient_scale: float = 1.0,
    order: UnrolledOrder = "first",
    **settings: Unpack[LSTMSettings],
) -> Learner:
    r"""Build an LSTM that is the optimizer, and the start that suits it (Ravi & Larochelle 2017).

    Every step of gradient descent is that of an LSTM cell.

    θ_t = f_t ⊙ θ_{t−1} − i_t ⊙ ∇_t,  i_t = σ(W_I [∇_t, L_t, θ_{t−1}, i_{t−1}] + b_I),  f_t likewise;

    θ is the cell state, −∇_t the candidate, i_t the step size and 1 − f_t a decay, for each coordinate its
    own and all by the same few weights. θ_0 = c_0 is learned with them. Gradients and losses enter
    preprocessed (`jm.nn.log_and_sign`), and by default through an ordinary LSTM of 20 features first, as in
    the official code. The meta-loss is L^Q(θ_T).

    Params: `{"model": c_0, "hyper": the cell's weights}`, 2,046 of the latter with `hidden=20`.

    Args:
      model: as of `jm.maml`.
      inner_steps: inner steps in training, T, at least 1. In the paper 12 at 1 shot, 5 at 5 shots (8 in its
        code).
      hidden: features of the LSTM before the gates; None for the one-layer form.
      feedback: what of i_{t−1} and f_{t−1} the gates see: "gate" (the paper's formula) or "pre_gate" (the
        value before σ, as in the official code).
      gradient_scale: factor of ∇_t before the LSTM. The official code's gradient is the mean loss's divided
        once more by the number of support examples, 1/5 at 5 ways and 1 shot; by default that is left to b_I.
      order: whether ∇_t and L_t are constants in the meta-gradient ("first", as published) or differentiated
        ("second").
      **settings: as of `jm.maml`. With `norm="episode"` the statistics are the published ones of testing: a
        running average over the inner steps, begun anew for each task (of weight 0.9 for the newest, as at 1
        shot). Training normalises the queries by their own, which is the default.

    Raises:
      ValueError: `hidden` below 1, an unknown `feedback`; and what `jm.maml` raises.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.sinusoid(shots=10, queries=10).sample(jax.random.key(0))
      >>> learner = jm.lstm_meta_learner(jm.nn.MLP(out=1), loss=jm.losses.mse)
      >>> params = learner.init(jax.random.key(1), task)
      >>> sum(leaf.size for leaf in jax.tree.leaves(params["hyper"]))
      2046

    References:
      Ravi & Larochelle, Optimization as a Model for Few-Shot Learning, 2017, equations 2 to 5, algorithm 1.
    """
    if hidden is not None:
        check_count("hidden", hidden)
    # No "implicit": the end depends on the way there.
    check_word("order", order, get_args(UnrolledOrder))
    check_word("feedback", feedback, FEEDBACKS)
    check_number("gradient_scale", gradient_scale)
    cell = GatedUpdate(hidden, feedback)

    def initial(key: Key, fast: PyTree) -> PyTree:
        # Shapes do not depend on the number of coordinates.
        flat = ravel_pytree(fast)[0][:1]
        return cell.init(key, cell.initial(1, flat.dtype), flat, flat[0], flat)["params"]

    def descend(weights: PyTree) -> optax.GradientTransformationExtraArgs:
        dtype = jnp.result_type(*jax.tree.leaves(weights))

        def init(params: PyTree) -> PyTree:
            return cell.initial(ravel_pytree(params)[0].size, dtype)

        def update(grads: PyTree, state: PyTree, params: PyTree, *, value: jax.Array, **extra):
            del extra
            gradient, restore = ravel_pytree(grads)
            seen = (gradient_scale * gradient, value, ravel_pytree(params)[0])
            change: Any
            state, change = cell.apply({"params": weights}, state, *(each.astype(dtype) for each in seen))
            return restore(change.astype(gradient.dtype)), state

        return optax.GradientTransformationExtraArgs(init, update)

    return maml(
        model, inner_optimizer=descend, hyper=initial, inner_steps=inner_steps, order=order, **settings
    )
