"""Reports of `jaxmeta transfer` and `jaxmeta rank`, as Markdown and JSON."""

import math
from collections.abc import Mapping
from typing import Any

from jaxmeta.cli.report import cell, command_lines, plural
from jaxmeta.transfer.ranking import SCORES, Ranking
from jaxmeta.transfer.subtree import Report

# Number of classes in the table of lowest recalls.
_WORST = 5
# Quantile of the standard normal distribution for 95 %.
_Z = 1.959964


def wilson(right: int, n: int) -> dict[str, float]:
    """Return the share of `right` in `n` independent examples, and Wilson's 95 % interval around it.

    The interval (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n) stays in [0, 1], and has a width where p is
    0 or 1, unlike the normal approximation.

    Args:
      right: number of correct examples.
      n: number of examples.

    Returns:
      "mean", "low" and "high", and "ci95", half of the interval's width.

    Examples:
      >>> {name: round(value, 4) for name, value in wilson(10, 10).items()}
      {'mean': 1.0, 'low': 0.7225, 'high': 1.0, 'ci95': 0.1388}

    References:
      Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    p, unit = right / n, _Z**2 / n
    centre = p + unit / 2
    half = _Z * math.sqrt(p * (1 - p) / n + unit / (4 * n))
    low, high = (centre - half) / (1 + unit), (centre + half) / (1 + unit)
    return {"mean": p, "low": low, "high": high, "ci95": (high - low) / 2}


def settings_in_words(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of a transfer, in words."""
    images, about, parameters = report["images"], report["about"], report["parameters"]
    patterns = report.get("train")
    rows = {
        "source": about["source"],
        "target": f"{report['target']}, {plural(report['classes'], 'class')}; {about['target']}",
        "learned from": f"{report['shots']}, {plural(report['learned_from'], 'image')}",
        "scored": plural(report["scored"], "other image"),
        "read": report["read"],
        "images": f"{images['size']} × {images['size']}, {'grey' if images['channels'] == 1 else 'colour'}, "
        + report["pixels"]
        + (
            "; dark on light, but the source's are light on dark: all are inverted"
            if report["inverted"]
            else ""
        ),
        "batch statistics": f"{report['statistics']}; kept"
        if report["statistics"] and report.get("keep_statistics")
        else report["statistics"],
        "recipe": f"{report['recipe']}: {about['recipe']}"
        + (f"; of the backbone only {', '.join(patterns)}" if patterns else ""),
        "parameters": f"{parameters['trained']:,} trained, {parameters['frozen']:,} frozen",
        "steps": None
        if report["steps"] is None
        else f"{report['steps']:,} of {plural(report['batch'], 'image')}, Adam, "
        f"largest rate {report['rate']:g}",
        "L2-SP": None
        if report.get("l2_sp") is None
        else f"α = {report['l2_sp']:g}, and 0.01 towards zero for the head",
        "seed": report["seed"],
    }
    return {name: str(text) for name, text in rows.items() if text is not None}


def in_percent(row: Mapping[str, float]) -> str:
    """Return an accuracy and its interval as text."""
    return f"{100 * row['mean']:.2f} %  (95 % CI {100 * row['low']:.2f} to {100 * row['high']:.2f})"


def leaves_by_group(leaves: Report) -> dict[str, tuple[Any, ...]]:
    """Return the rows of a report on leaves by group: "taken", "new", "left_over" and "dropped"."""
    return {group: getattr(leaves, group) for group in ("taken", "new", "left_over", "dropped")}


def transfer_markdown(report: Mapping[str, Any], leaves: Report) -> str:
    """Return the content of report.md: the results of report.json, and the table of leaves."""
    lines = [
        f"# {report['target']} from {report['source']}, {report['recipe']}",
        "",
        "| accuracy | 95 % CI | |",
        "| --- | --- | --- |",
    ]
    labels = {
        "accuracy": report["recipe"],
        "probe_accuracy": "for comparison: a linear probe, the backbone's weights unchanged",
    }
    for name, label in labels.items():
        if name in report:
            mean, low, high = (f"{100 * report[name][part]:.2f}" for part in ("mean", "low", "high"))
            lines.append(f"| **{mean} %** | {low} to {high} | {label} |")
    lines += [
        "",
        f"Accuracy on {plural(report['scored'], 'held-out image')}. Wilson's interval is over these images, "
        "not over other draws of the images to learn from. "
        f"Guessing: {100 / report['classes']:.2f} %, one of {plural(report['classes'], 'class')}.",
        "",
        "![confusion of the classes](confusion.png)",
        "",
        "| | |",
        "| --- | --- |",
    ]
    table = settings_in_words(report) | {"time": f"{report['wall_s']:.1f} s", "device": report["device"]}
    table["versions"] = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines += [f"| {name} | {cell(text)} |" for name, text in table.items()]
    lines += command_lines(report["command"])
    worst = sorted(report["recalls"].items(), key=lambda pair: pair[1])[:_WORST]
    lines += [
        "",
        "The classes with the lowest recall:",
        "",
        "| class | recall |",
        "| --- | --- |",
    ]
    lines += [f"| {cell(name)} | {100 * recall:.1f} % |" for name, recall in worst]
    lines += ["", "Leaves of the source, and new ones that the source does not have:", ""]
    return "\n".join(lines) + "\n" + leaves.markdown() + "\n"


def ranking_as_json(ranking: Ranking, target: str, shots: str, shrinkage: str | None) -> dict[str, Any]:
    """Return the content of the file of `rank --json`; scores that are not finite are null."""

    def finite(values: Mapping[str, float]) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    return {
        "target": target,
        "shots": shots,
        "score": ranking.score,
        "shrinkage": shrinkage,
        "sources": [
            {
                "source": row.name,
                **{score: finite(row.scores).get(score) for score in SCORES},
                "accuracy": row.accuracy,
            }
            for row in ranking.rows
        ],
        "correlations": {
            score: finite(correlation._asdict()) for score, correlation in ranking.correlations.items()
        },
    }
