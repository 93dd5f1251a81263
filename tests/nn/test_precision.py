"""Tests of networks that compute in bfloat16 with float32 parameters, outputs and statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta as jm
from jaxmeta.nn.norm import moments

KEY = jax.random.key(0)


@functools.cache
def episode():
    tasks = jm.tasks.glyphs("train", ways=3, shots=1, queries=2, size=16)
    return jax.jit(lambda key: tasks.sample(key))(KEY)


LEARNERS = {
    "maml": lambda network: jm.maml(network, inner_optimizer=optax.sgd(0.4), inner_steps=1),
    "prototypical": jm.prototypical,
}


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("maml", jm.nn.MLP(out=3, hidden=(16,), norm=True)),
        ("maml", jm.nn.Conv4(3, filters=8)),
        ("prototypical", jm.nn.Conv4(3, filters=8)),
    ],
    ids=["maml-mlp", "maml-conv4", "prototypical-conv4"],
)
def test_loss_and_gradient_in_bfloat16_are_close_to_float32(name, network):
    task = episode()
    exact, rounded = (LEARNERS[name](model) for model in (network, jm.nn.in_precision(network)))
    params = jax.jit(exact.init)(KEY, task)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, jax.eval_shape(rounded.init, KEY, task))
    (expected, actual) = (
        jax.jit(jax.value_and_grad(lambda params, learner=learner: learner.loss(params, task, KEY)[0]))(
            params
        )
        for learner in (exact, rounded)
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(actual)} == {"float32"}
    assert actual[0] != expected[0]
    np.testing.assert_allclose(actual[0], expected[0], rtol=0.02)
    a, b = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)]) for _, grads in (actual, expected)
    )
    # A loose bound: a second-order gradient through batch statistics of three examples amplifies rounding.
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9


def test_convolutions_and_products_run_in_bfloat16():
    model = jm.nn.in_precision(jm.nn.Conv4(filters=8))
    x = jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)
    params = jax.eval_shape(model.init, KEY, x)
    text = jax.jit(model.apply).lower(params, x).as_text()
    operations = [line for line in text.splitlines() if "convolution(" in line or "dot_general" in line]
    assert operations
    assert all("bf16" in line and "f32" not in line.replace("bf16", "") for line in operations)


def test_moments_of_bfloat16_values_are_summed_in_float32():
    # In bfloat16, a sum of 4,096 numbers around 100 stops growing at some thousands and loses their variance.
    x = (100 + jax.random.normal(KEY, (4096, 2))).astype(jnp.bfloat16)
    mean, var = moments(x)
    assert mean.dtype == var.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-5)
    np.testing.assert_allclose(var, exact.var(0), rtol=0.02)


@pytest.mark.parametrize("network", [jm.nn.MLP(out=2), jm.nn.Conv4(2, filters=8)])
def test_batch_statistics_and_outputs_are_float32(network):
    model = jm.nn.in_precision(network)
    x = jax.ShapeDtypeStruct((4, 16, 16, 1) if isinstance(network, jm.nn.Conv4) else (4, 256), jnp.float32)
    outputs, stats = jax.eval_shape(lambda x: model.apply_norm(model.init(KEY, x), x), x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((outputs, stats))} == {"float32"}


def test_integer_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype: got int8; it must be a floating-point type"):
        jm.nn.in_precision(jm.nn.MLP(out=1), jnp.int8)
