"""Tests of the alignment of two meta-gradients: closed forms, and its use as a training metric."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from support import raises_argument_error

import jaxmeta as jm
from jaxmeta.training.diagnostics import alignment
from jaxmeta.training.sharding import replicate, task_mesh

KEY = jax.random.key(0)


def from_support_loss(support_loss, query_loss, params, steps, rate, order):
    """Build a learner whose losses do not depend on the task."""
    adapt = jm.inner_loop(lambda theta, _: support_loss(theta), optax.sgd(rate), steps, order=order)

    def loss(params, task, key, step=None):
        value = query_loss(adapt(params, None)[0])
        return value, {"mse": (value, jnp.ones_like(value))}

    return jm.Learner(lambda key, task: params, lambda *_: None, lambda *_: None, loss)


def second_and_first_order(*arguments):
    return [from_support_loss(*arguments, order) for order in ("second", "first")]


def test_alignment_of_quadratics_on_a_line_matches_the_closed_form():
    # g_MAML = (1 − αa)^n g_FOMAML, so that the cosine is ±1.
    for rate, steps, cosine, ratio in (
        (0.1, 1, 1, 0.8),
        (0.1, 3, 1, 0.512),
        (0.7, 1, -1, 0.4),
        (0.7, 2, 1, 0.16),
    ):
        learners = second_and_first_order(
            lambda t: (t - 1) ** 2, lambda t: 0.5 * (t - 3) ** 2, jnp.zeros(()), steps, rate
        )
        result = jm.meta_gradient_alignment(*learners, jnp.zeros(()), toys.sinusoid(), episodes=3, key=KEY)
        np.testing.assert_allclose(result, (cosine, ratio), rtol=1e-5)


def test_alignment_in_the_plane_matches_the_closed_form():
    # g_MAML = (−0.148, 1.804) and g_FOMAML = (1, 2).
    start = jnp.array([1.0, 2.0])
    learners = second_and_first_order(lambda t: t[0] ** 2 * t[1], lambda t: t[0] + 2 * t[1], start, 2, 0.1)
    result = jm.meta_gradient_alignment(*learners, start, toys.sinusoid(), episodes=2, key=KEY)
    true, first = np.array([-0.148, 1.804]), np.array([1.0, 2.0])
    norms = np.linalg.norm(true), np.linalg.norm(first)
    np.testing.assert_allclose(result, (true @ first / (norms[0] * norms[1]), norms[0] / norms[1]), rtol=1e-5)


def weighted_by_key(learner):
    """Weight the loss by a random number drawn from the key, on which a loss with dropout depends, too."""

    def loss(params, task, key, step=None):
        value, metrics = learner.loss(params, task, key, step)
        return value * jax.random.exponential(key), metrics

    return learner._replace(loss=loss)


def test_alignment_compares_the_mean_gradients_over_the_episodes():
    maml, fomaml = weighted_by_key(toys.maml()), weighted_by_key(toys.maml(order="first"))
    tasks = toys.sinusoid()
    params = maml.init(KEY, tasks.sample(KEY))
    result = jm.meta_gradient_alignment(maml, fomaml, params, tasks, episodes=5, key=KEY)
    means = []
    for learner in (maml, fomaml):

        @jax.jit
        def gradient(index, learner=learner):
            task_key, learner_key = jax.random.split(jax.random.fold_in(KEY, index))
            task = tasks.sample(task_key)
            return jax.grad(lambda p: learner.loss(p, task, learner_key)[0])(params)

        grads = [jax.device_get(gradient(index)) for index in range(5)]
        means.append(
            np.concatenate(
                [np.ravel(sum(leaves)) for leaves in zip(*map(jax.tree.leaves, grads), strict=True)]
            )
        )
    norms = [np.linalg.norm(mean) for mean in means]
    np.testing.assert_allclose(result.cosine, means[0] @ means[1] / np.prod(norms), rtol=1e-4)
    np.testing.assert_allclose(result.norm_ratio, norms[0] / norms[1], rtol=1e-4)
    assert result.cosine < 0.999
    same = jm.meta_gradient_alignment(maml, maml, params, tasks, episodes=5, key=KEY)
    np.testing.assert_allclose(same, (1, 1), rtol=1e-5)


def test_alignment_of_tiny_huge_and_zero_gradients():
    for size in (1e-30, 1.0, 1e30):
        a, b = {"w": size * jnp.array([1.0, 1.0])}, {"w": size * jnp.array([2.0, 0.0])}
        np.testing.assert_allclose(alignment(a, b), (0.5**0.5, 0.5**0.5), rtol=1e-5)
    zero = alignment({"w": jnp.zeros(2)}, {"w": jnp.ones(2)})
    assert (zero.cosine, zero.norm_ratio) == (0, 0)
    both_zero = alignment({"w": jnp.zeros(2)}, {"w": jnp.zeros(2)})
    assert (both_zero.cosine, both_zero.norm_ratio) == (0, 1)


@cache
def meta_gradient_of_sgd(order):
    """Return the change of the parameters in one step of SGD with a learning rate of 0.1."""
    tasks, optimizer = toys.sinusoid(), optax.sgd(0.1)
    state = jm.init_state(toys.maml(), optimizer, tasks, KEY)
    learner = toys.maml() if order == "second" else toys.maml(order=order)
    step = jm.meta_step(learner, optimizer, 6, "vmap", devices=jax.devices()[:1])
    after, _ = jax.jit(step)(state, tasks.sample)
    return jax.tree.map(jnp.subtract, state.params, after.params)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("strategy", "devices"),
    [
        ("vmap", 1),
        ("scan", 1),
        (3, 2),
    ],
)
def test_alignment_as_a_training_metric_changes_no_parameter(strategy, devices):
    if len(jax.devices()) < devices:
        pytest.skip("needs 2 devices (jax_num_cpu_devices)")
    tasks, optimizer = toys.sinusoid(), optax.sgd(0.1)
    maml, fomaml = toys.maml(), toys.maml(order="first")
    used = tuple(jax.devices()[:devices])

    def one_step(**settings):
        state = replicate(jm.init_state(maml, optimizer, tasks, KEY), task_mesh(6, used))
        step = jax.jit(jm.meta_step(maml, optimizer, 6, strategy, devices=used, **settings))
        return jax.device_get(step(state, tasks.sample))

    plain, metrics = one_step()
    diagnosed, more = one_step(compared_to=fomaml)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), diagnosed.params, plain.params)
    assert set(more) == {*metrics, "cosine", "norm_ratio"}
    expected = alignment(meta_gradient_of_sgd("second"), meta_gradient_of_sgd("first"))
    np.testing.assert_allclose((more["cosine"], more["norm_ratio"]), expected, rtol=1e-3)


@pytest.mark.nightly
def test_train_reports_the_alignment():
    events = []
    jm.train(
        toys.maml(), toys.sinusoid(), optax.sgd(0.1), steps=2, meta_batch=2, key=KEY, log_every=1,
        compared_to=toys.maml(order="first"), report=events.append,
    )  # fmt: skip
    assert all(0 < event.metrics["cosine"] <= 1.0001 and event.metrics["norm_ratio"] > 0 for event in events)


def test_zero_episodes_are_refused():
    with pytest.raises(ValueError, match="episodes: got 0"):
        jm.meta_gradient_alignment(toys.maml(), toys.maml(), {}, toys.sinusoid(), episodes=0, key=KEY)


def test_a_stream_is_refused():
    stream = jm.TaskStream(lambda step: None)
    with raises_argument_error(r"tasks: got a stream; it must be a jm\.TaskDistribution"):
        jm.meta_gradient_alignment(toys.maml(), toys.maml(), {}, stream, episodes=2, key=KEY)
