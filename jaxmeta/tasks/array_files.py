"""Examples and labels in an npz file."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxmeta.checks import ArgumentError, MissingFileError, join_names
from jaxmeta.core import Rotations, SplitName, TaskDistribution
from jaxmeta.tasks.episodes import from_arrays
from jaxmeta.tasks.file_layouts import part_of, pickle_advice
from jaxmeta.tasks.splits import (
    FRACTIONS,
    PARTS,
    Classes,
    ClassSplit,
    check_part,
    split_of_parts,
    warn_of_pooled_parts,
)

# Names of the arrays of examples, labels, parts and domains; letter case is ignored.
_X = ("x", "images", "image", "data", "inputs")
_Y = ("y", "labels", "label", "targets", "target")
_SPLIT = ("split", "part", "parts", "splits")
_DOMAIN = ("domain", "domains")
# Floating-point images with larger values are taken to be in [0, 255] rather than [0, 1].
_LARGE = 16


class LabelledArrays(NamedTuple):
    """Examples with their classes and parts.

    Attributes:
      x: `(n, *shape)` examples of the file; `(n, h, w)` images get a channel axis.
      y: `(n,)` class names.
      parts: `(n,)` "train", "validation" or "test"; None where the file has no parts.
      domains: `(n,)` domain names; None where the file has none.
    """

    x: Shaped[np.ndarray, "n ..."]
    y: Shaped[np.ndarray, " n"]
    parts: Shaped[np.ndarray, " n"] | None = None
    domains: Shaped[np.ndarray, " n"] | None = None

    @property
    def split(self) -> ClassSplit | None:
        """Return the class split of the file's parts; None without parts or where they share classes."""
        if self.parts is None:
            return None
        return split_of_parts({part: self.y[self.parts == part].tolist() for part in PARTS})


def from_npz(
    path: str | os.PathLike[str],
    split: SplitName = "train",
    *,
    ways: int | tuple[int, int] = 5,
    shots: int | tuple[int, int] = 1,
    queries: int = 1,
    classes: Classes = "auto",
    split_seed: int = 0,
    rotations: Rotations = "none",
    across: bool = False,
    test_domains: tuple[str, ...] | None = None,
    skip_small_classes: bool = False,
) -> TaskDistribution:
    """Return few-shot tasks from the arrays of an npz file.

    The file holds examples `x`, `(n, h, w, c)` or `(n, h, w)` images or `(n, d)` features, uint8 or floating
    point, and their labels `y`, integers or names. Optionally it also holds `split`, with "train", "val" or
    "test" for each example, or has `x_train, y_train, x_val, y_val, x_test, y_test` in place of `x` and `y`.
    An array `domain` (or `domain_train`, …) may name the domain of each example, such as its style or camera.
    uint8 examples are returned as float32 in [0, 1]. Parts that share no class form the class split;
    otherwise the examples of all parts are pooled and the classes are split at random.

    Pickles are not read, since they can run code. The content of a pickle, such as mini-ImageNet's
    `mini-imagenet-cache-train.pkl`, is converted to npz by

        d = pickle.load(open("mini-imagenet-cache-train.pkl", "rb"))
        rows = [(row, name) for name, rows in d["class_dict"].items() for row in rows]
        numpy.savez("train.npz", x=d["image_data"][[r for r, _ in rows]], y=[name for _, name in rows])

    Args:
      path: path of the npz file.
      split: "train", "validation" or "test".
      ways: classes per task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to evaluate on.
      classes: class split: the fractions of train, validation and test for a random split seeded by
        `split_seed`, or the path of a JSON file `{"train": [names], "validation": [names], "test": [names]}`;
        in Python also such a mapping or a `ClassSplit`. "auto": the file's own parts where these share no
        class, else the fractions 0.64,0.16,0.2. None: every part draws from all classes.
      split_seed: seed of the random class split; must be 0 where `classes` names the classes. Episodes depend
        only on the key given to `sample`.
      rotations: rotations of the images: "none"; "classes", each class rotated by 90, 180 and 270° is an
        additional class; or "random", one random rotation per class and episode.
      across: whether support and queries of a class are from different domains, see `from_arrays`.
      test_domains: names of domains held out for test: training and validation use examples of the other
        domains only, testing uses these only; with `across`, the queries of test tasks are from these domains
        and the support sets from the others.
      skip_small_classes: whether to skip, with a warning, classes with fewer than shots + queries examples,
        after the classes are split.

    Raises:
      FileNotFoundError: `path` does not exist.
      ValueError: the file is not an npz file, lacks an array, or has arrays of objects or of inconsistent
        shapes; or it has too few classes, or a class has too few examples, for the episodes.

    Examples:
      >>> import tempfile, jax
      >>> path = tempfile.mkdtemp() + "/images.npz"
      >>> np.savez(path, x=np.zeros((30, 8, 8), np.uint8), y=np.repeat(np.arange(10), 3))
      >>> from_npz(path, ways=5, shots=1, queries=2).sample(jax.random.key(0)).support.x.shape
      (5, 8, 8, 1)
    """
    check_part(split)
    file = Path(path).expanduser()
    arrays = read_npz(file)
    if arrays.domains is None and (across or test_domains is not None):
        name = "across" if across else "test_domains"
        raise ArgumentError(name, f"{file} has no array domain with the domain of each example")
    protocol = ""
    if classes == "auto":
        file_split = arrays.split
        if file_split is None and arrays.parts is not None:
            warn_of_pooled_parts(f"arrays:{file.name}", [part for part in PARTS if part in arrays.parts])
        classes = FRACTIONS if file_split is None else file_split
        protocol = "" if file_split is None else "class split of the file's own parts"
    return from_arrays(
        arrays.x,
        arrays.y,
        ways=ways,
        shots=shots,
        queries=queries,
        split=split,
        classes=classes,
        split_seed=split_seed,
        rotations=rotations,
        name=f"arrays:{file.name}",
        protocol=protocol,
        domains=arrays.domains,
        across=across,
        test_domains=test_domains,
        skip_small_classes=skip_small_classes,
    )


