"""Tests of npz files: episodes equal those of `from_arrays`, and invalid files raise errors."""

import io
import warnings

import numpy as np
import pytest
from draws import drawn

import jaxmeta as jm
from jaxmeta.tasks.array_files import read_npz
from jaxmeta.tasks.episodes import from_arrays
from jaxmeta.tasks.splits import ClassSplit

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (30, 6, 5), np.uint8)
Y = np.repeat(np.arange(10), 3)
NAMES = np.array([f"class {label}" for label in Y])


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def assert_same(tasks, expected):
    for actual, wanted in zip(drawn(tasks, 3), drawn(expected, 3), strict=True):
        np.testing.assert_array_equal(actual.x, wanted.x)
        np.testing.assert_array_equal(actual.y, wanted.y)


@pytest.mark.parametrize("labels", [Y, NAMES, Y[:, None], np.char.encode(NAMES, "utf-8"), Y.astype(np.uint8)])
@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels"), ("X", "Y")])
def test_episodes_equal_those_of_from_arrays(tmp_path, labels, names):
    path = save(tmp_path / "own.npz", **dict(zip(names, (X, labels), strict=True)))
    protocol = {"ways": 3, "shots": 1, "queries": 2, "split_seed": 4}
    plain = NAMES if labels.dtype.kind in "US" else Y
    tasks = jm.tasks.from_npz(path, "train", **protocol)
    expected = from_arrays(X[..., None], plain, **protocol, classes=(0.64, 0.16, 0.2), name="arrays:own.npz")
    assert tasks.card == expected.card
    assert_same(tasks, expected)


def test_float_images_and_features_keep_their_shape(tmp_path):
    for x in (
        RNG.random((30, 7)),
        RNG.random((30, 4, 4, 3)).astype(np.float16),
        RNG.random((30, 2, 3, 4, 5)),
    ):
        path = save(tmp_path / "own.npz", x=x, y=Y)
        tasks = drawn(jm.tasks.from_npz(path, ways=2, classes=None))
        assert tasks.support.x.shape[1:] == x.shape[1:]
        assert tasks.support.x.dtype == np.float32


PARTS = np.repeat(["train", "val", "test"], [15, 6, 9])


def test_disjoint_parts_form_the_class_split(tmp_path):
    split = ClassSplit(tuple("01234"), ("5", "6"), ("7", "8", "9"))
    keys = {
        f"{array}_{part}": values[part == PARTS]
        for part in ("train", "val", "test")
        for array, values in (("x", X), ("y", Y))
    }
    for arrays in (
        {"x": X, "y": Y, "split": PARTS},
        keys,
        {f"{p}_{a}": v for k, v in keys.items() for a, p in [k.split("_")]},
    ):
        path = save(tmp_path / "own.npz", **arrays)
        assert read_npz(path).split == split
        tasks = jm.tasks.from_npz(path, "test", ways=3, shots=1, queries=2)
        assert tasks.card.split_hash == split.hash
        assert_same(
            tasks, from_arrays(X[..., None], Y, ways=3, shots=1, queries=2, split="test", classes=split)
        )


def test_parts_that_share_classes_are_pooled(tmp_path):
    parts = np.tile(["train", "train", "test"], 10)
    path = save(tmp_path / "own.npz", x=X, y=Y, split=parts)
    assert read_npz(path).split is None
    assert read_npz(path).parts.tolist() == parts.tolist()
    with pytest.warns(UserWarning, match=r"own\.npz: train, test share classes, .* are pooled"):
        assert jm.tasks.from_npz(path, ways=3, queries=2).card.classes == 6
    path = save(tmp_path / "own.npz", x=X, y=Y, split=np.repeat("train", 30))
    with pytest.warns(UserWarning, match=r"own\.npz has a single part, train, which defines no split"):
        assert read_npz(path).parts is None


