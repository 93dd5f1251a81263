"""Tasks of small vectors for the tests of methods that compare embeddings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxmeta as jm

WAYS, DIM = 3, 4
KEY = jax.random.key(0)
IDENTITY = (lambda key, x: {}, lambda params, x: x)


def batch(x, y, mask=None, ways=WAYS):
    mask = None if mask is None else jnp.asarray(mask, bool)
    return jm.Batch(jnp.asarray(x, float), jnp.asarray(y, jnp.int32), mask=mask, ways=ways)


def compiled(learner, name):
    """Return a function of the learner as one compiled program, which is ten times faster than eager."""
    return _jitted(getattr(learner, name))


@functools.cache
def _jitted(function):
    return jax.jit(function)


def initial(learner, task):
    return compiled(learner, "init")(KEY, task)


def adapted(learner, params, support):
    return compiled(learner, "adapt")(params, support, KEY)


def loss(learner, params, task, key=KEY):
    """Return the loss of a task, and its metrics."""
    return jax.device_get(compiled(learner, "loss")(params, task, key))


def outputs_of(learner, params, support, x):
    """Predict the queries `x` after adaptation to the support set."""
    return np.asarray(_outputs(learner, params, support, x))


def results(learner, params, task):
    """Return the query outputs of a task, its loss and its metrics, from one program."""
    return jax.device_get(_results(learner, params, task))


def initial_results(learner, task):
    """Return initial parameters, and the results with them."""
    return jax.device_get(_initial_results(learner, task))


@functools.partial(jax.jit, static_argnums=0)
def _results(learner, params, task):
    support, query = task
    outputs = learner.predict(params, learner.adapt(params, support, KEY), query.x, query.mask)
    return outputs, *learner.loss(params, task, KEY)


@functools.partial(jax.jit, static_argnums=0)
def _initial_results(learner, task):
    params = learner.init(KEY, task)
    return params, _results(learner, params, task)


@functools.partial(jax.jit, static_argnums=0)
def _outputs(learner, params, support, x):
    return learner.predict(params, learner.adapt(params, support, KEY), x)


def predict(learner, support, x, **params):
    """Predict the queries with an embedding that has no parameters."""
    return outputs_of(learner, {"model": {}, **params}, support, jnp.asarray(x, float))


def unequal(seed=0):
    """Build a task of three classes with two, one and three examples, out of order, and five queries."""
    rng = np.random.default_rng(seed)
    return jm.Task(
        batch(rng.normal(size=(6, DIM)), [2, 0, 1, 2, 0, 2]),
        batch(rng.normal(size=(5, DIM)), [0, 1, 2, 2, 0]),
    )


def padded(part, positions, value=np.nan):
    """Insert padding, with arbitrary labels, before the examples at `positions`."""
    x = np.insert(np.asarray(part.x), positions, value, axis=0)
    y = np.insert(np.asarray(part.y), positions, 1)
    return batch(x, y, np.insert(np.ones(part.y.size, bool), positions, False), part.ways)


def distances(a, b):
    return np.square(np.asarray(a)[:, None] - np.asarray(b)[None]).sum(-1)


def softmax(values):
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def gradient_check(function, params, seed=0, step=3e-6):
    """Return the gradient's relative error along a random direction by finite differences, and the value."""
    rng = np.random.default_rng(seed)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)

    def along(t):
        return function(jax.tree.map(lambda leaf, d: leaf + t * d, params, direction))

    @jax.jit
    def slope_and_values():
        return jax.grad(along)(0.0), jax.vmap(along)(step * jnp.array([-1.0, 0.0, 1.0]))

    slope, (before, value, after) = jax.device_get(slope_and_values())
    return abs(slope - (after - before) / (2 * step)) / abs(slope), value


def of_float64(tree, seed=None):
    """Convert a tree to float64; a seed adds noise, since initial values may be zeros or ones."""
    rng = np.random.default_rng(seed)
    noise = 0.0 if seed is None else 0.1
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf) + noise * rng.normal(size=leaf.shape)), tree
    )
