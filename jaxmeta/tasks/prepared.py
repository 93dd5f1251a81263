"""A labelled image data set in its final form: one shape, grouped by class, one file of records.

Every source of one's own images ends here. What is on disk is decoded and resized once; tasks are
then drawn from memory (`from_prepared`) or, where the data set is larger, from the records.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from jaxmeta.checks import ArgumentError, MissingPackageError
from jaxmeta.core import Rotations, SplitName, TaskDistribution, card_of
from jaxmeta.tasks.by_class import Vector
from jaxmeta.tasks.cache import cache_folder, make_room
from jaxmeta.tasks.episodes import EpisodeShape, from_arrays
from jaxmeta.tasks.images import LeftOut, printable
from jaxmeta.tasks.splits import (
    FRACTIONS,
    Classes,
    ClassSplit,
    split_classes,
    split_of_parts,
    warn_of_case,
    warn_of_pooled_parts,
)

_RECORDS, _INDEX, _FORMAT = "images.array_record", "index.json", 1
_AT_ONCE = 4096  # images read together


class ReadSummary(NamedTuple):
    """What was read of one's own images, and what was not; as text it is one line.

    Attributes:
      layout: what the images' classes were told apart by.
      images, classes: how many there are.
      left_out: files that are not among the images, by reason.
      smallest: name, width and height of the smallest image; None where it is not known.
    """

    layout: str
    images: int
    classes: int
    left_out: tuple[LeftOut, ...] = ()
    smallest: tuple[str, int, int] | None = None

    def __str__(self) -> str:
        said = f"{self.images:,} images of {self.classes:,} classes, by {self.layout}"
        if self.smallest is not None:
            name, width, height = self.smallest
            said += f"; the smallest is {width} × {height} ({printable(name)})"
        return (
            said
            + "; "
            + ("left out: " + ", ".join(map(str, self.left_out)) if self.left_out else "none left out")
        )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Images of one shape by class, as records on disk; a handle, cheap to keep and to pass on.

    Attributes:
      folder: of the records and their index.
      name: of the source, for the protocol card.
      classes: class names, sorted.
      sizes: number of images of each class. Rows are numbered class after class.
      shape: (height, width, channels) of every image.
      parts: where the source says which images are for which part, `(part, number of images of each class)`;
        those of a class are numbered part after part.
      summary: what was read and what was left out, of a source that is one's own files.
    """

    folder: Path
    name: str
    classes: tuple[str, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, int, int]
    parts: tuple[tuple[str, tuple[int, ...]], ...] = ()
    summary: ReadSummary | None = None

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def offsets(self) -> Int[np.ndarray, " classes"]:
        """Row of the first image of each class."""
        return np.cumsum([0, *self.sizes[:-1]])

    @property
    def split(self) -> ClassSplit | None:
        """The class split that the source makes; None where it has no parts, or these share classes."""
        return split_of_parts(
            {
                part: [name for name, count in zip(self.classes, counts, strict=True) if count]
                for part, counts in self.parts
            }
        )

    def class_split(self, classes: Classes) -> tuple[Any, str]:
        """Return what `classes` stands for where it is "auto", and a sentence on it for the protocol card.

        "auto" is the source's own class split, or fractions where it has none.
        """
        if classes != "auto":
            return classes, ""
        own = self.split
        if own is None:
            if self.parts:
                warn_of_pooled_parts(self.name, [part for part, _ in self.parts])
            return FRACTIONS, ""
        return own, "class split of the data's own " + ", ".join(part for part, _ in self.parts)

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
          ValueError: a row that is not there; or the records are damaged: each is verified by its
            checksum.
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise ValueError(f"rows must be in [0, {len(self)}), got {rows.min()} to {rows.max()}")
        images = np.empty((rows.size, *self.shape), np.uint8)
        try:
            # A reader an access: it holds an open file, which neither pickles nor survives a fork.
            with contextlib.closing(
                _array_record().ArrayRecordReader(
                    str(self.folder / _RECORDS), options="readahead_buffer_size:0"
                )
            ) as reader:
                # In blocks, so that the images of a large part are held once and not twice.
                for start in range(0, rows.size, _AT_ONCE):
                    records = reader.read(rows[start : start + _AT_ONCE].tolist())
                    block = np.frombuffer(b"".join(records), np.uint8)
                    images[start : start + _AT_ONCE] = block.reshape(len(records), *self.shape)
        except RuntimeError as error:
            raise ValueError(
                f"{self.folder / _RECORDS}: cannot be read ({str(error).partition(';')[0]}); remove its "
                "folder to prepare the images anew"
            ) from error
        return images


