"""Presets: whole trainings by name, and what the command line's flags make of them."""

import contextlib
import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import optax

from jaxmeta import tasks
from jaxmeta.core import Key, Learner, TaskDistribution, TaskStream
from jaxmeta.registry import LEARNERS, NETWORKS, TASKS, LearnerSpec, Preset, TaskSpec
from jaxmeta.tasks.prepared import SplitImages


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
_METHOD_FIELDS = ("inner_lr", "inner_steps", "eval_steps", "report_steps", "order")
_SOURCE_FIELDS = (
    "ways",
    "train_ways",
    "protocol",
    "rotations",
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
# Episodes at once in an evaluation from a stream.
_STREAMED = 20


def lookup(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """`table[name]`, or a ValueError that lists what there is, the closest first."""
    if name in table:
        return table[name]
    raise ValueError(f"{kind}: there is no {name!r}; {known(name, table)}")


def source_of(name: str) -> TaskSpec:
    """The source that `name` means: what stands after a colon is its own, "folder:PATH".

    Raises:
      ValueError: there is none of that name.
    """
    kind, colon, _ = name.partition(":")
    entries = {entry.partition(":")[0] + ":" * (":" in entry): entry for entry in TASKS}
    return TASKS[entries[kind + colon]] if kind + colon in entries else lookup("--tasks", name, TASKS)


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
        preset = source_of(flags.get("tasks", "glyphs")).preset
    base = lookup("--preset", preset, PRESETS)
    if source_of(flags.get("tasks", base.tasks)) is not source_of(base.tasks):
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
    spec, source = LEARNERS[settings.learner], source_of(settings.tasks)
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
        ("image_size", 1),
        ("workers", 0),
        ("split_seed", 0),
    ):
        value = getattr(settings, field)
        # Written so that NaN fails.
        if value is not None and not value >= least:
            raise ValueError(f"{flag_of(field)}: got {value}; it must be at least {least}")
    lookup("--network", settings.network, NETWORKS)
    if settings.norm not in spec.norms.values():
        raise ValueError(
            f"--norm: got {settings.norm}; {settings.learner} has {', '.join(spec.norms.values())}"
        )
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


def tasks_of(
    settings: Preset, split: str, data: str | None = None, key: Key | None = None
) -> TaskDistribution | TaskStream:
    """The tasks of a part: the training protocol for "train", else the test protocol.

    Args:
      settings: of the run.
      split: "train", "validation" or "test".
      data: the folder of --data.
      key: that a stream's episodes are drawn with: of the run for "train", else of the evaluation.
    """
    prefix = "train_" if split == "train" else ""
    shape = {field: getattr(settings, prefix + field) for field in ("ways", "shots", "queries")}
    if shape["ways"] is None:
        del shape["ways"]
    with _in_words_of_flags():
        return _tasks_of(settings, split, data, key, shape)


@contextlib.contextmanager
def _in_words_of_flags() -> Iterator[None]:
    """What the library says of its arguments, for those who gave flags."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        said = str(error)
        for argument, flag in (
            ("path: ", "--tasks: "),
            ("data: ", "--data: "),
            ("skip_unreadable=True", "--skip-unreadable"),
            ("(classes)", "(--classes)"),
            ("with label", "with --label"),
            ("with tfds_splits", "with --tfds-splits"),
            ("with data_dir", "with --data"),
        ):
            said = said.replace(argument, flag)
        raise type(error)(said) from error


def _tasks_of(
    settings: Preset, split: str, data: str | None, key: Key | None, shape: dict[str, Any]
) -> TaskDistribution | TaskStream:
    source = source_of(settings.tasks).build(split, settings, shape, data)
    if not isinstance(source, SplitImages):
        return source
    protocol: dict[str, Any] = {
        "split": split,
        "classes": source.classes,
        "seed": settings.split_seed,
        "rotations": settings.rotations or "none",
        "protocol": source.protocol,
        **shape,
    }
    if not settings.stream:
        return tasks.from_prepared(source.prepared, **protocol)
    return tasks.stream(
        source.prepared,
        key=jax.random.key(0) if key is None else key,
        meta_batch=settings.meta_batch if split == "train" else _STREAMED,
        for_evaluation=split != "train",
        # Evaluations are short: to start processes for each would take longer than reading does.
        workers=settings.workers if split == "train" else 0,
        **protocol,
    )


def validation_tasks_of(
    settings: Preset, data: str | None = None, key: Key | None = None
) -> TaskDistribution | TaskStream | None:
    """Tasks to choose parameters by; None where the class split has no validation part."""
    if not source_of(settings.tasks).has_validation(settings):
        return None
    return tasks_of(settings, "validation", data, key)


def with_form(settings: Preset, images: Mapping[str, Any] | None) -> Preset:
    """`settings` with the size and channels that one's own images turned out to have.

    Kept with the run, they hold when images of another kind join the folder.
    """
    if images is None or "image_size" not in source_of(settings.tasks).takes:
        return settings
    return dataclasses.replace(settings, image_size=images["size"], channels=images["channels"])


def learner_of(settings: Preset, norm: str | None = None) -> Learner:
    """The learner with its network, `norm` in place of training's; all share one set of parameters."""
    spec = LEARNERS[settings.learner]
    return spec.build(spec.network(settings), settings, norm or settings.norm)


def optimizer_of(settings: Preset) -> optax.GradientTransformation:
    """The outer optimizer."""
    return LEARNERS[settings.learner].optimizer(settings)


def flag_of(field: str) -> str:
    """What the command line calls a setting."""
    return "--" + field.replace("_", "-")
