"""The meta-step: draw tasks, average the gradient of `learner.loss` over them, and update."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmeta.checks import ArgumentError, check_count, check_key, check_optimizer, check_slots, described
from jaxmeta.core import (
    Batch,
    Key,
    Learner,
    Optimizer,
    Params,
    PyTree,
    Source,
    Task,
    TaskDistribution,
    TaskStream,
    check_tasks,
    episode_keys,
)
from jaxmeta.learner_form import normalized
from jaxmeta.losses import full_precision
from jaxmeta.training import sharding
from jaxmeta.training.check_learner import check_functions
from jaxmeta.training.diagnostics import alignment
from jaxmeta.training.sharding import Devices, sample_of

Strategy: TypeAlias = Literal["auto", "vmap", "scan"] | int

# Meta-steps fold their number, an int32, into the run's key. These two numbers are larger than any int32, so
# that initialisation and validation share no key with a meta-step.
_INIT = np.uint32(0xFFFFFFFF)
_VALIDATION = np.uint32(0xFFFFFFFE)


class TrainState(NamedTuple):
    """The state that training carries from one meta-step to the next, a pytree.

    `jm.train` donates its buffers to each compiled step, which updates them in place.

    Attributes:
      step: number of meta-steps done, int32.
      params: meta-parameters of the learner.
      opt_state: state of the outer optax optimizer.
      key: key of the run, which is constant: episode `index` of meta-step `step` is a pure function of
        `(key, step, index)`.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: PyTree
    key: Key


def init_state(
    learner: Learner,
    optimizer: Optimizer,
    tasks: TaskDistribution | TaskStream,
    key: Key,
    *,
    params: Params | None = None,
    devices: Mesh | None = None,
) -> TrainState:
    """Return the state before the first meta-step.

    Args:
      learner: learner to train.
      optimizer: outer optax optimizer.
      tasks: training tasks, of which only shapes are read.
      key: key of the run, typed (`jax.random.key`) or raw.
      params: parameters to start from, of the structure that `learner.init` returns; None to draw them.
      devices: mesh of `jm.make_mesh` on which the state is created, split over "params"; None for the default
        device.

    Returns:
      A `TrainState` at step 0.

    Raises:
      ValueError: `learner` does not suit `tasks` (for a user-defined learner, see `jm.check_learner`), or
        `params` differ from the learner's in structure, shape or dtype. It is raised before anything is
        compiled.

    Examples:
      >>> import jaxmeta as jm
      >>> learner = jm.maml(jm.nn.MLP(out=1), loss=jm.losses.mse)
      >>> state = init_state(learner, optax.adam(1e-3), jm.tasks.sinusoid(), jax.random.key(0))
      >>> int(state.step)
      0
    """

    def init(sample: Callable[[Key], Task], key: Key, params: Params | None) -> tuple[Params, PyTree]:
        params = _draw(learner, sample, key) if params is None else params
        return params, optimizer.init(params)

    learner = normalized(learner)
    check_tasks(tasks)
    check_optimizer("optimizer", optimizer)
    check_key("key", key)
    sample = sample_of(tasks)
    check_functions(learner, sample, key)
    drawn = jax.eval_shape(partial(_draw, learner), sample, key)
    if params is not None:
        check_params_kind(params)
        _check_params(params, drawn)
    # Compiled as a whole: `init` reads only the task's shapes, so that the compiler removes its sampling.
    if devices is None or devices.size == 1:
        params, opt_state = jax.jit(init)(sample, key, params)
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, key)
    # With output shardings each device creates its own part, so that no device need hold all parameters.
    out_shardings = sharding.shardings(jax.eval_shape(init, sample, key, params), devices)
    sample, key, params = sharding.replicate((sample, key, params), devices)
    params, opt_state = jax.jit(init, out_shardings=out_shardings)(sample, key, params)
    return TrainState(sharding.replicate(jnp.zeros((), jnp.int32), devices), params, opt_state, key)


