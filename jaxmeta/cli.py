"""The command line: `jaxmeta train`, `evaluate`, `transfer`, `rank`, …; nothing imports it."""

import contextlib
import dataclasses
import difflib
import io
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, TypedDict, get_args

import tyro

EXIT_OTHER, EXIT_USER, EXIT_STOPPED = 1, 2, 75


def _flag(text: str, unit: str | None = None, default: str = "(default: the preset's)") -> Any:
    return tyro.conf.arg(help=text, metavar=unit, help_behavior_hint=default)


class TrainFlags(TypedDict, total=False):
    """What `train` was told; what it was not told is the preset's."""

    tasks: Annotated[str, _flag("where tasks come from; see `jaxmeta tasks`", "NAME", "(default: glyphs)")]
    preset: Annotated[
        str, _flag("a protocol by name; see `jaxmeta presets`", "NAME", "(default: the one of --tasks)")
    ]
    data: Annotated[
        str,
        _flag("folder with the data set's files", "DIR", "(default: the cache, or a download)"),
    ]
    ways: Annotated[int, _flag("classes per task, at test and in training", "N")]
    shots: Annotated[int, _flag("support examples per class (per task in regression)", "K")]
    queries: Annotated[int, _flag("query examples per class (per task in regression)", "Q")]
    train_ways: Annotated[int, _flag("--ways in training only", "N", "(default: --ways, or the preset's)")]
    train_shots: Annotated[int, _flag("--shots in training only", "K", "(default: --shots, or the preset's)")]
    train_queries: Annotated[
        int, _flag("--queries in training only", "Q", "(default: --queries, or the preset's)")
    ]
    protocol: Annotated[str, _flag("class split of omniglot: vinyals, maml, reptile, lake, …", "NAME")]
    rotations: Annotated[
        Literal["none", "classes", "random"],
        _flag(
            "images turned by 90° as extra classes, or one rotation per drawn class",
            default="(default: the protocol's, or none)",
        ),
    ]
    image_size: Annotated[
        int,
        _flag(
            "side of omniglot's images, or of one's own, in pixels",
            "N",
            "(default: 28; the smallest image's shorter side, at most 84)",
        ),
    ]
    channels: Annotated[
        Literal[1, 3],
        _flag("1: one's own images as grey ones, 3: in colour", default="(default: as the files are)"),
    ]
    label: Annotated[
        str, _flag("tfds: feature that names the class", "NAME", "(default: the label of the data set)")
    ]
    tfds_splits: Annotated[str, _flag("tfds: splits of the data set to pool", "A,B,…", "(default: all)")]
    classes: Annotated[
        str,
        _flag(
            "class split of one's own images: fractions of train, validation and test, or a JSON file "
            "with lists of names under these keys",
            "A,B,C|FILE",
            "(default: 0.64,0.16,0.2)",
        ),
    ]
    split_seed: Annotated[int, _flag("of a class split by fractions", "S", "(default: 0)")]
    workers: Annotated[int, _flag("processes that read a stream", "N", "(default: 0, threads)")]
    network: Annotated[
        str,
        _flag(
            "strided-conv4, strided-conv4-flat, conv4, conv4-32, resnet12, mlp, koch (105x105), relation; of "
            "mann: lrua, lrua-feed-forward, ntm, lstm, feed-forward; of metanet: augmented-cnn, "
            "augmented-cnn-32",
            "NAME",
            "(default: the preset's)",
        ),
    ]
    precision: Annotated[
        Literal["float32", "bfloat16"],
        _flag("what the network computes in; parameters and gradients stay in float32"),
    ]
    norm: Annotated[
        Literal["batch", "support", "episode"],
        _flag(
            "whose statistics normalise the queries in training: support for `jaxmeta predict` (of "
            "lstm_meta_learner: episode; metric-based methods need none)"
        ),
    ]
    order: Annotated[
        Literal["second", "first", "implicit"],
        _flag(
            "whether the meta-gradient goes through the inner gradients, takes them for constants, or is "
            "that of the minimum (needs --proximal)"
        ),
    ]
    memory: Annotated[
        Literal["auto", "store", "recompute", "forward_over_reverse"],
        _flag("what the meta-gradient keeps of each inner step: all, or what it takes to run the step again"),
    ]
    truncation: Annotated[int, _flag("inner steps between cuts of the meta-gradient", "K")]
    inner_steps: Annotated[int, _flag("gradient steps on the support set in training", "T")]
    eval_steps: Annotated[int, _flag("gradient steps on the support set at validation and test", "T")]
    inner_lr: Annotated[
        float, _flag("step size of those steps, for the mean loss; the first one where it is learned", "α")
    ]
    inner_batch: Annotated[int, _flag("support examples in each of those steps", "N")]
    proximal: Annotated[float, _flag("weight of ½‖φ − θ‖² in the inner loss", "λ")]
    cg_steps: Annotated[int, _flag("steps of conjugate gradients, with --order implicit or imaml", "N")]
    damping: Annotated[float, _flag("added to the identity that they invert", "D")]
    anneal: Annotated[
        float,
        _flag("maml_plus_plus: part of the meta-steps until the last inner step's loss alone counts", "P"),
    ]
    first_order: Annotated[float, _flag("maml_plus_plus: part of the meta-steps in first order", "P")]
    divergence: Annotated[
        Literal["euclidean", "kl", "cosine"], _flag("prototypical: of embeddings from prototypes")
    ]
    similarity: Annotated[
        Literal["cosine", "dot", "euclidean", "learned"], _flag("kernel_classifier: of two embeddings")
    ]
    reduce: Annotated[
        Literal["sum", "mean", "nearest", "prototype"],
        _flag("kernel_classifier: what a class has of its examples' kernels"),
    ]
    head: Annotated[Literal["linear", "cosine"], _flag("fine_tuned_head: Baseline, or Baseline++")]
    scale: Annotated[float, _flag("of cosines, before the softmax", "S")]
    context_steps: Annotated[
        int, _flag("matching: full context embeddings, by that many attention steps", "K", "(default: none)")
    ]
    sequence: Annotated[
        int,
        _flag("mann: the support set is a sequence of that many steps, labels one step late", "T", ""),
    ]
    strings: Annotated[
        str, _flag("mann: labels are strings, of so many letters and characters", "L,C", "(default: classes)")
    ]
    embedding_loss: Annotated[
        Literal["xent", "contrastive", "verification"],
        _flag("metanet: of the embedding, whose gradients become its fast weights"),
    ]
    task_weights: Annotated[
        Literal["none", "embedding", "both"],
        _flag("metanet: which networks have fast weights of the task: MetaNet-, MetaNet, MetaNet+"),
    ]
    outer_lr: Annotated[float, _flag("step size of the meta-optimizer (Adam, of reptile SGD)", "β")]
    schedule: Annotated[Literal["constant", "cosine", "linear"], _flag("of --outer-lr over the run")]
    clip: Annotated[float, _flag("largest absolute value of an entry of the meta-gradient", "C")]
    steps: Annotated[int, _flag("meta-steps", "N")]
    meta_batch: Annotated[int, _flag("tasks per meta-step", "B")]
    episodes: Annotated[int, _flag("test tasks", "E")]
    validate_every: Annotated[int, _flag("meta-steps between validations and between checkpoints", "N")]
    seed: Annotated[int, _flag("of initial parameters and episodes", "S", "(default: 0)")]
    strategy: Annotated[
        str, _flag("how a device goes through its tasks: auto, vmap, scan, or that many at once", "NAME|N")
    ]
    non_finite: Annotated[
        Literal["stop", "skip"],
        _flag("stop: a loss that is no longer finite ends the run; skip: such a meta-step leaves no trace"),
    ]
    devices: Annotated[
        int, _flag("devices that share the tasks; on CPUs, cores", "N", "(default: as many as are of use)")
    ]
    mesh: Annotated[
        str,
        _flag(
            "how devices share the work: tasks=8, or with parameters split as well tasks=4,params=2",
            "AXIS=N,…",
            "(default: tasks, by --devices)",
        ),
    ]
    out: Annotated[str, _flag("the run's folder", "DIR", "(default: runs/<learner>-<tasks>-<date and time>)")]


