"""`jm.maml` on networks of a few units, in float64."""

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
    WAYS,
    assert_trees_close,
    differ,
    finite_differences,
    gradient,
    init,
    network,
    task,
)

import jaxmeta as jm

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(("norm", "masked"), [("batch", False), ("batch", True), ("support", True)])
def test_meta_gradient_is_that_of_finite_differences(norm, masked):
    learner = jm.maml(network(), inner_optimizer=optax.sgd(0.5), steps=2, norm=norm)
    params, of = init(learner), task()
    if masked:
        of = jm.Task(*(jm.Batch(p.x, p.y, jnp.arange(p.y.size) % 4 != 1, WAYS) for p in of))
    expected = finite_differences(lambda params: learner.loss(params, of, KEY)[0], params)
    np.testing.assert_allclose(ravel_pytree(gradient(learner, params, of))[0], expected, atol=1e-8)
    assert np.abs(expected).max() > 0.01


@pytest.mark.parametrize("norm", ["batch", "support"])
def test_first_order_is_the_query_gradient_at_the_adapted_weights(norm):
    make = functools.partial(jm.maml, network(), inner_optimizer=optax.sgd(0.5), steps=2, norm=norm)
    learner, of = make(order="first"), task()
    params = init(learner)

    def query_loss(fast):
        # A step of size 0: what remains is the query loss at `fast`.
        still = jm.maml(network(), inner_optimizer=optax.sgd(0.0), order="first", norm=norm)
        return still.loss({"model": fast}, of, KEY)[0]

    adapted = learner.adapt(params, of.support, KEY)
    found = gradient(learner, params, of)
    assert_trees_close(found, {"model": jax.grad(query_loss)(adapted["model"])}, atol=1e-12)
    assert differ(found, gradient(make(), params, of)) > 1e-3
    same = jm.fomaml(network(), inner_optimizer=optax.sgd(0.5), steps=2, norm=norm)
    assert_trees_close(found, gradient(same, params, of), rtol=0)


def test_adaptation_is_gradient_descent_on_the_support_loss():
    learner, of = jm.maml(network(), inner_optimizer=optax.sgd(0.5), steps=2), task()
    params = init(learner)
    before = jax.tree.map(np.array, params)
    model = jm.nn.as_model(network())
    theta = params["model"]
    for _ in range(2):
        grads = jax.grad(lambda t: jm.losses.cross_entropy(model.apply(t, of.support.x), of.support.y))(theta)
        theta = jax.tree.map(lambda t, g: t - 0.5 * g, theta, grads)
    assert_trees_close(learner.adapt(params, of.support, KEY)["model"], theta, atol=1e-12)
    assert_trees_close(params, before, rtol=0)


@pytest.mark.parametrize("order", ["second", "first"])
def test_only_the_picked_leaves_adapt_and_the_others_still_learn(order):
    learner = jm.maml(
        network(),
        inner_optimizer=optax.sgd(0.5),
        steps=2,
        order=order,
        adapts=lambda path: path.startswith("head/"),
    )
    params, of = init(learner), task()
    adapted = learner.adapt(params, of.support, KEY)["model"]
    for name, leaves in params["model"].items():
        if name == "head":
            assert all(differ(adapted[name][leaf], leaves[leaf]) > 1e-3 for leaf in leaves)
        else:
            assert_trees_close(adapted[name], leaves, rtol=0)
    body = gradient(learner, params, of)["model"]["Dense_0"]["kernel"]
    assert np.abs(body).max() > 1e-3


def test_predicate_sees_the_paths_of_the_leaves():
    seen = set()
    learner = jm.maml(network(), adapts=lambda path: seen.add(path) or True)
    init(learner)
    assert seen == {
        "BatchNorm_0/bias", "BatchNorm_0/scale", "Dense_0/bias", "Dense_0/kernel", "head/bias", "head/kernel",
    }  # fmt: skip


def test_steps_at_test_may_differ_from_steps_at_training():
    make = functools.partial(jm.maml, network(), inner_optimizer=optax.sgd(0.5))
    learner, of = make(steps=1, eval_steps=3), task()
    params = init(learner)
    adapted = learner.adapt(params, of.support, KEY)
    assert_trees_close(adapted, make(steps=3).adapt(params, of.support, KEY), rtol=1e-12)
    assert differ(adapted, make(steps=1).adapt(params, of.support, KEY)) > 1e-3
    np.testing.assert_allclose(
        learner.loss(params, of, KEY)[0], make(steps=1).loss(params, of, KEY)[0], rtol=1e-12
    )


