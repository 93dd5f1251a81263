"""Omniglot's two archives: read, verified, stored as tensorflow-datasets records, decoded to an array.

The chain is archives -> ArrayRecord files (see `records`) -> one uint8 array. Containers may be
rewritten, so what is verified is the content: names, counts, and a digest over every pixel.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Bool, Float, UInt8

from jaxmeta.checks import MissingFileError
from jaxmeta.files import replacing
from jaxmeta.tasks.cache import cache_folder, make_room
from jaxmeta.tasks.records import (
    DATA_SET,
    PARTS,
    SIDE,
    SOURCE,
    Examples,
    download,
    read_records,
    write_records,
)

DRAWERS = 20
_LARGEST_MEMBER = 1 << 20


@dataclasses.dataclass(frozen=True)
class Edition:
    """What the archives must hold.

    Attributes:
      characters: of each part, "Alphabet/characterNN", sorted.
      digest: SHA-256 of the content, see `content_digest`.
      md5: of the two official archives, checked after a download.
    """

    characters: Mapping[str, tuple[str, ...]]
    digest: str
    md5: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """All characters, background before evaluation: the order of the array."""
        return tuple(name for part in PARTS for name in self.characters[part])


def content_digest(names: tuple[str, ...], ink: Bool[np.ndarray, "*n side side"]) -> str:
    """SHA-256 (hex) over the names of the characters and every drawing's pixels, in that order."""
    digest = hashlib.sha256("\n".join(names).encode())
    digest.update(np.packbits(ink).tobytes())
    return digest.hexdigest()


def find_archives(data: Path) -> dict[str, Path]:
    """The two archives in `data`, or the two folders they unpack to; else those in its folder `omniglot`.

    Raises:
      FileNotFoundError: they are not there.
    """
    if not data.exists():
        raise MissingFileError("data", f"{data} does not exist")
    for folder in (data, data / "omniglot", data / "python"):
        for suffix in (".zip", ""):
            paths = {part: folder / f"images_{part}{suffix}" for part in PARTS}
            if all(path.is_file() if suffix else path.is_dir() for path in paths.values()):
                return paths
    raise MissingFileError(
        "data",
        f"{data} holds no images_background.zip and images_evaluation.zip, nor folders of these names, nor "
        "does its folder omniglot",
    )


def read_archive(path: Path, part: str, characters: tuple[str, ...]) -> dict[str, bytes]:
    """The PNG files of one archive, packed or not, by "Alphabet/characterNN/DD", DD the drawer.

    Raises:
      ValueError: a bad archive, or other drawings than 20 of each expected character.
    """
    images = _read_folder(path) if path.is_dir() else _read_zip(path, part)
    expected = {f"{name}/{drawer:02d}" for name in characters for drawer in range(1, DRAWERS + 1)}
    if images.keys() != expected:
        missing, extra = sorted(expected - images.keys()), sorted(images.keys() - expected)
        raise ValueError(
            f"{path}: not Omniglot's images_{part}: {len(missing)} of {len(expected)} drawings missing "
            f"(such as {missing[:2]}), {len(extra)} unexpected (such as {extra[:2]})"
        )
    return images


def _read_folder(path: Path) -> dict[str, bytes]:
    """The PNG files of an unpacked archive, which may lie in a folder of its own name in it."""
    inner = path / path.name
    root = inner if inner.is_dir() else path
    return {
        "/".join((*file.parts[-3:-1], file.stem.rpartition("_")[2])): file.read_bytes()
        for file in sorted(root.glob("*/*/*.png"))
        if not file.name.startswith(".")
    }


def _read_zip(path: Path, part: str) -> dict[str, bytes]:
    """The PNG files of one archive by "Alphabet/characterNN/DD", DD the drawer; nothing is extracted.

    Raises:
      ValueError: not a whole zip file, or a member whose path leaves its folder.
    """
    images: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                steps = PurePosixPath(member.filename.replace("\\", "/"))
                if steps.is_absolute() or ".." in steps.parts or ":" in member.filename:
                    raise ValueError(f"{path}: refused, its member {member.filename!r} leaves the archive")
                if member.is_dir() or steps.suffix != ".png" or "__MACOSX" in steps.parts:
                    continue
                if member.file_size > _LARGEST_MEMBER:
                    raise ValueError(f"{path}: refused, its member {member.filename!r} is too large")
                if len(steps.parts) == 4 and steps.parts[0] == f"images_{part}":
                    drawer = steps.stem.rpartition("_")[2]
                    images["/".join((*steps.parts[1:3], drawer))] = archive.read(member)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
        raise ValueError(
            f"{path}: corrupted or half-downloaded archive ({error}); get it again, or leave data out "
            "to download it"
        ) from error
    return images


