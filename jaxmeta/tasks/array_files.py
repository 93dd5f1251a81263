"""One's own arrays: examples and labels in an npz file."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxmeta.checks import ArgumentError, MissingFileError, some
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

# What arrays of examples, labels and parts are called, in any case.
_X = ("x", "images", "image", "data", "inputs")
_Y = ("y", "labels", "label", "targets", "target")
_SPLIT = ("split", "part", "parts", "splits")
# Floating-point images of larger values are not in [0, 1].
_LARGE = 16


class LabelledArrays(NamedTuple):
    """Examples with the class and the part of each.

    Attributes:
      x: `(n, *shape)` as in the file; of grey images without a channel axis with one.
      y: `(n,)` names of classes.
      parts: `(n,)` "train", "validation" or "test"; None where the file does not say.
    """

    x: Shaped[np.ndarray, "n ..."]
    y: Shaped[np.ndarray, " n"]
    parts: Shaped[np.ndarray, " n"] | None = None

    @property
    def split(self) -> ClassSplit | None:
        """The class split that the file's parts make; None without any, or where these share classes."""
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
    skip_small_classes: bool = False,
) -> TaskDistribution:
    """Few-shot tasks from the arrays of an npz file.

    The file has examples `x`, `(n, h, w, c)` or `(n, h, w)` images or `(n, d)` features, uint8 or floating
    point, and their labels `y`, integers or names; and, where it says which are for what, `split` with
    "train", "val" or "test" for each example, or `x_train, y_train, x_val, y_val, x_test, y_test` in place of
    `x` and `y`. uint8 examples come out as float32 in [0, 1]. Parts that share no class are the class split;
    where they do, the examples of all parts are pooled, and the classes shared out at random.

    Pickles are not read, since they can run code. What is in one, such as mini-ImageNet's
    `mini-imagenet-cache-train.pkl`, is written as npz by

        d = pickle.load(open("mini-imagenet-cache-train.pkl", "rb"))
        rows = [(row, name) for name, rows in d["class_dict"].items() for row in rows]
        numpy.savez("train.npz", x=d["image_data"][[r for r, _ in rows]], y=[name for _, name in rows])

    Args:
      path: the file.
      split: "train", "validation" or "test".
      ways: classes of a task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to evaluate on.
      classes: class split: the fractions of train, validation and test for a random split by `split_seed`,
        or the path of a JSON file `{"train": [names], "validation": [names], "test": [names]}`. In Python
        also such a mapping, or a `ClassSplit`. "auto" is that of the file's own parts where these share no
        class, else the fractions 0.64,0.16,0.2. None draws from every class, whatever `split` says.
      split_seed: seed of the random class split; episodes depend on the key given to `sample` alone.
        A split by name takes none.
      rotations: how images are turned: "none"; "classes", every class turned by 90, 180 and 270° is a class
        of its own; or "random", one rotation for each drawn class in each episode.
      skip_small_classes: whether to leave out, with a warning, classes with too few examples for shots and
        queries, after the classes are split.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no npz file, lacks an array, or has arrays that do not fit together or hold objects;
        too few classes, or a class with too few examples, for the episodes.

    Examples:
      >>> import tempfile, jax
      >>> path = tempfile.mkdtemp() + "/own.npz"
      >>> np.savez(path, x=np.zeros((30, 8, 8), np.uint8), y=np.repeat(np.arange(10), 3))
      >>> from_npz(path, ways=5, shots=1, queries=2).sample(jax.random.key(0)).support.x.shape
      (5, 8, 8, 1)
    """
    check_part(split)
    file = Path(path).expanduser()
    arrays = read_npz(file)
    protocol = ""
    if classes == "auto":
        own = arrays.split
        if own is None and arrays.parts is not None:
            warn_of_pooled_parts(f"arrays:{file.name}", [part for part in PARTS if part in arrays.parts])
        classes = FRACTIONS if own is None else own
        protocol = "" if own is None else "class split of the file's own parts"
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
        skip_small_classes=skip_small_classes,
    )


def read_npz(path: Path, argument: str = "path") -> LabelledArrays:
    """Read examples and labels from an npz file; see `from_npz`.

    Raises:
      FileNotFoundError, ValueError: see `from_npz`.
    """
    arrays = npz_arrays(path, argument)
    by_part: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        kind, part = _meaning(name)
        if kind is not None:
            if kind in by_part.setdefault(part, {}):
                raise ArgumentError(argument, f"{path} has several arrays for {kind}, of which one is {name}")
            by_part[part][kind] = array
    parts: list[str] = [part for part in PARTS if part in by_part]
    if "" in by_part and parts:
        raise ArgumentError(
            argument, f"{path} has x or y beside those of parts ({', '.join(parts)}); leave one of them out"
        )
    read = []
    for part in [*parts] or [""]:
        found = by_part.get(part, {})
        suffix = f"_{part}" if part else ""
        lacking = [name for name in ("x", "y") if name not in found]
        if lacking:
            raise ArgumentError(
                argument,
                f"{path} lacks {' and '.join(name + suffix for name in lacking)}; it has "
                f"{some(arrays) or 'nothing'}; write it by numpy.savez(path, x=…, y=…), with the examples as "
                "x and their labels as y",
            )
        x, y = _examples(path, argument, found["x"]), _labels(path, argument, found["y"])
        if len(x) != len(y):
            raise ArgumentError(
                argument,
                f"{path} has {len(x)} examples x{suffix} and {len(y)} labels y{suffix}; there must be one "
                "label each",
            )
        own = found.get("split")
        told = np.full(len(x), part) if own is None else _parts(path, argument, own, len(x))
        read.append((x, y, told))
    shapes = {x.shape[1:] for x, _, _ in read}
    if len(shapes) > 1:
        raise ArgumentError(
            argument, f"{path} has examples of several shapes: {some(map(str, sorted(shapes)))}"
        )
    kinds = {x.dtype == np.uint8 for x, _, _ in read}
    if len(kinds) > 1:
        raise ArgumentError(
            argument,
            f"{path} has bytes in some parts and floats in others; give all one type, by x / 255 of bytes",
        )
    xs, ys, told = zip(*read, strict=True)
    # Arrays of one part are not copied.
    x = xs[0] if len(xs) == 1 else np.concatenate(xs)
    labels, all_parts = np.concatenate(ys), np.concatenate(told)
    has_parts = bool(parts) or "split" in by_part.get("", {})
    if has_parts and len(set(all_parts.tolist())) < 2:
        has_parts = False
        warnings.warn(f"{path} names a single part, {all_parts[0]}, which splits nothing", stacklevel=4)
    return LabelledArrays(x, labels, all_parts if has_parts else None)


