"""Paths into trees of parameters, patterns of paths, and rules that rename them.

A path joins the names from the root to a node by "/": "body/layer_0/kernel". Trees are pytrees of any kind.
A node that only boxes one value, such as a Flax `Variable` or `Partitioned`, adds nothing to the path: an
`nnx.State` has the path "linear/kernel", whose value is the array. The box is kept.

A pattern is a glob or an `re.Pattern`. In a glob `*` matches any characters within one part, `**` any
characters across parts ("**/kernel" matches "kernel" too, and "body/**/kernel" matches "body/kernel"), `?`
one character, `[abc]` a character of the set, `[!abc]` a character outside it. A glob that matches an inner
node selects all leaves below it.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from jaxmeta.checks import ArgumentError

PyTree = Any
Pattern = str | re.Pattern[str]
Patterns = Pattern | Sequence[Pattern]
Rules = Sequence[tuple[Pattern, str | None]]

# The key of the only child of a box.
_BOXED = (jax.tree_util.GetAttrKey("value"),)
_WILDCARD = re.compile(r"(?<![^/])\*\*/|\*\*|\*|\?|\[!?\]?[^\]/]*\]|.", re.DOTALL)
_PLACEHOLDER = re.compile(r"\*\*|\*|\?|\\(\d+)")


# --- Nodes and their paths -----------------------------------------------------------------------


class Node(NamedTuple):
    """A node or leaf of a tree."""

    path: str
    trail: tuple[int, ...]  # which child to follow, level by level
    value: Any
    is_leaf: bool
    boxed: bool  # whether a box holds it


def _open(node: PyTree) -> tuple[list[tuple[Any, PyTree]], Any]:
    """Return keys and children one level down, and the structure that rebuilds the node."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda other: other is not node)


def _walk(
    node: PyTree, parts: tuple[str, ...] = (), trail: tuple[int, ...] = (), boxed: bool = False
) -> Iterator[Node]:
    """Yield all nodes and leaves except boxes, in the order of the tree."""
    children, _ = _open(node)
    keys = [key for key, _ in children]
    is_box = keys == [_BOXED]
    if not is_box:
        is_leaf = keys == [()]
        yield Node("/".join(parts), trail, node, is_leaf, boxed)
        if is_leaf:
            return
    for index, (key, child) in enumerate(children):
        name = () if is_box else (jax.tree_util.keystr(key, simple=True),)
        yield from _walk(child, (*parts, *name), (*trail, index), is_box)


def put(node: PyTree, trail: tuple[int, ...], new: PyTree) -> PyTree:
    """Return `node` with `new` in place of the child at the end of `trail`; others are not rebuilt."""
    if not trail:
        return new
    pairs, structure = _open(node)
    children = [child for _, child in pairs]
    children[trail[0]] = put(children[trail[0]], trail[1:], new)
    return jax.tree.unflatten(structure, children)


def find(tree: PyTree, path: str) -> Node:
    """Return the node at `path`.

    Raises:
      ArgumentError: no node has the path, or several have; the message has the longest prefix that exists,
        and the names below it.
    """
    nodes = [node for node in _walk(tree) if node.path == path]
    if len(nodes) == 1:
        return nodes[0]
    if nodes:
        raise ArgumentError(
            "path", f'got "{path}", which {len(nodes)} nodes of the tree share; rename their keys'
        )
    leaves = [node.path.split("/") for node in _walk(tree) if node.is_leaf]
    parts = path.split("/")
    # The longest prefix of the path in the tree, and the names below it.
    depth = next(n for n in range(len(parts), -1, -1) if n == 0 or any(p[:n] == parts[:n] for p in leaves))
    onward = dict.fromkeys(p[depth] for p in leaves if p[:depth] == parts[:depth] and p[depth:] and p[depth])
    where = f'"{"/".join(parts[:depth])}"' if depth else "its root"
    what = f"has {', '.join(shortened(list(onward)))}" if onward else "has no children"
    raise ArgumentError("path", f'got "{path}", which the tree does not have; {where} {what}')


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a tree by their paths, in the order of the tree.

    Args:
      tree: any pytree; None is not a leaf.

    Raises:
      ValueError: two leaves have the same path, as in `{"a/b": 1, "a": {"b": 2}}`.

    Examples:
      >>> leaves_by_path({"body": [1.0, 2.0], "head": {"bias": 3.0}})
      {'body/0': 1.0, 'body/1': 2.0, 'head/bias': 3.0}
    """
    leaves: dict[str, Any] = {}
    for node in _walk(tree):
        if node.is_leaf:
            if node.path in leaves:
                raise ArgumentError(
                    "tree", f'two leaves have the path "{node.path}"; rename one of their keys'
                )
            leaves[node.path] = node.value
    return leaves


def shortened(items: list[str], most: int = 20) -> list[str]:
    """Return the first `most` items, and a last one with the number of the others."""
    rest = len(items) - most
    return items if rest <= 0 else [*items[:most], f"and {rest} more"]


# --- Patterns ------------------------------------------------------------------------------------


def _translated(token: str) -> str:
    """Return a token of a glob as a regular expression; each wildcard is one group."""
    if token == "**/":
        return "(?:(.*)/)?"
    if token == "**":
        return "(.*)"
    if token == "*":
        return "([^/]*)"
    if token == "?":
        return "([^/])"
    if token[0] == "[" and len(token) > 1:
        negation, members = ("^", token[2:-1]) if token[1] == "!" else ("", token[1:-1])
        members = re.sub(r"([^\w-])", r"\\\1", members)
        return f"((?!/)[{negation}{members}])"
    return re.escape(token)


def _regex_of(pattern: Pattern, argument: str) -> re.Pattern[str]:
    """Compile a pattern. A glob gets a last group for the rest of a leaf's path below the matched node."""
    if isinstance(pattern, re.Pattern):
        return pattern
    translated = "".join(_translated(token) for token in _WILDCARD.findall(pattern))
    try:
        return re.compile(f"{translated}(/.*)?", re.DOTALL)
    except re.error as error:
        raise ArgumentError(argument, f"got {pattern!r}, which is not a valid glob: {error}") from error


