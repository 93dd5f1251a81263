"""Transfer learning: `jaxmeta transfer` and `jaxmeta rank`."""

import dataclasses
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import linen
from jaxtyping import Int

from jaxmeta.checks import LARGEST_SEED, ArgumentError, check_count
from jaxmeta.cli import folders
from jaxmeta.cli.backbones import (
    COMMAND,
    NONE,
    PIXELS,
    WEIGHTS,
    Backbone,
    head_logits,
    is_linear,
    load_backbone,
    untrained_backbone,
    with_width,
)
from jaxmeta.cli.command_line import command_of_call
from jaxmeta.cli.figures import plot_confusion
from jaxmeta.cli.fine_tuning import (
    RECIPES,
    Fit,
    InitialClassifier,
    Settings,
    check_settings,
    fit,
    initial_classifier,
    resolve_settings,
    trained_paths,
)
from jaxmeta.cli.signals import Signals, current
from jaxmeta.cli.sources import file_name
from jaxmeta.cli.target_data import ShotSplit, Target, read_target, split_shots, target_settings
from jaxmeta.cli.transfer_report import (
    in_percent,
    leaves_by_group,
    ranking_as_json,
    settings_in_words,
    transfer_markdown,
    wilson,
)
from jaxmeta.core import Batch, Key
from jaxmeta.declare import forwards
from jaxmeta.files import write_json, write_text
from jaxmeta.nn.stateful import Variables
from jaxmeta.training.progress import CountLines
from jaxmeta.transfer import (
    confusion_matrix,
    extract_features,
    feature_extraction,
    predict_logits,
    rank_sources,
    read_weights,
    save_pretrained,
)
from jaxmeta.transfer.architectures import described
from jaxmeta.transfer.classifier import BODY, HEAD, in_batches
from jaxmeta.transfer.ranking import Candidate, Ranking
from jaxmeta.transfer.subtree import leaves_by_path

