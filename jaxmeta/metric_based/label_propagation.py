"""Propagation of labels over a graph of support examples and queries."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmeta import declare
from jaxmeta.checks import check_count, check_number
from jaxmeta.core import Augment, Key, Learner, Norm, Params
from jaxmeta.losses import full_precision
from jaxmeta.metric_based.metric_learner import (
    episodic_defaults,
    metric_learner,
    only_present,
    solve_positive,
    squared_distances,
)
from jaxmeta.nn.adapters import Network

# The system I − αS is singular for α = 1.
_LARGEST_ALPHA = 1 - 1e-6


@declare.learner(kinds=("classification",), head=False, transductive=True, training=episodic_defaults(20))
def label_propagation(
    model: Network,
    *,
    alpha: float = 0.99,
    neighbours: int = 20,
    sigma: float | None = 1.0,
    norm: Norm = "batch",
    augment: Augment | None = None,
) -> Learner:
    r"""Build a classifier that propagates labels over a graph of the task's examples (Liu et al. 2019).

    The nodes are the embeddings z of support set and queries. With the one-hot labels Y of the nodes, which
    are zero for queries,

    W_ij = exp(−‖z_i − z_j‖² / (2σ²)),  S = D^−½ W D^−½,  F = (I − αS)⁻¹ Y,

    where W is zero on the diagonal and wherever neither node is among the k nearest neighbours of the other
    (nodes at equal distance are all included), and D has the row sums of W on the diagonal. Outputs are the
    logarithms of the rows of F for the queries, normalised to sum 1. A query that is not connected to the
    support set has the same probability for each class.

    The method is transductive: the prediction for a query depends on the other queries of the same call,
    under every `norm`. F is the limit of F ← αSF + Y (Zhou et al. 2004). In transductive propagation networks
    σ is computed by a network for each node; here it is one number.

    Params: parameters of the embedding under "model". Adapted: the embedded support set and its labels.

    Args:
      model: embedding f.
      alpha: weight α of the neighbours' labels, above 0 and below 1; 0.99 in the papers.
      neighbours: number k of nearest neighbours of a node, which does not count as its own; all other nodes
        in a smaller graph.
      sigma: width σ of the kernel, above 0, in the units of the embedding, which learns its scale. None for
        the root of the median squared distance of two nodes: such a kernel is wide, does not become narrower
        in training, and mixes the classes where a node has more neighbours than its class has nodes.
      norm: source of the batch statistics that normalise embeddings; see `jm.prototypical`.
      augment: augmentation `(key, x) -> x` of all images in training.

    Returns:
      A `Learner`.

    Raises:
      ValueError: `alpha` not between 0 and 1; `neighbours` below 1; `sigma` not positive; an unknown `norm`;
        float targets.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.glyphs(ways=5, shots=1, queries=3).sample(jax.random.key(0))
      >>> learner = jm.label_propagation(jm.nn.Conv4(filters=8), norm="support")
      >>> params = learner.init(jax.random.key(1), task)
      >>> adapted = learner.adapt(params, task.support, jax.random.key(2))
      >>> learner.predict(params, adapted, task.query.x).shape
      (15, 5)

    References:
      Zhou et al., Learning with Local and Global Consistency, 2004; Liu et al., Learning to Propagate Labels:
      Transductive Propagation Network for Few-shot Learning, 2019.
    """
    check_number("alpha", alpha, most=_LARGEST_ALPHA, above=0)
    check_count("neighbours", neighbours)
    if sigma is not None:
        check_number("sigma", sigma, above=0)

    def fit(head_params: Params, z: Array, labels: Array, key: Key | None) -> Params:
        del head_params, key
        return {"z": jnp.where((labels > 0).any(1, keepdims=True), full_precision(z), 0), "labels": labels}

    def classify(head_params: Params, fitted: Params, z: Array, mask: Array) -> Array:
        del head_params
        support, labels = fitted["z"], fitted["labels"]
        nodes = jnp.concatenate([support, full_precision(z)])
        real = jnp.concatenate([(labels > 0).any(1), mask])
        similarities = _normalised_graph(nodes, real, neighbours, sigma)
        known = jnp.concatenate([labels, jnp.zeros((z.shape[0], labels.shape[1]), labels.dtype)])
        system = jnp.eye(nodes.shape[0], dtype=nodes.dtype) - alpha * similarities
        scores = solve_positive(system, known)[support.shape[0] :]
        # Scores are not negative but for rounding errors. Below that size, the classes are not distinguished.
        present = (labels > 0).any(0)
        scores = jnp.maximum(scores, 0) + jnp.finfo(scores.dtype).eps
        return jax.nn.log_softmax(only_present(jnp.log(scores), present))

    return metric_learner(model, fit=fit, classify=classify, transductive=True, norm=norm, augment=augment)


def _normalised_graph(
    nodes: Float[Array, "n dim"], real: Bool[Array, " n"], neighbours: int, sigma: float | None
) -> Float[Array, "n n"]:
    """Return S, the normalised weights of the edges; those of padding are 0."""
    squared = squared_distances(nodes, nodes, real)
    size = squared.shape[0]
    edges = real[:, None] & real[None] & ~jnp.eye(size, dtype=bool)
    count = real.sum()
    # Neighbours are selected by a threshold and not as the first k, so ties do not depend on the order.
    ordered = jnp.sort(jax.lax.stop_gradient(jnp.where(edges, squared, jnp.inf)), axis=1)
    last = jnp.clip(count - 1, 1, neighbours) - 1
    near = squared <= jax.lax.dynamic_index_in_dim(ordered, last, axis=1)
    edges = edges & (near | near.T)
    variance = _median(squared, real) if sigma is None else sigma**2
    # W and D may underflow where distances are large, and S does not.
    logarithms = jnp.where(edges, -squared / (2 * variance), -jnp.inf)
    connected = edges.any(1)
    degrees = jax.nn.logsumexp(jnp.where(connected[:, None], logarithms, 0), axis=1) / 2
    exponents = jnp.where(edges, -squared / (2 * variance), 0) - degrees[:, None] - degrees[None]
    return jnp.where(edges, jnp.exp(jnp.where(edges, exponents, 0)), 0)


def _median(squared: Float[Array, "n n"], real: Bool[Array, " n"]) -> Float[Array, ""]:
    """Return the median over pairs of different nodes, or 1 where it is zero or there are no pairs."""
    pairs = real[:, None] & real[None] & ~jnp.eye(squared.shape[0], dtype=bool)
    ordered = jnp.sort(jnp.where(pairs, squared, jnp.inf).reshape(-1))
    # Each pair is counted twice, so that the two middle values are those of the pairs.
    middle = pairs.sum() // 2
    values = jnp.stack([_at(ordered, middle - 1), _at(ordered, middle)])
    median = values.sum() / 2
    valid = (middle > 0) & (median > 0)
    return jnp.where(valid, jnp.where(valid, median, 1), 1)


def _at(values: Float[Array, " n"], index: Array) -> Float[Array, ""]:
    return jax.lax.dynamic_index_in_dim(values, jnp.maximum(index, 0), keepdims=False)
