"""Presets: whole trainings by name, and what the command line's flags make of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

from jaxmeta.checks import LARGEST_SEED, check_count, check_number, check_word
from jaxmeta.core import Learner, Model
from jaxmeta.nn import in_precision
from jaxmeta.registry import LEARNERS, NETWORKS, OUTER_OPTIMIZERS, LearnerSpec
from jaxmeta.settings import Preset, flag_of, lookup
from jaxmeta.sources import TASKS, source_of


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
    "network": "mlp-40",
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

_FINN_MINI_IMAGENET: dict[str, Any] = {
    "queries": 1,
    "train_queries": 15,
    "network": "conv4-32",
    "inner_lr": 5 * 0.01,
    "inner_steps": 5,
    "eval_steps": 10,
    "clip": 10.0,
    "meta_batch": 4,
    "episodes": 600,
}

# Ten classes to draw from are soon known.
_TEN_DIGITS: dict[str, Any] = {
    "train_queries": 3,
    "queries": 5,
    "outer_lr": 3e-3,
    "schedule": "cosine",
    "steps": 2000,
    "meta_batch": 8,
}

# For one's own images: trained as `jaxmeta predict` will use it, each query by the support set alone.
_OWN_IMAGES: dict[str, Any] = {
    "queries": 5,
    "train_queries": 5,
    "classes": "0.64,0.16,0.2",
    "network": "conv4-32",
    "norm": "support",
    "inner_lr": 0.1,
    "inner_steps": 3,
    "eval_steps": 5,
    "schedule": "cosine",
    "steps": 2000,
    "meta_batch": 4,
    "episodes": 600,
    "validate_every": 500,
    "log_every": 25,
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
    "omniglot-alphabet": Preset(
        "MAML on Omniglot's background set, 20-way 1-shot, to name the letters of an alphabet by `predict`",
        "omniglot",
        ways=20,
        train_ways=20,
        protocol="lake",
        norm="support",
        inner_lr=2.0,
        inner_steps=2,
        eval_steps=4,
        outer_lr=3e-3,
        schedule="cosine",
        steps=8000,
        meta_batch=8,
    ),
    "mnist": Preset(
        "MAML on MNIST's ten digits, 5-way 1-shot, as a source of transfer", "mnist", **_TEN_DIGITS
    ),
    "usps": Preset(
        "MAML on the ten digits of USPS, 5-way 1-shot, as a source of transfer", "usps", **_TEN_DIGITS
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
    "quadratics": Preset(
        "Andrychowicz et al. 2016: an LSTM learns to minimise quadratic functions in 100 steps",
        "quadratics",
        "learned_optimizer",
        ways=None,
        shots=10,
        queries=10,
        train_ways=None,
        train_shots=10,
        train_queries=10,
        network="linear",
        inner_lr=None,
        inner_steps=100,
        eval_steps=100,
        truncation=20,
        order="first",
        outer_lr=3e-3,
        schedule="cosine",
        steps=3000,
        meta_batch=32,
        strategy="vmap",
        episodes=600,
        log_every=25,
    ),
    "folder": Preset("MAML on a folder of one's own images, 5-way 1-shot", "folder:PATH", **_OWN_IMAGES),
    "tfds": Preset("MAML on a set of tensorflow-datasets, 5-way 1-shot", "tfds:NAME", **_OWN_IMAGES),
    "mini-imagenet": Preset(
        "Finn et al. 2017: mini-ImageNet, 5-way 1-shot, 60,000 meta-steps",
        "mini_imagenet",
        **_FINN_MINI_IMAGENET,
    ),
    "cifar-fs": Preset(
        "MAML's mini-ImageNet settings on CIFAR-FS, 5-way 1-shot, 60,000 meta-steps",
        "cifar_fs",
        **_FINN_MINI_IMAGENET,
    ),
    "cub": Preset(
        "MAML's mini-ImageNet settings on CUB-200-2011, 5-way 1-shot, 60,000 meta-steps",
        "cub",
        **_FINN_MINI_IMAGENET,
    ),
}
_FIELDS = tuple(field.name for field in dataclasses.fields(Preset) if field.name != "description")
# Settings that are counts, with the least they may be, and those that are numbers of at least 0.
_COUNTS = {
    "ways": 1,
    "shots": 0,
    "queries": 1,
    "train_ways": 1,
    "train_shots": 0,
    "train_queries": 1,
    "image_size": 1,
    "sequence": 1,
    "workers": 0,
    "inner_steps": 1,
    "eval_steps": 0,
    "inner_batch": 1,
    "truncation": 1,
    "cg_steps": 1,
    "context_steps": 1,
    "steps": 1,
    "meta_batch": 1,
    "episodes": 2,
    "validate_every": 1,
}
_NUMBERS = ("inner_lr", "proximal", "damping", "anneal", "first_order", "scale", "outer_lr", "clip")
# What only some methods have.
METHOD_FIELDS = tuple(dict.fromkeys(field for spec in LEARNERS.values() for field in spec.takes))
_SOURCE_FIELDS = (
    "ways",
    "train_ways",
    "queries",
    "train_queries",
    "protocol",
    "rotations",
    "within_alphabet",
    "data",
    "image_size",
    "channels",
    "label",
    "tfds_splits",
    "classes",
    "split_seed",
    "stream",
    "workers",
    "skip_unreadable",
)


def of_learner(preset: Preset, name: str) -> Preset:
    """`preset` with another learner: without the settings it has no use for, and with those of its own."""
    spec = lookup("LEARNER", name, LEARNERS)
    if name == preset.learner:
        return preset
    kind = "regression" if preset.ways is None else "classification"
    if kind not in spec.kinds:
        raise ValueError(f"LEARNER: {name} learns {spec.kinds[0]} only, and {preset.tasks} tasks are {kind}")
    unused = {
        field: () if field == "report_steps" else None for field in METHOD_FIELDS if field not in spec.takes
    }
    shots = preset.train_shots * spec.train_shots // LEARNERS[preset.learner].train_shots
    return dataclasses.replace(
        preset, **{**unused, "train_shots": shots, **spec.defaults(preset)}, learner=name
    )


PRESETS["glyphs-zero-shot"] = dataclasses.replace(
    of_learner(PRESETS["glyphs"], "prototypical"),
    description="drawn characters by their strokes alone, 20-way zero-shot, with prototypical networks",
    ways=20,
    shots=0,
    train_shots=0,
)
PRESETS["omniglot-within-alphabet"] = dataclasses.replace(
    of_learner(PRESETS["omniglot"], "matching"),
    description="Omniglot's classical test: 20 letters of one new alphabet, queries by another hand",
    ways=20,
    train_ways=20,
    protocol="lake-validation",
    within_alphabet=True,
    # Of 2×2 places at the end, where 28 pixels leave one; with 48 far more steps would be needed.
    image_size=32,
    distort=True,
    steps=10_000,
)

_MANN = dataclasses.replace(
    of_learner(PRESETS["omniglot"], "mann"),
    protocol="maml",
    image_size=20,
    shots=18,
    train_shots=18,
    train_queries=1,
    distort=True,
    clip=10.0,
    steps=30_000,
)
PRESETS["mann-omniglot"] = dataclasses.replace(
    _MANN,
    description="Santoro et al. 2016: sequences of 50 images of 5 classes, labels one step late",
    sequence=50,
)
PRESETS["mann-omniglot-strings"] = dataclasses.replace(
    _MANN,
    description="Santoro et al. 2016: 15 classes in 150 images, labels of five characters",
    ways=15,
    train_ways=15,
    sequence=150,
    strings="5,5",
)

PRESETS["omniglot-koch"] = dataclasses.replace(
    of_learner(PRESETS["omniglot-within-alphabet"], "siamese"),
    description="Koch et al. 2015: their Siamese network for 105x105 on the same test; for a GPU",
    network="koch",
    image_size=105,
    outer_lr=1e-4,
    steps=20_000,
)

# Each method as `train METHOD --tasks omniglot` has it; a network of this size is too large to learn
# an optimizer on in hours.
PRESETS |= {
    f"omniglot-{name.replace('_', '-')}": dataclasses.replace(
        of_learner(PRESETS["omniglot"], name), description=f"Omniglot, 5-way 1-shot: {spec.description}"
    )
    for name, spec in LEARNERS.items()
    if name not in (PRESETS["omniglot"].learner, "learned_optimizer")
}


def settings_of(
    flags: Mapping[str, Any], *, learner: str | None = None, preset: str | None = None
) -> tuple[str, Preset]:
    """A preset's name and its settings with `flags` (fields of `Preset`, and "data") in their place.

    `ways`, `shots` (times what the learner trains with) and `queries` go for training too unless `train_…`
    is given.

    Raises:
      ValueError: an unknown name; a flag that the learner or the tasks have no use for, or a value
        they cannot work with.
    """
    if preset is None:
        preset = source_of(flags.get("tasks", "glyphs")).preset
    base = lookup("--preset", preset, PRESETS)
    if source_of(flags.get("tasks", base.tasks)) is not source_of(base.tasks):
        raise ValueError(
            f"--tasks: got {flags['tasks']}, but preset {preset} is for {base.tasks}; leave one out"
        )
    settings = of_learner(base, learner or base.learner)
    training = {f"train_{field}": flags[field] for field in ("ways", "shots", "queries") if field in flags}
    if "train_shots" in training:
        training["train_shots"] *= LEARNERS[settings.learner].train_shots
    return preset, revised(settings, {**training, **flags})


def revised(settings: Preset, flags: Mapping[str, Any]) -> Preset:
    """`settings` with `flags` in their place, checked.

    Raises:
      ValueError: a flag that the learner or the tasks have no use for, or a value they cannot work with.
    """
    spec, source = LEARNERS[settings.learner], source_of(settings.tasks)
    # No settings, but of every command that has any.
    check_count("--seed", flags.get("seed", 0), 0, LARGEST_SEED)
    for fields, owner, takes in (
        (METHOD_FIELDS, settings.learner, spec.takes),
        (_SOURCE_FIELDS, settings.tasks, source.takes),
    ):
        for field in fields:
            if field in flags and field not in takes:
                raise ValueError(f"{flag_of(field)}: {owner} has no such setting")
    settings = dataclasses.replace(settings, **{key: flags[key] for key in flags if key in _FIELDS})
    _check(settings, spec)
    return settings


def _check(settings: Preset, spec: LearnerSpec) -> None:
    for field, least in _COUNTS.items():
        if (value := getattr(settings, field)) is not None:
            check_count(flag_of(field), value, least)
    for field in _NUMBERS:
        if (value := getattr(settings, field)) is not None:
            check_number(flag_of(field), value, 0)
    check_count("--split-seed", settings.split_seed, 0, LARGEST_SEED)
    if not isinstance(settings.strategy, int):
        check_word("--strategy", settings.strategy, ("auto", "vmap", "scan"))
    else:
        check_count("--strategy", settings.strategy)
    lookup("--network", settings.network, NETWORKS)
    if spec.networks is not None and settings.network not in spec.networks:
        raise ValueError(
            f"--network: got {settings.network}; {settings.learner} works with {', '.join(spec.networks)}"
        )
    if settings.inner_lr is None and "inner_lr" in spec.takes:
        raise ValueError(
            f"--inner-lr: the preset, made for another method, has none for {settings.learner}; give one"
        )
    for field in ("cg_steps", "damping"):
        if getattr(settings, field) is not None and settings.order not in (None, "implicit"):
            raise ValueError(f"{flag_of(field)}: is of --order implicit, and the order is {settings.order}")
    if settings.label_strings is not None and settings.sequence is None:
        raise ValueError("--strings: are labels of sequences; add --sequence T")
    if settings.norm not in spec.norms.values():
        raise ValueError(
            f"--norm: got {settings.norm}; {settings.learner} has {', '.join(spec.norms.values())}"
        )
    if settings.diagnose and settings.order == "first":
        raise ValueError("--diagnose: compares with first order, and --order is first; take another order")
    if settings.norm != "batch" and settings.ways is None:
        raise ValueError(f"--norm: got {settings.norm}; networks of regression normalise nothing")
    if ":" in settings.tasks and (settings.tasks in TASKS or settings.tasks.endswith(":")):
        raise ValueError(f"--tasks: got {settings.tasks}; put your own after the colon")
    if settings.workers and not settings.stream:
        raise ValueError("--workers: processes read a stream; add --stream")
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


def learner_of(settings: Preset, norm: str | None = None) -> Learner:
    """The learner with its network, `norm` in place of training's; all share one set of parameters."""
    spec = LEARNERS[settings.learner]
    network = spec.network(settings)
    if settings.precision != "float32":
        if not isinstance(network, Model):
            raise ValueError(
                f"--precision: got {settings.precision}; {settings.learner}'s network, which is more than a "
                "function of examples, computes in float32"
            )
        network = in_precision(network, settings.precision)
    return spec.build(network, settings, norm or settings.norm)


def compared_to(settings: Preset) -> Learner | None:
    """The first-order version of the learner, where meta-gradients are to be compared with its own."""
    return learner_of(dataclasses.replace(settings, order="first")) if settings.diagnose else None


def optimizer_of(settings: Preset) -> optax.GradientTransformation:
    """The outer optimizer, with its schedule and clipping."""
    rate: float | optax.Schedule = settings.outer_lr
    if settings.schedule == "cosine":
        rate = optax.cosine_decay_schedule(settings.outer_lr, settings.steps)
    if settings.schedule == "linear":
        rate = optax.linear_schedule(settings.outer_lr, 0.0, settings.steps)
    descend = OUTER_OPTIMIZERS[LEARNERS[settings.learner].outer](rate)
    return descend if settings.clip is None else optax.chain(optax.clip(settings.clip), descend)
