"""Regression tasks from arrays or tables with any number of examples per task."""

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxmeta.checks import ArgumentError, MissingFileError, check_finite, join_names
from jaxmeta.core import Key, SplitName, Task, TaskDistribution
from jaxmeta.tasks.array_files import decoded, npz_arrays
from jaxmeta.tasks.csv_files import read_csv
from jaxmeta.tasks.file_layouts import part_of
from jaxmeta.tasks.sinusoid import PointCounts, regression_card, split_points
from jaxmeta.tasks.splits import TASKS, Classes, ClassSplit, hash_for_card, split_classes, split_of_parts
from jaxmeta.tasks.subset import ordered_subset

_TASK = "task"
_SPLIT = "split"


class _RegressionData(NamedTuple):
    """The examples of one part of a split on the device, grouped by task.

    Attributes:
      x: `(n, *shape)` inputs.
      y: `(n, d)` targets.
      offsets: `(tasks,)` first row of each task.
      sizes: `(tasks,)` number of examples of each task.
    """

    x: Float[Array, "n ..."]
    y: Float[Array, "n d"]
    offsets: Int[Array, " tasks"]
    sizes: Int[Array, " tasks"]


def from_regression(
    task: Array | np.ndarray | Sequence[Any],
    x: Array | np.ndarray | Sequence[Any],
    y: Array | np.ndarray | Sequence[Any],
    *,
    shots: int = 10,
    queries: int = 10,
    split: SplitName = "train",
    task_split: Classes = (0.64, 0.16, 0.2),
    split_seed: int = 0,
    name: str = "regression",
    skip_small_tasks: bool = False,
) -> TaskDistribution:
    """Return few-shot regression tasks from the examples of several tasks.

    `sample(key)` draws a task of the part uniformly, and K + Q distinct examples of it, of which the first K
    are the support set. Tasks may have different numbers of examples, at least K + Q. The split assigns each
    task to one part.

    Args:
      task: `(n,)` task of each example, integers or names.
      x: `(n,)` or `(n, *shape)` inputs.
      y: `(n,)` or `(n, d)` targets.
      shots: examples of a task to learn from, K.
      queries: examples of a task to evaluate on, Q.
      split: "train", "validation" or "test".
      task_split: split of the tasks: the fractions of train, validation and test for a random split seeded by
        `split_seed`, or the path of a JSON file `{"train": [names], "validation": [names], "test": [names]}`;
        in Python also such a mapping or a `ClassSplit`. None: every part draws from all tasks.
      split_seed: seed of the random split; episodes depend only on the key given to `sample`.
      name: name of the source, for the protocol card.
      skip_small_tasks: whether to skip, with a warning, tasks with fewer than K + Q examples.

    Returns:
      Tasks with `x` `(n, *shape)`, or `(n, 1)` for `(n,)` inputs, and `y` `(n, d)`, float32.

    Raises:
      ValueError: inconsistent lengths or types, values that are not finite, no tasks in the part, or tasks
        with too few examples.

    Examples:
      >>> x = np.linspace(0, 9, 60)
      >>> tasks = from_regression(np.repeat(np.arange(10), 6), x, np.sin(x), shots=2, queries=3)
      >>> support, query = tasks.sample(jax.random.key(0))
      >>> support.x.shape, query.y.shape
      ((2, 1), (3, 1))
    """
    regression_card(name, split, shots, queries, "")
    ids, inputs, targets = _checked(task, x, y)
    present, index = np.unique(ids, return_inverse=True)
    parts, protocol = split_classes(present.tolist(), task_split, split_seed, split, "", TASKS)
    names = sorted(parts.part(split))
    counts = np.bincount(index)[np.searchsorted(present, names)]
    needed = shots + queries
    small = [f"{each} ({count})" for each, count in zip(names, counts, strict=True) if count < needed]
    if small and (not skip_small_tasks or len(small) == len(names)):
        raise ArgumentError(
            "shots, queries",
            f"got {shots} + {queries} = {needed} examples, too many for {len(small)} of {len(names)} tasks: "
            f"{join_names(small)}; use fewer, or skip these tasks with skip_small_tasks",
        )
    if small:
        warnings.warn(
            f"{name}: {len(small)} of {len(names)} tasks of split={split!r} have fewer than {needed} "
            f"examples and are left out: {join_names(small)}",
            stacklevel=2,
        )
    kept = [each for each, count in zip(names, counts, strict=True) if count >= needed]
    rows = _rows(ids, kept)
    sizes = counts[counts >= needed]
    sentence = f"{len(kept)} tasks" + (f", {protocol}" if protocol else "")
    card = dataclasses.replace(
        regression_card(name, split, shots, queries, sentence),
        split_hash=hash_for_card(parts, split, task_split),
    )
    data = _RegressionData(
        jnp.asarray(inputs[rows]),
        jnp.asarray(targets[rows]),
        jnp.asarray(np.cumsum(sizes) - sizes, jnp.int32),
        jnp.asarray(sizes, jnp.int32),
    )
    sample = jax.tree_util.Partial(_draw_regression, PointCounts(int(shots), int(queries)), data)
    return TaskDistribution(sample, card)


