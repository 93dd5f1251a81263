"""`jm.maml` on networks of a few units, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close as assert_trees_close
from problems import (
    DIM,
    KEY,
    WAYS,
    adapt,
    descended,
    finite_differences,
    flat,
    gradient,
    init,
    loss,
    make_task,
    network,
    query_loss,
)
from trees import max_difference

import jaxmeta as jm

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def maml(**settings):
    """Build MAML with two steps of size 0.5 on the small network, cached by settings."""
    # "store", because the default "auto" would trace each inner step once more.
    return jm.maml(network(), **{"inner_lr": 0.5, "inner_steps": 2, "memory": "store", **settings})


def predict(learner, params, adapted, x):
    return jax.jit(learner.predict)(params, adapted, x)


def one_by_one(learner, params, adapted, x):
    """Predict each query separately."""
    return jax.jit(jax.vmap(lambda x: learner.predict(params, adapted, x[None])[0]))(x)


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize(("norm", "masked"), [("batch", True), ("batch", False), ("support", True)])
def test_meta_gradient_matches_finite_differences(norm, masked):
    learner = maml(norm=norm)
    params, task = init(learner), make_task()
    if masked:
        task = jm.Task(*(jm.Batch(p.x, p.y, mask=jnp.arange(p.y.size) % 4 != 1, ways=WAYS) for p in task))
    expected = finite_differences(lambda params: learner.loss(params, task, KEY)[0], params)
    np.testing.assert_allclose(flat(gradient(learner, params, task)), expected, atol=1e-8)
    assert np.abs(expected).max() > 0.01


@pytest.mark.parametrize("norm", [pytest.param("batch", marks=pytest.mark.nightly), "support"])
def test_first_order_is_the_query_gradient_at_the_adapted_weights(norm):
    learner, task = maml(norm=norm, order="first"), make_task()
    params = init(learner)
    adapted = adapt(learner, params, task)
    actual = gradient(learner, params, task)
    assert_trees_close(actual, {"model": query_loss(adapted["model"], task, norm)[1]}, atol=1e-12)
    assert max_difference(actual, gradient(maml(norm=norm), params, task)) > 1e-3


@pytest.mark.nightly
@pytest.mark.parametrize("norm", ["batch", "support"])
def test_fomaml_is_first_order_maml(norm):
    learner, task = maml(norm=norm, order="first"), make_task()
    params = init(learner)
    same = jm.fomaml(network(), inner_optimizer=optax.sgd(0.5), inner_steps=2, norm=norm)
    assert_trees_close(gradient(learner, params, task), gradient(same, params, task), rtol=0)


def test_adaptation_is_gradient_descent_on_the_support_loss():
    learner, task = maml(), make_task()
    params = init(learner)
    expected = descended(params["model"], task.support, 2)
    assert_trees_close(adapt(learner, params, task)["model"], expected, atol=1e-12)


@pytest.mark.parametrize("order", ["second", "first"])
def test_only_selected_leaves_adapt_and_the_others_have_a_meta_gradient(order):
    learner = maml(order=order, adapts=lambda path: path.startswith("head/"))
    params, task = init(learner), make_task()
    adapted = adapt(learner, params, task)["model"]
    for name, leaves in params["model"].items():
        if name == "head":
            assert all(max_difference(adapted[name][leaf], leaves[leaf]) > 1e-3 for leaf in leaves)
        else:
            assert_trees_close(adapted[name], leaves, rtol=0)
    body = gradient(learner, params, task)["model"]["Dense_0"]["kernel"]
    assert np.abs(body).max() > 1e-3


@pytest.mark.parametrize("patterns", ["head", ("head/kernel", "head/bias"), ("head/*",)])
def test_patterns_select_the_same_leaves_as_a_predicate(patterns):
    by_pattern, by_predicate = (
        maml(adapts=adapts) for adapts in (patterns, lambda path: path.startswith("head/"))
    )
    params, task = init(by_pattern), make_task()
    assert_trees_close(adapt(by_pattern, params, task), adapt(by_predicate, params, task), rtol=0)


def test_predicate_receives_the_paths_of_the_leaves():
    seen = set()
    learner = jm.maml(network(), adapts=lambda path: seen.add(path) or True)
    init(learner)
    assert seen == {
        "BatchNorm_0/bias", "BatchNorm_0/scale", "Dense_0/bias", "Dense_0/kernel", "head/bias", "head/kernel",
    }  # fmt: skip


@pytest.mark.nightly
def test_eval_steps_may_differ_from_inner_steps():
    learner, single, task = maml(inner_steps=1, eval_steps=3), maml(inner_steps=1), make_task()
    params = init(learner)
    adapted = adapt(learner, params, task)
    assert_trees_close(adapted, adapt(maml(inner_steps=3), params, task), rtol=1e-12)
    assert max_difference(adapted, adapt(single, params, task)) > 1e-3
    np.testing.assert_allclose(loss(learner, params, task)[0], loss(single, params, task)[0], rtol=1e-12)
    assert_trees_close(adapt(maml(eval_steps=0), params, task)["model"], params["model"], rtol=0)


def test_norm_modes_share_their_parameters():
    task, learners = make_task(), {norm: maml(norm=norm) for norm in ("batch", "support", "population")}
    params = init(learners["batch"])
    for norm in ("support", "population"):
        assert_trees_close(init(learners[norm]), params, rtol=0)
    batch, support = (
        predict(learners[norm], params, adapt(learners[norm], params, task), task.query.x)
        for norm in ("batch", "support")
    )
    assert max_difference(batch, support) > 1e-3


def hidden(weights, x):
    """Return the input of the network's normalisation."""
    return np.asarray(x) @ np.asarray(weights["Dense_0"]["kernel"]) + np.asarray(weights["Dense_0"]["bias"])


