"""The full form of a learner, which training and evaluation call.

A user's `predict` may have no `mask` argument and `loss` no `step`; a loss may return its value alone, and a
metric may be a number without a count. `normalized` converts such a learner to the full form.
"""

import dataclasses
import inspect
import types
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmeta.checks import ArgumentError, check_kind, format_value
from jaxmeta.core import Adapted, Key, Learner, Metrics, Params, Task, is_checked


def normalized(learner: Learner) -> Learner:
    """Return `learner` with `predict(params, adapted, x, mask)` and `loss(params, task, key, step)`.

    `mask` and `step` are passed on to functions that accept them. The loss returns `(scalar, metrics)`, and
    each metric is `(sum, count)`. Learners of this library are returned unchanged. Equal learners give equal
    results, so that compiled functions are found in JAX's cache again.

    Raises:
      ArgumentError: `learner` is not a `Learner`.

    Examples:
      >>> def loss(params, task, key):
      ...     return params["w"] ** 2
      >>> learner = normalized(Learner(None, None, lambda params, adapted, x: x, loss))
      >>> learner.loss({"w": 3.0}, None, None, step=0)
      (9.0, {})
      >>> learner.predict(None, None, 1.0, None)
      1.0
    """
    check_kind("learner", learner, Learner, "a jm.Learner(init, adapt, predict, loss)")
    predict, loss = learner.predict, learner.loss
    if callable(predict) and not isinstance(predict, _Predict) and not is_checked(predict):
        predict = _Predict(predict)
    if callable(loss) and not isinstance(loss, _Loss) and not is_checked(loss):
        loss = _Loss(loss)
    return learner._replace(predict=predict, loss=loss)


def is_library_made(learner: Learner) -> bool:
    """Return whether `adapt`, `predict` and `loss` come from a factory of this library."""
    return all(map(is_checked, (learner.adapt, learner.predict, learner.loss)))


def counted(name: str, value: Any) -> tuple[Any, Any]:
    """Return a metric as `(sum, count)`, with count 1 for a single number.

    Raises:
      ArgumentError: the metric is neither a number nor such a pair.

    Examples:
      >>> counted("accuracy", 0.5), counted("accuracy", (3.0, 6))
      ((0.5, 1.0), (3.0, 6))
      >>> counted("accuracy", np.zeros(3))
      Traceback (most recent call last):
      jaxmeta.checks.ArgumentError: learner: got an array of shape (3,) and type float64 for the metric \
'accuracy'; it must be a real number, or (sum, count)
    """
    pair = isinstance(value, tuple | list) and len(value) == 2
    if not all(map(_is_number, value if pair else [value])):
        raise ArgumentError(
            "learner",
            f"got {_described(value)} for the metric {name!r}; it must be a real number, or (sum, count)",
        )
    return (value[0], value[1]) if pair else (value, 1.0)


@dataclasses.dataclass(frozen=True)
class _Predict:
    """A `predict` with a mask, which it passes on if `function` accepts one."""

    function: Callable[..., Array]

    def __call__(self, params: Params, adapted: Adapted, x: Array, mask: Array | None = None) -> Array:
        return _call_with("mask", mask, self.function, params, adapted, x)


@dataclasses.dataclass(frozen=True)
class _Loss:
    """A `loss` with a step, which it passes on if `function` accepts one; it returns value and metrics."""

    function: Callable[..., Any]

    def __call__(
        self, params: Params, task: Task, key: Key, step: Array | None = None
    ) -> tuple[Array, Metrics]:
        result = _call_with("step", step, self.function, params, task, key)
        value, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if not isinstance(metrics, dict):
            raise ArgumentError(
                "learner",
                f"got {_described(metrics)} for the metrics of the loss; they must be a dictionary of names, "
                "each with a real number or (sum, count)",
            )
        return value, {name: counted(name, each) for name, each in metrics.items()}


def _call_with(name: str, value: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function`, with `value` as its argument `name` if it has one."""
    match _passing(name, function, len(arguments)):
        case "positional":
            return function(*arguments, value)
        case "keyword":
            return function(*arguments, **{name: value})
    return function(*arguments)


def _passing(name: str, function: Callable[..., Any], before: int) -> str | None:
    """Return how to pass `name`, which follows `before` other arguments; None if `function` lacks it."""
    try:
        signature = _signature(function)
    except (TypeError, ValueError):
        # Some compiled functions have no readable signature; they are assumed to take every argument.
        return "positional"
    named = signature.parameters.get(name)
    if named is not None and named.kind in (named.KEYWORD_ONLY, named.POSITIONAL_OR_KEYWORD):
        return "keyword"
    parameters = list(signature.parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return "keyword"
    positional = [
        parameter
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    # A further parameter of another name with a default, such as `scale=2.0`, is a setting of the function.
    # One that is required, or whose default is None, is `mask` or `step` under another name.
    if len(positional) > before and (positional[before].default in (inspect.Parameter.empty, None)):
        return "positional"
    return "positional" if any(p.kind is p.VAR_POSITIONAL for p in parameters) else None


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of `function` itself; or of the wrapped one if it takes *args or **kwargs."""
    if isinstance(function, types.FunctionType):
        outer = inspect.signature(function, follow_wrapped=False)
        if not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in outer.parameters.values()):
            return outer
    return inspect.signature(function)


def _is_number(value: Any) -> bool:
    """Return whether `value` is a real number or an array of shape ()."""
    if isinstance(value, str | bytes) or value is None:
        return False
    try:
        return np.shape(value) == () and any(
            jnp.issubdtype(jnp.result_type(value), kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)
        )
    except (TypeError, ValueError):
        return False


def _described(value: Any) -> str:
    """Return a description of `value`, which may be a tracer, for an error message."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {tuple(value.shape)} and type {value.dtype}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(map(_described, value[:3]))}"
    return format_value(value)
