"""Shapes, fixed tasks and operation counts of the meta-steps that `throughput.py` times.

Operations are the multiplications and additions of matrix products and convolutions, including products with
padding zeros, as is usual. Normalisation, activations, pooling, losses, updates and recomputation to save
memory are not counted.
"""

import dataclasses

import numpy as np

import jaxmeta as jm
from jaxmeta.cli.report import plural


@dataclasses.dataclass(frozen=True)
class ConvRow:
    """The meta-step of MAML or, with 0 inner steps, of prototypical networks, which have no head.

    `features` is the input width of the linear head. `blocks` and `padding` are settings of the max-pooled
    network; the strided one has four padded blocks.
    """

    image: tuple[int, int, int]
    filters: int
    strided: bool
    features: int
    queries: int
    inner_steps: int
    inner_lr: float
    meta_batch: int
    ways: int = 5
    shots: int = 1
    outer_lr: float = 1e-3
    strategy: str | int = "auto"
    blocks: int = 4
    padding: str = "SAME"

    @property
    def peers(self) -> tuple[str, ...]:
        """Return the names of the peers that can compute this row."""
        if not self.inner_steps:
            return ("torch.autograd", "torch.compile, loop", "plain JAX")
        eager = ("torch.func", "torch.autograd", "higher", "learn2learn")
        return (*eager, "torch.compile, loop", "torch.compile, vmap", "plain JAX")

    def describe(self) -> str:
        return (
            f"{self.ways}-way {self.shots}-shot, {plural(self.queries, 'query')} per class, "
            f"{'strided ' if self.strided else ''}Conv{self.blocks}-{self.filters} "
            f"{'without padding ' if self.padding == 'VALID' else ''}on {self.image}, "
            + (plural(self.inner_steps, "inner step") if self.inner_steps else "prototypical networks")
        )

    def learner(self, order: str) -> jm.Learner:
        ways = self.ways if self.inner_steps else None
        if self.strided:
            network = jm.nn.StridedConv4(ways, self.filters)
        else:
            network = jm.nn.Conv4(ways, self.filters, blocks=self.blocks, padding=self.padding)
        if not self.inner_steps:
            return jm.prototypical(network)
        return jm.maml(network, inner_lr=self.inner_lr, inner_steps=self.inner_steps, order=order)

    def tasks(self, count: int, seed: int) -> jm.Task:
        return _tasks(self, count, seed)

    def operations(self, order: str) -> int:
        """Return the floating-point operations of one meta-step: 2 × multiply-adds of convolutions and head.

        A linear layer is y = A(x, w). Per image and layer, in units of one forward pass (M multiply-adds):

            pass                                             first layer   other layers
            y = A(x, w)                                           1             1
            its gradient: w̄ = ȳ·x, x̄ = ȳ·w                        1             2
            the gradient's gradient: from w̄ to ȳ and x, from
            x̄ to ȳ and w, from y to x and w                       2             6

        The first layer's input is data, so x̄ and every term from or to it are absent: the third line keeps
        the terms from w̄ to ȳ and from y to w. Forward-over-reverse mode needs as many units, because each of
        the three bilinear maps has two tangents.

        Support images take part in every inner step, with 1 + 1 + 2 units (first layer) or 1 + 2 + 6
        (other layers) in second order, and 1 + 1 or 1 + 2 in first order. Query images take part once, in the
        outer gradient: 1 + 1 or 1 + 2. Prototypical networks have one forward and one backward pass over all
        images, 1 + 1 or 1 + 2, and the distances.
        """
        layers = _conv_layers(
            self.image, self.filters, self.blocks, strided=self.strided, padding=self.padding
        )
        if not self.inner_steps:
            images = self.ways * (self.shots + self.queries)
            distances = 3 * self.ways * self.ways * self.queries * self.features
            return 2 * self.meta_batch * (images * (2 * layers[0] + 3 * sum(layers[1:])) + distances)
        layers.append(self.features * self.ways)

        support = self.ways * self.shots * self.inner_steps
        query = self.ways * self.queries
        first, other = (4, 9) if order == "second" else (2, 3)
        macs = layers[0] * (support * first + query * 2) + sum(layers[1:]) * (support * other + query * 3)
        return 2 * macs * self.meta_batch


