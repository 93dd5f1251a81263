"""Tests of run folders of `jm.train(run_dir=…)`: loading, plotting, evaluation; and of the progress bar."""

import contextlib
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from support import read_json

import jaxmeta as jm
from jaxmeta.cli import main
from jaxmeta.cli.run import evaluation_key
from jaxmeta.training import progress
from jaxmeta.training.metrics import read_metrics

KEY = jax.random.key(0)
TASKS = jm.tasks.sinusoid("train", shots=5, queries=5)
LEARNER = jm.maml(jm.nn.MLP(out=1, hidden=(4,)), inner_lr=0.01, loss=jm.losses.mse)


def squared_error(params, task, key):
    value = jnp.square(task.query.x * params["w"] - task.query.y).mean()
    return value, {"mse": value}


# A learner that compiles quickly.
SLOPE = jm.Learner(
    lambda key, task: {"w": jnp.ones(())},
    lambda params, support, key: params,
    lambda params, adapted, x: x * params["w"],
    squared_error,
)
MODULE = '''import jax.numpy as jnp

import jaxmeta as jm

learner = jm.maml(jm.nn.MLP(out=1, hidden=(4,)), inner_lr=0.01, loss=jm.losses.mse)
other = jm.maml(jm.nn.MLP(out=1, hidden=(5,)), inner_lr=0.01, loss=jm.losses.mse)


def factory():
    """Build the learner, which has its own network."""
    return learner
'''


@pytest.fixture(scope="module")
def library_run(tmp_path_factory):
    """Return a folder with a run and a user-defined module, the final state and the reported events."""
    folder = tmp_path_factory.mktemp("library")
    validation = jm.tasks.sinusoid("validation", shots=5, queries=5)
    settings = {"meta_batch": 2, "log_every": 2, "validate_every": 3, "validation_episodes": 4}
    settings |= {"steps": 6, "run_dir": folder / "run", "validation": validation, "key": KEY}
    events = []
    state = jm.train(LEARNER, TASKS, optax.adam(1e-3), report=events.append, **settings)
    (folder / "my_module.py").write_text(MODULE)
    (folder / "images").mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "images" / "0.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder, state, events
    sys.modules.pop("my_module", None)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_metrics_have_a_row_for_each_report(library_run):
    folder, _, events = library_run
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    reported = [event for event in events if hasattr(event, "metrics") or hasattr(event, "evaluation")]
    assert [row["step"] for row in rows] == [event.step for event in reported] == [2, 3, 3, 4, 6, 6]
    for row, event in zip(rows, reported, strict=True):
        if hasattr(event, "metrics"):
            assert {name: row[name] for name in event.metrics} == event.metrics
        else:
            assert (row["validation_mse"], row["best"]) == (event.evaluation.mean, event.best)
    assert [row["elapsed_s"] for row in rows] == sorted(row["elapsed_s"] for row in rows)


def test_a_resumed_run_appends_to_its_metrics_and_a_new_run_overwrites_them(tmp_path):
    settings = {"meta_batch": 1, "log_every": 1, "key": KEY, "run_dir": tmp_path, "checkpoint_every": 2}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 7.0, "elapsed_s": 1.0}\n')
    jm.train(SLOPE, TASKS, optax.sgd(0.0), steps=2, **settings)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        # A row after the last checkpoint, as if the run had been killed then.
        file.write(json.dumps({"step": 3, "loss": 9.0, "elapsed_s": 2.0}) + "\n")
    jm.train(SLOPE, TASKS, optax.sgd(0.0), steps=4, resume=True, **settings)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert not {7.0, 9.0} & {row["loss"] for row in rows}


def test_a_user_defined_learner_is_loaded_with_the_best_parameters(library_run):
    folder, state, _ = library_run
    for tasks in (None, TASKS):
        learner, params = jm.load_run(folder / "run", learner=LEARNER, tasks=tasks)
        assert learner is LEARNER
        assert_trees_equal(params, state.params)


