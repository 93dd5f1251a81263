"""Weights that others, or we, have trained, as variables of a Flax network."""

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
from jaxmeta.paths import shortened
from jaxmeta.transfer import weight_files
from jaxmeta.transfer.architectures import (
    default_input,
    described,
    network_of,
    rebuilt,
    require_same,
    settings_of,
    variables_of,
)
from jaxmeta.transfer.layouts import LayoutName, Leaf, layout_of, translated, without_prefix
from jaxmeta.transfer.subtree import Report, leaves_by_path, rename, transplant

_POSITIONS = "params/position_embedding"


class Pretrained(NamedTuple):
    """A network with its weights.

    Attributes:
      network: a module; None where a file of Flax variables does not tell it.
      variables: `{"params", "batch_stats"}`, for `network.apply(variables, x)`; the latter is empty where the
        file has no statistics.
      report: what became of each of the file's leaves.
    """

    network: Any
    variables: dict[str, Any]
    report: Report


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
    """Pretrained weights in the network they are of, every leaf checked.

    The outputs are those of the PyTorch network in evaluation mode, to float32's rounding: `jm.nn.ResNet` and
    `jm.nn.ViT` compute the same, images as (n, h, w, c). Layouts that are known by the names of their leaves:
    ResNet and ViT of Hugging Face's transformers ("huggingface-resnet", "huggingface-vit"), of torchvision
    ("torchvision-resnet", "torchvision-vit") and of timm ("torchvision-resnet" again, "timm-vit"), and
    variables of any Flax network ("flax").

    Names that begin every leaf's, such as "module" or "backbone", are dropped.

    No pickle is ever opened: of PyTorch's files only safetensors are read.

    Args:
      path: a .safetensors file; a folder with model.safetensors, whole or in shards, and a config.json, as of
        transformers' `save_pretrained`; a .msgpack file of `flax.serialization`; an Orbax checkpoint; a run's
        folder of `jaxmeta train`; or "hf:owner/name", of the Hugging Face Hub, of which only safetensors and
        their JSON are fetched.
      network: whose variables to fill, in the dtypes of its `init`. None builds it: by config.json, by what
        `jm.transfer.save_pretrained` was told, or by the shapes; the leaves then keep the file's dtypes.
      x: an example input of `network`, or its shape; only needed of other networks than `jm.nn.ResNet` and
        `jm.nn.ViT`.
      head: False leaves the classifier "head" out: the network is built without one, and a given network that
        has one gets a new one by `key`. A network without a head leaves it out in any case.
      image_size: of a ViT's images, where it is not the file's; position embeddings are interpolated by
        `jm.nn.resize_positions`.
      layout: "auto", or the name of one.
      strict: whether the leaves of file and network must be the same. Otherwise what the file lacks is
        initialised by `key`, and what the network lacks is left over.
      key: initialises what the file does not fill.
      revision: branch, tag or commit on the Hub.

    Returns:
      Network, variables, and the report, whose `str()` is a table. Leaves without use, such as torch's
      `num_batches_tracked` or the pooler of ViTModel, are listed there as dropped. Integers and floats of 64
      bits stay NumPy arrays where JAX has none.

    A network with the same leaves and another forward pass, such as timm's resnetblur50, is told by its
    config.json, and by nothing where that is missing.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ImportError: a package that reads the format is not installed.
      ValueError: the file is damaged, a pickle, or of no known format or layout; leaves are missing, unknown
        or of another shape, each with its name; the network would compute something else with these weights
        (another activation or number of heads); a missing `x` or `key`.

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
    found = layout_of(unwrapped, layout, origin)
    told = rebuilt(stored.metadata["network"], origin) if "network" in stored.metadata else stored.network
    settings = settings_of(stored.config, found, told, origin)
    leaves = translated(unwrapped, found, origin)
    if not head:
        leaves = _without(leaves, _in_head)
    given = {leaf.path: leaf.array for leaf in leaves if leaf.path is not None}

    built = network is None
    if network is not None:
        require_same(network, settings, origin)
    elif found.family is not None:
        network = network_of(given, found, settings, origin)
    else:
        network = told if head or told is None else _headless(told)
    if image_size is not None:
        network, leaves = _for_images(network, leaves, image_size, built)

    example = _example(x) if x is not None else default_input(network, given)
    if example is None and not built:
        raise ArgumentError(
            "x", f"{type(network).__name__} needs an example input, or its shape, to be initialised"
        )
    # Our own may be of a network that was never calibrated; without any, another's is of no batch norm.
    statistics = found.family is not None or any(path.startswith(f"{STATISTICS}/") for path in given)
    # Of a network that we cannot run, the file alone tells the leaves.
    target = _nested(given, origin) if example is None else _target(network, example, statistics)
    wanted = leaves_by_path(target)
    if not any(map(_in_head, wanted)):
        leaves = _without(leaves, _in_head)
    if found.family is None:
        # Of a training state only what is the network's.
        leaves = _without(leaves, lambda path: path.split("/")[0] not in {"params", STATISTICS, *target})
    missing = _check(leaves, wanted, origin, strict, head)
    if missing and key is None:
        raise ArgumentError(
            "key",
            f"got None, and {origin} does not fill {', '.join(shortened(missing))}; it initialises them",
        )
    if missing and example is not None:
        target = _target(network, example, statistics, key)
    return Pretrained(network, *_filled(target, leaves, origin, as_stored=built))


def read_weights(path: str | os.PathLike[str], revision: str | None = None) -> dict[str, Any]:
    """The weights in a file or folder as they are, names and axes of their maker, as a nested dict.

    For networks that `load_pretrained` does not know: `jm.transfer.transplant` puts them into another's
    parameters by rules. Torch has kernels as (out, in, height, width) and (out, in), Flax as (height, width,
    in, out) and (in, out).

    Args:
      path, revision: as of `load_pretrained`.

    Returns:
      NumPy arrays; torch's name "layer1.0.conv1.weight" is the path "layer1/0/conv1/weight".

    Raises:
      FileNotFoundError, ImportError: as of `load_pretrained`.
      ValueError: the file is damaged, a pickle, or of no known format; one name leads through another.

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
    """Writes variables of a Flax network as one safetensors file, to share with others.

    Names are paths, "params/body/kernel"; `load_pretrained` and any reader of safetensors read it back, every
    bit and dtype as it was.

    Args:
      path: of the file to make, which ends in .safetensors.
      variables: nested dicts of arrays, with "params".
      network: one of `jaxmeta.nn`, which the file then describes, so that `load_pretrained` needs none.
      overwrite: replace what is at `path`.

    Raises:
      FileExistsError: `path` exists and `overwrite` is False.
      ImportError: safetensors is not installed.
      ValueError: another suffix; variables without "params"; a node that is no dict, a key that is no string
        or has a "/", or a leaf that is no array; a `network` of another package.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ArgumentError("path", f"got {path}; it must end in .safetensors")
    if path.exists() and not overwrite:
        raise FileExistsError(f"path: {path} exists; pass overwrite=True to replace it")
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        names = sorted(map(str, variables)) if isinstance(variables, Mapping) else type(variables).__name__
        raise ArgumentError("variables", f'got {names}; they must be a dict with the dict "params"')
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
        raise ArgumentError("path", f"{origin} is no tree: {error}") from error


def _in_head(path: str) -> bool:
    return path.startswith("params/head/")


def _example(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, tuple):
        return jax.ShapeDtypeStruct(x, jnp.float32)
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _target(network: Any, x: jax.ShapeDtypeStruct, statistics: bool, key: Key | None = None) -> PyTree:
    """The variables to fill: shapes, or, by `key`, values; with or without statistics that are optional."""
    init = functools.partial(variables_of, network)
    if key is None:
        variables, optional = jax.eval_shape(init, jax.random.key(0), x)
    else:
        variables, optional = jax.jit(init)(key, jnp.zeros(x.shape, x.dtype))
    return {**variables, **(optional if statistics else {})}


def _for_images(
    network: Any, leaves: list[Leaf], image_size: int | Sequence[int], built: bool
) -> tuple[Any, list[Leaf]]:
    """The network for images of that size, and leaves with its position embeddings."""
    if not isinstance(network, nn.ViT):
        raise ArgumentError(
            "image_size", f"got {image_size} for {type(network).__name__}, which takes any size"
        )
    resized = network.clone(image_size=image_size)
    if not built and network.sides != resized.sides:
        raise ArgumentError("image_size", f"got {image_size}, and the network is for {network.sides}")
    return resized, [
        leaf._replace(
            array=np.asarray(
                nn.resize_positions(jnp.asarray(leaf.array), resized.grid, network.grid if built else None)
            )
        )
        if leaf.path == _POSITIONS and leaf.array.ndim == 3
        else leaf
        for leaf in leaves
    ]


def _headless(network: Any) -> Any:
    if not hasattr(network, "ways"):
        raise ArgumentError("head", f"got False, and {type(network).__name__} has none to leave out")
    return network.clone(ways=None)


def _without(leaves: list[Leaf], unused: Callable[[str], bool]) -> list[Leaf]:
    return [leaf._replace(path=None) if leaf.path and unused(leaf.path) else leaf for leaf in leaves]


def _check(
    leaves: list[Leaf], wanted: Mapping[str, Any], origin: Path, strict: bool, head: bool
) -> list[str]:
    """The paths that the file does not fill, where it need not.

    Raises:
      ValueError: leaves are missing, unknown, or of another shape.
    """
    problems = []
    given = {leaf.path: leaf for leaf in leaves if leaf.path is not None}
    missing = [path for path in wanted if path not in given]
    if strict:
        problems += [f'"{path}" is missing' for path in missing if head or not _in_head(path)]
        problems += [
            f'"{leaf.name}" has no place in it' for path, leaf in given.items() if path not in wanted
        ]
    for path in [path for path in wanted if path in given]:
        have, want = tuple(given[path].array.shape), tuple(wanted[path].shape)
        if have != want:
            told = "" if given[path].name == path else f' (the file\'s "{given[path].name}")'
            hint = "; image_size= interpolates it" if path == _POSITIONS else ""
            hint = "; head=False leaves it out, and takes a new one by key" if _in_head(path) else hint
            problems.append(f'"{path}"{told} has shape {have}, and must have {want}{hint}')
    if problems:
        listed = "\n  ".join(shortened(problems))
        raise ArgumentError("path", f"{origin} does not fit the network:\n  {listed}")
    return missing


def _filled(
    target: PyTree, leaves: list[Leaf], origin: Path, as_stored: bool
) -> tuple[dict[str, Any], Report]:
    """The target with the leaves in their places; `as_stored`: in their own dtypes."""
    given = {leaf.path: leaf.array for leaf in leaves if leaf.path is not None}

    def place(path: str, leaf: Any) -> Any:
        if path not in given:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, given[path].dtype if as_stored else leaf.dtype)

    places = [place(path, leaf) for path, leaf in leaves_by_path(target).items()]
    rules = [
        (re.compile(rf"^{re.escape(leaf.name)}\Z"), leaf.path and leaf.path.replace("\\", r"\\"))
        for leaf in leaves
        if leaf.path != leaf.name
    ]
    source = {leaf.name: leaf.array for leaf in leaves}
    try:
        variables, report = transplant(
            source,
            jax.tree.unflatten(jax.tree.structure(target), places),
            rules=rules,
            strict=False,
            cast=True,
        )
    except ValueError as error:
        raise ArgumentError("path", f"{origin} does not fit the network: {error}") from error
    return {STATISTICS: {}, **jax.tree.map(_as_jax, variables)}, report


def _as_jax(leaf: Any) -> Any:
    # Where JAX has no 64 bits, it would cut them off.
    return jnp.asarray(leaf) if jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype else leaf
