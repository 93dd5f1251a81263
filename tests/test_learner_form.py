"""User-defined learners: optional arguments and return values, training and evaluation."""

import functools

import jax
import jax.numpy as jnp
import minimal_learner
import numpy as np
import optax
import pytest
from support import raises_argument_error

import jaxmeta as jm
from jaxmeta.learner_form import normalized

KEY = jax.random.key(0)


def test_mask_and_step_are_passed_to_functions_that_take_them():
    def call(predict):
        learner = normalized(jm.Learner(None, None, predict, None))
        return learner.predict("params", "adapted", "x", "mask")

    assert call(lambda params, adapted, x: (x,)) == ("x",)
    assert call(lambda params, adapted, x, mask: (x, mask)) == ("x", "mask")
    assert call(lambda params, adapted, x, mask=None: (x, mask)) == ("x", "mask")
    assert call(lambda params, adapted, x, *, mask=None: (x, mask)) == ("x", "mask")
    assert call(lambda params, adapted, x, **more: (x, more)) == ("x", {"mask": "mask"})
    assert call(lambda *arguments: arguments) == ("params", "adapted", "x", "mask")
    # A parameter with another default is not the mask; one with default None, or without a default, is.
    assert call(lambda params, adapted, x, temperature=2.0: (x, temperature)) == ("x", 2.0)
    assert call(lambda params, adapted, x, m=None: (x, m)) == ("x", "mask")
    assert call(lambda params, adapted, x, real: (x, real)) == ("x", "mask")
    assert call(functools.partial(lambda scale, params, adapted, x: (scale, x), 3)) == (3, "x")

    def loss(function):
        return normalized(jm.Learner(None, None, None, function)).loss("params", "task", "key", step=7)

    assert loss(lambda params, task, key: (1.0, {})) == (1.0, {})
    assert loss(lambda params, task, key, step: (step, {})) == (7, {})
    assert loss(lambda params, task, key, rate=0.5: (rate, {})) == (0.5, {})


def test_the_signature_of_a_wrapper_decides_over_that_of_the_wrapped_function():
    def inner(params, adapted, x, mask=None):
        return x, mask

    @functools.wraps(inner)
    def outer(params, adapted, x):
        return inner(params, adapted, x)

    @functools.wraps(inner)
    def forwarding(*arguments, **more):
        return inner(*arguments, **more)

    for predict, expected in ((outer, None), (forwarding, "mask"), (inner, "mask")):
        learner = normalized(jm.Learner(None, None, predict, None))
        assert learner.predict(None, None, "x", "mask") == ("x", expected)
    compiled = normalized(jm.Learner(None, None, jax.jit(lambda params, adapted, x: 2 * x), None))
    assert compiled.predict(None, None, 1.5, np.ones(1, bool)) == 3.0


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (2.0, (2.0, {})),
        ((2.0, {}), (2.0, {})),
        ((2.0, {"a": 3.0}), (2.0, {"a": (3.0, 1.0)})),
        ((2.0, {"a": (3.0, 4), "b": np.float32(5)}), (2.0, {"a": (3.0, 4), "b": (5.0, 1.0)})),
        ((2.0, {"a": np.bool_(True)}), (2.0, {"a": (True, 1.0)})),
    ],
)
def test_a_loss_may_return_its_value_alone_and_metrics_without_counts(returned, expected):
    learner = normalized(jm.Learner(None, None, None, lambda params, task, key: returned))
    assert learner.loss(None, None, None) == expected


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"far": np.zeros(3)}, r"an array of shape \(3,\) and type float64 for the metric 'far'"),
        ({"far": (1, 2, 3)}, r"a tuple of 3: 1, 2, 3 for the metric 'far'"),
        ({"far": (np.zeros(2), 1)}, r"a tuple of 2: an array of shape \(2,\)"),
        ({"far": None}, "None for the metric 'far'; it must be a real number, or"),
        ({"far": 1j}, "1j for the metric"),
        ([1.0], "a list of 1: 1.0 for the metrics of the loss; they must be a dict"),
    ],
)
def test_invalid_metrics_are_refused(metrics, message):
    learner = normalized(jm.Learner(None, None, None, lambda params, task, key: (1.0, metrics)))
    with pytest.raises(jm.ArgumentError, match=f"^learner: got {message}"):
        learner.loss(None, None, None)


