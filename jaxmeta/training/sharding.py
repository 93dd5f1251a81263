"""Which devices share the work of a meta-batch, and how.

A mesh has three axes. Along "tasks" each device draws tasks of its own from their keys, or is handed its
share; along "examples" devices share the examples of each task, see `jaxmeta.nn.shared`; along "params" the
compiler splits parameters, optimizer state and what is computed with them, for networks that outgrow one
device. Along the first two, and for task data along all, everything is replicated.

The devices may belong to several processes (`jax.distributed`): each of them then runs the same program, and
holds its part of every array.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmeta.checks import ArgumentError, check_count, described
from jaxmeta.core import Key, PyTree, Task, TaskDistribution, TaskStream
from jaxmeta.nn import shared

TASKS, EXAMPLES, PARAMS = AXES = ("tasks", shared.EXAMPLES, "params")

# What the functions of this package take as `devices`.
Devices = Sequence[jax.Device] | Mesh | None

# Leaves with fewer entries are on every device: to gather them would take longer than to hold them.
_SPLIT_FROM = 1024


def make_mesh(
    *, tasks: int = 1, examples: int = 1, params: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The devices of a training as a mesh, for `devices=` of `jm.train`, `jm.meta_step` and `jm.evaluate`.

    On every mesh a key draws the same episodes: those of stored images bit for bit, drawn characters and
    distortions up to the rounding of the compiled program that draws them.

    Args:
      tasks: parts into which the tasks of a meta-batch are split.
      examples: devices that share the examples of each task, of a learner that is `divisible`.
      params: devices over which parameters and optimizer state are split. Each leaf is split along its
        largest axis that they divide; those of fewer than 1,024 entries are replicated.
      devices: as many as the product of the above, or more, of which the first are taken; None for all
        there are, of all processes.

    Raises:
      ValueError: a number below 1, or fewer devices. On CPUs there is one device unless
        `JAX_NUM_CPU_DEVICES` in the environment, or `jax.config.update("jax_num_cpu_devices", N)` before JAX
        is first used, says how many there are.

    Examples:
      >>> dict(make_mesh(tasks=1).shape)
      {'tasks': 1, 'examples': 1, 'params': 1}
    """
    sizes = dict(zip(AXES, (tasks, examples, params), strict=True))
    for name, size in sizes.items():
        check_count(name, size)
    _check_devices(devices)
    found = list(jax.devices() if devices is None else devices)
    needed = math.prod(sizes.values())
    if needed > len(found):
        product = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        raise ValueError(
            f"{product}: these are {needed} devices, and there are {len(found)}{more_cpus(needed, found)}"
        )
    return Mesh(np.reshape(np.asarray(found[:needed]), tuple(sizes.values())), AXES)


def more_cpus(wanted: int, there: Sequence[jax.Device]) -> str:
    """Return how CPU cores are made into `wanted` devices, to follow an error; nothing of accelerators."""
    if any(device.platform != "cpu" for device in there):
        return ""
    return (
        f"; a CPU is one device unless JAX_NUM_CPU_DEVICES={wanted} is set in the environment, or "
        f'jax.config.update("jax_num_cpu_devices", {wanted}) is called before JAX is first used'
    )


def _check_devices(devices: object) -> None:
    if devices is None or isinstance(devices, Mesh):
        return
    if not isinstance(devices, Iterable) or not all(isinstance(each, jax.Device) for each in devices):
        raise ArgumentError(
            "devices",
            f"got {described(devices)}; it must be devices, such as jax.devices()[:2], or a mesh of "
            f"jm.make_mesh(tasks=2){more_cpus(devices, jax.devices()) if type(devices) is int else ''}",
        )


def num_shards(tasks: int, most: int) -> int:
    """The largest number of devices, at most `most`, that share `tasks` tasks evenly."""
    return max(n for n in range(1, most + 1) if tasks % n == 0)


