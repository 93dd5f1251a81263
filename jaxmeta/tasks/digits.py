"""MNIST and USPS: handwritten digits to transfer to and from, read from the published files."""

import dataclasses
import gzip
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32, Shaped, UInt8

from jaxmeta.checks import ArgumentError, MissingFileError, check_count, check_word
from jaxmeta.core import SplitName, TaskDistribution, card_of
from jaxmeta.tasks.episodes import from_arrays
from jaxmeta.tasks.images import resized
from jaxmeta.tasks.splits import ClassSplit, check_part

_DIGITS = tuple("0123456789")
_USPS_COLUMNS = 1 + 16 * 16


class _Files(NamedTuple):
    """The published files of a data set.

    Attributes:
      name: of the source, and of the folder they may lie in.
      title: what people call it.
      parts: file names of "train" and of "test", without the ".gz" that they may end in.
      address: where to get them.
    """

    name: str
    title: str
    parts: Mapping[str, tuple[str, ...]]
    address: str

    def found(self, data: str | os.PathLike[str], part: str) -> list[dict[str, Path]]:
        """By name, what there is of a part's files in `data`, and in its folder of the set's name."""
        check_word("part", part, (*self.parts, None))
        folder = Path(data).expanduser()
        if not folder.is_dir():
            raise MissingFileError("data", f"{folder} is no folder")
        return [
            {
                name: path
                for name in self.parts[part]
                for path in (place / f"{name}.gz", place / name)  # the last one there counts
                if path.is_file()
            }
            for place in (folder, folder / self.name)
        ]

    def paths(self, data: str | os.PathLike[str], part: str) -> list[Path]:
        """The files of a part, all from one folder.

        Raises:
          FileNotFoundError: they are not there.
        """
        names = self.parts.get(part, ())
        for files in self.found(data, part):
            if len(files) == len(names):
                return [files[name] for name in names]
        raise MissingFileError(
            "data",
            f"{Path(data).expanduser()} holds no {' and '.join(f'{name}[.gz]' for name in names)}, nor "
            f"does its folder {self.name}; {self.title} is to be had from {self.address}",
        )


