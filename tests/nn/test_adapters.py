"""Tests of `as_model`: the same small network in every framework has the same meta-gradients."""

import functools
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close as assert_trees_close
from flax import linen, nnx
from trees import max_difference

import jaxmeta as jm
from jaxmeta.nn.shared import EXAMPLES

WAYS, DIM, HIDDEN = 3, 4, 5
KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("x64")


# --- The network: two layers with dropout, with or without batch normalisation --------------------


class LinenNet(linen.Module):
    norm: bool = False
    rate: float = 0.0
    out: int = WAYS

    @linen.compact
    def __call__(self, x, mask=None, deterministic=True):
        x = linen.Dense(HIDDEN, name="first")(x)
        if self.norm:
            x = jm.nn.BatchNorm(epsilon=1e-5, name="norm")(x, mask)
        x = linen.Dropout(self.rate)(jax.nn.relu(x), deterministic)
        return linen.Dense(self.out, name="head")(x)


class FlaxNet(linen.Module):
    """The same network with `flax.linen.BatchNorm`, in the form of Flax's examples."""

    norm: bool = False
    rate: float = 0.0

    @linen.compact
    def __call__(self, x, mask=None, *, train):
        x = linen.Dense(HIDDEN, name="first")(x)
        if self.norm:
            x = linen.BatchNorm(use_running_average=not train, name="norm")(x, mask=mask)
        x = linen.Dropout(self.rate)(jax.nn.relu(x), deterministic=not train)
        return linen.Dense(WAYS, name="head")(x)


class NNXNet(nnx.Module):
    def __init__(self, norm=False, rate=0.0, out=WAYS, *, rngs):
        self.layers = nnx.List([nnx.Linear(DIM, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, out, rngs=rngs)])
        self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs) if norm else None
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, mask=None):
        first, head = self.layers
        x = first(x)
        if self.norm is not None:
            x = self.norm(x, mask=mask)
        return head(self.dropout(jax.nn.relu(x)))


def equinox_net(rate=0.0, batched=False, norm=False, mode="batch"):
    eqx = pytest.importorskip("equinox")

    class EquinoxNet(eqx.Module):
        layers: tuple
        dropout: eqx.nn.Dropout
        norm: eqx.nn.BatchNorm | None

        def __init__(self, key):
            sizes = (DIM, HIDDEN, WAYS)
            self.layers = tuple(
                eqx.nn.Linear(*pair, key=jax.random.fold_in(key, pair[0]))
                for pair in itertools.pairwise(sizes)
            )
            self.dropout = eqx.nn.Dropout(rate)
            self.norm = eqx.nn.BatchNorm(HIDDEN, "batch", mode=mode) if norm else None

        def __call__(self, x, state=None, *, key):
            first, head = (jax.vmap(layer) if batched else layer for layer in self.layers)
            x = first(x)
            if norm:
                call = jax.vmap(self.norm, (0, None), (0, None), axis_name="batch") if batched else self.norm
                x, state = call(x, state)
            x = head(self.dropout(jax.nn.relu(x), key=key))
            return (x, state) if norm else x

    return EquinoxNet


def plain_apply(params, x):
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"][None]


def plain_init(key, x):
    return LinenNet().init(key, x)["params"]


def transposed(layer):
    weight = "kernel" if "weight" in layer else "weight"
    return {"bias": layer["bias"], weight: layer["kernel" if weight == "weight" else "weight"].T}


def from_layers(layers, convert):
    return {"layers": {"0": convert(layers["first"]), "1": convert(layers["head"])}}


def to_layers(params, convert):
    return {"first": convert(params["layers"]["0"]), "head": convert(params["layers"]["1"])}


def same(layer):
    return layer


def with_norm(change, scale="scale"):
    """Return `change` extended to the parameters of the normalisation, with scale renamed to `scale`."""

    def changed(params, convert):
        norm = params.get("norm", {})
        renamed = {"bias" if name == "bias" else scale: leaf for name, leaf in norm.items()}
        return change(params, convert) | ({"norm": renamed} if norm else {})

    return changed


