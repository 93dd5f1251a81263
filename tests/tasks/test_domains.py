"""Tests of domains: support and queries from different domains, and domains held out for test."""

import collections
import itertools
from fractions import Fraction

import jax
import numpy as np
import pytest
from draws import assert_trees_equal, draw, sampled
from scipy import stats
from support import raises_argument_error

from jaxmeta.tasks.class_names import classes_of
from jaxmeta.tasks.domains import DomainTable
from jaxmeta.tasks.episodes import from_arrays
from jaxmeta.tasks.splits import ClassSplit
from jaxmeta.tasks.supervised import supervised

NAMES = "abcdef"


def examples(counts, seed=0):
    """Return examples x = (class, domain, index) in random order, with their classes and domains."""
    rows = [
        (label, domain, index)
        for label, row in enumerate(counts)
        for domain, count in enumerate(row)
        for index in range(count)
    ]
    x = np.array(rows, np.float32)[np.random.default_rng(seed).permutation(len(rows))]
    return x, x[:, 0].astype(int), np.array(list(NAMES))[x[:, 1].astype(int)]


def across(counts, **settings):
    x, y, domains = examples(counts)
    return from_arrays(x, y, domains=domains, across=True, **settings)


def drawn_rows(tasks, count, seed=0):
    """Return support and queries as integers `(episode, slot, example, (class, domain, index))`."""
    task = sampled(tasks, count, seed)
    ways = task.query.ways
    return tuple(batch.x.reshape(count, ways, -1, 3).astype(int) for batch in task)


def prefix(order, counts, shots):
    """Return how many domains, in this order, are needed for `shots` examples."""
    return next(k for k in range(len(order) + 1) if sum(counts[d] for d in order[:k]) >= shots)


def exact(counts, shots, queries, held=()):
    """Return the probability of each pair of a support set and a set of queries, by enumeration."""
    support_domains = [d for d in range(len(counts)) if d not in held]
    orders = list(itertools.permutations(support_domains))
    chance = collections.Counter()
    for order in orders:
        k = prefix(order, counts, shots)
        pools = [
            [(d, i) for d in domains for i in range(counts[d])] for domains in (order[:k], held or order[k:])
        ]
        pairs = list(
            itertools.product(
                itertools.combinations(sorted(pools[0]), shots),
                itertools.combinations(sorted(pools[1]), queries),
            )
        )
        for pair in pairs:
            chance[pair] += Fraction(1, len(orders) * len(pairs))
    assert sum(chance.values()) == 1
    return chance


def check_frequencies(chance, drawn):
    """Assert by a χ² test that pairs are drawn with their probabilities."""
    seen = collections.Counter(drawn)
    assert set(seen) <= set(chance)
    pairs = sorted(chance)
    expected = np.array([float(chance[pair]) for pair in pairs]) * len(drawn)
    assert expected.min() > 4
    assert stats.chisquare([seen[pair] for pair in pairs], expected).pvalue > 1e-3


def pairs_of(support, query):
    return [
        (tuple(sorted(map(tuple, s[:, 1:].tolist()))), tuple(sorted(map(tuple, q[:, 1:].tolist()))))
        for s, q in zip(support, query, strict=True)
    ]


@pytest.mark.nightly_rows(after=2)
@pytest.mark.parametrize(
    ("counts", "shots", "queries"),
    [
        ([2, 1, 3], 1, 1),
        ([1, 1, 2, 2], 2, 2),
        ([1, 1, 1, 1], 2, 1),
        ([0, 2, 2, 1], 2, 1),
        ([3, 3], 2, 2),
        ([4, 1, 1], 1, 1),
    ],
)
def test_pairs_of_support_and_queries_have_the_frequencies_of_the_rule(counts, shots, queries):
    others = [[1] * len(counts), [4] * len(counts), counts[::-1]]
    tasks = across(
        [counts, *others[: 3 if min(counts) else 2]],
        ways=2,
        shots=shots,
        queries=queries,
        skip_small_classes=True,
    )
    support, query = drawn_rows(tasks, 30_000)
    in_class_0 = support[:, :, 0, 0] == 0
    check_frequencies(exact(counts, shots, queries), pairs_of(support[in_class_0], query[in_class_0]))


@pytest.mark.parametrize("shots", [1, 2])
def test_queries_of_held_out_domains_have_the_frequencies_of_the_rule(shots):
    counts = [2, 1, 2, 0, 2]
    tasks = across([counts, [3] * 5], ways=2, shots=shots, queries=2, split="test", test_domains=("a", "e"))
    assert tasks.card.protocol == "queries from a, e, held out of training, support from other domains"
    support, query = drawn_rows(tasks, 20_000)
    in_class_0 = support[:, :, 0, 0] == 0
    check_frequencies(exact(counts, shots, 2, held=(0, 4)), pairs_of(support[in_class_0], query[in_class_0]))


