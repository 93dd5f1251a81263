"""Tests of class splits: disjoint, unambiguously hashed, reproducible."""

import re

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jaxmeta.checks import ArgumentError
from jaxmeta.tasks.episodes import from_arrays
from jaxmeta.tasks.splits import ClassSplit, class_split


@pytest.mark.parametrize(
    ("first", "second"), [("train", "validation"), ("train", "test"), ("validation", "test")]
)
def test_overlap_is_refused_and_named(first, second):
    with pytest.raises(ValueError, match=f"overlaps: 'owl' in both {first} and {second}"):
        ClassSplit(**{first: ("cat", "owl"), second: ("owl", "fox")})


def test_duplicates_and_bare_strings_are_refused():
    with pytest.raises(ValueError, match="repeats classes within train: 'cat'"):
        ClassSplit(train=("cat", "cat"))
    with pytest.raises((ValueError, TypeError), match="train"):  # TypeError where annotations are checked
        ClassSplit(train="cat")


def test_a_part_is_found_by_its_name_or_refused():
    split = ClassSplit(train=("a",), test=("b",))
    assert split.part("test") == ("b",)
    with pytest.raises(ValueError, match="split: got 'val'; it must be one of 'train', 'validation', 'test'"):
        split.part("val")
    with pytest.raises(ValueError, match=r"'validation', which has no classes.*train \(1\), test \(1\)"):
        split.part("validation")


def test_hash_depends_on_membership_alone():
    split = ClassSplit(train=("a", "b"), validation=("c",), test=("d",))
    assert split.hash == ClassSplit(train=("b", "a"), validation=("c",), test=("d",)).hash
    assert len(split.hash) == 64
    others = [
        ClassSplit(train=("a",), validation=("b", "c"), test=("d",)),
        ClassSplit(train=("ab",), validation=("c",), test=("d",)),
        ClassSplit(train=("a", "b"), validation=("d",), test=("c",)),
        ClassSplit(train=("a", "b"), validation=("c",)),
    ]
    assert len({split.hash, *(other.hash for other in others)}) == 5


def test_from_fractions_partitions_reproducibly():
    names = [f"c{i}" for i in range(103)]
    split = ClassSplit.from_fractions(names, (0.64, 0.16, 0.2), seed=3)
    assert split.sizes == (66, 16, 21)
    assert sorted(split.train + split.validation + split.test) == sorted(names)
    assert split == ClassSplit.from_fractions(names[::-1], (0.64, 0.16, 0.2), seed=3)
    assert split.hash != ClassSplit.from_fractions(names, (0.64, 0.16, 0.2), seed=4).hash


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.6, -0.1), (0.5, 0.2, 0.2)])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match="fractions: got "):
        ClassSplit.from_fractions(["a", "b"], fractions)


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match=r"counts: got \(1, 1, 1\); .* sum to the 2 classes"):
        ClassSplit.from_counts(["a", "b"], (1, 1, 1))


def test_assert_disjoint_counts_validation_as_seen():
    evaluation = ClassSplit(train=("x",), test=("a", "b"))
    ClassSplit(train=("c",), validation=("d",), test=("a",)).assert_disjoint(evaluation)
    for part in ("train", "validation"):
        with pytest.raises(ValueError, match=r"has seen 1 of the 2 test classes.*'a'"):
            ClassSplit(**{part: ("a", "c")}).assert_disjoint(evaluation)


