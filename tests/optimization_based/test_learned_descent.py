"""The LSTM meta-learner and the learned optimizer, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import (
    DIM,
    KEY,
    NUMBER,
    WAYS,
    assert_trees_close,
    differ,
    finite_differences,
    gradient,
    half_square,
    init,
    network,
    number_task,
    precise_network,
    task,
)

import jaxmeta as jm

pytestmark = pytest.mark.usefixtures("x64")

# --- LSTM meta-learner -----------------------------------------------------------------------------


def logit(p):
    return np.log(p / (1 - p))


def with_constant_gates(params, forget, enter):
    """The cell whose gates are constants; a gate of 1 is σ(60), which is 1 in float64."""
    cell = jax.tree.map(jnp.zeros_like, params["hyper"])
    cell["forget_bias"] = jnp.asarray(60.0 if forget == 1 else logit(forget))
    cell["input_bias"] = jnp.asarray(logit(enter))
    return {**params, "hyper": cell}


@pytest.mark.parametrize("hidden", [20, None])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_constant_gates_are_gradient_descent_with_weight_decay(hidden, decay):
    """f = 1 − αλ and i = α: SGD of rate α with weight decay λ, and its first-order meta-gradient."""
    rate, of = 0.3, task()
    learner = jm.lstm_meta_learner(network(), steps=4, hidden=hidden)
    params = with_constant_gates(init(learner), 1 - rate * decay, rate)
    optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))
    maml = jm.maml(network(), inner_optimizer=optimizer, steps=4, order="first")
    start = {"model": params["model"]}
    assert_trees_close(learner.adapt(params, of.support, KEY), maml.adapt(start, of.support, KEY), atol=1e-13)
    expected = gradient(maml, start, of)["model"]
    found = gradient(learner, params, of)
    assert_trees_close(found["model"], expected, atol=1e-13)
    # And second order, if asked for.
    second = jm.lstm_meta_learner(network(), steps=4, hidden=hidden, order="second")
    maml = jm.maml(network(), inner_optimizer=optimizer, steps=4)
    expected = gradient(maml, start, of)["model"]
    assert_trees_close(gradient(second, params, of)["model"], expected, atol=1e-12)
    assert differ(found["model"], expected) > 1e-3


@pytest.mark.parametrize("forget", [1.0, 0.9])
def test_on_a_line(forget):
    """θ_2 = 0.36, ∂/∂c_0 = −2.64 (second order −1.6896), ∂/∂i = −(∇_1 + ∇_2)(θ_2 − 3) = −9.504."""
    of = number_task()
    learner = jm.lstm_meta_learner(NUMBER, steps=2, loss=half_square)
    params = with_constant_gates(init(learner, of), forget, 0.1)
    theta = float(learner.adapt(params, of.support, KEY)["model"]["theta"])
    found = gradient(learner, params, of)
    np.testing.assert_allclose(found["model"]["theta"], forget**2 * (theta - 3), rtol=1e-12)
    if forget == 1:
        np.testing.assert_allclose(theta, 0.36, rtol=1e-12)
        np.testing.assert_allclose(found["model"]["theta"], -2.64, rtol=1e-12)
        # i = σ(b): ∂i/∂b = i(1 − i).
        np.testing.assert_allclose(found["hyper"]["input_bias"] / (0.1 * 0.9), -9.504, rtol=1e-12)
        second = jm.lstm_meta_learner(NUMBER, steps=2, order="second", loss=half_square)
        np.testing.assert_allclose(gradient(second, params, of)["model"]["theta"], -1.6896, rtol=1e-12)


def stirred(params):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape), params)


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize(("hidden", "feedback"), [(3, "gate"), (3, "pre_gate"), (None, "gate")])
def test_lstm_is_that_of_finite_differences_with_gradients_and_losses_held_fixed(hidden, feedback, memory):
    of = task()
    learner = jm.lstm_meta_learner(
        network(norm=False), steps=3, hidden=hidden, feedback=feedback, memory=memory
    )
    params = stirred(init(learner))
    cell = jm.nn.GatedUpdate(hidden, feedback)
    model = jm.nn.as_model(network(norm=False))

    def support_loss(weights):
        return jm.losses.cross_entropy(model.apply(weights, of.support.x), of.support.y)

    def by_hand(params, measure):
        theta, restore = ravel_pytree(params["model"])
        state = cell.initial(theta.size, theta.dtype)
        for step in range(3):
            value, grads = measure(step, restore(theta))
            state, change = cell.apply(
                {"params": params["hyper"]}, state, ravel_pytree(grads)[0], value, theta
            )
            theta = theta + change
        return jm.losses.cross_entropy(model.apply(restore(theta), of.query.x), of.query.y)

    recorded = []

    def record(step, weights):
        recorded.append(jax.value_and_grad(support_loss)(weights))
        return recorded[-1]

    np.testing.assert_allclose(learner.loss(params, of, KEY)[0], by_hand(params, record), rtol=1e-12)
    expected = finite_differences(lambda params: by_hand(params, lambda step, _: recorded[step]), params)
    np.testing.assert_allclose(ravel_pytree(gradient(learner, params, of))[0], expected, atol=1e-8)


def test_lstm_of_second_order_is_that_of_plain_finite_differences():
    of = task()
    learner = jm.lstm_meta_learner(network(), steps=3, hidden=3, order="second")
    params = stirred(init(learner))
    expected = finite_differences(lambda params: learner.loss(params, of, KEY)[0], params)
    np.testing.assert_allclose(ravel_pytree(gradient(learner, params, of))[0], expected, atol=2e-7)
    first = jm.lstm_meta_learner(network(), steps=3, hidden=3)
    assert differ(gradient(first, params, of), gradient(learner, params, of)) > 1e-3


def test_the_cell_does_not_grow_with_the_network_and_tasks_start_alike():
    learner = jm.lstm_meta_learner(network())
    params = init(learner)
    assert sum(leaf.size for leaf in jax.tree.leaves(params["hyper"])) == 2046
    assert_trees_close(params["model"], init(jm.maml(network()))["model"], rtol=0)


def test_a_gradient_scale_divides_what_the_cell_sees():
    """The official code's extra 1/B: as if the loss's gradient were 1/B of what it is."""
    of = task()
    settings = {"steps": 2, "hidden": None}
    scaled = jm.lstm_meta_learner(network(norm=False), gradient_scale=0.2, **settings)
    params = with_constant_gates(init(scaled), 1.0, 0.5)
    plain = jm.lstm_meta_learner(network(norm=False), **settings)
    slower = with_constant_gates(params, 1.0, 0.1)
    assert_trees_close(
        scaled.adapt(params, of.support, KEY), plain.adapt(slower, of.support, KEY), atol=1e-13
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps: got 0; it must be at least 1"),
        ({"hidden": 0}, "hidden: got .*; it must be at least 1"),
        ({"feedback": "both"}, "feedback: got 'both'; it must be one of"),
        ({"order": "implicit", "proximal": 1.0}, 'order: got "implicit"'),
    ],
)
def test_lstm_refuses(settings, says):
    with pytest.raises(ValueError, match=says):
        jm.lstm_meta_learner(network(), **settings)


# --- Learned optimizer -----------------------------------------------------------------------------

# f(θ) = θ², from θ = 1.
SQUARE = jm.Model(lambda key, x: jnp.ones(()), lambda params, x: jnp.full((x.shape[0], 1), params))
SQUARE_TASK = jm.Task(*(jm.Batch(jnp.zeros((1, 1)), jnp.zeros((1, 1))) for _ in range(2)))


def linear_optimizer(steps=20, truncation=5, **settings):
    """δ = w·g + b, from w = b = 0."""
    return jm.learned_optimizer(
        SQUARE,
        steps=steps,
        truncation=truncation,
        layers=(),
        preprocess=None,
        scale=1.0,
        zero_output=True,
        loss=jm.losses.mse,
        **settings,
    )


def test_without_updates_an_unroll_of_u_steps_is_u_plus_one_times_the_loss():
    learner = linear_optimizer()
    params = init(learner, SQUARE_TASK)
    value, carry = learner.unroll(params, SQUARE_TASK, None, KEY)
    np.testing.assert_allclose(value, 6.0)
    np.testing.assert_allclose(learner.loss(params, SQUARE_TASK, KEY)[0], 4 * 6.0)
    np.testing.assert_allclose(carry.weights, 1.0)
    lstm = jm.learned_optimizer(network(), truncation=5, zero_output=True)
    start = lstm.unroll(init(lstm), task(), None, KEY)
    np.testing.assert_allclose(
        start[0],
        6
        * jm.losses.cross_entropy(
            jm.nn.as_model(network()).apply(start[1].weights, task().support.x), task().support.y
        ),
    )


def test_the_official_test_s_two_numbers():
    """∂L/∂w = 60 and ∂L/∂b = 30; after one Adam step of 0.01, five more steps from 1 end at 0.8558811952."""
    learner = linear_optimizer()
    params = init(learner, SQUARE_TASK)
    grads = jax.grad(lambda params: learner.unroll(params, SQUARE_TASK, None, KEY)[0])(params)["optimizer"]
    # ∂θ_t/∂w = −Σ g = 2t (g = 2 at θ = 1, δ = w·g), so that ∂L/∂w = 2·Σ_{t ≤ 5} 2t = 60.
    np.testing.assert_allclose((grads["kernel"].item(), grads["bias"].item()), (60, 30), rtol=1e-12)
    adam = optax.adam(0.01)
    updates, _ = adam.update(grads, adam.init(params["optimizer"]))
    params = {"optimizer": optax.apply_updates(params["optimizer"], updates)}
    np.testing.assert_allclose(ravel_pytree(params)[0], -0.01, rtol=1e-6)
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.01), params)
    optimizer = learner.as_optax(params)
    theta, state, way = jnp.ones(()), optimizer.init(jnp.ones(())), []
    for _ in range(5):
        updates, state = optimizer.update(2 * theta, state)
        theta = theta + updates
        way.append(theta)
    np.testing.assert_allclose(way, [0.97, 0.9406, 0.911788, 0.883552, 0.855881], atol=5e-7)
    np.testing.assert_allclose(theta, 0.8558811952, atol=5e-11)
    _, carry = learner.unroll(params, SQUARE_TASK, None, KEY)
    np.testing.assert_allclose(carry.weights, 0.8558811952, atol=5e-11)
    np.testing.assert_allclose(theta**2, 0.7325326203, atol=1e-10)


def test_a_linear_optimizer_trained_on_a_square_finds_its_minimum():
    """The official suite's convergence test: 500 runs of 5 unrolls of 20 steps, Adam of 0.01."""
    learner = linear_optimizer(steps=100, truncation=20)
    adam = optax.adam(0.01)

    def run(state, _):
        def unroll(state, carry):
            params, opt_state = state
            (_, carry), grads = jax.value_and_grad(learner.unroll, has_aux=True)(
                params, SQUARE_TASK, carry, KEY
            )
            updates, opt_state = adam.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), carry

        carry = None
        for _ in range(5):
            state, carry = unroll(state, carry)
        return state, carry.weights**2

    params = init(learner, SQUARE_TASK)
    _, finals = jax.jit(lambda state: jax.lax.scan(run, state, None, length=500))((params, adam.init(params)))
    assert finals[-1] < 1e-5


