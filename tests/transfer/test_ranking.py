"""Rankings of source models, and correlations compared with SciPy's."""

import numpy as np
import pytest
from scipy.stats import kendalltau, pearsonr, weightedtau

from jaxmeta.transfer.ranking import Candidate, rank_sources
from jaxmeta.transfer.scores import h_score, leep, log_me, nce

RNG = np.random.default_rng(0)
LABELS = np.repeat([0, 1, 2], [9, 12, 14])


def candidate(signal, classes=4):
    """Return features and probabilities that predict the labels better for a larger `signal`."""
    features = signal * RNG.normal(size=(3, 5))[LABELS] + RNG.normal(size=(35, 5))
    logits = signal * RNG.normal(size=(3, classes))[LABELS] + RNG.normal(size=(35, classes))
    exp = np.exp(logits)
    return Candidate(features, exp / exp.sum(1, keepdims=True))


MODELS = {f"signal {signal}": candidate(signal) for signal in (0.5, 4.0, 0.0, 2.0)}


@pytest.mark.parametrize("score", ["log_me", "h_score", "leep", "nce"])
def test_models_are_sorted_by_the_named_score(score):
    ranking = rank_sources(MODELS, (None, LABELS), score=score)
    values = [row.scores[score] for row in ranking.rows]
    assert values == sorted(values, reverse=True)
    assert sorted(row.name for row in ranking.rows) == sorted(MODELS)
    for row in ranking.rows:
        features, probs = MODELS[row.name].features, MODELS[row.name].source_probs
        assert row.scores == {
            "log_me": log_me(features, LABELS),
            "h_score": h_score(features, LABELS),
            "leep": leep(probs, LABELS),
            "nce": nce(probs.argmax(1), LABELS),
        }
        assert row.accuracy is None
    assert ranking.correlations == {}


def test_a_function_of_the_examples_is_called_for_its_candidate():
    x = RNG.normal(size=(35, 7))
    body = RNG.normal(size=(7, 5))
    functions = {"linear": lambda x: Candidate(np.tanh(x @ body)), "given": MODELS["signal 2.0"]}
    arrays = {"linear": Candidate(np.tanh(x @ body)), "given": MODELS["signal 2.0"]}
    result = rank_sources(functions, (x, LABELS), shrinkage="ledoit-wolf")
    assert result == rank_sources(arrays, (None, LABELS), shrinkage="ledoit-wolf")
    assert result.rows[0].scores["h_score"] == h_score(
        MODELS["signal 2.0"].features, LABELS, shrinkage="ledoit-wolf"
    )


@pytest.mark.parametrize("accuracies", [[0.5, 0.9, 0.3, 0.7], [0.9, 0.5, 0.7, 0.3], [0.5, 0.5, 0.3, 0.7]])
def test_correlations_with_accuracies_equal_scipys_with_ties(accuracies):
    known = dict(zip(MODELS, accuracies, strict=True))
    ranking = rank_sources(MODELS, (None, LABELS), accuracies=known)
    assert set(ranking.correlations) == {"log_me", "h_score", "leep", "nce"}
    for score, coefficients in ranking.correlations.items():
        pairs = np.array([(row.scores[score], known[row.name]) for row in ranking.rows]).T
        assert [row.accuracy for row in ranking.rows] == pairs[1].tolist()
        expected = [measure(*pairs).statistic for measure in (pearsonr, kendalltau, weightedtau)]
        np.testing.assert_allclose(coefficients, expected, rtol=1e-9)


def test_tied_scores_and_many_models_correlate_as_in_scipy():
    models = {str(i): candidate(RNG.integers(4) / 2) for i in range(12)}
    models["again"] = models["3"]
    accuracies = {name: float(RNG.integers(5)) for name in models}
    ranking = rank_sources(models, (None, LABELS), accuracies=accuracies)
    for score, coefficients in ranking.correlations.items():
        pairs = np.array([(row.scores[score], row.accuracy) for row in ranking.rows]).T
        expected = [measure(*pairs).statistic for measure in (pearsonr, kendalltau, weightedtau)]
        np.testing.assert_allclose(coefficients, expected, rtol=1e-9)


def test_equal_accuracies_have_no_correlation():
    ranking = rank_sources(MODELS, (None, LABELS), accuracies=dict.fromkeys(MODELS, 0.5))
    assert np.isnan(ranking.correlations["log_me"]).all()


def test_a_ranking_prints_as_a_table_with_its_own_score_first():
    models = {**MODELS, "headless": Candidate(MODELS["signal 0.5"].features)}
    accuracies = dict(zip(models, [0.5, 0.9, 0.3, 0.7, 0.6], strict=True))
    ranking = rank_sources(models, (None, LABELS), score="h_score", accuracies=accuracies)
    lines = str(ranking).split("\n")
    assert lines[0].split() == ["source", "h_score", "log_me", "leep", "nce", "accuracy"]
    best = ranking.rows[0]
    shown = [best.scores[score] for score in ("h_score", "log_me", "leep", "nce")] + [best.accuracy]
    assert lines[1].split()[-5:] == [f"{value:.4f}" for value in shown]
    assert next(line for line in lines if line.startswith("headless")).split()[-3:-1] == ["-", "-"]
    assert [line.split("  ")[0] for line in lines[-3:]] == ["pearson", "kendall", "weighted kendall"]
    assert lines[-2].split()[1] == f"{ranking.correlations['h_score'].kendall:.4f}"


@pytest.mark.parametrize(
    ("models", "settings", "message"),
    [
        ({}, {}, "models: got none"),
        (MODELS, {"score": "lda"}, "score: got 'lda'; it must be one of 'log_me', 'h_score', 'leep', 'nce'"),
        (MODELS, {"accuracies": {"signal 0.5": 0.4}}, "accuracies: got .* the names must be those of models"),
        (
            {"a": Candidate(np.ones((35, 2)))},
            {"score": "leep"},
            r"models\['a'\]: got source_probs=None, which leep requires",
        ),
        ({"a": Candidate(np.eye(35), np.ones((35, 2)))}, {}, r"models\['a'\]: source_probs: got rows"),
    ],
)
def test_invalid_arguments_are_refused(models, settings, message):
    with pytest.raises(ValueError, match=message):
        rank_sources(models, (None, LABELS), **settings)
