"""Tests of the published splits against other sources, and of tasks from the usual folder layouts."""

import csv
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from draws import drawn
from PIL import Image

from jaxmeta.tasks import official
from jaxmeta.tasks.official import (
    cifar_fs,
    cifar_fs_split,
    cub,
    cub_split,
    mini_imagenet,
    mini_imagenet_split,
)
from jaxmeta.tasks.splits import PARTS

# CIFAR-100's 20 superclasses of five classes, as listed on its page (Krizhevsky 2009).
TABLE = """
    beaver dolphin otter seal whale                     aquarium_fish flatfish ray shark trout
    orchid poppy rose sunflower tulip                   bottle bowl can cup plate
    apple mushroom orange pear sweet_pepper             clock keyboard lamp telephone television
    bed chair couch table wardrobe                      bee beetle butterfly caterpillar cockroach
    bear leopard lion tiger wolf                        bridge castle house road skyscraper
    cloud forest mountain plain sea                     camel cattle chimpanzee elephant kangaroo
    fox porcupine possum raccoon skunk                  crab lobster snail spider worm
    baby boy girl man woman                             crocodile dinosaur lizard snake turtle
    hamster mouse rabbit shrew squirrel                 maple_tree oak_tree palm_tree pine_tree willow_tree
    bicycle bus motorcycle pickup_truck train           lawn_mower rocket streetcar tank tractor
"""
SUPERCLASSES = TABLE.split()

pytestmark = pytest.mark.usefixtures("cache")

MINI = sorted(name for part in PARTS for name in mini_imagenet_split().part(part))
CUB = [f"{number:03d}.Bird_{number % 7}" for number in range(1, 201)]


def colour(number, image):
    return number, 40 * image, 7


def png(number, image, side=4):
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour(number, image)).save(file, "PNG")
    return file.getvalue()


