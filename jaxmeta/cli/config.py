"""The configuration of a run: five groups of settings, from flags, from a protocol, and as config.json.

`learner`, `network` and `tasks` hold a name and the settings of what it names, whose signature is the schema;
`training` and `run` are dataclasses. A protocol by name (a preset) gives values to some of them.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from jaxmeta.checks import LARGEST_SEED, ArgumentError, check_count, check_number, parsed_json
from jaxmeta.cli import names, schema
from jaxmeta.cli.presets import PRESETS
from jaxmeta.cli.schema import Setting
from jaxmeta.cli.sources import Sequences, Source, Streaming, is_own, key_of, source_of
from jaxmeta.declare import Facts, facts_of, parent_of

# The form of config.json, one higher whenever a setting comes or goes; 0.1 had none.
FORMAT = 3
GROUPS = ("learner", "network", "tasks", "training", "run")
# What a run hands to a factory, and no setting is.
SUPPLIED_TO_LEARNER = ("norm", "loss", "augment", "strings")
SUPPLIED_TO_NETWORK = ("ways", "out")
SUPPLIED_TO_TASKS = ("split", "data")
OF_TRAINING = ("ways", "shots", "queries")
# What a method may have defaults of, and not every run has.
_SOMETIMES = ("network", "distort", "report_steps", "train_ways", "train_shots", "train_queries")
# The norms of a method that does not choose statistics.
_CHOOSES_NONE = ("none",)
# Where a name goes that several groups have, where a protocol or a method gives its value.
_ORDER = ("training", "run", "tasks", "learner", "network")


@dataclasses.dataclass(frozen=True)
class Training:
    """How parameters are meta-trained.

    Attributes:
      steps: meta-steps.
      meta_batch: tasks per meta-step.
      outer_lr: step size of the outer optimizer.
      outer_optimizer: the outer optimizer. adam has weight decay added to the gradient, adamw apart from it.
      schedule: how --outer-lr changes over the run: cosine and linear fall to zero, step multiplies it by
        --decay-factor every --decay-every meta-steps.
      norm: what batch normalisation takes its statistics from in training: the batch itself, the support set
        (for `jaxmeta predict`), the training tasks as a population, or the episode's inner steps.
      validate_every: meta-steps between validations and between checkpoints.
      clip: largest absolute value of an entry of the meta-gradient.
      clip_norm: largest global norm of the meta-gradient.
      distort: whether training images are turned, sheared, scaled and shifted at random.
      precision: what the network computes in. Parameters and gradients stay in float32.
      decay_every: meta-steps between decays of --schedule step.
      decay_factor: factor of --outer-lr at each decay of --schedule step.
      weight_decay: weight of the parameters in the gradient, or of adamw in the update.
      outer_momentum: momentum of sgd and rmsprop.
      outer_betas: decay rates of Adam's moments.
      outer_eps: ε of adam, adamw and rmsprop.
      diagnose: whether cosine and ratio of norms between the meta-gradient and the first-order one are
        reported.
    """

    steps: int = 60_000
    meta_batch: int = 32
    outer_lr: float = 1e-3
    outer_optimizer: Literal["adam", "adamw", "sgd", "rmsprop"] = "adam"
    schedule: Literal["constant", "cosine", "linear", "step"] = "constant"
    norm: Literal["none", "batch", "support", "population", "episode"] = "batch"
    validate_every: int = 1000
    clip: float | None = None
    clip_norm: float | None = None
    distort: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    decay_every: int | None = None
    decay_factor: float = 0.5
    weight_decay: float = 0.0
    outer_momentum: float = 0.0
    outer_betas: tuple[float, float] = (0.9, 0.999)
    outer_eps: float = 1e-8
    diagnose: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "meta_batch", "validate_every"):
            check_count(name, getattr(self, name))
        for name in ("outer_lr", "clip", "clip_norm", "weight_decay", "outer_momentum", "outer_eps"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0)
        check_number("decay_factor", self.decay_factor, above=0)
        for beta in self.outer_betas:
            check_number("outer_betas", beta, 0)
            if beta >= 1:
                raise ArgumentError("outer_betas", f"got {beta}; both must be below 1")
        if self.schedule == "step" and self.decay_every is None:
            raise ArgumentError("decay_every", "--schedule step needs it: meta-steps between decays")
        if self.decay_every is not None:
            check_count("decay_every", self.decay_every)
            if self.schedule != "step":
                raise ArgumentError("decay_every", f"--schedule is {self.schedule}; only step decays so")


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a run starts, and where it finds its data and devices. Only seed and init change parameters.

    Attributes:
      seed: seed of the initial parameters and of all episodes.
      data: folder with the data set's files; without it they come from the cache, or a download.
      init: start from what a source has learned, a folder of `train` or `transfer`, or weights; without it
        from random parameters.
      episodes: test tasks.
      report_steps: numbers of inner steps to report beside --eval-steps.
      strategy: how a device goes through its tasks: auto, vmap, scan, or that many at once.
      devices: number of devices that share the tasks, on CPUs of cores; without it as many as are of use.
      mesh: how devices share the work: tasks=8, or with parameters split as well tasks=4,params=2.
      workers: processes that read a stream. 0 reads in threads.
      non_finite: what to do where the loss of a meta-step is not finite: stop the run, or skip the step.
      log_every: meta-steps between rows of metrics.jsonl.
    """

    seed: int = 0
    data: str | None = None
    init: str | None = None
    episodes: int = 1000
    report_steps: tuple[int, ...] = ()
    strategy: int | Literal["auto", "vmap", "scan"] = "auto"
    devices: int | None = None
    mesh: str | None = None
    workers: int = 0
    non_finite: Literal["stop", "skip"] = "stop"
    log_every: int = 50

    def __post_init__(self) -> None:
        check_count("seed", self.seed, 0, LARGEST_SEED)
        check_count("episodes", self.episodes, 2)
        check_count("workers", self.workers, 0)
        check_count("log_every", self.log_every)
        for steps in self.report_steps:
            check_count("report_steps", steps, 0)
        if isinstance(self.strategy, int):
            check_count("strategy", self.strategy)


