"""Train and evaluate: `jaxmeta train`, `jaxmeta evaluate`, and the output directory of a run."""

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
from jaxmeta.cli.config import Config, check, load_config, on_other_tasks
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

# Where a run keeps the population statistics of its learner; and its parameters, where no checkpoint does.
POPULATION, SPARE = "population", "parameters.npz"
# Settings of training that a resumed run may change where nothing is scheduled by them.
_GROWS = "steps"
_TEST = np.uint32(0xFFFFFFFD)
_POPULATION = np.uint32(0xFFFFFFFC)


@dataclasses.dataclass(frozen=True)
class Invocation:
    """What one invocation of `train` is told besides its configuration.

    Attributes:
      out: the run's output directory; without it runs/<learner>-<tasks>-<date and time>.
      resume: continue the run in --out from its last checkpoint.
      profile: let JAX's profiler watch some meta-steps: profile/ in the output directory.
      coordinator: HOST:PORT of the first of several processes, each of which is started with its --process.
      processes: how many processes there are.
      process: which of several processes this is, from 0.
      distributed: join several processes as Slurm, Kubernetes or a TPU pod started them.
    """

    out: str | None = None
    resume: bool = False
    profile: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    distributed: bool = False


def new_run(config: Config, invocation: Invocation) -> Path:
    """Train, evaluate and report a configuration in a new output directory, which is returned."""
    if invocation.out is not None:
        folders.refuse_used(Path(invocation.out).expanduser())
    return _train(config, None, invocation)


def resume_run(
    folder: Path,
    given: Mapping[str, Mapping[str, Any]],
    invocation: Invocation,
    trusted: Iterable[str] = (),
) -> Path:
    """Continue the run in a folder from its last checkpoint.

    Args:
      folder: of the run.
      given: flags by group, which must not contradict the run, save those that change no parameter, and
        `steps` where nothing is scheduled by it.
      invocation: of the command.
      trusted: names of code of one's own that may be imported.

    Raises:
      ArgumentError: a flag that contradicts the run.
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
            elif (group, name) == ("training", _GROWS):
                _check_growth(before, value, folder)
                allowed.setdefault(group, {})[name] = value
            else:
                raise ArgumentError(
                    name,
                    f"got {schema.shown_value(value)}, but the run in {folder} has "
                    f"{schema.shown_value(now)}; leave it out",
                )
    # Either says which devices.
    run = allowed.get("run", {})
    if run.get("devices") is not None or run.get("mesh") is not None:
        run = {"devices": None, "mesh": None} | run
    config = before.replaced(training=allowed.get("training", {}), run=run)
    check(config)
    return _train(config, folder, invocation)


def _check_growth(config: Config, steps: int, folder: Path) -> None:
    """Refuse more meta-steps of a run whose settings were derived from their number.

    Raises:
      ArgumentError: a schedule, or fewer steps than before.
    """
    before = config.training.steps
    if config.training.schedule in ("cosine", "linear"):
        raise ArgumentError(
            _GROWS,
            f"got {steps}, but the run in {folder} has {before}, and its schedule "
            f"({config.training.schedule}) ends with them; train anew, or with --schedule constant",
        )
    if steps < before:
        raise ArgumentError(_GROWS, f"got {steps}, but the run in {folder} has {before}; it can only grow")


class _Parts(NamedTuple):
    """What a configuration stands for.

    Attributes:
      config: completed by what is known of the data.
      mesh: devices.
      tasks, validation, test: of the three parts.
      learner, optimizer: what is trained, and by what.
      compared_to: the first-order learner, where meta-gradients are compared.
      parameters: their number.
      start: parameters to start from; None for random ones.
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
    """Build what a configuration says: all that can be refused is, before there is a folder."""
    training, run = config.training, config.run
    mesh = mesh_of(run.devices, run.mesh, training.meta_batch, processes)
    # All have looked for the folder before one makes it.
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
        # For what it raises.
        meta_step(learner, optimizer, training.meta_batch, run.strategy, devices=mesh)
    try:
        parameters = _parameters(learner, tasks)
    except (IndexError, TypeError, ValueError) as error:
        shape = jax.eval_shape(sample_of(tasks), jax.random.key(0)).support.x.shape[1:]
        of_settings = isinstance(error, ArgumentError) and error.name != "x"
        if config.names().source.arrays is None or len(shape) == 3 or of_settings:
            raise
        raise ArgumentError(
            "network",
            f"got {config.network['name']}, which does not take examples of shape {shape}; networks of "
            "convolutions take images (h, w, c), and mlp takes any",
        ) from error
    start = None
    if run.init is not None and (resumed is None or not checkpoint_steps(resumed)):
        start = initial_params(run.init, config, learner, tasks, key)
    return _Parts(config, mesh, tasks, validation, test, learner, optimizer, compared_to, parameters, start)


