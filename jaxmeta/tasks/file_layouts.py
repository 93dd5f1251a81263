"""Which image files of a folder are of which class: every layout that people have, in one form.

A layout is a function from a folder to a `Listing`, or to None where the folder is laid out otherwise.
`list_images` tries them in turn.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from jaxmeta.checks import ArgumentError, MissingFileError, NotAFolderError, parsed_json, some
from jaxmeta.tasks.csv_files import read_csv, read_header
from jaxmeta.tasks.images import (
    IMAGE_FOLDERS,
    LeftOut,
    class_files,
    files_of_class,
    image_files,
    left_out_of,
    subfolders,
)
from jaxmeta.tasks.splits import PARTS, SplitName

# What folders, lists and cells call the parts.
_PART_NAMES: dict[str, SplitName] = {
    **dict.fromkeys(("train", "training", "base", "meta-train", "metatrain"), PARTS[0]),
    **dict.fromkeys(("val", "valid", "validation", "dev", "meta-val", "metaval"), PARTS[1]),
    **dict.fromkeys(("test", "testing", "novel", "meta-test", "metatest"), PARTS[2]),
}
# Headers of columns, the first that there is counts.
_FILE = (
    "filename",
    "file_name",
    "file",
    "image",
    "image_name",
    "img",
    "path",
    "filepath",
    "file_path",
    "image_path",
)
_LABEL = ("label", "labels", "class", "class_name", "classname", "category")
_SPLIT = ("split", "subset", "partition", "set")
# Where lists lie, and images that they name.
_LIST_FOLDERS = ("", "split", "splits")
_LISTS = (".csv", ".tsv")
_PICKLES = (".pkl", ".pickle", ".p")


class Listing(NamedTuple):
    """Image files by class.

    Attributes:
      folder: that all of them are in, and that their names are relative to.
      classes: files by class and part; the part is "" where the layout has none.
      layout: what the files were told apart by, in words.
      left_out: files that were not taken.
    """

    folder: Path
    classes: Mapping[str, Mapping[str, Sequence[Path]]]
    layout: str = "a folder a class"
    left_out: tuple[LeftOut, ...] = ()

    @classmethod
    def of_classes(cls, folder: Path, files: Mapping[str, Sequence[Path]]) -> "Listing":
        """Return the listing of files by class, without parts."""
        return cls(folder, {name: {"": paths} for name, paths in files.items()})

    def files_of(self, name: str) -> list[Path]:
        """Return the files of a class, those for training first."""
        return [file for part in ("", *PARTS) for file in self.classes[name].get(part, ())]

    def classes_of(self, part: str) -> set[str]:
        """Return the names of the classes that have images in a part."""
        return {name for name, files in self.classes.items() if files.get(part)}

    def parts(self) -> list[str]:
        """Return the parts that the layout has."""
        return [part for part in PARTS if self.classes_of(part)]


def list_images(path: Path, argument: str = "path", *, skip_missing: bool = False) -> Listing:
    """Return which image files of a folder are of which class.

    These layouts are known, and tried in this order:

    - lists named `train`, `val` and `test` (or base, val, novel), as csv files with columns such as
      `filename` and `label` or as JSON with `label_names`, `image_names` and `image_labels` or `class_names`
      and `class_roots`; beside the images, or in a folder `split` or `splits`. The images lie in the folder,
      in its folder `images`, or beside the list;
    - folders `train`, `val` and `test` with one subfolder a class in each;
    - one such list, with or without a column `split`, where there are no class folders;
    - one subfolder a class.

    Args:
      path: the folder, or one list.
      argument: that named it, for the messages.
      skip_missing: whether images that are listed and not there are left out.

    Raises:
      FileNotFoundError, NotADirectoryError: `path` does not exist, or is a file of another kind.
      ArgumentError: no layout fits; or a list has a row that cannot be used, which is named.
    """
    if not path.exists():
        raise MissingFileError(argument, f"{path} does not exist")
    # So that a row of a list is inside of the folder or not, however the folder was named.
    path = path.resolve()
    if not path.is_dir():
        if path.suffix.lower() in (*_LISTS, ".json"):
            # Lists that lie in a folder of their own name images beside that.
            folder = path.parent.parent if path.parent.name in _LIST_FOLDERS[1:] else path.parent
            reader = _Reader(folder, argument, skip_missing)
            return reader.listing({"": path}, f"the list {path.name}")
        raise NotAFolderError(argument, f"{path} is a file, not a folder of images{_other_file(path)}")
    found = list_parts(path, argument, skip_missing=skip_missing)
    if found is not None:
        return found
    if not subfolders(path):
        refuse_other_files(path, argument)
    files = class_files(path, argument)
    taken = (file for paths in files.values() for file in paths)
    return Listing.of_classes(path, files)._replace(left_out=tuple(left_out_of(path, path, taken)))


def list_parts(folder: Path, argument: str = "path", *, skip_missing: bool = False) -> Listing | None:
    """Return what `list_images` does of a folder with lists or parts; None of any other.

    Raises:
      ArgumentError: see `list_images`.
    """
    reader = _Reader(folder.resolve(), argument, skip_missing)
    for layout in (_named_lists, _part_folders, _single_list):
        found = layout(reader)
        if found is not None:
            return found
    return None


def part_of(name: str) -> SplitName | None:
    """Return the part that a folder, a file or a cell is named as, in any case; None for other names."""
    return _PART_NAMES.get(name.strip().casefold().replace("_", "-"))


def pickle_advice(path: Path) -> str:
    """Return how what is in a pickle can be read."""
    return (
        f"{path.name} is a pickle, which can run code as it is read, so that none is; if you trust who made "
        f"it, write its arrays as npz in Python: import numpy, pickle; d = pickle.load(open({path.name!r}, "
        "'rb')); numpy.savez('data.npz', x=…, y=…) with the images (n, h, w, c) as x and their labels as y, "
        "and name that file as arrays:data.npz (jm.tasks.from_npz has an example)"
    )


# --- Layouts ------------------------------------------------------------------------------------------------


def _named_lists(reader: "_Reader") -> Listing | None:
    """Lists that are named as parts."""
    for place in _LIST_FOLDERS:
        where = reader.folder / place
        if not where.is_dir():
            continue
        for suffixes in ((".csv", ".tsv"), (".json",)):
            lists: dict[str, Path] = {}
            for path in sorted(_visible_files(where, suffixes)):
                part = part_of(path.stem)
                if part is not None and (path.suffix.lower() != ".json" or _is_json_list(path)):
                    if part in lists:
                        raise ArgumentError(
                            reader.argument,
                            f"{lists[part]} and {path} both list images for {part}; leave one of them",
                        )
                    lists[part] = path
            if PARTS[0] not in lists or len(lists) < 2:
                continue
            # A table beside class folders may hold anything else than a list of images.
            if ".json" in suffixes or _is_csv_list(lists[PARTS[0]]) or not _has_class_folders(reader.folder):
                return reader.listing(lists, f"the lists {', '.join(_in_order(lists))}")
    return None


def _part_folders(reader: "_Reader") -> Listing | None:
    """Folders that are named as parts, each with one subfolder a class."""
    folder = reader.folder
    if not any(part_of(path.name) for path in subfolders(folder)):
        return None
    with_images = [path for path in subfolders(folder) if _holds_images(path)]
    if not with_images or not all(part_of(path.name) for path in with_images):
        return None
    found: dict[str, Path] = {}
    for path in with_images:
        part = str(part_of(path.name))
        inner = [each for each in subfolders(path) if files_of_class(each)]
        # A folder called images is not a class: its files have no labels.
        if not inner or (len(inner) == 1 and inner[0].name.casefold() in IMAGE_FOLDERS):
            return None
        if part in found:
            raise ArgumentError(
                reader.argument, f"{found[part]} and {path} are both for {part}; leave one of them"
            )
        found[part] = path
    classes: dict[str, dict[str, Sequence[Path]]] = {}
    left_out: list[LeftOut] = []
    for part, path in found.items():
        files = {each.name: files_of_class(each) for each in subfolders(path)}
        for name, paths in files.items():
            if paths:
                classes.setdefault(name, {})[part] = paths
        left_out += left_out_of(folder, path, (file for paths in files.values() for file in paths))
        left_out += LeftOut.of(
            "class folder without images",
            "class folders without images",
            (f"{path.name}/{name}" for name, paths in files.items() if not paths),
        )
    left_out += LeftOut.of(
        "image beside the folders", "images beside the folders", (path.name for path in image_files(folder))
    )
    said = f"folders {', '.join(_in_order(found))}, a folder a class in each"
    return _listing(folder, classes, said, left_out)


def _single_list(reader: "_Reader") -> Listing | None:
    """One list of all images, in a folder that has no class folders."""
    folder = reader.folder
    others = [path for path in subfolders(folder) if image_files(path)]
    if len(others) > 1 and not all(part_of(path.name) for path in others):
        return None
    lists = [
        path
        for place in _LIST_FOLDERS
        if (folder / place).is_dir()
        for path in sorted(_visible_files(folder / place, (*_LISTS, ".json")))
        if (_is_json_list(path) if path.suffix.lower() == ".json" else _is_csv_list(path))
    ]
    if len(lists) != 1:
        if lists:
            raise ArgumentError(
                reader.argument,
                f"{folder} has {len(lists)} lists of images ({some(path.name for path in lists)}); name one "
                "of them",
            )
        return None
    return reader.listing({"": lists[0]}, f"the list {lists[0].name}")


def _in_order(parts: Mapping[str, Path]) -> list[str]:
    return [parts[part].name for part in PARTS if part in parts]


def _listing(
    folder: Path,
    classes: Mapping[str, Mapping[str, Sequence[Path]]],
    layout: str,
    left_out: Sequence[LeftOut],
) -> Listing:
    """Return the listing, without parts where there is a single one."""
    found = Listing(folder, {name: classes[name] for name in sorted(classes)}, layout, tuple(left_out))
    if len(found.parts()) > 1:
        return found
    return found._replace(classes={name: {"": found.files_of(name)} for name in found.classes})


def _has_class_folders(folder: Path) -> bool:
    return any(
        files_of_class(path) for path in subfolders(folder) if path.name.casefold() not in IMAGE_FOLDERS
    )


def _holds_images(folder: Path, depth: int = 3) -> bool:
    """Return whether there are images in a folder, to a depth: links may lead round in a circle."""
    if image_files(folder):
        return True
    return depth > 0 and any(_holds_images(path, depth - 1) for path in subfolders(folder))


def _visible_files(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file():
            yield path


def _other_file(path: Path) -> str:
    """Return what to do with a file that was named in place of a folder of images."""
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        return f"; {pickle_advice(path)}"
    if suffix == ".npz":
        return f"; name arrays as arrays:{path.name}"
    if suffix == ".npy":
        return (
            "; write arrays and their labels by numpy.savez('data.npz', x=…, y=…), and name arrays:data.npz"
        )
    if suffix in (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".rar", ".7z"):
        return "; unpack it, and name the folder"
    return " nor a list of some (.csv, .json)"


def refuse_other_files(folder: Path, argument: str) -> None:
    """Refuse a folder that holds images in files of another kind, such as pickles.

    Raises:
      ArgumentError: it does; the message says how such files are read.
    """
    for suffixes, said in (
        (_PICKLES, "pickles"),
        ((".npz", ".npy"), "arrays"),
        ((".zip", ".tar", ".gz", ".tgz"), "archives"),
    ):
        files = sorted(_visible_files(folder, suffixes))
        if files and not image_files(folder):
            raise ArgumentError(argument, f"{folder} holds {said} and no images{_other_file(files[0])}")


# --- Lists --------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """One image of a list, as it stands there.

    Attributes:
      where: its place in the list, such as "line 7".
      file, label: as given.
      part: "" where the list does not say.
    """

    where: str
    file: str
    label: str
    part: str


class _Reader(NamedTuple):
    """Reads lists of the images of a folder.

    Attributes:
      folder: that no image may lie outside of.
      argument: that named it, for the messages.
      skip_missing: whether images that are not there are left out.
    """

    folder: Path
    argument: str
    skip_missing: bool

    def refuse(self, path: Path, problem: str) -> ArgumentError:
        return ArgumentError(self.argument, f"{path}{problem}")

    def listing(self, lists: Mapping[str, Path], layout: str) -> Listing:
        """Return what lists say, by part."""
        classes: dict[str, dict[str, list[Path]]] = {}
        seen: dict[Path, tuple[str, str, str]] = {}
        absent: list[str] = []
        twice: list[str] = []
        for part, path in lists.items():
            rows = list(self._rows(path))
            if not rows:
                raise self.refuse(path, " lists no images")
            find = _Finder(self, path)
            missing = []
            for row in rows:
                file = find(row)
                if file is None:
                    missing.append(f"{row.where}: {row.file!r}")
                    continue
                if file.is_dir():
                    raise self.refuse(path, f", {row.where}: {row.file!r} is a folder; it must be an image")
                entry = (row.label, row.part or part, f"{path.name}, {row.where}")
                before = seen.setdefault(file, entry)
                if before is not entry:
                    if before[:2] != entry[:2]:
                        raise self.refuse(
                            path,
                            f", {row.where}: {row.file!r} is of {_said(entry)}, and of {_said(before)} in "
                            f"{before[2]}; an image has one class and one part",
                        )
                    twice.append(f"{path.name}, {row.where}")
                    continue
                classes.setdefault(row.label, {}).setdefault(row.part or part, []).append(file)
            if len(missing) == len(rows) or (missing and not self.skip_missing):
                looked = ", ".join(dict.fromkeys(str(root.relative_to(self.folder)) for root in find.roots))
                raise self.refuse(
                    path,
                    f": {len(missing)} of the {len(rows)} images that it lists are not there (looked in "
                    f"{looked} of {self.folder}): {some(missing)}",
                )
            absent += [f"{path.name}, {each}" for each in missing]
        for parts in classes.values():
            for files in parts.values():
                files.sort()
        others = (
            file.relative_to(self.folder).as_posix()
            for parent in {file.parent for file in seen}
            for file in image_files(parent)
            if file not in seen
        )
        left_out = [
            *LeftOut.of("listed image that is not there", "listed images that are not there", absent),
            *LeftOut.of("row that is there twice", "rows that are there twice", twice),
            *LeftOut.of("image that no list names", "images that no list names", others),
        ]
        return _listing(self.folder, classes, layout, left_out)

    def _rows(self, path: Path) -> Iterator[_Row]:
        return self._json_rows(path) if path.suffix.lower() == ".json" else self._csv_rows(path)

    def _csv_rows(self, path: Path) -> Iterator[_Row]:
        header, rows = read_csv(path, self.argument, _known_columns)
        file_column, label_column = _column(header, _FILE), _column(header, _LABEL)
        if file_column is None or label_column is None:
            lacking = " and the ".join(
                what for what, place in (("file", file_column), ("label", label_column)) if place is None
            )
            raise self.refuse(
                path,
                f" has the columns {some(map(repr, header), 8)}, and none for the {lacking} of an image; "
                f"there must be one of {', '.join(_FILE)} and one of {', '.join(_LABEL)}",
            )
        split = _column(header, _SPLIT)
        for line, cells in rows:
            where, file, label = f"line {line}", cells[file_column], cells[label_column].strip()
            if not file.strip() or not label:
                raise self.refuse(path, f", {where}: the {'label' if file.strip() else 'file'} is empty")
            yield _Row(where, file, label, "" if split is None else self._part(path, where, cells[split]))

    def _part(self, path: Path, where: str, cell: str) -> str:
        part = part_of(cell)
        if part is None:
            raise self.refuse(
                path, f", {where}: got the split {cell.strip()!r}; it must be train, val or test"
            )
        return part

    def _json_rows(self, path: Path) -> Iterator[_Row]:
        values = _json(path)
        if not isinstance(values, dict):
            raise self.refuse(path, " is no list of images in JSON")
        names = values.get("label_names", values.get("class_names"))
        if names is not None and not _are_texts(names):
            raise self.refuse(path, ": the names of the classes must be a list of texts")
        roots, images = values.get("class_roots"), values.get("image_names")
        labels = values.get("image_labels")
        if images is None and roots is not None:
            yield from self._rooted(path, names, roots)
            return
        if not _are_texts(images) or not isinstance(labels, list):
            raise self.refuse(
                path,
                " must hold image_names, a list of files, and image_labels, or class_names and class_roots",
            )
        if len(images) != len(labels):
            raise self.refuse(path, f": got {len(images)} image_names and {len(labels)} image_labels")
        for place, (file, label) in enumerate(zip(images, labels, strict=True)):
            where = f"image_names[{place}]"
            if not file.strip():
                raise self.refuse(path, f", {where}: the file is empty")
            if isinstance(label, int) and not isinstance(label, bool):
                if names is not None:
                    if not 0 <= label < len(names):
                        raise self.refuse(
                            path, f", image_labels[{place}]: got {label}, and there are {len(names)} names"
                        )
                    label = names[label]
            elif not isinstance(label, str):
                raise self.refuse(
                    path, f", image_labels[{place}]: got {label!r}; it must be a number or a name"
                )
            if not str(label).strip():
                raise self.refuse(path, f", image_labels[{place}]: the label is empty")
            yield _Row(where, file, str(label).strip(), "")

    def _rooted(self, path: Path, names: Any, roots: Any) -> Iterator[_Row]:
        """Yield the images of the folders that a list names, one a class."""
        if not _are_texts(names) or not _are_texts(roots) or len(roots) != len(names):
            raise self.refuse(path, ": class_names and class_roots must be lists of texts of one length")
        find = _Finder(self, path)
        for place, (name, root) in enumerate(zip(names, roots, strict=True)):
            where = f"class_roots[{place}]"
            folder = find(_Row(where, root, name, ""))
            if folder is None or not folder.is_dir():
                raise self.refuse(path, f", {where}: there is no folder {root!r}")
            for file in image_files(folder):
                yield _Row(where, str(file), name, "")


class _Finder:
    """Finds the images of one list, none of which may lie outside of the folder."""

    def __init__(self, reader: _Reader, path: Path):
        self.reader, self.path = reader, path
        folder = reader.folder
        candidates = (folder / "images", folder, path.parent, folder / path.stem)
        self.roots = [root for root in dict.fromkeys(candidates) if root.is_dir()]
        # Leading parts of absolute paths that were written where the folder lay elsewhere.
        self.prefix: tuple[str, ...] | None = None

    def __call__(self, row: _Row) -> Path | None:
        """Return the file or folder that a row names; None where it is not there."""
        # A name may hold any character here, so it is first taken as it is.
        for text in dict.fromkeys((row.file, row.file.strip(), row.file.strip().replace("\\", "/"))):
            if "\0" in text:
                raise self._outside(row, "holds a zero byte")
            # Elsewhere than on Windows a backslash is part of a name.
            is_name = "\\" in text and not text.startswith("/")
            if (
                is_name
                and _is_absolute(text)
                and not any(os.path.lexists(root / text) for root in self.roots)
            ):
                continue
            find = self._relative if is_name or not _is_absolute(text) else self._absolute
            found = find(row, text)
            if found is not None:
                return found
        return None

    def _relative(self, row: _Row, text: str) -> Path | None:
        inside = False
        for root in self.roots:
            path = Path(os.path.normpath(root / text))
            if path.is_relative_to(self.reader.folder):
                inside = True
                # A broken link is there, and is an image that cannot be read.
                if os.path.lexists(path):
                    return path
        if not inside:
            raise self._outside(row, f"lies outside of {self.reader.folder}")
        return None

    def _absolute(self, row: _Row, text: str) -> Path | None:
        folder = self.reader.folder
        path = Path(os.path.normpath(text))
        if path.is_relative_to(folder):
            return path if os.path.lexists(path) else None
        steps = tuple(step for step in text.split("/") if step not in ("", "."))
        if ".." in steps:
            raise self._outside(row, f"lies outside of {folder}")
        if self.prefix is None:
            # One file name alone would fit too easily.
            for length in range(1, len(steps) - 1):
                if any(os.path.lexists(root.joinpath(*steps[length:])) for root in self.roots):
                    self.prefix = steps[:length]
                    break
        if self.prefix is None or steps[: len(self.prefix)] != self.prefix:
            raise self._outside(row, f"lies outside of {folder}, and no folder and file in it are named so")
        return self._relative(row, "/".join(steps[len(self.prefix) :]))

    def _outside(self, row: _Row, problem: str) -> ArgumentError:
        return self.reader.refuse(
            self.path, f", {row.where}: {row.file!r} {problem}; only what is in it is read"
        )


def _said(entry: tuple[str, str, str]) -> str:
    label, part, _ = entry
    return f"the class {label!r}" + (f" in {part}" if part else "")


def _is_absolute(text: str) -> bool:
    return text.startswith("/") or bool(re.match(r"[A-Za-z]:[/\\]", text)) or text.startswith("\\\\")


def _column(header: Sequence[str], known: Iterable[str]) -> int | None:
    names = [name.casefold().replace(" ", "_") for name in header]
    return next((names.index(name) for name in known if name in names), None)


def _known_columns(header: Sequence[str]) -> int:
    return (_column(header, _FILE) is not None) + (_column(header, _LABEL) is not None)


def _is_csv_list(path: Path) -> bool:
    """Return whether a file's first line names columns of files and labels."""
    return _known_columns(read_header(path, _known_columns)) == 2


def _json(path: Path) -> Any:
    try:
        return parsed_json(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return None


def _is_json_list(path: Path) -> bool:
    values = _json(path)
    return isinstance(values, dict) and ("image_names" in values or "class_roots" in values)


def _are_texts(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and all(isinstance(each, str) for each in values)
