"""The images that pretrained weights were trained on, from the files next to the weights or by layout."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxmeta import nn
from jaxmeta.transfer.inputs import ImageInput, Method
from jaxmeta.transfer.layouts import Layout
from jaxmeta.transfer.weight_files import StoredWeights

IMAGENET = ImageInput(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SYMMETRIC = ImageInput(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP = ImageInput(
    224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), method="cubic"
)
_BY_LAYOUT = {
    "huggingface-vit": SYMMETRIC,
    "timm-vit": SYMMETRIC,
    "dinov2": IMAGENET._replace(method="cubic"),
    "huggingface-dinov2": IMAGENET._replace(method="cubic"),
    "huggingface-clip": _CLIP,
}
# Interpolation in preprocessor_config.json, by the numbers of PIL, and in timm's config.json.
_METHODS: dict[Any, Method] = {
    0: "nearest",
    1: "lanczos3",
    2: "linear",
    3: "cubic",
    "nearest": "nearest",
    "bilinear": "linear",
    "bicubic": "cubic",
    "lanczos": "lanczos3",
}


def input_of(stored: StoredWeights, layout: Layout, network: Any) -> ImageInput | None:
    """Return the images that a network was trained on; None for variables of Flax.

    Mean, deviation, size and interpolation are those in preprocessor_config.json or config.json next to the
    weights, and where these say nothing, the usual ones of the layout. The size of a vision transformer is
    that of its position embeddings.

    Args:
      stored: content of the file or folder.
      layout: layout of its names.
      network: its network.
    """
    if layout.family is None:
        return None
    usual = _BY_LAYOUT.get(layout.name, IMAGENET)
    known = usual._replace(**_described(stored.preprocessor or stored.config))
    if isinstance(network, nn.ViT):
        height, width = network.sides
        return known._replace(size=height if height == width else (height, width))
    return known


def trained_size(stored: StoredWeights, network: nn.ViT) -> int:
    """Return the side of the images that DINOv2 is used with, which is not that of its position embeddings.

    It was trained on images of 224, and in the end on some of 518, the size of its position embeddings.
    """
    size = _described(stored.preprocessor or stored.config).get("size", IMAGENET.size)
    largest = min(network.sides)
    side = size if isinstance(size, int) else largest
    return max(network.patch, min(side, largest) // network.patch * network.patch)


def _described(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ImageInput` that a file describes; entries in an unknown form are left out."""
    config = config["pretrained_cfg"] if isinstance(config.get("pretrained_cfg"), Mapping) else config
    found: dict[str, Any] = {}
    mean, std = (config.get(f"image_{name}", config.get(name)) for name in ("mean", "std"))
    if _are_numbers(mean) and _are_numbers(std) and min(std) > 0:
        found |= {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
    if config.get("do_normalize") is False:
        found |= {"mean": (0.0,), "std": (1.0,)}
    method = config.get("resample", config.get("interpolation"))
    if isinstance(method, int | str) and method in _METHODS:
        found["method"] = _METHODS[method]
    cropped = config.get("do_center_crop", True) and "crop_size" in config
    size = _size(config["crop_size"] if cropped else config.get("size"))
    if _are_numbers(config.get("input_size")):
        size = _size(config["input_size"][-1])
    return found | ({} if size is None else {"size": size})


def _size(size: Any) -> int | None:
    """Return the side of square images, by any of transformers' descriptions of a size; None for others."""
    if isinstance(size, Mapping):
        sides = set(size.values()) if set(size) in ({"height", "width"}, {"shortest_edge"}) else set()
        size = sides.pop() if len(sides) == 1 else None
    return size if isinstance(size, int) and size > 0 else None


def _are_numbers(values: Any) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) > 0
        and all(isinstance(value, int | float) for value in values)
    )
