"""Benchmark of how time and memory of a meta-step grow, and of what the first call of `jaxmeta train` takes.

    python benchmarks/growth.py [--axes tasks …] [--rounds R] [--json FILE] [--figure FILE]

The meta-step is second-order MAML with a strided Conv4-32 on 28×28×1 images: 8 tasks of 5 ways and 1 shot, 1
query per class and 1 inner step. Along each axis one of these numbers varies and the others stay. Time is the
median of rounds in which the numbers of an axis take turns; memory is what the compiled program allocates on
each device, arguments included.

If doubling a number doubles the cost, the exponent p of cost ∝ number^p is 1. It is fitted to the upper half
of an axis, where fixed costs matter least. That of the side of images is of their pixels.

The first call is `jaxmeta train` with 1 step and 20 test tasks in a process of its own, without a compilation
cache: starting Python, importing JAX, Flax and optax, importing jaxmeta, tracing, lowering to StableHLO,
compiling, and the rest, which is reading arguments, drawing tasks, running and writing files.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from machine import cores, describe_machine
from rows import ConvRow
from throughput import Ours, time_rounds

import jaxmeta as jm

BASE = ConvRow(
    (28, 28, 1), 32, strided=True, features=32, queries=1, inner_steps=1, inner_lr=0.01, meta_batch=8
)
AXES = {
    "tasks": ("meta_batch", (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    "inner steps": ("inner_steps", (1, 2, 5, 10, 20, 50, 100)),
    "ways": ("ways", (5, 10, 20, 50, 100, 200)),
    "image side": ("image", (28, 56, 84, 112, 168, 224)),
}
# The costs of a meta-step, each with its label and unit in the figure.
COSTS = {"median_s": ("time of a meta-step, ms", 1e3), "memory_bytes": ("memory, MB", 1e-6)}
PARTS = ("Python", "import JAX, Flax, optax", "import jaxmeta", "trace", "lower", "compile", "rest")
# Names of JAX's monitoring events. Tracing contains the lowering and compiling of what runs while it lasts.
EVENTS = {
    "/jax/core/compile/backend_compile_duration": "compile",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/jaxpr_trace_duration": "trace",
}
FIRST_CALL = """
import json, sys, time
begun = time.time()
import flax, jax, optax
libraries = time.time()
import jaxmeta.cli
package = time.time()
events = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: events.append((name, time.time() - seconds, time.time())))
sys.argv[0] = "jaxmeta"
try:
    jaxmeta.cli.program()
except SystemExit as error:
    if error.code:
        raise
with open("times.json", "w") as file:
    json.dump({"marks": [begun, libraries, package, time.time()], "events": events}, file)
"""


def row_at(axis: str, value: int) -> ConvRow:
    """Return the row with one of its numbers replaced."""
    field, _ = AXES[axis]
    if field == "image":
        return dataclasses.replace(BASE, image=(value, value, 1))
    return dataclasses.replace(BASE, **{field: value})


def exponent(amounts: list[float], costs: list[float]) -> float:
    """Return p of the least-squares fit of cost ∝ amount^p to the upper half of the amounts."""
    start = len(amounts) // 2
    x, y = ([math.log(value) for value in values[start:]] for values in (amounts, costs))
    return statistics.linear_regression(x, y).slope


def measure_axis(axis: str, values: tuple[int, ...], rounds: int) -> dict:
    """Return the time and memory of a meta-step for each of at least three values, and their exponents."""
    steps, points = {}, {}
    for value in values:
        row = row_at(axis, value)
        ours = Ours(row, row.tasks(row.meta_batch, seed=0), "second", None)
        steps[value] = ours.steps
        points[value] = {"memory_bytes": ours.memory_bytes, "compile_s": ours.first_step_s}
    times, _ = time_rounds(steps, lambda: 0.0, rounds, seconds=0.2)
    for value, point in points.items():
        point |= {"seconds": times[value], "median_s": statistics.median(times[value])}
    amounts = [value**2 if axis == "image side" else value for value in values]
    return {
        "points": points,
        "exponents": {cost: exponent(amounts, [point[cost] for point in points.values()]) for cost in COSTS},
    }


def exclusive(intervals: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Return the seconds of each kind, counted once where intervals overlap, for the kind that comes first.

    Examples:
      >>> exclusive({"compile": [(2.0, 3.0)], "trace": [(0.0, 4.0), (1.0, 2.0)]})
      {'compile': 1.0, 'trace': 3.0}
    """
    marks = sorted({mark for spans in intervals.values() for span in spans for mark in span})
    seconds = dict.fromkeys(intervals, 0.0)
    for begin, end in itertools.pairwise(marks):
        for kind, spans in intervals.items():
            if any(first <= begin and end <= last for first, last in spans):
                seconds[kind] += end - begin
                break
    return seconds


