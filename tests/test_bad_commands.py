"""Whatever the command line is given: status 2, one line that names it, and no file touched."""

import contextlib
import functools
import io
import itertools
import json
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib

import jaxtyping
import numpy as np
import pytest
from bars import small_mlp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxmeta.cli import main
from jaxmeta.cli import run as run_of_command
from jaxmeta.cli.names import NETWORKS
from jaxmeta.cli.presets import PRESETS

EACH = settings(
    max_examples=3, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
FOLDERS = itertools.count()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the command runs: images of classes, a run on sine waves and one on the images."""
    above = tmp_path_factory.mktemp("bad_commands")
    place = above / "place"
    for name, shade in (("ant", 0), ("bee", 90), ("cat", 180), ("doe", 250)):
        (place / "images" / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.full((8, 8), shade + number, np.uint8)
            Image.fromarray(pixels).save(place / "images" / name / f"{number}.png")
    few = ["--steps", "1", "--meta-batch", "1", "--episodes", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("JAXMETA_CACHE", str(above / "cache"))
        patch.setattr(run_of_command, "plot_curve", lambda *_: None)
        # One evaluation of the run, in place of one for each number of inner steps.
        sinusoid = PRESETS["sinusoid"] | {"report_steps": ()}
        patch.setitem(PRESETS, "sinusoid", sinusoid)
        patch.setitem(NETWORKS, "conv4", functools.partial(small_mlp, hidden=()))
        # Users have no type checker, which would be first to speak.
        jaxtyping.config.update("jaxtyping_disable", True)
        assert main(["train", "--tasks", "sinusoid", *few, "--out", "run"]) == 0
        own = ["--tasks", "folder:images", "--network", "conv4", "--classes", "0.5,0,0.5"]
        own += ["--ways", "2", "--queries", "1"]
        assert main(["train", "prototypical", *own, *few, "--out", "namer"]) == 0
        yield place
        jaxtyping.config.update("jaxtyping_disable", False)


def rows(values, *, each):
    """Of every `each` values in turn the first for the default run, the others for the nightly one."""
    return [
        pytest.param(*value, marks=pytest.mark.nightly if number % each else ())
        for number, value in enumerate(values)
    ]


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
    after = listing(place.parent)
    assert {path: state for path, state in after.items() if before.get(path) != state} == {}
    assert before.keys() == after.keys()


# --- Flags ---------------------------------------------------------------------------------------------

NO_NUMBER = ["", "ten", "1,5", "0x10", "[1]", "--", "1 2", "½"]
COUNT = st.sampled_from([*NO_NUMBER, "-1", "-99999999999", "1.5", "nan", "inf", "9" * 20])
NUMBER = st.sampled_from([*NO_NUMBER, "nan", "inf", "-inf", "-1", "-1e-9"])
WORD = st.one_of(
    st.text("abcxyz_.:/*é ", min_size=1, max_size=6).filter(lambda text: text.strip()),
    st.just("\n"),
    st.just(""),
)

STRINGS = st.sampled_from(["", "5", "5,5,5", "1,5", "a,b", "5,99"])
COUNTS = st.sampled_from(["", "a", "1,,2", "-1", "1.5,2", "1,-1"])
PARTS = st.sampled_from(["", "1", "0.5,0.6,0", "a,b,c", "nan,0,1"])
TRAIN = ["train", "--tasks", "sinusoid"]
FLAGS = [
    *((TRAIN, flag, COUNT) for flag in ("--shots", "--queries", "--train-shots", "--train-queries")),
    *((TRAIN, flag, COUNT) for flag in ("--steps", "--meta-batch", "--episodes", "--validate-every")),
    *((TRAIN, flag, COUNT) for flag in ("--inner-steps", "--eval-steps", "--inner-batch", "--seed")),
    *((TRAIN, flag, COUNT) for flag in ("--truncation", "--devices")),
    *((TRAIN, flag, NUMBER) for flag in ("--inner-lr", "--outer-lr", "--clip", "--proximal")),
    *((TRAIN, flag, NUMBER) for flag in ("--clip-norm", "--weight-decay", "--outer-momentum", "--outer-eps")),
    *((TRAIN, flag, NUMBER) for flag in ("--decay-factor", "--outer-betas")),
    *((TRAIN, flag, COUNT) for flag in ("--decay-every", "--log-every")),
    (TRAIN, "--outer-optimizer", WORD),
    (TRAIN, "--report-steps", COUNTS),
    *((TRAIN, flag, WORD) for flag in ("--order", "--memory", "--training.norm")),
    *((TRAIN, flag, WORD) for flag in ("--schedule", "--strategy", "--network")),
    *((["train"], flag, COUNT) for flag in ("--ways", "--train-ways")),
    *((["train"], flag, WORD) for flag in ("--tasks", "--preset")),
    (["train", "imaml"], "--cg-steps", COUNT),
    (["train", "imaml"], "--damping", NUMBER),
    (["train", "maml_plus_plus"], "--anneal-steps", COUNT),
    (["train", "prototypical"], "--divergence", WORD),
    (["train", "matching"], "--scale", NUMBER),
    (["train", "matching"], "--context-steps", COUNT),
    (["train", "mann"], "--sequence", COUNT),
    (["train", "mann", "--sequence", "50"], "--strings", STRINGS),
    (["train", "--tasks", "folder:images"], "--size", COUNT),
    (["train", "--tasks", "folder:images"], "--channels", COUNT),
    (["train", "--tasks", "folder:images"], "--split-seed", COUNT),
    (["train", "--tasks", "folder:images"], "--classes", PARTS),
    (["train", "--tasks", "omniglot", "--data", "."], "--protocol", WORD),
    *((["evaluate", "run"], flag, COUNT) for flag in ("--episodes", "--shots", "--queries", "--seed")),
    (["evaluate", "run"], "--eval-steps", COUNT),
    (["plot", "run"], "--x", WORD),
]  # fmt: skip


ABSURD = ["2147483647", "2000000000", "100000000"]

# Values that the parser takes for what they should be, so that the settings' own checks must refuse them.
PARSED = {COUNT: "-1", NUMBER: "nan", WORD: "xyz", STRINGS: "5,99", COUNTS: "1,-1", PARTS: "0.5,0.6,0"}


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        # By default a flag of each command and kind of values.
        pytest.param(
            command,
            flag,
            PARSED[values],
            id=flag[2:],
            marks=pytest.mark.nightly if (command, values) in [(c, v) for c, _, v in FLAGS[:number]] else (),
        )
        for number, (command, flag, values) in enumerate(FLAGS)
    ],
)
def test_a_value_out_of_range_is_refused_by_its_flags_name(place, command, flag, value):
    refused(place, [*command, flag, value], flag)


@pytest.mark.parametrize(("flag", "value"), [("--shots", "ten"), ("--shots", "1.5"), ("--inner-lr", "½")])
def test_a_value_that_is_no_number_is_refused_by_its_flags_name(place, flag, value):
    refused(place, [*TRAIN, flag, value], flag)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("command", "flag", "values"), [pytest.param(*each, id=each[1][2:]) for each in FLAGS]
)
def test_drawn_values_that_a_flag_cannot_have_are_refused_by_its_name(place, command, flag, values):
    @EACH
    @given(value=values)
    def check(value):
        refused(place, [*command, flag, value], flag)

    check()


@pytest.mark.parametrize(
    ("flag", "value"),
    rows(itertools.product(["--ways", "--shots", "--queries", "--train-queries"], ABSURD), each=len(ABSURD)),
)
def test_tasks_larger_than_any_memory_are_refused(place, flag, value):
    refused(place, ["train", flag, value], flag, flag.replace("--", "--train-"))


# --- A run's files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def copied(place, name):
    """A copy of a run, to be spoilt."""
    folder = place / f"copy{next(FOLDERS)}"
    shutil.copytree(place / name, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "part",
    [0.5, *(pytest.param(part, marks=pytest.mark.nightly) for part in (0, 0.01, 0.2, 0.7, 0.95, 0.99))],
)
def test_a_configuration_that_is_cut_is_refused(place, part):
    with copied(place, "run") as run:
        content = (run / "config.json").read_bytes()
        (run / "config.json").write_bytes(content[: int(part * len(content))])
        refused(place, ["evaluate", run], "config.json")


@pytest.mark.parametrize(
    "content",
    rows(
        zip(
            [
                *(
                    "[]",
                    "null",
                    "3",
                    '{"format": 3, "learner": "maml"}',
                    '{"format": 3}',
                    '"run"',
                    "\x00",
                    "NaN",
                ),
                *("{'a': 1}", '{"format": 3, "learner": {"name": "maml"}}', '{"format": []}', "{}", "NaN"),
            ]
        ),
        each=3,
    ),
)
def test_a_configuration_that_is_another_thing_is_refused(place, content):
    with copied(place, "run") as run:
        (run / "config.json").write_text(content)
        refused(place, ["evaluate", run], "config.json")


# By the group of config.json: settings, of which each is given values of another type.
TYPED = {
    "learner": ("name", "eval_steps", "inner_steps", "inner_lr", "order", "memory", "proximal"),
    "network": ("name", "hidden"),
    "tasks": ("name", "shots", "queries", "noise", "train_shots"),
    "training": ("norm", "meta_batch", "outer_lr", "schedule", "clip", "distort", "outer_betas"),
    "run": ("episodes", "seed", "report_steps", "strategy", "mesh"),
}
TYPED = [(group, name) for group, names in TYPED.items() for name in names]
OTHERS = [[], [1], {}, {"a": 1}, "x", -1, 0.5, True, ["maml"]]


def with_another_value(place, group, name, value):
    """Whether the value is of another type than the setting's, and then that it is refused."""
    with copied(place, "run") as run:
        config = json.loads((run / "config.json").read_text())
        fitting = {
            0.5: ("inner_lr", "outer_lr", "proximal", "clip", "noise"),
            -1: ("inner_lr", "outer_lr", "proximal", "clip", "noise"),
            True: ("distort",),
            "x": ("mesh",),
            (): ("hidden", "report_steps"),
            (1,): ("hidden", "report_steps"),
        }
        fits = not isinstance(value, dict) and name in fitting.get(
            tuple(value) if isinstance(value, list) else value, ()
        )
        if fits or (type(value) is type(config[group][name]) and not isinstance(value, list)):
            return False
        config[group][name] = value
        (run / "config.json").write_text(json.dumps(config))
        refused(place, ["evaluate", run], "config.json")
    return True


@pytest.mark.parametrize(("group", "name"), TYPED)
def test_a_configuration_with_a_value_of_another_type_is_refused(place, group, name):
    assert with_another_value(place, group, name, {"a": 1})


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("tasks", "shots", "x"),
        ("tasks", "shots", 0.5),
        ("tasks", "shots", True),
        ("tasks", "name", -1),
        ("learner", "inner_lr", "x"),
        ("training", "distort", "x"),
    ],
)
def test_a_configuration_with_a_scalar_of_another_type_is_refused(place, group, name, value):
    assert with_another_value(place, group, name, value)


