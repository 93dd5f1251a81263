"""Memory-augmented networks: episodes as sequences, in which each label arrives one step late."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmeta import declare, losses
from jaxmeta.checks import ArgumentError, check_count, check_kind
from jaxmeta.core import (
    Augment,
    Batch,
    Key,
    Learner,
    Metrics,
    Params,
    PyTree,
    Task,
    augmented,
    blank_padding,
    ways_of,
)
from jaxmeta.model_based.order import random_order
from jaxmeta.nn.embedding import flattened
from jaxmeta.nn.memory import MemoryNetwork
from jaxmeta.nn.recurrence import scan_steps
from jaxmeta.tasks.distortions import distort
from jaxmeta.tasks.sequences import check_strings


def _network(
    build: Callable[[int], MemoryNetwork], tasks: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Build a network with one output for each class, or letters · characters outputs for strings."""
    strings = tasks.get("strings")
    return (build(math.prod(strings) if strings else tasks["train_ways"]),), {}


@declare.learner(
    kinds=("classification",),
    rows={"inductive": "none"},
    networks=("lrua", "lrua-feed-forward", "ntm", "lstm", "feed-forward"),
    network=_network,
    # As in the paper: shifts up to 10 of 105 pixels, rotations up to π/16.
    augment=partial(distort, rotation=11.25, shear=0.0, scale=0.0, shift=10 / 105, probability=1.0),
    training={
        "network": "lrua",
        "norm": "none",
        "outer_lr": 1e-3,
        "schedule": "constant",
        "meta_batch": 16,
        # Time steps are sequential, so all sequences on a device take each step together.
        "strategy": "vmap",
    },
)
def mann(
    network: MemoryNetwork,
    *,
    strings: tuple[int, int] | None = None,
    shuffle: bool = True,
    augment: Augment | None = None,
    instances: int = 10,
) -> Learner:
    """Build MANN, a recurrent network that stores the support set in a memory (Santoro et al. 2016).

    The support set is a sequence: at step t the network receives (x_t, y_{t−1}) and predicts y_t, and so
    binds examples to labels in its memory. Each query is one step after the end of the sequence; queries do
    not change the memory and do not affect each other. The loss is the sum of the cross-entropies of all
    steps and all queries, including steps at which the label can only be guessed.

    Params: parameters of the network under "network". Adapted: "state" of the network after the sequence, and
    "last", the encoded last label.

    Args:
      network: recurrent network, whose `out` is the number of ways, or letters · characters.
      strings: numbers of letters and characters of string labels; None for class slots. See
        `jm.tasks.sequences`. The network has one softmax for each character, and outputs are joint logits of
        all letters^characters strings.
      shuffle: if True, the support set is shuffled first, which few-shot tasks need because their support set
        is ordered by class. False keeps the order of `jm.tasks.sequences`, which is already random.
      augment: augmentation `(key, x) -> x` of all images in training.
      instances: number of presentations of a class with separate accuracies, "instance_1", …; a presentation
        that does not occur has count 0.

    Returns:
      A `Learner`.

    Raises:
      ValueError: invalid settings; by `init`, a network whose output width differs from that of the labels.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> tasks = jm.tasks.sequences(jm.tasks.glyphs("train", ways=5, shots=10, queries=1))
      >>> learner = jm.mann(jm.nn.MemoryNetwork(out=5), shuffle=False)
      >>> params = learner.init(jax.random.key(0), tasks.sample(jax.random.key(1)))
      >>> support, query = tasks.sample(jax.random.key(2))
      >>> learner.predict(params, learner.adapt(params, support, jax.random.key(3)), query.x).shape
      (5, 5)

    References:
      Santoro, Bartunov, Botvinick, Wierstra & Lillicrap, Meta-Learning with Memory-Augmented Neural
      Networks, 2016.
    """
    check_kind("network", network, MemoryNetwork, "a jm.nn.MemoryNetwork")
    check_strings(strings)
    check_count("instances", instances, 0)
    codes = _Labels(strings)

    def call(params: Params, method: str, *arguments: Any) -> Any:
        return network.apply({"params": params["network"]}, *arguments, method=method)

    def init(key: Key, task: Task) -> Params:
        support = task.support
        width = codes.width(ways_of(support))
        if network.out != width:
            raise ArgumentError(
                "network", f"got out={network.out}; the labels of these tasks need out={width}"
            )
        step = jnp.zeros(math.prod(support.x.shape[1:]) + width, losses.full_precision(support.x).dtype)
        return {"network": network.init(key, step)["params"]}

    def write_support(params: Params, support: Batch, key: Key) -> tuple[PyTree, Batch, Array]:
        """Return the memory after the sequence, the sequence, and the outputs at its steps."""
        if shuffle:
            support = _shuffled(support, key)
        # Inputs have full precision, because labels are inputs too and the memory accumulates over steps.
        x = losses.full_precision(flattened(support.x))
        labels = codes.encoded(support.y, ways_of(support)).astype(x.dtype)
        before, last = _label_before(labels, support.mask)
        inputs = jnp.concatenate([x, before], 1)

        start = jax.tree.map(lambda leaf: leaf.astype(x.dtype), network.initial())
        projected = call(params, "project", inputs)
        state, features = scan_steps(network, params["network"], start, projected, support.mask)
        return {"state": state, "last": last}, support, call(params, "outputs", features)

    def answer_queries(params: Params, memory: PyTree, x: Array) -> Array:
        last = jnp.broadcast_to(memory["last"], (x.shape[0], memory["last"].shape[0]))
        x = losses.full_precision(flattened(x))
        projected = call(params, "project", jnp.concatenate([x, last], 1))
        features = jax.vmap(lambda now: call(params, "step", memory["state"], now)[1])(projected)
        return call(params, "outputs", features)

    def task_loss(params: Params, task: Task, key: Key, step: Array | None = None) -> tuple[Array, Metrics]:
        del step
        support, query = map(blank_padding, task)
        draw, order = jax.random.split(key)
        support, query = map(partial(augmented, augment), jax.random.split(draw), (support, query))
        memory, sequence, outputs = write_support(params, support, order)
        query_outputs = answer_queries(params, memory, query.x)
        value = codes.loss(outputs, sequence) + codes.loss(query_outputs, query)
        metrics = _by_instance(codes.correct(outputs, sequence.y), sequence, instances)
        joint = losses.score(codes.joint(query_outputs), query)
        return value, {"loss": (value, jnp.ones_like(value)), **joint, **metrics}

    def adapt(params: Params, support: Batch, key: Key) -> PyTree:
        # The order is drawn from the second half of the key, as in `task_loss`.
        return write_support(params, blank_padding(support), jax.random.split(key)[1])[0]

    def predict(params: Params, adapted: PyTree, x: Array, mask: Array | None = None) -> Array:
        del mask
        return codes.joint(answer_queries(params, adapted, x))

    return Learner(init, adapt, predict, task_loss)


