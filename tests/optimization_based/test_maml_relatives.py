"""ANIL, BOIL, Meta-SGD, Reptile, implicit MAML and MAML++: closed forms, limits, finite differences."""

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
    descended,
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
)
from trees import max_difference

import jaxmeta as jm
from jaxmeta.optimization_based.maml_plus_plus import descend_by_step, multi_step_weights

pytestmark = pytest.mark.usefixtures("x64")

SGD = optax.sgd(0.5)
# Tests that do not need normalisation layers omit them, to trace and compile less.
BARE = network(norm=False)


@functools.cache
def maml(net=BARE, **settings):
    """Build MAML with three steps of size 0.5, cached by settings."""
    # "store", because the default "auto" would trace each inner step once more.
    return jm.maml(net, **{"inner_optimizer": SGD, "inner_steps": 3, "memory": "store", **settings})


def assert_gradient_matches_finite_differences(learner, params, task, step=None, atol=1e-8):
    actual = flat(gradient(learner, params, task, step))
    expected = finite_differences(lambda params: learner.loss(params, task, KEY, step)[0], params)
    np.testing.assert_allclose(actual, expected, atol=atol)
    assert np.abs(expected).max() > 0.01


def as_maml(params):
    return {"model": params["model"]}


# --- ANIL and BOIL ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("factory", "adapts_head"), [(jm.anil, True), (jm.boil, False)])
def test_either_head_or_body_adapts_and_the_other_is_unchanged(factory, adapts_head):
    learner, task = factory(network(norm=False), inner_optimizer=SGD, inner_steps=2), make_task()
    params = init(learner)
    adapted = adapt(learner, params, task)["model"]
    for layer, leaves in params["model"].items():
        if (layer == "head") == adapts_head:
            assert all(max_difference(adapted[layer][name], leaves[name]) > 1e-4 for name in leaves), layer
        else:
            assert_trees_close(adapted[layer], leaves, rtol=0)
    meta_gradient = gradient(learner, params, task)["model"]
    assert max_difference(meta_gradient, jax.tree.map(jnp.zeros_like, meta_gradient)) > 1e-3
    assert_gradient_matches_finite_differences(learner, params, task)


@pytest.mark.nightly
@pytest.mark.parametrize("order", ["second", "first"])
def test_anil_without_a_body_is_maml(order):
    model = jm.Model(
        lambda key, x: {"head": {"w": jnp.ones((DIM, WAYS))}},
        lambda params, x: jnp.tanh(x @ params["head"]["w"]),
    )
    task = make_task()
    anil, maml = (make(model, inner_optimizer=SGD, inner_steps=3, order=order) for make in (jm.anil, jm.maml))
    params = init(anil)
    assert_trees_close(adapt(anil, params, task), adapt(maml, params, task), rtol=0)
    assert_trees_close(gradient(anil, params, task), gradient(maml, params, task), rtol=0)
    with pytest.raises(ValueError, match="head: got 'head', which matches all of the network's leaves"):
        init(jm.boil(model))


def test_anil_with_step_size_zero_keeps_its_weights_and_has_the_query_gradient():
    learner, task = jm.anil(BARE, inner_optimizer=optax.sgd(0.0), inner_steps=2), make_task()
    params = init(learner)
    assert_trees_close(adapt(learner, params, task)["model"], params["model"], rtol=0)
    actual = gradient(learner, params, task)["model"]
    assert_trees_close(actual, plain_loss(norm=False)(params["model"], task.query)[1], atol=1e-12)


@pytest.mark.nightly
def test_one_first_order_step_of_anil_and_boil_together_matches_maml():
    """After one first-order step, each leaf's update equals that of one of the two."""
    task = make_task()
    make = [functools.partial(factory, BARE, inner_optimizer=SGD) for factory in (jm.anil, jm.boil, jm.maml)]
    params = init(make[2]())
    head, body, both = (adapt(factory(), params, task)["model"] for factory in make)
    assert_trees_close({**body, "head": head["head"]}, both, rtol=1e-12)


