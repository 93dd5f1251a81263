"""Tests of episodes: disjoint, balanced, uniform, shuffled, pure, masked where ragged, and rotated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import draw, drawn, numbered, sampled
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import jaxmeta as jm
from jaxmeta.tasks.class_names import classes_of
from jaxmeta.tasks.episodes import from_arrays
from jaxmeta.tasks.labelled import labelled
from jaxmeta.tasks.splits import PARTS, ClassSplit, in_order
from jaxmeta.tasks.subset import ordered_subset


def check_episode(sizes, ways, shots, queries, seed):
    """Assert that each class has one label and its shots and queries, all distinct examples."""
    x, y = numbered(sizes)
    support, query = drawn(from_arrays(x, y, ways=ways, shots=shots, queries=queries), seed)
    assert support.ways == query.ways == ways
    assert support.mask is None
    assert query.mask is None
    np.testing.assert_array_equal(np.asarray(support.y), np.repeat(np.arange(ways), shots))
    np.testing.assert_array_equal(np.asarray(query.y), np.repeat(np.arange(ways), queries))
    rows = [tuple(row) for row in np.concatenate([support.x, query.x]).astype(int).tolist()]
    assert len(set(rows)) == ways * (shots + queries)  # distinct, so support and query are disjoint
    assert all(0 <= i < sizes[c] for c, i in rows)
    classes = np.concatenate([support.x, query.x])[:, 0]
    slots = np.concatenate([support.y, query.y])
    assert len(set(zip(classes, slots, strict=True))) == ways  # slots and classes correspond one to one


def test_support_and_queries_are_disjoint():
    for seed in range(20):
        check_episode([4, 7, 9, 5, 6], 3, 2, 2, seed)


@pytest.mark.nightly
@given(
    sizes=st.lists(st.integers(4, 9), min_size=4, max_size=12),
    ways=st.integers(1, 4),
    shots=st.integers(1, 2),
    queries=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=12, deadline=None)
def test_support_and_queries_are_disjoint_for_random_sizes(sizes, ways, shots, queries, seed):
    check_episode(sizes, ways, shots, queries, seed)


def shuffled(bits, bound):
    """Return the first `len(bits)` entries of a Fisher–Yates shuffle of [0, bound) by random `bits`."""
    items = list(range(bound))
    for i, b in enumerate(bits):
        j = i + int(b) % (bound - i)
        items[i], items[j] = items[j], items[i]
    return items[: len(bits)]


SUBSET = jax.jit(ordered_subset)


@given(m=st.sampled_from([1, 2, 5, 9]), extra=st.integers(0, 5), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_ordered_subset_is_a_fisher_yates_shuffle(m, extra, seed):
    bound = m + extra
    bits = np.random.default_rng(seed).integers(0, 2**32, m, dtype=np.uint32)
    assert SUBSET(bits, np.int32(bound)).tolist() == shuffled(bits, bound)


def test_every_ordered_selection_is_equally_likely():
    bits = np.random.default_rng(0).integers(0, 2**32, (24_000, 3), dtype=np.uint32)
    drawn = jax.jit(jax.vmap(lambda b: ordered_subset(b, jnp.int32(4))))(bits)
    counts = {p: 0 for p in itertools.permutations(range(4), 3)}
    for row in map(tuple, np.asarray(drawn).tolist()):
        counts[row] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_classes_are_uniform_and_independent_of_slots():
    x, y = numbered([3, 4, 5, 6, 7, 8])
    support, _ = sampled(from_arrays(x, y, ways=3, shots=1), 12_000)
    table = np.zeros((6, 3), int)
    np.add.at(table, (support.x[..., 0].astype(int), support.y), 1)
    assert stats.chisquare(table.sum(1)).pvalue > 1e-3
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_examples_are_uniform_in_classes_of_unequal_size():
    x, y = numbered([3, 7])
    support, query = sampled(from_arrays(x, y, ways=2, shots=1, queries=2), 9_000)
    for batch in (support, query):
        rows = batch.x.reshape(-1, 2).astype(int)
        for c, size in ((0, 3), (1, 7)):
            counts = np.bincount(rows[rows[:, 0] == c, 1], minlength=size)
            assert stats.chisquare(counts).pvalue > 1e-3


def test_the_key_decides_the_episode():
    x, y = numbered([5] * 20)
    tasks = from_arrays(x, y, ways=5, shots=1, queries=2)
    first, same, other = (drawn(tasks, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.support.x, same.support.x)
    assert not np.array_equal(first.support.x, other.support.x)


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("rotations", ["classes", "random"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_batch_of_episodes_equals_episodes_drawn_one_by_one(rotations, compiled):
    x = np.random.default_rng(0).integers(0, 256, (40, 3, 3, 1), dtype=np.uint8)
    tasks = from_arrays(
        x, np.repeat(np.arange(8), 5), ways=(2, 4), shots=(1, 2), queries=2, rotations=rotations
    )
    batch = sampled(tasks, 6)
    for i, key in enumerate(jax.random.split(jax.random.key(0), 6)):
        task = draw(tasks.sample, key) if compiled else tasks.sample(key)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), batch, task)


def test_uint8_is_stored_on_the_device_and_scaled_to_the_unit_interval():
    x = np.array([0, 51, 255] * 4, np.uint8)[:, None]
    tasks = from_arrays(x, [0] * 6 + [1] * 6, ways=2, shots=3, queries=3)
    assert tasks.sample.args[1].x.dtype == jnp.uint8
    support, query = drawn(tasks)
    assert support.x.dtype == np.float32
    np.testing.assert_allclose(
        np.sort(np.concatenate([support.x, query.x])[:, 0])[::4], [0, 0.2, 1], atol=1e-6
    )


def test_data_are_an_argument_of_the_compiled_function():
    x, y = numbered([50] * 40)
    tasks = from_arrays(x, y, ways=3, shots=1)
    closed = jax.make_jaxpr(lambda sample, key: sample(key))(tasks.sample, jax.random.key(0))
    assert sum(np.size(constant) for constant in closed.consts) < 10
    assert any(v.aval.shape == (2000, 2) for v in closed.jaxpr.invars)


def test_equal_settings_share_one_compilation():
    x, y = numbered([4] * 6)
    traces = []

    @jax.jit
    def draw(sample, key):
        traces.append(None)
        return sample(key)

    for _ in range(2):
        draw(from_arrays(x, y, ways=3, shots=1).sample, jax.random.key(0))
    assert len(traces) == 1


def test_ragged_tasks_are_full_tasks_with_padding_masked():
    x, y = numbered([8] * 9)
    tasks = from_arrays(x + 1, y, ways=(2, 4), shots=(1, 3), queries=2)
    support, query = sampled(tasks, 3_000)
    real = support.mask.reshape(-1, 4, 3)
    present = real.any(2)
    ways, shots = present.sum(1), real.sum(2).max(1)
    for numbers, low, high in ((ways, 2, 4), (shots, 1, 3)):
        counts = np.bincount(numbers, minlength=high + 1)
        assert counts[:low].sum() == 0
        assert stats.chisquare(counts[low:]).pvalue > 1e-3
    # The first slots are the classes of the task, each with its number of shots and all queries.
    np.testing.assert_array_equal(present, np.arange(4)[None] < ways[:, None])
    expected = present[:, :, None] & (np.arange(3)[None, None] < shots[:, None, None])
    np.testing.assert_array_equal(real, expected)
    np.testing.assert_array_equal(query.mask.reshape(-1, 4, 2), np.repeat(present[:, :, None], 2, 2))
    for batch in (support, query):
        assert (batch.x[~batch.mask] == 0).all()
        assert (batch.x[batch.mask] > 0).all()
    assert tasks.card.ways == (2, 4)
    assert tasks.card.shots == (1, 3)


def test_ragged_shots_alone_leave_the_query_unmasked():
    x, y = numbered([8] * 5)
    support, query = drawn(from_arrays(x, y, ways=3, shots=(1, 3), queries=2))
    assert support.mask is not None
    assert query.mask is None


def test_ways_and_shots_of_ragged_tasks_are_drawn_independently():
    x, y = numbered([8] * 5)
    tasks = from_arrays(x, y, ways=(2, 3), shots=(1, 2), queries=1)
    mask = jax.jit(jax.vmap(tasks.sample))(jax.random.split(jax.random.key(0), 64)).support.mask
    real = np.asarray(mask).reshape(64, 3, 2)
    sizes = zip(real.any(2).sum(1).tolist(), real.any(1).sum(1).tolist(), strict=True)
    assert set(sizes) == {(2, 1), (2, 2), (3, 1), (3, 2)}


def images(classes=5, per_class=4, side=3):
    """Return random square images, distinct in all rotations, and their classes."""
    x = np.random.default_rng(0).random((classes * per_class, side, side, 2), dtype=np.float32)
    return x, np.repeat(np.arange(classes), per_class)


def identify(x, image):
    """Return the row of a stored image and its number of quarter turns."""
    for turns in range(4):
        hit = np.flatnonzero((np.rot90(x, turns, axes=(1, 2)) == image).all((1, 2, 3)))
        if len(hit):
            return hit[0], turns
    raise AssertionError("image is not stored in any rotation")


@pytest.mark.parametrize("rotations", ["classes", "random"])
def test_images_of_a_class_share_a_rotation_and_all_rotations_are_equally_likely(rotations):
    x, y = images()
    tasks = from_arrays(x, y, ways=4, shots=1, queries=2, rotations=rotations)
    assert tasks.card.classes == (20 if rotations == "classes" else 5)
    assert tasks.card.rotations == rotations
    support, query = sampled(tasks, 150)
    seen, class_repeats = np.zeros((5, 4), int), False
    for t in range(150):
        rotated = []
        for slot in range(4):
            members = [support.x[t, slot], *query.x[t, 2 * slot : 2 * slot + 2]]
            hits = [identify(x, image) for image in members]
            assert len({(y[row], turns) for row, turns in hits}) == 1
            assert len({row for row, _ in hits}) == 3
            rotated.append((y[hits[0][0]], hits[0][1]))
            seen[rotated[-1]] += 1
        assert len(set(rotated)) == 4
        class_repeats |= len({c for c, _ in rotated}) < 4
    assert stats.chisquare(seen.ravel()).pvalue > 1e-3
    # An episode has two rotations of a class only if rotations are classes.
    assert class_repeats == (rotations == "classes")


def test_rotated_classes_allow_more_ways_than_classes():
    x, y = images(classes=3)
    support, _ = drawn(from_arrays(x, y, ways=12, shots=1, rotations="classes"))
    members = [identify(x, image) for image in support.x]
    assert len({(y[row], turns) for row, turns in members}) == 12


def test_only_the_classes_of_the_split_are_on_the_device():
    x, y = numbered([4] * 6)
    names = np.array(list("abcdef"))[y]
    classes = ClassSplit(train=("a", "b", "c"), test=("d", "f", "e"))
    tasks = from_arrays(
        x, names, ways=3, shots=1, split="test", classes=classes, name="letters", protocol="p"
    )
    assert tasks.sample.args[1].x.shape == (12, 2)
    support, _ = sampled(tasks, 50)
    assert set(support.x[..., 0].ravel().tolist()) == {3, 4, 5}
    card = tasks.card
    assert (card.tasks, card.split, card.kind, card.ways, card.shots, card.queries, card.classes) == (
        "letters", "test", "classification", 3, 1, 1, 3,
    )  # fmt: skip
    assert (card.split_hash, card.rotations, card.protocol) == (classes.hash, "none", "p")


def test_random_split_by_fractions_is_one_split_for_all_parts():
    x, y = numbered([3] * 20)
    parts = [
        from_arrays(x, y, ways=2, shots=1, split=part, classes=(0.6, 0.2, 0.2), split_seed=7)
        for part in ("train", "validation", "test")
    ]
    assert [tasks.card.classes for tasks in parts] == [12, 4, 4]
    assert len({tasks.card.split_hash for tasks in parts}) == 1
    members = [set(np.asarray(tasks.sample.args[1].x[:, 0]).tolist()) for tasks in parts]
    assert set.union(*members) == set(range(20))
    assert sum(map(len, members)) == 20
    assert "seed 7" in parts[0].card.protocol


X, Y = numbered([4, 4, 2])
METADATA = {name: [float(name), 1.0] for name in "012"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": 4, "shots": 1}, "ways=4 is more than the classes of split='train': 3"),
        ({"shots": 2}, r"shots \+ queries = 2 \+ 1 = 3 .* 1 of 3 classes have fewer: 2 \(2\)"),
        ({"shots": (1, 9)}, r"= 10 examples .* 0 \(4\), 1 \(4\), 2 \(2\)"),
        ({"y": Y[:-1]}, r"x, y: got shapes \(10, 2\) and \(9,\); .* one label per example"),
        ({"x": X[:0], "y": Y[:0]}, "x, y: got no examples"),
        ({"x": X.astype(np.int32)}, "x: got int32; it must be uint8"),
        ({"y": Y.astype(float)}, "y: got float64; it must hold integer or string class labels"),
        ({"ways": 0}, "ways: got 0; it must be at least 1"),
        ({"shots": (3, 2)}, r"shots: got \(3, 2\); in a pair .* low must not exceed high"),
        ({"shots": 0}, "shots: got 0; it must be at least 1"),
        ({"queries": 0}, "queries: got 0; it must be at least 1"),
        ({"split": "val"}, "split: got 'val'"),
        ({"rotations": "all"}, "rotations: got 'all'; it must be one of"),
        ({"rotations": "random"}, r"square images .* shape \(2,\)"),
        ({"classes": ClassSplit(train=("0", "1", "9"))}, "1 of 3 classes .* have no examples: '9'"),
        ({"classes": ClassSplit(test=("0", "1"))}, "split: got 'train', which has no classes"),
        ({"classes": (0.5, 0.6, 0.0)}, "classes: got"),
        ({"groups": {"0": "a", "1": "a"}}, r"groups must have an entry for every class .* lacks 1 of 3: '2'"),
        (
            {"groups": {"0": "a", "1": "b", "2": "c"}},
            r"ways=2 is more than the classes of any group \(groups\) .* the largest, 'a', has 1",
        ),
        ({"groups": {"0": "a", "1": "b", "2": "b"}, "shots": 2}, r"1 of 2 classes have fewer: 2 \(2\)"),
        ({"shots": 0}, r"zero-shot tasks, which need one vector per class"),
        ({"metadata": METADATA}, "zero-shot tasks, which need shots=0.*; got shots=1"),
        ({"metadata": METADATA, "shots": (0, 1)}, r"got shots=\(0, 1\)"),
        ({"metadata": METADATA, "shots": 0, "ways": (1, 2)}, r"a single number of ways.*; got ways=\(1, 2\)"),
        ({"metadata": METADATA, "shots": 0, "rotations": "random"}, "got rotations='random'"),
        (
            {"metadata": {"0": [1.0]}, "shots": 0},
            "metadata must have an entry for every class .* lacks 2 of 3: '1', '2'",
        ),
        (
            {"metadata": METADATA | {"1": [0.0]}, "shots": 0},
            "one vector of numbers per class, all of one length",
        ),
        ({"metadata": METADATA | {"1": ["a", "b"]}, "shots": 0}, "one vector of numbers per class"),
        ({"metadata": METADATA | {"1": [0.0, np.nan]}, "shots": 0}, "finite; it is not for '1'"),
        (
            {"metadata": dict.fromkeys("012", np.ones((1, 2))), "shots": 0},
            r"one vector per class, got arrays of shape \(1, 2\)",
        ),
    ],
)
def test_invalid_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(**({"x": X, "y": Y, "ways": 2, "shots": 1} | changes))


def test_a_constant_predictor_is_at_chance_and_an_oracle_is_perfect():
    x, y = numbered([3] * 10)
    support, query = sampled(from_arrays(x, y, ways=5, shots=1, queries=2), 200)
    assert (query.y == 0).mean() == pytest.approx(1 / 5)
    nearest = np.abs(query.x[:, :, None, 0] - support.x[:, None, :, 0]).argmin(2)
    assert (np.take_along_axis(support.y, nearest, 1) == query.y).all()


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("rotations", ["none", "classes", "random"])
def test_episodes_of_a_key_do_not_change_between_versions(rotations):
    """An independent implementation of the draw: published results stay reproducible in later versions."""
    sizes, ways, shots, queries = [5, 6, 7, 5, 8], 3, 1, 2
    x = np.arange(sum(sizes) * 4, dtype=np.float32).reshape(-1, 2, 2, 1)
    tasks = from_arrays(
        x, np.repeat(np.arange(5), sizes), ways=ways, shots=shots, queries=queries, rotations=rotations
    )
    for seed in range(4):
        bits = np.asarray(
            jax.random.bits(jax.random.key(seed), (ways * (shots + queries + 2) + 2,), jnp.uint32)
        )
        slots = shuffled(bits[:ways], 5 * (4 if rotations == "classes" else 1))
        support, query = [], []
        for slot, number in enumerate(slots):
            turns = {"none": 0, "classes": number // 5, "random": int(bits[ways + slot]) >> 30}[rotations]
            within = shuffled(bits[2 * ways + 3 * slot :][:3], sizes[number % 5])
            images = np.rot90(x[np.array(within) + sum(sizes[: number % 5])], turns, axes=(1, 2))
            support.append(images[:shots])
            query.append(images[shots:])
        task = drawn(tasks, seed)
        np.testing.assert_array_equal(task.support.x, np.concatenate(support))
        np.testing.assert_array_equal(task.query.x, np.concatenate(query))


# --- groups and domains ------------------------------------------------------------------------------

# Groups of the classes 0 … 8; "u" has only two.
GROUPS = {str(c): {0: "u", 4: "u", 1: "v", 3: "v", 8: "v"}.get(c, "w") for c in range(9)}


def drawn_classes(tasks, count):
    """Return the classes and the indices of the support examples and queries, by episode and slot."""
    support, query = sampled(tasks, count)
    ways = support.ways
    rows = [batch.x.reshape(count, ways, -1, 2).astype(int) for batch in (support, query)]
    classes = np.concatenate(rows, 2)[..., 0]
    assert (classes == classes[:, :, :1]).all()
    return classes[:, :, 0], rows[0][..., 1], rows[1][..., 1]


def test_classes_of_an_episode_belong_to_one_group():
    x, y = numbered([8] * 9)
    tasks = from_arrays(x, y, ways=3, shots=1, queries=2, groups=GROUPS)
    # Group "u" has fewer classes than an episode.
    assert (tasks.card.classes, tasks.card.protocol) == (7, "classes within one group")
    assert tasks.sample.args[1].x.shape == (56, 2)
    classes, _, _ = drawn_classes(tasks, 6000)
    which = np.vectorize(lambda c: GROUPS[str(c)])(classes)
    assert (which == which[:, :1]).all()
    assert all(len(set(row)) == 3 for row in classes.tolist())
    groups, counts = np.unique(which[:, 0], return_counts=True)
    assert groups.tolist() == ["v", "w"]
    assert stats.chisquare(counts).pvalue > 1e-3
    for group, size in (("v", 3), ("w", 4)):
        orders, counts = np.unique(classes[which[:, 0] == group], axis=0, return_counts=True)
        assert len(orders) == {3: 6, 4: 24}[size]  # every ordered selection of three
        assert stats.chisquare(counts).pvalue > 1e-3


def test_groups_are_restricted_to_the_classes_of_the_split():
    x, y = numbered([4] * 9)
    split = ClassSplit(train=tuple("0124"), test=tuple("35678"))
    tasks = from_arrays(x, y, ways=3, shots=1, groups=GROUPS, split="test", classes=split, protocol="mine")
    classes, _, _ = drawn_classes(tasks, 50)
    assert set(classes.ravel().tolist()) == {5, 6, 7}
    assert (tasks.card.classes, tasks.card.split_hash, tasks.card.protocol) == (3, split.hash, "mine")


def test_a_single_group_is_equivalent_to_no_groups():
    x, y = numbered([4] * 6)
    tasks = from_arrays(x, y, ways=2, shots=1, groups=dict.fromkeys("012345", "all"))
    classes, _, _ = drawn_classes(tasks, 6000)
    pairs, counts = np.unique(classes, axis=0, return_counts=True)
    assert len(pairs) == 30
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("rotations", ["classes", "random"])
def test_groups_are_rotated_as_a_whole_with_rotated_classes(rotations):
    x, y = images()
    groups = {"0": "a", "3": "a", "1": "b", "2": "b", "4": "c"}
    tasks = from_arrays(x, y, ways=2, shots=1, queries=1, rotations=rotations, groups=groups)
    assert tasks.card.classes == (16 if rotations == "classes" else 4)
    support, query = sampled(tasks, 240)
    seen, one_turn = {}, []
    for t in range(240):
        hits = [identify(x, image) for image in (*support.x[t], *query.x[t])]
        members = [(groups[str(y[row])], turns) for row, turns in hits]
        assert len({group for group, _ in members}) == 1
        assert members[:2] == members[2:]
        one_turn.append(len(set(members)) == 1)
        seen[members[0]] = seen.get(members[0], 0) + 1
    assert len(seen) == 8
    assert stats.chisquare(list(seen.values())).pvalue > 1e-3
    assert np.mean(one_turn) == 1 if rotations == "classes" else 0.1 < np.mean(one_turn) < 0.4


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_one_example_per_domain_gives_all_classes_the_same_domains(groups):
    x, y = numbered([6] * 9)
    tasks = from_arrays(
        x, y, ways=3, shots=2, queries=2, groups=groups, domains=x[:, 1].astype(int), across=True
    )
    assert tasks.card.protocol.endswith("support and query from different domains")
    classes, support, query = drawn_classes(tasks, 6000)
    domains = np.concatenate([support, query], 2)
    assert (domains == domains[:, :1]).all()
    assert all(len(set(row)) == 4 for row in domains[:, 0].tolist())
    for example in range(4):
        assert stats.chisquare(np.bincount(domains[:, 0, example], minlength=6)).pvalue > 1e-3
    for pair in ([0, 1], [0, 2], [2, 3]):
        pairs, counts = np.unique(domains[:, 0, pair], axis=0, return_counts=True)
        assert len(pairs) == 30
        assert stats.chisquare(counts).pvalue > 1e-3
    if groups is None:
        assert stats.chisquare(np.bincount(classes.ravel(), minlength=9)).pvalue > 1e-3


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("options", [{"across": True}, {"ways": (2, 3)}])
def test_grouped_episodes_are_pure_under_jit_and_vmap(options):
    x, y = numbered([6] * 9)
    options = {"groups": GROUPS, "domains": x[:, 1].astype(int)} | options
    tasks = from_arrays(x, y, **{"ways": 3, "shots": 1, "queries": 2} | options)
    batch = sampled(tasks, 4)
    for i, key in enumerate(jax.random.split(jax.random.key(0), 4)):
        task = draw(tasks.sample, key)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), batch, task)
    assert len(np.unique(batch.query.x, axis=0)) == 4


# --- zero-shot ----------------------------------------------------------------------------------------------


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("options", [{}, {"groups": GROUPS}])
def test_zero_shot_support_is_the_metadata_of_the_classes(options):
    x, y = numbered([4] * 9)
    metadata = {str(c): np.array([c, c**2, 0.5]) for c in range(9)}
    tasks = from_arrays(x, y, ways=3, shots=0, queries=2, metadata=metadata, **options)
    assert (tasks.card.ways, tasks.card.shots, tasks.card.queries) == (3, 0, 2)
    support, query = sampled(tasks, 500)
    assert (support.x.shape, support.x.dtype, support.y.dtype) == ((500, 3, 3), np.float32, np.int32)
    assert support.mask is None
    assert support.ways == query.ways == 3
    np.testing.assert_array_equal(support.y, np.tile(np.arange(3), (500, 1)))
    classes = query.x.reshape(500, 3, 2, 2)[..., 0]
    for column, of_class in enumerate((classes, classes**2, 0 * classes + 0.5)):
        np.testing.assert_array_equal(support.x[..., column, None].repeat(2, 2), of_class)
    assert set(classes.ravel().tolist()) == (set(range(9)) - {0, 4} if options else set(range(9)))
    task = draw(tasks.sample, jax.random.split(jax.random.key(0), 500)[7])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[7], b), (support, query), tuple(task))


def test_zero_shot_needs_examples_for_queries_and_metadata_for_its_part_only():
    x = np.random.default_rng(0).random((8, 1024), dtype=np.float32)
    y = np.repeat(list("abcd"), 2)
    split = ClassSplit(train=("a", "c"), test=("b", "d"))
    metadata = {"d": np.ones(5), "b": np.zeros(5), "elsewhere": np.ones(7)}
    tasks = from_arrays(x, y, ways=2, shots=0, queries=2, metadata=metadata, split="test", classes=split)
    support, query = drawn(tasks)
    assert query.x.shape == (4, 1024)
    slot = int(support.x[1, 0])  # where "d" is
    np.testing.assert_array_equal(np.sort(query.x[2 * slot : 2 * slot + 2], 0), np.sort(x[6:], 0))
    with pytest.raises(ValueError, match=r"shots \+ queries = 0 \+ 3 = 3"):
        from_arrays(x, y, ways=2, shots=0, queries=3, metadata=metadata, split="test", classes=split)


# --- class order and class names ------------------------------------------------------------


def tasks_of_labels(labels, split="train", **settings):
    """Return tasks with two examples per class, whose pixel is the label."""
    labels = np.repeat(labels, 2)
    x = np.array([float(label) for label in labels], np.float32)[:, None]
    return from_arrays(x, labels, ways=3, shots=1, split=split, **settings)


@pytest.mark.parametrize("kind", [int, str, np.uint8])
def test_numeric_class_names_are_sorted_numerically(kind):
    tasks = tasks_of_labels([kind(label) for label in (20, 1, 3, 10, 2, 100)])
    assert tasks.classes == ("1", "2", "3", "10", "20", "100")
    x, y = labelled(tasks)
    assert x[:, 0].tolist() == [1, 1, 2, 2, 3, 3, 10, 10, 20, 20, 100, 100]
    assert y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_mixed_class_names_are_sorted_as_text():
    assert in_order(["b", "10", "2"]) == ["10", "2", "b"]
    assert in_order(["10", "9", "08"]) == ["08", "9", "10"]
    # The names of the whole split decide, so that all parts have the same order.
    split = ClassSplit(train=("10", "2"), test=("x",))
    assert (split.ordered("train"), split.ordered("test")) == (["10", "2"], ["x"])
    assert ClassSplit(train=("10", "2"), test=("7",)).ordered("train") == ["2", "10"]


def test_split_and_hash_do_not_depend_on_the_class_order():
    names = [str(label) for label in range(30)]
    split = ClassSplit.from_fractions(names)
    parts = [tasks_of_labels(list(range(30)), part, classes=(0.64, 0.16, 0.2)) for part in PARTS]
    for name, tasks in zip(PARTS, parts, strict=True):
        assert tasks.card.split_hash == split.hash
        assert tasks.classes == tuple(sorted(split.part(name), key=int))


@pytest.mark.parametrize("ways", [3, (2, 4)])
def test_classes_of_returns_the_class_name_of_each_slot(ways):
    labels = np.repeat([20, 1, 3, 10, 2, 100], 3)
    x = labels.astype(np.float32)[:, None]
    tasks = from_arrays(x, labels, ways=ways, shots=1, queries=2)
    padded = 0
    for seed in range(6):
        support, query = tasks.sample(jax.random.key(seed))
        names = classes_of(tasks, jax.random.key(seed))
        for part in (support, query):
            real = np.ones(part.y.size, bool) if part.mask is None else np.asarray(part.mask)
            pixels = np.asarray(part.x)[real, 0]
            assert pixels.tolist() == [float(names[slot]) for slot in np.asarray(part.y)[real]]
        padded += names.count("")
    assert bool(padded) == (ways != 3)


def test_rotated_classes_are_named_by_class_and_angle_and_unnamed_ones_are_refused():
    x = np.arange(48, dtype=np.float32).reshape(12, 2, 2)
    tasks = from_arrays(x, np.repeat([*"abcdef"], 2), ways=4, shots=1, rotations="classes")
    names = classes_of(tasks, jax.random.key(1))
    images = np.asarray(tasks.sample(jax.random.key(1)).support.x)
    for image, name in zip(images, names, strict=True):
        members = x["abcdef".index(name[0]) * 2 :][:2]
        turns = int(name.split()[-1][:-1]) // 90 if "turned" in name else 0
        assert any(np.array_equal(image, np.rot90(stored, turns)) for stored in members)
    with pytest.raises(ValueError, match="tasks: got tasks of 'sinusoid', whose classes have no names"):
        classes_of(jm.tasks.sinusoid(), jax.random.key(0))
