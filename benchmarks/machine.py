"""Description of the machine of a benchmark, its matrix-product rate, and the memory of a program."""

import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class MatrixProduct:
    """The float32 matrix product with the highest rate among several sizes and numbers of devices.

    Attributes:
      run: measures the rate once, in operations per second.
      size: rows and columns of the matrices.
      devices: number of devices that share the rows.
    """

    def __init__(self, devices):
        self.run, best = None, 0.0
        sizes = (1024, 2048, 4096) if devices[0].platform == "cpu" else (4096, 8192)
        for n in sizes:
            for used in {1, len(devices)}:
                mesh = Mesh(np.asarray(devices[:used]), ("rows",))
                rows = NamedSharding(mesh, PartitionSpec("rows"))
                replicated = NamedSharding(mesh, PartitionSpec())
                rng = np.random.default_rng(0)
                a = jax.device_put(rng.normal(size=(n, n)).astype(np.float32), rows)
                b = jax.device_put(rng.normal(size=(n, n)).astype(np.float32), replicated)
                product = jax.jit(jnp.matmul, out_shardings=rows)
                jax.block_until_ready(product(a, b))

                def run(product=product, a=a, b=b, n=n):
                    repeats = max(1, 4096 // n)
                    started = time.perf_counter()
                    for _ in range(repeats):
                        out = product(a, b)
                    jax.block_until_ready(out)
                    return 2 * n**3 * repeats / (time.perf_counter() - started)

                rate = max(run() for _ in range(3))
                if rate > best:
                    best, self.run, self.size, self.devices = rate, run, n, used


def describe_machine(devices) -> dict:
    """Return processor, cores, devices and versions, for the JSON file of a benchmark."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line),
            cpu,
        )
    return {
        "cpu": cpu,
        "cores": cores(),
        "device": f"{len(devices)} × {devices[0].device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def program_bytes(compiled) -> int:
    """Return the bytes that a compiled program allocates on each device, arguments included."""
    sizes = compiled.memory_analysis()
    # Donated arguments are counted among the outputs too.
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + outputs + sizes.temp_size_in_bytes


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