def npz_arrays(path: Path, argument: str) -> Mapping[str, np.ndarray]:
    """Return the arrays of an npz file, of which none may hold objects.

    Raises:
      FileNotFoundError, ArgumentError: there is none, or it cannot be read.
    """
    if not path.is_file():
        raise MissingFileError(argument, f"{path} is no file")
    suffix = path.suffix.lower()
    if suffix in (".pkl", ".pickle", ".p"):
        raise ArgumentError(argument, f"{path}: {pickle_advice(path)}")
    if suffix == ".npy":
        raise ArgumentError(
            argument,
            f"{path} holds one array, and labels are needed with it; write both by numpy.savez(path, x=…, "
            "y=…)",
        )
    found = {}
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is one array")
        with loaded as file:
            for name in file.files:
                try:
                    found[name] = file[name]
                except ValueError as error:
                    if "allow_pickle" not in str(error):
                        raise
                    raise ArgumentError(
                        argument,
                        f"{path}: {name} is an array of objects, which is a pickle, and none is read; give "
                        f"it a type: {name}.astype(str) of names, numpy.stack(list({name})) of arrays of one "
                        "shape",
                    ) from None
    except ArgumentError:
        raise
    except (
        Exception
    ) as error:  # zipfile and NumPy raise ValueError, OSError, NotImplementedError, zlib.error, …
        reason = " ".join(str(error).split())
        if "pickle" in reason:
            reason = pickle_advice(path)
        raise ArgumentError(argument, f"{path} cannot be read as an npz file ({reason})") from error
    return found


def _meaning(name: str) -> tuple[str | None, str]:
    """Return what an array is ("x", "y", "split" or None) and of which part, by its name."""
    words = name.casefold().replace("-", "_")
    for kind, names in (("x", _X), ("y", _Y), ("split", _SPLIT)):
        if words in names:
            return kind, ""
        for each in names:
            for before, after in ((f"{each}_", ""), ("", f"_{each}")):
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
            f"{path}: x has type {x.dtype}; it must be uint8 (0 to 255), by x.astype('uint8'), or floating "
            "point",
        )
    if x.ndim == 4 and x.shape[-1] not in (1, 3) and x.shape[1] in (1, 3):
        raise ArgumentError(
            argument, f"{path}: x has shape {x.shape}; channels come last, by x.transpose(0, 2, 3, 1)"
        )
    if (
        x.ndim >= 3
        and x.dtype.kind == "f"
        and x.size
        and float(np.nanmax(x)) > _LARGE
        and float(np.nanmin(x)) >= 0
    ):
        warnings.warn(
            f"{path}: x has values up to {float(np.nanmax(x)):g}; images in floating point are best in [0, "
            "1], and those of 0 to 255 as uint8",
            stacklevel=4,
        )
    return x[..., None] if x.ndim == 3 else x


def _labels(path: Path, argument: str, y: np.ndarray) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        more = ", of vectors with a single one by y.argmax(1)" if y.ndim == 2 else ""
        raise ArgumentError(
            argument, f"{path}: y has shape {y.shape}; it must be (n,), one label an example{more}"
        )
    y = decoded(path, argument, "y", y)
    if y.dtype.kind not in "iuU":
        raise ArgumentError(
            argument, f"{path}: y has type {y.dtype}; labels must be integers or names, by y.astype(int)"
        )
    labels = y.astype(str)
    if (labels == "").any():
        raise ArgumentError(argument, f"{path}: y[{int(np.argmax(labels == ''))}] is an empty name")
    return labels


def decoded(path: Path, argument: str, name: str, array: np.ndarray) -> np.ndarray:
    """Return an array with text for bytes.

    Raises:
      ArgumentError: bytes that are no UTF-8.
    """
    if array.dtype.kind != "S":
        return array
    try:
        return np.char.decode(array, "utf-8")
    except UnicodeDecodeError:
        raise ArgumentError(argument, f"{path}: {name} holds bytes that are no UTF-8") from None


def _parts(path: Path, argument: str, split: np.ndarray, n: int) -> np.ndarray:
    split = decoded(path, argument, "split", split)
    if split.shape != (n,) or split.dtype.kind != "U":
        raise ArgumentError(
            argument,
            f"{path}: split has shape {split.shape} and type {split.dtype}; it must be ({n},) names of parts",
        )
    names = split.astype(str)
    found = {name: part_of(name) for name in set(names.tolist())}
    wrong = sorted(name for name, part in found.items() if part is None)
    if wrong:
        row = int(np.argmax(names == wrong[0]))
        raise ArgumentError(
            argument, f"{path}: split[{row}] is {wrong[0]!r}; it must be 'train', 'val' or 'test'"
        )
    return np.array([found[name] for name in names.tolist()])
