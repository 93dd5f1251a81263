"""Tests of sequences: random order of the examples, and labels that are specific to a sequence."""

import itertools

import jax
import numpy as np
import pytest
from draws import assert_trees_equal, draw, drawn, sampled
from scipy import stats

import jaxmeta as jm

WAYS, SHOTS = 4, 3
KEY = jax.random.key(0)


def few_shot(ways=WAYS, shots=SHOTS, queries=2, classes=9, **settings):
    """Return tasks whose examples are (class, number), both from 1, since padding is 0."""
    per_class = 8
    x = np.array([(c, i) for c in range(classes) for i in range(per_class)], np.float32) + 1
    return jm.tasks.from_arrays(
        x, np.repeat(np.arange(classes), per_class), ways=ways, shots=shots, queries=queries, **settings
    )


def real(batch, i):
    """Return the classes, numbers and labels of the i-th task without padding."""
    kept = np.ones(batch.y.shape[1], bool) if batch.mask is None else batch.mask[i]
    return [*batch.x[i, kept].astype(int).T.tolist(), batch.y[i, kept].tolist()]


@pytest.mark.nightly_rows(after=2)
@pytest.mark.parametrize(("length", "steps"), [(None, 12), (4, 4), (20, 20)])
def test_shapes_and_types(length, steps):
    x = np.zeros((40, 2, 3, 1), np.uint8)
    tasks = jm.tasks.from_arrays(x, np.repeat(np.arange(5), 8), ways=4, shots=3, queries=2)
    support, query = drawn(jm.tasks.sequences(tasks, length=length))
    assert support.x.shape == (steps, 2, 3, 1)
    assert support.y.shape == (steps,)
    assert query.x.shape == (8, 2, 3, 1)
    assert query.y.shape == (8,)
    assert support.y.dtype == query.y.dtype == np.int32
    assert support.x.dtype == np.float32
    assert support.ways == query.ways == 4
    assert support.mask is None
    assert query.mask is None


def test_the_key_determines_the_sequence_alone_and_in_a_batch():
    tasks = jm.tasks.sequences(few_shot(), strings=(3, 2), ways=3)
    first, again, other = (drawn(tasks, seed) for seed in (0, 0, 1))
    assert_trees_equal(first, again)
    assert not np.array_equal(first.support.x, other.support.x)
    batch = sampled(tasks, 3, seed=5)
    for i, key in enumerate(jax.random.split(jax.random.key(5), 3)):
        assert_trees_equal(
            jax.tree.map(lambda leaf, i=i: leaf[i], batch), jax.device_get(draw(tasks.sample, key))
        )


@pytest.mark.nightly_rows(after=2)
@pytest.mark.parametrize(
    "settings",
    [{}, {"even": True}, {"length": 24}, {"ways": 2, "strings": (2, 2)}, {"strings": (3, 2)}, {"ways": 3}],
    ids=str,
)
def test_a_class_has_one_label_and_its_next_example_each_time(settings):
    support, query = sampled(jm.tasks.sequences(few_shot(), **settings), 40)
    orders = set()
    for i in range(40):
        classes, numbers, labels = real(support, i)
        query_rows = real(query, i)
        pairs = {*zip(classes, labels, strict=True), *zip(query_rows[0], query_rows[2], strict=True)}
        # Classes and labels correspond one to one, in the sequence and in the queries.
        assert len({c for c, _ in pairs}) == len({label for _, label in pairs}) == len(pairs)
        assert len(pairs) <= settings.get("ways", WAYS)
        for c in set(classes):
            support_numbers = [number for k, number in zip(classes, numbers, strict=True) if k == c]
            first = set(support_numbers[:SHOTS])
            assert len(first) == min(len(support_numbers), SHOTS)
            assert set(support_numbers) == first  # examples repeat once all have been used
            query_numbers = [number for k, number in zip(*query_rows[:2], strict=True) if k == c]
            assert len(query_numbers) == 2
            assert not set(query_numbers) & set(support_numbers)
        orders.add(tuple(labels))
    assert len(orders) > 30


def test_classes_of_steps_are_uniform_and_independent():
    support, _ = sampled(jm.tasks.sequences(few_shot(), length=8), 4000)
    for t in range(8):
        assert stats.chisquare(np.bincount(support.y[:, t], minlength=WAYS)).pvalue > 1e-3
    pairs = np.zeros((WAYS, WAYS), int)
    np.add.at(pairs, (support.y[:, ::2].ravel(), support.y[:, 1::2].ravel()), 1)
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3
    # The counts of a sequence are multinomial, with variance T p (1 − p).
    counts = (support.y == 0).sum(1)
    assert abs(counts.var() - 1.5) < 4 * 1.5 * np.sqrt(2 / 4000)


@pytest.mark.parametrize("ways", [None, 2])
def test_even_sequences_have_equal_counts_in_random_order(ways):
    tasks = few_shot(ways=2 if ways is None else 3)
    support, _ = sampled(
        jm.tasks.sequences(tasks, length=4 if ways is None else 6, even=True, ways=ways), 3000
    )
    orders = {order: 0 for order in set(itertools.permutations([0, 0, 1, 1]))}
    for row in map(tuple, support.y[:, :4].tolist()):
        orders[row] += 1  # a KeyError if a class does not occur twice
    assert stats.chisquare(list(orders.values())).pvalue > 1e-3