def test_norm_modes_share_their_parameters():
    of = task()
    batch, support, population = (
        jm.maml(network(), inner_optimizer=optax.sgd(0.5), norm=norm)
        for norm in ("batch", "support", "population")
    )
    params = init(batch)
    for other in (support, population):
        assert_trees_close(init(other), params, rtol=0)
    joint = {
        name: learner.predict(params, learner.adapt(params, of.support, KEY), of.query.x)
        for name, learner in (("batch", batch), ("support", support))
    }
    assert differ(joint["batch"], joint["support"]) > 1e-3


def test_support_mode_normalises_by_the_adapted_support():
    learner, of = jm.maml(network(), inner_optimizer=optax.sgd(0.5), norm="support"), task()
    params = init(learner)
    adapted = learner.adapt(params, of.support, KEY)
    hidden = of.support.x @ adapted["model"]["Dense_0"]["kernel"] + adapted["model"]["Dense_0"]["bias"][None]
    stats = adapted["stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], hidden.mean(0), atol=1e-12)
    np.testing.assert_allclose(stats["var"], hidden.var(0), atol=1e-12)


def test_population_mode_needs_calibration_and_then_is_inductive():
    learner = jm.maml(network(), inner_optimizer=optax.sgd(0.5), norm="population")
    params, of = init(learner), task()
    with pytest.raises(ValueError, match=r"jm\.calibrate"):
        learner.adapt(params, of.support, KEY)
    # Tasks that differ in one number: the population's moments are means over tasks and parts.
    kept = [task(seed) for seed in range(2)]
    sums = [learner.statistics(params, t, KEY) for t in kept]
    population = jax.tree.map(lambda a, b: (a + b) / (sums[0][1] + sums[1][1]), sums[0][0], sums[1][0])
    filled = {**params, "population": population}
    hidden = [
        p.x @ params["model"]["Dense_0"]["kernel"] + params["model"]["Dense_0"]["bias"][None]
        for t in kept
        for p in t
    ]
    mean = np.mean([h.mean(0) for h in hidden], 0)
    var = np.mean([np.square(h).mean(0) for h in hidden], 0) - np.square(mean)
    adapted = learner.adapt(filled, of.support, KEY)
    np.testing.assert_allclose(adapted["stats"]["BatchNorm_0"]["mean"], mean, atol=1e-12)
    np.testing.assert_allclose(adapted["stats"]["BatchNorm_0"]["var"], var, atol=1e-12)
    # The inner loop is normalised by them too, so no parameter of the net hides behind a batch.
    trained = jm.maml(network(), inner_optimizer=optax.sgd(0.5), norm="batch")
    assert differ(adapted["model"], trained.adapt(filled, of.support, KEY)["model"]) > 1e-3


@pytest.mark.parametrize(("norm", "leaks"), [("batch", True), ("support", False), ("population", False)])
def test_queries_one_at_a_time_detect_transduction(norm, leaks):
    learner, of = jm.maml(network(), inner_optimizer=optax.sgd(0.5), norm=norm), task()
    params = init(learner)
    total, count = learner.statistics(params, of, KEY)
    params["population"] = jax.tree.map(lambda leaf: leaf / count, total)
    adapted = learner.adapt(params, of.support, KEY)
    joint = learner.predict(params, adapted, of.query.x)
    alone = jax.vmap(lambda x: learner.predict(params, adapted, x[None])[0])(of.query.x)
    if leaks:
        assert differ(joint, alone) > 1e-2
    else:
        np.testing.assert_allclose(joint, alone, atol=1e-12)


def test_linear_support_loss_makes_maml_and_fomaml_one():
    """Linear in θ on the support, quadratic on the query: the target's second column says which."""

    def loss(outputs, y, mask):
        return (outputs[:, 0] * y[:, 0] + y[:, 1] * jnp.square(outputs[:, 1])).mean()

    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(6, DIM))), jnp.asarray(rng.normal(size=6))
    of = jm.Task(*(jm.Batch(x, jnp.stack([y, jnp.full(6, flag)], 1)) for flag in (0.0, 1.0)))
    model = jm.Model(lambda key, x: {"w": jnp.ones((DIM, 2))}, lambda params, x: x @ params["w"])
    # The inner steps reach both columns of w: each output is a product with both.
    mixed = model._replace(apply=lambda params, x: x @ params["w"] @ jnp.array([[1.0, 1.0], [1.0, 2.0]]))
    for each in (model, mixed):
        make = functools.partial(jm.maml, each, inner_optimizer=optax.sgd(0.3), steps=3, loss=loss)
        second, first = make(), make(order="first")
        params = init(second, of)
        found = gradient(second, params, of)
        assert_trees_close(found, gradient(first, params, of), rtol=1e-13)
        assert differ(found, jax.tree.map(jnp.zeros_like, found)) > 0.1


