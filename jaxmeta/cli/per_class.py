"""Accuracy and confusions of each class of an evaluation, as a table, as JSON and as a figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmeta.checks import ArgumentError
from jaxmeta.cli import folders
from jaxmeta.cli.figures import plot_confusion
from jaxmeta.cli.parser import print_table
from jaxmeta.core import TaskDistribution, TaskStream, card_of
from jaxmeta.tasks.class_names import have_names, unnamed_error
from jaxmeta.training import ClassEvaluation
from jaxmeta.training.evaluate import metric_name

# Largest numbers of printed rows of classes and of confusions.
_CLASSES, _CONFUSIONS = 30, 10


def check_named(tasks: TaskDistribution | TaskStream, flag: str) -> None:
    """Check that the classes of tasks have names.

    Args:
      tasks: test tasks.
      flag: argument that requests results by class, for errors.

    Raises:
      ArgumentError: the tasks are regression tasks, or their classes have no names.
    """
    if metric_name(tasks) != "accuracy":
        raise ArgumentError(
            flag, f"{card_of(tasks).tasks} tasks are regression, which has no classes; leave it out"
        )
    if not have_names(tasks):
        raise ArgumentError(flag, unnamed_error(tasks).problem)


def as_json(results: Mapping[str, ClassEvaluation]) -> dict[str, list[dict[str, Any]]]:
    """Return accuracy, queries and confusions of each class, by row of the report."""
    return {row: _classes(each) for row, each in results.items()}


def _classes(result: ClassEvaluation) -> list[dict[str, Any]]:
    taken: dict[str, dict[str, int]] = {name: {} for name in result.classes}
    for name, other, queries in result.mistakes():
        taken[name][other] = queries
    return [
        {
            "class": name,
            "accuracy": None if queries == 0 else float(accuracy),
            "queries": int(queries),
            "taken_for": taken[name],
        }
        for name, accuracy, queries in zip(result.classes, result.accuracy, result.queries, strict=True)
    ]


def print_classes(results: Mapping[str, ClassEvaluation]) -> None:
    """Print the accuracy of each class, the lowest first, and the most frequent confusions.

    Both follow the last row of the report, the inductive one where there is one.
    """
    last_row, last = list(results.items())[-1]
    order = [index for index in np.argsort(last.accuracy, kind="stable") if last.queries[index]]
    rows = [("class", "queries", *results)]
    for index in order[:_CLASSES]:
        accuracies = (f"{100 * each.accuracy[index]:.1f} %" for each in results.values())
        rows.append((last.classes[index], str(last.queries[index]), *accuracies))
    print()
    print_table(rows)
    if len(order) > _CLASSES:
        print(f"the {_CLASSES} lowest of {len(order)} classes; --json FILE has all of them")
    mistakes = last.mistakes(_CONFUSIONS)
    if not mistakes:
        return
    of_class = dict(zip(last.classes, last.queries.tolist(), strict=True))
    print(f"\nmost frequent confusions, {last_row}")
    print_table(
        [
            ("class", "taken for", "queries", "of its queries"),
            *(
                (name, other, str(queries), f"{100 * queries / of_class[name]:.1f} %")
                for name, other, queries in mistakes
            ),
        ]
    )


def draw_classes(path: Path, results: Mapping[str, ClassEvaluation], title: str) -> None:
    """Draw the confusions of the last row of a report as a PNG; a failure is a warning."""
    row, last = list(results.items())[-1]
    with folders.tolerated(path) as picture:
        plot_confusion(picture, last.confusion, last.classes, f"{title}, {row}")
