"""Streams: the episodes of memory, for the same keys, in any number of processes and from any step."""

import dataclasses
import itertools
import multiprocessing
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta as jm
from jaxmeta.core import episode_keys
from jaxmeta.tasks.prepared import prepare

SIZES = {"ant": 5, "bee": 7, "cat": 6, "dog": 9, "eel": 5}
KEY = jax.random.key(3)
SHAPE = {"ways": 3, "shots": 2, "queries": 2, "classes": None}


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMETA_CACHE", str(tmp_path))
    rng = np.random.default_rng(0)
    rows = [
        (name, rng.integers(0, 256, (4, 4, 3), np.uint8)) for name, size in SIZES.items() for _ in range(size)
    ]
    return prepare("zoo", "0", (4, 4, 3), iter(rows), expected=len(rows))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rotations": "classes"},
        {"rotations": "random", "classes": (0.8, 0.0, 0.2), "seed": 4},
        {"ways": (2, 4), "shots": (1, 3)},
    ],
    ids=str,
)
def test_stream_and_memory_give_the_same_episodes_for_the_same_keys(images, changes):
    memory = jm.tasks.from_prepared(images, **{**SHAPE, **changes})
    stream = jm.tasks.stream(images, key=KEY, meta_batch=4, **{**SHAPE, **changes})
    assert stream.card == memory.card
    for step in (0, 1, 70_000):
        keys = episode_keys(jax.random.fold_in(KEY, step), jnp.arange(4))[:, 0]
        same(stream.at(step), jax.jit(jax.vmap(memory.sample))(keys))
    assert not np.array_equal(stream.at(0).query.x, stream.at(1).query.x)


def test_read_ahead_from_any_step(images):
    stream = jm.tasks.stream(images, key=jax.random.PRNGKey(3), meta_batch=2, **SHAPE)
    for step, tasks in zip(range(5, 9), stream.batches(5), strict=False):
        same(tasks, stream.at(step))


def test_worker_processes_read_the_same(images):
    before = set(multiprocessing.active_children())
    stream = jm.tasks.stream(images, key=KEY, meta_batch=2, workers=2, ahead=1, **SHAPE)
    batches = stream.batches(3)
    for step in range(3, 8):
        same(next(batches), stream.at(step))
    assert set(multiprocessing.active_children()) - before
    batches.close()
    deadline = time.monotonic() + 30
    while set(multiprocessing.active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(multiprocessing.active_children()) - before


def test_each_process_has_its_share(images):
    whole = jm.tasks.stream(images, key=KEY, meta_batch=6, **SHAPE)
    shares = [jm.tasks.stream(images, key=KEY, meta_batch=6, process=(i, 3), **SHAPE).at(2) for i in range(3)]
    same(jax.tree.map(lambda *parts: jnp.concatenate(parts), *shares), whole.at(2))


def learner():
    return jm.maml(jm.nn.MLP(out=3, hidden=(8,)), inner_optimizer=optax.sgd(0.1), norm="support")


def test_training_from_a_stream_is_training_from_memory(images):
    memory = jm.tasks.from_prepared(images, **SHAPE)
    stream = jm.tasks.stream(images, key=KEY, meta_batch=4, **SHAPE)
    reports = {}

    def trained(tasks, name):
        reports[name] = []
        return jm.train(
            learner(),
            tasks,
            optax.adam(1e-2),
            steps=7,
            meta_batch=4,
            key=KEY,
            log_every=3,
            report=reports[name].append,
        )

    one, other = trained(memory, "memory"), trained(stream, "stream")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one.params, other.params
    )
    assert (
        [event.step for event in reports["stream"]]
        == [event.step for event in reports["memory"]]
        == [3, 6, 7]
    )
    for a, b in zip(reports["memory"], reports["stream"], strict=True):
        assert a.metrics == pytest.approx(b.metrics, rel=1e-5)


def test_a_run_from_a_stream_resumes_bit_for_bit(images, tmp_path):
    stream = jm.tasks.stream(images, key=KEY, meta_batch=2, **SHAPE)

    def trained(steps, folder, **more):
        return jm.train(
            learner(),
            stream,
            optax.adam(1e-2),
            steps=steps,
            meta_batch=2,
            key=KEY,
            run_dir=tmp_path / folder,
            checkpoint_every=3,
            **more,
        )

    straight = trained(8, "straight")
    stopped = iter([False, True])
    with pytest.raises(Exception, match="stopped after meta-step 3"):
        trained(8, "stopped", should_stop=lambda: next(stopped))
    same(trained(8, "stopped", resume=True).params, straight.params)


