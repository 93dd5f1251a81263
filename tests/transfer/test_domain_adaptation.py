"""Gradient reversal, DANN's schedules and the domain loss."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta as jm
from jaxmeta.checks import ArgumentError
from jaxmeta.transfer.domain_adaptation import (
    dann_rate,
    dann_schedule,
    dann_strength,
    domain_accuracy,
    domain_loss,
    gradient_reversal,
)

# --- Gradient reversal ----------------------------------------------------------------------------


def test_features_pass_the_reversal_bit_for_bit():
    features = {"a": np.arange(12, dtype=np.float32) / 7, "b": [np.float16(0.1), np.float32(1e-30)]}
    reverse = jax.jit(gradient_reversal)
    for strength in (0, 0.3, jnp.float32(7)):
        passed = reverse(features, strength)
        jax.tree.map(np.testing.assert_array_equal, passed, features)
        assert [leaf.dtype for leaf in jax.tree.leaves(passed)] == ["float32", "float16", "float32"]


def test_a_reversed_gradient_equals_finite_differences_times_minus_the_strength(x64):
    def f(x, strength):
        return jnp.sum(jnp.sin(gradient_reversal(jnp.square(x), strength)) * jnp.arange(1.0, 5.0))

    x, step, strength = np.array([0.3, -1.2, 0.7, 2.0]), 1e-6, 0.37
    value, gradient = jax.jit(f), jax.jit(jax.grad(f))
    forward = [(value(x + d, strength) - value(x - d, strength)) / (2 * step) for d in step * np.eye(4)]
    forward = np.array(forward)
    # Reverse and forward mode, then with a traced strength under jit, vmap and scan.
    np.testing.assert_allclose(gradient(x, strength), -strength * forward, rtol=1e-8)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(f))(x, strength), -strength * forward, rtol=1e-8)
    strengths = np.array([0.0, 0.37, 2.0])
    expected = -strengths[:, None] * forward[None]
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient, (None, 0)))(x, strengths), expected, rtol=1e-8)
    _, scanned = jax.lax.scan(lambda carry, s: (carry, gradient(x, s)), 0, strengths)
    np.testing.assert_allclose(scanned, expected, rtol=1e-8)
    np.testing.assert_array_equal(scanned[0], 0)


def test_the_strength_has_a_zero_gradient():
    gradient = jax.grad(lambda s: jnp.sum(jnp.square(gradient_reversal(jnp.arange(3.0), s))))(0.5)
    assert gradient == 0


def dann(x_source, labels, x_target):
    """Return DANN's single loss of its three parts: features, label head and domain head."""

    def loss(params, strength):
        def features(x):
            return jnp.tanh(x @ params["features"])

        def domain(x):
            return gradient_reversal(features(x), strength) @ params["domain"]

        logits = features(x_source) @ params["label"]
        return jm.losses.cross_entropy(logits, labels) + domain_loss(domain(x_source), domain(x_target))

    return loss


