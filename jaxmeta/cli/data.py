"""The images of a run: their specification, and checks that the data are still the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from jaxmeta.checks import ArgumentError
from jaxmeta.cli.config import Config
from jaxmeta.core import Key, Task, TaskDistribution, TaskStream, card_of
from jaxmeta.training.sharding import sample_of


class ImageSpec(NamedTuple):
    """Specification of the images that a run was trained on.

    Attributes:
      size: side in pixels.
      channels: number of channels, 1 or 3.
      mean: mean of all pixels, in [0, 1].
      ink: True where they are strokes, light on dark.
    """

    size: int
    channels: int
    mean: float
    ink: bool

    def __str__(self) -> str:
        return f"{self.size} × {self.size}, {'grey' if self.channels == 1 else 'colour'}"


def image_spec(tasks: TaskDistribution | TaskStream, ink: bool) -> ImageSpec | None:
    """Return the specification of the images of tasks; None for tasks of other data."""
    shape = _shape(tasks)
    if len(shape) != 4 or shape[-1] not in (1, 3):
        return None
    if isinstance(tasks, TaskStream):
        mean = tasks.at(0).support.x.mean()
    else:
        mean = _mean(sample_of(tasks), jax.random.split(jax.random.key(0), 16))
    return ImageSpec(shape[1], shape[-1], round(float(mean), 4), ink)


def images_of(config: Config) -> ImageSpec | None:
    """Return the specification of the images that a stored run was trained on; None for other data.

    Raises:
      ValueError: the entry `images` of its configuration is damaged.
    """
    if config.images is None:
        return None
    try:
        size, channels, mean, ink = (config.images[name] for name in ImageSpec._fields)
        return ImageSpec(int(size), int(channels), float(mean), bool(ink))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the configuration's images are damaged: {error!r}") from None


def with_image_settings(config: Config, images: ImageSpec | None) -> Config:
    """Return the configuration with the size and channels that were read from the user's images.

    They are stored with the run, so that images added to the folder later do not change them.
    """
    if images is None:
        return config
    known = {"size": images.size, "channels": images.channels}
    unset = [name for name in known if config.tasks.get(name, known) is None]
    return config.replaced(tasks={name: known[name] for name in unset})


def check_data(config: Config, tasks: TaskDistribution | TaskStream, folder: Path) -> None:
    """Check that the data are still the data that the run in `folder` was trained on.

    Raises:
      ArgumentError: the classes are split differently, so that a test class may have been trained on; or the
        images have another shape.
    """
    name = config.tasks["name"]
    check_images(config, tasks, folder, name)
    now = card_of(tasks).split_hash
    if config.split_hash != now:
        raise ArgumentError(
            "tasks",
            f"the classes of {name}, or their split, have changed since the run in {folder} was trained "
            f"(split {str(config.split_hash)[:8]} then, {str(now)[:8]} now); restore them, or "
            "train a new run",
        )


def check_images(config: Config, tasks: TaskDistribution | TaskStream, folder: Path, name: str) -> None:
    """Check that images have the shape that the run in `folder` was trained on.

    Raises:
      ArgumentError: they have another shape.
    """
    images = images_of(config)
    if images is None:
        return
    shape = _shape(tasks)[1:]
    before = (images.size, images.size, images.channels)
    if shape != before:
        raise ArgumentError(
            "tasks",
            f"the images of {name} have shape {shape}, but the run in {folder} was trained on shape {before}",
        )


def _shape(tasks: TaskDistribution | TaskStream) -> tuple[int, ...]:
    """Return the shape of the support examples of one task."""
    return jax.eval_shape(sample_of(tasks), jax.random.key(0)).support.x.shape


# The sampler, and with it the data, is an argument: in a closure it would be compiled in as a constant.
@jax.jit
def _mean(sample: Callable[[Key], Task], keys: Array) -> Any:
    return jax.vmap(lambda key: sample(key).support.x.mean())(keys).mean()
