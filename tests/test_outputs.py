"""Outputs of commands: a failure to write or print never loses a training."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import read_json

import jaxmeta as jm
from jaxmeta import cli
from jaxmeta.cli import compare, figures, folders, main, report
from jaxmeta.cli import run as run_of_command
from jaxmeta.cli.comparison_report import draw_comparison
from jaxmeta.cli.figures import Curve, plot_confusion, plot_curve, plot_curves
from jaxmeta.cli.output import Output, forgiving
from jaxmeta.cli.run import params_of
from jaxmeta.training import Progress, checkpoint, metrics
from jaxmeta.training import progress as training_progress

# The smallest possible run.
TINY = ["train", "--tasks", "sinusoid", "--steps", "2", "--meta-batch", "2", "--validate-every", "2"]
TINY += ["--episodes", "4", "--report-steps", "none", "--schedule", "constant", "--devices", "1"]
# Names with a special meaning in matplotlib, or without a glyph.
NAMES = [
    "a$b^c_{",
    r"\frac{",
    "$x$ 50 % of $y",
    "_hidden",
    "__",
    "🦜🐍",
    "蝴蝶",
    "a\nb\tc",
    "\udce9t\udce9",
    "{}",
    "",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run without failures."""
    out = tmp_path_factory.mktemp("runs") / "well"
    assert main([*TINY, "--out", str(out)]) == 0
    return out


