"""The network of a weights file, from the description stored with the weights or from their shapes."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from jaxmeta import nn
from jaxmeta.checks import ArgumentError, parsed_json
from jaxmeta.nn.adapters import switches
from jaxmeta.nn.norm import STATISTICS
from jaxmeta.nn.vit import Interpolation
from jaxmeta.transfer.layouts import Layout

# Numbers of heads of the published widths, for files that do not store the number.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
# The architectures of timm with the same forward pass as ours; others share the names of leaves and compute
# something else.
_TIMM = {
    "ResNet": re.compile(r"(tv_|gluon_)?resnet(18|34|50|101|152)(_v1b)?(\..*)?"),
    "ViT": re.compile(r"(vit|deit)_(tiny|small|base|large|huge)_patch\d+_\d+(\..*)?"),
    "SqueezeNet": re.compile(r"squeezenet1_1(\..*)?"),
    "DINOv2": re.compile(r"vit_(small|base|large)_patch14_dinov2(\..*)?"),
    # Timm's CLIP has the names of its ViT.
    "CLIP": re.compile(r"(?!)"),
}
# Attributes that change a network's outputs and do not show in the shapes of its leaves.
_SHAPELESS: dict[type[linen.Module], tuple[str, ...]] = {
    nn.ViT: ("heads", "epsilon", "pooling", "activation")
}
# Initial value of DINOv2's learned scales.
_LAYER_SCALE = 1e-5
# Names of the layers that DINOv2's giant model has in place of its MLPs.
_SWIGLU = re.compile(r".*/mlp/(w12|w3|weights_in|weights_out|gate_proj|up_proj|down_proj)/(weight|bias)")


def settings_of(
    config: Mapping[str, Any], layout: Layout, stored_network: Any, origin: Path
) -> dict[str, Any]:
    """Return the settings of a network that the shapes of its leaves do not show.

    Args:
      config: content of config.json; empty if the file is missing.
      layout: layout of the file's names.
      stored_network: network that the file describes; None where it describes none.
      origin: file or folder, for messages.

    Raises:
      ValueError: if the forward pass of the file's network differs from ours, or `config` is damaged.
    """
    if layout.family is None:
        return {name: getattr(stored_network, name) for name in _SHAPELESS.get(type(stored_network), ())}
    settings = dict(layout.settings)
    if layout.family == "CLIP" and isinstance(config.get("vision_config"), Mapping):
        config = {**config, **config["vision_config"]}
    if "model_type" in config:
        for name, ours in _HUGGINGFACE[layout.family].items():
            if config.get(name, ours[0]) not in ours:
                raise ArgumentError(
                    "path",
                    f"{name} is {config[name]!r} in the config.json of {origin}; {layout.family} has "
                    f"{' or '.join(map(repr, ours))} and would compute other outputs",
                )
        names = {"num_attention_heads": "heads", "layer_norm_eps": "epsilon", "image_size": "image_size"}
        if layout.family == "CLIP":
            names["hidden_act"] = "activation"
        settings |= {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    elif "architecture" in config:
        architecture = config["architecture"]
        if not _TIMM[layout.family].fullmatch(str(architecture)):
            raise ArgumentError(
                "path",
                f"architecture is {architecture!r} in the config.json of {origin}; its forward pass may "
                f"differ from that of {layout.family}",
            )
        if layout.family == "ViT" and config.get("global_pool") == "avg":
            settings["pooling"] = "mean"
    if layout.family in ("ResNet", "SqueezeNet"):
        return {}
    for name, kinds in {"heads": int, "epsilon": int | float, "image_size": int | list}.items():
        value = settings.get(name, 1)
        sides = value if isinstance(value, list) else [value]
        if (
            not isinstance(value, kinds)
            or len(sides) not in (1, 2)
            or not all(isinstance(side, int | float) and side > 0 for side in sides)
        ):
            raise ArgumentError(
                "path", f"the config.json of {origin} has {name}={value!r}; it must be positive"
            )
    if isinstance(settings.get("image_size"), list):
        height, *width = settings["image_size"]
        settings["image_size"] = (height, *(width or [height]))
    return settings


# Values in the config.json of transformers with which our forward pass is the same.
_HUGGINGFACE: dict[str, dict[str, tuple[Any, ...]]] = {
    "ResNet": {
        "model_type": ("resnet",),
        "hidden_act": ("relu",),
        "downsample_in_bottleneck": (False,),
        "downsample_in_first_stage": (False,),
    },
    "ViT": {"model_type": ("vit",), "hidden_act": ("gelu",)},
    "DINOv2": {
        "model_type": ("dinov2", "dinov2_with_registers"),
        "hidden_act": ("gelu",),
        "use_swiglu_ffn": (False,),
    },
    "CLIP": {"model_type": ("clip", "clip_vision_model"), "hidden_act": ("quick_gelu", "gelu")},
    # Transformers has no SqueezeNet.
    "SqueezeNet": {"model_type": ("squeezenet",)},
}


def network_of(
    leaves: Mapping[str, Any], layout: Layout, settings: Mapping[str, Any], origin: Path
) -> linen.Module:
    """Build the network of our modules that has these leaves.

    Args:
      leaves: arrays by their paths in our network.
      layout: layout of the file, which names the family.
      settings: settings from `settings_of`.
      origin: file or folder, for messages.

    Raises:
      ValueError: if a leaf that determines a size is missing, or the number of heads is unknown.
    """

    def shape(path: str, rank: int) -> tuple[int, ...]:
        size = leaves[path].shape if path in leaves else None
        if size is None or len(size) != rank:
            fault = "is missing" if size is None else f"has shape {size}"
            raise ArgumentError(
                "path", f'{origin} does not hold a {layout.family} ({layout.name}): "{path}" {fault}'
            )
        return size

    head = "params/head/kernel"
    if layout.family == "SqueezeNet":
        if head not in leaves:
            return nn.SqueezeNet()
        return nn.SqueezeNet(shape(head, 4)[3], classifier="convolution")
    ways = shape(head, 2)[1] if head in leaves else None
    if layout.family == "ResNet":
        depths = _counted(leaves, r"params/stage(\d+)_block\d+/layer0_conv/kernel")
        bottleneck = "params/stage0_block0/layer2_conv/kernel" in leaves
        last = f"block0/layer{2 if bottleneck else 1}_conv/kernel"
        return nn.ResNet(
            ways,
            depths=depths,
            channels=tuple(shape(f"params/stage{i}_{last}", 4)[3] for i in range(len(depths))),
            bottleneck=bottleneck,
            stem=shape("params/stem_conv/kernel", 4)[3],
        )
    swiglu = [path for path in leaves if _SWIGLU.fullmatch(path)]
    if layout.family == "DINOv2" and swiglu:
        raise ArgumentError(
            "path",
            f"{origin} has {swiglu[0]}, of the SwiGLU layers of DINOv2's giant model, which jm.nn.ViT "
            "does not have; the small, base and large versions can be read",
        )
    patch, _, _, width = shape("params/patch_embedding/kernel", 4)
    side = round((shape("params/position_embedding", 3)[1] - 1) ** 0.5)
    if "heads" not in settings and width not in _HEADS:
        raise ArgumentError(
            "network",
            f"{origin} does not say how many heads its ViT of width {width} has; pass the network, "
            "as jm.nn.ViT(...)",
        )
    registers, projection = "params/register_tokens", "params/feature_projection/kernel"
    return nn.ViT(
        patch,
        width,
        depth=sum(_counted(leaves, r"params/(block)\d+/attention/query/kernel")),
        mlp=shape("params/block0/mlp_in/kernel", 2)[1],
        ways=ways,
        qkv_bias="params/block0/attention/query/bias" in leaves,
        layer_scale=_LAYER_SCALE if "params/block0/attention_scale" in leaves else None,
        registers=shape(registers, 3)[1] if registers in leaves else 0,
        pre_norm="params/embedding_norm/scale" in leaves,
        patch_bias="params/patch_embedding/bias" in leaves,
        projection=shape(projection, 2)[1] if projection in leaves else None,
        **{"heads": _HEADS.get(width), "image_size": side * patch, **settings},
    )


def interpolation_of(layout: Layout, leaves: Mapping[str, Any]) -> Interpolation:
    """Return how the library of a layout interpolates position embeddings, with leaves by our paths."""
    # DINOv2 with registers differs from DINOv2 without.
    return "antialiased" if "params/register_tokens" in leaves else layout.interpolation


def _counted(leaves: Mapping[str, Any], pattern: str) -> tuple[int, ...]:
    """Return how many paths match, for each text that the pattern's group takes."""
    texts = [match[1] for path in leaves if (match := re.fullmatch(pattern, path))]
    # Sorting by length first puts the tenth after the second.
    return tuple(texts.count(text) for text in sorted(set(texts), key=lambda text: (len(text), text)))


