"""The metrics file of a run, with a JSON row for each event."""

import contextlib
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from jaxmeta.files import write_text
from jaxmeta.training.events import Event, Progress, Resumed, Validated

# Name of the file in a run's folder.
METRICS = "metrics.jsonl"
# Keys of a row that are not metrics of the learner.
NON_METRICS = ("step", "loss", "steps_per_second", "compile_s", "skipped", "best", "elapsed_s")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`, without lines that are not JSON, such as a last line cut off."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def row_of(event: Event) -> dict[str, Any] | None:
    """Return the row of an event; None for an event without a row."""
    match event:
        case Progress():
            return {
                "step": event.step,
                **event.metrics,
                "steps_per_second": event.steps_per_second,
                "compile_s": event.compile_s,
                "skipped": event.skipped,
            }
        case Validated():
            mean, ci95 = event.evaluation.mean, event.evaluation.ci95
            name = f"validation_{event.metric}"
            return {"step": event.step, name: mean, f"{name}_ci95": ci95, "best": event.best}
    return None


class Forgiving:
    """A context manager for optional output: an error inside it becomes a warning, once for each output.

    Examples:
      >>> forgiving = Forgiving()
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     for _ in range(2):
      ...         with forgiving("the progress bar"):
      ...             raise OSError("the terminal has gone")
      >>> len(caught)
      1
    """

    def __init__(self) -> None:
        self._failed: set[str] = set()

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Run the block, which writes the output named `what`."""
        try:
            yield
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                warnings.warn(f"{what} could not be written; training continues: {error!r}", stacklevel=4)


class MetricsLog:
    """A `report` for `jm.train` that writes rows to a file.

    A resumed run removes the rows of the steps that it repeats; any other run starts a new file.

    Args:
      path: path of the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._started, self._spent_before = time.perf_counter(), 0.0
        self._file: IO[str] | None = None
        self._mode = "w"
        self._forgiving = Forgiving()

    def __call__(self, event: Event) -> None:
        with self._forgiving(str(self.path)):
            if isinstance(event, Resumed):
                self._rewind(event.step)
            if (row := row_of(event)) is None:
                return
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, self._mode, encoding="utf-8")  # noqa: SIM115 - see `close`
            elapsed = self._spent_before + time.perf_counter() - self._started
            # After a failed write the row stays in the file's buffer and is written with the next one.
            self._file.write(json.dumps({**row, "elapsed_s": round(elapsed, 3)}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with self._forgiving(str(self.path)):
            if self._file is not None:
                self._file.close()

    def _rewind(self, step: int) -> None:
        self._mode = "a"
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        if self.path.exists():
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._spent_before = rows[-1]["elapsed_s"] if rows else 0.0
