"""Evaluation of a learner over fixed episodes: means with 95 % confidence intervals."""

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
from jaxmeta.tasks.class_names import slot_names, unnamed_error
from jaxmeta.tasks.splits import in_order
from jaxmeta.training import sharding
from jaxmeta.training.sharding import Devices, sample_of
from jaxmeta.training.step import check_params_kind, check_stream, stream_batches

# Number of episodes computed at once on an accelerator: enough to fill it, few enough for its memory.
_VMAPPED = 100


class Evaluation(NamedTuple):
    """Mean over episodes of the accuracy, in [0, 1], the mean squared error, or another metric.

    Attributes:
      mean: mean over episodes.
      ci95: half-width of the 95 % confidence interval of the mean, 1.96·s/√E, with the sample standard
        deviation s (ddof 1).
      episodes: number E of episodes that have a query.
    """

    mean: float
    ci95: float
    episodes: int

    @classmethod
    def of(cls, values: Float[np.ndarray, " episodes"]) -> "Evaluation":
        """Return the evaluation of one value per episode.

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
    """Adapt to the support sets of fixed episodes and score their queries.

    The score is the accuracy for integer targets, the mean squared error for float targets, or `metric`.
    Masked queries do not count, nor do episodes whose queries are all masked. The learner's `norm` decides
    whether the result is transductive.

    Args:
      learner: learner to evaluate.
      params: meta-parameters.
      tasks: test tasks. Episode i is drawn with `fold_in(key, i)`, whatever `batch` and `devices` are; a
        stream gives its first episodes, in order.
      episodes: number of episodes E, at least 2.
      key: key of the evaluation.
      batch: largest number of episodes in one call of the compiled function; None for all of them on CPUs and
        100 on accelerators. A stream has its own batches.
      devices: devices that share the episodes; None for all. Or a mesh of `jm.make_mesh`, whose axis "tasks"
        shares them.
      metric: `(outputs, y, mask) -> scalar or (sum, count)` of the queries of an episode; None for the
        learner's own metric. Define it once: a new function for each call is compiled each time.

    Returns:
      An `Evaluation`: mean, half-width of its 95 % confidence interval, and number of episodes.

    Raises:
      ValueError: fewer than two episodes, or fewer than two with a query; `batch` below 1; outputs of a wrong
        shape; or a class slot without an output.

    Examples:
      >>> import jaxmeta as jm
      >>> tasks = jm.tasks.sinusoid("test", shots=5, queries=8)
      >>> learner = jm.maml(jm.nn.MLP(out=1, hidden=(8,)), loss=jm.losses.mse)
      >>> params = learner.init(jax.random.key(0), tasks.sample(jax.random.key(1)))
      >>> jm.evaluate(learner, params, tasks, episodes=5, key=jax.random.key(2)).episodes
      5
    """
    # A confidence interval needs two values.
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
    """Return the score of each episode, whose mean `evaluate` returns.

    With the same key two learners see the same episodes, so that their scores can be paired. Episodes whose
    queries are all masked are left out. For the arguments see `evaluate`.

    Returns:
      An array with one score for each episode that has a query.

    Raises:
      ValueError: as `evaluate`; or no episode has a query.

    Examples:
      >>> import jaxmeta as jm
      >>> tasks = jm.tasks.sinusoid("test", shots=5, queries=8)
      >>> learner = jm.maml(jm.nn.MLP(out=1, hidden=(8,)), loss=jm.losses.mse)
      >>> params = learner.init(jax.random.key(0), tasks.sample(jax.random.key(1)))
      >>> jm.evaluate_episodes(learner, params, tasks, episodes=5, key=jax.random.key(2)).shape
      (5,)
    """
    learner = _with_metric(learner, metric)
    results = _over_episodes(_scores_alone, learner, params, tasks, episodes, key, batch, devices)
    return _scored(results, episodes)


def _over_episodes(
    select: Callable[["_Outcome"], PyTree],
    learner: Learner,
    params: Params,
    tasks: TaskDistribution | TaskStream,
    episodes: int,
    key: Key,
    batch: int | None,
    devices: Devices,
) -> Any:
    """Return `select(outcome)` of at least the first `episodes` episodes, as NumPy arrays."""
    check_count("episodes", episodes)
    if batch is not None:
        check_count("batch", batch)
    _check_arguments(params, tasks, key)
    mesh = sharding.evaluation_mesh(devices)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    arguments = sharding.place(params, mesh), sharding.replicate(key, mesh)
    if isinstance(tasks, TaskStream):
        check_stream(tasks, key, for_evaluation=True, name="tasks")
        queued: PyTree = None
        results: list[PyTree] = []
        for start, batch_of_tasks in _numbered(tasks, episodes):
            count = batch_of_tasks.query.y.shape[0]
            padded = sharding.pad_to_devices(batch_of_tasks, mesh)
            per_device = padded.query.y.shape[0] // mesh.shape[sharding.TASKS]
            shared = sharding.share(padded, mesh)
            value = _episodes(select, learner, per_device, not on_cpu, mesh, arguments, shared, start)
            value = jax.tree.map(lambda leaf, count=count: leaf[:count], value)
            # Read one batch behind, so that the device is never idle and holds at most two batches.
            results += [] if queued is None else [_on_host(queued)]
            queued = value
        return _concatenate([*results, _on_host(queued)])
    most = batch or (episodes if on_cpu else _VMAPPED)
    calls = -(-episodes // most)
    shards = mesh.shape[sharding.TASKS]
    per_device = -(-episodes // (calls * shards))
    sample = sharding.replicate(sharding.as_argument(tasks.sample), mesh)
    values = [
        _episodes(
            select, learner, per_device, not on_cpu, mesh, arguments, sample, call * per_device * shards
        )
        for call in range(calls)
    ]
    return _concatenate(list(map(_on_host, values)))


class Episodes(NamedTuple):
    """Test episodes with a learner's results; every leaf has a leading axis of episodes.

    Attributes:
      tasks: support and query sets.
      adapted: adapted state of each support set, from `learner.adapt`.
      outputs: outputs for each query set, from `learner.predict`.
      scores: score of each episode, whose mean is that of `evaluate`; NaN for an episode without a query.
      classes: class name of each slot, "" for padding; None if the classes of the tasks have no names.
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
    """Run the first episodes of an evaluation and return tasks, adapted states, outputs and scores.

    With the same key the episodes are those of `evaluate`. Everything is held in the memory of one device.

    Args:
      learner: learner to evaluate.
      params: meta-parameters.
      tasks: test tasks. Episode i is drawn with `fold_in(key, i)`; a stream gives its first episodes.
      episodes: number of episodes, at least 1.
      key: key of the evaluation.
      metric: see `evaluate`.

    Returns:
      An `Episodes`.

    Raises:
      ValueError: as `evaluate`.

    Examples:
      >>> import jaxmeta as jm
      >>> tasks = jm.tasks.sinusoid("test", shots=5, queries=8)
      >>> learner = jm.maml(jm.nn.MLP(out=1), loss=jm.losses.mse)
      >>> params = learner.init(jax.random.key(0), tasks.sample(jax.random.key(1)))
      >>> result = jm.run_episodes(learner, params, tasks, episodes=3, key=jax.random.key(2))
      >>> result.tasks.support.x.shape, result.outputs.shape, result.scores.shape
      ((3, 5, 1), (3, 8, 1), (3,))

      Names of true and predicted classes; `jm.evaluate_classes` counts them over any number of episodes:

      >>> x, y = np.eye(4, dtype=np.float32).repeat(3, 0), np.repeat(["ant", "bee", "cow", "doe"], 3)
      >>> tasks = jm.tasks.from_arrays(x, y, ways=3, shots=1, queries=2)
      >>> learner = jm.prototypical(jm.nn.MLP(out=4))
      >>> params = learner.init(jax.random.key(0), tasks.sample(jax.random.key(1)))
      >>> result = jm.run_episodes(learner, params, tasks, episodes=3, key=jax.random.key(2))
      >>> true = np.take_along_axis(result.classes, np.asarray(result.tasks.query.y), 1)
      >>> predicted = np.take_along_axis(result.classes, np.asarray(result.outputs.argmax(-1)), 1)
      >>> true.shape, np.allclose((predicted == true).mean(1), result.scores)
      ((3, 6), True)
    """
    check_count("episodes", episodes)
    learner = _with_metric(learner, metric)
    _check_arguments(params, tasks, key)
    if isinstance(tasks, TaskStream):
        check_stream(tasks, key, for_evaluation=True, name="tasks")
        parts = [
            _run(learner, batch.query.y.shape[0], params, key, batch, start)
            for start, batch in _numbered(tasks, episodes)
        ]
    else:
        parts = [_run(learner, episodes, params, key, sharding.as_argument(tasks.sample), 0)]
    drawn, adapted, outputs, values = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:episodes], *parts)
    values = _on_host(values)
    _check_slots_exist(values, episodes)
    scored = np.where(values.queries > 0, values.value, np.nan)
    return Episodes(drawn, adapted, outputs, scored, _names(tasks, key, episodes))


