"""Networks and layers; the only part of the package that imports Flax."""

from jaxmeta.nn.adapters import Network, as_model, from_equinox, from_nnx
from jaxmeta.nn.augmented import AugmentedCNN, AugmentedConv, AugmentedDense
from jaxmeta.nn.conv import conv
from jaxmeta.nn.coordinatewise import CoordinatewiseLSTM, GatedUpdate, ProposedUpdate, log_and_sign
from jaxmeta.nn.embedding import MLP, Conv4, StridedConv4, max_pool_2x2
from jaxmeta.nn.koch import Koch
from jaxmeta.nn.layers import Conv, conv_general_dilated
from jaxmeta.nn.lora import lora
from jaxmeta.nn.memory import LRUA, NTM, MemoryNetwork
from jaxmeta.nn.norm import BatchNorm
from jaxmeta.nn.precision import in_precision
from jaxmeta.nn.relation import RelationEmbedding, RelationModule
from jaxmeta.nn.residual import ResNet, ResNet18, ResNet34, ResNet50
from jaxmeta.nn.resnet import ResNet12
from jaxmeta.nn.stateful import StatefulModel, as_stateful, chain, layers_in_order
from jaxmeta.nn.vit import ViT, resize_positions

__all__ = [
    "LRUA",
    "MLP",
    "NTM",
    "AugmentedCNN",
    "AugmentedConv",
    "AugmentedDense",
    "BatchNorm",
    "Conv",
    "Conv4",
    "CoordinatewiseLSTM",
    "GatedUpdate",
    "Koch",
    "MemoryNetwork",
    "Network",
    "ProposedUpdate",
    "RelationEmbedding",
    "RelationModule",
    "ResNet",
    "ResNet12",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "StatefulModel",
    "StridedConv4",
    "ViT",
    "as_model",
    "as_stateful",
    "chain",
    "conv",
    "conv_general_dilated",
    "from_equinox",
    "from_nnx",
    "in_precision",
    "layers_in_order",
    "log_and_sign",
    "lora",
    "max_pool_2x2",
    "resize_positions",
]
