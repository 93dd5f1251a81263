"""Siamese networks: verification of image pairs, and classification by the best-matching support image."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxmeta import declare
from jaxmeta.checks import ArgumentError, check_count
from jaxmeta.core import Augment, Batch, Key, Learner, Norm, Params
from jaxmeta.losses import masked_mean
from jaxmeta.metric_based.kernel import log_probabilities
from jaxmeta.metric_based.metric_learner import ROWS, episodic_defaults, metric_learner, one_hot
from jaxmeta.nn.adapters import Network, as_model, forward


@declare.learner(
    kinds=("classification",), head=False, rows=ROWS, training=episodic_defaults(20, distorts=True)
)
def siamese(
    model: Network,
    *,
    head: Network | None = None,
    use_bias: bool = True,
    pairs: int | None = None,
    norm: Norm = "batch",
    augment: Augment | None = None,
) -> Learner:
    r"""Build siamese networks, which predict whether two images show the same class (Koch et al. 2015).

    The probability of the same class is p(x_i, x_j) = σ(Σ_d α_d |f(x_i) − f(x_j)|_d + b).

    The loss is the mean binary cross-entropy over pairs of a query and a support image,

    L = −½ mean_same log p − ½ mean_different log(1 − p),

    balanced for any number of ways. A query is classified by the best-scoring support image: outputs are the
    log softmax over classes of the best score before σ.

    The printed formula has no bias b. Without it, two equal images always have p = ½, and pairs of the same
    class have p ≤ ½ while all α are negative; so b is included, as in public implementations. The printed
    objective and update have the wrong sign of the L2 penalty; add the penalty in the outer optimizer by
    `optax.add_decayed_weights`, with its `mask` for single layers.

    Params: parameters of the embedding under "model"; `{"weights": (dim,), "bias": ()}`, or the parameters of
    `head`, under "head". Adapted: the embedded support set and its one-hot labels.

    Args:
      model: embedding f; `jm.nn.Koch` is the published one, for images of 105 × 105.
      head: network `|difference| (n, dim) -> (n, 1)`, without batch statistics, in place of the weighted sum;
        None for the weighted sum.
      use_bias: if True, the weighted sum of differences has a bias b.
      pairs: number of pairs sampled from each task for the loss, half of them of the same class
        (`sample_pairs`); None for all pairs of a query and a support image, with equal weight for each query.
      norm: source of the batch statistics that normalise embeddings; see `jm.prototypical`.
      augment: augmentation `(key, x) -> x` of all images in training, drawn separately for each image;
        `jm.tasks.distort` is the paper's.

    Returns:
      A `Learner`.

    Raises:
      ValueError: `pairs` odd or below 2; `head` with outputs not of shape (n, 1); an unknown `norm`;
        float targets.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.glyphs(ways=5, shots=1, queries=3).sample(jax.random.key(0))
      >>> learner = jm.siamese(jm.nn.Conv4(filters=8), norm="support")
      >>> params = learner.init(jax.random.key(1), task)
      >>> adapted = learner.adapt(params, task.support, jax.random.key(2))
      >>> learner.predict(params, adapted, task.query.x).shape
      (15, 5)

    References:
      Koch, Zemel & Salakhutdinov, Siamese Neural Networks for One-shot Image Recognition, 2015.
    """
    if pairs is not None:
        check_count("pairs", pairs, 2)
        if pairs % 2:
            raise ArgumentError("pairs", f"got {pairs}; it must be even, for equal numbers of both kinds")
    network = None if head is None else as_model(head, "head")

    def init(key: Key, dim: int, ways: int) -> Params:
        del ways
        if network is None:
            params = {"weights": jax.random.normal(key, (dim,)) / jnp.sqrt(dim)}
            return {**params, "bias": jnp.zeros(())} if use_bias else params
        params = network.init(key, jnp.zeros((2, dim)))
        outputs, stats = jax.eval_shape(lambda: forward(network, params, jnp.zeros((2, dim))))
        if stats:
            raise ArgumentError(
                "head",
                "got a network with batch statistics; it must have none, so that the scores of pairs do not "
                "depend on each other",
            )
        if outputs.shape != (2, 1):
            raise ArgumentError("head", f"gives shape {outputs.shape} for 2 pairs; it must be (2, 1)")
        return params

    def scores(head_params: Params, a: Array, b: Array) -> Array:
        """Return the scores before σ of all pairs of a row of `a` and a row of `b`."""
        difference = jnp.abs(a[:, None] - b[None, :])
        if network is None:
            return difference @ head_params["weights"] + head_params.get("bias", 0.0)
        flat = difference.reshape(-1, difference.shape[-1])
        return forward(network, head_params, flat)[0].reshape(difference.shape[:2])

    def fit(head_params: Params, z: Array, labels: Array, key: Key | None) -> Params:
        del head_params, key
        return {"z": z, "labels": labels}

    def classify(head_params: Params, fitted: Params, z: Array) -> Array:
        return log_probabilities(scores(head_params, z, fitted["z"]), fitted["labels"], "nearest")

    def objective(
        head_params: Params, z: Array, labels: Array, z_query: Array, query: Batch, key: Key
    ) -> tuple[Array, Array]:
        logits = scores(head_params, z_query, z)
        same, different = pair_kinds(labels, one_hot(query))
        cost = optax.sigmoid_binary_cross_entropy(logits, same.astype(logits.dtype))
        if pairs is not None:
            sampled = sample_pairs(key, same, different, pairs)
            value = masked_mean(cost[sampled.query, sampled.support], sampled.valid)
        else:
            per_query = (_mean_where(cost, same) + _mean_where(cost, different)) / 2
            value = masked_mean(per_query, query.mask)
        return value, log_probabilities(logits, labels, "nearest")

    return metric_learner(
        model, fit=fit, classify=classify, init=init, objective=objective, norm=norm, augment=augment
    )


class Pairs(NamedTuple):
    """Pairs of a query and a support image.

    Attributes:
      query: indices of the queries.
      support: indices of the support images.
      same: True for pairs of the same class.
      valid: False where the task has no pair of the kind to sample.
    """

    query: Int[Array, " pairs"]
    support: Int[Array, " pairs"]
    same: Bool[Array, " pairs"]
    valid: Bool[Array, " pairs"]


def pair_kinds(
    support: Float[Array, "n ways"], query: Float[Array, "m ways"]
) -> tuple[Bool[Array, "m n"], Bool[Array, "m n"]]:
    """Return masks of the pairs of the same class, and of different classes; padding is in neither.

    Args:
      support: one-hot labels of the support set; rows of zeros are padding.
      query: one-hot labels of the queries; rows of zeros are padding.
    """
    same = query @ support.T > 0
    real = query.any(1)[:, None] & support.any(1)[None, :]
    return same, real & ~same


def sample_pairs(key: Key, same: Bool[Array, "m n"], different: Bool[Array, "m n"], count: int) -> Pairs:
    """Sample `count` pairs: half of the same class, then half of different classes, each uniformly.

    Args:
      key: random key.
      same: mask of the pairs of the same class; see `pair_kinds`.
      different: mask of the pairs of different classes.
      count: number of pairs, even.
    """
    halves = []
    for kind_key, kind in zip(jax.random.split(key), (same, different), strict=True):
        # If no pair of the kind exists, sample from all pairs and mark the samples as invalid.
        log_weight = jnp.where(kind | ~kind.any(), 0.0, -jnp.inf).reshape(-1)
        index = jax.random.categorical(kind_key, log_weight, shape=(count // 2,))
        halves.append(
            (index // kind.shape[1], index % kind.shape[1], jnp.broadcast_to(kind.any(), index.shape))
        )
    query, support, valid = (jnp.concatenate(parts) for parts in zip(*halves, strict=True))
    return Pairs(query, support, jnp.arange(count) < count // 2, valid)


def _mean_where(cost: Float[Array, "m n"], kind: Bool[Array, "m n"]) -> Float[Array, " m"]:
    return jnp.where(kind, cost, 0).sum(1) / jnp.maximum(kind.sum(1), 1)
