"""What README.md says is run: its Python, its commands' flags, and the names it mentions."""

import ast
import functools
import operator
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import jaxmeta as jm
from jaxmeta.cli import classifier, compare, folders, main, predict, run, transfer
from jaxmeta.cli import commands as commands_of_names
from jaxmeta.cli.config import Chosen, base_of, resolve

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


CHECKS = """
import os
import pathlib
import tempfile

from PIL import Image

from jaxmeta.cli import main

assert set(networks) == {"Flax NNX", "Equinox", "functions", "Flax Linen"}
assert accuracy.mean > 0.3, accuracy  # of the last, after few steps; chance is 0.2

with tempfile.TemporaryDirectory() as place:
    place = pathlib.Path(place)
    os.environ["JAXMETA_CACHE"] = str(place / "cache")
    rng = np.random.default_rng(0)
    for name in range(27):
        (place / "photos" / str(name)).mkdir(parents=True)
        for number in range(16):
            photo = Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8))
            photo.save(place / "photos" / str(name) / f"{number}.png")
    learner = jm.maml((init, lambda params, x: apply(params, x)), norm="support")
    state = train_from_disk(learner, place / "photos", jax.random.key(0))
    assert int(state.step) == 100
    run = str(place / "run")
    command = ["train", "--tasks", f"folder:{place / 'photos'}", "--ways", "5", "--shots", "1"]
    assert main([*command, "--network", "mlp", "--steps", "1", "--episodes", "2", "--out", run]) == 0
    task = jm.tasks.from_folder(place / "photos", queries=5).sample(jax.random.key(0))
    support = {name: task.support.x[i : i + 1] for i, name in enumerate("abcde")}
    together, alone = (names_of(run, support, images) for images in (task.query.x, task.query.x[:1]))
    assert len(together) == 25 and set(together) <= set("abcde")
    assert together[:1] == alone
assert found.mean > 0.3, found  # of the method of one's own; chance is 0.2
assert some.outputs.shape == (10, 15, 5)
assert 0 < apart.cosine < 1, apart
assert value < 1, value  # of the learned optimizer; at θ = 0 it is 3.3 on average
assert outputs.shape == (100, 1)
assert result.mean < 1.5, result  # half of 3.00567, the best without looking at the support set
assert tasks.card.classes == 12, tasks.card
"""


@pytest.mark.nightly
def test_the_python_examples_run(tmp_path):
    # In a process of its own, as a reader would run them: none of the settings of these tests.
    script = tmp_path / "readme.py"
    script.write_text("\n".join([*blocks("python"), CHECKS]), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "test MSE" in done.stdout
    assert sorted(tmp_path.iterdir()) == [script]


def test_the_python_example_of_arrays_runs(capsys):
    (block,) = (block for block in blocks("python") if "jm.tasks.from_arrays" in block)
    names = {"jm": jm}
    exec(block, names)
    assert names["tasks"].card.classes == 12
    assert capsys.readouterr().out.startswith("12 ")


def test_the_python_example_of_a_method_runs():
    (block,) = (block for block in blocks("python") if "jm.Learner(init, adapt, predict, loss)" in block)
    # On small arrays: characters take longer to compile. The nightly run has them.
    classes = np.random.default_rng(0).normal(size=(20, 4))
    y = np.arange(80) // 4
    x = (classes[y] + 0.3 * np.random.default_rng(1).normal(size=(80, 4))).astype(np.float32)
    shape = {"ways": 5, "shots": 1, "queries": 3, "classes": (0.5, 0.0, 0.5)}
    names = {
        "jm": jm,
        "jax": jax,
        "optax": optax,
        "drawn": functools.partial(jm.tasks.from_arrays, x, y, **shape),
    }
    given = "jm.tasks.glyphs(split, ways=5, shots=1, queries=3)"
    assert given in block
    exec(block.replace(given, "drawn(split=split)").replace("steps=100", "steps=10"), names)
    assert names["found"].mean > 0.8
    assert names["some"].outputs.shape == (10, 15, 5)
    np.testing.assert_allclose(
        names["some"].scores,
        jm.evaluate_episodes(
            names["mine"], names["state"].params, names["hidden"], episodes=100, key=jax.random.key(1)
        )[:10],
    )


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_names_of_the_library_in_python_examples_exist(number):
    for node in ast.walk(ast.parse(blocks("python")[number])):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"jm(\.\w+)+", ast.unparse(node)):
            operator.attrgetter(ast.unparse(node).removeprefix("jm."))(jm)


# What each command of the command line calls, in its module.
CALLED = {
    run: ("new_run", "resume_run", "evaluate_run"),
    compare: ("compare", "plot"),
    classifier: ("export",),
    predict: ("predict",),
    transfer: ("transfer", "rank"),
}


def noting(function, called):
    """What notes a call of a function, with its signature, which the flags are made of."""

    @functools.wraps(function)
    def noted(*_, **__):
        called.append(function.__name__)

    return noted


# What stands for NAME in a command.
NAME = {"train": "maml", "learners": "maml", "presets": "glyphs", "tasks": "glyphs", "networks": "conv4"}
# Modules of a reader's own.
OWN = {
    "cavia": "from jaxmeta import cavia",
    "my_module": "from jaxmeta.nn import Conv4 as Net\nfrom jaxmeta.tasks import glyphs as my_tasks",
}


def test_the_command_line_takes_the_commands(tmp_path, monkeypatch, capsys):
    for name, content in OWN.items():
        (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    prose = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    shell = [
        part.strip() for block in blocks("sh") for line in block.splitlines() for part in line.split("&&")
    ]
    commands = [
        line.split()[1:] for line in shell + re.findall("`([^`]+)`", prose) if line.startswith("jaxmeta ")
    ]
    assert ["train"] in commands
    assert len(commands) > 3
    called = []
    for module, names in CALLED.items():
        for name in names:
            monkeypatch.setattr(module, name, noting(getattr(module, name), called))
    # Of folders that the text speaks of, and that are not here.
    monkeypatch.setattr(folders, "data_folder", lambda data: data)
    monkeypatch.setattr(
        commands_of_names, "load_config", lambda folder, trusted=(): resolve(base_of(Chosen()), {})
    )
    for command in commands:
        command = [NAME[command[0]] if word == "NAME" else word for word in command]
        assert main(command) == 0, (command, capsys.readouterr().err)
    assert {"new_run", "evaluate_run"} <= {*called}
    for name in OWN:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`jm\.([\w.]+)", README))))
def test_names_of_the_library_in_the_text_exist(name):
    operator.attrgetter(name)(jm)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:`|python )((?:jaxmeta|notebooks|benchmarks|\.ci)/[\w./-]+)", README)))
)
def test_files_that_the_text_names_exist(path):
    assert (ROOT / path).exists()
