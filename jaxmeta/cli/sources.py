"""Sources of tasks by name: functions whose signatures hold their settings."""

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from jaxmeta import tasks
from jaxmeta.checks import ArgumentError
from jaxmeta.cli import names, schema
from jaxmeta.core import Key, Kind, ProtocolCard, TaskDistribution, TaskStream, check_tasks
from jaxmeta.declare import facts_of
from jaxmeta.tasks.array_files import LabelledArrays, read_npz
from jaxmeta.tasks.emoji import emoji_images, emoji_vectors
from jaxmeta.tasks.official import cifar_fs_images, cub_images, mini_imagenet_images
from jaxmeta.tasks.prepared import ReadSummary, SplitImages
from jaxmeta.tasks.regression import read_table
from jaxmeta.tasks.splits import check_part, class_split

if TYPE_CHECKING:
    from jaxmeta.cli.config import Config

# Key of user-defined sources.
OWN = "module:name"
# Episodes in a batch of an evaluation from a stream.
_STREAM_BATCH = 20
# Minimum number of bytes that an evaluation keeps per episode: two keys and the result.
_EPISODE_BYTES = 20
# Images in a mini-batch of supervised training, on each device.
_SUPERVISED_BATCH = 64


class Source(NamedTuple):
    """A source of tasks.

    Attributes:
      key: key in `TASKS`.
      function: `(split, *, …) -> tasks`, or `(path, split, *, …)` for names with a path after the colon.
      description: description in one line.
      preset: protocol of `train --tasks NAME`.
      ink: whether its images are strokes, light on dark.
      images: `(argument, settings, data) -> SplitImages`, for sources that can also be streamed from disk.
      files: whether it reads the user's image files, some of which may be left out.
      arrays: `(path) -> LabelledArrays`, for sources that read labelled arrays from a file.
      columns: `(path, settings) -> settings` with the columns of a table, for sources that read a table.
      metadata: `(classes, settings, data) -> {class: vector}`, for sources that have zero-shot tasks.
      argument: part of the name after the colon.
      copied: whether it reads the user's copy of the data, which `--data` names.
      validates: whether it has validation classes, unless the class split says otherwise.
    """

    key: str
    function: Callable[..., Any]
    description: str
    preset: str
    ink: bool = False
    images: Callable[[str, Mapping[str, Any], str | None], SplitImages] | None = None
    files: bool = False
    arrays: Callable[[str], LabelledArrays] | None = None
    columns: Callable[[str, Mapping[str, Any]], Mapping[str, Any]] | None = None
    metadata: Callable[[tuple[str, ...], Mapping[str, Any], str | None], Mapping[str, Any]] | None = None
    argument: str = ""
    copied: bool = False
    validates: bool = True


def _folder(argument: str, settings: Mapping[str, Any], data: str | None) -> SplitImages:
    del data
    reading = {name: settings[name] for name in ("size", "channels", "domains", "skip_unreadable")}
    prepared = tasks.prepare_folder(argument, **reading)
    return SplitImages(prepared, class_split(settings["classes"]))


def _arrays(argument: str) -> LabelledArrays:
    return read_npz(Path(argument).expanduser())


