"""Classifiers of images for `jaxmeta predict`, `jaxmeta export` and `jm.load_classifier`.

A source is a run of `train`, a transfer, a file or folder of weights, or an export. Each becomes a function
from images to the scores of named classes.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmeta.checks import ArgumentError, check_count
from jaxmeta.cli import build, folders
from jaxmeta.cli.backbones import EXPORT, PROGRAM, Backbone, Input, load_backbone
from jaxmeta.cli.config import Config, is_run, load_config, read_json
from jaxmeta.cli.data import ImageSpec, images_of
from jaxmeta.cli.features import model_of, spec_of
from jaxmeta.cli.heads import find_head
from jaxmeta.cli.own_images import read_images, seem_inverted, warn_of_negatives
from jaxmeta.cli.report import plural
from jaxmeta.cli.run import params_of
from jaxmeta.core import Batch, Learner, Params, PyTree, Task
from jaxmeta.declare import forwards
from jaxmeta.files import replacing, write_json
from jaxmeta.tasks.feature_cache import Embedder, features_description
from jaxmeta.tasks.images import class_files
from jaxmeta.tasks.splits import in_order, warn_of_case
from jaxmeta.training.export import program_of
from jaxmeta.training.progress import CountLines
from jaxmeta.transfer import input_adapter

Scores = Callable[[PyTree, Float[Array, "n h w c"]], Float[Array, "n classes"]]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classifier of images, as `load_classifier` returns it.

    Attributes:
      classes: names of the classes, in the order of `predict`'s columns.
      images: specification of the images that the source was trained on.
      inverted: whether dark and light of an image are exchanged before the network gets it.
      about: source, for error messages.
      scores: `(values, x) -> (n, classes)` for images as specified by `images`.
      values: trained parameters and adapted state, the first argument of `scores`.
      measures: whether scores are negative distances, so that `distances` is available.
      sharpness: factor of the scores in the softmax.
      embed: function from images as specified by `images` to their features, which it caches; None where
        the source does not classify by features.
      of_features: `(values, features) -> (n, classes)`, the scores from features; None as for `embed`.
    """

    classes: tuple[str, ...]
    images: ImageSpec
    inverted: bool
    about: str
    scores: Scores = dataclasses.field(repr=False)
    values: PyTree = dataclasses.field(repr=False)
    measures: bool = False
    sharpness: float = 1.0
    embed: Any = dataclasses.field(default=None, repr=False)
    of_features: Scores | None = dataclasses.field(default=None, repr=False)

    def predict(self, images: Any) -> Float[np.ndarray, "n classes"]:
        """Return the probability of each class for each image.

        The prediction for an image depends on that image alone. Probabilities rank classes; they are as well
        calibrated as the method is, and do not show whether an image belongs to any of the classes.

        Args:
          images: images of shape (n, height, width, channels) or (n, height, width), as bytes or floats in
            [0, 1], of any size and with 1 or 3 channels; or paths of image files.

        Returns:
          Probabilities of shape (n, classes).

        Raises:
          ArgumentError: images have another shape, or values outside [0, 1].
          FloatingPointError: the scores are not finite.
        """
        return self.with_distances(images)[0]

    def with_distances(
        self, images: Any
    ) -> tuple[Float[np.ndarray, "n classes"], Float[np.ndarray, " n"] | None]:
        """Return the results of `predict` and of `distances`, None where the method measures no distances."""
        scores = self._scores(images)
        return _softmax(self.sharpness * scores), -scores.max(-1) if self.measures else None

    def label(self, images: Any) -> list[str]:
        """Return the name of the most probable class of each image."""
        return [self.classes[index] for index in self._scores(images).argmax(-1)]

    def distances(self, images: Any) -> Float[np.ndarray, " n"]:
        """Return the distance of each image from the nearest class, in the units of the method.

        Raises:
          ArgumentError: the method measures no distances.
        """
        distances = self.with_distances(images)[1]
        if distances is None:
            raise ArgumentError(
                "source",
                f"{self.about} measures no distances; choose a method that does, such as prototypical",
            )
        return distances

    def _scores(self, images: Any) -> Float[np.ndarray, "n classes"]:
        x = _as_images(images, self.images)
        x, function = 1 - x if self.inverted else x, self.scores
        if self.embed is not None and self.of_features is not None:
            x, function = self.embed(x), self.of_features
            self.embed.save()
        scores = np.asarray(_one_by_one(function, self.values, jnp.asarray(x)))
        # A log-probability may be −∞.
        if np.isnan(scores).any() or (scores == np.inf).any():
            # A head in the weights and an export classify without adaptation.
            adapted = isinstance(self.values, Mapping) and "adapted" in self.values
            cause = "adaptation diverged: " if adapted else ""
            raise FloatingPointError(f"{self.about}: {cause}the scores are not finite")
        return scores


