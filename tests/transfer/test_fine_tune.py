"""What is frozen stays, what is trained moves as it should, and heads are those of scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from sklearn.linear_model import LogisticRegression, RidgeCV

import jaxmeta as jm
from jaxmeta.nn.stateful import as_stateful
from jaxmeta.transfer.heads import PENALTIES

KEY = jax.random.key(0)
X = np.asarray(jax.random.normal(KEY, (12, 6)))
DATA = jm.Batch(jnp.asarray(X), jnp.arange(12) % 3)


class Net(linen.Module):
    """Flax's own normalisation, with running averages, and dropout."""

    @linen.compact
    def __call__(self, x, train=False):
        for i in range(2):
            x = linen.Dense(8, name=f"dense{i}")(x)
            x = linen.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm{i}")(x)
            x = linen.Dropout(0.3, deterministic=not train)(jax.nn.relu(x))
        return x


BODIES = {"flax": Net(), "ours": jm.nn.MLP(out=8, hidden=(8, 8), norm=True)}
UPPER = {"flax": ["body/dense1", "body/norm1", "head"], "ours": ["body/Dense_1", "body/BatchNorm_1", "head"]}


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("optimizer", [optax.adamw(0.1, weight_decay=0.5), optax.sgd(0.1, momentum=0.9)])
def test_frozen_layers_keep_every_bit_through_ten_steps_and_the_others_move(kind, optimizer):
    model = jm.transfer.classifier(BODIES[kind], 3)
    variables = model.init(KEY, DATA.x)
    # A sum with zero would turn −0 into 0.
    lowest = next(path for path in jm.transfer.leaves_by_path(variables["params"]) if path.endswith("kernel"))
    kernel = jm.transfer.take_subtree(variables["params"], lowest).at[0, 0].set(-0.0)
    variables["params"] = jm.transfer.swap_subtree(variables["params"], lowest, kernel)
    fitted = jm.transfer.fine_tune(
        model, variables, DATA, train=UPPER[kind], optimizer=optimizer, steps=10, key=KEY, batch_size=6
    )
    layers = [pattern for pattern in UPPER[kind] if pattern != "head"]
    for collection, train in (("params", UPPER[kind]), ("batch_stats", layers[-1])):
        before, after = (
            jm.transfer.leaves_by_path(tree[collection]) for tree in (variables, fitted.variables)
        )
        trained = set(jm.transfer.matching(variables[collection], train))
        assert trained
        assert trained != set(before)
        for path, leaf in before.items():
            same = np.asarray(leaf).tobytes() == np.asarray(after[path]).tobytes()
            # The bias before a normalisation has no gradient, and is zero to begin with.
            assert same != (path in trained) or path.endswith(("dense1/bias", "Dense_1/bias")), path


def test_frozen_leaves_have_no_optimizer_state():
    params = {"body": {"w": jnp.ones((4, 4))}, "head": {"w": jnp.ones(3)}}
    state = jm.transfer.freeze(optax.adam(0.1), params, "head").init(params)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(state)) == [(), (3,), (3,)]


def test_a_frozen_layer_normalises_by_its_running_statistics_and_drops_nothing():
    model = as_stateful(Net())
    variables = model.init(KEY, DATA.x)
    variables["batch_stats"] = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    everything = jax.tree.map(lambda _: True, variables["params"])
    outputs, state = model.train(variables, DATA.x, KEY, frozen=everything)
    np.testing.assert_array_equal(outputs, model.apply(variables, DATA.x))
    np.testing.assert_array_equal(state["batch_stats"]["norm0"]["mean"], 0.5)


def test_training_leaves_the_running_averages_that_flax_leaves():
    model = as_stateful(Net())
    variables = model.init(KEY, DATA.x)
    outputs, state = model.train(variables, DATA.x, KEY)
    known, after = Net().apply(
        variables, DATA.x, train=True, rngs={"dropout": KEY, "params": KEY}, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(outputs, known, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state["batch_stats"], after["batch_stats"]
    )


def test_the_running_averages_of_our_normalisation_are_those_of_flax():
    ours, theirs = jm.nn.BatchNorm(), linen.BatchNorm(use_running_average=False, momentum=0.9)
    model = as_stateful(ours)
    _, state = model.train(model.init(KEY, DATA.x), DATA.x, KEY)
    _, known = theirs.apply(theirs.init(KEY, DATA.x), DATA.x, mutable=["batch_stats"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state["batch_stats"], known["batch_stats"]
    )


def test_slanted_triangular_rates_are_the_published_ones():
    rate = jm.transfer.slanted_triangular(1000)
    known = {0: 3.125e-4, 50: 5.15625e-3, 100: 0.01, 550: 5.15625e-3, 1000: 3.125e-4}
    for step, value in known.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-5)


def test_lower_groups_move_by_powers_of_the_decay():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2), "c": jnp.zeros(2)}
    optimizer = jm.transfer.discriminative(optax.sgd(1.0), params, ["a", "b", "c"])
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    np.testing.assert_allclose([updates[name][0] for name in "abc"], [-(2.6**-2), -1 / 2.6, -1], rtol=1e-6)
    with pytest.raises(ValueError, match=r"c is in none"):
        jm.transfer.discriminative(optax.sgd(1.0), params, ["a", "b"])


