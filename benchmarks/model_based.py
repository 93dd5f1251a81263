"""Benchmark of memory networks: accuracy by presentation of a class, as in Santoro et al. 2016.

    python benchmarks/model_based.py [--networks lrua lstm ntm] [--steps N] [--data DIR] [--out DIR]
        [--seed S] [--json FILE] [--png FILE]

Each network is trained by `jaxmeta train mann --preset mann-omniglot --network …` in a separate process:
Omniglot, sequences of 50 images of 5 classes, labels one step late, with the same number of meta-steps for
all. All networks are tested on the same 1,000 sequences of new classes. Complete runs in --out are used as
they are, and interrupted runs are resumed.
"""

import argparse
import json
from pathlib import Path

import jax
import matplotlib.pyplot as plt
from machine import cores, describe_machine
from reproduce import train

import jaxmeta as jm
from jaxmeta.cli.presets import PRESETS
from jaxmeta.declare import facts_of

NAMES = {
    "lrua": "LSTM, memory by least recent use",
    "ntm": "LSTM, memory of the Neural Turing Machine",
    "lstm": "LSTM alone",
    "lrua-feed-forward": "feed-forward, memory by least recent use",
    "feed-forward": "feed-forward alone",
}
# Accuracy by presentation in Santoro et al. 2016, after 100,000 episodes of 16 sequences.
PUBLISHED = {
    "lrua": {1: 0.364, 2: 0.828, 3: 0.910, 4: 0.926, 5: 0.949, 10: 0.981},
    "lstm": {1: 0.244, 2: 0.495, 3: 0.553, 4: 0.610, 5: 0.636, 10: 0.625},
}
COLORS = dict(zip(NAMES, ("#0072B2", "#D55E00", "0.4", "#009E73", "#CC79A7"), strict=True))


def educated_guess(ways: int) -> float:
    """Return the best expected accuracy on first presentations: the guess of a label not yet seen."""
    return sum(1 / j for j in range(1, ways + 1)) / ways


def draw(rows: dict, path: Path) -> None:
    fig, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for network, row in rows.items():
        x, y = zip(*((int(i), 100 * value) for i, value in row["accuracy_by_instance"].items()), strict=True)
        axes.plot(x, y, "o-", color=COLORS[network], linewidth=2, label=NAMES[network])
        if network in PUBLISHED:
            x, y = zip(*((i, 100 * value) for i, value in PUBLISHED[network].items()), strict=True)
            axes.plot(x, y, "x", color=COLORS[network], markersize=8, label="published")
    axes.axhline(100 * educated_guess(5), color="0.7", linestyle=":", label="best guess, 1st presentation")
    axes.set(
        xlabel="presentation of the class",
        ylabel="accuracy, %",
        xticks=range(1, 11),
        ylim=(0, 102),
        title="Omniglot, 5 new classes, labels one step late",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    fig.savefig(path, dpi=150)


def table(rows: dict) -> str:
    """Return a table of accuracy by presentation, in percent, with published rows below each network's."""
    presentations = [1, 2, 3, 4, 5, 10]
    heads = ["1st", "2nd", "3rd", "4th", "5th", "10th"]
    lines = [f"| network | {' | '.join(heads)} | minutes |", "| --- |" + " --- |" * (len(presentations) + 1)]
    for network, row in rows.items():
        cells = [f"{100 * row['accuracy_by_instance'][str(i)]:.1f}" for i in presentations]
        lines.append(f"| {NAMES[network]} | {' | '.join(cells)} | {row['training_s'] / 60:.0f} |")
        if network in PUBLISHED:
            cells = [f"{100 * PUBLISHED[network][i]:.1f}" for i in presentations]
            lines.append(f"| the same, published | {' | '.join(cells)} | |")
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    known = facts_of(jm.mann).networks
    add("--networks", nargs="+", choices=known, default=["lrua", "ntm", "lstm"])
    add("--steps", type=int, default=PRESETS["mann-omniglot"]["steps"], help="meta-steps of each network")
    add("--data", type=Path, help="folder with Omniglot's archives (default: downloaded to the cache)")
    add("--out", type=Path, default=Path("runs/model-based"), help="folder for the runs")
    add("--seed", type=int, default=0)
    add(
        "--json",
        type=Path,
        help="also write the results to this file, next to other networks' results",
    )
    add("--png", type=Path, help="also draw the results into this file")
    args = parser.parse_args(argv)
    previous = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else {}
    rows = {name: row for name, row in previous.items() if name not in args.networks}
    for network in args.networks:
        settings = ["mann", "--preset", "mann-omniglot", "--network", network, "--steps", str(args.steps)]
        report = json.loads((train(network, settings, args) / "report.json").read_text())
        kept = ("accuracy", "accuracy_by_instance", "training_s", "steps", "best_step", "parameters")
        rows[network] = {name: report[name] for name in (*kept, "device", "devices")}
    jax.config.update("jax_num_cpu_devices", cores())
    machine = describe_machine(jax.local_devices())
    for network in args.networks:
        rows[network] |= {"machine": machine, "seed": args.seed, "jaxmeta": jm.__version__}
    rows = {name: rows[name] for name in NAMES if name in rows}
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if args.png:
        draw(rows, args.png)


if __name__ == "__main__":
    main()
