"""Tests of the training loop: resuming, best parameters, failures, stopping, and number of traces."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxmeta.core import Learner, TaskStream
from jaxmeta.training import (
    NonFiniteLoss,
    Progress,
    Resumed,
    Saved,
    Stopped,
    Validated,
    checkpoint,
    init_state,
    load,
    load_params,
    meta_step,
    train,
)
from jaxmeta.training.checkpoint import checkpoint_steps

KEY = jax.random.key(0)


def run(learner=None, tasks=None, optimizer=None, **settings):
    """Return the final state and the events of a training run, by default on one device."""
    events = []
    defaults = {"steps": 12, "key": KEY, "meta_batch": 4, "log_every": 4, "validation_episodes": 8}
    settings = defaults | {"devices": jax.devices()[:1]} | settings
    state = train(
        learner or toys.maml(),
        tasks or toys.sinusoid(),
        optimizer or toys.adam(),
        report=events.append,
        **settings,
    )
    return state, events


@cache
def ten_steps():
    """Return the state after ten uninterrupted meta-steps."""
    return run(steps=10)[0]


def events_of(events, kind):
    return [event for event in events if isinstance(event, kind)]


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_training_starts_from_given_parameters():
    drawn = init_state(toys.maml(), toys.adam(), toys.sinusoid(), KEY).params
    assert_equal(run(steps=2, params=drawn)[0].params, run(steps=2)[0].params)
    shifted = jax.tree.map(lambda leaf: leaf + 1, drawn)
    state = run(steps=1, params=shifted, optimizer=optax.sgd(0.0))[0]
    assert_equal(state.params, shifted)


def test_given_parameters_must_fit_the_learner():
    drawn = init_state(toys.maml(), toys.adam(), toys.sinusoid(), KEY).params
    wider = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, 0), drawn)
    with pytest.raises(ValueError, match=r"params: got float32 of shape .* the learner has float32 of shape"):
        run(params=wider)
    with pytest.raises(ValueError, match=r"params: got PyTreeDef.*; the learner has PyTreeDef"):
        run(params={"other": drawn})


def test_training_repeats_the_meta_step():
    learner, tasks, optimizer = toys.maml(), toys.sinusoid(), toys.adam()
    state, events = run(learner, tasks, optimizer, steps=7, log_every=3, devices=None)
    expected = init_state(learner, optimizer, tasks, KEY)
    step, losses = jax.jit(meta_step(learner, optimizer, 4)), []
    for _ in range(7):
        expected, metrics = step(expected, tasks.sample)
        losses.append(float(metrics["loss"]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, expected.params
    )
    assert int(state.step) == 7
    assert [event.step for event in events] == [3, 6, 7]
    for event, chunk in zip(events, (losses[:3], losses[3:6], losses[6:]), strict=True):
        assert isinstance(event.metrics["loss"], float)
        assert event.metrics["loss"] == pytest.approx(np.mean(chunk), rel=1e-5)
        assert event.metrics["mse"] == pytest.approx(np.mean(chunk), rel=1e-5)
        assert event.steps == 7
        assert event.steps_per_second > 0
        assert event.compile_s > 0


def test_training_learns():
    _, events = run(steps=200, log_every=20, meta_batch=8)
    losses = [event.metrics["loss"] for event in events_of(events, Progress)]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)], ids=["typed", "raw"])
def test_the_callers_key_survives(key):
    run(key=key, steps=2)
    assert jax.random.key_data(jax.random.fold_in(key, 0)).shape == (2,)


def test_the_loss_is_traced_once_in_the_whole_run(tmp_path):
    traces = []
    learner = toys.maml(on_trace=lambda: traces.append(None))
    run(
        learner,
        steps=11,
        log_every=2,
        validation=toys.sinusoid(split="validation"),
        validate_every=5,
        run_dir=tmp_path,
        checkpoint_every=3,
    )
    # One trace checks the loss before anything is compiled, the other one compiles it.
    assert len(traces) == 2


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, devices):
    if len(jax.devices()) < devices:
        pytest.skip("needs 2 devices (jax_num_cpu_devices)")
    settings = {
        "learner": toys.maml(),
        "tasks": toys.sinusoid(),
        "validation": toys.sinusoid(split="validation"),
        "validate_every": 4,
        "checkpoint_every": 2,
        "log_every": 4,
        "devices": jax.devices()[:devices],
        "config": {"ways": 5},
    }
    whole, whole_events = run(steps=16, run_dir=tmp_path / "whole", **settings)
    run(steps=8, run_dir=tmp_path / "halves", **settings)
    halves, events = run(steps=16, run_dir=tmp_path / "halves", resume=True, **settings)
    assert_equal(halves.params, whole.params)
    assert_equal(halves.opt_state, whole.opt_state)
    assert isinstance(events[0], Resumed)
    assert events[0].step == 8
    for kind, fields in ((Progress, ("step", "metrics")), (Validated, ("step", "evaluation", "best"))):
        rest = [event for event in events_of(whole_events, kind) if event.step > 8]
        assert [[getattr(e, f) for f in fields] for e in events_of(events, kind)] == [
            [getattr(e, f) for f in fields] for e in rest
        ]
    assert_equal(load(tmp_path / "halves/checkpoints/best"), load(tmp_path / "whole/checkpoints/best"))


def test_resuming_from_the_middle_of_a_chunk_is_exact(tmp_path):
    run(steps=3, run_dir=tmp_path)
    rest, events = run(steps=10, run_dir=tmp_path, resume=True)
    assert_equal(rest.params, ten_steps().params)
    assert [event.step for event in events_of(events, Progress)] == [4, 8, 10]


def test_resuming_a_finished_run_returns_it(tmp_path):
    learner, tasks = toys.maml(), toys.sinusoid()
    done, _ = run(learner, tasks, steps=4, run_dir=tmp_path)
    again, events = run(learner, tasks, steps=4, run_dir=tmp_path, resume=True)
    assert_equal(again.params, done.params)
    assert events == [Resumed(4)]
    with pytest.raises(ValueError, match=r"steps: got 3, but the checkpoint .* step 4"):
        run(learner, tasks, steps=3, run_dir=tmp_path, resume=True)


def test_the_best_parameters_are_returned_and_saved(tmp_path):
    learner, tasks = toys.worsening(), toys.clusters()
    # `scale` is 1, 0.9, …: accuracy is constant until the sign of the sum changes after step 10.
    state, events = run(
        learner,
        tasks,
        optax.sgd(0.1),
        steps=16,
        validation=tasks,
        validate_every=4,
        run_dir=tmp_path,
    )
    validated = events_of(events, Validated)
    assert [event.step for event in validated] == [4, 8, 12, 16]
    assert [event.best for event in validated] == [True, False, False, False]
    assert validated[0].metric == "accuracy"
    assert validated[0].evaluation == validated[1].evaluation
    assert validated[2].evaluation.mean < validated[0].evaluation.mean
    np.testing.assert_allclose(state.params["scale"], 0.6, rtol=1e-5)
    assert_equal(load(tmp_path / "checkpoints/best"), state.params)
    assert_equal(load_params(tmp_path), state.params)
    last, _ = run(learner, tasks, optax.sgd(0.1), steps=16)
    np.testing.assert_allclose(last.params["scale"], -0.6, rtol=1e-5)


def test_lowest_mse_is_the_best_validation():
    validation = toys.sinusoid(split="validation")
    _, events = run(steps=60, meta_batch=8, validation=validation, validate_every=10, validation_episodes=50)
    validated = events_of(events, Validated)
    best = np.inf
    for event in validated:
        assert event.metric == "mse"
        assert event.best == (event.evaluation.mean < best)
        best = min(best, event.evaluation.mean)
    assert sum(event.best for event in validated) > 1


def test_validation_at_the_end_and_checkpoints_at_their_interval(tmp_path):
    _, events = run(
        steps=9, validation=toys.sinusoid(), validate_every=4, run_dir=tmp_path, checkpoint_every=3
    )
    assert [event.step for event in events_of(events, Validated)] == [4, 8, 9]
    saved = events_of(events, Saved)
    assert [event.step for event in saved] == [3, 6, 9]
    assert checkpoint_steps(tmp_path) == [6, 9]
    assert Path(saved[-1].path).is_dir()
    assert [event.step for event in events_of(events, Progress)] == [3, 4, 6, 8, 9]


@pytest.mark.parametrize(
    ("first_bad", "value"),
    [
        (1, jnp.nan),
        pytest.param(6, jnp.nan, marks=pytest.mark.nightly),
        (8, jnp.inf),
        pytest.param(9, jnp.nan, marks=pytest.mark.nightly),
    ],
)
def test_a_non_finite_loss_stops_at_its_step(tmp_path, first_bad, value):
    learner = toys.maml(poison=lambda step: jnp.where(step == first_bad - 1, value, 0.0))
    events = []
    with pytest.raises(NonFiniteLoss, match=f"meta-step {first_bad};") as error:
        train(
            learner,
            toys.sinusoid(),
            toys.adam(),
            steps=100,
            key=KEY,
            meta_batch=2,
            log_every=4,
            checkpoint_every=4,
            run_dir=tmp_path,
            report=events.append,
        )
    assert error.value.step == first_bad
    good = [step for step in (4, 8) if step < first_bad][-2:]
    assert checkpoint_steps(tmp_path) == good
    assert all(np.isfinite(event.metrics["loss"]) for event in events_of(events, Progress))
    if good:
        assert str(error.value.checkpoint) in str(error.value)
        assert error.value.checkpoint.name == f"step-{good[-1]:08d}"
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_params(tmp_path)))
    else:
        assert "there is no checkpoint" in str(error.value)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_a_skipped_non_finite_step_changes_only_the_step_number(devices):
    # A skipped step is not part of the means.
    bad = jnp.array([0, 5, 6])
    learner = toys.maml(poison=lambda step: jnp.where((step == bad).any(), jnp.nan, 0.0))
    tasks, optimizer = toys.sinusoid(), toys.adam()
    settings = {"non_finite": "skip", "devices": jax.devices()[:devices]}
    state, events = run(learner, tasks, optimizer, **settings)
    assert [event.skipped for event in events_of(events, Progress)] == [1, 2, 0]
    expected = init_state(learner, optimizer, tasks, KEY)
    step, losses = jax.jit(meta_step(learner, optimizer, 4, devices=settings["devices"])), []
    for number in range(12):
        after, metrics = step(expected._replace(step=jnp.int32(number)), tasks.sample)
        if number not in bad:
            expected = after
            losses.append(float(metrics["loss"]))
    assert int(state.step) == 12
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (state.params, state.opt_state),
        (expected.params, expected.opt_state),
    )
    means = [np.mean(part) for part in (losses[:3], losses[3:5], losses[5:])]
    np.testing.assert_allclose(
        [event.metrics["loss"] for event in events_of(events, Progress)], means, rtol=1e-5
    )


def test_training_stops_when_all_steps_are_skipped():
    learner = toys.maml(poison=lambda step: jnp.where(step >= 5, jnp.nan, 0.0))
    with pytest.raises(NonFiniteLoss, match="in meta-step 12;"):
        run(learner, steps=40, non_finite="skip")


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("non_finite", ["stop", "skip"])
def test_message_for_a_loss_that_was_never_finite_does_not_blame_the_learning_rate(non_finite):
    # The loss of the initial parameters is NaN; one that becomes NaN later may be due to the learning rate.
    learner = toys.maml(poison=lambda step: jnp.where(step >= 0, jnp.nan, 0.0))
    with pytest.raises(NonFiniteLoss, match=r"outer learning rate is not the cause: .*jax_debug_nans"):
        run(learner, steps=4, non_finite=non_finite)
    for first_bad in (1, 5):
        later = toys.maml(poison=lambda step, bad=first_bad: jnp.where(step >= bad, jnp.nan, 0.0))
        with pytest.raises(NonFiniteLoss, match="A smaller learning rate"):
            run(later, steps=12, non_finite=non_finite)


def forward(w, y):
    return jnp.log(w * (0 * y.sum() - 1))


def backward(w, y):
    """Return a loss of 0 whose gradient is not finite."""
    return jnp.sqrt(w * (0 * y.sum()))


@pytest.mark.parametrize(
    ("loss", "kind", "expected"),
    [
        (forward, "distribution", f"nan) encountered in log, by {__file__}, line "),
        (backward, "distribution", "nan) encountered in mul, in the gradient of the loss"),
        (forward, "stream", f"nan) encountered in log, by {__file__}, line "),
    ],
)
def test_the_operation_of_the_first_nan_is_named_under_debug_nans(loss, kind, expected):
    def of_task(params, task, key, step=None):
        del key, step
        return loss(params["w"], task.query.y), {}

    learner = Learner(
        init=lambda key, task: {"w": jnp.ones(())},
        adapt=lambda params, support, key: params,
        predict=lambda params, adapted, x, mask=None: adapted["w"] * x,
        loss=of_task,
    )
    tasks = toys.sinusoid()
    if kind == "stream":
        keys = jax.random.split(KEY, 2)
        tasks = TaskStream(lambda step, distribution=tasks: jax.vmap(distribution.sample)(keys), tasks.card)
    with jax.debug_nans(True), pytest.raises(NonFiniteLoss, match=r"In task \d: invalid value") as error:
        run(learner, tasks, steps=3, meta_batch=2)
    assert expected in str(error.value)


def test_the_last_state_is_returned_if_it_cannot_be_saved(tmp_path, monkeypatch):
    def full(folder, state, **_):
        raise OSError(28, f"cannot be written at step {state.step}", str(folder))

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    with pytest.warns(UserWarning, match="at step 10: .*; the trained state is returned"):
        state, _ = run(steps=10, run_dir=tmp_path)
    assert_equal(state.params, ten_steps().params)
    assert not checkpoint_steps(tmp_path)
    with pytest.raises(OSError, match="at step 5: "):
        run(steps=10, run_dir=tmp_path, checkpoint_every=5)


def test_a_non_finite_parameter_stops_training():
    optimizer = optax.sgd(lambda step: jnp.where(step == 4, jnp.inf, 1e-3))
    with pytest.raises(NonFiniteLoss) as error:
        run(optimizer=optimizer)
    assert error.value.step == 5


def test_a_stopped_run_is_saved_and_can_be_resumed(tmp_path):
    calls = []

    def should_stop():
        calls.append(None)
        return len(calls) == 3

    with pytest.raises(Stopped, match="stopped after meta-step 8; saved in") as stop:
        run(steps=20, run_dir=tmp_path, should_stop=should_stop)
    assert stop.value.step == 8
    assert checkpoint_steps(tmp_path) == [8]
    rest, _ = run(steps=10, run_dir=tmp_path, resume=True)
    assert_equal(rest.params, ten_steps().params)
    with pytest.raises(Stopped, match="nothing saved"):
        run(should_stop=lambda: True)


def test_existing_runs_are_not_overwritten(tmp_path):
    run(steps=4, run_dir=tmp_path)
    with pytest.raises(ValueError, match="holds a run already, with a checkpoint of step 4"):
        run(steps=4, run_dir=tmp_path)


def test_resuming_with_another_configuration_is_refused(tmp_path):
    run(steps=4, run_dir=tmp_path, config={"shots": 1})
    with pytest.raises(ValueError, match=r"config\['shots'\] is 1 in the stored one, 5 in the new one"):
        run(steps=8, run_dir=tmp_path, config={"shots": 5}, resume=True)
    with pytest.raises(ValueError, match="another configuration"):
        run(toys.maml(width=9), steps=8, run_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="there is none"):
        run(run_dir=tmp_path / "elsewhere", resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"meta_batch": 0}, "meta_batch: got 0"),
        ({"log_every": 0}, "log_every: got 0"),
        ({"validate_every": 0}, "validate_every: got 0"),
        ({"checkpoint_every": -1}, "checkpoint_every: got -1"),
        ({"validation_episodes": 1}, "validation_episodes: got 1"),
        ({"resume": True}, "run_dir: got None"),
    ],
)
def test_invalid_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        run(**settings)
