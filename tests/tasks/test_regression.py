"""Tests of sinusoid, harmonic and quadratic tasks: published distributions, and properties of samplers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import draw, drawn, sampled

import jaxmeta as jm
from jaxmeta.losses import mse
from jaxmeta.tasks.harmonic import harmonic
from jaxmeta.tasks.quadratics import quadratics
from jaxmeta.tasks.sinusoid import sinusoid

SOURCES = [sinusoid, harmonic]


def residual(features, y):
    """Return the relative residual of the least-squares fit of `y` by `features`, one number per task."""
    fits = (np.linalg.lstsq(f, t, rcond=None)[0] for f, t in zip(features, y, strict=True))
    return np.array(
        [np.linalg.norm(f @ c - t) / np.linalg.norm(t) for f, c, t in zip(features, fits, y, strict=True)]
    )


@pytest.mark.parametrize("source", SOURCES)
def test_shapes_types_and_card_of_regression_tasks(source):
    tasks = source("test", shots=5, queries=20)
    task = drawn(tasks)
    for batch, count in ((task.support, 5), (task.query, 20)):
        assert batch.x.shape == batch.y.shape == (count, 1)
        assert batch.x.dtype == batch.y.dtype == np.float32
        assert batch.mask is None
        assert batch.ways is None
    card = tasks.card
    assert (card.tasks, card.split, card.kind) == (source.__name__, "test", "regression")
    assert (card.ways, card.shots, card.queries, card.classes) == (None, 5, 20, None)


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_drawing_is_pure_under_jit_and_vmap(source, compiled):
    tasks = source(shots=3, queries=4, noise=0.1)
    batched = sampled(tasks, 6, seed=1)
    for i, key in enumerate(jax.random.split(jax.random.key(1), 6)):
        alone = draw(tasks.sample, key) if compiled else tasks.sample(key)
        of_batch = jax.tree.map(lambda leaf, i=i: leaf[i], batched)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone, of_batch)
    again = sampled(source(shots=3, queries=4, noise=0.1), 6, seed=1)
    jax.tree.map(np.testing.assert_array_equal, batched, again)
    assert len(np.unique(batched.support.x)) == 6 * 3


@pytest.mark.parametrize("source", SOURCES)
def test_each_split_has_its_own_tasks(source):
    first = [drawn(source(split)).support.y for split in ("train", "validation", "test")]
    assert all(np.abs(a - b).min() > 0 for i, a in enumerate(first) for b in first[:i])


@pytest.mark.parametrize("source", SOURCES)
def test_equal_sources_share_one_compiled_step(source):
    traces = []

    @jax.jit
    def counted(sample, key):
        traces.append(1)
        return sample(key)

    for split in ("train", "train", "test"):
        counted(source(split, shots=2, queries=2, noise=0.5).sample, jax.random.key(0))
    assert len(traces) == 1


def test_constant_predictors_of_sinusoids_have_the_published_errors():
    """E[A²]/2 for the zero predictor; 3.00567 for the best one that ignores the support set."""
    tasks = sampled(sinusoid(shots=5, queries=20), 40_000)
    x, y = tasks.query.x.reshape(-1, 1), tasks.query.y.reshape(-1, 1)
    assert mse(jnp.zeros_like(y), jnp.asarray(y)) == pytest.approx(4.25167, abs=0.09)
    best = -2 * 2.55 / np.pi
    assert best == pytest.approx(-1.62338, abs=1e-5)
    assert mse(jnp.asarray(best * np.cos(x)), jnp.asarray(y)) == pytest.approx(3.00567, abs=0.07)
    # No multiple of cos x is better: the regression of y on cos x has the same coefficient.
    assert (y * np.cos(x)).sum() / np.square(np.cos(x)).sum() == pytest.approx(best, abs=0.05)


def test_sinusoid_tasks_are_single_sinusoids_in_range():
    tasks = sampled(sinusoid(shots=10, queries=40), 2000)
    x = np.concatenate([tasks.support.x, tasks.query.x], 1)[..., 0].astype(np.float64)
    y = np.concatenate([tasks.support.y, tasks.query.y], 1)[..., 0].astype(np.float64)
    waves = np.stack([np.sin(x), np.cos(x)], -1)
    assert residual(waves, y).max() < 1e-5  # support and query follow one curve, without noise
    sine, cosine = np.array([np.linalg.lstsq(w, t, rcond=None)[0] for w, t in zip(waves, y, strict=True)]).T
    amplitude, phase = np.hypot(sine, cosine), np.arctan2(-cosine, sine)
    assert amplitude.min() > 0.1 - 1e-4
    assert amplitude.max() < 5 + 1e-4
    assert phase.min() > -1e-4
    assert phase.max() < np.pi + 1e-4
    for values, low, high in ((amplitude, 0.1, 5), (phase, 0, np.pi), (x, -5, 5)):
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.04 * (high - low))
        assert values.std() == pytest.approx((high - low) / 12**0.5, rel=0.06)


def test_sinusoids_of_all_phases_have_mean_zero():
    tasks = sampled(sinusoid(shots=5, queries=5, phase=(0.0, 2 * np.pi)), 20_000)
    x, y = tasks.query.x, tasks.query.y
    # The best fixed predictor is 0, the mean curve.
    assert (y * np.cos(x)).mean() == pytest.approx(0, abs=0.05)
    assert np.square(y).mean() == pytest.approx(4.25167, abs=0.13)


def test_sinusoids_have_the_given_ranges_and_noise():
    settings = {"amplitude": (2.0, 2.001), "phase": (0.0, 0.001), "inputs": (1.0, 3.0)}
    tasks = sampled(sinusoid(noise=0.3, **settings), 500)
    for batch in tasks:
        assert 1 <= batch.x.min() < batch.x.max() < 3
        assert (batch.y - 2 * np.sin(batch.x)).std() == pytest.approx(0.3, rel=0.06)


@pytest.mark.nightly
@pytest.mark.parametrize("count", [2, 12])
def test_harmonic_tasks_are_two_sines_at_frequency_ratio_two(count):
    tasks = sampled(harmonic(shots=20, queries=60), count)
    x = np.concatenate([tasks.support.x, tasks.query.x], 1)[..., 0].astype(np.float64)
    y = np.concatenate([tasks.support.y, tasks.query.y], 1)[..., 0].astype(np.float64)
    frequencies = np.arange(4.5, 7.5, 0.002)
    for xs, ys in zip(x, y, strict=True):
        angle = frequencies[:, None] * xs[None]
        waves = np.stack([np.sin(angle), np.cos(angle), np.sin(2 * angle), np.cos(2 * angle)], -1)
        fits = residual(waves, np.broadcast_to(ys, angle.shape))
        assert fits.min() < 0.01
        assert 5 - 0.01 < frequencies[fits.argmin()] < 7 + 0.01
        # A single sine does not fit.
        assert residual(waves[..., :2], np.broadcast_to(ys, angle.shape)).min() > 0.02


def test_harmonic_tasks_have_the_moments_of_their_distribution():
    tasks = sampled(harmonic(shots=10, queries=10, noise=0.5), 20_000)
    x, y = np.asarray(tasks.query.x[..., 0]), np.asarray(tasks.query.y[..., 0])
    assert np.square(y).mean() == pytest.approx(1 + 0.25, rel=0.04)
    assert y.mean() == pytest.approx(0, abs=0.03)
    assert x.std(1, ddof=1).mean() == pytest.approx(0.9727, abs=0.01)  # E[s] of 10 standard normals
    assert x.mean() == pytest.approx(0, abs=0.1)
    assert x.var() == pytest.approx(8**2 / 12 + 1, rel=0.03)
    # Support and query share the centre of the inputs.
    assert np.abs(x.mean(1) - np.asarray(tasks.support.x[..., 0]).mean(1)).mean() < 0.5


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"split": "dev"}, "split"),
        ({"shots": 0}, "shots"),
        ({"queries": 0}, "queries"),
        ({"noise": -1.0}, "noise"),
        ({"noise": float("nan")}, "noise"),
    ],
)
def test_invalid_arguments_are_refused(source, settings, name):
    with pytest.raises(ValueError, match=f"{name}: got"):
        source(**settings)


@pytest.mark.parametrize("name", ["amplitude", "phase", "inputs"])
def test_empty_ranges_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: got"):
        sinusoid(**{name: (2.0, 1.0)})


def test_quadratics_have_the_distribution_of_the_official_code():
    tasks = quadratics("test")
    assert (tasks.card.tasks, tasks.card.kind, tasks.card.shots) == ("quadratics", "regression", 10)
    batch = sampled(tasks, 500)
    for values in (batch.support.x, batch.support.y):
        assert values.dtype == np.float32
        assert 0 <= values.min() < 0.01
        assert 0.99 < values.max() < 1
        np.testing.assert_allclose((values.mean(), values.var()), (1 / 2, 1 / 12), atol=0.01)
    jax.tree.map(np.testing.assert_array_equal, batch.support, batch.query)
    # The loss of a linear network is ‖Wθ − y‖² / dim.
    task = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batch)
    theta = np.random.default_rng(0).normal(size=10)
    outputs = jm.nn.as_model(jm.nn.MLP(out=1, hidden=(), use_bias=False)).apply(
        {"head": {"kernel": jnp.asarray(theta, jnp.float32)[:, None]}}, task.support.x
    )
    expected = np.square(np.asarray(task.support.x) @ theta - np.asarray(task.support.y)[:, 0]).sum()
    np.testing.assert_allclose(10 * mse(outputs, task.support.y), expected, rtol=1e-5)
    assert drawn(quadratics(dim=3)).support.x.shape == (3, 3)
    first = [drawn(quadratics(split)).support.y for split in ("train", "validation", "test")]
    assert all(np.abs(a - b).min() > 0 for i, a in enumerate(first) for b in first[:i])
    with pytest.raises(ValueError, match="dim: got 0; it must be at least 1"):
        quadratics(dim=0)
