"""The vision transformer, compatible with the weights of Hugging Face's transformers and of timm."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen
from jaxtyping import Array, Float

from jaxmeta.checks import ArgumentError, check_word
from jaxmeta.nn.embedding import linear_head, require_images
from jaxmeta.nn.layers import Conv

POOLINGS = ("cls", "mean")


def resize_positions(
    positions: Float[Array, "1 tokens width"],
    grid: tuple[int, int],
    old_grid: tuple[int, int] | None = None,
) -> Float[Array, "1 new_tokens width"]:
    """Interpolate the position embeddings of a ViT for images of another size.

    Interpolation is bicubic as in timm: Keys' cubic (a = −1/2), with a wider kernel where the grid shrinks.
    Hugging Face's `interpolate_pos_encoding` uses a = −3/4 without a wider kernel, which gives slightly
    different numbers.

    Args:
      positions: embedding of the class token, then those of the patches row by row.
      grid: numbers of patches along height and width for the new images.
      old_grid: numbers of patches along height and width in `positions`; None for a square grid.

    Returns:
      The embedding of the class token, unchanged, then those of the new patches row by row.

    Raises:
      ValueError: the number of patches in `positions` does not fit `old_grid`, or is not a square number.

    Examples:
      >>> import jax.numpy as jnp, jaxmeta as jm
      >>> jm.nn.resize_positions(jnp.ones((1, 1 + 14 * 14, 192)), (7, 7)).shape
      (1, 50, 192)
    """
    patches, width = positions.shape[1] - 1, positions.shape[2]
    if old_grid is None:
        old_grid = (math.isqrt(patches),) * 2
    if math.prod(old_grid) != patches:
        raise ArgumentError(
            "positions",
            f"got a class token and {patches} patches; a grid of {old_grid[0]}×{old_grid[1]} has "
            f"{math.prod(old_grid)}; pass the grid as old_grid",
        )
    if tuple(grid) == tuple(old_grid):
        return positions
    old = positions[:, 1:].reshape(1, *old_grid, width)
    new = jax.image.resize(old, (1, *grid, width), "cubic")
    return jnp.concatenate([positions[:, :1], new.reshape(1, -1, width)], 1)


class Attention(linen.Module):
    """Multi-head self-attention: softmax(q kᵀ / √d) v in each head, where d is the width of a head.

    Attributes:
      heads: number of heads, which divides the width.
      qkv_bias: True for biases in query, key and value.
    """

    heads: int
    qkv_bias: bool = True

    @linen.compact
    def __call__(self, x: Float[Array, "n tokens width"]) -> Float[Array, "n tokens width"]:
        n, tokens, width = x.shape
        q, k, v = (
            linen.Dense(width, self.qkv_bias, name=name)(x).reshape(
                n, tokens, self.heads, width // self.heads
            )
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(width // self.heads)
        mixed = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), v)
        return linen.Dense(width, name="out")(mixed.reshape(n, tokens, width))


class TransformerBlock(linen.Module):
    """A pre-norm transformer layer with GELU: x + attention(norm(x)), then x + MLP(norm(x))."""

    heads: int
    mlp: int
    epsilon: float
    dropout: float
    qkv_bias: bool

    @linen.compact
    def __call__(
        self, x: Float[Array, "n tokens width"], deterministic: bool = True
    ) -> Float[Array, "n tokens width"]:
        drop = linen.Dropout(self.dropout, deterministic=deterministic)
        z = _layer_norm(self.epsilon, "attention_norm")(x)
        x = x + drop(Attention(self.heads, self.qkv_bias, name="attention")(z))
        z = linen.Dense(self.mlp, name="mlp_in")(_layer_norm(self.epsilon, "mlp_norm")(x))
        return x + drop(linen.Dense(x.shape[-1], name="mlp_out")(jax.nn.gelu(z, approximate=False)))


def _layer_norm(epsilon, name):
    # The fast variance, E[x²] − E[x]², loses digits by cancellation in float32, and an epsilon of 1e-12 is
    # too small to cover the error.
    return linen.LayerNorm(epsilon, use_fast_variance=False, name=name)


class ViT(linen.Module):
    """A vision transformer with non-overlapping patches, a class token and learned position embeddings.

    The defaults are those of ViT-B/16. Other sizes are, as (width, depth, heads, mlp): Ti (192, 12, 3, 768),
    S (384, 12, 6, 1536), L (1024, 24, 16, 4096), H (1280, 32, 16, 5120).

    Attributes:
      patch: side of a patch in pixels.
      width: width of the tokens.
      depth: number of transformer layers.
      heads: number of attention heads, which divides `width`.
      mlp: width of the hidden layer of each MLP.
      image_size: side of the images in pixels, or height and width. The position embeddings are for this
        size; for another one, see `resize_positions`.
      ways: width of the linear layer "head"; None for the features.
      pooling: "cls" for the class token, normalised, as the features; "mean" for the mean of the patches'
        tokens, normalised (timm's `global_pool="avg"`).
      epsilon: constant added to the variance in the layer normalisation; 1e-12 in Hugging Face's
        configurations, 1e-6 in timm.
      dropout: share of values that are dropped after position embeddings, attention and MLP where
        `deterministic` is False.
      qkv_bias: True for biases in query, key and value.

    Raises:
      ValueError: images of another size than `image_size`; an `image_size` that is not a multiple of `patch`;
        `heads` that do not divide `width`; an unknown `pooling`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> network = jm.nn.ViT(patch=4, width=8, depth=2, heads=2, mlp=16, image_size=8, ways=5)
      >>> variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> jax.jit(network.apply)(variables, jnp.zeros((2, 8, 8, 3))).shape
      (2, 5)

    References:
      Dosovitskiy et al., An Image is Worth 16×16 Words, 2020.
    """

    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    image_size: int | tuple[int, int] = 224
    ways: int | None = None
    pooling: Literal["cls", "mean"] = "cls"
    epsilon: float = 1e-12
    dropout: float = 0.0
    qkv_bias: bool = True

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of patches along height and width."""
        height, width = self.sides
        return height // self.patch, width // self.patch

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the images."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @linen.compact
    def __call__(self, x: Float[Array, "n h w c"], deterministic: bool = True) -> Float[Array, "n d"]:
        self._check(x)
        window = (self.patch, self.patch)
        x = Conv(self.width, window, window, "VALID", name="patch_embedding")(x)
        x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], self.width)
        small = linen.initializers.truncated_normal(0.02)
        token = self.param("cls_token", small, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], 1)
        x = x + self.param("position_embedding", small, (1, *x.shape[1:]))
        x = linen.Dropout(self.dropout)(x, deterministic)
        for i in range(self.depth):
            block = TransformerBlock(
                self.heads, self.mlp, self.epsilon, self.dropout, self.qkv_bias, name=f"block{i}"
            )
            x = block(x, deterministic)
        # Layer normalisation is per token, so that only one token need be normalised after pooling.
        x = x[:, 0] if self.pooling == "cls" else x[:, 1:].mean(1)
        return linear_head(_layer_norm(self.epsilon, "norm")(x), self.ways)

    def _check(self, x):
        check_word("pooling", self.pooling, POOLINGS)
        if self.width % self.heads:
            raise ArgumentError("heads", f"got {self.heads}; it must divide the width, {self.width}")
        height, width = self.sides
        if height % self.patch or width % self.patch:
            raise ArgumentError("image_size", f"got {height}×{width}; patches of {self.patch} must tile it")
        require_images(x)
        if x.shape[1:3] != (height, width):
            raise ArgumentError(
                "x",
                f"got images of {x.shape[1]}×{x.shape[2]}, but position_embedding is for {height}×{width}; "
                "resize the images, or build the network with their image_size and pass position_embedding "
                "through jaxmeta.nn.resize_positions",
            )
