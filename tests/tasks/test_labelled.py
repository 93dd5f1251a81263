"""Tests of `labelled` and `split_per_class`: all examples of few-shot tasks with their labels."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import drawn

import jaxmeta as jm
from jaxmeta.tasks import (
    from_arrays,
    glyphs,
    labelled,
    mnist,
    mnist_images,
    sinusoid,
    split_per_class,
    supervised,
)
from jaxmeta.tasks.glyphs import CLASSES
from jaxmeta.tasks.strokes import HAND, class_strokes, draw_example

MODULE = sys.modules["jaxmeta.tasks.labelled"]  # the package's attribute of that name is the function
SIZES = [3, 7, 4, 5]


def pictures(sizes=SIZES):
    """Return distinct random images in random order, of classes named c, d, e, …."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (sum(sizes), 3, 3, 2), dtype=np.uint8)
    order = rng.permutation(len(x))
    return x[order], np.repeat([chr(ord("c") + i) for i in range(len(sizes))], sizes)[order]


def pairs(x, y):
    """Return the set of pairs (grey levels, class)."""
    levels = np.rint(255 * np.asarray(x)).astype(np.uint8)
    return {(image.tobytes(), int(label)) for image, label in zip(levels, y, strict=True)}


def test_every_example_is_returned_once_with_its_class_index():
    x, names = pictures()
    examples = labelled(from_arrays(x, names, ways=2, shots=1))
    assert (examples.x.dtype, examples.y.dtype, examples.x.shape) == (jnp.float32, jnp.int32, (19, 3, 3, 2))
    np.testing.assert_array_equal(examples.y, np.repeat(np.arange(4), SIZES))
    order = np.argsort(names, kind="stable")
    np.testing.assert_allclose(examples.x, x[order] / np.float32(255), rtol=1e-6)


def test_floats_are_unchanged_and_restricted_to_the_split():
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    split = jm.tasks.ClassSplit(train=("2", "0"), test=("1",))
    examples = labelled(from_arrays(x, [0, 1, 2, 0, 1, 2], ways=2, shots=1, classes=split))
    np.testing.assert_array_equal(examples.x, x[[0, 3, 2, 5]])
    assert examples.y.tolist() == [0, 0, 1, 1]


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("rotations", ["none", "classes"])
@pytest.mark.parametrize("groups", [None, {"c": "2", "d": "1", "e": "2", "f": "1"}])
def test_examples_equal_those_that_supervised_draws_from(rotations, groups):
    x, names = pictures()
    few = from_arrays(x, names, ways=2, shots=1, rotations=rotations, groups=groups)
    examples = labelled(few)
    base = supervised(few, batch=4000)
    assert int(examples.y.max()) + 1 == base.card.ways
    support, query = drawn(base)
    seen = pairs(support.x, support.y) | pairs(query.x, query.y)
    assert pairs(examples.x, examples.y) == seen
    assert len(examples.x) == len(seen) == 19 * (4 if rotations == "classes" else 1)
    assert (np.diff(examples.y) >= 0).all()


def test_episodes_contain_these_examples_and_classes():
    x, names = pictures()
    few = from_arrays(x, names, ways=4, shots=1, queries=2)
    known = dict(pairs(*labelled(few)))
    task = drawn(few, 3)
    levels = np.rint(255 * task.query.x).astype(np.uint8)
    classes = np.array([known[image.tobytes()] for image in levels]).reshape(4, 2)
    np.testing.assert_array_equal(classes[:, 0], classes[:, 1])
    assert sorted(classes[:, 0].tolist()) == [0, 1, 2, 3]


def test_all_digits_of_mnist_are_returned_with_their_labels(data_folder):
    if not (data_folder / "mnist").is_dir():
        pytest.skip(f"no MNIST in {data_folder}")
    images, labels = mnist_images(data_folder)
    examples = labelled(mnist(data=data_folder))
    order = np.argsort(labels, kind="stable")
    np.testing.assert_array_equal(examples.y, labels[order])
    np.testing.assert_allclose(examples.x, images[order] / np.float32(255), atol=1e-7)


