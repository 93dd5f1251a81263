"""The training loop: one compiled chunk of meta-steps; the host only reports between chunks."""

import contextlib
import itertools
import math
import os
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import jaxtyping
from jax.sharding import Mesh
from jaxtyping import Array

from jaxmeta import learner_form, losses
from jaxmeta.checks import ArgumentError, check_count, check_function, check_key, check_word
from jaxmeta.core import (
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
from jaxmeta.losses import ScoreOrLoss, metric_label
from jaxmeta.training import checkpoint, hosts, sharding
from jaxmeta.training.evaluate import evaluate, metric_name
from jaxmeta.training.events import Event, Progress, Resumed, Saved, Validated
from jaxmeta.training.metrics import METRICS, MetricsLog
from jaxmeta.training.progress import showing
from jaxmeta.training.sharding import Devices
from jaxmeta.training.step import (
    Strategy,
    TrainState,
    check_stream,
    init_state,
    meta_step,
    stream_batches,
    validation_key,
)

# Calls of the compiled chunk that may be queued on the device, where each holds its batches of a stream.
_QUEUED = 2
# Meta-steps of a stream in one call, and the most bytes of their tasks. Each call allocates its temporary
# arrays again, which took a tenth of the time of calls with a single step on a CPU.
_STEPS_AT_ONCE, _BYTES_AT_ONCE = 8, 2**28


# What to do at a meta-step whose loss or gradient is not finite.
NonFinite = Literal["stop", "skip"]


class NonFiniteLoss(FloatingPointError):
    """The loss, or a parameter, became NaN or infinite in meta-step `step` (the first is 1)."""

    def __init__(
        self,
        step: int,
        checkpoint: Path | None,
        *,
        initial: bool = False,
        of_loss: bool = True,
        operation: str | None = None,
    ):
        """Build the message.

        Args:
          step: number of the meta-step.
          checkpoint: the last checkpoint; None if there is none.
          initial: whether the parameters were still the initial ones.
          of_loss: whether the loss was not finite; otherwise its gradient or the update was not.
          operation: description of the operation that gave the first NaN; None if unknown.
        """
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"
        advice = "A smaller learning rate (inner or outer) or gradient clipping usually helps"
        if initial:
            debug = operation or (
                "Set JAX_DEBUG_NANS=1 (jax_debug_nans) to find the operation that gives the first NaN"
            )
            advice = (
                "The parameters were still the initial ones, so the outer learning rate is not the cause: "
                "check the inputs and targets, the loss, the network and the inner learning rate. "
                f"{debug}"
                if of_loss or operation
                else "The loss was finite, but its gradient or the update of the outer optimizer was not. "
                f"{debug}"
            )
        super().__init__(f"the loss or a parameter became non-finite in meta-step {step}; {kept}. {advice}")
        self.step = step
        self.checkpoint = checkpoint


class Stopped(Exception):
    """Training stopped after meta-step `step`, because `should_stop` returned True.

    Attributes:
      step: number of the last meta-step.
      checkpoint: path of the saved state; None without `run_dir`.
    """

    def __init__(self, step: int, checkpoint: Path | None):
        saved = f"saved in {checkpoint}" if checkpoint else "nothing saved (no run_dir)"
        super().__init__(f"stopped after meta-step {step}; {saved}")
        self.step = step
        self.checkpoint = checkpoint


def train(
    learner: Learner,
    tasks: TaskDistribution | TaskStream,
    optimizer: Optimizer,
    *,
    steps: int,
    key: Key,
    params: Params | None = None,
    meta_batch: int = 32,
    strategy: Strategy = "auto",
    devices: Devices = None,
    compared_to: Learner | None = None,
    validation: TaskDistribution | TaskStream | None = None,
    validation_episodes: int = 200,
    validate_every: int = 1000,
    run_dir: str | PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    report: Callable[[Event], None] | None = None,
    log_every: int = 50,
    config: dict[str, Any] | None = None,
    should_stop: Callable[[], bool] | None = None,
    non_finite: NonFinite = "stop",
    maximize: bool | None = None,
) -> TrainState:
    """Train a learner.

    Every episode is a pure function of `(key, step, index)`, so a run that is stopped and resumed ends with
    the same bits as an uninterrupted one, on the same devices and versions.

    Args:
      learner: the learner to train.
      tasks: training tasks. A stream must be built with the same `key` and `meta_batch`.
      optimizer: optax optimizer of the meta-parameters.
      steps: total number of meta-steps, including those before a resumption.
      key: key of the run.
      params: initial parameters, in the form that `learner.init` returns; None to draw them. A resumed run
        continues from its checkpoint.
      meta_batch: number of tasks in a meta-step; see `meta_step`.
      strategy: how the tasks of one device are computed; see `meta_step`. "auto" suits convolutions; small
        dense networks are fastest with "vmap", also on CPUs.
      devices: devices that share the tasks; see `meta_step`. JAX sees a CPU as one device, whatever its
        number of cores, unless `JAX_NUM_CPU_DEVICES=N` is in the environment, or
        `jax.config.update("jax_num_cpu_devices", N)` is called before JAX is first used.
      compared_to: learner whose meta-gradient is compared with this one's; see `meta_step`.
      validation: tasks by which the best parameters are chosen; None to keep the last ones. A stream must be
        built with `jm.training.validation_key(key)` and `for_evaluation=True`.
      validation_episodes: number of episodes of a validation, at least 2. They are the same every time.
      validate_every: meta-steps between validations; the last meta-step is followed by one, too.
      run_dir: folder of the run; None to write nothing. Its `checkpoints/` holds the last two states and the
        best parameters as `best` (for `jm.load`), its `metrics.jsonl` the events. `jm.load_run(run_dir,
        learner=learner)` and `jaxmeta plot RUN_DIR` read it, and `jaxmeta evaluate RUN_DIR --learner NAME
        --tasks NAME` evaluates it.
      checkpoint_every: meta-steps between checkpoints; None for `validate_every`. There is one more
        at the end, and when training is stopped.
      resume: whether to continue from the newest readable checkpoint of `run_dir`.
      report: function that is called with each event (`Resumed`, `Progress`, `Validated`, `Saved`), such as
        `jm.progress_bar()` or `print`.
      log_every: meta-steps between `Progress` events, at which the host also reads the loss and calls
        `should_stop`.
      config: JSON-like dictionary stored in each checkpoint; resuming with another one is an error.
      should_stop: function called between chunks of meta-steps; if it returns True in any process, the state
        is saved and `Stopped` raised.
      non_finite: what to do at a meta-step whose loss or parameters are not finite. "stop" raises an error;
        "skip" keeps parameters and optimizer state, and counts the step in `Progress.skipped`.
      maximize: whether larger results of validation are better. None chooses by the metric: yes for accuracy,
        no for the losses of `jm.losses`.

    Returns:
      The last state. With `validation`, its `params` are the best ones.

    Raises:
      ValueError: a setting is out of range, the learner cannot work on the tasks, `run_dir` holds a run
        already, or the checkpoint to resume from is absent or has another configuration.
      NonFiniteLoss: the loss or a parameter became NaN or infinite; with "skip", in all steps since the last
        report. Such a state is never saved.
      Stopped: `should_stop` returned True.
      OSError: a checkpoint could not be written; earlier ones remain. At the end of training this is only a
        warning, and the state is returned.

    Examples:
      >>> import optax
      >>> import jaxmeta as jm
      >>> learner = jm.maml(jm.nn.MLP(out=1, hidden=(8,)), inner_lr=0.01, loss=jm.losses.mse)
      >>> tasks = jm.tasks.sinusoid("train", shots=5, queries=5)
      >>> state = jm.train(
      ...     learner, tasks, optax.adam(1e-3), steps=2, meta_batch=2, strategy="vmap", key=jax.random.key(0)
      ... )
      >>> int(state.step)
      2
    """
    checkpoint_every = validate_every if checkpoint_every is None else checkpoint_every
    folder = None if run_dir is None else Path(run_dir).absolute()
    _check_settings(
        steps, meta_batch, validate_every, checkpoint_every, log_every, validation_episodes, folder, resume
    )
    check_word("non_finite", non_finite, get_args(NonFinite))
    learner = normalized(learner)
    check_tasks(tasks)
    check_key("key", key)
    if validation is not None:
        check_tasks(validation, "validation")
    for name, function in (("report", report), ("should_stop", should_stop)):
        if function is not None:
            check_function(name, function)
    if validation is not None and maximize is None:
        maximize = _is_maximized(learner)
    mesh = sharding.task_mesh(meta_batch, devices, divisible=learner.divisible)
    step = jax.jit(meta_step(learner, optimizer, meta_batch, strategy, devices=mesh, compared_to=compared_to))
    # Only the first of several processes writes the log.
    log = MetricsLog(folder / METRICS) if folder is not None and hosts.is_first() else None

    def emit(event: Event) -> None:
        for receive in (log, report):
            if receive is not None:
                receive(event)

    episodes_key = validation_key(key)
    check_stream(tasks, key, for_evaluation=False, name="tasks")
    if validation is not None:
        check_stream(validation, episodes_key, for_evaluation=True, name="validation")
    source = _first_source(tasks, meta_batch, mesh)
    state, best = init_state(learner, optimizer, tasks, key, params=params, devices=mesh), None
    if folder is not None:
        # The folder holds the last two states and the one being written, and as many copies of the best
        # parameters.
        checkpoint.require_space(folder, 3 * checkpoint.nbytes((state, state.params)))
    if resume and folder is not None:
        state, best = checkpoint.restore_checkpoint(folder, state, config=config)
        if best is not None:
            # Write it again: a process killed while replacing the file may have left none.
            checkpoint.save_best(folder, best)
        emit(Resumed(int(state.step)))
    done, saved_at = int(state.step), _last_checkpoint(folder)
    if done > steps:
        raise ArgumentError(
            "steps", f"got {steps}, but the checkpoint to resume from is of step {done}; give at least {done}"
        )

    # Copy the state: the chunk donates its argument, which includes the caller's key.
    state = sharding.place(jax.tree.map(jnp.copy, state), mesh)
    if validation is not None:
        metric = metric_name(validation, learner, state.params)
        if isinstance(validation, TaskDistribution):
            validation = validation._replace(
                sample=sharding.replicate(sharding.as_argument(validation.sample), mesh)
            )
    clock = compile_s = 0.0

    def not_finite(step: int, initial: bool, of_loss: bool = True) -> NonFiniteLoss:
        debugging = jax.config.jax_debug_nans  # type: ignore[attr-defined]
        debugged = initial and debugging and not hosts.is_multiprocess()
        operation = _first_nan(learner, optimizer, tasks, key, params, meta_batch) if debugged else None
        return NonFiniteLoss(step, saved_at, initial=initial, of_loss=of_loss, operation=operation)

    def read(start: int, until: int, outs: list[dict[str, PyTree]]) -> None:
        """Wait for a chunk and report its metrics."""
        nonlocal clock
        outs, count, skipped = jax.device_get(outs), 0, 0
        for out in outs:
            count += int(out["count"])
            skipped += int(out["skipped"])
            if not out["finite"]:
                of_loss = not math.isfinite(out["metrics"]["loss"])
                raise not_finite(start + count, start + count == 1, of_loss)
        if skipped == count:
            raise not_finite(start + count, initial=start == 0)
        now = time.perf_counter()
        totals = jax.tree.map(lambda *parts: float(sum(parts)), *(out["metrics"] for out in outs))
        metrics = {name: total / (count - skipped) for name, total in totals.items()}
        emit(Progress(until, steps, metrics, count / (now - clock), compile_s, skipped))
        clock = now

    def save() -> Path | None:
        nonlocal saved_at
        if folder is not None:
            saved_at = checkpoint.save_checkpoint(folder, state, best=best, config=config)
            emit(Saved(done, saved_at))
        return saved_at

    @contextlib.contextmanager
    def warn_after_last_step() -> Iterator[None]:
        """Turn an OSError into a warning once training is complete, so that the caller gets the state."""
        try:
            yield
        except OSError as error:
            if done < steps:
                raise
            warnings.warn(f"{error}; the trained state is returned all the same", stacklevel=3)

    pending: tuple[int, int, list[dict[str, Any]]] | None = None
    queue: deque[Array] = deque()
    recording = contextlib.nullcontext() if log is None else contextlib.closing(log)
    with recording, showing(report, steps), _calls(tasks, source, mesh, meta_batch, done) as calls:
        started = time.perf_counter()
        chunk = (
            jax.jit(_chunk(step, skip=non_finite == "skip"), donate_argnums=0)
            .lower(state, source, jnp.int32(0))
            .compile()
        )
        compile_s = time.perf_counter() - started
        clock = time.perf_counter()
        while done < steps:
            if should_stop is not None and hosts.any_of(should_stop()):
                if pending:
                    read(*pending)
                raise Stopped(done, save())
            start, done = (
                done,
                min(steps, *(_next(done, every) for every in (log_every, validate_every, checkpoint_every))),
            )
            outs: list[dict[str, Any]] = []
            for source, until in calls(start, done):
                # jax_debug_nans cannot name the operation in a compiled program; `_first_nan` finds it.
                with jax.debug_nans(False):
                    state, out = chunk(state, source, jnp.int32(until))
                outs.append(out)
                queue.append(out["count"])
                if len(queue) > _QUEUED:
                    jax.block_until_ready(queue.popleft())
            # Read the last chunk after the next one is queued, so that the device never waits for the host.
            if pending:
                read(*pending)
            pending = start, done, outs
            validate_now = validation is not None and (done % validate_every == 0 or done == steps)
            save_now = folder is not None and (done % checkpoint_every == 0 or done == steps)
            if not (validate_now or save_now or done == steps):
                continue
            read(*pending)
            pending = None
            if validation is not None and validate_now:
                result = evaluate(
                    learner,
                    state.params,
                    validation,
                    episodes=validation_episodes,
                    key=episodes_key,
                    devices=mesh,
                )
                better = best is None or _better(
                    metric == "accuracy" if maximize is None else maximize,
                    result.mean,
                    best.evaluation.mean,
                )
                if better:
                    best = checkpoint.Best(done, result, jax.tree.map(jnp.copy, state.params))
                    if folder is not None:
                        with warn_after_last_step():
                            checkpoint.save_best(folder, best)
                emit(Validated(done, metric, result, better))
            if save_now:
                with warn_after_last_step():
                    save()
            clock = time.perf_counter()
    return state if best is None else state._replace(params=best.params)


def _first_source(tasks: TaskDistribution | TaskStream, meta_batch: int, mesh: Mesh) -> Source | list[Task]:
    """Return what the compiled chunk draws from: a sampler, or the tasks of several meta-steps."""
    if isinstance(tasks, TaskDistribution):
        return sharding.replicate(sharding.as_argument(tasks.sample), mesh)
    batch = tasks.at(0)
    share = meta_batch // jax.process_count()
    if not isinstance(batch, Task) or batch.query.y.shape[0] not in (share, meta_batch):
        actual = f"{batch.query.y.shape[0]} tasks" if isinstance(batch, Task) else type(batch).__name__
        raise ArgumentError(
            "tasks",
            f"the stream gives {actual} per step; it must be a Task whose leaves have a leading axis of "
            f"meta_batch = {meta_batch} tasks"
            + (f", or of {share}, this process's share" if share < meta_batch else ""),
        )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    return [sharding.share(batch, mesh, meta_batch)] * max(1, min(_STEPS_AT_ONCE, _BYTES_AT_ONCE // size))


@contextlib.contextmanager
def _calls(
    tasks: TaskDistribution | TaskStream, first: Source | list[Task], mesh: Mesh, meta_batch: int, done: int
) -> Iterator[Callable[[int, int], Iterable[tuple[Source | list[Task], int]]]]:
    """Yield a function `(start, until)` that gives `(source, until)` for each call of the chunk.

    Tasks in memory need one call, whose meta-steps draw their own tasks. A stream needs a call for every few
    meta-steps. `done` is the number of meta-steps before the run starts.
    """
    if not isinstance(first, list):
        yield lambda start, until: [(first, until)]
        return
    assert isinstance(tasks, TaskStream)
    with stream_batches(tasks, done) as batches:

        def calls(start: int, until: int) -> Iterator[tuple[list[Task], int]]:
            while start < until:
                read = [
                    sharding.share(batch, mesh, meta_batch)
                    for batch in itertools.islice(batches, min(len(first), until - start))
                ]
                if not read:
                    raise ArgumentError("tasks", f"the stream ended before meta-step {start + 1}")
                start += len(read)
                # Pad a shorter call with copies of its last tasks, which it does not reach.
                yield read + read[-1:] * (len(first) - len(read)), start

        yield calls


def _chunk(step: Callable[..., Any], *, skip: bool) -> Callable[..., Any]:
    """Build the loop over meta-steps, up to a given one or to the first that is not finite.

    The last step is an argument and not a shape, so that chunks of every length are one program: nothing is
    compiled twice, and a resumed run, whose chunks may begin elsewhere, computes the same bits. `source` is a
    sampler, or a list with the tasks of each meta-step. With `skip`, a step that is not finite changes
    nothing but the step number, and the loop continues.
    """

    def chunk(
        state: TrainState, source: Source | list[Task], until: Array
    ) -> tuple[TrainState, dict[str, PyTree]]:
        start = state.step
        stacked = (
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *source) if isinstance(source, list) else None
        )

        def source_at(step: Array) -> Any:
            return source if stacked is None else jax.tree.map(lambda leaf: leaf[step - start], stacked)

        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(step, state, source_at(start))[1]
        )

        def unfinished(carry: tuple[Any, ...]) -> Array:
            state, _, finite, _ = carry
            return (state.step < until) & finite

        def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            before, totals, _, skipped = carry
            state, metrics = step(before, source_at(before.step))
            finite = _all_finite((metrics["loss"], state.params))
            if skip:
                finite &= _still_finite(before.opt_state, state.opt_state)
                kept = _where(finite, state, before)
                state = kept._replace(step=state.step)
                metrics = _where(finite, metrics, zeros)
                finite, skipped = jnp.bool_(True), skipped + ~finite
            return state, jax.tree.map(jnp.add, totals, metrics), finite, skipped

        first = state, zeros, jnp.bool_(True), jnp.int32(0)
        state, totals, finite, skipped = jax.lax.while_loop(unfinished, body, first)
        out = {"metrics": totals, "finite": finite, "count": state.step - start, "skipped": skipped}
        return state, out

    return chunk


def _first_nan(
    learner: Learner,
    optimizer: Optimizer,
    tasks: TaskDistribution | TaskStream,
    key: Key,
    params: Params | None,
    meta_batch: int,
) -> str | None:
    """Return which operation gives the first NaN of the first meta-step, found by running it uncompiled."""

    def gradient(params: PyTree, task: Task, key: Key) -> PyTree:
        return jax.value_and_grad(lambda params: learner.loss(params, task, key, step=jnp.int32(0))[0])(
            params
        )

    with jax.debug_nans(False):
        params = init_state(learner, optimizer, tasks, key, params=params).params
        keys = episode_keys(jax.random.fold_in(key, 0), jnp.arange(meta_batch))
        finite = jax.jit(lambda *arguments: _all_finite(gradient(*arguments)))
        for index in range(meta_batch):
            if isinstance(tasks, TaskStream):
                task = jax.tree.map(lambda leaf, index=index: leaf[index], tasks.at(0))
            else:
                task = tasks.sample(keys[index, 0])
            if finite(params, task, keys[index, 1]):
                continue
            try:
                with jax.debug_nans(True), jax.disable_jit():
                    gradient(params, task, keys[index, 1])
            except FloatingPointError as error:
                return f"In task {index}: {error}, {_place(error)}"
            break
    return None


def _place(error: BaseException) -> str:
    """Return the line of a loss or network that an error of JAX comes from."""
    packages = [Path(str(module.__file__)).parent for module in (jax, jaxtyping)]
    machinery = tuple(f"{folder}{os.sep}" for folder in (*packages, Path(__file__).parent))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*machinery, learner_form.__file__)):
            return f"by {frame.filename}, line {frame.lineno}"
    return "in the gradient of the loss"


