"""Prepared image data sets: images of one shape, grouped by class, in one file of records.

All sources of user images are converted to this form. Images are decoded and resized once; tasks are
then drawn from memory (`from_prepared`) or, for larger data sets, from the records on disk (`stream`).
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
from jaxmeta.tasks.cache import cache_folder, ensure_space
from jaxmeta.tasks.domains import DomainTable, PartDomains, part_domains
from jaxmeta.tasks.episodes import EpisodeShape, tasks_of_examples
from jaxmeta.tasks.images import LeftOut, printable
from jaxmeta.tasks.splits import (
    FRACTIONS,
    Classes,
    ClassSplit,
    hash_for_card,
    split_classes,
    split_of_parts,
    warn_of_case,
    warn_of_pooled_parts,
)

_RECORDS, _INDEX, _FORMAT = "images.array_record", "index.json", 1
_AT_ONCE = 4096  # images per read


class ReadSummary(NamedTuple):
    """A summary of the images that were read and of the files that were skipped; `str` gives one line.

    Attributes:
      layout: description of the layout of the source.
      images, classes: numbers of images and classes.
      left_out: skipped files by reason.
      smallest: name, width and height of the smallest image; None if unknown.
    """

    layout: str
    images: int
    classes: int
    left_out: tuple[LeftOut, ...] = ()
    smallest: tuple[str, int, int] | None = None

    def __str__(self) -> str:
        text = f"{self.images:,} images of {self.classes:,} classes, by {self.layout}"
        if self.smallest is not None:
            name, width, height = self.smallest
            text += f"; the smallest is {width} × {height} ({printable(name)})"
        return (
            text
            + "; "
            + ("left out: " + ", ".join(map(str, self.left_out)) if self.left_out else "none left out")
        )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A handle to images of one shape, stored by class as records on disk.

    Attributes:
      folder: folder of the records and their index.
      name: name of the source, for the protocol card.
      classes: class names, sorted.
      sizes: number of images of each class. Rows are numbered class after class.
      shape: (height, width, channels) of every image.
      parts: `(part, number of images of each class)` for each part of the source; empty without parts. The
        rows of a class are numbered part after part.
      summary: summary of the read files; None for other sources.
      domains: domain of each row; empty without domains.
    """

    folder: Path
    name: str
    classes: tuple[str, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, int, int]
    parts: tuple[tuple[str, tuple[int, ...]], ...] = ()
    summary: ReadSummary | None = None
    domains: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def offsets(self) -> Int[np.ndarray, " classes"]:
        """Return the row of the first image of each class."""
        return np.cumsum([0, *self.sizes[:-1]])

    @property
    def split(self) -> ClassSplit | None:
        """Return the class split of the source's parts; None without parts or where they share classes."""
        return split_of_parts(
            {
                part: [name for name, count in zip(self.classes, counts, strict=True) if count]
                for part, counts in self.parts
            }
        )

    def class_split(self, classes: Classes) -> tuple[Any, str]:
        """Resolve `classes` if it is "auto", and return it with a sentence for the protocol card.

        "auto" is the class split of the source's parts, or the default fractions where there is none.
        """
        if classes != "auto":
            return classes, ""
        source_split = self.split
        if source_split is None:
            if self.parts:
                warn_of_pooled_parts(self.name, [part for part, _ in self.parts])
            return FRACTIONS, ""
        return source_split, "class split by the data's parts " + ", ".join(part for part, _ in self.parts)

    def rows_of(self, names: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Return the rows of all images of the classes `names`, in that order."""
        index_of = {name: index for index, name in enumerate(self.classes)}
        offsets = self.offsets
        ranges = [offsets[index_of[name]] + np.arange(self.sizes[index_of[name]]) for name in names]
        return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)

    def part_rows(
        self,
        names: Sequence[str],
        shape: EpisodeShape,
        split: SplitName,
        *,
        across: bool,
        test_domains: Sequence[str] | None,
        skip_small_classes: bool,
    ) -> "PartRows":
        """Return the rows of the part `split`, whose classes are `names`.

        Raises:
          ArgumentError: see `from_arrays` about domains.
        """
        domains = part_domains(self.domains or None, len(self), split, across, test_domains)
        span = dict(zip(self.classes, zip(self.offsets, self.sizes, strict=True), strict=True))
        chosen = [first + np.arange(size) for first, size in map(span.__getitem__, names)]
        table = None
        if domains is not None:
            chosen = [rows[domains.rows[rows] >= 0] for rows in chosen]
            if across:
                chosen = [rows[np.argsort(domains.rows[rows], kind="stable")] for rows in chosen]
                class_of_row = np.full(len(self), -1)
                for index, rows in enumerate(chosen):
                    class_of_row[rows] = index
                table = domains.table(class_of_row, len(names))
        sizes = [len(rows) for rows in chosen]
        kept = shape.usable(names, sizes, split, self.name, skip_small_classes, table)
        return PartRows(
            tuple(names[index] for index in kept),
            np.concatenate([np.zeros(0, np.int64), *(chosen[index] for index in kept)]),
            tuple(sizes[index] for index in kept),
            domains,
            None if table is None else table.of(kept),
        )

    def read(
        self, rows: Int[np.ndarray, " n"] | Sequence[int]
    ) -> UInt8[np.ndarray, "n height width channels"]:
        """Read images by row, in any order and with repetitions.

        Raises:
          ValueError: a row is out of range; or the records are damaged, as detected by their checksums.
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise ValueError(f"rows must be in [0, {len(self)}), got {rows.min()} to {rows.max()}")
        images = np.empty((rows.size, *self.shape), np.uint8)
        try:
            # A new reader per call: its open file can neither be pickled nor shared after a fork.
            with contextlib.closing(
                _array_record().ArrayRecordReader(
                    str(self.folder / _RECORDS), options="readahead_buffer_size:0"
                )
            ) as reader:
                # Reads in blocks, so that a large part is not in memory twice.
                for start in range(0, rows.size, _AT_ONCE):
                    records = reader.read(rows[start : start + _AT_ONCE].tolist())
                    block = np.frombuffer(b"".join(records), np.uint8)
                    images[start : start + _AT_ONCE] = block.reshape(len(records), *self.shape)
        except RuntimeError as error:
            raise ValueError(
                f"{self.folder / _RECORDS}: cannot be read ({str(error).partition(';')[0]}); remove its "
                "folder to prepare the images again"
            ) from error
        return images


class PartRows(NamedTuple):
    """The rows of one part of prepared images.

    Attributes:
      names: class names.
      rows: rows of all images, class after class, sorted by domain where support and queries are from
        different domains.
      sizes: number of images of each class.
      domains: domains of all images; None without domains.
      table: images by class and domain, where support and queries are from different domains; else None.
    """

    names: tuple[str, ...]
    rows: Int[np.ndarray, " n"]
    sizes: tuple[int, ...]
    domains: PartDomains | None
    table: DomainTable | None

    def protocol(self, sentence: str) -> str:
        """Return the sentence for the protocol card, with the use of the domains."""
        return ", ".join(filter(None, (sentence, "" if self.domains is None else self.domains.sentence)))


class SplitImages(NamedTuple):
    """Prepared images and their class split, for tasks from memory or from disk.

    Attributes:
      prepared: prepared images.
      classes: class split, the fractions of a random split, or "auto" for the parts of the images.
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
    """Return the data set with this fingerprint from the cache, or write `images` there first.

    Args:
      name: name of the source; part of the folder name.
      fingerprint: hex digest of everything that the images depend on.
      shape: shape of every image.
      images: pairs (class, image), sorted by class; not consumed if the cache has the data set.
      expected: number of images, to check the disk space.

    Raises:
      ValueError: no images, images not sorted by class, or an image of another shape or type.
      OSError: too little disk space.
    """
    parent = cache_folder() / "prepared"
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "images"
    digest = hashlib.sha256(f"{_FORMAT}:{shape}:{fingerprint}".encode()).hexdigest()
    folder = parent / f"{slug[:60]}-{digest[:16]}"
    if not (folder / _INDEX).is_file():
        ensure_space(parent, expected * int(np.prod(shape)) + 10_000_000, f"the prepared images of {name}")
        unfinished = Path(tempfile.mkdtemp(dir=parent, prefix=f".{slug[:60]}-"))
        try:
            sizes = _write(unfinished / _RECORDS, shape, images)
            if not sizes:
                raise ArgumentError(name, "it has no images")
            index = {"name": name, "classes": list(sizes), "sizes": list(sizes.values()), "shape": shape}
            (unfinished / _INDEX).write_text(json.dumps(index), encoding="utf-8")
            # mkdtemp makes the folder private, but a cache may be shared.
            unfinished.chmod(parent.stat().st_mode)
            if folder.exists() and not (folder / _INDEX).is_file():
                shutil.rmtree(folder)  # incomplete: its index was removed
            try:
                os.replace(unfinished, folder)
            except OSError:
                # Another process stored the same data set first.
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
    across: bool = False,
    test_domains: Sequence[str] | None = None,
    metadata: Mapping[str, Vector] | None = None,
    skip_small_classes: bool = False,
) -> TaskDistribution:
    """Return few-shot tasks from prepared images, with the images of one part in memory.

    Episodes are the same as in `from_arrays`; `jm.tasks.stream` draws the same episodes from disk.

    Args:
      prepared: images from `prepare_folder` or `prepare_tfds`.
      classes: see `from_arrays`; "auto": the class split of the images' parts (`prepared.split`), or the
        fractions (0.64, 0.16, 0.2) where there is none.
      ways, shots, queries, split, split_seed, rotations, protocol, across, test_domains, metadata,
        skip_small_classes: see `from_arrays`. Domains are those of the images (`prepared.domains`).

    Raises:
      ValueError: see `from_arrays`.
    """
    shape = EpisodeShape.checked(
        ways, shots, queries, rotations, prepared.shape, zero_shot=metadata is not None
    )
    classes, sentence = prepared.class_split(classes)
    parts, protocol = split_classes(prepared.classes, classes, split_seed, split, protocol or sentence)
    split_hash = hash_for_card(parts, split, classes)
    chosen = set(parts.part(split))
    part = prepared.part_rows(
        [name for name in prepared.classes if name in chosen],
        shape,
        split,
        across=across,
        test_domains=test_domains,
        skip_small_classes=skip_small_classes,
    )
    names, sizes, protocol = part.names, part.sizes, part.protocol(protocol)
    # Invalid arguments raise here, before any image is read.
    shape.card_for(names, sizes, split, split_hash, prepared.name, protocol, part.table)
    tasks = tasks_of_examples(
        prepared.read(part.rows),
        np.repeat(np.array(names), sizes),
        shape,
        None if part.domains is None else part.domains._replace(rows=part.domains.rows[part.rows]),
        split=split,
        classes=ClassSplit(**{split: names}),
        name=prepared.name,
        protocol=protocol,
        metadata=metadata,
    )
    # The card has the hash of the whole split, although only one part was read.
    return tasks._replace(card=dataclasses.replace(card_of(tasks), split_hash=split_hash))


def _write(path: Path, shape: tuple[int, int, int], images: Iterable[Any]) -> dict[str, int]:
    """Write the records and return the number of images by class."""
    # One record per group, since episodes read single images at random positions.
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
            f"storing prepared images needs array-record (pip install array-record; not on Windows): {error}"
        ) from error
    return array_record_module


def _open(folder: Path) -> Prepared:
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return Prepared(
        folder, index["name"], tuple(index["classes"]), tuple(index["sizes"]), tuple(index["shape"])
    )
