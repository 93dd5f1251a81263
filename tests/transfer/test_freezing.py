"""Frozen leaves, learning rates by layer and by step, and L2-SP."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from variables import initialised

import jaxmeta as jm
from jaxmeta.transfer import discriminative, freeze, frozen_mask, l2_sp, leaves_by_path, slanted_triangular
from jaxmeta.transfer.freezing import apply_unfrozen, layer_labels

KEY = jax.random.key(0)
OPTIMIZERS = {
    "adamw": optax.adamw(0.03, weight_decay=0.5),
    "sgd": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.9)),
}

# --- Freezing -------------------------------------------------------------------------------------


class FlaxNet(linen.Module):
    """A network with Flax's batch normalisation and dropout."""

    @linen.compact
    def __call__(self, x, train=False):
        for i in range(2):
            x = linen.Dense(8, use_bias=False, name=f"dense{i}")(x.reshape(x.shape[0], -1))
            x = linen.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm{i}")(x)
            x = linen.Dropout(0.3, deterministic=not train)(jax.nn.relu(x))
        return x


# Network, trained layers, and their leaves with a zero gradient: biases before a normalisation.
BODIES = {
    "flax": (FlaxNet(), ["dense1", "norm1"], ()),
    "jaxmeta": (jm.nn.Conv4(filters=4), ["ConvNorm_2", "ConvNorm_3"], ("ConvNorm_2/bias", "ConvNorm_3/bias")),
}


def bits(leaf):
    return np.asarray(leaf).tobytes()


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize(
    ("body", "optimizer", "upper"),
    [
        ("flax", "adamw", True),
        ("flax", "sgd", False),
        ("flax", "adamw", False),
        ("flax", "sgd", True),
        *(("jaxmeta", optimizer, upper) for optimizer in OPTIMIZERS for upper in (False, True)),
    ],
)
def test_training_changes_no_bit_of_frozen_leaves_and_every_other_leaf(body, optimizer, upper):
    network, trained_layers, without_gradient = BODIES[body]
    model = jm.transfer.classifier(network, 3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(24, 16, 16, 1)), jnp.float32)
    data = jm.Batch(x, jnp.asarray(np.arange(24) % 3))
    variables = jax.tree.map(np.array, initialised(model, x, 1))
    for leaf in jax.tree.leaves(variables):
        leaf[(0,) * leaf.ndim] = -0.0  # adding zero would lose the sign
    for leaf in jax.tree.leaves(variables["batch_stats"]):
        leaf[1] = 1.3
    variables = jax.tree.map(jnp.asarray, variables)
    train = ["head"] + [f"body/{layer}" for layer in trained_layers if upper]
    fitted = jm.transfer.fine_tune(
        model, variables, data, train=train, optimizer=OPTIMIZERS[optimizer], steps=10, batch_size=8, key=KEY
    )
    before, after = leaves_by_path(variables), leaves_by_path(fitted.variables)
    assert before.keys() == after.keys()
    kept = {path for path in before if bits(before[path]) == bits(after[path])}
    trained = {
        path for path in before if any(path.split("/", 1)[1].startswith(f"{layer}/") for layer in train)
    }
    assert {path for path in trained if path.startswith("batch_stats")} or not upper
    constant = {path for path in trained if path.endswith(without_gradient)} if without_gradient else set()
    assert before.keys() - trained <= kept
    assert not (kept & trained) - constant


def test_frozen_leaves_have_no_optimizer_state_no_decay_and_no_part_in_the_norm_of_the_gradient():
    params = {"body": {"w": jnp.ones((4, 4)), "b": jnp.ones(2)}, "head": {"w": jnp.arange(3.0)}}
    grads = jax.tree.map(jnp.ones_like, params)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.5))
    optimizer = freeze(inner, params, "head")
    state, known = optimizer.init(params), inner.init(params["head"])
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [leaf.shape for leaf in jax.tree.leaves(known)]
    updates, _ = jax.jit(optimizer.update)(grads, state, params)
    np.testing.assert_array_equal(updates["body"]["w"], 0)
    alone, _ = jax.jit(inner.update)(grads["head"], known, params["head"])
    np.testing.assert_allclose(updates["head"]["w"], alone["w"], rtol=1e-6)
    for leaf in jax.tree.leaves(freeze(optax.adam(0.1), params, "**").init(params)):
        assert leaf.shape in {(), (4, 4), (2,), (3,)}