@dataclasses.dataclass
class Train:
    """Meta-trains a learner and evaluates it on test tasks.

    With nothing else, trains MAML on drawn characters. The run's folder gets config.json,
    metrics.jsonl, tensorboard/, checkpoints/, curve.png, report.json, report.md and episodes.json.
    """

    flags: Annotated[TrainFlags, tyro.conf.arg(name="")]
    learner: Annotated[
        tyro.conf.Positional[str | None],
        _flag("the method; see `jaxmeta learners`", "[LEARNER]", "(default: maml)"),
    ] = None
    stream: Annotated[
        bool, _flag("read images from disk step by step: for data larger than the device", default="")
    ] = False
    skip_unreadable: Annotated[bool, _flag("leave out images that cannot be read", default="")] = False
    diagnose: Annotated[
        bool,
        _flag(
            "report cosine and ratio of norms between the meta-gradient and the first-order one", default=""
        ),
    ] = False
    distort: Annotated[
        bool,
        _flag("metric- and model-based: turn, shear, scale and shift training images at random", default=""),
    ] = False
    within_alphabet: Annotated[
        bool, _flag("omniglot: tasks of one alphabet, queries drawn by other hands", default="")
    ] = False
    coordinator: Annotated[
        str | None,
        _flag("several processes, each with its own --process: where the first one is", "HOST:PORT", ""),
    ] = None
    processes: Annotated[int | None, _flag("how many they are", "N", "")] = None
    process: Annotated[int | None, _flag("which of them this is, from 0", "I", "")] = None
    distributed: Annotated[
        bool, _flag("several processes, as Slurm, Kubernetes or a TPU pod started them", default="")
    ] = False
    profile: Annotated[
        bool, _flag("JAX's profiler watches some meta-steps: profile/ in the run's folder", default="")
    ] = False
    resume: Annotated[bool, _flag("continue the run in --out from its last checkpoint", default="")] = False