# Default number of steps of the brief fine-tuning of `rank`.
_RANKED_STEPS = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Settings that `transfer` and `rank` share.

    Attributes:
      data: folder with the target's files; by default the cache, or a download.
      shots: number of random examples per class to learn from, or all for four fifths of each class; the
        others are scored. By default 20, but at most four fifths of the smallest class. If the data has parts
        train and test of the same classes (folders or lists), examples are drawn from train, by default all,
        and test is scored.
      size: side in pixels of the network's input images; by default that of the source's images. If the
        source does not specify it, other libraries' weights get the size that they were trained on, mostly
        224, and other sources the target's size.
      channels: channels of the network's input images, 1 for grey and 3 for colour; by default those of the
        source's images.
      pixels: normalisation of the pixels; by default the source's. plain is in [0, 1], imagenet subtracts
        ImageNet's mean and divides by its standard deviation, symmetric is in [-1, 1].
      network: network, for a weights file that does not name it and for SOURCE none; a name in
        `jaxmeta networks`.
      steps: number of mini-batches of fine-tuning; by default ten epochs but at least 200 steps, or 100 steps
        for `rank`.
      rate: initial step size of Adam, which decays to zero; by default 0.001, 0.0001 for other
        libraries' weights, and ten times that for gradual.
      batch: number of examples in a mini-batch; by default 32.
      seed: seed of the examples to learn from, the new head and the mini-batches.
    """

    data: str | None = None
    shots: int | Literal["all"] | None = None
    size: int | None = None
    channels: Literal[1, 3] | None = None
    pixels: Literal["plain", "imagenet", "symmetric"] | None = None
    network: str | None = None
    steps: int | None = None
    rate: float | None = None
    batch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("seed", self.seed, 0, LARGEST_SEED)
        if self.size is not None:
            check_count("size", self.size)

    def fine_tuning(self, **more: Any) -> Settings:
        """Return the requested settings of fine-tuning."""
        return Settings(self.steps, self.rate, self.batch, **more)


@forwards(Options)
def transfer(
    source: str,
    *,
    target: str,
    recipe: Literal["feature-extraction", "linear-probe", "fine-tune", "lp-ft", "gradual", "scratch"]
    | None = None,
    train: tuple[str, ...] | None = None,
    l2_sp: float | None = None,
    keep_statistics: bool = False,
    out: str | None = None,
    reading: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Path:
    """Train a classifier of labelled images on a source's backbone, and report its accuracy.

    The output folder contains weights.safetensors, config.json, report.json, report.md and confusion.png, and
    can be used as a source.

    Args:
      source: folder of `train` or `transfer`; .safetensors or .msgpack file; folder of Hugging Face's
        save_pretrained, or hf:owner/name; or none for an untrained --network.
      target: source of the labelled images, as in `train --tasks`. All classes are taken, or the test classes
        of a class split (a published one, or folders train, val and test of different classes).
      recipe: way to train; by default lp-ft, or scratch where SOURCE is none. feature-extraction: a ridge
        head in closed form on the frozen backbone. linear-probe: a logistic head on the frozen backbone.
        fine-tune: backbone and a new head together. lp-ft: a linear probe, then fine-tuning. gradual:
        unfreezing from the head down, with rates that fall by a factor of 2.6 per group. scratch: the
        source's network from a random initialisation.
      train: parts of the backbone that fine-tune and lp-ft train in addition to the head, such as
        body/ConvNorm_3; by default all. They are paths as in report.md without params/, with * within a name
        and ** across names.
      l2_sp: weight of the penalty ½‖w − w⁰‖², which pulls the backbone towards the source's.
      keep_statistics: whether fine-tune, lp-ft and gradual normalise with the backbone's batch statistics and
        keep them; otherwise mini-batch statistics are used, and the stored ones become the target's.
      out: output folder; by default runs/transfer-<source>-<target>-<date and time>.
      reading: settings of the target's source, in place of their defaults.
      **options: settings in `Options`.

    Returns:
      The output folder.

    Raises:
      FileNotFoundError, ValueError: an argument is invalid.
      FloatingPointError: training diverged.
    """
    arguments = dict(locals())
    started = time.perf_counter()
    recipe = recipe or ("scratch" if source == NONE else "lp-ft")
    common = _options(options)
    requested = common.fine_tuning(train=train, l2_sp=l2_sp, keep_statistics=keep_statistics or None)
    check_settings(recipe, requested)
    if source == NONE and recipe != "scratch":
        raise ArgumentError("recipe", f"got {recipe}; SOURCE {NONE} allows only scratch")
    if out is not None:
        folders.check_empty(Path(out).expanduser(), COMMAND)
    key = jax.random.key(common.seed)
    backbone = _backbone(source, common)
    if recipe == "scratch":
        backbone = dataclasses.replace(backbone, variables=None)
    images, split = _images(backbone, target, common, reading, key)
    start = _start(backbone, images, images.batch(split.learn), common, key)
    settings = resolve_settings(recipe, backbone, start, len(split.learn), requested)
    command = command_of_call(transfer, arguments, {"reading": target_settings(target)})
    plan = _Plan(source, recipe, common, dict(reading), backbone, images, split, start, settings, command)
    report = plan.report()
    folder = folders.claim(out, f"{COMMAND}-{_file_part(source)}-{file_name(target)}", COMMAND)
    for name, text in settings_in_words(report).items():
        print(f"{name:<16}  {text}")
    print(f"{'folder':<16}  {folder}", flush=True)

    results = folders.Results()
    fitted = _learn(plan, folder, results, jax.random.fold_in(key, 2))
    scores, confusion = _scores(plan, fitted)
    report |= scores | {
        "wall_s": round(time.perf_counter() - started, 3),
        "device": jax.local_devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jaxmeta", "jax")},
        "command": command,
    }
    with results.writing(folder / "report.json"):
        write_json(folder / "report.json", report)
    with results.writing(folder / "report.md"):
        write_text(folder / "report.md", transfer_markdown(report, start.leaves))
    title = f"{recipe} from {source} to {target}"
    with folders.tolerated(folder / "confusion.png") as picture:
        plot_confusion(picture, confusion, images.classes, title)
    print(f"accuracy          {in_percent(report['accuracy'])}")
    if "probe_accuracy" in report:
        print(f"  linear probe    {in_percent(report['probe_accuracy'])}, the backbone's weights unchanged")
    print(f"{report['wall_s']:.0f} s in all")
    print(f"folder: {folder}  (report.md, confusion.png)")
    results.check()
    return folder


class _Plan(NamedTuple):
    """A transfer before training, with all arguments checked."""

    source: str
    recipe: str
    options: Options
    reading: dict[str, Any]
    backbone: Backbone
    images: Target
    split: ShotSplit
    start: InitialClassifier
    settings: Settings
    command: str

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return {
            "jaxmeta": version("jaxmeta"),
            "command": COMMAND,
            "source": self.source,
            "target": self.images.name,
            "recipe": self.recipe,
            "seed": self.options.seed,
            **self.settings.given(),
            "data": self.options.data,
            "reading": self.reading,
            "shots": self.options.shots,
            "network": self.options.network,
            "images": self.start.images._asdict(),
            "pixels": {name: getattr(self.backbone.pixels, name) for name in ("mean", "std", "method")},
            "inverted": self.start.inverted,
            "classes": self.images.classes,
        }

    def report(self) -> dict[str, Any]:
        """Return the content of report.json, without results."""
        sizes = {path: leaf.size for path, leaf in leaves_by_path(self.start.variables["params"]).items()}
        learned = sum(sizes[path] for path in trained_paths(self.start, self.settings))
        return {
            "source": self.source,
            "target": self.images.name,
            "recipe": self.recipe,
            **dataclasses.asdict(self.settings),
            "seed": self.options.seed,
            "about": {
                "source": self.backbone.about,
                "target": self.images.protocol,
                "recipe": RECIPES[self.recipe].description,
            },
            "classes": len(self.images.classes),
            "shots": self.split.description,
            "learned_from": len(self.split.learn),
            "scored": len(self.split.score),
            "images": self.start.images._asdict(),
            "read": None if self.images.summary is None else str(self.images.summary),
            "pixels": str(self.backbone.pixels),
            "inverted": self.start.inverted,
            "statistics": self.start.statistics,
            "parameters": {"trained": learned, "frozen": sum(sizes.values()) - learned},
        }


def _learn(plan: _Plan, folder: Path, results: folders.Results, key: Key) -> Fit:
    """Train, and write config.json and weights; where a signal stops training, write the weights so far.

    Raises:
      Signalled: a signal stopped training.
    """
    network = _describable(with_width(plan.backbone.network, len(plan.images.classes)))
    steps = plan.settings.steps

    def save(variables: Variables) -> None:
        save_pretrained(folder / WEIGHTS, _whole(variables), network=network, overwrite=True)

    signals = current()
    progress = _Progress(steps, signals)
    signals.training = steps is not None
    learn = plan.images.batch(plan.split.learn)
    try:
        fitted = fit(
            plan.recipe, plan.start, learn, plan.settings, key, progress.report, progress.keep_variables
        )
    except _Stopped:
        write_json(folder / "config.json", plan.config() | {"stopped_at": progress.step})
        save(progress.variables)
        signals.hint = (
            f"after step {progress.step} of {steps}; the weights so far are in {folder}, which can be a "
            f"SOURCE; start again with: {plan.command}"
        )
        raise signals.stopped() from None
    signals.training = False
    with results.writing(folder / "config.json"):
        write_json(folder / "config.json", plan.config())
    with results.writing(folder / WEIGHTS):
        save(fitted.variables)
        _read_back(folder / WEIGHTS, fitted.variables)
        signals.hint = f"the weights are in {folder}, without a report; start again with: {plan.command}"
    if signals.asked is not None:
        raise signals.stopped()
    return fitted


def _scores(plan: _Plan, fitted: Fit) -> tuple[dict[str, Any], Int[np.ndarray, "classes classes"]]:
    """Return the results of report.json, and the confusion matrix, on held-out images."""
    start, classes = plan.start, plan.images.classes
    score = plan.images.batch(plan.split.score)
    confusion = confusion_matrix(_predictions(start, fitted.variables, score), score.y, len(classes))
    recalls = np.diag(confusion) / confusion.sum(1)
    scores: dict[str, Any] = {"accuracy": wilson(int(np.trace(confusion)), len(score.y))}
    if plan.backbone.variables is not None and plan.settings.steps is not None:
        # The linear probe is the baseline of fine-tuning; LP-FT has already fitted it.
        learn = plan.images.batch(plan.split.learn)
        probe = fitted.probe or feature_extraction(
            start.model,
            start.variables,
            learn,
            batch=start.at_once,
            progress=CountLines("linear probe for comparison", "images"),
        )
        right = _predictions(start, probe, score) == score.y
        scores["probe_accuracy"] = wilson(int(right.sum()), len(score.y))
    scores |= {
        "recalls": dict(zip(classes, map(float, recalls), strict=True)),
        "losses": [round(float(loss), 6) for loss in fitted.losses],
        "leaves": {group: len(rows) for group, rows in leaves_by_group(start.leaves).items()},
    }
    return scores, confusion


@forwards(Options)
def rank(
    *sources: str,
    target: str,
    score: Literal["log_me", "h_score", "leep", "nce"] = "log_me",
    fine_tune: bool = False,
    json: str | None = None,
    reading: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Ranking:
    """Rank sources by their estimated transferability to a target, without training.

    log_me and h_score are computed from the features of the examples to learn from; leep and nce from the
    predictions of the source's own classes, for sources trained as ordinary classifiers.

    Args:
      sources: two or more sources, as in `transfer`.
      target: source of the labelled images, as in `train --tasks`. All classes are taken, or the test classes
        of a class split (a published one, or folders train, val and test of different classes).
      score: score to order by.
      fine_tune: whether to fine-tune each source briefly as well (lp-ft), and report how the scores correlate
        with its accuracy.
      json: file to write the table to.
      reading: settings of the target's source, in place of their defaults.
      **options: settings in `Options`.

    Returns:
      The ranking.

    Raises:
      FileNotFoundError, ValueError: an argument is invalid.
      FloatingPointError: fine-tuning diverged.
    """
    common = _options(options)
    requested = common.fine_tuning()
    if not fine_tune and requested.given():
        name = next(iter(requested.given()))
        raise ArgumentError(name, "applies to --fine-tune only; add that flag, or leave this one out")
    check_settings("lp-ft", requested)
    if len(set(sources)) < max(2, len(sources)):
        raise ArgumentError("sources", f"got {' '.join(sources) or 'none'}; give two or more different ones")
    to = folders.output_file("json", json)
    key = jax.random.key(common.seed)
    backbones = {name: _backbone(name, common, "sources") for name in sources}
    without = [name for name, backbone in backbones.items() if backbone.head is None]
    if score in ("leep", "nce") and without:
        raise ArgumentError(
            "score", f"{score} needs a head of the source's own classes; {without[0]} has none"
        )
    candidates, accuracies, widths = {}, {}, []
    for name, backbone in backbones.items():
        images, split = _images(backbone, target, common, reading, key)
        learn, scored = images.batch(split.learn), images.batch(split.score)
        start = _start(backbone, images, learn, common, key)
        features = extract_features(
            start.model,
            start.variables,
            learn.x,
            batch=start.at_once,
            progress=CountLines(f"features of {name}", "images"),
        )
        widths.append(features.shape[1])
        candidates[name] = Candidate(features, _source_probs(backbone, start, learn.x, features))
        if fine_tune:
            brief = dataclasses.replace(requested, steps=requested.steps or _RANKED_STEPS)
            settings = resolve_settings("lp-ft", backbone, start, len(split.learn), brief)
            print(f"fine-tuning {name} …", flush=True)
            fitted = fit("lp-ft", start, learn, settings, jax.random.fold_in(key, 2))
            accuracies[name] = float((_predictions(start, fitted.variables, scored) == scored.y).mean())
    # With as many dimensions as examples, any features separate the classes: the covariance needs shrinkage.
    shrinkage: Literal["ledoit-wolf"] | None = "ledoit-wolf" if max(widths) >= len(learn.y) - 1 else None
    ranking = rank_sources(
        candidates, (None, learn.y), score=score, shrinkage=shrinkage, accuracies=accuracies or None
    )
    results = folders.Results()
    if to is not None:
        with results.writing(to):
            write_json(to, ranking_as_json(ranking, target, split.description, shrinkage))
    print(f"target    {target}: {len(images.classes)} classes, {split.description}; {images.protocol}")
    if images.summary is not None:
        print(f"read      {images.summary}")
    print(f"by        {score}" + (f"; h_score with {shrinkage} shrinkage" if shrinkage else ""))
    print(ranking)
    results.check()
    return ranking


# --- Source and target ---------------------------------------------------------------------------


def _options(options: Mapping[str, Any]) -> Options:
    """Return the common options, with an absolute path of the data."""
    return Options(**{**options, "data": folders.data_folder(options.get("data"))})


def _backbone(source: str, options: Options, argument: str = "source") -> Backbone:
    if source != NONE:
        backbone = load_backbone(source, network=options.network, size=options.size, argument=argument)
    elif argument != "source":
        raise ArgumentError(argument, f"got {NONE}, which has no trained parameters to rank")
    elif options.network is None:
        raise ArgumentError("network", f"is missing; SOURCE {NONE} needs one, such as conv4")
    else:
        backbone = untrained_backbone(options.network)
    if not isinstance(backbone.network, linen.Module):
        raise ArgumentError(
            "network",
            f"got {options.network}, which is not a flax.linen.Module; transfer needs one",
        )
    if options.pixels is None:
        return backbone
    mean, std = PIXELS[options.pixels].mean, PIXELS[options.pixels].std
    return dataclasses.replace(backbone, pixels=backbone.pixels._replace(mean=mean, std=std))


def _images(
    backbone: Backbone, target: str, options: Options, reading: Mapping[str, Any], key: Key
) -> tuple[Target, ShotSplit]:
    """Return the target's images, with the backbone's size and channels if it specifies them."""
    size = backbone.size if options.size is None else options.size
    channels: int | None = options.channels
    if size is not None:
        channels = backbone.channels(size, channels)
    drawing = jax.random.fold_in(key, 3)
    images = read_target(
        target, reading, options.shots, drawing, data=options.data, size=size, channels=channels
    )
    return images, split_shots(images, options.shots, jax.random.fold_in(key, 0))


def _start(backbone: Backbone, images: Target, learn: Batch, options: Options, key: Key) -> InitialClassifier:
    key = jax.random.fold_in(key, 1)
    return initial_classifier(backbone, images, learn, size=options.size, channels=options.channels, key=key)


def _source_probs(
    backbone: Backbone, start: InitialClassifier, x: Any, features: jax.Array
) -> jax.Array | None:
    """Return the probabilities of the source's own classes for images x; None where it has no head."""
    head = backbone.head
    if head is None:
        return None
    if is_linear(head):
        return jax.nn.softmax(head_logits(head, features))

    def logits(variables: Variables, x: jax.Array) -> jax.Array:
        body = {name: tree[BODY] for name, tree in variables.items() if BODY in tree}
        return backbone.logits(body, head, start.adapter.apply({}, x))

    return jax.nn.softmax(in_batches(logits, start.variables, x, start.at_once))


