"""Prototypes refined by one or more steps of soft k-means on the queries."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmeta import declare
from jaxmeta.checks import check_count, check_number
from jaxmeta.core import Augment, Key, Learner, Norm, Params
from jaxmeta.losses import full_precision
from jaxmeta.metric_based.metric_learner import (
    episodic_defaults,
    metric_learner,
    only_present,
    product,
    squared_distances,
    with_centre,
)
from jaxmeta.nn.adapters import Network


@declare.learner(kinds=("classification",), head=False, transductive=True, training=episodic_defaults(20))
def soft_kmeans(
    model: Network,
    *,
    refinement_steps: int = 1,
    scale: float = 1.0,
    norm: Norm = "batch",
    augment: Augment | None = None,
) -> Learner:
    r"""Build prototypical networks whose prototypes are refined by soft k-means (Ren et al. 2018).

    A prototype p_c starts as the mean of the n_c embedded support examples of class c. Each refinement step
    adds the queries q, weighted by the probabilities that the current prototypes assign to them:

    w_qc = softmax_c(−scale · ‖f(x_q) − p_c‖²),
    p_c ← (Σ_support f(x_i) + Σ_q w_qc f(x_q)) / (n_c + Σ_q w_qc).

    Outputs are −scale · ‖f(x_q) − p_c‖². The paper refines by a separate set of unlabelled examples; here the
    queries are that set, so that the method is transductive: the prediction for a query depends on the other
    queries of the same call, under every `norm`. A query alone moves the prototypes towards itself, each by
    the share of its weight.

    Params: parameters of the embedding under "model". Adapted: the embedded support set and its labels.

    Args:
      model: embedding f.
      refinement_steps: number of refinement steps; 1 in the paper. With 0 the method is `jm.prototypical`.
      scale: factor of the squared distances under the softmax, above 0.
      norm: source of the batch statistics that normalise embeddings; see `jm.prototypical`.
      augment: augmentation `(key, x) -> x` of all images in training.

    Returns:
      A `Learner`.

    Raises:
      ValueError: negative `refinement_steps`; `scale` not positive; an unknown `norm`; float targets.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.glyphs(ways=5, shots=1, queries=3).sample(jax.random.key(0))
      >>> learner = jm.soft_kmeans(jm.nn.Conv4(filters=8), norm="support")
      >>> params = learner.init(jax.random.key(1), task)
      >>> adapted = learner.adapt(params, task.support, jax.random.key(2))
      >>> learner.predict(params, adapted, task.query.x).shape
      (15, 5)

    References:
      Ren et al., Meta-Learning for Semi-Supervised Few-Shot Classification, 2018, section 3.1.1.
    """
    check_count("refinement_steps", refinement_steps, 0)
    check_number("scale", scale, above=0)

    def fit(head_params: Params, z: Array, labels: Array, key: Key | None) -> Params:
        del head_params, key
        z, centre = with_centre(z, (labels > 0).any(1))
        # Distances do not depend on the origin, and sums around the centre are more precise.
        centred = z - centre[None]
        return {"centre": centre, "sums": product(labels.T, centred), "counts": labels.sum(0)}

    def classify(head_params: Params, fitted: Params, z: Array, mask: Array) -> Array:
        del head_params
        z = jnp.where(mask[:, None], full_precision(z) - fitted["centre"][None], 0)
        # Support set and queries may differ in type.
        sums, counts = fitted["sums"].astype(z.dtype), fitted["counts"].astype(z.dtype)
        present = counts > 0

        def outputs(prototypes: Array) -> Array:
            return only_present(-scale * squared_distances(z, prototypes, present), present)

        def means(sums: Array, counts: Array) -> Array:
            return sums / jnp.where(present, counts, 1)[:, None]

        def refined(prototypes: Array) -> Array:
            weights = jnp.where(mask[:, None], jax.nn.softmax(outputs(prototypes)), 0)
            return means(sums + product(weights.T, z), counts + weights.sum(0))

        prototypes = jax.lax.fori_loop(
            0, refinement_steps, lambda _, prototypes: refined(prototypes), means(sums, counts)
        )
        return outputs(prototypes)

    return metric_learner(model, fit=fit, classify=classify, transductive=True, norm=norm, augment=augment)
