"""The one form in which training and evaluation call the functions of a learner, however they are written.

A researcher's `predict` may take no mask and `loss` no step; a loss may return its value alone, and a metric
may be a number without a count. `normalized` makes of any such learner one that takes and returns all of it.
"""

import dataclasses
import inspect
import types
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmeta.checks import ArgumentError, shown
from jaxmeta.core import Adapted, Key, Learner, Metrics, Params, Task, is_checked


def normalized(learner: Learner) -> Learner:
    """Return `learner` with `predict(params, adapted, x, mask)` and `loss(params, task, key, step)`.

    `mask` and `step` go on where the functions take them. The loss returns `(scalar, metrics)`, and each
    metric is `(sum, count)`. What a factory of `jm.learner` made is returned as it is. Equal learners give
    equal ones, so that what was compiled for one is found again.

    Raises:
      ArgumentError: `learner` is no `Learner`.

    Examples:
      >>> def loss(params, task, key):
      ...     return params["w"] ** 2
      >>> learner = normalized(Learner(None, None, lambda params, adapted, x: x, loss))
      >>> learner.loss({"w": 3.0}, None, None, step=0)
      (9.0, {})
      >>> learner.predict(None, None, 1.0, None)
      1.0
    """
    if not isinstance(learner, Learner):
        raise ArgumentError(
            "learner", f"got {shown(learner)}; it must be a jm.Learner(init, adapt, predict, loss)"
        )
    predict, loss = learner.predict, learner.loss
    if callable(predict) and not isinstance(predict, _Predict) and not is_checked(predict):
        predict = _Predict(predict)
    if callable(loss) and not isinstance(loss, _Loss) and not is_checked(loss):
        loss = _Loss(loss)
    return learner._replace(predict=predict, loss=loss)


def is_library_made(learner: Learner) -> bool:
    """Return whether a factory of `jm.learner` made all functions of `learner` that learn."""
    return all(map(is_checked, (learner.adapt, learner.predict, learner.loss)))


def counted(name: str, value: Any) -> tuple[Any, Any]:
    """Return a metric as `(sum, count)`; of a single number the count is 1.

    Raises:
      ArgumentError: the metric is neither.

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
    """A `predict` that takes a mask, and hands it on where `function` takes one."""

    function: Callable[..., Array]

    def __call__(self, params: Params, adapted: Adapted, x: Array, mask: Array | None = None) -> Array:
        return _call_with("mask", mask, self.function, params, adapted, x)


@dataclasses.dataclass(frozen=True)
class _Loss:
    """A `loss` that takes a step, hands it on where `function` takes one, and returns value and metrics."""

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


def _call_with(name: str, value: Any, function: Callable, *arguments: Any) -> Any:
    """Call `function` with `value` as its argument `name`, where it has one."""
    match _passing(name, function, len(arguments)):
        case "positional":
            return function(*arguments, value)
        case "keyword":
            return function(*arguments, **{name: value})
    return function(*arguments)


def _passing(name: str, function: Callable, before: int) -> str | None:
    """Return how `function` takes the argument `name` that comes after `before` others; None: it does not."""
    try:
        signature = _signature(function)
    except (TypeError, ValueError):
        # It has no signature to be read, such as a compiled one: it gets all.
        return "positional"
    found = signature.parameters.get(name)
    if found is not None and found.kind in (found.KEYWORD_ONLY, found.POSITIONAL_OR_KEYWORD):
        return "keyword"
    each = list(signature.parameters.values())
    if any(one.kind is one.VAR_KEYWORD for one in each):
        return "keyword"
    places = [one for one in each if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    # A fourth parameter of another name is a setting of the function's own, unless it has to be given or
    # stands for None.
    if len(places) > before and (places[before].default in (inspect.Parameter.empty, None)):
        return "positional"
    return "positional" if any(one.kind is one.VAR_POSITIONAL for one in each) else None


def _signature(function: Callable) -> inspect.Signature:
    """Return the parameters that `function` itself takes, not those of what it wraps, where it names them."""
    if isinstance(function, types.FunctionType):
        own = inspect.signature(function, follow_wrapped=False)
        if not any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in own.parameters.values()):
            return own
    return inspect.signature(function)


def _is_number(value: Any) -> bool:
    """Return whether `value` is a real number, or an array of one."""
    if isinstance(value, str | bytes) or value is None:
        return False
    try:
        return np.shape(value) == () and any(
            jnp.issubdtype(jnp.result_type(value), kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)
        )
    except (TypeError, ValueError):
        return False


def _described(value: Any) -> str:
    """Return what an error says of `value`, which may be traced."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {tuple(value.shape)} and type {value.dtype}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(map(_described, value[:3]))}"
    return shown(value)