class Names(NamedTuple):
    """What the names of a configuration stand for.

    Attributes:
      learner: the factory.
      network: what builds the network.
      source: of tasks.
    """

    learner: Callable[..., Any]
    network: Callable[..., Any]
    source: Source

    @property
    def facts(self) -> Facts:
        return facts_of(self.learner)

    def groups(self) -> dict[str, dict[str, Setting]]:
        """Return the settings of each group that a run of these can be told, by name."""
        found = self.stored_groups()
        if not schema.accepts(self.learner, "augment"):
            del found["training"]["distort"]
        if not can_be_of_first_order(self.learner):
            del found["training"]["diagnose"]
        classification = kind_of(self.source) == "classification"
        if classification or not schema.accepts(self.learner, "eval_steps"):
            del found["run"]["report_steps"]
        norms = tuple(dict.fromkeys(self.facts.rows.values()))
        if not classification and norms != _CHOOSES_NONE:
            norms = ("batch",)
        found["training"]["norm"] = found["training"]["norm"]._replace(hint=Literal[norms])
        if self.source.images is None:
            del found["run"]["workers"]
        if not schema.accepts(self.source.function, "data"):
            del found["run"]["data"]
        return found

    def stored_groups(self) -> dict[str, dict[str, Setting]]:
        """Return the settings of each group that config.json has, by name."""
        tasks = schema.settings_of(self.source.function, SUPPLIED_TO_TASKS)
        if schema.accepts(self.learner, "strings"):
            tasks |= schema.settings_of(Sequences)
        if self.source.images is not None:
            tasks |= schema.settings_of(Streaming)
        for name in OF_TRAINING:
            if name in tasks:
                # All tasks of a run have one shape.
                tasks[name] = tasks[name]._replace(hint=int)
                about = f"--{name} in training only; without it as there."
                tasks[f"train_{name}"] = Setting(f"train_{name}", int, schema.MISSING, about)
        return {
            "learner": schema.settings_of(self.learner, SUPPLIED_TO_LEARNER),
            "network": schema.settings_of(self.network, (*SUPPLIED_TO_NETWORK, *_width(self.network))),
            "tasks": tasks,
            "training": schema.settings_of(Training),
            "run": schema.settings_of(Run),
        }