def _draw_regression(counts: PointCounts, data: _RegressionData, key: Key) -> Task:
    """Draw one regression task and distinct examples of it."""
    bits = jax.random.bits(key, (1 + counts.shots + counts.queries,), jnp.uint32)
    index = (bits[0] % data.sizes.shape[0]).astype(jnp.int32)
    rows = data.offsets[index] + ordered_subset(bits[1:], data.sizes[index])
    return split_points(data.x[rows], data.y[rows], counts.shots)


class Table(NamedTuple):
    """The content of a file of regression examples.

    Attributes:
      task: `(n,)` task names.
      x: `(n, inputs)` inputs.
      y: `(n, targets)` targets.
      inputs, targets: column names.
      split: split given by the column split; None without one.
    """

    task: Shaped[np.ndarray, " n"]
    x: Float[np.ndarray, "n inputs"]
    y: Float[np.ndarray, "n targets"]
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    split: ClassSplit | None


def from_table(
    path: str | os.PathLike[str],
    split: SplitName = "train",
    *,
    shots: int = 10,
    queries: int = 10,
    task_column: str = _TASK,
    inputs: tuple[str, ...] = (),
    targets: tuple[str, ...] = (),
    task_split: Classes = "auto",
    split_seed: int = 0,
    skip_small_tasks: bool = False,
) -> TaskDistribution:
    """Return few-shot regression tasks from a table: a csv file with one row per example, or an npz file.

    The header of a csv file names its columns; in an npz file each array `(n,)` is a column, and an array `x`
    of shape `(n, d)` is the columns `x1` to `xd`. Episodes are those of `from_regression`.

    Args:
      path: path of the file.
      split: "train", "validation" or "test".
      shots: examples of a task to learn from.
      queries: examples of a task to evaluate on.
      task_column: column with the task of each example.
      inputs: input columns, in order; default: the columns x, x1, x2, ….
      targets: target columns, in order; default: the columns y, y1, y2, ….
      task_split: split of the tasks: the fractions of train, validation and test for a random split seeded by
        `split_seed`, or the path of a JSON file `{"train": [names], "validation": [names], "test": [names]}`;
        in Python also such a mapping or a `ClassSplit`. "auto": the column split ("train", "val" or
        "test"), else the fractions 0.64,0.16,0.2. None: every part draws from all tasks.
      split_seed: seed of the random split; episodes depend only on the key given to `sample`.
      skip_small_tasks: whether to skip, with a warning, tasks with fewer than shots + queries examples.

    Raises:
      FileNotFoundError: `path` does not exist.
      ValueError: a missing column, or a cell that is not a number; or see `from_regression`.

    Examples:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/table.npz"
      >>> np.savez(path, task=np.repeat(np.arange(10), 4), x=np.arange(40), y=np.arange(40) % 3)
      >>> from_table(path, shots=2, queries=2).sample(jax.random.key(0)).support.x.shape
      (2, 1)
    """
    file = Path(path).expanduser()
    table = read_table(file, task_column=task_column, inputs=inputs, targets=targets)
    if task_split == "auto":
        task_split = table.split or "auto"
    return from_regression(
        table.task,
        table.x,
        table.y,
        shots=shots,
        queries=queries,
        split=split,
        task_split=task_split,
        split_seed=split_seed,
        name=f"table:{file.name}",
        skip_small_tasks=skip_small_tasks,
    )


