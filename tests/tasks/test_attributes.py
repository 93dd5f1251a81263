"""Tests of CUB's attributes in a small copy of the official layout, and of zero-shot tasks with them."""

import numpy as np
import pytest
from draws import drawn, png

import jaxmeta as jm
from jaxmeta.tasks import cub, cub_attributes, cub_split, from_arrays

pytestmark = pytest.mark.usefixtures("cache")
NAMES = [f"{number:03d}.Bird_{number % 7}" for number in range(1, 201)]
# Percentages, as in the official file.
PERCENT = np.random.default_rng(0).integers(0, 10_001, (200, 312)) / 100
TABLE = "attributes/class_attribute_labels_continuous.txt"


@pytest.fixture
def tables(tmp_path):
    """Write CUB_200_2011 without its images."""
    root = tmp_path / "CUB_200_2011"
    (root / "attributes").mkdir(parents=True)
    (root / "images").mkdir()
    images = [
        f"{name}/Bird_{image:04d}_{number}.png" for number, name in enumerate(NAMES) for image in (0, 1)
    ]
    labels = np.repeat(np.arange(1, 201), 2)
    lists = {
        "classes.txt": [f"{i} {name}" for i, name in enumerate(NAMES, 1)],
        "images.txt": [f"{i} {path}" for i, path in enumerate(images, 1)],
        "image_class_labels.txt": [f"{i} {label}" for i, label in enumerate(labels, 1)],
        "../attributes.txt": [f"{i} has_part::kind_{i}_(or_so)" for i in range(1, 313)],
        TABLE: [" ".join(f"{value:.6f}" for value in row) for row in PERCENT],
    }
    for name, lines in lists.items():
        (root / name).write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def data(tables):
    """Write CUB_200_2011 with two images per class, whose colour encodes class and image."""
    for number, name in enumerate(NAMES):
        (tables / "images" / name).mkdir()
        for image in range(2):
            pixels = np.full((4, 4, 3), (number, 40 * image, 7), np.uint8)
            (tables / "images" / name / f"Bird_{image:04d}_{number}.png").write_bytes(png(pixels))
    return tables


def test_attributes_of_each_class_are_its_percentages_as_fractions(tables, tmp_path):
    attributes = cub_attributes(tables)
    assert list(attributes) == NAMES
    for name, percent in zip(NAMES, PERCENT, strict=True):
        assert (attributes[name].shape, attributes[name].dtype) == ((312,), np.float32)
        np.testing.assert_allclose(attributes[name], percent / 100, atol=1e-6)
    (tmp_path / "attributes.txt").rename(tables / "attributes.txt")
    assert list(cub_attributes(str(tables / "images"))) == NAMES
    (tables / "attributes.txt").unlink()
    assert list(cub_attributes(tables)) == NAMES


def test_zero_shot_support_has_the_attributes_of_the_classes(data):
    tasks = cub("test", ways=50, shots=0, queries=2, data=data, size=4)
    assert (tasks.card.tasks, tasks.card.ways, tasks.card.shots, tasks.card.classes) == ("cub", 50, 0, 50)
    assert tasks.card.split_hash == cub_split(NAMES).hash
    support, query = drawn(tasks)
    assert support.x.shape == (50, 312)
    numbers = np.rint(255 * query.x[:, 0, 0, 0]).astype(int)
    assert {NAMES[number] for number in numbers} == set(cub_split(NAMES).test)
    np.testing.assert_allclose(support.x[query.y], PERCENT[numbers] / 100, atol=1e-6)
    with_images = cub("test", ways=50, shots=1, queries=1, data=data, size=4)
    assert drawn(with_images).support.x.shape == (50, 4, 4, 3)


def test_zero_shot_tasks_of_features_with_a_custom_split(tables):
    """Published zero-shot results use image features instead of images."""
    features = np.random.default_rng(1).normal(size=(600, 1024)).astype(np.float32)
    labels = np.repeat(NAMES, 3)
    split = jm.tasks.ClassSplit(tuple(NAMES[:100]), tuple(NAMES[100:150]), tuple(NAMES[150:]))
    tasks = from_arrays(
        features,
        labels,
        ways=50,
        shots=0,
        queries=2,
        split="test",
        classes=split,
        metadata=cub_attributes(tables),
    )
    support, query = drawn(tasks)
    assert (support.x.shape, query.x.shape) == ((50, 312), (100, 1024))
    known = {row.tobytes(): number // 3 for number, row in enumerate(features)}
    numbers = [known[row.tobytes()] for row in query.x]
    assert set(numbers) == set(range(150, 200))
    np.testing.assert_allclose(support.x[query.y], PERCENT[numbers] / 100, atol=1e-6)


@pytest.mark.parametrize("name", ["classes.txt", TABLE])
def test_a_missing_table_is_an_error_only_in_zero_shot_tasks(name, data):
    (data / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"data: .*{name} does not exist; data must be"):
        cub_attributes(data)
    with pytest.raises(FileNotFoundError, match=r"data: .* does not exist"):
        cub("test", shots=0, data=data, size=4)
    cub("test", ways=2, shots=1, queries=1, data=data, size=4)


@pytest.mark.parametrize(
    ("name", "corrupt", "message"),
    [
        (TABLE, lambda lines: lines[:-1], r"must have 200 lines, one per class, got 199"),
        (
            TABLE,
            lambda lines: [*lines[:4], lines[4] + " 1", *lines[5:]],
            r"line 5 of .* 312 numbers, got 313",
        ),
        (TABLE, lambda lines: ["x" + lines[0], *lines[1:]], r"must hold numbers only \(could not convert"),
        (TABLE, lambda lines: ["nan" + lines[0][lines[0].index(" ") :], *lines[1:]], "must hold percentages"),
        (
            TABLE,
            lambda lines: ["-1" + lines[0][lines[0].index(" ") :], *lines[1:]],
            r"0 to 100, got -1\.0 to",
        ),
        (
            "classes.txt",
            lambda lines: lines[1:],
            r"classes.txt must have 200 lines, numbered 1 to 200, got 199",
        ),
        (
            "classes.txt",
            lambda lines: [*lines[:-1], "201" + lines[-1].removeprefix("200")],
            r"line 200 of .*classes.txt must start with 200, got '201'",
        ),
        ("classes.txt", lambda lines: [*lines[:-1], "200"], r"must list 200 distinct names, got 199"),
        ("classes.txt", lambda lines: [*lines[:-1], f"200 {NAMES[0]}"], r"200 distinct names, got 199"),
        (
            "../attributes.txt",
            lambda lines: lines[:-1],
            r"attributes.txt must have 312 lines, numbered 1 to 312, got 311",
        ),
    ],
)
def test_invalid_tables_are_refused(name, corrupt, message, tables):
    path = tables / name
    path.write_text("\n".join(corrupt(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=r"data: .*" + message):
        cub_attributes(tables)