def read_npz(path: Path, argument: str = "path") -> LabelledArrays:
    """Read the examples and labels of an npz file; see `from_npz`.

    Raises:
      FileNotFoundError, ValueError: see `from_npz`.
    """
    arrays = npz_arrays(path, argument)
    by_part: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        kind, part = _meaning(name)
        if kind is not None:
            if kind in by_part.setdefault(part, {}):
                raise ArgumentError(
                    argument, f"{path} has several arrays for {kind}, one of them {name}; keep one"
                )
            by_part[part][kind] = array
    parts: list[str] = [part for part in PARTS if part in by_part]
    if "" in by_part and parts:
        raise ArgumentError(
            argument, f"{path} has x or y as well as arrays of the parts {', '.join(parts)}; remove one kind"
        )
    read = []
    domains: list[np.ndarray] = []
    for part in parts or [""]:
        members = by_part.get(part, {})
        suffix = f"_{part}" if part else ""
        missing = [name for name in ("x", "y") if name not in members]
        if missing:
            raise ArgumentError(
                argument,
                f"{path} lacks {' and '.join(name + suffix for name in missing)}; it has "
                f"{join_names(arrays) or 'no arrays'}; write it with numpy.savez(path, x=…, y=…), "
                "with the examples as x and their labels as y",
            )
        x, y = _examples(path, argument, members["x"]), _labels(path, argument, members["y"])
        if len(x) != len(y):
            raise ArgumentError(
                argument,
                f"{path} has {len(x)} examples x{suffix} and {len(y)} labels y{suffix}; there must be one "
                "label per example",
            )
        column = members.get("split")
        example_parts = np.full(len(x), part) if column is None else _parts(path, argument, column, len(x))
        read.append((x, y, example_parts))
        if "domain" in members:
            domains.append(_domains(path, argument, "domain" + suffix, members["domain"], len(x)))
    if domains and len(domains) < len(read):
        raise ArgumentError(argument, f"{path} has domains for some of its parts; give them for all or none")
    shapes = {x.shape[1:] for x, _, _ in read}
    if len(shapes) > 1:
        raise ArgumentError(
            argument,
            f"{path} has examples of several shapes: {join_names(map(str, sorted(shapes)))}; they must have "
            "one shape",
        )
    kinds = {x.dtype == np.uint8 for x, _, _ in read}
    if len(kinds) > 1:
        raise ArgumentError(
            argument,
            f"{path} has uint8 in some parts and floats in others; use one type, x / 255 for the uint8 parts",
        )
    xs, ys, parts_by_file = zip(*read, strict=True)
    # A single array is not copied.
    x = xs[0] if len(xs) == 1 else np.concatenate(xs)
    labels, all_parts = np.concatenate(ys), np.concatenate(parts_by_file)
    has_parts = bool(parts) or "split" in by_part.get("", {})
    if has_parts and len(set(all_parts.tolist())) < 2:
        has_parts = False
        warnings.warn(f"{path} has a single part, {all_parts[0]}, which defines no split", stacklevel=4)
    return LabelledArrays(
        x, labels, all_parts if has_parts else None, np.concatenate(domains) if domains else None
    )


def npz_arrays(path: Path, argument: str) -> Mapping[str, np.ndarray]:
    """Return the arrays of an npz file by name; arrays of objects are refused.

    Args:
      path: path of the npz file.
      argument: name of the caller's argument, for the messages.

    Raises:
      FileNotFoundError: `path` does not exist.
      ArgumentError: the file cannot be read as npz.
    """
    if not path.is_file():
        raise MissingFileError(argument, f"{path} is not a file")
    suffix = path.suffix.lower()
    if suffix in (".pkl", ".pickle", ".p"):
        raise ArgumentError(argument, f"{path}: {pickle_advice(path)}")
    if suffix == ".npy":
        raise ArgumentError(
            argument,
            f"{path} holds a single array, and labels are needed too; write both with numpy.savez(path, "
            "x=…, y=…)",
        )
    arrays = {}
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with loaded as file:
            for name in file.files:
                try:
                    arrays[name] = file[name]
                except ValueError as error:
                    if "allow_pickle" not in str(error):
                        raise
                    raise ArgumentError(
                        argument,
                        f"{path}: {name} is an array of objects, stored as a pickle, which is not read; "
                        f"convert it: {name}.astype(str) for names, numpy.stack(list({name})) for arrays of "
                        "one shape",
                    ) from None
    except ArgumentError:
        raise
    # zipfile and NumPy raise ValueError, OSError, NotImplementedError, zlib.error, …
    except Exception as error:
        reason = " ".join(str(error).split())
        if "pickle" in reason:
            reason = pickle_advice(path)
        raise ArgumentError(argument, f"{path} cannot be read as an npz file ({reason})") from error
    return arrays