def read_table(
    path: Path, *, task_column: str = _TASK, inputs: Sequence[str] = (), targets: Sequence[str] = ()
) -> Table:
    """Read a table of regression examples; see `from_table`.

    Raises:
      FileNotFoundError, ValueError: see `from_table`.
    """
    if not path.is_file():
        raise MissingFileError("path", f"{path} is not a file")
    # Line number of each row, for errors; None for npz files.
    lines: list[int] | None = None
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        columns, lines = _csv_columns(path, (task_column, *inputs, *targets))
    else:
        columns = _npz_columns(path)
    names = tuple(columns)

    def select(argument: str, requested: Sequence[str], letter: str) -> tuple[str, ...]:
        # A prefix is not enough: "year" and "y_std" are not targets.
        numbered = re.compile(rf"{letter}[_ ]?\d*", re.IGNORECASE)
        selected = tuple(requested) or tuple(
            name for name in names if numbered.fullmatch(name) and name != task_column
        )
        missing = [name for name in selected if name not in columns]
        if missing or not selected:
            problem = (
                f"{path} has no column {missing[0]!r}"
                if missing
                else f"{path} has no column {letter}, {letter}1, {letter}2, …"
            )
            raise ArgumentError(
                argument, f"{problem}; it has {join_names(map(repr, names), 10)}; name the columns"
            )
        return selected

    if task_column not in columns:
        raise ArgumentError(
            "task_column",
            f"{path} has no column {task_column!r}; it has {join_names(map(repr, names), 10)}; name "
            "the column with the task of each example",
        )
    inputs, targets = select("inputs", inputs, "x"), select("targets", targets, "y")
    both = sorted(set(inputs) & set(targets))
    if both:
        raise ArgumentError("targets", f"{both[0]!r} is both an input and a target; use it as one of them")
    task = columns[task_column].astype(str)
    if not len(task):
        raise ArgumentError("path", f"{path} has no rows")
    empty = np.flatnonzero(np.char.strip(task) == "")
    if len(empty):
        raise ArgumentError("path", f"{path}{_position(lines, empty[0])}: the task is empty")
    x, y = (
        np.stack([_numbers(path, name, columns[name], lines) for name in selected], axis=1)
        for selected in (inputs, targets)
    )
    return Table(
        np.char.strip(task), x, y, tuple(inputs), tuple(targets), _split_of(path, task, columns, lines)
    )


def _csv_columns(path: Path, wanted: Sequence[str]) -> tuple[dict[str, np.ndarray], list[int]]:
    header, rows = read_csv(path, "path", lambda names: sum(name in names for name in wanted))
    duplicates = sorted({name for name in header if header.count(name) > 1})
    if duplicates:
        raise ArgumentError("path", f"{path} has several columns {duplicates[0]!r}; column names must differ")
    lines, cells = [], []
    for line, row in rows:
        lines.append(line)
        cells.append(row)
    table = np.array(cells, dtype=str).reshape(len(cells), len(header))
    return {name: table[:, index] for index, name in enumerate(header)}, lines


def _npz_columns(path: Path) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    arrays = npz_arrays(path, "path")
    for name, array in arrays.items():
        array = decoded(path, "path", name, array)
        if array.ndim == 1:
            columns[name] = array
        elif array.ndim >= 2:
            flat = array.reshape(len(array), math.prod(array.shape[1:]))
            columns |= (
                {name: flat[:, 0]}
                if flat.shape[1] == 1
                else {f"{name}{index + 1}": flat[:, index] for index in range(flat.shape[1])}
            )
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ArgumentError(
            "path", f"{path} has arrays of several lengths ({shapes}); each must have one row per example"
        )
    return columns


