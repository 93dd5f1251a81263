"""Image classification data sets of tensorflow-datasets, read without TensorFlow."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from jaxmeta.checks import ArgumentError
from jaxmeta.core import Rotations, SplitName, TaskDistribution
from jaxmeta.files import write_json
from jaxmeta.tasks.cache import cache_folder, ensure_space
from jaxmeta.tasks.images import LARGEST_DEFAULT, Header, check_image_spec, decode, default_side, header
from jaxmeta.tasks.prepared import Prepared, from_prepared, prepare
from jaxmeta.tasks.records import tensorflow_datasets
from jaxmeta.tasks.splits import Classes, check_part

_AT_ONCE = 64  # images per read
_AS_ARRAY_RECORD = 'tfds.builder({!r}).download_and_prepare(file_format="array_record")'


def prepare_tfds(
    name: str,
    *,
    size: int | None = None,
    channels: Literal[1, 3] | None = None,
    image: str | None = None,
    label: str | None = None,
    tfds_splits: Sequence[str] | str | None = None,
    data: str | os.PathLike[str] | None = None,
) -> Prepared:
    """Decode the images of a tensorflow-datasets data set once and keep them in the cache.

    A data set that is already prepared in `data` is read from its files; otherwise it is downloaded and
    prepared as ArrayRecord files, for which many data sets need TensorFlow. Images that are not square are
    resized to squares without cropping.

    Args:
      name: name of the data set: "name", "name/config", "name:1.0.0" or "name/config:1.0.0".
      size: side of the images in pixels; None: the shorter side of the smallest image, at most 84, ignoring
        images far smaller than the others.
      channels: 1 for grey, 3 for colour; None: as declared by the data set, or else by its images.
      image: feature that holds the image; None: the only image, or the one named "image".
      label: feature that holds the class: a class label, a text or an integer; None: the target of the
        supervised pair, the feature named "label", or the only class label.
      tfds_splits: splits of the data set to pool; None: all, since tasks split the classes instead.
      data: folder of prepared data sets; None: the default folder of tensorflow-datasets.

    Returns:
      Handle of the images in the cache, for `from_prepared` and `stream`.

    Raises:
      ValueError: an unknown data set, feature or split; examples without label, or images that cannot be
        decoded; a data set that only TensorFlow can prepare, or that is prepared in another format.
      OSError: the data set can be neither found nor downloaded, or too little disk space.

    Examples:
      >>> images = prepare_tfds("oxford_flowers102", size=84)  # doctest: +SKIP
      >>> images.shape  # doctest: +SKIP
      (84, 84, 3)
    """
    check_image_spec(size, channels)
    builder = _builder(name, data)
    title = builder.info.full_name
    image, label = _image_key(builder, image), _label_key(builder, label)
    pool = _Pool(builder, _parts(builder, tfds_splits), image)

    numbers = ",".join(f"{part}={len(source)}" for part, source in pool.sources.items())
    digest = hashlib.sha256(f"{title}\n{numbers}\n{image},{label},{size},{channels}".encode())
    for file in sorted(Path(os.fspath(builder.data_path)).iterdir()):
        stat = file.stat()
        digest.update(f"\n{file.name},{stat.st_size},{stat.st_mtime_ns}".encode(errors="surrogateescape"))
    fingerprint = digest.hexdigest()
    shape = _shape(builder, pool, image, size, channels, fingerprint)

    def images() -> Iterator[tuple[str, np.ndarray]]:
        labels = _labels(builder, pool, label)
        # Integer codes instead of names save memory for millions of examples.
        classes, codes = np.unique(labels, return_inverse=True)
        rows = np.argsort(codes, kind="stable")
        for row, example in zip(rows, pool.read(rows), strict=True):
            where = f"{title} {pool.position(row)}"
            yield str(classes[codes[row]]), decode(example[image], where, channels=shape[2], size=shape[0])

    return prepare(f"tfds:{title}", fingerprint, shape, images(), expected=len(pool))


def from_tfds(
    name: str,
    split: SplitName = "train",
    *,
    ways: int | tuple[int, int] = 5,
    shots: int | tuple[int, int] = 1,
    queries: int = 1,
    size: int | None = None,
    channels: Literal[1, 3] | None = None,
    classes: Classes = (0.64, 0.16, 0.2),
    split_seed: int = 0,
    rotations: Rotations = "none",
    image: str | None = None,
    label: str | None = None,
    tfds_splits: Sequence[str] | str | None = None,
    skip_small_classes: bool = False,
    data: str | os.PathLike[str] | None = None,
) -> TaskDistribution:
    """Return few-shot tasks from an image classification data set of tensorflow-datasets.

    Images are `(size, size, channels)` float32 in [0, 1]; those of the chosen part are stored on the device.

    Args:
      name: name of the data set: "name", "name/config", "name:1.0.0" or "name/config:1.0.0".
      split: part of the classes: "train", "validation" or "test".
      ways: classes per task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to evaluate on.
      size: side of the images in pixels; None: the shorter side of the smallest image, at most 84, ignoring
        images far smaller than the others.
      channels: 1 for grey, 3 for colour; None: as declared by the data set, or else by its images.
      classes: class split: the fractions of train, validation and test for a random split seeded by
        `split_seed`, or the path of a JSON file `{"train": [names], "validation": [names], "test": [names]}`;
        in Python also such a mapping or a `ClassSplit`. None: every part draws from all classes.
      split_seed: seed of the random class split; must be 0 where `classes` names the classes. Episodes depend
        only on the key given to `sample`.
      rotations: rotations of the images: "none"; "classes", each class rotated by 90, 180 and 270° is an
        additional class; or "random", one random rotation per class and episode.
      image: feature that holds the image; None: the only image, or the one named "image".
      label: feature that holds the class: a class label, a text or an integer; None: the target of the
        supervised pair, the feature named "label", or the only class label.
      tfds_splits: splits of the data set to pool; None: all, since tasks split the classes instead.
      skip_small_classes: whether to skip, with a warning, classes with fewer than shots + queries images,
        after the classes are split.
      data: folder of prepared data sets; None: the default folder of tensorflow-datasets.

    Raises:
      ValueError, OSError: see `prepare_tfds`; too few classes, or a class with too few images, for the
        episodes.

    Examples:
      >>> tasks = from_tfds("oxford_flowers102", "test", ways=5, shots=5, size=84)  # doctest: +SKIP
      >>> tasks.sample(jax.random.key(0)).support.x.shape  # doctest: +SKIP
      (25, 84, 84, 3)
    """
    check_part(split)
    prepared = prepare_tfds(
        name,
        size=size,
        channels=channels,
        image=image,
        label=label,
        tfds_splits=tfds_splits,
        data=data,
    )
    return from_prepared(
        prepared,
        ways=ways,
        shots=shots,
        queries=queries,
        split=split,
        classes=classes,
        split_seed=split_seed,
        rotations=rotations,
        skip_small_classes=skip_small_classes,
    )


class _Pool:
    """The concatenated examples of several splits, with encoded images and random access."""

    def __init__(self, builder, parts: Sequence[str], image: str):
        decoders = {image: _tfds().decode.SkipDecoding()}
        try:
            self.sources = {part: builder.as_data_source(part, decoders=decoders) for part in parts}
        except NotImplementedError as error:
            command = _AS_ARRAY_RECORD.format(builder.info.full_name.rpartition("/")[0])
            raise ValueError(
                f"{builder.info.full_name} in {builder.data_path} is prepared in a format that only "
                f"TensorFlow reads; prepare it in another folder with {command}, or run tfds convert_format "
                f"--dataset_version_dir={builder.data_path} --out_file_format=array_record"
            ) from error
        self._ends = np.cumsum([len(source) for source in self.sources.values()])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def position(self, row: int | np.integer) -> str:
        """Return the position of a row as "split[number]"."""
        index = int(np.searchsorted(self._ends, row, side="right"))
        source = list(self.sources)[index]
        return f"{source}[{row - self._ends[index] + len(self.sources[source])}]"

    def read(self, rows: Int[np.ndarray, " n"]) -> Iterator[dict[str, Any]]:
        """Yield the examples of these rows in order."""
        sources = list(self.sources.values())
        starts = self._ends - [len(source) for source in sources]
        for begin in range(0, len(rows), _AT_ONCE):
            block = rows[begin : begin + _AT_ONCE]
            source_of = np.searchsorted(self._ends, block, side="right")
            example_of: dict[int, dict[str, Any]] = {}
            for index in np.unique(source_of):
                source_rows = block[source_of == index]
                examples = sources[index].__getitems__((source_rows - starts[index]).tolist())
                example_of.update(zip(source_rows.tolist(), examples, strict=True))
            yield from (example_of[row] for row in block.tolist())


def _tfds():
    return tensorflow_datasets("reading tfds: data sets needs tensorflow-datasets")


def _builder(name: str, data: str | os.PathLike[str] | None):
    """Return the builder of a data set, prepared now if necessary."""
    tfds = _tfds()
    where = None if data is None else Path(data).expanduser()
    # With a version, even a wildcard, tensorflow-datasets searches for prepared files first; its code may
    # have a newer version than the files.
    version = "" if ":" in name else ":*.*.*"
    try:
        builder = tfds.builder(name + version, data_dir=where)
    except tfds.core.DatasetNotFoundError as error:
        raise ArgumentError(
            "name",
            f"tensorflow-datasets has no data set {name!r}, and none is prepared in "
            f"{where or 'its default folder'}",
        ) from error
    except (ValueError, AssertionError) as error:  # unknown version or config, or a malformed name
        raise ArgumentError("name", f"{name!r}: {_line(error)}") from error
    if builder.is_prepared():
        return builder
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        alternative = (
            f"prepare it on another machine with {_AS_ARRAY_RECORD.format(name)} and pass its folder as data"
        )
        if _lacks_tensorflow(error):
            raise ValueError(
                f"{builder.info.full_name}: tensorflow-datasets cannot prepare it without TensorFlow; "
                f"pip install tensorflow, or {alternative}"
            ) from error
        raise OSError(
            f"{builder.info.full_name}: not found in {builder.data_path} and cannot be prepared there "
            f"({type(error).__name__}: {_line(error)}); {alternative}"
        ) from error
    return builder


def _lacks_tensorflow(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ImportError) and "tensorflow" in (error.name or str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _line(error: Exception, limit: int = 300) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= limit else line[:limit] + "…"


def _parts(builder, requested: str | Sequence[str] | None) -> list[str]:
    """Return the names of the splits to pool."""
    available = builder.info.splits
    parts = (
        list(available)
        if requested is None
        else [requested]
        if isinstance(requested, str)
        else list(requested)
    )
    if not parts or not set(parts) <= set(available) or len(set(parts)) < len(parts):
        raise ValueError(
            f"tfds_splits must be distinct splits out of {', '.join(available)}, got {requested!r} for "
            f"{builder.info.full_name}"
        )
    return parts


def _image_key(builder, requested: str | None) -> str:
    """Return the feature that holds the image."""
    feature = _tfds().features.Image
    images = [key for key, value in builder.info.features.items() if isinstance(value, feature)]
    key = requested or (images[0] if len(images) == 1 else "image")
    if key not in images:
        raise ArgumentError(
            "image",
            f"{builder.info.full_name} has {f'no image {requested!r}' if requested else 'no single image'}; "
            f"name one of its features: {_listed(builder)}",
        )
    dtype = np.dtype(builder.info.features[key].np_dtype)
    if dtype != np.uint8:
        raise ArgumentError(
            "image", f"{key!r} of {builder.info.full_name} has type {dtype}; it must be uint8"
        )
    return key


def _label_key(builder, requested: str | None) -> str:
    """Return the feature that holds the class."""
    tfds, features = _tfds(), builder.info.features
    usable = [key for key, value in features.items() if _kind(value)]
    pair = builder.info.supervised_keys
    target = pair[1] if pair and isinstance(pair[1], str) else None
    labels = [key for key in usable if isinstance(features[key], tfds.features.ClassLabel)]
    only = labels[0] if len(labels) == 1 else None
    key = requested or next((key for key in (target, "label", only) if key and key in usable), "")
    if key not in usable:
        problem = "has no labels" if requested is None else f"has no label {requested!r}"
        raise ArgumentError(
            "label",
            f"{builder.info.full_name} {problem}; pass the feature that holds the class (a class "
            f"label, a text or an integer) as label; its features are {_listed(builder)}",
        )
    return key


def _kind(feature) -> str:
    """Return "text" or "integer" for a feature that can hold classes, else ""."""
    if not isinstance(feature, _tfds().features.Tensor) or feature.shape != ():
        return ""
    return {"i": "integer", "u": "integer", "O": "text", "U": "text", "S": "text"}.get(
        np.dtype(feature.np_dtype).kind, ""
    )


def _listed(builder) -> str:
    return ", ".join(f"{key} ({type(value).__name__})" for key, value in builder.info.features.items())


def _labels(builder, pool: _Pool, key: str) -> np.ndarray:
    """Return the class name of every row of the pool."""
    feature = builder.info.features[key]
    values = [example[key] for example in pool.read(np.arange(len(pool)))]
    if _kind(feature) == "text":
        return np.array([value.decode() for value in values])
    if not isinstance(feature, _tfds().features.ClassLabel):
        return np.array([str(value) for value in values])
    codes = np.array(values)
    unlabelled = np.flatnonzero((codes < 0) | (codes >= feature.num_classes))
    if len(unlabelled):
        parts = sorted({pool.position(row).partition("[")[0] for row in unlabelled})
        raise ValueError(
            f"{builder.info.full_name}: {key} is missing in {len(unlabelled)} of {len(codes)} examples (in "
            f"{', '.join(parts)}); pass the labelled splits as tfds_splits"
        )
    return np.array(feature.names)[codes]


def _shape(
    builder, pool: _Pool, image: str, size: int | None, channels: int | None, fingerprint: str
) -> tuple[int, int, int]:
    """Return the shape of the prepared images, from the feature or else from the headers of the images."""
    height, width, depth = builder.info.features[image].shape
    side = size or (min(height, width, LARGEST_DEFAULT) if height and width else None)
    colour = channels or ({1: 1, 2: 1, 3: 3, 4: 3}.get(depth) if depth else None)
    if not (side and colour):
        # Cached, so that a second call does not read every image again.
        folder = cache_folder() / "prepared"
        scan_path = folder / f"tfds-{fingerprint[:32]}.json"
        if not scan_path.is_file():
            ensure_space(folder, 0, "the prepared images")
            headers = _headers(builder, pool, image)
            scan = {
                "side": default_side([one.shorter_side for one in headers]),
                "colour": any(one.in_colour for one in headers),
            }
            write_json(scan_path, scan)
        scan = json.loads(scan_path.read_text(encoding="utf-8"))
        side, colour = side or scan["side"], colour or (3 if scan["colour"] else 1)
    return int(side), int(side), int(colour)


def _headers(builder, pool: _Pool, image: str) -> list[Header]:
    title = builder.info.full_name
    rows = np.arange(len(pool))
    return [
        header(example[image], f"{title} {pool.position(row)}")
        for row, example in zip(rows, pool.read(rows), strict=True)
    ]
