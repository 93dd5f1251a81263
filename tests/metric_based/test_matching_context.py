"""Matching networks with full context embeddings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vectors import (
    DIM,
    IDENTITY,
    KEY,
    WAYS,
    batch,
    initial,
    outputs_of,
    padded,
    predict,
    unequal,
)

import jaxmeta as jm
from jaxmeta.nn.full_context import full_context

STEPS = 2
TASK = unequal()


@functools.cache
def learner(**settings):
    """Build a learner, cached so that its functions are compiled once."""
    return jm.matching(IDENTITY, context_steps=STEPS, **settings)


def outputs(weights, support, x):
    return predict(learner(), support, x, head=weights)


def head(seed=0):
    shapes = jax.eval_shape(full_context(DIM, STEPS).init, KEY)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape)), shapes)


@pytest.mark.nightly
def test_lstms_with_zero_weights_give_the_simple_network():
    shapes = jax.eval_shape(learner().init, KEY, TASK)
    zeros = jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes)
    for scale in (1.0, 10.0):
        actual = outputs_of(learner(scale=scale), zeros, TASK.support, TASK.query.x)
        expected = predict(jm.matching(IDENTITY, scale=scale), TASK.support, TASK.query.x)
        np.testing.assert_array_equal(actual, expected)


def as_torch(cell):
    """Return (weight_ih, weight_hh, bias_ih, bias_hh) of a Flax cell, whose biases are bias_hh."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")

    def stacked(parts, side, leaf):
        return torch.cat([torch.tensor(np.array(parts[f"{side}{gate}"][leaf])).T for gate in "ifgo"])

    return (
        stacked(cell, "i", "kernel"),
        stacked(cell, "h", "kernel"),
        torch.zeros(4 * DIM, dtype=torch.float64),
        torch.cat([torch.tensor(np.array(cell[f"h{gate}"]["bias"])) for gate in "ifgo"]),
    )


def filled(module, *cells):
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    suffixes = ("",) if len(cells) == 1 else ("_l0", "_l0_reverse")
    values = {
        name + suffix: value
        for cell, suffix in zip(cells, suffixes, strict=True)
        for name, value in zip(names, as_torch(cell), strict=True)
    }
    module.double().load_state_dict(values)
    return module


def test_the_context_of_the_support_matches_torchs_bidirectional_lstm(x64):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    params = head()["support"]
    lstm = filled(torch.nn.LSTM(DIM, DIM, bidirectional=True), params["forward"], params["backward"])
    z = np.random.default_rng(0).normal(size=(6, DIM))
    actual = jax.jit(full_context(DIM, STEPS).support)({"support": params}, z, np.ones(6, bool))
    with torch.no_grad():
        both = lstm(torch.tensor(z)[:, None])[0][:, 0].numpy()
    np.testing.assert_allclose(actual, both[:, :DIM] + both[:, DIM:] + z, atol=1e-10)


def test_the_context_of_a_query_matches_an_attention_lstm_in_torch(x64):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    params = head()["query"]
    cell = filled(torch.nn.LSTMCell(2 * DIM, DIM), params["attention"])
    rng = np.random.default_rng(0)
    z, g = rng.normal(size=(5, DIM)), rng.normal(size=(6, DIM))
    actual = jax.jit(full_context(DIM, STEPS).query)({"query": params}, z, g, np.ones(6, bool))
    with torch.no_grad():
        f, support = torch.tensor(z), torch.tensor(g)
        h, c = f, torch.zeros_like(f)
        for _ in range(STEPS):
            r = torch.softmax(h @ support.T, 1) @ support
            h, c = cell(torch.cat([f, r], 1), (h, c))
            h = h + f
    np.testing.assert_allclose(actual, h.numpy(), atol=1e-10)


def test_the_whole_network_is_cosine_attention_over_both_contexts(x64):
    weights = head()
    context, real = full_context(DIM, STEPS), np.ones(6, bool)
    x, y = (np.asarray(part.x, float) for part in TASK)
    g = jax.jit(context.support)(weights, x, real)
    f = jax.jit(context.query)(weights, y, g, real)
    g, f = (np.asarray(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (g, f))
    attention = np.exp(2 * f @ g.T)
    expected = attention / attention.sum(1, keepdims=True) @ np.eye(WAYS)[TASK.support.y]
    actual = predict(learner(scale=2.0), batch(x, TASK.support.y), y, head=weights)
    np.testing.assert_allclose(np.exp(actual), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("positions", "value"),
    [
        ([0, 1, 3, 6], np.nan),
        *(
            pytest.param(positions, value, marks=pytest.mark.nightly)
            for positions in ([0], [2, 4], [6, 6], [0, 1, 3, 6])
            for value in (np.nan, 100.0)
            if (len(positions), value) != (4, np.nan)
        ),
    ],
)
def test_padding_anywhere_in_the_support_changes_nothing(positions, value):
    weights = head()
    expected = outputs(weights, TASK.support, TASK.query.x)
    actual = outputs(weights, padded(TASK.support, positions, value), TASK.query.x)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_outputs_depend_on_support_order_but_not_on_query_order():
    weights = head()
    support, queries = TASK.support, np.asarray(TASK.query.x)
    x, y = np.asarray(support.x), np.asarray(support.y)
    actual = outputs(weights, support, queries)
    reversed_support = outputs(weights, batch(x[::-1], y[::-1]), queries)
    assert np.abs(reversed_support - actual).max() > 1e-3
    np.testing.assert_allclose(outputs(weights, support, queries[::-1]), actual[::-1], atol=1e-6)
    np.testing.assert_allclose(outputs(weights, support, queries[:1]), actual[:1], atol=1e-6)


def test_the_support_is_shuffled_only_in_training():
    params = {"model": {}, "head": head()}
    loss = jax.jit(lambda key: learner().loss(params, TASK, key)[0])
    values = [float(loss(key)) for key in jax.random.split(KEY, 4)]
    assert len(set(values)) > 1
    assert float(loss(KEY)) == float(loss(KEY))
    adapt = jax.jit(learner().adapt)
    first, other = (adapt(params, TASK.support, key) for key in jax.random.split(KEY))
    jax.tree.map(np.testing.assert_array_equal, first, other)


def test_permuted_class_slots_permute_the_outputs():
    weights, names = head(), np.array([2, 0, 1])
    actual = outputs(weights, TASK.support, TASK.query.x)
    renamed = outputs(weights, batch(TASK.support.x, names[TASK.support.y]), TASK.query.x)
    np.testing.assert_allclose(renamed[:, names], actual, atol=1e-6)


@pytest.mark.nightly
def test_every_parameter_of_both_contexts_has_a_gradient():
    params = {"model": {}, "head": head()}
    grads = jax.jit(jax.grad(lambda params: learner().loss(params, TASK, KEY)[0]))(params)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(grads))


@pytest.mark.nightly
def test_a_learned_scale_starts_at_the_given_one():
    params = initial(learner(scale=5.0, learn_scale=True), TASK)
    assert params["head"]["scale"] == 5
    expected = predict(learner(scale=5.0), TASK.support, TASK.query.x, **params)
    np.testing.assert_array_equal(
        predict(learner(scale=1.0, learn_scale=True), TASK.support, TASK.query.x, **params), expected
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_steps": 0}, "context_steps: got 0; it must be at least 1"),
        ({"context_steps": 2, "scale": -1.0}, "scale: got -1.0; it must be positive"),
        ({"scale": 0.0}, "scale: got 0.0; it must be positive"),
        ({"context_steps": 2, "norm": "layer"}, "norm: got .*; it must be one of"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        jm.matching(IDENTITY, **settings)
