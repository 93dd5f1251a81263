"""Tests of streams: the same episodes as from memory, in any number of processes and from any step."""

import dataclasses
import itertools
import multiprocessing
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from draws import assert_trees_equal, draw

import jaxmeta as jm
from jaxmeta.core import episode_keys
from jaxmeta.tasks.prepared import prepare

SIZES = {"ant": 5, "bee": 7, "cat": 6, "dog": 9, "eel": 5}
KEY = jax.random.key(3)
SHAPE = {"ways": 3, "shots": 2, "queries": 2, "classes": None}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = [
        (name, rng.integers(0, 256, (4, 4, 3), np.uint8)) for name, size in SIZES.items() for _ in range(size)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXMETA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield prepare("zoo", "0", (4, 4, 3), iter(rows), expected=len(rows))


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


@jax.jit
def from_memory(sample, step):
    """Draw the four tasks of a meta-step from memory."""
    return jax.vmap(sample)(episode_keys(jax.random.fold_in(KEY, step), jnp.arange(4))[:, 0])


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"rotations": "classes"}, marks=pytest.mark.nightly),
        {"rotations": "random", "classes": (0.8, 0.0, 0.2), "split_seed": 4},
        {"ways": (2, 4), "shots": (1, 3)},
    ],
    ids=str,
)
def test_stream_and_memory_give_the_same_episodes_for_the_same_keys(images, changes):
    memory = jm.tasks.from_prepared(images, **{**SHAPE, **changes})
    stream = jm.tasks.stream(images, key=KEY, meta_batch=4, **{**SHAPE, **changes})
    assert stream.card == memory.card
    for step in (0, 1, 70_000):
        assert_trees_equal(stream.at(step), from_memory(memory.sample, step))
    assert not np.array_equal(stream.at(0).query.x, stream.at(1).query.x)


def test_batches_start_from_any_step(images):
    stream = jm.tasks.stream(images, key=jax.random.PRNGKey(3), meta_batch=4, **SHAPE)
    for step, tasks in zip(range(5, 9), stream.batches(5), strict=False):
        assert_trees_equal(tasks, stream.at(step))


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.nightly)])
def read_by_workers(request, images):
    """Return a stream, an iterator over batches read by workers, and a function that lists the workers."""
    others = set(multiprocessing.active_children())
    stream = jm.tasks.stream(images, key=KEY, meta_batch=4, workers=request.param, ahead=1, **SHAPE)
    batches = stream.batches(3)
    assert_trees_equal(next(batches), stream.at(3))
    yield stream, batches, lambda: set(multiprocessing.active_children()) - others
    batches.close()


def test_worker_processes_read_the_same_episodes_and_end_with_the_iterator(read_by_workers):
    stream, batches, processes = read_by_workers
    for step in range(4, 8):
        assert_trees_equal(next(batches), stream.at(step))
    assert processes()
    batches.close()
    deadline = time.monotonic() + 30
    while processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes()


@pytest.mark.parametrize("for_evaluation", [False, True])
def test_the_shares_of_processes_make_up_the_whole_batch(images, for_evaluation):
    settings = {"key": KEY, "meta_batch": 4, "for_evaluation": for_evaluation, **SHAPE}
    whole = jm.tasks.stream(images, **settings)
    shares = [jm.tasks.stream(images, process=(i, 4), **settings).at(2) for i in range(4)]
    assert_trees_equal(jax.tree.map(lambda *parts: np.concatenate(parts), *shares), whole.at(2))


# The learner that compiles fastest.
LEARNER = jm.prototypical(jm.nn.MLP(out=4, hidden=()))


def trained(tasks, reports=None, **settings):
    return jm.train(
        LEARNER,
        tasks,
        optax.adam(1e-2),
        steps=7,
        meta_batch=4,
        key=KEY,
        log_every=3,
        report=reports.append if reports is not None else None,
        **settings,
    )


@pytest.fixture(scope="module")
def from_stream(images):
    """Train from a stream and return the last state and the events."""
    events = []
    return trained(jm.tasks.stream(images, key=KEY, meta_batch=4, **SHAPE), events), events


@pytest.mark.nightly
def test_training_from_a_stream_equals_training_from_memory(images, from_stream):
    (state, events), expected_events = from_stream, []
    expected = trained(jm.tasks.from_prepared(images, **SHAPE), expected_events)
    assert_close(expected.params, state.params)
    assert [event.step for event in events] == [event.step for event in expected_events] == [3, 6, 7]
    for a, b in zip(expected_events, events, strict=True):
        assert a.metrics == pytest.approx(b.metrics, rel=1e-5)


@pytest.mark.nightly
def test_interrupted_training_from_a_stream_resumes_bit_for_bit(images, from_stream, tmp_path):
    stream = jm.tasks.stream(images, key=KEY, meta_batch=4, **SHAPE)
    run = {"run_dir": tmp_path / "run", "checkpoint_every": 3}
    stopped = iter([False, True])
    with pytest.raises(jm.training.Stopped, match="stopped after meta-step 3"):
        trained(stream, should_stop=lambda: next(stopped), **run)
    assert_trees_equal(trained(stream, resume=True, **run).params, from_stream[0].params)