def same_parameters(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# --- Figures --------------------------------------------------------------------------------------------


ROWS = [{"step": i, "loss": 2.0 / i, "accuracy": i / 4, "elapsed_s": i} for i in (1, 2, 3)]
ROWS += [
    {"step": 3, "validation_accuracy": 0.5, "validation_accuracy_ci95": 0.1, "elapsed_s": 3, "best": True}
]


@pytest.fixture
def texts(monkeypatch):
    """Return a list of all texts of the figures that are saved."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    collected = []
    save = Figure.savefig

    def saving(figure, *arguments, **settings):
        save(figure, *arguments, **settings)
        collected.extend(text for text in figure.findobj(Text) if text.get_text())

    monkeypatch.setattr(Figure, "savefig", saving)
    return collected


def drawn(path, texts):
    """Return the texts of a figure, and assert that none was parsed as mathematics."""
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not any(text.get_parse_math() or text.get_usetex() for text in texts)
    return [text.get_text() for text in texts]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_drawn_literally(name, tmp_path, texts):
    path = tmp_path / "curve.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_curve(path, ROWS, "accuracy", f"{name} on tasks")
        curves = [Curve(name, ROWS, "accuracy", {"mean": 0.5, "ci95": 0.1}), Curve("other", ROWS, "accuracy")]
        plot_curves(path, curves, "seconds")
        plot_confusion(tmp_path / "confusion.png", np.eye(2, dtype=int), [name, "b"], f"from {name}")
    joined = " | ".join(drawn(path, texts))
    shown = name.replace("\n", "\ufffd").replace("\t", "\ufffd").replace("\udce9", "\ufffd")
    for text in (f"{shown} on tasks", f"{shown}: test 50.00 ± 10.00 %", f"from {shown}"):
        assert text in joined


def test_comparisons_draw_names_literally(tmp_path, texts):
    learners = {}
    for index, name in enumerate(NAMES[:6]):
        folder = tmp_path / f"run {index}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
        test = {"mean": 0.5, "ci95": 0.1}
        learners[name] = {
            "run": folder.name,
            "accuracy": {"inductive": test},
            "difference": {"inductive": test},
        }
    result = {"metric": "accuracy", "compared_to": NAMES[0], "learners": learners, "steps": 1}
    path = tmp_path / "$comparison$.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_comparison(path, tmp_path, {**result, "card": {"tasks": r"\tasks_{$"}})
    all_texts = drawn(path, texts)
    assert r"\tasks_{$, 1 meta-step" in all_texts
    assert f"minus {NAMES[0]} (percentage points)" in all_texts
    for name in learners:
        # Two tick labels and a legend entry.
        assert sum(text.removeprefix("\u200b") == name for text in all_texts) > 2


def test_logarithmic_axes_have_plain_numbers(tmp_path, texts):
    rows = [{"step": i, "loss": 10.0**i, "mse": 10.0**i, "elapsed_s": i} for i in range(-2, 3)]
    plot_curve(tmp_path / "curve.png", rows, "mse", "run")
    assert {"0.01", "1", "100"} <= set(drawn(tmp_path / "curve.png", texts))


# --- Standard output ------------------------------------------------------------------------------------


class FailingStream(io.StringIO):
    """A stream that fails: `write` on a full disk, or `flush` to a closed pipe."""

    def __init__(self, fails):
        super().__init__()
        self.fails = fails

    def write(self, text):
        if self.fails == "write":
            raise OSError(28, "No space left on device")
        return super().write(text)

    def flush(self):
        if self.fails == "flush":
            raise BrokenPipeError(32, "Broken pipe")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {
    "full": lambda: FailingStream("write"),
    "pipe": lambda: FailingStream("flush"),
    "closed": closed,
    "none": lambda: None,
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_records_its_failure_and_raises_nothing(kind):
    out = Output(STREAMS[kind]())
    print("one", file=out, flush=True)
    first = out.error
    assert first is not None
    print("two", file=out, flush=True)
    out.writelines(["three", "four"])
    assert out.error is first
    assert not out.isatty()


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"91 ? 2 ?\n"), ("latin-1", b"91 \xb1 2 ?\n")])
def test_characters_that_a_terminal_cannot_show_are_replaced(encoding, shown, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with forgiving() as out:
        print("91 ± 2 \udce9")
    assert raw.getvalue() == shown
    assert out.error is None


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("kind", STREAMS)
def test_a_run_whose_output_fails_is_complete_and_warns(kind, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", STREAMS[kind]())
    out = tmp_path / "run"
    # A reader that closes a pipe, such as `head`, has seen enough: that is not an error.
    assert main([*TINY, "--out", str(out)]) == (0 if kind == "pipe" else 1)
    error = capsys.readouterr().err
    assert ("not all of the output could be written" in error) == (kind != "pipe")
    assert {path.name for path in out.iterdir()} == {path.name for path in run.iterdir()}
    assert read_json(out / "report.json")["mse"] == read_json(run / "report.json")["mse"]


def test_usage_errors_keep_their_status_where_nothing_can_be_printed(monkeypatch):
    monkeypatch.setattr(sys, "stderr", FailingStream("write"))
    monkeypatch.setattr(sys, "stdout", FailingStream("write"))
    assert main(["trian"]) == 2


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("redirection", "status"),
    [
        ("> /dev/full", 1),
        (">&-", 1),
        ("| true", 0),
        ("> /dev/full 2>&1", 1),
        ("> /dev/null", 0),
        ("2>&-", 0),
    ],
)
def test_redirected_programs_end_with_the_right_status(redirection, status, tmp_path):
    out = tmp_path / "run"
    command = shlex.join([sys.executable, "-m", "jaxmeta.cli", *TINY, "--out", str(out)])
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    ended = subprocess.run(
        f"{command} {redirection}", shell=True, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
    assert read_json(out / "report.json")["mse"]["mean"] > 0
    assert not any("test mse" in path.read_text() for path in out.glob("*.json*"))


def test_a_closed_pipe_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    # The program itself, since only the interpreter's exit flushes the stream's buffer for the last time.
    command = [sys.executable, "-c", "from jaxmeta.cli import program; program()", "--help"]
    with os.fdopen(write, "wb") as pipe:
        ended = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


# --- Failures during or after training ------------------------------------------------------------------


def fail(*_, **__):
    raise OSError(28, "No space left on device")


def crash(*_, **__):
    raise RuntimeError("no fonts")


class Crash:
    """A replacement of TensorBoard's writer that fails."""

    def __init__(self, *_, **__):
        pass

    add_scalar = flush = crash

    def close(self):
        crash()


def failing(name):
    """Return a patch that makes a `write_…` function fail for files of this name."""

    def patch(write):
        def writing(path, *arguments):
            (fail if path.name == name else write)(path, *arguments)

        return writing

    return patch


# Name of a fault: object, attribute and patch, expected status, missing file, and part of the message.
FAULTS = {
    "checkpoint": (checkpoint, "save_checkpoint", lambda _: fail, 1, "checkpoints", "parameters.npz"),
    "report": (
        run_of_command,
        "write_json",
        failing("report.json"),
        1,
        "report.json",
        "report.json could not",
    ),
    "scalars": (
        report.RunLog,
        "_tensorboard",
        lambda _: Crash,
        0,
        None,
        "tensorboard could not be written; training continues",
    ),
    "figure": (
        run_of_command,
        "plot_curve",
        lambda _: crash,
        0,
        "curve.png",
        "curve.png could not be written",
    ),
    "read back": (run_of_command, "check_saved", lambda _: crash, 1, None, "parameters.npz"),
    "best": (checkpoint, "save_best", lambda _: fail, 0, None, "the trained state is returned"),
    "episodes": (run_of_command, "write_text", failing("episodes.json"), 1, "episodes.json", "No space left"),
    "report.md": (
        run_of_command,
        "write_text",
        failing("report.md"),
        1,
        "report.md",
        "report.md could not be",
    ),
    "markdown": (run_of_command, "report_markdown", lambda _: crash, 1, "report.md", "no fonts"),
    "figure file": (figures, "replacing", lambda _: fail, 0, "curve.png", "curve.png could not be written"),
    "tensorboard": (
        report.RunLog,
        "_tensorboard",
        lambda _: crash,
        0,
        None,
        "tensorboard could not be written",
    ),
}


@pytest.mark.nightly_rows(after=4)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_after_training_keeps_all_other_outputs(fault, run, tmp_path, monkeypatch, capsys):
    where, name, patch, status, missing, expected = FAULTS[fault]
    out = tmp_path / "run"
    with monkeypatch.context() as patching:
        patching.setattr(where, name, patch(getattr(where, name)))
        assert main([*TINY, "--out", str(out)]) == status
    printed = capsys.readouterr()
    assert expected in printed.err
    assert len(printed.err.splitlines()) <= 2
    # The result is printed even where a file is not written.
    assert f"test mse  {read_json(run / 'report.json')['mse']['mean']:.4f}" in printed.out
    left = {path.name for path in out.iterdir()} - {"parameters.npz", "checkpoints", "tensorboard"}
    assert {path.name for path in run.iterdir()} - {"checkpoints", "tensorboard"} - left == (
        {missing} - {"checkpoints", None}
    )
    config = run_of_command.load_config(run)
    if missing != "checkpoints":
        same_parameters(params_of(out, run_of_command.load_config(out)), params_of(run, config))
    if status and expected == "parameters.npz":
        with np.load(out / "parameters.npz") as spare:
            kept = dict(spare)
        same_parameters(kept, checkpoint.arrays_by_path(params_of(run, config)))


def progress(step):
    return Progress(step, 4, {"loss": 1.0 / step}, 1.0, 0.5)


@pytest.mark.parametrize("part", ["enter", "show"])
def test_training_continues_without_a_progress_bar_that_fails(part, tmp_path, monkeypatch):
    """All rows are counted, and there is one warning."""

    class Bar:
        def __enter__(self):
            return crash() if part == "enter" else (crash, print)

        def __exit__(self, *_):
            crash()

    monkeypatch.setattr(training_progress, "_bar", lambda _: Bar())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    log = report.RunLog(tmp_path / "metrics.jsonl", 4, "mse")

    def train():
        with log.showing():
            for step in (2, 4):
                log(progress(step))

    with pytest.warns(UserWarning, match="the progress bar could not be written") as warned:
        train()
    assert len(warned) == 1
    assert (log.steps_per_second, log.compile_s) == (1.0, 0.5)


@pytest.mark.parametrize("function", ["start_trace", "stop_trace"])
def test_training_continues_without_a_profiler_that_fails(function, tmp_path, monkeypatch):
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, crash if name == function else lambda *_, **__: None)
    seen = []

    def train():
        with report.profiling(seen.append, tmp_path / "profile") as listener:
            for step in (1, 2, 3):
                listener(progress(step))

    with pytest.warns(UserWarning, match="profile could not be written: RuntimeError"):
        train()
    assert [event.step for event in seen] == [1, 2, 3]


