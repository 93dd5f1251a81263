"""Classifiers of images: what `predict` and `jm.load_classifier` make of anything that has learned.

A source is a run of `train`, a transfer, a file or folder of weights, or an export. Each becomes one function
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
from jaxmeta.cli.backbones import EXPORT, PROGRAM, Backbone, Input, head_logits, load_backbone
from jaxmeta.cli.config import Config, is_run, load_config, read_json
from jaxmeta.cli.data import ImageSpec, images_of
from jaxmeta.cli.own_images import read_images, seem_inverted, warn_of_negatives
from jaxmeta.cli.run import params_of
from jaxmeta.core import Batch, Learner, Model, Params, PyTree
from jaxmeta.declare import forwards
from jaxmeta.files import replacing, write_json
from jaxmeta.metric_based import simple_shot
from jaxmeta.nn.norm import STATISTICS
from jaxmeta.tasks.images import class_files
from jaxmeta.tasks.splits import in_order, warn_of_case
from jaxmeta.training.export import program_of
from jaxmeta.transfer import adabn, input_adapter

# Of squared distances between features of length one, which lie in [0, 4].
_SHARPNESS = 10.0
# Images at once where statistics are taken.
_AT_ONCE = 64

Scores = Callable[[PyTree, Float[Array, "n h w c"]], Float[Array, "n classes"]]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classifier of images, as `load_classifier` returns it.

    Attributes:
      classes: names, in the order of `predict`'s columns.
      images: size, channels and mean of the images that it was trained on.
      inverted: whether dark is turned to light before the network sees an image.
      about: where it comes from, in a few words.
      measures: whether its scores are minus distances, so that `distances` says how far an image is from the
        nearest class.
      sharpness: factor of the scores in the softmax.
      scores: `(values, x) -> (n, classes)`, of images as `images` describes them.
      values: what it has learned.
    """

    classes: tuple[str, ...]
    images: ImageSpec
    inverted: bool
    about: str
    scores: Scores = dataclasses.field(repr=False)
    values: PyTree = dataclasses.field(repr=False)
    measures: bool = False
    sharpness: float = 1.0

    def predict(self, images: Any) -> Float[np.ndarray, "n classes"]:
        """Return the probability of each class for each image.

        The answer for an image depends on that image alone. Probabilities rank classes; they are as well
        calibrated as the method that gives them, and say nothing of images of none of the classes.

        Args:
          images: `(n, height, width, channels)` or `(n, height, width)`, bytes or numbers in [0, 1], of any
            size and 1 or 3 channels; or paths of image files.

        Raises:
          ArgumentError: images of another shape, or values outside [0, 1].
          FloatingPointError: the answers are not finite.
        """
        return self.with_distances(images)[0]

    def with_distances(
        self, images: Any
    ) -> tuple[Float[np.ndarray, "n classes"], Float[np.ndarray, " n"] | None]:
        """Return what `predict` does, and `distances` where the method measures any."""
        scores = self._scores(images)
        return _softmax(self.sharpness * scores), -scores.max(-1) if self.measures else None

    def label(self, images: Any) -> list[str]:
        """Return the name of the most probable class of each image."""
        return [self.classes[index] for index in self._scores(images).argmax(-1)]

    def distances(self, images: Any) -> Float[np.ndarray, " n"]:
        """Return how far each image is from the nearest class, in the units of the method's distances.

        Raises:
          ArgumentError: the method measures no distances.
        """
        found = self.with_distances(images)[1]
        if found is None:
            raise ArgumentError("source", f"{self.about} measures no distances; take a method that does")
        return found

    def _scores(self, images: Any) -> Float[np.ndarray, "n classes"]:
        x = _as_images(images, self.images)
        found = np.asarray(_one_by_one(self.scores, self.values, jnp.asarray(1 - x if self.inverted else x)))
        if np.isnan(found).any() or (found == np.inf).any():
            raise FloatingPointError(f"{self.about}: learning diverged: the answers are not finite")
        return found


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
    """Load what a source has learned as a classifier of images.

    | source | without `support` | with it |
    | --- | --- | --- |
    | a folder of `jaxmeta train` | refused: its classes come from the support set | its learner adapts |
    | a folder of `jaxmeta transfer` | the classes that it was trained on | nearest prototypes |
    | weights with a head | the classes of the head | nearest prototypes |
    | weights without one | refused | nearest prototypes |
    | a folder of `jaxmeta export` | the classes that were exported | refused |

    Nearest prototypes: a class is the mean of its features of length one, and an image belongs to the class
    whose mean is nearest to its own feature of length one (Wang et al. 2019, SimpleShot, L2N).

    Args:
      source: one of these; weights are a .safetensors or .msgpack file, a folder of Hugging Face's
        `save_pretrained`, or "hf:owner/name".
      support: folder of images to learn classes from, with one subfolder a class. In Python also a
        dictionary of images by class, as `Classifier.predict` takes them.
      invert: whether to turn dark to light in all images. Without it images of strokes are turned where the
        support set says so, since training images have light ink on dark.
      skip_unreadable: whether to leave out files of the support set that cannot be read.
      size: side of the images that weights are given, in pixels; without it what they were trained on.
      learner: module:name of a method of one's own that the run was trained with. A folder makes no code be
        imported by itself.
      network: module:name of a network of one's own that the run was trained with; or the name of the
        network of weights that do not say it.
      tasks: module:name of tasks of one's own that the run was trained with.

    Raises:
      FileNotFoundError, NotADirectoryError: a folder that is not there.
      ArgumentError: a source that cannot be used in this way; classes or images that cannot be used; more
        classes than the learner can tell apart.

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
        _refuse_given({"size": size, **named}, f"{source} is an export, which has what it was made with")
        return _exported(folder, reading)
    if is_run(folder):
        _refuse_given({"size": size}, f"{source} is a run, which says itself what images it takes")
        config = load_config(folder, [name for name in named.values() if name is not None])
        own = {config.learner["name"], config.network["name"], config.tasks["name"]}
        foreign = {name: value for name, value in named.items() if value not in own}
        _refuse_given(foreign, f"{source} was not trained with it")
        return _of_run(folder, config, reading)
    _refuse_given({"learner": learner, "tasks": tasks}, f"{source} is not a run that was trained with it")
    return _of_weights(load_backbone(os.fspath(source), network=network, size=size), size, reading)


def say_inverted(classifier: Classifier, invert: bool) -> None:
    """Print that dark is turned to light in all images, where nobody has asked for it."""
    if classifier.inverted and not invert:
        print("ink       dark on light in --support, light on dark in training: all images are inverted")


def _refuse_given(given: Mapping[str, Any], why: str) -> None:
    """Refuse arguments that the source has no use for.

    Raises:
      ArgumentError: one is not None.
    """
    for name, value in given.items():
        if value is not None:
            raise ArgumentError(name, f"got {value}, and {why}; leave it out")


# --- The support set ----------------------------------------------------------------------------------------


class _Reading(NamedTuple):
    """Where the support set comes from, and how it is read."""

    support: str | os.PathLike[str] | Mapping[str, Any] | None
    invert: bool
    skip_unreadable: bool

    def needed(self, source: str) -> None:
        if self.support is None:
            raise ArgumentError(
                "support",
                f"{source} learns its classes from examples; name a folder with one subfolder a class",
            )


class _Support(NamedTuple):
    """Examples of classes.

    Attributes:
      classes: names.
      x: examples, as the network takes them.
      y: their classes.
      inverted: whether dark has been turned to light in them.
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
    """Return files, or images, by class."""
    if isinstance(reading.support, Mapping):
        found: Mapping[str, Any] = reading.support
    else:
        assert reading.support is not None
        files = class_files(Path(reading.support).expanduser(), "support")
        found = {name: files[name] for name in in_order(files)}
        warn_of_case("--support", dict(found))
    if len(found) < 2:
        raise ArgumentError("support", f"got {len(found)} classes; there must be 2 or more to tell apart")
    return found


