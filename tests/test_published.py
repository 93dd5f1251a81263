"""Whole presets against published numbers: minutes each, so by hand, with `pytest -m slow`."""

import json

import pytest

from jaxmeta.cli import main
from jaxmeta.tasks.archives import read_archive
from jaxmeta.tasks.omniglot import EDITION

pytestmark = pytest.mark.slow


def report_of(folder, *arguments):
    assert main(["train", *arguments, "--out", str(folder)]) == 0
    return json.loads((folder / "report.json").read_text())


def test_maml_on_omniglot(tmp_path, data_folder):
    report = report_of(tmp_path / "run", "maml", "--tasks", "omniglot", "--data", str(data_folder))
    assert report["accuracy"]["transductive"]["mean"] >= 0.965


@pytest.mark.parametrize(
    ("method", "at_least"),
    [
        ("meta-sgd", 0.97),
        ("maml-plus-plus", 0.97),
        ("anil", 0.96),
        ("imaml", 0.96),
        ("reptile", 0.94),
        ("lstm-meta-learner", 0.9),
    ],
)
def test_its_relatives_on_omniglot(tmp_path, data_folder, method, at_least):
    report = report_of(tmp_path / "run", "--preset", f"omniglot-{method}", "--data", str(data_folder))
    assert report["accuracy"]["transductive"]["mean"] >= at_least


@pytest.mark.parametrize(
    ("preset", "row", "at_least"),
    [
        ("omniglot-prototypical", "inductive", 0.98),
        ("omniglot-matching", "inductive", 0.975),
        ("omniglot-siamese", "inductive", 0.96),
        ("omniglot-relation", "transductive", 0.98),
        ("omniglot-within-alphabet", "inductive", 0.88),
    ],
)
def test_methods_that_compare_on_omniglot(tmp_path, data_folder, preset, row, at_least):
    report = report_of(tmp_path / "run", "--preset", preset, "--data", str(data_folder))
    assert report["accuracy"][row]["mean"] >= at_least


def test_characters_are_known_by_their_strokes_alone(tmp_path):
    # Chance is 0.05; a linear map to pixels reaches 0.23.
    report = report_of(tmp_path / "run", "--preset", "glyphs-zero-shot")
    assert report["accuracy"]["inductive"]["mean"] >= 0.9


def test_sinusoid(tmp_path):
    mse = report_of(tmp_path / "run", "--tasks", "sinusoid")["mse_by_step"]
    # Finn et al. 2017, figure 2: 5 points, after 1, 5 and 10 steps.
    for steps, published in (("1", 0.67), ("5", 0.38), ("10", 0.35)):
        assert mse[steps]["mean"] <= published, steps


def test_glyphs_are_learned(tmp_path):
    # Nearest neighbours on pixels reach about half.
    report = report_of(tmp_path / "run")
    assert report["accuracy"]["transductive"]["mean"] >= 0.85


def test_letters_of_an_unknown_alphabet_are_named_from_one_example_each(tmp_path, data_folder):
    report_of(tmp_path / "run", "--preset", "omniglot-alphabet", "--data", str(data_folder))
    images = read_archive(
        data_folder / "omniglot" / "images_evaluation.zip", "evaluation", EDITION.characters["evaluation"]
    )
    for name, png in images.items():
        alphabet, letter, drawer = name.split("/")
        if alphabet == "Angelic":
            file = tmp_path / ("support" if drawer == "01" else "query") / letter / f"{drawer}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png)
    folders = ["--support", str(tmp_path / "support"), "--query", str(tmp_path / "query")]
    target = tmp_path / "answers.json"
    assert main(["predict", str(tmp_path / "run"), *folders, "--json", str(target)]) == 0
    answers = json.loads(target.read_text())
    right = sum(answer["file"].startswith(answer["class"] + "/") for answer in answers)
    assert len(answers) == 20 * 19
    assert right / len(answers) >= 0.7