def _width(network: Callable[..., Any]) -> tuple[str, ...]:
    name = names.width_name(network)
    return () if name is None else (name,)


def can_be_of_first_order(learner: Callable[..., Any]) -> bool:
    """Return whether a method has another order than the first, which it can be compared with."""
    order = schema.settings_of(learner, SUPPLIED_TO_LEARNER).get("order")
    return order is not None and "first" in getattr(order.hint, "__args__", ())


@dataclasses.dataclass(frozen=True)
class Config:
    """A resolved configuration.

    Attributes:
      preset: the protocol it began from; None for tasks of one's own.
      learner, network, tasks: `name` and its settings.
      training, run: the other groups.
      own: the SHA-256 of the file of each `module:name` in it.
      split_hash, images: of the data, once they are known; see `cli.data`.
      model: the network as `jm.transfer.load_pretrained` builds it; None where it cannot.
    """

    preset: str | None
    learner: dict[str, Any]
    network: dict[str, Any]
    tasks: dict[str, Any]
    training: Training
    run: Run
    own: dict[str, str] = dataclasses.field(default_factory=dict)
    split_hash: str | None = None
    images: dict[str, Any] | None = None
    model: str | None = None

    def names(self) -> Names:
        return find_names(self.learner["name"], self.network["name"], self.tasks["name"])

    def settings(self, group: str) -> dict[str, Any]:
        """Return the settings of a group without its name."""
        found = getattr(self, group)
        if isinstance(found, Training | Run):
            return dataclasses.asdict(found)
        return {name: value for name, value in found.items() if name != "name"}

    def replaced(self, **groups: Mapping[str, Any]) -> "Config":
        """Return the configuration with some settings of its groups replaced."""
        found: dict[str, Any] = {}
        for group, values in groups.items():
            now = getattr(self, group)
            is_dataclass = isinstance(now, Training | Run)
            found[group] = dataclasses.replace(now, **values) if is_dataclass else {**now, **values}
        return dataclasses.replace(self, **found)

    def to_json(self) -> dict[str, Any]:
        """Return what config.json holds."""
        values = {"jaxmeta": version("jaxmeta"), "format": FORMAT, **dataclasses.asdict(self)}
        return json.loads(json.dumps(values))


def find_names(learner: str, network: str, tasks: str) -> Names:
    """Return what three names stand for."""
    return Names(
        names.find("learner", learner, names.LEARNERS),
        names.find("network", network, names.NETWORKS),
        source_of(tasks),
    )


# --- From a protocol and flags ----------------------------------------------------------------------------


class Chosen(NamedTuple):
    """The names that a command was given, None where it was not; and a configuration to start from."""

    learner: str | None = None
    network: str | None = None
    tasks: str | None = None
    preset: str | None = None
    start: Config | None = None


class Base(NamedTuple):
    """A protocol with another learner, tasks or network in it, before flags.

    Attributes:
      preset: its name.
      learner, network, tasks: names.
      values: of settings, by group.
      facts: of a method that is not the one the protocol was made for, whose defaults may depend on the
        number of meta-steps.
      flat: what those defaults are asked with.
      explicit: settings that the protocol states for that method.
    """

    preset: str | None
    learner: str
    network: str
    tasks: str
    values: dict[str, dict[str, Any]]
    facts: Facts | None = None
    flat: Mapping[str, Any] = MappingProxyType({})
    explicit: frozenset[str] = frozenset()

    def names(self) -> Names:
        return find_names(self.learner, self.network, self.tasks)


