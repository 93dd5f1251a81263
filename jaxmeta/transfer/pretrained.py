"""Loading of pretrained weights into Flax networks, and saving of variables."""

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jaxtyping import Array

from jaxmeta import nn
from jaxmeta.checks import ArgumentError
from jaxmeta.core import Key, PyTree
from jaxmeta.nn.norm import STATISTICS
from jaxmeta.nn.vit import Interpolation
from jaxmeta.paths import shortened
from jaxmeta.transfer import weight_files
from jaxmeta.transfer.architectures import (
    build_described,
    default_input,
    described,
    interpolation_of,
    network_of,
    require_same,
    settings_of,
    variables_of,
)
from jaxmeta.transfer.inputs import ImageInput
from jaxmeta.transfer.layouts import LayoutName, Leaf, layout_of, translated, without_prefix
from jaxmeta.transfer.preprocessing import input_of, trained_size
from jaxmeta.transfer.subtree import Report, leaves_by_path, rename, transplant

_POSITIONS = "params/position_embedding"


class Pretrained(NamedTuple):
    """A network with its pretrained variables.

    Attributes:
      network: the network; None where a file of Flax variables does not describe it.
      variables: `{"params", "batch_stats"}`, for `network.apply(variables, x)`; the latter is empty if the
        file has no statistics.
      report: how each leaf of the file was used.
      input: the images that the network was trained on, whose `adapter` converts others; None where the file
        does not belong to a library with known ones.
    """

    network: Any
    variables: dict[str, Any]
    report: Report
    input: ImageInput | None = None


