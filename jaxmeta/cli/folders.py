"""Folders that a command writes to, and files that it is told to write."""

import contextlib
import errno
import os
import socket
import warnings
from collections.abc import Iterator
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


class Results:
    """What a command has found, written one file after the other: one that fails costs no other.

    Examples:
      >>> results = Results()
      >>> with results.writing("report.json"):
      ...     raise OSError("the disk is full")
      >>> results.check()
      Traceback (most recent call last):
      OSError: report.json could not be written (the disk is full)
    """

    def __init__(self) -> None:
        self._problems: list[str] = []

    @contextlib.contextmanager
    def writing(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Write one of them inside."""
        try:
            yield
        except Exception as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self.fail(f"{os.fspath(path)} could not be written ({said or type(error).__name__})")

    def fail(self, problem: str) -> None:
        """Note what is not as it should be, for `check` to say."""
        self._problems.append(problem)

    def check(self) -> None:
        """Say what could not be written.

        Raises:
          OSError: there is something.
        """
        if self._problems:
            raise OSError("; ".join(self._problems))


@contextlib.contextmanager
def tolerated(path: Path) -> Iterator[Path]:
    """Write a picture, or what else a command can do without: where it fails, warn and go on."""
    try:
        yield path
    except Exception as error:
        warnings.warn(f"{path} could not be written: {error!r}", stacklevel=3)


# Held by a process that trains in a folder.
_LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder while inside.

    The operating system frees the lock of a process that dies. Where a file system has no locks, there is
    none.

    Raises:
      ArgumentError: another process has it.
    """
    held = _lock(folder / _LOCK)
    try:
        yield
    finally:
        if held is not None:
            with contextlib.suppress(OSError):
                (folder / _LOCK).unlink()
            with contextlib.suppress(OSError):
                os.close(held)


def _lock(path: Path) -> int | None:
    """Return the descriptor of a locked file, or None where files cannot be locked."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        try:
            held = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            return None
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(held, 200, 0).decode(errors="replace")
            os.close(held)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ArgumentError(
                    "out",
                    f"{owner or 'another process'} is training in {path.parent} at this moment; wait until "
                    "it has ended, or stop it",
                ) from None
            return None
        # The process that had it may have removed the file since it was opened.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held), os.stat(path)):
                with contextlib.suppress(OSError):
                    os.ftruncate(held, 0)
                    os.write(held, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return held
        os.close(held)
