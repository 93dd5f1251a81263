"""The published networks, batch normalisation and pooling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax

import jaxmeta as jm
from jaxmeta.nn.embedding import ConvNorm
from jaxmeta.nn.norm import STATISTICS, from_moments, moments, to_moments


@pytest.mark.parametrize(
    ("network", "image", "width", "count"),
    [
        (jm.nn.Conv4(), (28, 28, 1), 64, 111_936),
        (jm.nn.Conv4(), (84, 84, 3), 1600, 113_088),
        (jm.nn.Conv4(ways=5, filters=32), (84, 84, 3), 5, 32_901),
        (jm.nn.StridedConv4(ways=5, use_scale=False), (28, 28, 1), 5, 112_005),
        (jm.nn.StridedConv4(ways=5), (28, 28, 1), 5, 112_261),
        (jm.nn.StridedConv4(), (28, 28, 1), 64, 112_261 - 65 * 5),
        (jm.nn.StridedConv4(flatten=True), (28, 28, 1), 256, 112_261 - 65 * 5),
        (jm.nn.MLP(out=1), (1,), 1, 1_761),
        (jm.nn.MLP(out=5, hidden=(256, 128, 64, 64), norm=True), (28, 28, 1), 5, 247_621),
    ],
)
def test_widths_and_parameter_counts(network, image, width, count):
    model = jm.nn.as_model(network)
    x = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    assert jax.eval_shape(model.apply, params, x).shape == (2, width)


def test_mlp_of_sinusoids_starts_as_the_paper_s():
    params = jm.nn.as_model(jm.nn.MLP(out=1)).init(jax.random.key(0), jnp.zeros((1, 1)))
    for layer in params.values():
        np.testing.assert_array_equal(layer["bias"], 0)
    # Standard deviation 0.01 before it is truncated at 0.02, which leaves 0.0088, as in TensorFlow.
    kernel = params["Dense_1"]["kernel"]
    assert kernel.std() == pytest.approx(0.0088, rel=0.05)
    assert 0.018 < np.abs(kernel).max() <= 0.02


def test_conv4_pools_after_the_relu(x64):
    """Against the published order of its block: convolution with bias, normalisation, ReLU, pooling."""
    x = jax.random.normal(jax.random.key(0), (3, 17, 16, 2))
    model = jm.nn.as_model(jm.nn.Conv4(filters=4))
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
        jax.jit(model.init)(jax.random.key(1), x),
    )
    expected = x
    for i in range(4):
        block = params[f"ConvNorm_{i}"]
        expected = linen.Conv(4, (3, 3)).apply(
            {"params": {"kernel": block["conv"]["kernel"], "bias": block["bias"]}}, expected
        )
        mean, var = expected.mean((0, 1, 2), keepdims=True), expected.var((0, 1, 2), keepdims=True)
        scale, bias = (block["norm"][name][None, None, None] for name in ("scale", "bias"))
        expected = jax.nn.relu(scale * (expected - mean) / jnp.sqrt(var + 1e-3) + bias)
        expected = linen.max_pool(expected, (2, 2), (2, 2))
    np.testing.assert_allclose(jax.jit(model.apply)(params, x), expected.reshape(3, -1), atol=1e-10)


# --- Batch normalisation ---------------------------------------------------------------------------


def batch_norm(x, params, mean, var):
    params = jax.tree.map(np.asarray, params)
    return params["scale"] * (x - mean) / np.sqrt(var + 1e-3) + params["bias"]


@pytest.mark.parametrize("spatial", [(), (3, 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_batch_norm_is_the_formula(spatial, masked, offset, x64):
    rng = np.random.default_rng(0)
    x = rng.normal(2.0, 3.0, size=(6, *spatial, 4))
    params = {"scale": rng.normal(size=4), "bias": rng.normal(size=4)}
    shift = rng.normal(size=4) if offset else np.zeros(4)
    mask = np.arange(6) % 3 != 2 if masked else np.ones(6, bool)
    real = (x + shift)[mask]
    axes = tuple(range(real.ndim - 1))
    mean, var = real.mean(axes), real.var(axes)
    expected = batch_norm(x + shift, params, mean, var)
    layer = jm.nn.BatchNorm()
    arguments = (jnp.asarray(x), jnp.asarray(mask) if masked else None, jnp.asarray(shift) if offset else 0.0)
    params = jax.tree.map(jnp.asarray, params)
    outputs, state = layer.apply({"params": params}, *arguments, mutable=[STATISTICS])
    np.testing.assert_allclose(outputs, expected, atol=1e-12)
    np.testing.assert_allclose(state[STATISTICS]["mean"], mean, atol=1e-12)
    np.testing.assert_allclose(state[STATISTICS]["var"], var, atol=1e-12)
    np.testing.assert_allclose(layer.apply({"params": params}, *arguments), expected, atol=1e-12)
    # Statistics handed in are those of the inputs WITH the offset, and win over the batch's.
    handed = {"mean": jnp.asarray(mean) + 1, "var": 2 * jnp.asarray(var)}
    np.testing.assert_allclose(
        layer.apply({"params": params, STATISTICS: handed}, *arguments),
        batch_norm(x + shift, params, mean + 1, 2 * var),
        atol=1e-12,
    )


@pytest.mark.parametrize("shape", [(5, 4, 6, 3), (5, 5, 7, 3)])
def test_pooling_within_normalisation_is_pooling_after_it(shape, x64):
    """To the second derivative; a channel may be turned around by its scale, or be all one number."""
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(size=s)) for s in (shape, (5, shape[1] // 2, shape[2] // 2, 3)))
    layer = jm.nn.BatchNorm()
    params = {"scale": jnp.array([1.5, -0.7, 0.0]), "bias": jnp.array([0.1, -0.2, 0.3])}

    def within(params, x):
        return layer.apply({"params": params}, x, pool=jm.nn.max_pool_2x2)

    def after(params, x):
        return jm.nn.max_pool_2x2(layer.apply({"params": params}, x))

    def slopes(function, params, x):
        gradient = jax.grad(lambda p, x: jnp.sin(function(p, x) * weights).sum(), (0, 1))
        return gradient(params, x), jax.jvp(gradient, (params, x), (params, jnp.cos(x)))[1]

    np.testing.assert_allclose(within(params, x), after(params, x), atol=1e-12)
    # Where the scale is 0 all places are equal, and which one takes the gradient is anybody's choice.
    params = params | {"scale": params["scale"].at[2].set(1e-3)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10),
        slopes(within, params, x),
        slopes(after, params, x),
    )


def test_batch_norm_without_scale_or_bias():
    x = jnp.arange(8.0).reshape(4, 2)
    assert set(jm.nn.BatchNorm(use_scale=False).init(jax.random.key(0), x)["params"]) == {"bias"}
    assert jm.nn.BatchNorm(use_scale=False, use_bias=False).init(jax.random.key(0), x) == {}


def test_a_constant_channel_has_no_variance_below_zero():
    x = jnp.full((7, 3), 0.1) * 1e3
    assert moments(x)[1].min() >= 0
    assert np.isfinite(jax.grad(lambda x: moments(x)[1].sum())(x)).all()


def test_moments_and_statistics_are_inverse():
    rng = np.random.default_rng(0)
    stats = {
        "outer": {"norm": {"mean": rng.normal(size=3), "var": rng.uniform(size=3)}},
        "mean": {"mean": rng.normal(size=2), "var": rng.uniform(size=2)},  # a module of that name
    }
    means = to_moments(stats)
    np.testing.assert_allclose(
        means["outer"]["norm"]["mean_of_squares"],
        stats["outer"]["norm"]["var"] + stats["outer"]["norm"]["mean"] ** 2,
    )
    back = from_moments(means)
    assert jax.tree.structure(back) == jax.tree.structure(stats)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), back, stats)


def test_padding_of_any_value_leaves_a_block_as_it_was(x64):
    x = jax.random.normal(jax.random.key(0), (5, 6, 6, 2))
    mask = jnp.array([True, False, True, True, False])
    model = jm.nn.as_model(ConvNorm(3))
    params = model.init(jax.random.key(1), x)
    outputs, stats = model.apply_norm(params, x[mask])
    padded, padded_stats = model.apply_norm(params, jnp.where(mask[:, None, None, None], x, 1e6), mask=mask)
    np.testing.assert_allclose(padded[mask], outputs, atol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), padded_stats, stats)


# --- Pooling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (2, 3), (3, 2)])
def test_max_pool_is_a_window_maximum_to_the_second_derivative(size, x64):
    x, dx = jax.random.normal(jax.random.key(0), (2, 2, *size, 3))

    def reference(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def derivatives(pool):
        gradient = jax.grad(lambda x: jnp.sin(pool(x)).sum())
        return (
            pool(x),
            gradient(x),
            jax.jvp(pool, (x,), (dx,))[1],
            jax.jvp(gradient, (x,), (dx,))[1],
            jax.grad(lambda x: jnp.vdot(gradient(x), dx))(x),
        )

    ours = jax.jit(lambda: derivatives(jm.nn.max_pool_2x2))()
    theirs = jax.jit(lambda: derivatives(reference))()
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_of_equal_maxima_the_first_takes_the_gradient():
    x = jnp.array([[1.0, 1.0], [1.0, 1.0]])[None, :, :, None]
    gradient = jax.grad(lambda x: jm.nn.max_pool_2x2(x).sum())(x)
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[1, 0], [0, 0]])
