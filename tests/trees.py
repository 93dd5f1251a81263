"""Comparisons of pytrees of arrays."""

import jax
import numpy as np


def max_difference(a, b):
    return max(np.abs(x - y).max() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
