"""Benchmark of unsupervised domain adaptation between MNIST and USPS digits.

    python benchmarks/domain_adaptation.py --data DIR [--directions usps-mnist mnist-usps] [--methods …]
        [--seeds N] [--steps N] [--json FILE] [--png FILE]

DIR holds `mnist/t10k-…` and `usps/zip.….gz`. USPS images, 16×16, are resized to 28×28. MNIST's 10,000 test
images are split once into 8,000 for training, with or without labels, and 2,000 for testing; USPS has its own
training and test parts. All methods share one network, Conv4 with 32 channels, trained by Adam. The weights
of the penalties were fixed beforehand and are the same in both directions.

Each model is evaluated six times during training. "chosen" is the evaluation with the highest accuracy on
the source's test part, the latest one in a tie; it reads no target label. "oracle" is the evaluation with the
highest accuracy on the target's test part, which is unknown in practice. "last" is the end of training. The
table shows mean and standard deviation over seeds.

Results that the --json file already holds for the same settings are not computed again.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from machine import describe_machine

import jaxmeta as jm

EVALUATIONS, BATCH, RATE = 6, 64, 1e-3
# Deep CORAL's loss is divided by 4d² = 4096, for d = 32 features here, hence its large weight.
ALIGNMENTS = {
    "coral": jm.transfer.coral(1000.0),
    "mmd": jm.transfer.mmd(5.0),
    "dann": jm.transfer.dann(),
}
NAMES = {
    "source": "source only",
    "adabn": "AdaBN",
    "coral": "Deep CORAL",
    "mmd": "MMD (DAN)",
    "dann": "DANN",
    "target": "trained on the target's labels",
}


def mnist_parts(data: Path) -> tuple[jm.Batch, jm.Batch]:
    """Return 8,000 training and 2,000 test images of MNIST's test part, with values in [0, 1]."""
    x, y = jm.tasks.mnist_images(data)
    order = np.random.default_rng(0).permutation(len(y))
    x = x.astype(np.float32) / 255
    train, test = (jm.Batch(x[rows], y[rows]) for rows in (order[:8000], order[8000:]))
    return train, test


def usps_part(data: Path, part: str) -> jm.Batch:
    """Return a part of USPS, resized to 28×28, with values in [0, 1]."""
    x, y = jm.tasks.usps_images(data, part)
    pixels = x.astype(np.float32) / 255
    return jm.Batch(np.asarray(jax.image.resize(pixels, (len(pixels), 28, 28, 1), "linear")), y)


