"""The settings of a function, read from its signature and docstring, which are their only schema.

Flags, their help, config.json and its validation are derived here. A setting is a keyword-only parameter of
a function, or a field of a Flax module or dataclass, whose type is plain: int, float, str, bool, Literal,
tuples of these, and unions of these with None. Members of a union that are not plain are ignored.
"""

import collections
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import docstring_parser
import msgspec

from jaxmeta.checks import ArgumentError, format_value
from jaxmeta.declare import parent_of

MISSING = inspect.Parameter.empty
_SCALARS = (int, float, str, bool)
_POINTER = re.compile(r"[;,]? (see|as of) `(jm|jaxmeta)\.[\w.]+`")
# Fields that every Flax module has.
_OF_MODULES = ("parent", "name")


class Setting(NamedTuple):
    """One setting.

    Attributes:
      name: name in Python, in config.json and, with hyphens, as a flag.
      hint: type, without members that are not plain.
      default: default value; `MISSING` where it is required.
      about: description in the docstring, in one line.
    """

    name: str
    hint: Any
    default: Any
    about: str

    @property
    def flag(self) -> str:
        return flag_of(self.name)

    @property
    def help(self) -> str:
        """Return the first sentence of the description, without references to Python names."""
        first = self.about.partition(". ")[0].removesuffix(".")
        return _POINTER.sub("", first)

    def parse(self, text: str) -> Any:
        """Return the value of a flag's text.

        Raises:
          ArgumentError: the text is not a value of the setting's type.
        """
        kinds = members(self.hint)
        if types.NoneType in kinds and text.lower() == "none":
            return None
        if text.lower() == "none" and any(Ellipsis in get_args(kind) for kind in kinds):
            return ()
        for kind in kinds:
            if get_origin(kind) is Literal:
                for value in get_args(kind):
                    if str(value) == text:
                        return value
        plain = [kind for kind in kinds if kind in (int, float, bool)]
        plain += [kind for kind in kinds if get_origin(kind) is tuple]
        for kind in plain:
            parts: Any = [part.strip() for part in text.split(",")] if get_origin(kind) is tuple else text
            try:
                return msgspec.convert(parts, kind, strict=False)
            except msgspec.ValidationError:
                continue
        if str in kinds:
            return text
        raise self.problem(text)

    def check(self, value: Any) -> Any:
        """Return a value of config.json, with lists as tuples.

        Raises:
          ArgumentError: the value does not have the setting's type.
        """
        for kind in members(self.hint):
            if get_origin(kind) is Literal:
                if any(type(choice) is type(value) and choice == value for choice in get_args(kind)):
                    return value
                continue
            try:
                return msgspec.convert(value, kind)
            except msgspec.ValidationError:
                continue
        raise self.problem(value)

    def problem(self, value: Any) -> ArgumentError:
        """Return the error for an invalid value."""
        text = value if isinstance(value, str) else format_value(value)
        return ArgumentError(self.name, f"got {text}; it must be {_spelled(self.hint)}")


def settings_of(function: Callable[..., Any], supplied: Iterable[str] = ()) -> dict[str, Setting]:
    """Return the settings of a factory, a task source, a network or a dataclass, by name.

    Args:
      function: function or class, or a `functools.partial` of one.
      supplied: names of parameters that the caller supplies, which are not settings.

    Returns:
      The settings by name.

    Raises:
      ArgumentError: a parameter without a default is neither plain nor supplied.

    Examples:
      >>> def cavia(network, *, context: int = 5, loss: Callable = max):
      ...     '''Build CAVIA.
      ...
      ...     Args:
      ...       context: number of context parameters. They start at zero.
      ...     '''
      >>> settings_of(cavia)["context"].help
      'number of context parameters'
      >>> list(settings_of(cavia))
      ['context']
    """
    left_out = set(supplied)
    described = descriptions(function)
    settings = {}
    for parameter in parameters(function):
        name = parameter.name
        if name in left_out:
            continue
        hint = _plain(parameter.annotation, parameter.default)
        if hint is None:
            if parameter.default is MISSING:
                raise ArgumentError(
                    name,
                    f"{name_of(function)} requires it, but it is {_annotation(parameter)}, which cannot be a "
                    "flag; give it a default",
                )
            continue
        settings[name] = Setting(name, hint, parameter.default, described.get(name, ""))
    return settings


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the keyword-only parameters of a function, or the fields of a class.

    Raises:
      ArgumentError: an annotation uses a name that is not imported.
    """
    base = function.func if isinstance(function, functools.partial) else function
    try:
        signature = inspect.signature(function, eval_str=not isinstance(function, functools.partial))
    except NameError as error:
        raise ArgumentError(
            name_of(function), f"its annotations cannot be read: {error}; import the names that they use"
        ) from error
    kinds: set[Any] = {inspect.Parameter.KEYWORD_ONLY}
    if isinstance(base, type):
        kinds.add(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    fixed = set(function.keywords) if isinstance(function, functools.partial) else set()
    is_module = isinstance(base, type) and hasattr(base, "apply")
    fields = [
        field
        for field in signature.parameters.values()
        if field.kind in kinds and not (is_module and field.name in _OF_MODULES)
    ]
    if isinstance(function, functools.partial):
        # `inspect` makes parameters after a partial's keywords keyword-only, so the base decides which are
        # settings; their defaults are the partial's.
        names = None if isinstance(base, functools.partial) else {field.name for field in parameters(base)}
        fields = [field for field in fields if names is None or field.name in names]
        hints = {field.name: field.annotation for field in parameters(base)}
        fields = [field.replace(annotation=hints.get(field.name, field.annotation)) for field in fields]
        # Values that the partial fixes and that are not plain cannot be flags.
        fields = [field for field in fields if field.name not in fixed or _is_plain_value(field.default)]
    return fields


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function has a parameter of that name."""
    return name in inspect.signature(function).parameters


