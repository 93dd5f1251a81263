"""Tasks of features: the same episodes with features in place of images, and their cache."""

import dataclasses
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import raises_argument_error

import jaxmeta as jm
from jaxmeta.tasks import feature_cache
from jaxmeta.tasks.feature_cache import Embedder, features_description

pytestmark = pytest.mark.usefixtures("cache")
SIDE, DIM = 4, 3
RANDOM = np.random.default_rng(0)
X = RANDOM.integers(0, 256, (36, SIDE, SIDE, 1), np.uint8)
Y = np.repeat([f"class {index}" for index in range(6)], 6)
WEIGHTS = RANDOM.normal(size=(SIDE * SIDE, DIM)).astype(np.float32)


class Projection:
    """A random projection with a description, as functions of `jm.features` have."""

    description = "a projection"

    def __call__(self, weights, x):
        return jnp.tanh(x.reshape(x.shape[0], -1) @ weights)


PROJECTION = Projection()


def embedding(scale=1.0):
    return jax.tree_util.Partial(PROJECTION, jnp.asarray(scale * WEIGHTS))


def expected(images):
    """Return the features of images in [0, 1] by NumPy."""
    return np.tanh(np.asarray(images).reshape(-1, SIDE * SIDE) @ WEIGHTS)


@pytest.mark.parametrize("rotations", ["none", "classes", "random"])
@pytest.mark.parametrize(("ways", "shots"), [(3, 2), ((2, 4), (1, 3))], ids=["fixed", "ranges"])
def test_episodes_are_those_of_the_images(rotations, ways, shots):
    tasks = jm.tasks.from_arrays(X, Y, ways=ways, shots=shots, queries=2, rotations=rotations, protocol="own")
    features = jm.tasks.embedded(tasks, embedding(), name="a projection")
    assert features.card == dataclasses.replace(tasks.card, protocol="own, features of a projection")
    assert features.classes == tasks.classes
    sample, sample_features = jax.jit(tasks.sample), jax.jit(features.sample)
    for seed in range(3):
        key = jax.random.key(seed)
        assert jm.tasks.classes_of(features, key) == jm.tasks.classes_of(tasks, key)
        for of_images, of_features in zip(sample(key), sample_features(key), strict=True):
            real = np.ones(len(of_images.y), bool) if of_images.mask is None else np.asarray(of_images.mask)
            z = np.where(real[:, None], expected(of_images.x), 0)
            np.testing.assert_allclose(of_features.x, z, atol=1e-5)
            np.testing.assert_array_equal(of_features.y, of_images.y)
            assert of_features.ways == of_images.ways
            if of_images.mask is not None:
                np.testing.assert_array_equal(of_features.mask, real)


def test_groups_and_labelled_examples_keep_their_order():
    groups = {name: "even" if int(name[-1]) % 2 == 0 else "odd" for name in set(Y)}
    tasks = jm.tasks.from_arrays(X, Y, ways=2, shots=1, groups=groups, rotations="classes")
    features = jm.tasks.embedded(tasks, embedding())
    x, y = jm.tasks.labelled(tasks)
    z, y_of_features = jm.tasks.labelled(features)
    np.testing.assert_allclose(z, expected(x), atol=1e-5)
    np.testing.assert_array_equal(y_of_features, y)
    key = jax.random.key(3)
    np.testing.assert_allclose(features.sample(key).query.x, expected(tasks.sample(key).query.x), atol=1e-5)


@pytest.mark.nightly
def test_support_and_queries_of_features_are_from_different_domains():
    styles = {"domains": np.tile(["photo", "drawing", "icon"], 12), "across": True}
    tasks = jm.tasks.from_arrays(X, Y, ways=2, shots=1, queries=2, **styles)
    features, key = jm.tasks.embedded(tasks, embedding()), jax.random.key(3)
    for of_images, of_features in zip(tasks.sample(key), features.sample(key), strict=True):
        np.testing.assert_allclose(of_features.x, expected(of_images.x), atol=1e-5)
    assert jm.tasks.classes_of(features, key) == jm.tasks.classes_of(tasks, key)


