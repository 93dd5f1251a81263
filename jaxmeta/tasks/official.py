"""The published class splits of CIFAR-FS, mini-ImageNet and CUB, and tasks from local copies of the data."""

import dataclasses
import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxmeta.checks import ArgumentError, MissingFileError, join_names
from jaxmeta.core import SplitName, TaskDistribution
from jaxmeta.tasks.attributes import cub_attributes
from jaxmeta.tasks.file_layouts import Listing, list_parts, refuse_other_files
from jaxmeta.tasks.folder import prepare_files
from jaxmeta.tasks.images import class_files, image_files, subfolders
from jaxmeta.tasks.prepared import SplitImages, from_prepared, prepare
from jaxmeta.tasks.splits import PARTS, ClassSplit, check_part
from jaxmeta.tasks.tfds import prepare_tfds

_CIFAR_IMAGES = 60_000
# Subfolders of `data` that may hold ImageNet's class folders.
_IMAGENET = ("", "train", "ILSVRC/Data/CLS-LOC/train")
_MINI_IMAGENET_IMAGES = 600  # per class

_CIFAR_FS = {
    "train": """
        apple aquarium_fish bear bee bottle bowl boy bridge bus can castle caterpillar chair clock cloud
        cockroach couch cup dinosaur dolphin elephant forest girl hamster house kangaroo keyboard
        lawn_mower lion lizard lobster mountain mouse mushroom oak_tree orange orchid palm_tree pear
        pine_tree plate porcupine possum rabbit raccoon ray road seal shrew skunk skyscraper snake spider
        squirrel streetcar sunflower tank tiger train trout tulip turtle willow_tree wolf
    """,
    "validation": """
        beaver otter flatfish shark lamp television beetle butterfly sea camel cattle crab crocodile
        maple_tree motorcycle tractor
    """,
    "test": """
        whale poppy rose sweet_pepper telephone bed table wardrobe leopard plain chimpanzee fox snail worm
        baby man woman bicycle pickup_truck rocket
    """,
}

_MINI_IMAGENET = {
    "train": """
        n01532829 n01558993 n01704323 n01749939 n01770081 n01843383 n01910747 n02074367 n02089867
        n02091831 n02101006 n02105505 n02108089 n02108551 n02108915 n02111277 n02113712 n02120079
        n02165456 n02457408 n02606052 n02687172 n02747177 n02795169 n02823428 n02966193 n03017168
        n03047690 n03062245 n03207743 n03220513 n03337140 n03347037 n03400231 n03476684 n03527444
        n03676483 n03838899 n03854065 n03888605 n03908618 n03924679 n03998194 n04067472 n04243546
        n04251144 n04258138 n04275548 n04296562 n04389033 n04435653 n04443257 n04509417 n04515003
        n04596742 n04604644 n04612504 n06794110 n07584110 n07697537 n07747607 n09246464 n13054560
        n13133613
    """,
    "validation": """
        n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792 n03075370
        n03417042 n03535780 n03584254 n03770439 n03773504 n03980874 n09256479
    """,
    "test": """
        n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165 n02219486 n02443484
        n02871525 n03127925 n03146219 n03272010 n03544143 n03775546 n04146614 n04149813 n04418357
        n04522168 n07613480
    """,
}


def cifar_fs_split() -> ClassSplit:
    """Return the class split of CIFAR-FS: 64, 16 and 20 of CIFAR-100's fine classes.

    Examples:
      >>> cifar_fs_split().sizes
      (64, 16, 20)

    References:
      Bertinetto, Henriques, Torr, Vedaldi 2019, arXiv 1805.08136.
    """
    return ClassSplit(**{part: tuple(names.split()) for part, names in _CIFAR_FS.items()})


def mini_imagenet_split() -> ClassSplit:
    """Return the class split of mini-ImageNet: 64, 16 and 20 classes of ILSVRC-2012 by WordNet id.

    These are the lists of Ravi and Larochelle, which later work uses; the original lists of Vinyals et al.
    differ.

    Examples:
      >>> mini_imagenet_split().sizes
      (64, 16, 20)

    References:
      Ravi, Larochelle 2017, https://openreview.net/forum?id=rJY0-Kcll.
    """
    return ClassSplit(**{part: tuple(names.split()) for part, names in _MINI_IMAGENET.items()})


