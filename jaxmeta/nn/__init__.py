"""Networks and layers; the only part of the package that imports Flax."""

from jaxmeta.nn.adapters import Network, as_model, from_equinox, from_nnx
from jaxmeta.nn.conv import conv
from jaxmeta.nn.embedding import MLP, Conv4, StridedConv4, max_pool_2x2
from jaxmeta.nn.layers import Conv, conv_general_dilated
from jaxmeta.nn.norm import BatchNorm
from jaxmeta.nn.resnet import ResNet12

__all__ = [
    "MLP",
    "BatchNorm",
    "Conv",
    "Conv4",
    "Network",
    "ResNet12",
    "StridedConv4",
    "as_model",
    "conv",
    "conv_general_dilated",
    "from_equinox",
    "from_nnx",
    "max_pool_2x2",
]
