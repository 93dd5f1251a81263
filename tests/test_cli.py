"""`jaxmeta train` and `jaxmeta evaluate`: a run's folder, signals, resumption, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from support import read_json

import jaxmeta as jm
from jaxmeta import cli, config, registry, runs
from jaxmeta.cli import EvaluateFlags, TrainFlags, main
from jaxmeta.training import Progress, load_params

SMALL = ["train", "--tasks", "sinusoid", "--steps", "20", "--validate-every", "10", "--episodes", "20"]
LISTED = ("learner", "tasks", "ways", "shots", "queries", "seed", "steps", "steps_per_second")
LISTED += ("wall_s", "compile_s", "episodes", "card")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sinusoid"
    assert main([*SMALL, "--out", str(out)]) == 0
    return out


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def evaluated_once(run, folder):
    """The configuration of a run as if it reported its error after one number of inner steps, in `folder`."""
    folder.mkdir()
    settings = read_json(run / "config.json") | {"report_steps": []}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_run_writes_its_files_and_a_true_report(run):
    report = read_json(run / "report.json")
    assert set(LISTED) <= set(report)
    assert (report["learner"], report["tasks"], report["steps"]) == ("maml", "sinusoid", 20)
    assert set(report["mse_by_step"]) == {"1", "5", "10"}
    assert report["mse"] == report["mse_by_step"]["1"]
    assert report["mse"]["mean"] > 0
    assert report["mse"]["ci95"] > 0
    assert report["card"]["split"] == "test"
    assert (report["card"]["shots"], report["config"]["train_shots"]) == (5, 10)
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "mean squared error" in (run / "report.md").read_text()
    assert read_json(run / "config.json")["tasks"] == "sinusoid"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))
    assert all({"loss", "mse", "steps_per_second"} <= set(row) for row in rows if "loss" in row)
    assert [row["step"] for row in rows if "validation_mse" in row] == [10, 20]
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("tasks", ["folder", pytest.param("glyphs", marks=pytest.mark.nightly)])
def test_classification_reports_transductive_and_inductive_accuracy(tasks, tmp_path, monkeypatch):
    # A small network that normalises, since convolutions take a minute to compile.
    def small(ways):
        return jm.nn.MLP(out=ways, hidden=(8,), norm=True)

    monkeypatch.setitem(registry.NETWORKS, "strided-conv4", small)
    out = tmp_path / "run"
    flags = ["--ways", "2", "--queries", "1", "--steps", "2", "--meta-batch", "2", "--episodes", "4"]
    if tasks == "folder":
        for name in ("ant", "bee", "cat", "doe"):
            (tmp_path / "images" / name).mkdir(parents=True)
            for number in range(2):
                pixels = np.random.default_rng(number + ord(name[0])).integers(0, 256, (6, 6), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
        flags += ["--tasks", f"folder:{tmp_path / 'images'}", "--classes", "0.5,0,0.5"]
        flags += ["--network", "strided-conv4", "--inner-steps", "1", "--eval-steps", "1", "--devices", "1"]
    assert main(["train", "fomaml", *flags, "--out", str(out)]) == 0
    report = read_json(out / "report.json")
    assert set(LISTED) <= set(report)
    assert (report["learner"], report["ways"], report["queries"]) == ("fomaml", 2, 1)
    assert report["card"]["split_hash"]
    for name, norm in (("transductive", "batch"), ("inductive", "support")):
        assert 0 <= report["accuracy"][name]["mean"] <= 1
        assert report["accuracy"][name]["norm"] == norm
        assert name in (out / "report.md").read_text()
    assert report["config"]["order"] is None
    assert main(["evaluate", str(out), "--ways", "3"]) == 2


def test_evaluate_with_the_run_s_own_protocol_repeats_its_report(run, tmp_path, capsys):
    again = evaluated_once(run, tmp_path / "run")
    shutil.copytree(run / "checkpoints", again / "checkpoints")
    assert main(["evaluate", str(again), "--json", str(tmp_path / "result.json")]) == 0
    assert read_json(tmp_path / "result.json")["mse"] == pytest.approx(read_json(run / "report.json")["mse"])
    assert "test mse" in capsys.readouterr().out
    assert main(["evaluate", str(again), "--shots", "10", "--json", str(tmp_path / "other.json")]) == 0
    assert read_json(tmp_path / "other.json")["mse"] != read_json(tmp_path / "result.json")["mse"]


class StopAt:
    """Stands in for `RunLog.__call__`: raises a signal after what a meta-step reports."""

    def __init__(self, monkeypatch, step, number):
        self.before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
        log = runs.RunLog.__call__

        def stopping(run_log, event):
            log(run_log, event)
            if isinstance(event, Progress) and event.step == step:
                # Either signal would be handled.
                assert not any(signal.getsignal(each) is handler for each, handler in self.before.items())
                signal.raise_signal(number)

        monkeypatch.setattr(runs.RunLog, "__call__", stopping)

    def handlers_are_back(self):
        return all(signal.getsignal(each) is handler for each, handler in self.before.items())


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_resumes_to_the_same_parameters(run, tmp_path, monkeypatch, capsys, number):
    """The run was stopped before its first checkpoint, too, and its five meta-steps are done again."""
    out = evaluated_once(run, tmp_path / "stopped")
    (out / "metrics.jsonl").write_text("".join((run / "metrics.jsonl").read_text().splitlines(True)[:5]))
    with monkeypatch.context() as patch:
        stop = StopAt(patch, 7, number)
        assert main(["train", "--resume", "--out", str(out)]) == 75
    assert stop.handlers_are_back()
    said = capsys.readouterr().err
    assert f"--resume --out {out}" in said
    assert len(said.splitlines()) == 1
    assert not (out / "report.json").exists()

    assert main(["train", "--resume", "--out", str(out), "--steps", "21"]) == 2
    assert "--steps: got 21" in capsys.readouterr().err
    assert main(["train", "fomaml", "--resume", "--out", str(out)]) == 2
    assert "LEARNER: got fomaml" in capsys.readouterr().err

    assert main(["train", "--resume", "--out", str(out), "--tasks", "sinusoid"]) == 0
    same(load_params(out), load_params(run))
    rows = [
        list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())) for folder in (out, run)
    ]
    losses = [[row["loss"] for row in each if "loss" in row] for each in rows]
    assert losses[0] == losses[1]
    assert len(rows[0]) == 22
    assert read_json(out / "report.json")["mse"] == read_json(run / "report.json")["mse"]


@pytest.mark.nightly
def test_a_new_run_that_was_stopped_resumes_to_the_same_parameters(run, tmp_path, monkeypatch):
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        StopAt(patch, 7, signal.SIGTERM)
        assert main([*SMALL, "--out", str(out)]) == 75
    assert main(["train", "--resume", "--out", str(out)]) == 0
    same(load_params(out), load_params(run))


def test_nothing_is_overwritten(run, tmp_path, capsys):
    before = contents(run)
    assert main([*SMALL, "--out", str(run)]) == 2
    assert "--out" in capsys.readouterr().err
    assert contents(run) == before
    file = tmp_path / "file"
    file.write_text("mine")
    assert main([*SMALL, "--out", str(file)]) == 2
    assert file.read_text() == "mine"


def test_a_loss_that_diverges_ends_with_status_1_and_names_the_step(tmp_path, capsys):
    assert main([*SMALL, "--inner-lr", "1e30", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "meta-step" in said
    assert "checkpoint" in said


def test_a_full_device_is_told_with_what_helps(monkeypatch, capsys):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nMore.")

    monkeypatch.setattr(runs, "train_run", full)
    assert main(["train"]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "--stream" in said
    assert "99 bytes" in said


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "train"),
        (["trian"], "known are train"),
        (["train", "mamml"], "known are maml"),
        (["train", "--tasks", "glyph"], "known are glyphs"),
        (["train", "--preset", "sinusoids"], "known are sinusoid"),
        (["train", "--ways", "many"], "--ways"),
        (["train", "--way", "5"], "train has no --way; did you mean --ways"),
        (["train", "--tasks", "folder:nowhere"], "--tasks: "),
        (["predict", "nowhere", "--suport", "x"], "predict has no --suport; did you mean --support"),
        (["train", "--order", "third", "--tasks", "sinusoid"], "--order"),
        (
            ["train", "--order", "implicit", "--tasks", "sinusoid"],
            '--proximal: got None; order="implicit" needs',
        ),
        (
            ["train", "--inner-steps", "0", "--tasks", "sinusoid"],
            "--inner-steps: got 0; it must be at least 1",
        ),
        (
            ["train", "maml_plus_plus", "--eval-steps", "9", "--tasks", "sinusoid"],
            "--eval-steps: got 9; there are learned step sizes",
        ),
        (
            ["train", "learned_optimizer", "--inner-steps", "7", "--tasks", "sinusoid"],
            "--inner-steps: got 7; it must be a multiple of",
        ),
        (["train", "--truncation", "0", "--tasks", "sinusoid"], "--truncation: got 0; it must be at least 1"),
        (["train", "meta_sgd", "--order", "implicit", "--tasks", "sinusoid"], '--order: got "implicit"'),
        (
            ["train", "imaml", "--eval-steps", "0", "--tasks", "sinusoid"],
            "--eval-steps: got 0; it must be at least 1",
        ),
        (["train", "fomaml", "--diagnose", "--tasks", "sinusoid"], "--diagnose: fomaml has no such setting"),
        (
            ["train", "--order", "first", "--diagnose", "--tasks", "sinusoid"],
            "--diagnose: compares with first order",
        ),
        (["train", "boil", "--norm", "episode"], "--norm: got episode; boil has batch, support"),
        (["train", "--shots", "0", "--tasks", "sinusoid"], "--shots"),
        (["train", "--devices", "0", "--tasks", "sinusoid"], "--devices"),
        (["train", "--devices", "4096", "--meta-batch", "4096", "--tasks", "sinusoid"], "--devices"),
        (["train", "--strategy", "sideways", "--tasks", "sinusoid"], "strategy"),
        (["train", "--resume"], "--out"),
        (["train", "--resume", "--out", "nowhere"], "nowhere"),
        (["train", "--tasks", "omniglot", "--data", "nowhere"], "nowhere"),
        (["train", "--tasks", "omniglot", "--protocol", "other", "--data", "."], "protocol"),
        (["train", "--ways", "5000"], "ways"),
        (["evaluate"], "RUN"),
        (["evaluate", "nowhere"], "nowhere"),
        (["compare"], "at least two"),
        (["compare", "maml"], "at least two"),
        (["compare", "maml", "fomaml", "maml"], "maml twice"),
        (["compare", "maml", "mamml"], "known are maml"),
        (["compare", "maml", "fomaml", "--steps", "0"], "--steps"),
        (["compare", "maml", "fomaml", "--resume"], "--out"),
        (["compare", "maml", "fomaml", "--resume", "--out", "nowhere"], "nowhere"),
        (["plot"], "RUN"),
        (["plot", "nowhere"], "nowhere"),
        (["plot", "nowhere", "--out", "curves.pdf"], ".png"),
        (["plot", "nowhere", "--x", "epochs"], "--x"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_and_leaves_nothing(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("jaxmeta: error: ")
    assert len(said.splitlines()) == 1
    assert says in said
    assert not list(tmp_path.iterdir())


def test_a_run_whose_files_are_damaged_is_refused(run, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"learner": "maml"')
    assert main(["evaluate", str(broken)]) == 2
    (broken / "config.json").write_bytes((run / "config.json").read_bytes())
    assert main(["evaluate", str(broken)]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_a_run_from_before_a_setting_was_there_is_read(run, tmp_path):
    older = json.loads((run / "config.json").read_text())
    for name in ("proximal", "memory", "diagnose"):
        del older[name]
    (tmp_path / "config.json").write_text(json.dumps(older))
    _, settings = config.stored(tmp_path)
    assert settings == config.stored(run)[1]
    del older["learner"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match=r"damaged, or of another version .*learner"):
        config.stored(tmp_path)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("train", [*TrainFlags.__annotations__, "resume", "stream", "skip_unreadable", "diagnose"]),
        ("predict", ("support", "query", "json", "invert", "skip_unreadable")),
        ("evaluate", EvaluateFlags.__annotations__),
        ("compare", [*TrainFlags.__annotations__, "resume"]),
        ("plot", ["out", "x"]),
        ("presets", ()),
        ("tasks", ()),
        ("learners", ()),
    ],
)
def test_help_mentions_every_flag(command, flags, capsys):
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    for name in flags:
        assert "--" + name.replace("_", "-") in said


@pytest.mark.parametrize(
    ("command", "name"), [("presets", "sinusoid"), ("tasks", "glyphs"), ("learners", "maml")]
)
def test_listing_commands_name_what_there_is(command, name, capsys):
    assert main([command]) == 0
    assert name in capsys.readouterr().out


def test_the_program_ends_with_the_status_of_its_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxmeta", "trian"])
    with pytest.raises(SystemExit) as end:
        cli.program()
    assert end.value.code == 2
    assert "known are train" in capsys.readouterr().err


@pytest.mark.nightly
def test_sigterm_leaves_a_folder_that_resumes(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "jaxmeta.cli", "train", "--tasks", "sinusoid", "--out", str(out)]
    command += ["--steps", "1000000", "--episodes", "20", "--validate-every", "1000000"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.terminate()
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75, said
    assert "--resume" in said
    assert main(["evaluate", str(out)]) == 0
