"""Tests of pages and package docstrings: Python examples, commands with their flags, and names in the text.

Examples in docstrings (`>>>`) run as doctests.
"""

import ast
import doctest
import functools
import importlib
import operator
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from PIL import Image

import jaxmeta as jm
from jaxmeta.cli import classifier, compare, evaluate, folders, main, predict, run, transfer
from jaxmeta.cli import commands as commands_module
from jaxmeta.cli.config import Chosen, base_of, resolve

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md"))
}
DOCSTRINGS = {
    name: importlib.import_module(name).__doc__
    for name in ("jaxmeta", *(f"jaxmeta.{path.parent.name}" for path in ROOT.glob("jaxmeta/*/__init__.py")))
}
TEXTS = PAGES | DOCSTRINGS


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def shell_commands(text):
    """Return the shell commands in the code blocks and in the prose of a text."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks("sh", text) for line in block.splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [part.strip() for line in lines + spans for part in line.split("&&") if "…" not in line]


CHECKS = """
assert outputs.shape == (100, 1)
assert result.mean < 1.5, result  # half of 3.00567, the best without looking at the support set
unseen = jm.tasks.glyphs("test", ways=5, shots=1, queries=3)
accuracy = jm.evaluate(mine, state.params, unseen, episodes=100, key=jax.random.key(1))
assert accuracy.mean > 0.3, accuracy  # the user-defined learner; chance is 0.2
waves = jm.train(learner, train_tasks, optax.adam(1e-3), steps=2, meta_batch=2, key=jax.random.key(0))
assert int(waves.step) == 2  # the learner with an Equinox network
"""


@pytest.mark.nightly
def test_the_python_examples_run(tmp_path):
    # A separate process without the settings of these tests, as a reader would run the examples.
    script = tmp_path / "readme.py"
    script.write_text("\n".join([*blocks("python"), CHECKS]), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "test MSE" in done.stdout
    assert sorted(tmp_path.iterdir()) == [script]


def test_the_python_example_of_a_learner_runs():
    (block,) = (block for block in blocks("python") if "jm.Learner(init, adapt, predict, loss)" in block)
    # Small arrays replace the characters, which take longer to compile; the nightly test draws characters.
    classes = np.random.default_rng(0).normal(size=(20, 4))
    y = np.arange(80) // 4
    x = (classes[y] + 0.3 * np.random.default_rng(1).normal(size=(80, 4))).astype(np.float32)
    shape = {"ways": 5, "shots": 1, "queries": 3, "classes": (0.5, 0.0, 0.5)}
    from_arrays = functools.partial(jm.tasks.from_arrays, x, y, **shape)
    names = {"jm": jm, "jax": jax, "optax": optax, "from_arrays": from_arrays}
    drawn = "jm.tasks.glyphs(ways=5, shots=1, queries=3)"
    assert drawn in block
    exec(block.replace(drawn, "from_arrays()").replace("steps=100", "steps=10"), names)
    accuracy = jm.evaluate(
        names["mine"],
        names["state"].params,
        from_arrays(split="test"),
        episodes=100,
        key=jax.random.key(1),
    )
    assert accuracy.mean > 0.8


def test_readme_has_at_most_200_lines():
    assert README.count("\n") <= 200


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_names_of_the_library_in_python_examples_exist(number):
    for node in ast.walk(ast.parse(blocks("python")[number])):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"jm(\.\w+)+", ast.unparse(node)):
            operator.attrgetter(ast.unparse(node).removeprefix("jm."))(jm)


# Functions that the commands call, by module.
CALLED = {
    run: ("new_run", "resume_run", "evaluate_run"),
    compare: ("compare", "plot"),
    classifier: ("export",),
    evaluate: ("evaluate_weights",),
    predict: ("predict",),
    transfer: ("transfer", "rank"),
}


def recorder(function, called):
    """Return a function that records its calls and has the given signature, from which the flags derive."""

    @functools.wraps(function)
    def recording(*_, **__):
        called.append(function.__name__)

    return recording


# Values for NAME in a command.
NAME = {"train": "maml", "learners": "maml", "presets": "glyphs", "tasks": "glyphs", "networks": "conv4"}
# User-defined modules that the texts mention.
USER_MODULES = {
    "cavia": "from jaxmeta import cavia",
    "my_module": "from jaxmeta import maml as my_learner, prototypical as nearest_mean\n"
    "from jaxmeta.nn import Conv4 as Net\n"
    "from jaxmeta.tasks import glyphs as my_tasks",
}


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_the_command_line_accepts_the_commands(tmp_path, monkeypatch, capsys, name):
    for user_module, content in USER_MODULES.items():
        (tmp_path / f"{user_module}.py").write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    commands = [line.split()[1:] for line in shell_commands(TEXTS[name]) if line.startswith("jaxmeta ")]
    if name == "README.md":
        assert ["train"] in commands
        assert len(commands) > 3
    called = []
    for module, functions in CALLED.items():
        for name_of_function in functions:
            function = getattr(module, name_of_function)
            monkeypatch.setattr(module, name_of_function, recorder(function, called))
    # The data and run folders in the text do not exist here.
    monkeypatch.setattr(folders, "data_folder", lambda data: data)
    monkeypatch.setattr(
        commands_module, "load_config", lambda folder, trusted=(): resolve(base_of(Chosen()), {})
    )
    for command in commands:
        before = [command[0], *command]
        command = [
            NAME.get(previous.removeprefix("--"), NAME.get(command[0])) if word == "NAME" else word
            for previous, word in zip(before, command, strict=False)
        ]
        assert main(command) == 0, (command, capsys.readouterr().err)
    if name == "README.md":
        assert "new_run" in called
    for user_module in USER_MODULES:
        sys.modules.pop(user_module, None)


def matches_in_texts(pattern):
    """Return the distinct matches of a pattern in all texts."""
    return sorted({match for text in TEXTS.values() for match in re.findall(pattern, text)})


@pytest.mark.parametrize("name", matches_in_texts(r"`jm\.([\w.]+)"))
def test_names_of_the_library_in_the_text_exist(name):
    operator.attrgetter(name.rstrip("."))(jm)


@pytest.mark.parametrize(
    "path", matches_in_texts(r"(?:`|python )((?:jaxmeta|notebooks|benchmarks|tests|\.ci)/[\w./-]+)")
)
def test_files_that_the_text_names_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "command",
    sorted(
        {line for text in TEXTS.values() for line in shell_commands(text) if "python benchmarks/" in line}
    ),
)
def test_benchmarks_have_the_flags_in_the_text(command):
    program, *words = command[command.index("benchmarks/") :].split()
    flags = {word for word in words if word.startswith("--")}
    source = (ROOT / program).read_text(encoding="utf-8")
    assert flags - {"--help"} <= {*re.findall(r'"(--[\w-]+)"', source)}


@pytest.mark.nightly
def test_functions_in_docstrings_run_on_a_folder_of_photos(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMETA_CACHE", str(tmp_path / "cache"))
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    for name in range(27):
        (photos / str(name)).mkdir(parents=True)
        for number in range(16):
            photo = Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8))
            photo.save(photos / str(name) / f"{number}.png")
    names = {"jm": jm}
    for example in doctest.DocTestParser().get_examples(DOCSTRINGS["jaxmeta.tasks"]):
        if example.source.startswith("def train_from_disk"):
            exec(example.source, names)
    (block,) = blocks("python", DOCSTRINGS["jaxmeta.cli"])
    exec(block, names)
    learner = jm.maml(jm.nn.MLP(out=5), norm="support")
    state = names["train_from_disk"](learner, photos, optax.adam(1e-3), jax.random.key(0))
    assert int(state.step) == 100
    run = str(tmp_path / "run")
    command = ["train", "--tasks", f"folder:{photos}", "--ways", "5", "--shots", "1"]
    assert main([*command, "--network", "mlp", "--steps", "1", "--episodes", "2", "--out", run]) == 0
    task = jm.tasks.from_folder(photos, queries=5).sample(jax.random.key(0))
    support = {name: task.support.x[i : i + 1] for i, name in enumerate("abcde")}
    together, alone = (names["names_of"](run, support, images) for images in (task.query.x, task.query.x[:1]))
    assert len(together) == 25
    assert {*together} <= {*"abcde"}
    assert together[:1] == alone