def _meaning(name: str) -> tuple[str | None, str]:
    """Return the kind ("x", "y", "split", "domain"; None) and part ("" for none) of an array by its name."""
    words = name.casefold().replace("-", "_")
    for kind, names in (("x", _X), ("y", _Y), ("split", _SPLIT), ("domain", _DOMAIN)):
        if words in names:
            return kind, ""
        for alias in names:
            for before, after in ((f"{alias}_", ""), ("", f"_{alias}")):
                if words.startswith(before) and words.endswith(after) and len(words) > len(before + after):
                    part = part_of(words.removeprefix(before).removesuffix(after))
                    if part is not None and kind != "split":
                        return kind, part
    return None, ""


def _examples(path: Path, argument: str, x: np.ndarray) -> np.ndarray:
    if x.ndim < 2:
        raise ArgumentError(
            argument, f"{path}: x has shape {x.shape}; it must be (n, h, w, c), (n, h, w) or (n, d)"
        )
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise ArgumentError(
            argument,
            f"{path}: x has type {x.dtype}; it must be uint8 (0 to 255), such as x.astype('uint8'), or "
            "floating point",
        )
    if x.ndim == 4 and x.shape[-1] not in (1, 3) and x.shape[1] in (1, 3):
        raise ArgumentError(
            argument, f"{path}: x has shape {x.shape}; channels must come last: x.transpose(0, 2, 3, 1)"
        )
    if (
        x.ndim >= 3
        and x.dtype.kind == "f"
        and x.size
        and float(np.nanmax(x)) > _LARGE
        and float(np.nanmin(x)) >= 0
    ):
        warnings.warn(
            f"{path}: x has values up to {float(np.nanmax(x)):g}; floating-point images should be in [0, "
            "1], and images in 0 to 255 should be uint8",
            stacklevel=4,
        )
    return x[..., None] if x.ndim == 3 else x


def _labels(path: Path, argument: str, y: np.ndarray) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        more = "; convert one-hot labels by y.argmax(1)" if y.ndim == 2 else ""
        raise ArgumentError(
            argument, f"{path}: y has shape {y.shape}; it must be (n,), one label per example{more}"
        )
    y = decoded(path, argument, "y", y)
    if y.dtype.kind not in "iuU":
        raise ArgumentError(
            argument, f"{path}: y has type {y.dtype}; labels must be integers or names, such as y.astype(int)"
        )
    labels = y.astype(str)
    if (labels == "").any():
        raise ArgumentError(argument, f"{path}: y[{int(np.argmax(labels == ''))}] is an empty class name")
    return labels


def decoded(path: Path, argument: str, name: str, array: np.ndarray) -> np.ndarray:
    """Return an array of bytes decoded to text, and any other array as it is.

    Raises:
      ArgumentError: the bytes are not UTF-8.
    """
    if array.dtype.kind != "S":
        return array
    try:
        return np.char.decode(array, "utf-8")
    except UnicodeDecodeError:
        raise ArgumentError(argument, f"{path}: {name} holds bytes that are not UTF-8") from None


def _domains(path: Path, argument: str, name: str, domains: np.ndarray, n: int) -> np.ndarray:
    domains = decoded(path, argument, name, domains)
    if domains.shape != (n,) or domains.dtype.kind not in "iuU":
        raise ArgumentError(
            argument,
            f"{path}: {name} has shape {domains.shape} and type {domains.dtype}; it must be ({n},) names",
        )
    return domains.astype(str)


def _parts(path: Path, argument: str, split: np.ndarray, n: int) -> np.ndarray:
    split = decoded(path, argument, "split", split)
    if split.shape != (n,) or split.dtype.kind != "U":
        raise ArgumentError(
            argument,
            f"{path}: split has shape {split.shape} and type {split.dtype}; it must be ({n},) part names",
        )
    names = split.astype(str)
    part_by_name = {name: part_of(name) for name in set(names.tolist())}
    wrong = sorted(name for name, part in part_by_name.items() if part is None)
    if wrong:
        row = int(np.argmax(names == wrong[0]))
        raise ArgumentError(
            argument, f"{path}: split[{row}] is {wrong[0]!r}; it must be 'train', 'val' or 'test'"
        )
    return np.array([part_by_name[name] for name in names.tolist()])
