"""Covariate shift, compared with known ratios, scikit-learn's regression and SciPy's quadratic programs."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from jaxmeta.transfer.importance import (
    DensityRatio,
    density_ratio,
    effective_sample_size,
    kernel_mean_matching,
)


def domains(n_source, n_target, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n_source, d)), rng.normal(size=(n_target, d)) + np.linspace(0.2, 1, d)


# --- The discriminator ----------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "regularisation"), [(1, 1e-3), (4, 1e-2), (30, 0.1)])
def test_the_discriminator_equals_scikit_learns_logistic_regression(d, regularisation, x64):
    source, target = domains(40, 25, d)
    ratio = density_ratio(source, target, regularisation=regularisation)
    known = LogisticRegression(C=1 / (regularisation * 65), tol=1e-10, max_iter=10_000).fit(
        np.concatenate([source, target]), np.repeat([0, 1], [40, 25])
    )
    np.testing.assert_allclose(ratio.kernel, known.coef_[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ratio.bias, known.intercept_[0], rtol=1e-4, atol=1e-6)
    probs = known.predict_proba(source)
    np.testing.assert_allclose(ratio(source), 40 / 25 * probs[:, 1] / probs[:, 0], rtol=1e-3)


@pytest.mark.nightly_rows(after=2)
@pytest.mark.parametrize(("n_source", "n_target"), [(20_000, 5_000), (5_000, 20_000), (20_000, 20_000)])
def test_the_ratio_of_two_unit_gaussians_is_learned_for_any_numbers_of_examples(n_source, n_target):
    rng = np.random.default_rng(1)
    source, target = rng.normal(size=(n_source, 1)), rng.normal(size=(n_target, 1)) + 1
    ratio = density_ratio(source, target, regularisation=1e-6)
    x = np.array([[0.0], [0.5], [1.0]])
    # ln w(x) = x − 1/2. In 30 other draws the slope had a standard deviation of at most 0.025.
    np.testing.assert_allclose(ratio(x), [0.606531, 1, 1.648721], rtol=0.06)
    assert ratio(source).mean() == pytest.approx(1, abs=0.05)
    # Weighted source examples have the target's mean of 1 and variance of 1.
    weights = ratio(source, self_normalised=True)
    mean = (weights * source[:, 0]).mean()
    assert mean == pytest.approx(1, abs=0.1)
    assert (weights * np.square(source[:, 0] - mean)).mean() == pytest.approx(1, abs=0.15)
    assert effective_sample_size(weights) / n_source == pytest.approx(np.exp(-1), abs=0.1)


def test_the_ratio_does_not_depend_on_the_features_origin_or_axes(x64):
    source, target = domains(60, 50, 4)
    weights = density_ratio(source, target)(source)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))[0]
    offset = np.array([3.0, -50.0, 0.1, 7.0])
    moved = density_ratio(source @ rotation + offset, target @ rotation + offset)
    np.testing.assert_allclose(moved(source @ rotation + offset), weights, rtol=1e-6)
    scaled = density_ratio(10 * source, 10 * target, regularisation=1e-1)
    np.testing.assert_allclose(scaled(10 * source), weights, rtol=1e-6)


def test_equal_domains_have_weights_of_one(x64):
    source, _ = domains(30, 1, 3)
    np.testing.assert_allclose(density_ratio(source, source)(source), 1, rtol=1e-9)
    np.testing.assert_allclose(density_ratio(source, np.tile(source, (4, 1)))(source), 1, rtol=1e-9)


def test_weights_of_separable_domains_are_finite_and_have_a_tiny_mean():
    source, target = domains(100, 100, 2)
    apart = density_ratio(source, target + 20, regularisation=1e-6)
    assert 0 < apart(source).mean() < 1e-2
    assert apart(source, self_normalised=True).mean() == pytest.approx(1, rel=1e-5)
    assert density_ratio(source, target)(source).mean() == pytest.approx(1, abs=0.2)


def test_an_exponent_flattens_and_self_normalised_weights_have_mean_one():
    ratio = DensityRatio(jnp.array([2.0]), jnp.array(0.5), jnp.array(-0.3))
    x = jnp.array([[0.0], [1.0], [-1.0]])
    w = np.exp(2 * np.array([0.0, 1.0, -1.0]) + 0.2)
    np.testing.assert_allclose(ratio(x), w, rtol=1e-6)
    np.testing.assert_allclose(ratio(x, exponent=0.5), np.sqrt(w), rtol=1e-6)
    np.testing.assert_allclose(ratio(x, exponent=0.0), 1, rtol=1e-6)
    np.testing.assert_allclose(ratio(x, self_normalised=True), w / w.mean(), rtol=1e-6)
    compiled = jax.jit(lambda ratio, x: ratio(x, exponent=0.5, self_normalised=True))(ratio, x)
    np.testing.assert_allclose(compiled, np.sqrt(w) / np.sqrt(w).mean(), rtol=1e-6)
    assert jnp.isfinite(ratio(100 * x, self_normalised=True)).all()


def test_weighted_source_losses_have_the_mean_of_target_losses():
    rng = np.random.default_rng(3)
    source, target = rng.normal(size=(20_000, 1)), rng.normal(size=(20_000, 1)) + 1
    weights = density_ratio(source, target)(source, self_normalised=True)
    of_source, of_target = (np.square(np.sin(x[:, 0])) for x in (source, target))
    assert abs(of_source.mean() - of_target.mean()) > 0.08
    assert (weights * of_source).mean() == pytest.approx(of_target.mean(), abs=0.03)


# --- The effective sample size --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1, 1, 2], 16 / 6), ([3, 3, 3, 3], 4), ([0, 5, 0], 1), ([0, 0], 0), ([1e30] * 2, 2), ([1e-30] * 2, 2)],
)
def test_effective_sample_size_is_the_square_of_the_sum_over_the_sum_of_squares(weights, expected):
    assert effective_sample_size(jnp.asarray(weights, jnp.float32)) == pytest.approx(expected, rel=1e-6)


# --- Kernel mean matching -------------------------------------------------------------------------


def squared_mmd(w, source, target, bandwidth):
    def kernel(a, b):
        return np.exp(-np.square(a[:, None] - b[None]).sum(-1) / (2 * bandwidth**2))

    w = w / len(source)
    within = w @ kernel(source, source) @ w
    return within - 2 * (w @ kernel(source, target)).mean() + kernel(target, target).mean()


@pytest.mark.nightly_rows(after=2)
@pytest.mark.parametrize(
    ("bound", "slack"), [(1.7, 0.5), (1.2, 0.05), (1000.0, 0.5), (3.0, 0.0), (1.0, 0.0), (5.0, 2.0)]
)
def test_matched_weights_equal_scipys_solution_of_the_quadratic_program(bound, slack, x64):
    for seed in range(2):
        source, target = domains(12, 9, 2, seed)
        w = np.asarray(
            kernel_mean_matching(source, target, bandwidth=0.8, bound=bound, slack=slack, tolerance=1e-8)
        )
        known = minimize(
            squared_mmd, np.ones(12), args=(source, target, 0.8), method="SLSQP",
            bounds=[(0, bound)] * 12, options={"ftol": 1e-14, "maxiter": 1000},
            constraints=[
                {"type": "ineq", "fun": lambda w: slack - (w.mean() - 1)},
                {"type": "ineq", "fun": lambda w: slack + (w.mean() - 1)},
            ],
        )  # fmt: skip
        assert w.min() >= 0
        assert w.max() <= bound
        assert abs(w.mean() - 1) <= slack + 1e-9
        assert squared_mmd(w, source, target, 0.8) == pytest.approx(known.fun, abs=2e-8)
        np.testing.assert_allclose(w, known.x, atol=2e-3)


def test_the_mean_of_matched_weights_stays_within_the_slack_above_too(x64):
    # Unconstrained, w = 2 e^(−1/2) / (1 + e⁻²) = 1.068 for both.
    source, target = np.array([[-1.0], [1.0]]), np.array([[0.0]])
    for slack, expected in ((0.5, 2 * np.exp(-0.5) / (1 + np.exp(-2))), (0.05, 1.05), (0.0, 1)):
        w = kernel_mean_matching(source, target, bandwidth=1.0, slack=slack, tolerance=1e-12)
        np.testing.assert_allclose(w, expected, rtol=1e-6)


def test_the_tolerance_bounds_how_far_the_value_is_above_the_minimum(x64):
    source, target = domains(30, 20, 2)
    values = [
        squared_mmd(
            np.asarray(kernel_mean_matching(source, target, bandwidth=1.0, tolerance=tolerance)),
            source, target, 1.0,
        )
        for tolerance in (1e-2, 1e-4, 1e-7)
    ]  # fmt: skip
    assert values[0] - values[2] <= 1e-2
    assert values[1] - values[2] <= 1e-4
    assert values[0] < squared_mmd(np.ones(30), source, target, 1.0)


def test_matching_a_domain_to_itself_leaves_it_unweighted(x64):
    source, _ = domains(20, 1, 2)
    w = kernel_mean_matching(source, source, tolerance=1e-12)
    np.testing.assert_array_equal(w, 1)


def test_the_default_kernel_has_the_median_distance_of_all_examples(x64):
    source, target = domains(15, 10, 3)
    both = np.concatenate([source, target])
    distances = [np.linalg.norm(both[i] - both[j]) for i in range(25) for j in range(i)]
    expected = kernel_mean_matching(source, target, bandwidth=float(np.median(distances)))
    np.testing.assert_allclose(kernel_mean_matching(source, target), expected, rtol=1e-4, atol=1e-6)


def test_matched_weights_move_the_source_to_the_target():
    rng = np.random.default_rng(4)
    source, target = rng.normal(size=(400, 1)), rng.normal(size=(400, 1)) + 1
    w = np.asarray(kernel_mean_matching(source, target, bound=10.0))
    assert (w * source[:, 0]).mean() == pytest.approx(target.mean(), abs=0.1)
    assert np.corrcoef(w, np.exp(source[:, 0] - 0.5))[0, 1] > 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: density_ratio(s, t, regularisation=0.0), "regularisation: got 0.0; it must be pos"),
        (lambda s, t: inspect.unwrap(density_ratio)(s, t[:, :1]), "target: got 1 features; source has 2"),
        (lambda s, t: density_ratio(s, t, steps=1), "steps: got 1, too few for tolerance 1e-14"),
        (lambda s, t: density_ratio(np.inf * s, t), "source: got NaN or infinity"),
        (lambda s, t: density_ratio(s, t)(s, exponent=2.0), "exponent: got 2.0; it must be at most 1"),
        (lambda s, t: inspect.unwrap(kernel_mean_matching)(s, t[:, :1]), "target: got 1 features; source"),
        (lambda s, t: kernel_mean_matching(s, t, bound=0.5), "bound: got 0.5; it must be at least 1"),
        (lambda s, t: kernel_mean_matching(s, t, slack=-0.1), "slack: got -0.1"),
        (lambda s, t: kernel_mean_matching(s, t, bandwidth=0.0), "bandwidth: got 0.0; it must be positive"),
        (lambda s, t: kernel_mean_matching(0 * s, 0 * t), "bandwidth: got None .* more than half of"),
        (lambda s, t: kernel_mean_matching(s, t, tolerance=1e-12, steps=3), "steps: got 3, too few"),
    ],
)  # fmt: skip
def test_bad_arguments_are_rejected_with_their_name(call, message):
    source, target = domains(20, 10, 2)
    with pytest.raises(ValueError, match=message):
        call(source, target)
