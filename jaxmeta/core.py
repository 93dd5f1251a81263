"""The types that all modules share.

A few-shot learning algorithm is four pure functions, a `Learner`; a source of few-shot tasks is one pure
function, a `TaskDistribution`:

    tasks.sample(key)                     -> Task(support, query)
    learner.adapt(params, support, key)   -> adapted
    learner.predict(params, adapted, x)   -> outputs
    learner.loss(params, task, key, step) -> (scalar, metrics)

The plain gradient of `loss` is the meta-gradient, so that one training step serves all learners.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxmeta.checks import ArgumentError, check_key, check_kind, check_slots

PyTree = Any
Params = PyTree
Adapted = PyTree
Key = PRNGKeyArray
Metrics = dict[str, tuple[Array, Array]]
Augment = Callable[[Key, Array], Array]
# A loss of outputs: `(outputs, y, mask) -> scalar`.
Loss: TypeAlias = Callable[[Array, Array, Array | None], Array]
# A metric of outputs: `(outputs, y, mask) -> scalar or (sum, count)`.
Metric: TypeAlias = Callable[[Array, Array, Array | None], ArrayLike | tuple[ArrayLike, ArrayLike]]


@runtime_checkable
class Optimizer(Protocol):
    """The interface of an `optax.GradientTransformation`.

    Type checkers read no types from optax, and would accept a learning rate in place of an optimizer.
    """

    @property
    def init(self) -> Callable[[Any], Any]:
        """Return the function `params -> state`."""

    @property
    def update(self) -> Callable[..., Any]:
        """Return the function `(gradients, state, params) -> (updates, state)`."""


# Choices shared by several learners or task sources; `typing.get_args` returns their values.
SplitName = Literal["train", "validation", "test"]
Kind = Literal["classification", "regression"]
Rotations = Literal["none", "classes", "random"]
# Batch statistics that normalise an embedding, and a network after an inner loop.
Norm = Literal["batch", "support", "population"]
InnerLoopNorm = Literal["batch", "support", "population", "episode"]
# Order of the meta-gradient: of any inner loop, and of one that is differentiated step by step.
Order = Literal["second", "first", "implicit"]
UnrolledOrder = Literal["second", "first"]
# Source of the inner steps' values in the backward pass.
Memory = Literal["auto", "store", "recompute", "forward_over_reverse"]
# Attribute of a learner's functions that `with_slot_checks` made. Its value is the function itself, so that a
# wrapper, to which `functools.wraps` copies attributes, is not taken for such a function.
_CHECKS = "__jaxmeta_checks__"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples of one task; a batch of tasks adds one leading axis to every leaf.

    Attributes:
      x: inputs, `(n, *shape)`.
      y: class slots `(n,)` int32 in `[0, ways)`, or regression targets `(n, d)` float. Learners, losses and
        scores raise an error for other class slots where values are known, which is outside of `jax.jit`
        and `jax.vmap`; `jm.evaluate` and `jm.transfer.fine_tune` always do. Inside a compiled function,
        where a check would wait for the device at each call, invalid slots are not detected: methods that
        compare with one-hot labels treat them as padding, and a cross-entropy is NaN or, for negative
        ones, counts slots from the end. Check the labels that you pass to functions you compile yourself.
      mask: `(n,)` bool; None where every example is real. False marks padding, which changes no result, so
        that tasks of different ways and shots have the same shape.
      ways: number of class slots, static; None for regression. None is allowed for a batch built by hand,
        too, where the number is read from concrete values of `y` (see `ways_of`).

    Examples:
      >>> batch = Batch(jnp.zeros((4, 28, 28, 1)), jnp.array([0, 0, 1, 1]), ways=2)
      >>> batch.x.shape, batch.ways
      ((4, 28, 28, 1), 2)
    """

    x: Array
    y: Int[Array, "*n"] | Float[Array, "*n d"]
    _: dataclasses.KW_ONLY
    mask: Bool[Array, "*n"] | None = None
    ways: int | None = dataclasses.field(default=None, metadata={"static": True})


class Task(NamedTuple):
    """One few-shot task: a learner adapts to `support` and is evaluated on `query`.

    In zero-shot tasks `support.x` has one metadata vector for each class, and `support.y` is `arange(ways)`.
    """

    support: Batch
    query: Batch