def cub_split(folders: Iterable[str]) -> ClassSplit:
    """Return the class split of CUB-200-2011: 100, 50 and 50 of the class folders.

    In sorted order every second class is for training; the others alternate between validation and test.

    Args:
      folders: names of the 200 class folders, "001.Black_footed_Albatross" and so on, in any order.

    Raises:
      ValueError: the names are not those of the 200 classes.

    Examples:
      >>> split = cub_split(f"{number:03d}.Bird" for number in range(1, 201))
      >>> split.sizes, split.train[:2], split.validation[:2], split.test[:1]
      ((100, 50, 50), ('001.Bird', '003.Bird'), ('002.Bird', '006.Bird'), ('004.Bird',))

    References:
      Chen, Liu, Kira, Wang, Huang 2019, arXiv 1904.04232 (their write_CUB_filelist.py).
    """
    names = sorted(folders)
    numbers = [f"{number:03d}" for number in range(1, 201)]
    prefixes = [name.partition(".")[0] for name in names]
    if prefixes != numbers:
        missing = sorted(set(numbers) - set(prefixes))
        raise ValueError(
            "folders must be CUB-200-2011's 200 class folders, '001.Black_footed_Albatross' to "
            f"'200.Common_Yellowthroat', got {len(names)}"
            + (f"; missing numbers: {join_names(missing)}" if missing else "")
        )
    return ClassSplit(tuple(names[0::2]), tuple(names[1::4]), tuple(names[3::4]))


def cifar_fs(
    split: SplitName = "train",
    *,
    ways: int | tuple[int, int] = 5,
    shots: int | tuple[int, int] = 1,
    queries: int = 15,
    data: str | os.PathLike[str] | None = None,
) -> TaskDistribution:
    """Return CIFAR-FS tasks: all 600 images per class of CIFAR-100, by the published class split.

    Images are `(32, 32, 3)` float32 in [0, 1].

    Args:
      split: "train", "validation" or "test".
      ways: classes per task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to evaluate on.
      data: folder with CIFAR-100's official archive cifar-100-binary.tar.gz or its files; or with class
        folders of images, directly, in `data`, in `cifar100/data` (as in Bertinetto's code), or in folders
        train, val and test; or with `cifar100` as prepared by tensorflow-datasets. None: the default folder
        of tensorflow-datasets.

    Raises:
      ValueError: the archive does not hold CIFAR-100; or see `prepare_tfds`.
      OSError: see `prepare_tfds`.

    Examples:
      >>> tasks = cifar_fs("test", ways=5, shots=5)  # doctest: +SKIP
      >>> tasks.card.classes  # doctest: +SKIP
      20

    References:
      Bertinetto, Henriques, Torr, Vedaldi 2019, arXiv 1805.08136.
    """
    check_part(split)
    return _tasks(cifar_fs_images(data), split, ways=ways, shots=shots, queries=queries)


def mini_imagenet(
    split: SplitName = "train",
    *,
    ways: int | tuple[int, int] = 5,
    shots: int | tuple[int, int] = 1,
    queries: int = 15,
    data: str | os.PathLike[str],
    size: int = 84,
) -> TaskDistribution:
    """Return mini-ImageNet tasks from a local copy, by the class split of Ravi and Larochelle.

    Images are `(size, size, 3)` float32 in [0, 1]. Only the 100 classes are read. From a copy of ImageNet
    the first 600 images of each class by name are used, as recorded in the card's protocol: only the csv
    lists define the published images.

    Args:
      split: "train", "validation" or "test".
      ways: classes per task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to evaluate on.
      data: folder with images/ and train.csv, val.csv, test.csv (columns filename, label), in it or in
        split/; or with base.json, val.json, novel.json; or with class folders named by WordNet id: in
        folders train, val and test, or all 100 of them directly, in train or in ILSVRC/Data/CLS-LOC/train.
      size: side of the images in pixels.

    Raises:
      FileNotFoundError: `data` is not a folder, or has a folder images without the three lists.
      ValueError: classes or images are missing, or images cannot be decoded.

    Examples:
      >>> tasks = mini_imagenet("test", ways=5, shots=5, data="imagenet")  # doctest: +SKIP
      >>> tasks.card.classes  # doctest: +SKIP
      20

    References:
      Ravi, Larochelle 2017, https://openreview.net/forum?id=rJY0-Kcll.
    """
    check_part(split)
    return _tasks(mini_imagenet_images(data, size), split, ways=ways, shots=shots, queries=queries)


