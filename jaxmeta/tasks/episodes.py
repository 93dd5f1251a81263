"""Episodes from class-indexed examples: N ways, K shots, Q queries, drawn on the device.

An episode (Vinyals et al. 2016, arXiv 1606.04080) draws N classes of the split without
replacement, K + Q examples of each without replacement, and names the classes 0..N−1 in random
order: with a fixed order a model could learn which slot a class sits in.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from jaxmeta.checks import ArgumentError, check_count, check_finite, check_word, shown, some
from jaxmeta.core import Batch, Key, ProtocolCard, Rotations, SplitName, Task, TaskDistribution
from jaxmeta.tasks.by_class import Vector, grouped, vectors_of
from jaxmeta.tasks.splits import Classes, split_classes
from jaxmeta.tasks.subset import ordered_subset


class EpisodeData(NamedTuple):
    """The examples of one part of a split, grouped by class; lives on the device.

    Attributes:
      x: `(n, size)` uint8 or float32, one flat row an example: rows gather several times faster
        than small images.
      offsets: `(classes,)` where each class starts in `x`.
      sizes: `(classes,)` number of examples of each class.
      groups: `(groups, 2)` first class and number of classes of each group; None where the classes of
        an episode may be any.
      metadata: `(classes, d)` what zero-shot tasks are told of each class; None for other tasks.
    """

    x: Array
    offsets: Int[Array, " classes"]
    sizes: Int[Array, " classes"]
    groups: Int[Array, "groups 2"] | None = None
    metadata: Float[Array, "classes d"] | None = None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class EpisodeShape:
    """What is static about an episode; a pair is an inclusive range, `example` the shape of one.

    `paired` is whether the examples of all classes have the same places within their classes.
    """

    ways: tuple[int, int]
    shots: tuple[int, int]
    queries: int
    rotations: Rotations
    example: tuple[int, ...]
    paired: bool = False

    @classmethod
    def checked(
        cls,
        ways: int | tuple[int, int],
        shots: int | tuple[int, int],
        queries: int,
        rotations: Rotations,
        example: tuple[int, ...],
        paired: bool = False,
        zero_shot: bool = False,
    ) -> "EpisodeShape":
        """From the arguments of `from_arrays`, or a ValueError; `zero_shot` is whether there is metadata."""
        ways = _range("ways", ways)
        if zero_shot:
            for name, got, right in (
                ("shots", shots, 0),
                ("ways", _compact(ways), ways[1]),
                ("rotations", rotations, "none"),
            ):
                if got != right:
                    raise ValueError(
                        "metadata takes the place of the support set of zero-shot tasks, which have "
                        f'shots=0, one number of ways and rotations="none"; got {name}={got!r}'
                    )
            shots = 0, 0
        elif shots == 0:
            raise ArgumentError(
                "shots",
                "got 0; it must be at least 1: zero-shot tasks need one vector of every class, "
                "from_arrays(shots=0, metadata=...)",
            )
        else:
            shots = _range("shots", shots)
        check_count("queries", queries)
        check_word("rotations", rotations, get_args(Rotations))
        if rotations != "none" and (len(example) < 2 or example[0] != example[1]):
            raise ValueError(
                f"rotations={rotations!r} needs square images (side, side, ...), got examples of "
                f"shape {tuple(example)}"
            )
        return cls(ways, shots, int(queries), rotations, tuple(example), paired)

    @property
    def needed(self) -> int:
        """The number of examples that every class must have."""
        return self.shots[1] + self.queries

    def usable(
        self,
        names: Sequence[str],
        sizes: Sequence[int] | Int[np.ndarray, " classes"],
        split: SplitName,
        source: str,
        skip_small: bool,
    ) -> list[int]:
        """Return which classes episodes are drawn from; with `skip_small` those with enough examples.

        What is left out is warned of. Where no class has enough, all are returned, to be refused.
        """
        needed = self.needed
        kept = [place for place, size in enumerate(sizes) if size >= needed]
        if not skip_small or not kept:
            return list(range(len(names)))
        small = [f"{name} ({size})" for name, size in zip(names, sizes, strict=True) if size < needed]
        if small:
            warnings.warn(
                f"{source}: {len(small)} of {len(names)} classes of split={split!r} have fewer than {needed} "
                f"examples and are left out: {some(small)}",
                stacklevel=3,
            )
        return kept

    def card_for(
        self,
        names: Sequence[str],
        sizes: Int[np.ndarray, " classes"] | Sequence[int],
        split: SplitName,
        split_hash: str,
        source: str,
        protocol: str,
    ) -> ProtocolCard:
        """The protocol card of such episodes from these classes.

        Raises:
          ValueError: there are too few of them, one has too few examples, or not all have as many where
            that is needed.
        """
        classes = len(names) * (4 if self.rotations == "classes" else 1)
        if classes < self.ways[1]:
            raise ValueError(
                f"ways={_compact(self.ways)} asks for more classes than split={split!r} has: {classes}; a "
                "class split (classes) that gives it more would do, or fewer ways. To tell apart a few "
                "classes that stay the same is a case for `jaxmeta transfer` or `predict`"
            )
        needed = self.needed
        small = [f"{name} ({size})" for name, size in zip(names, sizes, strict=True) if size < needed]
        if small:
            raise ValueError(
                f"shots + queries = {self.shots[1]} + {self.queries} = {needed} examples are needed of every "
                f"class, too few in {len(small)} of {len(names)}: {some(small)}; fewer shots or queries "
                "would do, or skip_small_classes, which leaves such classes out, where the source has it"
            )
        if self.paired and len(set(sizes)) > 1:
            fewest, most = int(np.argmin(sizes)), int(np.argmax(sizes))
            raise ValueError(
                "paired=True needs classes with the same number of examples, got "
                f"{names[fewest]} ({sizes[fewest]}) and {names[most]} ({sizes[most]})"
            )
        return ProtocolCard(
            tasks=source,
            split=split,
            ways=_compact(self.ways),
            shots=_compact(self.shots),
            queries=self.queries,
            classes=classes,
            split_hash=split_hash,
            rotations=self.rotations,
            protocol=protocol,
        )


def from_arrays(
    x: Array | np.ndarray,
    y: Array | np.ndarray | Sequence[Any],
    *,
    ways: int | tuple[int, int],
    shots: int | tuple[int, int],
    queries: int = 1,
    split: SplitName = "train",
    classes: Classes = None,
    split_seed: int = 0,
    rotations: Rotations = "none",
    name: str = "arrays",
    protocol: str = "",
    groups: Mapping[str, str] | None = None,
    paired: bool = False,
    metadata: Mapping[str, Vector] | None = None,
    skip_small_classes: bool = False,
) -> TaskDistribution:
    """Few-shot classification tasks from any array of examples with class labels.

    `sample(key)` draws N distinct classes uniformly, K + Q distinct examples of each (the first K
    are the support set), and gives the classes the slots 0..N−1 in random order. Support and query
    are ordered by slot. uint8 examples stay uint8 on the device and come out as float32 in
    [0, 1]. Only the examples of the chosen part are stored.

    With a range of ways (shots), one number per task is drawn uniformly from it; arrays keep the
    size of the largest, and what is missing is zero and masked.

    With `shots=0` and `metadata` the tasks are zero-shot: the support set is one metadata vector per
    class, `support.x` `(N, d)` and `support.y = arange(N)`.

    Args:
      x: `(n, *shape)` uint8 or float, in any order.
      y: `(n,)` integer or string class labels; a label's class name is `str(label)`. Classes are in the
        order of their names, as numbers where all of them are, otherwise as text.
      ways: classes of a task, N, or an inclusive range (low, high).
      shots: examples per class to learn from, K, or an inclusive range (low, high); 0 with `metadata`.
      queries: examples per class to be judged on, Q.
      split: "train", "validation" or "test".
      classes: class split: the fractions of train, validation and test for a random split by `split_seed`,
        or the path of a JSON file `{"train": [names], "validation": [names], "test": [names]}`. In Python
        also such a mapping, or a `ClassSplit`. None draws from every class, whatever `split` says.
      split_seed: seed of the random class split; episodes depend on the key given to `sample` alone.
        A split by name takes none.
      rotations: how examples are turned: "none"; "classes", every class turned by 90, 180 and 270° is a
        class of its own (Snell et al. 2017); or "random", one rotation for each drawn class in each episode,
        so that two rotations of one class never meet (Finn et al. 2017). The first two axes of an example
        are turned counter-clockwise and must be equal.
      name: name of the source, for the protocol card.
      protocol: one sentence for the protocol card; where it is empty, the card says how classes are
        split and grouped.
      groups: name of the group of each class, such as the alphabet of a character: the classes of an
        episode are then of one group, drawn uniformly from those with at least `ways` classes (the
        others are left out). With rotations="classes" a group turned as a whole is a group of its own.
      paired: whether the examples of all classes of an episode have the same places within their
        classes, in the order of `x`: where a place is a drawer, some draw the support set and others
        the queries, of every class.
      metadata: a vector of each class, for zero-shot tasks; all of one length. Needs one number of ways
        and no rotations.
      skip_small_classes: whether classes with too few examples for shots and queries are left out, with a
        warning, after the classes are split.

    Returns:
      TaskDistribution whose `sample` is a pytree: pass it to a compiled function as an argument.

    Raises:
      ValueError: too few classes for `ways`, or no group with as many; a class with fewer than shots +
        queries examples, or paired classes of unequal size; a class without group or metadata; metadata
        with shots or shots=0 without; lengths or types that do not fit, an unknown split or rotation.

    Examples:
      >>> import jax, numpy as np
      >>> x = np.arange(60, dtype=np.float32).reshape(30, 2)   # 10 classes, 3 examples each
      >>> tasks = from_arrays(x, np.repeat(np.arange(10), 3), ways=5, shots=1, queries=2)
      >>> support, query = tasks.sample(jax.random.key(0))
      >>> support.x.shape, query.x.shape, support.y.tolist()
      ((5, 2), (10, 2), [0, 1, 2, 3, 4])
    """
    shape = EpisodeShape.checked(
        ways, shots, queries, rotations, np.shape(x)[1:], paired, metadata is not None
    )
    x, labels = _checked_examples(x, y)
    present, label = np.unique(labels, return_inverse=True)
    said = protocol
    parts, protocol = split_classes(present.tolist(), classes, split_seed, split, protocol)
    names, spans = parts.ordered(split), None
    if skip_small_classes:
        counts = np.bincount(label)[np.searchsorted(present, names)]
        names = [names[place] for place in shape.usable(names, counts, split, name, True)]
    if groups is not None:
        names, spans = grouped(names, groups, shape.ways[1], split)
    if not said:
        within = "classes within one group" if groups is not None else ""
        places = "the same places in every class" if paired else ""
        protocol = ", ".join(filter(None, (protocol, within, places)))

    place_of = np.full(len(present), -1)
    place_of[np.searchsorted(present, names)] = np.arange(len(names))
    place = place_of[label]
    order = np.argsort(place, kind="stable")[np.sum(place < 0) :]
    sizes = np.bincount(place[order])
    card = shape.card_for(names, sizes.tolist(), split, parts.hash, name, protocol)
    if not np.array_equal(order, np.arange(len(x))):  # a copy of what may fill half of the memory
        x = x[order]
    data = EpisodeData(
        jnp.asarray(x.reshape(len(x), -1)),
        jnp.asarray(np.cumsum(sizes) - sizes, jnp.int32),
        jnp.asarray(sizes, jnp.int32),
        None if spans is None else jnp.asarray(spans, jnp.int32),
        None if metadata is None else jnp.asarray(vectors_of(metadata, names, split)),
    )
    return TaskDistribution(jax.tree_util.Partial(draw_episode, shape, data), card, tuple(names))


class Drawn(NamedTuple):
    """Which examples an episode is made of.

    Attributes:
      classes: of each slot.
      rows: of the examples, the support set first, then the queries.
      turns: quarter turns of the examples of each slot.
      real: whether a support example is none of the padding; None where there is no padding.
      asked: the same of the queries.
    """

    classes: Int[Array, "*b ways"]
    rows: Int[Array, "*b ways count"]
    turns: Int[Array, "*b ways"]
    real: Bool[Array, "*b ways shots"] | None
    asked: Bool[Array, "*b ways queries"] | None


def draw_rows(
    shape: EpisodeShape,
    offsets: Int[Array, " classes"],
    sizes: Int[Array, " classes"],
    key: Key,
    groups: Int[Array, "groups 2"] | None = None,
) -> Drawn:
    """The random part of an episode; all its random bits come from a single call of the generator."""
    ways, shots, queries = shape.ways[1], shape.shots[1], shape.queries
    each = shots + queries
    # One number more only where it is used: how many are drawn decides what they are.
    bits = jax.random.bits(key, (ways * (each + 2) + (2 if groups is None else 3),), jnp.uint32)
    class_bits, turn_bits, example_bits, other_bits = jnp.split(
        bits, (ways, 2 * ways, ways * (each + 2)), axis=0
    )

    angles = 4 if shape.rotations == "classes" else 1
    if groups is None:
        total = sizes.shape[0]
        drawn = ordered_subset(class_bits, jnp.asarray(total * angles, jnp.int32))
        classes, turns = drawn % total, drawn // total
    else:
        total = groups.shape[0]
        group = _uniform(other_bits[2], (0, total * angles - 1))
        first, count = groups[group % total]
        classes = first + ordered_subset(class_bits, count)
        turns = jnp.broadcast_to(group // total, (ways,))
    if shape.rotations == "random":
        turns = (turn_bits >> 30).astype(jnp.int32)

    example_bits = example_bits.reshape(ways, each)
    if shape.paired:
        example_bits = jnp.broadcast_to(example_bits[:1], (ways, each))
    rows = offsets[classes][:, None] + jax.vmap(ordered_subset)(example_bits, sizes[classes])

    real = asked = None
    if shape.ways[0] < ways or shape.shots[0] < shots:
        present = (jnp.arange(ways) < _uniform(other_bits[0], shape.ways))[:, None]
        real = present & (jnp.arange(shots) < _uniform(other_bits[1], shape.shots))[None, :]
        if shape.ways[0] < ways:
            asked = jnp.broadcast_to(present, (ways, queries))
    return Drawn(classes, rows, turns, real, asked)


def names_of_slots(
    shape: EpisodeShape, classes: Sequence[str], drawn: Drawn
) -> Shaped[np.ndarray, "tasks ways"]:
    """Return the name of the class of each slot of drawn episodes, "" for slots that are padding.

    A turn that is a class of its own has " turned by 90°" and so on behind the name.
    """
    names = np.array(classes)[np.asarray(drawn.classes)]
    if shape.rotations == "classes":
        turned = np.array(["", *(f" turned by {90 * turn}°" for turn in (1, 2, 3))])
        names = np.char.add(names, turned[np.asarray(drawn.turns)])
    return names if drawn.asked is None else np.where(np.asarray(drawn.asked).any(-1), names, "")


def draw_episode(shape: EpisodeShape, data: EpisodeData, key: Key) -> Task:
    """One episode from examples on the device."""
    drawn = draw_rows(shape, data.offsets, data.sizes, key, data.groups)
    shots, ways = shape.shots[1], shape.ways[1]
    task = make_task(shape, drawn, data.x[drawn.rows[:, :shots]], data.x[drawn.rows[:, shots:]])
    if data.metadata is None:
        return task
    return task._replace(
        support=Batch(data.metadata[drawn.classes], jnp.arange(ways, dtype=jnp.int32), ways=ways)
    )


def make_task(
    shape: EpisodeShape,
    drawn: Drawn,
    support: Shaped[Array, "ways shots size"],
    query: Shaped[Array, "ways queries size"],
) -> Task:
    """The episode `drawn`, from its examples as stored."""
    ways = shape.ways[1]

    def batch(x: Shaped[Array, "ways count size"], mask: Bool[Array, "ways count"] | None) -> Batch:
        count = x.shape[1]
        x = turned_floats(shape, x, drawn.turns)
        y = jnp.repeat(jnp.arange(ways, dtype=jnp.int32), count)
        if mask is None:
            return Batch(x.reshape(ways * count, *shape.example), y, ways=ways)
        # Padding is cleared, so that a learner that forgets the mask cannot gain from it.
        x = jnp.where(mask[:, :, None], x, 0)
        return Batch(x.reshape(ways * count, *shape.example), y, mask=mask.reshape(-1), ways=ways)

    return Task(batch(support, drawn.real), batch(query, drawn.asked))


def turned_floats(
    shape: EpisodeShape, x: Shaped[Array, "ways count size"], turns: Int[Array, " ways"]
) -> Float[Array, "ways count size"]:
    """Stored examples as tasks have them, those of slot i turned by 90° · turns[i] counter-clockwise."""
    if shape.rotations != "none":
        images = x.reshape(*x.shape[:2], *shape.example)
        which = turns.reshape((-1,) + (1,) * (images.ndim - 1))
        # A quarter turn and a half turn: two selects in place of four.
        images = jnp.where(which % 2 == 1, jnp.rot90(images, axes=(2, 3)), images)
        x = jnp.where(which >= 2, jnp.flip(images, axis=(2, 3)), images).reshape(x.shape)
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x


def _uniform(bits: UInt32[Array, ""], inclusive: tuple[int, int]) -> Int[Array, ""]:
    low, high = inclusive
    return low + (bits % (high - low + 1)).astype(jnp.int32)


def _range(argument: str, value: int | tuple[int, int]) -> tuple[int, int]:
    if not isinstance(value, tuple | list):
        check_count(argument, value)
        return int(value), int(value)
    if len(value) != 2:
        raise ArgumentError(argument, f"got {shown(value)}; it must be one number, or a pair (low, high)")
    low, high = value
    check_count(argument, low)
    check_count(argument, high)
    if high < low:
        raise ArgumentError(argument, f"got {value}; of a pair (low, high) low must not be above high")
    return int(low), int(high)


def _compact(inclusive: tuple[int, int]) -> int | tuple[int, int]:
    return inclusive[0] if inclusive[0] == inclusive[1] else inclusive


def _checked_examples(x, y) -> tuple[np.ndarray, np.ndarray]:
    """`x` as uint8 or float32 and the labels as strings, or a ValueError."""
    x, y = np.asarray(x), np.asarray(y)
    if y.ndim != 1 or x.ndim < 1 or len(x) != len(y):
        raise ArgumentError(
            "x, y",
            f"got shapes {x.shape} and {y.shape}; they must be (n, *shape) and (n,), with one label per"
            " example",
        )
    if len(x) == 0:
        raise ArgumentError("x, y", "got no examples")
    if x.dtype != np.uint8:
        if not np.issubdtype(x.dtype, np.floating):
            raise ArgumentError("x", f"got {x.dtype}; it must be uint8 (0..255) or floating point")
        x = x.astype(np.float32, copy=False)
        check_finite("x", x)
    if y.dtype.kind == "O" and all(isinstance(label, str) for label in y):
        y = y.astype(str)
    if y.dtype.kind not in "iuU":
        raise ArgumentError("y", f"got {y.dtype}; it must hold integer or string class labels")
    if y.dtype.kind == "i" and y.min() < 0:
        raise ArgumentError(
            "y",
            f"got {np.count_nonzero(y < 0)} labels below 0, which elsewhere stand for no label; leave these "
            "examples out, or name the classes by strings",
        )
    return x, y.astype(str)
