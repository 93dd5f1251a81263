"""Complete training runs of presets against published numbers: minutes each, with `pytest -m slow`."""

import pytest
from support import read_json

from jaxmeta.cli import main
from jaxmeta.tasks.archives import read_archive
from jaxmeta.tasks.omniglot import EDITION

pytestmark = pytest.mark.slow


def report_of(folder, *arguments):
    assert main(["train", *arguments, "--out", str(folder)]) == 0
    return read_json(folder / "report.json")


# For each preset: the row of its report; mean and half-width of the 95 % interval, in per cent, of the run in
# benchmarks/README.md; and the published number, in per cent, with its reference. The runs have one seed and
# a smaller budget than the published ones.
OMNIGLOT = {
    "omniglot": ("transductive", 97.96, 0.44, "98.7, Finn et al. 2017"),
    "omniglot-meta-sgd": ("transductive", 98.60, 0.35, "99.53, Li et al. 2017"),
    "omniglot-maml-plus-plus": ("transductive", 98.62, 0.34, "99.47, Antoniou et al. 2019"),
    "omniglot-anil": ("transductive", 97.24, 0.49, "none for this task"),
    "omniglot-imaml": ("transductive", 97.54, 0.43, "99.16, Rajeswaran et al. 2019"),
    "omniglot-reptile": ("transductive", 97.24, 0.50, "97.68, Nichol et al. 2018"),
    "omniglot-lstm-meta-learner": ("transductive", 92.68, 0.77, "none for this task"),
    "omniglot-prototypical": ("inductive", 98.40, 0.35, "98.8, Snell et al. 2017"),
    "omniglot-matching": ("inductive", 97.82, 0.41, "98.1, Vinyals et al. 2016"),
    "omniglot-siamese": (
        "inductive",
        96.52,
        0.54,
        "96.7, Koch et al. 2015, reported by Vinyals et al. 2016",
    ),
    "omniglot-relation": ("transductive", 97.88, 0.40, "99.6, Sung et al. 2018"),
    "omniglot-within-alphabet": ("inductive", 86.5, 0.7, "none for this protocol"),
}


@pytest.mark.parametrize("preset", OMNIGLOT)
def test_omniglot_preset_reaches_its_recorded_accuracy(tmp_path, data_folder, preset):
    row, recorded, interval, _ = OMNIGLOT[preset]
    report = report_of(tmp_path / "run", "--preset", preset, "--data", str(data_folder))
    assert 100 * report["accuracy"][row]["mean"] >= recorded - 2 * interval


def test_zero_shot_glyphs_are_classified_by_their_strokes(tmp_path):
    # Chance is 0.05; a linear map to pixels reaches 0.23.
    report = report_of(tmp_path / "run", "--preset", "glyphs-zero-shot")
    assert report["accuracy"]["inductive"]["mean"] >= 0.9


def test_sinusoid_reaches_the_published_errors(tmp_path):
    mse = report_of(tmp_path / "run", "--tasks", "sinusoid")["mse_by_step"]
    # Finn et al. 2017, figure 2: 5 points, after 1, 5 and 10 steps.
    for steps, published in (("1", 0.67), ("5", 0.38), ("10", 0.35)):
        assert mse[steps]["mean"] <= published, steps


def test_default_command_reaches_its_recorded_accuracy(tmp_path):
    # Nearest neighbours on pixels reach about half.
    report = report_of(tmp_path / "run")
    # benchmarks/README.md: 91.5 ± 0.5.
    assert report["accuracy"]["transductive"]["mean"] >= 0.905


def test_predict_names_letters_of_an_unseen_alphabet(tmp_path, data_folder):
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
    answers = read_json(target)
    right = sum(answer["file"].startswith(answer["class"] + "/") for answer in answers)
    assert len(answers) == 20 * 19
    assert right / len(answers) >= 0.7
