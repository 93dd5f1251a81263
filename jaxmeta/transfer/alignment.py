"""Unsupervised domain adaptation: training on a labelled source and an unlabelled target domain."""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxmeta import nn
from jaxmeta.checks import ArgumentError, check_key, check_number, check_widths, check_word
from jaxmeta.core import Augment, Batch, Key, Optimizer, Params, PyTree
from jaxmeta.declare import forwards
from jaxmeta.nn.stateful import StatefulModel, Variables
from jaxmeta.paths import Patterns
from jaxmeta.transfer.classifier import HEAD, as_images
from jaxmeta.transfer.descent import Batches, descend
from jaxmeta.transfer.discrepancy import MMDSettings, Variant, coral_loss, mmd2
from jaxmeta.transfer.domain_adaptation import dann_strength, domain_loss, gradient_reversal
from jaxmeta.transfer.fine_tune import check_model_and_data, examples, mean_loss
from jaxmeta.transfer.freezing import frozen_mask
from jaxmeta.transfer.heads import ExampleWeights

DomainNorm = Literal["separate", "joint"]


class Alignment(NamedTuple):
    """A penalty that makes the features of two domains similar; see `coral`, `mmd` and `dann`.

    Attributes:
      init: function `(key, dim) -> own` that returns the penalty's own parameters for features of width
        `dim`; they are trained together with the network's.
      loss: function `(own, source, target, progress) -> scalar`, where `source` and `target` are features of
        shapes `(n_s, dim)` and `(n_t, dim)`, and progress in [0, 1) is the completed fraction of training.
    """

    init: Callable[[Key, int], Params]
    loss: Callable[..., Array]


def coral(weight: float = 1.0, *, variant: Variant = "paper") -> Alignment:
    """Return the Deep CORAL penalty, `weight` · `jm.transfer.coral_loss`.

    Args:
      weight: weight of the penalty, at least 0.
      variant: formula of the loss; see `jm.transfer.coral_loss`.

    Raises:
      ValueError: if `weight` is negative or `variant` is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> source, target = jnp.array([[0.0, 0.0], [2.0, 0.0]]), jnp.array([[0.0, 0.0], [0.0, 2.0]])
      >>> print(coral(2.0).loss({}, source, target, jnp.zeros(())))
      1.0

    References:
      Sun & Saenko, Deep CORAL: Correlation Alignment for Deep Domain Adaptation, 2016.
    """
    check_word("variant", variant, get_args(Variant))
    return _without_parameters(weight, lambda source, target: coral_loss(source, target, variant=variant))


@forwards(mmd2)
def mmd(weight: float = 1.0, **settings: Unpack[MMDSettings]) -> Alignment:
    """Return the penalty of deep adaptation networks on the last features, `weight` · `jm.transfer.mmd2`.

    Args:
      weight: weight of the penalty, at least 0.
      **settings: keyword arguments of `jm.transfer.mmd2`, such as `bandwidth` and `estimator`.

    Raises:
      ValueError: if `weight` is negative or `jm.transfer.mmd2` rejects the settings.

    Examples:
      >>> import jax.numpy as jnp
      >>> penalty = mmd(2.0, bandwidth=1.0)
      >>> print(f"{penalty.loss({}, jnp.array([[0.0]]), jnp.array([[1.0]]), jnp.zeros(())):.4f}")
      1.5739

    References:
      Long et al., Learning Transferable Features with Deep Adaptation Networks, 2015.
    """
    # Abstract evaluation validates the settings now, before any training starts.
    jax.eval_shape(lambda: mmd2(jnp.zeros((2, 1)), jnp.zeros((2, 1)), **settings))
    return _without_parameters(weight, lambda source, target: mmd2(source, target, **settings))


