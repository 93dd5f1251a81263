"""Which network a file's weights are of: by the description beside them, else by their shapes."""

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
from jaxmeta.transfer.layouts import Layout

# Where a file does not say how many heads there are: those of the published widths.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
# Those of timm whose forward pass is ours; others with the same names of leaves compute something else.
_TIMM = {
    "ResNet": re.compile(r"(tv_|gluon_)?resnet(18|34|50|101|152)(_v1b)?(\..*)?"),
    "ViT": re.compile(r"(vit|deit)_(tiny|small|base|large|huge)_patch\d+_\d+(\..*)?"),
}
# What a ViT computes, and its leaves do not show.
_HIDDEN = ("heads", "epsilon", "pooling")


def settings_of(config: Mapping[str, Any], layout: Layout, told: Any, origin: Path) -> dict[str, Any]:
    """What the file says of a ViT beyond the shapes of its leaves: by config.json, or as the network `told`.

    Raises:
      ValueError: the network computes something else than ours, or `config` is damaged.
    """
    if layout.family is None:
        return {name: getattr(told, name) for name in _HIDDEN} if isinstance(told, nn.ViT) else {}
    settings = dict(layout.settings)
    if "model_type" in config:
        asked = {"model_type": layout.family.lower(), **_HUGGINGFACE[layout.family]}
        for name, ours in asked.items():
            if config.get(name, ours) != ours:
                raise ArgumentError(
                    "path",
                    f"{name} is {config[name]!r} in the config.json of {origin}; {layout.family} has "
                    f"{ours!r}, and would give other outputs",
                )
        names = {"num_attention_heads": "heads", "layer_norm_eps": "epsilon", "image_size": "image_size"}
        settings |= {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    elif "architecture" in config:
        architecture = config["architecture"]
        if not _TIMM[layout.family].fullmatch(str(architecture)):
            raise ArgumentError(
                "path",
                f"architecture is {architecture!r} in the config.json of {origin}, which is not known "
                f"to compute what {layout.family} does",
            )
        if layout.family == "ViT" and config.get("global_pool") == "avg":
            settings["pooling"] = "mean"
    if layout.family == "ResNet":
        return {}
    for name, kinds in {"heads": int, "epsilon": int | float, "image_size": int | list}.items():
        value = settings.get(name, 1)
        sides = value if isinstance(value, list) else [value]
        if (
            not isinstance(value, kinds)
            or len(sides) not in (1, 2)
            or not all(isinstance(side, int | float) and side > 0 for side in sides)
        ):
            raise ArgumentError("path", f"the config.json of {origin} has {value!r} for {name}")
    if isinstance(settings.get("image_size"), list):
        height, *width = settings["image_size"]
        settings["image_size"] = (height, *(width or [height]))
    return settings


_HUGGINGFACE: dict[str, dict[str, Any]] = {
    "ResNet": {"hidden_act": "relu", "downsample_in_bottleneck": False, "downsample_in_first_stage": False},
    "ViT": {"hidden_act": "gelu"},
}


def network_of(
    leaves: Mapping[str, Any], layout: Layout, settings: Mapping[str, Any], origin: Path
) -> linen.Module:
    """The network whose leaves, by our paths, these are.

    Raises:
      ValueError: leaves are missing that tell its size, or the file does not tell its number of heads.
    """

    def shape(path: str, rank: int) -> tuple[int, ...]:
        found = leaves[path].shape if path in leaves else None
        if found is None or len(found) != rank:
            what = "is missing" if found is None else f"has shape {found}"
            raise ArgumentError("path", f'{origin} is of no {layout.family} ({layout.name}): "{path}" {what}')
        return found

    ways = shape("params/head/kernel", 2)[1] if "params/head/kernel" in leaves else None
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
    patch, _, _, width = shape("params/patch_embedding/kernel", 4)
    side = round((shape("params/position_embedding", 3)[1] - 1) ** 0.5)
    if "heads" not in settings and width not in _HEADS:
        raise ArgumentError(
            "network",
            f"{origin} does not say how many heads its ViT of width {width} has; give the network, "
            "as jm.nn.ViT(...)",
        )
    return nn.ViT(
        patch,
        width,
        depth=sum(_counted(leaves, r"params/(block)\d+/attention/query/kernel")),
        mlp=shape("params/block0/mlp_in/kernel", 2)[1],
        ways=ways,
        qkv_bias="params/block0/attention/query/bias" in leaves,
        **{"heads": _HEADS.get(width), "image_size": side * patch, **settings},
    )


def _counted(leaves: Mapping[str, Any], pattern: str) -> tuple[int, ...]:
    """How many paths match, for each text of the pattern's group."""
    found = [match[1] for path in leaves if (match := re.fullmatch(pattern, path))]
    # By length first, for the tenth comes after the second.
    return tuple(found.count(text) for text in sorted(set(found), key=lambda text: (len(text), text)))


def require_same(network: linen.Module, settings: Mapping[str, Any], origin: Path) -> None:
    """Refuses a network of ours that would compute something else with the file's weights.

    Raises:
      ValueError: it has another number of heads, epsilon or pooling.
    """
    if not isinstance(network, nn.ViT):
        return
    for name in _HIDDEN:
        value = settings.get(name, getattr(network, name))
        if getattr(network, name) != value:
            raise ArgumentError(
                "network", f"{name} is {getattr(network, name)!r}, and {origin} is of one with {value!r}"
            )


def default_input(network: Any, leaves: Mapping[str, Any]) -> jax.ShapeDtypeStruct | None:
    """An input for a network of ours, with as many channels as its first kernel takes; None for others."""
    if isinstance(network, nn.ViT):
        first, sides = "params/patch_embedding/kernel", network.sides
    elif isinstance(network, nn.ResNet):
        first, sides = "params/stem_conv/kernel", (32, 32)
    else:
        return None
    channels = leaves[first].shape[2] if first in leaves and leaves[first].ndim == 4 else 3
    return jax.ShapeDtypeStruct((1, *sides, channels), jnp.float32)


def variables_of(network: linen.Module, key: Any, x: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fresh variables, and the statistics that the network takes where it is handed some."""
    variables = dict(network.init(key, x, **switches(network, False)))
    _, state = network.apply(variables, x, **switches(network, False), mutable=[STATISTICS])
    return variables, {} if STATISTICS in variables else dict(state)


def described(network: linen.Module) -> str:
    """A network of `jaxmeta.nn` as JSON: its class, and the attributes that are not the default.

    Raises:
      ValueError: it is of another package, or an attribute cannot be written.
    """
    kind = type(network)
    if _classes().get(kind.__name__) is not kind:
        raise ArgumentError(
            "network", f"got {kind.__name__}; it must be one of jaxmeta.nn, which a reader can build"
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
            "network", f"an attribute of {kind.__name__} cannot be written: {error}"
        ) from error


def rebuilt(text: str, origin: Path) -> linen.Module:
    """The network that `described` described.

    Raises:
      ValueError: `text` describes none.
    """
    try:
        description = parsed_json(text)
        kind, attributes = _classes()[description["class"]], description["attributes"]
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in attributes.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArgumentError("path", f"{origin} describes no network of jaxmeta.nn: {text[:200]}") from error


def _classes() -> dict[str, type[linen.Module]]:
    found = {name: getattr(nn, name) for name in nn.__all__}
    return {
        name: kind
        for name, kind in found.items()
        if isinstance(kind, type) and issubclass(kind, linen.Module)
    }


def _attributes(kind: type[linen.Module]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if field.name not in ("parent", "name")]  # type: ignore[arg-type]
