"""Target data of a transfer: labelled images, split into those to learn from and those to score."""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxmeta.checks import ArgumentError, check_count, check_finite, join_names
from jaxmeta.cli import schema
from jaxmeta.cli.report import plural
from jaxmeta.cli.schema import Setting
from jaxmeta.cli.sources import OWN, Source, renaming, source_of
from jaxmeta.core import Batch, Key, card_of
from jaxmeta.tasks import labelled
from jaxmeta.tasks.omniglot import omniglot_split
from jaxmeta.tasks.prepared import ReadSummary, SplitImages
from jaxmeta.tasks.splits import PARTS, in_order, split_classes, split_of_parts

ALL = "all"
_SHOTS = 20
# Images of each class to score, for sources that draw any number of images.
_DRAWN = 15
# The shape of episodes, which every task source needs although its labelled images do not depend on it.
_EPISODE = {"ways": 2, "shots": 1, "queries": 1}
# Settings that read every class, unchanged, into the test classes.
_WHOLE = {"classes": (0.0, 0.0, 1.0), "rotations": "none", "split_seed": 0, "within_alphabet": False}
# Settings that a transfer chooses for the source's network.
_IMAGE_SETTINGS = ("size", "channels")

Shots = int | Literal["all"] | None


class Target(NamedTuple):
    """Labelled images of a target.

    Attributes:
      name: name of the target, as the user gave it.
      protocol: selection of the images, in words.
      x: images in [0, 1], or bytes.
      y: class indices.
      classes: names of the classes.
      ink: whether images of this source are strokes, light on dark.
      scored: True for each image that the source reserves for scoring; None where it reserves none.
      summary: summary of the user's files that were read and left out; None for other sources.
    """

    name: str
    protocol: str
    x: UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"]
    y: Int[np.ndarray, " n"]
    classes: tuple[str, ...]
    ink: bool
    scored: Bool[np.ndarray, " n"] | None = None
    summary: ReadSummary | None = None

    def batch(self, rows: Int[np.ndarray, " m"]) -> Batch:
        """Return the images of these rows and their classes."""
        return Batch(self.x[rows], self.y[rows])


class ShotSplit(NamedTuple):
    """Split of a target's images.

    Attributes:
      learn: rows of the images to learn from.
      score: rows of the images to score.
      description: number of images of each class to learn from, in words.
    """

    learn: Int[np.ndarray, " learn"]
    score: Int[np.ndarray, " score"]
    description: str


def target_settings(name: str) -> dict[str, Setting]:
    """Return the settings of a target's source that a transfer has flags for.

    The shape of episodes is left out, and so are the settings that a transfer fixes to read every class.

    Raises:
      ArgumentError: no source has this name.
    """
    with _renamed_to_target():
        source = source_of(name)
    fixed = (*_fixed(source), *_IMAGE_SETTINGS, "split", "data")
    # `_settings` checks that required ones are given, after the check that the target has images.
    return {
        each: setting._replace(default=None) if setting.default is schema.MISSING else setting
        for each, setting in schema.settings_of(source.function, fixed).items()
    }


def _fixed(source: Source) -> dict[str, Any]:
    # In a user-defined source these names may mean something else.
    return _EPISODE if source.key == OWN else {**_EPISODE, **_WHOLE}


def _renamed_to_target() -> contextlib.AbstractContextManager[None]:
    return renaming({"tasks": "target", "path": "target", "name": "target"})


def read_target(
    name: str,
    reading: Mapping[str, Any],
    shots: Shots,
    key: Key,
    *,
    data: str | None = None,
    size: int | None,
    channels: int | None,
) -> Target:
    """Read all images of all classes; for data with an official class split, of its test classes.

    The parts of a folder are respected. Where the parts to learn from (train and validation) and the part to
    score (test, or else validation) have the same classes, they stay apart. Where no two parts share a class,
    they are a class split, and the images of its test classes are read.

    Args:
      name: name of the source, as in `train --tasks`.
      reading: settings of the source, in place of their defaults (see `target_settings`).
      shots: number of images of each class to learn from (see `split_shots`), for sources that draw images.
      key: key of the images drawn.
      data: folder with the source's files.
      size: side of the images, where the source has this setting; None for the source's own.
      channels: number of channels, where the source has this setting; None for the source's own.

    Returns:
      The target.

    Raises:
      FileNotFoundError, NotADirectoryError: the images do not exist.
      ArgumentError: the source has no labelled images, does not have a setting, or has a single class.
    """
    scored = summary = None
    with _renamed_to_target():
        source = source_of(name)
        if not schema.accepts(source.function, "ways"):
            raise ArgumentError(
                "target", f"{name} has no labelled images; give a source of classification tasks"
            )
        if source.key == "folder:PATH" and not Path(source.argument).expanduser().exists():
            raise ArgumentError("target", f"{source.argument} does not exist")
        settings = _settings(name, source, reading, data, size, channels)
        if source.images is not None:
            images = source.images(source.argument, settings, data)
            rows = _rows_of(images)
            x, y, classes = images.prepared.read(rows.rows), rows.y, rows.classes
            protocol = images.protocol or rows.protocol
            scored, summary = rows.scored, images.prepared.summary
        elif source.arrays is not None:
            arrays = source.arrays(source.argument)
            rows = _rows_by_parts(
                arrays.y, np.full(len(arrays.y), "") if arrays.parts is None else arrays.parts
            )
            x, y, classes, protocol, scored = (
                arrays.x[rows.rows],
                rows.y,
                rows.classes,
                rows.protocol,
                rows.scored,
            )
            check_finite("target", x)
        else:
            x, y, protocol = _labelled(name, source, settings, data, shots, key)
            classes = _class_names(source, settings, int(y.max()) + 1)
    protocol = protocol or f"all classes of {name}"
    target = Target(name, protocol, x, y.astype(np.int32), classes, source.ink, scored, summary)
    if settings.get("skip_small_classes"):
        target = _without_small_classes(target, 1 if shots is None or shots == ALL else int(shots))
    classes = target.classes
    if len(classes) < 2:
        raise ArgumentError("target", f"{name} has {plural(len(classes), 'class')}; it must have at least 2")
    if x.ndim != 4:
        raise ArgumentError(
            "target",
            f"{name} has examples of shape {x.shape[1:]}; images have shape (height, width, channels)",
        )
    return target


