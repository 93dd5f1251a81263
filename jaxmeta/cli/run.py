"""Runs: `jaxmeta train`, `jaxmeta evaluate`, and the output directory of a run."""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from jaxmeta.checks import ArgumentError, check_kind
from jaxmeta.cli import build, folders, names, schema, sources
from jaxmeta.cli import per_class as per_class_report
from jaxmeta.cli.command_line import command_of_config
from jaxmeta.cli.config import INPUT, Config, check, load_config, on_other_tasks
from jaxmeta.cli.data import check_data, check_images, image_spec, images_of, with_image_settings
from jaxmeta.cli.devices import connect, described, machine, mesh_of, peak_memory
from jaxmeta.cli.figures import plot_curve
from jaxmeta.cli.initial import initial_params
from jaxmeta.cli.report import (
    NORMALISED,
    TENSORBOARD,
    RunLog,
    plural,
    profiling,
    report_markdown,
)
from jaxmeta.cli.signals import Signalled, Signals
from jaxmeta.core import (
    Batch,
    Key,
    Learner,
    Params,
    ProtocolCard,
    PyTree,
    TaskDistribution,
    TaskStream,
    card_of,
    check_tasks,
)
from jaxmeta.files import replacing, write_json, write_new_json, write_text
from jaxmeta.training import (
    ClassEvaluation,
    Evaluation,
    Stopped,
    TrainState,
    calibrate,
    evaluate_classes,
    evaluate_episodes,
    evaluate_metrics,
    hosts,
    load,
    load_params,
    meta_step,
    save,
    train,
)
from jaxmeta.training.checkpoint import arrays_by_path, check_saved, checkpoint_steps
from jaxmeta.training.evaluate import metric_name
from jaxmeta.training.events import Event
from jaxmeta.training.metrics import METRICS, read_metrics
from jaxmeta.training.sharding import process_share, sample_of
from jaxmeta.training.step import validation_key
from jaxmeta.transfer.architectures import described as described_network

# Folder of a run's population statistics, and file of its parameters where checkpoints cannot be read.
POPULATION, SPARE = "population", "parameters.npz"
# The setting of training that a resumed run may increase where no schedule depends on it.
_EXTENDABLE = "steps"
# Folded into the run's key, like the number of a meta-step, which is never this large.
_TEST = np.uint32(0xFFFFFFFD)
_POPULATION = np.uint32(0xFFFFFFFC)


@dataclasses.dataclass(frozen=True)
class Invocation:
    """Flags of one call of `train` that are not part of the configuration.

    Attributes:
      out: output directory of the run; by default runs/<learner>-<tasks>-<date and time>.
      resume: whether to continue the run in --out from its last checkpoint.
      profile: whether to trace some meta-steps by JAX's profiler, into profile/ of the output directory.
      coordinator: HOST:PORT of the first of several processes, each of which is started with its --process.
      processes: number of processes.
      process: index of this process, from 0.
      distributed: whether to join the processes that Slurm, Kubernetes or a TPU pod started.
    """

    out: str | None = None
    resume: bool = False
    profile: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    distributed: bool = False


def new_run(config: Config, invocation: Invocation) -> Path:
    """Train and evaluate a configuration, and return the new output directory."""
    if invocation.out is not None:
        folders.check_empty(Path(invocation.out).expanduser())
    return _train(config, None, invocation)


def resume_run(
    folder: Path,
    given: Mapping[str, Mapping[str, Any]],
    invocation: Invocation,
    trusted: Iterable[str] = (),
) -> Path:
    """Continue the run in a folder from its last checkpoint.

    Args:
      folder: folder of the run.
      given: values of flags by group. They must equal the run's, except for settings that change no
        parameter, and `steps` where no schedule depends on it.
      invocation: other flags of the command.
      trusted: each `module:name` that may be imported.

    Returns:
      The folder of the run.

    Raises:
      ArgumentError: a flag differs from the run's value.
    """
    before = load_config(folder, trusted)
    allowed: dict[str, dict[str, Any]] = {}
    for group, values in given.items():
        for name, value in values.items():
            now = before.settings(group).get(name)
            if value == now:
                continue
            if group == "run" and name not in ("seed", "init"):
                allowed.setdefault(group, {})[name] = value
            elif (group, name) == ("training", _EXTENDABLE):
                _check_growth(before, value, folder)
                allowed.setdefault(group, {})[name] = value
            else:
                raise ArgumentError(
                    name,
                    f"got {schema.shown_value(value)}, but the run in {folder} has "
                    f"{schema.shown_value(now)}; leave it out",
                )
    # Each of the two flags sets the devices, so it also replaces the run's value of the other.
    run = allowed.get("run", {})
    if run.get("devices") is not None or run.get("mesh") is not None:
        run = {"devices": None, "mesh": None} | run
    config = before.replaced(training=allowed.get("training", {}), run=run)
    check(config)
    return _train(config, folder, invocation)