class EvaluateFlags(TypedDict, total=False):
    """What `evaluate` was told; what it was not told is as in training."""

    episodes: Annotated[int, _flag("test tasks", "E", "(default: the run's)")]
    ways: Annotated[int, _flag("classes per task", "N", "(default: the run's)")]
    shots: Annotated[
        int, _flag("support examples per class (per task in regression)", "K", "(default: the run's)")
    ]
    queries: Annotated[
        int, _flag("query examples per class (per task in regression)", "Q", "(default: the run's)")
    ]
    eval_steps: Annotated[int, _flag("gradient steps on the support set", "T", "(default: the run's)")]
    seed: Annotated[
        int, _flag("of the test episodes", "S", "(default: the run's, the episodes of its report)")
    ]
    data: Annotated[str, _flag("folder with the data set's files", "DIR", "(default: the run's)")]
    devices: Annotated[int, _flag("devices that share the episodes; on CPUs, cores", "N", "(default: all)")]
    mesh: Annotated[
        str,
        _flag("how devices share the work: params=2 splits parameters", "AXIS=N,…", "(default: --devices)"),
    ]
    json: Annotated[str, _flag("also write the result here", "FILE", "(default: only print)")]


@dataclasses.dataclass
class Evaluate:
    """Evaluates a run's parameters on test tasks: those of its report, or others by `--seed`."""

    flags: Annotated[EvaluateFlags, tyro.conf.arg(name="")]
    run: Annotated[tyro.conf.Positional[str], _flag("the run's folder", "RUN", "(required)")]


class CompareFlags(TrainFlags, total=False):
    """`train`'s flags, for every learner that has such a setting."""

    out: Annotated[  # type: ignore[misc]  # the same flag, of another folder
        str,
        _flag("the comparison's folder", "DIR", "(default: runs/compare-<learners>-<tasks>-<date and time>)"),
    ]


