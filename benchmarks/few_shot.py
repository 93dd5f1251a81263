"""Few-shot accuracy of pretrained features and of trained learners on emoji, within and across styles.

    python benchmarks/few_shot.py --data DIR --weights squeezenet1_1.safetensors [--train NAME …] [--out DIR]
        [--words FOLDER] [--elsewhere] [--json FILE] [--figure FILE]

DIR holds Iconify's emoji packs. A class is a thing, a domain is the style of a designer's set. Test tasks
have 5 or 20 ways, 1 or 3 shots and 1 query per class, under three protocols: support set and queries of any
style; of different styles; and queries of one style, which only the trainings "style held out" never see.
All rows of a protocol share 2,000 test tasks of the classes that all sets have.

Rows are pixels, the features of --weights under every head that `jaxmeta evaluate` has, and those of each
trained network under the heads that need no more than class means; and learners that adapt their network.
--train names the trainings to run or to resume (`--train all`), each `jaxmeta train` in a process of its own,
for 5-way 1-shot tasks across styles. Rows whose run in --out is complete are evaluated.

--words adds zero-shot tasks: a class is known by its name alone, by the vector that a text encoder in a
folder of sentence-transformers gives it. Two small networks map features and vectors to a common space. Needs
transformers and torch.

--elsewhere evaluates the same features on Omniglot, MNIST and Fashion-MNIST in DIR, with the same heads,
beside the scores by which `jaxmeta rank` orders the sources without evaluating them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import cores, describe_machine

import jaxmeta as jm
from jaxmeta.cli.heads import HEADS
from jaxmeta.cli.run import evaluation_key

EPISODES = 2000
# The style held out: the one that differs most from the others, black outlines around flat colours.
HELD_OUT = "openmoji"
PROTOCOLS = {
    "any": {},
    "across": {"across": True},
    "held out": {"across": True, "test_styles": (HELD_OUT,)},
}
SHAPES = [(5, 1), (5, 3), (20, 1), (20, 3)]
# Heads on trained features, which need no more than a mean of each class.
_TRAINED_HEADS = ["prototypical", "simple_shot", "simple_shot_centred", "soft_kmeans"]
# Test classes are those that all six sets have, so that every protocol has the same.
STYLES = 6
# Trainings whose features are also used for zero-shot tasks and on other data sets.
_SOURCES = ("prototypical, seed 0", "classifier from SqueezeNet", "prototypical from SqueezeNet")
# Labelled examples of each class for the scores of a source.
_SCORED = 20


class Training(NamedTuple):
    """A training of `jaxmeta train`.

    Attributes:
      settings: its arguments, separated by spaces.
      start: "weights" to start from --weights, the name of a training to start from its network, or None.
      held_out: whether the held-out style is left out of training.
    """

    settings: str
    start: str | None = None
    held_out: bool = False


# Two tasks per step keep two cores busy: 1.8 times as many tasks per second as with one.
_EPISODES = "--train-ways 32 --train-shots 1 --train-queries 1 --meta-batch 2 --distort"
_CONV4 = "--network conv4-32 --size 64"
# Cosines of features times 30, as in `matching`. From SqueezeNet the validation accuracy was highest after
# 300 steps with cosines times 10, at 94.7, and still rose after 600 with cosines times 30, at 96.6. From
# scratch, squared Euclidean distances gave 6 points less on the test classes.
_COSINES = f"prototypical {_EPISODES} --divergence cosine --scale 30"
_PROTOTYPICAL = f"{_COSINES} {_CONV4} --steps 2000"
# 84 pixels need a seventh of the work of 224, and gave the same accuracy as 112. Without --distort the
# validation accuracy falls after 500 steps.
_FINE_TUNING = "--input-size 84 --outer-lr 3e-4"
TRAININGS = {
    "classifier from SqueezeNet": Training(
        f"simple_shot --distort {_FINE_TUNING} --steps 1000", start="weights"
    ),
    "prototypical from SqueezeNet": Training(f"{_COSINES} {_FINE_TUNING} --steps 1500", start="weights"),
    "classifier, then prototypical, from SqueezeNet": Training(
        f"{_COSINES} --outer-lr 3e-4 --steps 600", start="classifier from SqueezeNet"
    ),
    **{f"prototypical, seed {seed}": Training(f"{_PROTOTYPICAL} --seed {seed}") for seed in range(3)},
    "classifier": Training(f"simple_shot {_CONV4} --distort --steps 2000"),
    "matching": Training(f"matching {_EPISODES} {_CONV4} --steps 2000"),
    "maml": Training(f"maml {_CONV4} --meta-batch 4 --steps 1500"),
    "anil": Training(f"anil {_CONV4} --meta-batch 4 --steps 2000"),
    "prototypical, style held out": Training(_PROTOTYPICAL, held_out=True),
    "prototypical from SqueezeNet, style held out": Training(
        f"{_COSINES} {_FINE_TUNING} --steps 1500", start="weights", held_out=True
    ),
}


def folder_of(name: str, out: Path) -> Path:
    """Return the run folder of a training."""
    return out / name.replace(", ", "-").replace(" ", "-")


def train(name: str, args) -> None:
    """Run or resume a training."""
    folder, training = folder_of(name, args.out), TRAININGS[name]
    if (folder / "report.json").exists():
        return
    command = [sys.executable, "-m", "jaxmeta.cli", "train"]
    if (folder / "config.json").exists():
        command += ["--resume"]
    else:
        command += [*training.settings.split(), "--tasks", "emoji", "--across"]
        command += ["--ways", "5", "--shots", "1", "--queries", "1", "--episodes", str(EPISODES)]
        command += ["--validate-every", "250"]
        if training.start:
            start = args.weights if training.start == "weights" else folder_of(training.start, args.out)
            command += ["--init", str(start)]
        command += ["--test-styles", HELD_OUT] * training.held_out
    print(f"== {name}", flush=True)
    subprocess.run([*command, "--data", str(args.data), "--out", str(folder)], check=True)


def protocols(args, size: int):
    """Yield the name, ways, shots and test tasks of every protocol."""
    for name, settings in PROTOCOLS.items():
        for ways, shots in SHAPES:
            yield (
                name,
                ways,
                shots,
                jm.tasks.emoji(
                    "test",
                    ways=ways,
                    shots=shots,
                    queries=1,
                    data=args.data,
                    size=size,
                    min_styles=STYLES,
                    **settings,
                ),
            )


def accuracy(learner: jm.Learner, params, tasks: jm.TaskDistribution) -> dict:
    """Return mean and 95 % interval of a learner's accuracy on the test tasks."""
    result = jm.evaluate(learner, params, tasks, episodes=EPISODES, key=evaluation_key(0))
    return {"mean": result.mean, "ci95": result.ci95}