def test_support_mode_normalises_by_the_adapted_support():
    learner, task = maml(norm="support"), make_task()
    adapted = adapt(learner, init(learner), task)
    seen = hidden(adapted["model"], task.support.x)
    stats = adapted["stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], seen.mean(0), atol=1e-12)
    np.testing.assert_allclose(stats["var"], seen.var(0), atol=1e-12)


def test_the_loss_is_the_cross_entropy_of_predictions_by_the_adapted_support():
    learner, task = maml(norm="support"), make_task()
    params = init(learner)
    outputs = predict(learner, params, adapt(learner, params, task), task.query.x)
    expected = jm.losses.cross_entropy(outputs, task.query.y, task.query.mask)
    np.testing.assert_allclose(loss(learner, params, task)[0], expected, rtol=1e-12)


def test_population_mode_needs_calibration_and_then_is_inductive():
    learner = maml(norm="population")
    params, task = init(learner), make_task()
    with pytest.raises(ValueError, match=r"jm\.calibrate"):
        learner.adapt(params, task.support, KEY)
    # The tasks differ in one number; population moments are means over tasks, support sets and queries.
    kept = [make_task(seed) for seed in range(2)]
    sums = [jax.jit(learner.statistics)(params, t, KEY) for t in kept]
    population = jax.tree.map(lambda a, b: (a + b) / (sums[0][1] + sums[1][1]), sums[0][0], sums[1][0])
    filled = {**params, "population": population}
    seen = [hidden(params["model"], part.x) for t in kept for part in t]
    mean = np.mean([h.mean(0) for h in seen], 0)
    var = np.mean([np.square(h).mean(0) for h in seen], 0) - np.square(mean)
    adapted = adapt(learner, filled, task)
    np.testing.assert_allclose(adapted["stats"]["BatchNorm_0"]["mean"], mean, atol=1e-12)
    np.testing.assert_allclose(adapted["stats"]["BatchNorm_0"]["var"], var, atol=1e-12)
    # They normalise the inner loop too, so no parameter is cancelled by batch statistics.
    assert max_difference(adapted["model"], adapt(maml(), filled, task)["model"]) > 1e-3


@pytest.mark.parametrize(("norm", "leaks"), [("batch", True), ("support", False), ("population", False)])
def test_predictions_depend_on_other_queries_only_where_transductive(norm, leaks):
    learner, task = maml(norm=norm), make_task()
    params = init(learner)
    total, count = jax.jit(learner.statistics)(params, task, KEY)
    params["population"] = jax.tree.map(lambda leaf: leaf / count, total)
    adapted = adapt(learner, params, task)
    joint = predict(learner, params, adapted, task.query.x)
    alone = one_by_one(learner, params, adapted, task.query.x)
    if leaks:
        assert max_difference(joint, alone) > 1e-2
    else:
        np.testing.assert_allclose(joint, alone, atol=1e-12)


def test_first_and_second_order_agree_where_the_support_loss_is_linear():
    """The loss is linear in θ on support examples and quadratic on queries, by the target's second column."""

    def by_flag(outputs, y, mask):
        return (outputs[:, 0] * y[:, 0] + y[:, 1] * jnp.square(outputs[:, 1])).mean()

    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(6, DIM))), jnp.asarray(rng.normal(size=6))
    task = jm.Task(*(jm.Batch(x, jnp.stack([y, jnp.full(6, flag)], 1)) for flag in (0.0, 1.0)))
    start = {"w": jnp.ones((DIM, 2))}
    model = jm.Model(lambda key, x: start, lambda params, x: x @ params["w"])
    # The inner steps update both columns of w: each output depends on both.
    mixed = model._replace(apply=lambda params, x: x @ params["w"] @ jnp.array([[1.0, 1.0], [1.0, 2.0]]))
    for variant in (model, mixed):
        make = functools.partial(
            jm.maml, variant, inner_optimizer=optax.sgd(0.3), inner_steps=3, loss=by_flag
        )
        second, first = make(), make(order="first")
        params = {"model": start}
        actual = gradient(second, params, task)
        assert_trees_close(actual, gradient(first, params, task), rtol=1e-13)
        assert max_difference(actual, jax.tree.map(jnp.zeros_like, actual)) > 0.1


