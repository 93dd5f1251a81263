"""Taking, swapping, renaming and transplanting subtrees of every kind of tree, without copies or losses."""

import dataclasses
import fnmatch
import re
from typing import Any, NamedTuple

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from weights import filled

import jaxmeta as jm
from jaxmeta.checks import ArgumentError
from jaxmeta.transfer.subtree import (
    leaves_by_path,
    mask,
    matching,
    rename,
    swap_subtree,
    take_subtree,
    transplant,
)


def for_all(*strategies):
    """Run a test on 15 fixed examples, and on 60 new ones in the nightly run."""

    def decorated(test):
        @pytest.mark.parametrize("examples", [15, pytest.param(60, marks=pytest.mark.nightly)])
        def run(examples):
            chosen = settings(max_examples=examples, deadline=None, derandomize=examples == 15, database=None)
            chosen(given(*strategies)(test))()

        run.__name__ = run.__qualname__ = test.__name__
        return run

    return decorated


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    value: Any


def zeros(shape=(2,), dtype=np.float32):
    return np.zeros(shape, dtype)


def containers(children, names):
    return st.one_of(
        st.dictionaries(names, children, max_size=3),
        st.lists(children, max_size=3),
        st.tuples(children, children),
        st.builds(Pair, children, children),
        st.builds(Layer, children, children),
        st.builds(Box, children),
    )


def trees_of(leaves, names=("a", "b", "ab", "ba", "a1")):
    inner = st.recursive(leaves | st.none(), lambda of: containers(of, st.sampled_from(names)), max_leaves=8)
    return st.dictionaries(st.sampled_from(names), inner, min_size=1, max_size=3)


ARRAYS = st.builds(
    zeros,
    st.lists(st.integers(0, 3), max_size=2).map(tuple),
    st.sampled_from([np.float32, np.float64, np.int32, np.bool_]),
)
TREES = trees_of(ARRAYS)
EQUAL_LEAVES = trees_of(st.builds(zeros))


def nodes(tree):
    """Return the paths of all leaves and of the nodes above them."""
    parts = [path.split("/") for path in leaves_by_path(tree)]
    return sorted({"/".join(names[:n]) for names in parts for n in range(1, len(names) + 1)})


def same_objects(left, right):
    """Return whether two mappings have the same names and hold the same objects."""
    return left.keys() == right.keys() and all(left[name] is right[name] for name in left)


def is_beneath(path, node):
    return path == node or path.startswith(f"{node}/")


# --- Paths and patterns --------------------------------------------------------------------------


@for_all(TREES)
def test_leaves_have_the_order_and_paths_of_jax(tree):
    leaves = leaves_by_path(tree)
    assert [id(leaf) for leaf in leaves.values()] == [id(leaf) for leaf in jax.tree.leaves(tree)]
    known = [
        jax.tree_util.keystr(path, simple=True, separator="/").replace("/value", "")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    assert list(leaves) == known
    assert matching(tree, "**") == known


def parts_match(glob, path):
    """Return whether a glob's parts match the path or a node above it, by the shell's matcher."""
    if not glob:
        return True
    if glob[0] == "**":
        # At the end, `**` matches at least one part; elsewhere it may match none.
        if len(glob) == 1:
            return bool(path)
        return any(parts_match(glob[1:], path[n:]) for n in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], glob[0]) and parts_match(glob[1:], path[1:])


PART = st.sampled_from(
    ["**", "*", "a", "b", "a*", "*b", "?", "a?", "[ab]", "[!a]", "*[0-9]", "[!b]*", "left", "1"]
)


@for_all(EQUAL_LEAVES, st.lists(PART, min_size=1, max_size=4))
def test_a_glob_matches_part_by_part_as_the_shell_does(tree, glob):
    assume(leaves_by_path(tree))
    expected = [path for path in leaves_by_path(tree) if parts_match(glob, path.split("/"))]
    if expected:
        assert matching(tree, "/".join(glob)) == expected
    else:
        with pytest.raises(ValueError, match="matches nothing"):
            matching(tree, "/".join(glob))


