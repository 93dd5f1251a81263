"""The registry: methods, networks and task sources by name.

A new learner joins by one entry of `LEARNERS`; every command and every law then runs it.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optax

from jaxmeta import losses, nn, tasks
from jaxmeta.core import Learner, Model, TaskDistribution
from jaxmeta.optimization_based import fomaml, maml
from jaxmeta.tasks import ClassSplit
from jaxmeta.tasks.official import cifar_fs_images, cub_images, mini_imagenet_images
from jaxmeta.tasks.omniglot import omniglot_split
from jaxmeta.tasks.prepared import SplitImages


@dataclasses.dataclass(frozen=True)
class Preset:
    """A training and its evaluation, fully spelled. None: does not apply.

    Attributes:
      description: one line.
      tasks: a name in `TASKS`; a folder's path or a data set's name stands after its colon.
      learner: a name in `LEARNERS`.
      ways, shots, queries: of test and validation tasks; examples per class (per task in regression).
      train_ways, train_shots, train_queries: the same of training tasks.
      protocol: class split of Omniglot; see `jaxmeta.tasks.omniglot`.
      rotations: "none", "classes" or "random"; None is the protocol's own.
      image_size: side of one's own images in pixels; None is the source's default.
      channels: 1 or 3; None is by the files.
      label: feature of a tensorflow-datasets set that names the class; None for the obvious one.
      tfds_splits: of such a set, to pool, with commas between; None for all.
      classes: class split of one's own images: "0.64,0.16,0.2", or the path of a JSON file.
      split_seed: of a class split by fractions.
      stream: whether examples come from disk, step by step, in place of the device's memory.
      workers: processes that read a stream; 0 reads in threads.
      skip_unreadable: leave out images that cannot be read.
      network: a name in `NETWORKS`.
      norm: whose statistics normalise the queries in training; see `jm.maml`.
      inner_lr: step size α of the inner SGD, for the MEAN loss over the support set.
      inner_steps: inner steps in training.
      eval_steps: inner steps at validation and test.
      report_steps: numbers of inner steps to report beside `eval_steps`.
      order: "second" or "first".
      outer_lr: step size of the outer Adam.
      schedule: of `outer_lr` over the run: "constant", or "cosine" (to zero).
      clip: bound on every entry of the meta-gradient; None leaves it as it is.
      steps: meta-steps.
      meta_batch: tasks per meta-step.
      strategy: over the tasks of a meta-step; see `jm.meta_step`.
      episodes: test episodes.
      validate_every: meta-steps between validations, which choose the parameters kept.
      log_every: meta-steps between looks at the loss.
    """

    description: str
    tasks: str
    learner: str = "maml"
    ways: int | None = 5
    shots: int = 1
    queries: int = 1
    train_ways: int | None = 5
    train_shots: int = 1
    train_queries: int = 1
    protocol: str | None = None
    rotations: str | None = None
    image_size: int | None = None
    channels: int | None = None
    label: str | None = None
    tfds_splits: str | None = None
    classes: str | None = None
    split_seed: int = 0
    stream: bool = False
    workers: int = 0
    skip_unreadable: bool = False
    network: str = "strided-conv4"
    norm: str = "batch"
    inner_lr: float | None = 0.4
    inner_steps: int | None = 1
    eval_steps: int | None = 3
    report_steps: tuple[int, ...] = ()
    order: str | None = "second"
    outer_lr: float = 1e-3
    schedule: str = "constant"
    clip: float | None = None
    steps: int = 60_000
    meta_batch: int = 32
    strategy: str | int = "auto"
    episodes: int = 1000
    validate_every: int = 1000
    log_every: int = 50


def _adam(settings: Preset) -> optax.GradientTransformation:
    rate = settings.outer_lr
    if settings.schedule == "cosine":
        rate = optax.cosine_decay_schedule(settings.outer_lr, settings.steps)
    adam = optax.adam(rate)
    return adam if settings.clip is None else optax.chain(optax.clip(settings.clip), adam)


def _network(settings: Preset) -> Model:
    return nn.as_model(NETWORKS[settings.network](1 if settings.train_ways is None else settings.train_ways))


NETWORKS: dict[str, Callable[[int], Any]] = {
    "strided-conv4": lambda out: nn.StridedConv4(ways=out),
    "strided-conv4-without-scale": lambda out: nn.StridedConv4(ways=out, use_scale=False),
    "conv4": lambda out: nn.Conv4(ways=out),
    "conv4-32": lambda out: nn.Conv4(ways=out, filters=32),
    "resnet12": lambda out: nn.ResNet12(ways=out),
    "mlp": lambda out: nn.MLP(out=out, hidden=(256, 128, 64, 64), norm=True),
    "mlp-40": lambda out: nn.MLP(out=out),
}


@dataclasses.dataclass(frozen=True)
class LearnerSpec:
    """How the command line and the laws build a method.

    Attributes:
      factory: the public factory, such as `jm.maml`.
      family: of the method.
      description: one line.
      build: `(network, settings, norm) -> Learner`.
      takes: the fields of `Preset` that only some methods have and this one does.
      norms: `norm=` of each row that a report gives.
      fixed_ways: whether the network's output width is the number of ways.
      zero_shot: whether it can learn from class metadata alone.
      network: default network, from the settings.
      optimizer: default outer optimizer.
    """

    factory: Callable[..., Learner]
    family: str
    description: str
    build: Callable[[Model, Preset, str], Learner]
    takes: tuple[str, ...] = ()
    norms: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"transductive": "batch", "inductive": "support"}
    )
    fixed_ways: bool = True
    zero_shot: bool = False
    network: Callable[[Preset], Model] = _network
    optimizer: Callable[[Preset], optax.GradientTransformation] = _adam


def _gradient_based(factory: Callable[..., Learner]) -> Callable[[Model, Preset, str], Learner]:
    def build(network: Model, settings: Preset, norm: str) -> Learner:
        return factory(
            network,
            inner_optimizer=optax.sgd(settings.inner_lr),
            steps=settings.inner_steps,
            eval_steps=settings.eval_steps,
            norm=norm,
            loss=losses.mse if settings.ways is None else losses.cross_entropy,
            **({} if settings.order is None else {"order": settings.order}),
        )

    return build


_INNER_LOOP = ("inner_lr", "inner_steps", "eval_steps", "report_steps")

LEARNERS: dict[str, LearnerSpec] = {
    "maml": LearnerSpec(
        maml,
        "optimization-based",
        "an initialisation from which a few gradient steps suffice (Finn et al. 2017)",
        _gradient_based(maml),
        takes=(*_INNER_LOOP, "order"),
    ),
    "fomaml": LearnerSpec(
        fomaml,
        "optimization-based",
        "MAML without second derivatives (Finn et al. 2017)",
        _gradient_based(fomaml),
        takes=_INNER_LOOP,
    ),
}


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """How the command line builds a source of tasks.

    Attributes:
      description: one line.
      preset: what `train --tasks NAME` runs.
      build: `(split, settings, shape, data) -> tasks`, with `shape` the ways, shots and queries; or
        the `SplitImages` to draw them from.
      takes: the fields of `Preset` that only some sources have and this one does.
      has_validation: whether these settings leave classes to validate with.
      ink: whether its images are strokes, light on dark.
    """

    description: str
    preset: str
    build: Callable[[str, Preset, dict[str, Any], str | None], TaskDistribution | SplitImages]
    takes: tuple[str, ...] = ("ways", "train_ways")
    has_validation: Callable[[Preset], bool] = lambda settings: True
    ink: bool = False


_IMAGES = ("ways", "train_ways", "stream", "workers")
_OWN_IMAGES = (*_IMAGES, "rotations", "image_size", "channels", "classes", "split_seed")


def _classes(settings: Preset) -> ClassSplit | tuple[float, ...]:
    """The class split that --classes stands for: three fractions, or a JSON file of names."""
    given = str(settings.classes)
    try:
        fractions = tuple(float(part) for part in given.split(","))
    except ValueError:
        pass
    else:
        try:
            ClassSplit.from_fractions((), fractions)
        except ValueError as error:
            raise ValueError(f"--classes: {error}") from None
        return fractions
    if settings.split_seed:
        raise ValueError("--split-seed: a class split by names needs none; leave it out")
    path = Path(given)
    if not path.is_file():
        raise ValueError(
            f"--classes: got {given}; it must be three fractions such as 0.64,0.16,0.2, or a JSON file "
            '{"train": [names], "validation": [names], "test": [names]}'
        )
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        split: dict[str, Any] = {
            part: names if isinstance(names, str) else tuple(names) for part, names in parts.items()
        }
        return ClassSplit(**split)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--classes: {path} is no class split in JSON: {error}") from None


def _has_validation(settings: Preset) -> bool:
    classes = _classes(settings)
    return bool(classes.validation) if isinstance(classes, ClassSplit) else classes[1] > 0


def _folder(split: str, settings: Preset, shape: dict[str, Any], data: str | None) -> SplitImages:
    del split, shape, data
    path = settings.tasks.partition(":")[2]
    prepared = tasks.prepare_folder(
        path, size=settings.image_size, channels=settings.channels, skip_unreadable=settings.skip_unreadable
    )
    return SplitImages(prepared, _classes(settings))


def _tfds(split: str, settings: Preset, shape: dict[str, Any], data: str | None) -> SplitImages:
    del split, shape
    name = settings.tasks.partition(":")[2]
    prepared = tasks.prepare_tfds(
        name,
        size=settings.image_size,
        channels=settings.channels,
        label=settings.label,
        tfds_splits=settings.tfds_splits and settings.tfds_splits.split(","),
        data_dir=data,
    )
    return SplitImages(prepared, _classes(settings))


def _copied(
    images: Callable[[str], SplitImages],
) -> Callable[[str, Preset, dict[str, Any], str | None], SplitImages]:
    """A set that nobody may pass on: from the user's own copy."""

    def build(split: str, settings: Preset, shape: dict[str, Any], data: str | None) -> SplitImages:
        del split, shape
        if data is None:
            raise ValueError(f"--data: {settings.tasks} is read from your own copy; add --data DIR")
        return images(data)

    return build


