"""Recipes of transfer learning: feature extraction, fine-tuning, and combinations of the two."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Required, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxmeta.checks import (
    ArgumentError,
    check_count,
    check_function,
    check_kind,
    check_labels,
    check_number,
    check_word,
)
from jaxmeta.core import Augment, Batch, Key, Optimizer, Params
from jaxmeta.declare import forwards
from jaxmeta.nn.norm import STATISTICS
from jaxmeta.nn.stateful import StatefulModel, Variables, frozen_layers
from jaxmeta.paths import Patterns, as_sequence
from jaxmeta.transfer.classifier import EVAL_BATCH, HEAD, as_images, extract_features
from jaxmeta.transfer.descent import Batches, descend
from jaxmeta.transfer.freezing import frozen_mask, slanted_triangular
from jaxmeta.transfer.heads import ExampleWeights, LogisticSettings, RidgeSettings, logistic_head, ridge_head
from jaxmeta.transfer.subtree import swap_subtree

ExampleLoss = Callable[[Array, Array], Array]
# Fewest steps of a slanted triangular rate: a tenth of them, at least one, increase it.
_SHORTEST = 10
# Mini-batches whose statistics are averaged: with momentum 0.9, the last 22 have nine tenths of the weight of
# a running average.
_MEASURED = 50
# Initial value of running averages, far above the averaged values, so that its remaining weight can be read
# off exactly.
_FAR = 2.0**16


class Fitted(NamedTuple):
    """The result of fine-tuning.

    Attributes:
      variables: variables of the trained model.
      losses: loss of each step's mini-batch, including penalties.
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
    callback: Callable[[int, Variables], None] | None = None,
    every: int | None = None,
) -> Fitted:
    """Train a network, or its upper layers, on labelled examples, starting from given variables.

    Parameters that `train` does not match keep their bits: they have no gradient, no decay and no optimizer
    state (`optax.partition`). A layer whose parameters are all frozen is in inference mode: it uses and keeps
    its running statistics and has no dropout. Full fine-tuning is `train="**"`; fine-tuning from a layer
    upward is, for example, `train=["body/stage3*", "head"]`.

    Each epoch draws mini-batches in a new random order. The steps run as one compiled loop.

    Args:
      model: a `jm.transfer.classifier`, or any network by `jm.nn.as_stateful`.
      variables: variables of the model; they are not changed.
      data: `x` of shape (n, *shape), bytes (converted to numbers in [0, 1]) or floats, and `y` of shape (n,)
        or (n, d).
      optimizer: optax transformation of the trained parameters; see `jm.transfer.discriminative`.
      steps: number of mini-batches.
      key: key of mini-batches, augmentation and dropout.
      train: patterns of the parameters to train; see `jm.transfer.matching`.
      batch_size: examples in a mini-batch; all examples if there are fewer.
      loss: function `(outputs, y) -> (n,)`, the loss of each example.
      weights: weights of the examples in the mean loss, such as importance weights
        (`jm.transfer.density_ratio`) or label-shift weights (`jm.transfer.bbse`); None for equal weights.
      penalty: function `params -> scalar`, such as `jm.transfer.l2_sp(…)`; None for no penalty. Build it once
        for repeated trainings: each new function is compiled again.
      augment: function `(key, x) -> x`; None for no augmentation.
      keep_statistics: whether batch normalisations keep their running statistics and use them in training
        too, for few examples or mini-batches too small for statistics of their own. False normalises each
        mini-batch by itself, and the running statistics become those of `data`.
      report: function of step and loss, called after every `every` steps.
      callback: function of step and variables, called after every `every` steps, for model selection.
      every: steps between two calls of `report` and `callback`; None for about 20 calls.

    Returns:
      A `Fitted`: the trained variables, and the loss of each step.

    Raises:
      ValueError: if there are no examples, the number of labels or weights differs from theirs, a label is
        outside the classes under the default loss, a `train` pattern matches nothing, or `steps`,
        `batch_size` or `every` is below 1.
      FloatingPointError: if the loss becomes NaN or infinite.

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
    check_model_and_data(model, data, "data")
    # To a user-defined loss, integer targets may mean something other than classes.
    are_classes = loss is optax.softmax_cross_entropy_with_integer_labels
    arrays = examples(data, weights, classes=_classes(model, variables, data) if are_classes else None)
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
        callback=None
        if callback is None
        else lambda step, params, state: callback(step, {"params": params, **state}),
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
    callback: Callable[[int, Variables], None] | None
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
    batch: int = EVAL_BATCH,
    progress: Callable[[int, int], None] | None = None,
    **settings: Unpack[LogisticSettings],
) -> Variables: ...


@overload
def feature_extraction(
    model: StatefulModel,
    variables: Variables,
    data: Batch,
    *,
    head: Literal["ridge"],
    batch: int = EVAL_BATCH,
    progress: Callable[[int, int], None] | None = None,
    **settings: Unpack[RidgeSettings],
) -> Variables: ...


@overload
def feature_extraction(
    model: StatefulModel,
    variables: Variables,
    data: Batch,
    *,
    head: Callable[..., Params],
    batch: int = EVAL_BATCH,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Variables: ...


def feature_extraction(
    model: StatefulModel,
    variables: Variables,
    data: Batch,
    *,
    head: Head | Callable[..., Params] = "logistic",
    batch: int = EVAL_BATCH,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Variables:
    """Fit a new head to the features of the frozen body, which are computed once in inference mode.

    Args:
      model: a `jm.transfer.classifier`.
      variables: variables of the model; they are not changed.
      data: labelled examples; see `fine_tune`.
      head: "ridge" for `jm.transfer.ridge_head`, in closed form; "logistic" for `jm.transfer.logistic_head`,
        by gradients; or a function `(features, labels, classes, **settings) -> {"kernel", "bias"}`.
      batch: examples at a time in the body.
      progress: function of the number of finished examples and of all examples, called after each batch of
        features; None for no calls.
      **settings: keyword arguments of the head's function.

    Returns:
      The variables with the new head; all other leaves are the same arrays.

    Raises:
      ValueError: if `head` is unknown; and as in `jm.transfer.ridge_head`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> model = jm.transfer.classifier(jm.nn.MLP(out=8), 2)
      >>> data = jm.Batch(jnp.array([[0.0, 1], [1, 0]]), jnp.array([0, 1]))
      >>> variables = model.init(jax.random.key(0), data.x)
      >>> probed = jm.transfer.feature_extraction(model, variables, data, head="ridge", penalty=0.1)
      >>> model.apply(probed, data.x).argmax(1).tolist()
      [0, 1]
    """
    heads: dict[Head, Callable[..., Params]] = {"ridge": ridge_head, "logistic": logistic_head}
    if not callable(head):
        check_word("head", head, sorted(heads))
    classes = variables["params"][HEAD]["kernel"].shape[1]
    arrays = examples(data, classes=classes)
    fit = head if callable(head) else heads[head]
    features = extract_features(model, variables, arrays["x"], batch=batch, progress=progress)
    new_head = fit(features, arrays["y"], classes, **settings)
    return {**variables, "params": swap_subtree(variables["params"], HEAD, new_head)}


@forwards(fine_tune)
def linear_probe_then_fine_tune(
    model: StatefulModel,
    variables: Variables,
    data: Batch,
    *,
    probe: dict[str, Any] | None = None,
    **settings: Unpack[FineTuneSettings],
) -> Fitted:
    """Fit the head alone, then fine-tune (LP-FT): a random head's gradients would distort good features.

    The head is fitted by `fine_tuning_probe`, to the same features that fine-tuning starts with.

    Args:
      model: a `jm.transfer.classifier`.
      variables: variables of the model; they are not changed.
      data: labelled examples; see `fine_tune`.
      probe: keyword arguments of `feature_extraction`; None for its defaults.
      **settings: keyword arguments of `fine_tune`; `optimizer`, `steps` and `key` are required.

    Returns:
      A `Fitted`: the trained variables, and the loss of each step of fine-tuning.

    References:
      Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, 2022.
    """
    probed = fine_tuning_probe(model, variables, data, probe=probe, **settings)
    return fine_tune(model, probed, data, **settings)


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
    progress: Callable[[int, int], None] | None = None,
    **others: object,
) -> Variables:
    """Fit a linear probe with the batch statistics that fine-tuning starts with.

    Layers that fine-tuning trains normalise by its mini-batches. A head fitted with the source's running
    statistics would see other features, which are gone before the first step of training. This function
    therefore first replaces the running statistics of those layers by those of mini-batches of `data`, unless
    `keep_statistics`, and then calls `feature_extraction`.

    Args:
      model: a `jm.transfer.classifier`.
      variables: variables of the model; they are not changed.
      data: labelled examples; see `fine_tune`.
      key: key of mini-batches, augmentation and dropout; see `fine_tune`.
      train: patterns of the parameters that fine-tuning trains.
      batch_size: examples in a mini-batch of fine-tuning.
      augment: augmentation of fine-tuning; None for no augmentation.
      keep_statistics: whether fine-tuning keeps the running statistics.
      probe: keyword arguments of `feature_extraction`; None for its defaults.
      progress: function of the number of finished examples and of all examples, where those of the measured
        mini-batches count, too; None for no calls.
      **others: further keyword arguments of `fine_tune`, which are ignored, so that both take the same ones.

    Returns:
      The variables with a new head, and the running statistics with which it was fitted.

    Raises:
      TypeError: if `fine_tune` has no argument of that name.
      ValueError: as in `feature_extraction`.
    """
    if unknown := sorted(set(others) - set(inspect.signature(fine_tune).parameters)):
        raise TypeError(f"fine_tuning_probe() and fine_tune() have no argument {unknown[0]!r}")
    settings = {"progress": progress, **(probe or {})}
    if variables.get(STATISTICS) and not keep_statistics:
        check_count("batch_size", batch_size)
        n = data.x.shape[0]
        steps, size = (1 if n <= batch_size and augment is None else _MEASURED), min(batch_size, n)
        measured = steps * size
        report: Callable[[int, float], None] | None = None
        if progress is not None:
            check_function("progress", progress)
            report = lambda step, _: progress(step * size, measured + n)  # noqa: E731
            settings["progress"] = lambda done, _: progress(measured + done, measured + n)
        variables = _with_batch_statistics(
            model, variables, data, key, train, batch_size, augment, steps, report
        )
    return feature_extraction(model, variables, data, **settings)


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
    """Train the top group of layers, then the top two, and so on until all groups are trained.

    Each stage is a `fine_tune` with its own slanted triangular rate and a new optimizer state.

    Args:
      model: a `jm.transfer.classifier`, or any network by `jm.nn.as_stateful`.
      variables: variables of the model; they are not changed.
      data: labelled examples; see `fine_tune`.
      groups: patterns of each group, from the lowest layers to the top.
      optimizer: function `schedule -> transformation`, such as `optax.adam`.
      rate: largest learning rate of each stage.
      stage_steps: steps of each stage, at least 10; one epoch in the paper.
      last_steps: steps of the last stage, in which all groups are trained, at least 10; None for
        `stage_steps`.
      key: key of all stages.
      **settings: further keyword arguments of `fine_tune`.

    Returns:
      A `Fitted`: the trained variables, and the losses of all stages.

    Raises:
      ValueError: if `groups` is empty; and as in `fine_tune`.

    References:
      Howard & Ruder, Universal Language Model Fine-tuning for Text Classification, 2018, section 3.3.
    """
    check_number("rate", rate, above=0)
    check_count("stage_steps", stage_steps, _SHORTEST)
    if last_steps is not None:
        check_count("last_steps", last_steps, _SHORTEST)
    if not groups:
        raise ArgumentError("groups", "got none; pass the patterns of the layers from the lowest to the top")
    losses = []
    for stage in range(len(groups)):
        last = stage == len(groups) - 1
        steps = last_steps if last and last_steps is not None else stage_steps
        trained = [pattern for group in groups[len(groups) - 1 - stage :] for pattern in as_sequence(group)]
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


def check_model_and_data(model: Any, data: Any, name: str) -> None:
    """Check the kinds of `model` and `data`.

    Raises:
      ArgumentError: `model` is not a `StatefulModel`, or `data` not a `Batch`; the latter is called `name`.
    """
    wanted = "a model of jm.transfer.classifier, or one made by jm.nn.as_stateful"
    check_kind("model", model, StatefulModel, wanted)
    check_kind(name, data, Batch, "jm.Batch(x, y)")


def examples(
    data: Batch,
    weights: ExampleWeights | None = None,
    *,
    classes: int | None = None,
    name: str = "data",
) -> dict[str, Any]:
    """Return the checked arrays of labelled examples: "x", "y", and "weights" if there are any.

    Args:
      data: labelled examples.
      weights: weights of the examples; None for equal weights.
      classes: number of classes of "y"; None for targets of any kind.
      name: name of `data` in error messages.

    Raises:
      ValueError: if there are no examples, the numbers differ, or a label is outside [0, classes).
    """
    if data.x.shape[0] == 0 or data.x.shape[0] != data.y.shape[0]:
        raise ArgumentError(
            name,
            f"got {data.x.shape[0]} examples and {data.y.shape[0]} labels; there must be at least "
            "one example, and one label for each",
        )
    if data.mask is not None:
        raise ArgumentError(name, "got a mask; remove the padded examples and pass mask=None")
    if classes is not None:
        check_labels(name, data.y, data.x.shape[0], classes)
    arrays = {"x": data.x, "y": data.y}
    if weights is not None:
        arrays["weights"] = jnp.asarray(weights, jnp.float32)
        if arrays["weights"].shape != (data.x.shape[0],):
            raise ArgumentError(
                "weights",
                f"got shape {arrays['weights'].shape} for {data.x.shape[0]} examples; pass one for each",
            )
    return arrays


def _classes(model: StatefulModel, variables: Variables, data: Batch) -> int | None:
    """Return the number of outputs for an example; None where the output is not a vector."""
    if not data.x.shape[0]:
        return None
    outputs = jax.eval_shape(lambda x: model.apply(variables, as_images(x)), data.x[:1])
    return outputs.shape[1] if outputs.ndim == 2 else None


def mean_loss(losses: Float[Array, " n"], batch: Mapping[str, Array]) -> Float[Array, ""]:
    """Return the mean of w_i ℓ_i over a mini-batch of `examples`."""
    return (losses * batch["weights"]).mean() if "weights" in batch else losses.mean()


def _as_partial(penalty: Callable[[Params], Array]) -> jax.tree_util.Partial:
    return penalty if isinstance(penalty, jax.tree_util.Partial) else jax.tree_util.Partial(penalty)


@lru_cache(maxsize=64)
def _objective(model, loss, augment, keep_statistics, frozen_leaves, structure):
    """Return the objective, cached by its settings, so that equal trainings share one compiled loop."""
    frozen = jax.tree.unflatten(structure, frozen_leaves)
    # A user-defined model may lack this argument.
    settings = {"keep_statistics": True} if keep_statistics else {}

    def objective(params, state, batches, extra, progress, key):
        del progress
        batch = batches["examples"]
        augment_key, dropout = jax.random.split(key)
        x = as_images(batch["x"])
        if augment is not None:
            x = augment(augment_key, x)
        outputs, state = model.train({"params": params, **state}, x, dropout, frozen=frozen, **settings)
        value = mean_loss(loss(outputs, batch["y"]), batch)
        if "penalty" in extra:
            value = value + extra["penalty"](params)
        return value, state

    return objective


def _with_batch_statistics(
    model: StatefulModel,
    variables: Variables,
    data: Batch,
    key: Key,
    train: Patterns,
    batch_size: int,
    augment: Augment | None,
    steps: int,
    report: Callable[[int, float], None] | None,
) -> Variables:
    """Return `variables` with the running statistics that `fine_tune` reaches at unchanged parameters."""
    arrays = {"x": examples(data)["x"]}
    leaves, structure = jax.tree.flatten(frozen_mask(variables["params"], train))
    stats = variables[STATISTICS]
    # Running averages start at two values; their difference at the end shows the remaining weight of the
    # start, whatever a layer's momentum is.
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
        steps=steps,
        key=key,
        report=report,
    )

    def measured(before: Array, low: Array, high: Array) -> Array:
        weight = 1 - (high - low) / _FAR
        return jnp.where(weight > 0, low / jnp.where(weight > 0, weight, 1), before)

    return {**variables, STATISTICS: jax.tree.map(measured, stats, state["low"], state["high"])}


@lru_cache(maxsize=64)
def _measurement(model, augment, frozen_leaves, structure):
    """Return a zero objective that updates the running statistics of trained layers from two starts."""
    frozen = jax.tree.unflatten(structure, frozen_leaves)
    is_frozen = frozen_layers(frozen)

    def replace_trained(new, old):
        """Take `new` in trained layers and `old` in frozen ones."""

        def select(path, new, old):
            layer = tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path[:-1])
            return old if is_frozen(layer) else new

        return jax.tree_util.tree_map_with_path(select, new, old)

    def objective(params, state, batches, extra, progress, key):
        del extra, progress
        augment_key, dropout = jax.random.split(key)
        x = as_images(batches["examples"]["x"])
        if augment is not None:
            x = augment(augment_key, x)
        others = {name: tree for name, tree in state.items() if name not in ("low", "high", STATISTICS)}

        def update(start):
            # Frozen layers normalise by their running statistics and keep them.
            stats = replace_trained(start, state[STATISTICS])
            variables = {"params": params, **others, STATISTICS: stats}
            updated = model.train(variables, x, dropout, frozen=frozen)[1][STATISTICS]
            return replace_trained(updated, start)

        return jnp.zeros(()), {**state, "low": update(state["low"]), "high": update(state["high"])}

    return objective