def learned(**settings):
    return jm.learned_optimizer(
        precise_network(), **{"steps": 6, "truncation": 3, "layers": (3,), **settings}
    )


def start_of(learner, params, of):
    """Where `learner`'s run begins: with no update made."""
    still = jm.learned_optimizer(precise_network(), steps=1, truncation=1, layers=(3,), zero_output=True)
    return still.unroll(init(still), of, None, KEY)[1].weights


@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("order", ["first", "second"])
def test_unroll_is_that_of_finite_differences_with_what_it_stops_held_fixed(order, memory):
    of = task()
    learner = learned(order=order, memory=memory, scale=0.3)
    params = stirred(init(learner))
    _, carry = learner.unroll(params, of, None, KEY)
    net = jm.nn.ProposedUpdate((3,), 10.0, 0.3)
    model = jm.nn.as_model(network())

    def support_loss(weights):
        return jm.losses.cross_entropy(model.apply(weights, of.support.x), of.support.y)

    def by_hand(params, gradient_at):
        """The second unroll, from the carry of the first."""
        (theta, restore), state, total = ravel_pytree(carry.weights), carry.state, 0.0
        for step in range(3):
            total += support_loss(restore(theta))
            grads = ravel_pytree(gradient_at(step, restore(theta)))[0]
            state, change = net.apply({"params": params["optimizer"]}, state, grads)
            theta = theta + change
        return total + support_loss(restore(theta))

    recorded = []

    def record(step, weights):
        recorded.append(jax.grad(support_loss)(weights))
        return recorded[-1]

    value = by_hand(params, record)
    held = (
        (lambda step, weights: recorded[step])
        if order == "first"
        else (lambda _, w: jax.grad(support_loss)(w))
    )
    expected = finite_differences(lambda params: by_hand(params, held), params)
    found, grads = jax.jit(jax.value_and_grad(lambda params: learner.unroll(params, of, carry, KEY)[0]))(
        params
    )
    np.testing.assert_allclose(found, value, rtol=1e-12)
    np.testing.assert_allclose(ravel_pytree(grads)[0], expected, atol=1e-6, rtol=1e-6)
    assert np.abs(expected).max() > 0.01