def _train(config: Config, resumed: Path | None, invocation: Invocation) -> Path:
    """Train what a configuration says, and write the report."""
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
                # What a run has shown that ended before it could save: this one starts again.
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
            found, episodes, _ = _results(config, params, parts.test, run.seed, parts.mesh)
        except Exception:
            warnings.warn(f"training has ended, its evaluation has not; {hint}", stacklevel=2)
            raise
        if first:
            report = _report(parts, log, training_s, found)
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
        print_results(found, config)
        speed = f", {log.steps_per_second:.1f} meta-steps/s" if log.steps_per_second else ""
        print(f"{log.elapsed_s:.0f} s in all, training {training_s:.0f} s{speed}")
        print(f"run folder: {out}  (report.md, curve.png)")
    results.check()
    return out


def _read_back(out: Path, config: Config, params: Params, results: folders.Results, hint: str) -> None:
    """Read the last checkpoint, and where it does not hold `params`, keep these in a file of another form.

    Every process reads, since Orbax waits for all of them; the first one writes.
    """
    first = hosts.is_first()
    if first and not (out / "config.json").exists():
        # Somebody has removed the folder, and the checkpoints after that are in a new one.
        with results.writing(out / "config.json"):
            write_json(out / "config.json", config.to_json())
    try:
        check_saved(out, params)
    except Exception as error:
        if not first:
            return
        spare = out / SPARE
        results.fail(
            f"{out / 'checkpoints'} does not hold the parameters that training ended with ({error}); they "
            f"are in {spare}, as NumPy arrays by their paths; {hint}"
        )
        with results.writing(spare), replacing(spare) as unfinished:
            np.savez(unfinished, allow_pickle=False, **arrays_by_path(params))