@dataclasses.dataclass
class Compare:
    """Trains learners on the same tasks at the same budget, and compares them on the same test tasks.

    One process a learner, one after the other. The comparison's folder gets a run's folder for
    each, comparison.md, comparison.png and comparison.json. A flag that only some of the learners
    have a setting for goes to those.
    """

    flags: Annotated[CompareFlags, tyro.conf.arg(name="")]
    learners: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        _flag("two or more; the others are compared to the first", "LEARNER LEARNER …", "(required)"),
    ] = ()
    stream: Annotated[
        bool, _flag("read images from disk step by step: for data larger than the device", default="")
    ] = False
    skip_unreadable: Annotated[bool, _flag("leave out images that cannot be read", default="")] = False
    distort: Annotated[
        bool,
        _flag("metric- and model-based: turn, shear, scale and shift training images at random", default=""),
    ] = False
    within_alphabet: Annotated[
        bool, _flag("omniglot: tasks of one alphabet, queries drawn by other hands", default="")
    ] = False
    resume: Annotated[
        bool, _flag("continue the comparison in --out; give its learners and flags again", default="")
    ] = False


@dataclasses.dataclass
class Plot:
    """Draws the learning curves of runs, finished or not, as one PNG."""

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]], _flag("their folders", "RUN [RUN …]", "(required)")
    ] = ()
    out: Annotated[str, _flag("the figure, where there is no file yet", "FILE", "(default: curves.png)")] = (
        "curves.png"
    )
    x: Annotated[Literal["steps", "seconds"], _flag("against what", default="(default: steps)")] = "steps"


@dataclasses.dataclass
class Predict:
    """Learns classes from folders of images, and names other images by them.

    Each image is judged by itself: the answer does not depend on which others are asked.
    """

    run: Annotated[tyro.conf.Positional[str], _flag("the folder of a run on images", "RUN", "(required)")]
    support: Annotated[
        str, _flag("images to learn from, one subfolder a class, named as it", "DIR", "(required)")
    ]
    query: Annotated[str, _flag("images to name, or a single one", "DIR", "(required)")]
    json: Annotated[str | None, _flag("also write the answers here", "FILE", "(default: only print)")] = None
    invert: Annotated[
        bool,
        _flag(
            "turn dark to light in all images",
            default="(default: where the run's images are strokes and --support has them the other way)",
        ),
    ] = False
    skip_unreadable: Annotated[bool, _flag("leave out images that cannot be read", default="")] = False


class TargetFlags(TypedDict, total=False):
    """How a target's images are read and brought to a source, of `transfer` and `rank`."""

    data: Annotated[
        str, _flag("folder with the target's files", "DIR", "(default: the cache, or a download)")
    ]
    shots: Annotated[
        str,
        _flag(
            "random examples of each class to learn from; all others are scored. all: four fifths of each",
            "K|all",
            "(default: 20, at most four fifths of the smallest class)",
        ),
    ]
    image_size: Annotated[
        int,
        _flag(
            "side of the images that the source is given, in pixels",
            "N",
            "(default: what it was trained on; where it does not say, 224 of ResNet files, or the target's)",
        ),
    ]
    channels: Annotated[
        Literal[1, 3],
        _flag("1: it is given grey images, 3: colour", default="(default: what it was trained on)"),
    ]
    pixels: Annotated[
        Literal["plain", "imagenet", "symmetric"],
        _flag(
            "plain: in [0, 1]; imagenet: less ImageNet's mean, by its standard deviation; symmetric: in "
            "[-1, 1]",
            default="(default: as the source was trained)",
        ),
    ]
    network: Annotated[
        str,
        _flag(
            "of a file that does not say of which network it is, or with nothing learned: a name as of "
            "`train`",
            "NAME",
            "(default: none)",
        ),
    ]
    protocol: Annotated[
        str, _flag("class split of omniglot, whose test classes are the target", "NAME", "(default: vinyals)")
    ]
    label: Annotated[
        str, _flag("tfds: feature that names the class", "NAME", "(default: the label of the data set)")
    ]
    tfds_splits: Annotated[str, _flag("tfds: splits of the data set to pool", "A,B,…", "(default: all)")]
    seed: Annotated[int, _flag("of the examples, the new head and mini-batches", "S", "(default: 0)")]


