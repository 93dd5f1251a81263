"""Meta Networks: slow weights, with fast weights of a task and of each example."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from flax import linen
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmeta import declare, losses
from jaxmeta.checks import ArgumentError, check_count, check_number, check_word
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
from jaxmeta.metric_based.metric_learner import unit
from jaxmeta.model_based.order import random_order
from jaxmeta.nn.augmented import Augmented, ExampleGenerator, TaskGenerator, as_augmented, published_init

EmbeddingLoss = Literal["verification", "contrastive", "xent"]
TaskWeights = Literal["none", "embedding", "both"]
# Number of samples that the official code draws from every support set.
SAMPLES = 5
# Weights generated at once: on a CPU limited by its caches, elsewhere by memory.
CPU_BLOCK, BLOCK = 1 << 10, 1 << 17


def _networks(
    build: Callable[[int | None], Any], tasks: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (build(None), build(tasks["train_ways"])), {}


@declare.learner(
    kinds=("classification",),
    rows={"inductive": "none"},
    networks=("augmented-cnn", "augmented-cnn-32"),
    network=_networks,
    training={
        "network": "augmented-cnn",
        "norm": "none",
        # The paper uses this loss at 1 shot, the official code always.
        "embedding_loss": "xent",
        "task_weights": "embedding",
        "outer_lr": 1e-3,
        # As published: many small meta-steps of one task each.
        "train_queries": 10,
        "meta_batch": 1,
    },
)
def metanet(
    embedding: linen.Module | Augmented,
    base: linen.Module | Augmented,
    *,
    embedding_loss: EmbeddingLoss = "verification",
    task_weights: TaskWeights = "embedding",
    samples: int | None = None,
    hidden: int = 20,
    margin: float = 1.0,
    fast_layers: tuple[str, ...] | None = None,
    queries_at_once: int | None = None,
    augment: Augment | None = None,
) -> Learner:
    r"""Build MetaNet, which generates fast weights from support-set gradients (Munkhdalai & Yu 2017).

    Queries read fast weights by attention. With an embedding u of slow weights Q, a base learner b of slow
    weights W, and generators d and m of weights G and Z,

        Q*   = d(G; ∇_Q L_1, …, ∇_Q L_T)              from T samples of the support set, in order
        W*_i = m(Z; ∇_W CE(b(W, x_i), y_i)),          r_i = u(Q, Q*, x_i)
        W*   = Σ_i softmax_i(cos(r_i, r)) W*_i,       r = u(Q, Q*, x)
        p(y | x) = softmax b(W, W*, x),

    where a layer with slow and fast weights sums their activations (see `jm.nn.AugmentedDense`). The loss is
    the mean cross-entropy of the queries; the official code takes the sum, and clips the gradient norm at 10.
    The gradients that enter d and m are constants, so there are no second derivatives. As in the official
    code, convolutions and dense layers have separate generators.

    Params: "embedding" Q, "base" W, "example_generator" Z; except under `task_weights` "none" also
    "task_generator" G and, except under "contrastive", "embedding_head", the last layer of the embedding
    loss. As in the official code, no gradient of the task's loss reaches "embedding_head", which keeps its
    initial value. `task_weights` "both" adds "base_task_generator".

    Adapted: "keys" r_i, "values" W*_i and "mask" of the support set, and the task's fast weights "embedding"
    and "base", where these are used.

    Args:
      embedding: embedding u, `(x, fast=None) -> (n, dim)`; `jm.nn.AugmentedCNN()` is the published one.
      base: base learner b, `(x, fast=None) -> (n, ways)`, such as `jm.nn.AugmentedCNN(ways=…)`.
      embedding_loss: loss L of the embedding with slow weights only. "xent": the cross-entropy of a linear
        layer on ReLU(r), for chunks of the shuffled support set (the official code); "contrastive": d² for a
        pair of the same class, max(0, margin − d)² for a pair of different classes, at distance d;
        "verification": the binary cross-entropy of σ(Σ_k α_k |r_i − r_j|_k + β). Pairs of two different
        examples are drawn uniformly.
      task_weights: networks with fast weights of the task: "none" (the paper's MetaNet−), "embedding" (Q*) or
        "both" (MetaNet+). Those of the base learner come from an LSTM, as Q* does, over the base gradients of
        the shuffled support set averaged in T chunks; their activations are added as a third term.
      samples: number T of samples of the support set that generate the task's fast weights; None for 5, or
        all support examples if there are fewer.
      hidden: features of the generators of fast weights.
      margin: distance beyond which a pair of different classes has zero loss, under embedding loss
        "contrastive".
      fast_layers: names of the layers with fast weights, in either network; None for all.
      queries_at_once: number of queries whose fast weights, each as large as the base learner, are in memory
        at once, in training too; None for all.
      augment: augmentation `(key, x) -> x` of all images in training.

    Returns:
      A `Learner`.

    Raises:
      ValueError: an unknown `embedding_loss` or `task_weights`; sizes below 1; `fast_layers` that neither
        network has; networks without fast weights or with outputs other than above; float targets;
        `samples` above the size of a support set; a support set of one example where pairs are compared.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.glyphs(ways=5, shots=1, queries=3).sample(jax.random.key(0))
      >>> learner = jm.metanet(jm.nn.AugmentedCNN(filters=4), jm.nn.AugmentedCNN(ways=5, filters=4))
      >>> params = learner.init(jax.random.key(1), task)
      >>> adapted = learner.adapt(params, task.support, jax.random.key(2))
      >>> learner.predict(params, adapted, task.query.x).shape
      (15, 5)

    References:
      Munkhdalai & Yu, Meta Networks, 2017.
    """
    check_word("embedding_loss", embedding_loss, get_args(EmbeddingLoss))
    check_count("hidden", hidden)
    for name, size in (("samples", samples), ("queries_at_once", queries_at_once)):
        if size is not None:
            check_count(name, size)
    check_number("margin", margin, above=0)
    u, b = as_augmented(embedding, "embedding"), as_augmented(base, "base")
    task_generator, example_generator = TaskGenerator(hidden), ExampleGenerator(hidden)
    check_word("task_weights", task_weights, get_args(TaskWeights))
    embedding_has_fast, base_has_fast = task_weights != "none", task_weights == "both"
    compares_pairs = embedding_has_fast and embedding_loss != "xent"

    def with_fast(slow: Params) -> Params:
        """Select the layers that have fast weights."""
        return {name: slow[name] for name in slow if fast_layers is None or name in fast_layers}

    def init(key: Key, task: Task) -> Params:
        support = task.support
        _check_support(support, compares_pairs, samples)
        keys = iter(jax.random.split(key, 6))
        params: Params = {"embedding": u.init(next(keys), support.x), "base": b.init(next(keys), support.x)}
        r, outputs = (
            jax.eval_shape(net.apply, params[name], support.x)
            for net, name in ((u, "embedding"), (b, "base"))
        )
        n, ways = support.x.shape[0], ways_of(support)
        if r.ndim != 2 or r.shape[0] != n:
            raise ArgumentError("embedding", f"gives shape {r.shape} for {n} examples; it must be ({n}, dim)")
        if outputs.shape != (n, ways):
            raise ArgumentError(
                "base", f"gives shape {outputs.shape} for {n} examples of {ways} ways; it must be {(n, ways)}"
            )
        _check_fast_layers(fast_layers, {**params["embedding"], **params["base"]})
        for_base = _groups_of(with_fast(params["base"]))
        params["example_generator"] = _generators(example_generator, next(keys), for_base, 1)
        if embedding_has_fast:
            for_embedding = _groups_of(with_fast(params["embedding"]))
            params["task_generator"] = _generators(task_generator, next(keys), for_embedding, 2)
            if embedding_loss == "xent":
                params["embedding_head"] = {"kernel": published_init(next(keys), (r.shape[1], ways))}
            elif embedding_loss == "verification":
                # They receive no gradient, so their fixed values must already be those of a similarity.
                params["embedding_head"] = {"weights": -jnp.ones(r.shape[1]), "bias": jnp.ones(())}
        if base_has_fast:
            params["base_task_generator"] = _generators(task_generator, next(keys), for_base, 2)
        return params

    def embedding_losses(
        params: Params, support: Batch, mask: Array, key: Key, count: int
    ) -> tuple[Callable[..., Any], PyTree, Array]:
        """Return `(loss, samples, valid)`: `loss(Q, sample)`, its samples, and a mask of the valid ones."""
        head = params.get("embedding_head")
        if embedding_loss == "xent":
            chosen, valid = chunks(key, mask, count)

            def of_chunk(slow: Params, sample: tuple[Array, Array]) -> Array:
                which, real = sample
                # As in the official code, this ReLU applies here but not where the same layer gives the keys.
                outputs = jax.nn.relu(u.apply(slow, support.x[which])) @ head["kernel"]
                return losses.cross_entropy(outputs, support.y[which], real)

            return of_chunk, (chosen, valid), valid.any(1)

        chosen, valid = random_pairs(key, mask, count)

        def of_pair(slow: Params, which: Int[Array, " 2"]) -> Array:
            r = u.apply(slow, support.x[which])
            same = support.y[which[0]] == support.y[which[1]]
            return pair_loss(embedding_loss, head, r[0], r[1], same, margin)

        return of_pair, chosen, valid

    def task_level(generators: Params, gradients: PyTree, slow: Params, valid: Array) -> Params:
        def generated(kind: str, steps: Array) -> Array:
            return _by_blocks(
                lambda block: task_generator.apply({"params": _of_kind(generators, kind)}, block, valid),
                steps,
            )

        groups = _grouped(gradients, slow)
        return _ungrouped({kind: generated(kind, steps) for kind, steps in groups.items()}, slow)

    def example_level(generators: Params, gradients: PyTree, slow: Params) -> Params:
        def generated(kind: str, rows: Array) -> Array:
            row = rows.reshape(1, -1)
            return _by_blocks(
                lambda block: example_generator.apply({"params": _of_kind(generators, kind)}, block[0]), row
            ).reshape(rows.shape)

        groups = _grouped(gradients, slow)
        return _ungrouped({kind: generated(kind, rows) for kind, rows in groups.items()}, slow)

    def fast_weights(params: Params, support: Batch, key: Key) -> PyTree:
        """Return the adapted state of a support set whose padding is blanked."""
        # Traced indices select rows below, which NumPy arrays do not support.
        support = jax.tree.map(jnp.asarray, support)
        count = _check_support(support, compares_pairs, samples)
        mask = jnp.ones(support.y.shape, bool) if support.mask is None else support.mask
        for_embedding, for_base = jax.random.split(key)
        # The gradients that the generators read are constants.
        frozen: Params = lax.stop_gradient(params)
        slow = {name: with_fast(frozen[name]) for name in ("embedding", "base")}

        def example_loss(weights: Params, x: Array, y: Array) -> Array:
            outputs = b.apply({**frozen["base"], **weights}, x[None])[0]
            return optax.softmax_cross_entropy_with_integer_labels(outputs, y)

        example_gradients = jax.vmap(jax.grad(example_loss), (None, 0, 0))(slow["base"], support.x, support.y)
        adapted: dict[str, PyTree] = {
            "mask": mask,
            "values": example_level(params["example_generator"], example_gradients, slow["base"]),
        }
        if embedding_has_fast:
            loss, samples_drawn, valid = embedding_losses(frozen, support, mask, for_embedding, count)
            gradients = jax.vmap(
                jax.grad(lambda weights, sample: loss({**frozen["embedding"], **weights}, sample)), (None, 0)
            )(slow["embedding"], samples_drawn)
            adapted["embedding"] = task_level(params["task_generator"], gradients, slow["embedding"], valid)
        if base_has_fast:
            which, real = chunks(for_base, mask, count)
            averages = jax.tree.map(lambda leaf: _chunk_means(leaf, which, real), example_gradients)
            adapted["base"] = task_level(params["base_task_generator"], averages, slow["base"], real.any(1))
        adapted["keys"] = u.apply(params["embedding"], support.x, adapted.get("embedding"))
        return adapted

    def classify(params: Params, adapted: PyTree, x: Array) -> Array:
        r = u.apply(params["embedding"], x, adapted.get("embedding"))
        attention = attend(adapted["keys"], adapted["mask"], r)

        def of_query(query: tuple[Array, Array]) -> Array:
            x, weights = query
            fast: Any = jax.tree.map(lambda values: jnp.tensordot(weights, values, 1), adapted["values"])
            if base_has_fast:
                fast = (adapted["base"], fast)
            return b.apply(params["base"], x[None], fast)[0]

        if queries_at_once is None or queries_at_once >= x.shape[0]:
            return jax.vmap(of_query)((x, attention))
        return lax.map(jax.checkpoint(of_query), (x, attention), batch_size=queries_at_once)

    def task_loss(params: Params, task: Task, key: Key, step: Array | None = None) -> tuple[Array, Metrics]:
        del step
        support, query = map(blank_padding, task)
        draw, order = jax.random.split(key)
        support, query = map(partial(augmented, augment), jax.random.split(draw), (support, query))
        outputs = classify(params, fast_weights(params, support, order), query.x)
        value = losses.cross_entropy(outputs, query.y, query.mask)
        return value, {"loss": (value, jnp.ones_like(value)), **losses.score(outputs, query)}

    def adapt(params: Params, support: Batch, key: Key) -> PyTree:
        # The second half of the key, as in `task_loss`: the same key gives the samples of training.
        return fast_weights(params, blank_padding(support), jax.random.split(key)[1])

    def predict(params: Params, adapted: PyTree, x: Array, mask: Array | None = None) -> Array:
        del mask
        return classify(params, adapted, x)

    return Learner(init, adapt, predict, task_loss)


def attend(
    keys: Float[Array, "n dim"], mask: Bool[Array, " n"], r: Float[Array, "m dim"]
) -> Float[Array, "m n"]:
    """Return the softmax of cosines over the unmasked keys.

    There is no temperature, so that each of n keys has weight at most e²/(n − 1 + e²).

    Examples:
      >>> import jax.numpy as jnp
      >>> keys, mask = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), jnp.array([True, True, False])
      >>> attend(keys, mask, jnp.array([[3.0, 1.0]])).tolist()
      [[0.5, 0.5, 0.0]]
    """
    # Cosines are bounded, so exp cannot overflow and the usual subtraction of the maximum is not needed.
    scores = jnp.where(mask[None, :], jnp.exp(unit(r) @ unit(keys).T), 0)
    return scores / jnp.maximum(scores.sum(-1, keepdims=True), jnp.exp(-2.0))


def pair_loss(
    kind: str,
    head: Params | None,
    a: Float[Array, " dim"],
    b: Float[Array, " dim"],
    same: Bool[Array, ""],
    margin: float = 1.0,
) -> Float[Array, ""]:
    """Return the loss of one pair of embeddings.

    Args:
      kind: loss function, "contrastive" or "verification".
      head: parameters {"weights", "bias"} of "verification"; None for "contrastive".
      a: embedding of the first example.
      b: embedding of the second example.
      same: True for a pair of the same class.
      margin: margin of "contrastive".

    Examples:
      >>> import jax.numpy as jnp
      >>> a, b = jnp.array([3.0, 0.0]), jnp.array([0.0, 4.0])
      >>> [float(pair_loss("contrastive", None, a, b, jnp.asarray(same), 6.0)) for same in (True, False)]
      [25.0, 1.0]
    """
    if kind == "verification":
        assert head is not None
        score = jnp.abs(a - b) @ head["weights"] + head["bias"]
        return optax.sigmoid_binary_cross_entropy(score, same.astype(score.dtype))
    square = jnp.square(a - b).sum()
    distance = jnp.sqrt(jnp.maximum(square, 1e-24))
    return jnp.where(same, square, jnp.square(jnp.maximum(0, margin - distance)))


def chunks(
    key: Key, mask: Bool[Array, " n"], count: int
) -> tuple[Int[Array, "count width"], Bool[Array, "count width"]]:
    """Shuffle the unmasked examples and split them into `count` chunks of sizes that differ by at most one.

    Returns:
      Indices, and a mask of the entries that hold an example. With fewer examples than chunks, some chunks
      are empty.
    """
    n = mask.shape[0]
    order = random_order(key, mask)
    edges = (jnp.arange(count + 1) * mask.sum() + count - 1) // count
    ranks = edges[:-1, None] + jnp.arange(-(-n // count))[None, :]
    return order[jnp.minimum(ranks, n - 1)], ranks < edges[1:, None]


def random_pairs(
    key: Key, mask: Bool[Array, " n"], count: int
) -> tuple[Int[Array, "count 2"], Bool[Array, " count"]]:
    """Draw `count` pairs, each of two different unmasked examples.

    The pairs do not depend on the amount of padding.

    Returns:
      Indices, and a mask of the valid pairs: at most as many as examples, and none for fewer than two
      examples.
    """
    real = mask.sum()
    real_first = jnp.argsort(~mask, stable=True)

    def draw(index: Int[Array, ""]) -> Int[Array, " 2"]:
        first, second = jax.random.split(jax.random.fold_in(key, index))
        i = jax.random.randint(first, (), 0, real)
        j = jax.random.randint(second, (), 0, real - 1)
        return real_first[jnp.stack([i, jnp.minimum(j + (j >= i), mask.shape[0] - 1)])]

    indices = jnp.arange(count)
    return jax.vmap(draw)(indices), (indices < real) & (real > 1)


def _by_blocks(make: Callable[[Array], Any], rows: Float[Array, "k n"]) -> Float[Array, " n"]:
    """Apply `make`, `(k, block) -> (block,)`, to blocks of columns in turn, recomputed in the gradient.

    Generators have tens of features for every weight of a network: for all weights at once these would take
    hundreds of megabytes, and on a CPU the LSTM's gradient would take three times as long.
    """

    def by_blocks(block: int, rows: Array) -> Array:
        k, n = rows.shape
        count = -(-n // block)
        width = -(-n // count)
        blocks = jnp.pad(rows, ((0, 0), (0, count * width - n))).reshape(k, count, width)
        return lax.map(jax.checkpoint(make), blocks.swapaxes(0, 1)).reshape(-1)[:n]

    return lax.platform_dependent(rows, cpu=partial(by_blocks, CPU_BLOCK), default=partial(by_blocks, BLOCK))


def _chunk_means(
    values: Float[Array, " n *shape"], which: Int[Array, "count width"], real: Bool[Array, "count width"]
) -> Float[Array, " count *shape"]:
    weights = real / jnp.maximum(real.sum(1, keepdims=True), 1)
    return jax.vmap(lambda weight, indices: jnp.tensordot(weight.astype(values.dtype), values[indices], 1))(
        weights, which
    )


def _check_support(support: Batch, compares_pairs: bool, samples: int | None) -> int:
    """Check the support set, and return the number of samples to draw from it."""
    n = support.x.shape[0]
    if support.y.shape[0] != n:
        raise ArgumentError(
            "tasks",
            f"got {n} support examples and {support.y.shape[0]} class slots; the numbers must be equal",
        )
    if not jnp.issubdtype(support.y.dtype, jnp.integer):
        raise ArgumentError(
            "tasks", f"got targets of type {support.y.dtype}; metanet needs integer class slots"
        )
    if samples is not None and samples > n:
        raise ArgumentError("samples", f"got {samples} for {n} support examples; it must be at most {n}")
    if compares_pairs and n < 2:
        raise ArgumentError(
            "tasks",
            f"got {n} support example, but this embedding_loss compares two; use "
            'embedding_loss="xent" or task_weights="none"',
        )
    return min(SAMPLES, n) if samples is None else samples


def _check_fast_layers(fast_layers: Sequence[str] | None, known: Params) -> None:
    unknown = [name for name in fast_layers or () if name not in known]
    if unknown:
        raise ArgumentError("fast_layers", f"got {unknown}; it must be among the layers {tuple(known)}")


def _kind(slow: Array) -> str:
    return "conv" if slow.ndim > 2 else "dense"


def _groups_of(slow: Params) -> list[str]:
    return sorted({_kind(leaf) for leaf in jax.tree.leaves(slow)})


def _of_kind(generators: Params, kind: str) -> Params:
    if kind not in generators:
        raise ArgumentError(
            "fast_layers",
            f"got {kind} layers, for which the parameters hold no generator; pass the fast_layers that the "
            "parameters were initialised with",
        )
    return generators[kind]


def _grouped(tree: PyTree, slow: Params) -> dict[str, Float[Array, "k n"]]:
    """Concatenate all weights of a kind into one row, for each entry of the first axis."""
    parts: dict[str, list[Array]] = {kind: [] for kind in _groups_of(slow)}
    for leaf, weights in zip(jax.tree.leaves(tree), jax.tree.leaves(slow), strict=True):
        parts[_kind(weights)].append(leaf.reshape(leaf.shape[0], -1))
    return {kind: jnp.concatenate(rows, 1) for kind, rows in parts.items()}


def _ungrouped(groups: dict[str, Float[Array, "*k n"]], slow: Params) -> Params:
    """Split rows of weights into a tree with the structure of `slow`."""
    used = dict.fromkeys(groups, 0)
    leaves = []
    for weights in jax.tree.leaves(slow):
        kind = _kind(weights)
        row = groups[kind][..., used[kind] : used[kind] + weights.size]
        leaves.append(row.reshape(*row.shape[:-1], *weights.shape))
        used[kind] += weights.size
    return jax.tree.unflatten(jax.tree.structure(slow), leaves)


def _generators(
    generator: TaskGenerator | ExampleGenerator, key: Key, kinds: Sequence[str], axes: int
) -> Params:
    """Initialise one generator for each kind of weights in a network."""
    keys = jax.random.split(key, len(kinds))
    return {
        kind: generator.init(kind_key, jnp.zeros((1,) * axes))["params"]
        for kind, kind_key in zip(kinds, keys, strict=True)
    }