def test_the_head_may_be_a_module_inside_another_or_a_predicate():
    def init_params(key, x):
        layer = {"w": jnp.ones((x.shape[1], WAYS))}
        return {"net": {"out": dict(layer), "about": dict(layer)}}

    def apply(params, x):
        return x @ params["net"]["out"]["w"] + x @ params["net"]["about"]["w"]

    task = make_task()
    for head in ("net/out", "out", lambda path: path.endswith("/out/w")):
        learner = jm.anil((init_params, apply), head=head)
        params = init(learner)
        adapted = adapt(learner, params, task)["model"]["net"]
        assert max_difference(adapted["out"], params["model"]["net"]["out"]) > 1e-3
        assert_trees_close(adapted["about"], params["model"]["net"]["about"], rtol=0)
    # "out" must match a whole module name, not part of one.
    for make in (jm.anil, jm.boil):
        with pytest.raises(
            ValueError, match=r"head: got 'ou', which matches none .* \['net/about/w', 'net/out/w'\]"
        ):
            init(make((init_params, apply), head="ou"))


# --- Meta-SGD ---------------------------------------------------------------------------------------


def test_meta_sgd_of_one_number_matches_closed_form():
    """θ_1 = αa·s, ∂L^Q/∂θ = (1 − αa)(θ_1 − q) and ∂L^Q/∂α = −∇L^S·∇L^Q = −(−2)(−2.8)."""
    learner, task = jm.meta_sgd(NUMBER, inner_lr=0.1, loss=half_square), number_task()
    params = init(learner, task)
    np.testing.assert_allclose(adapt(learner, params, task)["model"]["theta"], 0.2, rtol=1e-7)
    params["hyper"]["theta"] = jnp.asarray(0.1)
    actual = gradient(learner, params, task)
    np.testing.assert_allclose(actual["model"]["theta"], -2.24, rtol=1e-12)
    np.testing.assert_allclose(actual["hyper"]["theta"], -5.6, rtol=1e-12)


@pytest.mark.nightly
@pytest.mark.parametrize("order", ["second", "first"])
def test_meta_sgd_with_equal_rates_is_maml(order):
    task = make_task()
    learner = jm.meta_sgd(BARE, inner_lr=0.5, inner_steps=3, order=order, memory="store")
    plain = maml(order=order)
    params = init(learner)
    start = as_maml(params)
    assert_trees_close(adapt(learner, params, task), adapt(plain, start, task), atol=1e-14)
    actual, expected = gradient(learner, params, task), gradient(plain, start, task)
    assert_trees_close(actual["model"], expected["model"], atol=1e-13)
    np.testing.assert_allclose(loss(learner, params, task)[0], loss(plain, start, task)[0], rtol=1e-13)


def test_meta_sgd_learns_every_rate():
    learner, task = jm.meta_sgd(BARE, inner_lr=(0.2, 0.6), inner_steps=2, memory="store"), make_task()
    params = init(learner)
    rates = ravel_pytree(params["hyper"])[0]
    assert rates.size == ravel_pytree(params["model"])[0].size
    assert 0.2 <= rates.min() < 0.3 < 0.5 < rates.max() <= 0.6
    assert np.unique(rates).size == rates.size
    assert_gradient_matches_finite_differences(learner, params, task)


@pytest.mark.nightly
def test_one_step_of_meta_sgd_has_minus_the_product_of_gradients_as_gradient_of_the_rates():
    """∂L^Q/∂α = −∇L^S(θ) ⊙ ∇L^Q(θ')."""
    single, task = jm.meta_sgd(BARE, inner_lr=(0.2, 0.6)), make_task()
    params = init(single)
    slopes = plain_loss(norm=False)
    adapted = adapt(single, params, task)["model"]
    inner, outer = slopes(params["model"], task.support)[1], slopes(adapted, task.query)[1]
    expected = jax.tree.map(lambda s, q: -s * q, inner, outer)
    assert_trees_close(gradient(single, params, task)["hyper"], expected, atol=1e-12)


def test_meta_sgd_has_rates_for_adapted_leaves_only():
    learner = jm.meta_sgd(BARE, adapts=lambda path: path.startswith("head/"))
    params = init(learner)
    assert [leaf.shape for leaf in jax.tree.leaves(params["hyper"])] == [(WAYS,), (5, WAYS)]
    adapt(learner, params, make_task())


def test_an_empty_range_of_rates_is_refused():
    with pytest.raises(ValueError, match=r"inner_lr: got the range \(0\.1, 0\.05\)"):
        jm.meta_sgd(network(), inner_lr=(0.1, 0.05))


# --- Implicit MAML ----------------------------------------------------------------------------------


