"""Methods that learn from the queries: refined prototypes and label propagation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.semi_supervised import LabelSpreading
from vectors import (
    DIM,
    IDENTITY,
    KEY,
    WAYS,
    batch,
    compiled,
    distances,
    gradient_check,
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

SUPPORT, QUERY = (jm.Batch(np.asarray(part.x, np.float64), part.y, ways=WAYS) for part in unequal())
METHODS = {
    "soft_kmeans": functools.partial(jm.soft_kmeans, refinement_steps=2, scale=0.7),
    "label_propagation": jm.label_propagation,
    "label_propagation_few_neighbours": functools.partial(jm.label_propagation, neighbours=3, sigma=None),
}
methods = pytest.mark.parametrize("method", METHODS)

pytestmark = pytest.mark.usefixtures("x64")


# Refined prototypes.


def refined(x, y, query, steps, scale):
    """Return the outputs of soft k-means, class by class."""
    prototypes = np.stack([x[y == label].mean(0) for label in range(y.max() + 1)])
    for _ in range(steps):
        weights = softmax(-scale * distances(query, prototypes))
        prototypes = np.stack(
            [
                (x[y == label].sum(0) + (weights[:, [label]] * query).sum(0))
                / ((y == label).sum() + weights[:, label].sum())
                for label in range(y.max() + 1)
            ]
        )
    return -scale * distances(query, prototypes)


@pytest.mark.parametrize(("steps", "scale"), [(0, 1.0), (1, 1.0), (3, 0.2)])
def test_soft_kmeans_refines_prototypes_by_weighted_queries(steps, scale):
    learner = jm.soft_kmeans(IDENTITY, refinement_steps=steps, scale=scale)
    expected = refined(*map(np.asarray, (SUPPORT.x, SUPPORT.y, QUERY.x)), steps, scale)
    np.testing.assert_allclose(predict(learner, SUPPORT, QUERY.x), expected, rtol=1e-9)


def test_soft_kmeans_without_refinement_is_prototypical_networks():
    learner = jm.soft_kmeans(IDENTITY, refinement_steps=0)
    expected = predict(jm.prototypical(IDENTITY), SUPPORT, QUERY.x)
    np.testing.assert_allclose(predict(learner, SUPPORT, QUERY.x), expected, rtol=1e-9)


def test_many_refinement_steps_end_in_a_fixed_point():
    outputs = [
        predict(jm.soft_kmeans(IDENTITY, refinement_steps=steps), SUPPORT, QUERY.x) for steps in (300, 301)
    ]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-9)


# Label propagation.


def graph(nodes, neighbours, sigma):
    """Return the weights of the nearest-neighbour graph, node by node."""
    squared = distances(nodes, nodes)
    variance = np.median(squared[np.triu_indices(len(nodes), 1)]) if sigma is None else sigma**2
    near = np.zeros(squared.shape, bool)
    for node, row in enumerate(squared):
        others = [other for other in np.argsort(row) if other != node]
        near[node, others[:neighbours]] = True
    return np.where(near | near.T, np.exp(-squared / (2 * variance)), 0)


def random_points():
    """Return a support set, its labels, and queries."""
    rng = np.random.default_rng(0)
    y = np.array([0, 1, 2, 1, 0, 2, 2, 1])
    return rng.normal(size=(8, DIM)), y, rng.normal(size=(30, DIM))


@pytest.mark.parametrize("sigma", [None, 0.7])
@pytest.mark.parametrize(("neighbours", "alpha"), [(4, 0.99), (20, 0.5), (100, 0.9)])
def test_label_propagation_is_the_limit_of_scikit_learns_label_spreading(neighbours, alpha, sigma):
    x, y, query = random_points()
    nodes = np.concatenate([x, query])
    weights = graph(nodes, neighbours, sigma)
    spreading = LabelSpreading(kernel=lambda *_: weights, alpha=alpha, max_iter=100_000, tol=1e-13)
    spreading.fit(nodes, np.concatenate([y, np.full(len(query), -1)]))
    learner = jm.label_propagation(IDENTITY, neighbours=neighbours, alpha=alpha, sigma=sigma)
    outputs = predict(learner, batch(x, y), query)
    np.testing.assert_allclose(np.exp(outputs), spreading.label_distributions_[len(x) :], atol=1e-9)
    np.testing.assert_allclose(np.exp(outputs).sum(1), 1, rtol=1e-12)


def test_labels_follow_a_chain_of_queries_instead_of_the_nearest_support_example():
    # The queries continue the line of class 0 past the example of class 1.
    support = batch([[0.0, 0.0], [10.0, 3.0]], [0, 1], ways=2)
    chain = np.stack([np.arange(1.0, 11.0), np.zeros(10)], 1)
    outputs = predict(jm.label_propagation(IDENTITY, neighbours=2, sigma=0.5), support, chain)
    assert (outputs.argmax(1) == 0).all()
    nearest = predict(jm.prototypical(IDENTITY), support, chain)
    assert nearest[-1].argmax() == 1


def test_a_query_without_a_path_to_the_support_set_has_equal_probabilities():
    support = batch([[0.0, 0.0], [0.1, 0.0]], [0, 1], ways=3)
    query = np.array([[0.0, 0.1], [50.0, 0.0], [50.0, 0.1]])
    outputs = predict(jm.label_propagation(IDENTITY, neighbours=1, sigma=1.0), support, query)
    np.testing.assert_allclose(np.exp(outputs[1:]), [[0.5, 0.5, 0]] * 2, atol=1e-9)
    assert outputs[0].argmax() == 0


def test_equal_points_have_a_graph_of_equal_weights():
    # The median distance is zero.
    support = batch(np.ones((2, DIM)), [0, 1], ways=2)
    outputs = predict(jm.label_propagation(IDENTITY, sigma=None), support, np.ones((3, DIM)))
    np.testing.assert_allclose(np.exp(outputs), 0.5, rtol=1e-9)


def test_distances_whose_kernel_underflows_still_give_the_nearest_class():
    # exp(−100² / 2) is zero in float64, too.
    support = batch([[0.0, 0.0], [1000.0, 0.0]], [0, 1], ways=2)
    outputs = predict(jm.label_propagation(IDENTITY), support, np.array([[100.0, 0.0], [880.0, 0.0]]))
    assert outputs.argmax(1).tolist() == [0, 1]
    assert (np.exp(outputs.max(1)) > 0.9).all()


# Both methods.


@methods
def test_padding_and_classes_without_examples_change_no_output(method):
    learner = METHODS[method](IDENTITY)
    expected = predict(learner, SUPPORT, QUERY.x)
    support = padded(batch(SUPPORT.x, SUPPORT.y, ways=5), [0, 2, 6])
    for value in (np.nan, 1e30):
        query = padded(QUERY, [1, 4], value)
        adapted = compiled(learner, "adapt")({"model": {}}, support, KEY)
        outputs = np.asarray(compiled(learner, "predict")({"model": {}}, adapted, query.x, query.mask))
        kept = outputs[np.asarray(query.mask)]
        np.testing.assert_allclose(kept[:, :WAYS], expected, rtol=1e-9)
        assert (kept[:, WAYS:] == -np.inf).all()


@methods
def test_predictions_depend_on_the_other_queries_but_not_on_their_order(method):
    learner = METHODS[method](IDENTITY)
    outputs = predict(learner, SUPPORT, QUERY.x)
    order = np.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(predict(learner, SUPPORT, QUERY.x[order]), outputs[order], rtol=1e-9)
    assert np.abs(predict(learner, SUPPORT, QUERY.x[:1]) - outputs[:1]).max() > 1e-3


@methods
def test_a_single_query_has_the_class_of_the_nearest_support_example(method):
    support = batch([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], range(3))
    for label, point in enumerate(np.asarray(support.x)):
        outputs = predict(METHODS[method](IDENTITY), support, point[None] + 0.1)
        assert outputs.shape == (1, 3)
        assert outputs.argmax() == label


@methods
def test_the_gradient_of_a_padded_task_matches_finite_differences(method):
    module = jm.nn.as_model(jm.nn.MLP(out=6, hidden=(5,), activation=jnp.tanh))
    learner = METHODS[method]((module.init, module.apply))
    task = unequal()
    ragged = jm.Task(padded(task.support, [0, 4]), padded(task.query, [2]))
    params = of_float64(initial(learner, task), 0)
    error, value = gradient_check(lambda params: learner.loss(params, ragged, KEY)[0], params)
    assert error < 1e-6
    np.testing.assert_allclose(value, loss(learner, params, task)[0], rtol=1e-9)


@methods
def test_a_support_set_of_only_padding_has_finite_gradients(method):
    module = jm.nn.as_model(jm.nn.MLP(out=6, hidden=(5,), activation=jnp.tanh))
    learner = METHODS[method]((module.init, module.apply))
    params = initial(learner, unequal())
    nothing = batch(np.full(SUPPORT.x.shape, np.nan), SUPPORT.y, np.zeros(SUPPORT.y.size))

    @jax.jit
    def loss_and_gradient(params):
        return jax.value_and_grad(lambda params: learner.loss(params, jm.Task(nothing, QUERY), KEY)[0])(
            params
        )

    for leaf in jax.tree.leaves(loss_and_gradient(params)):
        assert np.isfinite(leaf).all()
    assert np.isfinite(outputs_of(learner, params, nothing, QUERY.x)).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: jm.soft_kmeans(IDENTITY, refinement_steps=-1),
            "refinement_steps: got -1; it must be at least 0",
        ),
        (lambda: jm.soft_kmeans(IDENTITY, scale=0.0), "scale: got 0.0; it must be positive"),
        (lambda: jm.label_propagation(IDENTITY, alpha=0.0), "alpha: got 0.0; it must be positive"),
        (lambda: jm.label_propagation(IDENTITY, alpha=1.0), "alpha: got 1.0; it must be at most 0.999999"),
        (lambda: jm.label_propagation(IDENTITY, neighbours=0), "neighbours: got 0; it must be at least 1"),
        (lambda: jm.label_propagation(IDENTITY, sigma=0.0), "sigma: got 0.0; it must be positive"),
    ],
)
def test_invalid_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
