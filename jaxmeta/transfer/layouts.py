r"""Names and array layouts of other libraries' weights, and their translation to our networks.

A layout has rules in two steps. The first maps a layer's name to our network
("encoder/stages/0/layers/1/layer/0/convolution" is "params/stage0_block1/layer0_conv"); the second, common to
all layouts of PyTorch, maps the names of a layer's tensors. A leaf that no rule matches keeps its name, which
our network does not have.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxmeta.checks import ArgumentError, join_names
from jaxmeta.nn.vit import Interpolation
from jaxmeta.transfer.subtree import leaves_by_path, rename

# Names under which training code commonly stores a network inside another module.
_WRAPPERS = ("module", "model", "backbone", "encoder", "network", "net", "trunk", "feature_extractor")

Rules = tuple[tuple[re.Pattern[str], str | None], ...]


class Leaf(NamedTuple):
    """A leaf of a file: its name there, its path in our network (None if it is dropped), and its array."""

    name: str
    path: str | None
    array: Any


LayoutName = Literal[
    "flax",
    "huggingface-resnet",
    "torchvision-resnet",
    "dinov2",
    "huggingface-dinov2",
    "huggingface-clip",
    "huggingface-vit",
    "timm-vit",
    "torchvision-vit",
    "torchvision-squeezenet",
]


class Layout(NamedTuple):
    """The naming scheme of the weights of a family of networks.

    Attributes:
      name: name of the layout.
      family: "ResNet", "SqueezeNet", "ViT", "DINOv2" or "CLIP"; None for variables of any Flax network.
      mark: pattern of a name that identifies the layout; the first layout in `LAYOUTS` that matches is taken.
      modules: rules from prefixes of the file's names to prefixes of our paths; None drops a leaf.
      tensors: rules from the file's names of a layer's tensors to ours.
      fused: patterns of tensors that stack query, key and value, and the names of their parts as a template
        for `re.Match.expand`, with `{}` for "query", "key" and "value".
      settings: settings of the network that shapes do not show.
      interpolation: how the library interpolates position embeddings for images of another size, as `method`
        of `jm.nn.resize_positions`.
    """

    name: LayoutName
    family: str | None
    mark: re.Pattern[str]
    modules: Rules = ()
    tensors: Rules = ()
    fused: tuple[tuple[re.Pattern[str], str], ...] = ()
    settings: Mapping[str, Any] = {}
    interpolation: Interpolation = "antialiased"


def _rules(*pairs: tuple[str, str | None]) -> Rules:
    return tuple(
        (re.compile(f"^{theirs}"), None if ours is None else f"params/{ours}") for theirs, ours in pairs
    )


def _in_blocks(block: str, *pairs: tuple[str, str]) -> list[tuple[str, str]]:
    """Return rules for the parts of a ViT's numbered blocks."""
    return [(rf"{block}/{theirs}/", rf"block\1/{ours}/") for theirs, ours in pairs]


_TENSORS = (
    *_rules((r"params/(.*norm)/weight$", r"\1/scale"), (r"params/(.*)/weight$", r"\1/kernel")),
    (re.compile(r"^params/(.*)/running_mean$"), r"batch_stats/\1/mean"),
    (re.compile(r"^params/(.*)/running_var$"), r"batch_stats/\1/var"),
    (re.compile(r"^params/.*/num_batches_tracked$"), None),
)

# CLIP has them without the axis of examples.
_TOKENS = ("params/cls_token", "params/position_embedding")

_KINDS = (("convolution", "conv"), ("normalization", "norm"))

_HUGGINGFACE_RESNET = _rules(
    *((rf"(?:resnet/)?embedder/embedder/{theirs}/", f"stem_{ours}/") for theirs, ours in _KINDS),
    *(
        (
            rf"(?:resnet/)?encoder/stages/(\d+)/layers/(\d+)/{theirs}/{their_kind}/",
            rf"stage\1_block\2/{ours}_{our_kind}/",
        )
        for theirs, ours in ((r"layer/(\d+)", r"layer\3"), ("shortcut", "shortcut"))
        for their_kind, our_kind in _KINDS
    ),
    ("classifier/1/", "head/"),
)

# Torchvision counts stages and convolutions from 1.
_TORCHVISION_RESNET = _rules(
    ("conv1/", "stem_conv/"),
    ("bn1/", "stem_norm/"),
    *(
        (rf"layer{i + 1}/(\d+)/{theirs}/", rf"stage{i}_block\1/{ours}/")
        for i in range(4)
        for theirs, ours in (
            *((f"conv{j + 1}", f"layer{j}_conv") for j in range(3)),
            *((f"bn{j + 1}", f"layer{j}_norm") for j in range(3)),
            ("downsample/0", "shortcut_conv"),
            ("downsample/1", "shortcut_norm"),
        )
    ),
    ("fc/", "head/"),
)

