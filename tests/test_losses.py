"""Masked means, losses and scores."""

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
    empty = jnp.zeros(2, bool)
    assert masked_mean(values, empty) == 0
    np.testing.assert_array_equal(jax.grad(masked_mean)(values, empty), 0)


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
    # Unwrapped, because users do not have the tests' run-time type checks.
    with pytest.raises(ValueError, match=r"\(4, 1\) and \(4, 2\)"):
        inspect.unwrap(mse)(jnp.zeros((4, 1)), jnp.zeros((4, 2)))


def test_score_is_accuracy_of_labels_and_squared_error_of_targets():
    outputs = jnp.array([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [5.0, 1.0]])
    labels = jm.Batch(outputs, jnp.array([0, 1, 0, 0], jnp.int32))
    assert score(outputs, labels) == {"accuracy": (3.0, 4.0)}
    assert score(outputs, jm.Batch(outputs, labels.y, mask=MASK)) == {"accuracy": (1.0, 2.0)}
    targets = jm.Batch(outputs, outputs.at[0, 0].add(2.0))
    assert score(outputs, targets) == {"mse": (2.0, 4.0)}


def test_score_counts_only_the_examples_with_nan_as_wrong():
    outputs = jnp.array([[jnp.nan, 1.0], [0.0, 1.0], [0.0, jnp.nan], [5.0, 1.0]])
    labels = jm.Batch(outputs, jnp.array([0, 1, 1, 0], jnp.int32))
    assert score(outputs, labels) == {"accuracy": (2.0, 4.0)}


@pytest.mark.parametrize(
    ("dtype", "n", "wrong"), [("bfloat16", 301, 150), ("float16", 70_000, 1), ("bfloat16", 5001, 7)]
)
def test_accuracy_counts_are_exact_in_every_output_type(dtype, n, wrong):
    outputs = jnp.zeros((n, 2), dtype).at[:, 0].set(1)
    labels = jnp.where(jnp.arange(n) < wrong, 1, 0).astype(jnp.int32)
    assert score(outputs, jm.Batch(outputs, labels)) == {"accuracy": (n - wrong, n)}
    mask = jnp.arange(n) >= wrong - 1
    assert score(outputs, jm.Batch(outputs, labels, mask=mask)) == {"accuracy": (n - wrong, n - wrong + 1)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_means_of_half_precision_values_match_float64(dtype):
    rng = np.random.default_rng(0)
    n = 1001
    outputs, targets = (jnp.asarray(300 * rng.normal(size=(n, 3)), dtype) for _ in range(2))
    exact = [np.asarray(array, np.float64) for array in (outputs, targets)]
    expected = np.square(exact[0] - exact[1]).mean()
    np.testing.assert_allclose(mse(outputs, targets), expected, rtol=1e-5)
    total, count = score(outputs, jm.Batch(outputs, targets))["mse"]
    np.testing.assert_allclose(total / count, expected, rtol=1e-5)
    assert count == n
    labels = rng.integers(3, size=n)
    logits = exact[0] - exact[0].max(1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(n), labels]
    result = cross_entropy(outputs, jnp.asarray(labels, jnp.int32))
    np.testing.assert_allclose(result, losses.mean(), rtol=1e-5)
    values = jnp.ones(n, dtype)
    assert masked_sum(values) == (n, n)
    assert masked_mean(values, jnp.ones(n, bool)) == 1


def test_gradients_have_the_type_of_the_outputs():
    logits = jnp.zeros((3, 2), jnp.bfloat16)
    gradient = jax.grad(cross_entropy)(logits, jnp.array([0, 1, 1], jnp.int32))
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(gradient, np.float32), np.array([[-1, 1], [1, -1], [1, -1]]) / 6, rtol=1e-2
    )


def test_scores_of_an_empty_batch_are_zero():
    empty = jm.Batch(jnp.zeros((0, 4)), jnp.zeros(0, jnp.int32))
    assert score(jnp.zeros((0, 3)), empty) == {"accuracy": (0, 0)}
    targets = jm.Batch(jnp.zeros((0, 4)), jnp.zeros((0, 3)))
    assert score(jnp.zeros((0, 3)), targets) == {"mse": (0, 0)}
