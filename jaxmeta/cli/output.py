"""Standard output and error whose failures do not end a command.

Characters that the terminal cannot show are replaced. Where the reader of a pipe has gone or a disk is full,
further output is dropped and the command continues, so that the files it writes are whole. A full disk is
reported at the end; a closed pipe is not, since `| head` closes it on purpose.
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any


class Output:
    """A text stream that records a failure to write instead of raising it.

    Args:
      stream: stream to write to; None where the process was started without it.

    Attributes:
      error: first error of writing; None where everything was written.
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

    @property
    def failed(self) -> bool:
        """Return whether output was lost for a reason other than a closed pipe."""
        return self.error is not None and not isinstance(self.error, BrokenPipeError)

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
        """Drop the stream's buffer, which the interpreter would otherwise try to write when it exits."""
        if self.error is None or self.stream is None or self.stream not in (sys.__stdout__, sys.__stderr__):
            return
        with contextlib.suppress(AttributeError, OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.stream.fileno())
            os.close(nothing)


@contextlib.contextmanager
def forgiving() -> Iterator[Output]:
    """Replace the standard streams inside the context, and yield standard output."""
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


def reserve_descriptors() -> None:
    """Open closed standard streams on the null device.

    Otherwise the next file that is opened gets the stream's descriptor, and with it everything printed there.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
