"""Recipes of `jaxmeta transfer`: ways to fine-tune a source's backbone and a new head."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxmeta.checks import ArgumentError, check_count, check_number
from jaxmeta.cli.backbones import Backbone
from jaxmeta.cli.data import ImageSpec
from jaxmeta.cli.sources import renaming
from jaxmeta.cli.target_data import Target
from jaxmeta.core import Batch, Key, Model
from jaxmeta.nn import StatefulModel, layers_in_order
from jaxmeta.nn.norm import STATISTICS
from jaxmeta.nn.stateful import Variables
from jaxmeta.training.progress import CountLines
from jaxmeta.transfer import (
    adabn,
    classifier,
    discriminative,
    feature_extraction,
    fine_tune,
    fine_tuning_probe,
    gradual_unfreezing,
    input_adapter,
    l2_sp,
    matching,
    with_body,
)
from jaxmeta.transfer.classifier import BODY, HEAD, as_images
from jaxmeta.transfer.subtree import Report, leaves_by_path
from jaxmeta.transfer.subtree import Row as Leaf

# Default batch size; by default ten epochs of steps, but at least 200.
_BATCH, _LEAST_STEPS, _EPOCHS = 32, 200, 10
# Groups of layers of gradual unfreezing below the head, and the fewest steps of a slanted triangle.
_GROUPS, _TRIANGLE = 4, 10
# Factor of the largest rate of gradual unfreezing, whose lowest group has 1 / 2.6⁴ of it.
_TOP = 10
# Pixels of a batch in inference, which bounds its memory: 256 images of 84×84.
_AT_ONCE = 256 * 84 * 84


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a recipe, as requested or as resolved; None where unset, or where the recipe has none.

    Attributes:
      steps: number of mini-batches.
      rate: largest step size of Adam.
      batch: number of examples in a mini-batch.
      train: patterns of the parts of the backbone that are trained; None for all.
      l2_sp: weight of the penalty that pulls the backbone towards the source's.
      keep_statistics: whether to keep the backbone's batch statistics.
    """

    steps: int | None = None
    rate: float | None = None
    batch: int | None = None
    train: tuple[str, ...] | None = None
    l2_sp: float | None = None
    keep_statistics: bool | None = None

    def given(self) -> dict[str, Any]:
        """Return the settings that are not None, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


_TRAINED = ("steps", "rate", "batch")
# Additional settings of recipes that train a pretrained backbone.
_PRETRAINED = ("l2_sp", "keep_statistics")


class Recipe(NamedTuple):
    """A way to learn a target.

    Attributes:
      description: trained parts and method, for reports.
      settings: names of its fields of `Settings`.
    """

    description: str
    settings: tuple[str, ...] = ()


RECIPES = {
    "feature-extraction": Recipe("the backbone frozen, a ridge head on its features in closed form"),
    "linear-probe": Recipe("the backbone frozen, a logistic head on its features at its minimum"),
    "fine-tune": Recipe("backbone and a new head together", (*_TRAINED, "train", *_PRETRAINED)),
    "lp-ft": Recipe("a linear probe, then backbone and head together", (*_TRAINED, "train", *_PRETRAINED)),
    "gradual": Recipe(
        "unfreezing one group of layers after another from the head down, at lower rates for lower ones",
        (*_TRAINED, *_PRETRAINED),
    ),
    "scratch": Recipe("the untrained network", _TRAINED),
}


class InitialClassifier(NamedTuple):
    """A classifier of the target with a source's backbone, before training.

    Attributes:
      model: adapter, backbone and head.
      adapter: conversion of images into the backbone's input.
      variables: variables of the backbone and of a new head.
      layers: names of the backbone's layers, from the lowest up.
      images: specification of the backbone's input, for later transfers from the result.
      inverted: whether dark and light are exchanged.
      statistics: origin of the backbone's batch statistics, in words; None where it has none.
      leaves: report on the source's leaves.
    """

    model: StatefulModel
    adapter: Model
    variables: dict[str, Any]
    layers: tuple[str, ...]
    images: ImageSpec
    inverted: bool
    statistics: str | None
    leaves: Report

    @property
    def at_once(self) -> int:
        """Return the batch size of inference."""
        return max(1, min(256, _AT_ONCE // self.images.size**2))


class Fit(NamedTuple):
    """Result of a recipe.

    Attributes:
      variables: trained variables of the model.
      losses: loss of each step.
      probe: variables after the linear probe of lp-ft; None for other recipes.
    """

    variables: dict[str, Any]
    losses: Float[Array | np.ndarray, " steps"]
    probe: dict[str, Any] | None = None


def initial_classifier(
    backbone: Backbone, target: Target, learn: Batch, *, size: int | None, channels: int | None, key: Key
) -> InitialClassifier:
    """Return a classifier of the target: an adapter of its images, the backbone, and a new head.

    Args:
      backbone: backbone of a source.
      target: data to learn.
      learn: images to learn from. Their mean decides whether strokes are dark on light, and a backbone
        without batch statistics gets theirs.
      size: side of the backbone's input; None for that of the source, or else of the target.
      channels: number of channels of the backbone's input; None as for `size`.
      key: key of the new variables.

    Returns:
      The classifier.

    Raises:
      ArgumentError: the backbone does not take such images, or `pixels` has another number of channels.
    """
    input = backbone.input(
        target.x.shape[1:],
        lambda channels: _mean_of(np.asarray(learn.x), channels),
        target.ink,
        size=size,
        channels=channels,
    )
    # The number of channels of `pixels` is checked when the adapter sees the first image.
    with renaming({"mean": "pixels", "std": "pixels"}):
        adapter = input.adapter()
        model = classifier(backbone.model, len(target.classes), adapter=adapter)
        variables = model.init(jax.random.fold_in(key, 1), as_images(learn.x[:1]))
    images = input.images
    layers = layers_in_order(backbone.network, jnp.zeros((1, images.size, images.size, images.channels)))
    start = InitialClassifier(
        model, adapter, variables, layers, images, input.inverted, None, backbone.report
    )
    normalises = STATISTICS in variables
    if backbone.variables is None:
        statistics = "of the target's images, a running average in training" if normalises else None
        return start._replace(statistics=statistics, leaves=_leaves(Report((), (), (), ()), variables))
    source = {STATISTICS: variables[STATISTICS][BODY]} if normalises else {}
    try:
        variables = with_body(variables, {**source, **backbone.variables})
    except ValueError as error:
        raise ArgumentError(backbone.argument, f"{backbone.source}: {error}") from error
    statistics = "of the source" if normalises else None
    if normalises and STATISTICS not in backbone.variables:
        statistics = "of the target's images to learn from, by AdaBN: the source has none"
        # One pass over the images for each layer with statistics.
        print("computing the backbone's batch statistics …", flush=True)
        variables = adabn(model, variables, learn.x, batch=start.at_once)
    return start._replace(
        variables=variables, statistics=statistics, leaves=_leaves(backbone.report, variables)
    )


def _mean_of(x: np.ndarray, channels: int) -> float:
    """Return the mean of images in [0, 1] once they have `channels` channels."""
    # Luma is linear in the colours, so that the mean colour is enough.
    colours = x.mean((0, 1, 2), keepdims=True) / (255 if x.dtype == np.uint8 else 1)
    seen = input_adapter(channels=channels).apply({}, jnp.asarray(colours, jnp.float32))
    return round(float(seen.mean()), 4)


def _leaves(read: Report, variables: Mapping[str, Any]) -> Report:
    """Return the report on a source's leaves in the classifier, from the report on reading them."""
    present = leaves_by_path(variables)
    into = {row: _in_classifier(str(row.target)) for row in read.taken}
    taken = tuple(row._replace(target=path) for row, path in into.items() if path in present)
    # The leaves of the old head have no place in the classifier.
    dropped = tuple(row._replace(target=None) for row, path in into.items() if path not in present)
    cast = tuple(row._replace(target=into[row]) for row in read.cast if into[row] in present)
    there = {row.target for row in taken}
    new = tuple(
        Leaf(None, path, tuple(leaf.shape), leaf.dtype) for path, leaf in present.items() if path not in there
    )
    return Report(taken, new, read.left_over, (*read.dropped, *dropped), cast)


