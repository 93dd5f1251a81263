"""Properties common to all methods that compare embeddings: batches, statistics, keys and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from vectors import (
    DIM,
    IDENTITY,
    KEY,
    WAYS,
    adapted,
    batch,
    gradient_check,
    initial,
    loss,
    of_float64,
    outputs_of,
    padded,
    results,
    softmax,
    unequal,
)

import jaxmeta as jm
from jaxmeta.core import episode_keys
from jaxmeta.metric_based.metric_learner import solve_positive, squared_distances

METHODS = {
    "prototypical": jm.prototypical,
    "kernel": functools.partial(
        jm.kernel_classifier, similarity="learned", reduce="mean", learn_scale=True, scale=2.0
    ),
    "matching": functools.partial(jm.matching, scale=3.0, learn_scale=True),
    "context": functools.partial(jm.matching, context_steps=2),
    "siamese": jm.siamese,
    "ridge": jm.ridge,
    "mahalanobis": jm.mahalanobis,
    "soft_kmeans": jm.soft_kmeans,
    "label_propagation": jm.label_propagation,
    "simple_shot": jm.simple_shot,
    "fine_tuned_head": functools.partial(jm.fine_tuned_head, eval_steps=3),
}
FEW = ["prototypical", "matching", "simple_shot"]
methods = pytest.mark.parametrize("method", METHODS)


# Methods whose prediction for a query depends on the other queries.
TRANSDUCTIVE = ("soft_kmeans", "label_propagation")


def rows(*default, without=()):
    """List all methods but `without` as rows, nightly unless named in `default`."""
    return [
        pytest.param(name, marks=() if name in default else pytest.mark.nightly, id=name)
        for name in METHODS
        if name not in without
    ]


pytestmark = pytest.mark.usefixtures("x64")


def network():
    return jm.nn.MLP(
        out=3, hidden=(5,), norm=True, activation=jnp.tanh, kernel_init=linen.initializers.lecun_normal()
    )


MODEL = jm.nn.as_model(network())
embed = jax.jit(MODEL.apply)


@functools.cache
def learner_of(method, **settings):
    """Build a learner, cached so that its functions are compiled once."""
    return METHODS[method](network(), **settings)


@functools.cache
def initialised(method):
    """Return random parameters of the right shapes, without `init`, which takes seconds to compile."""
    shapes = jax.eval_shape(learner_of(method).init, KEY, unequal())
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape) if leaf.ndim else 1.5), shapes
    )


def of_embedded(method, params, z, z_query, y):
    """Return the outputs of the method for vectors that are already embedded."""
    return outputs_of(METHODS[method](IDENTITY, norm="batch"), {**params, "model": {}}, batch(z, y), z_query)


def hidden(params, x):
    layer = jax.tree.map(np.asarray, params["Dense_0"])
    return np.asarray(x) @ layer["kernel"] + layer["bias"]


# In the default run, one method that uses embeddings as they are, and one that centres them.
@pytest.mark.parametrize("method", rows("prototypical", "simple_shot"))
def test_norm_batch_embeds_support_and_queries_as_one_batch(method):
    support, query = unequal()
    params = initialised(method)
    actual = outputs_of(learner_of(method), params, support, query.x)
    z = np.asarray(embed(params["model"], np.concatenate([support.x, query.x])))
    np.testing.assert_allclose(
        actual, of_embedded(method, params, z[:6], z[6:], support.y), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("method", FEW)
def test_norm_support_normalises_queries_by_the_support_statistics(method):
    support, query = task = unequal()
    params, learner = initialised(method), learner_of(method, norm="support")

    @jax.jit
    def embedded(params):
        z, stats = MODEL.apply_norm(params, support.x)
        return z, stats, MODEL.apply_norm(params, query.x, stats=stats)[0]

    z, stats, z_query = jax.device_get(embedded(params["model"]))
    np.testing.assert_allclose(
        stats["BatchNorm_0"]["mean"], hidden(params["model"], support.x).mean(0), atol=1e-12
    )
    actual, value, _ = results(learner, params, task)
    if method == "simple_shot":  # whose mean feature is one of the statistics
        z, z_query = z - z.mean(0), z_query - z.mean(0)
        expected = outputs_of(
            jm.simple_shot(IDENTITY, transform="l2n"), {**params, "model": {}}, batch(z, support.y), z_query
        )
    else:
        expected = of_embedded(method, params, z, z_query, support.y)
    np.testing.assert_allclose(actual, expected, rtol=1e-8)
    alone = outputs_of(learner, params, support, np.asarray(query.x)[2:3])
    np.testing.assert_allclose(alone, actual[2:3], rtol=1e-8)
    if method != "simple_shot":
        expected = -np.log(softmax(actual)[np.arange(5), query.y]).mean()
        np.testing.assert_allclose(value, expected, rtol=1e-8)


def source():
    """Return tasks that differ in mean and in scale."""

    def draw(scale, key):
        for_centre, for_x = jax.random.split(key)
        x = scale * (1 + jax.random.normal(for_centre, (1, DIM))) * jax.random.normal(for_x, (9, DIM)) + 1
        y = jnp.arange(9, dtype=jnp.int32) % WAYS
        return jm.Task(jm.Batch(x[:3], y[:3], ways=WAYS), jm.Batch(x[3:], y[3:], ways=WAYS))

    return jm.TaskDistribution(jax.tree_util.Partial(draw, jnp.asarray(2.0)), jm.ProtocolCard("toy", "train"))


def test_population_statistics_are_the_means_of_both_moments_over_tasks():
    params, tasks, count = initialised("prototypical"), source(), 5
    filled = jm.calibrate(learner_of("prototypical"), params, tasks, KEY, episodes=count)
    moments = []
    for task in map(jax.jit(tasks.sample), episode_keys(KEY, np.arange(count))[:, 0]):
        h = hidden(params["model"], np.concatenate([task.support.x, task.query.x]))
        moments.append((h.mean(0), np.square(h).mean(0)))
    first, second = (np.mean(parts, axis=0) for parts in zip(*moments, strict=True))
    population = filled["population"]["BatchNorm_0"]
    np.testing.assert_allclose(population["mean"], first, rtol=1e-8)
    np.testing.assert_allclose(population["mean_of_squares"], second, rtol=1e-8)

    state = adapted(learner_of("prototypical", norm="population"), filled, unequal().support)
    np.testing.assert_allclose(state["stats"]["BatchNorm_0"]["var"], second - first**2, rtol=1e-8)


@pytest.mark.parametrize("method", rows("prototypical", "simple_shot", without=TRANSDUCTIVE))
def test_norm_population_predicts_queries_independently_and_trains_like_batch(method):
    support, query = task = unequal()
    params = initialised(method)
    learner, batch_learner = learner_of(method, norm="population"), learner_of(method)
    with pytest.raises(ValueError, match=r'norm="population" needs .* jm\.calibrate'):
        learner.adapt(params, support, KEY)
    filled = jm.calibrate(learner, params, source(), KEY, episodes=2)
    joint, value, _ = results(learner, filled, task)
    alone = outputs_of(learner, filled, support, np.asarray(query.x)[1:2])
    np.testing.assert_allclose(alone, joint[1:2], rtol=1e-7)
    by_batch, expected, _ = results(batch_learner, filled, task)
    assert np.abs(by_batch - joint).max() > 1e-4
    np.testing.assert_allclose(value, expected, rtol=1e-12)


@pytest.mark.nightly_rows(after=4)
@methods
def test_the_gradient_of_a_padded_task_matches_finite_differences(method):
    task = unequal()
    learner, params = learner_of(method), initialised(method)
    ragged = jm.Task(padded(task.support, [0, 4]), padded(task.query, [2]))
    if method == "context":  # where the order of the examples is drawn, and padding takes part in it
        ragged = jm.Task(task.support, ragged.query)

    error, value = gradient_check(lambda params: learner.loss(params, ragged, KEY)[0], params)
    assert error < 1e-6
    np.testing.assert_allclose(value, loss(learner, params, task)[0], rtol=1e-9)


def test_the_gradient_of_relation_networks_matches_finite_differences():
    class Maps(linen.Module):
        @linen.compact
        def __call__(self, x, mask=None):
            x = jm.nn.Conv(2, (3, 3))(x.reshape(-1, 2, 2, 1))
            return jnp.tanh(jm.nn.BatchNorm()(x, mask))

    class Scores(linen.Module):
        @linen.compact
        def __call__(self, x, mask=None):
            x = jnp.tanh(jm.nn.BatchNorm()(jm.nn.Conv(3, (3, 3))(x), mask))
            return linen.Dense(1)(x.reshape(x.shape[0], -1))

    task, learner = unequal(), jm.relation(Maps(), Scores())
    params = of_float64(initial(learner, task), 0)
    ragged = jm.Task(padded(task.support, [0, 4]), padded(task.query, [2]))
    assert gradient_check(lambda params: learner.loss(params, ragged, KEY)[0], params)[0] < 1e-6


@methods
def test_float_targets_are_refused(method):
    part = jm.Batch(np.ones((3, DIM)), np.ones((3, 1)))
    learner = learner_of(method)
    message = "got targets of type float64; methods that compare .* integer class slots"
    with pytest.raises(ValueError, match=message):
        learner.init(KEY, jm.Task(part, part))
    # Targets are checked before parameters are used.
    params = {}
    with pytest.raises(ValueError, match=message):
        learner.loss(params, jm.Task(part, part), KEY)
    with pytest.raises(ValueError, match=message):
        learner.adapt(params, part, KEY)


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (lambda params, x: (x, None), r"the model returns tuple for 6 examples"),
        (lambda params, x: x[:, :, None, None], r"the model returns \(6, 4, 1, 1\) for 6 examples"),
        (lambda params, x: x[:, 0], r"the model returns \(6,\) for 6 examples"),
        (lambda params, x: x[:2], r"the model returns \(2, 4\) .* must be \(examples, dim\)"),
    ],
)
def test_outputs_that_are_not_embeddings_are_refused_at_init(apply, message):
    for method in FEW:
        with pytest.raises(ValueError, match=message):
            METHODS[method]((IDENTITY[0], apply)).init(KEY, unequal())


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("method", FEW)
def test_a_batch_made_by_hand_needs_no_number_of_ways(method):
    task = unequal()
    by_hand = jm.Task(*(jm.Batch(part.x, part.y) for part in task))
    learner = METHODS[method](IDENTITY)
    # Not compiled, because the number of ways is read from concrete labels.
    params = learner.init(KEY, by_hand)
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(learner.init, KEY, task))
    expected, _ = loss(learner, params, task)
    np.testing.assert_allclose(learner.loss(params, by_hand, KEY)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "support"])
def test_every_draw_in_training_uses_a_separate_key(norm):
    seen = []

    def apply(params, x, *, key=None):
        seen.append(key)
        return x

    def augment(key, x):
        seen.append(key)
        return x

    def apply_norm(params, x, *, stats=None, mask=None, key=None):
        return apply(params, x, key=key), {}

    for norm_function in (None, apply_norm):
        seen.clear()
        model = jm.Model(IDENTITY[0], apply, norm_function, stochastic=True)
        learner = jm.prototypical(model, norm=norm, augment=augment)
        learner.loss({"model": {}}, unequal(), KEY)
        used = {np.asarray(jax.random.key_data(key)).tobytes() for key in seen}
        assert len(used) == len(seen) >= 3
        seen.clear()
        learner.predict(
            {"model": {}}, learner.adapt({"model": {}}, unequal().support, KEY), unequal().query.x
        )
        assert set(seen) == {None}


def test_images_are_augmented_only_in_training():
    task = unequal()
    learner = jm.prototypical(IDENTITY, augment=lambda key, x: 2 * x)
    doubled = jm.Task(*(batch(2 * np.asarray(part.x), part.y) for part in task))
    plain, params = jm.prototypical(IDENTITY), {"model": {}}
    outputs, value, _ = results(learner, params, task)
    np.testing.assert_allclose(value, loss(plain, params, doubled)[0], rtol=1e-12)
    np.testing.assert_array_equal(outputs, outputs_of(plain, params, task.support, task.query.x))


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("method", ["prototypical", "matching"])
def test_logits_and_loss_match_torch_on_the_same_weights(method):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    F = torch.nn.functional
    rng = np.random.default_rng(0)
    task = jm.Task(*(batch(rng.normal(size=(n, 17, 16, 2)), np.arange(n) % WAYS) for n in (6, 4)))
    learner = {
        "prototypical": jm.prototypical,
        "matching": functools.partial(jm.matching, scale=10.0),
    }[method](jm.nn.Conv4(filters=5))
    params = of_float64(initial(learner, task), 0)
    x = torch.tensor(np.concatenate([part.x for part in task])).permute(0, 3, 1, 2)
    for i in range(4):
        layer = jax.tree.map(lambda leaf: torch.tensor(np.array(leaf)), params["model"][f"ConvNorm_{i}"])
        x = F.conv2d(x, layer["conv"]["kernel"].permute(3, 2, 0, 1), layer["bias"], padding=1)
        norm = layer["norm"]
        x = F.relu(F.batch_norm(x, None, None, norm["scale"], norm["bias"], training=True, eps=1e-3))
        x = F.max_pool2d(x, 2)
    z = x.permute(0, 2, 3, 1).flatten(1)
    y = torch.tensor(np.array(task.support.y), dtype=torch.long)
    if method == "prototypical":
        means = torch.stack([z[:6][y == c].mean(0) for c in range(WAYS)])
        expected = -(torch.cdist(z[6:], means) ** 2)
    else:
        attention = torch.softmax(10 * F.cosine_similarity(z[6:, None], z[None, :6], dim=2), 1)
        expected = torch.log(attention @ F.one_hot(y).double())
    actual, value, _ = results(learner, params, task)
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-8)
    query_y = torch.tensor(np.array(task.query.y), dtype=torch.long)
    np.testing.assert_allclose(value, F.cross_entropy(expected, query_y).item(), rtol=1e-8)


@methods
def test_unknown_statistics_are_refused(method):
    with pytest.raises(ValueError, match=r"norm: got 'layer'; it must be one of"):
        METHODS[method](network(), norm="layer")


# Squared Euclidean distances do not change under a translation of all points.
OF_DISTANCES = {
    "prototypical": jm.prototypical,
    "square": functools.partial(jm.prototypical, divergence=lambda u: (u**2).sum()),
    "learned": functools.partial(jm.kernel_classifier, similarity="learned", reduce="mean"),
    "nearest": functools.partial(jm.kernel_classifier, similarity="euclidean", reduce="nearest"),
    "prototype": functools.partial(jm.kernel_classifier, similarity="euclidean", reduce="prototype"),
    "simple_shot": functools.partial(jm.simple_shot, transform="un"),
}


@pytest.mark.parametrize("offset", [0.0, 5_000.0, -40_000.0])
@pytest.mark.parametrize("method", OF_DISTANCES)
def test_a_common_offset_of_all_points_does_not_change_outputs(method, offset):
    rng = np.random.default_rng(3)
    dim, ways = 16, 5
    # Multiples of 1/64 are exact in float32 at these offsets too.
    centres = np.round(64 * rng.normal(size=(ways, dim))) / 64
    labels = np.repeat(np.arange(ways), 2)
    support = centres[labels] + np.round(6.4 * rng.normal(size=(2 * ways, dim))) / 64
    query = centres[labels] + np.round(25 * rng.normal(size=(2 * ways, dim))) / 64
    # One more slot than classes, and padding far from the points.
    x = np.concatenate([offset + support, np.zeros((3, dim))])
    part = jm.Batch(
        jnp.asarray(x, jnp.float32),
        jnp.asarray([*labels, 0, 0, 0], jnp.int32),
        mask=jnp.asarray(np.arange(len(x)) < len(support)),
        ways=ways + 1,
    )
    learner = OF_DISTANCES[method](IDENTITY)
    head = {"similarity": jnp.eye(dim, dtype=jnp.float32)} if method == "learned" else {}
    params = {"model": {}, "head": head}
    actual = np.asarray(outputs_of(learner, params, part, jnp.asarray(offset + query, jnp.float32)))
    squared = np.square(query[:, None] - support[None]).sum(-1).reshape(len(query), ways, 2)
    to_mean = np.square(query[:, None] - support.reshape(ways, 2, dim).mean(1)[None]).sum(-1)
    nearest = {"nearest": squared.min(2), "learned": -np.log(np.exp(-squared).mean(2))}.get(method, to_mean)
    assert np.isneginf(actual[:, ways]).all()
    actual = actual[:, :ways]
    # Up to a term that is equal for all classes.
    expected = -(nearest - nearest.mean(1, keepdims=True))
    tolerance = 1e-4 if offset == 0 else 0.2
    np.testing.assert_allclose(actual - actual.mean(1, keepdims=True), expected, atol=tolerance)
    np.testing.assert_array_equal(actual.argmax(1), nearest.argmin(1))


def test_distances_have_the_derivatives_of_their_formula():
    rng = np.random.default_rng(4)
    a, b = jnp.asarray(rng.normal(size=(3, DIM))), jnp.asarray(rng.normal(size=(2, DIM)))

    def total(distances, a, b):
        return jnp.sin(distances(a, b)).sum()

    def plain(a, b):
        return jnp.square(a[:, None] - b[None]).sum(-1)

    for order in (jax.grad, jax.hessian):
        actual = jax.jit(order(functools.partial(total, squared_distances), (0, 1)))(a, b)
        expected = jax.jit(order(functools.partial(total, plain), (0, 1)))(a, b)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9), actual, expected)


def test_solutions_of_positive_systems_and_their_derivatives_are_those_of_numpy():
    rng = np.random.default_rng(6)
    factors, values = rng.normal(size=(3, 12, 12)), rng.normal(size=(3, 12, 4))
    matrices = factors @ np.swapaxes(factors, 1, 2) + 0.01 * np.eye(12)
    expected = np.linalg.solve(matrices, values)
    np.testing.assert_allclose(jax.jit(jax.vmap(solve_positive))(matrices, values), expected, rtol=1e-8)
    weights, change = rng.normal(size=(12, 4)), rng.normal(size=(12, 12))
    change = change + change.T

    def value(step):
        return (weights * solve_positive(matrices[0] + step * change, jnp.asarray(values[0]))).sum()

    first, second = jax.jit(lambda: (jax.grad(value)(0.0), jax.grad(jax.grad(value))(0.0)))()
    inverse = np.linalg.inv(matrices[0])
    solution, relative_change = inverse @ values[0], inverse @ change
    np.testing.assert_allclose(first, -(weights * (relative_change @ solution)).sum(), rtol=1e-7)
    second_change = relative_change @ relative_change
    np.testing.assert_allclose(second, 2 * (weights * (second_change @ solution)).sum(), rtol=1e-7)


def test_distances_between_bfloat16_vectors_are_computed_in_float32():
    rng = np.random.default_rng(5)
    a, b = (jnp.asarray(rng.normal(size=(4, 300)) + 50, jnp.bfloat16) for _ in range(2))
    exact = [np.asarray(array, np.float64) for array in (a, b)]
    actual = squared_distances(a, b)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, np.square(exact[0][:, None] - exact[1][None]).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("method", rows("context", "prototypical", "kernel"))
def test_a_support_set_of_only_padding_has_finite_gradients_and_uniform_outputs(method):
    learner, params = learner_of(method), initialised(method)
    support, query = unequal()
    nothing = batch(np.full_like(support.x, np.nan), support.y, np.zeros(support.y.size))

    @jax.jit
    def results(params):
        adapted = learner.adapt(params, nothing, KEY)
        loss = jax.value_and_grad(lambda params: learner.loss(params, jm.Task(nothing, query), KEY)[0])
        return learner.predict(params, adapted, query.x), loss(params)

    outputs, value_and_gradient = results(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(value_and_gradient))
    np.testing.assert_allclose(softmax(np.asarray(outputs)), 1 / WAYS)
