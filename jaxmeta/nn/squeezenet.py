"""SqueezeNet 1.1, compatible with the weights of torchvision."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen
from jaxtyping import Array, Float

from jaxmeta.checks import check_word
from jaxmeta.nn.embedding import linear_head, require_size
from jaxmeta.nn.layers import Conv
from jaxmeta.nn.residual import max_pool_3x3

CLASSIFIERS = ("linear", "convolution")
# Channels of the squeeze layer and of each of the two expand layers, and the fire modules that pooling
# precedes.
_FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
_POOLED = (0, 2, 4)
_INIT = linen.initializers.he_uniform()


class Fire(linen.Module):
    """A fire module: a 1×1 convolution to few channels, then 1×1 and 3×3 convolutions side by side.

    Attributes:
      squeeze: output channels of the first convolution.
      expand: output channels of each of the other two; their outputs are concatenated.
    """

    squeeze: int
    expand: int

    @linen.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c2"]:
        def conv(x, filters, size, name):
            return jax.nn.relu(Conv(filters, (size, size), kernel_init=_INIT, name=name)(x))

        x = conv(x, self.squeeze, 1, "squeeze")
        return jnp.concatenate(
            [conv(x, self.expand, 1, "expand1x1"), conv(x, self.expand, 3, "expand3x3")], -1
        )


class SqueezeNet(linen.Module):
    """SqueezeNet 1.1: 512 features, 722,496 parameters without a head.

    A 3×3 convolution of stride 2 without padding is followed by eight fire modules. A 3×3 max-pooling of
    stride 2 precedes the first, third and fifth of them; its last window may reach over the edge
    ("ceil_mode" in torch). The features are the mean of the last module's maps over space.

    The published classifier is not linear in these features: it is a 1×1 convolution, ReLU, and the mean over
    space. `classifier="convolution"` is that one, with "head/kernel" of shape (1, 1, 512, ways), and
    `jm.transfer.load_pretrained` builds it for weights with a head. By default the head is linear, as that of
    the other networks: a ReLU after it would give no gradient for classes whose outputs are negative.

    Attributes:
      ways: width of the classifier "head"; None for the features.
      classifier: "linear" for a linear layer on the features; "convolution" for the published classifier.
      dropout: share of values that are dropped before the classifier where `deterministic` is False; 0.5 in
        torchvision.

    Raises:
      ValueError: images smaller than 17×17, which pooling would shrink to empty maps; an unknown
        `classifier`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> network, x = jm.nn.SqueezeNet(ways=5), jnp.zeros((2, 64, 64, 3))
      >>> jax.eval_shape(lambda x: network.init_with_output(jax.random.key(0), x)[0], x).shape
      (2, 5)

    References:
      Iandola et al., SqueezeNet: AlexNet-Level Accuracy with 50× Fewer Parameters, 2016.
    """

    ways: int | None = None
    classifier: Literal["linear", "convolution"] = "linear"
    dropout: float = 0.0

    @linen.compact
    def __call__(self, x: Float[Array, "n h w c"], deterministic: bool = True) -> Float[Array, "n d"]:
        check_word("classifier", self.classifier, CLASSIFIERS)
        # Each pooling needs two rows: 17 shrink to 8, 4, 2 and 1.
        require_size(x, 17)
        x = jax.nn.relu(Conv(64, (3, 3), 2, "VALID", kernel_init=_INIT, name="stem")(x))
        for i, (squeeze, expand) in enumerate(_FIRES):
            x = max_pool_3x3(x, ceil_mode=True) if i in _POOLED else x
            x = Fire(squeeze, expand, name=f"fire{i}")(x)
        drop = linen.Dropout(self.dropout, deterministic=deterministic)
        if self.ways is None or self.classifier == "linear":
            x = x.mean((1, 2))
            return x if self.ways is None else linear_head(drop(x), self.ways)
        init = linen.initializers.normal(0.01)
        return jax.nn.relu(Conv(self.ways, (1, 1), kernel_init=init, name="head")(drop(x))).mean((1, 2))
