"""Small images of bars and a small network for them, for tests of the command line."""

import jax
import numpy as np
from PIL import Image

import jaxmeta as jm

SIDE = 8


def draw_bar(path, kind, seed, *, stray=1, ink=0, paper=255, across=False):
    """Write an image with a bar, whose row depends on the class, and `stray` random pixels."""
    pixels = np.full((SIDE, SIDE), paper, np.uint8)
    pixels[kind % SIDE] = ink
    rng = np.random.default_rng(seed)
    pixels[rng.integers(SIDE, size=stray), rng.integers(SIDE, size=stray)] = ink
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.T if across else pixels).save(path)


def small_mlp(out, hidden=(16,)):
    """Return an MLP with batch normalisation, which compiles faster than a convolutional network."""
    return jm.nn.MLP(out=out, hidden=hidden, norm=True, kernel_init=jax.nn.initializers.lecun_normal())
