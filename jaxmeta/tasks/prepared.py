"""A labelled image data set in its final form: one shape, grouped by class, one file of records.

Every source of one's own images ends here. What is on disk is decoded and resized once; tasks are
then drawn from memory (`from_prepared`) or, where the data set is larger, from the records.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from jaxmeta.core import TaskDistribution
from jaxmeta.tasks.cache import cache_folder, make_room
from jaxmeta.tasks.episodes import from_arrays
from jaxmeta.tasks.splits import ClassSplit, split_classes, warn_of_case

_RECORDS, _INDEX, _FORMAT = "images.array_record", "index.json", 1


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Images of one shape by class, as records on disk; a handle, cheap to keep and to pass on.

    Attributes:
      folder: of the records and their index.
      name: of the source, for the protocol card.
      classes: class names, sorted.
      sizes: number of images of each class. Rows are numbered class after class.
      shape: (height, width, channels) of every image.
    """

    folder: Path
    name: str
    classes: tuple[str, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def offsets(self) -> Int[np.ndarray, " classes"]:
        """Row of the first image of each class."""
        return np.cumsum([0, *self.sizes[:-1]])

    def rows_of(self, names: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Rows of the images of the classes `names`, in the order of `names`."""
        place = {name: index for index, name in enumerate(self.classes)}
        offsets = self.offsets
        ranges = [offsets[place[name]] + np.arange(self.sizes[place[name]]) for name in names]
        return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)

    def read(
        self, rows: Int[np.ndarray, " n"] | Sequence[int]
    ) -> UInt8[np.ndarray, "n height width channels"]:
        """The images of these rows, in any order and with repetitions.

        Raises:
          ValueError: the records are damaged; each is verified by its checksum.
        """
        from array_record.python import array_record_module

        try:
            # A reader an access: it holds an open file, which neither pickles nor survives a fork.
            reader = array_record_module.ArrayRecordReader(
                str(self.folder / _RECORDS), options="readahead_buffer_size:0"
            )
            records = reader.read([int(row) for row in rows]) if len(rows) else []
            reader.close()
        except RuntimeError as error:
            raise ValueError(
                f"{self.folder / _RECORDS}: cannot be read ({str(error).partition(';')[0]}); remove its "
                "folder to prepare the images anew"
            ) from error
        return np.frombuffer(b"".join(records), np.uint8).reshape(len(records), *self.shape)


class SplitImages(NamedTuple):
    """Prepared images and how their classes are shared out, to be drawn from memory or from disk.

    Attributes:
      prepared: the images.
      classes: the class split, or the fractions of a random one.
      protocol: one sentence for the protocol card.
    """

    prepared: Prepared
    classes: ClassSplit | Sequence[float]
    protocol: str = ""


def prepare(
    name: str,
    fingerprint: str,
    shape: tuple[int, int, int],
    images: Iterable[tuple[str, UInt8[np.ndarray, "height width channels"]]],
    *,
    expected: int,
) -> Prepared:
    """The data set with this fingerprint from the cache; else `images` written there, one at a time.

    Args:
      name: of the source; part of the folder's name.
      fingerprint: hex digest of all that the images depend on: their files, shape and selection.
      shape: of every image.
      images: (class, image), sorted by class. Not touched where the cache has the data set.
      expected: number of images, for the room on the disk.

    Raises:
      ValueError: no images, classes that are not grouped, or an image of another shape.
      OSError: too little disk.
    """
    parent = cache_folder() / "prepared"
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "images"
    digest = hashlib.sha256(f"{_FORMAT}:{shape}:{fingerprint}".encode()).hexdigest()
    folder = parent / f"{slug[:60]}-{digest[:16]}"
    if not (folder / _INDEX).is_file():
        make_room(parent, expected * int(np.prod(shape)) + 10_000_000, f"the prepared images of {name}")
        unfinished = Path(tempfile.mkdtemp(dir=parent, prefix=f".{slug[:60]}-"))
        try:
            sizes = _write(unfinished / _RECORDS, shape, images)
            if not sizes:
                raise ValueError(f"{name}: there are no images in it")
            index = {"name": name, "classes": list(sizes), "sizes": list(sizes.values()), "shape": shape}
            (unfinished / _INDEX).write_text(json.dumps(index), encoding="utf-8")
            try:
                os.replace(unfinished, folder)
            except OSError:
                # Another process was first, and prepared the same.
                if not (folder / _INDEX).is_file():
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    prepared = _open(folder)
    warn_of_case(prepared.name, prepared.classes)
    return prepared


def from_prepared(
    prepared: Prepared,
    *,
    ways: int | tuple[int, int],
    shots: int | tuple[int, int],
    queries: int = 1,
    split: str = "train",
    classes: ClassSplit | Sequence[float] | None = None,
    seed: int = 0,
    rotations: str = "none",
    protocol: str = "",
) -> TaskDistribution:
    """Few-shot tasks from prepared images, those of one part of the split in memory.

    Arguments, errors and episodes are those of `from_arrays`; `jm.tasks.stream` draws the same
    episodes from the disk.
    """
    classes, protocol = split_classes(prepared.classes, classes, seed, split, protocol)
    part = [name for name in prepared.classes if name in set(classes.part(split))]
    sizes = dict(zip(prepared.classes, prepared.sizes, strict=True))
    return from_arrays(
        prepared.read(prepared.rows_of(part)),
        np.repeat(np.array(part), [sizes[name] for name in part]),
        ways=ways,
        shots=shots,
        queries=queries,
        split=split,
        classes=classes,
        rotations=rotations,
        name=prepared.name,
        protocol=protocol,
    )


def _write(path: Path, shape: tuple[int, int, int], images: Iterable) -> dict[str, int]:
    from array_record.python import array_record_module

    # One record a group: episodes read single images, far apart.
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    sizes: dict[str, int] = {}
    last = None
    try:
        for name, image in images:
            if image.shape != shape or image.dtype != np.uint8:
                raise ValueError(f"images must be uint8 {shape}, got {image.dtype} {image.shape} in {name!r}")
            if last is not None and name < last:
                raise ValueError(f"images must be sorted by class, got {name!r} after {last!r}")
            sizes[name] = sizes.get(name, 0) + 1
            last = name
            writer.write(image.tobytes())
    finally:
        writer.close()
    return sizes


def _open(folder: Path) -> Prepared:
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return Prepared(
        folder, index["name"], tuple(index["classes"]), tuple(index["sizes"]), tuple(index["shape"])
    )
