"""Pretrained backbones: a network without its head, and the images that it takes."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmeta.checks import ArgumentError, parsed_json
from jaxmeta.cli.data import ImageSpec
from jaxmeta.cli.names import LEARNERS, NETWORKS, find, width_name
from jaxmeta.cli.sources import renaming
from jaxmeta.core import Model, Params
from jaxmeta.declare import facts_of
from jaxmeta.nn import SqueezeNet, StatefulModel, ViT, as_stateful
from jaxmeta.nn.norm import STATISTICS
from jaxmeta.training import load_params
from jaxmeta.transfer.inputs import ImageInput
from jaxmeta.transfer.layouts import layout_of
from jaxmeta.transfer.preprocessing import IMAGENET, SYMMETRIC
from jaxmeta.transfer.pretrained import Pretrained, load_pretrained
from jaxmeta.transfer.subtree import Report, leaves_by_path
from jaxmeta.transfer.weight_files import HUB

NONE = "none"
# File of weights in a transfer's folder, and the `command` in its config.json.
WEIGHTS, COMMAND = "weights.safetensors", "transfer"
HEAD = "head"
# Command that writes an export, and the program in its folder.
EXPORT, PROGRAM = "export", "classifier.stablehlo"
# Default step sizes of fine-tuning: of published weights, and of other sources.
_PRETRAINED_RATE, _RATE = 1e-4, 1e-3

PIXELS = {"plain": ImageInput(), "imagenet": IMAGENET, "symmetric": SYMMETRIC}


class Input(NamedTuple):
    """Conversion of images into a network's input.

    Attributes:
      images: images that the network takes.
      inverted: True to exchange dark and light.
      pixels: interpolation of the images and normalisation of their pixels.
    """

    images: ImageSpec
    inverted: bool
    pixels: ImageInput

    def adapter(self) -> Model:
        """Return the adapter that does this conversion.

        Raises:
          ArgumentError: `pixels` and the images differ in the number of channels.
        """
        with renaming({"mean": "pixels", "std": "pixels"}):
            pixels = self.pixels._replace(size=self.images.size)
            return pixels.adapter(channels=self.images.channels, invert=self.inverted)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network without its head.

    Attributes:
      source: name of the source, as the user gave it.
      argument: argument that named it, for errors: "source", "sources" or "init".
      about: description of the source, for reports.
      network: module without a head.
      variables: "params" and, where they are known, "batch_stats"; None for an untrained network.
      head: head of the classes that it was trained on, `{"kernel", "bias"}`; None where it has none. It is
        linear in the features, except for SqueezeNet's; see `logits`.
      images: images that it was trained on; None where the source does not say.
      size: side of the images it takes, in pixels; None for any.
      pixels: interpolation of the images it takes and normalisation of their pixels.
      report: report on the leaves that were read.
      rate: default step size of fine-tuning.
      classes: names of the classes of `head`, where they are known.
      inverted: True where a transfer fitted the head to images with dark and light exchanged.
    """

    source: str
    argument: str
    about: str
    network: Any
    variables: dict[str, Any] | None
    head: Params | None
    images: ImageSpec | None
    size: int | None
    pixels: ImageInput
    report: Report
    rate: float = _RATE
    classes: tuple[str, ...] | None = None
    inverted: bool = False

    @property
    def model(self) -> StatefulModel:
        """Return the network as the body of a classifier, with feature maps flattened."""
        model = as_stateful(self.network)

        def flat(z: jax.Array) -> jax.Array:
            return z.reshape(z.shape[0], -1)

        def train(*arguments: Any, **settings: Any) -> tuple[jax.Array, dict[str, Any]]:
            z, state = model.train(*arguments, **settings)
            return flat(z), state

        return model._replace(apply=lambda variables, x: flat(model.apply(variables, x)), train=train)

    def logits(self, variables: dict[str, Any], head: Params, x: jax.Array) -> jax.Array:
        """Return the logits of the classes of a head for inputs of the network.

        Args:
          variables: variables of the network without its head.
          head: head with the form of `self.head`.
          x: images, as the network takes them.
        """
        if is_linear(head):
            return head_logits(head, self.model.apply(variables, x))
        # The classifier of SqueezeNet comes before the mean over space, so that the features are not enough.
        network = self.network.clone(ways=head["bias"].size, classifier="convolution")
        whole = {**variables, "params": {**variables["params"], HEAD: head}}
        return as_stateful(network).apply(whole, x)

    def input(
        self, shape: tuple[int, ...], mean: Callable[[int], float], ink: bool, **requested: Any
    ) -> "Input":
        """Return the conversion of other images into the network's input.

        Args:
          shape: shape of one of these images, (height, width, channels).
          mean: `(channels) -> mean` of their pixels in [0, 1], once they have that many channels.
          ink: True where images of their source are strokes, light on dark in training.
          **requested: `size` and `channels` of the network's input; where one is None or left out, it is
            taken from the images the network was trained on, or else from these images.

        Raises:
          ArgumentError: the network does not take such images, or its pixels have another number of channels.
        """
        size = requested.get("size")
        size = (self.size or shape[0]) if size is None else size
        channels = self.channels(size, requested.get("channels")) or shape[2]
        seen = mean(channels)
        known = self.images or ImageSpec(size, channels, seen, ink)
        # Strokes are light on dark in training; a scan of ink on paper is closer to its negative.
        inverted = known.ink and abs(seen - known.mean) > abs(1 - seen - known.mean)
        return Input(known._replace(size=size, channels=channels), inverted, self.pixels)

    def channels(self, size: int, requested: int | None) -> int | None:
        """Return the number of channels that images of `size` must have; None where the network does not say.

        Raises:
          ArgumentError: the network does not take images of this size, or of this number of channels.
        """
        if self.variables is None:
            self._shapes(size, requested or 1)
            return requested
        stored = None if self.images is None else self.images.channels
        have = {path: leaf.shape for path, leaf in leaves_by_path(self.variables["params"]).items()}
        known = requested or stored
        misfits = {}
        for count in (3, 1) if known is None else (known,):
            wanted = self._shapes(size, count)
            differing = [path for path in {**wanted, **have} if wanted.get(path) != have.get(path)]
            if not differing:
                return count
            path = differing[0]
            kind = "grey" if count == 1 else "colour"
            misfits[kind] = f"its {path} has shape {have.get(path)}, and must have {wanted.get(path)}"
        raise ArgumentError(
            "channels" if requested not in (None, stored) else "size",
            f"{self.source} does not take {' or '.join(misfits)} images of {size}×{size}: "
            f"{next(iter(misfits.values()))}",
        )

    def _shapes(self, size: int, channels: int) -> dict[str, tuple[int, ...]]:
        x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
        with renaming({"x": "size", "image_size": "size"}):
            params = jax.eval_shape(as_stateful(self.network).init, jax.random.key(0), x)["params"]
        return {path: leaf.shape for path, leaf in leaves_by_path(params).items()}


