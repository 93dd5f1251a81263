"""Benchmark of transfer-learning recipes, and of transfer learning against meta-learning, on characters.

    python benchmarks/transfer.py --data DIR [--what recipes few-shot rank] [--out DIR] [--seeds N]
        [--json FILE] [--png FILE]

DIR holds Omniglot's archives (directly or in `omniglot/`), `mnist/t10k-…` and `usps/zip.….gz`. All parts
start from runs of `jaxmeta train --preset …` on Omniglot's training classes, in --out, which are trained if
they are missing: simple_shot, an ordinary classifier of all classes, whose Conv4 is the pretrained backbone;
maml; and prototypical.

recipes: the backbone on MNIST with 1, 5, 20 and 100 labels per digit, by each recipe, and the same network
trained from scratch with as many steps. Labels are drawn from a fixed 8,000 of MNIST's 10,000 test images;
the other 2,000 are the test set.

few-shot: 5-way tasks with Omniglot's test classes and with MNIST's digits, in inductive evaluation.
Fine-tuning starts from the backbone, "from scratch" from a random network; the learning rate and the number
of steps of both are the best of 6 pairs on Omniglot's validation classes. Omniglot has 20 drawings per class:
15 for the support set leave 5 for queries.

rank: transferability scores of several Conv4 backbones for MNIST, against their accuracy after fine-tuning.
"""

import argparse
import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from domain_adaptation import mnist_parts, usps_part
from machine import describe_machine
from reproduce import train

import jaxmeta as jm
from jaxmeta.cli.run import evaluation_key
from jaxmeta.training import validation_key

LABELS = (1, 5, 20, 100)
STEPS, BATCH, RATE = 150, 32, 1e-3
GROUPS = ["body/ConvNorm_0", "body/ConvNorm_1", "body/ConvNorm_2", "body/ConvNorm_3", "head"]
RECIPES = {
    "scratch": "from scratch",
    "ridge": "features, ridge head",
    "logistic": "features, logistic head",
    "upper": "last block and head",
    "full": "full fine-tuning",
    "l2-sp": "full, L2-SP",
    "lp-ft": "linear probe, then full",
    "gradual": "gradual unfreezing, discriminative rates",
}
SCHEDULE = optax.cosine_decay_schedule(RATE, STEPS)