# By framework: a function (norm, rate) -> network, a conversion of LinenNet's parameters to its own, and the
# inverse conversion.
FORMS = {
    "linen": (lambda norm, rate: LinenNet(norm, rate), same, same),
    "nnx": (
        lambda norm, rate: NNXNet(norm, rate, rngs=nnx.Rngs(0)),
        lambda params: with_norm(from_layers)(params, same),
        lambda params: with_norm(to_layers)(params, same),
    ),
    "flax": (lambda norm, rate: FlaxNet(norm, rate), same, same),
    "equinox": (
        lambda norm, rate: equinox_net(rate, norm=norm)(jax.random.key(0)),
        lambda params: with_norm(from_layers, "weight")(params, transposed),
        lambda params: with_norm(to_layers, "scale")(params, transposed),
    ),
    "functions": (lambda norm, rate: (plain_init, plain_apply), same, same),
}


def make_task(seed=0, masked=False):
    rng = np.random.default_rng(seed)

    def part(examples):
        labels = np.tile(np.arange(WAYS, dtype=np.int32), examples)
        x = jnp.asarray(rng.normal(size=(labels.size, DIM)))
        mask = jnp.asarray(np.arange(labels.size) % 4 != 1) if masked else None
        return jm.Batch(x, jnp.asarray(labels), mask=mask, ways=WAYS)

    return jm.Task(part(2), part(3))


@functools.cache
def reference_params(norm=False):
    params = jax.jit(LinenNet(norm).init)(KEY, jnp.zeros((2, DIM)))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64) + 0.1 * rng.normal(size=leaf.shape), params)


def make_learner(network, **settings):
    # The default memory mode, "auto", would trace each inner step twice.
    return jm.maml(
        network, **{"inner_optimizer": optax.sgd(0.5), "inner_steps": 2, "memory": "store", **settings}
    )


def loss_and_gradient(learner, params, task):
    return jax.jit(jax.value_and_grad(lambda params: learner.loss(params, task, KEY)[0]))({"model": params})


@functools.cache
def reference_loss_and_gradient(norm, masked):
    """Return loss and gradient of the Linen network."""
    learner = make_learner(LinenNet(norm is not None), norm=norm or "batch")
    return loss_and_gradient(learner, reference_params(norm is not None), make_task(masked=masked))


@pytest.mark.parametrize(
    ("form", "norm", "masked"),
    [
        pytest.param("nnx", None, False, marks=pytest.mark.nightly),
        pytest.param("nnx", "batch", False, marks=pytest.mark.nightly),
        ("nnx", "support", True),
        pytest.param("flax", "batch", False, marks=pytest.mark.nightly),
        ("flax", "support", True),
        pytest.param("flax", "episode", False, marks=pytest.mark.nightly),
        pytest.param("equinox", "batch", False, marks=pytest.mark.nightly),
        ("equinox", "support", True),
        pytest.param("equinox", "episode", False, marks=pytest.mark.nightly),
        pytest.param("equinox", None, True, marks=pytest.mark.nightly),
        ("functions", None, True),
    ],
)
def test_meta_gradient_matches_linen(form, norm, masked):
    make, from_linen, to_linen = FORMS[form]
    params, task = reference_params(norm is not None), make_task(masked=masked)
    value, gradient = reference_loss_and_gradient(norm, masked)
    learner = make_learner(make(norm is not None, 0.0), norm=norm or "batch")
    actual, actual_gradient = loss_and_gradient(learner, from_linen(params), task)
    np.testing.assert_allclose(actual, value, rtol=1e-9)
    assert_trees_close(to_linen(actual_gradient["model"]), gradient["model"], atol=1e-9)
    assert max_difference(gradient, jax.tree.map(jnp.zeros_like, gradient)) > 0.01