def _without_small_classes(target: Target, shots: int) -> Target:
    """Return a target without classes that have too few images to learn from and to score."""
    if target.scored is None:
        sizes, needed = np.bincount(target.y, minlength=len(target.classes)), shots + 1
    else:
        sizes, needed = np.bincount(target.y[~target.scored], minlength=len(target.classes)), shots
    kept = np.flatnonzero(sizes >= needed)
    if len(kept) == len(sizes):
        return target
    small = [f"{target.classes[index]} ({sizes[index]})" for index in np.flatnonzero(sizes < needed)]
    warnings.warn(
        f"{target.name}: {len(small)} of {len(sizes)} classes have fewer than {needed} images and are left "
        f"out: {join_names(small)}",
        stacklevel=3,
    )
    rows = np.isin(target.y, kept)
    return target._replace(
        x=target.x[rows],
        y=np.searchsorted(kept, target.y[rows]).astype(np.int32),
        classes=tuple(target.classes[index] for index in kept),
        scored=None if target.scored is None else target.scored[rows],
    )


def _settings(
    name: str,
    source: Source,
    reading: Mapping[str, Any],
    data: str | None,
    size: int | None,
    channels: int | None,
) -> dict[str, Any]:
    """Return the values of all settings of a source."""
    if source.copied and data is None:
        raise ArgumentError("data", f"{source.key} is read from your own copy; add --data DIR")
    if data is not None and not schema.accepts(source.function, "data"):
        raise ArgumentError("data", f"{name} does not have this setting; leave it out")
    known = schema.settings_of(source.function, ("split", "data"))
    shape = {"size": size, "channels": channels}
    fixed = {**_fixed(source), **{each: value for each, value in shape.items() if value is not None}}
    values = (
        schema.defaults_of(known) | {each: fixed[each] for each in fixed if each in known} | dict(reading)
    )
    missing = [each for each in known if each not in values]
    if missing:
        raise ArgumentError("target", f"{name} needs {schema.flag_of(missing[0])}; add it")
    return values


