"""CUB-200-2011's class attributes, the class metadata of zero-shot tasks."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxmeta.checks import ArgumentError, MissingFileError

_CLASSES, _ATTRIBUTES = 200, 312


def cub_attributes(data: str | os.PathLike[str]) -> dict[str, Float[np.ndarray, "312"]]:
    """Return the 312 continuous attributes of each CUB-200-2011 class, float32 in [0, 1].

    An attribute is the share of annotators who saw it in images of the class: the official percentages,
    divided by 100.

    Args:
      data: folder CUB_200_2011 of the official archive, or its folder images. It must contain classes.txt
        and attributes/class_attribute_labels_continuous.txt. The list attributes.txt, in the folder or next
        to it, is checked where it exists.

    Returns:
      Attributes `(312,)` by class name, such as "001.Black_footed_Albatross".

    Raises:
      FileNotFoundError: a file does not exist.
      ValueError: a file has an unexpected number of lines, columns or names, or values outside [0, 100].

    Examples:
      >>> attributes = cub_attributes("CUB_200_2011")  # doctest: +SKIP
      >>> attributes["001.Black_footed_Albatross"].shape  # doctest: +SKIP
      (312,)

    References:
      Wah, Branson, Welinder, Perona, Belongie 2011, Caltech CNS-TR-2011-001.
    """
    folder = Path(data).expanduser().resolve()
    if folder.name == "images" and not (folder / "classes.txt").is_file():
        folder = folder.parent
    names = _listed(folder / "classes.txt", _CLASSES)
    for parent in (folder, folder.parent):
        if (parent / "attributes.txt").is_file():
            _listed(parent / "attributes.txt", _ATTRIBUTES)
    table = _percentages(folder / "attributes" / "class_attribute_labels_continuous.txt")
    return dict(zip(names, table / np.float32(100), strict=True))


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise MissingFileError(
            "data",
            f"{path} does not exist; data must be the official folder CUB_200_2011, with classes.txt and "
            "attributes/class_attribute_labels_continuous.txt",
        )
    return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _listed(path: Path, expected: int) -> list[str]:
    """Return the names of a file with lines "id name", ids from 1 to `expected` in order."""
    pairs = [line.split(maxsplit=1) for line in _lines(path)]
    if len(pairs) != expected:
        raise ArgumentError(
            "data", f"{path} must have {expected} lines, numbered 1 to {expected}, got {len(pairs)}"
        )
    for number, pair in enumerate(pairs, start=1):
        if pair[0] != str(number):
            raise ArgumentError("data", f"line {number} of {path} must start with {number}, got {pair[0]!r}")
    names = {pair[1].strip() for pair in pairs if len(pair) == 2}
    if len(names) != expected:
        raise ArgumentError("data", f"{path} must list {expected} distinct names, got {len(names)}")
    return [pair[1].strip() for pair in pairs]


def _percentages(path: Path) -> Float[np.ndarray, "classes attributes"]:
    rows = [line.split() for line in _lines(path)]
    if len(rows) != _CLASSES:
        raise ArgumentError("data", f"{path} must have {_CLASSES} lines, one per class, got {len(rows)}")
    for number, row in enumerate(rows, start=1):
        if len(row) != _ATTRIBUTES:
            raise ArgumentError(
                "data", f"line {number} of {path} must have {_ATTRIBUTES} numbers, got {len(row)}"
            )
    try:
        table = np.array([[float(value) for value in row] for row in rows], np.float32)
    except ValueError as error:
        raise ArgumentError("data", f"{path} must hold numbers only ({error})") from error
    if not ((table >= 0) & (table <= 100)).all():
        raise ArgumentError(
            "data", f"{path} must hold percentages, 0 to 100, got {table.min()} to {table.max()}"
        )
    return table
