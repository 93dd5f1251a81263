"""`jaxmeta predict`, and training on a folder of images before it."""

import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bars import SIDE, draw_bar, small_mlp
from PIL import Image
from support import read_json

import jaxmeta as jm
from jaxmeta.cli import classifier, main, predict, sources
from jaxmeta.cli import run as run_module
from jaxmeta.cli.config import Chosen, base_of, resolve
from jaxmeta.cli.data import ImageSpec, image_spec
from jaxmeta.cli.names import NETWORKS
from jaxmeta.tasks.archives import shrink
from jaxmeta.tasks.images import decode

WAYS = 3


def command(trained):
    return [
        *("train", "--tasks", f"folder:{trained / 'images'}", "--ways", str(WAYS), "--queries", "2"),
        *("--classes", "0.5,0,0.5", "--steps", "60", "--episodes", "20", "--devices", "1"),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder with images of eight classes, and a run trained on four of them."""
    trained = tmp_path_factory.mktemp("prediction")
    for number in range(8):
        for seed in range(5):
            draw_bar(trained / "images" / f"bar{number}" / f"{seed}.png", number, 10 * number + seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXMETA_CACHE", str(trained / "cache"))
        patch.setitem(NETWORKS, "conv4-32", small_mlp)
        patch.setattr(run_module, "plot_curve", lambda *_: None)
        assert main([*command(trained), "--out", str(trained / "run")]) == 0
        yield trained


def ask(trained, folder, *more):
    target = trained / "answers.json"
    flags = ["--support", str(folder / "support"), "--query", str(folder / "query"), "--json", str(target)]
    assert main(["predict", str(trained / "run"), *flags, *more]) == 0
    return read_json(target)


@pytest.fixture
def question(trained, tmp_path):
    """Return a folder with a support set of three classes with 1, 2 and 3 examples, and six queries."""
    for slot, number in enumerate((1, 4, 6)):
        for seed in range(slot + 1):
            draw_bar(tmp_path / "support" / f"kind {number}" / f"{seed}.png", number, 100 + seed)
        for seed in range(2):
            draw_bar(tmp_path / "query" / f"{number}-{seed}.png", number, 200 + 10 * number + seed)
    return tmp_path


def test_csv_has_the_predictions_of_json(trained, question, tmp_path):
    answers = ask(trained, question, "--csv", str(tmp_path / "answers.csv"))
    rows = list(csv.DictReader((tmp_path / "answers.csv").open(newline="")))
    assert [(row.pop("file"), row.pop("class")) for row in rows] == [(a["file"], a["class"]) for a in answers]
    table = [{name: float(value) for name, value in row.items()} for row in rows]
    assert table == [answer["probabilities"] for answer in answers]


def test_predictions_that_cannot_be_written_are_printed(trained, question, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict, "write_json", full)
    flags = ["--support", str(question / "support"), "--query", str(question / "query")]
    files = ["--json", str(tmp_path / "answers.json"), "--csv", str(tmp_path / "answers.csv")]
    assert main(["predict", str(trained / "run"), *flags, *files]) == 1
    printed = capsys.readouterr()
    assert "answers.json could not be written (No space left on device)" in printed.err
    assert printed.out.count("  kind ") == 6
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 7


@pytest.mark.nightly
def test_a_stream_of_the_folder_gives_the_same_report(trained):
    assert main([*command(trained), "--stream", "--out", str(trained / "streamed")]) == 0
    kept, streamed = (read_json(trained / name / "report.json") for name in ("run", "streamed"))
    assert kept["card"] == streamed["card"]
    assert kept["card"]["classes"] == 4
    losses = [
        [row["loss"] for row in map(json.loads, (trained / name / "metrics.jsonl").read_text().splitlines())]
        for name in ("run", "streamed")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.nightly
def test_the_configuration_has_the_size_and_channels_of_images(trained):
    config = read_json(trained / "run" / "config.json")
    assert config["images"].items() >= {"size": SIDE, "channels": 1, "ink": False}.items()
    assert (config["tasks"]["size"], config["tasks"]["channels"]) == (SIDE, 1)
    assert read_json(trained / "run" / "report.json")["card"]["classes"] == 4


@pytest.mark.parametrize("split", ["by name", pytest.param("by fractions", marks=pytest.mark.nightly)])
def test_evaluation_and_resumption_check_that_the_data_are_the_same(trained, tmp_path, capsys, split):
    """Training streams the folder, with classes split by a file or at random."""
    shutil.copytree(trained / "images", tmp_path / "images")
    file, run = tmp_path / "split.json", tmp_path / "run"
    names = {"train": [f"bar{i}" for i in range(4)], "test": [f"bar{i}" for i in range(4, 8)]}
    file.write_text(json.dumps(names))
    classes = str(file) if split == "by name" else "0.5,0,0.5"
    command = ["train", "prototypical", "--tasks", f"folder:{tmp_path / 'images'}", "--ways", "2"]
    command += ["--queries", "1", "--steps", "2", "--episodes", "4", "--stream", "--devices", "1"]
    assert main([*command, "--classes", classes, "--out", str(run)]) == 0
    if split == "by name":
        assert (
            read_json(run / "report.json")["card"]["split_hash"]
            == jm.tasks.ClassSplit(tuple(names["train"]), test=tuple(names["test"])).hash
        )
    for number in (0, 7):  # a smaller image and one in colour: neither changes what the run was trained on
        Image.new("RGB", (4, 4), "red").save(tmp_path / "images" / f"bar{number}" / "new.png")
    assert main(["evaluate", str(run)]) == 0
    if split == "by fractions":
        assert main(["train", "--resume", "--out", str(run)]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}

    file.write_text(json.dumps({"train": names["test"], "test": names["train"]}))
    shutil.copytree(tmp_path / "images" / "bar0", tmp_path / "images" / "another")
    for again in (["evaluate", str(run)], ["train", "--resume", "--out", str(run)]):
        capsys.readouterr()
        assert main(again) == 2
        assert "have changed since the run in" in capsys.readouterr().err
    changed = {path for path, content in before.items() if path.read_bytes() != content}
    assert changed == {file}


def test_omniglot_files_are_read_as_in_training(tmp_path):
    """Ink is 0 in the files and 1 in training; resized greys agree to one level."""
    ink = np.random.default_rng(0).random((2, 105, 105)) < 0.2
    stored = shrink(ink, 28)
    for number, drawing in enumerate(ink):
        Image.fromarray(~drawing).save(tmp_path / f"{number}.png")
        read = decode(tmp_path / f"{number}.png", "", channels=1, size=28)[..., 0]
        assert np.abs(255 - read.astype(int) - stored[number]).max() <= 1
    glyphs = image_spec(jm.tasks.glyphs(), sources.source_of("glyphs").ink)
    assert (glyphs.size, glyphs.channels, glyphs.ink) == (28, 1, True)
    assert 0 < glyphs.mean < 0.3


def test_new_classes_are_learned_from_unequal_shots(trained, question, capsys):
    answers = ask(trained, question)
    assert [answer["file"] for answer in answers] == [f"{n}-{i}.png" for n in (1, 4, 6) for i in (0, 1)]
    for answer in answers:
        shares = answer["probabilities"]
        assert set(shares) == {"kind 1", "kind 4", "kind 6"}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert answer["class"] == max(shares, key=shares.get)
    right = sum(answer["class"] == f"kind {answer['file'][0]}" for answer in answers)
    assert right >= 5
    assert "4-1.png" in capsys.readouterr().out


def test_a_prediction_does_not_depend_on_other_queries(trained, question):
    together = {answer["file"]: answer for answer in ask(trained, question)}
    for file in sorted((question / "query").iterdir())[1:]:
        file.unlink()
    (alone,) = ask(trained, question)
    expected = together[alone["file"]]
    assert alone["class"] == expected["class"]
    assert alone["probabilities"] == pytest.approx(expected["probabilities"], rel=1e-5)


# Users run optimised code. The tests' unoptimised code rounds one query and many differently.
OPTIMISED = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from bars import small_mlp
from test_prediction import NETWORKS, main
NETWORKS["conv4-32"] = small_mlp
for question in sys.argv[3:]:
    flags = ["--support", question + "/support", "--query", question + "/query"]
    assert main(["predict", sys.argv[2], *flags, "--json", question + "/answers.json"]) == 0
one = sorted(pathlib.Path(sys.argv[3], "query").iterdir())[3]
flags = ["--support", sys.argv[3] + "/support", "--query", str(one)]
assert main(["predict", sys.argv[2], *flags, "--json", sys.argv[3] + "/one.json"]) == 0
"""


@pytest.mark.nightly
def test_predictions_of_optimised_code_do_not_depend_on_other_queries(trained, question):
    folders, queries = [question], sorted((question / "query").iterdir())
    for file in queries[::3]:
        alone = question / f"alone-{file.name}"
        alone.mkdir()
        shutil.copytree(question / "support", alone / "support")
        (alone / "query").mkdir()
        shutil.copy(file, alone / "query")
        folders.append(alone)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    here, run = pathlib.Path(__file__).parent, trained / "run"
    subprocess.run([sys.executable, "-c", OPTIMISED, here, run, *folders], env=environment, check=True)
    together = {answer["file"]: answer for answer in read_json(question / "answers.json")}
    for alone in folders[1:]:
        # Every digit is the same.
        assert read_json(alone / "answers.json") == [together[alone.name.removeprefix("alone-")]]
    assert read_json(question / "one.json") == [together[queries[3].name]]


def test_a_support_set_may_have_fewer_classes_but_not_more(trained, question, capsys):
    shutil.rmtree(question / "support" / "kind 1")
    answers = ask(trained, question)
    assert set(answers[0]["probabilities"]) == {"kind 4", "kind 6"}
    assert [a["class"] for a in answers if a["file"][0] != "1"] == ["kind 4"] * 2 + ["kind 6"] * 2
    for number in (2, 3):
        draw_bar(question / "support" / f"kind {number}" / "0.png", number, 0)
    capsys.readouterr()
    flags = ["--support", str(question / "support"), "--query", str(question / "query")]
    assert main(["predict", str(trained / "run"), *flags]) == 2
    assert "got 4 classes; maml was trained with 3 ways" in capsys.readouterr().err


def test_queries_in_folders_named_as_classes_are_counted(trained, question, capsys):
    for file in list((question / "query").iterdir()):
        folder = question / "query" / f"kind {file.name[0]}"
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)
    answers = ask(trained, question)
    right = sum(answer["file"].startswith(answer["class"] + "/") for answer in answers)
    assert f"{right} of 6 predictions are the class of the image's folder" in capsys.readouterr().out