def is_linear(head: Params) -> bool:
    """Return whether a head, `{"kernel", "bias"}`, is a linear layer on the features."""
    return head["kernel"].ndim == 2


def head_logits(head: Params, features: jax.Array) -> jax.Array:
    """Return the logits of a linear head, `{"kernel", "bias"}`."""
    return features @ head["kernel"] + head["bias"][None]


def untrained_backbone(name: str) -> Backbone:
    """Return an untrained network, by its name in `jaxmeta train --network`.

    Raises:
      ArgumentError: no network has this name, or it does not embed images.
    """
    empty = Report((), (), (), ())
    network = _embedding(name)
    return Backbone(
        NONE, "source", f"untrained, {name}", network, None, None, None, None, ImageInput(), empty
    )


def _embedding(name: str) -> Any:
    """Return a network of images without its head, by name."""
    # Networks of model-based methods read labels in addition to images.
    facts = [facts_of(factory) for factory in LEARNERS.values()]
    others = {each for known in facts if known.network is not None for each in known.networks or ()}
    embeddings: dict[str, Callable[..., Any]] = {
        each: build for each, build in NETWORKS.items() if each not in others
    }
    build = find("network", name, embeddings)
    width = width_name(build)
    return build(**({} if width is None else {width: None}))


def load_backbone(
    source: str, *, network: str | None = None, size: int | None = None, argument: str = "source"
) -> Backbone:
    """Load the backbone of a run, of a transfer, or of a file of weights.

    Args:
      source: folder, file or `hf:owner/name`, as `jm.transfer.load_pretrained` reads.
      network: name in `jaxmeta networks`, for a file that does not name its network.
      size: side of a vision transformer's images, for which its position embeddings are interpolated.
      argument: argument that named the source, for errors.

    Returns:
      The backbone.

    Raises:
      ArgumentError: the source does not exist, cannot be read, was not trained on images, or does not name
        its network.
    """
    path = Path(source).expanduser()
    if not source.startswith(HUB) and not path.exists():
        raise ArgumentError(argument, f"{source} does not exist; {_missing_source_advice(source)}")
    if (path / PROGRAM).is_file():
        raise ArgumentError(
            argument, f"{source} is an export, which can only predict; give the run or transfer it came from"
        )
    with renaming({"path": argument, "run_dir": argument, "image_size": "size"}):
        try:
            loaded = load_pretrained(source)
            if isinstance(loaded.network, ViT) and size is not None:
                loaded = load_pretrained(source, image_size=size)
        except ImportError as error:
            raise ArgumentError(argument, str(error)) from error
    backbone = _without_head(source, argument, loaded, network)
    if (path / "checkpoints").is_dir():
        return _from_run(backbone, path)
    config = _transfer_config(path)
    about = f"{source}, {type(backbone.network).__name__}"
    if config is not None:
        return _from_transfer(dataclasses.replace(backbone, about=about), config)
    known = loaded.input
    if known is None:
        return dataclasses.replace(backbone, about=about, size=_side(source, backbone.network, ImageInput()))
    layout = layout_of(
        {str(row.source): None for row in (*loaded.report.taken, *loaded.report.dropped)}, "auto", path
    )
    return dataclasses.replace(
        backbone,
        about=f"{about} ({layout.name})",
        size=_side(source, backbone.network, known),
        pixels=known,
        rate=_PRETRAINED_RATE,
        classes=_labels(path),
    )


