"""Comparison of several runs: `jaxmeta compare` and `jaxmeta plot`.

A comparison trains every learner in a separate process, so that peak memory and compilation are measured
for each, and pairs the results episode by episode: all learners get the same test tasks.
"""

import contextlib
import itertools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxmeta.checks import ArgumentError
from jaxmeta.cli import build, folders, schema, sources
from jaxmeta.cli.command_line import flags_of
from jaxmeta.cli.comparison_report import comparison_markdown, draw_comparison, results_of
from jaxmeta.cli.config import Base, Config, load_config, read_json, resolve
from jaxmeta.cli.figures import COMPARED, METRIC_NAMES, Curve, plot_curves
from jaxmeta.cli.parser import ParsedArguments
from jaxmeta.cli.signals import EXIT_OTHER, EXIT_STOPPED, EXIT_USER, Signalled
from jaxmeta.files import write_json, write_text
from jaxmeta.training import Evaluation
from jaxmeta.training.metrics import METRICS, NON_METRICS, read_metrics

# Settings that all learners of a comparison take from the protocol, in place of a learner's own defaults.
_BUDGET = {"training": ("steps", "meta_batch"), "tasks": ("train_ways", "train_queries")}


class _Trainings:
    """Processes of `jaxmeta train`, one after the other; a signal to this process stops the running one.

    Args:
      hint: command that continues the comparison.
    """

    def __init__(self, hint: str):
        self.hint = hint
        self.signal: int | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, number: int, frame: Any) -> None:
        del frame
        # SIGHUP is passed on as SIGTERM: a closed terminal, too, is a reason to save.
        self.signal = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if self.process is not None:
            self.process.send_signal(self.signal)

    @contextlib.contextmanager
    def handled(self) -> Iterator["_Trainings"]:
        """Handle signals by stopping the running process while the block runs."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, learner: str, argv: Sequence[str]) -> None:
        """Train a learner in a process, and wait for its end."""
        self.check(learner)
        command = [sys.executable, "-m", "jaxmeta.cli", "train", learner, *argv]
        # The process gets a session of its own, so that an interrupt at the terminal reaches it once.
        self.process = subprocess.Popen(command, start_new_session=True)
        if self.signal is not None:  # it came before the process was started
            self.process.send_signal(self.signal)
        status = self.process.wait()
        self.process = None
        if status == EXIT_STOPPED or (self.signal is not None and status not in (EXIT_OTHER, EXIT_USER)):
            raise Signalled(f"while {learner} was being trained; continue with: {self.hint}")
        if status in (EXIT_OTHER, EXIT_USER):
            raise SystemExit(status)
        if status:
            raise ChildProcessError(f"the training of {learner} ended with status {status}")

    def check(self, learner: str) -> None:
        """Raise `Signalled` where a signal came since the last training."""
        if self.signal is not None:
            name = signal.Signals(self.signal).name
            raise Signalled(f"by {name} before {learner} was trained; continue with: {self.hint}")


def compare(bases: Mapping[str, Base], common: Base, parsed: ParsedArguments) -> Path:
    """Train learners on the same tasks at the same budget, and write and print a comparison.

    Args:
      bases: protocol of each learner's run, by the learner's name; the first learner is the baseline.
      common: protocol with its own learner, whose budget applies to all learners.
      parsed: parsed command line; a flag applies to each learner that has it.

    Returns:
      The comparison's folder, with a run's folder for each learner.

    Raises:
      ArgumentError: learners or settings are incompatible, or a run in the folder has other settings.
      Signalled: a signal stopped the run in progress.
      SystemExit: a run failed with that status, and has printed its error.
      ChildProcessError: a run failed without printing an error.
    """
    learners = list(bases)
    if len(parsed.words) < 2:
        raise ArgumentError(
            "learners", f"got {' '.join(learners) or 'none'}; a comparison needs at least two"
        )
    for learner in learners:
        if parsed.words.count(learner) > 1:
            raise ArgumentError("learners", f"got {learner} twice; name each learner once")
    options = parsed.values.get("comparison", {})
    resume, out_flag = options.get("resume", False), options.get("out")
    budget = _budget(common, parsed)
    values = {learner: _own_values(bases[learner], parsed, budget) for learner in learners}
    configs = {learner: resolve(bases[learner], values[learner]) for learner in learners}
    for config in configs.values():
        # Invalid settings of any learner raise before the first one is trained.
        build.learner_of(config)
    name = "-".join(["compare", *(learner.rpartition(":")[2] for learner in learners)])
    tasks = configs[learners[0]].tasks["name"]
    out = _folder(out_flag, f"{name}-{sources.file_name(tasks)}", resume)
    subfolders = {learner: learner.replace(":", ".") for learner in learners}
    for learner in learners:
        _check_stored(out / subfolders[learner], configs[learner], learners)

    left_out = {learner: _left_out(bases[learner], parsed) for learner in learners}
    argvs = {learner: _argv(bases[learner], parsed, budget) for learner in learners}
    flags = [
        word
        for flag, text in parsed.texts.items()
        if flag not in ("--out", "--resume")
        for word in ([flag] if text is None else [f"{flag}={text}"] if text.startswith("-") else [flag, text])
    ]
    command = ["jaxmeta", "compare", *learners, *flags]
    resume_command = shlex.join([*command, "--resume", "--out", str(out)])
    results = folders.Results()
    with _Trainings(resume_command).handled() as trainings:
        for i, learner in enumerate(learners):
            folder = out / subfolders[learner]
            print(f"== {learner} ({i + 1} of {len(learners)})", flush=True)
            if (folder / "report.json").exists():
                print(f"trained already: {folder}")
                continue
            resumed = ["--resume"] if (folder / "config.json").exists() else []
            try:
                trainings.run(learner, [*argvs[learner], *resumed, "--out", str(folder)])
            except SystemExit:
                if (folder / "report.json").exists():
                    # Its process has printed what it could not write.
                    results.fail(f"{learner} was trained, but its command failed after that")
                    continue
                # Where the first training had invalid settings, the new folder is empty.
                with contextlib.suppress(OSError):
                    out.rmdir()
                raise
        result = {**_compared(out, subfolders, left_out), "command": shlex.join(command)}
        text = comparison_markdown(result)
        with results.writing(out / "comparison.json"):
            write_json(out / "comparison.json", result)
        with results.writing(out / "comparison.md"):
            write_text(out / "comparison.md", text)
        with folders.tolerated(out / "comparison.png") as picture:
            draw_comparison(picture, out, result)
    print(f"\n{text}\nfolder: {out}  (comparison.md, comparison.png, comparison.json)")
    results.check()
    return out


def _budget(common: Base, parsed: ParsedArguments) -> dict[str, dict[str, Any]]:
    """Return the budget of the protocol, with flags in place of its values."""
    tasks = parsed.values.get("tasks", {})
    budget: dict[str, dict[str, Any]] = {}
    for group, names in _BUDGET.items():
        for name in names:
            value = tasks.get(name.removeprefix("train_"), common.values[group].get(name))
            value = parsed.values.get(group, {}).get(name, value)
            if value is not None:
                budget.setdefault(group, {})[name] = value
    return budget


def _own_values(
    base: Base, parsed: ParsedArguments, budget: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the budget, and the flags that a learner has."""
    groups = base.names().groups()
    own: dict[str, dict[str, Any]] = {}
    for values in (budget, parsed.values):
        for group, settings in values.items():
            for name, value in settings.items():
                if group in groups and name in groups[group]:
                    # Settings of the same name may allow different values in different learners.
                    own.setdefault(group, {})[name] = groups[group][name].check(value)
    return own


