"""Episodes from class-indexed examples: N ways, K shots, Q queries, drawn on the device.

An episode (Vinyals et al. 2016, arXiv 1606.04080) draws N classes of the split without
replacement, K + Q examples of each without replacement, and labels the classes 0..N−1 in random
order: with a fixed order a model could learn the slot of a class.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from jaxmeta.checks import ArgumentError, check_count, check_finite, check_word, format_value, join_names
from jaxmeta.core import Batch, Key, ProtocolCard, Rotations, SplitName, Task, TaskDistribution
from jaxmeta.tasks.by_class import Vector, grouped, vectors_of
from jaxmeta.tasks.domains import DomainNames, DomainTable, PartDomains, draw_across, part_domains
from jaxmeta.tasks.splits import Classes, check_part, hash_for_card, split_classes
from jaxmeta.tasks.subset import ordered_subset


class EpisodeData(NamedTuple):
    """The examples of one part of a split on the device, grouped by class.

    Attributes:
      x: `(n, size)` uint8 or float32 examples, flattened: rows gather several times faster than small images.
      offsets: `(classes,)` first row of each class in `x`.
      sizes: `(classes,)` number of examples of each class.
      groups: `(groups, 2)` first class and number of classes of each group; None: any classes may share an
        episode.
      metadata: `(classes, d)` class metadata of zero-shot tasks; None for other tasks.
      domains: number of examples of each class and domain, where support and queries are from different
        domains; None: from any domains.
    """

    x: Array
    offsets: Int[Array, " classes"]
    sizes: Int[Array, " classes"]
    groups: Int[Array, "groups 2"] | None = None
    metadata: Float[Array, "classes d"] | None = None
    domains: DomainTable | None = None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class EpisodeShape:
    """The static part of an episode.

    Attributes:
      ways: inclusive range of the number of classes.
      shots: inclusive range of the support examples per class.
      queries: query examples per class.
      rotations: see `from_arrays`.
      example: shape of an example.
    """

    ways: tuple[int, int]
    shots: tuple[int, int]
    queries: int
    rotations: Rotations
    example: tuple[int, ...]

    @classmethod
    def checked(
        cls,
        ways: int | tuple[int, int],
        shots: int | tuple[int, int],
        queries: int,
        rotations: Rotations,
        example: tuple[int, ...],
        zero_shot: bool = False,
    ) -> "EpisodeShape":
        """Build the shape from the arguments of `from_arrays`.

        Args:
          ways, shots, queries, rotations: see `from_arrays`.
          example: shape of an example.
          zero_shot: whether class metadata replaces the support set.

        Raises:
          ValueError: an argument is out of range, or the arguments contradict each other.
        """
        ways = _range("ways", ways)
        if zero_shot:
            for name, value, expected in (
                ("shots", shots, 0),
                ("ways", _compact(ways), ways[1]),
                ("rotations", rotations, "none"),
            ):
                if value != expected:
                    raise ValueError(
                        "metadata replaces the support set of zero-shot tasks, which need shots=0, a single "
                        f'number of ways and rotations="none"; got {name}={value!r}'
                    )
            shots = 0, 0
        elif shots == 0:
            raise ArgumentError(
                "shots",
                "got 0; it must be at least 1, except in zero-shot tasks, which need one vector per class: "
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
        return cls(ways, shots, int(queries), rotations, tuple(example))

    @property
    def needed(self) -> int:
        """Return the number of examples that every class must have."""
        return self.shots[1] + self.queries

    def usable(
        self,
        names: Sequence[str],
        sizes: Sequence[int] | Int[np.ndarray, " classes"],
        split: SplitName,
        source: str,
        skip_small: bool,
        domains: DomainTable | None = None,
    ) -> list[int]:
        """Return the indices of the classes to draw episodes from.

        With `skip_small` classes with too few examples are skipped with a warning. If no class has enough
        examples, all indices are returned, so that `card_for` refuses them.

        Args:
          names: class names.
          sizes: number of examples of each class.
          split: part of the classes, for the warning.
          source: name of the source, for the warning.
          skip_small: whether to skip classes with too few examples.
          domains: numbers of examples by domain, where support and queries are from different domains.
        """
        lacking = self._lacking(sizes, domains)
        kept = [index for index, count in enumerate(lacking) if count <= 0]
        if not skip_small or not kept:
            return list(range(len(names)))
        small = [f"{name} ({size})" for name, size, n in zip(names, sizes, lacking, strict=True) if n > 0]
        if small:
            few = f"fewer than {self.needed} examples"
            if domains is not None:
                few = f"too few examples for support and queries from different domains, {self._in_words},"
            warnings.warn(
                f"{source}: {len(small)} of {len(names)} classes of split={split!r} have {few} and are left "
                f"out: {join_names(small)}",
                stacklevel=3,
            )
        return kept

    @property
    def _in_words(self) -> str:
        return f"shots + queries = {self.shots[1]} + {self.queries}"

    def _lacking(
        self, sizes: Sequence[int] | Int[np.ndarray, " classes"], domains: DomainTable | None
    ) -> list[int]:
        """Return the number of examples that each class lacks; at most 0 for classes with enough."""
        if domains is None:
            return [self.needed - int(size) for size in sizes]
        remaining = domains.remaining(self.shots[1])
        return (self.queries - remaining).tolist()

    def card_for(
        self,
        names: Sequence[str],
        sizes: Int[np.ndarray, " classes"] | Sequence[int],
        split: SplitName,
        split_hash: str,
        source: str,
        protocol: str,
        domains: DomainTable | None = None,
    ) -> ProtocolCard:
        """Return the protocol card of episodes from these classes.

        Args:
          names: class names.
          sizes: number of examples of each class.
          split: part of the classes.
          split_hash: hash of the class split.
          source: name of the source.
          protocol: sentence on the protocol.
          domains: numbers of examples by domain, where support and queries are from different domains.

        Raises:
          ValueError: too few classes, or a class with too few examples.
        """
        classes = len(names) * (4 if self.rotations == "classes" else 1)
        if classes < self.ways[1]:
            raise ValueError(
                f"ways={_compact(self.ways)} is more than the classes of split={split!r}: {classes}; "
                "use fewer ways, or a class split (classes) with more classes in this part. To distinguish a "
                "small fixed set of classes, use `jaxmeta transfer` or `predict`"
            )
        lacking = self._lacking(sizes, domains)
        small = [f"{name} ({size})" for name, size, n in zip(names, sizes, lacking, strict=True) if n > 0]
        if small:
            needed = f"{self._in_words} = {self.needed} examples are needed per class"
            fewer = f"{len(small)} of {len(names)} classes have fewer"
            if domains is not None:
                needed += ", the queries from domains other than the support set's"
                fewer = (
                    f"{len(small)} of {len(names)} classes have too few"
                    if domains.held is not None
                    else f"{len(small)} of {len(names)} classes have too few in some order of the domains"
                )
            raise ValueError(
                f"{needed}; {fewer}: {join_names(small)}; use fewer shots or "
                "queries, or skip these classes with skip_small_classes where the source has this setting"
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
    domains: DomainNames | None = None,
    across: bool = False,
    test_domains: Sequence[str] | None = None,
    metadata: Mapping[str, Vector] | None = None,
    skip_small_classes: bool = False,
) -> TaskDistribution:
    """Return few-shot classification tasks from an array of examples with class labels.

    `sample(key)` draws N distinct classes uniformly, K + Q distinct examples of each (the first K
    are the support set), and assigns the slots 0..N−1 to the classes in random order. Support and
    query are ordered by slot. uint8 examples stay uint8 on the device and are returned as float32 in
    [0, 1]. Only the examples of the chosen part are stored.

    With a range of ways (shots), one number per task is drawn uniformly from it; arrays have the
    size of the largest, and the padding is zero and masked.

    With `shots=0` and `metadata` the tasks are zero-shot: the support set is one metadata vector per
    class, `support.x` `(N, d)` and `support.y = arange(N)`.

    With `domains` and `across=True` the support set and the queries of a class are from different domains,
    such as a catalogue in one style and photographs in another. A random order of the domains is drawn for
    the episode. The support set of each class is drawn from the first domains that together have at least
    K of its examples, the queries from the other domains. If all classes have equally many examples of
    every domain, all classes of an episode use the same domains, and support and queries of the episode
    share none. Otherwise the domains of one class's support set may be those of another one's queries.

    Args:
      x: `(n, *shape)` uint8 or float examples, in any order.
      y: `(n,)` integer or string class labels; the class name of a label is `str(label)`. Classes are
        sorted by name, numerically if all names are numbers, otherwise as text.
      ways: classes per task, N, or an inclusive range (low, high).
      shots: examples per class to learn from, K, or an inclusive range (low, high); 0 with `metadata`.
      queries: examples per class to evaluate on, Q.
      split: "train", "validation" or "test".
      classes: class split: the fractions of train, validation and test for a random split seeded by
        `split_seed`, or the path of a JSON file `{"train": [names], "validation": [names], "test": [names]}`;
        in Python also such a mapping or a `ClassSplit`. None: every part draws from all classes.
      split_seed: seed of the random class split; must be 0 where `classes` names the classes. Episodes depend
        only on the key given to `sample`.
      rotations: rotations of the examples: "none"; "classes", each class rotated by 90, 180 and 270° is an
        additional class (Snell et al. 2017); or "random", one random rotation per class and episode, so
        that an episode never has two rotations of one class (Finn et al. 2017). The first two axes of an
        example must be equal; they are rotated counter-clockwise.
      name: name of the source, for the protocol card.
      protocol: one sentence for the protocol card; if empty, the card describes how classes are split
        and grouped, and which domains are used.
      groups: group name of each class, such as the alphabet of a character: the classes of an episode
        then belong to one group, drawn uniformly from the groups with at least `ways` classes; smaller
        groups are skipped. With rotations="classes" each rotation of a group is an additional group.
      domains: `(n,)` domain name of each example, such as its style, camera or writer; None: the examples
        have no domains.
      across: whether the support set and the queries of a class are from different domains.
      test_domains: names of domains held out for test: "train" and "validation" use examples of the other
        domains only. "test" uses these domains only; with `across`, its queries are from these domains and
        its support sets from the others.
      metadata: vector of each class, all of one length, for zero-shot tasks. Needs a single number of
        ways and rotations="none".
      skip_small_classes: whether to skip, with a warning, classes with fewer than shots + queries
        examples, after the classes are split.

    Returns:
      TaskDistribution whose `sample` is a pytree: pass it to a compiled function as an argument.

    Raises:
      ValueError: too few classes for `ways`, or no group with as many; a class with fewer than shots +
        queries examples, or too few in domains other than the support set's; a class without group
        or metadata; metadata with shots > 0, or shots=0 without metadata; inconsistent lengths or types; an
        unknown split, rotation or domain, or too few domains.

    Examples:
      >>> import jax, numpy as np
      >>> x = np.arange(60, dtype=np.float32).reshape(30, 2)   # 10 classes, 3 examples each
      >>> tasks = from_arrays(x, np.repeat(np.arange(10), 3), ways=5, shots=1, queries=2)
      >>> support, query = tasks.sample(jax.random.key(0))
      >>> support.x.shape, query.x.shape, support.y.tolist()
      ((5, 2), (10, 2), [0, 1, 2, 3, 4])

      >>> styles = {"domains": np.tile(["photo", "drawing", "icon"], 10), "test_domains": ("icon",)}
      >>> tasks = from_arrays(x, np.repeat(np.arange(10), 3), ways=5, shots=1, across=True, **styles)
      >>> tasks.card.protocol
      'support and query from different domains, without icon, held out for test'
    """
    shape = EpisodeShape.checked(
        ways, shots, queries, rotations, np.shape(x)[1:], zero_shot=metadata is not None
    )
    x, labels = _checked_examples(x, y)
    domains_of_part = part_domains(domains, len(x), check_part(split), across, test_domains)
    return tasks_of_examples(
        x,
        labels,
        shape,
        domains_of_part,
        split=split,
        classes=classes,
        split_seed=split_seed,
        name=name,
        protocol=protocol,
        groups=groups,
        metadata=metadata,
        skip_small_classes=skip_small_classes,
    )


def tasks_of_examples(
    x: Shaped[np.ndarray, "n ..."],
    labels: Shaped[np.ndarray, " n"],
    shape: EpisodeShape,
    domains: PartDomains | None,
    *,
    split: SplitName,
    classes: Classes,
    split_seed: int = 0,
    name: str,
    protocol: str,
    groups: Mapping[str, str] | None = None,
    metadata: Mapping[str, Vector] | None = None,
    skip_small_classes: bool = False,
) -> TaskDistribution:
    """Return few-shot tasks from checked examples; see `from_arrays`.

    Args:
      x: uint8 or float32 examples.
      labels: class names of the examples.
      shape: static part of an episode.
      domains: domains of the examples in the part `split`; None for examples without domains.
      split, classes, split_seed, name, protocol, groups, metadata, skip_small_classes: see `from_arrays`.
    """
    present, label = np.unique(labels, return_inverse=True)
    given_protocol = protocol
    parts, protocol = split_classes(present.tolist(), classes, split_seed, split, protocol)
    names, spans = parts.ordered(split), None
    used = np.ones(len(x), bool) if domains is None else domains.rows >= 0
    table = None
    if domains is not None and domains.across:
        table = domains.table(label, len(present))

    def table_of(classes: Sequence[str]) -> DomainTable | None:
        return None if table is None else table.of(np.searchsorted(present, classes))

    if skip_small_classes:
        counts = np.bincount(label[used], minlength=len(present))[np.searchsorted(present, names)]
        kept = shape.usable(names, counts, split, name, True, table_of(names))
        names = [names[index] for index in kept]
    if groups is not None:
        names, spans = grouped(names, groups, shape.ways[1], split)
    if not given_protocol:
        within = "classes within one group" if groups is not None else ""
        domain_sentence = "" if domains is None else domains.sentence
        protocol = ", ".join(filter(None, (protocol, within, domain_sentence)))

    # Index of each class among those kept; -1 for other classes, whose examples sort first and are dropped.
    index_of = np.full(len(present), -1)
    index_of[np.searchsorted(present, names)] = np.arange(len(names))
    index = np.where(used, index_of[label], -1)
    if domains is None or table is None:
        order = np.argsort(index, kind="stable")[np.sum(index < 0) :]
    else:
        order = np.lexsort((domains.rows, index))[np.sum(index < 0) :]
    sizes, kept_table = np.bincount(index[order], minlength=len(names)), table_of(names)
    split_hash = hash_for_card(parts, split, classes)
    card = shape.card_for(names, sizes.tolist(), split, split_hash, name, protocol, kept_table)
    if not np.array_equal(order, np.arange(len(x))):  # indexing copies an array that may fill half the memory
        x = x[order]
    data = EpisodeData(
        jnp.asarray(x.reshape(len(x), -1)),
        jnp.asarray(np.cumsum(sizes) - sizes, jnp.int32),
        jnp.asarray(sizes, jnp.int32),
        None if spans is None else jnp.asarray(spans, jnp.int32),
        None if metadata is None else jnp.asarray(vectors_of(metadata, names, split)),
        None if kept_table is None else kept_table.on_device(),
    )
    return TaskDistribution(jax.tree_util.Partial(draw_episode, shape, data), card, tuple(names))


class Drawn(NamedTuple):
    """The random choices of an episode.

    Attributes:
      classes: class of each slot.
      rows: row of each example in the data, the support set first, then the queries.
      turns: number of quarter turns of each slot.
      support_mask: False for padding of the support set; None without padding.
      query_mask: False for padding of the queries; None without padding.
    """

    classes: Int[Array, "*b ways"]
    rows: Int[Array, "*b ways count"]
    turns: Int[Array, "*b ways"]
    support_mask: Bool[Array, "*b ways shots"] | None
    query_mask: Bool[Array, "*b ways queries"] | None


def draw_rows(
    shape: EpisodeShape,
    offsets: Int[Array, " classes"],
    sizes: Int[Array, " classes"],
    key: Key,
    groups: Int[Array, "groups 2"] | None = None,
    domains: DomainTable | None = None,
) -> Drawn:
    """Draw the classes, examples and rotations of an episode.

    A single call of the random generator gives all bits, since each call costs compile time.
    """
    ways, shots, queries = shape.ways[1], shape.shots[1], shape.queries
    per_class = shots + queries
    # The number of bits affects their values: those for groups and domains are drawn only where they are
    # needed, so that other episodes do not change.
    extra = 2 if groups is None else 3
    more = 0 if domains is None else domains.counts.shape[1] + ways
    bits = jax.random.bits(key, (ways * (per_class + 2) + extra + more,), jnp.uint32)
    class_bits, turn_bits, example_bits, other_bits = jnp.split(
        bits, (ways, 2 * ways, ways * (per_class + 2)), axis=0
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

    example_bits = example_bits.reshape(ways, per_class)
    if domains is None:
        rows = offsets[classes][:, None] + jax.vmap(ordered_subset)(example_bits, sizes[classes])
    else:
        domain_bits, shift_bits = other_bits[extra:-ways], other_bits[-ways:]
        rows = draw_across(
            domains, offsets[classes], classes, shots, (domain_bits, example_bits[0], shift_bits)
        )

    support_mask = query_mask = None
    if shape.ways[0] < ways or shape.shots[0] < shots:
        present = (jnp.arange(ways) < _uniform(other_bits[0], shape.ways))[:, None]
        support_mask = present & (jnp.arange(shots) < _uniform(other_bits[1], shape.shots))[None, :]
        if shape.ways[0] < ways:
            query_mask = jnp.broadcast_to(present, (ways, queries))
    return Drawn(classes, rows, turns, support_mask, query_mask)


def names_of_slots(
    shape: EpisodeShape, classes: Sequence[str], drawn: Drawn
) -> Shaped[np.ndarray, "tasks ways"]:
    """Return the class name of each slot of drawn episodes, "" for padding.

    With rotations="classes" the names of rotated classes have " turned by 90°" (180°, 270°) appended.
    """
    names = np.array(classes)[np.asarray(drawn.classes)]
    if shape.rotations == "classes":
        turned = np.array(["", *(f" turned by {90 * turn}°" for turn in (1, 2, 3))])
        names = np.char.add(names, turned[np.asarray(drawn.turns)])
    return names if drawn.query_mask is None else np.where(np.asarray(drawn.query_mask).any(-1), names, "")


def draw_from(shape: EpisodeShape, data: EpisodeData, key: Key) -> Drawn:
    """Draw the classes, examples and rotations of an episode from examples on the device."""
    return draw_rows(shape, data.offsets, data.sizes, key, data.groups, data.domains)


def draw_episode(shape: EpisodeShape, data: EpisodeData, key: Key) -> Task:
    """Draw one episode from examples on the device."""
    drawn = draw_from(shape, data, key)
    shots = shape.shots[1]
    task = make_task(shape, drawn, data.x[drawn.rows[:, :shots]], data.x[drawn.rows[:, shots:]])
    return with_metadata(task, data, drawn)


def with_metadata(task: Task, data: EpisodeData, drawn: Drawn) -> Task:
    """Return a task with the metadata of its classes as support set, where the data has metadata."""
    if data.metadata is None:
        return task
    ways = task.support.ways
    y = jnp.arange(ways, dtype=jnp.int32)
    return task._replace(support=Batch(data.metadata[drawn.classes], y, ways=ways))


def make_task(
    shape: EpisodeShape,
    drawn: Drawn,
    support: Shaped[Array, "ways shots size"],
    query: Shaped[Array, "ways queries size"],
) -> Task:
    """Build the episode `drawn` from its stored examples."""
    ways = shape.ways[1]

    def batch(x: Shaped[Array, "ways count size"], mask: Bool[Array, "ways count"] | None) -> Batch:
        count = x.shape[1]
        x = turned_floats(shape, x, drawn.turns)
        y = jnp.repeat(jnp.arange(ways, dtype=jnp.int32), count)
        if mask is None:
            return Batch(x.reshape(ways * count, *shape.example), y, ways=ways)
        # Padding is zeroed, so that a learner that ignores the mask gains nothing from it.
        x = jnp.where(mask[:, :, None], x, 0)
        return Batch(x.reshape(ways * count, *shape.example), y, mask=mask.reshape(-1), ways=ways)

    return Task(batch(support, drawn.support_mask), batch(query, drawn.query_mask))


def turned_floats(
    shape: EpisodeShape, x: Shaped[Array, "ways count size"], turns: Int[Array, " ways"]
) -> Float[Array, "ways count size"]:
    """Return stored examples as float32, those of slot i rotated by 90° · turns[i] counter-clockwise."""
    if shape.rotations != "none":
        images = x.reshape(*x.shape[:2], *shape.example)
        which = turns.reshape((-1,) + (1,) * (images.ndim - 1))
        # A quarter turn and then a half turn need two selects instead of four.
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
        raise ArgumentError(argument, f"got {format_value(value)}; it must be a number or a pair (low, high)")
    low, high = value
    check_count(argument, low)
    check_count(argument, high)
    if high < low:
        raise ArgumentError(argument, f"got {value}; in a pair (low, high), low must not exceed high")
    return int(low), int(high)


def _compact(inclusive: tuple[int, int]) -> int | tuple[int, int]:
    return inclusive[0] if inclusive[0] == inclusive[1] else inclusive


def _checked_examples(x, y) -> tuple[np.ndarray, np.ndarray]:
    """Return `x` as uint8 or float32 and the labels as strings, or raise a ValueError."""
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
            f"got {np.count_nonzero(y < 0)} negative labels, which often mark unlabelled examples; remove "
            "these examples, or use strings as class names",
        )
    return x, y.astype(str)
