"""`jaxmeta train` and `jaxmeta evaluate`: run folders, signals, resumption, and usage errors."""

import concurrent.futures
import datetime
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from support import read_json

import jaxmeta as jm
from jaxmeta import cli
from jaxmeta.cli import commands, config, folders, main, schema
from jaxmeta.cli import run as run_of_command
from jaxmeta.cli.build import optimizer_of
from jaxmeta.cli.config import (
    SUPPLIED_TO_LEARNER,
    SUPPLIED_TO_NETWORK,
    SUPPLIED_TO_TASKS,
    Chosen,
    Run,
    Training,
    base_of,
    resolve,
)
from jaxmeta.cli.names import LEARNERS, NETWORKS
from jaxmeta.cli.presets import PRESETS
from jaxmeta.cli.run import Invocation
from jaxmeta.cli.sources import TASKS
from jaxmeta.training import Progress, load_params

SMALL = ["train", "--tasks", "sinusoid", "--steps", "20", "--validate-every", "10", "--episodes", "20"]
SMALL += ["--schedule", "constant"]
REPORT_KEYS = ("learner", "tasks", "ways", "shots", "queries", "seed", "steps", "steps_per_second")
REPORT_KEYS += ("wall_s", "compile_s", "episodes", "card")


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
    """Write the configuration of a run to `folder`, without `report_steps`, so that it is evaluated once."""
    folder.mkdir()
    kept = read_json(run / "config.json")
    kept["run"]["report_steps"] = []
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def test_a_run_writes_its_files_and_a_correct_report(run):
    report = read_json(run / "report.json")
    assert set(REPORT_KEYS) <= set(report)
    assert (report["learner"], report["tasks"], report["steps"]) == ("maml", "sinusoid", 20)
    assert set(report["mse_by_step"]) == {"1", "5", "10"}
    assert report["mse"] == report["mse_by_step"]["1"]
    assert report["mse"]["mean"] > 0
    assert report["mse"]["ci95"] > 0
    assert report["card"]["split"] == "test"
    assert (report["card"]["shots"], report["config"]["tasks"]["train_shots"]) == (5, 10)
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    text = (run / "report.md").read_text()
    assert "mean squared error" in text
    assert "![learning curve](curve.png)" in text
    assert f"```sh\n{report['command']}\n```" in text
    assert report["command"].startswith("jaxmeta train maml --tasks sinusoid --steps 20 ")
    flags = re.findall(r"^\| \w+ \| (--\S+) \|", text, re.MULTILINE)
    assert {"--inner-steps", "--eval-steps", "--train-shots", "--outer-lr", "--seed"} <= set(flags)
    # Settings of images, and of streams of them.
    assert not {"--distort", "--workers", "--data"} & set(flags)
    assert set(flags) <= commands.train_parser(base_of(Chosen("maml", tasks="sinusoid"))).known()
    # The baseline predicts the mean of a task's support targets.
    tasks, values = jm.tasks.sinusoid("test", shots=5, queries=100), []
    for index in range(20):
        task = tasks.sample(jm.core.episode_keys(run_of_command.evaluation_key(0), jnp.array([index]))[0, 0])
        values.append(((np.asarray(task.query.y) - np.asarray(task.support.y).mean()) ** 2).mean())
    assert report["mse_of_mean"]["mean"] == pytest.approx(np.mean(values), rel=1e-5)
    assert f"support targets: {np.mean(values):.4f} ± " in text
    assert read_json(run / "config.json")["tasks"]["name"] == "sinusoid"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))
    assert all({"loss", "mse", "steps_per_second"} <= set(row) for row in rows if "loss" in row)
    assert [row["step"] for row in rows if "validation_mse" in row] == [10, 20]
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("tasks", ["folder", pytest.param("glyphs", marks=pytest.mark.nightly)])
def test_classification_reports_transductive_and_inductive_accuracy(tasks, tmp_path, monkeypatch, capsys):
    # A small network with normalisation, since convolutions take a minute to compile.
    def small(ways):
        return jm.nn.MLP(out=ways, hidden=(8,), norm=True)

    monkeypatch.setitem(NETWORKS, "strided-conv4", small)
    monkeypatch.setattr(run_of_command, "plot_curve", lambda *_: None)
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
    message = (
        "read      8 images of 4 classes, by one folder per class; the smallest is 6 × 6 (ant/0.png); none "
        "left out"
    )
    assert (message in capsys.readouterr().out) == (tasks == "folder")
    report = read_json(out / "report.json")
    assert set(REPORT_KEYS) <= set(report)
    assert (report["learner"], report["ways"], report["queries"]) == ("fomaml", 2, 1)
    assert report["card"]["split_hash"]
    for name, norm in (("transductive", "batch"), ("inductive", "support")):
        assert 0 <= report["accuracy"][name]["mean"] <= 1
        assert report["accuracy"][name]["norm"] == norm
        assert name in (out / "report.md").read_text()
    assert report["chance"] == 0.5
    assert "Guessing: 50.00 %, one of 2 classes." in (out / "report.md").read_text()
    assert "order" not in report["config"]["learner"]
    assert main(["evaluate", str(out), "--ways", "3"]) == 2


