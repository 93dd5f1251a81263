"""Commands whose flags depend on names: `train`, `evaluate`, `compare`, `transfer` and `rank`.

Their command lines are parsed in two phases: first the names of the learner, the network, the tasks and the
protocol; then exactly the flags that these have, with their real values as defaults.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmeta.checks import parsed_json
from jaxmeta.cli import compare as comparing
from jaxmeta.cli import evaluate as evaluating
from jaxmeta.cli import folders, run, schema, sources
from jaxmeta.cli import transfer as transferring
from jaxmeta.cli.config import (
    Base,
    Chosen,
    base_of,
    from_json,
    holds_checkpoints,
    is_run,
    load_config,
    on_other_tasks,
    resolve,
)
from jaxmeta.cli.devices import make_devices_of_cores
from jaxmeta.cli.heads import DEFAULT as HEAD_DEFAULT
from jaxmeta.cli.heads import HEADS
from jaxmeta.cli.initial import with_network_of
from jaxmeta.cli.parser import Group, ParsedArguments, Parser, UsageError, call, normalized, of_function
from jaxmeta.cli.schema import Setting
from jaxmeta.cli.target_data import target_settings
from jaxmeta.transfer.weight_files import HUB

_TITLES = {
    "learner": "method: {}",
    "network": "network: {}",
    "tasks": "tasks: {}",
    "training": "training",
    "run": "run",
}
# Groups in the order of `--help`.
_SHOWN = ("learner", "network", "tasks", "training", "run")


# Flags that choose the parts of a run, and their help.
_NAMES = {
    "tasks": "where tasks come from; see `jaxmeta tasks`: a name, folder:PATH, arrays:FILE, table:FILE, "
    "tfds:NAME or module:name",
    "network": "the network; see `jaxmeta networks`: a name, or module:name of your own",
    "preset": "a protocol by name; see `jaxmeta presets`",
    "config": "start from this config.json; flags replace its values",
}

# Flags that are read before all others, because reading weights starts JAX.
_OF_DEVICES = ("devices", "mesh", "coordinator", "processes", "process")


def _name_settings(**defaults: str | None) -> Group:
    settings = {name: Setting(name, str | None, None, about) for name, about in _NAMES.items()}
    return Group("names", "names", settings, defaults)


def _first_phase(argv: Sequence[str]) -> tuple[dict[str, str], str | None, bool, str | None]:
    """Return the names in a command line, its first word, whether it resumes, and `--out`."""
    named: dict[str, str] = {}
    words = [normalized(word) for word in argv]
    wanted = {
        schema.flag_of(name): name for name in (*_NAMES, "init", "out", "learner", "target", *_OF_DEVICES)
    }
    for index, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in wanted:
            if equals:
                named[wanted[flag]] = value
            elif index + 1 < len(words):
                named[wanted[flag]] = argv[index + 1]
            else:
                raise UsageError(f"{flag}: expects a value")
    first = argv[0] if argv and not argv[0].startswith("-") else None
    return named, first, "--resume" in words, named.pop("out", None)


def _groups_of(base: Base, *, without: Iterable[str] = ()) -> list[Group]:
    """Return the groups of flags of a run that starts from a protocol."""
    chosen = {"learner": base.learner, "network": base.network, "tasks": base.tasks}
    groups = base.names().groups()
    return [
        Group(
            name,
            _TITLES[name].format(chosen.get(name, "")),
            {each: setting for each, setting in groups[name].items() if each not in set(without)},
            base.values[name],
        )
        for name in _SHOWN
    ]


def train_parser(base: Base, command: str = "train") -> Parser:
    """Return the parser of `train` for a run that starts from a protocol."""
    about = (
        "Meta-train a learner and evaluate it on test tasks. By default, train MAML on procedurally drawn "
        "characters."
    )
    invocation = Group("invocation", "invocation", schema.settings_of(run.Invocation), {})
    names = _name_settings(tasks=base.tasks, network=base.network, preset=base.preset)
    return Parser(
        command,
        [names, *_groups_of(base), invocation],
        words=[
            ("learner", "?", f"the method; see `jaxmeta learners`: a name, or module:name ({base.learner})")
        ],
        about=about,
        owner=f"{base.learner} on {base.tasks}",
    )


def train(argv: Sequence[str]) -> None:
    """Meta-train a learner, or continue a run."""
    named, learner, resume, out = _first_phase(argv)
    # Errors in the names themselves come before the run's own parser can be built.
    with _plain_parser().naming_flags():
        base = _base_to_resume(named, learner, out) if resume else base_of(_chosen(named, learner))
        if "init" in named and not resume and not {"network", "config"} & set(named):
            # Several processes share the devices that the flags name.
            if not {"coordinator", "processes", "process"} & set(named):
                make_devices_of_cores(named.get("devices"), named.get("mesh"))
            with train_parser(base).naming_flags():
                base = with_network_of(base, named["init"])
    parser = train_parser(base)
    parsed = parser.parse(argv)
    if more := parsed.words[0 if learner is None else 1 :]:
        first = "; the learner's name comes first" if learner is None else ""
        raise UsageError(f"unexpected argument {more[0]!r}{first}; see `jaxmeta train --help`")
    invocation = run.Invocation(**parsed.values.get("invocation", {}))
    with parser.naming_flags():
        values = _with_absolute_paths(parsed.values)
        if resume:
            run.resume_run(Path(str(out)).expanduser(), values, invocation, trusted(named, learner))
        else:
            run.new_run(resolve(base, values), invocation)


def _plain_parser() -> Parser:
    return Parser("train", [_name_settings()], words=[("learner", "?", "")])


def _chosen(named: Mapping[str, str], learner: str | None) -> Chosen:
    start = None
    if "config" in named:
        path = Path(named["config"]).expanduser()
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"--config: {path} does not exist")
        try:
            values = parsed_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--config: {path} is not valid JSON: {error}") from None
        start = from_json(values, path, trusted(named, learner))
        if "preset" in named:
            raise UsageError("--preset: --config already has all values of a preset; leave one of them out")
    tasks = named.get("tasks")
    return Chosen(
        learner,
        named.get("network"),
        None if tasks is None else sources.absolute(tasks),
        named.get("preset"),
        start,
    )


def trusted(named: Mapping[str, str], learner: str | None) -> list[str]:
    """Return the names in a command line; the user has thereby allowed to import their code."""
    return [name for name in (learner, named.get("network"), named.get("tasks")) if name is not None]


def _base_to_resume(named: Mapping[str, str], learner: str | None, out: str | None) -> Base:
    if out is None:
        raise UsageError("--resume: the run's folder is missing; add --out DIR")
    if "config" in named:
        raise UsageError(
            "--config: --resume continues with the run's own configuration; leave one of them out"
        )
    folder = Path(out).expanduser()
    before = load_config(folder, trusted(named, learner))
    tasks = named.get("tasks")
    requested = {
        "learner": (learner, before.learner["name"]),
        "network": (named.get("network"), before.network["name"]),
        "tasks": (tasks and sources.absolute(tasks), before.tasks["name"]),
        "preset": (named.get("preset"), before.preset),
    }
    for name, (value, now) in requested.items():
        if value is not None and value != now:
            flag = "LEARNER" if name == "learner" else schema.flag_of(name)
            raise UsageError(f"{flag}: got {value}, but the run in {folder} has {now}; leave it out")
    return base_of(Chosen(start=before))


def _with_absolute_paths(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the values of flags by group, with relative paths made absolute."""
    kept = {group: dict(values[group]) for group in _SHOWN if group in values}
    if "data" in kept.get("run", {}):
        kept["run"]["data"] = folders.data_folder(kept["run"]["data"])
    if "init" in kept.get("run", {}):
        path = Path(kept["run"]["init"]).expanduser()
        kept["run"]["init"] = str(path.resolve()) if path.exists() else kept["run"]["init"]
    for name in ("classes", "task_split"):
        file = kept.get("tasks", {}).get(name)
        if isinstance(file, str) and file != "auto" and Path(file).expanduser().exists():
            kept["tasks"][name] = str(Path(file).expanduser().resolve())
    return kept