# Names of architectures whose weights can be read: in torchvision and in timm.
_TORCHVISION = re.compile(r"resnet(18|34|50|101|152)|vit_([bl]_(16|32)|h_14)|squeezenet1_1")
_TIMM = re.compile(r"((tv_|gluon_)?resnet\d+|(vit|deit)_\w+_patch\d+_\d+)(\.\w+)?")
# Names of DINOv2's release in torch.hub, and of DINOv2 and CLIP in transformers.
_DINOV2 = re.compile(r"dinov2_vit([sbl])14(_reg)?")
_TRANSFORMERS = {
    "dinov2": ("Dinov2Model", "facebook/dinov2-small"),
    "clip": ("CLIPVisionModelWithProjection", "openai/clip-vit-base-patch32"),
}
# Prefixes of other architectures' names, for which the advice lists what can be read.
_OTHERS = re.compile(
    r"alexnet|beit|bit|clip|convnext|deit|densenet|dino|efficientnet|eva|inception|mae|mobilenet|regnet|resnet|"
    r"resnext|siglip|squeezenet|swin|vgg|vit|wide_resnet|xception"
)


def _missing_source_advice(source: str) -> str:
    """Return advice on a source that does not exist, which may be the name of an architecture."""
    on_hub = f"for weights on the Hugging Face Hub, give {HUB}owner/name"
    named = f"{source} is the name of an architecture, and its weights are needed"
    if source in NETWORKS:
        untrained = f"{source} is a network; to use it untrained, give {NONE} with --network {source}"
        if source != "squeezenet":
            return untrained
        save = _save_command("torchvision", "models.squeezenet1_1(weights='DEFAULT')", "squeezenet1_1")
        return f"{untrained}. To write torchvision's weights to a file: {save}"
    if "/" in source or source.endswith((".safetensors", ".msgpack")):
        return on_hub
    if _TORCHVISION.fullmatch(source):
        save = _save_command("torchvision", f"models.{source}(weights='DEFAULT')", source)
        return f"{named}. To write torchvision's weights to a file: {save}; {on_hub}"
    if _TIMM.fullmatch(source):
        save = _save_command("timm", f"create_model('{source}', pretrained=True)", source)
        return f"{named}. Give timm's weights as {HUB}timm/{source}, or write them to a file: {save}"
    if _DINOV2.fullmatch(source):
        model = f"hub.load('facebookresearch/dinov2', '{source}')"
        save = _save_command("torch", model, source)
        return f"{named}. To write the release's weights to a file: {save}; {on_hub}"
    if source.lower() in _TRANSFORMERS:
        kind, owned = _TRANSFORMERS[source.lower()]
        save = (
            f'python -c "from transformers import {kind} as Model; '
            f"Model.from_pretrained('{owned}').save_pretrained('{source.lower()}')\""
        )
        return f"{named}. Give {HUB}{owned}, or write it to a folder: {save}"
    if _OTHERS.match(source.lower()):
        return (
            f"{named}, in a .safetensors file. Weights of a ResNet, SqueezeNet, ViT, DINOv2 or CLIP from "
            "torchvision, timm or transformers can be read, and weights of a network of jaxmeta; "
            f"{on_hub}"
        )
    return on_hub


def _save_command(package: str, model: str, name: str) -> str:
    """Return the shell command that writes the weights of a PyTorch model to a file."""
    code = f"st.save_file({package}.{model}.state_dict(), '{name}.safetensors')"
    return f'python -c "import {package}, safetensors.torch as st; {code}"'