def test_evaluate_reproduces_the_report_of_a_run(run, tmp_path, capsys):
    again = evaluated_once(run, tmp_path / "run")
    shutil.copytree(run / "checkpoints", again / "checkpoints")
    assert main(["evaluate", str(again), "--json", str(tmp_path / "result.json")]) == 0
    assert read_json(tmp_path / "result.json")["mse"] == pytest.approx(read_json(run / "report.json")["mse"])
    assert "test mse" in capsys.readouterr().out
    assert main(["evaluate", str(again), "--shots", "10", "--json", str(tmp_path / "other.json")]) == 0
    assert read_json(tmp_path / "other.json")["mse"] != read_json(tmp_path / "result.json")["mse"]


def test_evaluate_takes_other_tasks(run, tmp_path, capsys):
    target = tmp_path / "other.json"
    argv = ["evaluate", str(run), "--tasks", "harmonic", "--episodes", "8", "--json", str(target)]
    assert main(argv) == 0
    result = read_json(target)
    assert (result["tasks"], result["card"]["tasks"], result["shots"]) == ("harmonic", "harmonic", 5)
    assert result["mse"]["mean"] > 0
    capsys.readouterr()
    for tasks, message in (
        ("glyphs", "--tasks: glyphs is classification"),
        ("harmonics", "--tasks: there is no 'harmonics'"),
    ):
        assert main(["evaluate", str(run), "--tasks", tasks]) == 2
        assert message in capsys.readouterr().err


class StopAt:
    """A replacement of `RunLog.__call__` that raises a signal after the report of a meta-step."""

    def __init__(self, monkeypatch, step, number):
        self.before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
        log = run_of_command.RunLog.__call__

        def stopping(run_log, event):
            log(run_log, event)
            if isinstance(event, Progress) and event.step == step:
                # Handlers of both signals are installed in training.
                assert not any(signal.getsignal(signum) is handler for signum, handler in self.before.items())
                signal.raise_signal(number)

        monkeypatch.setattr(run_of_command.RunLog, "__call__", stopping)

    def handlers_are_restored(self):
        return all(signal.getsignal(signum) is handler for signum, handler in self.before.items())


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_resumes_to_the_same_parameters(run, tmp_path, monkeypatch, capsys, number):
    """An earlier stop came before the first checkpoint, so that five meta-steps are repeated."""
    out = evaluated_once(run, tmp_path / "stopped")
    (out / "metrics.jsonl").write_text("".join((run / "metrics.jsonl").read_text().splitlines(True)[:5]))
    with monkeypatch.context() as patch:
        stop = StopAt(patch, 7, number)
        assert main(["train", "--resume", "--out", str(out)]) == 75
    assert stop.handlers_are_restored()
    message = capsys.readouterr().err
    assert f"--resume --out {out}" in message
    assert len(message.splitlines()) == 1
    assert not (out / "report.json").exists()

    assert main(["train", "--resume", "--out", str(out), "--steps", "19"]) == 2
    assert "--steps: got 19" in capsys.readouterr().err
    assert main(["train", "fomaml", "--resume", "--out", str(out)]) == 2
    assert "LEARNER: got fomaml" in capsys.readouterr().err

    assert main(["train", "--resume", "--out", str(out), "--tasks", "sinusoid"]) == 0
    same(load_params(out), load_params(run))
    rows = [
        list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())) for folder in (out, run)
    ]
    losses = [[row["loss"] for row in run_rows if "loss" in row] for run_rows in rows]
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


