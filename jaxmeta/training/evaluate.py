"""What a learner has learned: mean and 95 % confidence interval over fixed episodes."""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from jaxmeta.checks import ArgumentError, check_count, check_function, check_key
from jaxmeta.core import (
    Batch,
    Key,
    Learner,
    Metric,
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
from jaxmeta.losses import ScoreOrLoss, full_precision, metric_label, scores
from jaxmeta.tasks.class_names import slot_names, unnamed
from jaxmeta.tasks.splits import in_order
from jaxmeta.training import sharding
from jaxmeta.training.sharding import Devices, sample_of
from jaxmeta.training.step import check_params_kind, check_stream, stream_batches

# Episodes at once on an accelerator: enough to fill it, few enough for its memory.
_VMAPPED = 100


class Evaluation(NamedTuple):
    """Mean over episodes of the accuracy, in [0, 1], the mean squared error, or a metric of one's own.

    Attributes:
      mean: over episodes.
      ci95: half-width of its 95 % confidence interval, 1.96·s/√E with s of ddof 1.
      episodes: E, of those that have a query.
    """

    mean: float
    ci95: float
    episodes: int

    @classmethod
    def of(cls, values: Float[np.ndarray, " episodes"]) -> "Evaluation":
        """Of one value per episode.

        Examples:
          >>> result = Evaluation.of(np.array([0.6, 0.7, 0.8, 0.5, 0.9]))
          >>> print(f"{result.mean:.1f} ± {result.ci95:.6f} over {result.episodes}")
          0.7 ± 0.138593 over 5
        """
        values = np.asarray(values, np.float64)
        return cls(float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(values.size)), values.size)


def evaluate(
    learner: Learner,
    params: Params,
    tasks: TaskDistribution | TaskStream,
    *,
    episodes: int = 600,
    key: Key,
    batch: int | None = None,
    devices: Devices = None,
    metric: Metric | None = None,
) -> Evaluation:
    """Adapts to the support set of fixed episodes and scores their queries.

    Accuracy where the targets are integers, mean squared error where they are float, or the metric that is
    given; masked queries do not count, nor do episodes all of whose queries are masked. Whether the number is
    transductive is the learner's `norm`.

    Args:
      learner: gives `adapt` and `predict`.
      params: meta-parameters.
      tasks: episode i is drawn with `fold_in(key, i)`, whatever `batch` and `devices` are; those of
        a stream are its first, in its order.
      episodes: E, at least 2.
      key: of the whole evaluation.
      batch: most episodes in one call of the compiled function; None for all of them on CPUs
        and 100 on accelerators; a stream has its own.
      devices: that share the episodes; None for all. Or a mesh of `jm.make_mesh`, whose devices have
        episodes of their own where they do not share parameters.
      metric: `(outputs, y, mask) -> scalar or (sum, count)` of the queries of an episode, in place of the
        learner's own; None for that. Defined once, not anew for each call, it is compiled once.

    Raises:
      ValueError: too few `episodes`, with a query or at all; `batch` below 1; outputs of a wrong shape; or
        a class slot that is none of theirs.
    """
    # A confidence interval needs two.
    check_count("episodes", episodes, 2)
    values = evaluate_episodes(
        learner, params, tasks, episodes=episodes, key=key, batch=batch, devices=devices, metric=metric
    )
    if values.size < 2:
        raise ArgumentError(
            "tasks",
            f"got {values.size} episode with a query, of {episodes}; a confidence interval needs 2",
        )
    return Evaluation.of(values)


def evaluate_episodes(
    learner: Learner,
    params: Params,
    tasks: TaskDistribution | TaskStream,
    *,
    episodes: int = 600,
    key: Key,
    batch: int | None = None,
    devices: Devices = None,
    metric: Metric | None = None,
) -> Float[np.ndarray, " scored"]:
    """Return the accuracy, mean squared error or metric of each episode, as averaged by `evaluate`.

    With one key two learners see the same episodes, so that their values can be paired. Episodes all of whose
    queries are masked are left out.

    Raises:
      ValueError: as `evaluate`; or no episode has a query.
    """
    learner = _with_metric(learner, metric)
    found = _over_episodes(_scores_alone, learner, params, tasks, episodes, key, batch, devices)
    return _scored(found, episodes)