def require_same(network: linen.Module, settings: Mapping[str, Any], origin: Path) -> None:
    """Check that a network of ours computes the same outputs as the one that the file's weights belong to.

    Raises:
      ValueError: if its number of heads, epsilon or pooling differs from the file's.
    """
    for name in _SHAPELESS.get(type(network), ()):
        value = settings.get(name, getattr(network, name))
        if getattr(network, name) != value:
            raise ArgumentError(
                "network", f"got {name}={getattr(network, name)!r}; the network of {origin} has {value!r}"
            )


def default_input(network: Any, leaves: Mapping[str, Any]) -> jax.ShapeDtypeStruct | None:
    """Return an example input for a network of other libraries' weights; None for other networks.

    It has the channels of the network's first kernel.
    """
    if isinstance(network, nn.ViT):
        first, sides = "params/patch_embedding/kernel", network.sides
    elif isinstance(network, nn.ResNet):
        first, sides = "params/stem_conv/kernel", (32, 32)
    elif isinstance(network, nn.SqueezeNet):
        first, sides = "params/stem/kernel", (32, 32)
    else:
        return None
    channels = leaves[first].shape[2] if first in leaves and leaves[first].ndim == 4 else 3
    return jax.ShapeDtypeStruct((1, *sides, channels), jnp.float32)


