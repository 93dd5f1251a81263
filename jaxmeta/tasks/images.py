"""Image files as tasks want them: uint8 arrays of one size, grey or in colour."""

import contextlib
import errno
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxmeta.checks import ArgumentError, MissingFileError, NotAFolderError, check_count, check_word, some

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
# Side of images where none is asked for and theirs is larger: that of mini-ImageNet.
LARGEST_DEFAULT = 84
# PIL takes images of more pixels for files that are made to fill the memory.
_LARGEST = 8192
_GREY_MODES = ("1", "L", "LA", "La", "F")


class UnreadableImage(ValueError):
    """A file that is damaged, or no image; the message is one line and begins with its name."""


class Header(NamedTuple):
    """What an image file says before its pixels.

    Attributes:
      in_colour: False for grey modes and for palettes of greys.
      shorter_side: in pixels.
    """

    in_colour: bool
    shorter_side: int


def check_form(size: int | None, channels: int | None) -> None:
    """Refuses a size or a number of channels that images cannot have; None is to be found out."""
    if size is not None:
        check_count("size", size, 1, _LARGEST)
    check_word("channels", channels, (1, 3, None))


def image_files(folder: Path) -> list[Path]:
    """The images directly in `folder`, sorted by name.

    An image is a file that ends in one of `IMAGE_SUFFIXES`, in any case, and is not hidden (a leading
    dot); whatever else lies there is none.
    """
    files = (
        path
        for path in folder.iterdir()
        # Not is_file(): a broken link is an image that cannot be read, not one that may be passed over.
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and not path.is_dir()
    )
    return sorted(files, key=lambda path: path.name)


def class_files(path: Path, argument: str = "path") -> dict[str, list[Path]]:
    """The images of a folder with one subfolder a class, by class, sorted by name.

    Hidden subfolders are no classes; images beside the subfolders or further down are not taken.

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
    folders = sorted(_subfolders(path), key=lambda folder: folder.name)
    if not folders:
        loose = len(image_files(path))
        raise ArgumentError(
            argument,
            f"{path} has no subfolders, one a class"
            + (f"; sort the {loose} images that lie directly in it into such" if loose else ""),
        )
    files = {folder.name: image_files(folder) for folder in folders}
    empty = [folder for folder in folders if not files[folder.name]]
    if empty:
        deeper = any(_subfolders(folder) for folder in empty)
        raise ArgumentError(
            argument,
            f"{len(empty)} of {len(folders)} class folders in {path} hold no images "
            f"({', '.join(IMAGE_SUFFIXES)}): {some(repr(folder.name) for folder in empty)}"
            + ("; there are further folders in it: name the one whose subfolders are the classes" * deeper),
        )
    return files


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
        return Header(colour, min(image.size))


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


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


@contextlib.contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator:
    """The PIL image; all that goes wrong with it is an `UnreadableImage`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
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
