"""Classifiers with a pretrained body and a new head, and inference in batches."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmeta import losses
from jaxmeta.checks import ArgumentError, check_count, check_function, check_real
from jaxmeta.core import Batch, Key
from jaxmeta.nn.adapters import Network
from jaxmeta.nn.layers import Dense
from jaxmeta.nn.stateful import StatefulModel, Variables, chain
from jaxmeta.transfer import host
from jaxmeta.transfer.subtree import swap_subtree

BODY, HEAD, ADAPTER = "body", "head", "adapter"
EVAL_BATCH = 256


def classifier(
    body: Network | StatefulModel,
    classes: int,
    *,
    adapter: Network | StatefulModel | None = None,
    momentum: float = 0.9,
) -> StatefulModel:
    """Build a classifier from a body and a new linear head, optionally with an input adapter.

    Its variables have a subtree for each part: "params" → "adapter", "body", "head"; "batch_stats" →
    "body"; …, so that `with_body(variables, pretrained)` inserts pretrained weights, and patterns such as
    "head" or "body/stage3*" select the parameters to train. Its `features` are the inputs of the head.

    Args:
      body: embedding `(n, *shape) -> (n, d)`: one of our networks with `ways=None`, or any other network.
      classes: number C of target classes, at least 2.
      adapter: network that converts the target's inputs to those of the body; see
        `jm.transfer.input_adapter`. None for no adapter.
      momentum: momentum of running statistics; see `jm.nn.as_stateful`.

    Returns:
      A `StatefulModel` with variables `{"params": …, "batch_stats": …}`.

    Raises:
      ValueError: if `classes` is below 2; at `init`, if the output of the body is not `(n, d)`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> model = classifier(jm.nn.Conv4(filters=8), 10)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((2, 28, 28, 1)))
      >>> jax.tree.map(jnp.shape, variables["params"]["head"])
      {'bias': (10,), 'kernel': (8, 10)}
    """
    check_count("classes", classes, 2)
    parts: dict[str, Any] = {} if adapter is None else {ADAPTER: adapter}
    parts |= {BODY: body, HEAD: Dense(classes)}
    model = chain(parts, momentum=momentum)

    assert model.features is not None
    embed = model.features.apply

    def init(key: Key, x: Any) -> Variables:
        variables = model.init(key, x)
        shape = jax.eval_shape(embed, variables, x).shape
        if len(shape) != 2:
            raise ArgumentError(
                "body",
                f"returns shape {shape} for {x.shape[0]} examples; it must be (n, d): take the network "
                "without its head (ways=None), or flatten its output",
            )
        return variables

    return model._replace(init=init)


def with_body(variables: Variables, pretrained: Variables) -> Variables:
    """Return the variables of a classifier with the body's leaves replaced by pretrained ones.

    Args:
      variables: variables of a `classifier`; they are not changed.
      pretrained: variables of the body alone: "params", and "batch_stats" if it has batch statistics.

    Raises:
      ValueError: if leaves are unknown, missing, or of another shape or dtype; the message names them. To
        take a part of the leaves, use `jm.transfer.transplant`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> body = jm.nn.MLP(out=4)
      >>> pretrained = body.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> variables = classifier(body, 2).init(jax.random.key(1), jnp.ones((1, 3)))
      >>> filled = with_body(variables, pretrained)
      >>> bool((filled["params"]["body"]["head"]["kernel"] == pretrained["params"]["head"]["kernel"]).all())
      True
    """
    if "params" not in pretrained:
        raise ArgumentError(
            "pretrained",
            f"got the collections {sorted(pretrained)}; it must have 'params', and 'batch_stats' "
            "where the body has batch statistics",
        )
    lacking = {name for name, tree in variables.items() if tree.get(BODY)} - set(pretrained)
    unknown = {name for name, tree in pretrained.items() if tree} - set(variables)
    if lacking or unknown:
        raise ArgumentError(
            "pretrained",
            f"got the collections {sorted(pretrained)}; they must be those of the body, "
            f"{sorted(name for name, tree in variables.items() if BODY in tree)}",
        )
    return {
        name: swap_subtree(tree, BODY, pretrained[name]) if tree.get(BODY) else tree
        for name, tree in variables.items()
    }


def as_images(x: Array | np.ndarray) -> Array:
    """Convert bytes to numbers in [0, 1]; return any other array as it is."""
    x = jnp.asarray(x)
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x


def in_batches(
    function: Any,
    variables: Variables,
    x: Array | np.ndarray,
    batch: int = EVAL_BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Array, "n ..."]:
    """Return `function(variables, x)` of many examples, computed in batches; bytes become numbers in [0, 1].

    The output of an example must not depend on the others, as in inference.

    Args:
      function: `(variables, x) -> outputs`, compiled once.
      variables: first argument of the function.
      x: examples of shape `(n, *shape)`.
      batch: examples at a time.
      progress: function of the number of finished examples and of `n`, called after each batch.

    Raises:
      ValueError: if `x` has no examples or `batch` is below 1.
    """
    check_count("batch", batch)
    check_real("x", x)
    if progress is not None:
        check_function("progress", progress)
    n = x.shape[0]
    if n == 0:
        raise ArgumentError("x", "got no examples")
    batch = min(batch, n)
    # The last batch overlaps the one before it, so that all have one size: one compilation and no padding.
    starts = [*range(0, n - batch, batch), n - batch]
    pieces, done = [], 0
    for start in starts:
        pieces.append(_one_batch(function, variables, jnp.asarray(x[start : start + batch]))[done - start :])
        done = start + batch
        if progress is not None:
            # Without this barrier, all batches would count as finished once they are dispatched.
            jax.block_until_ready(pieces[-1])
            progress(done, n)
    return jnp.concatenate(pieces)


@partial(jax.jit, static_argnums=0)
def _one_batch(function, variables, x):
    return function(variables, as_images(x))


def extract_features(
    model: StatefulModel,
    variables: Variables,
    x: Array | np.ndarray,
    *,
    batch: int = EVAL_BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Array, "n d"]:
    """Return the features of the frozen body in inference mode, to compute once and reuse.

    Args:
      model: a `classifier`.
      variables: variables of the model.
      x: inputs of shape `(n, *shape)`, bytes or floats.
      batch: examples at a time.
      progress: function of the number of finished examples and of `n`, called after each batch; None for no
        calls.

    Returns:
      Features of shape `(n, d)`, the inputs of the head.

    Raises:
      ValueError: if the model has no `features`, or `x` has no examples.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> model = classifier(jm.nn.MLP(out=4), 2)
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> extract_features(model, variables, jnp.ones((5, 3))).shape
      (5, 4)
    """
    if model.features is None:
        raise ArgumentError("model", "has no features; build it with jm.transfer.classifier")
    return in_batches(model.features.apply, variables, x, batch, progress)


def predict_logits(
    model: StatefulModel,
    variables: Variables,
    x: Array | np.ndarray,
    *,
    batch: int = EVAL_BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Array, "n classes"]:
    """Return the outputs of a model in inference mode.

    Args:
      model: a `classifier`, or any network by `jm.nn.as_stateful`.
      variables: variables of the model.
      x: inputs of shape `(n, *shape)`, bytes or floats.
      batch: examples at a time.
      progress: function of the number of finished examples and of `n`, called after each batch; None for no
        calls.

    Returns:
      Logits of shape `(n, classes)`.

    Raises:
      ValueError: if `x` has no examples.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> model = classifier(jm.nn.MLP(out=4), 2)
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> predict_logits(model, variables, jnp.ones((5, 3))).shape
      (5, 2)
    """
    return in_batches(model.apply, variables, x, batch, progress)


def accuracy(model: StatefulModel, variables: Variables, data: Batch, *, batch: int = EVAL_BATCH) -> float:
    """Return the fraction of the examples that the model classifies correctly, in [0, 1].

    An example with a NaN among its outputs counts as wrong.

    Args:
      model: a `classifier`, or any network by `jm.nn.as_stateful`.
      variables: variables of the model.
      data: examples and their classes.
      batch: examples at a time.

    Raises:
      ValueError: if `data` has no examples.

    Examples:
      >>> import jax.numpy as jnp, jaxmeta as jm
      >>> model = jm.nn.as_stateful((lambda key, x: jnp.eye(2), lambda params, x: x @ params))
      >>> data = jm.Batch(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0]))
      >>> accuracy(model, {"params": jnp.eye(2)}, data)
      0.5
    """
    right, count = losses.score(predict_logits(model, variables, data.x, batch=batch), data)["accuracy"]
    return float(right / count)


def confusion_matrix(
    predictions: Int[Array | np.ndarray, " _"], labels: Int[Array | np.ndarray, " _"], classes: int
) -> Int[np.ndarray, "classes classes"]:
    """Return how many examples of class i (row) were classified as j (column).

    Args:
      predictions: predicted classes of shape (n,).
      labels: true classes of shape (n,).
      classes: number of classes.

    Returns:
      Counts of shape `(classes, classes)`.

    Raises:
      ValueError: if predictions and labels differ in number, or a class is outside [0, classes).

    Examples:
      >>> import numpy as np
      >>> confusion_matrix(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist()
      [[1, 1], [0, 1]]
    """
    check_count("classes", classes)
    rows = host.numbers(labels, "labels")
    rows = host.labels(rows, "labels", rows=rows.size, classes=classes)
    columns = host.labels(predictions, "predictions", rows=rows.size, classes=classes)
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (rows, columns), 1)
    return counts
