"""Transferability scores, compared with closed forms, scikit-learn's linear models and SciPy's densities."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import BayesianRidge

from jaxmeta.transfer.scores import h_score, leep, log_me, maximal_evidence, nce

RNG = np.random.default_rng(0)
LABELS = np.repeat([0, 1, 2, 3], [9, 12, 4, 15])


def entropy(labels):
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return -(shares * np.log(shares)).sum()


def features_of(labels, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(labels.max() + 1, d))[labels] + rng.normal(size=(len(labels), d))


def softmax(logits):
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


# NCE and LEEP.


def test_leep_and_nce_have_the_values_of_the_worked_examples():
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8]])
    assert leep(probs, np.array([0, 0, 1, 1])) == pytest.approx(-0.383981, abs=1e-6)
    z, y = np.array([0, 0, 1, 0]), np.array([0, 0, 1, 1])
    assert nce(z, y) == pytest.approx(-0.477386, abs=1e-6)
    assert leep(np.eye(2)[z], y) == pytest.approx(-0.477386, abs=1e-6)


def test_leep_is_the_mean_log_likelihood_summed_by_hand():
    probs = softmax(2 * RNG.normal(size=(40, 6)))
    joint = np.zeros((4, 6))
    for y, row in zip(LABELS, probs, strict=True):
        joint[y] += row / 40
    conditional = joint / joint.sum(0)
    expected = np.mean([np.log(conditional[y] @ row) for y, row in zip(LABELS, probs, strict=True)])
    assert leep(probs, LABELS) == pytest.approx(expected, rel=1e-12)
    assert leep(jnp.asarray(probs, jnp.float32), jnp.asarray(LABELS)) == pytest.approx(expected, rel=1e-6)


def test_leep_of_one_hot_probabilities_equals_nce_also_with_absent_source_classes():
    z = RNG.choice([0, 2, 3, 6], size=40)
    assert leep(np.eye(8)[z], LABELS) == pytest.approx(nce(z, LABELS), rel=1e-12)


def test_an_uninformative_source_scores_minus_the_entropy_of_the_labels():
    constant = np.tile(softmax(RNG.normal(size=(1, 5))), (40, 1))
    assert leep(constant, LABELS) == pytest.approx(-entropy(LABELS), rel=1e-12)
    assert leep(constant[:2], np.array([0, 1])) == pytest.approx(-np.log(2), rel=1e-12)
    independent, labels = np.repeat([0, 1, 2], 40), np.tile(LABELS, 3)
    assert nce(independent, labels) == pytest.approx(-entropy(LABELS), rel=1e-12)


def test_nce_is_zero_iff_the_source_class_determines_the_label_and_lies_within_its_bounds():
    finer = LABELS * 2 + RNG.integers(2, size=40)
    assert nce(finer, LABELS) == 0
    # One source class has two labels.
    assert nce(np.where(np.arange(40) == 39, finer[0], finer), LABELS) < -1e-3
    for classes in (2, 5, 30):
        assert -entropy(LABELS) <= nce(RNG.integers(classes, size=40), LABELS) < 0


# H-score.


def test_h_score_has_the_value_of_the_worked_example():
    features = np.array([[0.0], [2.0], [4.0], [6.0]])
    assert h_score(features, np.array([0, 0, 1, 1])) == pytest.approx(0.8, rel=1e-12)


@pytest.mark.parametrize("d", [3, 12])
def test_h_score_equals_the_trace_of_its_definition_and_of_fishers_discriminant(d):
    features = features_of(LABELS, d)
    means = np.stack([features[y == LABELS].mean(0) for y in LABELS])
    covariance, between = np.cov(features, rowvar=False), np.cov(means, rowvar=False)
    expected = np.trace(np.linalg.pinv(covariance) @ between)
    assert h_score(features, LABELS) == pytest.approx(expected, rel=1e-9)
    # scikit-learn's generalised eigenvalues are of between against within: b / w = h / (1 − h).
    lda = LinearDiscriminantAnalysis(solver="eigen", priors=np.bincount(LABELS) / 40).fit(features, LABELS)
    projected = lda.transform(features)
    within = sum(np.square(projected[c == LABELS] - projected[c == LABELS].mean(0)).sum(0) for c in range(4))
    total = np.square(projected - projected.mean(0)).sum(0)
    assert h_score(features, LABELS) == pytest.approx((1 - within / total).sum(), rel=1e-9)


def test_h_score_does_not_change_under_invertible_affine_maps():
    features = features_of(LABELS, 5)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        moved = features @ rng.normal(size=(5, 5)) * 10.0 ** rng.integers(-3, 4) + 5 * rng.normal(size=5)
        assert h_score(moved, LABELS) == pytest.approx(h_score(features, LABELS), rel=1e-7)


@pytest.mark.parametrize(("d", "rank"), [(2, 2), (3, 3), (10, 3)])
def test_h_score_is_the_rank_where_classes_do_not_vary_within(d, rank):
    features = RNG.normal(size=(4, d))[LABELS]
    assert h_score(features, LABELS) == pytest.approx(rank, rel=1e-9)
    assert h_score(features.astype(np.float32), LABELS) == pytest.approx(rank, rel=1e-5)


@pytest.mark.parametrize("d", [1, 2, 8, 60])
def test_h_score_is_at_most_the_smaller_of_dimension_and_classes_minus_one(d):
    result = h_score(features_of(LABELS, d), LABELS)
    assert 0 < result <= min(d, 3) + 1e-9
    if d == 60:  # more dimensions than examples separate anything
        assert h_score(RNG.normal(size=(40, d)), LABELS) == pytest.approx(3, rel=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dependent_features_count_once_in_h_score_and_log_me(dtype):
    basis = features_of(LABELS, 4)
    wide = basis.astype(dtype) @ RNG.normal(size=(4, 30)).astype(dtype)
    assert h_score(wide, LABELS) == pytest.approx(h_score(basis, LABELS), rel=1e-4)
    orthogonal = np.linalg.qr(RNG.normal(size=(30, 30)))[0][:4]
    result = log_me((basis @ orthogonal).astype(dtype), LABELS)
    assert result == pytest.approx(log_me(basis, LABELS), rel=1e-5)


@pytest.mark.parametrize("d", [3, 60])
def test_shrunk_h_score_uses_scikit_learns_ledoit_wolf(d):
    features = features_of(LABELS, d)
    means = np.stack([features[y == LABELS].mean(0) for y in LABELS])
    between = np.cov(means, rowvar=False, bias=True)
    known = LedoitWolf().fit(features)
    assert 0 < known.shrinkage_ < 1
    expected = (1 - known.shrinkage_) * np.trace(np.linalg.solve(known.covariance_, between))
    assert h_score(features, LABELS, shrinkage="ledoit-wolf") == pytest.approx(expected, rel=1e-9)
    assert h_score(features, LABELS, shrinkage=float(known.shrinkage_)) == pytest.approx(expected, rel=1e-9)
    assert h_score(features, LABELS, shrinkage=0.0) == h_score(features, LABELS)


def test_constant_features_have_an_h_score_of_zero():
    for shrinkage in (None, 0.3, "ledoit-wolf"):
        assert h_score(np.ones((40, 3)), LABELS, shrinkage=shrinkage) == 0


# LogME.


def log_density(features, y, alpha, beta):
    covariance = np.eye(len(y)) / beta + features @ features.T / alpha
    return multivariate_normal(np.zeros(len(y)), covariance, allow_singular=False).logpdf(y)


def regression(n, d, rank, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, d))
    return features, features @ rng.normal(size=(d, 2)) / np.sqrt(d * rank) + 0.5 * rng.normal(size=(n, 2))


SHAPES = [(40, 5, 5), (12, 30, 12), (20, 20, 20), (40, 15, 6), (12, 30, 6)]


def test_log_me_has_the_value_of_the_worked_example():
    features, y = np.array([[1.0], [2.0], [3.0]]), np.array([1.0, 2.0, 2.5])
    result = maximal_evidence(features, y[:, None])
    assert result.alpha[0] == pytest.approx(1.259438, abs=1e-6)
    assert result.beta[0] == pytest.approx(22.4, rel=1e-9)
    assert log_me(features, y) == pytest.approx(-0.784652, abs=1e-6)


@pytest.mark.parametrize(("n", "d", "rank"), SHAPES)
def test_evidence_is_the_density_of_the_targets_and_largest_at_its_alpha_and_beta(n, d, rank):
    finite = 0
    for seed in range(3):
        features, targets = regression(n, d, rank, seed)
        result = maximal_evidence(features, targets)
        for y, value, alpha, beta in zip(targets.T, *result, strict=True):
            if max(alpha, beta) > 1e9:  # a limit, tested separately
                continue
            finite += 1
            assert value == pytest.approx(log_density(features, y, alpha, beta), rel=1e-8)
            for factor in (0.99, 1.01):
                assert log_density(features, y, factor * alpha, beta) < value
                assert log_density(features, y, alpha, factor * beta) < value
            everywhere = [
                log_density(features, y, a * alpha, b * beta)
                for a in np.logspace(-2, 2, 7)
                for b in np.logspace(-2, 2, 7)
            ]
            assert max(everywhere) <= value + 1e-9
    assert finite >= 2


@pytest.mark.parametrize(("n", "d", "rank"), SHAPES)
def test_evidence_equals_that_of_scikit_learns_bayesian_ridge_without_hyperpriors(n, d, rank):
    features, targets = regression(n, d, rank)
    result = maximal_evidence(features, targets)
    for y, value, alpha, beta in zip(targets.T, *result, strict=True):
        known = BayesianRidge(
            alpha_1=0, alpha_2=0, lambda_1=0, lambda_2=0, fit_intercept=False, compute_score=True,
            tol=1e-12, max_iter=20_000,
        ).fit(features, y)  # fmt: skip
        assert value == pytest.approx(known.scores_[-1], rel=1e-7)
        if max(alpha, beta) < 1e9:
            np.testing.assert_allclose([alpha, beta], [known.lambda_, known.alpha_], rtol=1e-4)


def test_log_me_of_classes_is_the_mean_over_their_one_hot_columns_in_nats_per_example():
    features = features_of(LABELS, 6)
    result = maximal_evidence(features, np.eye(4)[LABELS])
    densities = [
        log_density(features, y, alpha, beta)
        for y, alpha, beta in zip(np.eye(4)[LABELS].T, result.alpha, result.beta, strict=True)
    ]
    assert log_me(features, LABELS) == pytest.approx(np.mean(densities) / 40, rel=1e-9)
    assert log_me(features, 3 * LABELS) == log_me(features, LABELS)  # with absent classes
    assert log_me(features, np.eye(4)[LABELS]) == log_me(features, LABELS)


def test_log_me_in_float32_equals_that_in_float64():
    features = features_of(LABELS, 100) + 30
    for dtype in (jnp.float32, np.float32):
        result = log_me(jnp.asarray(features, dtype), jnp.asarray(LABELS))
        assert result == pytest.approx(log_me(features, LABELS), rel=1e-5)


def test_log_me_does_not_depend_on_the_features_basis_or_unit():
    features = features_of(LABELS, 6)
    rotation = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    for moved in (features @ rotation, 1e4 * features, 1e-4 * features, np.c_[features, np.zeros(40)]):
        assert log_me(moved, LABELS) == pytest.approx(log_me(features, LABELS), rel=1e-9)


def test_uninformative_features_have_the_evidence_of_noise():
    y = RNG.normal(size=20)
    noise = -10 * (np.log(2 * np.pi * (y @ y) / 20) + 1)
    useless = RNG.normal(size=(20, 3))
    useless -= np.outer(y, y @ useless) / (y @ y)
    assert 20 * log_me(useless, y) == pytest.approx(noise, rel=1e-9)
    assert 20 * log_me(np.zeros((20, 3)), y) == pytest.approx(noise, rel=1e-9)


def test_a_perfect_fit_is_finite_and_better_than_any_other():
    features = features_of(LABELS, 6)
    perfect = log_me(np.eye(4)[LABELS], LABELS)
    nearly = log_me(np.eye(4)[LABELS] + 1e-3 * RNG.normal(size=(40, 4)), LABELS)
    assert log_me(features, LABELS) < nearly < perfect < np.inf
    # As many independent features as examples: the limit of no noise, N(y; 0, α⁻¹ F Fᵀ).
    square, y = np.diag([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0])
    result = maximal_evidence(square, y[:, None])
    assert result.alpha[0] == pytest.approx(1, rel=1e-6)
    assert result.log_evidence[0] == pytest.approx(multivariate_normal(cov=square**2).logpdf(y), rel=1e-9)


# Bad input, without the run-time type checks of the tests, which users do not have.


@pytest.mark.parametrize(
    ("score", "first", "labels", "message"),
    [
        (leep, np.array([[0.5, 0.6], [0.5, 0.5]]), np.array([0, 1]), "got rows that sum to 1 to 1.1"),
        (leep, np.array([[1.5, -0.5], [0.5, 0.5]]), np.array([0, 1]), "smallest entry of -0.5"),
        (leep, np.array([[np.nan, 1.0], [0.5, 0.5]]), np.array([0, 1]), "source_probs: got NaN"),
        (leep, np.full((3, 2), 0.5), np.array([0, 1]), r"labels: got shape \(2,\); it must be \(3,\)"),
        (nce, np.array([0.0, 1.0]), np.array([0, 1]), "source_labels: got float64; classes must be integers"),
        (nce, np.array([0, 1]), np.array([0, -1]), "labels: got classes from -1 to 0; .* at least 0"),
        (nce, np.array([0, 1]), np.array([3, 3]), "labels: all 2 are of class 3"),
        (h_score, np.ones((2, 3)), np.array([0.0, 1.0]), "labels: got float64; classes must be integers"),
        (h_score, np.ones(2), np.array([0, 1]), r"features: got shape \(2,\)"),
        (h_score, np.full((2, 3), np.inf), np.array([0, 1]), "features: got NaN or infinity"),
        (log_me, np.ones((2, 3)), np.array([1, 1]), "labels: all 2 are of class 1"),
        (maximal_evidence, np.ones((2, 3)), np.ones((3, 1)), "targets: got 3 rows; features have 2"),
        (log_me, np.ones((2, 3)), np.zeros(2), "targets: got a column of zeros"),
    ],
)  # fmt: skip
def test_bad_input_is_rejected_with_its_name(score, first, labels, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(score)(first, labels)


@pytest.mark.parametrize("shrinkage", [1.0, -0.1, "oas"])
def test_an_unknown_shrinkage_is_rejected(shrinkage):
    with pytest.raises(ValueError, match="shrinkage: got"):
        h_score(np.eye(4), np.array([0, 0, 1, 1]), shrinkage=shrinkage)
