"""Image files as tasks want them: uint8 arrays of one size, grey or in colour."""

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

from jaxmeta.checks import ArgumentError, MissingFileError, NotAFolderError, check_count, check_word, some

# Formats that Pillow knows and that are no images: pages and drawings that other programs must paint, film,
# and tables that only plugins of one's own can open.
_NO_IMAGES = frozenset(["BUFR", "EPS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"])
# Folders that programs leave beside one's own.
_NOT_ONES_OWN = frozenset(["__MACOSX", "@eaDir", "__pycache__"])
# Folders that say of what is in them only that it is images.
IMAGE_FOLDERS = ("images", "imgs", "img", "image")
# Side of images where none is asked for and theirs is larger: that of mini-ImageNet.
LARGEST_DEFAULT = 84
# PIL takes images of more pixels for files that are made to fill the memory.
_LARGEST = 8192
# Files that are named of those that were left out.
_SHOWN = 3
_GREY_MODES = ("1", "L", "LA", "La", "F")


class UnreadableImage(ValueError):
    """A file that is damaged, or no image; the message is one line and begins with its name."""


class Header(NamedTuple):
    """What an image file says before its pixels.

    Attributes:
      in_colour: False for grey modes and for palettes of greys.
      width, height: in pixels.
    """

    in_colour: bool
    width: int
    height: int

    @property
    def shorter_side(self) -> int:
        return min(self.width, self.height)


class LeftOut(NamedTuple):
    """Files that were not taken, and why.

    Attributes:
      reason: what they are.
      number: how many there are.
      examples: names of the first.
    """

    reason: str
    number: int
    examples: tuple[str, ...]

    @classmethod
    def of(cls, one: str, several: str, names: Iterable[str]) -> "list[LeftOut]":
        """Return the entry for these names in a list; an empty list where there are none.

        Args:
          one: what one of them is.
          several: what several are.
          names: of the files.
        """
        names = sorted(names)
        reason = one if len(names) == 1 else several
        return [cls(reason, len(names), tuple(names[:_SHOWN]))] if names else []

    def __str__(self) -> str:
        more = ", …" * (self.number > len(self.examples))
        return f"{self.number:,} {self.reason} ({', '.join(map(printable, self.examples))}{more})"


def printable(name: str) -> str:
    """Return a file's name in one line that can be printed: it may hold any bytes.

    Examples:
      >>> printable("Käfer.png"), printable("a\\n1.png")
      ('Käfer.png', 'a\\\\n1.png')
    """
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in name)


def check_form(size: int | None, channels: int | None) -> None:
    """Refuses a size or a number of channels that images cannot have; None is to be found out."""
    if size is not None:
        check_count("size", size, 1, _LARGEST)
    check_word("channels", channels, (1, 3, None))


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Return the names of the formats that the installed Pillow opens as images."""
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.ID if name not in _NO_IMAGES)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of files that the installed Pillow opens as images, in lower case."""
    from PIL import Image

    # What several cameras write as .mpo is opened as the JPEG that it begins with.
    formats = {*image_formats(), "MPO"}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def image_files(folder: Path) -> list[Path]:
    """The images directly in `folder`, sorted by name.

    An image is a file that ends in one of `image_suffixes`, in any case, and is not hidden (a leading
    dot); whatever else lies there is none.
    """
    with os.scandir(folder) as entries:
        # Not is_file(): a broken link is an image that cannot be read, not one that may be passed over.
        names = [
            entry.name
            for entry in entries
            if is_image_name(entry.name) and not entry.name.startswith(".") and not entry.is_dir()
        ]
    return [folder / name for name in sorted(names)]


def is_image_name(name: str) -> bool:
    """Return whether a file is an image by its suffix."""
    return os.path.splitext(name)[1].lower() in image_suffixes()


def subfolders(folder: Path) -> list[Path]:
    """The folders directly in `folder` that are one's own, sorted by name: none that is hidden."""
    found = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted((path for path in found if path.name not in _NOT_ONES_OWN), key=lambda path: path.name)


def class_files(path: Path, argument: str = "path") -> dict[str, list[Path]]:
    """The images of a folder with one subfolder a class, by class, sorted by name.

    Hidden subfolders are no classes; images beside the subfolders are not taken, nor are those further down,
    save where a class has no others than those in its folder `images`.

    Args:
      path: the folder.
      argument: that named it, for the messages.

    Raises:
      FileNotFoundError: `path` does not exist.
      NotADirectoryError: `path` is a file.
      ValueError: no subfolders, or one without images.
    """
    if not path.exists():
        raise MissingFileError(argument, f"{path} does not exist")
    if not path.is_dir():
        raise NotAFolderError(argument, f"{path} is a file, not a folder with one subfolder a class")
    folders = subfolders(path)
    if not folders:
        loose = len(image_files(path))
        raise ArgumentError(
            argument,
            f"{path} has no subfolders, one a class"
            + (f"; sort the {loose} images that lie directly in it into such" if loose else ""),
        )
    files = {folder.name: files_of_class(folder) for folder in folders}
    empty = [folder for folder in folders if not files[folder.name]]
    if empty:
        deeper = any(subfolders(folder) for folder in empty)
        raise ArgumentError(
            argument,
            f"{len(empty)} of {len(folders)} class folders in {path} hold no images "
            f"(.png, .jpg and all else that Pillow reads): {some(repr(folder.name) for folder in empty)}"
            + ("; there are further folders in it: name the one whose subfolders are the classes" * deeper),
        )
    return files


def files_of_class(folder: Path) -> list[Path]:
    """The images of one class folder: those directly in it, or else those in its folder `images`."""
    files = image_files(folder)
    if files:
        return files
    inner = [path for path in subfolders(folder) if path.name.casefold() in IMAGE_FOLDERS]
    return image_files(inner[0]) if len(inner) == 1 else []