def load_pretrained(
    path: str | os.PathLike[str],
    network: linen.Module | None = None,
    *,
    x: Array | np.ndarray | jax.ShapeDtypeStruct | tuple[int, ...] | None = None,
    head: bool = True,
    image_size: int | Sequence[int] | None = None,
    layout: LayoutName | Literal["auto"] = "auto",
    strict: bool = True,
    key: Key | None = None,
    revision: str | None = None,
) -> Pretrained:
    """Load pretrained weights into their network, with a check of every leaf.

    The outputs are those of the PyTorch network in evaluation mode, up to float32 rounding, with images as
    (n, h, w, c). The layout is recognised by the names of the leaves:

    | network | of | layout |
    | --- | --- | --- |
    | `jm.nn.ResNet` | torchvision and timm; transformers | "torchvision-resnet"; "huggingface-resnet" |
    | `jm.nn.SqueezeNet` | torchvision's squeezenet1_1 | "torchvision-squeezenet" |
    | `jm.nn.ViT` | transformers; timm; torchvision | "huggingface-vit"; "timm-vit"; "torchvision-vit" |
    | `jm.nn.ViT` | DINOv2 as released and in timm; transformers | "dinov2"; "huggingface-dinov2" |
    | `jm.nn.ViT` | the image tower of CLIP in transformers | "huggingface-clip" |
    | any of Flax | `flax.serialization`, Orbax, jaxmeta | "flax" |

    The features of DINOv2 are its normalised class token; its giant version, with SwiGLU layers, is refused.
    Those of CLIP are projected where the file has the projection, and otherwise its normalised class token;
    the text tower is dropped. Prefixes of all names, such as "module" or "backbone", are dropped.

    A network with the same leaves and another forward pass, such as timm's resnetblur50, is recognised by its
    config.json only; without that file, its weights are loaded and the outputs differ.

    Pickles are never opened: of PyTorch's files, only safetensors are read.

    Args:
      path: path of a .safetensors file; a folder with model.safetensors, whole or in shards, and a
        config.json, as written by transformers' `save_pretrained`; a .msgpack file of `flax.serialization`;
        an Orbax checkpoint; a run folder of `jaxmeta train`; or "hf:owner/name" on the Hugging Face Hub, from
        which only safetensors and their JSON files are fetched.
      network: network whose variables to fill, in the dtypes of its `init`. None builds it from config.json,
        from the description by `jm.transfer.save_pretrained`, or from the shapes; leaves then keep the file's
        dtypes.
      x: example input of `network`, or its shape; needed only for networks other than `jm.nn.ResNet`,
        `jm.nn.SqueezeNet` and `jm.nn.ViT`.
      head: whether to load the classifier "head". With False, the network is built without one, and a passed
        network with a head gets a new one by `key`. A network without a head leaves it out in any case.
      image_size: size of a ViT's images if it differs from the file's. By default it is 224 for DINOv2, whose
        position embeddings are for 518, or what the file's preprocessor_config.json says. Position
        embeddings are interpolated by `jm.nn.resize_positions`, in the way of the file's library for DINOv2
        and CLIP.
      layout: name of the layout; "auto" recognises it.
      strict: whether file and network must have the same leaves. With False, leaves that the file lacks are
        initialised by `key`, and leaves that the network lacks are left over.
      key: key of the leaves that the file does not fill.
      revision: branch, tag or commit on the Hub.

    Returns:
      Network, variables, report and input; `str(report)` is a table. Leaves that are not needed, such as
      torch's `num_batches_tracked` or the pooler of ViTModel, are listed there as dropped. Integers and
      floats of 64 bits stay NumPy arrays if JAX has 64 bits disabled.

    Raises:
      FileNotFoundError: if `path` does not exist.
      ImportError: if a package that reads the format is not installed.
      ValueError: if the file is damaged, a pickle, or of an unknown format or layout; if leaves are missing,
        unknown or of another shape, which the message names; if the network's forward pass differs from the
        file's (in activation or number of heads); if `x` or `key` is needed and missing.

    Examples:
      >>> import tempfile, jax, jax.numpy as jnp, jaxmeta as jm
      >>> network = jm.nn.ResNet(ways=10, depths=(1,), channels=(8,), stem=8)
      >>> variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> folder = tempfile.TemporaryDirectory()
      >>> save_pretrained(f"{folder.name}/small.safetensors", variables, network=network)
      >>> features = load_pretrained(f"{folder.name}/small.safetensors", head=False)
      >>> jax.jit(features.network.apply)(features.variables, jnp.zeros((2, 32, 32, 3))).shape
      (2, 8)
      >>> [row.source for row in features.report.dropped]
      ['params/head/bias', 'params/head/kernel']
      >>> new = network.clone(ways=5)
      >>> loaded = load_pretrained(
      ...     f"{folder.name}/small.safetensors", new, head=False, key=jax.random.key(1)
      ... )
      >>> loaded.variables["params"]["head"]["kernel"].shape
      (8, 5)
      >>> folder.cleanup()
    """
    stored = weight_files.read(path, revision)
    origin = stored.origin
    unwrapped = without_prefix(stored.leaves)
    naming = layout_of(unwrapped, layout, origin)
    file_network = stored.network
    if "network" in stored.metadata:
        file_network = build_described(stored.metadata["network"], origin)
    settings = settings_of(stored.config, naming, file_network, origin)
    leaves = translated(unwrapped, naming, origin)
    if not head:
        leaves = _without(leaves, _in_head)
    arrays = {leaf.path: leaf.array for leaf in leaves if leaf.path is not None}

    built = network is None
    if network is not None:
        require_same(network, settings, origin)
    elif naming.family is not None:
        network = network_of(arrays, naming, settings, origin)
    else:
        network = file_network if head or file_network is None else _headless(file_network)
    if built and image_size is None and naming.family == "DINOv2" and isinstance(network, nn.ViT):
        image_size = trained_size(stored, network)
    if image_size is not None:
        network, leaves = _for_images(network, leaves, image_size, built, interpolation_of(naming, arrays))

    example = _example(x) if x is not None else default_input(network, arrays)
    if example is None and not built:
        raise ArgumentError(
            "x", f"got None; {type(network).__name__} needs an example input, or its shape, to be initialised"
        )
    # Files of other libraries always hold the statistics of batch normalisations; our own lack them if the
    # network was never calibrated.
    statistics = naming.family is not None or any(path.startswith(f"{STATISTICS}/") for path in arrays)
    # If the network is unknown, the expected leaves are those of the file.
    target = _nested(arrays, origin) if example is None else _target(network, example, statistics)
    expected = leaves_by_path(target)
    if not any(map(_in_head, expected)):
        leaves = _without(leaves, _in_head)
    if naming.family is None:
        # A training state also holds the optimizer's state and a step counter.
        leaves = _without(leaves, lambda path: path.split("/")[0] not in {"params", STATISTICS, *target})
    missing = _check(leaves, expected, origin, strict, head)
    if missing and key is None:
        raise ArgumentError(
            "key",
            f"got None, and {origin} does not fill {', '.join(shortened(missing))}; pass a key to "
            "initialise them",
        )
    if missing and example is not None:
        target = _target(network, example, statistics, key)
    filled = _filled(target, leaves, origin, as_stored=built)
    return Pretrained(network, *filled, input_of(stored, naming, network))


