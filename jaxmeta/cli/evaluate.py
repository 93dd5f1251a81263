"""Evaluate pretrained features on episodes, by nearest prototypes."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmeta.checks import ArgumentError
from jaxmeta.cli import folders, sources
from jaxmeta.cli.backbones import load_backbone
from jaxmeta.cli.classifier import by_prototypes
from jaxmeta.cli.config import Config
from jaxmeta.cli.data import image_spec
from jaxmeta.cli.devices import machine, mesh_of
from jaxmeta.cli.report import plural
from jaxmeta.cli.run import evaluation_key, print_results, sentence
from jaxmeta.core import card_of
from jaxmeta.files import write_json
from jaxmeta.nn.norm import STATISTICS
from jaxmeta.training import Evaluation, evaluate_episodes
from jaxmeta.training.sharding import sample_of

# The method that weights are evaluated by; its settings are not asked for.
METHOD = "simple_shot"
# Tasks whose support sets give a network batch statistics that has none.
_SHOWN = 16


def evaluate_weights(
    source: str, config: Config, *, network: str | None = None, json: str | None = None
) -> dict[str, Any]:
    """Evaluate the features of a source on test tasks, and print the result.

    A query belongs to the class whose mean feature is nearest to its own, all of length one; nothing is
    trained.

    Args:
      source: a transfer, or a file or folder of weights.
      config: whose tasks, episodes, seed and devices count.
      network: of weights that do not say which network they are of.
      json: also write the result here.

    Raises:
      ArgumentError: tasks of something else than images; a source that takes no such images.
    """
    target = folders.output_file("json", json)
    backbone = load_backbone(source, network=network)
    mesh = mesh_of(config.run.devices, config.run.mesh, None)
    key = evaluation_key(config.run.seed)
    test = sources.tasks_of(config, "test", key)
    images = image_spec(test, config.names().source.ink)
    if images is None:
        raise ArgumentError("tasks", f"{config.tasks['name']} are no images")
    shape = (images.size, images.size, images.channels)
    input = backbone.input(shape, lambda channels: images.mean, images.ink)
    shown = jax.vmap(lambda key: sample_of(test)(key).support.x)(jax.random.split(key, _SHOWN))
    learner, params = by_prototypes(backbone, input, np.asarray(shown).reshape(-1, *shape))
    episodes = config.run.episodes
    found = Evaluation.of(evaluate_episodes(learner, params, test, episodes=episodes, key=key, devices=mesh))
    normalises = STATISTICS in params["model"]
    norm = "population" if normalises else "none"
    card = card_of(test)
    accuracy = {"inductive": {"mean": found.mean, "ci95": found.ci95, "norm": norm}}
    result = {
        "source": source,
        "learner": METHOD,
        "tasks": config.tasks["name"],
        "ways": card.ways,
        "shots": card.shots,
        "queries": card.queries,
        "episodes": episodes,
        "card": dataclasses.asdict(card),
        "images": input.images._asdict(),
        "inverted": input.inverted,
        "seed": config.run.seed,
        "accuracy": accuracy,
        **machine(mesh),
    }
    print(f"nearest prototypes of the features of {backbone.about}")
    if normalises:
        own = STATISTICS in (backbone.variables or {})
        whose = "those of the source" if own else f"of {_SHOWN} support sets: the source has none"
        print(f"batch statistics: {whose}")
    print(f"{sentence(card)}; {plural(episodes, 'task')}, seed {config.run.seed}")
    print_results(result, config)
    if target is not None:
        write_json(Path(target), result)
    return result
