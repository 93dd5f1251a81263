"""Subtree surgery: parts of trees of parameters taken, replaced, renamed and transplanted.

Paths and patterns are those of `jaxmeta.paths`: "body/layer_0/kernel", "body/**", "**/bias".
No function copies an array, and none alters a tree that it is given: results share their leaves, so a
compiled step that donates one tree's buffers takes them from all.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmeta.checks import ArgumentError
from jaxmeta.paths import (
    Patterns,
    PyTree,
    Rules,
    find,
    leaves_by_path,
    mask,
    matching,
    predicate,
    put,
    rename,
    renamed_paths,
    shortened,
)

__all__ = [
    "Patterns",
    "Report",
    "Row",
    "Rules",
    "leaves_by_path",
    "mask",
    "matching",
    "rename",
    "swap_subtree",
    "take_subtree",
    "transplant",
]


# --- One subtree ---------------------------------------------------------------------------------


class _Spec(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


def _spec(leaf: Any, path: str) -> _Spec:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return _Spec(tuple(leaf.shape), leaf.dtype)
    if isinstance(leaf, bool | int | float | complex):
        return _Spec((), jnp.result_type(leaf))
    raise ValueError(
        f'"{path}": got {leaf!r}; leaves must be arrays, jax.ShapeDtypeStructs or numbers '
        f"(of a module with other leaves take the arrays, as eqx.filter does)"
    )


def take_subtree(tree: PyTree, path: str) -> PyTree:
    """The node at a path, the very object that the tree holds, in its own structure.

    Args:
      tree: any pytree.
      path: such as "body/layer_0"; "" is the whole tree.

    Raises:
      ValueError: no node has this path; the message says how far the tree follows it, and what is there.

    Examples:
      >>> take_subtree({"body": [1.0, 2.0], "head": {"bias": 3.0}}, "head")
      {'bias': 3.0}
    """
    return find(tree, path).value


def swap_subtree(tree: PyTree, path: str, subtree: PyTree, *, strict: bool = True) -> PyTree:
    """The tree with another subtree at a path; all the rest are the very same objects.

    Args:
      tree: any pytree.
      path: of the node to replace; "" is the whole tree.
      subtree: what replaces it.
      strict: whether `subtree` must have the leaf paths, shapes and dtypes of what it replaces. Then its
        leaves go into the containers that the tree has (a FrozenDict's into a dict, a plain dict's into an
        `nnx.State`), so that whatever was compiled for the tree takes the new one. Otherwise `subtree` is
        put in as it is, such as a head with other classes.

    Raises:
      ValueError: no node has this path; under `strict`, leaves that are missing, unknown or of another
        shape or dtype, each with what it must be.

    Examples:
      >>> tree = {"body": [1.0, 2.0], "head": {"bias": 3.0}}
      >>> swap_subtree(tree, "head", {"bias": 4.0})
      {'body': [1.0, 2.0], 'head': {'bias': 4.0}}
      >>> swap_subtree(tree, "head", (5.0, 6.0), strict=False)
      {'body': [1.0, 2.0], 'head': (5.0, 6.0)}
    """
    place = find(tree, path)
    if strict:
        subtree = _refilled(place.value, subtree, path)
    elif place.boxed:
        # A box put into a box would be two.
        subtree = take_subtree(subtree, "")
    return put(tree, place.trail, subtree)


def _refilled(old: PyTree, new: PyTree, path: str) -> PyTree:
    wanted, given = leaves_by_path(old), leaves_by_path(new)
    problems = []
    for at in dict.fromkeys([*wanted, *given]):
        full = "/".join(part for part in (path, at) if part)
        if at not in given:
            problems.append(f'"{full}": got none; it must be {_spec(wanted[at], full)}')
        elif at not in wanted:
            problems.append(f'"{full}": got {_spec(given[at], full)}; the tree has no such leaf')
        elif given[at] is not wanted[at] and _spec(given[at], full) != _spec(wanted[at], full):
            problems.append(f'"{full}": got {_spec(given[at], full)}; it must be {_spec(wanted[at], full)}')
    if problems:
        listed = "\n  ".join(shortened(problems))
        raise ArgumentError("subtree", f'it does not fit at "{path}", as strict=True asks:\n  {listed}')
    return jax.tree.unflatten(jax.tree.structure(old), [given[at] for at in wanted])


# --- Transplanting -------------------------------------------------------------------------------


class Row(NamedTuple):
    """One leaf in a `Report`."""

    source: str | None  # its path in the source; None of a new leaf
    target: str | None  # its path in the target, or, of one left over, that which the rules gave it
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every leaf of two trees; `str(report)` is a table.

    Attributes:
      taken: leaves of the source that are now in the target.
      new: leaves of the target that stayed as they were.
      left_over: leaves of the source that had no place among what was to be taken.
      dropped: leaves of the source that a rule dropped.
      cast: the rows of `taken` whose dtype was another in the source, with that dtype.
    """

    taken: tuple[Row, ...]
    new: tuple[Row, ...]
    left_over: tuple[Row, ...]
    dropped: tuple[Row, ...]
    cast: tuple[Row, ...] = ()

    def _groups(self) -> dict[str, tuple[Row, ...]]:
        return {"taken": self.taken, "new": self.new, "left over": self.left_over, "dropped": self.dropped}

    def _table(self) -> list[tuple[str, ...]]:
        was = {row.target: row.dtype for row in self.cast}
        rows: list[tuple[str, ...]] = [("", "target", "source", "shape", "dtype")]
        for group, members in self._groups().items():
            for row in members:
                dtype = f"{row.dtype} from {was[row.target]}" if row.target in was else str(row.dtype)
                rows.append((group, row.target or "-", row.source or "-", str(row.shape), dtype))
        return rows

    def _totals(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("", "leaves", "parameters")]
        for group, members in self._groups().items():
            rows.append((group, f"{len(members):,}", f"{sum(math.prod(row.shape) for row in members):,}"))
        return rows

    def __str__(self) -> str:
        return "\n".join([*_aligned(self._table(), str.ljust), "", *_aligned(self._totals(), str.rjust)])

    def markdown(self) -> str:
        """The same as two tables in Markdown."""

        def table(rows: list[tuple[str, ...]]) -> list[str]:
            return [f"| {' | '.join(row)} |" for row in [rows[0], ("---",) * len(rows[0]), *rows[1:]]]

        return "\n".join([*table(self._table()), "", *table(self._totals())])


