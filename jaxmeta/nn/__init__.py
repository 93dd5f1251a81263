"""Networks and layers, and adapters for networks of Flax and Equinox.

**Networks.** `Conv4`, `StridedConv4`, `ResNet12`, `ResNet18`, `ResNet34`, `ResNet50`, `SqueezeNet`, `ViT`,
`MLP`, `RelationEmbedding`, `Koch`; `Identity`, for features that are already computed; `MemoryNetwork` with
the memory `LRUA` or `NTM`; `AugmentedCNN` with fast weights.

**Normalisation.** Which statistics normalise the queries moves published numbers by points, so it is a
setting of the learner, `norm=`, and every report states it. It changes no parameter: the same trained
parameters are evaluated under each.

| `norm` | the statistics are those of | the prediction is |
| --- | --- | --- |
| `"batch"` | the queries themselves; where embeddings are compared, of support and queries together | transductive: it depends on the other queries. MAML's published numbers; the default |
| `"support"` | the support set, at the adapted weights | inductive: it depends on the support set and its own example alone |
| `"population"` | the training tasks, computed once by `jm.calibrate`, which `jaxmeta train` calls at the end of a run | inductive; the published numbers of prototypical and matching networks |
| `"episode"` | a running average over the inner steps of the task (LSTM meta-learner) | inductive |

The reports of `jaxmeta train` give transductive and inductive accuracy side by side and, for a network without
batch normalisation, where they are equal, once. `jm.load_run` and the command `predict` are inductive.
Statistics are values, not hidden state: `BatchNorm` uses those that it is given, and otherwise those of the
batch, which it returns.

>>> import jax
>>> import jaxmeta as jm
>>> x, y = jax.random.normal(jax.random.key(0), (15, 28, 28, 1)), jax.numpy.arange(15) % 5
>>> task = jm.Task(support=jm.Batch(x[:5], y[:5], ways=5), query=jm.Batch(x, y, ways=5))
>>> network = jm.nn.MLP(out=5, hidden=(16,), norm=True)
>>> transductive, inductive = (jm.maml(network, inner_lr=0.1, norm=norm) for norm in ("batch", "support"))
>>> params = inductive.init(jax.random.key(1), task)
>>> def is_inductive(learner):
...     adapted = jax.jit(learner.adapt)(params, task.support, jax.random.key(2))
...     predict = jax.jit(learner.predict)
...     together, alone = (predict(params, adapted, x)[0] for x in (task.query.x, task.query.x[:1]))
...     return bool(abs(together - alone).max() < 1e-5)
>>> is_inductive(inductive), is_inductive(transductive)
(True, False)

**Your own network.** A learner takes a Flax Linen module, a Flax NNX module, an Equinox module or a pair of
functions `init(key, x) -> params` and `apply(params, x) -> outputs` (`as_model`, `from_nnx`, `from_equinox`).
Parameters come out as nested dicts. jaxmeta does not install Equinox: `pip install equinox`.

>>> from flax import nnx
>>> class Net(nnx.Module):
...     # Batch statistics are values and dropout takes explicit keys: there is no mode to switch.
...     def __init__(self, rngs):
...         self.hidden = nnx.Linear(784, 16, rngs=rngs)
...         self.norm = nnx.BatchNorm(16, rngs=rngs)
...         self.dropout = nnx.Dropout(0.1, rngs=rngs)
...         self.out = nnx.Linear(16, 5, rngs=rngs)
...
...     def __call__(self, x):  # (n, 28, 28, 1)
...         hidden = self.norm(self.hidden(x.reshape(len(x), -1)))
...         return self.out(self.dropout(jax.nn.relu(hidden)))
>>> def init(key, x):
...     return {"w": jax.random.normal(key, (x[0].size, 5)) / 28}
>>> def apply(params, x):
...     return x.reshape(len(x), -1) @ params["w"]
>>> import equinox as eqx
>>> class Mlp(eqx.Module):  # Equinox modules take one example; their convolutions expect (c, h, w)
...     mlp: eqx.nn.MLP
...
...     def __call__(self, x):
...         return self.mlp(x.reshape(-1))
>>> networks = {
...     "Flax NNX": jm.nn.from_nnx(Net),  # called with nnx.Rngs(key) at each initialisation
...     "Equinox": jm.nn.from_equinox(lambda key: Mlp(eqx.nn.MLP(784, 5, 16, 1, key=key))),
...     "functions": (init, apply),
...     "Flax Linen": jm.nn.MLP(out=5, hidden=(16,), norm=True),
... }
>>> for name, network in networks.items():
...     learner = jm.maml(network, inner_lr=0.1, norm="support")
...     params = jax.jit(learner.init)(jax.random.key(0), task)
...     adapted = jax.jit(learner.adapt)(params, task.support, jax.random.key(1))
...     print(name, jax.jit(learner.predict)(params, adapted, task.query.x).shape)
Flax NNX (15, 5)
Equinox (15, 5)
functions (15, 5)
Flax Linen (15, 5)

A network with dropout draws new random numbers in every inner step, and is deterministic in
`predict`. `jaxmeta networks` lists the networks of this package; `--network my_module:Net` takes one of
yours.

**Speed.** `Conv` is a drop-in replacement for `flax.linen.Conv` that stays fast under `vmap` when every task
has kernels of its own. **Low-rank adaptation.** `lora` gives any network low-rank factors that tasks adapt in
place of its kernels. **Precision.** `in_precision(network)` computes a network in bfloat16, with its
parameters and batch statistics in float32 (`jaxmeta.training`).
"""  # noqa: E501

from jaxmeta.nn.adapters import Network, as_model, from_equinox, from_nnx
from jaxmeta.nn.augmented import AugmentedCNN, AugmentedConv, AugmentedDense
from jaxmeta.nn.conv import conv
from jaxmeta.nn.coordinatewise import CoordinatewiseLSTM, GatedUpdate, ProposedUpdate, log_and_sign
from jaxmeta.nn.embedding import MLP, Conv4, Identity, StridedConv4, max_pool_2x2
from jaxmeta.nn.koch import Koch
from jaxmeta.nn.layers import Conv, conv_general_dilated
from jaxmeta.nn.lora import lora, merge_lora
from jaxmeta.nn.memory import LRUA, NTM, MemoryNetwork
from jaxmeta.nn.norm import BatchNorm
from jaxmeta.nn.precision import in_precision
from jaxmeta.nn.preprocessed import preprocessed
from jaxmeta.nn.relation import RelationEmbedding, RelationModule
from jaxmeta.nn.residual import ResNet, ResNet18, ResNet34, ResNet50
from jaxmeta.nn.resnet import ResNet12
from jaxmeta.nn.squeezenet import SqueezeNet
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
    "Identity",
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
    "SqueezeNet",
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
    "merge_lora",
    "preprocessed",
    "resize_positions",
]