class Trial:
    """One source and one target; all methods share a network and an optimizer, so that each compiles once."""

    def __init__(self, images: dict, direction: str, steps: int):
        source, target = direction.split("-")
        self.source, self.source_test = images[source]
        self.labelled, self.target_test = images[target]
        self.unlabelled = self.labelled.x
        self.model = jm.transfer.classifier(jm.nn.Conv4(filters=32), 10)
        self.optimizer, self.steps = optax.adam(RATE), steps

    def accuracy(self, variables, data) -> float:
        return jm.transfer.accuracy(self.model, variables, data)

    def run(self, method: str, seed: int) -> dict:
        key = jax.random.key(seed)
        variables = self.model.init(key, self.source.x[:1])
        settings = {"optimizer": self.optimizer, "steps": self.steps, "batch_size": BATCH, "key": key}
        every = -(-self.steps // EVALUATIONS)
        evaluations: list[tuple[float, float]] = []

        def evaluate(source, target) -> None:
            accuracies = self.accuracy(source, self.source_test), self.accuracy(target, self.target_test)
            evaluations.append(accuracies)

        if method in ALIGNMENTS:
            jm.transfer.align(
                self.model,
                variables,
                self.source,
                self.unlabelled,
                ALIGNMENTS[method],
                every=every,
                callback=lambda step, variables: evaluate(variables.source, variables.target),
                **settings,
            )
        else:
            data = self.labelled if method == "target" else self.source

            def evaluate_step(step, variables):
                # AdaBN leaves training as it is and replaces the batch statistics of the source's model.
                evaluate(variables, self.renormalised(variables) if method == "adabn" else variables)

            jm.transfer.fine_tune(
                self.model, variables, data, every=every, callback=evaluate_step, **settings
            )
        source, target = np.array(evaluations).T
        # Reversed, because argmax returns the first of several maxima.
        chosen = len(source) - 1 - int(np.argmax(source[::-1]))
        return {
            "chosen": float(target[chosen]),
            "oracle": float(target.max()),
            "last": float(target[-1]),
            "source": float(source[chosen]),
            "evaluations": [[round(a, 4), round(b, 4)] for a, b in evaluations],
        }

    def renormalised(self, variables):
        return jm.transfer.adabn(self.model, variables, self.unlabelled[:2048])


def summary(runs: dict) -> dict:
    return {
        name: [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")]
        for name in ("chosen", "oracle", "last", "source")
        for values in [[run[name] for run in runs.values()]]
    }


def table(rows: dict) -> str:
    lines = [
        "| direction | method | chosen without target labels, % | oracle, % | last, % | on the source, % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for direction, methods in rows.items():
        source, target = (name.upper() for name in direction.split("-"))
        for method, runs in methods.items():
            results = summary(runs)
            cells = [
                f"{100 * results[n][0]:.1f} ± {100 * results[n][1]:.1f}"
                for n in ("chosen", "oracle", "last", "source")
            ]
            lines.append(f"| {source} → {target} | {NAMES[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: dict, path: Path) -> None:
    fig, panels = plt.subplots(
        1, len(rows), figsize=(5 * len(rows), 3.6), layout="constrained", squeeze=False
    )
    for axes, (direction, methods) in zip(panels[0], rows.items(), strict=True):
        summaries = {NAMES[method]: summary(runs) for method, runs in methods.items()}
        places = np.arange(len(summaries))
        mean, spread = 100 * np.array([row["chosen"] for row in summaries.values()]).T
        axes.barh(
            places, mean, xerr=spread, color="#0072B2", height=0.6, label="chosen without target labels"
        )
        oracle = [100 * row["oracle"][0] for row in summaries.values()]
        axes.plot(oracle, places, "|", color="#D55E00", markersize=16, markeredgewidth=2.5, label="oracle")
        axes.set(
            yticks=places, yticklabels=list(summaries), xlim=(40, 100), xlabel="accuracy on the target, %"
        )
        axes.set_title(" → ".join(name.upper() for name in direction.split("-")))
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    panels[0][0].legend(loc="lower left", fontsize=8)
    fig.savefig(path, dpi=150)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with mnist/ and usps/")
    add("--directions", nargs="+", default=["usps-mnist", "mnist-usps"], choices=["usps-mnist", "mnist-usps"])
    add("--methods", nargs="+", default=list(NAMES), choices=list(NAMES))
    add("--seeds", type=int, default=5)
    add("--steps", type=int, default=600)
    add("--json", type=Path, help="also write the results to this file, after each run")
    add("--png", type=Path, help="also draw the results into this file")
    args = parser.parse_args(argv)
    settings = {"steps": args.steps, "batch": BATCH, "rate": RATE, "network": "Conv4, 32 channels"}
    rows: dict = {}
    if args.json and args.json.exists():
        previous = json.loads(args.json.read_text())
        rows = previous["rows"] if previous["settings"] == settings else {}
    images = {
        "usps": (usps_part(args.data, "train"), usps_part(args.data, "test")),
        "mnist": mnist_parts(args.data),
    }
    for direction in args.directions:
        trial = Trial(images, direction, args.steps)
        for seed in range(args.seeds):
            for method in args.methods:
                done = rows.setdefault(direction, {}).setdefault(method, {})
                if str(seed) in done:
                    continue
                started = time.monotonic()
                done[str(seed)] = trial.run(method, seed)
                row = done[str(seed)]
                print(
                    f"{direction} {method} seed {seed}: chosen {row['chosen']:.3f}, oracle "
                    f"{row['oracle']:.3f}, {time.monotonic() - started:.0f} s",
                    flush=True,
                )
                if args.json:
                    report = {
                        "machine": describe_machine(jax.local_devices()),
                        "jaxmeta": jm.__version__,
                        "settings": settings,
                        "rows": rows,
                    }
                    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))
    if args.png:
        draw(rows, args.png)


if __name__ == "__main__":
    main()
