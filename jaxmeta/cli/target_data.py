"""Read the target of a transfer: all images of a set of classes, some to learn from and the rest to score."""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxmeta.checks import ArgumentError, check_count, check_finite, some
from jaxmeta.cli import schema
from jaxmeta.cli.schema import Setting
from jaxmeta.cli.sources import OWN, Source, renaming, source_of
from jaxmeta.core import Batch, Key, card_of
from jaxmeta.tasks import labelled
from jaxmeta.tasks.omniglot import omniglot_split
from jaxmeta.tasks.prepared import ReadSummary, SplitImages
from jaxmeta.tasks.splits import PARTS, in_order, split_classes, split_of_parts

ALL = "all"
_SHOTS = 20
# Of sources that draw images, those of a class that are drawn to be scored.
_DRAWN = 15
# Every task source has these, and no labelled set depends on them.
_EPISODE = {"ways": 2, "shots": 1, "queries": 1}
# Every class, as it is.
_WHOLE = {"classes": (0.0, 0.0, 1.0), "rotations": "none", "split_seed": 0, "within_alphabet": False}
# What a transfer chooses for the source's network.
_OF_IMAGES = ("size", "channels")

Shots = int | Literal["all"] | None


class Target(NamedTuple):
    """Labelled images.

    Attributes:
      name: as the user named it.
      protocol: one sentence on which images these are.
      x: in [0, 1], or bytes.
      y: their classes.
      classes: names.
      ink: whether images of this source are strokes, light on dark.
      scored: of each image, whether it is one of those that its source has to score by; None where the source
        says nothing of it.
      summary: what was read of one's own files, and what was left out.
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
        return Batch(self.x[rows], self.y[rows])


class ShotSplit(NamedTuple):
    """Which images are learned from.

    Attributes:
      learn: rows of the images to learn from.
      score: rows of all others.
      description: how many there are of each class, in words.
    """

    learn: Int[np.ndarray, " learn"]
    score: Int[np.ndarray, " score"]
    description: str


def target_settings(name: str) -> dict[str, Setting]:
    """Return the settings of a target that a transfer can be told: those of its source.

    Left out are the shape of episodes, which a transfer has none of, and what every class is read with.

    Raises:
      ArgumentError: there is no such source.
    """
    with _of_target():
        source = source_of(name)
    fixed = (*_fixed(source), *_OF_IMAGES, "split", "data")
    # A required one is missed in words of its own, once it is known that the target has images.
    return {
        each: setting._replace(default=None) if setting.default is schema.MISSING else setting
        for each, setting in schema.settings_of(source.function, fixed).items()
    }


def _fixed(source: Source) -> dict[str, Any]:
    # What settings of these names mean elsewhere, only their author knows.
    return _EPISODE if source.key == OWN else {**_EPISODE, **_WHOLE}


def _of_target() -> contextlib.AbstractContextManager[None]:
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
    """Read all images of all classes; of sets with an official class split those of its test classes.

    A folder's own parts count: where those to learn from (train and validation) and the one to score (test,
    or else validation) have the same classes, they are kept apart; where no part shares a class with another,
    they are a class split, and the images those of its test classes.

    Args:
      name: as of `train --tasks`.
      reading: settings of its source, in place of their defaults (see `target_settings`).
      shots: as of `split_shots`, for sources that draw as many images as they are asked for.
      key: of these drawings.
      data: folder with the source's files.
      size: to read images with, where the source has such a setting; None for its own.
      channels: likewise.

    Raises:
      FileNotFoundError, NotADirectoryError: there are no such images.
      ArgumentError: a source of something else than images with labels; a setting that it does not have; a
        single class.
    """
    scored = summary = None
    with _of_target():
        source = source_of(name)
        if not schema.accepts(source.function, "ways"):
            raise ArgumentError("target", f"{name} has no images with labels")
        if source.key == "folder:PATH" and not Path(source.argument).expanduser().exists():
            raise ArgumentError("target", f"{source.argument} does not exist")
        settings = _settings(name, source, reading, data, size, channels)
        if source.images is not None:
            found = source.images(source.argument, settings, data)
            rows = _rows_of(found)
            x, y, classes = found.prepared.read(rows.rows), rows.y, rows.classes
            protocol = found.protocol or rows.protocol
            scored, summary = rows.scored, found.prepared.summary
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
        raise ArgumentError("target", f"{name} has {len(classes)} class; there must be 2 to tell apart")
    if x.ndim != 4:
        raise ArgumentError("target", f"{name} has examples of shape {x.shape[1:]}, which are no images")
    return target


def _without_small_classes(target: Target, shots: int) -> Target:
    """Return a target without the classes that have fewer images than are learned from and one to score."""
    if target.scored is None:
        sizes, needed = np.bincount(target.y, minlength=len(target.classes)), shots + 1
    else:
        sizes, needed = np.bincount(target.y[~target.scored], minlength=len(target.classes)), shots
    kept = np.flatnonzero(sizes >= needed)
    if len(kept) == len(sizes):
        return target
    small = [f"{target.classes[place]} ({sizes[place]})" for place in np.flatnonzero(sizes < needed)]
    warnings.warn(
        f"{target.name}: {len(small)} of {len(sizes)} classes have fewer than {needed} images and are left "
        f"out: {some(small)}",
        stacklevel=3,
    )
    rows = np.isin(target.y, kept)
    return target._replace(
        x=target.x[rows],
        y=np.searchsorted(kept, target.y[rows]).astype(np.int32),
        classes=tuple(target.classes[place] for place in kept),
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
        raise ArgumentError("data", f"{name} has no such setting")
    known = schema.settings_of(source.function, ("split", "data"))
    shape = {"size": size, "channels": channels}
    fixed = {**_fixed(source), **{each: value for each, value in shape.items() if value is not None}}
    values = (
        schema.defaults_of(known) | {each: fixed[each] for each in fixed if each in known} | dict(reading)
    )
    missing = [each for each in known if each not in values]
    if missing:
        raise ArgumentError("target", f"{name} has no default for {missing[0]}; give it one by a flag")
    return values


def _labelled(
    name: str, source: Source, settings: Mapping[str, Any], data: str | None, shots: Shots, key: Key
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the images of a source in memory, their labels, and which images they are."""
    supplied = {"data": data} if schema.accepts(source.function, "data") else {}
    found = source.function("test", **settings, **supplied)
    if source.key != "glyphs":
        x, y = labelled(found)
    elif shots == ALL:
        raise ArgumentError("shots", f"got {ALL}, and {name} are drawn without end; give a number")
    else:
        count = _SHOTS if shots is None else int(shots)
        check_count("shots", count)
        x, y = labelled(found, per_class=_DRAWN + count, key=key)
    return np.asarray(x), np.asarray(y), card_of(found).protocol


