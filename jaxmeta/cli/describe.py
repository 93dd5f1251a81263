"""Lists and descriptions of presets, tasks, learners and networks."""

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from jaxmeta.cli import names, schema, sources
from jaxmeta.cli.config import (
    SUPPLIED_TO_LEARNER,
    SUPPLIED_TO_NETWORK,
    SUPPLIED_TO_TASKS,
    Chosen,
    base_of,
    kind_of,
)
from jaxmeta.cli.parser import print_table
from jaxmeta.cli.presets import PRESETS
from jaxmeta.cli.schema import Setting
from jaxmeta.declare import facts_of

_WIDTH = 110


def presets(name: str | None = None) -> None:
    """List the protocols, or describe one.

    Args:
      name: name of a preset.
    """
    if name is None:
        print_table(
            (each, _learner_on_tasks(each), preset["description"]) for each, preset in PRESETS.items()
        )
        return
    preset = names.lookup("name", name, PRESETS)
    kind, colon, _ = preset.get("tasks", "").partition(":")
    base = base_of(Chosen(preset=name, tasks=f"{kind}:…" if colon else None))
    print(f"{name}: {preset['description']}\n")
    chosen = {"learner": base.learner, "network": base.network, "tasks": base.tasks}
    groups = base.names().groups()
    flags = schema.flag_names(groups)
    for group, settings in groups.items():
        print(f"{group}{f': {chosen[group]}' if group in chosen else ''}")
        rows = [(each, base.values[group].get(each, settings[each].default)) for each in settings]
        if rows:
            print_table((f"  {flags[group][each]}", schema.shown_value(value)) for each, value in rows)


def tasks(name: str | None = None) -> None:
    """List the sources of tasks, or describe one.

    Args:
      name: name of a source, or module:name of your own.
    """
    if name is None:
        print_table((key, source.description) for key, source in sources.TASKS.items())
        return
    with sources.renaming({"tasks": "name"}):
        source = sources.TASKS[name] if name in sources.TASKS else sources.source_of(name)
    print(f"{name}: {source.description} ({kind_of(source)})\n")
    _describe(source.function, SUPPLIED_TO_TASKS)


def learners(name: str | None = None) -> None:
    """List the methods, or describe one.

    Args:
      name: name of a method, or module:name of your own.
    """
    if name is None:
        print_table(
            (key, _family(factory), schema.summary(factory)) for key, factory in names.LEARNERS.items()
        )
        return
    factory = names.find("name", name, names.LEARNERS)
    facts = facts_of(factory)
    print(f"{name}: {schema.summary(factory)}")
    print(f"learns {' and '.join(facts.kinds)}; rows of its report: {', '.join(facts.rows)}\n")
    _describe(factory, SUPPLIED_TO_LEARNER)


def networks(name: str | None = None) -> None:
    """List the networks, or describe one.

    Args:
      name: name of a network, or module:name of your own.
    """
    if name is None:
        print_table(
            (key, f"{schema.summary(network)}{_variant(network)}") for key, network in names.NETWORKS.items()
        )
        return
    network = names.find("name", name, names.NETWORKS)
    print(f"{name}: {schema.summary(network)}\n")
    width = names.width_name(network)
    _describe(network, (*SUPPLIED_TO_NETWORK, *([] if width is None else [width])))


def _variant(network: Callable[..., Any]) -> str:
    """Return the fixed settings of a variant of a network."""
    keywords = getattr(network, "keywords", {})
    text = ", ".join(f"{name} {schema.shown_value(value)}".split("(")[0] for name, value in keywords.items())
    return f": {text}" if text else ""


def _learner_on_tasks(preset: str) -> str:
    """Return learner and tasks of a preset, which may come from its base."""
    spec: Mapping[str, Any] = PRESETS[preset]
    merged: dict[str, Any] = {}
    while True:
        merged = {**spec, **merged}
        if "base" not in spec:
            return f"{merged.get('learner', 'maml')} on {merged['tasks']}"
        spec = PRESETS[spec["base"]]


def _family(factory: Callable[..., Any]) -> str:
    package = inspect.unwrap(factory).__module__.split(".")[1]
    return package.replace("_", "-")


def _describe(function: Callable[..., Any], supplied: tuple[str, ...]) -> None:
    """Print the settings of a function with their descriptions."""
    settings = schema.settings_of(function, supplied)
    if not settings:
        print("It has no settings.")
    for setting in settings.values():
        print(_line(setting))
        for line in textwrap.wrap(setting.about, _WIDTH - 6):
            print(f"      {line}")


def _line(setting: Setting) -> str:
    value = "" if setting.default is schema.MISSING else f" (default: {schema.shown_value(setting.default)})"
    return f"  {setting.flag} {schema.metavar(setting.hint)}{value}"
