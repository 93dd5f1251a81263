"""Standard output and error that cannot end a command.

Characters that the terminal cannot show are replaced. What cannot be written at all, since the reader of a
pipe has gone or a disk is full, is left out: the command goes on, and its exit status tells.
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any


class Output:
    """A text stream whose failure to write is remembered instead of raised.

    Args:
      stream: None where the process was started without it.

    Attributes:
      error: why something could not be written; None where all was.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self.error: Exception | None = None
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        try:
            return self.error is None and self.stream is not None and self.stream.isatty()
        except ValueError:
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, name: str, *arguments: str) -> None:
        if self.error is not None:
            return
        try:
            if self.stream is None:
                raise OSError("it is closed")
            getattr(self.stream, name)(*arguments)
        except (OSError, ValueError) as error:
            self.error = error

    def discard(self) -> None:
        """Leave out what the stream still holds, which the interpreter would try to write at its end."""
        if self.error is None or self.stream is None or self.stream not in (sys.__stdout__, sys.__stderr__):
            return
        with contextlib.suppress(AttributeError, OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.stream.fileno())
            os.close(nothing)


@contextlib.contextmanager
def forgiving() -> Iterator[Output]:
    """Make the standard streams forgiving while inside, and give standard output."""
    before = sys.stdout, sys.stderr
    out, err = Output(sys.stdout), Output(sys.stderr)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before
        for each in (out, err):
            each.flush()
            each.discard()


def hold_places() -> None:
    """Open what of the standard streams is closed, so that no file of ours gets its number and its prints."""
    place = os.open(os.devnull, os.O_RDWR)
    while place <= 2:
        place = os.open(os.devnull, os.O_RDWR)
    os.close(place)
