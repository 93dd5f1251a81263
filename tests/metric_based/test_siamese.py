"""Siamese networks: pairs, heads, the published network, and image distortions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import affine_transform
from scipy.stats import chisquare
from vectors import DIM, IDENTITY, KEY, WAYS, batch, initial, loss, of_float64, predict, softmax, unequal

import jaxmeta as jm
from jaxmeta.metric_based.siamese import pair_kinds, sample_pairs

TASK = unequal()
SIAMESE, WITHOUT_BIAS = jm.siamese(IDENTITY), jm.siamese(IDENTITY, use_bias=False)
WEIGHTS = jnp.array([0.5, -1.0, 0.3, -0.7])
HEAD = {"weights": WEIGHTS, "bias": jnp.asarray(0.4)}


def sigmoid(values):
    return 1 / (1 + np.exp(-np.asarray(values)))


def scores(a, b, head=HEAD):
    """Return the scores before σ, by a NumPy formula."""
    differences = np.abs(np.asarray(a)[:, None] - np.asarray(b)[None])
    return differences @ np.asarray(head["weights"]) + float(head.get("bias", 0.0))


def verification_loss(support, query, **head):
    learner = SIAMESE if "bias" in head else WITHOUT_BIAS
    return loss(learner, {"model": {}, "head": head}, jm.Task(support, query))[0]


def log_odds(a, b, **head):
    """Return the log odds of p(a, b), from the loss of a single pair of the same class."""
    half = verification_loss(batch(a, [0], ways=1), batch(b, [0], ways=1), **head)
    return -np.log(np.expm1(2 * half))


def test_the_probability_of_a_pair_is_symmetric(x64):
    a, b = [[1.0, -2, 0.5, 3]], [[0.0, 1, 2, -1]]
    np.testing.assert_allclose(log_odds(a, b, **HEAD), scores(a, b)[0, 0], rtol=1e-9)
    np.testing.assert_allclose(log_odds(b, a, **HEAD), log_odds(a, b, **HEAD), rtol=1e-12)


def test_two_equal_images_score_the_bias_and_without_it_one_half():
    a = [[1.0, -2, 0.5, 3]]
    np.testing.assert_allclose(log_odds(a, a, **HEAD), 0.4, rtol=1e-5)
    np.testing.assert_allclose(
        verification_loss(*[batch(a, [0], ways=1)] * 2, weights=WEIGHTS), np.log(2) / 2
    )


def test_use_bias_decides_whether_the_head_has_a_bias():
    assert set(initial(WITHOUT_BIAS, TASK)["head"]) == {"weights"}
    head = initial(SIAMESE, TASK)["head"]
    assert head["weights"].shape == (DIM,)
    assert head["bias"] == 0


def test_a_query_has_the_class_of_its_best_matching_support_image():
    outputs = predict(SIAMESE, TASK.support, TASK.query.x, head=HEAD)
    actual = scores(TASK.query.x, TASK.support.x)
    np.testing.assert_array_equal(outputs.argmax(1), np.asarray(TASK.support.y)[actual.argmax(1)])
    best = np.stack([actual[:, np.asarray(TASK.support.y) == c].max(1) for c in range(WAYS)], 1)
    np.testing.assert_allclose(softmax(outputs), softmax(best), rtol=1e-5)
    np.testing.assert_allclose(np.exp(outputs).sum(1), 1, rtol=1e-5)


def test_the_loss_balances_pairs_of_the_same_and_of_different_classes():
    p = sigmoid(scores(TASK.query.x, TASK.support.x))
    same = np.asarray(TASK.query.y)[:, None] == np.asarray(TASK.support.y)[None]
    losses = [
        (-np.log(row[kind]).mean() - np.log(1 - row[~kind]).mean()) / 2
        for row, kind in zip(p, same, strict=True)
    ]
    np.testing.assert_allclose(verification_loss(*TASK, **HEAD), np.mean(losses), rtol=1e-5)


def test_the_loss_of_two_pairs_matches_the_value_computed_by_hand():
    # |Δ| = 1 for the same class and 2 for the other: p = σ(1 − 1) = ½ and σ(1 − 2) = 1/(1 + e).
    support, query = batch([[1.0], [2.0]], [0, 1], ways=2), batch([[0.0]], [0], ways=2)
    head = {"weights": -jnp.ones(1), "bias": jnp.asarray(1.0)}
    expected = (np.log(2) - np.log(1 - 1 / (1 + np.e))) / 2
    np.testing.assert_allclose(verification_loss(support, query, **head), expected, rtol=1e-6)


def test_the_gradient_is_the_sum_over_both_branches(x64):
    module = jm.nn.as_model(jm.nn.MLP(out=DIM, hidden=(5,), activation=jnp.tanh))
    learner = jm.siamese((module.init, module.apply))
    task = jm.Task(*(batch(part.x, part.y) for part in TASK))
    params = of_float64(initial(learner, task), 0)
    same = np.asarray(task.query.y)[:, None] == np.asarray(task.support.y)[None]

    def two_branches(left, right):
        a, b = module.apply(left, task.query.x), module.apply(right, task.support.x)
        head = params["head"]
        logits = jnp.abs(a[:, None] - b[None]) @ head["weights"] + head["bias"]
        cost = jnp.where(same, jax.nn.softplus(-logits), jax.nn.softplus(logits))
        halves = [jnp.where(kind, cost, 0).sum(1) / kind.sum(1) for kind in (same, ~same)]
        return sum(halves).mean() / 2

    @jax.jit
    def gradients(params):
        apart = jax.grad(two_branches, (0, 1))(params["model"], params["model"])
        return apart, jax.grad(lambda params: learner.loss(params, task, KEY)[0])(params)["model"]

    (left, right), actual = jax.device_get(gradients(params))
    for whole, left_branch, right_branch in zip(*map(jax.tree.leaves, (actual, left, right)), strict=True):
        np.testing.assert_allclose(whole, left_branch + right_branch, atol=1e-12)
        assert np.abs(whole - left_branch).max() > 1e-6


# Sampled pairs.


def kinds():
    """Return pair kinds for queries of classes 0, 1, 2, padding and supports 0, padding, 1, 1."""
    support, query = np.eye(3)[[0, 0, 1, 1]], np.eye(3)[[0, 1, 2, 2]]
    support[1] = query[3] = 0
    return jax.device_get(jax.jit(pair_kinds)(support, query))


draw = jax.jit(sample_pairs, static_argnums=3)


def test_pairs_with_padding_belong_to_neither_kind():
    same, different = kinds()
    np.testing.assert_array_equal(same, [[1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(different, [[0, 0, 1, 1], [1, 0, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]])


def test_half_of_the_pairs_are_of_each_kind_and_uniform():
    same, different = kinds()
    count = 6000
    drawn = jax.device_get(draw(KEY, same, different, count))
    assert drawn.query.shape == (count,)
    assert drawn.valid.all()
    np.testing.assert_array_equal(drawn.same, np.arange(count) < count // 2)
    for half, kind in ((drawn.same, same), (~drawn.same, different)):
        counts = np.zeros(kind.shape)
        np.add.at(counts, (np.asarray(drawn.query)[half], np.asarray(drawn.support)[half]), 1)
        assert (counts[~np.asarray(kind)] == 0).all()
        assert chisquare(counts[np.asarray(kind)]).pvalue > 1e-3


def test_pairs_are_a_pure_function_of_the_key():
    first, again, other = (
        jax.device_get(draw(key, *kinds(), 20)) for key in (KEY, jax.random.key(0), jax.random.key(1))
    )
    for drawn, repeated in zip(first, again, strict=True):
        np.testing.assert_array_equal(drawn, repeated)
    assert (first.query != other.query).any()


def test_the_two_kinds_are_drawn_independently():
    every = np.ones((4, 4), bool)
    drawn = jax.device_get(draw(KEY, every, every, 200))
    pairs = 4 * drawn.query + drawn.support
    assert (pairs[:100] == pairs[100:]).mean() < 0.2


def test_a_kind_that_does_not_exist_gives_no_valid_pair():
    same, different = kinds()
    nothing = np.zeros_like(same)
    np.testing.assert_array_equal(draw(KEY, same, nothing, 6).valid, [True] * 3 + [False] * 3)
    np.testing.assert_array_equal(draw(KEY, nothing, different, 6).valid, [False] * 3 + [True] * 3)
    assert not draw(KEY, nothing, nothing, 2).valid.any()


@pytest.mark.nightly
def test_the_loss_of_many_sampled_pairs_matches_that_of_all_pairs():
    # All queries have equally many pairs, so the mean over pairs equals the mean over queries.
    even = jm.Task(batch(TASK.support.x, [0, 0, 1, 1, 2, 2]), batch(TASK.query.x, TASK.query.y))
    params = {"model": {}, "head": HEAD}
    expected, _ = loss(SIAMESE, params, even)
    value, _ = loss(jm.siamese(IDENTITY, pairs=20_000), params, even)
    np.testing.assert_allclose(value, expected, rtol=0.03)
    learner = jm.siamese(IDENTITY, pairs=2)
    few = [loss(learner, params, even, key)[0] for key in jax.random.split(KEY)]
    assert few[0] != few[1]


def test_the_loss_covers_one_kind_where_the_other_does_not_exist():
    support = batch(TASK.support.x, [0] * 6, ways=1)
    query = batch(TASK.query.x, [0] * 5, ways=1)
    params = {"model": {}, "head": HEAD}
    value, _ = loss(jm.siamese(IDENTITY, pairs=2000), params, jm.Task(support, query))
    expected = -np.log(sigmoid(scores(TASK.query.x, TASK.support.x))).mean()
    np.testing.assert_allclose(value, expected, rtol=0.1)


# Heads.


def test_a_head_network_receives_absolute_differences():
    head = jm.nn.MLP(out=1, hidden=(5,), kernel_init=jax.nn.initializers.lecun_normal())
    learner = jm.siamese(IDENTITY, head=head)
    params = initial(learner, TASK)
    outputs = predict(learner, TASK.support, TASK.query.x, **params)
    differences = np.abs(np.asarray(TASK.query.x)[:, None] - np.asarray(TASK.support.x)[None])
    score = jax.jit(jm.nn.as_model(head).apply)
    actual = np.asarray(score(params["head"], differences.reshape(-1, DIM))).reshape(5, 6)
    best = np.stack([actual[:, np.asarray(TASK.support.y) == c].max(1) for c in range(WAYS)], 1)
    np.testing.assert_allclose(outputs, np.log(softmax(best)), atol=1e-5)
    grads = jax.jit(jax.grad(lambda params: learner.loss(params, TASK, KEY)[0]))(params)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 3}, "pairs: got 3; it must be even"),
        ({"pairs": 0}, "pairs: got 0; it must be at least 2"),
        ({"norm": "layer"}, "norm: got .*; it must be one of"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        jm.siamese(IDENTITY, **settings)


def test_a_head_of_another_width_is_refused_at_init():
    with pytest.raises(ValueError, match=r"head: gives shape \(2, 3\) for 2 pairs; it must be \(2, 1\)"):
        jm.siamese(IDENTITY, head=jm.nn.MLP(out=3, hidden=(5,))).init(KEY, TASK)


def test_a_head_with_batch_statistics_is_refused():
    with pytest.raises(ValueError, match="head: got a network with batch statistics"):
        jm.siamese(IDENTITY, head=jm.nn.MLP(out=1, hidden=(5,), norm=True)).init(KEY, TASK)


# The published network.


def test_the_published_network_has_its_shapes_and_number_of_parameters():
    images = jax.ShapeDtypeStruct((2, 105, 105, 1), jnp.float32)
    module = jm.nn.Koch()

    def run(key, x):
        variables = module.init(key, x)
        return module.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])

    z, state = jax.eval_shape(run, KEY, images)
    assert z.shape == (2, 4096)
    seen = {
        name: part["__call__"][0].shape[1:]
        for name, part in state["intermediates"].items()
        if not name.startswith("__")
    }
    assert seen == {
        "Conv_0": (96, 96, 64),
        "Conv_1": (42, 42, 128),
        "Conv_2": (18, 18, 128),
        "Conv_3": (6, 6, 256),
        "Dense_0": (4096,),
    }
    part = jm.Batch(images, jax.ShapeDtypeStruct((2,), jnp.int32), ways=2)
    params = jax.eval_shape(jm.siamese(module).init, KEY, jm.Task(part, part))
    sizes = jax.tree.map(lambda leaf: leaf.size, params)
    assert sum(jax.tree.leaves(sizes["head"])) == 4097
    assert [sum(jax.tree.leaves(sizes["model"][name])) for name in sorted(seen)] == [
        6464, 401_536, 262_272, 524_544, 37_752_832
    ]  # fmt: skip
    assert sum(jax.tree.leaves(sizes)) == 38_951_745


def test_the_published_network_refuses_images_of_another_size():
    with pytest.raises(ValueError, match="got images of 28×28; the published network is for 105×105"):
        jax.eval_shape(jm.nn.Koch().init, KEY, jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32))


# Distortions.


def distort(key, x, **settings):
    """Distort images, with one compiled program for each shape and set of settings."""
    return np.asarray(_distort(key, jnp.asarray(x), **settings))


_SETTINGS = ("rotation", "shear", "scale", "shift", "probability", "fill")
_distort = jax.jit(jm.tasks.distort, static_argnames=_SETTINGS)


NOTHING = {"rotation": 0.0, "shear": 0.0, "scale": 0.0, "shift": 0.0, "probability": 1.0}
HEIGHT, WIDTH = 11, 13


def images(count=4):
    return np.random.default_rng(0).uniform(size=(count, HEIGHT, WIDTH, 1)).astype(np.float32)


def tracked(x, **settings):
    """Return distorted images, and the affine map from each one's pixels to their source positions."""
    rows, columns = np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")
    positions = np.broadcast_to(np.stack([rows, columns], -1), (len(x), HEIGHT, WIDTH, 2))
    carried = np.concatenate([x, positions.astype(np.float32), np.ones_like(x)], -1)
    actual = distort(KEY, carried, **{**NOTHING, **settings}).astype(np.float64)
    maps = []
    for image in actual:
        inside = image[..., 3] > 0.9999
        grid = np.stack([rows[inside], columns[inside], np.ones(inside.sum())], 1)
        assert len(grid) > 20
        solution, _, _, _ = np.linalg.lstsq(grid, image[inside][:, 1:3], rcond=None)
        np.testing.assert_allclose(grid @ solution, image[inside][:, 1:3], atol=1e-4)
        maps.append((solution[:2].T, solution[2]))
    return actual[..., :1], maps


