"""Class splits: disjoint, hashed without ambiguity, reproducible."""

import pytest

from jaxmeta.tasks.splits import ClassSplit


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


def test_parts_are_found_by_name():
    split = ClassSplit(train=("a",), test=("b",))
    assert split.part("test") == ("b",)
    with pytest.raises(ValueError, match="split: got 'val'; it must be one of 'train', 'validation', 'test'"):
        split.part("val")
    with pytest.raises(ValueError, match=r"'validation' has no classes.*train \(1\), test \(1\)"):
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
    judged = ClassSplit(train=("x",), test=("a", "b"))
    ClassSplit(train=("c",), validation=("d",), test=("a",)).assert_disjoint(judged)
    for part in ("train", "validation"):
        with pytest.raises(ValueError, match=r"has seen 1 of the 2 test classes.*'a'"):
            ClassSplit(**{part: ("a", "c")}).assert_disjoint(judged)