class _Labels:
    """Encoding and decoding of labels, which are class slots or strings of characters."""

    def __init__(self, strings: tuple[int, int] | None):
        self.strings = strings

    def width(self, ways: int) -> int:
        if self.strings is None:
            return ways
        letters, characters = self.strings
        if letters**characters != ways:
            raise ArgumentError(
                "strings",
                f"got {self.strings}, {letters**characters} strings, but the tasks have {ways} labels; "
                "pass the same strings to jm.tasks.sequences",
            )
        return letters * characters

    def digits(self, y: Int[Array, " n"]) -> Int[Array, "n characters"]:
        if self.strings is None:
            return y[:, None]
        letters, characters = self.strings
        return y[:, None] // jnp.asarray([letters**i for i in range(characters)])[None] % letters

    def encoded(self, y: Int[Array, " n"], ways: int) -> Float[Array, "n width"]:
        letters = ways if self.strings is None else self.strings[0]
        return jax.nn.one_hot(self.digits(y), letters).reshape(y.shape[0], self.width(ways))

    def _by_character(self, outputs: Float[Array, "n width"]) -> Float[Array, "n characters letters"]:
        letters = outputs.shape[1] if self.strings is None else self.strings[0]
        return outputs.reshape(outputs.shape[0], outputs.shape[1] // letters, letters)

    def loss(self, outputs: Float[Array, "n width"], batch: Batch) -> Float[Array, ""]:
        """Return the cross-entropy, summed over examples and characters."""
        by_character = optax.softmax_cross_entropy_with_integer_labels(
            self._by_character(outputs), self.digits(batch.y)
        )
        return losses.masked_sum(by_character.sum(1), batch.mask)[0]

    def correct(self, outputs: Float[Array, "n width"], y: Int[Array, " n"]) -> Bool[Array, " n"]:
        correct = (self._by_character(outputs).argmax(-1) == self.digits(y)).all(1)
        return correct & ~jnp.isnan(outputs).any(1)

    def joint(self, outputs: Float[Array, "n width"]) -> Float[Array, "n ways"]:
        if self.strings is None:
            return outputs
        # The first character is the least significant digit, so its axis comes last.
        by_character = self._by_character(outputs)
        total = by_character[:, 0]
        for i in range(1, by_character.shape[1]):
            sums = by_character[:, i, :, None] + total[:, None, :]
            total = sums.reshape(outputs.shape[0], sums.shape[1] * sums.shape[2])
        return total


def _shuffled(batch: Batch, key: Key) -> Batch:
    order = random_order(key, jnp.ones(batch.y.shape, bool) if batch.mask is None else batch.mask)
    mask = None if batch.mask is None else batch.mask[order]
    return Batch(batch.x[order], batch.y[order], mask=mask, ways=batch.ways)


def _label_before(
    labels: Float[Array, "n width"], mask: Bool[Array, " n"] | None
) -> tuple[Float[Array, "n width"], Float[Array, " width"]]:
    """Return the label of the last real step before each step (zeros if none), and the final label."""
    steps = jnp.arange(labels.shape[0])
    latest = steps if mask is None else lax.cummax(jnp.where(mask, steps, -1))
    known = jnp.where(latest[:, None] >= 0, labels[jnp.maximum(latest, 0)], 0)
    return jnp.concatenate([jnp.zeros_like(labels[:1]), known[:-1]]), known[-1]


def _by_instance(correct: Bool[Array, " n"], sequence: Batch, instances: int) -> Metrics:
    real = jnp.ones(correct.shape, bool) if sequence.mask is None else sequence.mask
    same = (sequence.y[:, None] == sequence.y[None, :]) & real[None, :]
    before = jnp.tril(same, -1).sum(1)
    metrics = {}
    for i in range(instances):
        selected = real & (before == i)
        metrics[f"instance_{i + 1}"] = (
            jnp.where(selected, correct, 0).sum().astype(jnp.float32),
            selected.sum().astype(jnp.float32),
        )
    return metrics