def test_no_gradient_comes_from_before_an_unroll():
    of, learner = task(), learned()
    params = init(learner)
    _, carry = learner.unroll(params, of, None, KEY)

    def second(params, first_params):
        _, carry = learner.unroll(first_params, of, None, KEY)
        return learner.unroll(params, of, carry, KEY)[0]

    own, before = jax.grad(second, (0, 1))(params, params)
    assert_trees_close(before, jax.tree.map(jnp.zeros_like, before), rtol=0)
    alone = jax.grad(lambda params: learner.unroll(params, of, carry, KEY)[0])(params)
    assert_trees_close(own, alone, atol=1e-14)


def test_an_unroll_ends_with_the_randomness_that_the_next_begins_with():
    """Without updates f differs from step to step by its key alone."""

    def apply(params, x, *, key=None):
        noise = 0.0 if key is None else jax.random.normal(key)
        return jnp.zeros((x.shape[0], 1)) + noise + 0 * params["w"]

    model = jm.Model(lambda key, x: {"w": jnp.zeros(())}, apply, stochastic=True)
    learner = jm.learned_optimizer(model, steps=4, truncation=2, zero_output=True, loss=jm.losses.mse)
    of = jm.Task(*(jm.Batch(jnp.zeros((3, 2)), jnp.zeros((3, 1))) for _ in range(2)))
    params = learner.init(KEY, of)
    points = [jnp.square(jax.random.normal(jax.random.fold_in(KEY, step))) for step in range(5)]
    carry = None
    for first in (0, 2):
        value, carry = learner.unroll(params, of, carry, KEY)
        np.testing.assert_allclose(value, sum(points[first : first + 3]), rtol=1e-6)


