"""Commands whose flags depend on names: `train`, `evaluate` and `compare` parse in two phases.

First the names of the learner, the network, the tasks and the protocol; then exactly the flags that these
have, with their real values as defaults.
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
from jaxmeta.cli.parser import Given, Group, Parser, UsageError, call, normalized, of_function
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
# The order of groups in help, and what of `training` and `run` comes last there.
_SHOWN = ("learner", "network", "tasks", "training", "run")


# Names that choose what a run is made of, and what they are.
_NAMES = {
    "tasks": "where tasks come from; see `jaxmeta tasks`: a name, folder:PATH, arrays:FILE, table:FILE, "
    "tfds:NAME or module:name",
    "network": "the network; see `jaxmeta networks`: a name, or module:name of your own",
    "preset": "a protocol by name; see `jaxmeta presets`",
    "config": "start from this config.json, with flags in the place of its values",
}


def _name_settings(**defaults: str | None) -> Group:
    settings = {name: Setting(name, str | None, None, about) for name, about in _NAMES.items()}
    return Group("names", "names", settings, defaults)


def _first_phase(argv: Sequence[str]) -> tuple[dict[str, str], str | None, bool, str | None]:
    """Return the names in a command line, its first word, whether it resumes, and `--out`."""
    found: dict[str, str] = {}
    words = [normalized(word) for word in argv]
    wanted = {schema.flag_of(name): name for name in (*_NAMES, "out", "learner", "target")}
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in wanted:
            if equals:
                found[wanted[flag]] = value
            elif place + 1 < len(words):
                found[wanted[flag]] = argv[place + 1]
            else:
                raise UsageError(f"{flag}: expects a value")
    first = argv[0] if argv and not argv[0].startswith("-") else None
    return found, first, "--resume" in words, found.pop("out", None)


def _groups_of(base: Base, *, without: Iterable[str] = ()) -> list[Group]:
    """Return the groups of flags that a run from a protocol can be told."""
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
    """Return the parser of `train` for what a run is made of."""
    about = (
        "Meta-train a learner and evaluate it on test tasks. With nothing else, train MAML on drawn "
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
    given_names, learner, resume, out = _first_phase(argv)
    # The parser of what is chosen by default, for errors in the names themselves.
    with _plain_parser().naming_flags():
        if resume:
            base = _base_to_resume(given_names, learner, out)
        else:
            base = base_of(_chosen(given_names, learner))
    parser = train_parser(base)
    given = parser.parse(argv)
    if more := given.words[0 if learner is None else 1 :]:
        first = "; the learner's name comes first" if learner is None else ""
        raise UsageError(f"unexpected argument {more[0]!r}{first}; see `jaxmeta train --help`")
    invocation = run.Invocation(**given.values.get("invocation", {}))
    with parser.naming_flags():
        values = with_absolute_paths(given.values)
        if resume:
            run.resume_run(Path(str(out)).expanduser(), values, invocation, trusted(given_names, learner))
        else:
            run.new_run(resolve(base, values), invocation)


def _plain_parser() -> Parser:
    return Parser("train", [_name_settings()], words=[("learner", "?", "")])


def _chosen(given: Mapping[str, str], learner: str | None) -> Chosen:
    start = None
    if "config" in given:
        path = Path(given["config"]).expanduser()
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"--config: there is no {path}")
        try:
            values = parsed_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--config: {path} is no JSON: {error}") from None
        start = from_json(values, path, trusted(given, learner))
        if "preset" in given:
            raise UsageError("--preset: a configuration says all that a preset would; leave one of them out")
    tasks = given.get("tasks")
    return Chosen(
        learner,
        given.get("network"),
        None if tasks is None else sources.absolute(tasks),
        given.get("preset"),
        start,
    )


def trusted(given: Mapping[str, str], learner: str | None) -> list[str]:
    """Return the names that a command line gives, whose code may be imported."""
    return [name for name in (learner, given.get("network"), given.get("tasks")) if name is not None]


def _base_to_resume(given: Mapping[str, str], learner: str | None, out: str | None) -> Base:
    if out is None:
        raise UsageError("--resume: needs the run's folder; add --out DIR")
    if "config" in given:
        raise UsageError("--config: --resume goes on with the run's own; leave one of them out")
    folder = Path(out).expanduser()
    before = load_config(folder, trusted(given, learner))
    tasks = given.get("tasks")
    asked = {
        "learner": (learner, before.learner["name"]),
        "network": (given.get("network"), before.network["name"]),
        "tasks": (tasks and sources.absolute(tasks), before.tasks["name"]),
        "preset": (given.get("preset"), before.preset),
    }
    for name, (value, now) in asked.items():
        if value is not None and value != now:
            said = "LEARNER" if name == "learner" else schema.flag_of(name)
            raise UsageError(f"{said}: got {value}, but the run in {folder} has {now}; leave it out")
    return base_of(Chosen(start=before))


def with_absolute_paths(given: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return flags by group as they are kept: paths good in every folder."""
    kept = {group: dict(given[group]) for group in _SHOWN if group in given}
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
        "json": "also write the result here",
        "confusion": "also draw here which classes are taken for which, as a PNG",
        "learner": "module:name of a method of your own that the run was trained with; of parameters of "
        "jm.train(run_dir=…) the method, or a jm.Learner by module:name",
        "network": "module:name of a network of your own that the run was trained with",
        "tasks": "evaluate on other tasks of the same kind; or module:name of your own that the run was "
        "trained with",
    }
    own = {name: Setting(name, str | None, None, text) for name, text in about.items()}
    own["per_class"] = Setting(
        "per_class", bool, False, "also report accuracy and most frequent confusions of each class, by name"
    )
    output = Group("output", "output and code of your own", own, {})
    words = [
        (
            "source",
            "?",
            "a folder of `train`; or one of `transfer`, or weights, whose features are compared on --tasks",
        )
    ]
    named, folder, _, _ = _first_phase(argv)
    if folder is None:
        about_it = f"{evaluate.__doc__} `jaxmeta evaluate SOURCE --help` shows what can be changed."
        if "--help" in argv or "-h" in argv:
            Parser("evaluate", [output], words=words, about=about_it).parse(argv)
        raise UsageError("SOURCE: is missing; it comes first; see `jaxmeta evaluate --help`")
    if not is_run(Path(folder).expanduser()) and (Path(folder).exists() or folder.startswith(HUB)):
        _evaluate_weights(folder, argv, named, words, output)
        return
    if holds_checkpoints(Path(folder).expanduser()):
        _evaluate_checkpoints(folder, argv, named, words, output)
        return
    believed = trusted(named, named.get("learner"))
    config = load_config(Path(folder).expanduser(), believed)
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
    given = parser.parse(argv)
    if len(given.words) > 1:
        raise UsageError(f"unexpected argument {given.words[1]!r}; see `jaxmeta evaluate --help`")
    with parser.naming_flags():
        run.evaluate_run(
            Path(folder).expanduser(),
            with_absolute_paths(given.values),
            tasks=tasks,
            trusted=believed,
            **_outputs(given),
        )


