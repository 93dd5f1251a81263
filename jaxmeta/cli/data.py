"""What a run keeps of its data, to know them again and to read other images alike."""

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
    """What images a run was trained on.

    Attributes:
      size: side in pixels.
      channels: 1 or 3.
      mean: of all pixels, in [0, 1].
      ink: whether they are strokes, light on dark.
    """

    size: int
    channels: int
    mean: float
    ink: bool

    def __str__(self) -> str:
        return f"{self.size} × {self.size}, {'grey' if self.channels == 1 else 'colour'}"


def image_spec(tasks: TaskDistribution | TaskStream, ink: bool) -> ImageSpec | None:
    """Return what images tasks are of; None where they are of something else."""
    shape = _shape(tasks)
    if len(shape) != 4 or shape[-1] not in (1, 3):
        return None
    if isinstance(tasks, TaskStream):
        mean = tasks.at(0).support.x.mean()
    else:
        mean = _mean(sample_of(tasks), jax.random.split(jax.random.key(0), 16))
    return ImageSpec(shape[1], shape[-1], round(float(mean), 4), ink)


def images_of(config: Config) -> ImageSpec | None:
    """Return what images a stored run was trained on.

    Raises:
      ValueError: its configuration says something else of them.
    """
    if config.images is None:
        return None
    try:
        size, channels, mean, ink = (config.images[name] for name in ImageSpec._fields)
        return ImageSpec(int(size), int(channels), float(mean), bool(ink))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the configuration's images are damaged: {error!r}") from None


def with_image_settings(config: Config, images: ImageSpec | None) -> Config:
    """Return the configuration with the size and channels that one's own images turned out to have.

    Kept with the run, they hold when images of another kind join the folder.
    """
    if images is None:
        return config
    known = {"size": images.size, "channels": images.channels}
    unset = [name for name in known if config.tasks.get(name, known) is None]
    return config.replaced(tasks={name: known[name] for name in unset})


def check_data(config: Config, tasks: TaskDistribution | TaskStream, folder: Path) -> None:
    """Refuse data that are no longer those that the run in `folder` was trained on.

    Raises:
      ArgumentError: the classes are shared out otherwise, so that a class to test on may be one that was
        trained on; or the images have another shape.
    """
    name = config.tasks["name"]
    check_images(config, tasks, folder, name)
    now = card_of(tasks).split_hash
    if config.split_hash != now:
        raise ArgumentError(
            "tasks",
            f"the classes of {name}, or how they are split, are no longer those that the run in {folder} was "
            f"trained on (split {str(config.split_hash)[:8]} then, {str(now)[:8]} now)",
        )


def check_images(config: Config, tasks: TaskDistribution | TaskStream, folder: Path, name: str) -> None:
    """Refuse images of another shape than those that the run in `folder` was trained on.

    Raises:
      ArgumentError: they have another.
    """
    images = images_of(config)
    if images is None:
        return
    shape = _shape(tasks)[1:]
    before = (images.size, images.size, images.channels)
    if shape != before:
        raise ArgumentError(
            "tasks",
            f"the images of {name} have shape {shape}, and those that the run in {folder} was trained "
            f"on {before}",
        )


def _shape(tasks: TaskDistribution | TaskStream) -> tuple[int, ...]:
    """Return the shape of the support examples of one task."""
    return jax.eval_shape(sample_of(tasks), jax.random.key(0)).support.x.shape


# The sampler, and with it the data, is an argument: closed over, it would be compiled in as a constant.
@jax.jit
def _mean(sample: Callable[[Key], Task], keys: Array) -> Any:
    return jax.vmap(lambda key: sample(key).support.x.mean())(keys).mean()
