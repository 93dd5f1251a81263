"""The vision transformer, compatible with the weights of ViT, DINOv2 and CLIP."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jaxtyping import Array, Float

from jaxmeta.checks import ArgumentError, check_count, check_word
from jaxmeta.nn.embedding import linear_head, require_images
from jaxmeta.nn.layers import Conv

POOLINGS = ("cls", "mean")
ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
Interpolation = Literal["antialiased", "bicubic", "offset"]
INTERPOLATIONS = get_args(Interpolation)
# Number of patches that DINOv2 adds to the new grid in the ratio of the grids.
_OFFSET = 0.1


def resize_positions(
    positions: Float[Array, "1 tokens width"],
    grid: tuple[int, int],
    old_grid: tuple[int, int] | None = None,
    *,
    method: Interpolation = "antialiased",
) -> Float[Array, "1 new_tokens width"]:
    """Interpolate the position embeddings of a ViT for images of another size.

    Interpolation is bicubic, in one of three ways that give slightly different numbers.

    | `method` | kernel | used by |
    | --- | --- | --- |
    | "antialiased" | Keys' cubic with a = −1/2, wider where the grid shrinks | timm; DINOv2 with registers |
    | "bicubic" | a = −3/4, of constant width | transformers' ViT, CLIP and Dinov2Model |
    | "offset" | as "bicubic", with (new + 0.1) / old as the ratio of the grids | DINOv2 as released |

    Args:
      positions: embedding of the class token, then those of the patches row by row.
      grid: numbers of patches along height and width for the new images.
      old_grid: numbers of patches along height and width in `positions`; None for a square grid.
      method: "antialiased", "bicubic" or "offset".

    Returns:
      The embedding of the class token, unchanged, then those of the new patches row by row.

    Raises:
      ValueError: the number of patches in `positions` does not fit `old_grid`, or is not a square number;
        `method` is unknown.

    Examples:
      >>> import jax.numpy as jnp, jaxmeta as jm
      >>> jm.nn.resize_positions(jnp.ones((1, 1 + 14 * 14, 192)), (7, 7)).shape
      (1, 50, 192)
    """
    check_word("method", method, INTERPOLATIONS)
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
    if method == "antialiased":
        new = jax.image.resize(old, (1, *grid, width), "cubic")
    else:
        offset = _OFFSET if method == "offset" else 0.0
        rows, columns = (
            jnp.asarray(_bicubic(before, after, (after + offset) / before), old.dtype)
            for before, after in zip(old_grid, grid, strict=True)
        )
        new = jnp.einsum("ip,jq,npqd->nijd", rows, columns, old)
    return jnp.concatenate([positions[:, :1], new.reshape(1, -1, width)], 1)


def _bicubic(old: int, new: int, ratio: float) -> Float[np.ndarray, "new old"]:
    """Return the matrix of torch's bicubic interpolation of `old` to `new` points along one axis."""
    at = (np.arange(new) + 0.5) / ratio - 0.5
    before = np.floor(at).astype(int)
    matrix, a = np.zeros((new, old)), -0.75
    for step in range(-1, 3):
        distance = np.abs(at - before - step)
        inner = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        outer = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        # Points beyond the edge have the value at the edge.
        near = np.clip(before + step, 0, old - 1)
        np.add.at(matrix, (np.arange(new), near), np.where(distance <= 1, inner, outer))
    return matrix


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
    """A pre-norm transformer layer: x + γ₁ attention(norm(x)), then x + γ₂ MLP(norm(x)).

    The scales γ exist where `layer_scale` is a number, their initial value; otherwise they are 1.
    """

    heads: int
    mlp: int
    epsilon: float
    dropout: float
    qkv_bias: bool
    layer_scale: float | None = None
    activation: str = "gelu"

    @linen.compact
    def __call__(
        self, x: Float[Array, "n tokens width"], deterministic: bool = True
    ) -> Float[Array, "n tokens width"]:
        dropout = linen.Dropout(self.dropout, deterministic=deterministic)

        def branch(z, name):
            if self.layer_scale is not None:
                initial = linen.initializers.constant(self.layer_scale)
                z = z * self.param(name, initial, (z.shape[-1],))[None, None]
            return dropout(z)

        z = _layer_norm(self.epsilon, "attention_norm")(x)
        x = x + branch(Attention(self.heads, self.qkv_bias, name="attention")(z), "attention_scale")
        z = linen.Dense(self.mlp, name="mlp_in")(_layer_norm(self.epsilon, "mlp_norm")(x))
        z = linen.Dense(x.shape[-1], name="mlp_out")(ACTIVATIONS[self.activation](z))
        return x + branch(z, "mlp_scale")


