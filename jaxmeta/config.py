"""A run's configuration: from the command line's flags, and as its folder keeps it."""

import builtins
import dataclasses
import json
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import jax
from jaxtyping import Array

from jaxmeta import presets, registry
from jaxmeta.checks import parsed_json, shown
from jaxmeta.core import Key, Learner, Params, Task, TaskDistribution, TaskStream
from jaxmeta.settings import Preset, flag_of, lookup
from jaxmeta.training import load, load_params
from jaxmeta.training.step import sample_of

# What a resumed run may do differently: it changes no parameter, or only the order of float32 sums.
MAY_CHANGE = (
    "data",
    "devices",
    "mesh",
    "strategy",
    "episodes",
    "report_steps",
    "workers",
    "non_finite",
    "description",
    "jaxmeta",
)

# Settings that the first runs did not have yet, and what they mean for those.
_LATER = {
    field.name: field.default
    for field in dataclasses.fields(Preset)
    if field.name in presets.METHOD_FIELDS or field.name in ("within_alphabet", "non_finite", "precision")
} | {"mesh": None}

# What a configuration has beside settings.
_BESIDE: dict[str, Any] = {
    "preset": str,
    "seed": int,
    "data": str | None,
    "devices": int | None,
    "mesh": str | None,
    "split_hash": str | None,
    "images": dict | None,
}

# What decides which parameters there are: in a run's configuration as in its checkpoints'.
_SHAPING = ("learner", "network", "train_ways", "seed")

# Where a run keeps the population statistics of its learner.
POPULATION = "population"


class Form(NamedTuple):
    """What images a run was trained on.

    Attributes:
      size: side in pixels.
      channels: 1 or 3.
      mean: of all pixels, in [0, 1].
      ink: whether they are strokes, light on dark.
    """

    size: int
    channels: int
    mean: float
    ink: bool


def fresh(flags: Mapping[str, Any], learner: str | None) -> tuple[dict, Preset, Path]:
    flags = settled(flags)
    preset, settings = presets.settings_of(flags, learner=learner, preset=flags.get("preset"))
    out = new_folder(flags.get("out"), settings.learner, settings.tasks, "run")
    return _config(preset, settings, flags.get("seed", 0), data_of(flags, {}), flags), settings, out


def new_folder(given: str | None, what: str, tasks: str, kind: str) -> Path:
    """The folder of a new run or comparison: `given`, or one in runs/ named by `what`, tasks and time.

    Raises:
      FileExistsError: it is not empty.
    """
    moment = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    folder = Path(f"runs/{what}-{file_name(tasks)}-{moment}" if given is None else given).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"--out: {folder} exists and is not empty; choose another, or continue its {kind} with --resume"
        )
    return folder


def _config(
    preset: str, settings: Preset, seed: int, data: str | None, devices: Mapping[str, Any]
) -> dict[str, Any]:
    config = {
        "jaxmeta": version("jaxmeta"),
        "preset": preset,
        "seed": seed,
        "data": data,
        "devices": devices.get("devices"),
        "mesh": devices.get("mesh"),
        **dataclasses.asdict(settings),
    }
    return json.loads(json.dumps(config))


def resumed(flags: Mapping[str, Any], learner: str | None) -> tuple[dict, Preset, Path]:
    if "out" not in flags:
        raise ValueError("--resume: needs the run's folder; add --out DIR")
    flags, out = settled(flags), Path(flags["out"]).expanduser()
    config, settings = stored(out)
    given = {"LEARNER": ("learner", learner)} if learner else {}
    given |= {
        flag_of(name): (name, value)
        for name, value in flags.items()
        if name != "out" and name not in MAY_CHANGE
    }
    for flag, (name, value) in given.items():
        if config[name] != value:
            raise ValueError(f"{flag}: got {value}, but the run in {out} has {config[name]}; leave it out")
    settings = presets.revised(settings, {name: flags[name] for name in flags if name in MAY_CHANGE})
    # Either says which devices.
    devices = flags if {"devices", "mesh"} & {*flags} else config
    new = _config(config["preset"], settings, config["seed"], data_of(flags, config), devices)
    return {**new, "split_hash": config["split_hash"], "images": config["images"]}, settings, out


def data_form(tasks: TaskDistribution | TaskStream, ink: bool) -> dict[str, Any]:
    """What a run keeps of its data, to know them again and, of images, to read others alike.

    Returns:
      "split_hash", and "images": None where there are none, else their size, number of channels, mean
      in [0, 1], and whether they are strokes, light on dark.
    """
    images = None
    shape = _shape(tasks)
    if len(shape) == 4 and shape[-1] in (1, 3):
        if isinstance(tasks, TaskStream):
            mean = tasks.at(0).support.x.mean()
        else:
            mean = _mean(sample_of(tasks), jax.random.split(jax.random.key(0), 16))
        images = {"size": shape[1], "channels": shape[-1], "mean": round(float(mean), 4), "ink": ink}
    return {"split_hash": tasks.card.split_hash, "images": images}


def _shape(tasks: TaskDistribution | TaskStream) -> tuple[int, ...]:
    """Of the support examples of one task."""
    return jax.eval_shape(sample_of(tasks), jax.random.key(0)).support.x.shape


# The sampler, and with it the data, is an argument: closed over, it would be compiled in as a constant.
@jax.jit
def _mean(sample: Callable[[Key], Task], keys: Array) -> Array:
    return jax.vmap(lambda key: sample(key).support.x.mean())(keys).mean()