class ClassEvaluation(NamedTuple):
    """True and predicted classes of the queries of test episodes.

    Attributes:
      classes: names of the C classes of the episodes.
      queries: number of queries of each class.
      confusion: number of queries of class i (row) that were predicted as class j (column). Queries whose
        outputs have a NaN, or whose predicted slot has no class, are in no column.
      scores: accuracy of each episode that has a query, as `jm.evaluate_episodes` returns it.
    """

    classes: tuple[str, ...]
    queries: Int[np.ndarray, " classes"]
    confusion: Int[np.ndarray, "classes classes"]
    scores: Float[np.ndarray, " scored"]

    @property
    def accuracy(self) -> Float[np.ndarray, " classes"]:
        """Return the accuracy for the queries of each class; NaN for a class without queries."""
        with np.errstate(invalid="ignore"):
            return np.diag(self.confusion) / self.queries

    def mistakes(self, most: int | None = None) -> list[tuple[str, str, int]]:
        """Return the `most` most frequent errors, or all, as `(true class, predicted class, queries)`."""
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
    """Count true and predicted classes of the queries of fixed episodes.

    The episodes are those of `jm.evaluate` with the same key. The source of the tasks must know the class of
    each slot by name: `glyphs`, `from_arrays` and the sources built on it, and streams do.

    Args:
      learner: learner to evaluate; its largest output is the predicted class.
      params: meta-parameters.
      tasks: classification tasks whose classes have names.
      episodes: number of episodes, at least 1.
      key: key of the evaluation.
      batch: largest number of episodes in one call; see `jm.evaluate`.
      devices: devices that share the episodes; see `jm.evaluate`.

    Returns:
      A `ClassEvaluation`.

    Raises:
      ValueError: as `jm.evaluate_episodes`; or the classes of the tasks have no names.

    Examples:
      >>> import jaxmeta as jm
      >>> x = np.array([[0.0], [0.1], [9.0], [9.1], [9.2], [5.2]], np.float32)
      >>> tasks = jm.tasks.from_arrays(x, ["ant", "ant", "bee", "bee", "cow", "cow"], ways=3, shots=1)
      >>> learner = jm.simple_shot((lambda key, x: {}, lambda params, x: x), transform="un")
      >>> result = jm.evaluate_classes(learner, {"model": {}}, tasks, episodes=50, key=jax.random.key(0))
      >>> result.classes, result.queries.tolist()
      (('ant', 'bee', 'cow'), [50, 50, 50])
      >>> float(result.accuracy[0]), result.mistakes(1)[0][:2]
      (1.0, ('cow', 'bee'))
    """
    check_tasks(tasks)
    learner = normalized(learner)._replace(metric=None)
    if not jnp.issubdtype(jax.eval_shape(sample_of(tasks), jax.random.key(0)).query.y.dtype, jnp.integer):
        raise ArgumentError("tasks", "got regression tasks, which have no classes; use jm.evaluate")
    check_key("key", key)
    check_count("episodes", episodes)
    names = _names(tasks, key, episodes)
    if names is None:
        raise unnamed_error(tasks)
    results, true, predicted = _over_episodes(
        _scores_and_slots, learner, params, tasks, episodes, key, batch, devices
    )
    values = _scored(results, episodes)
    # An output beyond the slots of the episode, of a wider head, has no class.
    true, predicted = true[:episodes], np.where(predicted < names.shape[1], predicted, -1)[:episodes]
    classes = in_order(set(np.unique(names).tolist()) - {""})
    # The last index means no class: for slots that are padding, and for slot −1, which indexes the last
    # column that is added here.
    index_of = {name: index for index, name in enumerate(classes)} | {"": len(classes)}
    indices = np.vectorize(index_of.__getitem__, otypes=[np.int64])(names)
    indices = np.concatenate([indices, np.full((len(names), 1), len(classes))], axis=1)
    counts = np.zeros((len(classes) + 1,) * 2, np.int64)
    rows, columns = (np.take_along_axis(indices, slots, axis=1) for slots in (true, predicted))
    np.add.at(counts, (rows, columns), 1)
    return ClassEvaluation(tuple(classes), counts[:-1].sum(1), counts[:-1, :-1], values)