def _layer_norm(epsilon, name):
    # The fast variance, E[x²] − E[x]², loses digits by cancellation in float32, and an epsilon of 1e-12 is
    # too small to cover the error.
    return linen.LayerNorm(epsilon, use_fast_variance=False, name=name)


class ViT(linen.Module):
    """A vision transformer with non-overlapping patches, a class token and learned position embeddings.

    The defaults are those of ViT-B/16. Other sizes are, as (width, depth, heads, mlp): Ti (192, 12, 3, 768),
    S (384, 12, 6, 1536), L (1024, 24, 16, 4096), H (1280, 32, 16, 5120).

    DINOv2 has patches of 14, `layer_scale`, four `registers` in some versions, and an epsilon of 1e-6. The
    image tower of CLIP has `pre_norm`, `activation="quick_gelu"`, `patch_bias=False`, a `projection`, and an
    epsilon of 1e-5.

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
      layer_scale: initial value of a learned scale of each channel after each attention and MLP; None for no
        scale.
      registers: number of learned tokens without a position between class token and patches; they take part
        in attention and are left out of the features.
      pre_norm: True for a layer normalisation of the tokens before the first transformer layer.
      activation: activation of the MLPs: "gelu", or "quick_gelu" for x σ(1.702 x).
      patch_bias: True for a bias in the embedding of patches.
      projection: width of a linear layer without bias after the last normalisation, whose outputs are the
        features; None for no projection.

    Raises:
      ValueError: images of a size other than `image_size`; an `image_size` that is not a multiple of `patch`;
        `heads` that do not divide `width`; an unknown `pooling` or `activation`; negative
        `registers`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> network = jm.nn.ViT(patch=4, width=8, depth=2, heads=2, mlp=16, image_size=8, ways=5)
      >>> variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> jax.jit(network.apply)(variables, jnp.zeros((2, 8, 8, 3))).shape
      (2, 5)

    References:
      Dosovitskiy et al., An Image is Worth 16×16 Words, 2020; Radford et al., Learning Transferable Visual
      Models from Natural Language Supervision (CLIP), 2021; Oquab et al., DINOv2, 2023; Darcet et al., Vision
      Transformers Need Registers, 2023.
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
    layer_scale: float | None = None
    registers: int = 0
    pre_norm: bool = False
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    patch_bias: bool = True
    projection: int | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Return the numbers of patches along height and width."""
        height, width = self.sides
        return height // self.patch, width // self.patch

    @property
    def sides(self) -> tuple[int, int]:
        """Return the height and width of the images."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @linen.compact
    def __call__(self, x: Float[Array, "n h w c"], deterministic: bool = True) -> Float[Array, "n d"]:
        self._check(x)
        window = (self.patch, self.patch)
        embed = Conv(self.width, window, window, "VALID", use_bias=self.patch_bias, name="patch_embedding")
        x = embed(x)
        x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], self.width)
        small = linen.initializers.truncated_normal(0.02)
        token = self.param("cls_token", small, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], 1)
        x = x + self.param("position_embedding", small, (1, *x.shape[1:]))
        if self.registers:
            registers = self.param("register_tokens", small, (1, self.registers, self.width))
            registers = jnp.broadcast_to(registers, (x.shape[0], *registers.shape[1:]))
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], 1)
        x = linen.Dropout(self.dropout)(x, deterministic)
        if self.pre_norm:
            x = _layer_norm(self.epsilon, "embedding_norm")(x)
        for i in range(self.depth):
            block = TransformerBlock(
                self.heads,
                self.mlp,
                self.epsilon,
                self.dropout,
                self.qkv_bias,
                self.layer_scale,
                self.activation,
                name=f"block{i}",
            )
            x = block(x, deterministic)
        # Layer normalisation is per token, so that only one token need be normalised after pooling.
        x = x[:, 0] if self.pooling == "cls" else x[:, 1 + self.registers :].mean(1)
        x = _layer_norm(self.epsilon, "norm")(x)
        if self.projection is not None:
            x = linen.Dense(self.projection, use_bias=False, name="feature_projection")(x)
        return linear_head(x, self.ways)

    def _check(self, x):
        check_word("pooling", self.pooling, POOLINGS)
        check_word("activation", self.activation, tuple(ACTIVATIONS))
        check_count("registers", self.registers, 0)
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