@pytest.mark.nightly
def test_load_run_adapt_and_predict_give_the_same(trained, question):
    """The adapted state is saved and loaded in between."""
    learner, params = jm.load_run(trained / "run")
    files = sorted((question / "support").rglob("*.png"))
    x = np.stack([np.asarray(Image.open(file), np.float32)[..., None] / 255 for file in files])
    support = jm.Batch(jnp.asarray(x), jnp.asarray([0, 1, 1, 2, 2, 2]), ways=WAYS)
    jm.save(question / "adapted", learner.adapt(params, support, jax.random.key(0)))

    adapted = jm.load(question / "adapted")
    expected = ask(trained, question)[0]
    x = np.asarray(Image.open(question / "query" / expected["file"]), np.float32)[None, ..., None] / 255
    shares = jax.nn.softmax(learner.predict(params, adapted, jnp.asarray(x))[0])
    np.testing.assert_allclose(shares, list(expected["probabilities"].values()), rtol=1e-4, atol=1e-6)


def ink_run(trained, folder):
    """Copy the run with a configuration of light strokes on dark."""
    shutil.copytree(trained / "run", folder / "run")
    config = read_json(folder / "run" / "config.json")
    config["images"] |= {"ink": True, "mean": 1 - config["images"]["mean"]}
    (folder / "run" / "config.json").write_text(json.dumps(config))
    return folder