def test_classes_with_equal_counts_use_the_same_domains_and_examples_do_not_depend_on_each_other():
    support, query = drawn_rows(across([[3] * 5] * 4, ways=2, shots=1, queries=2), 20_000)
    assert (support[..., 1] == support[:, :1, :, 1]).all()
    assert (query[..., 1] == query[:, :1, :, 1]).all()
    assert not (support[:, :, :, None, 1] == query[:, :, None, :, 1]).any()
    # The index of an example within its domain is independent of the other class's.
    pairs = np.unique(support[:, :, 0, 2], axis=0, return_counts=True)[1]
    assert len(pairs) == 9
    assert stats.chisquare(pairs).pvalue > 1e-3
    # Two queries of one domain are distinct.
    same_domain = query[:, 0, 0, 1] == query[:, 0, 1, 1]
    assert same_domain.any()
    assert (query[same_domain, 0, 0, 2] != query[same_domain, 0, 1, 2]).all()


def test_the_classes_and_their_order_are_uniform():
    support, _ = drawn_rows(across([[1, 2, 3]] * 4, ways=2, shots=1), 12_000)
    counts = np.unique(support[:, :, 0, 0], axis=0, return_counts=True)[1]
    assert len(counts) == 12
    assert stats.chisquare(counts).pvalue > 1e-3


def test_domains_without_across_leave_episodes_unchanged():
    x, y, domains = examples([[2, 2, 2]] * 5)
    settings = {"ways": 3, "shots": 1, "queries": 2}
    plain, tasks = from_arrays(x, y, **settings), from_arrays(x, y, domains=domains, **settings)
    assert_trees_equal(sampled(plain, 20), sampled(tasks, 20))
    assert plain.card == tasks.card


def test_held_out_domains_are_used_in_test_only():
    x, y, domains = examples([[3, 3, 3, 3]] * 15)
    split = ClassSplit(tuple(map(str, range(5))), ("5", "6", "7", "8", "9"), tuple(map(str, range(10, 15))))
    hashes = set()
    for part, seen, sentence in (
        ("train", {0, 2}, "without b, d, held out for test"),
        ("validation", {0, 2}, "without b, d, held out for test"),
        ("test", {1, 3}, "support and queries from b, d, held out of training"),
    ):
        tasks = from_arrays(
            x,
            y,
            domains=domains,
            ways=3,
            shots=2,
            queries=2,
            split=part,
            classes=split,
            test_domains=["d", "b"],
        )
        support, query = drawn_rows(tasks, 50)
        assert set(support[..., 1].ravel()) == set(query[..., 1].ravel()) == seen
        assert tasks.card.protocol == sentence
        assert tasks.sample.args[1].x.shape == (30, 3)
        hashes.add(tasks.card.split_hash)
    assert hashes == {split.hash}


def test_training_across_domains_excludes_held_out_domains():
    settings = {"ways": 3, "shots": 2, "queries": 2, "test_domains": ("a",)}
    tasks = across([[3, 3, 3]] * 5, **settings)
    support, query = drawn_rows(tasks, 50)
    assert set(support[..., 1].ravel()) == {1, 2}
    assert (support[..., :1, 1] + query[..., 1] == 3).all()
    assert tasks.card.protocol == "support and query from different domains, without a, held out for test"


def test_episodes_across_domains_are_pure_under_jit_and_vmap_and_masked_where_ragged():
    groups = {str(c): "uv"[c % 2] for c in range(8)}
    x, y, domains = examples([[2, 1, 3, 1]] * 8)
    tasks = from_arrays(
        x, y, ways=(2, 4), shots=(1, 2), queries=2, domains=domains, across=True, groups=groups
    )
    batch = sampled(tasks, 40)
    for i, key in enumerate(jax.random.split(jax.random.key(0), 40)[:4]):
        task = draw(tasks.sample, key)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), batch, task)
    classes = classes_of(tasks, jax.random.split(jax.random.key(0), 40)[0])
    assert len({groups[name] for name in classes if name}) == 1
    support, query = (b.x.reshape(40, 4, 2, 3) for b in batch)
    masks = [b.mask.reshape(40, 4, 2) for b in batch]
    assert {row.sum() for row in masks[0].any(2)} == {2, 3, 4}
    for s, q, s_mask, q_mask in zip(support, query, *masks, strict=True):
        for slot in range(4):
            assert not set(s[slot, s_mask[slot], 1]) & set(q[slot, q_mask[slot], 1])


