"""The cache folder of prepared data."""

import os
import shutil
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of prepared data: $JAXMETA_CACHE, else `jaxmeta` in the platform's cache folder."""
    chosen = os.environ.get("JAXMETA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "jaxmeta"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "jaxmeta"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmeta"


def ensure_space(folder: Path, needed: int, what: str) -> None:
    """Create `folder` and check that it has enough free disk space.

    Args:
      folder: folder to create.
      needed: bytes that must be free.
      what: purpose of the space, for the message.

    Raises:
      OSError: too little disk space, or the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot create the cache folder {folder} ({error.strerror}); set JAXMETA_CACHE to another folder"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"too little disk space for {what}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free in "
            f"{folder}; free some, or set JAXMETA_CACHE to another folder"
        )