def test_the_loss_is_the_sum_of_its_unrolls():
    of, learner = task(), learned(steps=9)
    params = init(learner)

    def summed(params):
        total, carry = 0.0, None
        for _ in range(3):
            value, carry = learner.unroll(params, of, carry, KEY)
            total += value
        return total

    value, grads = jax.value_and_grad(summed)(params)
    np.testing.assert_allclose(learner.loss(params, of, KEY)[0], value, rtol=1e-12)
    assert_trees_close(gradient(learner, params, of), grads, atol=1e-12)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_optimizer_of_a_run_is_the_one_of_optax(batch_size):
    """A run in two unrolls ends where a plain optax loop ends, and where `adapt` does."""
    of, learner = task(), learned(batch_size=batch_size)
    params = init(learner)
    carry = None
    for _ in range(2):
        _, carry = learner.unroll(params, of, carry, KEY)
    adapted = learner.adapt(params, of.support, KEY)
    assert_trees_close(adapted["model"], carry.weights, atol=1e-12)
    assert int(carry.step) == 6
    if batch_size is not None:
        return
    optimizer = learner.as_optax(params)
    weights = start_of(learner, params, of)
    state, model = optimizer.init(weights), jm.nn.as_model(network())
    for _ in range(6):
        grads = jax.grad(lambda w: jm.losses.cross_entropy(model.apply(w, of.support.x), of.support.y))(
            weights
        )
        updates, state = optimizer.update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
    assert_trees_close(adapted["model"], weights, atol=1e-12)


