"""What --source means: a network without its head, and the images that it takes."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmeta import config, registry
from jaxmeta.checks import parsed_json
from jaxmeta.config import Form
from jaxmeta.core import Params
from jaxmeta.nn import StatefulModel, ViT, as_stateful
from jaxmeta.nn.norm import STATISTICS
from jaxmeta.settings import lookup
from jaxmeta.transfer.layouts import layout_of
from jaxmeta.transfer.pretrained import Pretrained, load_pretrained
from jaxmeta.transfer.subtree import Report, leaves_by_path

NONE = "none"
# Of a transfer's folder: its weights, and what its config.json says it is.
WEIGHTS, COMMAND = "weights.safetensors", "transfer"
HEAD = "head"
# Those of our networks that have a head have its width in one of these.
_WIDTHS = ("ways", "out")
_IMAGENET_SIZE, _PRETRAINED_RATE, _RATE = 224, 1e-4, 1e-3


class Pixels(NamedTuple):
    """How pixels in [0, 1] enter a network: (x − mean) / std, by channel."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __str__(self) -> str:
        if self == PIXELS["plain"]:
            return "in [0, 1]"
        numbers = [", ".join(f"{value:g}" for value in values) for values in self]
        return f"(x − mean) / std, mean {numbers[0]}, std {numbers[1]}"