@pytest.mark.parametrize(
    "settings",
    [
        {"rotation": 40.0},
        {"shift": 0.3},
        {"shear": 0.3},
        {"scale": 0.2},
        {"rotation": 10.0, "shear": 0.3, "scale": 0.2},
    ],
)
def test_distortions_are_affine_maps_with_bilinear_interpolation_on_zeros(settings):
    x = images()
    actual, maps = tracked(x, **settings)
    for image, result, (matrix, offset) in zip(np.asarray(x), actual, maps, strict=True):
        expected = affine_transform(
            image[..., 0].astype(np.float64), matrix, offset, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(result[..., 0], expected, atol=1e-4)
        assert np.abs(result - image).max() > 0.05


CENTRE = np.array([(HEIGHT - 1) / 2, (WIDTH - 1) / 2])


def test_each_component_is_an_affine_map_within_its_range():
    x = images(30)
    for matrix, offset in tracked(x, rotation=10.0)[1]:
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(2), atol=1e-4)
        assert 0 < abs(np.arctan2(matrix[1, 0], matrix[0, 0])) <= np.deg2rad(10) + 1e-4
        np.testing.assert_allclose(matrix @ CENTRE + offset, CENTRE, atol=1e-3)
    for matrix, offset in tracked(x, shift=0.2)[1]:
        np.testing.assert_allclose(matrix, np.eye(2), atol=1e-4)
        assert (np.abs(offset) <= 0.2 * np.array([HEIGHT, WIDTH]) + 1e-3).all()
    for matrix, offset in tracked(x, scale=0.2)[1]:
        np.testing.assert_allclose(matrix, np.diag(np.diagonal(matrix)), atol=1e-4)
        assert (np.abs(1 / np.diagonal(matrix) - 1) <= 0.2 + 1e-4).all()
        np.testing.assert_allclose(matrix @ CENTRE + offset, CENTRE, atol=1e-3)
    for matrix, _ in tracked(x, shear=0.3)[1]:
        np.testing.assert_allclose(np.diagonal(matrix), 1, atol=1e-4)
        assert (np.abs(matrix - np.eye(2)) <= 0.3 + 1e-4).all()
        assert (np.abs(matrix[[0, 1], [1, 0]]) > 1e-4).all()


