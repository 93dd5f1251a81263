"""Class splits: the classes for training, validation and testing."""

import dataclasses
import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np

from jaxmeta.checks import (
    LARGEST_SEED,
    ArgumentError,
    check_count,
    check_number,
    check_word,
    described,
    format_value,
    join_names,
    parsed_json,
)
from jaxmeta.core import SplitName

PARTS: tuple[SplitName, ...] = get_args(SplitName)
# Default fractions of a random class split: those of mini-ImageNet.
FRACTIONS = (0.64, 0.16, 0.2)


class Members(NamedTuple):
    """Words for the members of a split in error messages.

    Attributes:
      one: noun, such as "class".
      many: its plural.
      argument: name of the argument that sets the split.
    """

    one: str
    many: str
    argument: str


CLASSES = Members("class", "classes", "classes")
TASKS = Members("task", "tasks", "task_split")


def check_part(split: str) -> SplitName:
    """Return `split`, or raise a ValueError if it is not "train", "validation" or "test"."""
    check_word("split", split, PARTS)
    return cast(SplitName, split)


def _check_three(name: str, parts: Sequence[Any]) -> None:
    if not isinstance(parts, Sequence) or isinstance(parts, str) or len(parts) != 3:
        raise ArgumentError(
            name, f"got {format_value(parts)}; it must be three numbers (train, validation, test)"
        )


def _check_fractions(name: str, fractions: Sequence[float]) -> None:
    _check_three(name, fractions)
    for fraction in fractions:
        check_number(name, fraction, 0)
    if abs(sum(fractions) - 1) > 1e-6:
        raise ArgumentError(
            name, f"got {tuple(fractions)}; fractions of train, validation and test must sum to 1"
        )


def in_order(names: Iterable[str], of: Iterable[str] | None = None) -> list[str]:
    """Return class names in the order of episodes: sorted as numbers if all are numbers, else as text.

    Args:
      names: class names.
      of: all class names, which decide whether names are numbers; None: `names`.

    Examples:
      >>> in_order(["10", "2", "1"]), in_order(["10", "2", "1"], ["1", "2", "10", "cat"])
      (['1', '2', '10'], ['1', '10', '2'])
    """
    names = list(names)
    if all(name.isascii() and name.isdigit() for name in (names if of is None else of)):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _named(names: Iterable[str]) -> str:
    return join_names(map(repr, sorted(names)))


@dataclasses.dataclass(frozen=True)
class ClassSplit:
    """Three disjoint sets of class names.

    Few-shot generalisation is measured on classes that were not used for training, so the parts must be
    disjoint, both within one split and between the split a model was trained with and the one it is
    evaluated on (see `assert_disjoint`).

    Args:
      train, validation, test: class names; a part may be empty.

    Raises:
      ValueError: a class name occurs twice, in one part or in two.

    Examples:
      >>> split = ClassSplit(train=("cat", "dog"), validation=("fox",), test=("owl",))
      >>> split.part("test")
      ('owl',)
      >>> split.sizes
      (2, 1, 1)
      >>> ClassSplit(train=("cat",), validation=(), test=("cat",))
      Traceback (most recent call last):
        ...
      ValueError: the class split overlaps: 'cat' in both train and test
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parts = _checked_parts({part: getattr(self, part) for part in PARTS}, CLASSES)
        for part, names in parts.items():
            object.__setattr__(self, part, names)

    @classmethod
    def from_fractions(
        cls, names: Iterable[str], fractions: Sequence[float] = (0.64, 0.16, 0.2), seed: int = 0
    ) -> "ClassSplit":
        """Return a random split of `names`: a permutation, cut at the rounded cumulative fractions.

        The result depends on the set of names and on `seed` only, not on the order of `names`.

        Args:
          names: class names, each once.
          fractions: fractions of train, validation and test; non-negative, with sum 1.
          seed: seed of the permutation.

        Raises:
          ValueError: fractions that are not three, negative, or do not sum to 1.

        Examples:
          >>> ClassSplit.from_fractions([f"c{i}" for i in range(100)]).sizes
          (64, 16, 20)
        """
        _check_fractions("fractions", fractions)
        names = [str(name) for name in names]
        first = round(fractions[0] * len(names))
        second = round((fractions[0] + fractions[1]) * len(names))
        return cls.from_counts(names, (first, second - first, len(names) - second), seed)

    @classmethod
    def from_counts(cls, names: Iterable[str], counts: Sequence[int], seed: int = 0) -> "ClassSplit":
        """Return a random split of `names` into parts of exactly `counts` classes.

        Raises:
          ValueError: `counts` are not three, negative, or do not sum to the number of names.
        """
        names = sorted(str(name) for name in names)
        _check_three("counts", counts)
        for count in counts:
            check_count("counts", count, 0)
        if sum(counts) != len(names):
            raise ArgumentError(
                "counts",
                f"got {tuple(counts)}; they must be three non-negative numbers (train, validation, "
                f"test) that sum to the {len(names)} classes",
            )
        check_count("seed", seed, 0, LARGEST_SEED)
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(names))
        shuffled = [names[i] for i in order]
        cut = counts[0] + counts[1]
        return cls(tuple(shuffled[: counts[0]]), tuple(shuffled[counts[0] : cut]), tuple(shuffled[cut:]))

    def part(self, split: str) -> tuple[str, ...]:
        """Return the class names of one part.

        Raises:
          ValueError: an unknown part, or a part without classes.
        """
        return _names_of_part(self, split, CLASSES)

    def ordered(self, split: str) -> list[str]:
        """Return the class names of one part in the order of episodes, by `in_order` of all names.

        Raises:
          ValueError: see `part`.
        """
        return in_order(self.part(split), [*self.train, *self.validation, *self.test])

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return the numbers of classes of train, validation and test."""
        return len(self.train), len(self.validation), len(self.test)

    @property
    def hash(self) -> str:
        """Return the SHA-256 (hex) over the sorted names of each part; equal hashes mean equal splits.

        Every part and every name is preceded by its length, so that different splits encode differently.
        """
        digest = hashlib.sha256()
        for part in PARTS:
            names = sorted(getattr(self, part))
            digest.update(f"{part}:{len(names)};".encode())
            for name in names:
                raw = name.encode(errors="surrogateescape")
                digest.update(f"{len(raw)}:".encode() + raw)
        return digest.hexdigest()

    def assert_disjoint(self, other: "ClassSplit") -> None:
        """Check that a model trained with this split has not seen the test classes of `other`.

        Validation classes select the checkpoint, so they count as seen.

        Raises:
          ValueError: classes of `other.test` were seen; the message names some.
        """
        seen = set(self.train) | set(self.validation)
        leaked = seen & set(other.test)
        if leaked:
            raise ValueError(
                f"the model has seen {len(leaked)} of the {len(other.test)} test classes in training or "
                f"validation: {_named(leaked)}; train it on a split that keeps them out"
            )


