"""Fine-tuning compared with a plain loop of Flax and optax, and the recipes built on it."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from scipy.special import log_softmax
from variables import assert_close, initialised, record_keys, same_bits

import jaxmeta as jm
from jaxmeta.transfer import (
    classifier,
    extract_features,
    feature_extraction,
    fine_tune,
    fine_tuning_probe,
    gradual_unfreezing,
    l2_sp,
    linear_probe_then_fine_tune,
    logistic_head,
    ridge_head,
)

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(20, 6)), jnp.float32)
Y = jnp.asarray(np.arange(20) % 3, jnp.int32)
DATA = jm.Batch(X, Y)
INIT = linen.initializers.lecun_normal()


# Tests that use the same optimizer object and settings share a compiled training.
MOMENTUM = {"optimizer": optax.sgd(0.1, momentum=0.9), "steps": 7, "key": KEY, "batch_size": 6}
PLAIN = {"optimizer": optax.sgd(0.3), "steps": 5, "key": KEY, "batch_size": 100}


class FlaxNet(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        for i in range(2):
            x = linen.Dense(8, use_bias=False, name=f"dense{i}")(x)
            x = linen.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm{i}")(x)
            x = jax.nn.relu(x)
        return x


class Whole(linen.Module):
    """The classifier of a `FlaxNet` as one plain Flax network."""

    @linen.compact
    def __call__(self, x, train=False):
        return linen.Dense(3, name="head")(FlaxNet(name="body")(x, train))


@pytest.fixture(scope="module")
def flax():
    model = classifier(FlaxNet(), 3)
    return model, initialised(model, X, 1)


@pytest.fixture(scope="module")
def smooth():
    """Return a model without normalisation, whose loss is a mean over examples."""
    model = classifier(jm.nn.MLP(out=5, hidden=(8,), kernel_init=INIT), 3)
    return model, initialised(model, X, 1)


class Spy:
    """A loss that records the examples of each batch, with the examples' numbers as labels."""

    def __init__(self):
        self.batches, self.traces = [], 0

    def __call__(self, outputs, numbers):
        self.traces += 1
        jax.debug.callback(lambda fitted: self.batches.append(np.asarray(fitted)), numbers, ordered=True)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, Y[numbers])


# --- The loop -------------------------------------------------------------------------------------


def test_fine_tuning_equals_a_plain_loop_of_flax_and_optax_on_the_same_batches(flax):
    model, variables = flax
    spy, optimizer = Spy(), optax.adamw(0.01, weight_decay=0.1)
    numbers = jnp.arange(20, dtype=jnp.int32)
    fitted = fine_tune(
        model, variables, jm.Batch(X, numbers), loss=spy, optimizer=optimizer, steps=6, batch_size=8, key=KEY
    )
    jax.effects_barrier()
    assert len(spy.batches) == 6
    # Each epoch has two batches without repeated examples; the four left over differ between epochs.
    epochs = [np.concatenate(spy.batches[i : i + 2]) for i in (0, 2, 4)]
    assert all(len(np.unique(epoch)) == 16 for epoch in epochs)
    assert len({tuple(np.setdiff1d(np.arange(20), epoch)) for epoch in epochs}) == 3

    params, stats = variables["params"], {name: tree for name, tree in variables["batch_stats"].items()}
    state, losses = optimizer.init(params), []

    @jax.jit
    def step(params, stats, state, x, y):
        def loss(params):
            logits, updated = Whole().apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            log_probabilities = jax.nn.log_softmax(logits)
            return -log_probabilities[jnp.arange(8), y].mean(), updated["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state, value

    for batch in spy.batches:
        params, stats, state, value = step(params, stats, state, X[batch], Y[batch])
        losses.append(value)
    assert_close(fitted.losses, np.array(losses), 1e-6)
    assert_close(fitted.variables, {"params": params, "batch_stats": stats}, 1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "body",
    [jm.nn.MLP(out=4, hidden=()), pytest.param(jm.nn.Conv4(filters=4), marks=pytest.mark.nightly)],
    ids=["mlp", "conv4"],
)
def test_bytes_are_scaled_to_zero_to_one(body):
    model = classifier(body, 3)
    x = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 1), np.uint8)
    variables = initialised(model, np.zeros((2, 16, 16, 1), np.float32))
    settings = {"optimizer": optax.sgd(0.1), "steps": 4, "key": KEY, "batch_size": 5}
    fitted = [
        fine_tune(model, variables, jm.Batch(inputs, Y[:12]), **settings)
        for inputs in (x, (x / 255).astype(np.float32))
    ]
    assert_close(*fitted, 1e-5)


