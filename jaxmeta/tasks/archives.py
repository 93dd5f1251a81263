"""Omniglot's two archives: reading, verification, storage as records, decoding to one array.

The chain is archives -> ArrayRecord files (see `records`) -> one uint8 array. Archives may have been
repacked, so their content is verified: names, counts, and a digest over every pixel.
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

from jaxmeta.checks import MissingFileError, join_names
from jaxmeta.files import replacing
from jaxmeta.tasks.cache import cache_folder, ensure_space
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
    """The expected content of the archives.

    Attributes:
      characters: sorted character names "Alphabet/characterNN" by part.
      digest: SHA-256 of the content, see `content_digest`.
      md5: MD5 of the official archive by part, checked after a download.
    """

    characters: Mapping[str, tuple[str, ...]]
    digest: str
    md5: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Return all characters in the order of the array: background, then evaluation."""
        return tuple(name for part in PARTS for name in self.characters[part])


def content_digest(names: tuple[str, ...], ink: Bool[np.ndarray, "*n side side"]) -> str:
    """Return the SHA-256 (hex) over the character names, then over the pixels of every drawing."""
    digest = hashlib.sha256("\n".join(names).encode())
    digest.update(np.packbits(ink).tobytes())
    return digest.hexdigest()


def find_archives(data: Path) -> dict[str, Path]:
    """Return the paths of the two archives, packed or unpacked, by part.

    `data` itself and its folders `omniglot` and `python` are searched.

    Raises:
      FileNotFoundError: `data` does not exist or does not contain both archives.
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
        f"{data} must contain images_background.zip and images_evaluation.zip, or the folders they unpack "
        "to, either directly or in a folder omniglot; they are missing",
    )


def read_archive(path: Path, part: str, characters: tuple[str, ...]) -> dict[str, bytes]:
    """Return the PNG files of one archive, packed or unpacked, by "Alphabet/characterNN/DD", DD the drawer.

    Raises:
      ValueError: the archive is damaged, or does not hold exactly 20 drawings of each expected character.
    """
    images = _read_folder(path) if path.is_dir() else _read_zip(path, part)
    expected = {f"{name}/{drawer:02d}" for name in characters for drawer in range(1, DRAWERS + 1)}
    if images.keys() != expected:
        differing = {"missing": expected - images.keys(), "unexpected": images.keys() - expected}
        found = [
            f"{len(drawings)} {kind} ({join_names(sorted(drawings))})"
            for kind, drawings in differing.items()
            if drawings
        ]
        raise ValueError(
            f"{path}: not Omniglot's images_{part}, which has {len(expected)} drawings: {', '.join(found)}; "
            "download it again"
        )
    return images


def _read_folder(path: Path) -> dict[str, bytes]:
    """Return the PNG files of an unpacked archive."""
    # Some programs unpack images_background.zip to images_background/images_background.
    inner = path / path.name
    root = inner if inner.is_dir() else path
    return {
        "/".join((*file.parts[-3:-1], file.stem.rpartition("_")[2])): file.read_bytes()
        for file in sorted(root.glob("*/*/*.png"))
        if not file.name.startswith(".")
    }


def _read_zip(path: Path, part: str) -> dict[str, bytes]:
    """Return the PNG files of a packed archive, without extracting it to disk.

    Raises:
      ValueError: the zip file is damaged, or a member is too large or has a path outside the archive.
    """
    images: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                member_path = PurePosixPath(member.filename.replace("\\", "/"))
                if member_path.is_absolute() or ".." in member_path.parts or ":" in member.filename:
                    raise ValueError(f"{path}: member {member.filename!r} has a path outside the archive")
                if member.is_dir() or member_path.suffix != ".png" or "__MACOSX" in member_path.parts:
                    continue
                if member.file_size > _LARGEST_MEMBER:
                    raise ValueError(
                        f"{path}: member {member.filename!r} is larger than {_LARGEST_MEMBER} bytes"
                    )
                if len(member_path.parts) == 4 and member_path.parts[0] == f"images_{part}":
                    drawer = member_path.stem.rpartition("_")[2]
                    images["/".join((*member_path.parts[1:3], drawer))] = archive.read(member)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
        raise ValueError(
            f"{path}: the archive is damaged or incomplete ({error}); download it again, or omit data to "
            "have it downloaded"
        ) from error
    return images


def decode(
    examples: Examples, edition: Edition, size: int, where: object
) -> UInt8[np.ndarray, "characters drawers size size"]:
    """Return all drawings as one array, ink 255 on 0, resized to `size` pixels (Lanczos, as in MAML's code).

    Raises:
      ValueError: a drawing does not decode to 105×105 pixels, or the content is not Omniglot's.
    """
    from PIL import Image

    ink = np.empty((len(edition.names), DRAWERS, SIDE, SIDE), bool)
    array = np.empty((len(edition.names), DRAWERS, size, size), np.uint8)
    drawn_characters = ((part, name) for part in PARTS for name in edition.characters[part])
    for row, (part, character) in enumerate(drawn_characters):
        for drawer in range(DRAWERS):
            name = f"{character}/{drawer + 1:02d}"
            try:
                with Image.open(io.BytesIO(examples[part][name]), formats=["PNG"]) as image:
                    if image.size != (SIDE, SIDE):
                        raise ValueError(f"size {image.size}, expected {(SIDE, SIDE)}")
                    ink[row, drawer] = np.asarray(image.convert("L")) == 0
            except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, …
                raise ValueError(
                    f"{where}: the image images_{part}/{name} cannot be decoded ({error}); download it again"
                ) from error
        array[row] = shrink(ink[row], size)
    digest = content_digest(edition.names, ink)
    if digest != edition.digest:
        raise ValueError(
            f"{where}: the drawings are not Omniglot's (content digest {digest[:16]}…, expected "
            f"{edition.digest[:16]}…); download the official archives"
        )
    return array


def shrink(ink: Bool[np.ndarray, "n side side"], size: int) -> UInt8[np.ndarray, "n size size"]:
    """Return drawings with ink 255 on 0, resized with a Lanczos filter, which is separable.

    Values are rounded once, at the end, so that rotating by 90° before or after resizing agrees to one grey
    level. Pillow's 8-bit filter clips overshoots between its two passes.
    """
    weights = _lanczos(size)
    resized = weights @ (np.float32(255) * ink) @ weights.T
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8)


@functools.cache
def _lanczos(size: int) -> Float[np.ndarray, "size side"]:
    from PIL import Image

    # Resizing the identity matrix along one axis gives the filter's weights.
    identity = Image.fromarray(np.eye(SIDE, dtype=np.float32))
    return np.asarray(identity.resize((SIDE, size), Image.Resampling.LANCZOS))


def array_path(size: int) -> Path:
    """Return the path of the prepared array of this size in the cache."""
    return cache_folder() / f"omniglot-{size}.npz"


def load_array(path: Path, edition: Edition, size: int) -> tuple[np.ndarray, set[str]]:
    """Return the array of a prepared file, and the fingerprints of the archives it was verified against.

    Raises:
      ValueError: the file is not a prepared array, or has another size. Pickles are never loaded.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            array, names, sources = file["images"], file["names"], file["sources"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{path}: not a prepared Omniglot array ({error}); remove it to prepare it again"
        ) from error
    expected = (len(edition.names), DRAWERS, size, size)
    if array.shape != expected or array.dtype != np.uint8 or tuple(names.tolist()) != edition.names:
        raise ValueError(
            f"{path}: not Omniglot with size={size}: got {array.dtype} {array.shape} with {len(names)} "
            f"characters, expected uint8 {expected} with {len(edition.names)}"
        )
    return array, set(sources.tolist())


def _save_array(path: Path, array: np.ndarray, edition: Edition, sources: set[str]) -> None:
    with replacing(path) as temporary:
        np.savez(temporary, images=array, names=np.array(edition.names), sources=np.array(sorted(sources)))


def prepare(
    edition: Edition, size: int, data: Path | None, source: str = SOURCE
) -> UInt8[np.ndarray, "characters drawers size size"]:
    """Return the array of all drawings from the cache, from `data` or from a download, and cache it.

    The cached array is used without reading the archives in `data` only if it was verified against the same
    files; other archives are verified in full.

    Args:
      edition: expected content.
      size: side of the images in pixels.
      data: folder with the two archives, packed or unpacked, or a prepared array file; None for the
        cache, or for a download if the cache is empty.
      source: address of the archives, with `{}` for the part.

    Raises:
      ValueError: an archive, an image or the array file is damaged or not Omniglot's.
      OSError: a path that does not exist, too little disk space, or no connection.
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
    ensure_space(folder, pixels + 60_000_000, "preparing Omniglot")
    records_folder = folder / "tensorflow_datasets"
    if archives is None and (records_folder / DATA_SET).exists():
        array = decode(read_records(records_folder), edition, size, records_folder / DATA_SET)
    else:
        if archives is None:
            archives = download(edition.md5, source)
            fingerprint = _fingerprint(archives)
        examples = {part: read_archive(archives[part], part, edition.characters[part]) for part in PARTS}
        # Records join the cache only when every drawing in them is verified.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".omniglot-") as temporary:
            write_records(Path(temporary), examples)
            array = decode(read_records(Path(temporary)), edition, size, archives["background"].parent)
            if not (records_folder / DATA_SET).exists():
                records_folder.mkdir(exist_ok=True)
                with contextlib.suppress(OSError):  # another process may have stored them first
                    os.replace(Path(temporary) / DATA_SET, records_folder / DATA_SET)
    _save_array(target, array, edition, known | ({fingerprint} if fingerprint else set()))
    return array


def _fingerprint(archives: dict[str, Path]) -> str:
    """Return a SHA-256 (hex) over the files of the archives as they are, packed or unpacked."""
    digest = hashlib.sha256()
    for part in PARTS:
        path = archives[part]
        files = sorted(path.rglob("*.png")) if path.is_dir() else [path]
        for file in files:
            if path.is_dir():
                digest.update(file.relative_to(path).as_posix().encode(errors="surrogateescape"))
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
