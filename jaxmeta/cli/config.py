"""The configuration of a run: five groups of settings, from flags, from a protocol, and as config.json.

`learner`, `network` and `tasks` hold a name and the settings of the function with this name, whose signature
is the schema; `training` and `run` are dataclasses. A named protocol (a preset) gives values to some of them.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from jaxmeta.checks import (
    LARGEST_SEED,
    ArgumentError,
    check_count,
    check_number,
    format_value,
    parsed_json,
)
from jaxmeta.cli import names, schema
from jaxmeta.cli.presets import PRESETS
from jaxmeta.cli.schema import Setting
from jaxmeta.cli.sources import Sequences, Source, Streaming, is_own, key_of, source_of
from jaxmeta.declare import Facts, facts_of, parent_of
from jaxmeta.transfer.inputs import Method

# Format of config.json, increased whenever a setting is added or removed; files of 0.1 have none.
FORMAT = 4
GROUPS = ("learner", "network", "tasks", "training", "run")
# Arguments that a run supplies to factories; they are not settings.
SUPPLIED_TO_LEARNER = ("norm", "loss", "augment", "strings")
SUPPLIED_TO_NETWORK = ("ways", "out")
SUPPLIED_TO_TASKS = ("split", "data")
# Settings of tasks for which training may have another value, such as `train_ways` for `ways`.
TASK_SHAPE = ("ways", "shots", "queries")
# Settings that a method may have defaults for although not every run has them.
_OPTIONAL = ("network", "distort", "report_steps", "train_ways", "train_shots", "train_queries")
# Choices of --norm for a method whose batch statistics cannot be chosen.
_NO_NORM = ("none",)
# Descriptions of the choices of --norm for its help, which lists those of the method only.
_NORMS = {
    "none": "no normalisation (none)",
    "batch": "of the batch itself (batch)",
    "support": "of the support set, as in `jaxmeta predict` (support)",
    "population": "of the training tasks as a population (population)",
    "episode": "of the episode's inner steps (episode)",
}
# Groups in the order in which they are searched for a setting that a protocol or a method names.
_ORDER = ("training", "run", "tasks", "learner", "network")


@dataclasses.dataclass(frozen=True)
class Training:
    """Settings of meta-training.

    Attributes:
      steps: meta-steps.
      meta_batch: tasks per meta-step.
      outer_lr: step size of the outer optimizer.
      outer_optimizer: optimizer of the meta-parameters. adam adds weight decay to the gradient, adamw
        decouples it.
      schedule: schedule of --outer-lr over the run: cosine and linear fall to zero, step multiplies it by
        --decay-factor every --decay-every meta-steps.
      norm: statistics of batch normalisation in training; `Names.groups` describes the choices of a method.
      validate_every: meta-steps between validations and between checkpoints.
      clip: largest absolute value of an entry of the meta-gradient.
      clip_norm: largest global norm of the meta-gradient.
      distort: whether to rotate, shear, scale and shift training images at random.
      precision: type that the network computes in. Parameters and gradients stay in float32.
      input_size: side in pixels to which images are resized before the network; by default their own, or that
        of the weights that --init names.
      input_channels: number of channels that images are converted to before the network, 1 or 3; by default
        their own.
      input_mean: mean that is subtracted from pixels in [0, 1] before the network, for each channel or for
        all.
      input_std: standard deviation that pixels are divided by after that.
      input_method: interpolation to --input-size.
      train: patterns of the network's parameters to train, such as head or stage3_**; by default all. The
        others keep their initial values; parameters outside the network are always trained.
      lora: rank of low-rank factors that are added to the network's kernels; with it, --train is lora unless
        given, so that only the factors are trained.
      decay_every: meta-steps between decays of --schedule step.
      decay_factor: factor of --outer-lr at each decay of --schedule step.
      weight_decay: weight of the parameters in the gradient, or in the update of adamw.
      outer_momentum: momentum of sgd and rmsprop.
      outer_betas: decay rates of Adam's moments.
      outer_eps: ε of adam, adamw and rmsprop.
      diagnose: whether to report the cosine and the ratio of norms between the meta-gradient and its
        first-order approximation.
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
    input_size: int | None = None
    input_channels: Literal[1, 3] | None = None
    input_mean: tuple[float, ...] = (0.0,)
    input_std: tuple[float, ...] = (1.0,)
    input_method: Method = "linear"
    train: tuple[str, ...] | None = None
    lora: int | None = None
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
        for name in ("input_size", "lora"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for beta in self.outer_betas:
            check_number("outer_betas", beta, 0)
            if beta >= 1:
                raise ArgumentError("outer_betas", f"got {beta}; both must be below 1")
        if self.schedule == "step" and self.decay_every is None:
            raise ArgumentError(
                "decay_every", "is missing; --schedule step needs a number of meta-steps between decays"
            )
        if self.decay_every is not None:
            check_count("decay_every", self.decay_every)
            if self.schedule != "step":
                raise ArgumentError(
                    "decay_every",
                    f"got {self.decay_every}, but --schedule is {self.schedule}; choose step or leave it out",
                )


# Settings of `Training` that convert images before the network, with their defaults.
INPUT = {
    field.name: field.default for field in dataclasses.fields(Training) if field.name.startswith("input_")
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings of a run's start, data, devices and outputs.

    The trained parameters depend on seed and init, on the content of data, and on non_finite where a loss is
    not finite. The other settings do not change them, up to the order of float32 sums.

    Attributes:
      seed: seed of the initial parameters and of all episodes.
      data: folder with the data set's files; by default the cache, or a download.
      init: source of the initial parameters, a folder of `train` or `transfer`, or weights; by default they
        are random.
      episodes: number of test tasks.
      report_steps: numbers of inner steps to report in addition to --eval-steps.
      strategy: order in which a device computes its tasks: all at once (vmap), one by one (scan), a number at
        once, or auto.
      devices: number of devices (on a CPU, cores) that share the tasks; by default as many as share them
        evenly.
      mesh: axes of the devices, such as tasks=8, or tasks=4,params=2 to shard parameters as well.
      workers: number of processes that read a stream; 0 reads in threads.
      non_finite: response to a meta-step whose loss is not finite: stop the run, or skip the step.
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
    """Objects that the names in a configuration refer to.

    Attributes:
      learner: factory of the learner.
      network: factory of the network.
      source: source of tasks.
    """

    learner: Callable[..., Any]
    network: Callable[..., Any]
    source: Source

    @property
    def facts(self) -> Facts:
        """Return the facts about the learner's method."""
        return facts_of(self.learner)

    def groups(self) -> dict[str, dict[str, Setting]]:
        """Return the settings of each group that have a flag in a run of these objects, by name."""
        groups = self.stored_groups()
        if not schema.accepts(self.learner, "augment"):
            del groups["training"]["distort"]
        if not _has_first_order(self.learner):
            del groups["training"]["diagnose"]
        classification = kind_of(self.source) == "classification"
        if classification or not schema.accepts(self.learner, "eval_steps"):
            del groups["run"]["report_steps"]
        for name in () if classification else INPUT:
            del groups["training"][name]
        norms = tuple(dict.fromkeys(self.facts.rows.values()))
        if not classification and norms != _NO_NORM:
            norms = ("batch",)
        choices = ", or ".join(_NORMS.get(norm, norm) for norm in norms)
        groups["training"]["norm"] = groups["training"]["norm"]._replace(
            hint=Literal[norms], about=f"statistics of batch normalisation in training: {choices}"
        )
        if self.source.images is None:
            del groups["run"]["workers"]
        if not schema.accepts(self.source.function, "data"):
            del groups["run"]["data"]
        return groups

    def stored_groups(self) -> dict[str, dict[str, Setting]]:
        """Return the settings of each group in config.json, by name."""
        tasks = schema.settings_of(self.source.function, SUPPLIED_TO_TASKS)
        if schema.accepts(self.learner, "strings"):
            tasks |= schema.settings_of(Sequences)
        if self.source.images is not None:
            tasks |= schema.settings_of(Streaming)
        for name in TASK_SHAPE:
            if name in tasks:
                # All tasks of a run have one shape, whatever the source could draw.
                tasks[name] = tasks[name]._replace(hint=int)
                about = f"--{name} of training tasks; follows --{name} unless given."
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


def _has_first_order(learner: Callable[..., Any]) -> bool:
    """Return whether a method has a first-order version, for --diagnose to compare with."""
    order = schema.settings_of(learner, SUPPLIED_TO_LEARNER).get("order")
    return order is not None and "first" in getattr(order.hint, "__args__", ())


@dataclasses.dataclass(frozen=True)
class Config:
    """A resolved configuration.

    Attributes:
      preset: name of the protocol it started from; None for user-defined tasks.
      learner, network, tasks: `name` and settings of each.
      training, run: the other groups.
      own: SHA-256 of the file of each `module:name`.
      split_hash: hash of the class split, once the data are read.
      images: fields of the data's `ImageSpec`, once the data are read; None for data other than images.
      model: description of the network for `jm.transfer.load_pretrained`; None where it has none.
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
        """Return the settings of a group, without its name."""
        settings = getattr(self, group)
        if isinstance(settings, Training | Run):
            return dataclasses.asdict(settings)
        return {name: value for name, value in settings.items() if name != "name"}

    def replaced(self, **groups: Mapping[str, Any]) -> "Config":
        """Return the configuration with some settings of its groups replaced."""
        replaced: dict[str, Any] = {}
        for group, values in groups.items():
            now = getattr(self, group)
            is_dataclass = isinstance(now, Training | Run)
            replaced[group] = dataclasses.replace(now, **values) if is_dataclass else {**now, **values}
        return dataclasses.replace(self, **replaced)

    def to_json(self) -> dict[str, Any]:
        """Return the content of config.json."""
        values = {"jaxmeta": version("jaxmeta"), "format": FORMAT, **dataclasses.asdict(self)}
        return json.loads(json.dumps(values))


def find_names(learner: str, network: str, tasks: str) -> Names:
    """Return the objects that three names refer to."""
    return Names(
        names.find("learner", learner, names.LEARNERS),
        names.find("network", network, names.NETWORKS),
        source_of(tasks),
    )


# --- From a protocol and flags ----------------------------------------------------------------------------


class Chosen(NamedTuple):
    """Names in a command line, None where it has none; and a configuration to start from."""

    learner: str | None = None
    network: str | None = None
    tasks: str | None = None
    preset: str | None = None
    start: Config | None = None


class Base(NamedTuple):
    """A protocol with another learner, tasks or network in it, before flags.

    Attributes:
      preset: name of the protocol; None for user-defined tasks.
      learner, network, tasks: names.
      values: values of settings, by group and name.
      facts: facts of a learner other than the protocol's own, whose defaults may depend on the number of
        meta-steps; None for the protocol's own.
      flat: settings by bare name, the argument of `facts.defaults`.
      explicit: settings that the protocol sets for that learner, which its defaults do not replace.
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
      ArgumentError: a name is unknown, the protocol is for other tasks, or the learner does not learn
        tasks of this kind.
    """
    if chosen.start is not None:
        return _from_config(chosen.start, chosen)
    tasks = chosen.tasks
    preset = (
        chosen.preset if chosen.preset is not None else source_of("glyphs" if tasks is None else tasks).preset
    )
    names.lookup("preset", preset, PRESETS)
    if tasks is not None and chosen.preset is not None:
        preset_tasks = _tasks_of_preset(preset)
        if key_of(tasks) != key_of(preset_tasks):
            raise ArgumentError(
                "tasks", f"got {tasks}, but preset {preset} is for {preset_tasks}; leave one of them out"
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
    """Return a preset, with the path of `tasks` in place of its placeholder."""
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
    groups = find_names(learner, network, tasks or source).groups()
    values = {group: schema.defaults_of(groups[group]) for group in GROUPS}
    base = Base(None if is_own(tasks or source) else preset, learner, network, tasks or source, values)
    for name, value in spec.items():
        _assign(base, name, value)
    _fill_training_shape(base, spec)
    return base


def _fill_training_shape(base: Base, spec: Mapping[str, Any]) -> None:
    """Set the shape of training tasks to that of test tasks where a protocol does not set it."""
    for name in TASK_SHAPE:
        if name in base.values["tasks"] and f"train_{name}" not in spec:
            factor = base.names().facts.train_shots if name == "shots" else 1
            base.values["tasks"][f"train_{name}"] = base.values["tasks"][name] * factor


def _assign(base: Base, name: str, value: Any) -> None:
    """Set a value in the group named before the dot, or in the first group of `_ORDER` with this setting."""
    groups = base.names().groups()
    group, dot, setting = name.partition(".")
    if dot:
        base.values[group][setting] = value
        return
    # User-defined tasks start from another source's protocol; only the shape of its tasks applies to them.
    user_defined = is_own(base.tasks)
    for group in _ORDER:
        if user_defined and group == "tasks" and name.removeprefix("train_") not in TASK_SHAPE:
            continue
        if name in groups[group]:
            base.values[group][name] = value
            return
    if not user_defined:
        raise ArgumentError(name, f"a run of {base.learner} on {base.tasks} does not have this setting")


def _flat(base: Base) -> dict[str, Any]:
    """Return the settings of a protocol by their bare names, for a method's own defaults."""
    settings: dict[str, Any] = {}
    for group in reversed(_ORDER):
        settings |= base.values[group]
    facts = base.names().facts
    return {
        **settings,
        "learner": base.learner,
        "network": base.network,
        "tasks": base.tasks,
        "kind": kind_of(base.names().source),
        "made_for_embeddings": not facts.head,
        "ways": base.values["tasks"].get("ways"),
    }


def kind_of(source: Source) -> str:
    """Return the kind of a source's tasks: "classification" where they have ways, else "regression"."""
    return (
        "classification" if "ways" in schema.settings_of(source.function, SUPPLIED_TO_TASKS) else "regression"
    )


def _with_learner(base: Base, learner: str) -> Base:
    """Return the protocol with another learner, its settings in place of the old learner's."""
    factory = names.find("learner", learner, names.LEARNERS)
    facts, kind = facts_of(factory), kind_of(base.names().source)
    if kind not in facts.kinds:
        raise ArgumentError(
            "learner", f"{learner} learns {' and '.join(facts.kinds)}, but {base.tasks} tasks are {kind}"
        )
    flat, before = _flat(base), base.names()
    defaults = facts.defaults(flat)
    network = defaults.get("network", base.network)
    changed = base._replace(learner=learner, network=network, facts=facts, flat=flat, values={})
    groups = changed.names().groups()
    for group in ("tasks", "training", "run", "network"):
        kept = {} if group == "network" and network != base.network else base.values[group]
        values = schema.defaults_of(groups[group])
        changed.values[group] = values | {name: kept[name] for name in kept if name in groups[group]}
    values = schema.defaults_of(groups["learner"])
    if _forwards_to(factory, before.learner):
        theirs = base.values["learner"]
        values |= {name: theirs[name] for name in theirs if name in groups["learner"]}
    changed.values["learner"] = values
    if facts.outer != before.facts.outer:
        changed.values["training"]["outer_optimizer"] = facts.outer
    if "train_shots" in changed.values["tasks"]:
        shots = base.values["tasks"]["train_shots"] * facts.train_shots // before.facts.train_shots
        changed.values["tasks"]["train_shots"] = shots
    if changed.values["training"]["norm"] not in facts.rows.values():
        changed.values["training"]["norm"] = next(iter(facts.rows.values()))
    for name, value in defaults.items():
        if any(name in groups[group] for group in GROUPS):
            _assign(changed, name, value)
        elif name not in _OPTIONAL:
            raise ArgumentError("training", f"got {name!r}; a run of {learner} does not have this setting")
    return changed


def _forwards_to(factory: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Return whether two factories forward to the same factory, or one to the other."""

    def root(each: Callable[..., Any]) -> Callable[..., Any]:
        parent = parent_of(each)
        return each if parent is None else root(parent)

    return root(factory) is root(other)


def _with_network(base: Base, network: str) -> Base:
    changed = base._replace(network=network, values={**base.values})
    groups = changed.names().groups()
    values, before = schema.defaults_of(groups["network"]), base.values["network"]
    if names.NETWORKS.get(network) is names.NETWORKS.get(base.network, ()):
        values |= before
    changed.values["network"] = values
    return changed


def resolve(base: Base, overrides: Mapping[str, Mapping[str, Any]]) -> Config:
    """Return the configuration of a protocol with flags in place of its values.

    `ways`, `shots` (times the learner's `train_shots`) and `queries` apply to training as well unless
    `train_…` is given.

    Args:
      base: protocol.
      overrides: values of flags, by group and name.

    Returns:
      The configuration.

    Raises:
      ArgumentError: values are invalid, or incompatible.
    """
    resolved = {group: dict(values) for group, values in base.values.items()}
    facts = base.names().facts
    training = overrides.get("training", {})
    if base.facts is not None:
        steps = training.get("steps", resolved["training"]["steps"])
        for name, value in base.facts.defaults({**base.flat, "steps": steps}).items():
            if name in resolved["learner"] and name not in base.explicit:
                resolved["learner"][name] = value
    tasks = overrides.get("tasks", {})
    for name in TASK_SHAPE:
        if name in tasks and f"train_{name}" in resolved["tasks"]:
            factor = facts.train_shots if name == "shots" else 1
            resolved["tasks"][f"train_{name}"] = tasks[name] * factor
    for group, values in overrides.items():
        resolved[group] |= values
    config = Config(
        base.preset,
        {"name": base.learner, **resolved["learner"]},
        {"name": base.network, **resolved["network"]},
        {"name": base.tasks, **resolved["tasks"]},
        Training(**resolved["training"]),
        Run(**resolved["run"]),
        {name: names.file_hash(name) for name in _own(base.learner, base.network, base.tasks)},
    )
    check(config)
    return config


def _own(learner: str, network: str, tasks: str) -> list[str]:
    """Return the names that are `module:name` of user-defined code."""
    own = [name for name in (learner, network) if names.is_own(name)]
    return own + ([tasks] if is_own(tasks) else [])


def on_other_tasks(config: Config, tasks: str) -> Config:
    """Return the configuration of a run with other test tasks, of the same shape.

    Raises:
      ArgumentError: no tasks have this name, or they are of another kind.
    """
    kinds = [kind_of(source_of(name)) for name in (tasks, config.tasks["name"])]
    if kinds[0] != kinds[1]:
        raise ArgumentError(
            "tasks",
            f"{tasks} is {kinds[0]}, but the run was trained for {kinds[1]}; choose tasks of that kind",
        )
    base = base_of(Chosen(config.learner["name"], tasks=tasks))
    shape = [*TASK_SHAPE, *(f"train_{name}" for name in TASK_SHAPE)]
    kept = {name: config.tasks[name] for name in shape if name in config.tasks}
    # Images get the size and channels of the run's, where their source has these settings.
    kept |= {name: config.images[name] for name in ("size", "channels")} if config.images else {}
    values = base.values["tasks"] | {name: kept[name] for name in kept if name in base.values["tasks"]}
    data = dataclasses.replace(config.run, data=None)
    return dataclasses.replace(config, tasks={"name": tasks, **values}, run=data)


def check(config: Config) -> None:
    """Check the settings that depend on other groups.

    Raises:
      ArgumentError: settings are incompatible.
    """
    objects = config.names()
    facts, kind = objects.facts, kind_of(objects.source)
    learner = config.learner["name"]
    if kind not in facts.kinds:
        raise ArgumentError(
            "learner",
            f"{learner} learns {' and '.join(facts.kinds)}, but {config.tasks['name']} tasks are {kind}",
        )
    network = config.network["name"]
    if facts.networks is not None and network in names.NETWORKS and network not in facts.networks:
        raise ArgumentError("network", f"got {network}; {learner} works with {', '.join(facts.networks)}")
    if facts.networks is not None and config.training.precision != "float32":
        raise ArgumentError(
            "precision", f"got {config.training.precision}; the networks of {learner} compute in float32"
        )
    if facts.networks is not None or not names.takes_network(objects.learner):
        for name in (*INPUT, "train", "lora"):
            if getattr(config.training, name) != INPUT.get(name):
                raise ArgumentError(
                    name,
                    f"got {format_value(getattr(config.training, name))}, but {learner} builds its own "
                    "network; leave it out",
                )
    if kind == "classification" and config.training.norm not in facts.rows.values():
        raise ArgumentError(
            "norm", f"got {config.training.norm}; {learner} has {', '.join(facts.rows.values())}"
        )
    if kind == "regression" and config.training.norm not in ("batch", *_NO_NORM):
        raise ArgumentError(
            "norm",
            f"got {config.training.norm}, but networks for regression have no normalisation; leave it out",
        )
    if config.training.diagnose and config.learner.get("order") == "first":
        raise ArgumentError(
            "diagnose",
            "compares with the first-order meta-gradient, but --order is first already; choose another order",
        )
    if config.tasks.get("strings") is not None and config.tasks.get("sequence") is None:
        raise ArgumentError("strings", "needs tasks as sequences; add --sequence T")
    if config.run.workers and not config.tasks.get("stream"):
        raise ArgumentError("workers", "only a stream is read by processes; add --stream")
    for name in ("shots", "train_shots"):
        if config.tasks.get(name) == 0 and not facts.zero_shot:
            raise ArgumentError(
                name, f"got 0, but {learner} learns from support examples; it must be at least 1"
            )
    if config.tasks.get("train_ways") is not None:
        check_count(
            "train_ways" if config.tasks["ways"] != config.tasks["train_ways"] else "ways",
            config.tasks["train_ways"],
        )
    if facts.head and config.tasks.get("ways") != config.tasks.get("train_ways"):
        raise ArgumentError(
            "ways",
            f"got {config.tasks.get('ways')}, but {learner}'s network has one output for each of the "
            f"{config.tasks.get('train_ways')} training ways; both must be equal",
        )


# --- config.json --------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run of `jaxmeta train` or of `jm.train`, finished or not."""
    if (folder / "checkpoints").is_dir():
        return True
    if not (folder / "config.json").is_file():
        return False
    values = read_json(folder / "config.json")
    return isinstance(values, dict) and GROUPS[0] in values and "command" not in values


def holds_checkpoints(folder: Path) -> bool:
    """Return whether a folder is one of `jm.train`, and not of a command, which writes config.json."""
    return (folder / "checkpoints").is_dir() and not (folder / "config.json").is_file()


def load_config(folder: Path, trusted: Iterable[str] = ()) -> Config:
    """Return the configuration of the run in a folder.

    Args:
      folder: folder of a run.
      trusted: each `module:name` that the user has named, whose code may be imported. A folder from someone
        else must not run code by itself.

    Returns:
      The configuration.

    Raises:
      FileNotFoundError: the folder has no config.json.
      ValueError: config.json cannot be read, has another format, or names code that is not trusted.
    """
    path = folder / "config.json"
    if not path.is_file():
        if holds_checkpoints(folder):
            raise FileNotFoundError(
                f"{folder} holds parameters and metrics, as jm.train(run_dir=…) writes them, but no "
                "config.json, in which `jaxmeta train` stores learner, network and tasks. In Python, "
                "jm.load_run(folder, learner=learner) loads them; on the command line, `jaxmeta evaluate "
                "FOLDER --learner NAME --tasks NAME` evaluates them, and `jaxmeta plot FOLDER` draws metrics"
            )
        raise FileNotFoundError(f"{folder} is not a run folder: {path} does not exist")
    return from_json(read_json(path), path, trusted)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of a run.

    Raises:
      ValueError: the file is not valid JSON.
    """
    try:
        return parsed_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def from_json(values: Any, path: Path, trusted: Iterable[str] = ()) -> Config:
    """Return the configuration in parsed JSON (see `load_config`)."""
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it must be an object of settings")
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {values.get('format', 1)}, but this version of jaxmeta reads "
            f"format {FORMAT}; train again, or use the version that wrote it "
            f"(jaxmeta {values.get('jaxmeta', 'unknown')})"
        )
    try:
        chosen = {group: values[group]["name"] for group in ("learner", "network", "tasks")}
        hashes = dict(values["own"])
        if not all(isinstance(each, str) for pair in (*chosen.items(), *hashes.items()) for each in pair):
            raise TypeError("names must be text")
        # The names alone decide which code is user-defined: the list in the file is not trusted.
        own = {name: str(hashes.get(name, "")) for name in _own(**chosen)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None
    for kind, name in chosen.items():
        if name in own and name not in set(trusted):
            raise ArgumentError(
                kind,
                f"the run in {path.parent} was trained with {name}, which is code outside of jaxmeta; to "
                f"allow its import, name it with --{kind} {name}"
                + (", or as LEARNER of train" if kind == "learner" else ""),
            )
    objects = find_names(**chosen)
    for name, before in own.items():
        if name in chosen.values() and names.file_hash(name) != before:
            warnings.warn(f"the code of {name} has changed since {path.parent} was trained", stacklevel=2)
    try:
        groups = {
            group: schema.checked(group, {k: v for k, v in values[group].items() if k != "name"}, settings)
            for group, settings in objects.stored_groups().items()
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
        raise ValueError(
            f"{path} is damaged, or was written by another version of jaxmeta: {error}"
        ) from None
    return config


def _from_config(start: Config, chosen: Chosen) -> Base:
    """Return a stored configuration as a protocol."""
    values = {group: start.settings(group) for group in GROUPS}
    base = Base(start.preset, start.learner["name"], start.network["name"], start.tasks["name"], values)
    if chosen.tasks is not None and chosen.tasks != base.tasks:
        raise ArgumentError(
            "tasks", f"got {chosen.tasks}, but the configuration is for {base.tasks}; leave one of them out"
        )
    if chosen.learner is not None and chosen.learner != base.learner:
        base = _with_learner(base, chosen.learner)
    if chosen.network is not None and chosen.network != base.network:
        base = _with_network(base, chosen.network)
    return base