def test_dann_descends_the_domain_loss_by_its_head_and_ascends_it_by_the_features(x64):
    rng = np.random.default_rng(0)
    x_source, x_target = rng.normal(size=(6, 3)), rng.normal(size=(4, 3)) + 1
    labels = np.array([0, 1, 1, 0, 1, 0], np.int32)
    shapes = {"features": (3, 5), "label": (5, 2), "domain": (5, 1)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    # The two losses separately, without a reversal.

    def logits(params, x, head):
        return jnp.tanh(x @ params["features"]) @ params[head]

    def label_loss(params):
        return -jax.nn.log_softmax(logits(params, x_source, "label"))[jnp.arange(6), labels].mean()

    def domain_cross_entropy(params):
        s, t = (jax.nn.sigmoid(logits(params, x, "domain")) for x in (x_source, x_target))
        return -(jnp.log(1 - s).mean() + jnp.log(t).mean()) / 2

    by_label, by_domain = jax.device_get(
        [jax.jit(jax.grad(f))(params) for f in (label_loss, domain_cross_entropy)]
    )
    gradient = jax.jit(jax.grad(dann(x_source, jnp.asarray(labels), x_target)))
    for strength in (0.0, 0.6):
        gradients = gradient(params, strength)
        np.testing.assert_allclose(gradients["label"], by_label["label"], rtol=1e-9)
        np.testing.assert_allclose(gradients["domain"], by_domain["domain"], rtol=1e-9)
        np.testing.assert_allclose(
            gradients["features"], by_label["features"] - strength * by_domain["features"], rtol=1e-9
        )


def test_bad_arguments_of_gradient_reversal_are_rejected_with_their_name():
    bare = inspect.unwrap(gradient_reversal)
    with pytest.raises(ArgumentError, match=r"x: got int32 at \['a'\]; it must"):
        bare({"a": jnp.arange(3)}, 1.0)
    with pytest.raises(ArgumentError, match="x: got int32; it must"):
        bare(jnp.arange(3), 1.0)
    with pytest.raises(ValueError, match=r"strength: got an array of shape \(2,\)"):
        bare(jnp.ones(2), jnp.ones(2))


# --- DANN's schedules and domain loss -------------------------------------------------------------


def test_strength_and_rate_have_the_values_of_the_paper():
    progress = jnp.array([0, 0.1, 0.25, 0.5, 1])
    np.testing.assert_allclose(
        dann_strength(progress), [0, 0.462117, 0.848284, 0.986614, 0.999909], atol=1e-6
    )
    np.testing.assert_allclose(dann_strength(0.2, gamma=5.0), 2 / (1 + np.exp(-1.0)) - 1, rtol=1e-6)
    np.testing.assert_allclose(
        dann_rate(jnp.array([0, 0.1, 0.5, 1])), [0.01, 0.00594604, 0.00260847, 0.00165560], rtol=1e-5
    )


def test_the_schedule_follows_the_rate_and_stays_constant_after_the_end():
    optimizer = optax.sgd(dann_schedule(4, initial=0.5, a=3.0, b=2.0))
    state, rates = optimizer.init(0.0), []
    for _ in range(6):
        update, state = jax.jit(optimizer.update)(1.0, state)
        rates.append(-update)
    expected = [0.5 / (1 + 3 * p) ** 2 for p in (0, 0.25, 0.5, 0.75, 1, 1)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="steps: got 0"):
        dann_schedule(0)


def test_domain_loss_is_binary_cross_entropy_with_equal_weights_of_both_domains(x64):
    from sklearn.metrics import log_loss

    rng = np.random.default_rng(3)
    source, target = rng.normal(size=5), rng.normal(size=(3, 1)) + 1
    probabilities = 1 / (1 + np.exp(-np.concatenate([source, target[:, 0]])))
    weights = [1 / 10] * 5 + [1 / 6] * 3
    expected = log_loss([0] * 5 + [1] * 3, probabilities, sample_weight=weights)
    np.testing.assert_allclose(domain_loss(source, target), expected, rtol=1e-10)


def test_domain_loss_of_extreme_logits_is_finite_and_has_a_gradient():
    far = jnp.array([500.0])
    assert domain_loss(far, far) == 250 == domain_loss(-far, -far)
    assert domain_loss(-far, far) == 0
    assert jax.grad(domain_loss)(far, far) == 0.5


def test_domain_accuracy_is_a_half_by_chance_and_zero_for_nan():
    zeros, nan = jnp.zeros(4), jnp.full(3, jnp.nan)
    assert domain_accuracy(zeros, jnp.zeros((9, 1))) == 0.5
    assert domain_accuracy(jnp.array([-1.0, -2, 3, -4]), jnp.array([1.0])) == 0.875
    assert domain_accuracy(nan, nan) == 0


@pytest.mark.parametrize("shape", [(3, 2), (0,), (1, 3)])
def test_logits_of_a_wrong_shape_are_rejected(shape):
    for function in map(inspect.unwrap, (domain_loss, domain_accuracy)):
        with pytest.raises(ValueError, match="target: got logits of shape"):
            function(jnp.zeros(3), jnp.zeros(shape))
