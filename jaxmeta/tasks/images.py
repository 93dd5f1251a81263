"""Image files: which files are images, and decoding to uint8 arrays of one size."""

import contextlib
import errno
import functools
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxmeta.checks import (
    ArgumentError,
    MissingFileError,
    NotAFolderError,
    check_count,
    check_word,
    join_names,
)

# Formats that Pillow registers but that are not read: pages and drawings rendered by external programs,
# videos, and formats that need a plugin.
_EXCLUDED_FORMATS = frozenset(["BUFR", "EPS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"])
# Folders created by other programs.
_EXCLUDED_FOLDERS = frozenset(["__MACOSX", "@eaDir", "__pycache__"])
# Names of folders that are not class names.
IMAGE_FOLDERS = ("images", "imgs", "img", "image")
# Largest default side: that of mini-ImageNet.
LARGEST_DEFAULT = 84
# PIL refuses images with many more pixels as decompression bombs.
_LARGEST = 8192
# Number of skipped files named in a report.
_NUM_EXAMPLES = 3
_GREY_MODES = ("1", "L", "LA", "La", "F")


class UnreadableImage(ValueError):
    """The error for a file that is damaged or not an image.

    The message is one line that starts with the name of the image.
    """


class Header(NamedTuple):
    """The header of an image file.

    Attributes:
      in_colour: False for grey modes and palettes of greys.
      width, height: size in pixels.
    """

    in_colour: bool
    width: int
    height: int

    @property
    def shorter_side(self) -> int:
        return min(self.width, self.height)


class LeftOut(NamedTuple):
    """Files that were skipped for one reason.

    Attributes:
      reason: description of the files.
      number: number of files.
      examples: names of the first files.
    """

    reason: str
    number: int
    examples: tuple[str, ...]

    @classmethod
    def of(cls, one: str, several: str, names: Iterable[str]) -> "list[LeftOut]":
        """Return a list with the entry for these names, or an empty list without names.

        Args:
          one: description of a single file.
          several: description of several files.
          names: file names.
        """
        names = sorted(names)
        reason = one if len(names) == 1 else several
        return [cls(reason, len(names), tuple(names[:_NUM_EXAMPLES]))] if names else []

    def __str__(self) -> str:
        more = ", …" * (self.number > len(self.examples))
        return f"{self.number:,} {self.reason} ({', '.join(map(printable, self.examples))}{more})"


def printable(name: str) -> str:
    """Return a file name with characters that cannot be printed, such as line breaks, escaped.

    Examples:
      >>> printable("Käfer.png"), printable("a\\n1.png")
      ('Käfer.png', 'a\\\\n1.png')
    """
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in name)


def check_image_spec(size: int | None, channels: int | None) -> None:
    """Check the size and the number of channels of images; None is allowed for both."""
    if size is not None:
        check_count("size", size, 1, _LARGEST)
    check_word("channels", channels, (1, 3, None))


@functools.cache
def _image_formats() -> tuple[str, ...]:
    """Return the formats that the installed Pillow opens as images."""
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.ID if name not in _EXCLUDED_FORMATS)


@functools.cache
def _image_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes of the files that the installed Pillow opens as images."""
    from PIL import Image

    # Pillow opens .mpo files, written by some cameras, as the JPEG they start with.
    formats = {*_image_formats(), "MPO"}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def image_files(folder: Path) -> list[Path]:
    """Return the images directly in `folder`, sorted by name.

    An image is a file with one of `_image_suffixes`, in any case, that is not hidden by a leading dot.
    """
    with os.scandir(folder) as entries:
        # Not is_file(): a broken link counts as an unreadable image and must not be skipped silently.
        names = [
            entry.name
            for entry in entries
            if is_image_name(entry.name) and not entry.name.startswith(".") and not entry.is_dir()
        ]
    return [folder / name for name in sorted(names)]


def is_image_name(name: str) -> bool:
    """Return whether a file name has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in _image_suffixes()