def _left_out(base: Base, parsed: ParsedArguments) -> list[str]:
    """Return the flags that a learner does not have."""
    groups = base.names().groups()
    return [
        schema.flag_of(name)
        for group, values in parsed.values.items()
        if group in groups
        for name in values
        if name not in groups[group]
    ]


def _argv(base: Base, parsed: ParsedArguments, budget: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the command line of a learner's training."""
    groups = base.names().groups()
    argv = []
    for name, value in parsed.values.get("names", {}).items():
        argv += [schema.flag_of(name), value]
    return argv + flags_of(_own_values(base, parsed, budget), groups)


def _folder(out: str | None, name: str, resume: bool) -> Path:
    if not resume:
        return folders.claim(out, name, "comparison")
    if out is None:
        raise ArgumentError("resume", "the comparison's folder is missing; add --out DIR")
    if not Path(out).expanduser().is_dir():
        raise ArgumentError("out", f"{out} does not exist; give the folder of the comparison to resume")
    return Path(out).expanduser()


def plot(*runs: str, out: str = "curves.png", x: Literal["steps", "seconds"] = "steps") -> Path:
    """Draw the learning curves of runs, finished or not, as one PNG.

    Args:
      runs: folders of runs, or of comparisons, which are replaced by their runs.
      out: path of the PNG file. Where it exists, the new one gets a number: curves-1.png.
      x: horizontal axis.

    Returns:
      The path of the PNG.
    """
    if not runs:
        raise ArgumentError("runs", "got none; a figure needs at least one")
    path = Path(out).expanduser()
    if path.suffix.lower() != ".png":
        raise ArgumentError("out", f"got {out}; it must end in .png")
    if not path.absolute().parent.is_dir():
        raise ArgumentError("out", f"the folder {path.absolute().parent} does not exist")
    run_folders = [folder for run in runs for folder in _runs_in(Path(run).expanduser())]
    curves = [_curve(folder, name) for folder, name in zip(run_folders, _names(run_folders), strict=True)]
    for folder, curve in zip(run_folders, curves, strict=True):
        if curve.metric != curves[0].metric:
            raise ArgumentError(
                "runs",
                f"{run_folders[0]} measures {curves[0].metric} and {folder} {curve.metric}; one figure shows "
                "one metric",
            )
    path = _new_file(path)
    plot_curves(path, curves, x)
    print(path)
    return path


def _new_file(path: Path) -> Path:
    """Return the path, with the smallest number appended that makes it a new file."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    return next(each for each in itertools.chain([path], numbered) if not os.path.lexists(each))


def _runs_in(folder: Path) -> list[Path]:
    """Return the folder itself, or the runs of a comparison."""
    if not (folder / "comparison.json").is_file():
        return [folder]
    return [folder / row["run"] for row in _read(folder / "comparison.json")["learners"].values()]


def _check_stored(folder: Path, config: Config, trusted: Sequence[str]) -> None:
    """Check that the run in a folder, if any, has the settings of `config`."""
    if not (folder / "config.json").exists():
        return
    before = load_config(folder, [*trusted, config.network["name"], config.tasks["name"]])
    wanted: dict[tuple[str, str], tuple[Any, Any]] = {("run", "seed"): (config.run.seed, before.run.seed)}
    for group in ("learner", "network", "tasks", "training"):
        named = getattr(config, group)
        if isinstance(named, dict) and named["name"] != getattr(before, group)["name"]:
            wanted[group, group] = (named["name"], getattr(before, group)["name"])
        for name, value in config.settings(group).items():
            wanted[group, name] = (value, before.settings(group).get(name))
    wanted[("run", "episodes")] = (config.run.episodes, before.run.episodes)
    for (group, name), (value, had) in wanted.items():
        # Size and channels of the user's images are unset until the images are read.
        if value != had and not (group == "tasks" and name in ("size", "channels") and value is None):
            raise ArgumentError(
                name,
                f"got {schema.shown_value(value)}, but the run in {folder} has {schema.shown_value(had)}; "
                "give the flags that the comparison was started with",
            )


def _compared(out: Path, subfolders: Mapping[str, str], left_out: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return the content of `comparison.json`."""
    learners = list(subfolders)
    reports = {learner: _read(out / subfolders[learner] / "report.json") for learner in learners}
    episodes = {
        learner: {
            name: np.asarray(values)
            for name, values in _read(out / subfolders[learner] / "episodes.json").items()
        }
        for learner in learners
    }
    first = learners[0]
    shared = _shared(reports[first])
    for learner, report in reports.items():
        for name, value in _shared(report).items():
            if value != shared[name]:
                raise ValueError(
                    f"{out / subfolders[learner]}: its {name} is {value}, but {first}'s is {shared[name]}; "
                    "compared runs must agree in it"
                )
        for values in episodes[learner].values():
            if values.size != shared["episodes"]:
                raise ValueError(
                    f"{out / subfolders[learner] / 'episodes.json'}: got {values.size} values for "
                    f"{shared['episodes']} episodes"
                )
    metric = "accuracy" if "accuracy" in reports[first] else "mse"
    rows = {}
    for learner, report in reports.items():
        rows[learner] = {
            "run": subfolders[learner],
            metric: report[metric],
            "difference": {
                name: _difference(values, other)
                for name, values in episodes[learner].items()
                if learner != first
                and (other := _values_of_row(name, reports[first], episodes[first])) is not None
            },
            "left_out": left_out[learner],
            "network": report["config"]["network"],
            **{
                name: report[name]
                for name in (
                    "training_s",
                    "compile_s",
                    "wall_s",
                    "steps_per_second",
                    "peak_memory_bytes",
                    "peak_memory",
                    "parameters",
                    "devices",
                    "device",
                )
            },
        }
    by_mean = {name: reports[first][name] for name in ("mse_of_mean",) if name in reports[first]}
    return {"metric": metric, "compared_to": first, **shared, **by_mean, "learners": rows}


def _values_of_row(
    name: str, report: Mapping[str, Any], episodes: Mapping[str, np.ndarray]
) -> np.ndarray | None:
    """Return a run's values for a row, or None; without batch normalisation its only row stands for all."""
    if name not in episodes and [row["norm"] for row in report.get("accuracy", {}).values()] == ["none"]:
        return next(iter(episodes.values()))
    return episodes.get(name)


def _shared(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a report in which compared runs must agree."""
    names = ("tasks", "preset", "seed", "steps", "episodes", "card")
    return {name: report[name] for name in names} | {"meta_batch": report["config"]["training"]["meta_batch"]}


def _difference(values: np.ndarray, to: np.ndarray) -> dict[str, float]:
    """Return the mean of the episodes' paired differences, and its confidence interval."""
    result = Evaluation.of(values - to)
    return {"mean": result.mean, "ci95": result.ci95}


def _curve(folder: Path, name: str) -> Curve:
    # Runs of jm.train(run_dir=…) have no config.json.
    if not any((folder / name).exists() for name in ("config.json", "checkpoints", METRICS)):
        raise FileNotFoundError(f"{folder} is not a run folder: {folder / METRICS} does not exist")
    rows = read_metrics(folder / METRICS)
    if not rows:
        raise ArgumentError("runs", f"{folder} has no rows in {METRICS} yet; wait for its first meta-steps")
    metric = _metric_of(rows)
    report = _read(folder / "report.json") if (folder / "report.json").exists() else None
    return Curve(name, rows, metric, report and next(iter(results_of(report, metric).values())))


def _metric_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the metric to draw: the validation metric, or else a training metric or the loss."""
    columns = dict.fromkeys(name for row in rows for name in row)
    validated = [name.removeprefix("validation_") for name in columns if name.startswith("validation_")]
    known = [name for name in (*validated, *columns) if name in METRIC_NAMES]
    own = [name for name in columns if name not in NON_METRICS and name not in COMPARED]
    return next(iter([*known, *validated, *own, "loss"]))


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest names that distinguish the folders, without the words that all share."""
    parts = [folder.resolve().parts for folder in folders]
    for part, folder in zip(parts, folders, strict=True):
        if parts.count(part) > 1:
            raise ArgumentError("runs", f"got {folder} twice")
    depth = next(n for n in range(1, 99) if len({part[-n:] for part in parts}) == len(parts))
    names = ["/".join(part[-depth:]) for part in parts]
    words = [name.split("-") for name in names]
    common = set.intersection(*map(set, words))
    short = ["-".join(word for word in own if word not in common) for own in words]
    return short if all(short) and len(set(short)) == len(short) else names


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a finished run or comparison: {path} does not exist")
    return read_json(path)
