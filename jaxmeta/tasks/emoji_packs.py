"""Iconify packs of emoji: JSON files of SVG drawings, read, named and rendered."""

import functools
import io
import itertools
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxmeta.checks import (
    ArgumentError,
    MissingFileError,
    MissingPackageError,
    join_names,
    parsed_json,
)
from jaxmeta.tasks.images import LeftOut

_ARCHIVES = (".tgz", ".tar.gz")
# Variants of a picture, and pictures that show a letter or a flag rather than a thing.
_LEFT_OUT = {
    "skin tone": re.compile(r"skin-tone|-tone\d$"),
    "flag": re.compile(r"^flag-"),
    "keycap or letter": re.compile(r"^keycap|^regional-indicator"),
}
# Skin tones as the Fluent packs name them. The ending alone proves nothing: traffic-light is a name.
_SHORT_TONE = re.compile(r"(.+?)((-light|-medium-light|-medium|-medium-dark|-dark)+)$")


class Pack(NamedTuple):
    """A pack of drawings.

    Attributes:
      name: name of the pack (its prefix), which is the name of the style.
      pictures: drawings by name.
      names: names of each drawing, its own and its aliases.
      licence: licence and author.
      left_out: names of drawings that are not used, by reason.
    """

    name: str
    pictures: Mapping[str, "Picture"]
    names: Mapping[str, frozenset[str]]
    licence: str
    left_out: Mapping[str, Sequence[str]]


class Picture(NamedTuple):
    """A drawing.

    Attributes:
      svg: SVG of a square image.
      flips: whether it is flipped from left to right, and upside down.
      turns: number of quarter turns clockwise, after the flips.
    """

    svg: str
    flips: tuple[bool, bool]
    turns: int


def read_packs(data: Path, argument: str = "data") -> dict[str, Pack]:
    """Read all packs of a folder, by name.

    Args:
      data: folder with packs, directly or in a folder `emoji`: archives `*.tgz` of npm, folders with
        icons.json, or files NAME.json.
      argument: name of the caller's argument, for the messages.

    Raises:
      FileNotFoundError: `data` is not a folder, or has no packs.
      ArgumentError: a pack is damaged, or two packs have the same name.
    """
    if not data.is_dir():
        raise MissingFileError(argument, f"{data} is not a folder")
    for folder in (data, data / "emoji"):
        sources = _sources(folder) if folder.is_dir() else []
        found = [(path, _read(path, *_stamp(path), argument)) for path in sources]
        packs = [(path, pack) for path, pack in found if pack is not None]
        if packs:
            break
    else:
        raise MissingFileError(
            argument,
            f"{data} must contain packs of Iconify, directly or in a folder emoji: archives such as "
            "iconify-json-noto-1.2.9.tgz (npm pack @iconify-json/noto), or folders with icons.json",
        )
    by_name: dict[str, Path] = {}
    for path, pack in packs:
        if pack.name in by_name:
            raise ArgumentError(
                argument,
                f"{by_name[pack.name]} and {path} are both the pack {pack.name!r}; keep one of them",
            )
        by_name[pack.name] = path
    return {pack.name: pack for _, pack in sorted(packs, key=lambda each: each[1].name)}


def classes_of_packs(packs: Sequence[Pack]) -> dict[str, dict[str, str]]:
    """Return the classes of pictures that packs share: the picture's name by class and pack.

    Two names that a pack gives to one picture are joined into one class, unless another pack has a different
    picture for each; pairs that most packs join come first. A picture whose names end up in different classes
    belongs to the class of its main name, not to those of its aliases: "cricket" is an insect, though older
    packs have it as an alias of "cricket-game". A class is called by the name that most packs have, or by the
    shortest of these.
    """
    pictures_of: dict[str, dict[str, str]] = defaultdict(dict)  # name -> pack -> picture
    votes: Counter[tuple[str, str]] = Counter()
    for pack in packs:
        for picture, names in pack.names.items():
            votes.update(itertools.combinations(sorted(names), 2))
            for name in names:
                pictures_of[name][pack.name] = picture
    # Classes under construction: their names, and their pictures by pack.
    group = {name: name for name in pictures_of}
    names_of = {name: [name] for name in pictures_of}
    merged = {name: dict(pictures) for name, pictures in pictures_of.items()}
    for (first, second), _ in sorted(votes.items(), key=lambda vote: (-vote[1], vote[0])):
        a, b = sorted((group[first], group[second]))
        if a != b and all(merged[a].get(pack, picture) == picture for pack, picture in merged[b].items()):
            merged[a] |= merged.pop(b)
            names_of[a] += names_of[b]
            for name in names_of.pop(b):
                group[name] = a
    members: dict[str, dict[str, str]] = defaultdict(dict)
    known: dict[str, Counter[str]] = defaultdict(Counter)
    for pack in packs:
        for picture, names in pack.names.items():
            root = group[picture]
            members[root][pack.name] = picture
            known[root].update(names & set(names_of[root]))

    def title(root: str) -> str:
        return min(known[root], key=lambda name: (-known[root][name], len(name), name))

    return dict(sorted((title(root), pictures) for root, pictures in members.items()))


