"""Evolution strategies against closed forms of smoothed losses, each within its own standard error.

Keys are fixed: a test gives the same numbers each time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta as jm

KEY = jax.random.key(0)


def estimates(gradient, params, *args, count=20_000):
    """Return the gradient estimates for `count` keys, as one array."""
    return jax.jit(jax.vmap(lambda key: gradient(params, *args, key=key)[1]))(jax.random.split(KEY, count))


def assert_mean(samples, expected, max_relative_error=0.05):
    """Assert that the mean is within four standard errors of the expected one, and that these are small."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(0) / np.sqrt(len(samples))
    assert np.all(error < max_relative_error * np.linalg.norm(expected)), error
    np.testing.assert_array_less(np.abs(samples.mean(0) - expected), 4 * error)


# --- Evolution strategies ---------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("sigma", "pairs"), [(0.1, 1), (3.0, 3)])
def test_estimate_of_a_quadratic_is_unbiased_for_any_sigma(sigma, pairs):
    a = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.7]])
    b, theta = np.array([1.0, -2.0, 0.5]), np.array([0.3, -1.0, 2.0])

    def loss(theta, b):
        return 0.5 * theta @ jnp.asarray(a) @ theta + b @ theta

    gradient = jm.evolution_gradient(loss, sigma=sigma, pairs=pairs)
    samples = estimates(gradient, jnp.asarray(theta), jnp.asarray(b))
    # Antithetic pairs cancel the curvature, so σ does not enter the variance either.
    assert_mean(samples, a @ theta + b)
    exact = a @ theta + b
    variance = (exact @ exact + exact**2) / pairs
    np.testing.assert_allclose(np.var(samples, 0), variance, rtol=0.1)


def test_estimate_of_an_exponential_is_the_gradient_of_its_smoothed_form():
    # E exp(θ + ε) = exp(θ + σ²/2).
    sigma, theta = 0.7, 0.2
    gradient = jm.evolution_gradient(jnp.exp, sigma=sigma, pairs=2)
    assert_mean(estimates(gradient, jnp.asarray(theta)), np.exp(theta + sigma**2 / 2))


def test_estimate_of_an_integer_step_function_is_the_density_at_the_step():
    sigma, theta = 0.5, 0.3
    gradient = jm.evolution_gradient(lambda theta: (theta > 0).astype(jnp.int32), sigma=sigma, pairs=2)
    density = np.exp(-0.5 * (theta / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    assert_mean(estimates(gradient, jnp.asarray(theta)), density)


@pytest.mark.usefixtures("x64")
def test_estimate_with_a_small_sigma_matches_automatic_differentiation():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(2, 3))), "b": jnp.asarray(rng.normal(size=2))}
    x = jnp.asarray(rng.normal(size=3))

    def loss(params, x):
        return jnp.tanh(params["w"] @ x + params["b"]).sum() ** 2

    samples = estimates(jm.evolution_gradient(loss, sigma=0.01, pairs=2), params, x)
    exact = jax.grad(loss)(params, x)
    for name in params:
        assert_mean(samples[name], np.asarray(exact[name]), max_relative_error=0.1)


def test_values_and_aux_match_value_and_grad():
    params = {"w": jnp.arange(3.0), "b": jnp.asarray(2.0)}

    def loss(params, x, *, factor):
        outputs = params["w"] * x
        return factor * outputs.sum() + params["b"], {"outputs": outputs, "count": jnp.asarray(3)}

    x = jnp.array([1.0, 0.5, -2.0])
    gradient = jm.evolution_gradient(loss, sigma=0.1, pairs=2, has_aux=True)
    actual, grads = gradient(params, x, factor=3.0, key=KEY)
    expected, exact = jax.value_and_grad(loss, has_aux=True)(params, x, factor=3.0)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, exact)


