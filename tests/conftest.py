"""Strict settings for every test: shapes checked, no silent rank promotion, two CPU devices if not told."""

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

# Modules whose annotations the complete run checks at run time. Left out: `core`, whose dataclass JAX
# rebuilds with leaves that are no arrays (axes, structures), and `nn.layers`, which subclasses Flax's Conv,
# whose annotations cannot be checked at run time.
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
# The default run checks these alone, since checking takes a tenth of its time.
CHECKED_BY_DEFAULT = ["jaxmeta.losses", "jaxmeta.nn.norm"]

# Where an accelerator is visible, its memory serves one process; a CPU serves one process per core.
MOST_WORKERS = 8
# Seconds of call time from which a test of the default run is reported.
SLOW_CALL = 3.0


def pytest_addoption(parser):
    parser.addoption(
        "--learner",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="run the laws of tests/test_learner_laws.py on a learner of your own",
    )


def pytest_configure(config):
    support.own_learners[:] = config.getoption("--learner")
    default = "not nightly" in config.option.markexpr
    install_import_hook(CHECKED_BY_DEFAULT if default else CHECKED, "words.checked")


def pytest_xdist_auto_num_workers(config):
    """Return what `-n auto` means: one worker beside an accelerator, else one per core, at most eight."""
    return 1 if accelerator_is_visible() else min(cores(), MOST_WORKERS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark rows nightly by `nightly_rows`; keep a file's tests on one worker, where they share programs.

    `@pytest.mark.nightly_rows(after=n)` leaves the first `n` rows of a parametrised test to the default run.
    """
    rows = collections.Counter()
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            name = item.nodeid.split("::")[0].removeprefix("tests/").removesuffix(".py")
            item.add_marker(pytest.mark.xdist_group(name))
        if rule := item.get_closest_marker("nightly_rows"):
            test = item.nodeid.split("[")[0]
            rows[test] += 1
            if rows[test] > rule.kwargs["after"]:
                item.add_marker(pytest.mark.nightly)


def pytest_collection_finish():
    """Let the garbage collector look less often, and never at what importing and collecting have made."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_terminal_summary(terminalreporter):
    """Report tests of the default run that take longer than a test of it should."""
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
    """Clear JAX's caches after a file of tests, which share compiled programs.

    Each program takes several memory maps, of which a process may have 65,530, and megabytes of memory.
    """
    # A command may choose the number of devices where nothing has used them yet.
    jax.devices()
    yield
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