def _aligned(rows: list[tuple[str, ...]], justify: Callable[[str, int], str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [justify(cell, width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


def _castable(old: Any, new: Any) -> bool:
    """Whether the kind of number stays, or becomes a wider one: no fraction or imaginary part is lost."""

    def kind(dtype: Any) -> int | None:
        return next((i for i, kind in enumerate(_KINDS) if jnp.issubdtype(dtype, kind)), None)

    kinds = kind(old), kind(new)
    return None not in kinds and kinds[0] <= kinds[1]  # type: ignore[operator]


def _cast(leaf: Any, dtype: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(dtype=dtype)
    return leaf.astype(dtype) if hasattr(leaf, "astype") else jnp.asarray(leaf, dtype)


def transplant(
    source: PyTree,
    target: PyTree,
    *,
    rules: Rules = (),
    take: Patterns = "**",
    strict: bool = True,
    cast: bool = False,
) -> tuple[PyTree, Report]:
    r"""The target with leaves of the source where their paths agree, and what became of every leaf.

    First `rules` rename the source's leaves; then `take` says which paths matter, on both sides:

    | source, after `rules` | target | `take` | becomes | `strict` |
    | --- | --- | --- | --- | --- |
    | has the leaf | has it | matches | taken; another shape or dtype is an error | the same |
    | has the leaf | lacks it | matches | left over | an error |
    | lacks the leaf | has it | matches | new: stays as it is | an error |
    | has the leaf | has it or not | does not | left over; the target's is new | the same |
    | lacks the leaf | has it | does not | new: stays as it is | the same |
    | dropped by a rule | – | – | dropped | the same |

    Args:
      source: any pytree, such as a checkpoint.
      target: any pytree, whose structure the result has. Leaves may be `jax.ShapeDtypeStruct`s: all of
        them must then be filled.
      rules: renames and drops leaves of the source; see `rename`.
      take: patterns of the target's paths; see `matching`.
      strict: whether the leaves that `take` matches must be the same on both sides.
      cast: whether leaves of another dtype become the target's, within a kind of number or to a wider one:
        float64 to bfloat16 and int32 to float32, but never float32 to int32.

    Returns:
      The tree, and a `Report` in which every leaf of the source is once taken, left over or dropped, and
      every leaf of the target once taken or new.

    Raises:
      ValueError: what the table and the arguments above say, for all leaves at once; errors of `rename`; a
        pattern of `take` that matches nothing in the target; a leaf of the source without values
        (`jax.ShapeDtypeStruct`) for one that has some.

    Examples:
      >>> import numpy as np
      >>> source = {"conv": np.ones((3, 3)), "fc": np.ones((3, 5)), "steps": np.ones(())}
      >>> target = {"body": np.zeros((3, 3)), "head": np.zeros((3, 20))}
      >>> rules = [("conv", "body"), ("steps", None), ("fc", "head")]
      >>> tree, report = transplant(source, target, rules=rules, take="body")
      >>> tree["body"] is source["conv"], tree["head"] is target["head"]
      (True, True)
      >>> print(report)
                 target  source  shape    dtype
      taken      body    conv    (3, 3)   float64
      new        head    -       (3, 20)  float64
      left over  head    fc      (3, 5)   float64
      dropped    -       steps   ()       float64
      <BLANKLINE>
                 leaves  parameters
      taken           1           9
      new             1          60
      left over       1          15
      dropped         1           1
    """
    given, wanted = leaves_by_path(source), leaves_by_path(target)
    have = {path: _spec(leaf, path) for path, leaf in given.items()}
    want = {path: _spec(leaf, path) for path, leaf in wanted.items()}
    old_path, dropped = renamed_paths(given, rules)
    matched = set(matching(target, take, "take"))
    takes = predicate(take, "take")

    problems = []
    filled = {}
    for path, leaf in wanted.items():
        if path in matched and path in old_path:
            old = old_path[path]
            problem = _misfit(given[old], leaf, have[old], want[path], cast)
            if problem:
                problems.append(f"{_named(path, old)}: {problem}")
            elif have[old].dtype != want[path].dtype:
                filled[path] = _cast(given[old], want[path].dtype)
            else:
                filled[path] = given[old]
        elif path in matched and strict:
            problems.append(
                f'"{path}": the source has no such leaf; a rule may rename one to it, `take` leave it out, '
                f"or strict=False keep the target's"
            )
        elif isinstance(leaf, jax.ShapeDtypeStruct):
            problems.append(f'"{path}": nothing fills it, and the target has only a ShapeDtypeStruct')
    for path, old in old_path.items():
        if strict and takes(path) and path not in wanted:
            problems.append(
                f"{_named(path, old)}: the target has no such leaf; a rule may rename it or, "
                f"by None, drop it, `take` leave it out, or strict=False leave it over"
            )
    if problems:
        listed = "\n  ".join(shortened(problems))
        raise ArgumentError("source", f"it does not fit the target:\n  {listed}")

    report = Report(
        taken=tuple(Row(old_path[path], path, *want[path]) for path in filled),
        new=tuple(Row(None, path, *want[path]) for path in wanted if path not in filled),
        left_over=tuple(Row(old, path, *have[old]) for path, old in old_path.items() if path not in filled),
        dropped=tuple(Row(old, None, *have[old]) for old in dropped),
        cast=tuple(
            Row(old_path[path], path, *have[old_path[path]])
            for path in filled
            if have[old_path[path]].dtype != want[path].dtype
        ),
    )
    leaves = [filled.get(path, leaf) for path, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), leaves), report


def _named(path: str, old: str) -> str:
    return f'"{path}"' if path == old else f'"{path}" (the source\'s "{old}")'


def _misfit(given: Any, wanted: Any, have: _Spec, want: _Spec, cast: bool) -> str | None:
    """Why a leaf cannot take another's place."""
    if have.shape != want.shape:
        return f"got shape {have.shape}; the target's is {want.shape}"
    if have.dtype != want.dtype and not _castable(have.dtype, want.dtype):
        return f"got {have.dtype}; the target's is {want.dtype}, to which no cast leads without loss of kind"
    if have.dtype != want.dtype and not cast:
        return f"got {have.dtype}; the target's is {want.dtype}, which cast=True would make of it"
    if isinstance(given, jax.ShapeDtypeStruct) and not isinstance(wanted, jax.ShapeDtypeStruct):
        return "got a ShapeDtypeStruct for an array; it must have values"
    return None
