"""Files that appear whole or not at all."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, moved onto it if the block succeeds, removed if it fails.

    A reader, or another process that writes the same file, sees the old file or the new one.
    """
    # The suffix stays, by which some writers choose the format or would add their own.
    unfinished = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text`, whole or not at all."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content`, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_new_json(path: Path, content: Any) -> None:
    """Write `content`, whole, where there is no file yet.

    Raises:
      FileExistsError: there is one: another process came first.
    """
    unfinished = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    text = json.dumps(content, indent=2) + "\n"
    try:
        unfinished.write_text(text, encoding="utf-8")
        try:
            # Unlike a renaming, a link never replaces what is there.
            os.link(unfinished, path)
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError:  # a file system without links
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
    finally:
        unfinished.unlink(missing_ok=True)