def test_mini_batches_use_the_domains_of_training_only():
    tasks = supervised(across([[3, 3, 3]] * 5, ways=3, shots=1, test_domains=("a",)), batch=200)
    x = np.concatenate([batch.x for batch in sampled(tasks, 1)], 1)[0].astype(int)
    assert set(x[:, 1]) == {1, 2}
    assert set(x[:, 0]) == set(range(5))


def test_zero_shot_queries_are_from_held_out_domains():
    x, y, domains = examples([[2, 2]] * 4)
    metadata = {str(c): [float(c)] for c in range(4)}
    tasks = from_arrays(
        x,
        y,
        ways=3,
        shots=0,
        queries=2,
        metadata=metadata,
        domains=domains,
        split="test",
        test_domains=("b",),
        across=True,
    )
    task = sampled(tasks, 50)
    assert set(task.query.x[..., 1].ravel()) == {1}
    np.testing.assert_array_equal(task.support.x[:, :, 0], task.query.x[:, ::2, 0])


def brute_force(counts, shots, held):
    """Return the fewest examples left for the queries, over all orders of the domains."""
    support_domains = [d for d in range(len(counts)) if d not in held]
    orders = itertools.permutations(support_domains)
    left = (
        [d for d in support_domains if d not in order[: prefix(order, counts, shots)]] for order in orders
    )
    return min(sum(counts[d] for d in (held or rest)) for rest in left)


def test_the_fewest_remaining_examples_are_those_of_the_worst_order():
    generator = np.random.default_rng(0)
    for _ in range(300):
        counts = generator.integers(0, 6, generator.integers(1, 6)).tolist()
        shots = int(generator.integers(0, 6))
        held = tuple(range(generator.integers(0, len(counts))))
        available = sum(counts[len(held) :])
        mask = np.isin(np.arange(len(counts)), held) if held else None
        [remaining] = DomainTable(np.array([counts]), mask).remaining(shots)
        assert remaining == (brute_force(counts, shots, held) if available >= shots else available - shots)


def test_classes_too_small_in_some_order_are_refused_or_skipped():
    counts = [[2, 2, 2], [1, 5, 1], [2, 2, 2], [3, 3, 0]]
    settings = {"ways": 2, "shots": 2, "queries": 3}
    with pytest.raises(ValueError, match=r"2 of 4 .* too few in some order of the domains: 0 \(6\), 2 \(6\)"):
        across([[1, 4, 1], [5, 5, 5], [1, 4, 1], [3, 3, 0]], **settings)
    with pytest.warns(UserWarning, match=r"1 of 4 .* shots \+ queries = 2 \+ 3, and are left out: 1 \(7\)"):
        tasks = across(counts, **settings, skip_small_classes=True)
    assert tasks.classes == ("0", "2", "3")
    with pytest.raises(ValueError, match=r"1 of 2 classes have too few: 1 \(2\)"):
        across([[3, 4], [2, 0]], **settings, split="test", test_domains=("b",))
    x, y, domains = examples([[5, 4], [0, 2]])
    with pytest.raises(ValueError, match=r"1 of 2 classes have fewer: 1 \(0\)"):
        from_arrays(x, y, domains=domains, test_domains=("b",), **settings)


X, Y, DOMAINS = examples([[2, 2]] * 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domains": None}, "across: the examples have no domains"),
        (
            {"domains": None, "across": False, "test_domains": ("a",)},
            "test_domains: the examples have no domains",
        ),
        ({"domains": DOMAINS[1:]}, r"domains: got shape \(11,\); it must be \(12,\)"),
        ({"domains": DOMAINS[None]}, r"domains: got shape \(1, 12\)"),
        ({"domains": "a" * 12}, "domains: got 'a.*' .str.; it must be one domain name per example"),
        ({"domains": np.zeros(12)}, "domains: got float64; it must hold names or integers"),
        ({"domains": ["a"] * 11 + [""]}, r"domains: domains\[11\] is an empty name"),
        ({"domains": ["a"] * 12}, "across: .* at least two domains; the examples have only 'a'"),
        ({"test_domains": ("b",)}, "across: .*; without b, which test_domains holds out, .* only 'a'"),
        ({"test_domains": ("b", "z")}, "test_domains: got 'z'; the domains are 'a', 'b'"),
        ({"test_domains": ("b", "a")}, "test_domains: got .* which are all domains; training needs another"),
        ({"test_domains": ()}, "test_domains: got no names"),
        ({"test_domains": "b"}, "test_domains: got 'b' .str.; it must be a tuple of domain names"),
        ({"across": 1}, "across: got 1; it must be one of True, False"),
    ],
)
def test_invalid_domains_are_refused(settings, message):
    with raises_argument_error(message):
        from_arrays(X, Y, **{"ways": 2, "shots": 1, "domains": DOMAINS, "across": True} | settings)
