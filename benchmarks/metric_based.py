"""What runs of metric-based methods do beyond their own test: more ways, other images, no images at all.

    python benchmarks/metric_based.py [--omniglot RUN …] [--mnist DIR] [--zero-shot RUN] [--json FILE]

--omniglot: folders of runs of `jaxmeta train METHOD --tasks omniglot`, of any number of training ways. Each
is tested on Omniglot, 20-way 1-shot, and on MNIST's test part in DIR, 10-way 1-shot with 10 queries a digit,
whose digits it has never seen. Beside it, nearest neighbours on pixels.

--zero-shot: the folder of a run of `jaxmeta train --preset glyphs-zero-shot`. Beside it, a linear map from
metadata to pixels, least squares over drawings of all training classes, with the nearest of the predicted
images.

1,000 tasks each, with the seed of the run, inductive and transductive.
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
    """Nearest neighbours on pixels; there is nothing to learn."""
    flat = lambda key, x: {}, lambda params, x: x.reshape(len(x), -1)
    return jm.kernel_classifier(flat, similarity="euclidean", reduce="nearest", norm="support")


def linear_map(tasks: jm.TaskDistribution, key, batches: int = 200) -> tuple[jm.Learner, np.ndarray]:
    """A learner that predicts each class's image from its metadata, and its least-squares map."""

    @jax.jit
    def examples(key):
        support, query = tasks.sample(key)
        return support.x[query.y], query.x.reshape(query.x.shape[0], -1)

    given, wanted = zip(
        *(jax.device_get(examples(each)) for each in jax.random.split(key, batches)), strict=True
    )
    x = np.concatenate(given).astype(np.float64)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    y = np.concatenate(wanted).astype(np.float64)
    params = jnp.asarray(np.linalg.lstsq(x, y, rcond=None)[0], jnp.float32)

    def adapt(params, support, key):
        del key
        return support.x @ params[:-1] + params[-1:]

    def predict(params, adapted, x, mask=None):
        del params, mask
        x = x.reshape(len(x), -1)
        return -(jnp.square(x[:, None] - adapted[None]).sum(-1))

    return jm.Learner(lambda key, task: params, adapt, predict, lambda *args: None), params


def evaluated(learner, params, tasks, seed: int) -> dict:
    found = jm.evaluate(learner, params, tasks, episodes=EPISODES, key=evaluation_key(seed))
    return {"mean": found.mean, "ci95": found.ci95}


def both(folder: Path, tasks) -> dict:
    """Transductive and inductive accuracy of a run on `tasks`."""
    config = load_config(folder)
    params = params_of(folder, config)
    return {
        row: evaluated(build.learner_of(config, norm), params, tasks, config.run.seed)
        for row, norm in config.names().facts.rows.items()
    }


def in_words(found: dict) -> str:
    return ", ".join(f"{row} {100 * v['mean']:.2f} ± {100 * v['ci95']:.2f} %" for row, v in found.items())


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--omniglot", nargs="+", type=Path, default=[], help="folders of runs")
    add("--mnist", type=Path, help="folder with MNIST's test part, t10k-*-ubyte.gz")
    add("--zero-shot", type=Path, help="folder of a run")
    add("--json", type=Path, help="also write the results here")
    args = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", cores())
    rows: dict = {}
    digits = None if args.mnist is None else jm.tasks.mnist(ways=10, queries=10, data=args.mnist)
    for folder in args.omniglot:
        config = load_config(folder)
        learner, more = config.learner["name"], config.replaced(tasks={"ways": 20})
        rows[learner] = {"omniglot 20-way 1-shot": both(folder, sources.tasks_of(more, "test"))}
        if digits is not None:
            rows[learner]["mnist 10-way 1-shot"] = both(folder, digits)
        for test, found in rows[learner].items():
            print(f"{learner}, {test}: {in_words(found)}", flush=True)
    if digits is not None:
        rows["pixels"] = {"mnist 10-way 1-shot": {"inductive": evaluated(pixels(), {"model": {}}, digits, 0)}}
        print(f"nearest pixels, mnist 10-way 1-shot: {in_words(rows['pixels']['mnist 10-way 1-shot'])}")
    if args.zero_shot is not None:
        config = load_config(args.zero_shot)
        test = sources.tasks_of(config, "test")
        linear, params = linear_map(sources.tasks_of(config, "train"), jax.random.key(0))
        name = f"glyphs {config.ways}-way zero-shot"
        rows["zero-shot"] = {
            name: both(args.zero_shot, test),
            f"{name}, linear map to pixels": {"inductive": evaluated(linear, params, test, config.run.seed)},
        }
        for test, found in rows["zero-shot"].items():
            print(f"{test}: {in_words(found)}")
    if args.json:
        machine = describe_machine(jax.local_devices())
        report = {"machine": machine, "jaxmeta": jm.__version__, "episodes": EPISODES, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