@for_all(EQUAL_LEAVES, st.data())
def test_the_mask_of_a_union_is_the_union_of_masks_and_that_of_the_rest_its_complement(tree, data):
    everything = nodes(tree)
    assume(everything)
    picked_paths = data.draw(st.lists(st.sampled_from(everything), min_size=1, unique=True))
    whole = mask(tree, picked_paths)
    assert jax.tree.structure(whole) == jax.tree.structure(tree)
    union = jax.tree.map(lambda *masks: any(masks), *(mask(tree, path) for path in picked_paths))
    assert union == whole
    rest = [path for path in leaves_by_path(tree) if path not in matching(tree, picked_paths)]
    assert mask(tree, rest) == jax.tree.map(lambda picked: not picked, whole)
    as_regex = re.compile("|".join(f"{re.escape(path)}(/.*)?" for path in picked_paths))
    assert mask(tree, as_regex) == whole


def test_double_stars_match_any_number_of_parts_and_brackets_literal_stars():
    tree = {"kernel": 1, "body": {"kernel": 2, "layer": {"kernel": 3, "bias": 4}}, "a*": {"x": 5}, "ab": 6}
    assert matching(tree, "**/kernel") == ["body/kernel", "body/layer/kernel", "kernel"]
    assert matching(tree, "body/**/kernel") == ["body/kernel", "body/layer/kernel"]
    assert matching(tree, "body/**") == ["body/kernel", "body/layer/bias", "body/layer/kernel"]
    assert matching(tree, "b**s") == ["body/layer/bias"]
    assert matching(tree, "a[*]") == ["a*/x"]
    assert matching(tree, "ab") == ["ab"]
    assert matching(tree, re.compile(r".*/kernel")) == ["body/kernel", "body/layer/kernel"]


def test_trees_without_leaves_match_and_transplant_to_nothing():
    assert matching({"a": None}, "**") == []
    tree, report = transplant({}, {})
    assert tree == {}
    assert report.taken == report.new == ()


def test_keys_with_slashes_are_found_unless_two_leaves_share_a_path():
    haiku = {"net/~/linear": {"w": 1}, "net": {"b": 2}}
    assert matching(haiku, "net/**") == ["net/b", "net/~/linear/w"]
    assert take_subtree(haiku, "net/~/linear") == {"w": 1}
    with pytest.raises(ValueError, match='tree: two leaves have the path "a/b"'):
        leaves_by_path({"a/b": 1, "a": {"b": 2}})
    with pytest.raises(ValueError, match='path: got "a/b", which 2 nodes of the tree share'):
        take_subtree({"a/b": {"x": 1}, "a": {"b": {"y": 2}}}, "a/b")


def test_a_pattern_that_matches_nothing_is_named_with_the_closest_paths():
    tree = {"body": {"layer1": 1, "layer2": 2}, "head": 3}
    message = r"freeze: 'body/layr2' matches nothing; the closest paths are body/layer2, body/layer1, body"
    with pytest.raises(ValueError, match=message):
        mask(tree, ["head", "body/layr2"], argument="freeze")
    with pytest.raises(ValueError, match=r"patterns: re.compile\('hea'\) matches nothing; .* head"):
        matching(tree, re.compile("hea"))
    with pytest.raises(ValueError, match=r"patterns: 'head' matches nothing; the tree has no leaves"):
        matching({}, "head")
    with pytest.raises(ValueError, match=r"patterns: got '\[b-a\]', which is not a valid glob"):
        matching(tree, "[b-a]")


# --- Taking and swapping -------------------------------------------------------------------------


