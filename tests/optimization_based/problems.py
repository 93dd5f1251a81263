"""Networks of a few units, their tasks, and finite differences, for the tests of learners."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax.flatten_util import ravel_pytree

import jaxmeta as jm

WAYS, DIM = 3, 4
KEY = jax.random.key(0)


def network(out=WAYS, norm=True):
    return jm.nn.MLP(out=out, hidden=(5,), norm=norm, kernel_init=linen.initializers.lecun_normal())


def precise_network(**settings):
    """`network` whose own initialisation is in float64, which Flax's is not."""
    model = jm.nn.as_model(network(**settings))

    def init(key, x):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(key, x))

    return model._replace(init=init)


def task(seed=0, shots=2, queries=3):
    rng = np.random.default_rng(seed)

    def part(examples):
        labels = jnp.tile(jnp.arange(WAYS, dtype=jnp.int32), examples)
        return jm.Batch(jnp.asarray(rng.normal(size=(labels.size, DIM))), labels, ways=WAYS)

    return jm.Task(part(shots), part(queries))


def init(learner, of=None, key=KEY):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), jax.jit(learner.init)(key, of or task()))


def gradient(learner, params, of, step=None):
    return jax.jit(jax.grad(lambda params: learner.loss(params, of, KEY, step)[0]))(params)


def finite_differences(function, arguments, step=1e-6):
    """Of a scalar function, in every entry of its arguments, as one vector."""
    flat, restore = ravel_pytree(arguments)
    values = jax.jit(jax.vmap(lambda v: function(restore(v))))
    moves = step * jnp.eye(flat.size)
    return (values(flat[None] + moves) - values(flat[None] - moves)) / (2 * step)


def assert_trees_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def differ(a, b):
    return max(np.abs(x - y).max() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# A network of one number θ, which is all its outputs, whatever the input.
NUMBER = jm.Model(
    lambda key, x: {"theta": jnp.zeros(())}, lambda params, x: jnp.full((x.shape[0], 2), params["theta"])
)


def number_task(curvature=2.0, centre=1.0, query=3.0):
    """L^S = ½·curvature·(θ − centre)², L^Q = ½(θ − query)², by `half_square`."""

    def part(centre, curvature):
        return jm.Batch(jnp.zeros((1, 1)), jnp.array([[centre, curvature]]))

    return jm.Task(part(centre, curvature), part(query, 1.0))


def half_square(outputs, targets, mask=None):
    """Of the only example, whose targets are the centre and the curvature."""
    del mask
    return 0.5 * targets[0, 1] * (outputs[0, 0] - targets[0, 0]) ** 2
