"""Networks behind a fixed conversion of their inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmeta as jm


def test_a_preprocessed_network_has_the_networks_parameters_and_converts_its_inputs():
    adapter = jm.transfer.input_adapter(channels=3, size=16, mean=(0.1, 0.2, 0.3), std=0.5)
    network = jm.nn.as_model(jm.nn.Conv4(filters=4))
    model = jm.nn.preprocessed(network, adapter)
    x = jax.random.uniform(jax.random.key(0), (3, 20, 20, 1))
    params = model.init(jax.random.key(1), x)
    mean = np.float32([0.1, 0.2, 0.3])[None, None, None]
    converted = (jnp.repeat(jax.image.resize(x, (3, 16, 16, 1), "linear"), 3, -1) - mean) / 0.5
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, network.init(jax.random.key(1), converted)
    )
    np.testing.assert_allclose(model.apply(params, x), network.apply(params, converted), atol=1e-5)
    _, stats = model.apply_norm(params, x)
    np.testing.assert_allclose(
        model.apply_norm(params, x[:1], stats=stats)[0],
        network.apply_norm(params, converted[:1], stats=stats)[0],
        atol=1e-5,
    )


def test_an_adapter_with_parameters_is_refused():
    model = jm.nn.preprocessed(jm.nn.Conv4(filters=4), jm.transfer.learned_stem(3))
    with pytest.raises(ValueError, match="adapter: it has parameters"):
        model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