def test_strokes_are_inverted_to_match_the_training_images(trained, question, capsys):
    folder = ink_run(trained, question)
    dark_on_light = ask(folder, question)
    assert "all images are inverted" in capsys.readouterr().out
    for file in question.rglob("*.png"):
        if file.parent != folder / "run":
            Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    light_on_dark = ask(folder, question)
    assert "inverted" not in capsys.readouterr().out
    assert light_on_dark == dark_on_light
    assert ask(folder, question, "--invert") != dark_on_light
    assert "--support: dark and light seem exchanged" in capsys.readouterr().err

    odd = question / "query" / "4-0.png"
    Image.fromarray(255 - np.asarray(Image.open(odd))).save(odd)
    ask(folder, question)
    message = capsys.readouterr().err
    assert "--query: dark and light seem exchanged" in message
    assert "4-0.png; --invert" in message
    assert "4-1.png" not in message


def test_images_that_seem_inverted_give_a_warning(trained, question, capsys):
    for file in (question / "support").rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    ask(trained, question)
    message = capsys.readouterr().err
    assert "--support: dark and light seem exchanged" in message
    assert "--invert exchanges them" in message
    assert "--query" not in message


def test_colour_images_are_converted_to_grey_with_a_warning(trained, question, capsys):
    grey = ask(trained, question)
    capsys.readouterr()
    for file in question.rglob("*.png"):
        Image.open(file).convert("RGB").save(file)
    assert ask(trained, question) == grey
    assert "to grey" not in capsys.readouterr().err  # an RGB file of greys is not colour
    Image.new("RGB", (SIDE, SIDE), (255, 0, 0)).save(question / "query" / "4-0.png")
    ask(trained, question)
    assert "--query: converted 4-0.png to grey" in capsys.readouterr().err