class RecipeFlags(TypedDict, total=False):
    """How `transfer` learns."""

    recipe: Annotated[
        Literal["feature-extraction", "linear-probe", "fine-tune", "lp-ft", "gradual", "scratch"],
        _flag(
            "feature-extraction: the body frozen, a ridge head in closed form; linear-probe: likewise, a "
            "logistic head; fine-tune: body and a new head together; lp-ft: a linear probe, then "
            "fine-tuning; gradual: unfreezing from the head down, at rates that fall by 2.6 a group; "
            "scratch: the source's network with nothing learned",
            default="(default: lp-ft; with --source none, scratch)",
        ),
    ]
    train: Annotated[
        str,
        _flag(
            "parts of the body that fine-tune and lp-ft train beside the head, such as body/ConvNorm_3: "
            "paths as in report.md without params/, with * within a name and ** across",
            "PATTERN,…",
            "(default: all)",
        ),
    ]
    l2_sp: Annotated[
        float,
        _flag("weight of ½‖w − w⁰‖², which pulls the body towards the source's", "α", "(default: none)"),
    ]


class DescentFlags(TypedDict, total=False):
    """Training of `transfer`, and of `rank --fine-tune`."""

    steps: Annotated[
        int, _flag("mini-batches", "N", "(default: ten epochs, at least 200; of rank --fine-tune 100)")
    ]
    rate: Annotated[
        float,
        _flag(
            "largest step size of Adam, which falls to zero",
            "η",
            "(default: 0.001, of ResNet and ViT files 0.0001; of gradual ten times that)",
        ),
    ]
    batch: Annotated[int, _flag("examples in each mini-batch", "B", "(default: 32)")]


class TransferFlags(RecipeFlags, DescentFlags, TargetFlags, total=False):
    """What `transfer` was told beside source and target."""

    out: Annotated[
        str,
        _flag("the transfer's folder", "DIR", "(default: runs/transfer-<source>-<target>-<date and time>)"),
    ]


@dataclasses.dataclass
class Transfer:
    """Learns labelled images from what a source has learned, and says how well.

    The folder gets report.md, report.json, config.json, confusion.png and weights.safetensors, and can be a
    --source again.
    """

    source: Annotated[
        str,
        _flag(
            "a folder of `train` or `transfer`; a .safetensors or .msgpack file; a folder of Hugging Face's "
            "save_pretrained, or hf:owner/name; none: nothing, with --network",
            "RUN|FILE",
            "(required)",
        ),
    ]
    target: Annotated[
        str,
        _flag("where labelled images come from, as `train --tasks`: all classes", "NAME", "(required)"),
    ]
    flags: Annotated[TransferFlags, tyro.conf.arg(name="")]
    skip_unreadable: Annotated[bool, _flag("leave out images that cannot be read", default="")] = False


class RankFlags(TargetFlags, DescentFlags, total=False):
    """What `rank` was told beside sources and target."""

    json: Annotated[str, _flag("also write the table here", "FILE", "(default: only print)")]


@dataclasses.dataclass
class Rank:
    """Ranks sources by how well they promise to transfer to a target, without training.

    Scores by the features of the examples to learn from; leep and nce by the classes that the source was
    trained on, where it was an ordinary classifier.
    """

    sources: Annotated[
        tuple[str, ...], _flag("two or more, as of `transfer`", "RUN|FILE RUN|FILE …", "(required)")
    ]
    target: Annotated[
        str,
        _flag("where labelled images come from, as `train --tasks`: all classes", "NAME", "(required)"),
    ]
    flags: Annotated[RankFlags, tyro.conf.arg(name="")]
    score: Annotated[
        Literal["log_me", "h_score", "leep", "nce"], _flag("to order by", default="(default: log_me)")
    ] = "log_me"
    fine_tune: Annotated[
        bool,
        _flag("also fine-tune each briefly (lp-ft), to see which score would have told", default=""),
    ] = False
    skip_unreadable: Annotated[bool, _flag("leave out images that cannot be read", default="")] = False


@dataclasses.dataclass
class Presets:
    """Lists the presets: whole trainings by name."""


@dataclasses.dataclass
class Tasks:
    """Lists where tasks may come from."""


@dataclasses.dataclass
class Learners:
    """Lists the methods."""


