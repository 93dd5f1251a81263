"""Siamese networks: learn whether two images show the same class, and name a query by its best partner."""

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
    r"""Build siamese networks, which judge whether two images show one class (Koch et al. 2015).

    The probability that both do is p(x_i, x_j) = σ(Σ_d α_d |f(x_i) − f(x_j)|_d + b).

    Trained to verify: the loss is the mean binary cross-entropy of pairs of a query and a support image,

    L = −½ mean_same log p − ½ mean_different log(1 − p),

    balanced whatever the number of ways. A query is then named by the class of the best-scoring support
    image. Outputs are normalised: log softmax over classes of the best score, before σ.

    The printed formula has no bias b, and then two equal images always have p = ½, and a pair of one class
    never more while all α are negative. So there is one, as in all code. The printed objective and update
    also have the sign of the L2 penalty wrong: add it by the outer optimizer, `optax.add_decayed_weights`,
    layer by layer with its `mask`.

    Params: the twin's under "model"; under "head" `{"weights": (dim,), "bias": ()}`, or those of `head`.
    Adapted: the embedded support set and its one-hot labels.

    Args:
      model: the twin f; `jm.nn.Koch` is the published one, for images of 105 × 105.
      head: a network `|difference| (n, dim) -> (n, 1)`, without batch statistics, in place of the weighted
        sum α, b.
      use_bias: whether the weighted sum of differences has a bias b.
      pairs: number of pairs of a task that are drawn for the loss, half of them of one class
        (`sample_pairs`); None for all pairs of a query and a support image, every query with equal weight.
      norm: whose statistics normalise embeddings, where the network has any; see `jm.prototypical`.
      augment: `(key, x) -> x`, of all images in training, each for itself; `jm.tasks.distort` is the
        paper's.

    Raises:
      ValueError: `pairs` that is no even number of at least 2; `head` that does not give `(n, 1)`; an
        unknown `norm`.

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
            raise ArgumentError("pairs", f"got {pairs}; it must be even, half of each kind")
    network = None if head is None else as_model(head, "head")

    def init(key: Key, dim: int, ways: int) -> Params:
        del ways
        if network is None:
            own = {"weights": jax.random.normal(key, (dim,)) / jnp.sqrt(dim)}
            return {**own, "bias": jnp.zeros(())} if use_bias else own
        own = network.init(key, jnp.zeros((2, dim)))
        if jax.eval_shape(lambda: forward(network, own, jnp.zeros((2, dim)))[1]):
            raise ArgumentError(
                "head", "got one with batch statistics; scores of pairs must not depend on each other"
            )
        shape = jax.eval_shape(lambda: forward(network, own, jnp.zeros((2, dim)))[0]).shape
        if shape != (2, 1):
            raise ArgumentError("head", f"gives shape {shape} for 2 pairs; it must be (2, 1)")
        return own

    def scores(own: Params, a: Array, b: Array) -> Array:
        """Before σ, for every pair of an `a` and a `b`."""
        difference = jnp.abs(a[:, None] - b[None, :])
        if network is None:
            return difference @ own["weights"] + own.get("bias", 0.0)
        flat = difference.reshape(-1, difference.shape[-1])
        return forward(network, own, flat)[0].reshape(difference.shape[:2])

    def fit(own: Params, z: Array, labels: Array, key: Key | None) -> Params:
        del own, key
        return {"z": z, "labels": labels}

    def judge(own: Params, fitted: Params, z: Array) -> Array:
        return log_probabilities(scores(own, z, fitted["z"]), fitted["labels"], "nearest")

    def objective(
        own: Params, z: Array, labels: Array, z_query: Array, query: Batch, key: Key
    ) -> tuple[Array, Array]:
        found = scores(own, z_query, z)
        same, different = pair_kinds(labels, one_hot(query))
        cost = optax.sigmoid_binary_cross_entropy(found, same.astype(found.dtype))
        if pairs is not None:
            drawn = sample_pairs(key, same, different, pairs)
            value = masked_mean(cost[drawn.query, drawn.support], drawn.valid)
        else:
            per_query = (_mean_where(cost, same) + _mean_where(cost, different)) / 2
            value = masked_mean(per_query, query.mask)
        return value, log_probabilities(found, labels, "nearest")

    return metric_learner(
        model, fit=fit, judge=judge, init=init, objective=objective, norm=norm, augment=augment
    )


class Pairs(NamedTuple):
    """Pairs of a query and a support image.

    Attributes:
      query, support: which ones.
      same: whether both are of one class.
      valid: False where there was no pair of that kind to draw.
    """

    query: Int[Array, " pairs"]
    support: Int[Array, " pairs"]
    same: Bool[Array, " pairs"]
    valid: Bool[Array, " pairs"]


def pair_kinds(
    support: Float[Array, "n ways"], query: Float[Array, "m ways"]
) -> tuple[Bool[Array, "m n"], Bool[Array, "m n"]]:
    """Which pairs of a query and a support image are of one class, and which of two; padding is of neither.

    Args:
      support, query: one-hot labels; rows of zeros are padding.
    """
    same = query @ support.T > 0
    real = query.any(1)[:, None] & support.any(1)[None, :]
    return same, real & ~same


def sample_pairs(key: Key, same: Bool[Array, "m n"], different: Bool[Array, "m n"], count: int) -> Pairs:
    """`count` pairs, the first half of one class, the second of two; each drawn uniformly from its kind.

    A pure function of the key.

    Args:
      same, different: by `pair_kinds`.
      count: an even number.
    """
    halves = []
    for own, kind in zip(jax.random.split(key), (same, different), strict=True):
        # Where there is none of a kind, what is drawn instead is not valid.
        log_weight = jnp.where(kind | ~kind.any(), 0.0, -jnp.inf).reshape(-1)
        place = jax.random.categorical(own, log_weight, shape=(count // 2,))
        halves.append(
            (place // kind.shape[1], place % kind.shape[1], jnp.broadcast_to(kind.any(), place.shape))
        )
    query, support, valid = (jnp.concatenate(parts) for parts in zip(*halves, strict=True))
    return Pairs(query, support, jnp.arange(count) < count // 2, valid)


def _mean_where(cost: Float[Array, "m n"], kind: Bool[Array, "m n"]) -> Float[Array, " m"]:
    return jnp.where(kind, cost, 0).sum(1) / jnp.maximum(kind.sum(1), 1)
