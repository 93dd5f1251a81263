"""Command lines that reproduce a call or a run."""

import contextlib
import inspect
import shlex
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jaxmeta.checks import ArgumentError
from jaxmeta.cli import schema
from jaxmeta.cli.config import GROUPS, TASK_SHAPE, Base, Chosen, Config, base_of, resolve
from jaxmeta.cli.schema import Setting
from jaxmeta.cli.sources import source_of

# Defaults of other settings follow from these. They come first, so that flags for values that follow from
# them are left out.
_LEADING = ("steps", *TASK_SHAPE)

Values = Mapping[str, Mapping[str, Any]]


def flags_of(values: Values, groups: Mapping[str, Mapping[str, Setting]]) -> list[str]:
    """Return settings by group and name as the words of a command line.

    Args:
      values: values of the settings, by group and name.
      groups: all settings of the command. A name that several groups have gets its group as prefix.

    Returns:
      The words.
    """
    words = []
    for group, settings in values.items():
        for name, value in settings.items():
            several = sum(name in each for each in groups.values()) > 1
            words += _words(f"{group}.{name}" if several else name, value)
    return words


def _words(name: str, value: Any) -> list[str]:
    flag = schema.flag_of(name)
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    text = schema.shown_value(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def command_of_call(
    function: Callable[..., Any],
    given: Mapping[str, Any],
    more: Mapping[str, Mapping[str, Setting]] = MappingProxyType({}),
) -> str:
    """Return the command that calls a function with these arguments, without `--out`.

    Args:
      function: function whose signature describes the command of its name.
      given: arguments by name. Forwarded ones are in a dictionary under the name of their `**` parameter.
      more: settings of flags in addition to the signature's, by the argument that takes them as a dictionary.

    Returns:
      The command, quoted for a shell.
    """
    forwarded = {
        name: value
        for argument, inner in given.items()
        if isinstance(inner, dict) and argument not in more
        for name, value in inner.items()
    }
    flat, words = {**given, **forwarded}, []
    for each in inspect.signature(function).parameters.values():
        if each.kind is each.VAR_POSITIONAL:
            words += flat[each.name]
        elif each.kind is each.POSITIONAL_OR_KEYWORD:
            words.append(flat[each.name])
    settings = schema.settings_of(function)
    changed = {name: flat[name] for name in settings if name in flat and flat[name] != settings[name].default}
    changed.pop("out", None)
    values = {
        group: {name: value for name, value in given[group].items() if value != known[name].default}
        for group, known in more.items()
    }
    flags = flags_of({"flags": changed, **values}, {"flags": settings, **more})
    return shlex.join(["jaxmeta", function.__name__, *words, *flags])


def command_of_config(config: Config) -> str | None:
    """Return the `jaxmeta train` command of a configuration, with the flags that differ from their defaults.

    Returns:
      The command, quoted for a shell; None where no flags give this configuration.
    """
    learner, network, tasks = (each["name"] for each in (config.learner, config.network, config.tasks))
    words = [learner]
    try:
        preset = None if config.preset in (None, source_of(tasks).preset) else config.preset
        base = base_of(Chosen(learner, None, tasks, preset))
        if preset is not None:
            words += ["--preset", preset]
        if base_of(Chosen(learner, None, None, preset)).tasks != tasks:
            words += ["--tasks", tasks]
        if base.network != network:
            base = base_of(Chosen(learner, network, tasks, preset))
            words += ["--network", network]
        flags = _changed_flags(base, config)
    except ArgumentError:
        return None
    groups = base.names().groups()
    parsed = {
        group: {
            name: value if isinstance(value, bool) else groups[group][name].parse(schema.shown_value(value))
            for name, value in values.items()
        }
        for group, values in flags.items()
    }
    if base.preset != config.preset or _differences(config, resolve(base, parsed)):
        return None
    return shlex.join(["jaxmeta", "train", *words, *flags_of(flags, groups)])


def _changed_flags(base: Base, config: Config) -> dict[str, dict[str, Any]]:
    """Return the flags that turn a protocol into this configuration."""
    groups = base.names().groups()
    flags: dict[str, dict[str, Any]] = {}
    # All settings are compared twice, since a flag may change the defaults of others.
    for only in (_LEADING, None, None):
        so_far: Config | None = None
        # These flags may be valid only together with later ones.
        with contextlib.suppress(ArgumentError):
            so_far = resolve(base, flags)
        before = base.values if so_far is None else {group: so_far.settings(group) for group in GROUPS}
        for group in GROUPS:
            wanted = config.settings(group)
            for name in groups[group]:
                differs = name in wanted and wanted[name] != before[group].get(name)
                if differs and (only is None or name in only):
                    flags.setdefault(group, {})[name] = wanted[name]
    return flags


def _differences(a: Config, b: Config) -> list[str]:
    return [group for group in GROUPS if a.settings(group) != b.settings(group)]