def test_estimate_matches_the_formula_for_its_draws():
    """A linear loss with slopes s has estimate mean_p (s · u_p) u_p, for unit normals u_p by leaf."""
    slopes = np.array([1.0, -2.0])
    gradient = jm.evolution_gradient(
        lambda theta: theta @ jnp.asarray(slopes, jnp.float32), sigma=0.3, pairs=5
    )
    units = np.asarray(jax.random.normal(jax.random.split(KEY, 1)[0], (5, 2)), np.float64)
    actual = gradient(jnp.zeros(2), key=KEY)[1]
    np.testing.assert_allclose(actual, ((units @ slopes)[:, None] * units).mean(0), rtol=1e-5)


def test_integer_leaves_are_unchanged_and_others_keep_their_dtypes():
    with jax.enable_x64(True):
        params = {
            "half": jnp.ones(2, jnp.bfloat16),
            "single": jnp.ones(2, jnp.float32),
            "double": jnp.ones(2, jnp.float64),
            "number": 0.5,
            "count": jnp.array([3, 4]),
            "flag": jnp.array(True),
            "none": None,
        }

        def loss(params):
            assert params["half"].dtype == jnp.bfloat16
            assert params["none"] is None
            floats = params["half"].sum() + params["single"].sum() + params["double"].sum() + params["number"]
            return floats * params["count"].sum()

        value, grads = jax.jit(jm.evolution_gradient(loss, sigma=0.1, pairs=3))(params, key=KEY)
        assert value == 45.5
        types = {name: grads[name].dtype.name for name in grads if name != "none"}
        assert types == {
            "half": "bfloat16",
            "single": "float32",
            "double": "float64",
            "number": "float64",
            "count": "int64",
            "flag": "bool",
        }
        assert not grads["count"].any()
        assert not grads["flag"]
        assert grads["none"] is None
        updates, _ = optax.sgd(0.1).update(grads, optax.sgd(0.1).init(params), params)
        moved = optax.apply_updates(params, updates)
        assert moved["count"].tolist() == [3, 4]
        assert moved["half"].dtype == jnp.bfloat16


def test_rounding_of_bfloat16_parameters_does_not_bias_the_estimate():
    # Near 100, bfloat16 numbers are 0.5 apart, which equals σ.
    theta = jnp.full(2, 100, jnp.bfloat16)
    gradient = jm.evolution_gradient(lambda t: t.astype(jnp.float32).sum(), sigma=0.5, pairs=16)
    assert_mean(estimates(gradient, theta, count=5000), [1.0, 1.0])


def test_estimator_works_under_vmap_over_tasks():
    gradient = jm.evolution_gradient(lambda theta, task: ((theta - task) ** 2).sum(), sigma=0.1, pairs=2)
    theta, tasks, keys = jnp.zeros(2), jnp.arange(6.0).reshape(3, 2), jax.random.split(KEY, 3)
    together = jax.vmap(lambda task, key: gradient(theta, task, key=key))(tasks, keys)
    for i, (task, key) in enumerate(zip(tasks, keys, strict=True)):
        value, grads = gradient(theta, task, key=key)
        np.testing.assert_allclose(together[0][i], value, rtol=1e-5)
        np.testing.assert_allclose(together[1][i], grads, rtol=1e-5)


def test_descent_by_estimates_lowers_the_error_rate_of_a_threshold():
    """The error rate is constant almost everywhere, so its derivative is zero."""
    x = jnp.linspace(-1, 1, 101)
    wrong = jm.evolution_gradient(lambda t: ((x > t) != (x > 0.4)).mean(), sigma=0.2, pairs=8)

    def step(theta, key):
        return theta - 0.2 * wrong(theta, key=key)[1], None

    theta, _ = jax.jit(lambda keys: jax.lax.scan(step, jnp.asarray(-0.5), keys))(jax.random.split(KEY, 200))
    assert abs(theta - 0.4) < 0.1


@pytest.mark.parametrize("build", [jm.evolution_gradient, jm.persistent_evolution])
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"sigma": 0.0, "pairs": 1}, "sigma"),
        ({"sigma": -1.0, "pairs": 1}, "sigma"),
        ({"sigma": float("inf"), "pairs": 1}, "sigma"),
        ({"sigma": 0.1, "pairs": 0}, "pairs"),
    ],
)
def test_bad_settings_are_refused(build, settings, name):
    with pytest.raises(jm.ArgumentError) as caught:
        build(lambda theta: theta, **settings)
    assert caught.value.name == name


