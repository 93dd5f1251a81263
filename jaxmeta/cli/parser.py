"""Parsers built from settings: flags in groups, one-line errors, and hints for other libraries' flags."""

import argparse
import contextlib
import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxmeta.checks import ArgumentError
from jaxmeta.cli import names, schema
from jaxmeta.cli.schema import Setting

# Flags of other libraries, and their names here.
ELSEWHERE = {
    "--lr": "--outer-lr or --inner-lr",
    "--learning-rate": "--outer-lr or --inner-lr",
    "--meta-lr": "--outer-lr",
    "--alpha": "--inner-lr",
    "--beta": "--outer-lr",
    "--rate": "--inner-lr or --outer-lr",
    "--epochs": "--steps",
    "--iterations": "--steps",
    "--iters": "--steps",
    "--batch-size": "--meta-batch",
    "--image-size": "--size",
    "--way": "--ways",
    "--n-way": "--ways",
    "--num-ways": "--ways",
    "--shot": "--shots",
    "--k-shot": "--shots",
    "--num-shots": "--shots",
    "--query": "--queries",
    "--dataset": "--tasks",
    "--model": "--network",
    "--backbone": "--network",
    "--optimizer": "--outer-optimizer",
    "--scheduler": "--schedule",
    "--grad-clip": "--clip or --clip-norm",
    "--adaptation-steps": "--inner-steps",
    "--output": "--out",
    "--checkpoint": "--out with --resume",
    "--anneal": "--anneal-steps",
    "--first-order": "--order first",
}
# Arguments of the library that have another name on the command line.
_FLAG_NAMES = {"path": "tasks", "length": "sequence"}


class UsageError(ValueError):
    """An invalid command line; the message names flags."""


class HelpShown(Exception):
    """Help was printed, and the command ends."""


class Group(NamedTuple):
    """Flags under one heading.

    Attributes:
      name: name of the group in a configuration.
      title: heading in help.
      settings: settings by name.
      defaults: defaults by name, in place of the signature's.
    """

    name: str
    title: str
    settings: Mapping[str, Setting]
    defaults: Mapping[str, Any]


class ParsedArguments(NamedTuple):
    """A parsed command line.

    Attributes:
      values: values of flags, by group and name.
      texts: text of the value of each flag, None for a switch.
      words: positional arguments.
    """

    values: dict[str, dict[str, Any]]
    texts: dict[str, str | None]
    words: list[str]


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)


