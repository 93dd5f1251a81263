"""The registry: methods by name, task sources by name, and whole published protocols by name.

A new learner joins by one entry of `LEARNERS`; every command and every law then runs it.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optax

from jaxmeta import losses, nn, tasks
from jaxmeta.core import Learner, Model, TaskDistribution
from jaxmeta.optimization_based import fomaml, maml
from jaxmeta.tasks.omniglot import omniglot_split


@dataclasses.dataclass(frozen=True)
class Preset:
    """A training and its evaluation, fully spelled. None: does not apply.

    Attributes:
      description: one line.
      tasks: a name in `TASKS`.
      learner: a name in `LEARNERS`.
      ways, shots, queries: of test and validation tasks; examples per class (per task in regression).
      train_ways, train_shots, train_queries: the same of training tasks.
      protocol: class split of Omniglot; see `jaxmeta.tasks.omniglot`.
      rotations: "none", "classes" or "random"; None is the protocol's own.
      network: a name in `NETWORKS`.
      inner_lr: step size α of the inner SGD, for the MEAN loss over the support set.
      inner_steps: inner steps in training.
      eval_steps: inner steps at validation and test.
      report_steps: numbers of inner steps to report beside `eval_steps`.
      order: "second" or "first".
      outer_lr: step size of the outer Adam.
      schedule: of `outer_lr` over the run: "constant", or "cosine" (to zero).
      clip: bound on every entry of the meta-gradient; None leaves it as it is.
      steps: meta-steps.
      meta_batch: tasks per meta-step.
      strategy: over the tasks of a meta-step; see `jm.meta_step`.
      episodes: test episodes.
      validate_every: meta-steps between validations, which choose the parameters kept.
      log_every: meta-steps between looks at the loss.
    """

    description: str
    tasks: str
    learner: str = "maml"
    ways: int | None = 5
    shots: int = 1
    queries: int = 1
    train_ways: int | None = 5
    train_shots: int = 1
    train_queries: int = 1
    protocol: str | None = None
    rotations: str | None = None
    network: str = "strided-conv4"
    inner_lr: float | None = 0.4
    inner_steps: int | None = 1
    eval_steps: int | None = 3
    report_steps: tuple[int, ...] = ()
    order: str | None = "second"
    outer_lr: float = 1e-3
    schedule: str = "constant"
    clip: float | None = None
    steps: int = 60_000
    meta_batch: int = 32
    strategy: str | int = "auto"
    episodes: int = 1000
    validate_every: int = 1000
    log_every: int = 50


def _adam(settings: Preset) -> optax.GradientTransformation:
    rate = settings.outer_lr
    if settings.schedule == "cosine":
        rate = optax.cosine_decay_schedule(settings.outer_lr, settings.steps)
    adam = optax.adam(rate)
    return adam if settings.clip is None else optax.chain(optax.clip(settings.clip), adam)


def _network(settings: Preset) -> Model:
    return nn.as_model(NETWORKS[settings.network](1 if settings.train_ways is None else settings.train_ways))


NETWORKS: dict[str, Callable[[int], Any]] = {
    "strided-conv4": lambda out: nn.StridedConv4(ways=out),
    "strided-conv4-without-scale": lambda out: nn.StridedConv4(ways=out, use_scale=False),
    "conv4": lambda out: nn.Conv4(ways=out),
    "mlp": lambda out: nn.MLP(out=out),
}


@dataclasses.dataclass(frozen=True)
class LearnerSpec:
    """How the command line and the laws build a method.

    Attributes:
      factory: the public factory, such as `jm.maml`.
      family: of the method.
      description: one line.
      build: `(network, settings, norm) -> Learner`.
      takes: the fields of `Preset` that only some methods have and this one does.
      norms: `norm=` of each row that a report gives.
      fixed_ways: whether the network's output width is the number of ways.
      zero_shot: whether it can learn from class metadata alone.
      network: default network, from the settings.
      optimizer: default outer optimizer.
    """

    factory: Callable[..., Learner]
    family: str
    description: str
    build: Callable[[Model, Preset, str], Learner]
    takes: tuple[str, ...] = ()
    norms: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"transductive": "batch", "inductive": "support"}
    )
    fixed_ways: bool = True
    zero_shot: bool = False
    network: Callable[[Preset], Model] = _network
    optimizer: Callable[[Preset], optax.GradientTransformation] = _adam


def _gradient_based(factory: Callable[..., Learner]) -> Callable[[Model, Preset, str], Learner]:
    def build(network: Model, settings: Preset, norm: str) -> Learner:
        return factory(
            network,
            inner_optimizer=optax.sgd(settings.inner_lr),
            steps=settings.inner_steps,
            eval_steps=settings.eval_steps,
            norm=norm,
            loss=losses.mse if settings.ways is None else losses.cross_entropy,
            **({} if settings.order is None else {"order": settings.order}),
        )

    return build


_INNER_LOOP = ("inner_lr", "inner_steps", "eval_steps", "report_steps")

LEARNERS: dict[str, LearnerSpec] = {
    "maml": LearnerSpec(
        maml,
        "optimization-based",
        "an initialisation from which a few gradient steps suffice (Finn et al. 2017)",
        _gradient_based(maml),
        takes=(*_INNER_LOOP, "order"),
    ),
    "fomaml": LearnerSpec(
        fomaml,
        "optimization-based",
        "MAML without second derivatives (Finn et al. 2017)",
        _gradient_based(fomaml),
        takes=_INNER_LOOP,
    ),
}


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """How the command line builds a source of tasks.

    Attributes:
      description: one line.
      preset: what `train --tasks NAME` runs.
      build: `(split, settings, shape, data) -> tasks`, with `shape` the ways, shots and queries.
      takes: the fields of `Preset` that only some sources have and this one does.
      has_validation: whether these settings leave classes to validate with.
    """

    description: str
    preset: str
    build: Callable[[str, Preset, dict[str, Any], str | None], TaskDistribution]
    takes: tuple[str, ...] = ("ways", "train_ways")
    has_validation: Callable[[Preset], bool] = lambda settings: True


TASKS: dict[str, TaskSpec] = {
    "glyphs": TaskSpec(
        "procedurally drawn characters, 28x28; needs no data",
        "glyphs",
        lambda split, settings, shape, data: tasks.glyphs(split, **shape),
    ),
    "omniglot": TaskSpec(
        "handwritten characters of 50 alphabets, 28x28; --data DIR with the official archives, or a download",
        "omniglot",
        lambda split, settings, shape, data: tasks.omniglot(
            split, **shape, data=data, protocol=str(settings.protocol), rotations=settings.rotations
        ),
        takes=("ways", "train_ways", "protocol", "rotations", "data"),
        has_validation=lambda settings: omniglot_split(str(settings.protocol)).sizes[1] > 0,
    ),
    "sinusoid": TaskSpec(
        "regression of sine waves of random amplitude and phase; needs no data",
        "sinusoid",
        lambda split, settings, shape, data: tasks.sinusoid(split, **shape),
        takes=(),
    ),
    "harmonic": TaskSpec(
        "regression of sums of two sine waves; needs no data",
        "harmonic",
        lambda split, settings, shape, data: tasks.harmonic(split, **shape),
        takes=(),
    ),
}


def _official_omniglot(ways: int, shots: int, learner: str = "maml") -> Preset:
    # The official code sums the mean losses of the N classes where we take one mean: α_ours = N·α.
    inner: dict[str, Any] = (
        {"inner_lr": 5 * 0.4, "inner_steps": 1, "eval_steps": 3, "meta_batch": 32}
        if ways == 5
        else {"inner_lr": 20 * 0.1, "inner_steps": 5, "eval_steps": 5, "meta_batch": 16}
    )
    return Preset(
        f"Finn et al. 2017: Omniglot, {ways}-way {shots}-shot, 60,000 meta-steps",
        "omniglot",
        learner,
        ways=ways,
        shots=shots,
        queries=shots,
        train_ways=ways,
        train_shots=shots,
        train_queries=shots,
        protocol="maml",
        network="strided-conv4-without-scale",
        **inner,
    )


_REGRESSION: dict[str, Any] = {
    "ways": None,
    "shots": 5,
    "queries": 100,
    "train_ways": None,
    "train_shots": 10,
    "train_queries": 10,
    "network": "mlp",
    "inner_lr": 0.002,
    "eval_steps": 1,
    "report_steps": (1, 5, 10),
    "outer_lr": 3e-3,
    "schedule": "cosine",
    "steps": 120_000,
    "meta_batch": 50,
    "strategy": "vmap",
    "episodes": 600,
    "validate_every": 5000,
    "log_every": 500,
}

PRESETS: dict[str, Preset] = {
    "glyphs": Preset(
        "MAML on drawn characters in minutes on a laptop; what `jaxmeta train` runs",
        "glyphs",
        queries=5,
        train_queries=3,
        outer_lr=3e-3,
        schedule="cosine",
        steps=2000,
        meta_batch=8,
        validate_every=500,
        log_every=25,
    ),
    "omniglot": Preset(
        "MAML on Omniglot, 5-way 1-shot, in minutes on a laptop",
        "omniglot",
        train_queries=3,
        protocol="vinyals",
        # Half the tasks of the paper's meta-step and three times its rate: at a laptop's budget
        # more and larger steps are worth more than steadier ones.
        outer_lr=3e-3,
        schedule="cosine",
        steps=6000,
        meta_batch=16,
    ),
    "maml-omniglot-5way-1shot": _official_omniglot(5, 1),
    "maml-omniglot-5way-5shot": _official_omniglot(5, 5),
    "maml-omniglot-20way-1shot": _official_omniglot(20, 1),
    "maml-omniglot-20way-5shot": _official_omniglot(20, 5),
    # The paper's α = 0.01 (its code's default is 0.001) lets a few test tasks of 5 points diverge
    # within 10 steps, and their error is then the mean. A fifth of it does not, and adapts as well.
    "sinusoid": Preset(
        "MAML on sine waves, trained with 10 points, tested with 5 (Finn et al. 2017, section 5.1)",
        "sinusoid",
        **_REGRESSION,
    ),
    "harmonic": Preset(
        "MAML on sums of two sine waves, trained and tested with 10 points",
        "harmonic",
        **(_REGRESSION | {"shots": 10}),
    ),
}

_FIELDS = tuple(field.name for field in dataclasses.fields(Preset) if field.name != "description")
_METHOD_FIELDS = ("inner_lr", "inner_steps", "eval_steps", "report_steps", "order")
_SOURCE_FIELDS = ("ways", "train_ways", "protocol", "rotations", "data")


def lookup(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """`table[name]`, or a ValueError that lists what there is, the closest first."""
    if name in table:
        return table[name]
    raise ValueError(f"{kind}: there is no {name!r}; {known(name, table)}")


def known(name: str, names: Iterable[str]) -> str:
    """ "known are …", those most like `name` first."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return "known are " + ", ".join([*close, *(other for other in names if other not in close)])