def test_weights_count_as_repetitions(smooth):
    model, variables = smooth
    counts = np.array([*[0, 1, 2] * 6, 1, 1])
    rows = np.repeat(np.arange(20), counts)
    weighted = fine_tune(model, variables, DATA, weights=counts.astype(float), **PLAIN)
    repeated = fine_tune(model, variables, jm.Batch(X[rows], Y[rows]), **PLAIN)
    assert_close(weighted, repeated, 1e-5)
    assert not np.allclose(weighted.losses, fine_tune(model, variables, DATA, **PLAIN).losses, rtol=1e-3)


def test_a_penalty_is_added_and_an_augmentation_is_new_in_each_step(smooth):
    model, variables = smooth
    settings = {"optimizer": optax.sgd(0.0), "steps": 3, "key": KEY, "batch_size": 20}
    plain = fine_tune(model, variables, DATA, **settings).losses
    np.testing.assert_allclose(plain, plain[0], rtol=1e-5)
    penalised = fine_tune(
        model, variables, DATA, penalty=lambda params: 2 * params["head"]["kernel"].sum(), **settings
    )
    np.testing.assert_allclose(
        penalised.losses - plain, 2 * variables["params"]["head"]["kernel"].sum(), rtol=1e-4
    )
    keys, augment = record_keys()
    noisy = fine_tune(
        model,
        variables,
        DATA,
        augment=lambda key, x: augment(key, x) + jax.random.normal(key, x.shape),
        **settings,
    ).losses
    assert len({float(loss) for loss in noisy}) == 3
    assert len(set(keys())) == len(keys()) == 3


@pytest.mark.nightly
def test_a_deterministic_augmentation_equals_training_on_augmented_data(smooth):
    model, variables = smooth
    settings = {"optimizer": optax.sgd(0.0), "steps": 3, "key": KEY, "batch_size": 20}
    twice = fine_tune(model, variables, DATA, augment=lambda key, x: 2 * x, **settings).losses
    known = fine_tune(model, variables, jm.Batch(2 * X, Y), **settings).losses
    np.testing.assert_allclose(twice, known, rtol=1e-6)


def test_regression_has_targets_of_any_width_and_is_reported_twenty_times():
    model = classifier(jm.nn.MLP(out=5, hidden=(8,), kernel_init=INIT), 2)
    targets = jnp.asarray(3 * np.asarray(X)[:, :2] + 1)
    reports = []
    fitted = fine_tune(
        model,
        initialised(model, X),
        jm.Batch(X, targets),
        loss=lambda outputs, y: jnp.square(outputs - y).mean(1),
        optimizer=optax.adam(0.03),
        steps=310,
        key=KEY,
        report=lambda step, loss: reports.append(step),
    )
    assert fitted.losses[-1] < 0.05 < 5 < fitted.losses[0]
    # About 20 reports, and one at the end.
    assert reports == [*range(16, 310, 16), 310]


def test_training_depends_on_the_key_and_not_on_its_pieces(flax):
    model, variables = flax
    settings = MOMENTUM
    whole = fine_tune(model, variables, DATA, **settings)
    assert same_bits(whole, fine_tune(model, variables, DATA, **settings))
    reports, seen = [], []
    pieces = fine_tune(
        model, variables, DATA, **settings, every=3,
        report=lambda step, loss: reports.append((step, loss)),
        callback=lambda step, variables: seen.append((step, variables)),
    )  # fmt: skip
    assert same_bits(whole, pieces)
    assert reports == [(step, float(whole.losses[step - 1])) for step in (3, 6, 7)]
    assert [step for step, _ in seen] == [3, 6, 7]
    assert same_bits(seen[-1][1], whole.variables)
    three = fine_tune(model, variables, DATA, **{**settings, "steps": 3})
    assert_close(seen[0][1], three.variables, 1e-6)
    other = fine_tune(model, variables, DATA, **{**settings, "key": jax.random.key(5)})
    assert not np.array_equal(other.losses, whole.losses)


