"""Where tasks come from, by name, for the command line."""

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxmeta import tasks
from jaxmeta.checks import parsed_json
from jaxmeta.core import Key, TaskDistribution, TaskStream
from jaxmeta.registry import LEARNERS
from jaxmeta.settings import Preset, flag_of, lookup
from jaxmeta.tasks import ClassSplit
from jaxmeta.tasks.official import cifar_fs_images, cub_images, mini_imagenet_images
from jaxmeta.tasks.omniglot import omniglot_split
from jaxmeta.tasks.prepared import SplitImages

_QUERIES = ("queries", "train_queries")
_EPISODES = ("ways", "train_ways", *_QUERIES)


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
      metadata: `(data) -> {class: vector}` of images that zero-shot tasks can be made of.
    """

    description: str
    preset: str
    build: Callable[[str, Preset, dict[str, Any], str | None], TaskDistribution | SplitImages]
    takes: tuple[str, ...] = _EPISODES
    has_validation: Callable[[Preset], bool] = lambda settings: True
    ink: bool = False
    metadata: Callable[[str | None], Mapping[str, Any]] | None = None


_IMAGES = (*_EPISODES, "stream", "workers")
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
        parts = parsed_json(path.read_text(encoding="utf-8"))
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
        return images(_copy(settings, data))

    return build


def _copy(settings: Preset, data: str | None) -> str:
    """The folder of --data, of a set that is not downloaded."""
    if data is None:
        raise ValueError(f"--data: {settings.tasks} is read from your own copy; add --data DIR")
    return data


def _digits(name: str, description: str, digits: Callable[..., TaskDistribution]) -> TaskSpec:
    def build(split: str, settings: Preset, shape: dict[str, Any], data: str | None) -> TaskDistribution:
        return digits(split, **shape, data=_copy(settings, data), size=settings.image_size or 28)

    return TaskSpec(
        description,
        name,
        build,
        takes=(*_EPISODES, "image_size", "data"),
        has_validation=lambda settings: False,
        ink=True,
    )


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
            split,
            **shape,
            data=data,
            protocol=str(settings.protocol),
            rotations=settings.rotations,
            within_alphabet=settings.within_alphabet,
            size=settings.image_size or 28,
        ),
        takes=(*_EPISODES, "protocol", "rotations", "within_alphabet", "image_size", "data"),
        has_validation=lambda settings: omniglot_split(str(settings.protocol)).sizes[1] > 0,
        ink=True,
    ),
    "mnist": _digits(
        "mnist",
        "handwritten digits, 28x28; no class split, for transfer; --data DIR with the official files",
        tasks.mnist,
    ),
    "usps": _digits(
        "usps",
        "postal digits, 28x28; no class split, for transfer; --data DIR with zip.train.gz and zip.test.gz",
        tasks.usps,
    ),
    "sinusoid": TaskSpec(
        "regression of sine waves of random amplitude and phase; needs no data",
        "sinusoid",
        lambda split, settings, shape, data: tasks.sinusoid(split, **shape),
        takes=_QUERIES,
    ),
    "harmonic": TaskSpec(
        "regression of sums of two sine waves; needs no data",
        "harmonic",
        lambda split, settings, shape, data: tasks.harmonic(split, **shape),
        takes=_QUERIES,
    ),
    "quadratics": TaskSpec(
        "quadratic functions of 10 variables, to be minimised by learned optimizers; needs no data",
        "quadratics",
        lambda split, settings, shape, data: tasks.quadratics(split, dim=settings.shots),
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
        metadata=lambda data: tasks.cub_attributes(str(data)),
    ),
}

# Episodes at once in an evaluation from a stream.
_STREAMED = 20
# Bytes that an evaluation keeps of each episode, at the least: two keys, and its result.
_KEYS = 20
# Images of a mini-batch, of which each device has its own.
_SUPERVISED_BATCH = 64


def source_of(name: str) -> TaskSpec:
    """The source that `name` means: what stands after a colon is its own, "folder:PATH".

    Raises:
      ValueError: there is none of that name.
    """
    kind, colon, _ = name.partition(":")
    entries = {entry.partition(":")[0] + ":" * (":" in entry): entry for entry in TASKS}
    return TASKS[entries[kind + colon]] if kind + colon in entries else lookup("--tasks", name, TASKS)


def tasks_of(
    settings: Preset,
    split: str,
    data: str | None = None,
    key: Key | None = None,
    for_evaluation: bool | None = None,
    process: tuple[int, int] = (0, 1),
) -> TaskDistribution | TaskStream:
    """The tasks of a part: the training protocol for "train", else the test protocol.

    Args:
      settings: of the run.
      split: "train", "validation" or "test".
      data: the folder of --data.
      key: that a stream's episodes are drawn with: of the run for "train", else of the evaluation.
      for_evaluation: whether a stream numbers its episodes as an evaluation does; None: all but "train".
      process: (index, count) of those that share a stream to train on; each gets its part of every batch.
    """
    prefix = "train_" if split == "train" else ""
    shape = {field: getattr(settings, prefix + field) for field in ("ways", "shots", "queries")}
    if shape["ways"] is None:
        del shape["ways"]
    if for_evaluation is None:
        for_evaluation = split != "train"
    supervised = split == "train" and LEARNERS[settings.learner].supervised
    if supervised and settings.stream:
        raise ValueError(
            f"--stream: {settings.learner} trains on mini-batches of all classes, which must be in memory"
        )
    with _in_words_of_flags(prefix):
        found = _tasks_of(settings, split, data, key, for_evaluation, shape, process)
        if settings.sequence is not None:
            if not isinstance(found, TaskDistribution):
                raise ValueError("--stream: sequences are drawn from memory only; leave it out")
            found = tasks.sequences(found, length=settings.sequence, strings=settings.label_strings)
        if supervised:
            assert isinstance(found, TaskDistribution)
            found = tasks.supervised(found, batch=_SUPERVISED_BATCH)
    if isinstance(found, TaskDistribution):
        _check_memory(found, settings, split, prefix)
    return found


def _check_memory(found: TaskDistribution, settings: Preset, split: str, prefix: str) -> None:
    """Refuses tasks that would fill the memory by themselves, before anything is compiled for them."""
    drawn = jax.eval_shape(found.sample, jax.random.key(0))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(drawn))
    # Of a meta-step all tasks are drawn at once, of an evaluation the keys of all.
    if split == "train":
        count, number = "--meta-batch", settings.meta_batch
        total = size * number
    else:
        count, number = "--episodes", settings.episodes
        total = size + number * _KEYS
    there = memory()
    if total > there:
        shape = ", ".join(flag_of(prefix + field) for field in ("ways", "shots", "queries"))
        raise ValueError(
            f"{count}: got {number}; so many tasks of {size / 1e6:,.1f} MB ({shape}) take {total / 1e9:,.0f} "
            f"GB, and there are {there / 1e9:,.0f}; fewer or smaller ones would fit"
        )


def memory() -> int:
    """Bytes of memory of this machine, or of all its devices where that is more."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(host, sum(each.get("bytes_limit", 0) for each in stats))


