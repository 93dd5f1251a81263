"""Tests of device meshes: the result of a meta-step does not depend on the mesh.

JAX_NUM_CPU_DEVICES=8 pytest tests/training/test_mesh.py
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from jax.sharding import Mesh

import jaxmeta as jm
from jaxmeta.core import episode_keys
from jaxmeta.training import sharding

needs_eight = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs 8 devices: JAX_NUM_CPU_DEVICES=8 pytest tests/training/test_mesh.py"
)
KEY = jax.random.key(0)
BATCH = 8
MESHES = {
    "2 devices": {"tasks": 2},
    "8 devices": {"tasks": 8},
    "parameters over 2": {"tasks": 4, "params": 2},
    "parameters over 4": {"params": 4},
}


def glyphs():
    return jm.tasks.glyphs("train", ways=3, shots=1, queries=2)


def stored_images():
    """Return tasks of stored uint8 images."""
    x = np.random.default_rng(0).integers(0, 256, (60, 9, 9, 1), np.uint8)
    return jm.tasks.from_arrays(
        x, np.arange(60) % 12, ways=3, shots=1, queries=2, rotations="random", split_seed=1
    )


def as_bytes(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.float32).reshape(-1)


@cache
def witness():
    """Return a learner whose gradient is all bytes of the episode and of its own random numbers."""

    def bytes_of(task, key):
        bits = jax.random.bits(key, (16,), jnp.uint8).astype(jnp.float32)
        return jnp.concatenate(
            [as_bytes(task.support.x), as_bytes(task.query.x), as_bytes(task.query.y), bits]
        )

    def init(key, task):
        return {"w": jnp.zeros(bytes_of(task, key).shape)}

    def loss(params, task, key, step=None):
        return params["w"] @ bytes_of(task, key), {}

    def adapt(params, support, key):
        return {}

    def predict(params, adapted, x):
        return jnp.zeros((x.shape[0], 3))

    return jm.Learner(init, adapt, predict, loss)


@cache
def maml():
    return jm.maml(jm.nn.Conv4(3, filters=8), inner_optimizer=optax.sgd(0.4), inner_steps=1)


def after_a_step(learner, distribution, optimizer, **axes):
    mesh = jm.make_mesh(**axes)
    state = jm.init_state(learner, optimizer, distribution, KEY, devices=mesh)
    step = jax.jit(jm.meta_step(learner, optimizer, BATCH, devices=mesh))
    return step(sharding.place(state, mesh), sharding.replicate(distribution.sample, mesh))


@needs_eight
@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_draws_the_same_episodes_bit_for_bit(name):
    # In float32 a sum of eight bytes is exact in any order.
    actual, expected = (
        np.asarray(after_a_step(witness(), stored_images(), optax.sgd(1.0), **axes)[0].params["w"])
        for axes in (MESHES[name], {})
    )
    assert len(np.unique(actual)) > 100
    np.testing.assert_array_equal(actual, expected)


def assert_close(actual, expected, tolerance):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(jax.device_get(actual)),
        jax.tree.leaves(jax.device_get(expected)),
        strict=True,
    ):
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
        assert error <= tolerance, (jax.tree_util.keystr(path), error)


@needs_eight
@pytest.mark.parametrize("name", MESHES)
def test_a_meta_step_agrees_to_one_part_in_1e5(name):
    actual, expected = (after_a_step(maml(), glyphs(), optax.sgd(0.1), **axes) for axes in (MESHES[name], {}))
    assert_close((actual[0].params, actual[1]), (expected[0].params, expected[1]), 1e-5)


@needs_eight
def test_a_meta_step_with_all_axes_agrees_to_one_part_in_1e5():
    all_axes = {"tasks": 2, "examples": 2, "params": 2}
    # Without biases, because a common translation of the embeddings has zero gradient, up to rounding.
    initialiser = jax.nn.initializers.lecun_normal()
    network = jm.nn.MLP(out=8, hidden=(16,), use_bias=False, kernel_init=initialiser)
    tasks = jm.tasks.glyphs("train", ways=4, shots=1, queries=2, size=8)
    actual, expected = (
        after_a_step(jm.prototypical(network), tasks, optax.sgd(1.0), **axes) for axes in (all_axes, {})
    )
    assert_close((actual[0].params, actual[1]), (expected[0].params, expected[1]), 1e-5)


@needs_eight
@pytest.mark.parametrize("name", MESHES)
def test_a_meta_step_in_float64_agrees_to_one_part_in_1e12(name, x64):
    def double(task):
        return jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, task
        )

    single = toys.sinusoid()
    tasks = single._replace(
        sample=jax.tree_util.Partial(lambda sample, key: double(sample(key)), single.sample)
    )
    plain = toys.maml(width=1024)
    learner = plain._replace(init=lambda key, task: double(plain.init(key, task)))
    actual, expected = (after_a_step(learner, tasks, optax.sgd(0.1), **axes) for axes in (MESHES[name], {}))
    assert actual[0].params["hidden"].dtype == jnp.float64
    assert_close((actual[0].params, actual[1]), (expected[0].params, expected[1]), 1e-12)


@needs_eight
def test_parameters_and_moments_are_split_before_and_after_a_step():
    mesh = jm.make_mesh(tasks=2, params=4)
    optimizer = optax.adam(1e-3)
    learner, tasks = toys.maml(width=2048), toys.sinusoid()
    state = jm.init_state(learner, optimizer, tasks, KEY, devices=mesh)
    after, _ = jax.jit(jm.meta_step(learner, optimizer, BATCH, devices=mesh))(
        state, sharding.replicate(tasks.sample, mesh)
    )
    for train_state in (state, after):
        for tree in (train_state.params, train_state.opt_state[0].mu, train_state.opt_state[0].nu):
            for leaf in jax.tree.leaves(tree):
                parts = 4 if leaf.size >= 1024 else 1
                assert leaf.addressable_shards[0].data.size == leaf.size // parts, leaf.shape


@needs_eight
def test_a_run_on_one_mesh_is_resumed_on_another(tmp_path):
    settings = {"key": KEY, "meta_batch": BATCH, "validation": toys.sinusoid(), "validation_episodes": 11}
    settings |= {"validate_every": 3, "run_dir": tmp_path}
    learner, optimizer = toys.maml(width=1024), toys.adam()
    first = jm.make_mesh(tasks=2, params=4)
    jm.train(learner, toys.sinusoid(), optimizer, steps=3, devices=first, **settings)
    actual = jm.train(
        learner, toys.sinusoid(), optimizer, steps=6, devices=jm.make_mesh(tasks=8), resume=True, **settings
    )
    alone = jm.train(
        learner,
        toys.sinusoid(),
        optimizer,
        steps=6,
        devices=jax.devices()[:1],
        **settings | {"run_dir": None},
    )
    assert_close(actual.params, alone.params, 1e-4)


@needs_eight
def test_the_meta_step_under_pmap_is_the_same_step():
    # Programs built on `pmap` pass tasks in, and average gradients in the optimizer.
    learner, tasks, inner = maml(), glyphs(), optax.sgd(0.1)
    mean = optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda grads, state, params=None: (jax.lax.pmean(grads, "i"), state),
    )
    optimizer = optax.chain(mean, inner)
    state = jm.init_state(learner, optimizer, tasks, KEY)
    step = jm.meta_step(learner, optimizer, BATCH // 8, devices=jax.devices()[:1])
    keys = episode_keys(jax.random.fold_in(KEY, state.step), jnp.arange(BATCH))[:, 0]
    batch = jax.tree.map(
        lambda leaf: leaf.reshape(8, BATCH // 8, *leaf.shape[1:]), jax.vmap(tasks.sample)(keys)
    )
    actual, _ = jax.pmap(step, axis_name="i", in_axes=(None, 0))(state, batch)
    expected, _ = after_a_step(learner, tasks, inner, tasks=8)
    assert_close(jax.tree.map(lambda leaf: leaf[0], actual.params), expected.params, 1e-5)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tasks": 0}, "tasks: got 0"),
        ({"params": -1}, "params: got -1"),
        (
            {"tasks": 4096},
            r"tasks=4096 needs 4096 devices, but there are \d+; a CPU is one device unless "
            r"JAX_NUM_CPU_DEVICES=4096 is .*"
            r'jax.config.update\("jax_num_cpu_devices", 4096\)',
        ),
        ({"tasks": 64, "params": 64}, "tasks=64 x params=64 needs 4096 devices"),
    ],
)
def test_invalid_mesh_axes_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        jm.make_mesh(**axes)


def test_unsuitable_meshes_are_refused():
    devices = [jax.devices()[0]] * 3
    learner, optimizer = toys.maml(), optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"a mesh of tasks=3, which must divide the 8 tasks"):
        jm.meta_step(learner, optimizer, BATCH, devices=jm.make_mesh(tasks=3, devices=devices))
    with pytest.raises(
        ValueError, match=r"a mesh of examples=3; several devices may share .* learner.divisible is True"
    ):
        jm.meta_step(learner, optimizer, BATCH, devices=jm.make_mesh(examples=3, devices=devices))
    with pytest.raises(ValueError, match=r"a mesh with axes \('model',\); build it by jm.make_mesh"):
        jm.meta_step(learner, optimizer, BATCH, devices=Mesh(np.array(devices), ("model",)))


@pytest.mark.parametrize(
    "text", ["", "8", "tasks", "tasks=0", "tasks=-1", "tasks=x", "model=2", "tasks=2,tasks=2"]
)
def test_axes_in_another_form_are_refused(text):
    with pytest.raises(ValueError, match="it must be like tasks=8"):
        sharding.parse_axes(text)


def test_parse_axes():
    assert sharding.parse_axes("tasks=4, params=2") == {"tasks": 4, "params": 2}