def variables_of(network: linen.Module, key: Any, x: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return initial variables, and the optional statistics that the network can be called with."""
    variables = dict(network.init(key, x, **switches(network, False)))
    _, state = network.apply(variables, x, **switches(network, False), mutable=[STATISTICS])
    return variables, {} if STATISTICS in variables else dict(state)


def described(network: linen.Module) -> str:
    """Return the JSON description of a network of `jaxmeta.nn`: its class and its non-default attributes.

    Raises:
      ValueError: if the network is of another package, or an attribute has no JSON form.
    """
    kind = type(network)
    if _classes().get(kind.__name__) is not kind:
        raise ArgumentError(
            "network",
            f"got {kind.__name__}; it must be a network of jaxmeta.nn, which every reader can build",
        )
    attributes = {
        field.name: getattr(network, field.name)
        for field in _attributes(kind)
        if getattr(network, field.name) != field.default
    }
    try:
        return json.dumps({"class": kind.__name__, "attributes": attributes})
    except TypeError as error:
        raise ArgumentError(
            "network", f"an attribute of {kind.__name__} cannot be written as JSON: {error}"
        ) from error


def build_described(text: str, origin: Path) -> linen.Module:
    """Build the network of a description by `described`.

    Raises:
      ValueError: if `text` is not a description of a network of `jaxmeta.nn`.
    """
    try:
        description = parsed_json(text)
        kind, attributes = _classes()[description["class"]], description["attributes"]
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in attributes.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArgumentError(
            "path", f"{origin} does not describe a network of jaxmeta.nn: {text[:200]}"
        ) from error


def _classes() -> dict[str, type[linen.Module]]:
    exported = {name: getattr(nn, name) for name in nn.__all__}
    return {
        name: kind
        for name, kind in exported.items()
        if isinstance(kind, type) and issubclass(kind, linen.Module)
    }


def _attributes(kind: type[linen.Module]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if field.name not in ("parent", "name")]  # type: ignore[arg-type]
