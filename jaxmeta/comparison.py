"""Several runs side by side: what `jaxmeta compare` and `jaxmeta plot` do.

A comparison trains every learner in a process of its own, so that its peak memory and its
compilation are its own, and pairs the results episode by episode: all saw the same test tasks.
"""

import contextlib
import dataclasses
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from jaxmeta import presets
from jaxmeta.config import file_name, settled, stored
from jaxmeta.presets import Preset
from jaxmeta.runs import Signalled
from jaxmeta.training import Evaluation
from jaxmeta.training.figures import METRIC_NAMES, Curve, draw_metric, drawing, look, plot_curves
from jaxmeta.training.report import read_metrics, shown, write_json, write_text

# What a resumed comparison may do differently: it changes no parameter, or only the order of float32 sums.
_MAY_DIFFER = ("description", "strategy", "report_steps", "workers")


class _Trainings:
    """Runs `jaxmeta train`, one process after the other; a signal to this one stops the one that runs.

    Args:
      hint: the command that continues.
    """

    def __init__(self, hint: str):
        self.hint = hint
        self.signal: int | None = None
        self.process: subprocess.Popen | None = None

    def __call__(self, number: int, frame: Any) -> None:
        del frame
        # The end of the terminal, too, is a reason to save.
        self.signal = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if self.process is not None:
            self.process.send_signal(self.signal)

    @contextlib.contextmanager
    def handled(self) -> Iterator["_Trainings"]:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not by nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, learner: str, argv: Sequence[str]) -> None:
        command = [sys.executable, "-m", "jaxmeta.cli", "train", learner, *argv]
        # In a session of its own, lest an interrupt at the terminal reach it twice.
        self.process = subprocess.Popen(command, start_new_session=True)
        if self.signal is not None:  # it came while the process was not there yet
            self.process.send_signal(self.signal)
        status = self.process.wait()
        self.process = None
        if status == 75 or (self.signal is not None and status not in (1, 2)):
            raise Signalled(f"while {learner} was trained; continue with: {self.hint}")
        if status:
            kind = ValueError if status == 2 else ChildProcessError
            raise kind(f"{learner}: its training ended with status {status}, as said above")


def compare_runs(learners: Sequence[str], flags: Mapping[str, Any], resume: bool = False) -> Path:
    """Trains learners on the same tasks at the same budget, and writes and prints how they compare.

    Args:
      learners: names in the registry; the others are compared to the first.
      flags: those given of the command line's, by name. What only some of the learners have a
        setting for is left out for the others.
      resume: continue the comparison in `flags["out"]`.

    Returns:
      The comparison's folder, with a run's folder for each learner.

    Raises:
      ValueError: learners or settings that cannot be, or a run in the folder that has others.
      Signalled: a signal stopped the run that was on.
      ChildProcessError: a run failed.
    """
    if len(learners) < 2:
        raise ValueError(f"LEARNER: got {' '.join(learners) or 'none'}; a comparison needs at least two")
    for learner in learners:
        if learners.count(learner) > 1:
            raise ValueError(f"LEARNER: got {learner} twice; name each learner once")
    flags = settled(flags)
    given_out = flags.pop("out", None)
    own_flags = {learner: _own(flags, learner, learners) for learner in learners}
    settings = {
        learner: presets.settings_of(own_flags[learner], learner=learner, preset=flags.get("preset"))[1]
        for learner in learners
    }
    out = _folder(given_out, learners, settings[learners[0]].tasks, resume)
    for learner in learners:
        _check_stored(out / learner, settings[learner], flags.get("seed", 0))

    out.mkdir(parents=True, exist_ok=True)
    again = shlex.join(["jaxmeta", "compare", *learners, *_argv(flags), "--resume", "--out", str(out)])
    with _Trainings(again).handled() as trainings:
        for i, learner in enumerate(learners):
            folder = out / learner
            print(f"== {learner} ({i + 1} of {len(learners)})", flush=True)
            if (folder / "report.json").exists():
                print(f"trained already: {folder}")
                continue
            resumed = ["--resume"] if (folder / "config.json").exists() else []
            try:
                trainings.run(learner, [*_argv(own_flags[learner]), *resumed, "--out", str(folder)])
            except ValueError:
                with contextlib.suppress(OSError):
                    out.rmdir()  # where the first training was refused, nothing is in it
                raise
        left_out = {
            learner: [presets.flag_of(name) for name in flags if name not in own_flags[learner]]
            for learner in learners
        }
        result = _compared(out, learners, left_out)
        text = _markdown(result)
        _draw(out / "comparison.png", out, result)
        write_text(out / "comparison.md", text)
        write_json(out / "comparison.json", result)
    print(f"\n{text}\nfolder: {out}  (comparison.md, comparison.png, comparison.json)")
    return out