def test_table_cells_escape_bars_and_line_breaks():
    assert report.cell("a|b\nc\t| d") == r"a\|b c \| d"


def test_training_continues_where_rows_cannot_be_written(run, tmp_path, monkeypatch, capsys):
    """Rows that could not be written follow as soon as they can be."""

    class FailsTwice(io.StringIO):
        flushes = 0

        def flush(self):
            FailsTwice.flushes += 1
            if FailsTwice.flushes < 3:
                fail()

        def close(self):
            (tmp_path / "run" / "metrics.jsonl").write_text(self.getvalue())
            super().close()

    monkeypatch.setattr(metrics, "open", lambda *_, **__: FailsTwice(), raising=False)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 0
    (message,) = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl could not be written; training continues" in message
    steps = [
        [row["step"] for row in metrics.read_metrics(folder / "metrics.jsonl")]
        for folder in (tmp_path / "run", run)
    ]
    assert steps[0] == steps[1]


def test_a_run_whose_folder_is_removed_while_it_trains_can_be_loaded(run, tmp_path, monkeypatch):
    out, fit = tmp_path / "run", run_of_command.train

    def removing(*arguments, **settings):
        shutil.rmtree(out)
        return fit(*arguments, **settings)

    monkeypatch.setattr(run_of_command, "train", removing)
    assert main([*TINY, "--out", str(out)]) == 0
    same_parameters(*(params_of(folder, run_of_command.load_config(folder)) for folder in (out, run)))
    assert read_json(out / "report.json")["mse"] == read_json(run / "report.json")["mse"]