class Parser:
    """A parser of one command.

    Args:
      command: name of the command.
      groups: groups of flags.
      words: positional arguments as `(name, nargs, help)`, with `nargs` as in argparse.
      about: description of the command.
      owner: owner of the settings, for errors, such as "maml on glyphs".
    """

    def __init__(
        self,
        command: str,
        groups: Sequence[Group],
        *,
        words: Sequence[tuple[str, str | None, str]] = (),
        about: str = "",
        owner: str | None = None,
    ):
        self.command, self.owner = command, owner or command
        templates = {None: "{}", "?": "[{}]", "*": "{} …"}
        usage = [templates[number].format(name.upper()) for name, number, _ in words]
        self._parser = argparse.ArgumentParser(
            prog=f"jaxmeta {command}",
            usage=" ".join(["jaxmeta", command, *usage, "[FLAGS]"]),
            description=about,
            formatter_class=_Formatter,
            allow_abbrev=False,
            exit_on_error=False,
            add_help=False,
        )
        self._parser.error = self._error  # type: ignore[method-assign,assignment]
        self.words = [name for name, _, _ in words]
        for name, number, help_text in words:
            self._parser.add_argument(name, nargs=number, help=help_text, metavar=name.upper())
        self.flags: dict[str, tuple[str, Setting]] = {}
        owners: dict[str, list[str]] = {}
        for group in groups:
            for name in group.settings:
                owners.setdefault(name, []).append(group.name)
        self.shared: dict[str, list[str]] = {}
        for name, group_names in owners.items():
            if len(group_names) > 1:
                self.shared[schema.flag_of(name)] = [
                    f"--{group}.{schema.flag_of(name)[2:]}" for group in group_names
                ]
                switches = [
                    group.name
                    for group in groups
                    if name in group.settings and group.settings[name].hint is bool
                ]
                if switches:
                    bare = f"--no-{schema.flag_of(name)[2:]}"
                    self.shared[bare] = [f"--no-{group}.{schema.flag_of(name)[2:]}" for group in switches]
        for group in groups:
            section = self._parser.add_argument_group(group.title)
            for name, setting in group.settings.items():
                flag = setting.flag if len(owners[name]) == 1 else f"--{group.name}.{setting.flag[2:]}"
                default = group.defaults.get(name, setting.default)
                self._add(section, flag, f"{group.name}.{name}", setting, default)
                self.flags[flag] = (group.name, setting)
        section.add_argument("-h", "--help", action="store_true", help="show this help")

    def _add(self, section: Any, flag: str, dest: str, setting: Setting, default: Any) -> None:
        suffix = "(required)" if default is schema.MISSING else ""
        if default is not schema.MISSING and default is not None:
            suffix = f"(default: {schema.shown_value(default)})"
        # Docstrings write Python's None, and flags take none.
        about = f"{setting.help.replace('None', 'none')} {suffix}".strip().replace("%", "%%")
        if setting.hint is bool:
            section.add_argument(
                flag, dest=dest, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=about
            )
        else:
            section.add_argument(
                flag,
                dest=dest,
                default=argparse.SUPPRESS,
                metavar=schema.metavar(setting.hint),
                help=about,
            )

    def _error(self, message: str) -> None:
        raise UsageError(_without_prefix(message))

    def parse(self, argv: Sequence[str]) -> ParsedArguments:
        """Parse a command line.

        Raises:
          UsageError: the command does not have a flag, or a value is invalid.
          HelpShown: help was requested, and printed.
        """
        argv = [normalized(word) for word in argv]
        if "-h" in argv or "--help" in argv:
            self._parser.print_help()
            raise HelpShown
        for word in argv:
            flag = word.partition("=")[0]
            if flag in self.shared:
                named = " or ".join(self.shared[flag])
                raise UsageError(f"{flag}: several groups have this setting; give {named}")
            if flag.startswith("--") and flag != "--" and flag not in self.known():
                raise UsageError(self._unknown(flag))
        try:
            parsed_args, left = self._parser.parse_known_args(argv)
        except argparse.ArgumentError as error:
            raise UsageError(_without_prefix(str(error))) from None
        values: dict[str, dict[str, Any]] = {}
        texts: dict[str, str | None] = {}
        by_dest = {f"{group}.{each.name}": (flag, each) for flag, (group, each) in self.flags.items()}
        words: list[str] = []
        for name in self.words:
            word = getattr(parsed_args, name)
            words += word if isinstance(word, list) else [] if word is None else [word]
        for dest, value in vars(parsed_args).items():
            if dest not in by_dest:
                continue
            flag, setting = by_dest[dest]
            try:
                parsed = value if isinstance(value, bool) else setting.parse(value)
            except ArgumentError as error:
                raise UsageError(f"{flag}: {error.problem}") from None
            values.setdefault(self.flags[flag][0], {})[setting.name] = parsed
            switch = flag if value is True else f"--no-{flag[2:]}"
            texts[switch if isinstance(value, bool) else flag] = None if isinstance(value, bool) else value
        return ParsedArguments(values, texts, words + left)

    def known(self) -> set[str]:
        """Return all flags of the command."""
        switches = {f"--no-{flag[2:]}" for flag, (_, setting) in self.flags.items() if setting.hint is bool}
        return {"--help", *self.flags, *switches}

    def check_required(self, parsed: ParsedArguments) -> None:
        """Check that every flag without a default is given.

        Raises:
          UsageError: a flag is missing.
        """
        for flag, (group, setting) in self.flags.items():
            if setting.default is schema.MISSING and setting.name not in parsed.values.get(group, {}):
                raise UsageError(f"{flag}: is missing; see `jaxmeta {self.command} --help`")

    def _unknown(self, flag: str) -> str:
        see = f"see `jaxmeta {self.command} --help`"
        if flag in ELSEWHERE:
            known = [each for each in ELSEWHERE[flag].split(" or ") if each.split()[0] in self.known()]
            if known:
                return f"{self.command} has no {flag}; here it is {' or '.join(known)}; {see}"
        owners = _owners_of(flag)
        if owners and self.command == "evaluate":
            allowed = ", ".join(sorted(self.flags))
            return f"{flag}: is fixed by the run; evaluate takes {allowed}"
        if owners and self.command in ("train", "compare", "transfer", "rank"):
            return f"{flag}: is a setting of {owners}, not of {self.owner}; {see}"
        close = difflib.get_close_matches(flag, sorted(self.known()), n=3)
        hint = f"did you mean {' or '.join(close)}? See" if close else "see"
        return f"{self.command} has no {flag}; {hint} `jaxmeta {self.command} --help`"

    @contextlib.contextmanager
    def naming_flags(self) -> Iterator[None]:
        """Translate an `ArgumentError` into a `UsageError` that names the flag in place of the argument."""
        try:
            yield
        except ArgumentError as error:
            flags = ", ".join(self._as_flag(name) for name in error.name.split(", "))
            raise UsageError(f"{flags}: {error.problem}") from error

    def _as_flag(self, name: str) -> str:
        name = _FLAG_NAMES.get(name, name)
        group, dot, rest = name.rpartition(".")
        for flag, (flag_group, setting) in self.flags.items():
            if setting.name == (rest if dot else name) and (not dot or flag_group == group):
                return flag
        return name.upper() if name in self.words else name


