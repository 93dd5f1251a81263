"""CORAL and maximum mean discrepancy, compared with closed forms, NumPy and scikit-learn."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics.pairwise import rbf_kernel

from jaxmeta.transfer.discrepancy import (
    MULTIPLES,
    coral_loss,
    coral_transform,
    covariance,
    dan_loss,
    mmd2,
)

coral = jax.jit(coral_loss, static_argnames="variant")
mmd = jax.jit(mmd2, static_argnames=("bandwidth", "multiples", "weights", "estimator"))
DIM = 3
ESTIMATORS = ["biased", "unbiased", "linear"]


def samples(n=7, m=5, dim=DIM, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)), 1.5 * rng.normal(size=(m, dim)) + 0.7


def finite_differences(f, x, step=1e-6):
    """Return the gradient of `f` at `x` by central differences, entry by entry."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        moved = np.zeros_like(x)
        moved[index] = step
        gradient[index] = (f(x + moved) - f(x - moved)) / (2 * step)
    return gradient


# --- CORAL ----------------------------------------------------------------------------------------


def test_covariance_equals_numpys_and_scikit_learns(x64):
    x, _ = samples()
    np.testing.assert_allclose(covariance(x), np.cov(x, rowvar=False), rtol=1e-12)
    biased = EmpiricalCovariance().fit(x).covariance_
    np.testing.assert_allclose(covariance(x), biased * 7 / 6, rtol=1e-12)


def test_covariance_survives_a_large_mean_in_float32():
    x = samples(n=200)[0]
    np.testing.assert_allclose(
        covariance(jnp.asarray(x + 1000, jnp.float32)), np.cov(x, rowvar=False), atol=1e-3
    )


def test_coral_of_the_two_orthogonal_segments():
    source, target = np.float32([[0.0, 0.0], [2.0, 0.0]]), np.float32([[0.0, 0.0], [0.0, 2.0]])
    assert coral(source, target) == 0.5
    assert coral(source, target, variant="mean+cov") == 3.0


def test_coral_is_the_frobenius_distance_of_numpys_covariances(x64):
    source, target = samples()
    difference = np.cov(source, rowvar=False) - np.cov(target, rowvar=False)
    expected = np.linalg.norm(difference, "fro") ** 2 / (4 * DIM**2)
    np.testing.assert_allclose(coral(source, target), expected, rtol=1e-12)
    means = np.mean((source.mean(0) - target.mean(0)) ** 2)
    np.testing.assert_allclose(coral(source, target, variant="mean+cov"), 4 * expected + means, rtol=1e-12)


def test_coral_depends_on_covariances_and_not_on_means(x64):
    source, other = samples(n=6)
    shifted = 4 - source  # mirrored: the same covariance, another mean and other points
    assert coral(source, shifted) < 1e-28
    assert coral(source, shifted, variant="mean+cov") > 1
    np.testing.assert_allclose(coral(source + 3, other - 2), coral(source, other), rtol=1e-10)
    for scale in (0.99, 1.01):
        # C_t = scale² C_s, so that the loss is the distance of these two matrices.
        expected = (1 - scale**2) ** 2 * np.square(np.cov(source, rowvar=False)).mean() / 4
        np.testing.assert_allclose(coral(source, scale * source), expected, rtol=1e-9)


def test_the_closed_form_gives_the_source_the_covariance_of_the_target(x64):
    source, target = samples(n=40, m=30)
    aligned = source @ coral_transform(source, target, regularisation=0.0)
    np.testing.assert_allclose(np.cov(aligned, rowvar=False), np.cov(target, rowvar=False), rtol=1e-9)
    gaps = [
        coral(source @ coral_transform(source, target, regularisation=r), target) for r in (1.0, 1e-2, 1e-4)
    ]
    assert gaps[0] > 100 * gaps[1] > 1e4 * gaps[2]