def _position(lines: Sequence[int] | None, row: int | np.integer) -> str:
    return f", row {int(row)}" if lines is None else f", line {lines[int(row)]}"


def _numbers(path: Path, name: str, column: np.ndarray, lines: Sequence[int] | None) -> np.ndarray:
    """Return a column as float32; the first cell that is not a finite number is an error."""
    if column.dtype.kind in "US":
        numbers = np.empty(len(column), np.float64)
        for row, cell in enumerate(column.tolist()):
            try:
                numbers[row] = float(cell)
            except ValueError:
                raise ArgumentError(
                    "path",
                    f"{path}{_position(lines, row)}: got {cell!r} in the column {name}; it must be a number "
                    "such as 0.5",
                ) from None
    elif column.dtype.kind in "fiub":
        numbers = column.astype(np.float64)
    else:
        raise ArgumentError(
            "path", f"{path}: the column {name} has type {column.dtype}; it must hold numbers"
        )
    with np.errstate(over="ignore"):
        values = numbers.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise ArgumentError(
            "path",
            f"{path}{_position(lines, wrong[0])}: got {numbers[wrong[0]]} in the column {name}; it must be a "
            "finite float32 number",
        )
    return values


def _split_of(
    path: Path, task: np.ndarray, columns: dict[str, np.ndarray], lines: Sequence[int] | None
) -> ClassSplit | None:
    """Return the split given by the column split; None without one, or where its type is not text."""
    if _SPLIT not in columns or columns[_SPLIT].dtype.kind != "U":
        return None
    members: dict[str, str] = {}
    for row, (name, cell) in enumerate(zip(task.tolist(), columns[_SPLIT].tolist(), strict=True)):
        part = part_of(cell)
        if part is None:
            raise ArgumentError(
                "path",
                f"{path}{_position(lines, row)}: got the split {cell!r}; it must be train, val or test",
            )
        if members.setdefault(name.strip(), part) != part:
            raise ArgumentError(
                "path",
                f"{path}{_position(lines, row)}: task {name!r} is in {part}, but in "
                f"{members[name.strip()]} in an earlier row",
            )
    if len(set(members.values())) == 1:
        warnings.warn(
            f"{path} has a single part, {next(iter(members.values()))}, which defines no split", stacklevel=4
        )
    return split_of_parts(
        {part: [name for name in members if members[name] == part] for part in members.values()}
    )


def _rows(ids: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return the rows of the tasks `names`, task after task."""
    index = np.full(len(ids), -1)
    inside = np.isin(ids, names)
    index[inside] = np.searchsorted(names, ids[inside])
    return np.argsort(index, kind="stable")[np.sum(~inside) :]


def _checked(task, x, y) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return task names, and inputs and targets as float32, or raise a ValueError."""
    task, x, y = np.asarray(task), np.asarray(x), np.asarray(y)
    if task.dtype.kind == "O" and all(isinstance(each, str) for each in task.ravel()):
        task = task.astype(str)
    if task.ndim != 1 or task.dtype.kind not in "iuU":
        raise ArgumentError(
            "task",
            f"got shape {task.shape} and type {task.dtype}; it must be (n,) integers or names of tasks",
        )
    arrays = []
    for name, array in (("x", x), ("y", y)):
        if array.ndim < 1 or len(array) != len(task):
            raise ArgumentError(
                f"task, {name}",
                f"got shapes {task.shape} and {array.shape}; they must have one row per example",
            )
        if array.dtype.kind not in "fiub":
            raise ArgumentError(name, f"got {array.dtype}; it must hold numbers")
        array = array.astype(np.float32)
        check_finite(name, array)
        arrays.append(array[:, None] if array.ndim == 1 else array)
    if arrays[1].ndim != 2:
        raise ArgumentError("y", f"got shape {y.shape}; it must be (n,) or (n, d)")
    if not len(task):
        raise ArgumentError("task", "got no examples")
    return task.astype(str), arrays[0], arrays[1]
