"""Label shift: worked examples, SciPy's optima and simulated shifts."""

import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp

from jaxmeta.transfer.label_shift import adjust, bbse, em_prior, joint_confusion, rlls, temperature

CONFUSION = np.array([[0.45, 0.1], [0.05, 0.4]])
MU = np.array([0.34, 0.66])

# Three Gaussian classes with a known posterior, in two mixtures.
MEANS = np.array([[0.0, 0.0], [1.5, 0.0], [0.5, 1.5]])
SOURCE, TARGET = np.array([0.5, 0.3, 0.2]), np.array([0.15, 0.25, 0.6])


def draw_examples(prior, n, seed):
    rng = np.random.default_rng(seed)
    y = rng.choice(3, size=n, p=prior)
    return MEANS[y] + rng.normal(size=(n, 2)), y


def posterior(x, prior):
    logs = np.log(prior) - np.square(x[:, None] - MEANS[None]).sum(-1) / 2
    exp = np.exp(logs - logs.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def random_problem(classes, seed, singular=False):
    rng = np.random.default_rng(seed)
    confusion = rng.random((classes, classes)) + 2 * np.eye(classes)
    if singular:
        confusion[:, 0] = confusion[:, 1]
    confusion /= confusion.sum()
    return confusion, rng.dirichlet(np.ones(classes)), confusion.sum(0)


# The confusion matrix.


def test_joint_confusion_counts_predictions_by_row_and_labels_by_column():
    predictions, labels = np.array([0, 1, 1, 2, 1, 0]), np.array([0, 1, 0, 2, 2, 0])
    expected = np.array([[2, 0, 0], [1, 1, 1], [0, 0, 1]]) / 6
    np.testing.assert_allclose(joint_confusion(predictions, labels, 3), expected, rtol=1e-6)
    np.testing.assert_allclose(joint_confusion(np.eye(3)[predictions], labels, 3), expected, rtol=1e-6)
    padded = joint_confusion(jnp.asarray(predictions), jnp.asarray(labels), 4)
    np.testing.assert_allclose(padded, np.pad(expected, (0, 1)), rtol=1e-6)


def test_soft_confusion_averages_probabilities_within_each_label(x64):
    x, y = draw_examples(SOURCE, 200, 0)
    probs = posterior(x, SOURCE)
    result = joint_confusion(probs, y, 3)
    for label in range(3):
        np.testing.assert_allclose(result[:, label], probs[y == label].sum(0) / 200, rtol=1e-12)
    np.testing.assert_allclose(result.sum(0), np.bincount(y) / 200, rtol=1e-12)


# BBSE.


def test_bbse_solves_the_worked_example(x64):
    np.testing.assert_allclose(bbse(CONFUSION, MU), [0.4, 1.6], rtol=1e-12)
    np.testing.assert_allclose(CONFUSION @ [0.4, 1.6], MU, rtol=1e-12)
    assert CONFUSION.sum(0) @ bbse(CONFUSION, MU) == pytest.approx(1, rel=1e-12)


def test_target_predictions_are_classes_probabilities_or_their_distribution(x64):
    classes = np.repeat([0, 1], [17, 33])
    for predictions in (classes, np.eye(2)[classes], np.tile(MU, (5, 1)), jnp.asarray(classes, jnp.int32)):
        np.testing.assert_allclose(bbse(CONFUSION, predictions), [0.4, 1.6], rtol=1e-12)


def test_bbse_returns_any_weights_that_made_the_predictions(x64):
    for seed in range(3):
        confusion, target, source = random_problem(6, seed)
        weights = target / source
        np.testing.assert_allclose(bbse(confusion, confusion @ weights), weights, rtol=1e-9)
        np.testing.assert_allclose(bbse(confusion, source @ np.eye(6), clip=False) @ source, 1, rtol=1e-9)


def test_negative_weights_are_clipped_and_the_rest_rescaled_to_mean_one(x64):
    mu, prior = np.array([0.05, 0.95]), CONFUSION.sum(0)
    raw = np.linalg.solve(CONFUSION, mu)
    assert raw[0] < 0
    np.testing.assert_allclose(bbse(CONFUSION, mu, clip=False), raw, rtol=1e-12)
    np.testing.assert_allclose(bbse(CONFUSION, mu), np.maximum(raw, 0), rtol=1e-12)
    np.testing.assert_allclose(bbse(CONFUSION, mu, rescale=True), [0, 1 / prior[1]], rtol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e-7])
def test_a_classifier_that_cannot_tell_classes_apart_is_rejected_with_its_condition_number(offset):
    confusion = np.array([[0.3, 0.3, 0.05], [0.1, 0.1, 0.05], [0.0, 0.0, 0.1]])
    confusion[0, 0] += offset
    confusion /= confusion.sum()
    with pytest.raises(ValueError, match="use rlls, or merge") as raised:
        bbse(confusion, np.array([0.5, 0.3, 0.2]))
    shown = re.search(r"condition number of P\(ŷ\|y\) is (\S+), above 1e\+04", str(raised.value))[1]
    expected = np.linalg.cond(confusion / confusion.sum(0)) if offset else 1e15
    assert float(shown) >= 0.99 * expected


