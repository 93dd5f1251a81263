"""Kernel classifiers, with the identity as the embedding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation
from vectors import (
    IDENTITY,
    KEY,
    WAYS,
    batch,
    distances,
    initial,
    initial_results,
    loss,
    padded,
    predict,
    results,
    softmax,
    unequal,
)

import jaxmeta as jm
from jaxmeta.metric_based.kernel import NORMALISATIONS, REDUCTIONS, SIMILARITIES


def kernel(**settings):
    return jm.kernel_classifier(IDENTITY, **settings)


def log_softmax(values):
    return np.log(softmax(values))


def one_nearest(support, x):
    return np.asarray(support.y)[distances(x, support.x).argmin(1)]


@pytest.mark.parametrize(
    ("support", "labels", "expected"),
    [([[1, 0], [0, 1]], [0, 1], 0.450166), ([[1, 0], [0, 1], [1, 0]], [0, 1, 0], 0.620848)],
)
def test_attention_by_cosines_has_the_values_computed_by_hand(support, labels, expected):
    for learner in (jm.matching(IDENTITY), kernel()):
        outputs = predict(learner, batch(support, labels, ways=2), [[3, 4]])
        np.testing.assert_allclose(np.exp(outputs[0, 0]), expected, atol=1e-6)


def test_negative_similarities_have_no_weight_when_normalised_by_the_sum():
    support = batch([[1, 0], [-1, 0], [0.6, 0.8]], [0, 1, 2], ways=3)
    outputs = predict(kernel(normalise="sum"), support, [[1, 0]])
    np.testing.assert_allclose(np.exp(outputs[0]), [1 / 1.6, 0, 0.6 / 1.6], atol=1e-6)


def test_prototypes_have_the_value_computed_by_hand():
    support, query = batch([[0, 0], [2, 0]], [0, 1], ways=2), [[0.5, 0]]
    for outputs in (
        log_softmax(predict(jm.prototypical(IDENTITY), support, query)),
        predict(kernel(similarity="euclidean", reduce="prototype"), support, query),
    ):
        np.testing.assert_allclose(np.exp(outputs[0, 0]), 0.880797, atol=1e-6)


def test_probabilities_at_scale_one_stay_below_their_bound():
    bound = np.e / (np.e + 4 / np.e)
    learner = jm.matching(IDENTITY)
    best = batch([[1, 0], [-1, 0], [-1, 0], [-1, 0], [-1, 0]], range(5), ways=5)
    np.testing.assert_allclose(np.exp(predict(learner, best, [[2, 0]])[0, 0]), bound, rtol=1e-6)
    assert round(bound, 4) == 0.6488
    value, _ = loss(learner, {"model": {}}, jm.Task(best, batch([[2, 0]], [0], ways=5)))
    np.testing.assert_allclose(value, 0.4327, atol=5e-5)
    rng = np.random.default_rng(0)
    for _ in range(5):
        outputs = predict(
            learner, batch(rng.normal(size=(5, 2)), range(5), ways=5), rng.normal(size=(200, 2))
        )
        assert np.exp(outputs).max() <= bound


def combinations():
    """Return all combinations, marked nightly unless the similarity is cosine or the rest are defaults."""
    return [
        pytest.param(
            *row, marks=() if row[0] == "cosine" or row[1:] == ("softmax", "sum") else pytest.mark.nightly
        )
        for row in itertools.product(SIMILARITIES, NORMALISATIONS, REDUCTIONS)
    ]


@pytest.mark.parametrize(("similarity", "normalise", "reduce"), combinations())
def test_outputs_are_log_probabilities_and_the_loss_is_their_negative_mean(similarity, normalise, reduce):
    task = unequal()
    learner = kernel(similarity=similarity, normalise=normalise, reduce=reduce, scale=2.0, learn_scale=True)
    params, (outputs, value, _) = initial_results(learner, task)
    assert params["head"]["scale"] == 2
    assert outputs.shape == (5, WAYS)
    np.testing.assert_allclose(np.exp(outputs).sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(value, -np.mean(outputs[np.arange(5), task.query.y]), rtol=1e-5)


@pytest.mark.parametrize("normalise", NORMALISATIONS)
@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("sum", [2 / 6, 1 / 6, 3 / 6]),
        ("mean", [1 / 3] * 3),
        ("nearest", [1 / 3] * 3),
        ("prototype", [1 / 3] * 3),
    ],
)
def test_a_constant_similarity_gives_the_class_frequencies_of_the_support(normalise, reduce, expected):
    task = unequal()
    learner = kernel(similarity=lambda a, b: jnp.ones((len(a), len(b))), normalise=normalise, reduce=reduce)
    outputs = np.exp(predict(learner, task.support, task.query.x))
    np.testing.assert_allclose(outputs, np.broadcast_to(expected, (5, 3)), rtol=1e-5)


@pytest.mark.parametrize("reduce", ["sum", "mean", "nearest"])
def test_a_large_scale_gives_one_nearest_neighbour(reduce):
    task = unequal()
    outputs = predict(kernel(similarity="euclidean", reduce=reduce, scale=1e4), task.support, task.query.x)
    expected = one_nearest(task.support, task.query.x)
    np.testing.assert_allclose(np.exp(outputs), np.eye(WAYS)[expected], atol=1e-5)


def test_the_nearest_reduction_predicts_the_nearest_neighbours_class_at_any_scale():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(100, 4))
    support = unequal().support
    for scale in (0.01, 1.0):
        outputs = predict(kernel(similarity="euclidean", reduce="nearest", scale=scale), support, x)
        np.testing.assert_array_equal(outputs.argmax(1), one_nearest(support, x))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_outputs_are_invariant_to_support_order_and_equivariant_to_class_order(reduce):
    support, query = unequal()
    learner = kernel(similarity="euclidean", reduce=reduce)
    outputs = predict(learner, support, query.x)
    x, y = np.asarray(support.x), np.asarray(support.y)
    order = np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_allclose(predict(learner, batch(x[order], y[order]), query.x), outputs, atol=1e-5)
    names = np.array([2, 1, 0])
    np.testing.assert_allclose(predict(learner, batch(x, names[y]), query.x), outputs[:, names], atol=1e-5)


@pytest.mark.parametrize(
    ("normalise", "reduce"), [*(("softmax", reduce) for reduce in REDUCTIONS), ("sum", "sum")]
)
def test_a_class_slot_without_examples_has_probability_zero_and_gradients_are_finite(normalise, reduce):
    support, query = unequal()
    learner = kernel(normalise=normalise, reduce=reduce)
    names = np.array([0, 1, 3])
    wide_support, wide_query = (batch(part.x, names[part.y], ways=5) for part in (support, query))

    def value(support_x, query_x):
        task = jm.Task(
            *(batch(x, part.y, ways=5) for x, part in ((support_x, wide_support), (query_x, wide_query)))
        )
        return learner.loss({"model": {}}, task, KEY)[0]

    @jax.jit
    def run():
        adapted = (learner.adapt({"model": {}}, part, KEY) for part in (wide_support, support))
        outputs = [learner.predict({"model": {}}, state, query.x) for state in adapted]
        return outputs, jax.grad(value, (0, 1))(support.x, query.x)

    (outputs, expected), slopes = jax.device_get(run())
    assert (outputs[:, [2, 4]] == -np.inf).all()
    np.testing.assert_allclose(outputs[:, [0, 1, 3]], expected, atol=1e-6)
    for grads in slopes:
        assert np.isfinite(grads).all()
        assert np.abs(grads).max() > 1e-3


def test_a_zero_vector_has_cosine_zero_with_every_vector_and_finite_gradients():
    support = batch([[1, 0], [0, 0], [0, 1], [1, 1]], [0, 0, 1, 2])

    def value(support_x, query_x):
        task = jm.Task(batch(support_x, support.y), batch(query_x, [0, 1]))
        return kernel().loss({"model": {}}, task, KEY)[0]

    query = jnp.array([[0.0, 0.0], [1.0, 0.0]])
    outputs = np.exp(predict(kernel(), support, query))
    cosines = np.array([[0, 0, 0, 0], [1, 0, 0, np.sqrt(0.5)]])
    shares = softmax(cosines)
    np.testing.assert_allclose(outputs, shares @ np.eye(3)[support.y], rtol=1e-5)
    for grads in jax.jit(jax.grad(value, (0, 1)))(support.x, query):
        assert np.isfinite(grads).all()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_padding_changes_neither_outputs_nor_loss(reduce, x64):
    task = unequal()
    learner = kernel(similarity="euclidean", reduce=reduce)
    with_padding = padded(task.support, [0, 3, 3, 6])
    query = padded(task.query, [1, 5])
    actual, value, metrics = results(learner, {"model": {}}, jm.Task(with_padding, query))
    outputs, expected, known = results(learner, {"model": {}}, task)
    np.testing.assert_allclose(actual[np.asarray(query.mask)], outputs, rtol=1e-6)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert metrics["accuracy"] == known["accuracy"]


def test_prototypical_networks_are_the_kernel_of_prototypes():
    support, query = unequal()
    expected = log_softmax(predict(jm.prototypical(IDENTITY), support, query.x))
    outputs = predict(kernel(similarity="euclidean", reduce="prototype"), support, query.x)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    summed = predict(kernel(similarity="euclidean"), support, query.x)
    assert np.abs(summed - expected).max() > 0.1
    single = batch(np.asarray(support.x)[:3], np.asarray(support.y)[:3])
    np.testing.assert_allclose(
        predict(kernel(similarity="euclidean"), single, query.x),
        log_softmax(predict(jm.prototypical(IDENTITY), single, query.x)),
        atol=1e-6,
    )


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_matching_networks_are_the_kernel_of_cosines(scale):
    support, query = unequal()
    expected = predict(kernel(scale=scale), support, query.x)
    np.testing.assert_array_equal(predict(jm.matching(IDENTITY, scale=scale), support, query.x), expected)
    x, y = np.asarray(query.x), np.asarray(support.x)
    cosines = x @ y.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)[None]
    by_hand = softmax(scale * cosines) @ np.eye(WAYS)[support.y]
    np.testing.assert_allclose(np.exp(expected), by_hand, rtol=1e-5)


def test_a_siamese_network_is_the_kernel_of_the_nearest_by_the_sum_of_differences():
    support, query = unequal()
    head = {"weights": -jnp.ones(4), "bias": jnp.zeros(())}
    learner = kernel(similarity=lambda a, b: -jnp.abs(a[:, None] - b[None]).sum(-1), reduce="nearest")
    np.testing.assert_allclose(
        predict(jm.siamese(IDENTITY), support, query.x, head=head),
        predict(learner, support, query.x),
        atol=1e-6,
    )


def test_duplicated_examples_raise_the_probability_only_where_similarities_are_summed():
    support, query = unequal()
    x, y = np.asarray(support.x), np.asarray(support.y)
    twice = batch(np.concatenate([x, x[y == 1]]), [*y, 1])
    for learner, moves in (
        (jm.prototypical(IDENTITY), False),
        (kernel(reduce="mean"), False),
        (kernel(reduce="nearest"), False),
        (kernel(reduce="sum"), True),
        (jm.matching(IDENTITY), True),
    ):
        before, after = (predict(learner, examples, query.x) for examples in (support, twice))
        if moves:
            assert (after[:, 1] > before[:, 1] + 0.1).all()
        else:
            np.testing.assert_allclose(after, before, atol=1e-5)


def test_the_learned_similarity_is_euclidean_after_a_linear_map_that_starts_as_identity(x64):
    task = unequal()
    learner = kernel(similarity="learned")
    params = initial(learner, task)
    np.testing.assert_allclose(
        predict(learner, task.support, task.query.x, **params),
        predict(kernel(similarity="euclidean"), task.support, task.query.x),
        rtol=1e-12,
    )
    matrix = np.random.default_rng(0).normal(size=(4, 4))
    moved = batch(np.asarray(task.support.x) @ matrix, task.support.y)
    np.testing.assert_allclose(
        predict(learner, task.support, task.query.x, head={"similarity": jnp.asarray(matrix)}),
        predict(kernel(similarity="euclidean"), moved, np.asarray(task.query.x) @ matrix),
        rtol=1e-12,
    )
    grads = jax.jit(jax.grad(lambda params: learner.loss(params, task, KEY)[0]))(params)
    assert np.abs(grads["head"]["similarity"]).max() > 1e-3


def test_a_custom_similarity_may_have_parameters():
    task = unequal()
    weighted = jm.Similarity(
        lambda weights, a, b: -(jnp.square(a[:, None] - b[None]) * weights[None, None]).sum(-1),
        lambda key, dim: jnp.full(dim, 2.0),
    )
    learner = kernel(similarity=weighted)
    params = initial(learner, task)
    np.testing.assert_allclose(
        predict(learner, task.support, task.query.x, **params),
        predict(kernel(similarity="euclidean", scale=2.0), task.support, task.query.x),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"similarity": "manhattan"}, "similarity: got 'manhattan'; it must be one of 'cosine'"),
        ({"normalise": "max"}, "normalise: got 'max'; it must be one of"),
        ({"reduce": "median"}, "reduce: got 'median'; it must be one of"),
        ({"scale": 0.0}, "scale: got 0.0; it must be positive"),
        ({"norm": "layer"}, "norm: got 'layer'; it must be one of"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        kernel(**settings)


# Properties for arbitrary embeddings, in float64.

LABELS = np.array([0, 1, 2, 0, 1, 2])
SUPPORT, QUERIES = (6, 3), (4, 3)


def vectors(shape):
    """Return a strategy for integer-valued vectors: each is either zero or of norm at least 1."""
    return arrays(np.int64, shape, elements=st.integers(-9, 9)).map(lambda x: x.astype(np.float64))


PROTOTYPICAL, MATCHING = jm.prototypical(IDENTITY), jm.matching(IDENTITY, scale=3.0)


def prototypical_logits(support, x):
    return predict(PROTOTYPICAL, batch(support, LABELS), x)


def matching_outputs(support, x):
    return predict(MATCHING, batch(support, LABELS), x)


def check(function, before, after, *, times=1.0):
    with jax.enable_x64(True):
        expected, actual = times * function(*before), function(*after)
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(vectors(SUPPORT), vectors(QUERIES), st.permutations(range(2)), st.permutations(range(3)))
def test_prototypes_are_invariant_to_example_order_and_equivariant_to_class_order(support, x, within, names):
    # Rows are (example, class): permute the examples of each class, then the class slots.
    moved = support.reshape(2, 3, 3)[list(within)]
    check(prototypical_logits, (support, x), (moved.reshape(6, 3), x))
    with jax.enable_x64(True):
        renamed = prototypical_logits(moved[:, list(names)].reshape(6, 3), x)
        np.testing.assert_allclose(renamed, prototypical_logits(support, x)[:, list(names)], atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(vectors(SUPPORT), vectors(QUERIES), vectors((3,)), vectors((3,)))
def test_prototypes_are_invariant_to_a_common_translation_and_rotation(support, x, shift, rotation):
    matrix = Rotation.from_rotvec(rotation).as_matrix()
    check(prototypical_logits, (support, x), (support + shift, x + shift))
    check(prototypical_logits, (support, x), (support @ matrix, x @ matrix))


@settings(max_examples=40, deadline=None)
@given(vectors(SUPPORT), vectors(QUERIES), st.floats(0.1, 10))
def test_scaling_embeddings_scales_logits_of_prototypes_by_the_square(support, x, scale):
    check(prototypical_logits, (support, x), (scale * support, scale * x), times=scale**2)


@settings(max_examples=40, deadline=None)
@given(
    vectors(SUPPORT),
    vectors(QUERIES),
    arrays(np.float64, (6, 1), elements=st.floats(0.1, 10)),
    arrays(np.float64, (4, 1), elements=st.floats(0.1, 10)),
)
def test_cosines_are_invariant_to_the_length_of_any_embedding(support, x, support_scales, query_scales):
    check(matching_outputs, (support, x), (support_scales * support, query_scales * x))