@pytest.mark.parametrize(
    ("loss", "params", "name"),
    [
        (lambda t: t, jnp.ones(2), "loss"),
        (lambda t: t.sum() * 1j, jnp.ones(2), "loss"),
        (lambda t: t["a"].real, {"a": jnp.asarray(1j)}, "params"),
        (lambda t: t.sum(), jnp.arange(3), "params"),
        (lambda t: 0.0, {}, "params"),
    ],
)
def test_unsupported_losses_and_parameters_are_refused(loss, params, name):
    with pytest.raises(jm.ArgumentError) as caught:
        jm.evolution_gradient(loss, sigma=0.1, pairs=2)(params, key=KEY)
    assert caught.value.name == name


# --- Persistent evolution strategies ----------------------------------------------------------------

STEPS, RATE, SIGMA = 5, 0.1, 0.1


def descent(rate, x):
    """Take one step of descent on ½x² at a learned rate, with x_t = (1 − rate)^t, and return its loss."""
    x = x - rate * x
    return 0.5 * x**2, x


@functools.cache
def unrolls():
    """Return the estimates of each part of 20,000 unrolls."""
    pes = jm.persistent_evolution(descent, sigma=SIGMA, pairs=2)
    rate = jnp.asarray(RATE)

    def one_unroll(key):
        def step(state, key):
            _, grads, state = pes.step(rate, state, key=key)
            return state, grads

        return jax.lax.scan(step, pes.init(rate, jnp.asarray(1.0)), jax.random.split(key, STEPS))[1]

    return np.asarray(jax.jit(jax.vmap(one_unroll))(jax.random.split(KEY, 20_000)), np.float64)


def test_persistent_estimates_are_unbiased_for_the_whole_unroll():
    # E L_t = ½ Π_τ E(1 − r_τ − ε_τ)² = ½ Π_τ ((1 − r_τ)² + σ²), differentiated in every r_τ.
    t = np.arange(1, STEPS + 1)
    exact = -t * (1 - RATE) * ((1 - RATE) ** 2 + SIGMA**2) ** (t - 1)
    for step in range(STEPS):
        assert_mean(unrolls()[:, step], exact[step])
    assert_mean(unrolls().sum(1), exact.sum())


def test_truncated_backpropagation_is_biased_where_persistent_estimates_are_not():
    def truncated(rate, x):
        loss, x = descent(rate, jax.lax.stop_gradient(x))
        return loss, x

    def total(rate):
        x, losses = jnp.asarray(1.0), 0.0
        for _ in range(STEPS):
            loss, x = truncated(rate, x)
            losses += loss
        return losses

    t = np.arange(1, STEPS + 1)
    biased = jax.grad(total)(RATE)
    np.testing.assert_allclose(biased, -((1 - RATE) ** (2 * t - 1)).sum(), rtol=1e-5)
    samples = unrolls().sum(1)
    error = samples.std() / np.sqrt(len(samples))
    assert abs(samples.mean() - biased) > 50 * error


def test_first_part_matches_evolution_gradient():
    rate, x = jnp.asarray(RATE), jnp.asarray(1.0)
    pes = jm.persistent_evolution(descent, sigma=SIGMA, pairs=4)
    actual = pes.step(rate, pes.init(rate, x), key=KEY)[1]
    gradient = jm.evolution_gradient(lambda rate: descent(rate, x)[0], sigma=SIGMA, pairs=4)
    np.testing.assert_allclose(actual, gradient(rate, key=KEY)[1], rtol=1e-5)