def render(
    pack: str, name: str, picture: Picture, size: int, argument: str = "data"
) -> UInt8[np.ndarray, "size size 3"]:
    """Render a picture over white as `(size, size, 3)` uint8.

    Raises:
      ArgumentError: the SVG is invalid, or nothing of it is visible; the message names pack and picture.
      MissingPackageError: resvg-py is not installed.
    """
    resvg = _resvg()
    from PIL import Image

    try:
        # Without system fonts the result is the same on all machines.
        png = resvg.svg_to_bytes(
            svg_string=picture.svg, background="white", width=size, height=size, skip_system_fonts=True
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the renderer is not an Exception
        raise ArgumentError(
            argument, f"the picture {name!r} of the pack {pack!r} cannot be rendered: {error}"
        ) from error
    image = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
    if image.min() > 250:
        raise ArgumentError(
            argument,
            f"the picture {name!r} of the pack {pack!r} is blank: nothing of it is visible over white",
        )
    across, down = picture.flips
    image = image[:: -1 if down else 1, :: -1 if across else 1]
    return np.ascontiguousarray(np.rot90(image, -picture.turns))


def _resvg() -> Any:
    try:
        import resvg_py
    except ImportError as error:
        raise MissingPackageError(
            f"rendering SVG needs resvg-py (pip install 'jaxmeta[emoji]'): {error}"
        ) from error
    return resvg_py


def _sources(folder: Path) -> list[Path]:
    """Return the files that may hold packs: archives, and JSON files of a folder and of its subfolders."""
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    files = [path for path in paths if path.is_file() and path.name.lower().endswith((*_ARCHIVES, ".json"))]
    for path in paths:
        inner = [path / "icons.json", path / "package" / "icons.json"]
        files += [file for file in inner if path.is_dir() and file.is_file()][:1]
    return files


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=32)
def _read(path: Path, size: int, time: int, argument: str) -> Pack | None:
    """Read a pack; None for files that hold something else. Size and time belong to the key of the cache."""
    del size, time
    info: Any = None
    if path.name.lower().endswith(_ARCHIVES):
        try:
            with tarfile.open(path) as archive:
                members = {
                    Path(each.name).name: each for each in archive.getmembers() if each.name.count("/") == 1
                }
                if "icons.json" not in members:
                    return None
                contents = {
                    name: file.read()
                    for name in ("icons.json", "info.json")
                    if name in members and (file := archive.extractfile(members[name])) is not None
                }
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise ArgumentError(
                argument, f"{path} is damaged or incomplete ({error}); download it again"
            ) from error
        text, info = contents["icons.json"], contents.get("info.json")
    else:
        text = path.read_bytes()
        beside = path.with_name("info.json")
        info = beside.read_bytes() if path.name == "icons.json" and beside.is_file() else None
    try:
        values = parsed_json(text.decode("utf-8"))
        about = None if info is None else parsed_json(info.decode("utf-8"))
    except ValueError as error:
        raise ArgumentError(argument, f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(values, dict) or "prefix" not in values or "icons" not in values:
        if path.suffix.lower() == ".json" and path.name != "icons.json":
            return None
        raise ArgumentError(argument, f"{path} is not a pack of Iconify, which has a prefix and icons")
    about = values.get("info") if about is None else about
    return _pack(path, values, about if isinstance(about, dict) else {}, argument)


def _pack(path: Path, values: Mapping[str, Any], about: Mapping[str, Any], argument: str) -> Pack:
    """Return the pack in the JSON of Iconify."""
    name, icons, aliases = str(values["prefix"]), values["icons"], values.get("aliases", {})
    if not isinstance(icons, dict) or not isinstance(aliases, dict) or not icons:
        raise ArgumentError(argument, f"{path}: the pack {name!r} has no icons")
    if not all(isinstance(alias, dict) for alias in aliases.values()):
        raise ArgumentError(argument, f"{path}: the pack {name!r} has aliases that are not objects")
    wrong = [
        key for key, icon in icons.items() if not isinstance(icon, dict) or not _is_svg(icon.get("body"))
    ]
    if wrong:
        raise ArgumentError(
            argument,
            f"{path}: the pack {name!r} has no SVG for {len(wrong)} of {len(icons)} icons: "
            + join_names(wrong),
        )
    by_picture: dict[tuple[str, tuple[bool, bool], int], set[str]] = defaultdict(set)
    for key in (*icons, *(key for key in aliases if key not in icons)):
        by_picture[_resolved(path, name, key, icons, aliases, argument)].add(key)
    spelled: dict[str, str] = {}
    for key in (*icons, *aliases):
        other = spelled.setdefault(_normalized(key), key)
        if other != key:
            raise ArgumentError(
                argument,
                f"{path}: the pack {name!r} has one name twice: {other!r}, {key!r}",
            )
    left_out: dict[str, list[str]] = defaultdict(list)
    pictures, names = {}, {}
    for (parent, flips, turns), keys in by_picture.items():
        normalized = frozenset(map(_normalized, keys))
        reason = "hidden icon" if icons[parent].get("hidden") else _reason(normalized, spelled)
        chosen = parent if parent in keys else min(keys)
        if reason:
            left_out[reason].append(f"{name}:{chosen}")
            continue
        key = _normalized(chosen)
        pictures[key] = Picture(_svg(icons[parent], values), flips, turns)
        names[key] = normalized
    licence, author = about.get("license"), about.get("author")
    parts = [licence.get("title") or licence.get("spdx")] if isinstance(licence, dict) else [licence]
    parts += [author.get("name")] if isinstance(author, dict) else [author]
    text = ", ".join(str(part) for part in parts if part) or "unknown licence"
    return Pack(name, pictures, names, text, left_out)


def _is_svg(body: Any) -> bool:
    return isinstance(body, str) and "<" in body


def _normalized(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")


def _resolved(
    path: Path, pack: str, key: str, icons: Mapping[str, Any], aliases: Mapping[str, Any], argument: str
) -> tuple[str, tuple[bool, bool], int]:
    """Return the icon that a name refers to, its flips and its quarter turns, as Iconify merges them."""
    across, down, turns, seen = False, False, 0, [key]
    while True:
        entry = icons.get(seen[-1], aliases.get(seen[-1]))
        across ^= bool(entry.get("hFlip", False))
        down ^= bool(entry.get("vFlip", False))
        turns += int(entry.get("rotate", 0))
        if seen[-1] in icons:
            # A flip both ways is a half turn.
            return (
                (seen[-1], (False, False), (turns + 2) % 4)
                if across and down
                else (seen[-1], (across, down), turns % 4)
            )
        parent = entry.get("parent")
        if parent in seen or not (parent in icons or isinstance(aliases.get(parent), dict)):
            raise ArgumentError(
                argument, f"{path}: the alias {key!r} of the pack {pack!r} refers to no icon: {parent!r}"
            )
        seen.append(parent)


def _reason(names: frozenset[str], present: Mapping[str, str]) -> str:
    """Return why a picture with these names is left out; "" if it is not."""
    for name in names:
        for reason, pattern in _LEFT_OUT.items():
            if pattern.search(name):
                return reason
        match = _SHORT_TONE.fullmatch(name)
        if match and all(match[1] + tone in present for tone in ("-light", "-medium", "-dark")):
            return "skin tone"
    return ""


def _svg(icon: Mapping[str, Any], pack: Mapping[str, Any]) -> str:
    """Return an SVG whose view is the smallest square around the icon, in its middle."""
    left, top, width, height = (
        float(icon.get(field, pack.get(field, default)))
        for field, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    side = max(width, height)
    view = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="100" '
        f'height="100" viewBox="{view}">{icon["body"]}</svg>'
    )


def left_out_of(packs: Sequence[Pack]) -> tuple[LeftOut, ...]:
    """Return the pictures of packs that are not used, by reason."""
    names: dict[str, list[str]] = defaultdict(list)
    for pack in packs:
        for reason, drawings in pack.left_out.items():
            names[reason] += drawings
    plurals = {reason: f"{reason}s" for reason in names} | {"keycap or letter": "keycaps and letters"}
    return tuple(
        itertools.chain.from_iterable(
            LeftOut.of(reason, plurals[reason], drawings) for reason, drawings in sorted(names.items())
        )
    )
