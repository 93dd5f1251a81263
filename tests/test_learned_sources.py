"""Runs, transfers and weights as sources of predictions, evaluations, exports and trainings."""

import json
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bars import SIDE, draw_bar
from PIL import Image
from support import read_json

import jaxmeta as jm
from jaxmeta.cli import heads, main, names
from jaxmeta.cli import run as run_of_command
from jaxmeta.cli.backbones import load_backbone
from jaxmeta.cli.config import load_config
from jaxmeta.cli.run import params_of
from jaxmeta.transfer import leaves_by_path, save_pretrained

KINDS = 5
BRIEF = ["--steps", "20", "--meta-batch", "2", "--episodes", "4", "--devices", "1", "--network", "conv4-32"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a folder with images of bars, a run, a transfer, and a weights file of another network."""
    root = tmp_path_factory.mktemp("sources")
    for number in range(8):
        for seed in range(5):
            draw_bar(root / "images" / f"bar{number}" / f"{seed}.png", number, 10 * number + seed)
    for number in range(KINDS):
        for seed in range(4):
            folder = "support" if seed < 2 else "query"
            draw_bar(root / folder / f"kind {number}" / f"{seed}.png", number, 500 + 10 * number + seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXMETA_CACHE", str(root / "cache"))
        patch.setitem(names.NETWORKS, "conv4-32", partial(jm.nn.MLP, hidden=(16,), norm=True))
        patch.setattr(run_of_command, "plot_curve", lambda *_: None)
        tasks = ["--tasks", f"folder:{root / 'images'}", "--ways", "2", "--queries", "2"]
        classes = ["--classes", "0.5,0,0.5"]
        assert main(["train", "prototypical", *tasks, *classes, *BRIEF, "--out", str(root / "run")]) == 0
        target = [
            "--target",
            f"folder:{root / 'support'}",
            "--shots",
            "1",
            "--steps",
            "60",
            "--rate",
            "0.01",
        ]
        assert main(["transfer", str(root / "run"), *target, "--out", str(root / "transfer")]) == 0
        network = jm.nn.MLP(out=None, hidden=(12,))
        variables = network.init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 1)))
        save_pretrained(root / "weights.safetensors", variables, network=network)
        yield root


def read(folder):
    """Return the images of a folder of classes, by class."""
    return {
        kind.name: np.stack([np.asarray(Image.open(file)) for file in sorted(kind.iterdir())])
        for kind in sorted(folder.iterdir())
    }


def query_images(root):
    return np.concatenate(list(read(root / "query").values()))


def predicted(root, source, *flags, status=0):
    out = root / "answers.json"
    argv = ["predict", str(source), "--query", str(root / "query"), "--json", str(out), *flags]
    assert main(argv) == status
    return read_json(out) if status == 0 else None


def nearest(features, support):
    """Return a function of squared distances to class means of normalised features, in float64."""

    def unit(z):
        return z / np.linalg.norm(z, axis=-1, keepdims=True)

    means = np.stack([unit(features(x)).mean(0) for x in support.values()])
    return lambda x: ((unit(features(x))[:, None] - means) ** 2).sum(-1)


def test_weights_classify_by_the_nearest_class_mean_of_features(root):
    answers = predicted(root, root / "weights.safetensors", "--support", str(root / "support"), "--size", "8")
    kernel, bias = (
        np.asarray(leaf, np.float64)
        for _, leaf in sorted(
            leaves_by_path(jm.transfer.load_pretrained(root / "weights.safetensors").variables).items(),
            reverse=True,
        )
    )

    def features(x):
        return np.maximum(x.reshape(len(x), -1) / 255 @ kernel + bias, 0)

    expected = nearest(features, read(root / "support"))(query_images(root))
    assert [answer["class"] for answer in answers] == [f"kind {i}" for i in expected.argmin(-1)]
    np.testing.assert_allclose([answer["distance"] for answer in answers], expected.min(-1), rtol=1e-4)
    shares = np.exp(-10 * expected) / np.exp(-10 * expected).sum(-1, keepdims=True)
    probabilities = [list(answer["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(probabilities, shares, rtol=1e-3, atol=1e-6)


def test_predictions_of_a_transfer_are_those_of_its_network(root):
    answers = predicted(root, root / "transfer")
    assert list(answers[0]["probabilities"]) == [f"kind {number}" for number in range(KINDS)]
    loaded = jm.transfer.load_pretrained(root / "transfer")
    x = jnp.asarray(query_images(root)[..., None], jnp.float32) / 255
    logits = loaded.network.apply(loaded.variables, x)
    probabilities = [list(answer["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), rtol=1e-4, atol=1e-6)
    report = read_json(root / "transfer" / "report.json")
    right = np.mean([answer["file"].startswith(answer["class"] + "/") for answer in answers])
    assert right == pytest.approx(report["accuracy"]["mean"], abs=0.25)


def test_predictions_of_a_run_are_those_of_its_learner(root):
    answers = predicted(root, root / "run", "--support", str(root / "support"))
    learner, params = jm.load_run(root / "run")
    support = read(root / "support")
    x = np.concatenate(list(support.values()))[..., None].astype(np.float32) / 255
    batch = jm.Batch(jnp.asarray(x), jnp.repeat(jnp.arange(KINDS), 2), ways=KINDS)
    adapted = learner.adapt(params, batch, jax.random.key(0))
    outputs = learner.predict(params, adapted, jnp.asarray(query_images(root)[..., None], jnp.float32) / 255)
    probabilities = [list(answer["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(probabilities, jax.nn.softmax(outputs), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose([answer["distance"] for answer in answers], -outputs.max(-1), rtol=1e-3)


@pytest.mark.parametrize("kind", ["bytes", "numbers", "with a channel", "in colour", "larger", "files"])
def test_a_classifier_accepts_files_and_arrays_of_several_types_and_shapes(root, kind):
    classifier = jm.load_classifier(root / "run", support=root / "support")
    x = query_images(root)
    images = {
        "bytes": x,
        "numbers": x / 255,
        "with a channel": x[..., None],
        "in colour": np.repeat(x[..., None], 3, -1),
        "larger": np.repeat(np.repeat(x, 2, 1), 2, 2),
        "files": sorted((root / "query").rglob("*.png")),
    }[kind]
    expected = classifier.predict(x[..., None].astype(np.float32) / 255)
    tolerance = 0.3 if kind == "larger" else 1e-4
    np.testing.assert_allclose(classifier.predict(images), expected, atol=tolerance)
    assert classifier.label(images) == [classifier.classes[i] for i in expected.argmax(-1)]


def test_support_sets_of_arrays_and_of_files_give_the_same_classifier(root):
    x = query_images(root)
    files, arrays = (
        jm.load_classifier(root / "run", support=support)
        for support in (root / "support", read(root / "support"))
    )
    assert files.classes == arrays.classes
    np.testing.assert_array_equal(files.predict(x), arrays.predict(x))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 5)), r"images: got shape \(2, 8, 8, 5\)"),
        (np.zeros((8, 8)), r"images: got shape \(8, 8\)"),
        (np.zeros((0, 8, 8)), "images: got shape"),
        (np.full((1, 8, 8), 7.0), "images: got float64 from 7.0 to 7.0; they must be uint8, or floats"),
        (np.full((1, 8, 8), np.nan), "images: got float64"),
        (np.full((1, 8, 8), 7), "images: got int64"),
    ],
)
def test_arrays_that_are_not_images_are_errors(root, images, message):
    classifier = jm.load_classifier(root / "weights.safetensors", support=root / "support", size=SIDE)
    with pytest.raises(ValueError, match=message):
        classifier.predict(images)


def test_far_images_are_classified_as_unknown(root, capsys):
    support = ["--support", str(root / "support"), "--size", "8"]
    far = np.median([row["distance"] for row in predicted(root, root / "weights.safetensors", *support)])
    flags = [*support, "--unknown-above", str(far)]
    answers = predicted(root, root / "weights.safetensors", *flags)
    assert [a["class"] == "unknown" for a in answers] == [a["distance"] > far for a in answers]
    assert "unknown" in capsys.readouterr().out


def test_a_class_called_unknown_conflicts_with_unknown_above(root, tmp_path, capsys):
    for name in ("unknown", "other"):
        draw_bar(tmp_path / name / "0.png", len(name), 3)
    flags = ["--support", str(tmp_path), "--size", "8", "--unknown-above", "1"]
    predicted(root, root / "weights.safetensors", *flags, status=2)
    assert "--unknown-above: a class is called unknown" in capsys.readouterr().err


def test_thumbnail_folders_are_ignored_in_the_recall(root, tmp_path, capsys):
    for kind in (root / "query").iterdir():
        (tmp_path / kind.name).mkdir()
        for file in kind.iterdir():
            (tmp_path / kind.name / file.name).write_bytes(file.read_bytes())
        (tmp_path / "@eaDir").mkdir(exist_ok=True)
        (tmp_path / "@eaDir" / "0.png").write_bytes(file.read_bytes())
    assert main(["predict", str(root / "transfer"), "--query", str(tmp_path)]) == 0
    assert "of 10 predictions are the class of the image's folder" in capsys.readouterr().out


def test_a_table_by_class_marks_wrong_answers(root, tmp_path, capsys):
    flags = ["--confusion", str(tmp_path / "confusion.png"), "--csv", str(tmp_path / "answers.csv")]
    answers = predicted(root, root / "transfer", *flags)
    output = capsys.readouterr().out.splitlines()
    wrong = [answer["file"] for answer in answers if not answer["file"].startswith(answer["class"] + "/")]
    assert [line.split("  ")[0] for line in output if line.endswith("← wrong")] == wrong
    for number in range(KINDS):
        of_class = [answer for answer in answers if answer["file"].startswith(f"kind {number}/")]
        right = sum(answer["class"] == f"kind {number}" for answer in of_class)
        row = next(line for line in output if line.startswith(f"kind {number} ") and line.endswith("%"))
        assert row.split()[2:] == [str(right), "2", f"{50 * right:.1f}", "%"]
    assert Image.open(tmp_path / "confusion.png").size[0] > 100
    assert (tmp_path / "answers.csv").read_text().startswith("file,class,kind 0,")


@pytest.mark.parametrize("source", ["transfer", "run"])
def test_an_export_predicts_as_its_source(root, tmp_path, source):
    flags = [] if source == "transfer" else ["--support", str(root / "support")]
    assert main(["export", str(root / source), "--out", str(tmp_path / "out"), *flags]) == 0
    config = read_json(tmp_path / "out" / "config.json")
    assert config["classes"] == [f"kind {number}" for number in range(KINDS)]
    answers, exported = predicted(root, root / source, *flags), predicted(root, tmp_path / "out")
    for answer, other in zip(answers, exported, strict=True):
        assert answer["class"] == other["class"]
        assert other["probabilities"] == pytest.approx(answer["probabilities"], rel=1e-3, abs=1e-5)
    # The program needs only JAX, and takes any number of images.
    program = jax.export.deserialize(bytearray((tmp_path / "out" / "classifier.stablehlo").read_bytes()))
    x = query_images(root)[:3, :, :, None].astype(np.float32) / 255
    np.testing.assert_allclose(
        program.call(x), [list(a["probabilities"].values()) for a in answers[:3]], rtol=1e-3, atol=1e-5
    )


def test_a_transfer_is_evaluated_on_other_tasks(root, tmp_path):
    tasks = ["--tasks", f"folder:{root / 'images'}", "--classes", "0,0,1", "--ways", "3", "--queries", "2"]
    out = tmp_path / "result.json"
    argv = [
        "evaluate",
        str(root / "transfer"),
        *tasks,
        "--episodes",
        "20",
        "--seed",
        "5",
        "--json",
        str(out),
    ]
    assert main(argv) == 0
    result = read_json(out)
    assert (result["ways"], result["shots"], result["queries"], result["episodes"]) == (3, 1, 2, 20)
    assert result["accuracy"]["inductive"]["mean"] > 0.5

    # The same by the library: class means of the backbone's normalised features.
    loaded = jm.transfer.load_pretrained(root / "transfer")
    variables = {**loaded.variables, "params": {**loaded.variables["params"]}}
    del variables["params"]["head"]
    body = loaded.network.clone(out=None)
    model = jm.Model(lambda key, x: {}, lambda variables, x: body.apply(variables, x))
    test = jm.tasks.from_folder(root / "images", "test", classes=(0.0, 0.0, 1.0), ways=3, shots=1, queries=2)
    evaluation = jm.evaluate(
        jm.simple_shot(model, transform="l2n"),
        {"model": variables},
        test,
        episodes=20,
        key=run_of_command.evaluation_key(5),
    )
    assert result["accuracy"]["inductive"]["mean"] == pytest.approx(evaluation.mean, abs=0.02)


def features_of(root, x):
    """Return the features of the weights file by NumPy, for images in [0, 1]."""
    (_, kernel), (_, bias) = sorted(
        leaves_by_path(jm.transfer.load_pretrained(root / "weights.safetensors").variables).items(),
        reverse=True,
    )
    return np.maximum(np.asarray(x).reshape(len(x), -1) @ np.asarray(kernel) + np.asarray(bias), 0)


def test_features_are_those_of_the_source_for_images_of_any_size_and_channels(root):
    model = jm.features(root / "weights.safetensors", size=SIDE)
    x = query_images(root)[..., None].astype(np.float32) / 255
    params = model.init(jax.random.key(0), jnp.asarray(x))
    np.testing.assert_allclose(model.apply(params, jnp.asarray(x)), features_of(root, x), atol=1e-4)
    larger = np.repeat(np.repeat(np.repeat(x, 2, 1), 2, 2), 3, 3)
    np.testing.assert_allclose(
        model.apply(params, jnp.asarray(larger)),
        features_of(root, x),
        atol=0.3 * features_of(root, x).max(),
    )
    with pytest.raises(jm.ArgumentError, match="x: got uint8; images must be floats"):
        model.apply(params, jnp.zeros((1, SIDE, SIDE, 1), jnp.uint8))
    with pytest.raises(jm.ArgumentError, match=r"size: .* does not say the size of its images"):
        jm.features(root / "weights.safetensors")


def test_batch_statistics_that_a_source_lacks_are_those_of_the_learner(root, tmp_path):
    network = jm.nn.MLP(out=None, hidden=(6,), norm=True)
    x = jnp.asarray(query_images(root)[..., None], jnp.float32) / 255
    variables = {"params": network.init(jax.random.key(0), x)["params"]}
    save_pretrained(tmp_path / "weights.safetensors", variables, network=network)
    model = jm.features(tmp_path / "weights.safetensors", size=SIDE)
    task = jm.Task(*(jm.Batch(x, jnp.arange(2 * KINDS) // 2, ways=KINDS),) * 2)
    predictions = []
    for each in (model, network):
        learner = jm.prototypical(each, norm="support")
        adapted = learner.adapt({"model": variables["params"]}, task.support, jax.random.key(1))
        predictions.append(learner.predict({"model": variables["params"]}, adapted, x))
    np.testing.assert_allclose(*predictions, atol=1e-5)
    # A run keeps the statistics of its training tasks, which then are fixed.
    assert jm.features(root / "run").apply_norm is None


WEIGHTS_TASKS = ["--classes", "0,0,1", "--ways", "3", "--queries", "2", "--episodes", "20", "--devices", "1"]


def test_heads_are_compared_on_the_same_episodes(root, tmp_path, capsys):
    tasks = ["--tasks", f"folder:{root / 'images'}", *WEIGHTS_TASKS]
    named = ["--learner", "simple_shot", "ridge", "--learner=prototypical"]
    out = tmp_path / "result.json"
    source = str(root / "weights.safetensors")
    assert main(["evaluate", source, *tasks, *named, "--json", str(out)]) == 0
    result, output = read_json(out), capsys.readouterr().out
    assert list(result["heads"]) == ["simple_shot", "ridge", "prototypical"]
    assert result["learner"] == "simple_shot"
    of_default = {name: result["heads"]["simple_shot"][name] for name in ("mean", "ci95")}
    assert result["accuracy"]["inductive"] == {**of_default, "norm": "none"}
    best = max(result["heads"], key=lambda name: result["heads"][name]["mean"])
    assert [line.split()[0] for line in output.splitlines() if line.endswith("← best")] == [best]

    # The same by NumPy: the nearest class mean of the features as they are.
    test = jm.tasks.from_folder(root / "images", "test", classes=(0.0, 0.0, 1.0), ways=3, shots=1, queries=2)
    right = []
    keys = jm.episode_keys(run_of_command.evaluation_key(0), jnp.arange(20))[:, 0]
    for support, query in map(jax.jit(test.sample), keys):
        z, means = features_of(root, query.x), features_of(root, support.x)
        right.append((((z[:, None] - means) ** 2).sum(-1).argmin(-1) == query.y).mean())
    assert result["heads"]["prototypical"]["mean"] == pytest.approx(np.mean(right), abs=0.01)

    # The second time all features are in the cache; results by class are those of the only head.
    again = ["--learner", "ridge", "--per-class", "--json", str(out)]
    assert main(["evaluate", source, *tasks, *again]) == 0
    output, second = capsys.readouterr().out, read_json(out)
    images, cached = re.search(r": ([\d,]+) images in .* s, ([\d,]+) of them from the cache", output).groups()
    assert images == cached
    assert second["heads"]["ridge"]["mean"] == pytest.approx(result["heads"]["ridge"]["mean"], abs=1e-6)
    assert list(second["per_class"]) == ["inductive"]
    assert main(["evaluate", source, *tasks, *named, "--per-class"]) == 2
    assert "--per-class: is for one head, and --learner names simple_shot, ridge" in capsys.readouterr().err


def test_a_head_by_name_classifies_images_from_the_cache(root, capsys):
    flags = ["--support", str(root / "support"), "--size", "8", "--learner", "ridge"]
    answers = predicted(root, root / "weights.safetensors", *flags)
    assert "distance" not in answers[0]
    # Ridge regression by NumPy, with penalty 1 and scale 10.
    support = read(root / "support")
    z = np.concatenate([features_of(root, x / 255) for x in support.values()])
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    labels = np.eye(KINDS).repeat(2, 0)
    weights = np.linalg.solve(z.T @ z + np.eye(z.shape[1]), z.T @ labels)
    query = features_of(root, query_images(root) / 255)
    scores = 10 * query / np.linalg.norm(query, axis=-1, keepdims=True) @ weights
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities = [list(answer["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(probabilities, powers / powers.sum(-1, keepdims=True), atol=1e-4)
    capsys.readouterr()
    assert predicted(root, root / "weights.safetensors", *flags) == answers
    assert "features of 20 of 20 images from the cache" in capsys.readouterr().out


def test_a_transductive_head_is_refused(root, monkeypatch, capsys):
    head = heads.HEADS["ridge"]._replace(transductive=True)
    monkeypatch.setitem(heads.HEADS, "together", head)
    flags = ["--support", str(root / "support"), "--size", "8", "--learner", "together"]
    predicted(root, root / "weights.safetensors", *flags, status=2)
    assert "--learner: got together, whose prediction for an image depends on" in capsys.readouterr().err


def test_heads_refuse_zero_shot_tasks(root, capsys):
    argv = ["evaluate", str(root / "weights.safetensors"), "--tasks", "glyphs", "--size", "8"]
    assert main([*argv, "--shots", "0", "--devices", "1"]) == 2
    assert "--shots: got 0, but simple_shot learns from support examples" in capsys.readouterr().err


@pytest.mark.nightly
def test_procedural_tasks_are_drawn_once_for_all_heads(root, tmp_path, capsys):
    argv = ["evaluate", str(root / "weights.safetensors"), "--tasks", "glyphs", "--size", "8"]
    more = ["--ways", "3", "--queries", "2", "--episodes", "6", "--devices", "1", "--learner", "simple_shot"]
    out = tmp_path / "result.json"
    assert main([*argv, *more, "--json", str(out)]) == 0
    assert "54 images" in capsys.readouterr().out
    test = jm.tasks.embedded(
        jm.tasks.glyphs("test", ways=3, shots=1, queries=2, size=8),
        jm.features(root / "weights.safetensors", size=SIDE),
    )
    identity = jm.Model(lambda key, x: {}, lambda params, x: x)
    learner = jm.simple_shot(identity, transform="l2n")
    key = run_of_command.evaluation_key(0)
    expected = jm.evaluate(learner, {"model": {}}, test, episodes=6, key=key).mean
    assert read_json(out)["accuracy"]["inductive"]["mean"] == pytest.approx(expected, abs=0.06)


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize(
    ("learner", "source"), [("prototypical", "run"), ("maml", "run"), ("maml", "transfer")]
)
def test_init_starts_training_from_a_source(root, tmp_path, capsys, learner, source):
    tasks = ["--tasks", f"folder:{root / 'images'}", "--ways", "2", "--queries", "2"]
    brief = [*BRIEF, "--classes", "0.5,0,0.5", "--outer-lr", "1e-9", "--steps", "1"]
    out = tmp_path / "out"
    assert main(["train", learner, *tasks, *brief, "--init", str(root / source), "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert f"init      {root / source}: " in output
    assert ("new: model/head/bias" in output) == (learner == "maml")
    trained = leaves_by_path(params_of(out, load_config(out))["model"])
    if source == "run":
        initial = params_of(root / "run", load_config(root / "run"))["model"]
    else:
        initial = jm.transfer.load_pretrained(root / source).variables["params"]
    for path, leaf in leaves_by_path(initial).items():
        if not path.startswith("head"):
            np.testing.assert_allclose(trained[path], leaf, atol=1e-6)
    # A run with a checkpoint resumes even where its source is gone.
    config = read_json(out / "config.json")
    config["run"]["init"] = "gone"
    (out / "config.json").write_text(json.dumps(config))
    assert main(["train", "--resume", "--out", str(out)]) == 0


@pytest.mark.nightly
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_cores_share_the_tasks_although_weights_are_read_first(root, tmp_path, command):
    tasks = ["--tasks", f"folder:{root / 'images'}", "--ways", "2", "--queries", "2", "--episodes", "4"]
    source, split = str(root / "transfer"), ["--classes", "0.5,0,0.5"]
    brief = ["--steps", "1", "--meta-batch", "2", "--out", str(tmp_path / "out")]
    argv = {
        "train": ["train", "prototypical", *tasks, *split, "--init", source, *brief],
        "evaluate": [
            "evaluate",
            source,
            *tasks,
            *split,
            "--devices",
            "2",
            "--json",
            str(tmp_path / "out.json"),
        ],
    }
    # In a process of its own, since JAX has started in this one.
    program = [sys.executable, "-m", "jaxmeta.cli", *argv[command]]
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    environment = {**inherited, "JAXMETA_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    subprocess.run(program, env=environment, check=True, stdout=subprocess.DEVNULL)
    report = tmp_path / ("out/report.json" if command == "train" else "out.json")
    expected = 2 if "--devices" in argv[command] else min(2, len(os.sched_getaffinity(0)))
    assert read_json(report)["devices"] == expected


@pytest.mark.nightly
@pytest.mark.parametrize("train", [["--train", "Dense_0"], ["--lora", "2"]])
def test_init_from_weights_takes_their_network_and_freezes_parameters(root, tmp_path, train):
    tasks = ["--tasks", f"folder:{root / 'images'}", "--ways", "2", "--queries", "2"]
    brief = ["--steps", "3", "--meta-batch", "2", "--episodes", "4", "--devices", "1"]
    source, out = root / "transfer", tmp_path / "out"
    argv = ["train", "prototypical", *tasks, *brief, "--classes", "0.5,0,0.5", "--init", str(source), *train]
    assert main([*argv, "--input-mean", "0.25", "--out", str(out)]) == 0
    config = load_config(out)
    initial = leaves_by_path(jm.transfer.load_pretrained(source).variables["params"])
    # The transfer's network is an MLP, which has this name without its settings.
    assert (config.network["name"], tuple(config.network["hidden"])) == ("mlp-40", (16,))
    trained = leaves_by_path(params_of(out, config)["model"])
    prefix = "network/" if "--lora" in train else ""
    changed = {path for path in initial if f"{prefix}{path}" in trained}
    changed = {path for path in changed if not np.array_equal(trained[f"{prefix}{path}"], initial[path])}
    if "--lora" in train:
        assert not changed
        assert any(np.any(leaf) for path, leaf in trained.items() if path.endswith("/b"))
    else:
        assert changed
        assert all(path.startswith("Dense_0") for path in changed)
    assert load_backbone(str(out)).pixels.mean == (0.25,)
    assert main(["train", "--resume", "--out", str(out)]) == 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["predict", "{root}/run"],
            "--support: {root}/run, a run of prototypical, learns its classes from",
        ),
        (["predict", "{root}/weights.safetensors"], "--support: {root}/weights.safetensors has no head"),
        (
            ["predict", "{root}/weights.safetensors", "--support", "{root}/support"],
            "--size: {root}/weights.safetensors does not say the size of its images; give it",
        ),
        (
            ["predict", "{root}/transfer", "--unknown-above", "1"],
            "--unknown-above: {root}/transfer measures",
        ),
        (["predict", "{root}/transfer", "--unknown-above", "-1"], "--unknown-above: got -1.0"),
        (
            ["predict", "{root}/transfer", "--learner", "maml"],
            "--learner: got maml, but {root}/transfer is not",
        ),
        (
            ["predict", "{root}/run", "--support", "{root}/support", "--learner", "maml"],
            "--learner: got maml, but {root}/run was not trained with it; leave it out",
        ),
        (["predict", "{root}/run", "--support", "{root}/support", "--size", "8"], "--size: got 8, but"),
        (["predict", "{root}/transfer", "--size", "0"], "--size: got 0; it must be at least 1"),
        (
            ["predict", "{root}/transfer", "--json", "a.json", "--csv", "a.json"],
            "--json, --csv, --confusion:",
        ),
        (
            ["evaluate", "{root}/transfer", "--tasks", "glyphs", "--learner", "nosuch"],
            "--learner: there is no 'nosuch'; known are simple_shot, ",
        ),
        (["predict", "{root}/nowhere"], "SOURCE: {root}/nowhere does not exist"),
        (["export", "{root}/run"], "--out: is missing"),
        (["export", "{root}/run", "--out", "{root}/images"], "--out: {root}/images exists"),
        (["evaluate", "{root}/transfer"], "--tasks: is missing"),
        (["evaluate", "{root}/transfer", "--tasks", "sinusoid"], "--tasks: "),
        (["train", "--init", "{root}/nowhere"], "--init: {root}/nowhere does not exist"),
        (
            ["train", "--init", "{root}/transfer", "--network", "strided-conv4"],
            "--init: {root}/transfer does not fit the network strided-conv4",
        ),
        (["train", "--lora", "0"], "--lora: got 0; it must be at least 1"),
        (["train", "--train", "no_such_layer"], "--train: "),
        (["train", "--input-std", "0"], "--input-std: "),
        (["train", "mann", "--preset", "omniglot-mann", "--lora", "2"], "--lora: got 2, but mann builds"),
    ],
)
def test_unsupported_uses_of_a_source_are_one_line_errors(
    root, tmp_path, monkeypatch, capsys, argv, expected
):
    monkeypatch.chdir(tmp_path)
    arguments = [word.format(root=root) for word in argv]
    if arguments[0] == "predict":
        arguments += ["--query", str(root / "query")]
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert expected.format(root=root) in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_export_can_only_predict(root, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["export", str(root / "transfer"), "--out", out]) == 0
    capsys.readouterr()
    for argv in (["transfer", out, "--target", "glyphs"], ["train", "--init", out]):
        assert main(argv) == 2
        assert f"{out} is an export, which can only predict" in capsys.readouterr().err
    flags = ["--query", str(root / "query"), "--support", str(root / "support")]
    assert main(["predict", out, *flags]) == 2
    assert "--support: " in capsys.readouterr().err
    (tmp_path / "out" / "classifier.stablehlo").write_bytes(b"no program")
    assert main(["predict", out, *flags[:2]]) == 2
    assert f"SOURCE: {out} is damaged" in capsys.readouterr().err
