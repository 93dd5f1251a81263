"""Which classes an evaluation names rightly, and which it confuses: as a table, in JSON and as a figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmeta.checks import ArgumentError
from jaxmeta.cli import folders
from jaxmeta.cli.figures import plot_confusion
from jaxmeta.cli.parser import print_table
from jaxmeta.core import TaskDistribution, TaskStream, card_of
from jaxmeta.tasks.class_names import have_names, unnamed
from jaxmeta.training import ClassEvaluation
from jaxmeta.training.evaluate import metric_name

# Rows that are printed: of classes, and of confusions.
_CLASSES, _CONFUSIONS = 30, 10


def check_named(tasks: TaskDistribution | TaskStream, flag: str) -> None:
    """Refuse tasks whose classes cannot be told apart by name.

    Args:
      tasks: the test tasks.
      flag: the argument that asks for classes.

    Raises:
      ArgumentError: they are of regression, or have no names.
    """
    if metric_name(tasks) != "accuracy":
        raise ArgumentError(flag, f"{card_of(tasks).tasks} tasks are of regression, which has no classes")
    if not have_names(tasks):
        raise ArgumentError(flag, unnamed(tasks).problem)


def as_json(found: Mapping[str, ClassEvaluation]) -> dict[str, list[dict[str, Any]]]:
    """Return for each row of a report its classes, with accuracy, queries and what they are taken for."""
    return {row: _classes(each) for row, each in found.items()}


def _classes(found: ClassEvaluation) -> list[dict[str, Any]]:
    taken: dict[str, dict[str, int]] = {name: {} for name in found.classes}
    for name, other, queries in found.mistakes():
        taken[name][other] = queries
    return [
        {
            "class": name,
            "accuracy": None if queries == 0 else float(accuracy),
            "queries": int(queries),
            "taken_for": taken[name],
        }
        for name, accuracy, queries in zip(found.classes, found.accuracy, found.queries, strict=True)
    ]


def print_classes(found: Mapping[str, ClassEvaluation]) -> None:
    """Print the accuracy of each class, the lowest first, and the most frequent confusions.

    Both are in the order of the last row of the report, the inductive one.
    """
    last_row, last = list(found.items())[-1]
    order = [place for place in np.argsort(last.accuracy, kind="stable") if last.queries[place]]
    rows = [("class", "queries", *found)]
    for place in order[:_CLASSES]:
        shares = (f"{100 * each.accuracy[place]:.1f} %" for each in found.values())
        rows.append((last.classes[place], str(last.queries[place]), *shares))
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


def draw_classes(path: Path, found: Mapping[str, ClassEvaluation], title: str) -> None:
    """Draw the confusions of the last row of a report as a PNG; a failure is a warning."""
    row, last = list(found.items())[-1]
    with folders.tolerated(path) as picture:
        plot_confusion(picture, last.confusion, last.classes, f"{title}, {row}")
