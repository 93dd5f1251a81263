"""Helpers for the tests of transfer: initialising and comparing variables, and recording keys."""

import jax
import numpy as np


def initialised(model, x, seed=0):
    """Return initial variables of the model, drawn by one compiled program."""
    return jax.jit(model.init)(jax.random.key(seed), x)


def same_bits(a, b):
    """Return whether two trees have leaves of the same shapes and bits."""
    a, b = (
        [(leaf.shape, leaf.tobytes()) for leaf in map(np.asarray, jax.tree.leaves(tree))] for tree in (a, b)
    )
    return a == b


def assert_close(a, b, tolerance):
    """Assert that two trees have leaves that are equal within an absolute or relative tolerance."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


def record_keys():
    """Return a function that gives the keys recorded so far, and an augmentation that records its keys."""
    keys = []

    def augment(key, x):
        jax.debug.callback(lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(key))
        return x

    def recorded():
        jax.effects_barrier()
        return keys

    return recorded, augment
