"""Benchmark of the memory and time of a meta-gradient, by number of inner steps and memory mode.

    python benchmarks/memory.py [--network conv4|vit] [--steps 1 2 5 10 20 50 100] [--rounds R] [--json FILE]

The task has 5 ways, 1 shot and one query per class; the inner optimizer is SGD. For each mode the results
are the temporary memory of the compiled program, according to the compiler, the bytes of the parameters that
the inner loop adapts, and the time of one meta-gradient. The modes are timed in alternation, so that other
load on the machine affects all of them equally. Times are medians over rounds. "MB ratio" and "ms ratio" are
ratios to the first mode; that of times is the median over rounds of the ratio within a round.

conv4: Conv4-32 on 84×84×3 images, as in mini-ImageNet, with each memory mode of `jm.inner_loop`, with
first-order and with implicit gradients. vit: a vision transformer on 32×32×3 images (patches of 8, width 384,
6 heads, 6 blocks), of which the inner loop adapts all leaves, or only the factors of `jm.nn.lora`. Both
meta-learn all leaves.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from machine import describe_machine

import jaxmeta as jm

LORA = {"adapts": "lora"}
# network -> mode -> settings of MAML. The network has LoRA factors in modes that adapt "lora".
MODES = {
    "conv4": {
        "store": {"memory": "store"},
        "recompute": {"memory": "recompute"},
        "forward_over_reverse": {"memory": "forward_over_reverse"},
        "first order": {"order": "first"},
        "implicit": {"order": "implicit", "proximal": 2.0},
    },
    "vit": {
        "all, store": {"memory": "store"},
        "lora, store": {"memory": "store", **LORA},
        "all, recompute": {"memory": "recompute"},
        "lora, recompute": {"memory": "recompute", **LORA},
        "all, first order": {"order": "first"},
        "lora, first order": {"order": "first", **LORA},
    },
}
IMAGE = {"conv4": 84, "vit": 32}


def make_task(image: int) -> jm.Task:
    """Draw a task of random images whose classes differ in their means."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(5, image, image, 3))

    def part():
        x = means + rng.normal(size=means.shape)
        return jm.Batch(jnp.asarray(x, jnp.float32), jnp.arange(5, dtype=jnp.int32), ways=5)

    return jm.Task(part(), part())


def make_network(args: argparse.Namespace, settings: dict):
    if args.network == "conv4":
        return jm.nn.Conv4(ways=5, filters=args.filters)
    width = args.width
    vit = jm.nn.ViT(patch=8, width=width, depth=6, heads=6, mlp=4 * width, image_size=args.image, ways=5)
    return jm.nn.lora(vit, rank=args.rank) if "adapts" in settings else vit


def adapted_bytes(params: dict, settings: dict) -> int:
    adapted = params["model"]["lora"] if "adapts" in settings else params["model"]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(adapted))


def compile_gradient(settings: dict, steps: int, task: jm.Task, args: argparse.Namespace):
    """Compile the meta-gradient of MAML; return the program, its arguments and the compile time in s."""
    learner = jm.maml(make_network(args, settings), inner_lr=0.01, inner_steps=steps, **settings)
    params = jax.jit(learner.init)(jax.random.key(0), task)

    def gradient(params, task, key):
        return jax.grad(lambda params: learner.loss(params, task, key)[0])(params)

    started = time.perf_counter()
    arguments = params, task, jax.random.key(1)
    compiled = jax.jit(gradient).lower(*arguments).compile()
    return compiled, arguments, time.perf_counter() - started


def run_row(steps: int, args: argparse.Namespace, task: jm.Task) -> dict:
    programs, results, gradients = {}, {}, {}
    modes = MODES[args.network]
    for mode in args.modes:
        compiled, arguments, compile_s = compile_gradient(modes[mode], steps, task, args)
        gradients[mode] = ravel_pytree(jax.block_until_ready(compiled(*arguments)))[0]
        results[mode] = {
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "adapted_bytes": adapted_bytes(arguments[0], modes[mode]),
            "compile_s": compile_s,
            "seconds": [],
        }
        programs[mode] = compiled, arguments
    for _ in range(args.rounds):
        for mode, (compiled, arguments) in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            results[mode]["seconds"].append(time.perf_counter() - started)
    first = args.modes[0]
    for mode, row in results.items():
        row["median_s"] = statistics.median(row["seconds"])
        pairs = zip(row["seconds"], results[first]["seconds"], strict=True)
        row["time_ratio"] = statistics.median(seconds / first_s for seconds, first_s in pairs)
        row["memory_ratio"] = row["temp_bytes"] / results[first]["temp_bytes"]
        if all("memory" in modes[name] and modes[name].get("adapts") is None for name in (mode, first)):
            # Both compute the same gradient; float32 rounding errors grow with the number of steps.
            difference = jnp.linalg.norm(gradients[mode] - gradients[first])
            row["difference"] = float(difference / jnp.linalg.norm(gradients[first]))
    return results


def print_row(steps: int, results: dict) -> None:
    for mode, row in results.items():
        print(
            f"{steps:5d}  {mode:21}{row['adapted_bytes'] / 1e6:11.2f}{row['temp_bytes'] / 1e6:9.1f}"
            f"{1e3 * row['median_s']:10.1f}{row['memory_ratio']:9.3f}{row['time_ratio']:9.2f}",
            flush=True,
        )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", choices=list(MODES), default="conv4", help="network to measure")
    add("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50, 100], help="inner steps")
    add("--modes", nargs="+", help="modes to measure; by default all of the network")
    add("--rounds", type=int, default=7, help="number of timing rounds")
    add("--filters", type=int, default=32, help="channels of conv4's layers")
    add("--width", type=int, default=384, help="width of vit's tokens")
    add("--rank", type=int, default=4, help="rank of the LoRA factors of vit")
    add("--image", type=int, help="side of the images in pixels; by default 84 for conv4, 32 for vit")
    add("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    args.modes = args.modes or list(MODES[args.network])
    args.image = args.image or IMAGE[args.network]
    if unknown := sorted({*args.modes} - MODES[args.network].keys()):
        parser.error(f"--modes: got {unknown}; {args.network} has {list(MODES[args.network])}")
    # With the cache, compile times would be times of reading a file.
    jax.config.update("jax_enable_compilation_cache", False)
    machine = describe_machine(jax.local_devices()[:1])
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"\nsteps  {'mode':21}{'adapted MB':>11}{'temp MB':>9}{'ms':>10}{'MB ratio':>9}{'ms ratio':>9}")
    task, rows = make_task(args.image), {}
    for steps in args.steps:
        rows[steps] = run_row(steps, args, task)
        print_row(steps, rows[steps])
    if args.json:
        sizes = {"conv4": ("filters",), "vit": ("width", "rank")}[args.network]
        settings = {name: getattr(args, name) for name in ("network", *sizes, "image", "rounds")}
        report = {"machine": machine, "settings": settings, "jaxmeta": jm.__version__, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
