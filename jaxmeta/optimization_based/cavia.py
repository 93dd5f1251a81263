"""CAVIA: fast adaptation of context parameters, with network weights shared by all tasks."""

from collections.abc import Callable, Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from jaxmeta import declare
from jaxmeta.checks import check_count
from jaxmeta.core import Key, Learner, Model, Params, Task, UnrolledOrder
from jaxmeta.nn.adapters import Network, as_model
from jaxmeta.optimization_based.maml import maml
from jaxmeta.optimization_based.settings import CaviaSettings

CONTEXT = "context"


def _training(base: Mapping[str, Any]) -> dict[str, Any]:
    steps = 1 if base["kind"] == "regression" else 2
    return {"inner_lr": 1.0, "inner_steps": steps, "eval_steps": steps, "report_steps": ()}


@declare.learner(training=_training)
@declare.forwards(maml)
def cavia(
    model: Network,
    *,
    context: int = 5,
    inner_lr: float = 1.0,
    order: UnrolledOrder = "second",
    **settings: Unpack[CaviaSettings],
) -> Learner:
    r"""Build CAVIA, which adapts context parameters concatenated to the input (Zintgraf et al. 2019).

    φ_0 = 0,  φ_j = φ_{j−1} − α ∇_φ L^S(θ, φ_{j−1}),  meta-loss L^Q(θ, φ_n)

    The network's input is [x, φ]: φ is concatenated to vectors; for images, each entry of φ is a constant
    channel. θ is meta-learned and shared by all tasks; φ starts at zero for each task.

    Params: `{"model": θ}`, with "population" after `jm.calibrate`. Adapted: as in `jm.maml`, where "model"
    holds θ under "weights" and φ under "context".

    Args:
      model: network, of any kind that `jm.nn.as_model` accepts, for inputs with `context` more features, or
        channels, than those of the tasks.
      context: number of context parameters.
      inner_lr: step size α of the inner loop.
      order: order of the meta-gradient: "second" differentiates through the inner gradients, "first" treats
        them as constants.
      **settings: settings of `jm.maml`.

    Returns:
      A `Learner`.

    Raises:
      ValueError: `context` below 1; errors of `jm.maml`.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.sinusoid(shots=10, queries=10).sample(jax.random.key(0))
      >>> learner = jm.cavia(jm.nn.MLP(out=1), context=4, loss=jm.losses.mse)
      >>> params = learner.init(jax.random.key(1), task)
      >>> learner.adapt(params, task.support, jax.random.key(2))["model"]["context"].shape
      (4,)

    References:
      Zintgraf et al., Fast Context Adaptation via Meta-Learning, 2019, equations 4 to 6.
    """
    check_count("context", context)
    inner = maml(
        _with_context(as_model(model, "model"), context),
        adapts=lambda path: path == CONTEXT,
        inner_lr=inner_lr,
        order=order,
        **settings,
    )

    def with_zero_context(params: Params) -> Params:
        # The initial context is not meta-learned: every task starts from zeros.
        dtype = jnp.result_type(*jax.tree.leaves(params["model"]))
        return {**params, "model": {"weights": params["model"], CONTEXT: jnp.zeros(context, dtype)}}

    def init(key: Key, task: Task) -> Params:
        return {"model": inner.init(key, task)["model"]["weights"]}

    def from_zeros(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        if function is None:
            return None
        return lambda params, *args, **kwargs: function(with_zero_context(params), *args, **kwargs)

    adapt, predict, loss = map(from_zeros, (inner.adapt, inner.predict, inner.loss))
    statistics = from_zeros(inner.statistics)
    return Learner(init, adapt, predict, loss, statistics, metric=inner.metric)  # type: ignore[arg-type]


def _with_context(model: Model, size: int) -> Model:
    """Return a model whose parameters hold the weights and a context, which is concatenated to its input."""

    def joined(params: Params, x: jax.Array) -> jax.Array:
        # Each context parameter becomes one constant feature, or one constant channel.
        constant = jnp.broadcast_to(params[CONTEXT], (*x.shape[:-1], size))
        return jnp.concatenate([x, constant.astype(x.dtype)], -1)

    def init(key: Key, x: jax.Array) -> Params:
        context = jnp.zeros((size,), x.dtype)
        return {"weights": model.init(key, joined({CONTEXT: context}, x)), CONTEXT: context}

    def through(call: Callable[..., Any] | None) -> Callable[..., Any] | None:
        if call is None:
            return None
        return lambda params, x, **kwargs: call(params["weights"], joined(params, x), **kwargs)

    apply, apply_norm = through(model.apply), through(model.apply_norm)
    return model._replace(init=init, apply=apply, apply_norm=apply_norm)  # type: ignore[arg-type]