def test_a_restarted_unroll_forgets_the_previous_one():
    pes = jm.persistent_evolution(descent, sigma=SIGMA, pairs=3)
    rate, x = jnp.asarray(RATE), jnp.asarray(1.0)
    keys = jax.random.split(KEY, STEPS)

    def step(state, index_and_key):
        index, key = index_and_key
        state = jax.lax.cond(index % STEPS == 0, lambda: pes.init(rate, x), lambda: state)
        value, grads, state = pes.step(rate, state, key=key)
        return state, (value, grads)

    @jax.jit
    def run(keys):
        return jax.lax.scan(step, pes.init(rate, x), (jnp.arange(len(keys)), keys))

    _, (values, grads) = run(jnp.concatenate([keys[::-1], keys]))
    _, alone = run(keys)
    np.testing.assert_allclose(values[STEPS:], alone[0], rtol=1e-6)
    np.testing.assert_allclose(grads[STEPS:], alone[1], rtol=1e-6)
    # After the restart, the sum holds the perturbations of the second unroll only.
    state, _ = run(jnp.concatenate([keys[::-1], keys]))
    draws = [jax.random.normal(jax.random.split(key, 1)[0], (3,)) for key in keys]
    np.testing.assert_allclose(state.total, SIGMA * np.sum(draws, 0), rtol=1e-5)


def test_each_particle_carries_a_separate_state_of_any_dtype():
    def unroll(params, carry, factor):
        carry = {"x": carry["x"] + factor * params["rate"].astype(jnp.float32), "step": carry["step"] + 1}
        return carry["x"].sum() * params["count"], carry

    params = {"rate": jnp.ones(2, jnp.bfloat16), "count": jnp.asarray(2)}
    pes = jm.persistent_evolution(unroll, sigma=0.5, pairs=3)
    state = pes.init(params, {"x": jnp.zeros(2), "step": jnp.asarray(0)})
    assert state.total["rate"].dtype == jnp.float32
    assert state.total["count"] is None
    for number in range(2):
        value, grads, state = pes.step(params, state, 4.0, key=jax.random.fold_in(KEY, number))
    assert state.carry["step"].tolist() == [2] * 6
    assert grads["rate"].dtype == jnp.bfloat16
    assert grads["count"] == 0
    np.testing.assert_allclose(value, 2 * np.asarray(state.carry["x"]).sum(1).mean(), rtol=1e-6)
    # The particles of a pair lie on opposite sides of 2 · 4 · 1, up to rounding to 1/128 near 1.
    positive, negative = np.split(np.asarray(state.carry["x"]), 2)
    np.testing.assert_allclose((positive + negative) / 2, 8, atol=0.1)
    np.testing.assert_allclose((positive - negative) / 2, 4 * state.total["rate"], atol=0.1)


def test_a_state_of_another_number_of_pairs_is_refused():
    rate, x = jnp.asarray(RATE), jnp.asarray(1.0)
    few, many = (jm.persistent_evolution(descent, sigma=SIGMA, pairs=pairs) for pairs in (2, 3))
    with pytest.raises(jm.ArgumentError, match=r"state: got perturbations of shapes \[\(2,\)\]"):
        many.step(rate, few.init(rate, x), key=KEY)


def test_an_unroll_whose_loss_is_not_a_scalar_is_refused():
    pes = jm.persistent_evolution(lambda theta, x: (theta, x), sigma=SIGMA, pairs=2)
    with pytest.raises(jm.ArgumentError, match=r"unroll: got a loss of shape \(2,\)"):
        pes.step(jnp.ones(2), pes.init(jnp.ones(2), None), key=KEY)


@pytest.mark.nightly
def test_the_unroll_of_a_learned_optimizer_starts_from_a_carry_of_none():
    network, settings = (
        jm.nn.MLP(out=1, hidden=(4,)),
        {"inner_steps": 4, "truncation": 2, "loss": jm.losses.mse},
    )
    task = jm.tasks.sinusoid(shots=5, queries=5).sample(KEY)
    params = jm.learned_optimizer(network, layers=(4,), **settings).init(KEY, task)
    unroll = jm.learned_optimizer_unroll(network, layers=(4,), **settings)
    # With such a small σ every particle follows the unperturbed run.
    pes = jm.persistent_evolution(
        lambda p, carry, task, key: unroll(p, task, carry, key), sigma=1e-6, pairs=2
    )
    state, carry = pes.init(params, None), None
    for _ in range(2):
        value, grads, state = pes.step(params, state, task, KEY, key=KEY)
        expected, carry = unroll(params, task, carry, KEY)
        np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert state.carry.step.tolist() == [4] * 4
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
