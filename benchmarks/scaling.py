"""Cost of a meta-step on 1 to 256 devices, counted in compiled programs, and predicted step times.

    python benchmarks/scaling.py [--models conv4 …] [--devices 1 2 8 64 256] [--topology v5e:2x4 …]
                                 [--gpu FILE] [--json FILE] [--png FILE]

Nothing is run or measured. `jm.meta_step` is lowered with shapes in place of arrays and compiled for virtual
CPU devices and, where the package libtpu of `jax[tpu]` is installed, by the TPU compiler for a TPU topology,
which needs no TPU. `--gpu` reads the counts of a GPU's programs from a file that gpu_program.py wrote for
these models. The number of tasks per device is constant (weak scaling), and all tasks of a device run at
once, as on accelerators. For the program of one device, `hlo.py` counts:

- collectives: kind, number, operand bytes and devices, each as often as a step runs it. Only gradients, loss
  and metrics should cross devices, once per meta-step;
- bytes moved: 2 (n − 1)/n · S, the bytes that a device sends in a ring all-reduce of S bytes;
- operations: 2 × multiply-adds of matrix products and convolutions, without products with zeros of padding or
  dilation;
- memory: arguments, results that do not reuse an argument's buffer, and temporaries;
- main-memory traffic: bytes that a TPU's or GPU's program reads and writes there. A CPU's program says little
  about other hardware, so its traffic is estimated: arguments and results once, temporaries written and read
  once;
- launches of kernels, of a GPU's program only;
- cycles: the TPU compiler's own estimate of the program's run time.

A predicted step is its work followed by the all-reduce, without overlap; efficiency is the share of work. The
work is a roofline, max(operations / peak, traffic / memory bandwidth, time of launches), a lower bound, which
makes the efficiency a lower bound as well; for a TPU's program it is also the compiler's estimate. Left out
are input, the host, devices that wait for one another, and other traffic on the network.
"""

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from hlo import collectives, cycles, operations, read_program, traffic
from jax.sharding import NamedSharding, PartitionSpec
from machine import describe_machine

import jaxmeta as jm
from jaxmeta.cli.build import learner_of
from jaxmeta.cli.config import Chosen, base_of, resolve
from jaxmeta.training import sharding

PREDICTED = [2**i for i in range(9)]
LABEL = "predicted, not measured"
ROOFLINE, COMPILER = "roofline", "compiler's cycles"


@dataclasses.dataclass(frozen=True)
class Model:
    """A learner and the tasks of one device, with `shots` and `queries` per class."""

    description: str
    learner: Callable[[], jm.Learner]
    image: tuple[int, ...]
    queries: int
    tasks: int
    ways: int = 5
    shots: int = 1

    def batch(self, tasks: int) -> jm.Task:
        """Return the shapes of a batch of tasks."""

        def part(per_class: int) -> jm.Batch:
            x = jax.ShapeDtypeStruct((tasks, self.ways * per_class, *self.image), jnp.float32)
            return jm.Batch(x, jax.ShapeDtypeStruct(x.shape[:2], jnp.int32), ways=self.ways)

        return jm.Task(part(self.shots), part(self.queries))


