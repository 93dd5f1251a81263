"""One's own images: a folder with one subfolder a class."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from jaxmeta.checks import ArgumentError, some
from jaxmeta.core import TaskDistribution
from jaxmeta.files import write_json
from jaxmeta.tasks.cache import cache_folder
from jaxmeta.tasks.images import LARGEST_DEFAULT, UnreadableImage, check_form, class_files, decode, header
from jaxmeta.tasks.prepared import Prepared, from_prepared, prepare
from jaxmeta.tasks.splits import ClassSplit, check_part


def prepare_folder(
    path: str | os.PathLike,
    *,
    size: int | None = None,
    channels: Literal[1, 3] | None = None,
    skip_unreadable: bool = False,
) -> Prepared:
    """The images of a folder with one subfolder a class, decoded once and kept in the cache.

    Files are taken and decoded by the rules of `class_files` and `decode`: what is hidden, is no image by
    its name, or does not lie directly in a class's folder is not taken; images are squeezed to squares.
    They are prepared anew when a file is added, removed or changed (by its size and time).

    Args:
      path: the folder.
      size: side of the images in pixels; None for the shorter side of the smallest, at most 84.
      channels: 1 for grey, 3 for colour; None for 3 if the header of any file says colour.
      skip_unreadable: whether to leave out, with a warning, what cannot be decoded.

    Raises:
      FileNotFoundError, NotADirectoryError: `path` is not there, or a file.
      ValueError: no classes, a class without images, images that cannot be decoded, a size or number of
        channels that cannot be.
    """
    folder = Path(path).expanduser().resolve()
    files = class_files(folder)
    return prepare_files(
        f"folder:{folder.name}", folder, files, size=size, channels=channels, skip_unreadable=skip_unreadable
    )


def prepare_files(
    name: str,
    folder: Path,
    files: Mapping[str, Sequence[Path]],
    *,
    size: int | None,
    channels: int | None,
    skip_unreadable: bool = False,
    argument: str = "path",
) -> Prepared:
    """The named images of a folder, decoded once and kept in the cache; `prepare_folder` names all.

    Args:
      name: of the source, for the protocol card.
      folder: that the files are of.
      files: by class, sorted; no class is without.
      size, channels, skip_unreadable: see `prepare_folder`.
      argument: that named the folder, for the messages.
    """
    check_form(size, channels)
    named = {f"{of}/{file.name}": file for of, paths in files.items() for file in paths}
    digest = hashlib.sha256(f"{folder}\n{size},{channels},{skip_unreadable}".encode(errors="surrogateescape"))
    for file_name, file in named.items():
        # A broken link is an image that cannot be read, which is for later.
        stat = file.stat() if file.exists() else None
        line = f"\n{file_name}\n{stat and f'{stat.st_size},{stat.st_mtime_ns}'}"
        digest.update(line.encode(errors="surrogateescape"))
    fingerprint = digest.hexdigest()
    where = (argument, folder)

    # What the headers said and what was left out, so that a second call opens no image at all.
    findings = cache_folder() / "prepared" / f"folder-{fingerprint[:32]}.json"
    unreadable: list[str] = []
    if findings.is_file():
        found = json.loads(findings.read_text(encoding="utf-8"))
        shape, unreadable = tuple(found["shape"]), found["unreadable"]
    else:
        shape = _shape(where, named, size, channels, skip_unreadable)

    def images() -> Iterator[tuple[str, np.ndarray]]:
        unreadable.clear()
        for class_name, paths in files.items():
            left = len(paths)
            for file in paths:
                try:
                    image = decode(file, f"{class_name}/{file.name}", channels=shape[2], size=shape[0])
                except UnreadableImage as error:
                    unreadable.append(str(error))
                    left -= 1
                else:
                    yield class_name, image
            if skip_unreadable and not left:
                raise ArgumentError(
                    argument,
                    f"of the class {class_name!r} in {folder} no image can be read, such as {unreadable[-1]}",
                )
        if not skip_unreadable:
            _refuse(unreadable, where, len(named))
        write_json(findings, {"shape": shape, "unreadable": unreadable})

    prepared = prepare(name, fingerprint, shape, images(), expected=len(named))
    if unreadable:
        warnings.warn(
            f"{prepared.name}: {len(unreadable)} of {len(named)} images are left out: "
            + some(unreadable, separator="; "),
            stacklevel=3,
        )
    return prepared


def from_folder(
    path: str | os.PathLike,
    split: str = "train",
    *,
    ways: int | tuple[int, int] = 5,
    shots: int | tuple[int, int] = 1,
    queries: int = 1,
    size: int | None = None,
    channels: Literal[1, 3] | None = None,
    classes: ClassSplit | tuple[float, float, float] | str | None = (0.64, 0.16, 0.2),
    split_seed: int = 0,
    rotations: Literal["none", "classes", "random"] = "none",
    skip_unreadable: bool = False,
) -> TaskDistribution:
    """Few-shot tasks from a folder of one's own images, one subfolder a class.

    Images are `(size, size, channels)` float32 in [0, 1]; those of the chosen part are held on the device.

    Args:
      path: the folder.
      split: "train", "validation" or "test".
      ways: classes of a task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to be judged on.
      size: side of the images in pixels; None for the shorter side of the smallest, at most 84.
      channels: 1 for grey, 3 for colour; None for 3 if the header of any file says colour.
      classes: class split: by name, as the fractions of train, validation and test for a random split by
        `split_seed`, or as the path of a JSON file `{"train": [names], "validation": [names], "test":
        [names]}`. None draws from every class, whatever `split` says.
      split_seed: seed of the random class split; episodes depend on the key given to `sample` alone.
        A split by name takes none.
      rotations: how images are turned: "none"; "classes", every class turned by 90, 180 and 270° is a class
        of its own; or "random", one rotation for each drawn class in each episode.
      skip_unreadable: whether to leave out, with a warning, what cannot be decoded.

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
    )


def _shape(
    where: tuple[str, Path],
    named: dict[str, Path],
    size: int | None,
    channels: int | None,
    skip_unreadable: bool,
) -> tuple[int, int, int]:
    """The shape all images are to get, by their headers."""
    headers, unreadable = [], []
    for name, file in named.items():
        try:
            headers.append(header(file, name))
        except UnreadableImage as error:
            unreadable.append(str(error))
    if not skip_unreadable:
        _refuse(unreadable, where, len(named))
    side = size or min([LARGEST_DEFAULT, *(one.shorter_side for one in headers)])
    colour = channels or (3 if any(one.in_colour for one in headers) else 1)
    return int(side), int(side), int(colour)


def _refuse(unreadable: list[str], where: tuple[str, Path], total: int) -> None:
    if unreadable:
        argument, folder = where
        raise ArgumentError(
            argument,
            f"{len(unreadable)} of {total} images in {folder} cannot be used: "
            f"{some(unreadable, separator='; ')}; mend or remove them"
            + (", or leave them out with skip_unreadable=True" * (argument == "path")),
        )