@pytest.mark.nightly
def test_an_error_in_training_names_the_command_to_resume(tmp_path, monkeypatch, capsys):
    save = checkpoint.save_checkpoint

    def second_fails(folder, state, **settings):
        return fail() if int(state.step) > 2 else save(folder, state, **settings)

    out = tmp_path / "run $1"
    flags = [*TINY, "--steps", "6", "--out", str(out)]
    with monkeypatch.context() as patching:
        patching.setattr(checkpoint, "save_checkpoint", second_fails)
        assert main(flags) == 1
    message = capsys.readouterr().err
    assert "No space left" in message
    assert "saved at meta-step 2 is kept; continue with: jaxmeta train" in message
    assert main(shlex.split(message.split("continue with: ")[1])[1:]) == 0
    assert read_json(out / "report.json")["steps"] == 6


@pytest.mark.nightly
@pytest.mark.parametrize("step", ["_results", "_with_population"])
def test_the_error_of_a_failed_evaluation_reports_that_training_has_ended(
    step, run, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    with monkeypatch.context() as patching:
        patching.setattr(run_of_command, step, fail)
        assert main([*TINY, "--out", str(out)]) == 1
    message = capsys.readouterr().err
    assert (
        f"training has ended, but its evaluation failed; continue with: jaxmeta train --resume --out {out}"
        in message
    )
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert read_json(out / "report.json")["mse"] == read_json(run / "report.json")["mse"]


def test_an_evaluation_that_cannot_be_written_is_printed(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_of_command, "write_json", fail)
    assert main(["evaluate", str(run), "--json", str(tmp_path / "result.json")]) == 1
    printed = capsys.readouterr()
    assert "test mse" in printed.out
    assert "result.json could not be written (No space left on device)" in printed.err


def test_failed_results_are_raised_together():
    results = folders.Results()
    results.check()
    for name, error in (("a.json", OSError(28, "full")), ("b.md", KeyError("x")), ("c.md", RuntimeError())):
        with results.writing(name):
            raise error
    with pytest.raises(OSError, match=r"^a\.json .*\(full\); b\.md .*\('x'\); c\.md .*\(RuntimeError\)$"):
        results.check()


# --- Checkpoints are read back --------------------------------------------------------------------------


def changed(tree):
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [leaves[0] + 1, *leaves[1:]])