def test_frozen_leaves_keep_their_bits_and_others_their_dtype():
    odd = np.array([0x80000000, 0x7FC00001, 0x00000001], np.uint32).view(np.float32)  # −0, a NaN, a denormal
    params = {"still": jnp.asarray(odd), "moving": jnp.asarray([1.0, 2.0], jnp.bfloat16)}
    updates = {"still": jnp.zeros(3), "moving": jnp.array([0.5, 0.5])}
    frozen = frozen_mask(params, "moving")
    actual = jax.jit(lambda params, updates: apply_unfrozen(params, updates, frozen))(params, updates)
    assert bits(actual["still"]) == odd.tobytes()
    assert actual["moving"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual["moving"].astype(float), [1.5, 2.5])


def test_patterns_that_match_nothing_are_rejected():
    params = {"body": {"w": 0.0}, "head": {"w": 0.0}}
    assert frozen_mask(params, ["**/w"]) == {"body": {"w": False}, "head": {"w": False}}
    assert frozen_mask(params, []) == {"body": {"w": True}, "head": {"w": True}}
    for function in (lambda: frozen_mask(params, "haed"), lambda: freeze(optax.sgd(1.0), params, "haed")):
        with pytest.raises(ValueError, match=r"train: 'haed' matches nothing; the closest paths are .*head"):
            function()


# --- Rates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [optax.sgd(0.3), optax.adam(0.3), optax.adamw(0.3, weight_decay=0.2)])
def test_updates_of_lower_groups_are_scaled_by_powers_of_the_decay(optimizer, x64):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=3)) for name in ("stem", "middle", "top")}
    groups = ["stem", ["middle"], "top"]
    scaled = discriminative(optimizer, params, groups, decay=2.6)
    assert layer_labels(params, groups) == {"stem": 0, "middle": 1, "top": 2}
    state, plain_state = scaled.init(params), optimizer.init(params)
    for _ in range(3):
        grads = {name: jnp.asarray(rng.normal(size=3)) for name in params}
        updates, state = scaled.update(grads, state, params)
        plain, plain_state = optimizer.update(grads, plain_state, params)
        for k, name in enumerate(["top", "middle", "stem"]):
            np.testing.assert_allclose(updates[name], plain[name] * 2.6**-k, rtol=1e-12)


def test_discriminative_rates_work_with_frozen_layers():
    params = {"stem": jnp.ones(2), "middle": jnp.ones(2), "top": jnp.ones(2)}
    optimizer = freeze(discriminative(optax.sgd(1.0), params, list(params)), params, ["middle", "top"])
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    np.testing.assert_allclose([updates[name][0] for name in params], [0, -1 / 2.6, -1], rtol=1e-6)


def test_every_leaf_must_be_in_exactly_one_group():
    params = {"stem": {"w": jnp.ones(2)}, "top": {"w": jnp.ones(2), "b": jnp.ones(2)}}
    for groups, message in (
        (["stem", "top/w"], r"groups: every leaf must be in exactly one group; top/b is in none"),
        (["stem", "top", "**/b"], r"top/b is in \[1, 2\]"),
        (["stem", "top", "roof"], r"groups\[2\]: 'roof' matches nothing"),
        ([], r"stem/w is in none, top/b is in none, top/w is in none"),
    ):
        with pytest.raises(ValueError, match=message):
            discriminative(optax.sgd(1.0), params, groups)
    with pytest.raises(ValueError, match=r"decay: got 0.5"):
        discriminative(optax.sgd(1.0), params, ["stem", "top"], decay=0.5)


