"""Tests of devices that share the examples of a task: same results as on one device."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import jaxmeta as jm
from jaxmeta.training import sharding

CLASSES, PER_CLASS = 12, 5


def normalised_mlp():
    return jm.nn.MLP(None, (8,), norm=True)


# Functions by name that return a learner and the side of its images.
LEARNERS = {
    "prototypical": lambda: (jm.prototypical(normalised_mlp()), 4),
    "prototypical by the support set": lambda: (jm.prototypical(normalised_mlp(), norm="support"), 4),
    "matching with full context embeddings": lambda: (jm.matching(normalised_mlp(), context_steps=2), 4),
    "siamese": lambda: (jm.siamese(normalised_mlp()), 4),
    "simple_shot, centred": lambda: (jm.simple_shot(normalised_mlp()), 4),
    "ridge": lambda: (jm.ridge(normalised_mlp()), 4),
    "prototypical, convolutions": lambda: (jm.prototypical(jm.nn.Conv4(filters=4)), 28),
    "relation, convolutions": lambda: (
        jm.relation(jm.nn.RelationEmbedding(4), jm.nn.RelationModule(4)),
        28,
    ),
    "ridge, strided convolutions": lambda: (jm.ridge(jm.nn.StridedConv4(filters=4)), 28),
}


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices (jax_num_cpu_devices)")


def traced_step(learner, side, meta_batch, devices, *, ways=4, shots=1, queries=2, strategy="auto"):
    """Return a function that creates the initial state, the tasks, and the traced meta-step."""
    x = np.random.default_rng(0).random((CLASSES * PER_CLASS, side, side, 1), np.float32)
    tasks = jm.tasks.from_arrays(
        x, np.repeat(np.arange(CLASSES), PER_CLASS), ways=ways, shots=shots, queries=queries
    )
    optimizer = optax.sgd(1.0)

    def init():
        return jm.init_state(learner, optimizer, tasks, jax.random.key(1))

    step = jm.meta_step(learner, optimizer, meta_batch, strategy, devices=jax.devices()[:devices])
    return init, tasks, jax.jit(step).trace(jax.eval_shape(init), tasks.sample)


@cache
def meta_gradient(name, meta_batch, devices, **settings):
    """Return the meta-gradient, the metrics and the jaxpr of one step."""
    init, tasks, traced = traced_step(*LEARNERS[name](), meta_batch, devices, **settings)
    state = init()
    after, metrics = traced.lower().compile()(state, tasks.sample)
    gradient = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, after.params)
    return gradient, metrics, str(traced.jaxpr)


def assert_same(actual, expected):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        where = jax.tree_util.keystr(path)
        # The absolute tolerance is for entries that are zero up to rounding, such as the gradient of a bias
        # before normalisation.
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5 + 1e-4 * np.abs(b).max(), err_msg=where)


# Sharding of examples is independent of the learner, so that one learner suffices in the default run; that
# examples are sharded at all is tested for each.
IN_THE_DEFAULT_RUN = ("prototypical",)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in IN_THE_DEFAULT_RUN else pytest.mark.nightly)
        for name in LEARNERS
    ],
)
def test_two_devices_on_one_task_give_the_meta_gradient_of_one(name):
    actual, metrics, text = meta_gradient(name, 1, 2)
    expected, expected_metrics, _ = meta_gradient(name, 1, 1)
    # Each device embeds its share of the examples, not all of them.
    assert "all_gather" in text
    assert_same(actual, expected)
    assert_same(metrics, expected_metrics)


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize(
    "name", [name for name in LEARNERS if name not in IN_THE_DEFAULT_RUN and "convolutions" not in name]
)
def test_two_devices_on_one_task_share_its_examples(name):
    assert "all_gather" in str(traced_step(*LEARNERS[name](), 1, 2)[2].jaxpr)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("shots", "queries"),
    [
        ((1, 2), 2),
        (1, 2),
        (1, 4),
    ],
)
def test_odd_numbers_of_examples_and_padding_give_the_meta_gradient_of_one_device(shots, queries):
    # 3 to 5 classes of 3 to 5 examples: an odd number of examples, or padding in the middle.
    settings = {"ways": (3, 5), "shots": shots, "queries": queries}
    actual, expected = (meta_gradient("prototypical", 1, devices, **settings)[0] for devices in (2, 1))
    assert_same(actual, expected)


@pytest.mark.nightly
def test_devices_share_each_of_three_successive_tasks():
    actual, expected = (meta_gradient("prototypical", 3, devices)[:2] for devices in (2, 1))
    assert_same(actual, expected)


def test_as_many_devices_as_tasks_share_no_examples():
    assert "all_gather" not in str(traced_step(*LEARNERS["prototypical"](), 2, 2)[2].jaxpr)


@pytest.mark.nightly
def test_training_on_more_devices_than_tasks_gives_the_parameters_of_one_device():
    x = np.random.default_rng(0).random((CLASSES * PER_CLASS, 4, 4, 1), np.float32)
    tasks = jm.tasks.from_arrays(x, np.repeat(np.arange(CLASSES), PER_CLASS), ways=4, shots=1, queries=2)
    settings = {"steps": 3, "key": jax.random.key(0), "meta_batch": 1, "validation": tasks}
    settings |= {"validation_episodes": 5, "validate_every": 3}
    learner = jm.prototypical(normalised_mlp())

    def params(count):
        return jm.train(learner, tasks, optax.sgd(0.1), devices=jax.devices()[:count], **settings).params

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), params(1), params(2))


class Mixing(linen.Module):
    """A network whose outputs depend on other examples not only through the moments of `BatchNorm`."""

    @linen.compact
    def __call__(self, x):
        z = linen.Dense(3)(x.reshape(x.shape[0], -1))
        return z - z.mean(0, keepdims=True)


@pytest.mark.parametrize(
    "learner",
    [jm.prototypical(Mixing()), jm.maml(jm.nn.MLP(4, (8,)), inner_optimizer=optax.sgd(0.1), inner_steps=1)],
    ids=["a network that mixes examples", "an inner loop"],
)
def test_learners_that_are_not_divisible_are_refused(learner):
    with pytest.raises(ValueError, match="devices: got 2 of them, which must divide the 1 tasks"):
        traced_step(learner, 4, 1, 2)


def test_the_mesh_splits_tasks_first():
    device = jax.devices()[0]
    for tasks, devices, shape in ((1, 4, (1, 4, 1)), (6, 4, (2, 2, 1)), (8, 4, (4, 1, 1)), (3, 2, (1, 2, 1))):
        assert sharding.task_mesh(tasks, [device] * devices, divisible=True).devices.shape == shape


def test_outside_of_a_mesh_there_is_one_shard():
    assert jm.nn.shared.num_shards() == 1
    x = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_allclose(jm.nn.norm.moments(x)[0], x.mean(0))
