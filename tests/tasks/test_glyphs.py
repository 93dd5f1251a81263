"""Tests of glyphs: complete images, about as hard as Omniglot, of uniform and distinct classes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmeta.tasks.glyphs import CLASSES, glyph_metadata, glyphs
from jaxmeta.tasks.strokes import HAND, class_strokes, draw_example, hands_of

EPISODES = 200


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(0), EPISODES)


@pytest.fixture(scope="module")
def episodes(keys):
    """Draw 5-way 1-shot tasks of the test classes."""
    return jax.jit(jax.vmap(glyphs("test", ways=5, shots=1, queries=3).sample))(keys)


@pytest.fixture(scope="module")
def zero_shot(keys):
    """Draw zero-shot tasks, whose support set is the metadata of the classes."""
    return jax.jit(jax.vmap(glyphs("test", ways=5, shots=0, queries=4).sample))(keys)


@pytest.fixture(scope="module")
def metadata():
    """Return the metadata of all classes."""
    return np.asarray(glyph_metadata(np.arange(CLASSES["test"].stop)))


@pytest.fixture(scope="module")
def classes(zero_shot, metadata):
    """Return the class of each slot of each episode, `(episodes, 5)`, by nearest metadata."""
    table = metadata[np.array(CLASSES["test"])]
    vectors = np.asarray(zero_shot.support.x).reshape(-1, table.shape[1])
    distance = np.square(vectors).sum(1)[:, None] - 2 * vectors @ table.T + np.square(table).sum(1)[None]
    ids = distance.argmin(1)
    # A class has the same strokes in every episode.
    np.testing.assert_allclose(table[ids], vectors, atol=1e-5)
    return ids.reshape(-1, 5)


def test_shapes_types_and_card_of_glyphs(episodes):
    tasks = glyphs("test", ways=5, shots=1, queries=3)
    assert episodes.support.x.shape == (EPISODES, 5, 28, 28, 1)
    assert episodes.query.x.shape == (EPISODES, 15, 28, 28, 1)
    assert episodes.support.ways == episodes.query.ways == 5
    assert episodes.query.x.dtype == jnp.float32
    assert episodes.query.y.dtype == jnp.int32
    np.testing.assert_array_equal(episodes.support.y[0], range(5))
    np.testing.assert_array_equal(episodes.query.y[0], np.repeat(range(5), 3))
    card = tasks.card
    assert (card.tasks, card.split, card.kind) == ("glyphs", "test", "classification")
    assert (card.ways, card.shots, card.queries, card.classes) == (5, 1, 3, 1024)
    assert card.split_hash == glyphs("train").card.split_hash
    assert len(card.split_hash) == 64


def test_drawing_is_pure_under_jit_and_vmap(episodes, keys):
    sample = glyphs("test", ways=5, shots=1, queries=3).sample
    third = jax.tree.map(lambda leaf: leaf[3], episodes)
    alone = jax.jit(sample)(keys[3])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), alone, third)
    jax.tree.map(np.testing.assert_array_equal, alone, jax.jit(sample)(keys[3]))


def test_all_splits_share_one_compiled_step(keys):
    traces = []

    @jax.jit
    def draw(sample, key):
        traces.append(1)
        return sample(key)

    for split in ("train", "validation", "train"):
        draw.lower(glyphs(split, ways=2).sample, keys[0])
    assert len(traces) == 1


def test_splits_share_no_class():
    ids = [set(CLASSES[split]) for split in ("train", "validation", "test")]
    assert all(ids)
    assert len(set.union(*ids)) == sum(map(len, ids))


@pytest.mark.nightly
def test_classes_are_distinct_uniform_and_independent_of_slots(classes):
    assert all(len(set(row)) == 5 for row in classes)
    count = np.bincount(classes.ravel(), minlength=1024)
    expected = classes.size / 1024
    chi2 = (np.square(count - expected) / expected).sum()
    assert abs(chi2 - 1023) < 5 * (2 * 1023) ** 0.5
    sigma = 1024 / 12**0.5 / EPISODES**0.5
    np.testing.assert_allclose(classes.mean(0), 1023 / 2, atol=5 * sigma)
    # Neighbouring slots are independent: the order of the classes is random.
    assert (np.diff(classes, axis=1) > 0).mean() == pytest.approx(0.5, abs=0.06)


def test_every_class_can_be_drawn_at_once(metadata):
    task = jax.jit(glyphs("validation", ways=1024, shots=0, queries=1, size=8).sample)(jax.random.key(0))
    drawn = np.sort(np.asarray(task.support.x), 0)
    np.testing.assert_allclose(drawn, np.sort(metadata[np.array(CLASSES["validation"])], 0), atol=1e-5)


def test_metadata_identifies_the_class(metadata):
    assert metadata.dtype == np.float32
    assert len(np.unique(metadata.round(3), axis=0)) == len(metadata) == 6144
    assert np.abs(metadata).max() < 5
    assert metadata.std() == pytest.approx(1, abs=0.25)
    np.testing.assert_allclose(glyph_metadata(7), metadata[7], atol=1e-5)
    np.testing.assert_allclose(glyph_metadata(np.array([[7]])), metadata[7][None, None], atol=1e-5)
    np.testing.assert_allclose(jax.jit(glyph_metadata)(jnp.int32(7)), metadata[7], atol=1e-5)


def test_zero_shot_tasks_have_the_metadata_as_support(zero_shot):
    assert zero_shot.support.x.shape == (EPISODES, 5, 25)
    np.testing.assert_array_equal(zero_shot.support.y, np.tile(range(5), (EPISODES, 1)))
    assert zero_shot.query.x.shape == (EPISODES, 20, 28, 28, 1)
    assert zero_shot.support.ways == 5


def test_images_follow_the_class_across_episodes(zero_shot, classes):
    ids = np.repeat(classes.ravel(), 4)
    images = np.asarray(zero_shot.query.x).reshape(len(ids), -1)
    # Pairs of images from different episodes, of the same class and of different classes.
    order = np.argsort(ids, kind="stable")
    pairs = np.stack([order[:-4], order[4:]])
    pairs = pairs[:, pairs[0] // 20 != pairs[1] // 20]
    distance = np.square(images[pairs[0]] - images[pairs[1]]).sum(1)
    same = ids[pairs[0]] == ids[pairs[1]]
    assert min(same.sum(), (~same).sum()) > 1000
    assert distance[same].mean() < 0.85 * distance[~same].mean()


def test_all_examples_differ(episodes):
    images = np.concatenate([episodes.support.x, episodes.query.x], 1).reshape(EPISODES * 20, -1)
    assert len(np.unique(images, axis=0)) == len(images)


def test_every_image_has_full_ink_and_an_empty_border(episodes):
    for batch in episodes:
        x = np.asarray(batch.x)
        assert x.min() == 0
        assert x.max() == 1
        ink = x.mean((-3, -2, -1))
        assert ink.min() > 0.03
        assert ink.max() < 0.40
        border = np.concatenate([x[..., 0, :, 0], x[..., -1, :, 0], x[..., :, 0, 0], x[..., :, -1, 0]])
        assert border.max() < 1e-3
        # Every image has fully inked pixels.
        assert x.max((-3, -2, -1)).min() > 0.9


@pytest.mark.nightly
def test_the_size_only_changes_the_resolution():
    hands = hands_of(jax.random.bits(jax.random.key(0), (5, HAND), jnp.uint32))
    strokes = jax.jit(jax.vmap(class_strokes))(jnp.arange(5))
    small, large = (
        jax.jit(jax.vmap(functools.partial(draw_example, size=size)))(hands, *strokes) for size in (28, 56)
    )
    pooled = large.reshape(5, 28, 2, 28, 2).mean((2, 4))
    assert jnp.abs(small[..., 0] - pooled).mean() < 0.03


def test_nearest_neighbours_on_pixels_have_about_the_accuracy_of_omniglot(episodes):
    """The accuracy of 1-nearest-neighbour is close to Omniglot's (41.7 %) and well above chance (20 %)."""
    support = np.asarray(episodes.support.x).reshape(EPISODES, 5, -1)
    query = np.asarray(episodes.query.x).reshape(EPISODES, 15, -1)
    products = query @ support.transpose(0, 2, 1)
    norms = np.square(support).sum(-1)[:, None]
    for score in (2 * products - norms, products / np.sqrt(norms)):
        accuracy = (score.argmax(-1) == np.asarray(episodes.query.y)).mean()
        assert 0.40 < accuracy < 0.55


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "dev"}, "split: got 'dev'; it must be one of"),
        ({"ways": 0}, "ways: got 0; it must be at least 1"),
        ({"ways": 1025, "split": "test"}, "ways: got 1025; it must be at most 1024"),
        ({"shots": -1}, "shots: got -1; it must be at least 0"),
        ({"queries": 0}, "queries: got 0; it must be at least 1"),
        ({"size": 4}, "size: got 4; it must be at least 8"),
    ],
)
def test_invalid_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        glyphs(**settings)


@pytest.mark.parametrize("class_id", [-1, 6144, np.array([0, 7000])])
def test_metadata_of_unknown_classes_raises_an_error(class_id):
    with pytest.raises(ValueError, match=r"class_id: got .*; it must be integers from 0 to 6143"):
        glyph_metadata(class_id)
