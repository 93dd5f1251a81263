"""Runs of model-based methods: sequences, accuracy by presentation, and Meta Networks."""

import json

import jax
import numpy as np
import pytest

import jaxmeta as jm
from jaxmeta.cli import build, main
from jaxmeta.cli.config import Chosen, base_of, resolve
from jaxmeta.cli.names import NETWORKS
from jaxmeta.cli.run import evaluation_key

ARGUMENTS = ["--tasks", "glyphs", "--ways", "3", "--shots", "4", "--queries", "1", "--sequence", "12"]


def small(out):
    return jm.nn.MemoryNetwork(out, jm.nn.LRUA(rows=6, width=4, heads=2), hidden=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("model-runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "lrua", small)
        settings = ["--steps", "4", "--meta-batch", "2", "--episodes", "20", "--distort"]
        assert main(["train", "mann", *ARGUMENTS, *settings, "--out", str(workspace / "run")]) == 0
    return workspace / "run"


@pytest.fixture
def small_lrua(monkeypatch):
    """Let `--network lrua` be the small network for one test, as when the run was trained."""
    monkeypatch.setitem(NETWORKS, "lrua", small)


@pytest.mark.nightly
@pytest.mark.usefixtures("small_lrua")
def test_accuracy_by_presentation_uses_undistorted_test_images(run):
    report = json.loads((run / "report.json").read_text())
    assert report["accuracy"].keys() == {"inductive"}
    # Presentations are counted from 1 without gaps.
    assert (
        list(report["accuracy_by_instance"])
        == [str(number) for number in range(1, 11)][: len(report["accuracy_by_instance"])]
    )
    learner, params = jm.load_run(run)
    plain = jm.mann(small(3))
    tasks = jm.tasks.sequences(jm.tasks.glyphs("test", ways=3, shots=4, queries=1), length=12)
    expected = jm.evaluate_metrics(plain, params, tasks, episodes=20, key=evaluation_key(0))
    for number, value in report["accuracy_by_instance"].items():
        np.testing.assert_allclose(value, expected[f"instance_{number}"], rtol=1e-6)
    # Queries after the sequence read the same memory.
    accuracy = jm.evaluate(learner, params, tasks, episodes=20, key=evaluation_key(0)).mean
    np.testing.assert_allclose(accuracy, expected["accuracy"], rtol=1e-6)
    text = (run / "report.md").read_text()
    assert "inductive: no batch normalisation" in text
    assert "Accuracy by presentation of a class" in text


@pytest.mark.nightly
@pytest.mark.usefixtures("small_lrua")
def test_a_second_evaluation_gives_the_same_accuracies(run, tmp_path):
    target = tmp_path / "again.json"
    assert main(["evaluate", str(run), "--json", str(target)]) == 0
    report = json.loads((run / "report.json").read_text())
    again = json.loads(target.read_text())
    assert again["accuracy"] == report["accuracy"]
    assert again["accuracy_by_instance"] == report["accuracy_by_instance"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strings", "5,5"], "--strings: needs tasks as sequences; add --sequence T"),
        (
            ["--sequence", "12", "--strings", "5"],
            "--strings: got 5; it must be 2 whole numbers separated by commas",
        ),
        (["--sequence", "4", "--ways", "5"], "--sequence: got 4 steps for 5 classes"),
        (
            ["--sequence", "15", "--strings", "2,2"],
            "--strings: got 2 characters of 2 letters, which is 4 strings",
        ),
        (["--sequence", "0"], "--sequence: got 0; it must be at least 1"),
        (["--network", "conv4"], "--network: got conv4; mann works with lrua"),
    ],
)
def test_errors_for_invalid_flags_name_them(flags, message, tmp_path, capsys):
    assert main(["train", "mann", "--tasks", "glyphs", *flags, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_learners_refuse_sequences(tmp_path, capsys):
    assert main(["train", "maml", "--sequence", "10", "--out", str(tmp_path / "run")]) == 2
    assert "--sequence: is a setting of mann, not of maml on glyphs" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mann-omniglot", "mann-omniglot-strings"])
def test_the_presets_have_the_published_settings(name):
    config = resolve(base_of(Chosen(preset=name)), {})
    network = config.names().facts.network(build.network_builder(config), config.tasks)[0][0]
    memory = network.memory
    assert (memory.rows, memory.width, memory.heads, memory.decay) == (128, 40, 4, 0.99)
    assert network.hidden == 200
    ways, shots, sequence = (config.tasks[setting] for setting in ("ways", "shots", "sequence"))
    strings = config.tasks["strings"]
    assert network.out == (5 if strings is None else 25)
    assert sequence == 10 * ways
    tasks = jm.tasks.glyphs(ways=ways, shots=shots, queries=1)
    sequences = jm.tasks.sequences(tasks, length=sequence, strings=strings)
    task = jax.eval_shape(sequences.sample, jax.random.key(0))
    assert task.support.ways == (ways if strings is None else 3125)


@pytest.mark.nightly
@pytest.mark.parametrize("flags", [[], ["--task-weights", "none", "--embedding-loss", "contrastive"]])
def test_meta_networks_run_from_the_command_line(flags, tmp_path, monkeypatch):
    def tiny(out):
        return jm.nn.AugmentedCNN(out, filters=2, blocks=1, features=4)

    monkeypatch.setitem(NETWORKS, "augmented-cnn", tiny)
    tasks = ["--tasks", "glyphs", "--ways", "3", "--queries", "1"]
    settings = ["--steps", "2", "--meta-batch", "2", "--episodes", "20", "--distort"]
    run = tmp_path / "run"
    assert main(["train", "metanet", *tasks, *settings, *flags, "--out", str(run)]) == 0
    learner, params = jm.load_run(run)
    assert ("task_generator" in params) == (not flags)
    report = json.loads((run / "report.json").read_text())
    assert report["accuracy"].keys() == {"inductive"}
    test = jm.tasks.glyphs("test", ways=3, queries=1)
    accuracy = jm.evaluate(learner, params, test, episodes=20, key=evaluation_key(0)).mean
    np.testing.assert_allclose(accuracy, report["accuracy"]["inductive"]["mean"], rtol=1e-6)
    text = (run / "report.md").read_text()
    assert f"| learner | --embedding-loss | {'contrastive' if flags else 'xent'} |" in text
    assert f"| learner | --task-weights | {'none' if flags else 'embedding'} |" in text


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize(
    ("learner", "flags", "message"),
    [
        (
            "maml",
            ["--embedding-loss", "xent"],
            "--embedding-loss: is a setting of metanet, not of maml on glyphs",
        ),
        (
            "mann",
            ["--task-weights", "none"],
            "--task-weights: is a setting of metanet, not of mann on glyphs",
        ),
        ("metanet", ["--network", "conv4"], "--network: got conv4; metanet works with augmented-cnn"),
    ],
)
def test_settings_of_meta_networks_are_refused_elsewhere(learner, flags, message, tmp_path, capsys):
    assert main(["train", learner, "--tasks", "glyphs", *flags, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