def drawn_params(learner: Learner, tasks: TaskDistribution | TaskStream, key: Key) -> Params:
    """Return the parameters that a run with `key` starts from."""
    return jax.jit(partial(_draw, learner))(sample_of(tasks), key)


def _draw(learner: Learner, sample: Callable[[Key], Task], key: Key) -> Params:
    init_key, task_key = jax.random.split(jax.random.fold_in(key, _INIT))
    return learner.init(init_key, sample(task_key))


def check_params_kind(params: Params) -> None:
    """Check that `params` is not another object of the library, nor a function.

    Modules are accepted: an Equinox module is callable and a pytree of parameters, too.

    Raises:
      ArgumentError: `params` is such an object.
    """
    if isinstance(params, TrainState):
        raise ArgumentError("params", "got TrainState(…); it must be the parameters in it, state.params")
    is_function = callable(params) and jax.tree_util.all_leaves([params])
    if isinstance(params, Learner | TaskDistribution | TaskStream | Task | Batch) or is_function:
        raise ArgumentError(
            "params",
            f"got {described(params)}; it must be parameters, as learner.init returns them",
        )


def _check_params(params: Params, drawn: Params) -> None:
    """Check that parameters to start from fit the learner.

    Args:
      params: parameters to start from.
      drawn: parameters that the learner draws, as arrays or shapes.

    Raises:
      ArgumentError: the structure, or the shape or dtype of a leaf differs, or a leaf is not finite.
    """
    structure: Any = jax.tree.structure(params)
    expected_structure: Any = jax.tree.structure(drawn)
    if structure != expected_structure:
        raise ArgumentError("params", f"got {structure}; the learner has {expected_structure}")
    for (path, leaf), expected in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(drawn), strict=True
    ):
        if (jnp.shape(leaf), jnp.result_type(leaf)) != (expected.shape, expected.dtype):
            raise ArgumentError(
                "params",
                f"got {jnp.result_type(leaf)} of shape {jnp.shape(leaf)} at {jax.tree_util.keystr(path)}; "
                f"the learner has {expected.dtype} of shape {expected.shape}",
            )
        # Values of traced arrays and of shards in other processes are not known here.
        is_known = getattr(leaf, "is_fully_addressable", True) and not isinstance(leaf, jax.core.Tracer)
        if is_known and jnp.issubdtype(expected.dtype, jnp.inexact) and not jnp.isfinite(leaf).all():
            where = jax.tree_util.keystr(path)
            raise ArgumentError("params", f"got values at {where} that are not finite")


@contextlib.contextmanager
def stream_batches(stream: TaskStream, start: int) -> Iterator[Iterator[Task]]:
    """Iterate over the batches of a stream from `start` on, and close the iterator when the block ends.

    Class slots that are on the host are checked; checking those on a device would wait for the device.
    """
    batches = map(stream.at, itertools.count(start)) if stream.batches is None else stream.batches(start)

    def checked(tasks: Task) -> Task:
        for part in tasks:
            if isinstance(part.y, np.ndarray) and part.ways is not None:
                check_slots("tasks", part.y, part.ways, part.mask)
        return tasks

    try:
        yield map(checked, batches)
    finally:
        if hasattr(batches, "close"):
            batches.close()


def check_stream(tasks: TaskDistribution | TaskStream, key: Key, *, for_evaluation: bool, name: str) -> None:
    """Check that `tasks`, if it is a stream, numbers its episodes by `key` and for the same purpose.

    Raises:
      ArgumentError: the stream has another key, or another `for_evaluation`; the error calls it `name`.
    """
    if not isinstance(tasks, TaskStream) or tasks.key is None:
        return
    stream_bits, bits = (np.asarray(jax.random.key_data(each)) for each in (tasks.key, key))
    if tasks.for_evaluation != for_evaluation or not np.array_equal(stream_bits, bits):
        raise ArgumentError(
            name,
            f"got a stream with key data {stream_bits.tolist()} and for_evaluation={tasks.for_evaluation}; "
            f"build it with those used here, {bits.tolist()} and for_evaluation={for_evaluation}",
        )


