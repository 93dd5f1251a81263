"""Helpers for the tests of tasks: compiled drawing of episodes, numbered examples, PNG files."""

import functools
import io

import jax
import numpy as np
from PIL import Image


@jax.jit
def draw(sample, key):
    """Draw one task. Tests with equal settings and shapes share the compiled program."""
    return sample(key)


@functools.partial(jax.jit, static_argnums=2)
def _draw_many(sample, key, count):
    return jax.vmap(sample)(jax.random.split(key, count))


def drawn(tasks, seed=0):
    """Return the task drawn with the key of `seed`, as NumPy arrays."""
    return jax.device_get(draw(tasks.sample, jax.random.key(seed)))


def sampled(tasks, count, seed=0):
    """Return a batch of `count` tasks as NumPy arrays, drawn with `vmap` as in a training step."""
    return jax.device_get(_draw_many(tasks.sample, jax.random.key(seed), count))


def numbered(sizes, seed=0):
    """Return examples x = (class, index) in random order, and their classes."""
    x = np.array([(c, i) for c, n in enumerate(sizes) for i in range(n)], np.float32)
    order = np.random.default_rng(seed).permutation(len(x))
    return x[order], x[order, 0].astype(int)


def assert_trees_equal(one, other):
    """Assert that two trees have the same structure and equal leaves."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def png(pixels, **settings):
    """Encode an array as the content of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(np.squeeze(pixels)).save(file, "PNG", **settings)
    return file.getvalue()
