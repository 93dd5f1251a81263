"""Train every method by its preset and compare its accuracy with the published one.

    python benchmarks/reproduce.py [--rows maml anil …] [--data DIR] [--out DIR] [--seed S] [--json FILE]

Each row is `jaxmeta train --preset …` in a separate process: Omniglot, 5-way 1-shot, class split `vinyals`,
1,000 test tasks. All rows share a seed and so the test tasks: "minus maml" is the mean of the paired
differences between tasks, with its 95 % confidence interval. Complete runs in --out are used as they are, and
interrupted runs are resumed.

The control for the LSTM meta-learner is "fine-tuning": as many steps of plain SGD on the same tasks, from the
random initialisation of the meta-learner's own training, with the best of 9 learning rates on validation
tasks.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from machine import cores, describe_machine

import jaxmeta as jm
from jaxmeta.cli import build, sources
from jaxmeta.cli.config import load_config
from jaxmeta.cli.run import evaluation_key

# method -> (preset, published 5-way 1-shot accuracy in %, published budget)
ROWS = {
    "maml": ("omniglot", "98.7 ± 0.4 transductive", "60,000 meta-steps of 32 tasks"),
    "fomaml": ("omniglot-fomaml", "98.3 ± 0.5 transductive", "60,000 meta-steps of 32 tasks"),
    "anil": ("omniglot-anil", "none at 5 ways", ""),
    "boil": ("omniglot-boil", "none found", ""),
    "meta_sgd": ("omniglot-meta-sgd", "99.53 ± 0.26 transductive", "60,000 meta-steps"),
    "maml_plus_plus": ("omniglot-maml-plus-plus", "99.47 transductive", "50,000 meta-steps of 8 tasks"),
    "reptile": (
        "omniglot-reptile",
        "97.68 ± 0.04 transductive, 95.39 ± 0.09 inductive",
        "100,000 meta-steps of 5 tasks",
    ),
    "imaml": ("omniglot-imaml", "99.16 ± 0.35 transductive", "20,000 meta-steps of 32 tasks"),
    "lstm_meta_learner": ("omniglot-lstm-meta-learner", "none on Omniglot", ""),
    "prototypical": ("omniglot-prototypical", "98.8 inductive", "60-way training"),
    "matching": ("omniglot-matching", "98.1 inductive", ""),
    "siamese": ("omniglot-siamese", "96.7 inductive", "as re-run by Vinyals et al."),
    "relation": ("omniglot-relation", "99.6 ± 0.2 transductive", ""),
    "kernel_classifier": ("omniglot-kernel-classifier", "none", ""),
    "ridge": ("omniglot-ridge", "none on Omniglot", ""),
    "simple_shot": ("omniglot-simple-shot", "none on Omniglot", ""),
    "fine_tuned_head": ("omniglot-fine-tuned-head", "86.0, as run by Vinyals et al.", ""),
    "metanet": ("omniglot-metanet", "98.95 inductive", "one task per meta-step"),
}
CONTROL_RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def train(name: str, settings: list[str], args) -> Path:
    """Return the folder of the run `name` in `args.out`, after training it if it is missing or incomplete."""
    folder = args.out / name
    if (folder / "report.json").exists():
        return folder
    command = [sys.executable, "-m", "jaxmeta.cli", "train"]
    if (folder / "config.json").exists():
        command += ["--resume"]
    else:
        command += [*settings, "--seed", str(args.seed)]
    data = [] if args.data is None else ["--data", str(args.data)]
    print(f"== {name}", flush=True)
    subprocess.run([*command, *data, "--out", str(folder)], check=True)
    return folder


def row_of(method: str, folder: Path) -> dict:
    report = json.loads((folder / "report.json").read_text())
    config = report["config"]
    learner, training = config["learner"], config["training"]
    return {
        "preset": ROWS[method][0],
        "published": ROWS[method][1],
        "published_budget": ROWS[method][2],
        "accuracy": report["accuracy"],
        **{
            name: report[name]
            for name in ("training_s", "steps", "best_step", "parameters", "device", "devices")
        },
        "meta_batch": training["meta_batch"],
        "train_ways": config["tasks"]["train_ways"],
        "network": config["network"]["name"],
        **{name: learner.get(name) for name in ("inner_lr", "inner_steps", "eval_steps")},
        "outer_lr": training["outer_lr"],
        "seed": config["run"]["seed"],
    }


def add_differences(row: dict, folder: Path, reference: Path) -> None:
    """Add the mean difference to a reference run, paired by test task, to a row of results."""
    own, others = (json.loads((each / "episodes.json").read_text()) for each in (folder, reference))
    cards = [json.loads((each / "report.json").read_text())["card"] for each in (folder, reference)]
    if cards[0] != cards[1]:
        raise ValueError(
            f"{folder} and {reference} were tested on different tasks: train both with the same settings"
        )
    row["minus_maml"] = {
        name: jm.Evaluation.of(np.asarray(values) - np.asarray(others[name]))._asdict()
        for name, values in own.items()
    }


def control(folder: Path, devices) -> dict:
    """Return accuracy and learning rate of plain fine-tuning from the LSTM meta-learner's initialisation."""
    config = load_config(folder)
    key = jax.random.key(config.run.seed)
    tasks = sources.tasks_of(config, "train")
    learner = build.learner_of(config)
    params = jm.init_state(learner, optax.sgd(0.0), tasks, key).params
    params = {"model": params["model"]}
    network = build.network_builder(config)(build.output_width(config))
    steps = config.learner["eval_steps"]

    def accuracy(rate, norm, split, episodes, key):
        tuned = jm.maml(network, inner_lr=rate, inner_steps=steps, norm=norm)
        tasks = sources.tasks_of(config, split)
        return jm.evaluate(tuned, params, tasks, episodes=episodes, key=key, devices=devices)

    validation = jm.training.validation_key(key)
    rate = max(CONTROL_RATES, key=lambda rate: accuracy(rate, "batch", "validation", 200, validation).mean)
    test = evaluation_key(config.run.seed)
    rows = {"transductive": "batch", "inductive": "support"}
    return {
        "rate": rate,
        "steps": steps,
        "accuracy": {
            name: accuracy(rate, norm, "test", config.run.episodes, test)._asdict()
            for name, norm in rows.items()
        },
    }