def _names(
    tasks: TaskDistribution | TaskStream, key: Key, episodes: int
) -> Shaped[np.ndarray, "episodes ways"] | None:
    """Return the class name of each slot of each episode; None if the classes have no names."""
    if isinstance(tasks, TaskDistribution):
        return slot_names(tasks, episode_keys(key, jnp.arange(episodes))[:, 0])
    if tasks.names is None:
        return None
    batches: list[np.ndarray] = []
    while sum(map(len, batches)) < episodes:
        batches.append(tasks.names(len(batches)))
    return np.concatenate(batches)[:episodes]


def _check_arguments(params: Params, tasks: TaskDistribution | TaskStream, key: Key) -> None:
    # Check the tasks first, so that swapped arguments are reported as such.
    check_tasks(tasks)
    check_params_kind(params)
    check_key("key", key)


def _with_metric(learner: Learner, metric: Metric | None) -> Learner:
    """Return `learner` in full form (see `normalized`), with `metric` in place of its own if it is given."""
    learner = normalized(learner)
    if metric is None:
        return learner
    check_function("metric", metric, "a function (outputs, y, mask) -> scalar or (sum, count)")
    return learner._replace(metric=metric)


class _Scores(NamedTuple):
    """Scores of episodes.

    Attributes:
      value: mean score of the queries.
      queries: number of queries that count.
      wrong: number of support and query examples whose class slot does not exist.
    """

    value: Float[Array | np.ndarray, " episodes"]
    queries: Float[Array | np.ndarray, " episodes"]
    wrong: Int[Array | np.ndarray, " episodes"]


