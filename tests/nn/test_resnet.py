"""Tests of ResNet-12 against PyTorch, and of DropBlock against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmeta as jm
from jaxmeta.nn.resnet import ResidualBlock, drop_block

WAYS = 3
KEY = jax.random.key(0)


def torch_resnet12(channels, ways=None):
    """Build ResNet-12 as in MetaOptNet's code."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            sizes = (inputs, outputs, outputs)
            self.convs = nn.ModuleList(nn.Conv2d(i, outputs, 3, padding=1, bias=False) for i in sizes)
            self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in sizes)
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )
            self.relu, self.pool = nn.LeakyReLU(0.1), nn.MaxPool2d(2)

        def forward(self, x):
            out = self.relu(self.norms[0](self.convs[0](x)))
            out = self.relu(self.norms[1](self.convs[1](out)))
            out = self.norms[2](self.convs[2](out)) + self.downsample(x)
            return self.pool(self.relu(out))

    blocks = [Block(*pair) for pair in zip((3, *channels), channels, strict=False)]
    head = [] if ways is None else [nn.Linear(channels[-1], ways)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head).to(torch.float64)


def torch_tensors(network):
    """Return a dict from our parameters' paths to (torch parameter, axes that transpose ours into it)."""
    *blocks, _, _, head = network
    tensors = {("head", "kernel"): (head.weight, (1, 0)), ("head", "bias"): (head.bias, (0,))}
    for i, block in enumerate(blocks):
        pairs = zip(block.convs, block.norms, strict=True)
        layers = [(f"layer{j}", *pair) for j, pair in enumerate(pairs)]
        for name, conv, norm in [*layers, ("shortcut", *block.downsample)]:
            tensors[f"block{i}", f"{name}_conv", "kernel"] = conv.weight, (3, 2, 0, 1)
            tensors[f"block{i}", f"{name}_norm", "scale"] = norm.weight, (0,)
            tensors[f"block{i}", f"{name}_norm", "bias"] = norm.bias, (0,)
    return tensors


def path_of(keys):
    return tuple(key.key for key in keys)


@pytest.mark.nightly
def test_outputs_and_gradients_match_those_of_torch(x64):
    torch = pytest.importorskip("torch")
    channels = (4, 3, 5, 6)
    rng = np.random.default_rng(0)
    # 19×17 gives maps with odd sides: it shrinks to 9×8, 4×4, 2×2 and 1×1.
    x, weights = rng.normal(size=(3, 19, 17, 3)), rng.normal(size=(3, WAYS))
    theirs = torch_resnet12(channels, WAYS)
    tensors = torch_tensors(theirs)
    model = jm.nn.as_model(jm.nn.ResNet12(WAYS, channels))
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.2, 1) * rng.normal(size=leaf.shape)),
        jax.eval_shape(model.init, KEY, jnp.asarray(x)),
    )
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert set(leaves) == set(tensors)
    with torch.no_grad():
        for path, (tensor, axes) in tensors.items():
            tensor.copy_(torch.tensor(np.transpose(leaves[path], axes)))
    outputs = theirs(torch.tensor(x).permute(0, 3, 1, 2))
    (outputs * torch.tensor(weights)).sum().backward()

    def loss(params):
        outputs = model.apply(params, jnp.asarray(x))
        return jnp.vdot(outputs, jnp.asarray(weights)), outputs

    gradient, our_outputs = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(our_outputs, outputs.detach().numpy(), rtol=1e-9)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        tensor, axes = tensors[path_of(path)]
        np.testing.assert_allclose(
            np.transpose(leaf, axes), tensor.grad.numpy(), atol=1e-9, err_msg=str(path_of(path))
        )


def test_widths_and_parameter_counts():
    theirs = torch_resnet12((64, 160, 320, 640))
    assert sum(tensor.numel() for tensor in theirs.parameters()) == 12_424_320
    x = jax.ShapeDtypeStruct((2, 84, 84, 3), jnp.float32)
    for ways, width, extra in ((None, 640, 0), (5, 5, 641 * 5)):
        model = jm.nn.as_model(jm.nn.ResNet12(ways))
        params = jax.eval_shape(model.init, KEY, x)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 12_424_320 + extra
        assert jax.eval_shape(model.apply, params, x).shape == (2, width)


