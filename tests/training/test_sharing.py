"""Several devices that share the examples of a task give the result of one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import jaxmeta as jm
from jaxmeta.training import sharding

CLASSES, EACH = 12, 5
LEARNERS = {
    "prototypical": lambda: jm.prototypical(jm.nn.Conv4(filters=4)),
    "prototypical by the support set": lambda: jm.prototypical(jm.nn.Conv4(filters=4), norm="support"),
    "matching in full context": lambda: jm.matching(jm.nn.MLP(None, (8,), norm=True), context_steps=2),
    "siamese": lambda: jm.siamese(jm.nn.Conv4(filters=4)),
    "relation": lambda: jm.relation(jm.nn.RelationEmbedding(4), jm.nn.RelationModule(4)),
    "ridge": lambda: jm.ridge(jm.nn.StridedConv4(filters=4)),
}


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices (jax_num_cpu_devices)")


def meta_gradient(learner, meta_batch, devices, *, ways=4, shots=1, queries=2, strategy="auto"):
    rng = np.random.default_rng(0)
    x = rng.random((CLASSES * EACH, 28, 28, 1), np.float32)
    tasks = jm.tasks.from_arrays(
        x, np.repeat(np.arange(CLASSES), EACH), ways=ways, shots=shots, queries=queries
    )
    optimizer = optax.sgd(1.0)
    state = jm.init_state(learner, optimizer, tasks, jax.random.key(1))
    step = jm.meta_step(learner, optimizer, meta_batch, strategy, devices=jax.devices()[:devices])
    text = str(jax.make_jaxpr(step)(state, tasks.sample))
    after, metrics = jax.jit(step)(state, tasks.sample)
    return jax.tree.map(lambda a, b: np.asarray(a - b), state.params, after.params), metrics, text


def assert_same(found, expected):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        where = jax.tree_util.keystr(path)
        # Entries that are zero but for rounding, such as gradients of a bias before normalisation.
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5 + 1e-4 * np.abs(b).max(), err_msg=where)


@pytest.mark.parametrize("name", LEARNERS)
def test_two_devices_on_one_task(name):
    found, metrics, text = meta_gradient(LEARNERS[name](), 1, 2)
    expected, expected_metrics, _ = meta_gradient(LEARNERS[name](), 1, 1)
    assert "all_gather" in text  # and not each of the two all of it
    assert_same(found, expected)
    assert_same(metrics, expected_metrics)


@pytest.mark.parametrize(("shots", "queries"), [((1, 2), 2), (1, 2), (1, 4)])
def test_examples_that_do_not_divide_and_tasks_of_unequal_size(shots, queries):
    """5 or fewer classes of 3, 4 or 5 examples: an odd number, or one whose padding is in the middle."""
    settings = {"ways": (3, 5), "shots": shots, "queries": queries}
    learner = LEARNERS["prototypical"]()
    assert_same(meta_gradient(learner, 1, 2, **settings)[0], meta_gradient(learner, 1, 1, **settings)[0])


def test_three_tasks_one_after_another():
    learner = LEARNERS["prototypical"]()
    assert_same(meta_gradient(learner, 3, 2)[:2], meta_gradient(learner, 3, 1)[:2])


def test_as_many_devices_as_tasks_share_none():
    assert "all_gather" not in meta_gradient(LEARNERS["prototypical"](), 2, 2)[2]


def test_training_and_evaluation_on_more_devices_than_tasks(tmp_path):
    x = np.random.default_rng(0).random((CLASSES * EACH, 16, 16, 1), np.float32)
    tasks = jm.tasks.from_arrays(x, np.repeat(np.arange(CLASSES), EACH), ways=3, shots=1, queries=2)
    settings = {"steps": 3, "key": jax.random.key(0), "meta_batch": 1, "validation": tasks}
    settings |= {"validation_episodes": 5, "validate_every": 3}
    learner = jm.prototypical(jm.nn.Conv4(filters=4))

    def params(count):
        return jm.train(learner, tasks, optax.sgd(0.1), devices=jax.devices()[:count], **settings).params

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), params(1), params(2))


class Mixing(linen.Module):
    """Its examples meet elsewhere than in the moments."""

    @linen.compact
    def __call__(self, x):
        z = linen.Dense(3)(x.reshape(x.shape[0], -1))
        return z - z.mean(0, keepdims=True)


@pytest.mark.parametrize(
    "learner",
    [jm.prototypical(Mixing()), jm.maml(jm.nn.Conv4(4, filters=4), inner_optimizer=optax.sgd(0.1), steps=1)],
)
def test_what_cannot_be_shared_is_refused(learner):
    with pytest.raises(ValueError, match="devices: got 2 of them, which must divide the 1 tasks"):
        meta_gradient(learner, 1, 2)


def test_the_mesh_splits_tasks_first():
    device = jax.devices()[0]
    for tasks, devices, shape in ((1, 4, (1, 4, 1)), (6, 4, (2, 2, 1)), (8, 4, (4, 1, 1)), (3, 2, (1, 2, 1))):
        assert sharding.task_mesh(tasks, [device] * devices, divisible=True).devices.shape == shape


def test_a_share_is_its_own_outside_of_a_mesh():
    assert jm.nn.shared.sharers() == 1
    x = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_allclose(jm.nn.norm.moments(x)[0], x.mean(0))
