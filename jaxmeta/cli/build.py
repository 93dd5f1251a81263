"""What a configuration stands for: its learner, network and outer optimizer."""

import inspect
from collections.abc import Callable
from typing import Any

import optax

from jaxmeta import losses, nn
from jaxmeta.checks import ArgumentError
from jaxmeta.cli import names, schema
from jaxmeta.cli.config import Config, kind_of
from jaxmeta.core import Learner
from jaxmeta.tasks.distortions import distort


def learner_of(
    config: Config, norm: str | None = None, network: Callable[[int | None], Any] | None = None
) -> Learner:
    """Build the learner of a configuration.

    Args:
      config: of a run.
      norm: in place of training's; learners of all norms share one set of parameters.
      network: `(output width) -> network`, in place of the configuration's.

    Raises:
      ArgumentError: what the factory or the network refuses.
    """
    found = config.names()
    factory, facts = found.learner, found.facts
    supplied = {
        "norm": norm or config.training.norm,
        "loss": losses.mse if kind_of(found.source) == "regression" else losses.cross_entropy,
        "augment": (facts.augment or distort) if config.training.distort else None,
        "strings": config.tasks.get("strings"),
    }
    given = {name: value for name, value in supplied.items() if schema.accepts(factory, name)}
    build = network or network_builder(config)
    if facts.network is not None:
        arguments, keywords = facts.network(build, config.tasks)
    elif takes_network(factory):
        arguments, keywords = (build(output_width(config)),), {}
    else:
        arguments, keywords = (), {}
    learner = factory(*arguments, **keywords, **given, **config.settings("learner"))
    # Reports and comparisons are of accuracy or mean squared error, whatever else a method of one's own has.
    return learner._replace(metric=None) if isinstance(learner, Learner) else learner


def takes_network(factory: Callable[..., Any]) -> bool:
    """Return whether a factory has a parameter for a network: one of one's own may bring its own."""
    kinds = {each.kind for each in inspect.signature(factory).parameters.values()}
    return bool(kinds - {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD})


def output_width(config: Config) -> int | None:
    """Return how many outputs the network has: None for an embedding, and one a target for regression."""
    if not config.names().facts.head:
        return None
    ways = config.tasks.get("train_ways")
    if ways is not None:
        return ways
    return len(config.tasks["targets"]) or 1 if config.names().source.columns is not None else 1


def network_builder(config: Config) -> Callable[[int | None], Any]:
    """Return what builds the configuration's network with a given output width."""
    network = config.names().network
    settings, width = config.settings("network"), names.width_name(network)

    def build(out: int | None) -> Any:
        supplied = {} if width is None else {width: out}
        made = network(**supplied, **settings)
        if config.training.precision == "float32":
            return made
        return nn.in_precision(nn.as_model(made), config.training.precision)

    return build


def first_order_of(config: Config) -> Learner | None:
    """Build the first-order version of the learner, where meta-gradients are to be compared with its own."""
    return learner_of(config.replaced(learner={"order": "first"})) if config.training.diagnose else None


def optimizer_of(config: Config) -> optax.GradientTransformation:
    """Build the outer optimizer, with its schedule, clipping and weight decay."""
    it = config.training
    rate: float | optax.Schedule = it.outer_lr
    if it.schedule == "cosine":
        rate = optax.cosine_decay_schedule(it.outer_lr, it.steps)
    if it.schedule == "linear":
        rate = optax.linear_schedule(it.outer_lr, 0.0, it.steps)
    if it.schedule == "step":
        assert it.decay_every is not None
        rate = optax.exponential_decay(it.outer_lr, it.decay_every, it.decay_factor, staircase=True)
    b1, b2 = it.outer_betas
    momentum = it.outer_momentum or None
    match it.outer_optimizer:
        case "adam":
            descend = optax.adam(rate, b1=b1, b2=b2, eps=it.outer_eps)
        case "adamw":
            descend = optax.adamw(rate, b1=b1, b2=b2, eps=it.outer_eps, weight_decay=it.weight_decay)
        case "sgd":
            descend = optax.sgd(rate, momentum=momentum)
        case "rmsprop":
            descend = optax.rmsprop(rate, eps=it.outer_eps, momentum=momentum)
    if it.outer_momentum and it.outer_optimizer in ("adam", "adamw"):
        raise ArgumentError(
            "outer_momentum", f"{it.outer_optimizer} has none; give --outer-betas, or take sgd or rmsprop"
        )
    before = []
    if it.clip is not None:
        before.append(optax.clip(it.clip))
    if it.clip_norm is not None:
        before.append(optax.clip_by_global_norm(it.clip_norm))
    if it.weight_decay and it.outer_optimizer != "adamw":
        before.append(optax.add_decayed_weights(it.weight_decay))
    return optax.chain(*before, descend) if before else descend
