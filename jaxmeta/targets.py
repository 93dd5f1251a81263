"""What --target means: all images of a set of classes, some to learn from and the others to be judged on."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxmeta import presets, sources
from jaxmeta.config import data_of, settled
from jaxmeta.core import Batch, Key
from jaxmeta.settings import Preset, flag_of
from jaxmeta.tasks import labelled
from jaxmeta.tasks.omniglot import omniglot_split
from jaxmeta.tasks.prepared import SplitImages
from jaxmeta.tasks.splits import split_classes

ALL = "all"
# Flags of `train` that say what is read.
READING = ("data", "protocol", "label", "tfds_splits", "skip_unreadable")
_SHOTS = 20
# Of sources that draw images, those of a class that are drawn to be judged on.
_DRAWN = 15


class Target(NamedTuple):
    """Labelled images.

    Attributes:
      name: as the user named it.
      protocol: one sentence on which images these are.
      x: in [0, 1], or bytes.
      y: their classes.
      classes: names.
      ink: whether images of this source are strokes, light on dark.
    """

    name: str
    protocol: str
    x: UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"]
    y: Int[np.ndarray, " n"]
    classes: tuple[str, ...]
    ink: bool

    def batch(self, rows: Int[np.ndarray, " m"]) -> Batch:
        return Batch(self.x[rows], self.y[rows])


class Shots(NamedTuple):
    """Which images are learned from.

    Attributes:
      learn, score: rows of the images.
      said: how many there are of each class, in words.
    """

    learn: Int[np.ndarray, " learn"]
    score: Int[np.ndarray, " score"]
    said: str


def read_target(
    name: str,
    given: Mapping[str, Any],
    shots: str | None,
    key: Key,
    *,
    size: int | None,
    channels: int | None,
) -> Target:
    """Reads all images of all classes; of sets with an official class split those of its test classes.

    Args:
      name: as of `train --tasks`.
      given: flags that only some sources have, those of `READING`.
      shots: as of `split_shots`, for sources that draw as many images as they are asked for.
      key: of these drawings.
      size, channels: to read images with, where the source takes such settings; None for its own.

    Raises:
      FileNotFoundError, NotADirectoryError: there are no such images.
      ValueError: a source of something else than images with labels; a flag that it does not take; a single
        class.
    """
    with _in_words_of_target():
        settings = _settings(name, given, size, channels)
        source = sources.source_of(settings.tasks)
        shape = {"ways": 2, "shots": 1, "queries": 1}
        found = source.build("test", settings, shape, data_of(given, {}))
        if isinstance(found, SplitImages):
            x, y, classes, protocol = _all_of(found)
        else:
            if settings.tasks == "glyphs":
                if shots == ALL:
                    raise ValueError(f"--shots: got {ALL}, and {name} are drawn without end; give a number")
                of_each = _DRAWN + count_of(shots, _SHOTS)
                x, y = map(np.asarray, labelled(found, per_class=of_each, key=key))
            else:
                x, y = map(np.asarray, labelled(found))
            classes, protocol = _class_names(settings, int(y.max()) + 1), found.card.protocol
    if len(classes) < 2:
        raise ValueError(f"--target: {name} has {len(classes)} class; there must be 2 to tell apart")
    return Target(name, protocol or f"all classes of {name}", x, y.astype(np.int32), classes, source.ink)


def _settings(name: str, given: Mapping[str, Any], size: int | None, channels: int | None) -> Preset:
    source = sources.source_of(name)
    if presets.PRESETS[source.preset].ways is None:
        raise ValueError(f"--target: {name} has no images with labels")
    for flag in READING:
        if flag in given and flag not in source.takes:
            raise ValueError(f"{flag_of(flag)}: {name} has no such setting")
    # Every class, as it is.
    fixed = {"image_size": size, "channels": channels, "classes": "0,0,1", "rotations": "none"}
    own = {flag: value for flag, value in fixed.items() if flag in source.takes and value is not None}
    own |= {flag: given[flag] for flag in READING if flag in given and flag != "data"}
    return presets.settings_of(settled({"tasks": name, **own}))[1]


def _all_of(images: SplitImages) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], str]:
    """Bytes, a quarter of what `labelled` would take; and labels, class names, and which images they are."""
    prepared = images.prepared
    split, _ = split_classes(prepared.classes, images.classes, 0, "test", "")
    classes = tuple(sorted(split.part("test")))
    sizes = dict(zip(prepared.classes, prepared.sizes, strict=True))
    y = np.repeat(np.arange(len(classes)), [sizes[name] for name in classes])
    return prepared.read(prepared.rows_of(classes)), y, classes, images.protocol


def _class_names(settings: Preset, classes: int) -> tuple[str, ...]:
    if settings.tasks == "omniglot":
        return tuple(sorted(omniglot_split(str(settings.protocol)).part("test")))
    return tuple(str(number) for number in range(classes))


def count_of(shots: str | None, default: int) -> int:
    """The number that --shots stands for.

    Raises:
      ValueError: it is none, or below 1.
    """
    try:
        count = default if shots is None else int(shots)
    except ValueError:
        raise ValueError(f"--shots: got {shots}; it must be a number, or {ALL}") from None
    if count < 1:
        raise ValueError(f"--shots: got {count}; it must be at least 1")
    return count


def split_shots(target: Target, shots: str | None, key: Key) -> Shots:
    """Random examples of each class to learn from.

    Args:
      target: of whose images.
      shots: how many of each class; "all" for four fifths of each, the others to be judged on; None for 20,
        and not more than four fifths of the smallest class.
      key: of the draw.

    Raises:
      ValueError: another word, or a class with too few images.
    """
    sizes = np.bincount(target.y)
    smallest = int(sizes.argmin())
    named = f"the class {target.classes[smallest]!r} of {target.name}"
    least = int(sizes[smallest])
    if least < 2:
        raise ValueError(f"--target: {named} has a single image; there must be one to learn from and another")
    parts = np.maximum(4 * sizes // 5, 1)
    if shots == ALL:
        take, said = parts, "four fifths of each class"
    else:
        count = count_of(shots, min(_SHOTS, int(parts.min())))
        if count >= least:
            raise ValueError(
                f"--shots: got {count}, and {named} has {least} images, of which one must be left to score; "
                f"it must be at most {least - 1}"
            )
        take, said = np.full_like(sizes, count), f"{count} of each class"
    order = np.asarray(jax.random.permutation(key, len(target.y)))
    order = order[np.argsort(target.y[order], kind="stable")]
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = place < np.repeat(take, sizes)
    return Shots(np.sort(order[chosen]), np.sort(order[~chosen]), said)


@contextlib.contextmanager
def _in_words_of_target() -> Iterator[None]:
    """What the library says of its arguments, and other commands of their flags, for those of this one."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        said = str(error)
        for pattern, flag in (
            ("^(--tasks|path|name): ", "--target: "),
            ("^data: ", "--data: "),
            ("^protocol ", "--protocol: "),
            ("skip_unreadable=True", "--skip-unreadable"),
            ("with label;", "with --label;"),
            ("with tfds_splits", "with --tfds-splits"),
            ("with data_dir", "with --data"),
        ):
            said = re.sub(pattern, flag, said)
        raise type(error)(said) from error