@pytest.mark.nightly
def test_repeated_training_compiles_nothing_new(smooth):
    model, variables = smooth
    spy, optimizer = Spy(), optax.adam(0.1)
    numbers = jm.Batch(X, jnp.asarray(np.arange(20), jnp.int32))

    def run(seed, alpha, **more):
        start = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(seed), variables["params"])
        settings = {"loss": spy, "optimizer": optimizer, "steps": 6, "key": jax.random.key(seed), **more}
        fine_tune(model, {"params": start}, numbers, penalty=l2_sp(start, alpha=alpha), **settings)
        return spy.traces

    first = run(0, 0.1)
    assert first > 0
    # Other values of all arrays, and pieces of other lengths.
    assert run(1, 0.2) == run(2, 0.3, every=1, report=lambda *_: None) == run(3, 0.1, every=4) == first
    assert run(4, 0.1, batch_size=7) > first


@pytest.mark.nightly
def test_double_precision_is_kept(x64):
    model = classifier(jm.nn.MLP(out=5, hidden=(8,), norm=True), 3)
    double = jm.Batch(jnp.asarray(np.asarray(X, np.float64)), Y)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), initialised(model, double.x)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = fine_tune(model, variables, double, optimizer=optax.sgd(0.1), steps=3, key=KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(fitted)} == {jnp.dtype("float64")}


# --- Bodies of other kinds ------------------------------------------------------------------------


class NNXBody(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(6, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(jax.nn.relu(self.norm(self.linear(x))))


def equinox_body():
    eqx = pytest.importorskip("equinox")
    return eqx.nn.MLP(6, 8, 8, 1, key=KEY)


def plain_body():
    return (
        lambda key, x: [jax.random.normal(key, (x.shape[1], 8)), jnp.zeros(8)],
        lambda params, x: jnp.tanh(x @ params[0] + params[1][None]),
    )


KINDS = pytest.mark.parametrize(
    "body", [lambda: NNXBody(nnx.Rngs(0)), equinox_body, plain_body], ids=["nnx", "equinox", "functions"]
)


@pytest.mark.nightly_rows(after=1)
@KINDS
def test_a_frozen_body_of_another_kind_is_in_inference_and_unchanged(body):
    model = classifier(body(), 3)
    variables = initialised(model, X)
    optimizer = optax.adamw(0.05, weight_decay=0.5)
    probed = fine_tune(model, variables, DATA, train="head", optimizer=optimizer, steps=10, key=KEY)
    # A completely frozen body is in inference mode, so that its features do not change.
    assert same_bits(probed.variables["params"]["body"], variables["params"]["body"])
    assert same_bits(probed.variables.get("batch_stats", {}), variables.get("batch_stats", {}))
    features = np.asarray(extract_features(model, variables, X))
    head = jax.device_get(variables["params"]["head"])
    known = -log_softmax(features @ head["kernel"] + head["bias"], axis=1)[np.arange(20), Y].mean()
    np.testing.assert_allclose(probed.losses[0], known, rtol=1e-5)


@pytest.mark.nightly
@KINDS
def test_bodies_of_other_kinds_are_trained(body):
    model = classifier(body(), 3)
    variables = initialised(model, X)
    optimizer = optax.adamw(0.05, weight_decay=0.5)
    fitted = fine_tune(model, variables, DATA, optimizer=optimizer, steps=100, key=KEY).variables
    unmoved = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (fitted, variables)), strict=True)]
    # The gradient of a bias before a normalisation is zero up to rounding.
    assert sum(unmoved) <= ("batch_stats" in variables)
    assert jm.transfer.accuracy(model, fitted, DATA) > 0.8


# --- Recipes --------------------------------------------------------------------------------------