def test_slanted_triangular_takes_the_published_values():
    rate, known = (
        slanted_triangular(1000),
        {0: 3.125e-4, 50: 5.15625e-3, 100: 0.01, 550: 5.15625e-3, 1000: 3.125e-4},
    )
    for function, dtype in ((rate, int), (jax.jit(rate), np.int32)):
        np.testing.assert_allclose([function(dtype(step)) for step in known], list(known.values()), rtol=1e-6)
    # The rate stays constant after the end.
    np.testing.assert_allclose(rate(3000), 3.125e-4, rtol=1e-6)
    # The same schedule from linear pieces by optax.
    rate = slanted_triangular(200, 0.5, cut_fraction=0.25, ratio=10.0)
    lines = [optax.linear_schedule(0.05, 0.5, 50), optax.linear_schedule(0.5, 0.05, 150)]
    joined = optax.join_schedules(lines, [50])
    steps = np.arange(201)
    actual, expected = (jax.jit(jax.vmap(schedule))(steps) for schedule in (rate, joined))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_bad_arguments_of_slanted_triangular_are_rejected_with_their_name():
    slanted_triangular(10)
    for steps in (49, 98, 103):  # steps * (1 / steps) is less than 1 by a rounding error
        assert slanted_triangular(steps, cut_fraction=1 / steps)(1) == pytest.approx(0.01)
    for arguments, message in (
        ({"steps": 9}, "steps: got 9, .* at least 10"),
        ({"steps": 48, "cut_fraction": 1 / 49}, "steps: got 48, .* at least 49"),
        ({"steps": 9, "cut_fraction": 1.0}, "cut_fraction: got 1.0"),
        ({"steps": 9, "cut_fraction": 0.0}, "cut_fraction: got 0.0"),
        ({"steps": 100, "ratio": 0.5}, "ratio: got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            slanted_triangular(**arguments)


# --- L2-SP ----------------------------------------------------------------------------------------


def parameters(seed):
    rng = np.random.default_rng(seed)
    return {"body": {"w": rng.normal(size=(3, 2))}, "head": rng.normal(size=4)}


@pytest.mark.parametrize("with_fisher", [False, True])
def test_l2_sp_pulls_shared_leaves_to_their_start_and_new_ones_to_zero(with_fisher, x64):
    start, w, fisher = parameters(0), parameters(1), jax.tree.map(np.square, parameters(2))
    settings = {"fisher": fisher} if with_fisher else {}
    penalty = l2_sp(start, shared="body", alpha=0.3, beta=0.07, **settings)
    weight = fisher["body"]["w"] if with_fisher else 1.0
    expected = (
        0.15 * (weight * (w["body"]["w"] - start["body"]["w"]) ** 2).sum() + 0.035 * (w["head"] ** 2).sum()
    )
    value, gradient = jax.jit(penalty), jax.jit(jax.grad(penalty))
    np.testing.assert_allclose(value(w), expected, rtol=1e-12)
    at_start = gradient(start)
    np.testing.assert_array_equal(at_start["body"]["w"], 0)
    np.testing.assert_allclose(at_start["head"], 0.07 * start["head"], rtol=1e-12)
    # Central differences are exact for a square.
    leaves, structure = jax.tree.flatten(w)
    for i, slopes in enumerate(jax.tree.leaves(gradient(w))):
        for index in np.ndindex(leaves[i].shape):
            values = []
            for step in (1e-3, -1e-3):
                moved = [leaf.copy() for leaf in leaves]
                moved[i][index] += step
                values.append(float(value(jax.tree.unflatten(structure, moved))))
            np.testing.assert_allclose(slopes[index], (values[0] - values[1]) / 2e-3, rtol=1e-8, atol=1e-10)


def test_l2_sp_pulls_all_leaves_to_their_start_by_default():
    start = {"a": jnp.array([1.0, 2.0])}
    np.testing.assert_allclose(l2_sp(start)({"a": jnp.array([2.0, 0.0])}), 0.05 * 5, rtol=1e-6)


@pytest.mark.nightly
def test_a_strong_l2_sp_keeps_shared_leaves_and_lets_new_ones_learn():
    model = jm.transfer.classifier(
        jm.nn.MLP(out=8, hidden=(8,), kernel_init=linen.initializers.lecun_normal()), 3
    )
    x = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    data = jm.Batch(jnp.asarray(x), jnp.asarray(np.abs(x[:, 0]) > 0.7, jnp.int32))
    variables = initialised(model, x, 1)

    def moved(alpha):
        # One step of size 1/α minimises the penalty: the proximal step.
        penalty = l2_sp(variables["params"], shared="body", alpha=alpha, beta=0.0)
        rates = {"body": optax.sgd(min(0.2, 1 / alpha)), "head": optax.sgd(0.2)}
        optimizer = optax.partition(rates, {"body": "body", "head": "head"})
        fitted = jm.transfer.fine_tune(
            model, variables, data, optimizer=optimizer, steps=30, key=KEY, penalty=penalty
        )
        return {
            part: max(
                np.abs(np.asarray(a) - np.asarray(b)).max()
                for a, b in zip(
                    *(jax.tree.leaves(v["params"][part]) for v in (variables, fitted.variables)), strict=True
                )
            )
            for part in ("body", "head")
        }

    strong, weak = moved(1e5), moved(1e-5)
    assert strong["body"] < 1e-4 < 0.05 < min(strong["head"], weak["body"], weak["head"])


def test_bad_arguments_of_l2_sp_are_rejected_with_their_name():
    start = {"body": jnp.ones(3), "head": jnp.ones(2)}
    for arguments, message in (
        ({"alpha": -1.0}, "alpha"),
        ({"beta": -0.1}, "beta"),
        ({"shared": "boby"}, "shared: 'boby' matches nothing"),
        ({"fisher": {"body": jnp.ones(3)}}, r"fisher: got the leaves \['body'\]"),
        (
            {"fisher": {"body": jnp.ones(2), "head": jnp.ones(2)}},
            r"fisher: got shape \(2,\) for body; .*\(3,\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            l2_sp(start, **arguments)
