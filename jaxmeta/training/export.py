"""Export of adapted predictors as programs that run without this library.

`jax.export` writes a function as StableHLO, which later versions of JAX and other platforms can run, with the
arrays of its closure as constants.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmeta.checks import ArgumentError, MissingPackageError, check_count, format_value
from jaxmeta.core import Adapted, Learner, Params
from jaxmeta.files import replacing, write_new
from jaxmeta.learner_form import normalized

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(
    path: str | os.PathLike[str],
    learner: Learner,
    params: Params,
    adapted: Adapted,
    x: Any,
    *,
    batch: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
    overwrite: bool = False,
) -> None:
    """Write an adapted predictor as a program that JAX alone can run.

    The program is x ↦ `learner.predict(params, adapted, x)` as StableHLO, with `params` and `adapted` as
    constants. `jax.export.deserialize` reads it without jaxmeta, Flax or optax. If `predict` is transductive
    (norm="batch", or a method such as `jm.soft_kmeans`), so is the program.

    Args:
      path: path of the file to write; missing parent folders are created.
      learner: learner whose `predict` is traced; its other functions are not used.
      params: meta-learned parameters.
      adapted: result of `learner.adapt` for a support set.
      x: examples `(n, *shape)`, or their `jax.ShapeDtypeStruct`, of which shape and dtype are read.
      batch: number of examples that the program takes; None for any number. A `predict` that needs the
        number of examples as an integer cannot be exported with None.
      platforms: platforms on which the program can run, out of "cpu", "cuda", "rocm" and "tpu".
      overwrite: True to replace an existing file.

    Raises:
      FileExistsError: `path` is a folder, or exists and `overwrite` is False.
      MissingPackageError: the package flatbuffers, which `jax.export` needs, is not installed.
      ArgumentError: `x` has no axis of examples, `batch` is below 1, a platform is unknown, or `predict`
        cannot be exported for any number of examples or for these platforms.

    Examples:
      >>> import pathlib, tempfile
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.sinusoid(shots=10, queries=10).sample(jax.random.key(0))
      >>> learner = jm.maml(jm.nn.MLP(out=1), inner_lr=0.01, loss=jm.losses.mse)
      >>> params = learner.init(jax.random.key(1), task)
      >>> adapted = learner.adapt(params, task.support, jax.random.key(2))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = pathlib.Path(folder, "wave.stablehlo")
      ...     jm.export(file, learner, params, adapted, task.query.x)
      ...     program = jax.export.deserialize(bytearray(file.read_bytes()))  # in any process with JAX
      >>> program.call(task.query.x[:7]).shape
      (7, 1)
    """
    learner = normalized(learner)
    path = Path(path).absolute()
    if path.is_dir():
        raise FileExistsError(f"path: {path} is a folder; give a file")
    if path.exists() and not overwrite:
        raise FileExistsError(_exists(path))
    params, adapted = jax.tree.map(_on_one_device, (params, adapted))

    def predict(x: jax.Array) -> jax.Array:
        return learner.predict(params, adapted, x, None)

    content = program_of(predict, x, batch=batch, platforms=platforms)
    path.parent.mkdir(parents=True, exist_ok=True)
    if overwrite:
        with replacing(path) as unfinished:
            unfinished.write_bytes(content)
        return
    try:
        write_new(path, content)
    except FileExistsError:
        raise FileExistsError(_exists(path)) from None


def program_of(
    function: Callable[[jax.Array], Any],
    x: Any,
    *,
    batch: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """Return a function of a batch of examples as serialized by `jax.export`; see `export`."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise MissingPackageError("writing a program requires a package: pip install flatbuffers")
    if batch is not None:
        check_count("batch", batch)
    platforms = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    if not platforms or not {*platforms} <= {*PLATFORMS}:
        raise ArgumentError(
            "platforms", f"got {format_value(platforms)}; it must be one or more of {', '.join(PLATFORMS)}"
        )
    x = x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)
    if not x.ndim:
        raise ArgumentError("x", f"got shape {x.shape}; it must be examples of shape (n, ...)")
    n = jax.export.symbolic_shape("n")[0] if batch is None else batch
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    try:
        example = jax.ShapeDtypeStruct((n, *x.shape[1:]), dtype)
        return bytes(jax.export.export(jax.jit(function), platforms=platforms)(example).serialize())
    except Exception as error:
        # An error for examples of this very shape is the learner's own, and is raised unchanged.
        jax.eval_shape(function, jax.ShapeDtypeStruct(x.shape, dtype))
        raise ArgumentError("learner", _problem(error, batch, x.shape[0], platforms)) from error


def _problem(error: Exception, batch: int | None, count: int, platforms: Sequence[str]) -> str:
    message = (str(error).strip() or "no message").splitlines()[0]
    number, advice = (
        ("any number of", f"a fixed number, such as batch={count}, or ") if batch is None else (batch, "")
    )
    return (
        f"its predict cannot be exported for {number} examples on {', '.join(platforms)} "
        f"({type(error).__name__}: {message}); give {advice}other platforms"
    )


def _on_one_device(leaf: Any) -> Any:
    """Return an array, of NumPy or on several devices, as a constant for a program on one device."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    return jnp.asarray(np.asarray(leaf)) if isinstance(leaf, jax.Array | np.ndarray | np.generic) else leaf


def _exists(path: Path) -> str:
    return f"path: {path} exists; pass overwrite=True to replace it"
