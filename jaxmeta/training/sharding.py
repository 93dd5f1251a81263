"""Which devices share the work of a meta-batch, and how.

Tasks are split first: parameters, optimizer state and task data are replicated, and each device draws
its own tasks from its own keys, or is handed its share. Devices that are then left over share the
examples of each task, see `jaxmeta.nn.shared`.
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmeta.core import PyTree, Task
from jaxmeta.nn import shared

TASKS = "tasks"


def sharers(tasks: int, most: int) -> int:
    """The largest number of devices, at most `most`, that share `tasks` tasks evenly."""
    return max(n for n in range(1, most + 1) if tasks % n == 0)


def task_mesh(tasks: int, devices: Sequence[jax.Device] | None = None, *, divisible: bool = False) -> Mesh:
    """The devices that share `tasks` tasks evenly, and, where these are `divisible`, one task's examples.

    Args:
      tasks: number of tasks, at least 1.
      devices: None for as many of `jax.local_devices()` as divide `tasks`.
      divisible: whether several devices can share a task.

    Raises:
      ValueError: `devices` is empty, or their number does not divide `tasks` that are not divisible.
    """
    if devices is None:
        local = jax.local_devices()
        devices = local[: sharers(tasks, len(local))]
    if not len(devices) or (tasks % len(devices) and not divisible):
        raise ValueError(
            f"devices: got {len(devices)} of them, which must divide the {tasks} tasks of a meta-batch; only "
            "where learner.divisible holds do several share a task"
        )
    apart = math.gcd(tasks, len(devices))
    return Mesh(np.reshape(np.asarray(devices), (apart, -1)), (TASKS, shared.EXAMPLES))


def over_tasks(function: Callable, mesh: Mesh, *, out: PartitionSpec) -> Callable:
    """`function` run by every device on its share of a batch of tasks and its replica of the rest.

    Itself for one device. An argument that is a `Task` is a batch of tasks. Inside, `first_task`
    tells the devices apart.
    """
    if mesh.size == 1:
        return function

    def split(*arguments):
        specs = tuple(PartitionSpec(TASKS) if isinstance(a, Task) else PartitionSpec() for a in arguments)
        # check_vma=False: with it, a learner's own scan would have to mark its carries as varying
        # over devices, and grad would insert a psum per task where one per meta-step is enough.
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*arguments)

    return split


def first_task(mesh: Mesh, own: int) -> jax.Array | int:
    """Number of the running device's first task, inside `over_tasks`, if every one has `own`."""
    return jax.lax.axis_index(TASKS) * own if mesh.size > 1 else 0


def sum_over_tasks(tree: PyTree, mesh: Mesh) -> PyTree:
    """Sum of `tree` over the devices that have different tasks, inside `over_tasks`.

    Devices that share a task have the same loss, which each differentiates by its own copy of the
    parameters, through what it was sent by the others: the task's gradient is the mean of theirs.
    """
    if mesh.size == 1:
        return tree
    sums = shared.total(tree, mesh.axis_names)
    together = mesh.shape[shared.EXAMPLES]
    return sums if together == 1 else jax.tree.map(lambda leaf: leaf / together, sums)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """`tree` with a replica on each device; no copy is made of what is there already."""
    return _put(tree, mesh, PartitionSpec())


def share(tasks: Task, mesh: Mesh) -> Task:
    """A batch of tasks with each device's share on it."""
    return _put(tasks, mesh, PartitionSpec(TASKS))


def as_argument(sample: Callable) -> Callable:
    """`sample` as a pytree, so that its data can be an argument of a compiled function."""
    return sample if isinstance(sample, jax.tree_util.Partial) else jax.tree_util.Partial(sample)


def _put(tree: PyTree, mesh: Mesh, spec: PartitionSpec) -> PyTree:
    return jax.device_put(tree, mesh.devices.item() if mesh.size == 1 else NamedSharding(mesh, spec))
