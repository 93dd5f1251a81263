"""Helpers of the tests of transfer: variables of models, drawn and compared, and keys of augmentations."""

import jax
import numpy as np


def initialised(model, x, seed=0):
    """Return the model's variables, drawn by one compiled program instead of operation by operation."""
    return jax.jit(model.init)(jax.random.key(seed), x)


def same_bits(a, b):
    """Return whether two trees have leaves of the same shapes and bits."""
    a, b = (
        [(leaf.shape, leaf.tobytes()) for leaf in map(np.asarray, jax.tree.leaves(tree))] for tree in (a, b)
    )
    return a == b


def close(a, b, tolerance):
    """Assert that two trees have leaves that are equal within an absolute or relative tolerance."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


def noting_keys():
    """Return a function that gives the keys seen so far, and an augmentation that notes its keys."""
    keys = []

    def augment(key, x):
        jax.debug.callback(lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(key))
        return x

    def seen():
        jax.effects_barrier()
        return keys

    return seen, augment
