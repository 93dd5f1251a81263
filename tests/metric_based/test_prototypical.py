"""Prototypical networks and their Bregman divergences, with the identity as the embedding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import entropy
from vectors import (
    DIM,
    IDENTITY,
    KEY,
    WAYS,
    adapted,
    batch,
    distances,
    initial,
    loss,
    of_float64,
    outputs_of,
    padded,
    predict,
    softmax,
    unequal,
)

import jaxmeta as jm
from jaxmeta.metric_based.prototypical import bregman

PROTOTYPICAL = jm.prototypical(IDENTITY)

MATRIX = np.array([[2.0, 0.5, 0, 0], [0.5, 1, 0, 0], [0, 0, 3, 1], [0, 0, 1, 1]])


def square(u):
    return (u**2).sum()


def mahalanobis(u):
    return u @ jnp.asarray(MATRIX, u.dtype) @ u


def embedding():
    return jm.nn.MLP(out=3, hidden=(5,), norm=True, kernel_init=jax.nn.initializers.lecun_normal())


def filled(params, task):
    """Return params with the statistics of one task as population statistics."""
    learner = jm.prototypical(embedding())
    total, count = jax.jit(learner.statistics)(params, task, KEY)
    return {**params, "population": jax.tree.map(lambda leaf: np.asarray(leaf) / count, total)}


def total_divergence(divergence, points, candidates):
    """Return Σ_i d(z_i, v) for every candidate v, each a separate class."""
    support = batch(candidates, range(len(candidates)), ways=len(candidates))
    return -predict(jm.prototypical(IDENTITY, divergence=divergence), support, points).sum(0)


@pytest.mark.parametrize("divergence", ["euclidean", square, mahalanobis], ids=["euclidean", "φ", "A"])
def test_the_mean_minimises_bregman_divergences_from_points(divergence, x64):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(7, DIM))
    others = points.mean(0) + rng.normal(size=(100, DIM)) * np.logspace(-3, 0, 100)[:, None]
    totals = total_divergence(divergence, points, np.concatenate([points.mean(0, keepdims=True), others]))
    assert (totals[1:] > totals[0]).all()


def test_the_mean_minimises_the_relative_entropy_of_distributions(x64):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(7, DIM))
    mean = softmax(points).mean(0)
    share = np.logspace(-3, -0.1, 100)[:, None]
    others = (1 - share) * mean + share * softmax(rng.normal(size=(100, DIM)))
    totals = total_divergence("kl", points, np.log(np.concatenate([mean[None], others])))
    assert (totals[1:] > totals[0]).all()


def test_the_mean_does_not_minimise_cosine_distances(x64):
    points = np.array([[10.0, 0], [0, 1]])
    totals = total_divergence("cosine", points, np.stack([points.mean(0), [1.0, 1.0]]))
    assert totals[1] < totals[0] - 0.1


def test_divergences_vanish_at_equal_points_and_their_total_slope_at_the_mean(x64):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(5, DIM)))
    slope = jax.jit(jax.grad(lambda v: bregman(mahalanobis, z, v[None]).sum()))
    np.testing.assert_allclose(slope(np.mean(z, 0)), 0, atol=1e-12)
    assert np.abs(slope(np.asarray(z)[0])).max() > 0.1
    actual = np.asarray(jax.jit(lambda z: bregman(mahalanobis, z, z))(z))
    np.testing.assert_allclose(np.diagonal(actual), 0, atol=1e-12)
    assert (actual >= -1e-12).all()


def test_divergences_match_their_formulas(x64):
    support, query = unequal()
    known = {
        name: predict(jm.prototypical(IDENTITY, divergence=divergence), support, query.x)
        for name, divergence in {
            "euclidean": "euclidean", "φ": square, "A": mahalanobis, "kl": "kl", "cosine": "cosine"
        }.items()
    }  # fmt: skip
    x, y = np.asarray(query.x), np.asarray(support.y)
    means = np.stack([np.asarray(support.x)[y == c].mean(0) for c in range(WAYS)])
    np.testing.assert_allclose(known["euclidean"], -distances(x, means), rtol=1e-10)
    np.testing.assert_allclose(known["φ"], known["euclidean"], rtol=1e-10)
    differences = x[:, None] - means[None]
    np.testing.assert_allclose(
        known["A"], -np.einsum("mci,ij,mcj->mc", differences, MATRIX, differences), rtol=1e-10
    )
    p, v = softmax(x), np.stack([softmax(np.asarray(support.x))[y == c].mean(0) for c in range(WAYS)])
    np.testing.assert_allclose(known["kl"], [[-entropy(a, b) for b in v] for a in p], rtol=1e-10)
    cosines = x @ means.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(means, axis=1)[None]
    np.testing.assert_allclose(known["cosine"], cosines - 1, atol=1e-12)


def test_relative_entropy_and_its_gradient_are_finite_where_probabilities_vanish():
    support, query = unequal()

    def loss(scale):
        task = jm.Task(batch(scale * support.x, support.y), batch(scale * query.x, query.y))
        return jm.prototypical(IDENTITY, divergence="kl").loss({"model": {}}, task, KEY)[0]

    value, slope = jax.jit(jax.value_and_grad(loss))(1000.0)
    assert np.isfinite(value)
    assert np.isfinite(slope)


def test_prototypes_are_a_linear_classifier(x64):
    support, query = unequal()
    x = np.asarray(query.x)
    v = np.asarray(adapted(PROTOTYPICAL, {"model": {}}, support)["fitted"]["prototypes"])
    linear = x @ (2 * v).T - np.square(v).sum(1)
    outputs = predict(PROTOTYPICAL, support, x)
    np.testing.assert_allclose(np.log(softmax(outputs)), np.log(softmax(linear)), atol=1e-12)


def test_each_class_sum_is_divided_by_its_number_of_unpadded_examples(x64):
    support, query = unequal()
    expected = np.stack([np.asarray(support.x)[np.asarray(support.y) == c].mean(0) for c in range(WAYS)])
    # Three examples in each class, some of them padding.
    x, y, mask = np.full((3, WAYS, DIM), np.nan), np.tile(np.arange(WAYS), (3, 1)), np.zeros((3, WAYS), bool)
    for c in range(WAYS):
        members = np.asarray(support.x)[np.asarray(support.y) == c]
        x[: len(members), c], mask[: len(members), c] = members, True
    ragged = batch(x.reshape(-1, DIM), y.reshape(-1), mask.reshape(-1))
    for examples in (support, ragged):
        fitted = adapted(PROTOTYPICAL, {"model": {}}, examples)["fitted"]
        np.testing.assert_allclose(fitted["prototypes"], expected, atol=1e-12)
        assert fitted["present"].all()
        np.testing.assert_allclose(
            predict(PROTOTYPICAL, examples, query.x), -distances(query.x, expected), rtol=1e-10
        )


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize(
    ("norm", "divergence"),
    [
        ("population", "euclidean"),
        ("support", "kl"),
        ("population", "kl"),
        ("support", "euclidean"),
    ],
)
def test_an_added_class_has_the_same_prototype_as_one_adapted_with_the_others(norm, divergence, x64):
    rng = np.random.default_rng(3)
    support, query = unequal()
    more = rng.normal(size=(4, DIM))
    learner = jm.prototypical(embedding(), norm=norm, divergence=divergence)
    params = filled(of_float64(initial(learner, unequal()), 0), jm.Task(support, query))
    state = adapted(learner, params, support)
    add = jax.jit(lambda state, x: jm.add_class(embedding(), params, state, x, divergence=divergence))
    larger = add(state, more)
    predict_with = jax.jit(learner.predict)
    before, after = (np.asarray(predict_with(params, fitted, query.x)) for fitted in (state, larger))
    assert after.shape == (5, WAYS + 1)
    np.testing.assert_allclose(after[:, :WAYS], before, rtol=1e-12)
    if norm == "population":
        whole = batch(np.concatenate([support.x, more]), [*np.asarray(support.y), *[3] * 4], ways=4)
        expected = adapted(learner, params, whole)["fitted"]["prototypes"]
    else:
        model = jm.nn.as_model(embedding())
        z, _ = jax.jit(model.apply_norm)(params["model"], more, stats=state["stats"])
        added = {"euclidean": np.asarray, "kl": softmax}[divergence](np.asarray(z)).mean(0, keepdims=True)
        expected = np.concatenate([state["fitted"]["prototypes"], added])
    np.testing.assert_allclose(larger["fitted"]["prototypes"], expected, rtol=1e-10)
    assert larger["fitted"]["present"].tolist() == [True] * 4
    assert state["fitted"]["prototypes"].shape[0] == WAYS


def test_adding_a_class_needs_prototypes_and_examples():
    support, query = unequal()
    learner = jm.prototypical(embedding())
    params = initial(learner, jm.Task(support, query))
    state = adapted(learner, params, support)
    with pytest.raises(ValueError, match=r"state without prototypes; .*population.* or .*support"):
        jm.add_class(embedding(), params, state, query.x)
    state = adapted(jm.prototypical(embedding(), norm="support"), params, support)
    with pytest.raises(ValueError, match=r"x: got shape \(0, 4\)"):
        jm.add_class(embedding(), params, state, jnp.zeros((0, DIM)))
    state = adapted(jm.matching(IDENTITY), {"model": {}}, support)
    with pytest.raises(ValueError, match="state without prototypes"):
        jm.add_class(IDENTITY, {"model": {}}, state, query.x)


# Zero-shot: one vector of metadata for each class.


ZERO_SHOT = jm.prototypical(IDENTITY, metadata=IDENTITY)


def described(ways=WAYS, seed=0):
    rng = np.random.default_rng(seed)
    return jm.Task(
        batch(rng.normal(size=(ways, DIM)), range(ways), ways=ways),
        batch(rng.normal(size=(6, DIM)), rng.integers(ways, size=6), ways=ways),
    )


def test_prototypes_of_metadata_have_length_one_and_queries_are_not_normalised():
    support, query = described()
    x, params = np.asarray(query.x), {"model": {}, "metadata": {}}
    v = np.asarray(adapted(ZERO_SHOT, params, support)["fitted"]["prototypes"])
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), 1, rtol=1e-6)
    outputs = outputs_of(ZERO_SHOT, params, support, 3 * x)
    np.testing.assert_allclose(outputs, -distances(3 * x, v), rtol=1e-4)
    longer = batch(5 * np.asarray(support.x), support.y)
    np.testing.assert_allclose(outputs_of(ZERO_SHOT, params, longer, 3 * x), outputs, rtol=1e-5)
    value, _ = loss(ZERO_SHOT, params, jm.Task(support, query))
    chances = softmax(outputs_of(ZERO_SHOT, params, support, x))
    np.testing.assert_allclose(value, -np.log(chances[np.arange(6), query.y]).mean(), rtol=1e-6)


def test_metadata_that_are_the_class_means_give_the_few_shot_logits(x64):
    rng = np.random.default_rng(0)
    known, query = described()
    means = np.asarray(known.x) / np.linalg.norm(known.x, axis=1, keepdims=True)
    away = rng.normal(size=(2, WAYS, DIM))
    x = np.concatenate([means[None] + away, means[None] - away]).reshape(-1, DIM)
    few = predict(jm.prototypical(IDENTITY), batch(x, np.tile(np.arange(WAYS), 4)), query.x)
    zero = predict(ZERO_SHOT, batch(7 * means, range(WAYS)), query.x, metadata={})
    np.testing.assert_allclose(zero, few, rtol=1e-10)


def test_class_slots_without_metadata_have_probability_zero():
    support, query = described(4)
    few = batch(np.asarray(support.x)[[0, 3]], [0, 3], ways=4)
    outputs = predict(ZERO_SHOT, few, query.x, metadata={})
    assert (outputs[:, [1, 2]] == -np.inf).all()
    np.testing.assert_allclose(softmax(outputs).sum(1), 1, rtol=1e-6)
    whole = predict(ZERO_SHOT, support, query.x, metadata={})
    np.testing.assert_allclose(outputs[:, [0, 3]], whole[:, [0, 3]], rtol=1e-6)
    with_padding = padded(support, [1, 4])
    np.testing.assert_allclose(predict(ZERO_SHOT, with_padding, query.x, metadata={}), whole, rtol=1e-6)


def test_zero_shot_learning_by_population_statistics_is_inductive(x64):
    support, query = described()
    learner = jm.prototypical(embedding(), metadata=jm.nn.MLP(out=3, hidden=(4,)), norm="population")
    params = of_float64(initial(learner, jm.Task(support, query)), 0)
    with pytest.raises(ValueError, match=r"jm\.calibrate"):
        learner.adapt(params, support, KEY)
    total, count = jax.jit(learner.statistics)(params, jm.Task(support, query), KEY)
    params["population"] = jax.tree.map(lambda leaf: np.asarray(leaf) / count, total)
    joint = outputs_of(learner, params, support, query.x)
    alone = outputs_of(learner, params, support, np.asarray(query.x)[:1])
    np.testing.assert_allclose(alone, joint[:1], rtol=1e-10)
    # The statistics of one task are those of its queries.
    transductive = jm.prototypical(embedding(), metadata=jm.nn.MLP(out=3, hidden=(4,)))
    np.testing.assert_allclose(outputs_of(transductive, params, support, query.x), joint, rtol=1e-8)


def test_adding_a_class_needs_batch_statistics_where_the_model_normalises():
    support, query = described()
    learner = jm.prototypical(embedding(), metadata=jm.nn.MLP(out=3, hidden=()))
    params = initial(learner, jm.Task(support, query))
    with pytest.raises(ValueError, match=r"without batch statistics.*norm=.population."):
        jm.add_class(embedding(), params, adapted(learner, params, support), query.x)
    bare = jm.nn.MLP(None, (3,))
    learner = jm.prototypical(bare, metadata=jm.nn.MLP(out=3, hidden=()))
    params = initial(learner, jm.Task(support, query))
    state = adapted(learner, params, support)
    larger = jax.jit(lambda state, x: jm.add_class(bare, params, state, x))(state, np.asarray(query.x)[:2])
    assert larger["fitted"]["prototypes"].shape[0] == state["fitted"]["prototypes"].shape[0] + 1


def test_both_networks_of_zero_shot_learning_get_gradients():
    task = described()
    learner = jm.prototypical(embedding(), metadata=jm.nn.MLP(out=3, hidden=()))
    params = initial(learner, task)
    assert set(params) == {"model", "metadata"}
    grads = jax.jit(jax.grad(lambda params: learner.loss(params, task, KEY)[0]))(params)
    for part in grads.values():
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(part)) > 1e-4


def test_widths_of_the_two_networks_must_agree():
    learner = jm.prototypical(embedding(), metadata=jm.nn.MLP(out=4, hidden=()))
    with pytest.raises(ValueError, match=r"metadata: gives embeddings of shape \(4,\), and model of \(3,\)"):
        learner.init(KEY, described())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "manhattan"}, "divergence: got 'manhattan'; it must be one of 'euclidean'"),
        ({"norm": "layer"}, "norm: got 'layer'; it must be one of"),
        (
            {"norm": "support", "metadata": IDENTITY},
            "norm: got 'support'; it must be one of 'batch', 'population'",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        jm.prototypical(IDENTITY, **settings)


@pytest.mark.parametrize("learner", [PROTOTYPICAL, ZERO_SHOT], ids=["few-shot", "zero-shot"])
def test_float_targets_are_refused(learner):
    part = jm.Batch(jnp.ones((3, DIM)), jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="integer class slots"):
        learner.loss({"model": {}, "metadata": {}}, jm.Task(part, part), KEY)
    with pytest.raises(ValueError, match=r"integer class slots|number of classes"):
        learner.adapt({"model": {}, "metadata": {}}, part, KEY)


def test_a_learner_trained_on_many_ways_predicts_fewer():
    def task(ways, seed):
        x = np.random.default_rng(seed).normal(size=(2 * ways, DIM))
        return jm.Task(*(batch(part, np.arange(ways), ways=ways) for part in np.split(x, 2)))

    learner = jm.prototypical(embedding())
    many, few = task(7, 0), task(3, 1)
    params = initial(learner, many)
    grads = jax.jit(jax.grad(lambda params: learner.loss(params, many, KEY)[0]))(params)
    params = jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * np.asarray(g), params, grads)
    outputs = outputs_of(learner, params, few.support, few.query.x)
    assert outputs.shape == (3, 3)
    assert np.isfinite(outputs).all()


def relative_entropy(u):
    return (u * jnp.log(u)).sum()


def quartic(u):
    return (u**4).sum() / 12


@pytest.mark.parametrize("generator", [square, mahalanobis, quartic, relative_entropy])
def test_divergences_are_accurate_at_a_common_offset(generator):
    rng = np.random.default_rng(6)
    z, v = (np.asarray(300 + rng.normal(size=(n, DIM)), np.float32) for n in (6, 3))
    divergence = jax.jit(functools.partial(bregman, generator))
    actual = np.asarray(divergence(jnp.asarray(z), jnp.asarray(v)))
    with jax.enable_x64(True):
        expected = np.asarray(divergence(*(jnp.asarray(value, float) for value in (z, v))))
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-3)
    assert (actual.argmin(1) == expected.argmin(1)).all()


@pytest.mark.parametrize("generator", [square, quartic, relative_entropy])
def test_divergences_match_their_formula_where_a_class_is_absent(generator, x64):
    rng = np.random.default_rng(7)
    z, v = (rng.uniform(0.1, 2.0, size=(n, DIM)) for n in (4, 3))
    v[1] = 0  # an absent class, of which φ may have no derivative
    present = jnp.array([True, False, True])

    def actual(v):
        return bregman(generator, jnp.asarray(z), v, present)[:, jnp.array([0, 2])]

    slopes = jax.vmap(jax.grad(generator))(jnp.asarray(v))
    phi_z, phi_v = (np.asarray(jax.vmap(generator)(jnp.asarray(value))) for value in (z, v))
    expected = phi_z[:, None] - phi_v[None] - np.einsum("mnd,nd->mn", z[:, None] - v[None], slopes)
    np.testing.assert_allclose(actual(jnp.asarray(v)), expected[:, [0, 2]], rtol=1e-9, atol=1e-9)
    assert np.isfinite(jax.grad(lambda v: actual(v).sum())(jnp.asarray(v))).all()
