"""A run: what `jaxmeta train` and `jaxmeta evaluate` do, and the folder that stays."""

import contextlib
import dataclasses
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmeta import presets, registry, sources
from jaxmeta.config import (
    POPULATION,
    as_trained,
    check_data,
    data_form,
    data_of,
    fresh,
    json_target,
    params_of,
    resumed,
    stored,
)
from jaxmeta.core import Key, Learner, Params, ProtocolCard, TaskDistribution, TaskStream
from jaxmeta.devices import connect, described, machine, mesh_of, peak_memory
from jaxmeta.settings import Preset
from jaxmeta.training import (
    Evaluation,
    Stopped,
    calibrate,
    evaluate_episodes,
    evaluate_metrics,
    hosts,
    meta_step,
    save,
    train,
)
from jaxmeta.training.checkpoint import checkpoint_steps
from jaxmeta.training.evaluate import metric_name
from jaxmeta.training.figures import plot_curve
from jaxmeta.training.loop import Event
from jaxmeta.training.report import (
    NORMALISED,
    TENSORBOARD,
    RunLog,
    profiling,
    read_metrics,
    report_markdown,
    write_json,
    write_text,
)
from jaxmeta.training.sharding import process_share
from jaxmeta.training.step import sample_of, validation_key

_TEST = np.uint32(0xFFFFFFFD)
_POPULATION = np.uint32(0xFFFFFFFC)


class Signalled(KeyboardInterrupt):
    """The run was told to stop, and how it can go on."""