def check_data(config: Mapping[str, Any], tasks: TaskDistribution | TaskStream, folder: Path) -> None:
    """Refuses data that are no longer those the run in `folder` was trained on.

    Raises:
      ValueError: the classes are shared out otherwise, so that a class to test on may be one that was
        trained on; or the images have another shape.
    """
    if config["split_hash"] != tasks.card.split_hash:
        raise ValueError(
            f"--tasks: the classes of {config['tasks']}, or how they are split, are no longer those that the "
            f"run in {folder} was trained on (split {str(config['split_hash'])[:8]} then, "
            f"{str(tasks.card.split_hash)[:8]} now)"
        )
    if config["images"] is not None:
        shape = _shape(tasks)[1:]
        size, channels = config["images"]["size"], config["images"]["channels"]
        if shape != (size, size, channels):
            raise ValueError(
                f"--tasks: the images of {config['tasks']} have shape {shape}, and those that the run in "
                f"{folder} was trained on {(size, size, channels)}"
            )


def load_run(run: str | os.PathLike, row: str = "inductive") -> tuple[Learner, Params]:
    """The learner of a run of `jaxmeta train`, and its parameters.

    Args:
      run: the run's folder.
      row: of its report: "inductive", whose answers depend on no other query, or "transductive".

    Raises:
      FileNotFoundError: there is no run.
      ValueError: its files cannot be read, or another `row`.

    Examples:
      >>> learner, params = jm.load_run("runs/alphabet")  # doctest: +SKIP
      >>> adapted = learner.adapt(params, support, jax.random.key(0))  # doctest: +SKIP
      >>> outputs = learner.predict(params, adapted, images)  # doctest: +SKIP
    """
    folder = Path(run).expanduser()
    config, settings = stored(folder)
    norm = lookup("row", row, registry.LEARNERS[settings.learner].norms)
    return presets.learner_of(settings, norm), params_of(folder, config)


def as_trained(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration is kept with each checkpoint, and must be the same to go on with it."""
    return {name: value for name, value in config.items() if name not in MAY_CHANGE}


def params_of(folder: Path, config: Mapping[str, Any]) -> Params:
    """The parameters of the run in `folder`, with population statistics where its learner has such a row.

    Raises:
      ValueError: they cannot be read, or are of another learner, network, number of ways or seed than
        `config`; or the run, whose last act is to fill these statistics, has not ended.
    """
    learner = config["learner"]
    params = load_params(folder, config={name: config[name] for name in _SHAPING})
    if "population" not in registry.LEARNERS[learner].norms.values():
        return params
    if not (folder / POPULATION).exists():
        raise ValueError(
            f"{folder}: the run has not ended, and {learner} is used with statistics that are taken "
            f"at its end; continue it with: jaxmeta train --resume --out {folder}"
        )
    return {**params, **load(folder / POPULATION)}


def json_target(path: str | None) -> Path | None:
    """Where --json writes to.

    Raises:
      FileNotFoundError: its folder does not exist.
      ValueError: it is a folder itself.
    """
    if path is None:
        return None
    target = Path(path).expanduser().absolute()
    if target.is_dir():
        raise ValueError(f"--json: {path} is a folder; name a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--json: the folder {target.parent} does not exist")
    return target


def stored(folder: Path) -> tuple[dict, Preset]:
    """The configuration and the settings of the run in `folder`.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: its config.json cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run: there is no {path}")
    try:
        config = {**_LATER, **parsed_json(path.read_text(encoding="utf-8"))}
        hints = get_type_hints(Preset)
        _check_types(config, {**hints, **_BESIDE})
        if config["images"] is not None:
            _check_types(Form(**config["images"])._asdict(), get_type_hints(Form))
        fields = {name: config[name] for name in hints}
        settings = Preset(**{**fields, "report_steps": tuple(fields["report_steps"])})
        lookup("learner", settings.learner, registry.LEARNERS)
        settings = presets.revised(settings, {"seed": config["seed"]})
    except (ValueError, KeyError, TypeError) as error:
        said = str(error) if type(error) is ValueError else repr(error)
        raise ValueError(f"{path} is damaged, or of another version of jaxmeta: {said}") from None
    return config, settings


def _check_types(values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Refuses values in JSON that are none of their types."""
    for name, hint in hints.items():
        if not _is(values[name], hint):
            wanted = getattr(hint, "__name__", str(hint)).replace("NoneType", "null")
            raise ValueError(f"{name}: got {shown(values[name])}; it must be {wanted}")


def _is(value: Any, hint: Any) -> bool:
    match get_origin(hint):
        case types.UnionType:
            return any(_is(value, kind) for kind in get_args(hint))
        case typing.Literal:
            return value in get_args(hint)
        case builtins.tuple:
            return isinstance(value, list) and all(_is(each, get_args(hint)[0]) for each in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if hint is float else hint)


def settled(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags as settings are kept: numbers as such, paths good in every folder."""
    typed = dict(flags)
    if str(flags.get("strategy")).isdigit():
        typed["strategy"] = int(flags["strategy"])
    kind, colon, path = str(flags.get("tasks", "")).partition(":")
    if kind == "folder" and path:
        typed["tasks"] = kind + colon + str(Path(path).expanduser().resolve())
    if "classes" in flags and (file := Path(flags["classes"]).expanduser()).is_file():
        typed["classes"] = str(file.resolve())
    return typed


def file_name(tasks: str) -> str:
    """A task source's name as part of a file name: of a folder its last part."""
    kind, _, rest = tasks.partition(":")
    own = re.sub(r"[^\w.-]+", "-", rest.rstrip("/").rpartition("/")[2]).strip("-.")
    return f"{kind}-{own}" if own else kind


def data_of(flags: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    if "data" not in flags:
        return config.get("data")
    data = Path(flags["data"]).expanduser()
    if not data.exists():
        raise FileNotFoundError(f"--data: {flags['data']} does not exist")
    return str(data.resolve())