def dann(*, hidden: tuple[int, ...] = (100,), weight: float = 1.0, gamma: float = 10.0) -> Alignment:
    """Return the domain-adversarial penalty (DANN), for features that do not reveal their domain.

    The domain head is trained together with the network, with weight 1. It reads the features through
    `jm.transfer.gradient_reversal` of strength weight · λ_p, where p is the progress of the whole training.

    Args:
      hidden: widths of the domain head's hidden layers; the paper's head for digits has one layer of 100.
      weight: factor of the reversed gradient that reaches the features, at least 0.
      gamma: γ of λ_p; see `jm.transfer.dann_strength`.

    Raises:
      ValueError: if `weight` is negative, `gamma` is not finite or `hidden` is not a tuple of widths.

    Examples:
      >>> import jax
      >>> penalty = dann(hidden=(16,))
      >>> jax.tree.map(lambda leaf: leaf.shape, penalty.init(jax.random.key(0), 8))["head"]
      {'bias': (1,), 'kernel': (16, 1)}

    References:
      Ganin et al., Domain-Adversarial Training of Neural Networks, 2016.
    """
    _check_weight(weight)
    check_number("gamma", gamma)
    check_widths("hidden", hidden)
    head = nn.as_model(nn.MLP(out=1, hidden=tuple(hidden)))

    def init(key: Key, dim: int) -> Params:
        return head.init(key, jnp.zeros((1, dim)))

    def loss(own: Params, source: Array, target: Array, progress: Array) -> Array:
        strength = weight * dann_strength(progress, gamma=gamma)
        reversed_features = gradient_reversal(jnp.concatenate([source, target]), strength)
        logits = head.apply(own, reversed_features)
        return domain_loss(logits[: source.shape[0]], logits[source.shape[0] :])

    return Alignment(init, loss)


def _check_weight(weight: float) -> None:
    check_number("weight", weight, 0)


def _without_parameters(weight: float, discrepancy: Callable[[Array, Array], Array]) -> Alignment:
    _check_weight(weight)

    def loss(own: Params, source: Array, target: Array, progress: Array) -> Array:
        del own, progress
        return weight * discrepancy(source, target)

    return Alignment(lambda key, dim: {}, loss)


class Aligned(NamedTuple):
    """The result of training on two domains.

    Attributes:
      target: variables for inference on the target, with the target's running statistics.
      source: the same parameters with the source's running statistics, for inference on the source, such as
        model selection without target labels. Identical to `target` with norm="joint".
      losses: loss of each step.
    """

    target: Variables
    source: Variables
    losses: Float[Array, " steps"]