@pytest.mark.parametrize("form", ["linen", "nnx", "equinox"])
def test_dropout_is_determined_by_the_key(form):
    make, from_linen, _ = FORMS[form]
    params, x = from_linen(reference_params()), make_task().query.x
    model = jm.nn.as_model(make(False, 0.5))
    assert model.stochastic
    apply = jax.jit(model.apply)
    first, again, other = (apply(params, x, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert max_difference(first, other) > 0.1
    expected = jax.jit(plain_apply)(reference_params(), x)
    np.testing.assert_allclose(apply(params, x), expected, atol=1e-12)
    # Half of the hidden units are dropped and the others doubled, independently for each example, so that the
    # mean is the output without dropout.
    many = np.tile(x[:1], (4000, 1))
    mean = np.asarray(apply(params, many, key=KEY)).mean(0)
    np.testing.assert_allclose(mean, expected[0], atol=0.1)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("form", "modes"),
    [
        ("linen", ("store", "recompute", "forward_over_reverse")),
        ("nnx", ("store", "forward_over_reverse")),
        ("equinox", ("store", "forward_over_reverse")),
    ],
)
def test_dropout_in_both_loops_is_determined_by_the_key_in_every_memory_mode(form, modes):
    make, from_linen, _ = FORMS[form]
    params, task = {"model": from_linen(reference_params())}, make_task()
    results = []
    for memory in modes:
        learner = make_learner(make(False, 0.5), memory=memory)

        def run(key, learner=learner):
            value, gradient = jax.value_and_grad(lambda params: learner.loss(params, task, key)[0])(params)
            adapted = learner.adapt(params, task.support, key)
            return value, gradient, adapted, learner.predict(params, adapted, task.query.x)

        keys = jnp.stack([jax.random.key(seed) for seed in (1, 2, 1)])
        results.append(jax.jit(jax.vmap(run))(keys))
    for other in results[1:]:
        assert_trees_close(other, results[0], atol=1e-12)
    first, other, again = (jax.tree.map(lambda leaf: leaf[i], results[0]) for i in range(3))  # noqa: B023
    assert_trees_close(first, again, rtol=0)
    for a, b in zip(first, other, strict=True):
        assert max_difference(a, b) > 1e-3
    *_, adapted, outputs = first
    deterministic = make_learner(make(False, 0.0))
    expected = jax.jit(deterministic.predict)(params, adapted, task.query.x)
    np.testing.assert_allclose(outputs, expected, atol=1e-12)


def test_a_model_is_returned_unchanged():
    model = jm.Model(lambda key, x: {}, lambda params, x: x)
    assert jm.nn.as_model(model) is model


def test_a_network_without_normalisation_has_no_statistics():
    model, x = jm.nn.as_model(jm.nn.MLP(out=2)), jnp.ones((3, 1))
    params = jax.jit(model.init)(jax.random.key(0), x)

    @jax.jit
    def run(params, x):
        return model.apply_norm(params, x, mask=jnp.array([True, False, True])), model.apply(params, x)

    (outputs, stats), expected = run(params, x)
    assert stats == {}
    np.testing.assert_array_equal(outputs, expected)


# --- Batch statistics of the frameworks' own layers -------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("form", ["nnx", "flax", "equinox"])
def test_batch_norm_is_transductive_in_batch_mode_only(form):
    make, from_linen, _ = FORMS[form]
    task, params = make_task(), {"model": from_linen(reference_params(norm=True))}
    for norm, transductive in (("batch", True), ("support", False)):
        learner = make_learner(make(True, 0.5), norm=norm)
        adapted = jax.jit(learner.adapt)(params, task.support, KEY)
        joint = jax.jit(learner.predict)(params, adapted, task.query.x)
        alone = jax.jit(jax.vmap(lambda x: learner.predict(params, adapted, x[None])[0]))(task.query.x)  # noqa: B023
        assert (max_difference(joint, alone) > 1e-2) == transductive
        if not transductive:
            np.testing.assert_allclose(joint, alone, atol=1e-12)


@pytest.mark.nightly
def test_calibration_of_every_batch_norm_matches_jaxmeta_batch_norm():
    tasks = jm.TaskDistribution(
        jax.tree_util.Partial(
            lambda x, key: jm.Task(*(jm.Batch(x + k, x[:, :WAYS]) for k in jax.random.normal(key, (2,)))),
            make_task().query.x,
        ),
        jm.ProtocolCard("shifted", "train"),
    )
    params = reference_params(norm=True)
    outputs = []
    for form in ("linen", "nnx", "flax", "equinox"):
        learner = make_learner(FORMS[form][0](True, 0.0), norm="population", loss=jm.losses.mse)
        filled = jm.calibrate(learner, {"model": FORMS[form][1](params)}, tasks, KEY, episodes=3)
        adapted = jax.jit(learner.adapt)(filled, tasks.sample(KEY).support, KEY)
        outputs.append((filled["population"], jax.jit(learner.predict)(filled, adapted, make_task().query.x)))
    for other in outputs[1:]:
        assert_trees_close(other, outputs[0], atol=1e-9)


def test_nnx_running_averages_are_never_used():
    class Averaging(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(DIM, axis=1, rngs=nnx.Rngs(0))

        def __call__(self, x, train):
            return self.norm(x, use_running_average=not train)

    model, x = jm.nn.as_model(Averaging()), jax.random.normal(KEY, (6, DIM, 2))
    params = model.init(KEY, x)
    outputs, stats = model.apply_norm(params, x)
    mean, var = x.mean((0, 2)), x.var((0, 2))
    assert_trees_close(stats, {"norm": {"mean": mean, "var": var}}, atol=1e-12)
    expected = (x - mean[None, :, None]) / jnp.sqrt(var + 1e-5)[None, :, None]
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    np.testing.assert_array_equal(outputs, model.apply(params, x))
    shifted = {"norm": {"mean": mean + 1, "var": 4 * var}}
    expected = (x - mean[None, :, None] - 1) / jnp.sqrt(4 * var + 1e-5)[None, :, None]
    np.testing.assert_allclose(model.apply_norm(params, x, stats=shifted)[0], expected, atol=1e-6)


class FlaxNorms(linen.Module):
    @linen.compact
    def __call__(self, x, use_running_average):
        # `use_running_average` is a field of one layer and an argument of the other, with two channel axes.
        x = linen.BatchNorm(use_running_average=True, axis=1, name="first")(x)
        return linen.BatchNorm(axis=(1, 2), epsilon=1e-3, use_bias=False, name="second")(
            x, use_running_average=use_running_average
        )


def normalised(x, mean, var, axes, epsilon):
    mean, var = (np.expand_dims(moment, axes) for moment in (mean, var))
    return (x - mean) / np.sqrt(var + epsilon)


def test_running_averages_of_flax_linen_are_never_used():
    model, x = jm.nn.as_model(FlaxNorms()), 3 + jax.random.normal(KEY, (6, DIM, 2))
    params = model.init(KEY, x)
    assert jax.tree.map(jnp.shape, params) == {
        "first": {"bias": (DIM,), "scale": (DIM,)},
        "second": {"scale": (DIM, 2)},
    }
    x = np.asarray(x)
    first = normalised(x, x.mean((0, 2)), x.var((0, 2)), (0, 2), 1e-5)
    stats = {
        "first": {"mean": x.mean((0, 2)), "var": x.var((0, 2))},
        "second": {"mean": first.mean(0), "var": first.var(0)},
    }
    expected = normalised(first, first.mean(0), first.var(0), 0, 1e-3)
    outputs, actual = model.apply_norm(params, x)
    assert_trees_close(actual, stats, atol=1e-6)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    np.testing.assert_array_equal(outputs, model.apply(params, x))
    # With given statistics of one layer, the other still uses those of its batch.
    given_stats = {"first": {"mean": np.full(DIM, 1.0), "var": np.full(DIM, 4.0)}}
    outputs, actual = model.apply_norm(params, x, stats=given_stats)
    first = normalised(x, given_stats["first"]["mean"], given_stats["first"]["var"], (0, 2), 1e-5)
    assert_trees_close(actual["first"], given_stats["first"], rtol=0)
    np.testing.assert_allclose(outputs, normalised(first, first.mean(0), first.var(0), 0, 1e-3), atol=1e-5)


def test_pretrained_running_averages_of_flax_linen_can_be_passed():
    network, x = FlaxNet(norm=True), make_task().query.x
    variables = network.init(KEY, x, train=False)
    _, state = network.apply(variables, 2 * x + 1, train=True, mutable=["batch_stats"], rngs={"dropout": KEY})
    variables = {**variables, **state}
    outputs, _ = jm.nn.as_model(network).apply_norm(variables["params"], x, stats=variables["batch_stats"])
    np.testing.assert_allclose(outputs, network.apply(variables, x, train=False), rtol=1e-6)


def test_each_layer_of_a_scan_has_its_own_statistics():
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return linen.BatchNorm(use_running_average=False, name="norm")(2 * x + 1), None

    class Scanned(linen.Module):
        @linen.compact
        def __call__(self, x):
            axes = {"params": 0, "batch_stats": 0}
            layers = linen.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
            return layers(name="layers")(x, None)[0]

    model, x = jm.nn.as_model(Scanned()), make_task().query.x
    params = model.init(KEY, x)
    outputs, stats = model.apply_norm(params, x)
    assert stats["layers"]["norm"]["mean"].shape == (3, DIM)
    np.testing.assert_allclose(stats["layers"]["norm"]["mean"][0], (2 * x + 1).mean(0), atol=1e-6)
    np.testing.assert_allclose(model.apply_norm(params, x, stats=stats)[0], outputs, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "batched"),
    [("batch", False), ("ema", True), pytest.param("ema", False, marks=pytest.mark.nightly)],
)
def test_running_averages_of_equinox_are_never_used(mode, batched):
    eqx = pytest.importorskip("equinox")
    make = eqx.nn.make_with_state(equinox_net(batched=batched, norm=True, mode=mode))
    model = jm.nn.from_equinox(make, batched=batched)
    params, x = FORMS["equinox"][1](reference_params(norm=True)), np.asarray(make_task().query.x)
    assert jax.tree.structure(model.init(KEY, x)) == jax.tree.structure(params)
    reference = reference_params(norm=True)
    hidden = x @ reference["first"]["kernel"] + reference["first"]["bias"][None]

    def expected_outputs(mean, var):
        scaled = normalised(hidden, mean, var, 0, 1e-5) * reference["norm"]["scale"][None]
        scaled = jax.nn.relu(scaled + reference["norm"]["bias"][None])
        return scaled @ reference["head"]["kernel"] + reference["head"]["bias"][None]

    mask = np.arange(len(x)) % 3 != 1
    for real in (None, mask):
        kept = hidden if real is None else hidden[real]
        outputs, stats = model.apply_norm(params, x, mask=real)
        assert_trees_close(stats, {"norm": {"mean": kept.mean(0), "var": kept.var(0)}}, atol=1e-12)
        np.testing.assert_allclose(outputs, expected_outputs(kept.mean(0), kept.var(0)), atol=1e-12)
    np.testing.assert_array_equal(model.apply(params, x), model.apply_norm(params, x)[0])
    given_stats = {"norm": {"mean": hidden.mean(0) + 1, "var": 4 * hidden.var(0)}}
    outputs, stats = model.apply_norm(params, x, stats=given_stats)
    assert_trees_close(stats, given_stats, rtol=0)
    np.testing.assert_allclose(
        outputs, expected_outputs(given_stats["norm"]["mean"], given_stats["norm"]["var"]), atol=1e-12
    )


def test_images_are_normalised_over_examples_and_space_by_equinox():
    eqx = pytest.importorskip("equinox")
    network = eqx.nn.Sequential([eqx.nn.BatchNorm(DIM, "batch", mode="batch", channelwise_affine=False)])
    model, x = jm.nn.as_model(network), np.random.default_rng(0).normal(size=(5, DIM, 3, 2))
    assert model.init(KEY, x) == {}
    outputs, stats = model.apply_norm({}, x)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    assert_trees_close(stats, {"layers": {"0": {"mean": mean, "var": var}}}, atol=1e-12)
    np.testing.assert_allclose(outputs, normalised(x, mean, var, (0, 2, 3), 1e-5), atol=1e-12)


# --- Parameters ------------------------------------------------------------------------------------


def framework_params(form, key):
    if form == "nnx":
        params = nnx.to_pure_dict(nnx.state(NNXNet(rngs=nnx.Rngs(key)), nnx.Param))
        return {"layers": {str(i): layer for i, layer in params["layers"].items()}}
    layers = equinox_net()(key).layers
    return {
        "layers": {str(i): {"weight": layer.weight, "bias": layer.bias} for i, layer in enumerate(layers)}
    }


@pytest.mark.parametrize("form", ["nnx", "equinox"])
def test_a_factory_is_initialised_by_the_key_and_a_module_by_its_weights(form):
    task = make_task()
    if form == "nnx":
        factory = jm.nn.from_nnx(lambda rngs: NNXNet(rngs=rngs))
        module = NNXNet(rngs=nnx.Rngs(7))
    else:
        factory = jm.nn.from_equinox(equinox_net())
        module = equinox_net()(jax.random.key(7))
    for seed in (1, 2):
        key = jax.random.key(seed)
        for network, expected in ((factory, key), (module, jax.random.key(7))):
            learner = make_learner(network)
            params = jax.jit(learner.init)(key, task)
            assert_trees_close(params, {"model": framework_params(form, expected)}, rtol=1e-6)
            shapes = jax.eval_shape(learner.init, key, task)
            assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    # Parameters are copies, so donating them does not delete the module's arrays.
    jax.tree.map(lambda leaf: leaf.delete(), jm.nn.as_model(module).init(KEY, task.support.x))
    assert_trees_close(jm.nn.as_model(module).init(KEY, task.support.x), params["model"], rtol=0)


@pytest.mark.parametrize("form", ["nnx", "equinox"])
def test_adapts_selects_leaves_by_path_and_checkpoints_restore_them(form, tmp_path):
    norm = form == "nnx"
    make, from_linen, _ = FORMS[form]
    learner = make_learner(make(norm, 0.0), norm="support", adapts=lambda path: path.startswith("layers/1/"))
    task, params = make_task(), {"model": from_linen(reference_params(norm))}
    adapted = jax.jit(learner.adapt)(params, task.support, KEY)
    assert max_difference(adapted["model"]["layers"]["0"], params["model"]["layers"]["0"]) == 0
    assert max_difference(adapted["model"]["layers"]["1"], params["model"]["layers"]["1"]) > 1e-3
    jm.save(tmp_path / "adapted", adapted)
    loaded = jm.load(tmp_path / "adapted")
    assert_trees_close(loaded, adapted, rtol=0)
    predict = jax.jit(learner.predict)
    np.testing.assert_array_equal(
        predict(params, loaded, task.query.x), predict(params, adapted, task.query.x)
    )


def test_nnx_module_of_the_user_is_left_unchanged():
    module = NNXNet(norm=True, rate=0.5, rngs=nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(module))
    learner = make_learner(module)
    jax.eval_shape(lambda key: learner.loss(learner.init(key, make_task()), make_task(), key), KEY)
    assert module.norm.momentum == 0.99
    assert (module.norm.use_running_average, module.dropout.deterministic) == (False, False)
    after = nnx.to_pure_dict(nnx.state(module))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(*map(str, (a, b))), after, before)