def test_unreadable_images_are_errors_unless_skipped(trained, question, capsys):
    (question / "query" / "4-0.png").write_bytes(b"no image")
    flags = ["--support", str(question / "support"), "--query", str(question / "query")]
    assert main(["predict", str(trained / "run"), *flags]) == 2
    assert "4-0.png: cannot be read as an image" in capsys.readouterr().err
    assert len(ask(trained, question, "--skip-unreadable")) == 5
    assert "left out" in capsys.readouterr().err
    (question / "support" / "kind 1" / "0.png").write_bytes(b"")
    assert main(["predict", str(trained / "run"), *flags, "--skip-unreadable"]) == 2
    assert "no image of the class 'kind 1' can be read" in capsys.readouterr().err


def test_class_names_that_differ_in_case_give_a_warning(trained, question, capsys):
    (question / "support" / "kind 4").rename(question / "support" / "KIND 1")
    if not (question / "support" / "kind 1").is_dir() or len(list((question / "support").iterdir())) < 3:
        pytest.skip("the file system ignores case")
    assert "KIND 1" in ask(trained, question)[0]["probabilities"]
    assert "'KIND 1' and 'kind 1' differ only in case; they are two" in capsys.readouterr().err


def test_a_diverging_adaptation_is_an_error(trained, question, monkeypatch, capsys):
    build = classifier.build.learner_of

    def diverging(config, norm):
        return build(config.replaced(learner={"inner_lr": 1e38, "eval_steps": 5}), norm)

    monkeypatch.setattr(classifier.build, "learner_of", diverging)
    flags = ["--support", str(question / "support"), "--query", str(question / "query")]
    assert main(["predict", str(trained / "run"), *flags]) == 1
    assert "diverged: the scores are not finite" in capsys.readouterr().err