def _file_part(source: str) -> str:
    """Return the last part of a source's path, as part of a file name."""
    name = Path(source).expanduser().resolve().name
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip("-.") or "here"


def _describable(network: Any) -> Any:
    """Return the network where a weights file can describe it; None for user-defined networks."""
    try:
        described(network)
    except ArgumentError:
        return None
    return network


# --- Learning and scoring -------------------------------------------------------------------------


def _predictions(start: InitialClassifier, variables: Variables, data: Batch) -> np.ndarray:
    progress = CountLines("predictions of the images to score", "images")
    outputs = predict_logits(start.model, variables, data.x, batch=start.at_once, progress=progress)
    logits = np.asarray(outputs)
    if not np.isfinite(logits).all():
        raise FloatingPointError(
            "the predictions are not finite; try a smaller --rate, or other weights if nothing was fine-tuned"
        )
    return logits.argmax(-1)


def _whole(variables: Variables) -> Variables:
    """Return backbone and head as variables of one network, the layout of weight files."""
    whole = {name: dict(tree.get(BODY, {})) for name, tree in variables.items()}
    whole["params"][HEAD] = variables["params"][HEAD]
    return {name: tree for name, tree in whole.items() if tree}


def _read_back(path: Path, variables: Variables) -> None:
    """Read a file of weights, and raise an error if they differ from those in memory."""
    stored = leaves_by_path(read_weights(path))
    for name, leaf in leaves_by_path(_whole(variables)).items():
        if np.asarray(stored.get(name)).tobytes() != np.asarray(leaf).tobytes():
            raise OSError(f"after reading it back, {name} differs")


class _Stopped(Exception):
    """A signal asked training to stop."""


class _Progress:
    """Callbacks that print progress, keep the variables so far and raise `_Stopped` after a signal.

    Args:
      steps: total number of steps.
      signals: handler of the command's signals.
    """

    def __init__(self, steps: int | None, signals: Signals):
        self.steps, self.signals = steps, signals
        self.step = 0
        self.variables: Variables = {}

    def report(self, step: int, loss: float) -> None:
        self.step = step
        print(f"step {step:>6}/{self.steps}  loss {loss:.4f}", flush=True)

    def keep_variables(self, step: int, variables: Variables) -> None:
        del step
        self.variables = variables
        if self.signals.asked is not None and self.step < (self.steps or 0):
            raise _Stopped