TASKS: dict[str, TaskSpec] = {
    "glyphs": TaskSpec(
        "procedurally drawn characters, 28x28; needs no data",
        "glyphs",
        lambda split, settings, shape, data: tasks.glyphs(split, **shape),
        ink=True,
    ),
    "omniglot": TaskSpec(
        "handwritten characters of 50 alphabets, 28x28; --data DIR with the official archives, or a download",
        "omniglot",
        lambda split, settings, shape, data: tasks.omniglot(
            split, **shape, data=data, protocol=str(settings.protocol), rotations=settings.rotations
        ),
        takes=("ways", "train_ways", "protocol", "rotations", "data"),
        has_validation=lambda settings: omniglot_split(str(settings.protocol)).sizes[1] > 0,
        ink=True,
    ),
    "sinusoid": TaskSpec(
        "regression of sine waves of random amplitude and phase; needs no data",
        "sinusoid",
        lambda split, settings, shape, data: tasks.sinusoid(split, **shape),
        takes=(),
    ),
    "harmonic": TaskSpec(
        "regression of sums of two sine waves; needs no data",
        "harmonic",
        lambda split, settings, shape, data: tasks.harmonic(split, **shape),
        takes=(),
    ),
    "folder:PATH": TaskSpec(
        "a folder of one's own images, one subfolder a class",
        "folder",
        _folder,
        takes=(*_OWN_IMAGES, "skip_unreadable"),
        has_validation=_has_validation,
    ),
    "tfds:NAME": TaskSpec(
        "an image classification set of tensorflow-datasets; --data DIR is its data_dir",
        "tfds",
        _tfds,
        takes=(*_OWN_IMAGES, "data", "label", "tfds_splits"),
        has_validation=_has_validation,
    ),
    "mini_imagenet": TaskSpec(
        "100 classes of ImageNet, 84x84, by Ravi and Larochelle's split; --data DIR with your copy",
        "mini-imagenet",
        _copied(mini_imagenet_images),
        takes=(*_IMAGES, "data"),
    ),
    "cifar_fs": TaskSpec(
        "CIFAR-100, 32x32, by Bertinetto's split; --data DIR with its archive, or tensorflow-datasets'",
        "cifar-fs",
        lambda split, settings, shape, data: cifar_fs_images(data),
        takes=(*_IMAGES, "data"),
    ),
    "cub": TaskSpec(
        "200 kinds of birds, 84x84, by Chen's split; --data DIR with CUB_200_2011",
        "cub",
        _copied(cub_images),
        takes=(*_IMAGES, "data"),
    ),
}
