"""Files of arrays: a run's checkpoints, and `jm.save` / `jm.load` of any pytree.

Orbax writes the arrays, into a folder beside the final one that is then renamed: what has its
final name is whole. A manifest in JSON holds the tree, each leaf's path, shape and type, and a
checkpoint's configuration; SHA256SUMS, in the form of `sha256sum --check`, tells what is whole no longer.
Nothing is pickled. Where there are several processes, they see one file system: each writes its parts of the
arrays, the first all else.

Orbax's own CheckpointManager would count steps and remove old ones, which are ten lines here; but it gives a
folder its final name before sums could be added, and under a path with a pattern in it, such as "run[1]", its
arrays are not found again.
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
# How TensorStore says what the operating system said.
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
_STEP = re.compile(r"step-(\d+)")


class Best(NamedTuple):
    """The best validation of a run so far, and the parameters it was of."""

    step: int
    evaluation: Evaluation
    params: Params


def save(path: str | os.PathLike[str], tree: PyTree, *, overwrite: bool = False) -> None:
    """Writes a pytree of arrays and Python scalars, such as parameters or an adapted state.

    Of several processes all must call it, with the same tree.

    Args:
      path: the folder to make.
      tree: dicts, lists, tuples and None come back from `load` as they were; other nodes
        (a NamedTuple, a dataclass) need its `like`.
      overwrite: replace what is at `path`.

    Raises:
      FileExistsError: `path` exists and `overwrite` is False.
      OSError: not enough room on the disk; what was at `path` stays.
      ValueError: a leaf that is neither array nor scalar.
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(f"path: {path} exists; pass overwrite=True to replace it")
    _write(path, tree, {})


