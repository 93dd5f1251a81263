"""Training in several processes by `jax.distributed`; in a single process these functions do nothing.

If one process is lost, the others notice it within `_HEARTBEAT_S` seconds and end, too.
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

# Seconds without a heartbeat after which a process counts as lost; seconds to wait for the others at the end,
# and at the start, when a scheduler may not have started them yet.
_HEARTBEAT_S, _SHUTDOWN_S, _STARTUP_S = 30, 60, 600

# Words in the errors of gloo, NCCL and JAX's coordination service when a process is lost.
_LOST = re.compile(r"gloo|nccl|connection|heartbeat|coordination|unavailable", re.IGNORECASE)


class Lost(KeyboardInterrupt):
    """Raised when another process is lost: the run has stopped and can be resumed."""


def connect(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the processes of a run.

    Call it before anything asks JAX for its devices. On CPUs the processes communicate by gloo. Where all
    three arguments are None, their values come from the cluster: Slurm, Kubernetes, Open MPI or TPU pods.

    Args:
      coordinator: address of the first process as "host:port", with a port that is free there.
      processes: number of processes.
      process: number of this process, from 0.

    Raises:
      ValueError: one or two arguments are missing, a value is not allowed, no cluster was detected, or JAX
        has already been used.
      RuntimeError: the other processes did not connect in time.
    """
    arguments = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in arguments.items() if value is None]
    if missing and len(missing) < 3:
        raise ArgumentError(
            missing[0], f"is missing; give all of {', '.join(arguments)}, or none in a cluster"
        )
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
            initialization_timeout=_STARTUP_S,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except ValueError as error:
        raise ValueError(f"no cluster was detected ({error}); give {', '.join(arguments)}") from None
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise ArgumentError("coordinator", f"{error}") from None
        raise


def leave_at_once(status: int) -> None:
    """End this process with exit status `status` if it has joined others."""
    # The usual exit waits for the other processes, which wait for this one in a collective.
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def detect_lost_peer(hint: str) -> Iterator[None]:
    """Convert connection errors inside the block to `Lost`.

    Args:
      hint: advice to the user, which ends the message.

    Raises:
      Lost: another process is lost.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_multiprocess() or not _LOST.search(str(error)):
            raise
        message = str(error).splitlines()[0][:200]
        raise Lost(f"another process of this run is lost ({message}); {hint}") from error


def is_multiprocess() -> bool:
    """Return whether there are several processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Return whether this is the process that writes files."""
    return jax.process_index() == 0


def barrier(where: str) -> None:
    """Wait until every process has reached this call.

    Args:
      where: name of the barrier, the same in all processes; different names in two processes are an error.
    """
    if is_multiprocess():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def any_of(flag: bool) -> bool:
    """Return whether `flag` is True in any process; all processes must call it."""
    if not is_multiprocess():
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def gathered(tree: PyTree) -> PyTree:
    """Return `tree` with all of its arrays whole, on the host, in every process."""
    if not is_multiprocess():
        return tree
    from jax.experimental import multihost_utils

    leaves, structure = jax.tree.flatten(tree)
    # `process_allgather` would stack arrays of which each process has a whole copy, such as parameters that
    # were read from a checkpoint.
    spread = [i for i, leaf in enumerate(leaves) if not getattr(leaf, "is_fully_addressable", True)]
    whole = multihost_utils.process_allgather([leaves[i] for i in spread], tiled=True) if spread else []
    for i, leaf in zip(spread, whole, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)
