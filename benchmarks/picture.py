"""Draw the picture of README.md: a learner's predictions for one task before and after adaptation.

    jaxmeta train --out runs/maml && python benchmarks/picture.py runs/maml --png picture.png

The test task is drawn with the seed `--seed`, and the picture shows the first query of each class.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import jaxmeta as jm

matplotlib.use("Agg")

RIGHT, WRONG, OTHER = "#2f7d4f", "#c0392b", "#c9ced6"
SLOTS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def first_of_each_class(labels: np.ndarray, ways: int) -> list[int]:
    """Return the position of the first example of each class."""
    return [int(np.flatnonzero(labels == way)[0]) for way in range(ways)]


def show(axes, image: np.ndarray, title: str = "") -> None:
    """Draw an image without axes; grey images are inverted, to look like ink on paper."""
    grey = image.shape[-1] == 1
    axes.imshow(1 - image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=11, pad=3)


def show_probabilities(axes, probabilities: np.ndarray, label: int) -> None:
    """Draw the probability of each class as a bar: the answer in green or red, the others in grey."""
    answer = int(probabilities.argmax())
    colours = [OTHER] * len(probabilities)
    colours[answer] = RIGHT if answer == label else WRONG
    axes.bar(range(len(probabilities)), probabilities, color=colours)
    axes.set_ylim(0, 1)
    axes.set_xticks(range(len(probabilities)), SLOTS[: len(probabilities)], fontsize=9)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)


def draw(path: Path, task: jm.Task, before: np.ndarray, after: np.ndarray) -> None:
    """Draw support set, queries, and the class probabilities of the queries before and after adapting."""
    ways = int(task.support.ways)
    support = first_of_each_class(np.asarray(task.support.y), ways)
    queries = first_of_each_class(np.asarray(task.query.y), ways)
    figure = Figure(figsize=(9.6, 5.0), layout="constrained")
    grid = figure.subplots(4, ways, gridspec_kw={"height_ratios": [1.25, 1.25, 0.8, 0.8]})
    rows = (
        "support set:\none example per class",
        "query images",
        "predictions\nbefore adapting",
        "predictions\nafter adapting",
    )
    for axes, name in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=14, fontsize=11)
    for column in range(ways):
        query = queries[column]
        show(grid[0, column], np.asarray(task.support.x[support[column]]), SLOTS[column])
        show(grid[1, column], np.asarray(task.query.x[query]))
        show_probabilities(grid[2, column], before[query], column)
        show_probabilities(grid[3, column], after[query], column)
    marks = [Patch(color=RIGHT, label="right"), Patch(color=WRONG, label="wrong")]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def probabilities(learner: jm.Learner, params, task: jm.Task) -> jax.Array:
    """Return the class probabilities of each query, after adaptation to the support set."""
    adapted = learner.adapt(params, task.support, jax.random.key(0))
    return jax.nn.softmax(learner.predict(params, adapted, task.query.x))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder of `jaxmeta train`")
    parser.add_argument("--png", type=Path, default=Path("picture.png"), help="file for the picture")
    parser.add_argument("--seed", type=int, default=0, help="seed of the task")
    args = parser.parse_args()

    adapting, params = jm.load_run(args.run)
    # The same learner without inner steps: the initialisation that all tasks start from.
    starting = jm.maml(jm.nn.StridedConv4(ways=5), eval_steps=0, norm="support")
    task = jm.tasks.glyphs("test", ways=5, shots=1, queries=5).sample(jax.random.key(args.seed))
    before, after = (np.asarray(probabilities(learner, params, task)) for learner in (starting, adapting))
    draw(args.png, task, before, after)
    right = [float((jnp.argmax(p, -1) == task.query.y).mean()) for p in (before, after)]
    print(f"{args.png}: accuracy on this task {right[0]:.0%} before, {right[1]:.0%} after")


if __name__ == "__main__":
    main()
