"""What is known of classes by their names, in the order in which episodes keep them."""

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
from jaxtyping import Array, Float, Int

from jaxmeta.checks import some
from jaxmeta.core import SplitName

Vector = Array | np.ndarray | Sequence[float | int]


def grouped(
    names: Sequence[str], groups: Mapping[str, str], ways: int, split: SplitName
) -> tuple[list[str], Int[np.ndarray, "groups 2"]]:
    """The classes of all groups that have at least `ways`, group after group.

    Args:
      names: of the classes of the part `split`.
      groups: name of the group of each class.

    Returns:
      The names of the classes; first class and number of classes of each group.

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
            f"ways={ways} asks for more classes than any group (groups) of split={split!r} has: the largest, "
            f"{largest!r}, has {len(members[largest])}; fewer ways would do"
        )
    counts = np.array([len(classes) for classes in chosen])
    return list(chain.from_iterable(chosen)), np.stack([np.cumsum(counts) - counts, counts], axis=1)


def vectors_of(
    metadata: Mapping[str, Vector], names: Sequence[str], split: SplitName
) -> Float[np.ndarray, "classes d"]:
    """The vectors of the classes `names` of the part `split`, in their order, as float32.

    Raises:
      ValueError: a class has none, they are of different lengths, or not all are finite numbers.

    Examples:
      >>> vectors_of({"cat": [1, 0.5], "dog": [0, 1], "owl": [2, 2]}, ["dog", "cat"], "train").tolist()
      [[0.0, 1.0], [1.0, 0.5]]
    """
    _check_named("metadata", metadata, names, split)
    try:
        vectors = np.array([np.asarray(metadata[name], np.float32) for name in names])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata must have one vector of numbers a class, all of one length ({error})"
        ) from error
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise ValueError(f"metadata must have one vector a class, got arrays of shape {vectors.shape[1:]}")
    wrong = [name for name, finite in zip(names, np.isfinite(vectors).all(1), strict=True) if not finite]
    if wrong:
        raise ValueError(f"metadata must be finite, it is not for {some(map(repr, wrong))}")
    return vectors


def _check_named(argument: str, values: Mapping[str, object], names: Sequence[str], split: SplitName) -> None:
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(
            f"{argument} must name every class of split={split!r} by str(label), it lacks {len(missing)} of "
            f"{len(names)}: {some(map(repr, missing))}"
        )
