"""Learners on arrays of other types, with empty query sets, and on images without channels."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from test_class_slots import KEY, WAYS, Y, batch, learner_and_params

import jaxmeta as jm
from jaxmeta.cli import names

# Small integers, which every type represents exactly.
DIGITS = np.random.default_rng(1).integers(0, 4, (6, 4))
DEFAULT = ("prototypical",)


@pytest.fixture(autouse=True)
def without_type_checks():
    """Turn run-time type checks off: users do not have them, and they would refuse these arrays first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def rows():
    return [
        pytest.param(name, marks=() if name in DEFAULT else pytest.mark.nightly) for name in names.LEARNERS
    ]


def batch_of_type(dtype, name, numpy=False):
    x = DIGITS.astype(dtype)
    x = np.tile(x[:, :, None, None], (1, 1, 4, 1)) if name == "metanet" else x
    return jm.Batch(x if numpy else jnp.asarray(x), Y if numpy else jnp.asarray(Y), ways=WAYS)


@functools.cache
def compiled(name):
    """Compile the outputs, loss and gradient of a task whose query set is its support set."""
    learner, params = learner_and_params(name)

    @jax.jit
    def results(part):
        def loss(params):
            return learner.loss(params, jm.Task(part, part), KEY)[0]

        outputs = learner.predict(params, learner.adapt(params, part, KEY), part.x)
        return outputs, *jax.value_and_grad(loss)(params)

    return results


@pytest.mark.parametrize("name", names.LEARNERS)
def test_init_refuses_a_seed_in_place_of_a_key(name):
    learner, _ = learner_and_params(name)
    part = batch_of_type(np.float32, name)
    with pytest.raises(jm.checks.ArgumentError, match=r"key: got 0 \(int\); .* jax\.random\.key\(0\)"):
        learner.init(0, jm.Task(part, part))


@pytest.mark.parametrize("name", rows())
def test_examples_of_every_type_give_the_results_of_float32(name):
    expected = compiled(name)(batch_of_type(np.float32, name))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    results = compiled(name)(batch_of_type(np.uint8, name))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), results, expected)
    results = compiled(name)(batch_of_type(ml_dtypes.bfloat16, name))
    assert results[0].shape == expected[0].shape
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(results))
    # Without `jit`, which would turn NumPy's arrays into JAX's.
    learner, params = learner_and_params(name)
    for dtype in (np.float32, np.uint8):
        part = batch_of_type(dtype, name, numpy=True)
        outputs = learner.predict(params, learner.adapt(params, part, KEY), part.x)
        np.testing.assert_allclose(outputs, expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, ml_dtypes.bfloat16, np.float16])
def test_mann_initialises_in_float32_from_examples_of_every_type(dtype):
    learner, params = learner_and_params("mann")
    part = batch_of_type(dtype, "mann")
    shapes = jax.eval_shape(learner.init, KEY, jm.Task(part, part))
    assert jax.tree.map(lambda leaf: leaf.dtype.name, shapes) == jax.tree.map(lambda _: "float32", shapes)
    adapt = jax.jit(learner.adapt)
    result, expected = (adapt(params, support, KEY) for support in (part, batch_of_type(np.float32, "mann")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), result, expected)


@pytest.mark.nightly
def test_metanet_adapts_to_numpy_batches():
    learner, params = learner_and_params("metanet")
    part = batch_of_type(np.float32, "metanet", numpy=True)
    result = learner.adapt(params, jm.Batch(part.x, part.y), KEY)
    expected = learner.adapt(params, batch_of_type(np.float32, "metanet"), KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), result, expected)