def test_regression_by_a_network_without_statistics():
    rng = np.random.default_rng(0)
    task = jm.Task(*(jm.Batch(jnp.asarray(rng.normal(size=(n, 1))), jnp.asarray(rng.normal(size=(n, 2))))
                   for n in (4, 6)))  # fmt: skip
    learner = jm.maml(
        network(out=2, norm=False), inner_optimizer=optax.sgd(0.1), inner_steps=3, loss=jm.losses.mse
    )
    params = init(learner, task)
    value, metrics = loss(learner, params, task)
    adapted = adapt(learner, params, task)
    outputs = predict(learner, params, adapted, task.query.x)
    np.testing.assert_allclose(value, np.square(outputs - task.query.y).mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["mse"][0] / metrics["mse"][1], value, rtol=1e-12)
    assert metrics["mse"][1] == 6
    plain = predict(learner, params, {"model": params["model"], "stats": None}, task.support.x)
    fitted = predict(learner, params, adapted, task.support.x)
    assert jm.losses.mse(fitted, task.support.y) < jm.losses.mse(plain, task.support.y)


def test_a_plain_model_without_batch_statistics_has_none_to_calibrate():
    model = jm.Model(lambda key, x: {"w": jnp.ones((DIM, WAYS))}, lambda params, x: x @ params["w"])
    learner = jm.maml(model, norm="support")
    assert learner.statistics is None
    params = init(learner)
    assert adapt(learner, params, make_task())["stats"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "layer"}, "norm: got 'layer'; it must be one of"),
        ({"order": "third"}, "order: got .*; it must be one of"),
        ({"memory": "none"}, "memory: got .*; it must be one of"),
        ({"inner_steps": -1}, "inner_steps: got -1; it must be at least 1"),
        ({"inner_batch": 0}, "inner_batch: got 0; it must be at least 1"),
        ({"inner_lr": -0.1}, "inner_lr: got -0.1; it must be at least 0"),
        ({"eval_steps": -2}, "eval_steps: got -2; it must be at least 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(settings, message):
    with pytest.raises(ValueError, match=message):
        jm.maml(network(), **settings)


@pytest.mark.parametrize(
    ("factory", "old", "new"),
    [
        (jm.maml, "steps", "inner_steps"),
        (jm.fomaml, "batch_size", "inner_batch"),
        (jm.maml_plus_plus, "rate", "inner_lr"),
        (jm.meta_sgd, "rates", "inner_lr"),
        (jm.learned_optimizer_unroll, "steps", "inner_steps"),
        (jm.fine_tuned_head, "steps", "eval_steps"),
        (jm.fine_tuned_head, "optimizer", "inner_optimizer"),
    ],
)
def test_a_former_argument_name_raises_with_the_current_name(factory, old, new):
    message = rf"{factory.__name__}\(\) has no argument '{old}'; it is called {new}$"
    with pytest.raises(TypeError, match=message):
        factory(network(), **{old: 1})


def test_an_unknown_argument_name_raises_with_the_allowed_names():
    with pytest.raises(
        TypeError, match=r"maml\(\) has no argument 'lr'; it takes inner_lr, inner_optimizer,"
    ):
        jm.maml(network(), lr=0.1)


def test_inner_optimizer_replaces_inner_lr():
    task = make_task()
    rate, other = maml(inner_lr=0.25), maml(inner_lr=9.0, inner_optimizer=optax.sgd(0.25))
    params = init(rate)
    assert_trees_close(adapt(other, params, task), adapt(rate, params, task), rtol=0)


def test_a_head_of_another_width_is_refused_at_init():
    with pytest.raises(ValueError, match=r"4 outputs and the tasks have 3 ways"):
        jm.maml(network(out=4)).init(KEY, make_task())


def test_adapting_nothing_is_refused_at_init():
    with pytest.raises(ValueError, match=r"matches no leaf.*head/kernel"):
        jm.maml(network(), adapts=lambda path: "haed" in path).init(KEY, make_task())
    with pytest.raises(ValueError, match=r"adapts: 'haed' matches nothing; the closest paths are head"):
        jm.maml(network(), adapts=["haed", "head"]).init(KEY, make_task())


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (lambda params, x: (x @ params["w"], None), "returns tuple"),
        (lambda params, x: (x @ params["w"])[None], r"returns shape \(1, 6, 3\) for 6 examples"),
        (lambda params, x: (x @ params["w"])[:, 0], r"returns shape \(6,\) .* must be \(6, 3\)"),
        (lambda params, x: (x @ params["w"])[:2], r"returns shape \(2, 3\)"),
    ],
)
def test_outputs_of_a_wrong_shape_are_refused_at_init(apply, message):
    with pytest.raises(ValueError, match=message):
        jm.maml((lambda key, x: {"w": jnp.ones((DIM, WAYS))}, apply)).init(KEY, make_task())


