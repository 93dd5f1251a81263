"""Heads on cached features, compared with scikit-learn and refits, and their classifier."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.metrics import accuracy_score
from sklearn.metrics import confusion_matrix as known_confusion
from support import raises_argument_error
from variables import initialised

import jaxmeta as jm
from jaxmeta.transfer import (
    accuracy,
    classifier,
    confusion_matrix,
    extract_features,
    logistic_head,
    mapped_head,
    predict_logits,
    ridge_head,
    with_body,
)
from jaxmeta.transfer.classifier import in_batches
from jaxmeta.transfer.heads import PENALTIES

KEY = jax.random.key(0)


def blobs(n, d, classes=3, seed=0, dtype=np.float64):
    """Return overlapping classes, with columns of several scales and an offset."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    z = rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d))
    return (z * np.linspace(0.5, 2, d) + 3).astype(dtype), y


# --- Ridge ----------------------------------------------------------------------------------------


def alpha_of(z, penalty):
    """Return scikit-learn's α = λ · s, with s the mean squared singular value of the centred features."""
    return penalty * np.square(np.linalg.svd(z - z.mean(0), compute_uv=False)).mean()


def chosen_penalty(z, y, head, classes=3):
    """Return the penalty that a head was fitted with, by comparison with scikit-learn's fits."""
    fits = [Ridge(alpha=alpha_of(z, penalty)).fit(z, np.eye(classes)[y]).coef_.T for penalty in PENALTIES]
    return PENALTIES[np.argmin([np.abs(fit - np.asarray(head["kernel"])).max() for fit in fits])]


