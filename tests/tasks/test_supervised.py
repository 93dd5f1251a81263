"""Tests of `supervised`: all classes, uniform, with the same labels in every mini-batch and rotation."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import draw, drawn, numbered, sampled
from scipy import stats

import jaxmeta as jm
from jaxmeta.tasks import ClassSplit, from_arrays, glyphs, sinusoid, supervised
from jaxmeta.tasks.glyphs import CLASSES
from jaxmeta.tasks.strokes import HAND, class_strokes, draw_example

MODULE = sys.modules["jaxmeta.tasks.supervised"]  # the package's attribute of that name is the function
SIZES = [3, 7, 4, 5]


def test_classes_and_their_examples_are_uniform_under_fixed_labels():
    x, y = numbered(SIZES)
    tasks = supervised(from_arrays(x, y, ways=2, shots=1), batch=20)
    count = 4000
    task = sampled(tasks, count)
    for batch in task:
        assert (batch.x.shape, batch.y.shape, batch.mask, batch.ways) == (
            (count, 10, 2), (count, 10), None, 4,
        )  # fmt: skip
        assert batch.y.dtype == np.int32
        np.testing.assert_array_equal(batch.y, batch.x[..., 0])
        # Classes are uniform, whatever their number of examples.
        expected = np.concatenate([[10 * count / 4 / size] * size for size in SIZES])
        examples = batch.x[..., 1] + (np.cumsum(SIZES) - SIZES)[batch.y]
        counts = np.bincount(examples.astype(int).ravel(), minlength=sum(SIZES))
        assert stats.chisquare(counts, expected).pvalue > 1e-3
    # Support and queries are independent.
    table = np.zeros((4, 4), int)
    np.add.at(table, (task.support.y, task.query.y), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_the_card_describes_the_mini_batches():
    x, y = numbered(SIZES)
    split = ClassSplit(train=("0", "1", "3"), test=("2",))
    few = from_arrays(x, y, ways=2, shots=2, classes=split, name="letters", protocol="mine")
    card = supervised(few, batch=6).card
    assert (card.tasks, card.split, card.kind, card.ways, card.shots, card.queries, card.classes) == (
        "letters", "train", "classification", 3, 1, 1, 3,
    )  # fmt: skip
    assert card.split_hash == split.hash
    assert card.protocol == "all 3 classes at once, mini-batches of 6, of: mine"
    task = drawn(supervised(few, batch=2000))
    assert set(zip(task.query.x[:, 0].tolist(), task.query.y.tolist(), strict=True)) == {
        (0, 0),
        (1, 1),
        (3, 2),
    }


def test_drawing_is_pure_under_jit_and_vmap_and_compiled_once():
    x, y = numbered(SIZES)
    traces = []

    @jax.jit
    def draw_batch(sample, keys):
        traces.append(None)
        return jax.vmap(sample)(keys)

    keys = jax.random.split(jax.random.key(0), 3)
    for ways in (2, 2):
        tasks = supervised(from_arrays(x, y, ways=ways, shots=1), batch=4)
        batch = draw_batch(tasks.sample, keys)
    assert len(traces) == 1
    for i, key in enumerate(keys):
        task = draw(tasks.sample, key)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), batch, task)
    closed = jax.make_jaxpr(lambda sample, key: sample(key))(tasks.sample, keys[0])
    assert sum(np.size(constant) for constant in closed.consts) < 10


@pytest.mark.parametrize("rotations", ["classes", "random"])
def test_rotated_classes_have_separate_labels_and_random_rotations_share_them(rotations):
    x = np.random.default_rng(0).integers(0, 256, (6, 3, 3, 1), dtype=np.uint8)
    few = from_arrays(x, np.repeat(np.arange(3), 2), ways=2, shots=1, rotations=rotations)
    tasks = supervised(few, batch=2400)
    expected = 12 if rotations == "classes" else 3
    assert (tasks.card.ways, tasks.card.classes, tasks.card.rotations) == (expected, expected, rotations)
    known = {np.rot90(x[row], turns).tobytes(): (row // 2, turns) for row in range(6) for turns in range(4)}
    counts = np.zeros((3, 4), int)
    for batch in drawn(tasks):
        assert batch.x.dtype == np.float32
        for image, label in zip(np.rint(255 * batch.x).astype(np.uint8), batch.y, strict=True):
            c, turns = known[image.tobytes()]
            assert label == (c + 3 * turns if rotations == "classes" else c)
            counts[c, turns] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


def test_grouped_and_zero_shot_tasks_have_all_their_classes():
    x, y = numbered([4, 4, 4, 4, 4])
    metadata = {str(c): [float(c)] for c in range(5)}
    groups = {"0": "b", "1": "a", "2": "c", "3": "a", "4": "b"}
    few = from_arrays(x, y, ways=2, shots=0, queries=2, metadata=metadata, groups=groups)
    tasks = supervised(few, batch=400)
    support, query = drawn(tasks)
    assert support.x.shape == (200, 2)
    assert tasks.card.ways == 4
    # Sorted by group; the group with a single class is skipped.
    np.testing.assert_array_equal(query.x[:, 0], np.array([1, 3, 0, 4])[query.y])


@pytest.mark.nightly
def test_mini_batches_of_glyphs_are_new_drawings_of_all_classes():
    few = glyphs("validation", ways=5, shots=1, size=12)
    tasks = supervised(few, batch=64)
    assert (tasks.card.ways, tasks.card.shots, tasks.card.classes) == (1024, 1, 1024)
    assert tasks.card.split_hash == few.card.split_hash
    task = sampled(tasks, 30)
    assert task.support.x.shape == (30, 32, 12, 12, 1)
    labels = np.concatenate([task.support.y, task.query.y]).ravel()
    assert labels.min() >= 0
    assert labels.max() < 1024
    assert stats.chisquare(np.bincount(labels // 128, minlength=8)).pvalue > 1e-3
    assert len(np.unique(task.query.x.reshape(-1, 144), axis=0)) == 960  # all drawings differ


@pytest.mark.nightly
def test_glyphs_have_the_strokes_of_their_labels(monkeypatch):
    """Without variation of the drawer, a drawing is determined by its class."""
    monkeypatch.setattr(MODULE, "hands_of", lambda bits: jnp.zeros((*bits.shape[:-1], HAND), jnp.float32))
    tasks = supervised(glyphs("test", ways=2, size=16), batch=8)
    batch = jax.jit(tasks.sample)(jax.random.key(1)).query
    neutral = jnp.zeros(HAND, jnp.float32)
    draw = jax.jit(jax.vmap(lambda class_id: draw_example(neutral, *class_strokes(class_id), 16)))
    np.testing.assert_allclose(batch.x, draw(CLASSES["test"].start + batch.y), atol=1e-4)
    assert len(set(batch.y.tolist())) > 1


@pytest.mark.parametrize("batch", [0, 1, 3, -2, True])
def test_invalid_batch_sizes_are_refused(batch):
    with pytest.raises(ValueError, match=r"batch: got .*; it must be (at least 2|even|a whole number)"):
        supervised(glyphs(ways=2), batch)


def test_tasks_of_other_sources_are_refused():
    with pytest.raises(ValueError, match=r"tasks: got regression tasks of 'sinusoid', .* or from glyphs"):
        supervised(sinusoid())
    other = glyphs(ways=2)._replace(sample=lambda key: None)
    with pytest.raises(ValueError, match=r"tasks: got classification tasks of 'glyphs', .* from from_arrays"):
        supervised(other)
    with pytest.raises(ValueError, match="tasks: got classification tasks"):
        supervised(supervised(glyphs(ways=2)))
    stream = jm.TaskStream(lambda step: None, glyphs(ways=2).card)
    with pytest.raises(ValueError, match=r"tasks: got a stream of 'glyphs', .* from_prepared"):
        supervised(stream)
