"""Helpers that tests in several folders share."""

import importlib.metadata
import json
import os
import pathlib
import shutil

import pytest

# Learners from `--learner` for test_learner_laws.py; conftest.py fills the list before tests are collected.
requested_learners: list[str] = []


def read_json(path):
    return json.loads(pathlib.Path(path).read_text())


def raises_argument_error(message):
    """Expect an error about an argument, or the type error that comes before it in the complete run.

    Use it for arguments of a wrong type only: the complete run checks annotations at run time, before the
    library checks its arguments.
    """
    from jaxtyping import TypeCheckError  # not at the top: JAX must see the flags that conftest.py sets

    return pytest.raises((ValueError, TypeCheckError), match=f"{message}|typechecking parameter")


def accelerator_is_visible():
    return shutil.which("nvidia-smi") is not None or pathlib.Path("/dev/accel0").exists()


def cores():
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fast_compilation():
    """Return XLA flags with which a CPU compiles two to five times faster.

    The flags turn LLVM's optimisations off, build one LLVM module per program, and use the older emitters of
    fused loops; XLA's passes on HLO stay as users have them. XLA aborts at an unknown flag, so the last one
    is set only for the versions of jaxlib that have it.
    """
    flags = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)