@pytest.mark.nightly
@pytest.mark.parametrize(("group", "name"), TYPED)
def test_configurations_with_any_value_of_another_type_are_refused(place, group, name):
    assert sum(with_another_value(place, group, name, value) for value in OTHERS) > 5


@pytest.mark.parametrize("group", ["learner", "network", "tasks", "training", "run"])
def test_a_configuration_without_a_setting_or_with_one_too_many_is_refused(place, group):
    for change in (lambda its: its.pop(sorted(its)[0]), lambda its: its.update(unknown=1)):
        with copied(place, "run") as run:
            config = json.loads((run / "config.json").read_text())
            change(config[group])
            (run / "config.json").write_text(json.dumps(config))
            refused(place, ["evaluate", run], "config.json")


@pytest.mark.parametrize(
    ("told", "part"),
    [
        (True, 0.3),
        (False, 0.9),
        *(pytest.param(told, part, marks=pytest.mark.nightly) for told in (True, False) for part in (0, 0.6)),
    ],
)
def test_checkpoints_that_are_cut_are_refused(place, told, part):
    """Of all their files, or of those of Orbax that tell what the others hold."""
    with copied(place, "run") as run:
        for path in [path for path in (run / "checkpoints").rglob("*") if path.is_file()]:
            if not told or path.name in ("_METADATA", "metadata") or "manifest" in path.parts:
                path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
        refused(place, ["evaluate", run], "checkpoint")


