"""Tests of optax schedules and gradient accumulation in the inner and outer loop, against explicit loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    KEY,
    adapt,
    finite_differences,
    flat,
    gradient,
    init,
    loss,
    make_task,
    network,
    plain_loss,
)

import jaxmeta as jm
from jaxmeta.training import init_state

pytestmark = pytest.mark.usefixtures("x64")

nightly = pytest.mark.nightly
each_mode = pytest.mark.parametrize(
    "memory",
    ["store", pytest.param("recompute", marks=nightly), pytest.param("forward_over_reverse", marks=nightly)],
)
# Schedules compute in float32, which represents these numbers exactly.
RATES = (0.75, 0.5, 0.25)
SCHEDULE = optax.linear_schedule(0.75, 0.25, 2)


def accumulated(optimizer, every):
    return optax.MultiSteps(optimizer, every, accumulator_dtype=jnp.float64).gradient_transformation()


@functools.cache
def learner_of(optimizer, **settings):
    return jm.maml(network(norm=False), inner_optimizer=optimizer, **{"memory": "store", **settings})


def gradient_step(weights, support, rate):
    gradients = plain_loss(norm=False)(weights, support)[1]
    return jax.tree.map(lambda w, g: w - rate * g, weights, gradients)


def assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(flat(actual), flat(expected), atol=tolerance)


# --- Schedules in the inner loop -------------------------------------------------------------------


@each_mode
def test_meta_gradient_under_a_schedule_matches_the_closed_form_on_a_quadratic(memory):
    # L^S = ½·a·(θ − 1)²: θ_n − 1 = Π (1 − a·α_j) (θ_0 − 1), which is linear in θ_0.
    loop = jm.inner_loop(lambda t, a: 0.5 * a * (t - 1.0) ** 2, optax.sgd(SCHEDULE), 3, memory=memory)
    adapted, derivative = jax.value_and_grad(lambda theta: loop(theta, 0.5)[0])(3.0)
    factor = np.prod([1 - 0.5 * rate for rate in RATES])
    np.testing.assert_allclose(adapted, 1 + 2 * factor, rtol=1e-12)
    np.testing.assert_allclose(derivative, factor, rtol=1e-12)


def test_adaptation_with_a_schedule_matches_an_explicit_loop():
    learner, task = learner_of(optax.sgd(SCHEDULE), inner_steps=3), make_task()
    params = init(learner)
    weights = params["model"]
    for rate in RATES:
        weights = gradient_step(weights, task.support, rate)
    assert_close(adapt(learner, params, task)["model"], weights, 1e-12)
    expected = finite_differences(lambda params: learner.loss(params, task, KEY)[0], params)
    np.testing.assert_allclose(flat(gradient(learner, params, task)), expected, atol=1e-8)
    # A constant rate gives other weights.
    constant = adapt(learner_of(optax.sgd(RATES[0]), inner_steps=3), params, task)["model"]
    assert np.abs(flat(constant) - flat(weights)).max() > 1e-2


# --- Gradient accumulation in the inner loop -------------------------------------------------------


@each_mode
def test_accumulated_mini_batches_are_one_step_of_the_mean_gradient(memory):
    # Six support examples, two per step: three steps are one pass over them.
    settings = {"inner_batch": 2, "memory": memory}
    learner = learner_of(accumulated(optax.sgd(0.5), 3), inner_steps=6, **settings)
    whole, task = learner_of(optax.sgd(0.5), inner_steps=2), make_task()
    params = init(learner)
    expected = gradient_step(gradient_step(params["model"], task.support, 0.5), task.support, 0.5)
    assert_close(adapt(learner, params, task)["model"], expected, 1e-12)
    np.testing.assert_allclose(loss(learner, params, task)[0], loss(whole, params, task)[0], rtol=1e-12)
    assert_close(gradient(learner, params, task), gradient(whole, params, task), 1e-12)


def test_meta_gradient_through_accumulation_matches_finite_differences():
    # Two updates by the mean of two mini-batches, with two step sizes, and a gradient that is never applied.
    schedule = optax.linear_schedule(0.5, 0.25, 1)
    learner = learner_of(accumulated(optax.sgd(schedule), 2), inner_steps=5, inner_batch=4)
    params, task = init(learner), make_task()
    expected = finite_differences(lambda params: learner.loss(params, task, KEY)[0], params)
    actual = flat(gradient(learner, params, task))
    assert np.abs(actual).max() > 0.01
    np.testing.assert_allclose(actual, expected, atol=1e-8)


def test_any_object_with_init_and_update_is_an_inner_optimizer():
    # optax.MultiSteps has both methods and is not a GradientTransformation.
    wrapped = optax.MultiSteps(optax.sgd(0.1), 2, accumulator_dtype=jnp.float64)
    transformation = wrapped.gradient_transformation()
    assert not isinstance(wrapped, optax.GradientTransformation)
    learners = [
        learner_of(optimizer, inner_steps=4, inner_batch=4) for optimizer in (wrapped, transformation)
    ]
    params, task = init(learners[0]), make_task()
    expected, actual = (flat(gradient(learner, params, task)) for learner in learners)
    np.testing.assert_array_equal(actual, expected)
    with pytest.raises(jm.ArgumentError, match="hyper: got hyperparameters"):
        jm.maml(network(), inner_optimizer=wrapped, hyper=0.1)


# --- Gradient accumulation of the meta-gradient ----------------------------------------------------


def test_accumulated_meta_steps_are_one_step_of_the_mean_meta_gradient():
    tasks = jm.tasks.sinusoid(shots=3, queries=3)
    learner = jm.maml(jm.nn.MLP(out=1, hidden=(4,)), inner_lr=0.01, loss=jm.losses.mse, order="first")
    every, rate = 3, 0.1
    optimizer = accumulated(optax.sgd(rate), every)
    state = init_state(learner, optimizer, tasks, KEY)
    step = jax.jit(jm.meta_step(learner, optimizer, 2, "vmap", devices=jax.devices()[:1]))

    @jax.jit
    def mean_gradient(params, number):
        def mean_loss(params):
            keys = jm.episode_keys(jax.random.fold_in(KEY, number), jnp.arange(2))
            values = jax.vmap(lambda k: learner.loss(params, tasks.sample(k[0]), k[1], number)[0])(keys)
            return values.mean()

        return jax.grad(mean_loss)(params)

    start = state.params
    gradients = [mean_gradient(start, number) for number in range(every)]
    for number in range(every):
        state, _ = step(state, tasks.sample)
        if number < every - 1:
            jax.tree.map(np.testing.assert_array_equal, state.params, start)
    expected = jax.tree.map(lambda p, *g: p - rate * sum(g) / every, start, *gradients)
    assert_close(state.params, expected, 1e-7)
    assert np.abs(flat(expected) - flat(start)).max() > 1e-3
