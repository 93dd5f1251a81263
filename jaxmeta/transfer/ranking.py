"""Rankings of source models for a target task by transferability scores, and their reliability."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Array, Float, Int, Real

from jaxmeta.checks import ArgumentError, check_word
from jaxmeta.transfer.scores import Shrinkage, h_score, leep, log_me, nce

Score = Literal["log_me", "h_score", "leep", "nce"]
SCORES: tuple[Score, ...] = get_args(Score)


@dataclass(frozen=True)
class Candidate:
    """The outputs of a source model for the target examples.

    Attributes:
      features: features of its body, of shape `(n, d)`.
      source_probs: its probabilities of the source classes, of shape `(n, classes)`; None if it has no
        classes, as after self-supervised training; NCE and LEEP are then not computed.
    """

    features: Real[Array | np.ndarray, "n d"]
    source_probs: Float[Array | np.ndarray, "n classes"] | None = None


class Correlation(NamedTuple):
    """Correlations of a score with the accuracies after fine-tuning; NaN if one of the two is constant.

    Attributes:
      pearson: Pearson correlation of the values.
      kendall: Kendall's τ_b of the order: 1 if all pairs are in the right order, −1 if none is.
      weighted_kendall: Vigna's τ with hyperbolic weights, in which the order of the best models counts most.
    """

    pearson: float
    kendall: float
    weighted_kendall: float


class Row(NamedTuple):
    """A row of a `Ranking`: a model's name, its scores, and its accuracy after fine-tuning, if known."""

    name: str
    scores: dict[str, float]
    accuracy: float | None


@dataclass(frozen=True)
class Ranking:
    """Source models in order, the most promising first; `str(ranking)` is a table.

    Attributes:
      rows: rows of the models, in order.
      score: name of the score that determines the order.
      correlations: correlations of each score with the accuracies; empty if no accuracies were passed.
    """

    rows: tuple[Row, ...]
    score: Score
    correlations: dict[str, Correlation] = field(default_factory=dict)

    def __str__(self) -> str:
        columns = [score for score in SCORES if any(score in row.scores for row in self.rows)]
        columns.sort(key=lambda score: score != self.score)

        def line(name: str, numbers: Mapping[str, float], accuracy: float | None = None) -> list[str]:
            cells = [f"{numbers[score]:.4f}" if score in numbers else "-" for score in columns]
            return [name, *cells, "" if accuracy is None else f"{accuracy:.4f}"]

        lines = [["source", *columns, "accuracy" if self.correlations else ""]]
        lines += [line(*row) for row in self.rows]
        for measure in Correlation._fields if self.correlations else ():
            numbers = {score: getattr(each, measure) for score, each in self.correlations.items()}
            lines.append(line(measure.replace("_", " "), numbers))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip()
            for name, *cells in lines
        )


def rank_sources(
    models: Mapping[str, Candidate | Callable[[Any], Candidate]],
    target: tuple[Any, Int[Array | np.ndarray, " n"]],
    *,
    score: Score = "log_me",
    shrinkage: Shrinkage = None,
    accuracies: Mapping[str, float] | None = None,
) -> Ranking:
    r"""Rank source models by how well they are expected to transfer to a target task, without training.

    Scores are comparable between models on one target set only. NCE and LEEP use the model's head and so
    favour models whose classes resemble the target's; H-score and LogME use its body, which fine-tuning
    starts from.

    Args:
      models: the `Candidate` of each model by name, or a function of x that computes it.
      target: (x, y), the target examples and their classes; x is passed to the functions in `models`, and
        may be None if there are none.
      score: name of the score that determines the order: "log_me", "h_score", "leep" or "nce".
      shrinkage: shrinkage of `h_score`.
      accuracies: accuracy of each model after fine-tuning, by name, for the correlations with the scores;
        None if unknown.

    Returns:
      A `Ranking`; `str(ranking)` is a table.

    Raises:
      ValueError: if there are no models, `score` is unknown, a model lacks the `source_probs` that the score
        requires, or the names of `accuracies` differ from those of `models`; and as in the scores.

    Examples:
      >>> import numpy as np
      >>> y = np.array([0, 0, 0, 1, 1, 1])
      >>> good = np.array([[0.9], [1.0], [1.1], [-0.9], [-1.0], [-1.1]])
      >>> bad = np.array([[1.0], [-1.0], [0.5], [1.0], [-1.0], [0.0]])
      >>> print(rank_sources({"bad": Candidate(bad), "good": Candidate(good)}, (None, y)))
      source   log_me  h_score
      good    -0.9533   0.9934
      bad     -1.0724   0.0099

    References:
      Vigna, A Weighted Correlation Index for Rankings with Ties, 2015.
    """
    x, y = target
    if not models:
        raise ArgumentError("models", "got none; there must be at least one")
    check_word("score", score, SCORES)
    if accuracies is not None and set(accuracies) != set(models):
        raise ArgumentError(
            "accuracies", f"got {sorted(accuracies)}; the names must be those of models, {sorted(models)}"
        )
    rows = []
    for name, model in models.items():
        try:
            scores = _scores(model if isinstance(model, Candidate) else model(x), y, shrinkage)
        except ValueError as error:
            raise ValueError(f"models[{name!r}]: {error}") from error
        if score not in scores:
            raise ValueError(f"models[{name!r}]: got source_probs=None, which {score} requires")
        rows.append(Row(name, scores, None if accuracies is None else float(accuracies[name])))
    rows.sort(key=lambda row: -row.scores[score])
    correlations: dict[str, Correlation] = {}
    for each in SCORES if accuracies is not None else ():
        pairs = [(row.scores[each], row.accuracy) for row in rows if each in row.scores]
        if len(pairs) > 1:
            correlations[each] = _correlation(*np.asarray(pairs, np.float64).T)
    return Ranking(tuple(rows), score, correlations)


def _scores(candidate: Candidate, y: Int[Array | np.ndarray, " n"], shrinkage: Shrinkage) -> dict[str, float]:
    features, probs = candidate.features, candidate.source_probs
    scores = {"log_me": log_me(features, y), "h_score": h_score(features, y, shrinkage=shrinkage)}
    if probs is not None:
        scores |= {"leep": leep(probs, y), "nce": nce(np.asarray(probs).argmax(-1), y)}
    return scores


def _correlation(scores: np.ndarray, accuracies: np.ndarray) -> Correlation:
    deviations = [values - values.mean() for values in (scores, accuracies)]
    signs = [np.sign(values[:, None] - values[None]) for values in (scores, accuracies)]
    # Vigna's weights depend on ranks. As in SciPy, average two rankings, each with ties broken by the other.
    ranks = [_ranks(scores, accuracies), _ranks(accuracies, scores)]
    weights = [1 / (1 + rank[:, None]) + 1 / (1 + rank[None]) for rank in ranks]
    weighted = [_cosine(signs[0], signs[1], each) for each in weights]
    return Correlation(_cosine(*deviations), _cosine(*signs), float(np.mean(weighted)))


def _ranks(values: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """Return the rank of each value, 0 for the largest; equal values are ordered by `ties`."""
    ranks = np.empty(len(values))
    ranks[np.lexsort((ties, values))[::-1]] = np.arange(len(values))
    return ranks


def _cosine(first: np.ndarray, second: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    norms = (weights * first**2).sum() * (weights * second**2).sum()
    return float((weights * first * second).sum() / np.sqrt(norms)) if norms > 0 else float("nan")
