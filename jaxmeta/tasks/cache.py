"""The cache folder."""

import os
import shutil
import sys
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
