"""Several processes that train together, by `jax.distributed`; of a single one nothing here does anything.

What happens to one of them happens to all: a process that is lost is missed by the others after `_MISSED_S`
seconds at the latest, and they end too.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator

import jax
import numpy as np

from jaxmeta.checks import ArgumentError
from jaxmeta.core import PyTree

# Seconds without a sign of life after which a process is lost; seconds to wait for the others at the end,
# and at the start, when a scheduler may not have started them yet.
_MISSED_S, _PARTING_S, _STARTING_S = 30, 60, 600

# What gloo, NCCL and JAX's own service say of a process that is not there.
_LOST = re.compile(r"gloo|nccl|connection|heartbeat|coordination|unavailable", re.IGNORECASE)


class Lost(KeyboardInterrupt):
    """Another process is no longer there: the run has stopped, and can be continued."""


def connect(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the processes of a run. To be called before anything asks JAX for its devices.

    On CPUs they talk by gloo.

    Args:
      coordinator: "host:port" of the first process, free there; None, as of the others, to ask the cluster:
        Slurm, Kubernetes, Open MPI, TPU pods.
      processes: how many there are.
      process: which of them this is, from 0.

    Raises:
      ValueError: some of the three are missing or cannot be, there is no cluster, or JAX has started.
      RuntimeError: the others did not come.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < 3:
        raise ArgumentError(missing[0], f"is missing; give all of {', '.join(given)}, or none in a cluster")
    if not missing:
        assert coordinator is not None
        assert processes is not None
        assert process is not None
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ArgumentError("coordinator", f"got {coordinator!r}; it must be host:port")
        if processes < 1:
            raise ArgumentError("processes", f"got {processes}; it must be at least 1")
        if not 0 <= process < processes:
            raise ArgumentError("process", f"got {process}; it must be from 0 to {processes - 1}")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=_STARTING_S,
            heartbeat_timeout_seconds=_MISSED_S,
            shutdown_timeout_seconds=_PARTING_S,
        )
    except ValueError as error:
        raise ValueError(f"there is no cluster to be found ({error}); give {', '.join(given)}") from None
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise ArgumentError("coordinator", f"{error}") from None
        raise


def leave_at_once(status: int) -> None:
    """Ends a process that failed, if it has joined others.

    To end in good order it would first wait for them, and they for it.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def detect_lost_peer(hint: str) -> Iterator[None]:
    """Inside, an error of the connection to another process becomes one that says what is to be done.

    Args:
      hint: what to do.

    Raises:
      Lost: a process is no longer there.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not are_many() or not _LOST.search(str(error)):
            raise
        said = str(error).splitlines()[0][:200]
        raise Lost(f"another process of this run is lost ({said}); {hint}") from error


def are_many() -> bool:
    """Whether there are several processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def barrier(where: str) -> None:
    """Waits until every process has come here."""
    if are_many():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def any_of(flag: bool) -> bool:
    """Whether `flag` holds in any process."""
    if not are_many():
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def gathered(tree: PyTree) -> PyTree:
    """`tree` on the host, whole, in every process."""
    if not are_many():
        return tree
    from jax.experimental import multihost_utils

    leaves, structure = jax.tree.flatten(tree)
    # What a process has whole, such as parameters that were read from a checkpoint, would be stacked.
    spread = [i for i, leaf in enumerate(leaves) if not getattr(leaf, "is_fully_addressable", True)]
    found = multihost_utils.process_allgather([leaves[i] for i in spread], tiled=True) if spread else []
    for i, leaf in zip(spread, found, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)