def _read_support(reading: _Reading, spec: ImageSpec) -> _Support:
    """Read the support set as images of `spec`, turned where they are negatives of strokes.

    Raises:
      ArgumentError: a class of which no image can be read.
    """
    given = _by_class(reading)
    classes = tuple(given)
    if isinstance(reading.support, Mapping):
        parts = [_as_images(given[name], spec, f"support[{name!r}]") for name in classes]
        sizes, files = [len(part) for part in parts], None
        x = np.concatenate(parts)
        y = np.repeat(np.arange(len(classes), dtype=np.int32), sizes)
    else:
        files = [file for name in classes for file in given[name]]
        x, kept = read_images(files, spec, reading.skip_unreadable, "support")
        y = np.repeat(np.arange(len(classes), dtype=np.int32), [len(given[name]) for name in classes])[kept]
        files = [files[index] for index in kept]
    if empty := sorted(set(range(len(classes))) - set(y.tolist())):
        raise ArgumentError("support", f"of the class {classes[empty[0]]!r} no image can be read")
    inverted = reading.invert
    if not inverted and spec.ink and seem_inverted(spec, float(x.mean())):
        inverted = True
    x = 1 - x if inverted else x
    if files is not None:
        warn_of_negatives("support", spec, x, list(map(str, files)))
    return _Support(classes, x, y, inverted)


