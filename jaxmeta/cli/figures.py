"""Figures as PNG files: learning curves of runs, and confusion matrices."""

import contextlib
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxmeta.cli.report import format_interval
from jaxmeta.files import replacing

METRIC_NAMES = {"accuracy": "query accuracy, %", "mse": "query mean squared error"}
_SCALE = {"accuracy": 100}
COMPARED = {
    "cosine": "cosine: true, first-order",
    "norm_ratio": "‖true‖ / ‖first-order‖",
}
# Largest numbers of classes for which a confusion matrix shows counts, and class names.
_NUMBERED, _NAMED = 20, 30
_LONGEST_NAME = 24
_X = {"steps": ("step", "meta-step"), "seconds": ("elapsed_s", "seconds, compiling included")}


class Curve(NamedTuple):
    """Learning curve of a run.

    Attributes:
      name: name in the legend.
      rows: rows of the run's `metrics.jsonl`.
      metric: "accuracy" or "mse".
      test: mean and ci95 of that metric on test tasks; None before the run has ended.
    """

    name: str
    rows: Sequence[dict[str, Any]]
    metric: str
    test: dict[str, Any] | None = None


def plot_curve(path: Path, rows: Sequence[dict[str, Any]], metric: str, title: str) -> None:
    """Draw training loss, training metric and validation metric against meta-steps, as a PNG."""
    plot_curves(path, [Curve(title, rows, metric)])