@dataclasses.dataclass(frozen=True)
class SequenceRow:
    """The meta-step of memory-augmented networks, on sequences with an empty query set."""

    image: tuple[int, int, int] = (20, 20, 1)
    ways: int = 5
    length: int = 50
    hidden: int = 200
    rows: int = 128
    width: int = 40
    heads: int = 4
    meta_batch: int = 16
    outer_lr: float = 1e-3
    # All sequences of a device advance together, as the learner declares.
    strategy: str | int = "vmap"
    peers = ("torch.autograd", "torch.compile")

    def describe(self) -> str:
        return (
            f"sequences of {self.length} images {self.image} of {self.ways} classes, LSTM of {self.hidden}, "
            f"memory {self.rows}×{self.width}, {self.heads} heads"
        )

    def learner(self, order: str) -> jm.Learner:
        del order
        memory = jm.nn.LRUA(rows=self.rows, width=self.width, heads=self.heads)
        network = jm.nn.MemoryNetwork(out=self.ways, memory=memory, hidden=self.hidden)
        return jm.mann(network, shuffle=False)

    def tasks(self, count: int, seed: int) -> jm.Task:
        rng = np.random.default_rng(seed)

        def batch(steps):
            x = rng.normal(size=(count, steps, *self.image)).astype(np.float32)
            return jm.Batch(x, rng.integers(0, self.ways, (count, steps), np.int32), ways=self.ways)

        return jm.Task(batch(self.length), batch(0))

    def operations(self, order: str) -> int:
        """Return the operations of controller, heads and memory: one unit forward and two for the gradient.

        The inputs are data and need no gradient: their products take one unit forward and one backward.
        """
        del order
        gates, reads = 4 * self.hidden, self.heads * self.width
        inputs = (np.prod(self.image) + self.ways) * gates
        # Each head has three products of the memory's size: write, compare and read.
        recurrent = (self.hidden + reads) * gates + self.hidden * (reads + self.heads) + 3 * reads * self.rows
        outputs = (self.hidden + reads) * self.ways
        return int(2 * self.meta_batch * self.length * (2 * inputs + 3 * (recurrent + outputs)))


@dataclasses.dataclass(frozen=True)
class FastWeightsRow:
    """The meta-step of Meta Networks, as published for Omniglot; no maintained peer implements it."""

    image: tuple[int, int, int] = (28, 28, 1)
    filters: int = 64
    features: int = 64
    ways: int = 5
    shots: int = 1
    queries: int = 10
    samples: int = 5
    hidden: int = 20
    meta_batch: int = 2
    outer_lr: float = 1e-3
    strategy: str | int = "auto"
    peers = ()

    def describe(self) -> str:
        return (
            f"{self.ways}-way {self.shots}-shot, {plural(self.queries, 'query')} per class, Meta Networks of "
            f"two CNNs with 5 × {self.filters} filters on {self.image}"
        )

    def learner(self, order: str) -> jm.Learner:
        del order
        embedding, base = (
            jm.nn.AugmentedCNN(ways, filters=self.filters, features=self.features)
            for ways in (None, self.ways)
        )
        return jm.metanet(embedding, base, embedding_loss="xent", samples=self.samples, hidden=self.hidden)

    def tasks(self, count: int, seed: int) -> jm.Task:
        return _tasks(self, count, seed)

    def operations(self, order: str) -> int:
        """Return the operations of both networks, both generators, and the mixtures that queries read.

        The support gradients are with respect to the slow weights only and are not differentiated: one
        forward and one backward pass. Afterwards every layer has two products, with slow and with fast
        weights, each with a forward and a backward pass: in the embedding for support and query set, in the
        base learner for the query set. The first layer's images need no gradient.
        """
        del order
        layers = _conv_layers(self.image, self.filters, blocks=5, ceil=True)
        fc, head = self.filters * self.features, self.features * self.ways
        embedding = 2 * layers[0] + 3 * (sum(layers[1:]) + fc)
        base = embedding + 3 * head
        support, query = self.ways * self.shots, self.ways * self.queries
        networks = support * (embedding + 3 * head + base) + 2 * (
            (support + query) * embedding + query * base
        )

        convs = 9 * self.filters * (self.image[2] + 4 * self.filters)
        lstm = self.samples * 4 * self.hidden * (2 * 2 + 3 * self.hidden) + 3 * self.hidden
        mlp = self.hidden * (2 * 2 + 3 * self.hidden + 3)
        of_base = convs + fc + head
        generators = (convs + fc) * lstm + support * of_base * mlp
        mixtures = 3 * query * support * of_base
        return 2 * self.meta_batch * (networks + generators + mixtures)