def _columns(argument: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    reading = {name: settings[name] for name in ("task_column", "inputs", "targets")}
    table = read_table(Path(argument).expanduser(), **reading)
    return {"inputs": table.inputs, "targets": table.targets}


def _tfds(argument: str, settings: Mapping[str, Any], data: str | None) -> SplitImages:
    reading = {name: settings[name] for name in ("size", "channels", "image", "label", "tfds_splits")}
    return SplitImages(tasks.prepare_tfds(argument, **reading, data=data), class_split(settings["classes"]))


def _emoji(argument: str, settings: Mapping[str, Any], data: str | None) -> SplitImages:
    del argument
    used = ("size", "styles", "test_styles", "min_styles", "classes", "word_vectors")
    return emoji_images(str(data), **{name: settings[name] for name in used})


def _emoji_vectors(
    classes: tuple[str, ...], settings: Mapping[str, Any], data: str | None
) -> Mapping[str, Any]:
    del data
    return emoji_vectors(settings["word_vectors"], classes)


def _sized(images: Callable[..., SplitImages]) -> Callable[..., SplitImages]:
    def build(argument: str, settings: Mapping[str, Any], data: str | None) -> SplitImages:
        del argument
        return images(data, size=settings["size"])

    return build


TASKS: dict[str, Source] = {
    source.key: source
    for source in (
        Source(
            "glyphs", tasks.glyphs, "procedurally drawn characters, 28x28; needs no data", "glyphs", ink=True
        ),
        Source(
            "omniglot",
            tasks.omniglot,
            "handwritten characters of 50 alphabets, 28x28; --data DIR with the official archives, or a "
            "download",
            "omniglot",
            ink=True,
        ),
        Source(
            "mnist",
            tasks.mnist,
            "handwritten digits, 28x28; no class split, for transfer; --data DIR with the official files",
            "mnist",
            ink=True,
            copied=True,
            validates=False,
        ),
        Source(
            "fashion_mnist",
            tasks.fashion_mnist,
            "grey pictures of ten kinds of clothes, 28x28; no class split, for transfer; --data DIR with the "
            "official files",
            "fashion-mnist",
            copied=True,
            validates=False,
        ),
        Source(
            "usps",
            tasks.usps,
            "postal digits, 28x28; no class split, for transfer; --data DIR with zip.train.gz, zip.test.gz",
            "usps",
            ink=True,
            copied=True,
            validates=False,
        ),
        Source(
            "sinusoid",
            tasks.sinusoid,
            "regression of sine waves of random amplitude and phase; needs no data",
            "sinusoid",
        ),
        Source("harmonic", tasks.harmonic, "regression of sums of two sine waves; needs no data", "harmonic"),
        Source(
            "quadratics",
            tasks.quadratics,
            "quadratic functions of 10 variables, to be minimised by learned optimizers; needs no data",
            "quadratics",
        ),
        Source(
            "folder:PATH",
            tasks.from_folder,
            "a folder of your own images: one subfolder per class, optionally inside folders train, val and "
            "test, or csv lists",
            "folder",
            images=_folder,
            files=True,
        ),
        Source(
            "arrays:FILE",
            tasks.from_npz,
            "your own labelled arrays: an npz file with x and y",
            "arrays",
            arrays=_arrays,
        ),
        Source(
            "table:FILE",
            tasks.from_table,
            "your own regression tasks: a csv or npz file with columns task, x… and y…",
            "table",
            columns=_columns,
        ),
        Source(
            "tfds:NAME",
            tasks.from_tfds,
            "an image classification data set of tensorflow-datasets; --data DIR is its data_dir",
            "tfds",
            images=_tfds,
        ),
        Source(
            "mini_imagenet",
            tasks.mini_imagenet,
            "100 classes of ImageNet, 84x84, by Ravi and Larochelle's split; --data DIR with your copy",
            "mini-imagenet",
            images=_sized(mini_imagenet_images),
            files=True,
            copied=True,
        ),
        Source(
            "cifar_fs",
            tasks.cifar_fs,
            "CIFAR-100, 32x32, by Bertinetto's split; --data DIR with its archive, or tensorflow-datasets'",
            "cifar-fs",
            images=lambda argument, settings, data: cifar_fs_images(data),
        ),
        Source(
            "cub",
            tasks.cub,
            "200 kinds of birds, 84x84, by Chen's split; --data DIR with CUB_200_2011",
            "cub",
            images=_sized(cub_images),
            files=True,
            metadata=lambda classes, settings, data: tasks.cub_attributes(str(data)),
            copied=True,
        ),
        Source(
            "emoji",
            tasks.emoji,
            "1,600 things in the styles of several designers, 84x84; --data DIR with packs of Iconify",
            "emoji",
            images=_emoji,
            files=True,
            metadata=_emoji_vectors,
            copied=True,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Settings of tasks that are presented as sequences (`jm.tasks.sequences`).

    Attributes:
      sequence: length of the sequence of a task's support examples, with labels one step late.
      strings: size of the alphabet and length of labels that are strings, such as 5,5; by default labels are
        class numbers.
    """

    sequence: int | None = None
    strings: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Streaming:
    """Settings of images that can be streamed (`jm.tasks.stream`).

    Attributes:
      stream: whether to read images from disk step by step, for data larger than a device's memory.
    """

    stream: bool = False


def source_of(name: str) -> Source:
    """Return the source that a name refers to, with the part after a colon as its argument.

    Raises:
      ArgumentError: no source has this name, or the part after the colon is missing.
    """
    kind, colon, argument = name.partition(":")
    for key, source in TASKS.items():
        key_kind, key_colon, placeholder = key.partition(":")
        if (kind, colon) == (key_kind, key_colon):
            if colon and argument in ("", placeholder):
                raise ArgumentError("tasks", f"got {name}; give your {placeholder} after the colon")
            return source._replace(argument=argument)
    if is_own(name):
        function = names.find("tasks", name, {})
        preset = "folder" if schema.accepts(function, "ways") else "sinusoid"
        return Source(OWN, function, schema.summary(function), preset)
    names.lookup("tasks", name, TASKS)
    raise AssertionError(name)


def is_own(name: str) -> bool:
    """Return whether a name is `module:name` of user-defined code, without importing it."""
    kind, colon, _ = name.partition(":")
    return names.is_own(name) and not any(key.startswith(kind + colon) for key in TASKS)


def key_of(name: str) -> str:
    """Return the key in `TASKS` of a name, or `OWN`; a key with its placeholder is its own key."""
    return OWN if is_own(name) else name if name in TASKS else source_of(name).key


def tasks_of(
    config: "Config",
    split: str,
    key: Key | None = None,
    for_evaluation: bool | None = None,
    process: tuple[int, int] = (0, 1),
) -> TaskDistribution | TaskStream:
    """Build the tasks of a split, with the shape of training tasks for "train", else that of test tasks.

    Args:
      config: configuration of the run.
      split: "train", "validation" or "test".
      key: key of a stream's episodes, of the run for "train" and of the evaluation otherwise.
      for_evaluation: whether a stream numbers its episodes as an evaluation does; None for all splits but
        "train".
      process: (index, count) of the processes that share a training stream; each gets its part of a batch.

    Returns:
      The tasks.

    Raises:
      ArgumentError: a setting is invalid, or the tasks do not fit in memory.
    """
    names = config.names()
    training = split == "train"
    supervised = training and facts_of(names.learner).supervised
    if for_evaluation is None:
        for_evaluation = not training
    settings = config.settings("tasks")
    if supervised and settings.get("stream"):
        raise ArgumentError(
            "stream",
            f"{config.learner['name']} trains on mini-batches of all classes, which must be in "
            "memory; leave it out",
        )
    with renaming(_training_names(config) if training else {}):
        built = _build(config, names.source, split, settings, key, for_evaluation, process)
    if settings.get("sequence") is not None:
        if not isinstance(built, TaskDistribution):
            raise ArgumentError("stream", "sequences need all images in memory; leave it out")
        with renaming({"length": "sequence"}):
            built = tasks.sequences(built, length=settings["sequence"], strings=settings["strings"])
    if supervised:
        built = tasks.supervised(built, batch=_SUPERVISED_BATCH)
    if isinstance(built, TaskDistribution):
        _check_memory(built, config, split)
    return built


def _build(
    config: "Config",
    source: Source,
    split: str,
    settings: Mapping[str, Any],
    key: Key | None,
    for_evaluation: bool,
    process: tuple[int, int],
) -> TaskDistribution | TaskStream:
    data = config.run.data
    if source.copied and data is None:
        raise ArgumentError("data", f"{source.key} is read from your own copy; add --data DIR")
    prefix = "train_" if split == "train" else ""
    shape = {name: settings[prefix + name] for name in ("ways", "shots", "queries") if name in settings}
    known = schema.settings_of(source.function, ("split", "data"))
    if source.images is None:
        values = {name: settings[name] for name in known} | shape
        if schema.accepts(source.function, "data"):
            values["data"] = data
        built = source.function(*([source.argument] if source.argument else []), split, **values)
        check_tasks(built)
        if built.card is None:
            kind: Kind = "classification" if "ways" in known else "regression"
            shape = {name: value for name, value in shape.items() if value is not schema.MISSING}
            built = built._replace(card=ProtocolCard(config.tasks["name"], check_part(split), kind, **shape))
        return built
    images = source.images(source.argument, settings, data)
    protocol: dict[str, Any] = {
        "split": split,
        "classes": images.classes,
        "split_seed": settings.get("split_seed", 0),
        "rotations": settings.get("rotations", "none"),
        "protocol": images.protocol,
        "across": settings.get("across", False),
        "test_domains": settings.get("test_domains", settings.get("test_styles")),
        "skip_small_classes": settings.get("skip_small_classes", False),
        **shape,
    }
    if not shape["shots"] and source.metadata is not None:
        protocol["metadata"] = source.metadata(images.prepared.classes, settings, data)
    if not settings["stream"]:
        return tasks.from_prepared(images.prepared, **protocol)
    if not shape["shots"]:
        raise ArgumentError("stream", "zero-shot tasks need all images in memory; leave it out")
    return tasks.stream(
        images.prepared,
        key=jax.random.key(0) if key is None else key,
        meta_batch=_STREAM_BATCH if for_evaluation else config.training.meta_batch,
        for_evaluation=for_evaluation,
        # An evaluation is short: starting processes for it would take longer than reading.
        workers=0 if for_evaluation else config.run.workers,
        process=(0, 1) if for_evaluation else process,
        **protocol,
    )


def with_columns(config: "Config") -> "Config":
    """Return the configuration with the columns that were read from the user's table."""
    source = config.names().source
    if source.columns is None:
        return config
    return config.replaced(tasks=source.columns(source.argument, config.settings("tasks")))


def summary_of(config: "Config") -> ReadSummary | None:
    """Return a summary of the user's image files that were read; None for other sources."""
    source, settings = config.names().source, config.settings("tasks")
    # Other sources are skipped: preparing them once more takes long, even from the cache.
    if source.images is None or not source.files:
        return None
    return source.images(source.argument, settings, config.run.data).prepared.summary


def validation_tasks_of(config: "Config", key: Key | None = None) -> TaskDistribution | TaskStream | None:
    """Build the validation tasks; None where the class split has no validation part."""
    if not config.names().source.validates:
        return None
    try:
        return tasks_of(config, "validation", key)
    except ValueError as error:
        if isinstance(error, ArgumentError) and error.name == "split":
            return None
        if is_own(config.tasks["name"]):
            # User-defined sources may raise any ValueError for a split that they do not have.
            warnings.warn(f"training continues without validation tasks: {error}", stacklevel=2)
            return None
        raise


def _training_names(config: "Config") -> dict[str, str]:
    """Return names of settings for errors about training tasks: `train_ways` for `ways`, and so on.

    Settings that equal the test tasks' keep their names, since the user has given only those.
    """
    factors = {"ways": 1, "shots": config.names().facts.train_shots, "queries": 1}
    settings = config.tasks
    return {
        name: f"train_{name}"
        for name, factor in factors.items()
        if name in settings and settings[f"train_{name}"] != settings[name] * factor
    }


@contextlib.contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Rename arguments in errors by `names` inside the context."""
    try:
        yield
    except ArgumentError as error:
        renamed = ", ".join(names.get(name, name) for name in error.name.split(", "))
        if renamed == error.name:
            raise
        raise ArgumentError(renamed, error.problem) from error


def _check_memory(distribution: TaskDistribution, config: "Config", split: str) -> None:
    """Check that the tasks fit in memory, before anything is compiled for them."""
    drawn = jax.eval_shape(distribution.sample, jax.random.key(0))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(drawn))
    # A meta-step draws all its tasks at once, an evaluation only the keys of all.
    if split == "train":
        name, number = "meta_batch", config.training.meta_batch
        total, prefix = size * number, "train_"
    else:
        name, number = "episodes", config.run.episodes
        total, prefix = size + number * _EPISODE_BYTES, ""
    available = memory()
    if total > available:
        shape = ", ".join(schema.flag_of(prefix + field) for field in ("ways", "shots", "queries"))
        raise ArgumentError(
            name,
            f"got {number}; that many tasks of {size / 1e6:,.1f} MB ({shape}) need {total / 1e9:,.0f} GB of "
            f"memory, but there are {available / 1e9:,.0f} GB; give fewer or smaller tasks",
        )


def memory() -> int:
    """Return the bytes of memory of this machine, or of all its devices where they have more."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(host, sum(device.get("bytes_limit", 0) for device in stats))


def absolute(name: str) -> str:
    """Return the name of a source with the path of its folder or file made absolute."""
    kind, colon, path = name.partition(":")
    of_path = any(f"{kind}:{placeholder}" in TASKS for placeholder in ("PATH", "FILE"))
    if not of_path or not path or name in TASKS:
        return name
    return kind + colon + str(Path(path).expanduser().resolve())


def file_name(name: str) -> str:
    """Return a source's name as part of a file name, with only the last part of a path."""
    kind, _, rest = name.partition(":")
    last = rest.rstrip("/").rpartition("/")[2]
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in last).strip("-.")
    return f"{kind}-{safe}" if safe else kind
