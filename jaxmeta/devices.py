"""Which devices and processes a command uses, and what its report says of them."""

import contextlib
import math
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmeta.checks import check_count
from jaxmeta.training import hosts, make_mesh
from jaxmeta.training.sharding import AXES, parse_axes, sharers, task_mesh

# More devices than anyone has: so many threads a CPU could not be given.
_MOST = 2**12


def connect(flags: Mapping[str, Any]) -> None:
    """Joins the other processes of the run, if the flags speak of any.

    Raises:
      ValueError: flags that do not go together, or no cluster.
    """
    names = ("coordinator", "processes", "process")
    given = [name for name in names if flags.get(name) is not None]
    if not given and not flags.get("distributed"):
        return
    if given and flags.get("distributed"):
        raise ValueError(f"--distributed: asks the cluster what --{given[0]} says; leave one out")
    if "out" not in flags:
        raise ValueError("--out: several processes need one folder, which all of them see; add --out DIR")
    try:
        hosts.connect(*(flags.get(name) for name in names))
    except ValueError as error:
        raise ValueError(f"--{'' if given else 'distributed: '}{error}") from None


def mesh_of(
    devices: int | None, axes: str | None, meta_batch: int | None, processes: int | None = None
) -> Mesh:
    """The devices to use: those asked for, else as many as share the tasks evenly.

    On CPUs the cores serve as devices, if JAX has not started yet and nobody set their number.

    Args:
      devices: of `--devices`.
      axes: of `--mesh`.
      meta_batch: tasks to share; None for an evaluation's, which all devices can.
      processes: how many there are, as far as that is known before JAX has started.
    """
    if axes is not None and devices is not None:
        raise ValueError(f"--mesh: {axes} says how many devices there are; leave out --devices")
    if devices is not None:
        check_count("--devices", devices, 1, _MOST)
    connected = jax.distributed.is_initialized()
    if devices is not None and connected:
        raise ValueError("--devices: is of one process; with several say --mesh tasks=N, of all devices")
    try:
        sizes = None if axes is None else parse_axes(axes)
        wanted = devices if sizes is None else math.prod(sizes.values())
        if wanted is not None and wanted > _MOST:
            raise ValueError(f"{axes}: these are {wanted:,} devices; at most {_MOST:,} are possible")
        _make_devices_of_cores(wanted, meta_batch, processes or 1)
        if sizes is not None:
            tasks, examples, params = (sizes.get(axis, 1) for axis in AXES)
            mesh = make_mesh(tasks=tasks, examples=examples, params=params)
            # What the learner cannot do it says itself.
            return mesh if meta_batch is None else task_mesh(meta_batch, mesh, divisible=True)
    except ValueError as error:
        raise ValueError(f"--mesh: {str(error).removeprefix('devices: ')}") from None
    if connected:
        return task_mesh(jax.device_count() if meta_batch is None else meta_batch)
    local = jax.local_devices()
    if wanted is not None and wanted > len(local):
        raise ValueError(f"--devices: got {wanted}, and there are {len(local)} ({local[0].platform})")
    count = wanted or _sharing(meta_batch, len(local))
    return make_mesh(tasks=count, devices=local)


def described(mesh: Mesh) -> str:
    """The devices, as a run says what it uses."""
    axes = {name: size for name, size in mesh.shape.items() if size > 1}
    shares = f" ({', '.join(f'{name}={size}' for name, size in axes.items())})" if axes else ""
    processes = f" of {jax.process_count()} processes" if hosts.are_many() else ""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}{shares}{processes}"


def machine(mesh: Mesh) -> dict[str, Any]:
    """What a report says of the devices, and of the versions of what ran on them."""
    first = mesh.devices.flat[0]
    axes = {name: size for name, size in mesh.shape.items() if size > 1}
    return {
        "devices": mesh.size,
        "mesh": axes or {"tasks": 1},
        "processes": jax.process_count(),
        "device": first.device_kind,
        "platform": first.platform,
        "versions": {
            "jaxmeta": version("jaxmeta"),
            "jax": version("jax"),
            "python": platform.python_version(),
        },
    }


def peak_memory(mesh: Mesh) -> dict[str, Any]:
    """The most memory in use so far: of this process's fullest accelerator, or of itself on CPUs."""
    if mesh.devices.flat[0].platform != "cpu":
        own = mesh.local_devices
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in own]
        return {"peak_memory_bytes": max(peaks) or None, "peak_memory": "device"}
    try:
        import resource
    except ImportError:  # Windows
        return {"peak_memory_bytes": None, "peak_memory": "process"}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_bytes": peak, "peak_memory": "process"}


def _make_devices_of_cores(wanted: int | None, meta_batch: int | None, processes: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    own = -(-wanted // processes) if wanted else _sharing(meta_batch and meta_batch // processes, cores)
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", own)


def _sharing(meta_batch: int | None, most: int) -> int:
    return most if not meta_batch else sharers(meta_batch, most)