MODELS = {
    "conv4": Model(
        "second-order MAML, one inner step, strided Conv4-64 (preset omniglot)",
        lambda: learner_of(resolve(base_of(Chosen(preset="omniglot")), {})),
        (28, 28, 1),
        queries=3,
        tasks=4,
    ),
    "resnet12": Model(
        "prototypical networks, ResNet-12 on images of mini-ImageNet's size",
        lambda: jm.prototypical(jm.nn.ResNet12()),
        (84, 84, 3),
        queries=15,
        tasks=2,
    ),
    "vit-b": Model(
        "prototypical networks, ViT-B/16",
        lambda: jm.prototypical(jm.nn.ViT()),
        (224, 224, 3),
        queries=5,
        tasks=1,
    ),
}


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Published rates of a device and of its network.

    Attributes:
      peak: operations per second on float32 arrays, in JAX's default precision of matrix products.
      bandwidth: memory bandwidth, in bytes per second.
      capacity: memory, in bytes.
      all_reduce: `(bytes, devices) -> (seconds of transfer, seconds of latency)`.
      kind: JAX's name of the device kind, to find programs compiled for it; None if there are none.
      clock: cycles per second; None where the compiler estimates no cycles.
    """

    peak: float
    bandwidth: float
    capacity: float
    all_reduce: Callable[[int, int], tuple[float, float]]
    kind: str | None = None
    clock: float | None = None


def ring_bytes(size: float, devices: int) -> float:
    """Return the bytes that a device sends in a ring all-reduce of `size` bytes."""
    return 2 * (devices - 1) / devices * size


def torus(size: int, devices: int) -> tuple[float, float]:
    """Return the seconds of an all-reduce on a TPU v5e slice, along both axes of a near-square grid at once.

    A chip has 4 ports, two per axis; 1,600 Gbit/s per chip are 50 GB/s per port and direction. An axis
    shorter than the pod's 16 chips is a line, not a ring, and half as fast. Google publishes no latency: 1 µs
    per hop is the Scaling Book's figure.
    """
    side = max(k for k in range(1, math.isqrt(devices) + 1) if devices % k == 0)
    axes = [k for k in (side, devices // side) if k > 1]
    bandwidth = sum(100e9 if k >= 16 else 50e9 for k in axes)
    sent = ring_bytes(size, devices)
    return (sent / bandwidth if sent else 0.0), sum(2 * (k - 1) * 1e-6 for k in axes)


def nodes_of_eight(size: int, devices: int) -> tuple[float, float]:
    """Return the seconds of an all-reduce in nodes of 8 H100 (NVLink) and between nodes (InfiniBand).

    NVLink's 900 GB/s are the sum of both directions; the 400 Gbit/s of a GPU's InfiniBand adapter are one
    direction. Where latency matters NCCL uses a tree, whose latency grows with the logarithm of the number of
    nodes rather than linearly; the constants are those of NCCL's own cost model (src/graph/tuning.cc, LL128).
    """
    within, nodes = min(devices, 8), math.ceil(devices / 8)
    transfer = ring_bytes(size, within) / 450e9 + ring_bytes(size / within, nodes) / 50e9
    return transfer, 2 * ((within - 1) * 1.2e-6 + math.ceil(math.log2(nodes)) * 8.5e-6)


# TPU v5e: https://cloud.google.com/tpu/docs/v5e and, for latency, https://jax-ml.github.io/scaling-book/sharding.
# By default a float32 product is one bfloat16 pass on 4 matrix units of 128 × 128. The clock rate is not
# published; these figures give 197e12 / (2 · 4 · 128²).
# H100 SXM: https://www.nvidia.com/en-us/data-center/h100 and the DGX SuperPOD reference architecture.
# By default a float32 product is TensorFloat-32, at half of the data sheet's 989 TFLOP/s with sparsity.
ACCELERATORS = {
    "TPU v5e": Accelerator(197e12, 819e9, 16e9, torus, kind="TPU v5 lite", clock=1.5e9),
    "H100 SXM": Accelerator(494.5e12, 3.35e12, 80e9, nodes_of_eight, kind="NVIDIA H100 80GB HBM3"),
}


def lower(model: Model, devices: list[jax.Device]) -> tuple[jax.stages.Lowered, jm.TrainState]:
    """Lower a meta-step for these devices; return it and the shapes of its state."""
    count = len(devices)
    learner, optimizer, tasks = model.learner(), optax.adam(1e-3), model.tasks * count
    step = jm.meta_step(learner, optimizer, tasks, "vmap", devices=devices)

    def start(task):
        params = learner.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], task))
        return jm.TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0))

    mesh = sharding.task_mesh(tasks, devices)

    def sharded(tree, spec):
        new = NamedSharding(mesh, spec)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=new), tree)

    batch = model.batch(tasks)
    state = sharded(jax.eval_shape(start, batch), PartitionSpec())
    lowered = jax.jit(step, donate_argnums=0).lower(state, sharded(batch, PartitionSpec(sharding.TASKS)))
    return lowered, state


def compile_row(model: Model, devices: list[jax.Device]) -> dict:
    """Compile a meta-step for these devices and count the cost of one device."""
    count = len(devices)
    lowered, state = lower(model, devices)
    cpu = devices[0].platform == "cpu"
    # The program is never run, so LLVM's optimisations are wasted; XLA's passes on HLO stay as they are.
    compiled = lowered.compile({"xla_backend_optimization_level": 0} if cpu else None)
    program, memory = read_program(compiled.as_text()), compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    crossing = collectives(program)
    reduced = sum(each["bytes"] * each["times"] for each in crossing if each["kind"] == "all-reduce")
    return {
        "devices": count,
        "kind": devices[0].device_kind,
        "tasks": model.tasks * count,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "parameter_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params)),
        "collectives": crossing,
        "all_reduced_bytes": reduced,
        "moved_bytes": ring_bytes(reduced, count),
        "argument_bytes": arguments,
        "result_bytes": results,
        "temporary_bytes": temporaries,
        # On a TPU some temporaries lie on the chip, so the peak of main memory is less than the sum.
        "memory_bytes": arguments + results + temporaries if cpu else memory.peak_memory_in_bytes,
        "operations": operations(program),
        "operations_loops_once": compiled.cost_analysis()["flops"],
        "traffic_bytes": arguments + results + 2 * temporaries if cpu else traffic(program),
        "cycles": cycles(program),
    }


def gpu_rows(report: dict, rows: list[dict]) -> list[dict]:
    """Return rows of the programs for a GPU in a file of gpu_program.py.

    Its programs are for one device: collectives and operations are those of the same model on CPU devices.
    """
    shared = {row["model"]: row for row in rows if row["kind"] == "cpu" and row["devices"] > 1}
    names = [each["row"] for each in report["rows"]]
    if not {*names} & {*shared}:
        raise SystemExit(
            f"--gpu: got a file with {', '.join(names)}; it must have one of {', '.join(MODELS)}, which is "
            "also compiled here for 2 or more devices"
        )
    return [
        shared[each["row"]]
        | {
            "kind": report["kind"],
            "argument_bytes": each["argument_bytes"],
            "temporary_bytes": each["temporary_bytes"],
            "memory_bytes": each["argument_bytes"] + each["temporary_bytes"],
            "traffic_bytes": each["traffic_bytes"],
            "launch_s": each["seconds"]["launches"],
        }
        for each in report["rows"]
        if each["row"] in shared
    ]


def roofline(row: dict, accelerator: Accelerator) -> dict[str, float]:
    """Return lower bounds of the seconds of a step's work, by name of the limiting resource."""
    return {
        "arithmetic": row["operations"] / accelerator.peak,
        "memory traffic": row["traffic_bytes"] / accelerator.bandwidth,
        "launches": row.get("launch_s", 0.0),
    }


