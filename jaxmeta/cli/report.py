"""Progress, metrics and reports of a run.

`jm.train` writes `metrics.jsonl` during the run; every other file is written under another name and renamed,
so that no reader sees a partial file.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmeta.cli import schema
from jaxmeta.cli.config import Config
from jaxmeta.cli.data import ImageSpec
from jaxmeta.cli.folders import tolerated
from jaxmeta.training.events import Event, Progress, Resumed, Validated
from jaxmeta.training.metrics import Forgiving, read_metrics, row_of
from jaxmeta.training.progress import ProgressBar, format_interval

# Folder of TensorBoard's scalars, next to `metrics.jsonl`.
TENSORBOARD = "tensorboard"
# Entries of a row of `metrics.jsonl` that are not curves.
_NO_SCALARS = ("step", "best", "compile_s")


class RunLog:
    """A `report` callback of `jm.train` that shows the progress of a run and keeps numbers for its report.

    The numbers of `metrics.jsonl` are also written to `tensorboard/` next to it, for `tensorboard --logdir`.

    Args:
      path: path of `metrics.jsonl`.
      steps: number of meta-steps of the whole run.
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
        self._bar = ProgressBar()
        self._scalars: Any = None
        self._purge_from: int | None = None
        self._forgiving = Forgiving()

    @property
    def elapsed_s(self) -> float:
        """Return the seconds of the run so far, including those before a resumption."""
        return self._spent_before + time.perf_counter() - self._started

    @contextlib.contextmanager
    def showing(self) -> Iterator["RunLog"]:
        """Open the log and show progress inside the context."""
        self._started = time.perf_counter()
        with self._bar.showing(self.steps):
            try:
                yield self
            finally:
                with self._forgiving(TENSORBOARD):
                    if self._scalars is not None:
                        self._scalars.close()
                self._scalars = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Resumed):
            self._rewind(event.step)
        if isinstance(event, Validated) and event.best:
            self.best_step = event.step
        if (row := row_of(event)) is not None:
            if isinstance(event, Progress):
                self._count(row)
            with self._forgiving(TENSORBOARD):
                self._write_scalars(row)
        self._bar(event)

    def _count(self, row: dict[str, Any]) -> None:
        taken = row["step"] - self._last_step
        self._last_step = row["step"]
        self._stepping_s += taken / row["steps_per_second"]
        self.steps_per_second = self._last_step / self._stepping_s
        self.compile_s = row["compile_s"]
        # Rows of earlier versions do not have `skipped`.
        self.skipped += row.get("skipped", 0)

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
        """Restore the counts of the rows that a resumed run keeps."""
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        self._purge_from = step + 1
        self._spent_before = rows[-1]["elapsed_s"] if rows else 0.0
        for row in rows:
            if "loss" in row:
                self._count(row)
            elif row["best"]:
                self.best_step = row["step"]

    def _tensorboard(self) -> Any:
        from tensorboardX import SummaryWriter

        # File names contain the time in seconds; the suffix makes them unique within a second.
        return SummaryWriter(
            str(self.path.parent / TENSORBOARD),
            purge_step=self._purge_from,
            filename_suffix=f".{time.time_ns()}",
        )


@contextlib.contextmanager
def profiling(report: Callable[[Event], None], folder: Path) -> Iterator[Callable[[Event], None]]:
    """Yield `report`, with JAX's profiler writing to `folder` between its first two `Progress` events.

    After the first event everything is compiled. The trace ends at the second event to limit its size.
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


# Descriptions of the statistics of batch normalisation, by the learner's `norm`.
NORMALISED = {
    "none": "no batch normalisation",
    "batch": "batch normalisation with statistics of the evaluated batch",
    "population": "batch normalisation with statistics of the training tasks",
    "support": "batch normalisation with statistics of the support set",
    "episode": "batch normalisation with running statistics of the support set over the inner steps",
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
        "parameters": f"{report['parameters']:,}; tested after meta-step {report['best_step']}",
        "meta-steps skipped": report["skipped"] or None,
        "speed": report["steps_per_second"] and f"{report['steps_per_second']:.1f} meta-steps/s",
        "time": f"{report['wall_s']:.1f} s, with {report['compile_s'] or 0:.1f} s to compile the meta-step",
        "peak memory": report["peak_memory_bytes"]
        and f"{report['peak_memory_bytes'] / 1e6:,.0f} MB of the {report['peak_memory']}",
        "device": f"{report['devices']} × {report['device']}",
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "preset": report["preset"],
    }
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| {name} | {cell(value)} |" for name, value in table.items() if value is not None]
    if report.get("command"):
        lines += command_lines(report["command"])
    lines += [
        "",
        "Settings by their flags:",
        "",
        "| group | flag | value |",
        "| --- | --- | --- |",
    ]
    # config.json also stores settings that have no effect in this run; `groups` leaves them out.
    for group, flags in schema.flag_names(config.names().groups()).items():
        named, values = getattr(config, group), config.settings(group)
        if isinstance(named, dict):
            lines.append(f"| {group} | | **{cell(named['name'])}** |")
        for name, flag in flags.items():
            lines.append(f"| {group} | {flag} | {cell(schema.shown_value(values[name]))} |")
    return "\n".join(lines) + "\n"


def chance_level(result: Mapping[str, Any]) -> str | None:
    """Return a line with the result of guessing; None if the number of classes varies."""
    if "mse_of_mean" in result:
        return (
            f"Prediction by the mean of the support targets: {format_interval(result['mse_of_mean'], 'mse')}"
        )
    ways = result["card"]["ways"]
    return f"Guessing: {100 / ways:.2f} %, one of {ways} classes" if isinstance(ways, int) else None


def cell(text: Any) -> str:
    """Return a text as a cell of a Markdown table, without line breaks and with bars escaped."""
    return " ".join(str(text).split()).replace("|", "\\|")


def command_lines(command: str) -> list[str]:
    """Return the lines of a report with the command that reproduces it."""
    return ["", "The command that reproduces it:", "", "```sh", command, "```"]


def plural(count: int, noun: str) -> str:
    """Return a number with its noun in singular or plural.

    Examples:
      >>> plural(1, "inner step"), plural(2000, "class"), plural(5, "query")
      ('1 inner step', '2,000 classes', '5 queries')
    """
    if count == 1:
        return f"1 {noun}"
    stem, ending = (noun[:-1], "ies") if noun.endswith("y") else (noun, "es" if noun.endswith("s") else "s")
    return f"{count:,} {stem}{ending}"
