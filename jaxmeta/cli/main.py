"""The command line: `jaxmeta train`, `evaluate`, `transfer`, `rank`, …"""

import contextlib
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

EXIT_OTHER, EXIT_USER, EXIT_STOPPED = 1, 2, 75


def _train(argv: Sequence[str]) -> None:
    from jaxmeta.cli import commands

    commands.train(argv)


def _evaluate(argv: Sequence[str]) -> None:
    from jaxmeta.cli import commands

    commands.evaluate(argv)


def _compare(argv: Sequence[str]) -> None:
    from jaxmeta.cli import commands

    commands.compare(argv)


def _plot(argv: Sequence[str]) -> None:
    from jaxmeta.cli import compare, parser

    parser.call(compare.plot, "plot", argv)


def _predict(argv: Sequence[str]) -> None:
    from jaxmeta.cli import parser, predict

    parser.call(predict.predict, "predict", argv)


def _transfer(argv: Sequence[str]) -> None:
    from jaxmeta.cli import parser, transfer

    parser.call(transfer.transfer, "transfer", argv)


def _rank(argv: Sequence[str]) -> None:
    from jaxmeta.cli import parser, transfer

    parser.call(transfer.rank, "rank", argv)


def _presets(argv: Sequence[str]) -> None:
    from jaxmeta.cli import describe, parser

    parser.call(describe.presets, "presets", argv)


def _tasks(argv: Sequence[str]) -> None:
    from jaxmeta.cli import describe, parser

    parser.call(describe.tasks, "tasks", argv)


def _learners(argv: Sequence[str]) -> None:
    from jaxmeta.cli import describe, parser

    parser.call(describe.learners, "learners", argv)


def _networks(argv: Sequence[str]) -> None:
    from jaxmeta.cli import describe, parser

    parser.call(describe.networks, "networks", argv)


# Each command, and what it does; what a command needs is imported when it runs.
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_train, "meta-train a learner and evaluate it on test tasks"),
    "evaluate": (_evaluate, "evaluate a run on test tasks: those of its report, or others"),
    "compare": (_compare, "train learners on the same tasks at the same budget, and compare them"),
    "plot": (_plot, "draw the learning curves of runs"),
    "predict": (_predict, "learn classes from folders of images, and name other images by them"),
    "transfer": (_transfer, "learn labelled images from what a source has learned"),
    "rank": (_rank, "rank sources by how well they promise to transfer to a target"),
    "presets": (_presets, "list the protocols, or describe one"),
    "tasks": (_tasks, "list where tasks come from, or describe one source"),
    "learners": (_learners, "list the methods, or describe one"),
    "networks": (_networks, "list the networks, or describe one"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
      0 done, 2 the user's input is at fault, 75 stopped by a signal after saving, 1 anything else.
    """
    try:
        with _warnings_in_one_line():
            _run(sys.argv[1:] if argv is None else argv)
        return 0
    except KeyboardInterrupt as stop:
        return _say(f"stopped: {stop or 'interrupted'}", EXIT_STOPPED)
    except SystemExit as ended:  # a process of ours, which has said why
        return int(ended.code or 0)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        return _say(f"error: {error}{_place(error)}", EXIT_USER)
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
    status = main()
    if status and "jaxmeta.training" in sys.modules:
        from jaxmeta.training import hosts

        hosts.leave_at_once(status)
    sys.exit(status)


def _run(argv: Sequence[str]) -> None:
    from jaxmeta.cli.parser import HelpShown, UsageError

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
    with contextlib.suppress(HelpShown):
        COMMANDS[argv[0]][0](argv[1:])


def _print_help() -> None:
    from jaxmeta.cli.parser import print_table

    print("usage: jaxmeta COMMAND …, jaxmeta COMMAND --help, jaxmeta --version\n")
    print("Learning from few examples, in JAX. `jaxmeta train` trains MAML in minutes.\n")
    print_table((f"  {name}", about) for name, (_, about) in COMMANDS.items())


def _place(error: BaseException) -> str:
    """Return where in one's own code an error comes from, as part of its message."""
    if "jaxmeta.cli.names" not in sys.modules:
        return ""
    place = sys.modules["jaxmeta.cli.names"].place_in_own_code(error)
    return "" if place is None or place in str(error) else f" ({place})"


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print our warnings in one line: the user of a command has no use for a line of our code."""
    said = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        del category, where, more
        if str(message) not in said:
            said.add(str(message))
            _say(f"warning: {message}", 0)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", module="jaxmeta")
        # Of an image that cannot be read we say so ourselves, and by its name.
        warnings.filterwarnings("ignore", module="PIL")
        warnings.showwarning = show
        yield


def _say(message: str, status: int) -> int:
    print("jaxmeta:", " ".join(message.split()), file=sys.stderr)
    return status
