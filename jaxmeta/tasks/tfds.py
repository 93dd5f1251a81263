"""Any image classification data set of tensorflow-datasets, read without TensorFlow."""

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
from jaxmeta.tasks.cache import cache_folder, make_room
from jaxmeta.tasks.images import LARGEST_DEFAULT, Header, check_form, decode, default_side, header
from jaxmeta.tasks.prepared import Prepared, from_prepared, prepare
from jaxmeta.tasks.records import tensorflow_datasets
from jaxmeta.tasks.splits import Classes, check_part

_AT_ONCE = 64  # images read together
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
    """The images of a tensorflow-datasets data set, decoded once and kept in the cache.

    A data set that is prepared in `data` is read from its files alone, whoever wrote them; else it
    is downloaded and prepared as ArrayRecord files, for which many of the stock data sets need
    TensorFlow. Images are decoded by the rules of `decode`: they are squeezed to squares.

    Args:
      name: "name", "name/config", "name:1.0.0" or "name/config:1.0.0".
      size: side of the images in pixels; None for the shorter side of the smallest, at most 84, not counting
        images far smaller than the others.
      channels: 1 for grey, 3 for colour; None for what the data set says of itself, or its images.
      image: feature that holds the image; None for the only one, or the one named "image".
      label: feature that names the class: a class label, a text or an integer; None for the target of
        the supervised pair, the one named "label", or the only class label.
      tfds_splits: splits of the data set to pool; None for all, since the classes are to be split anew.
      data: folder where prepared data sets are; None for tensorflow-datasets' own default.

    Raises:
      ValueError: no such data set, feature or split; examples without label, images that cannot be
        decoded; a data set that only TensorFlow can prepare, or is prepared in another format.
      OSError: it can be neither found nor downloaded, or too little disk.
    """
    check_form(size, channels)
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
        # Codes in place of names: of millions of examples only small integers are held.
        classes, codes = np.unique(labels, return_inverse=True)
        rows = np.argsort(codes, kind="stable")
        for row, example in zip(rows, pool.read(rows), strict=True):
            where = f"{title} {pool.place(row)}"
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
    """Few-shot tasks from any image classification data set of tensorflow-datasets.

    Images are `(size, size, channels)` float32 in [0, 1]; those of the chosen part are held on the device.

    Args:
      name: "name", "name/config", "name:1.0.0" or "name/config:1.0.0".
      split: of the classes: "train", "validation" or "test".
      ways: classes of a task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to be judged on.
      size: side of the images in pixels; None for the shorter side of the smallest, at most 84, not counting
        images far smaller than the others.
      channels: 1 for grey, 3 for colour; None for what the data set says of itself, or its images.
      classes: class split: the fractions of train, validation and test for a random split by `split_seed`,
        or the path of a JSON file `{"train": [names], "validation": [names], "test": [names]}`. In Python
        also such a mapping, or a `ClassSplit`. None draws from every class, whatever `split` says.
      split_seed: seed of the random class split; episodes depend on the key given to `sample` alone.
        A split by name takes none.
      rotations: how images are turned: "none"; "classes", every class turned by 90, 180 and 270° is a class
        of its own; or "random", one rotation for each drawn class in each episode.
      image: feature that holds the image; None for the only one, or the one named "image".
      label: feature that names the class: a class label, a text or an integer; None for the target of
        the supervised pair, the one named "label", or the only class label.
      tfds_splits: splits of the data set to pool; None for all, since the classes are to be split anew.
      skip_small_classes: whether to leave out, with a warning, classes with too few images for shots and
        queries, after the classes are split.
      data: folder where prepared data sets are; None for tensorflow-datasets' own default.

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
    """The examples of several splits in one row, with encoded images; any of them can be read."""

    def __init__(self, builder, parts: Sequence[str], image: str):
        decoders = {image: _tfds().decode.SkipDecoding()}
        try:
            self.sources = {part: builder.as_data_source(part, decoders=decoders) for part in parts}
        except NotImplementedError as error:
            again = _AS_ARRAY_RECORD.format(builder.info.full_name.rpartition("/")[0])
            raise ValueError(
                f"{builder.info.full_name} in {builder.data_path} is prepared in a format that only "
                f"TensorFlow reads; prepare it in another folder with {again}, or run tfds convert_format "
                f"--dataset_version_dir={builder.data_path} --out_file_format=array_record"
            ) from error
        self._ends = np.cumsum([len(source) for source in self.sources.values()])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, row: int | np.integer) -> str:
        """Of a row: "split[number]"."""
        which = int(np.searchsorted(self._ends, row, side="right"))
        source = list(self.sources)[which]
        return f"{source}[{row - self._ends[which] + len(self.sources[source])}]"

    def read(self, rows: Int[np.ndarray, " n"]) -> Iterator[dict[str, Any]]:
        """The examples of these rows, in their order."""
        sources = list(self.sources.values())
        starts = self._ends - [len(source) for source in sources]
        for begin in range(0, len(rows), _AT_ONCE):
            some = rows[begin : begin + _AT_ONCE]
            which = np.searchsorted(self._ends, some, side="right")
            found: dict[int, dict[str, Any]] = {}
            for one in np.unique(which):
                mine = some[which == one]
                examples = sources[one].__getitems__((mine - starts[one]).tolist())
                found.update(zip(mine.tolist(), examples, strict=True))
            yield from (found[row] for row in some.tolist())


def _tfds():
    return tensorflow_datasets("reading a data set of tensorflow-datasets needs it")


def _builder(name: str, data: str | os.PathLike[str] | None):
    """The builder of a data set that is prepared, if need be now."""
    tfds = _tfds()
    where = None if data is None else Path(data).expanduser()
    # A version, be it any, makes tensorflow-datasets look for files before it asks its code, whose
    # version may be newer than what is prepared.
    version = "" if ":" in name else ":*.*.*"
    try:
        builder = tfds.builder(name + version, data_dir=where)
    except tfds.core.DatasetNotFoundError as error:
        raise ArgumentError(
            "name",
            f"tensorflow-datasets has no data set {name!r}, nor is one prepared in "
            f"{where or 'its default folder'}",
        ) from error
    except (ValueError, AssertionError) as error:  # no such version or config, no such form of a name
        raise ArgumentError("name", f"{name!r}: {_line(error)}") from error
    if builder.is_prepared():
        return builder
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        elsewhere = (
            f"prepare it elsewhere with {_AS_ARRAY_RECORD.format(name)} and name the folder it is in "
            "with data"
        )
        if _lacks_tensorflow(error):
            raise ValueError(
                f"{builder.info.full_name}: tensorflow-datasets cannot prepare it without TensorFlow; "
                f"pip install tensorflow, or {elsewhere}"
            ) from error
        raise OSError(
            f"{builder.info.full_name}: is not in {builder.data_path} and cannot be prepared there "
            f"({type(error).__name__}: {_line(error)}); {elsewhere}"
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


def _parts(builder, asked: str | Sequence[str] | None) -> list[str]:
    """Names of the splits to pool."""
    there = builder.info.splits
    parts = list(there) if asked is None else [asked] if isinstance(asked, str) else list(asked)
    if not parts or not set(parts) <= set(there) or len(set(parts)) < len(parts):
        raise ValueError(
            f"tfds_splits must be some of {', '.join(there)}, each once, got {asked!r} for "
            f"{builder.info.full_name}"
        )
    return parts


def _image_key(builder, asked: str | None) -> str:
    """The feature that holds the image."""
    feature = _tfds().features.Image
    images = [key for key, value in builder.info.features.items() if isinstance(value, feature)]
    key = asked or (images[0] if len(images) == 1 else "image")
    if key not in images:
        raise ArgumentError(
            "image",
            f"{builder.info.full_name} has {f'no image {asked!r}' if asked else 'not one image'}; its "
            f"features are {_listed(builder)}",
        )
    dtype = np.dtype(builder.info.features[key].np_dtype)
    if dtype != np.uint8:
        raise ArgumentError("image", f"the images {key!r} of {builder.info.full_name} are {dtype}, not uint8")
    return key


def _label_key(builder, asked: str | None) -> str:
    """The feature that names the class."""
    tfds, features = _tfds(), builder.info.features
    usable = [key for key, value in features.items() if _kind(value)]
    pair = builder.info.supervised_keys
    target = pair[1] if pair and isinstance(pair[1], str) else None
    labels = [key for key in usable if isinstance(features[key], tfds.features.ClassLabel)]
    only = labels[0] if len(labels) == 1 else None
    key = asked or next((key for key in (target, "label", only) if key and key in usable), "")
    if key not in usable:
        said = "has no labels" if asked is None else f"has no label {asked!r}"
        raise ArgumentError(
            "label",
            f"{builder.info.full_name} {said}; name the feature that tells the class (a class "
            f"label, a text or an integer) with label; its features are {_listed(builder)}",
        )
    return key


def _kind(feature) -> str:
    """Of a feature that can name classes: "text" or "integer"; else nothing."""
    if not isinstance(feature, _tfds().features.Tensor) or feature.shape != ():
        return ""
    return {"i": "integer", "u": "integer", "O": "text", "U": "text", "S": "text"}.get(
        np.dtype(feature.np_dtype).kind, ""
    )


def _listed(builder) -> str:
    return ", ".join(f"{key} ({type(value).__name__})" for key, value in builder.info.features.items())


def _labels(builder, pool: _Pool, key: str) -> np.ndarray:
    """Class name of every row of the pool."""
    feature = builder.info.features[key]
    values = [example[key] for example in pool.read(np.arange(len(pool)))]
    if _kind(feature) == "text":
        return np.array([value.decode() for value in values])
    if not isinstance(feature, _tfds().features.ClassLabel):
        return np.array([str(value) for value in values])
    codes = np.array(values)
    without = np.flatnonzero((codes < 0) | (codes >= feature.num_classes))
    if len(without):
        parts = sorted({pool.place(row).partition("[")[0] for row in without})
        raise ValueError(
            f"{builder.info.full_name}: {len(without)} examples of {', '.join(parts)} have no {key}; name "
            "the splits that have with tfds_splits"
        )
    return np.array(feature.names)[codes]


def _shape(
    builder, pool: _Pool, image: str, size: int | None, channels: int | None, fingerprint: str
) -> tuple[int, int, int]:
    """The shape all images are to get: by the feature; where it does not say, by the images' headers."""
    height, width, depth = builder.info.features[image].shape
    side = size or (min(height, width, LARGEST_DEFAULT) if height and width else None)
    colour = channels or ({1: 1, 2: 1, 3: 3, 4: 3}.get(depth) if depth else None)
    if not (side and colour):
        # Kept, so that a second call does not read every image again.
        folder = cache_folder() / "prepared"
        findings = folder / f"tfds-{fingerprint[:32]}.json"
        if not findings.is_file():
            make_room(folder, 0, "the prepared images")
            headers = _headers(builder, pool, image)
            found = {
                "side": default_side([one.shorter_side for one in headers]),
                "colour": any(one.in_colour for one in headers),
            }
            write_json(findings, found)
        found = json.loads(findings.read_text(encoding="utf-8"))
        side, colour = side or found["side"], colour or (3 if found["colour"] else 1)
    return int(side), int(side), int(colour)


def _headers(builder, pool: _Pool, image: str) -> list[Header]:
    title = builder.info.full_name
    rows = np.arange(len(pool))
    return [
        header(example[image], f"{title} {pool.place(row)}")
        for row, example in zip(rows, pool.read(rows), strict=True)
    ]