def test_imaml_of_one_number_matches_closed_form():
    learner = jm.imaml(NUMBER, proximal=2.0, inner_steps=200, loss=half_square)
    task = number_task()
    params = init(learner, task)
    np.testing.assert_allclose(adapt(learner, params, task)["model"]["theta"], 0.5, rtol=1e-9)
    np.testing.assert_allclose(gradient(learner, params, task)["model"]["theta"], -1.25, rtol=1e-9)
    far = jm.imaml(NUMBER, proximal=1e9, inner_optimizer=optax.sgd(3e-10), inner_steps=99, loss=half_square)
    np.testing.assert_allclose(gradient(far, params, task)["model"]["theta"], -3.0, rtol=1e-7)


@pytest.mark.nightly
def test_imaml_at_its_minimum_has_the_gradient_of_unrolled_proximal_maml():
    smooth = jm.Model(
        lambda key, x: {"w": jnp.ones((DIM, WAYS)), "b": jnp.zeros(WAYS)},
        lambda params, x: jnp.tanh(x @ params["w"] + params["b"][None]),
    )
    task, settings = make_task(), {"inner_optimizer": SGD, "proximal": 0.5, "inner_steps": 500}
    learner = jm.imaml(smooth, cg_steps=DIM * WAYS + WAYS, **settings)
    params = init(learner)
    actual = gradient(learner, params, task)
    assert_trees_close(actual, gradient(jm.maml(smooth, **settings), params, task), atol=1e-9)
    assert_gradient_matches_finite_differences(learner, params, task)


def test_imaml_has_the_paper_settings_and_accepts_those_of_maml():
    learner, task = jm.imaml(network(), norm="support", adapts=lambda path: "head" in path), make_task()
    params = init(learner)
    fast = params["model"]
    for _ in range(16):
        grads = plain_loss()(fast, task.support)[1]
        fast = {
            **fast,
            "head": jax.tree.map(
                lambda w, g, s: w - 0.1 * (g + 2.0 * (w - s)),
                fast["head"],
                grads["head"],
                params["model"]["head"],
            ),
        }
    assert_trees_close(adapt(learner, params, task)["model"], fast, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proximal": 0.0}, "proximal"),
        ({"inner_steps": 0}, "inner_steps: got .*; it must be at least 1"),
    ],
)
def test_imaml_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        jm.imaml(network(), **settings)


# --- Reptile ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "direction"),
    [
        pytest.param(1, -0.2, marks=pytest.mark.nightly),
        (2, -0.36),
        pytest.param(3, -0.488, marks=pytest.mark.nightly),
        pytest.param(5, -0.67232, marks=pytest.mark.nightly),
    ],
)
def test_reptile_of_one_number_matches_closed_form(steps, direction):
    learner, task = (
        jm.reptile(NUMBER, inner_optimizer=optax.sgd(0.1), inner_steps=steps, loss=half_square),
        number_task(),
    )
    params = init(learner, task)
    value, metrics = loss(learner, params, task)
    np.testing.assert_allclose(gradient(learner, params, task)["model"]["theta"], direction, rtol=1e-12)
    np.testing.assert_allclose(value, direction**2 / 2, rtol=1e-12)
    np.testing.assert_allclose(metrics["loss"][0], (-direction - 3) ** 2 / 2, rtol=1e-12)


def test_one_step_of_reptile_is_the_support_gradient():
    learner, task = jm.reptile(BARE, inner_optimizer=SGD, inner_steps=1, inner_batch=None), make_task()
    params = init(learner)
    joint = plain_loss(norm=False)(params["model"], task.support)[1]
    actual = jax.tree.map(lambda g: g / 0.5, gradient(learner, params, task)["model"])
    assert_trees_close(actual, joint, atol=1e-12)


@pytest.mark.nightly
def test_reptile_gradient_is_start_minus_adapted_weights():
    learner, task = jm.reptile(BARE, inner_steps=4, eval_steps=4, inner_batch=4), make_task()
    params = init(learner)
    adapted = adapt(learner, params, task)["model"]
    expected = jax.tree.map(jnp.subtract, params["model"], adapted)
    assert_trees_close(gradient(learner, params, task)["model"], expected, atol=1e-14)
    # The loss is half the squared distance to the adapted weights, differentiated with these held fixed.
    distance = np.square(flat(expected)).sum() / 2
    np.testing.assert_allclose(loss(learner, params, task)[0], distance, rtol=1e-12)