def plot_runs(runs: Sequence[str], out: str = "curves.png", x: str = "steps") -> Path:
    """Draws the learning curves of runs, finished or not, as one PNG.

    Args:
      runs: their folders.
      out: where there is no file yet.
      x: "steps" or "seconds".

    Returns:
      The path of the PNG.
    """
    if not runs:
        raise ValueError("RUN: got none; a figure needs at least one")
    path = Path(out).expanduser()
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out: got {out}; it must end in .png")
    if path.exists():
        raise FileExistsError(f"--out: {path} exists; choose another")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out: the folder {path.absolute().parent} does not exist")
    folders = [Path(run).expanduser() for run in runs]
    curves = [_curve(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    for folder, curve in zip(folders, curves, strict=True):
        if curve.metric != curves[0].metric:
            raise ValueError(
                f"RUN: {folders[0]} measures {curves[0].metric} and {folder} {curve.metric}; "
                "they do not fit in one figure"
            )
    plot_curves(path, curves, x)
    print(path)
    return path


def _own(flags: Mapping[str, Any], learner: str, learners: Sequence[str]) -> dict[str, Any]:
    """`flags` without those that another of the learners takes and this one does not."""
    takes = {name: presets.lookup("LEARNER", name, presets.LEARNERS).takes for name in learners}
    return {
        flag: value
        for flag, value in flags.items()
        if flag in takes[learner] or not any(flag in taken for taken in takes.values())
    }


def _argv(flags: Mapping[str, Any]) -> list[str]:
    argv = []
    for name, value in flags.items():
        argv += [presets.flag_of(name), *([] if value is True else [str(value)])]
    return argv


def _folder(out: str | None, learners: Sequence[str], tasks: str, resume: bool) -> Path:
    if resume:
        if out is None:
            raise ValueError("--resume: needs the comparison's folder; add --out DIR")
        if not Path(out).expanduser().is_dir():
            raise FileNotFoundError(f"--out: {out} does not exist, so that there is nothing to resume")
        return Path(out).expanduser()
    moment = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    folder = Path(out or f"runs/compare-{'-'.join(learners)}-{file_name(tasks)}-{moment}").expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"--out: {folder} exists and is not empty; "
            "choose another, or continue its comparison with --resume"
        )
    return folder


def _check_stored(folder: Path, settings: Preset, seed: int) -> None:
    """Raises where the run in a folder, if there is one, has other settings."""
    if not (folder / "config.json").exists():
        return
    config, before = stored(folder)
    wanted = {"seed": (seed, config["seed"])}
    for name, value in dataclasses.asdict(settings).items():
        wanted[name] = (value, getattr(before, name))
    for name, (value, had) in wanted.items():
        if name not in _MAY_DIFFER and value != had:
            raise ValueError(
                f"{presets.flag_of(name)}: got {value}, but the run in {folder} has {had}; "
                "give the flags that the comparison was started with"
            )


def _compared(out: Path, learners: Sequence[str], left_out: Mapping[str, list[str]]) -> dict[str, Any]:
    """What `comparison.json` holds."""
    reports = {learner: _read(out / learner / "report.json") for learner in learners}
    episodes = {
        learner: {name: np.asarray(values) for name, values in _read(out / learner / "episodes.json").items()}
        for learner in learners
    }
    first = learners[0]
    shared = _shared(reports[first])
    for learner, report in reports.items():
        for name, value in _shared(report).items():
            if value != shared[name]:
                raise ValueError(
                    f"{out / learner}: its {name} is {value}, and {first}'s {shared[name]}; "
                    "they cannot be compared"
                )
        for values in episodes[learner].values():
            if values.size != shared["episodes"]:
                raise ValueError(
                    f"{out / learner / 'episodes.json'}: got {values.size} values for "
                    f"{shared['episodes']} episodes"
                )
    metric = "accuracy" if "accuracy" in reports[first] else "mse"
    rows = {}
    for learner, report in reports.items():
        rows[learner] = {
            "run": learner,
            metric: report[metric],
            "difference": {
                name: _difference(values, episodes[first][name])
                for name, values in episodes[learner].items()
                if learner != first and name in episodes[first]
            },
            "left_out": left_out[learner],
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
    return {"metric": metric, "compared_to": first, **shared, "learners": rows}


def _shared(report: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs must agree in to be compared."""
    names = ("tasks", "preset", "seed", "steps", "meta_batch", "episodes", "card")
    return {name: {**report["config"], **report}[name] for name in names}


def _difference(values: np.ndarray, to: np.ndarray) -> dict[str, float]:
    """Mean over episodes of the difference in each, and its confidence interval."""
    found = Evaluation.of(values - to)
    return {"mean": found.mean, "ci95": found.ci95}


def _tests(row: Mapping[str, Any], metric: str) -> dict[str, dict[str, Any]]:
    """The results of a learner by the name that they have among the episodes."""
    return row[metric] if metric == "accuracy" else {metric: row[metric]}


def _markdown(result: Mapping[str, Any]) -> str:
    metric, first, card = result["metric"], result["compared_to"], result["card"]
    accuracy = metric == "accuracy"
    head = ["learner", "test", "accuracy, %"] if accuracy else ["learner", "mse"]
    head += [f"minus {first}", "training, s", "steps/s", "memory, MB"]
    table = []
    for learner, row in result["learners"].items():
        for name, test in _tests(row, metric).items():
            difference = row["difference"].get(name)
            table.append(
                [
                    learner,
                    *([name] if accuracy else []),
                    shown(test, metric),
                    "" if difference is None else shown(difference, metric, "+"),
                    f"{row['training_s']:,.1f}",
                    "" if row["steps_per_second"] is None else f"{row['steps_per_second']:,.1f}",
                    "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e6:,.0f}",
                ]
            )
    ways = "" if card["ways"] is None else f"{card['ways']}-way "
    of = {row["peak_memory"] for row in result["learners"].values()}
    lines = [
        f"# {', '.join(result['learners'])} on {result['tasks']}",
        "",
        *_table(head, table, 2 if accuracy else 1),
        "",
        f"{ways}{card['shots']}-shot, {card['queries']} queries; {result['episodes']:,} test tasks; "
        f"{result['steps']:,} meta-steps of {result['meta_batch']} tasks; "
        f"seed {result['seed']}; preset {result['preset']}.",
        f"± is the half-width of a 95 % confidence interval over test tasks; minus {first} is the difference "
        f"within each test task{', in percentage points' if accuracy else ''}.",
        "Training includes compiling and validation; memory is the peak of the "
        f"{' or '.join(sorted(of))}, evaluation included.",
    ]
    for learner, row in result["learners"].items():
        if row["left_out"]:
            lines.append(f"Left out for {learner}, which has no such setting: {', '.join(row['left_out'])}.")
    return "\n".join(lines) + "\n"


def _table(head: list[str], rows: list[list[str]], texts: int) -> list[str]:
    """A Markdown table that is readable as it is, of columns of text and then of numbers."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return f"| {' | '.join(c.ljust(w) if i < texts else c.rjust(w) for i, (c, w) in pairs)} |"

    rule = [("-" * width if i < texts else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
    return [line(head), line(rule), *map(line, rows)]


def _draw(path: Path, out: Path, result: Mapping[str, Any]) -> None:
    """Left the metric over the meta-steps, then that on test tasks, right the differences."""
    from matplotlib.lines import Line2D

    metric, rows = result["metric"], result["learners"]
    scale = 100 if metric == "accuracy" else 1
    with drawing(path, 13.0, 3.4 + 0.35 * len(rows)) as figure:
        curves, tests, differences = figure.subplots(1, 3, width_ratios=(4, 3, 3))
        draw_metric(
            curves, [Curve(name, read_metrics(out / name / "metrics.jsonl"), metric) for name in rows]
        )
        for i, row in enumerate(rows.values()):
            found = _tests(row, metric)
            for j, (name, test) in enumerate(found.items()):
                y = i + 0.3 * (j - (len(found) - 1) / 2)
                filled = {"markerfacecolor": "white"} if name == "inductive" else {}
                bar = {"color": look(i)["color"], "marker": "D", "capsize": 3, **filled}
                tests.errorbar(scale * test["mean"], y, xerr=scale * test["ci95"], **bar)
                if name in row["difference"]:
                    mean, ci95 = (scale * row["difference"][name][key] for key in ("mean", "ci95"))
                    differences.errorbar(mean, y, xerr=ci95, **bar)
        differences.axvline(0, color="0.4", linewidth=1)
        tests.set(xlabel=f"test {METRIC_NAMES[metric]}")
        if metric == "accuracy":
            tests.set_title("◆: transductive   ◇: inductive", fontsize="medium")
        unit = " (percentage points)" if metric == "accuracy" else ""
        differences.set(xlabel=f"minus {result['compared_to']}{unit}")
        differences.set_title("within each test task, 95 % CI", fontsize="medium")
        for axes in (tests, differences):
            axes.set_yticks(range(len(rows)), rows)
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.locator_params(axis="x", nbins=5)
            axes.grid(alpha=0.3, axis="x")
        lines = [Line2D([], [], **look(i), label=name) for i, name in enumerate(rows)]
        figure.legend(handles=lines, loc="outside lower center", ncols=min(6, len(rows)))
        figure.suptitle(f"{result['tasks']}, {result['steps']:,} meta-steps")


def _curve(folder: Path, name: str) -> Curve:
    config = _read(folder / "config.json")
    rows = read_metrics(folder / "metrics.jsonl")
    if not rows:
        raise ValueError(f"RUN: {folder} has no meta-step yet")
    metric = "mse" if config["ways"] is None else "accuracy"
    report = _read(folder / "report.json") if (folder / "report.json").exists() else None
    return Curve(name, rows, metric, report and next(iter(_tests(report, metric).values())))


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, as long as it takes to tell them apart and without the words all share."""
    parts = [folder.resolve().parts for folder in folders]
    for part, folder in zip(parts, folders, strict=True):
        if parts.count(part) > 1:
            raise ValueError(f"RUN: got {folder} twice")
    depth = next(n for n in range(1, 99) if len({part[-n:] for part in parts}) == len(parts))
    names = ["/".join(part[-depth:]) for part in parts]
    words = [name.split("-") for name in names]
    common = set.intersection(*map(set, words))
    short = ["-".join(word for word in own if word not in common) for own in words]
    return short if all(short) and len(set(short)) == len(short) else names


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no run: there is no {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