def _check_growth(config: Config, steps: int, folder: Path) -> None:
    """Check that a run can be extended to a number of meta-steps.

    Raises:
      ArgumentError: the run's schedule depends on its steps, or it has more steps already.
    """
    before = config.training.steps
    if config.training.schedule in ("cosine", "linear"):
        raise ArgumentError(
            _EXTENDABLE,
            f"got {steps}, but the run in {folder} has {before}, and its schedule "
            f"({config.training.schedule}) ends with them; start a new run, or use --schedule constant",
        )
    if steps < before:
        raise ArgumentError(
            _EXTENDABLE, f"got {steps}, but the run in {folder} has {before}; it must be at least {before}"
        )


class _Parts(NamedTuple):
    """Objects built from a configuration.

    Attributes:
      config: configuration, completed with properties of the data.
      mesh: devices.
      tasks: training tasks.
      validation: validation tasks; None where the split has none.
      test: test tasks.
      learner: learner.
      optimizer: outer optimizer.
      compared_to: first-order learner for --diagnose; None without it.
      parameters: number of parameters.
      start: initial parameters; None for random ones.
    """

    config: Config
    mesh: Mesh
    tasks: TaskDistribution | TaskStream
    validation: TaskDistribution | TaskStream | None
    test: TaskDistribution | TaskStream
    learner: Learner
    optimizer: optax.GradientTransformation
    compared_to: Learner | None
    parameters: int
    start: Params | None


def _parts(config: Config, resumed: Path | None, processes: int | None) -> _Parts:
    """Build the objects of a configuration, and raise its errors before a folder is created."""
    training, run = config.training, config.run
    mesh = mesh_of(run.devices, run.mesh, training.meta_batch, processes)
    # Every process has checked that the folder is new before one creates it.
    hosts.barrier("start")
    key = jax.random.key(run.seed)
    tasks = sources.tasks_of(config, "train", key, process=process_share(mesh))
    validation = sources.validation_tasks_of(config, validation_key(key))
    test = sources.tasks_of(config, "test", evaluation_key(run.seed))
    if resumed is not None:
        check_data(config, tasks, resumed)
    else:
        images = image_spec(tasks, config.names().source.ink)
        config = with_image_settings(sources.with_columns(config), images)
        config = dataclasses.replace(
            config,
            split_hash=card_of(tasks).split_hash,
            images=None if images is None else images._asdict(),
            model=_network_text(config),
        )
    learner, optimizer = build.learner_of(config), build.optimizer_of(config)
    compared_to = build.first_order_of(config)
    with sources.renaming({"devices": "mesh"} if run.mesh is not None else {}):
        # Called for its checks only.
        meta_step(learner, optimizer, training.meta_batch, run.strategy, devices=mesh)
    try:
        shapes = _shapes(learner, tasks)
    except (IndexError, TypeError, ValueError) as error:
        shape = jax.eval_shape(sample_of(tasks), jax.random.key(0)).support.x.shape[1:]
        of_settings = isinstance(error, ArgumentError) and error.name != "x"
        if config.names().source.arrays is None or len(shape) == 3 or of_settings:
            raise
        raise ArgumentError(
            "network",
            f"got {config.network['name']}, which does not take examples of shape {shape}; convolutional "
            "networks take images (h, w, c), and mlp takes any shape",
        ) from error
    jax.eval_shape(optimizer.init, shapes)  # for its checks, such as that each pattern of --train matches
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    start = None
    if run.init is not None and (resumed is None or not checkpoint_steps(resumed)):
        start = initial_params(run.init, config, learner, tasks, key)
    return _Parts(config, mesh, tasks, validation, test, learner, optimizer, compared_to, parameters, start)