def predict(work: float, size: int, accelerator: Accelerator, devices: int) -> dict:
    """Return seconds and efficiency of a step of `work` seconds and an all-reduce of `size` bytes."""
    transfer, latency = accelerator.all_reduce(size, devices)
    step = work + transfer + latency
    seconds = {"work": work, "transfer": transfer, "latency": latency, "step": step}
    return {"devices": devices, "seconds": seconds, "efficiency": work / step}


def predictions_of(rows: list[dict]) -> list[dict]:
    """Predict the weak scaling of each model on each accelerator, from its own program where available."""
    predictions = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for name, accelerator in ACCELERATORS.items():
            shared = [row for row in rows if row["model"] == model and row["devices"] > 1]
            native = [row for row in shared if row["kind"] == accelerator.kind]
            # In weak scaling one device's program is the same for any number of devices: take the last row.
            row = next(reversed(native or [row for row in shared if row["kind"] == "cpu"]), None)
            if row is None:
                continue
            if others := {each["kind"] for each in row["collectives"]} - {"all-reduce"}:
                raise ValueError(
                    f"{model}: {', '.join(others)} cross devices; only an all-reduce has a cost model"
                )
            bounds = roofline(row, accelerator)
            bound = max(bounds, key=bounds.get)
            per_task = max(bounds["arithmetic"], bounds["memory traffic"]) / MODELS[model].tasks
            estimates = {ROOFLINE: (bounds[bound], bound, per_task)}
            if native and accelerator.clock is not None:
                work = row["cycles"] / accelerator.clock
                estimates[COMPILER] = work, "on-device execution", work / MODELS[model].tasks
            for estimate, (work, bound, per_task) in estimates.items():
                points = [predict(work, row["all_reduced_bytes"], accelerator, n) for n in PREDICTED]
                text = describe_bound(row, bound, per_task, accelerator.capacity, points[-1])
                about = {"model": model, "accelerator": name, "program": row["kind"], "work": estimate}
                predictions.append(about | {"label": LABEL, "points": points, "bound": text})
    return predictions