class Learner(NamedTuple):
    """A few-shot learning algorithm as pure functions.

    Attributes:
      init: `(key, task) -> params`, which reads the shapes of `task`, never its values.
      adapt: `(params, support, key) -> adapted`, the result of learning from the support set.
      predict: `(params, adapted, x, mask=None) -> outputs`. For classification, argmax gives the class and
        softmax the class probabilities; for float targets, outputs are the predicted values.
      loss: `(params, task, key, step=None) -> (scalar, metrics)` for one task. `step` is the number of the
        meta-step (never vmapped); with None every schedule has its final value.
      statistics: `(params, task, key) -> (sum, count)` of the batch statistics that
        `jm.calibrate` averages over tasks; None where the learner has none to fill.
      divisible: True if several devices may share a task: `loss` embeds the examples by a model that is
        divisible, and computes no gradients itself.
      metric: `(outputs, y, mask) -> scalar or (sum, count)`, the metric of `jm.evaluate`; None for the
        accuracy of class slots and the mean squared error of float targets.

    Your own learner may omit the arguments `mask` and `step`, return the loss without metrics, and return a
    metric as a number, which then has a count of 1. `jm.check_learner` lists the problems of such a learner.

    Examples:
      >>> import jax.numpy as jnp, jaxmeta as jm
      >>> def predict(params, adapted, x):
      ...     return jnp.broadcast_to(adapted, x.shape)
      >>> mean_of_support = jm.Learner(
      ...     init=lambda key, task: {},
      ...     adapt=lambda params, support, key: support.y.mean(),
      ...     predict=predict,
      ...     loss=lambda params, task, key: ((task.query.y - task.support.y.mean()) ** 2).mean(),
      ... )
      >>> support = jm.Batch(jnp.zeros((2, 1)), jnp.array([[1.0], [3.0]]))
      >>> print(mean_of_support.predict({}, mean_of_support.adapt({}, support, None), jnp.zeros((1, 1))))
      [[2.]]
    """

    init: Callable[[Key, Task], Params]
    adapt: Callable[[Params, Batch, Key], Adapted]
    predict: Callable[..., Array]
    loss: Callable[..., tuple[Array, Metrics]]
    statistics: Callable[[Params, Task, Key], PyTree] | None = None
    divisible: bool = False
    metric: Metric | None = None


class Model(NamedTuple):
    """A network as pure functions; `jm.nn.as_model` makes one from a module of Flax or Equinox.

    Attributes:
      init: `(key, x) -> params`.
      apply: `(params, x) -> outputs`, normalised by the statistics of `x` itself.
      apply_norm: `(params, x, *, stats=None, mask=None) -> (outputs, stats)`. It normalises layers that
        are in `stats` by these statistics, and all others by the masked statistics of `x`, and returns the
        statistics by which each layer was normalised. None for a model without batch statistics.
      stochastic: True if `apply` and `apply_norm` also take a keyword `key`, the source of their randomness
        (such as dropout); with `key=None` they are deterministic.
      divisible: True if an example's outputs depend on the other examples only through the moments of
        `jm.nn.BatchNorm`, so that several devices may share a batch. A module of flax.linen declares it by a
        class attribute `divisible = True`, and takes `mask` if it normalises.
    """

    init: Callable[[Key, Array], Params]
    apply: Callable[..., Array]
    apply_norm: Callable[..., tuple[Array, PyTree]] | None = None
    stochastic: bool = False
    divisible: bool = False


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ProtocolCard:
    """The description of tasks that a published result must state; static and hashable.

    Attributes:
      tasks: name of the source, e.g. "omniglot".
      split: "train", "validation" or "test"; "unknown" for tasks without a card.
      kind: "classification" or "regression".
      ways, shots, queries: number of classes, of support and of query examples per class; `ways` is None for
        regression. A pair is an inclusive range (ragged tasks).
      classes: number of classes that the tasks are drawn from; None for tasks without classes.
      split_hash: SHA-256 (hex) over the class names of all parts of the split; results with the same hash
        have the same classes.
      rotations: use of rotated images: "none", "classes" (as further classes) or "random".
      protocol: sentence that names the published protocol.
    """

    tasks: str
    split: SplitName | Literal["unknown"]
    kind: Kind = "classification"
    ways: int | tuple[int, int] | None = None
    shots: int | tuple[int, int] = 1
    queries: int = 1
    classes: int | None = None
    split_hash: str | None = None
    rotations: Rotations = "none"
    protocol: str = ""


