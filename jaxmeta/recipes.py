"""The recipes of `jaxmeta transfer` by name: a source's body, a new head, and what is trained of them."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxmeta.bodies import Body
from jaxmeta.config import Form
from jaxmeta.core import Batch, Key
from jaxmeta.nn import StatefulModel, layers_in_order
from jaxmeta.nn.norm import STATISTICS
from jaxmeta.settings import flag_of
from jaxmeta.targets import Target
from jaxmeta.transfer import (
    adabn,
    classifier,
    discriminative,
    feature_extraction,
    fine_tune,
    gradual_unfreezing,
    input_adapter,
    l2_sp,
    matching,
    with_body,
)
from jaxmeta.transfer.classifier import BODY, HEAD, as_images
from jaxmeta.transfer.subtree import Report, leaves_by_path
from jaxmeta.transfer.subtree import Row as Leaf

TRAINED = ("steps", "rate", "batch")
SETTINGS = (*TRAINED, "train", "l2_sp")
_BATCH, _LEAST_STEPS, _EPOCHS = 32, 200, 10
# Groups of layers that gradual unfreezing has below the head, and the fewest steps of a slanted triangle.
_GROUPS, _TRIANGLE = 4, 10
# Of the rate of gradual unfreezing, whose lowest group has 1 / 2.6⁴ of it.
_TOP = 10
# Pixels at once in inference: those of 256 images of 84×84.
_AT_ONCE = 256 * 84 * 84


class Recipe(NamedTuple):
    """One way to learn a target.

    Attributes:
      description: what is trained, and how.
      takes: those of `SETTINGS` that it has.
    """

    description: str
    takes: tuple[str, ...] = ()


RECIPES = {
    "feature-extraction": Recipe("the body as it is, a ridge head on its features in closed form"),
    "linear-probe": Recipe("the body as it is, a logistic head on its features at its minimum"),
    "fine-tune": Recipe("body and a new head together", SETTINGS),
    "lp-ft": Recipe("a linear probe, then body and head together", SETTINGS),
    "gradual": Recipe(
        "from the head down one group of layers after another, lower ones slower", (*TRAINED, "l2_sp")
    ),
    "scratch": Recipe("the network with nothing learned before", TRAINED),
}


class Learnable(NamedTuple):
    """A classifier of the target with a source's body, before it learns.

    Attributes:
      model: of adapter, body and head.
      variables: the body's, and a new head.
      layers: of the body, from the lowest up.
      form: the images that the body takes, as later transfers from it want to know.
      inverted: whether dark is turned to light.
      statistics: whose batch statistics the body has, in words; None where it has none.
      leaves: what became of the source's.
    """

    model: StatefulModel
    variables: dict[str, Any]
    layers: tuple[str, ...]
    form: Form
    inverted: bool
    statistics: str | None
    leaves: Report

    @property
    def at_once(self) -> int:
        """Images that inference takes at once."""
        return max(1, min(256, _AT_ONCE // self.form.size**2))


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
    body: Body, images: Target, learn: Batch, *, size: int | None, channels: int | None, key: Key
) -> Learnable:
    """The body with a new head, behind what makes of the target's images those that it takes.

    Args:
      body: of a source.
      images: the target's.
      learn: those to learn from, whose mean says whether strokes are dark on light, and whose statistics
        a body gets that has none.
      size, channels: that the user asked for; None for the body's, or the target's where it does not say.
      key: of what is new.

    Raises:
      ValueError: the body takes no such images, or pixels by another number of channels.
    """
    size = size or body.size or images.x.shape[1]
    channels = body.channels(size, channels) or images.x.shape[3]
    mean = _mean(np.asarray(learn.x), channels)
    known = body.images or Form(size, channels, mean, images.ink)
    # Strokes are light on dark in training.
    inverted = known.ink and abs(mean - known.mean) > abs(1 - mean - known.mean)
    try:
        adapter = input_adapter(
            channels=channels, size=size, invert=inverted, mean=body.pixels.mean, std=body.pixels.std
        )
        model = classifier(body.model, len(images.classes), adapter=adapter)
        variables = model.init(jax.random.fold_in(key, 1), as_images(learn.x[:1]))
    except ValueError as error:
        raise ValueError(re.sub("^(mean|std): ", "--pixels: ", str(error))) from error
    form = known._replace(size=size, channels=channels)
    layers = layers_in_order(body.network, jnp.zeros((1, size, size, channels)))
    start = Learnable(model, variables, layers, form, inverted, None, body.report)
    normalises = STATISTICS in variables
    if body.variables is None:
        whose = "of the target's images, a running average in training" if normalises else None
        return start._replace(statistics=whose, leaves=_leaves(Report((), (), (), ()), variables))
    source = {STATISTICS: variables[STATISTICS][BODY]} if normalises else {}
    try:
        variables = with_body(variables, {**source, **body.variables})
    except ValueError as error:
        raise ValueError(f"--source: {body.source}: {error}") from error
    whose = "of the source" if normalises else None
    if normalises and STATISTICS not in body.variables:
        whose = "of the target's images to learn from, by AdaBN: the source has none"
        variables = adabn(model, variables, learn.x, batch=start.at_once)
    return start._replace(variables=variables, statistics=whose, leaves=_leaves(body.report, variables))


def _mean(x: np.ndarray, channels: int) -> float:
    """Of the images as the body gets them, in [0, 1]; luma is linear in the colours."""
    colours = x.mean((0, 1, 2), keepdims=True) / (255 if x.dtype == np.uint8 else 1)
    seen = input_adapter(channels=channels).apply({}, jnp.asarray(colours, jnp.float32))
    return round(float(seen.mean()), 4)


def _leaves(read: Report, variables: Mapping[str, Any]) -> Report:
    """What became of a source's leaves, from what became of them when they were read."""
    present = leaves_by_path(variables)
    into = {row: re.sub("^([^/]*)/", rf"\1/{BODY}/", str(row.target)) for row in read.taken}
    taken = tuple(row._replace(target=path) for row, path in into.items() if path in present)
    # The old head.
    dropped = tuple(row._replace(target=None) for row, path in into.items() if path not in present)
    cast = tuple(row._replace(target=into[row]) for row in read.cast if into[row] in present)
    there = {row.target for row in taken}
    new = tuple(
        Leaf(None, path, tuple(leaf.shape), leaf.dtype) for path, leaf in present.items() if path not in there
    )
    return Report(taken, new, read.left_over, (*read.dropped, *dropped), cast)