class _Signals:
    """SIGTERM and SIGINT: noted while training saves what there is, raised anywhere else."""

    def __init__(self, hint: str):
        self.hint, self.training, self.asked = hint, False, False

    def __call__(self, number: int, frame: Any) -> None:
        del frame
        if not self.training or self.asked:
            raise Signalled(f"by {signal.Signals(number).name}; {self.hint}")
        self.asked = True

    @contextlib.contextmanager
    def handled(self) -> Iterator["_Signals"]:
        try:
            before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread, which alone may handle signals
            before = {}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train_run(flags: Mapping[str, Any], learner: str | None = None, resume: bool = False) -> Path:
    """Trains, evaluates and reports.

    Args:
      flags: those given of the command line's, by name.
      learner: a name in the registry, or None for the preset's.
      resume: continue the run in `flags["out"]`, which `flags` must not contradict.

    Returns:
      The run's folder.
    """
    config, settings, out = resumed(flags, learner) if resume else fresh(flags, learner)
    connect(flags)
    mesh = mesh_of(config["devices"], config["mesh"], settings.meta_batch, flags.get("processes"))
    # All have looked for the folder before one makes it.
    hosts.meet("start")
    first, own = hosts.is_first(), process_share(mesh)
    key = jax.random.key(config["seed"])
    tasks = sources.tasks_of(settings, "train", config["data"], key, process=own)
    validation = sources.validation_tasks_of(settings, config["data"], validation_key(key))
    test = sources.tasks_of(settings, "test", config["data"], test_key(config["seed"]))
    if resume:
        check_data(config, tasks, out)
    else:
        config |= data_form(tasks, sources.source_of(settings.tasks).ink)
        settings = sources.with_form(settings, config["images"])
        config |= {"image_size": settings.image_size, "channels": settings.channels}
    method, optimizer = presets.learner_of(settings), presets.optimizer_of(settings)
    # Built for what it raises: all that can be refused is, before there is a folder.
    compared_to = presets.compared_to(settings)
    meta_step(method, optimizer, settings.meta_batch, settings.strategy, devices=mesh)
    parameters = _parameters(method, tasks)
    if first:
        _announce(config, settings, tasks, test, validation, parameters, mesh, out)

    signals = _Signals(f"continue with: jaxmeta train --resume --out {out}")
    with signals.handled(), hosts.missing_none(signals.hint):
        log = RunLog(out / "metrics.jsonl", settings.steps, metric_name(test))
        if first:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "config.json", config)
            if not checkpoint_steps(out):
                # Rows of a run that ended before it could save: this one starts again.
                log.path.unlink(missing_ok=True)
                shutil.rmtree(log.path.parent / TENSORBOARD, ignore_errors=True)
        hosts.meet("folder")
        with log.showing() if first else contextlib.nullcontext(), contextlib.ExitStack() as watching:
            listener: Callable[[Event], None] | None = log if first else None
            if listener is not None and flags.get("profile"):
                listener = watching.enter_context(profiling(listener, out / "profile"))
            signals.training = True
            try:
                state = train(
                    method,
                    tasks,
                    optimizer,
                    steps=settings.steps,
                    key=key,
                    meta_batch=settings.meta_batch,
                    strategy=settings.strategy,
                    devices=mesh,
                    compared_to=compared_to,
                    validation=validation,
                    validate_every=settings.validate_every,
                    run_dir=out,
                    resume=bool(checkpoint_steps(out)),
                    report=listener,
                    log_every=min(settings.log_every, max(1, settings.steps // 20)),
                    config=as_trained(config),
                    should_stop=lambda: signals.asked,
                    non_finite=settings.non_finite,
                )
            except Stopped as stopped:
                raise Signalled(f"after meta-step {stopped.step}, saved; {signals.hint}") from None
            signals.training = False
        if signals.asked:
            raise Signalled(f"after the last meta-step, saved; {signals.hint}")
        training_s = log.elapsed_s
        if first:
            rows = read_metrics(log.path)
            plot_curve(out / "curve.png", rows, log.metric, f"{settings.learner} on {test.card.tasks}")
            print(f"evaluating on {settings.episodes} test tasks …", flush=True)
        params = _with_population(method, settings, hosts.gathered(state.params), config, key, out)
        results, episodes = _results(settings, params, test, config["seed"], mesh)
        if not first:
            hosts.meet("report")
            return out
        report = {
            "learner": settings.learner,
            "tasks": settings.tasks,
            "preset": config["preset"],
            "ways": settings.ways,
            "shots": settings.shots,
            "queries": settings.queries,
            "seed": config["seed"],
            "steps": settings.steps,
            "best_step": log.best_step,
            "skipped": log.skipped,
            "steps_per_second": log.steps_per_second,
            "wall_s": round(log.elapsed_s, 3),
            "training_s": round(training_s, 3),
            "compile_s": log.compile_s,
            "episodes": settings.episodes,
            "parameters": parameters,
            "outer_optimizer": registry.LEARNERS[settings.learner].outer,
            "card": _card(test.card),
            **results,
            **machine(mesh),
            **peak_memory(mesh),
            "config": config,
        }
        write_text(out / "episodes.json", json.dumps(episodes) + "\n")
        write_text(out / "report.md", report_markdown(report))
        write_json(out / "report.json", report)
        hosts.meet("report")
    _print_results(results, settings)
    speed = f", {log.steps_per_second:.1f} meta-steps/s" if log.steps_per_second else ""
    print(f"{log.elapsed_s:.0f} s in all, training {training_s:.0f} s{speed}")
    print(f"run folder: {out}  (report.md, curve.png)")
    return out


def evaluate_run(run: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluates the parameters of a run on test tasks that `flags` may change, and prints the result."""
    folder = Path(run).expanduser()
    config, settings = stored(folder)
    settings = presets.revised(settings, flags)
    seed, data = flags.get("seed", config["seed"]), data_of(flags, config)
    target = json_target(flags.get("json"))
    mesh = mesh_of(flags.get("devices"), flags.get("mesh"), None)
    test = sources.tasks_of(settings, "test", data, test_key(seed))
    check_data(config, test, folder)
    params = params_of(folder, config)
    result = {
        "run": str(folder),
        "learner": settings.learner,
        "tasks": settings.tasks,
        "ways": settings.ways,
        "shots": settings.shots,
        "queries": settings.queries,
        "eval_steps": settings.eval_steps,
        "seed": seed,
        "episodes": settings.episodes,
        "card": _card(test.card),
        **_results(settings, params, test, seed, mesh)[0],
        **machine(mesh),
    }
    print(f"{settings.learner}, {_sentence(test.card)}; {settings.episodes} tasks, seed {seed}")
    _print_results(result, settings)
    if target is not None:
        write_json(target, result)
    return result


def test_key(seed: int) -> Key:
    """Of the test episodes of a run with `seed`."""
    return jax.random.fold_in(jax.random.key(seed), _TEST)


def _parameters(learner: Learner, tasks: TaskDistribution | TaskStream) -> int:
    key = jax.random.key(0)
    params = jax.eval_shape(lambda key, sample: learner.init(key, sample(key)), key, sample_of(tasks))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _with_population(
    learner: Learner, settings: Preset, params: Params, config: Mapping[str, Any], key: Key, out: Path
) -> Params:
    """The parameters with the population statistics of the training tasks, which the run's folder keeps."""
    if "population" not in registry.LEARNERS[settings.learner].norms.values():
        return params
    filled: Params = {"population": {}}
    if learner.statistics is not None:
        key = jax.random.fold_in(key, _POPULATION)
        tasks = sources.tasks_of(settings, "train", config["data"], key, for_evaluation=True)
        filled = {"population": calibrate(learner, params, tasks, key)["population"]}
    save(out / POPULATION, filled, overwrite=True)
    return {**params, **filled}


def _results(
    settings: Preset,
    params: Params,
    test: TaskDistribution | TaskStream,
    seed: int,
    mesh: Mesh,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Accuracy by normalisation, or mean squared error by number of inner steps; and of each episode."""

    def values(settings: Preset, norm: str) -> np.ndarray:
        return evaluate_episodes(
            presets.learner_of(settings, norm),
            params,
            test,
            episodes=settings.episodes,
            key=test_key(seed),
            devices=mesh,
        )

    def row(values: np.ndarray) -> dict[str, float]:
        found = Evaluation.of(values)
        return {"mean": found.mean, "ci95": found.ci95}

    results: dict[str, Any] = {}
    if metric_name(test) == "accuracy":
        norms = registry.LEARNERS[settings.learner].norms
        episodes = {name: values(settings, norm) for name, norm in norms.items()}
        results["accuracy"] = {name: {**row(episodes[name]), "norm": norm} for name, norm in norms.items()}
        if settings.sequence is not None:
            assert isinstance(test, TaskDistribution)
            # Its loss, which counts presentations, distorts where training does.
            learner = presets.learner_of(dataclasses.replace(settings, distort=None))
            found = evaluate_metrics(learner, params, test, episodes=settings.episodes, key=test_key(seed))
            results["accuracy_by_instance"] = {
                str(number): found[f"instance_{number}"]
                for number in range(1, len(found))
                # Those that never came up are NaN.
                if found.get(f"instance_{number}", math.nan) >= 0
            }
    else:
        by_step = {
            steps: values(dataclasses.replace(settings, eval_steps=steps), "batch")
            for steps in settings.report_steps
        }
        own = by_step[settings.eval_steps] if settings.eval_steps in by_step else values(settings, "batch")
        episodes, results["mse"] = {"mse": own}, row(own)
        if by_step:
            results["mse_by_step"] = {str(steps): row(found) for steps, found in by_step.items()}
    return results, {name: found.tolist() for name, found in episodes.items()}


def _card(card: ProtocolCard) -> dict[str, Any]:
    return dataclasses.asdict(card)


def _announce(
    config: dict,
    settings: Preset,
    tasks: TaskDistribution | TaskStream,
    test: TaskDistribution | TaskStream,
    validation: TaskDistribution | TaskStream | None,
    parameters: int,
    mesh: Mesh,
    out: Path,
) -> None:
    rate = "" if settings.inner_lr is None else f", α = {settings.inner_lr:g}"
    inner = (
        ""
        if settings.inner_steps is None
        else f"{rate}, inner steps {settings.inner_steps} (at test {settings.eval_steps})"
    )
    order = "" if settings.order is None else f", {settings.order} order"
    print(f"learner   {settings.learner}{order}{inner}")
    print(f"network   {settings.network}, {parameters:,} parameters")
    print(f"training  {_sentence(tasks.card)}; {settings.steps:,} meta-steps of {settings.meta_batch} tasks")
    print(
        f"test      {_sentence(test.card)}; {settings.episodes:,} tasks"
        + ("" if validation else "; no validation classes in this split, the last parameters are kept")
    )
    if (images := config["images"]) is not None:
        kind = "grey" if images["channels"] == 1 else "colour"
        print(f"images    {images['size']} x {images['size']}, {kind}")
    print(f"devices   {described(mesh)}")
    print(f"preset    {config['preset']}, seed {config['seed']}")
    print(f"folder    {out}", flush=True)


def _sentence(card: ProtocolCard) -> str:
    shape = f"{card.shots}-shot" if card.ways is None else f"{card.ways}-way {card.shots}-shot"
    classes = f", {card.classes:,} classes" if card.classes else ""
    split = f" {card.split_hash[:8]}" if card.split_hash else ""
    rotations = f", rotations {card.rotations}" if card.classes and card.rotations != "none" else ""
    return f"{card.tasks} {card.split}{split}, {shape}, {card.queries} queries{classes}{rotations}"


def _print_results(results: Mapping[str, Any], settings: Preset) -> None:
    if "accuracy" in results:
        for name, row in results["accuracy"].items():
            print(
                f"test accuracy  {100 * row['mean']:.2f} ± {100 * row['ci95']:.2f} %  {name} "
                f"({NORMALISED[row['norm']]})"
            )
        for instance, value in results.get("accuracy_by_instance", {}).items():
            print(f"instance {instance:>2}    {100 * value:.2f} %")
        return
    for steps, row in (results.get("mse_by_step") or {str(settings.eval_steps): results["mse"]}).items():
        print(f"test mse  {row['mean']:.4f} ± {row['ci95']:.4f}  after {steps} inner steps")