@pytest.mark.parametrize("name", rows())
def test_empty_query_sets_have_empty_outputs(name):
    learner, params = learner_and_params(name)
    support = batch(Y, name=name)
    empty = support.x[:0]
    query = jm.Batch(empty, jnp.asarray(Y[:0]), ways=WAYS)

    @jax.jit
    def results(params):
        adapted = learner.adapt(params, support, KEY)
        outputs = [learner.predict(params, adapted, empty, mask) for mask in (None, jnp.zeros(0, bool))]
        loss = jax.value_and_grad(lambda params: learner.loss(params, jm.Task(support, query), KEY)[0])
        return outputs, loss(params)

    outputs, value_and_gradient = results(params)
    assert [output.shape for output in outputs] == [(0, WAYS)] * 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(value_and_gradient))


NETWORKS = {
    "conv4": (jm.nn.Conv4(ways=3, filters=2), 16),
    "strided": (jm.nn.StridedConv4(ways=3, filters=2), 16),
    "flatten": (jm.nn.StridedConv4(ways=3, filters=2, flatten=True), 16),
    "augmented": (jm.nn.AugmentedCNN(3, filters=2, blocks=2, features=3), 8),
    "relation": (jm.nn.RelationEmbedding(filters=2), 12),
    "resnet12": (jm.nn.ResNet12(ways=3, channels=(2, 2)), 8),
    "resnet": (jm.nn.ResNet(ways=3, depths=(1,), channels=(4,), stem=4), 16),
    "squeezenet": pytest.param(jm.nn.SqueezeNet(ways=3), 17, marks=pytest.mark.nightly),
    "vit": (jm.nn.ViT(ways=3, patch=4, width=4, depth=1, heads=2, mlp=4, image_size=8), 8),
}
EVERY_NETWORK = pytest.mark.parametrize(("network", "size"), NETWORKS.values(), ids=NETWORKS)


@EVERY_NETWORK
def test_networks_map_empty_batches_to_empty_batches(network, size):
    model, x = jm.nn.as_model(network), jnp.ones((2, size, size, 1))
    params = jax.jit(model.init)(KEY, x)
    expected = jax.eval_shape(model.apply, params, x)

    @jax.jit
    def value_and_gradient(params, x):
        return model.apply(params, x), jax.grad(lambda p: model.apply(p, x).sum())(params)

    outputs, gradient = value_and_gradient(params, x[:0])
    assert outputs.shape == (0, *expected.shape[1:])
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@EVERY_NETWORK
def test_the_error_for_images_without_channels_names_the_fix(network, size):
    model = jm.nn.as_model(network)
    for shape, hint in (((5, size, size), r"x\[\.\.\., None\]"), ((5, size * size), "")):
        message = rf"x: got an array of shape \({', '.join(map(str, shape))}\); images are .*{hint}"
        with pytest.raises(jm.checks.ArgumentError, match=message):
            jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct(shape, jnp.float32))


def test_learners_of_images_refuse_images_without_channels():
    x = jnp.zeros((6, 28, 28))
    task = jm.Task(*[jm.Batch(x, jnp.asarray(Y), ways=WAYS)] * 2)
    for learner in (jm.maml(jm.nn.Conv4(ways=WAYS)), jm.prototypical(jm.nn.Conv4())):
        with pytest.raises(jm.checks.ArgumentError, match=r"x: got an array of shape .*images are"):
            jax.eval_shape(learner.init, KEY, task)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)])
def test_convolutions_of_empty_batches_have_the_right_shapes(shape):
    tasks, images = shape
    x, kernels = jnp.ones((tasks, images, 5, 5, 2)), jnp.ones((tasks, 3, 3, 2, 4))
    for axes in ((0, 0), (0, None)):
        kernel = kernels if axes[1] == 0 else jnp.ones((3, 3, 2, 4))
        conv = jax.jit(jax.vmap(jm.nn.conv, axes))
        assert conv(x, kernel).shape == (tasks, images, 5, 5, 4)
        gradients = jax.jit(jax.grad(lambda x, kernel: conv(x, kernel).sum(), (0, 1)))(x, kernel)  # noqa: B023
        assert [leaf.shape for leaf in gradients] == [x.shape, kernel.shape]
        assert not np.asarray(gradients[1]).any()