@dataclasses.dataclass(frozen=True)
class LSTMRow:
    """The meta-step of the LSTM meta-learner; no maintained peer implements it."""

    image: tuple[int, int, int] = (28, 28, 1)
    filters: int = 32
    ways: int = 5
    shots: int = 1
    queries: int = 15
    inner_steps: int = 12
    hidden: int = 20
    meta_batch: int = 4
    outer_lr: float = 1e-3
    strategy: str | int = "auto"
    peers = ()

    def describe(self) -> str:
        return (
            f"{self.ways}-way {self.shots}-shot, {plural(self.queries, 'query')} per class, "
            f"strided Conv4-{self.filters} on {self.image}, LSTM meta-learner, "
            f"{plural(self.inner_steps, 'inner step')}"
        )

    def learner(self, order: str) -> jm.Learner:
        # The published order, which differentiates through the optimizer alone.
        del order
        network = jm.nn.StridedConv4(self.ways, self.filters)
        return jm.lstm_meta_learner(network, inner_steps=self.inner_steps, hidden=self.hidden)

    def tasks(self, count: int, seed: int) -> jm.Task:
        return _tasks(self, count, seed)

    def operations(self, order: str) -> int:
        """Return the operations of the network on support and queries, and of the LSTM on every parameter.

        The support gradients are constants: one forward and one backward pass in every inner step, as the
        queries have once. The LSTM's products with its inputs (two features each of gradient and loss,
        constants too) take one unit forward and one backward; those with its state and those of the two gates
        take one forward and two backward.
        """
        del order
        convs, head = _conv_layers(self.image, self.filters, 4, strided=True), self.filters * self.ways
        images = self.ways * (self.shots * self.inner_steps + self.queries)
        network = images * (2 * convs[0] + 3 * (sum(convs[1:]) + head))

        # Of each convolution a kernel, a bias and the normalisation's scale and bias.
        parameters = 9 * self.filters * (self.image[2] + 3 * self.filters) + 12 * self.filters
        parameters += head + self.ways
        lstm = 4 * self.hidden * (2 * 4 + 3 * self.hidden) + 2 * 3 * (self.hidden + 2)
        return 2 * self.meta_batch * (network + self.inner_steps * parameters * lstm)


def _conv_layers(image, filters, blocks, *, strided=False, padding="SAME", ceil=False) -> list[int]:
    """Return the multiply-adds of each 3×3 convolution for one image."""
    (height, width, channels), layers = image, []
    for _ in range(blocks):
        if strided:
            height, width = -(-height // 2), -(-width // 2)
        elif padding == "VALID":
            height, width = height - 2, width - 2
        layers.append(height * width * 9 * channels * filters)
        if not strided:
            height, width = ((size + ceil) // 2 for size in (height, width))
        channels = filters
    return layers


def _tasks(row: ConvRow | FastWeightsRow | LSTMRow, count: int, seed: int) -> jm.Task:
    """Return `count` fixed tasks of random images; each class has its own mean image."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(count, row.ways, 1, *row.image))

    def batch(shots):
        noise = rng.normal(size=(count, row.ways, shots, *row.image))
        x = (means + noise).reshape(count, row.ways * shots, *row.image).astype(np.float32)
        y = np.tile(np.repeat(np.arange(row.ways, dtype=np.int32), shots), (count, 1))
        return jm.Batch(x, y, ways=row.ways)

    return jm.Task(batch(row.shots), batch(row.queries))


Row = ConvRow | SequenceRow | FastWeightsRow | LSTMRow

ROWS: dict[str, Row] = {
    # Finn et al. 2017: 5-way 1-shot, the strided network with a spatial mean, one inner step.
    "omniglot": ConvRow((28, 28, 1), 64, True, 64, queries=1, inner_steps=1, inner_lr=0.4, meta_batch=32),
    # The same paper's mini-ImageNet setting: max-pooled network, five inner steps.
    "mini-imagenet": ConvRow(
        (84, 84, 3), 32, False, 800, queries=15, inner_steps=5, inner_lr=0.01, meta_batch=4
    ),
    # The benchmark functorch_maml_omniglot of TorchBench.
    "torchbench": ConvRow(
        (28, 28, 1),
        64,
        False,
        64,
        queries=15,
        inner_steps=5,
        inner_lr=0.1,
        meta_batch=32,
        blocks=3,
        padding="VALID",
    ),
    # Snell et al. 2017: 60-way 1-shot training on Omniglot, one task per step.
    "prototypical": ConvRow(
        (28, 28, 1), 64, False, 64, queries=5, inner_steps=0, inner_lr=0.0, meta_batch=1, ways=60
    ),
    # Santoro et al. 2016: Omniglot, labels one step late.
    "mann": SequenceRow(),
    # Munkhdalai & Yu 2017: Omniglot, 5-way 1-shot.
    "metanet": FastWeightsRow(),
    # Ravi & Larochelle 2017: 5-way 1-shot, 12 inner steps.
    "lstm-meta-learner": LSTMRow(),
}
