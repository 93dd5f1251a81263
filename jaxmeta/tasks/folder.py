"""One's own images: a folder with one subfolder a class, with such folders for each part, or with lists."""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxmeta.checks import ArgumentError, some
from jaxmeta.core import Rotations, SplitName, TaskDistribution
from jaxmeta.files import write_json
from jaxmeta.tasks.cache import cache_folder
from jaxmeta.tasks.file_layouts import Listing, list_images
from jaxmeta.tasks.images import Header, LeftOut, UnreadableImage, check_form, decode, default_side, header
from jaxmeta.tasks.prepared import Prepared, ReadSummary, from_prepared, prepare
from jaxmeta.tasks.splits import Classes, check_part

# Of what is kept in the cache; another number has all prepared anew.
_FORM = 2


def prepare_folder(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    channels: Literal[1, 3] | None = None,
    skip_unreadable: bool = False,
) -> Prepared:
    """The images of a folder, decoded once and kept in the cache.

    Which image is of which class is told by one subfolder a class, by folders `train`, `val` and `test` of
    such subfolders, or by lists in csv or JSON (see `list_images`); where parts share no class, they are the
    class split (`prepared.split`). All that Pillow opens as an image is taken, by the rules of `decode`:
    images are squeezed to squares. `prepared.summary` says what was read and what was left out. Images are
    prepared anew when a file is added, removed or changed (by its size and time).

    Args:
      path: the folder, or one list of its images.
      size: side of the images in pixels; None for the shorter side of the smallest, at most 84, not counting
        images far smaller than the others (see `default_side`).
      channels: 1 for grey, 3 for colour; None for 3 if the header of any file says colour.
      skip_unreadable: whether to leave out, with a warning, what cannot be decoded, or is listed and not
        there.

    Raises:
      FileNotFoundError, NotADirectoryError: `path` is not there, or a file.
      ValueError: no classes, a class without images, images that cannot be decoded, a size or number of
        channels that cannot be.
    """
    folder = Path(path).expanduser().resolve()
    listing = list_images(folder, skip_missing=skip_unreadable)
    return prepare_files(
        f"folder:{folder.name}", listing, size=size, channels=channels, skip_unreadable=skip_unreadable
    )


def prepare_files(
    name: str,
    listing: Listing,
    *,
    size: int | None,
    channels: int | None,
    skip_unreadable: bool = False,
    argument: str = "path",
) -> Prepared:
    """The listed images of a folder, decoded once and kept in the cache; `prepare_folder` lists all.

    Args:
      name: of the source, for the protocol card.
      listing: of the images; no class is without.
      size, channels, skip_unreadable: see `prepare_folder`.
      argument: that named the folder, for the messages.
    """
    check_form(size, channels)
    folder, parts = listing.folder, listing.parts()
    entries = [
        _Entry(class_name, part, file, file.relative_to(folder).as_posix())
        for class_name in sorted(listing.classes)
        for part in ("", *parts)
        for file in listing.classes[class_name].get(part, ())
    ]
    # Without size and channels: who asks for those that were found gets the same images.
    digest = hashlib.sha256(f"{_FORM}\n{folder}\n{skip_unreadable}".encode(errors="surrogateescape"))
    for entry in entries:
        # A broken link is an image that cannot be read, which is for later.
        stat = entry.file.stat() if entry.file.exists() else None
        line = (
            f"\n{entry.class_name},{entry.part},{entry.name}\n{stat and f'{stat.st_size},{stat.st_mtime_ns}'}"
        )
        digest.update(line.encode(errors="surrogateescape"))
    fingerprint = digest.hexdigest()
    where = (argument, folder)

    # What the headers said and what was left out, so that a second call opens no image at all.
    findings = cache_folder() / "prepared" / f"folder-{fingerprint[:32]}.json"
    found: dict[str, Any] = {}
    if findings.is_file():
        found = json.loads(findings.read_text(encoding="utf-8"))
    else:
        found = _look(where, entries, skip_unreadable)
    side = int(size or found["side"])
    shape = side, side, int(channels or found["channels"])

    def images() -> Iterator[tuple[str, np.ndarray]]:
        unreadable: list[str] = []
        counts = {part: dict.fromkeys(listing.classes, 0) for part in parts}
        left = {class_name: len(listing.files_of(class_name)) for class_name in listing.classes}
        for entry in entries:
            try:
                image = decode(entry.file, entry.name, channels=shape[2], size=shape[0])
            except UnreadableImage as error:
                unreadable.append(str(error))
                left[entry.class_name] -= 1
                if skip_unreadable and not left[entry.class_name]:
                    raise ArgumentError(
                        argument,
                        f"of the class {entry.class_name!r} in {folder} no image can be read, such as "
                        f"{error}",
                    ) from error
            else:
                if entry.part:
                    counts[entry.part][entry.class_name] += 1
                yield entry.class_name, image
        if not skip_unreadable:
            _refuse(unreadable, where, len(entries))
        found["unreadable"] = unreadable
        found["parts"] = {part: [each[of] for of in sorted(each)] for part, each in counts.items()}
        write_json(findings, found)

    prepared = prepare(name, fingerprint, shape, images(), expected=len(entries))
    if "parts" not in found:
        # The cache has the images, and somebody removed what was found out about them.
        for _ in images():
            pass
    unreadable = found["unreadable"]
    if unreadable:
        warnings.warn(
            f"{prepared.name}: {len(unreadable)} of {len(entries)} images are left out: "
            + some(unreadable, separator="; "),
            stacklevel=3,
        )
    if size is None and found["small"]:
        warnings.warn(
            f"{prepared.name}: {len(found['small'])} of {len(entries)} images are far smaller than the "
            f"others, and are enlarged to {shape[0]} × {shape[0]}: {some(found['small'])}",
            stacklevel=3,
        )
    left_out = (
        *listing.left_out,
        # Before its first colon such a message names the file.
        *LeftOut.of(
            "image that cannot be read",
            "images that cannot be read",
            (each.partition(": ")[0] for each in unreadable),
        ),
    )
    smallest = found["smallest"]
    return dataclasses.replace(
        prepared,
        parts=tuple((part, tuple(found["parts"][part])) for part in parts),
        summary=ReadSummary(
            listing.layout,
            len(prepared),
            len(prepared.classes),
            left_out,
            None if smallest is None else (smallest[0], smallest[1], smallest[2]),
        ),
    )


