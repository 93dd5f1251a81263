"""Ridge regression in closed form on a learned embedding (R2-D2)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmeta import declare
from jaxmeta.checks import check_number
from jaxmeta.core import Augment, Key, Learner, Norm, Params
from jaxmeta.metric_based.metric_learner import ROWS, episodic_defaults, metric_learner, only_present, product
from jaxmeta.nn.adapters import Network


@declare.learner(kinds=("classification",), head=False, rows=ROWS, training=episodic_defaults(20))
def ridge(
    model: Network,
    *,
    regularisation: float = 1.0,
    scale: float = 10.0,
    norm: Norm = "batch",
    augment: Augment | None = None,
) -> Learner:
    r"""Build R2-D2, which solves a ridge regression on a learned embedding (Bertinetto et al. 2019).

    The classifier is linear in the embedding, fitted to one-hot labels in closed form:

    W = Zᵀ (Z Zᵀ + λ I)⁻¹ Y,  outputs = scale · f(x) W,

    with Z (n, dim) the embedded support set and Y its one-hot labels. The n × n system is small however wide
    the embedding. λ, the scale and the embedding are learned through the solution. The paper's additive
    constant is omitted, because it is equal for all classes and cancels in the softmax.

    Params: parameters of the embedding under "model"; `{"log_regularisation", "scale"}` under "head".
    Adapted: W.

    Args:
      model: embedding f.
      regularisation: initial weight λ of the squared norm of W, above 0; learned as its logarithm.
      scale: initial factor of the outputs, which is learned.
      norm: source of the batch statistics that normalise embeddings; see `jm.prototypical`.
      augment: augmentation `(key, x) -> x` of all images in training.

    Returns:
      A `Learner`.

    Raises:
      ValueError: `regularisation` or `scale` not positive; an unknown `norm`; float targets.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.glyphs(ways=5, shots=1, queries=3).sample(jax.random.key(0))
      >>> learner = jm.ridge(jm.nn.Conv4(filters=8), norm="support")
      >>> params = learner.init(jax.random.key(1), task)
      >>> adapted = learner.adapt(params, task.support, jax.random.key(2))
      >>> adapted["fitted"]["weights"].shape
      (8, 5)

    References:
      Bertinetto et al., Meta-learning with Differentiable Closed-form Solvers, 2019, section 3.
    """
    check_number("regularisation", regularisation, above=0)
    check_number("scale", scale, above=0)

    def init(key: Key, dim: int, ways: int) -> Params:
        del key, dim, ways
        return {"log_regularisation": jnp.log(regularisation), "scale": jnp.asarray(float(scale))}

    def fit(head_params: Params, z: Array, labels: Array, key: Key | None) -> Params:
        del key
        z = jnp.where((labels > 0).any(1, keepdims=True), z, 0)
        gram = product(z, z.T) + jnp.exp(head_params["log_regularisation"]) * jnp.eye(
            z.shape[0], dtype=z.dtype
        )
        dual = jax.scipy.linalg.solve(gram, labels, assume_a="pos")
        return {"weights": product(z.T, dual), "present": (labels > 0).any(0)}

    def classify(head_params: Params, fitted: Params, z: Array) -> Array:
        return only_present(head_params["scale"] * (z @ fitted["weights"]), fitted["present"])

    return metric_learner(model, fit=fit, classify=classify, init=init, norm=norm, augment=augment)