# Settings that an evaluation may change.
_OF_EVALUATION = {
    "learner": ("eval_steps",),
    "tasks": ("ways", "shots", "queries"),
    "run": ("episodes", "seed", "data", "devices", "mesh"),
}


def evaluate(argv: Sequence[str]) -> None:
    """Evaluate a run's parameters on test tasks: those of its report, or others."""
    about = {
        "json": "file to write the result to",
        "confusion": "PNG file to draw the confusion matrix to",
        "learner": "for weights and transfers, names of heads on their features; for a run, module:name of "
        "your own method that it was trained with; for parameters of jm.train(run_dir=…), the method, or a "
        "jm.Learner by module:name",
        "network": "module:name of your own network that the run was trained with",
        "tasks": "other tasks of the same kind to evaluate on; or module:name of your own tasks that the "
        "run was trained with",
    }
    own = {name: Setting(name, str | None, None, text) for name, text in about.items()}
    own["per_class"] = Setting(
        "per_class", bool, False, "whether to report accuracy and most frequent confusions of each class"
    )
    output = Group("output", "output and your own code", own, {})
    words = [
        (
            "source",
            "?",
            "a folder of `train`; or one of `transfer` or weights, whose features are tested on --tasks",
        )
    ]
    named, folder, _, _ = _first_phase(argv)
    if folder is None:
        description = f"{evaluate.__doc__} `jaxmeta evaluate SOURCE --help` shows the flags of a run."
        if "--help" in argv or "-h" in argv:
            Parser("evaluate", [output], words=words, about=description).parse(argv)
        raise UsageError("SOURCE: is missing; give it before the flags; see `jaxmeta evaluate --help`")
    if not is_run(Path(folder).expanduser()) and (Path(folder).exists() or folder.startswith(HUB)):
        _evaluate_weights(folder, argv, named, words, output)
        return
    if holds_checkpoints(Path(folder).expanduser()):
        _evaluate_checkpoints(folder, argv, named, words, output)
        return
    allowed = trusted(named, named.get("learner"))
    config = load_config(Path(folder).expanduser(), allowed)
    tasks = sources.absolute(named["tasks"]) if "tasks" in named else config.tasks["name"]
    if tasks != config.tasks["name"]:
        with Parser("evaluate", [output], words=words).naming_flags():
            config = on_other_tasks(config, tasks)
    known = config.names().groups()
    groups = [
        Group(
            name,
            name,
            {each: known[name][each] for each in _OF_EVALUATION[name] if each in known[name]},
            config.settings(name),
        )
        for name in _OF_EVALUATION
    ]
    parser = Parser(
        "evaluate", [*groups, output], words=words, about=str(evaluate.__doc__), owner=config.learner["name"]
    )
    parsed = _parse_source(parser, argv)
    with parser.naming_flags():
        run.evaluate_run(
            Path(folder).expanduser(),
            _with_absolute_paths(parsed.values),
            tasks=tasks,
            trusted=allowed,
            **_outputs(parsed),
        )