def test_an_equinox_module_can_take_a_batch():
    params, x = FORMS["equinox"][1](reference_params()), make_task().query.x
    model = jm.nn.from_equinox(equinox_net(rate=0.5, batched=True), batched=True)
    np.testing.assert_allclose(model.apply(params, x), plain_apply(reference_params(), x), atol=1e-12)
    assert max_difference(model.apply(params, x, key=KEY), model.apply(params, x)) > 0.1


def test_linen_networks_can_take_train_instead_of_deterministic():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            return linen.Dropout(0.5)(x, deterministic=not train)

    model, x = jm.nn.as_model(Net()), jnp.ones((8, 8))
    assert model.init(KEY, x) == {}
    np.testing.assert_array_equal(model.apply({}, x), x)
    assert set(np.unique(model.apply({}, x, key=KEY))) == {0.0, 2.0}


# --- Unsuitable networks ---------------------------------------------------------------------------


class Stateful(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=False, name="norm")(x)
        self.variable("batch_stats", "calls", lambda: jnp.zeros(()))
        return linen.SpectralNorm(linen.Dense(3, name="inner"), name="spectral")(x, update_stats=False)


class Unmasked(linen.Module):
    @linen.compact
    def __call__(self, x):
        return jm.nn.BatchNorm()(x)


