"""The embedding network of Koch et al.'s Siamese network."""

import jax
from flax import linen
from jaxtyping import Array, Float

from jaxmeta.checks import ArgumentError
from jaxmeta.nn.embedding import flattened, max_pool_2x2, require_images
from jaxmeta.nn.layers import Conv

SIDE = 105


class Koch(linen.Module):
    """The embedding network of Koch et al. for images of 105×105.

    It has 38,947,648 parameters; `jm.siamese` adds 4,097. Convolutions without padding are followed by ReLU:
    10×10 to 64 channels (96×96, pooled to 48), 7×7 to 128 (42, pooled to 21), 4×4 to 128 (18, pooled to 9),
    4×4 to 256 (6×6). A linear layer with 4,096 sigmoids follows.

    It is initialised as published: kernels of convolutions from N(0, 0.01²), that of the linear layer from
    N(0, 0.2²), with which its 9,216 inputs can saturate the sigmoids, and biases from N(0.5, 0.01²).

    Raises:
      ValueError: images of a size other than 105×105.

    References:
      Koch, Zemel & Salakhutdinov, Siamese Neural Networks for One-shot Image Recognition, 2015, section 3.
    """

    divisible = True

    @linen.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n 4096"]:
        require_images(x)
        if x.shape[1:3] != (SIDE, SIDE):
            raise ArgumentError(
                "x", f"got images of {x.shape[1]}×{x.shape[2]}; the published network is for {SIDE}×{SIDE}"
            )
        normal = linen.initializers.normal

        def around_half(key, shape, dtype=jax.numpy.float32):
            return 0.5 + normal(0.01)(key, shape, dtype)

        for width, side, pool in ((64, 10, True), (128, 7, True), (128, 4, True), (256, 4, False)):
            x = Conv(width, (side, side), padding="VALID", kernel_init=normal(0.01), bias_init=around_half)(x)
            x = jax.nn.relu(max_pool_2x2(x) if pool else x)
        head = linen.Dense(4096, kernel_init=normal(0.2), bias_init=around_half)
        return jax.nn.sigmoid(head(flattened(x)))