def _evaluate_checkpoints(
    folder: str,
    argv: Sequence[str],
    named: Mapping[str, str],
    words: Sequence[tuple[str, str | None, str]],
    output: Group,
) -> None:
    """Evaluate what `jm.train(run_dir=…)` has left, by a method, a network and tasks that flags name."""
    plain = Parser("evaluate", [output], words=words)
    if missing := [schema.flag_of(name) for name in ("learner", "tasks") if name not in named]:
        raise UsageError(
            f"{missing[0]}: is missing; {folder} has parameters of jm.train(run_dir=…), which do not say "
            "what they are of: give --learner NAME and --tasks NAME, and --network and settings as they were"
        )
    with plain.naming_flags():
        chosen = Chosen(named["learner"], named.get("network"), sources.absolute(named["tasks"]))
        base = base_of(chosen)
    groups = [
        group._replace(settings={name: group.settings[name] for name in group.settings if kept(name)})
        for group, kept in _of_checkpoints(base)
    ]
    about = "Evaluate parameters that jm.train(run_dir=…) has left on test tasks."
    parser = Parser("evaluate", [*groups, output], words=words, about=about, owner=base.learner)
    given = parser.parse(argv)
    if len(given.words) > 1:
        raise UsageError(f"unexpected argument {given.words[1]!r}; see `jaxmeta evaluate --help`")
    with parser.naming_flags():
        config = resolve(base, with_absolute_paths(given.values))
        run.evaluate_checkpoints(Path(folder).expanduser(), config, **_outputs(given))