def load_classifier(
    source: str | os.PathLike[str],
    *,
    support: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    invert: bool = False,
    skip_unreadable: bool = False,
    size: int | None = None,
    learner: str | None = None,
    network: str | None = None,
    tasks: str | None = None,
) -> Classifier:
    """Load a source as a classifier of images.

    | source | without `support` | with `support` |
    | --- | --- | --- |
    | a folder of `jaxmeta train` | error: its classes come from the support set | its learner adapts |
    | a folder of `jaxmeta transfer` | the classes that it was trained on | a head on its features |
    | weights with a head | the classes of the head | a head on its features |
    | weights without a head | error | a head on its features |
    | a folder of `jaxmeta export` | the classes that were exported | error |

    The head is by default the nearest prototype: a class is the mean of its normalised features, and an image
    is assigned to the class whose mean is nearest to its own normalised feature (Wang et al. 2019,
    SimpleShot, L2N). Features are kept in the cache folder.

    Args:
      source: one of these; weights are a .safetensors or .msgpack file, a folder of Hugging Face's
        `save_pretrained`, or "hf:owner/name".
      support: folder of images to learn classes from, with a subfolder for each class; or, in Python, a
        dictionary of images by class, as `Classifier.predict` takes them.
      invert: whether to exchange dark and light in all images. By default this is done for strokes where the
        support set is dark on light, since training images are light on dark.
      skip_unreadable: whether to leave out files of the support set that cannot be read.
      size: side in pixels of the images that the network of weights gets; by default that of its training
        images.
      learner: name of the head on the features of weights or a transfer, with `support`: "simple_shot",
        "simple_shot_centred", "prototypical", "ridge", "fine_tuned_head", "fine_tuned_head_cosine",
        "kernel_classifier" or "mahalanobis". For a run: module:name of your own method that it was trained
        with, since a run folder does not import code by itself.
      network: module:name of your own network that the run was trained with; or the name of the network of
        weights that do not name it.
      tasks: module:name of your own tasks that the run was trained with.

    Returns:
      The classifier.

    Raises:
      FileNotFoundError, NotADirectoryError: a folder does not exist.
      ArgumentError: the source, the classes or the images cannot be used, or there are more classes than the
        learner can distinguish.

    Examples:
      >>> classifier = jm.load_classifier("weights.safetensors", support="pets")  # doctest: +SKIP
      >>> classifier.classes  # doctest: +SKIP
      ('cat', 'dog')
      >>> classifier.predict(images).argmax(-1)  # doctest: +SKIP
    """
    reading = _Reading(support, invert, skip_unreadable)
    folder = Path(source).expanduser()
    if size is not None:
        check_count("size", size)
    named = {"learner": learner, "network": network, "tasks": tasks}
    if (folder / PROGRAM).is_file():
        _check_unused({"size": size, **named}, f"{source} is an export, whose settings are fixed")
        return _exported(folder, reading)
    if is_run(folder):
        _check_unused({"size": size}, f"{source} is a run, which has the size of its images")
        config = load_config(folder, [name for name in named.values() if name is not None])
        trained_with = {config.learner["name"], config.network["name"], config.tasks["name"]}
        foreign = {name: value for name, value in named.items() if value not in trained_with}
        _check_unused(foreign, f"{source} was not trained with it")
        return _from_run(folder, config, reading)
    _check_unused({"tasks": tasks}, f"{source} is not a run trained with it")
    if support is not None:
        find_head(learner, inductive=True)
    backbone = load_backbone(os.fspath(source), network=network, size=size)
    return _from_weights(backbone, size, reading, learner)