def test_rare_classes_do_not_make_the_confusion_singular(x64):
    confusion = np.diag([1 - 1e-6, 1e-6])
    np.testing.assert_allclose(bbse(confusion, np.array([0.5, 0.5])), 0.5 / confusion.diagonal(), rtol=1e-9)


# RLLS.


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(4), marks=pytest.mark.nightly)], ids=len)
def test_rlls_minimises_the_sum_of_its_two_norms(seeds, x64):
    cases = set()
    for seed, penalty in itertools.product(seeds, (0.003, 0.03, 0.1, 0.2)):
        confusion, target, source = random_problem(5, seed, singular=seed % 2 == 0)
        mu = confusion @ (target / source) + 0.01 * np.array([1, -1, 2, -2, 0])
        b = mu - confusion.sum(1)

        def objective(theta, confusion=confusion, b=b, penalty=penalty):
            return np.linalg.norm(confusion @ theta - b) + penalty * np.linalg.norm(theta)

        theta = np.asarray(rlls(confusion, mu, penalty=penalty, clip=False)) - 1
        for start in (theta, np.zeros(5), np.linalg.pinv(confusion) @ b):
            result = minimize(objective, start, method="Powell", options={"ftol": 1e-14, "xtol": 1e-10})
            result = minimize(
                objective, result.x, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13}
            )
            assert objective(theta) <= result.fun + 1e-9
        residual, length = np.linalg.norm(confusion @ theta - b), np.linalg.norm(theta)
        cases.add("none" if length < 1e-9 else "exact" if residual < 1e-9 else "between")
        half = rlls(confusion, mu, penalty=penalty, shrink=0.5, clip=False)
        np.testing.assert_allclose(half, 1 + theta / 2, rtol=1e-9)
    assert cases == {"none", "exact", "between"}


def test_rlls_equals_bbse_at_a_small_penalty_and_ones_at_a_large_one(x64):
    for seed in range(3):
        confusion, target, source = random_problem(4, seed)
        mu = confusion @ (target / source)
        np.testing.assert_allclose(rlls(confusion, mu, penalty=1e-9), bbse(confusion, mu), rtol=1e-7)
        np.testing.assert_allclose(rlls(confusion, mu, penalty=10.0), 1, rtol=1e-12)
        assert (rlls(confusion, mu, penalty=1e-9) == rlls(confusion, mu, penalty=1e-9, rescale=False)).all()


# EM.


def log_likelihood(prior, probs, source):
    return np.log(probs @ (prior / source)).mean()


def test_em_never_lowers_the_likelihood_and_ends_at_scipys_maximum(x64):
    probs = posterior(draw_examples(TARGET, 400, 1)[0], SOURCE)
    steps = [np.asarray(em_prior(probs, SOURCE, steps=k, tolerance=0.0).target_prior) for k in range(1, 30)]
    values = [log_likelihood(prior, probs, SOURCE) for prior in [SOURCE, *steps]]
    assert (np.diff(values) >= -1e-14).all()
    result, taken = em_prior(probs, SOURCE, tolerance=1e-12)
    assert 30 < taken < 10_000

    def loss(z):
        prior = np.exp(z) / np.exp(z).sum()
        return -log_likelihood(prior, probs, SOURCE)

    known = minimize(loss, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14})
    np.testing.assert_allclose(result, np.exp(known.x) / np.exp(known.x).sum(), atol=1e-6)
    assert result.sum() == pytest.approx(1, rel=1e-12)


def test_one_step_of_em_is_the_mean_posterior(x64):
    probs = posterior(draw_examples(TARGET, 50, 1)[0], SOURCE)
    first, taken = em_prior(probs, SOURCE, steps=1)
    np.testing.assert_allclose(first, probs.mean(0), rtol=1e-12)
    assert taken == 1
    second = em_prior(probs, SOURCE, steps=2, tolerance=0.0).target_prior
    np.testing.assert_allclose(second, adjust(jnp.asarray(probs), first / SOURCE).mean(0), rtol=1e-12)


# Simulated shifts.


def test_every_estimate_recovers_a_simulated_shift_within_its_sampling_error():
    n = 20_000
    weights = TARGET / SOURCE
    (x_s, y_s), (x_t, _) = draw_examples(SOURCE, n, 2), draw_examples(TARGET, n, 3)
    probs_s, probs_t = posterior(x_s, SOURCE), posterior(x_t, SOURCE)
    hard, soft = joint_confusion(probs_s.argmax(1), y_s, 3), joint_confusion(probs_s, y_s, 3)
    estimates = {
        "bbse, hard": bbse(hard, probs_t.argmax(1)),
        "bbse, soft": bbse(soft, probs_t),
        "rlls": rlls(hard, probs_t.argmax(1), penalty=1e-3),
        "em": em_prior(probs_t, SOURCE).target_prior / SOURCE,
    }
    for name, estimate in estimates.items():
        # In 30 other draws of this size the largest errors were 0.17, and 0.06 for EM.
        assert np.abs(estimate - weights).max() < (0.08 if name == "em" else 0.2), name
    # BBSE needs no calibration; EM does.
    sharp = probs_t**3 / (probs_t**3).sum(1, keepdims=True)
    biased = em_prior(sharp, SOURCE).target_prior / SOURCE
    assert np.abs(biased - weights).max() > 0.5


