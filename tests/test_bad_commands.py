"""Invalid command lines: exit status 2, a one-line error that names the cause, and no file changed."""

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

SEARCH = settings(
    max_examples=3, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
FOLDERS = itertools.count()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a working folder with images, a run on sine waves and a run on the images."""
    parent = tmp_path_factory.mktemp("bad_commands")
    root = parent / "root"
    for name, shade in (("ant", 0), ("bee", 90), ("cat", 180), ("doe", 250)):
        (root / "images" / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.full((8, 8), shade + number, np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{number}.png")
    few = ["--steps", "1", "--meta-batch", "1", "--episodes", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("JAXMETA_CACHE", str(parent / "cache"))
        patch.setattr(run_of_command, "plot_curve", lambda *_: None)
        # One evaluation of the run instead of one for each number of inner steps.
        sinusoid = PRESETS["sinusoid"] | {"report_steps": ()}
        patch.setitem(PRESETS, "sinusoid", sinusoid)
        patch.setitem(NETWORKS, "conv4", functools.partial(small_mlp, hidden=()))
        # jaxtyping's checks run in tests only, and would raise before jaxmeta's own.
        jaxtyping.config.update("jaxtyping_disable", True)
        assert main(["train", "--tasks", "sinusoid", *few, "--out", "run"]) == 0
        images = ["--tasks", "folder:images", "--network", "conv4", "--classes", "0.5,0,0.5"]
        images += ["--ways", "2", "--queries", "1"]
        assert main(["train", "prototypical", *images, *few, "--out", "image_run"]) == 0
        yield root
        jaxtyping.config.update("jaxtyping_disable", False)


def rows(values, *, every):
    """Return parameters of a test: the first of `every` values by default, the others nightly."""
    return [
        pytest.param(*value, marks=pytest.mark.nightly if number % every else ())
        for number, value in enumerate(values)
    ]


def listing(folder):
    """Return the paths below a folder, files with their time and size.

    The time of a folder also changes where a temporary file in it comes and goes.
    """

    def state(path):
        stat = path.lstat()
        return None if path.is_dir() else (stat.st_mtime_ns, stat.st_size)

    return {path: state(path) for path in folder.rglob("*")}


def assert_error(root, argv, *names):
    """Assert that a command ends with status 2 and a one-line error with one of `names`."""
    before, error = listing(root.parent), io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        status = main([str(word) for word in argv])
    message = error.getvalue()
    assert status == 2, message
    assert "Traceback" not in message
    assert message.startswith("jaxmeta: error: ")
    assert len(message.splitlines()) == 1
    assert any(name in message for name in names), message
    after = listing(root.parent)
    assert {path: state for path, state in after.items() if before.get(path, "absent") != state} == {}
    assert before.keys() == after.keys()


# --- Flags ---------------------------------------------------------------------------------------------

NOT_A_NUMBER = ["", "ten", "1,5", "0x10", "[1]", "--", "1 2", "½"]
COUNT = st.sampled_from([*NOT_A_NUMBER, "-1", "-99999999999", "1.5", "nan", "inf", "9" * 20])
NUMBER = st.sampled_from([*NOT_A_NUMBER, "nan", "inf", "-inf", "-1", "-1e-9"])
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

# Values of the right type, so that the parser accepts them and the settings' own checks must raise.
PARSED = {COUNT: "-1", NUMBER: "nan", WORD: "xyz", STRINGS: "5,99", COUNTS: "1,-1", PARTS: "0.5,0.6,0"}


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [
        # One flag of each command and kind of values by default, the others nightly.
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
def test_values_out_of_range_are_errors_that_name_the_flag(root, command, flag, value):
    assert_error(root, [*command, flag, value], flag)


@pytest.mark.parametrize(("flag", "value"), [("--shots", "ten"), ("--shots", "1.5"), ("--inner-lr", "½")])
def test_values_that_are_not_numbers_are_errors_that_name_the_flag(root, flag, value):
    assert_error(root, [*TRAIN, flag, value], flag)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("command", "flag", "values"), [pytest.param(*case, id=case[1][2:]) for case in FLAGS]
)
def test_generated_invalid_values_are_errors_that_name_the_flag(root, command, flag, values):
    @SEARCH
    @given(value=values)
    def check(value):
        assert_error(root, [*command, flag, value], flag)

    check()


@pytest.mark.parametrize(
    ("flag", "value"),
    rows(itertools.product(["--ways", "--shots", "--queries", "--train-queries"], ABSURD), every=len(ABSURD)),
)
def test_tasks_larger_than_memory_are_errors(root, flag, value):
    assert_error(root, ["train", flag, value], flag, flag.replace("--", "--train-"))


# --- A run's files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def copied(root, name):
    """Yield a copy of a run, to be damaged."""
    folder = root / f"copy{next(FOLDERS)}"
    shutil.copytree(root / name, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "part",
    [0.5, *(pytest.param(part, marks=pytest.mark.nightly) for part in (0, 0.01, 0.2, 0.7, 0.95, 0.99))],
)
def test_truncated_configurations_are_errors(root, part):
    with copied(root, "run") as run:
        content = (run / "config.json").read_bytes()
        (run / "config.json").write_bytes(content[: int(part * len(content))])
        assert_error(root, ["evaluate", run], "config.json")


@pytest.mark.parametrize(
    "content",
    rows(
        zip(
            [
                "[]",
                "null",
                "3",
                '{"format": 4, "learner": "maml"}',
                '{"format": 4}',
                '"run"',
                "\x00",
                "{'a': 1}",
                "{}",
                '{"format": 4, "learner": {"name": "maml"}}',
                '{"format": []}',
                "[1]",
                "NaN",
            ]
        ),
        every=3,
    ),
)
def test_other_json_in_place_of_a_configuration_is_an_error(root, content):
    with copied(root, "run") as run:
        (run / "config.json").write_text(content)
        assert_error(root, ["evaluate", run], "config.json")


# Settings by group of config.json; each gets values of another type.
SETTINGS = {
    "learner": ("name", "eval_steps", "inner_steps", "inner_lr", "order", "memory", "proximal"),
    "network": ("name", "hidden"),
    "tasks": ("name", "shots", "queries", "noise", "train_shots"),
    "training": ("norm", "meta_batch", "outer_lr", "schedule", "clip", "distort", "outer_betas"),
    "run": ("episodes", "seed", "report_steps", "strategy", "mesh"),
}
TYPED = [(group, name) for group, names in SETTINGS.items() for name in names]
OTHERS = [[], [1], {}, {"a": 1}, "x", -1, 0.5, True, ["maml"]]


def check_value(root, group, name, value):
    """Assert that a value of another type is an error; return False for one of the same type."""
    with copied(root, "run") as run:
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
        assert_error(root, ["evaluate", run], "config.json")
    return True


@pytest.mark.parametrize(("group", "name"), TYPED)
def test_configurations_with_an_object_for_a_value_are_errors(root, group, name):
    assert check_value(root, group, name, {"a": 1})


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
def test_configurations_with_a_scalar_of_another_type_are_errors(root, group, name, value):
    assert check_value(root, group, name, value)


@pytest.mark.nightly
@pytest.mark.parametrize(("group", "name"), TYPED)
def test_configurations_with_any_value_of_another_type_are_errors(root, group, name):
    assert sum(check_value(root, group, name, value) for value in OTHERS) > 5


@pytest.mark.parametrize("group", ["learner", "network", "tasks", "training", "run"])
def test_configurations_with_missing_or_unknown_settings_are_errors(root, group):
    for change in (lambda values: values.pop(sorted(values)[0]), lambda values: values.update(unknown=1)):
        with copied(root, "run") as run:
            config = json.loads((run / "config.json").read_text())
            change(config[group])
            (run / "config.json").write_text(json.dumps(config))
            assert_error(root, ["evaluate", run], "config.json")


@pytest.mark.parametrize(
    ("metadata_only", "part"),
    [
        (True, 0.3),
        (False, 0.9),
        *(
            pytest.param(metadata_only, part, marks=pytest.mark.nightly)
            for metadata_only in (True, False)
            for part in (0, 0.6)
        ),
    ],
)
def test_truncated_checkpoints_are_errors(root, metadata_only, part):
    """Truncate all files of the checkpoints, or only Orbax's metadata."""
    with copied(root, "run") as run:
        for path in [path for path in (run / "checkpoints").rglob("*") if path.is_file()]:
            if not metadata_only or path.name in ("_METADATA", "metadata") or "manifest" in path.parts:
                path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
        assert_error(root, ["evaluate", run], "checkpoint")


def test_runs_without_a_checkpoint_folder_are_errors(root):
    for damage in (shutil.rmtree, lambda path: (shutil.rmtree(path), path.write_text("mine"))):
        with copied(root, "run") as run:
            damage(run / "checkpoints")
            assert_error(root, ["evaluate", run], "checkpoint")


@pytest.mark.parametrize("flag", ["--inner-lr=0.3", "--shots=3", "--steps=9", "--seed=3", "--order=first"])
def test_resuming_with_other_settings_is_an_error(root, flag):
    with copied(root, "run") as run:
        assert_error(root, ["train", "--resume", "--out", run, flag], flag.partition("=")[0])


def test_resuming_a_run_with_another_learner_is_an_error(root):
    for learner in ("prototypical", "image_run"):
        assert_error(root, ["train", learner, "--resume", "--out", "run"], "LEARNER")


# --- Images and archives --------------------------------------------------------------------------------


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, content=b""):
    """Return a PNG file whose header states this size."""
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