def align(
    model: StatefulModel,
    variables: Variables,
    source: Batch,
    target: Array | np.ndarray,
    alignment: Alignment,
    *,
    optimizer: Optimizer,
    steps: int,
    key: Key,
    train: Patterns = "**",
    norm: DomainNorm = "separate",
    batch_size: int = 64,
    weights: ExampleWeights | None = None,
    augment: Augment | None = None,
    report: Callable[[int, float], None] | None = None,
    callback: Callable[[int, Aligned], None] | None = None,
    every: int | None = None,
) -> Aligned:
    """Train a classifier on a labelled source while aligning its features with an unlabelled target.

    Training minimises mean CE(source) + alignment.loss(features of source, features of target).

    Alignment assumes that classes have the same frequencies in both domains; where they differ, it aligns
    examples of different classes. `weights` enter the cross-entropy alone and do not correct this: first
    resample the source in the target's proportions (see `jm.transfer.bbse`).

    Args:
      model: a `jm.transfer.classifier`.
      variables: variables of the model; they are not changed.
      source: labelled examples; see `jm.transfer.fine_tune`.
      target: unlabelled examples of shape `(m, *shape)`; m may differ from the source's n.
      alignment: penalty on the features: `jm.transfer.coral()`, `mmd()` or `dann()`.
      optimizer: optax transformation; see `fine_tune`.
      steps: number of mini-batches; each holds `batch_size` examples of each domain.
      key: random key for mini-batches, augmentation, dropout and the alignment's initial parameters.
      train: patterns of the parameters to train; see `fine_tune`.
      norm: batch statistics in training and inference. "separate": each domain has its own, which already
        aligns the first two moments, as AdaBN does. "joint": both domains form one batch, as in most code.
      batch_size: examples of each domain in a mini-batch.
      weights: weights of the source examples in the cross-entropy; None for equal weights.
      augment: function `(key, x) -> x`, applied to both domains; None for no augmentation.
      report: function `(step, loss)`, called every `every` steps.
      callback: function `(step, aligned)` for model selection, called every `every` steps with the current
        variables as an `Aligned` with empty losses.
      every: steps between two calls of `callback` and `report`; None for about 20 calls.

    Returns:
      An `Aligned`: variables for each domain, and the loss of each step.

    Raises:
      ValueError: if `norm` is unknown, the model has no features, `target` is empty or its examples differ
        in shape from the source's, or for one of the reasons listed in `fine_tune`.
      FloatingPointError: if the loss becomes NaN or infinite.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, jaxmeta as jm
      >>> model = jm.transfer.classifier(jm.nn.MLP(out=4), 2)
      >>> source = jm.Batch(jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([0, 1]))
      >>> variables = model.init(jax.random.key(0), source.x)
      >>> aligned = jm.transfer.align(  # doctest: +SKIP
      ...     model,
      ...     variables,
      ...     source,
      ...     source.x + 1.0,
      ...     jm.transfer.coral(),
      ...     optimizer=optax.adam(0.1),
      ...     steps=100,
      ...     key=jax.random.key(1),
      ... )
      >>> logits = model.apply(aligned.target, source.x + 1.0)  # doctest: +SKIP
    """
    check_word("norm", norm, get_args(DomainNorm))
    check_model_and_data(model, source, "source")
    check_key("key", key)
    if model.features is None:
        raise ArgumentError("model", "has no features to align; build it with jm.transfer.classifier")
    dim, classes = variables["params"][HEAD]["kernel"].shape
    arrays, shape = examples(source, weights, classes=classes, name="source"), source.x.shape[1:]
    if target.shape[0] == 0 or target.shape[1:] != shape:
        required = ", ".join(map(str, ("m", *shape)))
        raise ArgumentError("target", f"got shape {target.shape}; it must be ({required}) with m at least 1")
    # Each step folds its number into the key; this constant is larger than any step number.
    own = alignment.init(jax.random.fold_in(key, np.uint32(0xFFFFFFF0)), dim)
    frozen = frozen_mask(variables["params"], train)
    leaves, structure = jax.tree.flatten(frozen)
    initial = {name: tree for name, tree in variables.items() if name != "params"}
    states = {"source": initial, "target": initial} if norm == "separate" else {"both": initial}

    def variables_of(params: PyTree, states: PyTree, domain: str) -> Variables:
        return {"params": params["model"], **states[domain if norm == "separate" else "both"]}

    def result(params: PyTree, states: PyTree, losses: Array) -> Aligned:
        return Aligned(variables_of(params, states, "target"), variables_of(params, states, "source"), losses)

    def on_step(step: int, params: PyTree, states: PyTree) -> None:
        assert callback is not None
        callback(step, result(params, states, jnp.zeros(0)))

    params, states, losses = descend(
        _objective(model, alignment, augment, norm, tuple(leaves), structure),
        {"model": variables["params"], "alignment": own},
        states,
        optimizer,
        frozen={"model": frozen, "alignment": jax.tree.map(lambda _: False, own)},
        data={"source": Batches(arrays, batch_size), "target": Batches({"x": target}, batch_size)},
        steps=steps,
        key=key,
        report=report,
        every=every,
        callback=None if callback is None else on_step,
    )
    return result(params, states, losses)


@lru_cache(maxsize=64)
def _objective(model, alignment, augment, norm, frozen_leaves, structure):
    """Return the objective, cached so that runs with equal settings share one compiled loop."""
    frozen = jax.tree.unflatten(structure, frozen_leaves)

    def embed(params, state, x, key):
        return model.features.train({"params": params, **state}, x, key, frozen=frozen)

    def objective(params, states, batches, extra, progress, key):
        del extra
        augment_key, *dropout = jax.random.split(key, 3)
        source, target = as_images(batches["source"]["x"]), as_images(batches["target"]["x"])
        n = source.shape[0]
        if augment is not None:
            source_key, target_key = jax.random.split(augment_key)
            source, target = augment(source_key, source), augment(target_key, target)
        if norm == "joint":
            z, state = embed(params["model"], states["both"], jnp.concatenate([source, target]), dropout[0])
            z_source, z_target, states = z[:n], z[n:], {"both": {**states["both"], **state}}
        else:
            z_source, source_state = embed(params["model"], states["source"], source, dropout[0])
            z_target, target_state = embed(params["model"], states["target"], target, dropout[1])
            states = {
                "source": {**states["source"], **source_state},
                "target": {**states["target"], **target_state},
            }
        head = params["model"][HEAD]
        logits = z_source @ head["kernel"] + head["bias"][None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batches["source"]["y"])
        penalty = alignment.loss(params["alignment"], z_source, z_target, progress)
        return mean_loss(losses, batches["source"]) + penalty, states

    return objective
