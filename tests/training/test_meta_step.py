"""Tests of the meta-step: same result under every strategy and number of devices, and invalid arguments."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxmeta.training import init_state, meta_step
from jaxmeta.training.sharding import replicate, task_mesh

TASKS = 6


@cache
def compiled(strategy, devices, learner, tasks, optimizer):
    """Return the initial state and the compiled step."""
    devices = jax.devices()[:devices]
    step = jax.jit(meta_step(learner, optimizer, TASKS, strategy, devices=devices))
    state = init_state(learner, optimizer, tasks(), jax.random.key(0))
    return replicate(state, task_mesh(TASKS, devices)), step


SGD = optax.sgd(0.1)


def run(strategy, devices=1, learner=None, tasks=toys.sinusoid, steps=3, optimizer=SGD):
    state, step = compiled(strategy, devices, learner or toys.maml(), tasks, optimizer)
    for _ in range(steps):
        state, metrics = step(state, tasks().sample)
    return jax.device_get((state.params, metrics)), state


def test_the_gradient_is_the_mean_over_the_episodes_of_the_keys():
    learner, tasks, optimizer = toys.maml(), toys.sinusoid(), optax.sgd(0.1)
    state = init_state(learner, optimizer, tasks, jax.random.key(0))

    @jax.jit
    def of_episode(index):
        key = jax.random.fold_in(jax.random.fold_in(state.key, 0), index)
        task_key, learner_key = jax.random.split(key)
        loss = jax.value_and_grad(learner.loss, has_aux=True)
        (value, _), grad = loss(state.params, tasks.sample(task_key), learner_key, step=0)
        return value, grad

    losses, grads = zip(*(jax.device_get(of_episode(index)) for index in range(TASKS)), strict=True)
    expected = jax.tree.map(lambda p, *g: p - 0.1 * sum(g) / TASKS, state.params, *grads)
    (params, metrics), _ = run("scan", steps=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, expected)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["mse"], np.mean(losses), rtol=1e-5)


@pytest.mark.nightly_rows(after=2)
@pytest.mark.parametrize(
    ("strategy", "devices"), [("auto", 1), ("vmap", 2), ("scan", 1), (3, 1), ("scan", 2), (1, 2)]
)
def test_strategies_and_device_counts_agree(strategy, devices):
    if len(jax.devices()) < devices:
        pytest.skip("needs 2 devices (jax_num_cpu_devices)")
    reference, _ = run("vmap")
    result, state = run(strategy, devices)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), result, reference)
    assert int(state.step) == 3


@pytest.mark.parametrize("strategy", [pytest.param("vmap", marks=pytest.mark.nightly), "scan"])
def test_metrics_are_weighted_by_their_counts(strategy):
    # Five of six queries are real; a mean over all six would not be a multiple of 1/5.
    (_, metrics), _ = run(strategy, learner=toys.nearest_mean(), tasks=toys.clusters, steps=1)
    right = float(metrics["accuracy"]) * 5 * TASKS
    assert right == pytest.approx(round(right), abs=1e-4)
    assert np.isfinite(metrics["loss"])


def test_raw_and_typed_keys_draw_the_same_episodes():
    typed, _ = run("vmap")
    learner, tasks = toys.maml(), toys.sinusoid()
    state = init_state(learner, optax.sgd(0.1), tasks, jax.random.PRNGKey(0))
    assert state.key.dtype == jnp.uint32
    step = jax.jit(meta_step(learner, optax.sgd(0.1), TASKS, "vmap", devices=jax.devices()[:1]))
    for _ in range(3):
        state, metrics = step(state, tasks.sample)
    jax.tree.map(np.testing.assert_array_equal, typed, jax.device_get((state.params, metrics)))


def test_each_step_draws_new_episodes_and_keeps_the_key():
    constant = optax.sgd(0.0)
    (_, first), _ = run("vmap", steps=1, optimizer=constant)
    (_, second), state = run("vmap", steps=2, optimizer=constant)
    assert first["loss"] != second["loss"]
    assert (jax.random.key_data(state.key) == jax.random.key_data(jax.random.key(0))).all()


def test_clipping_and_schedules_of_optax_apply_to_the_meta_gradient():
    # The norm of the gradient is above 1e-3, and the second step has half the learning rate of the first.
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.5})
    optimizer = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(schedule))
    start = init_state(toys.maml(), optimizer, toys.sinusoid(), jax.random.key(0)).params
    (once, _), _ = run("vmap", steps=1, optimizer=optimizer)
    (twice, _), _ = run("vmap", steps=2, optimizer=optimizer)
    for before, after, length in ((start, once, 1e-3), (once, twice, 0.5e-3)):
        moved = optax.tree.norm(jax.tree.map(jnp.subtract, after, before))
        np.testing.assert_allclose(moved, length, rtol=1e-2)


@pytest.mark.parametrize(
    ("meta_batch", "strategy", "devices", "message"),
    [
        (0, "auto", 1, "meta_batch: got 0"),
        (4, "loop", 1, "strategy: got 'loop'"),
        (4, True, 1, "strategy: got True"),
        (4, 3, 1, "strategy: got 3"),
        (4, 0, 1, "strategy: got 0"),
        (4, "scan", 0, "devices: got 0"),
        (3, "scan", 2, "devices: got 2"),
    ],
)
def test_invalid_settings_are_named(meta_batch, strategy, devices, message):
    with pytest.raises(ValueError, match=message):
        meta_step(toys.maml(), optax.sgd(0.1), meta_batch, strategy, devices=[jax.devices()[0]] * devices)


def test_init_state_refuses_a_loss_that_is_not_scalar():
    learner = toys.maml()._replace(loss=lambda params, task, key, step=None: (params["bias"], {}))
    with pytest.raises(ValueError, match="scalar"):
        init_state(learner, optax.sgd(0.1), toys.sinusoid(), jax.random.key(0))


def test_init_state_raises_the_error_of_the_learner():
    def loss(params, task, key, step=None):
        raise ValueError("model: got outputs of width 4, but the task has 3 ways")

    with pytest.raises(ValueError, match="width 4"):
        init_state(
            toys.nearest_mean()._replace(loss=loss), optax.sgd(0.1), toys.clusters(), jax.random.key(0)
        )


@pytest.mark.parametrize("strategy", ["vmap", "scan"])
def test_losses_and_metrics_in_bfloat16_are_averaged_in_float32(strategy):
    # 300 tasks: counting by ones in bfloat16 stops at 256.
    tasks, learner = toys.sinusoid(), toys.maml()

    def loss(params, task, key, step=None):
        one = jnp.ones((), jnp.bfloat16)
        return one + 0 * params["bias"].sum().astype(jnp.bfloat16), {"share": (0.25 * one, one)}

    learner = learner._replace(loss=loss)
    step = jax.jit(meta_step(learner, SGD, 300, strategy, devices=jax.devices()[:1]))
    _, metrics = step(init_state(learner, SGD, tasks, jax.random.key(0)), tasks.sample)
    assert metrics == {"loss": 1.0, "share": 0.25}