def check_image(root, command, content, name):
    folder = root / f"photos{next(FOLDERS)}"
    shutil.copytree(root / "images", folder)
    (folder / "bee" / name).write_bytes(content)
    path = f"bee/{name}"
    if command == "train":
        assert_error(root, ["train", "--tasks", f"folder:{folder}", "--ways", "2"], path)
    else:
        folders = {"support": root / "images", "query": root / "images", command: folder}
        argv = ["predict", "image_run", "--support", folders["support"], "--query", folders["query"]]
        assert_error(root, argv, path, f"--{command}")
    shutil.rmtree(folder)


@pytest.mark.parametrize("command", ["train", "support", "query"])
@pytest.mark.parametrize(
    ("content", "name"), [(png(60000, 60000), "1.png"), (png(0, 0), "1.jpg"), (b"GIF89a", "1.gif")]
)
def test_invalid_image_files_are_errors(root, command, content, name):
    check_image(root, command, content, name)


@pytest.mark.parametrize("command", ["support", "query"])
def test_truncated_images_are_errors(root, command):
    check_image(root, command, png(8, 8, b"\0" * 5), "1.png")


@pytest.mark.nightly
@pytest.mark.parametrize("command", ["train", "support", "query"])
def test_generated_invalid_image_files_are_errors(root, command):
    @settings(SEARCH, max_examples=8)
    @given(content=st.sampled_from(IMAGES), name=st.sampled_from(["1.png", "1.jpg", "1.gif"]))
    def check(content, name):
        check_image(root, command, content, name)

    check()


