"""The command line: `jaxmeta train`, `evaluate`, `presets`, `tasks`, `learners`. Nothing imports it."""

import contextlib
import dataclasses
import io
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypedDict

import tyro

EXIT_OTHER, EXIT_USER, EXIT_STOPPED = 1, 2, 75


def _flag(text: str, unit: str | None = None, default: str = "(default: the preset's)") -> Any:
    return tyro.conf.arg(help=text, metavar=unit, help_behavior_hint=default)


class TrainFlags(TypedDict, total=False):
    """What `train` was told; what it was not told is the preset's."""

    tasks: Annotated[str, _flag("where tasks come from; see `jaxmeta tasks`", "NAME", "(default: glyphs)")]
    preset: Annotated[
        str, _flag("a protocol by name; see `jaxmeta presets`", "NAME", "(default: the one of --tasks)")
    ]
    data: Annotated[
        str,
        _flag("folder with the data set's official archives", "DIR", "(default: the cache, or a download)"),
    ]
    ways: Annotated[int, _flag("classes per task, at test and in training", "N")]
    shots: Annotated[int, _flag("support examples per class (per task in regression)", "K")]
    queries: Annotated[int, _flag("query examples per class (per task in regression)", "Q")]
    train_ways: Annotated[int, _flag("--ways in training only", "N", "(default: --ways)")]
    train_shots: Annotated[int, _flag("--shots in training only", "K", "(default: --shots)")]
    train_queries: Annotated[int, _flag("--queries in training only", "Q", "(default: --queries)")]
    protocol: Annotated[str, _flag("class split of omniglot: vinyals, maml, reptile, lake, …", "NAME")]
    rotations: Annotated[
        Literal["none", "classes", "random"],
        _flag(
            "omniglot: rotations as extra classes, or one per drawn class",
            default="(default: the protocol's)",
        ),
    ]
    order: Annotated[
        Literal["second", "first"],
        _flag("whether the meta-gradient goes through the inner gradients"),
    ]
    inner_steps: Annotated[int, _flag("gradient steps on the support set in training", "T")]
    eval_steps: Annotated[int, _flag("gradient steps on the support set at validation and test", "T")]
    inner_lr: Annotated[float, _flag("step size of those steps, for the mean loss", "α")]
    outer_lr: Annotated[float, _flag("step size of the meta-optimizer (Adam)", "β")]
    schedule: Annotated[Literal["constant", "cosine"], _flag("of --outer-lr over the run")]
    clip: Annotated[float, _flag("largest absolute value of an entry of the meta-gradient", "C")]
    steps: Annotated[int, _flag("meta-steps", "N")]
    meta_batch: Annotated[int, _flag("tasks per meta-step", "B")]
    episodes: Annotated[int, _flag("test tasks", "E")]
    validate_every: Annotated[int, _flag("meta-steps between validations and between checkpoints", "N")]
    seed: Annotated[int, _flag("of initial parameters and episodes", "S", "(default: 0)")]
    strategy: Annotated[
        str, _flag("how a device goes through its tasks: auto, vmap, scan, or that many at once", "NAME|N")
    ]
    devices: Annotated[
        int, _flag("devices that share the tasks; on CPUs, cores", "N", "(default: as many as are of use)")
    ]
    out: Annotated[str, _flag("the run's folder", "DIR", "(default: runs/<learner>-<tasks>-<date and time>)")]


@dataclasses.dataclass
class Train:
    """Meta-trains a learner and evaluates it on test tasks.

    With nothing else, trains MAML on drawn characters. The run's folder gets config.json,
    metrics.jsonl, checkpoints/, curve.png, report.json and report.md.
    """

    flags: Annotated[TrainFlags, tyro.conf.arg(name="")]
    learner: Annotated[
        tyro.conf.Positional[str | None],
        _flag("the method; see `jaxmeta learners`", "[LEARNER]", "(default: maml)"),
    ] = None
    resume: Annotated[bool, _flag("continue the run in --out from its last checkpoint", default="")] = False