@for_all(EQUAL_LEAVES, EQUAL_LEAVES, st.data())
def test_taking_returns_the_swapped_subtree_and_the_rest_is_unchanged(tree, other, data):
    paths = nodes(tree)
    assume(paths)
    path = data.draw(st.sampled_from(paths))
    before = leaves_by_path(tree)
    swapped = swap_subtree(tree, path, other, strict=False)
    assert take_subtree(swapped, path) is other
    after = leaves_by_path(swapped)
    rest = {p: leaf for p, leaf in after.items() if not is_beneath(p, path)}
    assert same_objects(rest, {p: leaf for p, leaf in before.items() if not is_beneath(p, path)})
    assert same_objects(
        {p: leaf for p, leaf in after.items() if is_beneath(p, path)}, leaves_by_path_at(other, path)
    )
    assert same_objects(leaves_by_path(tree), before)


def leaves_by_path_at(tree, path):
    return {f"{path}/{at}": leaf for at, leaf in leaves_by_path(tree).items()}


@for_all(TREES, st.data())
def test_a_strict_swap_keeps_the_structure_and_a_swap_with_the_same_subtree_the_tree(tree, data):
    path = data.draw(st.sampled_from(["", *nodes(tree)]))
    own = take_subtree(tree, path)
    again = swap_subtree(tree, path, own)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert same_objects(leaves_by_path(again), leaves_by_path(tree))
    twin = jax.tree.map(np.copy, own)
    # The same leaves in plain nested dicts, whatever the containers of the tree are.
    plain = rename(twin, ()) if leaves_by_path(twin).keys() != {""} else twin
    swapped = swap_subtree(tree, path, plain)
    assert jax.tree.structure(swapped) == jax.tree.structure(tree)
    assert same_objects(leaves_by_path(take_subtree(swapped, path)), leaves_by_path(twin))


def test_none_can_be_taken_and_swapped_though_it_is_not_a_leaf():
    layer = Layer(kernel=zeros(), bias=None)
    assert leaves_by_path(layer).keys() == {"kernel"}
    assert take_subtree(layer, "bias") is None
    bias = zeros()
    assert swap_subtree(layer, "bias", bias, strict=False).bias is bias


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("body/layer9/kernel", '"body" has layer0, layer1'),
        ("hed", "its root has body, head"),
        ("head/bias/x", '"head/bias" has no children'),
    ],
)
def test_a_missing_path_is_rejected_with_the_existing_children(path, message):
    tree = {"body": {"layer0": [1], "layer1": [2]}, "head": {"bias": 3}}
    for act in (take_subtree, lambda tree, path: swap_subtree(tree, path, 1)):
        with pytest.raises(
            ValueError, match=re.escape(f'path: got "{path}", which the tree does not have; {message}')
        ):
            act(tree, path)


def test_a_strict_swap_names_every_leaf_that_does_not_fit():
    tree = {"head": {"kernel": zeros((3, 5)), "bias": zeros((5,)), "scale": zeros(())}}
    subtree = {"kernel": zeros((3, 20)), "bias": zeros((5,), np.float64), "offset": zeros((20,))}
    with pytest.raises(
        ValueError, match='subtree: it does not fit at "head", as strict=True requires'
    ) as error:
        swap_subtree(tree, "head", subtree)
    assert str(error.value).split("\n  ")[1:] == [
        '"head/bias": got (5,) float64; it must be (5,) float32',
        '"head/kernel": got (3, 20) float32; it must be (3, 5) float32',
        '"head/scale": got none; it must be () float32',
        '"head/offset": got (20,) float32; the tree has no such leaf',
    ]
    assert swap_subtree(tree, "head", subtree, strict=False)["head"] is subtree
    with pytest.raises(ArgumentError, match=r'subtree: got \'x\' at "head/scale"; leaves must be arrays'):
        swap_subtree(tree, "head", {**tree["head"], "scale": "x"})
    many = {"layers": [zeros() for _ in range(30)]}
    with pytest.raises(ValueError, match="and 10 more") as error:
        swap_subtree(many, "layers", [])
    assert str(error.value).count("got none") == 20


# --- Renaming ------------------------------------------------------------------------------------