def test_regression_by_a_network_without_statistics():
    rng = np.random.default_rng(0)
    of = jm.Task(*(jm.Batch(jnp.asarray(rng.normal(size=(n, 1))), jnp.asarray(rng.normal(size=(n, 2))))
                   for n in (4, 6)))  # fmt: skip
    learner = jm.maml(network(out=2, norm=False), inner_optimizer=optax.sgd(0.1), steps=3, loss=jm.losses.mse)
    params = init(learner, of)
    value, metrics = learner.loss(params, of, KEY)
    outputs = learner.predict(params, learner.adapt(params, of.support, KEY), of.query.x)
    np.testing.assert_allclose(value, np.square(outputs - of.query.y).mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["mse"][0] / metrics["mse"][1], value, rtol=1e-12)
    assert metrics["mse"][1] == 6
    plain = jm.nn.as_model(network(2, False)).apply(params["model"], of.support.x)
    fitted = learner.predict(params, learner.adapt(params, of.support, KEY), of.support.x)
    assert jm.losses.mse(fitted, of.support.y) < jm.losses.mse(plain, of.support.y)


def test_a_plain_model_without_batch_statistics_has_none_to_calibrate():
    model = jm.Model(lambda key, x: {"w": jnp.ones((DIM, WAYS))}, lambda params, x: x @ params["w"])
    learner = jm.maml(model, norm="support")
    assert learner.statistics is None
    params = init(learner)
    assert learner.adapt(params, task().support, KEY)["stats"] is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"norm": "layer"}, "norm: got 'layer'; it must be one of"),
        ({"order": "third"}, "order: got .*; it must be one of"),
        ({"memory": "none"}, "memory: got .*; it must be one of"),
        ({"steps": -1}, "steps: got -1; it must be at least 1"),
        ({"eval_steps": -2}, "eval_steps: got -2; it must be at least 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(settings, says):
    with pytest.raises(ValueError, match=says):
        jm.maml(network(), **settings)


def test_a_head_of_another_width_is_refused_at_init():
    with pytest.raises(ValueError, match=r"4 outputs and the tasks have 3 ways"):
        jm.maml(network(out=4)).init(KEY, task())


def test_adapting_nothing_is_refused_at_init():
    with pytest.raises(ValueError, match=r"picks no leaf.*head/kernel"):
        jm.maml(network(), adapts=lambda path: "haed" in path).init(KEY, task())


@pytest.mark.parametrize(
    ("apply", "says"),
    [
        (lambda params, x: (x @ params["w"], None), "returns tuple"),
        (lambda params, x: (x @ params["w"])[None], r"returns shape \(1, 6, 3\) for 6 examples"),
        (lambda params, x: (x @ params["w"])[:, 0], r"returns shape \(6,\) .* must be \(6, 3\)"),
        (lambda params, x: (x @ params["w"])[:2], r"returns shape \(2, 3\)"),
    ],
)
def test_outputs_of_a_wrong_shape_are_refused_at_init(apply, says):
    with pytest.raises(ValueError, match=says):
        jm.maml((lambda key, x: {"w": jnp.ones((DIM, WAYS))}, apply)).init(KEY, task())


def test_each_inner_step_and_the_query_draw_with_keys_of_their_own():
    def apply(params, x, key=None):
        return (x if key is None else x * jax.random.normal(key, x.shape)) @ params["w"]

    model = jm.Model(lambda key, x: {"w": jnp.ones((DIM, WAYS))}, apply, stochastic=True)
    learner, of = jm.maml(model, inner_optimizer=optax.sgd(0.5), steps=2), task()
    params = init(learner)
    fast = params["model"]
    for step in range(2):
        key = jax.random.fold_in(KEY, step)
        grads = jax.grad(lambda p: jm.losses.cross_entropy(apply(p, of.support.x, key), of.support.y))(fast)  # noqa: B023
        fast = {"w": fast["w"] - 0.5 * grads["w"]}
    adapted = learner.adapt(params, of.support, KEY)
    assert_trees_close(adapted, {"model": fast, "stats": None}, atol=1e-12)
    outputs = apply(fast, of.query.x, jax.random.fold_in(KEY, 2))
    expected = jm.losses.cross_entropy(outputs, of.query.y)
    np.testing.assert_allclose(learner.loss(params, of, KEY)[0], expected, rtol=1e-12)
    np.testing.assert_allclose(
        learner.predict(params, adapted, of.query.x), apply(fast, of.query.x), rtol=1e-12
    )


def test_adapted_state_is_saved_and_loaded_without_a_template(tmp_path):
    learner, of = jm.maml(network(), norm="support"), task()
    params = init(learner)
    adapted = learner.adapt(params, of.support, KEY)
    jm.save(tmp_path / "adapted", adapted)
    assert_trees_close(jm.load(tmp_path / "adapted"), adapted, rtol=0)
