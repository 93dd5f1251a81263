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

# Calls of the compiled chunk that may wait on the device: each holds batches of a stream there.
_QUEUED = 2
# Meta-steps of a stream in one call, as long as their tasks are no larger: every call allocates its
# temporary arrays anew, which took a tenth of the time of calls of a single step on a CPU.
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
          step: that was not finite.
          checkpoint: the last one that was saved.
          initial: whether the parameters were still those that training began with.
          of_loss: whether it was the loss; otherwise its gradient, or the update that followed.
          operation: what gave the first NaN, where it was looked for.
        """
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"
        advice = "A smaller learning rate (inner or outer) or gradient clipping usually helps"
        if initial:
            debug = operation or (
                "With JAX_DEBUG_NANS=1 (jax_debug_nans) the operation is named that gives a NaN"
            )
            advice = (
                "The parameters were still those that training began with, so that the outer learning rate "
                "is not the cause: look at the inputs and targets, the loss, the network and the inner "
                f"learning rate. {debug}"
                if of_loss or operation
                else "The loss was finite, and its gradient was not, or the step that the outer optimizer "
                f"took. {debug}"
            )
        super().__init__(f"the loss or a parameter became non-finite in meta-step {step}; {kept}. {advice}")
        self.step = step
        self.checkpoint = checkpoint


class Stopped(Exception):
    """`should_stop` said so after meta-step `step`; `checkpoint` is where the state was saved."""

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
    """Meta-trains a learner.

    Every episode is a pure function of `(key, step, index)`, so a run that was stopped and
    resumed ends in the same bits as one that was not, given the same devices and versions.

    Args:
      learner: what is trained.
      tasks: training tasks; their data are an argument of the compiled step. A stream must be built
        with the same `key` and `meta_batch`.
      optimizer: any optax optimizer of the meta-parameters, clipped, scheduled or chained.
      steps: meta-steps in all, those before a resumption included.
      key: of the whole run.
      params: parameters to start from, as `learner.init` gives them; None for those that it draws. A run
        that is resumed goes on from its checkpoint.
      meta_batch, strategy, devices, compared_to: see `meta_step`. Small dense networks are fastest with
        strategy="vmap", on CPUs too; "auto" is made for convolutions. CPUs are one device, whatever their
        cores, unless `JAX_NUM_CPU_DEVICES=N` in the environment, or `jax.config.update("jax_num_cpu_devices",
        N)` before JAX is first used, makes N of them.
      validation: tasks to choose the best parameters by; None to keep the last. A stream must be
        built with `jm.training.validation_key(key)` and `for_evaluation=True`.
      validation_episodes: fixed episodes in a validation, at least 2.
      validate_every: meta-steps between validations; there is one more at the end.
      run_dir: folder of the run; its `checkpoints/` gets the last two states, and the best
        parameters as `best` (for `jm.load`), its `metrics.jsonl` what is reported. `jm.load_run(run_dir,
        learner=learner)` and `jaxmeta plot RUN_DIR` read it, and `jaxmeta evaluate RUN_DIR --learner NAME
        --tasks NAME` evaluates it. None: nothing is written.
      checkpoint_every: meta-steps between checkpoints; None for `validate_every`. There is one
        more at the end and when stopped.
      resume: continue from the newest readable checkpoint of `run_dir`.
      report: is called with each event: `Resumed`, `Progress`, `Validated`, `Saved`. `jm.progress_bar()`
        shows them; `print` prints them.
      log_every: meta-steps between `Progress` events; the host looks at the loss, and at
        `should_stop`, this often.
      config: JSON-like dict stored in each checkpoint; a resumption with another one is refused.
      should_stop: asked between chunks; True, in any process, saves and raises `Stopped`.
      non_finite: what becomes of a meta-step whose loss or parameters are not finite. "stop" raises; "skip"
        leaves parameters and optimizer state as they were, and counts it in `Progress.skipped`.
      maximize: whether a larger result of validation is the better one. None where that is known: it is of
        accuracy, and is not of a loss or an error of `jm.losses`.

    Returns:
      The last state; with `validation`, its `params` are the best ones instead of the last.

    Raises:
      ValueError: a setting out of range, tasks the learner cannot work on, a `run_dir` that
        holds a run already, or a checkpoint that is absent or of another configuration.
      NonFiniteLoss: the loss or a parameter is no longer finite, or, with "skip", is not in any of the
        `log_every` steps of a report. No bad state is ever saved.
      Stopped: `should_stop` returned True.
      OSError: a checkpoint cannot be written; earlier ones stay. Where it is the last one, a warning says so
        and the state is returned.
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
    # Of several processes the first one writes.
    log = MetricsLog(folder / METRICS) if folder is not None and hosts.is_first() else None

    def emit(event: Event) -> None:
        for each in (log, report):
            if each is not None:
                each(event)

    episodes_key = validation_key(key)
    check_stream(tasks, key, for_evaluation=False, name="tasks")
    if validation is not None:
        check_stream(validation, episodes_key, for_evaluation=True, name="validation")
    source = _first_source(tasks, meta_batch, mesh)
    state, best = init_state(learner, optimizer, tasks, key, params=params, devices=mesh), None
    if folder is not None:
        # The last two states, one being written, the best parameters likewise.
        checkpoint.require_space(folder, 3 * checkpoint.nbytes((state, state.params)))
    if resume and folder is not None:
        state, best = checkpoint.restore_checkpoint(folder, state, config=config)
        if best is not None:
            # A kill while it was being replaced may have left none.
            checkpoint.save_best(folder, best)
        emit(Resumed(int(state.step)))
    done, saved_at = int(state.step), _last_checkpoint(folder)
    if done > steps:
        raise ArgumentError(
            "steps", f"got {steps}, but the checkpoint to resume from is of step {done} already"
        )

    # A copy, since the chunk's first call consumes its argument, and the key is the caller's.
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
        debugged = initial and debugging and not hosts.are_many()
        operation = _first_nan(learner, optimizer, tasks, key, params, meta_batch) if debugged else None
        return NonFiniteLoss(step, saved_at, initial=initial, of_loss=of_loss, operation=operation)

    def read(start: int, until: int, outs: list[dict[str, PyTree]]) -> None:
        """Waits for a chunk, and reports it."""
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
    def last_is_kept() -> Iterator[None]:
        """At the end a file that cannot be written costs nothing else: the caller gets the state."""
        try:
            yield
        except OSError as error:
            if done < steps:
                raise
            warnings.warn(f"{error}; the state at the end is returned all the same", stacklevel=3)

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
                # What JAX says of a NaN in the whole program names no operation in it.
                with jax.debug_nans(False):
                    state, out = chunk(state, source, jnp.int32(until))
                outs.append(out)
                queue.append(out["count"])
                if len(queue) > _QUEUED:
                    jax.block_until_ready(queue.popleft())
            # The device has its next chunk before the host reads the last one: it never waits.
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
                        with last_is_kept():
                            checkpoint.save_best(folder, best)
                emit(Validated(done, metric, result, better))
            if save_now:
                with last_is_kept():
                    save()
            clock = time.perf_counter()
    return state if best is None else state._replace(params=best.params)


