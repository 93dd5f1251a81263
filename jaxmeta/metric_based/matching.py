"""Matching networks: attention over the support set by cosine similarity."""

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


# A default scale of 10 gave one point less on Omniglot, with three times as many meta-steps.
@declare.learner(
    kinds=("classification",), head=False, rows=ROWS, training=episodic_defaults(20, 3, fixed={"scale": 30.0})
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
    r"""Build matching networks, which attend to the support set by cosines (Vinyals et al. 2016).

    P(y|x, S) = Σ_i a(x, x_i) y_i, a = softmax_i(scale · cos(f(x), g(x_i)))

    Outputs are log P; the loss is −log P of the true class. Without full context embeddings f = g = f', the
    embedding network, and the learner equals `jm.kernel_classifier(model, scale=scale)`.

    With full context embeddings (`context_steps`), a bidirectional LSTM runs over the support set,
    g(x_i, S) = h→_i + h←_i + f'(x_i), whose examples are shuffled in training. A query attends to the support
    set for `context_steps` steps of an LSTM,

    r_{k−1} = Σ_i softmax_i(h_{k−1}·g(x_i)) g(x_i),  h_k = LSTM([f'(x), r_{k−1}], h_{k−1}) + f'(x),

    from h_0 = f'(x), and f(x, S) is the last h. The inner attention uses dot products, the outer cosines. In
    the paper the LSTM's state is [h, r], of twice the width of its output; public implementations, and this
    one, feed r with the input.

    Params: parameters of the embedding under "model"; of the LSTMs, and a learned scale, under "head".
    Adapted: the embedded support set and its one-hot labels.

    Args:
      model: embedding f'.
      scale: factor of the cosine; 1 in the paper, where at five ways and one shot the probability of a class
        is at most 0.6488 and the loss at least 0.4327; larger values (10) learn faster.
      learn_scale: if True, the scale is learned, starting from `scale`.
      context_steps: attention steps of the full context embeddings, at least 1 (5 is usual); None for no such
        embeddings.
      norm: source of the batch statistics that normalise embeddings; see `jm.prototypical`.
      augment: augmentation `(key, x) -> x` of all images in training.

    Returns:
      A `Learner`.

    Raises:
      ValueError: `scale` not positive; `context_steps` below 1; an unknown `norm`; float targets.

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
        params = context(dim).init(key)
        return {**params, "scale": jnp.asarray(float(scale))} if learn_scale else params

    def context(dim: int):
        return full_context(dim, context_steps)

    def fit(head_params: Params, z: Array, labels: Array, key: Key | None) -> Params:
        if key is not None:
            order = jax.random.permutation(key, z.shape[0])
            z, labels = z[order], labels[order]
        return {"z": context(z.shape[1]).support(head_params, z, (labels > 0).any(1)), "labels": labels}

    def classify(head_params: Params, fitted: Params, z: Array) -> Array:
        support, labels = fitted["z"], fitted["labels"]
        z = context(z.shape[1]).query(head_params, z, support, (labels > 0).any(1))
        cosines = product(unit(z), unit(support).T)
        return log_probabilities(head_params.get("scale", scale) * cosines, labels)

    return metric_learner(model, fit=fit, classify=classify, init=init, norm=norm, augment=augment)