def _owners_of(flag: str) -> str | None:
    """Return the built-in methods, networks or tasks that have a flag, in words; None where none has it."""
    from jaxmeta.cli import sources
    from jaxmeta.cli.config import find_names

    name = flag.removeprefix("--no-").removeprefix("--").replace("-", "_")

    def has(learner: str = "maml", network: str = "conv4", tasks: str = "glyphs") -> bool:
        return any(name in settings for settings in find_names(learner, network, tasks).groups().values())

    # Settings do not depend on the path of a source, so any path will do.
    example_names = {key: f"{key.partition(':')[0]}:x" if ":" in key else key for key in sources.TASKS}
    for owners in (
        [learner for learner in names.LEARNERS if has(learner=learner)],
        [network for network in names.NETWORKS if has(network=network)],
        [key for key, tasks in example_names.items() if has(tasks=tasks)],
    ):
        if owners:
            return ", ".join(owners[:4]) + (" and others" if len(owners) > 4 else "")
    return None


def normalized(word: str) -> str:
    """Return a word of a command line with hyphens in place of underscores in a flag's name."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def of_function(function: Callable[..., Any], command: str, more: Sequence[Group] = ()) -> Parser:
    """Return the parser of a command described by a function's signature, with more groups of flags."""
    words: list[tuple[str, str | None, str]] = []
    described = schema.descriptions(function)
    for parameter in inspect.signature(function).parameters.values():
        about = described.get(parameter.name, "")
        if parameter.kind is parameter.VAR_POSITIONAL:
            words.append((parameter.name, "*", about))
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            words.append((parameter.name, "?", about))
    group = Group("flags", "flags", schema.settings_of(function), {})
    about = schema.summary(function) + "."
    return Parser(command, [group, *more], words=words, about=about)


def call(function: Callable[..., Any], command: str, argv: Sequence[str], more: Sequence[Group] = ()) -> Any:
    """Parse a command line by a function's signature, and call the function.

    Args:
      function: function to call.
      command: name of the command.
      argv: words of the command line.
      more: groups of flags in addition to the signature's. The function takes each as a dictionary, by an
        argument of the group's name.

    Returns:
      The function's result.

    Raises:
      UsageError: the command line is invalid.
      HelpShown: help was requested, and printed.
    """
    parser = of_function(function, command, more)
    parsed = parser.parse(argv)
    parser.check_required(parsed)
    parameters = inspect.signature(function).parameters.values()
    several = any(each.kind is each.VAR_POSITIONAL for each in parameters)
    positional = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    required = [each for each in positional if each.default is each.empty]
    if len(parsed.words) < len(required):
        raise UsageError(
            f"{required[len(parsed.words)].name.upper()}: is missing; see `jaxmeta {command} --help`"
        )
    if not several and len(parsed.words) > len(positional):
        raise UsageError(
            f"unexpected argument {parsed.words[len(positional)]!r}; see `jaxmeta {command} --help`"
        )
    with parser.naming_flags():
        return function(
            *parsed.words,
            **parsed.values.get("flags", {}),
            **{group.name: parsed.values.get(group.name, {}) for group in more},
        )


def _without_prefix(message: str) -> str:
    """Return argparse's message without the prefix "argument"."""
    flag, colon, problem = message.removeprefix("argument ").partition(": ")
    flag = flag.partition(",")[0]
    return f"{flag}: {problem}" if colon else message


def print_table(rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows in aligned columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line.rstrip())