def subfolders(folder: Path) -> list[Path]:
    """Return the folders directly in `folder`, sorted by name, without hidden folders and system folders."""
    visible = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(
        (path for path in visible if path.name not in _EXCLUDED_FOLDERS), key=lambda path: path.name
    )


def class_files(path: Path, argument: str = "path") -> dict[str, list[Path]]:
    """Return the images of a folder with one subfolder per class, by class, sorted by name.

    Hidden subfolders are ignored, and so are images outside the subfolders or in deeper folders; a class
    without images of its own may have them in a folder `images`.

    Args:
      path: path of the folder.
      argument: name of the caller's argument, for the messages.

    Raises:
      FileNotFoundError: `path` does not exist.
      NotADirectoryError: `path` is a file.
      ValueError: no subfolders, or a subfolder without images.
    """
    if not path.exists():
        raise MissingFileError(argument, f"{path} does not exist")
    if not path.is_dir():
        raise NotAFolderError(argument, f"{path} is a file; it must be a folder with one subfolder per class")
    folders = subfolders(path)
    if not folders:
        loose = len(image_files(path))
        raise ArgumentError(
            argument,
            f"{path} has no subfolders; it must have one subfolder per class"
            + (f", into which to sort its {loose} image{'s' * (loose != 1)}" if loose else ""),
        )
    files = {folder.name: files_of_class(folder) for folder in folders}
    empty = [folder for folder in folders if not files[folder.name]]
    if empty:
        deeper = any(subfolders(folder) for folder in empty)
        raise ArgumentError(
            argument,
            f"{len(empty)} of {len(folders)} class folders in {path} hold no images "
            f"(.png, .jpg and other formats of Pillow): {join_names(repr(folder.name) for folder in empty)}"
            + ("; some have subfolders: give the folder whose subfolders are the classes" * deeper),
        )
    return files


def files_of_class(folder: Path) -> list[Path]:
    """Return the images of a class folder, directly in it or else in its folder `images`."""
    files = image_files(folder)
    if files:
        return files
    inner = [path for path in subfolders(folder) if path.name.casefold() in IMAGE_FOLDERS]
    return image_files(inner[0]) if len(inner) == 1 else []


def left_out_of(root: Path, classes: Path, taken: Iterable[Path]) -> list[LeftOut]:
    """Return the skipped files of a folder of class folders by reason; hidden files are ignored.

    Args:
      root: folder that the reported names are relative to.
      classes: folder with one subfolder per class.
      taken: files that are used.
    """
    kept = set(map(str, taken))

    def names(files: Iterable[str]) -> list[str]:
        return [Path(file).relative_to(root).as_posix() for file in files if file not in kept]

    others = [str(path) for path in classes.iterdir() if path.is_file() and not path.name.startswith(".")]
    deeper: list[str] = []
    for folder in subfolders(classes):
        for file in walk_files(str(folder)):
            (deeper if is_image_name(file) else others).append(file)
    return [
        *LeftOut.of(
            "image outside the class folders",
            "images outside the class folders",
            names(filter(is_image_name, others)),
        ),
        *LeftOut.of(
            "image in a subfolder of a class folder", "images in subfolders of a class folder", names(deeper)
        ),
        *LeftOut.of(
            "file that is not an image",
            "files that are not images",
            names(file for file in others if not is_image_name(file)),
        ),
    ]


