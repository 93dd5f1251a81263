"""Files that are written atomically."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, moved to `path` if the block succeeds.

    If the block fails, the temporary file is removed. Readers, and other processes that write the same file,
    see either the old file or the new one.
    """
    # Keep the suffix: matplotlib chooses the format by it, and numpy would append its own.
    unfinished = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_new_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically, to a file that does not exist yet.

    Raises:
      FileExistsError: the file exists, for example because another process was first.
    """
    write_new(path, (json.dumps(content, indent=2) + "\n").encode())


def write_new(path: Path, content: bytes) -> None:
    """Write bytes atomically to a file that does not exist yet.

    Raises:
      FileExistsError: the file exists, for example because another process was first.
    """
    unfinished = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        unfinished.write_bytes(content)
        try:
            # A rename would replace an existing file; a link fails.
            os.link(unfinished, path)
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError:  # a file system without links
            with open(path, "xb") as file:
                file.write(content)
    finally:
        unfinished.unlink(missing_ok=True)
