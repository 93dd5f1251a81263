"""Runs on sequences: their report says how accuracy rises from one presentation of a class to the next."""

import json

import jax
import numpy as np
import pytest

import jaxmeta as jm
from jaxmeta import presets, registry, runs
from jaxmeta.cli import main

ARGUMENTS = ["--tasks", "glyphs", "--ways", "3", "--shots", "4", "--queries", "1", "--sequence", "12"]


def small(out):
    return jm.nn.MemoryNetwork(out, jm.nn.LRUA(rows=6, width=4, heads=2), hidden=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("model-runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.NETWORKS, "lrua", small)
        settings = ["--steps", "4", "--meta-batch", "2", "--episodes", "20", "--distort"]
        assert main(["train", "mann", *ARGUMENTS, *settings, "--out", str(place / "run")]) == 0
        yield place / "run"


@pytest.mark.nightly
def test_accuracy_by_presentation_is_of_test_images_as_they_are(run):
    report = json.loads((run / "report.json").read_text())
    assert report["accuracy"].keys() == {"inductive"}
    # No class can come more often than there are steps.
    assert (
        list(report["accuracy_by_instance"])
        == [str(number) for number in range(1, 11)][: len(report["accuracy_by_instance"])]
    )
    learner, params = jm.load_run(run)
    plain = jm.mann(small(3))
    tasks = jm.tasks.sequences(jm.tasks.glyphs("test", ways=3, shots=4, queries=1), length=12)
    expected = jm.evaluate_metrics(plain, params, tasks, episodes=20, key=runs.test_key(0))
    for number, value in report["accuracy_by_instance"].items():
        np.testing.assert_allclose(value, expected[f"instance_{number}"], rtol=1e-6)
    # Queries after the sequence, by the same memory.
    found = jm.evaluate(learner, params, tasks, episodes=20, key=runs.test_key(0)).mean
    np.testing.assert_allclose(found, expected["accuracy"], rtol=1e-6)
    text = (run / "report.md").read_text()
    assert "inductive: no batch normalisation" in text
    assert "Accuracy by presentation of a class" in text


@pytest.mark.nightly
def test_the_run_can_be_evaluated_again_and_on_other_seeds(run, tmp_path):
    target = tmp_path / "again.json"
    assert main(["evaluate", str(run), "--json", str(target)]) == 0
    report = json.loads((run / "report.json").read_text())
    again = json.loads(target.read_text())
    assert again["accuracy"] == report["accuracy"]
    assert again["accuracy_by_instance"] == report["accuracy_by_instance"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--strings", "5,5"], "--strings: are labels of sequences; add --sequence T"),
        (["--sequence", "12", "--strings", "5"], "--strings: got 5; it must be letters,characters"),
        (["--sequence", "4", "--ways", "5"], "--sequence: got 4 steps for 5 classes"),
        (["--sequence", "15", "--strings", "2,2"], "--strings: got 2 characters of 2 letters, 4 strings"),
        (["--sequence", "0"], "--sequence: got 0; it must be at least 1"),
        (["--network", "conv4"], "--network: got conv4; mann works with lrua"),
    ],
)
def test_bad_flags_are_named(flags, says, tmp_path, capsys):
    assert main(["train", "mann", "--tasks", "glyphs", *flags, "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_learners_have_no_sequences(tmp_path, capsys):
    assert main(["train", "maml", "--sequence", "10", "--out", str(tmp_path / "run")]) == 2
    assert "--sequence: maml has no such setting" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mann-omniglot", "mann-omniglot-strings"])
def test_the_published_settings(name):
    settings = presets.PRESETS[name]
    # The registry's "lrua", which the runs above replace.
    network, memory = registry.LEARNERS["mann"].network(settings), jm.nn.MemoryNetwork(5).memory
    assert (memory.rows, memory.width, memory.heads, memory.decay) == (128, 40, 4, 0.99)
    assert jm.nn.MemoryNetwork(5).hidden == 200
    assert network.out == (5 if settings.strings is None else 25)
    assert settings.sequence == 10 * settings.ways
    task = jax.eval_shape(
        jm.tasks.sequences(
            jm.tasks.glyphs(ways=settings.ways, shots=settings.shots, queries=1),
            length=settings.sequence,
            strings=settings.label_strings,
        ).sample,
        jax.random.key(0),
    )
    assert task.support.ways == (settings.ways if settings.strings is None else 3125)


@pytest.mark.nightly
@pytest.mark.parametrize("flags", [[], ["--task-weights", "none", "--embedding-loss", "contrastive"]])
def test_meta_networks_run_from_the_command_line(flags, tmp_path, monkeypatch):
    def tiny(out):
        return jm.nn.AugmentedCNN(out, filters=2, blocks=1, features=4)

    monkeypatch.setitem(registry.NETWORKS, "augmented-cnn", tiny)
    tasks = ["--tasks", "glyphs", "--ways", "3", "--queries", "1"]
    settings = ["--steps", "2", "--meta-batch", "2", "--episodes", "20", "--distort"]
    run = tmp_path / "run"
    assert main(["train", "metanet", *tasks, *settings, *flags, "--out", str(run)]) == 0
    learner, params = jm.load_run(run)
    assert ("task_generator" in params) == (not flags)
    report = json.loads((run / "report.json").read_text())
    assert report["accuracy"].keys() == {"inductive"}
    test = jm.tasks.glyphs("test", ways=3, queries=1)
    found = jm.evaluate(learner, params, test, episodes=20, key=runs.test_key(0)).mean
    np.testing.assert_allclose(found, report["accuracy"]["inductive"]["mean"], rtol=1e-6)
    text = (run / "report.md").read_text()
    assert f"| embedding loss | {'contrastive' if flags else 'xent'} |" in text
    assert f"| fast weights of the task | {'none' if flags else 'embedding'} |" in text


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize(
    ("learner", "flags", "says"),
    [
        ("maml", ["--embedding-loss", "xent"], "--embedding-loss: maml has no such setting"),
        ("mann", ["--task-weights", "none"], "--task-weights: mann has no such setting"),
        ("metanet", ["--network", "conv4"], "--network: got conv4; metanet works with augmented-cnn"),
    ],
)
def test_settings_of_meta_networks_are_its_own(learner, flags, says, tmp_path, capsys):
    assert main(["train", learner, "--tasks", "glyphs", *flags, "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err
