"""Handling of signals that stop a command: training saves its state first."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

# Exit statuses of a command: another error, a usage error, and stopped by a signal after saving.
EXIT_OTHER, EXIT_USER, EXIT_STOPPED = 1, 2, 75


class Signalled(KeyboardInterrupt):
    """A command was stopped by a signal.

    The message names the signal and the way to continue. Without a message nothing was saved.
    """


class Signals:
    """A handler of SIGTERM and SIGINT: deferred in training, which saves its state, and raised otherwise.

    A second signal is raised at once.

    Args:
      hint: instruction to continue the command; None before there is anything to continue.

    Attributes:
      training: whether signals are deferred.
      asked: name of the deferred signal; None before there is one.
    """

    def __init__(self, hint: str | None):
        self.hint, self.training = hint, False
        self.asked: str | None = None

    def __call__(self, number: int, frame: Any) -> None:
        del frame
        name = signal.Signals(number).name
        if not self.training or self.asked:
            raise self.stopped(name)
        self.asked = name

    def stopped(self, name: str | None = None) -> Signalled:
        """Return the exception for a signal by its name; None for the deferred signal."""
        return Signalled(*(() if self.hint is None else (f"by {name or self.asked}; {self.hint}",)))

    @contextlib.contextmanager
    def handled(self) -> Iterator["Signals"]:
        """Handle both signals inside the context."""
        try:
            before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # only the main thread may handle signals
            before = {}
        _handling.append(self)
        try:
            yield self
        finally:
            _handling.remove(self)
            for number, handler in before.items():
                signal.signal(number, handler)


_handling: list[Signals] = []


def current() -> Signals:
    """Return the handler of the running command; outside of a command, one that handles nothing."""
    return _handling[-1] if _handling else Signals(None)