def load(path: str | os.PathLike[str], like: PyTree | None = None) -> PyTree:
    """Reads what `save` wrote, as jax arrays.

    Args:
      path: the folder `save` made.
      like: a tree of the same structure, as arrays or `jax.eval_shape` of them; only needed
        where it has other nodes than dicts, lists and tuples.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: it is damaged or no tree of ours, it needs a `like`, or `like` differs
        (naming the first leaf that does).
    """
    path = Path(path).absolute()
    if not path.exists():
        raise MissingFileError("path", f"there is nothing at {path}")
    try:
        leaves, manifest = _read(path)
    except Exception as error:
        raise ArgumentError(
            "path", f"{path} is damaged, or not written by jm.save: {_line(error)}"
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
    """Writes `run_dir/checkpoints/step-N`, and removes all but the last two.

    A checkpoint is whole in itself: it holds the best parameters so far beside the last ones.
    """
    folder = _folder(run_dir)
    tree = {"state": state, "params": state.params, "best": best.params if best else None}
    # The last parameters once, under a name that `load_params` finds without a template.
    tree["state"] = state._replace(params=None)
    step = int(state.step)
    extra = {
        "step": step,
        "config": _plain(config),
        "best": {"step": best.step, "evaluation": list(best.evaluation)} if best else None,
    }
    path = folder / f"step-{step:08d}"
    _write(path, tree, extra)
    if hosts.is_first():
        for old in checkpoint_steps(run_dir)[:-_KEPT]:
            shutil.rmtree(folder / f"step-{old:08d}")
    return path


def save_best(run_dir: str | os.PathLike[str], best: Best) -> Path:
    """Writes the best parameters to `run_dir/checkpoints/best`, for `jm.load`."""
    path = _folder(run_dir) / "best"
    save(path, best.params, overwrite=True)
    return path


def restore_checkpoint(
    run_dir: str | os.PathLike[str], like: TrainState, *, config: dict[str, Any] | None = None
) -> tuple[TrainState, Best | None]:
    """The newest checkpoint of `run_dir` that can be read, all of it or nothing.

    Where newer ones cannot, a warning names them and what is wrong with them.

    Args:
      run_dir: the run's folder.
      like: a freshly initialised state of the run to be continued.
      config: must equal the one the checkpoint was saved with, as JSON; None is not compared.

    Raises:
      ValueError: no checkpoint can be read, or it is of another configuration; then the
        message names the first key, or the first leaf's path and shape, that differs.
    """
    path, leaves, manifest = _newest(run_dir)
    if config is not None:
        _same_config(manifest["config"], _plain(config), path)
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
    """The parameters a run ended with: the best validated ones, else those of its last checkpoint.

    Args:
      run_dir: the run's folder.
      config: what must be so in the one the checkpoint was saved with, as JSON; None is not compared.
      like: parameters of the same structure, as arrays or `jax.eval_shape` of them; only needed where there
        are other nodes than dicts, lists and tuples.

    Raises:
      ValueError: `run_dir` has no checkpoint that can be read, or needs `like`, or differs from it; or the
        checkpoint is of another configuration.
    """
    path, leaves, manifest = _newest(run_dir)
    if config is not None:
        stored = {name: manifest["config"].get(name) for name in config}
        _same_config(stored, _plain(config), path)
    entry = "best" if manifest["best"] else "params"
    if like is None:
        return _decode(manifest["tree"]["dict"], leaves, path, entry)
    return _fill(like, _below(leaves, entry), f"run_dir: {path} has other parameters")


def check_saved(run_dir: str | os.PathLike[str], params: Params) -> None:
    """Check that the newest checkpoint can be read, and that a run that ended with `params` has these in it.

    Args:
      run_dir: the run's folder.
      params: what `load_params` must give, bit for bit.

    Raises:
      ValueError: no checkpoint can be read, or it holds others.
    """
    path, leaves, manifest = _newest(run_dir)
    stored = _below(leaves, "best" if manifest["best"] else "params")
    found = arrays_by_path(_fill(params, stored, f"{path} has other parameters"))
    for name, array in arrays_by_path(params).items():
        if found[name].tobytes() != array.tobytes():
            raise ValueError(f"{path} has other parameters: {name} differs")


def _below(leaves: dict[str, Any], entry: str) -> dict[str, Any]:
    """Return the leaves of an entry of a checkpoint by their paths in it."""
    prefix = f"['{entry}']"
    return {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}


def arrays_by_path(tree: PyTree) -> dict[str, np.ndarray]:
    """Return the leaves of a tree as NumPy arrays, keys as their data, by their paths."""
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found[jax.tree_util.keystr(keys)] = np.asarray(leaf)
    return found


def checkpoint_steps(run_dir: str | os.PathLike[str]) -> list[int]:
    """Steps of the checkpoints in `run_dir`, ascending; empty where there is none."""
    folder = _folder(run_dir)
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for entry in folder.iterdir() if (match := _STEP.fullmatch(entry.name)))