def test_strings_are_distinct_and_uniform():
    tasks = jm.tasks.sequences(few_shot(), strings=(3, 2), even=True)
    support, query = sampled(tasks, 2000)
    assert support.ways == query.ways == 9
    labels = np.stack([np.unique(row) for row in support.y])  # cannot stack if two classes share a label
    assert labels.shape == (2000, WAYS)
    assert labels.min() == 0
    assert labels.max() == 8
    np.testing.assert_array_equal(np.stack([np.unique(row) for row in query.y]), labels)
    # Only the string of the first query: those of one task are not independent.
    assert stats.chisquare(np.bincount(query.y[:, 0], minlength=9)).pvalue > 1e-3


def test_all_strings_are_used_if_there_are_as_many_as_classes():
    support, _ = sampled(jm.tasks.sequences(few_shot(), strings=(2, 2), even=True), 20)
    assert all(set(row) == {0, 1, 2, 3} for row in support.y.tolist())


@pytest.mark.nightly_rows(after=2)
@pytest.mark.parametrize("strings", [None, (3, 2)])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("ways", [1, 3, 4])
def test_classes_not_in_use_are_masked(ways, even, strings):
    tasks = jm.tasks.sequences(few_shot(), length=8, even=even, strings=strings, ways=ways)
    support, query = sampled(tasks, 200)
    assert support.x.shape == (200, 8, 2)
    np.testing.assert_array_equal(support.mask, np.broadcast_to(np.arange(8) < 2 * ways, (200, 8)))
    for part in (support, query):
        assert part.ways == (4 if strings is None else 9)
        np.testing.assert_array_equal(part.x[~part.mask], 0)
        np.testing.assert_array_equal(part.y[~part.mask], 0)
        assert (part.x[part.mask] > 0).all()
    np.testing.assert_array_equal(query.mask.sum(1), 2 * ways)
    kinds = [np.unique(support.y[i][support.mask[i]], return_counts=True) for i in range(200)]
    for i, (labels, counts) in enumerate(kinds):
        assert set(labels) <= set(query.y[i][query.mask[i]])
        assert not even or counts.tolist() == [2] * ways
    assert max(len(labels) for labels, _ in kinds) == ways
    if strings is None:
        assert support.y.max() == query.y.max() == ways - 1


def test_labels_of_the_classes_in_use_are_uniform():
    support, _ = sampled(jm.tasks.sequences(few_shot(), ways=3), 2000)
    for t in (0, 8):
        assert stats.chisquare(np.bincount(support.y[:, t], minlength=3)).pvalue > 1e-3


def test_with_ways_equals_sequences_with_these_ways():
    tasks = jm.tasks.sequences(few_shot(), even=True)
    for ways in (2, 4):
        expected = drawn(jm.tasks.sequences(few_shot(), even=True, ways=ways))
        assert_trees_equal(drawn(jm.tasks.with_ways(tasks, ways)), expected)
        assert_trees_equal(drawn(jm.tasks.with_ways(jm.tasks.with_ways(tasks, 3), ways)), expected)
    assert drawn(tasks).support.mask is None  # the original tasks are unchanged


def test_one_compiled_program_serves_all_numbers_of_ways():
    traced = []

    @jax.jit
    def counted(sample, key):
        traced.append(True)
        return sample(key)

    tasks = jm.tasks.sequences(few_shot(), strings=(3, 2))
    used = [int(counted(jm.tasks.with_ways(tasks, n).sample, KEY).support.mask.sum()) for n in (1, 2, 4)]
    assert used == [3, 6, 12]
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        ({}, {"length": 3}, "length: got 3 steps for 4 classes"),
        ({}, {"length": 10}, "length: got 10; it must be a multiple of the 4 classes"),
        ({}, {"strings": (3, 1)}, "strings: .*3 strings for 4 classes"),
        ({}, {"ways": 0}, "ways: got 0"),
        ({}, {"ways": 5}, "ways: got 5"),
        ({"ways": (2, 4)}, {}, r"tasks: got ways=\(2, 4\)"),
        ({"shots": (1, 3)}, {}, r"tasks: .*shots=\(1, 3\)"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(tasks, settings, message):
    with pytest.raises(ValueError, match=message):
        jm.tasks.sequences(few_shot(**tasks), **settings)


def test_regression_is_refused():
    with pytest.raises(ValueError, match=r"tasks: got ways=None.*classification"):
        jm.tasks.sequences(jm.tasks.sinusoid("train"))


def test_with_ways_refuses_other_tasks():
    with pytest.raises(ValueError, match=r"tasks: got .* it must be from jm\.tasks\.sequences"):
        jm.tasks.with_ways(few_shot(), 2)
    tasks = jm.tasks.sequences(few_shot())
    with pytest.raises(ValueError, match="tasks: got TaskDistribution of another source"):
        jm.tasks.with_ways(tasks._replace(sample=lambda key: tasks.sample(key)), 2)
    for ways in (0, 5):
        with pytest.raises(ValueError, match=f"ways: got {ways}"):
            jm.tasks.with_ways(tasks, ways)


def test_the_card_describes_the_sequences():
    tasks = few_shot(protocol="a split of its own")
    plain, named = jm.tasks.sequences(tasks).card, jm.tasks.sequences(tasks, length=8, strings=(3, 2)).card
    assert (plain.ways, plain.shots, plain.queries) == (WAYS, SHOTS, 2)
    for card, steps in ((plain, 12), (named, 8)):
        assert card.protocol.startswith("a split of its own, ")
        assert f"sequences of {steps} examples" in card.protocol
        assert "one step late" in card.protocol
        assert (card.tasks, card.split, card.split_hash) == ("arrays", "train", tasks.card.split_hash)
    assert "2 characters of 3 letters" in named.protocol
    assert "letters" not in plain.protocol