# What the command line calls arguments of `jaxmeta.tasks`.
_FLAGS = {
    "path": "--tasks",
    "data": "--data",
    "length": "--sequence",
    "strings": "--strings",
    "protocol": "--protocol",
    "size": "--image-size",
}


@contextlib.contextmanager
def _in_words_of_flags(prefix: str) -> Iterator[None]:
    """What the library says of its arguments, for those who gave flags."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        # What is wrong stands before the first colon.
        names, colon, said = str(error).partition(": ")
        flags = {name: flag_of(prefix + name) for name in ("ways", "shots", "queries")} | _FLAGS
        if re.fullmatch(r"\w+(, \w+)*", names):
            names = ", ".join(flags.get(name, name) for name in names.split(", "))
        said = names + colon + said
        for argument, flag in (
            ("skip_unreadable=True", "--skip-unreadable"),
            ("(classes)", "(--classes)"),
            ("with label", "with --label"),
            ("with tfds_splits", "with --tfds-splits"),
            ("with data_dir", "with --data"),
        ):
            said = said.replace(argument, flag)
        raise type(error)(said) from error


def _tasks_of(
    settings: Preset,
    split: str,
    data: str | None,
    key: Key | None,
    for_evaluation: bool,
    shape: dict[str, Any],
    process: tuple[int, int],
) -> TaskDistribution | TaskStream:
    source = source_of(settings.tasks).build(split, settings, shape, data)
    if not isinstance(source, SplitImages):
        return source
    protocol: dict[str, Any] = {
        "split": split,
        "classes": source.classes,
        "seed": settings.split_seed,
        "rotations": settings.rotations or "none",
        "protocol": source.protocol,
        **shape,
    }
    about = source_of(settings.tasks).metadata
    if not settings.shots and about is not None:
        protocol["metadata"] = about(data)
    if not settings.stream:
        return tasks.from_prepared(source.prepared, **protocol)
    if not settings.shots:
        raise ValueError("--stream: zero-shot tasks are drawn from memory only; leave it out")
    return tasks.stream(
        source.prepared,
        key=jax.random.key(0) if key is None else key,
        meta_batch=_STREAMED if for_evaluation else settings.meta_batch,
        for_evaluation=for_evaluation,
        # Evaluations are short: to start processes for each would take longer than reading does.
        workers=0 if for_evaluation else settings.workers,
        process=(0, 1) if for_evaluation else process,
        **protocol,
    )


def validation_tasks_of(
    settings: Preset, data: str | None = None, key: Key | None = None
) -> TaskDistribution | TaskStream | None:
    """Tasks to choose parameters by; None where the class split has no validation part."""
    if not source_of(settings.tasks).has_validation(settings):
        return None
    return tasks_of(settings, "validation", data, key)


def with_form(settings: Preset, images: Mapping[str, Any] | None) -> Preset:
    """`settings` with the size and channels that one's own images turned out to have.

    Kept with the run, they hold when images of another kind join the folder.
    """
    if images is None or "image_size" not in source_of(settings.tasks).takes:
        return settings
    return dataclasses.replace(settings, image_size=images["size"], channels=images["channels"])