def as_sequence(patterns: Patterns) -> Sequence[Pattern]:
    """Return the patterns as a sequence; a single pattern becomes a list."""
    return [patterns] if isinstance(patterns, str | re.Pattern) else patterns


def predicate(patterns: Patterns, argument: str = "patterns") -> Callable[[str], bool]:
    """Return a predicate: whether any of the patterns matches a path."""
    regexes = [_regex_of(pattern, argument) for pattern in as_sequence(patterns)]
    return lambda path: any(regex.fullmatch(path) for regex in regexes)


def _nothing_matches(argument: str, pattern: Pattern, leaves: dict[str, Any]) -> ArgumentError:
    """Return the error for a pattern that matches nothing, with the closest paths."""
    text = pattern if isinstance(pattern, str) else pattern.pattern
    nodes = {
        "/".join(parts[:n]) for parts in (p.split("/") for p in leaves) for n in range(1, len(parts) + 1)
    }
    closest = difflib.get_close_matches(text, sorted(nodes), n=3, cutoff=0.0)
    near = f"the closest paths are {', '.join(closest)}" if closest else "the tree has no leaves"
    return ArgumentError(argument, f"{pattern!r} matches nothing; {near}")


def matching(tree: PyTree, patterns: Patterns, argument: str = "patterns") -> list[str]:
    """Return the paths of the leaves that any of the patterns matches, in the order of the tree.

    Args:
      tree: any pytree.
      patterns: one pattern or a sequence of them. A glob matches leaves, or inner nodes with all leaves
        below them; an `re.Pattern` must match the whole path of a leaf.
      argument: name of `patterns` in error messages.

    Raises:
      ValueError: a pattern matches nothing; the message has the closest paths.

    Examples:
      >>> tree = {"body": {"layer0": {"kernel": 1, "bias": 2}, "layer1": {"kernel": 3}}, "head": 4}
      >>> matching(tree, "body/layer*")
      ['body/layer0/bias', 'body/layer0/kernel', 'body/layer1/kernel']
      >>> matching(tree, ["head", "**/bias"])
      ['body/layer0/bias', 'head']
    """
    leaves = leaves_by_path(tree)
    matched: set[str] = set()
    for pattern in as_sequence(patterns):
        regex = _regex_of(pattern, argument)
        paths = [path for path in leaves if regex.fullmatch(path)]
        # "**" matches every leaf, so it is valid even for a tree without leaves.
        if not paths and (leaves or not regex.fullmatch("")):
            raise _nothing_matches(argument, pattern, leaves)
        matched.update(paths)
    return [path for path in leaves if path in matched]


def mask(tree: PyTree, patterns: Patterns, argument: str = "patterns") -> PyTree:
    """Return a tree of bools of the same structure: whether any of the patterns matches the leaf.

    See `matching` for patterns.

    Examples:
      >>> mask({"body": [1, 2], "head": 3}, "body/1")
      {'body': [False, True], 'head': False}
    """
    matched = set(matching(tree, patterns, argument))
    return jax.tree.unflatten(jax.tree.structure(tree), [path in matched for path in leaves_by_path(tree)])