def settings_of(
    flags: Mapping[str, Any], *, learner: str | None = None, preset: str | None = None
) -> tuple[str, Preset]:
    """A preset's name and its settings with `flags` (fields of `Preset`, and "data") in their place.

    `ways`, `shots` and `queries` go for training too unless `train_…` is given.

    Raises:
      ValueError: an unknown name; a flag that the learner or the tasks have no use for, or a value
        they cannot work with.
    """
    if preset is None:
        preset = lookup("--tasks", flags.get("tasks", "glyphs"), TASKS).preset
    base = lookup("--preset", preset, PRESETS)
    if flags.get("tasks", base.tasks) != base.tasks:
        raise ValueError(
            f"--tasks: got {flags['tasks']}, but preset {preset} is for {base.tasks}; leave one out"
        )
    name = learner or base.learner
    spec = lookup("LEARNER", name, LEARNERS)
    unused = {
        field: () if field == "report_steps" else None for field in _METHOD_FIELDS if field not in spec.takes
    }
    training = {f"train_{field}": flags[field] for field in ("ways", "shots", "queries") if field in flags}
    return preset, revised(dataclasses.replace(base, **unused, learner=name), {**training, **flags})


def revised(settings: Preset, flags: Mapping[str, Any]) -> Preset:
    """`settings` with `flags` in their place, checked.

    Raises:
      ValueError: a flag that the learner or the tasks have no use for, or a value they cannot work with.
    """
    spec, source = LEARNERS[settings.learner], TASKS[settings.tasks]
    for fields, owner, takes in (
        (_METHOD_FIELDS, settings.learner, spec.takes),
        (_SOURCE_FIELDS, settings.tasks, source.takes),
    ):
        for field in fields:
            if field in flags and field not in takes:
                raise ValueError(f"{flag_of(field)}: {owner} has no such setting")
    settings = dataclasses.replace(settings, **{key: flags[key] for key in flags if key in _FIELDS})
    _check(settings, spec)
    return settings