def head_accuracies(heads, tasks: jm.TaskDistribution) -> dict:
    """Return the accuracy of each head on tasks of features."""
    task = tasks.sample(jax.random.key(0))
    learners = {head: HEADS[head].learner for head in heads}
    return {
        head: accuracy(learner, learner.init(jax.random.key(0), task), tasks)
        for head, learner in learners.items()
    }


def feature_accuracies(embed, heads, size: int, args) -> dict:
    """Return the accuracy of each head on the features of `embed`, by protocol and shape."""
    rows: dict = {head: {} for head in heads}
    for name, ways, shots, tasks in protocols(args, size):
        for head, found in head_accuracies(heads, jm.tasks.embedded(tasks, embed)).items():
            rows[head][f"{name} {ways}-way {shots}-shot"] = found
    return rows


def learner_accuracies(folder: Path, size: int, args) -> dict:
    """Return the accuracy of a run's learner on tasks of as many ways as it was trained for."""
    learner, params = jm.load_run(folder)
    return {
        f"{name} {ways}-way {shots}-shot": accuracy(learner, params, tasks)
        for name, ways, shots, tasks in protocols(args, size)
        if ways == 5
    }


def row_of_run(name: str, args) -> dict:
    """Return the accuracies of a complete run, with its budget."""
    folder = folder_of(name, args.out)
    report = json.loads((folder / "report.json").read_text())
    config = report["config"]
    size = config["tasks"]["size"]
    learner = config["learner"]["name"]
    return {
        "heads": {"own": learner_accuracies(folder, size, args)}
        if learner in ("maml", "anil")
        else feature_accuracies(jm.features(folder), _TRAINED_HEADS, size, args),
        "size": size,
        "steps": report["steps"],
        "training_s": report["training_s"],
        "meta_batch": config["training"]["meta_batch"],
        "drawn": "mini-batches" if learner == "simple_shot" else f"{config['tasks']['train_ways']}-way tasks",
        "network": config["network"]["name"],
        "parameters": report["parameters"],
        "seed": config["run"]["seed"],
    }