@pytest.mark.nightly
def test_reptile_training_lowers_the_loss_after_adaptation_to_an_unseen_task():
    """All tasks share one rule, so what is learned from some of them helps on another."""

    def task_of_rule(seed):
        rng = np.random.default_rng(seed)
        labels = np.tile(np.arange(WAYS, dtype=np.int32), 4)
        x = 2 * np.eye(WAYS, DIM)[labels] + rng.normal(size=(labels.size, DIM))
        return jm.Task(
            *(
                jm.Batch(jnp.asarray(x[part]), jnp.asarray(labels[part]), ways=WAYS)
                for part in (slice(0, 6), slice(6, 12))
            )
        )

    learner = jm.reptile(
        network(), inner_optimizer=optax.sgd(0.1), inner_steps=3, eval_steps=3, inner_batch=4
    )
    tasks, unseen = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(task_of_rule, range(4))),
        task_of_rule(9),
    )

    def train_step(params, _):
        after = learner.loss(params, unseen, KEY)[1]["loss"][0]
        gradients = jax.vmap(jax.grad(lambda params, task: learner.loss(params, task, KEY)[0]), (None, 0))(
            params, tasks
        )
        return jax.tree.map(lambda p, g: p - g.mean(0), params, gradients), after

    _, losses = jax.jit(lambda params: jax.lax.scan(train_step, params, None, length=60))(init(learner))
    assert losses[-1] < 0.6 * losses[0], losses


@pytest.mark.parametrize(
    "make",
    [
        jm.maml,
        jm.fomaml,
        jm.anil,
        jm.boil,
        jm.meta_sgd,
        jm.imaml,
        jm.maml_plus_plus,
        jm.reptile,
        jm.lstm_meta_learner,
    ],
)
def test_fewer_than_one_training_step_is_refused(make):
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"inner_steps: got {steps}; it must be at least 1"):
            make(network(), inner_steps=steps)


# --- Mini-batches -----------------------------------------------------------------------------------


@functools.cache
def counting_learner(batch_size, steps):
    """Build a learner with one weight per example, whose loss gradient counts the examples in use."""
    model = jm.Model(
        lambda key, x: jnp.zeros(x.shape[1]), lambda params, x: (x * params[None]).sum(1, keepdims=True)
    )
    return jm.maml(
        model,
        inner_optimizer=optax.sgd(1.0),
        inner_steps=steps,
        inner_batch=batch_size,
        loss=lambda outputs, y, mask: jm.losses.masked_mean(outputs[:, 0], mask),
    )


def example_counts(batch_size, steps, task, key=KEY):
    """Return the weight of each support example over the inner steps."""
    count = task.support.y.shape[0]
    support = jm.Batch(jnp.asarray(np.eye(count)), jnp.asarray(np.zeros((count, 1))), mask=task.support.mask)
    start = {"model": jnp.asarray(np.zeros(count))}
    return -np.asarray(
        adapt(counting_learner(batch_size, steps), start, jm.Task(support, support), key)["model"]
    )


@pytest.mark.nightly
def test_mini_batches_cycle_through_all_examples():
    task = make_task()  # 6 support examples
    once = example_counts(2, 1, task)
    assert sorted(np.unique(once)) == [0, 0.5]
    np.testing.assert_allclose(example_counts(2, 3, task), 0.5)
    np.testing.assert_allclose(np.sort(example_counts(4, 2, task)), [0.25, 0.25, 0.25, 0.25, 0.5, 0.5])
    np.testing.assert_allclose(example_counts(10, 2, task), 2 / 6)
    assert max_difference(once, example_counts(2, 1, task, jax.random.key(1))) > 0


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("inner_batch", [8, 2, 5])
def test_mini_batches_contain_no_padding(inner_batch):
    task = make_task()
    positions = np.array([7, 0, 2, 3, 5, 8])  # of the real examples, out of order
    x, y, mask = np.full((9, DIM), np.nan), np.zeros(9, np.int32), np.zeros(9, bool)
    x[positions], y[positions], mask[positions] = task.support.x, task.support.y, True
    support = jm.Batch(jnp.asarray(x), jnp.asarray(y), mask=jnp.asarray(mask), ways=WAYS)
    counts = example_counts(inner_batch, 1, jm.Task(support, task.query))
    size = min(inner_batch, 6)
    assert sorted(counts[positions].round(9)) == sorted([0.0] * (6 - size) + [round(1 / size, 9)] * size)
    assert np.delete(counts, positions).sum() == 0
    learner = jm.reptile(network(), inner_batch=inner_batch, inner_steps=3)
    params = init(learner)
    assert all(
        np.isfinite(leaf).all()
        for leaf in jax.tree.leaves(gradient(learner, params, jm.Task(support, task.query)))
    )