def plot_curves(path: Path, curves: Sequence[Curve], x: str = "steps") -> None:
    """Draw the training loss and the metric of runs as a PNG; see `draw_metric`.

    Runs trained with --diagnose add the cosine and the ratio of norms of meta-gradients.

    Args:
      path: path of the PNG file.
      curves: runs, all with the same metric.
      x: horizontal axis, "steps" or "seconds".
    """
    single = len(curves) == 1
    compared = [name for name in COMPARED if any(name in row for curve in curves for row in curve.rows)]
    with drawing(path, 5.0 * (2 + len(compared)), 4 + 0.25 * -(-len(curves) // 2)) as figure:
        left, right, *more = figure.subplots(1, 2 + len(compared))
        for i, curve in enumerate(curves):
            _draw_training(left, curve, "loss", x, line_style(i), _with_test(curve))
        _finish_axes(left, curves[0].metric, _X[x][1], "query loss")
        draw_metric(right, curves, x)
        for axes, name in zip(more, compared, strict=True):
            for i, curve in enumerate(curves):
                _draw_training(axes, curve, name, x, line_style(i), _with_test(curve))
            _finish_axes(axes, name, _X[x][1], COMPARED[name])
        handles, labels = (right if single else left).get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3 if single else 2)
        if single:
            figure.suptitle(literal(curves[0].name))


def draw_metric(axes: Any, curves: Sequence[Curve], x: str = "steps") -> None:
    """Draw the metric on validation tasks and, as a diamond, on test tasks, with 95 % intervals.

    The metric on training tasks is added for a single run, and for runs with fewer than two validations.
    """
    single, drawn = len(curves) == 1, set()
    test = "transductive test" if curves[0].metric == "accuracy" else "test"
    bars: dict[str, Any] = {"markersize": 4, "capsize": 3}
    for i, curve in enumerate(curves):
        scale, name = _SCALE.get(curve.metric, 1), f"validation_{curve.metric}"
        validated = [row for row in curve.rows if name in row]
        if single or len(validated) < 2:
            _draw_training(axes, curve, curve.metric, x, line_style(i), "training")
            drawn.add("plain line: training")
        if validated:
            at = [row[_X[x][0]] for row in validated]
            means = [scale * row[name] for row in validated]
            ci95 = [scale * row[f"{name}_ci95"] for row in validated]
            style = line_style(i + single)
            axes.errorbar(at, means, ci95, **style, **bars, marker="o", label="validation, 95 % CI")
            drawn.add("●: validation")
        if curve.test is not None:
            # Diamonds lie beyond the end of the curves, each at another x so that they do not overlap.
            beyond = max((row[_X[x][0]] for row in curve.rows), default=0) * (
                1.03 + i * min(0.03, 0.15 / len(curves))
            )
            mean, half = scale * curve.test["mean"], scale * curve.test["ci95"]
            style = {**line_style(i + 2 * single), "linestyle": ""}
            axes.errorbar([beyond], [mean], [half], **style, **bars, marker="D", label=f"{test}, 95 % CI")
            drawn.add(f"◆: {test} (beyond the last step)")
    _finish_axes(
        axes, curves[0].metric, _X[x][1], METRIC_NAMES.get(curves[0].metric, f"query {curves[0].metric}")
    )
    if not single:
        key = [*sorted(drawn, reverse=True), "bars: 95 % CI"]
        rows = [key[:-2], key[-2:]] if len(key) > 2 else [key]
        axes.set_title("\n".join("   ".join(row) for row in rows), fontsize="small")


def _draw_training(axes: Any, curve: Curve, name: str, x: str, style: dict[str, Any], label: str) -> None:
    """Draw a training metric faintly, and its running mean over a twentieth of the run."""
    rows = [row for row in curve.rows if name in row]
    if not rows:
        return
    values = [_SCALE.get(name, 1) * row[name] for row in rows]
    at = [row[_X[x][0]] for row in rows]
    window = max(1, len(values) // 20)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]
    axes.plot(at, values, **style, alpha=0.25, linewidth=1)
    axes.plot(at, means, **style, label=label)


def _with_test(curve: Curve) -> str:
    name, unit = literal(curve.name), " %" if curve.metric == "accuracy" else ""
    return name if curve.test is None else f"{name}: test {format_interval(curve.test, curve.metric)}{unit}"


def plot_confusion(
    path: Path, matrix: Int[np.ndarray, "classes classes"], names: Sequence[str], title: str
) -> None:
    """Draw a confusion matrix as a PNG.

    The colour of a cell is its share of the row. Up to 20 classes, cells show their number of examples; up to
    30 classes, the axes show class names, and otherwise class indices.

    Args:
      path: path of the PNG file.
      matrix: number of examples of class i (row) that were predicted as class j (column).
      names: names of the classes.
      title: title of the figure.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, PowerNorm

    count = len(names)
    side = min(10.0, 3.2 + 0.34 * count)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    with drawing(path, side + 1.0, side + 0.4) as figure:
        figure.set_layout_engine("compressed")
        axes = figure.subplots()
        # The palette starts at a visible blue, so that a single error shows among 200 classes.
        blues = ListedColormap(colormaps["Blues"](np.linspace(0.2, 1, 256)))
        image = axes.imshow(
            np.ma.masked_equal(share, 0), cmap=blues, norm=PowerNorm(0.5, 0, 1), interpolation="nearest"
        )
        bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02, label="share of the class, %")
        bar.set_ticks([0, 0.05, 0.2, 0.5, 1], labels=["0", "5", "20", "50", "100"])
        if count <= _NUMBERED:
            for (row, column), examples in np.ndenumerate(matrix):
                if examples:
                    color = "white" if share[row, column] > 0.4 else "black"
                    axes.text(
                        column, row, f"{examples}", ha="center", va="center", fontsize="small", color=color
                    )
        if count <= _NAMED:
            shown_names = [_shortened(literal(name)) for name in names]
            upright = max(map(len, shown_names)) > 3
            axes.set_xticks(range(count), shown_names, rotation=90 if upright else 0)
            axes.set_yticks(range(count), shown_names)
            axes.tick_params(labelsize="small", length=0)
        axes.set(xlabel="predicted class", ylabel="class")
        figure.suptitle(literal(title), fontsize="medium", wrap=True)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def line_style(i: int) -> dict[str, Any]:
    """Return colour and line style of run i, from Okabe and Ito's palette for colour-blind readers."""
    colors = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
    return {"color": colors[i % len(colors)], "linestyle": ("-", "--", "-.", ":")[i // len(colors) % 4]}


@contextlib.contextmanager
def drawing(path: Path, width: float, height: float) -> Iterator[Any]:
    """Yield a figure of `width` × `height` inches, and write it to `path` as a PNG on exit, atomically.

    Text is drawn literally: a dollar sign or a backslash in a user's name does not start a formula.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with replacing(path) as unfinished:
            figure.savefig(unfinished, dpi=120, format="png")


def literal(name: str) -> str:
    """Return a user's name for a figure: in one line, without control characters.

    A leading underscore gets a zero-width space before it, since legends leave out names that begin with one.
    """
    drawn = (unicodedata.category(each) not in ("Cc", "Cs") for each in name)
    text = "".join(each if has_glyph else "\ufffd" for each, has_glyph in zip(name, drawn, strict=True))
    return f"\u200b{text}" if text.startswith("_") else text


def _finish_axes(axes: Any, metric: str, xlabel: str, ylabel: str) -> None:
    """Set labels, grid and, for squared errors, a logarithmic scale, after everything is drawn."""
    from matplotlib.ticker import LogLocator

    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    if metric == "mse":
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_locator(LogLocator(subs=range(2, 10) if high < 5 * low else (2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="minor")