def test_adjusted_predictions_are_the_targets_posterior(x64):
    x = draw_examples(TARGET, 50, 4)[0]
    result = adjust(posterior(x, SOURCE), TARGET / SOURCE)
    np.testing.assert_allclose(result, posterior(x, TARGET), rtol=1e-9)
    np.testing.assert_allclose(adjust(posterior(x, SOURCE), 7 * TARGET / SOURCE), result, rtol=1e-12)
    compiled = jax.jit(adjust)(posterior(x, SOURCE)[None], TARGET / SOURCE)
    np.testing.assert_allclose(compiled[0], result, rtol=1e-12)


def test_a_row_of_impossible_classes_is_unchanged():
    probs = jnp.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    result = adjust(probs, jnp.array([0.0, 1.0, 1.0]))
    np.testing.assert_array_equal(result, [[1, 0, 0], [0, 1, 0]])


# Temperature.


def test_temperature_equals_scipys_minimum_and_undoes_a_scale():
    x, y = draw_examples(SOURCE, 3000, 5)
    logits = np.log(posterior(x, SOURCE))

    def loss(log_t, logits):
        z = logits / np.exp(log_t)
        return (logsumexp(z, axis=1) - z[np.arange(len(y)), y]).mean()

    for scale in (1.0, 4.0, 0.25):
        known = minimize_scalar(loss, bracket=(-3, np.log(scale), 3), args=(scale * logits,))
        result = temperature(scale * logits + 3, y)
        assert result == pytest.approx(np.exp(known.x), rel=1e-5)
        assert result == pytest.approx(scale, rel=0.1)  # the logits are calibrated, up to sampling


def test_temperature_ends_at_its_bounds_where_no_finite_one_is_best():
    logits = np.array([[2.0, 0.0], [0.0, 2.0]])
    assert temperature(logits, np.array([0, 1])) == pytest.approx(0.01, rel=1e-9)
    assert temperature(logits, np.array([1, 0])) == pytest.approx(100, rel=1e-9)
    assert temperature(jnp.asarray(1e4 * logits), np.array([0, 1])) == pytest.approx(0.01, rel=1e-9)


# Bad input, without the run-time type checks of the tests, which users do not have.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bbse(CONFUSION / CONFUSION.sum(0), MU), "joint_confusion: got rows that sum to 2"),
        (lambda: inspect.unwrap(bbse)(np.ones((2, 3)) / 6, MU), r"joint_confusion: got shape \(2, 3\)"),
        (lambda: bbse(np.diag([1.0, 0.0]), MU), "class 1 has no labelled source examples"),
        (lambda: bbse(CONFUSION, np.array([0.5, 0.7])), "target_predictions: got rows that sum to 1.2"),
        (lambda: bbse(CONFUSION, np.array([0.5, 0.3, 0.2])), r"target_predictions: got shape \(3,\)"),
        (lambda: bbse(CONFUSION, np.array([0, 1, 2])), "classes from 0 to 2; they must be from 0 to 1"),
        (lambda: inspect.unwrap(bbse)(CONFUSION, np.ones((4, 3)) / 3), "target_predictions: got 3 columns"),
        (lambda: rlls(CONFUSION, MU, penalty=0.0), "penalty: got 0.0; it must be positive"),
        (lambda: rlls(CONFUSION, MU, penalty=0.1, shrink=1.5), "shrink: got 1.5; it must be at most 1"),
        (lambda: em_prior(np.eye(2), np.array([1.0, 0.0])), "source_prior: got 0 for class 1"),
        (lambda: em_prior(np.eye(2), MU, steps=0), "steps: got 0"),
        (lambda: em_prior(np.eye(2), MU, tolerance=-1.0), "tolerance: got -1.0"),
        (lambda: em_prior(np.eye(2), np.ones(2)), "source_prior: got rows that sum to 2"),
        (lambda: joint_confusion(np.array([0, 2]), np.array([0, 1]), 2), "predictions: got classes from 0"),
        (lambda: inspect.unwrap(joint_confusion)(np.arange(3), np.arange(2), 3), r"labels: got shape \(2,\)"),
        (lambda: temperature(np.full((2, 2), np.nan), np.array([0, 1])), "logits: got NaN"),
        (lambda: temperature(np.eye(2), np.array([0, 5])), "labels: got classes from 0 to 5; they must be"),
    ],
)  # fmt: skip
def test_bad_input_is_rejected_with_its_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
