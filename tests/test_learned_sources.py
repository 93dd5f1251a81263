"""Runs, transfers and weights as sources of predictions, evaluations, exports and trainings."""

import json
import re
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
def place(tmp_path_factory):
    """Return a folder with images of bars, a run, a transfer, and a weights file of another network."""
    place = tmp_path_factory.mktemp("sources")
    for number in range(8):
        for seed in range(5):
            draw_bar(place / "images" / f"bar{number}" / f"{seed}.png", number, 10 * number + seed)
    for number in range(KINDS):
        for seed in range(4):
            folder = "support" if seed < 2 else "query"
            draw_bar(place / folder / f"kind {number}" / f"{seed}.png", number, 500 + 10 * number + seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXMETA_CACHE", str(place / "cache"))
        patch.setitem(names.NETWORKS, "conv4-32", partial(jm.nn.MLP, hidden=(16,), norm=True))
        patch.setattr(run_of_command, "plot_curve", lambda *_: None)
        tasks = ["--tasks", f"folder:{place / 'images'}", "--ways", "2", "--queries", "2"]
        classes = ["--classes", "0.5,0,0.5"]
        assert main(["train", "prototypical", *tasks, *classes, *BRIEF, "--out", str(place / "run")]) == 0
        target = [
            "--target",
            f"folder:{place / 'support'}",
            "--shots",
            "1",
            "--steps",
            "60",
            "--rate",
            "0.01",
        ]
        assert main(["transfer", str(place / "run"), *target, "--out", str(place / "transfer")]) == 0
        network = jm.nn.MLP(out=None, hidden=(12,))
        variables = network.init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 1)))
        save_pretrained(place / "weights.safetensors", variables, network=network)
        yield place


def read(folder):
    """Return the images of a folder of classes, by class."""
    return {
        kind.name: np.stack([np.asarray(Image.open(file)) for file in sorted(kind.iterdir())])
        for kind in sorted(folder.iterdir())
    }


def questions(place):
    return np.concatenate(list(read(place / "query").values()))


def predicted(place, source, *flags, status=0):
    out = place / "answers.json"
    argv = ["predict", str(source), "--query", str(place / "query"), "--json", str(out), *flags]
    assert main(argv) == status
    return read_json(out) if status == 0 else None


def nearest(features, support):
    """Return a function of squared distances to class means of normalised features, in float64."""

    def unit(z):
        return z / np.linalg.norm(z, axis=-1, keepdims=True)

    means = np.stack([unit(features(x)).mean(0) for x in support.values()])
    return lambda x: ((unit(features(x))[:, None] - means) ** 2).sum(-1)


