"""Benchmark of metric-based methods beyond their training tasks: more ways, other images, zero-shot tasks.

    python benchmarks/metric_based.py [--omniglot RUN …] [--mnist DIR] [--zero-shot RUN] [--json FILE]

--omniglot: run folders of `jaxmeta train METHOD --tasks omniglot`, with any number of training ways. Each run
is tested on Omniglot, 20-way 1-shot, and on MNIST's test part in DIR, 10-way 1-shot with 10 queries a digit,
without training on digits. The baseline is nearest neighbours on pixels.

--zero-shot: the run folder of `jaxmeta train --preset glyphs-zero-shot`. The baseline is a linear map from
metadata to pixels, fitted by least squares to drawings of all training classes; it predicts the class whose
predicted image is nearest to the query.

Each test has 1,000 tasks, uses the seed of the run, and is inductive and transductive.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from machine import cores, describe_machine

import jaxmeta as jm
from jaxmeta.cli import build, sources
from jaxmeta.cli.config import load_config
from jaxmeta.cli.run import evaluation_key, params_of

EPISODES = 1000


def pixels() -> jm.Learner:
    """Build a learner without parameters: nearest neighbours on pixels."""
    flat = lambda key, x: {}, lambda params, x: x.reshape(len(x), -1)
    return jm.kernel_classifier(flat, similarity="euclidean", reduce="nearest", norm="support")


def linear_map(tasks: jm.TaskDistribution, key, batches: int = 200) -> tuple[jm.Learner, np.ndarray]:
    """Return a learner that predicts a class's image from its metadata, and its least-squares parameters."""

    @jax.jit
    def examples(key):
        support, query = tasks.sample(key)
        return support.x[query.y], query.x.reshape(query.x.shape[0], -1)

    metadata, images = zip(
        *(jax.device_get(examples(each)) for each in jax.random.split(key, batches)), strict=True
    )
    x = np.concatenate(metadata).astype(np.float64)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    y = np.concatenate(images).astype(np.float64)
    params = jnp.asarray(np.linalg.lstsq(x, y, rcond=None)[0], jnp.float32)

    def adapt(params, support, key):
        del key
        return support.x @ params[:-1] + params[-1:]

    def predict(params, adapted, x, mask=None):
        del params, mask
        x = x.reshape(len(x), -1)
        return -(jnp.square(x[:, None] - adapted[None]).sum(-1))

    return jm.Learner(lambda key, task: params, adapt, predict, lambda *args: None), params


def evaluate(learner, params, tasks, seed: int) -> dict:
    result = jm.evaluate(learner, params, tasks, episodes=EPISODES, key=evaluation_key(seed))
    return {"mean": result.mean, "ci95": result.ci95}


def evaluate_run(folder: Path, tasks) -> dict:
    """Return the transductive and the inductive accuracy of a run on `tasks`."""
    config = load_config(folder)
    params = params_of(folder, config)
    return {
        row: evaluate(build.learner_of(config, norm), params, tasks, config.run.seed)
        for row, norm in config.names().facts.rows.items()
    }


def format_accuracies(accuracies: dict) -> str:
    cells = (f"{row} {100 * v['mean']:.2f} ± {100 * v['ci95']:.2f} %" for row, v in accuracies.items())
    return ", ".join(cells)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--omniglot", nargs="+", type=Path, default=[], help="run folders")
    add("--mnist", type=Path, help="folder with MNIST's test part, t10k-*-ubyte.gz")
    add("--zero-shot", type=Path, help="run folder")
    add("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", cores())
    rows: dict = {}
    digits = None if args.mnist is None else jm.tasks.mnist(ways=10, queries=10, data=args.mnist)
    for folder in args.omniglot:
        config = load_config(folder)
        learner, twenty = config.learner["name"], config.replaced(tasks={"ways": 20})
        rows[learner] = {"omniglot 20-way 1-shot": evaluate_run(folder, sources.tasks_of(twenty, "test"))}
        if digits is not None:
            rows[learner]["mnist 10-way 1-shot"] = evaluate_run(folder, digits)
        for test, accuracies in rows[learner].items():
            print(f"{learner}, {test}: {format_accuracies(accuracies)}", flush=True)
    if digits is not None:
        rows["pixels"] = {"mnist 10-way 1-shot": {"inductive": evaluate(pixels(), {"model": {}}, digits, 0)}}
        print(
            f"nearest pixels, mnist 10-way 1-shot: {format_accuracies(rows['pixels']['mnist 10-way 1-shot'])}"
        )
    if args.zero_shot is not None:
        config = load_config(args.zero_shot)
        tasks = sources.tasks_of(config, "test")
        linear, params = linear_map(sources.tasks_of(config, "train"), jax.random.key(0))
        name = f"glyphs {config.ways}-way zero-shot"
        rows["zero-shot"] = {
            name: evaluate_run(args.zero_shot, tasks),
            f"{name}, linear map to pixels": {"inductive": evaluate(linear, params, tasks, config.run.seed)},
        }
        for test, accuracies in rows["zero-shot"].items():
            print(f"{test}: {format_accuracies(accuracies)}")
    if args.json:
        machine = describe_machine(jax.local_devices())
        report = {"machine": machine, "jaxmeta": jm.__version__, "episodes": EPISODES, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