def test_each_inner_step_and_the_query_loss_use_separate_keys():
    def apply(params, x, key=None):
        return (x if key is None else x * jax.random.normal(key, x.shape)) @ params["w"]

    model = jm.Model(lambda key, x: {"w": jnp.ones((DIM, WAYS))}, apply, stochastic=True)
    learner, task = jm.maml(model, inner_optimizer=optax.sgd(0.5), inner_steps=2), make_task()
    params = init(learner)

    def drawn_loss(weights, batch, key):
        return jm.losses.cross_entropy(apply(weights, batch.x, key), batch.y)

    @jax.jit
    def by_hand(fast):
        for step in range(2):
            grads = jax.grad(drawn_loss)(fast, task.support, jax.random.fold_in(KEY, step))
            fast = {"w": fast["w"] - 0.5 * grads["w"]}
        return fast, drawn_loss(fast, task.query, jax.random.fold_in(KEY, 2)), apply(fast, task.query.x)

    fast, expected, outputs = by_hand(params["model"])
    adapted = adapt(learner, params, task)
    assert_trees_close(adapted, {"model": fast, "stats": None}, atol=1e-12)
    np.testing.assert_allclose(loss(learner, params, task)[0], expected, rtol=1e-12)
    np.testing.assert_allclose(predict(learner, params, adapted, task.query.x), outputs, rtol=1e-12)


def test_adapted_state_is_saved_and_loaded_without_a_template(tmp_path):
    learner = maml(norm="support")
    adapted = adapt(learner, init(learner), make_task())
    jm.save(tmp_path / "adapted", adapted)
    assert_trees_close(jm.load(tmp_path / "adapted"), adapted, rtol=0)