def test_saved_parameters_are_compared_with_those_in_memory(run, tmp_path):
    params = params_of(run, run_of_command.load_config(run))
    checkpoint.check_saved(run, params)
    with pytest.raises(ValueError, match=r"has other parameters: .* differs"):
        checkpoint.check_saved(run, changed(params))
    with pytest.raises(ValueError, match="is only in the new one"):
        checkpoint.check_saved(run, {**params, "more": jnp.ones(2)})
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        checkpoint.check_saved(tmp_path, params)


def test_numbers_that_are_not_finite_are_compared_bit_for_bit(tmp_path):
    params = {"a": jnp.array([jnp.nan, -0.0]), "key": jax.random.key(3)}
    state = jm.training.TrainState(jnp.int32(1), params, (), jax.random.key(0))
    checkpoint.save_checkpoint(tmp_path, state)
    checkpoint.check_saved(tmp_path, params)
    for other in ({**params, "a": jnp.array([jnp.nan, 0.0])}, {**params, "key": jax.random.key(4)}):
        with pytest.raises(ValueError, match="differs"):
            checkpoint.check_saved(tmp_path, other)


# --- Locks ----------------------------------------------------------------------------------------------


def test_a_folder_in_use_by_another_process_is_an_error(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with folders.locked(run):
        assert main(["train", "--resume", "--steps", "4", "--out", str(run)]) == 2
    message = capsys.readouterr().err
    assert f"--out: process {os.getpid()} on " in message
    assert f"is training in {run} now; wait" in message
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_lock_of_a_killed_process_is_released(tmp_path):
    program = (
        "import os, sys, pathlib, jaxmeta.cli.folders as folders\n"
        "with folders.locked(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    with (
        pytest.raises(ValueError, match=f"out: process {process.pid} on .* is training in"),
        folders.locked(tmp_path),
    ):
        pass
    process.kill()
    process.communicate()
    with folders.locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())


def test_locks_are_skipped_on_file_systems_without_them(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with folders.locked(tmp_path), folders.locked(tmp_path):
        pass
    with folders.locked(tmp_path / "absent"):
        pass


# --- Figures by name ------------------------------------------------------------------------------------


def test_a_figure_gets_the_first_free_number(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.png").write_text("mine")
    (tmp_path / "mine-1.png").symlink_to("nowhere.png")
    assert main(["plot", str(run), "--out", "mine.png"]) == 0
    assert capsys.readouterr().out == "mine-2.png\n"
    assert (tmp_path / "mine.png").read_text() == "mine"
    assert not (tmp_path / "nowhere.png").exists()
    assert compare._new_file(tmp_path / "other.png") == tmp_path / "other.png"


def test_descriptors_of_closed_standard_streams_are_reserved(tmp_path):
    program = (
        "import os, sys\n"
        "from jaxmeta.cli import output\n"
        "output.reserve_descriptors()\n"
        "print(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), file=sys.stderr)\n"
    )
    command = shlex.join([sys.executable, "-c", program, str(tmp_path / "file")])
    ended = subprocess.run(f"{command} >&- <&-", shell=True, capture_output=True, text=True)
    assert int(ended.stderr) > 2


def test_exit_statuses_are_the_documented_ones():
    assert (cli.EXIT_OTHER, cli.EXIT_USER, cli.EXIT_STOPPED) == (1, 2, 75)
