"""Whatever the command line is given: status 2, one line that names it, and no file touched."""

import contextlib
import io
import itertools
import shutil

import jax
import jaxtyping
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import jaxmeta as jm
from jaxmeta import registry
from jaxmeta.cli import main

EACH = settings(
    max_examples=3, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
FOLDERS = itertools.count()


def small(ways):
    return jm.nn.MLP(out=ways, hidden=(), norm=True, kernel_init=jax.nn.initializers.lecun_normal())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the command runs: images of classes, a run on sine waves and one on the images."""
    place = tmp_path_factory.mktemp("place")
    for name, shade in (("ant", 0), ("bee", 90), ("cat", 180), ("doe", 250)):
        (place / "images" / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.full((8, 8), shade + number, np.uint8)
            Image.fromarray(pixels).save(place / "images" / name / f"{number}.png")
    few = ["--steps", "1", "--meta-batch", "1", "--episodes", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("JAXMETA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(registry.NETWORKS, "conv4", small)
        # Users have no type checker, which would be first to speak.
        jaxtyping.config.update("jaxtyping_disable", True)
        assert main(["train", "--tasks", "sinusoid", *few, "--out", "run"]) == 0
        own = ["--tasks", "folder:images", "--network", "conv4", "--classes", "0.5,0,0.5"]
        own += ["--ways", "2", "--queries", "1"]
        assert main(["train", "prototypical", *own, *few, "--out", "namer"]) == 0
        yield place
        jaxtyping.config.update("jaxtyping_disable", False)


def listing(folder):
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}


def refused(place, argv, *names):
    """That the command ends with status 2 and one line that names what is wrong, and touches no file."""
    before, error = listing(place.parent), io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        status = main([str(word) for word in argv])
    said = error.getvalue()
    assert status == 2, said
    assert "Traceback" not in said
    assert said.startswith("jaxmeta: error: ")
    assert len(said.splitlines()) == 1
    assert any(name in said for name in names), said
    assert {path: state for path, state in listing(place.parent).items() if before.get(path) != state} == {}
    assert before.keys() == listing(place.parent).keys()


# --- Flags ---------------------------------------------------------------------------------------------

NO_NUMBER = ["", "ten", "1,5", "0x10", "None", "[1]", "--", "1 2", "½"]
COUNT = st.sampled_from([*NO_NUMBER, "-1", "-99999999999", "1.5", "nan", "inf", "1e3", "9" * 20])
NUMBER = st.sampled_from([*NO_NUMBER, "nan", "inf", "-inf", "-1", "-1e-9"])
WORD = st.one_of(
    st.text("abcxyz_.:/*é ", min_size=1, max_size=6).filter(lambda text: text.strip()),
    st.just("\n"),
    st.just(""),
)

STRINGS = st.sampled_from(["", "5", "5,5,5", "1,5", "a,b", "5,99"])
PARTS = st.sampled_from(["", "1", "0.5,0.6,0", "a,b,c", "nan,0,1"])
TRAIN = ["train", "--tasks", "sinusoid"]
FLAGS = [
    *((TRAIN, flag, COUNT) for flag in ("--shots", "--queries", "--train-shots", "--train-queries")),
    *((TRAIN, flag, COUNT) for flag in ("--steps", "--meta-batch", "--episodes", "--validate-every")),
    *((TRAIN, flag, COUNT) for flag in ("--inner-steps", "--eval-steps", "--inner-batch", "--seed")),
    *((TRAIN, flag, COUNT) for flag in ("--truncation", "--devices")),
    *((TRAIN, flag, NUMBER) for flag in ("--inner-lr", "--outer-lr", "--clip", "--proximal")),
    *((TRAIN, flag, WORD) for flag in ("--order", "--memory", "--norm")),
    *((TRAIN, flag, WORD) for flag in ("--schedule", "--network")),
    *((["train"], flag, COUNT) for flag in ("--ways", "--train-ways")),
    *((["train"], flag, WORD) for flag in ("--tasks", "--preset")),
    (["train", "imaml"], "--cg-steps", COUNT),
    (["train", "imaml"], "--damping", NUMBER),
    (["train", "maml_plus_plus"], "--anneal", NUMBER),
    (["train", "prototypical"], "--divergence", WORD),
    (["train", "matching"], "--scale", NUMBER),
    (["train", "matching"], "--context-steps", COUNT),
    (["train", "mann"], "--sequence", COUNT),
    (["train", "mann", "--sequence", "50"], "--strings", STRINGS),
    (["train", "--tasks", "folder:images"], "--image-size", COUNT),
    (["train", "--tasks", "folder:images"], "--channels", COUNT),
    (["train", "--tasks", "folder:images"], "--split-seed", COUNT),
    (["train", "--tasks", "folder:images"], "--classes", PARTS),
    (["train", "--tasks", "omniglot", "--data", "."], "--protocol", WORD),
    *((["evaluate", "run"], flag, COUNT) for flag in ("--episodes", "--shots", "--queries", "--seed")),
    (["evaluate", "run"], "--eval-steps", COUNT),
    (["plot", "run"], "--x", WORD),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "flag", "values"), [pytest.param(*each, id=each[1][2:]) for each in FLAGS]
)
def test_a_flag_s_value_that_cannot_be(place, command, flag, values):
    @EACH
    @given(value=values)
    def check(value):
        refused(place, [*command, flag, value], flag)

    check()


ABSURD = st.sampled_from(["100000000", "2000000000", "2147483647"])


@pytest.mark.parametrize("flag", ["--ways"])
def test_more_classes_than_there_are(place, flag):
    @EACH
    @given(value=ABSURD)
    def check(value):
        refused(place, ["train", flag, value], flag, flag.replace("--", "--train-"))

    check()


# --- A run's files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def copied(place, name):
    """A copy of a run, to be spoilt."""
    folder = place / f"copy{next(FOLDERS)}"
    shutil.copytree(place / name, folder)
    yield folder
    shutil.rmtree(folder)


@settings(EACH, max_examples=12)
@given(part=st.floats(0, 0.99))
def test_a_configuration_that_is_cut(place, part):
    with copied(place, "run") as run:
        content = (run / "config.json").read_bytes()
        (run / "config.json").write_bytes(content[: int(part * len(content))])
        refused(place, ["evaluate", run], "config.json")


@settings(EACH, max_examples=12)
@given(
    content=st.sampled_from(
        ["null", "[]", "3", '"run"', "{}", '{"learner": "maml"}', "NaN", "\x00", "{'a': 1}"]
    )
)
def test_a_configuration_that_is_another_thing(place, content):
    with copied(place, "run") as run:
        (run / "config.json").write_text(content)
        refused(place, ["evaluate", run], "config.json")
