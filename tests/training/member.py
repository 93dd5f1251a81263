"""A program, started by `test_hosts`, that is one of several processes that train together.

python tests/training/member.py PORT PROCESSES PROCESS FOLDER NAME…

Each NAME is one of `meta_runs.RUNS`.
"""

import sys
from pathlib import Path

import jax

import jaxmeta as jm
from jaxmeta.training import hosts, sharding


def main(port: int, processes: int, process: int, folder: Path, names: list[str]) -> None:
    jax.config.update("jax_num_cpu_devices", 1)
    hosts.connect(f"127.0.0.1:{port}", processes, process)
    # Imported here, because it creates keys, and the processes must be connected before JAX is used.
    import meta_runs

    share = sharding.process_share(sharding.task_mesh(meta_runs.BATCH))
    assert share == (process, processes)
    results = {name: hosts.gathered(meta_runs.RUNS[name](folder / name, share)) for name in names}
    # An array that every process has whole, in addition to those of which each has a part.
    results["replicated"] = jax.numpy.arange(3.0)
    jm.save(folder / f"results-{processes}", results)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]), sys.argv[5:])
