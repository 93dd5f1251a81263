"""The cache folder, and files that appear there whole or not at all."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """Where prepared data are kept: $JAXMETA_CACHE, else `jaxmeta` in the platform's cache folder."""
    chosen = os.environ.get("JAXMETA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "jaxmeta"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "jaxmeta"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmeta"


def make_room(folder: Path, needed: int, what: str) -> None:
    """Makes `folder` and checks that `needed` bytes are free there.

    Raises:
      OSError: too little disk, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot make the cache folder {folder} ({error.strerror}); set JAXMETA_CACHE to another"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"too little disk for {what}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} free in {folder}; "
            "free some, or set JAXMETA_CACHE to another folder"
        )


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it if the block succeeds, removed if it fails.

    A reader, or another process preparing the same file, sees the old file or the new one.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