def test_feature_extraction_fits_the_head_on_inference_features_and_changes_nothing_else(flax):
    model, variables = flax
    stats = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.5), variables["batch_stats"])
    variables = {**variables, "batch_stats": jax.tree.map(jnp.asarray, stats)}
    features = jax.jit(model.features.apply)(variables, X)

    def custom(features, labels, classes, *, value):
        assert features.shape == (20, 8)
        assert classes == 3
        return {"kernel": jnp.full((8, 3), value), "bias": jnp.zeros(3)}

    for settings, expected in (
        ({"head": "ridge", "penalty": 0.1}, ridge_head(features, Y, 3, penalty=0.1)),
        ({"penalty": 0.1}, logistic_head(features, Y, 3, penalty=0.1)),
        ({"head": custom, "value": 2.0}, custom(features, Y, 3, value=2.0)),
    ):
        fitted = feature_extraction(model, variables, DATA, **settings)
        assert_close(fitted["params"]["head"], expected, 1e-4)
        assert fitted["batch_stats"] is variables["batch_stats"]
        bodies = (tree["params"]["body"] for tree in (fitted, variables))
        assert all(a is b for a, b in zip(*map(jax.tree.leaves, bodies), strict=True))


def test_progress_of_a_probe_counts_measured_and_all_examples(flax):
    model, variables = flax
    n, calls = len(Y), []
    settings = {"key": KEY, "batch_size": 8}
    count = lambda done, total: calls.append((done, total))  # noqa: E731
    probe = fine_tuning_probe(model, variables, DATA, progress=count, probe={"batch": 10}, **settings)
    total = 50 * 8 + n  # 50 mini-batches are measured
    assert {each for _, each in calls} == {total}
    done = [each for each, _ in calls]
    assert done == sorted(set(done))
    assert done[-1] == total
    assert [each for each in done if each > 50 * 8] == [
        50 * 8 + min(10 * k, n) for k in range(1, -(-n // 10) + 1)
    ]
    assert same_bits(probe, fine_tuning_probe(model, variables, DATA, probe={"batch": 10}, **settings))
    calls.clear()
    fine_tuning_probe(model, variables, DATA, progress=count, keep_statistics=True, **settings)
    assert calls == [(n, n)]


def test_lp_ft_is_fine_tuning_from_a_probed_head(flax, smooth):
    for (model, variables), probe, settings in (
        (flax, {"head": "ridge", "penalty": 0.1}, MOMENTUM),
        (smooth, None, PLAIN),
    ):
        fitted = linear_probe_then_fine_tune(model, variables, DATA, probe=probe, **settings)
        probed = fine_tuning_probe(model, variables, DATA, probe=probe, **settings)
        assert same_bits(fitted, fine_tune(model, probed, DATA, **settings))
        assert not same_bits(probed["params"]["body"], fitted.variables["params"]["body"])
    assert same_bits(probed, feature_extraction(model, variables, DATA))
    # Without normalisation, training starts with the probe's features and so with a low loss.
    assert fitted.losses[0] < fine_tune(model, variables, DATA, **settings).losses[0]


def test_each_stage_of_gradual_unfreezing_has_its_own_keys(smooth):
    model, variables = smooth
    keys, augment = record_keys()
    groups, settings = ["body/*", "head"], {"stage_steps": 10, "key": KEY, "batch_size": 20}
    gradual_unfreezing(model, variables, DATA, groups, augment=augment, **settings)
    assert len(set(keys())) == len(keys()) == 20


def test_gradual_unfreezing_goes_from_the_top_to_the_bottom(flax):
    model, variables = flax
    groups = ["body/*0", ["body/dense1", "body/norm1"], "head"]
    schedules, seen, reports = [], [variables], []

    def optimizer(schedule):
        schedules.append(schedule)
        return optax.sgd(schedule)

    fitted = gradual_unfreezing(
        model, variables, DATA, groups, optimizer=optimizer, rate=0.2, stage_steps=10, last_steps=20, key=KEY,
        every=20, callback=lambda step, variables: seen.append(variables),
        report=lambda step, loss: reports.append(step),
    )  # fmt: skip
    assert reports == [10, 10, 20]
    assert fitted.losses.shape == (40,)
    # Each stage's rate increases for a tenth of its steps, and starts and ends low.
    np.testing.assert_allclose([s(0) for s in schedules], 0.2 / 32, rtol=1e-6)
    np.testing.assert_allclose(
        [schedules[0](1), schedules[2](2), schedules[2](20)], [0.2, 0.2, 0.2 / 32], rtol=1e-6
    )
    for stage, (before, after) in enumerate(itertools.pairwise(seen)):
        for lower, names in enumerate([["dense0", "norm0"], ["dense1", "norm1"]]):
            moves = lower >= 2 - stage
            for name in names:
                pairs = zip(
                    *(jax.tree.leaves(tree["params"]["body"][name]) for tree in (before, after)), strict=True
                )
                assert all(np.array_equal(a, b) != moves for a, b in pairs), (stage, name)
            stats = (tree["batch_stats"]["body"][names[1]] for tree in (before, after))
            assert same_bits(*stats) != moves
        assert not same_bits(before["params"]["head"], after["params"]["head"])
    assert same_bits(seen[-1], fitted.variables)


# --- Bad input ------------------------------------------------------------------------------------


def test_bad_arguments_are_rejected_with_their_name(flax):
    model, variables = flax
    settings = {"optimizer": optax.sgd(0.1), "steps": 2, "key": KEY}
    for arguments, message in (
        ({"train": "haed"}, "train: 'haed' matches nothing; .*head"),
        ({"data": jm.Batch(X, Y[:2])}, "data: got 20 examples and 2 labels"),
        ({"data": jm.Batch(X[:0], Y[:0])}, "data: got 0 examples"),
        ({"data": jm.Batch(X, Y, mask=Y > 0)}, "data: got a mask"),
        ({"weights": np.ones(3, np.float32)}, r"weights: got shape \(3,\) for 20 examples"),
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"every": 0}, "every: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fine_tune(model, variables, **{"data": DATA, **settings, **arguments})
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan in step 1, which no step size can .*debug"
    ):
        fine_tune(model, variables, jm.Batch(jnp.inf * X, Y), **MOMENTUM)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) in step [2-7]; try a smaller step"):
        fine_tune(model, variables, DATA, **{**MOMENTUM, "optimizer": optax.sgd(1e38)})
    with pytest.raises(ValueError, match="head: got 'best'; it must be one of 'logistic', 'ridge'"):
        feature_extraction(model, variables, DATA, head="best")
    for groups, message in (([], "groups: got none"), (["body", "haed"], "train: 'haed' matches nothing")):
        with pytest.raises(ValueError, match=message):
            gradual_unfreezing(model, variables, DATA, groups, stage_steps=10, key=KEY)
    with pytest.raises(ValueError, match="stage_steps: got 9"):
        gradual_unfreezing(model, variables, DATA, ["body", "head"], stage_steps=9, key=KEY)


