"""Alignment of two domains: gradients by hand, statistics by domain, and accuracy on a toy shift."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from variables import assert_close, initialised, record_keys, same_bits

import jaxmeta as jm
from jaxmeta.transfer import accuracy, align, coral, dann, fine_tune, leaves_by_path, mmd

KEY = jax.random.key(0)
INIT = linen.initializers.lecun_normal()


class Net(linen.Module):
    """A layer with batch normalisation and dropout."""

    ours: bool = True
    rate: float = 0.3

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(8, name="dense")(x)
        if self.ours:
            x = jm.nn.BatchNorm(epsilon=1e-5, name="norm")(x)
        else:
            x = linen.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return linen.Dropout(self.rate, deterministic=not train)(jax.nn.relu(x))


def blobs(seed, n, shift=0.0):
    """Return two classes that differ in both coordinates; `shift` moves the less informative one."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % 2)
    x = 0.3 * rng.normal(size=(n, 2)) + np.array([[-1, -0.5], [1, 0.5]])[y] + [0, shift]
    return jm.Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))


SOURCE, TARGET = blobs(0, 64), blobs(1, 48, 3.0)
CORAL = coral()
SETTINGS = {"steps": 4, "key": KEY, "batch_size": 16}


@pytest.fixture(params=["jaxmeta", "flax"])
def model(request):
    return jm.transfer.classifier(Net(request.param == "jaxmeta"), 2)


# --- Against source-only training, and statistics -------------------------------------------------


def assert_every_leaf_moved(before, after):
    old, new = leaves_by_path(before), leaves_by_path(after)
    assert [path for path in old if np.array_equal(old[path], new[path])] == []


@pytest.mark.nightly_rows(after=1)
def test_with_weight_zero_alignment_is_training_on_the_source_alone(model):
    """With one key, both trainings have the same batches, dropout and weights of the source examples."""
    variables = initialised(model, SOURCE.x)
    before = jax.tree.map(np.array, variables)
    weights = np.linspace(0.5, 1.5, 64).astype(np.float32)
    settings = {**SETTINGS, "optimizer": optax.adam(0.01), "weights": weights}
    known = fine_tune(model, variables, SOURCE, **settings)
    result = align(model, variables, SOURCE, TARGET.x, coral(0.0), norm="separate", **settings)
    assert_close(result.losses, known.losses, 1e-5)
    assert_close(result.source, known.variables, 1e-5)
    # The target's statistics come from its own batches, whose means before the normalisation differ.
    assert_close(result.target["params"], known.variables["params"], 1e-5)
    apart = (
        result.target["batch_stats"]["body"]["norm"]["mean"]
        - result.source["batch_stats"]["body"]["norm"]["mean"]
    )
    assert np.abs(apart).max() > 0.1
    assert same_bits(variables, before)
    assert_every_leaf_moved(before, result.target)


@pytest.mark.nightly_rows(after=1)
def test_batch_statistics_are_separate_or_joint(model):
    variables = initialised(model, SOURCE.x)
    # One step with all examples at rate 0: the statistics are those of the whole domains.
    settings = {"optimizer": optax.sgd(0.0), "steps": 1, "key": KEY, "batch_size": 64}
    hidden = variables["params"]["body"]["dense"]

    def after_one(x):
        entering = np.asarray(x) @ np.asarray(hidden["kernel"]) + np.asarray(hidden["bias"])
        return {"mean": 0.1 * entering.mean(0), "var": 0.9 + 0.1 * entering.var(0)}

    def running(result):
        return result["batch_stats"]["body"]["norm"]

    # 48 target and 64 source examples: the step has all of them.
    separate = align(model, variables, SOURCE, TARGET.x, CORAL, norm="separate", **settings)
    assert_close(running(separate.source), after_one(SOURCE.x), 1e-5)
    assert_close(running(separate.target), after_one(TARGET.x), 1e-5)
    joint = align(model, variables, SOURCE, TARGET.x, CORAL, norm="joint", **settings)
    assert same_bits(joint.source, joint.target)
    assert_close(running(joint.target), after_one(np.concatenate([SOURCE.x, TARGET.x])), 1e-5)
    # Joint statistics give other features and so another loss.
    assert abs(np.asarray(separate.losses - joint.losses)) > 1e-3


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("norm", ["separate", "joint"])
def test_frozen_parameters_and_statistics_stay_in_both_domains(model, norm):
    variables = initialised(model, SOURCE.x)
    variables["batch_stats"] = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    result = align(
        model,
        variables,
        SOURCE,
        TARGET.x,
        dann(hidden=(4,)),
        train="head",
        norm=norm,
        optimizer=optax.adamw(0.1, weight_decay=0.5),
        **SETTINGS,
    )
    for side in (result.source, result.target):
        assert same_bits(side["params"]["body"], variables["params"]["body"])
        assert same_bits(side["batch_stats"], variables["batch_stats"])
        assert not np.array_equal(side["params"]["head"]["kernel"], variables["params"]["head"]["kernel"])