@pytest.mark.nightly
def test_glyphs_are_new_drawings_of_their_classes():
    few = glyphs("validation", size=12)
    examples = jax.device_get(labelled(few, per_class=3, key=jax.random.key(0)))
    classes = len(CLASSES["validation"])
    assert (examples.x.shape, examples.x.dtype) == ((3 * classes, 12, 12, 1), np.float32)
    np.testing.assert_array_equal(examples.y, np.repeat(np.arange(classes), 3))
    assert examples.x.min() == 0
    assert examples.x.max() <= 1
    assert len(np.unique(examples.x.reshape(3 * classes, -1), axis=0)) == 3 * classes  # all drawings differ
    again = labelled(few, per_class=3, key=jax.random.key(0))
    other = np.asarray(labelled(few, per_class=3, key=jax.random.key(1)).x)
    np.testing.assert_array_equal(examples.x, again.x)
    assert not (examples.x == other).all(axis=(1, 2, 3)).any()


def test_glyphs_have_the_strokes_of_their_labels(monkeypatch):
    """Without variation of the drawer, a drawing is determined by its class."""
    monkeypatch.setattr(MODULE, "hands_of", lambda bits: jnp.zeros((*bits.shape[:-1], HAND), jnp.float32))
    examples = labelled(glyphs("test", size=11), per_class=2, key=jax.random.key(0))
    neutral = jnp.zeros(HAND, jnp.float32)
    draw = jax.jit(jax.vmap(lambda class_id: draw_example(neutral, *class_strokes(class_id), 11)))
    rows = np.array([0, 1, 700, 701, 2046])
    np.testing.assert_allclose(examples.x[rows], draw(CLASSES["test"].start + rows // 2), atol=1e-4)


def test_tasks_without_labelled_examples_are_refused():
    x, names = pictures()
    with pytest.raises(ValueError, match=r'tasks: got rotations="random"'):
        labelled(from_arrays(x, names, ways=2, shots=1, rotations="random"))
    with pytest.raises(ValueError, match=r"tasks: got regression tasks of 'sinusoid', .* or from glyphs"):
        labelled(sinusoid())
    stream = jm.TaskStream(lambda step: None, glyphs(ways=2).card)
    with pytest.raises(ValueError, match=r"tasks: got a stream of 'glyphs', .* from_prepared"):
        labelled(stream)
    few = from_arrays(x, names, ways=2, shots=1, name="letters")
    with pytest.raises(ValueError, match="per_class, key: only apply to glyphs, not to 'letters'; omit them"):
        labelled(few, per_class=2)
    for arguments in ({}, {"per_class": 2}, {"key": jax.random.key(0)}):
        with pytest.raises(ValueError, match=r"per_class, key: got .*; drawing glyphs needs both"):
            labelled(glyphs(), **arguments)
    with pytest.raises(ValueError, match="per_class: got 0; it must be at least 1"):
        labelled(glyphs(), per_class=0, key=jax.random.key(0))


# --- splits per class ----------------------------------------------------------------


@pytest.mark.parametrize("shots", [1, 2])
def test_split_per_class_returns_shots_of_each_class_and_all_other_examples(shots):
    y = np.random.default_rng(0).permutation(np.repeat([4, -1, 9, 2], SIZES))
    chosen, rest = split_per_class(y, shots, jax.random.key(0))
    np.testing.assert_array_equal(y[chosen], np.repeat([-1, 2, 4, 9], shots))
    np.testing.assert_array_equal(np.sort(np.concatenate([chosen, rest])), np.arange(len(y)))
    assert (np.diff(rest) > 0).all()
    again = split_per_class(jnp.asarray(y), shots, jax.random.key(0))
    np.testing.assert_array_equal(again[0], chosen)


def test_examples_of_a_class_are_chosen_uniformly():
    y = np.repeat([0, 1], [5, 3])
    draws = 600
    counts = np.zeros(8)
    for key in jax.random.split(jax.random.key(0), draws):
        counts[split_per_class(y, 2, key)[0]] += 1
    share = np.repeat([2 / 5, 2 / 3], [5, 3])
    # Five standard deviations of a binomial count.
    assert (np.abs(counts - draws * share) < 5 * np.sqrt(draws * share * (1 - share))).all()


def test_too_many_shots_are_refused():
    with pytest.raises(ValueError, match=r"shots: got 3, which needs at least 4 .* 1 of 2 .*: 7 \(3\)"):
        split_per_class(np.repeat([7, 8], [3, 4]), 3, jax.random.key(0))
    with pytest.raises(ValueError, match="shots: got 0; it must be at least 1"):
        split_per_class(np.arange(3), 0, jax.random.key(0))
    with pytest.raises(ValueError, match="y: got no examples; there must be at least one"):
        split_per_class(np.zeros(0, int), 1, jax.random.key(0))