PIXELS = {
    "plain": Pixels(),
    "imagenet": Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "symmetric": Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclasses.dataclass(frozen=True)
class Body:
    """A network without its head.

    Attributes:
      source: as the user named it.
      about: the same in a few words.
      network: a module.
      variables: "params" and, where they are known, "batch_stats"; None of a network that nothing was learned
        with.
      head: of the classes that it was trained on, `{"kernel", "bias"}`; None where there were none.
      images: that it was trained on; None where the source does not say.
      size: of the images it takes; None for any.
      pixels: how they enter.
      report: of the leaves that were read.
      rate: step size to fine-tune it with, where none is asked for.
    """

    source: str
    about: str
    network: Any
    variables: dict[str, Any] | None
    head: Params | None
    images: Form | None
    size: int | None
    pixels: Pixels
    report: Report
    rate: float = _RATE

    @property
    def model(self) -> StatefulModel:
        """The network as the body of a classifier: maps are flattened."""
        model = as_stateful(self.network)

        def flat(z: jax.Array) -> jax.Array:
            return z.reshape(z.shape[0], -1)

        def train(*arguments: Any, **settings: Any) -> tuple[jax.Array, dict[str, Any]]:
            z, state = model.train(*arguments, **settings)
            return flat(z), state

        return model._replace(apply=lambda variables, x: flat(model.apply(variables, x)), train=train)

    def channels(self, size: int, asked: int | None) -> int | None:
        """How many channels images of `size` must have; None where the network does not say.

        Raises:
          ValueError: it takes no such images.
        """
        if self.variables is None:
            self._shapes(size, asked or 1)
            return asked
        told = None if self.images is None else self.images.channels
        have = {path: leaf.shape for path, leaf in leaves_by_path(self.variables["params"]).items()}
        known = asked or told
        misfits = {}
        for count in (3, 1) if known is None else (known,):
            wanted = self._shapes(size, count)
            differing = [path for path in {**wanted, **have} if wanted.get(path) != have.get(path)]
            if not differing:
                return count
            path = differing[0]
            kind = "grey" if count == 1 else "colour"
            misfits[kind] = f"its {path} has shape {have.get(path)}, and must have {wanted.get(path)}"
        flag = "--channels" if asked not in (None, told) else "--image-size"
        raise ValueError(
            f"{flag}: {self.source} takes no {' or '.join(misfits)} images of {size}×{size}: "
            f"{next(iter(misfits.values()))}"
        )

    def _shapes(self, size: int, channels: int) -> dict[str, tuple[int, ...]]:
        x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
        try:
            params = jax.eval_shape(as_stateful(self.network).init, jax.random.key(0), x)["params"]
        except ValueError as error:
            raise ValueError(f"--image-size: {re.sub('^(x|image_size): ', '', str(error))}") from error
        return {path: leaf.shape for path, leaf in leaves_by_path(params).items()}


def untrained(name: str) -> Body:
    """A network of `jaxmeta train --network`, with nothing learned.

    Raises:
      ValueError: there is none of that name, or it embeds no images.
    """
    network = lookup("--network", name, _embeddings())(None)
    return Body(NONE, f"nothing, {name}", network, None, None, None, None, Pixels(), Report((), (), (), ()))


def _embeddings() -> dict[str, Any]:
    """Networks of images; those of model-based methods read labels, too."""
    others = {
        name
        for spec in registry.LEARNERS.values()
        if spec.family == "model-based"
        for name in spec.networks or ()
    }
    return {name: build for name, build in registry.NETWORKS.items() if name not in others}


def load_body(
    source: str, *, network: str | None = None, image_size: int | None = None, flag: str = "--source"
) -> Body:
    """The body of a run, of a transfer, or of a file of weights.

    Args:
      source: a folder or file, whatever `jm.transfer.load_pretrained` reads.
      network: a name in `NETWORKS`, of a file that does not tell it.
      image_size: of a vision transformer's images, for which its position embeddings are interpolated.
      flag: that named the source, for messages.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: it cannot be read, was not trained on images, or does not say what network it is of.
    """
    path = Path(source).expanduser()
    with _in_words_of(flag):
        loaded = load_pretrained(source)
        if isinstance(loaded.network, ViT) and image_size is not None:
            loaded = load_pretrained(source, image_size=image_size)
    if (path / "checkpoints").is_dir():
        return _of_run(source, path, loaded, network, flag)
    told = _transfer_config(path)
    names = [row.source for row in (*loaded.report.taken, *loaded.report.dropped)]
    layout = layout_of(dict.fromkeys(map(str, names)), "auto", path)
    body, head = _parted(source, loaded, network)
    about = f"{source}, {type(body.network).__name__}"
    if told:
        pixels = Pixels(*map(tuple, told["pixels"]))
        images = Form(**told["images"])
        return dataclasses.replace(
            body, about=about, head=head, images=images, size=images.size, pixels=pixels
        )
    if layout.family is None:
        return dataclasses.replace(body, about=about, head=head, size=_side(source, body.network))
    return dataclasses.replace(
        body,
        about=f"{about} ({layout.name})",
        head=head,
        size=_side(source, body.network) or _IMAGENET_SIZE,
        pixels=_pixels(path, layout.name),
        rate=_PRETRAINED_RATE,
    )


def _of_run(source: str, folder: Path, loaded: Pretrained, network: str | None, flag: str) -> Body:
    stored, settings = config.stored(folder)
    if not stored["images"]:
        raise ValueError(
            f"{flag}: {source} was trained on {settings.tasks}, which are no images; its network is of no use"
        )
    body, _ = _parted(source, loaded, network)
    images = Form(**stored["images"])
    head = None
    # The outputs of meta-learned networks are slots of a task, and no classes.
    if registry.LEARNERS[settings.learner].supervised:
        head = _linear(config.params_of(folder, stored).get(HEAD))
    about = f"{source}, {settings.learner} on {settings.tasks}, {settings.network}"
    return dataclasses.replace(body, about=about, head=head, images=images, size=images.size)


def _parted(source: str, loaded: Pretrained, name: str | None) -> tuple[Body, Params | None]:
    """Body and head of what was loaded."""
    if loaded.network is None and name is None:
        raise ValueError(
            f"--network: {source} does not say which network it is of; name it, as of `jaxmeta train`"
        )
    if loaded.network is not None and name is not None:
        raise ValueError(
            f"--network: {source} says itself which network it is of; got {name}, which is to be left out"
        )
    network = lookup("--network", name, _embeddings())(None) if name else with_width(loaded.network, None)
    variables = {
        kind: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
        for kind, tree in loaded.variables.items()
    }
    params = dict(variables["params"])
    head = _linear(params.pop(HEAD, None))
    found: dict[str, Any] = {"params": params}
    if variables.get(STATISTICS):
        found[STATISTICS] = variables[STATISTICS]
    body = Body(source, source, network, found, None, None, None, Pixels(), loaded.report)
    return body, head


def with_width(network: Any, classes: int | None) -> Any:
    """The network with a head of so many classes, or without one; one that never has any as it is."""
    widths = [name for name in _WIDTHS if hasattr(network, name)]
    return network.clone(**{widths[0]: classes}) if widths else network


def _linear(head: Any) -> Params | None:
    return head if isinstance(head, Mapping) and set(head) == {"kernel", "bias"} else None


def _transfer_config(path: Path) -> dict[str, Any] | None:
    """config.json of the transfer whose folder, or file of weights, this is."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file() or (path.is_file() and path.name != WEIGHTS):
        return None
    try:
        found = parsed_json(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.get("command") == COMMAND else None


def _side(source: str, network: Any) -> int | None:
    if not isinstance(network, ViT):
        return None
    height, width = network.sides
    if height != width:
        raise ValueError(
            f"--image-size: {source} takes images of {height}×{width}, and here they are square; give their "
            "side, for which its position embeddings are interpolated"
        )
    return height


def _pixels(path: Path, layout: str) -> Pixels:
    """How its makers let pixels in: by the files beside the weights, else as is usual for the layout."""
    for name, keys in (
        ("preprocessor_config.json", ("image_mean", "image_std")),
        ("config.json", ("mean", "std")),
    ):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            found = parsed_json((path / name).read_text(encoding="utf-8"))
            mean, std = (found.get("pretrained_cfg", found)[key] for key in keys)
            return Pixels(tuple(map(float, mean)), tuple(map(float, std)))
    return PIXELS["symmetric" if layout in ("huggingface-vit", "timm-vit") else "imagenet"]


@contextlib.contextmanager
def _in_words_of(flag: str) -> Iterator[None]:
    """What the library says of its arguments, for those who gave flags."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        said = re.sub(r"^(path|run_dir): ", f"{flag}: ", str(error))
        said = re.sub("^image_size: ", "--image-size: ", said)
        raise type(error)(said if said.startswith("--") else f"{flag}: {said}") from error
    except ImportError as error:
        raise ValueError(f"{flag}: {error}") from error
