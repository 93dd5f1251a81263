"""Image folders: one subfolder per class, folders of parts, or lists of files."""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxmeta.checks import ArgumentError, join_names
from jaxmeta.core import Rotations, SplitName, TaskDistribution
from jaxmeta.files import write_json
from jaxmeta.tasks.cache import cache_folder
from jaxmeta.tasks.file_layouts import Listing, list_images, list_with_domains
from jaxmeta.tasks.images import (
    Header,
    LeftOut,
    UnreadableImage,
    check_image_spec,
    decode,
    default_side,
    header,
)
from jaxmeta.tasks.prepared import Prepared, ReadSummary, from_prepared, prepare
from jaxmeta.tasks.splits import Classes, check_part

# Version of the cached format; changing it makes all folders be prepared again.
_CACHE_VERSION = 3


def prepare_folder(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    channels: Literal[1, 3] | None = None,
    domains: str | None = None,
    skip_unreadable: bool = False,
) -> Prepared:
    """Decode the images of a folder once and keep them in the cache.

    The layout is one subfolder per class, folders `train`, `val` and `test` of such subfolders, or lists in
    csv or JSON (see `list_images`); parts that share no class form the class split (`prepared.split`). All
    formats that Pillow opens as images are read; images that are not square are resized to squares without
    cropping (see `decode`). `prepared.summary` reports what was read and what was skipped. Images are
    prepared again when a file is added, removed or changed, by its size and time.

    Args:
      path: path of the folder, or of one list of its images.
      size: side of the images in pixels; None: the shorter side of the smallest image, at most 84, ignoring
        images far smaller than the others (see `default_side`).
      channels: 1 for grey, 3 for colour; None: 3 if the header of any file declares colour, else 1.
      domains: where the domain of an image is found, see `from_folder`; None: the images have no domains.
      skip_unreadable: whether to skip, with a warning, images that cannot be decoded and listed images that
        do not exist.

    Returns:
      Handle of the images in the cache, for `from_prepared` and `stream`.

    Raises:
      FileNotFoundError, NotADirectoryError: `path` does not exist, or is another kind of file.
      ValueError: no classes, a class without images, images that cannot be decoded, or an invalid size or
        number of channels.

    Examples:
      >>> images = prepare_folder("birds", size=84)  # doctest: +SKIP
      >>> len(images), images.shape  # doctest: +SKIP
      (11788, (84, 84, 3))
    """
    folder = Path(path).expanduser().resolve()
    if domains is None:
        listing = list_images(folder, skip_missing=skip_unreadable)
    else:
        listing = list_with_domains(folder, domains, skip_missing=skip_unreadable)
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
    """Decode the listed images of a folder once and keep them in the cache; see `prepare_folder`.

    Args:
      name: name of the source, for the protocol card.
      listing: images by class; every class must have some.
      size, channels, skip_unreadable: see `prepare_folder`.
      argument: name of the caller's argument for the folder, for the messages.
    """
    check_image_spec(size, channels)
    folder, parts = listing.folder, listing.parts()
    entries = [
        _Entry(class_name, part, file, file.relative_to(folder).as_posix())
        for class_name in sorted(listing.classes)
        for part in ("", *parts)
        for file in listing.classes[class_name].get(part, ())
    ]
    # Without size and channels: `prepare` hashes the shape, so explicit defaults hit the same cache entry.
    digest = hashlib.sha256(f"{_CACHE_VERSION}\n{folder}\n{skip_unreadable}".encode(errors="surrogateescape"))
    for entry in entries:
        # A broken link is reported as an unreadable image when it is opened.
        stat = entry.file.stat() if entry.file.exists() else None
        line = (
            f"\n{entry.class_name},{entry.part},{entry.name}\n{stat and f'{stat.st_size},{stat.st_mtime_ns}'}"
        )
        digest.update(line.encode(errors="surrogateescape"))
    fingerprint = digest.hexdigest()
    where = (argument, folder)

    # Headers and skipped images are stored next to the images, so that a second call opens no image file.
    scan_path = cache_folder() / "prepared" / f"folder-{fingerprint[:32]}.json"
    scan: dict[str, Any] = {}
    if scan_path.is_file():
        scan = json.loads(scan_path.read_text(encoding="utf-8"))
    else:
        scan = _scan_headers(where, entries, skip_unreadable)
    side = int(size or scan["side"])
    shape = side, side, int(channels or scan["channels"])

    def images() -> Iterator[tuple[str, np.ndarray]]:
        unreadable: list[str] = []
        skipped: list[int] = []
        counts = {part: dict.fromkeys(listing.classes, 0) for part in parts}
        remaining = {class_name: len(listing.files_of(class_name)) for class_name in listing.classes}
        for index, entry in enumerate(entries):
            try:
                image = decode(entry.file, entry.name, channels=shape[2], size=shape[0])
            except UnreadableImage as error:
                unreadable.append(str(error))
                skipped.append(index)
                remaining[entry.class_name] -= 1
                if skip_unreadable and not remaining[entry.class_name]:
                    raise ArgumentError(
                        argument,
                        f"none of the images of class {entry.class_name!r} in {folder} can be read: {error}",
                    ) from error
            else:
                if entry.part:
                    counts[entry.part][entry.class_name] += 1
                yield entry.class_name, image
        if not skip_unreadable:
            _refuse(unreadable, where, len(entries))
        scan["unreadable"], scan["skipped"] = unreadable, skipped
        scan["parts"] = {part: [each[name] for name in sorted(each)] for part, each in counts.items()}
        write_json(scan_path, scan)

    prepared = prepare(name, fingerprint, shape, images(), expected=len(entries))
    if "parts" not in scan:
        # The cache has the images, but the file of the scan was removed: decode again to rebuild it.
        for _ in images():
            pass
    unreadable = scan["unreadable"]
    if unreadable:
        warnings.warn(
            f"{prepared.name}: {len(unreadable)} of {len(entries)} images are left out: "
            + join_names(unreadable, separator="; "),
            stacklevel=3,
        )
    if size is None and scan["small"]:
        warnings.warn(
            f"{prepared.name}: {len(scan['small'])} of {len(entries)} images are far smaller than the "
            f"others and are enlarged to {shape[0]} × {shape[0]}: {join_names(scan['small'])}",
            stacklevel=3,
        )
    left_out = (
        *listing.left_out,
        # The message of an unreadable image starts with its name and a colon.
        *LeftOut.of(
            "image that cannot be read",
            "images that cannot be read",
            (each.partition(": ")[0] for each in unreadable),
        ),
    )
    smallest = scan["smallest"]
    skipped = set(scan["skipped"])
    return dataclasses.replace(
        prepared,
        domains=tuple(
            listing.domains[entry.file]
            for index, entry in enumerate(entries)
            if listing.domains and index not in skipped
        ),
        parts=tuple((part, tuple(scan["parts"][part])) for part in parts),
        summary=ReadSummary(
            listing.layout,
            len(prepared),
            len(prepared.classes),
            left_out,
            None if smallest is None else (smallest[0], smallest[1], smallest[2]),
        ),
    )