def task_mesh(tasks: int, devices: Devices = None, *, divisible: bool = False) -> Mesh:
    """The devices that share `tasks` tasks evenly, and, where these are `divisible`, one task's examples.

    Args:
      tasks: number of tasks, at least 1.
      devices: a mesh as it is; a sequence, to be made one; None for as many as divide `tasks`, of every
        process as many.
      divisible: whether several devices can share a task.

    Raises:
      ValueError: `devices` is empty, of another kind of mesh, or their number does not divide `tasks` that
        are not divisible.
    """
    if devices is None:
        processes = jax.process_count()
        if tasks % processes:
            raise ArgumentError(
                "meta_batch", f"got {tasks} tasks for {processes} processes, of which it must be a multiple"
            )
        own = num_shards(tasks // processes, jax.local_device_count())
        by_process: dict[int, list[jax.Device]] = {}
        for device in jax.devices():
            by_process.setdefault(device.process_index, []).append(device)
        devices = [device for local in by_process.values() for device in local[:own]]
    if isinstance(devices, Mesh):
        if devices.axis_names != AXES:
            raise ArgumentError("devices", f"got a mesh of {devices.axis_names}; make one with jm.make_mesh")
        idle = {*range(jax.process_count())} - {device.process_index for device in devices.devices.flat}
        if idle:
            raise ArgumentError(
                "devices", f"got a mesh without a device of process {min(idle)}; each needs one"
            )
        apart, together = devices.shape[TASKS], devices.shape[EXAMPLES]
        if tasks % apart:
            raise ArgumentError(
                "devices", f"got a mesh of tasks={apart}, which must divide the {tasks} tasks of a meta-batch"
            )
        if together > 1 and not divisible:
            raise ArgumentError(
                "devices",
                f"got a mesh of examples={together}; only where learner.divisible holds do several "
                "share a task",
            )
        return devices
    _check_devices(devices)
    if not len(devices) or (tasks % len(devices) and not divisible):
        raise ArgumentError(
            "devices",
            f"got {len(devices)} of them, which must divide the {tasks} tasks of a meta-batch; only "
            "where learner.divisible holds do several share a task",
        )
    apart = math.gcd(tasks, len(devices))
    return make_mesh(tasks=apart, examples=len(devices) // apart, devices=devices)


def evaluation_mesh(devices: Devices) -> Mesh:
    """The devices as ones that have episodes of their own; parameters split as they were."""
    if isinstance(devices, Mesh):
        params = devices.shape[PARAMS]
        return make_mesh(tasks=devices.size // params, params=params, devices=list(devices.devices.flat))
    devices = jax.devices() if devices is None else devices
    return make_mesh(tasks=len(devices), devices=devices)


def pad_to_devices(tasks: Task, mesh: Mesh) -> Task:
    """A batch of tasks, the last one repeated until every device has as many."""
    missing = -tasks.query.y.shape[0] % mesh.shape[TASKS]
    if not missing:
        return tasks
    return jax.tree.map(lambda leaf: np.concatenate([leaf, *[leaf[-1:]] * missing]), tasks)


def process_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count) of this process's share of the tasks: (0, 1) where it needs all of them."""
    count, apart = jax.process_count(), mesh.shape[TASKS]
    if apart % count:
        return 0, 1
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(count, -1)
    in_turn = (owners == np.arange(count)[:, None]).all()
    return (jax.process_index(), count) if in_turn else (0, 1)


def over_tasks(function: Callable[..., Any], mesh: Mesh, *, out: PartitionSpec) -> Callable[..., Any]:
    """`function` run by every device on its share of a batch of tasks and its replica of the rest.

    Itself where none shares them. An argument that is a `Task` is a batch of tasks. Inside, `first_task`
    tells the devices apart. What is split along "params" remains so, and is the compiler's business.
    """
    if _sharers(mesh) == 1:
        return function
    manual = set(AXES) if mesh.shape[PARAMS] == 1 else {TASKS, EXAMPLES}

    def split(*arguments):
        specs = tuple(PartitionSpec(TASKS) if isinstance(a, Task) else PartitionSpec() for a in arguments)
        # check_vma=False: with it, a learner's own scan would have to mark its carries as varying
        # over devices, and grad would insert a psum per task where one per meta-step is enough.
        return jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=out, axis_names=manual, check_vma=False
        )(*arguments)

    return split


def first_task(mesh: Mesh, own: int) -> jax.Array | int:
    """Number of the running device's first task, inside `over_tasks`, if every one has `own`."""
    return jax.lax.axis_index(TASKS) * own if _sharers(mesh) > 1 else 0


def sum_over_tasks(tree: PyTree, mesh: Mesh) -> PyTree:
    """Sum of `tree` over the devices that have different tasks, inside `over_tasks`.

    Devices that share a task have the same loss, which each differentiates by its own copy of the
    parameters, through what it was sent by the others: the task's gradient is the mean of theirs.
    """
    if _sharers(mesh) == 1:
        return tree
    if mesh.shape[PARAMS] == 1:
        sums = shared.total(tree, (TASKS, EXAMPLES))
    else:
        # Each leaf by itself: in one vector all would have to be gathered first.
        sums = jax.lax.psum(tree, (TASKS, EXAMPLES))
    together = mesh.shape[EXAMPLES]
    return sums if together == 1 else jax.tree.map(lambda leaf: leaf / together, sums)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """For each array of a training's state how it lies on the mesh: by its shape alone, so that an
    optimizer's moments lie as their parameters do."""
    parts = mesh.shape[PARAMS]

    def spec(leaf: jax.Array | jax.ShapeDtypeStruct) -> PartitionSpec:
        places = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or not places or math.prod(leaf.shape) < _SPLIT_FROM:
            return PartitionSpec()
        axis = max(places, key=lambda axis: (leaf.shape[axis], axis))
        return PartitionSpec(*[None] * axis, PARAMS)

    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), tree)


