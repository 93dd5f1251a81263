"""Tests of regression tasks from arrays and tables: draws, task splits, and invalid tables."""

import re

import jax
import numpy as np
import pytest

import jaxmeta as jm
from jaxmeta.checks import ArgumentError
from jaxmeta.tasks.regression import read_table
from jaxmeta.tasks.splits import ClassSplit

SIZES = (4, 9, 5, 6, 7)
TASK = np.repeat([f"t{i}" for i in range(5)], SIZES)
# An example is (task, index within the task).
X = np.array([[task, index] for task, size in enumerate(SIZES) for index in range(size)], np.float64)
Y = 100 * X[:, :1] + X[:, 1:]
ORDER = np.random.default_rng(1).permutation(len(X))


def episodes(tasks, number=60):
    """Draw a batch of tasks."""
    return jax.vmap(tasks.sample)(jax.random.split(jax.random.key(0), number))


def test_support_and_query_are_distinct_examples_of_one_task():
    tasks = jm.tasks.from_regression(TASK[ORDER], X[ORDER], Y[ORDER], shots=2, queries=2, task_split=None)
    support, query = episodes(tasks, 300)
    assert (support.x.shape, query.y.shape) == ((300, 2, 2), (300, 2, 1))
    x = np.concatenate([support.x, query.x], axis=1)
    y = np.concatenate([support.y, query.y], axis=1)
    assert (x[:, :, 0] == x[:, :1, 0]).all()
    assert all(len(set(indices)) == 4 for indices in x[:, :, 1].tolist())
    np.testing.assert_array_equal(y[..., 0], 100 * x[..., 0] + x[..., 1])
    # All examples of all tasks occur, and tasks are uniform: 60 ± 5 standard deviations.
    assert {(a, b) for a, b in x.reshape(-1, 2).tolist()} == {(a, b) for a, b in X.tolist()}
    counts = np.bincount(x[:, 0, 0].astype(int))
    assert np.abs(counts - 60).max() < 5 * np.sqrt(300 * 0.2 * 0.8)


def test_each_task_is_in_one_part():
    seen = {}
    for split in ("train", "validation", "test"):
        tasks = jm.tasks.from_regression(
            TASK, X, Y, shots=1, queries=1, split=split, task_split=(0.4, 0.2, 0.4), split_seed=3
        )
        seen[split] = set(np.unique(episodes(tasks).support.x[..., 0]).astype(int).tolist())
    expected = ClassSplit.from_fractions([f"t{i}" for i in range(5)], (0.4, 0.2, 0.4), 3)
    assert {part: {f"t{i}" for i in ids} for part, ids in seen.items()} == {
        part: set(expected.part(part)) for part in seen
    }
    assert tasks.card.split_hash == expected.hash
    assert tasks.card.protocol == "2 tasks, random task split (0.4, 0.2, 0.4), seed 3"
    assert (tasks.card.kind, tasks.card.ways, tasks.card.shots) == ("regression", None, 1)
    named = ClassSplit(train=("t0",), test=("t4",))
    tasks = jm.tasks.from_regression(TASK, X, Y, shots=1, queries=1, split="test", task_split=named)
    assert set(np.unique(episodes(tasks).query.x[..., 0]).tolist()) == {4.0}


def test_scalar_inputs_get_one_feature():
    tasks = jm.tasks.from_regression(
        [3] * 6, np.arange(6), np.arange(6) > 2, shots=2, queries=3, task_split=None
    )
    support, query = tasks.sample(jax.random.key(1))
    assert (support.x.shape, query.x.shape, query.y.shape) == ((2, 1), (3, 1), (3, 1))
    np.testing.assert_array_equal(query.y, query.x > 2)
    assert support.y.dtype == np.float32