class TaskDistribution(NamedTuple):
    """A source of tasks: `sample(key) -> Task`, pure, usable under `jit` and `vmap`.

    In the task sources of this library `sample` is a `jax.tree_util.Partial(draw, data)`, a pytree, so that
    the data are an argument of the compiled step and not a constant in it.

    Attributes:
      sample: `(key) -> Task`.
      card: protocol card, which only reports need; None for tasks without one.
      classes: names of the classes that tasks are drawn from, in the order of the labels of
        `jm.tasks.labelled`; None for classes without names. See `jm.tasks.classes_of`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> def sample(key):
      ...     slope, x = jax.random.normal(key), jnp.linspace(-1.0, 1.0, 6)[:, None]
      ...     return jm.Task(jm.Batch(x[::2], slope * x[::2]), jm.Batch(x[1::2], slope * x[1::2]))
      >>> tasks = jm.TaskDistribution(sample)
      >>> tasks.sample(jax.random.key(0)).query.x.shape
      (3, 1)
    """

    sample: Callable[[Key], Task]
    card: ProtocolCard | None = None
    classes: tuple[str, ...] | None = None


class TaskStream(NamedTuple):
    """A source of tasks that do not fit on the device: one batch of tasks for each meta-step.

    Attributes:
      at: `(step) -> tasks`, a `Task` whose leaves have a leading axis of tasks: the tasks of meta-step
        `step` in training, the `step`-th batch of episodes in an evaluation. It is a pure function, so
        that a run can be resumed at any step.
      card: protocol card, which only reports need; None for tasks without one.
      batches: `(start) -> iterator` over `at(start), at(start + 1), …` that reads ahead; it is closed
        if it has a method `close`. None to call `at` for each step.
      key: key from which `episode_keys` numbers the episodes; training and evaluation with another key
        refuse the stream. None for episodes that are not numbered.
      for_evaluation: True if episodes are numbered as in an evaluation.
      names: `(step) -> names`, the class names of the tasks of `at(step)`: an array `(tasks, ways)` of
        strings by slot, "" for slots that are padding. None for classes without names.
    """

    at: Callable[[int], Task]
    card: ProtocolCard | None = None
    batches: Callable[[int], Iterator[Task]] | None = None
    key: Key | None = None
    for_evaluation: bool = False
    names: Callable[[int], np.ndarray] | None = None


def card_of(tasks: TaskDistribution | TaskStream) -> ProtocolCard:
    """Return the card of tasks, by default one that states that there is none.

    Examples:
      >>> card_of(TaskDistribution(lambda key: None)).tasks
      'tasks without a card'
    """
    return ProtocolCard("tasks without a card", "unknown") if tasks.card is None else tasks.card


def check_tasks(tasks: Any, name: str = "tasks") -> None:
    """Check that `tasks` is a source of tasks.

    Raises:
      ArgumentError: `tasks` is something else; the error names the argument `name`.
    """
    if isinstance(tasks, jax.tree_util.Partial):
        raise ArgumentError(name, "got a sampler; it must be tasks: jm.TaskDistribution(sample)")
    wanted = "a jm.TaskDistribution or jm.TaskStream, such as jm.tasks.glyphs(ways=5, shots=1)"
    check_kind(name, tasks, TaskDistribution | TaskStream, wanted)


# The source of a compiled step's tasks: a sampler, or one batch of tasks.
Source = Callable[[Key], Task] | Task


def episode_keys(key: Key, indices: Int[Array, " n"]) -> Key:
    """Return `(n, 2)` keys: for each episode that of its task, and that of the learner.

    In training, `key` is `fold_in(run_key, step)`; in an evaluation, it is the key of the evaluation.

    Args:
      key: key from which episodes are numbered.
      indices: numbers of the episodes.

    Raises:
      ArgumentError: `key` is of a generator other than Threefry.

    Examples:
      >>> keys = episode_keys(jax.random.key(0), jnp.arange(3))
      >>> keys.shape  # a key of the task and a key of the learner for each episode
      (3, 2)
    """
    # `fold_in` of the index, instead of a `split` into as many keys as there are tasks, makes an episode
    # independent of the numbers of tasks, devices and processes. The numbers of generators other than
    # Threefry depend on how many are drawn together, that is on devices and strategy.
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if (str(jax.random.key_impl(key)) != "threefry2x32") if typed else (key.shape != (2,)):
        raise ArgumentError(
            "key",
            f"got {str(jax.random.key_impl(key)) if typed else f'raw bits of shape {key.shape}'}; "
            'episodes are numbered with Threefry keys: jax.random.key(seed, impl="threefry2x32")',
        )
    return jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index)))(indices)