def test_losses_of_coral_and_mmd_are_their_weighted_discrepancies():
    @jax.jit
    def computed_and_expected(source, target):
        whole = jm.transfer.coral_loss(source, target, variant="mean+cov")
        pairs = {
            coral(0.3): 0.3 * jm.transfer.coral_loss(source, target),
            coral(2.0, variant="mean+cov"): 2 * whole,
            mmd(0.3, bandwidth=0.7): 0.3 * jm.transfer.mmd2(source, target, bandwidth=0.7),
        }
        return [
            (alignment.loss({}, source, target, jnp.array(0.5)), known) for alignment, known in pairs.items()
        ]

    for actual, known in computed_and_expected(SOURCE.x, TARGET.x):
        np.testing.assert_allclose(actual, known, rtol=1e-6)
    assert coral().init(KEY, 2) == mmd().init(KEY, 2) == {}


# --- DANN -----------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("alignment", [dann(hidden=(4,)), coral(), mmd()], ids=["dann", "coral", "mmd"])
def test_training_in_pieces_equals_uninterrupted_training_bit_for_bit(model, alignment):
    """λ depends on the progress of the whole training, not on that of a piece."""
    variables = initialised(model, SOURCE.x)
    settings = {**SETTINGS, "steps": 6, "optimizer": optax.sgd(0.1, momentum=0.9)}
    whole = align(model, variables, SOURCE, TARGET.x, alignment, **settings)
    steps, seen, reports = [], [], []
    pieces = align(
        model,
        variables,
        SOURCE,
        TARGET.x,
        alignment,
        **settings,
        every=4,
        callback=lambda step, result: (steps.append(step), seen.append(result)),
        report=lambda step, loss: reports.append((step, loss)),
    )
    assert same_bits(whole, pieces)
    assert steps == [4, 6]
    assert reports == [(4, float(whole.losses[3])), (6, float(whole.losses[5]))]
    assert same_bits((seen[-1].source, seen[-1].target), (whole.source, whole.target))
    assert not same_bits(seen[0].target, whole.target)
    assert not same_bits(
        whole.losses,
        align(model, variables, SOURCE, TARGET.x, alignment, **{**settings, "key": jax.random.key(1)}).losses,
    )


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_dann_descends_and_ascends_by_the_gradients_of_the_papers_two_losses(weight, x64):
    """In two steps, λ is 0 in the first and belongs to progress ½ in the second."""

    def to64(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), tree)

    model = jm.transfer.classifier(jm.nn.MLP(out=3, hidden=(4,), kernel_init=INIT), 2)
    source, target = (jnp.asarray(np.asarray(batch.x, np.float64)) for batch in (SOURCE, TARGET))
    params = to64(initialised(model, source)["params"])
    alignment = dann(hidden=(5,), weight=weight)
    heads = []

    def init(key, dim):
        # Larger weights than the default's, which would pass almost no gradient on.
        own = to64(jax.tree.map(lambda leaf: 50 * np.asarray(leaf, np.float64), alignment.init(key, dim)))
        heads.append(own)
        return own

    rate, steps = 0.1, 2
    result = align(
        model, {"params": params}, jm.Batch(source, SOURCE.y), target, alignment._replace(init=init),
        optimizer=optax.sgd(rate), steps=steps, key=KEY, batch_size=64,
    )  # fmt: skip

    def features(body, x):
        hidden = jnp.maximum(x @ body["Dense_0"]["kernel"] + body["Dense_0"]["bias"][None], 0)
        return hidden @ body["head"]["kernel"] + body["head"]["bias"][None]

    def of_labels(params):
        logits = features(params["body"], source) @ params["head"]["kernel"] + params["head"]["bias"][None]
        return -jax.nn.log_softmax(logits)[jnp.arange(64), SOURCE.y].mean()

    def of_domains(body, head):
        s, t = (jax.nn.sigmoid(features(head, features(body, x))[:, 0]) for x in (source, target))
        return -(jnp.log(1 - s).mean() + jnp.log(t).mean()) / 2

    @jax.jit
    def gradients(params, head):
        by_labels = jax.value_and_grad(of_labels)(params)
        return by_labels, jax.value_and_grad(of_domains, (0, 1))(params["body"], head)

    head, losses = heads[0], []
    for step in range(steps):
        strength = weight * (2 / (1 + np.exp(-10 * step / steps)) - 1)
        (label_loss, by_labels), (domain_loss, (by_body, by_head)) = jax.device_get(gradients(params, head))
        losses.append(label_loss + domain_loss)
        body = jax.tree.map(lambda g, d, s=strength: g - s * d, by_labels["body"], by_body)
        moves = {"body": body, "head": by_labels["head"]}
        params = jax.tree.map(lambda w, g: np.asarray(w) - rate * g, params, moves)
        head = jax.tree.map(lambda w, g: np.asarray(w) - rate * g, head, by_head)
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(by_body)) > 1e-3
    assert_close(result.losses, np.array(losses), 1e-9)
    assert_close(result.target["params"], params, 1e-9)