# --- MAML++ -----------------------------------------------------------------------------------------


@functools.cache
def plain(**settings):
    """Build MAML++ with all changes switched off, except those in `settings`."""
    off = {"inner_lr": 0.5, "inner_steps": 3, "anneal_steps": 0, "per_step_norm": False, "memory": "store"}
    return jm.maml_plus_plus(BARE, **{**off, **settings})


def test_multi_step_weights_match_the_official_code():
    for progress, expected in (
        (0.0, [0.2] * 5),
        (1 / 3, [0.4 / 3] * 4 + [1.4 / 3]),
        (1.0, [0.006] * 4 + [0.976]),
    ):
        actual = multi_step_weights(5, progress)
        np.testing.assert_allclose(actual, expected, atol=1e-12)
    for steps in (1, 2, 5):
        for progress in np.linspace(0, 1, 7):
            np.testing.assert_allclose(multi_step_weights(steps, progress).sum(), 1, rtol=1e-12)


@pytest.mark.nightly
def test_maml_plus_plus_with_equal_rates_matches_maml():
    task, learner = make_task(), plain()
    params = init(learner)
    assert jax.tree.leaves(params["hyper"])[0].shape == (3,)
    assert_trees_close(adapt(learner, params, task), adapt(maml(), as_maml(params), task), atol=1e-14)
    actual = gradient(learner, params, task)
    assert_trees_close(actual["model"], gradient(maml(), as_maml(params), task)["model"], atol=1e-13)


def test_derivative_order_annealing_is_first_order_and_then_second():
    task, learner = make_task(), plain(first_order_steps=10)
    params = init(learner)
    first, second = (
        gradient(maml(order=order), as_maml(params), task)["model"] for order in ("first", "second")
    )
    assert max_difference(first, second) > 1e-3
    for step, expected in ((0, first), (9, first), (10, second), (None, second)):
        step = None if step is None else jnp.asarray(step, jnp.int32)
        assert_trees_close(gradient(learner, params, task, step)["model"], expected, atol=1e-13)


def test_the_multi_step_loss_weighs_the_query_loss_after_each_step():
    task, learner = make_task(), plain(anneal_steps=12)
    params = init(learner)
    after = [
        plain_loss(norm=False)(descended(params["model"], task.support, n, norm=False), task.query)[0]
        for n in (1, 2, 3)
    ]
    for step in (0, 4, 11, 12):
        value, metrics = loss(learner, params, task, jnp.asarray(step, jnp.int32))
        weights = np.asarray(multi_step_weights(3, step / 12)) if step < 12 else np.array([0, 0, 1.0])
        np.testing.assert_allclose(value, weights @ np.stack(after), rtol=1e-7)
        np.testing.assert_allclose(metrics["loss"][0], after[-1], rtol=1e-12)
    np.testing.assert_allclose(loss(learner, params, task)[0], after[-1], rtol=1e-12)


def test_each_step_has_separate_rates():
    rates, slopes = {"w": jnp.array([0.1, 0.2])}, np.arange(3.0)
    optimizer = descend_by_step(rates)
    state = optimizer.init({"w": jnp.zeros(3)})
    for step in range(2):
        updates, state = optimizer.update({"w": jnp.asarray(slopes)}, state)
        np.testing.assert_allclose(updates["w"], -(0.1, 0.2)[step] * slopes)


def hidden(weights, x):
    """Return the input of the network's normalisation."""
    return np.asarray(x) @ np.asarray(weights["Dense_0"]["kernel"]) + np.asarray(weights["Dense_0"]["bias"])


def perturbed(params, scale=0.1):
    """Perturb the parameters, so that all steps differ."""
    flat, restore = ravel_pytree(params)
    return restore(flat + scale * np.random.default_rng(5).normal(size=flat.size))