@for_all(EQUAL_LEAVES, st.data())
def test_a_renaming_and_its_inverse_are_the_identity(tree, data):
    plain = rename(tree, ())
    leaves = leaves_by_path(tree)
    assert same_objects(leaves_by_path(plain), leaves)
    order = data.draw(st.permutations(range(len(leaves))))
    new_paths = {path: f"net/layer{n}/w" for path, n in zip(leaves, order, strict=True)}
    renamed = rename(tree, list(new_paths.items()))
    assert same_objects(leaves_by_path(renamed), {new_paths[path]: leaf for path, leaf in leaves.items()})
    assert same_objects(
        leaves_by_path(rename(renamed, [(new, old) for old, new in new_paths.items()])), leaves
    )
    if leaves:
        lifted = rename(rename(tree, [("**", "outer/**")]), [("outer", "")])
        assert same_objects(leaves_by_path(lifted), leaves)
        names = sorted({path.split("/")[0] for path in leaves})
        others = data.draw(st.permutations(names))
        moved = rename(tree, list(zip(names, others, strict=True)))
        assert same_objects(leaves_by_path(rename(moved, list(zip(others, names, strict=True)))), leaves)


@pytest.mark.parametrize(
    ("rule", "new"),
    [
        (("enc/layer_*/w", "body/block*/kernel"), "body/block3/kernel"),
        (("enc/layer_?/*", "*/block?"), "3/blockw"),
        (("enc/layer_[0-9]/*", r"\2/block\1"), "w/block3"),
        (("**/layer_*/w", "**/*"), "enc/3"),
        (("enc/**/layer_*/w", "dec/**/*"), "dec/3"),
        (("enc/**", "**"), "layer_3/w"),
        (("enc", "dec"), "dec/layer_3/w"),
        (("*/layer_3", r"\1/last"), "enc/last/w"),
        (("enc/layer_*/w", "only"), "only"),
        ((re.compile(r"layer_(\d)"), r"block/\1"), "enc/block/3/w"),
        (("enc/[l]ayer_3/w", "first?x"), "firstlx"),
    ],
)
def test_matches_of_wildcards_fill_the_replacement(rule, new):
    leaf = zeros()
    assert same_objects(leaves_by_path(rename({"enc": {"layer_3": {"w": leaf}}}, [rule])), {new: leaf})