def _over_episodes(
    kept: Callable[["_Outcome"], PyTree],
    learner: Learner,
    params: Params,
    tasks: TaskDistribution | TaskStream,
    episodes: int,
    key: Key,
    batch: int | None,
    devices: Devices,
) -> Any:
    """Return what `kept` keeps of each of the first `episodes` episodes, or of a few more, on the host."""
    check_count("episodes", episodes)
    if batch is not None:
        check_count("batch", batch)
    _check_arguments(params, tasks, key)
    mesh = sharding.evaluation_mesh(devices)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    arguments = sharding.place(params, mesh), sharding.replicate(key, mesh)
    if isinstance(tasks, TaskStream):
        check_stream(tasks, key, for_evaluation=True, name="tasks")
        waiting: PyTree = None
        found: list[PyTree] = []
        for start, given in _numbered(tasks, episodes):
            count, given = given.query.y.shape[0], sharding.pad_to_devices(given, mesh)
            own = given.query.y.shape[0] // mesh.shape[sharding.TASKS]
            shared = sharding.share(given, mesh)
            value = _episodes(kept, learner, own, not on_cpu, mesh, arguments, shared, start)
            value = jax.tree.map(lambda leaf, count=count: leaf[:count], value)
            # One batch behind: the device is never idle, and holds no more than two.
            found += [] if waiting is None else [_on_host(waiting)]
            waiting = value
        return _joined([*found, _on_host(waiting)])
    most = batch or (episodes if on_cpu else _VMAPPED)
    calls = -(-episodes // most)
    apart = mesh.shape[sharding.TASKS]
    own = -(-episodes // (calls * apart))
    sample = sharding.replicate(sharding.as_argument(tasks.sample), mesh)
    values = [
        _episodes(kept, learner, own, not on_cpu, mesh, arguments, sample, call * own * apart)
        for call in range(calls)
    ]
    return _joined(list(map(_on_host, values)))


class Episodes(NamedTuple):
    """What a learner made of test episodes; every leaf has a leading axis of episodes.

    Attributes:
      tasks: their support and query sets.
      adapted: what `learner.adapt` learned from each support set.
      outputs: of `learner.predict` for each query set.
      scores: what `evaluate` averages; NaN for an episode without a query, which it leaves out.
      classes: the name of the class behind each slot, "" for slots that are padding; None where the classes
        of the tasks have no names.
    """

    tasks: Task
    adapted: PyTree
    outputs: Array
    scores: Float[np.ndarray, " episodes"]
    classes: Shaped[np.ndarray, "episodes ways"] | None = None


def run_episodes(
    learner: Learner,
    params: Params,
    tasks: TaskDistribution | TaskStream,
    *,
    episodes: int = 10,
    key: Key,
    metric: Metric | None = None,
) -> Episodes:
    """Run the first episodes of an evaluation, and return all of them to be looked at.

    With the same key they are those of `evaluate`, which is the mean of the scores. All are held in memory,
    adapted states included, on one device.

    Args:
      learner: gives `adapt` and `predict`.
      params: meta-parameters.
      tasks: episode i is drawn with `fold_in(key, i)`; those of a stream are its first, in its order.
      episodes: their number, at least 1.
      key: of the whole evaluation.
      metric: as of `evaluate`.

    Raises:
      ValueError: as `evaluate`.

    Examples:
      >>> import jaxmeta as jm
      >>> tasks = jm.tasks.sinusoid("test", shots=5, queries=8)
      >>> learner = jm.maml(jm.nn.MLP(out=1), loss=jm.losses.mse)
      >>> params = learner.init(jax.random.key(0), tasks.sample(jax.random.key(1)))
      >>> found = jm.run_episodes(learner, params, tasks, episodes=3, key=jax.random.key(2))
      >>> found.tasks.support.x.shape, found.outputs.shape, found.scores.shape
      ((3, 5, 1), (3, 8, 1), (3,))

      Which classes are taken for which, by name; `jm.evaluate_classes` counts over any number of episodes:

      >>> tasks = jm.tasks.glyphs("test", ways=3, shots=1, queries=2)
      >>> learner = jm.prototypical(jm.nn.MLP(out=4))
      >>> params = learner.init(jax.random.key(0), tasks.sample(jax.random.key(1)))
      >>> found = jm.run_episodes(learner, params, tasks, episodes=3, key=jax.random.key(2))
      >>> right = np.take_along_axis(found.classes, np.asarray(found.tasks.query.y), 1)
      >>> named = np.take_along_axis(found.classes, np.asarray(found.outputs.argmax(-1)), 1)
      >>> right.shape, np.allclose((named == right).mean(1), found.scores)
      ((3, 6), True)
    """
    check_count("episodes", episodes)
    learner = _with_metric(learner, metric)
    _check_arguments(params, tasks, key)
    if isinstance(tasks, TaskStream):
        check_stream(tasks, key, for_evaluation=True, name="tasks")
        parts = [
            _run(learner, given.query.y.shape[0], params, key, given, start)
            for start, given in _numbered(tasks, episodes)
        ]
    else:
        parts = [_run(learner, episodes, params, key, sharding.as_argument(tasks.sample), 0)]
    drawn, adapted, outputs, values = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:episodes], *parts)
    values = _on_host(values)
    _check_slots_exist(values, episodes)
    scored = np.where(values.queries > 0, values.value, np.nan)
    return Episodes(drawn, adapted, outputs, scored, _names(tasks, key, episodes))