def test_parts_of_different_types_are_refused(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(
        path, x_train=np.zeros((4, 2), np.uint8), y_train=[0, 0, 1, 1], x_test=np.zeros((2, 2)), y_test=[0, 1]
    )
    with pytest.raises(ValueError, match="uint8 in some parts and floats in others"):
        read_npz(path)


def test_classes_with_too_few_examples_can_be_skipped(tmp_path):
    path = save(tmp_path / "own.npz", x=X[:-1], y=Y[:-1])
    with pytest.raises(ValueError, match=r"1 of 10 classes have fewer: 9 \(2\); .*skip_small_classes"):
        jm.tasks.from_npz(path, ways=2, queries=2, classes=None)
    with pytest.warns(
        UserWarning, match=r"1 of 10 classes of split='train' have fewer than 3 examples .*: 9 \(2\)"
    ):
        tasks = jm.tasks.from_npz(path, ways=2, queries=2, classes=None, skip_small_classes=True)
    assert tasks.card.classes == 9


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": X, "y": Y}, r"lacks x; it has a, y; write it with numpy\.savez"),
        ({"x": X}, "lacks y"),
        ({"z": X}, "lacks x and y"),
        ({"x": X, "y": Y[:-1]}, "has 30 examples x and 29 labels y"),
        (
            {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y[:3]},
            "30 examples x_test and 3 labels y_test",
        ),
        ({"x_train": X, "y_train": Y, "x_test": X}, "lacks y_test"),
        ({"x": X, "y": Y, "x_test": X, "y_test": Y}, "has x or y as well as arrays of the parts test"),
        (
            {"x_train": X, "y_train": Y, "x_test": X[:, :5], "y_test": Y},
            r"several shapes: \(5, 5, 1\), \(6, 5, 1\)",
        ),
        ({"x": X, "images": X, "y": Y}, "has several arrays for x, one of them images"),
        (
            {"x": X, "y": Y.astype(object)},
            r"y is an array of objects, stored as a pickle, .*y\.astype\(str\)",
        ),
        ({"x": X.astype(object), "y": Y}, r"x is an array of objects, .*numpy\.stack"),
        (
            {"x": X.astype(np.int64), "y": Y},
            r"x has type int64; it must be uint8 \(0 to 255\), such as x\.astype",
        ),
        ({"x": X > 9, "y": Y}, "x has type bool"),
        ({"x": X[:, 0, 0], "y": Y}, r"x has shape \(30,\)"),
        ({"x": RNG.random((30, 3, 8, 8)), "y": Y}, r"channels must come last: x\.transpose\(0, 2, 3, 1\)"),
        ({"x": X, "y": np.eye(10)[Y]}, r"y has shape \(30, 10\); .*y\.argmax\(1\)"),
        ({"x": X, "y": Y.astype(float)}, "y has type float64; labels must be integers or names"),
        ({"x": X, "y": np.where(Y == 3, "", NAMES)}, r"y\[9\] is an empty class name"),
        ({"x": X, "y": np.where(Y == 3, b"\xff", b"a")}, "y holds bytes that are not UTF-8"),
        (
            {"x": X, "y": Y, "split": np.where(Y < 5, "train", "hold")},
            r"split\[15\] is 'hold'; it must be 'train'",
        ),
        ({"x": X, "y": Y, "split": Y}, r"split has shape \(30,\) and type int64"),
        ({"x": X[:0], "y": Y[:0]}, "got no examples"),
    ],
)
def test_invalid_arrays_raise_errors_that_name_them(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message) as caught:
        jm.tasks.from_npz(save(tmp_path / "own.npz", **arrays))
    assert "\n" not in str(caught.value)


def content_of(function, array, **settings):
    file = io.BytesIO()
    function(file, array, **settings)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.npz", b"", "cannot be read as an npz file"),
        ("own.npz", b"PK\x03\x04 and more", "cannot be read as an npz file"),
        ("own.npz", b"\x80\x04]\x94.", r"is a pickle; .*pickle\.load"),
        ("own.npz", content_of(np.save, X), "it is a single array"),
        (
            "own.npy",
            content_of(np.save, X),
            r"holds a single array, and labels are needed too; .*numpy\.savez",
        ),
        ("own.npy", content_of(np.save, Y.astype(object)), "holds a single array"),
        ("cache.pkl", b"\x80\x04]\x94.", r"cache\.pkl is a pickle; .*numpy\.savez.*arrays:data\.npz"),
    ],
)
def test_errors_for_other_kinds_of_files_give_advice(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^path: .*{message}") as caught:
        jm.tasks.from_npz(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"path: .*none\.npz is not a file"):
        jm.tasks.from_npz(tmp_path / "none.npz")


def test_large_float_values_give_a_warning(tmp_path):
    path = save(tmp_path / "own.npz", x=X.astype(np.float32), y=Y)
    with pytest.warns(
        UserWarning, match=r"x has values up to 2\d\d; floating-point images should be in \[0, 1\]"
    ):
        jm.tasks.from_npz(path, ways=2, classes=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        jm.tasks.from_npz(save(path, x=X / 255, y=Y), ways=2)
