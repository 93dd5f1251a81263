"""Tests of layers with slow and fast weights, and of the generators of fast weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import jaxmeta as jm
from jaxmeta.nn.augmented import (
    Augmented,
    AugmentedCNN,
    AugmentedConv,
    AugmentedDense,
    ExampleGenerator,
    TaskGenerator,
    as_augmented,
    max_pool_2x2_ceil,
)

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape) + 1).normal(size=shape))


def drawn_like(tree, seed=1, scale=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape)), tree)


def small_network(ways=3):
    return AugmentedCNN(ways=ways, filters=4, blocks=2, features=5)


def slow_of(network, x):
    return drawn_like(jax.eval_shape(network.init, jax.random.key(0), x)["params"], seed=2)


def run(network, slow, x, fast=None):
    """Return the network's outputs, computed by one compiled program."""
    return jax.jit(lambda slow, x, fast: network.apply({"params": slow}, x, fast))(slow, x, fast)


def test_augmentation_is_a_sum_of_activations_and_not_of_weights():
    def layer(slow, fast, activation=jax.nn.relu):
        dense = AugmentedDense(1, activation)
        return float(
            dense.apply(
                {"params": {"kernel": jnp.full((1, 1), slow)}},
                jnp.ones((1, 1)),
                {"kernel": jnp.full((1, 1), fast)},
            )[0, 0]
        )

    assert layer(1.0, -1.0) == 1.0
    assert layer(1.0, 1.0) == 2.0
    assert layer(1.0, -1.0, None) == 0.0


@pytest.mark.parametrize("activation", [None, jax.nn.relu])
def test_augmented_layers_match_their_formula(activation):
    a = (lambda h: h) if activation is None else activation
    x, w, v, t = normal(2, 5, 5, 3), normal(3, 3, 3, 4), normal(3, 3, 3, 4) ** 2 - 1, normal(3, 3, 3, 4)[::-1]
    layer = AugmentedConv(4, activation=activation)

    def plain(kernel):
        return a(
            jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )

    outputs = layer.apply({"params": {"kernel": w}}, x, {"kernel": v})
    np.testing.assert_allclose(outputs, plain(w) + plain(v), atol=1e-12)
    both = layer.apply({"params": {"kernel": w}}, x, ({"kernel": t}, {"kernel": v}))
    np.testing.assert_allclose(both, plain(w) + plain(t) + plain(v), atol=1e-12)

    h, w, v = normal(2, 3), normal(3, 4), normal(4, 3).T
    outputs = AugmentedDense(4, activation).apply({"params": {"kernel": w}}, h, {"kernel": v})
    np.testing.assert_allclose(outputs, a(h @ w) + a(h @ v), atol=1e-12)


def test_the_omniglot_network_has_as_many_weights_as_the_paper():
    x = jnp.ones((2, 28, 28, 1))
    shapes = jax.eval_shape(AugmentedCNN(ways=5).init, jax.random.key(0), x)["params"]
    sizes = {name: int(np.prod(layer["kernel"].shape)) for name, layer in shapes.items()}
    assert list(shapes) == ["conv_0", "conv_1", "conv_2", "conv_3", "conv_4", "fc", "head"]
    assert sum(size for name, size in sizes.items() if name.startswith("conv")) == 148_032
    assert sizes["fc"] + sizes["head"] == 4_416
    assert sum(sizes.values()) == 152_448
    assert all(set(layer) == {"kernel"} for layer in shapes.values())
    embedding = jax.eval_shape(AugmentedCNN().init_with_output, jax.random.key(0), x)
    assert embedding[0].shape == (2, 64)
    assert list(embedding[1]["params"]) == [name for name in shapes if name != "head"]


def test_weights_are_initialised_in_the_published_range():
    params = jax.jit(AugmentedCNN(ways=5).init)(jax.random.key(0), jnp.ones((2, 8, 8, 1)))["params"]
    weights = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    assert weights.min() >= -0.1
    assert weights.max() < 0.1
    np.testing.assert_allclose(weights.std(), 0.2 / np.sqrt(12), rtol=0.01)