@pytest.mark.parametrize(
    ("norm", "step"),
    [
        pytest.param("batch", None, marks=pytest.mark.nightly),
        pytest.param("batch", 3, marks=pytest.mark.nightly),
        ("support", 3),
    ],
)
def test_maml_plus_plus_gradient_matches_finite_differences(norm, step):
    task = make_task()
    learner = jm.maml_plus_plus(
        network(), inner_lr=0.5, inner_steps=2, anneal_steps=12, norm=norm, memory="store"
    )
    params = perturbed(init(learner))
    step = None if step is None else jnp.asarray(step, jnp.int32)
    assert_gradient_matches_finite_differences(learner, params, task, step)
    # The layers and rates of every step have an effect.
    actual = gradient(learner, params, task, step)
    for path, leaf in jax.tree_util.tree_leaves_with_path((actual["per_step"], actual["hyper"])):
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("Dense_0/bias"):
            # The normalisation that follows cancels it: zero up to rounding.
            np.testing.assert_allclose(leaf, 0, atol=1e-12)
            continue
        assert np.abs(leaf).reshape(2, -1).max(1).min() > 0, path


def test_each_step_has_separate_normalisation_layers():
    task = make_task()
    learner = jm.maml_plus_plus(network(), inner_lr=0.5, inner_steps=2, anneal_steps=0)
    params = perturbed(init(learner))
    assert set(params["model"]["Dense_0"]) == {"kernel", "bias"}
    assert jax.tree.leaves(params["model"]["BatchNorm_0"]) == []
    assert [leaf.shape for leaf in jax.tree.leaves(params["per_step"])] == [(2, 5), (2, 5)]
    fast = {name: leaves for name, leaves in params["model"].items() if name != "BatchNorm_0"}
    rates = {name: params["hyper"][name] for name in fast}
    for step in range(2):
        layer = jax.tree.map(lambda leaf: leaf[step], params["per_step"]["BatchNorm_0"])  # noqa: B023
        grads = plain_loss()({**fast, "BatchNorm_0": layer}, task.support)[1]
        grads = {name: grads[name] for name in fast}
        fast = jax.tree.map(lambda w, g, r: w - r[step] * g, fast, grads, rates)  # noqa: B023
    adapted = adapt(learner, params, task)["model"]
    assert_trees_close(adapted, {**fast, "BatchNorm_0": layer}, atol=1e-12)
    # With fewer steps at test, the layers of the last of them normalise the queries.
    fewer = jm.maml_plus_plus(network(), inner_lr=0.5, inner_steps=2, eval_steps=1)
    layer = jax.tree.map(lambda leaf: leaf[0], params["per_step"]["BatchNorm_0"])
    assert_trees_close(adapt(fewer, params, task)["model"]["BatchNorm_0"], layer, rtol=0)


def test_each_step_has_separate_population_statistics():
    tasks = [make_task(seed) for seed in range(2)]
    make = functools.partial(jm.maml_plus_plus, network(), inner_lr=0.5, inner_steps=2, anneal_steps=0)
    learner, population = make(), make(norm="population")
    params = perturbed(init(learner))
    sums = [jax.jit(learner.statistics)(params, episode, KEY) for episode in tasks]
    filled = {
        **params,
        "population": jax.tree.map(
            lambda *s: sum(s) / sum(count for _, count in sums), *(s for s, _ in sums)
        ),
    }
    stats = filled["population"]["BatchNorm_0"]
    assert stats["mean"].shape == (2, 5)

    # Step 0: the support set before the first update, and the queries after it.
    after_one = make(eval_steps=1)
    seen = [
        hidden(params["model"], episode.support.x).mean(0)
        + hidden(adapt(after_one, params, episode)["model"], episode.query.x).mean(0)
        for episode in tasks
    ]
    np.testing.assert_allclose(stats["mean"][0], sum(seen) / 4, atol=1e-12)
    adapted = adapt(population, filled, tasks[0])
    np.testing.assert_allclose(adapted["stats"]["BatchNorm_0"]["mean"], stats["mean"][1], rtol=0)
    joint = jax.jit(population.predict)(filled, adapted, tasks[0].query.x)
    alone = jax.jit(jax.vmap(lambda x: population.predict(filled, adapted, x[None])[0]))(tasks[0].query.x)
    np.testing.assert_allclose(joint, alone, atol=1e-12)