@pytest.mark.nightly
def test_procedural_tasks_are_embedded_as_they_are_drawn():
    tasks = jm.tasks.glyphs(ways=3, shots=1, queries=2, size=8)
    features = jm.tasks.embedded(tasks, lambda x: x.sum((2, 3)))
    key = jax.random.key(0)
    sums = np.asarray(tasks.sample(key).query.x).sum((2, 3))
    np.testing.assert_allclose(jax.jit(features.sample)(key).query.x, sums, atol=1e-4)
    assert jm.tasks.classes_of(features, key) == jm.tasks.classes_of(tasks, key)


@pytest.mark.nightly
def test_a_stream_is_embedded_by_batches():
    tasks = jm.tasks.from_arrays(X, Y, ways=(2, 3), shots=1, queries=2)
    sample = jax.vmap(tasks.sample)

    def at(step):
        return sample(jax.random.split(jax.random.key(step), 4))

    closed = []

    def batches(start):
        try:
            yield from map(at, range(start, start + 2))
        finally:
            closed.append(start)

    features = jm.tasks.embedded(jm.TaskStream(at, tasks.card, batches), embedding())
    images, read = at(1), features.batches(1)
    for task in (features.at(1), next(read)):
        for of_images, of_features in zip(images, task, strict=True):
            mask = np.asarray(of_images.mask)
            z = expected(of_images.x).reshape(*mask.shape, DIM)
            np.testing.assert_allclose(of_features.x, np.where(mask[..., None], z, 0), atol=1e-5)
    read.close()
    assert closed == [1]


def test_zero_shot_tasks_keep_the_metadata_of_their_classes():
    vectors = {name: RANDOM.normal(size=2) for name in set(Y)}
    tasks = jm.tasks.from_arrays(X, Y, ways=3, shots=0, queries=2, metadata=vectors)
    features = jm.tasks.embedded(tasks, embedding())
    for seed in range(3):
        task, of_images = (each.sample(jax.random.key(seed)) for each in (features, tasks))
        np.testing.assert_array_equal(task.support.x, of_images.support.x)
        np.testing.assert_array_equal(task.query.y, of_images.query.y)
        np.testing.assert_allclose(task.query.x, expected(of_images.query.x), atol=1e-5)


@pytest.mark.nightly
def test_drawn_zero_shot_tasks_keep_the_metadata_of_their_classes():
    tasks = jm.tasks.glyphs(ways=3, shots=0, queries=2, size=8)
    task = jm.tasks.embedded(tasks, lambda x: x.sum((2, 3))).sample(jax.random.key(0))
    of_images = tasks.sample(jax.random.key(0))
    np.testing.assert_array_equal(task.support.x, of_images.support.x)
    np.testing.assert_allclose(task.query.x, np.asarray(of_images.query.x).sum((2, 3)), atol=1e-4)


def test_features_of_a_model_have_the_parameters_of_its_init():
    tasks = jm.tasks.from_arrays(X, Y, ways=2, shots=1)
    model = jm.Model(lambda key, x: jnp.asarray(WEIGHTS), PROJECTION)
    task = jm.tasks.embedded(tasks, model).sample(jax.random.key(0))
    np.testing.assert_allclose(task.query.x, expected(tasks.sample(jax.random.key(0)).query.x), atol=1e-5)


