"""MNIST, Fashion-MNIST and USPS: images of ten classes for transfer, read from the published files."""

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
      name: name of the source, and of the folder that may contain the files.
      title: name of the data set in messages.
      parts: file names of "train" and "test", without an optional ending ".gz".
      address: where they can be downloaded.
      classes: what the ten classes are, for the protocol card.
    """

    name: str
    title: str
    parts: Mapping[str, tuple[str, ...]]
    address: str
    classes: str = "digits"

    def folders(self, folder: Path) -> list[Path]:
        """Return the folders that may have the files, those that are preferred first."""
        # The files of Fashion-MNIST have MNIST's names: only the name of the folder tells them apart.
        inner = folder / self.name
        return [inner, folder] if self.name == "fashion_mnist" else [folder, inner]

    def existing(self, data: str | os.PathLike[str], part: str) -> list[dict[str, Path]]:
        """Return the existing files of a part by name, for `data` and for its folder `name`."""
        check_word("part", part, self.parts)
        folder = Path(data).expanduser()
        if not folder.is_dir():
            raise MissingFileError("data", f"{folder} is not a folder")
        return [
            {
                name: path
                for name in self.parts[part]
                for path in (parent / f"{name}.gz", parent / name)  # the unpacked file has precedence
                if path.is_file()
            }
            for parent in self.folders(folder)
        ]

    def paths(self, data: str | os.PathLike[str], part: str) -> list[Path]:
        """Return the paths of the files of a part, all in one folder.

        Raises:
          FileNotFoundError: a file is missing.
        """
        existing = self.existing(data, part)
        names = self.parts[part]
        for files in existing:
            if len(files) == len(names):
                return [files[name] for name in names]
        raise MissingFileError(
            "data",
            f"{Path(data).expanduser()} must contain {' and '.join(f'{name}[.gz]' for name in names)}, "
            f"directly or in a folder {self.name}; download {self.title} from {self.address}",
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
_FASHION_MNIST = _MNIST._replace(
    name="fashion_mnist",
    title="Fashion-MNIST",
    address="https://github.com/zalandoresearch/fashion-mnist",
    classes="kinds of clothes",
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
    """Return MNIST's images and labels in the order of the files, ink 255 on 0.

    Args:
      data: folder that contains the official files, directly or in a folder `mnist`: train-images-idx3-ubyte
        and train-labels-idx1-ubyte, or their t10k-… counterparts, plain or with .gz. Nothing is downloaded.
      part: "train" (60,000 images) or "test" (10,000 images).

    Returns:
      Images `(n, 28, 28, 1)`, uint8, and labels `(n,)`, int32.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: an unknown part; a truncated file; images of a size other than 28×28 pixels; more or fewer
        labels than images; or labels that are not from 0 to 9.

    Examples:
      >>> images, labels = mnist_images("../shared/data")  # doctest: +SKIP
      >>> images.shape, labels[:4].tolist()  # doctest: +SKIP
      ((10000, 28, 28, 1), [7, 2, 1, 0])

    References:
      LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition, 1998.
    """
    return _idx_images(_MNIST, data, part)


def fashion_mnist_images(
    data: str | os.PathLike[str], part: Literal["train", "test"] = "test"
) -> tuple[UInt8[np.ndarray, "n 28 28 1"], Int32[np.ndarray, " n"]]:
    """Return Fashion-MNIST's images and labels in the order of the files, the background 0.

    The labels are 0 T-shirt/top, 1 trouser, 2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt, 7 sneaker, 8 bag,
    9 ankle boot.

    Args:
      data: folder that contains the official files, in a folder `fashion_mnist` or directly; they have the
        names of MNIST's. Nothing is downloaded.
      part: "train" (60,000 images) or "test" (10,000 images).

    Returns:
      Images `(n, 28, 28, 1)`, uint8, and labels `(n,)`, int32.

    Raises:
      FileNotFoundError, ValueError: see `mnist_images`.

    Examples:
      >>> images, labels = fashion_mnist_images("../shared/data")  # doctest: +SKIP
      >>> images.shape, labels[:4].tolist()  # doctest: +SKIP
      ((10000, 28, 28, 1), [9, 2, 1, 1])

    References:
      Xiao, Rasul, Vollgraf, Fashion-MNIST: a novel image dataset for benchmarking machine learning
      algorithms, 2017, arXiv 1708.07747.
    """
    return _idx_images(_FASHION_MNIST, data, part)


def _idx_images(
    files: _Files, data: str | os.PathLike[str], part: str
) -> tuple[UInt8[np.ndarray, "n 28 28 1"], Int32[np.ndarray, " n"]]:
    """Return images and labels from IDX files; see `mnist_images`."""
    image_path, label_path = files.paths(data, part)
    images, labels = _idx(image_path, 3), _idx(label_path, 1)
    if images.shape[1:] != (28, 28):
        raise ArgumentError(
            "data", f"{image_path} must hold images of 28x28 pixels, got {images.shape[1]}x{images.shape[2]}"
        )
    if len(images) != len(labels):
        raise ArgumentError(
            "data", f"{image_path} holds {len(images)} images and {label_path} {len(labels)} labels"
        )
    _check_digits(label_path, labels)
    return images[..., None], labels.astype(np.int32)


def usps_images(
    data: str | os.PathLike[str], part: Literal["train", "test"] = "test"
) -> tuple[UInt8[np.ndarray, "n 16 16 1"], Int32[np.ndarray, " n"]]:
    """Return USPS's images and labels in the order of the files, ink 255 on 0.

    The files' grey values v in [−1, 1], ink 1 on −1, are mapped to 255·(v + 1)/2 and rounded.

    Args:
      data: folder that contains zip.train.gz and zip.test.gz of The Elements of Statistical Learning,
        directly or in a folder `usps`, packed or unpacked. Nothing is downloaded.
      part: "train" (7,291 images) or "test" (2,007 images).

    Returns:
      Images `(n, 16, 16, 1)`, uint8, and labels `(n,)`, int32.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: an unknown part; a truncated file; or a line that is not a digit from 0 to 9 followed by
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
                f"line {number} of {path} has {len(columns)} columns; it must have {_USPS_COLUMNS}: a "
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
    # The comparison is negated, so that NaN is an error, too.
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
    """Return few-shot tasks over MNIST's ten digits, for transfer from other data.

    Every part contains all ten digits: there is no class split, and the card has no split hash. A model
    trained on Omniglot is evaluated on new classes, for example 10-way 1-shot; a model meta-trained on
    MNIST's "train" part is not, since "test" differs only in its images (see `part`).

    Images are `(size, size, 1)` float32 in [0, 1], ink 1 on 0.

    Args:
      split: "train", "validation" or "test"; recorded on the card; also sets the default of `part`.
      ways: classes per task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to evaluate on.
      data: folder with the files of MNIST, see `mnist_images`.
      size: side of the images in pixels; resized with a Lanczos filter unless 28.
      part: official images to use, "train" or "test"; None: the training images if split="train" and `data`
        has them, else the test images.

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


def fashion_mnist(
    split: SplitName = "test",
    *,
    ways: int | tuple[int, int] = 5,
    shots: int | tuple[int, int] = 1,
    queries: int = 5,
    data: str | os.PathLike[str],
    size: int = 28,
    part: Literal["train", "test"] | None = None,
) -> TaskDistribution:
    """Return few-shot tasks over the ten kinds of clothes of Fashion-MNIST, as `mnist` does over digits.

    Args:
      split: "train", "validation" or "test"; recorded on the card; also sets the default of `part`.
      ways: classes per task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to evaluate on.
      data: folder with the files of Fashion-MNIST, see `fashion_mnist_images`.
      size: side of the images in pixels; resized with a Lanczos filter unless 28.
      part: official images to use, "train" or "test"; None: the training images if split="train" and `data`
        has them, else the test images.

    Raises:
      FileNotFoundError, ValueError: see `fashion_mnist_images`, `from_arrays`.

    Examples:
      >>> tasks = fashion_mnist(ways=10, shots=1, queries=10, data="../shared/data")  # doctest: +SKIP
      >>> tasks.card.protocol  # doctest: +SKIP
      "Fashion-MNIST's 10,000 test images; all ten kinds of clothes in every part, so not for meta-testing \
after meta-training on it"
    """
    shape = {"ways": ways, "shots": shots, "queries": queries}
    return _tasks(_FASHION_MNIST, fashion_mnist_images, split, data, size, part, **shape)


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
    """Return few-shot tasks over the ten digits of USPS, as `mnist` does, resized to MNIST's 28×28 pixels.

    Args:
      split: "train", "validation" or "test"; recorded on the card; also sets the default of `part`.
      ways: classes per task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to evaluate on.
      data: folder with the files of USPS, see `usps_images`.
      size: side of the images in pixels; resized with a Lanczos filter unless 16.
      part: official images to use, "train" or "test"; None: the training images if split="train" and `data`
        has them, else the test images.

    Raises:
      FileNotFoundError, ValueError: see `usps_images`, `from_arrays`.

    Examples:
      >>> import jax
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
    check_word("part", part, (*files.parts, None))
    if part is None:
        part = "train" if split == "train" and any(files.existing(data, "train")) else "test"
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
        f"ten {files.classes} in every part, so not for meta-testing after meta-training on it",
        **shape,
    )
    # All parts share their classes, so a split hash would suggest a split that does not exist.
    return tasks._replace(card=dataclasses.replace(card_of(tasks), split_hash=None))


