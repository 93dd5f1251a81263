"""Progress of a training run, as a bar on a terminal or line by line."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxmeta.training import hosts
from jaxmeta.training.diagnostics import Alignment
from jaxmeta.training.events import Event, Progress, Resumed, Validated
from jaxmeta.training.metrics import Forgiving

_SECONDS_BETWEEN_LINES = 10.0
_MOST_METRICS = 2


def progress_bar() -> "ProgressBar":
    """Return a `report=` for `jm.train` that shows its progress, as `jaxmeta train` does.

    On a terminal it shows a bar with loss, metrics, steps per second and the remaining time, elsewhere it
    prints a line every ten seconds. Each validation has a line, too. Only the first of several processes
    prints. The bar needs the package rich; without it, lines are printed.

    Examples:
      >>> import jax, optax
      >>> import jaxmeta as jm
      >>> tasks = jm.tasks.sinusoid(shots=5, queries=5)
      >>> learner = jm.maml(jm.nn.MLP(out=1, hidden=()), loss=jm.losses.mse)
      >>> settings = {"steps": 10, "meta_batch": 2, "key": jax.random.key(0)}
      >>> state = jm.train(learner, tasks, optax.sgd(0.0), report=jm.progress_bar(), **settings)
      ... # doctest: +ELLIPSIS
      step     10/10  loss ...  mse ...  ... steps/s  0:00 left
    """
    return ProgressBar()


class ProgressBar:
    """The `report=` that `progress_bar` returns.

    `jm.train` shows the bar while it runs. Called with events by any other function, it prints lines.
    """

    def __init__(self) -> None:
        self._shown_at = -float("inf")
        self._show: Callable[[Progress], None] = self._plain
        self._say: Callable[[str], None] = print
        self._forgiving = Forgiving()

    @contextlib.contextmanager
    def showing(self, steps: int) -> Iterator[None]:
        """Show a bar of `steps` meta-steps inside the block if standard output is a terminal."""
        if not hosts.is_first():
            yield
            return
        with contextlib.ExitStack() as stack:
            self._shown_at = -float("inf")
            if sys.stdout.isatty():
                with self._forgiving("the progress bar"):
                    self._show, self._say = stack.enter_context(_bar(steps))
            try:
                yield
            finally:
                with self._forgiving("the progress bar"):
                    stack.close()
                self._show, self._say = self._plain, print

    def __call__(self, event: Event) -> None:
        if not hosts.is_first():
            return
        match event:
            case Resumed(step):
                self._say(f"continuing after meta-step {step}")
            case Progress():
                with self._forgiving("the progress bar"):
                    self._show(event)
            case Validated():
                marker = "  (best so far)" if event.best else ""
                result = format_interval(event.evaluation._asdict(), event.metric)
                unit = " %" if event.metric == "accuracy" else ""
                self._say(f"step {event.step:>6}  validation {event.metric} {result}{unit}{marker}")

    def _plain(self, event: Progress) -> None:
        now = time.perf_counter()
        if event.step < event.steps and now - self._shown_at < _SECONDS_BETWEEN_LINES:
            return
        self._shown_at = now
        left = (event.steps - event.step) / event.steps_per_second
        print(
            f"step {event.step:>6}/{event.steps}  {_values(event)}  {event.steps_per_second:.1f} steps/s  "
            f"{_duration(left)} left",
            flush=True,
        )


class CountLines:
    """A callback `(done, total)` that prints a line every ten seconds, for work on many examples.

    Work of less than ten seconds has no line. The remaining time is estimated without the first call, whose
    duration includes compilation. Only the first of several processes prints.

    Args:
      work: name of the work at the start of each line.
      noun: name of what is counted, in the plural.
      seconds: time between lines.

    Examples:
      >>> count = CountLines("features", "images", seconds=0.0)
      >>> count(0, 64)
      features  0/64 images
    """

    def __init__(self, work: str, noun: str, *, seconds: float = _SECONDS_BETWEEN_LINES) -> None:
        self._work, self._noun, self._seconds = work, noun, seconds
        self._shown_at = time.perf_counter()
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self._first is None:
            self._first = done, now
        if now - self._shown_at < self._seconds or not hosts.is_first():
            return
        self._shown_at = now
        line = f"{self._work}  {done:,}/{total:,} {self._noun}"
        before, since = self._first
        if done > before:
            line += f"  {_duration((total - done) * (now - since) / (done - before))} left"
        print(line, flush=True)


def showing(report: Any, steps: int) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a progress bar; for any other `report`, one that does nothing."""
    return report.showing(steps) if isinstance(report, ProgressBar) else contextlib.nullcontext()


@contextlib.contextmanager
def _bar(steps: int) -> Iterator[tuple[Any, ...]]:
    from rich import progress

    with progress.Progress(
        progress.TextColumn("meta-training"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[values]}"),
        progress.TextColumn("{task.fields[rate]} steps/s"),
        progress.TextColumn("{task.fields[left]} left"),
    ) as bar:
        task = bar.add_task("meta-training", total=steps, values="compiling…", rate="–", left="–")

        def show(event: Progress) -> None:
            left = (event.steps - event.step) / event.steps_per_second
            bar.update(
                task,
                completed=event.step,
                values=_values(event),
                rate=f"{event.steps_per_second:.1f}",
                left=_duration(left),
            )

        yield show, lambda line: bar.console.print(line, highlight=False, markup=False)


def _values(event: Progress) -> str:
    values = [f"loss {event.metrics['loss']:.4f}"]
    custom = [name for name in event.metrics if name not in ("loss", *Alignment._fields)]
    # A learner may report many metrics, such as the accuracy of each presentation of a sequence.
    for name in [name for name in ("accuracy", "mse") if name in custom] or custom[:_MOST_METRICS]:
        value = event.metrics[name]
        values.append(f"{name} {100 * value:.1f} %" if name == "accuracy" else f"{name} {value:.4f}")
    if event.skipped:
        values.append(f"{event.skipped} skipped")
    return "  ".join(values)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def format_interval(row: dict[str, Any], metric: str, sign: str = "") -> str:
    """Return "mean ± half-width of the confidence interval", with accuracy in %."""
    digits, scale = (2, 100) if metric == "accuracy" else (4, 1)
    return f"{scale * row['mean']:{sign}z.{digits}f} ± {scale * row['ci95']:.{digits}f}"