def _train(config: Config, resumed: Path | None, invocation: Invocation) -> Path:
    """Train a configuration, and write the report."""
    connect(invocation)
    parts = _parts(config, resumed, invocation.processes)
    config, run, first = parts.config, parts.config.run, hosts.is_first()
    out = resumed or _output_directory(config, invocation, first)
    if first:
        _announce(parts, out)
    hint = f"continue with: {_command(config, out)}"
    results = folders.Results()
    with contextlib.ExitStack() as held:
        if first:
            held.enter_context(folders.locked(out))
        signals = held.enter_context(Signals(hint).handled())
        held.enter_context(hosts.detect_lost_peer(hint))
        log = RunLog(out / METRICS, config.training.steps, metric_name(parts.test))
        if first:
            _write_config(out, config, resumed is not None)
            if not checkpoint_steps(out):
                # A run that ended before its first checkpoint starts again, so its curves are removed.
                shutil.rmtree(log.path.parent / TENSORBOARD, ignore_errors=True)
        hosts.barrier("folder")
        state = _fit(parts, out, log, signals, invocation.profile)
        training_s = log.elapsed_s
        if first:
            print(f"evaluating on {plural(run.episodes, 'test task')} …", flush=True)
        params = hosts.gathered(state.params)
        _read_back(out, config, params, results, hint)
        try:
            params = _with_population(parts.learner, config, params, jax.random.key(run.seed), out, results)
            test_results, episodes, _ = _results(config, params, parts.test, run.seed, parts.mesh)
        except Exception:
            warnings.warn(f"training has ended, but its evaluation failed; {hint}", stacklevel=2)
            raise
        if first:
            report = _report(parts, log, training_s, test_results)
            with results.writing(out / "episodes.json"):
                write_text(out / "episodes.json", json.dumps(episodes) + "\n")
            with results.writing(out / "report.json"):
                write_json(out / "report.json", report)
            with results.writing(out / "report.md"):
                write_text(out / "report.md", report_markdown(report, config))
            with folders.tolerated(out / "curve.png") as picture:
                title = f"{config.learner['name']} on {card_of(parts.test).tasks}"
                plot_curve(picture, read_metrics(log.path), log.metric, title)
        hosts.barrier("report")
    if first:
        print_results(test_results, config)
        speed = f", {log.steps_per_second:.1f} meta-steps/s" if log.steps_per_second else ""
        print(f"{log.elapsed_s:.0f} s in all, training {training_s:.0f} s{speed}")
        print(f"run folder: {out}  (report.md, curve.png)")
    results.check()
    return out


def _read_back(out: Path, config: Config, params: Params, results: folders.Results, hint: str) -> None:
    """Read the last checkpoint, and where it does not contain `params`, write these as an npz file.

    Every process reads, since Orbax waits for all of them; the first one writes.
    """
    first = hosts.is_first()
    if first and not (out / "config.json").exists():
        # The folder was removed during training; later checkpoints have created it again.
        with results.writing(out / "config.json"):
            write_json(out / "config.json", config.to_json())
    try:
        check_saved(out, params)
    except Exception as error:
        if not first:
            return
        spare = out / SPARE
        results.fail(
            f"{out / 'checkpoints'} does not contain the final parameters ({error}); they are in {spare}, as "
            f"NumPy arrays by their paths; {hint}"
        )
        with results.writing(spare), replacing(spare) as unfinished:
            np.savez(unfinished, allow_pickle=False, **arrays_by_path(params))


