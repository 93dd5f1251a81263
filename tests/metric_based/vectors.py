"""Tasks of a few vectors, whose embedding may be the identity, for the tests of methods that compare."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxmeta as jm

WAYS, DIM = 3, 4
KEY = jax.random.key(0)
IDENTITY = (lambda key, x: {}, lambda params, x: x)


def batch(x, y, mask=None, ways=WAYS):
    mask = None if mask is None else jnp.asarray(mask, bool)
    return jm.Batch(jnp.asarray(x, float), jnp.asarray(y, jnp.int32), mask, ways)


def predict(learner, support, x, **params):
    """Outputs of an embedding without parameters."""
    params = {"model": {}, **params}
    return learner.predict(params, learner.adapt(params, support, KEY), jnp.asarray(x, float))


def unequal(seed=0):
    """Three classes of two, one and three examples, out of order, and five queries."""
    rng = np.random.default_rng(seed)
    return jm.Task(
        batch(rng.normal(size=(6, DIM)), [2, 0, 1, 2, 0, 2]),
        batch(rng.normal(size=(5, DIM)), [0, 1, 2, 2, 0]),
    )


def padded(part, places, value=np.nan):
    """`part` with padding before the given examples, of any label."""
    x = np.insert(np.asarray(part.x), places, value, axis=0)
    y = np.insert(np.asarray(part.y), places, 1)
    return batch(x, y, np.insert(np.ones(part.y.size, bool), places, False), part.ways)


def distances(a, b):
    return np.square(np.asarray(a)[:, None] - np.asarray(b)[None]).sum(-1)


def softmax(values):
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def directional_error(function, params, seed=0, step=3e-6):
    """Relative difference of the gradient and of finite differences, along one random direction."""
    rng = np.random.default_rng(seed)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)

    def along(t):
        return function(jax.tree.map(lambda leaf, d: leaf + t * d, params, direction))

    slope = jax.jit(jax.grad(along))(0.0)
    values = jax.jit(jax.vmap(along))(step * jnp.array([-1.0, 1.0]))
    return abs(float(slope - (values[1] - values[0]) / (2 * step))) / abs(float(slope))


def of_float64(tree, seed=None):
    """In float64 and, with a seed, away from initial zeros and ones."""
    rng = np.random.default_rng(seed)
    noise = 0.0 if seed is None else 0.1
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + noise * rng.normal(size=leaf.shape)), tree)