# --- Probes with the statistics of fine-tuning ----------------------------------------------------

SHIFTED = jm.Batch(0.1 * X + 2.0, Y)
BODIES = {
    "flax": FlaxNet,
    "ours": lambda: jm.nn.MLP(out=None, hidden=(8, 8), norm=True, kernel_init=INIT),
    "nnx": lambda: NNXBody(nnx.Rngs(0)),
}


def adapted_model(body):
    """Return a model, and variables with the running statistics of `X`, which are not those of `SHIFTED`."""
    model = classifier(BODIES[body](), 3)
    return model, jm.transfer.adabn(model, initialised(model, X, 1), X)


@pytest.mark.nightly_rows(after=3)
@pytest.mark.parametrize(("keep", "batch_size"), [(True, 6), (False, 100), (False, 10)])
@pytest.mark.parametrize("body", ["flax", "ours", "nnx"])
def test_lp_ft_at_a_tiny_rate_stays_at_the_probe(body, keep, batch_size):
    model, variables = adapted_model(body)
    settings = {"key": KEY, "batch_size": batch_size, "keep_statistics": keep}
    probe = fine_tuning_probe(model, variables, SHIFTED, **settings, probe={"penalty": 1e-4})
    settings |= {"optimizer": optax.sgd(1e-9), "steps": 80, "probe": {"penalty": 1e-4}}
    fitted = linear_probe_then_fine_tune(model, variables, SHIFTED, **settings)
    before, after = (model.apply(tree, SHIFTED.x) for tree in (probe, fitted.variables))
    exact = keep or batch_size > len(Y)
    # With mini-batches, a running average covers mainly the last of them.
    assert_close(after, before, (1e-3 if exact else 0.15) * float(jnp.abs(before).max()))
    assert same_bits(fitted.variables["batch_stats"], variables["batch_stats"]) == keep
    assert same_bits(probe["batch_stats"], variables["batch_stats"]) == keep
    if exact and body != "nnx":  # which has dropout in training
        known = -log_softmax(np.asarray(before), axis=1)[np.arange(20), Y].mean()
        np.testing.assert_allclose(fitted.losses.mean(), known, rtol=0.05 if batch_size < len(Y) else 1e-3)