def _first_source(tasks: TaskDistribution | TaskStream, meta_batch: int, mesh: Mesh) -> Source | list[Task]:
    """What the compiled chunk draws from: a sampler, or the tasks of some meta-steps."""
    if isinstance(tasks, TaskDistribution):
        return sharding.replicate(sharding.as_argument(tasks.sample), mesh)
    batch = tasks.at(0)
    own = meta_batch // jax.process_count()
    if not isinstance(batch, Task) or batch.query.y.shape[0] not in (own, meta_batch):
        found = f"{batch.query.y.shape[0]} tasks" if isinstance(batch, Task) else type(batch).__name__
        raise ArgumentError(
            "tasks",
            f"the stream gives {found} a step; it must be a Task whose leaves have a leading axis of "
            f"meta_batch = {meta_batch} tasks"
            + (f", or of {own}, this process's share" if own < meta_batch else ""),
        )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    return [sharding.share(batch, mesh, meta_batch)] * max(1, min(_STEPS_AT_ONCE, _BYTES_AT_ONCE // size))


@contextlib.contextmanager
def _calls(
    tasks: TaskDistribution | TaskStream, first: Source | list[Task], mesh: Mesh, meta_batch: int, done: int
) -> Iterator[Callable[[int, int], Iterable[tuple[Source | list[Task], int]]]]:
    """`(start, until) -> (source, until) of each call of the chunk`, for a run that starts at `done`.

    From memory one call, whose meta-steps draw for themselves; from a stream one for every few.
    """
    if not isinstance(first, list):
        yield lambda start, until: [(first, until)]
        return
    assert isinstance(tasks, TaskStream)
    with stream_batches(tasks, done) as batches:

        def each(start: int, until: int) -> Iterator[tuple[list[Task], int]]:
            while start < until:
                given = [
                    sharding.share(batch, mesh, meta_batch)
                    for batch in itertools.islice(batches, min(len(first), until - start))
                ]
                if not given:
                    raise ArgumentError("tasks", f"the stream ended before meta-step {start + 1}")
                start += len(given)
                # Of a call of fewer steps the last tasks fill the places that it does not come to.
                yield given + given[-1:] * (len(first) - len(given)), start

        yield each


def _chunk(step: Callable[..., Any], *, skip: bool) -> Callable[..., Any]:
    """Meta-steps until a given one, or until one that is not finite, as one compiled loop.

    The end is an argument and not a shape, so that chunks of every length are one program:
    nothing is compiled twice, and a resumed run, whose chunks may be cut elsewhere, computes
    the same bits. `source` is a sampler, or a list of the tasks of one meta-step after another.
    `skip`: a step that is not finite leaves all but its number as it was, and the loop goes on.
    """

    def chunk(
        state: TrainState, source: Source | list[Task], until: Array
    ) -> tuple[TrainState, dict[str, PyTree]]:
        start = state.step
        given = jax.tree.map(lambda *leaves: jnp.stack(leaves), *source) if isinstance(source, list) else None

        def source_at(step: Array) -> Any:
            return source if given is None else jax.tree.map(lambda leaf: leaf[step - start], given)

        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(step, state, source_at(start))[1]
        )

        def going(carry: tuple[Any, ...]) -> Array:
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
        state, totals, finite, skipped = jax.lax.while_loop(going, body, first)
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
    """Say which operation gives the first NaN of the first meta-step, by a run without compilation."""

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
                return f"Of task {index} {error}, {_place(error)}"
            break
    return None


def _place(error: BaseException) -> str:
    """Return the line of the user's, or of a network's, code that an error of JAX comes from."""
    packages = [Path(str(module.__file__)).parent for module in (jax, jaxtyping)]
    machinery = tuple(f"{folder}{os.sep}" for folder in (*packages, Path(__file__).parent))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*machinery, learner_form.__file__)):
            return f"by {frame.filename}, line {frame.lineno}"
    return "in the gradient of the loss"


def _where(condition: Array, one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)


def _still_finite(before: PyTree, after: PyTree) -> Array:
    """Whether all numbers are finite that were so before: an optimizer may begin with an infinite one."""
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
    """Return whether validation looks for a large value of the learner's metric; None: if it is accuracy.

    Raises:
      ArgumentError: it is a metric of one's own.
    """
    metric = learner.metric
    if metric is None or isinstance(metric, ScoreOrLoss):
        return None
    if metric in (losses.mse, losses.cross_entropy):
        return False
    raise ArgumentError(
        "maximize",
        f"got None, and the learner's metric is {metric_label(metric)!r}, of which validation has to know "
        "whether more is better (maximize=True) or less (maximize=False)",
    )


def _better(maximize: bool, new: float, old: float) -> bool:
    # With a NaN in place of a number to beat, any number is better.
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
