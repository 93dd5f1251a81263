"""Compile meta-steps for a GPU that need not be there, and predict the shortest time of each.

    python benchmarks/gpu_program.py omniglot … [--json FILE]

XLA's compiler for NVIDIA's GPUs, of the package `jax[cuda13]`, needs only a description of the card:
h100.txtpb, or another one by `--device` with its rate `--tf32`. Nothing is run or measured. The meta-steps
are those of rows.py, which draw their tasks as in throughput.py, and those of scaling.py on one device. All
tasks run at once, as on any accelerator. In each program `hlo.py` counts, a loop's body as often as it runs:

- launches: fusions, calls of libraries and copies. A call may launch several kernels of its library;
- main-memory traffic: the operands and results of these and, of stacked arrays, the entries that a turn of a
  loop reads or writes, without the workspace of libraries. Arrays that stay in the card's second-level cache
  cost less;
- temporary memory, as the compiler allocates it.

The predicted time is the longest of three: the traffic at the card's memory bandwidth, the operations at its
peak rate in TensorFloat-32, JAX's default precision there, and the launches one after the other. Real kernels
seldom reach these rates. Without a card the compiler cannot time the alternatives for a product or a
convolution, so that the program on a card may differ in these. Where it fails to choose one, as for vit-b,
XLA_FLAGS=--xla_gpu_enable_triton_gemm=false in the environment leaves all products to cuBLAS.
"""

import argparse
import dataclasses
import json
import os
import re
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import jax
import optax
from hlo import accesses, kernels, loops, read_program
from machine import describe_machine
from rows import ROWS
from scaling import ACCELERATORS, LABEL, MODELS
from scaling import compile_row as compile_model
from scaling import lower as lower_model
from throughput import as_distribution

import jaxmeta as jm

H100 = Path(__file__).with_name("h100.txtpb")
# Seconds from one small kernel to the next: https://developer.nvidia.com/blog/cuda-graphs measures 3.8 µs for
# kernels of 2.9 µs, and 3.4 µs in a graph, in which XLA launches runs of kernels.
LAUNCH = 3e-6


@dataclasses.dataclass(frozen=True)
class Card:
    """Bytes per second of a GPU's memory, and its operations per second in two precisions."""

    bandwidth: float
    float32: float
    tf32: float


def read_card(description: str, tf32: float) -> Card:
    """Return the rates of a card from the text of its GpuTargetConfigProto, which lacks that of `tf32`.

    Raises:
      ValueError: the text lacks a figure.
    """

    def figure(name: str) -> float:
        if (found := re.search(rf"\b{name}: *([\d.]+)", description)) is None:
            raise ValueError(f"the description of the card lacks {name}")
        return float(found[1])

    # In each cycle a unit does one multiplication and one addition.
    units = figure("core_count") * figure("fpus_per_core")
    return Card(figure("memory_bandwidth"), 2e9 * units * figure("clock_rate_ghz"), tf32)


def absent_gpu(description: str) -> jax.Device:
    """Return a device to compile for, which cannot run anything.

    Raises:
      SystemExit: this installation cannot compile for it.
    """
    from jax.experimental import topologies

    # Otherwise the plugin looks for a driver.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.devices()  # loads the plugins
    try:
        return topologies.get_topology_desc(
            platform="cuda", target_config=description, topology="1x1x1"
        ).devices[0]
    except Exception as error:  # whatever the plugin raises
        raise SystemExit(
            f"--device: this JAX cannot compile for the card: {error}. Install the compiler, "
            "pip install 'jax[cuda13]', and give a file such as h100.txtpb"
        ) from error


def lower(name: str, device: jax.Device) -> jax.stages.Lowered:
    """Lower the meta-step of a row, with its sampling of tasks, or of a model of scaling.py."""
    # The memory of inner loops is chosen by the default backend, which is the CPU here.
    with mock.patch.object(jax, "default_backend", return_value="gpu"):
        if name in MODELS:
            return lower_model(MODELS[name], [device])[0]
        row = ROWS[name]
        learner, optimizer = row.learner("second"), optax.adam(row.outer_lr)
        tasks = as_distribution(row.tasks(row.meta_batch, seed=0))
        step = jm.meta_step(learner, optimizer, row.meta_batch, row.strategy, devices=[device])
        state = jax.eval_shape(lambda key: jm.init_state(learner, optimizer, tasks, key), jax.random.key(0))
        here = jax.sharding.SingleDeviceSharding(device)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), (state, tasks.sample)
        )
        return jax.jit(step, donate_argnums=0).lower(*shapes)


