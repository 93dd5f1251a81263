"""One meta-step: draw tasks, average the gradient of `learner.loss` over them, update."""

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

# Steps fold their number, an int32, into the key: these two are beyond every step.
_INIT = np.uint32(0xFFFFFFFF)
_VALIDATION = np.uint32(0xFFFFFFFE)


class TrainState(NamedTuple):
    """All that training carries from one meta-step to the next; a pytree, donated by `jm.train`.

    Attributes:
      step: number of meta-steps done, int32.
      params: the learner's meta-parameters.
      opt_state: state of the outer optax optimizer.
      key: the run's key, constant: episode `index` of meta-step `step` is a pure function of
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
    """State before the first meta-step.

    Args:
      learner: what is trained.
      optimizer: the outer optax optimizer.
      tasks: the training tasks; only their shapes are read.
      key: the run's key, typed (`jax.random.key`) or raw.
      params: parameters to start from, as `learner.init` gives them; None for those that it draws.
      devices: a mesh of `jm.make_mesh`, to have the state made where it is to lie, split over "params"; None
        for the default device.

    Raises:
      ValueError: what `jm.check_learner` says of a learner of one's own; what one of the library raises on
        tasks it cannot work on; `params` have another structure, shape or dtype than the learner's. All
        before anything is compiled.
    """

    def init(sample: Callable[[Key], Task], key: Key, given: Params | None) -> tuple[Params, PyTree]:
        start = _draw(learner, sample, key) if given is None else given
        return start, optimizer.init(start)

    learner = normalized(learner)
    check_tasks(tasks)
    check_optimizer("optimizer", optimizer)
    check_key("key", key)
    sample = sample_of(tasks)
    check_functions(learner, sample, key)
    drawn = jax.eval_shape(partial(_draw, learner), sample, key)
    if params is not None:
        check_params_kind(params)
        check_params(params, drawn)
    # Compiled as a whole: `init` reads the task's shapes only, so that drawing it is dead code.
    if devices is None or devices.size == 1:
        start, opt_state = jax.jit(init)(sample, key, params)
        return TrainState(jnp.zeros((), jnp.int32), start, opt_state, key)
    placed = sharding.shardings(jax.eval_shape(init, sample, key, params), devices)
    sample, key, params = sharding.replicate((sample, key, params), devices)
    start, opt_state = jax.jit(init, out_shardings=placed)(sample, key, params)
    return TrainState(sharding.replicate(jnp.zeros((), jnp.int32), devices), start, opt_state, key)


def drawn_params(learner: Learner, tasks: TaskDistribution | TaskStream, key: Key) -> Params:
    """Return the parameters that a run with `key` starts from."""
    return jax.jit(partial(_draw, learner))(sample_of(tasks), key)


def _draw(learner: Learner, sample: Callable[[Key], Task], key: Key) -> Params:
    init_key, task_key = jax.random.split(jax.random.fold_in(key, _INIT))
    return learner.init(init_key, sample(task_key))


def check_params_kind(params: Params) -> None:
    """Refuse for parameters what is known to be something else.

    Raises:
      ArgumentError: it is.
    """
    if isinstance(params, TrainState):
        raise ArgumentError("params", "got TrainState(…); it must be the parameters in it, state.params")
    if isinstance(params, Learner | TaskDistribution | TaskStream | Task | Batch) or callable(params):
        raise ArgumentError(
            "params",
            f"got {described(params)}; it must be parameters, as learner.init gives them",
        )


def check_params(params: Params, drawn: Params) -> None:
    """Refuse parameters to start from that are not of the learner.

    Raises:
      ArgumentError: another structure, or a leaf of another shape or dtype, or with NaN in it.
    """
    got: Any = jax.tree.structure(params)
    wanted: Any = jax.tree.structure(drawn)
    if got != wanted:
        raise ArgumentError("params", f"got {got}; the learner has {wanted}")
    for (path, leaf), expected in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(drawn), strict=True
    ):
        if (jnp.shape(leaf), jnp.result_type(leaf)) != (expected.shape, expected.dtype):
            raise ArgumentError(
                "params",
                f"got {jnp.result_type(leaf)} of shape {jnp.shape(leaf)} at {jax.tree_util.keystr(path)}; "
                f"the learner has {expected.dtype} of shape {expected.shape}",
            )
        known = getattr(leaf, "is_fully_addressable", True) and not isinstance(leaf, jax.core.Tracer)
        if known and jnp.issubdtype(expected.dtype, jnp.inexact) and not jnp.isfinite(leaf).all():
            where = jax.tree_util.keystr(path)
            raise ArgumentError("params", f"got values at {where} that are not finite")


@contextlib.contextmanager
def stream_batches(stream: TaskStream, start: int) -> Iterator[Iterator[Task]]:
    """The batches of a stream from `start` on, read ahead where it can, until the block ends.

    Class slots that are on the host are checked; to look at those on a device would be to wait for it.
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
    """Refuses a stream whose episodes are known to be others than those that `key` stands for."""
    if not isinstance(tasks, TaskStream) or tasks.key is None:
        return
    own, given = (np.asarray(jax.random.key_data(each)) for each in (tasks.key, key))
    if tasks.for_evaluation != for_evaluation or not np.array_equal(own, given):
        raise ArgumentError(
            name,
            f"got a stream whose episodes are of another key, or numbered otherwise; build "
            f"it with the key used here ({given.tolist()} as data) and for_evaluation={for_evaluation}",
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
    """One meta-step as a pure function, to be compiled by the caller.

    φ ← update(φ, 1/B Σ_i ∇_φ loss(φ, task_i)), with task_i drawn on the device from the key
    `fold_in(fold_in(key, step), i)`: the same tasks on one device and on eight, and under
    every strategy. Results agree up to the order of a float32 sum.

    Args:
      learner: what is trained; the plain gradient of its `loss` is the meta-gradient.
      optimizer: any optax optimizer, clipped, scheduled or chained.
      meta_batch: tasks per meta-step, B.
      strategy: how a device goes through its tasks. "vmap": all at once. "scan": one at a
        time, gradients accumulated, so that memory does not grow with their number. An int:
        that many at a time. "auto": "scan" on CPUs, whose grouped convolutions are slow,
        "vmap" on accelerators.
      devices: that share the tasks; None for as many as divide `meta_batch`. Of a learner that is
        `divisible` there may be more of them than tasks: they share the examples of each. Or a mesh of
        `jm.make_mesh`.
      compared_to: a learner of the same parameters, such as the first-order version of `learner`, whose
        meta-gradient on the same tasks is computed besides, and not used: the metrics get "cosine" and
        "norm_ratio" between the two (see `jm.meta_gradient_alignment`).

    Returns:
      `step(state, tasks.sample) -> (state, metrics)`, or `step(state, stream.at(i))` with a batch of
      `meta_batch` tasks. `metrics` has "loss", the mean of the
      learner's loss, and the mean of each of the learner's own metrics over all tasks (which
      replaces "loss" where the learner reports one by that name).

    Raises:
      ValueError: `meta_batch` below 1, an unknown `strategy`, or a number of devices or of
        tasks at a time that does not divide.
    """
    check_count("meta_batch", meta_batch)
    learner = normalized(learner)
    check_optimizer("optimizer", optimizer)
    compared_to = None if compared_to is None else normalized(compared_to)
    mesh = sharding.task_mesh(meta_batch, devices, divisible=learner.divisible)
    own = meta_batch // mesh.shape[sharding.TASKS]
    at_once = _tasks_at_once(strategy, own, mesh.devices.flat[0].platform)

    def gradient(
        learner: Learner, params: Params, step: Array, tasks: Task, keys: Array
    ) -> tuple[Params, tuple[Array, Any]]:
        """Sums over `at_once` tasks: their gradients; their losses and metrics, in float32 at least."""

        def total(params: Params) -> tuple[Array, Any]:
            if at_once == 1:
                # Without the batch axis: a vmap, even of 1, makes convolutions grouped ones.
                task, key = jax.tree.map(lambda leaf: leaf[0], (tasks, keys))
                value, metrics = jax.tree.map(full_precision, learner.loss(params, task, key, step=step))
                return value, (value, metrics)
            values, metrics = jax.tree.map(
                full_precision,
                jax.vmap(lambda task, key: learner.loss(params, task, key, step=step))(tasks, keys),
            )
            return values.sum(), (values.sum(), jax.tree.map(lambda leaf: leaf.sum(0), metrics))

        return jax.grad(total, has_aux=True)(params)

    def gradients(*given: Any) -> tuple[list[Params], tuple[Array, Any]]:
        """Those of all learners; the losses and metrics of the one that is trained."""
        found = [gradient(each, *given) for each in (learner, compared_to) if each is not None]
        return [grads for grads, _ in found], found[0][1]

    def step(state: TrainState, source: Source) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        first = sharding.first_task(mesh, own)
        keys = episode_keys(jax.random.fold_in(state.key, state.step), first + jnp.arange(own))
        # All tasks are drawn before the scan over them: drawn inside it, many tiny operations
        # per task made the sinusoid's meta-step twice as long. What grows with the number of
        # tasks is then their examples only, not their activations.
        tasks = source if isinstance(source, Task) else jax.vmap(source)(keys[:, 0])
        if (given := tasks.query.y.shape[0]) != own:
            raise ArgumentError(
                "tasks", f"got a batch of {given * meta_batch // own}, and meta_batch is {meta_batch}"
            )
        if at_once == own:
            sums = gradients(state.params, state.step, tasks, keys[:, 1])
        else:

            def accumulate(grads: list[Params], chunk: tuple[Task, Array]) -> tuple[list[Params], Any]:
                new, values = gradients(state.params, state.step, *chunk)
                return jax.tree.map(jnp.add, grads, new), values

            chunks = jax.tree.map(
                lambda leaf: leaf.reshape(own // at_once, at_once, *leaf.shape[1:]), (tasks, keys[:, 1])
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

    shared = sharding.over_tasks(step, mesh, out=PartitionSpec())

    def placed(state: TrainState, source: Source) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        state, metrics = shared(state, source)
        return sharding.keep_placed(state, mesh), metrics

    return placed


def validation_key(key: Key) -> Key:
    """Key of the validation episodes of a run with `key`: the same at every validation."""
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