def fill(root, names, per_class):
    """Write class folders to `root`; image j of class i has a colour that encodes i and j."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for image in range(per_class):
            (root / name / f"{name}_{image}.JPEG").write_bytes(png(number, image))


def colours(tasks):
    """Return the set of colours of the images of an episode."""
    task = drawn(tasks)
    x = np.concatenate([task.support.x, task.query.x])
    assert (x == x[:, :1, :1]).all()
    return {tuple(np.rint(255 * pixel).astype(int).tolist()) for pixel in x[:, 0, 0]}


def expected_colours(names, chosen, images):
    return {colour(names.index(name), image) for name in chosen for image in images}


# --- the splits -------------------------------------------------------------------------------------------


def test_cifar_fs_has_all_classes_of_cifar_100():
    split = cifar_fs_split()
    assert split.sizes == (64, 16, 20)
    assert len(set(SUPERCLASSES)) == 100
    assert {*split.train, *split.validation, *split.test} == set(SUPERCLASSES)
    assert split.hash == "d80bd0a31abe220ab8d63eb801f9e1f795475df9195418359bf57cf0a7068187"


def test_mini_imagenet_has_100_classes_of_wordnet_ids():
    split = mini_imagenet_split()
    assert split.sizes == (64, 16, 20)
    assert len(set(MINI)) == 100
    assert all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in MINI)
    assert split.hash == "a3efbbc0132b502049ad8fc2a7146236d24f91ab10bf207e15559657927bb107"


def test_cub_split_follows_the_order_of_the_folders():
    split = cub_split(reversed(CUB))
    for index, name in enumerate(sorted(CUB)):
        part = "train" if index % 2 == 0 else "validation" if index % 4 == 1 else "test"
        assert name in split.part(part)
    assert split.sizes == (100, 50, 50)
    with pytest.raises(ValueError, match=r"200 class folders, .*, got 199; missing numbers: 003$"):
        cub_split(CUB[:2] + CUB[3:])


# --- mini-ImageNet ------------------------------------------------------------------------------------------


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("inner", ["", "train", "ILSVRC/Data/CLS-LOC/train"])
def test_mini_imagenet_from_class_folders(tmp_path, monkeypatch, inner):
    root = tmp_path / "data" / inner
    fill(root, MINI, per_class=3 if inner else 2)
    monkeypatch.setattr(official, "_MINI_IMAGENET_IMAGES", 2)
    if inner:
        (root / "n00000001").mkdir()
        (root / "n00000001" / "n00000001_1.JPEG").write_bytes(b"never opened")
    tasks = mini_imagenet("test", ways=20, shots=1, queries=1, data=tmp_path / "data", size=4)
    assert colours(tasks) == expected_colours(MINI, mini_imagenet_split().test, (0, 1))
    assert tasks.card.split_hash == mini_imagenet_split().hash
    assert (tasks.card.tasks, tasks.card.classes) == ("mini_imagenet", 20)
    assert tasks.card.protocol.startswith("mini-ImageNet, class split of Ravi & Larochelle 2017")
    assert ("not the published choice of images" in tasks.card.protocol) == bool(inner)


def write_lists(data, per_class=2):
    """Write the common layout: all images in one folder, and three lists."""
    (data / "images").mkdir(parents=True)
    for part, name in (("train", "train.csv"), ("validation", "val.csv"), ("test", "test.csv")):
        rows = [
            (f"{label}0000{i}.jpg", label)
            for label in mini_imagenet_split().part(part)
            for i in range(per_class)
        ]
        with (data / name).open("w", newline="") as file:
            csv.writer(file).writerows([("filename", "label"), *rows])
        for i, (filename, label) in enumerate(rows):
            (data / "images" / filename).write_bytes(png(MINI.index(label), i % per_class))


def test_mini_imagenet_from_lists(tmp_path):
    write_lists(tmp_path / "data")
    (tmp_path / "data" / "images" / "not_listed.jpg").write_bytes(b"never opened")
    tasks = mini_imagenet("validation", ways=16, shots=1, queries=1, data=tmp_path / "data", size=4)
    assert colours(tasks) == expected_colours(MINI, mini_imagenet_split().validation, (0, 1))
    assert "not the published" not in tasks.card.protocol

    lists = tmp_path / "data" / "val.csv"
    content = lists.read_text()
    label = mini_imagenet_split().validation[0]
    for corrupted, message in [
        (
            content.replace(f",{label}", ",n00000001"),
            rf"not have the validation classes of Ravi .* n00000001, {label}",
        ),
        (
            content.replace("00001.jpg", "00007.jpg"),
            r"val.csv: 16 of 32 listed images do not exist .*00007.jpg', …",
        ),
        (content + content.splitlines()[1].replace(label, "x") + "\n", r"do not exist .*: line 34: "),
        (
            content.replace("filename", "colour"),
            r"val.csv has the columns 'colour', 'label' and no column for",
        ),
    ]:
        lists.write_text(corrupted)
        with pytest.raises(ValueError, match=message):
            mini_imagenet("test", data=tmp_path / "data")
    lists.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has the lists train.csv, test.csv, but no data for validation"
    ):
        mini_imagenet("test", data=tmp_path / "data")
    for name in ("train.csv", "test.csv"):
        (tmp_path / "data" / name).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has a folder images, but lacks train.csv, val.csv and test.csv"
    ):
        mini_imagenet("test", data=tmp_path / "data")


def test_the_error_for_pickles_of_mini_imagenet_describes_the_conversion(tmp_path):
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(b"never opened")
    with pytest.raises(
        ValueError, match=r"^data: .* holds pickles and no images; .*pickle\.load.*arrays:data\.npz"
    ):
        mini_imagenet("test", data=tmp_path)


@pytest.mark.parametrize("layout", ["parts", "lists in split", "json"])
def test_mini_imagenet_in_parts(tmp_path, layout):
    split, data = mini_imagenet_split(), tmp_path / "data"
    names = {"train": "base", "validation": "val", "test": "novel"}
    for part in PARTS:
        if layout == "parts":
            fill(data / {"validation": "val"}.get(part, part), split.part(part), per_class=2)
        else:
            fill(data / "images", split.part(part), per_class=2)
        rows = [(f"{label}/{label}_{i}.JPEG", label) for label in split.part(part) for i in range(2)]
        if layout == "lists in split":
            (data / "split").mkdir(exist_ok=True)
            with (data / "split" / f"{names[part]}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("filename", "label"), *rows])
        elif layout == "json":
            content = {"label_names": MINI, "image_names": [file for file, _ in rows]}
            content["image_labels"] = [MINI.index(label) for _, label in rows]
            (data / f"{names[part]}.json").write_text(json.dumps(content))
    actual = colours(mini_imagenet("validation", ways=16, shots=1, queries=1, data=data, size=4))
    # The colours encode the index of a class within its part.
    assert actual == expected_colours(list(split.validation), split.validation, (0, 1))


def test_an_incomplete_mini_imagenet_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data: .*nowhere is not a folder"):
        mini_imagenet("test", data=tmp_path / "nowhere")
    fill(tmp_path / "data", MINI, per_class=1)
    (tmp_path / "data" / MINI[7] / f"{MINI[7]}_0.JPEG").unlink()
    with pytest.raises(ValueError, match=rf"data: 1 of 100 class folders in .* hold no images: {MINI[7]}"):
        mini_imagenet("test", data=tmp_path / "data")
    (tmp_path / "data" / MINI[7]).rmdir()
    with pytest.raises(ValueError, match=rf"100 class folders .*, of which it lacks 1: {MINI[7]}$"):
        mini_imagenet("test", data=tmp_path / "data")
    (tmp_path / "data" / MINI[7]).mkdir()
    (tmp_path / "data" / MINI[7] / "a.jpg").write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=rf"data: 1 of 100 images .*{MINI[7]}/a.jpg.*; repair or remove them$"
    ):
        mini_imagenet("test", data=tmp_path / "data")


# --- CUB and CIFAR-FS ---------------------------------------------------------------------------------------


def test_cub_from_its_folder_or_its_folder_images(tmp_path):
    fill(tmp_path / "CUB_200_2011" / "images", CUB, per_class=2)
    (tmp_path / "CUB_200_2011" / "attributes").mkdir()
    for data in (tmp_path / "CUB_200_2011", tmp_path / "CUB_200_2011" / "images"):
        tasks = cub("test", ways=50, shots=1, queries=1, data=data, size=4)
        assert colours(tasks) == expected_colours(CUB, CUB[3::4], (0, 1))
    assert (tasks.card.tasks, tasks.card.split_hash) == ("cub", cub_split(CUB).hash)
    assert "Chen et al. 2019" in tasks.card.protocol
    with pytest.raises(ValueError, match=r"data: .*CUB_200_2011/attributes has no subfolders"):
        cub("test", data=tmp_path / "CUB_200_2011" / "attributes")
    (tmp_path / "CUB_200_2011" / "images" / CUB[0]).rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"data: .*images: folders must be .* got 199; .* 001$"):
        cub("test", data=tmp_path / "CUB_200_2011")


def test_cifar_fs_from_tensorflow_datasets(tmp_path):
    names = sorted(SUPERCLASSES)

    class Cifar100(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """A substitute with one training and one test image per class."""

        VERSION = tfds.core.Version("3.0.2")

        def _info(self):
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(32, 32, 3)),
                "label": tfds.features.ClassLabel(names=names),
                "coarse_label": tfds.features.ClassLabel(num_classes=20),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0), "test": self._generate_examples(1)}

        def _generate_examples(self, image):
            for number, name in enumerate(names):
                picture = png(number, image, side=32)
                yield number, {"id": f"{number}", "image": picture, "label": name, "coarse_label": 0}

    Cifar100(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    tasks = cifar_fs("test", ways=20, shots=1, queries=1, data=tmp_path / "tfds")
    assert colours(tasks) == expected_colours(names, cifar_fs_split().test, (0, 1))
    assert drawn(tasks).query.x.shape == (20, 32, 32, 3)
    assert (tasks.card.tasks, tasks.card.split_hash) == ("cifar_fs", cifar_fs_split().hash)
    assert "Bertinetto et al. 2019" in tasks.card.protocol
    with pytest.raises(ValueError, match="split: got 'val'"):
        cifar_fs("val", data=tmp_path / "tfds")


@pytest.mark.parametrize("place", ["", "data", "cifar100/data", "parts"])
def test_cifar_fs_from_images_in_folders(tmp_path, place):
    names, split = sorted(SUPERCLASSES), cifar_fs_split()
    if place == "parts":
        for part in PARTS:
            fill(tmp_path / {"validation": "val"}.get(part, part), split.part(part), per_class=2)
        names = list(split.test)
    else:
        fill(tmp_path / place, names, per_class=2)
    tasks = cifar_fs("test", ways=20, shots=1, queries=1, data=tmp_path)
    assert colours(tasks) == expected_colours(names, split.test, (0, 1))
    assert (tasks.card.tasks, tasks.card.split_hash) == ("cifar_fs", split.hash)
    if place == "parts":
        (tmp_path / "val" / split.validation[0]).rename(tmp_path / "train" / split.validation[0])
        with pytest.raises(
            ValueError, match=rf"not have the train classes of Bertinetto.* missing: {split.validation[0]}"
        ):
            cifar_fs("test", data=tmp_path)


def test_cub_from_lists(tmp_path):
    split = cub_split(CUB)
    for part, name in (("train", "base"), ("validation", "val"), ("test", "novel")):
        fill(tmp_path / "CUB_200_2011" / "images", split.part(part), per_class=2)
        files = [
            f"/home/a/CUB_200_2011/images/{label}/{label}_{i}.JPEG"
            for label in split.part(part)
            for i in (0, 1)
        ]
        labels = [CUB.index(label) for label in split.part(part) for _ in (0, 1)]
        content = {"label_names": CUB, "image_names": files, "image_labels": labels}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    tasks = cub("test", ways=50, shots=1, queries=1, data=tmp_path, size=4)
    assert colours(tasks) == expected_colours(list(split.test), split.test, (0, 1))
    assert tasks.card.split_hash == split.hash


@pytest.mark.parametrize("layout", ["folder", "inner folder", "archive"])
def test_cifar_fs_from_the_official_binary_files(tmp_path, monkeypatch, layout):
    """Two images per class, one in each file; a record is two labels and the red, green and blue planes."""
    monkeypatch.setattr(official, "_CIFAR_IMAGES", 200)
    names = sorted(SUPERCLASSES)
    root = (
        tmp_path / {"folder": ".", "inner folder": "cifar-100-binary", "archive": "cifar-100-binary"}[layout]
    )
    root.mkdir(exist_ok=True)
    for image, file in enumerate(("train.bin", "test.bin")):
        records = [
            bytes([0, number]) + b"".join(bytes([value]) * 1024 for value in colour(number, image))
            for number in range(100)
        ]
        (root / file).write_bytes(b"".join(records))
    if layout == "archive":
        with tarfile.open(tmp_path / "cifar-100-binary.tar.gz", "w:gz") as archive:
            archive.add(root, "cifar-100-binary")
        shutil.rmtree(root)
    tasks = cifar_fs("test", ways=20, shots=1, queries=1, data=tmp_path)
    assert colours(tasks) == expected_colours(names, cifar_fs_split().test, (0, 1))
    assert (tasks.card.tasks, tasks.card.split_hash) == ("cifar_fs", cifar_fs_split().hash)


def test_truncated_cifar_files_are_refused(tmp_path):
    (tmp_path / "train.bin").write_bytes(bytes(3074))
    with pytest.raises(ValueError, match=r"have 3074 bytes; CIFAR-100 has 184440000"):
        cifar_fs(data=tmp_path)
    (tmp_path / "train.bin").rename(tmp_path / "cifar-100-binary.tar.gz")
    with pytest.raises(ValueError, match=r"is not a complete cifar-100-binary\.tar\.gz"):
        cifar_fs(data=tmp_path)
