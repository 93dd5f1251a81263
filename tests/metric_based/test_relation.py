"""Relation networks against PyTorch and explicit loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from vectors import KEY, batch, initial, loss, of_float64, outputs_of, predict, results

import jaxmeta as jm

WAYS = 3
SHAPE = (2, 2, 2)

# A relation module with one hidden layer and no batch statistics.
COMPARISON = (
    lambda key, pair: {
        "w": jax.random.normal(key, (pair[0].size, 5)) / 4,
        "v": jax.random.normal(jax.random.fold_in(key, 1), (5, 1)),
    },
    lambda params, pair: jnp.tanh(pair.reshape(pair.shape[0], -1) @ params["w"]) @ params["v"],
)
IDENTITY = (lambda key, x: {}, lambda params, x: x)


def maps_task(seed=0, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return jm.Task(
        batch(rng.normal(size=(6, *shape)), [2, 0, 1, 2, 0, 2]),
        batch(rng.normal(size=(5, *shape)), [0, 1, 2, 2, 0]),
    )


SIMPLE = jm.relation(IDENTITY, COMPARISON)


def head():
    return jax.jit(COMPARISON[0])(KEY, np.zeros((1, *SHAPE[:2], 2 * SHAPE[2])))


def scores(support, query, relation):
    """Return the scores of all queries and classes, one pair at a time: class map first, then query map."""
    x, y = np.asarray(support.x), np.asarray(support.y)
    score = jax.jit(COMPARISON[1])
    return np.array(
        [
            [
                np.asarray(score(relation, np.concatenate([x[y == c].sum(0), q], -1)[None]))[0, 0]
                for c in range(WAYS)
            ]
            for q in np.asarray(query.x)
        ]
    )


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def test_scores_compare_the_summed_maps_of_a_class_with_the_query(x64):
    support, query = maps_task()
    relation = of_float64(head())
    outputs = predict(SIMPLE, support, query.x, relation=relation)
    np.testing.assert_allclose(outputs, scores(support, query, relation), rtol=1e-9)
    probabilities = sigmoid(outputs)
    assert ((probabilities > 0) & (probabilities < 1)).all()
    assert np.abs(probabilities.sum(1) - 1).max() > 0.1


def test_the_loss_is_the_squared_error_to_one_and_to_zero(x64):
    support, query = maps_task()
    relation = of_float64(head())
    value, metrics = loss(SIMPLE, {"model": {}, "relation": relation}, maps_task())
    errors = sigmoid(scores(support, query, relation)) - np.eye(WAYS)[query.y]
    np.testing.assert_allclose(value, np.square(errors).mean(), rtol=1e-9)
    right = scores(support, query, relation).argmax(1) == np.asarray(query.y)
    assert metrics["accuracy"] == (right.sum(), 5)


def test_swapping_two_classes_swaps_two_columns():
    support, query = maps_task()
    outputs = predict(SIMPLE, support, query.x, relation=head())
    swap = np.array([2, 1, 0])
    swapped = predict(SIMPLE, batch(support.x, swap[support.y]), query.x, relation=head())
    np.testing.assert_allclose(swapped, outputs[:, swap], atol=1e-5)


class Maps(linen.Module):
    """An embedding with feature maps and batch statistics."""

    @linen.compact
    def __call__(self, x, mask=None):
        return jnp.tanh(jm.nn.BatchNorm()(linen.Dense(2)(x), mask))


class Scores(linen.Module):
    @linen.compact
    def __call__(self, x, mask=None):
        x = jnp.tanh(jm.nn.BatchNorm()(linen.Dense(4)(x), mask))
        return linen.Dense(1)(x.reshape(x.shape[0], -1))


@functools.cache
def small(norm="batch"):
    return jm.relation(Maps(), Scores(), norm=norm)


@functools.cache
def filled():
    """Return parameters of the small network, with the statistics of one task as population statistics."""
    params = of_float64(initial(small(), maps_task()), 0)
    total, count = jax.jit(small().statistics)(params, maps_task(), KEY)
    assert count == 1
    return {**params, "population": jax.tree.map(np.asarray, total)}


def test_a_class_is_the_sum_of_its_maps_under_population_statistics(x64):
    support, query = maps_task()
    params, learner = filled(), small("population")
    outputs = outputs_of(learner, params, support, query.x)

    @jax.jit
    def embedded(x):
        stats = jm.nn.norm.from_moments(params["population"])
        return jm.nn.as_model(Maps()).apply_norm(params["model"], x, stats=stats["model"])[0]

    z, y = np.asarray(embedded(support.x)), np.asarray(support.y)
    summed = np.stack([z[y == c].sum(0) for c in range(WAYS)])
    after = jm.relation(IDENTITY, Scores(), norm="population")
    known = {
        "model": {},
        "relation": params["relation"],
        "population": {**params["population"], "model": None},
    }
    actual = outputs_of(after, known, batch(summed, range(WAYS)), embedded(query.x))
    np.testing.assert_allclose(actual, outputs, rtol=1e-9)
    alone = outputs_of(learner, params, support, np.asarray(query.x)[2:3])
    np.testing.assert_allclose(alone, outputs[2:3], rtol=1e-9)


def test_statistics_cover_all_images_in_the_embedding_and_all_pairs_in_the_comparison(x64):
    support, query = maps_task()
    params = filled()
    total = params["population"]
    x, y = np.concatenate([support.x, query.x]), np.asarray(support.y)

    def check(actual, own, inputs):
        hidden = inputs @ np.asarray(own["kernel"]) + np.asarray(own["bias"])
        np.testing.assert_allclose(actual["mean"], hidden.mean((0, 1, 2)), atol=1e-10)
        np.testing.assert_allclose(actual["mean_of_squares"], np.square(hidden).mean((0, 1, 2)), atol=1e-10)

    check(total["model"]["BatchNorm_0"], params["model"]["Dense_0"], x)
    z = np.asarray(jax.jit(jm.nn.as_model(Maps()).apply)(params["model"], x))
    classes = np.stack([z[:6][y == c].sum(0) for c in range(WAYS)])
    pairs = np.stack([np.concatenate([v, q], -1) for q in z[6:] for v in classes])
    check(total["relation"]["BatchNorm_0"], params["relation"]["Dense_0"], pairs)


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("norm", ["batch", "population"])
def test_padding_and_absent_classes_change_nothing(norm, x64):
    support, query = maps_task()
    learner, params = small(norm), filled()

    def with_padding(part, at):
        x = np.insert(np.asarray(part.x), at, np.nan, axis=0)
        mask = np.insert(np.ones(part.y.size, bool), at, False)
        return batch(x, np.insert(np.asarray(part.y), at, 3), mask, WAYS + 2)

    ragged = jm.Task(with_padding(support, [0, 4]), with_padding(query, [2, 5]))

    @jax.jit
    def run(task):
        adapted = learner.adapt(params, task.support, KEY)
        outputs = learner.predict(params, adapted, task.query.x, task.query.mask)
        trained = {name: params[name] for name in ("model", "relation")}
        return outputs, jax.value_and_grad(lambda own: learner.loss(own, task, KEY)[0])(trained)

    outputs, (expected, known) = jax.device_get(run(maps_task()))
    actual, (value, grads) = jax.device_get(run(ragged))
    real = np.asarray(ragged.query.mask)
    np.testing.assert_allclose(actual[real][:, :WAYS], outputs, rtol=1e-8)
    assert (actual[real][:, WAYS:] == -np.inf).all()
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    for actual_leaf, expected_leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(known), strict=True):
        np.testing.assert_allclose(actual_leaf, expected_leaf, atol=1e-9)


@pytest.mark.parametrize(("size", "channels", "maps"), [(28, 1, 5), (84, 3, 19)])
def test_the_published_embedding_has_its_shapes(size, channels, maps):
    x = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    z, _ = jax.eval_shape(jm.nn.RelationEmbedding().init_with_output, KEY, x)
    assert z.shape == (2, maps, maps, 64)
    pair = jax.ShapeDtypeStruct((2, maps, maps, 128), jnp.float32)
    module = jm.nn.RelationModule(padding="SAME" if size == 28 else "VALID")
    scores, params = jax.eval_shape(module.init_with_output, KEY, pair)
    assert scores.shape == (2, 1)
    assert params["params"]["Dense_0"]["kernel"].shape == ({28: 64, 84: 3 * 3 * 64}[size], 8)


@pytest.mark.parametrize(("padding", "side"), [("SAME", 3), ("VALID", 9)])
def test_images_too_small_for_the_poolings_are_refused(padding, side):
    module = jm.nn.RelationModule(filters=2, padding=padding)
    with pytest.raises(ValueError, match=f"at least {side + 1}×{side + 1}"):
        jax.eval_shape(module.init, KEY, jnp.zeros((1, side, side + 2, 4)))
    jax.eval_shape(module.init, KEY, jnp.zeros((1, side + 1, side + 1, 4)))


def test_the_linear_layers_of_the_published_module_start_at_biases_of_one():
    params = jax.jit(jm.nn.RelationModule(filters=2).init)(KEY, jnp.zeros((1, 5, 5, 4)))["params"]
    for name in ("Dense_0", "Dense_1"):
        assert (params[name]["bias"] == 1).all()
        assert 0 < np.abs(params[name]["kernel"]).max() < 0.05


def test_outputs_and_loss_match_torch_on_the_same_weights(x64):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    F = torch.nn.functional
    task = maps_task(shape=(22, 23, 1))
    learner = jm.relation(jm.nn.RelationEmbedding(filters=3), jm.nn.RelationModule(filters=4))
    params = of_float64(initial(learner, task), 0)
    weights = jax.tree.map(lambda leaf: torch.tensor(np.array(leaf)), params)

    def block(own, x, padding, pool):
        x = F.conv2d(x, own["conv"]["kernel"].permute(3, 2, 0, 1), own["bias"], padding=padding)
        norm = own["norm"]
        x = F.relu(F.batch_norm(x, None, None, norm["scale"], norm["bias"], training=True, eps=1e-3))
        return F.max_pool2d(x, 2) if pool else x

    # As published, pooling follows the activation. All images form one batch, and all pairs another.
    x = torch.tensor(np.concatenate([part.x for part in task])).permute(0, 3, 1, 2)
    for i in range(4):
        x = block(weights["model"][f"ConvNorm_{i}"], x, 0 if i < 2 else 1, i < 2)
    y = torch.tensor(np.array(task.support.y))
    classes = torch.stack([x[:6][y == c].sum(0) for c in range(WAYS)])
    pairs = torch.cat([classes.repeat(5, 1, 1, 1), x[6:].repeat_interleave(WAYS, 0)], 1)
    for i in range(2):
        pairs = block(weights["relation"][f"ConvNorm_{i}"], pairs, 1, True)
    flat = pairs.permute(0, 2, 3, 1).flatten(1)
    first, last = (weights["relation"][f"Dense_{i}"] for i in range(2))
    expected = F.relu(flat @ first["kernel"] + first["bias"]) @ last["kernel"] + last["bias"]

    actual, value, _ = results(learner, params, task)
    np.testing.assert_allclose(actual, expected.numpy().reshape(5, WAYS), atol=1e-8)
    assert np.ptp(actual) > 1e-3
    one_hot = F.one_hot(torch.tensor(np.array(task.query.y), dtype=torch.long)).double()
    np.testing.assert_allclose(
        value, F.mse_loss(torch.sigmoid(expected.reshape(5, WAYS)), one_hot).item(), rtol=1e-8
    )


def test_embeddings_that_are_not_feature_maps_are_refused_at_init():
    flat = (IDENTITY[0], lambda params, x: x.reshape(x.shape[0], -1))
    with pytest.raises(ValueError, match=r"the model returns \(6, 8\) for 6 examples; .*feature maps"):
        jm.relation(flat, COMPARISON).init(KEY, maps_task())


def test_a_comparison_of_another_width_is_refused():
    wide = (COMPARISON[0], lambda params, pair: jnp.zeros((pair.shape[0], 2)))
    with pytest.raises(ValueError, match=r"comparison: gives shape \(15, 2\) for 15 pairs"):
        jm.relation(IDENTITY, wide).loss({"model": {}, "relation": head()}, maps_task(), KEY)


def test_norm_support_and_float_targets_are_refused():
    with pytest.raises(ValueError, match="norm: got 'support'; it must be one of 'batch', 'population'"):
        jm.relation(IDENTITY, norm="support")
    part = jm.Batch(jnp.ones((3, *SHAPE)), jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="integer class slots"):
        SIMPLE.loss({"model": {}, "relation": head()}, jm.Task(part, part), KEY)


def test_norm_population_needs_calibration():
    params = initial(small(), maps_task())
    with pytest.raises(ValueError, match=r"jm\.calibrate"):
        small("population").adapt(params, maps_task().support, KEY)