def describe_bound(row: dict, bound: str, per_task: float, capacity: float, last: dict) -> str:
    """Describe the bottleneck of a step on the largest number of devices."""
    seconds = last["seconds"]
    work, crossing = seconds["work"], seconds["transfer"] + seconds["latency"]
    part = "latency" if seconds["latency"] > seconds["transfer"] else "bandwidth"
    bottleneck = bound if work > crossing else f"the {part} of the all-reduce"
    # With t tasks per device the work is max(launches, t · per_task); 19 times the all-reduce gives 95 %.
    tasks_needed = 1 if row.get("launch_s", 0) > 19 * crossing else math.ceil(19 * crossing / per_task)
    fits = "fits in" if row["memory_bytes"] < capacity else "does NOT fit in"
    return (
        f"on {last['devices']} devices it is bound by {bottleneck}: work {1e3 * work:.3g} ms ({bound}), "
        f"all-reduce {1e3 * crossing:.3g} ms, mostly {part}. Tasks per device for 95% efficiency: about "
        f"{tasks_needed}. "
        f"A device needs {row['memory_bytes'] / 1e9:.2g} GB, which {fits} {capacity / 1e9:.0f} GB."
    )


def topology_devices(name: str) -> list[jax.Device]:
    """Return the devices of a TPU topology such as "v5e:2x4", which need not be attached.

    Raises:
      SystemExit: this installation cannot describe the topology.
    """
    from jax.experimental import topologies

    # Otherwise libtpu queries the cloud's metadata server, which a machine outside of the cloud lacks.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:  # whatever the plugin raises
        raise SystemExit(
            f"--topology: got {name}, which this JAX cannot describe: {error}. Install the TPU compiler, "
            "pip install 'jax[tpu]', and give a name such as v5e:2x4; omit the flag for virtual devices only"
        ) from error


def print_row(row: dict) -> None:
    kinds = {}
    for each in row["collectives"]:
        kinds[each["kind"]] = kinds.get(each["kind"], 0) + each["times"]
    summary = ", ".join(f"{times} {kind}" for kind, times in kinds.items()) or "none"
    print(
        f"{row['model']:10}{row['kind']:12}{row['devices']:8d}{row['tasks']:7d}  {summary:14}"
        f"{row['all_reduced_bytes']:13,d}{row['moved_bytes'] / 1e6:10.3f}{row['memory_bytes'] / 1e6:10.1f}"
        f"{row['traffic_bytes'] / 1e9:9.3f}{row['operations'] / 1e9:11.3f}{row['cycles'] / 1e6:9.1f}",
        flush=True,
    )


