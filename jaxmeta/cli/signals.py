"""Signals that ask a command to stop: it saves first where there is something to save."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Signalled(KeyboardInterrupt):
    """Raise where a command was told to stop: how, and how it can go on.

    Without a message nothing has been saved that a command could go on with.
    """


class Signals:
    """SIGTERM and SIGINT: noted while training saves what there is, raised anywhere else.

    A second signal is raised at once.

    Args:
      hint: how the command can go on; None where there is nothing yet to go on with.

    Attributes:
      training: whether signals are noted.
      asked: the name of the signal that was noted.
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
        """Return what to raise for a signal, by its name; without one for the signal that was noted."""
        return Signalled(*(() if self.hint is None else (f"by {name or self.asked}; {self.hint}",)))

    @contextlib.contextmanager
    def handled(self) -> Iterator["Signals"]:
        """Handle both signals while inside."""
        try:
            before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread, which alone may handle signals
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
    """Return what handles signals now: those of the command; outside of a command nothing does."""
    return _handling[-1] if _handling else Signals(None)
