"""A network in bfloat16: what it computes with is rounded, and nothing that enters or leaves it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta as jm
from jaxmeta.nn.norm import moments

KEY = jax.random.key(0)


def episode():
    return jm.tasks.glyphs("train", ways=3, shots=1, queries=2, size=16).sample(KEY)


LEARNERS = {
    "maml": lambda network: jm.maml(network, inner_optimizer=optax.sgd(0.4), steps=1),
    "prototypical": jm.prototypical,
}


@pytest.mark.parametrize("name", LEARNERS)
def test_gradients_are_float32_and_point_where_those_of_float32_do(name):
    network, task = jm.nn.Conv4(3, filters=8), episode()
    exact, rounded = (LEARNERS[name](each) for each in (network, jm.nn.in_precision(network)))
    params = exact.init(KEY, task)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, rounded.init(KEY, task))
    (expected, found) = (
        jax.value_and_grad(lambda params, learner=learner: learner.loss(params, task, KEY)[0])(params)
        for learner in (exact, rounded)
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}
    assert found[0] != expected[0]
    np.testing.assert_allclose(found[0], expected[0], rtol=0.02)
    a, b = (jax.flatten_util.ravel_pytree(grads)[0] for _, grads in (found, expected))
    # A second-order gradient through a batch of three is the more sensitive one.
    assert a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b) > 0.9


def test_convolutions_are_of_bfloat16():
    model = jm.nn.in_precision(jm.nn.Conv4(filters=8))
    x = jnp.zeros((2, 28, 28, 1))
    params = model.init(KEY, x)
    text = jax.jit(model.apply).lower(params, x).as_text()
    kinds = [line for line in text.splitlines() if "convolution(" in line or "dot_general" in line]
    assert kinds
    assert all("bf16" in line and "f32" not in line.replace("bf16", "") for line in kinds)


def test_moments_keep_what_bfloat16_would_lose():
    """Of 4,096 numbers around 100 a sum in bfloat16 stops at a few thousand, and their spread is lost."""
    x = (100 + jax.random.normal(KEY, (4096, 2))).astype(jnp.bfloat16)
    mean, var = moments(x)
    assert mean.dtype == var.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-5)
    np.testing.assert_allclose(var, exact.var(0), rtol=0.02)


@pytest.mark.parametrize("network", [jm.nn.MLP(out=2), jm.nn.Conv4(2, filters=8)])
def test_batch_statistics_and_outputs_leave_in_float32(network):
    model = jm.nn.in_precision(network)
    x = jnp.ones((4, 16, 16, 1))
    x = x if isinstance(network, jm.nn.Conv4) else x.reshape(4, -1)
    outputs, stats = model.apply_norm(model.init(KEY, x), x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((outputs, stats))} == {"float32"}


def test_what_is_no_precision_is_refused():
    with pytest.raises(ValueError, match="dtype: got int8; it must be a floating-point type"):
        jm.nn.in_precision(jm.nn.MLP(out=1), jnp.int8)
