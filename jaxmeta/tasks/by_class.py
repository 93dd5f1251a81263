"""Groups and metadata of classes, from mappings by class name to arrays in the order of episodes."""

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
from jaxtyping import Array, Float, Int

from jaxmeta.checks import join_names
from jaxmeta.core import SplitName

Vector = Array | np.ndarray | Sequence[float | int]


def grouped(
    names: Sequence[str], groups: Mapping[str, str], ways: int, split: SplitName
) -> tuple[list[str], Int[np.ndarray, "groups 2"]]:
    """Return the classes of all groups with at least `ways` classes, sorted by group.

    Args:
      names: class names of the part `split`.
      groups: group name of each class.
      ways: number of classes that a group must have.
      split: name of the part, for the messages.

    Returns:
      Class names, and the first class and number of classes of each group.

    Raises:
      ValueError: a class has no group, or no group has as many classes.

    Examples:
      >>> names, spans = grouped(["a", "i", "k", "o"], {"a": "v", "i": "v", "o": "v", "k": "c"}, 2, "train")
      >>> names, spans.tolist()
      (['a', 'i', 'o'], [[0, 3]])
    """
    _check_named("groups", groups, names, split)
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(groups[name], []).append(name)
    chosen = [members[group] for group in sorted(members) if len(members[group]) >= ways]
    if not chosen:
        largest = max(members, key=lambda group: len(members[group]))
        raise ValueError(
            f"ways={ways} is more than the classes of any group (groups) of split={split!r}: the largest, "
            f"{largest!r}, has {len(members[largest])}; use fewer ways"
        )
    counts = np.array([len(classes) for classes in chosen])
    return list(chain.from_iterable(chosen)), np.stack([np.cumsum(counts) - counts, counts], axis=1)


def vectors_of(
    metadata: Mapping[str, Vector], names: Sequence[str], split: SplitName
) -> Float[np.ndarray, "classes d"]:
    """Return the vectors of the classes `names` of the part `split`, in order, as float32.

    Raises:
      ValueError: a class has no vector, or the vectors differ in length or are not finite numbers.

    Examples:
      >>> vectors_of({"cat": [1, 0.5], "dog": [0, 1], "owl": [2, 2]}, ["dog", "cat"], "train").tolist()
      [[0.0, 1.0], [1.0, 0.5]]
    """
    _check_named("metadata", metadata, names, split)
    try:
        vectors = np.array([np.asarray(metadata[name], np.float32) for name in names])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata must have one vector of numbers per class, all of one length ({error})"
        ) from error
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise ValueError(f"metadata must have one vector per class, got arrays of shape {vectors.shape[1:]}")
    wrong = [name for name, finite in zip(names, np.isfinite(vectors).all(1), strict=True) if not finite]
    if wrong:
        raise ValueError(f"metadata must be finite; it is not for {join_names(map(repr, wrong))}")
    return vectors


def _check_named(argument: str, values: Mapping[str, object], names: Sequence[str], split: SplitName) -> None:
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(
            f"{argument} must have an entry for every class of split={split!r}, under str(label); it lacks "
            f"{len(missing)} of {len(names)}: {join_names(map(repr, missing))}"
        )
