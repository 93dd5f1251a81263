"""Adapted predictors as programs that run without this library.

`jax.export` writes a function as StableHLO, portable to later versions of JAX and to other platforms, with
the arrays that it closes over as constants in it.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmeta.checks import ArgumentError, check_count, format_value
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

    The file holds x ↦ `learner.predict(params, adapted, x)` as StableHLO, `params` and `adapted` as constants
    in it. `jax.export.deserialize` reads it where jaxmeta, Flax and optax are not installed. Where `predict`
    is transductive (norm="batch"), so is the program.

    Args:
      path: the file to make; folders on the way are made, too.
      learner: its `predict` is traced; the other functions are not used.
      params: what it has meta-learned.
      adapted: what its `adapt` gave for a support set.
      x: examples `(n, *shape)`, or a `jax.ShapeDtypeStruct` of them. Only shape and type are read.
      batch: number of examples that the program takes; None for any number. A `predict` that asks for the
        number of examples as an integer cannot be written for any number.
      platforms: what the program can run on, of "cpu", "cuda", "rocm" and "tpu".
      overwrite: whether to replace a file that is at `path`.

    Raises:
      FileExistsError: there is a file at `path` and `overwrite` is False; or a folder.
      ImportError: the package flatbuffers is missing, which `jax.export` writes with.
      ArgumentError: `x` has no axis of examples; `batch` below 1; an unknown platform; or `predict` works
        and still cannot be written, for any number of examples or for these platforms.

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
      ...     program = jax.export.deserialize(bytearray(file.read_bytes()))  # of any process that has JAX
      >>> program.call(task.query.x[:7]).shape
      (7, 1)
    """
    learner = normalized(learner)
    path = Path(path).absolute()
    if path.is_dir():
        raise FileExistsError(f"path: {path} is a folder; name a file")
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
    """Return a function of a batch of examples as `jax.export` serializes it; see `export`."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError("writing a program needs a package: pip install flatbuffers")
    if batch is not None:
        check_count("batch", batch)
    platforms = tuple(platforms)
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
        # What the learner refuses for these very examples is its own error, raised as it is.
        jax.eval_shape(function, jax.ShapeDtypeStruct(x.shape, dtype))
        raise ArgumentError("learner", _problem(error, batch, x.shape[0], platforms)) from error


def _problem(error: Exception, batch: int | None, count: int, platforms: Sequence[str]) -> str:
    said = (str(error).strip() or "no message").splitlines()[0]
    number, advice = (
        ("any number of", f"their number as batch={count}, say, or ") if batch is None else (batch, "")
    )
    return (
        f"its predict cannot be written for {number} examples on {', '.join(platforms)} "
        f"({type(error).__name__}: {said}); give {advice}other platforms"
    )


def _on_one_device(leaf: Any) -> Any:
    """Return an array as a constant of a program for one device: of NumPy, or spread over devices."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    return jnp.asarray(np.asarray(leaf)) if isinstance(leaf, jax.Array | np.ndarray | np.generic) else leaf


def _exists(path: Path) -> str:
    return f"path: {path} exists; pass overwrite=True to replace it"
