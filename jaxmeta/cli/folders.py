"""Output folders and output files of commands."""

import contextlib
import errno
import os
import socket
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from jaxmeta.checks import ArgumentError

# Kinds of folders that --resume can continue.
_RESUMED = ("run", "comparison")


def claim(out: str | None, name: str, kind: str = "run") -> Path:
    """Create the folder of a new run, which no other run can get.

    Args:
      out: value of `--out`; None for runs/NAME-TIME, with a number appended where another run was
        started in the same second.
      name: first part of the name of a folder in runs/.
      kind: kind of output, for errors: "run", "comparison" or "transfer".

    Returns:
      The path of the folder.

    Raises:
      FileExistsError: the folder `out` is not empty.
    """
    if out is not None:
        folder = Path(out).expanduser()
        check_empty(folder, kind)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    moment = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    for number in range(1, 10_000):
        folder = Path("runs") / f"{name}-{moment}{'' if number == 1 else f'-{number}'}"
        try:
            # `mkdir` is atomic: a folder belongs to the process that creates it.
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"--out: runs/{name}-{moment} and 9,998 numbered folders exist; add --out DIR")


def check_empty(folder: Path, kind: str = "run") -> None:
    """Check that an output folder does not exist, or is empty.

    Raises:
      FileExistsError: the folder is not empty, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        go_on = f", or continue its {kind} with --resume" if kind in _RESUMED else ""
        raise FileExistsError(f"--out: {folder} exists and is not empty; choose another{go_on}")


def output_file(name: str, path: str | None) -> Path | None:
    """Return the absolute path of an output file; None where the flag is not given.

    Args:
      name: name of the flag's argument, for errors.
      path: value of the flag.

    Raises:
      ArgumentError: the path is a folder, or its parent folder does not exist.
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
    """Return the absolute path of `--data`; None where the flag is not given.

    Raises:
      FileNotFoundError: the path does not exist.
    """
    if data is None:
        return None
    path = Path(data).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"--data: {data} does not exist")
    return os.fspath(path.resolve())


class Results:
    """Result files of a command, written one after the other; a failure does not stop the others.

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
        """Write a file inside the context, and record a failure."""
        try:
            yield
        except Exception as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self.fail(f"{os.fspath(path)} could not be written ({reason or type(error).__name__})")

    def fail(self, problem: str) -> None:
        """Record a problem, which `check` will raise."""
        self._problems.append(problem)

    def check(self) -> None:
        """Raise the recorded problems.

        Raises:
          OSError: a file could not be written.
        """
        if self._problems:
            raise OSError("; ".join(self._problems))


@contextlib.contextmanager
def tolerated(path: Path) -> Iterator[Path]:
    """Write an optional output, such as a picture, inside the context; a failure becomes a warning."""
    try:
        yield path
    except Exception as error:
        warnings.warn(f"{path} could not be written: {error!r}", stacklevel=3)


# File in a run's folder that the process training there has locked.
_LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder inside the context.

    The operating system frees the lock of a process that dies. A file system without locks locks nothing.

    Raises:
      ArgumentError: another process has locked the folder.
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
                    f"{owner or 'another process'} is training in {path.parent} now; wait for its end, or "
                    "stop it",
                ) from None
            return None
        # The previous owner may have removed the file after it was opened here. A lock on a removed file
        # keeps nobody out, so the loop tries again.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held), os.stat(path)):
                with contextlib.suppress(OSError):
                    os.ftruncate(held, 0)
                    os.write(held, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return held
        os.close(held)
