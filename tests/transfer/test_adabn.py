"""AdaBN on networks with both kinds of batch normalisation: the target's statistics, and no other change."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from variables import initialised

import jaxmeta as jm
from jaxmeta.transfer import domain_adaptation
from jaxmeta.transfer.domain_adaptation import adabn

KEY = jax.random.key(0)


class Deep(linen.Module):
    """A network with three batch normalisations of either kind, which records their inputs."""

    ours: bool
    rate: float = 0.5

    @linen.compact
    def __call__(self, x, train=False):
        for width in (6, 5, 4):
            x = linen.Conv(width, (3, 3), bias_init=linen.initializers.normal(1.0))(x)
            self.sow("norm_inputs", "x", x)
            if self.ours:
                x = jm.nn.BatchNorm(epsilon=1e-5)(x)
            else:
                x = linen.BatchNorm(use_running_average=not train, epsilon=1e-5, momentum=0.9)(x)
            x = linen.Dropout(self.rate, deterministic=not train)(jax.nn.relu(x))
        return linen.Dense(2)(x.mean((1, 2)))


@partial(jax.jit, static_argnums=0)
def _recorded(network, variables, x):
    return network.apply(variables, x, mutable=["norm_inputs"])


def inputs_and_statistics(network, variables, x, stats):
    """Return the recorded inputs and the statistics of each normalisation in inference."""
    _, state = _recorded(network, {**variables, "batch_stats": stats}, x)
    layers = [stats[name] for name in sorted(stats)]
    return list(zip(*jax.tree.map(np.asarray, (list(state["norm_inputs"]["x"]), layers)), strict=True))


def images(n, seed=0, scale=1.0, shift=0.0):
    """Return images sorted by brightness, so that batches differ."""
    x = shift + scale * np.random.default_rng(seed).normal(size=(n, 5, 5, 2))
    x += np.linspace(-2, 2, n)[:, None, None, None]
    return x.astype(jnp.result_type(float))


def trained(network, x):
    variables, rng = jax.jit(network.init)(jax.random.key(1), x), np.random.default_rng(2)
    # Random γ and β, so that their values matter, and the source's statistics.
    params = jax.tree.map(
        lambda leaf: jnp.asarray((leaf + 0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype)),
        jax.device_get(variables["params"]),
    )
    # Remove the record that `init` creates.
    return adabn(network, {**variables, "params": params, "norm_inputs": {}}, x)


OURS, FLAX = pytest.param(Deep(ours=True), id="jaxmeta"), pytest.param(Deep(ours=False), id="flax")


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("network", [FLAX, OURS])
@pytest.mark.parametrize("batch", [8, None, 1000])
def test_every_layer_has_mean_zero_and_variance_one_on_the_target(network, batch, x64):
    source, target = images(12), images(21, 3, 2.0, 1.0)
    variables = trained(network, source)
    adapted = adabn(network, variables, target, batch=batch)
    for x, layer in inputs_and_statistics(network, variables, target, adapted["batch_stats"]):
        normalised = (x - layer["mean"]) / np.sqrt(layer["var"])
        np.testing.assert_allclose(normalised.mean((0, 1, 2)), 0, atol=1e-9)
        np.testing.assert_allclose(normalised.var((0, 1, 2)), 1, rtol=1e-9)
    # With the source's statistics they are not.
    for x, layer in inputs_and_statistics(network, variables, target, variables["batch_stats"]):
        assert np.abs(((x - layer["mean"]) / np.sqrt(layer["var"])).mean((0, 1, 2))).max() > 0.2


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("network", [OURS, FLAX])
@pytest.mark.parametrize("batch", [None, 5])
def test_adapting_back_to_the_source_restores_its_statistics_and_nothing_else_changes(network, batch, x64):
    source, target = images(12), np.abs(images(9, 3, 2.0, 1.0))
    variables = {**trained(network, source), "other": {"count": np.arange(3)}}
    before = jax.tree.map(np.array, variables)
    away = adabn(network, variables, target, batch=batch)
    back = adabn(network, away, source, batch=batch)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    for name in ("params", "other"):
        jax.tree.map(np.testing.assert_array_equal, (away[name], back[name]), (before[name],) * 2)
    away, back = away["batch_stats"], back["batch_stats"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), back, before["batch_stats"]
    )
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(*map(jax.tree.leaves, (away, back)), strict=True))


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("network", [OURS, FLAX])
def test_one_pass_pools_the_moments_within_and_between_batches(network, x64):
    x, sizes = images(21), (8, 8, 5)
    variables = trained(network, images(12))
    adapted = adabn(network, variables, x, batch=8, exact=False)["batch_stats"]
    adapted = jax.device_get(adapted)
    records = []
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        whole = adabn(network, variables, part)["batch_stats"]
        records.append([np.asarray(z) for z, _ in inputs_and_statistics(network, variables, part, whole)])
    naive = []
    for index, name in enumerate(sorted(adapted)):
        mean_b, var_b = (
            np.stack([getattr(record[index], moment)((0, 1, 2)) for record in records])
            for moment in ("mean", "var")
        )
        mean = np.average(mean_b, axis=0, weights=sizes)
        var = np.average(var_b + mean_b**2, axis=0, weights=sizes) - mean**2
        np.testing.assert_allclose(adapted[name]["mean"], mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(adapted[name]["var"], var, rtol=1e-9)
        naive.append(np.average(var_b, axis=0, weights=sizes))
    # The average of the batches' variances lacks the variance between batches.
    first = adapted[min(adapted)]["var"]
    assert (naive[0] < first).all()
    assert (naive[0] / first).min() < 0.5
    exact = adabn(network, variables, x)["batch_stats"]
    np.testing.assert_allclose(first, exact[min(exact)]["var"], rtol=1e-9)


@pytest.mark.nightly
def test_conv4_gets_the_statistics_of_the_target():
    network = jm.nn.Conv4(filters=8)
    x = 1 - np.random.default_rng(0).uniform(size=(20, 16, 16, 1)).astype(np.float32) ** 2
    variables = jax.device_get(initialised(network, x, 1))
    params = jax.tree.map(lambda leaf: leaf + np.float32(0.1), variables["params"])  # so that γ ≠ 1 and β ≠ 0
    whole = adabn(network, {"params": params}, x)
    batched = adabn(network, {"params": params}, x, batch=7)
    apply = jax.jit(jm.nn.as_model(network).apply_norm)
    outputs, stats = apply(params, x)
    for result in (whole, batched):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), result["batch_stats"], stats
        )
        inference = apply(params, x, stats=result["batch_stats"])[0]
        np.testing.assert_allclose(inference, outputs, rtol=1e-2, atol=1e-3)
        np.testing.assert_array_equal(jax.jit(network.apply)(result, x), inference)


@pytest.mark.nightly
def test_bytes_are_scaled_to_zero_to_one():
    network = Deep(ours=False)
    variables = trained(network, images(12))
    x = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 2), dtype=np.uint8)
    actual, expected = (adabn(network, variables, z)["batch_stats"] for z in (x, x.astype(np.float32) / 255))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


class Stem(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        return linen.BatchNorm(use_running_average=not train, name="norm")(linen.Conv(2, (3, 3))(x))


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("batch", [None, 8])
def test_a_classifier_is_adapted_adapter_first_and_compiled_once(batch, x64):
    body = Deep(ours=True)
    model = jm.transfer.classifier(body, 3, adapter=Stem())
    source, target = images(12), images(21, 3, 2.0, 1.0)
    variables = initialised(model, source)
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    adapted = adabn(model, variables, target, batch=batch)
    parts = [{name: tree[part] for name, tree in variables.items()} for part in ("adapter", "body")]
    stem = adabn(Stem(), parts[0], target)
    stem_outputs = jax.jit(Stem().apply)(stem, target)
    np.testing.assert_allclose(
        np.asarray(stem_outputs).mean((0, 1, 2)), 0, atol=1e-6
    )  # γ = 1 and β = 0 at initialisation
    expected = {
        "adapter": stem["batch_stats"],
        "body": adabn(body, parts[1], np.asarray(stem_outputs))["batch_stats"],
    }
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), adapted["batch_stats"], expected)
    jax.tree.map(np.testing.assert_array_equal, adapted["params"], variables["params"])
    compiled = domain_adaptation._measured._cache_size()
    adabn(model, variables, target + 1, batch=batch)
    assert domain_adaptation._measured._cache_size() == compiled
    bare = jm.transfer.classifier(jm.nn.MLP(out=4), 3)
    variables = initialised(bare, source)
    with pytest.raises(ValueError, match="network: has no batch normalisation"):
        adabn(bare, variables, target)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.second = nnx.Linear(5, 5, rngs=rngs)
        self.last = nnx.BatchNorm(5, rngs=rngs)

    def __call__(self, x):
        return self.last(self.second(jax.nn.relu(self.norm(self.first(x)))))


def test_an_nnx_model_is_adapted_in_one_batch_or_in_one_pass(x64):
    model = jm.nn.from_nnx(lambda rngs: NNXNet(rngs))
    x = np.random.default_rng(0).normal(size=(10, 4)) + np.linspace(0, 3, 10)[:, None]
    params = initialised(model, x)
    stats = adabn(model, {"params": params}, x)["batch_stats"]
    outputs = np.asarray(jax.jit(model.apply_norm)(params, x, stats=stats)[0])
    np.testing.assert_allclose(outputs.mean(0), 0, atol=1e-6)
    pooled = adabn(model, {"params": params}, x, batch=4, exact=False)["batch_stats"]
    first = x @ np.asarray(params["first"]["kernel"]) + np.asarray(params["first"]["bias"])[None]
    for result in (stats, pooled):
        np.testing.assert_allclose(result["norm"]["mean"], first.mean(0), rtol=1e-6)
        np.testing.assert_allclose(result["norm"]["var"], first.var(0), rtol=1e-6)
    with pytest.raises(ValueError, match=r"network: got Model; .* in one batch, or exact=False"):
        adabn(model, {"params": params}, x, batch=4)
    with pytest.raises(ValueError, match=r"network: got Model and the arguments \['scale'\], .* leave them"):
        adabn(model, {"params": params}, x, scale=2.0)


class Lifted(linen.Module):
    """Three batch normalisations in a `scan` of rematerialised blocks, then one over two feature axes."""

    @linen.compact
    def __call__(self, x):
        class Block(linen.Module):
            @linen.compact
            def __call__(self, x, _):
                x = linen.BatchNorm(use_running_average=True, name="norm")(linen.Dense(4)(x))
                return jnp.tanh(x), x

        blocks = linen.scan(
            linen.remat(Block),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, out = blocks(name="blocks")(x, None)
        x = linen.BatchNorm(use_running_average=True, axis=(1, 2), name="last")(x.reshape(-1, 2, 2))
        return x, out


def test_layers_in_scan_and_remat_and_with_several_axes_are_adapted(x64):
    network = Lifted()
    x = np.random.default_rng(0).normal(size=(30, 4)) * np.linspace(0.2, 3, 30)[:, None]
    variables = initialised(network, x)
    whole, batched = (adabn(network, variables, x, batch=batch) for batch in (None, 7))
    assert whole["batch_stats"]["blocks"]["norm"]["mean"].shape == (3, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), batched, whole)
    for adapted in (whole, batched):
        last, blocks = jax.device_get(jax.jit(network.apply)(adapted, x))
        for out in (*blocks, last):
            np.testing.assert_allclose(out.mean(0), 0, atol=1e-5)
            np.testing.assert_allclose(out.var(0), 1, rtol=1e-3)


class Odd(linen.Module):
    kind: str

    @linen.compact
    def __call__(self, x, training=True):
        if self.kind == "none":
            return linen.Dense(2)(x)
        if self.kind == "masked":
            return jm.nn.BatchNorm()(x, jnp.ones(x.shape[0], bool))
        norm = linen.BatchNorm(use_running_average=not training)
        return norm(norm(x)) if self.kind == "twice" else norm(x)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("none", {}, "network: Odd has no batch normalisation"),
        ("masked", {}, "network: its layer BatchNorm_0 is given a mask"),
        ("twice", {"training": False}, "network: its layer BatchNorm_0 is called twice"),
        ("once", {}, "network: its layer BatchNorm_0 normalises by its batch; .*training=False"),
        ("once", {"training": False, "batch": 0}, "batch: got 0"),
    ],
)
def test_networks_whose_statistics_would_be_wrong_are_rejected(kind, settings, message):
    network, x = Odd(kind), np.ones((4, 3), np.float32)
    variables = initialised(network, x)
    with pytest.raises(ValueError, match=message):
        adabn(network, variables, x, **settings)
    with pytest.raises(ValueError, match=r"x: got shape \(0, 3\)"):
        adabn(network, variables, x[:0])