class SplitImages(NamedTuple):
    """Prepared images and how their classes are shared out, to be drawn from memory or from disk.

    Attributes:
      prepared: the images.
      classes: the class split, the fractions of a random one, or "auto" for the images' own.
      protocol: one sentence for the protocol card.
    """

    prepared: Prepared
    classes: ClassSplit | tuple[float, float, float] | Literal["auto"] | None
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
                raise ArgumentError(name, "there are no images in it")
            index = {"name": name, "classes": list(sizes), "sizes": list(sizes.values()), "shape": shape}
            (unfinished / _INDEX).write_text(json.dumps(index), encoding="utf-8")
            # A temporary folder is its maker's alone; a cache may be shared.
            unfinished.chmod(parent.stat().st_mode)
            if folder.exists() and not (folder / _INDEX).is_file():
                shutil.rmtree(folder)  # somebody removed half of it
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
    split: SplitName = "train",
    classes: Classes = "auto",
    split_seed: int = 0,
    rotations: Rotations = "none",
    protocol: str = "",
    metadata: Mapping[str, Vector] | None = None,
    skip_small_classes: bool = False,
) -> TaskDistribution:
    """Few-shot tasks from prepared images, those of one part of the split in memory.

    Arguments, errors and episodes are those of `from_arrays`; `jm.tasks.stream` draws the same
    episodes from the disk. `classes="auto"` is the class split of the images' own parts (`prepared.split`),
    or (0.64, 0.16, 0.2) where there is none.
    """
    shape = EpisodeShape.checked(
        ways, shots, queries, rotations, prepared.shape, zero_shot=metadata is not None
    )
    classes, said = prepared.class_split(classes)
    classes, protocol = split_classes(prepared.classes, classes, split_seed, split, protocol or said)
    chosen = set(classes.part(split))
    sizes = {
        name: size for name, size in zip(prepared.classes, prepared.sizes, strict=True) if name in chosen
    }
    # Before images are read, and for what it raises.
    names = list(sizes)
    kept = shape.usable(names, list(sizes.values()), split, prepared.name, skip_small_classes)
    sizes = {names[place]: sizes[names[place]] for place in kept}
    shape.card_for(list(sizes), list(sizes.values()), split, classes.hash, prepared.name, protocol)
    tasks = from_arrays(
        prepared.read(prepared.rows_of(list(sizes))),
        np.repeat(np.array(list(sizes)), list(sizes.values())),
        ways=ways,
        shots=shots,
        queries=queries,
        split=split,
        classes=ClassSplit(**{split: tuple(sizes)}),
        rotations=rotations,
        name=prepared.name,
        protocol=protocol,
        metadata=metadata,
    )
    # The hash is of the whole split, of which only a part was read.
    return tasks._replace(card=dataclasses.replace(card_of(tasks), split_hash=classes.hash))


def _write(path: Path, shape: tuple[int, int, int], images: Iterable[Any]) -> dict[str, int]:
    # One record a group: episodes read single images, far apart.
    writer = _array_record().ArrayRecordWriter(str(path), "group_size:1")
    sizes: dict[str, int] = {}
    last = None
    try:
        with contextlib.closing(writer):
            for name, image in images:
                if image.shape != shape or image.dtype != np.uint8:
                    raise ValueError(
                        f"images must be uint8 {shape}, got {image.dtype} {image.shape} in {name!r}"
                    )
                if last is not None and name < last:
                    raise ValueError(f"images must be sorted by class, got {name!r} after {last!r}")
                sizes[name] = sizes.get(name, 0) + 1
                last = name
                writer.write(image.tobytes())
    except RuntimeError as error:
        raise OSError(f"cannot write {path} ({str(error).partition(';')[0]}); is the disk full?") from error
    return sizes


def _array_record():
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise MissingPackageError(
            f"images of one's own are kept as records, which needs array-record (pip install array-record; "
            f"not on Windows): {error}"
        ) from error
    return array_record_module


def _open(folder: Path) -> Prepared:
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return Prepared(
        folder, index["name"], tuple(index["classes"]), tuple(index["sizes"]), tuple(index["shape"])
    )