def test_as_optax_serves_trees_of_any_shapes_and_types():
    learner = learned()
    params = init(learner)
    optimizer = optax.chain(optax.clip(1.0), learner.as_optax(params))
    tree = {"a": jnp.ones((2, 3), jnp.float32), "b": [jnp.ones(4, jnp.bfloat16), jnp.ones(())]}
    update = jax.jit(optimizer.update)
    updates, state = update(tree, optimizer.init(tree), tree)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), updates) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), tree
    )
    # Equal gradients, equal updates, whatever the leaf.
    np.testing.assert_allclose(updates["a"], float(updates["b"][1]), rtol=1e-6)
    update(tree, state, tree)
    # It masks, schedules and combines as any optax transformation.
    masked = optax.masked(learner.as_optax(params), {"a": True, "b": False})
    kept, _ = masked.update(tree, masked.init(tree), tree)
    np.testing.assert_array_equal(kept["b"][1], 1.0)


def test_every_run_begins_anew():
    learner = learned()
    params, of = init(learner), task()
    first, second = (learner.unroll(params, of, None, jax.random.key(seed))[1].weights for seed in (0, 1))
    assert differ(first, second) > 0.1


def test_more_steps_at_test_and_another_network_need_no_other_parameters():
    params, of = init(learned()), task()
    longer = learned(eval_steps=12)
    assert differ(longer.adapt(params, of.support, KEY), learned().adapt(params, of.support, KEY)) > 1e-4
    wide = functools.partial(jm.nn.MLP, out=WAYS, kernel_init=jax.nn.initializers.lecun_normal())
    wider = jm.learned_optimizer(wide(hidden=(9, 7)), steps=6, truncation=3, layers=(3,))
    assert wider.adapt(params, of.support, KEY)["model"]["Dense_0"]["kernel"].shape == (DIM, 9)
    assert np.isfinite(wider.loss(params, of, KEY)[0])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps: got 0; it must be at least 1"),
        ({"steps": 7}, "steps: got 7; it must be a multiple of truncation = 3"),
        ({"truncation": 0}, "truncation: got 0; it must be at least 1"),
        ({"eval_steps": 0}, "eval_steps: got 0; it must be at least 1"),
        ({"order": "implicit"}, "order: got 'implicit'; it must be one of 'second', 'first'"),
        ({"norm": "population"}, "norm: got 'population'; it must be one of 'batch', 'support'"),
    ],
)
def test_learned_optimizer_refuses(settings, says):
    with pytest.raises(ValueError, match=says):
        learned(**settings)


def test_integer_parameters_are_refused():
    learner = learned()
    optimizer = learner.as_optax(init(learner))
    with pytest.raises(ValueError, match=r"params: got integers in \['step'\]"):
        optimizer.init({"w": jnp.ones(3), "step": jnp.zeros((), jnp.int32)})
