"""Tests of the published networks, batch normalisation and pooling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax

import jaxmeta as jm
from jaxmeta.nn.embedding import ConvNorm
from jaxmeta.nn.norm import STATISTICS, from_moments, moments, to_moments


@pytest.mark.nightly_rows(after=5)
@pytest.mark.parametrize(
    ("network", "image", "width", "count"),
    [
        (jm.nn.Conv4(), (28, 28, 1), 64, 111_936),
        (jm.nn.Conv4(), (84, 84, 3), 1600, 113_088),
        (jm.nn.Conv4(ways=5, filters=32), (84, 84, 3), 5, 32_901),
        (jm.nn.Conv4(blocks=3, padding="VALID"), (28, 28, 1), 64, 111_936 - 64 * (9 * 64 + 3)),
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


@pytest.mark.parametrize(
    ("blocks", "padding", "least"), [(4, "SAME", 16), (1, "SAME", 2), (1, "VALID", 4), (3, "VALID", 22)]
)
def test_the_smallest_images_of_conv4_end_as_one_pixel(blocks, padding, least):
    network = jm.nn.Conv4(filters=3, blocks=blocks, padding=padding)

    def features(size):
        x = jax.ShapeDtypeStruct((2, size, size + 1, 1), jnp.float32)
        return jax.eval_shape(network.init_with_output, jax.random.key(0), x)[0].shape

    assert features(least) == (2, 3)
    with pytest.raises(ValueError, match=f"got images of {least - 1}×{least}; .* at least {least}×{least}"):
        features(least - 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 0}, "blocks: got 0; it must be at least 1"),
        ({"padding": "valid"}, "padding: got 'valid'; it must be one of 'SAME', 'VALID'"),
    ],
)
def test_conv4_refuses_unknown_blocks_and_padding(settings, message):
    with pytest.raises(ValueError, match=message):
        jm.nn.Conv4(**settings)


def test_sinusoid_mlp_has_the_published_initialisation():
    params = jax.jit(jm.nn.as_model(jm.nn.MLP(out=1)).init)(jax.random.key(0), jnp.zeros((1, 1)))
    params = jax.tree.map(np.asarray, params)
    for layer in params.values():
        np.testing.assert_array_equal(layer["bias"], 0)
    # A normal distribution of standard deviation 0.01, truncated at 0.02, has standard deviation 0.0088.
    kernel = params["Dense_1"]["kernel"]
    assert kernel.std() == pytest.approx(0.0088, rel=0.05)
    assert 0.018 < np.abs(kernel).max() <= 0.02


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"blocks": 2, "padding": "VALID"}, marks=pytest.mark.nightly)]
)
def test_conv4_pools_after_the_relu(settings, x64):
    """Compare with the published order: convolution with bias, normalisation, ReLU, pooling."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 17, 16, 2))
    network = jm.nn.Conv4(filters=4, **settings)
    model = jm.nn.as_model(network)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.3 * rng.normal(size=leaf.shape),
        jax.jit(model.init)(jax.random.key(1), x),
    )

    @jax.jit
    def published(params, x):
        for i in range(network.blocks):
            block = params[f"ConvNorm_{i}"]
            layer = {"kernel": block["conv"]["kernel"], "bias": block["bias"]}
            x = linen.Conv(4, (3, 3), padding=network.padding).apply({"params": layer}, x)
            mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
            scale, bias = (block["norm"][name][None, None, None] for name in ("scale", "bias"))
            x = jax.nn.relu(scale * (x - mean) / jnp.sqrt(var + 1e-3) + bias)
            x = linen.max_pool(x, (2, 2), (2, 2))
        return x.reshape(3, -1)

    np.testing.assert_allclose(jax.jit(model.apply)(params, x), published(params, x), atol=1e-10)


# --- Batch normalisation ---------------------------------------------------------------------------


def batch_norm(x, params, mean, var):
    params = jax.tree.map(np.asarray, params)
    return params["scale"] * (x - mean) / np.sqrt(var + 1e-3) + params["bias"]