def print_predictions(predictions: list[dict]) -> None:
    print(f"\nWeak scaling, {LABEL}: efficiency in % by number of devices\n")
    print(
        f"{'model':10}{'accelerator':13}{'program of':23}{'work by':19}"
        + "".join(f"{n:7d}" for n in PREDICTED)
    )
    for each in predictions:
        shares = "".join(f"{100 * point['efficiency']:7.1f}" for point in each["points"])
        print(f"{each['model']:10}{each['accelerator']:13}{each['program']:23}{each['work']:19}{shares}")
    print(f"\nBottlenecks ({LABEL}):\n")
    for each in predictions:
        print(f"- {each['model']}, {each['accelerator']}, work by {each['work']}: {each['bound']}")


def draw(path: Path, predictions: list[dict]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, len(ACCELERATORS), sharey=True, squeeze=False)
    colours = {name: f"C{i}" for i, name in enumerate(MODELS)}
    styles = {COMPILER: "-", ROOFLINE: "--"}
    for axes, accelerator in zip(panels.flat, ACCELERATORS, strict=True):
        for each in (each for each in predictions if each["accelerator"] == accelerator):
            axes.plot(
                [point["devices"] for point in each["points"]],
                [100 * point["efficiency"] for point in each["points"]],
                color=colours[each["model"]],
                linestyle=styles[each["work"]],
                marker="o",
                markersize=3,
            )
        axes.set(xscale="log", xlabel="devices", ylim=(0, 103), title=accelerator)
        axes.set_xticks(PREDICTED, [str(n) for n in PREDICTED])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("weak-scaling efficiency, %")
    keys = [Line2D([], [], color=colours[name], label=name) for name in colours]
    keys += [Line2D([], [], color="black", linestyle=styles[w], label=f"work by {w}") for w in styles]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=9)
    figure.suptitle(f"A meta-step, constant number of tasks per device: {LABEL.upper()}")
    figure.savefig(path, dpi=150)


def number_of_devices(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; it must be a whole number, at least 1")
    return int(text)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    add(
        "--devices",
        type=number_of_devices,
        nargs="*",
        default=[1, 2, 8, 64, 256],
        help="numbers of virtual devices",
    )
    add("--topology", nargs="*", default=[], help="also compile for these TPU topologies, such as v5e:2x4")
    add("--gpu", type=Path, help="file of gpu_program.py with the models' programs for a GPU")
    add("--json", type=Path, help="also write the results to this file")
    add("--png", type=Path, help="also draw the predicted efficiency into this file")
    args = parser.parse_args(argv)
    # CPU devices are enough, even where accelerators are visible.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(args.devices, default=1))
    # The text and statistics of a program from the cache are incomplete.
    jax.config.update("jax_enable_compilation_cache", False)
    device_sets = [jax.devices()[:count] for count in args.devices]
    device_sets += [topology_devices(name) for name in args.topology]
    machine = describe_machine(jax.devices()[:1])
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("\nCompiled, not run; one device, one meta-step:\n")
    print(
        f"{'':39}{'all-reduced':>27}{'moved':>10}{'memory':>10}{'traffic':>9}{'operations':>11}{'cycles':>9}"
        f"\n{'model':10}{'compiled for':12}{'devices':>8}{'tasks':>7}  {'collectives':14}"
        f"{'bytes':>13}{'MB':>10}{'MB':>10}{'GB':>9}{'10⁹':>11}{'10⁶':>9}"
    )
    rows = []
    for name in args.models:
        for devices in device_sets:
            rows.append({"model": name, **compile_row(MODELS[name], devices)})
            print_row(rows[-1])
    if args.gpu:
        rows += gpu_rows(json.loads(args.gpu.read_text(encoding="utf-8")), rows)
    predictions = predictions_of(rows)
    print_predictions(predictions)
    if args.json:
        report = {"label": LABEL, "machine": machine, "jaxmeta": jm.__version__}
        report |= {"models": {name: MODELS[name].description for name in args.models}}
        args.json.write_text(json.dumps(report | {"rows": rows, "predictions": predictions}, indent=1) + "\n")
    if args.png:
        draw(args.png, predictions)


if __name__ == "__main__":
    main()