def test_tasks_with_too_few_examples_raise_an_error_or_are_skipped():
    settings = {"shots": 3, "queries": 3, "task_split": None}
    with pytest.raises(
        ValueError,
        match=r"3 \+ 3 = 6 examples, too many for 2 of 5 tasks: t0 \(4\), t2 \(5\); .*skip_small_tasks",
    ):
        jm.tasks.from_regression(TASK, X, Y, **settings)
    with pytest.warns(
        UserWarning, match=r"2 of 5 tasks of split='train' have fewer than 6 examples .*t0 \(4\), t2 \(5\)"
    ):
        tasks = jm.tasks.from_regression(TASK, X, Y, **settings, skip_small_tasks=True)
    assert set(np.unique(episodes(tasks).support.x[..., 0]).tolist()) == {1.0, 3.0, 4.0}
    with pytest.raises(ValueError, match="too many for 5 of 5 tasks"):
        jm.tasks.from_regression(TASK, X, Y, shots=9, queries=9, task_split=None, skip_small_tasks=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TASK[:3], X, Y), r"task, x: got shapes \(3,\) and \(31, 2\)"),
        ((TASK, X, Y[:3]), r"task, y: got shapes \(31,\) and \(3, 1\)"),
        ((TASK, X, Y[..., None]), r"y: got shape \(31, 1, 1\); it must be \(n,\) or \(n, d\)"),
        ((X, X, Y), r"task: got shape \(31, 2\) and type float64"),
        ((TASK, X.astype(str), Y), "x: got <U"),
        ((TASK, np.where(X == 4, np.nan, X), Y), "x: got NaN or infinity"),
        (([], [], []), r"task: got shape \(0,\) and type float64"),
        ((TASK[:0], X[:0], Y[:0]), "task: got no examples"),
    ],
)
def test_inconsistent_examples_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        jm.tasks.from_regression(*arguments, shots=1, queries=1)


def test_invalid_settings_of_regression_tasks_are_refused():
    with pytest.raises(ValueError, match="task_split: got half; it must be three fractions"):
        jm.tasks.from_regression(TASK, X, Y, task_split="half")
    with pytest.raises(ValueError, match="shots: got 0"):
        jm.tasks.from_regression(TASK, X, Y, shots=0)


