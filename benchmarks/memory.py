"""What a meta-gradient takes, in memory and time, against the number of inner steps, by memory mode.

    python benchmarks/memory.py [--steps 1 2 5 10 20 50 100] [--rounds R] [--json FILE]

One task of mini-ImageNet's shape: 5-way 1-shot with one query a class, Conv4-32 on 84×84×3, inner SGD. Of
each mode of `jm.inner_loop`, of first order and of implicit gradients: the compiled program's temporary
memory, which the compiler states, and the time of one meta-gradient. Modes take turns, round after round,
so that what else the machine does falls on all alike; times are medians over rounds, "× store" is the
median over rounds of the ratio within a round.
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

MODES = {
    "store": {"memory": "store"},
    "recompute": {"memory": "recompute"},
    "forward_over_reverse": {"memory": "forward_over_reverse"},
    "first order": {"order": "first"},
    "implicit": {"order": "implicit", "proximal": 2.0},
}


def make_task(image: int) -> jm.Task:
    """Random images, the classes apart by their means."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(5, image, image, 3))

    def part():
        x = means + rng.normal(size=means.shape)
        return jm.Batch(jnp.asarray(x, jnp.float32), jnp.arange(5, dtype=jnp.int32), ways=5)

    return jm.Task(part(), part())


def compile_gradient(settings: dict, steps: int, task: jm.Task, filters: int):
    """The meta-gradient of MAML as a compiled program, its arguments, and the seconds it took to compile."""
    network = jm.nn.Conv4(ways=5, filters=filters)
    learner = jm.maml(network, inner_lr=0.01, inner_steps=steps, **settings)
    params = jax.jit(learner.init)(jax.random.key(0), task)

    def gradient(params, task, key):
        return jax.grad(lambda params: learner.loss(params, task, key)[0])(params)

    started = time.perf_counter()
    arguments = params, task, jax.random.key(1)
    compiled = jax.jit(gradient).lower(*arguments).compile()
    return compiled, arguments, time.perf_counter() - started


def run_row(steps: int, args: argparse.Namespace, task: jm.Task) -> dict:
    programs, found, gradients = {}, {}, {}
    for mode in args.modes:
        compiled, arguments, compile_s = compile_gradient(MODES[mode], steps, task, args.filters)
        gradients[mode] = ravel_pytree(jax.block_until_ready(compiled(*arguments)))[0]
        found[mode] = {
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "compile_s": compile_s,
            "seconds": [],
        }
        programs[mode] = compiled, arguments
    for _ in range(args.rounds):
        for mode, (compiled, arguments) in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            found[mode]["seconds"].append(time.perf_counter() - started)
    for mode, row in found.items():
        row["median_s"] = statistics.median(row["seconds"])
        if "store" in found:
            store = found["store"]
            pairs = zip(row["seconds"], store["seconds"], strict=True)
            row["time_ratio"] = statistics.median(own / other for own, other in pairs)
            row["memory_ratio"] = row["temp_bytes"] / store["temp_bytes"]
            if "memory" in MODES[mode]:
                # They are one gradient; 100 steps in float32 drift apart, the more the longer.
                difference = jnp.linalg.norm(gradients[mode] - gradients["store"])
                row["difference"] = float(difference / jnp.linalg.norm(gradients["store"]))
    return found


def print_row(steps: int, found: dict) -> None:
    for mode, row in found.items():
        ratios = ""
        if "time_ratio" in row:
            ratios = f"{row['memory_ratio']:9.3f}{row['time_ratio']:9.2f}"
        print(
            f"{steps:5d}  {mode:21}{row['temp_bytes'] / 1e6:9.1f}{1e3 * row['median_s']:10.1f}{ratios}",
            flush=True,
        )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50, 100], help="inner steps")
    add("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    add("--rounds", type=int, default=7)
    add("--filters", type=int, default=32, help="channels of the network's layers")
    add("--image", type=int, default=84, help="side of the images")
    add("--json", type=Path, help="also write the result here")
    args = parser.parse_args(argv)
    # Compile times would otherwise be those of reading a file.
    jax.config.update("jax_enable_compilation_cache", False)
    machine = describe_machine(jax.local_devices()[:1])
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"\nsteps  {'mode':21}{'temp MB':>9}{'ms':>10}{'× store':>9}{'× store':>9}")
    task, rows = make_task(args.image), {}
    for steps in args.steps:
        rows[steps] = run_row(steps, args, task)
        print_row(steps, rows[steps])
    if args.json:
        settings = {"filters": args.filters, "image": args.image, "rounds": args.rounds}
        report = {"machine": machine, "settings": settings, "jaxmeta": jm.__version__, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
