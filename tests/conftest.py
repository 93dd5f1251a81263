"""Strict settings for every test: run-time type checks, no rank promotion, two CPU devices by default."""

import collections
import gc
import os
import pathlib
import tempfile

import support
from support import accelerator_is_visible, cores, fast_compilation

# Most of a test's time is compilation.
if not accelerator_is_visible():
    os.environ["XLA_FLAGS"] = f"{fast_compilation()} {os.environ.get('XLA_FLAGS', '')}"

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

# Modules whose annotations the complete run checks at run time. `core` is left out because JAX rebuilds its
# dataclass with leaves that are not arrays (axes, structures), and `nn.layers` because it subclasses Flax's
# Conv, whose annotations do not work at run time.
CHECKED = [
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
    "jaxmeta.nn.lora",
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
]
# The default run checks only these, because checking all takes a tenth of its time.
CHECKED_BY_DEFAULT = ["jaxmeta.losses", "jaxmeta.nn.norm"]

# Upper bound of pytest-xdist's workers on a CPU.
MOST_WORKERS = 8
# Tests of the default run with longer calls, in seconds, are reported.
SLOW_CALL = 3.0


# Scripts for the type checkers, which `--doctest-modules` would import and so run.
collect_ignore = ["type_checks"]


def pytest_addoption(parser):
    parser.addoption(
        "--learner",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="run the properties of tests/test_learner_laws.py on a user-defined learner",
    )


def pytest_configure(config):
    support.requested_learners[:] = config.getoption("--learner")
    default = "not nightly" in config.option.markexpr
    install_import_hook(CHECKED_BY_DEFAULT if default else CHECKED, "type_checker.typecheck")


def pytest_xdist_auto_num_workers(config):
    """Return the workers of `-n auto`: one with an accelerator, else one per core, at most eight."""
    # An accelerator has memory for only one process.
    return 1 if accelerator_is_visible() else min(cores(), MOST_WORKERS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark rows nightly by `nightly_rows`, and assign the tests of a file to one worker.

    `@pytest.mark.nightly_rows(after=n)` keeps the first `n` rows of a parametrised test in the default run.
    The tests of a file share compiled programs.
    """
    rows = collections.Counter()
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            name = item.nodeid.split("::")[0].removeprefix("tests/").removesuffix(".py")
            item.add_marker(pytest.mark.xdist_group(name))
        if marker := item.get_closest_marker("nightly_rows"):
            test = item.nodeid.split("[")[0]
            rows[test] += 1
            if rows[test] > marker.kwargs["after"]:
                item.add_marker(pytest.mark.nightly)


def pytest_collection_finish():
    """Run the garbage collector less often, and exempt the objects of imports and collection from it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_terminal_summary(terminalreporter):
    """Report tests of the default run that take longer than `SLOW_CALL`."""
    slow = [
        report
        for report in terminalreporter.getreports("passed")
        if report.when == "call" and report.duration > SLOW_CALL and "nightly" not in report.keywords
    ]
    if slow:
        terminalreporter.section(f"calls of over {SLOW_CALL:g} s: make them smaller, or mark them nightly")
        for report in sorted(slow, key=lambda report: -report.duration):
            terminalreporter.line(f"{report.duration:6.2f} s  {report.nodeid}")


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Clear JAX's caches after each test file, whose tests share compiled programs.

    Each program takes megabytes of memory and several memory maps, of which a process may have 65,530.
    """
    # Initialise JAX first: until then a command of the test may change the number of devices.
    jax.devices()
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Enable float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def data_folder():
    """Return the folder of real data sets; skip the test where it is missing."""
    root = pathlib.Path(__file__).resolve().parents[1]
    folder = pathlib.Path(os.environ.get("JAXMETA_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}; set JAXMETA_DATA")
    return folder