def test_errors_of_the_task_split_speak_of_tasks_and_keep_paths(tmp_path):
    with pytest.raises(ValueError, match=r"task_split: got my_classes\.json; it must be three fractions"):
        jm.tasks.from_regression(TASK, X, Y, task_split="my_classes.json")
    with pytest.raises(ValueError, match="task_split: 1 of 2 tasks of split='train' have no examples: 'z'"):
        jm.tasks.from_regression(TASK, X, Y, task_split={"train": [TASK[0], "z"]})
    path = tmp_path / "my classes split.json"
    for content, message in (
        ("[]", "is not a task split in JSON: it holds []"),
        (
            '{"train": ["a", "a"]}',
            "is not a task split in JSON: the task split repeats tasks within train: 'a'",
        ),
        ('{"train": 3}', "is not a task split in JSON: train must be a sequence of task names, got 3"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ArgumentError, match=re.escape(f"task_split: {path} {message}")):
            jm.tasks.from_regression(TASK, X, Y, task_split=str(path))


def test_errors_of_part_and_seed_of_a_task_split_speak_of_tasks():
    split = {"train": [TASK[0]], "validation": [TASK[-1]]}
    message = (
        "split: got 'test', which has no tasks in this task split; it has train (1), validation (1); use "
        "another part, or another task split (task_split)"
    )
    with pytest.raises(ArgumentError, match=re.escape(message)):
        jm.tasks.from_regression(TASK, X, Y, split="test", task_split=split)
    with pytest.raises(ArgumentError, match="split_seed: a task split by names needs none"):
        jm.tasks.from_regression(TASK, X, Y, task_split=split, split_seed=1)


# --- tables -----------------------------------------------------------------------------------------------


def csv(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_gives_the_same_tasks_as_arrays(tmp_path):
    lines = [
        f"{task},{x1},{x2},{y}" for task, (x1, x2), (y,) in zip(TASK, X.tolist(), Y.tolist(), strict=True)
    ]
    path = csv(tmp_path / "own.csv", "\n".join(["task,x1,x_2,y", *lines]))
    npz = tmp_path / "own.npz"
    np.savez(npz, task=TASK, x=X, y=Y)
    expected = jm.tasks.from_regression(TASK, X, Y, shots=2, queries=2)
    for file in (path, npz):
        tasks = jm.tasks.from_table(file, "train", shots=2, queries=2)
        for actual, wanted in zip(episodes(tasks), episodes(expected), strict=True):
            np.testing.assert_array_equal(actual.x, wanted.x)
            np.testing.assert_array_equal(actual.y, wanted.y)
        assert tasks.card.split_hash == expected.card.split_hash
    assert read_table(npz).inputs == ("x1", "x2")
    table = read_table(path, task_column="x1", inputs=("y",), targets=("x_2",))
    assert (table.inputs, table.targets, table.task[4]) == (("y",), ("x_2",), "1.0")
    np.testing.assert_array_equal(table.x, Y)


def test_columns_that_only_start_with_x_or_y_are_ignored(tmp_path):
    path = csv(tmp_path / "own.csv", "task,year,x,y,y_std\na,2000,1,2,9\na,2001,3,4,9\n")
    table = read_table(path)
    assert (table.inputs, table.targets) == (("x",), ("y",))
    assert table.y.tolist() == [[2.0], [4.0]]


def test_bytes_are_decoded_and_empty_tables_are_refused(tmp_path):
    tasks = np.array(["é", "é", "b", "b"])
    npz = tmp_path / "own.npz"
    np.savez(npz, task=np.char.encode(tasks, "utf-8"), x=np.arange(4.0), y=np.arange(4.0))
    assert read_table(npz).task.tolist() == tasks.tolist()
    np.savez(npz, task=np.array([b"\xff"]), x=np.zeros(1), y=np.zeros(1))
    with pytest.raises(ValueError, match=r"path: .*own.npz: task holds bytes that are not UTF-8"):
        read_table(npz)
    np.savez(npz, task=np.zeros(0, str), x=np.zeros((0, 2)), y=np.zeros(0))
    with pytest.raises(ValueError, match=r"path: .*own.npz has no rows"):
        read_table(npz)


def test_a_split_column_with_a_single_part_gives_a_warning(tmp_path):
    path = csv(tmp_path / "own.csv", "task,x,y,split\na,0,1,train\nb,1,1,train\n")
    with pytest.warns(UserWarning, match=r"own.csv has a single part, train, which defines no split"):
        assert read_table(path).split is None


def test_a_split_column_defines_the_split(tmp_path):
    text = "task;x;y;split\na;0;1;train\na;1;1;train\nb;2;1;Test\nb;3;1;test\nc;4;5;val\nc;4;5;val\n"
    path = csv(tmp_path / "own.csv", text)
    assert read_table(path).split == ClassSplit(("a",), ("c",), ("b",))
    tasks = jm.tasks.from_table(path, "test", shots=1, queries=1)
    assert set(np.unique(episodes(tasks, 9).support.x).tolist()) == {2.0, 3.0}
    assert jm.tasks.from_table(path, shots=1, queries=1, task_split=None).card.protocol == "3 tasks"
    with pytest.raises(ValueError, match=r"line 4: task 'a' is in test, but in train in an earlier row"):
        read_table(csv(path, "task,x,y,split\na,0,1,train\nb,0,1,train\na,1,1,test\n"))
    with pytest.raises(ValueError, match=r"line 2: got the split 'hold'"):
        read_table(csv(path, "task,x,y,split\na,0,1,hold\n"))


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("id,x,y\n1,2,3\n", {}, r"task_column: .* has no column 'task'; it has 'id', 'x', 'y'"),
        ("task,a,y\n1,2,3\n", {}, r"inputs: .* has no column x, x1"),
        ("task,x,b\n1,2,3\n", {}, r"targets: .* has no column y, y1"),
        ("task,x,y\n1,2,3\n", {"inputs": ("z",)}, r"inputs: .* has no column 'z'"),
        ("task,x,y\n1,2,3\n", {"targets": ("x",)}, "targets: 'x' is both an input and a target"),
        ("task,x,y\n1,2,3\n1,two,3\n", {}, r"line 3: got 'two' in the column x; it must be a number"),
        ("task;x;y\n1;2,5;3\n", {}, r"line 2: got '2,5' in the column x"),
        ("task,x,y\n1,,3\n", {}, r"line 2: got '' in the column x"),
        ("task,x,y\n\n1,2,nan\n", {}, r"line 3: got nan in the column y; it must be a finite"),
        ("task,x,y\n1,1e60,0\n", {}, r"line 2: got 1e\+60 in the column x"),
        ("task,x,y\n 1,2\n", {}, "line 2: expected 3 cells, got 2"),
        ("task,x,y\n ,2,3\n", {}, "line 2: the task is empty"),
        ("task,x,y\n", {}, "has no rows"),
        ("task,x,x,y\n1,2,3,4\n", {}, "has several columns 'x'"),
    ],
)
def test_invalid_tables_raise_errors_that_name_the_line(tmp_path, text, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        jm.tasks.from_table(csv(tmp_path / "own.csv", text), shots=1, queries=1, **settings)
    assert "\n" not in str(caught.value)


def test_arrays_of_different_lengths_are_refused(tmp_path):
    np.savez(tmp_path / "own.npz", task=TASK, x=X[:3], y=Y)
    with pytest.raises(
        ValueError, match=r"arrays of several lengths \(task \(31,\), x \(3, 2\), y \(31, 1\)\)"
    ):
        read_table(tmp_path / "own.npz")
    with pytest.raises(FileNotFoundError, match=r"none\.csv is not a file"):
        read_table(tmp_path / "none.csv")