# --- One source after another -------------------------------------------------------------------------------


def _of_run(folder: Path, config: Config, reading: _Reading) -> Classifier:
    spec = images_of(config)
    method = config.learner["name"]
    if spec is None:
        raise ArgumentError(
            "source",
            f"{folder} was trained on {config.tasks['name']}, which are no images; nothing to predict",
        )
    reading.needed(f"{folder}, a run of {method},")
    facts = config.names().facts
    classes = len(_class_names(reading))
    ways = config.tasks["train_ways"] if facts.head else classes
    if classes > ways:
        raise ArgumentError(
            "support",
            f"got {classes} classes; {method} was trained with {ways} ways and tells "
            + (f"2 to {ways} apart" if ways > 2 else "2 apart"),
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


def _of_weights(backbone: Backbone, size: int | None, reading: _Reading) -> Classifier:
    if reading.support is None:
        return _by_its_head(backbone, size, reading)
    spec = _spec(backbone, size)
    support = _read_support(reading, spec)
    learner, params = by_prototypes(backbone, Input(spec, False, backbone.pixels), support.x)
    classes = len(support.classes)
    adapted = _adapted(learner, params, support.batch(classes))

    def scores(values: PyTree, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        return learner.predict(values["params"], values["adapted"], x)

    return Classifier(
        support.classes,
        spec,
        support.inverted,
        backbone.source,
        scores,
        {"params": params, "adapted": adapted},
        measures=True,
        sharpness=_SHARPNESS,
    )


def by_prototypes(
    backbone: Backbone, input: Input, shown: Float[np.ndarray, "n h w c"]
) -> tuple[Learner, Params]:
    """Return the learner that compares a backbone's features of length one with their class means.

    Args:
      backbone: of a source; its features are those of inference.
      input: what brings images to it.
      shown: images as they come, whose statistics a backbone gets that has batch normalisation and no
        statistics.
    """
    adapter, model = input.adapter(), backbone.model
    variables = backbone.variables
    assert variables is not None
    side, channels = input.images.size, input.images.channels
    example = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    wanted = jax.eval_shape(model.init, jax.random.key(0), example)
    if STATISTICS in wanted and STATISTICS not in variables:
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), wanted[STATISTICS])
        seen = adapter.apply({}, jnp.asarray(shown, jnp.float32))
        variables = adabn(model, {**variables, STATISTICS: blank}, seen, batch=_AT_ONCE)
    features = Model(
        lambda key, x: variables, lambda variables, x: model.apply(variables, adapter.apply({}, x))
    )
    return simple_shot(features, transform="l2n"), {"model": variables}


