"""`jaxmeta transfer` and `jaxmeta rank`: from a run, a transfer or a file to labelled images."""

import json
import re
import shlex
import shutil
import signal
import sys
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bars import SIDE, draw_bar
from PIL import Image
from safetensors.numpy import load_file, save_file
from scipy.stats import binomtest
from support import read_json

import jaxmeta as jm
from jaxmeta.cli import fine_tuning, main, names, run, schema
from jaxmeta.cli import transfer as transferring
from jaxmeta.cli.backbones import load_backbone, untrained_backbone
from jaxmeta.cli.config import load_config
from jaxmeta.cli.figures import plot_confusion
from jaxmeta.cli.fine_tuning import RECIPES
from jaxmeta.cli.run import params_of
from jaxmeta.cli.target_data import Target, read_target, split_shots, target_settings
from jaxmeta.cli.transfer_report import wilson
from jaxmeta.nn.norm import from_moments
from jaxmeta.transfer.ranking import SCORES

KEY = jax.random.key(0)


SMALL = partial(jm.nn.MLP, hidden=(24, 16), norm=True)


def draw_bars(folder, kinds, per_kind, *, stray=3, across=False, **shades):
    for kind in range(kinds):
        for number in range(per_kind):
            seed = 1000 * kind + number + 7 * across
            path = folder / f"bar {kind}" / f"{number:02d}.png"
            draw_bar(path, kind, seed, stray=stray, across=across, **shades)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with lying bars, a run trained on them, a copy of it, and standing bars as target."""
    place = tmp_path_factory.mktemp("transferring")
    draw_bars(place / "lying", 8, 8)
    draw_bars(place / "standing", 5, 10, across=True)
    draw_bars(place / "noisy", 8, 10, stray=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXMETA_CACHE", str(place / "cache"))
        patch.setitem(names.NETWORKS, "conv4-32", SMALL)
        patch.setattr(run, "plot_curve", lambda *_: None)
        patch.setitem(names.NETWORKS, "conv4", partial(jm.nn.Conv4, filters=4))
        trained(place, "prototypical", 150)
        shutil.copytree(place / "prototypical", place / "copy")
        yield place


def trained(place, learner, steps, *flags):
    """Train a learner on lying bars, and return the run's folder."""
    out = place / learner
    flags += ("--tasks", f"folder:{place / 'lying'}", "--ways", "2", "--queries", "2", "--episodes", "4")
    flags += ("--classes", "0.75,0,0.25", "--meta-batch", "2", "--devices", "1")
    flags += ("--steps", str(steps), "--validate-every", str(steps))
    assert main(["train", learner, *flags, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def fomaml(place):
    """Return a run without population statistics."""
    return trained(place, "fomaml", 2, "--inner-steps", "1", "--eval-steps", "1")


@pytest.fixture(scope="module")
def simple_shot(place):
    """Return a run of an ordinary classifier."""
    return trained(place, "simple_shot", 60)


def transfer(place, out, *flags, source=None, target=None, status=0):
    source = str(source or place / "prototypical")
    target = target or f"folder:{place / 'standing'}"
    assert main(["transfer", source, "--target", target, "--out", str(out), *flags]) == status
    return read_json(out / "report.json") if status == 0 else None


@pytest.fixture(scope="module")
def probed(place):
    """Return folder and report of a linear probe on the prototypical run."""
    flags = ["--recipe", "linear-probe", "--shots", "5", "--seed", "3"]
    return place / "probed", transfer(place, place / "probed", *flags)


@pytest.fixture(scope="module")
def partly_tuned(place):
    """Return folder and report of a transfer that fine-tunes the second layer."""
    flags = ["--recipe", "fine-tune", "--train", "body/Dense_1,body/BatchNorm_1", "--steps", "3"]
    flags += ["--l2-sp", "0.1"]
    return place / "partly_tuned", transfer(place, place / "partly_tuned", *flags)


def body_of(run):
    """Return parameters and statistics of a run's network, without its head."""
    params = params_of(run, load_config(run))
    leaves = {f"params/{path}": leaf for path, leaf in jm.transfer.leaves_by_path(params["model"]).items()}
    if "population" in params:
        stats = from_moments(params["population"])
        leaves |= {f"batch_stats/{path}": leaf for path, leaf in jm.transfer.leaves_by_path(stats).items()}
    return {path: np.asarray(leaf) for path, leaf in leaves.items() if not path.startswith("params/head/")}


RECIPE_FLAGS = {
    "feature-extraction": [],
    "linear-probe": [],
    "fine-tune": ["--steps", "40", "--batch", "8", "--rate", "0.01"],
    "lp-ft": ["--steps", "5", "--l2-sp", "0.1"],
    "gradual": ["--steps", "50", "--rate", "0.02"],
    "scratch": ["--steps", "40", "--rate", "0.01"],
}
REPORTED = ("source", "target", "recipe", "seed", "classes", "shots", "learned_from", "scored", "images")
REPORTED += ("inverted", "statistics", "parameters", "accuracy", "recalls", "losses", "leaves", "wall_s")


def test_flags_list_all_recipes_and_scores():
    flags, ranking = schema.settings_of(transferring.transfer), schema.settings_of(transferring.rank)
    assert set(get_args(schema.members(flags["recipe"].hint)[0])) == set(RECIPES) == set(RECIPE_FLAGS)
    assert get_args(ranking["score"].hint) == SCORES


def test_every_flag_has_help():
    for command in (transferring.transfer, transferring.rank):
        assert all(setting.help for setting in schema.settings_of(command).values())


def test_a_target_adds_the_flags_of_its_source(own):
    assert set(target_settings("omniglot")) == {"protocol"}
    assert {"image", "label", "tfds_splits"} <= set(target_settings("tfds:some"))
    # The shape of episodes has no flags, and neither have settings that the source's network decides.
    assert set(target_settings("own_bars:bars")) == {"folder"}


def test_transfer_and_rank_share_flags():
    flags, ranking = schema.settings_of(transferring.transfer), schema.settings_of(transferring.rank)
    of_transfer = {"recipe", "train", "l2_sp", "keep_statistics", "out"}
    assert set(flags) - of_transfer == set(ranking) - {"score", "fine_tune", "json"}
    assert set(fine_tuning.Settings.__annotations__) <= set(flags)


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=() if name == "lp-ft" else pytest.mark.nightly) for name in RECIPES],
)
def test_each_recipe_learns_standing_bars_from_lying_ones(place, tmp_path, capsys, recipe):
    report = transfer(place, tmp_path / "out", "--recipe", recipe, "--shots", "5", *RECIPE_FLAGS[recipe])
    assert set(REPORTED) <= set(report)
    assert (report["classes"], report["learned_from"], report["scored"]) == (5, 25, 25)
    assert report["accuracy"]["mean"] > 0.5
    assert report["accuracy"]["low"] < report["accuracy"]["mean"] <= report["accuracy"]["high"]
    assert np.mean(list(report["recalls"].values())) == pytest.approx(report["accuracy"]["mean"])
    assert set(report["recalls"]) == {f"bar {kind}" for kind in range(5)}

    frozen = recipe in ("feature-extraction", "linear-probe")
    source = body_of(place / "prototypical")
    body, head = sum(leaf.size for path, leaf in source.items() if path.startswith("params")), 5 * (16 + 1)
    counts = {"trained": head, "frozen": body} if frozen else {"trained": body + head, "frozen": 0}
    assert report["parameters"] == counts
    assert ("probe_accuracy" in report) == (recipe in ("fine-tune", "lp-ft", "gradual"))
    steps = int(
        dict(zip(RECIPE_FLAGS[recipe][::2], RECIPE_FLAGS[recipe][1::2], strict=True)).get("--steps", 0)
    )
    assert len(report["losses"]) == steps
    shown = capsys.readouterr().out
    assert ("  loss " in shown) == bool(steps)
    assert f"{steps}/{steps}" in shown or not steps

    written = load_file(tmp_path / "out" / "weights.safetensors")
    assert set(written) == {*source, "params/head/kernel", "params/head/bias"}
    same = [path for path, leaf in source.items() if np.array_equal(written[path], leaf)]
    assert same == (list(source) if frozen else [])
    assert Image.open(tmp_path / "out" / "confusion.png").format == "PNG"
    text = (tmp_path / "out" / "report.md").read_text()
    kept = "new" if recipe == "scratch" else "taken"
    assert f"| {kept} | params/body/Dense_0/kernel |" in text
    assert "| new | params/head/kernel | - |" in text
    assert f"**{100 * report['accuracy']['mean']:.2f} %**" in text
    assert read_json(tmp_path / "out" / "config.json").items() >= {"recipe": recipe, "seed": 0}.items()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_the_written_weights_give_the_reported_accuracy(place, probed):
    """The network is the one that the file describes, on images read independently."""
    out, report = probed
    loaded = jm.transfer.load_pretrained(out)
    assert loaded.network == jm.nn.MLP(out=5, hidden=(24, 16), norm=True)
    names = read_json(out / "config.json")["classes"]
    apply, right = jax.jit(loaded.network.apply), []
    for label, name in enumerate(names):
        files = sorted((place / "standing" / name).iterdir())
        x = np.stack([np.asarray(Image.open(file), np.float32)[..., None] / 255 for file in files])
        outputs = apply(loaded.variables, x)
        right += (np.argmax(outputs, 1) == label).tolist()
    target = read_target(f"folder:{place / 'standing'}", {}, 5, KEY, size=SIDE, channels=1)
    score = split_shots(target, 5, jax.random.fold_in(jax.random.key(3), 0)).score
    assert np.mean(np.array(right)[score]) == report["accuracy"]["mean"]