@pytest.mark.parametrize(("n", "d"), [(60, 5), (12, 30)])
@pytest.mark.parametrize("penalty", [1e-3, 1.0, PENALTIES])
def test_the_ridge_head_equals_scikit_learns(n, d, penalty, x64):
    z, y = blobs(n, d)
    head = ridge_head(z, y, 3, penalty=penalty)
    # RidgeCV also chooses one α for all classes, by the squared leave-one-out error.
    known = RidgeCV(alphas=alpha_of(z, np.atleast_1d(penalty))).fit(z, np.eye(3)[y])
    np.testing.assert_allclose(head["kernel"], known.coef_.T, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(head["bias"], known.intercept_, rtol=1e-8, atol=1e-8)


def test_the_ridge_head_equals_scikit_learns_in_single_precision():
    for n, d in ((60, 5), (12, 30)):
        z, y = blobs(n, d, dtype=np.float32)
        head = ridge_head(z, y, 3)
        known = RidgeCV(alphas=alpha_of(z.astype(float), np.array(PENALTIES))).fit(z, np.eye(3)[y])
        np.testing.assert_allclose(head["kernel"], known.coef_.T, atol=1e-4)
        np.testing.assert_allclose(head["bias"], known.intercept_, atol=1e-4)


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize(("n", "d", "seed"), [(15, 4, 0), (12, 30, 1), (8, 8, 2)])
def test_the_chosen_penalty_has_the_least_leave_one_out_error_of_refits(n, d, seed, x64):
    z, y = blobs(n, d, seed=seed)
    targets = np.eye(3)[y]

    def error(penalty):
        squares = 0.0
        for i in range(n):
            rest = np.arange(n) != i
            fit = Ridge(alpha=alpha_of(z, penalty)).fit(z[rest], targets[rest])
            squares += np.square(targets[i] - fit.predict(z[i : i + 1])[0]).sum()
        return squares

    errors = [error(penalty) for penalty in PENALTIES]
    best = PENALTIES[int(np.argmin(errors))]
    assert min(errors) < 0.99 * max(errors)
    assert chosen_penalty(z, y, ridge_head(z, y, 3)) == best


def test_the_ridge_penalty_has_no_unit_and_the_intercept_is_free(x64):
    z, y = blobs(40, 6)
    head, other = ridge_head(z, y, 3), ridge_head(1000 * z - 5, y, 3)
    np.testing.assert_allclose(np.asarray(other["kernel"]) * 1000, head["kernel"], rtol=1e-8)
    outputs = z @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(outputs.sum(1), 1, rtol=1e-10)  # estimates of probabilities
    # With constant features only the classes' frequencies remain, 0 for classes without examples.
    flat = ridge_head(np.ones((40, 6)), y, 5)
    np.testing.assert_array_equal(flat["kernel"], 0)
    np.testing.assert_allclose(flat["bias"], np.bincount(y, minlength=5) / 40)


# --- Logistic regression --------------------------------------------------------------------------


def scikit_logistic(z, y, penalty, weights=None):
    """Return scikit-learn's solution; its objective C Σ w CE + ½‖W‖² is ours for C = 1 / (n · penalty)."""
    C = 1 / (len(y) * penalty)
    known = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    known.fit(z, y, sample_weight=weights)
    return known.coef_.T, known.intercept_


def assert_same_head(head, kernel, intercept, tolerance):
    # A constant added to all intercepts does not change the softmax.
    np.testing.assert_allclose(head["kernel"], kernel, atol=tolerance, rtol=tolerance)
    bias = np.asarray(head["bias"])
    np.testing.assert_allclose(
        bias - bias.mean(), intercept - intercept.mean(), atol=tolerance, rtol=tolerance
    )


@pytest.mark.nightly_rows(after=2)
@pytest.mark.parametrize(
    ("n", "d", "penalty"),
    [(200, 6, 1e-3), (200, 6, 1.0), (20, 40, 1e-2)],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_logistic_head_equals_scikit_learns(n, d, penalty, weighted, x64):
    z, y = blobs(n, d)
    weights = np.random.default_rng(3).exponential(size=n) if weighted else None
    head = logistic_head(z, y, 3, penalty=penalty, weights=weights, tolerance=1e-10)
    assert_same_head(head, *scikit_logistic(z, y, penalty, weights), 1e-6)


@pytest.mark.parametrize(
    "case", ["unchanged", "a distant column", "scales of six powers of ten", "a constant column"]
)
def test_the_logistic_head_finds_the_minimum_in_single_precision_for_features_of_any_scale(case):
    z, y = blobs(200, 6)
    z = {
        "unchanged": z,
        "a distant column": z + np.array([0, 0, 0, 1000, 0, 0]),
        "scales of six powers of ten": z * np.logspace(-3, 3, 6),
        "a constant column": np.where(np.arange(6) == 2, 0, np.maximum(z - 3, 0)),
    }[case].astype(np.float32)
    head = logistic_head(z, y, 3, penalty=1e-3)
    kernel, intercept = scikit_logistic(z.astype(float), y, 1e-3)
    # Compare the contributions of each feature to the logits.
    spread = z.std(0)[:, None]
    np.testing.assert_allclose(spread * np.asarray(head["kernel"]), spread * kernel, atol=5e-3)
    outputs, known = z @ np.asarray(head["kernel"], float), z @ kernel
    outputs, known = outputs + np.asarray(head["bias"])[None], known + intercept
    np.testing.assert_allclose(outputs - outputs.mean(1, keepdims=True), known, atol=2e-2)


def test_the_logistic_head_ends_at_its_tolerance_or_after_its_steps(x64):
    z, y = blobs(200, 6)
    kernel, _ = scikit_logistic(z, y, 1e-2)

    def distance(**settings):
        result = logistic_head(z, y, 3, penalty=1e-2, **settings)
        return np.abs(np.asarray(result["kernel"]) - kernel).max()

    loose, tight, short = (
        distance(tolerance=1e-2),
        distance(tolerance=1e-9),
        distance(tolerance=1e-9, steps=2),
    )
    assert tight < 1e-7 < 1e-4 < loose < short


def test_weights_of_the_logistic_head_count_as_repetitions(x64):
    z, y = blobs(200, 6)
    counts = np.array([*[0, 1, 2] * 66, 1, 1])
    repeated = np.repeat(np.arange(200), counts)
    once = logistic_head(z, y, 3, weights=counts.astype(float), tolerance=1e-10)
    again = logistic_head(z[repeated], y[repeated], 3, tolerance=1e-10)
    assert_same_head(once, np.asarray(again["kernel"]), np.asarray(again["bias"]), 1e-6)


@pytest.mark.parametrize("head", [ridge_head, logistic_head])
def test_bad_features_and_labels_are_rejected_with_their_name(head):
    z, y = blobs(10, 3, dtype=np.float32)
    for labels, classes, message in (
        (y[:7], 3, r"labels: got shape \(7,\); it must be \(10,\)"),
        (np.zeros(10, int), 3, "labels: got 1 class"),
        (y, 2, "labels: got classes from 0 to 2; they must be from 0 to 1"),
        (y - 1, 3, "labels: got classes from -1 to 1; they must be from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            head(z, labels, classes)


def test_bad_penalties_and_weights_are_rejected_with_their_name():
    z, y = blobs(10, 3, dtype=np.float32)
    for penalty in (0.0, [1.0, -1.0], float("nan")):
        with pytest.raises(ValueError, match="penalty: got"):
            ridge_head(z, y, 3, penalty=penalty)
    with pytest.raises(ValueError, match=r"penalty: got -0.1"):
        logistic_head(z, y, 3, penalty=-0.1)
    with pytest.raises(ValueError, match=r"weights: got shape \(4,\) for 10 examples"):
        inspect.unwrap(logistic_head)(z, y, 3, weights=np.ones(4, np.float32))


# --- Heads from another label set -----------------------------------------------------------------


def test_a_mapped_head_averages_related_classes_and_is_random_elsewhere():
    rng = np.random.default_rng(0)
    old = {"kernel": jnp.asarray(rng.normal(size=(200, 4)), jnp.float32), "bias": jnp.arange(4.0)}
    new = jax.device_get(mapped_head(old, {0: 3, 2: (0, 1), np.int64(3): [2]}, 5, KEY))
    kernel = np.asarray(old["kernel"])
    np.testing.assert_array_equal(new["kernel"][:, 0], kernel[:, 3])
    np.testing.assert_allclose(new["kernel"][:, 2], (kernel[:, 0] + kernel[:, 1]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(new["bias"], [3, 0, 0.5, 2, 0])
    random = new["kernel"][:, [1, 4]]
    np.testing.assert_allclose(random.std(0), 200**-0.5, rtol=0.2)
    assert not np.array_equal(
        random, np.asarray(mapped_head(old, {}, 5, jax.random.key(1))["kernel"])[:, [1, 4]]
    )
    # For related classes, its outputs are those of the old head.
    z = rng.normal(size=(6, 200)).astype(np.float32)
    np.testing.assert_allclose((z @ new["kernel"])[:, 0], (z @ kernel)[:, 3], rtol=1e-5)


def test_unknown_classes_of_a_mapping_are_rejected():
    old = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    for mapping, message in (
        ({2: 0}, "got the target class 2; there are 2"),
        ({-1: 0}, "got the target class -1"),
        ({0: 3}, r"source classes \[3\] for target class 0; there are 3"),
        ({0: (0, -1)}, r"source classes \[0, -1\]"),
        ({0: ()}, r"source classes \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            mapped_head(old, mapping, 2, KEY)


# --- The classifier -------------------------------------------------------------------------------


BODY = jm.nn.MLP(out=5, hidden=(6,), norm=True, kernel_init=jax.nn.initializers.lecun_normal())


@pytest.fixture(scope="module")
def trained():
    model = classifier(BODY, 3)
    return model, initialised(model, np.zeros((2, 4, 4, 1), np.float32))


@pytest.fixture(scope="module")
def known_outputs(trained):
    """Return eleven images as bytes and as floats, and their logits and features from one batch."""
    model, variables = trained
    x = np.random.default_rng(0).integers(0, 256, (11, 4, 4, 1), np.uint8)
    floats = (x / 255).astype(np.float32)
    both = jax.jit(lambda variables, x: (model.apply(variables, x), model.features.apply(variables, x)))
    return x, floats, *jax.device_get(both(variables, floats))


@pytest.mark.nightly_rows(after=2)
@pytest.mark.parametrize("batch", [4, 100, 1, 7, 11])
def test_outputs_do_not_depend_on_the_batch_size_and_bytes_are_scaled_to_zero_to_one(
    trained, known_outputs, batch
):
    model, variables = trained
    x, floats, known_logits, known_features = known_outputs
    for inputs in (x, floats):
        logits = np.asarray(predict_logits(model, variables, inputs, batch=batch))
        np.testing.assert_allclose(logits, known_logits, rtol=1e-5, atol=1e-6)
        features = np.asarray(extract_features(model, variables, inputs, batch=batch))
        np.testing.assert_allclose(features, known_features, rtol=1e-5, atol=1e-6)
    head = jax.device_get(variables["params"]["head"])
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], logits, rtol=1e-4, atol=1e-6)


def test_progress_counts_the_examples_of_each_batch(trained, known_outputs):
    model, variables = trained
    x = known_outputs[0][:10]
    for compute in (predict_logits, extract_features):
        calls = []
        counted = compute(model, variables, x, batch=4, progress=lambda *call, to=calls: to.append(call))
        assert calls == [(4, 10), (8, 10), (10, 10)]
        np.testing.assert_array_equal(counted, compute(model, variables, x, batch=4))
        with raises_argument_error("progress: got 3"):
            compute(model, variables, x, progress=3)


def test_accuracy_and_confusion_equal_scikit_learns(trained):
    model, variables = trained
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 4, 4, 1)), jnp.float32)
    y = np.arange(40) % 3
    predictions = np.asarray(jax.jit(model.apply)(variables, x)).argmax(1)
    result = accuracy(model, variables, jm.Batch(x, jnp.asarray(y)), batch=16)
    np.testing.assert_allclose(result, accuracy_score(y, predictions), rtol=1e-6)
    np.testing.assert_array_equal(
        confusion_matrix(predictions, y, 4), known_confusion(y, predictions, labels=range(4))
    )
    with_nan = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), variables)
    assert accuracy(model, with_nan, jm.Batch(x, jnp.zeros(40, jnp.int32)), batch=16) == 0


def test_with_body_takes_the_body_and_its_statistics_and_nothing_else(trained):
    model, variables = trained
    body = jm.nn.as_stateful(BODY)
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 1)).astype(np.float32)
    learned = jax.device_get(initialised(body, x, 1))
    learned = jax.tree.map(lambda leaf: jnp.asarray(leaf + np.float32(0.5)), learned)
    filled = with_body(variables, learned)
    features, known = (
        jax.jit(apply)(v, x) for apply, v in ((model.features.apply, filled), (body.apply, learned))
    )
    np.testing.assert_allclose(features, known, rtol=1e-6)
    assert filled["params"]["head"]["kernel"] is variables["params"]["head"]["kernel"]
    for wrong, message in (
        ({"batch_stats": learned["batch_stats"]}, "must have 'params'"),
        ({"params": learned["params"]}, r"got the collections \['params'\]; they must be those of the body"),
        ({**learned, "cache": {"a": 1.0}}, "cache"),
        ({**learned, "params": {**learned["params"], "extra": 1.0}}, "extra"),
        ({**learned, "params": jax.tree.map(lambda leaf: leaf[..., :2], learned["params"])}, "shape|got"),
    ):
        with pytest.raises(ValueError, match=message):
            with_body(variables, wrong)


def test_bad_arguments_of_classifiers_are_rejected_with_their_name(trained):
    model, variables = trained
    with pytest.raises(ValueError, match="classes: got 1"):
        classifier(BODY, 1)
    wide = classifier((lambda key, x: {}, lambda params, x: x), 3)
    with pytest.raises(ValueError, match=r"body: returns shape \(2, 4, 5\) for 2 examples"):
        wide.init(KEY, jnp.zeros((2, 4, 5)))
    with pytest.raises(ValueError, match="model: has no features"):
        extract_features(model.features, variables, jnp.zeros((2, 4, 4, 1)))
    with pytest.raises(ValueError, match="batch: got 0"):
        predict_logits(model, variables, jnp.zeros((2, 4, 4, 1)), batch=0)
    with pytest.raises(ValueError, match="x: got no examples"):
        in_batches(model.apply, variables, jnp.zeros((0, 4, 4, 1)))
    confusion = partial(confusion_matrix, classes=3)
    for predictions, labels, message in (
        ([0, 1], [0, 1, 2], "predictions"),
        ([0, 3], [0, 1], "predictions: got classes from 0 to 3"),
        ([0, 1], [-1, 1], "labels: got classes from -1 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            confusion(np.array(predictions), np.array(labels))
