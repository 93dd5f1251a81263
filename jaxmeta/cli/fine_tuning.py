"""The recipes of `jaxmeta transfer` by name: a source's backbone, a new head, and what is trained of them."""

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
from jaxmeta.core import Batch, Key
from jaxmeta.nn import StatefulModel, layers_in_order
from jaxmeta.nn.norm import STATISTICS
from jaxmeta.nn.stateful import Variables
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

_BATCH, _LEAST_STEPS, _EPOCHS = 32, 200, 10
# Groups of layers that gradual unfreezing has below the head, and the fewest steps of a slanted triangle.
_GROUPS, _TRIANGLE = 4, 10
# Of the rate of gradual unfreezing, whose lowest group has 1 / 2.6⁴ of it.
_TOP = 10
# Pixels at once in inference: those of 256 images of 84×84.
_AT_ONCE = 256 * 84 * 84


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a recipe learns: what was asked for, or what it runs with; None of what a recipe does not have.

    Attributes:
      steps: mini-batches.
      rate: largest step size of Adam.
      batch: examples in each mini-batch.
      train: patterns of the parts of the backbone that are trained; None for all.
      l2_sp: weight of what pulls the backbone towards the source's.
      keep_statistics: whether the backbone keeps the batch statistics that it has.
    """

    steps: int | None = None
    rate: float | None = None
    batch: int | None = None
    train: tuple[str, ...] | None = None
    l2_sp: float | None = None
    keep_statistics: bool | None = None

    def given(self) -> dict[str, Any]:
        """Return what is not None, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


_TRAINED = ("steps", "rate", "batch")
# Of recipes that train what has learned already.
_PRETRAINED = ("l2_sp", "keep_statistics")


class Recipe(NamedTuple):
    """One way to learn a target.

    Attributes:
      description: what is trained, and how.
      settings: names of the `Settings` that it has.
    """

    description: str
    settings: tuple[str, ...] = ()


RECIPES = {
    "feature-extraction": Recipe("the backbone as it is, a ridge head on its features in closed form"),
    "linear-probe": Recipe("the backbone as it is, a logistic head on its features at its minimum"),
    "fine-tune": Recipe("backbone and a new head together", (*_TRAINED, "train", *_PRETRAINED)),
    "lp-ft": Recipe("a linear probe, then backbone and head together", (*_TRAINED, "train", *_PRETRAINED)),
    "gradual": Recipe(
        "from the head down one group of layers after another, lower ones slower", (*_TRAINED, *_PRETRAINED)
    ),
    "scratch": Recipe("the network with nothing learned before", _TRAINED),
}


