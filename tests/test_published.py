"""Whole presets against published numbers: minutes each, so by hand, with `pytest -m slow`."""

import json

import pytest

from jaxmeta.cli import main

pytestmark = pytest.mark.slow


def report_of(folder, *arguments):
    assert main(["train", *arguments, "--out", str(folder)]) == 0
    return json.loads((folder / "report.json").read_text())


def test_maml_on_omniglot(tmp_path, data_folder):
    report = report_of(tmp_path / "run", "maml", "--tasks", "omniglot", "--data", str(data_folder))
    assert report["accuracy"]["transductive"]["mean"] >= 0.965


def test_sinusoid(tmp_path):
    mse = report_of(tmp_path / "run", "--tasks", "sinusoid")["mse_by_step"]
    # Finn et al. 2017, figure 2: 5 points, after 1, 5 and 10 steps.
    for steps, published in (("1", 0.67), ("5", 0.38), ("10", 0.35)):
        assert mse[steps]["mean"] <= published, steps


def test_glyphs_are_learned(tmp_path):
    # Nearest neighbours on pixels reach about half.
    report = report_of(tmp_path / "run")
    assert report["accuracy"]["transductive"]["mean"] >= 0.85
