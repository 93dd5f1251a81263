"""Labels without a class slot are refused by every learner, wherever their values are concrete."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta as jm
from jaxmeta import transfer
from jaxmeta.checks import ArgumentError, check_labels, check_slots
from jaxmeta.cli import names
from jaxmeta.core import with_slot_checks
from jaxmeta.training.step import stream_batches

KEY = jax.random.key(0)
WAYS = 3
X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
Y = np.array([0, 1, 2, 0, 1, 2], np.int32)


def vector_learner(name):
    """Build a learner of vectors with small networks of the kind that it works with."""
    factory = names.find("learner", name, names.LEARNERS)
    if name == "mann":
        return factory(jm.nn.MemoryNetwork(WAYS, jm.nn.LRUA(rows=4, width=3, heads=1), hidden=3))
    if name == "metanet":
        network = functools.partial(jm.nn.AugmentedCNN, filters=2, blocks=1, features=3)
        return factory(network(), network(WAYS))
    if name == "relation":
        maps = (lambda key, x: {}, lambda params, x: x.reshape(x.shape[0], 2, 2, 1))
        scores = (lambda key, x: jnp.ones(()), lambda params, x: params * x.mean((1, 2, 3))[:, None])
        return factory(maps, scores)
    embeds = not jm.declare.facts_of(factory).head
    return factory(jm.nn.MLP(out=2 if embeds else WAYS, hidden=(3,)))


def batch(y, ways=WAYS, name="", mask=None):
    x = np.tile(X[:, :, None, None], (1, 1, 4, 1)) if name == "metanet" else X
    y = jnp.asarray(y, jnp.int32) if not isinstance(y, np.ndarray) else y
    return jm.Batch(jnp.asarray(x), y, mask=mask, ways=ways)


@functools.cache
def learner_and_params(name):
    learner, good = vector_learner(name), batch(Y, name=name)
    shapes = jax.eval_shape(learner.init, KEY, jm.Task(good, good))
    return learner, jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype), shapes)


@pytest.mark.parametrize("name", names.LEARNERS)
def test_learners_refuse_labels_without_a_slot(name):
    learner, params = learner_and_params(name)
    good = batch(Y, name=name)
    for y, ways, message in (
        (Y - 1, WAYS, "from -1 to 1"),
        (Y + 1, WAYS, "from 1 to 3"),
        (jnp.asarray(Y + 1), None, "from 1 to 3; they must be counted from 0"),
        (np.where(Y == 2, -7, Y), None, "from -7 to 1"),
        (np.where(Y == 2, 77, Y).astype(np.uint8), WAYS, "from 0 to 77"),
    ):
        wrong = batch(y, ways, name)
        with pytest.raises(ArgumentError, match=f"support: got classes {message}"):
            learner.adapt(params, wrong, KEY)
        with pytest.raises(ArgumentError, match=f"support: got classes {message}"):
            learner.loss(params, jm.Task(wrong, good), KEY)
        with pytest.raises(ArgumentError, match="query: got classes" if ways else "support: got"):
            learner.loss(params, jm.Task(good if ways else wrong, wrong), KEY)


@pytest.mark.parametrize("name", ["maml", "prototypical"])
def test_labels_of_padding_may_have_any_value(name):
    learner, params = learner_and_params(name)
    mask = np.arange(6) < 3
    padded = batch(np.where(mask, Y, -1), mask=mask)
    with_zeros = batch(np.where(mask, Y, 0), mask=mask)
    result, expected = (learner.adapt(params, part, KEY) for part in (padded, with_zeros))
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_gradient_learners_compare_labels_with_outputs_without_ways():
    # With mini-batches, labels are traced inside the inner loop.
    learner = jm.maml(jm.nn.MLP(out=WAYS, hidden=()), inner_batch=2)
    good = batch(Y)
    params = learner.init(KEY, jm.Task(good, good))
    with pytest.raises(ArgumentError, match="support: got classes from 0 to 3; they must be from 0 to 2"):
        learner.adapt(params, batch(np.where(Y == 2, 3, Y), None), KEY)
    learner.adapt(params, batch(Y, None), KEY)


def test_compiled_functions_do_not_check_values():
    learner, params = learner_and_params("ridge")
    wrong = batch(Y + 1)
    adapt = jax.jit(learner.adapt)
    jaxpr = str(jax.make_jaxpr(learner.adapt)(params, wrong, KEY))
    assert "callback" not in jaxpr
    # Examples with other labels count as padding.
    labels = adapt(params, wrong, KEY)["labels"]
    assert labels.sum(0).tolist() == [0, 2, 2]
    jax.vmap(learner.adapt, (None, 0, None))(params, jax.tree.map(lambda leaf: leaf[None], wrong), KEY)
    # Constants in a compiled function are concrete and checked.
    with pytest.raises(ArgumentError, match="support"):
        jax.jit(lambda params: learner.adapt(params, batch(Y + 1), KEY))(params)


def test_checks_are_added_to_a_learner_once():
    learner, _ = learner_and_params("matching")
    assert with_slot_checks(learner) is learner


def test_losses_and_scores_refuse_labels_without_an_output():
    outputs = jnp.zeros((6, WAYS))
    for y in (Y - 1, Y + 1):
        with pytest.raises(ArgumentError, match="labels"):
            jm.losses.cross_entropy(outputs, jnp.asarray(y))
        with pytest.raises(ArgumentError, match="batch"):
            jm.losses.score(outputs, batch(y))
        kept = (y >= 0) & (y < WAYS)
        jm.losses.score(outputs, batch(y, mask=jnp.asarray(kept)))
        jm.losses.cross_entropy(outputs, jnp.asarray(y), jnp.asarray(kept))


def test_labels_of_other_processes_and_other_types_are_not_checked():
    class Elsewhere:
        is_fully_addressable, dtype = False, np.dtype(np.int32)

    check_slots("y", Elsewhere(), 2)
    check_slots("y", np.array([-1.0, 0.5]), 2)
    check_slots("y", np.zeros(0, np.int32), None)
    check_labels("y", np.array([3, 1]), 2, 3, np.array([False, True]))
    with pytest.raises(ArgumentError, match="y: got classes from 3 to 3"):
        check_slots("y", np.array([[3, 1], [0, 3]]), 3, np.array([[True, False], [False, True]]))


# --- Evaluation and training -----------------------------------------------------------------------


def tasks_with_labels(support_y, query_y):
    """Return a learner of vectors, its parameters, and tasks of which about half have the given labels."""
    learner, params = learner_and_params("prototypical")

    def draw(labels, key):
        x = jax.random.normal(key, (6, 4))
        parts = (jnp.where(x[0, 0] > 0, jnp.asarray(y), Y) for y in labels)
        return jm.Task(*(jm.Batch(x, y, ways=WAYS) for y in parts))

    sample = jax.tree_util.Partial(draw, (support_y, query_y))
    return learner, params, jm.TaskDistribution(sample, jm.ProtocolCard("toy", "test"))


@pytest.mark.parametrize("part", ["support", "query"])
def test_a_compiled_evaluation_refuses_labels_without_a_slot(part):
    wrong = np.where(Y == 2, 3, Y)
    labels = (wrong, Y) if part == "support" else (Y, Y - 1)
    learner, params, tasks = tasks_with_labels(*labels)
    with pytest.raises(
        ArgumentError, match=r"tasks: got a class slot without an output in \d+ of 8 episodes"
    ):
        jm.evaluate(learner, params, tasks, episodes=8, key=KEY)
    learner, params, tasks = tasks_with_labels(Y, Y)
    assert jm.evaluate(learner, params, tasks, episodes=8, key=KEY).episodes == 8


def test_streams_are_checked_on_the_host():
    def at(step):
        y = np.stack([Y, Y + (step == 1)])
        part = jm.Batch(np.stack([X, X]), y, ways=WAYS)
        return jm.Task(part, part)

    stream = jm.TaskStream(at, jm.ProtocolCard("toy", "train"))
    with stream_batches(stream, 0) as batches:
        next(batches)
        with pytest.raises(ArgumentError, match="tasks: got classes from 0 to 3"):
            next(batches)


# --- Transfer ---------------------------------------------------------------------------------------

MODEL = transfer.classifier(jm.nn.MLP(out=4, hidden=()), WAYS)
FIT = {"optimizer": optax.sgd(0.1), "steps": 2, "key": KEY}


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODEL.init)(KEY, X)


def transfer_calls(variables):
    def head(features, labels, classes):
        return {"kernel": jnp.zeros((features.shape[1], classes)), "bias": jnp.zeros(classes)}

    def data(y):
        return jm.Batch(X, y)

    return {
        "fine_tune": ("data", lambda y: transfer.fine_tune(MODEL, variables, data(y), **FIT)),
        "linear probe": ("data", lambda y: transfer.feature_extraction(MODEL, variables, data(y))),
        "head": ("data", lambda y: transfer.feature_extraction(MODEL, variables, data(y), head=head)),
        "lp_ft": (
            "data",
            lambda y: transfer.linear_probe_then_fine_tune(MODEL, variables, data(y), **FIT),
        ),
        "gradual": (
            "data",
            lambda y: transfer.gradual_unfreezing(
                MODEL, variables, data(y), ["body", "head"], stage_steps=10, key=KEY
            ),
        ),
        "align": (
            "source",
            lambda y: transfer.align(MODEL, variables, data(y), X, transfer.coral(), **FIT),
        ),
        "accuracy": ("batch", lambda y: transfer.accuracy(MODEL, variables, data(y))),
        "ridge_head": ("labels", lambda y: transfer.ridge_head(X, y, WAYS)),
        "logistic_head": ("labels", lambda y: transfer.logistic_head(X, y, WAYS)),
    }


@pytest.mark.parametrize("call", transfer_calls(None))
def test_transfer_refuses_labels_without_a_class(call, variables):
    name, function = transfer_calls(variables)[call]
    for y, message in (
        (Y - 1, "-1 to 1"),
        (Y + 1, "1 to 3"),
        (np.where(Y == 1, 9, Y), "0 to 9"),
    ):
        with pytest.raises(ArgumentError, match=f"{name}: got classes from {message}"):
            function(jnp.asarray(y))


def test_a_user_defined_loss_may_take_any_integers(variables):
    def loss(outputs, y):
        return jnp.abs(outputs.sum(1) - y)

    transfer.fine_tune(MODEL, variables, jm.Batch(X, jnp.asarray(Y - 5)), loss=loss, **FIT)


def test_scores_and_class_arrays_refuse_labels_below_0():
    for score in (transfer.log_me, transfer.h_score):
        with pytest.raises(ArgumentError, match="labels"):
            score(X, Y - 1)
    with pytest.raises(ArgumentError, match="y: got 2 negative labels"):
        jm.tasks.from_arrays(X, Y - 1, ways=2, shots=1)
    jm.tasks.from_arrays(X, (Y - 1).astype(str), ways=2, shots=1)
