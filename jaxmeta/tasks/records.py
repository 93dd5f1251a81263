"""Omniglot as a tensorflow-datasets data set of PNG files in ArrayRecord format, without TensorFlow."""

import contextlib
import functools
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from jaxmeta.checks import MissingPackageError
from jaxmeta.tasks.cache import cache_folder, ensure_space

PARTS = ("background", "evaluation")
SIDE = 105
SOURCE = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/images_{}.zip"
DATA_SET = "jaxmeta_omniglot"

Examples = dict[str, dict[str, bytes]]  # part -> "Alphabet/characterNN/DD" -> PNG file


def download(md5: Mapping[str, str], source: str = SOURCE) -> dict[str, Path]:
    """Download the official archives with tensorflow-datasets' download manager and verify their MD5 sums.

    Files that were downloaded before are reused.

    Args:
      md5: expected MD5 sum by part.
      source: address of the archives, with `{}` for the part.

    Returns:
      Path of the archive by part.

    Raises:
      OSError: no connection, or a file with another MD5 sum, which is removed.
    """
    tfds = _tfds()
    folder = cache_folder() / "downloads"
    ensure_space(folder, 20_000_000, "Omniglot's archives (15 MB)")
    manager = tfds.download.DownloadManager(download_dir=folder, dataset_name=DATA_SET)
    urls = {part: source.format(part) for part in PARTS}
    try:
        paths = {part: Path(path) for part, path in manager.download(urls).items()}
    except Exception as error:
        raise OSError(
            f"cannot download Omniglot from {urls['background']} ({type(error).__name__}); download "
            "images_background.zip and images_evaluation.zip by other means and pass their folder as data"
        ) from error
    for part, path in paths.items():
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        if digest != md5[part]:
            for file in (path, path.with_name(path.name + ".INFO")):
                file.unlink(missing_ok=True)
            raise OSError(
                f"{urls[part]}: got MD5 {digest}, expected {md5[part]}; the download was removed, try again"
            )
    return paths


def tensorflow_datasets(needed: str, otherwise: str = "") -> ModuleType:
    """Import and return tensorflow-datasets.

    It is imported on use, since it is optional and its import takes seconds.

    Args:
      needed: start of the error message: the purpose of the package.
      otherwise: end of the error message: an alternative.

    Raises:
      MissingPackageError: the package is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise MissingPackageError(f"{needed} (pip install 'jaxmeta[tfds]'): {error}{otherwise}") from error
    return tfds


def _tfds():
    return tensorflow_datasets(
        "preparing Omniglot needs tensorflow-datasets",
        "; alternatively pass an array file prepared on another machine as data",
    )


@functools.cache
def _builder():
    tfds = _tfds()

    class JaxmetaOmniglot(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Omniglot as PNG files; unlike the builder of tensorflow-datasets it does not need TensorFlow."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, *, examples: Examples | None = None, **kwargs):
            self._examples = examples or {}
            super().__init__(**kwargs)

        def _info(self):
            image = tfds.features.Image(shape=(SIDE, SIDE, 1), encoding_format="png")
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"image": image, "name": tfds.features.Text()}),
                homepage="https://github.com/brendenlake/omniglot",
            )

        def _split_generators(self, dl_manager):
            return {part: self._generate_examples(images) for part, images in self._examples.items()}

        def _generate_examples(self, images):
            for name, png in images.items():
                yield name, {"image": io.BytesIO(png), "name": name}

    return JaxmetaOmniglot


def write_records(folder: Path, examples: Examples) -> None:
    """Store the drawings in `folder` as the tensorflow-datasets data set `jaxmeta_omniglot`."""
    builder = _builder()(examples=examples, data_dir=folder, file_format="array_record")
    # Writing takes a second, and its progress bars would clutter the caller's output.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()


def read_records(folder: Path) -> Examples:
    """Return the drawings stored by `write_records`."""
    skip = _tfds().decode.SkipDecoding()
    builder = _builder()(data_dir=folder, file_format="array_record")
    examples: Examples = {}
    for part in PARTS:
        source = builder.as_data_source(part, decoders={"image": skip})
        rows = source.__getitems__(list(range(len(source))))
        examples[part] = {row["name"].decode(): row["image"] for row in rows}
    return examples