def test_load_run_reports_missing_and_unsuitable_arguments(library_run, tmp_path):
    folder, _, _ = library_run
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*jm\.load_run\(folder, learner=learner\)"):
        jm.load_run(folder / "run")
    with pytest.raises(FileNotFoundError, match=r"is not a run folder: .*checkpoints does not exist"):
        jm.load_run(tmp_path, learner=LEARNER)
    with pytest.raises(ValueError, match=r"^learner: got the function maml; it must be a jm\.Learner"):
        jm.load_run(folder / "run", learner=jm.maml)
    other = jm.maml(jm.nn.MLP(out=1, hidden=(5,)), loss=jm.losses.mse)
    with pytest.raises(ValueError, match=r"^.* has other parameters: .*\[4\] in the stored one"):
        jm.load_run(folder / "run", learner=other, tasks=TASKS)
    with pytest.raises(ValueError, match=r"^tasks: got TaskDistribution\(…\); without a jm\.Learner"):
        jm.load_run(folder / "run", tasks=TASKS)


def test_load_run_refuses_row_and_network_with_a_learner(library_run):
    folder, _, _ = library_run
    for name, value in {"row": "transductive", "network": "conv4"}.items():
        with pytest.raises(jm.ArgumentError, match=f"^{name}: got '{value}'; leave it out"):
            jm.load_run(folder / "run", learner=LEARNER, **{name: value})


def test_parameters_with_custom_nodes_are_loaded_with_the_shapes_of_tasks(tmp_path):
    learner = jm.Learner(
        lambda key, task: optax.EmaState(jnp.ones(()), {"w": jnp.ones(2)}),
        lambda params, support, key: params,
        lambda params, adapted, x: x * params.ema["w"].sum(),
        lambda params, task, key: ((params.ema["w"] ** 2).sum() + params.count, {}),
    )
    settings = {"steps": 1, "meta_batch": 1, "key": KEY, "run_dir": tmp_path}
    state = jm.train(learner, TASKS, optax.sgd(0.1), **settings)
    with pytest.raises(ValueError, match=r"^tasks: got None, but .* nodes other than dicts, .*; give tasks"):
        jm.load_run(tmp_path, learner=learner)
    assert_trees_equal(jm.load_run(tmp_path, learner=learner, tasks=TASKS)[1], state.params)


def test_the_metrics_are_plotted(library_run, capsys):
    folder, _, _ = library_run
    assert main(["plot", "run", "--out", "curve.png"]) == 0
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", "nowhere"]) == 2
    assert "nowhere is not a run folder: nowhere/metrics.jsonl does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "metric"),
    [
        ({"loss": 1.0}, "loss"),
        ({"loss": 1.0, "mse": 2.0}, "mse"),
        ({"loss": 1.0, "distance": 2.0}, "distance"),
        ({"loss": 1.0, "cosine": 0.5, "validation_regret": 2.0, "validation_regret_ci95": 1.0}, "regret"),
    ],
)
def test_a_user_defined_metric_is_plotted(row, metric, tmp_path):
    from jaxmeta.cli.compare import _metric_of

    rows = [{"step": step, "elapsed_s": 1.0 * step, "best": True, **row} for step in (1, 2)]
    assert _metric_of(rows) == metric
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "own.png")]) == 0


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("learner", ["my_module:factory", "my_module:learner"])
def test_parameters_are_evaluated_with_a_learner_given_by_name(learner, library_run, capsys):
    folder, state, _ = library_run
    argv = ["evaluate", "run", "--learner", learner, "--tasks", "sinusoid", "--shots", "5", "--queries", "5"]
    assert main([*argv, "--episodes", "6", "--json", "result.json"]) == 0
    tasks = jm.tasks.sinusoid("test", shots=5, queries=5)
    expected = jm.evaluate(LEARNER, state.params, tasks, episodes=6, key=evaluation_key(0))
    assert read_json(folder / "result.json")["mse"]["mean"] == pytest.approx(expected.mean, rel=1e-5)
    assert "test mse" in capsys.readouterr().out


