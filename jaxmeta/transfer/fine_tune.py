"""The chapter's recipes: feature extraction, fine-tuning from a layer up, and what lies between."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Required, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxmeta.checks import ArgumentError, check_count, check_labels, check_number, check_word
from jaxmeta.core import Augment, Batch, Key, Optimizer, Params
from jaxmeta.declare import forwards
from jaxmeta.nn.norm import STATISTICS
from jaxmeta.nn.stateful import StatefulModel, Variables, frozen_layers
from jaxmeta.paths import Patterns, several
from jaxmeta.transfer.classifier import HEAD, as_images, extract_features
from jaxmeta.transfer.descent import Batches, descend
from jaxmeta.transfer.freezing import frozen_mask, slanted_triangular
from jaxmeta.transfer.heads import ExampleWeights, LogisticSettings, RidgeSettings, logistic_head, ridge_head
from jaxmeta.transfer.subtree import swap_subtree

ExampleLoss = Callable[[Array, Array], Array]
# Steps of a slanted triangular rate, of which a tenth go up.
_SHORTEST = 10
# Mini-batches whose statistics are averaged: the 22 before the last hold nine tenths of a running average of
# momentum 0.9.
_MEASURED = 50
# A beginning of running averages, far above what they average: what is left of it can be read off exactly.
_FAR = 2.0**16


class Fitted(NamedTuple):
    """What training ends with.

    Attributes:
      variables: of the model.
      losses: of each step's mini-batch, with penalties.
    """

    variables: Variables
    losses: Float[Array, " steps"]


def fine_tune(
    model: StatefulModel,
    variables: Variables,
    data: Batch,
    *,
    optimizer: Optimizer,
    steps: int,
    key: Key,
    train: Patterns = "**",
    batch_size: int = 64,
    loss: ExampleLoss = optax.softmax_cross_entropy_with_integer_labels,
    weights: ExampleWeights | None = None,
    penalty: Callable[[Params], Array] | None = None,
    augment: Augment | None = None,
    keep_statistics: bool = False,
    report: Callable[[int, float], None] | None = None,
    look: Callable[[int, Variables], None] | None = None,
    every: int | None = None,
) -> Fitted:
    """Trains a network, or its upper layers, on labelled examples; from where it is.

    What `train` does not match keeps its bits: no gradient, no decay, no optimizer state (`optax.partition`),
    and a layer all of whose parameters are frozen is in inference, with its running statistics, which stay,
    and without dropout. Full fine-tuning is `train="**"`; from a layer upward `train=["body/stage3*",
    "head"]`, say.

    Mini-batches go through a new random order in each epoch. The steps run as one compiled loop.

    Args:
      model: a `jm.transfer.classifier`, or any network by `jm.nn.as_stateful`.
      variables: of it; not changed.
      data: `x` (n, *shape), bytes (taken as numbers in [0, 1]) or floats, and `y` (n,) or (n, d).
      optimizer: of what is trained; see `jm.transfer.discriminative`.
      steps: mini-batches.
      key: of mini-batches, augmentation and dropout.
      train: patterns of the parameters to train; see `jm.transfer.matching`.
      batch_size: examples a step; all where there are fewer.
      loss: `(outputs, y) -> (n,)`, of each example.
      weights: of the examples in the mean loss: of importance (`jm.transfer.density_ratio`), or of label
        shift.
      penalty: `params -> scalar`, such as `jm.transfer.l2_sp(…)`. Build it once where training is repeated: a
        new function is compiled anew.
      augment: `(key, x) -> x`.
      keep_statistics: whether batch normalisations keep the running statistics that they have, and normalise
        by them in training too: for few examples, or mini-batches too small to have statistics. Otherwise
        each mini-batch normalises itself, and the running statistics become those of `data`.
      report: called with step and loss, after `every` steps each.
      look: called with step and variables, likewise; to choose a model by.
      every: of both; None for about twenty times.

    Raises:
      ValueError: no examples, or not as many labels or weights; a label that is none of the classes, under
        the default loss; a `train` pattern that matches nothing;
        `steps`, `batch_size` or `every` below 1.
      FloatingPointError: the loss is no longer finite.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, jaxmeta as jm
      >>> model = jm.transfer.classifier(jm.nn.MLP(out=8, norm=True), 2)
      >>> data = jm.Batch(jnp.array([[0.0, 1], [1, 0]]), jnp.array([0, 1]))
      >>> variables = model.init(jax.random.key(0), data.x)
      >>> fitted = jm.transfer.fine_tune(
      ...     model, variables, data, optimizer=optax.adam(0.1), steps=50, key=jax.random.key(1)
      ... )
      >>> model.apply(fitted.variables, data.x).argmax(1).tolist()
      [0, 1]
    """
    # What a loss of one's own makes of integers is its own affair.
    known = loss is optax.softmax_cross_entropy_with_integer_labels
    arrays = examples(data, weights, classes=_classes(model, variables, data) if known else None)
    frozen = frozen_mask(variables["params"], train)
    leaves, structure = jax.tree.flatten(frozen)
    objective = _objective(model, loss, augment, keep_statistics, tuple(leaves), structure)
    params, state, losses = descend(
        objective,
        variables["params"],
        {name: tree for name, tree in variables.items() if name != "params"},
        optimizer,
        frozen=frozen,
        data={"examples": Batches(arrays, batch_size)},
        extra={} if penalty is None else {"penalty": _as_partial(penalty)},
        steps=steps,
        key=key,
        report=report,
        every=every,
        look=None if look is None else lambda step, params, state: look(step, {"params": params, **state}),
    )
    return Fitted({"params": params, **state}, losses)


class FitSettings(TypedDict, total=False):
    """Settings of `fine_tune` that every recipe has."""

    batch_size: int
    loss: ExampleLoss
    weights: ExampleWeights | None
    penalty: Callable[[Params], Array] | None
    augment: Augment | None
    keep_statistics: bool
    report: Callable[[int, float], None] | None
    look: Callable[[int, Variables], None] | None
    every: int | None


class FineTuneSettings(FitSettings, total=False):
    """All settings of `fine_tune`."""

    optimizer: Required[Optimizer]
    steps: Required[int]
    key: Required[Key]
    train: Patterns


Head = Literal["ridge", "logistic"]


@overload
def feature_extraction(
    model: StatefulModel,
    variables: Variables,
    data: Batch,
    *,
    head: Literal["logistic"] = "logistic",
    **settings: Unpack[LogisticSettings],
) -> Variables: ...


@overload
def feature_extraction(
    model: StatefulModel,
    variables: Variables,
    data: Batch,
    *,
    head: Literal["ridge"],
    **settings: Unpack[RidgeSettings],
) -> Variables: ...


@overload
def feature_extraction(
    model: StatefulModel,
    variables: Variables,
    data: Batch,
    *,
    head: Callable[..., Params],
    **settings: Any,
) -> Variables: ...


def feature_extraction(
    model: StatefulModel,
    variables: Variables,
    data: Batch,
    *,
    head: Head | Callable[..., Params] = "logistic",
    **settings: Any,
) -> Variables:
    """The body as it is, in inference, and a new head on its features, which are computed once.

    Args:
      model: a `jm.transfer.classifier`.
      variables: of it.
      data: as of `fine_tune`.
      head: "ridge", closed form; "logistic", by gradients to the minimum; or a function `(features, labels,
        classes, **settings) -> {"kernel", "bias"}`.
      **settings: of the head.

    Returns:
      The variables with the new head; all others are the very same arrays.

    Raises:
      ValueError: an unknown head, and what `jm.transfer.ridge_head` raises.
    """
    heads: dict[Head, Callable[..., Params]] = {"ridge": ridge_head, "logistic": logistic_head}
    if not callable(head):
        check_word("head", head, sorted(heads))
    classes = variables["params"][HEAD]["kernel"].shape[1]
    labelled = examples(data, classes=classes)
    fit = head if callable(head) else heads[head]
    new = fit(extract_features(model, variables, labelled["x"]), labelled["y"], classes, **settings)
    return {**variables, "params": swap_subtree(variables["params"], HEAD, new)}


@forwards(fine_tune)
def linear_probe_then_fine_tune(
    model: StatefulModel,
    variables: Variables,
    data: Batch,
    *,
    probe: dict[str, Any] | None = None,
    **settings: Unpack[FineTuneSettings],
) -> Fitted:
    """LP-FT: first the head alone, then all: a random head's gradients would spoil good features.

    The head is fitted by `fine_tuning_probe`, to the very features that fine-tuning begins with.

    Args:
      model, variables, data: as of `fine_tune`.
      probe: settings of `feature_extraction`.
      **settings: of `fine_tune`.

    References:
      Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, 2022.
    """
    begin = fine_tuning_probe(model, variables, data, probe=probe, **settings)
    return fine_tune(model, begin, data, **settings)


def fine_tuning_probe(
    model: StatefulModel,
    variables: Variables,
    data: Batch,
    *,
    key: Key,
    train: Patterns = "**",
    batch_size: int = 64,
    augment: Augment | None = None,
    keep_statistics: bool = False,
    probe: dict[str, Any] | None = None,
    **others: object,
) -> Variables:
    """A linear probe for fine-tuning to begin with: `feature_extraction` by its batch statistics.

    Layers that fine-tuning will train then normalise by its mini-batches. By the source's running statistics,
    a head would be fitted to other features, which without a step of training are no longer there. So these
    layers' running statistics are first replaced by those of mini-batches of `data`, unless
    `keep_statistics`.

    Args:
      model, variables, data, key, train, batch_size, augment, keep_statistics: as of `fine_tune`.
      probe: settings of `feature_extraction`.
      **others: of `fine_tune`, which do not matter here.

    Returns:
      The variables with a new head, and the running statistics that it was fitted by.
    """
    if unknown := sorted(set(others) - set(inspect.signature(fine_tune).parameters)):
        raise TypeError(f"fine_tuning_probe() has no argument {unknown[0]!r}, nor has fine_tune()")
    if variables.get(STATISTICS) and not keep_statistics:
        variables = _by_mini_batches(model, variables, data, key, train, batch_size, augment)
    return feature_extraction(model, variables, data, **(probe or {}))


@forwards(fine_tune)
def gradual_unfreezing(
    model: StatefulModel,
    variables: Variables,
    data: Batch,
    groups: Sequence[Patterns],
    *,
    optimizer: Callable[[optax.Schedule], Optimizer] = optax.adam,
    rate: float = 1e-3,
    stage_steps: int,
    last_steps: int | None = None,
    key: Key,
    **settings: Unpack[FitSettings],
) -> Fitted:
    """Trains the top group, then the two top ones, … until all are trained.

    Each stage is a `fine_tune` with a slanted triangular rate of its own and a fresh optimizer state.

    Args:
      model, variables, data: as of `fine_tune`.
      groups: patterns, from the lowest layers to the top.
      optimizer: `schedule -> transformation`.
      rate: the largest rate of each stage.
      stage_steps: of each stage; an epoch in the paper.
      last_steps: of the last stage, in which all are trained; None for as many.
      key: of all stages.
      **settings: of `fine_tune`.

    Raises:
      ValueError: no groups, and what `fine_tune` raises.

    References:
      Howard & Ruder, Universal Language Model Fine-tuning for Text Classification, 2018, section 3.3.
    """
    check_number("rate", rate, above=0)
    check_count("stage_steps", stage_steps, _SHORTEST)
    if last_steps is not None:
        check_count("last_steps", last_steps, _SHORTEST)
    if not groups:
        raise ArgumentError("groups", "got none; name the layers from the lowest to the top")
    losses = []
    for stage in range(len(groups)):
        last = stage == len(groups) - 1
        steps = last_steps if last and last_steps is not None else stage_steps
        trained = [pattern for group in groups[len(groups) - 1 - stage :] for pattern in several(group)]
        fitted = fine_tune(
            model,
            variables,
            data,
            train=trained,
            optimizer=optimizer(slanted_triangular(steps, rate)),
            steps=steps,
            key=jax.random.fold_in(key, stage),
            **settings,
        )
        variables = fitted.variables
        losses.append(fitted.losses)
    return Fitted(variables, jnp.concatenate(losses))


def examples(
    data: Batch,
    weights: ExampleWeights | None = None,
    *,
    classes: int | None = None,
    name: str = "data",
) -> dict[str, Any]:
    """ "x" and "y", as many of the one as of the other, and "weights" where there are any.

    Args:
      data: the examples.
      weights: of them.
      classes: number of classes that "y" must be of; None for any targets.
      name: what errors call `data`.
    """
    if data.x.shape[0] == 0 or data.x.shape[0] != data.y.shape[0]:
        raise ArgumentError(name, f"got {data.x.shape[0]} examples and {data.y.shape[0]} labels")
    if data.mask is not None:
        raise ArgumentError(name, "got a mask; leave the padding out")
    if classes is not None:
        check_labels(name, data.y, data.x.shape[0], classes)
    arrays = {"x": data.x, "y": data.y}
    if weights is not None:
        arrays["weights"] = jnp.asarray(weights, jnp.float32)
        if arrays["weights"].shape != (data.x.shape[0],):
            raise ArgumentError(
                "weights", f"got shape {arrays['weights'].shape} for {data.x.shape[0]} examples"
            )
    return arrays


def _classes(model: StatefulModel, variables: Variables, data: Batch) -> int | None:
    """How many outputs the model has for an example; None where they are no vector."""
    if not data.x.shape[0]:
        return None
    outputs = jax.eval_shape(lambda x: model.apply(variables, as_images(x)), data.x[:1])
    return outputs.shape[1] if outputs.ndim == 2 else None


def mean_loss(each: Float[Array, " n"], batch: Mapping[str, Array]) -> Float[Array, ""]:
    """Mean of w_i ℓ_i over a mini-batch of `examples`."""
    return (each * batch["weights"]).mean() if "weights" in batch else each.mean()


def _as_partial(penalty: Callable[[Params], Array]) -> jax.tree_util.Partial:
    return penalty if isinstance(penalty, jax.tree_util.Partial) else jax.tree_util.Partial(penalty)


@lru_cache(maxsize=64)
def _objective(model, loss, augment, keep_statistics, frozen_leaves, structure):
    """The same function for the same settings, so that nothing is compiled twice."""
    frozen = jax.tree.unflatten(structure, frozen_leaves)
    # A model made by hand may not have the choice.
    settings = {"keep_statistics": True} if keep_statistics else {}

    def objective(params, state, batches, extra, progress, key):
        del progress
        batch = batches["examples"]
        draw, dropout = jax.random.split(key)
        x = as_images(batch["x"])
        if augment is not None:
            x = augment(draw, x)
        outputs, state = model.train({"params": params, **state}, x, dropout, frozen=frozen, **settings)
        value = mean_loss(loss(outputs, batch["y"]), batch)
        if "penalty" in extra:
            value = value + extra["penalty"](params)
        return value, state

    return objective


def _by_mini_batches(
    model: StatefulModel,
    variables: Variables,
    data: Batch,
    key: Key,
    train: Patterns,
    batch_size: int,
    augment: Augment | None,
) -> Variables:
    """`variables` with the running statistics that `fine_tune` leads to while the parameters stay."""
    check_count("batch_size", batch_size)
    arrays = {"x": examples(data)["x"]}
    leaves, structure = jax.tree.flatten(frozen_mask(variables["params"], train))
    stats = variables[STATISTICS]
    # How much of where they began is left tells their own weight, whatever a layer's momentum is.
    ends = {
        "low": jax.tree.map(jnp.zeros_like, stats),
        "high": jax.tree.map(lambda leaf: jnp.full_like(leaf, _FAR), stats),
    }
    _, state, _ = descend(
        _measurement(model, augment, tuple(leaves), structure),
        variables["params"],
        {name: tree for name, tree in variables.items() if name != "params"} | ends,
        optax.set_to_zero(),
        frozen=jax.tree.map(lambda _: True, variables["params"]),
        data={"examples": Batches(arrays, batch_size)},
        steps=1 if data.x.shape[0] <= batch_size and augment is None else _MEASURED,
        key=key,
    )

    def measured(before: Array, low: Array, high: Array) -> Array:
        weight = 1 - (high - low) / _FAR
        return jnp.where(weight > 0, low / jnp.where(weight > 0, weight, 1), before)

    return {**variables, STATISTICS: jax.tree.map(measured, stats, state["low"], state["high"])}


@lru_cache(maxsize=64)
def _measurement(model, augment, frozen_leaves, structure):
    """Nothing to minimise: running statistics from two beginnings, of layers that are not frozen."""
    frozen = jax.tree.unflatten(structure, frozen_leaves)
    still = frozen_layers(frozen)

    def of_trained(new, old):
        def chosen(path, new, old):
            layer = tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path[:-1])
            return old if still(layer) else new

        return jax.tree_util.tree_map_with_path(chosen, new, old)

    def objective(params, state, batches, extra, progress, key):
        del extra, progress
        draw, dropout = jax.random.split(key)
        x = as_images(batches["examples"]["x"])
        if augment is not None:
            x = augment(draw, x)
        others = {name: tree for name, tree in state.items() if name not in ("low", "high", STATISTICS)}

        def after(begin):
            # Frozen layers normalise by the running statistics that they have, and keep them.
            stats = of_trained(begin, state[STATISTICS])
            variables = {"params": params, **others, STATISTICS: stats}
            found = model.train(variables, x, dropout, frozen=frozen)[1][STATISTICS]
            return of_trained(found, begin)

        return jnp.zeros(()), {**state, "low": after(state["low"]), "high": after(state["high"])}

    return objective