@pytest.mark.parametrize("ways", [None, 3])
def test_zero_fast_weights_do_not_change_the_outputs(ways):
    network, x = small_network(ways), normal(3, 9, 9, 1)
    slow = slow_of(network, x)
    expected = run(network, slow, x)
    zero = jax.tree.map(np.zeros_like, slow)
    np.testing.assert_array_equal(run(network, slow, x, zero), expected)
    np.testing.assert_array_equal(run(network, slow, x, (zero, zero)), expected)
    assert np.abs(expected).max() > 0


def test_the_last_layer_is_linear_and_the_one_before_a_head_is_not():
    x = jnp.ones((1, 2))
    params = {"fc": {"kernel": -jnp.ones((2, 5))}, "head": {"kernel": jnp.ones((5, 3))}}
    network = AugmentedCNN(ways=3, blocks=0, features=5)
    np.testing.assert_array_equal(network.apply({"params": params}, x), 0)
    linear = {**params, "fc": {"kernel": jnp.ones((2, 5))}, "head": {"kernel": -jnp.ones((5, 3))}}
    np.testing.assert_array_equal(network.apply({"params": linear}, x), -10)
    embedding = AugmentedCNN(blocks=0, features=5)
    np.testing.assert_array_equal(embedding.apply({"params": {"fc": params["fc"]}}, x), -2)


def test_layers_missing_from_the_fast_weights_use_their_slow_weights_only():
    network, x = small_network(), normal(2, 8, 8, 1)
    slow = slow_of(network, x)
    fast = drawn_like(slow)
    partial = {"fc": fast["fc"]}
    filled = {name: fast[name] if name == "fc" else jax.tree.map(np.zeros_like, slow[name]) for name in slow}
    np.testing.assert_array_equal(run(network, slow, x, partial), run(network, slow, x, filled))


def test_vmap_over_fast_weights_equals_a_loop_in_outputs_and_gradients():
    network, x = small_network(), normal(4, 9, 9, 1)
    slow = slow_of(network, x)
    fasts = [drawn_like(slow, seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *fasts)

    def together(slow, stacked):
        return jax.vmap(lambda x, fast: network.apply({"params": slow}, x[None], fast)[0])(x, stacked)

    def loop(slow, stacked):
        fasts = [jax.tree.map(lambda leaf: leaf[i], stacked) for i in range(4)]  # noqa: B023
        return jnp.concatenate([network.apply({"params": slow}, x[i : i + 1], fasts[i]) for i in range(4)])

    def gradients_and_outputs(function):
        def loss(slow, stacked):
            outputs = function(slow, stacked)
            return jnp.square(outputs).sum(), outputs

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(slow, stacked)

    (actual, outputs), (expected, expected_outputs) = map(gradients_and_outputs, (together, loop))
    np.testing.assert_allclose(outputs, expected_outputs, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), actual, expected)


def test_pooling_keeps_the_last_odd_row_and_has_finite_gradients():
    x = normal(2, 5, 7, 3) - 10
    padded = np.full((2, 6, 8, 3), -np.inf)
    padded[:, :5, :7] = x
    expected = padded.reshape(2, 3, 2, 4, 2, 3).max((2, 4))
    np.testing.assert_array_equal(max_pool_2x2_ceil(x), expected)
    gradient = jax.jit(jax.grad(lambda x: max_pool_2x2_ceil(x).sum()))(x)
    assert set(np.unique(gradient)) == {0.0, 1.0}
    assert gradient.sum() == expected.size
    even = normal(1, 4, 4, 2)
    np.testing.assert_array_equal(max_pool_2x2_ceil(even), jm.nn.max_pool_2x2(even))


def generators():
    rng = np.random.default_rng(0)
    g = jnp.asarray(10.0 ** rng.uniform(-8, 1, size=(3, 12)) * rng.choice([-1, 1], size=(3, 12)))
    return [(TaskGenerator(4), g), (ExampleGenerator(4), g[0])]


def test_preprocessing_of_gradients_with_p_of_the_paper():
    features = jm.nn.log_and_sign(jnp.array([0, 1, -0.01, 1e-6]), TaskGenerator().preprocess)
    np.testing.assert_allclose(features, [[-1, 0, -0.657881, -1], [0, 1, -1, 0.00109663]], atol=1e-6)
    assert ExampleGenerator().preprocess == TaskGenerator().preprocess == 7.0