def test_l2_sp_pulls_what_is_shared_to_its_start_and_what_is_new_to_zero(x64):
    start = {"body": jnp.array([1.0, -2.0]), "head": jnp.array([3.0])}
    penalty = jm.transfer.l2_sp(start, shared="body", alpha=0.1, beta=0.01)
    gradient = jax.grad(penalty)(start)
    np.testing.assert_array_equal(gradient["body"], 0)
    np.testing.assert_allclose(gradient["head"], 0.03)
    moved = {"body": start["body"] + 2, "head": start["head"]}
    np.testing.assert_allclose(penalty(moved), 0.05 * 8 + 0.005 * 9)


@pytest.mark.parametrize("shape", [(40, 5), (9, 20)])
def test_the_ridge_head_is_scikit_learns_with_leave_one_out(shape, x64):
    z = np.asarray(jax.random.normal(KEY, shape)) + 3.0
    y = np.arange(shape[0]) % 3
    head = jm.transfer.ridge_head(z, y, 3)
    unit = np.square(np.linalg.svd(z - z.mean(0), compute_uv=False)).mean()
    known = RidgeCV(alphas=unit * np.array(PENALTIES)).fit(z, np.eye(3)[y])
    np.testing.assert_allclose(head["kernel"], known.coef_.T, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(head["bias"], known.intercept_, rtol=1e-6, atol=1e-8)


def test_the_logistic_head_is_scikit_learns_with_weights(x64):
    z = 5 * np.asarray(jax.random.normal(KEY, (60, 4))) + 7.0
    y = np.asarray(jax.random.randint(jax.random.key(1), (60,), 0, 3))
    weights = np.linspace(0.5, 1.5, 60)
    head = jm.transfer.logistic_head(z, y, 3, penalty=0.01, weights=weights, tolerance=1e-9)
    known = LogisticRegression(C=1 / (60 * 0.01), tol=1e-10, max_iter=10000).fit(z, y, weights)
    np.testing.assert_allclose(head["kernel"], known.coef_.T, atol=1e-5)
    centred = head["bias"] - head["bias"].mean()
    np.testing.assert_allclose(centred, known.intercept_ - known.intercept_.mean(), atol=1e-4)


def test_feature_extraction_changes_the_head_alone():
    model = jm.transfer.classifier(BODIES["ours"], 3)
    variables = model.init(KEY, DATA.x)
    found = jm.transfer.feature_extraction(model, variables, DATA, head="ridge")
    assert found["batch_stats"] is variables["batch_stats"]
    for a, b in zip(*(jax.tree.leaves(v["params"]["body"]) for v in (found, variables)), strict=True):
        assert a is b


@pytest.mark.parametrize("norm", ["separate", "joint"])
@pytest.mark.parametrize("name", ["coral", "mmd", "dann"])
def test_alignment_in_pieces_is_alignment_in_one_go(norm, name):
    alignment = {"coral": jm.transfer.coral(), "mmd": jm.transfer.mmd(), "dann": jm.transfer.dann()}[name]
    model = jm.transfer.classifier(BODIES["ours"], 3)
    settings = {"optimizer": optax.sgd(0.1), "steps": 6, "key": KEY, "norm": norm, "batch_size": 4}
    arguments = (model, model.init(KEY, DATA.x), DATA, 2 * X + 1, alignment)
    whole = jm.transfer.align(*arguments, **settings)
    seen = []
    pieces = jm.transfer.align(*arguments, **settings, every=2, look=lambda step, found: seen.append(step))
    assert seen == [2, 4, 6]
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_array_equal(a, b)
    differ = any(
        (a != b).any()
        for a, b in zip(
            *(jax.tree.leaves(v["batch_stats"]) for v in (whole.source, whole.target)), strict=True
        )
    )
    assert differ == (norm == "separate")


def test_bad_input_is_refused_by_name():
    model = jm.transfer.classifier(BODIES["ours"], 3)
    variables = model.init(KEY, DATA.x)
    settings = {"optimizer": optax.sgd(0.1), "steps": 1, "key": KEY}
    with pytest.raises(ValueError, match="train"):
        jm.transfer.fine_tune(model, variables, DATA, train="nothing*", **settings)
    with pytest.raises(ValueError, match="data: got 12 examples and 2 labels"):
        jm.transfer.fine_tune(model, variables, jm.Batch(DATA.x, DATA.y[:2]), **settings)
    with pytest.raises(ValueError, match="steps"):
        jm.transfer.fine_tune(model, variables, DATA, **{**settings, "steps": 0})
    with pytest.raises(ValueError, match="1 class"):
        jm.transfer.ridge_head(X, np.zeros(12, np.int32), 3)
    with pytest.raises(ValueError, match="norm"):
        jm.transfer.align(model, variables, DATA, X, jm.transfer.coral(), norm="both", **settings)
    with pytest.raises(FloatingPointError, match="smaller step size"):
        jm.transfer.fine_tune(model, variables, DATA, optimizer=optax.sgd(jnp.inf), steps=3, key=KEY)
