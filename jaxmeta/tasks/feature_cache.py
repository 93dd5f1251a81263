"""Features of images by a fixed network, computed once for each image and kept in the cache folder."""

import hashlib
import json
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxmeta.checks import ArgumentError
from jaxmeta.core import PyTree
from jaxmeta.files import replacing
from jaxmeta.tasks.cache import cache_folder, ensure_space

# Subfolder of the cache folder.
FOLDER = "features"
# Largest number of images in one call of the compiled program.
BATCH = 64
# Version of the cached format; changing it invalidates all cached features.
_VERSION = 1
# Bytes of the hash that identifies an image.
_DIGEST = 16
# Seconds after which the features computed so far are written.
_SECONDS_BETWEEN_WRITES = 60.0


def hash_of_arrays(tree: PyTree) -> str:
    """Return a hash of the names, shapes, types and values of a tree of arrays.

    Examples:
      >>> a, b = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, 2.0])}
      >>> hash_of_arrays(a) == hash_of_arrays({"w": np.ones(2, np.float32)}), hash_of_arrays(a) == hash_of_arrays(b)
      (True, False)
    """  # noqa: E501
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        values = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


class Embedder:
    """A function from images to features that computes the features of each image once.

    Features are kept in memory and, where `description` is given, in a file of the cache folder. The file
    belongs to one description, and has the features of all images that were ever computed for it.

    Args:
      embed: function `(n, *shape) -> (n, dim)` of float images, as a pytree (`jax.tree_util.Partial`), so
        that its parameters are an argument of the compiled program.
      description: text that identifies network, weights and preprocessing; None to keep nothing on disk.
      batch: largest number of images in one call. Fewer images are padded to the next power of two, so that
        few programs are compiled.
      alone: whether each image is embedded in a batch of its own within the call, so that its features do
        not depend on its neighbours even in the last digit; None for True on CPUs, where it takes no longer.
      report: function `(done, expected)` that is called after each computed batch.

    Attributes:
      expected: number of images that the caller is going to embed in all, for `report`.
      seen: number of images embedded so far.
      computed: number of images whose features were computed.
    """

    def __init__(
        self,
        embed: Callable[[Array], Array],
        *,
        description: str | None = None,
        batch: int = BATCH,
        alone: bool | None = None,
        report: Callable[[int, int], None] | None = None,
    ):
        self._embed, self._batch, self._report = embed, batch, report
        self._alone = jax.default_backend() == "cpu" if alone is None else alone
        self._rows: dict[bytes, Float[np.ndarray, " dim"]] = {}
        self._path: Path | None = None
        self._description, self._unsaved = "", 0
        if description is not None:
            facts = {
                "features": description,
                "jaxmeta": version("jaxmeta"),
                "device": jax.default_backend(),
                "alone": self._alone,
                "format": _VERSION,
            }
            self._description = json.dumps(facts, sort_keys=True)
            name = hashlib.sha256(self._description.encode()).hexdigest()[:32]
            self._path = cache_folder() / FOLDER / f"{name}.npz"
            self._rows = _read(self._path, self._description)
        self.expected = self.seen = self.computed = 0

    def __call__(self, images: Shaped[np.ndarray, "n ..."]) -> Float[np.ndarray, "n dim"]:
        """Return the features of images, bytes or floats in [0, 1].

        Raises:
          ArgumentError: features are not finite.
        """
        images = np.ascontiguousarray(images)
        header = f"{images.dtype} {images.shape[1:]} ".encode()
        digests = [_digest(header + image.tobytes()) for image in images]
        missing = {name: index for index, name in enumerate(digests) if name not in self._rows}
        self.expected = max(self.expected, self.seen + len(images))
        done, written = self.seen + len(images) - len(missing), time.monotonic()
        for names, z in self._computed(images, missing):
            self._rows.update(zip(names, z, strict=True))
            self._unsaved += len(names)
            self.computed += len(names)
            done += len(names)
            if self._report is not None:
                self._report(done, self.expected)
            if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
                self.save()
                written = time.monotonic()
        self.seen += len(images)
        return np.stack([self._rows[name] for name in digests])

    def _computed(
        self, images: np.ndarray, missing: dict[bytes, int]
    ) -> Iterator[tuple[list[bytes], Float[np.ndarray, "count dim"]]]:
        names = list(missing)
        size = min(self._batch, 1 << max(len(names) - 1, 0).bit_length())
        for start in range(0, len(names), size):
            chosen = names[start : start + size]
            block = images[[missing[name] for name in chosen]]
            padding = np.zeros((size - len(block), *block.shape[1:]), block.dtype)
            z = np.asarray(_call(self._alone, self._embed, jnp.asarray(np.concatenate([block, padding]))))
            z = z[: len(chosen)].astype(np.float32)
            if not np.isfinite(z).all():
                raise ArgumentError("embed", "gives features that are not finite; check its weights")
            yield chosen, z

    def save(self) -> None:
        """Write the features to the cache folder, or warn that this failed."""
        if self._path is None or not self._unsaved:
            return
        try:
            # Another process may have added other images in the meantime.
            rows = {**_read(self._path, self._description), **self._rows}
            names = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, _DIGEST)
            z = np.stack(list(rows.values()))
            ensure_space(self._path.parent, names.nbytes + z.nbytes, "features")
            with replacing(self._path) as unfinished:
                np.savez(unfinished, images=names, features=z, description=np.array(self._description))
        except OSError as error:
            warnings.warn(f"features could not be kept in the cache folder: {error}", stacklevel=2)
        self._unsaved = 0


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


def _read(path: Path, description: str) -> dict[bytes, Float[np.ndarray, " dim"]]:
    """Return the features in a cache file by image; warn and return none if the file cannot be used."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names, z, own = (file[name] for name in ("images", "features", "description"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        return _ignored(path, f"is damaged ({error})")
    if str(own) != description:
        return _ignored(path, "has features of another network, other weights or another input")
    shapes = names.dtype == np.uint8 and names.shape == (len(z), _DIGEST) and z.ndim == 2
    if not shapes or z.dtype != np.float32 or not np.isfinite(z).all():
        return _ignored(path, "is damaged")
    return dict(zip(map(bytes, names), z, strict=True))


def _ignored(path: Path, problem: str) -> dict[bytes, np.ndarray]:
    warnings.warn(f"the cache file {path} {problem}; its features are computed again", stacklevel=4)
    return {}


@partial(jax.jit, static_argnums=0)
def _call(alone: bool, embed: Callable[[Array], Array], images: Shaped[Array, "n ..."]) -> Array:
    x = jnp.float32(images) / 255 if images.dtype == jnp.uint8 else images
    return jax.lax.map(lambda image: embed(image[None])[0], x) if alone else embed(x)


def features_description(embed: Any) -> str | None:
    """Return the text that identifies a function of `jm.features` with its parameters; None for others.

    Args:
      embed: `jax.tree_util.Partial` of a function, whose attribute `description` identifies everything but
        the parameters.
    """
    own = getattr(embed.func, "description", None)
    return None if own is None else f"{own}; parameters {hash_of_arrays((embed.args, embed.keywords))}"
