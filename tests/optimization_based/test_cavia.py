"""CAVIA on a linear model, where one inner step has a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmeta as jm

RATE, SLOPE, WEIGHT = 0.3, 0.7, -1.3
SUPPORT = np.array([0.5, -1.0, 2.0]), np.array([1.0, 0.25, -0.5])
QUERY = np.array([1.5, -0.5]), np.array([0.75, 2.0])


def linear():
    """Build the model f([x, φ]) = w x + v φ."""
    return jm.Model(
        lambda key, x: {"w": jnp.asarray(SLOPE), "v": jnp.asarray(WEIGHT)},
        lambda params, x: x @ jnp.stack([params["w"], params["v"]])[:, None],
    )


def task():
    return jm.Task(*(jm.Batch(jnp.asarray(x)[:, None], jnp.asarray(y)[:, None]) for x, y in (SUPPORT, QUERY)))


def closed_form(w, v):
    """Return φ_1 = −2αv·mean(w x − y), and the query loss at φ_1."""
    (x, y), (x_query, y_query) = SUPPORT, QUERY
    context = -2 * RATE * v * np.mean(w * x - y)
    return context, np.mean((w * x_query + v * context - y_query) ** 2)


@pytest.fixture
def learner(x64):
    return lambda order: jm.cavia(linear(), context=1, inner_lr=RATE, order=order, loss=jm.losses.mse)


def gradient(learner):
    params = learner.init(jax.random.key(0), task())
    return jax.grad(lambda params: learner.loss(params, task(), jax.random.key(1))[0])(params)["model"]


def test_one_step_on_a_linear_model_matches_the_closed_form(learner):
    cavia = learner("second")
    params = cavia.init(jax.random.key(0), task())
    assert set(params["model"]) == {"w", "v"}
    adapted = cavia.adapt(params, task().support, jax.random.key(1))
    context, loss = closed_form(SLOPE, WEIGHT)
    np.testing.assert_allclose(adapted["model"]["context"], [context], rtol=1e-12)
    expected = SLOPE * QUERY[0] + WEIGHT * context
    outputs = cavia.predict(params, adapted, task().query.x)
    np.testing.assert_allclose(outputs[:, 0], expected, rtol=1e-12)
    np.testing.assert_allclose(cavia.loss(params, task(), jax.random.key(1))[0], loss, rtol=1e-12)


def test_meta_gradient_differentiates_the_inner_step(learner):
    actual, step = gradient(learner("second")), 1e-6
    for name, (dw, dv) in {"w": (step, 0), "v": (0, step)}.items():
        up, down = (closed_form(SLOPE + sign * dw, WEIGHT + sign * dv)[1] for sign in (1, -1))
        np.testing.assert_allclose(actual[name], (up - down) / (2 * step), rtol=1e-7)


def test_first_order_treats_the_context_as_a_constant(learner):
    actual = gradient(learner("first"))
    context, _ = closed_form(SLOPE, WEIGHT)
    residual = SLOPE * QUERY[0] + WEIGHT * context - QUERY[1]
    np.testing.assert_allclose(actual["w"], np.mean(2 * residual * QUERY[0]), rtol=1e-12)
    np.testing.assert_allclose(actual["v"], np.mean(2 * residual) * context, rtol=1e-12)


def test_the_context_is_a_constant_channel_of_images():
    seen = []

    def apply(params, x):
        seen.append(x.shape)
        return x.mean((1, 2)) @ params["kernel"]

    network = jm.Model(lambda key, x: {"kernel": jnp.ones((x.shape[-1], 3))}, apply)
    learner = jm.cavia(network, context=4)
    part = jm.Batch(jnp.ones((3, 4, 4, 1)), jnp.arange(3), ways=3)
    images = jm.Task(part, part)
    params = learner.init(jax.random.key(1), images)
    assert params["model"]["kernel"].shape == (5, 3)
    learner.adapt(params, images.support, jax.random.key(2))
    assert {shape[1:] for shape in seen} == {(4, 4, 5)}


def test_context_below_one_is_refused():
    with pytest.raises(ValueError, match="context: got 0"):
        jm.cavia(linear(), context=0)
