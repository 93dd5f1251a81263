"""Tests of networks with state: running statistics as in Flax, frozen layers in inference, chains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxmeta as jm
from jaxmeta.nn.stateful import as_stateful, chain, layers_in_order, part_variables

KEY = jax.random.key(0)
X = np.asarray(3 * jax.random.normal(KEY, (12, 5)) + 1)


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), a, b)


def same_bits(a, b):
    a, b = (
        [(leaf.shape, leaf.tobytes()) for leaf in map(np.asarray, jax.tree.leaves(tree))] for tree in (a, b)
    )
    return a == b


# --- Two blocks of a linear layer, normalisation, ReLU and dropout, by every way to set the mode ---


class Block(linen.Module):
    switching: str
    rate: float

    @linen.compact
    def __call__(self, x, training):
        x = linen.Dense(6, name="dense")(x)
        deterministic, attributes = not training, self.switching == "attributes"
        if self.switching == "ours":
            x = jm.nn.BatchNorm(epsilon=1e-5, name="norm")(x)
        elif attributes:
            x = linen.BatchNorm(use_running_average=deterministic, momentum=0.9, name="norm")(x)
        elif self.switching == "keywords":
            x = linen.BatchNorm(momentum=0.9, name="norm")(x=x, use_running_average=deterministic)
        else:
            x = linen.BatchNorm(momentum=0.9, name="norm")(x, deterministic)
        if attributes:
            return linen.Dropout(self.rate, deterministic=deterministic)(jax.nn.relu(x))
        return linen.Dropout(self.rate)(jax.nn.relu(x), deterministic)


class ByTrain(linen.Module):
    switching: str = "attributes"
    rates: tuple = (0.5, 0.0)

    def blocks(self, x, training):
        for i, rate in enumerate(self.rates):
            x = Block(self.switching, rate, name=f"block{i}")(x, training)
        return x

    @linen.compact
    def __call__(self, x, train=False):
        return self.blocks(x, train)


class ByDeterministic(ByTrain):
    @linen.compact
    def __call__(self, x, deterministic=True):
        return self.blocks(x, not deterministic)


class ByRunningAverage(ByTrain):
    @linen.compact
    def __call__(self, x, mask=None, use_running_average=None):
        return self.blocks(x, not use_running_average)


NETWORKS = {
    "train, attributes": ByTrain("attributes"),
    "deterministic, arguments": ByDeterministic("arguments"),
    "use_running_average, keywords": ByRunningAverage("keywords"),
    "train, jaxmeta": ByTrain("ours"),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    return NETWORKS[request.param]


def perturbed_variables(model, x=X):
    """Return initial variables plus random numbers, so that no scale is one and no mean zero."""
    variables = jax.jit(model.init)(jax.random.key(1), x)
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(0)
    return structure.unflatten(
        [
            jnp.asarray((leaf + rng.uniform(0.1, 0.6, leaf.shape)).astype(leaf.dtype))
            for leaf in map(np.asarray, leaves)
        ]
    )


def by_hand(params, x, mean, var):
    """Return the outputs of a block without dropout, normalised by given statistics or those of the batch."""
    params, mean, var = jax.tree.map(np.asarray, (params, mean, var))
    x = x @ params["dense"]["kernel"] + params["dense"]["bias"]
    mean, var = (x.mean(0), x.var(0)) if mean is None else (mean, var)
    x = (x - mean) / np.sqrt(var + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    return np.maximum(x, 0), {"mean": mean, "var": var}


@pytest.mark.nightly_rows(after=1)
def test_frozen_block_normalises_by_its_running_statistics_without_dropout(network):
    model = as_stateful(network)
    variables = perturbed_variables(model)
    params, before = jax.tree.map(np.asarray, (variables["params"], variables["batch_stats"]))
    frozen = {"block0": jax.tree.map(lambda _: True, params["block0"])}
    frozen["block1"] = jax.tree.map(lambda _: False, params["block1"])
    outputs, state = jax.jit(lambda v, x: model.train(v, x, KEY, frozen=frozen))(variables, X)
    hidden, _ = by_hand(params["block0"], X, **before["block0"]["norm"])
    expected, batch = by_hand(params["block1"], hidden, None, None)
    assert_close(outputs, expected)
    assert same_bits(state["batch_stats"]["block0"], before["block0"])
    assert_close(
        state["batch_stats"]["block1"]["norm"],
        jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, before["block1"]["norm"], batch),
    )
    # A layer that is not frozen as a whole normalises by its batch and updates its statistics.
    frozen["block0"]["norm"]["bias"] = False
    outputs, state = model.train(variables, X, KEY, frozen=frozen)
    assert not np.allclose(outputs, expected, atol=1e-2)
    assert not same_bits(state["batch_stats"]["block0"], before["block0"])


@pytest.mark.nightly_rows(after=2)
def test_inference_and_wholly_frozen_training_use_the_running_statistics(network):
    model = as_stateful(network)
    variables = perturbed_variables(model)
    stats = jax.tree.map(np.asarray, variables["batch_stats"])
    hidden, _ = by_hand(variables["params"]["block0"], X, **stats["block0"]["norm"])
    expected, _ = by_hand(variables["params"]["block1"], hidden, **stats["block1"]["norm"])
    assert_close(model.apply(variables, X), expected)
    frozen = jax.tree.map(lambda _: True, variables["params"])
    outputs, state = model.train(variables, X, KEY, frozen=frozen)
    assert_close(outputs, expected)
    assert same_bits(state, {"batch_stats": variables["batch_stats"]})


def test_training_steps_match_those_of_flax():
    # Outputs, dropout and running averages of three batches, for every way to set the mode.
    reference = ByTrain(rates=(0.5, 0.3))
    start = perturbed_variables(as_stateful(reference))
    for network in (
        reference,
        ByDeterministic("arguments", (0.5, 0.3)),
        ByRunningAverage("keywords", (0.5, 0.3)),
    ):
        model, variables, theirs = as_stateful(network), start, start
        for step in range(3):
            key, x = jax.random.fold_in(KEY, step), X + step
            rngs = {"dropout": key, "params": key}
            known, updated = reference.apply(theirs, x, train=True, rngs=rngs, mutable=["batch_stats"])
            outputs, state = model.train(variables, x, key)
            assert_close(outputs, known, 1e-6)
            variables, theirs = {**variables, **state}, {**theirs, **updated}
        assert_close(variables, theirs, 1e-6)
    assert (np.asarray(known) == 0).mean() > 0.3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_running_average_of_our_normalisation_matches_that_of_flax(momentum):
    x = 2 * jax.random.normal(KEY, (3, 4, 6, 6, 2)) + jnp.arange(3.0).reshape(3, 1, 1, 1, 1)
    theirs = linen.BatchNorm(use_running_average=False, momentum=momentum)
    model = as_stateful(jm.nn.BatchNorm(), momentum=momentum)
    variables, known = model.init(KEY, x[0]), theirs.init(KEY, x[0])
    assert_close(variables["batch_stats"], known["batch_stats"], 0)
    for batch in x:
        variables |= model.train(variables, batch, KEY)[1]
        known |= theirs.apply(known, batch, mutable=["batch_stats"])[1]
    assert_close(variables["batch_stats"], known["batch_stats"])


@pytest.mark.nightly
def test_conv4_normalises_by_its_batch_in_training_and_by_running_statistics_in_inference():
    network, x = jm.nn.Conv4(3, filters=4), jax.random.normal(KEY, (6, 16, 16, 1))
    model, values = as_stateful(network, momentum=0.0), jm.nn.as_model(network)
    variables = jax.jit(model.init)(KEY, x)
    outputs, state = jax.jit(model.train)(variables, x, KEY)
    known, stats = jax.jit(values.apply_norm)(variables["params"], x)
    assert_close(outputs, known, 1e-6)
    assert_close(state["batch_stats"], stats, 1e-6)
    # With momentum 0 the running statistics are those of the batch.
    assert_close(jax.jit(model.apply)({**variables, **state}, x), known)


class Counting(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        count = self.variable("counters", "calls", lambda: jnp.zeros((), jnp.int32))
        if train:
            count.value += 1
        return linen.Dense(2)(x)


def test_other_state_is_updated_unless_all_is_frozen():
    model = as_stateful(Counting())
    variables = model.init(KEY, X)
    assert model.train(variables, X, KEY)[1] == {"counters": {"calls": 1}}
    frozen = jax.tree.map(lambda _: True, variables["params"])
    assert model.train(variables, X, KEY, frozen=frozen)[1] == {"counters": {"calls": 0}}


class Scanned(linen.Module):
    lift: bool

    @linen.compact
    def __call__(self, x):
        class Layer(linen.Module):
            @linen.compact
            def __call__(self, x, _):
                return jm.nn.BatchNorm(name="norm")(linen.Dense(5, name="dense")(x)), None

        if self.lift:
            axes = {"params": 0, "batch_stats": 0}
            return linen.scan(Layer, axes, split_rngs={"params": True}, length=3)(name="layers")(x, None)[0]
        for i in range(3):
            x, _ = linen.remat(Layer)(name=f"layer{i}")(x, None)
        return x


def test_scanned_layers_have_the_statistics_of_separate_layers():
    scanned, single = as_stateful(Scanned(True)), as_stateful(Scanned(False))
    variables = perturbed_variables(scanned)
    apart = {
        name: {f"layer{i}": jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"]) for i in range(3)}
        for name, tree in variables.items()
    }
    outputs, state = jax.jit(scanned.train)(variables, X, KEY)
    known, parts = jax.jit(single.train)(apart, X, KEY)
    assert_close(outputs, known)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts["batch_stats"].values())
    assert_close(state["batch_stats"]["layers"], stacked)
    assert_close(jax.jit(scanned.apply)(variables, X), jax.jit(single.apply)(apart, X))


# --- Networks of other kinds ----------------------------------------------------------------------


class NNXNet(nnx.Module):
    def __init__(self, rate, rngs):
        self.layers = nnx.List([nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)])
        self.norms = nnx.List([nnx.BatchNorm(n, momentum=0.8, rngs=rngs) for n in (6, 4)])
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x))
        return self.dropout(x)


def test_running_statistics_of_nnx_networks_match_those_of_nnx():
    module = NNXNet(0.0, nnx.Rngs(0))
    model = as_stateful(module, momentum=0.8)
    variables = model.init(KEY, X)
    module.train()
    for step in range(2):
        outputs, state = model.train(variables, X + step, KEY)
        assert_close(outputs, module(X + step))
        variables |= state
    module.eval()
    assert_close(model.apply(variables, X), module(X))
    norm = module.norms[1]
    assert_close(variables["batch_stats"]["norms"]["1"], {"mean": norm.mean[...], "var": norm.var[...]})
    # Frozen lower layers normalise by their running statistics, which do not change.
    frozen = {
        name: {"0": jax.tree.map(lambda _: True, variables["params"][name]["0"])}
        for name in ("layers", "norms")
    }
    for name in frozen:
        frozen[name]["1"] = jax.tree.map(lambda _: False, variables["params"][name]["1"])
    outputs, state = model.train(variables, X, KEY, frozen=frozen)
    assert same_bits(state["batch_stats"]["norms"]["0"], variables["batch_stats"]["norms"]["0"])
    middle = np.asarray(module.layers[1](module.norms[0](module.layers[0](X))))
    assert_close(outputs, (middle - middle.mean(0)) / np.sqrt(middle.var(0) + 1e-5))
    new, old = (tree["norms"]["1"]["mean"] for tree in (state["batch_stats"], variables["batch_stats"]))
    assert_close(new, 0.8 * old + 0.2 * middle.mean(0))


def test_nnx_dropout_is_on_in_training_only_unless_all_is_frozen():
    model = as_stateful(NNXNet(0.5, nnx.Rngs(0)))
    variables = model.init(KEY, X)
    first, second = (model.train(variables, X, jax.random.key(seed))[0] for seed in (1, 2))
    assert 0.2 < (np.asarray(first) == 0).mean() < 0.8
    assert not np.array_equal(first, second)
    frozen = jax.tree.map(lambda _: True, variables["params"])
    outputs, state = model.train(variables, X, KEY, frozen=frozen)
    np.testing.assert_array_equal(outputs, model.apply(variables, X))
    assert (np.asarray(outputs) != 0).all()
    assert same_bits(state["batch_stats"], variables["batch_stats"])


def plain_init(key, x):
    return [jax.random.normal(key, (x.shape[1], 3)), jnp.zeros(3)]


def plain_apply(params, x):
    return x @ params[0] + params[1][None]


def test_networks_without_state_have_parameters_only():
    eqx = pytest.importorskip("equinox")
    module = eqx.nn.Linear(5, 3, key=KEY)
    for network, expected in (
        (module, jax.vmap(module)(X)),
        ((plain_init, plain_apply), X @ np.asarray(plain_init(KEY, X)[0])),
    ):
        model = as_stateful(network)
        variables = model.init(KEY, X)
        assert list(variables) == ["params"]
        for frozen in (
            None,
            *(jax.tree.map(lambda _, value=value: value, variables["params"]) for value in (True, False)),
        ):
            outputs, state = model.train(variables, X, KEY, frozen=frozen)
            assert state == {}
            assert_close(outputs, expected)
        assert_close(model.apply(variables, X), expected)


# --- Chains and layers ----------------------------------------------------------------------------


def test_chain_applies_its_parts_in_sequence():
    parts = {"adapter": (plain_init, plain_apply), "body": ByTrain(rates=(0.0, 0.0)), "head": linen.Dense(2)}
    model = chain(parts)
    assert as_stateful(model) is model
    variables = model.init(KEY, X)
    assert {name: list(tree) for name, tree in variables.items()} == {
        "params": ["adapter", "body", "head"],
        "batch_stats": ["body"],
    }
    adapter, body, head = (part_variables(variables, name) for name in parts)
    middle = plain_apply(adapter["params"], X)
    features, updated = parts["body"].apply(body, middle, train=True, mutable=["batch_stats"])
    outputs, state = model.train(variables, X, KEY)
    assert_close(outputs, parts["head"].apply(head, features))
    assert_close(state, {"batch_stats": {"body": updated["batch_stats"]}})
    assert_close(model.features.train(variables, X, KEY), (features, state))
    inferred = parts["body"].apply(body, middle)
    assert_close(model.features.apply(variables, X), inferred)
    assert_close(model.apply(variables, X), parts["head"].apply(head, inferred))
    frozen = jax.tree.map(lambda _: False, variables["params"])
    frozen["body"] = jax.tree.map(lambda _: True, frozen["body"])
    outputs, state = model.train(variables, X, KEY, frozen=frozen)
    assert_close(outputs, parts["head"].apply(head, inferred))
    assert same_bits(state["batch_stats"], variables["batch_stats"])


def test_parts_of_a_chain_have_different_keys():
    def train(variables, x, key, *, frozen=None):
        return x + jax.random.normal(key, x.shape), variables

    noise = jm.nn.StatefulModel(lambda key, x: {"params": {}}, lambda variables, x: x, train)
    model = chain({"first": noise, "second": noise})
    outputs, _ = model.train(model.init(KEY, X), X, KEY)
    halves = (outputs - X) / 2
    alone, _ = chain({"first": noise}).train({"params": {"first": {}}}, X, KEY)
    assert np.abs(halves - (alone - X)).max() > 0.1


class Unordered(linen.Module):
    """A network whose layers are neither named nor declared in the order of their computation."""

    def setup(self):
        self.a, self.z = linen.Dense(5), linen.Dense(5)
        self.m = Block("attributes", 0.0)
        self.scale = self.param("scale", linen.initializers.ones, (5,))

    def __call__(self, x, train=False):
        return self.m(self.a(jax.nn.relu(self.z(x * self.scale[None]))), train)


IMAGES = np.zeros((2, 32, 32, 3), np.float32)


@pytest.mark.parametrize(
    ("network", "x", "expected"),
    [
        (Unordered(), X, ["scale", "z", "a", "m"]),
        (jm.nn.Conv4(3, filters=4), IMAGES, [f"ConvNorm_{i}" for i in range(4)] + ["head"]),
        (
            jm.nn.MLP(out=2, hidden=(3, 3), norm=True),
            X,
            ["Dense_0", "BatchNorm_0", "Dense_1", "BatchNorm_1", "head"],
        ),
        (jm.nn.ResNet12(ways=3), IMAGES, [f"block{i}" for i in range(4)] + ["head"]),
        (
            jm.nn.ResNet18(ways=3),
            IMAGES,
            ["stem_conv", "stem_norm", *(f"stage{i}_block{j}" for i in range(4) for j in range(2)), "head"],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, linen.Module) else "",
)
def test_layers_come_in_the_order_of_computation(network, x, expected):
    assert list(layers_in_order(network, x)) == expected


# --- Statistics of some layers only ---------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_layers_without_given_statistics_normalise_by_their_batch(index):
    linen_model, nnx_model = jm.nn.as_model(ByTrain("ours")), jm.nn.as_model(NNXNet(0.0, nnx.Rngs(0)))
    given_stats = {"mean": np.full(6, 0.3, np.float32), "var": np.full(6, 1.7, np.float32)}
    params = linen_model.init(KEY, X)
    outputs, stats = linen_model.apply_norm(params, X, stats={f"block{index}": {"norm": given_stats}})
    hidden, expected = X, {}
    for i in range(2):
        which = given_stats if i == index else {"mean": None, "var": None}
        hidden, used = by_hand(params[f"block{i}"], hidden, **which)
        expected[f"block{i}"] = {"norm": used}
    assert_close(outputs, hidden)
    assert_close(stats, expected)

    params, width = nnx_model.init(KEY, X), (6, 4)[index]
    given_stats = {name: leaf[:width] for name, leaf in given_stats.items()}
    outputs, stats = nnx_model.apply_norm(params, X, stats={"norms": {str(index): given_stats}})
    hidden, expected = X, {}
    for i in "01":
        layer = params["layers"][i]
        hidden = hidden @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        used = given_stats if i == str(index) else {"mean": hidden.mean(0), "var": hidden.var(0)}
        hidden, expected[i] = (hidden - used["mean"]) / np.sqrt(used["var"] + 1e-5), used
    assert_close(outputs, hidden)
    assert_close(stats, {"norms": expected})


def test_networks_without_mask_take_padding_only_if_all_statistics_are_given():
    mask = np.arange(12) < 9
    for network in (ByTrain("ours"), NNXNet(0.0, nnx.Rngs(0))):
        model = jm.nn.as_model(network)
        params = model.init(KEY, X)
        _, stats = model.apply_norm(params, X)
        outputs, _ = model.apply_norm(params, X, stats=stats, mask=mask)
        assert_close(outputs, model.apply(params, X), 1e-4)
        first, *_ = stats
        first_layer = {first: stats[first]} if first == "block0" else {first: {"0": stats[first]["0"]}}
        for partial in (None, first_layer):
            with pytest.raises(ValueError, match="must take `mask`"):
                model.apply_norm(params, X, stats=partial, mask=mask)


# --- Bad input ------------------------------------------------------------------------------------


class TwoInputs(linen.Module):
    @linen.compact
    def __call__(self, x, flow):
        return linen.Dense(2)(x)


class AlwaysDropout(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dropout(0.5, deterministic=False)(linen.Dense(2)(x))


def test_unsupported_networks_and_settings_are_refused():
    for momentum in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"momentum: got {momentum}"):
            as_stateful(jm.nn.BatchNorm(), momentum=momentum)
    with pytest.raises(ValueError, match=r"TwoInputs.__call__ requires \['flow'\]"):
        as_stateful(TwoInputs())
    with pytest.raises(ValueError, match="AlwaysDropout draws random numbers in inference"):
        as_stateful(AlwaysDropout()).init(KEY, X)
    with pytest.raises(ValueError, match="parts: got none"):
        chain({})


# --- Kept statistics ------------------------------------------------------------------------------


@pytest.mark.nightly_rows(after=2)
def test_kept_statistics_normalise_in_training_with_dropout_on(network):
    model = as_stateful(network)
    variables = perturbed_variables(model)
    outputs, state = model.train(variables, X, KEY, keep_statistics=True)
    assert same_bits(state, {"batch_stats": variables["batch_stats"]})
    # Dropout is on, so that the outputs differ from those of inference.
    assert not np.allclose(outputs, model.apply(variables, X), atol=1e-2)
    chained = chain({"net": model})
    within = {name: {"net": tree} for name, tree in variables.items()}
    assert same_bits(
        chained.train(within, X, KEY, keep_statistics=True)[1], {"batch_stats": within["batch_stats"]}
    )


def test_training_by_kept_statistics_without_dropout_equals_inference():
    model = as_stateful(ByTrain("keywords", rates=(0.0, 0.0)))
    variables = perturbed_variables(model)
    outputs, _ = model.train(variables, X, KEY, keep_statistics=True)
    assert_close(outputs, model.apply(variables, X))