def test_a_split_is_read_from_a_json_file(tmp_path):
    path, split = tmp_path / "split.json", ClassSplit(train=("a", "b"), test=("c", "d"))
    path.write_text('{"train": ["a", "b"], "test": ["c", "d"]}', encoding="utf-8")
    assert class_split(str(path)) == split
    x, y = np.zeros((8, 2), np.float32), list("abcdabcd")
    tasks = from_arrays(x, y, ways=2, shots=1, split="test", classes=str(path))
    assert (tasks.card.classes, tasks.card.split_hash) == (2, split.hash)
    for classes in (split, (1.0, 0.0, 0.0), None):
        assert class_split(classes) is classes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"got .*split\.json; it must be three fractions such as 0\.64,0\.16,0\.2, a JSON file"),
        ("{", r"split\.json is not a class split in JSON: "),
        ("[]", r'is not a class split in JSON: it holds \[\]; it must hold \{"train": \[names\], '),
        ("3", r"is not a class split in JSON: it holds 3 \(int\); it must hold"),
        ('{"training": ["a"]}', r"is not a class split in JSON: .*training"),
        ('{"train": "abc"}', r"is not a class split in JSON: train must be a sequence"),
        ('{"train": ["a"], "test": ["a"]}', r"is not a class split in JSON: .* overlaps"),
        ("[" * 100_000, r"is not a class split in JSON: it is nested too deeply"),
    ],
)
def test_invalid_split_files_are_refused(tmp_path, content, message):
    path = tmp_path / "split.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ArgumentError, match=message) as raised:
        class_split(str(path))
    assert raised.value.name == "classes"


def test_a_split_can_be_a_mapping_of_labels():
    x, y = np.arange(16, dtype=np.float32).reshape(8, 2), np.repeat([3, 10, 20, 7], 2)
    mapping = {"train": [3, 10], "test": np.array([20, 7])}
    split = ClassSplit(train=("3", "10"), test=("20", "7"))
    assert class_split(mapping) == split
    tasks = [
        from_arrays(x, y, ways=2, shots=1, split="test", classes=classes) for classes in (mapping, split)
    ]
    assert tasks[0].classes == tasks[1].classes == ("7", "20")
    assert tasks[0].card == tasks[1].card


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            {"training": ["a"]},
            r"got a mapping that is not a class split: part: got 'training'; it must be",
        ),
        ({"train": "ab"}, r"train must be a sequence of class names, got 'ab'"),
        ({"train": 3}, r"train must be a sequence of class names, got 3"),
        ({"train": ["a"], "test": ["a"]}, r"overlaps: 'a' in both train and test"),
        ({"a", "b"}, r"three fractions .* a JSON file \{.*\}, or in Python such a mapping or a .*ClassSplit"),
        (0.5, r"got 0\.5; it must be three fractions .* such a mapping or a jm\.tasks\.ClassSplit"),
        ({"train": ["z"]}, r"1 of 1 classes of split='train' have no examples: 'z'"),
    ],
)
def test_errors_for_invalid_class_splits_name_the_argument(classes, message):
    # The complete run checks types before the library does.
    with pytest.raises((ArgumentError, TypeCheckError)) as raised:
        from_arrays(np.zeros((4, 2), np.float32), list("abab"), ways=1, shots=1, classes=classes)
    if isinstance(raised.value, ArgumentError):
        assert raised.value.name == "classes"
        assert re.search(message, str(raised.value))
    else:
        assert "typechecking parameter 'classes'" in str(raised.value)


def test_a_split_by_name_takes_no_seed(tmp_path):
    x, y = np.zeros((8, 2), np.float32), list("abcdabcd")
    path = tmp_path / "split.json"
    path.write_text('{"train": ["a", "b"]}', encoding="utf-8")
    for classes in (ClassSplit(train=("a", "b")), str(path)):
        with pytest.raises(
            ArgumentError, match="split_seed: a class split by names needs none; leave it out"
        ):
            from_arrays(x, y, ways=2, shots=1, classes=classes, split_seed=1)


def test_without_a_class_split_all_parts_have_the_same_hash():
    # A run that trains on all classes is evaluated on the same ones, and its data have not changed.
    x, y = np.zeros((12, 2), np.float32), np.repeat([*"abcd"], 3)
    shape = {"ways": 2, "shots": 1, "queries": 1, "classes": None}
    train, test = (from_arrays(x, y, split=split, **shape).card for split in ("train", "test"))
    assert train.split_hash == test.split_hash
    other = from_arrays(x[:9], y[:9], split="test", **shape).card
    assert other.split_hash != test.split_hash
    split = from_arrays(x, y, split="train", **shape | {"classes": (0.5, 0.0, 0.5)}).card
    assert split.split_hash != train.split_hash
