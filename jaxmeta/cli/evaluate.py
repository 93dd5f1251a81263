"""Evaluation of pretrained features on episodes, by nearest prototypes."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmeta.checks import ArgumentError
from jaxmeta.cli import folders, sources
from jaxmeta.cli import per_class as per_class_report
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
from jaxmeta.training import Evaluation, evaluate_classes, evaluate_episodes
from jaxmeta.training.sharding import sample_of

# Method with which weights are evaluated; its settings have no flags.
METHOD = "simple_shot"
# Number of support sets to compute batch statistics from, if the source has none.
_STATISTICS_TASKS = 16


def evaluate_weights(
    source: str,
    config: Config,
    *,
    network: str | None = None,
    json: str | None = None,
    per_class: bool = False,
    confusion: str | None = None,
) -> dict[str, Any]:
    """Evaluate the features of a source on test tasks, and print the result.

    A query is assigned to the class whose mean feature is nearest to its own, with features normalised to
    length 1. Nothing is trained.

    Args:
      source: output folder of a transfer, or a file or folder of weights.
      config: configuration of tasks, episodes, seed and devices.
      network: name of the network, for weights that do not name it.
      json: file to write the result to.
      per_class: whether to add accuracy and confusions of each class to the result.
      confusion: PNG file to draw the confusion matrix to.

    Returns:
      The result, as in report.json.

    Raises:
      ArgumentError: the tasks have no images, or the source does not take such images.
    """
    target, picture = folders.output_file("json", json), folders.output_file("confusion", confusion)
    backbone = load_backbone(source, network=network)
    mesh = mesh_of(config.run.devices, config.run.mesh, None)
    key = evaluation_key(config.run.seed)
    test = sources.tasks_of(config, "test", key)
    images = image_spec(test, config.names().source.ink)
    if images is None:
        raise ArgumentError("tasks", f"{config.tasks['name']} has no images; give tasks of images")
    by_class = per_class or picture is not None
    if by_class:
        per_class_report.check_named(test, "per_class" if per_class else "confusion")
    shape = (images.size, images.size, images.channels)
    input = backbone.input(shape, lambda channels: images.mean, images.ink)
    supports = jax.vmap(lambda key: sample_of(test)(key).support.x)(jax.random.split(key, _STATISTICS_TASKS))
    learner, params = by_prototypes(backbone, input, np.asarray(supports).reshape(-1, *shape))
    episodes = config.run.episodes
    drawn: dict[str, Any] = {"episodes": episodes, "key": key, "devices": mesh}
    classes = {"inductive": evaluate_classes(learner, params, test, **drawn)} if by_class else {}
    values = classes["inductive"].scores if by_class else evaluate_episodes(learner, params, test, **drawn)
    evaluation = Evaluation.of(values)
    normalises = STATISTICS in params["model"]
    norm = "population" if normalises else "none"
    card = card_of(test)
    accuracy = {"inductive": {"mean": evaluation.mean, "ci95": evaluation.ci95, "norm": norm}}
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
        **({"per_class": per_class_report.as_json(classes)} if classes else {}),
        **machine(mesh),
    }
    print(f"nearest prototypes of the features of {backbone.about}")
    if normalises:
        own = STATISTICS in (backbone.variables or {})
        origin = "of the source" if own else f"of {_STATISTICS_TASKS} support sets, since the source has none"
        print(f"batch statistics: {origin}")
    print(f"{sentence(card)}; {plural(episodes, 'task')}, seed {config.run.seed}")
    print_results(result, config)
    if target is not None:
        write_json(Path(target), result)
    if per_class:
        per_class_report.print_classes(classes)
    if picture is not None:
        per_class_report.draw_classes(picture, classes, f"{source} on {card.tasks}")
    return result