# --- Renaming ------------------------------------------------------------------------------------


def _renamer(
    pattern: Pattern, replacement: str | None, argument: str
) -> tuple[Callable[[str], object], Callable[[str], str | None]]:
    """Return two functions of a path: whether a rule applies to it, and its new path."""
    regex = _regex_of(pattern, argument)
    applies = regex.search if isinstance(pattern, re.Pattern) else regex.fullmatch
    if replacement is None:
        return applies, lambda path: None
    if isinstance(pattern, re.Pattern):
        return applies, lambda path: regex.sub(replacement, path)
    wildcards = regex.groups - 1
    numbers = [match[1] for match in _PLACEHOLDER.finditer(replacement)]
    stars = numbers.count(None)
    if stars not in (0, wildcards) or any(int(n) not in range(1, wildcards + 1) for n in numbers if n):
        raise ArgumentError(
            argument,
            f"got {replacement!r} for {pattern!r}, which has {wildcards} "
            f"wildcard{'' if wildcards == 1 else 's'}; "
            "the replacement must have as many, or none, or refer to them as \\1, \\2, …",
        )

    def write(path: str) -> str:
        *texts, beyond = (text or "" for text in regex.fullmatch(path).groups())  # type: ignore[union-attr]
        order = iter(texts)
        fill = [
            _PLACEHOLDER.sub(lambda match: texts[int(match[1]) - 1] if match[1] else next(order), part)
            for part in replacement.split("/")
        ]
        # A `**` that matched no part adds none.
        return "/".join([part for part in fill if part] + beyond.split("/")[1:])

    return applies, write


def renamed_paths(leaves: dict[str, Any], rules: Rules) -> tuple[dict[str, str], list[str]]:
    """Return old paths by new ones, and the paths of dropped leaves."""
    new_path: dict[str, str | None] = {}
    for index, (pattern, replacement) in enumerate(rules):
        applies, write = _renamer(pattern, replacement, f"rules[{index}]")
        paths = [path for path in leaves if applies(path)]
        if not paths:
            raise _nothing_matches(f"rules[{index}]", pattern, leaves)
        for path in paths:
            new_path.setdefault(path, write(path))
    old_path: dict[str, str] = {}
    dropped = []
    for old in leaves:
        new = new_path.get(old, old)
        if new is None:
            dropped.append(old)
        elif old_path.setdefault(new, old) != old:
            raise ArgumentError("rules", f'"{old_path[new]}" and "{old}" would both become "{new}"')
    return old_path, dropped


def rename(tree: PyTree, rules: Rules) -> dict[str, Any]:
    r"""Return the leaves of a tree under new paths, as a nested dict.

    Args:
      tree: any pytree.
      rules: pairs (pattern, replacement). The first rule whose pattern matches a leaf renames it; a leaf
        without a match keeps its path. In the replacement of a glob, wildcards are filled in order with the
        text that the glob's wildcards matched, or by number as \1, \2, …; where the glob matches an inner
        node, everything below moves with it. For an `re.Pattern` the new path is
        `pattern.sub(replacement, path)`. A replacement of None drops the leaf; "" moves the children of the
        node to the root.

    Raises:
      ValueError: a pattern matches nothing; a replacement has more or fewer wildcards than its glob; two
        leaves would get the same path, or a leaf would lie below another leaf.

    Examples:
      >>> tree = {"params": {"conv1": {"weight": 1}, "conv2": {"weight": 2}, "fc": {"bias": 3}}}
      >>> rename(tree, [("params/conv*/weight", "body/layer_*/kernel"), ("params/fc", "head")])
      {'body': {'layer_1': {'kernel': 1}, 'layer_2': {'kernel': 2}}, 'head': {'bias': 3}}
    """
    leaves = leaves_by_path(tree)
    old_path, _ = renamed_paths(leaves, rules)
    renamed: dict[str, Any] = {}
    for new, old in old_path.items():
        *parents, name = new.split("/")
        node = renamed
        for depth, parent in enumerate(parents, 1):
            through = "/".join(parents[:depth])
            if through in old_path:
                raise ArgumentError(
                    "rules",
                    f'"{old}" would become "{new}", below "{through}", the new path of "{old_path[through]}"',
                )
            node = node.setdefault(parent, {})
        node[name] = leaves[old]
    return renamed