def test_only_the_parts_in_train_and_the_head_are_trained(place, partly_tuned):
    out, report = partly_tuned
    written, source = load_file(out / "weights.safetensors"), body_of(place / "prototypical")
    changed = {path for path, leaf in source.items() if not np.array_equal(written[path], leaf)}
    assert changed == {path for path in source if "_1/" in path}
    assert report["parameters"]["frozen"] == 64 * 24 + 24 + 2 * 24


@pytest.mark.parametrize("file", ["", pytest.param("weights.safetensors", marks=pytest.mark.nightly)])
def test_a_transfer_can_be_a_source(place, tmp_path, partly_tuned, file):
    folder, first = partly_tuned
    written = load_file(folder / "weights.safetensors")
    report = transfer(
        place,
        tmp_path / "out",
        *("--recipe", "feature-extraction"),
        source=folder / file,
        target=f"folder:{place / 'lying'}",
    )
    assert report["images"] == first["images"]
    assert (report["classes"], report["statistics"]) == (8, "of the source")
    again = load_file(tmp_path / "out" / "weights.safetensors")
    assert again["params/head/kernel"].shape == (16, 8)
    for path, leaf in written.items():
        assert "head" in path or np.array_equal(leaf, again[path])
    assert report["leaves"] == {"taken": 12, "new": 2, "left_over": 0, "dropped": 2}


@pytest.mark.nightly
def test_a_backbone_without_statistics_gets_those_of_the_target(place, fomaml, tmp_path):
    report = transfer(place, tmp_path / "out", "--recipe", "linear-probe", source=fomaml)
    assert "by AdaBN" in report["statistics"]
    assert "by AdaBN" in (tmp_path / "out" / "report.md").read_text()
    written, source = load_file(tmp_path / "out" / "weights.safetensors"), body_of(fomaml)
    assert all(np.array_equal(written[path], leaf) for path, leaf in source.items())
    target = read_target(f"folder:{place / 'standing'}", {}, None, KEY, size=SIDE, channels=1)
    learn = split_shots(target, None, jax.random.fold_in(KEY, 0)).learn
    assert len(learn) == 5 * 8
    x = target.x[learn].reshape(40, -1) / 255
    z = x @ source["params/Dense_0/kernel"] + source["params/Dense_0/bias"]
    np.testing.assert_allclose(written["batch_stats/BatchNorm_0/mean"], z.mean(0), atol=1e-6)
    np.testing.assert_allclose(written["batch_stats/BatchNorm_0/var"], z.var(0), atol=1e-6)