def _where(condition: Array, one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)


def _still_finite(before: PyTree, after: PyTree) -> Array:
    """Return whether all values that were finite still are; an optimizer may start with infinite ones."""
    lost = [
        (jnp.isfinite(a) & ~jnp.isfinite(b)).any()
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        if jnp.issubdtype(b.dtype, jnp.inexact)
    ]
    return ~jnp.stack([jnp.bool_(False), *lost]).any()


def _all_finite(tree: PyTree) -> Array:
    finite = [
        jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.stack(finite).all()


def _is_maximized(learner: Learner) -> bool | None:
    """Return whether validation maximizes the learner's metric; None for the default metric.

    Raises:
      ArgumentError: the metric is user-defined.
    """
    metric = learner.metric
    if metric is None or isinstance(metric, ScoreOrLoss):
        return None
    if metric in (losses.mse, losses.cross_entropy):
        return False
    raise ArgumentError(
        "maximize",
        f"got None, but the learner has its own metric {metric_label(metric)!r}; pass maximize=True if "
        "larger values are better, maximize=False if smaller values are",
    )


def _better(maximize: bool, new: float, old: float) -> bool:
    # Any number is better than NaN.
    if old != old:
        return new == new
    return new > old if maximize else new < old


def _next(step: int, every: int) -> int:
    return (step // every + 1) * every


def _last_checkpoint(folder: Path | None) -> Path | None:
    steps = [] if folder is None else checkpoint.checkpoint_steps(folder)
    return folder / "checkpoints" / f"step-{steps[-1]:08d}" if folder is not None and steps else None


def _check_settings(
    steps: int,
    meta_batch: int,
    validate_every: int,
    checkpoint_every: int,
    log_every: int,
    validation_episodes: int,
    folder: Path | None,
    resume: bool,
) -> None:
    for name, value, least in (
        ("steps", steps, 1),
        ("meta_batch", meta_batch, 1),
        ("validate_every", validate_every, 1),
        ("checkpoint_every", checkpoint_every, 1),
        ("log_every", log_every, 1),
        ("validation_episodes", validation_episodes, 2),
    ):
        check_count(name, value, least)
    if resume and folder is None:
        raise ArgumentError("run_dir", "got None; resume=True needs the folder of the run to continue")
    if folder is not None and not resume and (held := checkpoint.checkpoint_steps(folder)):
        raise ArgumentError(
            "run_dir",
            f"{folder} holds a run already, with a checkpoint of step {held[-1]}; "
            "continue it with resume=True, or choose another folder",
        )
