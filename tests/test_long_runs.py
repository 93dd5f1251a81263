"""Long runs from the command line: meshes, non-finite steps, TensorBoard, profiles and bfloat16."""

import contextlib
import gzip
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import read_json
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import jaxmeta as jm
from jaxmeta.cli import build, main
from jaxmeta.cli import run as run_of_command
from jaxmeta.cli.config import Chosen, base_of, resolve
from jaxmeta.cli.devices import described
from jaxmeta.cli.names import NETWORKS
from jaxmeta.cli.presets import PRESETS
from jaxmeta.cli.report import RunLog
from jaxmeta.training import Progress, Resumed, Validated, load_params
from jaxmeta.training.evaluate import Evaluation
from jaxmeta.training.metrics import MetricsLog, read_metrics

SMALL = ["train", "--tasks", "sinusoid", "--steps", "20", "--validate-every", "10", "--episodes", "20"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train on a mesh of two devices with a profile, reporting seven meta-steps as skipped."""
    # Initialise JAX with all devices before a command sets a smaller number.
    assert len(jax.devices()) > 1
    out = tmp_path_factory.mktemp("runs") / "sinusoid"
    log, steps = RunLog.__call__, []

    def log_as_skipped(self, event):
        if isinstance(event, Progress) and event.step in (3, 4):
            event = Progress(**{**vars(event), "skipped": event.step})
            steps.append(event.step)
        log(self, event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "__call__", log_as_skipped)
        # Evaluate the run once, not once for each number of inner steps.
        sinusoid = PRESETS["sinusoid"] | {"report_steps": ()}
        patch.setitem(PRESETS, "sinusoid", sinusoid)
        flags = ["--mesh", "tasks=2", "--profile", "--non-finite", "skip"]
        assert main([*SMALL, *flags, "--out", str(out)]) == 0
    assert steps == [3, 4]
    return out


@pytest.mark.nightly
def test_a_report_names_the_mesh_of_its_run(run):
    report = read_json(run / "report.json")
    assert (report["devices"], report["mesh"], report["processes"]) == (2, {"tasks": 2}, 1)
    assert read_json(run / "config.json")["run"]["mesh"] == "tasks=2"


@pytest.mark.nightly
def test_a_report_counts_the_skipped_meta_steps(run):
    assert read_json(run / "report.json")["skipped"] == 7
    assert "| meta-steps skipped | 7 |" in (run / "report.md").read_text()


@pytest.mark.nightly
def test_a_run_on_a_mesh_matches_a_run_on_one_device(run, tmp_path, capsys):
    out = tmp_path / "one"
    assert main([*SMALL, "--mesh", "tasks=1", "--out", str(out)]) == 0
    assert "devices   1 x cpu" in capsys.readouterr().out
    report = read_json(run / "report.json")
    assert report["mse"]["mean"] == pytest.approx(read_json(out / "report.json")["mse"]["mean"], rel=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        load_params(run),
        load_params(out),
    )
    assert main(["evaluate", str(run), "--mesh", "tasks=2", "--json", str(tmp_path / "again.json")]) == 0
    assert read_json(tmp_path / "again.json")["mse"] == report["mse"]


def test_devices_are_described_by_their_number_kind_and_mesh():
    assert described(jm.make_mesh(tasks=2)) == "2 x cpu (tasks=2)"


def test_a_resumed_run_takes_a_new_mesh_or_number_of_devices(run, monkeypatch):
    trained = []
    monkeypatch.setattr(run_of_command, "_train", lambda config, *_: trained.append(config.run))
    for flags, mesh, devices in (
        ({}, "tasks=2", None),
        ({"mesh": "tasks=1"}, "tasks=1", None),
        ({"devices": 2}, None, 2),
    ):
        run_of_command.resume_run(run, {"run": flags}, run_of_command.Invocation(resume=True))
        assert (trained[-1].mesh, trained[-1].devices) == (mesh, devices)


@pytest.mark.nightly
def test_a_run_may_be_resumed_on_another_mesh(tmp_path, monkeypatch):
    out = tmp_path / "run"
    log = RunLog.__call__

    def stop_at_seven(self, event):
        log(self, event)
        if isinstance(event, Progress) and event.step == 7:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "__call__", stop_at_seven)
        assert main([*SMALL, "--mesh", "tasks=2", "--out", str(out)]) == 75
    assert main(["train", "--resume", "--mesh", "tasks=1", "--out", str(out)]) == 0
    assert read_json(out / "config.json")["run"]["mesh"] == "tasks=1"
    assert main(["train", "--resume", "--devices", "2", "--out", str(out)]) == 0
    config = read_json(out / "config.json")["run"]
    assert (config["mesh"], config["devices"]) == (None, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "tasks=2", "--devices", "2"], "--mesh: got tasks=2, which sets the number of devices"),
        (
            ["--mesh", "tasks=64,params=9"],
            "--mesh: tasks=64 x params=9 needs 576 devices, but there are",
        ),
        (
            ["--mesh", "tasks=2", "--meta-batch", "3"],
            "--mesh: got a mesh of tasks=2, which must divide the 3",
        ),
        (["--mesh", "tasks=100000,params=9"], "--mesh: got tasks=100000,params=9, which is 900,000 devices"),
        (["--mesh", "model=2"], "--mesh: got 'model=2'; it must be like tasks=8"),
        (["--mesh", "examples=2"], "--mesh: got a mesh of examples=2; several devices may share"),
    ],
)
def test_an_unsuitable_mesh_is_refused(flags, message, tmp_path, capsys):
    assert main([*SMALL, *flags, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_a_run_of_only_non_finite_steps_ends_even_if_they_may_be_skipped(tmp_path, capsys):
    diverging = [*SMALL, "--inner-lr", "1e30"]
    assert main([*diverging, "--out", str(tmp_path / "stops")]) == 1
    assert "became non-finite in meta-step 1;" in capsys.readouterr().err
    assert main([*diverging, "--non-finite", "skip", "--out", str(tmp_path / "skips")]) == 1
    assert "became non-finite in meta-step 1;" in capsys.readouterr().err


def scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_the_values_of_the_metrics_file(run):
    logged, rows = scalars(run), read_metrics(run / "metrics.jsonl")
    for tag, name in (("training/loss", "loss"), ("validation/mse", "validation_mse")):
        expected = [(row["step"], row[name]) for row in rows if name in row]
        assert [step for step, _ in logged[tag]] == [step for step, _ in expected]
        np.testing.assert_allclose(
            [value for _, value in logged[tag]], [value for _, value in expected], rtol=1e-6
        )
    assert not {"training/step", "validation/best"} & set(logged)


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path):
    def progress(step, loss):
        return Progress(step, 10, {"loss": loss}, 1.0, 1.0)

    path = tmp_path / "metrics.jsonl"
    first, second = (RunLog(path, 10, "mse") for _ in range(2))
    best = Validated(6, "mse", Evaluation(1.0, 0.1, 8), True)
    for log, events in (
        (first, [*(progress(step, float(step)) for step in (2, 4, 6)), best]),
        (second, [Resumed(4), progress(6, 60.0)]),
    ):
        with log.showing(), contextlib.closing(MetricsLog(path)) as rows:
            for event in events:
                rows(event)
                log(event)
    assert scalars(tmp_path)["training/loss"] == [(2, 2.0), (4, 4.0), (6, 60.0)]
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2.0, 4.0, 60.0]


def test_a_profile_can_be_opened(run):
    (trace,) = (run / "profile").rglob("perfetto_trace.json.gz")
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]


@pytest.mark.nightly
def test_a_network_in_bfloat16_trains_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS, "mlp", lambda out: jm.nn.MLP(out=out, hidden=(8,), norm=True))
    out = tmp_path / "run"
    flags = [
        "--network",
        "mlp",
        "--precision",
        "bfloat16",
        "--steps",
        "2",
        "--meta-batch",
        "2",
        "--episodes",
        "4",
    ]
    assert main(["train", "prototypical", *flags, "--out", str(out)]) == 0
    assert "| training | --precision | bfloat16 |" in (out / "report.md").read_text()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load_params(out))} == {"float32"}
    assert main(["train", "--resume", "--precision", "float32", "--out", str(out)]) == 2


def test_precision_applies_to_computation_and_not_to_parameters():
    overrides = {"training": {"precision": "bfloat16"}, "tasks": {"ways": 2, "queries": 1}}
    learner = build.learner_of(resolve(base_of(Chosen("prototypical", network="mlp")), overrides))
    task = jm.Task(*(jm.Batch(jnp.zeros((2, 4, 4, 1)), jnp.arange(2), ways=2) for _ in range(2)))
    params = jax.eval_shape(learner.init, jax.random.key(0), task)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert "bf16" in str(jax.make_jaxpr(learner.loss)(params, task, jax.random.key(0)))


def test_memory_networks_require_float32():
    with pytest.raises(
        ValueError, match=r"^precision: got bfloat16; the networks of mann compute in float32"
    ):
        resolve(base_of(Chosen("mann")), {"training": {"precision": "bfloat16"}})


@pytest.mark.nightly
def test_a_command_refuses_bfloat16_for_a_memory_network(tmp_path, capsys):
    flags = ["--precision", "bfloat16", "--out", str(tmp_path / "run")]
    assert main(["train", "mann", "--tasks", "glyphs", *flags]) == 2
    assert "--precision: got bfloat16; the networks of mann compute in float32" in capsys.readouterr().err