class AlwaysStochastic(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dropout(0.5, deterministic=False)(x)


class WithContext(linen.Module):
    @linen.compact
    def __call__(self, x, context):
        return x + context


class Counting(nnx.Module):
    def __init__(self):
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += 1
        return x


class Whitening(nnx.Module):
    def __init__(self):
        self.covariance = nnx.BatchStat(jnp.eye(DIM))

    def __call__(self, x):
        return x @ self.covariance[...]


class Stochastic(nnx.Module):
    def __init__(self):
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x):
        return self.dropout(x)


def stateful_equinox():
    eqx = pytest.importorskip("equinox")
    spectral = eqx.nn.SpectralNorm(eqx.nn.Linear(DIM, DIM, key=KEY), "weight", key=KEY)
    return eqx.nn.Sequential([eqx.nn.BatchNorm(DIM, "batch", mode="batch"), spectral])


def stateless_equinox():
    """Return a network with a stateful layer whose `__call__` does not take the state."""
    eqx = pytest.importorskip("equinox")

    class WithoutState(eqx.Module):
        norm: eqx.nn.BatchNorm

        def __call__(self, x):
            return x

    return WithoutState(eqx.nn.BatchNorm(DIM, "batch", mode="batch"))


def state_not_returned_equinox():
    """Return a network that does not return its state."""
    eqx = pytest.importorskip("equinox")

    class StateNotReturned(eqx.Module):
        norm: eqx.nn.BatchNorm

        def __call__(self, x, state):
            return self.norm(x, state)[0]

    model = jm.nn.as_model(StateNotReturned(eqx.nn.BatchNorm(DIM, "batch", mode="batch")))
    return model._replace(init=lambda key, x: model.apply(model.init(key, x), x))