@functools.cache
def _documented(function: Callable[..., Any]) -> Mapping[str, str]:
    parsed = docstring_parser.parse(inspect.getdoc(function) or "")
    texts = {}
    for entry in parsed.params:
        for name in entry.arg_name.split(","):
            texts[name.strip()] = " ".join((entry.description or "").split())
    return texts


def descriptions(function: Callable[..., Any]) -> dict[str, str]:
    """Return the descriptions of parameters in a function's docstring and in those it forwards to."""
    base = function.func if isinstance(function, functools.partial) else function
    parent = parent_of(base)
    return {**({} if parent is None else descriptions(parent)), **_documented(base)}


def summary(function: Callable[..., Any]) -> str:
    """Return the first line of a docstring, without its full stop, and without "Build" of a factory."""
    base = function.func if isinstance(function, functools.partial) else function
    line = (inspect.getdoc(base) or "").partition("\n")[0].strip().removesuffix(".")
    built = re.sub(r"^Build (an? )?", "", line)
    return built[:1].upper() + built[1:]


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, or of the function in a partial."""
    base = function.func if isinstance(function, functools.partial) else function
    return getattr(base, "__name__", repr(base))


def defaults_of(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Return the defaults of the settings that have one."""
    return {name: setting.default for name, setting in settings.items() if setting.default is not MISSING}


def checked(group: str, values: Any, settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Return the values of a group of config.json after checking them.

    Raises:
      ArgumentError: the values are not a dictionary of exactly these settings, or a value has another type.
    """
    if not isinstance(values, dict):
        raise ArgumentError(group, f"got {format_value(values)}; it must be a dictionary of settings")
    for name in values:
        if name not in settings:
            raise ArgumentError(f"{group}.{name}", f"is unknown; the settings are {_list(settings)}")
    for name in settings:
        if name not in values:
            raise ArgumentError(f"{group}.{name}", "is missing")
    return {name: settings[name].check(values[name]) for name in settings}


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def flag_names(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return the flags of all settings by group and name; a name in several groups has its group as prefix.

    Examples:
      >>> flag_names({"learner": {"inner_steps": 1, "norm": 2}, "network": {"norm": 3}})["learner"]
      {'inner_steps': '--inner-steps', 'norm': '--learner.norm'}
    """
    counts = collections.Counter(name for settings in groups.values() for name in settings)
    return {
        group: {name: flag_of(name if counts[name] == 1 else f"{group}.{name}") for name in settings}
        for group, settings in groups.items()
    }


def members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _spelled(hint: Any) -> str:
    """Return a type in words, for errors."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    parts = []
    for kind in members(hint):
        if kind is types.NoneType:
            parts.append("none")
        elif get_origin(kind) is Literal:
            parts.append(f"one of {', '.join(map(str, get_args(kind)))}")
        elif get_origin(kind) is tuple:
            inner = get_args(kind)[0]
            count = "" if Ellipsis in get_args(kind) else f"{len(get_args(kind))} "
            plural = {int: "whole numbers", float: "numbers", str: "words"}.get(inner, "values")
            parts.append(f"{count}{plural} separated by commas")
        else:
            parts.append(words[kind])
    return " or ".join(parts)


def metavar(hint: Any) -> str:
    """Return the placeholder of a type's value in help."""
    names = {int: "N", float: "X", str: "TEXT", bool: "BOOL"}
    parts = []
    for kind in members(hint):
        if get_origin(kind) is Literal:
            parts.append("{" + ",".join(map(str, get_args(kind))) + "}")
        elif get_origin(kind) is tuple:
            inner, rest = get_args(kind)[0], get_args(kind)[1:]
            each = names.get(inner, "VALUE")
            parts.append(f"{each},…" if Ellipsis in rest else ",".join([each] * (1 + len(rest))))
        elif kind is not types.NoneType:
            parts.append(names[kind])
    return "|".join(parts)


def shown_value(value: Any) -> str:
    """Return a setting's value as the text of a flag."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) or "none"
    # `repr` has all digits, so that the text parses to the same number.
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _annotation(parameter: inspect.Parameter) -> str:
    hint = parameter.annotation
    return "not annotated" if hint is MISSING else f"of type {getattr(hint, '__name__', hint)}"


def _is_plain_value(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain_value, value))
    return value is None or type(value) in _SCALARS


def _plain(hint: Any, default: Any) -> Any:
    """Return the plain part of a type, or None where it has none."""
    if hint is MISSING:
        # The default gives the type of a user-defined parameter without an annotation.
        hint = type(default) if type(default) in _SCALARS else None
    kinds = [kind for kind in map(_plain_member, members(hint)) if kind is not None]
    if not kinds or set(kinds) == {types.NoneType}:
        return None
    if not (default is MISSING or _is_plain_value(default) or isinstance(default, Sequence)):
        return None
    return functools.reduce(lambda a, b: a | b, kinds) if len(kinds) > 1 else kinds[0]


def _plain_member(kind: Any) -> Any:
    if kind is types.NoneType or kind in _SCALARS or get_origin(kind) is Literal:
        return kind
    if get_origin(kind) is tuple:
        inner = [each for each in get_args(kind) if each is not Ellipsis]
        return kind if inner and all(each in _SCALARS for each in inner) else None
    if get_origin(kind) is Sequence and get_args(kind)[0] in _SCALARS:
        return tuple[get_args(kind)[0], ...]  # type: ignore[misc]
    return None
