"""One of several processes that train together: a program, started by `test_hosts`.

python tests/training/member.py PORT PROCESSES PROCESS FOLDER
"""

import sys
from pathlib import Path

import jax

PORT, PROCESSES, PROCESS = map(int, sys.argv[1:4])
FOLDER = Path(sys.argv[4])

jax.config.update("jax_num_cpu_devices", 1)

import jaxmeta as jm  # noqa: E402
from jaxmeta.training import hosts, sharding  # noqa: E402

hosts.connect(f"127.0.0.1:{PORT}", PROCESSES, PROCESS)

import meta_runs  # noqa: E402  # makes keys, which JAX must have started for

share = sharding.process_share(sharding.task_mesh(meta_runs.BATCH))
assert share == (PROCESS, PROCESSES)
found = {name: hosts.gathered(run(FOLDER / name, share)) for name, run in meta_runs.RUNS.items()}
jm.save(FOLDER / f"found-{PROCESSES}", found)
