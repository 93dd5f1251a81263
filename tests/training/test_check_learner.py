"""Tests of the problems that `jm.check_learner` reports."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
import toys

import jaxmeta as jm

KEY = jax.random.key(0)


def problems(learner, tasks):
    """Return the lines of the problems of a learner."""
    with pytest.raises(jm.ArgumentError) as raised:
        jm.check_learner(learner, tasks)
    assert raised.value.name == "learner"
    head, *lines = raised.value.problem.splitlines()
    assert head == "got one that cannot be trained and evaluated on these tasks:"
    assert all(line.startswith("  - ") for line in lines)
    return [line.removeprefix("  - ") for line in lines]


@pytest.mark.parametrize(
    ("learner", "tasks"),
    [
        (toys.maml(), toys.sinusoid()),
        (toys.nearest_mean(), toys.clusters()),
        (toys.worsening(), toys.clusters()),
        (jm.maml(jm.nn.MLP(out=3, hidden=(5,))), toys.clusters()),
        (jm.reptile(jm.nn.MLP(out=1, hidden=(5,)), loss=jm.losses.mse), toys.sinusoid()),
        (jm.prototypical(jm.nn.MLP(out=4, hidden=(5,))), toys.clusters()),
    ],
)
def test_valid_learners_pass(learner, tasks):
    assert jm.check_learner(learner, tasks) is None


def test_a_stream_is_checked_by_its_first_task():
    tasks = toys.clusters()
    stream = jm.TaskStream(lambda step: jax.vmap(tasks.sample)(jax.random.split(KEY, 2)), tasks.card)
    assert jm.check_learner(toys.nearest_mean(), stream) is None
    assert len(problems(toys.maml()._replace(init=lambda key, task: {}), stream)) >= 1


def test_all_problems_are_listed_with_their_source_lines():
    def adapt(params, support, key):
        return params["scle"]

    def loss(params, task, key):
        return jnp.zeros(2), {}

    lines = problems(toys.nearest_mean()._replace(adapt=adapt, loss=loss), toys.clusters())
    line = adapt.__code__.co_firstlineno + 1
    assert lines == [
        f"adapt: KeyError: 'scle' ({__file__}, line {line})",
        "loss: gives float32 of shape (2,) for one task; it must be a floating-point scalar",
    ]


def failing(*_, **__):
    raise RuntimeError("first line\nsecond line")


@pytest.mark.parametrize(
    ("part", "function", "pattern"),
    [
        ("init", None, r"init: got None; it must be a function"),
        ("adapt", 3, r"adapt: got 3; it must be a function"),
        ("predict", None, r"predict: got None; it must be a function"),
        ("loss", None, r"loss: got None; it must be a function"),
        ("init", failing, r"init: RuntimeError: first line \(.*test_check_learner.py, line \d+\)$"),
        ("predict", failing, r"predict: RuntimeError: first line \("),
        ("loss", failing, r"loss: RuntimeError: first line \("),
        ("init", lambda key, task: {}, "init: gives no arrays, so that there is nothing to train"),
        (
            "init",
            lambda key, task: {"scale": jnp.ones(4), "count": jnp.arange(3)},
            r"init: gives int32 of shape \(3,\) at \['count'\]; parameters are floating-point arrays",
        ),
        ("init", lambda key, task: {"scale": "much"}, "init: TypeError: "),
        (
            "predict",
            lambda params, adapted, x: params["scale"][0] * x[:, 0],
            r"predict: gives float32 of shape \(6,\) for 6 queries; it must be of shape \(6, 3\)",
        ),
        (
            "predict",
            lambda params, adapted, x: x,
            r"predict: gives float32 of shape \(6, 4\) for 6 queries; it must be of shape \(6, 3\)",
        ),
        (
            "predict",
            lambda params, adapted, x: jnp.zeros((6, 3), jnp.int32),
            r"predict: gives int32 of shape \(6, 3\) for 6 queries; outputs are floating-point numbers",
        ),
        ("predict", lambda params, adapted, x: (x, x), r"predict: gives \(\*, \*\); it must give one array"),
        ("loss", lambda params, task, key: jnp.int32(3), r"loss: gives int32 of shape \(\) for one task"),
        ("loss", lambda params, task, key: "low", "loss: gives str; it must give a floating-point scalar"),
        (
            "loss",
            lambda params, task, key: (params["scale"].sum(), {"far": jnp.zeros(2)}),
            r"loss: got an array of shape \(2,\) and type float32 for the metric 'far'",
        ),
        (
            "loss",
            lambda params, task, key: jax.lax.while_loop(
                lambda v: v < 3, lambda v: v + 1, params["scale"].sum()
            ),
            "loss: its gradient: ValueError: Reverse-mode differentiation does not work",
        ),
        (
            "adapt",
            lambda params, support, key: [support.x[i] for i in range(support.x.shape[0])],
            r"adapt: gives \[\*, \*, \*\] for 3 support examples and \[\*, \*, \*, \*, \*, \*\] for 6; the",
        ),
    ],
)
def test_each_problem_is_reported(part, function, pattern):
    learner = toys.nearest_mean()._replace(**{part: function})
    if part == "adapt":
        learner = learner._replace(predict=lambda params, adapted, x: jnp.zeros((6, 3)))
    lines = problems(learner, toys.clusters())
    assert any(re.match(pattern, line) for line in lines), lines


def test_regression_outputs_have_the_shape_of_the_targets_or_a_metric():
    def predict(params, adapted, x):
        return jnp.concatenate([x, x], -1)

    learner = toys.maml()._replace(predict=predict)
    (line,) = problems(learner, toys.sinusoid())
    assert line.startswith("predict: gives float32 of shape (7, 2) for 7 queries; it must be of the targets'")
    assert line.endswith("(7, 1), or the learner must have a metric= for such outputs")
    with_metric = learner._replace(metric=lambda outputs, y, mask: jnp.abs(outputs[:, :1] - y).mean())
    assert jm.check_learner(with_metric, toys.sinusoid()) is None
    (line,) = problems(learner._replace(metric=lambda outputs, y, mask: outputs - y[:3]), toys.sinusoid())
    assert line.startswith("metric: of outputs (7, 2) and targets (7, 1): TypeError: ")
    (line,) = problems(learner._replace(metric=lambda outputs, y, mask: outputs), toys.sinusoid())
    assert "got an array of shape (7, 2) and type float32 for the metric 'metric'" in line


def test_training_refuses_an_invalid_learner_before_its_first_step():
    learner = toys.maml()._replace(predict=lambda params, x: x)
    with pytest.raises(jm.ArgumentError, match=r"learner: got one .*\n  - predict: TypeError: .*argument"):
        jm.train(learner, toys.sinusoid(), optax.sgd(0.1), steps=300, key=KEY)


def test_a_learner_of_the_library_raises_its_own_error():
    learner = jm.maml(jm.nn.MLP(out=4, hidden=(5,)))
    with pytest.raises(ValueError, match=r"^the model has 4 outputs and the tasks have 3 ways"):
        jm.train(learner, toys.clusters(), optax.sgd(0.1), steps=3, key=KEY)
    (line,) = problems(learner, toys.clusters())
    assert line.startswith("init: ValueError: the model has 4 outputs and the tasks have 3 ways")
