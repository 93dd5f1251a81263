"""Mahalanobis distances with regularised class covariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vectors import (
    DIM,
    IDENTITY,
    KEY,
    batch,
    gradient_check,
    initial,
    of_float64,
    outputs_of,
    padded,
    predict,
    softmax,
    unequal,
)

import jaxmeta as jm


def direct(x, y, query, regularisation):
    """Return the outputs of the formula, by the covariance matrices of NumPy."""
    outputs = []
    for label in range(y.max() + 1):
        members = x[y == label]
        shrinkage = len(members) / (len(members) + 1)
        within = np.cov(members.T) if len(members) > 1 else 0
        common = np.cov(x.T) if len(x) > 1 else 0
        matrix = shrinkage * within + (1 - shrinkage) * common + regularisation * np.eye(x.shape[1])
        differences = query - members.mean(0)
        outputs.append(-(differences * np.linalg.solve(matrix, differences.T).T).sum(1) / 2)
    return np.stack(outputs, 1)


def drawn(ways, counts, dim):
    rng = np.random.default_rng(len(counts) + dim)
    y = rng.permutation(np.repeat(np.arange(ways), counts))
    return 3 + 2 * rng.normal(size=(y.size, dim)), y, 3 + 2 * rng.normal(size=(7, dim))


@pytest.mark.parametrize("regularisation", [1.0, 0.01])
@pytest.mark.parametrize(
    ("counts", "dim"),
    [
        ([1, 1, 1, 1, 1], 512),
        ([3, 1, 5], 64),
        ([3, 1, 5], 9),  # as many examples as dimensions
        ([6, 1, 20], 5),
        ([1], 4),
    ],
)
def test_outputs_are_the_quadratic_forms_of_the_inverse_covariances(counts, dim, regularisation, x64):
    x, y, query = drawn(len(counts), counts, dim)
    learner = jm.mahalanobis(IDENTITY, regularisation=regularisation)
    actual = predict(learner, batch(x, y, ways=len(counts)), query)
    np.testing.assert_allclose(actual, direct(x, y, query, regularisation), rtol=1e-9)


def test_the_transform_l2n_scales_embeddings_to_length_one(x64):
    x, y, query = drawn(3, [2, 1, 4], 12)
    learner = jm.mahalanobis(IDENTITY, regularisation=0.1, transform="l2n")
    x_unit, query_unit = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, query))
    expected = direct(x_unit, y, query_unit, 0.1)
    np.testing.assert_allclose(predict(learner, batch(x, y), query), expected, rtol=1e-9)
    np.testing.assert_allclose(predict(learner, batch(7 * x, y), query / 5), expected, rtol=1e-9)


@pytest.mark.parametrize("dim", [3, 40])
def test_padding_and_classes_without_examples_change_no_output(dim, x64):
    x, y, query = drawn(3, [2, 1, 4], dim)
    learner = jm.mahalanobis(IDENTITY)
    with_padding = padded(batch(x, y, ways=5), [0, 2, 6])
    actual = predict(learner, with_padding, query)
    np.testing.assert_allclose(actual[:, :3], direct(x, y, query, 1.0), rtol=1e-9)
    assert (actual[:, 3:] == -np.inf).all()


# The Woodbury identity is used where there are fewer support examples, 6, than dimensions.
@pytest.mark.parametrize("out", [3, 8])
def test_the_gradient_matches_finite_differences(out, x64):
    module = jm.nn.as_model(jm.nn.MLP(out=out, hidden=(5,), activation=jnp.tanh))
    learner = jm.mahalanobis((module.init, module.apply), regularisation=0.1)
    task = unequal()
    params = of_float64(initial(learner, task), 0)

    def value(params):
        return learner.loss(params, task, KEY)[0]

    assert gradient_check(value, params)[0] < 1e-6


def test_one_example_of_each_class_in_many_dimensions_has_finite_gradients_in_float32():
    rng = np.random.default_rng(0)
    y = jnp.arange(5, dtype=jnp.int32)
    part = jm.Batch(jnp.asarray(rng.normal(size=(5, DIM)), jnp.float32), y, ways=5)
    learner = jm.mahalanobis(jm.nn.MLP(out=256, hidden=()))
    params = learner.init(KEY, jm.Task(part, part))
    gradient = jax.jit(jax.grad(lambda params: learner.loss(params, jm.Task(part, part), KEY)[0]))(params)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
    assert np.abs(gradient["model"]["head"]["kernel"]).max() > 0


def test_float32_outputs_are_precise_at_the_offset_and_scale_of_pretrained_features():
    rng = np.random.default_rng(1)
    y = np.repeat(np.arange(5), 5)
    centres = 2 * rng.normal(size=(5, 512))
    x, query = (10 + centres[y] + rng.normal(size=(25, 512)) for _ in range(2))
    part = jm.Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32), ways=5)
    learner = jm.mahalanobis(IDENTITY)
    actual = outputs_of(learner, {"model": {}}, part, jnp.asarray(query, jnp.float32))
    expected = direct(x, y, query, 1.0)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    np.testing.assert_allclose(softmax(actual), softmax(expected), atol=1e-3)


def test_invalid_settings_are_refused():
    with pytest.raises(ValueError, match=r"regularisation: got 0.0; it must be positive"):
        jm.mahalanobis(IDENTITY, regularisation=0.0)
    with pytest.raises(ValueError, match=r"transform: got 'cl2n'; it must be one of 'un', 'l2n'"):
        jm.mahalanobis(IDENTITY, transform="cl2n")