def _checked_parts(parts: Mapping[str, Any], members: Members) -> dict[str, tuple[str, ...]]:
    """Return the names of each part, after checking that no name occurs twice."""
    checked: dict[str, tuple[str, ...]] = {}
    for part, value in parts.items():
        if isinstance(value, str) or not isinstance(value, Iterable):
            wanted = f"a sequence of {members.one} names"
            raise ValueError(f"{part} must be {wanted}, got {format_value(value)}")
        names = tuple(map(str, value))
        if len(set(names)) < len(names):
            duplicates = {name for name in names if names.count(name) > 1}
            raise ValueError(
                f"the {members.one} split repeats {members.many} within {part}: {_named(duplicates)}"
            )
        for other, others in checked.items():
            both = set(others) & set(names)
            if both:
                raise ValueError(
                    f"the {members.one} split overlaps: {_named(both)} in both {other} and {part}"
                )
        checked[part] = names
    return checked


def _names_of_part(split: ClassSplit, part: str, members: Members) -> tuple[str, ...]:
    names = getattr(split, check_part(part))
    if not names:
        sizes = zip(PARTS, split.sizes, strict=True)
        available = ", ".join(f"{part} ({size})" for part, size in sizes if size)
        raise ArgumentError(
            "split",
            f"got {part!r}, which has no {members.many} in this {members.one} split; it has "
            f"{available or 'none'}; use another part, or another {members.one} split ({members.argument})",
        )
    return names


# Class splits as given by a user.
Classes = ClassSplit | Mapping[str, Iterable[str | int]] | tuple[float, float, float] | str | None
_WANTED = (
    'three fractions such as 0.64,0.16,0.2, a JSON file {"train": [names], "validation": [names], "test": '
    "[names]}, or in Python such a mapping or a jm.tasks.ClassSplit"
)


