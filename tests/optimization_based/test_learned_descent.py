"""The LSTM meta-learner and the learned optimizer, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close as assert_trees_close
from jax.flatten_util import ravel_pytree
from problems import (
    DIM,
    KEY,
    NUMBER,
    WAYS,
    adapt,
    finite_differences,
    flat,
    gradient,
    half_square,
    init,
    loss,
    make_task,
    network,
    number_task,
    plain_loss,
    precise_network,
)
from trees import max_difference

import jaxmeta as jm

pytestmark = pytest.mark.usefixtures("x64")

# --- LSTM meta-learner ------------------------------------------------------------------------------


def logit(p):
    return np.log(p / (1 - p))


def with_constant_gates(params, forget_gate, input_gate):
    """Return parameters of a cell with constant gates; a gate of 1 is σ(60), which is 1 in float64."""
    cell = jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape)), params["hyper"])
    cell["forget_bias"] = jnp.asarray(60.0 if forget_gate == 1 else logit(forget_gate))
    cell["input_bias"] = jnp.asarray(logit(input_gate))
    return {**params, "hyper": cell}


@functools.cache
def lstm(hidden, order="first", norm=False):
    # "store", because the default "auto" would trace each inner step once more.
    return jm.lstm_meta_learner(network(norm=norm), inner_steps=3, hidden=hidden, order=order, memory="store")


@pytest.mark.nightly
@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(
    ("hidden", "decay", "norm"),
    [(3, 0.2, False), *((hidden, decay, True) for hidden in (20, None) for decay in (0.0, 0.2))],
)
def test_constant_gates_match_gradient_descent_with_weight_decay(hidden, decay, norm, order):
    """f = 1 − αλ and i = α: SGD of rate α with weight decay λ, and its meta-gradient in either order."""
    rate, task, learner = 0.3, make_task(), lstm(hidden, order, norm)
    params = with_constant_gates(init(learner), 1 - rate * decay, rate)
    optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))
    maml = jm.maml(network(norm=norm), inner_optimizer=optimizer, inner_steps=3, order=order)
    start = {"model": params["model"]}
    assert_trees_close(adapt(learner, params, task), adapt(maml, start, task), atol=1e-13)
    actual = gradient(learner, params, task)["model"]
    assert_trees_close(
        actual, gradient(maml, start, task)["model"], atol=1e-13 if order == "first" else 1e-12
    )


@pytest.mark.nightly
@pytest.mark.parametrize("hidden", [20, None])
def test_orders_differ_with_constant_gates(hidden):
    learners = [lstm(hidden, order, norm=True) for order in ("first", "second")]
    params = with_constant_gates(init(learners[0]), 0.94, 0.3)
    first, second = (gradient(learner, params, make_task())["model"] for learner in learners)
    assert max_difference(first, second) > 1e-3


@pytest.mark.parametrize("forget", [1.0, pytest.param(0.9, marks=pytest.mark.nightly)])
def test_constant_gates_on_one_number_match_closed_form(forget):
    """θ_2 = 0.36, ∂/∂c_0 = −2.64, ∂/∂i = −(∇_1 + ∇_2)(θ_2 − 3) = −9.504."""
    task = number_task()
    learner = jm.lstm_meta_learner(NUMBER, inner_steps=2, loss=half_square)
    params = with_constant_gates(init(learner, task), forget, 0.1)
    theta = float(adapt(learner, params, task)["model"]["theta"])
    actual = gradient(learner, params, task)
    np.testing.assert_allclose(actual["model"]["theta"], forget**2 * (theta - 3), rtol=1e-12)
    if forget == 1:
        np.testing.assert_allclose(theta, 0.36, rtol=1e-12)
        np.testing.assert_allclose(actual["model"]["theta"], -2.64, rtol=1e-12)
        # i = σ(b): ∂i/∂b = i(1 − i).
        np.testing.assert_allclose(actual["hyper"]["input_bias"] / (0.1 * 0.9), -9.504, rtol=1e-12)


@pytest.mark.parametrize("hidden", [pytest.param(20, marks=pytest.mark.nightly), None])
def test_constant_gates_on_one_number_match_closed_form_in_second_order(hidden):
    task = number_task()
    learner = jm.lstm_meta_learner(NUMBER, inner_steps=2, order="second", hidden=hidden, loss=half_square)
    params = with_constant_gates(init(learner, task), 1.0, 0.1)
    np.testing.assert_allclose(gradient(learner, params, task)["model"]["theta"], -1.6896, rtol=1e-12)


def perturbed(params):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape), params)


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize(
    ("hidden", "feedback", "memory"),
    [
        (3, "gate", "store"),
        (3, "gate", "recompute"),
        (3, "pre_gate", "store"),
        (3, "pre_gate", "recompute"),
        (None, "gate", "store"),
        (None, "gate", "recompute"),
    ],
)
def test_lstm_gradient_matches_finite_differences_with_gradients_and_losses_held_fixed(
    hidden, feedback, memory
):
    task = make_task()
    learner = jm.lstm_meta_learner(
        network(norm=False), inner_steps=2, hidden=hidden, feedback=feedback, memory=memory
    )
    params = perturbed(init(learner))
    cell = jm.nn.GatedUpdate(hidden, feedback)
    value_and_grad = plain_loss(norm=False)

    def by_hand(params, value_and_grad_at):
        theta, restore = ravel_pytree(params["model"])
        state, used = cell.initial(theta.size, theta.dtype), []
        for step in range(2):
            used.append(value_and_grad_at(step, restore(theta)))
            value, grads = used[-1]
            state, change = cell.apply(
                {"params": params["hyper"]}, state, ravel_pytree(grads)[0], value, theta
            )
            theta = theta + change
        return value_and_grad(restore(theta), task.query)[0], used

    value, recorded = jax.jit(
        lambda params: by_hand(params, lambda step, weights: value_and_grad(weights, task.support))
    )(params)
    np.testing.assert_allclose(loss(learner, params, task)[0], value, rtol=1e-12)
    expected = finite_differences(lambda params: by_hand(params, lambda step, _: recorded[step])[0], params)
    np.testing.assert_allclose(flat(gradient(learner, params, task)), expected, atol=1e-8)


@pytest.mark.nightly
def test_second_order_lstm_gradient_matches_plain_finite_differences():
    task, learner, first = make_task(), lstm(3, "second"), lstm(3)
    params = perturbed(init(learner))
    expected = finite_differences(lambda params: learner.loss(params, task, KEY)[0], params)
    np.testing.assert_allclose(flat(gradient(learner, params, task)), expected, atol=2e-7)
    assert max_difference(gradient(first, params, task), gradient(learner, params, task)) > 1e-3


def test_cell_has_the_published_size_and_the_network_starts_as_in_maml():
    learner = jm.lstm_meta_learner(network())
    params = init(learner)
    assert sum(leaf.size for leaf in jax.tree.leaves(params["hyper"])) == 2046
    assert_trees_close(params["model"], init(jm.maml(network()))["model"], rtol=0)


def test_gradient_scale_multiplies_the_gradient_before_the_cell():
    """The scale 1/B of the official code equals a loss gradient divided by B."""
    task = number_task()
    settings = {"inner_steps": 2, "hidden": None, "loss": half_square}
    scaled = jm.lstm_meta_learner(NUMBER, gradient_scale=0.2, **settings)
    params = with_constant_gates(init(scaled, task), 1.0, 0.5)
    plain = jm.lstm_meta_learner(NUMBER, **settings)
    slower = with_constant_gates(params, 1.0, 0.1)
    assert_trees_close(adapt(scaled, params, task), adapt(plain, slower, task), atol=1e-13)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_steps": 0}, "inner_steps: got 0; it must be at least 1"),
        ({"hidden": 0}, "hidden: got .*; it must be at least 1"),
        ({"feedback": "both"}, "feedback: got 'both'; it must be one of"),
        ({"order": "implicit"}, "order: got 'implicit'; it must be one of 'second', 'first'"),
    ],
)
def test_lstm_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        jm.lstm_meta_learner(network(), **settings)


# --- Learned optimizer ------------------------------------------------------------------------------

# f(θ) = θ², from θ = 1.
SQUARE = jm.Model(lambda key, x: jnp.ones(()), lambda params, x: jnp.full((x.shape[0], 1), params))
SQUARE_TASK = jm.Task(*(jm.Batch(jnp.zeros((1, 1)), jnp.zeros((1, 1))) for _ in range(2)))


class LearnedOptimizer:
    """A learned optimizer as a learner, as an unroll, and as an optax transformation."""

    def __init__(self, model, **settings):
        self.init, self.adapt, self.predict, self.loss = jm.learned_optimizer(model, **settings)[:4]
        self.unroll = jm.learned_optimizer_unroll(model, **settings)
        names = ("layers", "preprocess", "scale", "zero_output")
        network_settings = {name: settings[name] for name in names if name in settings}
        self.as_optax = functools.partial(jm.learned_optimizer_as_optax, **network_settings)


def linear_optimizer(steps=20, truncation=5):
    """Build the optimizer δ = w·g + b, from w = b = 0."""
    return LearnedOptimizer(
        SQUARE,
        inner_steps=steps,
        truncation=truncation,
        layers=(),
        preprocess=None,
        scale=1.0,
        zero_output=True,
        loss=jm.losses.mse,
    )


@functools.cache
def unroll_program(unroll):
    return jax.jit(unroll)


def unroll(learner, params, task, carry, key=KEY):
    """Run one unroll, as a jitted program that is compiled once for a learner."""
    return unroll_program(learner.unroll)(params, task, carry, key)


def test_without_updates_an_unroll_of_u_steps_is_u_plus_one_times_the_loss():
    learner = linear_optimizer()
    params = init(learner, SQUARE_TASK)
    value, carry = unroll(learner, params, SQUARE_TASK, None)
    np.testing.assert_allclose(value, 6.0)
    np.testing.assert_allclose(loss(learner, params, SQUARE_TASK)[0], 4 * 6.0)
    np.testing.assert_allclose(carry.weights, 1.0)
    recurrent = learned(zero_output=True)
    value, carry = unroll(recurrent, init(recurrent), make_task(), None)
    np.testing.assert_allclose(value, 4 * plain_loss(norm=False)(carry.weights, make_task().support)[0])


def test_linear_optimizer_reproduces_the_numbers_of_the_official_test():
    """∂L/∂w = 60 and ∂L/∂b = 30; after one Adam step of 0.01, five more steps from 1 end at 0.8558811952."""
    learner = linear_optimizer()
    params = init(learner, SQUARE_TASK)
    grads = jax.jit(jax.grad(lambda params: learner.unroll(params, SQUARE_TASK, None, KEY)[0]))(params)
    grads = grads["optimizer"]
    # ∂θ_t/∂w = −Σ g = 2t (g = 2 at θ = 1, δ = w·g), so that ∂L/∂w = 2·Σ_{t ≤ 5} 2t = 60.
    np.testing.assert_allclose((grads["kernel"].item(), grads["bias"].item()), (60, 30), rtol=1e-12)
    adam = optax.adam(0.01)
    updates, _ = adam.update(grads, adam.init(params["optimizer"]))
    params = {"optimizer": optax.apply_updates(params["optimizer"], updates)}
    np.testing.assert_allclose(flat(params), -0.01, rtol=1e-6)
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.01), params)
    optimizer = learner.as_optax(params)
    theta, state, path = jnp.ones(()), optimizer.init(jnp.ones(())), []
    for _ in range(5):
        updates, state = optimizer.update(2 * theta, state)
        theta = theta + updates
        path.append(theta)
    np.testing.assert_allclose(path, [0.97, 0.9406, 0.911788, 0.883552, 0.855881], atol=5e-7)
    np.testing.assert_allclose(theta, 0.8558811952, atol=5e-11)
    _, carry = unroll(learner, params, SQUARE_TASK, None)
    np.testing.assert_allclose(carry.weights, 0.8558811952, atol=5e-11)
    np.testing.assert_allclose(theta**2, 0.7325326203, atol=1e-10)


@pytest.mark.nightly
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


@functools.cache
def learned(net_norm=False, **settings):
    return LearnedOptimizer(
        precise_network(norm=net_norm),
        **{"inner_steps": 6, "truncation": 3, "layers": (3,), "memory": "store", **settings},
    )


def start_of(learner, params, task):
    """Return the initial weights of the run: with parameters of zero, no step updates them."""
    zero = jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape)), params)
    return unroll(learner, zero, task, None)[1].weights


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize(
    ("order", "memory", "norm"),
    [
        ("first", "recompute", False),
        ("second", "store", False),
        *((order, memory, True) for order in ("first", "second") for memory in ("store", "recompute")),
    ],
)
def test_unroll_gradient_matches_finite_differences_with_stopped_gradients_held_fixed(order, memory, norm):
    task = make_task()
    learner = learned(net_norm=norm, order=order, memory=memory, scale=0.3)
    params = perturbed(init(learner))
    _, carry = unroll(learner, params, task, None)
    net = jm.nn.ProposedUpdate((3,), 10.0, 0.3)

    def by_hand(params, gradient_at):
        """Run the second unroll from the carry of the first; also return the gradients that it used."""
        (theta, restore), state, total, used = ravel_pytree(carry.weights), carry.state, 0.0, []
        for step in range(3):
            value, slope = plain_loss(norm)(restore(theta), task.support)
            total += value
            used.append(gradient_at(step, slope))
            state, change = net.apply({"params": params["optimizer"]}, state, ravel_pytree(used[-1])[0])
            theta = theta + change
        return total + plain_loss(norm)(restore(theta), task.support)[0], used

    def exact(step, slope):
        return slope

    value, recorded = jax.jit(lambda params: by_hand(params, exact))(params)
    held = (lambda step, slope: recorded[step]) if order == "first" else exact
    expected = finite_differences(lambda params: by_hand(params, held)[0], params)
    actual, grads = jax.jit(jax.value_and_grad(lambda params: learner.unroll(params, task, carry, KEY)[0]))(
        params
    )
    np.testing.assert_allclose(actual, value, rtol=1e-12)
    np.testing.assert_allclose(flat(grads), expected, atol=1e-6, rtol=1e-6)
    assert np.abs(expected).max() > 0.01


@functools.cache
def run_of_two_unrolls():
    """Return the losses of two unrolls, their gradients in both parameters, and the carry in between."""
    task, learner = make_task(), learned()

    def losses(*params):
        first, carry = learner.unroll(params[0], task, None, KEY)
        second, _ = learner.unroll(params[1], task, carry, KEY)
        return (first, second), carry

    @jax.jit
    def run(params):
        values, pullback, carry = jax.vjp(losses, params, params, has_aux=True)
        one, zero = jnp.ones_like(values[0]), jnp.zeros_like(values[0])
        return values, (pullback((one, zero)), pullback((zero, one))), carry

    return run(init(learner))


def test_gradient_of_an_unroll_stops_at_its_start():
    _, (_, (before, _)), _ = run_of_two_unrolls()
    assert_trees_close(before, jax.tree.map(np.zeros_like, before), rtol=0)


@pytest.mark.nightly
def test_gradient_of_an_unroll_in_a_run_equals_that_from_its_carry():
    task, learner = make_task(), learned()
    _, (_, (_, in_run)), carry = run_of_two_unrolls()
    alone = jax.jit(jax.grad(lambda params: learner.unroll(params, task, carry, KEY)[0]))(init(learner))
    assert_trees_close(in_run, alone, atol=1e-14)


def test_last_loss_of_an_unroll_and_first_of_the_next_share_their_key():
    """Without updates, f differs between steps only by its key."""

    def apply(params, x, *, key=None):
        noise = 0.0 if key is None else jax.random.normal(key)
        return jnp.zeros((x.shape[0], 1)) + noise + 0 * params["w"]

    model = jm.Model(lambda key, x: {"w": jnp.zeros(())}, apply, stochastic=True)
    learner = LearnedOptimizer(model, inner_steps=4, truncation=2, zero_output=True, loss=jm.losses.mse)
    task = jm.Task(*(jm.Batch(jnp.zeros((3, 2)), jnp.zeros((3, 1))) for _ in range(2)))
    params = init(learner, task)
    keys = jax.vmap(lambda step: jax.random.fold_in(KEY, step))(np.arange(5))
    points = np.square(jax.vmap(jax.random.normal)(keys))
    carry = None
    for first in (0, 2):
        value, carry = unroll(learner, params, task, carry)
        np.testing.assert_allclose(value, sum(points[first : first + 3]), rtol=1e-6)


@pytest.mark.nightly
def test_the_loss_is_the_sum_of_its_unrolls():
    task, learner = make_task(), learned()
    params = init(learner)
    values, ((first, _), (_, second)), _ = run_of_two_unrolls()
    np.testing.assert_allclose(loss(learner, params, task)[0], sum(values), rtol=1e-12)
    assert_trees_close(gradient(learner, params, task), jax.tree.map(np.add, first, second), atol=1e-12)


@pytest.mark.nightly
@pytest.mark.parametrize("inner_batch", [None, 2])
def test_unrolls_adapt_and_a_plain_optax_loop_end_at_the_same_weights(inner_batch):
    """A run in two unrolls, a plain optax loop and `adapt` end at the same weights."""
    task, learner = make_task(), learned(inner_batch=inner_batch)
    params = init(learner)
    carry = None
    for _ in range(2):
        _, carry = unroll(learner, params, task, carry)
    adapted = adapt(learner, params, task)
    assert_trees_close(adapted["model"], carry.weights, atol=1e-12)
    assert int(carry.step) == 6
    if inner_batch is not None:
        return
    optimizer = learner.as_optax(params)
    weights = start_of(learner, params, task)
    state, update = optimizer.init(weights), jax.jit(optimizer.update)
    for _ in range(6):
        updates, state = update(plain_loss(norm=False)(weights, task.support)[1], state, weights)
        weights = optax.apply_updates(weights, updates)
    assert_trees_close(adapted["model"], weights, atol=1e-12)


def test_as_optax_accepts_trees_of_any_shapes_and_dtypes():
    learner = learned()
    params = init(learner)
    optimizer = optax.chain(optax.clip(1.0), learner.as_optax(params))
    tree = {"a": jnp.ones((2, 3), jnp.float32), "b": [jnp.ones(4, jnp.bfloat16), jnp.ones(())]}
    update = jax.jit(optimizer.update)
    updates, state = update(tree, optimizer.init(tree), tree)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), updates) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), tree
    )
    # Equal gradients give equal updates in every leaf.
    np.testing.assert_allclose(updates["a"], float(updates["b"][1]), rtol=1e-6)
    update(tree, state, tree)
    # It combines with optax's masks and chains like any transformation.
    masked = optax.masked(learner.as_optax(params), {"a": True, "b": False})
    kept, _ = masked.update(tree, masked.init(tree), tree)
    np.testing.assert_array_equal(kept["b"][1], 1.0)


def test_runs_of_different_keys_start_at_different_weights():
    learner = learned()
    params, task = init(learner), make_task()
    first, second = (unroll(learner, params, task, None, jax.random.key(seed))[1].weights for seed in (0, 1))
    assert max_difference(first, second) > 0.1


@pytest.mark.nightly
def test_eval_steps_may_exceed_inner_steps():
    params, task = init(learned()), make_task()
    longer = learned(eval_steps=12)
    assert max_difference(adapt(longer, params, task), adapt(learned(), params, task)) > 1e-4


@pytest.mark.nightly
def test_learned_parameters_work_for_a_wider_network():
    params, task = init(learned()), make_task()
    wide = functools.partial(jm.nn.MLP, out=WAYS, kernel_init=jax.nn.initializers.lecun_normal())
    wider = jm.learned_optimizer(wide(hidden=(9, 7)), inner_steps=3, truncation=3, layers=(3,))
    assert adapt(wider, params, task)["model"]["Dense_0"]["kernel"].shape == (DIM, 9)
    assert np.isfinite(jax.jit(wider.loss)(params, task, KEY)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_steps": 0}, "inner_steps: got 0; it must be at least 1"),
        ({"inner_steps": 7}, "inner_steps: got 7; it must be a multiple of truncation = 3"),
        ({"truncation": 0}, "truncation: got 0; it must be at least 1"),
        ({"eval_steps": 0}, "eval_steps: got 0; it must be at least 1"),
        ({"order": "implicit"}, "order: got 'implicit'; it must be one of 'second', 'first'"),
        ({"norm": "population"}, "norm: got 'population'; it must be one of 'batch', 'support'"),
    ],
)
def test_learned_optimizer_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        learned(**settings)


def test_integer_parameters_are_refused():
    learner = learned()
    optimizer = learner.as_optax(init(learner))
    with pytest.raises(ValueError, match=r"params: got integers in \['step'\]"):
        optimizer.init({"w": jnp.ones(3), "step": jnp.zeros((), jnp.int32)})
