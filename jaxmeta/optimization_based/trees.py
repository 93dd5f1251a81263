"""Splitting a tree of parameters in two, and putting it together again."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def partition(tree: PyTree, picks: PyTree) -> tuple[PyTree, PyTree]:
    """`tree` as two trees of its own structure, each with None where the other has a leaf.

    Args:
      tree: any tree.
      picks: a tree of the same structure, True at the leaves of the first part.
    """
    picked = jax.tree.map(lambda leaf, pick: leaf if pick else None, tree, picks)
    rest = jax.tree.map(lambda leaf, pick: None if pick else leaf, tree, picks)
    return picked, rest


def merge(*parts: PyTree) -> PyTree:
    """Inverse of `partition`, of any number of parts."""

    def first(*leaves: Any) -> Any:
        return next((leaf for leaf in leaves if leaf is not None), None)

    return jax.tree.map(first, *parts, is_leaf=lambda leaf: leaf is None)


def picked_by_path(tree: PyTree, predicate: Callable[[str], bool]) -> PyTree:
    """A tree of bools: what `predicate` says of each leaf's path, such as "Conv_0/kernel"."""
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(predicate(path_of(path))), tree)


def paths(tree: PyTree) -> list[str]:
    """The paths of all leaves."""
    return [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def path_of(keys: Sequence[Any]) -> str:
    """A leaf's path, such as "Conv_0/kernel"."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def inexact(tree: PyTree) -> PyTree:
    """A tree of bools: whether a leaf is of a type that has derivatives."""
    return jax.tree.map(lambda leaf: bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)), tree)