def class_split(
    classes: Classes, members: Members = CLASSES
) -> ClassSplit | tuple[float, float, float] | Literal["auto"] | None:
    """Return the class split in a mapping, or in a JSON file where `classes` is the path of one.

    Three fractions, "auto" and None are returned as they are. Errors name the `members` and their argument.

    Raises:
      ValueError: `classes` is none of these, or the file does not exist or does not hold `{"train": [names],
        "validation": [names], "test": [names]}`, of which parts may be missing.

    Examples:
      >>> class_split({"train": ["cat", "dog"], "test": [7]})
      ClassSplit(train=('cat', 'dog'), validation=(), test=('7',))
    """
    if classes is None or isinstance(classes, ClassSplit) or (isinstance(classes, str) and classes == "auto"):
        return classes  # type: ignore[return-value]
    if isinstance(classes, Mapping):
        try:
            return _of_parts(classes, members)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                members.argument, f"got a mapping that is not a {members.one} split: {error}"
            ) from None
    if not isinstance(classes, str):
        if not isinstance(classes, tuple | list) or len(classes) != 3:
            raise ArgumentError(members.argument, f"got {format_value(classes)}; it must be {_WANTED}")
        _check_fractions(members.argument, classes)
        return classes
    path = Path(classes).expanduser()
    if not path.is_file():
        raise ArgumentError(members.argument, f"got {classes}; it must be {_WANTED}")
    try:
        parts = parsed_json(path.read_text(encoding="utf-8"))
        if not isinstance(parts, Mapping):
            wanted = '{"train": [names], "validation": [names], "test": [names]}'
            raise ValueError(f"it holds {described(parts)}; it must hold {wanted}")
        return _of_parts(parts, members)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            members.argument, f"{path} is not a {members.one} split in JSON: {error}"
        ) from None


def _of_parts(parts: Mapping[str, Any], members: Members) -> ClassSplit:
    """Return the split of `{"train": names, "validation": names, "test": names}`."""
    for part in parts:
        check_word("part", part, PARTS)
    return ClassSplit(**_checked_parts(parts, members))


def split_of_parts(
    parts: Mapping[SplitName, Iterable[str]] | Mapping[str, Iterable[str]],
) -> ClassSplit | None:
    """Return the class split given by the classes of each part.

    Args:
      parts: class names of the examples of each part.

    Returns:
      Class split; None if there is a single part, or if two parts share a class: then the parts split the
      examples and not the classes.

    Examples:
      >>> split_of_parts({"train": ["ant", "bee"], "test": ["cow"]}).sizes
      (2, 0, 1)
      >>> split_of_parts({"train": ["ant", "bee"], "test": ["bee"]})
    """
    classes = {part: tuple(sorted(set(names))) for part, names in parts.items()}
    all_names = [name for names in classes.values() for name in names]
    if sum(map(bool, classes.values())) < 2 or len(set(all_names)) < len(all_names):
        return None
    return ClassSplit(**classes)


def warn_of_pooled_parts(source: str, parts: Iterable[str]) -> None:
    """Warn that the parts of a source share classes and are therefore pooled."""
    warnings.warn(
        f"{source}: {', '.join(parts)} share classes, but the parts of few-shot tasks must be disjoint; "
        "the examples of all parts are pooled, and the classes are split at random",
        stacklevel=4,
    )


def split_classes(
    present: Sequence[str],
    classes: Classes,
    split_seed: int,
    split: str,
    protocol: str,
    members: Members = CLASSES,
) -> tuple[ClassSplit, str]:
    """Resolve `classes` to a class split, and return it with the sentence for the protocol card.

    Args:
      present: names of the existing classes.
      classes: class split, a mapping or the path of a JSON file with one; three fractions for a random split
        seeded by `split_seed`; None: all classes in the part `split`.
      split_seed: seed of the random split; must be 0 for a split by names.
      split: part to draw from.
      protocol: sentence of the source; "" for the default.
      members: words for what is split, in the default sentence and in errors.

    Raises:
      ValueError: the part is empty or has unknown classes; or a seed with a split by names.
    """
    check_part(split)
    check_count("split_seed", split_seed, 0, LARGEST_SEED)
    classes = class_split(classes, members)
    if classes == "auto":
        classes = FRACTIONS
    if classes is None:
        return ClassSplit(**{split: tuple(present)}), protocol
    if not isinstance(classes, ClassSplit):
        protocol = protocol or f"random {members.one} split {tuple(classes)}, seed {split_seed}"
        classes = ClassSplit.from_fractions(present, classes, split_seed)
    elif split_seed:
        raise ArgumentError("split_seed", f"a {members.one} split by names needs none; leave it out")
    names = _names_of_part(classes, split, members)
    missing = set(names) - set(present)
    if missing:
        raise ArgumentError(
            members.argument,
            f"{len(missing)} of {len(names)} {members.many} of split={split!r} have no examples: "
            + _named(missing),
        )
    return classes, protocol


def hash_for_card(parts: ClassSplit, split: str, classes: object) -> str:
    """Return the hash of a split for the protocol card.

    Without a class split (`classes` is None) every part has all classes, and its hash is the same.

    Examples:
      >>> train, test = ClassSplit(train=("a", "b")), ClassSplit(test=("a", "b"))
      >>> hash_for_card(train, "train", None) == hash_for_card(test, "test", None)
      True
    """
    return (ClassSplit(train=parts.part(split)) if classes is None else parts).hash


def warn_of_case(source: str, classes: Iterable[str]) -> None:
    """Warn about class names that differ only in case, which may be a mistake."""
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            warnings.warn(
                f"{source}: the class names {other!r} and {name!r} differ only in case; they are two classes",
                stacklevel=3,
            )
