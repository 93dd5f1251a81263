"""Whatever the command line is given: status 2, one line that names it, and no file touched."""

import contextlib
import io
import itertools
import json
import shutil
import struct
import tarfile
import zipfile
import zlib

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
    *((TRAIN, flag, WORD) for flag in ("--schedule", "--strategy", "--network")),
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


@pytest.mark.parametrize("flag", ["--ways", "--shots", "--queries", "--train-queries"])
def test_tasks_larger_than_any_memory(place, flag):
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


@settings(EACH, max_examples=8)
@given(part=st.floats(0, 0.99))
def test_a_configuration_that_is_cut(place, part):
    with copied(place, "run") as run:
        content = (run / "config.json").read_bytes()
        (run / "config.json").write_bytes(content[: int(part * len(content))])
        refused(place, ["evaluate", run], "config.json")


@settings(EACH, max_examples=8)
@given(
    content=st.sampled_from(
        ["null", "[]", "3", '"run"', "{}", '{"learner": "maml"}', "NaN", "\x00", "{'a': 1}"]
    )
)
def test_a_configuration_that_is_another_thing(place, content):
    with copied(place, "run") as run:
        (run / "config.json").write_text(content)
        refused(place, ["evaluate", run], "config.json")


TYPED = (
    "learner",
    "tasks",
    "shots",
    "queries",
    "eval_steps",
    "episodes",
    "inner_steps",
    "inner_lr",
    "network",
)
TYPED += (
    "norm",
    "order",
    "memory",
    "meta_batch",
    "outer_lr",
    "schedule",
    "proximal",
    "clip",
    "stream",
    "distort",
)


@pytest.mark.parametrize("name", TYPED)
def test_a_configuration_with_a_value_of_another_type(place, name):
    @EACH
    @given(value=st.sampled_from([[], [1], {}, {"a": 1}, "x", -1, 0.5, True, ["maml"]]))
    def check(value):
        with copied(place, "run") as run:
            config = json.loads((run / "config.json").read_text())
            if type(value) is type(config[name]) or (
                name in ("inner_lr", "outer_lr", "proximal", "clip") and value == 0.5
            ):
                return
            (run / "config.json").write_text(json.dumps({**config, name: value}))
            refused(place, ["evaluate", run], f"--{name.replace('_', '-')}", "config.json", f"{name}: ")

    check()


def test_checkpoints_that_are_cut(place):
    @settings(EACH, max_examples=8)
    @given(part=st.sampled_from([0, 0.3, 0.9]), which=st.integers(0, 99))
    def check(part, which):
        with copied(place, "run") as run:
            files = sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file())
            # The arrays' own data, or the manifest.
            told = [
                path for path in files if path.name in ("_METADATA", "metadata") or "manifest" in path.parts
            ]
            chosen = files if which % 2 else told
            for path in chosen:
                path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
            refused(place, ["evaluate", run], "checkpoint")

    check()


def test_a_run_without_its_checkpoints_or_with_files_in_their_place(place):
    for spoil in (shutil.rmtree, lambda path: (shutil.rmtree(path), path.write_text("mine"))):
        with copied(place, "run") as run:
            spoil(run / "checkpoints")
            refused(place, ["evaluate", run], "checkpoint")


@settings(EACH, max_examples=6)
@given(flag=st.sampled_from(["--inner-lr=0.3", "--shots=3", "--steps=9", "--seed=3", "--order=first"]))
def test_resuming_with_other_settings(place, flag):
    with copied(place, "run") as run:
        refused(place, ["train", "--resume", "--out", run, flag], flag.partition("=")[0])


def test_resuming_the_run_of_another_learner(place):
    for learner in ("reptile", "prototypical", "fomaml", "namer"):
        refused(place, ["train", learner, "--resume", "--out", "run"], "LEARNER")


