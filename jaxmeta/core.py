"""The types every other file speaks.

A learning algorithm for few examples is four pure functions, a `Learner`; a source of
few-example problems is one pure function, a `TaskDistribution`:

    tasks.sample(key)                     -> Task(support, query)
    learner.adapt(params, support, key)   -> adapted
    learner.predict(params, adapted, x)   -> outputs
    learner.loss(params, task, key, step) -> (scalar, metrics)

The plain gradient of `loss` IS the meta-gradient, so one training step serves them all.
This file imports nothing of ours.
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

from jaxmeta.checks import ArgumentError, check_kind, check_slots

PyTree = Any
Params = PyTree
Adapted = PyTree
Key = PRNGKeyArray
Metrics = dict[str, tuple[Array, Array]]
Augment = Callable[[Key, Array], Array]
# Of outputs: `(outputs, y, mask) -> scalar`.
Loss: TypeAlias = Callable[[Array, Array, Array | None], Array]
# What scores outputs: `(outputs, y, mask) -> scalar or (sum, count)`.
Metric: TypeAlias = Callable[[Array, Array, Array | None], ArrayLike | tuple[ArrayLike, ArrayLike]]


@runtime_checkable
class Optimizer(Protocol):
    """An optax optimizer: an `optax.GradientTransformation`, in a type that type checkers know.

    optax declares none of its types to them, so that a learning rate in the place of an optimizer would pass.
    """

    @property
    def init(self) -> Callable[[Any], Any]:
        """Return the function `params -> state`."""

    @property
    def update(self) -> Callable[..., Any]:
        """Return the function `(gradients, state, params) -> (updates, state)`."""


# Choices that several methods or sources of tasks have; `typing.get_args` gives their words.
SplitName = Literal["train", "validation", "test"]
Kind = Literal["classification", "regression"]
Rotations = Literal["none", "classes", "random"]
# Whose statistics normalise: of an embedding, and after an inner loop.
Norm = Literal["batch", "support", "population"]
InnerLoopNorm = Literal["batch", "support", "population", "episode"]
# Which derivatives the meta-gradient has: of any inner loop, and of one that is differentiated step by step.
Order = Literal["second", "first", "implicit"]
UnrolledOrder = Literal["second", "first"]
# How a backward pass gets at the values of the inner steps.
Memory = Literal["auto", "store", "recompute", "forward_over_reverse"]
# Attribute of the functions of a learner that `checks_slots` made: the function itself, so that one which
# merely wraps it, and has a copy of its attributes, does not count as one.
_CHECKS = "__jaxmeta_checks__"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples of one task; a batch of tasks adds one leading axis to every leaf.

    Attributes:
      x: inputs, `(n, *shape)`.
      y: class slots `(n,)` int32 in `[0, ways)`, or regression targets `(n, d)` float. Learners, losses and
        scores refuse other class slots where they can see them, which is outside `jax.jit` and `jax.vmap`,
        and `jm.evaluate` and `jm.transfer.fine_tune` do in any case. A compiled function cannot see values,
        and checking them would cost a wait for the device at each call: there an example of a slot that
        does not exist is as padding to methods that compare with one-hot labels, and to a cross-entropy
        NaN, or where it is negative a slot counted from the end. So check what you compile yourself.
      mask: `(n,)` bool, or None where every example is real. False marks padding, which
        changes no result; it is how ragged ways and shots keep one shape.
      ways: number of class slots, static. None for regression, and for a batch made by hand,
        where it is read from a concrete `y` (see `ways_of`).
    """

    x: Array
    y: Int[Array, "*n"] | Float[Array, "*n d"]
    _: dataclasses.KW_ONLY
    mask: Bool[Array, "*n"] | None = None
    ways: int | None = dataclasses.field(default=None, metadata={"static": True})


class Task(NamedTuple):
    """One few-example problem: learn from `support`, be judged on `query`.

    Zero-shot tasks carry one metadata vector per class as `support.x`, and
    `support.y = arange(ways)`.
    """

    support: Batch
    query: Batch