def print_inverted(classifier: Classifier, invert: bool) -> None:
    """Print that all images are inverted, where the user has not requested it."""
    if classifier.inverted and not invert:
        print("ink       dark on light in --support, light on dark in training: all images are inverted")


def _check_unused(arguments: Mapping[str, Any], why: str) -> None:
    """Check that arguments that do not apply to the source are None.

    Raises:
      ArgumentError: an argument is given.
    """
    for name, value in arguments.items():
        if value is not None:
            raise ArgumentError(name, f"got {value}, but {why}; leave it out")


# --- The support set ----------------------------------------------------------------------------------------


class _Reading(NamedTuple):
    """Support set, and settings to read it."""

    support: str | os.PathLike[str] | Mapping[str, Any] | None
    invert: bool
    skip_unreadable: bool

    def check_given(self, source: str) -> None:
        """Check that there is a support set.

        Raises:
          ArgumentError: there is none.
        """
        if self.support is None:
            raise ArgumentError(
                "support",
                f"{source} learns its classes from examples; give a folder with a subfolder for each class",
            )


class _Support(NamedTuple):
    """A support set.

    Attributes:
      classes: names of the classes.
      x: examples, as the network takes them.
      y: class indices.
      inverted: whether dark and light were exchanged in `x`.
    """

    classes: tuple[str, ...]
    x: Float[np.ndarray, "n h w c"]
    y: Int[np.ndarray, " n"]
    inverted: bool

    def batch(self, ways: int) -> Batch:
        return Batch(jnp.asarray(self.x), jnp.asarray(self.y), ways=ways)


def _class_names(reading: _Reading) -> tuple[str, ...]:
    return tuple(_by_class(reading))


def _by_class(reading: _Reading) -> Mapping[str, Any]:
    """Return files or images of the support set by class.

    Raises:
      ArgumentError: there are fewer than two classes, or the folder has no images.
    """
    if isinstance(reading.support, Mapping):
        by_class: Mapping[str, Any] = reading.support
    else:
        assert reading.support is not None
        files = class_files(Path(reading.support).expanduser(), "support")
        by_class = {name: files[name] for name in in_order(files)}
        warn_of_case("--support", dict(by_class))
    if len(by_class) < 2:
        raise ArgumentError("support", f"got {plural(len(by_class), 'class')}; there must be at least 2")
    return by_class


def _read_support(reading: _Reading, spec: ImageSpec) -> _Support:
    """Read the support set as images of `spec`, inverted where they are negatives of strokes.

    Raises:
      ArgumentError: no image of a class can be read.
    """
    by_class = _by_class(reading)
    classes = tuple(by_class)
    if isinstance(reading.support, Mapping):
        parts = [_as_images(by_class[name], spec, f"support[{name!r}]") for name in classes]
        sizes, files = [len(part) for part in parts], None
        x = np.concatenate(parts)
        y = np.repeat(np.arange(len(classes), dtype=np.int32), sizes)
    else:
        files = [file for name in classes for file in by_class[name]]
        x, kept = read_images(files, spec, reading.skip_unreadable, "support")
        y = np.repeat(np.arange(len(classes), dtype=np.int32), [len(by_class[name]) for name in classes])[
            kept
        ]
        files = [files[index] for index in kept]
    if empty := sorted(set(range(len(classes))) - set(y.tolist())):
        raise ArgumentError("support", f"no image of the class {classes[empty[0]]!r} can be read")
    inverted = reading.invert
    if not inverted and spec.ink and seem_inverted(spec, float(x.mean())):
        inverted = True
    x = 1 - x if inverted else x
    if files is not None:
        warn_of_negatives("support", spec, x, list(map(str, files)))
    return _Support(classes, x, y, inverted)


# --- Sources ------------------------------------------------------------------------------------------------