# --- Images and archives --------------------------------------------------------------------------------


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, content=b""):
    """A PNG file that says it is of this size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def jpeg():
    file = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, "JPEG")
    return file.getvalue()


IMAGES = st.sampled_from(
    [
        png(60000, 60000),
        png(2**31 - 1, 1),
        png(0, 0),
        png(8, 8, b"\0" * 5),
        png(8, 8)[:30],
        jpeg()[:120],
        jpeg()[:2],
        b"",
        b"mine",
        b"GIF89a",
        b"II*\0\xff\xff\xff\xff",
        b"RIFF\0\0\0\0WEBP",
    ]
)


@pytest.mark.parametrize("command", ["train", "support", "query"])
def test_images_that_are_none_or_lie_about_their_size(place, command):
    @settings(EACH, max_examples=8)
    @given(content=IMAGES, name=st.sampled_from(["1.png", "1.jpg", "1.gif"]))
    def check(content, name):
        folder = place / f"photos{next(FOLDERS)}"
        shutil.copytree(place / "images", folder)
        (folder / "bee" / name).write_bytes(content)
        said = f"bee/{name}"
        if command == "train":
            refused(place, ["train", "--tasks", f"folder:{folder}", "--ways", "2"], said)
        else:
            shown = {"support": place / "images", "query": place / "images", command: folder}
            argv = ["predict", "namer", "--support", shown["support"], "--query", shown["query"]]
            refused(place, argv, said, f"--{command}")
        shutil.rmtree(folder)

    check()


def test_folders_and_dangling_links_named_as_images(place):
    for make in (lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere")):
        folder = place / f"odd{next(FOLDERS)}"
        (folder / "ant").mkdir(parents=True)
        make(folder / "ant" / "0.png")
        refused(place, ["train", "--tasks", f"folder:{folder}", "--ways", "2"], str(folder), "ant")
        refused(
            place, ["predict", "namer", "--support", folder, "--query", "images"], "--support", str(folder)
        )


CLASSES = ["3", "[]", '{"train": 3}', '{"train": [], "other": []}', '{"train": "ab"}', "{", "", "\x00"]
CLASSES += ['{"train": ["ant"], "test": ["ant"]}', '{"train": [["ant"]], "test": [{}]}', "[" * 100_000]


@settings(EACH, max_examples=len(CLASSES))
@given(content=st.sampled_from(CLASSES))
def test_a_file_of_classes_that_is_none(place, content):
    file = place / f"classes{next(FOLDERS)}.json"
    file.write_text(content)
    refused(
        place, ["train", "--tasks", "folder:images", "--ways", "2", "--classes", file], "--classes", "classes"
    )


MEMBERS = ["../evil.png", "/evil.png", "C:/evil.png", "..\\evil.png", "images_background/../../evil.png"]
MEMBERS += [
    "images_background/Own/character01/0001_01.png",
    "a" * 300 + ".png",
    "images_background/../x/y/1.png",
]


@settings(EACH, max_examples=6)
@given(
    members=st.lists(st.sampled_from(MEMBERS), max_size=3, unique=True), keep=st.sampled_from([1.0, 0.5, 0.0])
)
def test_archives_that_are_not_whole_or_point_outside(place, members, keep):
    data = place / f"data{next(FOLDERS)}"
    data.mkdir()
    for part in ("background", "evaluation"):
        path = data / f"images_{part}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for member in members:
                archive.writestr(member, png(105, 105))
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    refused(place, ["train", "--tasks", "omniglot", "--data", data], "images_background.zip")
    shutil.rmtree(data)


def link(target):
    member = tarfile.TarInfo("cifar-100-binary/train.bin")
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@settings(EACH, max_examples=8)
@given(
    member=st.sampled_from(
        [
            link("/etc/passwd"),
            link("../../images/ant/0.png"),
            link("cifar-100-binary/train.bin"),
            tarfile.TarInfo("../train.bin"),
            tarfile.TarInfo("cifar-100-binary/train.bin"),
        ]
    ),
    keep=st.sampled_from([1.0, 0.5, 0.0]),
)
def test_tar_archives_with_links_or_cut(place, member, keep):
    data = place / f"data{next(FOLDERS)}"
    data.mkdir()
    path = data / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(member)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    refused(place, ["train", "--tasks", "cifar_fs", "--data", data], "--data", "cifar-100")
    shutil.rmtree(data)
