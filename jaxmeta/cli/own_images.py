"""Read the user's image files for a trained network, and warn where they differ from its training images."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxmeta.checks import ArgumentError, join_names
from jaxmeta.cli.data import ImageSpec
from jaxmeta.tasks.images import UnreadableImage, decode, in_colour

# An image whose channels nowhere differ by more than this many grey levels counts as grey.
_COLOUR_TOLERANCE = 8


def read_images(
    files: Sequence[Path], spec: ImageSpec, skip: bool | None, name: str
) -> tuple[Float[np.ndarray, "n h w c"], list[int]]:
    """Read images in [0, 1].

    Args:
      files: paths of the images.
      spec: size and channels of the result.
      skip: whether to leave out files that cannot be read, with a warning; None acts as False for a caller
        that has no --skip-unreadable, which the error then does not suggest.
      name: argument that named the files, for messages.

    Returns:
      The images, and their indices in `files`.

    Raises:
      ArgumentError: a file cannot be read.
    """
    images, kept, problems, coloured = [], [], [], []
    for index, file in enumerate(files):
        try:
            image = decode(file, str(file), channels=spec.channels, size=spec.size)
            # Grey images are often stored as colour files, so the values decide.
            if in_colour(file):
                colours = decode(file, str(file), channels=3, size=None).astype(np.int32)
                if np.ptp(colours, axis=-1).max() > _COLOUR_TOLERANCE:
                    coloured.append(file.name)
        except UnreadableImage as error:
            problems.append(str(error))
        else:
            images.append(image)
            kept.append(index)
    if problems and (not skip or not kept):
        hint = "" if skip is None else "; --skip-unreadable leaves such images out"
        raise ArgumentError(name, f"{join_names(problems)}{hint}")
    if problems:
        warnings.warn(f"--{name}: left out {join_names(problems)}", stacklevel=3)
    if coloured and spec.channels == 1:
        warnings.warn(
            f"--{name}: converted {join_names(coloured)} to grey, because the training images are grey",
            stacklevel=3,
        )
    if spec.channels == 3 and not coloured:
        warnings.warn(f"--{name}: the images are grey, but the training images are in colour", stacklevel=3)
    return np.stack(images).astype(np.float32) / 255, kept


def seem_inverted(spec: ImageSpec, mean: float) -> bool:
    """Return whether images of this mean are closer to the negatives of the training images."""
    # The background decides for strokes; other images may be bright, so the difference must be clear.
    margin = 0.0 if spec.ink else 0.25
    return abs(mean - spec.mean) - abs(1 - mean - spec.mean) > margin


def warn_of_negatives(
    name: str, spec: ImageSpec, images: Float[np.ndarray, "n h w c"], files: Sequence[str]
) -> None:
    """Warn of images in which dark and light seem exchanged."""
    inverted = [
        file
        for file, mean in zip(files, images.mean((1, 2, 3)), strict=True)
        if seem_inverted(spec, float(mean))
    ]
    if inverted:
        warnings.warn(
            f"--{name}: dark and light seem exchanged, compared to the training images (mean "
            f"{spec.mean:.2f}), in {join_names(inverted)}; --invert exchanges them in all images",
            stacklevel=3,
        )