def check_settings(recipe: str, flags: Mapping[str, Any]) -> None:
    """Refuses flags that the recipe does not have, and values that cannot be.

    Raises:
      ValueError: there is such a flag.
    """
    for field in SETTINGS:
        if field in flags and field not in RECIPES[recipe].takes:
            raise ValueError(f"{flag_of(field)}: {recipe} has no such setting")
    for field, least in (("steps", 1), ("batch", 1), ("image_size", 1), ("rate", 0), ("l2_sp", 0)):
        # Written so that NaN fails.
        if field in flags and not flags[field] >= least:
            raise ValueError(f"{flag_of(field)}: got {flags[field]}; it must be at least {least}")


def settings_of(recipe: str, body: Body, start: Learnable, examples: int, flags: Mapping[str, Any]) -> dict:
    """What the recipe has of `SETTINGS`, as given or by default.

    Raises:
      ValueError: too few steps, or a pattern of --train that matches no parameter.
    """
    batch = flags.get("batch", _BATCH)
    least = (min(_GROUPS, len(start.layers)) + 1) * _TRIANGLE
    steps = flags.get("steps", max(_LEAST_STEPS, _EPOCHS * examples // batch))
    if recipe == "gradual" and steps < least:
        raise ValueError(f"--steps: got {steps}; {recipe} needs at least {least}, {_TRIANGLE} a stage")
    train = [part.strip() for part in flags["train"].split(",")] if "train" in flags else None
    if train is not None:
        matching(start.variables["params"], train, "--train")
    values = {
        "steps": steps,
        "rate": flags.get("rate", body.rate * (_TOP if recipe == "gradual" else 1)),
        "batch": batch,
        "train": train,
        "l2_sp": flags.get("l2_sp"),
    }
    return {field: values[field] for field in RECIPES[recipe].takes}


def trained(start: Learnable, settings: Mapping[str, Any]) -> list[str]:
    """Paths of the parameters that a recipe of these settings trains."""
    patterns = _patterns(settings) if "steps" in settings else [HEAD]
    return matching(start.variables["params"], patterns)


def _patterns(settings: Mapping[str, Any]) -> list[str]:
    # Of a new head that is not trained nothing could come.
    return ["**"] if settings.get("train") is None else [*settings["train"], HEAD]


def fit(
    recipe: str,
    start: Learnable,
    learn: Batch,
    settings: Mapping[str, Any],
    key: Key,
    report: Callable[[int, float], None] | None = None,
) -> Fit:
    """Learns by a recipe.

    Args:
      recipe: a name in `RECIPES`.
      start: what to learn from.
      learn: the examples.
      settings: as of `settings_of`.
      key: of mini-batches.
      report: called with step and loss after each twentieth of the steps.

    Raises:
      FloatingPointError: the loss is no longer finite.
    """
    model, variables = start.model, start.variables
    if recipe in ("feature-extraction", "linear-probe"):
        head = "ridge" if recipe == "feature-extraction" else "logistic"
        return Fit(feature_extraction(model, variables, learn, head=head), np.zeros(0, np.float32))
    steps, rate = settings["steps"], settings["rate"]
    common: dict[str, Any] = {"key": key, "batch_size": settings["batch"], "every": max(1, steps // 20)}
    if settings.get("l2_sp") is not None:
        common["penalty"] = l2_sp(variables["params"], shared=BODY, alpha=settings["l2_sp"])
    if recipe == "gradual":
        return _gradually(start, learn, steps, rate, report, common)
    probe = feature_extraction(model, variables, learn) if recipe == "lp-ft" else None
    fitted = fine_tune(
        model,
        probe or variables,
        learn,
        train=_patterns(settings),
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