def two_axes_equinox():
    eqx = pytest.importorskip("equinox")
    return eqx.nn.Sequential([eqx.nn.BatchNorm(DIM, name, mode="batch") for name in ("batch", "examples")])


def stack_equinox():
    eqx = pytest.importorskip("equinox")
    return eqx.nn.Sequential(
        [eqx.filter_vmap(lambda _: eqx.nn.BatchNorm(DIM, "batch", mode="batch"))(jnp.arange(2))]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lambda x: x, "network: got the function"),
        (Stateful, "Stateful keeps mutable state: calls of the collection batch_stats, spectral/inner"),
        (AlwaysStochastic, "AlwaysStochastic draws random numbers where it should be deterministic"),
        (WithContext, r"WithContext.__call__ requires \['context'\]"),
        (Counting, r"Counting changes \[\('calls',\)\]"),
        (Whitening, r"Whitening keeps statistics in \[\('covariance',\)\]"),
        (Stochastic, "nnx.Dropout without a random stream"),
        (stateful_equinox, "Sequential keeps mutable state: layers/1/uv_index; "),
        (stateless_equinox, "WithoutState has an equinox.nn.BatchNorm, norm; its __call__ must take `state`"),
        (state_not_returned_equinox, r"StateNotReturned .* does not return the pair \(outputs, state\)"),
        (two_axes_equinox, r"axes of different names, \['batch', 'examples'\]"),
        (stack_equinox, r"layers/0 is a stack of equinox.nn.BatchNorm, with weights of shape \(2, 4\)"),
        (lambda: jm.nn.from_nnx(lambda rngs: LinenNet()), "a function that makes LinenNet"),
        (lambda: jm.nn.from_equinox(lambda key: key), "a function that makes"),
    ],
)  # fmt: skip
def test_unsuitable_networks_are_refused_at_init(make, message):
    with pytest.raises(ValueError, match=message):
        jm.nn.as_model(make()).init(KEY, jnp.zeros((2, DIM)))