def read_weights(path: str | os.PathLike[str], revision: str | None = None) -> dict[str, Any]:
    """Read the weights in a file or folder as a nested dict, with the names and axes of their library.

    Use it for networks that `load_pretrained` does not know: `jm.transfer.transplant` puts the weights into
    another network's parameters by rules. Torch stores kernels as (out, in, height, width) and (out, in),
    Flax as (height, width, in, out) and (in, out).

    Args:
      path: path of the weights; see `load_pretrained`.
      revision: branch, tag or commit on the Hub.

    Returns:
      NumPy arrays; torch's name "layer1.0.conv1.weight" is the path "layer1/0/conv1/weight".

    Raises:
      FileNotFoundError: if `path` does not exist.
      ImportError: if a package that reads the format is not installed.
      ValueError: if the file is damaged, a pickle, or of an unknown format, or the name of a leaf is also the
        prefix of another.

    Examples:
      >>> weights = read_weights("resnet/model.safetensors")  # doctest: +SKIP
      >>> rules = [("layer*/*/conv*/weight", "stage_*/block_*/conv_*/kernel")]
      >>> transplant(weights, params, rules=rules, strict=False)  # doctest: +SKIP
    """
    stored = weight_files.read(path, revision)
    return _nested(stored.leaves, stored.origin)