def test_the_first_rule_that_matches_wins_and_none_drops():
    tree = {"body": {"norm": {"mean": 1, "scale": 2}, "conv": 3}, "head": 4}
    rules = [("**/mean", None), ("body/norm", "bn"), ("body", "net"), ("bn", "never")]
    with pytest.raises(ValueError, match=r"rules\[3\]: 'bn' matches nothing"):
        rename(tree, rules)
    assert rename(tree, rules[:3]) == {"bn": {"scale": 2}, "net": {"conv": 3}, "head": 4}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("a/x", "b/y")], 'rules: "a/x" and "b/y" would both become "b/y"'),
        ([("*/*", "c/d")], 'rules: "a/x" and "b/y" would both become "c/d"'),
        ([("a/x", "b/y/z")], 'rules: "a/x" would become "b/y/z", below "b/y", the new path of "b/y"'),
        ([("b/y", "a")], 'rules: "a/x" would become "a/x", below "a", the new path of "b/y"'),
        ([("a", "c"), ("c", "d")], "rules[1]: 'c' matches nothing; the closest paths are "),
        (
            [("*/*", "c/*")],
            "rules[0]: got 'c/*' for '*/*', which has 2 wildcards; the replacement must have as many",
        ),
        (
            [("a/*", r"c/\2")],
            r"rules[0]: got 'c/\\2' for 'a/*', which has 1 wildcard; the replacement must have",
        ),
    ],
)
def test_rules_that_collide_or_do_not_apply_are_rejected(rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rename({"a": {"x": 1}, "b": {"y": 2}}, rules)


# --- Transplanting -------------------------------------------------------------------------------


@for_all(TREES)
def test_a_tree_transplanted_into_itself_is_taken_whole(tree):
    assume(leaves_by_path(tree))
    again, report = transplant(tree, tree)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert same_objects(leaves_by_path(again), leaves_by_path(tree))
    assert [row.target for row in report.taken] == list(leaves_by_path(tree))
    assert all(row.source == row.target for row in report.taken)
    assert report == dataclasses.replace(report, new=(), left_over=(), dropped=(), cast=())


@for_all(EQUAL_LEAVES, EQUAL_LEAVES, st.data())
def test_every_leaf_of_both_trees_is_in_the_report_once_and_where_the_table_says(source, target, data):
    source_leaves, target_leaves = leaves_by_path(source), leaves_by_path(target)
    assume(target_leaves)
    dropped = data.draw(st.sets(st.sampled_from(list(source_leaves)))) if source_leaves else set()
    take = data.draw(st.lists(st.sampled_from(list(target_leaves)), min_size=1, unique=True))
    rules = [(path, None) for path in dropped]
    tree, report = transplant(source, target, rules=rules, take=take, strict=False)
    taken = source_leaves.keys() & set(take) - dropped
    assert {row.target for row in report.taken} == taken
    assert [row.target for row in report.new] == [path for path in target_leaves if path not in taken]
    assert [row.source for row in report.left_over] == [p for p in source_leaves if p not in taken | dropped]
    assert {row.source for row in report.dropped} == dropped
    assert len(report.taken) + len(report.left_over) + len(report.dropped) == len(source_leaves)
    assert len(report.taken) + len(report.new) == len(target_leaves)
    assert same_objects(
        leaves_by_path(tree), {p: source_leaves[p] if p in taken else target_leaves[p] for p in target_leaves}
    )
    if taken == set(take):
        # `take` names leaves alone, so no source leaf that the target lacks can be among them.
        assert transplant(source, target, rules=rules, take=take)[1] == report
    else:
        with pytest.raises(ValueError, match="the source has no such leaf"):
            transplant(source, target, rules=rules, take=take)


def misfits(*args, **kwargs):
    with pytest.raises(ValueError, match="source: it does not fit the target:") as error:
        transplant(*args, **kwargs)
    return str(error.value).split("\n  ")[1:]


def test_every_misfit_of_a_transplant_is_named():
    source = {
        "conv": zeros((3, 4)),
        "half": zeros((2,), np.float16),
        "count": zeros((), np.float32),
        "spare": zeros((7,)),
        "ghost": jax.ShapeDtypeStruct((2,), np.float32),
    }
    target = {
        "body": zeros((3, 5)),
        "half": zeros((2,)),
        "count": zeros((), np.int32),
        "scale": zeros((1,)),
        "ghost": zeros((2,)),
    }
    result = misfits(source, target, rules=[("conv", "body")])
    assert result == [
        '"body" (the source\'s "conv"): got shape (3, 4); the target\'s is (3, 5)',
        '"count": got float32; the target\'s is int32, and the cast would lose information',
        '"ghost": got a ShapeDtypeStruct for an array; it must be an array too',
        '"half": got float16; the target\'s is float32; cast=True converts it',
        '"scale": the source has no such leaf; rename one by a rule, exclude it by `take`, or keep the '
        "target's by strict=False",
        '"spare": the target has no such leaf; rename it by a rule, drop it by a rule with None, exclude it '
        "by `take`, or ignore it by strict=False",
    ]
    # With strict=False and cast=True, only misfits of shape, kind and values remain.
    assert misfits(source, target, rules=[("conv", "body")], strict=False, cast=True) == result[:3]
    assert misfits({"a": zeros()}, {"a": zeros(), "b": jax.ShapeDtypeStruct((1,), np.int32)}, take="a") == [
        '"b": the target has only a ShapeDtypeStruct, which must be filled'
    ]
    with pytest.raises(ValueError, match="take: 'boddy' matches nothing; the closest paths are body"):
        transplant(source, target, take="boddy", strict=False)


def test_a_cast_makes_the_targets_dtype_and_is_reported():
    source = {"a": np.full(2, 1.5), "b": jnp.arange(2), "c": 2, "d": zeros()}
    target = {
        "a": jnp.zeros(2, jnp.bfloat16),
        "b": jax.ShapeDtypeStruct((2,), np.float32),
        "c": jnp.float32(0),
        "d": zeros(),
    }
    tree, report = transplant(source, target, cast=True)
    assert [leaf.dtype for leaf in jax.tree.leaves(tree)] == [
        jnp.bfloat16,
        np.float32,
        np.float32,
        np.float32,
    ]
    assert [np.sum(leaf) for leaf in jax.tree.leaves(tree)] == [3, 1, 2, 0]
    assert tree["d"] is source["d"]
    assert [(row.target, row.dtype) for row in report.cast] == [
        ("a", np.float64),
        ("b", np.int32),
        ("c", np.int32),
    ]
    assert "taken  a       a       (2,)   bfloat16 from float64\n" in str(report)


def test_transplanting_shapes_gives_the_report_of_the_arrays():
    source, target = {"a": zeros(), "b": zeros((), np.float64)}, {"a": zeros(), "b": zeros(())}
    _, report = transplant(source, target, cast=True)
    shapes = [
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), t) for t in (source, target)
    ]
    tree, report_of_shapes = transplant(*shapes, cast=True)
    assert report_of_shapes == report
    assert tree == shapes[1]


