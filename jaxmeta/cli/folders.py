"""Folders that a command writes to, and files that it is told to write."""

import os
from datetime import datetime
from pathlib import Path

from jaxmeta.checks import ArgumentError

# What can be continued.
_RESUMED = ("run", "comparison")


def claim(given: str | None, name: str, kind: str = "run") -> Path:
    """Make and return the folder of a new run, which no other run can get.

    Args:
      given: of `--out`; None for one in runs/ named by `name` and the time, with a number behind it where
        another run was started in the same second.
      name: what a folder in runs/ is called.
      kind: what the folder is of, for errors.

    Raises:
      FileExistsError: the given folder is not empty.
    """
    if given is not None:
        folder = Path(given).expanduser()
        refuse_used(folder, kind)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    moment = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    for number in range(1, 10_000):
        folder = Path("runs") / f"{name}-{moment}{'' if number == 1 else f'-{number}'}"
        try:
            # The one that makes a folder has it: `mkdir` is atomic.
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"--out: there are 10,000 folders runs/{name}-{moment}; choose one by --out")


def refuse_used(folder: Path, kind: str = "run") -> None:
    """Refuse a folder that holds something.

    Raises:
      FileExistsError: it does.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        go_on = f", or continue its {kind} with --resume" if kind in _RESUMED else ""
        raise FileExistsError(f"--out: {folder} exists and is not empty; choose another{go_on}")


def output_file(name: str, path: str | None) -> Path | None:
    """Return where a file is written to that a flag names.

    Raises:
      ArgumentError: it is a folder, or the folder that it lies in does not exist.
    """
    if path is None:
        return None
    target = Path(path).expanduser().absolute()
    if target.is_dir():
        raise ArgumentError(name, f"{path} is a folder; name a file")
    if not target.parent.is_dir():
        raise ArgumentError(name, f"the folder {target.parent} does not exist")
    return target


def data_folder(data: str | None) -> str | None:
    """Return the path of `--data` as it is good in every folder.

    Raises:
      FileNotFoundError: it does not exist.
    """
    if data is None:
        return None
    path = Path(data).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"--data: {data} does not exist")
    return os.fspath(path.resolve())