class _Entry(NamedTuple):
    """One image file, and its name in messages."""

    class_name: str
    part: str
    file: Path
    name: str


def from_folder(
    path: str | os.PathLike[str],
    split: SplitName = "train",
    *,
    ways: int | tuple[int, int] = 5,
    shots: int | tuple[int, int] = 1,
    queries: int = 1,
    size: int | None = None,
    channels: Literal[1, 3] | None = None,
    classes: Classes = "auto",
    split_seed: int = 0,
    rotations: Rotations = "none",
    skip_unreadable: bool = False,
    skip_small_classes: bool = False,
) -> TaskDistribution:
    """Few-shot tasks from a folder of one's own images.

    Its layout is one subfolder a class; or folders train, val and test with one subfolder a class in each; or
    lists of files and labels, train.csv, val.csv and test.csv, or base.json, val.json and novel.json, or a
    single csv or JSON file (see `list_images`). Parts that share no class are the class split; where they do,
    the images of all parts are pooled, and the classes shared out at random. Images are `(size, size,
    channels)` float32 in [0, 1]; those of the chosen part are held on the device.

    Args:
      path: the folder, or one list of its images.
      split: "train", "validation" or "test".
      ways: classes of a task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to be judged on.
      size: side of the images in pixels; None for the shorter side of the smallest, at most 84, not counting
        images far smaller than the others.
      channels: 1 for grey, 3 for colour; None for 3 if the header of any file says colour.
      classes: class split: the fractions of train, validation and test for a random split by `split_seed`,
        or the path of a JSON file `{"train": [names], "validation": [names], "test": [names]}`. In Python
        also such a mapping, or a `ClassSplit`. "auto" is that of the data's own parts (folders or lists
        train, val and test) where these share no class, else the fractions 0.64,0.16,0.2. None draws from
        every class, whatever `split` says.
      split_seed: seed of the random class split; episodes depend on the key given to `sample` alone.
        A split by name takes none.
      rotations: how images are turned: "none"; "classes", every class turned by 90, 180 and 270° is a class
        of its own; or "random", one rotation for each drawn class in each episode.
      skip_unreadable: whether to leave out, with a warning, what cannot be decoded, or is listed and not
        there.
      skip_small_classes: whether to leave out, with a warning, classes with too few images for shots and
        queries, after the classes are split.

    Raises:
      FileNotFoundError, NotADirectoryError: `path` is not there, or a file.
      ValueError: images that cannot be used, see `prepare_folder`; too few classes, or a class with too
        few images, for the episodes.

    Examples:
      >>> tasks = from_folder("birds", "test", ways=5, shots=1, size=84)  # doctest: +SKIP
      >>> tasks.sample(jax.random.key(0)).support.x.shape  # doctest: +SKIP
      (5, 84, 84, 3)
    """
    check_part(split)
    return from_prepared(
        prepare_folder(path, size=size, channels=channels, skip_unreadable=skip_unreadable),
        ways=ways,
        shots=shots,
        queries=queries,
        split=split,
        classes=classes,
        split_seed=split_seed,
        rotations=rotations,
        skip_small_classes=skip_small_classes,
    )


def _look(where: tuple[str, Path], entries: list[_Entry], skip_unreadable: bool) -> dict[str, Any]:
    """Return what the headers of all images say: the shape that all get by default, and which are small."""
    headers: dict[str, Header] = {}
    unreadable = []
    for entry in entries:
        try:
            headers[entry.name] = header(entry.file, entry.name)
        except UnreadableImage as error:
            unreadable.append(str(error))
    if not skip_unreadable:
        _refuse(unreadable, where, len(entries))
    side = default_side([one.shorter_side for one in headers.values()])
    smallest = min(headers, key=lambda name: (headers[name].shorter_side, name), default=None)
    return {
        "side": side,
        "channels": 3 if any(one.in_colour for one in headers.values()) else 1,
        "smallest": smallest and [smallest, headers[smallest].width, headers[smallest].height],
        "small": [
            f"{name} ({one.width} × {one.height})" for name, one in headers.items() if one.shorter_side < side
        ],
    }


def _refuse(unreadable: list[str], where: tuple[str, Path], total: int) -> None:
    if unreadable:
        argument, folder = where
        raise ArgumentError(
            argument,
            f"{len(unreadable)} of {total} images in {folder} cannot be used: "
            f"{some(unreadable, separator='; ')}; mend or remove them"
            + (", or leave them out with skip_unreadable=True" * (argument == "path")),
        )