def _fit(parts: _Parts, out: Path, log: RunLog, signals: Signals, profile: bool) -> TrainState:
    """Meta-train, from the last checkpoint of the folder if it has one.

    Raises:
      Signalled: a signal stopped training, after a checkpoint was saved.
    """
    training, run, first = parts.config.training, parts.config.run, hosts.is_first()
    with log.showing() if first else contextlib.nullcontext(), contextlib.ExitStack() as watching:
        listener: Callable[[Event], None] | None = log if first else None
        if listener is not None and profile:
            listener = watching.enter_context(profiling(listener, out / "profile"))
        signals.training = True
        try:
            state = train(
                parts.learner,
                parts.tasks,
                parts.optimizer,
                steps=training.steps,
                key=jax.random.key(run.seed),
                params=parts.start,
                meta_batch=training.meta_batch,
                strategy=run.strategy,
                devices=parts.mesh,
                compared_to=parts.compared_to,
                validation=parts.validation,
                validate_every=training.validate_every,
                run_dir=out,
                resume=bool(checkpoint_steps(out)),
                report=listener,
                log_every=min(run.log_every, max(1, training.steps // 20)),
                config=_as_trained(parts.config),
                should_stop=lambda: signals.asked is not None,
                non_finite=run.non_finite,
            )
        except Stopped as stopped:
            raise Signalled(f"after meta-step {stopped.step}, saved; {signals.hint}") from None
        except OSError as error:
            if not (kept := checkpoint_steps(out)):
                raise
            raise OSError(
                f"{error}; the checkpoint saved at meta-step {kept[-1]} is kept; {signals.hint}"
            ) from error
        signals.training = False
    if signals.asked:
        raise Signalled(f"after the last meta-step, saved; {signals.hint}")
    return state


def _report(parts: _Parts, log: RunLog, training_s: float, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of report.json."""
    return {
        **_learner_and_tasks(parts.config, parts.test),
        "preset": parts.config.preset,
        "seed": parts.config.run.seed,
        "steps": parts.config.training.steps,
        "best_step": log.best_step,
        "skipped": log.skipped,
        "steps_per_second": log.steps_per_second,
        "wall_s": round(log.elapsed_s, 3),
        "training_s": round(training_s, 3),
        "compile_s": log.compile_s,
        "parameters": parts.parameters,
        **results,
        **machine(parts.mesh),
        **peak_memory(parts.mesh),
        "command": command_of_config(parts.config),
        "config": parts.config.to_json(),
    }


def _output_directory(config: Config, invocation: Invocation, first: bool) -> Path:
    if not first:
        # All processes get the same --out.
        return Path(str(invocation.out)).expanduser()
    learner = config.learner["name"].rpartition(":")[2]
    return folders.claim(invocation.out, f"{learner}-{sources.file_name(config.tasks['name'])}")


def _write_config(out: Path, config: Config, resumed: bool) -> None:
    """Write config.json; of two new runs with the same folder only the first one can.

    Raises:
      ArgumentError: another run has written its config.json since.
    """
    if resumed:
        write_json(out / "config.json", config.to_json())
        return
    try:
        write_new_json(out / "config.json", config.to_json())
    except FileExistsError:
        raise ArgumentError("out", f"another run has just taken {out}; choose another folder") from None


def _command(config: Config, out: Path) -> str:
    """Return the command that continues a run, with the names of user-defined code to import."""
    learner, network, tasks = (each["name"] for each in (config.learner, config.network, config.tasks))
    words = ["jaxmeta", "train", *([learner] if learner in config.own else []), "--resume", "--out", str(out)]
    for flag, name in (("--network", network), ("--tasks", tasks)):
        words += [flag, name] if name in config.own else []
    return shlex.join(words)


def _network_text(config: Config) -> str | None:
    """Return the description of the network for `jm.transfer.load_pretrained`; None where it has none."""
    if config.names().facts.network is not None and config.names().facts.networks is not None:
        return None
    plain = config.replaced(training={"precision": "float32", "lora": None, **INPUT})
    try:
        return described_network(build.network_builder(plain)(build.output_width(config)))
    except ValueError:
        return None


def _as_trained(config: Config) -> dict[str, Any]:
    """Return the part of a configuration that is stored with checkpoints and must be equal to resume."""
    kept = config.to_json()
    training = {name: value for name, value in kept["training"].items() if name != _EXTENDABLE}
    groups = {name: kept[name] for name in ("learner", "network", "tasks", "own", "split_hash", "images")}
    return {**groups, "training": training, "seed": config.run.seed}


def params_of(folder: Path, config: Config) -> Params:
    """Return the parameters of the run in `folder`, with population statistics where a report row uses them.

    Raises:
      ValueError: the parameters cannot be read, or belong to another learner, network or seed than `config`;
        or the run has not ended, and population statistics are computed at its end.
    """
    kept = _as_trained(config)
    params = load_params(folder, config={name: kept[name] for name in ("learner", "network", "seed")})
    if "population" not in config.names().facts.rows.values():
        return params
    if not (folder / POPULATION).exists():
        raise ValueError(
            f"{folder}: the run has not ended, but {config.learner['name']} needs the statistics that are "
            f"computed at its end; continue it with: {_command(config, folder)}"
        )
    return {**params, **load(folder / POPULATION)}


def evaluate_run(
    folder: Path,
    given: Mapping[str, Mapping[str, Any]],
    *,
    tasks: str | None = None,
    json: str | None = None,
    per_class: bool = False,
    confusion: str | None = None,
    trusted: Iterable[str] = (),
) -> dict[str, Any]:
    """Evaluate the parameters of a run on test tasks that flags may change, and print the result.

    Args:
      folder: folder of the run.
      given: values of flags by group.
      tasks: name of other tasks of the same kind; None for the run's.
      json: file to write the result to.
      per_class: whether the result has accuracy and confusions of each class.
      confusion: PNG file to draw the confusion matrix to.
      trusted: each `module:name` that may be imported.

    Returns:
      The result, as in report.json.

    Raises:
      ArgumentError: a flag is invalid, or the data are not those that the run was trained on.
      ValueError: the parameters cannot be read.
    """
    before = load_config(folder, trusted)
    target, picture = folders.output_file("json", json), folders.output_file("confusion", confusion)
    run = dict(given.get("run", {}))
    other = tasks is not None and tasks != before.tasks["name"]
    config = (sources.with_columns(on_other_tasks(before, str(tasks))) if other else before).replaced(
        **{group: values for group, values in given.items() if group != "run"},
        run={"devices": None, "mesh": None} | run,
    )
    check(config)
    seed = config.run.seed
    # --seed changes the test tasks; the parameters are loaded with the run's own seed.
    mesh = mesh_of(config.run.devices, config.run.mesh, None)
    test = sources.tasks_of(config, "test", evaluation_key(seed))
    if other:
        check_images(before, test, folder, str(tasks))
    else:
        check_data(before, test, folder)
    params = params_of(folder, before)
    return _evaluated(folder, config, params, test, mesh, target, per_class, picture)


def evaluate_checkpoints(
    folder: Path,
    config: Config,
    *,
    json: str | None = None,
    per_class: bool = False,
    confusion: str | None = None,
) -> dict[str, Any]:
    """Evaluate the parameters that `jm.train(run_dir=…)` has saved in a folder, and print the result.

    Population statistics, which `jm.train` does not compute, are computed from training tasks.

    Args:
      folder: folder of the run.
      config: configuration of the learner, the network and the test tasks.
      json, per_class, confusion: as in `evaluate_run`.

    Returns:
      The result, as in report.json.

    Raises:
      ArgumentError: the learner of the configuration has other parameters.
    """
    target, picture = folders.output_file("json", json), folders.output_file("confusion", confusion)
    mesh = mesh_of(config.run.devices, config.run.mesh, None)
    test = sources.tasks_of(config, "test", evaluation_key(config.run.seed))
    learner = build.learner_of(config)
    try:
        params = _params_like(folder, learner, test)
    except ValueError as error:
        raise ArgumentError(
            "learner",
            f"{config.learner['name']} with the network {config.network['name']} does not have the "
            f"parameters in {folder}; give method, network and settings as in training ({error})",
        ) from error
    if "population" in config.names().facts.rows.values() and "population" not in params:
        params = {**params, **_population(learner, config, params, jax.random.key(config.run.seed))}
    return _evaluated(folder, config, params, test, mesh, target, per_class, picture)


def _evaluated(
    folder: Path,
    config: Config,
    params: Params,
    test: TaskDistribution | TaskStream,
    mesh: Mesh,
    target: Path | None,
    per_class: bool,
    picture: Path | None,
) -> dict[str, Any]:
    """Evaluate parameters on test tasks, write and print the result."""
    seed, by_class = config.run.seed, per_class or picture is not None
    if by_class:
        per_class_report.check_named(test, "per_class" if per_class else "confusion")
    test_results, _, classes = _results(config, params, test, seed, mesh, by_class=by_class)
    result = {
        "run": str(folder),
        **_learner_and_tasks(config, test),
        "eval_steps": config.learner.get("eval_steps"),
        "seed": seed,
        **test_results,
        **({"per_class": per_class_report.as_json(classes)} if classes else {}),
        **machine(mesh),
    }
    tasks = plural(config.run.episodes, "task")
    results = folders.Results()
    if target is not None:
        with results.writing(target):
            write_json(target, result)
    print(f"{config.learner['name']}, {sentence(card_of(test))}; {tasks}, seed {seed}")
    if (summary := sources.summary_of(config)) is not None:
        print(f"read: {summary}")
    print_results(result, config)
    if per_class:
        per_class_report.print_classes(classes)
    if picture is not None:
        per_class_report.draw_classes(picture, classes, f"{config.learner['name']} on {card_of(test).tasks}")
    results.check()
    return result


def _learner_and_tasks(config: Config, test: TaskDistribution | TaskStream) -> dict[str, Any]:
    """Return the entries of a report about learner and test tasks."""
    card = card_of(test)
    return {
        "learner": config.learner["name"],
        "tasks": config.tasks["name"],
        "ways": card.ways,
        "shots": card.shots,
        "queries": card.queries,
        "episodes": config.run.episodes,
        "card": dataclasses.asdict(card),
    }


def load_run(
    run: str | os.PathLike[str],
    row: str = "inductive",
    *,
    learner: str | Learner | None = None,
    network: str | None = None,
    tasks: str | TaskDistribution | TaskStream | None = None,
) -> tuple[Learner, Params]:
    """Load the learner of a run of `jaxmeta train`, or of `jm.train(run_dir=…)`, and its parameters.

    Args:
      run: folder of the run.
      row: row of its report: "inductive", where predictions do not depend on other queries, or
        "transductive". A method that is transductive by itself has the second alone, which must be given. A
        `Learner` has its own norm and takes no row.
      learner: learner to return, for a run of `jm.train`, which does not store it. For a run of `jaxmeta
        train` with a user-defined method, its `module:name`: a run folder does not import code by itself.
      network: `module:name` of the run's user-defined network.
      tasks: `module:name` of the run's user-defined tasks. With a `Learner`, tasks that it was built for, to
        check the shapes of the parameters; they are needed where the parameters contain nodes other than
        dicts, lists and tuples.

    Returns:
      The learner and its parameters.

    Raises:
      FileNotFoundError: the folder is not a run, or it is a run of `jm.train` and `learner` is None.
      ValueError: its files cannot be read, `row` is unknown, user-defined code is not named, or the
        parameters do not belong to the learner, which is checked with `tasks`.

    Examples:
      >>> learner, params = jm.load_run("runs/alphabet")  # doctest: +SKIP
      >>> adapted = learner.adapt(params, support, jax.random.key(0))  # doctest: +SKIP
      >>> outputs = learner.predict(params, adapted, images)  # doctest: +SKIP
    """
    folder = Path(run).expanduser()
    if learner is not None and not isinstance(learner, str):
        check_kind("learner", learner, Learner, "a jm.Learner, or module:name of a method of your own")
        if not (folder / "checkpoints").is_dir():
            raise FileNotFoundError(f"{folder} is not a run folder: {folder / 'checkpoints'} does not exist")
        if isinstance(tasks, str):
            raise ArgumentError(
                "tasks", f"got {tasks!r}; with a jm.Learner as learner, they must be tasks, not a name"
            )
        for name, value, default in (("row", row, "inductive"), ("network", network, None)):
            if value != default:
                raise ArgumentError(
                    name, f"got {value!r}; leave it out, because the jm.Learner has its own network and norm"
                )
        return learner, _params_like(folder, learner, tasks)
    if tasks is not None and not isinstance(tasks, str):
        raise ArgumentError(
            "tasks",
            f"got {type(tasks).__name__}(…); without a jm.Learner as learner, give module:name of the run's "
            "tasks",
        )
    config = load_config(folder, [name for name in (learner, network, tasks) if name is not None])
    rows = config.names().facts.rows
    if row == "inductive" and list(rows) == ["transductive"]:
        raise ArgumentError(
            "row",
            f"got 'inductive', but {config.learner['name']} is transductive: predictions depend on the other "
            'queries; give row="transductive"',
        )
    norm = names.lookup("row", row, rows)
    return build.learner_of(config, norm), params_of(folder, config)


def _params_like(folder: Path, learner: Learner, tasks: TaskDistribution | TaskStream | None) -> Params:
    """Return the final parameters of a run, and check their shapes where tasks are given.

    Raises:
      ValueError: the learner has other parameters, or they cannot be read.
    """
    like = None
    if tasks is not None:
        check_tasks(tasks)
        like = _shapes(learner, tasks)
    try:
        params = load_params(folder, like=like)
    except ArgumentError as error:
        if error.name != "like":
            raise
        raise ArgumentError(
            "tasks",
            f"got None, but the parameters in {folder} contain nodes other than dicts, lists and tuples; "
            "give tasks that the learner was built for",
        ) from None
    return {**params, **load(folder / POPULATION)} if (folder / POPULATION).exists() else params


def evaluation_key(seed: int) -> Key:
    """Return the key of the test episodes of a run with `seed`."""
    return jax.random.fold_in(jax.random.key(seed), _TEST)


def _shapes(learner: Learner, tasks: TaskDistribution | TaskStream) -> PyTree:
    """Return the shapes of a learner's parameters."""
    key = jax.random.key(0)
    return jax.eval_shape(lambda key, sample: learner.init(key, sample(key)), key, sample_of(tasks))


def _with_population(
    learner: Learner, config: Config, params: Params, key: Key, out: Path, results: folders.Results
) -> Params:
    """Return the parameters with population statistics of the training tasks, and save the statistics."""
    if "population" not in config.names().facts.rows.values():
        return params
    filled = _population(learner, config, params, key)
    with results.writing(out / POPULATION):
        save(out / POPULATION, filled, overwrite=True)
        load(out / POPULATION)
    return {**params, **filled}


def _population(learner: Learner, config: Config, params: Params, key: Key) -> Params:
    """Return the population statistics of the training tasks of a run with `key`."""
    if learner.statistics is None:
        return {"population": {}}
    key = jax.random.fold_in(key, _POPULATION)
    tasks = sources.tasks_of(config, "train", key, for_evaluation=True)
    return {"population": calibrate(learner, params, tasks, key)["population"]}


def _norms_of_rows(config: Config, params: Params, test: TaskDistribution | TaskStream) -> Mapping[str, str]:
    """Return the rows of a report, each with the statistics that normalise it.

    Without batch statistics every row has the same predictions, and the report has the inductive one only. A
    learner that does not declare its statistics (`statistics` is None) keeps all rows.
    """
    rows = config.names().facts.rows
    statistics = build.learner_of(config).statistics
    if len(rows) == 1 or statistics is None:
        return rows
    key = jax.random.key(0)
    total = jax.eval_shape(lambda key, sample: statistics(params, sample(key), key)[0], key, sample_of(test))
    return (
        rows if jax.tree.leaves(total) else {"inductive" if "inductive" in rows else list(rows)[-1]: "none"}
    )


def _results(
    config: Config,
    params: Params,
    test: TaskDistribution | TaskStream,
    seed: int,
    mesh: Mesh,
    *,
    by_class: bool = False,
) -> tuple[dict[str, Any], dict[str, list[float]], dict[str, ClassEvaluation]]:
    """Return results, values by episode, and results by class.

    Results are accuracy by row, or mean squared error by number of inner steps. Results by class are empty
    unless `by_class`.
    """
    drawn: dict[str, Any] = {"episodes": config.run.episodes, "key": evaluation_key(seed), "devices": mesh}

    def evaluate(learner: Learner, params: Params) -> np.ndarray:
        return evaluate_episodes(learner, params, test, **drawn)

    def values(config: Config, norm: str) -> np.ndarray:
        return evaluate(build.learner_of(config, norm), params)

    def row(values: np.ndarray) -> dict[str, float]:
        evaluation = Evaluation.of(values)
        return {"mean": evaluation.mean, "ci95": evaluation.ci95}

    results: dict[str, Any] = {}
    classes: dict[str, ClassEvaluation] = {}
    ways = card_of(test).ways
    if metric_name(test) == "accuracy":
        norms = _norms_of_rows(config, params, test)
        learners = {name: build.learner_of(config, config.names().facts.rows[name]) for name in norms}
        if by_class:
            classes = {
                name: evaluate_classes(learner, params, test, **drawn) for name, learner in learners.items()
            }
            episodes = {name: result.scores for name, result in classes.items()}
        else:
            episodes = {name: evaluate(learner, params) for name, learner in learners.items()}
        results["accuracy"] = {name: {**row(episodes[name]), "norm": norm} for name, norm in norms.items()}
        if isinstance(ways, int):
            results["chance"] = 1 / ways
        if config.tasks.get("sequence") is not None:
            assert isinstance(test, TaskDistribution)
            # The loss counts presentations; it would distort images as training does.
            learner = build.learner_of(config.replaced(training={"distort": False}))
            key = evaluation_key(seed)
            metrics = evaluate_metrics(learner, params, test, episodes=config.run.episodes, key=key)
            results["accuracy_by_instance"] = {
                str(number): metrics[f"instance_{number}"]
                for number in range(1, len(metrics))
                # Presentations that never occurred are NaN.
                if metrics.get(f"instance_{number}", math.nan) >= 0
            }
    else:
        by_step = {
            steps: values(config.replaced(learner={"eval_steps": steps}), "batch")
            for steps in config.run.report_steps
        }
        eval_steps = config.learner.get("eval_steps")
        scores = by_step[eval_steps] if eval_steps in by_step else values(config, "batch")
        episodes, results["mse"] = {"mse": scores}, row(scores)
        results["mse_of_mean"] = row(evaluate(_MEAN, {}))
        if by_step:
            results["mse_by_step"] = {str(steps): row(scores) for steps, scores in by_step.items()}
    return results, {name: scores.tolist() for name, scores in episodes.items()}, classes


def _mean_of_targets(params: Params, support: Batch, key: Key) -> Array:
    del params, key
    return support.y.mean(0)


def _repeated(params: Params, mean: Array, x: Array, mask: Array | None = None) -> Array:
    del params, mask
    return jnp.broadcast_to(mean, (x.shape[0], *mean.shape))


# Baseline of regression: the mean of the support targets.
_MEAN = Learner(
    init=lambda key, task: {},
    adapt=_mean_of_targets,
    predict=_repeated,
    loss=lambda params, task, key, step=None: (jnp.zeros(()), {}),
)


def _announce(parts: _Parts, out: Path) -> None:
    config = parts.config
    settings = ", ".join(
        f"{name} {schema.shown_value(value)}" for name, value in _notable_settings(config).items()
    )
    print(f"learner   {config.learner['name']}{': ' if settings else ''}{settings}")
    print(f"network   {config.network['name']}, {parts.parameters:,} parameters")
    steps = plural(config.training.steps, "meta-step")
    print(
        f"training  {sentence(card_of(parts.tasks))}; {steps} of {plural(config.training.meta_batch, 'task')}"
    )
    print(
        f"test      {sentence(card_of(parts.test))}; {plural(config.run.episodes, 'task')}"
        + ("" if parts.validation else "; no validation classes in this split, the last parameters are kept")
    )
    if (images := images_of(config)) is not None:
        print(f"images    {images}")
    if (summary := sources.summary_of(config)) is not None:
        print(f"read      {summary}")
    print(f"devices   {described(parts.mesh)}")
    print(f"preset    {config.preset or 'none'}, seed {config.run.seed}")
    print(f"folder    {out}", flush=True)


def _notable_settings(config: Config) -> dict[str, Any]:
    """Return the settings of the inner loop, and others that differ from the factory's defaults."""
    known = config.names().groups()["learner"]
    always = ("inner_lr", "inner_steps", "eval_steps")
    values = config.settings("learner")
    return {name: value for name, value in values.items() if name in always or value != known[name].default}


def sentence(card: ProtocolCard) -> str:
    """Return a protocol card in one line."""
    shape = f"{card.shots}-shot" if card.ways is None else f"{card.ways}-way {card.shots}-shot"
    queries = plural(card.queries, "query")
    classes = f", {plural(card.classes, 'class')}" if card.classes else ""
    split = f" {card.split_hash[:8]}" if card.split_hash else ""
    rotations = f", rotations {card.rotations}" if card.classes and card.rotations != "none" else ""
    return f"{card.tasks} {card.split}{split}, {shape}, {queries}{classes}{rotations}"


def print_results(results: Mapping[str, Any], config: Config) -> None:
    """Print the test results of a report."""
    if "accuracy" in results:
        for name, row in results["accuracy"].items():
            print(
                f"test accuracy  {100 * row['mean']:.2f} ± {100 * row['ci95']:.2f} %  {name} "
                f"({NORMALISED[row['norm']]})"
            )
        for instance, value in results.get("accuracy_by_instance", {}).items():
            print(f"instance {instance:>2}    {100 * value:.2f} %")
        if "chance" in results:
            print(f"guessing       {100 * results['chance']:.2f} %")
        return
    eval_steps = str(config.learner.get("eval_steps", ""))
    for steps, row in (results.get("mse_by_step") or {eval_steps: results["mse"]}).items():
        after = f"  after {plural(int(steps), 'inner step')}" if steps.isdigit() else ""
        print(f"test mse  {row['mean']:.4f} ± {row['ci95']:.4f}{after}")
    row = results["mse_of_mean"]
    print(f"test mse  {row['mean']:.4f} ± {row['ci95']:.4f}  answering with the mean of the support targets")