# --- Effect on the target --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source_only():
    """Return a network trained on the source; normalisation would align the first two moments."""
    model = jm.transfer.classifier(jm.nn.MLP(out=8, hidden=(8,), kernel_init=INIT), 2)
    key = jax.random.key(1)
    variables = initialised(model, SOURCE.x, 1)
    settings = {"optimizer": optax.adam(0.02), "steps": 150, "key": key, "batch_size": 32}
    fitted = fine_tune(model, variables, SOURCE, **settings)
    assert accuracy(model, fitted.variables, SOURCE) > 0.95
    assert accuracy(model, fitted.variables, TARGET) < 0.75
    return model, variables, fitted.variables, settings


@pytest.mark.nightly
@pytest.mark.parametrize(
    "alignment",
    [coral(variant="mean+cov"), mmd(3.0), dann(hidden=(16,))],
    ids=["coral", "mmd", "dann"],
)
def test_alignment_brings_domains_together_and_classifies_the_target_better(source_only, alignment):
    model, start, plain, settings = source_only
    result = align(model, start, SOURCE, TARGET.x, alignment, **settings)

    @jax.jit
    def apart(variables):
        source, target = (model.features.apply(variables, x) for x in (SOURCE.x, TARGET.x))
        # In units of the source's spread, since shrinking all features does not align them.
        scale = source.std()
        return jm.transfer.mmd2(source / scale, target / scale)

    assert apart(result.target) < 0.5 * apart(plain)
    assert accuracy(model, result.target, TARGET) > 0.95
    assert accuracy(model, result.source, SOURCE) > 0.95