class Recipes:
    """The recipes on one network; trials share its functions, so that each recipe compiles once."""

    def __init__(self, pretrained):
        self.model = jm.transfer.classifier(pretrained.network, 10)
        self.pretrained = pretrained.variables
        shapes = self.model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
        self.adam = optax.adam(SCHEDULE)
        self.layerwise_adam = lambda schedule: jm.transfer.discriminative(
            optax.adam(schedule), shapes, GROUPS
        )

    def fit(self, recipe: str, data: jm.Batch, seed: int):
        key = jax.random.key(seed)
        start = self.model.init(key, jnp.zeros((1, 28, 28, 1)))
        if recipe != "scratch":
            start = jm.transfer.with_body(start, self.pretrained)
        tune = partial(
            jm.transfer.fine_tune,
            self.model,
            data=data,
            steps=STEPS,
            key=key,
            batch_size=BATCH,
            optimizer=self.adam,
        )
        extract = partial(jm.transfer.feature_extraction, self.model, start, data)
        match recipe:
            case "ridge" | "logistic":
                return extract(head=recipe)
            case "upper":
                return tune(extract(), train=["body/ConvNorm_3", "head"]).variables
            case "l2-sp":
                penalty = jm.transfer.l2_sp(start["params"], shared="body", alpha=0.1, beta=0.01)
                return tune(start, penalty=penalty).variables
            case "lp-ft":
                return tune(extract()).variables
            case "gradual":
                stages = {"rate": 2 * RATE, "stage_steps": STEPS // 5, "batch_size": BATCH, "key": key}
                gradual = partial(jm.transfer.gradual_unfreezing, optimizer=self.layerwise_adam, **stages)
                return gradual(self.model, start, data, GROUPS).variables
        return tune(start).variables


def recipes_on_mnist(pretrained, data: Path, seeds: int) -> dict:
    """Return the accuracies by recipe, number of labels and seed."""
    pool, test = mnist_parts(data)
    recipes = Recipes(pretrained)
    rows: dict = {name: {} for name in RECIPES}
    for labels in LABELS:
        for seed in range(seeds):
            chosen, _ = jm.tasks.split_per_class(pool.y, labels, jax.random.key(seed))
            drawn = jm.Batch(pool.x[chosen], pool.y[chosen])
            for name in RECIPES:
                accuracy = jm.transfer.accuracy(recipes.model, recipes.fit(name, drawn, seed), test)
                rows[name].setdefault(str(labels), []).append(accuracy)
            print(labels, seed, {name: round(rows[name][str(labels)][-1], 3) for name in RECIPES}, flush=True)
    return rows


def recipes_table(rows: dict) -> str:
    lines = [
        f"| recipe | {' | '.join(f'{n} per digit' for n in LABELS)} |",
        f"| --- |{' --- |' * len(LABELS)}",
    ]
    for name, by_labels in rows.items():
        cells = [
            f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"
            for values in by_labels.values()
        ]
        lines.append(f"| {RECIPES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


# --- Few-shot tasks ------------------------------------------------------------------------------

DESCENTS = [(rate, steps) for rate in (0.01, 0.05, 0.2) for steps in (10, 30)]
SHOTS = {"omniglot": (1, 5, 15), "mnist": (1, 5, 20)}


def tasks_of(where: str, data: Path, shots: int, split: str = "test"):
    if where == "omniglot":
        archives = data / "omniglot" if (data / "omniglot").exists() else data
        return jm.tasks.omniglot(split, ways=5, shots=shots, queries=5, data=archives, protocol="vinyals")
    return jm.tasks.mnist(split, ways=5, shots=shots, queries=15, data=data)


def five_way(body_params, key) -> dict:
    """Return parameters of a 5-way Conv4 with the given body, or a random one, and a head of zeros."""
    network = jm.nn.Conv4(ways=5)
    params = network.init(key, jnp.zeros((1, 28, 28, 1)))["params"]
    if body_params is not None:
        params, _ = jm.transfer.transplant(body_params, params, strict=False)
    return {"model": jm.transfer.swap_subtree(params, "head", jax.tree.map(jnp.zeros_like, params["head"]))}


@cache
def tuned(rate: float, steps: int):
    """Build a learner that fine-tunes on the support set: MAML's adaptation with another initialisation."""
    return jm.maml(jm.nn.Conv4(ways=5), inner_lr=rate, inner_steps=steps, order="first", norm="support")


def few_shot(pretrained, folders: dict[str, Path], data: Path, episodes: int, seed: int):
    """Yield the accuracies so far, by method, data set and shots, after each number of shots."""
    key, test = jax.random.key(seed), evaluation_key(seed)
    starts = {
        "from scratch": five_way(None, key),
        "fine-tuning": five_way(pretrained.variables["params"], key),
    }
    classifier, classifier_params = jm.load_run(folders["simple_shot"])
    # `fine_tuned_head` reads the population statistics of the model one level higher.
    head_params = {**classifier_params, "population": classifier_params["population"]["model"]}
    head = jm.fine_tuned_head(
        jm.nn.Conv4(), norm="population", inner_optimizer=optax.sgd(0.1, momentum=0.9), eval_steps=100
    )
    fixed = {
        "nearest centroid of features": (classifier, classifier_params),
        "logistic head on features": (head, head_params),
        **{name: jm.load_run(folders[name]) for name in ("maml", "prototypical")},
    }
    rows: dict = {}
    for index, shots in enumerate(SHOTS["omniglot"]):
        validation = tasks_of("omniglot", data, shots, "validation")

        def on_validation(descent, params, validation=validation):
            result = jm.evaluate(
                tuned(*descent), params, validation, episodes=max(20, episodes // 10), key=validation_key(key)
            )
            return result.mean

        best = {
            name: max(DESCENTS, key=partial(on_validation, params=params)) for name, params in starts.items()
        }
        methods = {name: (tuned(*best[name]), params) for name, params in starts.items()} | fixed
        for where, numbers in SHOTS.items():
            tasks = tasks_of(where, data, numbers[index])
            for name, (learner, params) in methods.items():
                row = jm.evaluate(learner, params, tasks, episodes=episodes, key=test)._asdict()
                row |= {"descent": best[name]} if name in best else {}
                rows.setdefault(name, {}).setdefault(where, {})[str(numbers[index])] = row
                accuracy = f"{100 * row['mean']:.2f} ± {100 * row['ci95']:.2f}"
                print(f"{where} {numbers[index]} {name}: {accuracy}", flush=True)
            yield rows


def few_shot_table(rows: dict) -> str:
    columns = [(where, str(n)) for where, numbers in SHOTS.items() for n in numbers]
    names = [f"{where}, {n} per class" for where, n in columns]
    lines = [f"| method | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for method, results in rows.items():
        accuracies = [results[where][n] for where, n in columns]
        cells = [f"{100 * row['mean']:.1f} ± {100 * row['ci95']:.1f}" for row in accuracies]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


# --- Source ranking ------------------------------------------------------------------------------


def rank(pretrained, folders: dict[str, Path], data: Path, seed: int, labels: int = 20):
    """Rank backbones by transferability scores of their MNIST features, and by accuracy after fine-tuning."""
    pool, test = mnist_parts(data)
    chosen, _ = jm.tasks.split_per_class(pool.y, labels, jax.random.key(seed))
    drawn = jm.Batch(pool.x[chosen], pool.y[chosen])
    key = jax.random.key(seed)
    network = pretrained.network
    candidates = {"simple_shot": pretrained.variables}
    candidates["prototypical"] = jm.transfer.load_pretrained(folders["prototypical"], head=False).variables
    candidates["random"] = jm.nn.as_stateful(network).init(key, jnp.zeros((1, 28, 28, 1)))
    usps = usps_part(data, "train")
    model = jm.transfer.classifier(network, 10)
    optimizer = optax.adam(RATE)
    for steps in (20, 300):
        learned = jm.transfer.fine_tune(
            model,
            model.init(key, usps.x[:1]),
            usps,
            steps=steps,
            key=key,
            optimizer=optimizer,
        ).variables
        candidates[f"usps, {steps} steps"] = {name: tree["body"] for name, tree in learned.items()}
    features, accuracies = {}, {}
    tuning = optax.adam(SCHEDULE)
    for name, body in candidates.items():
        start = jm.transfer.with_body(model.init(key, usps.x[:1]), body)
        features[name] = jm.transfer.Candidate(jm.transfer.extract_features(model, start, drawn.x))
        result = jm.transfer.linear_probe_then_fine_tune(
            model, start, drawn, optimizer=tuning, steps=STEPS, key=key, batch_size=BATCH
        )
        accuracies[name] = jm.transfer.accuracy(model, result.variables, test)
    return jm.transfer.rank_sources(features, (None, drawn.y), accuracies=accuracies)


def draw(rows: dict, path: Path) -> None:
    fig, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    colors = ["0.5", "#56B4E9", "#0072B2", "#E69F00", "#D55E00", "#CC79A7", "#009E73", "#F0E442"]
    for (name, by_labels), color in zip(rows.items(), colors, strict=True):
        mean = [100 * np.mean(values) for values in by_labels.values()]
        axes.plot([int(n) for n in by_labels], mean, "o-", color=color, linewidth=2, label=RECIPES[name])
    axes.set(
        xscale="log",
        xticks=LABELS,
        xticklabels=LABELS,
        xlabel="labelled examples per digit",
        ylabel="accuracy on MNIST, %",
        title="MNIST with a Conv4 pretrained on Omniglot",
    )
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    fig.savefig(path, dpi=150)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    everything = ("recipes", "few-shot", "rank")
    add("--data", type=Path, required=True, help="folder with omniglot/, mnist/ and usps/")
    add("--what", nargs="+", choices=everything, default=list(everything), help="parts to run")
    add("--out", type=Path, default=Path("runs/transfer"), help="folder for the runs")
    add("--seed", type=int, default=1, help="seed of the runs and of the few-shot tasks")
    add("--seeds", type=int, default=3, help="number of seeds of the recipes")
    add("--episodes", type=int, default=600, help="number of few-shot tasks")
    add("--json", type=Path, help="also write the results to this file")
    add("--png", type=Path, help="also draw the recipes into this file")
    args = parser.parse_args(argv)
    presets = {
        "simple_shot": "omniglot-simple-shot",
        "maml": "omniglot",
        "prototypical": "omniglot-prototypical",
    }
    needed = presets if args.what != ["recipes"] else {"simple_shot": presets["simple_shot"]}
    folders = {name: train(name, ["--preset", preset], args) for name, preset in needed.items()}
    pretrained = jm.transfer.load_pretrained(folders["simple_shot"], head=False)
    report = json.loads(args.json.read_text()) if args.json and args.json.exists() else {"results": {}}
    report |= {
        "machine": describe_machine(jax.local_devices()),
        "jaxmeta": jm.__version__,
        "settings": {"steps": STEPS, "batch": BATCH, "rate": RATE, "seed": args.seed},
    }

    def keep(name: str, rows: dict) -> None:
        report["results"][name] = rows
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")

    if "recipes" in args.what:
        rows = recipes_on_mnist(pretrained, args.data, args.seeds)
        keep("recipes", rows)
        print(recipes_table(rows))
        if args.png:
            draw(rows, args.png)
    if "few-shot" in args.what:
        for rows in few_shot(pretrained, folders, args.data, args.episodes, args.seed):
            keep("few-shot", rows)
        print(few_shot_table(rows))
    if "rank" in args.what:
        ranking = rank(pretrained, folders, args.data, args.seed)
        print(ranking)
        correlations = {name: value._asdict() for name, value in ranking.correlations.items()}
        keep("rank", {"rows": [row._asdict() for row in ranking.rows], "correlations": correlations})


if __name__ == "__main__":
    main()
