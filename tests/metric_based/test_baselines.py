"""Ridge, nearest-centroid and fine-tuned heads, and the classifiers that provide their features."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import Ridge
from vectors import (
    DIM,
    IDENTITY,
    KEY,
    WAYS,
    adapted,
    batch,
    distances,
    gradient_check,
    initial,
    loss,
    of_float64,
    padded,
    predict,
    softmax,
    unequal,
)

import jaxmeta as jm

SUPPORT, QUERY = unequal()
RIDGE = jm.ridge(IDENTITY)


# Ridge regression.


@pytest.mark.parametrize("regularisation", [0.1, 1.0, 50.0])
def test_ridge_matches_scikit_learn_on_one_hot_labels_and_the_primal_solution(regularisation, x64):
    support, query = (batch(part.x, part.y) for part in unequal())
    learner = jm.ridge(IDENTITY, regularisation=regularisation, scale=3.0)
    head = initial(learner, jm.Task(support, query))["head"]
    outputs = predict(RIDGE, support, query.x, head=head)
    x, labels = np.asarray(support.x), np.eye(WAYS)[support.y]
    known = Ridge(alpha=regularisation, fit_intercept=False).fit(x, labels)
    np.testing.assert_allclose(outputs, 3 * known.predict(np.asarray(query.x)), rtol=1e-6)
    primal = np.linalg.solve(x.T @ x + regularisation * np.eye(DIM), x.T @ labels)
    np.testing.assert_allclose(outputs, 3 * np.asarray(query.x) @ primal, rtol=1e-6)


def test_the_gradient_through_ridge_matches_finite_differences(x64):
    module = jm.nn.as_model(jm.nn.MLP(out=6, hidden=(5,), activation=jnp.tanh))
    learner = jm.ridge((module.init, module.apply))
    task = unequal()
    params = of_float64(initial(learner, task), 0)

    def value(params):
        return learner.loss(params, task, KEY)[0]

    assert gradient_check(value, params)[0] < 1e-6
    grads = jax.jit(jax.grad(value))(params)
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(grads))


def test_ridge_ignores_padding_and_classes_without_examples(x64):
    support, query = (batch(part.x, part.y) for part in unequal())
    head = initial(RIDGE, jm.Task(support, query))["head"]
    outputs = predict(RIDGE, support, query.x, head=head)
    with_padding = padded(batch(support.x, support.y, ways=5), [0, 2, 6])
    actual = predict(RIDGE, with_padding, query.x, head=head)
    np.testing.assert_allclose(actual[:, :WAYS], outputs, rtol=1e-9)
    assert (actual[:, WAYS:] == -np.inf).all()


def test_a_regularisation_of_ridge_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"regularisation: got 0.0; it must be positive"):
        jm.ridge(IDENTITY, regularisation=0.0)


# SimpleShot.


def unit(z):
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


@pytest.mark.parametrize("norm", ["batch", "support", "population"])
@pytest.mark.parametrize("transform", ["un", "l2n", "cl2n"])
def test_simple_shot_is_the_nearest_centroid_of_transformed_features(transform, norm, x64):
    (support, query), rng = unequal(), np.random.default_rng(5)
    x, q = np.asarray(support.x) + 1, np.asarray(query.x) + 1
    mean = {
        "batch": np.concatenate([x, q]).mean(0),
        "support": x.mean(0),
        "population": rng.normal(size=DIM),
    }[norm]
    params = {}
    if transform == "cl2n":
        moments = {"mean": jnp.asarray(mean), "mean_of_squares": jnp.asarray(np.square(mean) + 1)}
        params["population"] = {"model": {}, "features": moments}
    outputs = predict(
        jm.simple_shot(IDENTITY, transform=transform, norm=norm), batch(x, support.y), q, **params
    )
    features = {"un": lambda z: z, "l2n": unit, "cl2n": lambda z: unit(z - mean)}[transform]
    y = np.asarray(support.y)
    centroids = np.stack([features(x)[y == c].mean(0) for c in range(WAYS)])
    np.testing.assert_allclose(outputs, -distances(features(q), centroids), rtol=1e-9)


def test_the_mean_feature_ignores_padding_and_can_be_calibrated(x64):
    learner = jm.simple_shot(IDENTITY)
    task = jm.Task(padded(SUPPORT, [1]), padded(QUERY, [0, 3]))
    total, count = jax.device_get(jax.jit(learner.statistics)({"model": {}}, task, KEY))
    everything = np.concatenate([SUPPORT.x, QUERY.x])
    np.testing.assert_allclose(total["features"]["mean"] / count, everything.mean(0), rtol=1e-6)
    np.testing.assert_allclose(
        predict(learner, task.support, QUERY.x), predict(learner, SUPPORT, QUERY.x), rtol=1e-6
    )


# A head by gradient descent.


def test_a_fine_tuned_linear_head_matches_the_released_code_in_torch(x64):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    support, query = (batch(part.x, part.y) for part in unequal())
    outputs = predict(jm.fine_tuned_head(IDENTITY, eval_steps=7), support, query.x)
    head = torch.nn.Linear(DIM, WAYS).double()
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    sgd = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9, dampening=0.9, weight_decay=0.001)
    x, y = torch.tensor(np.array(support.x)), torch.tensor(np.array(support.y), dtype=torch.long)
    for _ in range(7):
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(head(x), y).backward()
        sgd.step()
    expected = head(torch.tensor(np.array(query.x))).detach().numpy()
    np.testing.assert_allclose(outputs, expected, rtol=1e-8)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_a_fine_tuned_head_minimises_its_cross_entropy_by_inner_optimizer(head, x64):
    support, query = (batch(part.x, part.y) for part in unequal())
    learner = jm.fine_tuned_head(IDENTITY, head=head, inner_optimizer=optax.sgd(0.5), eval_steps=3)
    x, q, y = support.x, query.x, support.y

    def normed(z):
        return z / jnp.linalg.norm(z, axis=1, keepdims=True)

    def forward(weights, z):
        if head == "linear":
            return z @ weights["w"].T + weights["b"][None]
        return 2.0 * weights["g"][None] * (normed(z) @ normed(weights["w"]).T)

    means = np.stack([np.asarray(x)[np.asarray(y) == c].mean(0) for c in range(WAYS)])
    if head == "linear":
        weights = {"w": np.zeros((WAYS, DIM)), "b": np.zeros(WAYS)}
    else:
        weights = {"w": unit(means), "g": np.ones(WAYS)}
    slope = jax.jit(jax.grad(lambda weights: jm.losses.cross_entropy(forward(weights, x), y)))
    for _ in range(3):
        weights = jax.tree.map(lambda w, g: w - 0.5 * np.asarray(g), weights, slope(weights))
    np.testing.assert_allclose(predict(learner, support, q), jax.jit(forward)(weights, q), rtol=1e-9)


def test_a_cosine_head_starts_at_the_class_means_with_norms_of_one():
    learner = jm.fine_tuned_head(
        IDENTITY, head="cosine", inner_optimizer=optax.sgd(0.0), eval_steps=1, scale=10.0
    )
    fitted = adapted(learner, {"model": {}}, SUPPORT)["fitted"]["head"]
    y = np.asarray(SUPPORT.y)
    means = unit(np.stack([np.asarray(SUPPORT.x)[y == c].mean(0) for c in range(WAYS)]))
    np.testing.assert_allclose(fitted["kernel"], means.T, rtol=1e-5)
    np.testing.assert_array_equal(fitted["norm"], 1)
    outputs = predict(learner, SUPPORT, QUERY.x)
    np.testing.assert_allclose(outputs, 10 * unit(np.asarray(QUERY.x)) @ means.T, rtol=1e-4)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_a_fine_tuned_head_ignores_padding_and_absent_classes(head, x64):
    support, query = (batch(part.x, part.y) for part in unequal())
    learner = jm.fine_tuned_head(IDENTITY, head=head, eval_steps=4)
    outputs = predict(learner, support, query.x)
    actual = predict(learner, padded(batch(support.x, support.y, ways=5), [0, 2, 6]), query.x)
    np.testing.assert_allclose(actual[:, :WAYS], outputs, rtol=1e-9)
    assert (actual[:, WAYS:] == -np.inf).all()


# Training on all classes at once.


def pretrained(name, **settings):
    make = {
        "simple_shot": lambda: jm.simple_shot(IDENTITY, transform="l2n", **settings),
        "linear": lambda: jm.fine_tuned_head(IDENTITY, **settings),
        "cosine": lambda: jm.fine_tuned_head(IDENTITY, head="cosine", scale=3.0, **settings),
    }
    return make[name]()


@pytest.mark.parametrize("name", ["simple_shot", "linear", "cosine"])
def test_the_training_loss_is_the_cross_entropy_over_all_classes(name, x64):
    rng = np.random.default_rng(0)
    classes = 7
    support, query = (
        batch(rng.normal(size=(n, DIM)), rng.integers(classes, size=n), ways=classes) for n in (4, 5)
    )
    task = jm.Task(support, query)
    learner = pretrained(name)
    params = of_float64(initial(learner, task), 0)
    head = jax.tree.map(np.asarray, params["head"])
    x = np.concatenate([support.x, query.x])
    y = np.concatenate([support.y, query.y])
    assert head["kernel"].shape == (DIM, classes)
    if name == "cosine":
        logits = 3 * head["norm"] * (unit(x) @ unit(head["kernel"].T).T)
    else:
        logits = x @ head["kernel"] + head["bias"]
    expected = -np.log(softmax(logits)[np.arange(9), y]).mean()
    value, metrics = loss(learner, params, task)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    assert metrics["accuracy"] == ((logits[4:].argmax(1) == y[4:]).sum(), 5)
    ragged = jm.Task(padded(support, [0, 2]), padded(query, [5]))
    value, known = loss(learner, params, ragged)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    assert known["accuracy"] == metrics["accuracy"]


def test_the_feature_transform_does_not_change_training(x64):
    task = jm.Task(*(batch(np.asarray(part.x) + 1, part.y) for part in unequal()))
    params = of_float64(initial(pretrained("simple_shot"), task), 0)
    values = [
        loss(jm.simple_shot(IDENTITY, transform=transform), params, task)[0]
        for transform in ("un", "l2n", "cl2n")
    ]
    np.testing.assert_allclose(values, values[0], rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jm.simple_shot(IDENTITY, transform="l1"), "transform: got 'l1'; it must be one of"),
        (lambda: jm.fine_tuned_head(IDENTITY, head="mlp"), "head: got 'mlp'; it must be one of"),
        (lambda: jm.fine_tuned_head(IDENTITY, eval_steps=0), "eval_steps: got 0; it must be at least 1"),
        (lambda: jm.fine_tuned_head(IDENTITY, norm="layer"), "norm: got .*; it must be one of"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
