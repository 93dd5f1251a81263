"""Matching networks: attention over the support set, by the cosine of embeddings."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmeta import declare
from jaxmeta.checks import check_count, check_number
from jaxmeta.core import Augment, Key, Learner, Norm, Params
from jaxmeta.metric_based.kernel import kernel_classifier, log_probabilities
from jaxmeta.metric_based.metric_learner import ROWS, episodic_defaults, metric_learner, product, unit
from jaxmeta.nn.adapters import Network
from jaxmeta.nn.full_context import full_context


# With 10, three times as many meta-steps came out a point lower on Omniglot.
@declare.learner(
    kinds=("classification",), head=False, rows=ROWS, training=episodic_defaults(20, 3, own={"scale": 30.0})
)
def matching(
    model: Network,
    *,
    scale: float = 1.0,
    learn_scale: bool = False,
    context_steps: int | None = None,
    norm: Norm = "batch",
    augment: Augment | None = None,
) -> Learner:
    r"""Build matching networks, attention over the support set by cosines (Vinyals et al. 2016).

    P(y|x, S) = Σ_i a(x, x_i) y_i, a = softmax_i(scale · cos(f(x), g(x_i)))

    Outputs are log P; the loss is −log P of the true class. Without full context embeddings f = g = f', the
    embedding network, and this is `jm.kernel_classifier(model, scale=scale)`.

    Full context embeddings (`context_steps`): over the support set runs a bidirectional LSTM, g(x_i, S) =
    h→_i + h←_i + f'(x_i), in the order of the examples, which is drawn anew in training. A query attends
    to the support set for `context_steps` steps of an LSTM,

    r_{k−1} = Σ_i softmax_i(h_{k−1}·g(x_i)) g(x_i),  h_k = LSTM([f'(x), r_{k−1}], h_{k−1}) + f'(x),

    from h_0 = f'(x), and f(x, S) is the last h. The inner attention is by dot products, the outer by
    cosines. The paper gives the LSTM the state [h, r], of twice the width of its output; all code gives it
    r with the input, as here.

    Params: the embedding's under "model"; under "head" the LSTMs' and a learned scale. Adapted: the embedded
    support set and its one-hot labels.

    Args:
      model: the embedding f'.
      scale: factor of the cosine; 1 in the paper. With it, five ways and one shot no query can have more than
        probability 0.6488, and the loss stays above 0.4327; larger values (10) learn faster.
      learn_scale: whether the scale is learned, from `scale` on.
      context_steps: attention steps of the full context embeddings, at least 1 (5 is usual); None for none.
      norm: whose statistics normalise embeddings, where the network has any; see `jm.prototypical`.
      augment: `(key, x) -> x`, of all images in training.

    Raises:
      ValueError: a `scale` that is not positive; `context_steps` below 1; an unknown `norm`.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.glyphs(ways=5, shots=1, queries=3).sample(jax.random.key(0))
      >>> learner = jm.matching(jm.nn.Conv4(filters=8), scale=10.0, norm="support")
      >>> params = learner.init(jax.random.key(1), task)
      >>> adapted = learner.adapt(params, task.support, jax.random.key(2))
      >>> outputs = learner.predict(params, adapted, task.query.x)
      >>> bool(jax.numpy.allclose(jax.numpy.exp(outputs).sum(-1), 1.0))
      True

    References:
      Vinyals et al., Matching Networks for One Shot Learning, 2016, section 2.1 and appendix A.
    """
    if context_steps is None:
        return kernel_classifier(model, scale=scale, learn_scale=learn_scale, norm=norm, augment=augment)
    check_count("context_steps", context_steps)
    check_number("scale", scale, above=0)

    def init(key: Key, dim: int, ways: int) -> Params:
        del ways
        own = context(dim).init(key)
        return {**own, "scale": jnp.asarray(float(scale))} if learn_scale else own

    def context(dim: int):
        return full_context(dim, context_steps)

    def fit(own: Params, z: Array, labels: Array, key: Key | None) -> Params:
        if key is not None:
            order = jax.random.permutation(key, z.shape[0])
            z, labels = z[order], labels[order]
        return {"z": context(z.shape[1]).support(own, z, (labels > 0).any(1)), "labels": labels}

    def judge(own: Params, fitted: Params, z: Array) -> Array:
        support, labels = fitted["z"], fitted["labels"]
        z = context(z.shape[1]).query(own, z, support, (labels > 0).any(1))
        cosines = product(unit(z), unit(support).T)
        return log_probabilities(own.get("scale", scale) * cosines, labels)

    return metric_learner(model, fit=fit, judge=judge, init=init, norm=norm, augment=augment)