@pytest.mark.nightly
def test_a_network_without_normalisation_has_no_per_step_layers():
    learner = jm.maml_plus_plus(network(norm=False), inner_steps=2)
    params = init(learner)
    assert jax.tree.leaves(params["per_step"]) == []
    assert gradient(learner, params, make_task(), jnp.asarray(0, jnp.int32))["hyper"]["head"][
        "bias"
    ].shape == (2,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_steps": 0}, "inner_steps: got 0; it must be at least 1"),
        ({"eval_steps": 6}, "eval_steps: got 6; there are learned step sizes for 1 to 5 steps"),
        ({"eval_steps": 0}, "eval_steps: got 0"),
        ({"anneal_steps": -1}, "anneal_steps: got .*; it must be at least 0"),
        ({"first_order_steps": -1}, "first_order_steps: got .*; it must be at least 0"),
        ({"norm": "episode"}, "norm: got 'episode'; it must be one of 'batch', 'support', 'population'"),
    ],
)
def test_maml_plus_plus_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        jm.maml_plus_plus(network(), **settings)


# --- Meta-learned hyperparameters of any inner optimizer --------------------------------------------


@pytest.mark.nightly
def test_maml_learns_the_hyperparameters_of_any_inner_optimizer():
    learner = jm.maml(
        BARE,
        inner_optimizer=lambda hyper: optax.adam(hyper["rate"], b1=hyper["decay"], eps_root=1e-4),
        hyper={"rate": 0.1, "decay": 0.5},
        inner_steps=2,
        memory="store",
    )
    params, task = init(learner), make_task()
    assert params["hyper"] == {"rate": 0.1, "decay": 0.5}
    assert_gradient_matches_finite_differences(learner, params, task, atol=5e-8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hyper": 0.1}, "hyper: got hyperparameters to learn, but inner_optimizer is a fixed"),
        ({"inner_optimizer": optax.sgd}, "inner_optimizer: .* with their initial values"),
        ({"inner_optimizer": optax.adam, "hyper": 0.1}, "eps_root"),
        (
            {"inner_optimizer": optax.sgd, "hyper": 0.1, "order": "implicit", "proximal": 1.0},
            'order: got "implicit"',
        ),
        ({"order": "implicit", "proximal": 1.0, "inner_batch": 2}, "inner_batch: got 2"),
        (
            {"order": "implicit", "proximal": 1.0, "eval_steps": 0},
            "eval_steps: got .*; it must be at least 1",
        ),
        ({"order": "implicit", "proximal": 1.0, "norm": "episode"}, 'norm: got "episode"'),
        ({"norm": "episode", "eval_steps": 0}, 'norm: got "episode", an average over inner steps'),
    ],
)
def test_settings_that_do_not_fit_the_optimizer_or_order_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        jm.maml(network(), **settings)


def test_an_optimizer_of_random_hyperparameters_with_an_infinite_derivative_is_refused():
    learner = jm.maml(network(), inner_optimizer=optax.adam, hyper=lambda key, fast: jnp.asarray(0.1))
    with pytest.raises(ValueError, match="eps_root"):
        learner.adapt(init(learner), make_task().support, KEY)


def test_per_step_statistics_ignore_padding():
    learner, task = jm.maml_plus_plus(network(), inner_steps=2, anneal_steps=0), make_task()
    params = init(learner)

    def padded(part):
        x = jnp.concatenate([part.x, jnp.full((2, DIM), jnp.nan)])
        mask = jnp.arange(len(x)) < len(part.x)
        return jm.Batch(x, jnp.concatenate([part.y, jnp.zeros(2, jnp.int32)]), mask=mask, ways=WAYS)

    statistics = jax.jit(learner.statistics)
    expected, _ = statistics(params, task, KEY)
    actual, _ = statistics(params, jm.Task(*map(padded, task)), KEY)
    assert_trees_close(actual, expected, atol=1e-12)


def test_episode_statistics_are_a_running_average_over_the_inner_steps():
    learner = maml(network(), norm="episode")
    params, task = init(learner), make_task()
    mean, var = np.zeros(5), np.ones(5)
    for n in range(3):
        seen = hidden(descended(params["model"], task.support, n), task.support.x)
        mean, var = 0.1 * mean + 0.9 * seen.mean(0), 0.1 * var + 0.9 * seen.var(0)
    actual = adapt(learner, params, task)["stats"]["BatchNorm_0"]
    np.testing.assert_allclose(actual["mean"], mean, atol=1e-12)
    np.testing.assert_allclose(actual["var"], var, atol=1e-12)
    assert_gradient_matches_finite_differences(learner, params, task)