def test_outputs_are_never_overwritten(run, tmp_path, capsys):
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
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert "meta-step" in message
    assert "checkpoint" in message


def test_out_of_memory_errors_give_advice(monkeypatch, capsys):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nMore.")

    monkeypatch.setattr(run_of_command, "new_run", full)
    assert main(["train"]) == 1
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert "--stream" in message
    assert "99 bytes" in message


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["trian"], "known are train"),
        (["train", "mamml"], "known are maml"),
        (["train", "--tasks", "glyph"], "known are glyphs"),
        (["train", "--preset", "sinusoids"], "known are sinusoid"),
        (["train", "--ways", "many"], "--ways"),
        (["train", "--way", "5"], "train has no --way; here it is --ways"),
        (["train", "--lr", "0.1"], "train has no --lr; here it is --outer-lr or --inner-lr"),
        (["train", "prototypical", "--lr", "0.1"], "train has no --lr; here it is --outer-lr;"),
        (["train", "--epochs=3"], "train has no --epochs; here it is --steps"),
        (["train", "--batch-size", "3"], "train has no --batch-size; here it is --meta-batch"),
        (["compare", "maml", "anil", "--epochs", "3"], "compare has no --epochs; here it is --steps"),
        (["train", "--image-size", "28", "--tasks", "omniglot"], "here it is --size"),
        (
            ["train", "--divergence", "kl"],
            "--divergence: is a setting of prototypical, not of maml on glyphs",
        ),
        (
            ["train", "--strings", "5,5"],
            "--strings: is a setting of mann, not of maml on glyphs",
        ),
        (["train", "--stream"], "--stream: is a setting of folder:PATH"),
        (["train", "--schedule", "step"], "--decay-every: "),
        (["train", "--decay-every", "9"], "--decay-every: got 9, but --schedule is cosine"),
        (
            ["train", "--outer-momentum", "0.9", "--tasks", "sinusoid"],
            "--outer-momentum: got 0.9, but adam has no momentum",
        ),
        (
            ["train", "--outer-betas", "0.9"],
            "--outer-betas: got 0.9; it must be 2 numbers separated by commas",
        ),
        (["train", "--outer-betas", "0.9,2"], "--outer-betas: got 2"),
        (["train", "maml", "anil"], "unexpected argument 'anil'"),
        (["train", "--steps"], "--steps: expected one argument"),
        (["plot", "a", "--out"], "--out: expected one argument"),
        (["presets", "a", "b"], "unexpected argument 'b'"),
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
        (
            ["train", "meta_sgd", "--order", "implicit", "--tasks", "sinusoid"],
            "--order: got implicit; it must be one of second, first",
        ),
        (
            ["train", "imaml", "--eval-steps", "0", "--tasks", "sinusoid"],
            "--eval-steps: got 0; it must be at least 1",
        ),
        (["train", "fomaml", "--diagnose", "--tasks", "sinusoid"], ", not of fomaml on sinusoid"),
        (
            ["train", "--order", "first", "--diagnose", "--tasks", "sinusoid"],
            "--diagnose: compares with the first-order",
        ),
        (["train", "boil", "--norm", "episode"], "--norm: got episode; it must be one of batch, support"),
        (["train", "--shots", "0", "--tasks", "sinusoid"], "--shots"),
        (["train", "--devices", "0", "--tasks", "sinusoid"], "--devices"),
        (["train", "--devices", "4096", "--meta-batch", "4096", "--tasks", "sinusoid"], "--devices"),
        (["train", "--strategy", "sideways", "--tasks", "sinusoid"], "strategy"),
        (["train", "--resume"], "--out"),
        (["train", "--resume", "--out", "nowhere"], "nowhere"),
        (["train", "--tasks", "omniglot", "--data", "nowhere"], "nowhere"),
        (["train", "--tasks", "omniglot", "--protocol", "other", "--data", "."], "protocol"),
        (["train", "--ways", "5000"], "ways"),
        (["evaluate"], "SOURCE"),
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
def test_usage_errors_are_one_line_with_status_2_and_write_nothing(
    argv, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("jaxmeta: error: ")
    assert len(message.splitlines()) == 1
    assert expected in message
    assert not list(tmp_path.iterdir())


def test_damaged_run_folders_are_errors(run, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"learner": "maml"')
    assert main(["evaluate", str(broken)]) == 2
    (broken / "config.json").write_bytes((run / "config.json").read_bytes())
    assert main(["evaluate", str(broken)]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_runs_of_an_older_format_are_errors(run, tmp_path, capsys):
    older = read_json(run / "config.json") | {"jaxmeta": "0.1.0"}
    del older["format"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    for argv in (["evaluate", str(tmp_path)], ["train", "--resume", "--out", str(tmp_path)]):
        assert main(argv) == 2
        message = capsys.readouterr().err
        assert "has format 1, but this version of jaxmeta reads" in message
        assert "jaxmeta 0.1.0" in message
        assert len(message.splitlines()) == 1


TRAIN_SETTINGS = [
    name
    for name in (*Training.__annotations__, *Run.__annotations__, *Invocation.__annotations__)
    if name not in ("workers", "data", "distort", "report_steps")
]
NAMED = ["tasks", "network", "preset", "config"]


@pytest.mark.parametrize(
    ("argv", "flags"),
    [
        (["train"], [*TRAIN_SETTINGS, *NAMED, "inner_lr", "order", "ways", "train_ways", "filters"]),
        (["train", "--tasks", "folder:here"], ["stream", "workers", "skip_unreadable", "classes", "size"]),
        (["train", "mann"], ["sequence", "strings", "distort"]),
        (["train", "--network", "mlp"], ["network.norm", "training.norm", "no-network.norm", "hidden"]),
        (["train", "--tasks", "omniglot"], ["data", "within_alphabet"]),
        (["train", "--tasks", "sinusoid"], ["report_steps", "amplitude"]),
        (["predict"], ["support", "query", "json", "csv", "invert", "skip_unreadable", "learner", "network"]),
        (["evaluate", "RUN"], ["eval_steps", "shots", "queries", "episodes", "seed", "json", "mesh"]),
        (
            ["compare", "maml", "anil"],
            [*(set(TRAIN_SETTINGS) - {*Invocation.__annotations__}), *NAMED, "out", "resume"],
        ),
        (["plot"], ["out", "x"]),
        (["presets"], ()),
        (["tasks"], ()),
        (["learners"], ()),
        (["networks"], ()),
    ],
)
def test_help_mentions_every_flag(argv, flags, run, capsys):
    argv = [str(run) if word == "RUN" else word for word in argv]
    assert main([*argv, "--help"]) == 0
    output = capsys.readouterr().out
    for name in flags:
        assert "--" + name.replace("_", "-") + " " in output.replace("\n", " ").replace(",", " "), name


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_all_commands(argv, capsys):
    assert main(argv) == 0
    output = capsys.readouterr().out
    assert "usage: jaxmeta COMMAND" in output
    for name in ("train", "evaluate", "compare", "plot", "predict", "transfer", "rank", "networks"):
        assert f"  {name} " in output


def test_version_prints_the_versions_of_jaxmeta_and_jax(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"jaxmeta {jm.__version__}, jax {jax.__version__}")


FUNCTIONS = [
    *((f"learner {name}", function, SUPPLIED_TO_LEARNER) for name, function in LEARNERS.items()),
    *((f"network {name}", function, SUPPLIED_TO_NETWORK) for name, function in NETWORKS.items()),
    *((f"tasks {name}", entry.function, SUPPLIED_TO_TASKS) for name, entry in TASKS.items()),
    ("training", Training, ()),
    ("run", Run, ()),
    ("invocation", Invocation, ()),
]


@pytest.mark.parametrize(
    ("function", "supplied"), [pytest.param(*values, id=name) for name, *values in FUNCTIONS]
)
def test_every_setting_has_help(function, supplied):
    for name, setting in schema.settings_of(function, supplied).items():
        assert setting.help, name


@pytest.mark.parametrize(
    ("command", "name", "expected"),
    [
        ("presets", "sinusoid", ["MAML on sine waves", "--outer-lr", "0.003", "--train-shots", "10"]),
        ("presets", "folder", ["--classes", "conv4-32"]),
        ("tasks", "glyphs", ["(classification)", "--ways N (default: 5)", "--shots"]),
        ("learners", "maml", ["classification and regression", "--inner-lr X", "{second,first,implicit}"]),
        ("networks", "conv4", ["--filters N"]),
        ("networks", "mlp", ["--hidden N,… (default: 256,128,64,64)"]),
    ],
)
def test_lists_print_names_and_describe_one(command, name, expected, capsys):
    assert main([command]) == 0
    assert any(line.split()[0].startswith(name) for line in capsys.readouterr().out.splitlines())
    assert main([command, name]) == 0
    output = capsys.readouterr().out
    for part in expected:
        assert part in output
    assert main([command, f"{name}x"]) == 2
    assert f"known are {name}" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_described(name, capsys):
    assert main(["presets", name]) == 0
    assert PRESETS[name]["description"] in capsys.readouterr().out


# --- Configurations -------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """Return a list to which each new run appends its configuration instead of training."""
    configs = []
    monkeypatch.setattr(run_of_command, "new_run", lambda config, invocation: configs.append(config))
    return configs


def test_config_starts_from_a_file_with_flags_on_top(run, tmp_path, started, capsys):
    shutil.copy(run / "config.json", tmp_path / "mine.json")
    assert main(["train", "--config", str(tmp_path / "mine.json")]) == 0
    # A run's configuration is found by its folder.
    assert main(["train", f"--config={run}", "--inner-lr", "0.5", "--shots", "3", "--seed=7"]) == 0
    same, other = started
    before = config.load_config(run)
    for group in config.GROUPS:
        assert getattr(same, group) == getattr(before, group)
    assert (other.learner["inner_lr"], other.run.seed, other.training) == (0.5, 7, before.training)
    assert (other.tasks["shots"], other.tasks["train_shots"], other.tasks["queries"]) == (3, 3, 100)

    assert main(["train", "fomaml", "--config", str(run)]) == 0
    assert started[-1].learner["name"] == "fomaml"
    assert started[-1].learner["inner_lr"] == before.learner["inner_lr"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--config", "nowhere.json"], "--config: nowhere.json does not exist"),
        (["--config", "text.json"], "--config: text.json is not valid JSON"),
        (["--config", "empty.json"], "empty.json has format 1, but"),
        (["--config", "RUN", "--preset", "glyphs"], "--preset: --config already has all values"),
        (
            ["--config", "RUN", "--tasks", "glyphs"],
            "--tasks: got glyphs, but the configuration is for",
        ),
        (["--config"], "--config: expects a value"),
    ],
)
def test_invalid_files_for_config_are_errors(flags, expected, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.json").write_text("inner_lr: 3")
    (tmp_path / "empty.json").write_text("{}")
    assert main(["train", *(str(run) if word == "RUN" else word for word in flags)]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("learner", "described", "left_out"),
    [
        ("maml", ("batch itself", "support set"), ("population", "inner steps")),
        ("prototypical", ("batch itself", "population"), ("support set", "inner steps")),
    ],
)
def test_help_describes_the_norms_of_the_method_only(learner, described, left_out, capsys):
    assert main(["train", learner, "--help"]) == 0
    text = capsys.readouterr().out
    text = " ".join(text[text.index("--norm {") : text.index("--validate-every")].split())
    assert all(words in text for words in described)
    assert not any(words in text for words in left_out)


def test_ambiguous_flags_are_errors_that_name_both_groups(started, capsys):
    for flag in ("--norm", "--norm=batch"):
        assert main(["train", "--network", "mlp", flag, *([] if "=" in flag else ["batch"])]) == 2
        assert "give --network.norm or --training.norm" in capsys.readouterr().err
    assert main(["train", "--network", "mlp", "--training.norm", "support", "--no-network.norm"]) == 0
    assert (started[0].training.norm, started[0].network["norm"]) == ("support", False)


def test_flags_may_have_underscores_and_follow_the_learner(started, capsys):
    flags = ["--inner_lr=0.3", "--outer_betas", "0.5,0.9", "--tasks", "sinusoid", "--report-steps", "1,2"]
    assert main(["train", "anil", *flags]) == 0
    (resolved,) = started
    assert main(["train", *flags, "anil"]) == 2
    assert "unexpected argument 'anil'; the learner's name comes first" in capsys.readouterr().err
    assert (resolved.learner["name"], resolved.learner["inner_lr"]) == ("anil", 0.3)
    assert (resolved.training.outer_betas, resolved.run.report_steps) == ((0.5, 0.9), (1, 2))


def test_none_and_switches_are_parsed(started):
    assert main(["train", "--preset", "mann-omniglot", "--clip", "none", "--no-distort"]) == 0
    assert (started[0].training.clip, started[0].training.distort) == (None, False)


# --- Folders --------------------------------------------------------------------------------------------


def test_runs_started_in_the_same_second_get_separate_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Clock:
        now = staticmethod(lambda: datetime.datetime(2026, 5, 4, 3, 2, 1))

    monkeypatch.setattr(folders, "datetime", Clock)
    first, second = folders.claim(None, "maml-glyphs"), folders.claim(None, "maml-glyphs")
    assert first == pathlib.Path("runs/maml-glyphs-2026-05-04-030201")
    assert second == pathlib.Path("runs/maml-glyphs-2026-05-04-030201-2")
    barrier = threading.Barrier(8)

    def claim(_):
        barrier.wait()
        return folders.claim(None, "maml-glyphs")

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        claimed = set(threads.map(claim, range(8)))
    assert len(claimed | {first, second}) == 10
    assert all(folder.is_dir() for folder in claimed)


# --- Extended runs --------------------------------------------------------------------------------------


def with_schedule(run, folder, schedule):
    """Copy the run with another schedule, and return the command that resumes it up to `--steps`."""
    shutil.copytree(run, folder)
    kept = read_json(run / "config.json")
    kept["training"] |= {"schedule": schedule, "decay_every": 10 if schedule == "step" else None}
    (folder / "config.json").write_text(json.dumps(kept))
    return ["train", "--resume", "--out", str(folder), "--steps"]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_runs_with_a_schedule_cannot_be_extended(schedule, run, tmp_path, capsys):
    again = with_schedule(run, tmp_path / "run", schedule)
    before = contents(tmp_path)
    assert main([*again, "22"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("jaxmeta: error: --steps: got 22")
    assert f"its schedule ({schedule})" in message
    assert contents(tmp_path) == before


def test_a_run_cannot_be_shortened(run, tmp_path, capsys):
    assert main([*with_schedule(run, tmp_path / "run", "constant"), "19"]) == 2
    assert "--steps: got 19" in capsys.readouterr().err


def test_a_run_with_a_constant_rate_can_be_extended(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_of_command, "plot_curve", lambda *_: None)
    out = evaluated_once(run, tmp_path / "run")
    for name in ("checkpoints", "metrics.jsonl"):
        (shutil.copytree if (run / name).is_dir() else shutil.copy)(run / name, out / name)
    assert main(["train", "--resume", "--out", str(out), "--steps", "23"]) == 0
    report = read_json(out / "report.json")
    assert (report["steps"], report["config"]["training"]["steps"]) == (23, 23)
    assert read_json(out / "config.json")["training"]["steps"] == 23
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 24))


@pytest.mark.nightly
def test_an_extended_run_equals_a_longer_run(run, tmp_path):
    out = tmp_path / "longer"
    shutil.copytree(run, out)
    assert main(["train", "--resume", "--out", str(out), "--steps", "30"]) == 0
    assert main([*SMALL, "--steps", "30", "--out", str(tmp_path / "at-once")]) == 0
    same(load_params(out), load_params(tmp_path / "at-once"))


# --- The outer optimizer --------------------------------------------------------------------------------

ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
OTHER_ADAM = {"b1": 0.5, "b2": 0.7, "eps": 1e-3}


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, optax.adam(0.1, **ADAM)),
        ({"outer_betas": (0.5, 0.7), "outer_eps": 1e-3}, optax.adam(0.1, **OTHER_ADAM)),
        (
            {"outer_optimizer": "adamw", "weight_decay": 0.3, "outer_betas": (0.5, 0.7), "outer_eps": 1e-3},
            optax.adamw(0.1, **OTHER_ADAM, weight_decay=0.3),
        ),
        ({"weight_decay": 0.3}, optax.chain(optax.add_decayed_weights(0.3), optax.adam(0.1, **ADAM))),
        ({"outer_optimizer": "sgd"}, optax.sgd(0.1)),
        ({"outer_optimizer": "sgd", "outer_momentum": 0.9}, optax.sgd(0.1, momentum=0.9)),
        (
            {"outer_optimizer": "sgd", "weight_decay": 0.3},
            optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.1)),
        ),
        ({"outer_optimizer": "rmsprop"}, optax.rmsprop(0.1)),
        (
            {"outer_optimizer": "rmsprop", "outer_momentum": 0.5, "outer_eps": 1e-2},
            optax.rmsprop(0.1, momentum=0.5, eps=1e-2),
        ),
        ({"outer_optimizer": "sgd", "clip": 0.2}, optax.chain(optax.clip(0.2), optax.sgd(0.1))),
        (
            {"outer_optimizer": "sgd", "clip_norm": 0.2},
            optax.chain(optax.clip_by_global_norm(0.2), optax.sgd(0.1)),
        ),
        (
            {"outer_optimizer": "sgd", "schedule": "step", "decay_every": 2, "decay_factor": 0.1},
            optax.sgd(lambda step: 0.1 * 0.1 ** (step // 2)),
        ),
        (
            {"outer_optimizer": "sgd", "schedule": "linear", "steps": 10},
            optax.sgd(lambda step: 0.1 * (1 - step / 10)),
        ),
        (
            {"outer_optimizer": "sgd", "schedule": "cosine", "steps": 10},
            optax.sgd(lambda step: 0.05 * (1 + jnp.cos(jnp.pi * step / 10))),
        ),
    ],
    ids=lambda flags: "-".join(map(str, flags.values())) or "default" if isinstance(flags, dict) else "",
)
def test_flags_build_the_outer_optimizer(training, expected):
    base = base_of(Chosen("maml", tasks="sinusoid"))
    settings = {"training": {"schedule": "constant", "outer_lr": 0.1} | training}
    built = optimizer_of(resolve(base, settings))
    params = {"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray(0.5)}
    gradients = [{"a": jnp.asarray([0.3 * i, -1.0]), "b": jnp.asarray(0.1 - i)} for i in range(5)]
    both = []
    for optimizer in (built, expected):
        current, state, updates = params, optimizer.init(params), []
        for gradient in gradients:
            update, state = optimizer.update(gradient, state, current)
            current = optax.apply_updates(current, update)
            updates.append(update)
        both.append(updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *both)


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
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 75, message
    assert "--resume" in message
    assert main(["evaluate", str(out)]) == 0
