"""A run's configuration: from the command line's flags, and as its folder keeps it."""

import dataclasses
import json
import re
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxmeta import presets
from jaxmeta.presets import Preset

# What a resumed run may do differently: it changes no parameter, or only the order of float32 sums.
MAY_CHANGE = (
    "data",
    "devices",
    "strategy",
    "episodes",
    "report_steps",
    "workers",
    "description",
    "images",
    "jaxmeta",
)


def fresh(flags: Mapping[str, Any], learner: str | None) -> tuple[dict, Preset, Path]:
    flags = settled(flags)
    preset, settings = presets.settings_of(flags, learner=learner, preset=flags.get("preset"))
    moment = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    out = Path(flags.get("out", f"runs/{settings.learner}-{file_name(settings.tasks)}-{moment}")).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"--out: {out} exists and is not empty; choose another, or continue its run with --resume"
        )
    return (
        _config(preset, settings, flags.get("seed", 0), data_of(flags, {}), flags.get("devices")),
        settings,
        out,
    )


def _config(
    preset: str, settings: Preset, seed: int, data: str | None, devices: int | None
) -> dict[str, Any]:
    config = {
        "jaxmeta": version("jaxmeta"),
        "preset": preset,
        "seed": seed,
        "data": data,
        "devices": devices,
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
        presets.flag_of(name): (name, value)
        for name, value in flags.items()
        if name != "out" and name not in MAY_CHANGE
    }
    for flag, (name, value) in given.items():
        if config[name] != value:
            raise ValueError(f"{flag}: got {value}, but the run in {out} has {config[name]}; leave it out")
    settings = presets.revised(settings, {name: flags[name] for name in flags if name in MAY_CHANGE})
    devices = flags.get("devices", config["devices"])
    return _config(config["preset"], settings, config["seed"], data_of(flags, config), devices), settings, out


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
        config = json.loads(path.read_text(encoding="utf-8"))
        fields = {field.name: config[field.name] for field in dataclasses.fields(Preset)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or of another version of jaxmeta: {error!r}") from None
    settings = Preset(**{**fields, "report_steps": tuple(fields["report_steps"])})
    presets.lookup("learner", settings.learner, presets.LEARNERS)
    presets.source_of(settings.tasks)
    return config, settings


def settled(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags as settings are kept: numbers as such, paths good in every folder."""
    typed = dict(flags)
    if str(flags.get("strategy")).isdigit():
        typed["strategy"] = int(flags["strategy"])
    kind, colon, path = str(flags.get("tasks", "")).partition(":")
    if kind == "folder" and path:
        typed["tasks"] = kind + colon + str(Path(path).expanduser().resolve())
    if Path(flags.get("classes", "")).is_file():
        typed["classes"] = str(Path(flags["classes"]).resolve())
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