class Learnable(NamedTuple):
    """A classifier of the target with a source's backbone, before it learns.

    Attributes:
      model: of adapter, backbone and head.
      variables: the backbone's, and a new head.
      layers: of the backbone, from the lowest up.
      images: those that the backbone takes, as later transfers from it want to know.
      inverted: whether dark is turned to light.
      statistics: whose batch statistics the backbone has, in words; None where it has none.
      leaves: what became of the source's.
    """

    model: StatefulModel
    variables: dict[str, Any]
    layers: tuple[str, ...]
    images: ImageSpec
    inverted: bool
    statistics: str | None
    leaves: Report

    @property
    def at_once(self) -> int:
        """Return how many images inference takes at once."""
        return max(1, min(256, _AT_ONCE // self.images.size**2))


class Fit(NamedTuple):
    """What a recipe ends with.

    Attributes:
      variables: of the model.
      losses: of each step.
      probe: the variables after the linear probe that it began with; None where it did not.
    """

    variables: dict[str, Any]
    losses: Float[Array | np.ndarray, " steps"]
    probe: dict[str, Any] | None = None


def learnable(
    backbone: Backbone, target: Target, learn: Batch, *, size: int | None, channels: int | None, key: Key
) -> Learnable:
    """Return the backbone with a new head, behind what makes of the target's images those that it takes.

    Args:
      backbone: of a source.
      target: what to learn.
      learn: images to learn from, whose mean says whether strokes are dark on light, and whose statistics a
        backbone gets that has none.
      size: side of the images that the backbone is given; None for its own, or the target's where it does not
        say.
      channels: likewise.
      key: of what is new.

    Raises:
      ArgumentError: the backbone takes no such images, or pixels by another number of channels.
    """
    input = backbone.input(
        target.x.shape[1:],
        lambda channels: _mean_of(np.asarray(learn.x), channels),
        target.ink,
        size=size,
        channels=channels,
    )
    # Its pixels are looked at with the first images.
    with renaming({"mean": "pixels", "std": "pixels"}):
        model = classifier(backbone.model, len(target.classes), adapter=input.adapter())
        variables = model.init(jax.random.fold_in(key, 1), as_images(learn.x[:1]))
    images = input.images
    layers = layers_in_order(backbone.network, jnp.zeros((1, images.size, images.size, images.channels)))
    start = Learnable(model, variables, layers, images, input.inverted, None, backbone.report)
    normalises = STATISTICS in variables
    if backbone.variables is None:
        whose = "of the target's images, a running average in training" if normalises else None
        return start._replace(statistics=whose, leaves=_leaves(Report((), (), (), ()), variables))
    source = {STATISTICS: variables[STATISTICS][BODY]} if normalises else {}
    try:
        variables = with_body(variables, {**source, **backbone.variables})
    except ValueError as error:
        raise ArgumentError(backbone.argument, f"{backbone.source}: {error}") from error
    whose = "of the source" if normalises else None
    if normalises and STATISTICS not in backbone.variables:
        whose = "of the target's images to learn from, by AdaBN: the source has none"
        variables = adabn(model, variables, learn.x, batch=start.at_once)
    return start._replace(variables=variables, statistics=whose, leaves=_leaves(backbone.report, variables))


def _mean_of(x: np.ndarray, channels: int) -> float:
    """Return the mean of images as the backbone gets them, in [0, 1]; luma is linear in the colours."""
    colours = x.mean((0, 1, 2), keepdims=True) / (255 if x.dtype == np.uint8 else 1)
    seen = input_adapter(channels=channels).apply({}, jnp.asarray(colours, jnp.float32))
    return round(float(seen.mean()), 4)


def _leaves(read: Report, variables: Mapping[str, Any]) -> Report:
    """Return what became of a source's leaves, from what became of them when they were read."""
    present = leaves_by_path(variables)
    into = {row: _in_classifier(str(row.target)) for row in read.taken}
    taken = tuple(row._replace(target=path) for row, path in into.items() if path in present)
    # The old head.
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


def check_settings(recipe: str, asked: Settings) -> None:
    """Check that the recipe has the settings, and that their values are valid.

    Raises:
      ArgumentError: there is one.
    """
    for name, value in asked.given().items():
        if name not in RECIPES[recipe].settings:
            raise ArgumentError(name, f"{recipe} has no such setting")
        if name in ("steps", "batch"):
            check_count(name, value)
        if name in ("rate", "l2_sp"):
            check_number(name, value, 0)


def resolved(recipe: str, backbone: Backbone, start: Learnable, examples: int, asked: Settings) -> Settings:
    """Return the settings of a recipe, as asked for or by default.

    Raises:
      ArgumentError: too few steps, or a pattern of `train` that matches no parameter.
    """
    batch = asked.batch or _BATCH
    least = (min(_GROUPS, len(start.layers)) + 1) * _TRIANGLE
    steps = asked.steps or max(_LEAST_STEPS, _EPOCHS * examples // batch)
    if recipe == "gradual" and steps < least:
        raise ArgumentError("steps", f"got {steps}; {recipe} needs at least {least}, {_TRIANGLE} a stage")
    if asked.train is not None:
        matching(start.variables["params"], asked.train, "train")
    rate = backbone.rate * (_TOP if recipe == "gradual" else 1)
    values: dict[str, Any] = {
        "steps": steps,
        "rate": rate if asked.rate is None else asked.rate,
        "batch": batch,
        "train": asked.train,
        "l2_sp": asked.l2_sp,
        "keep_statistics": asked.keep_statistics,
    }
    return Settings(**{name: values[name] for name in RECIPES[recipe].settings})


def trained(start: Learnable, settings: Settings) -> list[str]:
    """Return the paths of the parameters that a recipe of these settings trains."""
    patterns = [HEAD] if settings.steps is None else _patterns(settings)
    return matching(start.variables["params"], patterns)


def _patterns(settings: Settings) -> list[str]:
    # Of a new head that is not trained nothing could come.
    return ["**"] if settings.train is None else [*settings.train, HEAD]


def fit(
    recipe: str,
    start: Learnable,
    learn: Batch,
    settings: Settings,
    key: Key,
    report: Callable[[int, float], None] | None = None,
    look: Callable[[int, Variables], None] | None = None,
) -> Fit:
    """Learn by a recipe.

    Args:
      recipe: a name in `RECIPES`.
      start: what to learn from.
      learn: the examples.
      settings: as of `resolved`.
      key: of mini-batches.
      report: called with step and loss after each twentieth of the steps.
      look: called likewise, after `report`, with the variables; the step is that of the stage.

    Raises:
      FloatingPointError: the loss is no longer finite.
    """
    model, variables = start.model, start.variables
    if recipe in ("feature-extraction", "linear-probe"):
        head: Literal["ridge", "logistic"] = "ridge" if recipe == "feature-extraction" else "logistic"
        return Fit(feature_extraction(model, variables, learn, head=head), np.zeros(0, np.float32))
    steps, rate = settings.steps, settings.rate
    assert steps is not None
    assert rate is not None
    common: dict[str, Any] = {
        "key": key,
        "batch_size": settings.batch,
        "every": max(1, steps // 20),
        "keep_statistics": bool(settings.keep_statistics),
        "look": look,
    }
    if settings.l2_sp is not None:
        common["penalty"] = l2_sp(variables["params"], shared=BODY, alpha=settings.l2_sp)
    if recipe == "gradual":
        return _gradually(start, learn, steps, rate, report, common)
    common["train"] = _patterns(settings)
    probe = fine_tuning_probe(model, variables, learn, **common) if recipe == "lp-ft" else None
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
    start: Learnable,
    learn: Batch,
    steps: int,
    rate: float,
    report: Callable[[int, float], None] | None,
    common: Mapping[str, Any],
) -> Fit:
    parts = np.array_split(np.array(start.layers), _GROUPS)
    groups = [*([f"{BODY}/{layer}" for layer in part] for part in parts if part.size), [HEAD]]
    stage_steps = steps // len(groups)
    before, last = 0, 0

    def counted(step: int, loss: float) -> None:
        nonlocal before, last
        # Each stage counts its own steps.
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
