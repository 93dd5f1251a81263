"""Checkpoints of runs, and `jm.save` and `jm.load` for any pytree.

Orbax writes the arrays into a temporary folder, which is renamed when it is complete, so that a folder with
its final name is never half written. A JSON manifest holds the tree, the path, shape and dtype of each leaf,
and the configuration of a checkpoint. SHA256SUMS, in the format of `sha256sum --check`, reveals later damage.
Nothing is pickled. Several processes must share one file system: each writes its parts of the arrays, and the
first writes everything else.

Orbax's CheckpointManager is not used: it renames a folder before checksums could be added, and it does not
find arrays again under a path with glob characters, such as "run[1]".
"""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmeta.checks import ArgumentError, MissingFileError
from jaxmeta.core import Params, PyTree
from jaxmeta.training import hosts
from jaxmeta.training.evaluate import Evaluation
from jaxmeta.training.step import TrainState

_KEPT = 2
_SUMS = "SHA256SUMS"
# The operating system's error number in TensorStore's messages.
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
_STEP = re.compile(r"step-(\d+)")


class Best(NamedTuple):
    """The best validation of a run so far, with its step and parameters."""

    step: int
    evaluation: Evaluation
    params: Params


def save(path: str | os.PathLike[str], tree: PyTree, *, overwrite: bool = False) -> None:
    """Write a pytree of arrays and Python scalars, such as parameters or an adapted state.

    Where there are several processes, all must call it with the same tree.

    Args:
      path: path of the folder to create.
      tree: tree to write. `load` restores dicts, lists, tuples and None; other nodes (a NamedTuple, a
        dataclass) need its argument `like`.
      overwrite: True to replace an existing `path`.

    Raises:
      FileExistsError: `path` exists and `overwrite` is False.
      OSError: the disk is full or cannot be written; an existing `path` is left as it was.
      ValueError: a leaf is neither an array nor a scalar.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder + "/params", {"w": jnp.ones(2), "layers": [3]})
      ...     load(folder + "/params")
      {'w': Array([1., 1.], dtype=float32), 'layers': [3]}
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(f"path: {path} exists; pass overwrite=True to replace it")
    _write(path, tree, {})


def load(path: str | os.PathLike[str], like: PyTree | None = None) -> PyTree:
    """Return the pytree that `save` wrote, with arrays as JAX arrays.

    Args:
      path: path of the folder that `save` created.
      like: tree of the same structure, of arrays or their shapes (`jax.eval_shape`); None for a tree of
        dicts, lists and tuples.

    Raises:
      FileNotFoundError: `path` does not exist.
      ValueError: `path` is damaged or was not written by `save`, the tree needs `like`, or it differs
        from `like` (the message names the first leaf that does).
    """
    path = Path(path).absolute()
    if not path.exists():
        raise MissingFileError("path", f"{path} does not exist")
    try:
        leaves, manifest = _read(path)
    except Exception as error:
        raise ArgumentError(
            "path", f"{path} is damaged, or was not written by jm.save: {_first_line(error)}"
        ) from error
    if like is not None:
        return _fill(like, leaves, f"path: {path} differs from like")
    return _decode(manifest["tree"], leaves, path)


def save_checkpoint(
    run_dir: str | os.PathLike[str],
    state: TrainState,
    *,
    best: Best | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write `run_dir/checkpoints/step-N`, and remove all but the last two checkpoints.

    A checkpoint is complete: it contains the last parameters and the best ones so far.
    """
    folder = _folder(run_dir)
    # The last parameters are written once, as "params", which `load_params` can read without a template.
    tree = {
        "state": state._replace(params=None),
        "params": state.params,
        "best": best.params if best else None,
    }
    step = int(state.step)
    extra = {
        "step": step,
        "config": _as_json(config),
        "best": {"step": best.step, "evaluation": list(best.evaluation)} if best else None,
    }
    path = folder / f"step-{step:08d}"
    _write(path, tree, extra)
    if hosts.is_first():
        for old in checkpoint_steps(run_dir)[:-_KEPT]:
            shutil.rmtree(folder / f"step-{old:08d}")
    return path


def save_best(run_dir: str | os.PathLike[str], best: Best) -> Path:
    """Write the best parameters to `run_dir/checkpoints/best`, for `jm.load`."""
    path = _folder(run_dir) / "best"
    save(path, best.params, overwrite=True)
    return path


