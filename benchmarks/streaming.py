"""Compare the speed of training from a stream of records on disk with training from device memory.

    python benchmarks/streaming.py [--images N] [--steps N] [--rounds R] [--workers W] [--json FILE]

Both are `jm.train` on the same prepared images with mini-ImageNet's shapes: second-order MAML, 5-way 1-shot,
15 queries, Conv4-32, 5 inner steps, 4 tasks of 84×84×3. They alternate in each round. The rate leaves out
compilation (`Progress.steps_per_second`), and the ratio is the median over rounds. The time to read one batch
alone shows how far the stream is from limiting the training.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import optax
from machine import cores, describe_machine

import jaxmeta as jm
from jaxmeta.tasks.prepared import prepare

CLASSES, SHAPE = 64, (84, 84, 3)
WARM_UP = 8  # untimed first steps, and steps between reports
PROTOCOL = {"ways": 5, "shots": 1, "queries": 15}
META_BATCH = 4


def make_images(count: int) -> jm.tasks.Prepared:
    """Return prepared noise images, `count` for each of mini-ImageNet's 64 training classes."""
    rng = np.random.default_rng(0)
    images = (
        (f"class{i:02d}", rng.integers(0, 256, SHAPE, np.uint8)) for i in range(CLASSES) for _ in range(count)
    )
    return prepare("noise", str(count), SHAPE, images, expected=CLASSES * count)


def rate_of(tasks, steps: int, key) -> float:
    """Return the meta-steps per second of `jm.train` over its last `steps` steps."""
    rates = []
    learner = jm.maml(jm.nn.Conv4(ways=5, filters=32), inner_lr=0.05, inner_steps=5)
    jm.train(
        learner,
        tasks,
        optax.adam(1e-3),
        steps=steps + WARM_UP,
        meta_batch=META_BATCH,
        key=key,
        log_every=WARM_UP,
        report=lambda event: rates.append(event.steps_per_second),
    )
    # The first report includes compilation and cold caches.
    return statistics.harmonic_mean(rates[1:])


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=int, default=100, help="images of each of the 64 classes (mini-ImageNet: 600)"
    )
    parser.add_argument("--steps", type=int, default=16, help="timed meta-steps in a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds to take the median over")
    parser.add_argument("--workers", type=int, default=0, help="reader processes; 0: threads")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", min(cores(), META_BATCH))

    key = jax.random.key(0)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["JAXMETA_CACHE"] = cache
        images = make_images(args.images)
        memory = jm.tasks.from_prepared(images, **PROTOCOL)
        stream = jm.tasks.stream(images, key=key, meta_batch=META_BATCH, workers=args.workers, **PROTOCOL)
        rounds = []
        for _ in range(args.rounds):
            rates = {"memory": rate_of(memory, args.steps, key), "stream": rate_of(stream, args.steps, key)}
            rounds.append(rates)
            print("  ".join(f"{name} {rate:.3f} steps/s" for name, rate in rates.items()), flush=True)
        started = time.perf_counter()
        count = 50
        for tasks in islice(stream.batches(0), count):
            jax.block_until_ready(tasks)
        batch_s = (time.perf_counter() - started) / count

    ratio = statistics.median(r["stream"] / r["memory"] for r in rounds)
    result = {
        "machine": describe_machine(jax.local_devices()),
        "images": CLASSES * args.images,
        "workers": args.workers,
        "steps": args.steps,
        "rounds": rounds,
        "stream / memory": ratio,
        "batch_ms": 1e3 * batch_s,
    }
    print(f"stream / memory: {ratio:.3f}; reading alone takes {1e3 * batch_s:.1f} ms per batch")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