class Learner(NamedTuple):
    """A learning algorithm for few examples, as pure functions.

    Attributes:
      init: `(key, task) -> params`; reads shapes from `task`, never its values.
      adapt: `(params, support, key) -> adapted`; what is learned from the support set.
      predict: `(params, adapted, x, mask=None) -> outputs`; argmax is the class, softmax its
        distribution; regression values where the targets are float.
      loss: `(params, task, key, step=None) -> (scalar, metrics)` of one task. `step` is the
        global meta-step (never vmapped); None puts every schedule at its end.
      statistics: `(params, task, key) -> (sum, count)` of the batch statistics that
        `jm.calibrate` averages over tasks; None where the learner has none to fill.
      divisible: whether `loss` embeds the examples by a model that is divisible, and differentiates
        nothing itself, so that several devices may share a task.
      metric: `(outputs, y, mask) -> scalar or (sum, count)`, what `jm.evaluate` measures; None for the
        accuracy of class slots and the mean squared error of float targets.

    A learner of one's own may leave `mask` and `step` out, return the loss without metrics, and give a
    metric as a number, whose count is then 1. `jm.check_learner` says what keeps one from training.
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
      apply_norm: `(params, x, *, stats=None, mask=None) -> (outputs, stats)`. Normalises by
        `stats`, and those layers that it has none for, which are all where it is None, by the (masked)
        statistics of `x`; returns what each layer was normalised by. None where the model has no batch
        statistics.
      stochastic: whether `apply` and `apply_norm` also take a keyword `key`, the source of
        their randomness (dropout, say); with `key=None` they are deterministic.
      divisible: whether the outputs of an example depend on the others through the moments of
        `jm.nn.BatchNorm` only, so that several devices may share a batch. A module of flax.linen says
        so by a class attribute `divisible = True`, and takes `mask` if it normalises.
    """

    init: Callable[[Key, Array], Params]
    apply: Callable[..., Array]
    apply_norm: Callable[..., tuple[Array, PyTree]] | None = None
    stochastic: bool = False
    divisible: bool = False


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ProtocolCard:
    """What a published row must state about its tasks. Static and hashable.

    Attributes:
      tasks: name of the source, e.g. "omniglot".
      split: "train", "validation" or "test"; "unknown" for tasks without a card.
      kind: "classification" or "regression".
      ways, shots, queries: classes, support and query examples per class; for regression
        `ways` is None. A pair is an inclusive range (ragged tasks).
      classes: number of classes the tasks are drawn from; None where there are none.
      split_hash: SHA-256 (hex) over the class names of all parts of the split, so that two
        rows with one hash have seen the same classes.
      rotations: how rotations enter ("none", "classes", "random").
      protocol: one sentence that names the published protocol followed.
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

    `sample` is a `jax.tree_util.Partial(draw, data)`: a pytree, so that the data travel as an
    argument of the compiled step and are never baked into it as a constant.

    Attributes:
      sample: `(key) -> Task`.
      card: what a published row must state.
      classes: names of the classes that tasks are drawn from, in the order of the labels of
        `jm.tasks.labelled`; None where they have no names. See `jm.tasks.classes_of`.

    Tasks of one's own may leave the card out, which only reports need.
    """

    sample: Callable[[Key], Task]
    card: ProtocolCard | None = None
    classes: tuple[str, ...] | None = None


class TaskStream(NamedTuple):
    """A source of tasks too large for the device: one batch of tasks for each meta-step.

    Attributes:
      at: `(step) -> tasks`, one `Task` whose leaves have a leading axis of tasks: in training those
        of meta-step `step`, in an evaluation the `step`-th batch of episodes. A pure function, so
        that a run can go on at any step.
      card: as of a `TaskDistribution`; it may be left out.
      batches: `(start) -> iterator` over `at(start), at(start + 1), …`, read ahead, which is closed
        where it has a `close`; None: `at` is called step by step.
      key: that the episodes are numbered from by `episode_keys`, where they are: what trains or
        evaluates with another refuses the stream.
      for_evaluation: whether they are numbered as an evaluation does.
      names: `(step) -> names`, of the classes of the tasks that `at(step)` gives: an array `(tasks, ways)` of
        texts, slot after slot, "" for slots that are padding. None where classes have no names.
    """

    at: Callable[[int], Task]
    card: ProtocolCard | None = None
    batches: Callable[[int], Iterator[Task]] | None = None
    key: Key | None = None
    for_evaluation: bool = False
    names: Callable[[int], np.ndarray] | None = None


