"""LSTM meta-learner: a learned inner optimizer together with a learned initialisation."""

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
    defaults = {"inner_steps": 12, "eval_steps": 12, "report_steps": (), "order": "first"}
    if base["kind"] != "regression":
        # The meta-gradient costs far more than MAML's: two LSTMs for every parameter in twelve steps.
        defaults |= {
            "network": "conv4-32",
            "meta_batch": min(base["meta_batch"], 4),
            "steps": max(base["steps"] // 2, 1),
        }
    return defaults


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
    r"""Build the LSTM meta-learner, which learns the inner optimizer and its start (Ravi & Larochelle 2017).

    The inner optimizer is an LSTM cell whose cell state holds the parameters θ:

    θ_t = f_t ⊙ θ_{t−1} − i_t ⊙ ∇_t,
    i_t = σ(W_I [∇_t, L_t, θ_{t−1}, i_{t−1}] + b_I),  f_t = σ(W_F [∇_t, L_t, θ_{t−1}, f_{t−1}] + b_F)

    −∇_t is the candidate, i_t the step size and 1 − f_t a weight decay. Each coordinate has separate gates,
    computed by shared weights, and θ_0 = c_0 is learned with these. Gradients and losses are preprocessed
    (`jm.nn.log_and_sign`) and by default pass an ordinary LSTM of 20 features first, as in the official
    code. The meta-loss is L^Q(θ_T).

    Params: `{"model": c_0, "hyper": the cell's weights}`; the cell has 2,046 weights with `hidden=20`.

    Args:
      model: network to meta-learn; see `jm.maml`.
      inner_steps: number T of inner steps in training, at least 1. The paper takes 12 at 1 shot and 5 at 5
        shots (8 in its code).
      hidden: features of the LSTM before the gates; None for the one-layer form.
      feedback: previous values of i and f that the gates receive: "gate", i_{t−1} and f_{t−1} (the paper's
        formula), or "pre_gate", their values before σ (the official code).
      gradient_scale: factor of ∇_t before the LSTM. The official code divides the gradient of the mean loss
        once more by the number of support examples, which is a factor of 1/5 at 5 ways and 1 shot; with the
        default of 1, b_I learns the scale.
      order: order of the meta-gradient: ∇_t and L_t are constants ("first", as published) or differentiated
        ("second").
      **settings: settings of `jm.maml`. `norm="episode"` gives the published test statistics: a running
        average over the inner steps of each task (with weight 0.9 for the newest, as at 1 shot). Training
        normalises the queries by their own statistics, which is the default.

    Returns:
      A `Learner`.

    Raises:
      ValueError: `hidden` below 1; an unknown `feedback`; errors of `jm.maml`.

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
    # "implicit" is excluded because a learned optimizer need not reach a minimum of the support loss.
    check_word("order", order, get_args(UnrolledOrder))
    check_word("feedback", feedback, FEEDBACKS)
    check_number("gradient_scale", gradient_scale)
    cell = GatedUpdate(hidden, feedback)

    def initial_weights(key: Key, fast: PyTree) -> PyTree:
        # One coordinate is enough: all coordinates share the cell's weights.
        flat = ravel_pytree(fast)[0][:1]
        return cell.init(key, cell.initial(1, flat.dtype), flat, flat[0], flat)["params"]

    def as_optimizer(weights: PyTree) -> optax.GradientTransformationExtraArgs:
        dtype = jnp.result_type(*jax.tree.leaves(weights))

        def init(params: PyTree) -> PyTree:
            return cell.initial(ravel_pytree(params)[0].size, dtype)

        def update(grads: PyTree, state: PyTree, params: PyTree, *, value: jax.Array, **extra):
            del extra
            gradient, restore = ravel_pytree(grads)
            features = (gradient_scale * gradient, value, ravel_pytree(params)[0])
            change: Any
            state, change = cell.apply(
                {"params": weights}, state, *(feature.astype(dtype) for feature in features)
            )
            return restore(change.astype(gradient.dtype)), state

        return optax.GradientTransformationExtraArgs(init, update)

    return maml(
        model,
        inner_optimizer=as_optimizer,
        hyper=initial_weights,
        inner_steps=inner_steps,
        order=order,
        **settings,
    )