def test_a_run_without_its_checkpoints_or_with_files_in_their_place(place):
    for spoil in (shutil.rmtree, lambda path: (shutil.rmtree(path), path.write_text("mine"))):
        with copied(place, "run") as run:
            spoil(run / "checkpoints")
            refused(place, ["evaluate", run], "checkpoint")


@pytest.mark.parametrize("flag", ["--inner-lr=0.3", "--shots=3", "--steps=9", "--seed=3", "--order=first"])
def test_resuming_with_other_settings_is_refused(place, flag):
    with copied(place, "run") as run:
        refused(place, ["train", "--resume", "--out", run, flag], flag.partition("=")[0])


def test_resuming_the_run_of_another_learner_is_refused(place):
    for learner in ("prototypical", "namer"):
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


IMAGES = [
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


def refuse_image(place, command, content, name):
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


@pytest.mark.parametrize("command", ["train", "support", "query"])
@pytest.mark.parametrize(
    ("content", "name"), [(png(60000, 60000), "1.png"), (png(0, 0), "1.jpg"), (b"GIF89a", "1.gif")]
)
def test_files_that_are_no_images_or_state_a_wrong_size_are_refused(place, command, content, name):
    refuse_image(place, command, content, name)


@pytest.mark.parametrize("command", ["support", "query"])
def test_an_image_that_ends_early_is_refused(place, command):
    refuse_image(place, command, png(8, 8, b"\0" * 5), "1.png")


@pytest.mark.nightly
@pytest.mark.parametrize("command", ["train", "support", "query"])
def test_drawn_files_that_are_no_images_or_state_a_wrong_size_are_refused(place, command):
    @settings(EACH, max_examples=8)
    @given(content=st.sampled_from(IMAGES), name=st.sampled_from(["1.png", "1.jpg", "1.gif"]))
    def check(content, name):
        refuse_image(place, command, content, name)

    check()


def test_folders_and_dangling_links_named_as_images_are_refused(place):
    for make in (lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere")):
        folder = place / f"odd{next(FOLDERS)}"
        (folder / "ant").mkdir(parents=True)
        make(folder / "ant" / "0.png")
        refused(place, ["train", "--tasks", f"folder:{folder}", "--ways", "2"], str(folder), "ant")
        refused(
            place, ["predict", "namer", "--support", folder, "--query", "images"], "--support", str(folder)
        )


CLASSES = ['{"train": ["ant"], "test": ["ant"]}', "[]", "3", '{"train": [["ant"]], "test": [{}]}', "{", ""]
CLASSES += ['{"train": [], "other": []}', '{"train": "ab"}', '{"train": 3}', "[" * 100_000, "\x00"]


@pytest.mark.parametrize(
    "content", rows(zip(CLASSES), each=3), ids=[str(number) for number in range(len(CLASSES))]
)
def test_a_file_of_classes_that_is_none_is_refused(place, content):
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


@pytest.mark.parametrize(
    ("members", "keep"),
    rows(
        [
            (MEMBERS[:1], 1.0),
            (MEMBERS[1:4], 1.0),
            ([], 1.0),
            (MEMBERS[5:6], 0.5),
            (MEMBERS[4:], 1.0),
            (MEMBERS[5:], 0.5),
            ([], 0.0),
            ([], 0.5),
        ],
        each=3,
    ),
)
def test_archives_that_are_not_whole_or_point_outside_are_refused(place, members, keep):
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


TAR_MEMBERS = {
    "a link outside": link("/etc/passwd"),
    "a path outside": tarfile.TarInfo("../train.bin"),
    "an empty file": tarfile.TarInfo("cifar-100-binary/train.bin"),
    "a link to another file": link("../../images/ant/0.png"),
    "a link to itself": link("cifar-100-binary/train.bin"),
}


@pytest.mark.parametrize(
    ("member", "keep"),
    rows(
        [
            *itertools.product(["a link outside"], (1.0, 0.5, 0.0)),
            *itertools.product(["an empty file"], (1.0, 0.5, 0.0)),
            *itertools.product(["a path outside"], (0.5, 1.0, 0.0)),
            *(("a link to itself", keep) for keep in (0.0, 1.0, 0.5)),
            *(("a link to another file", keep) for keep in (1.0, 0.5, 0.0)),
        ],
        each=3,
    ),
)
def test_tar_archives_with_links_or_cut_are_refused(place, member, keep):
    data = place / f"data{next(FOLDERS)}"
    data.mkdir()
    path = data / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(TAR_MEMBERS[member])
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    refused(place, ["train", "--tasks", "cifar_fs", "--data", data], "--data", "cifar-100")
    shutil.rmtree(data)


def test_a_package_of_an_extra_that_is_missing_is_named_with_the_command_that_installs_it(
    place, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert main(["train", "--tasks", "tfds:mnist", "--out", "none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'jaxmeta[tfds]'" in line
    assert not (place / "none").exists()
