"""Subtrees of parameter trees: taking, replacing and transplanting them.

Paths and patterns are those of `jaxmeta.paths`: "body/layer_0/kernel", "body/**", "**/bias". No function
copies an array or changes its arguments. Results share their leaves with the arguments, so a compiled step
that donates the buffers of one tree invalidates them in all.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmeta.checks import ArgumentError, format_value
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


def _spec(leaf: Any, path: str, argument: str) -> _Spec:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return _Spec(tuple(leaf.shape), leaf.dtype)
    if isinstance(leaf, bool | int | float | complex):
        return _Spec((), jnp.result_type(leaf))
    raise ArgumentError(
        argument,
        f'got {format_value(leaf)} at "{path}"; leaves must be arrays, jax.ShapeDtypeStructs or numbers '
        "(select the arrays of a module with other leaves, as eqx.filter does)",
    )


def take_subtree(tree: PyTree, path: str) -> PyTree:
    """Return the node at a path, the same object that the tree holds.

    Args:
      tree: any pytree.
      path: path of the node, such as "body/layer_0"; "" is the whole tree.

    Raises:
      ValueError: if no node has this path; the message names the nearest node and its children.

    Examples:
      >>> take_subtree({"body": [1.0, 2.0], "head": {"bias": 3.0}}, "head")
      {'bias': 3.0}
    """
    return find(tree, path).value


def swap_subtree(tree: PyTree, path: str, subtree: PyTree, *, strict: bool = True) -> PyTree:
    """Return the tree with the subtree at a path replaced; all other nodes are the same objects.

    Args:
      tree: any pytree.
      path: path of the node to replace; "" is the whole tree.
      subtree: new subtree.
      strict: whether `subtree` must have the leaf paths, shapes and dtypes of the replaced one. Its leaves
        then go into the tree's own containers (those of a FrozenDict into a dict, those of a plain dict into
        an `nnx.State`), so that a function compiled for the tree accepts the new one. False inserts `subtree`
        as it is, such as a head with other classes.

    Raises:
      ValueError: if no node has this path; if `strict`, for leaves that are missing, unknown or of another
        shape or dtype, each with the required one.

    Examples:
      >>> tree = {"body": [1.0, 2.0], "head": {"bias": 3.0}}
      >>> swap_subtree(tree, "head", {"bias": 4.0})
      {'body': [1.0, 2.0], 'head': {'bias': 4.0}}
      >>> swap_subtree(tree, "head", (5.0, 6.0), strict=False)
      {'body': [1.0, 2.0], 'head': (5.0, 6.0)}
    """
    node = find(tree, path)
    if strict:
        subtree = _refilled(node.value, subtree, path)
    elif node.boxed:
        # The tree keeps its box (such as a Flax Variable), so only the new box's value is inserted.
        subtree = take_subtree(subtree, "")
    return put(tree, node.trail, subtree)


def _refilled(old: PyTree, new: PyTree, path: str) -> PyTree:
    expected, leaves = leaves_by_path(old), leaves_by_path(new)
    problems = []
    for relative in dict.fromkeys([*expected, *leaves]):
        full = "/".join(part for part in (path, relative) if part)
        if relative not in leaves:
            problems.append(f'"{full}": got none; it must be {_spec(expected[relative], full, "tree")}')
        elif relative not in expected:
            given = _spec(leaves[relative], full, "subtree")
            problems.append(f'"{full}": got {given}; the tree has no such leaf')
        elif leaves[relative] is not expected[relative]:
            given, wanted = _spec(leaves[relative], full, "subtree"), _spec(expected[relative], full, "tree")
            if given != wanted:
                problems.append(f'"{full}": got {given}; it must be {wanted}')
    if problems:
        listed = "\n  ".join(shortened(problems))
        raise ArgumentError("subtree", f'it does not fit at "{path}", as strict=True requires:\n  {listed}')
    return jax.tree.unflatten(jax.tree.structure(old), [leaves[relative] for relative in expected])


# --- Transplanting -------------------------------------------------------------------------------


class Row(NamedTuple):
    """A leaf in a `Report`."""

    source: str | None  # path in the source; None for a new leaf
    target: str | None  # path in the target; for a leaf left over, its path after the rules
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Report:
    """Report on the use of every leaf of two trees in a transplant; `str(report)` is a table.

    Attributes:
      taken: leaves of the source that are now in the target.
      new: leaves of the target that stayed as they were.
      left_over: leaves of the source that were not selected or have no place in the target.
      dropped: leaves of the source that a rule dropped.
      cast: rows of `taken` whose dtype was changed, with the dtype in the source.
    """

    taken: tuple[Row, ...]
    new: tuple[Row, ...]
    left_over: tuple[Row, ...]
    dropped: tuple[Row, ...]
    cast: tuple[Row, ...] = ()

    def _groups(self) -> dict[str, tuple[Row, ...]]:
        return {"taken": self.taken, "new": self.new, "left over": self.left_over, "dropped": self.dropped}

    def _table(self) -> list[tuple[str, ...]]:
        source_dtype = {row.target: row.dtype for row in self.cast}
        rows: list[tuple[str, ...]] = [("", "target", "source", "shape", "dtype")]
        for group, members in self._groups().items():
            for row in members:
                dtype = (
                    f"{row.dtype} from {source_dtype[row.target]}"
                    if row.target in source_dtype
                    else str(row.dtype)
                )
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
        """Return the report as two Markdown tables."""

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
    """Return whether the kind of number stays or widens, so that no fraction or imaginary part is lost."""

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
    r"""Return the target with the source's leaves at equal paths, and a report of how every leaf was used.

    First `rules` rename the source's leaves; then `take` selects paths on both sides:

    | source, after `rules` | target | `take` | result | with `strict` |
    | --- | --- | --- | --- | --- |
    | has the leaf | has it | matches | taken; another shape or dtype is an error | the same |
    | has the leaf | lacks it | matches | left over | an error |
    | lacks the leaf | has it | matches | new: stays as it is | an error |
    | has the leaf | has it or not | does not | left over; the target's is new | the same |
    | lacks the leaf | has it | does not | new: stays as it is | the same |
    | dropped by a rule | – | – | dropped | the same |

    Args:
      source: any pytree, such as a checkpoint.
      target: any pytree; the result has its structure. Leaves may be `jax.ShapeDtypeStruct`s, which must all
        be filled.
      rules: rules that rename and drop leaves of the source; see `rename`.
      take: patterns of the target's paths; see `matching`.
      strict: whether the leaves that `take` matches must be the same on both sides.
      cast: whether to cast leaves to the target's dtype, within a kind of number or to a wider one: float64
        to bfloat16 and int32 to float32, but never float32 to int32.

    Returns:
      The tree, and a `Report` that lists every leaf of the source once as taken, left over or dropped, and
      every leaf of the target once as taken or new.

    Raises:
      ValueError: for all errors of the table and the arguments above at once; as in `rename`; if a pattern of
        `take` matches nothing in the target, or a leaf of the source without values
        (`jax.ShapeDtypeStruct`) would replace an array.

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
    source_leaves, target_leaves = leaves_by_path(source), leaves_by_path(target)
    source_specs = {path: _spec(leaf, path, "source") for path, leaf in source_leaves.items()}
    target_specs = {path: _spec(leaf, path, "target") for path, leaf in target_leaves.items()}
    old_path, dropped = renamed_paths(source_leaves, rules)
    selected = set(matching(target, take, "take"))
    takes = predicate(take, "take")

    problems = []
    filled = {}
    for path, leaf in target_leaves.items():
        if path in selected and path in old_path:
            old = old_path[path]
            problem = _misfit(source_leaves[old], leaf, source_specs[old], target_specs[path], cast)
            if problem:
                problems.append(f"{_named(path, old)}: {problem}")
            elif source_specs[old].dtype != target_specs[path].dtype:
                filled[path] = _cast(source_leaves[old], target_specs[path].dtype)
            else:
                filled[path] = source_leaves[old]
        elif path in selected and strict:
            problems.append(
                f'"{path}": the source has no such leaf; rename one by a rule, exclude it by `take`, '
                f"or keep the target's by strict=False"
            )
        elif isinstance(leaf, jax.ShapeDtypeStruct):
            problems.append(f'"{path}": the target has only a ShapeDtypeStruct, which must be filled')
    for path, old in old_path.items():
        if strict and takes(path) and path not in target_leaves:
            problems.append(
                f"{_named(path, old)}: the target has no such leaf; rename it by a rule, drop it by a rule "
                f"with None, exclude it by `take`, or ignore it by strict=False"
            )
    if problems:
        listed = "\n  ".join(shortened(problems))
        raise ArgumentError("source", f"it does not fit the target:\n  {listed}")

    report = Report(
        taken=tuple(Row(old_path[path], path, *target_specs[path]) for path in filled),
        new=tuple(Row(None, path, *target_specs[path]) for path in target_leaves if path not in filled),
        left_over=tuple(
            Row(old, path, *source_specs[old]) for path, old in old_path.items() if path not in filled
        ),
        dropped=tuple(Row(old, None, *source_specs[old]) for old in dropped),
        cast=tuple(
            Row(old_path[path], path, *source_specs[old_path[path]])
            for path in filled
            if source_specs[old_path[path]].dtype != target_specs[path].dtype
        ),
    )
    leaves = [filled.get(path, leaf) for path, leaf in target_leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(target), leaves), report


def _named(path: str, old: str) -> str:
    return f'"{path}"' if path == old else f'"{path}" (the source\'s "{old}")'


def _misfit(leaf: Any, target_leaf: Any, spec: _Spec, target_spec: _Spec, cast: bool) -> str | None:
    """Return why a leaf cannot take another's place; None if it can."""
    if spec.shape != target_spec.shape:
        return f"got shape {spec.shape}; the target's is {target_spec.shape}"
    if spec.dtype != target_spec.dtype and not _castable(spec.dtype, target_spec.dtype):
        return f"got {spec.dtype}; the target's is {target_spec.dtype}, and the cast would lose information"
    if spec.dtype != target_spec.dtype and not cast:
        return f"got {spec.dtype}; the target's is {target_spec.dtype}; cast=True converts it"
    if isinstance(leaf, jax.ShapeDtypeStruct) and not isinstance(target_leaf, jax.ShapeDtypeStruct):
        return "got a ShapeDtypeStruct for an array; it must be an array too"
    return None