def test_folders_and_dangling_links_named_as_images_are_errors(root):
    for make in (lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere")):
        folder = root / f"odd{next(FOLDERS)}"
        (folder / "ant").mkdir(parents=True)
        make(folder / "ant" / "0.png")
        assert_error(root, ["train", "--tasks", f"folder:{folder}", "--ways", "2"], str(folder), "ant")
        assert_error(
            root, ["predict", "image_run", "--support", folder, "--query", "images"], "--support", str(folder)
        )


CLASSES = ['{"train": ["ant"], "test": ["ant"]}', "[]", "3", '{"train": [["ant"]], "test": [{}]}', "{", ""]
CLASSES += ['{"train": [], "other": []}', '{"train": "ab"}', '{"train": 3}', "[" * 100_000, "\x00"]


@pytest.mark.parametrize(
    "content", rows(zip(CLASSES), every=3), ids=[str(number) for number in range(len(CLASSES))]
)
def test_invalid_class_split_files_are_errors(root, content):
    file = root / f"classes{next(FOLDERS)}.json"
    file.write_text(content)
    assert_error(
        root, ["train", "--tasks", "folder:images", "--ways", "2", "--classes", file], "--classes", "classes"
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
        every=3,
    ),
)
def test_truncated_archives_and_paths_outside_are_errors(root, members, keep):
    data = root / f"data{next(FOLDERS)}"
    data.mkdir()
    for part in ("background", "evaluation"):
        path = data / f"images_{part}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for member in members:
                archive.writestr(member, png(105, 105))
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert_error(root, ["train", "--tasks", "omniglot", "--data", data], "images_background.zip")
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
        every=3,
    ),
)
def test_truncated_tar_archives_and_links_are_errors(root, member, keep):
    data = root / f"data{next(FOLDERS)}"
    data.mkdir()
    path = data / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(TAR_MEMBERS[member])
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert_error(root, ["train", "--tasks", "cifar_fs", "--data", data], "--data", "cifar-100")
    shutil.rmtree(data)


def test_the_error_for_a_missing_extra_gives_the_command_that_installs_it(root, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert main(["train", "--tasks", "tfds:mnist", "--out", "none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'jaxmeta[tfds]'" in line
    assert not (root / "none").exists()
