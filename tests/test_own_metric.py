"""User-defined metrics and losses in training and evaluation."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import minimal_learner
import numpy as np
import optax
import pytest

import jaxmeta as jm
from jaxmeta.losses import ScoreOrLoss, metric_label, scores
from jaxmeta.training import Validated
from jaxmeta.training.evaluate import metric_name

KEY = jax.random.key(3)
Y = np.array([[1.0], [2.0], [4.0]], np.float32)
MASK = np.array([True, True, False])
OUTPUTS = jnp.array([[1.0, 0.0], [0.0, 1.0], [jnp.nan, jnp.nan]], jnp.float32)


def nll(outputs, y, mask=None):
    """Return the mean negative log-likelihood of normal distributions; outputs are mean and log-variance."""
    mean, log_variance = outputs[:, :1], outputs[:, 1:]
    losses = 0.5 * (jnp.log(2 * jnp.pi) + log_variance + (y - mean) ** 2 / jnp.exp(log_variance))
    return jm.losses.masked_mean(losses[:, 0], mask)


def nll_by_numpy(outputs, y):
    outputs, y = np.asarray(outputs, np.float64), np.asarray(y, np.float64)
    return 0.5 * np.mean(
        np.log(2 * np.pi) + outputs[:, 1:] + (y - outputs[:, :1]) ** 2 / np.exp(outputs[:, 1:])
    )


def within(outputs, y, mask):
    """Return the number of means within 1 of the target, as sum and count."""
    return jm.losses.masked_sum((jnp.abs(outputs[:, 0] - y[:, 0]) <= 1).astype(jnp.float32), mask)


def distance(outputs, y, mask):
    """Return the mean distance of the first output from the target."""
    return jm.losses.masked_mean(jnp.abs(outputs[:, 0] - y[:, 0]), mask)


def test_a_metric_is_reported_as_sum_and_count():
    batch = jm.Batch(Y, jnp.asarray(Y), mask=jnp.asarray(MASK))
    # Targets 1 and 2; means 1 and 0.
    assert {k: tuple(map(float, v)) for k, v in scores(OUTPUTS, batch, within).items()} == {"within": (1, 2)}
    assert {k: tuple(map(float, v)) for k, v in scores(OUTPUTS, batch, distance).items()} == {
        "distance": (1, 1)
    }
    constant = scores(OUTPUTS, batch, lambda outputs, y, mask: 2.5)
    assert {k: tuple(map(float, v)) for k, v in constant.items()} == {"metric": (2.5, 1)}
    empty = jm.Batch(Y, jnp.asarray(Y), mask=jnp.zeros(3, bool))
    assert [*map(float, scores(OUTPUTS, empty, lambda *_: jnp.nan)["metric"])] == [0, 0]


def test_the_loss_is_the_score_where_outputs_do_not_fit_targets():
    batch = jm.Batch(Y, jnp.asarray(Y))
    result = scores(OUTPUTS[:2], jm.Batch(Y[:2], jnp.asarray(Y[:2])), ScoreOrLoss(nll))
    # ½ log 2π + ½ (0 + 0), and ½ log 2π + ½ (1 + 4/e).
    expected = 0.5 * np.log(2 * np.pi) + 0.25 * (1 + 4 / np.e)
    assert {k: (pytest.approx(float(t)), c) for k, (t, c) in result.items()} == {"loss": (expected, 1.0)}
    fitting = scores(jnp.zeros((3, 1)), batch, ScoreOrLoss(nll))
    assert {k: tuple(map(float, v)) for k, v in fitting.items()} == {"mse": (21, 3)}
    y = jnp.array([0, 1, 1])
    classes = scores(jnp.eye(3), jm.Batch(y, y), ScoreOrLoss(nll))
    assert {k: tuple(map(float, v)) for k, v in classes.items()} == {"accuracy": (2, 3)}


def test_a_metric_without_its_own_name_is_labelled_metric():
    def loss(outputs, y, mask):
        return 0.0

    assert metric_label(loss) == metric_label(functools.partial(within)) == "metric"
    assert metric_label(nll) == "nll"


@functools.cache
def network():
    def init(key, x):
        return {"w": jnp.array([[0.5, 0.1]]), "b": jnp.array([0.2, 0.3])}

    return init, lambda params, x: x @ params["w"] + params["b"][None]


FACTORIES = {
    "maml": functools.partial(jm.maml, inner_lr=0.1),
    "reptile": functools.partial(jm.reptile, inner_lr=0.1, inner_steps=1, eval_steps=1, inner_batch=None),
    "maml_plus_plus": functools.partial(jm.maml_plus_plus, inner_lr=0.1, inner_steps=1),
}


@functools.cache
def learner_of(name, metric=None):
    return FACTORIES[name](network(), loss=nll, metric=metric)


def adapted_by_numpy(params, task):
    """Return the outputs after one step of gradient descent on the support set, by central differences."""
    flat = np.concatenate([np.ravel(params["w"]), np.ravel(params["b"])]).astype(np.float64)

    def outputs(flat, x):
        return np.asarray(x, np.float64) @ flat[None, :2] + flat[2:]

    def loss(flat):
        return nll_by_numpy(outputs(flat, task.support.x), task.support.y)

    gradient = [(loss(flat + step) - loss(flat - step)) / 2e-6 for step in 1e-6 * np.eye(4)]
    return outputs(flat - 0.1 * np.array(gradient), task.query.x)


@pytest.mark.parametrize("name", FACTORIES)
def test_two_outputs_for_one_target_train_with_a_user_defined_loss(name):
    learner, tasks = learner_of(name), minimal_learner.lines()
    task = tasks.sample(KEY)
    params = learner.init(KEY, task)
    _, metrics = jax.jit(learner.loss)(params, task, KEY)
    # Reptile also reports the distance between initial and adapted parameters.
    assert set(metrics) - {"distance"} == {"loss"}
    expected = nll_by_numpy(adapted_by_numpy({"w": [[0.5, 0.1]], "b": [0.2, 0.3]}, task), task.query.y)
    np.testing.assert_allclose(metrics["loss"][0], expected, rtol=1e-5)
    _, metrics = jax.jit(learner_of(name, within).loss)(params, task, KEY)
    assert set(metrics) - {"distance"} == {"loss", "within"}
    assert metrics["within"][1] == 3


def test_evaluation_uses_the_loss_the_learner_s_metric_or_another_metric():
    tasks = minimal_learner.lines()
    params = learner_of("maml").init(KEY, tasks.sample(KEY))
    drawn = [tasks.sample(jax.random.split(jax.random.fold_in(KEY, i))[0]) for i in range(3)]
    outputs = [adapted_by_numpy(params["model"], task) for task in drawn]
    targets = [np.asarray(task.query.y) for task in drawn]
    by_loss = [nll_by_numpy(o, y) for o, y in zip(outputs, targets, strict=True)]
    near = [np.mean(np.abs(o[:, 0] - y[:, 0]) <= 1) for o, y in zip(outputs, targets, strict=True)]
    distances = [np.mean(np.abs(o[:, 0] - y[:, 0])) for o, y in zip(outputs, targets, strict=True)]

    def evaluated(metric=None, **settings):
        return jm.evaluate_episodes(
            learner_of("maml", metric), params, tasks, episodes=3, key=KEY, **settings
        )

    np.testing.assert_allclose(evaluated(), by_loss, rtol=1e-5)
    np.testing.assert_allclose(evaluated(within), near, rtol=1e-5)
    np.testing.assert_allclose(evaluated(metric=within, batch=2), near, rtol=1e-5)
    other = jm.evaluate(learner_of("maml", within), params, tasks, episodes=3, key=KEY, metric=distance)
    np.testing.assert_allclose(other.mean, np.mean(distances), rtol=1e-5)
    assert metric_name(tasks, learner_of("maml"), params) == "loss"
    assert metric_name(tasks, learner_of("maml", within), params) == "within"


def trained(learner, **settings):
    events = []
    state = jm.train(
        learner,
        minimal_learner.lines(),
        optax.sgd(0.3),
        steps=4,
        meta_batch=2,
        key=KEY,
        validation=minimal_learner.lines(),
        validation_episodes=4,
        validate_every=1,
        report=events.append,
        devices=jax.devices()[:1],
        **settings,
    )
    return state, [event for event in events if isinstance(event, Validated)]


def test_validation_maximizes_or_minimizes_the_metric_as_set():
    """Check with the weight itself as the metric, which training raises from 0 towards the mean slope."""

    def weight(outputs, y, mask):
        return outputs[0, 0]

    learner = minimal_learner.slope()._replace(metric=weight)
    for maximize in (True, False):
        state, events = trained(learner, maximize=maximize)
        assert {event.metric for event in events} == {"weight"}
        means = [event.evaluation.mean for event in events]
        assert len(set(means)) == 4
        np.testing.assert_allclose(state.params["w"], max(means) if maximize else min(means), rtol=1e-5)
    with pytest.raises(
        jm.ArgumentError, match="maximize: got None, but the learner has its own metric 'weight'"
    ):
        trained(learner)


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize(
    ("learner", "name"),
    [(learner_of("maml"), "loss"), (minimal_learner.slope()._replace(metric=jm.losses.mse), "mse")],
    ids=["loss", "mse"],
)
def test_validation_minimizes_a_loss(learner, name):
    _, events = trained(learner)
    assert {event.metric for event in events} == {name}
    best = min(events, key=lambda event: event.evaluation.mean)
    assert best is [event for event in events if event.best][-1]


@pytest.mark.parametrize("make", [jm.maml, jm.reptile, jm.learned_optimizer, jm.cavia])
def test_regression_with_cross_entropy_is_refused(make):
    learner = make(jm.nn.MLP(out=1, hidden=(3,)))
    with pytest.raises(jm.ArgumentError, match=r"loss: got cross_entropy, .* pass loss=jm.losses.mse"):
        learner.init(KEY, minimal_learner.lines().sample(KEY))


def test_classification_with_squared_error_is_refused():
    task = jm.Task(*[jm.Batch(jnp.zeros((4, 2)), jnp.array([0, 1, 0, 1]), ways=2)] * 2)
    with pytest.raises(jm.ArgumentError, match=r"loss: got mse, .* pass loss=jm.losses.cross_entropy"):
        jm.maml(jm.nn.MLP(out=2), loss=jm.losses.mse).init(KEY, task)


@pytest.fixture
def unchecked_types():
    """Turn the tests' run-time type checker off, so that the library's checks see every argument."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked_types")
def test_a_metric_that_is_not_a_function_is_refused():
    with pytest.raises(jm.ArgumentError, match=r"metric: got 'f1' \(str\); it must be a function"):
        jm.evaluate(learner_of("maml"), {}, minimal_learner.lines(), key=KEY, metric="f1")
    with pytest.raises(jm.ArgumentError, match=r"metric: got 'f1' \(str\); it must be a function"):
        jm.maml(jm.nn.MLP(out=1), metric="f1")
