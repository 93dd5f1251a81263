"""Read image files of one's own as a trained network takes them, and warn where they seem to be others."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxmeta.checks import ArgumentError, some
from jaxmeta.cli.data import ImageSpec
from jaxmeta.tasks.images import UnreadableImage, decode, in_colour

# Grey levels by which an image's channels must differ for it to count as colour.
_COLOUR = 8


def read_images(
    files: Sequence[Path], spec: ImageSpec, skip: bool | None, name: str
) -> tuple[Float[np.ndarray, "n h w c"], list[int]]:
    """Read images in [0, 1].

    Args:
      files: of the images.
      spec: size and channels to read them with.
      skip: whether to leave out files that cannot be read, with a warning; None where nobody can ask for it.
      name: of the argument that named them, for messages.

    Returns:
      The images, and which of the files they are.

    Raises:
      ArgumentError: a file that cannot be read.
    """
    images, kept, problems, coloured = [], [], [], []
    for index, file in enumerate(files):
        try:
            images.append(decode(file, str(file), channels=spec.channels, size=spec.size))
            # Files of greys are often stored in colour.
            if in_colour(file):
                colours = decode(file, str(file), channels=3, size=None).astype(np.int32)
                if np.ptp(colours, axis=-1).max() > _COLOUR:
                    coloured.append(file.name)
        except UnreadableImage as error:
            problems.append(str(error))
        else:
            kept.append(index)
    if problems and (not skip or not kept):
        hint = "" if skip is None else "; --skip-unreadable leaves such images out"
        raise ArgumentError(name, f"{some(problems)}{hint}")
    if problems:
        warnings.warn(f"--{name}: left out {some(problems)}", stacklevel=3)
    if coloured and spec.channels == 1:
        warnings.warn(
            f"--{name}: {some(coloured)} in colour, and the training images are grey; turned to grey",
            stacklevel=3,
        )
    if spec.channels == 3 and not coloured:
        warnings.warn(f"--{name}: the images are grey, and the training images are in colour", stacklevel=3)
    return np.stack(images).astype(np.float32) / 255, kept


def seem_inverted(spec: ImageSpec, mean: float) -> bool:
    """Return whether images of this mean look more like the negatives of the training images."""
    # Of strokes the paper decides; other images must differ clearly, since an image may just be bright.
    margin = 0.0 if spec.ink else 0.25
    return abs(mean - spec.mean) - abs(1 - mean - spec.mean) > margin


def warn_of_negatives(
    name: str, spec: ImageSpec, images: Float[np.ndarray, "n h w c"], files: Sequence[str]
) -> None:
    """Warn of images in which dark and light seem exchanged."""
    found = [
        file
        for file, mean in zip(files, images.mean((1, 2, 3)), strict=True)
        if seem_inverted(spec, float(mean))
    ]
    if found:
        warnings.warn(
            f"--{name}: dark and light seem exchanged, compared to the training images (mean "
            f"{spec.mean:.2f}), in {some(found)}; --invert turns them in all images",
            stacklevel=3,
        )
