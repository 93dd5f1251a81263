"""Masked means, cross-entropy, squared error, and what is reported of predictions."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmeta as jm
from jaxmeta.losses import cross_entropy, masked_mean, masked_sum, mse, score

MASK = jnp.array([True, False, True, False])


def test_masked_mean_and_sum_leave_padding_out():
    values = jnp.array([1.0, jnp.nan, 4.0, jnp.inf])
    assert masked_mean(values, MASK) == 2.5
    assert masked_sum(values, MASK) == (5.0, 2.0)
    np.testing.assert_array_equal(jax.grad(masked_mean)(values, MASK), [0.5, 0, 0.5, 0])


def test_without_a_mask_every_value_counts():
    assert masked_mean(jnp.array([1.0, 2.0, 6.0])) == 3.0
    assert masked_sum(jnp.array([1.0, 2.0, 6.0])) == (9.0, 3.0)


def test_mean_over_an_empty_mask_and_its_gradient_are_zero():
    values = jnp.array([1.0, 2.0])
    nothing = jnp.zeros(2, bool)
    assert masked_mean(values, nothing) == 0
    np.testing.assert_array_equal(jax.grad(masked_mean)(values, nothing), 0)


def test_cross_entropy_is_the_mean_negative_log_probability():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 3)), np.array([0, 2, 1, 1])
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(4), labels]
    logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.int32)
    np.testing.assert_allclose(jax.jit(cross_entropy)(logits, labels), expected.mean(), rtol=1e-6)
    masked = jax.jit(jax.value_and_grad(cross_entropy))
    value, gradient = masked(logits, labels, MASK)
    np.testing.assert_allclose(value, expected[[0, 2]].mean(), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(gradient)[[1, 3]], 0)
    assert masked(logits, jnp.array([0, 99, 1, 1], jnp.int32), MASK)[0] == value


def test_mse_is_a_mean_over_examples_and_dimensions():
    outputs = jnp.array([[1.0, 2.0], [0.0, 0.0], [3.0, 5.0], [0.0, 0.0]])
    targets = jnp.zeros((4, 2))
    assert mse(outputs, targets) == pytest.approx((1 + 4 + 9 + 25) / 8)
    assert mse(outputs, targets + jnp.where(MASK, 0.0, jnp.nan)[:, None], MASK) == pytest.approx(39 / 4)


def test_targets_of_another_shape_are_refused_not_broadcast():
    # Without the run-time type checks, which users do not have.
    with pytest.raises(ValueError, match=r"\(4, 1\) and \(4, 2\)"):
        inspect.unwrap(mse)(jnp.zeros((4, 1)), jnp.zeros((4, 2)))


def test_score_is_accuracy_of_labels_and_squared_error_of_targets():
    outputs = jnp.array([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [5.0, 1.0]])
    labels = jm.Batch(outputs, jnp.array([0, 1, 0, 0], jnp.int32))
    assert score(outputs, labels) == {"accuracy": (3.0, 4.0)}
    assert score(outputs, jm.Batch(outputs, labels.y, MASK)) == {"accuracy": (1.0, 2.0)}
    targets = jm.Batch(outputs, outputs.at[0, 0].add(2.0))
    assert score(outputs, targets) == {"mse": (2.0, 4.0)}


def test_score_counts_an_example_with_nan_as_wrong_and_no_other():
    outputs = jnp.array([[jnp.nan, 1.0], [0.0, 1.0], [0.0, jnp.nan], [5.0, 1.0]])
    labels = jm.Batch(outputs, jnp.array([0, 1, 1, 0], jnp.int32))
    assert score(outputs, labels) == {"accuracy": (2.0, 4.0)}