def _fit(parts: _Parts, out: Path, log: RunLog, signals: Signals, profile: bool) -> TrainState:
    """Meta-train, from the last checkpoint of the folder where it has one.

    Raises:
      Signalled: a signal has stopped it, after what there was had been saved.
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
                config=as_trained(parts.config),
                should_stop=lambda: signals.asked is not None,
                non_finite=run.non_finite,
            )
        except Stopped as stopped:
            raise Signalled(f"after meta-step {stopped.step}, saved; {signals.hint}") from None
        except OSError as error:
            if not (kept := checkpoint_steps(out)):
                raise
            raise OSError(
                f"{error}; what was saved at meta-step {kept[-1]} is kept; {signals.hint}"
            ) from error
        signals.training = False
    if signals.asked:
        raise Signalled(f"after the last meta-step, saved; {signals.hint}")
    return state


def _report(parts: _Parts, log: RunLog, training_s: float, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what report.json holds."""
    return {
        **_what(parts.config, parts.test),
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
        # Several processes are told one folder.
        return Path(str(invocation.out)).expanduser()
    learner = config.learner["name"].rpartition(":")[2]
    return folders.claim(invocation.out, f"{learner}-{sources.file_name(config.tasks['name'])}")


def _write_config(out: Path, config: Config, resumed: bool) -> None:
    """Write config.json, which of two runs that were given one folder only the first one can.

    Raises:
      ArgumentError: another run has the folder.
    """
    if resumed:
        write_json(out / "config.json", config.to_json())
        return
    try:
        write_new_json(out / "config.json", config.to_json())
    except FileExistsError:
        raise ArgumentError("out", f"another run has just taken {out}; choose another") from None


def _command(config: Config, out: Path) -> str:
    """Return the command that continues a run: code of one's own is named again to be imported."""
    learner, network, tasks = (each["name"] for each in (config.learner, config.network, config.tasks))
    words = ["jaxmeta", "train", *([learner] if learner in config.own else []), "--resume", "--out", str(out)]
    for flag, name in (("--network", network), ("--tasks", tasks)):
        words += [flag, name] if name in config.own else []
    return shlex.join(words)


def _network_text(config: Config) -> str | None:
    """Return the network as `jm.transfer.load_pretrained` builds it; None where it is of another package."""
    if config.names().facts.network is not None and config.names().facts.networks is not None:
        return None
    plain = config.replaced(training={"precision": "float32"})
    try:
        return described_network(build.network_builder(plain)(build.output_width(config)))
    except ValueError:
        return None


def as_trained(config: Config) -> dict[str, Any]:
    """Return what of a configuration is kept with each checkpoint, and must be the same to go on with it."""
    kept = config.to_json()
    training = {name: value for name, value in kept["training"].items() if name != _GROWS}
    groups = {name: kept[name] for name in ("learner", "network", "tasks", "own", "split_hash", "images")}
    return {**groups, "training": training, "seed": config.run.seed}


def params_of(folder: Path, config: Config) -> Params:
    """Return the parameters of the run in `folder`, with population statistics where a row is of such.

    Raises:
      ValueError: they cannot be read, or are of another learner, network, number of ways or seed than
        `config`; or the run has not ended, since it fills these statistics last.
    """
    kept = as_trained(config)
    params = load_params(folder, config={name: kept[name] for name in ("learner", "network", "seed")})
    if "population" not in config.names().facts.rows.values():
        return params
    if not (folder / POPULATION).exists():
        raise ValueError(
            f"{folder}: the run has not ended, and {config.learner['name']} is used with statistics that are "
            f"taken at its end; continue it with: {_command(config, folder)}"
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
      folder: of the run.
      given: flags by group.
      tasks: name of other tasks than those of the run.
      json: also write the result here.
      per_class: whether accuracy and confusions of each class are among the result.
      confusion: also draw the confusions here.
      trusted: names of code of one's own that may be imported.
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
    # What is drawn is another seed's; the parameters are those of the run's own.
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
    """Evaluate parameters that `jm.train(run_dir=…)` has left in a folder, and print the result.

    Population statistics, which it does not fill, are taken from training tasks.

    Args:
      folder: of the run.
      config: says what the parameters are of, and which tasks they are evaluated on.
      json, per_class, confusion: as of `evaluate_run`.

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
            f"{config.learner['name']} with the network {config.network['name']} does not fit what was "
            f"trained in {folder}; give method, network and settings as they were ({error})",
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
    found, _, classes = _results(config, params, test, seed, mesh, by_class=by_class)
    result = {
        "run": str(folder),
        **_what(config, test),
        "eval_steps": config.learner.get("eval_steps"),
        "seed": seed,
        **found,
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


def _what(config: Config, test: TaskDistribution | TaskStream) -> dict[str, Any]:
    """Return what a report is of."""
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
      run: the run's folder.
      row: of its report: "inductive", whose answers depend on no other query, or "transductive".
      learner: the learner itself, which `jm.train` does not keep in the folder; it is returned as it is. Or
        `module:name` of a method of one's own, of a run of `jaxmeta train` that was trained with it: a folder
        makes no code be imported by itself.
      network: `module:name` of a network of one's own, likewise.
      tasks: likewise of tasks. Beside a learner itself, tasks that it was made for, whose shapes tell whether
        the parameters are its own; needed where these have other nodes than dicts, lists and tuples.

    Raises:
      FileNotFoundError: there is no run, or one of `jm.train`, and no learner is given.
      ValueError: its files cannot be read, another `row`, code of one's own that is not named, or parameters
        that are not those of the learner.

    Examples:
      >>> learner, params = jm.load_run("runs/alphabet")  # doctest: +SKIP
      >>> adapted = learner.adapt(params, support, jax.random.key(0))  # doctest: +SKIP
      >>> outputs = learner.predict(params, adapted, images)  # doctest: +SKIP
    """
    folder = Path(run).expanduser()
    if learner is not None and not isinstance(learner, str):
        check_kind("learner", learner, Learner, "a jm.Learner, or module:name of a method of your own")
        if not (folder / "checkpoints").is_dir():
            raise FileNotFoundError(f"{folder} is no run: there is no {folder / 'checkpoints'}")
        if isinstance(tasks, str):
            raise ArgumentError(
                "tasks", f"got {tasks!r}; beside a learner itself, they must be tasks themselves"
            )
        return learner, _params_like(folder, learner, tasks)
    if tasks is not None and not isinstance(tasks, str):
        raise ArgumentError("tasks", "got tasks themselves, which go with a learner itself (learner=)")
    config = load_config(folder, [name for name in (learner, network, tasks) if name is not None])
    norm = names.lookup("row", row, config.names().facts.rows)
    return build.learner_of(config, norm), params_of(folder, config)


def _params_like(folder: Path, learner: Learner, tasks: TaskDistribution | TaskStream | None) -> Params:
    """Return what a run ended with, if the learner has such parameters on tasks of these shapes.

    Raises:
      ValueError: it has others, or they cannot be read.
    """
    like = None
    if tasks is not None:
        check_tasks(tasks)
        like = jax.eval_shape(
            lambda key, sample: learner.init(key, sample(key)), jax.random.key(0), sample_of(tasks)
        )
    try:
        params = load_params(folder, like=like)
    except ArgumentError as error:
        if error.name != "like":
            raise
        said = f"{folder} has parameters that are not only dicts, lists and tuples"
        raise ArgumentError(
            "tasks", f"got None, and {said}; give tasks that the learner was made for"
        ) from None
    return {**params, **load(folder / POPULATION)} if (folder / POPULATION).exists() else params


def evaluation_key(seed: int) -> Key:
    """Return the key of the test episodes of a run with `seed`."""
    return jax.random.fold_in(jax.random.key(seed), _TEST)


def _parameters(learner: Learner, tasks: TaskDistribution | TaskStream) -> int:
    key = jax.random.key(0)
    params = jax.eval_shape(lambda key, sample: learner.init(key, sample(key)), key, sample_of(tasks))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _with_population(
    learner: Learner, config: Config, params: Params, key: Key, out: Path, results: folders.Results
) -> Params:
    """Return the parameters with the population statistics of the training tasks, which the folder keeps."""
    if "population" not in config.names().facts.rows.values():
        return params
    filled = _population(learner, config, params, key)
    with results.writing(out / POPULATION):
        save(out / POPULATION, filled, overwrite=True)
        load(out / POPULATION)
    return {**params, **filled}


def _population(learner: Learner, config: Config, params: Params, key: Key) -> Params:
    """Return the population statistics of the training tasks, of a run with `key`."""
    if learner.statistics is None:
        return {"population": {}}
    key = jax.random.fold_in(key, _POPULATION)
    tasks = sources.tasks_of(config, "train", key, for_evaluation=True)
    return {"population": calibrate(learner, params, tasks, key)["population"]}


def _results(
    config: Config,
    params: Params,
    test: TaskDistribution | TaskStream,
    seed: int,
    mesh: Mesh,
    *,
    by_class: bool = False,
) -> tuple[dict[str, Any], dict[str, list[float]], dict[str, ClassEvaluation]]:
    """Return accuracy by row, or mean squared error by number of inner steps; and those of each episode.

    The third are the results of each class by row, where they are asked for.
    """
    drawn: dict[str, Any] = {"episodes": config.run.episodes, "key": evaluation_key(seed), "devices": mesh}

    def of(learner: Learner, params: Params) -> np.ndarray:
        return evaluate_episodes(learner, params, test, **drawn)

    def values(config: Config, norm: str) -> np.ndarray:
        return of(build.learner_of(config, norm), params)

    def row(values: np.ndarray) -> dict[str, float]:
        found = Evaluation.of(values)
        return {"mean": found.mean, "ci95": found.ci95}

    results: dict[str, Any] = {}
    classes: dict[str, ClassEvaluation] = {}
    ways = card_of(test).ways
    if metric_name(test) == "accuracy":
        rows = config.names().facts.rows
        if by_class:
            classes = {
                name: evaluate_classes(build.learner_of(config, norm), params, test, **drawn)
                for name, norm in rows.items()
            }
            episodes = {name: found.scores for name, found in classes.items()}
        else:
            episodes = {name: values(config, norm) for name, norm in rows.items()}
        results["accuracy"] = {name: {**row(episodes[name]), "norm": norm} for name, norm in rows.items()}
        if isinstance(ways, int):
            results["chance"] = 1 / ways
        if config.tasks.get("sequence") is not None:
            assert isinstance(test, TaskDistribution)
            # Its loss, which counts presentations, distorts where training does.
            learner = build.learner_of(config.replaced(training={"distort": False}))
            key = evaluation_key(seed)
            found = evaluate_metrics(learner, params, test, episodes=config.run.episodes, key=key)
            results["accuracy_by_instance"] = {
                str(number): found[f"instance_{number}"]
                for number in range(1, len(found))
                # Those that never came up are NaN.
                if found.get(f"instance_{number}", math.nan) >= 0
            }
    else:
        by_step = {
            steps: values(config.replaced(learner={"eval_steps": steps}), "batch")
            for steps in config.run.report_steps
        }
        own_steps = config.learner.get("eval_steps")
        own = by_step[own_steps] if own_steps in by_step else values(config, "batch")
        episodes, results["mse"] = {"mse": own}, row(own)
        results["mse_of_mean"] = row(of(_MEAN, {}))
        if by_step:
            results["mse_by_step"] = {str(steps): row(found) for steps, found in by_step.items()}
    return results, {name: found.tolist() for name, found in episodes.items()}, classes


def _mean_of_targets(params: Params, support: Batch, key: Key) -> Array:
    del params, key
    return support.y.mean(0)


def _repeated(params: Params, mean: Array, x: Array, mask: Array | None = None) -> Array:
    del params, mask
    return jnp.broadcast_to(mean, (x.shape[0], *mean.shape))


# What a learner of regression must beat: it answers with the mean of the support targets.
_MEAN = Learner(
    init=lambda key, task: {},
    adapt=_mean_of_targets,
    predict=_repeated,
    loss=lambda params, task, key, step=None: (jnp.zeros(()), {}),
)


def _announce(parts: _Parts, out: Path) -> None:
    config = parts.config
    settings = ", ".join(f"{name} {schema.shown_value(value)}" for name, value in _own_values(config).items())
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


def _own_values(config: Config) -> dict[str, Any]:
    """Return the settings of the learner that are not its factory's defaults, and its inner loop's."""
    known = config.names().groups()["learner"]
    always = ("inner_lr", "inner_steps", "eval_steps")
    values = config.settings("learner")
    return {name: value for name, value in values.items() if name in always or value != known[name].default}


def sentence(card: ProtocolCard) -> str:
    """Return in one line which tasks a card is of."""
    shape = f"{card.shots}-shot" if card.ways is None else f"{card.ways}-way {card.shots}-shot"
    queries = plural(card.queries, "query")
    classes = f", {plural(card.classes, 'class')}" if card.classes else ""
    split = f" {card.split_hash[:8]}" if card.split_hash else ""
    rotations = f", rotations {card.rotations}" if card.classes and card.rotations != "none" else ""
    return f"{card.tasks} {card.split}{split}, {shape}, {queries}{classes}{rotations}"


def print_results(results: Mapping[str, Any], config: Config) -> None:
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
    own = str(config.learner.get("eval_steps", ""))
    for steps, row in (results.get("mse_by_step") or {own: results["mse"]}).items():
        after = f"  after {plural(int(steps), 'inner step')}" if steps.isdigit() else ""
        print(f"test mse  {row['mean']:.4f} ± {row['ci95']:.4f}{after}")
    row = results["mse_of_mean"]
    print(f"test mse  {row['mean']:.4f} ± {row['ci95']:.4f}  answering with the mean of the support targets")