def _labelled(
    name: str, source: Source, settings: Mapping[str, Any], data: str | None, shots: Shots, key: Key
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the images of a source in memory, their labels, and its protocol."""
    supplied = {"data": data} if schema.accepts(source.function, "data") else {}
    distribution = source.function("test", **settings, **supplied)
    if source.key != "glyphs":
        x, y = labelled(distribution)
    elif shots == ALL:
        raise ArgumentError("shots", f"got {ALL}, but {name} draws any number of images; give a number")
    else:
        count = _SHOTS if shots is None else int(shots)
        check_count("shots", count)
        x, y = labelled(distribution, per_class=_DRAWN + count, key=key)
    return np.asarray(x), np.asarray(y), card_of(distribution).protocol


class _Rows(NamedTuple):
    """Selection of the examples of a target.

    Attributes:
      rows: indices of the examples.
      y: class indices.
      classes: names of the classes.
      scored: as in `Target`.
      protocol: selection in words; empty where it is all examples.
    """

    rows: Int[np.ndarray, " n"]
    y: Int[np.ndarray, " n"]
    classes: tuple[str, ...]
    scored: Bool[np.ndarray, " n"] | None = None
    protocol: str = ""


def _rows_of(images: SplitImages) -> _Rows:
    """Select the prepared images of a target, without reading them."""
    prepared = images.prepared
    if prepared.parts:
        names = np.repeat(np.array(prepared.classes), prepared.sizes)
        # The images of a class are numbered part after part.
        by_class = np.array([counts for _, counts in prepared.parts]).T
        parts = np.concatenate([np.repeat([part for part, _ in prepared.parts], each) for each in by_class])
        return _rows_by_parts(names, parts)
    split, _ = split_classes(prepared.classes, images.classes, 0, "test", "")
    classes = tuple(split.ordered("test"))
    sizes = dict(zip(prepared.classes, prepared.sizes, strict=True))
    y = np.repeat(np.arange(len(classes)), [sizes[name] for name in classes])
    return _Rows(prepared.rows_of(classes), y, classes)


def _rows_by_parts(names: np.ndarray, parts: np.ndarray) -> _Rows:
    """Select the examples of a target by the class name and the part of each."""
    present = [part for part in PARTS if (parts == part).any()]
    every = tuple(in_order(set(names.tolist())))
    if not present:
        return _Rows(np.arange(len(names)), _class_indices(names, every), every)
    members = {part: set(names[parts == part].tolist()) for part in present}
    split = split_of_parts(members)
    if split is not None and split.test:
        rows = np.flatnonzero(parts == "test")
        classes = tuple(in_order(split.test, every))
        return _Rows(rows, _class_indices(names[rows], classes), classes, None, "its test classes")
    y, rows = _class_indices(names, every), np.arange(len(names))
    last = present[-1]
    scored = parts == last
    if split is not None or members[last] != set(every) or set(names[~scored].tolist()) != set(every):
        return _Rows(rows, y, every, None, f"the images of {', '.join(present)} together")
    learned = " and ".join(present[:-1])
    return _Rows(rows, y, every, scored, f"learning from its {learned} images, scoring on its {last} images")


def _class_indices(names: np.ndarray, classes: tuple[str, ...]) -> Int[np.ndarray, " n"]:
    """Return the index of each name among the classes."""
    indices = {name: index for index, name in enumerate(classes)}
    return np.array([indices[name] for name in names.tolist()])


def _class_names(source: Source, settings: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    if source.key == "omniglot":
        split = omniglot_split(settings["protocol"], settings["split_seed"])
        return tuple(sorted(split.part("test")))
    return tuple(map(str, range(classes)))


def split_shots(target: Target, shots: Shots, key: Key) -> ShotSplit:
    """Draw random examples of each class to learn from; the others are scored.

    Args:
      target: labelled images.
      shots: number of examples of each class; "all" for four fifths of each class; None for 20, but at most
        four fifths of the smallest class. Where the source reserves images for scoring, "all" and None are
        all other images.
      key: key of the draw.

    Returns:
      The split.

    Raises:
      ArgumentError: a class has too few images.
    """
    if target.scored is not None:
        return _split_by_source(target, target.scored, shots, key)
    sizes = np.bincount(target.y, minlength=len(target.classes))
    smallest = int(sizes.argmin())
    named = f"the class {target.classes[smallest]!r} of {target.name}"
    least = int(sizes[smallest])
    if least < 2:
        raise ArgumentError(
            "target",
            f"{named} has {'a single' if least else 'no'} image; it must have one to learn from and one to "
            "score; --skip-small-classes leaves such classes out, where the source has this setting",
        )
    parts = np.maximum(4 * sizes // 5, 1)
    if shots == ALL:
        take, description = parts, "four fifths of each class"
    else:
        count = min(_SHOTS, int(parts.min())) if shots is None else int(shots)
        check_count("shots", count)
        if count >= least:
            raise ArgumentError(
                "shots",
                f"got {count}, but {named} has {least} images, one of which is needed to score; it must be "
                f"at most {least - 1}, or --skip-small-classes leaves smaller classes out, where the source "
                "has this setting",
            )
        take, description = np.full_like(sizes, count), f"{count} of each class"
    chosen, rest = _draw(target.y, take, key)
    return ShotSplit(chosen, rest, description)


def _split_by_source(target: Target, scored: Bool[np.ndarray, " n"], shots: Shots, key: Key) -> ShotSplit:
    """Draw examples to learn from among the images that the source does not reserve for scoring."""
    learn, score = np.flatnonzero(~scored), np.flatnonzero(scored)
    if shots is None or shots == ALL:
        return ShotSplit(learn, score, "all images that are not reserved for scoring")
    check_count("shots", int(shots))
    sizes = np.bincount(target.y[learn])
    smallest = int(sizes.argmin())
    if int(shots) > sizes[smallest]:
        raise ArgumentError(
            "shots",
            f"got {shots}, but the class {target.classes[smallest]!r} of {target.name} has "
            f"{plural(int(sizes[smallest]), 'image')} to learn from; it must be at most {sizes[smallest]}",
        )
    chosen, _ = _draw(target.y[learn], np.full_like(sizes, int(shots)), key)
    return ShotSplit(learn[chosen], score, f"{shots} of each class")


def _draw(
    y: Int[np.ndarray, " n"], take: Int[np.ndarray, " classes"], key: Key
) -> tuple[Int[np.ndarray, " chosen"], Int[np.ndarray, " rest"]]:
    """Return the rows of `take` random examples of each class, and the other rows, both ascending."""
    sizes = np.bincount(y)
    # Random order within each class: a stable sort by class of a random permutation.
    order = np.asarray(jax.random.permutation(key, len(y)))
    order = order[np.argsort(y[order], kind="stable")]
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = rank < np.repeat(take, sizes)
    return np.sort(order[chosen]), np.sort(order[~chosen])