@pytest.mark.nightly
def test_evaluation_from_a_stream_equals_evaluation_from_memory(images):
    memory = jm.tasks.from_prepared(images, **SHAPE)
    stream = jm.tasks.stream(images, key=KEY, meta_batch=4, for_evaluation=True, **SHAPE)
    # With batch statistics, which `calibrate` sets.
    method = jm.prototypical(jm.nn.MLP(out=4, hidden=(6,), norm=True))
    params = jax.jit(method.init)(jax.random.key(0), draw(memory.sample, KEY))
    # 11 is not a multiple of 4: only part of the last batch counts.
    expected = jm.evaluate_episodes(method, params, memory, episodes=11, key=KEY)
    np.testing.assert_allclose(jm.evaluate_episodes(method, params, stream, episodes=11, key=KEY), expected)
    calibrated = [jm.calibrate(method, params, tasks, KEY, episodes=8) for tasks in (memory, stream)]
    assert_close(*calibrated)
    assert jax.tree.structure(calibrated[1]) != jax.tree.structure(params)


def test_a_stream_of_a_custom_loader_trains_and_its_batches_are_checked(images):
    stream = jm.tasks.stream(images, key=KEY, meta_batch=4, **SHAPE)
    calls = []

    def at(step):
        calls.append(step)
        return stream.at(step)

    custom = jm.TaskStream(at, stream.card)
    state = jm.train(LEARNER, custom, optax.adam(1e-2), steps=3, meta_batch=4, key=KEY)
    assert calls[-3:] == [0, 1, 2]
    assert int(state.step) == 3
    with pytest.raises(ValueError, match=r"gives 4 tasks per step; .* meta_batch = 2 tasks"):
        jm.train(LEARNER, stream, optax.adam(1e-2), steps=1, meta_batch=2, key=KEY)
    invalid = stream._replace(at=lambda step: ())
    with pytest.raises(ValueError, match="gives tuple per step"):
        jm.train(LEARNER, invalid, optax.adam(1e-2), steps=1, meta_batch=4, key=KEY)


def test_a_stream_with_another_key_or_purpose_is_refused(images):
    sgd = optax.sgd(0.1)
    stream = jm.tasks.stream(images, key=KEY, meta_batch=4, **SHAPE)
    other = jm.tasks.stream(images, key=jax.random.key(4), meta_batch=4, **SHAPE)
    fixed = jm.tasks.stream(images, key=KEY, meta_batch=4, for_evaluation=True, **SHAPE)
    for tasks in (other, fixed):
        with pytest.raises(ValueError, match=r"tasks: got a stream .* and for_evaluation=False"):
            jm.train(LEARNER, tasks, sgd, steps=1, meta_batch=4, key=KEY)
    with pytest.raises(ValueError, match="validation: got a stream"):
        jm.train(LEARNER, stream, sgd, steps=1, meta_batch=4, key=KEY, validation=fixed)
    params = jax.jit(LEARNER.init)(KEY, jax.tree.map(lambda leaf: leaf[0], stream.at(0)))
    with pytest.raises(ValueError, match=r"tasks: got a stream .* and for_evaluation=True"):
        jm.evaluate(LEARNER, params, stream, episodes=4, key=KEY)


def test_a_stream_that_ends_too_early_is_an_error(images):
    stream = jm.tasks.stream(images, key=KEY, meta_batch=4, **SHAPE)
    ending = jm.TaskStream(stream.at, stream.card, lambda start: map(stream.at, range(start, 2)))
    params = jax.jit(LEARNER.init)(KEY, jax.tree.map(lambda leaf: leaf[0], stream.at(0)))
    with pytest.raises(ValueError, match="ended after 8 of 9 episodes"):
        jm.evaluate(LEARNER, params, ending, episodes=9, key=KEY)
    with pytest.raises(ValueError, match="ended before meta-step 3"):
        jm.train(LEARNER, ending, optax.sgd(0.1), steps=3, meta_batch=4, key=KEY)


def test_divergence_within_a_stream_names_the_step(images):
    stream = jm.tasks.stream(images, key=KEY, meta_batch=4, **SHAPE)

    def at(step):
        support, query = stream.at(step)
        return jm.Task(support, dataclasses.replace(query, x=query.x * (1 if step < 4 else jnp.nan)))

    diverging = jm.TaskStream(at, stream.card)
    with pytest.raises(jm.training.NonFiniteLoss, match="meta-step 5"):
        jm.train(LEARNER, diverging, optax.adam(1e-2), steps=8, meta_batch=4, key=KEY, log_every=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta_batch": 0}, "meta_batch: got 0"),
        ({"meta_batch": 3, "process": (0, 2)}, "multiple of the number of processes"),
        ({"workers": -1}, "workers: got -1"),
        ({"ahead": 0}, "ahead: got 0"),
        ({"ways": 6}, "ways=6 is more than the classes"),
        ({"process": (2, 2)}, r"process: got \(2, 2\); it must be \(index, count\)"),
        ({"process": (0, 0)}, r"process: got \(0, 0\)"),
        ({"key": jax.random.key(0, impl="rbg")}, "got rbg; episodes are numbered with Threefry keys"),
        ({"shots": 4}, r"2 of 5 classes have fewer: ant \(5\), eel \(5\)"),
        ({"split": "tset"}, "split: got 'tset'; it must be one of"),
    ],
)
def test_invalid_arguments_are_refused(images, changes, message):
    with pytest.raises(ValueError, match=message):
        jm.tasks.stream(images, **{"key": KEY, "meta_batch": 4, **SHAPE, **changes}).at(0)


def test_batches_continue_after_an_epoch(images):
    stream = jm.tasks.stream(images, key=KEY, meta_batch=4, ahead=1, **SHAPE)
    assert len(list(itertools.islice(stream.batches(0), 12))) == 12
