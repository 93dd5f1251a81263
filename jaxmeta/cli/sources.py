"""Where tasks come from, by name: functions whose signature has their settings."""

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
from jaxmeta.tasks.official import cifar_fs_images, cub_images, mini_imagenet_images
from jaxmeta.tasks.prepared import ReadSummary, SplitImages
from jaxmeta.tasks.regression import read_table
from jaxmeta.tasks.splits import check_part, class_split

if TYPE_CHECKING:
    from jaxmeta.cli.config import Config

# The key of a source that is `module:name`.
OWN = "module:name"
# Episodes at once in an evaluation from a stream.
_STREAMED = 20
# Bytes that an evaluation keeps of each episode, at the least: two keys, and its result.
_KEYS = 20
# Images of a mini-batch, of which each device has its own.
_SUPERVISED_BATCH = 64


class Source(NamedTuple):
    """A source of tasks.

    Attributes:
      key: its entry of `TASKS`.
      function: `(split, *, …) -> tasks`, or `(path, split, *, …)` where a path stands after the colon.
      description: one line.
      preset: the protocol that `train --tasks NAME` runs.
      ink: whether its images are strokes, light on dark.
      images: `(argument, settings, data) -> SplitImages`, of sources that can also be streamed from disk.
      files: whether these are image files of one's own, of which some may be left out.
      arrays: `(path) -> LabelledArrays`, of sources that read labelled arrays from a file.
      columns: `(path, settings) -> settings` that a table turns out to have, of sources that read one.
      metadata: `(data) -> {class: vector}` of images that zero-shot tasks can be made of.
      argument: what stands after the colon.
      copied: whether the images are read from a copy of one's own, which `--data` names.
      validates: whether there are classes to choose parameters by, unless the class split says otherwise.
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
    metadata: Callable[[str | None], Mapping[str, Any]] | None = None
    argument: str = ""
    copied: bool = False
    validates: bool = True


def _folder(argument: str, settings: Mapping[str, Any], data: str | None) -> SplitImages:
    del data
    reading = {name: settings[name] for name in ("size", "channels", "skip_unreadable")}
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
            "a folder of one's own images: a subfolder a class, folders train, val, test of such, or csv "
            "lists",
            "folder",
            images=_folder,
            files=True,
        ),
        Source(
            "arrays:FILE",
            tasks.from_npz,
            "one's own labelled arrays: an npz file with x and y",
            "arrays",
            arrays=_arrays,
        ),
        Source(
            "table:FILE",
            tasks.from_table,
            "regression of one's own: a csv or npz file with columns task, x… and y…",
            "table",
            columns=_columns,
        ),
        Source(
            "tfds:NAME",
            tasks.from_tfds,
            "an image classification set of tensorflow-datasets; --data DIR is its data_dir",
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
            metadata=lambda data: tasks.cub_attributes(str(data)),
            copied=True,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Settings of tasks that are presented as sequences (`jm.tasks.sequences`).

    Attributes:
      sequence: length of the sequence that a task's support set is shown as, with labels one step late.
      strings: letters and characters of labels that are strings, such as 5,5; without it labels are classes.
    """

    sequence: int | None = None
    strings: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Streaming:
    """Settings of images that can be read step by step (`jm.tasks.stream`).

    Attributes:
      stream: whether images are read from disk step by step: for data larger than the device.
    """

    stream: bool = False


def source_of(name: str) -> Source:
    """Return the source that a name means: what stands after a colon is its own, "folder:PATH".

    Raises:
      ArgumentError: there is none of that name, or nothing stands after its colon.
    """
    kind, colon, argument = name.partition(":")
    for key, source in TASKS.items():
        ours, its_colon, placeholder = key.partition(":")
        if (kind, colon) == (ours, its_colon):
            if colon and argument in ("", placeholder):
                raise ArgumentError("tasks", f"got {name}; put your own {placeholder} after the colon")
            return source._replace(argument=argument)
    if is_own(name):
        function = names.find("tasks", name, {})
        kind = "folder" if schema.accepts(function, "ways") else "sinusoid"
        return Source(OWN, function, schema.summary(function), kind)
    names.lookup("tasks", name, TASKS)
    raise AssertionError(name)


def is_own(name: str) -> bool:
    """Return whether a name is `module:name` of code that is not ours; nothing is imported for it."""
    kind, colon, _ = name.partition(":")
    return names.is_own(name) and not any(key.startswith(kind + colon) for key in TASKS)


def key_of(name: str) -> str:
    """Return the entry of `TASKS` that a name means, or `OWN`; one with a placeholder means itself."""
    return OWN if is_own(name) else name if name in TASKS else source_of(name).key