class _Entry(NamedTuple):
    """An image file, and its name in messages."""

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
    domains: str | None = None,
    across: bool = False,
    test_domains: tuple[str, ...] | None = None,
    skip_unreadable: bool = False,
    skip_small_classes: bool = False,
) -> TaskDistribution:
    """Return few-shot tasks from a folder of images.

    The layout is one subfolder per class; or folders train, val and test, each with one subfolder per class;
    or lists of files and labels: train.csv, val.csv and test.csv, or base.json, val.json and novel.json, or a
    single csv or JSON file (see `list_images`). Parts that share no class form the class split; otherwise the
    images of all parts are pooled and the classes are split at random. Images are `(size, size, channels)`
    float32 in [0, 1]; those of the chosen part are stored on the device.

    Args:
      path: path of the folder, or of one list of its images.
      split: "train", "validation" or "test".
      ways: classes per task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to evaluate on.
      size: side of the images in pixels; None: the shorter side of the smallest image, at most 84, ignoring
        images far smaller than the others.
      channels: 1 for grey, 3 for colour; None: 3 if the header of any file declares colour, else 1.
      classes: class split: the fractions of train, validation and test for a random split seeded by
        `split_seed`, or the path of a JSON file `{"train": [names], "validation": [names], "test": [names]}`;
        in Python also such a mapping or a `ClassSplit`. "auto": the data's own parts (folders or lists
        train, val and test) where these share no class, else the fractions 0.64,0.16,0.2. None: every part
        draws from all classes.
      split_seed: seed of the random class split; must be 0 where `classes` names the classes. Episodes depend
        only on the key given to `sample`.
      rotations: rotations of the images: "none"; "classes", each class rotated by 90, 180 and 270° is an
        additional class; or "random", one random rotation per class and episode.
      domains: where the domain (style, camera, …) of an image is found: "class/domain", a folder per class
        with a subfolder per domain; "domain/class", a folder per domain with a subfolder per class
        (Office-Home, DomainNet); or a regular expression with one group that matches at the start of file
        names, such as "([a-z]+)_". None: the images have no domains.
      across: whether support and queries of a class are from different domains, see `from_arrays`.
      test_domains: names of domains held out for test: training and validation use images of the other
        domains only, testing uses these only; with `across`, the queries of test tasks are from these domains
        and the support sets from the others.
      skip_unreadable: whether to skip, with a warning, images that cannot be decoded and listed images that
        do not exist.
      skip_small_classes: whether to skip, with a warning, classes with fewer than shots + queries images,
        after the classes are split.

    Raises:
      FileNotFoundError, NotADirectoryError: `path` does not exist, or is another kind of file.
      ValueError: invalid images, see `prepare_folder`; too few classes or domains, or a class with too few
        images, for the episodes; or domains that do not fit the folder.

    Examples:
      >>> tasks = from_folder("birds", "test", ways=5, shots=1, size=84)  # doctest: +SKIP
      >>> tasks.sample(jax.random.key(0)).support.x.shape  # doctest: +SKIP
      (5, 84, 84, 3)
    """
    check_part(split)
    return from_prepared(
        prepare_folder(path, size=size, channels=channels, domains=domains, skip_unreadable=skip_unreadable),
        ways=ways,
        shots=shots,
        queries=queries,
        split=split,
        classes=classes,
        split_seed=split_seed,
        rotations=rotations,
        across=across,
        test_domains=test_domains,
        skip_small_classes=skip_small_classes,
    )


def _scan_headers(where: tuple[str, Path], entries: list[_Entry], skip_unreadable: bool) -> dict[str, Any]:
    """Return the default shape from the headers, the smallest image, and the images below that size."""
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
            f"{len(unreadable)} of {total} images in {folder} cannot be read: "
            f"{join_names(unreadable, separator='; ')}; repair or remove them"
            + (", or skip them with skip_unreadable=True" * (argument == "path")),
        )