def write_word_vectors(folder: Path, names: list[str], file: Path) -> None:
    """Write a vector for each class name, by the text encoder in a folder of sentence-transformers."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    words = [" ".join(jm.tasks.class_words(name)) for name in names]
    encoder = AutoModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(words, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = encoder(**tokens).last_hidden_state.numpy()
    mask = tokens["attention_mask"].numpy()[..., None]
    vectors = (states * mask).sum(1) / mask.sum(1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    lines = (" ".join([name, *map(str, vector)]) for name, vector in zip(names, vectors, strict=True))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def zero_shot(embed, size: int, file: Path, args) -> dict:
    """Return the accuracy of zero-shot classification by a file of word vectors, by ways."""
    settings = {"data": args.data, "size": size, "min_styles": STYLES}

    def tasks(split: str, ways: int, queries: int) -> jm.TaskDistribution:
        images = jm.tasks.emoji(split, ways=ways, shots=0, queries=queries, word_vectors=file, **settings)
        return jm.tasks.embedded(images, embed)

    learner = jm.prototypical(
        jm.nn.MLP(out=256, hidden=()),
        metadata=jm.nn.MLP(out=256, hidden=(256,)),
        divergence="cosine",
        scale=10.0,
    )
    state = jm.train(
        learner,
        tasks("train", 64, 2),
        optax.adamw(1e-3, weight_decay=1e-2),
        steps=2000,
        meta_batch=1,
        key=jax.random.key(0),
    )
    return {f"{ways}-way": accuracy(learner, state.params, tasks("test", ways, 1)) for ways in (5, 20)}


def elsewhere(sources: dict, args):
    """Yield names of other data sets with the accuracies and transferability scores of features on them."""
    for name, ways in (("omniglot", 20), ("mnist", 10), ("fashion_mnist", 10)):
        images = getattr(jm.tasks, name)("test", ways=ways, shots=1, queries=5, data=args.data)
        row: dict = {"ways": ways, "accuracy": {"1-shot": {}, "5-shot": {}}}
        candidates: dict = {}
        for source, (embed, heads) in sources.items():
            z, y = map(np.asarray, jm.tasks.labelled(jm.tasks.embedded(images, embed)))
            for shots in (1, 5):
                tasks = jm.tasks.from_arrays(z, y, ways=ways, shots=shots, queries=5)
                row["accuracy"][f"{shots}-shot"][source] = head_accuracies(heads, tasks)
            scored = np.concatenate([np.flatnonzero(y == label)[:_SCORED] for label in range(y.max() + 1)])
            candidates[source] = jm.transfer.Candidate(z[scored])
        accuracies = {
            source: found["simple_shot"]["mean"] for source, found in row["accuracy"]["1-shot"].items()
        }
        ranking = jm.transfer.rank_sources(candidates, (None, y[scored]), accuracies=accuracies)
        row["scores"] = {each.name: each.scores for each in ranking.rows}
        print(f"{name}, {ways}-way 1-shot\n{ranking}", flush=True)
        yield name, row


def print_row(name: str, row: dict) -> None:
    """Print the accuracies of a row, one line per head."""
    for head, found in row["heads"].items():
        cells = (
            f"{protocol} {100 * value['mean']:.1f} ± {100 * value['ci95']:.1f}"
            for protocol, value in found.items()
        )
        print(f"{name}, {head}: {', '.join(cells)}", flush=True)


def ordered(rows: dict) -> dict:
    """Return rows in the order of `TRAININGS`, although a resumed benchmark may measure them in another."""
    order = ["pixels", "SqueezeNet", *TRAININGS]
    return {name: rows[name] for name in order if name in rows}


def widest(rows: dict) -> float:
    """Return the half-width of the widest interval of all accuracies."""
    return max(
        value["ci95"] for row in rows.values() for found in row["heads"].values() for value in found.values()
    )


def best_head(row: dict, task: str) -> tuple[str, dict]:
    """Return the name and the accuracy of a row's best inductive head."""
    found = {
        head: accuracies[task]
        for head, accuracies in row["heads"].items()
        if not (head in HEADS and HEADS[head].transductive)
    }
    return max(found.items(), key=lambda named: named[1]["mean"])


def table(rows: dict, ways: int) -> str:
    """Return the accuracies as a table, one line for each row and head, with the best of each column bold."""
    columns = [f"{name} {ways}-way {shots}-shot" for shots in (1, 3) for name in PROTOCOLS]
    lines = [
        (name, head, found)
        for name, row in rows.items()
        for head, found in row["heads"].items()
        if columns[0] in found
    ]
    best = {
        column: max(found[column]["mean"] for _, _, found in lines if column in found) for column in columns
    }

    def cell(found: dict, column: str) -> str:
        if column not in found:
            return ""
        text = f"{100 * found[column]['mean']:.1f}"
        return f"**{text}**" if found[column]["mean"] == best[column] else text

    head = ["features", "head", *(column.replace(f" {ways}-way", ",") for column in columns)]
    cells = [[name, f"`{by}`", *(cell(found, each) for each in columns)] for name, by, found in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *cells])