def base_of(chosen: Chosen) -> Base:
    """Return the protocol that a run starts from.

    Raises:
      ArgumentError: an unknown name; a protocol of other tasks; a learner that learns no such tasks.
    """
    if chosen.start is not None:
        return _from_config(chosen.start, chosen)
    tasks = chosen.tasks
    preset = (
        chosen.preset if chosen.preset is not None else source_of("glyphs" if tasks is None else tasks).preset
    )
    names.lookup("preset", preset, PRESETS)
    if tasks is not None and chosen.preset is not None:
        made_for = _tasks_of_preset(preset)
        if key_of(tasks) != key_of(made_for):
            raise ArgumentError(
                "tasks", f"got {tasks}, but preset {preset} is for {made_for}; leave one of them out"
            )
    base = _of_preset(preset, tasks)
    if chosen.learner is not None and chosen.learner != base.learner:
        base = _with_learner(base, chosen.learner)
    if chosen.network is not None and chosen.network != base.network:
        base = _with_network(base, chosen.network)
    return base


def _tasks_of_preset(preset: str) -> str:
    spec = PRESETS[preset]
    return spec["tasks"] if "tasks" in spec else _tasks_of_preset(spec["base"])


def _of_preset(preset: str, tasks: str | None = None) -> Base:
    """Return a preset as it is, or with the path that tasks of its kind were given."""
    spec = dict(PRESETS[preset])
    spec.pop("description")
    if (parent := spec.pop("base", None)) is not None:
        base = _of_preset(parent, tasks)
        learner = spec.pop("learner", base.learner)
        if learner != base.learner:
            base = _with_learner(base, learner)
        network = spec.pop("network", base.network)
        if network != base.network:
            base = _with_network(base, network)
        for name, value in spec.items():
            _assign(base, name, value)
        return base._replace(preset=preset, explicit=base.explicit | set(spec))
    learner, network = spec.pop("learner", "maml"), spec.pop("network")
    source = spec.pop("tasks")
    found = find_names(learner, network, tasks or source)
    groups = found.groups()
    values = {group: schema.defaults_of(groups[group]) for group in GROUPS}
    base = Base(None if is_own(tasks or source) else preset, learner, network, tasks or source, values)
    for name, value in spec.items():
        _assign(base, name, value)
    _fill_training_shape(base, spec)
    return base


def _fill_training_shape(base: Base, spec: Mapping[str, Any]) -> None:
    """Give training the shape of test tasks where a protocol states none."""
    for name in OF_TRAINING:
        if name in base.values["tasks"] and f"train_{name}" not in spec:
            factor = base.names().facts.train_shots if name == "shots" else 1
            base.values["tasks"][f"train_{name}"] = base.values["tasks"][name] * factor


def _assign(base: Base, name: str, value: Any) -> None:
    """Set a value in the group before the name's dot, or in the first one that has such a setting."""
    groups = base.names().groups()
    group, dot, of_group = name.partition(".")
    if dot:
        base.values[group][of_group] = value
        return
    # Tasks of one's own start from a protocol that was made for others, which knows of their shape alone.
    own = is_own(base.tasks)
    for group in _ORDER:
        if own and group == "tasks" and name.removeprefix("train_") not in OF_TRAINING:
            continue
        if name in groups[group]:
            base.values[group][name] = value
            return
    if not own:
        raise ArgumentError(name, f"no group of a run of {base.learner} on {base.tasks} has such a setting")


def _flat(base: Base) -> dict[str, Any]:
    """Return the settings of a protocol by their bare names, for a method's own defaults."""
    found: dict[str, Any] = {}
    for group in reversed(_ORDER):
        found |= base.values[group]
    facts = base.names().facts
    return {
        **found,
        "learner": base.learner,
        "network": base.network,
        "tasks": base.tasks,
        "kind": kind_of(base.names().source),
        "made_for_embeddings": not facts.head,
        "ways": base.values["tasks"].get("ways"),
    }


def kind_of(source: Source) -> str:
    return (
        "classification" if "ways" in schema.settings_of(source.function, SUPPLIED_TO_TASKS) else "regression"
    )


