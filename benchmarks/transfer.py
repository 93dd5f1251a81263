"""Recipes of transfer learning, and transfer learning beside meta-learning, on real characters.

    python benchmarks/transfer.py --data DIR [--what recipes few-shot rank] [--out DIR] [--seeds N]
        [--json FILE] [--png FILE]

DIR holds Omniglot's archives (or `omniglot/` with them), `mnist/t10k-…` and `usps/zip.….gz`. In --out are
the runs that all of it starts from, each `jaxmeta train --preset …` on Omniglot's training classes, made if
they are not there: simple_shot, an ordinary classifier of all classes, whose Conv4 is the pretrained body;
maml; prototypical.

recipes: that body on MNIST, at 1, 5, 20 and 100 labels a digit: each recipe, and the same network from
scratch with as many steps. Labels are drawn from a fixed 8,000 of MNIST's 10,000 test images, scores are of
the other 2,000.

few-shot: 5-way tasks, of Omniglot's test classes and of MNIST's digits, each query judged by the support
set alone. Fine-tuning starts from the body, "from scratch" from the random network; rate and number of
steps of both are the best of few on Omniglot's validation classes. Omniglot has 20 drawings of a class: 15
to learn from leave 5 for queries.

rank: transferability scores of several Conv4 for MNIST, against their accuracy after fine-tuning.
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
    """The recipes on one network, with the same functions in each trial, so that each compiles once."""

    def __init__(self, pretrained):
        self.model = jm.transfer.classifier(pretrained.network, 10)
        self.pretrained = pretrained.variables
        shapes = self.model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
        self.adam = optax.adam(SCHEDULE)
        self.slow_below = lambda schedule: jm.transfer.discriminative(optax.adam(schedule), shapes, GROUPS)

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
                gradual = partial(jm.transfer.gradual_unfreezing, optimizer=self.slow_below, **stages)
                return gradual(self.model, start, data, GROUPS).variables
        return tune(start).variables


def recipes_on_mnist(pretrained, data: Path, seeds: int) -> dict:
    """Accuracy by recipe, number of labels and seed."""
    pool, test = mnist_parts(data)
    recipes = Recipes(pretrained)
    rows: dict = {name: {} for name in RECIPES}
    for labels in LABELS:
        for seed in range(seeds):
            chosen, _ = jm.tasks.split_per_class(pool.y, labels, jax.random.key(seed))
            drawn = jm.Batch(pool.x[chosen], pool.y[chosen])
            for name in RECIPES:
                found = jm.transfer.accuracy(recipes.model, recipes.fit(name, drawn, seed), test)
                rows[name].setdefault(str(labels), []).append(found)
            print(labels, seed, {name: round(rows[name][str(labels)][-1], 3) for name in RECIPES}, flush=True)
    return rows


def recipes_table(rows: dict) -> str:
    lines = [
        f"| recipe | {' | '.join(f'{n} a digit' for n in LABELS)} |",
        f"| --- |{' --- |' * len(LABELS)}",
    ]
    for name, by_labels in rows.items():
        cells = [
            f"{100 * np.mean(found):.1f} ± {100 * np.std(found, ddof=1):.1f}" for found in by_labels.values()
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
    """Parameters of a 5-way Conv4 with that body, and with a head of zeros, which favours no class."""
    network = jm.nn.Conv4(ways=5)
    fresh = network.init(key, jnp.zeros((1, 28, 28, 1)))["params"]
    if body_params is not None:
        fresh, _ = jm.transfer.transplant(body_params, fresh, strict=False)
    return {"model": jm.transfer.swap_subtree(fresh, "head", jax.tree.map(jnp.zeros_like, fresh["head"]))}


@cache
def tuned(rate: float, steps: int):
    """Fine-tuning on a support set is what MAML does at test time, from another start."""
    return jm.maml(jm.nn.Conv4(ways=5), inner_lr=rate, inner_steps=steps, order="first", norm="support")


def few_shot(pretrained, folders: dict[str, Path], data: Path, episodes: int, seed: int):
    """Accuracy by method, source of tasks, and examples a class: all that is known after each of them."""
    key, test = jax.random.key(seed), evaluation_key(seed)
    starts = {
        "from scratch": five_way(None, key),
        "fine-tuning": five_way(pretrained.variables["params"], key),
    }
    classifier, of_classifier = jm.load_run(folders["simple_shot"])
    own = {**of_classifier, "population": of_classifier["population"]["model"]}
    head = jm.fine_tuned_head(
        jm.nn.Conv4(), norm="population", inner_optimizer=optax.sgd(0.1, momentum=0.9), eval_steps=100
    )
    fixed = {
        "nearest centroid of features": (classifier, of_classifier),
        "logistic head on features": (head, own),
        **{name: jm.load_run(folders[name]) for name in ("maml", "prototypical")},
    }
    rows: dict = {}
    for place, known in enumerate(SHOTS["omniglot"]):
        validation = tasks_of("omniglot", data, known, "validation")

        def on_validation(descent, params, validation=validation):
            found = jm.evaluate(
                tuned(*descent), params, validation, episodes=max(20, episodes // 10), key=validation_key(key)
            )
            return found.mean

        best = {
            name: max(DESCENTS, key=partial(on_validation, params=params)) for name, params in starts.items()
        }
        methods = {name: (tuned(*best[name]), params) for name, params in starts.items()} | fixed
        for where, numbers in SHOTS.items():
            tasks = tasks_of(where, data, numbers[place])
            for name, (learner, params) in methods.items():
                row = jm.evaluate(learner, params, tasks, episodes=episodes, key=test)._asdict()
                row |= {"descent": best[name]} if name in best else {}
                rows.setdefault(name, {}).setdefault(where, {})[str(numbers[place])] = row
                shown = f"{100 * row['mean']:.2f} ± {100 * row['ci95']:.2f}"
                print(f"{where} {numbers[place]} {name}: {shown}", flush=True)
            yield rows


def few_shot_table(rows: dict) -> str:
    columns = [(where, str(n)) for where, numbers in SHOTS.items() for n in numbers]
    names = [f"{where}, {n} a class" for where, n in columns]
    lines = [f"| method | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for method, found in rows.items():
        cells = [found[where][n] for where, n in columns]
        shown = [f"{100 * row['mean']:.1f} ± {100 * row['ci95']:.1f}" for row in cells]
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(lines)


# --- Which source to take ------------------------------------------------------------------------


def rank(pretrained, folders: dict[str, Path], data: Path, seed: int, labels: int = 20):
    """Bodies of several origins, scored by features of MNIST, and fine-tuned there."""
    pool, test = mnist_parts(data)
    chosen, _ = jm.tasks.split_per_class(pool.y, labels, jax.random.key(seed))
    drawn = jm.Batch(pool.x[chosen], pool.y[chosen])
    key = jax.random.key(seed)
    network = pretrained.network
    candidates = {"simple_shot": pretrained.variables}
    candidates["prototypical"] = jm.transfer.load_pretrained(folders["prototypical"], head=False).variables
    random = jm.nn.as_stateful(network).init(key, jnp.zeros((1, 28, 28, 1)))
    candidates["random"] = random
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
        found = jm.transfer.linear_probe_then_fine_tune(
            model, start, drawn, optimizer=tuning, steps=STEPS, key=key, batch_size=BATCH
        )
        accuracies[name] = jm.transfer.accuracy(model, found.variables, test)
    return jm.transfer.rank_sources(features, (None, drawn.y), accuracies=accuracies)


def draw(rows: dict, path: Path) -> None:
    fig, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    colors = ["0.5", "#56B4E9", "#0072B2", "#E69F00", "#D55E00", "#CC79A7", "#009E73", "#F0E442"]
    for (name, by_labels), color in zip(rows.items(), colors, strict=True):
        mean = [100 * np.mean(found) for found in by_labels.values()]
        axes.plot([int(n) for n in by_labels], mean, "o-", color=color, linewidth=2, label=RECIPES[name])
    axes.set(
        xscale="log",
        xticks=LABELS,
        xticklabels=LABELS,
        xlabel="labelled examples a digit",
        ylabel="accuracy on MNIST, %",
        title="A Conv4 that has learned Omniglot learns MNIST",
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
    add("--what", nargs="+", choices=everything, default=list(everything))
    add("--out", type=Path, default=Path("runs/transfer"), help="folder of the runs")
    add("--seed", type=int, default=1, help="of the runs and of few-shot tasks")
    add("--seeds", type=int, default=3, help="of the recipes")
    add("--episodes", type=int, default=600, help="few-shot tasks")
    add("--json", type=Path, help="also write the results here")
    add("--png", type=Path, help="also draw the recipes here")
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
        correlations = {name: found._asdict() for name, found in ranking.correlations.items()}
        keep("rank", {"rows": [row._asdict() for row in ranking.rows], "correlations": correlations})


if __name__ == "__main__":
    main()
