"""Tests of low-rank adaptation: initial outputs, rank of the change, and adaptation of the factors alone."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import jaxmeta as jm
from jaxmeta.nn.adapters import forward
from jaxmeta.paths import leaves_by_path

KEY = jax.random.key(0)
WAYS = 3


def dense(**settings):
    return jm.nn.MLP(WAYS, (5,), kernel_init=linen.initializers.lecun_normal(), **settings)


def plain_functions():
    """Return a network as a pair of functions, whose parameters are a list."""

    def init(key, x):
        return [jax.random.normal(key, (x.shape[1], WAYS)), jnp.ones(WAYS)]

    def apply(params, x):
        return x @ params[0] + params[1].reshape(1, -1)

    return init, apply


NETWORKS = {
    "dense": (dense, (4,)),
    "normalised": (lambda: dense(norm=True), (4,)),
    "convolutions": (lambda: jm.nn.Conv4(WAYS, filters=3), (16, 16, 1)),
    "equinox": (lambda: jm.nn.from_equinox(lambda key: eqx.nn.MLP(4, WAYS, 5, 1, key=key)), (4,)),
    "functions": (plain_functions, (4,)),
}


def inputs(shape, n=6):
    return jax.random.normal(jax.random.fold_in(KEY, 7), (n, *shape))


def with_random_factors(params, seed=1):
    """Return `params` with random factors instead of zeros."""
    leaves, structure = jax.tree.flatten(params["lora"])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    factors = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return {**params, "lora": structure.unflatten(factors)}


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_outputs_equal_those_of_the_network_bit_for_bit(name):
    build, shape = NETWORKS[name]
    network, x = build(), inputs(shape)
    plain, model = jm.nn.as_model(network), jm.nn.lora(network, rank=2)
    expected, params = jax.jit(plain.init)(KEY, x), jax.jit(model.init)(KEY, x)
    jax.tree.map(np.testing.assert_array_equal, params["network"], expected)
    mask = jnp.array([True] * 5 + [False]) if plain.apply_norm is not None else None
    outputs, stats = jax.jit(functools.partial(forward, model))(params, x, mask=mask)
    expected_outputs, expected_stats = jax.jit(functools.partial(forward, plain))(expected, x, mask=mask)
    np.testing.assert_array_equal(outputs, expected_outputs)
    if expected_stats is not None:
        jax.tree.map(np.testing.assert_array_equal, stats, {"network": expected_stats})
    assert (model.stochastic, model.divisible) == (plain.stochastic, plain.divisible)


def test_kernels_change_by_the_scaled_product_of_their_factors():
    x = inputs((4,))
    model = jm.nn.lora(jm.nn.MLP(WAYS, ()), rank=2, alpha=6.0)
    params = with_random_factors(model.init(KEY, x))
    kernel, a, b = (
        np.asarray(leaf, np.float64)
        for leaf in (
            params["network"]["head"]["kernel"],
            params["lora"]["head"]["kernel"]["a"],
            params["lora"]["head"]["kernel"]["b"],
        )
    )
    assert a.shape == (4, 2)
    assert b.shape == (2, WAYS)
    np.testing.assert_allclose(
        model.apply(params, x), np.asarray(x, np.float64) @ (kernel + 3.0 * a @ b), rtol=1e-5
    )


def identity(shape, name="kernel"):
    """Return a network whose outputs are its only kernel."""
    return lambda key, x: {"layer": {name: jnp.ones(shape)}}, lambda params, x: params["layer"][name]


@pytest.mark.parametrize(
    ("shape", "name", "sides"),
    [
        ((5, 7), "kernel", (5, 7)),
        ((3, 2, 4, 6), "kernel", (24, 6)),
        ((7, 5), "weight", (5, 7)),
        ((6, 4, 3, 2), "weight", (24, 6)),
    ],
)
def test_change_of_a_kernel_has_at_most_the_requested_rank(shape, name, sides):
    model = jm.nn.lora(identity(shape, name), rank=2)
    params = with_random_factors(model.init(KEY, jnp.zeros(())))
    factors = params["lora"]["layer"][name]
    assert (factors["a"].shape, factors["b"].shape) == ((sides[0], 2), (2, sides[1]))
    change = np.asarray(model.apply(params, jnp.zeros(())), np.float64) - 1
    matrix = change.reshape(shape[0], -1) if name == "weight" else change.reshape(-1, shape[-1])
    assert np.linalg.matrix_rank(matrix, tol=1e-4) == 2
    product = np.asarray(factors["a"], np.float64) @ np.asarray(factors["b"], np.float64)
    np.testing.assert_allclose(matrix, product.T if name == "weight" else product, atol=1e-5)


def test_first_factor_has_variance_one_over_fan_in_and_the_second_is_zero():
    params = jm.nn.lora(identity((3, 3, 100, 8)), rank=8).init(KEY, jnp.zeros(()))["lora"]["layer"]["kernel"]
    a = np.asarray(params["a"])
    # The sample variance of 7,200 draws has a relative standard error of sqrt(2 / 7200).
    np.testing.assert_allclose(a.var() * 900, 1, atol=4 * np.sqrt(2 / 7200))
    assert not params["b"].any()


def test_factors_of_two_kernels_of_one_shape_differ():
    params = jm.nn.lora(jm.nn.MLP(4, (4,))).init(KEY, jnp.zeros((1, 4)))["lora"]
    assert not np.allclose(params["Dense_0"]["kernel"]["a"], params["head"]["kernel"]["a"])


@pytest.mark.parametrize(
    ("network", "shape", "rank", "count"),
    [
        (jm.nn.MLP(5, (32,)), (8,), 4, 4 * (8 + 32) + 4 * (32 + 5)),
        # A side shorter than the rank limits the rank of the factors.
        (jm.nn.MLP(1, (40, 40)), (1,), 4, 1 * (1 + 40) + 4 * (40 + 40) + 1 * (40 + 1)),
        (jm.nn.StridedConv4(2, filters=6), (16, 16, 1), 1, (9 + 6) + 3 * (54 + 6) + (6 + 2)),
    ],
)
def test_number_of_adapted_parameters_follows_from_rank_and_shapes(network, shape, rank, count):
    params = jax.eval_shape(jm.nn.lora(network, rank=rank).init, KEY, jnp.zeros((2, *shape)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params["lora"])) == count


@pytest.mark.parametrize(
    ("where", "paths"),
    [
        ("head", ["head/kernel"]),
        (["**/Dense_0/kernel"], ["Dense_0/kernel"]),
        (["Dense_0", "head/*"], ["Dense_0/kernel", "head/kernel"]),
    ],
)
def test_patterns_pick_the_kernels_that_get_factors(where, paths):
    model = jm.nn.lora(dense(norm=True), where=where)
    factors = jax.eval_shape(model.init, KEY, jnp.zeros((2, 4)))["lora"]
    assert list(leaves_by_path(factors)) == [f"{path}/{side}" for path in paths for side in "ab"]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"where": "heads"}, "where"),
        ({"where": "**/bias"}, "where"),
    ],
)
def test_settings_that_give_no_factors_are_refused(settings, name):
    with pytest.raises(jm.ArgumentError) as caught:
        jm.nn.lora(dense(), **settings).init(KEY, jnp.zeros((2, 4)))
    assert caught.value.name == name


def test_given_statistics_normalise():
    network, x = dense(norm=True), inputs((4,))
    plain, model = jm.nn.as_model(network), jm.nn.lora(network)
    params = with_random_factors(model.init(KEY, x))
    _, stats = forward(model, params, x)
    outputs, same = forward(model, params, x[:2], stats=stats)
    jax.tree.map(np.testing.assert_array_equal, same, stats)
    merged = dict(params["network"])
    for layer, factors in params["lora"].items():
        change = factors["kernel"]["a"] @ factors["kernel"]["b"]
        merged[layer] = {**merged[layer], "kernel": merged[layer]["kernel"] + change}
    expected, _ = forward(plain, merged, x[:2], stats=forward(plain, merged, x)[1])
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


class Dropping(linen.Module):
    @linen.compact
    def __call__(self, x, deterministic: bool = True):
        return linen.Dense(WAYS)(linen.Dropout(0.5)(x, deterministic))


def test_dropout_of_the_network_is_active_only_with_a_key():
    model, x = jm.nn.lora(Dropping()), jnp.ones((4, 8))
    params = model.init(KEY, x)
    assert model.stochastic
    expected = Dropping().apply({"params": params["network"]}, x)
    np.testing.assert_allclose(model.apply(params, x), expected, rtol=1e-6)
    assert not np.allclose(model.apply(params, x), model.apply(params, x, key=KEY))


def test_factors_of_many_tasks_share_one_network():
    model, x = jm.nn.lora(dense(norm=True), rank=2), inputs((4,))
    params = [with_random_factors(model.init(KEY, x), seed) for seed in range(3)]
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(task_params["lora"] for task_params in params)
    )
    together = jax.vmap(model.apply, ({"network": None, "lora": 0}, None))(
        {"network": params[0]["network"], "lora": stacked}, x
    )
    for outputs, task_params in zip(together, params, strict=True):
        np.testing.assert_allclose(outputs, model.apply(task_params, x), rtol=1e-4, atol=1e-5)


def episode():
    x = inputs((4,), 2 * WAYS)
    batch = jm.Batch(x, jnp.tile(jnp.arange(WAYS), 2), ways=WAYS)
    return jm.Task(batch, batch)


def test_maml_adapts_the_factors_alone_and_meta_learns_all_parameters():
    task = episode()
    learner = jm.maml(jm.nn.lora(dense(norm=True), rank=2), inner_lr=0.5, inner_steps=2, adapts="lora")
    params = learner.init(KEY, task)
    adapted = jax.jit(learner.adapt)(params, task.support, KEY)["model"]
    jax.tree.map(np.testing.assert_array_equal, adapted["network"], params["model"]["network"])
    # The first step changes B, which was zero; A has a gradient only from the second step on.
    for before, after in zip(
        jax.tree.leaves(params["model"]["lora"]), jax.tree.leaves(adapted["lora"]), strict=True
    ):
        assert not np.array_equal(before, after)
    grads = jax.jit(jax.grad(lambda params: learner.loss(params, task, KEY)[0]))(params)["model"]
    for leaf in jax.tree.leaves((grads["network"]["head"], grads["lora"])):
        assert jnp.isfinite(leaf).all()
        assert leaf.any()


def test_first_inner_step_follows_the_gradient_in_the_kernel():
    # While B is zero, ∂L/∂B = Aᵀ ∂L/∂W and ∂L/∂A = 0.
    task = episode()
    learner = jm.maml(jm.nn.lora(jm.nn.MLP(WAYS, ()), rank=2), inner_lr=0.5, adapts="lora")
    params = learner.init(KEY, task)
    adapted = learner.adapt(params, task.support, KEY)["model"]["lora"]["head"]["kernel"]
    x, y = np.asarray(task.support.x, np.float64), np.eye(WAYS)[np.asarray(task.support.y)]
    head, a = params["model"]["network"]["head"], params["model"]["lora"]["head"]["kernel"]["a"]
    logits = x @ np.asarray(head["kernel"], np.float64) + np.asarray(head["bias"])
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gradient = x.T @ (softmax - y) / len(x)
    np.testing.assert_allclose(adapted["b"], -0.5 * np.asarray(a, np.float64).T @ gradient, atol=1e-6)
    np.testing.assert_array_equal(adapted["a"], a)


def test_anil_adapts_the_head_with_its_factors():
    task = episode()
    learner = jm.anil(jm.nn.lora(dense(), rank=2), inner_lr=0.5)
    params = learner.init(KEY, task)
    adapted = leaves_by_path(learner.adapt(params, task.support, KEY)["model"])
    before = leaves_by_path(params["model"])
    changed = {path for path in before if not np.array_equal(before[path], adapted[path])}
    assert changed == {"network/head/kernel", "network/head/bias", "lora/head/kernel/b"}


def test_layers_of_each_inner_step_are_found_by_their_statistics():
    learner = jm.maml_plus_plus(jm.nn.lora(dense(norm=True)), inner_steps=2)
    params = jax.eval_shape(learner.init, KEY, episode())
    assert list(leaves_by_path(params["per_step"])) == [
        "network/BatchNorm_0/bias",
        "network/BatchNorm_0/scale",
    ]


def test_fine_tuning_of_pretrained_parameters_trains_the_factors_alone():
    x = inputs((4,), 12)
    data = jm.Batch(x, (x[:, 0] > 0).astype(jnp.int32))
    body = jm.nn.MLP(None, (8,), norm=True)
    pretrained = jm.nn.as_model(body).init(jax.random.key(5), x)
    model = jm.transfer.classifier(jm.nn.lora(body, rank=2), 2)
    variables = model.init(KEY, x)
    variables["params"] = jm.transfer.swap_subtree(variables["params"], "body/network", pretrained)
    fitted = jm.transfer.fine_tune(
        model, variables, data, optimizer=optax.adam(0.05), steps=60, key=KEY, train=["body/lora", "head"]
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        (fitted.variables["params"]["body"]["network"], fitted.variables["batch_stats"]),
        (pretrained, variables["batch_stats"]),
    )
    assert fitted.losses[-1] < 0.5 * fitted.losses[0]


@pytest.mark.nightly
def test_one_meta_step_on_glyphs_changes_the_factors():
    tasks = jm.tasks.glyphs("train", ways=3, shots=1, queries=2, size=16)
    network = jm.nn.lora(jm.nn.Conv4(3, filters=8), rank=2)
    learner = jm.maml(network, adapts="lora", norm="support")
    before = jm.init_state(learner, optax.adam(1e-3), tasks, KEY).params["model"]
    state = jm.train(learner, tasks, optax.adam(1e-3), steps=1, key=KEY, meta_batch=2)
    after = state.params["model"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for old, new in zip(jax.tree.leaves(before["lora"]), jax.tree.leaves(after["lora"]), strict=True):
        assert jnp.isfinite(new).all()
        assert not np.array_equal(old, new)
    assert np.isfinite(jm.evaluate(learner, state.params, tasks, key=KEY, episodes=2).mean)


def test_factors_have_the_dtype_of_numpy_parameters():
    kernel = np.arange(8, dtype=np.float16).reshape(4, 2)
    model = jm.nn.lora((lambda key, x: {"w": kernel}, lambda params, x: x @ params["w"]), rank=1)
    x = jnp.ones((3, 4), jnp.float16)
    params = model.init(KEY, x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((params, model.apply(params, x)))} == {"float16"}
    np.testing.assert_array_equal(model.apply(params, x), np.ones((3, 4)) @ kernel)


def test_merged_factors_give_the_outputs_of_the_model():
    network = jm.nn.MLP(out=3, hidden=(8,), norm=True)
    model = jm.nn.lora(network, rank=2, alpha=6.0)
    x = jax.random.normal(jax.random.key(0), (5, 4))
    params = model.init(jax.random.key(1), x)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    expected = jm.nn.as_model(network).apply(jm.nn.merge_lora(params, scale=3.0), x)
    np.testing.assert_allclose(model.apply(params, x), expected, atol=1e-5)