def test_scores_that_are_not_finite_without_adaptation_are_not_blamed_on_it():
    def scores(values, x):
        return np.nan * x[:, 0, 0]

    spec = ImageSpec(size=4, channels=1, mean=0.5, ink=False)
    fixed = classifier.Classifier(("a", "b"), spec, False, "weights", scores, {})
    with pytest.raises(FloatingPointError, match=r"^weights: the scores are not finite$"):
        fixed.label(np.zeros((1, 4, 4, 1), np.float32))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--support": "nowhere"}, "--support: "),
        ({"--query": "nowhere"}, "--query: "),
        ({"--support": "query"}, "one subfolder per class, into which to sort its 6 images"),
        ({"--query": "empty"}, "contains no images"),
        ({"--support": "one"}, "got 1 class; there must be at least 2"),
        ({"--json": "nowhere/answers.json"}, "--json: the folder"),
        ({"--json": "empty"}, "is a folder; name a file"),
    ],
)
def test_usage_errors_are_one_line_with_status_2(trained, question, changes, expected, capsys):
    (question / "empty").mkdir()
    draw_bar(question / "one" / "only" / "0.png", 1, 1)
    flags = {"--support": "support", "--query": "query"} | changes
    argv = [part for flag, path in flags.items() for part in (flag, str(question / path))]
    assert main(["predict", str(trained / "run"), *argv]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert expected in message


def test_a_run_on_data_other_than_images_is_an_error(trained, question, tmp_path, capsys):
    config = resolve(base_of(Chosen(tasks="sinusoid")), {})
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    flags = ["--support", str(question / "support"), "--query", str(question / "query")]
    assert main(["predict", str(tmp_path), *flags]) == 2
    assert "was trained on sinusoid, which are not images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--classes", "0.5,0.5"], "0.5,0.5; it must be three fractions such as 0.64,0.16,0.2"),
        (["--classes", "nan,0.5,0.5"], "--classes: got nan"),
        (["--workers", "2"], "--workers: only a stream is read by processes; add --stream"),
        (["--split-seed", "-1"], "--split-seed: got -1"),
        (["--label", "kind"], "--label"),
        (["--tasks", "folder:"], "give your PATH after the colon"),
        (["--classes", "nowhere.json"], "nowhere.json; it must be three fractions"),
        (["--ways", "6"], "ways=6 is more than the classes of split='train': 5"),
        (["--shots", "3"], "classes have fewer"),
        (["--size", "0"], "--size: got 0"),
        (["--protocol", "lake"], "--protocol"),
        (["--data", "."], "--data"),
        (["--network", "resnet1"], "known are resnet"),
    ],
)
def test_invalid_settings_of_a_folder_are_errors(trained, flags, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["train", "--tasks", f"folder:{trained / 'images'}", "--ways", "2", *flags]
    assert main(command) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_invalid_class_split_files_are_errors(trained, tmp_path, capsys):
    file = tmp_path / "split.json"
    command = ["train", "--tasks", f"folder:{trained / 'images'}", "--ways", "3", "--steps", "1"]
    command += ["--classes", str(file), "--out", str(tmp_path / "run")]
    for content, flags, expected in (
        ({"train": ["bar0", "bar1", "bar2"], "test": ["bar0"]}, [], "overlaps"),
        ({"train": "bar", "test": ["bar0"]}, [], "is not a class split in JSON"),
        (
            {"train": ["bar0", "bar1", "bar2"], "test": ["bar5", "bar6", "bar7"]},
            ["--split-seed", "3"],
            "--split-seed: a class split by names needs none",
        ),
    ):
        file.write_text(json.dumps(content))
        assert main([*command, *flags]) == 2
        assert expected in capsys.readouterr().err