class ClassEvaluation(NamedTuple):
    """Which classes test episodes ask for, and which ones a learner takes them for.

    Attributes:
      classes: names of all classes that episodes were made of, C of them.
      queries: how often each was asked for.
      confusion: how many queries of class i (row) were named j (column). Queries whose outputs have a NaN, or
        that were given a slot of no class, are in no column.
      scores: accuracy of each episode that has a query, as of `jm.evaluate_episodes`.
    """

    classes: tuple[str, ...]
    queries: Int[np.ndarray, " classes"]
    confusion: Int[np.ndarray, "classes classes"]
    scores: Float[np.ndarray, " scored"]

    @property
    def accuracy(self) -> Float[np.ndarray, " classes"]:
        """Return the part of each class's queries that was named rightly; NaN where there was none."""
        with np.errstate(invalid="ignore"):
            return np.diag(self.confusion) / self.queries

    def mistakes(self, most: int | None = None) -> list[tuple[str, str, int]]:
        """Return `(class, taken for, queries)`, the most frequent first, and `most` of them at the most."""
        wrong = self.confusion * (1 - np.eye(len(self.classes), dtype=np.int64))
        rows, columns = np.nonzero(wrong)
        order = np.argsort(-wrong[rows, columns], kind="stable")[:most]
        return [
            (self.classes[rows[i]], self.classes[columns[i]], int(wrong[rows[i], columns[i]])) for i in order
        ]


def evaluate_classes(
    learner: Learner,
    params: Params,
    tasks: TaskDistribution | TaskStream,
    *,
    episodes: int = 600,
    key: Key,
    batch: int | None = None,
    devices: Devices = None,
) -> ClassEvaluation:
    """Count for each class how many queries of fixed episodes are named rightly, and what it is taken for.

    The episodes are those of `jm.evaluate` with the same key. A class has a name where the source knows it,
    whatever slot it has in an episode: `glyphs`, `from_arrays` and what builds on it, and streams.

    Args:
      learner: gives `adapt` and `predict`; the largest output is the class, whatever its metric.
      params: meta-parameters.
      tasks: classification tasks whose classes have names.
      episodes: their number, at least 1.
      key: of the whole evaluation.
      batch, devices: as of `jm.evaluate`.

    Raises:
      ValueError: as `jm.evaluate_episodes`; or the classes of the tasks have no names.

    Examples:
      >>> import jaxmeta as jm
      >>> x = np.array([[0.0], [0.1], [9.0], [9.1], [9.2], [5.2]], np.float32)
      >>> tasks = jm.tasks.from_arrays(x, ["ant", "ant", "bee", "bee", "cow", "cow"], ways=3, shots=1)
      >>> learner = jm.simple_shot((lambda key, x: {}, lambda params, x: x), transform="un")
      >>> found = jm.evaluate_classes(learner, {"model": {}}, tasks, episodes=50, key=jax.random.key(0))
      >>> found.classes, found.queries.tolist()
      (('ant', 'bee', 'cow'), [50, 50, 50])
      >>> float(found.accuracy[0]), found.mistakes(1)[0][:2]
      (1.0, ('cow', 'bee'))
    """
    check_tasks(tasks)
    learner = normalized(learner)._replace(metric=None)
    if not jnp.issubdtype(jax.eval_shape(sample_of(tasks), jax.random.key(0)).query.y.dtype, jnp.integer):
        raise ArgumentError("tasks", "got tasks of regression, which have no classes")
    check_key("key", key)
    check_count("episodes", episodes)
    names = _names(tasks, key, episodes)
    if names is None:
        raise unnamed(tasks)
    scores, right, named = _over_episodes(
        _scores_and_slots, learner, params, tasks, episodes, key, batch, devices
    )
    values = _scored(scores, episodes)
    right, named = right[:episodes], named[:episodes]
    classes = in_order(set(np.unique(names).tolist()) - {""})
    # The last number is that of no class, which slots have that are padding, and none at all.
    number = {name: place for place, name in enumerate(classes)} | {"": len(classes)}
    numbers = np.vectorize(number.__getitem__, otypes=[np.int64])(names)
    numbers = np.concatenate([numbers, np.full((len(names), 1), len(classes))], axis=1)
    counts = np.zeros((len(classes) + 1,) * 2, np.int64)
    rows, columns = (np.take_along_axis(numbers, each, axis=1) for each in (right, named))
    np.add.at(counts, (rows, columns), 1)
    return ClassEvaluation(tuple(classes), counts[:-1].sum(1), counts[:-1, :-1], values)