def test_distortions_fill_the_outside_with_a_value_or_with_the_edge():
    strong = {"rotation": 180.0, "shear": 1.0, "scale": 0.5, "shift": 0.5, "probability": 1.0}
    x = images(20)
    on_white = distort(KEY, 1 - x, **strong, fill=1.0)
    np.testing.assert_allclose(on_white, 1 - distort(KEY, x, **strong), atol=1e-5)
    grey = distort(KEY, np.full_like(x, 0.5), **strong, fill="edge")
    np.testing.assert_allclose(grey, 0.5, atol=1e-6)
    with pytest.raises(ValueError, match="fill: got 'wrap'"):
        jm.tasks.distort(KEY, jnp.asarray(x), fill="wrap")


def test_distortions_of_probability_zero_change_nothing():
    x = images()
    np.testing.assert_array_equal(distort(KEY, x, probability=0.0), x)


def test_each_component_applies_to_half_of_the_images():
    x = np.broadcast_to(images(1), (1000, HEIGHT, WIDTH, 1))
    changed = distort(KEY, x, **{**NOTHING, "rotation": 30.0, "probability": 0.5}) != x
    assert 0.4 < changed.any((1, 2, 3)).mean() < 0.6


def test_distorted_images_stay_in_range_and_keep_their_dtype():
    actual = distort(KEY, images(50), rotation=180.0, shear=1.0, scale=0.5, shift=0.5)
    assert actual.shape == (50, HEIGHT, WIDTH, 1)
    assert actual.dtype == jnp.float32
    assert float(actual.min()) >= 0
    assert float(actual.max()) <= 1 + 1e-6