def draw(rows: dict, file: Path) -> None:
    """Draw the best inductive head of each row, 5-way 1-shot and 20-way 1-shot, by protocol."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 0.35 * len(rows) + 2), sharey=True, layout="constrained")
    for axis, ways in zip(axes, (5, 20), strict=True):
        for number, protocol in enumerate(PROTOCOLS):
            key = f"{protocol} {ways}-way 1-shot"
            for position, (_, row) in enumerate(rows.items()):
                if any(key in found for found in row["heads"].values()):
                    _, best = best_head(row, key)
                    axis.errorbar(
                        100 * best["mean"],
                        position,
                        xerr=100 * best["ci95"],
                        fmt="os^"[number],
                        color=("black", "tab:blue", "tab:orange")[number],
                        label=protocol if position == 0 else None,
                    )
        axis.set_title(f"{ways}-way 1-shot, best inductive head")
        axis.set_xlabel("accuracy on new classes, %")
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(rows)), list(rows))
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, title="styles of support set and queries", loc="outside lower center", ncols=3
    )
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with the emoji packs")
    add("--weights", type=Path, required=True, help="pretrained weights, such as squeezenet1_1.safetensors")
    add("--train", nargs="+", default=[], choices=["all", *TRAININGS], help="trainings to run or resume")
    add("--out", type=Path, default=Path("runs/few_shot"), help="folder of the runs")
    add("--json", type=Path, help="also write the results to this file; rows it has already are kept")
    add("--figure", type=Path, help="also draw the results to this PNG file")
    add("--words", type=Path, help="folder of a text encoder for zero-shot tasks")
    add("--elsewhere", action="store_true", help="also evaluate features on Omniglot, MNIST, Fashion-MNIST")
    args = parser.parse_args(argv)
    for name in TRAININGS if "all" in args.train else args.train:
        train(name, args)
    jax.config.update("jax_num_cpu_devices", cores())
    report = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    kept = report.get("rows", {})
    rows: dict = {}

    def save(**results) -> None:
        machine = describe_machine(jax.local_devices())
        report.update(machine=machine, jaxmeta=jm.__version__, episodes=EPISODES, **results)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")

    def add_row(name: str, row: dict) -> None:
        rows[name] = row
        print_row(name, row)
        save(rows=ordered({**kept, **rows}))

    fixed = {
        "pixels": (lambda x: jnp.reshape(x, (len(x), -1)), ["simple_shot", "simple_shot_centred"]),
        "SqueezeNet": (jm.features(args.weights), list(HEADS)),
    }
    for name, (embed, heads) in fixed.items():
        measured = kept.get(name) or {"heads": feature_accuracies(embed, heads, 84, args), "size": 84}
        add_row(name, measured)
    for name in TRAININGS:
        if name in kept:
            add_row(name, kept[name])
        elif (folder_of(name, args.out) / "report.json").exists():
            add_row(name, row_of_run(name, args))
    complete = [name for name in _SOURCES if (folder_of(name, args.out) / "report.json").exists()]
    trained = {name: jm.features(folder_of(name, args.out)) for name in complete}
    if args.words:
        file = args.out / "word_vectors.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        settings = {"ways": 2, "shots": 1, "queries": 1, "data": args.data, "min_styles": STYLES}
        splits = [jm.tasks.emoji(split, **settings) for split in ("train", "validation", "test")]
        write_word_vectors(args.words, [name for tasks in splits for name in tasks.classes], file)
        sources = {"SqueezeNet": (fixed["SqueezeNet"][0], 84)}
        sources |= {name: (embed, rows[name]["size"]) for name, embed in trained.items()}
        found = {name: zero_shot(embed, size, file, args) for name, (embed, size) in sources.items()}
        for name, values in found.items():
            print_row(f"{name}, zero-shot", {"heads": {"words": values}})
        save(zero_shot=found)
    if args.elsewhere:
        measured: dict = {}
        # Images of 28 pixels have no details that 224 would show better than 112.
        sources = {"SqueezeNet": (jm.features(args.weights, size=112), list(HEADS))}
        sources |= {name: (embed, _TRAINED_HEADS) for name, embed in trained.items()}
        for name, row in elsewhere(sources, args):
            measured[name] = row
            save(elsewhere=measured)
    for ways in (5, 20):
        print(f"\n{ways}-way accuracy in %, with intervals of at most ± {100 * widest(rows):.1f}\n")
        print(table(rows, ways))
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