def cub(
    split: SplitName = "train",
    *,
    ways: int | tuple[int, int] = 5,
    shots: int | tuple[int, int] = 1,
    queries: int = 15,
    data: str | os.PathLike[str],
    size: int = 84,
) -> TaskDistribution:
    """Return CUB-200-2011 tasks from a local copy, by the class split of `cub_split`.

    Images are `(size, size, 3)` float32 in [0, 1], not cropped to the bounding boxes.

    With `shots=0` the tasks are zero-shot: the support set holds `cub_attributes`, one vector per class.
    Published zero-shot results use a different 100/50/50 split, which is not included; to use your own
    split, pass features or images, `cub_attributes` and a `ClassSplit` to `from_arrays`.

    Args:
      split: "train", "validation" or "test".
      ways: classes per task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to evaluate on.
      data: folder CUB_200_2011, or its folder images; or a folder with lists of the images (base.json,
        val.json and novel.json, or csv files).
      size: side of the images in pixels.

    Raises:
      FileNotFoundError: `data` is not a folder, or has no attributes where `shots=0`.
      ValueError: classes are missing, or images cannot be decoded; see also `cub_attributes`.

    Examples:
      >>> tasks = cub("test", ways=5, shots=5, data="CUB_200_2011")  # doctest: +SKIP
      >>> tasks.card.classes  # doctest: +SKIP
      50

    References:
      Wah, Branson, Welinder, Perona, Belongie 2011, Caltech CNS-TR-2011-001; Chen, Liu, Kira, Wang,
      Huang 2019, arXiv 1904.04232.
    """
    check_part(split)
    metadata = cub_attributes(data) if shots == 0 else None
    return _tasks(cub_images(data, size), split, ways=ways, shots=shots, queries=queries, metadata=metadata)


def _tasks(images: SplitImages, split: SplitName, **shape: Any) -> TaskDistribution:
    prepared, classes, protocol = images
    return from_prepared(prepared, split=split, classes=classes, protocol=protocol, **shape)


def cifar_fs_images(data: str | os.PathLike[str] | None = None) -> SplitImages:
    """Return the images, class split and protocol of `cifar_fs`."""
    rows = None if data is None else _cifar_rows(Path(data).expanduser())
    listing = None if data is None or rows is not None else _cifar_listing(Path(data).expanduser().resolve())
    if listing is not None:
        prepared = prepare_files("cifar_fs", listing, size=32, channels=3, argument="data")
    elif rows is None:
        prepared = prepare_tfds("cifar100", size=32, channels=3, image="image", label="label", data=data)
    else:
        # The labels of the official files number the classes alphabetically.
        names = sorted(name for part in PARTS for name in cifar_fs_split().part(part))
        order = np.argsort(rows[:, 1], kind="stable")
        images = (
            (names[row[1]], np.ascontiguousarray(row[2:].reshape(3, 32, 32).transpose(1, 2, 0)))
            for row in (rows[index] for index in order)
        )
        digest = hashlib.sha256(rows.tobytes()).hexdigest()
        prepared = prepare("cifar_fs", digest, (32, 32, 3), images, expected=len(rows))
    return SplitImages(
        dataclasses.replace(prepared, name="cifar_fs"),
        cifar_fs_split(),
        "CIFAR-FS (Bertinetto et al. 2019): CIFAR-100's training and test images, 64/16/20 classes",
    )


def mini_imagenet_images(data: str | os.PathLike[str], size: int = 84) -> SplitImages:
    """Return the images, class split and protocol of `mini_imagenet`."""
    folder = _folder(data)
    listing = _mini_imagenet_listing(folder)
    protocol = "mini-ImageNet, class split of Ravi & Larochelle 2017"
    if any(len(listing.files_of(name)) > _MINI_IMAGENET_IMAGES for name in listing.classes):
        files = {name: listing.files_of(name)[:_MINI_IMAGENET_IMAGES] for name in listing.classes}
        listing = Listing.of_classes(folder, files)
        protocol += (
            f"; the first {_MINI_IMAGENET_IMAGES} images of each class by name: not the published choice of "
            "images, which only the csv lists define"
        )
    prepared = prepare_files("mini_imagenet", listing, size=size, channels=3, argument="data")
    return SplitImages(prepared, mini_imagenet_split(), protocol)


def cub_images(data: str | os.PathLike[str], size: int = 84) -> SplitImages:
    """Return the images, class split and protocol of `cub`."""
    folder = _folder(data)
    root = folder / "images" if (folder / "images").is_dir() else folder
    listing = None if len(subfolders(root)) > 1 else list_parts(folder, "data")
    if listing is None:
        listing = Listing.of_classes(root, class_files(root, "data"))
    try:
        classes = cub_split(listing.classes)
    except ValueError as error:
        raise ArgumentError("data", f"{root}: {error}") from error
    _check_parts(listing, classes, folder, "Chen et al.")
    return SplitImages(
        prepare_files("cub", listing, size=size, channels=3, argument="data"),
        classes,
        "CUB-200-2011, class split of Chen et al. 2019 (A Closer Look at Few-shot Classification)",
    )