def _content(path: Path) -> bytes:
    """Return the content of a file, decompressed where it is gzip, regardless of its name."""
    content = path.read_bytes()
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ArgumentError(
            "data", f"{path} is damaged or incomplete ({error}); download it again"
        ) from error


def _idx(path: Path, rank: int) -> UInt8[np.ndarray, "..."]:
    """Return the array of an IDX file of bytes: a magic number, `rank` sizes, and the bytes."""
    content, start = _content(path), 4 * (1 + rank)
    magic, *sizes = (int.from_bytes(content[offset : offset + 4], "big") for offset in range(0, start, 4))
    if len(content) < start or magic != 0x800 + rank:
        raise ArgumentError(
            "data",
            f"{path} is not an IDX file of bytes of rank {rank}, which starts with {0x800 + rank:#010x} and "
            f"the sizes; it starts with 0x{content[:4].hex()}",
        )
    if len(content) - start != math.prod(sizes):
        raise ArgumentError(
            "data",
            f"{path} holds {len(content) - start} bytes after its header, which declares "
            f"{' x '.join(map(str, sizes))}; download it again",
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)


def _check_digits(path: Path, labels: Shaped[np.ndarray, " n"]) -> None:
    if not labels.size:
        raise ArgumentError("data", f"{path} is empty")
    wrong = np.flatnonzero(~np.isin(labels, np.arange(10)))
    if wrong.size:
        raise ArgumentError(
            "data", f"{path} must hold digits from 0 to 9; its label {wrong[0] + 1} is {labels[wrong[0]]}"
        )