def test_the_closed_form_is_whitening_then_colouring_with_the_identity_added(x64):
    from scipy.linalg import fractional_matrix_power

    source, target = samples()
    c_s, c_t = (np.cov(x, rowvar=False) + 2 * np.eye(DIM) for x in (source, target))
    expected = fractional_matrix_power(c_s, -0.5) @ fractional_matrix_power(c_t, 0.5)
    np.testing.assert_allclose(coral_transform(source, target, regularisation=2.0), expected, rtol=1e-9)


def test_without_regularisation_directions_without_variance_are_mapped_to_zero(x64):
    source, target = samples(n=40, m=30)
    flat = source * [[1, 1, 0]]
    matrix = coral_transform(flat, target, regularisation=0.0)
    np.testing.assert_allclose(matrix[2], 0, atol=1e-12)
    whitened = (flat @ matrix) @ np.linalg.inv(np.linalg.cholesky(np.cov(target, rowvar=False))).T
    np.testing.assert_allclose(np.linalg.eigvalsh(np.cov(whitened, rowvar=False)), [0, 1, 1], atol=1e-9)


# --- Maximum mean discrepancy ---------------------------------------------------------------------


def test_mmd_of_points_zero_and_one():
    zero, one, both = np.float32([[0.0]]), np.float32([[1.0]]), np.float32([[0.0], [1.0]])
    np.testing.assert_allclose(mmd(zero, one, bandwidth=1.0), 0.7869387, atol=1e-7)
    np.testing.assert_allclose(mmd(both, both, bandwidth=1.0), 0, atol=1e-7)
    np.testing.assert_allclose(mmd(both, both, bandwidth=1.0, estimator="unbiased"), -0.3934693, atol=1e-7)


def by_loops(x, y, sigma, estimator):
    """Return MMD² by its definition, pair by pair."""

    def k(a, b):
        return np.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (2 * sigma**2))

    if estimator == "linear":
        quadruples = [(x[i], x[i + 1], y[i], y[i + 1]) for i in range(0, len(x), 2)]
        return np.mean([k(a, b) + k(c, d) - k(a, d) - k(b, c) for a, b, c, d in quadruples])

    def within(z):
        pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if estimator == "biased" or i != j]
        return np.mean([k(z[i], z[j]) for i, j in pairs])

    return within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mmd_equals_its_definition_pair_by_pair(estimator, x64):
    x, y = samples(6, 6) if estimator == "linear" else samples(7, 4)
    result = mmd(x, y, bandwidth=1.3, estimator=estimator)
    np.testing.assert_allclose(result, by_loops(x, y, 1.3, estimator), rtol=1e-10)
    # Several kernels: their mean by default, and their weighted sum with given β.
    parts = np.array([by_loops(x, y, sigma, estimator) for sigma in (0.5, 1.3, 4.0)])
    several = {"bandwidth": (0.5, 1.3, 4.0), "estimator": estimator}
    np.testing.assert_allclose(mmd(x, y, **several), parts.mean(), rtol=1e-10)
    np.testing.assert_allclose(
        mmd(x, y, **several, weights=(1.0, 0.25, 2.0)), parts @ [1, 0.25, 2], rtol=1e-10
    )


def test_a_bandwidth_may_be_traced_and_has_a_gradient(x64):
    x, y = samples(5, 4)
    sigmas = np.array([0.7, 2.0])
    value = jax.jit(lambda sigmas: mmd2(x, y, bandwidth=sigmas))
    gradient = jax.jit(jax.grad(value))(sigmas)
    expected = finite_differences(value, sigmas)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_biased_mmd_equals_averages_of_scikit_learns_kernel(x64):
    x, y = samples(9, 4)
    gamma = 1 / (2 * 0.8**2)
    expected = (
        rbf_kernel(x, x, gamma).mean() + rbf_kernel(y, y, gamma).mean() - 2 * rbf_kernel(x, y, gamma).mean()
    )
    np.testing.assert_allclose(mmd(x, y, bandwidth=0.8), expected, rtol=1e-10)


