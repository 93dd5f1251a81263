"""Report of a comparison of learners: a Markdown table and a figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmeta.cli import schema
from jaxmeta.cli.figures import METRIC_NAMES, Curve, draw_metric, drawing, line_style, literal
from jaxmeta.cli.report import chance_level, command_lines, format_interval, plural
from jaxmeta.training.metrics import METRICS, read_metrics


def results_of(row: Mapping[str, Any], metric: str) -> dict[str, dict[str, Any]]:
    """Return the results of a learner by their names in episodes.json."""
    return row[metric] if metric == "accuracy" else {metric: row[metric]}


def comparison_markdown(result: Mapping[str, Any]) -> str:
    """Return a comparison as Markdown with aligned columns."""
    metric, first, card = result["metric"], result["compared_to"], result["card"]
    accuracy = metric == "accuracy"
    networks = _networks({learner: row["network"] for learner, row in result["learners"].items()})
    head = [
        "learner",
        *(["network"] if networks else []),
        *(["test", "accuracy, %"] if accuracy else ["mse"]),
    ]
    head += [f"minus {first}", "training, s", "steps/s", "memory, MB"]
    table = []
    for learner, row in result["learners"].items():
        for name, test in results_of(row, metric).items():
            difference = row["difference"].get(name)
            table.append(
                [
                    learner,
                    *([networks[learner]] if networks else []),
                    *([name] if accuracy else []),
                    format_interval(test, metric),
                    "" if difference is None else format_interval(difference, metric, "+"),
                    f"{row['training_s']:,.1f}",
                    "" if row["steps_per_second"] is None else f"{row['steps_per_second']:,.1f}",
                    "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e6:,.0f}",
                ]
            )
    ways = "" if card["ways"] is None else f"{card['ways']}-way "
    measured = {row["peak_memory"] for row in result["learners"].values()}
    lines = [
        f"# {', '.join(result['learners'])} on {card['tasks']}",
        "",
        *_table(head, table, 1 + accuracy + bool(networks)),
        "",
        f"{ways}{card['shots']}-shot, {plural(card['queries'], 'query')}; "
        f"{plural(result['episodes'], 'test task')}; "
        f"{plural(result['steps'], 'meta-step')} of {plural(result['meta_batch'], 'task')}; "
        f"seed {result['seed']}; preset {result['preset'] or 'none'}.",
        *([f"{guessing}."] if (guessing := chance_level(result)) else []),
        f"± is the half-width of a 95 % confidence interval over test tasks; minus {first} is the difference "
        f"within each test task{', in percentage points' if accuracy else ''}.",
        "Training includes compiling and validation; memory is the peak of the "
        f"{' or '.join(sorted(measured))}, evaluation included.",
    ]
    for learner, row in result["learners"].items():
        if row["left_out"]:
            lines.append(f"{learner} does not have these settings: {', '.join(row['left_out'])}.")
    lines += [*command_lines(result["command"]), "", "![curves, results, differences](comparison.png)"]
    return "\n".join(lines) + "\n"


def _networks(networks: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return each learner's network by name and distinctive settings; empty where all have the same."""
    if all(network == next(iter(networks.values())) for network in networks.values()):
        return {}

    def described(network: Mapping[str, Any]) -> str:
        alike = [other for other in networks.values() if other["name"] == network["name"]]
        differing = [name for name in network if any(other[name] != network[name] for other in alike)]
        settings = (f"{name} {schema.shown_value(network[name])}" for name in differing)
        return ", ".join([network["name"], *settings])

    return {learner: described(network) for learner, network in networks.items()}


def _table(head: list[str], rows: list[list[str]], texts: int) -> list[str]:
    """Return the lines of a Markdown table with aligned columns: `texts` of text, then numbers."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return f"| {' | '.join(c.ljust(w) if i < texts else c.rjust(w) for i, (c, w) in pairs)} |"

    rule = [("-" * width if i < texts else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
    return [line(head), line(rule), *map(line, rows)]


def draw_comparison(path: Path, out: Path, result: Mapping[str, Any]) -> None:
    """Draw the metric over the meta-steps, the metric on test tasks, and the differences."""
    from matplotlib.lines import Line2D

    metric, rows = result["metric"], result["learners"]
    scale = 100 if metric == "accuracy" else 1
    with drawing(path, 13.0, 3.4 + 0.35 * len(rows)) as figure:
        curves, tests, differences = figure.subplots(1, 3, width_ratios=(4, 3, 3))
        draw_metric(
            curves,
            [Curve(name, read_metrics(out / rows[name]["run"] / METRICS), metric) for name in rows],
        )
        for i, row in enumerate(rows.values()):
            tested = results_of(row, metric)
            for j, (name, test) in enumerate(tested.items()):
                y = i + 0.3 * (j - (len(tested) - 1) / 2)
                filled = {"markerfacecolor": "white"} if name == "inductive" else {}
                bar = {"color": line_style(i)["color"], "marker": "D", "capsize": 3, **filled}
                tests.errorbar(scale * test["mean"], y, xerr=scale * test["ci95"], **bar)
                if name in row["difference"]:
                    mean, ci95 = (scale * row["difference"][name][key] for key in ("mean", "ci95"))
                    differences.errorbar(mean, y, xerr=ci95, **bar)
        differences.axvline(0, color="0.4", linewidth=1)
        tests.set(xlabel=f"test {METRIC_NAMES[metric]}")
        if metric == "accuracy":
            tests.set_title("◆: transductive   ◇: inductive", fontsize="medium")
        unit = " (percentage points)" if metric == "accuracy" else ""
        differences.set(xlabel=f"minus {literal(result['compared_to'])}{unit}")
        differences.set_title("within each test task, 95 % CI", fontsize="medium")
        for axes in (tests, differences):
            axes.set_yticks(range(len(rows)), [literal(name) for name in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.locator_params(axis="x", nbins=5)
            axes.grid(alpha=0.3, axis="x")
        lines = [Line2D([], [], **line_style(i), label=literal(name)) for i, name in enumerate(rows)]
        figure.legend(handles=lines, loc="outside lower center", ncols=min(6, len(rows)))
        figure.suptitle(f"{literal(result['card']['tasks'])}, {plural(result['steps'], 'meta-step')}")