def _from_run(folder: Path, config: Config, reading: _Reading) -> Classifier:
    spec = images_of(config)
    method = config.learner["name"]
    if spec is None:
        raise ArgumentError(
            "source",
            f"{folder} was trained on {config.tasks['name']}, which are not images; give a run on images",
        )
    facts = config.names().facts
    if "inductive" not in facts.rows:
        raise ArgumentError(
            "source",
            f"{folder} is a run of {method}, whose prediction for an image depends on the other images of "
            "the same call; give a run of another method, or predict in Python by the learner of "
            'jm.load_run(source, row="transductive")',
        )
    reading.check_given(f"{folder}, a run of {method},")
    classes = len(_class_names(reading))
    ways = config.tasks["train_ways"] if facts.head else classes
    if classes > ways:
        raise ArgumentError(
            "support",
            f"got {classes} classes; {method} was trained with {ways} ways, so there must be "
            + (f"2 to {ways}" if ways > 2 else "2"),
        )
    support = _read_support(reading, spec)
    learner = build.learner_of(config, facts.rows["inductive"])
    params = params_of(folder, config)
    adapted = _adapted(learner, params, support.batch(ways))

    def scores(values: PyTree, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        return learner.predict(values["params"], values["adapted"], x)[:, :classes]

    values = {"params": params, "adapted": adapted}
    return Classifier(
        support.classes, spec, support.inverted, str(folder), scores, values, measures=facts.distances
    )


@partial(jax.jit, static_argnums=0)
def _adapted(learner: Learner, params: Params, support: Batch) -> PyTree:
    return learner.adapt(params, support, jax.random.key(0))


def _from_weights(backbone: Backbone, size: int | None, reading: _Reading, name: str | None) -> Classifier:
    if reading.support is None:
        _check_unused({"learner": name}, f"{backbone.source} is not a run trained with it")
        return _with_head(backbone, size, reading)
    head = find_head(name, inductive=True)
    spec = spec_of(backbone, size)
    support = _read_support(reading, spec)
    model = model_of(backbone, Input(spec, False, backbone.pixels), support.x)
    params = model.init(jax.random.key(0), jnp.asarray(support.x))
    function = jax.tree_util.Partial(model.apply, params)
    # Alone on every device: the prediction for an image does not depend on the other images.
    report = CountLines("features", "images")
    embed = Embedder(function, description=features_description(function), alone=True, report=report)
    batch = support._replace(x=embed(support.x)).batch(len(support.classes))
    embed.save()
    head_params = head.learner.init(jax.random.key(0), Task(batch, batch))
    adapted = _adapted(head.learner, head_params, batch)

    def of_features(values: PyTree, z: Float[Array, "n dim"]) -> Float[Array, "n classes"]:
        return head.learner.predict(values["head"], values["adapted"], z)

    def scores(values: PyTree, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        return of_features(values, model.apply(values["params"], x))

    return Classifier(
        support.classes,
        spec,
        support.inverted,
        backbone.source,
        scores,
        {"params": params, "head": head_params, "adapted": adapted},
        measures=head.distances,
        sharpness=head.sharpness,
        embed=embed,
        of_features=of_features,
    )


def _with_head(backbone: Backbone, size: int | None, reading: _Reading) -> Classifier:
    if backbone.head is None:
        reading.check_given(f"{backbone.source} has no head of classes and")
    spec = spec_of(backbone, size)
    adapter = Input(spec, False, backbone.pixels).adapter()
    assert backbone.head is not None
    count = backbone.head["bias"].shape[0]
    classes = backbone.classes
    if classes is None or len(classes) != count:
        classes = tuple(map(str, range(count)))

    def scores(values: PyTree, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        return backbone.logits(values["variables"], values["head"], adapter.apply({}, x))

    values = {"variables": backbone.variables, "head": backbone.head}
    inverted = reading.invert != backbone.inverted
    return Classifier(classes, spec, inverted, backbone.source, scores, values)


# --- Images and scores --------------------------------------------------------------------------------------


def _as_images(images: Any, spec: ImageSpec, name: str = "images") -> Float[np.ndarray, "n h w c"]:
    """Return images in [0, 1] with the size and channels of `spec`.

    Raises:
      ArgumentError: the argument is not images.
    """
    if isinstance(images, str | os.PathLike):
        images = [images]
    if isinstance(images, Sequence) and images and all(isinstance(x, str | os.PathLike) for x in images):
        return read_images([Path(each).expanduser() for each in images], spec, None, name)[0]
    try:
        x = np.asarray(images)
    except ValueError as error:
        raise ArgumentError(name, f"got images of several sizes; they must have the same: {error}") from None
    x = x[..., None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[3] not in (1, 3) or not x.size:
        raise ArgumentError(
            name,
            f"got shape {np.shape(images)}; images must be (n, height, width) or (n, height, width, "
            "channels) with 1 or 3 channels, or paths of files",
        )
    if x.dtype == np.uint8:
        x = x.astype(np.float32) / 255
    if x.dtype.kind != "f" or not (x.min() >= 0 and x.max() <= 1):
        raise ArgumentError(
            name, f"got {x.dtype} from {x.min()} to {x.max()}; they must be uint8, or floats in [0, 1]"
        )
    x = x.astype(np.float32)
    if x.shape[1:] == (spec.size, spec.size, spec.channels):
        return x
    adapter = input_adapter(channels=spec.channels, size=spec.size)
    return np.clip(np.asarray(adapter.apply({}, jnp.asarray(x))), 0, 1)


@partial(jax.jit, static_argnums=0)
def _one_by_one(scores: Scores, values: PyTree, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
    # In a batch, the order of float32 sums, and with it the last digits of a score, could depend on the other
    # images.
    return jax.lax.map(lambda image: scores(values, image[None])[0], x)


def _softmax(scores: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


# --- Export -------------------------------------------------------------------------------------------------


@forwards(load_classifier)
def export(source: str, *, out: str, **reading: Any) -> Path:
    """Write a classifier as a program that runs without jaxmeta.

    The folder gets classifier.stablehlo, which contains the parameters and which `jax.export.deserialize`
    reads on CPUs, GPUs and TPUs, and config.json, which describes its input and output. It can be a SOURCE of
    `predict`.

    Args:
      source: source of the classifier, as in `predict`.
      out: output folder.
      **reading: settings of `load_classifier`.

    Returns:
      The output folder.

    Raises:
      FileNotFoundError, ValueError: as in `load_classifier`; or the output folder is not empty.
    """
    folders.check_empty(Path(out).expanduser(), EXPORT)
    classifier = load_classifier(source, **reading)
    print_inverted(classifier, bool(reading.get("invert")))
    spec = classifier.images

    def probabilities(x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        return jax.nn.softmax(
            classifier.sharpness * classifier.scores(classifier.values, 1 - x if classifier.inverted else x)
        )

    example = jax.ShapeDtypeStruct((1, spec.size, spec.size, spec.channels), jnp.float32)
    try:
        written = program_of(probabilities, example)
    except ArgumentError as error:
        reason = str(error.__cause__).strip().partition("\n")[0]
        raise ArgumentError(
            "source", f"got {source}, which cannot be written as a program: {reason}"
        ) from error
    # The specification of the program's input, which the program itself inverts.
    images = spec._replace(mean=1 - spec.mean) if classifier.inverted else spec
    folder = folders.claim(out, EXPORT, EXPORT)
    with replacing(folder / PROGRAM) as unfinished:
        unfinished.write_bytes(written)
    write_json(
        folder / "config.json",
        {
            "jaxmeta": version("jaxmeta"),
            "command": EXPORT,
            "source": source,
            "input": f"float32 (n, {spec.size}, {spec.size}, {spec.channels}) in [0, 1]",
            "output": "float32 (n, classes), probabilities",
            "classes": classifier.classes,
            "images": images._asdict(),
        },
    )
    print(f"{len(classifier.classes)} classes, images of {spec}")
    print(f"folder: {folder}  ({PROGRAM}, config.json)")
    print(f'run it:  jax.export.deserialize(bytearray(open("{folder / PROGRAM}", "rb").read())).call(images)')
    return folder


def _exported(folder: Path, reading: _Reading) -> Classifier:
    if reading.support is not None:
        raise ArgumentError("support", f"{folder} is an export, whose classes are fixed; leave it out")
    config = read_json(folder / "config.json")
    try:
        classes, spec = tuple(map(str, config["classes"])), ImageSpec(**config["images"])
        program = jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    except Exception as error:
        raise ArgumentError("source", f"{folder} is damaged: {error!r}") from error

    def scores(values: PyTree, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        del values
        # The softmax of log-probabilities is the probabilities.
        return jnp.log(program.call(x))

    return Classifier(classes, spec, reading.invert, str(folder), scores, None)
