"""The registry: methods and networks by name; `sources.py` has the task sources.

A new learner joins by one entry of `LEARNERS`; every command and every law then runs it.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optax

from jaxmeta import losses, nn
from jaxmeta.core import Learner, Model
from jaxmeta.optimization_based import (
    anil,
    boil,
    fomaml,
    imaml,
    learned_optimizer,
    lstm_meta_learner,
    maml,
    maml_plus_plus,
    meta_sgd,
    reptile,
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A training and its evaluation, fully spelled. None: does not apply.

    Attributes:
      description: one line.
      tasks: a name in `TASKS`; a folder's path or a data set's name stands after its colon.
      learner: a name in `LEARNERS`.
      ways, shots, queries: of test and validation tasks; examples per class (per task in regression).
      train_ways, train_shots, train_queries: the same of training tasks.
      protocol: class split of Omniglot; see `jaxmeta.tasks.omniglot`.
      rotations: "none", "classes" or "random"; None is the protocol's own.
      image_size: side of one's own images in pixels; None is the source's default.
      channels: 1 or 3; None is by the files.
      label: feature of a tensorflow-datasets set that names the class; None for the obvious one.
      tfds_splits: of such a set, to pool, with commas between; None for all.
      classes: class split of one's own images: "0.64,0.16,0.2", or the path of a JSON file.
      split_seed: of a class split by fractions.
      stream: whether examples come from disk, step by step, in place of the device's memory.
      workers: processes that read a stream; 0 reads in threads.
      skip_unreadable: leave out images that cannot be read.
      network: a name in `NETWORKS`.
      norm: whose statistics normalise the queries in training; see `jm.maml`.
      inner_lr: step size α of the inner optimizer, for the MEAN loss over the support set; the initial one
        where it is learned.
      inner_steps: inner steps in training.
      eval_steps: inner steps at validation and test.
      report_steps: numbers of inner steps to report beside `eval_steps`.
      inner_batch: support examples in each inner step; None for all.
      order: "second", "first" or "implicit".
      memory: of the meta-gradient; see `jm.inner_loop`.
      truncation: inner steps between cuts of the meta-gradient.
      proximal: weight λ of the proximal term.
      cg_steps: of conjugate gradients, under "implicit".
      damping: of the same.
      anneal: part of the meta-steps in which MAML++'s loss moves to the last inner step.
      first_order: part of the meta-steps in which MAML++ is of first order.
      diagnose: whether to report cosine and ratio of norms between the meta-gradient and the first-order one.
      outer_lr: step size of the outer optimizer.
      schedule: of `outer_lr` over the run: "constant", "cosine" or "linear" (to zero).
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
    image_size: int | None = None
    channels: int | None = None
    label: str | None = None
    tfds_splits: str | None = None
    classes: str | None = None
    split_seed: int = 0
    stream: bool = False
    workers: int = 0
    skip_unreadable: bool = False
    network: str = "strided-conv4"
    norm: str = "batch"
    inner_lr: float | None = 0.4
    inner_steps: int | None = 1
    eval_steps: int | None = 3
    report_steps: tuple[int, ...] = ()
    inner_batch: int | None = None
    order: str | None = "second"
    memory: str | None = "auto"
    truncation: int | None = None
    proximal: float | None = None
    cg_steps: int | None = None
    damping: float | None = None
    anneal: float | None = None
    first_order: float | None = None
    diagnose: bool | None = False
    outer_lr: float = 1e-3
    schedule: str = "constant"
    clip: float | None = None
    steps: int = 60_000
    meta_batch: int = 32
    strategy: str | int = "auto"
    episodes: int = 1000
    validate_every: int = 1000
    log_every: int = 50


def _network(settings: Preset) -> Model:
    return nn.as_model(NETWORKS[settings.network](1 if settings.train_ways is None else settings.train_ways))


OUTER_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "Adam": optax.adam,
    "SGD": optax.sgd,
}

NETWORKS: dict[str, Callable[[int], Any]] = {
    "strided-conv4": lambda out: nn.StridedConv4(ways=out),
    "strided-conv4-flat": lambda out: nn.StridedConv4(ways=out, flatten=True),
    "strided-conv4-without-scale": lambda out: nn.StridedConv4(ways=out, use_scale=False),
    "conv4": lambda out: nn.Conv4(ways=out),
    "conv4-32": lambda out: nn.Conv4(ways=out, filters=32),
    "resnet12": lambda out: nn.ResNet12(ways=out),
    "mlp": lambda out: nn.MLP(out=out, hidden=(256, 128, 64, 64), norm=True),
    "mlp-40": lambda out: nn.MLP(out=out),
    "linear": lambda out: nn.MLP(out=out, hidden=(), use_bias=False),
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
      outer: outer optimizer, a name in `OUTER_OPTIMIZERS`.
      train_shots: support examples in training for each one of the protocol.
      defaults: settings that this learner has in place of those of a preset made for another.
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
    outer: str = "Adam"
    train_shots: int = 1
    defaults: Callable[[Preset], Mapping[str, Any]] = lambda preset: {}


# A factory's arguments by the settings that they come from.
_ARGUMENTS = {
    "inner_steps": "steps",
    "eval_steps": "eval_steps",
    "inner_batch": "batch_size",
    "order": "order",
    "memory": "memory",
    "truncation": "truncation",
    "proximal": "proximal",
    "cg_steps": "cg_steps",
    "damping": "damping",
}


def _build(
    factory: Callable[..., Learner], own: Callable[[Preset], Mapping[str, Any]] = lambda settings: {}
) -> Callable[[Model, Preset, str], Learner]:
    """Builds a method by its factory from what is set, and `own` arguments made of settings.

    What the factory says of an argument it then says of the flag.
    """

    def build(network: Model, settings: Preset, norm: str) -> Learner:
        given = {name: getattr(settings, field) for field, name in _ARGUMENTS.items()}
        try:
            return factory(
                network,
                norm=norm,
                loss=losses.mse if settings.ways is None else losses.cross_entropy,
                **{name: value for name, value in given.items() if value is not None},
                **own(settings),
            )
        except ValueError as error:
            argument, said = re.match(r"(\w*)(.*)", str(error), re.DOTALL).groups()  # type: ignore[union-attr]
            flags = {name: flag_of(field) for field, name in _ARGUMENTS.items()}
            raise ValueError(flags.get(argument, argument) + said) from error

    return build


def _sgd(settings: Preset) -> dict[str, Any]:
    return {"inner_optimizer": optax.sgd(settings.inner_lr)}


def _maml_plus_plus(settings: Preset) -> dict[str, Any]:
    parts = {"anneal_steps": settings.anneal, "first_order_steps": settings.first_order}
    steps = {name: round(part * settings.steps) for name, part in parts.items() if part is not None}
    return {"rate": settings.inner_lr, **steps}


def _imaml_defaults(preset: Preset) -> dict[str, Any]:
    found = {
        "inner_steps": 16,
        "eval_steps": 16,
        "report_steps": (),
        "proximal": 2.0,
        "cg_steps": 5,
        "damping": 0.0,
    }
    if preset.ways is not None:
        # Images take the weight to be weaker than the paper's 2, which keeps 16 steps too close to the
        # start, and the damping that the official code has; and the network is iMAML's own.
        flat = {"strided-conv4": "strided-conv4-flat"}
        found |= {"network": flat.get(preset.network, preset.network)}
        found |= {"inner_lr": 0.1, "proximal": 0.2, "damping": 1.0}
    return found


def _reptile_defaults(preset: Preset) -> dict[str, Any]:
    return {
        # The official code's inner optimizer is Adam, whose second moments live on from task to task.
        # Ours begins anew with each task, and SGD then learns faster.
        "inner_lr": 0.02 if preset.ways is None else 0.5,
        "inner_steps": 5,
        "eval_steps": 20,
        "inner_batch": 10,
        "outer_lr": 1.0,
        "schedule": "linear",
    }


def _lstm_defaults(preset: Preset) -> dict[str, Any]:
    found = {"inner_steps": 12, "eval_steps": 12, "report_steps": (), "order": "first"}
    if preset.ways is not None:
        # Its meta-gradient costs far more than MAML's: two LSTMs at every parameter, twelve times.
        found |= {
            "network": "conv4-32",
            "meta_batch": min(preset.meta_batch, 4),
            "steps": max(preset.steps // 2, 1),
        }
    return found


_STEPS = ("inner_steps", "eval_steps", "report_steps")
_DESCENT = (*_STEPS, "inner_lr", "inner_batch")
_UNROLLED = (*_DESCENT, "memory", "truncation")
_ORDER = ("order", "diagnose")
_IMPLICIT = ("proximal", "cg_steps", "damping")

LEARNERS: dict[str, LearnerSpec] = {
    "maml": LearnerSpec(
        maml,
        "optimization-based",
        "an initialisation from which a few gradient steps suffice (Finn et al. 2017)",
        _build(maml, _sgd),
        takes=(*_UNROLLED, *_ORDER, *_IMPLICIT),
    ),
    "fomaml": LearnerSpec(
        fomaml,
        "optimization-based",
        "MAML without second derivatives (Finn et al. 2017)",
        _build(fomaml, _sgd),
        takes=_DESCENT,
    ),
    "anil": LearnerSpec(
        anil,
        "optimization-based",
        "MAML that adapts the head alone (Raghu et al. 2020)",
        _build(anil, _sgd),
        takes=(*_UNROLLED, *_ORDER, *_IMPLICIT),
    ),
    "boil": LearnerSpec(
        boil,
        "optimization-based",
        "MAML that adapts the body alone (Oh et al. 2021)",
        _build(boil, _sgd),
        takes=(*_UNROLLED, *_ORDER, *_IMPLICIT),
    ),
    "meta_sgd": LearnerSpec(
        meta_sgd,
        "optimization-based",
        "MAML with a learned step size for every parameter (Li et al. 2017)",
        _build(meta_sgd, lambda settings: {"rates": settings.inner_lr}),
        takes=(*_UNROLLED, *_ORDER),
    ),
    "imaml": LearnerSpec(
        imaml,
        "optimization-based",
        "MAML with implicit gradients (Rajeswaran et al. 2019)",
        _build(imaml, _sgd),
        takes=(*_STEPS, "inner_lr", *_IMPLICIT),
        defaults=_imaml_defaults,
    ),
    "maml_plus_plus": LearnerSpec(
        maml_plus_plus,
        "optimization-based",
        "MAML with a multi-step loss, learned step sizes and layers for each step (Antoniou et al. 2019)",
        _build(maml_plus_plus, _maml_plus_plus),
        takes=(*_STEPS, "inner_lr", "memory", "anneal", "first_order"),
        defaults=lambda preset: {
            "inner_steps": 5,
            "eval_steps": 5,
            "report_steps": (),
            "anneal": 0.1,
            "first_order": 0.0,
        },
    ),
    "reptile": LearnerSpec(
        reptile,
        "optimization-based",
        "moves the initialisation towards each task's solution (Nichol et al. 2018)",
        _build(reptile, _sgd),
        takes=_DESCENT,
        outer="SGD",
        train_shots=10,
        defaults=_reptile_defaults,
    ),
    "lstm_meta_learner": LearnerSpec(
        lstm_meta_learner,
        "optimization-based",
        "an LSTM as the optimizer, and the start that suits it (Ravi & Larochelle 2017)",
        _build(lstm_meta_learner),
        takes=(*_STEPS, *_ORDER, "inner_batch", "memory", "truncation"),
        norms={"transductive": "batch", "inductive": "episode"},
        defaults=_lstm_defaults,
    ),
    "learned_optimizer": LearnerSpec(
        learned_optimizer,
        "optimization-based",
        "gradient descent learned by gradient descent, for training from scratch (Andrychowicz et al. 2016)",
        # As in the paper; the official code has a tenth of it.
        _build(learned_optimizer, lambda settings: {"scale": 0.1}),
        takes=(*_STEPS, *_ORDER, "inner_batch", "memory", "truncation"),
        defaults=lambda preset: {
            "inner_steps": 100,
            "eval_steps": 100,
            "report_steps": (),
            "truncation": 20,
            "order": "first",
        },
    ),
}


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


def flag_of(field: str) -> str:
    """What the command line calls a setting."""
    return "--" + field.replace("_", "-")