class _Rows(NamedTuple):
    """Which examples are a target.

    Attributes:
      rows: of the examples.
      y: their classes.
      classes: names.
      scored: as of `Target`.
      protocol: one sentence on which these are; empty where they are all.
    """

    rows: Int[np.ndarray, " n"]
    y: Int[np.ndarray, " n"]
    classes: tuple[str, ...]
    scored: Bool[np.ndarray, " n"] | None = None
    protocol: str = ""


def _rows_of(images: SplitImages) -> _Rows:
    """Return which of prepared images are a target, without reading any."""
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
    """Return which examples are a target, by the class name and the part of each."""
    there = [part for part in PARTS if (parts == part).any()]
    every = tuple(in_order(set(names.tolist())))
    if not there:
        return _Rows(np.arange(len(names)), _places(names, every), every)
    members = {part: set(names[parts == part].tolist()) for part in there}
    split = split_of_parts(members)
    if split is not None and split.test:
        rows = np.flatnonzero(parts == "test")
        classes = tuple(in_order(split.test, every))
        return _Rows(rows, _places(names[rows], classes), classes, None, "its test classes")
    y, rows = _places(names, every), np.arange(len(names))
    last = there[-1]
    scored = parts == last
    if split is not None or members[last] != set(every) or set(names[~scored].tolist()) != set(every):
        return _Rows(rows, y, every, None, f"the images of {', '.join(there)} together")
    learned = " and ".join(there[:-1])
    return _Rows(rows, y, every, scored, f"its images for {learned} to learn from, those for {last} to score")


def _places(names: np.ndarray, classes: tuple[str, ...]) -> Int[np.ndarray, " n"]:
    """Return the place of each name among the classes."""
    place = {name: index for index, name in enumerate(classes)}
    return np.array([place[name] for name in names.tolist()])


def _class_names(source: Source, settings: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    if source.key == "omniglot":
        split = omniglot_split(settings["protocol"], settings["split_seed"])
        return tuple(sorted(split.part("test")))
    return tuple(map(str, range(classes)))


def split_shots(target: Target, shots: Shots, key: Key) -> ShotSplit:
    """Draw random examples of each class to learn from.

    Args:
      target: of whose images.
      shots: how many of each class; "all" for four fifths of each, the others to be scored; None for 20, and
        not more than four fifths of the smallest class.
      key: of the draw.

    Raises:
      ArgumentError: a class with too few images.
    """
    if target.scored is not None:
        return _split_by_source(target, target.scored, shots, key)
    sizes = np.bincount(target.y)
    smallest = int(sizes.argmin())
    named = f"the class {target.classes[smallest]!r} of {target.name}"
    least = int(sizes[smallest])
    if least < 2:
        raise ArgumentError(
            "target",
            f"{named} has a single image; there must be one to learn from and another; skip_small_classes "
            "leaves such classes out, where the source has it",
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
                f"got {count}, and {named} has {least} images, of which one must be left to score; it must "
                f"be at most {least - 1}, or skip_small_classes leaves smaller classes out, where the source "
                "has it",
            )
        take, description = np.full_like(sizes, count), f"{count} of each class"
    chosen, rest = _draw(target.y, take, key)
    return ShotSplit(chosen, rest, description)


def _split_by_source(target: Target, scored: Bool[np.ndarray, " n"], shots: Shots, key: Key) -> ShotSplit:
    """Draw examples to learn from among those that the source has for it; the others are as it says."""
    learn, score = np.flatnonzero(~scored), np.flatnonzero(scored)
    if shots is None or shots == ALL:
        return ShotSplit(learn, score, "all that the data has to learn from")
    check_count("shots", int(shots))
    sizes = np.bincount(target.y[learn])
    smallest = int(sizes.argmin())
    if int(shots) > sizes[smallest]:
        raise ArgumentError(
            "shots",
            f"got {shots}, and the class {target.classes[smallest]!r} of {target.name} has {sizes[smallest]} "
            "images to learn from",
        )
    chosen, _ = _draw(target.y[learn], np.full_like(sizes, int(shots)), key)
    return ShotSplit(learn[chosen], score, f"{shots} of each class")


def _draw(
    y: Int[np.ndarray, " n"], take: Int[np.ndarray, " classes"], key: Key
) -> tuple[Int[np.ndarray, " chosen"], Int[np.ndarray, " rest"]]:
    """Return the rows of so many random examples of each class, and the other rows, both ascending."""
    sizes = np.bincount(y)
    order = np.asarray(jax.random.permutation(key, len(y)))
    order = order[np.argsort(y[order], kind="stable")]
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = place < np.repeat(take, sizes)
    return np.sort(order[chosen]), np.sort(order[~chosen])
