"""Runs of metric-based methods: population statistics, prediction and invalid flags."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bars import draw_bar, small_mlp
from support import read_json

import jaxmeta as jm
from jaxmeta.cli import main
from jaxmeta.cli.names import NETWORKS
from jaxmeta.training import load_params


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Write images of eight classes, bars whose row is the class, into a folder for data and runs."""
    workspace = tmp_path_factory.mktemp("metric-runs")
    for number in range(8):
        for seed in range(5):
            draw_bar(workspace / "images" / f"bar{number}" / f"{seed}.png", number, 10 * number + seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXMETA_CACHE", str(workspace / "cache"))
        patch.setitem(NETWORKS, "conv4-32", small_mlp)
        yield workspace


def train(workspace, learner, name, *more):
    arguments = [
        "--ways",
        "3",
        "--queries",
        "2",
        "--classes",
        "0.5,0,0.5",
        "--steps",
        "60",
        "--episodes",
        "20",
    ]
    tasks = f"folder:{workspace / 'images'}"
    return main(["train", learner, "--tasks", tasks, *arguments, *more, "--out", str(workspace / name)])


@pytest.fixture(scope="module")
def prototypical(workspace):
    assert train(workspace, "prototypical", "prototypical") == 0
    return workspace / "prototypical"


@pytest.mark.nightly
def test_the_inductive_row_uses_statistics_of_the_training_tasks(prototypical):
    report = read_json(prototypical / "report.json")
    assert {row: entry["norm"] for row, entry in report["accuracy"].items()} == {
        "transductive": "batch",
        "inductive": "population",
    }
    assert report["accuracy"]["inductive"]["mean"] > 0.8
    text = (prototypical / "report.md").read_text()
    assert "inductive: batch normalisation with statistics of the training tasks" in text


@pytest.mark.nightly
def test_the_statistics_are_saved_with_the_run(prototypical, tmp_path):
    target = tmp_path / "again.json"
    assert main(["evaluate", str(prototypical), "--json", str(target)]) == 0
    assert read_json(target)["accuracy"] == read_json(prototypical / "report.json")["accuracy"]
    learner, params = jm.load_run(prototypical)
    assert "population" in params
    assert "population" not in load_params(prototypical)
    support = jm.Batch(jnp.zeros((2, 8, 8, 1)), jnp.arange(2), ways=2)
    adapted = learner.adapt(params, support, jax.random.key(0))
    assert learner.predict(params, adapted, jnp.zeros((1, 8, 8, 1))).shape == (1, 2)


@pytest.mark.nightly
def test_predict_takes_more_classes_than_training_had(prototypical, workspace, tmp_path, capsys):
    for number in range(5):
        for part, seed in (("support", 0), ("query", 1)):
            folder = tmp_path / part / f"bar{number}"
            folder.mkdir(parents=True)
            (folder / "image.png").write_bytes(
                (workspace / "images" / f"bar{number}" / f"{seed}.png").read_bytes()
            )
    command = ["predict", str(prototypical), "--support", str(tmp_path / "support")]
    target = tmp_path / "answers.json"
    assert main([*command, "--query", str(tmp_path / "query"), "--json", str(target)]) == 0
    answers = read_json(target)
    assert len(answers) == 5
    assert len(answers[0]["probabilities"]) == 5
    assert sum(answer["file"].startswith(answer["class"] + "/") for answer in answers) >= 4


@pytest.mark.nightly
def test_a_run_without_statistics_can_be_finished(prototypical, tmp_path, capsys):
    shutil.copytree(prototypical, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "population")
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "the run has not ended" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert (
        read_json(tmp_path / "run" / "report.json")["accuracy"]
        == read_json(prototypical / "report.json")["accuracy"]
    )


@pytest.mark.nightly
def test_a_stream_computes_the_statistics_too(workspace):
    assert train(workspace, "prototypical", "streamed", "--stream") == 0
    accuracy = read_json(workspace / "streamed" / "report.json")["accuracy"]
    assert accuracy["inductive"]["mean"] > 0.8


@pytest.mark.nightly
@pytest.mark.parametrize("learner", ["simple_shot", "fine_tuned_head"])
def test_baselines_train_on_all_classes_at_once(workspace, learner, capsys):
    assert train(workspace, learner, learner) == 0
    assert "4-way" in capsys.readouterr().out.split("training")[1].split("\n")[0]
    report = read_json(workspace / learner / "report.json")
    assert report["ways"] == report["card"]["ways"] == 3
    assert report["accuracy"]["inductive"]["mean"] > 0.6
    assert train(workspace, learner, f"{learner}-streamed", "--stream") == 2
    assert f"--stream: {learner} trains on mini-batches of all classes" in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.parametrize("learner", ["soft_kmeans", "label_propagation"])
def test_transductive_methods_report_one_row_and_predict_refuses_them(workspace, learner, capsys):
    out = workspace / learner
    assert train(workspace, learner, learner, "--devices", "1") == 0
    assert " inductive" not in (out / "report.md").read_text()
    accuracy = read_json(out / "report.json")["accuracy"]
    assert {row: entry["norm"] for row, entry in accuracy.items()} == {"transductive": "batch"}
    assert accuracy["transductive"]["mean"] > 0.6
    assert main(["evaluate", str(out), "--json", str(workspace / "again.json")]) == 0
    assert read_json(workspace / "again.json")["accuracy"] == accuracy

    images = str(workspace / "images")
    capsys.readouterr()
    assert main(["predict", str(out), "--support", images, "--query", images]) == 2
    assert (
        f"a run of {learner}, whose prediction for an image depends on the other" in capsys.readouterr().err
    )
    assert main(["export", str(out), "--support", images, "--out", str(workspace / "program")]) == 2
    with pytest.raises(jm.ArgumentError, match=r"^source: .* depends on the other images"):
        jm.load_classifier(out, support=images)
    with pytest.raises(jm.ArgumentError, match=f'^row: .* {learner} is transductive: .* row="transductive"'):
        jm.load_run(out)
    method, params = jm.load_run(out, "transductive")
    support = jm.Batch(
        np.eye(3, 64, dtype=np.float32).reshape(3, 8, 8, 1), np.arange(3, dtype=np.int32), ways=3
    )
    adapted = method.adapt(params, support, jax.random.key(0))
    assert method.predict(params, adapted, support.x).shape == (3, 3)


@pytest.mark.parametrize(
    ("learner", "norms"),
    [
        ("prototypical", {"inductive": "none"}),
        ("maml", {"inductive": "none"}),
        # Its features are centred by the mean of the batch or of the training classes.
        ("simple_shot", {"transductive": "batch", "inductive": "population"}),
    ],
)
@pytest.mark.nightly
def test_a_network_without_batch_normalisation_is_evaluated_once(learner, norms, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--tasks", "glyphs", "--network", "linear", "--ways", "2", "--queries", "1", "--devices", "1"]
    assert main(["train", learner, *flags, "--steps", "1", "--episodes", "2", "--out", str(out)]) == 0
    accuracy = read_json(out / "report.json")["accuracy"]
    assert {row: entry["norm"] for row, entry in accuracy.items()} == norms
    assert ("inductive (no batch normalisation)" in capsys.readouterr().out) == (len(norms) == 1)


@pytest.mark.nightly
def test_the_zero_shot_preset_trains_and_reports_both_rows(tmp_path):
    flags = ["--steps", "3", "--ways", "3", "--queries", "2", "--episodes", "4", "--network", "strided-conv4"]
    assert main(["train", "--preset", "glyphs-zero-shot", *flags, "--out", str(tmp_path / "run")]) == 0
    report = read_json(tmp_path / "run" / "report.json")
    assert (report["ways"], report["shots"]) == (3, 0)
    assert set(report["accuracy"]) == {"transductive", "inductive"}


@pytest.mark.nightly_rows(after=2)
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["train", "prototypical", "--tasks", "sinusoid"],
            "LEARNER: prototypical learns classification, but sinusoid",
        ),
        (["train", "matching", "--scale", "0"], "--scale"),
        (["train", "matching", "--context-steps", "0"], "--context-steps"),
        (["train", "relation", "--network", "conv4"], "--network: got conv4; relation works with relation"),
        (["train", "matching", "--shots", "0"], "--shots: got 0"),
        (
            ["train", "matching", "--divergence", "kl"],
            "--divergence: is a setting of prototypical, not of matching on",
        ),
        (
            ["train", "maml", "--within-alphabet"],
            "--within-alphabet: is a setting of omniglot, not of maml on glyphs",
        ),
    ],
)
def test_errors_for_invalid_flags_name_them(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
