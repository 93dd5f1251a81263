"""Networks of a few units, their tasks, and finite differences, for the tests of learners.

A learner's functions run as jitted programs, which are compiled once for each learner. Tests that need equal
learners should therefore get one learner from a cached function.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen
from jax.flatten_util import ravel_pytree

import jaxmeta as jm

WAYS, DIM = 3, 4
KEY = jax.random.key(0)


def network(out=WAYS, norm=True):
    return jm.nn.MLP(out=out, hidden=(5,), norm=norm, kernel_init=linen.initializers.lecun_normal())


def precise_network(**settings):
    """Build `network` with float64 weights; Flax draws float32 ones, which programs round differently."""
    model = jm.nn.as_model(network(**settings))

    def init(key, x):
        leaves, structure = jax.tree.flatten(jax.eval_shape(model.init, key, x))
        keys = jax.random.split(key, len(leaves))
        return structure.unflatten(
            [
                0.5 * jax.random.normal(k, leaf.shape, jnp.float64)
                for k, leaf in zip(keys, leaves, strict=True)
            ]
        )

    return model._replace(init=init)


def make_task(seed=0, shots=2, queries=3):
    """Build a task of normally distributed vectors in float64."""
    rng = np.random.default_rng(seed)

    def part(examples):
        labels = np.tile(np.arange(WAYS, dtype=np.int32), examples)
        return jm.Batch(jnp.asarray(rng.normal(size=(labels.size, DIM))), jnp.asarray(labels), ways=WAYS)

    return jm.Task(part(shots), part(queries))


def init(learner, task=None, key=KEY):
    params = jax.jit(learner.init)(key, task or make_task())
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)


def adapt(learner, params, task, key=KEY):
    """Return the state adapted to the task's support set."""
    return jax.jit(learner.adapt)(params, task.support, key)


@functools.cache
def value_and_gradient(function):
    """Return a jitted program of a learner's loss with metrics and its gradient in the parameters."""

    @jax.jit
    def run(params, task, step):
        return jax.value_and_grad(lambda params: function(params, task, KEY, step), has_aux=True)(params)

    return run


def loss(learner, params, task, step=None):
    """Return the meta-loss and the metrics."""
    return value_and_gradient(learner.loss)(params, task, step)[0]


def gradient(learner, params, task, step=None):
    """Return the meta-gradient."""
    return value_and_gradient(learner.loss)(params, task, step)[1]


@functools.cache
def plain_loss(norm=True):
    """Return `(weights, batch) -> (cross-entropy, gradient in the weights)` of `network(norm=norm)`."""
    model = jm.nn.as_model(network(norm=norm))
    return jax.jit(
        jax.value_and_grad(
            lambda weights, batch: jm.losses.cross_entropy(model.apply(weights, batch.x), batch.y)
        )
    )


def descended(weights, support, steps, rate=0.5, norm=True):
    """Return the weights after gradient descent on the support loss of `network`, step by step."""
    for _ in range(steps):
        slopes = plain_loss(norm)(weights, support)[1]
        weights = jax.tree.map(lambda w, g: w - rate * g, weights, slopes)
    return weights


@functools.cache
def _query_loss(norm):
    frozen = jm.maml(network(), inner_optimizer=optax.sgd(0.0), order="first", norm=norm)
    return jax.jit(jax.value_and_grad(lambda weights, task: frozen.loss({"model": weights}, task, KEY)[0]))


def query_loss(weights, task, norm="batch"):
    """Return the query loss at `weights` and its gradient, from a MAML of step size 0."""
    return _query_loss(norm)(weights, task)


def finite_differences(function, arguments, step=1e-6):
    """Return central differences of a scalar function in every entry of its arguments, as one vector."""

    @jax.jit
    def run(arguments):
        start, restore = ravel_pytree(arguments)
        moves = step * jnp.eye(start.size)
        ends = jnp.concatenate([start[None] + moves, start[None] - moves])
        above, below = jax.vmap(lambda end: function(restore(end)))(ends).reshape(2, -1)
        return (above - below) / (2 * step)

    return np.asarray(run(arguments))


def flat(tree):
    """Concatenate all leaves into one vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


# A network of one number θ, which is its output for every input.
NUMBER = jm.Model(
    lambda key, x: {"theta": jnp.zeros(())}, lambda params, x: jnp.full((x.shape[0], 2), params["theta"])
)


def number_task(curvature=2.0, centre=1.0, query=3.0):
    """Build a task with L^S = ½·curvature·(θ − centre)² and L^Q = ½(θ − query)², for `half_square`."""

    def part(centre, curvature):
        return jm.Batch(jnp.zeros((1, 1)), jnp.array([[centre, curvature]]))

    return jm.Task(part(centre, curvature), part(query, 1.0))


def half_square(outputs, targets, mask=None):
    """Return the loss of the only example, whose targets are the centre and the curvature."""
    del mask
    return 0.5 * targets[0, 1] * (outputs[0, 0] - targets[0, 0]) ** 2
