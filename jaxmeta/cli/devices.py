"""Devices and processes of a command, and their description in its report."""

import contextlib
import math
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from jaxmeta.checks import ArgumentError, check_count
from jaxmeta.training import hosts, make_mesh
from jaxmeta.training.sharding import AXES, more_cpus, num_shards, parse_axes, task_mesh

if TYPE_CHECKING:
    from jaxmeta.cli.run import Invocation

# Upper limit of the number of devices: a CPU cannot be given more threads.
_MOST = 2**12


def connect(invocation: "Invocation") -> None:
    """Join the other processes of the run, if the flags name any.

    Raises:
      ArgumentError: flags are incompatible, or no cluster was found.
    """
    names = ("coordinator", "processes", "process")
    given = [name for name in names if getattr(invocation, name) is not None]
    if not given and not invocation.distributed:
        return
    if given and invocation.distributed:
        raise ArgumentError(
            "distributed", f"takes from the cluster what --{given[0]} sets; leave one of them out"
        )
    if invocation.out is None:
        raise ArgumentError(
            "out",
            "is missing; several processes need one folder that all of them can write to; add --out DIR",
        )
    try:
        hosts.connect(*(getattr(invocation, name) for name in names))
    except ArgumentError:
        raise
    except ValueError as error:
        raise ArgumentError("coordinator" if given else "distributed", str(error)) from None


def mesh_of(
    devices: int | None, mesh: str | None, meta_batch: int | None, processes: int | None = None
) -> Mesh:
    """Return the mesh of the devices to use, by default as many as share the tasks evenly.

    On CPUs each core becomes a device, if JAX has not started yet and XLA_FLAGS does not set their number.

    Args:
      devices: number of devices; None for the default.
      mesh: axes of the mesh, such as "tasks=4,params=2"; None for tasks alone.
      meta_batch: number of tasks to share; None for an evaluation, which any number can share.
      processes: number of processes; None where it is unknown before JAX starts.

    Returns:
      The mesh.

    Raises:
      ArgumentError: there are fewer devices, or the tasks are not divisible among them.
    """
    if mesh is not None and devices is not None:
        raise ArgumentError("mesh", f"got {mesh}, which sets the number of devices; leave out --devices")
    if devices is not None:
        check_count("devices", devices, 1, _MOST)
    connected = jax.distributed.is_initialized()
    if devices is not None and connected:
        raise ArgumentError(
            "devices",
            "applies to a single process; with several give --mesh tasks=N for N devices in all",
        )
    with _renamed_to_mesh():
        sizes = None if mesh is None else parse_axes(mesh)
        wanted = devices if sizes is None else math.prod(sizes.values())
        if wanted is not None and wanted > _MOST:
            raise ArgumentError(
                "mesh", f"got {mesh}, which is {wanted:,} devices; it must be at most {_MOST:,}"
            )
        _make_devices_of_cores(wanted, meta_batch, processes or 1)
        if sizes is not None:
            tasks, examples, params = (sizes.get(axis, 1) for axis in AXES)
            requested = make_mesh(tasks=tasks, examples=examples, params=params)
            # Axes that the learner does not support raise where it is built.
            return requested if meta_batch is None else task_mesh(meta_batch, requested, divisible=True)
    if connected:
        return task_mesh(jax.device_count() if meta_batch is None else meta_batch)
    local = jax.local_devices()
    if wanted is not None and wanted > len(local):
        more = more_cpus(wanted, local) or f" ({local[0].platform})"
        raise ArgumentError("devices", f"got {wanted}; there are {len(local)}{more}")
    count = wanted or _sharing(meta_batch, len(local))
    return make_mesh(tasks=count, devices=local)


@contextlib.contextmanager
def _renamed_to_mesh() -> Iterator[None]:
    """Name `mesh` as the argument of errors about devices and axes."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError("mesh", error.problem) from error
    except ValueError as error:
        raise ArgumentError("mesh", str(error)) from error


def described(mesh: Mesh) -> str:
    """Return the devices of a mesh in words."""
    axes = {name: size for name, size in mesh.shape.items() if size > 1}
    shares = f" ({', '.join(f'{name}={size}' for name, size in axes.items())})" if axes else ""
    processes = f" of {jax.process_count()} processes" if hosts.is_multiprocess() else ""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}{shares}{processes}"


def machine(mesh: Mesh) -> dict[str, Any]:
    """Return the entries of a report about devices and versions."""
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
    """Return the peak memory in bytes: of this process's fullest accelerator, or on CPUs of the process."""
    if mesh.devices.flat[0].platform != "cpu":
        statistics = [device.memory_stats() or {} for device in mesh.local_devices]
        peaks = [each.get("peak_bytes_in_use", 0) for each in statistics]
        return {"peak_memory_bytes": max(peaks) or None, "peak_memory": "device"}
    try:
        import resource
    except ImportError:  # Windows
        return {"peak_memory_bytes": None, "peak_memory": "process"}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_bytes": peak, "peak_memory": "process"}


def make_devices_of_cores(devices: str | None, mesh: str | None) -> None:
    """Make each CPU core a device, or as many as --devices or --mesh ask for, before weights are read.

    Reading weights starts JAX, and later the number can no longer be set. Invalid values are errors of the
    parser, which reads these flags afterwards.

    Args:
      devices: text of --devices.
      mesh: text of --mesh.
    """
    with contextlib.suppress(ValueError):
        sizes = parse_axes(mesh) if mesh is not None else {}
        wanted = int(devices) if devices is not None else math.prod(sizes.values()) if sizes else None
        if wanted is None or 1 <= wanted <= _MOST:
            _make_devices_of_cores(wanted, None, 1)


def _make_devices_of_cores(wanted: int | None, meta_batch: int | None, processes: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    count = -(-wanted // processes) if wanted else _sharing(meta_batch and meta_batch // processes, cores)
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def _sharing(meta_batch: int | None, most: int) -> int:
    return most if not meta_batch else num_shards(meta_batch, most)