def test_a_probe_has_the_statistics_of_a_whole_batch():
    """A whole batch gives the statistics of AdaBN, layer by layer, whatever a layer's momentum is."""
    model, variables = adapted_model("flax")
    probe = fine_tuning_probe(model, variables, SHIFTED, key=KEY, batch_size=20)
    assert_close(probe["batch_stats"], jm.transfer.adabn(model, variables, SHIFTED.x)["batch_stats"], 1e-4)
    slow = classifier(jm.nn.MLP(out=None, hidden=(8,), norm=True, kernel_init=INIT), 3, momentum=0.999)
    variables = initialised(slow, X, 1)
    probe = fine_tuning_probe(slow, variables, SHIFTED, key=KEY, batch_size=20)
    assert_close(probe["batch_stats"], jm.transfer.adabn(slow, variables, SHIFTED.x)["batch_stats"], 1e-3)


def test_a_probe_keeps_the_statistics_of_layers_that_are_not_trained():
    model, variables = adapted_model("flax")
    train = ["body/dense1", "body/norm1", "head"]
    probe = fine_tuning_probe(model, variables, SHIFTED, key=KEY, batch_size=100, train=train)
    stats, before = (jax.device_get(tree["batch_stats"]["body"]) for tree in (probe, variables))
    assert same_bits(stats["norm0"], before["norm0"])
    # By hand: the first layer keeps its statistics, and the second is measured on its outputs.
    body = jax.device_get(variables["params"]["body"])
    hidden = np.asarray(SHIFTED.x) @ body["dense0"]["kernel"]
    hidden = (hidden - before["norm0"]["mean"]) / np.sqrt(before["norm0"]["var"] + 1e-5)
    entering = np.maximum(hidden, 0) @ body["dense1"]["kernel"]
    assert_close(stats["norm1"], {"mean": entering.mean(0), "var": entering.var(0)}, 1e-4)
    fitted = fine_tune(
        model, probe, SHIFTED, key=KEY, batch_size=100, train=train, optimizer=optax.sgd(1e-9), steps=20
    )
    assert_close(model.apply(fitted.variables, SHIFTED.x), model.apply(probe, SHIFTED.x), 1e-3)


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("body", BODIES)
def test_kept_statistics_normalise_in_training_and_do_not_change(body):
    model, variables = adapted_model(body)
    settings = {"optimizer": optax.sgd(0.05), "steps": 10, "key": KEY, "batch_size": 1}
    fitted = fine_tune(model, variables, SHIFTED, keep_statistics=True, **settings)
    assert same_bits(fitted.variables["batch_stats"], variables["batch_stats"])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), fitted.variables["params"], variables["params"])
    assert all(jax.tree.leaves(moved["body"]))


def test_gradual_unfreezing_may_keep_statistics(flax):
    model, variables = flax
    fitted = gradual_unfreezing(
        model, variables, SHIFTED, ["body", "head"], stage_steps=10, key=KEY, keep_statistics=True
    )
    assert same_bits(fitted.variables["batch_stats"], variables["batch_stats"])