# In memory, Transformers 5 has names that differ from those that it writes by default; both occur in files.
_HUGGINGFACE_VIT = _rules(
    ("(?:vit/)?embeddings/cls_token$", "cls_token"),
    ("(?:vit/)?embeddings/position_embeddings$", "position_embedding"),
    ("(?:vit/)?embeddings/patch_embeddings/projection/", "patch_embedding/"),
    # The token of masked images and the pooler after the features are untrained in most files.
    ("(?:vit/)?embeddings/mask_token$", None),
    ("(?:vit/)?pooler/", None),
    *_in_blocks(
        r"(?:vit/)?(?:encoder/layer|layers)/(\d+)",
        ("layernorm_before", "attention_norm"),
        ("attention/attention/query", "attention/query"),
        ("attention/attention/key", "attention/key"),
        ("attention/attention/value", "attention/value"),
        ("attention/output/dense", "attention/out"),
        ("attention/q_proj", "attention/query"),
        ("attention/k_proj", "attention/key"),
        ("attention/v_proj", "attention/value"),
        ("attention/o_proj", "attention/out"),
        ("layernorm_after", "mlp_norm"),
        ("(?:intermediate/dense|mlp/fc1)", "mlp_in"),
        ("(?:output/dense|mlp/fc2)", "mlp_out"),
    ),
    ("(?:vit/)?layernorm/", "norm/"),
    ("classifier/", "head/"),
)

# The release of DINOv2 has the names of timm.
_TIMM_BLOCKS = _in_blocks(
    r"blocks/(\d+)",
    ("norm1", "attention_norm"),
    ("attn/(query|key|value)", r"attention/\2"),
    ("attn/proj", "attention/out"),
    ("norm2", "mlp_norm"),
    ("mlp/fc1", "mlp_in"),
    ("mlp/fc2", "mlp_out"),
)

_TIMM_VIT = _rules(
    ("cls_token$", "cls_token"),
    ("pos_embed$", "position_embedding"),
    ("patch_embed/proj/", "patch_embedding/"),
    *_TIMM_BLOCKS,
    ("(?:fc_)?norm/", "norm/"),
    ("head/", "head/"),
)

_TORCHVISION_VIT = _rules(
    ("class_token$", "cls_token"),
    ("encoder/pos_embedding$", "position_embedding"),
    ("conv_proj/", "patch_embedding/"),
    *_in_blocks(
        r"encoder/layers/encoder_layer_(\d+)",
        ("ln_1", "attention_norm"),
        ("self_attention/(query|key|value)", r"attention/\2"),
        ("self_attention/out_proj", "attention/out"),
        ("ln_2", "mlp_norm"),
        ("mlp/(?:0|linear_1)", "mlp_in"),
        ("mlp/(?:3|linear_2)", "mlp_out"),
    ),
    ("encoder/ln/", "norm/"),
    ("heads/head/", "head/"),
)

_DINOV2 = _rules(
    ("cls_token$", "cls_token"),
    ("register_tokens$", "register_tokens"),
    ("pos_embed$", "position_embedding"),
    ("mask_token$", None),
    ("patch_embed/proj/", "patch_embedding/"),
    *_TIMM_BLOCKS,
    (r"blocks/(\d+)/ls1/gamma$", r"block\1/attention_scale"),
    (r"blocks/(\d+)/ls2/gamma$", r"block\1/mlp_scale"),
    ("norm/", "norm/"),
    ("head/", "head/"),
)

# As with ViT, files may have the names in memory instead of those that transformers writes.
_PREFIX = "(?:dinov2(?:_with_registers)?/)?"
_HUGGINGFACE_DINOV2 = _rules(
    (f"{_PREFIX}embeddings/cls_token$", "cls_token"),
    (f"{_PREFIX}embeddings/register_tokens$", "register_tokens"),
    (f"{_PREFIX}embeddings/position_embeddings$", "position_embedding"),
    (f"{_PREFIX}embeddings/patch_embeddings/projection/", "patch_embedding/"),
    (f"{_PREFIX}embeddings/mask_token$", None),
    *_in_blocks(
        rf"{_PREFIX}encoder/layer/(\d+)",
        ("norm1", "attention_norm"),
        ("attention/attention/(query|key|value)", r"attention/\2"),
        ("attention/output/dense", "attention/out"),
        ("attention/q_proj", "attention/query"),
        ("attention/k_proj", "attention/key"),
        ("attention/v_proj", "attention/value"),
        ("attention/o_proj", "attention/out"),
        ("norm2", "mlp_norm"),
        ("mlp/fc1", "mlp_in"),
        ("mlp/fc2", "mlp_out"),
    ),
    (rf"{_PREFIX}encoder/layer/(\d+)/layer_scale1/lambda1$", r"block\1/attention_scale"),
    (rf"{_PREFIX}encoder/layer/(\d+)/layer_scale2/lambda1$", r"block\1/mlp_scale"),
    (f"{_PREFIX}layernorm/", "norm/"),
    ("classifier/", "head/"),
)