def test_convolutions_are_initialised_by_fan_out():
    params = jax.jit(ResidualBlock(64, 0.0, None).init)(KEY, jnp.zeros((1, 2, 2, 8)))["params"]
    for name, size in (("layer0", 3), ("layer1", 3), ("shortcut", 1)):
        kernel = params[f"{name}_conv"]["kernel"]
        assert kernel.std() == pytest.approx(np.sqrt(2 / (size**2 * 64)), rel=0.1)
    # The distribution is not truncated.
    assert np.abs(params["layer1_conv"]["kernel"]).max() > 3 * params["layer1_conv"]["kernel"].std()


@pytest.mark.nightly
@pytest.mark.parametrize("channels", [(2,), (2, 3, 2)])
def test_maml_gradient_reaches_every_parameter_and_loss_depends_on_the_key(channels, x64):
    rng = np.random.default_rng(0)
    labels = jnp.asarray(np.tile(np.arange(WAYS, dtype=np.int32), 2))
    task = jm.Task(
        *(jm.Batch(jnp.asarray(rng.normal(size=(6, 8, 8, 3))), labels, ways=WAYS) for _ in range(2))
    )
    learner = jm.maml(jm.nn.ResNet12(WAYS, channels=channels, drop_rate=0.1))
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), jax.eval_shape(learner.init, KEY, task)
    )
    loss = jax.jit(jax.value_and_grad(lambda params, key: learner.loss(params, task, key)[0]))
    value, gradient = loss(params, KEY)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 1e-6, path
    assert loss(params, KEY)[0] == value
    assert loss(params, jax.random.key(1))[0] != value


@pytest.mark.parametrize("channels", [(2, 2), pytest.param((2, 2, 2), marks=pytest.mark.nightly)])
def test_drop_block_needs_a_key(channels):
    x = jax.random.normal(KEY, (4, 16, 16, 3))
    plain, dropping = (
        jm.nn.as_model(jm.nn.ResNet12(channels=channels, drop_rate=rate)) for rate in (0.0, 0.5)
    )
    params = jax.jit(plain.init)(KEY, x)

    @jax.jit
    def run(params, x):
        return (
            plain.apply(params, x),
            dropping.apply(params, x),
            plain.apply(params, x, key=KEY),
            dropping.apply(params, x, key=KEY),
        )

    expected, without_key, at_rate_zero, dropped = run(params, x)
    np.testing.assert_array_equal(without_key, expected)
    np.testing.assert_array_equal(at_rate_zero, expected)
    assert np.abs(dropped - expected).max() > 0.1


def test_drop_block_drops_squares_at_the_rate():
    rate, block, size = 0.2, 3, 8
    x = jnp.ones((200, size, size, 10))
    out = np.asarray(jax.jit(drop_block, static_argnums=(2, 3))(x, KEY, rate, block))
    dropped = out == 0
    # Every dropped value lies in a square that is dropped as a whole.
    covered = np.zeros_like(dropped)
    for i in range(size - block + 1):
        for j in range(size - block + 1):
            whole = dropped[:, i : i + block, j : j + block].all((1, 2), keepdims=True)
            covered[:, i : i + block, j : j + block] |= whole
    np.testing.assert_array_equal(covered, dropped)
    # A value is kept if none of the squares that cover it is dropped, each with probability γ.
    gamma = rate / block**2 * size**2 / (size - block + 1) ** 2
    reach = np.minimum(np.minimum(np.arange(size) + 1, size - np.arange(size)), block)
    expected = 1 - (1 - gamma) ** np.outer(reach, reach)
    np.testing.assert_allclose(dropped.mean((0, 3)), expected, atol=0.04)
    assert abs(dropped.mean() - expected.mean()) < 0.01
    assert out.mean() == pytest.approx(1, rel=1e-5)


def test_blocks_larger_than_the_map_are_cut_to_it():
    out = np.asarray(drop_block(jnp.ones((50, 2, 3, 8)), KEY, 0.3, 5))
    dropped = (out == 0).reshape(50, 2, 3, 8)
    # Blocks of 2×2 on a map of height 2 drop whole columns.
    np.testing.assert_array_equal(dropped[:, 0], dropped[:, 1])
    assert 0.15 < dropped.mean() < 0.35


@pytest.mark.parametrize("network", [jm.nn.ResNet12(), jm.nn.Conv4()])
def test_images_too_small_for_the_poolings_are_refused(network):
    with pytest.raises(ValueError, match=r"images of 16×15; they must be at least 16×16"):
        jm.nn.as_model(network).init(KEY, jnp.zeros((1, 16, 15, 3)))
