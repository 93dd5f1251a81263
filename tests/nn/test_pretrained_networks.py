"""Tests of ResNet and ViT; tests/transfer compares their outputs with PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import jaxmeta as jm
from jaxmeta.nn.residual import max_pool_3x3

KEY = jax.random.key(0)
TINY_VIT = {"patch": 4, "width": 8, "depth": 2, "heads": 2, "mlp": 16, "image_size": 8}


def tiny_resnet(ways=None, **settings):
    return jm.nn.ResNet(ways, **{"depths": (1, 1), "channels": (4, 8), "stem": 4, **settings})


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize(
    ("network", "side", "parameters"),
    [
        (jm.nn.ResNet18(1000), 64, 11_689_512),
        (jm.nn.ResNet34(1000), 64, 21_797_672),
        (jm.nn.ResNet50(1000), 64, 25_557_032),
        (jm.nn.ResNet50(), 64, 23_508_032),
        (jm.nn.ViT(ways=1000), 224, 86_567_656),
        (jm.nn.ViT(width=192, heads=3, mlp=768, ways=1000), 224, 5_717_416),
    ],
)
def test_parameter_counts_match_the_published_ones(network, side, parameters):
    variables = jax.eval_shape(network.init, KEY, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (1, 2),
        pytest.param(3, 4, marks=pytest.mark.nightly),
        pytest.param(7, 8, marks=pytest.mark.nightly),
        (6, 5),
    ],
)
def test_max_pooling_and_its_gradient_equal_those_of_flax(height, width):
    def theirs(x):
        return linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    @jax.jit
    def run(x):
        ours, vjp = jax.vjp(max_pool_3x3, x)
        expected, their_vjp = jax.vjp(theirs, x)
        return (ours, *vjp(expected)), (expected, *their_vjp(expected))

    jax.tree.map(np.testing.assert_array_equal, *run(noise(2, height, width, 3)))


@pytest.mark.parametrize("bottleneck", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_resnet_normalises_by_the_batch_or_by_given_statistics(bottleneck):
    network = tiny_resnet(3, bottleneck=bottleneck)
    x, other = noise(4, 33, 32, 3), noise(4, 33, 32, 3, seed=1)
    apply = jax.jit(lambda variables, x: network.apply(variables, x, mutable=["batch_stats"]))
    params = jax.jit(network.init)(KEY, x)["params"]
    by_batch, state = apply({"params": params}, x)
    variables = {"params": params, **state}
    np.testing.assert_allclose(apply(variables, x)[0], by_batch, rtol=1e-4, atol=1e-5)
    # With given statistics, the outputs of an image do not depend on the other images.
    replaced = other.at[1:].set(0)
    np.testing.assert_allclose(
        apply(variables, other)[0][0], apply(variables, replaced)[0][0], rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(apply(variables, other)[0], apply({"params": params}, other)[0], atol=1e-3)


@pytest.mark.nightly
def test_padding_changes_no_resnet_output():
    model = jm.nn.as_model(tiny_resnet(3))
    x = noise(3, 32, 32, 3)
    params = jax.jit(model.init)(KEY, x)
    mask = jnp.array([True, True, True, False])
    padded, _ = jax.jit(model.apply_norm)(params, jnp.concatenate([x, 100 * x[:1]]), mask=mask)
    np.testing.assert_allclose(padded[:3], jax.jit(model.apply)(params, x), rtol=1e-4, atol=1e-5)
    assert model.divisible


@pytest.mark.parametrize("channels", [(4,), pytest.param((4, 8), marks=pytest.mark.nightly)])
def test_maml_gradient_through_a_resnet_matches_finite_differences(channels, x64):
    network = tiny_resnet(2, depths=(1,) * len(channels), channels=channels)
    learner = jm.maml(jm.nn.as_model(network), inner_optimizer=optax.sgd(0.1), inner_steps=1)
    x = noise(8, 16, 16, 1)
    y = jnp.arange(8) % 2
    task = jm.Task(jm.Batch(x[:4], y[:4], ways=2), jm.Batch(x[4:], y[4:], ways=2))
    params = jax.jit(learner.init)(KEY, task)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)

    @jax.jit
    @jax.value_and_grad
    def loss(step):
        moved = jax.tree.map(lambda leaf, change: leaf + step * change, params, direction)
        return learner.loss(moved, task, KEY)[0]

    epsilon = 1e-6
    slope = (loss(epsilon)[0] - loss(-epsilon)[0]) / (2 * epsilon)
    np.testing.assert_allclose(loss(0.0)[1], slope, rtol=1e-5)
    assert abs(slope) > 1e-2


def test_depths_and_channels_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"channels: got \(4, 8\).*\(1, 1, 1\)"):
        tiny_resnet(depths=(1, 1, 1)).init(KEY, jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize(
    ("settings", "side", "message"),
    [
        ({}, 12, "x: got images of 12×12, but position_embedding is for 8×8"),
        ({"heads": 3}, 8, "heads: got 3; it must divide the width, 8"),
        ({"image_size": 10}, 10, "image_size: got 10×10; patches of 4 must tile it"),
        ({"pooling": "max"}, 8, "pooling: got 'max'; it must be one of 'cls', 'mean'"),
    ],
)
def test_invalid_vit_settings_are_refused(settings, side, message):
    with pytest.raises(ValueError, match=message):
        jm.nn.ViT(**{**TINY_VIT, **settings}).init(KEY, jnp.zeros((1, side, side, 3)))


@pytest.mark.nightly
def test_vit_dropout_needs_a_key():
    x = noise(2, 8, 12, 3)
    network = jm.nn.ViT(**{**TINY_VIT, "image_size": (8, 12), "dropout": 0.5, "ways": 3})
    model = jm.nn.as_model(network)
    params = jax.jit(model.init)(KEY, x)
    plain = jax.jit(network.clone(dropout=0.0).apply)({"params": params}, x)
    apply = jax.jit(lambda key: model.apply(params, x, key=key))
    np.testing.assert_allclose(apply(None), plain, atol=1e-5)
    dropped = [apply(jax.random.key(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert all(not np.allclose(dropped[0], other, atol=1e-3) for other in (plain, dropped[2]))


@pytest.mark.nightly
def test_patch_order_changes_no_output_without_position_embeddings():
    network = jm.nn.ViT(**TINY_VIT, pooling="mean")
    x = noise(2, 8, 8, 3)
    apply = jax.jit(network.apply)
    params = jax.jit(network.init)(KEY, x)["params"]
    swapped = jnp.concatenate([x[:, 4:], x[:, :4]], 1)
    without = params | {"position_embedding": jnp.zeros_like(params["position_embedding"])}
    outputs = [[apply({"params": p}, images) for images in (x, swapped)] for p in (without, params)]
    np.testing.assert_allclose(*outputs[0], atol=1e-5)
    assert not np.allclose(*outputs[1], atol=1e-3)


@pytest.mark.parametrize(
    "grid",
    [
        pytest.param((3, 3), marks=pytest.mark.nightly),
        (9, 6),
        pytest.param((4, 8), marks=pytest.mark.nightly),
    ],
)
def test_resized_positions_match_torch(grid):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    positions = np.random.default_rng(0).normal(size=(1, 1 + 6 * 6, 5)).astype(np.float32)
    old = torch.tensor(positions[:, 1:]).reshape(1, 6, 6, 5).permute(0, 3, 1, 2)
    # The interpolation of timm's `resample_abs_pos_embed`.
    new = torch.nn.functional.interpolate(old, size=grid, mode="bicubic", antialias=True)
    resized = jm.nn.resize_positions(jnp.asarray(positions), grid)
    np.testing.assert_array_equal(resized[:, :1], positions[:, :1])
    np.testing.assert_allclose(resized[:, 1:], new.permute(0, 2, 3, 1).reshape(1, -1, 5), atol=1e-5)


def test_resizing_positions_of_a_rectangular_grid_needs_old_grid():
    positions = noise(1, 1 + 2 * 3, 4)
    with pytest.raises(ValueError, match="6 patches; a grid of 2×2 has 4; pass the grid as old_grid"):
        jm.nn.resize_positions(positions, (4, 6))
    assert jm.nn.resize_positions(positions, (2, 3), (2, 3)) is positions
    assert jm.nn.resize_positions(positions, (4, 6), (2, 3)).shape == (1, 25, 4)


# --- SqueezeNet -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(2, 3), (4, 5), (9, 6)])
def test_pooling_in_ceil_mode_equals_torch(height, width):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    pooled = torch.nn.functional.max_pool2d(torch.tensor(x).permute(0, 3, 1, 2), 3, 2, ceil_mode=True)
    np.testing.assert_array_equal(max_pool_3x3(jnp.asarray(x), ceil_mode=True), pooled.permute(0, 2, 3, 1))


@pytest.mark.parametrize("classifier", ["linear", "convolution"])
def test_squeezenet_has_the_published_number_of_parameters(classifier):
    x = jax.ShapeDtypeStruct((1, 17, 17, 3), jnp.float32)
    variables = jax.eval_shape(jm.nn.SqueezeNet(1000, classifier=classifier).init, KEY, x)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 1_235_496
    headless = jax.eval_shape(jm.nn.SqueezeNet().init, KEY, x)
    assert sum(leaf.size for leaf in jax.tree.leaves(headless)) == 722_496


def test_invalid_settings_and_images_of_squeezenet_are_refused():
    with pytest.raises(ValueError, match="x: got images of 16×40; they must be at least 17×17"):
        jax.eval_shape(jm.nn.SqueezeNet().init, KEY, jnp.zeros((1, 16, 40, 3)))
    with pytest.raises(ValueError, match="classifier: got 'mlp'; it must be one of 'linear', 'convolution'"):
        jax.eval_shape(jm.nn.SqueezeNet(classifier="mlp").init, KEY, jnp.zeros((1, 17, 17, 3)))


@pytest.mark.nightly
def test_squeezenet_applies_dropout_only_when_not_deterministic():
    x = noise(2, 17, 17, 3)
    network = jm.nn.SqueezeNet(4, classifier="convolution", dropout=0.5)
    variables = jax.jit(network.init)(KEY, x)
    expected = jax.jit(network.clone(dropout=0.0).apply)(variables, x)
    np.testing.assert_array_equal(jax.jit(network.apply)(variables, x), expected)
    apply = jax.jit(lambda key: network.apply(variables, x, deterministic=False, rngs={"dropout": key}))
    assert not np.allclose(apply(KEY), expected)
