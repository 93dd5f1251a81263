"""`jaxmeta compare` and `jaxmeta plot`: trainings side by side."""

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
    """Stands in for `subprocess.Popen`: trains in the process of the tests, which has imported all."""

    def __init__(self, command, start_new_session):
        assert start_new_session
        assert command[:3] == [sys.executable, "-m", "jaxmeta.cli"]
        self.status = main(command[3:])

    def wait(self):
        return self.status


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison."""
    out = tmp_path_factory.mktemp("runs") / "compared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.subprocess, "Popen", InThisProcess)
        patch.setattr(run_of_command, "plot_curve", lambda *_: None)
        # One evaluation of each run, in place of one for each number of inner steps.
        sinusoid = PRESETS["sinusoid"] | {"report_steps": ()}
        patch.setitem(PRESETS, "sinusoid", sinusoid)
        assert main([*COMPARE, "--out", str(out)]) == 0
    return out


@pytest.mark.nightly
def test_trainings_in_processes_of_their_own_are_compared_alike(compared, tmp_path):
    assert main([*COMPARE, "--out", str(tmp_path / "out")]) == 0
    test_the_difference_is_that_of_each_test_task(tmp_path / "out")
    test_a_comparison_writes_its_files_and_a_true_report(tmp_path / "out")
    here, there = (
        read_json(folder / "comparison.json")["learners"] for folder in (compared, tmp_path / "out")
    )
    for name, row in here.items():
        assert there[name]["mse"]["mean"] == pytest.approx(row["mse"]["mean"], rel=1e-4)


@pytest.fixture
def copy(compared, tmp_path):
    return shutil.copytree(compared, tmp_path / "copy")


@pytest.fixture
def children(compared, monkeypatch):
    """Stands in for the trainings: what would be run, and how each is to end."""

    class Child:
        commands, signals, wait_for = [], [], staticmethod(lambda: 0)

        def __init__(self, command, start_new_session):
            assert start_new_session
            Child.commands.append(command[3:])

        def send_signal(self, number):
            Child.signals.append(number)

        def wait(self):
            status = Child.wait_for()
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
def test_the_difference_is_that_of_each_test_task(compared):
    result = read_json(compared / "comparison.json")
    values = {
        name: np.array(read_json(compared / name / "episodes.json")["mse"]) for name in ("maml", "fomaml")
    }
    for name, own in values.items():
        assert own.shape == (20,)
        assert result["learners"][name]["mse"]["mean"] == pytest.approx(own.mean())
    apart = values["fomaml"] - values["maml"]
    assert np.abs(apart).max() > 0
    found = result["learners"]["fomaml"]["difference"]["mse"]
    assert found["mean"] == pytest.approx(apart.mean())
    assert found["ci95"] == pytest.approx(1.96 * apart.std(ddof=1) / np.sqrt(20))
    # Amplitudes range over a factor of 50: only errors on the same waves go together like this.
    assert np.corrcoef(*values.values())[0, 1] > 0.95
    # The same parameters on the same training tasks, before the two gradients lead apart.
    maml, fomaml = losses(compared / "maml"), losses(compared / "fomaml")
    assert maml[0] == pytest.approx(fomaml[0], rel=1e-6)
    assert maml != fomaml


def test_a_comparison_writes_its_files_and_a_true_report(compared):
    assert (compared / "comparison.png").read_bytes().startswith(b"\x89PNG")
    text = (compared / "comparison.md").read_text()
    assert "fomaml does not have these settings: --order." in text
    guessing = read_json(compared / "maml" / "report.json")["mse_of_mean"]["mean"]
    assert f"Answering with the mean of the support targets: {guessing:.4f} ± " in text
    orders = [
        read_json(compared / name / "config.json")["learner"].get("order") for name in ("maml", "fomaml")
    ]
    assert orders == ["second", None]
    found = read_json(compared / "comparison.json")["learners"]["fomaml"]
    for row, sign in ((found["mse"], ""), (found["difference"]["mse"], "+z")):
        assert f"{row['mean']:{sign}.4f} ± {row['ci95']:.4f}" in text
    for name in ("maml", "fomaml"):
        report = read_json(compared / name / "report.json")
        assert report["peak_memory"] == "process"
        assert 5e7 < report["peak_memory_bytes"] < 1e11
        assert f"{report['peak_memory_bytes'] / 1e6:,.0f} MB" in (compared / name / "report.md").read_text()
    assert not [path.name for path in compared.iterdir() if path.name.startswith(".")]


def test_transductive_and_inductive_accuracy_are_rows_and_paired_apart():
    card = {"tasks": "glyphs", "ways": 5, "shots": 1, "queries": 1}
    config = {"meta_batch": 4}
    shared = {"tasks": "glyphs", "preset": "glyphs", "seed": 0, "steps": 2, "episodes": 9, "card": card}
    accuracy = {name: {"mean": 0.5, "ci95": 0.01} for name in ("transductive", "inductive")}
    costs = {"training_s": 1.0, "steps_per_second": None, "peak_memory_bytes": None, "peak_memory": "process"}
    row = {"accuracy": accuracy, "difference": {}, "left_out": [], "network": {"name": "conv4"}, **costs}
    worse = {**row, "difference": {"inductive": {"mean": -0.02, "ci95": 0.005}}}
    rows = {"maml": row, "other": worse}
    text = comparison_markdown(
        {"metric": "accuracy", "compared_to": "maml", "command": "", **config, **shared, "learners": rows}
    )
    lines = [line for line in text.splitlines() if line.startswith("| other")]
    assert [line.split()[3] for line in lines] == ["transductive", "inductive"]
    assert "-2.00 ± 0.50" in lines[1]
    assert "±" not in lines[0].replace("50.00 ± 1.00", "")


def result_of(networks, **card):
    """What `comparison.json` holds, of learners with these networks."""
    card = {"tasks": "glyphs", "ways": 4, "shots": 1, "queries": 1, **card}
    row = {"difference": {}, "left_out": [], "training_s": 1.0, "steps_per_second": 2.0}
    row |= {"peak_memory_bytes": None, "peak_memory": "process", "accuracy": {"inductive": ACCURACY}}
    shared = {"tasks": "glyphs", "preset": None, "seed": 0, "steps": 1, "episodes": 1, "meta_batch": 1}
    rows = {name: {**row, "network": network} for name, network in networks.items()}
    found = {"metric": "accuracy", "compared_to": next(iter(networks)), "command": "jaxmeta compare a b"}
    return {**found, **shared, "card": card, "learners": rows}


ACCURACY = {"mean": 0.5, "ci95": 0.01}


@pytest.mark.parametrize(
    ("networks", "shown"),
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
def test_networks_have_a_column_where_they_differ(networks, shown):
    text = comparison_markdown(result_of(dict(zip("abc", networks, strict=False))))
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:2] == "| "
    ]
    assert ("network" in cells[0]) == (shown is not None)
    found = [row[1] for row in cells if row[0] in ("a", "b", "c")]
    assert found == (shown or ["inductive"] * len(networks))


def test_a_comparison_agrees_in_number_and_says_what_repeats_it():
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


def test_a_signal_between_two_trainings_starts_no_other(children):
    with compare._Trainings("the same with --resume").handled() as trainings:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Signalled, match="by SIGTERM before fomaml was trained; continue with: the same"):
            trainings.run("fomaml", [])
    assert not children.commands


def test_a_training_that_could_not_print_is_compared_all_the_same(children, compared, tmp_path, capsys):
    def ended():
        command = children.commands[-1]
        shutil.copytree(compared / command[1], command[command.index("--out") + 1], dirs_exist_ok=True)
        return 1

    children.wait_for = staticmethod(ended)
    assert main([*COMPARE, "--out", str(tmp_path / "out")]) == 1
    assert "maml was trained, and its command failed after that; fomaml was" in capsys.readouterr().err
    found = read_json(tmp_path / "out" / "comparison.json")["learners"]
    assert found["maml"]["mse"] == read_json(compared / "comparison.json")["learners"]["maml"]["mse"]


@pytest.mark.parametrize("name", ["comparison.json", "comparison.md", "comparison.png"])
def test_what_of_a_comparison_cannot_be_written_costs_nothing_else(name, copy, children, monkeypatch, capsys):
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
    said = capsys.readouterr()
    assert f"{copy / name} could not be written" in said.err
    assert "| fomaml" in said.out
    left = {path.name for path in copy.glob("comparison.*")}
    assert left == {"comparison.json", "comparison.md", "comparison.png"} - {name}


def test_resuming_skips_resumes_and_starts(copy, children, capsys):
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
    # The episodes of the preset go for every learner, though it have its own.
    episodes = ["--train-queries", "10"]
    assert sorted(command) == sorted(["train", "maml", *FLAGS, *episodes, "--out", str(copy / "maml")])


def test_runs_of_other_settings_are_refused(copy, children, capsys):
    assert main([*COMPARE, "--resume", "--out", str(copy), "--steps", "30"]) == 2
    assert "--steps: got 30" in capsys.readouterr().err
    report = read_json(copy / "fomaml" / "report.json")
    report["card"]["shots"] = 7
    (copy / "fomaml" / "report.json").write_text(json.dumps(report))
    assert main([*COMPARE, "--resume", "--out", str(copy)]) == 2
    assert "card" in capsys.readouterr().err
    assert not children.commands


def test_nothing_is_overwritten(copy, children, capsys):
    assert main([*COMPARE, "--out", str(copy)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert not children.commands


@pytest.mark.parametrize(("status", "ends"), [(1, 1), (2, 2), (-9, 1), (75, 75)])
def test_a_training_that_fails_ends_the_comparison(status, ends, children, tmp_path, capsys):
    children.wait_for = staticmethod(lambda: 0 if len(children.commands) == 1 else status)
    assert main([*COMPARE, "--out", str(tmp_path / "out")]) == ends
    said = capsys.readouterr().err
    # What ends with 1 or 2 has said why itself.
    assert len(said.splitlines()) == (status not in (1, 2))
    assert ("fomaml" in said) == (status not in (1, 2))
    assert not (tmp_path / "out" / "comparison.json").exists()


def test_a_first_training_that_is_refused_leaves_nothing(children, tmp_path):
    children.wait_for = staticmethod(lambda: 2)
    assert main([*COMPARE, "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_comparison_can_go_on(number, children, tmp_path, capsys):
    def stopped():
        signal.raise_signal(number)
        return 75

    children.wait_for = staticmethod(stopped)
    before = signal.getsignal(number)
    out = tmp_path / "out put"
    assert main([*COMPARE, "--out", str(out)]) == 75
    assert children.signals == [number]
    assert signal.getsignal(number) is before
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1

    children.wait_for = staticmethod(lambda: 0)
    assert main(shlex.split(said.split("continue with: ")[1])[1:]) == 0
    assert (out / "comparison.json").exists()


def test_a_flag_that_none_of_the_learners_takes_is_refused(children, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(LEARNERS, "other", LEARNERS["fomaml"])
    assert main(["compare", "fomaml", "other", "--tasks", "sinusoid", "--order", "first"]) == 2
    assert "--order" in capsys.readouterr().err
    assert not children.commands
    assert not list(tmp_path.iterdir())


def test_plot_draws_runs_and_overwrites_nothing(compared, tmp_path, monkeypatch, capsys):
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


def test_curves_are_drawn_where_the_rows_say():
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
def test_curves_are_named_by_what_tells_their_runs_apart(folders, names, compared, tmp_path, monkeypatch):
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
def test_the_budget_is_the_same_for_learners_that_have_their_own(children, tmp_path, flags, budget):
    # The second training ends with a status of its own, and so the comparison.
    children.wait_for = staticmethod(lambda: 0 if len(children.commands) == 1 else 2)
    out = str(tmp_path / "out")
    assert main(["compare", "maml", "lstm_meta_learner", *flags, "--out", out]) == 2
    seen = {
        command[1]: tuple(int(command[command.index(flag) + 1]) for flag in ("--steps", "--meta-batch"))
        for command in children.commands
    }
    assert seen == {"maml": budget, "lstm_meta_learner": budget}
