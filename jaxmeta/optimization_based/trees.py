"""Partitions and paths of parameter trees."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def partition(tree: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """Split `tree` into two trees of the same structure, each with None in place of the other's leaves.

    Args:
      tree: any tree.
      mask: a tree of bools of the same structure, True at the leaves of the first part.
    """
    first = jax.tree.map(lambda leaf, selected: leaf if selected else None, tree, mask)
    rest = jax.tree.map(lambda leaf, selected: None if selected else leaf, tree, mask)
    return first, rest


def merge(*parts: PyTree) -> PyTree:
    """Merge the parts of a partition, which may be more than two."""

    def first(*leaves: Any) -> Any:
        return next((leaf for leaf in leaves if leaf is not None), None)

    return jax.tree.map(first, *parts, is_leaf=lambda leaf: leaf is None)


def mask_by_path(tree: PyTree, predicate: Callable[[str], bool]) -> PyTree:
    """Return a tree of bools: `predicate` applied to each leaf's path, such as "Conv_0/kernel"."""
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(predicate(path_of(path))), tree)


def paths(tree: PyTree) -> list[str]:
    """Return the paths of all leaves."""
    return [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def path_of(keys: Sequence[Any]) -> str:
    """Return a leaf's path as a string, such as "Conv_0/kernel"."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def inexact(tree: PyTree) -> PyTree:
    """Return a tree of bools: True for leaves of a differentiable dtype."""
    return jax.tree.map(lambda leaf: bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)), tree)
