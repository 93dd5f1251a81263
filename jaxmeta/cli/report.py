"""Progress, metrics and reports of a run.

`metrics.jsonl` grows while the run goes on; every other file is written beside its place and
renamed, so that what is there is whole.
"""

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmeta.cli import schema
from jaxmeta.cli.config import Config
from jaxmeta.cli.data import ImageSpec
from jaxmeta.cli.folders import tolerated
from jaxmeta.files import write_text
from jaxmeta.training.loop import Event, Progress, Resumed, Saved, Validated

_SECONDS_BETWEEN_LINES = 10.0
# Folder of its scalars, beside `metrics.jsonl`.
TENSORBOARD = "tensorboard"
# Of a row of `metrics.jsonl`, what is no curve.
_NO_SCALARS = ("step", "best", "compile_s")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`; a last line that was cut off is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


class RunLog:
    """The `report=` of `jm.train`: appends to `metrics.jsonl`, and shows how far the run is.

    The same numbers go to `tensorboard/` beside it, for `tensorboard --logdir`.

    A progress bar on a terminal, elsewhere a line every ten seconds and one at each validation.

    Args:
      path: of `metrics.jsonl`.
      steps: meta-steps in all.
      metric: "accuracy" or "mse".
    """

    def __init__(self, path: Path, steps: int, metric: str):
        self.path, self.steps, self.metric = path, steps, metric
        self.compile_s: float | None = None
        self.steps_per_second: float | None = None
        self.best_step = steps
        self.skipped = 0
        self._started = time.perf_counter()
        self._spent_before = 0.0
        self._stepping_s, self._last_step = 0.0, 0
        self._shown_at = -float("inf")
        self._show, self._say = _nothing, print
        self._scalars: Any = None
        self._void_from: int | None = None
        self._failed: set[str] = set()

    @property
    def elapsed_s(self) -> float:
        """Return the seconds the run took so far, those before a resumption included."""
        return self._spent_before + time.perf_counter() - self._started

    @contextlib.contextmanager
    def showing(self) -> Iterator["RunLog"]:
        """Show progress while inside."""
        self._started = time.perf_counter()
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - reopened by `_rewind`
        with contextlib.ExitStack() as shown_on:
            if sys.stdout.isatty():
                with self._forgiving("the progress bar"):
                    self._show, self._say = shown_on.enter_context(_bar(self.steps))
            else:
                self._show = self._plain
            try:
                yield self
            finally:
                with self._forgiving(str(self.path)):
                    self._file.close()
                with self._forgiving(TENSORBOARD):
                    if self._scalars is not None:
                        self._scalars.close()
                self._scalars = None
                with self._forgiving("the progress bar"):
                    shown_on.close()
                self._show, self._say = _nothing, print

    @contextlib.contextmanager
    def _forgiving(self, what: str) -> Iterator[None]:
        """Write what the training can do without: where it fails, say so once and go on."""
        try:
            yield
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                warnings.warn(f"{what} could not be written, and training goes on: {error!r}", stacklevel=4)

    def __call__(self, event: Event) -> None:
        match event:
            case Resumed(step):
                self._rewind(step)
                self._say(f"continuing after meta-step {step}")
            case Progress():
                row = {
                    "step": event.step,
                    **event.metrics,
                    "steps_per_second": event.steps_per_second,
                    "compile_s": event.compile_s,
                    "skipped": event.skipped,
                }
                self._count(row)
                self._write(row)
                with self._forgiving("the progress bar"):
                    self._show(event)
            case Validated():
                if event.best:
                    self.best_step = event.step
                mean, ci95 = event.evaluation.mean, event.evaluation.ci95
                name = f"validation_{event.metric}"
                self._write({"step": event.step, name: mean, f"{name}_ci95": ci95, "best": event.best})
                marker = "  (best so far)" if event.best else ""
                result = shown(event.evaluation._asdict(), event.metric)
                unit = " %" if event.metric == "accuracy" else ""
                self._say(f"step {event.step:>6}  validation {event.metric} {result}{unit}{marker}")
            case Saved():
                pass

    def _count(self, row: dict[str, Any]) -> None:
        taken = row["step"] - self._last_step
        self._last_step = row["step"]
        self._stepping_s += taken / row["steps_per_second"]
        self.steps_per_second = self._last_step / self._stepping_s
        self.compile_s = row["compile_s"]
        # Rows of an earlier version have none.
        self.skipped += row.get("skipped", 0)

    def _write(self, row: dict[str, Any]) -> None:
        with self._forgiving(str(self.path)):
            # What cannot be written stays in the file's buffer for the next time.
            self._file.write(json.dumps({**row, "elapsed_s": round(self.elapsed_s, 3)}) + "\n")
            self._file.flush()
        with self._forgiving(TENSORBOARD):
            self._write_scalars(row)

    def _write_scalars(self, row: dict[str, Any]) -> None:
        if self._scalars is None:
            self._scalars = self._tensorboard()
        for name, value in row.items():
            if name not in _NO_SCALARS:
                tag = (
                    f"validation/{name.removeprefix('validation_')}" if "best" in row else f"training/{name}"
                )
                self._scalars.add_scalar(tag, value, row["step"])
        self._scalars.flush()

    def _rewind(self, step: int) -> None:
        """Drop the rows that the run is about to write again."""
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        self._file.close()
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._void_from = step + 1
        self._spent_before = rows[-1]["elapsed_s"] if rows else 0.0
        for row in rows:
            if "loss" in row:
                self._count(row)
            elif row["best"]:
                self.best_step = row["step"]

    def _tensorboard(self) -> Any:
        from tensorboardX import SummaryWriter

        # Files are named by the second, and two of one second would be one.
        return SummaryWriter(
            str(self.path.parent / TENSORBOARD),
            purge_step=self._void_from,
            filename_suffix=f".{time.time_ns()}",
        )

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


@contextlib.contextmanager
def profiling(report: Callable[[Event], None], folder: Path) -> Iterator[Callable[[Event], None]]:
    """Give `report` with JAX's profiler on between its first two `Progress` events, writing to `folder`.

    After the first all is compiled; and what a trace takes of memory and disk grows with its length.
    """
    import jax

    seen = 0

    def stop() -> None:
        nonlocal seen
        with tolerated(folder):
            if seen == 1:
                jax.profiler.stop_trace()
        seen += 1

    def watched(event: Event) -> None:
        report(event)
        if isinstance(event, Progress):
            stop()
            with tolerated(folder):
                if seen == 1:
                    jax.profiler.start_trace(str(folder), create_perfetto_trace=True)

    try:
        yield watched
    finally:
        stop()


def _nothing(event: Progress) -> None:
    del event


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
    shown = [f"loss {event.metrics['loss']:.4f}"]
    if "accuracy" in event.metrics:
        shown.append(f"accuracy {100 * event.metrics['accuracy']:.1f} %")
    if "mse" in event.metrics:
        shown.append(f"mse {event.metrics['mse']:.4f}")
    if event.skipped:
        shown.append(f"{event.skipped} skipped")
    return "  ".join(shown)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def shown(row: dict[str, Any], metric: str, sign: str = "") -> str:
    """Return mean ± half-width of the confidence interval, accuracy in %."""
    digits, scale = (2, 100) if metric == "accuracy" else (4, 1)
    return f"{scale * row['mean']:{sign}z.{digits}f} ± {scale * row['ci95']:.{digits}f}"


# Whose statistics, by `norm` of the learner.
NORMALISED = {
    "none": "no batch normalisation",
    "batch": "batch normalisation by the evaluated batch",
    "population": "batch normalisation by the training tasks",
    "support": "batch normalisation by the support set",
    "episode": "batch normalisation by the support set, a running average over the inner steps",
}


def report_markdown(report: dict[str, Any], config: Config) -> str:
    """Return a report as Markdown."""
    card = report["card"]
    lines = [f"# {report['learner']} on {card['tasks']}", "", f"{card['protocol'] or card['tasks']}.", ""]
    if "accuracy" in report:
        lines += ["| test accuracy | 95 % CI | queries |", "| --- | --- | --- |"]
        for name, row in report["accuracy"].items():
            lines.append(
                f"| **{100 * row['mean']:.2f} %** | ± {100 * row['ci95']:.2f} | "
                f"{name}: {NORMALISED[row['norm']]} |"
            )
        by_instance = report.get("accuracy_by_instance", {})
        if by_instance:
            lines += ["", "Accuracy by presentation of a class, in the sequence itself:", ""]
            lines += ["| " + " | ".join(by_instance) + " |", "|" + " --- |" * len(by_instance)]
            lines += ["| " + " | ".join(f"{100 * value:.1f} %" for value in by_instance.values()) + " |"]
    else:
        lines += ["| inner steps at test | test mean squared error | 95 % CI |", "| --- | --- | --- |"]
        rows = report.get("mse_by_step") or {str(config.learner.get("eval_steps", "")): report["mse"]}
        lines += [f"| {steps} | **{row['mean']:.4f}** | ± {row['ci95']:.4f} |" for steps, row in rows.items()]
    if guessing := chance_level(report):
        lines += ["", f"{guessing}."]
    lines += ["", "![learning curve](curve.png)", ""]
    table = {
        "test tasks": f"{report['episodes']:,}",
        "split": f"{card['split']}, {plural(card['classes'], 'class')}" if card["classes"] else card["split"],
        "split hash": card["split_hash"],
        "images": None if config.images is None else ImageSpec(**config.images),
        "parameters": f"{report['parameters']:,}, tested as after meta-step {report['best_step']}",
        "meta-steps skipped": report["skipped"] or None,
        "speed": report["steps_per_second"] and f"{report['steps_per_second']:.1f} meta-steps/s",
        "time": f"{report['wall_s']:.1f} s, compiling the meta-step {report['compile_s'] or 0:.1f} s of it",
        "peak memory": report["peak_memory_bytes"]
        and f"{report['peak_memory_bytes'] / 1e6:,.0f} MB of the {report['peak_memory']}",
        "device": f"{report['devices']} × {report['device']}",
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "preset": report["preset"],
    }
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| {name} | {cell(value)} |" for name, value in table.items() if value is not None]
    if report.get("command"):
        lines += repeated_by(report["command"])
    lines += [
        "",
        "Settings, by the names of their flags:",
        "",
        "| group | setting | value |",
        "| --- | --- | --- |",
    ]
    known = config.names().stored_groups()
    for group in known:
        named = getattr(config, group)
        if isinstance(named, dict):
            lines.append(f"| {group} | | **{cell(named['name'])}** |")
        for name, value in config.settings(group).items():
            lines.append(f"| {group} | {name} | {cell(schema.shown_value(value))} |")
    return "\n".join(lines) + "\n"


def chance_level(result: Mapping[str, Any]) -> str | None:
    """Return what a learner must beat in words; None where the number of classes varies."""
    if "mse_of_mean" in result:
        return f"Answering with the mean of the support targets: {shown(result['mse_of_mean'], 'mse')}"
    ways = result["card"]["ways"]
    return f"Guessing: {100 / ways:.2f} %, one of {ways} classes" if isinstance(ways, int) else None


def cell(text: Any) -> str:
    """Return a text as a cell of a table in Markdown, which a line's end or a bar would end."""
    return " ".join(str(text).split()).replace("|", "\\|")


def repeated_by(command: str) -> list[str]:
    """Return the lines of a report that give the command to repeat it."""
    return ["", "The command that repeats it:", "", "```sh", command, "```"]


def plural(count: int, noun: str) -> str:
    """Return a number with its noun.

    Examples:
      >>> plural(1, "inner step"), plural(2000, "class"), plural(5, "query")
      ('1 inner step', '2,000 classes', '5 queries')
    """
    if count == 1:
        return f"1 {noun}"
    stem, ending = (noun[:-1], "ies") if noun.endswith("y") else (noun, "es" if noun.endswith("s") else "s")
    return f"{count:,} {stem}{ending}"
