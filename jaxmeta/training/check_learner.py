"""What keeps a learner of one's own from training and evaluation, found from shapes alone."""

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

_OURS = Path(losses.__file__).parent
_INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))


def check_learner(learner: Learner, tasks: TaskDistribution | TaskStream) -> None:
    """Check that a learner can be trained on tasks and evaluated on them, and list all that is wrong with it.

    Only shapes and types are computed, so that it takes no more time than tracing does. `jm.train` checks a
    learner of one's own so before anything else, but for what is said of several shots.

    - `init` gives a tree of floating-point arrays.
    - `adapt` gives a tree of one structure, whatever the number of shots.
    - `predict` gives `(n, ways)` outputs for `n` queries, or outputs of the targets' shape for regression, or
      what the learner's metric takes.
    - `loss` is a floating-point scalar that has a gradient, and its metrics are numbers or `(sum, count)`.

    Args:
      learner: its functions may leave `mask` and `step` out; see `jm.Learner`.
      tasks: only shapes of one task are read.

    Raises:
      ArgumentError: something of that does not hold. The message has a line for each, with the first line of
        the error that came up and where it did.

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
    """Check what `jm.train` calls of a normalized learner.

    What a factory of the library made is tried on the tasks, and its own errors are raised as they are.

    Raises:
      ValueError: that the learner raises; or all that is wrong with one of the user's own.
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
    """Return what is wrong with a normalized learner, a line for each."""
    found = [
        f"{name}: got {getattr(learner, name)!r}; it must be a function"
        for name in ("init", "adapt", "predict", "loss")
        if not callable(getattr(learner, name))
    ]
    if not callable(learner.init):
        return found
    task = jax.eval_shape(sample, key)
    try:
        params = jax.eval_shape(learner.init, key, task)
    except Exception as error:
        # Without parameters nothing else can be tried.
        return [*found, f"init: {_said(error)}"]
    found += _params_problems(params)
    if callable(learner.adapt):
        found += _adaptation_problems(learner, params, task, key, all_shots=all_shots)
    if callable(learner.loss):
        found += _loss_problems(learner, params, task, key)
    return found


def _adaptation_problems(
    learner: Learner, params: Params, task: Task, key: Key, *, all_shots: bool
) -> list[str]:
    """Return what is wrong with `adapt` and `predict`."""
    try:
        adapted = jax.eval_shape(learner.adapt, params, task.support, key)
    except Exception as error:
        return [f"adapt: {_said(error)}"]
    found = _shots_problems(learner, params, task.support, key, adapted) if all_shots else []
    if not callable(learner.predict):
        return found
    query = task.query
    try:
        outputs = jax.eval_shape(learner.predict, params, adapted, query.x, query.mask)
    except Exception as error:
        return [*found, f"predict: {_said(error)}"]
    return [*found, *_outputs_problems(learner, outputs, query)]


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
    """Compare the structure of what `adapt` gives for twice the examples."""

    def twice(batch: Batch) -> Batch:
        return jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), batch)

    try:
        other = jax.eval_shape(
            lambda params, support, key: learner.adapt(params, twice(support), key), params, support, key
        )
    except Exception:
        # A method may be made for one number of shots.
        return []
    one: Any = jax.tree.structure(adapted)
    two: Any = jax.tree.structure(other)
    if one == two:
        return []
    shots = support.y.shape[0]
    return [
        f"adapt: gives {_shortened(one)} for {shots} support examples and {_shortened(two)} for {2 * shots}; "
        "the structure must be one, where the shapes may differ"
    ]


def _outputs_problems(learner: Learner, outputs: PyTree, query: Batch) -> list[str]:
    n = query.y.shape[0]
    if not isinstance(outputs, jax.ShapeDtypeStruct):
        given = _shortened(jax.tree.structure(outputs))
        return [f"predict: gives {given}; it must give one array of outputs"]
    if learner.metric is not None:
        try:
            jax.eval_shape(partial(losses.scores, metric=learner.metric), outputs, query)
        except Exception as error:
            shapes = f"of outputs {outputs.shape} and targets {query.y.shape}"
            return [f"metric: {shapes}: {_said(error)}"]
        return []
    given = f"predict: gives {outputs.dtype} of shape {outputs.shape} for {n} queries"
    if jnp.issubdtype(query.y.dtype, jnp.integer):
        right = outputs.ndim == 2 and outputs.shape[0] == n and query.ways in (None, outputs.shape[1])
        wanted = f"of shape ({n}, {'ways' if query.ways is None else query.ways})"
    else:
        right = outputs.shape == query.y.shape
        wanted = f"of the targets' shape, {query.y.shape}"
        if outputs.ndim == 2 and outputs.shape[0] == n:
            wanted += ", or the learner must have a metric= for such outputs"
    if not right:
        return [f"{given}; it must be {wanted}"]
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        return [f"{given}; outputs are floating-point numbers"]
    return []


def _loss_problems(learner: Learner, params: Params, task: Task, key: Key) -> list[str]:
    """Check value, metrics and gradient of the loss by one trace."""
    shapes: list[Any] = []

    def loss(params: Params, task: Task, key: Key, step: Array) -> tuple[Array, Any]:
        value, metrics = learner.loss(params, task, key, step=step)
        shapes.append(value)
        return jnp.asarray(value), metrics

    def gradient(params: Params, task: Task, key: Key, step: Array) -> Any:
        value, pull, _ = jax.vjp(lambda params: loss(params, task, key, step), params, has_aux=True)
        return pull(jnp.ones_like(value)) if _scalar_problem(value) is None else value

    try:
        # Parameters that are no floats have no gradient, which has been said.
        jax.eval_shape(loss if _params_problems(params) else gradient, params, task, key, _step())
    except Exception as error:
        if not shapes:
            return [f"loss: {_said(error)}"]
        if _scalar_problem(shapes[0]) is None:
            return [f"loss: its gradient: {_said(error)}"]
    problem = _scalar_problem(shapes[0])
    return [] if problem is None else [f"loss: {problem}"]


def _scalar_problem(value: Any) -> str | None:
    if not hasattr(value, "dtype"):
        try:
            value = jnp.asarray(value)
        except (TypeError, ValueError):
            kind = type(value).__name__
            return f"gives {kind}; it must give a floating-point scalar, or that and its metrics"
    if value.shape == () and jnp.issubdtype(value.dtype, jnp.floating):
        return None
    return f"gives {value.dtype} of shape {value.shape} for one task; it must be a floating-point scalar"


def _shortened(structure: Any) -> str:
    text = str(structure).removeprefix("PyTreeDef(").removesuffix(")")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _said(error: Exception) -> str:
    """Return the first line of an error and the line of code of the user's that it comes from."""
    if isinstance(error, ArgumentError) and error.name == "learner":
        return error.problem.splitlines()[0]
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    kind = "" if isinstance(error, ArgumentError) else f"{type(error).__name__}: "
    place = _place(error)
    return f"{kind}{first}" + (f" ({place})" if place else "")


def _place(error: BaseException) -> str:
    """Return the deepest line of the trace that is neither installed code nor of this library."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if frame.filename.startswith("<frozen"):
            continue
        if not any(file.is_relative_to(each) for each in (_OURS, *_INSTALLED)):
            return f"{frame.filename}, line {frame.lineno}"
    return ""