def _in_classifier(path: str) -> str:
    """Return the path of a leaf of the backbone in the variables of the classifier."""
    collection, _, rest = path.partition("/")
    return f"{collection}/{BODY}/{rest}"


def check_settings(recipe: str, requested: Settings) -> None:
    """Check that the recipe has the settings that were requested, and that their values are valid.

    Raises:
      ArgumentError: the recipe does not have a setting, or its value is invalid.
    """
    for name, value in requested.given().items():
        if name not in RECIPES[recipe].settings:
            raise ArgumentError(name, f"{recipe} does not have this setting; leave it out")
        if name in ("steps", "batch"):
            check_count(name, value)
        if name in ("rate", "l2_sp"):
            check_number(name, value, 0)


def resolve_settings(
    recipe: str, backbone: Backbone, start: InitialClassifier, examples: int, requested: Settings
) -> Settings:
    """Return the settings of a recipe, with defaults in place of None.

    Args:
      recipe: name in `RECIPES`.
      backbone: backbone, which has a default rate.
      start: classifier to train.
      examples: number of examples to learn from.
      requested: requested settings.

    Returns:
      The settings.

    Raises:
      ArgumentError: there are too few steps, or a pattern of `train` matches no parameter.
    """
    batch = requested.batch or _BATCH
    least = (min(_GROUPS, len(start.layers)) + 1) * _TRIANGLE
    steps = requested.steps or max(_LEAST_STEPS, _EPOCHS * examples // batch)
    if recipe == "gradual" and steps < least:
        raise ArgumentError("steps", f"got {steps}; {recipe} needs at least {least}, {_TRIANGLE} a stage")
    if requested.train is not None:
        matching(start.variables["params"], requested.train, "train")
    rate = backbone.rate * (_TOP if recipe == "gradual" else 1)
    values: dict[str, Any] = {
        "steps": steps,
        "rate": rate if requested.rate is None else requested.rate,
        "batch": batch,
        "train": requested.train,
        "l2_sp": requested.l2_sp,
        "keep_statistics": requested.keep_statistics,
    }
    return Settings(**{name: values[name] for name in RECIPES[recipe].settings})


def trained_paths(start: InitialClassifier, settings: Settings) -> list[str]:
    """Return the paths of the parameters that a recipe with these settings trains."""
    patterns = [HEAD] if settings.steps is None else _patterns(settings)
    return matching(start.variables["params"], patterns)


def _patterns(settings: Settings) -> list[str]:
    # The head is new, so it is always trained.
    return ["**"] if settings.train is None else [*settings.train, HEAD]


def fit(
    recipe: str,
    start: InitialClassifier,
    learn: Batch,
    settings: Settings,
    key: Key,
    report: Callable[[int, float], None] | None = None,
    callback: Callable[[int, Variables], None] | None = None,
) -> Fit:
    """Train a classifier by a recipe.

    Args:
      recipe: name in `RECIPES`.
      start: classifier to train.
      learn: examples to learn from.
      settings: settings as returned by `resolve_settings`.
      key: key of the mini-batches.
      report: `(step, loss)`, called after each twentieth of the steps.
      callback: `(step, variables)`, called after `report`; steps are counted from the start of a stage.

    Returns:
      The trained variables and the losses.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    model, variables = start.model, start.variables
    if recipe in ("feature-extraction", "linear-probe"):
        head: Literal["ridge", "logistic"] = "ridge" if recipe == "feature-extraction" else "logistic"
        print(f"fitting a {head} head on the frozen backbone's features …", flush=True)
        fitted_head = feature_extraction(
            model,
            variables,
            learn,
            head=head,
            batch=start.at_once,
            progress=CountLines("features of the images to learn from", "images"),
        )
        return Fit(fitted_head, np.zeros(0, np.float32))
    steps, rate = settings.steps, settings.rate
    assert steps is not None
    assert rate is not None
    common: dict[str, Any] = {
        "key": key,
        "batch_size": settings.batch,
        "every": max(1, steps // 20),
        "keep_statistics": bool(settings.keep_statistics),
        "callback": callback,
    }
    if settings.l2_sp is not None:
        common["penalty"] = l2_sp(variables["params"], shared=BODY, alpha=settings.l2_sp)
    if recipe == "gradual":
        return _gradually(start, learn, steps, rate, report, common)
    common["train"] = _patterns(settings)
    probe = None
    if recipe == "lp-ft":
        print("fitting the linear probe …", flush=True)
        # Passes over mini-batches for their statistics, and over all images for their features, take minutes
        # for a large backbone on a CPU.
        probe = fine_tuning_probe(
            model,
            variables,
            learn,
            probe={"batch": start.at_once},
            progress=CountLines("linear probe", "images"),
            **common,
        )
    fitted = fine_tune(
        model,
        probe or variables,
        learn,
        optimizer=optax.adam(optax.cosine_decay_schedule(rate, steps)),
        steps=steps,
        report=report,
        **common,
    )
    return Fit(fitted.variables, fitted.losses, probe)


def _gradually(
    start: InitialClassifier,
    learn: Batch,
    steps: int,
    rate: float,
    report: Callable[[int, float], None] | None,
    common: Mapping[str, Any],
) -> Fit:
    parts = np.array_split(np.array(start.layers), _GROUPS)
    groups = [*([f"{BODY}/{layer}" for layer in part] for part in parts if part.size), [HEAD]]
    stage_steps = steps // len(groups)
    before, last = 0, 0  # steps of earlier stages, and of the current one

    def counted(step: int, loss: float) -> None:
        nonlocal before, last
        # Each stage counts from its own start: a smaller number is the next stage's.
        before, last = (before + last if step <= last else before), step
        if report is not None:
            report(before + step, loss)

    fitted = gradual_unfreezing(
        start.model,
        start.variables,
        learn,
        groups,
        optimizer=lambda schedule: discriminative(optax.adam(schedule), start.variables["params"], groups),
        rate=rate,
        stage_steps=stage_steps,
        last_steps=steps - stage_steps * (len(groups) - 1),
        report=counted,
        **common,
    )
    return Fit(fitted.variables, fitted.losses)