@pytest.mark.nightly
def test_separate_batch_statistics_alone_align_the_target():
    model = jm.transfer.classifier(Net(rate=0.0), 2)
    settings = {"optimizer": optax.adam(0.02), "steps": 100, "key": KEY, "batch_size": 32}
    result = align(model, initialised(model, SOURCE.x), SOURCE, TARGET.x, coral(0.0), **settings)
    own, sources = accuracy(model, result.target, TARGET), accuracy(model, result.source, TARGET)
    assert own > 0.95
    assert own > sources + 0.1


@pytest.fixture(scope="module")
def small():
    model = jm.transfer.classifier(jm.nn.MLP(out=3, hidden=(4,), kernel_init=INIT), 2)
    settings = {"optimizer": optax.sgd(0.1), "steps": 3, "key": KEY, "batch_size": 64}
    return model, initialised(model, SOURCE.x), settings


@pytest.mark.nightly
def test_weights_count_for_the_source_as_in_fine_tuning(small):
    model, variables, settings = small
    weights = np.linspace(0.5, 1.5, 64).astype(np.float32)
    result = align(model, variables, SOURCE, TARGET.x, coral(0.0), weights=weights, **settings)
    known = fine_tune(model, variables, SOURCE, weights=weights, **settings)
    assert_close(result.source, known.variables, 1e-5)


@pytest.mark.nightly
def test_augmentation_applies_to_both_domains(small):
    model, variables, settings = small
    moved = align(model, variables, SOURCE, TARGET.x, CORAL, augment=lambda key, x: 2 * x + 1, **settings)
    before = align(
        model, variables, jm.Batch(2 * SOURCE.x + 1, SOURCE.y), 2 * TARGET.x + 1, CORAL, **settings
    )
    assert_close(moved.target, before.target, 1e-5)


def test_augmentations_of_the_two_domains_have_different_keys(small):
    model, variables, settings = small
    keys, augment = record_keys()
    align(model, variables, SOURCE, TARGET.x, CORAL, augment=augment, **settings)
    assert len(set(keys())) == len(keys()) == 2 * settings["steps"]


# --- Bad input ------------------------------------------------------------------------------------


def test_bad_arguments_are_rejected_with_their_name(small):
    model, variables, settings = small

    def run(model=model, source=SOURCE, target=TARGET.x, **more):
        align(model, variables, source, target, CORAL, **{**settings, **more})

    for arguments, message in (
        ({"norm": "both"}, "norm: got 'both'; it must be one of 'separate', 'joint'"),
        ({"model": model.features}, "model: has no features"),
        ({"target": TARGET.x[:0]}, r"target: got shape \(0, 2\); it must be \(m, 2\) with m at least 1"),
        ({"target": jnp.ones((5, 3))}, r"target: got shape \(5, 3\); it must be \(m, 2\)"),
        ({"source": jm.Batch(SOURCE.x, SOURCE.y[:3])}, "source: got 64 examples and 3 labels"),
        ({"weights": np.ones(3, np.float32)}, r"weights: got shape \(3,\) for 64 examples"),
        ({"train": "haed"}, "train: 'haed' matches nothing"),
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"every": 0}, "every: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**arguments)
    with pytest.raises(ValueError, match="variant: got 'half'"):
        coral(variant="half")
    with pytest.raises(ValueError, match="estimator: got 'best'"):
        mmd(estimator="best")
    for alignment in (coral, mmd, lambda weight: dann(weight=weight)):
        with pytest.raises(ValueError, match="weight: got -1"):
            alignment(-1.0)
    with pytest.raises(FloatingPointError, match="the loss is nan in step 1, which no step size can change"):
        run(target=np.inf * TARGET.x)


@pytest.mark.nightly
def test_training_moves_every_leaf_and_leaves_the_given_variables_unchanged(model):
    variables = initialised(model, SOURCE.x)
    before = jax.tree.map(np.array, variables)
    result = align(model, variables, SOURCE, TARGET.x, mmd(), optimizer=optax.adam(0.1), **SETTINGS)
    assert same_bits(variables, before)
    assert_every_leaf_moved(before, result.target)