def test_masks_for_normalising_networks_without_mask_are_refused():
    model, x = jm.nn.as_model(Unmasked()), jnp.ones((2, 3))
    params = model.init(jax.random.key(0), x)
    outputs, stats = model.apply_norm(params, x)
    assert outputs.shape == (2, 3)
    assert set(stats) == {"BatchNorm_0"}
    with pytest.raises(ValueError, match="must take `mask`"):
        model.apply_norm(params, x, mask=jnp.array([True, False]))


def test_flax_linen_batch_norm_is_refused_for_a_batch_shared_by_devices():
    model, x = jm.nn.as_model(FlaxNet(norm=True)), make_task().query.x
    params = model.init(KEY, x)
    with pytest.raises(ValueError, match=r"norm is a flax\.linen\.BatchNorm, .* use jaxmeta\.nn\.BatchNorm"):
        jax.vmap(lambda _: model.apply(params, x), axis_name=EXAMPLES)(jnp.arange(2))


def test_masks_for_nnx_batch_norm_without_mask_are_refused():
    module = nnx.BatchNorm(DIM, rngs=nnx.Rngs(0))
    network = nnx.Sequential(module)
    model, x = jm.nn.as_model(network), jnp.ones((2, DIM))
    with pytest.raises(ValueError, match=r"must take `mask` and pass it to nnx\.BatchNorm"):
        model.apply_norm(model.init(KEY, x), x, mask=jnp.array([True, False]))


def test_import_of_jaxmeta_imports_neither_nnx_nor_equinox():
    code = "import sys, jaxmeta; sys.exit(str({'equinox', 'flax.nnx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"