def test_a_report_is_a_table_of_every_leaf_with_totals():
    source = {"conv": zeros((30, 40)), "fc": zeros((3, 5)), "steps": zeros((), np.int32)}
    target = {"body": zeros((30, 40)), "head": zeros((3, 20))}
    _, report = transplant(source, target, rules=[("conv", "body"), ("steps", None)], take="body")
    assert str(report).split("\n") == [
        "           target  source  shape     dtype",
        "taken      body    conv    (30, 40)  float32",
        "new        head    -       (3, 20)   float32",
        "left over  fc      fc      (3, 5)    float32",
        "dropped    -       steps   ()        int32",
        "",
        "           leaves  parameters",
        "taken           1       1,200",
        "new             1          60",
        "left over       1          15",
        "dropped         1           1",
    ]
    assert report.markdown().split("\n")[:3] == [
        "|  | target | source | shape | dtype |",
        "| --- | --- | --- | --- | --- |",
        "| taken | body | conv | (30, 40) | float32 |",
    ]


# --- Networks ------------------------------------------------------------------------------------


def test_the_body_of_a_conv4_is_transplanted_under_a_head_with_more_classes():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(6, 16, 16, 1)).astype(np.float32)
    narrow, wide = (jm.nn.Conv4(ways=ways, filters=4) for ways in (5, 20))
    source, target = (
        jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
            jax.eval_shape(network.init, jax.random.key(0), x),
        )
        for network in (narrow, wide)
    )
    apply = jax.jit(wide.apply)
    assert misfits(source, target, strict=False) == [
        '"params/head/bias": got shape (5,); the target\'s is (20,)',
        '"params/head/kernel": got shape (4, 5); the target\'s is (4, 20)',
    ]
    tree, report = transplant(source, target, take="params/ConvNorm_*")
    assert {row.target for row in report.new} == {"params/head/bias", "params/head/kernel"}
    assert len(report.taken) == len(jax.tree.leaves(source)) - 2
    assert tree["params"]["head"]["kernel"] is target["params"]["head"]["kernel"]
    assert not np.allclose(apply(tree, x), apply(target, x))
    # The old classes' columns in the new head give the old network's outputs.
    old = source["params"]["head"]
    padded = {"kernel": np.pad(old["kernel"], ((0, 0), (0, 15))), "bias": np.pad(old["bias"], (0, 15))}
    outputs = apply(swap_subtree(tree, "params/head", padded), x)
    np.testing.assert_allclose(outputs[:, :5], jax.jit(narrow.apply)(source, x), rtol=1e-5, atol=1e-6)
    # Conversely, the larger head can be swapped into the tree with the body.
    swapped = swap_subtree(source, "params/head", target["params"]["head"], strict=False)
    np.testing.assert_array_equal(apply(swapped, x), apply(tree, x))