def require_space(folder: Path, needed: int) -> None:
    """Raises the OSError of a full disk if `needed` bytes do not fit where `folder` is or will be."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"too little disk: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; nothing was replaced",
            str(folder),
        )


def nbytes(tree: PyTree) -> int:
    """Bytes of disk that `save` of `tree` takes, generously."""
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
            problems.append(f"{path.name}: {_line(error)}")
            continue
        if problems:
            warnings.warn(
                f"{'; '.join(problems)}; {path.name} before it in {path.parent} is whole and is used",
                stacklevel=3,
            )
        return path, leaves, manifest
    found = "; ".join(problems) if problems else "there is none"
    raise ArgumentError("run_dir", f"no checkpoint can be read in {_folder(run_dir)} ({found})")


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
            # Orbax refuses empty arrays, and their shape says everything.
            if leaf.size:
                # What each process has whole it writes as its own; of what is spread each has a part.
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
    hosts.barrier(f"before {path}")
    try:
        # Orbax gathers what processes wrote into one database by a pattern made of the path, and finds none
        # where that holds characters of patterns: there each array stays a folder of its own.
        one_database = glob.escape(str(path)) == str(path)
        handler = ocp.CompositeCheckpointHandler(
            manifest=ocp.JsonCheckpointHandler(),
            arrays=ocp.StandardCheckpointHandler(use_ocdbt=one_database),
        )
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(unfinished, args=ocp.args.Composite(**items))
        if hosts.is_first():
            (unfinished / _SUMS).write_text(_sums(unfinished), encoding="utf-8")
    except (OSError, ValueError) as error:  # the latter is what TensorStore calls a full disk
        _remove_leftovers(path)
        named = _OS_ERROR.search(str(error))
        number = int(named[1]) if named else getattr(error, "errno", None)
        said = os.strerror(number) if number else _line(error)
        raise OSError(
            number or errno.EIO, f"cannot be written ({said}); nothing was replaced", str(path)
        ) from error
    if hosts.is_first():
        if path.exists():
            os.rename(path, replaced)
        os.rename(unfinished, path)
        shutil.rmtree(replaced, ignore_errors=True)
    hosts.barrier(f"after {path}")


def _remove_leftovers(path: Path) -> None:
    """What writing `path`, cut short, has left beside it, be it ours or Orbax's."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _sums(folder: Path) -> str:
    """SHA-256 and name of each file below, sorted by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _SUMS)
    lines = []
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines)


def _check_sums(path: Path) -> None:
    """Raises ValueError if anything below is not as it was written."""
    try:
        stored = (path / _SUMS).read_bytes()
    except OSError as error:
        raise ValueError(f"its {_SUMS} cannot be read") from error
    found = _sums(path).encode()
    if stored == found:
        return
    wrong = sorted({line[66:] for line in {*stored.splitlines()} ^ {*found.splitlines()}})
    raise ValueError(f"by {_SUMS} not as it was written: {', '.join(map(_printable, wrong[:3])) or _SUMS}")


def _printable(name: bytes) -> str:
    return name.decode("ascii", "backslashreplace")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Leaves by path, and the manifest."""
    import orbax.checkpoint as ocp

    if not (path / "manifest").is_dir():
        raise ValueError("it has no manifest")
    _check_sums(path)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        manifest = checkpointer.restore(path, args=ocp.args.Composite(manifest=ocp.args.JsonRestore()))[
            "manifest"
        ]
        # As numpy, whatever devices they were written from.
        arrays = {
            str(index): np.empty(*_stored_form(entry))
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
    """The structure of a tree in JSON, leaves as their paths."""
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
    """The tree that `_encode` encoded; `entry`: of a dict's children, that one only."""
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
            "like", f"the tree in {path} holds a {content}; pass a tree of its structure as like"
        )
    children = [_decode(child, leaves, path) for child in content]
    return tuple(children) if kind == "tuple" else children


def _signature(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _stored_form(entry: dict[str, Any]) -> tuple[tuple[int, ...], str]:
    """Shape and type of a leaf as it is written: of keys, their data."""
    if "key" not in entry:
        return tuple(entry["shape"]), entry["dtype"]
    data = jax.random.key_data(jax.random.key(0, impl=entry["key"]))
    return (*entry["shape"], *data.shape), str(data.dtype)


def _fill(template: PyTree, leaves: dict[str, Any], problem: str) -> PyTree:
    """`template` with the stored leaves in place of its own, if all fit."""
    wanted = {
        jax.tree_util.keystr(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(template)
    }
    for path in [*wanted, *leaves]:
        if path not in leaves or path not in wanted:
            raise ValueError(f"{problem}: {path} is only in the {'new' if path in wanted else 'stored'} one")
        here, there = wanted[path], leaves[path]
        if hasattr(here, "shape") != hasattr(there, "shape"):
            raise ValueError(f"{problem}: {path} is an array in only one of them")
        if hasattr(here, "shape") and _signature(here) != _signature(there):
            raise ValueError(
                f"{problem}: {path} is {there.dtype}{list(there.shape)} in the stored one, "
                f"{here.dtype}{list(here.shape)} in the new one"
            )
    return jax.tree.unflatten(jax.tree.structure(template), [leaves[path] for path in wanted])


def _plain(config: dict[str, Any] | None) -> dict[str, Any]:
    return json.loads(json.dumps(config or {}))


def _same_config(stored: Any, given: Any, path: Path, name: str = "config") -> None:
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in [*given, *stored]:
            _same_config(stored.get(key), given.get(key), path, f"{name}[{key!r}]")
    elif stored != given:
        raise ValueError(
            f"{path} is a checkpoint of another configuration: {name} is {stored!r} in the stored one, "
            f"{given!r} in the new one"
        )


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