@pytest.mark.nightly
def test_evaluate_takes_a_method_with_its_network_and_settings(library_run, capsys):
    folder, state, _ = library_run
    argv = ["evaluate", "run", "--learner", "maml", "--tasks", "sinusoid", "--shots", "5", "--queries", "5"]
    argv += ["--network", "mlp-40", "--inner-lr", "0.01", "--inner-steps", "1", "--eval-steps", "1"]
    argv += ["--episodes", "6", "--json", "result.json"]
    assert main([*argv, "--hidden", "4"]) == 0
    tasks = jm.tasks.sinusoid("test", shots=5, queries=5)
    expected = jm.evaluate(LEARNER, state.params, tasks, episodes=6, key=evaluation_key(0))
    assert read_json(folder / "result.json")["mse"]["mean"] == pytest.approx(expected.mean, rel=1e-5)
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert "--learner: maml with the network mlp-40 does not have the parameters in run;" in message


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["evaluate", "run"], "--learner: is missing; run was written by jm.train(run_dir=…)"),
        (["evaluate", "run", "--learner", "maml"], "--tasks: is missing; run was written by jm.train"),
        (
            ["evaluate", "run", "--learner", "my_module:other", "--tasks", "sinusoid"],
            "--learner: my_module:other with the network",
        ),
        (["evaluate", "run", "--learner", "my_module:none", "--tasks", "sinusoid"], "has no function 'none'"),
        (["train", "--resume", "--out", "run"], "no config.json, in which `jaxmeta train` stores learner"),
        (
            ["predict", "run", "--support", "images", "--query", "images"],
            "no config.json, in which `jaxmeta train`",
        ),
    ],
)
def test_the_command_line_reports_missing_and_unsuitable_arguments(argv, expected, library_run, capsys):
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert len(message.splitlines()) == 1


# --- The progress bar -----------------------------------------------------------------------------------


def train_with(report, **settings):
    settings = {"steps": 4, "meta_batch": 1, "log_every": 2, "key": KEY, **settings}
    return jm.train(SLOPE, TASKS, optax.sgd(0.0), report=report, **settings)


def test_progress_is_printed_as_lines_without_a_terminal(capsys):
    validation = {"validation": TASKS, "validation_episodes": 2, "validate_every": 4}
    train_with(jm.progress_bar(), **validation)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "2/4"], ["step", "4/4"], ["step", "4"]]
    assert all(word in lines[1] for word in ("loss ", "mse ", "steps/s", "0:00 left"))
    assert "validation mse " in lines[2]
    assert "(best so far)" in lines[2]


def test_counts_are_printed_with_the_remaining_time(monkeypatch, capsys):
    clock = iter([0.0, 9.0, 14.0, 16.0, 29.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    count = progress.CountLines("features", "images")
    for done in (100, 200, 300, 1000):
        count(done, 1200)
    # The first 100 images take 9 s, with compilation, and are left out: 100 in 5 s, then 900 in 20 s.
    assert capsys.readouterr().out.splitlines() == [
        "features  200/1,200 images  0:50 left",
        "features  1,000/1,200 images  0:04 left",
    ]


class Terminal(io.StringIO):
    """A substitute for standard output on a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def bars(monkeypatch):
    """Return a list of the calls of each bar: its steps, events and lines, and whether it was closed."""
    shown = []

    @contextlib.contextmanager
    def bar(steps):
        shown.append([steps])
        try:
            yield lambda event: shown[-1].append(event.step), lambda line: shown[-1].append(line[:4])
        finally:
            shown[-1].append("closed")

    monkeypatch.setattr(progress, "_bar", bar)
    return shown


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ({"mae": 0.5}, "loss 1.0000  mae 0.5000"),
        ({"accuracy": 0.5, "instance_1": 0.2, "cosine": 0.9}, "loss 1.0000  accuracy 50.0 %"),
        ({"instance_1": 0.1, "instance_2": 0.2, "instance_3": 0.3}, "instance_1 0.1000  instance_2 0.2000"),
    ],
)
def test_progress_has_the_metrics_of_the_learner(metrics, shown, capsys):
    jm.progress_bar()(jm.training.Progress(5, 5, {"loss": 1.0, **metrics}, 1.0, 0.0, 0))
    line = capsys.readouterr().out
    assert shown in line
    assert "cosine" not in line
    assert "instance_3" not in line


def test_a_bar_is_shown_during_training_and_always_closed(bars, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    report = jm.progress_bar()
    train_with(report)
    assert bars == [[4, 2, 4, "closed"]]
    with pytest.raises(jm.training.Stopped):
        train_with(report, should_stop=lambda: True)
    assert bars[1:] == [[4, "closed"]]


def test_a_real_bar_shows_the_numbers_of_the_last_step(monkeypatch):
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    train_with(jm.progress_bar())
    output = terminal.getvalue()
    assert "4/4" in output
    assert "loss " in output


def test_without_rich_progress_is_printed_as_lines(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys, "stdout", Terminal())
    with pytest.warns(UserWarning, match="the progress bar could not be written; training continues"):
        train_with(jm.progress_bar())
    assert "4/4" in sys.stdout.getvalue()