def _cifar_rows(data: Path) -> UInt8[np.ndarray, "n 3074"] | None:
    """Return the records of CIFAR-100's official files, training set first.

    A record is superclass, class, and the red, green and blue planes. None if `data` has no official file.
    """
    members = ("train.bin", "test.bin")
    archive = data if data.is_file() else data / "cifar-100-binary.tar.gz"
    folder = next((path for path in (data, data / "cifar-100-binary") if (path / members[0]).is_file()), None)
    if folder is not None:
        content = b"".join((folder / name).read_bytes() for name in members if (folder / name).is_file())
    elif archive.is_file():
        try:
            with tarfile.open(archive) as files:
                extracted = (files.extractfile(f"cifar-100-binary/{name}") for name in members)
                content = b"".join(file.read() for file in extracted if file is not None)
        except (tarfile.TarError, EOFError, KeyError, zlib.error) as error:
            raise ArgumentError(
                "data", f"{archive} is not a complete cifar-100-binary.tar.gz ({error}); download it again"
            ) from error
    else:
        return None
    expected = _CIFAR_IMAGES * 3074
    if len(content) != expected:
        raise ArgumentError(
            "data",
            f"{' and '.join(members)} in {folder or archive} have {len(content)} bytes; CIFAR-100 has "
            f"{expected}",
        )
    return np.frombuffer(content, np.uint8).reshape(-1, 3074)


def _folder(data: str | os.PathLike[str]) -> Path:
    folder = Path(data).expanduser().resolve()
    if not folder.is_dir():
        raise MissingFileError("data", f"{folder} is not a folder")
    return folder


def _mini_imagenet_listing(data: Path) -> Listing:
    """Return the images of mini-ImageNet's classes from class folders, folders of parts, or lists."""
    split = mini_imagenet_split()
    listing = _class_folders(data, split, _IMAGENET)
    if listing is not None:
        return listing
    listing = list_parts(data, "data")
    if listing is not None:
        _check_parts(listing, split, data, "Ravi & Larochelle")
        return listing
    if (data / "images").is_dir():
        raise MissingFileError(
            "data", f"{data} has a folder images, but lacks train.csv, val.csv and test.csv"
        )
    refuse_other_files(data, "data")
    names = _names(split)
    roots = [data / place for place in _IMAGENET]
    missing = min(([name for name in names if not (root / name).is_dir()] for root in roots), key=len)
    raise ArgumentError(
        "data",
        f"{data} must contain images with train.csv, val.csv and test.csv, folders train, val and test, or "
        "mini-ImageNet's 100 class folders (directly, in train or in ILSVRC/Data/CLS-LOC/train), of which "
        f"it lacks {len(missing)}: {join_names(missing)}",
    )


def _cifar_listing(data: Path) -> Listing | None:
    """Return CIFAR-FS's image files from class folders or folders of parts; None if there are none."""
    if not data.is_dir():
        return None
    listing = _class_folders(data, cifar_fs_split(), ("", "data", "cifar100/data"))
    if listing is not None:
        return listing
    listing = list_parts(data, "data")
    if listing is not None:
        _check_parts(listing, cifar_fs_split(), data, "Bertinetto et al.")
    return listing


def _names(split: ClassSplit) -> list[str]:
    return sorted(split.train + split.validation + split.test)


def _class_folders(data: Path, split: ClassSplit, places: Iterable[str]) -> Listing | None:
    """Return the images of a split from the first of `places` with all class folders; None without one.

    Raises:
      ArgumentError: a class folder has no images.
    """
    names = _names(split)
    for root in (data / place for place in places):
        if not all((root / name).is_dir() for name in names):
            continue
        files = {name: image_files(root / name) for name in names}
        empty = [name for name in names if not files[name]]
        if empty:
            raise ArgumentError(
                "data",
                f"{len(empty)} of {len(names)} class folders in {root} hold no images: {join_names(empty)}",
            )
        return Listing.of_classes(data, files)
    return None


def _check_parts(listing: Listing, split: ClassSplit, data: Path, authors: str) -> None:
    """Check that the classes of a listing match a published split, part by part where it has parts.

    Raises:
      ArgumentError: classes are missing or unexpected.
    """
    parts = listing.parts()
    missing = [part for part in PARTS if part not in parts]
    if parts and missing:
        raise MissingFileError(
            "data", f"{data} has {listing.layout}, but no data for {' and '.join(missing)}"
        )
    expected = {part: set(split.part(part)) for part in parts} or {"": set(_names(split))}
    for part, names in expected.items():
        if wrong := listing.classes_of(part) ^ names:
            raise ArgumentError(
                "data",
                f"{data}, read by {listing.layout}, does not have the {part + ' ' if part else ''}classes of "
                f"{authors}; unexpected or missing: {join_names(sorted(wrong))}",
            )
