"""Learners, networks and outer optimizers, built from a configuration."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import optax

from jaxmeta import losses, nn
from jaxmeta.checks import ArgumentError
from jaxmeta.cli import names, schema
from jaxmeta.cli.config import INPUT, Config, kind_of
from jaxmeta.cli.sources import renaming
from jaxmeta.core import Learner, Model, Params, PyTree
from jaxmeta.nn.lora import FACTORS, NETWORK
from jaxmeta.tasks.distortions import distort
from jaxmeta.transfer import frozen_mask, input_adapter
from jaxmeta.transfer.freezing import only_unfrozen

# Name of the network in a learner's parameters.
MODEL = "model"


def learner_of(
    config: Config, norm: str | None = None, network: Callable[[int | None], Any] | None = None
) -> Learner:
    """Build the learner of a configuration.

    Args:
      config: configuration of a run.
      norm: statistics of batch normalisation; None for those of training. It changes no parameter.
      network: `(output width) -> network`; None for the configuration's.

    Returns:
      The learner.

    Raises:
      ArgumentError: the factory or the network does not accept a setting.
    """
    objects = config.names()
    factory, facts = objects.learner, objects.facts
    augment = facts.augment or distort
    if not objects.source.ink and schema.accepts(augment, "fill"):
        # Only strokes have a background of 0.
        augment = partial(augment, fill="edge")
    supplied = {
        "norm": norm or config.training.norm,
        "loss": losses.mse if kind_of(objects.source) == "regression" else losses.cross_entropy,
        "augment": augment if config.training.distort else None,
        "strings": config.tasks.get("strings"),
    }
    supplied = {name: value for name, value in supplied.items() if schema.accepts(factory, name)}
    build = network or network_builder(config)
    if facts.network is not None:
        arguments, keywords = facts.network(build, config.tasks)
    elif names.takes_network(factory):
        arguments, keywords = (build(output_width(config)),), {}
    else:
        arguments, keywords = (), {}
    learner = factory(*arguments, **keywords, **supplied, **config.settings("learner"))
    # Reports and comparisons use accuracy or mean squared error, even for a learner with its own metric.
    return learner._replace(metric=None) if isinstance(learner, Learner) else learner


def output_width(config: Config) -> int | None:
    """Return the network's number of outputs: ways, regression targets, or None for an embedding."""
    if not config.names().facts.head:
        return None
    ways = config.tasks.get("train_ways")
    if ways is not None:
        return ways
    return len(config.tasks["targets"]) or 1 if config.names().source.columns is not None else 1


def network_builder(config: Config) -> Callable[[int | None], Any]:
    """Return a function that builds the configuration's network with a given output width."""
    network = config.names().network
    settings, width = config.settings("network"), names.width_name(network)
    training, adapter = config.training, input_adapter_of(config)

    def build(out: int | None) -> Any:
        supplied = {} if width is None else {width: out}
        built = network(**supplied, **settings)
        if training.lora is not None:
            built = nn.lora(built, rank=training.lora)
        if training.precision != "float32":
            built = nn.in_precision(nn.as_model(built), training.precision)
        # Outermost, so that images are resized and scaled in float32.
        return built if adapter is None else nn.preprocessed(built, adapter)

    return build


def input_adapter_of(config: Config) -> Model | None:
    """Return the conversion of images before the network; None where there is none."""
    training = config.training
    if all(getattr(training, name) == default for name, default in INPUT.items()):
        return None
    with renaming({name.removeprefix("input_"): name for name in INPUT}):
        return input_adapter(
            size=training.input_size,
            channels=training.input_channels,
            mean=training.input_mean,
            std=training.input_std,
            method=training.input_method,
        )


def trained_patterns(config: Config) -> tuple[str, ...] | None:
    """Return the patterns of the network's parameters that are trained; None for all of them."""
    training = config.training
    if training.train is not None or training.lora is None:
        return training.train
    # The head of a meta-learned network is new, so it is trained together with the factors.
    return (FACTORS, f"{NETWORK}/head") if config.names().facts.head else (FACTORS,)


def first_order_of(config: Config) -> Learner | None:
    """Build the first-order version of the learner that --diagnose compares with; None without --diagnose."""
    return learner_of(config.replaced(learner={"order": "first"})) if config.training.diagnose else None


def optimizer_of(config: Config) -> optax.GradientTransformation:
    """Build the outer optimizer, with its schedule, clipping and weight decay.

    Raises:
      ArgumentError: the optimizer has no momentum, but the configuration sets one.
    """
    training = config.training
    rate: float | optax.Schedule = training.outer_lr
    if training.schedule == "cosine":
        rate = optax.cosine_decay_schedule(training.outer_lr, training.steps)
    if training.schedule == "linear":
        rate = optax.linear_schedule(training.outer_lr, 0.0, training.steps)
    if training.schedule == "step":
        assert training.decay_every is not None
        rate = optax.exponential_decay(
            training.outer_lr, training.decay_every, training.decay_factor, staircase=True
        )
    b1, b2 = training.outer_betas
    momentum = training.outer_momentum or None
    match training.outer_optimizer:
        case "adam":
            update = optax.adam(rate, b1=b1, b2=b2, eps=training.outer_eps)
        case "adamw":
            update = optax.adamw(
                rate, b1=b1, b2=b2, eps=training.outer_eps, weight_decay=training.weight_decay
            )
        case "sgd":
            update = optax.sgd(rate, momentum=momentum)
        case "rmsprop":
            update = optax.rmsprop(rate, eps=training.outer_eps, momentum=momentum)
    if training.outer_momentum and training.outer_optimizer in ("adam", "adamw"):
        raise ArgumentError(
            "outer_momentum",
            f"got {training.outer_momentum:g}, but {training.outer_optimizer} has no momentum; give "
            "--outer-betas, or choose sgd or rmsprop",
        )
    transforms = []
    if training.clip is not None:
        transforms.append(optax.clip(training.clip))
    if training.clip_norm is not None:
        transforms.append(optax.clip_by_global_norm(training.clip_norm))
    if training.weight_decay and training.outer_optimizer != "adamw":
        transforms.append(optax.add_decayed_weights(training.weight_decay))
    optimizer = optax.chain(*transforms, update) if transforms else update
    patterns = trained_patterns(config)
    if patterns is None:
        return optimizer

    def frozen(params: Params) -> PyTree:
        if not (isinstance(params, Mapping) and MODEL in params):
            return frozen_mask(params, patterns)
        all_trained = jax.tree.map(lambda leaf: False, params)
        return {**all_trained, MODEL: frozen_mask(params[MODEL], patterns)}

    return only_unfrozen(optimizer, frozen)
