"""Regression tasks from one's own examples: any number of them for each task."""

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

from jaxmeta.checks import ArgumentError, MissingFileError, check_finite, some
from jaxmeta.core import Key, SplitName, Task, TaskDistribution
from jaxmeta.tasks.array_files import decoded, npz_arrays
from jaxmeta.tasks.csv_files import read_csv
from jaxmeta.tasks.file_layouts import part_of
from jaxmeta.tasks.sinusoid import PointCounts, regression_card, split_points
from jaxmeta.tasks.splits import Classes, ClassSplit, split_classes, split_of_parts
from jaxmeta.tasks.subset import ordered_subset

_TASK = "task"
_SPLIT = "split"


class RegressionData(NamedTuple):
    """The examples of one part of a split, grouped by task; lives on the device.

    Attributes:
      x: `(n, *shape)` inputs.
      y: `(n, d)` targets.
      offsets: `(tasks,)` where each task starts.
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
    """Few-shot regression tasks from examples of any number of tasks.

    `sample(key)` draws a task uniformly from those of the part, and K + Q distinct examples of it, of which
    the first K are the support set. Tasks may have any numbers of examples, of at least K + Q. As classes
    are, tasks are shared out to the parts, and none is in two.

    Args:
      task: `(n,)` task of each example, integers or names.
      x: `(n,)` or `(n, *shape)` inputs.
      y: `(n,)` or `(n, d)` targets.
      shots: examples of a task to learn from, K.
      queries: examples of a task to evaluate on, Q.
      split: "train", "validation" or "test".
      task_split: which tasks are for what: the fractions of train, validation and test for a random split by
        `split_seed`, or the path of a JSON file `{"train": [names], "validation": [names], "test": [names]}`.
        In Python also such a mapping, or a `ClassSplit`. None draws from every task, whatever `split` says.
      split_seed: seed of the random split; episodes depend on the key given to `sample` alone.
      name: of the source, for the protocol card.
      skip_small_tasks: whether to leave out, with a warning, tasks with fewer than K + Q examples.

    Returns:
      Tasks with `x` `(n, *shape)`, `(n, 1)` where inputs are numbers, and `y` `(n, d)`, float32.

    Raises:
      ValueError: lengths or types that do not fit, values that are not finite, no tasks in a part, or tasks
        with too few examples.

    Examples:
      >>> x = np.linspace(0, 9, 60)
      >>> tasks = from_regression(np.repeat(np.arange(10), 6), x, np.sin(x), shots=2, queries=3)
      >>> drawn = tasks.sample(jax.random.key(0))
      >>> drawn.support.x.shape, drawn.query.y.shape
      ((2, 1), (3, 1))
    """
    regression_card(name, split, shots, queries, "")
    ids, inputs, targets = _checked(task, x, y)
    present, index = np.unique(ids, return_inverse=True)
    try:
        parts, protocol = split_classes(present.tolist(), task_split, split_seed, split, "")
        names = sorted(parts.part(split))
    except ArgumentError as error:
        if error.name != "classes":
            raise
        raise ArgumentError("task_split", error.problem.replace("classes", "tasks")) from None
    counts = np.bincount(index)[np.searchsorted(present, names)]
    needed = shots + queries
    small = [f"{each} ({count})" for each, count in zip(names, counts, strict=True) if count < needed]
    if small and (not skip_small_tasks or len(small) == len(names)):
        raise ArgumentError(
            "shots, queries",
            f"got {shots} + {queries} = {needed} examples, too many for {len(small)} of {len(names)} tasks: "
            f"{some(small)}; fewer would do, or skip_small_tasks, which leaves such tasks out",
        )
    if small:
        warnings.warn(
            f"{name}: {len(small)} of {len(names)} tasks of split={split!r} have fewer than {needed} "
            f"examples and are left out: {some(small)}",
            stacklevel=2,
        )
    kept = [each for each, count in zip(names, counts, strict=True) if count >= needed]
    rows = _rows(ids, kept)
    sizes = counts[counts >= needed]
    protocol = protocol.replace("class split", "task split")
    sentence = f"{len(kept)} tasks" + (f", {protocol}" if protocol else "")
    card = dataclasses.replace(regression_card(name, split, shots, queries, sentence), split_hash=parts.hash)
    data = RegressionData(
        jnp.asarray(inputs[rows]),
        jnp.asarray(targets[rows]),
        jnp.asarray(np.cumsum(sizes) - sizes, jnp.int32),
        jnp.asarray(sizes, jnp.int32),
    )
    sample = jax.tree_util.Partial(draw_regression, PointCounts(int(shots), int(queries)), data)
    return TaskDistribution(sample, card)


def draw_regression(counts: PointCounts, data: RegressionData, key: Key) -> Task:
    """One regression task, and distinct examples of it."""
    bits = jax.random.bits(key, (1 + counts.shots + counts.queries,), jnp.uint32)
    which = (bits[0] % data.sizes.shape[0]).astype(jnp.int32)
    rows = data.offsets[which] + ordered_subset(bits[1:], data.sizes[which])
    return split_points(data.x[rows], data.y[rows], counts.shots)


class Table(NamedTuple):
    """A file of examples of regression tasks.

    Attributes:
      task: `(n,)` names of tasks.
      x: `(n, inputs)`.
      y: `(n, targets)`.
      inputs, targets: names of the columns.
      split: the parts of the tasks, where the file says them.
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
    """Few-shot regression tasks from a table: a csv file with a row an example, or an npz file.

    Columns of a csv file are told by its header; of an npz file each array `(n,)` is a column, and an array
    `(n, d)` of the name `x` is the columns `x1` to `xd`. Episodes are those of `from_regression`.

    Args:
      path: the file.
      split: "train", "validation" or "test".
      shots: examples of a task to learn from.
      queries: examples of a task to evaluate on.
      task_column: column that names the task of an example.
      inputs: columns of inputs, in their order; without any all whose name begins with x.
      targets: columns of targets, in their order; without any all whose name begins with y.
      task_split: which tasks are for what: the fractions of train, validation and test for a random split by
        `split_seed`, or the path of a JSON file `{"train": [names], "validation": [names], "test": [names]}`.
        In Python also such a mapping, or a `ClassSplit`. "auto" is what the column split says, "train", "val"
        or "test", else the fractions 0.64,0.16,0.2. None draws from every task, whatever `split` says.
      split_seed: seed of the random split; episodes depend on the key given to `sample` alone.
      skip_small_tasks: whether to leave out, with a warning, tasks with fewer than shots + queries examples.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: columns that are not there, cells that are no numbers, which are named by their line; and
        see `from_regression`.
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
    """Read a table of examples of regression tasks; see `from_table`.

    Raises:
      FileNotFoundError, ValueError: see `from_table`.
    """
    if not path.is_file():
        raise MissingFileError("path", f"{path} is no file")
    # Which rows of which lines, for errors; None of arrays.
    lines: list[int] | None = None
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        columns, lines = _csv_columns(path, (task_column, *inputs, *targets))
    else:
        columns = _npz_columns(path)
    names = tuple(columns)

    def chosen(argument: str, asked: Sequence[str], letter: str) -> tuple[str, ...]:
        # Not all that begins so: "year" and "y_std" are no targets.
        numbered = re.compile(rf"{letter}[_ ]?\d*", re.IGNORECASE)
        found = tuple(asked) or tuple(
            name for name in names if numbered.fullmatch(name) and name != task_column
        )
        missing = [name for name in found if name not in columns]
        if missing or not found:
            said = (
                f"{path} has no column {missing[0]!r}"
                if missing
                else f"no column of {path} is called {letter}, {letter}1, {letter}2, …"
            )
            raise ArgumentError(argument, f"{said}; it has {some(map(repr, names), 10)}; name the columns")
        return found

    if task_column not in columns:
        raise ArgumentError(
            "task_column",
            f"{path} has no column {task_column!r}; it has {some(map(repr, names), 10)}; name the column "
            "that tells the task of an example",
        )
    inputs, targets = chosen("inputs", inputs, "x"), chosen("targets", targets, "y")
    both = sorted(set(inputs) & set(targets))
    if both:
        raise ArgumentError("targets", f"{both[0]!r} is an input and a target; it can be one of them")
    task = columns[task_column].astype(str)
    if not len(task):
        raise ArgumentError("path", f"{path} has no rows")
    empty = np.flatnonzero(np.char.strip(task) == "")
    if len(empty):
        raise ArgumentError("path", f"{path}{_place(lines, empty[0])}: the task is empty")
    x, y = (
        np.stack([_numbers(path, name, columns[name], lines) for name in chosen_names], axis=1)
        for chosen_names in (inputs, targets)
    )
    return Table(
        np.char.strip(task), x, y, tuple(inputs), tuple(targets), _split_of(path, task, columns, lines)
    )


def _csv_columns(path: Path, wanted: Sequence[str]) -> tuple[dict[str, np.ndarray], list[int]]:
    header, rows = read_csv(path, "path", lambda names: sum(name in names for name in wanted))
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ArgumentError("path", f"{path} has several columns {twice[0]!r}; each needs a name of its own")
    lines, cells = [], []
    for line, row in rows:
        lines.append(line)
        cells.append(row)
    table = np.array(cells, dtype=str).reshape(len(cells), len(header))
    return {name: table[:, place] for place, name in enumerate(header)}, lines


def _npz_columns(path: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    arrays = npz_arrays(path, "path")
    for name, array in arrays.items():
        array = decoded(path, "path", name, array)
        if array.ndim == 1:
            found[name] = array
        elif array.ndim >= 2:
            flat = array.reshape(len(array), math.prod(array.shape[1:]))
            found |= (
                {name: flat[:, 0]}
                if flat.shape[1] == 1
                else {f"{name}{place + 1}": flat[:, place] for place in range(flat.shape[1])}
            )
    lengths = {len(column) for column in found.values()}
    if len(lengths) > 1:
        said = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ArgumentError(
            "path", f"{path} has arrays of several lengths ({said}); each needs a row an example"
        )
    return found


def _place(lines: Sequence[int] | None, row: int | np.integer) -> str:
    return f", row {int(row)}" if lines is None else f", line {lines[int(row)]}"


def _numbers(path: Path, name: str, column: np.ndarray, lines: Sequence[int] | None) -> np.ndarray:
    """Return a column as float32, or refuse the first cell that is no finite number."""
    if column.dtype.kind in "US":
        numbers = np.empty(len(column), np.float64)
        for row, cell in enumerate(column.tolist()):
            try:
                numbers[row] = float(cell)
            except ValueError:
                raise ArgumentError(
                    "path",
                    f"{path}{_place(lines, row)}: got {cell!r} in the column {name}; it must be a number "
                    "such as 0.5",
                ) from None
    elif column.dtype.kind in "fiub":
        numbers = column.astype(np.float64)
    else:
        raise ArgumentError(
            "path", f"{path}: the column {name} has type {column.dtype}; it must hold numbers"
        )
    with np.errstate(over="ignore"):
        found = numbers.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(found))
    if len(wrong):
        raise ArgumentError(
            "path",
            f"{path}{_place(lines, wrong[0])}: got {numbers[wrong[0]]} in the column {name}; it must be a "
            "finite number of float32",
        )
    return found


def _split_of(
    path: Path, task: np.ndarray, columns: dict[str, np.ndarray], lines: Sequence[int] | None
) -> ClassSplit | None:
    """Return the parts that the column split gives to the tasks; None without one."""
    if _SPLIT not in columns or columns[_SPLIT].dtype.kind != "U":
        return None
    members: dict[str, str] = {}
    for row, (name, cell) in enumerate(zip(task.tolist(), columns[_SPLIT].tolist(), strict=True)):
        part = part_of(cell)
        if part is None:
            raise ArgumentError(
                "path", f"{path}{_place(lines, row)}: got the split {cell!r}; it must be train, val or test"
            )
        if members.setdefault(name.strip(), part) != part:
            raise ArgumentError(
                "path",
                f"{path}{_place(lines, row)}: the task {name!r} is in {part}, and in {members[name.strip()]} "
                "before",
            )
    if len(set(members.values())) == 1:
        warnings.warn(
            f"{path} names a single part, {next(iter(members.values()))}, which splits nothing", stacklevel=4
        )
    return split_of_parts(
        {part: [name for name in members if members[name] == part] for part in members.values()}
    )


def _rows(ids: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return the rows of the tasks `names`, task after task."""
    place = np.full(len(ids), -1)
    inside = np.isin(ids, names)
    place[inside] = np.searchsorted(names, ids[inside])
    return np.argsort(place, kind="stable")[np.sum(~inside) :]


def _checked(task, x, y) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Task names, inputs and targets as float32, or a ValueError."""
    task, x, y = np.asarray(task), np.asarray(x), np.asarray(y)
    if task.dtype.kind == "O" and all(isinstance(each, str) for each in task.ravel()):
        task = task.astype(str)
    if task.ndim != 1 or task.dtype.kind not in "iuU":
        raise ArgumentError(
            "task",
            f"got shape {task.shape} and type {task.dtype}; it must be (n,) integers or names of tasks",
        )
    found = []
    for name, array in (("x", x), ("y", y)):
        if array.ndim < 1 or len(array) != len(task):
            raise ArgumentError(
                f"task, {name}",
                f"got {task.shape} tasks and {array.shape} of {name}; there must be one for each",
            )
        if array.dtype.kind not in "fiub":
            raise ArgumentError(name, f"got {array.dtype}; it must hold numbers")
        array = array.astype(np.float32)
        check_finite(name, array)
        found.append(array[:, None] if array.ndim == 1 else array)
    if found[1].ndim != 2:
        raise ArgumentError("y", f"got shape {y.shape}; it must be (n,) or (n, d)")
    if not len(task):
        raise ArgumentError("task", "got no examples")
    return task.astype(str), found[0], found[1]
