"""Training on a labelled source and an unlabelled target whose features are made alike."""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxmeta import nn
from jaxmeta.checks import ArgumentError, check_number, check_widths, check_word
from jaxmeta.core import Augment, Batch, Key, Optimizer, Params, PyTree
from jaxmeta.declare import forwards
from jaxmeta.nn.stateful import StatefulModel, Variables
from jaxmeta.paths import Patterns
from jaxmeta.transfer.classifier import HEAD, as_images
from jaxmeta.transfer.descent import Batches, descend
from jaxmeta.transfer.discrepancy import MMDSettings, Variant, coral_loss, mmd2
from jaxmeta.transfer.domain_adaptation import dann_strength, domain_loss, gradient_reversal
from jaxmeta.transfer.fine_tune import examples, mean_loss
from jaxmeta.transfer.freezing import frozen_mask
from jaxmeta.transfer.heads import ExampleWeights

DomainNorm = Literal["separate", "joint"]


class Alignment(NamedTuple):
    """What is added to the source's cross-entropy to make the domains' features alike.

    Attributes:
      init: `(key, dim) -> own`, parameters that are trained beside the network's.
      loss: `(own, source, target, progress) -> scalar` of the features `(n_s, dim)` and `(n_t, dim)`, with
        progress in [0, 1) the part of the training that is done.
    """

    init: Callable[[Key, int], Params]
    loss: Callable[..., Array]


def coral(weight: float = 1.0, *, variant: Variant = "paper") -> Alignment:
    """Deep CORAL: `weight` · `jm.transfer.coral_loss`.

    Raises:
      ValueError: a negative weight, another variant.

    References:
      Sun & Saenko, Deep CORAL: Correlation Alignment for Deep Domain Adaptation, 2016.
    """
    check_word("variant", variant, get_args(Variant))
    return _without_parameters(weight, lambda source, target: coral_loss(source, target, variant=variant))


@forwards(mmd2)
def mmd(weight: float = 1.0, **settings: Unpack[MMDSettings]) -> Alignment:
    """Deep adaptation network, on the last features: `weight` · `jm.transfer.mmd2`, with its settings.

    Raises:
      ValueError: a negative weight, and what `jm.transfer.mmd2` refuses.

    References:
      Long et al., Learning Transferable Features with Deep Adaptation Networks, 2015.
    """
    # For what it raises of the settings.
    jax.eval_shape(lambda: mmd2(jnp.zeros((2, 1)), jnp.zeros((2, 1)), **settings))
    return _without_parameters(weight, lambda source, target: mmd2(source, target, **settings))


def dann(*, hidden: tuple[int, ...] = (100,), weight: float = 1.0, gamma: float = 10.0) -> Alignment:
    """DANN: features that a domain head, trained at the same time, cannot tell apart.

    The head sees the features through `jm.transfer.gradient_reversal`, of strength weight · λ_p, p the
    progress of the whole training; the head itself trains with weight 1.

    Args:
      hidden: widths of the domain head's hidden layers; the paper's head for digits has one of 100.
      weight: of what flows into the features.
      gamma: of λ_p; see `jm.transfer.dann_strength`.

    Raises:
      ValueError: a negative weight.

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
    """What training on two domains ends with.

    Attributes:
      target: variables to judge the target by: its own running statistics.
      source: the same parameters with the source's, to judge the source by, as for choosing a model without
        target labels. With norm="joint" the same as `target`.
      losses: of each step.
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
    look: Callable[[int, Aligned], None] | None = None,
    every: int | None = None,
) -> Aligned:
    """Unsupervised domain adaptation: cross-entropy on the source, and features of both domains made alike.

    Min over the network of mean CE(source) + alignment.loss(features of source, features of target).

    Alignment takes for granted that classes are as frequent in the target as in the source: where they
    are not, it aligns wrong ones. `weights` count in the cross-entropy alone and are no cure: draw the
    source's examples anew in the target's proportions (see `jm.transfer.bbse`) first.

    Args:
      model: a `jm.transfer.classifier`.
      variables: of it; not changed.
      source: labelled examples; see `jm.transfer.fine_tune`.
      target: unlabelled ones, `(m, *shape)`; m may differ from n.
      alignment: `jm.transfer.coral()`, `mmd()` or `dann()`.
      optimizer, steps, key, train, batch_size, weights, report: as of `fine_tune`, with as many examples of
        each domain in a step.
      norm: batch statistics, in training and in inference: "separate", each domain its own, which aligns
        two moments by itself, as AdaBN does; "joint", both domains in one batch, as most code has it.
      augment: `(key, x) -> x`, of both domains.
      look: called with step and `Aligned` (without losses), after `every` steps each; to choose a model by.
      every: of `look` and `report`; None for about twenty times.

    Raises:
      ValueError: another `norm`; no target examples, or of another shape; and as `fine_tune`.
      FloatingPointError: the loss is no longer finite.
    """
    check_word("norm", norm, get_args(DomainNorm))
    if model.features is None:
        raise ArgumentError("model", "has no features to align; jm.transfer.classifier makes one that has")
    dim, classes = variables["params"][HEAD]["kernel"].shape
    arrays, shape = examples(source, weights, classes=classes, name="source"), source.x.shape[1:]
    if target.shape[0] == 0 or target.shape[1:] != shape:
        raise ArgumentError("target", f"got shape {target.shape}; it must be (examples, *{shape})")
    own = alignment.init(jax.random.fold_in(key, np.uint32(0xFFFFFFF0)), dim)
    frozen = frozen_mask(variables["params"], train)
    leaves, structure = jax.tree.flatten(frozen)
    start = {name: tree for name, tree in variables.items() if name != "params"}
    states = {"source": start, "target": start} if norm == "separate" else {"both": start}

    def judged_by(params: PyTree, states: PyTree, domain: str) -> Variables:
        return {"params": params["model"], **states[domain if norm == "separate" else "both"]}

    def aligned(params: PyTree, states: PyTree, losses: Array) -> Aligned:
        return Aligned(judged_by(params, states, "target"), judged_by(params, states, "source"), losses)

    def looked(step: int, params: PyTree, states: PyTree) -> None:
        assert look is not None
        look(step, aligned(params, states, jnp.zeros(0)))

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
        look=None if look is None else looked,
    )
    return aligned(params, states, losses)


@lru_cache(maxsize=64)
def _objective(model, alignment, augment, norm, frozen_leaves, structure):
    """The same function for the same settings, so that nothing is compiled twice."""
    frozen = jax.tree.unflatten(structure, frozen_leaves)

    def embed(params, state, x, key):
        return model.features.train({"params": params, **state}, x, key, frozen=frozen)

    def objective(params, states, batches, extra, progress, key):
        del extra
        draw, *dropout = jax.random.split(key, 3)
        source, target = as_images(batches["source"]["x"]), as_images(batches["target"]["x"])
        n = source.shape[0]
        if augment is not None:
            of_source, of_target = jax.random.split(draw)
            source, target = augment(of_source, source), augment(of_target, target)
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
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batches["source"]["y"])
        apart = alignment.loss(params["alignment"], z_source, z_target, progress)
        return mean_loss(each, batches["source"]) + apart, states

    return objective