def _with_learner(base: Base, learner: str) -> Base:
    """Return the protocol with another learner: without settings of the old one, and with its own."""
    factory = names.find("learner", learner, names.LEARNERS)
    facts, kind = facts_of(factory), kind_of(base.names().source)
    if kind not in facts.kinds:
        raise ArgumentError(
            "learner", f"{learner} learns {' and '.join(facts.kinds)}, and {base.tasks} tasks are {kind}"
        )
    flat, before = _flat(base), base.names()
    own = facts.defaults(flat)
    network = own.get("network", base.network)
    found = base._replace(learner=learner, network=network, facts=facts, flat=flat, values={})
    groups = found.names().groups()
    for group in ("tasks", "training", "run", "network"):
        kept = {} if group == "network" and network != base.network else base.values[group]
        values = schema.defaults_of(groups[group])
        found.values[group] = values | {name: kept[name] for name in kept if name in groups[group]}
    values = schema.defaults_of(groups["learner"])
    if _forwards_to(factory, before.learner):
        theirs = base.values["learner"]
        values |= {name: theirs[name] for name in theirs if name in groups["learner"]}
    found.values["learner"] = values
    if facts.outer != before.facts.outer:
        found.values["training"]["outer_optimizer"] = facts.outer
    if "train_shots" in found.values["tasks"]:
        shots = base.values["tasks"]["train_shots"] * facts.train_shots // before.facts.train_shots
        found.values["tasks"]["train_shots"] = shots
    if found.values["training"]["norm"] not in facts.rows.values():
        found.values["training"]["norm"] = next(iter(facts.rows.values()))
    for name, value in own.items():
        if any(name in groups[group] for group in GROUPS):
            _assign(found, name, value)
        elif name not in _SOMETIMES:
            raise ArgumentError("training", f"got {name!r}, which is no setting of a run of {learner}")
    return found