def _of_checkpoints(base: Base) -> list[tuple[Group, Callable[[str], bool]]]:
    """Return groups of flags, each with what says of a setting whether it counts in an evaluation."""
    counts: dict[str, Callable[[str], bool]] = {
        "learner": lambda name: True,
        "network": lambda name: True,
        "tasks": lambda name: not name.startswith("train_"),
        "run": lambda name: name in _OF_EVALUATION["run"],
    }
    return [(group, counts[group.name]) for group in _groups_of(base) if group.name in counts]


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
        base = base_of(Chosen(evaluating.METHOD, tasks=None if tasks is None else sources.absolute(tasks)))
    groups = base.names().groups()
    training = {name for name in groups["tasks"] if name.startswith("train_")}
    shown = {
        "tasks": {name: each for name, each in groups["tasks"].items() if name not in training},
        "run": {name: groups["run"][name] for name in _OF_EVALUATION["run"] if name in groups["run"]},
    }
    of_source = [
        Group(name, _TITLES[name].format(base.tasks), settings, base.values[name])
        for name, settings in shown.items()
    ]
    about = str(evaluating.evaluate_weights.__doc__).partition("\n")[0]
    parser = Parser("evaluate", [*of_source, output], words=words, about=about, owner=base.tasks)
    given = parser.parse(argv)
    if len(given.words) > 1:
        raise UsageError(f"unexpected argument {given.words[1]!r}; see `jaxmeta evaluate --help`")
    own = given.values.get("output", {})
    if own.get("learner") is not None:
        raise UsageError(
            f"--learner: got {own['learner']}, and {source} is not a run that was trained with it"
        )
    if own.get("tasks") is None:
        raise UsageError(f"--tasks: is missing; {source} is no run that says what it was trained on")
    with parser.naming_flags():
        config = resolve(base, with_absolute_paths(given.values))
        evaluating.evaluate_weights(source, config, network=own.get("network"), **_outputs(given))


def _outputs(given: Given) -> dict[str, Any]:
    """Return what an evaluation is told to report."""
    own = given.values.get("output", {})
    return {name: own[name] for name in ("json", "per_class", "confusion") if name in own}


def compare(argv: Sequence[str]) -> None:
    """Train learners on the same tasks at the same budget, and compare them on the same test tasks.

    One process a learner, one after the other. The comparison's folder gets a run's folder for each,
    comparison.md, comparison.png and comparison.json. A flag goes to each learner that has it.
    """
    given_names, _, _, _ = _first_phase(argv)
    learners = []
    for word in argv:
        if word.startswith("-"):
            break
        learners.append(word)
    with _plain_parser().naming_flags():
        bases = {name: base_of(_chosen(given_names, name)) for name in learners}
        common = base_of(_chosen(given_names, None))
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
        words=[("learners", "*", "two or more; the others are compared to the first")],
        about=str(compare.__doc__).partition("\n")[0],
        owner=" and ".join(learners) or "compare",
    )
    given = parser.parse(argv)
    words = given.words
    if words[: len(learners)] != learners or len(words) > len(learners):
        raise UsageError("LEARNER: name the learners first, then the flags")
    with parser.naming_flags():
        comparing.compare(
            bases, common, given._replace(values={**given.values, **with_absolute_paths(given.values)})
        )


def transfer(argv: Sequence[str]) -> None:
    """Learn labelled images from what a source has learned."""
    _with_target(transferring.transfer, "transfer", argv)


def rank(argv: Sequence[str]) -> None:
    """Rank sources by how well they promise to transfer to a target."""
    _with_target(transferring.rank, "rank", argv)


def _with_target(function: Callable[..., Any], command: str, argv: Sequence[str]) -> None:
    """Call a command whose flags are those of its function and those of its target's source."""
    named, _, _, _ = _first_phase(argv)
    groups = []
    if "target" in named:
        with of_function(function, command).naming_flags():
            settings = target_settings(named["target"])
        groups.append(Group("reading", f"target: {named['target']}", settings, {}))
    call(function, command, argv, groups)
