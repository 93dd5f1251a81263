"""Evaluation of pretrained features on episodes, by one head or a table of several."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmeta.checks import ArgumentError
from jaxmeta.cli import folders, sources
from jaxmeta.cli import per_class as per_class_report
from jaxmeta.cli.backbones import load_backbone
from jaxmeta.cli.config import Config
from jaxmeta.cli.data import image_spec
from jaxmeta.cli.devices import machine, mesh_of
from jaxmeta.cli.features import model_of, needs_statistics
from jaxmeta.cli.heads import DEFAULT, HEADS, Head, find_head
from jaxmeta.cli.parser import print_table
from jaxmeta.cli.report import plural
from jaxmeta.cli.run import evaluation_key, print_results, sentence
from jaxmeta.core import Key, Task, TaskDistribution, TaskStream, card_of, episode_keys
from jaxmeta.files import write_json
from jaxmeta.nn.norm import STATISTICS
from jaxmeta.tasks.class_names import have_names, slot_names
from jaxmeta.tasks.embedded import as_embedding, embed_batches, embed_tasks, is_stored
from jaxmeta.tasks.feature_cache import Embedder, features_description
from jaxmeta.training import Evaluation, evaluate_classes, evaluate_episodes
from jaxmeta.training.progress import CountLines, format_interval
from jaxmeta.training.sharding import as_argument, sample_of

# Number of support sets to compute batch statistics from, if the source has none.
_STATISTICS_TASKS = 16
# Number of episodes that are drawn at once to embed their images.
_BLOCK = 100


def evaluate_weights(
    source: str,
    config: Config,
    *,
    learner: Sequence[str] | None = None,
    network: str | None = None,
    json: str | None = None,
    per_class: bool = False,
    confusion: str | None = None,
) -> dict[str, Any]:
    """Evaluate the features of a source on test tasks by heads that learn from their support sets.

    The features are fixed, and those of each image are computed once. All heads get the same episodes.

    Args:
      source: output folder of a transfer, or a file or folder of weights.
      config: configuration of tasks, episodes, seed and devices.
      learner: names of heads in `HEADS`; None for all.
      network: name of the network, for weights that do not name it.
      json: file to write the result to.
      per_class: whether to add accuracy and confusions of each class to the result, of the named head, or
        by default of `DEFAULT`.
      confusion: PNG file to draw the confusion matrix of the same head to.

    Returns:
      The result, as in report.json.

    Raises:
      ArgumentError: a name in `learner` is unknown, the tasks have no images, or the source does not take
        such images.
    """
    target, picture = folders.output_file("json", json), folders.output_file("confusion", confusion)
    by_class = per_class or picture is not None
    flag = "per_class" if per_class else "confusion"
    names = tuple(dict.fromkeys(learner)) if learner else tuple(HEADS)
    heads = {name: find_head(name) for name in names}
    if by_class and learner and len(names) > 1:
        raise ArgumentError(flag, f"is for one head, and --learner names {', '.join(names)}; name one")
    # The head of the result's entries that are about a single head, such as `accuracy`.
    first = DEFAULT if DEFAULT in names else names[0]
    # Before the weights are read, which starts JAX and fixes the number of devices.
    mesh = mesh_of(config.run.devices, config.run.mesh, None)
    backbone = load_backbone(source, network=network)
    key = evaluation_key(config.run.seed)
    test = sources.tasks_of(config, "test", key)
    images = image_spec(test, config.names().source.ink)
    if images is None:
        raise ArgumentError("tasks", f"{config.tasks['name']} has no images; give tasks of images")
    if by_class:
        per_class_report.check_named(test, flag)
    shape = (images.size, images.size, images.channels)
    input = backbone.input(shape, lambda channels: images.mean, images.ink)
    lacks_statistics = needs_statistics(backbone, input)
    model = model_of(backbone, input, _supports(test, key) if lacks_statistics else None)
    episodes = config.run.episodes
    started = time.perf_counter()
    function = as_embedding(test, model)
    embed = Embedder(
        function, description=features_description(function), report=CountLines("features", "images")
    )
    features = _features_of(test, function, embed, backbone.about, key, episodes)
    seconds = time.perf_counter() - started
    card = card_of(test)
    print(f"features of {backbone.about}: {_format_counts(embed, seconds)}")
    normalises = STATISTICS in (backbone.variables or {}) or lacks_statistics
    if normalises:
        support_sets = f"of {_STATISTICS_TASKS} support sets, since the source has none"
        print(f"batch statistics: {support_sets if lacks_statistics else 'of the source'}")
    print(f"{sentence(card)}; {plural(episodes, 'task')}, seed {config.run.seed}")

    episode_settings: dict[str, Any] = {"episodes": episodes, "key": key, "devices": mesh}
    task = sample_of(features)(key)
    results, classes = {}, {}
    for name, head in heads.items():
        started = time.perf_counter()
        params = head.learner.init(jax.random.key(0), task)
        if by_class and name == first:
            classes[_row(head)] = evaluate_classes(head.learner, params, features, **episode_settings)
            values = classes[_row(head)].scores
        else:
            values = evaluate_episodes(head.learner, params, features, **episode_settings)
        evaluation = Evaluation.of(values)
        results[name] = {
            "mean": evaluation.mean,
            "ci95": evaluation.ci95,
            "row": _row(head),
            "seconds": round(time.perf_counter() - started, 2),
        }
    norm = "population" if normalises else "none"
    first_accuracy = {"mean": results[first]["mean"], "ci95": results[first]["ci95"], "norm": norm}
    result = {
        "source": source,
        "learner": first,
        "tasks": config.tasks["name"],
        "ways": card.ways,
        "shots": card.shots,
        "queries": card.queries,
        "episodes": episodes,
        "card": dataclasses.asdict(card),
        "images": input.images._asdict(),
        "inverted": input.inverted,
        "seed": config.run.seed,
        "accuracy": {_row(heads[first]): first_accuracy},
        "heads": results,
        **({"per_class": per_class_report.as_json(classes)} if classes else {}),
        **machine(mesh),
    }
    if len(results) == 1:
        print(f"{first}: {heads[first].about}")
        print_results(result, config)
    else:
        _print_heads(results)
    if target is not None:
        write_json(Path(target), result)
    if per_class:
        per_class_report.print_classes(classes)
    if picture is not None:
        per_class_report.draw_classes(picture, classes, f"{source} on {card.tasks}")
    return result


def _supports(test: TaskDistribution | TaskStream, key: Key) -> np.ndarray:
    """Return the images of some support sets."""
    keys = jax.random.split(key, _STATISTICS_TASKS)
    x = np.asarray(jax.vmap(lambda key: sample_of(test)(key).support.x)(keys))
    return x.reshape(-1, *x.shape[2:])


def _features_of(
    test: TaskDistribution | TaskStream, function: Any, embed: Embedder, name: str, key: Key, episodes: int
) -> TaskDistribution | TaskStream:
    """Return the episodes of the evaluation with features, in memory.

    Args:
      test: test tasks.
      function: embedding of images as a pytree.
      embed: function that embeds images of the host.
      name: description of the network, for the card.
      key: key of the evaluation.
      episodes: number of episodes.
    """
    if isinstance(test, TaskStream):
        features = embed_tasks(test, function, embed, name)
        assert isinstance(features, TaskStream)
        # Each head reads the stream again.
        return features._replace(at=functools.cache(features.at), batches=None)
    if is_stored(test):
        keys = episode_keys(key, jnp.arange(episodes))[:, 0]
        return embed_tasks(test, function, embed, name, keys)
    # Tasks that are drawn anew for each episode: each head gets the same drawings, in blocks of equal size so
    # that the sampler is compiled once.
    size = -(-episodes // -(-episodes // _BLOCK))
    sample = as_argument(test.sample)

    def keys_at(step: int) -> Key:
        return episode_keys(key, step * size + jnp.arange(size))[:, 0]

    @functools.cache
    def at(step: int) -> Task:
        return Task(*(embed_batches(part, embed) for part in _drawn(sample, keys_at(step))))

    def names(step: int) -> np.ndarray:
        of_slots = slot_names(test, keys_at(step))
        assert of_slots is not None
        return of_slots

    for step in range(-(-episodes // size)):
        at(step)
    embed.save()
    named = names if have_names(test) else None
    return TaskStream(at, test.card, key=key, for_evaluation=True, names=named)


@jax.jit
def _drawn(sample: Callable[[Key], Task], keys: Key) -> Task:
    return jax.vmap(sample)(keys)


def _format_counts(embed: Embedder, seconds: float) -> str:
    """Return the number of images, and how many of them have cached features, in words."""
    known = embed.seen - embed.computed
    return f"{plural(embed.seen, 'image')} in {seconds:.1f} s, {known:,} of them from the cache"


def _print_heads(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the accuracy of each head, and mark the best."""
    best = max(results, key=lambda name: results[name]["mean"])
    rows = [("head", "test accuracy", "", "")]
    for name, row in results.items():
        interval = f"{format_interval(dict(row), 'accuracy')} %"
        rows.append((name, interval, row["row"], "← best" if name == best else ""))
    print_table(rows)


def _row(head: Head) -> str:
    return "transductive" if head.transductive else "inductive"