def decode(
    examples: Examples, edition: Edition, size: int, where: object
) -> UInt8[np.ndarray, "characters drawers size size"]:
    """One array of all drawings, ink = 255 on 0, `size` pixels a side (Lanczos, as in MAML's code).

    Raises:
      ValueError: a drawing does not decode to 105×105 black and white, or the content is not Omniglot's.
    """
    from PIL import Image

    ink = np.empty((len(edition.names), DRAWERS, SIDE, SIDE), bool)
    array = np.empty((len(edition.names), DRAWERS, size, size), np.uint8)
    where_stored = ((part, name) for part in PARTS for name in edition.characters[part])
    for row, (part, character) in enumerate(where_stored):
        for drawer in range(DRAWERS):
            name = f"{character}/{drawer + 1:02d}"
            try:
                with Image.open(io.BytesIO(examples[part][name]), formats=["PNG"]) as image:
                    if image.size != (SIDE, SIDE):
                        raise ValueError(f"is {image.size}, not {(SIDE, SIDE)}")
                    ink[row, drawer] = np.asarray(image.convert("L")) == 0
            except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, …
                raise ValueError(
                    f"{where}: the image images_{part}/{name} does not decode ({error}); get it again"
                ) from error
        array[row] = shrink(ink[row], size)
    found = content_digest(edition.names, ink)
    if found != edition.digest:
        raise ValueError(
            f"{where}: the drawings are not Omniglot's (content digest {found[:16]}…, expected "
            f"{edition.digest[:16]}…); get the official archives"
        )
    return array


def shrink(ink: Bool[np.ndarray, "n side side"], size: int) -> UInt8[np.ndarray, "n size size"]:
    """Drawings as ink = 255 on 0, resized by Lanczos' filter, which is linear in rows and in columns.

    Rounded once, at the end: turning by 90° before or after is then the same to one grey level, whereas
    Pillow's 8-bit filter cuts off overshoots between its two passes.
    """
    weights = _lanczos(size)
    resized = weights @ (np.float32(255) * ink) @ weights.T
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8)


@functools.cache
def _lanczos(size: int) -> Float[np.ndarray, "size side"]:
    from PIL import Image

    identity = Image.fromarray(np.eye(SIDE, dtype=np.float32))
    return np.asarray(identity.resize((SIDE, size), Image.Resampling.LANCZOS))


def array_path(size: int) -> Path:
    """Where the prepared array of this size is kept."""
    return cache_folder() / f"omniglot-{size}.npz"


def load_array(path: Path, edition: Edition, size: int) -> tuple[np.ndarray, set[str]]:
    """The array of a prepared file, and the SHA-256 of the archives it was verified against.

    Raises:
      ValueError: not such a file, or one for another size. Pickles are never loaded.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            array, names, sources = file["images"], file["names"], file["sources"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{path}: not a prepared Omniglot array ({error}); remove it to prepare it anew"
        ) from error
    expected = (len(edition.names), DRAWERS, size, size)
    if array.shape != expected or array.dtype != np.uint8 or tuple(names.tolist()) != edition.names:
        raise ValueError(
            f"{path}: not Omniglot with size={size}: array {array.dtype} {array.shape} of {len(names)} "
            f"characters, expected uint8 {expected} of {len(edition.names)}"
        )
    return array, set(sources.tolist())


def _save_array(path: Path, array: np.ndarray, edition: Edition, sources: set[str]) -> None:
    with replacing(path) as temporary:
        np.savez(temporary, images=array, names=np.array(edition.names), sources=np.array(sorted(sources)))


def prepare(
    edition: Edition, size: int, data: Path | None, source: str = SOURCE
) -> UInt8[np.ndarray, "characters drawers size size"]:
    """The array of all drawings: from the cache, else from `data`, else downloaded; then cached.

    `data` is a folder with the two archives, packed or not, or a prepared array file. Archives are trusted
    only if the array in the cache was verified against these very files; others go through the whole chain.

    Raises:
      ValueError: an archive, an image or the array file is not what it should be.
      OSError: a path that does not exist, too little disk, no connection.
    """
    if data is not None and data.is_file():
        return load_array(data, edition, size)[0]
    archives = None if data is None else find_archives(data)
    fingerprint = None if archives is None else _fingerprint(archives)
    target = array_path(size)
    known: set[str] = set()
    if target.exists():
        array, known = load_array(target, edition, size)
        if fingerprint is None or fingerprint in known:
            return array

    folder = cache_folder()
    pixels = len(edition.names) * DRAWERS * size * size
    make_room(folder, pixels + 60_000_000, "preparing Omniglot")
    kept = folder / "tensorflow_datasets"
    if archives is None and (kept / DATA_SET).exists():
        array = decode(read_records(kept), edition, size, kept / DATA_SET)
    else:
        if archives is None:
            archives = download(edition.md5, source)
            fingerprint = _fingerprint(archives)
        examples = {part: read_archive(archives[part], part, edition.characters[part]) for part in PARTS}
        # Records join the cache only when every drawing in them is verified.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".omniglot-") as temporary:
            write_records(Path(temporary), examples)
            array = decode(read_records(Path(temporary)), edition, size, archives["background"].parent)
            if not (kept / DATA_SET).exists():
                kept.mkdir(exist_ok=True)
                with contextlib.suppress(OSError):  # another process may have been first
                    os.replace(Path(temporary) / DATA_SET, kept / DATA_SET)
    _save_array(target, array, edition, known | ({fingerprint} if fingerprint else set()))
    return array


def _fingerprint(archives: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    for part in PARTS:
        path = archives[part]
        files = sorted(path.rglob("*.png")) if path.is_dir() else [path]
        for file in files:
            if path.is_dir():
                digest.update(file.relative_to(path).as_posix().encode(errors="surrogateescape"))
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
