"""Entry point of the command line: `jaxmeta train`, `evaluate`, `transfer`, `rank`, …"""

import contextlib
import importlib
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from jaxmeta.checks import MissingPackageError
from jaxmeta.cli import output
from jaxmeta.cli.signals import EXIT_OTHER, EXIT_STOPPED, EXIT_USER, Signals

# Module and description of each command. A module is imported when its command runs, to start quickly.
COMMANDS = {
    "train": ("commands", "meta-train a learner and evaluate it on test tasks"),
    "evaluate": ("commands", "evaluate a run on test tasks: those of its report, or others"),
    "compare": ("commands", "train learners on the same tasks at the same budget, and compare them"),
    "plot": ("compare", "draw the learning curves of runs"),
    "predict": ("predict", "classify images by a source's classes, or by classes with a folder of examples"),
    "export": ("classifier", "write a classifier as a program that runs without jaxmeta"),
    "transfer": ("commands", "train a classifier of labelled images on a source's backbone"),
    "rank": ("commands", "rank sources by their estimated transferability to a target"),
    "presets": ("describe", "list the protocols, or describe one"),
    "tasks": ("describe", "list the sources of tasks, or describe one"),
    "learners": ("describe", "list the methods, or describe one"),
    "networks": ("describe", "list the networks, or describe one"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
      argv: words of the command line; None for those of this process.

    Returns:
      The exit status: 0 done, 2 usage error, 75 stopped by a signal after saving, 1 anything else.
    """
    with output.forgiving() as out:
        status = _status(sys.argv[1:] if argv is None else argv)
        out.flush()
        if out.failed:
            message = f"error: not all of the output could be written ({out.error})"
            status = _say(f"{message}; the files written are whole", status or EXIT_OTHER)
        return status


def _status(argv: Sequence[str]) -> int:
    """Run a command, print an error in one line on standard error, and return the exit status."""
    try:
        with _warnings_in_one_line(), Signals(None).handled():
            _run(argv)
        return 0
    except KeyboardInterrupt as stop:
        # A message says how to continue; without one nothing was saved.
        return _say(f"stopped: {str(stop) or 'interrupted'}", EXIT_STOPPED if str(stop) else EXIT_OTHER)
    except SystemExit as ended:  # a subprocess has printed its error
        return int(ended.code or 0)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        return _say(f"error: {error}{_place(error)}", EXIT_USER)
    except MissingPackageError as error:
        return _say(f"error: {error}", EXIT_USER)
    except (FloatingPointError, OSError) as error:
        return _say(f"error: {error}", EXIT_OTHER)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            advice = "try fewer tasks at once (--strategy scan), or images from disk (--stream)"
            return _say(f"error: out of memory on the device; {advice}: {error}", EXIT_OTHER)
        traceback.print_exc()
        return EXIT_OTHER


def program() -> None:
    """Run `main` as a program."""
    output.reserve_descriptors()
    status = main()
    if status and "jaxmeta.training" in sys.modules:
        from jaxmeta.training import hosts

        hosts.leave_at_once(status)
    sys.exit(status)


def _run(argv: Sequence[str]) -> None:
    from jaxmeta.cli.parser import HelpShown, UsageError, call

    if not argv or argv[0] in ("-h", "--help"):
        _print_help()
        return
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"jaxmeta {version('jaxmeta')}, jax {version('jax')}")
        return
    if argv[0] not in COMMANDS:
        from jaxmeta.cli.names import known

        raise UsageError(f"there is no command {argv[0]!r}; {known(argv[0], COMMANDS)}")
    module, _ = COMMANDS[argv[0]]
    function = getattr(importlib.import_module(f"jaxmeta.cli.{module}"), argv[0])
    with contextlib.suppress(HelpShown):
        if module == "commands":
            # These commands parse their own flags, which depend on names.
            function(argv[1:])
        else:
            call(function, argv[0], argv[1:])


def _print_help() -> None:
    from jaxmeta.cli.parser import print_table

    print("usage: jaxmeta COMMAND …, jaxmeta COMMAND --help, jaxmeta --version\n")
    print("Learning from few examples, in JAX. `jaxmeta train` trains MAML in minutes.\n")
    print_table((f"  {name}", about) for name, (_, about) in COMMANDS.items())


def _place(error: BaseException) -> str:
    """Return the place in user-defined code that raised an error, to append to its message."""
    if "jaxmeta.cli.names" not in sys.modules:
        return ""
    place = sys.modules["jaxmeta.cli.names"].find_in_user_code(error)
    return "" if place is None or place in str(error) else f" ({place})"


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print each warning of jaxmeta once and in one line, without the line of code that raised it."""
    printed = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        del category, where, more
        if str(message) not in printed:
            printed.add(str(message))
            _say(f"warning: {message}", 0)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", module="jaxmeta")
        # jaxmeta's own warning names an image that cannot be read.
        warnings.filterwarnings("ignore", module="PIL")
        warnings.showwarning = show
        yield


def _say(message: str, status: int) -> int:
    print("jaxmeta:", " ".join(message.split()), file=sys.stderr)
    return status