@pytest.mark.parametrize("which", [0, 1], ids=["task", "example"])
def test_generators_are_permutation_equivariant_and_do_not_mix_coordinates(which):
    generator, g = generators()[which]
    params = drawn_like(jax.eval_shape(generator.init, jax.random.key(0), g))
    apply = jax.jit(generator.apply)
    out = np.asarray(apply(params, g))
    assert out.shape == (12,)
    order = np.random.default_rng(3).permutation(12)
    np.testing.assert_allclose(apply(params, g[..., order]), out[order], atol=1e-14)
    jacobian = jax.jit(jax.jacrev(lambda g: generator.apply(params, g)))(g)
    between = np.asarray(jacobian if which else jacobian.sum(1))
    np.testing.assert_array_equal(between * (1 - np.eye(12)), 0)
    sizes = [
        jax.tree.map(
            jnp.shape,
            jax.eval_shape(
                generator.init, jax.random.key(0), jax.ShapeDtypeStruct((*g.shape[:-1], n), g.dtype)
            ),
        )
        for n in (1, 50)
    ]
    assert sizes[0] == sizes[1]


def test_generators_have_the_published_numbers_of_parameters():
    task, example = (
        jax.tree.map(lambda leaf: leaf.size, jax.eval_shape(generator.init, jax.random.key(0), x)["params"])
        for generator, x in ((TaskGenerator(), jnp.ones((1, 1))), (ExampleGenerator(), jnp.ones(1)))
    )
    assert task == {"lstm": {"kernel": 22 * 80, "bias": 80}, "output_kernel": 20, "output_bias": 1}
    assert sum(example.values()) == (2 * 20 + 20) + (20 * 20 + 20) + (20 + 1)


@pytest.mark.parametrize("which", [0, 1], ids=["task", "example"])
def test_generators_with_a_zero_last_layer_generate_zeros(which):
    generator, g = generators()[which]
    params = drawn_like(jax.eval_shape(generator.init, jax.random.key(0), g)["params"])
    params = params | {"output_kernel": jnp.zeros((4, 1)), "output_bias": jnp.zeros(1)}
    np.testing.assert_array_equal(jax.jit(generator.apply)({"params": params}, g), 0)


def test_masked_steps_change_no_output():
    generator, g = generators()[0]
    params = drawn_like(jax.eval_shape(generator.init, jax.random.key(0), g))
    apply = jax.jit(generator.apply)
    masked = apply(params, g, jnp.array([True, False, True]))
    np.testing.assert_allclose(masked, apply(params, g[::2]), atol=1e-14)
    assert np.abs(apply(params, g) - apply(params, g[::-1])).max() > 1e-3


def test_fast_weights_of_another_shape_are_refused():
    x = jnp.ones((2, 3))
    layer = AugmentedDense(4)
    with pytest.raises(ValueError, match=r"fast: got a kernel of shape \(2, 3, 4\) .* has \(3, 4\)"):
        layer.apply(layer.init(jax.random.key(0), x), x, {"kernel": jnp.ones((2, 3, 4))})


class Counting(linen.Module):
    @linen.compact
    def __call__(self, x, fast=None):
        self.variable("counts", "calls", lambda: jnp.zeros(()))
        return AugmentedDense(2)(x)


def test_networks_that_take_no_fast_weights_are_refused():
    with pytest.raises(ValueError, match=r"base: got MLP, whose call takes no `fast`"):
        as_augmented(jm.nn.MLP(out=3), "base")
    with pytest.raises(ValueError, match=r"network: got Model, whose call takes no `fast`"):
        as_augmented(jm.nn.as_model(jm.nn.MLP(out=3)))
    with pytest.raises(ValueError, match=r"network: got int, whose"):
        as_augmented(3)
    with pytest.raises(ValueError, match=r"embedding: got Counting, which keeps \['counts', 'params'\]"):
        as_augmented(Counting(), "embedding").init(jax.random.key(0), jnp.ones((1, 3)))
    functions = Augmented(lambda key, x: {}, lambda params, x, fast=None: x)
    assert as_augmented(functions) == functions
