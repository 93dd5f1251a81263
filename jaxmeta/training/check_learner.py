"""Validation of user-defined learners by abstract evaluation."""

import sysconfig
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmeta import losses
from jaxmeta.checks import ArgumentError
from jaxmeta.core import Batch, Key, Learner, Params, PyTree, Task, TaskDistribution, TaskStream, check_tasks
from jaxmeta.learner_form import is_library_made, normalized
from jaxmeta.training.sharding import sample_of

_LIBRARY = Path(losses.__file__).parent
_INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))


def check_learner(learner: Learner, tasks: TaskDistribution | TaskStream) -> None:
    """Check that a learner can be trained and evaluated on tasks, and list all problems.

    Only shapes and dtypes are computed, so that the check takes no longer than tracing. It checks that

    - `init` returns a tree of floating-point arrays,
    - `adapt` returns a tree of the same structure for any number of shots,
    - `predict` returns outputs of shape `(n, ways)` for `n` queries, outputs of the targets' shape for
      regression, or outputs that the learner's metric takes,
    - `loss` returns a floating-point scalar that has a gradient, and metrics that are numbers or
      `(sum, count)`.

    `jm.train` runs these checks on a user-defined learner, too, except the one with several numbers of shots.

    Args:
      learner: learner whose functions may omit `mask` and `step` (see `jm.Learner`).
      tasks: tasks to train on; only the shapes of one task are read.

    Raises:
      ArgumentError: a check fails. The message has one line for each problem, with the first line of the
        underlying error and its place in the learner's code.

    Examples:
      >>> import jaxmeta as jm
      >>> tasks = jm.tasks.sinusoid(shots=5, queries=3)
      >>> learner = jm.maml(jm.nn.MLP(out=1), loss=jm.losses.mse)
      >>> jm.check_learner(learner, tasks)
      >>> jm.check_learner(learner._replace(predict=lambda params, adapted, x: x[:, 0]), tasks)
      Traceback (most recent call last):
      jaxmeta.checks.ArgumentError: learner: got one that cannot be trained and evaluated on these tasks:
        - predict: gives float32 of shape (3,) for 3 queries; it must be of the targets' shape, (3, 1)
    """
    learner = normalized(learner)
    check_tasks(tasks)
    _refuse(_problems(learner, sample_of(tasks), jax.random.key(0), all_shots=True))


def check_functions(learner: Learner, sample: Callable[[Key], Task], key: Key) -> None:
    """Check the functions of a normalized learner that `jm.train` calls.

    A learner made by a factory of this library is traced, and its errors are raised unchanged.

    Raises:
      ValueError: such an error, or the list of problems of a user-defined learner.
    """
    if not is_library_made(learner):
        _refuse(_problems(learner, sample, key, all_shots=False))
        return
    task = jax.eval_shape(sample, key)
    params = jax.eval_shape(learner.init, key, task)
    value, _ = jax.eval_shape(learner.loss, params, task, key, step=_step())
    if (problem := _scalar_problem(value)) is not None:
        raise ArgumentError("learner", f"loss: {problem}")


def _refuse(problems: list[str]) -> None:
    if problems:
        lines = [f"\n  - {problem}" for problem in problems]
        raise ArgumentError(
            "learner", f"got one that cannot be trained and evaluated on these tasks:{''.join(lines)}"
        )


def _step() -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), jnp.int32)


def _problems(learner: Learner, sample: Callable[[Key], Task], key: Key, *, all_shots: bool) -> list[str]:
    """Return the problems of a normalized learner, one line each."""
    problems = [
        f"{name}: got {getattr(learner, name)!r}; it must be a function"
        for name in ("init", "adapt", "predict", "loss")
        if not callable(getattr(learner, name))
    ]
    if not callable(learner.init):
        return problems
    task = jax.eval_shape(sample, key)
    try:
        params = jax.eval_shape(learner.init, key, task)
    except Exception as error:
        # Without parameters none of the other functions can be traced.
        return [*problems, f"init: {_describe(error)}"]
    problems += _params_problems(params)
    if callable(learner.adapt):
        problems += _adaptation_problems(learner, params, task, key, all_shots=all_shots)
    if callable(learner.loss):
        problems += _loss_problems(learner, params, task, key)
    return problems


def _adaptation_problems(
    learner: Learner, params: Params, task: Task, key: Key, *, all_shots: bool
) -> list[str]:
    """Return the problems of `adapt` and `predict`."""
    try:
        adapted = jax.eval_shape(learner.adapt, params, task.support, key)
    except Exception as error:
        return [f"adapt: {_describe(error)}"]
    problems = _shots_problems(learner, params, task.support, key, adapted) if all_shots else []
    if not callable(learner.predict):
        return problems
    query = task.query
    try:
        outputs = jax.eval_shape(learner.predict, params, adapted, query.x, query.mask)
    except Exception as error:
        return [*problems, f"predict: {_describe(error)}"]
    return [*problems, *_outputs_problems(learner, outputs, query)]