def test_other_objects_are_refused_as_learners():
    tasks = minimal_learner.lines()
    with raises_argument_error(r"\(1, 2\)"):
        jm.evaluate((1, 2), {}, tasks, key=KEY)
    with raises_argument_error("learner"):
        jm.train(jm.maml, tasks, optax.sgd(0.1), steps=1, key=KEY)
    with pytest.raises(jm.ArgumentError, match=r"learner: got \(1, 2\); it must be a jm.Learner"):
        normalized((1, 2))


def test_normalized_learners_are_equal_and_library_learners_are_unchanged():
    learner = minimal_learner.slope()
    assert normalized(learner) == normalized(learner)
    assert hash(normalized(learner)) == hash(normalized(learner))
    assert normalized(normalized(learner)) == normalized(learner)
    maml = jm.maml(jm.nn.MLP(out=1), loss=jm.losses.mse)
    assert normalized(maml) == maml
    assert all(a is b for a, b in zip(normalized(maml), maml, strict=True))


@pytest.mark.parametrize("strategy", ["vmap", "scan"])
def test_training_and_evaluation_of_a_minimal_learner_match_numpy(strategy):
    learner, tasks = minimal_learner.slope(), minimal_learner.lines()
    state = jm.train(
        learner,
        tasks,
        optax.sgd(0.1),
        steps=3,
        meta_batch=2,
        key=KEY,
        strategy=strategy,
        devices=jax.devices()[:1],
    )
    # In NumPy: the loss is the mean of (w − slope)², and its gradient 2 (w − mean slope).
    w = 0.0
    for step in range(3):
        w -= 0.1 * 2 * np.mean([w - minimal_learner.slope_of(tasks, KEY, step, i) for i in range(2)])
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
    key = jax.random.key(5)
    result = jm.evaluate(learner, state.params, tasks, episodes=4, key=key)
    slopes = np.array([minimal_learner.slope_of(tasks, key, None, i) for i in range(4)])
    np.testing.assert_allclose(result.mean, np.mean((slopes - w) ** 2 * minimal_learner.SQUARE), rtol=1e-5)
    metrics = jm.evaluate_metrics(learner, state.params, tasks, episodes=4, key=key)
    np.testing.assert_allclose(metrics["slope_error"], np.mean(np.abs(slopes - w)), rtol=1e-5)


def test_validation_and_alignment_take_a_minimal_learner():
    learner, tasks = minimal_learner.slope(), minimal_learner.lines()
    events = []
    jm.train(
        learner,
        tasks,
        optax.sgd(0.1),
        steps=2,
        meta_batch=2,
        key=KEY,
        validation=tasks,
        validation_episodes=2,
        report=events.append,
        devices=jax.devices()[:1],
    )
    assert [event.metric for event in events if hasattr(event, "metric")] == ["mse"]
    result = jm.meta_gradient_alignment(
        learner, minimal_learner.slope(), {"w": jnp.zeros(())}, tasks, episodes=2, key=KEY
    )
    assert result.cosine == pytest.approx(1.0)


def test_an_evaluation_of_a_user_defined_learner_is_compiled_once():
    traces = []

    def predict(params, adapted, x):
        traces.append(None)
        return params["w"] * x

    learner, tasks = minimal_learner.slope()._replace(predict=predict), minimal_learner.lines()
    jm.evaluate(learner, {"w": jnp.asarray(1.0)}, tasks, episodes=2, key=KEY)
    count = len(traces)
    assert count
    jm.evaluate(learner, {"w": jnp.asarray(2.0)}, tasks, episodes=2, key=KEY)
    assert len(traces) == count


def test_a_decorated_factory_may_return_a_minimal_learner():
    @jm.learner(kinds=("regression",))
    def method(network, *, start: float = 0.5):
        return minimal_learner.slope()._replace(init=lambda key, task: {"w": jnp.asarray(start)})

    learner, tasks = method(None, start=2.0), minimal_learner.lines()
    task = tasks.sample(KEY)
    params = learner.init(KEY, task)
    value, metrics = learner.loss(params, task, KEY, step=3)
    slope = float(task.query.y[0, 0] / task.query.x[0, 0])
    assert value == pytest.approx((2.0 - slope) ** 2, rel=1e-5)
    assert set(metrics) == {"slope_error"}
    outputs = learner.predict(params, learner.adapt(params, task.support, KEY), task.query.x, None)
    np.testing.assert_allclose(outputs, 2.0 * task.query.x)