def save_pretrained(
    path: str | os.PathLike[str],
    variables: Mapping[str, Any],
    *,
    network: linen.Module | None = None,
    overwrite: bool = False,
) -> None:
    """Write the variables of a Flax network to one safetensors file, to share with others.

    Names are paths, such as "params/body/kernel"; `load_pretrained` and any reader of safetensors read every
    leaf back with its bits and dtype.

    Args:
      path: path of the new file, with the suffix .safetensors.
      variables: nested dicts of arrays, with "params".
      network: network of `jaxmeta.nn` to describe in the file, so that `load_pretrained` can build it; None
        for no description.
      overwrite: whether to replace an existing file.

    Raises:
      FileExistsError: if `path` exists and `overwrite` is False.
      ImportError: if safetensors is not installed.
      ValueError: if the suffix is another, "params" is missing, a node is not a dict, a key is not a string
        without "/", a leaf is not an array, or `network` is of another package.

    Examples:
      >>> import tempfile, jax.numpy as jnp
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_pretrained(f"{folder}/weights.safetensors", {"params": {"w": jnp.arange(3.0)}})
      ...     print(load_pretrained(f"{folder}/weights.safetensors").variables["params"]["w"])
      [0. 1. 2.]
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ArgumentError("path", f"got {path}; it must end in .safetensors")
    if path.exists() and not overwrite:
        raise FileExistsError(f"path: {path} exists; pass overwrite=True to replace it")
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        names = sorted(map(str, variables)) if isinstance(variables, Mapping) else type(variables).__name__
        raise ArgumentError("variables", f'got {names}; they must be a dict with a dict "params"')
    metadata = {"format": "flax"} | ({} if network is None else {"network": described(network)})
    weight_files.write(path, dict(_flat(variables, ())), metadata)


def _flat(node: Any, parts: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    at = "/".join(parts)
    if isinstance(node, Mapping):
        for key, child in node.items():
            if not isinstance(key, str) or "/" in key or not key:
                raise ArgumentError(
                    "variables", f'got the key {key!r} in "{at}"; keys must be names without "/"'
                )
            yield from _flat(child, (*parts, key))
    elif isinstance(node, jax.Array | np.ndarray | np.generic):
        yield at, node
    else:
        raise ArgumentError(
            "variables", f'got {type(node).__name__} at "{at}"; it must be a dict or an array'
        )


def _nested(leaves: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    try:
        return rename(leaves, ())
    except ValueError as error:
        raise ArgumentError("path", f"the names in {origin} do not form a tree: {error}") from error


def _in_head(path: str) -> bool:
    return path.startswith("params/head/")


def _example(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, tuple):
        return jax.ShapeDtypeStruct(x, jnp.float32)
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _target(network: Any, x: jax.ShapeDtypeStruct, statistics: bool, key: Key | None = None) -> PyTree:
    """Return the variables to fill, as values if there is a `key`, else as shapes."""
    init = functools.partial(variables_of, network)
    if key is None:
        variables, optional = jax.eval_shape(init, jax.random.key(0), x)
    else:
        variables, optional = jax.jit(init)(key, jnp.zeros(x.shape, x.dtype))
    return {**variables, **(optional if statistics else {})}


def _for_images(
    network: Any,
    leaves: list[Leaf],
    image_size: int | Sequence[int],
    built: bool,
    interpolation: Interpolation,
) -> tuple[Any, list[Leaf]]:
    """Return the network for images of another size, and the leaves with interpolated position embeddings."""
    if not isinstance(network, nn.ViT):
        raise ArgumentError(
            "image_size", f"got {image_size} for {type(network).__name__}, which takes any size"
        )
    resized = network.clone(image_size=image_size)
    if not built and network.sides != resized.sides:
        raise ArgumentError("image_size", f"got {image_size}; the passed network is for {network.sides}")
    return resized, [
        leaf._replace(
            array=np.asarray(
                nn.resize_positions(
                    jnp.asarray(leaf.array),
                    resized.grid,
                    network.grid if built else None,
                    method=interpolation,
                )
            )
        )
        if leaf.path == _POSITIONS and leaf.array.ndim == 3
        else leaf
        for leaf in leaves
    ]


def _headless(network: Any) -> Any:
    if not hasattr(network, "ways"):
        raise ArgumentError("head", f"got False, but {type(network).__name__} has no head to leave out")
    return network.clone(ways=None)


def _without(leaves: list[Leaf], unused: Callable[[str], bool]) -> list[Leaf]:
    return [leaf._replace(path=None) if leaf.path and unused(leaf.path) else leaf for leaf in leaves]


def _check(
    leaves: list[Leaf], expected: Mapping[str, Any], origin: Path, strict: bool, head: bool
) -> list[str]:
    """Return the paths that the file does not fill, where `strict` and `head` allow it.

    Raises:
      ValueError: if leaves are missing, unknown, or of another shape.
    """
    problems = []
    by_path = {leaf.path: leaf for leaf in leaves if leaf.path is not None}
    missing = [path for path in expected if path not in by_path]
    if strict:
        problems += [f'"{path}" is missing' for path in missing if head or not _in_head(path)]
        problems += [
            f'"{leaf.name}" is unknown to the network'
            for path, leaf in by_path.items()
            if path not in expected
        ]
    for path in [path for path in expected if path in by_path]:
        actual, required = tuple(by_path[path].array.shape), tuple(expected[path].shape)
        if actual != required:
            in_file = "" if by_path[path].name == path else f' (the file\'s "{by_path[path].name}")'
            hint = "; image_size= interpolates it" if path == _POSITIONS else ""
            hint = "; head=False replaces it by a new one from key" if _in_head(path) else hint
            problems.append(f'"{path}"{in_file} has shape {actual}; it must be {required}{hint}')
    if problems:
        listed = "\n  ".join(shortened(problems))
        raise ArgumentError("path", f"{origin} does not fit the network:\n  {listed}")
    return missing


def _filled(
    target: PyTree, leaves: list[Leaf], origin: Path, as_stored: bool
) -> tuple[dict[str, Any], Report]:
    """Return the target with the leaves in their places, in their own dtypes if `as_stored`."""
    arrays = {leaf.path: leaf.array for leaf in leaves if leaf.path is not None}

    def template(path: str, leaf: Any) -> Any:
        if path not in arrays:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, arrays[path].dtype if as_stored else leaf.dtype)

    templates = [template(path, leaf) for path, leaf in leaves_by_path(target).items()]
    rules = [
        (re.compile(rf"^{re.escape(leaf.name)}\Z"), leaf.path and leaf.path.replace("\\", r"\\"))
        for leaf in leaves
        if leaf.path != leaf.name
    ]
    source = {leaf.name: leaf.array for leaf in leaves}
    try:
        variables, report = transplant(
            source,
            jax.tree.unflatten(jax.tree.structure(target), templates),
            rules=rules,
            strict=False,
            cast=True,
        )
    except ValueError as error:
        raise ArgumentError("path", f"{origin} does not fit the network: {error}") from error
    return {STATISTICS: {}, **jax.tree.map(_as_jax, variables)}, report


def _as_jax(leaf: Any) -> Any:
    # With 64 bits disabled, JAX would truncate the values.
    return jnp.asarray(leaf) if jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype else leaf