def meta_step(
    learner: Learner,
    optimizer: Optimizer,
    meta_batch: int,
    strategy: Strategy = "auto",
    *,
    devices: Devices = None,
    compared_to: Learner | None = None,
) -> Callable[[TrainState, Source], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """Build one meta-step as a pure function, for the caller to compile.

    φ ← update(φ, 1/B Σ_i ∇_φ loss(φ, task_i)), with task_i drawn on the device from the key
    `fold_in(fold_in(key, step), i)`. The tasks are the same on any number of devices and under
    every strategy, and results agree up to the order of a float32 sum.

    Compile it with `jax.jit(step, donate_argnums=0)` to update the state in place.

    Args:
      learner: learner to train; the plain gradient of its `loss` is the meta-gradient.
      optimizer: outer optax optimizer.
      meta_batch: number of tasks B in a meta-step.
      strategy: order in which a device processes its tasks: "vmap" for all at once; "scan" for one
        after the other with accumulated gradients, so that memory does not grow with their number;
        an int for that many at a time; "auto" for "scan" on CPUs, whose grouped convolutions are
        slow, and "vmap" on accelerators.
      devices: devices that share the tasks, or a mesh of `jm.make_mesh`; None for as many as divide
        `meta_batch`. For a learner that is `divisible` there may be more devices than tasks, which then
        share the examples of each task.
      compared_to: learner of the same parameters, such as the first-order version of `learner`. Its
        meta-gradient on the same tasks is computed for comparison only: the metrics get "cosine" and
        "norm_ratio" between the two (see `jm.meta_gradient_alignment`).

    Returns:
      A function `step(state, tasks.sample) -> (state, metrics)`, or `step(state, stream.at(i))` with a
      batch of `meta_batch` tasks. `metrics` has "loss", the mean of the learner's loss, and the mean of
      each of the learner's own metrics over all tasks; one named "loss" replaces it.

    Raises:
      ValueError: `meta_batch` is below 1, `strategy` is unknown, or a number of devices or of tasks at
        a time does not divide the number of tasks.

    Examples:
      >>> import jaxmeta as jm
      >>> learner, optimizer = jm.maml(jm.nn.MLP(out=1), loss=jm.losses.mse), optax.adam(1e-3)
      >>> tasks = jm.tasks.sinusoid()
      >>> state = jm.init_state(learner, optimizer, tasks, jax.random.key(0))
      >>> step = jax.jit(meta_step(learner, optimizer, 4, "vmap", devices=jax.devices()[:1]))
      >>> state, metrics = step(state, tasks.sample)
      >>> int(state.step), sorted(metrics)
      (1, ['loss', 'mse'])
    """
    check_count("meta_batch", meta_batch)
    learner = normalized(learner)
    check_optimizer("optimizer", optimizer)
    compared_to = None if compared_to is None else normalized(compared_to)
    mesh = sharding.task_mesh(meta_batch, devices, divisible=learner.divisible)
    per_device = meta_batch // mesh.shape[sharding.TASKS]
    at_once = _tasks_at_once(strategy, per_device, mesh.devices.flat[0].platform)

    def gradient(
        learner: Learner, params: Params, step: Array, tasks: Task, keys: Array
    ) -> tuple[Params, tuple[Array, Any]]:
        """Return sums over `at_once` tasks of gradients, and of losses and metrics in float32 or float64."""

        def total(params: Params) -> tuple[Array, Any]:
            if at_once == 1:
                # Without a batch axis, because a vmap, even over one task, makes convolutions grouped.
                task, key = jax.tree.map(lambda leaf: leaf[0], (tasks, keys))
                value, metrics = jax.tree.map(full_precision, learner.loss(params, task, key, step=step))
                return value, (value, metrics)
            values, metrics = jax.tree.map(
                full_precision,
                jax.vmap(lambda task, key: learner.loss(params, task, key, step=step))(tasks, keys),
            )
            return values.sum(), (values.sum(), jax.tree.map(lambda leaf: leaf.sum(0), metrics))

        return jax.grad(total, has_aux=True)(params)

    def gradients(*arguments: Any) -> tuple[list[Params], tuple[Array, Any]]:
        """Return the gradients of both learners, and the losses and metrics of the trained one."""
        results = [gradient(each, *arguments) for each in (learner, compared_to) if each is not None]
        return [grads for grads, _ in results], results[0][1]

    def step(state: TrainState, source: Source) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        first = sharding.first_task(mesh, per_device)
        keys = episode_keys(jax.random.fold_in(state.key, state.step), first + jnp.arange(per_device))
        # All tasks are drawn before the scan: drawing them inside it, by many tiny operations for each,
        # doubled the time of the sinusoid's meta-step. Memory then grows with the number of tasks by
        # their examples only, not by their activations.
        tasks = source if isinstance(source, Task) else jax.vmap(source)(keys[:, 0])
        if (size := tasks.query.y.shape[0]) != per_device:
            raise ArgumentError(
                "tasks",
                f"got a batch of {size * meta_batch // per_device} tasks; meta_batch is {meta_batch}",
            )
        if at_once == per_device:
            sums = gradients(state.params, state.step, tasks, keys[:, 1])
        else:

            def accumulate(grads: list[Params], chunk: tuple[Task, Array]) -> tuple[list[Params], Any]:
                new, values = gradients(state.params, state.step, *chunk)
                return jax.tree.map(jnp.add, grads, new), values

            chunks = jax.tree.map(
                lambda leaf: leaf.reshape(per_device // at_once, at_once, *leaf.shape[1:]),
                (tasks, keys[:, 1]),
            )
            zeros = [jax.tree.map(jnp.zeros_like, state.params)] * (1 if compared_to is None else 2)
            grads, values = jax.lax.scan(accumulate, zeros, chunks)
            sums = grads, jax.tree.map(lambda leaf: leaf.sum(0), values)
        (total, *others), (loss, metrics) = sharding.sum_over_tasks(sums, mesh)
        grads = jax.tree.map(lambda leaf: leaf / meta_batch, total)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        means = {name: value / jnp.maximum(count, 1) for name, (value, count) in metrics.items()}
        if others:
            means |= alignment(total, others[0])._asdict()
        return (
            TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.key),
            {"loss": loss / meta_batch, **means},
        )

    sharded_step = sharding.over_tasks(step, mesh, out=PartitionSpec())

    def placed_step(state: TrainState, source: Source) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        state, metrics = sharded_step(state, source)
        # The new state has the sharding of the old one, whose donated buffers it reuses.
        return sharding.keep_placed(state, mesh), metrics

    return placed_step


def validation_key(key: Key) -> Key:
    """Return the key of the validation episodes of a run with `key`, the same at every validation."""
    return jax.random.fold_in(key, _VALIDATION)


def _tasks_at_once(strategy: Strategy, tasks: int, platform: str) -> int:
    if strategy == "auto":
        strategy = "scan" if platform == "cpu" else "vmap"
    if strategy == "vmap":
        return tasks
    if strategy == "scan":
        return 1
    if isinstance(strategy, bool) or not isinstance(strategy, int):
        raise ArgumentError(
            "strategy", f'got {strategy!r}; it must be "auto", "vmap", "scan" or a number of tasks at a time'
        )
    if strategy < 1 or tasks % strategy:
        raise ArgumentError(
            "strategy", f"got {strategy} tasks at a time, which must divide the {tasks} per device"
        )
    return strategy
