"""Episodes from class-indexed examples: N ways, K shots, Q queries, drawn on the device.

An episode (Vinyals et al. 2016, arXiv 1606.04080) draws N classes of the split without
replacement, K + Q examples of each without replacement, and names the classes 0..N−1 in random
order: with a fixed order a model could learn which slot a class sits in.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped, UInt32

from jaxmeta.core import Batch, Key, ProtocolCard, Task, TaskDistribution
from jaxmeta.tasks.splits import ClassSplit, split_classes

_ROTATIONS = ("none", "classes", "random")


class EpisodeData(NamedTuple):
    """The examples of one part of a split, grouped by class; lives on the device.

    Attributes:
      x: `(n, size)` uint8 or float32, one flat row an example: rows gather several times faster
        than small images.
      offsets: `(classes,)` where each class starts in `x`.
      sizes: `(classes,)` number of examples of each class.
    """

    x: Array
    offsets: Int[Array, " classes"]
    sizes: Int[Array, " classes"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class EpisodeShape:
    """What is static about an episode; a pair is an inclusive range, `example` the shape of one."""

    ways: tuple[int, int]
    shots: tuple[int, int]
    queries: int
    rotations: str
    example: tuple[int, ...]

    @classmethod
    def checked(
        cls,
        ways: int | tuple[int, int],
        shots: int | tuple[int, int],
        queries: int,
        rotations: str,
        example: tuple[int, ...],
    ) -> "EpisodeShape":
        """From the arguments of `from_arrays`, or a ValueError."""
        ways, shots = _range("ways", ways), _range("shots", shots)
        if not isinstance(queries, int | np.integer) or queries < 1:
            raise ValueError(f"queries must be a positive integer, got {queries!r}")
        if rotations not in _ROTATIONS:
            raise ValueError(f'rotations must be "none", "classes" or "random", got {rotations!r}')
        if rotations != "none" and (len(example) < 2 or example[0] != example[1]):
            raise ValueError(
                f"rotations={rotations!r} needs square images (side, side, ...), got examples of "
                f"shape {tuple(example)}"
            )
        return cls(ways, shots, int(queries), rotations, tuple(example))

    def card_for(
        self,
        names: Sequence[str],
        sizes: Int[np.ndarray, " classes"] | Sequence[int],
        split: str,
        split_hash: str,
        source: str,
        protocol: str,
    ) -> ProtocolCard:
        """The protocol card of such episodes from these classes.

        Raises:
          ValueError: there are too few of them, or one has too few examples.
        """
        classes = len(names) * (4 if self.rotations == "classes" else 1)
        if classes < self.ways[1]:
            raise ValueError(
                f"ways={_compact(self.ways)} asks for more classes than split={split!r} has: {classes}; "
                "a class split (classes) that gives it more would do, or fewer ways"
            )
        needed = self.shots[1] + self.queries
        small = [f"{name} ({size})" for name, size in zip(names, sizes, strict=True) if size < needed]
        if small:
            raise ValueError(
                f"shots + queries = {self.shots[1]} + {self.queries} = {needed} examples are needed of every "
                f"class, too few in {len(small)} of {len(names)}: {', '.join(small[:5])}"
                + (", …" if len(small) > 5 else "")
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
    y: Array | np.ndarray | Sequence,
    *,
    ways: int | tuple[int, int],
    shots: int | tuple[int, int],
    queries: int = 1,
    split: str = "train",
    classes: ClassSplit | Sequence[float] | None = None,
    seed: int = 0,
    rotations: str = "none",
    name: str = "arrays",
    protocol: str = "",
) -> TaskDistribution:
    """Few-shot classification tasks from any array of examples with class labels.

    `sample(key)` draws N distinct classes uniformly, K + Q distinct examples of each (the first K
    are the support set), and gives the classes the slots 0..N−1 in random order. Support and query
    are ordered by slot. uint8 examples stay uint8 on the device and come out as float32 in
    [0, 1]. Only the examples of the chosen part are stored.

    With a range of ways (shots), one number per task is drawn uniformly from it; arrays keep the
    size of the largest, and what is missing is zero and masked.

    Args:
      x: `(n, *shape)` uint8 or float, in any order.
      y: `(n,)` integer or string class labels; a label's class name is `str(label)`.
      ways: N, or an inclusive range.
      shots: K, examples per class to learn from, or an inclusive range.
      queries: Q, examples per class to be judged on.
      split: "train", "validation" or "test".
      classes: the class split by name; or the fractions of train, validation and test for a random
        split by `seed`; or None to draw from every class, whatever `split` says.
      seed: of the random class split; episodes depend on the key given to `sample` alone.
      rotations: "none"; "classes", every class turned by 90, 180 and 270° is a class of its own
        (Snell et al. 2017); "random", one rotation for each drawn class in each episode, so that
        two rotations of one class never meet (Finn et al. 2017). The first two axes of an example
        are turned counter-clockwise and must be equal.
      name: of the source, for the protocol card.
      protocol: one sentence for the protocol card.

    Returns:
      TaskDistribution whose `sample` is a pytree: pass it to a compiled function as an argument.

    Raises:
      ValueError: too few classes for `ways`, a class with fewer than shots + queries examples,
        lengths or types that do not fit, an unknown split or rotation.

    Examples:
      >>> import jax, numpy as np
      >>> x = np.arange(60, dtype=np.float32).reshape(30, 2)   # 10 classes, 3 examples each
      >>> tasks = from_arrays(x, np.repeat(np.arange(10), 3), ways=5, shots=1, queries=2)
      >>> support, query = tasks.sample(jax.random.key(0))
      >>> support.x.shape, query.x.shape, support.y.tolist()
      ((5, 2), (10, 2), [0, 1, 2, 3, 4])
    """
    shape = EpisodeShape.checked(ways, shots, queries, rotations, np.shape(x)[1:])
    x, labels = _checked_examples(x, y)
    present = np.unique(labels).tolist()
    parts, protocol = split_classes(present, classes, seed, split, protocol)
    order = np.argsort(labels, kind="stable")
    order = order[np.isin(labels[order], parts.part(split))]
    names, offsets, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    if not np.array_equal(order, np.arange(len(x))):  # a copy of what may fill half of the memory
        x = x[order]
    data = EpisodeData(
        jnp.asarray(x.reshape(len(x), -1)),
        jnp.asarray(offsets, jnp.int32),
        jnp.asarray(sizes, jnp.int32),
    )
    card = shape.card_for(names.tolist(), sizes, split, parts.hash, name, protocol)
    return TaskDistribution(jax.tree_util.Partial(draw_episode, shape, data), card)


class Drawn(NamedTuple):
    """Which examples an episode is made of.

    Attributes:
      rows: of the examples, the support set first, then the queries.
      turns: quarter turns of the examples of each slot.
      real: whether a support example is none of the padding; None where there is no padding.
      asked: the same of the queries.
    """

    rows: Int[Array, "*b ways count"]
    turns: Int[Array, "*b ways"]
    real: Bool[Array, "*b ways shots"] | None
    asked: Bool[Array, "*b ways queries"] | None


def draw_rows(
    shape: EpisodeShape, offsets: Int[Array, " classes"], sizes: Int[Array, " classes"], key: Key
) -> Drawn:
    """The random part of an episode; all its random bits come from a single call of the generator."""
    ways, shots, queries = shape.ways[1], shape.shots[1], shape.queries
    each = shots + queries
    bits = jax.random.bits(key, (ways * (each + 2) + 2,), jnp.uint32)
    class_bits, turn_bits, example_bits, size_bits = jnp.split(
        bits, (ways, 2 * ways, ways * (each + 2)), axis=0
    )

    turned = shape.rotations == "classes"
    total = sizes.shape[0]
    drawn = ordered_subset(class_bits, jnp.asarray(total * (4 if turned else 1), jnp.int32))
    class_of_slot = drawn % total
    within = jax.vmap(ordered_subset)(example_bits.reshape(ways, each), sizes[class_of_slot])
    rows = offsets[class_of_slot][:, None] + within
    turns = drawn // total if turned else (turn_bits >> 30).astype(jnp.int32)

    real = asked = None
    if shape.ways[0] < ways or shape.shots[0] < shots:
        present = (jnp.arange(ways) < _uniform(size_bits[0], shape.ways))[:, None]
        real = present & (jnp.arange(shots) < _uniform(size_bits[1], shape.shots))[None, :]
        if shape.ways[0] < ways:
            asked = jnp.broadcast_to(present, (ways, queries))
    return Drawn(rows, turns, real, asked)


def draw_episode(shape: EpisodeShape, data: EpisodeData, key: Key) -> Task:
    """One episode from examples on the device."""
    drawn = draw_rows(shape, data.offsets, data.sizes, key)
    shots = shape.shots[1]
    return make_task(shape, drawn, data.x[drawn.rows[:, :shots]], data.x[drawn.rows[:, shots:]])


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
        if shape.rotations != "none":
            x = _rotate(x, drawn.turns, shape.example)
        if x.dtype == jnp.uint8:
            x = x.astype(jnp.float32) / 255
        y = jnp.repeat(jnp.arange(ways, dtype=jnp.int32), count)
        if mask is None:
            return Batch(x.reshape(ways * count, *shape.example), y, None, ways)
        # Padding is cleared, so that a learner that forgets the mask cannot gain from it.
        x = jnp.where(mask[:, :, None], x, 0)
        return Batch(x.reshape(ways * count, *shape.example), y, mask.reshape(-1), ways)

    return Task(batch(support, drawn.real), batch(query, drawn.asked))


def ordered_subset(bits: UInt32[Array, " m"], bound: Int[Array, ""]) -> Int[Array, " m"]:
    """m distinct integers of [0, bound) in uniformly random order, without touching all of them.

    The first m steps of the Fisher–Yates shuffle (step i swaps places i and j_i, j_i uniform in
    [i, bound)), with the array of `bound` places never written down: what step i takes from place
    j_i is found by following the earlier swaps backwards. O(m²) and independent of `bound`, which
    may be traced, where a permutation would cost O(bound log bound). Reducing 32 bits modulo the
    bound favours no value by more than a factor 1 + bound/2³².

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> bits = jax.random.bits(jax.random.key(0), (4,), jnp.uint32)
      >>> sorted(ordered_subset(bits, jnp.int32(4)).tolist())
      [0, 1, 2, 3]
    """
    step = jnp.arange(bits.shape[0], dtype=jnp.int32)
    swapped = step + (bits % (bound - step).astype(jnp.uint32)).astype(jnp.int32)

    def before(back: Int[Array, ""], place: Int[Array, " m"]) -> Int[Array, " m"]:
        earlier = bits.shape[0] - 2 - back
        return jnp.where((step > earlier) & (place == swapped[earlier]), earlier, place)

    # A loop and not an unrolled chain: XLA would fuse the chain into the gather that uses the result and
    # compute it anew for every pixel.
    return jax.lax.fori_loop(0, bits.shape[0] - 1, before, swapped)


def _uniform(bits: UInt32[Array, ""], inclusive: tuple[int, int]) -> Int[Array, ""]:
    low, high = inclusive
    return low + (bits % (high - low + 1)).astype(jnp.int32)


def _rotate(
    x: Shaped[Array, "ways count size"], turns: Int[Array, " ways"], example: tuple[int, ...]
) -> Shaped[Array, "ways count size"]:
    """Turns the examples of slot i by 90° · turns[i] counter-clockwise."""
    images = x.reshape(*x.shape[:2], *example)
    which = turns.reshape((-1,) + (1,) * (images.ndim - 1))
    # A quarter turn and a half turn: two selects in place of four.
    images = jnp.where(which % 2 == 1, jnp.rot90(images, axes=(2, 3)), images)
    return jnp.where(which >= 2, jnp.flip(images, axis=(2, 3)), images).reshape(x.shape)


def _range(argument: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int | np.integer) else value
    try:
        low, high = pair
        good = isinstance(low, int | np.integer) and isinstance(high, int | np.integer) and 1 <= low <= high
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"{argument} must be a positive integer or a pair (low, high), 1 <= low <= high, got {value!r}"
        )
    return int(low), int(high)


def _compact(inclusive: tuple[int, int]) -> int | tuple[int, int]:
    return inclusive[0] if inclusive[0] == inclusive[1] else inclusive


def _checked_examples(x, y) -> tuple[np.ndarray, np.ndarray]:
    """`x` as uint8 or float32 and the labels as strings, or a ValueError."""
    x, y = np.asarray(x), np.asarray(y)
    if y.ndim != 1 or x.ndim < 1 or len(x) != len(y):
        raise ValueError(
            f"x must be (n, *shape) and y (n,) with one label per example, got {x.shape} and {y.shape}"
        )
    if len(x) == 0:
        raise ValueError("x has no examples")
    if x.dtype != np.uint8:
        if not np.issubdtype(x.dtype, np.floating):
            raise ValueError(f"x must be uint8 (0..255) or floating point, got {x.dtype}")
        x = x.astype(np.float32, copy=False)
    if y.dtype.kind == "O" and all(isinstance(label, str) for label in y):
        y = y.astype(str)
    if y.dtype.kind not in "iuU":
        raise ValueError(f"y must hold integer or string class labels, got {y.dtype}")
    return x, y.astype(str)
