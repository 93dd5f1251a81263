"""Tests of evaluation: fixed episodes for any batch size, closed forms, masks, calibration."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import jaxmeta as jm
from jaxmeta.core import Learner, TaskDistribution, TaskStream, episode_keys
from jaxmeta.tasks import classes_of, from_arrays, glyph_metadata, glyphs, prepare_folder, sequences, stream
from jaxmeta.training import (
    Evaluation,
    calibrate,
    evaluate,
    evaluate_classes,
    evaluate_episodes,
    evaluate_metrics,
    run_episodes,
)
from jaxmeta.training.evaluate import metric_name

KEY = jax.random.key(5)


def initial_params(learner, tasks):
    return learner.init(jax.random.key(0), tasks.sample(jax.random.key(1)))


def test_the_confidence_interval_divides_by_n_minus_1():
    result = Evaluation.of(np.array([0.6, 0.7, 0.8, 0.5, 0.9]))
    assert result.mean == pytest.approx(0.7, abs=1e-12)
    assert result.ci95 == pytest.approx(0.138593, abs=1e-6)
    assert result.episodes == 5


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_values_are_in_the_order_of_the_episodes(kind):
    learner, tasks = (
        (toys.nearest_mean(), toys.clusters()) if kind == "classification" else (toys.maml(), toys.sinusoid())
    )
    params = initial_params(learner, tasks)
    values = evaluate_episodes(learner, params, tasks, episodes=5, key=KEY)

    @jax.jit
    def outputs_of(index):
        task_key, adapt_key = jax.random.split(jax.random.fold_in(KEY, index))
        task = tasks.sample(task_key)
        adapted = learner.adapt(params, task.support, adapt_key)
        return task, learner.predict(params, adapted, task.query.x, task.query.mask)

    for index, value in enumerate(values):
        task, outputs = jax.device_get(outputs_of(index))
        if kind == "classification":
            real = np.asarray(task.query.mask)
            expected = (outputs.argmax(-1) == np.asarray(task.query.y))[real].mean()
        else:
            expected = np.square(outputs - np.asarray(task.query.y)).mean()
        assert value == pytest.approx(expected, rel=1e-5)


def test_metrics_are_the_sum_over_all_episodes_divided_by_the_count():
    tasks = toys.clusters()
    keys = [jax.random.split(jax.random.fold_in(KEY, index))[0] for index in range(8)]
    sums = np.array([jnp.nansum(tasks.sample(key).query.x) for key in keys])
    limit = float(np.median(sums))

    def loss(params, task, key, step=None):
        value = jnp.nansum(task.query.x)
        counted = jnp.where(value > limit, 1.0, 0.0)
        return jnp.zeros(()), {"sum": (counted * value, counted), "never": (counted * 0, counted * 0)}

    learner = toys.nearest_mean()._replace(loss=loss)
    result = evaluate_metrics(learner, initial_params(learner, tasks), tasks, episodes=8, key=KEY)
    assert result["sum"] == pytest.approx(sums[sums > limit].mean(), rel=1e-5)
    assert np.isnan(result["never"])
    with pytest.raises(ValueError, match="episodes: got 0"):
        evaluate_metrics(learner, {}, tasks, episodes=0, key=KEY)


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize(("batch", "devices"), [(3, 1), (1, 1), (100, 1), (2, 2), (3, 2), (None, 2)])
def test_episodes_do_not_depend_on_batch_and_devices(batch, devices):
    if len(jax.devices()) < devices:
        pytest.skip("needs 2 devices (jax_num_cpu_devices)")
    learner, tasks = toys.maml(), toys.sinusoid()
    params = initial_params(learner, tasks)
    reference = evaluate_episodes(learner, params, tasks, episodes=7, key=KEY, devices=jax.devices()[:1])
    values = evaluate_episodes(
        learner, params, tasks, episodes=7, key=KEY, batch=batch, devices=jax.devices()[:devices]
    )
    assert values.shape == (7,)
    assert len(set(values.tolist())) == 7
    np.testing.assert_allclose(values, reference, rtol=1e-5)


def test_the_first_episodes_do_not_depend_on_the_number_of_episodes():
    learner, tasks = toys.nearest_mean(), toys.clusters()
    params = initial_params(learner, tasks)
    few = evaluate_episodes(learner, params, tasks, episodes=4, key=KEY)
    many = evaluate_episodes(learner, params, tasks, episodes=9, key=KEY)
    np.testing.assert_array_equal(many[:4], few)


def test_evaluate_is_the_mean_over_its_episodes():
    learner, tasks = toys.nearest_mean(), toys.clusters()
    params = initial_params(learner, tasks)
    result = evaluate(learner, params, tasks, episodes=40, key=KEY)
    assert result == Evaluation.of(evaluate_episodes(learner, params, tasks, episodes=40, key=KEY))
    assert 0.6 < result.mean < 1.0
    assert result.ci95 > 0


def test_other_parameters_and_task_data_do_not_cause_retracing():
    traces = []

    def predict(params, adapted, x, mask=None):
        traces.append(None)
        return toys.nearest_mean().predict(params, adapted, x, mask)

    learner, tasks = toys.nearest_mean()._replace(predict=predict), toys.clusters()
    params = initial_params(learner, tasks)
    first = evaluate(learner, params, tasks, episodes=6, key=KEY)
    before = len(traces)
    assert before > 0
    other = tasks._replace(sample=jax.tree_util.Partial(tasks.sample.func, jnp.float32(0.9)))
    result = evaluate(learner, jax.tree.map(lambda leaf: 2 * leaf, params), other, episodes=6, key=KEY)
    assert len(traces) == before
    assert result != first


def test_nan_predictions_count_as_wrong():
    learner, tasks = toys.nearest_mean(), toys.clusters()
    params = {"scale": jnp.full(4, jnp.nan)}
    assert evaluate(learner, params, tasks, episodes=4, key=KEY).mean == 0.0


def test_default_metric_is_accuracy_for_classes_and_mse_for_floats():
    assert metric_name(toys.clusters()) == "accuracy"
    assert metric_name(toys.sinusoid()) == "mse"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"episodes": 1}, "episodes: got 1"), ({"batch": 0}, "batch: got 0")],
)
def test_invalid_settings_are_named(settings, message):
    learner, tasks = toys.nearest_mean(), toys.clusters()
    with pytest.raises(ValueError, match=message):
        evaluate(learner, initial_params(learner, tasks), tasks, key=KEY, **settings)


def test_outputs_of_a_wrong_shape_are_named():
    learner, tasks = toys.maml(), toys.sinusoid()
    wrong = learner._replace(predict=lambda params, adapted, x, mask=None: x[:, 0])
    with pytest.raises(ValueError, match=r"outputs of shape \(7,\) for targets of shape \(7, 1\)"):
        evaluate(wrong, initial_params(learner, tasks), tasks, key=KEY, episodes=2)


def with_moments() -> Learner:
    def statistics(params, task, key):
        x = task.support.x
        return {"layer": {"mean": x.sum(0), "square": jnp.square(x).sum(0)}}, jnp.float32(x.shape[0])

    return toys.nearest_mean()._replace(statistics=statistics)


def test_calibrate_averages_over_the_examples_of_all_tasks():
    learner, tasks = with_moments(), toys.clusters()
    params = initial_params(learner, tasks)
    filled = calibrate(learner, params, tasks, KEY, episodes=5)
    x = np.concatenate(
        [tasks.sample(jax.random.split(jax.random.fold_in(KEY, index))[0]).support.x for index in range(5)]
    )
    assert set(filled) == {"scale", "population"}
    assert filled["scale"] is params["scale"]
    np.testing.assert_allclose(filled["population"]["layer"]["mean"], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(filled["population"]["layer"]["square"], np.square(x).mean(0), rtol=1e-5)


def test_queries_are_predicted_with_their_mask():
    masks = []

    def predict(params, adapted, x, mask=None):
        masks.append(mask)
        return jnp.zeros((x.shape[0], 3))

    learner = Learner(lambda key, task: {}, lambda params, support, key: {}, predict, None)
    x, y = np.zeros((20, 2), np.float32), np.repeat(np.arange(5), 4)
    ragged = from_arrays(x, y, ways=(2, 3), shots=1, queries=2)
    evaluate(learner, {}, ragged, episodes=4, key=KEY)
    assert masks
    assert all(mask is not None for mask in masks)


def test_calibrate_needs_statistics_and_episodes():
    tasks = toys.clusters()
    with pytest.raises(ValueError, match="statistics is None"):
        calibrate(toys.nearest_mean(), {"scale": jnp.ones(4)}, tasks, KEY)
    with pytest.raises(ValueError, match="episodes: got 0"):
        calibrate(with_moments(), {"scale": jnp.ones(4)}, tasks, KEY, episodes=0)


def partly_without_queries(is_empty):
    """Return toy tasks; where `is_empty` of a uniform random number is true, all queries are masked."""
    tasks = toys.clusters()

    def draw(sample, key):
        task = sample(key)
        kept = ~is_empty(jax.random.uniform(jax.random.fold_in(key, 7)))
        return task._replace(query=dataclasses.replace(task.query, mask=task.query.mask & kept))

    return tasks._replace(sample=jax.tree_util.Partial(draw, tasks.sample))


def test_episodes_without_a_query_are_left_out_of_mean_and_count():
    learner, tasks = toys.nearest_mean(), toys.clusters()
    params = initial_params(learner, tasks)
    values = evaluate_episodes(learner, params, tasks, episodes=12, key=KEY)
    drawn = [
        float(jax.random.uniform(jax.random.fold_in(jax.random.split(jax.random.fold_in(KEY, i))[0], 7)))
        for i in range(12)
    ]
    tasks_with_gaps = partly_without_queries(lambda draw: draw < 0.4)
    kept = values[np.array(drawn) >= 0.4]
    assert 2 <= len(kept) < 12
    np.testing.assert_array_equal(
        evaluate_episodes(learner, params, tasks_with_gaps, episodes=12, key=KEY, batch=5), kept
    )
    result = evaluate(learner, params, tasks_with_gaps, episodes=12, key=KEY)
    assert result == Evaluation.of(kept)
    assert result.episodes == len(kept)


def test_an_evaluation_without_queries_is_refused():
    learner = toys.nearest_mean()
    tasks = partly_without_queries(lambda draw: draw < 2)
    params = initial_params(learner, tasks)
    with pytest.raises(ValueError, match="tasks: got episodes without a query"):
        evaluate_episodes(learner, params, tasks, episodes=3, key=KEY)
    with pytest.raises(ValueError, match="tasks: got episodes without a query"):
        evaluate(learner, params, tasks, episodes=3, key=KEY)


def test_metrics_in_bfloat16_are_summed_in_float32():
    tasks = toys.clusters()
    one = jnp.ones((), jnp.bfloat16)
    learner = toys.nearest_mean()._replace(
        loss=lambda params, task, key, step=None: (one, {"count": (one, one), "half": (0.5, 1)})
    )
    result = evaluate_metrics(learner, initial_params(learner, tasks), tasks, episodes=301, key=KEY)
    assert result == {"count": 1.0, "half": 0.5}


def test_metrics_of_a_stream_are_those_of_its_first_episodes():
    tasks, keys = toys.clusters(), episode_keys(KEY, jnp.arange(8))
    stream_of_tasks = TaskStream(
        lambda step: jax.vmap(tasks.sample)(keys[4 * step : 4 * step + 4, 0]), key=KEY, for_evaluation=True
    )

    def loss(params, task, key, step=None):
        return jnp.zeros(()), {"sum": (jnp.nansum(task.query.x) + jax.random.uniform(key), 1)}

    learner = toys.nearest_mean()._replace(loss=loss)
    arguments = learner, initial_params(learner, tasks)
    actual = evaluate_metrics(*arguments, stream_of_tasks, episodes=5, key=KEY)
    assert actual == pytest.approx(evaluate_metrics(*arguments, tasks, episodes=5, key=KEY), rel=1e-5)
    with pytest.raises(ValueError, match="tasks: got a stream with key data"):
        evaluate_metrics(*arguments, stream_of_tasks, episodes=5, key=jax.random.key(6))


@pytest.mark.parametrize("kind", ["distribution", "stream"])
def test_run_episodes_returns_the_episodes_of_evaluate(kind):
    learner, tasks = toys.nearest_mean(), toys.clusters()
    params = initial_params(learner, tasks)
    keys = episode_keys(KEY, jnp.arange(8))
    expected = evaluate_episodes(learner, params, tasks, episodes=6, key=KEY)
    if kind == "stream":
        tasks = TaskStream(
            lambda step: jax.vmap(toys.clusters().sample)(keys[4 * step : 4 * step + 4, 0]), tasks.card
        )
    result = run_episodes(learner, params, tasks, episodes=6, key=KEY)
    np.testing.assert_array_equal(result.scores, expected)
    assert result.scores.mean() == pytest.approx(evaluate(learner, params, tasks, episodes=6, key=KEY).mean)
    for i in range(6):
        task = toys.clusters().sample(keys[i, 0])
        part = jax.tree.map(lambda leaf: leaf[i], result)  # noqa: B023
        np.testing.assert_allclose(part.tasks.support.x, task.support.x, rtol=1e-6)
        assert part.tasks.support.ways == task.support.ways
        np.testing.assert_allclose(part.adapted, task.support.x, rtol=1e-6)
        # The nearest support example, by NumPy; the last query is padding.
        real = np.asarray(task.query.mask)
        x, means = np.asarray(task.query.x, np.float64), np.asarray(task.support.x, np.float64)
        outputs = -np.square(x[:, None] - means).sum(-1)
        np.testing.assert_allclose(part.outputs[real], outputs[real], rtol=1e-4, atol=1e-5)
        right = (outputs.argmax(-1) == np.asarray(task.query.y))[real].mean()
        assert part.scores == pytest.approx(right)


def test_run_episodes_scores_episodes_without_queries_as_nan():
    learner = toys.nearest_mean()
    tasks_with_gaps = partly_without_queries(lambda draw: draw < 0.4)
    params = initial_params(learner, tasks_with_gaps)
    result = run_episodes(learner, params, tasks_with_gaps, episodes=12, key=KEY)
    empty = ~np.asarray(result.tasks.query.mask).any(1)
    assert 0 < empty.sum() < 12
    np.testing.assert_array_equal(np.isnan(result.scores), empty)
    kept = evaluate_episodes(learner, params, tasks_with_gaps, episodes=12, key=KEY)
    np.testing.assert_array_equal(result.scores[~empty], kept)


def test_run_episodes_refuses_zero_episodes_and_invalid_slots():
    learner, tasks = toys.nearest_mean(), toys.clusters()
    params = initial_params(learner, tasks)
    with pytest.raises(ValueError, match="episodes: got 0"):
        run_episodes(learner, params, tasks, episodes=0, key=KEY)
    # Two outputs have no slot for class 2, which has one support example and one query without padding.
    two = learner._replace(predict=lambda params, adapted, x: jnp.zeros((x.shape[0], 2)))
    with pytest.raises(ValueError, match=r"class slot without an output in 3 of 3 episodes \(.* 6\)"):
        run_episodes(two, params, tasks, episodes=3, key=KEY)


def among_two(outputs, y, mask):
    """Return how many queries have their class among the two best."""
    best = jnp.argsort(outputs, axis=-1)[:, -2:]
    return (((best == y[:, None]).any(-1)) & mask).sum(), mask.sum()


def test_user_defined_metric_matches_numpy():
    learner, tasks = toys.nearest_mean(), toys.clusters(noise=2.0)
    params = initial_params(learner, tasks)
    result = run_episodes(learner, params, tasks, episodes=5, key=KEY, metric=among_two)
    values = evaluate_episodes(learner, params, tasks, episodes=5, key=KEY, metric=among_two)
    real = np.asarray(result.tasks.query.mask)
    for i in range(5):
        outputs, y = np.asarray(result.outputs[i])[real[i]], np.asarray(result.tasks.query.y[i])[real[i]]
        # A class is among the two best if it is not the last of three.
        assert values[i] == pytest.approx(np.mean(outputs.argmin(-1) != y))
    np.testing.assert_array_equal(result.scores, values)
    assert 0.5 < values.mean() < 1
    assert metric_name(tasks, learner._replace(metric=among_two)) == "among_two"


def test_invalid_class_slots_are_refused_under_any_metric():
    learner, tasks = toys.nearest_mean(), toys.clusters()

    def draw(sample, key):
        task = sample(key)
        return task._replace(support=dataclasses.replace(task.support, y=task.support.y + 1))

    wrong = tasks._replace(sample=jax.tree_util.Partial(draw, tasks.sample))
    with pytest.raises(ValueError, match=r"class slot without an output in 2 of 2 episodes \(.* 2\)"):
        evaluate(learner, initial_params(learner, tasks), wrong, episodes=2, key=KEY, metric=among_two)


# --- Classes by name ------------------------------------------------------------------------------------


def constant_learner(outputs_of):
    """Return a learner without adaptation, whose outputs are `outputs_of(params, x, ways)`."""

    def predict(params, ways, x, mask=None):
        return outputs_of(params, x, ways.shape[0])

    return Learner(
        lambda key, task: {"w": jnp.zeros(())},
        lambda params, support, key: jnp.zeros(support.ways),
        predict,
        lambda params, task, key, step=None: (params["w"], {}),
    )


PARAMS = {"w": jnp.zeros(())}
FIRST_SLOT = constant_learner(lambda params, x, ways: jnp.zeros((x.shape[0], ways)).at[:, 0].set(1.0))


def five_classes(ways, queries=2):
    x = np.repeat(np.arange(5, dtype=np.float32), 4)[:, None]
    return from_arrays(x, np.repeat([*"edcba"], 4), ways=ways, shots=1, queries=queries)


def names_of(tasks, episodes):
    keys = episode_keys(KEY, jnp.arange(episodes))[:, 0]
    return np.array([classes_of(tasks, key) for key in keys])


@pytest.mark.parametrize("batch", [None, 7])
def test_a_learner_that_predicts_the_first_slot_predicts_the_class_in_it(batch):
    tasks, episodes = five_classes(ways=5), 20
    result = evaluate_classes(FIRST_SLOT, PARAMS, tasks, episodes=episodes, key=KEY, batch=batch)
    first = names_of(tasks, episodes)[:, 0].tolist()
    assert result.classes == tuple("abcde")
    assert result.queries.tolist() == [2 * episodes] * 5
    # Every episode has every class, and all queries are predicted as the class in the first slot.
    times = np.array([2 * first.count(name) for name in "abcde"])
    np.testing.assert_array_equal(result.confusion, np.tile(times, (5, 1)))
    np.testing.assert_allclose(result.accuracy, times / (2 * episodes))
    np.testing.assert_allclose(result.scores, 1 / 5)
    assert result.mistakes(1)[0][2] == times.max()
    assert sum(count for _, _, count in result.mistakes()) == 4 * 2 * episodes


def test_classes_are_counted_where_ways_vary_and_slots_are_padding():
    tasks, episodes = five_classes(ways=(2, 4)), 12
    equal = constant_learner(lambda params, x, ways: jnp.zeros((x.shape[0], ways)))
    names = names_of(tasks, episodes)
    assert (names == "").any()
    result = evaluate_classes(equal, PARAMS, tasks, episodes=episodes, key=KEY)
    queries = [2 * int((names == name).sum()) for name in "abcde"]
    assert result.queries.tolist() == queries
    # Equal outputs predict the first slot.
    assert result.confusion.sum() == sum(queries)
    assert result.confusion.sum(0).tolist() == [
        int(2 * sum((row != "").sum() for row in names if row[0] == name)) for name in "abcde"
    ]
    padding = constant_learner(lambda params, x, ways: jnp.zeros((x.shape[0], ways)).at[:, -1].set(1.0))
    last = evaluate_classes(padding, PARAMS, tasks, episodes=episodes, key=KEY)
    assert last.queries.tolist() == queries
    assert last.confusion.sum() == 2 * sum((row != "").sum() for row in names if row[-1] != "")


def test_nan_outputs_predict_no_class():
    learner = constant_learner(lambda params, x, ways: jnp.full((x.shape[0], ways), jnp.nan))
    result = evaluate_classes(learner, PARAMS, five_classes(ways=3), episodes=4, key=KEY)
    assert result.queries.sum() == 4 * 3 * 2
    assert not result.confusion.any()
    assert result.mistakes() == []
    assert (result.accuracy[result.queries > 0] == 0).all()


def test_class_names_of_episodes_match_evaluate_classes():
    tasks, learner = five_classes(ways=3), toys.nearest_mean()
    params = {"scale": jnp.zeros(1)}
    episodes = run_episodes(learner, params, tasks, episodes=6, key=KEY)
    np.testing.assert_array_equal(episodes.classes, names_of(tasks, 6))
    right = np.take_along_axis(episodes.classes, np.asarray(episodes.tasks.query.y), 1)
    named = np.take_along_axis(episodes.classes, np.asarray(episodes.outputs.argmax(-1)), 1)
    # Inputs are the numbers of their classes.
    np.testing.assert_array_equal(
        right.ravel(), ["edcba"[int(x)] for x in np.asarray(episodes.tasks.query.x).ravel()]
    )
    counted = evaluate_classes(learner, params, tasks, episodes=6, key=KEY)
    for i, label in enumerate(counted.classes):
        for j, prediction in enumerate(counted.classes):
            assert counted.confusion[i, j] == ((right == label) & (named == prediction)).sum()
    values = evaluate_episodes(learner, params, tasks, episodes=6, key=KEY)
    np.testing.assert_array_equal(counted.scores, values)


def test_drawn_characters_have_the_names_of_their_classes():
    tasks = glyphs("test", ways=3, shots=0, queries=1, size=8)
    result = run_episodes(FIRST_SLOT, PARAMS, tasks, episodes=2, key=KEY)
    # The support set of a zero-shot task is the metadata of its classes, a function of their numbers.
    for support, names in zip(np.asarray(result.tasks.support.x), result.classes, strict=True):
        numbers = np.array([int(name.removeprefix("glyph")) for name in names])
        np.testing.assert_allclose(support, glyph_metadata(numbers), atol=1e-6)


def test_sequences_have_the_names_of_their_slots_unless_labels_are_strings():
    tasks = five_classes(ways=3)
    result = run_episodes(FIRST_SLOT, PARAMS, sequences(tasks, length=6), episodes=4, key=KEY)
    for part in (result.tasks.support, result.tasks.query):
        shown = ["edcba"[int(x)] for x in np.asarray(part.x).ravel()]
        assert np.take_along_axis(result.classes, np.asarray(part.y), 1).ravel().tolist() == shown
    strings = sequences(tasks, length=6, strings=(3, 2))
    assert run_episodes(FIRST_SLOT, PARAMS, strings, episodes=2, key=KEY).classes is None


def test_a_stream_has_the_class_names_of_its_tasks(tmp_path):
    images = pytest.importorskip("PIL.Image")
    for number, name in enumerate("abcd"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(3):
            grey = np.full((8, 8), 60 * number, np.uint8)
            images.fromarray(grey).save(tmp_path / "photos" / name / f"{index}.png")
    photos = prepare_folder(str(tmp_path / "photos"))
    shape = {"ways": 3, "shots": 1, "queries": 2, "classes": None}
    tasks = stream(photos, key=KEY, meta_batch=2, for_evaluation=True, **shape)
    result = run_episodes(FIRST_SLOT, PARAMS, tasks, episodes=3, key=KEY)
    grey = np.asarray(result.tasks.support.x)[:, :, 0, 0, 0]
    np.testing.assert_array_equal(result.classes, np.array([*"abcd"])[np.rint(grey * 255 / 60).astype(int)])
    counted = evaluate_classes(FIRST_SLOT, PARAMS, tasks, episodes=3, key=KEY)
    assert counted.queries.sum() == 3 * 3 * 2


def test_classes_without_names_are_refused():
    unnamed = TaskDistribution(five_classes(ways=3).sample)
    assert run_episodes(FIRST_SLOT, PARAMS, unnamed, episodes=2, key=KEY).classes is None
    with pytest.raises(ValueError, match=r"^tasks: got tasks of 'tasks without a card', whose classes have"):
        evaluate_classes(FIRST_SLOT, PARAMS, unnamed, episodes=2, key=KEY)
    with pytest.raises(ValueError, match=r"^tasks: got regression tasks, which have no classes"):
        evaluate_classes(toys.maml(), PARAMS, toys.sinusoid(), episodes=2, key=KEY)


def test_outputs_beyond_the_class_slots_predict_no_class():
    # A head with ten outputs on tasks of three ways, which always predicts its last output.
    learner = jm.Learner(
        init=lambda key, task: {},
        adapt=lambda params, support, key: {},
        predict=lambda params, adapted, x: jax.nn.one_hot(jnp.full(x.shape[0], 9), 10),
        loss=lambda params, task, key: jnp.zeros(()),
    )
    tasks = jm.tasks.from_arrays(
        np.zeros((12, 2), np.float32), np.repeat([*"abcd"], 3), ways=3, shots=1, queries=2
    )
    result = jm.evaluate_classes(learner, {}, tasks, episodes=4, key=jax.random.key(0))
    assert result.queries.sum() == 4 * 3 * 2
    assert not result.confusion.any()
    assert not result.scores.any()


def test_parameters_can_be_a_callable_module():
    linear = eqx.nn.Linear(1, 1, key=jax.random.key(0))
    learner = jm.Learner(
        init=lambda key, task: linear,
        adapt=lambda params, support, key: {},
        predict=lambda params, adapted, x: jax.vmap(params)(x),
        loss=lambda params, task, key: ((jax.vmap(params)(task.query.x) - task.query.y) ** 2).mean(),
    )
    tasks = jm.tasks.sinusoid("test", shots=2, queries=4)
    result = jm.evaluate(learner, linear, tasks, episodes=3, key=jax.random.key(1))
    keys = jm.episode_keys(jax.random.key(1), jnp.arange(3))[:, 0]
    losses = [learner.loss(linear, tasks.sample(key), None) for key in keys]
    np.testing.assert_allclose(result.mean, np.mean(losses), rtol=1e-6)
    with pytest.raises(jm.ArgumentError, match=r"^params: got"):
        jm.evaluate(learner, jnp.sin, tasks, episodes=3, key=jax.random.key(1))