def measured_bandwidths(x, y, kind):
    both = np.concatenate([x, y])
    squared = np.square(both[:, None] - both[None]).sum(-1)
    distinct = np.sqrt(squared[np.triu_indices(len(both), 1)])
    return np.sqrt(np.array(MULTIPLES) * (squared.mean() if kind == "mean" else np.median(distinct) ** 2))


@pytest.mark.nightly_rows(after=3)
@pytest.mark.parametrize(
    ("kind", "estimator"),
    [
        ("mean", "biased"),
        ("median", "unbiased"),
        ("mean", "linear"),
        ("median", "biased"),
        ("mean", "unbiased"),
        ("median", "linear"),
    ],
)
def test_a_measured_bandwidth_is_of_the_pooled_sample_and_has_no_gradient(kind, estimator, x64):
    x, y = samples(6, 6)
    sigmas = measured_bandwidths(x, y, kind)
    settings = {"bandwidth": kind, "estimator": estimator}
    result, gradients = jax.jit(jax.value_and_grad(partial(mmd2, **settings), argnums=(0, 1)))(x, y)
    np.testing.assert_allclose(result, np.mean([by_loops(x, y, s, estimator) for s in sigmas]), rtol=1e-10)

    def fixed(x, y):
        return np.mean([by_loops(x, y, sigma, estimator) for sigma in sigmas])

    np.testing.assert_allclose(gradients[0], finite_differences(lambda x: fixed(x, y), x), atol=1e-8)
    np.testing.assert_allclose(gradients[1], finite_differences(lambda y: fixed(x, y), y), atol=1e-8)

    def free(x):
        return np.mean([by_loops(x, y, s, estimator) for s in measured_bandwidths(x, y, kind)])

    assert np.abs(np.asarray(gradients[0]) - finite_differences(free, x)).max() > 1e-3


def test_the_gradient_of_coral_equals_finite_differences(x64):
    source, target = samples()
    for variant in ("paper", "mean+cov"):
        loss = jax.jit(partial(coral_loss, target=target, variant=variant))
        gradient = jax.jit(jax.grad(loss))(source)
        np.testing.assert_allclose(gradient, finite_differences(loss, source), atol=1e-8)


@pytest.mark.parametrize("bandwidth", [1.0, "mean", "median"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mmd_is_invariant_under_a_common_rigid_motion(estimator, bandwidth, x64):
    x, y = samples(6, 6)
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(DIM, DIM)))
    settings = {"bandwidth": bandwidth, "estimator": estimator}
    moved = mmd(x @ rotation + 50, y @ rotation + 50, **settings)
    np.testing.assert_allclose(moved, mmd(x, y, **settings), rtol=1e-9)
    assert abs(mmd(x @ rotation, y, **settings) - moved) > 1e-3


def test_mmd_keeps_its_digits_in_float32_far_from_the_origin():
    x, y = samples(20, 30)
    far = [jnp.asarray(part + 300, jnp.float32) for part in (x, y)]
    np.testing.assert_allclose(mmd(*far, bandwidth=1.0), by_loops(x, y, 1.0, "biased"), rtol=1e-3)


def test_mmd_of_one_point_many_times_is_zero_and_so_is_its_gradient():
    same = np.full((4, DIM), 3.0, np.float32)
    for bandwidth in ("mean", "median"):
        value, gradient = jax.jit(jax.value_and_grad(partial(mmd2, bandwidth=bandwidth)))(same, same)
        np.testing.assert_allclose(value, 0, atol=1e-6)
        np.testing.assert_array_equal(gradient, 0)


def true_mmd2(mean, s, t, sigma):
    """Return MMD² of N(0, s²I) and N(mean, t²I), whose kernel expectations are Gaussian integrals."""

    def expectation(shift, variance):
        total = sigma**2 + variance
        return (sigma**2 / total) ** (DIM / 2) * np.exp(-np.sum(np.square(shift)) / (2 * total))

    return expectation(0, 2 * s**2) + expectation(0, 2 * t**2) - 2 * expectation(mean, s**2 + t**2)