def first_call() -> dict[str, float]:
    """Return the seconds of each part of a first call of `jaxmeta train` in a process of its own."""
    arguments = ["train", "--steps", "1", "--episodes", "20", "--out", "run"]
    # Bytecode is written once, as it is by default, and compiled programs never are.
    unset = ("JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        subprocess.run(
            [sys.executable, "-c", FIRST_CALL, *arguments],
            cwd=folder,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        times = json.loads((Path(folder) / "times.json").read_text())
    begun, libraries, package, ended = times["marks"]
    spans = {
        kind: [(first, last) for name, first, last in times["events"] if name == event]
        for event, kind in EVENTS.items()
    }
    compiled = exclusive(spans)
    parts = dict(
        zip(PARTS, (begun - started, libraries - begun, package - libraries), strict=False), **compiled
    )
    parts["rest"] = ended - package - sum(compiled.values())
    return {part: parts[part] for part in PARTS}


def median_call(rounds: int) -> dict[str, float]:
    """Return the median seconds of each part over several first calls, after one that is not counted."""
    calls = [first_call() for _ in range(rounds + 1)][1:]
    return {part: statistics.median(call[part] for call in calls) for part in PARTS}


def draw(axes: dict, call: dict | None, file: Path) -> None:
    """Draw time and memory along each axis, and the parts of the first call."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 6.5), layout="constrained")
    grid = figure.add_gridspec(3, len(axes), height_ratios=(3, 3, 1))
    for column, (axis, found) in enumerate(axes.items()):
        values = [int(value) for value in found["points"]]
        for line, (cost, (label, unit)) in enumerate(COSTS.items()):
            panel = figure.add_subplot(grid[line, column])
            heights = [unit * point[cost] for point in found["points"].values()]
            panel.loglog(values, heights, "o-", color="tab:blue", markersize=4)
            power = 2 if axis == "image side" else 1
            linear = [heights[-1] * (value / values[-1]) ** power for value in values]
            panel.loglog(values, linear, "--", color="0.6")
            panel.set_ylim(bottom=0.6 * min(heights))
            panel.text(
                0.05,
                0.92,
                f"∝ {'pixels' if power == 2 else axis}^{found['exponents'][cost]:.2f}",
                transform=panel.transAxes,
                va="top",
            )
            panel.grid(alpha=0.3)
            ticks = values if len(values) < 8 else values[::2]
            panel.set_xticks(ticks, [str(value) for value in ticks])
            panel.minorticks_off()
            if column == 0:
                panel.set_ylabel(label)
            if line == 1:
                panel.set_xlabel(axis)
    if call:
        panel = figure.add_subplot(grid[2, :])
        left = 0.0
        shades = plt.get_cmap("cividis")
        for number, (part, seconds) in enumerate(call.items()):
            panel.barh(
                0, seconds, left=left, color=shades(number / len(call)), label=f"{part}, {seconds:.1f} s"
            )
            left += seconds
        panel.set_yticks([])
        panel.set_xlabel(f"first call of `jaxmeta train`, {left:.1f} s")
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(call), fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="numbers to vary")
    add("--rounds", type=int, default=5, help="rounds to take the median over")
    add("--calls", type=int, default=3, help="first calls to take the median over; 0 leaves them out")
    add("--json", type=Path, help="also write the results to this file")
    add("--figure", type=Path, help="also draw the results to this PNG file")
    args = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", cores())
    jax.config.update("jax_enable_compilation_cache", False)
    machine = describe_machine(jax.local_devices())
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    axes = {}
    for axis in args.axes:
        axes[axis] = found = measure_axis(axis, AXES[axis][1], args.rounds)
        print(f"\n{axis:>12}{'ms':>10}{'MB':>10}{'first step':>13}")
        for value, point in found["points"].items():
            print(
                f"{value:12}{1e3 * point['median_s']:10.1f}{point['memory_bytes'] / 1e6:10.1f}"
                f"{point['compile_s']:11.1f} s"
            )
        of_time, of_memory = (found["exponents"][cost] for cost in COSTS)
        print(f"exponents: time {of_time:.2f}, memory {of_memory:.2f}", flush=True)
    call = median_call(args.calls) if args.calls else None
    if call:
        print("\nfirst call of jaxmeta train: " + ", ".join(f"{part} {s:.2f} s" for part, s in call.items()))
    if args.json:
        report = {
            "machine": machine,
            "jaxmeta": jm.__version__,
            "rounds": args.rounds,
            "calls": args.calls,
            "axes": axes,
            "first_call": call,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.figure:
        draw(axes, call, args.figure)


if __name__ == "__main__":
    main()
