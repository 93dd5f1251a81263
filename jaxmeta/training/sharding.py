"""Device meshes, and the sharding of a meta-batch and of the training state over them.

A mesh has three axes. Along "tasks", each device draws its own tasks from their keys, or receives its shard
of a batch. Along "examples", devices share the examples of each task (see `jaxmeta.nn.shared`). Along
"params", the compiler splits parameters, optimizer state and computations with them, for networks that do not
fit on one device. Parameters are replicated along the first two axes, and task data along "params".

The devices may belong to several processes (`jax.distributed`). Each process then runs the same program and
holds its part of every array.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmeta.checks import ArgumentError, check_count, described
from jaxmeta.core import Key, PyTree, Task, TaskDistribution, TaskStream
from jaxmeta.nn import shared

TASKS, EXAMPLES, PARAMS = AXES = ("tasks", shared.EXAMPLES, "params")

# Values of the argument `devices` of this package's functions.
Devices = Sequence[jax.Device] | Mesh | None

# Leaves with fewer entries are replicated: gathering them would cost more time than a replica costs memory.
_SPLIT_FROM = 1024


def make_mesh(
    *, tasks: int = 1, examples: int = 1, params: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Build a device mesh for `devices=` of `jm.train`, `jm.meta_step` and `jm.evaluate`.

    A key draws the same episodes on every mesh: stored images bit for bit, and rendered characters and
    distortions up to the rounding of the compiled program that draws them.

    Args:
      tasks: number of shards of the tasks of a meta-batch.
      examples: number of devices that share the examples of each task, for a learner that is `divisible`.
      params: number of shards of parameters and optimizer state. Each leaf is split along the largest axis
        that this number divides; leaves of fewer than 1,024 entries are replicated.
      devices: devices of the mesh, at least as many as the product of the above, of which the first are
        taken; None for all devices of all processes.

    Returns:
      A mesh with the axes "tasks", "examples" and "params".

    Raises:
      ValueError: a number is below 1, or there are fewer devices than the product of the numbers. A CPU is
        one device unless `JAX_NUM_CPU_DEVICES=N` is set in the environment, or
        `jax.config.update("jax_num_cpu_devices", N)` is called before JAX is first used.

    Examples:
      >>> dict(make_mesh(tasks=1).shape)
      {'tasks': 1, 'examples': 1, 'params': 1}
    """
    sizes = dict(zip(AXES, (tasks, examples, params), strict=True))
    for name, size in sizes.items():
        check_count(name, size)
    _check_devices(devices)
    available = list(jax.devices() if devices is None else devices)
    needed = math.prod(sizes.values())
    if needed > len(available):
        product = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        hint = more_cpus(needed, available)
        verb = "is" if len(available) == 1 else "are"
        raise ValueError(f"{product} needs {needed} devices, but there {verb} {len(available)}{hint}")
    return Mesh(np.reshape(np.asarray(available[:needed]), tuple(sizes.values())), AXES)


def more_cpus(needed: int, available: Sequence[jax.Device]) -> str:
    """Return a hint, to be appended to an error, on how to get `needed` CPU devices; "" on accelerators."""
    if any(device.platform != "cpu" for device in available):
        return ""
    return (
        f"; a CPU is one device unless JAX_NUM_CPU_DEVICES={needed} is set in the environment, or "
        f'jax.config.update("jax_num_cpu_devices", {needed}) is called before JAX is first used'
    )


def _check_devices(devices: object) -> None:
    if devices is None or isinstance(devices, Mesh):
        return
    listed = list(devices.flat) if isinstance(devices, np.ndarray) else devices
    # A generator is refused, since it would be empty after this check.
    if not isinstance(listed, Sequence) or not all(isinstance(device, jax.Device) for device in listed):
        raise ArgumentError(
            "devices",
            f"got {described(devices)}; it must be devices, such as jax.devices()[:2], or a mesh of "
            f"jm.make_mesh(tasks=2){more_cpus(devices, jax.devices()) if type(devices) is int else ''}",
        )


def num_shards(tasks: int, most: int) -> int:
    """Return the largest number of devices, at most `most`, that divides `tasks`."""
    return max(n for n in range(1, most + 1) if tasks % n == 0)


