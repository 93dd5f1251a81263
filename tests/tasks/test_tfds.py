"""Tests of tensorflow-datasets sources: episodes compared with its own reader, the cache, and errors."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from configs import config_of
from draws import drawn, png
from PIL import Image

from jaxmeta.cli import main, sources
from jaxmeta.tasks import tfds as module
from jaxmeta.tasks.archives import read_archive, shrink
from jaxmeta.tasks.episodes import from_arrays
from jaxmeta.tasks.omniglot import EDITION
from jaxmeta.tasks.splits import ClassSplit
from jaxmeta.tasks.tfds import from_tfds, prepare_tfds

pytestmark = pytest.mark.usefixtures("cache")
NAMES = ["wren", "owl", "jay", "tit", "emu", "kea", "auk", "ibis"]


def builder_class(data_set, features, examples, supervised=None, version="1.0.0", registered=False):
    """Return a builder of in-memory examples, given as split -> list of features."""

    class Generated(tfds.core.GeneratorBasedBuilder, skip_registration=not registered):
        name = data_set
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=supervised
            )

        def _split_generators(self, dl_manager):
            if isinstance(examples, Exception):
                raise examples
            return {part: self._generate_examples(part) for part in examples}

        def _generate_examples(self, part):
            yield from enumerate(examples[part])

    return Generated


def write(data_dir, *args, **kwargs):
    builder = builder_class(*args, **kwargs)(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return builder


def as_tfds_reads(data_dir, name):
    """Return all examples in the order of the data set, decoded by tensorflow-datasets."""
    builder = tfds.builder(name, data_dir=data_dir)
    return [example for part in builder.info.splits for example in builder.as_data_source(part)]


def assert_same_episodes(tasks, expected, atol=0.0):
    for key in range(3):
        for a, b in zip(drawn(tasks, key), drawn(expected, key), strict=True):
            assert a.x.shape == b.x.shape
            np.testing.assert_allclose(a.x, b.x, rtol=0, atol=atol)
            np.testing.assert_array_equal(a.y, b.y)


def birds(per_class=4, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"image": png(rng.integers(0, 256, (9, 9, 3), np.uint8)), "kind": name, "n": 10 * i}
        for i, name in enumerate(NAMES)
        for _ in range(per_class)
    ]


FEATURES = {
    "image": tfds.features.Image(shape=(9, 9, 3)),
    "kind": tfds.features.ClassLabel(names=NAMES),
    "n": np.int64,
}


# --- episodes -------------------------------------------------------------------------------------------


def test_all_splits_are_pooled_by_class_name(tmp_path):
    write(tmp_path, "tiny_birds", FEATURES, {"train": birds(3), "test": birds(2, seed=1)})
    protocol = {"ways": 3, "shots": 2, "queries": 3, "classes": (0.5, 0.25, 0.25), "split_seed": 5}
    examples = as_tfds_reads(tmp_path, "tiny_birds")
    x, y = np.stack([e["image"] for e in examples]), np.array([NAMES[e["kind"]] for e in examples])
    tasks = from_tfds("tiny_birds", "train", **protocol, data=tmp_path)
    expected = from_arrays(x, y, split="train", **protocol, name="tfds:tiny_birds/1.0.0")
    assert tasks.card == expected.card
    assert_same_episodes(tasks, expected)
    assert "tensorflow" not in sys.modules

    prepared = prepare_tfds("tiny_birds:1.0.0", data=tmp_path)
    assert (prepared.classes, set(prepared.sizes), prepared.shape) == (tuple(sorted(NAMES)), {5}, (9, 9, 3))
    assert set(prepare_tfds("tiny_birds", data=tmp_path, tfds_splits="test").sizes) == {2}
    # Any integer feature can hold the class if named; grey images are the luma.
    grey = prepare_tfds("tiny_birds", data=tmp_path, label="n", channels=1, tfds_splits=["test", "train"])
    assert grey.classes == tuple(sorted(str(10 * i) for i in range(8)))
    assert grey.shape == (9, 9, 1)
    row = int(grey.rows_of(["20"])[0])
    first = next(e for e in as_tfds_reads(tmp_path, "tiny_birds")[24:] if e["n"] == 20)
    np.testing.assert_array_equal(grey.read([row])[0, :, :, 0], Image.fromarray(first["image"]).convert("L"))


def test_text_labels_name_the_classes_and_images_of_several_sizes_are_resized(tmp_path):
    rng = np.random.default_rng(0)
    shapes = [(12, 11), (8, 15), (20, 7)]
    examples = [
        {"picture": png(rng.integers(0, 256, shapes[i % 3], np.uint8)), "label": NAMES[i // 3]}
        for i in range(12)
    ]
    features = {"picture": tfds.features.Image(shape=(None, None, 1)), "label": tfds.features.Text()}
    write(tmp_path, "tiny_marks", features, {"train": examples})
    protocol = {"ways": 2, "shots": 1, "queries": 2, "classes": None}
    read = as_tfds_reads(tmp_path, "tiny_marks")
    x = [
        Image.fromarray(e["picture"][:, :, 0].astype(np.float32)).resize((7, 7), Image.Resampling.LANCZOS)
        for e in read
    ]
    x = np.clip(np.rint(np.stack([np.asarray(image) for image in x])), 0, 255).astype(np.uint8)[..., None]
    tasks = from_tfds("tiny_marks", **protocol, data=tmp_path)
    assert_same_episodes(tasks, from_arrays(x, [e["label"].decode() for e in read], **protocol))


def test_examples_read_in_several_blocks_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 7)
    write(tmp_path, "tiny_birds", FEATURES, {"a": birds(2), "b": birds(1, 1), "c": birds(3, 2)})
    read = as_tfds_reads(tmp_path, "tiny_birds")
    order = np.argsort([NAMES[e["kind"]] for e in read], kind="stable")
    prepared = prepare_tfds("tiny_birds", data=tmp_path)
    np.testing.assert_array_equal(prepared.read(range(len(read))), [read[i]["image"] for i in order])


@pytest.mark.nightly
def test_omniglot_as_a_custom_data_set_gives_the_same_episodes(tmp_path, data_folder):
    archive = data_folder / "omniglot" / "images_background.zip"
    if not archive.exists():
        pytest.skip(f"no {archive}")
    characters = EDITION.characters["background"]
    drawings = read_archive(archive, "background", characters)
    chosen = characters[::30]
    examples = [
        {"image": drawings[f"{name}/{drawer:02d}"], "name": name} for name in chosen for drawer in range(1, 7)
    ]
    features = {"image": tfds.features.Image(shape=(105, 105, 1)), "name": tfds.features.Text()}
    write(tmp_path, "some_characters", features, {"train": examples}, supervised=("image", "name"))
    split = ClassSplit(train=chosen[:20], test=chosen[20:])
    protocol = {"ways": 5, "shots": 1, "queries": 5, "split": "test", "classes": split}
    read = as_tfds_reads(tmp_path, "some_characters")
    ink = np.stack([e["image"][:, :, 0] == 0 for e in read])
    expected = from_arrays(255 - shrink(ink, 28)[..., None], [e["name"].decode() for e in read], **protocol)
    tasks = from_tfds("some_characters", **protocol, size=28, data=tmp_path)
    assert_same_episodes(tasks, expected, atol=1.01 / 255)


# --- the cache ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 9, 3), (None, None, 3)])
def test_a_second_call_reads_no_image(tmp_path, monkeypatch, shape):
    features = FEATURES | {"image": tfds.features.Image(shape=shape)}
    write(tmp_path, "tiny_birds", features, {"train": birds()})
    first = prepare_tfds("tiny_birds", data=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(module, "decode", None)
        patched.setattr(module._Pool, "read", None)
        assert prepare_tfds("tiny_birds", data=tmp_path) == first
    assert prepare_tfds("tiny_birds", data=tmp_path, size=5).shape == (5, 5, 3)
    write(tmp_path / "other", "tiny_birds", features, {"train": birds(seed=1)})
    assert prepare_tfds("tiny_birds", data=tmp_path / "other").folder != first.folder


# --- finding and preparing data sets --------------------------------------------------------------------


def test_an_older_version_on_disk_is_used_with_newer_code(tmp_path):
    write(tmp_path, "moved_birds", FEATURES, {"train": birds(2)})
    builder_class("moved_birds", FEATURES, {"train": birds(3)}, version="2.0.0", registered=True)
    assert prepare_tfds("moved_birds", data=tmp_path).name == "tfds:moved_birds/1.0.0"
    assert set(prepare_tfds("moved_birds:2.0.0", data=tmp_path).sizes) == {3}
    assert list(tmp_path.glob("moved_birds/2.0.0/*array_record*"))
    with pytest.raises(ValueError, match=r"name: 'moved_birds:3.0.0': .* cannot be loaded at version 3.0.0"):
        prepare_tfds("moved_birds:3.0.0", data=tmp_path)


def test_data_sets_that_need_tensorflow_are_refused_without_it(tmp_path):
    if importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed")
    examples = [{"image": np.zeros((9, 9, 3), np.uint8), "kind": "owl", "n": 0}]
    builder_class("array_birds", FEATURES, {"train": examples}, registered=True)
    with pytest.raises(
        ValueError, match=r"without TensorFlow; pip install tensorflow, or prepare it on another machine"
    ):
        prepare_tfds("array_birds", data=tmp_path)
    builder = write(tmp_path, "tiny_birds", FEATURES, {"train": birds(2)})
    info = builder.data_path / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match=r"prepare it in another folder with .*\"array_record\""):
        prepare_tfds("tiny_birds", data=tmp_path)


def test_a_failed_download_is_an_error_of_one_line(tmp_path):
    builder_class("far_birds", FEATURES, ConnectionError("no route\nto host"), registered=True)
    with pytest.raises(
        OSError, match=r"far_birds/1.0.0: .*\(ConnectionError: .*no route to host\); prepare"
    ) as raised:
        from_tfds("far_birds", data=tmp_path)
    assert "\n" not in str(raised.value)


# --- invalid data and settings --------------------------------------------------------------------------


def test_missing_features_and_splits_raise_errors_that_name_them(tmp_path):
    features = {"image": FEATURES["image"], "id": tfds.features.Text(), "back": tfds.features.Image()}
    picture = png(np.zeros((9, 9, 3), np.uint8))
    write(tmp_path, "plain", features, {"train": [{"image": picture, "id": "a", "back": picture}]})
    with pytest.raises(ValueError, match=r"plain/1.0.0 has no labels; pass .* image \(Image\)") as raised:
        prepare_tfds("plain", data=tmp_path)
    assert "id (Text)" in str(raised.value)
    with pytest.raises(ValueError, match=r"label: plain/1.0.0 has no label 'back'"):
        prepare_tfds("plain", data=tmp_path, label="back")
    with pytest.raises(ValueError, match=r"image: plain/1.0.0 has no image 'id'"):
        prepare_tfds("plain", data=tmp_path, label="id", image="id")
    assert prepare_tfds("plain", data=tmp_path, label="id", image="back").classes == ("a",)
    with pytest.raises(ValueError, match="tfds_splits must be distinct splits out of train, got 'test'"):
        prepare_tfds("plain", data=tmp_path, label="id", tfds_splits="test")


def test_examples_without_label_are_refused(tmp_path):
    write(tmp_path, "tiny_birds", FEATURES, {"train": birds(2), "test": [birds(1)[0] | {"kind": -1}]})
    with pytest.raises(
        ValueError,
        match=r"kind is missing in 1 of 17 examples \(in test\); pass the labelled splits as tfds_splits",
    ):
        prepare_tfds("tiny_birds", data=tmp_path)
    assert len(prepare_tfds("tiny_birds", data=tmp_path, tfds_splits=("train",))) == 16


def test_damaged_images_and_invalid_arguments_are_refused(tmp_path):
    write(tmp_path, "tiny_birds", FEATURES, {"train": [birds(1)[0] | {"image": b"gone"}]})
    with pytest.raises(ValueError, match=r"tiny_birds/1.0.0 train\[0\]: cannot be read as an image"):
        prepare_tfds("tiny_birds", data=tmp_path)
    with pytest.raises(ValueError, match="size: got 0; it must be at least 1"):
        prepare_tfds("tiny_birds", size=0)
    with pytest.raises(ValueError, match="channels: got 2; it must be one of 1, 3, None"):
        prepare_tfds("tiny_birds", channels=2)
    with pytest.raises(ValueError, match="split: got 'val'"):
        from_tfds("tiny_birds", "val")
    with pytest.raises(ValueError, match="no data set 'no_birds', and none is prepared in") as raised:
        prepare_tfds("no_birds", data=tmp_path)
    assert len(str(raised.value)) < 300


def test_a_source_reads_a_data_set_by_name(tmp_path, capsys):
    write(tmp_path, "little_birds", FEATURES, {"train": birds()})
    flags = {"ways": 2, "queries": 2, "classes": (0.5, 0.0, 0.5), "data": str(tmp_path)}
    card = sources.tasks_of(config_of(flags, tasks="tfds:little_birds"), "test").card
    assert (card.tasks, card.classes, card.ways) == ("tfds:little_birds/1.0.0", 4, 2)
    assert main(["train", "--tasks", "tfds:large_birds", "--data", str(tmp_path)]) == 2
    assert "no data set 'large_birds'" in capsys.readouterr().err


@pytest.mark.nightly
def test_the_command_line_reads_a_data_set_by_name(tmp_path, capsys):
    write(tmp_path / "sets", "little_birds", FEATURES, {"train": birds()})
    command = ["train", "--tasks", "tfds:little_birds", "--data", str(tmp_path / "sets"), "--network", "mlp"]
    command += ["--ways", "2", "--queries", "2", "--classes", "0.5,0,0.5", "--steps", "2", "--episodes", "4"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["card"]["tasks"] == "tfds:little_birds/1.0.0"
    assert report["card"]["classes"] == 4
    assert main(["train", "--tasks", "tfds:large_birds", "--data", str(tmp_path / "sets")]) == 2
    assert "no data set 'large_birds'" in capsys.readouterr().err
    assert main(["train", "--tasks", "mini_imagenet"]) == 2
    assert "add --data DIR" in capsys.readouterr().err
