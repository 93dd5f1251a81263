"""Reading and writing of weight files: safetensors, Flax msgpack, Orbax checkpoints and run folders.

A pickle executes the code that its author put into it, so pickles are never opened.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmeta.checks import ArgumentError, MissingFileError, MissingPackageError, parsed_json
from jaxmeta.core import PyTree
from jaxmeta.files import replacing
from jaxmeta.nn.lora import FACTORS, NETWORK, merge_lora
from jaxmeta.nn.norm import STATISTICS, from_moments
from jaxmeta.training.checkpoint import load, load_params
from jaxmeta.transfer.architectures import build_described
from jaxmeta.transfer.subtree import leaves_by_path

FORMATS = (
    "a .safetensors or .msgpack file, a folder with model.safetensors or its shards, an Orbax checkpoint, "
    'a folder of `jaxmeta train`, or "hf:owner/name"'
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz")
INDEX = "model.safetensors.index.json"
PREPROCESSOR = "preprocessor_config.json"
HUB = "hf:"
# Format of a run's config.json and folder of its population statistics, as the command line writes them.
_RUN_FORMAT, _POPULATION = 4, "population"


class StoredWeights(NamedTuple):
    """The content of a weights file or folder.

    Attributes:
      leaves: arrays by name, with "/" between the parts of a name.
      origin: file or folder, for messages.
      config: content of the config.json next to the weights; empty if the file is missing.
      preprocessor: content of the preprocessor_config.json next to the weights; empty if it is missing.
      metadata: metadata of the safetensors file.
      network: network of a run; None where the run does not describe it.
    """

    leaves: dict[str, Any]
    origin: Path
    config: Mapping[str, Any] = {}
    metadata: Mapping[str, str] = {}
    network: Any = None
    preprocessor: Mapping[str, Any] = {}


def read(path: str | os.PathLike[str], revision: str | None = None) -> StoredWeights:
    """Read weights of any format; see `jaxmeta.transfer.load_pretrained`."""
    if isinstance(path, str) and path.startswith(HUB):
        return _folder(_fetched(path, revision))
    if revision is not None:
        raise ArgumentError(
            "revision", f'got {revision!r} for {path}; only paths on the Hub ("{HUB}…") have revisions'
        )
    local = Path(path).expanduser()
    if not local.exists():
        hint = f'; for the Hugging Face Hub, use "{HUB}{path}"' if str(path).count("/") == 1 else ""
        raise MissingFileError("path", f"{path} does not exist{hint}")
    return _folder(local) if local.is_dir() else _file(local)


def _file(path: Path) -> StoredWeights:
    if path.suffix == ".safetensors":
        leaves, metadata = _safetensors(path)
        return StoredWeights(leaves, path, metadata=metadata)
    if path.suffix == ".msgpack":
        return StoredWeights(_arrays(_msgpack(path), path), path)
    if path.suffix in PICKLES:
        raise ArgumentError("path", _refusal(path))
    raise ArgumentError("path", f"got {path}, whose format is unknown; it must be {FORMATS}")


def _folder(path: Path) -> StoredWeights:
    files = sorted(path.glob("*.safetensors"))
    whole = [file for file in files if file.name == "model.safetensors"]
    if not whole and (path / INDEX).is_file():
        return _sharded(path)
    if len(whole or files) == 1:
        (file,) = whole or files
        leaves, metadata = _safetensors(file)
        return StoredWeights(leaves, file, _config(path), metadata, preprocessor=_preprocessor(path))
    if files:
        names = ", ".join(file.name for file in files)
        raise ArgumentError("path", f"{path} has several files of weights: {names}; pass the path of one")
    if (path / "checkpoints").is_dir():
        return _run(path)
    if (path / "manifest").is_dir():
        return StoredWeights(_arrays(load(path), path), path)
    checkpoints = [folder for folder in (path, *path.iterdir()) if (folder / "_METADATA").is_file()]
    if len(checkpoints) == 1:
        return StoredWeights(_arrays(_orbax(checkpoints[0]), path), path)
    pickles = [file for file in sorted(path.iterdir()) if file.suffix in PICKLES]
    if pickles:
        raise ArgumentError("path", _refusal(pickles[0]))
    raise ArgumentError("path", f"{path} has no weights of a known format; it must be {FORMATS}")


def _refusal(path: Path) -> str:
    if path.suffix in (".npy", ".npz"):
        convert = (
            "load it with numpy.load(path, allow_pickle=False) and write its arrays by name: "
            'safetensors.numpy.save_file(arrays, "model.safetensors")'
        )
    else:
        convert = (
            "convert it in PyTorch: "
            'safetensors.torch.save_file(torch.load(path, weights_only=True), "model.safetensors")'
        )
    return (
        f"{path} may hold a pickle, which executes its author's code when opened, and is not read; "
        f"if you trust it, {convert}"
    )


def _guarded(path: Path, format_name: str, read: Callable[[], Any]) -> Any:
    """Return the result of `read`; any failure on a damaged or hostile file becomes a ValueError."""
    try:
        return read()
    except MemoryError:
        raise
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ArgumentError("path", f"{path} cannot be read as {format_name}: {line}") from error


def _safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        from safetensors import safe_open
    except ImportError:
        raise MissingPackageError(f"{path}: reading it requires a package: pip install safetensors") from None

    def read():
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118

    leaves, metadata = _guarded(path, "safetensors", read)
    return {_joined(name): leaf for name, leaf in leaves.items()}, metadata


def _joined(name: str) -> str:
    """Replace the dots of torch's names by "/"; Flax's names have "/" and may also have dots."""
    return name if "/" in name else name.replace(".", "/")


def _sharded(path: Path) -> StoredWeights:
    index = _json(path / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ArgumentError("path", f'{path / INDEX} has no "weight_map" from names to files')
    leaves: dict[str, Any] = {}
    for name in sorted(set(weight_map.values())):
        file = path / name
        if Path(name).name != name or file.suffix != ".safetensors":
            raise ArgumentError(
                "path", f"{path / INDEX} points to {name!r}; it must be a safetensors file next to it"
            )
        if not file.is_file():
            raise ArgumentError("path", f"{path / INDEX} points to {name}, which does not exist")
        leaves |= _safetensors(file)[0]
    missing = sorted({_joined(name) for name in weight_map} - set(leaves))
    if missing:
        raise ArgumentError("path", f"{path / INDEX} lists {missing[0]}, which none of its files contains")
    return StoredWeights(leaves, path / INDEX, _config(path), preprocessor=_preprocessor(path))


def _config(folder: Path) -> dict[str, Any]:
    return _json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _preprocessor(folder: Path) -> dict[str, Any]:
    return _json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    content = _guarded(path, "JSON", lambda: parsed_json(path.read_text(encoding="utf-8")))
    if not isinstance(content, dict):
        raise ArgumentError("path", f"{path} cannot be read as JSON: it must hold an object")
    return content


def _msgpack(path: Path) -> PyTree:
    from flax.serialization import msgpack_restore

    tree = _guarded(path, "Flax's msgpack", lambda: msgpack_restore(path.read_bytes()))
    if not isinstance(tree, dict):
        raise ArgumentError(
            "path", f"{path} cannot be read as Flax's msgpack: it holds a {type(tree).__name__}, not a dict"
        )
    return tree


def _orbax(path: Path) -> PyTree:
    import orbax.checkpoint as ocp

    def read():
        with ocp.PyTreeCheckpointer() as checkpointer:
            structure = checkpointer.metadata(path.absolute()).item_metadata.tree
            # Restore to host arrays: the checkpoint may have been saved on other devices.
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
            return checkpointer.restore(path.absolute(), restore_args=restore_args)

    return _guarded(path, "an Orbax checkpoint", read)


def _collections(tree: PyTree) -> PyTree:
    """Return the variables of a training state; bare parameters become the collection "params"."""
    if not isinstance(tree, Mapping) or "params" not in tree:
        return {"params": tree}
    if isinstance(tree["params"], Mapping) and "params" in tree["params"]:
        return {**tree, **tree["params"]}
    return tree


def _arrays(tree: PyTree, origin: Path) -> dict[str, Any]:
    leaves = _guarded(origin, "a tree of arrays", lambda: leaves_by_path(_collections(tree)))
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            raise ArgumentError(
                "path", f'{origin} has {type(leaf).__name__} at "{path}"; it must be an array or a number'
            )
    return {path: leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for path, leaf in leaves.items()}


def _run(folder: Path) -> StoredWeights:
    """Read the variables and the network of a run of `jaxmeta train`, as described by its config.json."""
    config = _config(folder)
    if config.get("format") != _RUN_FORMAT:
        raise ArgumentError(
            "path",
            f"{folder} is a run folder whose config.json is missing or has an older format than this version "
            "of jaxmeta reads; train again, or use the version that wrote it",
        )
    try:
        learner, text = config["learner"]["name"], config["model"]
        identity = {name: config[name] for name in ("learner", "network")} | {"seed": config["run"]["seed"]}
    except (KeyError, TypeError) as error:
        raise ArgumentError("path", f"{folder / 'config.json'} is damaged: {error!r}") from None
    params = load_params(folder, config=identity)
    if (folder / _POPULATION).exists():
        params = {**params, **load(folder / _POPULATION)}
    # MAML++ has separate normalisation layers for each inner step.
    if "model" not in params or "per_step" in params:
        raise ArgumentError(
            "path",
            f"{folder} is a run of {learner}, whose parameters are not those of a single network: "
            f"{sorted(params)}",
        )
    model = params["model"]
    if set(model) == {NETWORK, FACTORS}:  # trained with --lora
        model = merge_lora(model)
    variables = {"params": model}
    if "population" in params:
        statistics = from_moments(params["population"])
        # A learner may have statistics of its own in addition to the network's.
        statistics = statistics.get("model", statistics)
        variables[STATISTICS] = statistics.get(NETWORK, statistics)
    # A network of another package has no description; the caller of `load_pretrained` passes it.
    network = None if text is None else build_described(str(text), folder / "config.json")
    return StoredWeights(leaves_by_path(variables), folder, network=network)


def _fetched(name: str, revision: str | None) -> Path:
    """Download the safetensors and JSON files of a Hugging Face Hub repository; return their folder."""
    try:
        import huggingface_hub
    except ImportError:
        raise MissingPackageError(f"{name}: the Hub requires a package: pip install 'jaxmeta[hub]'") from None
    patterns = ["config.json", PREPROCESSOR, INDEX, "model.safetensors", "model-*.safetensors"]
    repository = name.removeprefix(HUB)
    try:
        folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ArgumentError(
            "path",
            f"{name} cannot be fetched from the Hugging Face Hub: {line}; without a network, copy the "
            "repository's config.json and model.safetensors into a folder and pass its path",
        ) from error
    if not any(Path(folder).glob("*.safetensors")):
        raise ArgumentError(
            "path", f"{name} has no model.safetensors; its weights may be pickles, which are not read"
        )
    return Path(folder)


def write(path: Path, leaves: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write arrays by name as safetensors; a failure leaves no partial file."""
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise MissingPackageError(f"{path}: writing it requires a package: pip install safetensors") from None
    # The library writes the memory as it is and ignores strides.
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in leaves.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        save_file(arrays, unfinished, dict(metadata))