def blank_padding(batch: Batch) -> Batch:
    """Return `batch` with zeros in the place of its padded examples.

    Padding may have any values, such as NaN, and a mask in the loss does not remove 0 · NaN from its
    gradient. Therefore learners apply this function to their inputs first.
    """
    mask = batch.mask
    if mask is None:
        return batch

    def blank(values: Array) -> Array:
        return jnp.where(mask.reshape(-1, *(1,) * (values.ndim - 1)), values, 0)

    return dataclasses.replace(batch, x=blank(batch.x), y=blank(batch.y))


def augmented(augment: Augment | None, key: Key, batch: Batch) -> Batch:
    """Return `batch` with `augment` applied to its images."""
    return batch if augment is None else dataclasses.replace(batch, x=augment(key, batch.x))


def with_slot_checks(learner: Learner) -> Learner:
    """Return `learner` with functions that refuse invalid class slots where values are known.

    These functions also convert NumPy arrays to JAX arrays, because traced indices cannot index NumPy arrays,
    and `init` raises an error for a seed in place of a key. Every factory that `jm.learner` decorates returns
    such a learner.
    """
    # A factory that forwards to another one may replace `init` of that one's learner.
    if not is_checked(learner.init):
        learner = learner._replace(init=_with_key_check(learner.init))
    if is_checked(learner.adapt):
        return learner

    @functools.wraps(learner.adapt)
    def adapt(params: Params, support: Batch, key: Key) -> Adapted:
        check_kind("support", support, Batch, "a jm.Batch of examples")
        check_slots("support", support.y, support.ways, support.mask)
        return learner.adapt(params, _on_device(support), key)

    @functools.wraps(learner.predict)
    def predict(params: Params, adapted: Adapted, x: Array, *mask: Array | None, **settings: Any) -> Array:
        return learner.predict(params, adapted, jnp.asarray(x), *mask, **settings)

    @functools.wraps(learner.loss)
    def loss(params: Params, task: Task, key: Key, step: Array | None = None) -> tuple[Array, Metrics]:
        support, query = task
        check_slots("support", support.y, support.ways, support.mask)
        if query.ways is not None:
            check_slots("query", query.y, query.ways, query.mask)
        return learner.loss(params, Task(*map(_on_device, task)), key, step)

    for each in (adapt, predict, loss):
        setattr(each, _CHECKS, each)
    return learner._replace(adapt=adapt, predict=predict, loss=loss)


def _with_key_check(init: Callable[[Key, Task], Params]) -> Callable[[Key, Task], Params]:
    """Return `init` with a check of its key."""

    @functools.wraps(init)
    def checked(key: Key, task: Task) -> Params:
        check_key("key", key)
        return init(key, task)

    setattr(checked, _CHECKS, checked)
    return checked


def is_checked(function: Callable[..., Any]) -> bool:
    """Return whether `with_slot_checks` made this function of a learner."""
    return function is not None and getattr(function, _CHECKS, None) is function


def _on_device(batch: Batch) -> Batch:
    """Convert NumPy arrays of `batch` to JAX arrays, except class slots that `ways_of` has to read."""
    is_known = batch.ways is not None or not jnp.issubdtype(batch.y.dtype, jnp.integer)
    return dataclasses.replace(
        batch,
        x=jnp.asarray(batch.x),
        y=jnp.asarray(batch.y) if is_known else batch.y,
        mask=None if batch.mask is None else jnp.asarray(batch.mask),
    )


def ways_of(batch: Batch) -> int:
    """Return the number of class slots of `batch`: its static `ways`, or one more than the largest label.

    Raises:
      ValueError: `ways` is None and `y` is traced, so that its values cannot be read.
    """
    if batch.ways is not None:
        return batch.ways
    if isinstance(batch.y, jax.core.Tracer):
        raise ValueError(
            "batch.ways is None and batch.y is traced, so the number of classes cannot be read "
            "from it; pass Batch(..., ways=N)"
        )
    return int(np.max(np.asarray(batch.y))) + 1