def test_evaluation_from_a_stream_is_evaluation_from_memory(images):
    memory = jm.tasks.from_prepared(images, **SHAPE)
    stream = jm.tasks.stream(images, key=KEY, meta_batch=4, for_evaluation=True, **SHAPE)
    method = learner()
    params = method.init(jax.random.key(0), memory.sample(KEY))
    # 11 is no multiple of 4: of the last batch only what is asked counts.
    expected = jm.evaluate_episodes(method, params, memory, episodes=11, key=KEY)
    np.testing.assert_allclose(jm.evaluate_episodes(method, params, stream, episodes=11, key=KEY), expected)
    filled = [jm.calibrate(method, params, tasks, KEY, episodes=8) for tasks in (memory, stream)]
    close(*filled)


def test_a_loader_of_one_s_own_is_a_stream(images):
    own = jm.tasks.stream(images, key=KEY, meta_batch=4, **SHAPE)
    calls = []

    def at(step):
        calls.append(step)
        return own.at(step)

    state = jm.train(learner(), jm.TaskStream(at, own.card), optax.adam(1e-2), steps=3, meta_batch=4, key=KEY)
    assert calls[-3:] == [0, 1, 2]
    assert int(state.step) == 3
    with pytest.raises(ValueError, match=r"gives 4 tasks a step; .* meta_batch = 2 tasks"):
        jm.train(learner(), own, optax.adam(1e-2), steps=1, meta_batch=2, key=KEY)
    with pytest.raises(ValueError, match="gives tuple a step"):
        jm.train(
            learner(), own._replace(at=lambda step: ()), optax.adam(1e-2), steps=1, meta_batch=4, key=KEY
        )


def test_a_stream_of_other_episodes_is_refused(images):
    method, sgd = learner(), optax.sgd(0.1)
    own = jm.tasks.stream(images, key=KEY, meta_batch=4, **SHAPE)
    other = jm.tasks.stream(images, key=jax.random.key(4), meta_batch=4, **SHAPE)
    fixed = jm.tasks.stream(images, key=KEY, meta_batch=4, for_evaluation=True, **SHAPE)
    for tasks in (other, fixed):
        with pytest.raises(ValueError, match=r"tasks: got a stream .* and for_evaluation=False"):
            jm.train(method, tasks, sgd, steps=1, meta_batch=4, key=KEY)
    with pytest.raises(ValueError, match="validation: got a stream"):
        jm.train(method, own, sgd, steps=1, meta_batch=4, key=KEY, validation=fixed)
    params = method.init(KEY, jax.tree.map(lambda leaf: leaf[0], own.at(0)))
    with pytest.raises(ValueError, match=r"tasks: got a stream .* and for_evaluation=True"):
        jm.evaluate(method, params, own, episodes=4, key=KEY)


def test_a_stream_that_ends_is_told(images):
    own = jm.tasks.stream(images, key=KEY, meta_batch=4, **SHAPE)
    ending = jm.TaskStream(own.at, own.card, lambda start: map(own.at, range(start, 2)))
    params = learner().init(KEY, jax.tree.map(lambda leaf: leaf[0], own.at(0)))
    with pytest.raises(ValueError, match="ended after 8 of 9 episodes"):
        jm.evaluate(learner(), params, ending, episodes=9, key=KEY)
    with pytest.raises(ValueError, match="ended before meta-step 3"):
        jm.train(learner(), ending, optax.sgd(0.1), steps=3, meta_batch=4, key=KEY)


def test_a_stream_that_diverges_names_the_step(images):
    own = jm.tasks.stream(images, key=KEY, meta_batch=2, **SHAPE)

    def at(step):
        support, query = own.at(step)
        return jm.Task(support, dataclasses.replace(query, x=query.x * (1 if step < 4 else jnp.nan)))

    spoilt = jm.TaskStream(at, own.card)
    with pytest.raises(jm.training.NonFiniteLoss, match="meta-step 5"):
        jm.train(learner(), spoilt, optax.adam(1e-2), steps=8, meta_batch=2, key=KEY, log_every=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta_batch": 0}, "meta_batch: got 0"),
        ({"meta_batch": 3, "process": (0, 2)}, "multiple of the number of processes"),
        ({"workers": -1}, "workers: got -1"),
        ({"ahead": 0}, "ahead: got 0"),
        ({"ways": 6}, "ways=6 asks for more classes"),
        ({"process": (0, 0)}, "process 0 of 0"),
        ({"key": jax.random.key(0, impl="rbg")}, "got rbg; episodes are numbered with Threefry keys"),
        ({"shots": 4}, r"too few in 2 of 5: ant \(5\), eel \(5\)"),
        ({"split": "tset"}, "split: got 'tset'; it must be one of"),
    ],
)
def test_bad_input(images, changes, message):
    with pytest.raises(ValueError, match=message):
        jm.tasks.stream(images, **{"key": KEY, "meta_batch": 4, **SHAPE, **changes}).at(0)


def test_batches_are_endless(images):
    stream = jm.tasks.stream(images, key=KEY, meta_batch=1, ahead=1, **SHAPE)
    assert len(list(itertools.islice(stream.batches(0), 12))) == 12