def _forwards_to(factory: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Return whether one of two factories hands its settings on to the other, or both to one."""

    def root(each: Callable[..., Any]) -> Callable[..., Any]:
        parent = parent_of(each)
        return each if parent is None else root(parent)

    return root(factory) is root(other)


def _with_network(base: Base, network: str) -> Base:
    found = base._replace(network=network, values={**base.values})
    groups = found.names().groups()
    values, before = schema.defaults_of(groups["network"]), base.values["network"]
    if names.NETWORKS.get(network) is names.NETWORKS.get(base.network, ()):
        values |= before
    found.values["network"] = values
    return found


def resolve(base: Base, given: Mapping[str, Mapping[str, Any]]) -> Config:
    """Return the configuration of a protocol with flags in the place of its values.

    `ways`, `shots` (times what the learner trains with) and `queries` go for training too unless `train_…`
    is given.

    Raises:
      ArgumentError: values that do not go together.
    """
    found = {group: dict(values) for group, values in base.values.items()}
    facts = base.names().facts
    training = given.get("training", {})
    if base.facts is not None:
        steps = training.get("steps", found["training"]["steps"])
        for name, value in base.facts.defaults({**base.flat, "steps": steps}).items():
            if name in found["learner"] and name not in base.explicit:
                found["learner"][name] = value
    tasks = given.get("tasks", {})
    for name in OF_TRAINING:
        if name in tasks and f"train_{name}" in found["tasks"]:
            factor = facts.train_shots if name == "shots" else 1
            found["tasks"][f"train_{name}"] = tasks[name] * factor
    for group, values in given.items():
        found[group] |= values
    config = Config(
        base.preset,
        {"name": base.learner, **found["learner"]},
        {"name": base.network, **found["network"]},
        {"name": base.tasks, **found["tasks"]},
        Training(**found["training"]),
        Run(**found["run"]),
        {name: names.file_hash(name) for name in _own(base.learner, base.network, base.tasks)},
    )
    check(config)
    return config


def _own(learner: str, network: str, tasks: str) -> list[str]:
    """Return those of three names that are `module:name` of code that is not ours."""
    own = [name for name in (learner, network) if names.is_own(name)]
    return own + ([tasks] if is_own(tasks) else [])


def on_other_tasks(config: Config, tasks: str) -> Config:
    """Return the configuration of a run with other tasks to be evaluated on, of the same shape.

    Raises:
      ArgumentError: there are none of that name, or they are of another kind.
    """
    kinds = [kind_of(source_of(name)) for name in (tasks, config.tasks["name"])]
    if kinds[0] != kinds[1]:
        raise ArgumentError("tasks", f"{tasks} is {kinds[0]}, and the run was trained for {kinds[1]}")
    base = base_of(Chosen(config.learner["name"], tasks=tasks))
    shape = [*OF_TRAINING, *(f"train_{name}" for name in OF_TRAINING)]
    kept = {name: config.tasks[name] for name in shape if name in config.tasks}
    # Images are read as the run's were, where their source can.
    kept |= {name: config.images[name] for name in ("size", "channels")} if config.images else {}
    values = base.values["tasks"] | {name: kept[name] for name in kept if name in base.values["tasks"]}
    data = dataclasses.replace(config.run, data=None)
    return dataclasses.replace(config, tasks={"name": tasks, **values}, run=data)


def check(config: Config) -> None:
    """Refuse settings that do not go together, and values that no group can check by itself.

    Raises:
      ArgumentError: there are some.
    """
    found = config.names()
    facts, kind = found.facts, kind_of(found.source)
    learner = config.learner["name"]
    if kind not in facts.kinds:
        raise ArgumentError(
            "learner",
            f"{learner} learns {' and '.join(facts.kinds)}, and {config.tasks['name']} tasks are {kind}",
        )
    network = config.network["name"]
    if facts.networks is not None and network in names.NETWORKS and network not in facts.networks:
        raise ArgumentError("network", f"got {network}; {learner} works with {', '.join(facts.networks)}")
    if facts.networks is not None and config.training.precision != "float32":
        raise ArgumentError(
            "precision", f"got {config.training.precision}; the networks of {learner} compute in float32"
        )
    if kind == "classification" and config.training.norm not in facts.rows.values():
        raise ArgumentError(
            "norm", f"got {config.training.norm}; {learner} has {', '.join(facts.rows.values())}"
        )
    if kind == "regression" and config.training.norm not in ("batch", *_CHOOSES_NONE):
        raise ArgumentError("norm", f"got {config.training.norm}; networks of regression normalise nothing")
    if config.training.diagnose and config.learner.get("order") == "first":
        raise ArgumentError(
            "diagnose", "it compares with first order, and --order is first; take another order"
        )
    if config.tasks.get("strings") is not None and config.tasks.get("sequence") is None:
        raise ArgumentError("strings", "they are labels of sequences; add --sequence T")
    if config.run.workers and not config.tasks.get("stream"):
        raise ArgumentError("workers", "processes read a stream; add --stream")
    for name in ("shots", "train_shots"):
        if config.tasks.get(name) == 0 and not facts.zero_shot:
            raise ArgumentError(name, f"got 0, and {learner} learns from support examples; at least 1")
    if config.tasks.get("train_ways") is not None:
        check_count(
            "train_ways" if config.tasks["ways"] != config.tasks["train_ways"] else "ways",
            config.tasks["train_ways"],
        )
    if facts.head and config.tasks.get("ways") != config.tasks.get("train_ways"):
        raise ArgumentError(
            "ways",
            f"got {config.tasks.get('ways')}, and {learner}'s network has one output for each of "
            f"{config.tasks.get('train_ways')} training ways; both must be equal",
        )


# --- config.json --------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Return whether a folder is one of `train`, whole or not."""
    if (folder / "checkpoints").is_dir() or not (folder / "config.json").is_file():
        return (folder / "checkpoints").is_dir()
    values = read_json(folder / "config.json")
    return isinstance(values, dict) and GROUPS[0] in values and "command" not in values


def holds_checkpoints(folder: Path) -> bool:
    """Return whether a folder is one of `jm.train`, and not of a command, which writes config.json."""
    return (folder / "checkpoints").is_dir() and not (folder / "config.json").is_file()


def load_config(folder: Path, trusted: Iterable[str] = ()) -> Config:
    """Return the configuration of the run in a folder.

    Args:
      folder: of a run.
      trusted: `module:name`s that the user named, and that may be imported: a folder that someone sent must
        not bring code to be run.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: its config.json cannot be read, is of another form, or names code that is not trusted.
    """
    path = folder / "config.json"
    if not path.is_file():
        if holds_checkpoints(folder):
            raise FileNotFoundError(
                f"{folder} holds parameters and metrics, as jm.train(run_dir=…) writes them, but no "
                "config.json, in which `jaxmeta train` keeps learner, network and tasks. In Python, "
                "jm.load_run(folder, learner=learner) loads them; on the command line, `jaxmeta evaluate "
                "FOLDER --learner NAME --tasks NAME` evaluates them, and `jaxmeta plot FOLDER` draws metrics"
            )
        raise FileNotFoundError(f"{folder} is no run: there is no {path}")
    return from_json(read_json(path), path, trusted)


def read_json(path: Path) -> Any:
    """Return what a JSON file of a run holds.

    Raises:
      ValueError: it holds no JSON.
    """
    try:
        return parsed_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def from_json(values: Any, path: Path, trusted: Iterable[str] = ()) -> Config:
    """Return the configuration that JSON holds (see `load_config`)."""
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds no configuration")
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of an older form than this version of jaxmeta reads (form {values.get('format', 1)}, "
            f"and it reads {FORMAT}); train again, or use the version that wrote it "
            f"(jaxmeta {values.get('jaxmeta', 'unknown')})"
        )
    try:
        chosen = {group: values[group]["name"] for group in ("learner", "network", "tasks")}
        hashes = dict(values["own"])
        if not all(isinstance(each, str) for pair in (*chosen.items(), *hashes.items()) for each in pair):
            raise TypeError("a name that is no text")
        # By the names alone: what the file says of itself is not to be trusted.
        own = {name: str(hashes.get(name, "")) for name in _own(**chosen)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None
    for kind, name in chosen.items():
        if name in own and name not in set(trusted):
            raise ArgumentError(
                kind,
                f"the run in {path.parent} was trained with {name}, which is code that jaxmeta does not "
                f"bring; to allow its import, name it"
                + (" as LEARNER of train, elsewhere by" if kind == "learner" else ":")
                + f" --{kind} {name}",
            )
    found = find_names(**chosen)
    for name, before in own.items():
        if name in chosen.values() and names.file_hash(name) != before:
            warnings.warn(f"{name} is no longer the code that {path.parent} was trained with", stacklevel=2)
    try:
        groups = {
            group: schema.checked(group, {k: v for k, v in values[group].items() if k != "name"}, settings)
            for group, settings in found.stored_groups().items()
        }
        config = Config(
            values["preset"],
            {"name": chosen["learner"], **groups["learner"]},
            {"name": chosen["network"], **groups["network"]},
            {"name": chosen["tasks"], **groups["tasks"]},
            Training(**groups["training"]),
            Run(**groups["run"]),
            own,
            values["split_hash"],
            values["images"],
            values["model"],
        )
        check(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or of another version of jaxmeta: {error}") from None
    return config


def _from_config(start: Config, chosen: Chosen) -> Base:
    """Return a stored configuration as a protocol."""
    values = {group: start.settings(group) for group in GROUPS}
    base = Base(start.preset, start.learner["name"], start.network["name"], start.tasks["name"], values)
    if chosen.tasks is not None and chosen.tasks != base.tasks:
        raise ArgumentError(
            "tasks", f"got {chosen.tasks}, and the configuration is for {base.tasks}; leave one of them out"
        )
    if chosen.learner is not None and chosen.learner != base.learner:
        base = _with_learner(base, chosen.learner)
    if chosen.network is not None and chosen.network != base.network:
        base = _with_network(base, chosen.network)
    return base