_MNIST = _Files(
    "mnist",
    "MNIST",
    {
        "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    },
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
_USPS = _Files(
    "usps",
    "USPS",
    {"train": ("zip.train",), "test": ("zip.test",)},
    "The Elements of Statistical Learning, https://hastie.su.domains/ElemStatLearn/data.html",
)


def mnist_images(
    data: str | os.PathLike[str], part: Literal["train", "test"] = "test"
) -> tuple[UInt8[np.ndarray, "n 28 28 1"], Int32[np.ndarray, " n"]]:
    """MNIST's images and their digits, in the order of the files; ink = 255 on 0.

    Args:
      data: a folder with the official files, or whose folder `mnist` has them: train-images-idx3-ubyte and
        train-labels-idx1-ubyte, or t10k-… of both, each as it is or with .gz. Nothing is downloaded.
      part: "train" (60,000) or "test" (10,000).

    Raises:
      FileNotFoundError: they are not there.
      ValueError: another part; a file that is cut off, or does not hold images of 28×28 pixels, or as many
        digits from 0 to 9.

    Examples:
      >>> images, labels = mnist_images("../shared/data")  # doctest: +SKIP
      >>> images.shape, labels[:4].tolist()  # doctest: +SKIP
      ((10000, 28, 28, 1), [7, 2, 1, 0])

    References:
      LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition, 1998.
    """
    of_images, of_labels = _MNIST.paths(data, part)
    images, labels = _idx(of_images, 3), _idx(of_labels, 1)
    if images.shape[1:] != (28, 28):
        raise ArgumentError(
            "data", f"{of_images} must hold images of 28x28 pixels, got {images.shape[1]}x{images.shape[2]}"
        )
    if len(images) != len(labels):
        raise ArgumentError(
            "data", f"{of_images} holds {len(images)} images and {of_labels} {len(labels)} labels"
        )
    _check_digits(of_labels, labels)
    return images[..., None], labels.astype(np.int32)


def usps_images(
    data: str | os.PathLike[str], part: Literal["train", "test"] = "test"
) -> tuple[UInt8[np.ndarray, "n 16 16 1"], Int32[np.ndarray, " n"]]:
    """The images of USPS and their digits, in the order of the files; ink = 255 on 0.

    The grey values v in [−1, 1] of the files, in which ink is 1 and paper −1, are rounded to 255·(v + 1)/2.

    Args:
      data: a folder with zip.train.gz and zip.test.gz of The Elements of Statistical Learning, or whose
        folder `usps` has them; unpacked ones (zip.train, zip.test) are read, too. Nothing is downloaded.
      part: "train" (7,291) or "test" (2,007).

    Raises:
      FileNotFoundError: they are not there.
      ValueError: another part; a file that is cut off, or a line of it that is not a digit from 0 to 9 and
        256 numbers in [−1, 1].

    Examples:
      >>> images, labels = usps_images("../shared/data", "train")  # doctest: +SKIP
      >>> images.shape, labels[:4].tolist()  # doctest: +SKIP
      ((7291, 16, 16, 1), [6, 5, 4, 7])

    References:
      LeCun et al., Handwritten digit recognition with a back-propagation network, 1990; Hastie, Tibshirani,
      Friedman, The Elements of Statistical Learning, 2009.
    """
    (path,) = _USPS.paths(data, part)
    lines = _content(path).decode("ascii", "replace").splitlines()
    table = np.empty((len(lines), _USPS_COLUMNS))
    for number, line in enumerate(lines, start=1):
        columns = line.split()
        if len(columns) != _USPS_COLUMNS:
            raise ArgumentError(
                "data",
                f"line {number} of {path} has {len(columns)} columns; it must have {_USPS_COLUMNS}, a "
                "digit and 16x16 grey values",
            )
        try:
            table[number - 1] = np.array(columns, np.float64)
        except ValueError as error:
            raise ArgumentError(
                "data", f"line {number} of {path} must hold numbers only ({error})"
            ) from error
    labels, values = table[:, 0], table[:, 1:]
    _check_digits(path, labels)
    # Written so that NaN fails.
    wrong = np.flatnonzero(~(np.abs(values) <= 1).all(axis=1))
    if wrong.size:
        raise ArgumentError("data", f"line {wrong[0] + 1} of {path} has grey values outside [-1, 1]")
    images = np.rint((values + 1) / 2 * 255).astype(np.uint8)
    return images.reshape(-1, 16, 16, 1), labels.astype(np.int32)


def mnist(
    split: SplitName = "test",
    *,
    ways: int | tuple[int, int] = 5,
    shots: int | tuple[int, int] = 1,
    queries: int = 5,
    data: str | os.PathLike[str],
    size: int = 28,
    part: Literal["train", "test"] | None = None,
) -> TaskDistribution:
    """Few-shot tasks over MNIST's ten digits: classes that no character set was trained on.

    Made for transfer, such as 10-way 1-shot by a model trained on Omniglot: there is no class split, and
    all ten digits are in every part. So who was meta-trained on "train" is not meta-tested by "test": the
    digits are the same, and only where the images differ (see `part`) are those new. The card says so, and
    has no split hash.

    Images are `(size, size, 1)` float32 in [0, 1], ink = 1 on 0.

    Args:
      split: "train", "validation" or "test"; for the card, and for `part`.
      ways: classes of a task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to be judged on.
      data: folder with the files of MNIST, see `mnist_images`.
      size: side of the images in pixels, by Lanczos' filter where it is not 28.
      part: which of the official images: "train" or "test". None for the training images where split="train"
        and `data` has them, and for the test images everywhere else.

    Raises:
      FileNotFoundError, ValueError: see `mnist_images`, `from_arrays`.

    Examples:
      >>> tasks = mnist(ways=10, shots=1, queries=10, data="../shared/data")  # doctest: +SKIP
      >>> tasks.card.protocol  # doctest: +SKIP
      "MNIST's 10,000 test images; all ten digits in every part, so not for meta-testing after \
meta-training on it"

    References:
      Vinyals et al., Matching networks for one shot learning, 2016, arXiv 1606.04080, for Omniglot → MNIST.
    """
    return _tasks(_MNIST, mnist_images, split, data, size, part, ways=ways, shots=shots, queries=queries)


def usps(
    split: SplitName = "test",
    *,
    ways: int | tuple[int, int] = 5,
    shots: int | tuple[int, int] = 1,
    queries: int = 5,
    data: str | os.PathLike[str],
    size: int = 28,
    part: Literal["train", "test"] | None = None,
) -> TaskDistribution:
    """Few-shot tasks over the ten digits of USPS, as `mnist` has them; of 28×28 pixels, as MNIST's.

    Args:
      split: "train", "validation" or "test"; for the card, and for `part`.
      ways: classes of a task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to be judged on.
      data: folder with the files of USPS, see `usps_images`.
      size: side of the images in pixels, by Lanczos' filter where it is not 16.
      part: which of the official images: "train" or "test". None for the training images where split="train"
        and `data` has them, and for the test images everywhere else.

    Raises:
      FileNotFoundError, ValueError: see `usps_images`, `from_arrays`.

    Examples:
      >>> tasks = usps("train", data="../shared/data")  # doctest: +SKIP
      >>> tasks.sample(jax.random.key(0)).support.x.shape  # doctest: +SKIP
      (5, 28, 28, 1)
    """
    return _tasks(_USPS, usps_images, split, data, size, part, ways=ways, shots=shots, queries=queries)


def _tasks(
    files: _Files,
    read: Callable[..., tuple[np.ndarray, np.ndarray]],
    split: SplitName,
    data: str | os.PathLike[str],
    size: int,
    part: str | None,
    **shape: Any,
) -> TaskDistribution:
    check_part(split)
    check_count("size", size, 1)
    if part is None:
        part = "train" if split == "train" and any(files.found(data, "train")) else "test"
    images, labels = read(data, part)
    if images.shape[1] != size:
        images = np.stack([resized(image, int(size)) for image in images])
    tasks = from_arrays(
        images,
        labels,
        split=split,
        classes=ClassSplit(**{split: _DIGITS}),
        name=files.name,
        protocol=f"{files.title}'s {len(images):,} {'training' if part == 'train' else 'test'} images; all "
        "ten digits in every part, so not for meta-testing after meta-training on it",
        **shape,
    )
    # There is no class split to tell from others: whoever trains and tests here does so on the same classes.
    return tasks._replace(card=dataclasses.replace(card_of(tasks), split_hash=None))


def _content(path: Path) -> bytes:
    """Of a file, unpacked where it is packed, whatever its name says."""
    content = path.read_bytes()
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ArgumentError(
            "data", f"{path} is corrupted or half-downloaded ({error}); get it again"
        ) from error


def _idx(path: Path, rank: int) -> UInt8[np.ndarray, "..."]:
    """The array of an IDX file of bytes: a magic number, `rank` sizes, and the bytes themselves."""
    content, start = _content(path), 4 * (1 + rank)
    magic, *sizes = (int.from_bytes(content[place : place + 4], "big") for place in range(0, start, 4))
    if len(content) < start or magic != 0x800 + rank:
        raise ArgumentError(
            "data",
            f"{path} is no IDX file of bytes in {rank} dimensions, which begins with "
            f"{0x800 + rank:#010x} and {rank} sizes; it begins with 0x{content[:4].hex()}",
        )
    if len(content) - start != math.prod(sizes):
        raise ArgumentError(
            "data",
            f"{path} holds {len(content) - start} bytes after its header, which says "
            f"{' x '.join(map(str, sizes))}; get it again",
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)


def _check_digits(path: Path, labels: Shaped[np.ndarray, " n"]) -> None:
    if not labels.size:
        raise ArgumentError("data", f"{path} is empty")
    wrong = np.flatnonzero(~np.isin(labels, np.arange(10)))
    if wrong.size:
        raise ArgumentError(
            "data", f"{path} must hold digits from 0 to 9, and its label {wrong[0] + 1} is {labels[wrong[0]]}"
        )
