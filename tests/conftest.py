"""Strict settings for every test: shapes checked, no silent rank promotion, two CPU devices if not told."""

import itertools
import os
import pathlib
import shutil
import tempfile

# Most of a test's time is compilation, which on a CPU takes half as long without LLVM's optimisations. What
# XLA does to a program before that stays as users have it.
if shutil.which("nvidia-smi") is None:
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", int(os.environ.get("JAX_NUM_CPU_DEVICES", "2")))
jax.config.update("jax_numpy_rank_promotion", "raise")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers of pytest-xdist compile the same programs; a shared cache lets one do it for all.
    cache = pathlib.Path(tempfile.gettempdir()) / "jaxmeta-test-compilation-cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Left out: `core`, whose dataclass JAX rebuilds with leaves that are no arrays (axes, structures),
# and `nn.layers`, which subclasses Flax's Conv, whose annotations cannot be checked at run time.
install_import_hook(
    [
        "jaxmeta.losses",
        "jaxmeta.metric_based",
        "jaxmeta.model_based",
        "jaxmeta.nn.adapters",
        "jaxmeta.nn.augmented",
        "jaxmeta.nn.conv",
        "jaxmeta.nn.coordinatewise",
        "jaxmeta.nn.embedding",
        "jaxmeta.nn.full_context",
        "jaxmeta.nn.koch",
        "jaxmeta.nn.memory",
        "jaxmeta.nn.norm",
        "jaxmeta.nn.relation",
        "jaxmeta.nn.residual",
        "jaxmeta.nn.resnet",
        "jaxmeta.nn.stateful",
        "jaxmeta.nn.statistics",
        "jaxmeta.nn.vit",
        "jaxmeta.optimization_based",
        "jaxmeta.tasks",
        "jaxmeta.training",
        "jaxmeta.transfer",
    ],
    "beartype.beartype",
)


_RAN = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_compiled_programs():
    """Compiled programs are memory maps, of which a process may have 65,530; a whole run makes more."""
    yield
    if next(_RAN) % 100 == 0:
        jax.clear_caches()


@pytest.fixture
def x64():
    """Float64 for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def data_folder():
    """The folder of real data sets; the test is skipped where it is absent."""
    root = pathlib.Path(__file__).resolve().parents[1]
    folder = pathlib.Path(os.environ.get("JAXMETA_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set JAXMETA_DATA")
    return folder