def _names(
    tasks: TaskDistribution | TaskStream, key: Key, episodes: int
) -> Shaped[np.ndarray, "episodes ways"] | None:
    """Return the names of the classes of each episode, slot after slot; None where they have no names."""
    if isinstance(tasks, TaskDistribution):
        return slot_names(tasks, episode_keys(key, jnp.arange(episodes))[:, 0])
    if tasks.names is None:
        return None
    found: list[np.ndarray] = []
    while sum(map(len, found)) < episodes:
        found.append(tasks.names(len(found)))
    return np.concatenate(found)[:episodes]


def _check_arguments(params: Params, tasks: TaskDistribution | TaskStream, key: Key) -> None:
    # The tasks first: two arguments in the wrong order are then named by what stands where tasks are due.
    check_tasks(tasks)
    check_params_kind(params)
    check_key("key", key)


def _with_metric(learner: Learner, metric: Metric | None) -> Learner:
    """Return `learner` in the form that evaluation takes, with `metric`, if any, in place of its own."""
    learner = normalized(learner)
    if metric is None:
        return learner
    check_function("metric", metric, "a function (outputs, y, mask) -> scalar or (sum, count)")
    return learner._replace(metric=metric)


class _Scores(NamedTuple):
    """What came of each episode.

    Attributes:
      value: mean score.
      queries: number of queries.
      wrong: number of examples, of either set, whose class slot does not exist.
    """

    value: Float[Array | np.ndarray, " episodes"]
    queries: Float[Array | np.ndarray, " episodes"]
    wrong: Int[Array | np.ndarray, " episodes"]


# Of an episode: its task, what is learned from it, the outputs, and what came of it.
_Outcome = tuple[Task, PyTree, Array, _Scores]


def _scores_alone(outcome: _Outcome) -> _Scores:
    return outcome[-1]


def _scores_and_slots(outcome: _Outcome) -> tuple[_Scores, Array, Array]:
    """Return the scores, and of each query its slot and the one it is given: −1 for none, and of padding."""
    (_, query), _, outputs, found = outcome
    asked = jnp.ones(query.y.shape, bool) if query.mask is None else query.mask
    given = asked & ~jnp.isnan(outputs).any(-1)
    return found, jnp.where(asked, query.y, -1), jnp.where(given, outputs.argmax(-1), -1)


def _on_host(tree: PyTree) -> PyTree:
    return jax.tree.map(np.asarray, tree)