def test_weights_classify_by_the_nearest_class_mean_of_features(place):
    answers = predicted(
        place, place / "weights.safetensors", "--support", str(place / "support"), "--size", "8"
    )
    kernel, bias = (
        np.asarray(leaf, np.float64)
        for _, leaf in sorted(
            leaves_by_path(jm.transfer.load_pretrained(place / "weights.safetensors").variables).items(),
            reverse=True,
        )
    )

    def features(x):
        return np.maximum(x.reshape(len(x), -1) / 255 @ kernel + bias, 0)

    expected = nearest(features, read(place / "support"))(questions(place))
    assert [answer["class"] for answer in answers] == [f"kind {i}" for i in expected.argmin(-1)]
    np.testing.assert_allclose([answer["distance"] for answer in answers], expected.min(-1), rtol=1e-4)
    shares = np.exp(-10 * expected) / np.exp(-10 * expected).sum(-1, keepdims=True)
    probabilities = [list(answer["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(probabilities, shares, rtol=1e-3, atol=1e-6)


def test_predictions_of_a_transfer_are_those_of_its_network(place):
    answers = predicted(place, place / "transfer")
    assert list(answers[0]["probabilities"]) == [f"kind {number}" for number in range(KINDS)]
    loaded = jm.transfer.load_pretrained(place / "transfer")
    x = jnp.asarray(questions(place)[..., None], jnp.float32) / 255
    logits = loaded.network.apply(loaded.variables, x)
    probabilities = [list(answer["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), rtol=1e-4, atol=1e-6)
    report = read_json(place / "transfer" / "report.json")
    right = np.mean([answer["file"].startswith(answer["class"] + "/") for answer in answers])
    assert right == pytest.approx(report["accuracy"]["mean"], abs=0.25)


def test_predictions_of_a_run_are_those_of_its_learner(place):
    answers = predicted(place, place / "run", "--support", str(place / "support"))
    learner, params = jm.load_run(place / "run")
    support = read(place / "support")
    x = np.concatenate(list(support.values()))[..., None].astype(np.float32) / 255
    batch = jm.Batch(jnp.asarray(x), jnp.repeat(jnp.arange(KINDS), 2), ways=KINDS)
    adapted = learner.adapt(params, batch, jax.random.key(0))
    outputs = learner.predict(params, adapted, jnp.asarray(questions(place)[..., None], jnp.float32) / 255)
    probabilities = [list(answer["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(probabilities, jax.nn.softmax(outputs), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose([answer["distance"] for answer in answers], -outputs.max(-1), rtol=1e-3)


@pytest.mark.parametrize("kind", ["bytes", "numbers", "with a channel", "in colour", "larger", "files"])
def test_a_classifier_accepts_files_and_arrays_of_several_types_and_shapes(place, kind):
    classifier = jm.load_classifier(place / "run", support=place / "support")
    x = questions(place)
    images = {
        "bytes": x,
        "numbers": x / 255,
        "with a channel": x[..., None],
        "in colour": np.repeat(x[..., None], 3, -1),
        "larger": np.repeat(np.repeat(x, 2, 1), 2, 2),
        "files": sorted((place / "query").rglob("*.png")),
    }[kind]
    expected = classifier.predict(x[..., None].astype(np.float32) / 255)
    tolerance = 0.3 if kind == "larger" else 1e-4
    np.testing.assert_allclose(classifier.predict(images), expected, atol=tolerance)
    assert classifier.label(images) == [classifier.classes[i] for i in expected.argmax(-1)]


def test_support_sets_of_arrays_and_of_files_give_the_same_classifier(place):
    x = questions(place)
    files, arrays = (
        jm.load_classifier(place / "run", support=support)
        for support in (place / "support", read(place / "support"))
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
def test_arrays_that_are_not_images_are_errors(place, images, message):
    classifier = jm.load_classifier(place / "weights.safetensors", support=place / "support", size=SIDE)
    with pytest.raises(ValueError, match=message):
        classifier.predict(images)


def test_far_images_are_called_unknown(place, capsys):
    support = ["--support", str(place / "support"), "--size", "8"]
    far = np.median([row["distance"] for row in predicted(place, place / "weights.safetensors", *support)])
    flags = [*support, "--unknown-above", str(far)]
    answers = predicted(place, place / "weights.safetensors", *flags)
    assert [a["class"] == "unknown" for a in answers] == [a["distance"] > far for a in answers]
    assert "unknown" in capsys.readouterr().out


def test_a_class_called_unknown_conflicts_with_unknown_above(place, tmp_path, capsys):
    for name in ("unknown", "other"):
        draw_bar(tmp_path / name / "0.png", len(name), 3)
    flags = ["--support", str(tmp_path), "--size", "8", "--unknown-above", "1"]
    predicted(place, place / "weights.safetensors", *flags, status=2)
    assert "--unknown-above: a class is called unknown" in capsys.readouterr().err


def test_thumbnail_folders_are_ignored_in_the_recall(place, tmp_path, capsys):
    for kind in (place / "query").iterdir():
        (tmp_path / kind.name).mkdir()
        for file in kind.iterdir():
            (tmp_path / kind.name / file.name).write_bytes(file.read_bytes())
        (tmp_path / "@eaDir").mkdir(exist_ok=True)
        (tmp_path / "@eaDir" / "0.png").write_bytes(file.read_bytes())
    assert main(["predict", str(place / "transfer"), "--query", str(tmp_path)]) == 0
    assert "of 10 predictions are the class of the image's folder" in capsys.readouterr().out


def test_a_table_by_class_marks_wrong_answers(place, tmp_path, capsys):
    flags = ["--confusion", str(tmp_path / "confusion.png"), "--csv", str(tmp_path / "answers.csv")]
    answers = predicted(place, place / "transfer", *flags)
    output = capsys.readouterr().out.splitlines()
    wrong = [answer["file"] for answer in answers if not answer["file"].startswith(answer["class"] + "/")]
    assert [line.split("  ")[0] for line in output if line.endswith("← wrong")] == wrong
    for number in range(KINDS):
        own = [answer for answer in answers if answer["file"].startswith(f"kind {number}/")]
        right = sum(answer["class"] == f"kind {number}" for answer in own)
        row = next(line for line in output if line.startswith(f"kind {number} ") and line.endswith("%"))
        assert row.split()[2:] == [str(right), "2", f"{50 * right:.1f}", "%"]
    assert Image.open(tmp_path / "confusion.png").size[0] > 100
    assert (tmp_path / "answers.csv").read_text().startswith("file,class,kind 0,")


@pytest.mark.parametrize("of", ["transfer", "run"])
def test_an_export_predicts_as_its_source(place, tmp_path, of):
    flags = [] if of == "transfer" else ["--support", str(place / "support")]
    assert main(["export", str(place / of), "--out", str(tmp_path / "out"), *flags]) == 0
    config = read_json(tmp_path / "out" / "config.json")
    assert config["classes"] == [f"kind {number}" for number in range(KINDS)]
    answers, exported = predicted(place, place / of, *flags), predicted(place, tmp_path / "out")
    for answer, other in zip(answers, exported, strict=True):
        assert answer["class"] == other["class"]
        assert other["probabilities"] == pytest.approx(answer["probabilities"], rel=1e-3, abs=1e-5)
    # The program needs only JAX, and takes any number of images.
    program = jax.export.deserialize(bytearray((tmp_path / "out" / "classifier.stablehlo").read_bytes()))
    x = questions(place)[:3, :, :, None].astype(np.float32) / 255
    np.testing.assert_allclose(
        program.call(x), [list(a["probabilities"].values()) for a in answers[:3]], rtol=1e-3, atol=1e-5
    )


def test_weights_and_transfers_are_evaluated_on_other_tasks(place, tmp_path):
    tasks = ["--tasks", f"folder:{place / 'images'}", "--classes", "0,0,1", "--ways", "3", "--queries", "2"]
    out = tmp_path / "result.json"
    argv = [
        "evaluate",
        str(place / "transfer"),
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
    loaded = jm.transfer.load_pretrained(place / "transfer")
    variables = {**loaded.variables, "params": {**loaded.variables["params"]}}
    del variables["params"]["head"]
    body = loaded.network.clone(out=None)
    model = jm.Model(lambda key, x: {}, lambda variables, x: body.apply(variables, x))
    test = jm.tasks.from_folder(place / "images", "test", classes=(0.0, 0.0, 1.0), ways=3, shots=1, queries=2)
    evaluation = jm.evaluate(
        jm.simple_shot(model, transform="l2n"),
        {"model": variables},
        test,
        episodes=20,
        key=run_of_command.evaluation_key(5),
    )
    assert result["accuracy"]["inductive"]["mean"] == pytest.approx(evaluation.mean, abs=0.02)


def features_of(place, x):
    """Return the features of the weights file by NumPy, for images in [0, 1]."""
    (_, kernel), (_, bias) = sorted(
        leaves_by_path(jm.transfer.load_pretrained(place / "weights.safetensors").variables).items(),
        reverse=True,
    )
    return np.maximum(np.asarray(x).reshape(len(x), -1) @ np.asarray(kernel) + np.asarray(bias), 0)


def test_features_are_those_of_the_source_for_images_of_any_size_and_channels(place):
    model = jm.features(place / "weights.safetensors", size=SIDE)
    x = questions(place)[..., None].astype(np.float32) / 255
    params = model.init(jax.random.key(0), jnp.asarray(x))
    np.testing.assert_allclose(model.apply(params, jnp.asarray(x)), features_of(place, x), atol=1e-4)
    larger = np.repeat(np.repeat(np.repeat(x, 2, 1), 2, 2), 3, 3)
    np.testing.assert_allclose(
        model.apply(params, jnp.asarray(larger)),
        features_of(place, x),
        atol=0.3 * features_of(place, x).max(),
    )
    with pytest.raises(jm.ArgumentError, match="x: got uint8; images must be floats"):
        model.apply(params, jnp.zeros((1, SIDE, SIDE, 1), jnp.uint8))
    with pytest.raises(jm.ArgumentError, match=r"size: .* does not say the size of its images"):
        jm.features(place / "weights.safetensors")


def test_batch_statistics_that_a_source_lacks_are_those_of_the_learner(place, tmp_path):
    network = jm.nn.MLP(out=None, hidden=(6,), norm=True)
    x = jnp.asarray(questions(place)[..., None], jnp.float32) / 255
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
    assert jm.features(place / "run").apply_norm is None


WEIGHTS_TASKS = ["--classes", "0,0,1", "--ways", "3", "--queries", "2", "--episodes", "20", "--devices", "1"]


def test_a_table_of_heads_is_about_the_same_episodes(place, tmp_path, capsys):
    tasks = ["--tasks", f"folder:{place / 'images'}", *WEIGHTS_TASKS]
    named = ["--learner", "simple_shot", "ridge", "--learner=prototypical"]
    out = tmp_path / "result.json"
    source = str(place / "weights.safetensors")
    assert main(["evaluate", source, *tasks, *named, "--json", str(out)]) == 0
    result, output = read_json(out), capsys.readouterr().out
    assert list(result["heads"]) == ["simple_shot", "ridge", "prototypical"]
    assert result["learner"] == "simple_shot"
    of_default = {name: result["heads"]["simple_shot"][name] for name in ("mean", "ci95")}
    assert result["accuracy"]["inductive"] == {**of_default, "norm": "none"}
    best = max(result["heads"], key=lambda name: result["heads"][name]["mean"])
    assert [line.split()[0] for line in output.splitlines() if line.endswith("← best")] == [best]

    # The same by NumPy: the nearest class mean of the features as they are.
    test = jm.tasks.from_folder(place / "images", "test", classes=(0.0, 0.0, 1.0), ways=3, shots=1, queries=2)
    right = []
    keys = jm.episode_keys(run_of_command.evaluation_key(0), jnp.arange(20))[:, 0]
    for support, query in map(jax.jit(test.sample), keys):
        z, means = features_of(place, query.x), features_of(place, support.x)
        right.append((((z[:, None] - means) ** 2).sum(-1).argmin(-1) == query.y).mean())
    assert result["heads"]["prototypical"]["mean"] == pytest.approx(np.mean(right), abs=0.01)

    # Everything is known the second time; results by class are those of the one head.
    again = ["--learner", "ridge", "--per-class", "--json", str(out)]
    assert main(["evaluate", source, *tasks, *again]) == 0
    output, second = capsys.readouterr().out, read_json(out)
    images, known = re.search(r": ([\d,]+) images in .* s, ([\d,]+) of them from the cache", output).groups()
    assert images == known
    assert second["heads"]["ridge"]["mean"] == pytest.approx(result["heads"]["ridge"]["mean"], abs=1e-6)
    assert list(second["per_class"]) == ["inductive"]
    assert main(["evaluate", source, *tasks, *named, "--per-class"]) == 2
    assert "--per-class: is for one head, and --learner names simple_shot, ridge" in capsys.readouterr().err


def test_a_head_by_name_classifies_images_from_the_cache(place, capsys):
    flags = ["--support", str(place / "support"), "--size", "8", "--learner", "ridge"]
    answers = predicted(place, place / "weights.safetensors", *flags)
    assert "distance" not in answers[0]
    # Ridge regression by NumPy, with penalty 1 and scale 10.
    support = read(place / "support")
    z = np.concatenate([features_of(place, x / 255) for x in support.values()])
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    labels = np.eye(KINDS).repeat(2, 0)
    weights = np.linalg.solve(z.T @ z + np.eye(z.shape[1]), z.T @ labels)
    query = features_of(place, questions(place) / 255)
    scores = 10 * query / np.linalg.norm(query, axis=-1, keepdims=True) @ weights
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities = [list(answer["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(probabilities, powers / powers.sum(-1, keepdims=True), atol=1e-4)
    capsys.readouterr()
    assert predicted(place, place / "weights.safetensors", *flags) == answers
    assert "features of 20 of 20 images from the cache" in capsys.readouterr().out


def test_a_transductive_head_is_refused_by_name(place, monkeypatch, capsys):
    head = heads.HEADS["ridge"]._replace(transductive=True)
    monkeypatch.setitem(heads.HEADS, "together", head)
    flags = ["--support", str(place / "support"), "--size", "8", "--learner", "together"]
    predicted(place, place / "weights.safetensors", *flags, status=2)
    assert "--learner: got together, whose prediction for an image depends on" in capsys.readouterr().err


def test_heads_refuse_zero_shot_tasks(place, capsys):
    argv = ["evaluate", str(place / "weights.safetensors"), "--tasks", "glyphs", "--size", "8"]
    assert main([*argv, "--shots", "0", "--devices", "1"]) == 2
    assert "--shots: got 0, but simple_shot learns from support examples" in capsys.readouterr().err


@pytest.mark.nightly
def test_procedural_tasks_are_drawn_once_for_all_heads(place, tmp_path, capsys):
    argv = ["evaluate", str(place / "weights.safetensors"), "--tasks", "glyphs", "--size", "8"]
    more = ["--ways", "3", "--queries", "2", "--episodes", "6", "--devices", "1", "--learner", "simple_shot"]
    out = tmp_path / "result.json"
    assert main([*argv, *more, "--json", str(out)]) == 0
    assert "54 images" in capsys.readouterr().out
    test = jm.tasks.embedded(
        jm.tasks.glyphs("test", ways=3, shots=1, queries=2, size=8),
        jm.features(place / "weights.safetensors", size=SIDE),
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
def test_init_starts_training_from_a_source(place, tmp_path, capsys, learner, source):
    tasks = ["--tasks", f"folder:{place / 'images'}", "--ways", "2", "--queries", "2"]
    brief = [*BRIEF, "--classes", "0.5,0,0.5", "--outer-lr", "1e-9", "--steps", "1"]
    out = tmp_path / "out"
    assert main(["train", learner, *tasks, *brief, "--init", str(place / source), "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert f"init      {place / source}: " in output
    assert ("new: model/head/bias" in output) == (learner == "maml")
    trained = leaves_by_path(params_of(out, load_config(out))["model"])
    if source == "run":
        begun = params_of(place / "run", load_config(place / "run"))["model"]
    else:
        begun = jm.transfer.load_pretrained(place / source).variables["params"]
    for path, leaf in leaves_by_path(begun).items():
        if not path.startswith("head"):
            np.testing.assert_allclose(trained[path], leaf, atol=1e-6)
    # A run with a checkpoint resumes even where its source is gone.
    config = read_json(out / "config.json")
    config["run"]["init"] = "gone"
    (out / "config.json").write_text(json.dumps(config))
    assert main(["train", "--resume", "--out", str(out)]) == 0


@pytest.mark.nightly
@pytest.mark.parametrize("train", [["--train", "Dense_0"], ["--lora", "2"]])
def test_init_from_weights_takes_their_network_and_freezes_parameters(place, tmp_path, train):
    tasks = ["--tasks", f"folder:{place / 'images'}", "--ways", "2", "--queries", "2"]
    brief = ["--steps", "3", "--meta-batch", "2", "--episodes", "4", "--devices", "1"]
    source, out = place / "transfer", tmp_path / "out"
    argv = ["train", "prototypical", *tasks, *brief, "--classes", "0.5,0,0.5", "--init", str(source), *train]
    assert main([*argv, "--input-mean", "0.25", "--out", str(out)]) == 0
    config = load_config(out)
    begun = leaves_by_path(jm.transfer.load_pretrained(source).variables["params"])
    # The transfer's network is an MLP, which has this name without its settings.
    assert (config.network["name"], tuple(config.network["hidden"])) == ("mlp-40", (16,))
    trained = leaves_by_path(params_of(out, config)["model"])
    prefix = "network/" if "--lora" in train else ""
    changed = {path for path in begun if f"{prefix}{path}" in trained}
    changed = {path for path in changed if not np.array_equal(trained[f"{prefix}{path}"], begun[path])}
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
            ["predict", "{place}/run"],
            "--support: {place}/run, a run of prototypical, learns its classes from",
        ),
        (["predict", "{place}/weights.safetensors"], "--support: {place}/weights.safetensors has no head"),
        (
            ["predict", "{place}/weights.safetensors", "--support", "{place}/support"],
            "--size: {place}/weights.safetensors does not say the size of its images; give it",
        ),
        (
            ["predict", "{place}/transfer", "--unknown-above", "1"],
            "--unknown-above: {place}/transfer measures",
        ),
        (["predict", "{place}/transfer", "--unknown-above", "-1"], "--unknown-above: got -1.0"),
        (
            ["predict", "{place}/transfer", "--learner", "maml"],
            "--learner: got maml, but {place}/transfer is not",
        ),
        (
            ["predict", "{place}/run", "--support", "{place}/support", "--learner", "maml"],
            "--learner: got maml, but {place}/run was not trained with it; leave it out",
        ),
        (["predict", "{place}/run", "--support", "{place}/support", "--size", "8"], "--size: got 8, but"),
        (["predict", "{place}/transfer", "--size", "0"], "--size: got 0; it must be at least 1"),
        (
            ["predict", "{place}/transfer", "--json", "a.json", "--csv", "a.json"],
            "--json, --csv, --confusion:",
        ),
        (
            ["evaluate", "{place}/transfer", "--tasks", "glyphs", "--learner", "nosuch"],
            "--learner: there is no 'nosuch'; known are simple_shot, ",
        ),
        (["predict", "{place}/nowhere"], "SOURCE: {place}/nowhere does not exist"),
        (["export", "{place}/run"], "--out: is missing"),
        (["export", "{place}/run", "--out", "{place}/images"], "--out: {place}/images exists"),
        (["evaluate", "{place}/transfer"], "--tasks: is missing"),
        (["evaluate", "{place}/transfer", "--tasks", "sinusoid"], "--tasks: "),
        (["train", "--init", "{place}/nowhere"], "--init: {place}/nowhere does not exist"),
        (
            ["train", "--init", "{place}/transfer", "--network", "strided-conv4"],
            "--init: {place}/transfer has another network",
        ),
        (["train", "--lora", "0"], "--lora: got 0; it must be at least 1"),
        (["train", "--train", "no_such_layer"], "--train: "),
        (["train", "--input-std", "0"], "--input-std: "),
        (["train", "mann", "--preset", "omniglot-mann", "--lora", "2"], "--lora: got 2, but mann builds"),
    ],
)
def test_unsupported_uses_of_a_source_are_one_line_errors(
    place, tmp_path, monkeypatch, capsys, argv, expected
):
    monkeypatch.chdir(tmp_path)
    arguments = [word.format(place=place) for word in argv]
    if arguments[0] == "predict":
        arguments += ["--query", str(place / "query")]
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert expected.format(place=place) in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_export_can_only_predict(place, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["export", str(place / "transfer"), "--out", out]) == 0
    capsys.readouterr()
    for argv in (["transfer", out, "--target", "glyphs"], ["train", "--init", out]):
        assert main(argv) == 2
        assert f"{out} is an export, which can only predict" in capsys.readouterr().err
    flags = ["--query", str(place / "query"), "--support", str(place / "support")]
    assert main(["predict", out, *flags]) == 2
    assert "--support: " in capsys.readouterr().err
    (tmp_path / "out" / "classifier.stablehlo").write_bytes(b"no program")
    assert main(["predict", out, *flags[:2]]) == 2
    assert f"SOURCE: {out} is damaged" in capsys.readouterr().err
