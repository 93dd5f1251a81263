"""Layouts of image folders: class folders, folders of parts, and lists in csv or JSON.

A layout is a function from a folder to a `Listing`, or to None where the folder has another layout.
`list_images` tries them in turn.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from jaxmeta.checks import (
    ArgumentError,
    MissingFileError,
    NotAFolderError,
    format_value,
    join_names,
    parsed_json,
)
from jaxmeta.tasks.csv_files import read_csv, read_header
from jaxmeta.tasks.images import (
    IMAGE_FOLDERS,
    LeftOut,
    class_files,
    files_of_class,
    image_files,
    is_image_name,
    left_out_of,
    subfolders,
    walk_files,
)
from jaxmeta.tasks.splits import PARTS, SplitName

# Names of the parts in folders, lists and cells.
_PART_NAMES: dict[str, SplitName] = {
    **dict.fromkeys(("train", "training", "base", "meta-train", "metatrain"), PARTS[0]),
    **dict.fromkeys(("val", "valid", "validation", "dev", "meta-val", "metaval"), PARTS[1]),
    **dict.fromkeys(("test", "testing", "novel", "meta-test", "metatest"), PARTS[2]),
}
# Column headers in order of precedence.
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
# Folders that may contain lists.
_LIST_FOLDERS = ("", "split", "splits")
_LISTS = (".csv", ".tsv")
_PICKLES = (".pkl", ".pickle", ".p")


class Listing(NamedTuple):
    """Image files by class.

    Attributes:
      folder: folder that contains all files; names in messages are relative to it.
      classes: files by class and part; the part is "" where the layout has no parts.
      layout: description of the layout.
      left_out: files that were skipped.
      domains: domain of each file; empty without domains.
    """

    folder: Path
    classes: Mapping[str, Mapping[str, Sequence[Path]]]
    layout: str = "one folder per class"
    left_out: tuple[LeftOut, ...] = ()
    domains: Mapping[Path, str] = {}

    @classmethod
    def of_classes(cls, folder: Path, files: Mapping[str, Sequence[Path]]) -> "Listing":
        """Build a listing without parts from files by class."""
        return cls(folder, {name: {"": paths} for name, paths in files.items()})

    def files_of(self, name: str) -> list[Path]:
        """Return the files of a class in the order train, validation, test."""
        return [file for part in ("", *PARTS) for file in self.classes[name].get(part, ())]

    def classes_of(self, part: str) -> set[str]:
        """Return the names of the classes that have images in a part."""
        return {name for name, files in self.classes.items() if files.get(part)}

    def parts(self) -> list[str]:
        """Return the parts that have images."""
        return [part for part in PARTS if self.classes_of(part)]


def list_images(path: Path, argument: str = "path", *, skip_missing: bool = False) -> Listing:
    """Return the image files of a folder by class and part.

    The supported layouts are tried in this order:

    - lists named `train`, `val` and `test` (or base, val, novel), as csv files with columns such as
      `filename` and `label`, or as JSON with `label_names`, `image_names` and `image_labels` or with
      `class_names` and `class_roots`; in the folder itself, or in its subfolder `split` or `splits`. File
      names are relative to the folder, to its subfolder `images`, or to the folder of the list;
    - folders `train`, `val` and `test`, each with one subfolder per class;
    - one such list, with or without a column `split`, if there are no class folders;
    - one subfolder per class.

    Args:
      path: path of the folder, or of one list.
      argument: name of the caller's argument, for the messages.
      skip_missing: whether to skip listed images that do not exist.

    Raises:
      FileNotFoundError, NotADirectoryError: `path` does not exist, or is another kind of file.
      ArgumentError: no layout matches; or a list has an invalid row, which the message names.
    """
    if not path.exists():
        raise MissingFileError(argument, f"{path} does not exist")
    # Resolved, so that the check that a listed file lies inside of the folder is reliable.
    path = path.resolve()
    if not path.is_dir():
        if path.suffix.lower() in (*_LISTS, ".json"):
            # Images listed in split/train.csv lie next to the folder split.
            folder = path.parent.parent if path.parent.name in _LIST_FOLDERS[1:] else path.parent
            reader = _Reader(folder, argument, skip_missing)
            return reader.listing({"": path}, f"the list {path.name}")
        raise NotAFolderError(argument, f"{path} is a file, not a folder of images{_other_file(path)}")
    listing = list_parts(path, argument, skip_missing=skip_missing)
    if listing is not None:
        return listing
    if not subfolders(path):
        refuse_other_files(path, argument)
    files = class_files(path, argument)
    taken = (file for paths in files.values() for file in paths)
    return Listing.of_classes(path, files)._replace(left_out=tuple(left_out_of(path, path, taken)))


def list_with_domains(
    path: Path, domains: str, argument: str = "path", *, skip_missing: bool = False
) -> Listing:
    """Return the image files of a folder by class, with the domain of each.

    Args:
      path: see `list_images`.
      domains: "class/domain", a folder per class with a subfolder per domain; "domain/class", a folder per
        domain with a subfolder per class; or a regular expression with one group, the domain, that matches at
        the start of every file name, in any layout of `list_images`.
      argument: see `list_images`.
      skip_missing: see `list_images`.

    Raises:
      FileNotFoundError, NotADirectoryError: `path` does not exist, or is another kind of file.
      ArgumentError: the folder has another layout, or a file name does not match; see also `list_images`.
    """
    if domains in _DOMAIN_FOLDERS:
        return _domain_folders(path, domains, argument)
    try:
        pattern = re.compile(domains)
    except (re.error, TypeError) as error:
        raise ArgumentError(
            "domains",
            f"got {format_value(domains)}, which is not a regular expression ({error}); {_DOMAIN_CHOICES}",
        ) from None
    if pattern.groups != 1:
        raise ArgumentError(
            "domains",
            f"got {format_value(domains)}, a regular expression with {pattern.groups} groups; "
            f"{_DOMAIN_CHOICES}",
        )
    listing = list_images(path, argument, skip_missing=skip_missing)
    matches = {file: pattern.match(file.name) for name in listing.classes for file in listing.files_of(name)}
    domain_of = {file: match[1] for file, match in matches.items() if match and match[1]}
    wrong = next((file for file in matches if file not in domain_of), None)
    if wrong is not None:
        raise ArgumentError(
            "domains",
            f"got {domains!r}, which gives no domain for {len(matches) - len(domain_of)} of {len(matches)} "
            f"file names, such as {wrong.name!r} (in {wrong.parent.name!r}); it must match at the start of "
            "every name",
        )
    return listing._replace(domains=domain_of)


_DOMAIN_FOLDERS = ("class/domain", "domain/class")
_DOMAIN_CHOICES = (
    "it must be 'class/domain', 'domain/class', or a regular expression with one group that matches at the "
    "start of file names, such as '([a-z]+)_'"
)


def _domain_folders(path: Path, domains: str, argument: str) -> Listing:
    """Return the listing of folders of two levels, classes and domains."""
    if not path.exists():
        raise MissingFileError(argument, f"{path} does not exist")
    if not path.is_dir():
        raise NotAFolderError(
            argument, f"{path} is a file; domains={domains!r} needs a folder with folders {domains}"
        )
    folder = path.resolve()
    classes: dict[str, list[Path]] = {}
    domain_of: dict[Path, str] = {}
    for outer in subfolders(folder):
        for inner in subfolders(outer):
            files = files_of_class(inner)
            names = (outer.name, inner.name) if domains == "class/domain" else (inner.name, outer.name)
            if files:
                classes.setdefault(names[0], []).extend(files)
                domain_of |= dict.fromkeys(files, names[1])
    others = [file for file in map(Path, walk_files(str(folder))) if file not in domain_of]
    images = [file.relative_to(folder).as_posix() for file in others if is_image_name(file.name)]
    if not domain_of:
        raise ArgumentError(
            "domains",
            f"got {domains!r}, but {folder} has no images in folders of this form"
            + (f"; it has {min(images)!r}, for example" if images else "")
            + f"; {_DOMAIN_CHOICES}",
        )
    left_out = (
        *LeftOut.of(f"image outside the folders {domains}", f"images outside the folders {domains}", images),
        *LeftOut.of(
            "file that is not an image",
            "files that are not images",
            (file.relative_to(folder).as_posix() for file in others if not is_image_name(file.name)),
        ),
    )
    listing = Listing.of_classes(folder, {name: classes[name] for name in sorted(classes)})
    return listing._replace(layout=f"folders {domains}", left_out=left_out, domains=domain_of)


def list_parts(folder: Path, argument: str = "path", *, skip_missing: bool = False) -> Listing | None:
    """Return the listing of a folder with lists or parts; None for other layouts. See `list_images`.

    Raises:
      ArgumentError: see `list_images`.
    """
    reader = _Reader(folder.resolve(), argument, skip_missing)
    for layout in (_named_lists, _part_folders, _single_list):
        listing = layout(reader)
        if listing is not None:
            return listing
    return None


def part_of(name: str) -> SplitName | None:
    """Return the part named by a folder, file or cell, in any case; None for other names."""
    return _PART_NAMES.get(name.strip().casefold().replace("_", "-"))


def pickle_advice(path: Path) -> str:
    """Return instructions for converting a pickle, for error messages."""
    return (
        f"{path.name} is a pickle; pickles are not read, since loading one can run code. If you trust its "
        f"source, convert it in Python: import numpy, pickle; d = pickle.load(open({path.name!r}, 'rb')); "
        "numpy.savez('data.npz', x=…, y=…) with the images (n, h, w, c) as x and their labels as y; then use "
        "arrays:data.npz (jm.tasks.from_npz has an example)"
    )


# --- Layouts ------------------------------------------------------------------------------------------------


def _named_lists(reader: "_Reader") -> Listing | None:
    """Match lists named after parts."""
    for subfolder in _LIST_FOLDERS:
        where = reader.folder / subfolder
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
                            f"{lists[part]} and {path} both list images for {part}; keep one of them",
                        )
                    lists[part] = path
            if PARTS[0] not in lists or len(lists) < 2:
                continue
            # A csv file next to class folders need not be a list of images.
            if ".json" in suffixes or _is_csv_list(lists[PARTS[0]]) or not _has_class_folders(reader.folder):
                return reader.listing(lists, f"the lists {', '.join(_in_order(lists))}")
    return None


def _part_folders(reader: "_Reader") -> Listing | None:
    """Match folders named after parts, each with one subfolder per class."""
    folder = reader.folder
    if not any(part_of(path.name) for path in subfolders(folder)):
        return None
    with_images = [path for path in subfolders(folder) if _holds_images(path)]
    if not with_images or not all(part_of(path.name) for path in with_images):
        return None
    folder_of: dict[str, Path] = {}
    for path in with_images:
        part = str(part_of(path.name))
        inner = [subfolder for subfolder in subfolders(path) if files_of_class(subfolder)]
        # A folder named images is not a class: its files have no labels.
        if not inner or (len(inner) == 1 and inner[0].name.casefold() in IMAGE_FOLDERS):
            return None
        if part in folder_of:
            raise ArgumentError(
                reader.argument, f"{folder_of[part]} and {path} are both for {part}; keep one of them"
            )
        folder_of[part] = path
    classes: dict[str, dict[str, Sequence[Path]]] = {}
    left_out: list[LeftOut] = []
    for part, path in folder_of.items():
        files = {subfolder.name: files_of_class(subfolder) for subfolder in subfolders(path)}
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
        "image outside the folders", "images outside the folders", (path.name for path in image_files(folder))
    )
    layout = f"folders {', '.join(_in_order(folder_of))}, each with one folder per class"
    return _listing(folder, classes, layout, left_out)


def _single_list(reader: "_Reader") -> Listing | None:
    """Match a single list of all images, in a folder without class folders."""
    folder = reader.folder
    others = [path for path in subfolders(folder) if image_files(path)]
    if len(others) > 1 and not all(part_of(path.name) for path in others):
        return None
    lists = [
        path
        for subfolder in _LIST_FOLDERS
        if (folder / subfolder).is_dir()
        for path in sorted(_visible_files(folder / subfolder, (*_LISTS, ".json")))
        if (_is_json_list(path) if path.suffix.lower() == ".json" else _is_csv_list(path))
    ]
    if len(lists) != 1:
        if lists:
            raise ArgumentError(
                reader.argument,
                f"{folder} has {len(lists)} lists of images "
                f"({join_names(path.name for path in lists)}); give the path of one",
            )
        return None
    return reader.listing({"": lists[0]}, f"the list {lists[0].name}")


def _in_order(parts: Mapping[str, Path]) -> list[str]:
    """Return the file names of parts in the order train, validation, test."""
    return [parts[part].name for part in PARTS if part in parts]


def _listing(
    folder: Path,
    classes: Mapping[str, Mapping[str, Sequence[Path]]],
    layout: str,
    left_out: Sequence[LeftOut],
) -> Listing:
    """Build the listing; a single part counts as no part."""
    listing = Listing(folder, {name: classes[name] for name in sorted(classes)}, layout, tuple(left_out))
    if len(listing.parts()) > 1:
        return listing
    return listing._replace(classes={name: {"": listing.files_of(name)} for name in listing.classes})


def _has_class_folders(folder: Path) -> bool:
    return any(
        files_of_class(path) for path in subfolders(folder) if path.name.casefold() not in IMAGE_FOLDERS
    )


def _holds_images(folder: Path, depth: int = 3) -> bool:
    """Return whether a folder holds images down to `depth`, which is bounded since links may form cycles."""
    if image_files(folder):
        return True
    return depth > 0 and any(_holds_images(path, depth - 1) for path in subfolders(folder))


def _visible_files(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file():
            yield path


def _other_file(path: Path) -> str:
    """Return the end of an error message: what to do with a file given instead of a folder of images."""
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        return f"; {pickle_advice(path)}"
    if suffix == ".npz":
        return f"; use arrays:{path.name}"
    if suffix == ".npy":
        return "; write arrays and labels with numpy.savez('data.npz', x=…, y=…), and use arrays:data.npz"
    if suffix in (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".rar", ".7z"):
        return "; unpack it, and give the folder"
    return " or a list of images (.csv, .json)"


def refuse_other_files(folder: Path, argument: str) -> None:
    """Refuse a folder that holds data in another format, such as pickles, and no images.

    Raises:
      ArgumentError: the folder holds such files; the message says how to use them.
    """
    for suffixes, kind in (
        (_PICKLES, "pickles"),
        ((".npz", ".npy"), "arrays"),
        ((".zip", ".tar", ".gz", ".tgz"), "archives"),
    ):
        files = sorted(_visible_files(folder, suffixes))
        if files and not image_files(folder):
            raise ArgumentError(argument, f"{folder} holds {kind} and no images{_other_file(files[0])}")


# --- Lists --------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """One row of a list of images.

    Attributes:
      where: position in the list, such as "line 7".
      file, label: cells of the row.
      part: part of the image; "" where the list has no parts.
    """

    where: str
    file: str
    label: str
    part: str


class _Reader(NamedTuple):
    """A reader of lists of images.

    Attributes:
      folder: folder that must contain all listed images.
      argument: name of the caller's argument, for the messages.
      skip_missing: whether to skip listed images that do not exist.
    """

    folder: Path
    argument: str
    skip_missing: bool

    def error(self, path: Path, problem: str) -> ArgumentError:
        """Return the error for a problem with the list at `path`."""
        return ArgumentError(self.argument, f"{path}{problem}")

    def listing(self, lists: Mapping[str, Path], layout: str) -> Listing:
        """Return the listing of the lists, which are given by part."""
        classes: dict[str, dict[str, list[Path]]] = {}
        seen: dict[Path, tuple[str, str, str]] = {}
        absent: list[str] = []
        duplicates: list[str] = []
        for part, path in lists.items():
            rows = list(self._rows(path))
            if not rows:
                raise self.error(path, " lists no images")
            find = _Finder(self, path)
            missing = []
            for row in rows:
                file = find(row)
                if file is None:
                    missing.append(f"{row.where}: {row.file!r}")
                    continue
                if file.is_dir():
                    raise self.error(
                        path, f", {row.where}: {row.file!r} is a folder; it must be an image file"
                    )
                entry = (row.label, row.part or part, f"{path.name}, {row.where}")
                before = seen.setdefault(file, entry)
                if before is not entry:
                    if before[:2] != entry[:2]:
                        raise self.error(
                            path,
                            f", {row.where}: {row.file!r} has {_describe(entry)}, but {_describe(before)} in "
                            f"{before[2]}; an image must have one class and one part",
                        )
                    duplicates.append(f"{path.name}, {row.where}")
                    continue
                classes.setdefault(row.label, {}).setdefault(row.part or part, []).append(file)
            if len(missing) == len(rows) or (missing and not self.skip_missing):
                searched = ", ".join(dict.fromkeys(str(root.relative_to(self.folder)) for root in find.roots))
                raise self.error(
                    path,
                    f": {len(missing)} of {len(rows)} listed images do not exist (searched in {searched} of "
                    f"{self.folder}): {join_names(missing)}",
                )
            absent += [f"{path.name}, {row}" for row in missing]
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
            *LeftOut.of("listed image that does not exist", "listed images that do not exist", absent),
            *LeftOut.of("duplicate row", "duplicate rows", duplicates),
            *LeftOut.of("image that is not listed", "images that are not listed", others),
        ]
        return _listing(self.folder, classes, layout, left_out)

    def _rows(self, path: Path) -> Iterator[_Row]:
        return self._json_rows(path) if path.suffix.lower() == ".json" else self._csv_rows(path)

    def _csv_rows(self, path: Path) -> Iterator[_Row]:
        header, rows = read_csv(path, self.argument, _known_columns)
        file_column, label_column = _column(header, _FILE), _column(header, _LABEL)
        if file_column is None or label_column is None:
            missing = " and the ".join(
                name for name, column in (("file", file_column), ("label", label_column)) if column is None
            )
            raise self.error(
                path,
                f" has the columns {join_names(map(repr, header), 8)} and no column for the {missing} of an "
                f"image; it needs one of {', '.join(_FILE)} and one of {', '.join(_LABEL)}",
            )
        split = _column(header, _SPLIT)
        for line, cells in rows:
            where, file, label = f"line {line}", cells[file_column], cells[label_column].strip()
            if not file.strip() or not label:
                raise self.error(path, f", {where}: the {'label' if file.strip() else 'file'} is empty")
            yield _Row(where, file, label, "" if split is None else self._part(path, where, cells[split]))

    def _part(self, path: Path, where: str, cell: str) -> str:
        part = part_of(cell)
        if part is None:
            raise self.error(
                path, f", {where}: got the split {cell.strip()!r}; it must be train, val or test"
            )
        return part

    def _json_rows(self, path: Path) -> Iterator[_Row]:
        values = _json(path)
        if not isinstance(values, dict):
            raise self.error(path, " is not a list of images in JSON")
        names = values.get("label_names", values.get("class_names"))
        if names is not None and not _are_strings(names):
            raise self.error(path, ": the class names must be a list of strings")
        roots, images = values.get("class_roots"), values.get("image_names")
        labels = values.get("image_labels")
        if images is None and roots is not None:
            yield from self._rooted(path, names, roots)
            return
        if not _are_strings(images) or not isinstance(labels, list):
            raise self.error(
                path,
                " must hold image_names, a list of files, and image_labels, or class_names and class_roots",
            )
        if len(images) != len(labels):
            raise self.error(
                path,
                f": got {len(images)} image_names and {len(labels)} image_labels; each image needs a label",
            )
        for index, (file, label) in enumerate(zip(images, labels, strict=True)):
            where = f"image_names[{index}]"
            if not file.strip():
                raise self.error(path, f", {where}: the file is empty")
            if isinstance(label, int) and not isinstance(label, bool):
                if names is not None:
                    if not 0 <= label < len(names):
                        raise self.error(
                            path,
                            f", image_labels[{index}]: got {label}; it must be below {len(names)}",
                        )
                    label = names[label]
            elif not isinstance(label, str):
                raise self.error(
                    path, f", image_labels[{index}]: got {label!r}; it must be a number or a name"
                )
            if not str(label).strip():
                raise self.error(path, f", image_labels[{index}]: the label is empty")
            yield _Row(where, file, str(label).strip(), "")

    def _rooted(self, path: Path, names: Any, roots: Any) -> Iterator[_Row]:
        """Yield the images of the listed folders, one per class."""
        if not _are_strings(names) or not _are_strings(roots) or len(roots) != len(names):
            raise self.error(path, ": class_names and class_roots must be lists of strings, of equal length")
        find = _Finder(self, path)
        for index, (name, root) in enumerate(zip(names, roots, strict=True)):
            where = f"class_roots[{index}]"
            folder = find(_Row(where, root, name, ""))
            if folder is None or not folder.is_dir():
                raise self.error(path, f", {where}: {root!r} is not a folder")
            for file in image_files(folder):
                yield _Row(where, str(file), name, "")


class _Finder:
    """A function that finds the file of a row and refuses files outside of the folder."""

    def __init__(self, reader: _Reader, path: Path):
        self.reader, self.path = reader, path
        folder = reader.folder
        candidates = (folder / "images", folder, path.parent, folder / path.stem)
        self.roots = [root for root in dict.fromkeys(candidates) if root.is_dir()]
        # Prefix to strip from absolute paths that were written on another machine.
        self.prefix: tuple[str, ...] | None = None

    def __call__(self, row: _Row) -> Path | None:
        """Return the file or folder named by a row; None if it does not exist."""
        # Blanks and backslashes can be part of a file name, so the name is tried unchanged first.
        for text in dict.fromkeys((row.file, row.file.strip(), row.file.strip().replace("\\", "/"))):
            if "\0" in text:
                raise self._error(row, "contains a zero byte; a file name cannot contain one")
            # On systems other than Windows, a backslash is part of the name.
            is_name = "\\" in text and not text.startswith("/")
            if (
                is_name
                and _is_absolute(text)
                and not any(os.path.lexists(root / text) for root in self.roots)
            ):
                continue
            find = self._relative if is_name or not _is_absolute(text) else self._absolute
            path = find(row, text)
            if path is not None:
                return path
        return None

    def _relative(self, row: _Row, text: str) -> Path | None:
        inside = False
        for root in self.roots:
            path = Path(os.path.normpath(root / text))
            if path.is_relative_to(self.reader.folder):
                inside = True
                # A broken link exists: it is an image that cannot be read.
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
        names = tuple(name for name in text.split("/") if name not in ("", "."))
        if ".." in names:
            raise self._outside(row, f"lies outside of {folder}")
        if self.prefix is None:
            # At least a folder and a file name must match: a file name alone would match too easily.
            for length in range(1, len(names) - 1):
                if any(os.path.lexists(root.joinpath(*names[length:])) for root in self.roots):
                    self.prefix = names[:length]
                    break
        if self.prefix is None or names[: len(self.prefix)] != self.prefix:
            raise self._outside(
                row, f"lies outside of {folder}, and no file in it has the same folder and name"
            )
        return self._relative(row, "/".join(names[len(self.prefix) :]))

    def _outside(self, row: _Row, problem: str) -> ArgumentError:
        return self._error(row, f"{problem}; only files in it are read")

    def _error(self, row: _Row, problem: str) -> ArgumentError:
        return self.reader.error(self.path, f", {row.where}: {row.file!r} {problem}")


def _describe(entry: tuple[str, str, str]) -> str:
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
    """Return whether the header of a file has columns for files and labels."""
    return _known_columns(read_header(path, _known_columns)) == 2


def _json(path: Path) -> Any:
    try:
        return parsed_json(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return None


def _is_json_list(path: Path) -> bool:
    values = _json(path)
    return isinstance(values, dict) and ("image_names" in values or "class_roots" in values)


def _are_strings(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