def _joined(parts: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _scored(found: _Scores, episodes: int) -> Float[np.ndarray, " scored"]:
    """The values of the first `episodes` episodes, without those that have no query to score."""
    found = _Scores(*(leaf[:episodes] for leaf in found))
    _check_slots_exist(found, episodes)
    scored = found.queries > 0
    if not scored.any():
        raise ArgumentError(
            "tasks", f"got {episodes} episodes without a query: all are masked, or there are none"
        )
    return np.asarray(found.value)[scored]


def _check_slots_exist(found: _Scores, episodes: int) -> None:
    wrong = np.asarray(found.wrong)
    if wrong.any():
        raise ArgumentError(
            "tasks",
            f"got {wrong.sum()} examples in {np.count_nonzero(wrong)} of {episodes} episodes with a class "
            "slot that is none of the outputs; slots are counted from 0",
        )


def _numbered(stream: TaskStream, episodes: int) -> Iterator[tuple[int, Task]]:
    """Batches of the stream with the number of their first episode, until there are enough."""
    start = 0
    with stream_batches(stream, 0) as batches:
        while start < episodes:
            tasks = next(batches, None)
            if tasks is None:
                raise ArgumentError("tasks", f"the stream ended after {start} of {episodes} episodes")
            yield start, tasks
            start += tasks.query.y.shape[0]


def metric_name(
    tasks: TaskDistribution | TaskStream, learner: Learner | None = None, params: Params | None = None
) -> str:
    """Return the name of what `evaluate` measures on `tasks`: "accuracy", "mse" or that of a metric.

    Args:
      tasks: whose targets are integers or floats.
      learner: with a metric of its own, perhaps.
      params: its parameters, or their shapes, which are read where its metric is one for outputs that may not
        have the targets' shape.
    """
    metric = None if learner is None else learner.metric
    if isinstance(metric, ScoreOrLoss):
        assert learner is not None
        return next(iter(jax.eval_shape(partial(_scores_of, learner), params, sample_of(tasks))))
    if metric is not None:
        return metric_label(metric)
    targets = jax.eval_shape(sample_of(tasks), jax.random.key(0)).query.y
    return "accuracy" if jnp.issubdtype(targets.dtype, jnp.integer) else "mse"


def evaluate_metrics(
    learner: Learner,
    params: Params,
    tasks: TaskDistribution,
    *,
    episodes: int = 600,
    key: Key,
) -> dict[str, float]:
    """The metrics of `learner.loss` on test episodes, those of `evaluate` with the same key.

    Args:
      learner: its metrics are sums and counts; a metric is Σ sum / Σ count over all episodes, and NaN where
        nothing counted.
      params: meta-parameters.
      tasks: the test tasks.
      episodes: their number, at least 1.
      key: episode i is drawn with `fold_in(key, i)`.
    """
    check_count("episodes", episodes)
    learner = normalized(learner)
    _check_arguments(params, tasks, key)
    sums = _sums(_metrics_of(learner), episodes, params, sharding.as_argument(tasks.sample), key, 0)
    return {
        name: float(total) / float(count) if count else math.nan
        for name, (total, count) in jax.device_get(sums).items()
    }


# One function for a learner, so that what was compiled for it is found again.
@lru_cache
def _metrics_of(learner: Learner) -> Callable[..., Any]:
    return lambda params, task, key: learner.loss(params, task, key)[1]


def calibrate(
    learner: Learner, params: Params, tasks: TaskDistribution | TaskStream, key: Key, *, episodes: int = 200
) -> Params:
    """Fills the population batch statistics: their mean over training tasks, weights fixed.

    Args:
      learner: its `statistics(params, task, key) -> (sum, count)` gives a pytree summed over
        the examples of one task, and their number.
      params: meta-parameters, a dict.
      tasks: the tasks the statistics are of, usually the training tasks.
      key: episode i is drawn with `fold_in(key, i)`; a stream gives its first tasks, whole batches.
      episodes: number of tasks.

    Returns:
      `params` with `params["population"]` = Σ sum / Σ count, all other entries as they were.

    Raises:
      ValueError: the learner has no statistics to fill, or `episodes` is below 1.
    """
    learner = normalized(learner)
    _check_arguments(params, tasks, key)
    if learner.statistics is None:
        raise ArgumentError(
            "learner", "got one without batch statistics (learner.statistics is None); nothing to fill"
        )
    check_count("episodes", episodes)
    if isinstance(tasks, TaskStream):
        check_stream(tasks, key, for_evaluation=True, name="tasks")
        sums = [
            jax.block_until_ready(
                _sums(learner.statistics, given.query.y.shape[0], params, given, key, start)
            )
            for start, given in _numbered(tasks, episodes)
        ]
    else:
        sums = [_sums(learner.statistics, episodes, params, sharding.as_argument(tasks.sample), key, 0)]
    total, count = jax.tree.map(lambda *parts: sum(parts), *sums)
    return {**params, "population": jax.tree.map(lambda leaf: leaf / count, total)}


# Learner and mesh are static and the data are arguments: validation calls these every
# thousand steps and must find what it compiled the first time.
@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _episodes(
    kept: Callable[[_Outcome], PyTree],
    learner: Learner,
    own: int,
    vmapped: bool,
    mesh: Mesh,
    arguments: tuple[Params, Key],
    source: Source,
    start: Array | int,
) -> PyTree:
    """What is kept of `own` episodes from `start` on, on each device."""

    def each(arguments: tuple[Params, Key], source: Source, start: Array) -> PyTree:
        params, key = arguments
        indices = start + sharding.first_task(mesh, own) + jnp.arange(own)

        def one(numbered: tuple[Array, Task | None]) -> PyTree:
            return kept(_adapted_and_scored(learner, params, key, source, *numbered))

        numbered = indices, source if isinstance(source, Task) else None
        return jax.vmap(one)(numbered) if vmapped else jax.lax.map(one, numbered)

    values = sharding.over_tasks(each, mesh, out=PartitionSpec(sharding.TASKS))(arguments, source, start)
    # On all devices, for each process to read.
    return sharding.replicated(values, mesh)


@partial(jax.jit, static_argnums=(0, 1))
def _run(
    learner: Learner, episodes: int, params: Params, key: Key, source: Source, start: Array | int
) -> _Outcome:
    """All of `episodes` episodes from `start` on."""

    def one(numbered: tuple[Array, Task | None]) -> _Outcome:
        return _adapted_and_scored(learner, params, key, source, *numbered)

    numbered = start + jnp.arange(episodes), source if isinstance(source, Task) else None
    on_cpu = jax.default_backend() == "cpu"
    return jax.lax.map(one, numbered, batch_size=None if on_cpu else _VMAPPED)


def _adapted_and_scored(
    learner: Learner, params: Params, key: Key, source: Source, index: Array, given: Task | None
) -> _Outcome:
    """Episode `index`: its task, what is learned from it, the outputs, and what came of it."""
    task, adapt_key = _episode(source, key, index, given)
    adapted = learner.adapt(params, task.support, adapt_key)
    outputs = learner.predict(params, adapted, task.query.x, task.query.mask)
    ((total, count),) = scores(outputs, task.query, learner.metric).values()
    wrong = sum(_wrong_slots(part, _classes(part, outputs, learner.metric)) for part in task)
    return task, adapted, outputs, _Scores(total / jnp.maximum(count, 1), count, jnp.asarray(wrong))


def _scores_of(learner: Learner, params: Params, sample: Callable[[Key], Task]) -> PyTree:
    """Return what `evaluate` measures of one task."""
    task = sample(jax.random.key(0))
    adapted = learner.adapt(params, task.support, jax.random.key(0))
    outputs = normalized(learner).predict(params, adapted, task.query.x, task.query.mask)
    return scores(outputs, task.query, learner.metric)


def _classes(batch: Batch, outputs: Array, metric: Metric | None) -> int | None:
    """Return the number of class slots; None where only a metric of one's own knows."""
    own = metric is not None and not isinstance(metric, ScoreOrLoss)
    return batch.ways if own else outputs.shape[-1]


def _wrong_slots(batch: Batch, classes: int | None) -> Int[Array, ""]:
    """How many examples have a class slot that does not exist; none of regression."""
    if classes is None or not jnp.issubdtype(batch.y.dtype, jnp.integer):
        return jnp.zeros((), jnp.int32)
    wrong = (batch.y < 0) | (batch.y >= classes)
    return (wrong if batch.mask is None else wrong & batch.mask).sum()


@partial(jax.jit, static_argnums=(0, 1))
def _sums(
    statistics: Callable[..., Any],
    episodes: int,
    params: Params,
    source: Source,
    key: Key,
    start: Array | int,
) -> PyTree:
    """The statistics of `episodes` tasks, added up."""

    def one(numbered: tuple[Array, Task | None]) -> PyTree:
        task, learner_key = _episode(source, key, *numbered)
        return jax.tree.map(full_precision, statistics(params, task, learner_key))

    numbered = start + jnp.arange(episodes), source if isinstance(source, Task) else None
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(one, jax.tree.map(lambda leaf: leaf[0], numbered)),
    )

    def accumulate(total: PyTree, numbered: tuple[Array, Task | None]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, one(numbered)), None

    return jax.lax.scan(accumulate, zeros, numbered)[0]


def _episode(source: Source, key: Key, index: Array, given: Task | None) -> tuple[Task, Key]:
    """Episode `index`, drawn or as given, and the learner's key for it."""
    ((task_key, learner_key),) = episode_keys(key, index[None])
    if not isinstance(source, Task):
        return source(task_key), learner_key
    assert given is not None
    return given, learner_key