def restore_checkpoint(
    run_dir: str | os.PathLike[str], like: TrainState, *, config: dict[str, Any] | None = None
) -> tuple[TrainState, Best | None]:
    """Return the state and the best validation of the newest readable checkpoint of a run.

    A warning names newer checkpoints that cannot be read, and why.

    Args:
      run_dir: folder of the run.
      like: initial state of the run that is resumed.
      config: configuration that must be equal, as JSON, to that of the checkpoint; None for any.

    Raises:
      ValueError: no checkpoint can be read, or it is of another configuration (the message names the
        first key, or the path and shape of the first leaf, that differs).
    """
    path, leaves, manifest = _newest(run_dir)
    if config is not None:
        _check_config(manifest["config"], _as_json(config), path)
    saved = manifest["best"]
    template = {
        "state": like._replace(params=None),
        "params": like.params,
        "best": like.params if saved else None,
    }
    tree = _fill(template, leaves, f"{path} is a checkpoint of another configuration")
    state = tree["state"]._replace(params=tree["params"])
    best = Best(saved["step"], Evaluation(*saved["evaluation"]), tree["best"]) if saved else None
    return state, best


def load_params(
    run_dir: str | os.PathLike[str], *, config: dict[str, Any] | None = None, like: Params | None = None
) -> Params:
    """Return the final parameters of a run: the best validated ones, else those of its last checkpoint.

    Args:
      run_dir: folder of the run.
      config: entries that the configuration of the checkpoint must have, as JSON; None for any.
      like: parameters of the same structure, of arrays or their shapes (`jax.eval_shape`); None for
        parameters of dicts, lists and tuples.

    Raises:
      ValueError: no checkpoint of `run_dir` can be read, the parameters need `like` or differ from it, or the
        checkpoint is of another configuration.
    """
    path, leaves, manifest = _newest(run_dir)
    if config is not None:
        stored = {name: manifest["config"].get(name) for name in config}
        _check_config(stored, _as_json(config), path)
    entry = "best" if manifest["best"] else "params"
    if like is None:
        return _decode(manifest["tree"]["dict"], leaves, path, entry)
    return _fill(like, _below(leaves, entry), f"{path} has other parameters")


def check_saved(run_dir: str | os.PathLike[str], params: Params) -> None:
    """Check that the newest checkpoint of a run can be read and contains its final parameters.

    Args:
      run_dir: folder of the run.
      params: parameters that `load_params` must return, bit for bit.

    Raises:
      ValueError: no checkpoint can be read, or it contains other parameters.
    """
    path, leaves, manifest = _newest(run_dir)
    stored = _below(leaves, "best" if manifest["best"] else "params")
    stored_arrays = arrays_by_path(_fill(params, stored, f"{path} has other parameters"))
    for name, array in arrays_by_path(params).items():
        if stored_arrays[name].tobytes() != array.tobytes():
            raise ValueError(f"{path} has other parameters: {name} differs")


def _below(leaves: dict[str, Any], entry: str) -> dict[str, Any]:
    """Return the leaves below an entry of a checkpoint, by their paths relative to it."""
    prefix = f"['{entry}']"
    return {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}


def arrays_by_path(tree: PyTree) -> dict[str, np.ndarray]:
    """Return the leaves of a tree as NumPy arrays, by their paths; random keys as their data."""
    arrays = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        arrays[jax.tree_util.keystr(keys)] = np.asarray(leaf)
    return arrays


def checkpoint_steps(run_dir: str | os.PathLike[str]) -> list[int]:
    """Return the steps of the checkpoints in `run_dir`, in ascending order."""
    folder = _folder(run_dir)
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for entry in folder.iterdir() if (match := _STEP.fullmatch(entry.name)))


def require_space(folder: Path, needed: int) -> None:
    """Raise the OSError of a full disk if `needed` bytes do not fit on the disk of `folder`."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"too little disk space: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; nothing was "
            "replaced",
            str(folder),
        )


def nbytes(tree: PyTree) -> int:
    """Return an upper estimate of the bytes that `save` of `tree` takes on disk."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes")) * 11 // 10 + 2**20


def _folder(run_dir: str | os.PathLike[str]) -> Path:
    return Path(run_dir).absolute() / "checkpoints"


