"""Which devices share the tasks of a meta-batch, and how.

Tasks are the only axis that is split: parameters, optimizer state and task data are
replicated, and each device draws its own tasks from its own keys, or is handed its share.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmeta.core import PyTree, Task

AXIS = "tasks"

Devices = tuple[jax.Device, ...]


def sharers(tasks: int, most: int) -> int:
    """The largest number of devices, at most `most`, that share `tasks` tasks evenly."""
    return max(n for n in range(1, most + 1) if tasks % n == 0)


def task_devices(tasks: int, devices: Sequence[jax.Device] | None = None) -> Devices:
    """The devices that share `tasks` tasks evenly.

    Args:
      tasks: number of tasks, at least 1.
      devices: None for as many of `jax.local_devices()` as divide `tasks`.

    Raises:
      ValueError: `devices` is empty or their number does not divide `tasks`.
    """
    if devices is None:
        local = jax.local_devices()
        return tuple(local[: sharers(tasks, len(local))])
    if not len(devices) or tasks % len(devices):
        raise ValueError(
            f"devices: got {len(devices)} of them, which must divide the {tasks} tasks of a meta-batch"
        )
    return tuple(devices)


def over_tasks(function: Callable, devices: Devices, *, out: PartitionSpec) -> Callable:
    """`function` run by every device on its share of a batch of tasks and its replica of the rest.

    Itself for one device. An argument that is a `Task` is a batch of tasks. Inside, `device_index`
    tells the devices apart.
    """
    if len(devices) == 1:
        return function

    def shared(*arguments):
        specs = tuple(PartitionSpec(AXIS) if isinstance(a, Task) else PartitionSpec() for a in arguments)
        # check_vma=False: with it, a learner's own scan would have to mark its carries as varying
        # over devices, and grad would insert a psum per task where one per meta-step is enough.
        return jax.shard_map(function, mesh=_mesh(devices), in_specs=specs, out_specs=out, check_vma=False)(
            *arguments
        )

    return shared


def device_index(devices: Devices) -> jax.Array | int:
    """Position of the running device among `devices`, inside `over_tasks`."""
    return jax.lax.axis_index(AXIS) if len(devices) > 1 else 0


def sum_over_devices(tree: PyTree, devices: Devices) -> PyTree:
    """Sum of `tree` over `devices`, inside `over_tasks`."""
    if len(devices) == 1:
        return tree
    # One collective for all leaves. On CPUs each one blocks a thread of a pool as large as the
    # machine has cores: two at a time, met in a different order by two devices, wait forever.
    flat, restore = ravel_pytree(tree)
    return restore(jax.lax.psum(flat, AXIS))


def replicate(tree: PyTree, devices: Devices) -> PyTree:
    """`tree` with a replica on each device; no copy is made of what is there already."""
    if len(devices) == 1:
        return jax.device_put(tree, devices[0])
    return jax.device_put(tree, NamedSharding(_mesh(devices), PartitionSpec()))


def share(tasks: Task, devices: Devices) -> Task:
    """A batch of tasks with each device's share on it."""
    if len(devices) == 1:
        return jax.device_put(tasks, devices[0])
    return jax.device_put(tasks, NamedSharding(_mesh(devices), PartitionSpec(AXIS)))


def as_argument(sample: Callable) -> Callable:
    """`sample` as a pytree, so that its data can be an argument of a compiled function."""
    return sample if isinstance(sample, jax.tree_util.Partial) else jax.tree_util.Partial(sample)


def _mesh(devices: Devices) -> Mesh:
    return Mesh(np.asarray(devices), (AXIS,))