@pytest.fixture(scope="module")
def strokes(place):
    """Return a folder with a run configured for light strokes, and the same strokes light and dark."""
    folder = place / "strokes"
    shutil.copytree(place / "prototypical", folder / "ink")
    config = read_json(folder / "ink" / "config.json")
    config["images"] |= {"ink": True, "mean": 0.15}
    (folder / "ink" / "config.json").write_text(json.dumps(config))
    draw_bars(folder / "light", 5, 10, ink=255, paper=0, across=True)
    draw_bars(folder / "dark", 5, 10, across=True)
    return folder


def probe_of(place, out, source, target):
    return transfer(place, out, "--recipe", "linear-probe", source=source, target=f"folder:{target}")


def test_strokes_are_inverted_to_match_the_source(place, strokes, tmp_path):
    """A source of strokes gives the same for light on dark and dark on light."""
    heads, inverted = {}, {}
    for name in ("light", "dark"):
        out = tmp_path / f"out-{name}"
        inverted[name] = probe_of(place, out, strokes / "ink", strokes / name)["inverted"]
        heads[name] = load_file(out / "weights.safetensors")["params/head/kernel"]
    assert inverted == {"light": False, "dark": True}
    np.testing.assert_allclose(heads["light"], heads["dark"], rtol=1e-3, atol=1e-4)
    assert "all are inverted" in (tmp_path / "out-dark" / "report.md").read_text()


def test_images_are_not_inverted_for_a_source_of_other_images(probed):
    assert not probed[1]["inverted"]


@pytest.mark.nightly
def test_a_transfer_of_strokes_inverts_as_a_source(place, strokes, tmp_path):
    probe_of(place, tmp_path / "first", strokes / "ink", strokes / "dark")
    again = probe_of(place, tmp_path / "again", tmp_path / "first", strokes / "light")
    assert (again["inverted"], again["images"]["ink"]) == (False, True)


def test_an_untrained_network_is_trained_from_scratch(place, tmp_path):
    flags = [
        "--network",
        "conv4-32",
        "--size",
        "6",
        "--channels",
        "3",
        "--steps",
        "2",
        "--shots",
        "all",
    ]
    report = transfer(place, tmp_path / "out", *flags, source="none")
    assert report["recipe"] == "scratch"
    assert (report["images"]["size"], report["images"]["channels"]) == (6, 3)
    assert (report["learned_from"], report["scored"]) == (5 * 8, 5 * 2)
    assert report["leaves"] == {"taken": 0, "new": 14, "left_over": 0, "dropped": 0}
    assert load_file(tmp_path / "out" / "weights.safetensors")["params/Dense_0/kernel"].shape == (108, 24)


def test_maps_are_flattened_for_the_head():
    model, x = untrained_backbone("relation").model, jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)
    variables = jax.eval_shape(model.init, KEY, x)
    assert jax.eval_shape(model.apply, variables, x).shape == (2, 5 * 5 * 64)
    assert jax.eval_shape(model.train, variables, x, KEY)[0].shape == (2, 5 * 5 * 64)


