"""Tests of `jaxmeta compare` and `jaxmeta plot`, which compare several runs."""

import json
import shlex
import shutil
import signal
import sys

import numpy as np
import pytest
from support import read_json

from jaxmeta.cli import compare, main
from jaxmeta.cli import run as run_of_command
from jaxmeta.cli.comparison_report import comparison_markdown
from jaxmeta.cli.figures import Curve, draw_metric
from jaxmeta.cli.names import LEARNERS
from jaxmeta.cli.presets import PRESETS
from jaxmeta.cli.signals import Signalled

FLAGS = ["--tasks", "sinusoid", "--steps", "20", "--validate-every", "10", "--episodes", "20"]
FLAGS += ["--meta-batch", "4", "--inner-lr", "0.02", "--order", "second", "--devices", "1"]
COMPARE = ["compare", "maml", "fomaml", *FLAGS]


class InThisProcess:
    """A replacement of `subprocess.Popen` that trains in this process, which saves imports."""

    def __init__(self, command, start_new_session):
        assert start_new_session
        assert command[:3] == [sys.executable, "-m", "jaxmeta.cli"]
        self.status = main(command[3:])

    def wait(self):
        return self.status


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Return the folder of a comparison."""
    out = tmp_path_factory.mktemp("runs") / "compared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.subprocess, "Popen", InThisProcess)
        patch.setattr(run_of_command, "plot_curve", lambda *_: None)
        # One evaluation of each run instead of one for each number of inner steps.
        sinusoid = PRESETS["sinusoid"] | {"report_steps": ()}
        patch.setitem(PRESETS, "sinusoid", sinusoid)
        assert main([*COMPARE, "--out", str(out)]) == 0
    return out


@pytest.mark.nightly
def test_trainings_in_separate_processes_give_the_same_comparison(compared, tmp_path):
    assert main([*COMPARE, "--out", str(tmp_path / "out")]) == 0
    test_differences_are_paired_by_test_task(tmp_path / "out")
    test_a_comparison_writes_its_files_and_a_correct_report(tmp_path / "out")
    expected, actual = (
        read_json(folder / "comparison.json")["learners"] for folder in (compared, tmp_path / "out")
    )
    for name, row in expected.items():
        assert actual[name]["mse"]["mean"] == pytest.approx(row["mse"]["mean"], rel=1e-4)


@pytest.fixture
def copy(compared, tmp_path):
    return shutil.copytree(compared, tmp_path / "copy")


@pytest.fixture
def children(compared, monkeypatch):
    """Return a replacement of `subprocess.Popen` that records commands and copies finished runs."""

    class Child:
        commands, signals, exit_status = [], [], staticmethod(lambda: 0)

        def __init__(self, command, start_new_session):
            assert start_new_session
            Child.commands.append(command[3:])

        def send_signal(self, number):
            Child.signals.append(number)

        def wait(self):
            status = Child.exit_status()
            if status == 0:
                command = Child.commands[-1]
                out = command[command.index("--out") + 1]
                shutil.copytree(compared / command[1], out, dirs_exist_ok=True)
            return status

    monkeypatch.setattr(compare.subprocess, "Popen", Child)
    return Child


def losses(run):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.nightly
def test_differences_are_paired_by_test_task(compared):
    result = read_json(compared / "comparison.json")
    values = {
        name: np.array(read_json(compared / name / "episodes.json")["mse"]) for name in ("maml", "fomaml")
    }
    for name, errors in values.items():
        assert errors.shape == (20,)
        assert result["learners"][name]["mse"]["mean"] == pytest.approx(errors.mean())
    differences = values["fomaml"] - values["maml"]
    assert np.abs(differences).max() > 0
    row = result["learners"]["fomaml"]["difference"]["mse"]
    assert row["mean"] == pytest.approx(differences.mean())
    assert row["ci95"] == pytest.approx(1.96 * differences.std(ddof=1) / np.sqrt(20))
    # Amplitudes range over a factor of 50: errors correlate like this only on the same waves.
    assert np.corrcoef(*values.values())[0, 1] > 0.95
    # The first losses have the same parameters and training tasks; the gradients differ after that.
    maml, fomaml = losses(compared / "maml"), losses(compared / "fomaml")
    assert maml[0] == pytest.approx(fomaml[0], rel=1e-6)
    assert maml != fomaml


def test_a_comparison_writes_its_files_and_a_correct_report(compared):
    assert (compared / "comparison.png").read_bytes().startswith(b"\x89PNG")
    text = (compared / "comparison.md").read_text()
    assert "fomaml does not have these settings: --order." in text
    guessing = read_json(compared / "maml" / "report.json")["mse_of_mean"]["mean"]
    assert f"Prediction by the mean of the support targets: {guessing:.4f} ± " in text
    orders = [
        read_json(compared / name / "config.json")["learner"].get("order") for name in ("maml", "fomaml")
    ]
    assert orders == ["second", None]
    row = read_json(compared / "comparison.json")["learners"]["fomaml"]
    for values, sign in ((row["mse"], ""), (row["difference"]["mse"], "+z")):
        assert f"{values['mean']:{sign}.4f} ± {values['ci95']:.4f}" in text
    for name in ("maml", "fomaml"):
        report = read_json(compared / name / "report.json")
        assert report["peak_memory"] == "process"
        assert 5e7 < report["peak_memory_bytes"] < 1e11
        assert f"{report['peak_memory_bytes'] / 1e6:,.0f} MB" in (compared / name / "report.md").read_text()
    assert not [path.name for path in compared.iterdir() if path.name.startswith(".")]


def test_transductive_and_inductive_accuracy_have_rows_and_differences():
    card = {"tasks": "glyphs", "ways": 5, "shots": 1, "queries": 1}
    shared = {"tasks": "glyphs", "preset": "glyphs", "seed": 0, "steps": 2, "episodes": 9, "meta_batch": 4}
    accuracy = {name: {"mean": 0.5, "ci95": 0.01} for name in ("transductive", "inductive")}
    costs = {"training_s": 1.0, "steps_per_second": None, "peak_memory_bytes": None, "peak_memory": "process"}
    row = {"accuracy": accuracy, "difference": {}, "left_out": [], "network": {"name": "conv4"}, **costs}
    worse = {**row, "difference": {"inductive": {"mean": -0.02, "ci95": 0.005}}}
    rows = {"maml": row, "other": worse}
    text = comparison_markdown(
        {"metric": "accuracy", "compared_to": "maml", "command": "", **shared, "card": card, "learners": rows}
    )
    lines = [line for line in text.splitlines() if line.startswith("| other")]
    assert [line.split()[3] for line in lines] == ["transductive", "inductive"]
    assert "-2.00 ± 0.50" in lines[1]
    assert "±" not in lines[0].replace("50.00 ± 1.00", "")


def test_the_only_row_without_batch_normalisation_stands_for_all_rows():
    values = np.arange(3)
    report = {"accuracy": {"inductive": {"norm": "none"}}}
    assert compare._values_of_row("transductive", report, {"inductive": values}) is values
    report["accuracy"]["inductive"]["norm"] = "support"
    assert compare._values_of_row("transductive", report, {"inductive": values}) is None
    assert compare._values_of_row("inductive", report, {"inductive": values}) is values


ACCURACY = {"mean": 0.5, "ci95": 0.01}


def result_of(networks, **card):
    """Return the content of `comparison.json` for learners with these networks."""
    card = {"tasks": "glyphs", "ways": 4, "shots": 1, "queries": 1, **card}
    row = {"difference": {}, "left_out": [], "training_s": 1.0, "steps_per_second": 2.0}
    row |= {"peak_memory_bytes": None, "peak_memory": "process", "accuracy": {"inductive": ACCURACY}}
    shared = {"tasks": "glyphs", "preset": None, "seed": 0, "steps": 1, "episodes": 1, "meta_batch": 1}
    rows = {name: {**row, "network": network} for name, network in networks.items()}
    head = {"metric": "accuracy", "compared_to": next(iter(networks)), "command": "jaxmeta compare a b"}
    return {**head, **shared, "card": card, "learners": rows}


@pytest.mark.parametrize(
    ("networks", "expected"),
    [
        ([{"name": "conv4", "filters": 64}, {"name": "conv4", "filters": 64}], None),
        ([{"name": "conv4", "filters": 64}, {"name": "resnet12"}], ["conv4", "resnet12"]),
        (
            [{"name": "conv4", "filters": 64, "norm": True}, {"name": "conv4", "filters": 32, "norm": True}],
            ["conv4, filters 64", "conv4, filters 32"],
        ),
        (
            [{"name": "mlp", "hidden": [8, 4]}, {"name": "mlp", "hidden": []}, {"name": "linear"}],
            ["mlp, hidden 8,4", "mlp, hidden none", "linear"],
        ),
    ],
)
def test_networks_have_a_column_where_they_differ(networks, expected):
    text = comparison_markdown(result_of(dict(zip("abc", networks, strict=False))))
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:2] == "| "
    ]
    assert ("network" in cells[0]) == (expected is not None)
    column = [row[1] for row in cells if row[0] in ("a", "b", "c")]
    assert column == (expected or ["inductive"] * len(networks))


def test_reports_use_singular_and_plural_and_give_the_command():
    text = comparison_markdown(result_of({"a": {"name": "mlp"}, "b": {"name": "mlp"}}))
    assert "4-way 1-shot, 1 query; 1 test task; 1 meta-step of 1 task; seed 0; preset none." in text
    assert "Guessing: 25.00 %, one of 4 classes." in text
    assert "```sh\njaxmeta compare a b\n```" in text
    assert text.rstrip().endswith("(comparison.png)")
    several = result_of({"a": {"name": "mlp"}, "b": {"name": "mlp"}}, queries=15) | {
        "steps": 2000,
        "episodes": 9,
    }
    assert "15 queries; 9 test tasks; 2,000 meta-steps of 1 task" in comparison_markdown(several)


def test_a_signal_between_trainings_stops_the_comparison(children):
    with compare._Trainings("the same with --resume").handled() as trainings:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Signalled, match="by SIGTERM before fomaml was trained; continue with: the same"):
            trainings.run("fomaml", [])
    assert not children.commands


def test_a_training_that_could_not_print_is_compared(children, compared, tmp_path, capsys):
    def ended():
        command = children.commands[-1]
        shutil.copytree(compared / command[1], command[command.index("--out") + 1], dirs_exist_ok=True)
        return 1

    children.exit_status = staticmethod(ended)
    assert main([*COMPARE, "--out", str(tmp_path / "out")]) == 1
    assert "maml was trained, but its command failed after that; fomaml was" in capsys.readouterr().err
    rows = read_json(tmp_path / "out" / "comparison.json")["learners"]
    assert rows["maml"]["mse"] == read_json(compared / "comparison.json")["learners"]["maml"]["mse"]


@pytest.mark.parametrize("name", ["comparison.json", "comparison.md", "comparison.png"])
def test_a_file_that_cannot_be_written_does_not_stop_the_others(name, copy, children, monkeypatch, capsys):
    def failing(write):
        def writing(path, *arguments):
            if path.name == name:
                raise OSError(28, "No space left on device")
            write(path, *arguments)

        return writing

    for function in ("write_json", "write_text", "draw_comparison"):
        monkeypatch.setattr(compare, function, failing(getattr(compare, function)))
    for path in copy.glob("comparison.*"):
        path.unlink()
    assert main([*COMPARE, "--resume", "--out", str(copy)]) == (0 if name.endswith("png") else 1)
    printed = capsys.readouterr()
    assert f"{copy / name} could not be written" in printed.err
    assert "| fomaml" in printed.out
    left = {path.name for path in copy.glob("comparison.*")}
    assert left == {"comparison.json", "comparison.md", "comparison.png"} - {name}


def test_resume_skips_resumes_and_starts_trainings(copy, children, capsys):
    again = [*COMPARE, "--resume", "--out", str(copy)]
    before = read_json(copy / "comparison.json")
    assert main(again) == 0
    assert not children.commands
    assert read_json(copy / "comparison.json") == before
    assert (copy / "comparison.md").read_text() in capsys.readouterr().out

    (copy / "fomaml" / "report.json").unlink()
    assert main(again) == 0
    (command,) = children.commands
    assert command[:2] == ["train", "fomaml"]
    assert command[-3:] == ["--resume", "--out", str(copy / "fomaml")]
    assert "--order" not in command

    shutil.rmtree(copy / "maml")
    assert main(again) == 0
    command = children.commands[-1]
    # The shape of episodes of the preset applies to every learner, even to one with its own default.
    episodes = ["--train-queries", "10"]
    assert sorted(command) == sorted(["train", "maml", *FLAGS, *episodes, "--out", str(copy / "maml")])


def test_resuming_with_other_settings_is_an_error(copy, children, capsys):
    assert main([*COMPARE, "--resume", "--out", str(copy), "--steps", "30"]) == 2
    assert "--steps: got 30" in capsys.readouterr().err
    report = read_json(copy / "fomaml" / "report.json")
    report["card"]["shots"] = 7
    (copy / "fomaml" / "report.json").write_text(json.dumps(report))
    assert main([*COMPARE, "--resume", "--out", str(copy)]) == 2
    assert "card" in capsys.readouterr().err
    assert not children.commands


def test_outputs_are_never_overwritten(copy, children, capsys):
    assert main([*COMPARE, "--out", str(copy)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert not children.commands


@pytest.mark.parametrize(("status", "expected"), [(1, 1), (2, 2), (-9, 1), (75, 75)])
def test_a_training_that_fails_ends_the_comparison(status, expected, children, tmp_path, capsys):
    children.exit_status = staticmethod(lambda: 0 if len(children.commands) == 1 else status)
    assert main([*COMPARE, "--out", str(tmp_path / "out")]) == expected
    message = capsys.readouterr().err
    # A process that ends with 1 or 2 has printed its error.
    assert len(message.splitlines()) == (status not in (1, 2))
    assert ("fomaml" in message) == (status not in (1, 2))
    assert not (tmp_path / "out" / "comparison.json").exists()


def test_a_first_training_with_invalid_settings_leaves_no_folder(children, tmp_path):
    children.exit_status = staticmethod(lambda: 2)
    assert main([*COMPARE, "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_comparison_can_be_resumed(number, children, tmp_path, capsys):
    def stopped():
        signal.raise_signal(number)
        return 75

    children.exit_status = staticmethod(stopped)
    before = signal.getsignal(number)
    out = tmp_path / "out put"
    assert main([*COMPARE, "--out", str(out)]) == 75
    assert children.signals == [number]
    assert signal.getsignal(number) is before
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1

    children.exit_status = staticmethod(lambda: 0)
    assert main(shlex.split(message.split("continue with: ")[1])[1:]) == 0
    assert (out / "comparison.json").exists()


def test_a_flag_that_no_learner_has_is_an_error(children, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(LEARNERS, "other", LEARNERS["fomaml"])
    assert main(["compare", "fomaml", "other", "--tasks", "sinusoid", "--order", "first"]) == 2
    assert "--order" in capsys.readouterr().err
    assert not children.commands
    assert not list(tmp_path.iterdir())


def test_plot_draws_runs_and_never_overwrites(compared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    maml, fomaml = str(compared / "maml"), str(compared / "fomaml")
    assert main(["plot", maml, fomaml]) == 0
    drawn = (tmp_path / "curves.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    for number in (1, 2):
        assert main(["plot", maml, fomaml]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"curves-{number}.png"
        assert (tmp_path / f"curves-{number}.png").read_bytes() == drawn
    assert (tmp_path / "curves.png").read_bytes() == drawn
    assert main(["plot", maml, fomaml, "--out", "seconds.png", "--x", "seconds"]) == 0
    assert (tmp_path / "seconds.png").read_bytes() != drawn
    assert main(["plot", maml, "--out", "one.png"]) == 0
    assert main(["plot", maml, maml, "--out", "twice.png"]) == 2

    running = tmp_path / "running"
    running.mkdir()
    shutil.copy(compared / "maml" / "config.json", running)
    assert main(["plot", str(running), "--out", "running.png"]) == 2
    assert "has no rows in metrics.jsonl yet" in capsys.readouterr().err
    rows = (compared / "maml" / "metrics.jsonl").read_text().splitlines()
    (running / "metrics.jsonl").write_text("\n".join([*rows[:3], rows[3][:20]]))
    assert main(["plot", str(running), maml, "--out", "running.png"]) == 0

    text = (running / "metrics.jsonl").read_text()
    (running / "metrics.jsonl").write_text(text.replace('"mse"', '"accuracy"'))
    assert main(["plot", str(running), maml, "--out", "mixed.png"]) == 2
    assert "accuracy" in capsys.readouterr().err
    assert not (tmp_path / "mixed.png").exists()


def test_curves_have_the_coordinates_of_the_rows():
    from matplotlib.figure import Figure

    trained = [{"step": i, "loss": 1.0, "accuracy": i / 10, "elapsed_s": 7 * i} for i in (1, 2, 3)]
    validated = [
        {"step": i, "validation_accuracy": 0.3 * i, "validation_accuracy_ci95": 0.05, "elapsed_s": 9 * i}
        for i in (1, 2)
    ]
    test = {"mean": 0.9, "ci95": 0.02}
    curves = [Curve("a", [*trained, *validated], "accuracy", test), Curve("b", trained, "accuracy")]
    axes = Figure().subplots()
    draw_metric(axes, curves, "seconds")
    points = [
        (list(line.get_xdata()), [round(float(y), 6) for y in line.get_ydata()]) for line in axes.get_lines()
    ]
    assert ([9, 18], [30, 60]) in points
    assert ([7, 14, 21], [10, 20, 30]) in points
    assert any(y == [90] and x[0] > 21 for x, y in points)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/maml-sinusoid-1", "runs/fomaml-sinusoid-2"], ["maml-1", "fomaml-2"]),
        (["a/maml", "b/maml"], ["a/maml", "b/maml"]),
        (["maml", "maml-2"], ["maml", "maml-2"]),
        (["runs/maml-1"], ["maml-1"]),
    ],
)
def test_curves_have_the_shortest_distinct_names(folders, names, compared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        for file in ("config.json", "metrics.jsonl"):
            shutil.copy(compared / "maml" / file, tmp_path / folder)
    drawn = []
    monkeypatch.setattr(compare, "plot_curves", lambda path, curves, x: drawn.extend(curves))
    assert main(["plot", *folders]) == 0
    assert [curve.name for curve in drawn] == names


@pytest.mark.parametrize(("flags", "budget"), [([], (2000, 8)), (["--steps", "7"], (7, 8))])
def test_learners_with_their_own_budget_get_the_common_one(children, tmp_path, flags, budget):
    # The second training fails, which ends the comparison.
    children.exit_status = staticmethod(lambda: 0 if len(children.commands) == 1 else 2)
    out = str(tmp_path / "out")
    assert main(["compare", "maml", "lstm_meta_learner", *flags, "--out", out]) == 2
    seen = {
        command[1]: tuple(int(command[command.index(flag) + 1]) for flag in ("--steps", "--meta-batch"))
        for command in children.commands
    }
    assert seen == {"maml": budget, "lstm_meta_learner": budget}