def _parse_source(parser: Parser, argv: Sequence[str]) -> ParsedArguments:
    """Parse the flags of `evaluate`, whose only word is the source.

    Raises:
      UsageError: there is another word, or a flag is invalid.
    """
    parsed = parser.parse(argv)
    if len(parsed.words) > 1:
        raise UsageError(f"unexpected argument {parsed.words[1]!r}; see `jaxmeta evaluate --help`")
    return parsed


def _evaluate_checkpoints(
    folder: str,
    argv: Sequence[str],
    named: Mapping[str, str],
    words: Sequence[tuple[str, str | None, str]],
    output: Group,
) -> None:
    """Evaluate the parameters of `jm.train(run_dir=…)` with the method, network and tasks in flags."""
    plain = Parser("evaluate", [output], words=words)
    if missing := [schema.flag_of(name) for name in ("learner", "tasks") if name not in named]:
        raise UsageError(
            f"{missing[0]}: is missing; {folder} was written by jm.train(run_dir=…) and has no "
            "config.json; give --learner NAME and --tasks NAME, and --network and settings as in training"
        )
    with plain.naming_flags():
        chosen = Chosen(named["learner"], named.get("network"), sources.absolute(named["tasks"]))
        base = base_of(chosen)
    groups = [
        group._replace(settings={name: group.settings[name] for name in group.settings if kept(name)})
        for group, kept in _of_checkpoints(base)
    ]
    about = "Evaluate the parameters of jm.train(run_dir=…) on test tasks."
    parser = Parser("evaluate", [*groups, output], words=words, about=about, owner=base.learner)
    parsed = _parse_source(parser, argv)
    with parser.naming_flags():
        config = resolve(base, _with_absolute_paths(parsed.values))
        run.evaluate_checkpoints(Path(folder).expanduser(), config, **_outputs(parsed))


def _of_checkpoints(base: Base) -> list[tuple[Group, Callable[[str], bool]]]:
    """Return groups of flags, each with a predicate that selects the settings of an evaluation."""
    selects: dict[str, Callable[[str], bool]] = {
        "learner": lambda name: True,
        "network": lambda name: True,
        "tasks": lambda name: not name.startswith("train_"),
        "run": lambda name: name in _OF_EVALUATION["run"],
    }
    return [(group, selects[group.name]) for group in _groups_of(base) if group.name in selects]