def _by_its_head(backbone: Backbone, size: int | None, reading: _Reading) -> Classifier:
    if backbone.head is None:
        reading.needed(f"{backbone.source} has no head of classes and")
    spec, model = _spec(backbone, size), backbone.model
    adapter = Input(spec, False, backbone.pixels).adapter()
    assert backbone.head is not None
    count = backbone.head["bias"].shape[0]
    classes = backbone.classes
    if classes is None or len(classes) != count:
        classes = tuple(map(str, range(count)))

    def scores(values: PyTree, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        z = model.apply(values["variables"], adapter.apply({}, x))
        return head_logits(values["head"], z)

    values = {"variables": backbone.variables, "head": backbone.head}
    inverted = reading.invert != backbone.inverted
    return Classifier(classes, spec, inverted, backbone.source, scores, values)


def _spec(backbone: Backbone, size: int | None) -> ImageSpec:
    """Return the images that a backbone takes.

    Raises:
      ArgumentError: neither it nor the user says their size.
    """
    side = backbone.size if size is None else size
    if side is None:
        raise ArgumentError("size", f"{backbone.source} does not say the size of its images; give it")
    channels = backbone.channels(side, None) or 3
    # Of weights whose images nobody knows the mean tells nothing.
    known = backbone.images or ImageSpec(side, channels, 0.5, False)
    return known._replace(size=side, channels=channels)


# --- Images and scores --------------------------------------------------------------------------------------


def _as_images(given: Any, spec: ImageSpec, name: str = "images") -> Float[np.ndarray, "n h w c"]:
    """Return images in [0, 1] of the size and channels of `spec`.

    Raises:
      ArgumentError: they are none.
    """
    if isinstance(given, str | os.PathLike):
        given = [given]
    if isinstance(given, Sequence) and given and all(isinstance(each, str | os.PathLike) for each in given):
        return read_images([Path(each).expanduser() for each in given], spec, None, name)[0]
    try:
        x = np.asarray(given)
    except ValueError as error:
        raise ArgumentError(name, f"they must have one size: {error}") from None
    x = x[..., None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[3] not in (1, 3) or not x.size:
        raise ArgumentError(
            name,
            f"got shape {np.shape(given)}; images must be (n, height, width) or (n, height, width, channels) "
            "with 1 or 3 channels, or paths of files",
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
    # In a batch the order of float32 sums, and with it the last digit of an answer, could depend on what else
    # is asked.
    return jax.lax.map(lambda image: scores(values, image[None])[0], x)


def _softmax(scores: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


# --- Export -------------------------------------------------------------------------------------------------


@forwards(load_classifier)
def export(source: str, *, out: str, **reading: Any) -> Path:
    """Write a classifier as a program that runs without jaxmeta.

    The folder gets classifier.stablehlo, which `jax.export.deserialize` reads on CPUs, GPUs and TPUs, with
    all that was learned in it, and config.json, which says what goes in and what comes out. It can be a
    SOURCE of `predict`.

    Args:
      source: what has learned, as of `predict`.
      out: the folder to make.
      **reading: as of `load_classifier`.

    Returns:
      The folder.

    Raises:
      FileNotFoundError, ValueError: as of `load_classifier`; a folder that is used already.
    """
    folders.refuse_used(Path(out).expanduser(), EXPORT)
    found = load_classifier(source, **reading)
    say_inverted(found, bool(reading.get("invert")))
    spec = found.images

    def probabilities(x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        return jax.nn.softmax(found.sharpness * found.scores(found.values, 1 - x if found.inverted else x))

    example = jax.ShapeDtypeStruct((1, spec.size, spec.size, spec.channels), jnp.float32)
    written = program_of(probabilities, example)
    # What comes in, before it is turned.
    images = spec._replace(mean=1 - spec.mean) if found.inverted else spec
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
            "classes": found.classes,
            "images": images._asdict(),
        },
    )
    print(f"{len(found.classes)} classes, images of {spec}")
    print(f"folder: {folder}  ({PROGRAM}, config.json)")
    return folder


def _exported(folder: Path, reading: _Reading) -> Classifier:
    if reading.support is not None:
        raise ArgumentError("support", f"{folder} is an export, whose classes are fixed; leave it out")
    told = read_json(folder / "config.json")
    try:
        classes, spec = tuple(map(str, told["classes"])), ImageSpec(**told["images"])
        program = jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    except Exception as error:
        raise ArgumentError("source", f"{folder} is damaged: {error!r}") from error

    def scores(values: PyTree, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        del values
        # Their softmax is the probabilities again.
        return jnp.log(program.call(x))

    return Classifier(classes, spec, reading.invert, str(folder), scores, None)