_HUGGINGFACE_CLIP = _rules(
    ("(?:vision_model/)?embeddings/class_embedding$", "cls_token"),
    ("(?:vision_model/)?embeddings/position_embedding/weight$", "position_embedding"),
    ("(?:vision_model/)?embeddings/patch_embedding/", "patch_embedding/"),
    # A buffer of older files, and the text tower.
    ("(?:vision_model/)?embeddings/position_ids$", None),
    ("text_model/", None),
    ("text_projection/", None),
    ("logit_scale$", None),
    # The library spells the name this way.
    ("(?:vision_model/)?pre_layrnorm/", "embedding_norm/"),
    *_in_blocks(
        r"(?:vision_model/)?encoder/layers/(\d+)",
        ("layer_norm1", "attention_norm"),
        ("self_attn/q_proj", "attention/query"),
        ("self_attn/k_proj", "attention/key"),
        ("self_attn/v_proj", "attention/value"),
        ("self_attn/out_proj", "attention/out"),
        ("layer_norm2", "mlp_norm"),
        ("mlp/fc1", "mlp_in"),
        ("mlp/fc2", "mlp_out"),
    ),
    ("(?:vision_model/)?post_layernorm/", "norm/"),
    ("visual_projection/", "feature_projection/"),
)

# The fire modules are numbered together with activations and poolings.
_TORCHVISION_SQUEEZENET = _rules(
    ("features/0/", "stem/"),
    *((rf"features/{index}/", f"fire{i}/") for i, index in enumerate((3, 4, 6, 7, 9, 10, 11, 12))),
    ("classifier/1/", "head/"),
)

LAYOUTS: dict[LayoutName, Layout] = {
    layout.name: layout
    for layout in (
        Layout("flax", None, re.compile("^params/")),
        Layout(
            "huggingface-resnet",
            "ResNet",
            re.compile("^(resnet/)?embedder/embedder/convolution/weight$"),
            _HUGGINGFACE_RESNET,
            _TENSORS,
        ),
        Layout(
            "torchvision-resnet",
            "ResNet",
            re.compile("^layer1/0/conv1/weight$"),
            _TORCHVISION_RESNET,
            _TENSORS,
        ),
        # DINOv2 is before ViT, which has some of the same names.
        Layout(
            "dinov2",
            "DINOv2",
            re.compile("^blocks/0/ls1/gamma$"),
            _DINOV2,
            _TENSORS,
            ((re.compile(r"/qkv/(weight|bias)$"), r"/{}/\1"),),
            {"epsilon": 1e-6},
            "offset",
        ),
        Layout(
            "huggingface-dinov2",
            "DINOv2",
            re.compile(f"^{_PREFIX}encoder/layer/0/layer_scale1/lambda1$"),
            _HUGGINGFACE_DINOV2,
            _TENSORS,
            settings={"epsilon": 1e-6},
            interpolation="bicubic",
        ),
        Layout(
            "huggingface-clip",
            "CLIP",
            re.compile("^(vision_model/)?embeddings/class_embedding$"),
            _HUGGINGFACE_CLIP,
            _TENSORS,
            settings={"epsilon": 1e-5, "activation": "quick_gelu"},
            interpolation="bicubic",
        ),
        Layout(
            "huggingface-vit",
            "ViT",
            re.compile("^(vit/)?embeddings/patch_embeddings/projection/weight$"),
            _HUGGINGFACE_VIT,
            _TENSORS,
        ),
        Layout(
            "timm-vit",
            "ViT",
            re.compile("^patch_embed/proj/weight$"),
            _TIMM_VIT,
            _TENSORS,
            ((re.compile(r"/qkv/(weight|bias)$"), r"/{}/\1"),),
            {"epsilon": 1e-6},
        ),
        Layout(
            "torchvision-vit",
            "ViT",
            re.compile("^conv_proj/weight$"),
            _TORCHVISION_VIT,
            _TENSORS,
            ((re.compile(r"/in_proj_(weight|bias)$"), r"/{}/\1"),),
            {"epsilon": 1e-6},
        ),
        Layout(
            "torchvision-squeezenet",
            "SqueezeNet",
            # Version 1.0 has a pooling at this index.
            re.compile("^features/6/squeeze/weight$"),
            _TORCHVISION_SQUEEZENET,
            _TENSORS,
        ),
    )
}