def test_a_frozen_dict_stays_frozen_and_takes_the_leaves_of_plain_ones():
    plain = {"body": {"kernel": zeros((2, 2))}, "head": {"bias": zeros()}}
    frozen = flax.core.freeze(plain)
    assert same_objects(leaves_by_path(frozen), leaves_by_path(plain))
    swapped = swap_subtree(frozen, "head", {"bias": zeros()})
    assert isinstance(swapped, flax.core.FrozenDict)
    assert swapped["body"]["kernel"] is plain["body"]["kernel"]
    back = swap_subtree(plain, "", frozen)
    assert type(back) is dict
    assert type(back["head"]) is dict
    tree, _ = transplant(plain, frozen)
    assert isinstance(tree, flax.core.FrozenDict)
    assert mask(frozen, "head") == flax.core.freeze({"body": {"kernel": False}, "head": {"bias": True}})


class Net(nnx.Module):
    def __init__(self, ways, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(4, ways, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.head(self.norm(x))


def test_an_nnx_state_has_paths_by_attribute_and_keeps_its_variables():
    graph, state = nnx.split(Net(2, nnx.Rngs(0)))
    assert matching(state, ["head", "layers/1/*"]) == [
        "head/bias",
        "head/kernel",
        "layers/1/bias",
        "layers/1/kernel",
    ]
    bias = take_subtree(state, "head/bias")
    assert isinstance(bias, jax.Array)
    assert bias is state["head"]["bias"].get_value()
    x = jnp.ones((1, 3))
    # An array, or the Variable that holds one.
    for new in (bias + 1, nnx.Param(bias + 1)):
        for strict in (True, False):
            swapped = swap_subtree(state, "head/bias", new, strict=strict)
            assert isinstance(swapped["head"]["bias"], nnx.Param)
            shift = nnx.merge(graph, swapped)(x) - nnx.merge(graph, state)(x)
            np.testing.assert_allclose(shift, 1, rtol=1e-5)
    picked = mask(state, "head")
    assert isinstance(picked, nnx.State)
    assert picked["head"]["bias"].get_value() is True


def test_linen_parameters_go_into_an_nnx_network_by_rules():
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            for _ in range(2):
                x = jax.nn.relu(linen.Dense(4)(x))
            return linen.Dense(5, name="head")(linen.BatchNorm(use_running_average=True)(x))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)
    variables = filled(jax.eval_shape(Linen().init, jax.random.key(1), x))
    graph, state = nnx.split(Net(5, nnx.Rngs(0)))
    rules = [
        ("params/Dense_*", "layers/*"),
        ("*/BatchNorm_0/**", r"norm/\2"),
        ("params/head", "head"),
    ]
    merged, report = transplant(variables, state, rules=rules)
    assert len(report.taken) == len(jax.tree.leaves(state)) == 10
    outputs = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(merged, x)
    np.testing.assert_allclose(outputs, jax.jit(Linen().apply)(variables, x), rtol=1e-5)


def test_an_equinox_module_is_a_tree_like_any_other():
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed: pip install equinox")
    module, other = (eqx.nn.MLP(3, 5, 4, 2, key=jax.random.key(seed)) for seed in (0, 1))
    assert matching(module, "layers/2") == ["layers/2/weight", "layers/2/bias"]
    swapped = swap_subtree(module, "layers/0", take_subtree(other, "layers/0"))
    assert swapped.layers[0].weight is other.layers[0].weight
    assert swapped.layers[1] is module.layers[1]
    wider = swap_subtree(module, "layers/2", eqx.nn.Linear(4, 9, key=jax.random.key(2)), strict=False)
    assert wider(jnp.ones(3)).shape == (9,)
    message = 'source: got .* at "activation"; leaves must be arrays.* as eqx.filter does'
    with pytest.raises(ArgumentError, match=message):
        transplant(other, module)
    (arrays, static), source = eqx.partition(module, eqx.is_array), eqx.filter(other, eqx.is_array)
    tree, report = transplant(source, arrays, take="layers/[01]")
    assert len(report.taken) == 4
    assert eqx.combine(tree, static).layers[2].weight is module.layers[2].weight