def card_of(tasks: TaskDistribution | TaskStream) -> ProtocolCard:
    """Return the card of tasks, or where they have none one that says so.

    Examples:
      >>> card_of(TaskDistribution(lambda key: None)).tasks
      'tasks without a card'
    """
    return ProtocolCard("tasks without a card", "unknown") if tasks.card is None else tasks.card


def check_tasks(tasks: Any, name: str = "tasks") -> None:
    """Check that `tasks` is a source of tasks.

    Raises:
      ValueError: that calls it by `name`.
    """
    if isinstance(tasks, jax.tree_util.Partial):
        raise ArgumentError(name, "got a sampler; it must be tasks: jm.TaskDistribution(sample)")
    wanted = "a jm.TaskDistribution or jm.TaskStream, such as jm.tasks.glyphs(ways=5, shots=1)"
    check_kind(name, tasks, TaskDistribution | TaskStream, wanted)


# What a compiled step draws from: a sampler, or the tasks of one batch.
Source = Callable[[Key], Task] | Task


def episode_keys(key: Key, indices: Int[Array, " n"]) -> Key:
    """For each index `(n, 2)` keys: of the task, and of what the learner does with it.

    The one rule by which episodes are numbered: episode `index` of meta-step `step` is that of
    `fold_in(key, step)`, and of an evaluation that of its key.

    Raises:
      ValueError: the key is of another generator than Threefry, whose numbers would depend on how
        many are drawn together: on devices, strategy and shares.
    """
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if (str(jax.random.key_impl(key)) != "threefry2x32") if typed else (key.shape != (2,)):
        raise ArgumentError(
            "key",
            f"got {str(jax.random.key_impl(key)) if typed else f'raw bits of shape {key.shape}'}; "
            'episodes are numbered with Threefry keys: jax.random.key(seed, impl="threefry2x32")',
        )
    return jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index)))(indices)


def blank_padding(batch: Batch) -> Batch:
    """`batch` with zeros for its padded examples; itself where it has no mask.

    Padding may hold anything, NaN included, and masking a loss keeps no 0 · NaN out of its
    gradient: a learner blanks what it is given before it computes with it.
    """
    mask = batch.mask
    if mask is None:
        return batch

    def blank(values: Array) -> Array:
        return jnp.where(mask.reshape(-1, *(1,) * (values.ndim - 1)), values, 0)

    return dataclasses.replace(batch, x=blank(batch.x), y=blank(batch.y))


def augmented(augment: Augment | None, key: Key, batch: Batch) -> Batch:
    """`batch` with `augment` applied to its images."""
    return batch if augment is None else dataclasses.replace(batch, x=augment(key, batch.x))


def checks_slots(learner: Learner) -> Learner:
    """`learner`, which refuses class slots that do not exist, where their values are known.

    It also takes examples as NumPy arrays, in which compiled loops cannot look up rows. Every factory that
    `jm.learner` decorates returns such a learner.
    """
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


def is_checked(function: Callable[..., Any]) -> bool:
    """Return whether `checks_slots` made this function of a learner."""
    return function is not None and getattr(function, _CHECKS, None) is function


def _on_device(batch: Batch) -> Batch:
    """`batch` with JAX's arrays for NumPy's; class slots that `ways_of` has to read stay as they are."""
    known = batch.ways is not None or not jnp.issubdtype(batch.y.dtype, jnp.integer)
    return dataclasses.replace(
        batch,
        x=jnp.asarray(batch.x),
        y=jnp.asarray(batch.y) if known else batch.y,
        mask=None if batch.mask is None else jnp.asarray(batch.mask),
    )


def ways_of(batch: Batch) -> int:
    """Number of class slots of `batch`: its static `ways`, or one more than the largest label.

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