def percent(row: dict) -> str:
    return f"{100 * row['mean']:.2f} ± {100 * row['ci95']:.2f}"


def budget(row: dict) -> str:
    if "meta_batch" not in row:
        return f"no training; rate {row['rate']}, {row['steps']} steps"
    tasks = "1 task" if row["meta_batch"] == 1 else f"{row['meta_batch']} tasks"
    ways = f" of {row['train_ways']} ways" if "train_ways" in row else ""
    return f"{row['steps']:,} meta-steps of {tasks}{ways}, {row['training_s'] / 60:.0f} minutes"


def table(rows: dict) -> str:
    head = [
        "method",
        "transductive, %",
        "inductive, %",
        "minus maml (transductive)",
        "published, %",
        "budget",
    ]
    lines = []
    for method, row in rows.items():
        difference = row.get("minus_maml", {}).get("transductive")
        signed = (
            "" if difference is None else f"{100 * difference['mean']:+.2f} ± {100 * difference['ci95']:.2f}"
        )
        # Without batch normalisation there is no transductive accuracy.
        accuracies = [
            percent(row["accuracy"][name]) if name in row["accuracy"] else ""
            for name in ("transductive", "inductive")
        ]
        published = row.get("published", "")
        if row.get("published_budget"):
            published += f" ({row['published_budget']})"
        lines.append([f"`{method}`", *accuracies, signed, published, budget(row)])
    # Empty columns are left out.
    used = [i for i in range(len(head)) if any(cells[i] for cells in lines)]
    kept = [[head[i] for i in used], ["---"] * len(used), *([cells[i] for i in used] for cells in lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in kept)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    add("--data", type=Path, help="folder with Omniglot's archives (default: downloaded to the cache)")
    add("--out", type=Path, default=Path("runs/reproduce"), help="folder for the runs")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    folders = {method: train(method, ["--preset", ROWS[method][0]], args) for method in args.rows}
    jax.config.update("jax_num_cpu_devices", cores())
    rows = {}
    for method, folder in folders.items():
        rows[method] = row_of(method, folder)
        if method != "maml" and "maml" in folders:
            add_differences(rows[method], folder, folders["maml"])
    if "lstm_meta_learner" in folders:
        rows["fine-tuning"] = control(folders["lstm_meta_learner"], jax.local_devices())
    print(table(rows))
    if args.json:
        machine = describe_machine(jax.local_devices())
        report = {"machine": machine, "jaxmeta": jm.__version__, "seed": args.seed, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