def test_unbiased_and_linear_estimates_average_to_the_true_mmd_of_gaussians(x64):
    draws, mean, s, t, sigma = 4000, np.array([0.6, 0.0, -0.4]), 1.0, 1.4, 1.5
    rng = np.random.default_rng(2)
    x, y = s * rng.normal(size=(draws, 4, DIM)), mean + t * rng.normal(size=(draws, 6, DIM))
    expected = true_mmd2(mean, s, t, sigma)

    def error(estimator, y):
        result = jax.jit(jax.vmap(lambda x, y: mmd2(x, y, bandwidth=sigma, estimator=estimator)))(x, y)
        return float(result.mean() - expected) / (float(result.std()) / np.sqrt(draws))

    assert abs(error("unbiased", y)) < 4  # standard errors
    assert abs(error("linear", y[:, :4])) < 4
    assert error("biased", y) > 40


def test_dan_is_the_sum_of_the_mmd_of_the_layers(x64):
    layers = [samples(4, 6), samples(4, 6, dim=5, seed=1), samples(4, 6, dim=1, seed=2)]
    source, target = zip(*layers, strict=True)
    for settings in ({}, {"bandwidth": (0.5, 2.0), "weights": (0.3, 0.6), "estimator": "unbiased"}):
        expected = sum(float(mmd(x, y, **settings)) for x, y in layers)
        result = jax.jit(partial(dan_loss, **settings))(source, target)
        np.testing.assert_allclose(result, expected, rtol=1e-12)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: covariance(x[:1]), r"x: got shape \(1, 3\).*at least 2 examples"),
        (lambda x, y: coral_loss(x, y[:1]), r"target: got shape \(1, 3\).*at least 2 examples"),
        (lambda x, y: coral_loss(x, y[:, :2]), "got 3 and 2 features"),
        (lambda x, y: coral_loss(x, y, variant="cov"), "variant: got 'cov'"),
        (lambda x, y: coral_transform(x, y, regularisation=-1.0), "regularisation: got -1.0"),
        (lambda x, y: mmd2(x, y[:, :2]), "got 3 and 2 features"),
        (lambda x, y: mmd2(x[:0], y), r"source: got shape \(0, 3\)"),
        (lambda x, y: mmd2(x[:1], y, estimator="unbiased"), "source: .*at least 2 examples"),
        (lambda x, y: mmd2(x, y, estimator="linear"), "got 7 and 5 examples"),
        (lambda x, y: mmd2(x[:5], y, estimator="linear"), "equal and even numbers"),
        (lambda x, y: mmd2(x, y, estimator="quadratic"), "estimator: got 'quadratic'"),
        (lambda x, y: mmd2(x, y, bandwidth=0.0), r"bandwidth: got 0\.0"),
        (lambda x, y: jax.jit(lambda x: mmd2(x, y, bandwidth=(1.0, -2.0)))(x), r"bandwidth: got \(1\.0, -2"),
        (lambda x, y: mmd2(x, y, bandwidth=()), r"bandwidth: got \(\)"),
        (lambda x, y: mmd2(x, y, bandwidth="mode"), "bandwidth: got 'mode'"),
        (lambda x, y: mmd2(x, y, multiples=(1.0, -1.0)), r"multiples: got \(1\.0, -1\.0\)"),
        (lambda x, y: mmd2(x, y, weights=(1.0,)), r"weights: got shape \(1,\) for 5 kernels"),
        (lambda x, y: dan_loss([x, x], [y]), "features of 2 and 1 layers"),
        (lambda x, y: dan_loss([], []), "numbers must be equal and above 0"),
    ],
)
def test_bad_arguments_are_rejected_with_their_name(call, message):
    # Call the functions as users do, without the run-time type checks of the tests.
    names = {f.__name__: inspect.unwrap(f) for f in (coral_loss, coral_transform, covariance, dan_loss, mmd2)}
    bare = type(call)(call.__code__, {**names, "jax": jax})
    with pytest.raises(ValueError, match=message):
        bare(*samples())