@pytest.mark.parametrize("spatial", [(), (3, 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_batch_norm_matches_the_formula(spatial, masked, offset, x64):
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
    others = (jnp.asarray(mask) if masked else None, jnp.asarray(shift) if offset else 0.0)
    params = jax.tree.map(jnp.asarray, params)
    # Given statistics are those of the inputs with the offset, and replace those of the batch.
    statistics = {"mean": mean + 1, "var": 2 * var}

    @jax.jit
    def run(params, statistics, x):
        return (
            layer.apply({"params": params}, x, *others, mutable=[STATISTICS]),
            layer.apply({"params": params}, x, *others),
            layer.apply({"params": params, STATISTICS: statistics}, x, *others),
        )

    (outputs, state), immutable, normalised_by_given = run(params, statistics, x)
    np.testing.assert_allclose(outputs, expected, atol=1e-12)
    np.testing.assert_allclose(state[STATISTICS]["mean"], mean, atol=1e-12)
    np.testing.assert_allclose(state[STATISTICS]["var"], var, atol=1e-12)
    np.testing.assert_allclose(immutable, expected, atol=1e-12)
    expected = batch_norm(x + shift, params, mean + 1, 2 * var)
    np.testing.assert_allclose(normalised_by_given, expected, atol=1e-12)


@pytest.mark.parametrize("shape", [pytest.param((5, 4, 6, 3), marks=pytest.mark.nightly), (5, 5, 7, 3)])
def test_pooling_within_normalisation_is_pooling_after_it(shape, x64):
    # Up to second derivatives. A negative scale reverses the order of a channel's values; a scale of 0 makes
    # them equal.
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(size=s)) for s in (shape, (5, shape[1] // 2, shape[2] // 2, 3)))
    layer = jm.nn.BatchNorm()
    params = {"scale": jnp.array([1.5, -0.7, 0.0]), "bias": jnp.array([0.1, -0.2, 0.3])}

    def within(params, x):
        return layer.apply({"params": params}, x, pool=jm.nn.max_pool_2x2)

    def after(params, x):
        return jm.nn.max_pool_2x2(layer.apply({"params": params}, x))

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, params, x):
        gradient = jax.grad(lambda p, x: jnp.sin(function(p, x) * weights).sum(), (0, 1))
        slopes = gradient(params, x), jax.jvp(gradient, (params, x), (params, jnp.cos(x)))[1]
        return function(params, x), slopes

    np.testing.assert_allclose(run(within, params, x)[0], run(after, params, x)[0], atol=1e-12)
    # Derivatives are compared with a small scale instead of 0, because equal values may share a gradient in
    # different ways.
    params = params | {"scale": jnp.array([1.5, -0.7, 1e-3])}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10),
        run(within, params, x)[1],
        run(after, params, x)[1],
    )


def test_batch_norm_without_scale_or_bias():
    x = jnp.arange(8.0).reshape(4, 2)
    assert set(jm.nn.BatchNorm(use_scale=False).init(jax.random.key(0), x)["params"]) == {"bias"}
    assert jm.nn.BatchNorm(use_scale=False, use_bias=False).init(jax.random.key(0), x) == {}


def test_variance_of_a_constant_channel_is_not_negative():
    x = jnp.full((7, 3), 0.1) * 1e3
    assert moments(x)[1].min() >= 0
    assert np.isfinite(jax.jit(jax.grad(lambda x: moments(x)[1].sum()))(x)).all()


def test_from_moments_inverts_to_moments():
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


def test_padding_changes_no_output_or_statistic_of_a_block(x64):
    x = np.random.default_rng(0).normal(size=(5, 6, 6, 2))
    mask = np.array([True, False, True, True, False])
    model = jm.nn.as_model(ConvNorm(3))
    params = jax.jit(model.init)(jax.random.key(1), x)
    apply_norm = jax.jit(model.apply_norm)
    outputs, stats = apply_norm(params, x[mask])
    padded, padded_stats = apply_norm(params, np.where(mask[:, None, None, None], x, 1e6), mask=mask)
    padded = np.asarray(padded)
    np.testing.assert_allclose(padded[mask], outputs, atol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), padded_stats, stats)


# --- Pooling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [
        pytest.param((4, 6), marks=pytest.mark.nightly),
        (5, 7),
        (2, 3),
        pytest.param((3, 2), marks=pytest.mark.nightly),
    ],
)
def test_max_pool_is_a_window_maximum_up_to_second_derivatives(size, x64):
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


def test_first_of_equal_maxima_takes_the_gradient():
    x = jnp.array([[1.0, 1.0], [1.0, 1.0]])[None, :, :, None]
    gradient = jax.jit(jax.grad(lambda x: jm.nn.max_pool_2x2(x).sum()))(x)
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[1, 0], [0, 0]])


def test_identity_returns_features_as_vectors_and_has_no_parameters(x64):
    model = jm.nn.as_model(jm.nn.Identity())
    x = np.random.default_rng(0).normal(size=(4, 2, 3))
    params = model.init(jax.random.key(0), jnp.asarray(x))
    assert jax.tree.leaves(params) == []
    np.testing.assert_array_equal(model.apply(params, jnp.asarray(x)), x.reshape(4, 6))
    tasks = jm.tasks.from_arrays(
        np.repeat(np.eye(4, dtype=np.float32), 3, axis=0),
        np.repeat(np.arange(4), 3),
        ways=2,
        shots=1,
        queries=2,
    )
    learner = jm.prototypical(jm.nn.Identity())
    params = learner.init(jax.random.key(0), tasks.sample(jax.random.key(1)))
    assert jm.evaluate(learner, params, tasks, episodes=3, key=jax.random.key(2)).mean == 1