def left_out_of(root: Path, classes: Path, taken: Iterable[Path]) -> list[LeftOut]:
    """Return which visible files of a folder of class folders are not taken, by reason.

    Args:
      root: that names of files are relative to.
      classes: the folder with one subfolder a class.
      taken: files that are.
    """
    kept = set(map(str, taken))

    def names(files: Iterable[str]) -> list[str]:
        return [Path(file).relative_to(root).as_posix() for file in files if file not in kept]

    others = [str(path) for path in classes.iterdir() if path.is_file() and not path.name.startswith(".")]
    deeper: list[str] = []
    for folder in subfolders(classes):
        for file in _visible(str(folder)):
            (deeper if is_image_name(file) else others).append(file)
    return [
        *LeftOut.of(
            "image beside the class folders",
            "images beside the class folders",
            names(filter(is_image_name, others)),
        ),
        *LeftOut.of(
            "image in a folder of a class folder", "images in folders of a class folder", names(deeper)
        ),
        *LeftOut.of(
            "file that is no image",
            "files that are no images",
            names(file for file in others if not is_image_name(file)),
        ),
    ]


def _visible(folder: str) -> Iterator[str]:
    """Yield all files below a folder that are not hidden."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                yield entry.path
            elif not entry.is_symlink():  # links may lead round in a circle
                yield from _visible(entry.path)


def default_side(sides: Sequence[int]) -> int:
    """Return the side that images are given where none is asked for, by the shorter sides of all.

    It is the smallest of them, at most 84, among those that are at least half of the median: a few images
    that are far smaller than the others do not shrink these.

    Examples:
      >>> default_side([28, 28, 28]), default_side([300, 200, 90]), default_side([60, 50, 70, 1])
      (28, 84, 50)
    """
    capped = np.minimum(sides, LARGEST_DEFAULT)
    if not capped.size:
        return LARGEST_DEFAULT
    return int(capped[2 * capped >= np.median(capped)].min())


def header(source: Path | bytes, name: str) -> Header:
    """The header of an image file, or of its bytes; no pixel is decoded.

    Raises:
      UnreadableImage: it is no image, and then `name` begins the message.
    """
    with _opened(source, name) as image:
        if image.mode in ("P", "PA"):
            colour = _palette_in_colour(image)
        else:
            colour = image.mode not in _GREY_MODES and not image.mode.startswith("I")
        return Header(colour, *image.size)


def in_colour(source: Path | bytes) -> bool:
    """Whether an image file, or its bytes, is in colour by its header: an RGB file of greys is.

    Raises:
      UnreadableImage: it is no image.
    """
    return header(source, source.name if isinstance(source, Path) else "image").in_colour


def decode(source: Path | bytes, name: str, *, channels: int, size: int | None) -> UInt8[np.ndarray, "h w c"]:
    """The pixels of an image file, or of its bytes: upright, opaque, 8 bits a channel, of one size.

    Turned as its EXIF orientation says; transparency is laid over white; of 16 bits of grey the upper 8
    are kept, rounded; of an animation the first frame. An image that is not square is squeezed into
    one, as in MAML's and Ravi's scripts for mini-ImageNet: its aspect ratio is lost, nothing is cut off.

    Args:
      source: path, or the bytes of the file.
      name: to begin an error's message with.
      channels: 1 for grey (luma, ITU-R 601), 3 for RGB.
      size: both sides in pixels, by Lanczos' filter, rounded once; None leaves it as it is.

    Raises:
      UnreadableImage: PIL cannot decode it, or its samples are of 32 bits and have no known range.
    """
    from PIL import ImageOps

    with _opened(source, name) as image:
        opaque = _opaque(ImageOps.exif_transpose(image)).convert("RGB")
        pixels = np.asarray(opaque.convert("L") if channels == 1 else opaque)
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    return pixels if size is None or pixels.shape[:2] == (size, size) else resized(pixels, size)


def resized(pixels: UInt8[np.ndarray, "h w c"], size: int) -> UInt8[np.ndarray, "size size c"]:
    """Both sides `size` pixels, by Lanczos' filter, rounded once."""
    from PIL import Image

    # In float: Pillow's 8-bit filter rounds and cuts off overshoots between its two passes.
    planes = [
        Image.fromarray(plane).resize((size, size), Image.Resampling.LANCZOS)
        for plane in np.moveaxis(pixels.astype(np.float32), -1, 0)
    ]
    resized = np.stack([np.asarray(plane) for plane in planes], axis=-1)
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8)


def _opaque(image):
    """A PIL image of 8 bits a channel, transparency laid over white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit samples have no known range: save it with 8 or 16")
        values = np.where(values == image.info.get("transparency", -1), 65535, values)
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _palette_in_colour(image) -> bool:
    from PIL import Image

    # A copy, for `getpalette` of the image itself would decode its pixels.
    copy = Image.new("P", (1, 1))
    copy.putpalette(image.palette)
    colours = np.array(copy.getpalette("RGB")).reshape(-1, 3)
    return bool((colours != colours[:, :1]).any())


@contextlib.contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[Any]:
    """The PIL image; all that goes wrong with it is an `UnreadableImage`."""
    from PIL import Image, UnidentifiedImageError

    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        # A file is opened by what is in it, whatever its name: a page must not start another program.
        with Image.open(file, formats=image_formats()) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, …
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise  # the disk or the rights are at fault, and not the image
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its own words hold the address of an object
            reason = "unknown format"
        raise UnreadableImage(f"{name}: cannot be read as an image ({' '.join(reason.split())})") from error