def walk_files(folder: str) -> Iterator[str]:
    """Yield all files below a folder that are not hidden."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                yield entry.path
            elif not entry.is_symlink():  # links may form cycles
                yield from walk_files(entry.path)


def default_side(sides: Sequence[int]) -> int:
    """Return the default side of images from their shorter sides, each capped at 84.

    It is the smallest side of at least half the median, so that a few far smaller images do not shrink the
    others.

    Examples:
      >>> default_side([28, 28, 28]), default_side([300, 200, 90]), default_side([60, 50, 70, 1])
      (28, 84, 50)
    """
    capped = np.minimum(sides, LARGEST_DEFAULT)
    if not capped.size:
        return LARGEST_DEFAULT
    return int(capped[2 * capped >= np.median(capped)].min())


def header(source: Path | bytes, name: str) -> Header:
    """Read the header of an image file without decoding its pixels.

    Args:
      source: path, or the bytes of the file.
      name: name of the image, at the start of the error message.

    Raises:
      UnreadableImage: the file is not an image.
    """
    with _opened(source, name) as image:
        if image.mode in ("P", "PA"):
            colour = _palette_in_colour(image)
        else:
            colour = image.mode not in _GREY_MODES and not image.mode.startswith("I")
        return Header(colour, *image.size)


def in_colour(source: Path | bytes) -> bool:
    """Return whether the header of an image file, or of its bytes, declares colour.

    An RGB file with only grey pixels counts as colour.

    Raises:
      UnreadableImage: the file is not an image.
    """
    return header(source, source.name if isinstance(source, Path) else "image").in_colour


def decode(source: Path | bytes, name: str, *, channels: int, size: int | None) -> UInt8[np.ndarray, "h w c"]:
    """Decode an image to 8 bits per channel.

    The EXIF orientation is applied; transparency is composited over white; 16-bit grey values are rounded to
    8 bits; animations give their first frame. An image that is not square is resized to a square without
    cropping, which changes its aspect ratio, as in MAML's and Ravi's scripts for mini-ImageNet.

    Args:
      source: path, or the bytes of the file.
      name: name of the image, at the start of the error message.
      channels: 1 for grey (luma, ITU-R 601), 3 for RGB.
      size: side in pixels, resized with a Lanczos filter and rounded once; None: no resizing.

    Returns:
      Pixels `(height, width, channels)`, uint8.

    Raises:
      UnreadableImage: PIL cannot decode the file, or it has 32-bit samples, whose range is unknown.
    """
    from PIL import ImageOps

    with _opened(source, name) as image:
        opaque = _opaque(ImageOps.exif_transpose(image)).convert("RGB")
        pixels = np.asarray(opaque.convert("L") if channels == 1 else opaque)
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    return pixels if size is None or pixels.shape[:2] == (size, size) else resized(pixels, size)


def resized(pixels: UInt8[np.ndarray, "h w c"], size: int) -> UInt8[np.ndarray, "size size c"]:
    """Resize to `size` × `size` pixels with a Lanczos filter, rounded once."""
    from PIL import Image

    # In floating point: Pillow's 8-bit filter rounds and clips between its two passes.
    planes = [
        Image.fromarray(plane).resize((size, size), Image.Resampling.LANCZOS)
        for plane in np.moveaxis(pixels.astype(np.float32), -1, 0)
    ]
    resized = np.stack([np.asarray(plane) for plane in planes], axis=-1)
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8)


def _opaque(image):
    """Return a PIL image with 8 bits per channel, transparency composited over white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit samples have no known range: save the image with 8 or 16 bits")
        values = np.where(values == image.info.get("transparency", -1), 65535, values)
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _palette_in_colour(image) -> bool:
    from PIL import Image

    # A copy of the palette: `getpalette` of the image itself would decode its pixels.
    copy = Image.new("P", (1, 1))
    copy.putpalette(image.palette)
    colours = np.array(copy.getpalette("RGB")).reshape(-1, 3)
    return bool((colours != colours[:, :1]).any())


@contextlib.contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[Any]:
    """Open a PIL image; decoding errors are raised as `UnreadableImage`."""
    from PIL import Image, UnidentifiedImageError

    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        # Restricted to image formats: Pillow goes by content, and an EPS page would start Ghostscript.
        with Image.open(file, formats=_image_formats()) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, …
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise  # an error of the disk or of permissions, not of the image
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its message contains the address of an object
            reason = "unknown format"
        raise UnreadableImage(f"{name}: cannot be read as an image ({' '.join(reason.split())})") from error