@pytest.mark.parametrize(
    ("tasks", "embed", "message"),
    [
        (lambda: jm.tasks.sinusoid(), lambda x: x, "tasks: got regression tasks of 'sinusoid'"),
        (
            lambda: jm.tasks.sequences(jm.tasks.glyphs(ways=3, shots=1), length=6),
            lambda x: x,
            "tasks: got sequences; embed the tasks first",
        ),
        (lambda: jm.tasks.glyphs(ways=3, shots=1), lambda x: x, "embed: returns float32 of shape (1, 28"),
        (lambda: jm.tasks.glyphs(ways=3, shots=1), lambda x: (x, x), "embed: returns tuple"),
        (lambda: jm.tasks.glyphs(ways=3, shots=1), 7, "embed: got 7"),
        (
            lambda: jm.tasks.glyphs(ways=3, shots=1),
            jm.nn.as_model(jm.nn.Conv4(filters=2)),
            "embed: got a model with batch statistics",
        ),
        (
            lambda: jm.tasks.from_arrays(X, Y, ways=2, shots=1),
            lambda x: x[:, :, 0, 0] / 0,
            "embed: gives features that are not finite",
        ),
    ],
)
def test_unsupported_tasks_and_functions_are_refused(tasks, embed, message):
    with raises_argument_error(re.escape(message)):
        jm.tasks.embedded(tasks(), embed)


# --- The cache ----------------------------------------------------------------------------------------------


def embedder(scale=1.0, **settings):
    function = embedding(scale)
    return Embedder(function, description=features_description(function), **settings)


def stored():
    return list((feature_cache.cache_folder() / feature_cache.FOLDER).glob("*"))


def test_each_image_is_computed_once_and_kept():
    calls = []
    first = embedder(batch=8, report=lambda done, total: calls.append((done, total)))
    z = first(np.concatenate([X[:20], X[:5]]))
    first.save()
    np.testing.assert_allclose(z, expected(np.concatenate([X[:20], X[:5]]) / np.float32(255)), atol=1e-5)
    assert (first.computed, first.seen) == (20, 25)
    assert calls == [(13, 25), (21, 25), (25, 25)]
    second = embedder(batch=8)
    np.testing.assert_array_equal(second(X[:20]), z[:20])
    assert second.computed == 0
    second(X)
    second.save()
    assert second.computed == 16
    assert len(stored()) == 1
    third = embedder()
    third(X)
    assert third.computed == 0


def test_images_of_another_type_or_shape_are_computed_separately():
    one = embedder()
    one(X[:2])
    one(X[:2].astype(np.float32) / 255)
    one(X[:2].reshape(2, SIDE // 2, 2 * SIDE, 1))
    assert one.computed == 6


def test_other_weights_have_a_separate_file():
    for scale in (1.0, 2.0):
        each = embedder(scale)
        each(X[:2])
        each.save()
    assert len(stored()) == 2


@pytest.mark.parametrize("damage", ["cut", "text", "other weights", "not finite"])
def test_an_invalid_cache_file_is_ignored_with_a_warning_and_rewritten(damage):
    first = embedder()
    z = first(X[:3])
    first.save()
    (file,) = stored()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif damage == "text":
        file.write_text("no features")
    elif damage == "other weights":
        other = embedder(2.0)
        other(X[:3])
        other.save()
        (source,) = set(stored()) - {file}
        source.replace(file)
    else:
        with np.load(file) as content:
            arrays = dict(content)
        np.savez(file, **{**arrays, "features": np.full_like(arrays["features"], np.nan)})
    with pytest.warns(UserWarning, match="is damaged|has features of another network"):
        second = embedder()
    np.testing.assert_array_equal(second(X[:3]), z)
    assert second.computed == 3
    with pytest.warns(UserWarning, match="cache file"):
        second.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        third = embedder()
    third(X[:3])
    assert third.computed == 0


def test_a_cache_that_cannot_be_written_gives_a_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXMETA_CACHE", str(tmp_path / "file"))
    one = embedder()
    one(X[:2])
    with pytest.warns(UserWarning, match="features could not be kept"):
        one.save()


def test_features_do_not_depend_on_the_other_images_of_a_call():
    together, alone = embedder(alone=True)(X[:7]), embedder(alone=True)
    for image, z in zip(X[:7], together, strict=True):
        np.testing.assert_array_equal(alone(image[None])[0], z)