class EvaluateFlags(TypedDict, total=False):
    """What `evaluate` was told; what it was not told is as in training."""

    episodes: Annotated[int, _flag("test tasks", "E", "(default: the run's)")]
    ways: Annotated[int, _flag("classes per task", "N", "(default: the run's)")]
    shots: Annotated[
        int, _flag("support examples per class (per task in regression)", "K", "(default: the run's)")
    ]
    queries: Annotated[
        int, _flag("query examples per class (per task in regression)", "Q", "(default: the run's)")
    ]
    eval_steps: Annotated[int, _flag("gradient steps on the support set", "T", "(default: the run's)")]
    seed: Annotated[
        int, _flag("of the test episodes", "S", "(default: the run's, the episodes of its report)")
    ]
    data: Annotated[str, _flag("folder with the data set's archives", "DIR", "(default: the run's)")]
    devices: Annotated[int, _flag("devices that share the episodes; on CPUs, cores", "N", "(default: all)")]
    json: Annotated[str, _flag("also write the result here", "FILE", "(default: only print)")]


@dataclasses.dataclass
class Evaluate:
    """Evaluates a run's parameters on fresh test tasks."""

    flags: Annotated[EvaluateFlags, tyro.conf.arg(name="")]
    run: Annotated[tyro.conf.Positional[str], _flag("the run's folder", "RUN", "(required)")]


@dataclasses.dataclass
class Presets:
    """Lists the presets: whole trainings by name."""


@dataclasses.dataclass
class Tasks:
    """Lists where tasks may come from."""


@dataclasses.dataclass
class Learners:
    """Lists the methods."""


_COMMANDS: dict[str, Any] = {
    "train": Train,
    "evaluate": Evaluate,
    "presets": Presets,
    "tasks": Tasks,
    "learners": Learners,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
      0 done, 2 the user's input is at fault, 75 stopped by a signal after saving, 1 anything else.
    """
    try:
        command = _parse(sys.argv[1:] if argv is None else argv)
        if command is not None:
            _run(command)
        return 0
    except KeyboardInterrupt as stop:
        return _say(f"stopped: {stop or 'interrupted'}", EXIT_STOPPED)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        return _say(f"error: {error}", EXIT_USER)
    except (FloatingPointError, OSError) as error:
        return _say(f"error: {error}", EXIT_OTHER)
    except Exception:
        traceback.print_exc()
        return EXIT_OTHER


def _parse(argv: Sequence[str]) -> Any:
    """A command, or None where its help was printed."""
    if argv and not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        from jaxmeta.presets import known

        raise ValueError(f"there is no command {argv[0]!r}; {known(argv[0], _COMMANDS)}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(
                _COMMANDS,
                args=list(argv),
                prog="jaxmeta",
                description="Learning from few examples, in JAX. `jaxmeta train` trains MAML in minutes.",
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as exit:
        if not exit.code:
            return None
        raise ValueError(_one_line(complaint.getvalue())) from None


def _one_line(box: str) -> str:
    """The message in tyro's box, whose first paragraphs say what is wrong."""
    words: list[str] = []
    for line in box.splitlines()[1:]:
        content = line.strip("│╭╰╮╯ ")
        if content.startswith(("For full helptext", "Argument helptext")):
            break
        words.append(content.strip("─"))
    return " ".join(words)


def _say(message: str, status: int) -> int:
    print("jaxmeta:", " ".join(message.split()), file=sys.stderr)
    return status


def _run(command: Any) -> None:
    from jaxmeta import presets, runs

    match command:
        case Train():
            runs.train_run(dict(command.flags), command.learner, command.resume)
        case Evaluate():
            runs.evaluate_run(command.run, dict(command.flags))
        case Presets():
            _print_table(
                (name, f"{preset.learner} on {preset.tasks}", preset.description)
                for name, preset in presets.PRESETS.items()
            )
        case Tasks():
            _print_table((name, source.description) for name, source in presets.TASKS.items())
        case Learners():
            _print_table((name, spec.family, spec.description) for name, spec in presets.LEARNERS.items())


def _print_table(rows: Iterable[tuple[str, ...]]) -> None:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
