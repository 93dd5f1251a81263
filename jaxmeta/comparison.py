"""Several runs side by side: what `jaxmeta compare` and `jaxmeta plot` do.

A comparison trains every learner in a process of its own, so that its peak memory and its
compilation are its own, and pairs the results episode by episode: all saw the same test tasks.
"""

import contextlib
import dataclasses
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmeta import presets, registry, sources
from jaxmeta.checks import parsed_json
from jaxmeta.config import new_folder, settled, stored
from jaxmeta.runs import Signalled
from jaxmeta.settings import Preset, flag_of, lookup
from jaxmeta.training import Evaluation
from jaxmeta.training.figures import Curve, plot_curves
from jaxmeta.training.report import read_metrics, write_json, write_text
from jaxmeta.training.side_by_side import comparison_markdown, draw_comparison, results_of

# What a resumed comparison may do differently: it changes no parameter, or only the order of float32 sums.
_MAY_DIFFER = ("description", "strategy", "report_steps", "workers", "image_size", "channels")


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
        if status in (1, 2):
            raise SystemExit(status)
        if status:
            raise ChildProcessError(f"{learner}: its training ended with status {status}")


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
      SystemExit: a run failed with that status, and has said why.
      ChildProcessError: a run failed without a word.
    """
    if len(learners) < 2:
        raise ValueError(f"LEARNER: got {' '.join(learners) or 'none'}; a comparison needs at least two")
    for learner in learners:
        if learners.count(learner) > 1:
            raise ValueError(f"LEARNER: got {learner} twice; name each learner once")
    flags = settled(flags)
    given_out = flags.pop("out", None)
    # Budget and episodes of the preset go for all, what some have of their own notwithstanding.
    chosen: dict[str, Any] = {name: flags[name] for name in ("tasks", "ways", "queries") if name in flags}
    _, base = presets.settings_of(chosen, preset=flags.get("preset"))
    takes = ("steps", "meta_batch", *sources.source_of(base.tasks).takes)
    fields = ("steps", "meta_batch", "train_ways", "train_queries")
    flags = {name: getattr(base, name) for name in fields if name in takes} | flags
    own_flags = {learner: _own(flags, learner, learners) for learner in learners}
    settings = {
        learner: presets.settings_of(own_flags[learner], learner=learner, preset=flags.get("preset"))[1]
        for learner in learners
    }
    out = _folder(given_out, learners, settings[learners[0]].tasks, resume)
    for learner in learners:
        _check_stored(out / learner, settings[learner], flags.get("seed", 0))

    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
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
            except SystemExit:
                # Where the first training was refused, nothing is in the folders made for it.
                with contextlib.suppress(OSError):
                    for made in new_folders:
                        made.rmdir()
                raise
        left_out = {
            learner: [flag_of(name) for name in flags if name not in own_flags[learner]]
            for learner in learners
        }
        result = _compared(out, learners, left_out)
        text = comparison_markdown(result)
        draw_comparison(out / "comparison.png", out, result)
        write_text(out / "comparison.md", text)
        write_json(out / "comparison.json", result)
    print(f"\n{text}\nfolder: {out}  (comparison.md, comparison.png, comparison.json)")
    return out


def plot_runs(runs: Sequence[str], out: str = "curves.png", x: str = "steps") -> Path:
    """Draws the learning curves of runs, finished or not, as one PNG.

    Args:
      runs: their folders; that of a comparison stands for its runs.
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
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out: the folder {path.absolute().parent} does not exist")
    folders = [folder for run in runs for folder in _runs_in(Path(run).expanduser())]
    curves = [_curve(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    for folder, curve in zip(folders, curves, strict=True):
        if curve.metric != curves[0].metric:
            raise ValueError(
                f"RUN: {folders[0]} measures {curves[0].metric} and {folder} {curve.metric}; "
                "they do not fit in one figure"
            )
    if path.exists():
        raise FileExistsError(f"--out: {path} exists; choose another")
    plot_curves(path, curves, x)
    print(path)
    return path


def _runs_in(folder: Path) -> list[Path]:
    """The folder itself, or of a comparison its runs."""
    if not (folder / "comparison.json").is_file():
        return [folder]
    return [folder / row["run"] for row in _read(folder / "comparison.json")["learners"].values()]


def _own(flags: Mapping[str, Any], learner: str, learners: Sequence[str]) -> dict[str, Any]:
    """`flags` without those that another of the learners takes and this one does not."""
    takes = {name: lookup("LEARNER", name, registry.LEARNERS).takes for name in learners}
    return {
        flag: value
        for flag, value in flags.items()
        if flag in takes[learner] or not any(flag in taken for taken in takes.values())
    }


def _argv(flags: Mapping[str, Any]) -> list[str]:
    argv = []
    for name, value in flags.items():
        argv += [flag_of(name), *([] if value is True else [str(value)])]
    return argv


def _folder(out: str | None, learners: Sequence[str], tasks: str, resume: bool) -> Path:
    if resume:
        if out is None:
            raise ValueError("--resume: needs the comparison's folder; add --out DIR")
        if not Path(out).expanduser().is_dir():
            raise FileNotFoundError(f"--out: {out} does not exist, so that there is nothing to resume")
        return Path(out).expanduser()
    return new_folder(out, f"compare-{'-'.join(learners)}", tasks, "comparison")


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
                f"{flag_of(name)}: got {value}, but the run in {folder} has {had}; "
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


def _curve(folder: Path, name: str) -> Curve:
    _, settings = stored(folder)
    rows = read_metrics(folder / "metrics.jsonl")
    if not rows:
        raise ValueError(f"RUN: {folder} has no meta-step yet")
    metric = "mse" if settings.ways is None else "accuracy"
    report = _read(folder / "report.json") if (folder / "report.json").exists() else None
    return Curve(name, rows, metric, report and next(iter(results_of(report, metric).values())))


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
        return parsed_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
