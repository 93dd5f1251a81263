"""Tests of `jaxmeta evaluate --per-class`: accuracy and confusions of named classes."""

import sys

import numpy as np
import pytest
from support import read_json

import jaxmeta as jm
from jaxmeta.cli import main
from jaxmeta.cli.run import evaluation_key

LEARNER = '''import jax.numpy as jnp

import jaxmeta as jm


def first_slot(network):
    """Build a learner that predicts the first class slot for every query."""

    def predict(params, ways, x, mask=None):
        return jnp.zeros((x.shape[0], ways.shape[0])).at[:, 0].set(1.0)

    def adapt(params, support, key):
        return jnp.zeros(support.ways)

    def loss(params, task, key, step=None):
        return params["w"] ** 2, {}

    return jm.Learner(lambda key, task: {"w": jnp.ones(())}, adapt, predict, loss)
'''
EPISODES = 12
SHAPE = {"ways": 3, "shots": 1, "queries": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder with a run of a user-defined learner on user-defined arrays."""
    folder = tmp_path_factory.mktemp("per_class")
    (folder / "my_first_slot.py").write_text(LEARNER)
    x = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
    np.savez(folder / "mine.npz", x=x, y=np.repeat([*"abcdef"], 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        argv = ["train", "my_first_slot:first_slot", "--tasks", "arrays:mine.npz", "--classes", "0.5,0,0.5"]
        argv += ["--network", "mlp", "--steps", "1", "--meta-batch", "1", "--episodes", "2", "--out", "run"]
        argv += [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
        assert main(argv) == 0
        yield folder
    sys.modules.pop("my_first_slot", None)


def evaluate(*argv):
    return main(["evaluate", "run", "--learner", "my_first_slot:first_slot", *argv])


def test_results_per_class_of_a_learner_that_always_predicts_the_first_slot(trained, capsys):
    argv = ["--per-class", "--episodes", str(EPISODES), "--json", "out.json", "--confusion", "out.png"]
    assert evaluate(*argv) == 0
    printed = capsys.readouterr().out
    with np.load(trained / "mine.npz") as mine:
        tasks = jm.tasks.from_arrays(mine["x"], mine["y"], split="test", classes=(0.5, 0.0, 0.5), **SHAPE)
    keys = jm.episode_keys(evaluation_key(0), np.arange(EPISODES))[:, 0]
    first = [jm.tasks.classes_of(tasks, key)[0] for key in keys]
    result = read_json(trained / "out.json")
    assert result["accuracy"]["inductive"]["mean"] == pytest.approx(1 / 3)
    (classes,) = result["per_class"].values()
    # With three test classes and three ways, each task has two queries of each class.
    assert [entry["class"] for entry in classes] == list(tasks.classes)
    for entry in classes:
        assert entry["queries"] == 2 * EPISODES
        assert entry["accuracy"] == pytest.approx(first.count(entry["class"]) / EPISODES)
        assert entry["taken_for"] == {
            name: 2 * first.count(name)
            for name in tasks.classes
            if name != entry["class"] and first.count(name)
        }
    rows = [line.split() for line in printed.splitlines()]
    lowest = min(tasks.classes, key=first.count)
    start = rows.index(["class", "queries", "inductive"])
    share = f"{100 * first.count(lowest) / EPISODES:.1f}"
    assert rows[start + 1] == [lowest, str(2 * EPISODES), share, "%"]
    highest = max(tasks.classes, key=first.count)
    start = rows.index(["class", "taken", "for", "queries", "of", "its", "queries"])
    assert rows[start + 1][1:3] == [highest, str(2 * first.count(highest))]
    assert (trained / "out.png").read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_without_the_flag_has_no_results_per_class(trained, capsys):
    assert evaluate("--episodes", "2", "--json", "plain.json") == 0
    assert "per_class" not in read_json(trained / "plain.json")
    assert "taken for" not in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--per-class", "--confusion"])
def test_tasks_without_class_names_are_refused(trained, flag, capsys):
    (trained / "my_unnamed.py").write_text(
        "import jaxmeta as jm\n\n\n"
        "def unnamed(split, *, ways: int = 3, shots: int = 1, queries: int = 2):\n"
        '    """Draw characters without class names."""\n'
        "    tasks = jm.tasks.glyphs(split, ways=ways, shots=shots, queries=queries, size=8)\n"
        "    return jm.TaskDistribution(tasks.sample)\n"
    )
    argv = ["--episodes", "2", "--tasks", "my_unnamed:unnamed"]
    assert evaluate(*argv) == 0
    assert evaluate(*argv, flag, *(["out.png"] if flag == "--confusion" else [])) == 2
    message = capsys.readouterr().err
    assert f"{flag}: got tasks of 'my_unnamed:unnamed', whose classes have no names" in message
    sys.modules.pop("my_unnamed", None)