def _from_run(backbone: Backbone, folder: Path) -> Backbone:
    """Return the backbone with the images and the head of a run."""
    # Read as JSON: loading a configuration with user-defined code would import that code.
    try:
        config = parsed_json((folder / "config.json").read_text(encoding="utf-8"))
        learner, tasks, network = (config[group]["name"] for group in ("learner", "tasks", "network"))
        images = None if config["images"] is None else ImageSpec(**config["images"])
        training = config["training"]
        pixels = ImageInput(
            mean=tuple(training["input_mean"]),
            std=tuple(training["input_std"]),
            method=training["input_method"],
        )
        size, channels = training["input_size"], training["input_channels"]
    except (ValueError, TypeError, KeyError) as error:
        raise ArgumentError(backbone.argument, f"{folder / 'config.json'} is damaged: {error!r}") from None
    if images is None:
        raise ArgumentError(
            backbone.argument,
            f"{backbone.source} was trained on {tasks}, which are not images; give one trained on images",
        )
    head = None
    # The outputs of a meta-learned network are slots of a task, not classes of its own.
    if learner in LEARNERS and facts_of(LEARNERS[learner]).supervised:
        head = _known_head(load_params(folder).get(HEAD))
    about = f"{backbone.source}, {learner} on {tasks}, {network}"
    images = images._replace(size=size or images.size, channels=channels or images.channels)
    return dataclasses.replace(
        backbone, about=about, head=head, images=images, size=images.size, pixels=pixels
    )


def _from_transfer(backbone: Backbone, config: Mapping[str, Any]) -> Backbone:
    """Return the backbone with the images and classes in a transfer's config.json."""
    try:
        images, pixels = ImageSpec(**config["images"]), _pixels(config["pixels"])
        classes, inverted = tuple(map(str, config["classes"])), bool(config.get("inverted", False))
    except (TypeError, KeyError, ValueError) as error:
        raise ArgumentError(
            backbone.argument, f"the config.json of {backbone.source} is damaged: {error!r}"
        ) from None
    stopped = config.get("stopped_at")
    return dataclasses.replace(
        backbone,
        about=backbone.about if stopped is None else f"{backbone.about}, stopped after step {stopped}",
        images=images,
        size=images.size,
        pixels=pixels,
        classes=classes,
        inverted=inverted,
    )


def _pixels(stored: Any) -> ImageInput:
    """Return the normalisation and interpolation in a transfer's config.json."""
    # Earlier versions stored the mean and the deviation alone.
    values = stored if isinstance(stored, Mapping) else dict(zip(("mean", "std"), stored, strict=True))
    kept = {name: values[name] for name in ("method",) if name in values}
    return ImageInput(mean=tuple(values["mean"]), std=tuple(values["std"]), **kept)


def _without_head(source: str, argument: str, loaded: Pretrained, name: str | None) -> Backbone:
    """Return loaded weights as a backbone, with the head separated from it."""
    if loaded.network is None and name is None:
        raise ArgumentError(
            "network", f"{source} does not name its network; give one that `jaxmeta networks` lists"
        )
    if loaded.network is not None and name is not None:
        raise ArgumentError("network", f"got {name}, but {source} names its network itself; leave it out")
    network = _embedding(name) if name is not None else with_width(loaded.network, None)
    variables = {
        kind: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
        for kind, tree in loaded.variables.items()
    }
    params = dict(variables["params"])
    head = _known_head(params.pop(HEAD, None))
    body: dict[str, Any] = {"params": params}
    if variables.get(STATISTICS):
        body[STATISTICS] = variables[STATISTICS]
    return Backbone(source, argument, source, network, body, head, None, None, ImageInput(), loaded.report)


def with_width(network: Any, classes: int | None) -> Any:
    """Return the network with a linear head of `classes` outputs, or without a head where it is None."""
    width = width_name(type(network))
    linear = {"classifier": "linear"} if isinstance(network, SqueezeNet) else {}
    return network if width is None else network.clone(**{width: classes}, **linear)


def _known_head(head: Any) -> Params | None:
    return head if isinstance(head, Mapping) and set(head) == {"kernel", "bias"} else None


def _transfer_config(path: Path) -> dict[str, Any] | None:
    """Return the config.json of the transfer that wrote a folder or file of weights; None for others."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file() or (path.is_file() and path.name != WEIGHTS):
        return None
    try:
        config = parsed_json(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return config if isinstance(config, dict) and config.get("command") == COMMAND else None


def _side(source: str, network: Any, known: ImageInput) -> int | None:
    """Return the side of the images that a network takes; None for any.

    Raises:
      ArgumentError: the images are not square.
    """
    size = network.sides if isinstance(network, ViT) else known.size
    if not isinstance(size, tuple):
        return size
    height, width = size
    if height != width:
        raise ArgumentError(
            "size",
            f"{source} takes images of {height}×{width}, and only square ones are supported; give their "
            "side, for which its position embeddings are interpolated",
        )
    return height


def _labels(path: Path) -> tuple[str, ...] | None:
    """Return the class names in the config.json of a folder of weights; None where it has none."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        names = parsed_json((path / "config.json").read_text(encoding="utf-8"))["id2label"]
        return tuple(str(names[str(number)]) for number in range(len(names)))
    return None