def _evaluate_weights(
    source: str,
    argv: Sequence[str],
    named: Mapping[str, str],
    words: Sequence[tuple[str, str | None, str]],
    output: Group,
) -> None:
    plain = Parser("evaluate", [output], words=words)
    tasks = named.get("tasks")
    with plain.naming_flags(), sources.renaming({"learner": "tasks"}):
        base = base_of(Chosen(HEAD_DEFAULT, tasks=None if tasks is None else sources.absolute(tasks)))
    groups = base.names().groups()
    training = {name for name in groups["tasks"] if name.startswith("train_")}
    settings_by_group = {
        "tasks": {name: each for name, each in groups["tasks"].items() if name not in training},
        "run": {name: groups["run"][name] for name in _OF_EVALUATION["run"] if name in groups["run"]},
    }
    of_source = [
        Group(name, _TITLES[name].format(base.tasks), settings, base.values[name])
        for name, settings in settings_by_group.items()
    ]
    about = str(evaluating.evaluate_weights.__doc__).partition("\n")[0]
    heads = Setting(
        "learner",
        tuple[str, ...] | None,
        None,
        f"heads on the features, of {', '.join(HEADS)}; none for all of them",
    )
    output = output._replace(settings={**output.settings, "learner": heads})
    parser = Parser("evaluate", [*of_source, output], words=words, about=about, owner=base.tasks)
    parsed = _parse_source(parser, _with_one_list(argv, "--learner"))
    own = parsed.values.get("output", {})
    if own.get("tasks") is None:
        raise UsageError(f"--tasks: is missing; {source} is not a run and has no tasks")
    with parser.naming_flags():
        config = resolve(base, _with_absolute_paths(parsed.values))
        evaluating.evaluate_weights(
            source, config, learner=own.get("learner"), network=own.get("network"), **_outputs(parsed)
        )


def _with_one_list(argv: Sequence[str], flag: str) -> list[str]:
    """Return a command line with all values of a flag as one list, separated by commas.

    The flag may be given several times, and have several values each time.

    Examples:
      >>> _with_one_list(["file", "--learner", "a", "b", "--ways", "5", "--learner=c"], "--learner")
      ['file', '--ways', '5', '--learner', 'a,b,c']
    """
    rest: list[str] = []
    values: list[str] = []
    inside = False
    for word in argv:
        name, equals, value = word.partition("=")
        if normalized(name) == flag:
            values += [value] if equals else []
            inside = not equals
        elif inside and not word.startswith("-"):
            values.append(word)
        else:
            inside = False
            rest.append(word)
    return rest + ([flag, ",".join(values)] if values else [flag] if inside else [])


def _outputs(parsed: ParsedArguments) -> dict[str, Any]:
    """Return the outputs of an evaluation in a command line."""
    own = parsed.values.get("output", {})
    return {name: own[name] for name in ("json", "per_class", "confusion") if name in own}


def compare(argv: Sequence[str]) -> None:
    """Train learners on the same tasks at the same budget, and compare them on the same test tasks.

    Learners are trained one after the other, each in its own process. The comparison's folder contains a
    run folder for each learner, comparison.md, comparison.png and comparison.json. A flag applies to the
    learners that have it.
    """
    named, _, _, _ = _first_phase(argv)
    learners = []
    for word in argv:
        if word.startswith("-"):
            break
        learners.append(word)
    with _plain_parser().naming_flags():
        bases = {name: base_of(_chosen(named, name)) for name in learners}
        common = base_of(_chosen(named, None))
    merged: dict[str, dict[str, Setting]] = {name: {} for name in _SHOWN}
    for base in bases.values():
        for group in _groups_of(base):
            merged[group.name] |= {
                name: each for name, each in group.settings.items() if name not in merged[group.name]
            }
    groups = [Group(name, name, settings, common.values[name]) for name, settings in merged.items()]
    own = {
        "out": Setting("out", str | None, None, "the comparison's folder"),
        "resume": Setting(
            "resume", bool, False, "continue the comparison in --out; give its learners and flags again"
        ),
    }
    parser = Parser(
        "compare",
        [_name_settings(), *groups, Group("comparison", "comparison", own, {})],
        words=[("learners", "*", "two or more; the first is the baseline")],
        about=str(compare.__doc__).partition("\n")[0],
        owner=" and ".join(learners) or "compare",
    )
    parsed = parser.parse(argv)
    words = parsed.words
    if words[: len(learners)] != learners or len(words) > len(learners):
        raise UsageError("LEARNER: give the learners first, then the flags")
    with parser.naming_flags():
        comparing.compare(
            bases, common, parsed._replace(values={**parsed.values, **_with_absolute_paths(parsed.values)})
        )


def transfer(argv: Sequence[str]) -> None:
    """Train a classifier of labelled images on a source's backbone."""
    _with_target(transferring.transfer, "transfer", argv)


def rank(argv: Sequence[str]) -> None:
    """Rank sources by their estimated transferability to a target."""
    _with_target(transferring.rank, "rank", argv)


def _with_target(function: Callable[..., Any], command: str, argv: Sequence[str]) -> None:
    """Call a command that has the flags of its function and of its target's source."""
    named, _, _, _ = _first_phase(argv)
    groups = []
    if "target" in named:
        with of_function(function, command).naming_flags():
            settings = target_settings(named["target"])
        groups.append(Group("reading", f"target: {named['target']}", settings, {}))
    call(function, command, argv, groups)