def layout_of(leaves: Mapping[str, Any], layout: LayoutName | Literal["auto"], origin: Path) -> Layout:
    """Return the layout with this name, or, for "auto", the one that the names of the leaves match.

    Raises:
      ValueError: if the name is unknown or the names of the leaves match no layout.
    """
    known = ", ".join(LAYOUTS)
    if layout != "auto":
        if layout not in LAYOUTS:
            raise ArgumentError("layout", f'got {layout!r}; it must be "auto" or one of {known}')
        return LAYOUTS[layout]
    for candidate in LAYOUTS.values():
        if any(candidate.mark.search(name) for name in leaves):
            return candidate
    raise ArgumentError(
        "layout",
        f"the names in {origin} ({join_names(sorted(leaves))}) match no known layout ({known}); read them "
        "with jaxmeta.transfer.read_weights, and map them with jaxmeta.transfer.transplant and `rules`",
    )


def without_prefix(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves without wrapper names that all of them begin with, such as "module".

    Training code often keeps a network inside another module, whose name then begins every leaf's name.

    Examples:
      >>> without_prefix({"module/backbone/conv1/weight": 1, "module/backbone/bn1/weight": 2})
      {'conv1/weight': 1, 'bn1/weight': 2}
    """
    stripped = dict(leaves)
    while stripped:
        first, rest = zip(*(name.partition("/")[::2] for name in stripped), strict=True)
        if len(set(first)) > 1 or first[0] not in _WRAPPERS or not all(rest):
            break
        stripped = dict(zip(rest, stripped.values(), strict=True))
    return stripped


def translated(leaves: Mapping[str, Any], layout: Layout, origin: Path) -> list[Leaf]:
    """Return the leaves with our paths and axis order; a leaf that no rule matches keeps its name.

    Raises:
      ValueError: if two leaves have the same path, or a fused leaf does not consist of three equal parts.
    """
    if layout.family is None:
        return [Leaf(name, name, leaf) for name, leaf in leaves.items()]
    # Rules match the name that a part of a fused leaf would have by itself; reports show the file's name.
    labels: dict[str, str] = {}
    arrays: dict[str, Any] = {}
    for name, leaf in leaves.items():
        for part_name, label, array in _parts(name, leaf, layout, origin):
            labels[part_name], arrays[label] = label, array
    try:
        renamed = rename(labels, _applicable(layout.modules, labels))
        renamed = rename(renamed, _applicable(layout.tensors, leaves_by_path(renamed)))
    except ValueError as error:
        raise ArgumentError("path", f"the names in {origin} do not belong to one network: {error}") from error
    paths = {label: path for path, label in leaves_by_path(renamed).items()}
    return [
        Leaf(label, paths.get(label), _as_flax(paths.get(label), array)) for label, array in arrays.items()
    ]


def _parts(name: str, leaf: Any, layout: Layout, origin: Path) -> list[tuple[str, str, Any]]:
    for pattern, template in layout.fused:
        match = pattern.search(name)
        if match is None:
            continue
        if leaf.ndim == 0 or leaf.shape[0] % 3:
            raise ArgumentError(
                "path",
                f"{name} in {origin} stacks query, key and value, and has shape {leaf.shape}; the length "
                "of its first axis must be a multiple of 3",
            )
        return [
            (name[: match.start()] + match.expand(template.format(kind)), f"{name}[{kind}]", part)
            for kind, part in zip(("query", "key", "value"), np.split(leaf, 3), strict=True)
        ]
    return [(name, name, leaf)]


def _applicable(rules: Rules, names: Mapping[str, Any]) -> Rules:
    """Return the rules that match a name; some layers exist only in some networks of a family."""
    return tuple(rule for rule in rules if any(rule[0].search(name) for name in names))


def _as_flax(path: str | None, array: Any) -> Any:
    """Return a kernel with its output channels last, which torch stores first; and tokens with three axes."""
    if path in _TOKENS and array.ndim < 3:
        return array.reshape((1,) * (3 - array.ndim) + array.shape)
    if path is None or not path.startswith("params/") or not path.endswith("/kernel"):
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