def place(tree: PyTree, mesh: Mesh) -> PyTree:
    """A training's state, or its parameters, where `shardings` says."""
    if mesh.size == 1:
        return jax.device_put(tree, mesh.devices.item())
    return jax.tree.map(_put, tree, shardings(tree, mesh))


def keep_placed(tree: PyTree, mesh: Mesh) -> PyTree:
    """Inside a compiled function: `tree` stays where `place` puts it."""
    if mesh.shape[PARAMS] == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Inside a compiled function: `tree` with a replica on each device."""
    if mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """`tree` with a replica on each device; no copy is made of what is there already."""
    return _put_all(tree, mesh, PartitionSpec())


def share(tasks: Task, mesh: Mesh, total: int | None = None) -> Task:
    """A batch of tasks with each device's share on it.

    Args:
      tasks: all of them, or, where there are several processes, those of this one.
      mesh: on which.
      total: how many tasks there are; None for as many as are given.
    """
    return _put_all(tasks, mesh, PartitionSpec(TASKS), total)


def as_argument(sample: Callable[..., Any]) -> Callable[..., Any]:
    """`sample` as a pytree, so that its data can be an argument of a compiled function."""
    return sample if isinstance(sample, jax.tree_util.Partial) else jax.tree_util.Partial(sample)


def sample_of(tasks: TaskDistribution | TaskStream) -> Callable[[Key], Task]:
    """The sampler of `tasks` as a pytree; for a stream one that gives its very first task."""
    if isinstance(tasks, TaskStream):
        return jax.tree_util.Partial(lambda task, key: task, jax.tree.map(lambda leaf: leaf[0], tasks.at(0)))
    return as_argument(tasks.sample)


def parse_axes(text: str) -> dict[str, int]:
    """Axes of a mesh as written on a command line, `tasks=4,params=2`.

    Raises:
      ValueError: another form, an unknown axis, one given twice.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or name in found or not size.isascii() or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"got {text!r}; it must be like tasks=8 or tasks=4,params=2, of {', '.join(AXES)}"
            )
        found[name] = int(size)
    return found


def _sharers(mesh: Mesh) -> int:
    """How many devices, or groups that split parameters, share the work of a meta-batch."""
    return mesh.shape[TASKS] * mesh.shape[EXAMPLES]


def _put_all(tree: PyTree, mesh: Mesh, spec: PartitionSpec, total: int | None = None) -> PyTree:
    if mesh.size == 1:
        return jax.device_put(tree, mesh.devices.item())
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, spec), total), tree)


def _put(leaf: jax.Array | np.ndarray, sharding: NamedSharding, total: int | None = None) -> jax.Array:
    """A leaf on a mesh; `total`: length of its first axis over all processes, where it is not its own."""
    if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    # All processes have the same of what is replicated, and their own of what is shared: nothing need be
    # sent, where `device_put` would send and compare all of it.
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding, total)
        return jax.random.wrap_key_data(data, impl=str(jax.random.key_impl(leaf)))
    values = np.asarray(leaf)
    shape = values.shape if total is None else (total, *values.shape[1:])
    return jax.make_array_from_process_local_data(sharding, values, shape)