def _newest(run_dir: str | os.PathLike[str]) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    steps, problems = checkpoint_steps(run_dir), []
    for step in reversed(steps):
        path = _folder(run_dir) / f"step-{step:08d}"
        try:
            leaves, manifest = _read(path)
        except Exception as error:
            problems.append(f"{path.name}: {_first_line(error)}")
            continue
        if problems:
            warnings.warn(
                f"{'; '.join(problems)}; the earlier {path.name} in {path.parent} is intact and is used",
                stacklevel=3,
            )
        return path, leaves, manifest
    reason = "; ".join(problems) if problems else "there is none"
    raise ArgumentError("run_dir", f"no checkpoint can be read in {_folder(run_dir)} ({reason})")


def _write(path: Path, tree: PyTree, extra: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    require_space(path.parent, nbytes(tree))
    leaves: list[dict[str, Any]] = []
    arrays: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        entry: dict[str, Any] = {"path": jax.tree_util.keystr(keys)}
        if isinstance(leaf, bool | int | float | str):
            entry["value"] = leaf
        elif isinstance(leaf, jax.Array | np.ndarray | np.generic):
            entry |= _signature(leaf)
            if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                entry["key"] = str(jax.random.key_impl(leaf))
                leaf = jax.random.key_data(leaf)
            # Orbax refuses empty arrays, which are determined by shape and dtype.
            if leaf.size:
                # One process writes a NumPy array; all processes write an array whose shards they hold.
                whole = getattr(leaf, "is_fully_addressable", True)
                arrays[str(len(leaves))] = np.asarray(leaf) if whole else leaf
        else:
            raise ValueError(f"tree{entry['path']}: got {type(leaf).__name__}; it must be an array or scalar")
        leaves.append(entry)
    items = {"manifest": ocp.args.JsonSave({"leaves": leaves, "tree": _encode(tree, ()), **extra})}
    if arrays:
        items["arrays"] = ocp.args.StandardSave(arrays)
    unfinished, replaced = (path.with_name(f".{path.name}.{state}") for state in ("unfinished", "replaced"))
    if hosts.is_first():
        _remove_leftovers(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    # No process may write before the first one has removed what an interrupted write has left.
    hosts.barrier(f"before {path}")
    try:
        # Orbax merges the files of all processes into one database, and finds them by a glob pattern made of
        # the path. A path with glob characters does not match itself; there each array gets its own folder.
        one_database = glob.escape(str(path)) == str(path)
        handler = ocp.CompositeCheckpointHandler(
            manifest=ocp.JsonCheckpointHandler(),
            arrays=ocp.StandardCheckpointHandler(use_ocdbt=one_database),
        )
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(unfinished, args=ocp.args.Composite(**items))
        if hosts.is_first():
            (unfinished / _SUMS).write_text(_sums(unfinished), encoding="utf-8")
    except (OSError, ValueError) as error:  # TensorStore reports a full disk as a ValueError
        _remove_leftovers(path)
        named = _OS_ERROR.search(str(error))
        number = int(named[1]) if named else getattr(error, "errno", None)
        reason = os.strerror(number) if number else _first_line(error)
        raise OSError(
            number or errno.EIO, f"cannot be written ({reason}); nothing was replaced", str(path)
        ) from error
    if hosts.is_first():
        if path.exists():
            os.rename(path, replaced)
        os.rename(unfinished, path)
        shutil.rmtree(replaced, ignore_errors=True)
    # No process may read, or return from saving, before the first one has renamed the folder.
    hosts.barrier(f"after {path}")


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary folders, our own and Orbax's, that an interrupted write of `path` has left."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _sums(folder: Path) -> str:
    """Return a line with SHA-256 and relative path for each file in `folder`, sorted by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _SUMS)
    lines = []
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines)


def _check_sums(path: Path) -> None:
    """Raise ValueError if a file below `path` was changed, added or removed."""
    try:
        stored = (path / _SUMS).read_bytes()
    except OSError as error:
        raise ValueError(f"its {_SUMS} cannot be read") from error
    actual = _sums(path).encode()
    if stored == actual:
        return
    # A line is 64 digits, two spaces and the path.
    changed = sorted({line[66:] for line in {*stored.splitlines()} ^ {*actual.splitlines()}})
    raise ValueError(f"it does not match {_SUMS}: {', '.join(map(_printable, changed[:3])) or _SUMS}")


def _printable(name: bytes) -> str:
    return name.decode("ascii", "backslashreplace")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the leaves by path, and the manifest."""
    import orbax.checkpoint as ocp

    if not (path / "manifest").is_dir():
        raise ValueError("it has no manifest")
    _check_sums(path)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        manifest = checkpointer.restore(path, args=ocp.args.Composite(manifest=ocp.args.JsonRestore()))[
            "manifest"
        ]
        # Restored as NumPy arrays, because the devices that wrote them may not exist here.
        arrays = {
            str(index): np.empty(*_stored_spec(entry))
            for index, entry in enumerate(manifest["leaves"])
            if "value" not in entry and 0 not in entry["shape"]
        }
        stored = {}
        if arrays:
            restore = ocp.args.StandardRestore(arrays)
            stored = checkpointer.restore(path, args=ocp.args.Composite(arrays=restore))["arrays"]
    leaves = {}
    for index, entry in enumerate(manifest["leaves"]):
        if "value" in entry:
            leaves[entry["path"]] = entry["value"]
        elif 0 in entry["shape"]:
            leaves[entry["path"]] = jnp.zeros(entry["shape"], entry["dtype"])
        else:
            array = jnp.asarray(stored[str(index)])
            if "key" in entry:
                array = jax.random.wrap_key_data(array, impl=entry["key"])
            leaves[entry["path"]] = array
    return leaves, manifest


def _encode(node: PyTree, keys: tuple[Any, ...]) -> Any:
    """Return the structure of a tree as JSON, with leaves as their paths."""
    if node is None:
        return None
    if type(node) is dict and all(isinstance(key, str) for key in node):
        return {
            "dict": {key: _encode(child, (*keys, jax.tree_util.DictKey(key))) for key, child in node.items()}
        }
    if type(node) in (list, tuple):
        children = [_encode(child, (*keys, jax.tree_util.SequenceKey(i))) for i, child in enumerate(node)]
        return {type(node).__name__: children}
    if jax.tree_util.all_leaves([node]):
        return {"leaf": jax.tree_util.keystr(keys)}
    return {"other": type(node).__name__}


def _decode(node: Any, leaves: dict[str, Any], path: Path, entry: str | None = None) -> PyTree:
    """Return the tree that `_encode` encoded, or its child `entry`."""
    if entry is not None:
        node = node[entry]
    if node is None:
        return None
    ((kind, content),) = node.items()
    if kind == "leaf":
        return leaves[content]
    if kind == "dict":
        return {key: _decode(child, leaves, path) for key, child in content.items()}
    if kind == "other":
        raise ArgumentError(
            "like", f"the tree in {path} contains a {content}; pass a tree of the same structure as like"
        )
    children = [_decode(child, leaves, path) for child in content]
    return tuple(children) if kind == "tuple" else children


def _signature(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _stored_spec(entry: dict[str, Any]) -> tuple[tuple[int, ...], str]:
    """Return shape and dtype of a leaf as written; random keys are written as their data."""
    if "key" not in entry:
        return tuple(entry["shape"]), entry["dtype"]
    data = jax.random.key_data(jax.random.key(0, impl=entry["key"]))
    return (*entry["shape"], *data.shape), str(data.dtype)


def _fill(template: PyTree, leaves: dict[str, Any], problem: str) -> PyTree:
    """Return `template` with its leaves replaced by the stored ones, which must fit."""
    expected = {
        jax.tree_util.keystr(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(template)
    }
    for path in [*expected, *leaves]:
        if path not in leaves or path not in expected:
            place = "new" if path in expected else "stored"
            raise ValueError(f"{problem}: {path} is only in the {place} one")
        new, stored = expected[path], leaves[path]
        if hasattr(new, "shape") != hasattr(stored, "shape"):
            raise ValueError(f"{problem}: {path} is an array in only one of them")
        if hasattr(new, "shape") and _signature(new) != _signature(stored):
            raise ValueError(
                f"{problem}: {path} is {stored.dtype}{list(stored.shape)} in the stored one, "
                f"{new.dtype}{list(new.shape)} in the new one"
            )
    return jax.tree.unflatten(jax.tree.structure(template), [leaves[path] for path in expected])


def _as_json(config: dict[str, Any] | None) -> dict[str, Any]:
    """Return `config` as it is read back from JSON: tuples as lists."""
    return json.loads(json.dumps(config or {}))


def _check_config(stored: Any, new: Any, path: Path, name: str = "config") -> None:
    if isinstance(stored, dict) and isinstance(new, dict):
        for key in [*new, *stored]:
            _check_config(stored.get(key), new.get(key), path, f"{name}[{key!r}]")
    elif stored != new:
        raise ValueError(
            f"{path} is a checkpoint of another configuration: {name} is {stored!r} in the stored one, "
            f"{new!r} in the new one"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