def torchvision_file(path):
    """Write random weights with torchvision's names: one block, four channels, three classes."""
    rng = np.random.default_rng(0)
    shapes = {"conv1": (4, 3, 7, 7), "layer1.0.conv1": (4, 4, 3, 3), "layer1.0.conv2": (4, 4, 3, 3)}
    weights = {f"{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
    for norm in ("bn1", "layer1.0.bn1", "layer1.0.bn2"):
        names = ("weight", "bias", "running_mean", "running_var")
        weights |= {f"{norm}.{name}": rng.random(4) + 0.1 for name in names}
    weights |= {"fc.weight": rng.normal(size=(3, 4)), "fc.bias": rng.normal(size=3)}
    save_file({name: leaf.astype(np.float32) for name, leaf in weights.items()}, path)


@pytest.mark.nightly
def test_pretrained_files_get_images_with_their_normalisation(place, tmp_path):
    torchvision_file(tmp_path / "resnet.safetensors")
    flags = ["--recipe", "linear-probe", "--size", "32"]
    report = transfer(place, tmp_path / "out", *flags, source=tmp_path / "resnet.safetensors")
    assert "mean 0.485, 0.456, 0.406, std 0.229" in report["pixels"]
    assert (report["images"]["size"], report["images"]["channels"]) == (32, 3)
    assert report["leaves"] == {"taken": 15, "new": 2, "left_over": 0, "dropped": 2}
    # The head is fitted to the features that the file's network has of normalised images.
    target = read_target(f"folder:{place / 'standing'}", {}, None, KEY, size=32, channels=3)
    learn = target.batch(split_shots(target, None, jax.random.fold_in(KEY, 0)).learn)
    x = (learn.x / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    loaded = jm.transfer.load_pretrained(tmp_path / "resnet.safetensors", head=False)
    z = loaded.network.apply(loaded.variables, jnp.asarray(x, jnp.float32))
    head = jm.transfer.logistic_head(z, jnp.asarray(learn.y), 5)
    written = load_file(tmp_path / "out" / "weights.safetensors")
    np.testing.assert_allclose(written["params/head/kernel"], head["kernel"], rtol=1e-2, atol=1e-3)
    again = transfer(place, tmp_path / "again", "--recipe", "linear-probe", source=tmp_path / "out")
    assert (again["pixels"], again["images"]) == (report["pixels"], report["images"])


VIT_FLAGS = ["--recipe", "linear-probe", "--pixels", "symmetric", "--size"]


def vision_transformer_file(path):
    network = jm.nn.ViT(patch=4, width=8, depth=1, heads=2, mlp=8, image_size=8)
    shapes = jax.eval_shape(network.init, KEY, jnp.zeros((1, 8, 8, 3)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    jm.transfer.save_pretrained(path, variables, network=network)


def test_vision_transformers_need_a_size_that_patches_tile(place, tmp_path, capsys):
    vision_transformer_file(tmp_path / "vit.safetensors")
    source = tmp_path / "vit.safetensors"
    transfer(place, tmp_path / "none", *VIT_FLAGS, "13", source=source, status=2)
    assert "--size: got 13×13; patches of 4 must tile it" in capsys.readouterr().err


@pytest.mark.nightly
def test_a_vision_transformer_takes_another_size(place, tmp_path):
    vision_transformer_file(tmp_path / "vit.safetensors")
    report = transfer(place, tmp_path / "out", *VIT_FLAGS, "12", source=tmp_path / "vit.safetensors")
    assert report["images"]["size"] == 12
    assert "mean 0.5, 0.5, 0.5, std 0.5" in report["pixels"]
    written = load_file(tmp_path / "out" / "weights.safetensors")
    assert written["params/position_embedding"].shape == (1, 1 + 3 * 3, 8)


def test_a_file_without_a_network_needs_the_flag(place, probed, tmp_path, capsys):
    from flax.serialization import msgpack_serialize

    run = place / "prototypical"
    params = params_of(run, load_config(run))
    variables = {"params": params["model"], "batch_stats": from_moments(params["population"])}
    file = tmp_path / "weights.msgpack"
    file.write_bytes(msgpack_serialize(jax.tree.map(np.asarray, variables)))
    flags = ["--recipe", "linear-probe", "--shots", "5", "--seed", "3"]
    report = transfer(place, tmp_path / "out", *flags, "--network", "conv4-32", source=file)
    assert report["accuracy"] == probed[1]["accuracy"]
    transfer(place, tmp_path / "none", *flags, source=file, status=2)
    assert "--network:" in capsys.readouterr().err


def test_shots_are_of_each_class_and_the_others_are_scored():
    y = np.repeat(np.arange(3), [4, 10, 7])
    target = Target("t", "", np.zeros((21, 1, 1, 1), np.uint8), y, ("a", "b", "c"), False)
    for shots, counts in ((2, [2, 2, 2]), ("all", [3, 8, 5]), (None, [3, 3, 3])):
        split = split_shots(target, shots, KEY)
        assert np.bincount(y[split.learn]).tolist() == counts
        assert sorted([*split.learn, *split.score]) == list(range(21))
    draws = [tuple(split_shots(target, 2, jax.random.key(seed)).learn) for seed in range(5)]
    assert len(set(draws)) > 1


@pytest.mark.parametrize(("y", "message"), [([0, 0, 1, 2, 2], "a single"), ([0, 0, 1, 1], "no")])
def test_a_class_without_an_image_to_learn_from_and_one_to_score_is_refused(y, message):
    y = np.array(y)
    target = Target("t", "", np.zeros((len(y), 1, 1, 1), np.uint8), y, ("a", "b", "c"), False)
    name = target.classes[np.bincount(y, minlength=3).argmin()]
    with pytest.raises(ValueError, match=f"target: the class '{name}' of t has {message} image; it must"):
        split_shots(target, None, KEY)


def parts_of_bars(root, **counts):
    """Write folders of parts: `train=(3, 2)` puts 3 images of bar 0 and 2 of bar 1 into train."""
    for part, per_class in counts.items():
        for kind, count in enumerate(per_class):
            for number in range(count):
                draw_bar(root / part / f"bar {kind}" / f"{part}{number}.png", kind, 99 * kind + number)
    return f"folder:{root}"


def test_parts_of_a_folder_are_learned_from_and_scored(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMETA_CACHE", str(tmp_path / "cache"))
    name = parts_of_bars(tmp_path / "bars", train=(4, 3, 5), val=(1, 0, 2), test=(2, 3, 1))
    target = read_target(name, {}, None, KEY, size=None, channels=None)
    assert target.protocol == "learning from its train and validation images, scoring on its test images"
    assert target.classes == ("bar 0", "bar 1", "bar 2")
    assert np.bincount(target.y).tolist() == [7, 6, 8]
    for shots, counts in ((None, [5, 3, 7]), ("all", [5, 3, 7]), (3, [3, 3, 3])):
        split = split_shots(target, shots, KEY)
        assert np.bincount(target.y[split.learn]).tolist() == counts
        assert np.bincount(target.y[split.score]).tolist() == [2, 3, 1]
        assert not set(split.learn) & set(split.score)
    with pytest.raises(
        ValueError, match=r"shots: got 4, but the class 'bar 1' of .* has 3 images to learn from"
    ):
        split_shots(target, 4, KEY)
    # The images to score are those in the folder test.
    kind, file = 2, tmp_path / "bars" / "test" / "bar 2" / "test0.png"
    row = split_shots(target, None, KEY).score[target.y[split.score] == kind][0]
    np.testing.assert_array_equal(target.x[row, :, :, 0], np.asarray(Image.open(file).convert("L")))
    with pytest.warns(UserWarning, match=r"1 of 3 classes have fewer than 4 images .*: bar 1 \(3\)"):
        kept = read_target(name, {"skip_small_classes": True}, 4, KEY, size=None, channels=None)
    assert kept.classes == ("bar 0", "bar 2")
    assert np.bincount(kept.y[split_shots(kept, 4, KEY).learn]).tolist() == [4, 4]


@pytest.mark.parametrize(
    ("counts", "classes", "sizes", "protocol"),
    [
        (
            {"train": (2, 2), "val": (3, 1)},
            2,
            [5, 3],
            "learning from its train images, scoring on its validation",
        ),
        ({"train": (2, 2, 0, 0), "test": (0, 0, 3, 4)}, 2, [3, 4], "its test classes"),
        ({"train": (2, 2, 0), "test": (0, 3, 4)}, 3, [2, 5, 4], "the images of train, test together"),
        (
            {"train": (2, 2, 0, 0), "val": (0, 0, 3, 4)},
            4,
            [2, 2, 3, 4],
            "the images of train, validation together",
        ),
        ({"train": (2, 3)}, 2, [2, 3], "all classes of folder:"),
    ],
)
def test_a_folder_with_parts_selects_its_images(tmp_path, monkeypatch, counts, classes, sizes, protocol):
    monkeypatch.setenv("JAXMETA_CACHE", str(tmp_path / "cache"))
    target = read_target(parts_of_bars(tmp_path / "bars", **counts), {}, None, KEY, size=None, channels=None)
    assert len(target.classes) == classes
    assert np.bincount(target.y).tolist() == sizes
    assert target.protocol.startswith(protocol)
    assert (target.scored is not None) == ("scoring on" in target.protocol)


@pytest.mark.nightly
def test_transfer_to_a_folder_with_parts_reports_the_files_read(place, tmp_path, capsys):
    target = parts_of_bars(tmp_path / "bars", train=(4, 4), test=(3, 5))
    (tmp_path / "bars" / "test" / "bar 0" / "notes.txt").write_text("no image")
    report = transfer(place, tmp_path / "out", "--recipe", "feature-extraction", target=target)
    assert (report["learned_from"], report["scored"]) == (8, 8)
    assert report["read"].startswith(
        "16 images of 2 classes, by folders train, test, each with one folder per class"
    )
    assert "left out: 1 file that is not an image (test/bar 0/notes.txt)" in capsys.readouterr().out


def test_a_target_equals_labelled_tasks(place):
    target = read_target(f"folder:{place / 'standing'}", {}, None, KEY, size=None, channels=None)
    x, y = jm.tasks.labelled(jm.tasks.from_folder(place / "standing", classes=None, ways=2))
    np.testing.assert_allclose(target.x / 255, x, atol=1e-6)
    assert target.y.tolist() == y.tolist()


@pytest.mark.parametrize(("right", "n"), [(0, 5), (7, 9), (1800, 1957), (12, 12)])
def test_the_interval_is_wilson_s(right, n):
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    interval = wilson(right, n)
    assert (interval["low"], interval["high"]) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert interval["mean"] == right / n


@pytest.mark.parametrize("classes", [2, pytest.param(30, marks=pytest.mark.nightly), 200])
def test_a_single_error_is_visible_among_any_number_of_classes(tmp_path, classes):
    pictures = []
    for errors in (0, 1):
        matrix = 30 * np.eye(classes, dtype=np.int64)
        matrix[0, classes - 1] = errors
        plot_confusion(tmp_path / "confusion.png", matrix, [f"class {i}" for i in range(classes)], "t")
        pictures.append(np.asarray(Image.open(tmp_path / "confusion.png").convert("RGB")).astype(int))
    without, with_error = pictures
    assert with_error.shape == without.shape
    assert max(with_error.shape) < 1500
    rows, columns = np.nonzero((with_error - without).any(2))
    # The first cell of the diagonal, which has changed as well, lies to the left.
    beyond = columns > with_error.shape[1] / 2
    rows, columns = rows[beyond], columns[beyond]
    assert min(np.ptp(rows), np.ptp(columns)) >= 2
    assert np.median(without[rows, columns]) == 255
    assert np.median(with_error[rows, columns, 2] - with_error[rows, columns, 0]) > 20
    assert rows.max() < with_error.shape[0] / 2


def random_file(path):
    network = jm.nn.MLP(out=None, hidden=(24, 16))
    variables = jax.jit(network.init)(jax.random.key(5), jnp.zeros((1, SIDE, SIDE, 1)))
    jm.transfer.save_pretrained(path, variables, network=network)


def rank(place, *flags, sources):
    sources = [str(source) for source in sources]
    assert main(["rank", *sources, "--target", f"folder:{place / 'noisy'}", *flags]) == 0


@pytest.mark.nightly
def test_an_informative_source_ranks_above_a_random_one(place, simple_shot, tmp_path, capsys):
    random_file(tmp_path / "random.safetensors")
    sources = [tmp_path / "random.safetensors", place / "prototypical", simple_shot]
    flags = ["--shots", "5", "--fine-tune", "--steps", "20", "--json", str(tmp_path / "ranking.json")]
    rank(place, *flags, sources=sources)
    ranking = read_json(tmp_path / "ranking.json")
    assert [row["source"] for row in ranking["sources"]][-1] == str(sources[0])
    by_name = {row["source"]: row for row in ranking["sources"]}
    # Only the ordinary classifier has a head of its own classes.
    assert [by_name[str(source)]["leep"] is None for source in sources] == [True, True, False]
    accuracies = [by_name[str(source)]["accuracy"] for source in sources]
    assert accuracies[0] < min(accuracies[1:])
    assert ranking["correlations"]["log_me"]["pearson"] > 0.5
    assert ranking["shrinkage"] is None
    table = capsys.readouterr().out
    assert "weighted kendall" in table
    assert [line.split()[0] for line in table.splitlines() if line.startswith("/")] == [
        row["source"] for row in ranking["sources"]
    ]


def test_leep_uses_the_probabilities_of_the_source_s_head(place, tmp_path):
    for name in ("a", "b"):
        torchvision_file(tmp_path / f"{name}.safetensors")
    flags = ["--score", "leep", "--size", "32", "--shots", "3", "--json", str(tmp_path / "r.json")]
    rank(place, *flags, sources=[tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    ranking = read_json(tmp_path / "r.json")
    target = read_target(f"folder:{place / 'noisy'}", {}, None, KEY, size=32, channels=3)
    learn = target.batch(split_shots(target, 3, jax.random.fold_in(KEY, 0)).learn)
    x = (learn.x / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    loaded = jm.transfer.load_pretrained(tmp_path / "a.safetensors")
    probs = jax.nn.softmax(jax.jit(loaded.network.apply)(loaded.variables, x.astype(np.float32)))
    assert ranking["sources"][0]["leep"] == pytest.approx(jm.transfer.leep(probs, learn.y), abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["nowhere"], "SOURCE: nowhere does not exist"),
        (["--target", "folder:{place}/nowhere"], "--target: {place}/nowhere does not exist"),
        (["--target", "sinusoid"], "--target: sinusoid has no labelled images"),
        (["--target", "omniglotte"], "--target: there is no 'omniglotte'; known are omniglot"),
        (["--target", "folder:"], "--target: "),
        (["--target", "folder:{place}/one"], "has 1 class; it must have at least 2"),
        (["--target", "mnist"], "--data: mnist is read from your own copy"),
        (["--data", "{place}"], "--data: folder:{place}/standing does not have this setting"),
        (["--protocol", "lake"], "--protocol: is a setting of omniglot, not of transfer"),
        (["--shots", "10"], "--shots: got 10, but the class 'bar 0'"),
        (["--shots", "0"], "--shots: got 0; it must be at least 1"),
        (["--shots", "many"], "--shots: got many; it must be"),
        (["--recipe", "fine-tune", "--train", "body/Conv_9"], "--train: 'body/Conv_9' matches nothing"),
        (["--recipe", "distil"], "--recipe"),
        (["--recipe", "linear-probe", "--steps", "5"], "--steps: linear-probe does not have this setting"),
        (["--recipe", "gradual", "--train", "head"], "--train: gradual does not have this setting"),
        (["--recipe", "gradual", "--steps", "5"], "--steps: got 5; gradual needs at least 50"),
        (["--steps", "0"], "--steps: got 0; it must be at least 1"),
        (["--rate", "nan"], "--rate: got nan"),
        (["--size", "9"], "--size: {place}/prototypical does not take grey images of 9×9"),
        (["--channels", "3"], "--channels: {place}/prototypical does not take colour images"),
        (["--network", "conv4"], "--network: got conv4, but {place}/prototypical names its network"),
        (["--pixels", "imagenet"], "--pixels: got 3 values for images of shape ("),
        (["none"], "--network: is missing; SOURCE none needs one"),
        (["none", "--recipe", "lp-ft", "--network", "conv4"], "--recipe: got lp-ft"),
        (["none", "--network", "lrua"], "--network: there is no 'lrua'"),
        (
            ["none", "--network", "conv4"],
            "--size: got images of 8×8; they must be at least",
        ),
        (["--out", "{place}"], "--out: {place} exists and is not empty"),
        (["--recepi", "x"], "transfer has no --recepi; did you mean --recipe"),
        (["--image-size", "8"], "transfer has no --image-size; here it is --size"),
        (["--seed", "-1"], "--seed: got -1; it must be at least 0"),
        (["--label", "kind"], "--label: is a setting of tfds:NAME, not of transfer"),
        (["--target", "quadratics"], "--target: quadratics has no labelled images"),
        (["--target", "glyphs", "--shots", "all"], "--shots: got all, but glyphs draws any number"),
    ],
)
def test_invalid_flags_of_transfer_are_errors_that_name_the_flag(
    place, tmp_path, monkeypatch, capsys, flags, expected
):
    monkeypatch.chdir(tmp_path)
    (place / "one").mkdir(exist_ok=True)
    if not (place / "one" / "bar 0").exists():
        draw_bars(place / "one", 1, 3)
    arguments = [flag.format(place=place) for flag in flags]
    source = [] if not arguments[0].startswith("-") else [str(place / "prototypical")]
    target = [] if "--target" in arguments else ["--target", f"folder:{place / 'standing'}"]
    capsys.readouterr()
    assert main(["transfer", *source, *arguments, *target]) == 2
    error = capsys.readouterr().err
    assert expected.format(place=place) in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_run_on_data_other_than_images_is_an_error(place, tmp_path, capsys):
    shutil.copytree(place / "prototypical", tmp_path / "run")
    config = read_json(tmp_path / "run" / "config.json") | {"images": None, "tasks": {"name": "sinusoid"}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    transfer(place, tmp_path / "out", source=tmp_path / "run", status=2)
    assert "was trained on sinusoid, which are not images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--score", "leep"], "--score: leep needs a head of the source's own classes; {place}/prototypical"),
        (["--rate", "0.1"], "--rate: applies to --fine-tune only"),
        (["{place}/copy"], "SOURCES: got {place}/copy; give two or more"),
        (["{place}/copy", "none"], "SOURCES: got none, which has no trained parameters"),
        (["{place}/copy", "nowhere"], "SOURCES: nowhere does not exist"),
        (["--json", "nowhere/table.json"], "--json: the folder"),
    ],
)
def test_invalid_flags_of_rank_are_errors_that_name_the_flag(place, capsys, flags, expected):
    arguments = [flag.format(place=place) for flag in flags]
    sources = [] if not arguments[0].startswith("-") else [str(place / "prototypical"), str(place / "copy")]
    target = ["--target", f"folder:{place / 'standing'}"]
    capsys.readouterr()
    assert main(["rank", *sources, *arguments, *target]) == 2
    error = capsys.readouterr().err
    assert expected.format(place=place) in error
    assert len(error.splitlines()) == 1


@pytest.mark.nightly
def test_usps_digits_are_learned_from_a_run(place, tmp_path, data_folder):
    """Images are resized to the 8×8 of the run."""
    flags = ["--data", str(data_folder), "--shots", "5", "--steps", "60", "--rate", "0.01"]
    report = transfer(place, tmp_path / "out", *flags, target="usps")
    assert (report["classes"], report["learned_from"], report["scored"]) == (10, 50, 1957)
    assert report["images"]["size"] == SIDE
    assert report["accuracy"]["mean"] > 0.4
    assert set(report["recalls"]) == set("0123456789")


OWN_TARGET = """
import jaxmeta as jm


def bars(split, *, ways: int = 5, shots: int = 1, queries: int = 1, size: int = 8, folder: str = {folder!r}):
    return jm.tasks.from_folder(
        folder, split, classes=None, ways=ways, shots=shots, queries=queries, size=size
    )


def waves(split, *, shots: int = 5):
    return jm.tasks.sinusoid(split, shots=shots)


def streamed(split, *, ways: int = 5):
    return jm.tasks.quadratics(split)


def hungry(split, *, ways: int, depth: int):
    raise AssertionError
"""


@pytest.fixture
def own(place, tmp_path, monkeypatch):
    """Return the working folder, which has a user-defined module."""
    (tmp_path / "own_bars.py").write_text(OWN_TARGET.format(folder=str(place / "standing")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_bars", None)


def test_a_target_can_be_a_user_defined_function(place, own):
    flags = ["--recipe", "feature-extraction", "--shots", "5"]
    report = transfer(place, own / "out", *flags, target="own_bars:bars")
    assert (report["classes"], report["learned_from"], report["scored"]) == (5, 25, 25)
    assert set(report["recalls"]) == set("01234")
    report = transfer(place, own / "other", *flags, "--folder", str(place / "noisy"), target="own_bars:bars")
    assert report["classes"] == 8


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("waves", "own_bars:waves has no labelled images"),
        ("streamed", "got regression tasks of 'quadratics'"),
        ("hungry", "own_bars:hungry needs --depth; add it"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_user_defined_functions_without_labelled_images_are_errors(place, own, capsys, name, expected):
    transfer(place, own / "out", target=f"own_bars:{name}", status=2)
    error = capsys.readouterr().err
    assert "--target: " in error
    assert expected in error


def test_a_run_with_user_defined_code_is_a_source_without_that_code(place, tmp_path):
    shutil.copytree(place / "prototypical", tmp_path / "run")
    config = read_json(tmp_path / "run" / "config.json")
    config["tasks"]["name"] = "not_here:tasks"
    config["own"] = {"not_here:tasks": "0"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    flags = ["--recipe", "feature-extraction", "--shots", "5"]
    report = transfer(place, tmp_path / "out", *flags, source=tmp_path / "run")
    assert "prototypical on not_here:tasks" in report["about"]["source"]


def test_a_run_without_a_described_network_needs_the_flag(place, tmp_path, capsys):
    shutil.copytree(place / "prototypical", tmp_path / "run")
    config = read_json(tmp_path / "run" / "config.json") | {"model": None}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    flags = ["--recipe", "feature-extraction", "--shots", "5"]
    transfer(place, tmp_path / "none", *flags, source=tmp_path / "run", status=2)
    assert "does not name its network" in capsys.readouterr().err
    transfer(place, tmp_path / "out", *flags, "--network", "conv4-32", source=tmp_path / "run")


def test_a_run_of_an_older_format_is_an_error(place, tmp_path, capsys):
    shutil.copytree(place / "prototypical", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"learner": "prototypical"}')
    transfer(place, tmp_path / "out", source=tmp_path / "run", status=2)
    assert "SOURCE: " in (error := capsys.readouterr().err)
    assert "older" in error
    assert not (tmp_path / "out").exists()


def test_a_figure_that_fails_does_not_stop_the_transfer(place, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(transferring, "plot_confusion", fail)
    flags = ["--recipe", "feature-extraction", "--shots", "5"]
    report = transfer(place, tmp_path / "out", *flags)
    assert "no fonts" in capsys.readouterr().err
    assert report["accuracy"]["mean"] > 0
    assert (tmp_path / "out" / "weights.safetensors").is_file()


def test_keep_statistics_keeps_those_of_the_source(place, tmp_path):
    flags = ["--recipe", "lp-ft", "--steps", "3", "--shots", "5", "--keep-statistics"]
    report = transfer(place, tmp_path / "out", *flags)
    written, source = load_file(tmp_path / "out" / "weights.safetensors"), body_of(place / "prototypical")
    same = {path for path, leaf in source.items() if np.array_equal(written[path], leaf)}
    assert same == {path for path in source if path.startswith("batch_stats")}
    assert report["keep_statistics"]
    assert "; kept |" in (tmp_path / "out" / "report.md").read_text()


def test_keep_statistics_needs_a_recipe_that_trains_the_backbone(place, tmp_path, capsys):
    for recipe in ("linear-probe", "scratch"):
        flags = ["--recipe", recipe, "--keep-statistics"]
        transfer(place, tmp_path / "out", *flags, status=2)
        assert f"--keep-statistics: {recipe} does not have this setting" in capsys.readouterr().err


def test_lp_ft_at_a_tiny_rate_scores_as_its_probe(place, tmp_path):
    flags = ["--recipe", "lp-ft", "--shots", "5", "--steps", "60", "--rate", "1e-9"]
    report = transfer(place, tmp_path / "out", *flags)
    assert report["accuracy"]["mean"] == pytest.approx(report["probe_accuracy"]["mean"], abs=0.05)


# --- Stopped transfers, and failures to write ----------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "flags"),
    [
        (signal.SIGINT, ["--recipe", "fine-tune", "--steps", "40"]),
        pytest.param(signal.SIGTERM, ["--recipe", "gradual", "--steps", "50"], marks=pytest.mark.nightly),
    ],
)
def test_a_stopped_transfer_keeps_its_weights_and_prints_its_command(
    place, tmp_path, monkeypatch, capsys, number, flags
):
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    show = transferring._Progress.report

    def stopping(progress, step, loss):
        show(progress, step, loss)
        if step >= 20:
            signal.raise_signal(number)

    flags += ["--shots", "5"]
    with monkeypatch.context() as patching:
        patching.setattr(transferring._Progress, "report", stopping)
        transfer(place, tmp_path / "out", *flags, status=75)
    assert {signum: signal.getsignal(signum) for signum in before} == before
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert f"by {number.name}; after step 20 of " in message
    assert not (tmp_path / "out" / "report.json").exists()
    kept = read_json(tmp_path / "out" / "config.json")
    assert (kept["stopped_at"], kept["command"]) == (20, "transfer")

    whole = transfer(place, tmp_path / "whole", *flags)
    # The weights are neither those at the start nor those at the end.
    source = body_of(place / "prototypical")
    stopped, ended = (load_file(tmp_path / name / "weights.safetensors") for name in ("out", "whole"))
    assert stopped.keys() == ended.keys()
    assert not np.array_equal(stopped["params/head/kernel"], ended["params/head/kernel"])
    assert any(not np.array_equal(stopped[path], leaf) for path, leaf in source.items())

    command = shlex.split(message.split("start again with: ")[1])
    assert command == shlex.split(whole["command"])
    assert main([*command[1:], "--out", str(tmp_path / "again")]) == 0
    assert read_json(tmp_path / "again" / "report.json")["accuracy"] == whole["accuracy"]
    # The stopped transfer is a source, whose description says so.
    flags = ["--recipe", "feature-extraction", "--shots", "5"]
    report = transfer(place, tmp_path / "on", *flags, source=tmp_path / "out")
    assert "stopped after step 20" in report["about"]["source"]


def test_a_transfer_stopped_after_training_has_its_weights(place, tmp_path, monkeypatch, capsys):
    def stopped(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(transferring, "_predictions", stopped)
    transfer(place, tmp_path / "out", "--recipe", "feature-extraction", "--shots", "5", status=75)
    assert f"by SIGINT; the weights are in {tmp_path / 'out'}" in capsys.readouterr().err
    assert load_file(tmp_path / "out" / "weights.safetensors")
    assert "stopped_at" not in read_json(tmp_path / "out" / "config.json")


def test_a_transfer_stopped_before_training_has_no_folder(place, tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(transferring, "read_target", stopped)
    transfer(place, tmp_path / "out", status=1)
    assert capsys.readouterr().err == "jaxmeta: stopped: interrupted\n"


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors", "report.json", "report.md"])
def test_a_file_that_cannot_be_written_does_not_stop_the_others(place, tmp_path, monkeypatch, capsys, name):
    def failing(write):
        def writing(path, *arguments, **settings):
            if path.name == name:
                raise OSError(28, "No space left on device")
            write(path, *arguments, **settings)

        return writing

    for function in ("write_json", "write_text", "save_pretrained"):
        monkeypatch.setattr(transferring, function, failing(getattr(transferring, function)))
    flags = ["--recipe", "feature-extraction", "--shots", "5"]
    transfer(place, tmp_path / "out", *flags, status=1)
    printed = capsys.readouterr()
    assert f"{name} could not be written (No space left on device)" in printed.err
    assert "accuracy  " in printed.out
    written = {"config.json", "weights.safetensors", "report.json", "report.md", "confusion.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written - {name}


def test_written_weights_are_read_back(place, probed, tmp_path):
    variables = jm.transfer.load_pretrained(probed[0]).variables
    body = {path: tree for path, tree in variables["params"].items() if path != "head"}
    split = {"params": {"body": body, "head": variables["params"]["head"]}}
    split["batch_stats"] = {"body": variables["batch_stats"]}
    transferring._read_back(probed[0] / "weights.safetensors", split)
    other = {**split, "params": jax.tree.map(lambda leaf: leaf + 1, split["params"])}
    with pytest.raises(OSError, match=r"after reading it back, params/\S+ differs"):
        transferring._read_back(probed[0] / "weights.safetensors", other)


def test_rankings_that_cannot_be_written_are_printed(place, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transferring, "write_json", full)
    flags = [
        "--target",
        f"folder:{place / 'standing'}",
        "--shots",
        "5",
        "--json",
        str(tmp_path / "ranks.json"),
    ]
    assert main(["rank", str(place / "prototypical"), str(place / "copy"), *flags]) == 1
    printed = capsys.readouterr()
    assert "ranks.json could not be written" in printed.err
    assert "log_me" in printed.out


# --- Names of architectures -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "resnet18",
            "st.save_file(torchvision.models.resnet18(weights='DEFAULT').state_dict(), 'resnet18.safe",
        ),
        ("vit_b_16", "torchvision.models.vit_b_16(weights='DEFAULT')"),
        ("resnet50.a1_in1k", "Give timm's weights as hf:timm/resnet50.a1_in1k, or "),
        ("resnet14t", "Weights of a ResNet, SqueezeNet, ViT, DINOv2 or CLIP from"),
        ("vit_base_patch16_224", "timm.create_model('vit_base_patch16_224', pretrained=True)"),
        ("deit_tiny_patch16_224.fb_in1k", "hf:timm/deit_tiny_patch16_224.fb_in1k"),
        ("clip", "Give hf:openai/clip-vit-base-patch32, or write it to a folder: python -c"),
        ("siglip_base", "Weights of a ResNet, SqueezeNet, ViT, DINOv2 or CLIP from"),
        ("squeezenet1_1", "torchvision.models.squeezenet1_1(weights='DEFAULT')"),
        ("dinov2_vits14_reg", "torch.hub.load('facebookresearch/dinov2', 'dinov2_vits14_reg')"),
        ("convnext_tiny", "in a .safetensors file"),
        ("DINOv2", "Give hf:facebook/dinov2-small, or write it"),
        ("conv4", "to use it untrained, give none with --network conv4"),
        ("resnet12", "none with --network resnet12"),
        ("runs/resnet18", "Hub, give hf:owner/name"),
        ("resnet18.safetensors", "Hub, give hf:owner/name"),
        ("maml-folder", "Hub, give hf:owner/name"),
    ],
)
def test_names_of_architectures_give_advice_on_their_weights(source, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^source: {source} does not exist; ") as error:
        load_backbone(source)
    assert expected in str(error.value)
    named = "is the name of an architecture" in str(error.value)
    assert named == (not any(text in expected for text in ("Hub, give", "none with")))


@pytest.mark.parametrize("source", ["resnet18", "vit_base_patch16_224", "squeezenet1_1", "dinov2_vitb14"])
def test_the_command_that_saves_weights_is_valid_python(source):
    with pytest.raises(ValueError, match="python -c") as error:
        load_backbone(source)
    command = re.search('python -c "(.*?)"', str(error.value))[1]
    compile(command, "command", "exec")
    assert f"{source}.safetensors" in command