def task_mesh(tasks: int, devices: Devices = None, *, divisible: bool = False) -> Mesh:
    """Return the mesh of devices that share `tasks` tasks evenly.

    Args:
      tasks: number of tasks, at least 1.
      devices: mesh of `make_mesh`, which is returned unchanged, or a sequence of devices; None for as many as
        divide `tasks`, with the same number in every process.
      divisible: True if several devices may share the examples of a task.

    Returns:
      A mesh on which every device has the same number of tasks, or of a task's examples.

    Raises:
      ValueError: `devices` is empty or is not a mesh of `make_mesh`, a process has no device, or the number
        of devices does not divide `tasks` and the tasks are not divisible.
    """
    if devices is None:
        processes = jax.process_count()
        if tasks % processes:
            raise ArgumentError(
                "meta_batch", f"got {tasks} tasks for {processes} processes, of which it must be a multiple"
            )
        per_process = num_shards(tasks // processes, jax.local_device_count())
        by_process: dict[int, list[jax.Device]] = {}
        for device in jax.devices():
            by_process.setdefault(device.process_index, []).append(device)
        devices = [device for local in by_process.values() for device in local[:per_process]]
    if isinstance(devices, Mesh):
        if devices.axis_names != AXES:
            raise ArgumentError(
                "devices", f"got a mesh with axes {devices.axis_names}; build it by jm.make_mesh"
            )
        idle = {*range(jax.process_count())} - {device.process_index for device in devices.devices.flat}
        if idle:
            raise ArgumentError(
                "devices", f"got a mesh without a device of process {min(idle)}; every process needs one"
            )
        apart, together = devices.shape[TASKS], devices.shape[EXAMPLES]
        if tasks % apart:
            raise ArgumentError(
                "devices", f"got a mesh of tasks={apart}, which must divide the {tasks} tasks of a meta-batch"
            )
        if together > 1 and not divisible:
            raise ArgumentError(
                "devices",
                f"got a mesh of examples={together}; several devices may share a task only if "
                "learner.divisible is True",
            )
        return devices
    _check_devices(devices)
    if not len(devices) or (tasks % len(devices) and not divisible):
        raise ArgumentError(
            "devices",
            f"got {len(devices)} of them, which must divide the {tasks} tasks of a meta-batch; several "
            "devices may share a task only if learner.divisible is True",
        )
    apart = math.gcd(tasks, len(devices))
    return make_mesh(tasks=apart, examples=len(devices) // apart, devices=devices)


def evaluation_mesh(devices: Devices) -> Mesh:
    """Return `devices` as a mesh for evaluation: "examples" becomes part of "tasks", "params" stays."""
    if isinstance(devices, Mesh):
        params = devices.shape[PARAMS]
        return make_mesh(tasks=devices.size // params, params=params, devices=list(devices.devices.flat))
    devices = jax.devices() if devices is None else devices
    return make_mesh(tasks=len(devices), devices=devices)


def pad_to_devices(tasks: Task, mesh: Mesh) -> Task:
    """Repeat the last task of a batch until the devices divide the number of tasks."""
    missing = -tasks.query.y.shape[0] % mesh.shape[TASKS]
    if not missing:
        return tasks
    return jax.tree.map(lambda leaf: np.concatenate([leaf, *[leaf[-1:]] * missing]), tasks)


def process_share(mesh: Mesh) -> tuple[int, int]:
    """Return (index, count) of this process's share of the tasks; (0, 1) where it needs all of them."""
    count, apart = jax.process_count(), mesh.shape[TASKS]
    if apart % count:
        return 0, 1
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(count, -1)
    in_turn = (owners == np.arange(count)[:, None]).all()
    return (jax.process_index(), count) if in_turn else (0, 1)


def over_tasks(function: Callable[..., Any], mesh: Mesh, *, out: PartitionSpec) -> Callable[..., Any]:
    """Map `function` over the devices, each with its shard of the tasks and a replica of all else.

    Arguments that are a `Task` are batches of tasks, which are sharded. Inside `function`, `first_task` is
    the number of the device's first task. The axis "params" is left to the compiler: arrays split along it
    remain global arrays inside `function`. Where a single device has all tasks, `function` is returned as is.
    """
    if _num_groups(mesh) == 1:
        return function
    manual = set(AXES) if mesh.shape[PARAMS] == 1 else {TASKS, EXAMPLES}

    def split(*arguments):
        specs = tuple(PartitionSpec(TASKS) if isinstance(a, Task) else PartitionSpec() for a in arguments)
        # With check_vma=True a learner's own scan would have to mark its carries as varying over
        # devices, and grad would insert a psum for each task where one per meta-step suffices.
        return jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=out, axis_names=manual, check_vma=False
        )(*arguments)

    return split


def first_task(mesh: Mesh, per_device: int) -> jax.Array | int:
    """Return the index of the running device's first task, inside `over_tasks`."""
    return jax.lax.axis_index(TASKS) * per_device if _num_groups(mesh) > 1 else 0


def sum_over_tasks(tree: PyTree, mesh: Mesh) -> PyTree:
    """Sum `tree` over the devices that have different tasks, inside `over_tasks`.

    Devices that share a task all compute its loss, and each differentiates it with respect to its own replica
    of the parameters, through the gathered embeddings. The task's gradient is the mean of theirs.
    """
    if _num_groups(mesh) == 1:
        return tree
    if mesh.shape[PARAMS] == 1:
        sums = shared.total(tree, (TASKS, EXAMPLES))
    else:
        # One collective for each leaf: a concatenation of all leaves would first gather the split ones.
        sums = jax.lax.psum(tree, (TASKS, EXAMPLES))
    together = mesh.shape[EXAMPLES]
    return sums if together == 1 else jax.tree.map(lambda leaf: leaf / together, sums)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return a tree with the sharding of each array of a training state.

    It depends on the shape alone, so that an optimizer's moments are sharded like their parameters.
    """
    parts = mesh.shape[PARAMS]

    def spec(leaf: jax.Array | jax.ShapeDtypeStruct) -> PartitionSpec:
        places = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or not places or math.prod(leaf.shape) < _SPLIT_FROM:
            return PartitionSpec()
        axis = max(places, key=lambda axis: (leaf.shape[axis], axis))
        return PartitionSpec(*[None] * axis, PARAMS)

    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), tree)


def place(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put a training state, or its parameters, on the mesh by `shardings`."""
    if mesh.size == 1:
        return jax.device_put(tree, mesh.devices.item())
    return jax.tree.map(_put, tree, shardings(tree, mesh))


def keep_placed(tree: PyTree, mesh: Mesh) -> PyTree:
    """Constrain `tree`, inside a compiled function, to the sharding of `place`."""
    if mesh.shape[PARAMS] == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """Constrain `tree`, inside a compiled function, to be replicated."""
    if mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put a replica of `tree` on each device; arrays that are there already are not copied."""
    return _put_all(tree, mesh, PartitionSpec())


def share(tasks: Task, mesh: Mesh, total: int | None = None) -> Task:
    """Put on each device its shard of a batch of tasks.

    Args:
      tasks: batch of tasks; where there are several processes, the tasks of this process.
      mesh: mesh of `task_mesh`.
      total: number of tasks over all processes; None for the number in `tasks`.
    """
    return _put_all(tasks, mesh, PartitionSpec(TASKS), total)


def as_argument(sample: Callable[..., Any]) -> Callable[..., Any]:
    """Return `sample` as a pytree, so that its data are an argument of a compiled function."""
    return sample if isinstance(sample, jax.tree_util.Partial) else jax.tree_util.Partial(sample)


def sample_of(tasks: TaskDistribution | TaskStream) -> Callable[[Key], Task]:
    """Return the sampler of `tasks` as a pytree; that of a stream returns the stream's first task."""
    if isinstance(tasks, TaskStream):
        return jax.tree_util.Partial(lambda task, key: task, jax.tree.map(lambda leaf: leaf[0], tasks.at(0)))
    return as_argument(tasks.sample)


def parse_axes(text: str) -> dict[str, int]:
    """Parse the axes of a mesh from text such as "tasks=4,params=2".

    Raises:
      ValueError: the text has another form, an unknown axis, or an axis twice.

    Examples:
      >>> parse_axes("tasks=4,params=2")
      {'tasks': 4, 'params': 2}
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or name in axes or not size.isascii() or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"got {text!r}; it must be like tasks=8 or tasks=4,params=2, with axes {', '.join(AXES)}"
            )
        axes[name] = int(size)
    return axes


def _num_groups(mesh: Mesh) -> int:
    """Return the number of devices, or of groups that split parameters, that share a meta-batch."""
    return mesh.shape[TASKS] * mesh.shape[EXAMPLES]


def _put_all(tree: PyTree, mesh: Mesh, spec: PartitionSpec, total: int | None = None) -> PyTree:
    if mesh.size == 1:
        return jax.device_put(tree, mesh.devices.item())
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, spec), total), tree)


def _put(leaf: jax.Array | np.ndarray, sharding: NamedSharding, total: int | None = None) -> jax.Array:
    """Put a leaf on a mesh; `total` is the length of its first axis over all processes."""
    if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    # Every process already holds its part: the whole of a replicated array, or its shard of a sharded one.
    # Nothing need be sent, whereas `device_put` would send the array and compare it between processes.
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding, total)
        return jax.random.wrap_key_data(data, impl=str(jax.random.key_impl(leaf)))
    values = np.asarray(leaf)
    shape = values.shape if total is None else (total, *values.shape[1:])
    return jax.make_array_from_process_local_data(sharding, values, shape)