# Task, adapted state, outputs and scores of an episode.
_Outcome = tuple[Task, PyTree, Array, _Scores]


def _scores_alone(outcome: _Outcome) -> _Scores:
    return outcome[-1]


def _scores_and_slots(outcome: _Outcome) -> tuple[_Scores, Array, Array]:
    """Return the scores, and the true and the predicted slot of each query; −1 for padding and NaN."""
    (_, query), _, outputs, results = outcome
    real = jnp.ones(query.y.shape, bool) if query.mask is None else query.mask
    valid = real & ~jnp.isnan(outputs).any(-1)
    return results, jnp.where(real, query.y, -1), jnp.where(valid, outputs.argmax(-1), -1)


def _on_host(tree: PyTree) -> PyTree:
    return jax.tree.map(np.asarray, tree)


def _concatenate(parts: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _scored(results: _Scores, episodes: int) -> Float[np.ndarray, " scored"]:
    """Return the scores of the first `episodes` episodes, without those that have no query."""
    results = _Scores(*(leaf[:episodes] for leaf in results))
    _check_slots_exist(results, episodes)
    scored = results.queries > 0
    if not scored.any():
        raise ArgumentError(
            "tasks", "got episodes without a query: all queries are masked, or there are none"
        )
    return np.asarray(results.value)[scored]


def _check_slots_exist(results: _Scores, episodes: int) -> None:
    wrong = np.asarray(results.wrong)
    if wrong.any():
        raise ArgumentError(
            "tasks",
            f"got a class slot without an output in {np.count_nonzero(wrong)} of {episodes} episodes (number "
            f"of examples: {wrong.sum()}); slots are counted from 0",
        )


def _numbered(stream: TaskStream, episodes: int) -> Iterator[tuple[int, Task]]:
    """Yield batches of the stream with the number of their first episode, until there are enough."""
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
    """Return the name of the metric that `evaluate` measures on `tasks`: "accuracy", "mse" or a custom one.

    Args:
      tasks: tasks with integer or float targets.
      learner: learner that may have its own metric.
      params: parameters of the learner or their shapes; they are needed for a learner with a custom loss,
        whose metric depends on the shape of its outputs.
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
    tasks: TaskDistribution | TaskStream,
    *,
    episodes: int = 600,
    key: Key,
) -> dict[str, float]:
    """Return the metrics of `learner.loss` on the test episodes of `evaluate`.

    A metric is Σ sum / Σ count over all episodes, or NaN if its count is 0.

    Args:
      learner: learner to evaluate.
      params: meta-parameters.
      tasks: test tasks. Episode i is drawn with `fold_in(key, i)`; a stream gives its first episodes, in
        order.
      episodes: number of episodes, at least 1.
      key: key of the evaluation.

    Returns:
      A dictionary from names to values.

    Raises:
      ValueError: `episodes` is below 1, another argument is of a wrong kind, or a stream is too short or has
        another key.

    Examples:
      >>> import jaxmeta as jm
      >>> tasks = jm.tasks.sinusoid("test", shots=5, queries=8)
      >>> learner = jm.maml(jm.nn.MLP(out=1, hidden=(8,)), loss=jm.losses.mse)
      >>> params = learner.init(jax.random.key(0), tasks.sample(jax.random.key(1)))
      >>> list(jm.evaluate_metrics(learner, params, tasks, episodes=5, key=jax.random.key(2)))
      ['loss', 'mse']
    """
    check_count("episodes", episodes)
    learner = normalized(learner)
    _check_arguments(params, tasks, key)
    sums = _sums_of_episodes(_metrics_of(learner), params, tasks, episodes, key)
    return {
        name: float(total) / float(count) if count else math.nan
        for name, (total, count) in jax.device_get(sums).items()
    }


# The same function for the same learner, so that JAX finds the compiled program again.
@lru_cache
def _metrics_of(learner: Learner) -> Callable[..., Any]:
    return lambda params, task, key: learner.loss(params, task, key)[1]


def calibrate(
    learner: Learner, params: Params, tasks: TaskDistribution | TaskStream, key: Key, *, episodes: int = 200
) -> Params:
    """Compute population batch statistics: the mean over the examples of many tasks, with fixed weights.

    Args:
      learner: learner whose `statistics(params, task, key)` returns `(sum, count)`: a pytree of sums over the
        examples of one task, and their number.
      params: meta-parameters, a dictionary.
      tasks: tasks of which the statistics are taken, usually the training tasks.
      key: key of the tasks. Task i is drawn with `fold_in(key, i)`; a stream gives its first batches.
      episodes: number of tasks.

    Returns:
      `params` with `params["population"]` = Σ sum / Σ count. Other entries are unchanged.

    Raises:
      ValueError: the learner has no batch statistics, or `episodes` is below 1.

    Examples:
      >>> import jaxmeta as jm
      >>> x, y = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32), np.repeat([*"abcd"], 3)
      >>> tasks = jm.tasks.from_arrays(x, y, ways=3, shots=1, queries=2)
      >>> learner = jm.prototypical(jm.nn.MLP(out=4, hidden=(8,), norm=True), norm="population")
      >>> params = learner.init(jax.random.key(0), tasks.sample(jax.random.key(1)))
      >>> params = jm.calibrate(learner, params, tasks, jax.random.key(2), episodes=10)
      >>> sorted(params)
      ['model', 'population']
    """
    learner = normalized(learner)
    _check_arguments(params, tasks, key)
    if learner.statistics is None:
        raise ArgumentError(
            "learner",
            "got one without batch statistics (learner.statistics is None); there is nothing to compute",
        )
    check_count("episodes", episodes)
    total, count = _sums_of_episodes(learner.statistics, params, tasks, episodes, key, whole_batches=True)
    return {**params, "population": jax.tree.map(lambda leaf: leaf / count, total)}


def _sums_of_episodes(
    statistics: Callable[..., Any],
    params: Params,
    tasks: TaskDistribution | TaskStream,
    episodes: int,
    key: Key,
    *,
    whole_batches: bool = False,
) -> PyTree:
    """Return the sum of the statistics of the first `episodes` episodes.

    Args:
      statistics: `(params, task, key) -> statistics` of one task.
      params: meta-parameters.
      tasks: source of the episodes.
      episodes: number of episodes.
      key: key of the episodes.
      whole_batches: whether all episodes of a stream's last batch count, so that one compiled program
        serves all batches.
    """
    if isinstance(tasks, TaskDistribution):
        return _sums(statistics, episodes, params, sharding.as_argument(tasks.sample), key, 0)
    check_stream(tasks, key, for_evaluation=True, name="tasks")
    sums = []
    for start, batch in _numbered(tasks, episodes):
        size = batch.query.y.shape[0]
        count = size if whole_batches else min(size, episodes - start)
        counted = batch if count == size else jax.tree.map(lambda leaf: leaf[:count], batch)  # noqa: B023
        sums.append(jax.block_until_ready(_sums(statistics, count, params, counted, key, start)))
    return jax.tree.map(lambda *parts: sum(parts), *sums)


# Learner and mesh are static, and data are arguments: validation calls these functions again and again, and
# must not compile them each time.
@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _episodes(
    select: Callable[[_Outcome], PyTree],
    learner: Learner,
    per_device: int,
    vmapped: bool,
    mesh: Mesh,
    arguments: tuple[Params, Key],
    source: Source,
    start: Array | int,
) -> PyTree:
    """Return `select(outcome)` of `per_device` episodes on each device, the first of which is `start`."""

    def on_one_device(arguments: tuple[Params, Key], source: Source, start: Array) -> PyTree:
        params, key = arguments
        indices = start + sharding.first_task(mesh, per_device) + jnp.arange(per_device)

        def run_one(numbered: tuple[Array, Task | None]) -> PyTree:
            return select(_adapt_and_score(learner, params, key, source, *numbered))

        numbered = indices, source if isinstance(source, Task) else None
        return jax.vmap(run_one)(numbered) if vmapped else jax.lax.map(run_one, numbered)

    over_tasks = sharding.over_tasks(on_one_device, mesh, out=PartitionSpec(sharding.TASKS))
    values = over_tasks(arguments, source, start)
    # Replicate the values, since every process reads all of them.
    return sharding.replicated(values, mesh)


@partial(jax.jit, static_argnums=(0, 1))
def _run(
    learner: Learner, episodes: int, params: Params, key: Key, source: Source, start: Array | int
) -> _Outcome:
    """Return the outcomes of `episodes` episodes, the first of which is `start`."""

    def run_one(numbered: tuple[Array, Task | None]) -> _Outcome:
        return _adapt_and_score(learner, params, key, source, *numbered)

    numbered = start + jnp.arange(episodes), source if isinstance(source, Task) else None
    on_cpu = jax.default_backend() == "cpu"
    return jax.lax.map(run_one, numbered, batch_size=None if on_cpu else _VMAPPED)


def _adapt_and_score(
    learner: Learner, params: Params, key: Key, source: Source, index: Array, streamed: Task | None
) -> _Outcome:
    """Return task, adapted state, outputs and scores of episode `index`."""
    task, adapt_key = _episode(source, key, index, streamed)
    adapted = learner.adapt(params, task.support, adapt_key)
    outputs = learner.predict(params, adapted, task.query.x, task.query.mask)
    ((total, count),) = scores(outputs, task.query, learner.metric).values()
    wrong = sum(_wrong_slots(part, _classes(part, outputs, learner.metric)) for part in task)
    return task, adapted, outputs, _Scores(total / jnp.maximum(count, 1), count, jnp.asarray(wrong))


def _scores_of(learner: Learner, params: Params, sample: Callable[[Key], Task]) -> PyTree:
    """Return the metric that `evaluate` measures, for one task."""
    task = sample(jax.random.key(0))
    adapted = learner.adapt(params, task.support, jax.random.key(0))
    outputs = normalized(learner).predict(params, adapted, task.query.x, task.query.mask)
    return scores(outputs, task.query, learner.metric)


def _classes(batch: Batch, outputs: Array, metric: Metric | None) -> int | None:
    """Return the number of class slots; None if only a custom metric knows it."""
    custom = metric is not None and not isinstance(metric, ScoreOrLoss)
    return batch.ways if custom else outputs.shape[-1]


def _wrong_slots(batch: Batch, classes: int | None) -> Int[Array, ""]:
    """Return the number of examples whose class slot does not exist; 0 for regression."""
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
    """Return the sum of the statistics of `episodes` tasks."""

    def statistics_of(numbered: tuple[Array, Task | None]) -> PyTree:
        task, learner_key = _episode(source, key, *numbered)
        return jax.tree.map(full_precision, statistics(params, task, learner_key))

    numbered = start + jnp.arange(episodes), source if isinstance(source, Task) else None
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(statistics_of, jax.tree.map(lambda leaf: leaf[0], numbered)),
    )

    def accumulate(total: PyTree, numbered: tuple[Array, Task | None]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, statistics_of(numbered)), None

    return jax.lax.scan(accumulate, zeros, numbered)[0]


def _episode(source: Source, key: Key, index: Array, streamed: Task | None) -> tuple[Task, Key]:
    """Return episode `index`, drawn or from a stream, and the learner's key for it."""
    ((task_key, learner_key),) = episode_keys(key, index[None])
    if not isinstance(source, Task):
        return source(task_key), learner_key
    assert streamed is not None
    return streamed, learner_key