_COMMANDS: dict[str, Any] = {
    "train": Train,
    "evaluate": Evaluate,
    "compare": Compare,
    "plot": Plot,
    "predict": Predict,
    "transfer": Transfer,
    "rank": Rank,
    "presets": Presets,
    "tasks": Tasks,
    "learners": Learners,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
      0 done, 2 the user's input is at fault, 75 stopped by a signal after saving, 1 anything else.
    """
    try:
        command = _parse(sys.argv[1:] if argv is None else argv)
        if command is not None:
            with _warnings_in_one_line():
                _run(command)
        return 0
    except KeyboardInterrupt as stop:
        return _say(f"stopped: {stop or 'interrupted'}", EXIT_STOPPED)
    except SystemExit as ended:  # a process of ours, which has said why
        return int(ended.code or 0)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
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
    """`main` as a program."""
    status = main()
    if status and "jaxmeta.training" in sys.modules:
        from jaxmeta.training import hosts

        hosts.leave_at_once(status)
    sys.exit(status)


def _parse(argv: Sequence[str]) -> Any:
    """A command, or None where its help was printed."""
    if argv and not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        from jaxmeta.settings import known

        raise ValueError(f"there is no command {argv[0]!r}; {known(argv[0], _COMMANDS)}")
    if argv and not argv[0].startswith("-"):
        _check_flags(argv[0], argv[1:])
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(
                _COMMANDS,
                args=list(argv),
                prog="jaxmeta",
                description="Learning from few examples, in JAX. `jaxmeta train` trains MAML in minutes.",
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as exit:
        if not exit.code:
            return None
        raise ValueError(_one_line(complaint.getvalue())) from None


def _check_flags(command: str, argv: Sequence[str]) -> None:
    """Refuses a flag that the command does not have, and names those like it."""
    fields = {field.name: field.type for field in dataclasses.fields(_COMMANDS[command])}
    names = set(fields) - {"flags", "learner", "learners", "run", "runs"}
    if "flags" in fields:
        names |= set(get_args(fields["flags"])[0].__annotations__)
    flags = {"--help", *("--" + name.replace("_", "-") for name in names)}
    for word in argv:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in flags:
            close = difflib.get_close_matches(flag, sorted(flags), n=3)
            meant = f"did you mean {' or '.join(close)}? See" if close else "see"
            raise ValueError(f"{command} has no {flag}; {meant} `jaxmeta {command} --help`")


def _one_line(box: str) -> str:
    """The message in tyro's box, whose first paragraphs say what is wrong."""
    words: list[str] = []
    for line in box.splitlines()[1:]:
        content = line.strip("│╭╰╮╯ ")
        if content.startswith(("For full helptext", "Argument helptext")):
            break
        words.append(content.strip("─"))
    return " ".join(words)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Our warnings are for the user of the command, who has no use for a line of our code."""
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


def _run(command: Any) -> None:
    from jaxmeta import comparison, prediction, presets, registry, runs, sources, transferring

    match command:
        case Train():
            runs.train_run(_given(command), command.learner, command.resume)
        case Evaluate():
            runs.evaluate_run(command.run, dict(command.flags))
        case Compare():
            comparison.compare_runs(command.learners, _given(command), command.resume)
        case Plot():
            comparison.plot_runs(command.runs, command.out, command.x)
        case Predict():
            prediction.predict_run(**dataclasses.asdict(command))
        case Transfer():
            transferring.transfer_run(command.source, command.target, _given(command))
        case Rank():
            transferring.rank_run(
                command.sources, command.target, command.score, command.fine_tune, _given(command)
            )
        case Presets():
            _print_table(
                (name, f"{preset.learner} on {preset.tasks}", preset.description)
                for name, preset in presets.PRESETS.items()
            )
        case Tasks():
            _print_table((name, source.description) for name, source in sources.TASKS.items())
        case Learners():
            _print_table((name, spec.family, spec.description) for name, spec in registry.LEARNERS.items())


def _given(command: Train | Compare | Transfer | Rank) -> dict[str, Any]:
    """The flags that were given; a switch that is off was not."""
    names = ("stream", "skip_unreadable", "diagnose", "distort", "within_alphabet", "distributed", "profile")
    switches = {name: True for name in names if getattr(command, name, False)}
    which = {name: getattr(command, name, None) for name in ("coordinator", "processes", "process")}
    return {**command.flags, **switches, **{name: it for name, it in which.items() if it is not None}}


def _print_table(rows: Iterable[tuple[str, ...]]) -> None:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    program()
