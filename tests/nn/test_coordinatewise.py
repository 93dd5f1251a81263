"""Tests of the learned optimizers' networks: preprocessing, the LSTM against PyTorch, parameter counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmeta as jm

pytestmark = pytest.mark.usefixtures("x64")


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def float64(params):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)


def test_preprocessing_at_the_values_of_the_paper():
    x = jnp.array([1, -0.01, 1e-3, 1e-6, -1e-5, 0])
    expected = [
        [0, -0.460517, -0.690776, -1, -1, -1],
        [1, -1, 1, 0.0220265, -0.220265, 0],
    ]
    np.testing.assert_allclose(jm.nn.log_and_sign(x), expected, atol=1e-6)
    assert jm.nn.log_and_sign(jnp.ones((2, 3)), 5.0).shape == (2, 2, 3)
    assert jm.nn.log_and_sign(jnp.asarray(-1.0)).shape == (2,)


def test_preprocessing_matches_the_clamped_form_of_the_official_code():
    x = np.concatenate([sign * np.logspace(-8, 3, 200) for sign in (1, -1)])
    for p in (5.0, 10.0):
        clamped = np.stack([np.maximum(-1, np.log(np.abs(x)) / p), np.clip(np.exp(p) * x, -1, 1)])
        np.testing.assert_allclose(jm.nn.log_and_sign(jnp.asarray(x), p), clamped, atol=1e-12)


def test_preprocessing_is_continuous_and_has_finite_derivatives():
    edge = np.exp(-10.0)
    left, right = (jm.nn.log_and_sign(jnp.asarray(edge * (1 + side))) for side in (-1e-9, 1e-9))
    np.testing.assert_allclose(left, right, atol=1e-8)
    slopes = jax.jit(jax.vmap(jax.jacrev(jm.nn.log_and_sign)))(np.array([0.0, edge, 1.0, -1e-7]))
    assert np.isfinite(slopes).all()


def test_coordinatewise_lstm_matches_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    features, inputs, n, steps = 3, 2, 7, 4
    rng = np.random.default_rng(0)
    layer = jm.nn.CoordinatewiseLSTM(features, forget_bias=1.0)
    kernel, bias = rng.normal(size=(inputs + features, 4 * features)), rng.normal(size=4 * features)
    cell = torch.nn.LSTMCell(inputs, features, dtype=torch.float64)
    # Our gates are ordered input, candidate, forget, output; torch's input, forget, candidate, output.
    order = np.concatenate([np.arange(features) + features * block for block in (0, 2, 1, 3)])
    torch_kernel, torch_bias = kernel[:, order].T, bias[order].copy()
    torch_bias[features : 2 * features] += 1.0
    with torch.no_grad():
        cell.weight_ih.copy_(torch.tensor(torch_kernel[:, :inputs]))
        cell.weight_hh.copy_(torch.tensor(torch_kernel[:, inputs:]))
        cell.bias_ih.copy_(torch.tensor(torch_bias))
        cell.bias_hh.zero_()
    state = (jnp.zeros((features, n)), jnp.zeros((features, n)))
    theirs = None
    for _ in range(steps):
        x = rng.normal(size=(inputs, n))
        state, out = layer.apply({"params": {"kernel": kernel, "bias": bias}}, state, jnp.asarray(x))
        theirs = cell(torch.tensor(x.T), theirs)
        np.testing.assert_allclose(out, theirs[0].detach().numpy().T, atol=1e-12)
        np.testing.assert_allclose(state[1], theirs[1].detach().numpy().T, atol=1e-12)


@pytest.mark.parametrize(("layers", "arrays"), [((), 2), ((20,), 4), ((20, 20), 6)])
def test_proposed_update_has_two_arrays_per_layer_for_any_number_of_coordinates(layers, arrays):
    net = jm.nn.ProposedUpdate(layers)
    sizes = []
    for n in (1, 50):
        grads = jax.ShapeDtypeStruct((n,), jnp.float64)
        variables = jax.eval_shape(
            lambda grads, n=n: net.init(jax.random.key(0), net.initial(n, jnp.float64), grads), grads
        )
        assert len(jax.tree.leaves(variables["params"])) == arrays
        sizes.append(jax.tree.map(jnp.shape, variables["params"]))
        state, update = jax.eval_shape(
            lambda variables, grads, n=n: net.apply(variables, net.initial(n, jnp.float64), grads),
            variables,
            grads,
        )
        assert update.shape == (n,)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, net.initial(n, jnp.float64))
    assert sizes[0] == sizes[1]


def test_a_zero_output_layer_proposes_no_update():
    net = jm.nn.ProposedUpdate(zero_output=True)
    params = jax.jit(net.init)(jax.random.key(0), net.initial(3, jnp.float64), np.ones(3))["params"]
    apply = jax.jit(net.apply)
    _, update = apply({"params": params}, net.initial(3, jnp.float64), np.array([1.0, -2, 3]))
    np.testing.assert_array_equal(update, 0)


@functools.cache
def gated(hidden=20, feedback="gate"):
    net = jm.nn.GatedUpdate(hidden, feedback)
    start = net.initial(1, jnp.float64)
    params = jax.jit(net.init)(jax.random.key(0), start, np.ones(1), np.ones(()), np.ones(1))["params"]
    return net, float64(params)


def test_gated_update_has_the_parameters_of_the_paper():
    _, params = gated()
    assert count(params["lstm"]) == (4 + 20) * 80 + 80 == 2000
    assert [params[name].shape for name in ("forget_kernel", "input_kernel")] == [(22,), (22,)]
    assert count(params) == 2046
    assert 4 <= params["forget_bias"] <= 5
    assert -5 <= params["input_bias"] <= -4
    rest = [leaf for name, leaf in params.items() if "bias" not in name]
    assert all(np.abs(leaf).max() <= 0.01 for leaf in jax.tree.leaves(rest))
    # The one-layer form has weights for φ(L), φ(∇), θ and the gate, and a bias.
    assert count(gated(hidden=None)[1]) == 2 * (6 + 1)


@pytest.mark.parametrize("feedback", ["gate", "pre_gate"])
def test_one_layer_form_matches_formulas_in_numpy(feedback):
    net, params = gated(None, feedback)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
    apply, n, state = jax.jit(net.apply), 4, net.initial(4, jnp.float64)
    theta, gates = rng.normal(size=n), {"forget": np.zeros(n), "input": np.zeros(n)}
    for _ in range(3):
        grads, loss = rng.normal(size=n), rng.uniform()
        seen = np.concatenate(
            [
                np.repeat(np.asarray(jm.nn.log_and_sign(jnp.asarray(loss)))[:, None], n, 1),
                jm.nn.log_and_sign(jnp.asarray(grads)),
                theta[None],
            ]
        )
        value = {}
        for name, before in gates.items():
            kernel = np.asarray(params[f"{name}_kernel"])
            pre_gate = kernel[:-1] @ seen + kernel[-1] * before + params[f"{name}_bias"]
            value[name] = 1 / (1 + np.exp(-pre_gate))
            gates[name] = value[name] if feedback == "gate" else pre_gate
        state, change = apply({"params": params}, state, grads, np.asarray(loss), np.asarray(theta))
        expected = value["forget"] * theta - value["input"] * grads
        np.testing.assert_allclose(theta + change, expected, atol=1e-12)
        theta = expected


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("hidden", [20, None])
def test_gated_update_is_permutation_equivariant_and_does_not_mix_coordinates(hidden):
    net, params = gated(hidden)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.3 * rng.normal(size=leaf.shape), params)
    grads, theta = rng.normal(size=(3, 5)), rng.normal(size=5)

    @jax.jit
    def run(grads, theta):
        state = net.initial(theta.size, jnp.float64)
        for g in grads:
            state, change = net.apply({"params": params}, state, g, jnp.asarray(0.7), theta)
            theta = theta + change
        return theta

    order = np.array([3, 1, 4, 0, 2])
    np.testing.assert_allclose(run(grads[:, order], theta[order]), run(grads, theta)[order], atol=1e-12)
    np.testing.assert_allclose(run(grads[:, :2], theta[:2]), run(grads, theta)[:2], atol=1e-12)
