"""Learners on arrays of other types, on no queries, and on images without channels."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from test_class_slots import KEY, WAYS, Y, batch, made

import jaxmeta as jm
from jaxmeta.cli import names

# Whole numbers of few bits, which are the same in every type.
DIGITS = np.random.default_rng(1).integers(0, 4, (6, 4))
FEW = ("prototypical",)


@pytest.fixture(autouse=True)
def without_type_checks():
    """Users have no type checks at run time, which would be the first to refuse these arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def rows():
    return [pytest.param(name, marks=() if name in FEW else pytest.mark.nightly) for name in names.LEARNERS]


def of_type(dtype, name, numpy=False):
    x = DIGITS.astype(dtype)
    x = np.tile(x[:, :, None, None], (1, 1, 4, 1)) if name == "metanet" else x
    return jm.Batch(x if numpy else jnp.asarray(x), Y if numpy else jnp.asarray(Y), ways=WAYS)


@functools.cache
def compiled(name):
    """Outputs, loss and gradient of a task whose queries are its support set."""
    learner, params = made(name)

    @jax.jit
    def results(part):
        def loss(params):
            return learner.loss(params, jm.Task(part, part), KEY)[0]

        outputs = learner.predict(params, learner.adapt(params, part, KEY), part.x)
        return outputs, *jax.value_and_grad(loss)(params)

    return results


@pytest.mark.parametrize("name", rows())
def test_examples_of_every_type_give_what_float32_gives(name):
    expected = compiled(name)(of_type(np.float32, name))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    found = compiled(name)(of_type(np.uint8, name))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
    found = compiled(name)(of_type(ml_dtypes.bfloat16, name))
    assert found[0].shape == expected[0].shape
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(found))
    # Not compiled: NumPy's arrays would become JAX's on the way.
    learner, params = made(name)
    for dtype in (np.float32, np.uint8):
        given = of_type(dtype, name, numpy=True)
        outputs = learner.predict(params, learner.adapt(params, given, KEY), given.x)
        np.testing.assert_allclose(outputs, expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, ml_dtypes.bfloat16, np.float16])
def test_mann_begins_from_examples_of_every_type(dtype):
    learner, params = made("mann")
    of_dtype = of_type(dtype, "mann")
    shapes = jax.eval_shape(learner.init, KEY, jm.Task(of_dtype, of_dtype))
    assert jax.tree.map(lambda leaf: leaf.dtype.name, shapes) == jax.tree.map(lambda _: "float32", shapes)
    adapted = jax.jit(learner.adapt)
    found, expected = (adapted(params, each, KEY) for each in (of_dtype, of_type(np.float32, "mann")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.nightly
def test_metanet_takes_numpy_batches_by_hand():
    learner, params = made("metanet")
    given = of_type(np.float32, "metanet", numpy=True)
    found = learner.adapt(params, jm.Batch(given.x, given.y), KEY)
    expected = learner.adapt(params, of_type(np.float32, "metanet"), KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.parametrize("name", rows())
def test_no_queries_have_no_outputs(name):
    learner, params = made(name)
    support = batch(Y, name=name)
    nothing = support.x[:0]
    query = jm.Batch(nothing, jnp.asarray(Y[:0]), ways=WAYS)

    @jax.jit
    def of_nothing(params):
        adapted = learner.adapt(params, support, KEY)
        outputs = [learner.predict(params, adapted, nothing, mask) for mask in (None, jnp.zeros(0, bool))]
        loss = jax.value_and_grad(lambda params: learner.loss(params, jm.Task(support, query), KEY)[0])
        return outputs, loss(params)

    outputs, value_and_gradient = of_nothing(params)
    assert [each.shape for each in outputs] == [(0, WAYS)] * 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(value_and_gradient))


NETWORKS = {
    "conv4": (jm.nn.Conv4(ways=3, filters=2), 16),
    "strided": (jm.nn.StridedConv4(ways=3, filters=2), 16),
    "flatten": (jm.nn.StridedConv4(ways=3, filters=2, flatten=True), 16),
    "augmented": (jm.nn.AugmentedCNN(3, filters=2, blocks=2, features=3), 8),
    "relation": (jm.nn.RelationEmbedding(filters=2), 12),
    "resnet12": (jm.nn.ResNet12(ways=3, channels=(2, 2)), 8),
    "resnet": (jm.nn.ResNet(ways=3, depths=(1,), channels=(4,), stem=4), 16),
    "vit": (jm.nn.ViT(ways=3, patch=4, width=4, depth=1, heads=2, mlp=4, image_size=8), 8),
}
ONE_OF_ALL = pytest.mark.parametrize(("network", "size"), NETWORKS.values(), ids=NETWORKS)


@ONE_OF_ALL
def test_networks_give_no_rows_for_no_images(network, size):
    model, x = jm.nn.as_model(network), jnp.ones((2, size, size, 1))
    params = jax.jit(model.init)(KEY, x)
    expected = jax.eval_shape(model.apply, params, x)

    @jax.jit
    def value_and_gradient(params, x):
        return model.apply(params, x), jax.grad(lambda p: model.apply(p, x).sum())(params)

    outputs, gradient = value_and_gradient(params, x[:0])
    assert outputs.shape == (0, *expected.shape[1:])
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@ONE_OF_ALL
def test_images_without_channels_are_refused_by_what_to_do(network, size):
    model = jm.nn.as_model(network)
    for shape, hint in (((5, size, size), r"x\[\.\.\., None\]"), ((5, size * size), "")):
        message = rf"x: got an array of shape \({', '.join(map(str, shape))}\); images are .*{hint}"
        with pytest.raises(jm.checks.ArgumentError, match=message):
            jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct(shape, jnp.float32))


def test_learners_of_images_say_that_channels_are_missing():
    x = jnp.zeros((6, 28, 28))
    task = jm.Task(*[jm.Batch(x, jnp.asarray(Y), ways=WAYS)] * 2)
    for learner in (jm.maml(jm.nn.Conv4(ways=WAYS)), jm.prototypical(jm.nn.Conv4())):
        with pytest.raises(jm.checks.ArgumentError, match=r"x: got an array of shape .*images are"):
            jax.eval_shape(learner.init, KEY, task)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)])
def test_convolutions_of_no_tasks_or_no_images_have_the_right_shapes(shape):
    tasks, images = shape
    x, kernels = jnp.ones((tasks, images, 5, 5, 2)), jnp.ones((tasks, 3, 3, 2, 4))
    for axes in ((0, 0), (0, None)):
        kernel = kernels if axes[1] == 0 else jnp.ones((3, 3, 2, 4))
        of = jax.jit(jax.vmap(jm.nn.conv, axes))
        assert of(x, kernel).shape == (tasks, images, 5, 5, 4)
        slope = jax.jit(jax.grad(lambda x, kernel: of(x, kernel).sum(), (0, 1)))(x, kernel)  # noqa: B023
        assert [leaf.shape for leaf in slope] == [x.shape, kernel.shape]
        assert not np.asarray(slope[1]).any()
