"""Heads for features of a fixed network: few-shot learners by name, with settings for such features."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array

from jaxmeta.checks import ArgumentError
from jaxmeta.cli.names import lookup
from jaxmeta.core import Learner, Model
from jaxmeta.metric_based import (
    fine_tuned_head,
    kernel_classifier,
    label_propagation,
    mahalanobis,
    prototypical,
    ridge,
    simple_shot,
    soft_kmeans,
)
from jaxmeta.metric_based.metric_learner import unit
from jaxmeta.nn import Identity

# Head of `evaluate` and `predict` where none is named.
DEFAULT = "simple_shot"


class Head(NamedTuple):
    """A few-shot learner on features.

    Attributes:
      learner: learner, whose examples are features, `(n, dim)`.
      about: description of the learner in one line.
      transductive: whether the prediction for a query depends on the other queries.
      distances: whether outputs are negative distances from the classes.
      sharpness: factor of the outputs in the softmax of probabilities.
    """

    learner: Learner
    about: str
    transductive: bool = False
    distances: bool = False
    sharpness: float = 1.0


def _fixed(function: Callable[[Array], Array]) -> Model:
    """Return a function of features as a model without parameters."""
    return Model(lambda key, x: {}, lambda params, x: function(x))


# Features as they are, and with length 1. Lengths differ between networks by orders of magnitude, so that a
# step size, a temperature or a weight of a penalty has a meaning for all of them only with length 1.
_PLAIN, _UNIT = Identity(), _fixed(unit)

HEADS = {
    # Squared distances of vectors of length 1 lie in [0, 4].
    "simple_shot": Head(
        simple_shot(_PLAIN, transform="l2n"),
        "nearest class mean of features of length 1",
        distances=True,
        sharpness=10.0,
    ),
    # There are no training classes whose mean could be subtracted: the support set's is.
    "simple_shot_centred": Head(
        simple_shot(_PLAIN, transform="cl2n", norm="support"),
        "the same after subtracting the mean of the support set",
        distances=True,
        sharpness=10.0,
    ),
    "prototypical": Head(
        prototypical(_PLAIN), "nearest class mean of the features as they are", distances=True
    ),
    "ridge": Head(ridge(_UNIT), "ridge regression to the labels, with penalty 1 for features of length 1"),
    # The loss has a curvature of at most 1 for features of length 1, for which any step size below 2 is
    # stable: the second derivative of a softmax is at most 1/2, times the squared length of (z, 1), which
    # is 2. The published 0.01 is for features of length 20 or so, and would hardly move.
    "fine_tuned_head": Head(
        fine_tuned_head(_UNIT, inner_lr=1.0), "linear classifier after 100 steps of gradient descent"
    ),
    # The published scale for many classes. Class means of length up to 1 are the initial weights.
    "fine_tuned_head_cosine": Head(
        fine_tuned_head(_UNIT, head="cosine", scale=10.0, inner_lr=0.1),
        "cosine classifier after 100 steps of gradient descent",
    ),
    # With a temperature of 1/10 a difference in cosine of 0.1 is a factor of e.
    "kernel_classifier": Head(
        kernel_classifier(_UNIT, similarity="cosine", scale=10.0), "mean of the labels, weighted by cosines"
    ),
    # The variance of features of length 1 is below 1, and mostly between classes: with a regularisation of 1
    # the metric would be Euclidean. This setting and those of the transductive heads were chosen on emoji's
    # validation classes, by the features of SqueezeNet.
    "mahalanobis": Head(
        mahalanobis(_UNIT, regularisation=0.03),
        "Mahalanobis distance to the class means, with regularised covariances",
        distances=True,
    ),
    "soft_kmeans": Head(
        soft_kmeans(_UNIT, scale=3.0),
        "nearest class mean, with means refined by the queries",
        transductive=True,
        distances=True,
    ),
    # As many neighbours as a class has nodes in a task of few shots and queries. The kernel's width is that
    # of squared distances of 0.2 between features of one class. The published α = 0.99 is for graphs of 80
    # nodes: in one of 10 it spreads the labels until all nodes have the same.
    "label_propagation": Head(
        label_propagation(_UNIT, alpha=0.5, neighbours=5, sigma=0.3),
        "labels propagated over a graph of the support set and the queries",
        transductive=True,
    ),
}


def find_head(name: str | None, *, inductive: bool = False) -> Head:
    """Return a head by name, by default `DEFAULT`.

    Args:
      name: name in `HEADS`.
      inductive: whether the head must classify each image by itself.

    Raises:
      ArgumentError: there is none of this name, or it is transductive.
    """
    head: Head = lookup("learner", name or DEFAULT, HEADS)
    if inductive and head.transductive:
        others = ", ".join(each for each, other in HEADS.items() if not other.transductive)
        raise ArgumentError(
            "learner",
            f"got {name}, whose prediction for an image depends on the other images of the same call; "
            f"it must be one of {others}",
        )
    return head
