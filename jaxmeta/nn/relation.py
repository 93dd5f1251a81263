"""The embedding and the relation module of relation networks."""

from typing import Literal

import jax
from flax import linen
from jaxtyping import Array, Bool, Float

from jaxmeta.nn.embedding import ConvNorm, flattened, require_size


class RelationEmbedding(linen.Module):
    """Four blocks of 3×3 convolution, batch normalisation and ReLU.

    The first two blocks have no padding and end in 2×2 max-pooling: images of 28×28×1 give maps of 5×5×64,
    images of 84×84×3 maps of 19×19×64.

    Attributes:
      filters: channels of every block.

    Raises:
      ValueError: images smaller than 10×10.

    References:
      Sung et al., Relation Network, 2018, figure 2 and the official code.
    """

    divisible = True

    filters: int = 64

    @linen.compact
    def __call__(
        self, x: Float[Array, "n h w c"], mask: Bool[Array, " n"] | None = None
    ) -> Float[Array, "n h2 w2 filters"]:
        require_size(x, 10)
        for i in range(4):
            x = ConvNorm(self.filters, pool=i < 2, padding="VALID" if i < 2 else "SAME")(x, mask)
            x = jax.nn.relu(x)
        return x


class RelationModule(linen.Module):
    """Two blocks of convolution and pooling, then linear layers of widths 8 and 1, without the final sigmoid.

    Attributes:
      filters: channels of both blocks.
      padding: padding of the convolutions: "SAME" in the published Omniglot network, "VALID" in the one for
        84×84 images.

    Raises:
      ValueError: maps smaller than 4×4 with "SAME", or than 10×10 with "VALID".

    References:
      Sung et al., Relation Network, 2018, figure 2; the linear layers are initialised as in its code.
    """

    divisible = True

    filters: int = 64
    padding: Literal["SAME", "VALID"] = "SAME"

    @linen.compact
    def __call__(
        self, x: Float[Array, "n h w c"], mask: Bool[Array, " n"] | None = None
    ) -> Float[Array, "n 1"]:
        require_size(x, 4 if self.padding == "SAME" else 10)
        for _ in range(2):
            x = jax.nn.relu(ConvNorm(self.filters, pool=True, padding=self.padding)(x, mask))
        normal, ones = linen.initializers.normal(0.01), linen.initializers.ones
        x = linen.Dense(8, kernel_init=normal, bias_init=ones)(flattened(x))
        return linen.Dense(1, kernel_init=normal, bias_init=ones)(jax.nn.relu(x))
