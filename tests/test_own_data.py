"""User-defined data on the command line: folders of images, arrays and tables."""

import json

import jax
import numpy as np
import pytest
from configs import config_of
from PIL import Image

import jaxmeta as jm
from jaxmeta.cli import build, names, run, sources
from jaxmeta.cli.main import main
from jaxmeta.cli.target_data import read_target, split_shots

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (24, 4, 4), np.uint8)
Y = np.repeat(np.arange(8), 3)
SHORT = (
    "--steps",
    "2",
    "--meta-batch",
    "2",
    "--episodes",
    "4",
    "--devices",
    "1",
    "--inner-steps",
    "1",
    "--eval-steps",
    "1",
)
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Use a network that compiles quickly, and a separate cache for each test."""
    monkeypatch.setenv("JAXMETA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(names.NETWORKS, "conv4-32", lambda ways: jm.nn.MLP(out=ways, hidden=(8,), norm=True))
    monkeypatch.setattr(run, "plot_curve", lambda *_: None)


def train(out, tasks, *flags):
    status = main(["train", "fomaml", "--tasks", tasks, *SHORT, *flags, "--out", str(out)])
    return status, json.loads((out / "config.json").read_text()) if status == 0 else None


@pytest.mark.nightly
def test_training_on_arrays(tmp_path, capsys, monkeypatch):
    np.savez(tmp_path / "own.npz", x=X, y=Y)
    monkeypatch.chdir(tmp_path)
    status, config = train(
        tmp_path / "run", "arrays:own.npz", "--ways", "2", "--queries", "1", "--classes", "0.5,0,0.5"
    )
    assert status == 0
    assert config["tasks"]["name"] == f"arrays:{tmp_path / 'own.npz'}"
    assert (config["images"]["size"], config["images"]["channels"]) == (4, 1)
    # The stored path is absolute.
    monkeypatch.chdir("/")
    np.savez(tmp_path / "own.npz", x=X)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert f"{tmp_path / 'own.npz'} lacks y" in capsys.readouterr().err
    assert train(tmp_path / "other", f"arrays:{tmp_path / 'own.npz'}")[0] == 2
    assert "--tasks: " + str(tmp_path / "own.npz") + " lacks y" in capsys.readouterr().err
    assert train(tmp_path / "other", "arrays:FILE")[0] == 2
    assert "give your FILE after the colon" in capsys.readouterr().err


def test_tasks_are_built_from_files_of_arrays_and_tables(tmp_path):
    np.savez(tmp_path / "own.npz", x=X, y=Y)
    flags = {"ways": 2, "queries": 2, "classes": (0.5, 0.0, 0.5)}
    config = config_of(flags, tasks=f"arrays:{tmp_path / 'own.npz'}")
    tasks = sources.tasks_of(config, "test")
    assert (tasks.card.tasks, tasks.card.classes) == ("arrays:own.npz", 4)
    assert sources.validation_tasks_of(config) is None
    assert (sources.summary_of(config), sources.with_columns(config)) == (None, config)

    np.savez(tmp_path / "table.npz", task=Y, x=RNG.random((24, 2)), y=RNG.random((24, 3)), z=Y)
    flags = {"shots": 1, "queries": 2, "train_shots": 1, "train_queries": 2}
    config = config_of(flags, tasks=f"table:{tmp_path / 'table.npz'}")
    assert sources.tasks_of(config, "train").card.protocol.startswith("5 tasks, random task split (0.64,")
    config = sources.with_columns(config)
    assert (config.tasks["inputs"], config.tasks["targets"]) == (("x1", "x2"), ("y1", "y2", "y3"))
    assert build.output_width(config) == 3


@pytest.mark.nightly
def test_training_on_a_table_of_two_targets(tmp_path, capsys):
    lines = ["person,day,dose,weight,pulse"]
    for person in range(12):
        lines += [f"p{person},{day},{day % 3},{day + person},{person}" for day in range(6)]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    flags = ("--task-column", "person", "--inputs", "day,dose", "--targets", "weight,pulse")
    flags += ("--shots", "2", "--queries", "2")
    status, config = train(tmp_path / "run", f"table:{tmp_path / 'own.csv'}", *flags)
    assert status == 0
    assert (config["tasks"]["inputs"], config["tasks"]["targets"]) == (["day", "dose"], ["weight", "pulse"])
    assert config["split_hash"]
    learner, params = jm.load_run(tmp_path / "run")
    task = jm.tasks.from_table(
        tmp_path / "own.csv",
        task_column="person",
        inputs=("day", "dose"),
        targets=("weight", "pulse"),
        shots=2,
        queries=2,
    ).sample(KEY)
    outputs = learner.predict(params, learner.adapt(params, task.support, KEY), task.query.x)
    assert outputs.shape == (2, 2)
    capsys.readouterr()
    assert train(tmp_path / "other", f"table:{tmp_path / 'own.csv'}")[0] == 2
    assert "--task-column: " in capsys.readouterr().err


def test_arrays_of_features_need_a_network_that_takes_them(tmp_path, capsys):
    np.savez(tmp_path / "own.npz", x=X.reshape(24, 16) / 255, y=Y)
    flags = ("--ways", "2", "--queries", "1", "--classes", "0.5,0,0.5", "--network", "conv4")
    assert train(tmp_path / "run", f"arrays:{tmp_path / 'own.npz'}", *flags)[0] == 2
    message = capsys.readouterr().err
    assert (
        "--network: got conv4, which does not take examples of shape (16,); convolutional networks take"
        in message
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_columns_found_in_a_table_are_stored_in_the_configuration(tmp_path):
    np.savez(
        tmp_path / "own.npz", task=np.repeat(np.arange(9), 5), x=RNG.random((45, 2)), y=RNG.random((45, 3))
    )
    flags = ("--shots", "2", "--queries", "2")
    status, config = train(tmp_path / "run", f"table:{tmp_path / 'own.npz'}", *flags)
    assert status == 0
    assert (config["tasks"]["inputs"], config["tasks"]["targets"]) == (["x1", "x2"], ["y1", "y2", "y3"])
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0


def write_images(root, **parts):
    for part, classes in parts.items():
        for name, count in classes.items():
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(RNG.integers(0, 256, (4, 4), np.uint8)).save(
                    root / part / name / f"{number}.png"
                )
    return f"folder:{root}"


@pytest.mark.nightly
def test_training_on_folders_of_parts(tmp_path, capsys):
    sizes = {part: {f"{part}{i}": 3 for i in range(2)} for part in ("train", "val", "test")}
    sizes["test"]["test2"] = 1
    tasks = write_images(tmp_path / "own", **sizes)
    flags = ("--ways", "2", "--queries", "2")
    assert train(tmp_path / "run", tasks, *flags)[0] == 2
    assert (
        "1 of 3 classes have fewer: test2 (1); use fewer shots or queries, or skip" in capsys.readouterr().err
    )
    status, config = train(tmp_path / "run", tasks, *flags, "--skip-small-classes")
    assert status == 0
    output = capsys.readouterr()
    assert (
        "read      19 images of 7 classes, by folders train, val, test, each with one folder per class"
        in output.out
    )
    assert (
        "1 of 3 classes of split='test' have fewer than 3 examples and are left out: test2 (1)" in output.err
    )
    assert config["tasks"]["classes"] == "auto"
    assert config["split_hash"] == jm.tasks.prepare_folder(tmp_path / "own").split.hash


def test_folders_without_a_test_part_are_refused_with_the_available_parts(tmp_path, capsys):
    tasks = write_images(tmp_path / "own", train={"a": 3, "b": 3}, val={"c": 3, "d": 3})
    assert train(tmp_path / "run", tasks, "--ways", "2", "--queries", "2")[0] == 2
    message = capsys.readouterr().err
    assert (
        "got 'test', which has no classes in this class split; it has train (2), validation (2); use another"
        in message
    )


def test_a_target_of_arrays_has_their_classes_and_parts(tmp_path):
    parts = np.tile(["train", "train", "test"], 8)
    np.savez(tmp_path / "own.npz", x=X, y=np.array(list("abcdefgh"))[Y], split=parts)
    target = read_target(f"arrays:{tmp_path / 'own.npz'}", {}, None, KEY, size=None, channels=None)
    assert target.classes == tuple("abcdefgh")
    split = split_shots(target, None, KEY)
    np.testing.assert_array_equal(np.flatnonzero(parts == "test"), split.score)
    np.testing.assert_array_equal(target.x, X[..., None])
    assert target.protocol == "learning from its train images, scoring on its test images"
    np.savez(tmp_path / "own.npz", x=X, y=Y)
    target = read_target(f"arrays:{tmp_path / 'own.npz'}", {}, 1, KEY, size=None, channels=None)
    assert (target.scored, target.y.tolist()) == (None, Y.tolist())
    with pytest.raises(ValueError, match=r"^target: .*none\.npz is not a file"):
        read_target(f"arrays:{tmp_path / 'none.npz'}", {}, 1, KEY, size=None, channels=None)
    np.savez(tmp_path / "own.npz", x=X.reshape(24, 16), y=Y)
    with pytest.raises(ValueError, match=r"has examples of shape \(16,\); images have shape"):
        read_target(f"arrays:{tmp_path / 'own.npz'}", {}, 1, KEY, size=None, channels=None)


def test_paths_of_sources_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in ("folder", "arrays", "table"):
        assert sources.absolute(f"{kind}:own") == f"{kind}:{tmp_path / 'own'}"
    for name in ("tfds:own", "omniglot", "my.module:tasks"):
        assert sources.absolute(name) == name
