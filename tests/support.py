"""What tests of several folders share."""

import importlib.metadata
import json
import os
import pathlib
import shutil

# Learners that `--learner` names, for the laws; conftest.py fills it in before tests are collected.
own_learners: list[str] = []


def read_json(path):
    return json.loads(pathlib.Path(path).read_text())


def accelerator_is_visible():
    return shutil.which("nvidia-smi") is not None or pathlib.Path("/dev/accel0").exists()


def cores():
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fast_compilation():
    """Return XLA's flags under which a CPU compiles two to five times faster.

    They are: no LLVM optimisations, one LLVM module per program, and the older emitters of fused loops. What
    XLA does to a program before that stays as users have it. XLA ends the process at a flag that it does not
    know, so the last one is set only for the versions of jaxlib that have it.
    """
    flags = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)