def _check(settings: Preset, spec: LearnerSpec) -> None:
    for field, least in (
        ("steps", 1),
        ("meta_batch", 1),
        ("episodes", 2),
        ("validate_every", 1),
        ("inner_steps", 0),
        ("eval_steps", 0),
        ("inner_lr", 0),
        ("outer_lr", 0),
        ("clip", 0),
    ):
        value = getattr(settings, field)
        # Written so that NaN fails.
        if value is not None and not value >= least:
            raise ValueError(f"{flag_of(field)}: got {value}; it must be at least {least}")
    for field in ("shots", "train_shots"):
        if getattr(settings, field) == 0 and not spec.zero_shot:
            raise ValueError(
                f"{flag_of(field)}: got 0, and {settings.learner} learns from support examples; at least 1"
            )
    if spec.fixed_ways and settings.ways != settings.train_ways:
        raise ValueError(
            f"{flag_of('ways')}: got {settings.ways}, and {settings.learner}'s network has one output for "
            f"each of {settings.train_ways} training ways; both must be equal"
        )


def tasks_of(settings: Preset, split: str, data: str | None = None) -> TaskDistribution:
    """The tasks of a part: the training protocol for "train", else the test protocol."""
    prefix = "train_" if split == "train" else ""
    shape = {field: getattr(settings, prefix + field) for field in ("ways", "shots", "queries")}
    if shape["ways"] is None:
        del shape["ways"]
    return TASKS[settings.tasks].build(split, settings, shape, data)


def validation_tasks_of(settings: Preset, data: str | None = None) -> TaskDistribution | None:
    """Tasks to choose parameters by; None where the class split has no validation part."""
    return tasks_of(settings, "validation", data) if TASKS[settings.tasks].has_validation(settings) else None


def learner_of(settings: Preset, norm: str = "batch") -> Learner:
    """The learner with its default network; every `norm` shares one set of parameters."""
    spec = LEARNERS[settings.learner]
    return spec.build(spec.network(settings), settings, norm)


def optimizer_of(settings: Preset) -> optax.GradientTransformation:
    """The outer optimizer."""
    return LEARNERS[settings.learner].optimizer(settings)


def flag_of(field: str) -> str:
    """What the command line calls a setting."""
    return "--" + field.replace("_", "-")