def _params_problems(params: PyTree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        return ["init: gives no arrays, so that there is nothing to train"]
    return [
        f"init: gives {leaf.dtype} of shape {leaf.shape} at {jax.tree_util.keystr(path) or 'its root'}; "
        "parameters are floating-point arrays"
        for path, leaf in leaves
        if not jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]


def _shots_problems(learner: Learner, params: Params, support: Batch, key: Key, adapted: PyTree) -> list[str]:
    """Compare the structures that `adapt` returns for the support set and for one twice as large."""

    def doubled(batch: Batch) -> Batch:
        return jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), batch)

    try:
        other = jax.eval_shape(
            lambda params, support, key: learner.adapt(params, doubled(support), key), params, support, key
        )
    except Exception:
        # A method may be restricted to one number of shots.
        return []
    structure: Any = jax.tree.structure(adapted)
    other_structure: Any = jax.tree.structure(other)
    if structure == other_structure:
        return []
    shots = support.y.shape[0]
    return [
        f"adapt: gives {_shorten(structure)} for {shots} support examples and {_shorten(other_structure)} "
        f"for {2 * shots}; the structure must be the same, only shapes may differ"
    ]


def _outputs_problems(learner: Learner, outputs: PyTree, query: Batch) -> list[str]:
    n = query.y.shape[0]
    if not isinstance(outputs, jax.ShapeDtypeStruct):
        structure = _shorten(jax.tree.structure(outputs))
        return [f"predict: gives {structure}; it must give one array of outputs"]
    if learner.metric is not None:
        try:
            jax.eval_shape(partial(losses.scores, metric=learner.metric), outputs, query)
        except Exception as error:
            shapes = f"of outputs {outputs.shape} and targets {query.y.shape}"
            return [f"metric: {shapes}: {_describe(error)}"]
        return []
    actual = f"predict: gives {outputs.dtype} of shape {outputs.shape} for {n} queries"
    if jnp.issubdtype(query.y.dtype, jnp.integer):
        fits = outputs.ndim == 2 and outputs.shape[0] == n and query.ways in (None, outputs.shape[1])
        expected = f"of shape ({n}, {'ways' if query.ways is None else query.ways})"
    else:
        fits = outputs.shape == query.y.shape
        expected = f"of the targets' shape, {query.y.shape}"
        if outputs.ndim == 2 and outputs.shape[0] == n:
            expected += ", or the learner must have a metric= for such outputs"
    if not fits:
        return [f"{actual}; it must be {expected}"]
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        return [f"{actual}; outputs are floating-point numbers"]
    return []


def _loss_problems(learner: Learner, params: Params, task: Task, key: Key) -> list[str]:
    """Return the problems of the loss, its metrics and its gradient, found by one trace."""
    values: list[Any] = []

    def loss(params: Params, task: Task, key: Key, step: Array) -> tuple[Array, Any]:
        value, metrics = learner.loss(params, task, key, step=step)
        values.append(value)
        return jnp.asarray(value), metrics

    def gradient(params: Params, task: Task, key: Key, step: Array) -> Any:
        value, pull, _ = jax.vjp(lambda params: loss(params, task, key, step), params, has_aux=True)
        return pull(jnp.ones_like(value)) if _scalar_problem(value) is None else value

    try:
        # A gradient with respect to integers fails; `_params_problems` has reported these parameters.
        jax.eval_shape(loss if _params_problems(params) else gradient, params, task, key, _step())
    except Exception as error:
        if not values:
            return [f"loss: {_describe(error)}"]
        if _scalar_problem(values[0]) is None:
            return [f"loss: its gradient: {_describe(error)}"]
    problem = _scalar_problem(values[0])
    return [] if problem is None else [f"loss: {problem}"]


def _scalar_problem(value: Any) -> str | None:
    if not hasattr(value, "dtype"):
        try:
            value = jnp.asarray(value)
        except (TypeError, ValueError):
            kind = type(value).__name__
            return f"gives {kind}; it must give a floating-point scalar, alone or with metrics"
    if value.shape == () and jnp.issubdtype(value.dtype, jnp.floating):
        return None
    return f"gives {value.dtype} of shape {value.shape} for one task; it must be a floating-point scalar"


def _shorten(structure: Any) -> str:
    text = str(structure).removeprefix("PyTreeDef(").removesuffix(")")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _describe(error: Exception) -> str:
    """Return the first line of an error and the line of the user's code that raised it."""
    if isinstance(error, ArgumentError) and error.name == "learner":
        return error.problem.splitlines()[0]
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    kind = "" if isinstance(error, ArgumentError) else f"{type(error).__name__}: "
    place = _place(error)
    return f"{kind}{first}" + (f" ({place})" if place else "")


def _place(error: BaseException) -> str:
    """Return the innermost line of the traceback outside of this library and of installed packages."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if frame.filename.startswith("<frozen"):
            continue
        if not any(file.is_relative_to(each) for each in (_LIBRARY, *_INSTALLED)):
            return f"{frame.filename}, line {frame.lineno}"
    return ""