def test_each_image_and_each_key_has_a_separate_draw():
    x = np.broadcast_to(images(1), (6, HEIGHT, WIDTH, 1))
    actual = distort(KEY, x, probability=1.0).reshape(6, -1)
    assert len(np.unique(actual, axis=0)) == 6
    other = distort(jax.random.key(1), x, probability=1.0).reshape(6, -1)
    assert len(np.unique(np.concatenate([actual, other]), axis=0)) == 12


def test_distortions_under_vmap_match_a_loop():
    x, keys = jnp.asarray(images()), jax.random.split(KEY, 2)
    expected = np.stack([distort(key, x) for key in keys])
    np.testing.assert_allclose(
        jax.jit(jax.vmap(lambda key: jm.tasks.distort(key, x)))(keys), expected, atol=1e-5
    )


def test_the_two_images_of_a_pair_are_augmented_independently():
    same = batch(np.zeros((1, DIM)), [0], ways=1)

    def jitter(key, x):
        return x + jax.random.normal(key, x.shape)

    learner = jm.siamese(IDENTITY, augment=jitter)
    params = {"model": {}, "head": {"weights": -jnp.ones(DIM), "bias": jnp.zeros(())}}
    assert loss(learner, params, jm.Task(same, same))[0] > np.log(2) / 2 + 0.1
    np.testing.assert_allclose(predict(learner, same, same.x, **params), 0, atol=1e-6)