def count(text: str, largest: int = 5) -> dict:
    """Return launches and traffic of a program, in all and by loop, and the arrays with the most traffic.

    A loop of unknown length has None for its turns, and its body is counted once.
    """
    program = read_program(text, unknown_turns=1)
    launched, touched = kernels(program), list(accesses(program))
    arrays = Counter()
    for each, shape, size in touched:
        arrays[f"{shape.dtype}[{','.join(map(str, shape.dims))}]"] += each.times * size

    def within(computation: str) -> dict:
        sizes = [each.times * size for each, _, size in touched if each.computation == computation]
        return {
            "kernels": sum(each.computation == computation for each in launched),
            "traffic_bytes": sum(sizes),
        }

    return {
        "launches": sum(each.times for each in launched),
        "traffic_bytes": arrays.total(),
        "entry": within(re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)[1]),
        "loops": [
            {"name": each.name, "runs": each.times, "turns": each.turns, **within(each.called("body"))}
            for each in loops(program)
        ],
        "arrays": [{"shape": shape, "traffic_bytes": size} for shape, size in arrays.most_common(largest)],
    }


def predict(counts: dict, operations: int, card: Card) -> dict:
    """Return the seconds that each resource alone would take, and which of them bounds the step."""
    seconds = {
        "bandwidth": counts["traffic_bytes"] / card.bandwidth,
        "float32": operations / card.float32,
        "tf32": operations / card.tf32,
        "launches": counts["launches"] * LAUNCH,
    }
    bound = max(("bandwidth", "tf32", "launches"), key=seconds.get)
    return {"seconds": seconds, "bound": bound, "step_s": seconds[bound]}


def run_row(name: str, device: jax.Device, card: Card) -> dict:
    """Compile one row, count its program, and print the counts."""
    lowered = lower(name, device)
    started = time.perf_counter()
    compiled = lowered.compile()
    compile_s = time.perf_counter() - started
    if name in ROWS:
        about, operations = ROWS[name].describe(), ROWS[name].operations("second")
    else:
        about = MODELS[name].description
        operations = compile_model(MODELS[name], jax.devices()[:1])["operations"]
    counts, memory = count(compiled.as_text()), compiled.memory_analysis()
    result = {
        "row": name,
        "about": about,
        "operations": operations,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_s": compile_s,
        **counts,
        **predict(counts, operations, card),
    }
    print_row(result)
    return result


def print_row(result: dict) -> None:
    seconds, entry = result["seconds"], result["entry"]
    print(f"\n{result['row']}: {result['about']}; compiled in {result['compile_s']:.0f} s")
    print(
        f"  {result['launches']:,} launches, {result['traffic_bytes'] / 1e9:.2f} GB of traffic, "
        f"{result['temporary_bytes'] / 1e6:,.0f} MB of temporary memory"
    )
    print(f"  outside of loops: {entry['kernels']} launches, {entry['traffic_bytes'] / 1e9:.2f} GB")
    for loop in result["loops"]:
        turns = "unknown turns, counted once" if loop["turns"] is None else f"{loop['turns']} turns"
        print(
            f"  {loop['name']}: {loop['runs']} × {turns} of {loop['kernels']} launches, "
            f"{loop['traffic_bytes'] / 1e9:.2f} GB"
        )
    for each in result["arrays"]:
        print(f"  {each['traffic_bytes'] / 1e9:.2f} GB of the traffic: {each['shape']}")
    print(
        f"  {LABEL}: {1e3 * result['step_s']:.2f} ms, bound by {result['bound']} (traffic "
        f"{1e3 * seconds['bandwidth']:.2f}, arithmetic {1e3 * seconds['tf32']:.2f} in TensorFloat-32 or "
        f"{1e3 * seconds['float32']:.2f} in float32, launches {1e3 * seconds['launches']:.2f})",
        flush=True,
    )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = [*ROWS, *MODELS]
    add("rows", nargs="+", metavar="ROW", choices=names, help=f"meta-steps to compile: {', '.join(names)}")
    add("--device", type=Path, help="text of the GpuTargetConfigProto of a card other than the H100")
    add("--tf32", type=float, help="operations per second of that card in TensorFloat-32")
    add("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    if (args.device is None) != (args.tf32 is None):
        parser.error("--device and --tf32 describe a card together; give both or none")
    description = (args.device or H100).read_text(encoding="utf-8")
    card = read_card(description, args.tf32 or ACCELERATORS["H100 SXM"].peak)
    # CPU devices are enough, even where accelerators are visible.
    jax.config.update("jax_platforms", "cpu")
    # The text and statistics of a program from the cache are incomplete.
    jax.config.update("jax_enable_compilation_cache", False)
    device = absent_gpu(description)
    machine = describe_machine([device])
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"Compiled, not run; times are {LABEL}.")
    rows = [run_row(name, device, card) for name in args.rows]
    if args.json:
        report = {"label": LABEL, "kind": device.device_kind, "machine": machine, "jaxmeta": jm.__version__}
        report |= {"card": dataclasses.asdict(card), "launch_s": LAUNCH}
        report["xla_flags"] = os.environ.get("XLA_FLAGS", "")
        args.json.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