def tasks_of(
    config: "Config",
    split: str,
    key: Key | None = None,
    for_evaluation: bool | None = None,
    process: tuple[int, int] = (0, 1),
) -> TaskDistribution | TaskStream:
    """Build the tasks of a part: the training protocol for "train", else the test protocol.

    Args:
      config: of the run.
      split: "train", "validation" or "test".
      key: that a stream's episodes are drawn with: of the run for "train", else of the evaluation.
      for_evaluation: whether a stream numbers its episodes as an evaluation does; None: all but "train".
      process: (index, count) of those that share a stream to train on; each gets its part of every batch.
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
            f"{config.learner['name']} trains on mini-batches of all classes, which must be in memory",
        )
    with renaming(_told_apart(config) if training else {}):
        found = _drawn(config, names.source, split, settings, key, for_evaluation, process)
    if settings.get("sequence") is not None:
        if not isinstance(found, TaskDistribution):
            raise ArgumentError("stream", "sequences are drawn from memory only; leave it out")
        with renaming({"length": "sequence"}):
            found = tasks.sequences(found, length=settings["sequence"], strings=settings["strings"])
    if supervised:
        found = tasks.supervised(found, batch=_SUPERVISED_BATCH)
    if isinstance(found, TaskDistribution):
        _check_memory(found, config, split)
    return found


def _drawn(
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
    own = schema.settings_of(source.function, ("split", "data"))
    if source.images is None:
        values = {name: settings[name] for name in own} | shape
        if schema.accepts(source.function, "data"):
            values["data"] = data
        found = source.function(*([source.argument] if source.argument else []), split, **values)
        check_tasks(found)
        if found.card is None:
            kind: Kind = "classification" if "ways" in own else "regression"
            shape = {name: value for name, value in shape.items() if value is not schema.MISSING}
            found = found._replace(card=ProtocolCard(config.tasks["name"], check_part(split), kind, **shape))
        return found
    images = source.images(source.argument, settings, data)
    protocol: dict[str, Any] = {
        "split": split,
        "classes": images.classes,
        "split_seed": settings.get("split_seed", 0),
        "rotations": settings.get("rotations", "none"),
        "protocol": images.protocol,
        "skip_small_classes": settings.get("skip_small_classes", False),
        **shape,
    }
    if not shape["shots"] and source.metadata is not None:
        protocol["metadata"] = source.metadata(data)
    if not settings["stream"]:
        return tasks.from_prepared(images.prepared, **protocol)
    if not shape["shots"]:
        raise ArgumentError("stream", "zero-shot tasks are drawn from memory only; leave it out")
    return tasks.stream(
        images.prepared,
        key=jax.random.key(0) if key is None else key,
        meta_batch=_STREAMED if for_evaluation else config.training.meta_batch,
        for_evaluation=for_evaluation,
        # Evaluations are short: to start processes for each would take longer than reading does.
        workers=0 if for_evaluation else config.run.workers,
        process=(0, 1) if for_evaluation else process,
        **protocol,
    )


def with_columns(config: "Config") -> "Config":
    """Return the configuration with the columns that a table of one's own turned out to have."""
    source = config.names().source
    if source.columns is None:
        return config
    return config.replaced(tasks=source.columns(source.argument, config.settings("tasks")))


def summary_of(config: "Config") -> ReadSummary | None:
    """Return what was read of image files of one's own; None where there are none."""
    source, settings = config.names().source, config.settings("tasks")
    # Of others to prepare them again, if only to find them in the cache, would be long.
    if source.images is None or not source.files:
        return None
    return source.images(source.argument, settings, config.run.data).prepared.summary


def validation_tasks_of(config: "Config", key: Key | None = None) -> TaskDistribution | TaskStream | None:
    """Build tasks to choose parameters by; None where the class split has no validation part."""
    if not config.names().source.validates:
        return None
    try:
        return tasks_of(config, "validation", key)
    except ValueError as error:
        if isinstance(error, ArgumentError) and error.name == "split":
            return None
        if is_own(config.tasks["name"]):
            # Who writes a source has no name of ours to refuse a part by.
            warnings.warn(f"there are no validation tasks: {error}", stacklevel=2)
            return None
        raise


def _told_apart(config: "Config") -> dict[str, str]:
    """Return the settings of training tasks by what tasks call them, where those of test tasks differ.

    Where they do not, a user who gave one has given the test tasks'.
    """
    factors = {"ways": 1, "shots": config.names().facts.train_shots, "queries": 1}
    found = config.tasks
    return {
        name: f"train_{name}"
        for name, factor in factors.items()
        if name in found and found[f"train_{name}"] != found[name] * factor
    }


@contextlib.contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Name arguments in errors as `names` says, inside the block."""
    try:
        yield
    except ArgumentError as error:
        renamed = ", ".join(names.get(name, name) for name in error.name.split(", "))
        if renamed == error.name:
            raise
        raise ArgumentError(renamed, error.problem) from error


def _check_memory(found: TaskDistribution, config: "Config", split: str) -> None:
    """Refuse tasks that would fill the memory by themselves, before anything is compiled for them."""
    drawn = jax.eval_shape(found.sample, jax.random.key(0))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(drawn))
    # Of a meta-step all tasks are drawn at once, of an evaluation the keys of all.
    if split == "train":
        name, number = "meta_batch", config.training.meta_batch
        total, prefix = size * number, "train_"
    else:
        name, number = "episodes", config.run.episodes
        total, prefix = size + number * _KEYS, ""
    there = memory()
    if total > there:
        shape = ", ".join(schema.flag_of(prefix + field) for field in ("ways", "shots", "queries"))
        raise ArgumentError(
            name,
            f"got {number}; so many tasks of {size / 1e6:,.1f} MB ({shape}) take {total / 1e9:,.0f} GB, and "
            f"there are {there / 1e9:,.0f}; fewer or smaller ones would fit",
        )


def memory() -> int:
    """Return the bytes of memory of this machine, or of all its devices where that is more."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(host, sum(each.get("bytes_limit", 0) for each in stats))


def absolute(name: str) -> str:
    """Return the name of a source with the path of its folder or file good in every folder."""
    kind, colon, path = name.partition(":")
    of_path = any(f"{kind}:{placeholder}" in TASKS for placeholder in ("PATH", "FILE"))
    if not of_path or not path or name in TASKS:
        return name
    return kind + colon + str(Path(path).expanduser().resolve())


def file_name(name: str) -> str:
    """Return a source's name as part of a file name: of a folder its last part."""
    kind, _, rest = name.partition(":")
    last = rest.rstrip("/").rpartition("/")[2]
    own = "".join(c if c.isalnum() or c in "._-" else "-" for c in last).strip("-.")
    return f"{kind}-{own}" if own else kind
